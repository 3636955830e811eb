"""SIGKILL at any moment: what is on disk is a checkpoint, and the run goes on from it as if nothing had been."""

import os
import random
import signal
import time

import pytest
from killing import Campaign
from processes import (
    LAUNCHERS,
    MPIEXEC,
    PATIENCE,
    SCRIPT,
    SHORT,
    TORCHRUN,
    assert_equals_uninterrupted,
    finish,
    launched,
    left_behind,
    lines_of,
    listening_sockets,
    marked_processes,
    newest_set,
    start,
    steps_with,
    train_words,
    wait_for,
    where_it_began,
)
from soak import SETTINGS
from training import read_rows

KILLS = 6  # soak.py has more, in more settings


@pytest.mark.parametrize("name", ["one-rank", "two-ranks"])
def test_killed_at_random_moments(server, images, tmp_path, name):
    """Each resumed run begins at the newest set that is complete, and all together equal one that was left alone."""
    (setting,) = (setting for setting in SETTINGS if setting.name == name)
    campaign = Campaign(setting, server, images, tmp_path, random.Random(name))
    campaign.go(KILLS)
    print(f"{campaign.kills} kills in {campaign.runs} run(s): {campaign.met}; the runs began at {campaign.began_at}")
    assert campaign.lost == []
    assert campaign.kills == KILLS
    assert len(campaign.met) >= 2 and {*campaign.began_at} - {"unsaid", None}


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_of_two_killed(server, images, uninterrupted, tmp_path, victim):
    """The other neither hangs nor prints a traceback, and the run goes on from the last save."""
    flags = dict(max_steps=SHORT, resume_checkpoint="auto")
    processes = start(server, images, tmp_path, 2, **flags)
    wait_for(lambda: steps_with(tmp_path)[3:], processes)
    processes[victim].kill()
    assert processes[victim].wait() == -9
    other = processes[1 - victim]
    began = time.monotonic()
    status = other.wait(60)
    print(f"rank {victim} killed; rank {1 - victim} ended after {time.monotonic() - began:.2f} s with {status}")
    print(other.stderr)
    assert status == 1
    (line,) = other.stderr.splitlines()
    assert line.startswith(
        f"image_train.py: error: rank {1 - victim}: another rank, or the connection to it, is gone: "
    )

    expected, lines_before = newest_set(tmp_path), len(lines_of(tmp_path))
    finish(start(server, images, tmp_path, 2, **flags))
    assert where_it_began(lines_of(tmp_path)[lines_before:]) == expected >= 6
    assert_equals_uninterrupted(tmp_path, uninterrupted(2))
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(SHORT))


def test_torchrun_starts_the_ranks_again(images, uninterrupted, tmp_path):
    """The same command with `auto` is all it needs; what the ranks before them told each other is forgotten."""
    command = [*TORCHRUN, "--nproc_per_node", "2", "--max_restarts", "1"]
    command += [SCRIPT, *train_words(images, max_steps=SHORT, resume_checkpoint="auto")]
    folder, said = tmp_path / "run", tmp_path / "said"
    with launched(command, folder, said, checkpoints=2) as agent:
        ranks = [
            pid for pid, words in marked_processes().items() if str(SCRIPT) in words and "max_restarts" not in words
        ]
        os.kill(max(ranks), signal.SIGKILL)
        assert agent.wait(PATIENCE) == 0, said.read_text()
    lines = lines_of(folder)
    print([line for line in lines if "loading model" in line or "no complete" in line])
    assert sum(line.startswith("Logging to") for line in lines) == 2
    assert_equals_uninterrupted(folder, uninterrupted(2))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_killed(server, images, uninterrupted, tmp_path, launcher):
    """Its ranks end, before the run that is started in its place finds them in its folder."""
    if launcher == "mpiexec" and not MPIEXEC.exists():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    folder, said, sockets = tmp_path / "run", tmp_path / "said", listening_sockets()
    command = [*LAUNCHERS[launcher], SCRIPT, *train_words(images, max_steps=10**6, save_interval=10, num_workers=1)]
    with launched(command, folder, said, checkpoints=1) as process:
        process.kill()
        process.wait()
        began = time.monotonic()
        assert left_behind(sockets, allowed={server.process.pid}, seconds=60) == ""
        print(f"{launcher} killed; all it started was gone after {time.monotonic() - began:.1f} s")
    expected, lines_before = newest_set(folder), len(lines_of(folder))
    finish(start(server, images, folder, 2, max_steps=expected + 2, resume_checkpoint="auto"))
    assert where_it_began(lines_of(folder)[lines_before:]) == expected


def test_a_run_waits_for_the_end_of_the_one_before(server, images, uninterrupted, tmp_path):
    """As a job does that a scheduler starts anew while the old one is about to be killed."""
    flags = dict(max_steps=SHORT, resume_checkpoint="auto")
    (first,) = start(server, images, tmp_path, **flags, num_workers=1)
    wait_for(lambda: steps_with(tmp_path)[2:], [first])
    first.kill(signal.SIGSTOP)
    expected, lines_before = newest_set(tmp_path), len(lines_of(tmp_path))
    (second,) = start(server, images, tmp_path, **flags)
    try:
        wait_for(lambda: second.out.exists() and f"{tmp_path} is in use by" in second.out.read_text(), [second])
        assert len(lines_of(tmp_path)) == lines_before
    finally:
        first.kill()
    assert first.wait() == -9
    finish([second])
    assert where_it_began(lines_of(tmp_path)[lines_before:]) == expected
    assert_equals_uninterrupted(tmp_path, uninterrupted(1))
