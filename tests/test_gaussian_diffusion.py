"""Schedules, the forward and reverse processes, samplers, training losses and the variational bound."""

import copy
import gc
import math

import numpy as np
import pytest
import torch as th
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from parity_cases import (
    FORWARD,
    LOOPS,
    LOSSES,
    REVERSE,
    TABLES,
    ToyModel,
    assert_recorded,
    image_batch,
    make_diffusion,
    tensor,
    toy_model_for,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion import schedules
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from improved_diffusion.resample import create_named_schedule_sampler

MEANS = [m.name for m in ModelMeanType]
VARS = [v.name for v in ModelVarType]
LOSS_TYPES = [v.name for v in LossType]
TABLE_NAMES = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "alphas_cumprod_next",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]

beta_arrays = hnp.arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-5, 0.9))


def diffusion_of(betas, mean="EPSILON", var="FIXED_SMALL", loss="MSE", **kwargs):
    return GaussianDiffusion(
        betas=betas,
        model_mean_type=ModelMeanType[mean],
        model_var_type=ModelVarType[var],
        loss_type=LossType[loss],
        **kwargs,
    )


def always(output):
    """A model that answers every question with the same tensor."""
    return lambda x, t: output


def point_model(diffusion, x_start):
    """The perfect model of data that is always x_start, whatever the diffusion wants predicted."""

    def model(x, t):
        if diffusion.model_mean_type == ModelMeanType.START_X:
            out = x_start
        elif diffusion.model_mean_type == ModelMeanType.EPSILON:
            alpha_bar = th.from_numpy(diffusion.alphas_cumprod)[t].view(-1, *[1] * (x.dim() - 1))
            out = ((x - alpha_bar.sqrt() * x_start) / (1 - alpha_bar).sqrt()).float()
        else:
            out = diffusion.q_posterior_mean_variance(x_start, x, t)[0]
        learned = diffusion.model_var_type.name.startswith("LEARNED")
        return th.cat([out, -th.ones_like(out)], dim=1) if learned else out

    return model


# ---------------------------------------------------------------- schedules


@pytest.mark.parametrize(("name", "steps"), [("linear", 100), ("cosine", 50)])
def test_schedules_are_as_recorded(name, steps):
    betas = get_named_beta_schedule(name, steps)
    assert betas.dtype == np.float64
    assert_recorded(f"schedule/{name}:{steps}", betas, rtol=1e-12)


def test_betas_for_alpha_bar_are_as_recorded():
    betas = betas_for_alpha_bar(64, lambda t: np.exp(-5.0 * t * t), max_beta=0.5)
    assert_recorded("schedule/alpha_bar", betas, rtol=1e-12)


@given(st.integers(21, 4000))
def test_linear_schedule_is_equally_noisy_whatever_its_length(steps):
    betas = get_named_beta_schedule("linear", steps)
    assert betas[0] * steps == pytest.approx(0.1)
    assert betas[-1] * steps == pytest.approx(20)
    assert betas.sum() == pytest.approx(10.05)
    assert (np.diff(betas) > 0).all()


@given(st.integers(1, 4000))
def test_cosine_schedule_follows_its_curve_up_to_the_clipped_end(steps):
    betas = get_named_beta_schedule("cosine", steps)
    assert ((betas > 0) & (betas <= 0.999)).all()
    fraction = np.arange(1, steps + 1) / steps
    curve = np.cos((fraction + 0.008) / 1.008 * np.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - betas)[:-1], curve[:-1], rtol=1e-6, atol=1e-9)


def test_unknown_schedule():
    with pytest.raises(NotImplementedError, match="'quadratic'"):
        get_named_beta_schedule("quadratic", 10)


# ---------------------------------------------------------------- tables


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_as_recorded(name):
    d = make_diffusion(**TABLES[name])
    tables = [getattr(d, k) for k in TABLE_NAMES]
    assert all(isinstance(v, np.ndarray) and v.dtype == np.float64 for v in tables)
    assert_recorded(f"tables/{name}", *tables, rtol=1e-10)


@pytest.mark.parametrize(
    "betas", [[], [[0.1, 0.2]], [0.0, 0.1], [0.1, 1.1], [-0.1], [0.1, float("nan")]], ids=lambda b: str(b)
)
def test_betas_that_are_none(betas):
    with pytest.raises(ValueError, match="betas"):
        diffusion_of(np.array(betas))


def test_betas_are_copied_and_may_be_a_list():
    betas = np.array([0.1, 0.2])
    d = diffusion_of(betas)
    betas[0] = 0.9
    assert d.betas.tolist() == diffusion_of([0.1, 0.2]).betas.tolist() == [0.1, 0.2]


@given(beta_arrays)
def test_posterior_and_forward_process_make_one_joint_distribution(betas):
    """q(x_{t-1} | x_t, x_0), averaged over q(x_t | x_0), is q(x_{t-1} | x_0)."""
    d = diffusion_of(betas)
    mean = d.posterior_mean_coef1 + d.posterior_mean_coef2 * d.sqrt_alphas_cumprod  # of x_0 = 1
    variance = d.posterior_mean_coef2**2 * (1 - d.alphas_cumprod) + d.posterior_variance
    np.testing.assert_allclose(mean, np.sqrt(d.alphas_cumprod_prev), rtol=1e-8)
    np.testing.assert_allclose(variance, 1 - d.alphas_cumprod_prev, rtol=1e-8, atol=1e-12)


@given(beta_arrays)
def test_posterior_variance_is_below_beta_and_its_logarithm_is_finite(betas):
    d = diffusion_of(betas)
    assert d.posterior_variance[0] == 0
    assert (d.posterior_variance <= d.betas * (1 + 1e-12)).all()
    np.testing.assert_allclose(np.exp(d.posterior_log_variance_clipped[1:]), d.posterior_variance[1:])
    assert np.isfinite(d.posterior_log_variance_clipped[0])


