"""
The network: a U-Net of residual and attention blocks (the paper, section 3 and appendix A).

All of it works on 1, 2 or 3 spatial axes (`dims`). The names and the order of the
parameters are a file format: checkpoints, optimizer states and flat float32 masters are
indexed by them.
"""

import contextlib
from abc import abstractmethod

import torch as th
import torch.nn as nn
import torch.nn.functional as F

from .fp16_util import convert_module_to_f16, convert_module_to_f32
from .nn import SiLU, avg_pool_nd, checkpoint, conv_nd, linear, normalization, timestep_embedding, zero_module


class TimestepBlock(nn.Module):
    """A module whose forward() takes the timestep embedding as its second argument."""

    @abstractmethod
    def forward(self, x, emb):
        """
        :param x: [N, C, ...].
        :param emb: [N, E].
        """


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A sequence that gives the embedding to those of its children that take it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """
    Twice the size by nearest neighbour, then an optional 3-wide convolution. With three
    axes the first keeps its size.
    """

    def __init__(self, channels, use_conv, dims=2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        if use_conv:
            self.conv = conv_nd(dims, channels, channels, 3, padding=1)

    def forward(self, x):
        _check_channels(x, self.channels)
        factors = (1, 2, 2) if self.dims == 3 else (2,) * self.dims
        x = F.interpolate(x, [n * f for n, f in zip(x.shape[2:], factors, strict=True)], mode="nearest")
        return self.conv(x) if self.use_conv else x


class Downsample(nn.Module):
    """
    Half the size by a 3-wide convolution of stride 2, or by average pooling. With three
    axes the first keeps its size.
    """

    def __init__(self, channels, use_conv, dims=2):
        super().__init__()
        self.channels = channels
        self.use_conv = use_conv
        self.dims = dims
        stride = (1, 2, 2) if dims == 3 else 2
        if use_conv:
            self.op = conv_nd(dims, channels, channels, 3, stride=stride, padding=1)
        else:
            self.op = avg_pool_nd(dims, stride)

    def forward(self, x):
        _check_channels(x, self.channels)
        return self.op(x)


def _check_channels(x, channels):
    if x.shape[1] != channels:
        raise ValueError(f"expected {channels} channels, got input of shape {tuple(x.shape)}")


class ResBlock(TimestepBlock):
    """
    Two convolutions with the timestep embedding between them, and a skip connection.

    :param channels: input channels.
    :param emb_channels: width of the timestep embedding.
    :param dropout: probability, before the second convolution.
    :param out_channels: output channels, `channels` if None.
    :param use_conv: where the channels change, let the skip be a 3-wide convolution, not a 1-wide one.
    :param use_scale_shift_norm: the embedding scales and shifts the second normalisation
                                 (the paper, section 3.2) instead of being added before it.
    :param use_checkpoint: recompute the block in the backward pass.
    """

    def __init__(
        self,
        channels,
        emb_channels,
        dropout,
        out_channels=None,
        use_conv=False,
        use_scale_shift_norm=False,
        dims=2,
        use_checkpoint=False,
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
            normalization(channels),
            SiLU(),
            conv_nd(dims, channels, self.out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(
            SiLU(),
            linear(emb_channels, self.out_channels * (2 if use_scale_shift_norm else 1)),
        )
        self.out_layers = nn.Sequential(
            normalization(self.out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            # zero, so that the block begins as its skip connection
            zero_module(conv_nd(dims, self.out_channels, self.out_channels, 3, padding=1)),
        )
        if self.out_channels == channels:
            self.skip_connection = nn.Identity()
        elif use_conv:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 3, padding=1)
        else:
            self.skip_connection = conv_nd(dims, channels, self.out_channels, 1)

    def forward(self, x, emb):
        """
        :param x: [N, channels, ...].
        :param emb: [N, emb_channels].
        :return: [N, out_channels, ...].
        """
        return checkpoint(self._forward, (x, emb), self.parameters(), self.use_checkpoint)

    def _forward(self, x, emb):
        h = self.in_layers(x)  # (N, out_channels, ...)
        emb = self.emb_layers(emb).type(h.dtype)  # (N, out_channels), or twice that
        emb = emb.view(*emb.shape, *[1] * (h.dim() - 2))
        if self.use_scale_shift_norm:
            norm, *rest = self.out_layers
            scale, shift = emb.chunk(2, dim=1)
            h = norm(h) * (1 + scale) + shift
            for layer in rest:
                h = layer(h)
        else:
            h = self.out_layers(h + emb)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    """
    Self-attention among all positions, with a skip connection.

    :param channels: a multiple of num_heads.
    :param use_checkpoint: recompute the block in the backward pass.
    :raises ValueError: if the heads do not divide the channels.
    """

    def __init__(self, channels, num_heads=1, use_checkpoint=False):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide {channels} channels")
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint = use_checkpoint

        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, channels * 3, 1)
        self.attention = QKVAttention()
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))  # the block begins as its skip connection

    def forward(self, x):
        """[N, channels, ...] -> the same."""
        return checkpoint(self._forward, (x,), self.parameters(), self.use_checkpoint)

    def _forward(self, x):
        spatial = x.shape[2:]
        h = self.norm(x).flatten(2).transpose(1, 2)  # (N, L, C)
        # each position's channels side by side: a convolution one wide is a matrix product, and its heads are views
        qkv = F.linear(h, self.qkv.weight.squeeze(-1), self.qkv.bias)  # (N, L, 3C), head by head
        qkv = qkv.unflatten(2, (self.num_heads, -1)).permute(0, 2, 3, 1)  # (N, heads, 3C / heads, L)
        h = self.attention(qkv).permute(0, 3, 1, 2).flatten(2)  # (N, L, C)
        h = F.linear(h, self.proj_out.weight.squeeze(-1), self.proj_out.bias)
        return x + h.transpose(1, 2).unflatten(2, spatial)


