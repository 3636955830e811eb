"""Tables, the forward and reverse processes, training losses and the variational bound."""

import copy
import math
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch as th
from diffusions import LOSS_TYPES, MEANS, VARS, always, beta_arrays, diffusion_of, point_model
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_cases import (
    EPS_RANGE,
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

from improved_diffusion import gaussian_diffusion as gd
from improved_diffusion import schedules
from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.utils.errors import InputError

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


# ---------------------------------------------------------------- tables are replaced, not changed


def test_tables_cannot_be_changed_in_place():
    d, view = make_diffusion(steps=30), np.linspace(0.1, 0.2, 60)[::2]
    d.posterior_variance = view
    view[0] = 7  # nobody else has the diffusion's
    assert d.posterior_variance[0] == 0.1
    for other in (d, copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        for name in TABLE_NAMES:
            with pytest.raises(ValueError, match="read-only"):
                getattr(other, name)[3] = 0.5


def test_arrays_that_are_no_tables_stay_as_they_are():
    d = make_diffusion(steps=30)
    d.history = np.zeros(30)
    d.history[3] = 1
    assert d.history.sum() == 1


@pytest.mark.parametrize("var", VARS)
def test_a_replaced_table_is_seen_by_everything(var):
    """As if the diffusion had been made with it, after as well as before a first use."""
    d, x, t = make_diffusion(steps=30, var=var), tensor("x", 3, 2), th.tensor([0, 1, 7])
    model = toy_model_for(d)

    def answers(d):
        th.manual_seed(0)
        steps = d.q_sample(x, t), *d.q_posterior_mean_variance(x, x, t), *d.p_mean_variance(model, x, t).values()
        return [*steps, d.p_sample(model, x, t)["sample"], d.ddim_sample(model, x, t, eta=0.5)["sample"]]

    want = diffusion_of(0.5 * d.betas, var=var)
    answers(d)
    for name in TABLE_NAMES:
        setattr(d, name, getattr(want, name) + 0)
    for got, expected in zip(answers(d), answers(want), strict=True):
        assert th.equal(got, expected)


@pytest.mark.parametrize("var", ["LEARNED_RANGE", "FIXED_LARGE"])
def test_betas_alone_may_be_replaced(var):
    """As in the original, which takes the variances of both types from betas at each use."""
    d, x, t = make_diffusion(steps=30, var=var), th.zeros(2, 1), th.tensor([1, 7])
    model = always(th.ones(2, 2) if var == "LEARNED_RANGE" else x)
    before = d.p_mean_variance(model, x, t)["log_variance"]
    d.betas = d.betas * 0.5
    after = d.p_mean_variance(model, x, t)["log_variance"]
    th.testing.assert_close(after, before + math.log(0.5))


def test_a_subclass_that_sets_the_originals_attributes_itself():
    """And an object that was pickled with the original: both have them, and nothing else."""
    made = make_diffusion(steps=30, var="FIXED_LARGE")
    attributes = {k: v for k, v in vars(made).items() if not k.startswith("_")}

    class Own(GaussianDiffusion):
        def __init__(self):
            for name, value in attributes.items():
                setattr(self, name, np.array(value) if isinstance(value, np.ndarray) else value)

    unpickled = GaussianDiffusion.__new__(GaussianDiffusion)
    unpickled.__setstate__(attributes)
    for d in (Own(), unpickled):
        for var in ModelVarType:
            d.model_var_type = made.model_var_type = var
            for step in ("p_sample", "ddim_sample", "training_losses"):
                model, samples = toy_model_for(d), []
                for diffusion in (d, made):
                    th.manual_seed(0)
                    samples.append(getattr(diffusion, step)(model, tensor("x", 2, 3), th.tensor([0, 9])))
                assert all(th.equal(samples[0][k], samples[1][k]) for k in samples[1])


def test_copies_of_a_diffusion_compute_the_same():
    d, x, t = make_diffusion(steps=30, var="FIXED_LARGE"), tensor("x", 2, 3), th.tensor([2, 7])
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        for key, value in d.p_mean_variance(ToyModel(), x, t).items():
            assert th.equal(other.p_mean_variance(ToyModel(), x, t)[key], value)


# ---------------------------------------------------------------- timesteps of any shape


@pytest.mark.parametrize("shape", [(2,), (2, 1), (2, 1, 1, 1), (2, 3), (2, 1, 4, 5)], ids=str)
def test_timesteps_of_any_shape(shape):
    """Each element is computed as if its timestep were the whole batch's; -1 is the last one."""
    d, size = make_diffusion(steps=9, schedule="cosine"), (2, 3, 4, 5)
    t = th.from_numpy(np.random.default_rng(0).integers(-1, 9, shape))
    t.view(-1)[0] = -1
    a, b = tensor("a", *size), tensor("b", *size)
    functions = {
        "q_sample": lambda t: (d.q_sample(a, t, noise=b),),
        "q_mean_variance": lambda t: d.q_mean_variance(a, t),
        "posterior": lambda t: d.q_posterior_mean_variance(a, b, t),
        "xstart_from_eps": lambda t: (d._predict_xstart_from_eps(a, t, b),),
        "xstart_from_xprev": lambda t: (d._predict_xstart_from_xprev(a, t, b),),
        "xstart_from_velocity": lambda t: (d._predict_xstart_from_velocity(a, t, b),),
        "eps_from_xstart": lambda t: (d._predict_eps_from_xstart(a, t, b),),
    }
    everywhere = t.view(*shape, *[1] * (4 - len(shape))).expand(size)
    for name, function in functions.items():
        by_timestep = [function(th.full((2,), i)) for i in range(9)]
        for i, got in enumerate(function(t)):
            stacked = th.stack([out[i] for out in by_timestep])
            want = stacked.gather(0, everywhere.remainder(9)[None])[0]
            assert got.shape == size and th.equal(got, want), name
    x_t = d.q_sample(a, t, noise=b)
    losses = d.training_losses(lambda x, t: x, a, t, noise=b)
    th.testing.assert_close(losses["mse"], ((b - x_t) ** 2).mean(dim=(1, 2, 3)))


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
def test_parametrisations_of_one_model_agree(var, timesteps):
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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_data_and_noise_from_the_velocity(schedule):
    """At every timestep: x_0 = sqrt(abar) x_t - sqrt(1 - abar) v, eps = sqrt(1 - abar) x_t + sqrt(abar) v."""
    d, t = make_diffusion(steps=1000, schedule=schedule, mean="VELOCITY"), th.arange(1000)
    x_start, eps = image_batch("x0", 1000, 3), tensor("eps", 1000, 3)
    x_t = d.q_sample(x_start, t, noise=eps)
    abar = th.tensor(d.alphas_cumprod)[:, None]
    velocity = (abar.sqrt() * eps - (1 - abar).sqrt() * x_start).float()
    th.testing.assert_close(d._predict_xstart_from_velocity(x_t, t, velocity), x_start, rtol=0, atol=1e-6)
    out = d.p_mean_variance(always(velocity), x_t, t, clip_denoised=False)
    th.testing.assert_close(out["pred_xstart"], x_start, rtol=0, atol=1e-6)
    got = d._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
    th.testing.assert_close(got, eps, rtol=0, atol=1e-4)  # 1 - abar is 4e-5 at t = 0
    th.testing.assert_close((1 - abar).sqrt() * x_t + abar.sqrt() * velocity, eps.double(), rtol=0, atol=1e-6)


def test_an_error_of_the_velocity_does_not_grow():
    """At the end of a cosine schedule one of the noise grows to 20,291 times in x_0."""
    x, t, growth = th.zeros(1, 1), th.tensor([999]), {}
    for mean in ("EPSILON", "VELOCITY"):
        d = make_diffusion(steps=1000, schedule="cosine", mean=mean)
        out = d.p_mean_variance(always(th.full((1, 1), 1e-3)), x, t, clip_denoised=False)
        growth[mean] = abs(out["pred_xstart"].item()) / 1e-3
    assert growth == pytest.approx({"EPSILON": 20291, "VELOCITY": 1}, rel=1e-3)


def test_the_velocity_where_no_signal_is_left():
    """A last beta of 1, as in a linear schedule of 20 steps: x_0 is -v."""
    d = make_diffusion(steps=20, mean="VELOCITY", var="LEARNED_RANGE", min_snr_gamma=5.0)
    assert d.alphas_cumprod[-1] == 0
    x_start = image_batch("x0", 2, 3)
    model = point_model(d, x_start)
    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        th.testing.assert_close(loop(model, (2, 3), device="cpu"), x_start, rtol=0, atol=1e-3)
    assert all(v.isfinite().all() for v in d.calc_bpd_loop(model, x_start).values())
    assert d.training_losses(model, x_start, th.tensor([18, 19]))["mse"].max() < 1e-10
    betas = np.append(np.linspace(1e-4, 0.02, 20)[:-1], 1.0)  # at which the root of DDIM's noise rounds to below 0
    d = type(d)(betas=betas, **{name: getattr(d, name) for name in ("model_mean_type", "model_var_type", "loss_type")})
    out = d.ddim_sample(point_model(d, x_start), th.randn(2, 3), th.tensor([19, 19]), eta=1.0)
    assert out["sample"].isfinite().all()


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


def test_shapes_that_the_original_refuses():
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([3, 9])
    xprev = make_diffusion(steps=30, mean="PREVIOUS_X")
    for call in (
        lambda: d.q_sample(x, t, noise=x[:1]),
        lambda: d.training_losses(ToyModel(), x, t, noise=x[:1]),
        lambda: d.q_posterior_mean_variance(x[:1], x, t),
        lambda: d.q_posterior_mean_variance(x, x[:1], t),
        lambda: d.p_mean_variance(ToyModel(), x, t, denoised_fn=lambda v: v[:1]),
        lambda: xprev.p_mean_variance(ToyModel(), x, t, denoised_fn=lambda v: v[:, :1]),
        lambda: d._predict_xstart_from_eps(x, t, x[:1]),
        lambda: d._predict_xstart_from_xprev(x, t, x[:, :1]),
        lambda: d._predict_xstart_from_velocity(x, t, x[:1]),
    ):
        with pytest.raises(ValueError, match=r"must have shape \([12], 3\), not"):
            call()


@pytest.mark.parametrize("output", [(th.zeros(2, 3),), SimpleNamespace(sample=th.zeros(2, 3))], ids=["tuple", "object"])
def test_a_model_that_returns_no_tensor(output):
    d = make_diffusion(steps=30)
    for call in (d.p_mean_variance, d.training_losses):
        with pytest.raises(TypeError, match=rf"tensor of shape \(2, 3\), not {type(output).__name__}$"):
            call(always(output), th.zeros(2, 3), th.tensor([3, 9]))


@pytest.mark.parametrize("rescale", [False, True])
def test_timesteps_that_the_model_sees(rescale):
    d, model = make_diffusion(steps=40, rescale=rescale), ToyModel()
    d.p_mean_variance(model, th.zeros(2, 3), th.tensor([3, 39]))
    d.training_losses(model, th.zeros(2, 3), th.tensor([3, 39]))
    assert model.seen == [[75.0, 975.0] if rescale else [3, 39]] * 2


@pytest.mark.parametrize("dtype", [th.bfloat16, th.float16], ids=str)
def test_a_learned_variance_of_half_precision_is_computed_in_float32(dtype):
    d, x, t = make_diffusion(steps=30, var="LEARNED_RANGE"), tensor("x", 2, 3, 4, 4), th.tensor([2, 20])
    output = tensor("out", 2, 6, 4, 4).to(dtype)
    got = d.p_mean_variance(lambda x, t: output, x, t)["log_variance"]
    low, high = (th.tensor(table)[t].view(-1, 1, 1, 1) for table in (d.posterior_log_variance_clipped, np.log(d.betas)))
    v = (output.chunk(2, dim=1)[1] + 1) / 2
    assert got.dtype == th.float32
    th.testing.assert_close(got.double(), v * high + (1 - v) * low, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- methods of a subclass


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


SMALL_HOOKS = ["_scale_timesteps", "_vb_terms_bpd", "_predict_xstart_from_eps", "_predict_eps_from_xstart"]


@pytest.mark.parametrize("hook", SMALL_HOOKS)
def test_overrides_of_small_methods_are_seen(hook):
    class Own(GaussianDiffusion):
        pass

    setattr(Own, hook, lambda self, *args, **kwargs: 1 / 0)
    kwargs = dict(model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.KL)
    d, x, t = Own(betas=get_named_beta_schedule("cosine", 7), **kwargs), th.zeros(2, 3), th.tensor([0, 6])
    with pytest.raises(ZeroDivisionError):
        (d.ddim_sample if hook == "_predict_eps_from_xstart" else d.training_losses)(ToyModel(), x, t)


@pytest.mark.parametrize("respacing", [None, "10"])
def test_each_step_compiles_to_one_graph(respacing):
    if th.__version__.startswith("2.6") and respacing:
        pytest.skip("torch 2.6 cannot trace isinstance() of a nested function, as SpacedDiffusion asks of a model")
    d, x, eps = make_diffusion(steps=30, **EPS_RANGE, respacing=respacing), tensor("x", 2, 3), tensor("eps", 2, 3)
    t, w = th.tensor([0, 9]), th.tensor(0.5, requires_grad=True)

    def model(x, t):
        return th.cat([w * x, t.view(-1, 1) * x], dim=1)

    def steps(x, t):
        loss = d.training_losses(model, x, t, noise=eps)["loss"]
        samples = d.p_sample(model, x, t, noise_fn=lambda x: eps), d.ddim_sample(model, x, t, noise_fn=lambda x: eps)
        return d.q_sample(x, t, noise=eps), loss, *(out["sample"] for out in samples)

    compiled = th.compile(steps, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, want in zip(compiled(x, t), steps(x, t), strict=True):
            th.testing.assert_close(got, want)


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
    tables = d.sqrt_alphas_cumprod, d.sqrt_one_minus_alphas_cumprod
    signal, sigma = (th.tensor(table, dtype=th.float32)[t].view(4, 1, 1) for table in tables)
    target = {
        "EPSILON": eps,
        "START_X": x_start,
        "PREVIOUS_X": d.q_posterior_mean_variance(x_start, x_t, t)[0],
        "VELOCITY": signal * eps - sigma * x_start,
    }[mean]
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


@pytest.mark.parametrize("gamma", [0.5, 5.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_min_snr_weighs_the_error_of_x_0_whatever_is_predicted(schedule, gamma):
    """min(SNR, gamma) |x_0 - pred|^2: by min(SNR, gamma) / SNR of the noise's error, / (SNR + 1) of the velocity's."""
    x_start, eps, off = image_batch("x0", 12, 3), tensor("eps", 12, 3), tensor("off", 12, 3)
    t = th.linspace(0, 99, 12).long()
    for mean in MEANS:
        d = make_diffusion(100, schedule, mean=mean, min_snr_gamma=gamma)
        abar = th.tensor(d.alphas_cumprod)[t]
        snr = abar / (1 - abar)
        assert snr.min() < 0.1 and snr.max() > 10  # both sides of gamma
        clipped = snr.clamp(max=gamma)
        terms = d.training_losses(point_model(d, x_start + off), x_start, t, noise=eps)
        th.testing.assert_close(terms["loss"].double(), clipped * (off**2).mean(dim=1), rtol=2e-3, atol=1e-6)
        plain = make_diffusion(100, schedule, mean=mean)
        want = plain.training_losses(point_model(plain, x_start + off), x_start, t, noise=eps)
        assert th.equal(terms["mse"], want["mse"])  # without weights
        weights = {"EPSILON": clipped / snr, "START_X": clipped, "VELOCITY": clipped / (snr + 1)}
        if mean in weights:
            th.testing.assert_close(terms["loss"].double(), weights[mean] * terms["mse"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE"])
@pytest.mark.parametrize("mean", MEANS)
def test_min_snr_leaves_the_bound_of_the_hybrid_loss_its_weight(mean, loss):
    x_start, t, eps = image_batch("x0", 4, 2, 3), th.tensor([0, 1, 25, 49]), tensor("eps", 4, 2, 3)
    weighted, plain = (
        make_diffusion(50, mean=mean, var="LEARNED_RANGE", loss=loss, min_snr_gamma=gamma) for gamma in (2.0, None)
    )
    outputs = [(0.1 * tensor("output", 4, 4, 3)).requires_grad_() for _ in range(2)]
    got, want = (
        d.training_losses(always(output), x_start, t, noise=eps)
        for d, output in zip((weighted, plain), outputs, strict=True)
    )
    assert th.equal(got["vb"], want["vb"]) and th.equal(got["mse"], want["mse"])
    th.testing.assert_close(want["loss"], want["mse"] + want["vb"])
    assert not th.isclose(got["loss"], want["loss"]).all()
    for terms in (got, want):
        terms["loss"].sum().backward()
    grads = [output.grad.chunk(2, dim=1) for output in outputs]
    assert th.equal(grads[0][1], grads[1][1])  # of the variance
    assert not th.equal(grads[0][0], grads[1][0])


@pytest.mark.parametrize("mean", MEANS)
def test_min_snr_weighs_whole_samples(mean):
    """Samples do not share a weight; a timestep per element, which has none, is refused."""
    d = make_diffusion(100, "cosine", mean=mean, min_snr_gamma=5.0)
    x_start, eps, t = image_batch("x0", 2, 3, 4), tensor("eps", 2, 3, 4), th.tensor([3, 70])
    terms = d.training_losses(lambda x, t: th.zeros_like(x), x_start, t, noise=eps)
    weight = terms["loss"] / terms["mse"]
    assert weight.shape == (2,) and weight[0] != weight[1] and (weight > 0).all()
    with pytest.raises(ValueError, match=r"\bt\b.*\(2, 1, 4\)"):
        d.training_losses(lambda x, t: th.zeros_like(x), x_start, th.randint(100, (2, 1, 4)), noise=eps)


@pytest.mark.parametrize("loss", ["KL", "RESCALED_KL"])
def test_min_snr_of_a_bound(loss):
    with pytest.raises(InputError, match=rf"^min_snr_gamma 5\.0: .*{loss}"):
        make_diffusion(50, loss=loss, min_snr_gamma=5.0)


@pytest.mark.parametrize("gamma", [-1.0, 0, math.nan])
def test_a_gamma_that_is_not_above_0(gamma):
    with pytest.raises(InputError, match=f"min_snr_gamma {gamma}"):
        make_diffusion(50, min_snr_gamma=gamma)


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


def test_the_whole_bound_with_given_noise():
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


@pytest.mark.parametrize("mean", MEANS)
def test_the_errors_beside_the_bound_are_of_what_the_prediction_implies(mean):
    """An error e of x_0 is one of sqrt(SNR) e of the noise, whatever the model predicts."""
    d, x_start = make_diffusion(40, "cosine", mean=mean, var="FIXED_SMALL"), 0.5 * image_batch("x0", 2, 3)
    out = d.calc_bpd_loop(point_model(d, x_start + 0.1), x_start, clip_denoised=False)
    snr = th.tensor(d.alphas_cumprod / (1 - d.alphas_cumprod)).flip(0).expand(2, 40)
    th.testing.assert_close(out["xstart_mse"].double(), th.full_like(snr, 0.01), rtol=1e-2, atol=0)
    th.testing.assert_close(out["mse"].double(), 0.01 * snr, rtol=1e-2, atol=1e-9)


def test_names_the_original_offers():
    for name in ("betas_for_alpha_bar", "get_named_beta_schedule"):
        assert getattr(gd, name) is getattr(schedules, name)
