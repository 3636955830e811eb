"""Small layers, the timestep embedding, the moving average and recomputation."""

import copy

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import assert_recorded, tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from improved_diffusion import nn as ours
from improved_diffusion.nn import (
    CheckpointFunction,
    GroupNorm32,
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    linear,
    match_gradients,
    mean_flat,
    normalization,
    scale_module,
    timestep_embedding,
    update_ema,
    zero_module,
)

# ---------------------------------------------------------------- layers


def test_silu():
    x = tensor("silu", 50, scale=4)
    th.testing.assert_close(SiLU()(x), x * th.sigmoid(x))


@pytest.mark.parametrize(
    ("make", "layers"),
    [(conv_nd, (nn.Conv1d, nn.Conv2d, nn.Conv3d)), (avg_pool_nd, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d))],
)
def test_layers_by_dimension(make, layers):
    args = (4, 8, 3) if make is conv_nd else (2,)
    for dims, layer in enumerate(layers, start=1):
        assert type(make(dims, *args)) is layer
    for dims in (0, 4):
        with pytest.raises(ValueError, match=f"dims={dims}"):
            make(dims, *args)


def test_layers_pass_their_arguments_on():
    conv = conv_nd(2, 4, 8, 3, stride=2, padding=1, bias=False)
    assert (conv.stride, conv.padding, conv.bias) == ((2, 2), (1, 1), None)
    assert avg_pool_nd(3, (1, 2, 2)).kernel_size == (1, 2, 2)
    assert linear(6, 4, bias=False).weight.shape == (4, 6)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16, th.float32])
def test_group_norm_computes_in_float32_and_keeps_the_dtype(dtype):
    norm = normalization(64)
    assert isinstance(norm, GroupNorm32)
    assert (norm.num_groups, norm.num_channels) == (32, 64)
    x = (1000 + 300 * tensor("gn", 2, 64, 5, 5)).to(dtype)  # the squares are beyond float16
    y = norm(x)
    assert y.dtype == dtype
    want = F.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps)
    th.testing.assert_close(y, want.to(dtype), rtol=0 if dtype.itemsize > 2 else th.finfo(dtype).eps, atol=0)
    assert y.float().std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dtype", [th.float16, th.bfloat16])
def test_group_norm_keeps_no_float32_copy_for_the_backward_pass(dtype):
    x = tensor("gn", 2, 64, 5, 5).to(dtype).requires_grad_()
    kept = []
    with th.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.dtype, t.shape)) or t, lambda t: t):
        normalization(64)(x)
    assert [kind for kind, shape in kept if shape == x.shape] == [dtype]


def test_zero_and_scale_module_work_in_place():
    layer = linear(6, 4)
    before = copy.deepcopy(layer)
    assert scale_module(layer, 0.5) is layer
    assert th.equal(layer.weight, before.weight / 2)
    assert th.equal(layer.bias, before.bias / 2)
    assert zero_module(layer) is layer
    assert not any(p.any() for p in layer.parameters())
    assert all(p.requires_grad for p in layer.parameters())


@given(st.lists(st.integers(1, 4), min_size=2, max_size=5))
def test_mean_flat_keeps_the_first_axis_only(shape):
    x = th.arange(th.Size(shape).numel(), dtype=th.float64).reshape(shape)
    th.testing.assert_close(mean_flat(x), th.stack([sample.mean() for sample in x]))


# ---------------------------------------------------------------- timestep embedding


@pytest.mark.parametrize("dim", [32, 33, 128])
def test_embedding_is_as_recorded(dim):
    assert_recorded(f"embedding{dim}", timestep_embedding(th.tensor([0.0, 1.0, 17.5, 999.0]), dim))


def test_embedding_period_is_as_recorded():
    t = th.tensor([0.0, 1.0, 17.5, 999.0])
    assert_recorded("embedding_period", timestep_embedding(t, 16, max_period=500))


@given(st.lists(st.floats(0, 4000, width=32), min_size=1, max_size=5), st.integers(2, 70))
def test_embedding_is_points_on_circles(timesteps, dim):
    emb = timestep_embedding(th.tensor(timesteps), dim)
    half = dim // 2
    assert emb.dtype == th.float32
    assert emb.shape == (len(timesteps), dim)
    th.testing.assert_close(emb[:, :half] ** 2 + emb[:, half : 2 * half] ** 2, th.ones(len(timesteps), half))
    assert not emb[:, 2 * half :].any()  # the odd column


def test_embedding_of_zero_and_of_whole_numbers():
    emb = timestep_embedding(th.tensor([0]), 8)
    assert emb.tolist() == [[1.0] * 4 + [0.0] * 4]
    assert th.equal(timestep_embedding(th.tensor([7]), 32), timestep_embedding(th.tensor([7.0]), 32))
    assert th.equal(timestep_embedding(th.tensor([7.0], dtype=th.float64), 32), timestep_embedding(th.tensor([7]), 32))


def test_without_float64_the_frequencies_come_from_the_cpu(monkeypatch):
    t = th.tensor([0.0, 17.5, 999.0])
    want = timestep_embedding(t, 32)
    assert timestep_embedding(t.to("meta"), 32).device.type == "meta"
    monkeypatch.setattr(ours, "WITHOUT_FLOAT64", {"cpu", "meta"})
    assert th.equal(timestep_embedding(t, 32), want)
    assert timestep_embedding(t.to("meta"), 32).device.type == "meta"
    with FakeTensorMode() as mode:
        assert timestep_embedding(mode.from_tensor(t), 32).shape == (3, 32)
    compiled = th.compile(lambda t: timestep_embedding(t, 32), backend="eager", fullgraph=True)
    assert th.equal(compiled(t), want)