def test_extract_gives_one_value_a_sample():
    table = np.array([0.5, 0.25, 0.125])
    out = gd._extract_into_tensor(table, th.tensor([2, 0]), (2, 3, 4))
    assert out.dtype == th.float32
    assert th.equal(out, th.tensor([0.125, 0.5]).view(2, 1, 1).expand(2, 3, 4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_copies_of_tables_live_as_long_as_the_table(device):
    def entries():
        return [key for key in schedules._copies if number in key]

    t = th.zeros(2, dtype=th.long, device=device)
    table = np.array([0.5, 0.25])
    number = id(table)
    copies = []
    for inference in (True, False):
        with th.inference_mode(inference):
            (out,) = schedules.at_timesteps((table,), t, 2)
        assert (out.shape, out.dtype, out.device) == ((2, 1), th.float32, t.device)
        copies.append(schedules._copies[entries()[0]][1])
    assert copies[0] is copies[1] and not copies[0].is_inference()
    del table
    gc.collect()
    assert not entries()


def test_a_table_that_is_assigned_anew_is_used_from_then_on():
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 7])
    before = d.q_sample(x, t, noise=x)
    d.sqrt_alphas_cumprod = 2 * d.sqrt_alphas_cumprod
    after = d.q_sample(x, t, noise=x)
    th.testing.assert_close(after - before, th.tensor(d.sqrt_alphas_cumprod / 2, dtype=th.float32)[t, None] * x)


def test_a_table_that_is_changed_in_place_is_seen_so():
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 7])
    before = d.q_sample(x, t, noise=x)
    d.sqrt_alphas_cumprod[7] += 1
    after = d.q_sample(x, t, noise=x)
    th.testing.assert_close(after - before, th.stack([th.zeros(3), x[1]]))


def test_what_float32_cannot_hold_is_infinite():
    (values,) = schedules.at_timesteps((np.array([1e300, 1.0]),), th.tensor([0, 1]), 1)
    assert values.tolist() == [math.inf, 1.0]


def test_a_copy_of_a_diffusion_has_its_own_tables():
    d = make_diffusion(steps=30)
    x, t = tensor("x", 2, 3), th.tensor([2, 7])
    assert th.equal(copy.deepcopy(d).q_sample(x, t, noise=x), d.q_sample(x, t, noise=x))


# ---------------------------------------------------------------- q


