"""The training loop against the arithmetic by hand: gradients, updates, averages, rows of the log, checkpoints."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch as th
from parity_cases import fill_parameters, image_batch, make_diffusion
from torch.nn.parallel import DistributedDataParallel
from training import (
    NoiselessDiffusion,
    TinyNet,
    assert_same,
    batches,
    checkpoint_names,
    load,
    make_loop,
    read_rows,
    resume,
    train,
)

from improved_diffusion import logger, train_util
from improved_diffusion.fp16_util import unflatten_master_params
from improved_diffusion.resample import LossSecondMomentResampler, create_named_schedule_sampler
from improved_diffusion.train_util import TrainLoop, get_blob_logdir
from improved_diffusion.unet import UNetModel
from improved_diffusion.utils.errors import InputError, TrainingError

pytestmark = pytest.mark.usefixtures("one_cpu")


class Recording(TrainLoop):
    """Remembers what each step used and yielded."""

    def __init__(self, **parameters):
        super().__init__(**parameters)
        self.drawn, self.params, self.grads, self.scales = [], [], [], []
        draw = self.schedule_sampler.sample

        def sample(*args):
            self.drawn.append(draw(*args))
            return self.drawn[-1]

        self.schedule_sampler.sample = sample

    def forward_backward(self, batch, cond):
        super().forward_backward(batch, cond)
        self.grads.append([None if p.grad is None else p.grad.clone() for p in self.model_params])

    def log_step(self):
        super().log_step()
        self.params.append([p.detach().clone() for p in self.master_params])
        self.scales.append(self.lg_loss_scale)


def learned_sampler(diffusion):
    """A loss-second-moment sampler that has seen losses growing with t."""
    sampler = LossSecondMomentResampler(diffusion, history_per_term=2)
    for t in range(diffusion.num_timesteps):
        sampler.update_with_all_losses([t, t], [1.0 + t, 2.0 + t])
    return sampler


SAMPLERS = {"uniform": lambda diffusion: None, "loss-second-moment": learned_sampler}


def parameters_of(model):
    return [p.detach().clone() for p in model.parameters()]


def labels(folder):
    """{label of a checkpoint: how many updates it follows}."""
    return {int(path.stem[3:]): int(load(path)["state"][0]["step"]) for path in sorted(folder.glob("opt*.pt"))}


# ---------------------------------------------------------------- the original's figures

ORIGINAL = {
    "uniform": dict(
        weights=40,
        diffusion=dict(
            steps=50, schedule="cosine", var="LEARNED_RANGE", loss="RESCALED_MSE", rescale=True, respacing="50"
        ),
        parameters=dict(batch_size=4, ema_rate="0.9,0.99", lr_anneal_steps=7, weight_decay=0.05),
        rows={
            "loss": [1.31234, 1.1514, 1.04188, 5.2741],
            "loss_q0": [None, 1.19371, 1.1288, 1.17795],
            "vb": [0.0226681, 0.0124351, 0.00863461, 4.31392],
            "grad_norm": [3.26818, 2.71872, 2.22977, 2.08488],
            "samples": [4, 12, 20, 28],
        },
        sums={"model000006.pt": 1215.8974, "ema_0.99_000006.pt": 1214.7228},
        learning_rates={0: 1e-3, 3: 4e-3 / 7, 6: 1e-3 / 7},
    ),
    "loss-second-moment": dict(
        weights=41,
        diffusion=dict(steps=4, schedule="cosine", var="LEARNED_RANGE", loss="RESCALED_KL", respacing="4"),
        parameters=dict(batch_size=6, ema_rate="0.9", lr_anneal_steps=20, max_steps=13),
        rows={
            "loss": [2185.56, 285.495, 1308.88, 221.51, 499.585, 553.699, 540.531],
            "loss_q0": [None, 31.7327, 31.9853, 31.3611, 806.885, None, None],
        },
        sums={"model000012.pt": 1238.0995, "ema_0.9_000012.pt": 1235.8926},
        learning_rates={0: 1e-3, 6: 7e-4, 12: 4e-4},
    ),
}


@pytest.mark.parametrize("name", ORIGINAL)
def test_a_run_of_the_original(tmp_path, name):
    """Figures recorded from it: rows of the log, sums of weights, learning rates."""
    case = ORIGINAL[name]
    diffusion = make_diffusion(**case["diffusion"])
    size = case["parameters"]["batch_size"]
    model = UNetModel(3, 32, 6, 1, [2], channel_mult=(1, 2), num_heads=2, use_scale_shift_norm=True)
    data = ((image_batch(f"train{k}", size, 3, 8, 8), {}) for k in itertools.count())
    th.manual_seed(31)
    np.random.seed(32)
    train(
        tmp_path,
        model=fill_parameters(model, case["weights"]),
        diffusion=diffusion,
        data=data,
        schedule_sampler=create_named_schedule_sampler(name, diffusion),
        lr=1e-3,
        log_interval=2,
        save_interval=3,
        **{"max_steps": 0, **case["parameters"]},
    )
    rows = read_rows(tmp_path)
    for key, column in case["rows"].items():
        assert [row.get(key) for row in rows] == [pytest.approx(v, rel=2e-3) if v else None for v in column], key
    for file, total in case["sums"].items():
        assert sum(float(v.double().sum()) for v in load(tmp_path / file).values()) == pytest.approx(total, rel=1e-3)
    for label, lr in case["learning_rates"].items():
        assert load(tmp_path / f"opt{label:06d}.pt")["param_groups"][0]["lr"] == pytest.approx(lr)


# ---------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("limit", ["max_steps", "lr_anneal_steps"])
@pytest.mark.parametrize(
    "steps, save_interval, expected",
    [
        (7, 3, {0: 1, 3: 4, 6: 7}),
        (8, 3, {0: 1, 3: 4, 6: 7, 8: 8}),
        (5, 1000, {0: 1, 5: 5}),
        (3, 1, {0: 1, 1: 2, 2: 3}),
        (1, 10, {0: 1}),
    ],
)
def test_labels(tmp_path, limit, steps, save_interval, expected):
    """A save inside the loop at k follows k + 1 updates, the closing one at N follows N."""
    train(tmp_path, save_interval=save_interval, **{"max_steps": 0, limit: steps})
    assert labels(tmp_path) == expected
    assert checkpoint_names(tmp_path) == sorted(
        name.format(label) for label in expected for name in ("model{:06d}.pt", "ema_0.9_{:06d}.pt", "opt{:06d}.pt")
    ) + [f"state{label:06d}.pt" for label in expected]


def test_the_nearer_limit_holds(tmp_path):
    train(tmp_path, max_steps=4, lr_anneal_steps=2)
    assert labels(tmp_path) == {0: 1, 2: 2}


def test_data_that_ends_without_a_limit(tmp_path):
    with pytest.raises(StopIteration):
        train(tmp_path, max_steps=0, data=itertools.islice(batches(), 6))
    assert len(read_rows(tmp_path)) == 6


NETS = {
    "tiny": TinyNet,
    "unet": lambda: UNetModel(3, 32, 3, 1, [], channel_mult=(1,)),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("use_fp16", [False, True])
def test_checkpoints_are_plain_float32_weights(tmp_path, modest_scale, net, use_fp16):
    model = NETS[net]()
    like = NETS[net]()
    loop = train(tmp_path, model=model, use_fp16=use_fp16, ema_rate="0.5,0.9", batch_size=1)
    assert (th.float16 in {p.dtype for p in model.parameters()}) == use_fp16
    averages = {f"ema_{rate}": params for rate, params in zip((0.5, 0.9), loop.ema_params, strict=True)}
    for name, params in {"model": loop.master_params, **averages}.items():
        path = tmp_path / (f"{name}_000003.pt" if "ema" in name else f"{name}000003.pt")
        state_dict = load(path)
        assert {v.dtype for v in state_dict.values()} == {th.float32}
        assert list(state_dict) == list(like.state_dict())
        like.load_state_dict(state_dict)
        flat = th.cat([p.detach().flatten() for p in params])
        assert th.equal(th.cat([p.flatten() for p in parameters_of(like)]), flat), name
        # tensors of their own: views of the flat masters would each bring all of them along
        assert all(v.untyped_storage().nbytes() == 4 * v.numel() for v in state_dict.values())
    th.optim.AdamW(loop.master_params).load_state_dict(load(tmp_path / "opt000003.pt"))


def test_a_folder_of_its_own_for_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "not" / "there" / "yet"))
    train(tmp_path / "log")
    assert checkpoint_names(tmp_path / "log") == []
    assert "model000003.pt" in checkpoint_names(tmp_path / "not" / "there" / "yet")
    assert (tmp_path / "log" / "progress.csv").exists()


@pytest.mark.parametrize("value, expected", [(None, "logs"), ("", "logs"), ("gs://b/x", "gs://b/x")])
def test_blob_logdir(tmp_path, monkeypatch, value, expected):
    if value is not None:
        monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", value)
    monkeypatch.chdir(tmp_path)
    with logger.scoped_configure(dir="logs", format_strs=[]):
        assert get_blob_logdir() == expected


@pytest.mark.parametrize("value, expected", [("1", {0: 1, 2: 3}), ("", {0: 1, 2: 3, 4: 5, 5: 5})])
def test_end_of_a_test_run(tmp_path, monkeypatch, value, expected):
    """DIFFUSION_TRAINING_TEST ends a run at its first save after step 0."""
    monkeypatch.setenv("DIFFUSION_TRAINING_TEST", value)
    train(tmp_path, max_steps=6, save_interval=2)
    assert labels(tmp_path) == (expected if value else {0: 1, 2: 3, 4: 5, 6: 6})


def test_a_full_disk(tmp_path, monkeypatch):
    """One line, and the checkpoint before stays."""
    save, calls = th.save, []

    def full(value, f):
        calls.append(value)
        if len(calls) == 6:
            raise OSError(28, "No space left on device")
        save(value, f)

    monkeypatch.setattr(th, "save", full)
    # save_set() looks th.save up anew at each call
    with pytest.raises(InputError, match=r"^.*/ema_0.9_000002.pt: cannot be written \(.*No space left on device\)$"):
        train(tmp_path, save_interval=2)
    assert labels(tmp_path) == {0: 1} and not list(tmp_path.glob("*.tmp"))


# ---------------------------------------------------------------- one step


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("microbatch", [-1, 0, 1, 2, 3, 5, 100])
def test_gradient(microbatch, sampler):
    """That of mean(weights * losses) over the whole batch, whatever goes through the network at once."""
    diffusion = NoiselessDiffusion()
    model = TinyNet()
    reference = copy.deepcopy(model)
    loop = make_loop(
        Recording,
        model=model,
        diffusion=diffusion,
        schedule_sampler=SAMPLERS[sampler](diffusion),
        batch_size=5,
        microbatch=microbatch,
    )
    x, _ = next(batches(5))
    shift = th.arange(5.0)
    for _ in range(2):  # the second gradient is not added to the first
        loop.forward_backward(x, {"shift": shift})
        t, weights = loop.drawn[-1]
        reference.zero_grad()
        losses = diffusion.training_losses(reference, x, t, {"shift": shift})["loss"]
        (weights * losses).mean().backward()
        for got, p in zip(loop.grads[-1], reference.parameters(), strict=True):
            th.testing.assert_close(got, p.grad, rtol=1e-5, atol=1e-6)
    used = th.cat([weights for _, weights in loop.drawn])
    assert (len(used.unique()) == 1) == (sampler == "uniform")
    largest = microbatch if microbatch > 0 else 5
    assert model.batch_sizes == 2 * [min(largest, 5 - start) for start in range(0, 5, largest)]


def test_batch_smaller_than_announced():
    loop = make_loop(Recording, diffusion=NoiselessDiffusion(), batch_size=8, microbatch=2)
    x, _ = next(batches(3))
    loop.forward_backward(x, {})
    t, weights = loop.drawn[0]
    reference = copy.deepcopy(loop.model)
    reference.zero_grad()
    (weights * NoiselessDiffusion().training_losses(reference, x, t)["loss"]).mean().backward()
    assert_same([g.shape for g in loop.grads[0]], [p.shape for p in reference.parameters()])
    th.testing.assert_close(loop.grads[0], [p.grad for p in reference.parameters()])


def test_losses_reach_the_sampler():
    """Unweighted, and in the order of the timesteps, microbatches or not."""
    sampler = learned_sampler(NoiselessDiffusion())
    seen = []
    sampler.update_with_local_losses = lambda ts, losses: seen.append((ts, losses))
    loop = make_loop(Recording, diffusion=NoiselessDiffusion(), schedule_sampler=sampler, batch_size=5, microbatch=2)
    x, _ = next(batches(5))
    loop.forward_backward(x, {})
    ((ts, losses),) = seen
    assert th.equal(ts, loop.drawn[0][0])
    with th.no_grad():
        th.testing.assert_close(losses, NoiselessDiffusion().training_losses(loop.model, x, ts)["loss"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("lr_anneal_steps", [0, 4, 10])
def test_updates_are_those_of_adamw(tmp_path, weight_decay, lr_anneal_steps):
    model = TinyNet()
    by_hand = copy.deepcopy(model)
    loop = train(
        tmp_path,
        Recording,
        model=model,
        lr=0.02,
        weight_decay=weight_decay,
        lr_anneal_steps=lr_anneal_steps,
        max_steps=4,
    )
    optimizer = th.optim.AdamW(by_hand.parameters(), lr=0.02, weight_decay=weight_decay)
    assert len(loop.grads) == 4
    for step, (grads, params) in enumerate(zip(loop.grads, loop.params, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / lr_anneal_steps) if lr_anneal_steps else 0.02
        for p, g in zip(by_hand.parameters(), grads, strict=True):
            p.grad = g
        optimizer.step()
        th.testing.assert_close(params, parameters_of(by_hand), rtol=1e-5, atol=1e-7, msg=f"step {step}")


@pytest.mark.parametrize("use_fp16", [False, True])
def test_averages(tmp_path, modest_scale, use_fp16):
    """ema <- rate * ema + (1 - rate) * parameters, from the initial parameters on."""
    rates = [0.0, 0.5, 0.999]
    model = TinyNet()
    by_hand = {rate: th.cat([p.flatten() for p in parameters_of(model)]).double() for rate in rates}
    loop = train(tmp_path, Recording, model=model, use_fp16=use_fp16, ema_rate="0,0.5,0.999", max_steps=5)
    for params in loop.params:
        flat = th.cat([p.flatten() for p in params]).double()
        by_hand = {rate: rate * ema + (1 - rate) * flat for rate, ema in by_hand.items()}
    for rate, params in zip(rates, loop.ema_params, strict=True):
        got = th.cat([p.detach().flatten() for p in params])
        th.testing.assert_close(got.double(), by_hand[rate], rtol=1e-6, atol=1e-7)
        stored = load(tmp_path / f"ema_{rate}_000005.pt")
        assert th.equal(th.cat([v.flatten() for v in stored.values()]), got)


class TiedNet(TinyNet):
    """The same convolution before and after, as one and as the same parameters of another."""

    def __init__(self):
        super().__init__()
        self.same = self.conv
        self.out = th.nn.Conv2d(3, 3, 1)
        self.out.weight = self.conv.weight

    def forward(self, x, t):
        h = super().forward(x, t)
        return self.out(h.type(self.out.weight.dtype)).type(x.dtype)


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_tied_parameter_has_its_average_under_each_of_its_names(tmp_path, modest_scale, use_fp16):
    loop = train(tmp_path, model=TiedNet(), use_fp16=use_fp16, ema_rate="0.9")
    assert len(loop.model_params) == 3  # a weight and two biases
    ema, model = load(tmp_path / "ema_0.9_000003.pt"), load(tmp_path / "model000003.pt")
    for contents in (ema, model):
        assert contents.keys() == TiedNet().state_dict().keys()
        assert {value.dtype for value in contents.values()} == {th.float32}
        for name in ("same.weight", "out.weight"):
            assert th.equal(contents[name], contents["conv.weight"])
        assert th.equal(contents["same.bias"], contents["conv.bias"])
    assert not th.equal(ema["conv.weight"], model["conv.weight"])
    net = TiedNet()
    net.load_state_dict(ema)
    assert th.equal(net.conv.weight, ema["conv.weight"])
    resumed, _ = resume(tmp_path, model=TiedNet(), use_fp16=use_fp16, max_steps=3)
    assert_same([p.detach() for p in resumed.ema_params[0]], [p.detach() for p in loop.ema_params[0]])


@pytest.mark.parametrize(
    "ema_rate, rates",
    [(0.99, [0.99]), ("0.99", [0.99]), ("0.9,0.9999", [0.9, 0.9999]), ([0.9, 0.9999], [0.9, 0.9999]), ([0.5], [0.5])],
)
def test_rates_as_number_text_or_list(ema_rate, rates):
    assert make_loop(ema_rate=ema_rate).ema_rate == rates


# ---------------------------------------------------------------- float16


def test_float16_follows_float32(tmp_path, modest_scale):
    initial, parameters, norms = TinyNet(), [], []
    for use_fp16 in (False, True):
        np.random.seed(5)
        loop = train(
            tmp_path / str(use_fp16),
            Recording,
            model=copy.deepcopy(initial),
            diffusion=NoiselessDiffusion(),
            use_fp16=use_fp16,
        )
        parameters.append([th.cat([p.flatten() for p in params]) for params in loop.params])
        norms.append([row["grad_norm"] for row in read_rows(tmp_path / str(use_fp16))])
    th.testing.assert_close(parameters[1], parameters[0], rtol=0, atol=2e-3)
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)
    # the network's weights are the masters, rounded
    masters = unflatten_master_params(loop.model_params, loop.master_params)
    assert_same(parameters_of(loop.model), [m.half() for m in masters])


def test_loss_scale_grows_and_is_logged(tmp_path, modest_scale):
    loop = train(tmp_path, Recording, use_fp16=True, fp16_scale_growth=0.25)
    assert loop.scales == [8.25, 8.5, 8.75]
    assert [row["lg_loss_scale"] for row in read_rows(tmp_path)] == loop.scales


def test_no_loss_scale_in_float32(tmp_path):
    train(tmp_path)
    assert "lg_loss_scale" not in read_rows(tmp_path)[0]


def test_an_overflow_halves_the_scale_and_changes_nothing_else(tmp_path, modest_scale):
    loop = train(tmp_path, Recording, use_fp16=True, data=batches(changes={1: 1e30}), fp16_scale_growth=0.5)
    assert loop.scales == [8.5, 7.5, 8.0]
    assert_same(loop.params[1], loop.params[0])
    assert not th.equal(loop.params[2][0], loop.params[1][0])
    assert labels(tmp_path) == {0: 1, 3: 2}
    assert "Found NaN, decreased lg_loss_scale to 7.5" in (tmp_path / "log.txt").read_text()


def test_an_overflow_leaves_averages_alone(tmp_path, modest_scale):
    loop = train(tmp_path, use_fp16=True, data=batches(changes={1: 1e30, 2: math.nan}), save_interval=2)
    assert_same(load(tmp_path / "ema_0.9_000002.pt"), load(tmp_path / "ema_0.9_000000.pt"))
    assert loop.lg_loss_scale == pytest.approx(6.001)


def test_twenty_overflows_in_a_row(tmp_path, modest_scale):
    """No loss scale explains them."""
    bad = dict.fromkeys(range(3, 100), math.nan)
    with pytest.raises(TrainingError) as info:
        train(tmp_path, use_fp16=True, data=batches(changes=bad), max_steps=100, save_interval=2)
    last = tmp_path / "model000002.pt"  # those that follow are of the same parameters, which yield NaN
    assert str(info.value) == (
        "float16 gradients overflowed 20 times in a row at step 22 on rank 0; "
        f"the last good checkpoint is {last}. A lower lr helps, or a look at the data"
    )
    assert labels(tmp_path)[20] == 3 and "model000022.pt" not in checkpoint_names(tmp_path)


def test_overflows_with_a_good_step_between(tmp_path, modest_scale):
    bad = {k: math.nan for k in range(40) if k != 19}
    with pytest.raises(TrainingError, match=r"at step 39 on rank 0; .*model000000.pt"):
        train(tmp_path, use_fp16=True, data=batches(changes=bad), max_steps=100)


# ---------------------------------------------------------------- losses that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize(
    "parameters, noticed, labels_left",
    [
        (dict(log_interval=4), 4, {0: 1}),
        (dict(log_interval=1), 2, {0: 1}),
        (dict(log_interval=10, save_interval=3), 3, {0: 1}),
        (dict(log_interval=10, save_interval=1), 2, {0: 1, 1: 2}),
        (dict(log_interval=10, max_steps=3), 3, {0: 1}),
    ],
    ids=["log", "at once", "save", "save at once", "end"],
)
def test_loss_not_finite(tmp_path, value, parameters, noticed, labels_left):
    """Noticed when it is read; what could be broken is not saved."""
    with pytest.raises(TrainingError) as info:
        train(tmp_path, data=batches(changes={2: value}), **{"max_steps": 20, **parameters})
    assert labels(tmp_path) == labels_left
    last = tmp_path / f"model{max(labels_left):06d}.pt"
    info.match(rf"^\w+ is (nan|inf) at step {noticed} on rank 0; the last good checkpoint is {last}\. .*$")
    assert all(math.isfinite(v) for row in read_rows(tmp_path) for v in row.values())


def test_not_finite_before_any_checkpoint(tmp_path):
    with pytest.raises(TrainingError, match=r"at step 0 .* checkpoint is none"):
        train(tmp_path, data=batches(changes={0: math.nan}))
    assert checkpoint_names(tmp_path) == []


# ---------------------------------------------------------------- the log


def test_rows_by_hand(tmp_path):
    """A row holds the means over the steps since the last one: weighted losses, their quarters, gradient norms."""
    diffusion = NoiselessDiffusion()
    initial = TinyNet()
    loop = train(
        tmp_path,
        Recording,
        model=copy.deepcopy(initial),
        diffusion=diffusion,
        schedule_sampler=learned_sampler(diffusion),
        log_interval=3,
        max_steps=7,
        microbatch=3,
    )
    steps = []
    before = [parameters_of(initial), *loop.params]
    for params, (t, weights), (x, _), grads in zip(before[:7], loop.drawn, batches(), loop.grads, strict=False):
        with th.no_grad():
            for p, value in zip(initial.parameters(), params, strict=True):
                p.copy_(value)
            losses = diffusion.training_losses(initial, x, t)
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads))
        steps.append((t, {k: (v * weights).double() for k, v in losses.items()}, norm))

    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 3, 6]
    assert [row["samples"] for row in rows] == [4, 16, 28]
    for row, taken_in in zip(rows, (steps[:1], steps[1:4], steps[4:]), strict=True):
        expected = {"step": row["step"], "samples": row["samples"]}
        expected["grad_norm"] = np.mean([norm for _, _, norm in taken_in])
        for key in ("loss", "mse"):
            expected[key] = np.mean([losses[key].mean() for _, losses, _ in taken_in])
            for quarter in range(4):
                values = th.cat([losses[key][t // 2 == quarter] for t, losses, _ in taken_in])
                if len(values):
                    expected[f"{key}_q{quarter}"] = values.mean().item()
        assert row == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- for subclasses


@pytest.mark.parametrize("use_fp16", [False, True])
def test_hooks_are_called_in_order(tmp_path, use_fp16):
    calls = []

    class Hooked(TrainLoop):
        pass

    def hook(name):
        def method(self, *args):
            calls.append(name)
            return getattr(TrainLoop, name)(self, *args)

        return method

    for name in ("run_step", "forward_backward", "optimize_normal", "optimize_fp16", "log_step", "save"):
        setattr(Hooked, name, hook(name))
    train(tmp_path, Hooked, use_fp16=use_fp16, max_steps=3, save_interval=2)
    step = ["run_step", "forward_backward", "optimize_fp16" if use_fp16 else "optimize_normal", "log_step"]
    assert calls == step + ["save"] + step * 2 + ["save"]


def test_a_save_of_ones_own(tmp_path):
    """Called as often as the loop's."""

    class Saving(TrainLoop):
        def __init__(self, **parameters):
            super().__init__(**parameters)
            self.saved_at = []

        def save(self):
            self.saved_at.append(self.step)

    assert train(tmp_path, Saving, max_steps=7, save_interval=3).saved_at == [0, 3, 6]
    assert train(tmp_path, Saving, max_steps=8, save_interval=3).saved_at == [0, 3, 6, 8]


