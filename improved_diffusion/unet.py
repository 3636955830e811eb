"""
The network: a U-Net of residual and attention blocks (arXiv 2102.09672, section 3 and appendix A).

Blocks take 1, 2 or 3 spatial axes (`dims`). Names, shapes and registration order of the parameters are a file format:
checkpoints, optimizer states and flat fp16 masters are indexed by them.
"""

import contextlib
import math  # noqa: F401 (the original offers it by star import, as np)
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np  # noqa: F401
import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import (
    SiLU,
    avg_pool_nd,
    checkpoint,
    conv_nd,
    has_tangent,
    linear,
    normalization,
    timestep_embedding,
    zero_module,
)


class TimestepBlock(nn.Module):
    """A module whose forward() takes the timestep embedding as second argument."""

    @abstractmethod
    def forward(self, x, emb):
        """x: [N, C, ...], emb: [N, E]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """nn.Sequential that passes the timestep embedding to its TimestepBlocks."""

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2, then an optional 3x3 convolution. In 3-D the first axis keeps its size."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x: th.Tensor) -> th.Tensor:
        _check_channels(x, self.channels)
        factors = (1, 2, 2) if self.dims == 3 else (2,) * self.dims
        x = F.interpolate(x, [n * f for n, f in zip(x.shape[2:], factors, strict=True)], mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """Downsampling by 2, by a 3x3 convolution or average pooling. In 3-D the first axis keeps its size."""

    def __init__(self, channels: int, use_conv: bool, dims: int = 2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, stride)

    def forward(self, x: th.Tensor) -> th.Tensor:
        _check_channels(x, self.channels)
        return self.op(x)


def _check_channels(x, channels):
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels, got input of shape {tuple(x.shape)}")


class ResBlock(TimestepBlock):
    """Two convolutions, conditioned on the timestep embedding, with a skip connection."""

    def __init__(
        self,
        channels: int,  # of the input
        emb_channels: int,  # of the timestep embedding
        dropout: float,  # probability, before the second convolution
        out_channels: int | None = None,  # `channels` if None
        use_conv: bool = False,  # a 3x3, not a 1x1, convolution as skip connection if the channels change
        use_scale_shift_norm: bool = False,  # the embedding scales and shifts the second norm (section 3.2), not added
        dims: int = 2,
        use_checkpoint: bool = False,  # recompute activations in the backward pass
    ):
        super().__init__()
        self.channels = channels
        self.emb_channels = emb_channels
        self.dropout = dropout
        self.out_channels = out_channels or channels
        self.use_conv = use_conv
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint

        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, self.out_channels, 3, padding=1)
        )
        emb_outputs = self.out_channels * (2 if use_scale_shift_norm else 1)
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, emb_outputs))
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            # zero: each block is its skip connection at initialisation, which keeps deep networks stable
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        self.skip_connection: nn.Module
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x: th.Tensor, emb: th.Tensor) -> th.Tensor:
        """[N, channels, ...], [N, emb_channels] -> [N, out_channels, ...]."""
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    # fmt: off
    def _forward(self, x, emb):
        h = self.in_layers(x)                         # (N, out_channels, ...)
        emb = self.emb_layers(emb).type(h.dtype)      # (N, out_channels), twice as wide for scale and shift
        emb = emb.view(*emb.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            norm, *rest = self.out_layers
            scale, shift = emb.chunk(2, dim=1)        # (N, out_channels, 1...) each
            h = norm(h) * (1 + scale) + shift         # (N, out_channels, ...)
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + emb)              # (N, out_channels, ...)
        return self.skip_connection(x) + h            # (N, out_channels, ...)
    # fmt: on


class AttentionBlock(nn.Module):
    """
    Multi-head self-attention over all positions, with a skip connection.

    :param channels: a multiple of num_heads.
    :param use_checkpoint: recompute activations in the backward pass.
    :raises ValueError: if num_heads does not divide channels.
    """

    def __init__(self, channels: int, num_heads: int = 1, use_checkpoint: bool = False):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {channels} channels")
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint

        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))  # zero, as in ResBlock

    def forward(self, x: th.Tensor) -> th.Tensor:
        """[N, channels, ...] -> [N, channels, ...]."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    # fmt: off
    def _forward(self, x):
        n, c = x.shape[:2]
        qkv = self.qkv(self.norm(x).flatten(2))                                   # (N, 3C, L), head by head
        h = self.attention(qkv.reshape(n * self.num_heads, -1, qkv.shape[-1]))    # (N * heads, C / heads, L)
        h = self.proj_out(h.reshape(n, c, -1))                                    # (N, C, L)
        return x + h.unflatten(2, x.shape[2:])                                    # (N, C, ...)
    # fmt: on