@pytest.mark.parametrize("shape", [[2], [2, 9]], ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_process_is_as_recorded(name, shape):
    config, t = FORWARD[name]
    d, t = make_diffusion(**config), th.tensor(t)
    x_start, eps = image_batch(f"x0{shape}", 4, *shape), tensor(f"eps{shape}", 4, *shape)
    x_t = d.q_sample(x_start, t, noise=eps)
    q, posterior = d.q_mean_variance(x_start, t), d.q_posterior_mean_variance(x_start, x_t, t)
    th.manual_seed(5)
    assert_recorded(f"forward/{name}/{len(shape)}", x_t, *q, *posterior, d.q_sample(x_start, t))


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_q_sample_is_its_mean_and_standard_deviation_times_the_noise(timesteps):
    d, t, n = make_diffusion(steps=100), th.tensor(timesteps), len(timesteps)
    x_start, eps = tensor("x0", n, 3, 2), tensor("eps", n, 3, 2)
    mean, variance, log_variance = d.q_mean_variance(x_start, t)
    assert mean.shape == variance.shape == log_variance.shape == x_start.shape
    th.testing.assert_close(variance, log_variance.exp())
    th.testing.assert_close(d.q_sample(x_start, t, noise=eps), mean + variance.sqrt() * eps)
    for i, step in enumerate(timesteps):
        assert variance[i, 0, 0].item() == pytest.approx(1 - d.alphas_cumprod[step])


def test_q_sample_draws_standard_normal_noise():
    d = make_diffusion(steps=100)
    x_start, t = th.full((20000, 1), 0.5), th.full((20000,), 30)
    th.manual_seed(0)
    x_t = d.q_sample(x_start, t)
    mean, variance, _ = d.q_mean_variance(x_start, t)
    assert x_t.mean().item() == pytest.approx(mean[0].item(), abs=0.02)
    assert x_t.var().item() == pytest.approx(variance[0].item(), rel=0.03)


# ---------------------------------------------------------------- p


@pytest.mark.parametrize("shape", [[2], [2, 9]], ids=str)
@pytest.mark.parametrize("name", REVERSE)
def test_reverse_process_is_as_recorded(name, shape):
    config, timesteps = REVERSE[name]
    d, t = make_diffusion(**config), th.tensor(timesteps)
    model, x = toy_model_for(d), tensor(f"xt{shape}", 4, *shape)
    key = f"{name}/{len(shape)}"
    for variant, kwargs in {
        "clip": {},
        "noclip": dict(clip_denoised=False),
        "denoised_fn": dict(denoised_fn=lambda v: 0.5 * v),
        "cond": dict(model_kwargs=dict(y=th.arange(4))),
    }.items():
        out = d.p_mean_variance(model, x, t, **kwargs)
        want = "mean", "variance", "log_variance", "pred_xstart"
        assert_recorded(f"p_mean_variance/{key}/{variant}", *(out[k] for k in want))
    assert_recorded(f"model_t/{name}", model.seen[:1])

    th.manual_seed(11)
    steps = [d.p_sample(model, x, t)]
    for eta in (0.0, 0.6):
        th.manual_seed(12)
        steps.append(d.ddim_sample(model, x, t, eta=eta))
    steps.append(d.ddim_reverse_sample(model, x, t))
    assert_recorded(f"steps/{key}", *(s["sample"] for s in steps))


@pytest.mark.parametrize("var", VARS)
@settings(max_examples=20)
@given(timesteps=st.lists(st.integers(0, 49), min_size=1, max_size=4))
def test_three_parametrisations_of_one_model_agree(var, timesteps):
    t, n = th.tensor(timesteps), len(timesteps)
    x_start, x_t = tensor("x0", n, 2, 3).clamp(-1, 1), tensor("xt", n, 2, 3)
    outs = []
    for mean in MEANS:
        d = make_diffusion(steps=50, mean=mean, var=var)
        outs.append(d.p_mean_variance(point_model(d, x_start), x_t, t, clip_denoised=False))
    for out in outs:
        for k in ("mean", "pred_xstart", "variance", "log_variance"):
            th.testing.assert_close(out[k], outs[0][k], rtol=1e-4, atol=1e-3)
        th.testing.assert_close(out["pred_xstart"], x_start, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("v", "table"), [(-1.0, "posterior_log_variance_clipped"), (1.0, "betas")])
def test_learned_range_runs_from_the_posterior_variance_to_beta(v, table):
    d, t = make_diffusion(steps=100, var="LEARNED_RANGE"), th.arange(100)
    x = th.zeros(100, 1)
    out = d.p_mean_variance(always(th.cat([x, th.full_like(x, v)], dim=1)), x, t)
    want = getattr(d, table) if v < 0 else np.log(getattr(d, table))
    np.testing.assert_allclose(out["log_variance"][:, 0], want, rtol=1e-5)
    th.testing.assert_close(out["variance"], out["log_variance"].exp())


@pytest.mark.parametrize(("var", "table"), [("FIXED_SMALL", "posterior_variance"), ("FIXED_LARGE", "betas")])
def test_fixed_variances(var, table):
    d, t = make_diffusion(steps=100, var=var), th.arange(100)
    out = d.p_mean_variance(ToyModel(), th.zeros(100, 1), t)
    np.testing.assert_allclose(out["variance"][1:, 0], getattr(d, table)[1:], rtol=1e-5)
    np.testing.assert_allclose(out["log_variance"][1:, 0], np.log(getattr(d, table)[1:]), rtol=1e-5)
    assert out["log_variance"][0].item() == pytest.approx(math.log(d.posterior_variance[1]), rel=1e-5)


def test_predicted_data_goes_through_denoised_fn_before_it_is_clamped():
    d = make_diffusion(steps=10, schedule="cosine", mean="START_X")
    x, t = th.zeros(3, 2), th.tensor([0, 4, 9])
    model = always(th.full((3, 2), 0.5))
    out = d.p_mean_variance(model, x, t, denoised_fn=lambda v: v + 10)
    assert (out["pred_xstart"] == 1).all()
    out = d.p_mean_variance(model, x, t, denoised_fn=lambda v: v + 10, clip_denoised=False)
    assert (out["pred_xstart"] == 10.5).all()


@pytest.mark.parametrize("step", ["p_mean_variance", "p_sample", "ddim_sample", "ddim_reverse_sample"])
@pytest.mark.parametrize("t_shape", [(), (1,), (3,), (2, 1)], ids=str)
def test_wrong_shape_of_t(step, t_shape):
    d = make_diffusion(steps=30)
    with pytest.raises(ValueError, match=r"t must have shape \(2,\)"):
        getattr(d, step)(ToyModel(), th.zeros(2, 3, 4), th.zeros(t_shape, dtype=th.long))


@pytest.mark.parametrize(
    ("var", "channels", "wanted"), [("FIXED_SMALL", 6, 3), ("LEARNED", 3, 6), ("LEARNED_RANGE", 3, 6)]
)
@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_wrong_shape_of_the_models_output(var, channels, wanted, loss):
    d = make_diffusion(steps=30, var=var, loss=loss)
    x, t = th.zeros(2, 3, 4), th.tensor([0, 1])
    for call in (d.p_mean_variance, d.training_losses):
        with pytest.raises(ValueError, match=rf"must have shape \(2, {wanted}, 4\).*not \(2, {channels}, 4\)"):
            call(always(th.zeros(2, channels, 4)), x, t)


@pytest.mark.parametrize("rescale", [False, True])
def test_timesteps_that_the_model_sees(rescale):
    d, model = make_diffusion(steps=40, rescale=rescale), ToyModel()
    d.p_mean_variance(model, th.zeros(2, 3), th.tensor([3, 39]))
    d.training_losses(model, th.zeros(2, 3), th.tensor([3, 39]))
    assert model.seen == [[75.0, 975.0] if rescale else [3, 39]] * 2


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("name", LOOPS)
def test_sampling_loops_are_as_recorded(name):
    config, shape = LOOPS[name]
    d = make_diffusion(**config)
    model = toy_model_for(d)

    def sample(loop, seed, **kwargs):
        th.manual_seed(seed)
        return loop(model, shape, **kwargs)

    samples = [
        sample(d.p_sample_loop, 21),
        sample(d.p_sample_loop, 21, clip_denoised=False),
        sample(d.ddim_sample_loop, 21),
        sample(d.ddim_sample_loop, 21, eta=1.0),
        sample(d.p_sample_loop, 22, noise=tensor("start", *shape)),
    ]
    assert_recorded(f"loops/{name}", *samples, rtol=2e-4)
    model.seen.clear()
    steps = list(sample(d.p_sample_loop_progressive, 23))
    means = th.stack([s["pred_xstart"].double().mean() for s in steps])
    assert_recorded(f"loops/{name}/progressive", means, rtol=2e-4)
    assert_recorded(f"loops/{name}/visited", model.seen)


LOOP_NAMES = ["p_sample_loop", "ddim_sample_loop"]


@pytest.mark.parametrize("loop", LOOP_NAMES)
@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("mean", MEANS)
def test_the_perfect_model_of_a_point_draws_that_point(mean, var, loop):
    d = make_diffusion(steps=30, mean=mean, var=var)
    x_start = tensor("point", 2, 3, 4).clamp(-1, 1)
    sample = getattr(d, loop)(point_model(d, x_start), (2, 3, 4), device="cpu")
    th.testing.assert_close(sample, x_start, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("loop", "kwargs"),
    [("p_sample_loop", {}), ("ddim_sample_loop", {}), ("ddim_sample_loop", dict(eta=1.0))],
    ids=["ancestral", "ddim", "ddim eta=1"],
)
def test_the_perfect_model_of_a_gaussian_draws_that_gaussian(loop, kwargs):
    d, std = make_diffusion(steps=200, schedule="cosine", var="FIXED_SMALL"), 0.5

    def eps(x, t):
        alpha_bar = d.alphas_cumprod[int(t[0])]
        return math.sqrt(1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar) * x

    th.manual_seed(0)
    samples = getattr(d, loop)(eps, (1, 20000), clip_denoised=False, device="cpu", **kwargs)
    assert samples.std().item() == pytest.approx(std, rel=0.03)
    assert samples.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_progressive_loop_yields_every_step_and_ends_in_the_sample(loop):
    d, model = make_diffusion(steps=30), ToyModel()
    th.manual_seed(0)
    steps = list(getattr(d, loop + "_progressive")(model, (2, 3)))
    th.manual_seed(0)
    final = getattr(d, loop)(model, (2, 3))
    assert len(steps) == 30
    assert th.equal(steps[-1]["sample"], final)
    assert all(set(s) >= {"sample", "pred_xstart"} for s in steps)
    assert not any(v.requires_grad for s in steps for v in s.values())


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_loops_draw_noise_once_for_the_start_and_once_a_step(loop):
    """Seeded scripts of the original continue with the same random numbers, DDIM's included."""
    d, shape = make_diffusion(steps=30), (2, 3, 5)
    th.manual_seed(0)
    getattr(d, loop)(ToyModel(), shape)
    after = th.rand(4)
    th.manual_seed(0)
    for _ in range(1 + d.num_timesteps):
        th.randn(*shape)
    assert th.equal(after, th.rand(4))


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_model_kwargs_and_noise_reach_every_step(loop):
    d, seen = make_diffusion(steps=30), []

    def model(x, t, y):
        seen.append((x, y))
        return 0 * x

    noise, y = tensor("noise", 2, 3), th.tensor([1, 2])
    getattr(d, loop)(model, noise.shape, noise=noise, device="cpu", model_kwargs=dict(y=y))
    assert seen[0][0] is noise
    assert len(seen) == 30 and all(labels is y for _, labels in seen)


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_progress_goes_to_stderr_alone_and_changes_nothing(loop, capfd):
    d = make_diffusion(steps=30)
    samples, written = [], []
    for progress in (False, True):
        th.manual_seed(0)
        samples.append(getattr(d, loop)(ToyModel(), (2, 3), progress=progress))
        written.append(capfd.readouterr())
    assert th.equal(*samples)
    assert [w.out for w in written] == ["", ""]
    assert written[0].err == ""
    assert "30/30" in written[1].err


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_loops_sample_on_the_models_device(loop):
    """On the meta device nothing is computed, but everything has to be in one place."""

    class Scale(th.nn.PReLU):
        def forward(self, x, t):
            return self.weight * x * t.view(-1, 1)

    sample = getattr(make_diffusion(steps=30), loop)(Scale(device="meta"), (2, 3))
    assert (sample.shape, sample.device.type) == ((2, 3), "meta")


@pytest.mark.parametrize("loop", LOOP_NAMES)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_noise_of_ones_own(loop, eta):
    """All of it: the start, and each step's; the global generator is left alone."""
    kwargs = dict(eta=eta) if loop == "ddim_sample_loop" else {}
    d, shape = make_diffusion(12, "cosine"), (2, 3, 5)
    th.manual_seed(3)
    want = getattr(d, loop)(ToyModel(), shape, **kwargs)
    th.manual_seed(3)
    drawn = iter([th.randn(*shape) for _ in range(13)])
    before, likes = th.get_rng_state(), []

    def noise_fn(x):
        likes.append((x.shape, x.dtype, x.device.type))
        return next(drawn)

    assert th.equal(getattr(d, loop)(ToyModel(), shape, noise_fn=noise_fn, **kwargs), want)
    assert likes == [(th.Size(shape), th.float32, "cpu")] * 13
    assert th.equal(th.get_rng_state(), before)


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_noise_of_ones_own_and_a_start_of_ones_own(loop):
    d, start, calls = make_diffusion(12, "cosine"), tensor("start", 2, 3), []
    steps = list(
        getattr(d, loop + "_progressive")(
            ToyModel(), (2, 3), noise=start, noise_fn=lambda x: calls.append(x) or th.zeros_like(x)
        )
    )
    assert len(calls) == len(steps) == 12 and calls[0] is start


@pytest.mark.parametrize("step", ["p_sample", "ddim_sample"])
def test_noise_of_a_single_step(step):
    d, x, t = make_diffusion(steps=30, var="FIXED_SMALL"), tensor("x", 2, 3), th.tensor([4, 9])
    kwargs = {"eta": 1.0} if step == "ddim_sample" else {}
    th.manual_seed(0)
    default = getattr(d, step)(ToyModel(), x, t, **kwargs)["sample"]
    th.manual_seed(0)
    noise = th.randn(2, 3)
    assert th.equal(getattr(d, step)(ToyModel(), x, t, noise_fn=lambda like: noise, **kwargs)["sample"], default)
    assert not th.equal(getattr(d, step)(ToyModel(), x, t, noise_fn=th.zeros_like, **kwargs)["sample"], default)


def test_steps_of_a_subclass_written_for_the_original():
    """They know no noise_fn, and the loops do not name it unless they are given one."""

    class Old(GaussianDiffusion):
        def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
            return super().p_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs)

        def ddim_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
            return super().ddim_sample(model, x, t, clip_denoised, denoised_fn, model_kwargs, eta)

    parameters = dict(
        betas=get_named_beta_schedule("cosine", 7),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.KL,
    )
    for loop in LOOP_NAMES:
        samples = []
        for cls in (Old, GaussianDiffusion):
            th.manual_seed(2)
            samples.append(getattr(cls(**parameters), loop)(ToyModel(), (2, 3)))
        assert th.equal(*samples)
        with pytest.raises(TypeError, match="noise_fn"):
            getattr(Old(**parameters), loop)(ToyModel(), (2, 3), noise_fn=th.randn_like)


