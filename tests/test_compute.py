"""
Networks that compute faster: bfloat16, float16, torch.compile. All of them near float32, with the same weights,
in training, sampling and likelihood.
"""

import functools

import harness
import numpy as np
import pytest
import torch as th
import torch._dynamo
from harness import TINY, build, flags, run_script, save_weights, write_images
from parity_cases import fill_parameters, tensor
from training import read_rows

from improved_diffusion.inference.generate import for_inference, pad_batches
from improved_diffusion.script_util import configure_compute
from improved_diffusion.unet import ResBlock
from improved_diffusion.utils.errors import InputError

pytestmark = pytest.mark.usefixtures("no_plot")
T = th.tensor([3, 20])
TWO_LEVELS = dict(TINY, channel_mult="1,2")  # so that networks change the size
SAMPLE = dict(TWO_LEVELS, image_size=8, num_samples=5, batch_size=2, timestep_respacing=3, seed=1)
TRAIN = dict(harness.TRAIN, channel_mult="1", attention_resolutions="8", max_steps=3, save_interval=10, seed=0)


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs have been compiled, by a backend that needs no compiler and computes as eager code does."""
    compile_ = th.nn.Module.compile
    monkeypatch.setattr(th.nn.Module, "compile", functools.partialmethod(compile_, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), count=9)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A model's whose layers all do something."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    th.manual_seed(0)
    return save_weights(path, noise=0.05, **TWO_LEVELS)


def network(**changed):
    model, _ = build(**{"image_size": 8, **TWO_LEVELS, **changed})
    return fill_parameters(model).eval()


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


# ---------------------------------------------------------------- the network


def test_by_default_nothing_changes():
    model = network()
    x = tensor("x", 2, 3, 8, 8)
    before = model(x, T)
    configure_compute(model)
    assert th.equal(model(x, T), before)


@pytest.mark.parametrize("recompute", [False, True])
def test_bfloat16_leaves_weights_gradients_and_output_in_float32(recompute):
    model = network(use_checkpoint=recompute)
    x = tensor("x", 2, 3, 8, 8)
    want = model(x, T)
    model.convert_to_bf16()
    got = model(x, T)
    got.square().mean().backward()
    assert {v.dtype for p in model.parameters() for v in (p, p.grad)} == {got.dtype} == {th.float32}
    assert 1e-4 < relative_error(got, want) < 0.05
    model.convert_to_fp32()
    assert th.equal(model(x, T), want)


def test_bfloat16_is_for_the_torso_alone():
    seen = {}
    model = network()
    model.convert_to_bf16()
    for name in ("time_embed", "middle_block", "out"):
        getattr(model, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.dtype}))
    model(tensor("x", 2, 3, 8, 8), T)
    assert seen == {"time_embed": th.float32, "middle_block": th.bfloat16, "out": th.float32}


def test_the_layout_of_inference_is_seen_by_nobody():
    model = network()
    x = tensor("x", 2, 3, 8, 8)
    want = model(x, T)
    with th.no_grad():
        got = model(x, T)
    assert got.is_contiguous()
    th.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with th.no_grad():
        features = model.get_feature_vectors(x, T)
    assert all(h.is_contiguous() for h in [*features["down"], features["middle"], *features["up"]])


def test_a_compiled_networks_weights_keep_their_names(graphs):
    model = network()
    names = list(model.state_dict())
    x = tensor("x", 2, 3, 8, 8)
    want = model(x, T)
    configure_compute(model, compile=True)
    th.testing.assert_close(model(x, T), want, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names and graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", [th.float32, th.bfloat16], ids=str)
def test_compiled_gradients_are_those_of_eager_code(precision):
    """At a size at which a reduction over a group's pixels has once gone wrong in silence, by the real compiler."""
    block = fill_parameters(ResBlock(128, 64, 0.0, use_scale_shift_norm=True))
    x, emb = tensor("x", 2, 128, 64, 64), tensor("emb", 2, 64)
    direction = tensor("direction", 2, 128, 64, 64)

    def gradients(function, autocast, layout=th.contiguous_format):
        block.zero_grad()
        inputs = x.clone(memory_format=layout).requires_grad_()
        with th.autocast("cpu", precision, enabled=autocast):
            out = function(inputs, emb)
        (out.float() * direction).sum().backward()
        return {
            "out": out.detach().float(),
            "x": inputs.grad,
            **{n: p.grad.clone() for n, p in block.named_parameters()},
        }

    exact = gradients(block, autocast=False)
    half = precision != th.float32
    eager = gradients(block, half, th.channels_last)  # in the other, 16 bits take some processors a minute
    compiled = gradients(th.compile(block, dynamic=False), half)
    for name, want in exact.items():
        # half precision is no further from float32 compiled than it is in eager code, but for rounding
        bound = 2 * relative_error(eager[name], want) + 1e-3 if half else 1e-4
        assert relative_error(compiled[name], want) < bound, name


