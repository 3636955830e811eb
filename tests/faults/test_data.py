"""Images that break, data workers that are killed, readers that leave: the run saves first, or does without them."""

import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from processes import (
    PATIENCE,
    SCRIPT,
    SHORT,
    assert_equals_uninterrupted,
    environment,
    finish,
    lines_of,
    newest_set,
    start,
    steps_with,
    train_words,
    wait_for,
    where_it_began,
)
from training import load, read_rows


def stopped_at(folder, ranks):
    """The step that all ranks have stopped at, which is saved: all steps that the log knows are in it."""
    steps = set()
    for rank in range(ranks):
        (found,) = [re.match(r"stopped by an error at step (\d+): ", line) for line in lines_of(folder, rank)[-2:-1]]
        steps.add(int(found[1]))
    (step,) = steps
    assert newest_set(folder) == step == read_rows(folder)[-1]["step"]
    assert load(folder / f"state{step:06d}.pt")["updates"] == step + 1
    return step


@pytest.mark.parametrize("ranks, workers, damage", [(1, 0, "gone"), (1, 1, "junk"), (2, 0, "junk"), (2, 1, "gone")])
def test_an_image_breaks(server, images, tmp_path, ranks, workers, damage):
    """On one of the ranks. All of them save the same step, and with the image mended nothing was lost."""
    own, folder = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, own)
    broken = sorted(own.iterdir())[3]  # of rank 1 of 2
    whole = broken.read_bytes()
    processes = start(server, own, folder, ranks, max_steps=10**6, num_workers=workers, save_interval=5)
    wait_for(lambda: steps_with(folder)[1:], processes)
    broken.write_bytes(b"junk") if damage == "junk" else broken.unlink()
    assert [process.wait() for process in processes] == [2] * ranks, [process.stderr for process in processes]
    for process in processes:
        (line,) = process.stderr.splitlines()
        assert line.startswith("image_train.py: error: ") and f"{broken}: cannot be read as an image (" in line
    broken.write_bytes(whole)
    step = stopped_at(folder, ranks)
    before = len(lines_of(folder))
    finish(start(server, own, folder, ranks, max_steps=step + 6, resume_checkpoint="auto", save_interval=5))
    assert where_it_began(lines_of(folder)[before:]) == step
    again = tmp_path / "whole"
    finish(start(server, own, again, ranks, max_steps=step + 6, save_interval=5))
    assert_equals_uninterrupted(folder, again)


def test_a_worker_is_killed(server, images, tmp_path):
    """Most of the time in the middle of a step: it is finished, and saved."""
    flags = dict(num_workers=1, save_interval=5)
    processes = start(server, images, tmp_path / "run", max_steps=10**6, **flags)
    wait_for(lambda: steps_with(tmp_path / "run")[1:], processes)
    (worker,) = subprocess.run(
        ["ps", "--ppid", str(processes[0].pid), "-o", "pid="], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(worker), signal.SIGKILL)
    assert processes[0].wait() == 1
    (line,) = processes[0].stderr.splitlines()
    assert line.startswith("image_train.py: error: a process that reads images ended (DataLoader worker ")
    step = stopped_at(tmp_path / "run", 1)
    end = step + 6
    finish(start(server, images, tmp_path / "run", max_steps=end, resume_checkpoint="auto", **flags))
    finish(start(server, images, tmp_path / "whole", max_steps=end, **flags))
    assert_equals_uninterrupted(tmp_path / "run", tmp_path / "whole")


def test_piped_to_head(server, images, uninterrupted, tmp_path):
    """It ends after a line. The run does not notice but for one line of its log."""
    folder, pipe = tmp_path / "run", tmp_path / "pipe"
    os.mkfifo(pipe)
    processes = start(server, images, folder, stdout=pipe, max_steps=SHORT, resume_checkpoint="auto")
    head = subprocess.run(["head", "-n", "1", pipe], capture_output=True, text=True, check=True)
    finish(processes)
    assert head.stdout == f"Logging to {folder}\n"
    assert sum("<stdout>: cannot be written (Broken pipe)" in line for line in lines_of(folder)) == 1
    assert_equals_uninterrupted(folder, uninterrupted(1))


IN_LITTLE_SHARED_MEMORY = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
LITTLE = "mount -t tmpfs -o size=1m tmpfs /dev/shm"


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*IN_LITTLE_SHARED_MEMORY, LITTLE], capture_output=True).returncode,
    reason="no /dev/shm can be mounted for one process here",
)
def test_shared_memory_is_full(images, tmp_path):
    """By another program, in mid-run; by which the data workers send their batches."""
    words = train_words(images, max_steps=10**6, num_workers=1, save_interval=10**6)
    run = 'exec "$@" & until [ "$(wc -l < "$0/progress.csv")" -gt 5 ]; do sleep 0.1; done 2> /dev/null'
    fill = "dd if=/dev/zero of=/dev/shm/full bs=4096 2> /dev/null"
    done = subprocess.run(
        [*IN_LITTLE_SHARED_MEMORY, f"{LITTLE} && {run}; {fill}; wait $!", tmp_path, sys.executable, SCRIPT, *words],
        env=environment(OPENAI_LOGDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stderr
    (line,) = done.stderr.splitlines()
    # torch says which it was: no room for a batch, or a worker that wrote where there was none
    assert line.startswith("image_train.py: error: ") and "shared memory" in line
    assert stopped_at(tmp_path, 1) >= 4