def test_the_last_step_adds_no_noise():
    d, model = make_diffusion(steps=30), ToyModel()
    x, t = tensor("x", 2, 3), th.tensor([0, 5])
    sample = d.p_sample(model, x, t)["sample"]
    mean = d.p_mean_variance(model, x, t)["mean"]
    assert th.equal(sample[0], mean[0])
    assert not th.equal(sample[1], mean[1])


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_ddim_is_deterministic_given_its_start(seed1, seed2):
    d, model, noise = make_diffusion(steps=25), ToyModel(), tensor("start", 2, 3)
    samples = []
    for seed in (seed1, seed2):
        th.manual_seed(seed)
        samples.append(d.ddim_sample_loop(model, noise.shape, noise=noise))
    assert th.equal(*samples)


def test_ddim_with_eta_depends_on_the_seed():
    d, model, noise = make_diffusion(steps=25), ToyModel(), tensor("start", 2, 3)
    samples = []
    for seed in (0, 1):
        th.manual_seed(seed)
        samples.append(d.ddim_sample_loop(model, noise.shape, noise=noise, eta=0.5))
    assert not th.equal(*samples)


@given(st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_ddim_step_with_eta_one_is_the_ancestral_step(timesteps):
    d, model, t = make_diffusion(steps=100, var="FIXED_SMALL"), ToyModel(), th.tensor(timesteps)
    x = tensor("x", len(timesteps), 3, 4)
    th.manual_seed(0)
    ddim = d.ddim_sample(model, x, t, eta=1.0)
    th.manual_seed(0)
    ancestral = d.p_sample(model, x, t)
    th.testing.assert_close(ddim["sample"], ancestral["sample"], rtol=1e-4, atol=1e-5)
    assert th.equal(ddim["pred_xstart"], ancestral["pred_xstart"])


def encode_and_decode(d, model, x):
    """Up the deterministic chain and down again, between index 0 and T - 1."""
    shape, unclipped = x.shape[:1], dict(clip_denoised=False)
    for i in range(d.num_timesteps - 1):
        x = d.ddim_reverse_sample(model, x, th.full(shape, i), **unclipped)["sample"]
    for i in reversed(range(1, d.num_timesteps)):
        x = d.ddim_sample(model, x, th.full(shape, i), **unclipped)["sample"]
    return x


@th.no_grad()
def test_ddim_reverse_inverts_ddim_for_a_smooth_model():
    """The two discretise one differential equation: the error falls with the step size."""
    x = tensor("x", 4, 3, 2)

    def error(steps):
        d = make_diffusion(steps=steps, schedule="cosine", rescale=True)
        d = diffusion_of(d.betas[: int(0.9 * steps)], rescale_timesteps=True)  # the last betas are clipped
        return (encode_and_decode(d, ToyModel(), x) - x).abs().max().item()

    assert error(400) < 0.02
    assert error(400) < 0.5 * error(100)


@th.no_grad()
def test_ddim_reverse_inverts_ddim_exactly_where_the_trajectory_is_straight():
    d = make_diffusion(steps=50, mean="START_X")
    x = tensor("x", 4, 3, 2)
    th.testing.assert_close(encode_and_decode(d, point_model(d, 0.3 * x), x), x, rtol=1e-3, atol=1e-3)


def test_ddim_reverse_refuses_noise():
    d = make_diffusion(steps=30)
    with pytest.raises(ValueError, match=r"eta=0\.5"):
        d.ddim_reverse_sample(ToyModel(), th.zeros(2, 3), th.tensor([0, 1]), eta=0.5)


def counting(method):
    def override(self, *args, **kwargs):
        self.calls[method] += 1
        return getattr(GaussianDiffusion, method)(self, *args, **kwargs)

    return override


OVERRIDDEN = ["q_sample", "q_posterior_mean_variance", "p_mean_variance", "p_sample", "ddim_sample"]
Counting = type("Counting", (GaussianDiffusion,), {method: counting(method) for method in OVERRIDDEN})


@pytest.mark.parametrize(
    ("call", "wanted"),
    [
        (
            lambda d: d.p_sample_loop(ToyModel(), (2, 3)),
            dict(p_sample=7, p_mean_variance=7, q_posterior_mean_variance=7),
        ),
        (
            lambda d: d.ddim_sample_loop(ToyModel(), (2, 3)),
            dict(ddim_sample=7, p_mean_variance=7, q_posterior_mean_variance=7),
        ),
        (
            lambda d: d.calc_bpd_loop(ToyModel(), th.zeros(2, 3)),
            dict(q_sample=7, p_mean_variance=7, q_posterior_mean_variance=14),
        ),
        (
            lambda d: d.training_losses(ToyModel(), th.zeros(2, 3), th.tensor([0, 6])),
            dict(q_sample=1, p_mean_variance=1, q_posterior_mean_variance=2),
        ),
    ],
    ids=["p_sample_loop", "ddim_sample_loop", "calc_bpd_loop", "training_losses"],
)
def test_overrides_of_a_subclass_are_seen(call, wanted):
    d = Counting(
        betas=get_named_beta_schedule("cosine", 7),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.KL,
    )
    d.calls = dict.fromkeys(OVERRIDDEN, 0)
    call(d)
    assert {k: n for k, n in d.calls.items() if n} == wanted


# ---------------------------------------------------------------- training losses


@pytest.mark.parametrize("shape", [[3, 6, 6], [2], [2, 9]], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_training_losses_are_as_recorded(name, shape):
    config, t = LOSSES[name]
    d, t = make_diffusion(**config), th.tensor(t)
    model = toy_model_for(d)
    x_start, eps = image_batch(f"x0{shape}", 4, *shape), tensor(f"eps{shape}", 4, *shape)
    terms = d.training_losses(model, x_start, t, noise=eps)
    terms["loss"].mean().backward()
    th.manual_seed(3)
    seeded = d.training_losses(model, x_start, t)["loss"]
    parts = [terms[k] for k in ("mse", "vb") if k in terms]
    assert_recorded(f"losses/{name}/{len(shape)}", terms["loss"], seeded, *parts)
    assert_recorded(f"losses/{name}/{len(shape)}/grad", model.w.grad)


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("mean", MEANS)
def test_every_combination_gives_finite_losses_and_gradients_where_they_belong(mean, var, loss):
    d = make_diffusion(steps=50, mean=mean, var=var, loss=loss)
    learned = var.startswith("LEARNED")
    x_start, t = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49])
    output = (0.1 * tensor("output", 4, 4 if learned else 2, 3)).requires_grad_()
    th.manual_seed(0)
    terms = d.training_losses(always(output), x_start, t)

    mse = loss in ("MSE", "RESCALED_MSE")
    assert set(terms) == {"loss"} | ({"mse"} if mse else set()) | ({"vb"} if mse and learned else set())
    assert all(v.shape == (4,) and v.isfinite().all() for v in terms.values())
    terms["loss"].sum().backward()
    assert output.grad.isfinite().all()
    mean_grad, *var_grad = output.grad.chunk(2, dim=1) if learned else [output.grad]
    for grad in (mean_grad, *var_grad):
        assert grad[1:].flatten(1).any(dim=1).all()  # at t = 0 the decoder's bins may be too far away


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("var", ["LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE"])
def test_in_the_hybrid_loss_the_bound_teaches_the_variance_only(mean, var, loss):
    d = make_diffusion(steps=50, mean=mean, var=var, loss=loss)
    x_start, t = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49])
    output = (0.1 * tensor("output", 4, 4, 3)).requires_grad_()
    terms = d.training_losses(always(output), x_start, t, noise=tensor("eps", 4, 2, 3))
    for term, taught in (("vb", 1), ("mse", 0)):
        (grad,) = th.autograd.grad(terms[term].sum(), output, retain_graph=True)
        halves = grad.chunk(2, dim=1)
        assert halves[taught].any()
        assert not halves[1 - taught].any()


