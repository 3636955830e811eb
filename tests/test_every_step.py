"""What holds for every step and loop of a diffusion: any shape will do, nothing is changed, nothing is waited for."""

import math

import pytest
import torch as th
from diffusions import LOSS_TYPES, MEANS, VARS, always, diffusion_of
from parity_cases import image_batch, make_diffusion, tensor, toy_model_for
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from improved_diffusion import logger
from improved_diffusion.resample import UniformSampler, create_named_schedule_sampler
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel

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
            for mean in MEANS:
                d = make_diffusion(30, mean=mean, var=var, respacing=respacing, min_snr_gamma=5.0)
                output = th.zeros(2, 4 if var.startswith("LEARNED") else 2, 4, 4, device=device)
                for step in (d.p_sample, d.ddim_sample, d.training_losses):
                    yield f"{step.__name__} {mean} {var} {respacing}", lambda f=step, o=output: f(always(o), x, t)
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


# ---------------------------------------------------------------- no value is read: shown without a GPU


@pytest.mark.parametrize("respacing", [None, "10"])
@pytest.mark.parametrize("var", VARS)
def test_no_step_reads_a_value(var, respacing):
    """A FakeTensor has a shape and no values: reading one raises."""
    for name, step in [entry for entry in steps_of_all_kinds("cpu") if f" {var} {respacing}" in entry[0]]:
        step()  # the tables are there already
        with FakeTensorMode(allow_non_fake_inputs=True):
            try:
                step()
            except Exception as e:
                raise AssertionError(name) from e


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_sampler_reads_a_value(name):
    """Neither when it is the first to use the tables, nor later; and no other tensor is left behind in them."""
    d = make_diffusion(steps=6, schedule="cosine", var="LEARNED_RANGE", respacing="4")
    with FakeTensorMode():
        x = th.randn(2, 3, 4)
        sample = SAMPLERS[name](d, lambda x, t: th.cat([x, x], dim=1), x)
        assert (sample.shape, type(sample)) == (x.shape, type(x))
    x = th.randn(2, 3, 4)
    assert SAMPLERS[name](d, lambda x, t: th.cat([x, x], dim=1), x).isfinite().all()


@pytest.mark.parametrize(
    ("process", "options"),
    [({}, {}), (dict(mean="VELOCITY", min_snr_gamma=5.0), dict(grad_clip=0.1, lr_warmup_steps=9, ema_warmup=True))],
    ids=["default", "all options"],
)
def test_no_step_of_training_reads_a_value(tmp_path, process, options):
    """Timesteps, losses, gradients, their norm, statistics, optimizer and average. Logs wait on purpose."""
    logger.configure(str(tmp_path), [])
    diffusion = make_diffusion(steps=8, schedule="cosine", var="LEARNED_RANGE", loss="RESCALED_MSE", **process)
    network = dict(in_channels=1, model_channels=32, out_channels=2, num_res_blocks=1, attention_resolutions=(1,))
    loop = TrainLoop(
        model=UNetModel(**network, channel_mult=(1,)),
        diffusion=diffusion,
        data=None,
        batch_size=4,
        microbatch=2,
        lr=1e-3,
        ema_rate="0.9",
        log_interval=10**9,
        save_interval=10**9,
        resume_checkpoint="",
        schedule_sampler=UniformSampler(diffusion),
        **options,
    )
    with FakeTensorMode(allow_non_fake_inputs=True):
        for loop.step in (1, 2):  # step 0 is logged
            loop.run_step(th.zeros(4, 1, 8, 8), {})
        for p in loop.model.parameters():
            with pytest.raises(DataDependentOutputException):
                p.grad.sum().item()


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


def test_steps_under_vmap():
    """Ensembles and gradients by sample, as torch.func makes them."""
    d, x, t = make_diffusion(steps=30), tensor("x", 2, 3), th.tensor([2, 20])
    noises = tensor("noises", 4, 2, 3)
    got = th.func.vmap(lambda noise: d.q_sample(x, t, noise=noise))(noises)
    assert th.equal(got, th.stack([d.q_sample(x, t, noise=noise) for noise in noises]))
    got = th.func.vmap(lambda eps: d.p_mean_variance(lambda x, t: eps, x, t)["mean"])(noises)
    assert th.equal(got, th.stack([d.p_mean_variance(lambda x, t, eps=eps: eps, x, t)["mean"] for eps in noises]))
