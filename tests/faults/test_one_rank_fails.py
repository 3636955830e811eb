"""What goes wrong on one rank ends all of them, with a line or a traceback, under each launcher. MPI would wait."""

import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import HELPERS, ROOT
from processes import PATIENCE, SCRIPT, environment, names_of, steps_with, train_words

FAIL = HELPERS / "fail.py"
MPIEXEC = Path(sys.executable).parent / "mpiexec"
needs_mpiexec = pytest.mark.skipif(not MPIEXEC.exists(), reason="no mpiexec beside this Python: pip install mpich")


@contextlib.contextmanager
def under_mpiexec(words, folder, **variables):
    """Two ranks; killed in the end. :return: the launcher's process."""
    process = subprocess.Popen(
        [MPIEXEC, "-n", "2", sys.executable, *words],
        env=environment(OPENAI_LOGDIR=str(folder), PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@needs_mpiexec
@pytest.mark.parametrize(
    "what, status, message",
    [
        ("InputError", 2, "x.png: something is wrong with it"),
        ("ValueError", 1, "ValueError: a bug"),
        ("not caught", 1, "KeyError"),
        ("parameter", 1, "at step 4 on rank 1; the last good checkpoint is "),
    ],
)
def test_error_of_one_rank_ends_all_under_mpiexec(images, tmp_path, what, status, message):
    """And the last good checkpoint stays."""
    words = train_words(images, max_steps=10**6, save_interval=2, log_interval=10**6)
    with under_mpiexec([FAIL, what, *words], tmp_path) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    print(errors)
    assert process.returncode == status
    assert message in errors
    assert ("Traceback" in errors) == (what in ("ValueError", "not caught"))
    assert steps_with(tmp_path) == [0, 2]


@needs_mpiexec
def test_image_that_breaks_ends_all_under_mpiexec(images, tmp_path):
    """In mid-run, read by one rank alone."""
    for path in images.iterdir():
        (tmp_path / "images" / path.name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    folder = tmp_path / "run"
    with under_mpiexec([SCRIPT, *train_words(tmp_path / "images", max_steps=10**6)], folder) as process:
        end = time.monotonic() + PATIENCE
        while not steps_with(folder)[2:]:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        broken = sorted((tmp_path / "images").iterdir())[5]
        broken.write_bytes(random.Random(0).randbytes(500))
        _, errors = process.communicate(timeout=PATIENCE)
    print(errors)
    assert process.returncode in (1, 2)
    assert str(broken) in errors and "Traceback" not in errors
    assert all((folder / name).exists() for name in names_of(steps_with(folder)[-1]))


MEET = """
from improved_diffusion import dist_util
from improved_diffusion.cli import parser
from improved_diffusion.utils import attendance
attendance.MEETING_NOTICE, attendance.MEETING_LIMIT, attendance.PERIOD = 0.2, 2.0, 0.1
parser.run(dist_util.setup_dist)
"""


@needs_mpiexec
def test_port_of_the_user_that_is_another_programs(tmp_path):
    """Rank 0 cannot have it, and rank 1 is accepted there and never gets an answer."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        port = str(silent.getsockname()[1])
        with under_mpiexec(["-c", MEET], tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port) as process:
            _, errors = process.communicate(timeout=PATIENCE)
    print(errors)
    assert process.returncode == 2 and "Traceback" not in errors
    assert "mpiexec promises 2 ranks, but rank 0 did not find the others: " in errors
    assert f"s for rank 0 at 127.0.0.1 port {port}: mpiexec promises 2 ranks (PMI_SIZE is 2)" in errors


GONE = """
import os, sys
if os.environ["PMI_RANK"] == "1":
    sys.exit(3)
"""


@needs_mpiexec
def test_rank_that_ends_before_it_joins_mpi(tmp_path):
    """MPI_Init waits for it without letting Python's threads run."""
    with under_mpiexec(["-c", GONE + MEET], tmp_path) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    print(errors)
    assert process.returncode != 0
    assert "in _store_by_mpi" in errors