@pytest.mark.parametrize("mean", MEANS)
def test_the_squared_error_of_a_perfect_prediction_is_zero(mean):
    d = make_diffusion(steps=50, mean=mean)
    x_start, t, eps = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49]), tensor("eps", 4, 2, 3)
    x_t = d.q_sample(x_start, t, noise=eps)
    target = {"EPSILON": eps, "START_X": x_start, "PREVIOUS_X": d.q_posterior_mean_variance(x_start, x_t, t)[0]}[mean]
    assert not d.training_losses(always(target), x_start, t, noise=eps)["loss"].any()
    off = d.training_losses(always(target + 0.5), x_start, t, noise=eps)
    th.testing.assert_close(off["mse"], th.full((4,), 0.25))


@pytest.mark.parametrize("mean", MEANS)
def test_the_bound_of_a_perfect_model_is_zero_but_for_the_decoder(mean):
    d = make_diffusion(steps=50, mean=mean, var="FIXED_SMALL", loss="KL")
    x_start, t = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49])
    loss = d.training_losses(point_model(d, x_start), x_start, t)["loss"]
    th.testing.assert_close(loss[1:], th.zeros(3), rtol=0, atol=1e-3)
    assert loss[0] > 0


def test_how_the_losses_are_composed_and_rescaled():
    x_start, t, eps = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49]), tensor("eps", 4, 2, 3)
    mse, rescaled, kl, rescaled_kl = (
        make_diffusion(steps=50, var="LEARNED_RANGE", loss=loss).training_losses(ToyModel(True), x_start, t, noise=eps)
        for loss in LOSS_TYPES
    )
    th.testing.assert_close(mse["loss"], mse["mse"] + mse["vb"])
    th.testing.assert_close(rescaled["loss"], mse["mse"] + mse["vb"] * 50 / 1000)
    th.testing.assert_close(mse["vb"], kl["loss"])  # the same bound, whatever is held fixed inside it
    th.testing.assert_close(rescaled_kl["loss"], kl["loss"] * 50)