def test_a_step_of_ones_own(tmp_path):
    """Without super(): counted, logged and saved at the end like the loop's."""

    class Stepping(TrainLoop):
        def run_step(self, batch, cond):
            self.forward_backward(batch, cond)
            self.optimize_normal()
            self.log_step()

    train(tmp_path, Stepping, max_steps=4, save_interval=2, log_interval=2)
    assert labels(tmp_path) == {0: 1, 2: 3, 4: 4}
    assert [load(tmp_path / f"state{label:06d}.pt")["updates"] for label in (0, 2, 4)] == [1, 3, 4]
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 2] and all({"loss", "grad_norm"} <= row.keys() for row in rows)


def test_an_optimizer_step_of_ones_own(tmp_path):
    class Frozen(TrainLoop):
        def optimize_normal(self):
            pass

    model = TinyNet()
    before = parameters_of(model)
    train(tmp_path, Frozen, model=model)
    assert_same(parameters_of(model), before)
    assert "grad_norm" not in read_rows(tmp_path)[0] and "loss" in read_rows(tmp_path)[0]


@pytest.mark.parametrize("own_step", [False, True])
def test_gradients_of_ones_own_may_lie_in_memory_as_they_like(tmp_path, own_step):
    class Foreign(TrainLoop):
        def forward_backward(self, batch, cond):
            super().forward_backward(batch, cond)
            for p in self.model_params:
                p.grad = th.stack([p.grad, p.grad + 1], dim=-1)[..., 0]

        def optimize_normal(self):
            if own_step:
                self.opt.step()
                self._update_ema()
            else:
                super().optimize_normal()

    loops = []
    for cls in (TrainLoop, Foreign):
        th.manual_seed(1)
        np.random.seed(2)
        loops.append(train(tmp_path / cls.__name__, cls))
    want, got = loops
    assert_same(got.model.state_dict(), want.model.state_dict())
    assert_same(got.opt.state_dict(), want.opt.state_dict())
    assert_same([list(params) for params in got.ema_params], [list(params) for params in want.ema_params])


