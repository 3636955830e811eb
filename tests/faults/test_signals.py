"""SIGTERM, SIGINT and SIGHUP, from launchers and from a person: all ranks save at one step, and the run can go on."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import time

import pytest
from harness import HELPERS
from processes import (
    LAUNCHERS,
    MPIEXEC,
    PATIENCE,
    SCRIPT,
    SHORT,
    assert_equals_uninterrupted,
    environment,
    finish,
    launched,
    lines_of,
    newest_set,
    start,
    steps_with,
    train_words,
    wait_for,
    where_it_began,
)


def assert_stopped(folder, by, ranks=1):
    """All ranks have logged, as the last thing but one, that they stopped at one step. :return: the step."""
    reasons, steps = [], set()
    for rank in range(ranks):
        found = re.fullmatch(r"stopped by (.*) at step (\d+): (.*)", lines_of(folder, rank)[-2])
        assert "--resume_checkpoint auto" in lines_of(folder, rank)[-1]
        reasons.append(found[1])
        steps.add(int(found[2]))
        assert found[3] == f"{folder}/model{int(found[2]):06d}.pt"
    assert by in reasons and {*reasons} <= {by, "a signal to another rank"}
    assert len(steps) == 1 and newest_set(folder) == max(steps)
    print(f"rank by rank: {reasons} at step {steps}")
    return steps.pop()


def assert_goes_on(server, images, folder, uninterrupted, ranks, stopped_at):
    before = len(lines_of(folder))
    finish(start(server, images, folder, ranks, max_steps=SHORT, resume_checkpoint="auto"))
    assert where_it_began(lines_of(folder)[before:]) == stopped_at
    assert_equals_uninterrupted(folder, uninterrupted(ranks))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_sigterm_to_a_launcher(server, images, uninterrupted, tmp_path, launcher):
    """As a scheduler sends it. The launchers' own status says little then, that of the ranks counts."""
    if launcher == "mpiexec" and not MPIEXEC.exists():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    folder, said, statuses = (tmp_path / name for name in ("run", "said", "statuses"))
    statuses.mkdir()
    words = train_words(images, max_steps=10**6, num_workers=1)
    command = [*LAUNCHERS[launcher], HELPERS / "exit_status.py", statuses, SCRIPT, *words]
    with launched(command, folder, said, checkpoints=3) as process:
        process.terminate()
        status = process.wait(PATIENCE)
    found = {path.name: path.read_text() for path in statuses.iterdir()}
    print(f"{launcher} ended with {status}, its processes with {found}")
    assert found == {"status-0": "0", "status-1": "0"}, said.read_text()
    # torchrun's agent ends with 1; MPICH's mpiexec with 0, unless it kills a rank that takes its time to leave
    assert status in {"torchrun": (1,), "mpiexec": (0, -9)}[launcher]
    if launcher == "mpiexec":
        assert "Traceback" not in said.read_text()
    assert_goes_on(server, images, folder, uninterrupted, 2, assert_stopped(folder, "SIGTERM", ranks=2))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_ctrl_c(server, images, uninterrupted, tmp_path, workers, name):
    """The terminal sends SIGINT, and SIGHUP at its end, to the whole process group, to the workers too."""
    processes = start(server, images, tmp_path, max_steps=10**6, num_workers=workers)
    wait_for(lambda: steps_with(tmp_path)[2:], processes)
    os.killpg(processes[0].pid, signal.Signals[name])
    finish(processes)
    assert_goes_on(server, images, tmp_path, uninterrupted, 1, assert_stopped(tmp_path, name))


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_closed(server, images, uninterrupted, tmp_path, nohup):
    """The run stops, or, under nohup, continues without it."""
    folder = tmp_path / "run"
    ours, theirs = os.openpty()

    def take_terminal():  # as its foreground process group
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if nohup else signal.SIG_DFL)

    words = train_words(images, max_steps=SHORT if nohup else 10**6, num_workers=1)
    process = subprocess.Popen(
        [sys.executable, SCRIPT, *words],
        env=environment(OPENAI_LOGDIR=str(folder)),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    try:
        os.close(theirs)
        end = time.monotonic() + PATIENCE
        while len(steps_with(folder)) < 3:
            assert process.poll() is None and time.monotonic() < end
            os.read(ours, 10**6)
        os.close(ours)
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
    assert sum("<stdout>: cannot be written" in line for line in lines_of(folder)) == 1
    if nohup:
        assert_equals_uninterrupted(folder, uninterrupted(1))
        return
    assert any(line.startswith("stopped by SIGHUP at step ") for line in lines_of(folder))
    finish(start(server, images, folder, max_steps=SHORT, resume_checkpoint="auto"))
    assert_equals_uninterrupted(folder, uninterrupted(1))


@pytest.mark.parametrize("first, second", [("SIGTERM", "SIGTERM"), ("SIGTERM", "SIGINT"), ("SIGINT", "SIGINT")])
def test_second_signal_ends_a_rank_that_waits_inside_a_step(server, images, uninterrupted, tmp_path, first, second):
    """The other rank stands still, so the step, and with it what the first signal asks for, does not end."""
    flags = dict(max_steps=10**6)
    processes = start(server, images, tmp_path, 2, **flags)
    try:
        wait_for(lambda: steps_with(tmp_path)[2:], processes)
        processes[1].kill(signal.SIGSTOP)
        time.sleep(0.5)
        processes[0].kill(signal.Signals[first])
        assert processes[0].wait(1.3) is None
        saved = newest_set(tmp_path)
        processes[0].kill(signal.Signals[second])
        began = time.monotonic()
        status = processes[0].wait(30)
        print(f"{first}, then {second}: status {status} after {time.monotonic() - began:.3f} s")
        assert status == 128 + signal.Signals[second]
        assert processes[0].stderr == ""
        assert newest_set(tmp_path) == saved
    finally:
        for process in processes:
            if process.wait(0) is None:
                process.kill()
                process.wait()
    if first == second == "SIGTERM":
        assert_goes_on(server, images, tmp_path, uninterrupted, 2, saved)