def test_is_vb():
    assert [v.is_vb() for v in LossType] == [False, False, True, True]


def test_training_passes_model_kwargs_on():
    for loss in ("MSE", "KL"):
        d = make_diffusion(steps=50, loss=loss)
        x_start, t, eps = th.zeros(2, 3), th.tensor([3, 40]), tensor("eps", 2, 3)
        losses = [
            d.training_losses(ToyModel(), x_start, t, model_kwargs=kwargs, noise=eps)["loss"]
            for kwargs in (None, dict(y=th.tensor([0, 0])), dict(y=th.tensor([5, 5])))
        ]
        assert th.equal(losses[0], losses[1])
        assert not th.isclose(losses[0], losses[2]).any()


# ---------------------------------------------------------------- the whole bound


@pytest.mark.parametrize("name", LOOPS)
def test_the_whole_bound_is_as_recorded(name):
    config, shape = LOOPS[name]
    d = make_diffusion(**config)
    model = toy_model_for(d)
    th.manual_seed(24)
    out = d.calc_bpd_loop(model, image_batch("bpd", *shape))
    assert_recorded(f"bpd/{name}", out["total_bpd"], out["prior_bpd"], rtol=2e-4)
    assert_recorded(f"bpd/{name}/terms", out["vb"], out["xstart_mse"], out["mse"], rtol=2e-4)


def test_the_whole_bound_adds_up_and_begins_at_the_noisiest_step():
    d, x_start = make_diffusion(steps=40, mean="START_X", var="FIXED_SMALL"), image_batch("x0", 3, 2, 5)
    model = ToyModel()
    out = d.calc_bpd_loop(model, x_start)
    assert [t[0] for t in model.seen] == list(reversed(range(40)))
    assert out["total_bpd"].shape == out["prior_bpd"].shape == (3,)
    assert all(out[k].shape == (3, 40) for k in ("vb", "xstart_mse", "mse"))
    assert not any(v.requires_grad for v in out.values())
    th.testing.assert_close(out["total_bpd"], out["vb"].sum(dim=1) + out["prior_bpd"])

    # KL(N(m, v) || N(0, 1)) in bits per dimension
    mean, v = d.sqrt_alphas_cumprod[-1] * x_start.double(), 1 - d.alphas_cumprod[-1]
    prior = (0.5 * (mean**2 + v - 1 - math.log(v))).mean(dim=(1, 2)) / math.log(2)
    th.testing.assert_close(out["prior_bpd"].double(), prior, rtol=1e-3, atol=1e-9)


def test_the_whole_bound_with_noise_of_ones_own():
    """One draw a timestep, the noisiest first; the global generator is left alone."""
    d, x_start = make_diffusion(9, "cosine"), image_batch("x0", 3, 2, 5)
    th.manual_seed(1)
    want = d.calc_bpd_loop(ToyModel(), x_start)
    th.manual_seed(1)
    drawn, likes = iter([th.randn(3, 2, 5) for _ in range(9)]), []
    before = th.get_rng_state()
    got = d.calc_bpd_loop(ToyModel(), x_start, noise_fn=lambda x: likes.append(x) or next(drawn))
    assert all(th.equal(got[key], want[key]) for key in want)
    assert len(likes) == 9 and all(x is x_start for x in likes)
    assert th.equal(th.get_rng_state(), before)
    still = d.calc_bpd_loop(ToyModel(), x_start, noise_fn=th.zeros_like)
    assert not th.equal(still["mse"], want["mse"])