class QKVAttention(nn.Module):
    """softmax(q^T k / sqrt(C)) v (Vaswani et al. 2017, arXiv 1706.03762, equation 1)."""

    def forward(self, qkv: th.Tensor) -> th.Tensor:
        """[N, 3C, L], queries, keys and values -> [N, C, L]."""
        q, k, v = qkv.transpose(1, 2).contiguous().chunk(3, dim=2)  # (N, L, C) each
        # Fused kernels have no forward-mode and no second derivatives. In training on a CPU they are no faster up to
        # 16x16 pixels.
        training = qkv.device.type == "cpu" and qkv.requires_grad
        if training or has_tangent(qkv) or th.jit.is_tracing():
            scale = q.shape[2] ** -0.25  # of both factors: float16 overflows later
            scores = (q * scale) @ (k * scale).transpose(1, 2)  # (N, L, L)
            weights = th.softmax(scores, dim=2, dtype=th.promote_types(scores.dtype, th.float32)).type(v.dtype)
            return (weights @ v).transpose(1, 2)
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)  # (N, 1, L, C): fused for 4 axes only
        return F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2)

    @staticmethod
    def count_flops(model, _x, y: th.Tensor) -> None:
        """Add the multiply-accumulates of both matrix products to model.total_ops; for thop's custom_ops."""
        model.total_ops += th.DoubleTensor([2 * y.numel() * y.shape[-1]])


