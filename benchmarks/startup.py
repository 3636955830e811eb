"""Sub-command startup: import time of the library and start-up time of its scripts."""

import os
import subprocess
import sys
import time
from pathlib import Path

from tables import publish
from timing import spread

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample")
IMPORT = """
import time
start = time.perf_counter()
import torch, numpy
theirs = time.perf_counter() - start
import improved_diffusion.script_util
print(theirs, time.perf_counter() - start - theirs)
"""


def startup(args):
    """Each measurement in a fresh process, since imports are cached."""
    scripts = [ROOT / "scripts" / f"{name}.py" for name in SCRIPTS[: 1 if args.quick else None]]
    ours = "import improved_diffusion.script_util, after these"
    seconds = {"import torch, numpy": [], ours: [], **{f"{script.name} --help": [] for script in scripts}}
    for _ in range(args.repetitions):
        for name, taken in zip(seconds, map(float, process("-c", IMPORT).split()), strict=False):
            seconds[name].append(taken)
        for script in scripts:
            start = time.perf_counter()
            process(script, "--help")
            seconds[f"{script.name} --help"].append(time.perf_counter() - start)
    publish("startup", [{"work": name, "seconds": spread(taken)} for name, taken in seconds.items()], args)


def process(*words):
    """The stdout of a Python process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=environment, check=True, stdout=subprocess.PIPE).stdout