def test_the_whole_bound_of_a_perfect_model_is_the_decoders():
    d, x_start = make_diffusion(steps=40, mean="START_X", var="FIXED_SMALL"), image_batch("x0", 3, 2, 5)
    out = d.calc_bpd_loop(point_model(d, x_start), x_start)
    th.testing.assert_close(out["vb"][:, :-1], th.zeros(3, 39), rtol=0, atol=1e-4)
    assert (out["vb"][:, -1] > 0).all()
    assert not out["xstart_mse"].any()
    th.testing.assert_close(out["mse"], th.zeros(3, 40), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- any shape, any length


def everything(d, shape, seed=0):
    """Every result of a diffusion for data of this shape, as one dict of tensors."""
    model = toy_model_for(d)
    n, t_max = shape[0], d.num_timesteps - 1
    t = th.linspace(0, t_max, n).long()
    x_start, x_t = (th.linspace(-1, 1, math.prod(shape)).view(shape) * s for s in (1.0, 1.5))
    out = {"q": d.q_sample(x_start, t, noise=x_t)}
    for fn in (d.q_mean_variance(x_start, t), d.q_posterior_mean_variance(x_start, x_t, t)):
        out |= {f"{len(out)}": v for v in fn}
    for step in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample):
        th.manual_seed(seed)
        out |= {f"{step.__name__} {k}": v for k, v in step(model, x_t, t).items()}
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        th.manual_seed(seed)
        out[loop.__name__] = loop(model, shape, noise=x_t)
    th.manual_seed(seed)
    out |= {f"training {k}": v for k, v in d.training_losses(model, x_start, t).items()}
    th.manual_seed(seed)
    return out | d.calc_bpd_loop(model, x_start)


