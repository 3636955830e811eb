"""Options of the update: clipping of the gradient, warm-up of the learning rate and of the averages."""

import copy
import math

import numpy as np
import pytest
import torch as th
from diffusions import MEANS
from parity_cases import make_diffusion
from training import (
    NoiselessDiffusion,
    TinyNet,
    assert_same,
    batches,
    checkpoint_names,
    latest,
    load,
    make_loop,
    read_rows,
    resume,
    train,
)

from improved_diffusion import dist_util, logger, train_util
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.training.weights import is_young
from improved_diffusion.utils.errors import TrainingError

pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


class Updates(TrainLoop):
    """Keeps the gradient and the learning rate of each update, and the parameters after it."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.grads, self.rates, self.params, self.ts = [], [], [], []
        self.opt.register_step_pre_hook(self._before)

    def _before(self, optimizer, *_):
        self.grads.append(flat(p.grad for p in self.master_params))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def log_step(self):
        super().log_step()
        self.params.append(flat(self.master_params))


def flat(tensors):
    return th.cat([tensor.detach().flatten() for tensor in tensors]).clone()


def updates(folder, **parameters):
    """:return: the loop of a run that always begins at the same weights, timesteps and noise."""
    th.manual_seed(1)
    np.random.seed(2)
    return train(folder, Updates, **{"max_steps": 5, **parameters})


# ---------------------------------------------------------------- clipping


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_larger_gradient_is_scaled_down(tmp_path, use_fp16):
    """Of all parameters together, in float16 without the loss scale. Logged: the norm before, the share clipped."""
    common = dict(diffusion=NoiselessDiffusion(), use_fp16=use_fp16, lr=1e-9)  # the same weights at each step
    plain = updates(tmp_path / "plain", **common)
    norms = [grad.norm().item() for grad in plain.grads]
    limit = float(np.median(norms))
    clipped = updates(tmp_path / "clipped", **common, grad_clip=limit)
    for grad, full, norm in zip(clipped.grads, plain.grads, norms, strict=True):
        th.testing.assert_close(grad, full * min(1, limit / norm), rtol=1e-4, atol=1e-6)
    assert sorted(grad.norm().item() > limit * (1 + 1e-5) for grad in plain.grads) == [False] * 3 + [True] * 2
    rows, without = read_rows(tmp_path / "clipped"), read_rows(tmp_path / "plain")
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert [row.pop("clipped") for row in rows] == [float(norm > limit) for norm in norms]
    assert [row.keys() for row in rows] == [row.keys() for row in without]


def test_the_share_of_clipped_steps(tmp_path):
    norms = [row["grad_norm"] for row in read_rows_of(tmp_path / "each", lr=1e-9, max_steps=7)]
    limit = sorted(norms)[3]
    rows = read_rows_of(tmp_path / "rows", lr=1e-9, max_steps=7, log_interval=3, grad_clip=limit)
    over = [float(norm > limit) for norm in norms]
    assert [row["clipped"] for row in rows] == pytest.approx([over[0], np.mean(over[1:4]), np.mean(over[4:])])


def read_rows_of(folder, **parameters):
    updates(folder, **parameters)
    return read_rows(folder)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_limit_that_no_gradient_reaches_changes_nothing(tmp_path, use_fp16):
    for name, limit in (("plain", 0), ("clipped", 1e9)):
        updates(tmp_path / name, use_fp16=use_fp16, grad_clip=limit)
    for name in checkpoint_names(tmp_path / "plain"):
        if not name.startswith("state"):
            assert_same(load(tmp_path / "clipped" / name), load(tmp_path / "plain" / name), name)
    assert {row["clipped"] for row in read_rows(tmp_path / "clipped")} == {0}


@pytest.mark.parametrize("microbatch", [1, 3])
def test_microbatches_change_no_clipped_gradient(tmp_path, microbatch):
    common = dict(diffusion=NoiselessDiffusion(), grad_clip=0.05, lr=1e-9)
    whole, parts = (updates(tmp_path / str(size), **common, microbatch=size) for size in (-1, microbatch))
    th.testing.assert_close(parts.grads, whole.grads, rtol=1e-4, atol=1e-7)
    assert any(row["clipped"] for row in read_rows(tmp_path / "-1"))


@pytest.mark.parametrize("use_fp16", [False, True])
def test_ranks_change_no_clipped_gradient(on_ranks, tmp_path, monkeypatch, use_fp16):
    """Each clips the mean of all ranks' gradients, so all remain equal."""
    x, t = next(batches(4))[0], th.tensor([0, 7, 3, 5])
    common = dict(diffusion=NoiselessDiffusion(), grad_clip=0.05, use_fp16=use_fp16)

    class Averaging(Updates):
        """With what DistributedDataParallel does."""

        def forward_backward(self, batch, cond):
            self.schedule_sampler.sample = lambda *_: (self.drawn, th.ones(len(self.drawn)))
            super().forward_backward(batch, cond)
            for p in self.model_params:
                p.grad = (dist_util.all_reduce_sum(p.grad.float()) / dist_util.world_size()).to(p.dtype)

    def step(rank, loop):
        share = slice(2 * rank, 2 * rank + 2) if dist_util.world_size() > 1 else slice(None)
        loop.drawn = t[share]
        loop.run_step(x[share], {})
        return loop._statistics.read(), loop.grads, loop.params

    monkeypatch.setattr(train_util, "DDP", lambda model, **_: model)
    monkeypatch.setattr(dist_util, "sync_params", lambda params: None)
    model = TinyNet()
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loops = [make_loop(Averaging, model=copy.deepcopy(model), **common, log_interval=10) for _ in range(3)]
        for loop in loops:
            loop.step = 1  # step 0 is logged
        want = step(0, loops[0])
        found = on_ranks(2, lambda rank: step(rank, loops[1 + rank]))
    for read, grads, _ in found:
        assert read["clipped"] == (1.0, 2) and read["grad_norm"][0] == pytest.approx(want[0]["grad_norm"][0], rel=1e-2)
        assert grads[0].norm().item() == pytest.approx(0.05, rel=1e-3)
        th.testing.assert_close(grads, want[1], rtol=1e-2 if use_fp16 else 1e-4, atol=1e-4 if use_fp16 else 1e-7)
    assert_same(found[0][1:], found[1][1:])


