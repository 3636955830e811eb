"""The network: blocks, attention, both models in 1, 2 and 3 dimensions, half precision, recomputation."""

import io
import weakref

import pytest
import torch as th
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity_cases import UNETS, assert_recorded, fill_parameters, recorded_names, tensor

from improved_diffusion import unet
from improved_diffusion.unet import (
    AttentionBlock,
    Downsample,
    QKVAttention,
    ResBlock,
    SuperResModel,
    TimestepBlock,
    TimestepEmbedSequential,
    UNetModel,
    Upsample,
)

SMALL = dict(
    in_channels=2,
    model_channels=32,
    out_channels=3,
    num_res_blocks=1,
    attention_resolutions=(2,),
    channel_mult=(1, 2),
)
SIZES = {1: (16,), 2: (4, 8), 3: (2, 4, 4)}  # by dims
T2 = th.tensor([3, 900])


def small(cls=UNetModel, **kwargs):
    """A small model with every parameter filled, none zero as they are in the beginning."""
    return fill_parameters(cls(**(SMALL | kwargs))).eval()


def inputs(dims=2, superres=False):
    """Positional arguments of a small model of two samples."""
    x = tensor("x", 2, 2, *SIZES[dims])
    low = (tensor("low", 2, 2, *(n // 2 for n in SIZES[dims])),) if superres else ()
    return (x, T2, *low)


def gradients(model, *args, seed=0, **kwargs):
    """The output and all gradients of a training step."""
    th.manual_seed(seed)
    out = model(*args, **kwargs)
    out.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    return [out.detach(), *(p.grad for p in model.parameters())]


# ---------------------------------------------------------------- against the original


@pytest.mark.parametrize("i", range(len(UNETS)))
def test_networks_are_as_recorded(i):
    cls, kwargs, shape, t = UNETS[i]
    model = fill_parameters(getattr(unet, cls)(**kwargs), seed=i).eval()
    assert sorted(f"{k} {tuple(v.shape)}" for k, v in model.state_dict().items()) == recorded_names(f"unet/{i}/keys")
    # optimizer states and flat masters are indexed by this order
    assert [k for k, _ in model.named_parameters()] == recorded_names(f"unet/{i}/parameter_order")

    x, t, extra = tensor(f"unet_x{i}", *shape), th.tensor(t), {}
    if model.num_classes:
        extra["y"] = th.arange(len(t)) % model.num_classes
    if cls == "SuperResModel":
        extra["low_res"] = tensor(f"low{i}", 2, 3, 8, 8)
    out = model(x, t, **extra)
    assert_recorded(f"unet/{i}/out", out, rtol=2e-4)
    out.square().mean().backward()
    norms = [p.grad.norm().item() for _, p in sorted(model.named_parameters())]
    assert_recorded(f"unet/{i}/gradnorms", norms, rtol=2e-4)
    if cls == "UNetModel":
        with th.no_grad():
            f = model.get_feature_vectors(x, t, **extra)
        squares = [v.double().square().mean() for v in (*f["down"], f["middle"], *f["up"])]
        assert_recorded(f"unet/{i}/features", squares, rtol=2e-4)


@pytest.mark.parametrize(
    ("i", "kwargs"),
    [
        (
            0,
            dict(
                out_channels=6,
                attention_resolutions=(2, 4),
                channel_mult=(1, 2, 2, 2),
                num_heads=4,
                use_scale_shift_norm=True,
            ),
        ),
        (
            1,
            dict(out_channels=3, attention_resolutions=(4,), channel_mult=(1, 2, 3, 4), num_heads=4, num_classes=1000),
        ),
    ],
)
def test_seeded_initial_weights_are_as_recorded(i, kwargs):
    th.manual_seed(17)
    model = UNetModel(in_channels=3, model_channels=32, num_res_blocks=1, **kwargs)
    assert_recorded(f"seeded_init/{i}", [p.detach().double().sum() for p in model.parameters()])
    assert_recorded(f"seeded_init/{i}/next", th.rand(3))


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize("use_conv", [False, True])
@pytest.mark.parametrize(("dims", "up", "down"), [(1, (32,), (8,)), (2, (8, 16), (2, 4)), (3, (2, 8, 8), (2, 2, 2))])
def test_resampling_halves_and_doubles_but_leaves_the_first_of_three_axes(dims, use_conv, up, down):
    x = tensor("x", 2, 4, *SIZES[dims])
    upsample, downsample = (cls(4, use_conv, dims=dims) for cls in (Upsample, Downsample))
    assert upsample(x).shape == (2, 4, *up)
    assert downsample(x).shape == (2, 4, *down)
    if not use_conv:
        assert not [*upsample.parameters(), *downsample.parameters()]
        th.testing.assert_close(downsample(upsample(x)), x)  # the mean of repeated values


@pytest.mark.parametrize("cls", [Upsample, Downsample])
def test_resampling_other_channels_is_refused(cls):
    with pytest.raises(ValueError, match=r"4 channels.*\(2, 5, 8\)"):
        cls(4, False, dims=1)(th.zeros(2, 5, 8))


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_channels", [None, 32, 64])
def test_a_residual_block_begins_as_its_skip_connection(out_channels, scale_shift):
    block = ResBlock(32, 16, 0.0, out_channels=out_channels, use_scale_shift_norm=scale_shift)
    x, emb = tensor("x", 2, 32, 4, 4), tensor("emb", 2, 16)
    assert th.equal(block(x, emb), block.skip_connection(x))
    assert block.emb_layers[1].out_features == block.out_channels * (2 if scale_shift else 1)
    assert fill_parameters(block)(x, emb).shape == (2, out_channels or 32, 4, 4)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_residual_block_computes_what_the_paper_says(scale_shift):
    block = fill_parameters(ResBlock(32, 16, 0.0, out_channels=64, use_scale_shift_norm=scale_shift))
    x, emb = tensor("x", 2, 32, 4, 4), tensor("emb", 2, 16)
    norm1, _, conv1 = block.in_layers
    norm2, _, _, conv2 = block.out_layers
    h = conv1(F.silu(norm1(x)))
    e = block.emb_layers[1](F.silu(emb))[..., None, None]
    h = norm2(h) * (1 + e[:, :64]) + e[:, 64:] if scale_shift else norm2(h + e)
    want = block.skip_connection(x) + conv2(F.silu(h))
    th.testing.assert_close(block(x, emb), want, rtol=1e-4, atol=1e-5)
    assert (block(x, -emb) - want).abs().max() > 0.1


@pytest.mark.parametrize(("use_conv", "width"), [(False, 1), (True, 3)])
def test_skip_connections_where_the_channels_change(use_conv, width):
    block = ResBlock(32, 16, 0.0, out_channels=64, use_conv=use_conv)
    assert block.skip_connection.kernel_size == (width, width)
    assert block(th.zeros(2, 32, 4, 4), th.zeros(2, 16)).shape == (2, 64, 4, 4)
    assert isinstance(ResBlock(32, 16, 0.0, use_conv=use_conv).skip_connection, nn.Identity)


def test_a_sequence_gives_the_embedding_to_those_that_take_it():
    class Add(TimestepBlock):
        def forward(self, x, emb):
            return x + emb

    sequence = TimestepEmbedSequential(nn.Identity(), Add(), nn.ReLU(), Add())
    assert sequence(th.tensor([-3.0, 1.0]), th.tensor([1.0, 2.0])).tolist() == [1.0, 5.0]


# ---------------------------------------------------------------- attention


def reference_attention(qkv):
    """The original's: scores of q and k, each divided by the fourth root of C."""
    q, k, v = qkv.chunk(3, dim=1)
    scale = q.shape[1] ** -0.25
    weights = th.softmax(th.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
    return th.einsum("bts,bcs->bct", weights, v)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 20), st.floats(0.1, 20))
def test_attention_is_its_formula(n, channels, length, scale):
    qkv = tensor("qkv", n, 3 * channels, length, scale=scale)
    th.testing.assert_close(QKVAttention()(qkv), reference_attention(qkv), rtol=1e-3, atol=1e-3 * scale)


def test_attention_is_as_recorded():
    assert_recorded("qkv", QKVAttention()(tensor("qkv", 2, 16 * 3, 10)))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_share_out_the_channels_each_with_its_queries_keys_and_values(heads):
    block = fill_parameters(AttentionBlock(64, num_heads=heads))
    x = tensor("attn", 2, 64, 3, 4)
    flat = x.flatten(2)
    qkv = block.qkv(F.group_norm(flat, 32, block.norm.weight, block.norm.bias))
    h = th.cat([reference_attention(part) for part in qkv.chunk(heads, dim=1)], dim=1)
    want = (flat + block.proj_out(h)).view_as(x)
    th.testing.assert_close(block(x), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(5,), (3, 4), (2, 2, 3)], ids=str)
def test_attention_sees_positions_as_a_set(shape):
    block = fill_parameters(AttentionBlock(32, num_heads=2))
    x = tensor("x", 2, 32, *shape)
    order = th.randperm(x[0, 0].numel(), generator=th.Generator().manual_seed(0))

    def permute(v):
        return v.flatten(2)[..., order].view_as(v)

    th.testing.assert_close(block(permute(x)), permute(block(x)), rtol=1e-4, atol=1e-5)


def test_attention_begins_as_its_skip_connection():
    x = tensor("x", 2, 32, 5)
    assert th.equal(AttentionBlock(32)(x), x)


def test_heads_that_do_not_divide_the_channels():
    with pytest.raises(ValueError, match="3 attention heads do not divide 32 channels"):
        AttentionBlock(32, num_heads=3)


# ---------------------------------------------------------------- whole networks

VARIANTS = {
    "plain": {},
    "scale shift": dict(use_scale_shift_norm=True),
    "no convolutions between levels": dict(conv_resample=False),
    "wide first level": dict(channel_mult=(2, 1)),
    "fractional multiples": dict(channel_mult=(0.5, 1), model_channels=64),
    "one level": dict(channel_mult=(1,), attention_resolutions=(1,)),
    "attention nowhere": dict(attention_resolutions=()),
    "heads": dict(num_heads=4),
    "more heads on the way up": dict(num_heads=2, num_heads_upsample=8),
    "more blocks": dict(num_res_blocks=2, channel_mult=(1, 1, 1)),
}


@pytest.mark.parametrize(
    ("variant", "dims"),
    [(v, 2) for v in VARIANTS] + [(v, dims) for v in list(VARIANTS)[:3] for dims in (1, 3)],
)
def test_every_variant_runs_forward_and_backward(variant, dims):
    model = small(dims=dims, **VARIANTS[variant])
    out, *grads = gradients(model, *inputs(dims))
    assert out.shape == (2, 3, *SIZES[dims])
    assert all(v.isfinite().all() for v in (out, *grads))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_prediction_is_zero(variant):
    assert not UNetModel(**(SMALL | VARIANTS[variant]))(*inputs()).any()


def test_variants_differ_in_what_they_are_made_of():
    def layers(cls, **kwargs):
        return [m for m in UNetModel(**(SMALL | kwargs)).modules() if isinstance(m, cls)]

    assert [m.num_heads for m in layers(AttentionBlock, num_heads=2)] == [2] * 4  # down, middle, up twice
    assert [m.num_heads for m in layers(AttentionBlock, num_heads=2, num_heads_upsample=8)] == [2, 2, 8, 8]
    assert all(m.use_scale_shift_norm for m in layers(ResBlock, use_scale_shift_norm=True))
    assert {m.p for m in layers(nn.Dropout, dropout=0.3)} == {0.3}
    assert all(m.use_checkpoint for m in layers((ResBlock, AttentionBlock), use_checkpoint=True))
    convolutions = [f"{m.use_conv}" for m in layers((Upsample, Downsample), conv_resample=False)]
    assert convolutions == ["False", "False"]
    plain, pooled = (UNetModel(**(SMALL | dict(conv_resample=flag))).state_dict() for flag in (True, False))
    assert {k.split(".")[-2] for k in plain.keys() - pooled.keys()} == {"op", "conv"}
    assert not pooled.keys() - plain.keys()


def test_samples_do_not_mix_and_timesteps_may_be_fractional():
    model, (x, t) = small(), inputs()
    with th.no_grad():
        together = model(x, t)
        alone = th.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(2)])
        th.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        assert th.equal(together, model(x, t.float()))
        assert (together - model(x, t + 0.5)).abs().max() > 1e-3