class UNetModel(nn.Module):
    """
    Predicts noise, and variances if out_channels is twice in_channels, from x_t and t.

    Each level but the first halves the size. It has num_res_blocks residual blocks in the encoder and one more in the
    decoder, whose inputs are concatenated with the encoder's outputs.
    """

    use_bf16 = False
    class_dropout = 0.0  # of a model that was pickled whole by the original

    def __init__(
        self,
        in_channels: int,
        model_channels: int,  # the widths of all levels are multiples of 32
        out_channels: int,
        num_res_blocks: int,  # per level
        attention_resolutions: Sequence[int],  # downsampling factors with attention after each residual block
        dropout: float = 0,  # probability in residual blocks
        channel_mult: Sequence[float] = (1, 2, 4, 8),  # width of each level in model_channels
        conv_resample: bool = True,  # resample by learned convolutions
        dims: int = 2,  # spatial axes: 1, 2 or 3
        num_classes: int | None = None,  # of labels; None: unconditional
        use_checkpoint: bool = False,  # recompute activations in the backward pass
        num_heads: int = 1,
        num_heads_upsample: int = -1,  # in the decoder; -1: num_heads
        use_scale_shift_norm: bool = False,  # see ResBlock
        class_dropout: float = 0.0,  # probability in training that a label becomes null_label, num_classes
    ):
        super().__init__()
        if class_dropout and num_classes is None:
            raise ValueError(f"class_dropout {class_dropout} needs num_classes")
        if num_heads_upsample == -1:
            num_heads_upsample = num_heads
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.out_channels = out_channels
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.dropout = dropout
        self.channel_mult = channel_mult
        self.conv_resample = conv_resample
        self.dims = dims
        self.num_classes = num_classes
        self.use_checkpoint = use_checkpoint
        self.num_heads = num_heads
        self.num_heads_upsample = num_heads_upsample
        self.use_scale_shift_norm = use_scale_shift_norm
        self.class_dropout = class_dropout

        emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels), SiLU(), linear(emb_channels, emb_channels)
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes + (self.null_label is not None), emb_channels)

        widths = [int(mult * model_channels) for mult in channel_mult]
        self.input_blocks, skips = self._encoder(widths)
        ch = skips[-1]
        self.middle_block = TimestepEmbedSequential(
            self._res_block(ch, ch), AttentionBlock(ch, num_heads, use_checkpoint), self._res_block(ch, ch)
        )
        self.output_blocks = self._decoder(widths, skips)
        self.out = nn.Sequential(
            normalization(widths[0]),
            SiLU(),
            zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1)),  # zero: the first prediction is zero
        )

    def _encoder(self, widths):
        """Its blocks, and the channels of their outputs."""
        ch = self.model_channels
        blocks, skips = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, ch, 3, padding=1))], [ch]
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                blocks.append(TimestepEmbedSequential(*self._layers(level, ch, width, self.num_heads)))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                blocks.append(TimestepEmbedSequential(Downsample(ch, self.conv_resample, dims=self.dims)))
                skips.append(ch)
        return nn.ModuleList(blocks), skips

    def _decoder(self, widths, skips):
        """Its blocks, whose inputs are concatenated with the encoder's outputs, the last one first."""
        ch, blocks = skips[-1], []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                layers = self._layers(level, ch + skips.pop(), width, self.num_heads_upsample)
                ch = width
                if level and i == self.num_res_blocks:
                    layers.append(Upsample(ch, self.conv_resample, dims=self.dims))
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks)

    def _layers(self, level, channels, out_channels, num_heads):
        """A residual block, and attention if the level has it."""
        layers = [self._res_block(channels, out_channels)]
        if 2**level in self.attention_resolutions:
            layers.append(AttentionBlock(out_channels, num_heads, self.use_checkpoint))
        return layers

    def _res_block(self, channels, out_channels):
        return ResBlock(
            channels, 4 * self.model_channels, self.dropout, out_channels,
            use_scale_shift_norm=self.use_scale_shift_norm, dims=self.dims, use_checkpoint=self.use_checkpoint,
        )  # fmt: skip

    def convert_to_fp16(self) -> None:
        """Compute the torso, all between the embeddings and the output layer, in float16."""
        for blocks in self._torso():
            blocks.apply(convert_module_to_f16)

    def convert_to_fp32(self) -> None:
        """Undo convert_to_fp16() and convert_to_bf16()."""
        self.use_bf16 = False
        for blocks in self._torso():
            blocks.apply(convert_module_to_f32)

    def convert_to_bf16(self) -> None:
        """Compute the torso under autocast to bfloat16; the weights stay float32."""
        self.use_bf16 = True

    def _torso(self):
        return self.input_blocks, self.middle_block, self.output_blocks

    @property
    def inner_dtype(self) -> th.dtype:
        """The dtype of the torso."""
        return next(self.input_blocks.parameters()).dtype

    @property
    def null_label(self) -> int | None:
        """The label for no class, the last row of label_emb; None for a model without class_dropout."""
        return self.num_classes if self.class_dropout else None

    def forward(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: [N, in_channels, ...], each size a multiple of 2^(levels - 1).
        :param timesteps: [N], may be fractional.
        :param y: [N] labels, exactly if the model is class-conditional.
        :return: [N, out_channels, ...] of x's dtype, whatever the weights' is.
        :raises ValueError: if y is missing, unexpected or of another shape.
        """
        h = self._hidden(x, timesteps, y)
        return self.out(h.type(_dtype(self.out, x.dtype))).type(x.dtype).contiguous()

    def get_feature_vectors(self, x: th.Tensor, timesteps: th.Tensor, y: th.Tensor | None = None) -> dict:
        """
        The hidden tensors of a forward pass, in x's dtype. Parameters as in forward().

        :return: "down" and "up", lists with the output of each block of the encoder and the decoder; "middle".
        """
        found: dict[str, list] = {"down": [], "up": [], "middle": []}
        self._hidden(x, timesteps, y, lambda part, h: found[part].append(h.type(x.dtype).contiguous()))
        return {**found, "middle": found["middle"][0]}

    # fmt: off
    def _hidden(self, x, timesteps, y, record=lambda part, h: None):
        """The input of the output layer. Calls record() with the output of each block."""
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("give labels y to a class-conditional model, and only to one")
        emb = timestep_embedding(timesteps, self.model_channels)                   # (N, model_channels)
        emb = self.time_embed(emb.type(_dtype(self.time_embed, emb.dtype)))        # (N, 4 * model_channels)
        if y is not None:
            if y.shape != x.shape[:1]:
                raise ValueError(f"y must have shape {tuple(x.shape[:1])}, one label per sample, not {tuple(y.shape)}")
            if self.training and self.null_label is not None:
                dropped = th.rand(y.shape, device=y.device) < self.class_dropout   # (N,)
                y = th.where(dropped, self.null_label, y)
            emb = emb + self.label_emb(y)                                          # (N, 4 * model_channels)

        h = x.type(self.inner_dtype)                                               # (N, in_channels, ...)
        if h.device.type == "cpu" and h.dim() == 4 and not th.is_grad_enabled() and not th.jit.is_tracing():
            # faster CPU convolutions; in training the backward pass of GroupNorm is slower by as much
            h = h.movedim(1, -1).contiguous().movedim(-1, 1)  # channels_last, in a form that vmap() takes
        skips = []
        with th.autocast(x.device.type, th.bfloat16) if self.use_bf16 else contextlib.nullcontext():
            for block in self.input_blocks:
                h = block(h, emb)                                                  # (N, width of the level, ...)
                skips.append(h)
                record("down", h)
            h = self.middle_block(h, emb)                                          # (N, width of the last level, ...)
            record("middle", h)
            for block in self.output_blocks:
                h = block(th.cat([h, skips.pop()], dim=1), emb)                    # (N, width of the level, ...)
                record("up", h)
        return h                                                                   # (N, width of level 0, ...)
    # fmt: on


def _dtype(module, default):
    """The dtype of a module's weights, `default` if it has no floating-point ones, as after quantisation."""
    for p in module.parameters():  # torch 2.6 compiles no generator
        if p.is_floating_point():
            return p.dtype
    return default


class SuperResModel(UNetModel):
    """
    A U-Net with a low-resolution image as second input.

    :param in_channels: of x; low_res has the same number.
    :param args, kwargs: see UNetModel.
    """

    def __init__(self, in_channels: int, *args, **kwargs):
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor | None = None, **kwargs
    ) -> th.Tensor:
        """
        :param x: [N, in_channels, ...].
        :param low_res: [N, in_channels, ...] of any size, resized (bi-, tri-)linearly to x's.
        :return: [N, out_channels, ...].
        :raises ValueError: if low_res is missing.
        """
        return super().forward(self._with_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(  # type: ignore[override]
        self, x: th.Tensor, timesteps: th.Tensor, low_res: th.Tensor | None = None, **kwargs
    ) -> dict:
        """See UNetModel; low_res as in forward()."""
        return super().get_feature_vectors(self._with_low_res(x, low_res), timesteps, **kwargs)

    def _with_low_res(self, x, low_res):
        if low_res is None:
            raise ValueError("a super-resolution model needs low_res, the low-resolution image")
        mode = ("linear", "bilinear", "trilinear")[x.dim() - 3]
        return th.cat([x, F.interpolate(low_res, x.shape[2:], mode=mode)], dim=1)
