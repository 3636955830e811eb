"""What one rank alone finds leads no rank into another collective than the others; all of them decide the same."""

import math
import os

import pytest
import torch as th
from training import batches, latest, make_loop, train

from improved_diffusion import dist_util, logger, train_util
from improved_diffusion.cli import parser
from improved_diffusion.inference.generate import generate
from improved_diffusion.training.statistics import StepStatistics
from improved_diffusion.utils.errors import TrainingError

pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


@pytest.fixture
def loops(tmp_path):
    """One of a run of each of three ranks, which have made a step, all the same."""
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        found = [make_loop(lr=1e-9) for _ in range(3)]
        for loop in found:
            loop.forward_backward(*next(batches()))
            loop._log_grad_norm()
        yield found


def error_of(function):
    try:
        return function()
    except TrainingError as e:
        return str(e)


@pytest.mark.parametrize("bad", [(0,), (1,), (0, 2)], ids=str)
def test_parameter_that_is_not_finite(on_ranks, loops, tmp_path, bad):
    """Those ranks are named, not the ones whose loss is, and nothing is written."""
    for rank in bad:
        with th.no_grad():
            loops[rank].master_params[0][0] = math.nan
    messages = on_ranks(3, lambda rank: error_of(loops[rank].save))
    named = ", ".join(map(str, bad))
    assert [f"a parameter is not finite at step 0 on rank {named}; " in message for message in messages] == [True] * 3
    assert list(tmp_path.iterdir()) == []


def test_loss_that_is_not_finite(on_ranks, loops, tmp_path):
    loops[1]._statistics.add("loss", th.tensor(math.nan))
    messages = on_ranks(3, lambda rank: error_of(loops[rank].save))
    assert ["nan at step 0 on rank 1; " in message for message in messages] == [True] * 3
    assert list(tmp_path.iterdir()) == []


def test_parameters_that_are_finite(on_ranks, loops, tmp_path):
    assert on_ranks(3, lambda rank: error_of(loops[rank].save)) == [None] * 3
    assert (tmp_path / "model000000.pt").exists()


def test_gradient_that_overflows(on_ranks):
    """All skip the step: one that did not would have other parameters from then on."""
    loops = [make_loop(use_fp16=True) for _ in range(2)]
    for rank, loop in enumerate(loops):
        for p in loop.model_params:
            p.grad = th.full_like(p, math.inf if rank else 1.0)
    on_ranks(2, lambda rank: loops[rank].optimize_fp16())
    assert [loop.lg_loss_scale for loop in loops] == [train_util.INITIAL_LOG_LOSS_SCALE - 1] * 2


@pytest.mark.parametrize("where", ["rank 0", "rank 1"])
def test_checkpoint_that_one_rank_finds(on_ranks, tmp_path, monkeypatch, where):
    """By means of a client's own: what rank 0 finds counts, as the original's weights are those of rank 0."""
    train(tmp_path, max_steps=2)
    path = latest(tmp_path)
    monkeypatch.setattr(
        train_util, "find_resume_checkpoint", lambda: path if f"rank {dist_util.rank()}" == where else None
    )
    monkeypatch.setattr(train_util, "DDP", lambda model, **_: model)
    monkeypatch.setattr(dist_util, "sync_params", lambda params: None)
    with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=[]):
        loops = on_ranks(2, lambda rank: make_loop())
    assert [loop.step for loop in loops] == [2 if where == "rank 0" else 0] * 2


def test_end_of_a_test_run_that_one_rank_is_to_do(on_ranks, tmp_path, monkeypatch):
    """DIFFUSION_TRAINING_TEST on one host: all ranks end after the first save."""
    environment = os.environ.get

    def get(name, *default):
        return str(dist_util.rank() or "") if name == "DIFFUSION_TRAINING_TEST" else environment(name, *default)

    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loops = [make_loop(max_steps=9, save_interval=2) for _ in range(2)]
        monkeypatch.setattr(train_util.os, "environ", type("Environment", (dict,), {"get": staticmethod(get)})())
        on_ranks(2, lambda rank: loops[rank].run_loop())
    assert [loop.step for loop in loops] == [2, 2]


def test_statistics_of_other_keys(on_ranks):
    """Of a client's losses that not every batch has."""

    def work(rank):
        statistics = StepStatistics()
        if rank > 0:
            statistics.add("loss", th.tensor(float(rank)))
        if rank > 1:
            statistics.add("of rank 2", th.tensor(5.0))
        return statistics.read()

    assert on_ranks(3, work) == [{"loss": (1.5, 2), "of rank 2": (5.0, 1)}] * 3


class Black:
    num_timesteps = 1

    def p_sample_loop_progressive(self, model, shape, **kwargs):
        yield {"sample": th.full(shape, -1.0), "pred_xstart": None}


def test_labels_of_ranks_that_have_a_sample(on_ranks):
    def conditions(numbers, noise_fn):
        return {"y": th.tensor(numbers)} if numbers else {}

    def draw(rank):
        return generate(Black(), None, shape=(3, 2, 2), num_samples=2, batch_size=1, conditions=conditions, seed=0)

    (images, labels), *others = on_ranks(3, draw)
    assert images.shape == (2, 2, 2, 3) and labels.tolist() == [0, 1]
    assert others == [(None, None)] * 2


@pytest.mark.parametrize("named", [(), (0,), (1,), (0, 1)], ids=str)
def test_log_directory_of_one_rank(on_ranks, tmp_path, monkeypatch, named):
    """OPENAI_LOGDIR on one host: a rank without one takes that of rank 0."""
    monkeypatch.chdir(tmp_path)
    configured = {}
    monkeypatch.setattr(logger, "configure", lambda path: configured.setdefault(dist_util.rank(), path))
    monkeypatch.setattr(logger, "log", lambda *args: None)

    def work(rank):
        with parser.logging_to(str(tmp_path / f"log{rank}") if rank in named else ""):
            return configured[rank]

    found = on_ranks(2, work)
    common = str(tmp_path / "log0") if 0 in named else found[0]
    assert found == [str(tmp_path / f"log{rank}") if rank in named else common for rank in range(2)]
    if 0 not in named:
        assert found[0].startswith("runs")