def test_dropout_acts_in_training_only():
    model, args = small(dropout=0.5), inputs()
    with th.no_grad():
        assert th.equal(model(*args), model(*args))
        model.train()
        assert not th.equal(model(*args), model(*args))


@pytest.mark.parametrize("cls", [UNetModel, SuperResModel])
def test_labels_change_the_output(cls):
    model, args = small(cls, num_classes=5), inputs(superres=cls is SuperResModel)
    with th.no_grad():
        out, other = (model(*args, y=th.tensor(y)) for y in ([1, 4], [1, 3]))
    assert th.equal(out[0], other[0])
    assert (out[1] - other[1]).abs().max() > 1e-3


@pytest.mark.parametrize("call", ["forward", "get_feature_vectors"])
@pytest.mark.parametrize(
    ("num_classes", "y", "message"),
    [(None, [0, 1], "only to one"), (5, None, "class-conditional"), (5, [0], r"shape \(2,\)"), (5, [[0, 1]], "shape")],
)
def test_labels_that_do_not_fit(call, num_classes, y, message):
    model = small(num_classes=num_classes)
    with pytest.raises(ValueError, match=message):
        getattr(model, call)(*inputs(), y=None if y is None else th.tensor(y))


@pytest.mark.parametrize("cls", [UNetModel, SuperResModel])
def test_weights_go_through_a_file_strictly(cls):
    model, args = small(cls, num_classes=5), inputs(superres=cls is SuperResModel)
    file = io.BytesIO()
    th.save(model.state_dict(), file)
    file.seek(0)
    other = cls(**SMALL, num_classes=5).eval()
    other.load_state_dict(th.load(file, weights_only=True))
    y = th.tensor([0, 1])
    assert th.equal(model(*args, y=y), other(*args, y=y))


