"""Real runs on two ranks, with what torchrun tells them and by mpiexec."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from harness import HELPERS, environment, free_port, write_images
from processes import finish
from training import assert_same, checkpoint_names, load, read_rows, written_rows

MPIEXEC = Path(sys.executable).parent / "mpiexec"
SCRIPT = HELPERS / "two_ranks.py"


def as_by_torchrun(request, words):
    """torchrun itself starts ranks in tests/faults."""
    server = request.getfixturevalue("server")
    world = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    finish([server.start(SCRIPT, words, **world, RANK=rank, LOCAL_RANK=rank) for rank in range(2)])


def by_mpiexec(request, words):
    if not MPIEXEC.exists():
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    done = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, SCRIPT, *words],
        env=environment(CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr


@pytest.fixture(
    scope="module",
    params=[pytest.param(start, marks=pytest.mark.slow, id=start.__name__) for start in (as_by_torchrun, by_mpiexec)],
)
def two_ranks(request, tmp_path_factory):
    """two_ranks.py has run: (its folder, what rank 0 found, what rank 1 found)."""
    folder = tmp_path_factory.mktemp("two_ranks")
    images = write_images(tmp_path_factory.mktemp("images"), count=5)
    request.param(request, [str(folder), str(images)])
    return folder, *(json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1))


def test_exchange_between_ranks(two_ranks):
    for rank, found in enumerate(two_ranks[1:]):
        assert found["rank"] == rank and found["group"] == [rank, 2, "gloo"]
        assert found["gathered"] == [[0, 0], [1, 1], [1, 1], [1, 1]]
        assert found["gathered from rank 1 alone"] == [0, 1]
        assert found["objects"] == [{"rank": 0}, {"rank": 1}]
        assert found["sum"] == [3, 20]
        assert found["synced"] == [[0, 0, 0], [[0]]]


def test_gradient_is_that_of_all_batches(two_ranks):
    for found in two_ranks[1:]:
        assert found["wrapped"] is True
        assert found["gradient error"] < 1e-6


def test_ranks_agree_on_the_microbatch_that_fits(two_ranks):
    for found in two_ranks[1:]:
        assert (found["microbatch"], found["microbatch auto is that"]) == (1, True)


def test_ranks_evaluate_held_out_images_together(two_ranks):
    folder, *found = two_ranks
    assert found[0]["held out"] == found[1]["held out"]
    rows = [row["valid_loss"] for row in read_rows(folder / "valid") if "valid_loss" in row]
    assert rows == [values["valid_loss"] for values in found[0]["held out"]] and len(rows) == 2
    assert all(rank["as without held out"] for rank in found)


def test_ranks_hold_the_same_parameters(two_ranks):
    _, *found = two_ranks
    assert found[0]["parameters"] == found[1]["parameters"]
    assert found[0]["losses"] != found[1]["losses"]  # of different images


def test_rows_are_means_over_ranks(two_ranks):
    folder, *found = two_ranks
    losses = np.array([f["losses"] for f in found]).reshape(2, 5, 2)  # rank, step, sample
    rows = read_rows(folder / "whole")
    assert [row["mse"] for row in rows] == pytest.approx(losses.mean(axis=(0, 2)), rel=1e-6)
    assert [row["samples"] for row in rows] == [4, 8, 12, 16, 20]
    assert found[0]["global batch"] == 4


def test_rank_0_alone_writes(two_ranks):
    folder = two_ranks[0]
    files = {path.name for path in (folder / "whole").iterdir()}
    labels = (0, 2, 4)
    checkpoints = {f"{kind}{label:06d}.pt" for label in labels for kind in ("model", "ema_0.9_", "opt", "state")}
    assert files == {*checkpoints, "progress.csv", "log.txt", "log-rank001.txt"}


def test_resumed_on_ranks(two_ranks):
    """Each rank goes on in its own data, with its own random numbers."""
    folder = two_ranks[0]
    for name in checkpoint_names(folder / "whole"):
        assert_same(load(folder / "parts" / name), load(folder / "whole" / name), name)
    assert written_rows(folder / "parts") == written_rows(folder / "whole")
    assert all("cannot continue" not in path.read_text() for path in (folder / "parts").glob("log*.txt"))


def test_divergence_of_one_rank_ends_all(two_ranks):
    folder, *found = two_ranks
    for message in [f["error"] for f in found]:
        assert f"at step 3 on rank 1; the last good checkpoint is {folder}/diverged/model000002.pt" in message


def test_a_rank_that_does_not_come_is_named(two_ranks):
    for found in two_ranks[1:]:
        assert re.fullmatch(r"rank 0 has waited \d+ s for rank 1 on .+\n", found["waiting"])
