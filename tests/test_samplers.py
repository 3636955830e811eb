"""From noise to data: the table of samplers, whole chains, their steps, and DDIM there and back."""

import inspect
import math

import pytest
import torch as th
from diffusions import MEANS, VARS, always, diffusion_of, point_model
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_cases import LOOPS, ToyModel, assert_recorded, make_diffusion, tensor, toy_model_for

from improved_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from improved_diffusion.respace import space_timesteps
from improved_diffusion.samplers import SAMPLERS, SOLVERS

LOOP_NAMES = ["p_sample_loop", "ddim_sample_loop"]


# ---------------------------------------------------------------- the table


def test_samplers_have_one_signature():
    """What each takes beyond it has a default."""
    common = ["diffusion", "model", "x_T", "timesteps", "model_kwargs", "noise_fn", "clip_denoised", "denoised_fn"]
    for sampler in SAMPLERS.values():
        parameters = list(inspect.signature(sampler).parameters.values())
        assert [p.name for p in parameters][:9] == [*common, "callback"]
        assert all(p.kind == p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[3:])


@pytest.mark.parametrize(
    "kwargs",
    [{}, dict(clip_denoised=False), dict(denoised_fn=lambda x: x / 2)],
    ids=["plain", "unclipped", "denoised_fn"],
)
@pytest.mark.parametrize(
    ("name", "loop"), [("ancestral", "p_sample_loop"), ("ddim", "ddim_sample_loop")], ids=["ancestral", "ddim"]
)
def test_samplers_draw_what_the_loops_draw(name, loop, kwargs):
    d, shape, y = make_diffusion(30, var="LEARNED_RANGE", respacing="8"), (2, 3, 5), th.tensor([1, 4])
    eta = dict(eta=0.7) if name == "ddim" else {}
    for noise_fn in (None, lambda x: 0.5 * th.randn_like(x)):
        th.manual_seed(0)
        want = getattr(d, loop)(
            ToyModel(True), shape, noise_fn=noise_fn, model_kwargs=dict(y=y), device="cpu", **eta, **kwargs
        )
        th.manual_seed(0)
        x_T = (noise_fn or th.randn_like)(th.empty(shape))
        got = SAMPLERS[name](d, ToyModel(True), x_T, noise_fn=noise_fn, model_kwargs=dict(y=y), **eta, **kwargs)
        assert th.equal(got, want) and not got.requires_grad


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_at_chosen_timesteps(name):
    """As a process that was made for them."""
    x_T, model = tensor("x", 2, 3), ToyModel(True)
    config = dict(steps=40, schedule="cosine", var="LEARNED_RANGE", rescale=True)
    d = make_diffusion(**config, respacing="40")
    timesteps = sorted(space_timesteps(40, "3,4"), reverse=True)
    samples = []
    respaced = make_diffusion(**config, respacing="3,4")
    for args, kwargs in (
        (respaced, dict(timesteps=timesteps) if name in SOLVERS else {}),
        (d, dict(timesteps=timesteps)),
    ):
        th.manual_seed(0)
        samples.append(SAMPLERS[name](args, model, x_T, **kwargs))
    th.testing.assert_close(*samples)
    assert model.seen[:7] == model.seen[7:] == [[25.0 * t] * 2 for t in timesteps]


@pytest.mark.parametrize(
    "name, timesteps", [("ancestral", None), ("ddim", None), *((name, [29, 20, 9]) for name in SAMPLERS)], ids=str
)
def test_the_callback_sees_every_step(name, timesteps):
    seen, model = [], ToyModel()
    d = make_diffusion(30, respacing="2,3,3")
    sample = SAMPLERS[name](d, model, tensor("x", 2, 3), timesteps=timesteps, callback=seen.append)
    trained = timesteps or d.timestep_map[::-1]
    assert [(step["i"], step["t"]) for step in seen] == list(enumerate(trained))
    assert [t[0] for t in model.seen] == trained
    assert seen[-1]["sample"] is sample and not th.equal(seen[0]["sample"], sample)
    assert all(step["pred_xstart"].abs().max() <= 1 for step in seen)


@pytest.mark.parametrize("name", ["ancestral", "ddim"])
def test_samplers_call_the_steps_that_a_subclass_overrides(name):
    class Marked(GaussianDiffusion):
        def p_sample(self, *args, **kwargs):
            return super().p_sample(*args, **kwargs) | {"sample": th.full((2, 3), 7.0)}

        def ddim_sample(self, *args, **kwargs):
            return super().ddim_sample(*args, **kwargs) | {"sample": th.full((2, 3), 7.0)}

    d = Marked(
        betas=get_named_beta_schedule("cosine", 7),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.KL,
    )
    assert (SAMPLERS[name](d, ToyModel(), tensor("x", 2, 3)) == 7).all()


# ---------------------------------------------------------------- whole chains


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
def test_given_noise(loop, eta):
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
def test_given_noise_and_a_given_start(loop):
    d, start, calls = make_diffusion(12, "cosine"), tensor("start", 2, 3), []
    steps = list(
        getattr(d, loop + "_progressive")(
            ToyModel(), (2, 3), noise=start, noise_fn=lambda x: calls.append(x) or th.zeros_like(x)
        )
    )
    assert len(calls) == len(steps) == 12 and calls[0] is start


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