def test_clipping_hides_no_divergence(tmp_path):
    with pytest.raises(TrainingError, match="at step 2 "):
        train(tmp_path, data=batches(changes={2: math.nan}), grad_clip=0.1)


# ---------------------------------------------------------------- the learning rate


@pytest.mark.parametrize("anneal", [0, 10])
@pytest.mark.parametrize("warmup", [1, 4, 20])
@pytest.mark.parametrize("use_fp16", [False, True])
def test_the_learning_rate_rises_linearly_and_falls(tmp_path, warmup, anneal, use_fp16):
    """From lr / warmup at the first step to lr at step number warmup, times what annealing gives."""
    common = dict(lr=0.02, lr_warmup_steps=warmup, lr_anneal_steps=anneal, use_fp16=use_fp16)
    loop = updates(tmp_path, **common, max_steps=6)
    want = [0.02 * min(1, (k + 1) / warmup) * (1 - k / anneal if anneal else 1) for k in range(6)]
    assert loop.rates == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("of_the_original", [False, True])
def test_a_resumed_run_continues_the_rise(tmp_path, of_the_original):
    train(tmp_path, lr_warmup_steps=8, max_steps=4)
    for path in tmp_path.glob("state*.pt") if of_the_original else ():
        path.unlink()
    loop, lines = resume(tmp_path, cls=Updates, lr_warmup_steps=8, max_steps=7)
    assert loop.rates == pytest.approx([0.01 * (k + 1) / 8 for k in range(4, 7)])
    assert not [line for line in lines if "from here on" in line]  # it changes by itself


@pytest.mark.parametrize("schedule", [{}, dict(lr_warmup_steps=9), dict(lr_anneal_steps=9)], ids=str)
def test_a_changed_learning_rate_is_logged_once(tmp_path, schedule):
    train(tmp_path, flags=dict(lr=0.01), **schedule)
    _, lines = resume(tmp_path, lr=0.5, flags=dict(lr=0.5), max_steps=4, **schedule)
    wanted = "lr is 0.5 from here on, and was 0.01 in the checkpoint"
    assert [line for line in lines if "from here on" in line] == [wanted]


# ---------------------------------------------------------------- averages


@pytest.mark.parametrize("use_fp16", [False, True])
def test_averages_that_begin_fast(tmp_path, use_fp16):
    """ema <- r ema + (1 - r) parameters with r = min(rate, (1 + n) / (10 + n)) after n steps."""
    rates = [0.0, 0.3, 0.9999]
    th.manual_seed(1)
    initial = flat(TinyNet().parameters()).double()
    loop = updates(tmp_path, use_fp16=use_fp16, ema_rate="0,0.3,0.9999", ema_warmup=True, max_steps=9)
    for rate, params in zip(rates, loop.ema_params, strict=True):
        ema = initial
        for n, current in enumerate(loop.params):
            r = min(rate, (1 + n) / (10 + n))
            ema = r * ema + (1 - r) * current.double()
        th.testing.assert_close(flat(params).double(), ema, rtol=1e-6, atol=1e-7)


def test_an_average_that_began_fast_has_forgotten_the_initial_weights():
    """Under 5 %, is_young()'s limit, after two updates."""
    shares = np.cumprod([min(0.9999, (1 + n) / (10 + n)) for n in range(100)])
    assert shares[1] < 0.05 and shares[-1] < 1e-9
    assert is_young(0.9999, 2) and not is_young(0.9999, 2, warmup=True)


def test_previews_are_of_an_average_that_began_fast(tmp_path):
    for warmup, names in ((False, ["model"] * 2), (True, ["ema_0.9999"] * 2)):
        seen = []
        common = dict(preview=lambda *args, seen=seen: seen.append(args[3]), save_interval=2, max_steps=4)
        train(tmp_path / str(warmup), ema_rate="0.9999", ema_warmup=warmup, **common)
        assert seen == names


# ---------------------------------------------------------------- together, and with defaults


def test_by_default_all_are_off():
    loop = make_loop()
    assert (loop.grad_clip, loop.lr_warmup_steps, loop.ema_warmup) == (0, 0, False)
    assert (TrainLoop.grad_clip, TrainLoop.lr_warmup_steps, TrainLoop.ema_warmup) == (0, 0, False)


@pytest.mark.parametrize("mean", MEANS)
def test_training_learns_whatever_is_predicted(tmp_path, mean):
    """A point as data, weights of min_snr, clipping and both warm-ups."""
    point = th.full((4, 3, 8, 8), 0.5)
    process = make_diffusion(8, "cosine", mean=mean, min_snr_gamma=5.0)
    loop = train(
        tmp_path,
        diffusion=process,
        data=((point, {}) for _ in iter(int, 1)),
        lr=0.05,
        max_steps=200,
        log_interval=50,
        grad_clip=1.0,
        lr_warmup_steps=20,
        ema_warmup=True,
    )
    rows = read_rows(tmp_path)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and all(math.isfinite(row["loss"]) for row in rows)
    assert loop.position.updates == 200 and latest(tmp_path).endswith("model000200.pt")
