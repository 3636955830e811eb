"""A job: a training run or a measurement, where its result is kept, and how a worker process computes it."""

import functools
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch as th

from improved_diffusion import logger
from improved_diffusion.options import TrainOptions
from improved_diffusion.utils.errors import TrainingError
from improved_diffusion.utils.files import write_files

from . import measures
from .declare import Measure, Run

ROOT = Path(__file__).parent.parent
SIZE = 16  # of the images, in pixels


class Folder:
    """
    Where everything is kept: emoji.packed/, runs/KEY/ and measures/KEY.json. What is finished is never computed twice.

    :param source: of scripts/prepare.py, and its flags.
    """

    def __init__(self, path: Path, source: tuple[str, ...] = ("emoji", "--image_size", str(SIZE))):
        self.path, self.source = path, source
        self.data = path / "emoji.packed"

    def prepared(self, out: str) -> list[str]:
        """The arguments of scripts/prepare.py that write the images to `out`."""
        return [self.source[0], out, *self.source[1:]]

    def run(self, run: Run) -> Path:
        return self.path / "runs" / run.key

    def file(self, measure: Measure) -> Path:
        return self.path / "measures" / f"{measure.key}.json"

    def has(self, job: Run | Measure) -> bool:
        if isinstance(job, Run):
            return (self.run(job) / f"state{job.steps:06d}.pt").exists()  # the last file of a checkpoint
        return self.file(job).exists()

    def read(self, measure: Measure) -> dict[str, Any]:
        """{"seconds": ..., "numbers": what the function returned, ...}."""
        return json.loads(self.file(measure).read_text(encoding="utf-8"))

    def seconds(self, run: Run) -> float:
        """That a run has taken, all its parts together."""
        path = self.run(run) / "seconds.txt"
        return float(path.read_text()) if path.exists() else 0.0


_script: subprocess.Popen | None = None  # that this process waits for


def initialize() -> None:
    """Of a worker process: one thread, no log, and an end with the runner's."""
    th.set_num_threads(1)
    logger.Logger.CURRENT = logger.Logger(dir=None, output_formats=[])
    threading.Thread(target=_end_with_runner, daemon=True).start()


def _end_with_runner():
    """Else a runner that was killed leaves workers, and runs that the next one finds in use."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    if _script is not None:
        _script.terminate()  # it saves
    os._exit(1)


def prepare(folder: Folder) -> None:
    """Write the images, unless they are there."""
    if not (folder.data / "test" / "labels.npz").exists():
        call("prepare", *folder.prepared(str(folder.data)))


def do(folder: Folder, job: Run | Measure) -> float:
    """Train or measure, and keep the result. :return: seconds."""
    start = time.monotonic()
    if isinstance(job, Run):
        before = folder.seconds(job)
        try:
            train(folder, job)
        finally:
            folder.run(job).mkdir(parents=True, exist_ok=True)
            (folder.run(job) / "seconds.txt").write_text(str(before + time.monotonic() - start))
    else:
        numbers = compute(folder, job)
        kept = {
            "function": job.function, "run": job.run and job.run.name, "flags": job.run and dict(job.run.flags),
            "settings": dict(job.settings), "seconds": time.monotonic() - start, "numbers": numbers,
        }  # fmt: skip
        text = json.dumps(kept, allow_nan=False).encode()
        write_files(str(folder.file(job).parent), {folder.file(job).name: lambda f: f.write(text)})
    return time.monotonic() - start


def train(folder: Folder, run: Run) -> None:
    """scripts/image_train.py, from where it stopped if it did."""
    flags = [word for name, value in run.flags for word in (f"--{name}", str(value))]
    paths = ["--data_dir", str(folder.data / "train"), "--log_dir", str(folder.run(run))]
    call("image_train", *flags, *paths, "--resume_checkpoint", "auto")
    if not folder.has(run):
        raise TrainingError(f"{folder.run(run)}: ended before step {run.steps}")


def call(script: str, *words: str) -> None:
    """:raises TrainingError: with what the script printed."""
    global _script
    command, pipe = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *words], subprocess.PIPE
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as _script:
        out, errors = _script.communicate()
    if _script.returncode:
        raise TrainingError(f"{script}: {errors.strip() or out.strip()[-500:]}")


def compute(folder: Folder, measure: Measure) -> dict[str, Any]:
    function, settings = getattr(measures, measure.function), dict(measure.settings)
    data = images(folder.data)
    if measure.run is None:
        return function(data, **settings)
    step = settings.pop("step", None)
    return function(trained(measure.run, folder.run(measure.run), step), data, **settings)


@functools.cache
def images(path: Path) -> measures.Images:
    return measures.Images(path, SIZE)


@functools.lru_cache(maxsize=1)
def trained(run: Run, path: Path, step: int | None) -> measures.Trained:
    """The average of a run at a checkpoint, the last one for None."""
    options = TrainOptions().replace(**dict(run.flags))
    return measures.Trained(options, str(path / f"ema_{run['ema_rate']}_{step or run.steps:06d}.pt"))