# ---------------------------------------------------------------- super-resolution


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_super_resolution_sees_the_enlarged_smaller_image(dims):
    model, (x, t, low) = small(SuperResModel, dims=dims), inputs(dims, superres=True)
    assert model.in_channels == 4
    out, *grads = gradients(model, x, t, low)
    assert out.shape == (2, 3, *SIZES[dims])
    assert all(g.isfinite().all() for g in grads)

    enlarged = F.interpolate(low, x.shape[2:], mode={1: "linear", 2: "bilinear", 3: "trilinear"}[dims])
    plain = small(dims=dims, in_channels=4)
    th.testing.assert_close(plain(th.cat([x, enlarged], dim=1), t), out)
    assert (model(x, t, low_res=low + 1) - out).abs().max() > 0.1


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 4)], ids=str)
def test_smaller_images_have_any_size(size):
    x, t = inputs()
    with th.no_grad():
        assert small(SuperResModel)(x, t, tensor("low", 2, 2, *size)).shape == (2, 3, *x.shape[2:])


@pytest.mark.parametrize("call", ["forward", "get_feature_vectors"])
def test_super_resolution_without_the_smaller_image(call):
    with pytest.raises(ValueError, match="low_res"):
        getattr(small(SuperResModel), call)(*inputs())


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("cls", [UNetModel, SuperResModel])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("half", [False, True])
@th.no_grad()
def test_feature_vectors_are_what_the_forward_pass_computes(cls, dims, half):
    model, args = small(cls, dims=dims), inputs(dims, superres=cls is SuperResModel)
    if half:
        model.convert_to_fp16()
    features = model.get_feature_vectors(*args)
    assert set(features) == {"down", "middle", "up"}
    assert len(features["down"]) == len(model.input_blocks) == len(features["up"]) == 4
    everything = [*features["down"], features["middle"], *features["up"]]
    assert all(v.dtype == th.float32 and v.isfinite().all() for v in everything)
    top, bottom = SIZES[dims], Downsample(2, False, dims=dims)(args[0]).shape[2:]
    assert [v.shape[1:] for v in everything] == [
        (32, *top), (32, *top), (32, *bottom), (64, *bottom),
        (64, *bottom),
        (64, *bottom), (64, *top), (32, *top), (32, *top),
    ]  # fmt: skip
    th.testing.assert_close(model.out(features["up"][-1]), model(*args), rtol=1e-5, atol=1e-6)