# ---------------------------------------------------------------- moving average


@given(st.floats(0, 1), st.integers(1, 5))
def test_ema_of_constant_weights_follows_its_closed_form(rate, updates):
    target, source = [th.zeros(3), th.ones(2, 2)], [th.full((3,), 4.0), th.full((2, 2), 5.0)]
    for _ in range(updates):
        update_ema(target, source, rate=rate)
    left = rate**updates
    th.testing.assert_close(target[0], th.full((3,), 4 * (1 - left)))
    th.testing.assert_close(target[1], th.full((2, 2), 5 - 4 * left))
    assert th.equal(source[0], th.full((3,), 4.0))


def test_ema_takes_iterators_and_parameters_and_has_a_default_rate():
    model = linear(3, 2)
    target = [th.zeros_like(p) for p in model.parameters()]
    update_ema(iter(target), model.parameters())
    for t, p in zip(target, model.parameters(), strict=True):
        th.testing.assert_close(t, 0.01 * p.detach())
        assert not t.requires_grad


def test_ema_of_parameters_that_want_gradients():
    target, source = linear(3, 2), linear(3, 2)
    want = 0.9 * target.weight.detach() + 0.1 * source.weight.detach()
    update_ema(target.parameters(), source.parameters(), rate=0.9)
    th.testing.assert_close(target.weight.detach(), want)
    assert target.weight.is_leaf and target.weight.requires_grad


def test_ema_of_nothing():
    update_ema([], [])


# ---------------------------------------------------------------- recomputation


def reentrant(func, inputs, params, flag):
    return CheckpointFunction.apply(func, len(inputs), *inputs, *params)


def run_block(flag, dropout=0.0, checkpoint=checkpoint):
    """(calls forward, calls in all, output and gradients) of a small block, seeded."""
    layer, calls = linear(6, 40), []
    with th.no_grad():
        for p in layer.parameters():
            p.copy_(tensor("checkpoint", *p.shape))

    def block(x, y):
        calls.append(1)
        return F.dropout(th.tanh(layer(x) + y), dropout)

    x, y = tensor("x", 5, 6).requires_grad_(), tensor("y", 5, 40).requires_grad_()
    th.manual_seed(0)
    out = checkpoint(block, (x, y), list(layer.parameters()), flag)
    forward_calls = len(calls)
    th.rand(3)  # something else draws before the backward pass
    out.square().sum().backward()
    return forward_calls, len(calls), [out.detach(), x.grad, y.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_recomputed_gradients_are_the_same_with_the_same_dropout_masks(dropout):
    *calls_without, without = run_block(False, dropout)
    *calls_with, with_flag = run_block(True, dropout)
    assert calls_without == [1, 1]
    assert calls_with == [1, 2]
    for got, want in zip(with_flag, without, strict=True):
        assert th.equal(got, want)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_the_reentrant_form_has_the_same_gradients(dropout):
    *_, want = run_block(False, dropout)
    *calls, got = run_block(True, dropout, checkpoint=reentrant)
    assert calls == [1, 2]
    for a, b in zip(got, want, strict=True):
        assert th.equal(a, b)


def test_recomputation_leaves_the_generator_where_it_was():
    def next_number(flag):
        run_block(flag, dropout=0.5)
        return th.rand(()).item()

    assert next_number(True) == next_number(False)


def test_gradients_reach_parameters_that_are_not_named():
    layer = linear(3, 3)
    checkpoint(layer, (th.ones(2, 3),), (), True).sum().backward()
    assert th.equal(layer.weight.grad, th.full((3, 3), 2.0))


def test_without_gradients_there_is_no_second_pass_to_prepare(monkeypatch):
    monkeypatch.setattr(th.utils.checkpoint, "checkpoint", None)
    with th.no_grad():
        out = checkpoint(lambda v: v * 2, (th.ones(2, requires_grad=True),), (), True)
    assert not out.requires_grad


# ---------------------------------------------------------------- gradients of any layout


FOREIGN = {
    "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
    "channels last": lambda g: g.contiguous(memory_format=th.channels_last),
    "contiguous": lambda g: g.contiguous(),
    "with gaps": lambda g: th.stack([g, g + 1], dim=-1)[..., 0],
    "repeated": lambda g: g[:1, :1, :1, :1].expand(g.shape),
}


@pytest.mark.parametrize("layout", [th.contiguous_format, th.channels_last], ids=str)
@pytest.mark.parametrize("foreign", FOREIGN.values(), ids=FOREIGN)
def test_gradients_of_any_layout_are_those_that_a_fused_optimizer_sees(layout, foreign):
    after = []
    for fused in (False, True):
        w = nn.Parameter(tensor("w", 4, 3, 2, 5).contiguous(memory_format=layout))
        unused = nn.Parameter(th.ones(2))
        opt = th.optim.AdamW([{"params": [unused]}, {"params": [w]}], lr=0.1, fused=fused)
        if fused:
            opt.register_step_pre_hook(match_gradients)
        for step in range(3):
            w.grad = foreign(tensor(f"gradient {step}", 4, 3, 2, 5))
            opt.step()
        assert unused.grad is None
        after.append(w.detach())
    th.testing.assert_close(after[1], after[0])
    assert w.grad.stride() == w.stride()


def test_gradients_of_autograd_stay_where_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 2))
    for layout in (th.contiguous_format, th.channels_last):
        net.to(memory_format=layout).zero_grad()
        net(th.ones(2, 3, 6, 6)).sum().backward()
        before = [p.grad for p in net.parameters()]
        match_gradients(th.optim.AdamW(net.parameters(), fused=True))
        assert all(p.grad is g for p, g in zip(net.parameters(), before, strict=True))