class QKVAttention(nn.Module):
    """softmax(q^T k / sqrt(C)) over the positions, applied to v."""

    def forward(self, qkv):
        """
        :param qkv: [N, ..., 3C, L]: queries, keys and values.
        :return: [N, ..., C, L].
        """
        q, k, v = qkv.transpose(-2, -1).chunk(3, dim=-1)  # each (N, ..., L, C)
        return F.scaled_dot_product_attention(q, k, v).transpose(-2, -1)


class UNetModel(nn.Module):
    """
    The whole network: predicts noise (and variance) from a noisy input and its timestep.

    :param in_channels: channels of the input.
    :param model_channels: channels of the first level; channels everywhere are multiples of 32.
    :param out_channels: channels of the output, twice the input's to learn a variance.
    :param num_res_blocks: residual blocks a level on the way down; one more on the way up.
    :param attention_resolutions: downsampling rates at which attention follows each residual
        block: 4 means where the input is a quarter of its size.
    :param dropout: probability in the residual blocks.
    :param channel_mult: channels of each level as multiples of model_channels; each level but the
        first halves the size.
    :param conv_resample: resample by learned convolutions, not by pooling and repetition.
    :param dims: spatial axes, 1 to 3.
    :param num_classes: for a class-conditional model, the number of labels.
    :param use_checkpoint: recompute blocks in the backward pass, which saves memory.
    :param num_heads: attention heads.
    :param num_heads_upsample: the same on the way up, num_heads if -1.
    :param use_scale_shift_norm: see ResBlock.
    """

    def __init__(
        self,
        in_channels,
        model_channels,
        out_channels,
        num_res_blocks,
        attention_resolutions,
        dropout=0,
        channel_mult=(1, 2, 4, 8),
        conv_resample=True,
        dims=2,
        num_classes=None,
        use_checkpoint=False,
        num_heads=1,
        num_heads_upsample=-1,
        use_scale_shift_norm=False,
    ):
        super().__init__()
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
        self.use_bf16 = False

        emb_channels = model_channels * 4
        self.time_embed = nn.Sequential(
            linear(model_channels, emb_channels),
            SiLU(),
            linear(emb_channels, emb_channels),
        )
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        self._res_block_options = dict(
            emb_channels=emb_channels,
            dropout=dropout,
            use_scale_shift_norm=use_scale_shift_norm,
            dims=dims,
            use_checkpoint=use_checkpoint,
        )
        widths = [int(mult * model_channels) for mult in channel_mult]
        # checkpoints hold the parameters of optimizer and masters in the order in which blocks are made here
        self.input_blocks, skips = self._way_down(widths)
        ch = skips[-1]
        self.middle_block = TimestepEmbedSequential(
            self._res_block(ch, ch),
            AttentionBlock(ch, num_heads, use_checkpoint),
            self._res_block(ch, ch),
        )
        self.output_blocks = self._way_up(widths, skips)
        self.out = nn.Sequential(
            normalization(widths[0]),
            SiLU(),
            zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1)),  # the first prediction is zero
        )

    def _way_down(self, widths):
        """:return: the blocks, and the channels of what each of them gives, which the way up is joined with."""
        ch = self.model_channels
        blocks = [TimestepEmbedSequential(conv_nd(self.dims, self.in_channels, ch, 3, padding=1))]
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(self.num_res_blocks):
                blocks.append(TimestepEmbedSequential(*self._res_and_attention(level, ch, width, self.num_heads)))
                ch = width
                skips.append(ch)
            if level < len(widths) - 1:
                blocks.append(TimestepEmbedSequential(Downsample(ch, self.conv_resample, dims=self.dims)))
                skips.append(ch)
        return nn.ModuleList(blocks), skips

    def _way_up(self, widths, skips):
        ch = skips[-1]
        skips = list(skips)
        blocks = []
        for level, width in reversed(list(enumerate(widths))):
            for i in range(self.num_res_blocks + 1):
                layers = self._res_and_attention(level, ch + skips.pop(), width, self.num_heads_upsample)
                ch = width
                if level and i == self.num_res_blocks:
                    layers.append(Upsample(ch, self.conv_resample, dims=self.dims))
                blocks.append(TimestepEmbedSequential(*layers))
        return nn.ModuleList(blocks)

    def _res_and_attention(self, level, channels, out_channels, num_heads):
        layers = [self._res_block(channels, out_channels)]
        if 2**level in self.attention_resolutions:
            layers.append(AttentionBlock(out_channels, num_heads, self.use_checkpoint))
        return layers

    def _res_block(self, channels, out_channels):
        return ResBlock(channels, out_channels=out_channels, **self._res_block_options)

    def convert_to_fp16(self):
        """Compute the torso (all between the embeddings and the output layer) in float16."""
        for blocks in self._torso():
            blocks.apply(convert_module_to_f16)

    def convert_to_fp32(self):
        """Undo convert_to_fp16() and convert_to_bf16()."""
        self.use_bf16 = False
        for blocks in self._torso():
            blocks.apply(convert_module_to_f32)

    def convert_to_bf16(self):
        """Compute the torso under autocast to bfloat16. The weights stay float32."""
        self.use_bf16 = True

    def _torso(self):
        return self.input_blocks, self.middle_block, self.output_blocks

    @property
    def inner_dtype(self):
        """The dtype the torso computes in."""
        return next(self.input_blocks.parameters()).dtype

    def forward(self, x, timesteps, y=None):
        """
        :param x: [N, in_channels, ...], each size a multiple of 2^(levels - 1).
        :param timesteps: [N], may be fractional.
        :param y: [N] labels, for a class-conditional model and only for one.
        :return: [N, out_channels, ...].
        :raises ValueError: if y is missing, or given to a model without classes.
        """
        h = self._features(x, timesteps, y)["up"][-1].type(x.dtype)
        return self.out(h).contiguous()

    def get_feature_vectors(self, x, timesteps, y=None):
        """
        The hidden tensors of a forward pass, parameters as of forward().

        :return: a dict of "down" (a list, one a block), "middle" (a tensor) and "up" (a list),
                 in x's dtype.
        """
        features = self._features(x, timesteps, y)
        return {
            "down": [h.type(x.dtype).contiguous() for h in features["down"]],
            "middle": features["middle"].type(x.dtype).contiguous(),
            "up": [h.type(x.dtype).contiguous() for h in features["up"]],
        }

    def _features(self, x, timesteps, y):
        if (y is not None) != (self.num_classes is not None):
            raise ValueError("give labels y to a class-conditional model, and only to one")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels))  # (N, 4 * model_channels)
        if y is not None:
            if y.shape != x.shape[:1]:
                raise ValueError(f"y must have shape {tuple(x.shape[:1])}, one label a sample, not {tuple(y.shape)}")
            emb = emb + self.label_emb(y)

        h = x.type(self.inner_dtype)
        if h.device.type == "cpu" and self.dims == 2 and not th.is_grad_enabled():
            # a CPU's convolutions are quicker so; in training, GroupNorm's backward pass loses what they gain
            h = h.contiguous(memory_format=th.channels_last)
        down, up = [], []
        with th.autocast(x.device.type, th.bfloat16) if self.use_bf16 else contextlib.nullcontext():
            for block in self.input_blocks:
                h = block(h, emb)
                down.append(h)
            h = middle = self.middle_block(h, emb)
            for block, skip in zip(self.output_blocks, reversed(down), strict=True):
                h = block(th.cat([h, skip], dim=1), emb)
                up.append(h)
        return {"down": down, "middle": middle, "up": up}


class SuperResModel(UNetModel):
    """
    A network that sees a smaller version of its output beside the noisy input.

    :param in_channels: channels of the noisy input; the smaller image has as many.
    :param args, kwargs: the further parameters of UNetModel.
    """

    def __init__(self, in_channels, *args, **kwargs):
        super().__init__(in_channels * 2, *args, **kwargs)

    def forward(self, x, timesteps, low_res=None, **kwargs):
        """
        :param x: [N, in_channels, ...].
        :param low_res: [N, in_channels, ...] of any smaller size, enlarged (bi-, tri-)linearly to x's.
        :return: [N, out_channels, ...].
        """
        return super().forward(self._with_low_res(x, low_res), timesteps, **kwargs)

    def get_feature_vectors(self, x, timesteps, low_res=None, **kwargs):
        """See UNetModel; low_res as of forward()."""
        return super().get_feature_vectors(self._with_low_res(x, low_res), timesteps, **kwargs)

    def _with_low_res(self, x, low_res):
        if low_res is None:
            raise ValueError("a super-resolution model needs low_res, the smaller image")
        mode = ("linear", "bilinear", "trilinear")[self.dims - 1]
        return th.cat([x, F.interpolate(low_res, x.shape[2:], mode=mode)], dim=1)