def test_nothing_to_compile_with(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(InputError, match=r"^compile True needs a C\+\+ compiler: install g\+\+"):
        configure_compute(network(), compile=True)


# ---------------------------------------------------------------- batches of one shape


def recorded(seen):
    """A network that notes what it is called with."""

    def model(x, t, y):
        seen.append((tuple(x.shape), t.tolist(), y.tolist()))
        return x + (t + y).view(-1, 1)

    return model


@pytest.mark.parametrize("size", [1, 2, 5])
def test_batches_are_filled_up(size):
    seen = []
    full = pad_batches(recorded(seen), 5)
    for n in (5, size):
        x, t, y = tensor("x", n, 3), th.arange(n), 10 * th.arange(n)
        assert th.equal(full(x, t, y=y), x + (t + y).view(-1, 1))
    assert [shape for shape, *_ in seen] == [(5, 3)] * 2


@pytest.mark.parametrize("num_samples, sizes", [(2, [2]), (5, [5]), (7, [5, 5]), (13, [5, 5, 5])])
def test_few_samples_are_no_full_batch(num_samples, sizes):
    """What is compiled costs as much for one sample as for all that it is called with."""
    seen = []
    full = pad_batches(recorded(seen), 5)
    for numbers in th.arange(num_samples).split(5):
        x = tensor("x", len(numbers), 3)
        assert th.equal(full(x, numbers, y=numbers), x + 2 * numbers.view(-1, 1))
    assert [shape[0] for shape, *_ in seen] == sizes


def test_batches_that_grow():
    """Up to what was announced."""
    seen = []
    full = pad_batches(recorded(seen), 5)
    for size in (1, 3, 2, 5, 1):
        t = th.arange(size)
        assert len(full(tensor("x", size, 3), t, y=t)) == size
    assert [shape[0] for shape, *_ in seen] == [1, 3, 3, 5, 5]
    with pytest.raises(ValueError, match=r"6 .* 5"):
        full(tensor("x", 6, 3), th.arange(6), y=th.arange(6))


def test_for_inference():
    model = network().train()
    assert for_inference(model, batch_size=4) is model
    assert not model.training
    assert for_inference(network(), batch_size=4, use_fp16=True).inner_dtype == th.float16


# ---------------------------------------------------------------- the scripts


def run(name, folder, **words):
    assert run_script(name, flags(**words), folder) == 0


def samples(folder, weights, **changed):
    run("image_sample", folder, **SAMPLE, model_path=weights, **changed)
    with np.load(folder / "samples_5x8x8x3.npz") as arrays:
        return arrays["arr_0"].astype(int)


@pytest.mark.parametrize("changed", [dict(use_bf16=True), dict(use_fp16=True), dict(compile=True)], ids=str)
def test_samples(tmp_path, graphs, weights, changed):
    """Each precision draws nearly the same images; one graph is enough for all batches, the smaller one too."""
    want = samples(tmp_path / "float32", weights)
    got = samples(tmp_path / "other", weights, **changed)
    difference = np.abs(got - want)
    if "compile" in changed:
        assert difference.max() <= 1
    else:
        assert 0 < difference.mean() < 4
    assert graphs() == len(changed.keys() & {"compile"})


@pytest.mark.parametrize("changed", [dict(use_bf16=True), dict(use_fp16=True), dict(compile=True)], ids=str)
def test_likelihood(tmp_path, graphs, images, weights, changed):
    words = {**SAMPLE, "model_path": weights, "data_dir": images, "num_workers": 0}
    found = []
    for folder, flags_ in ((tmp_path / "float32", {}), (tmp_path / "other", changed)):
        run("image_nll", folder, **words, **flags_)
        found.append(np.load(folder / "vb_terms.npz")["arr_0"])
    assert found[1] == pytest.approx(found[0], rel=1e-4 if "compile" in changed else 0.05)
    assert graphs() == len(changed.keys() & {"compile"})


@pytest.mark.parametrize(
    "changed",
    [dict(microbatch=3, preview_samples=2), dict(use_bf16=True, use_checkpoint=True, dropout=0.2)],
    ids=str,
)
def test_compiled_training(tmp_path, graphs, images, changed):
    """The same losses and gradients, the same names, a graph for each shape of a microbatch."""
    saved, rows = [], []
    for compiled in (False, True):
        folder = tmp_path / str(compiled)
        run("image_train", folder, **{**TRAIN, "channel_mult": "1", **changed}, data_dir=images, compile=compiled)
        saved.append(th.load(folder / "model000003.pt"))
        rows.append([row[key] for row in read_rows(folder) for key in ("loss", "grad_norm")])
    eager, compiled = saved
    assert list(compiled) == list(eager)
    assert rows[1] == pytest.approx(rows[0], rel=0.05 if changed.get("use_bf16") else 1e-3)
    assert graphs() == (2 if "microbatch" in changed else 1)
    assert len(list((tmp_path / "True").glob("preview_*.png"))) == ("preview_samples" in changed)


def test_float16_and_bfloat16_at_once(tmp_path, capfd, images):
    assert run_script("image_train", flags(**TRAIN, data_dir=images, use_fp16=True, use_bf16=True), tmp_path) == 2
    assert capfd.readouterr().err == ("image_train.py: error: --use_fp16 True and use_bf16 True: choose one of them\n")