@pytest.mark.parametrize("shape", [(4, 2, 12), (4, 2, 3, 4), (4, 2, 2, 2, 3), (4, 24), (4, 2, 1, 12, 1, 1)], ids=str)
@pytest.mark.parametrize("var", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_any_trailing_axes_give_the_same_numbers(shape, var):
    d = make_diffusion(steps=8, schedule="cosine", var=var)
    want = everything(d, (4, 24, 1))
    for k, v in everything(d, shape).items():
        assert v.isfinite().all(), k
        assert v.shape in (shape, (4,), (4, 8)), k
        if var.startswith("FIXED") or shape[1] == 24:  # elementwise, so the axes do not matter
            th.testing.assert_close(v.flatten(1) if v.dim() > 1 else v, want[k].flatten(1) if v.dim() > 1 else want[k])


@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("beta", [0.1, 0.999])
def test_one_step_chains(mean, var, beta):
    d = diffusion_of([beta], mean, var)
    out = everything(d, (3, 2, 4))
    for loss in LOSS_TYPES:
        terms = diffusion_of([beta], mean, var, loss).training_losses(
            toy_model_for(d), th.zeros(3, 2), th.zeros(3).long()
        )
        out |= {f"{loss} {k}": v for k, v in terms.items()}
    assert all(v.isfinite().all() for v in out.values())
    assert out["vb"].shape == (3, 1)
    th.testing.assert_close(out["p_sample_loop"], out["ddim_sample_loop"])  # neither adds noise at t = 0
    if var != "LEARNED":  # all that a fixed variance, or a range, can mean here
        th.testing.assert_close(out["p_mean_variance log_variance"], th.full((3, 2, 4), math.log(beta)))


# ---------------------------------------------------------------- what a step leaves alone, and what it never does


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("var", VARS)
def test_steps_leave_what_they_are_given_as_it_is(mean, var):
    d, t = make_diffusion(steps=30, mean=mean, var=var), th.tensor([0, 9])
    given = dict(
        x=3 * tensor("x", 2, 2, 3),
        output=3 * tensor("output", 2, 4 if var.startswith("LEARNED") else 2, 3),
        noise=tensor("noise", 2, 2, 3),
        denoised=3 * tensor("denoised", 2, 2, 3),
    )
    before = {k: v.clone() for k, v in given.items()}
    for denoised_fn in (None, lambda v: given["denoised"], lambda v: v):
        kwargs = dict(denoised_fn=denoised_fn, noise_fn=lambda x: given["noise"])
        d.p_sample(always(given["output"]), given["x"], t, **kwargs)
        for eta in (0.0, 0.5):
            d.ddim_sample(always(given["output"]), given["x"], t, eta=eta, **kwargs)
    for clip in (False, True):
        out = d.ddim_reverse_sample(always(given["output"]), given["x"], t, clip_denoised=clip)
        assert not clip or out["pred_xstart"].abs().max() <= 1
    d.training_losses(always(given["output"]), given["x"], t, noise=given["noise"])
    assert all(th.equal(given[k], before[k]) for k in given)


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("var", VARS)
def test_gradients_go_through_a_step(mean, var):
    d, t = make_diffusion(steps=30, mean=mean, var=var), th.tensor([1, 9])
    x = tensor("x", 2, 2, 3).double().mul_(0.3).requires_grad_()
    model = always(tensor("output", 2, 4 if var.startswith("LEARNED") else 2, 3).double() * 0.3)
    for step, kwargs in ((d.p_sample, {}), (d.ddim_sample, {}), (d.ddim_sample, dict(eta=0.5))):
        kwargs["noise_fn"] = th.ones_like
        assert th.autograd.gradcheck(lambda v, s=step, k=kwargs: s(model, v, t, **k)["sample"], x)


@pytest.mark.parametrize("loss", LOSS_TYPES)
def test_a_batch_without_a_first_timestep_has_the_losses_it_has_beside_one(loss):
    d = make_diffusion(steps=50, var="LEARNED_RANGE", loss=loss)
    x_start, eps = image_batch("x0", 4, 2, 3), tensor("eps", 4, 2, 3)
    with_first, without = (
        d.training_losses(ToyModel(True), x_start, th.tensor([first, 1, 25, 49]), noise=eps) for first in (0, 3)
    )
    for key in with_first:
        assert th.equal(with_first[key][1:], without[key][1:])
        assert with_first[key][0] != without[key][0]


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_a_model_may_guide_itself_by_gradients_and_samples_may_be_trained_on(loop):
    d = make_diffusion(steps=5, schedule="cosine")

    def guided(x, t):
        with th.enable_grad():
            x = x.detach().requires_grad_()
            return th.autograd.grad((x**2).sum(), x)[0]

    grad_modes = []
    for out in getattr(d, loop + "_progressive")(guided, (2, 3), device="cpu"):
        grad_modes.append((th.is_grad_enabled(), th.is_inference_mode_enabled()))
        w = th.ones(3, requires_grad=True)
        (w * out["sample"] * out["pred_xstart"]).sum().backward()
        assert th.equal(w.grad, (out["sample"] * out["pred_xstart"]).sum(dim=0))
    assert grad_modes == [(True, False)] * 5


@pytest.mark.parametrize("var", VARS)
def test_everything_works_under_inference_mode_and_what_follows_trains(var):
    d = make_diffusion(steps=4, schedule="cosine", var=var)
    model, x_start = toy_model_for(d), image_batch("x0", 2, 3)
    with th.inference_mode():
        th.manual_seed(0)
        inside = d.p_sample_loop(model, (2, 3)), d.calc_bpd_loop(model, x_start)["total_bpd"]
    th.manual_seed(0)
    assert th.equal(d.p_sample_loop(model, (2, 3)), inside[0])
    assert th.equal(d.calc_bpd_loop(model, x_start)["total_bpd"], inside[1])
    d.training_losses(model, x_start, th.tensor([0, 3]))["loss"].sum().backward()
    assert model.w.grad.isfinite().all()


def steps_of_all_kinds(device):
    """Pairs of a name and a function without arguments: the steps that loops repeat."""
    shape, t = (2, 2, 4, 4), th.zeros(2, dtype=th.long, device=device)
    x = th.zeros(shape, device=device)
    for respacing in (None, "10"):
        for var in VARS:
            d = make_diffusion(steps=30, var=var, rescale=True, respacing=respacing)
            output = th.zeros(2, 4 if var.startswith("LEARNED") else 2, 4, 4, device=device)
            for step in (d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.training_losses):
                yield f"{step.__name__} {var} {respacing}", lambda f=step, o=output: f(always(o), x, t)
            yield f"eta {var} {respacing}", lambda d=d, o=output: d.ddim_sample(always(o), x, t, eta=0.5)
            kl = make_diffusion(steps=30, var=var, loss="RESCALED_KL", respacing=respacing)
            yield f"kl {var} {respacing}", lambda d=kl, o=output: d.training_losses(always(o), x, t)


class OnlyOn(TorchDispatchMode):
    """Refuses every operation that makes or takes a tensor elsewhere. On meta a wait for a value fails by itself."""

    def __init__(self, device):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in tree_leaves((args, kwargs, out)):
            assert not isinstance(v, th.Tensor) or v.device.type == self.device, f"{func} touched {v.device}"
        return out


def test_no_step_touches_another_device_or_waits_for_a_value():
    for name, step in steps_of_all_kinds("meta"):
        step()  # brings the tables there
        with OnlyOn("meta"):
            try:
                step()
            except Exception as e:
                raise AssertionError(name) from e


def test_what_the_guard_of_the_steps_refuses():
    with OnlyOn("meta"):
        with pytest.raises(AssertionError, match="touched cpu"):
            th.tensor([1, 2])
        with pytest.raises(RuntimeError):
            th.zeros(2, device="meta").sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            th.zeros(2, device="meta")[th.zeros(2, dtype=th.bool, device="meta")]


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_gpu():
    sampler = create_named_schedule_sampler("uniform", make_diffusion(steps=30))
    steps = [*steps_of_all_kinds("cuda"), ("sampler", lambda: sampler.sample(4, th.device("cuda")))]
    for _, step in steps:
        step()  # brings the tables there
    th.cuda.set_sync_debug_mode("error")
    try:
        for _, step in steps:
            step()
    finally:
        th.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16], ids=str)
def test_a_learned_variance_of_half_precision_is_computed_in_float32(dtype):
    d, x, t = make_diffusion(steps=30, var="LEARNED_RANGE"), tensor("x", 2, 3, 4, 4), th.tensor([2, 20])
    output = tensor("out", 2, 6, 4, 4).to(dtype)
    got = d.p_mean_variance(lambda x, t: output, x, t)["log_variance"]
    low, high = (th.tensor(table)[t].view(-1, 1, 1, 1) for table in (d.posterior_log_variance_clipped, np.log(d.betas)))
    v = (output.chunk(2, dim=1)[1] + 1) / 2
    assert got.dtype == th.float32
    th.testing.assert_close(got.double(), v * high + (1 - v) * low, rtol=1e-5, atol=1e-5)


def test_steps_under_vmap():
    """Ensembles and gradients by sample, as torch.func makes them."""
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 20])
    noises = tensor("noises", 4, 2, 3)
    got = th.func.vmap(lambda noise: d.q_sample(x, t, noise=noise))(noises)
    assert th.equal(got, th.stack([d.q_sample(x, t, noise=noise) for noise in noises]))
    got = th.func.vmap(lambda eps: d.p_mean_variance(lambda x, t: eps, x, t)["mean"])(noises)
    assert th.equal(got, th.stack([d.p_mean_variance(lambda x, t, eps=eps: eps, x, t)["mean"] for eps in noises]))


def test_what_a_subclass_gives_stays_as_it_is():
    eps = 5 * tensor("eps", 2, 3)
    before = eps.clone()
    d = make_diffusion(steps=30)
    d._predict_xstart_from_eps = lambda x_t, t, eps: eps
    d._predict_eps_from_xstart = lambda x_t, t, pred_xstart: eps
    d.ddim_sample(lambda x, t: eps, tensor("x", 2, 3), th.tensor([2, 20]))
    assert th.equal(eps, before)
