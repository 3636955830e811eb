"""Parts of Python that Windows lacks: the package imports and its files and signals work without them."""

import subprocess
import sys

from harness import environment

PROGRAM = """
import os, signal, sys, multiprocessing.resource_tracker, torch.utils.data

for name in ("O_DIRECTORY", "O_NOFOLLOW", "sched_getaffinity", "set_blocking", "pread"):
    delattr(os, name)
for name in ("SIGHUP", "SIGCHLD", "sigtimedwait", "pthread_sigmask"):
    delattr(signal, name)
sys.modules["fcntl"] = None
signal.set_wakeup_fd = lambda fd, **_: -1  # takes descriptors that block there

import pathlib, importlib, improved_diffusion
root = pathlib.Path(improved_diffusion.__file__).parent
for path in sorted(root.rglob("*.py")):
    importlib.import_module(".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__"))

from improved_diffusion.data import loader, sources
from improved_diffusion.training.signals import StopSignals
from improved_diffusion.utils.files import FolderLock, write_files

assert sources.processes(-1) >= 1
write_files("run", {name: lambda f: f.write(b"1") for name in "ab"})
FolderLock("run").acquire()
with StopSignals() as stop:
    with stop.children():
        pass
    signal.raise_signal(signal.SIGTERM)
assert stop.received == "SIGTERM"
loader._ignore_signals(0)
with loader._sigterm_blocked():
    pass
"""


def test_without_what_windows_lacks(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["a", "b"]