def test_loops_of_a_subclass_written_for_the_original():
    class Old(GaussianDiffusion):
        def p_sample_loop_progressive(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
            progress=False,
        ):  # fmt: skip
            yield {"sample": th.full(shape, 7.0)}

        def ddim_sample_loop_progressive(
            self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, model_kwargs=None, device=None,
            progress=False, eta=0.0,
        ):  # fmt: skip
            yield {"sample": th.full(shape, eta)}

    d = Old(
        betas=get_named_beta_schedule("cosine", 7),
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.KL,
    )
    assert (d.p_sample_loop(ToyModel(), (2, 3)) == 7).all()
    assert (d.ddim_sample_loop(ToyModel(), (2, 3), eta=0.5) == 0.5).all()


@pytest.mark.parametrize("loop", LOOP_NAMES)
def test_models_without_parameters(loop):
    """They have no device: it is the noise's, else torch's default."""

    class Scale(th.nn.Module):
        def forward(self, x, t):
            return 0.5 * x

    d, start = make_diffusion(steps=3, schedule="cosine"), th.zeros(2, 3, device="meta")
    for model in (Scale(), lambda x, t: 0.5 * x):
        assert getattr(d, loop)(model, (2, 3), noise=start).device.type == "meta"
        assert getattr(d, loop)(model, (2, 3)).device.type == "cpu"


@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
def test_noise_lies_in_memory_as_the_arithmetic_of_the_original_has_it(mean):
    """
    th.randn_like() fills memory in its order, so a seed's samples depend on the strides of each x_t: those of the
    first operand of each sum that has any. The chain written out below has the original's order of operands.
    """
    d, shape = make_diffusion(steps=6, schedule="cosine", mean=mean, var="FIXED_SMALL"), (2, 3, 4, 5)

    def model(x, t):
        return th.tanh(0.7 * x).contiguous(memory_format=th.channels_last)

    def table(name, i):
        return th.full(shape[:1], getattr(d, name)[i]).float().view(-1, 1, 1, 1).expand(shape)

    def chain(ddim):
        x = th.randn(shape)
        for i in reversed(range(6)):
            x_0 = model(x, None)
            if mean == "EPSILON":
                x_0 = table("sqrt_recip_alphas_cumprod", i) * x - table("sqrt_recipm1_alphas_cumprod", i) * x_0
            x_0 = x_0.clamp(-1, 1)
            if ddim:
                eps = (table("sqrt_recip_alphas_cumprod", i) * x - x_0) / table("sqrt_recipm1_alphas_cumprod", i)
                noise, abar_prev = th.randn_like(x), table("alphas_cumprod_prev", i)
                x = x_0 * abar_prev.sqrt() + (1 - abar_prev).sqrt() * eps + 0 * noise
            else:
                drift = table("posterior_mean_coef1", i) * x_0 + table("posterior_mean_coef2", i) * x
                std = (0.5 * table("posterior_log_variance_clipped", i)).exp()
                x = drift + (i > 0) * std * th.randn_like(x)
        return x

    for ddim, loop in enumerate(LOOP_NAMES):
        th.manual_seed(0)
        want = chain(ddim)
        th.manual_seed(0)
        got = getattr(d, loop)(model, shape)
        assert got.stride() == want.stride()
        th.testing.assert_close(got, want)


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


# ---------------------------------------------------------------- one step


def test_the_last_step_adds_no_noise():
    d, model = make_diffusion(steps=30), ToyModel()
    x, t = tensor("x", 2, 3), th.tensor([0, 5])
    sample = d.p_sample(model, x, t)["sample"]
    mean = d.p_mean_variance(model, x, t)["mean"]
    assert th.equal(sample[0], mean[0])
    assert not th.equal(sample[1], mean[1])


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


@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("var", VARS)
def test_gradients_go_through_a_step(mean, var):
    d, t = make_diffusion(steps=30, mean=mean, var=var), th.tensor([1, 9])
    x = tensor("x", 2, 2, 3).double().mul_(0.3).requires_grad_()
    model = always(tensor("output", 2, 4 if var.startswith("LEARNED") else 2, 3).double() * 0.3)
    for step, kwargs in ((d.p_sample, {}), (d.ddim_sample, {}), (d.ddim_sample, dict(eta=0.5))):
        kwargs["noise_fn"] = th.ones_like
        assert th.autograd.gradcheck(lambda v, s=step, k=kwargs: s(model, v, t, **k)["sample"], x)


# ---------------------------------------------------------------- DDIM


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


def test_what_a_subclass_gives_stays_as_it_is():
    eps = 5 * tensor("eps", 2, 3)
    before = eps.clone()
    d = make_diffusion(steps=30)
    d._predict_xstart_from_eps = lambda x_t, t, eps: eps
    d._predict_eps_from_xstart = lambda x_t, t, pred_xstart: eps
    d.ddim_sample(lambda x, t: eps, tensor("x", 2, 3), th.tensor([2, 20]))
    assert th.equal(eps, before)
