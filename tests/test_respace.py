"""Which timesteps a shorter process keeps, and that it is the longer one there."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch as th
from diffusions import MEANS, always, diffusion_of
from hypothesis import assume, given
from hypothesis import strategies as st
from parity_cases import TABLES, ToyModel, assert_recorded, image_batch, make_diffusion, tensor, toy_model_for

from improved_diffusion import respace
from improved_diffusion.gaussian_diffusion import GaussianDiffusion, LossType, ModelMeanType, ModelVarType
from improved_diffusion.respace import SpacedDiffusion, space_timesteps, visiting
from improved_diffusion.script_util import create_gaussian_diffusion

VARS = [v.name for v in ModelVarType]
LOSS_TYPES = [v.name for v in LossType]


def diffusion_kwargs(betas, rescale=False):
    return dict(
        betas=betas,
        model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE,
        loss_type=LossType.MSE,
        rescale_timesteps=rescale,
    )


# ---------------------------------------------------------------- space_timesteps


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        (300, [10, 15, 20]),
        (1000, "250"),
        (1000, "ddim50"),
        (1000, "ddim250"),
        (4000, "ddim100"),
        (100, "10,10,20"),
        (10, [10]),
        (1000, [1]),
        (4000, "100"),
        (7, "2,3"),
    ],
    ids=str,
)
def test_spacing_is_as_recorded(steps, counts):
    assert_recorded(f"spacing/{steps}:{counts}", sorted(space_timesteps(steps, counts)), exact=True)


@st.composite
def sections(draw):
    """(steps, counts) that go together, by the rule that the first sections take what is left over."""
    counts = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5).filter(any))
    shortest = draw(st.integers(max(counts), 60))
    longer = draw(st.integers(0, len(counts) - 1))
    return shortest * len(counts) + longer, counts


@given(sections(), st.booleans())
def test_every_section_keeps_its_count_with_both_its_ends(steps_and_counts, as_text):
    steps, counts = steps_and_counts
    kept = sorted(space_timesteps(steps, ",".join(map(str, counts)) if as_text else counts))
    assert len(kept) == sum(counts)
    start = 0
    for i, count in enumerate(counts):
        end = start + steps // len(counts) + (i < steps % len(counts))
        inside = [t for t in kept if start <= t < end]
        assert len(inside) == count
        if count:
            assert inside[0] == start
        if count > 1:
            assert inside[-1] == end - 1
            gaps = np.diff(inside)
            assert gaps.max() - gaps.min() <= 1  # evenly
        start = end
    assert start == steps


@given(st.integers(1, 400), st.integers(1, 400) | st.integers(1, 20))
def test_ddim_keeps_n_steps_at_a_whole_stride_or_says_which_n_is_near(steps, n):
    assume(n <= steps)
    works = {len(range(0, steps, stride)) for stride in range(1, steps + 1)}
    if n in works:
        kept = sorted(space_timesteps(steps, f"ddim{n}"))
        assert len(kept) == n
        strides = [s for s in range(1, steps + 1) if len(range(0, steps, s)) == n]
        assert kept == list(range(0, steps, min(strides)))  # of several strides, the original's
        return
    with pytest.raises(ValueError, match=f"ddim{n}\\b.*{steps}") as error:
        space_timesteps(steps, f"ddim{n}")
    *_, named = re.findall(r"ddim(\d+)", str(error.value))
    assert abs(int(named) - n) == min(abs(m - n) for m in works)
    assert len(space_timesteps(steps, f"ddim{named}")) == int(named)


@given(st.integers(1, 400), st.integers(1, 400))
def test_nll_keeps_even_steps_and_the_first(steps, n):
    assume(n <= steps)
    assert space_timesteps(steps, f"nll{n}") == space_timesteps(steps, [n]) | set(range(steps // n))


def test_nll_as_in_the_paper():
    """Counted from 1: K even reals of [1, T], rounded, joined with {1, ..., T/K}."""
    kept = {t + 1 for t in space_timesteps(4000, "nll100")}
    even = np.linspace(1, 4000, 100)
    assert set(range(1, 41)) < kept and {1, 4000} < kept
    assert len(kept) == 100 + 40 - 1  # the first even one is 1, the second 41
    assert all(min(abs(t - even)) <= 0.5 + 1e-6 for t in kept - set(range(1, 41)))


@given(st.sets(st.integers(0, 50), min_size=1))
def test_explicit_timesteps_are_kept(steps):
    assert space_timesteps(51, "at:" + ",".join(map(str, sorted(steps)))) == steps


@pytest.mark.parametrize(
    ("steps", "counts", "message"),
    [
        (10, "11", "section 1 of 1.*10.*keep 11.*10"),
        (7, [2, 4], "section 2 of 2.*3.*keep 4.*3"),
        (10, "-1", "keep -1"),
        (10, [0], "no step"),
        (10, "0,0", "no step"),
        (10, "ten", "'ten'"),
        (10, "5,", "'5,'"),
        (10, "", "''"),
        (10, "ddim", "'ddim'"),
        (10, "ddim2.5", "'ddim2.5'"),
        (1000, "ddim999", "ddim999.*ddim1000"),
        (1000, "ddim300", "ddim300.*ddim334"),
        (10, "ddim11", "ddim11.*ddim10"),
        (10, "ddim0", "ddim0.*ddim1$"),
        (10, "nll", "'nll'"),
        (10, "nll2.5", "'nll2.5'"),
        (10, "nll0", "nll0: give nll1 to nll10$"),
        (10, "nll11", "nll11: give nll1 to nll10$"),
        (10, "at:", "'at:'"),
        (10, "at:0,,3", "'at:0,,3'"),
        (10, "at:0,2.5", "'at:0,2.5'"),
        (10, "at:0,3,3", "at:0,3,3: has 3 before 3; .*0 to 9"),
        (10, "at:0,5,3", "at:0,5,3: has 5 before 3; .*0 to 9"),
        (10, "at:0,10", "at:0,10: has 10 among 10 timesteps"),
        (10, "at:-1,5", "at:-1,5: has -1 among 10 timesteps"),
    ],
)
def test_spacing_that_cannot_be(steps, counts, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(steps, counts)


# ---------------------------------------------------------------- SpacedDiffusion


@given(st.data(), st.integers(1, 60))
def test_marginals_are_those_of_the_longer_process(data, steps):
    kept = data.draw(st.sets(st.integers(0, steps - 1), min_size=1))
    betas = np.linspace(0.001, 0.2, steps)
    long, short = GaussianDiffusion(**diffusion_kwargs(betas)), SpacedDiffusion(kept, **diffusion_kwargs(betas))
    np.testing.assert_allclose(short.alphas_cumprod, long.alphas_cumprod[sorted(kept)], rtol=1e-10)
    assert list(short.timestep_map) == sorted(kept)
    assert short.use_timesteps == kept
    assert (short.num_timesteps, short.original_num_steps) == (len(kept), steps)


@pytest.mark.parametrize("name", [name for name, config in TABLES.items() if "respacing" in config])
def test_timestep_map_is_as_recorded(name):
    d = make_diffusion(**TABLES[name])
    assert_recorded(f"timestep_map/{name}", d.timestep_map, exact=True)
    assert d.original_num_steps == TABLES[name]["steps"]


@pytest.mark.parametrize("var", VARS)
@pytest.mark.parametrize("rescale", [False, True])
def test_all_steps_kept_is_the_unspaced_process(var, rescale):
    x_start, t = image_batch("x0", 3, 2, 4), th.tensor([0, 10, 23])
    results = []
    for respacing in (None, [24]):
        config = dict(steps=24, var=var, rescale=rescale, respacing=respacing)
        d = make_diffusion(**config)
        model = toy_model_for(d)
        th.manual_seed(0)
        answers = [
            d.p_sample_loop(model, (3, 2, 4)),
            d.ddim_sample_loop(model, (3, 2, 4)),
            *d.calc_bpd_loop(model, x_start).values(),
        ]
        for loss in LOSS_TYPES:
            answers += make_diffusion(loss=loss, **config).training_losses(model, x_start, t).values()
        results.append([*answers, th.tensor(model.seen[0])])
    for got, want in zip(*results, strict=True):
        th.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", LOSS_TYPES)
@pytest.mark.parametrize(("rescale", "seen"), [(False, [0, 20, 39]), (True, [0.0, 500.0, 975.0])])
def test_the_model_sees_timesteps_of_the_longer_process(loss, rescale, seen):
    kept = [0, 7, 20, 39]
    d = SpacedDiffusion(
        kept, **(diffusion_kwargs(np.linspace(0.001, 0.2, 40), rescale) | dict(loss_type=LossType[loss]))
    )
    model, x, t = ToyModel(), th.zeros(3, 2), th.tensor([0, 2, 3])
    for step in (d.p_mean_variance, d.p_sample, d.ddim_sample, d.ddim_reverse_sample, d.training_losses):
        step(model, x, t)
    assert model.seen == [seen] * 5

    for loop in (d.p_sample_loop, d.ddim_sample_loop):
        model.seen.clear()
        loop(model, (1, 2))
        assert model.seen == [[t * 25.0 if rescale else t] for t in reversed(kept)]
    model.seen.clear()
    d.calc_bpd_loop(model, th.zeros(1, 2))
    assert model.seen == [[t * 25.0 if rescale else t] for t in reversed(kept)]


def test_gradients_reach_the_model_through_the_hybrid_loss():
    d = make_diffusion(steps=100, var="LEARNED_RANGE", loss="RESCALED_MSE", respacing="10")
    model = ToyModel(learned=True)
    d.training_losses(model, image_batch("x0", 2, 3, 4), th.tensor([1, 9]))["loss"].sum().backward()
    assert model.w.grad.isfinite().all() and model.w.grad.all()


def test_model_kwargs_reach_the_model():
    d = make_diffusion(steps=100, respacing="10")
    x, t = tensor("x", 2, 3), th.tensor([1, 9])
    plain, labelled = (
        d.p_mean_variance(ToyModel(), x, t, clip_denoised=False, model_kwargs=kwargs)["mean"]
        for kwargs in (None, dict(y=th.tensor([3, 4])))
    )
    assert not th.isclose(plain, labelled).any()


@pytest.mark.parametrize(
    "kept", [[5, 1, 5], {1, 5}, (np.int64(1), np.int64(5)), iter([1, 5])], ids=["list", "set", "tuple", "iterator"]
)
def test_kept_timesteps_come_in_any_form(kept):
    d = SpacedDiffusion(kept, **diffusion_kwargs(np.linspace(0.1, 0.2, 8)))
    assert list(d.timestep_map) == [1, 5]
    d.p_sample_loop(ToyModel(), (1, 2))


def test_another_timestep_map_may_be_assigned():
    d, model = SpacedDiffusion([0, 4], **diffusion_kwargs(np.linspace(0.1, 0.2, 8))), ToyModel()
    assert type(d.timestep_map) is list
    d.timestep_map = [2, 6]
    d.p_sample_loop(model, (1, 2))
    assert model.seen == [[6], [2]]


def test_a_timestep_map_may_be_changed_in_place():
    """Before a loop, between its steps, and below a model that is wrapped already."""
    d, model = SpacedDiffusion([0, 4, 5], **diffusion_kwargs(np.linspace(0.1, 0.2, 8))), ToyModel()
    wrapped, x = d._wrap_model(model), th.zeros(1, 2)

    def seen():
        model.seen.clear()
        d.p_sample_loop(model, (1, 2))
        for step in (d.p_mean_variance, d.training_losses):
            step(wrapped, x, th.tensor([1]))
        return model.seen

    assert seen() == [[5], [4], [0], [4], [4]]
    d.timestep_map[1] = 3
    assert seen() == [[5], [3], [0], [3], [3]]
    d.timestep_map.append(7)
    d.timestep_map.pop(0)
    assert seen() == [[7], [5], [3], [5], [5]]
    d.timestep_map.sort(reverse=True)
    assert seen() == [[3], [5], [7], [5], [5]]
    steps = d.p_sample_loop_progressive(model, (1, 2))
    model.seen.clear()
    next(steps)
    d.timestep_map[:] = [1, 2, 6]
    list(steps)
    assert model.seen == [[3], [2], [1]]


def test_copies_have_a_timestep_map_of_their_own():
    d, model = SpacedDiffusion([0, 4], **diffusion_kwargs(np.linspace(0.1, 0.2, 8))), ToyModel()
    d.p_sample_loop(model, (1, 2))
    for other in (copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        other.timestep_map[0] = 1
        for diffusion, want in ((d, [[4], [0]]), (other, [[4], [1]])):
            model.seen.clear()
            diffusion.p_sample_loop(model, (1, 2))
            assert model.seen == want


def test_a_model_wrapped_by_hand():
    """The timesteps in any form, as in the original."""
    for timesteps in ([2, 6], (2, 6), np.array([2, 6])):
        model = ToyModel()
        wrapped = respace._WrappedModel(model, timesteps, False, 8)
        wrapped(th.zeros(2, 3), th.tensor([1, 0]))
        wrapped(th.zeros(2, 3), th.tensor([0, -1], dtype=th.int32))
        assert model.seen == [[6, 2], [2, 6]]


def test_nothing_kept():
    with pytest.raises(ValueError, match="betas"):
        SpacedDiffusion([], **diffusion_kwargs([0.1, 0.2]))


def test_one_kept_step():
    d = SpacedDiffusion([3], **diffusion_kwargs(np.linspace(0.1, 0.2, 8)))
    assert d.p_sample_loop(ToyModel(), (2, 3)).isfinite().all()
    assert d.calc_bpd_loop(ToyModel(), th.zeros(2, 3))["total_bpd"].isfinite().all()


def test_timesteps_are_translated_on_the_models_device():
    class Scale(th.nn.PReLU):
        def forward(self, x, t):
            return self.weight * x * t.view(-1, 1)

    d = make_diffusion(steps=100, respacing="ddim10", rescale=True)
    sample = d.ddim_sample_loop(Scale(device="meta"), (2, 3))
    assert (sample.shape, sample.device.type) == ((2, 3), "meta")


def test_no_sections():
    with pytest.raises(ValueError, match="no sections"):
        space_timesteps(10, [])


@pytest.mark.parametrize(
    ("counts", "same"),
    [(np.array([2, 3]), "2,3"), ((2, 3), "2,3"), (6, "6"), (np.int64(6), "6"), (np.array([30]), "30")],
)
def test_counts_come_in_any_form(counts, same):
    assert space_timesteps(30, counts) == space_timesteps(30, same)


def test_a_respacing_of_the_factory_may_be_an_int():
    by_int, by_text = (create_gaussian_diffusion(steps=30, timestep_respacing=n) for n in (6, "6"))
    assert by_int.timestep_map == by_text.timestep_map == sorted(space_timesteps(30, [6]))


# ---------------------------------------------------------------- weights of the loss


@pytest.mark.parametrize("mean", MEANS)
def test_weights_of_the_loss_are_of_the_visited_timesteps(mean):
    """Whether the process is made with them or visits some of a longer one's."""
    kwargs = dict(steps=40, schedule="cosine", mean=mean, min_snr_gamma=5.0)
    spaced = make_diffusion(**kwargs, respacing="at:3,12,39")
    plain = diffusion_of(spaced.betas, mean, "FIXED_LARGE", min_snr_gamma=5.0)
    visited = visiting(make_diffusion(**kwargs, respacing="40"), [39, 12, 3])
    x, eps, output = (tensor(name, 3, 2) for name in ("x", "eps", "output"))
    losses = [d.training_losses(always(output), x, th.arange(3), noise=eps)["loss"] for d in (plain, spaced, visited)]
    th.testing.assert_close(losses[1], losses[0])
    th.testing.assert_close(losses[2], losses[0])