@th.no_grad()
def test_features_of_the_encoder_are_freed_once_the_decoder_has_used_them():
    model, features, alive = small(), [], []
    for block in model.input_blocks:
        block.register_forward_hook(lambda module, args, out: features.append(weakref.ref(out)))
    for block in model.output_blocks:
        block.register_forward_hook(lambda *_: alive.append(sum(f() is not None for f in features)))
    model(*inputs())
    assert alive == [3, 2, 1, 0]


@pytest.mark.parametrize("cls", [UNetModel, SuperResModel])
@th.no_grad()
def test_a_pickled_network_of_the_original_has_fewer_attributes(cls):
    model, args = small(cls), inputs(superres=cls is SuperResModel)
    want = model(*args)
    for name in set(vars(model)) & {"dims", "use_bf16"}:
        delattr(model, name)
    th.testing.assert_close(model(*args), want, rtol=0, atol=0)


def test_attention_counts_its_multiplications():
    module = QKVAttention()
    module.total_ops = th.zeros(1, dtype=th.float64)
    n, heads, c, length = 2, 4, 8, 5
    QKVAttention.count_flops(module, (None,), module(th.zeros(n * heads, 3 * c, length)))
    assert module.total_ops.item() == n * heads * 2 * length * length * c


# ---------------------------------------------------------------- recomputation and half precision