def test_one_rank_has_no_wrapper():
    loop = make_loop()
    assert loop.use_ddp is False and loop.ddp_model is loop.model
    assert not isinstance(loop.model, DistributedDataParallel)


def test_public_attributes():
    data, model = batches(), TinyNet()
    loop = make_loop(model=model, data=data, microbatch=-1, ema_rate="0.9,0.99", lr=0.1, weight_decay=0.2)
    expected = dict(
        model=model,
        data=data,
        batch_size=4,
        microbatch=4,
        lr=0.1,
        weight_decay=0.2,
        ema_rate=[0.9, 0.99],
        log_interval=1,
        save_interval=1000,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
        lr_anneal_steps=0,
        step=0,
        resume_step=0,
        global_batch=4,
        lg_loss_scale=20.0,
        use_ddp=False,
    )
    assert {name: getattr(loop, name) for name in expected} == expected
    assert loop.master_params == loop.model_params == list(model.parameters())
    assert isinstance(loop.opt, th.optim.AdamW) and len(loop.ema_params) == 2


def test_names_the_original_offers():
    from improved_diffusion import fp16_util, nn
    from improved_diffusion.training import checkpoints, statistics

    helpers = [
        "make_master_params", "master_params_to_model_params", "model_grads_to_master_grads",
        "unflatten_master_params", "zero_grad",
    ]  # fmt: skip
    assert all(getattr(train_util, name) is getattr(fp16_util, name) for name in helpers)
    assert train_util.update_ema is nn.update_ema
    assert train_util.log_loss_dict is statistics.log_loss_dict
    assert train_util.find_ema_checkpoint is checkpoints.find_ema_checkpoint
    assert train_util.find_resume_checkpoint() is None


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, dict(grad_clip=0.1, lr_warmup_steps=9, ema_warmup=True)], ids=str)
def test_no_step_waits_for_the_gpu(tmp_path, monkeypatch, options):
    """Between two rows of the log; float16 alone must know whether a gradient overflowed."""
    monkeypatch.undo()  # one_cpu
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loop = make_loop(model=TinyNet().cuda(), log_interval=10, **options)
        batch, cond = next(batches())
        loop.run_step(batch.pin_memory(), cond)  # the first is logged
        loop.step += 1
        th.cuda.set_sync_debug_mode("error")
        try:
            loop.run_step(batch.pin_memory(), cond)
        finally:
            th.cuda.set_sync_debug_mode("default")