# ---------------------------------------------------------------- visiting


class Halved(SpacedDiffusion):
    """A subclass with a method of its own."""

    def p_mean_variance(self, *args, **kwargs):
        out = super().p_mean_variance(*args, **kwargs)
        return out | {"mean": out["mean"] / 2}


@pytest.mark.parametrize("cls", [SpacedDiffusion, Halved])
@pytest.mark.parametrize("rescale", [False, True])
def test_a_diffusion_that_visits_some_of_its_timesteps_is_one_made_for_them(cls, rescale):
    kwargs, x, t = diffusion_kwargs(np.linspace(0.001, 0.2, 40), rescale), tensor("x", 3, 2), th.tensor([0, 2, 1])
    whole, direct, model = cls(range(0, 40, 3), **kwargs), cls([3, 12, 39], **kwargs), ToyModel()
    short = visiting(whole, [39, 12, 3])
    for key in direct.p_mean_variance(model, x, t):
        outs = [d.p_mean_variance(model, x, t)[key] for d in (short, direct)]
        th.testing.assert_close(*outs, rtol=1e-5, atol=1e-6)
    assert model.seen[0] == model.seen[-1]
    assert short.use_timesteps == {3, 12, 39} and (short.num_timesteps, short.original_num_steps) == (3, 40)
    assert (whole.num_timesteps, len(whole.betas), len(whole.timestep_map)) == (14, 14, 14)  # is left as it is
    np.testing.assert_allclose(visiting(short, [39, 3]).betas, cls([3, 39], **kwargs).betas, rtol=1e-9)


@pytest.mark.parametrize("timesteps", [[], [3, 3], [3, 12], [12, 4], [42, 3], [12, -1]], ids=str)
def test_timesteps_that_cannot_be_visited(timesteps):
    d = SpacedDiffusion(range(0, 40, 3), **diffusion_kwargs(np.linspace(0.001, 0.2, 40)))
    with pytest.raises(ValueError, match=re.escape(str(timesteps))):
        visiting(d, timesteps)


def test_a_diffusion_without_a_timestep_map_visits_all():
    with pytest.raises(TypeError, match="SpacedDiffusion"):
        visiting(GaussianDiffusion(**diffusion_kwargs(np.linspace(0.001, 0.2, 40))), [39, 3])