@pytest.mark.parametrize(("dims", "cls"), [(1, UNetModel), (2, UNetModel), (2, SuperResModel), (3, UNetModel)])
def test_recomputation_changes_no_gradient_even_with_dropout(cls, dims):
    args = inputs(dims, superres=cls is SuperResModel)
    plain, recomputing = (
        gradients(small(cls, dims=dims, dropout=0.4, use_checkpoint=flag).train(), *args) for flag in (False, True)
    )
    for got, want in zip(recomputing, plain, strict=True):
        assert th.equal(got, want)
    other = gradients(small(cls, dims=dims, dropout=0.4).train(), *args, seed=1)
    assert not th.equal(other[0], plain[0])  # the masks matter


def test_half_precision_is_that_of_the_torsos_convolutions():
    _, kwargs, *_ = UNETS[0]
    model = fill_parameters(UNetModel(**kwargs))
    assert model.inner_dtype == th.float32
    model.convert_to_fp16()
    assert model.inner_dtype == th.float16
    half = sorted(k for k, v in model.state_dict().items() if v.dtype == th.float16)
    assert half == recorded_names("fp16/half")
    assert {v.dtype for v in model.state_dict().values()} == {th.float16, th.float32}
    model.convert_to_fp32()
    assert model.inner_dtype == th.float32
    assert all(v.dtype == th.float32 for v in model.state_dict().values())


@pytest.mark.parametrize(
    ("dims", "cls", "recompute"),
    [
        (1, UNetModel, False),
        (2, UNetModel, False),
        (2, UNetModel, True),
        (2, SuperResModel, True),
        (3, SuperResModel, False),
    ],
)
def test_half_precision_is_near_full_precision(cls, dims, recompute):
    args = inputs(dims, superres=cls is SuperResModel)
    kwargs = dict(dims=dims, num_classes=5, use_scale_shift_norm=dims == 2, use_checkpoint=recompute)
    full, half = small(cls, **kwargs), small(cls, **kwargs)
    half.convert_to_fp16()
    (y, *grads), (y_half, *grads_half) = (gradients(model, *args, y=th.tensor([0, 1])) for model in (full, half))
    assert y_half.dtype == th.float32
    assert (y_half - y).norm() < 0.02 * y.norm()
    assert [g.dtype for g in grads_half] == [p.dtype for p in half.parameters()]
    grad, grad_half = (th.cat([g.float().flatten() for g in gs]) for gs in (grads, grads_half))
    assert (grad_half - grad).norm() < 0.02 * grad.norm()
