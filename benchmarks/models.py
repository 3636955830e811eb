"""The compared forms: one network with the same weights in each implementation and precision."""

import tempfile
from typing import NamedTuple

import torch as th
import torch.nn as nn
from plain import PlainLoop, PlainUNet

from improved_diffusion import logger
from improved_diffusion.script_util import configure_compute, create_model_and_diffusion, model_and_diffusion_defaults
from improved_diffusion.train_util import TrainLoop


class Variant(NamedTuple):
    label: str
    dtype: th.dtype = th.float32  # of the convolutions and matrix products
    compiled: bool = False
    cuda_only: bool = False


VARIANTS = {
    "plain": Variant("plain, float32"),
    "fp32": Variant("ours, float32"),
    "fp32_compiled": Variant("ours, float32, compiled", compiled=True),
    "bf16": Variant("ours, bfloat16", th.bfloat16),
    "bf16_compiled": Variant("ours, bfloat16, compiled", th.bfloat16, compiled=True),
    "fp16": Variant("ours, float16", th.float16, cuda_only=True),
    "diffusers": Variant("diffusers UNet2DModel, float32"),
}


class Setting(NamedTuple):
    """Size of the network and its batch."""

    image_size: int = 32
    num_channels: int = 64
    num_res_blocks: int = 2
    batch_size: int = 16

    def batch(self, device):
        """[N, 3, image_size, image_size] in [-1, 1]."""
        generator = th.Generator().manual_seed(0)
        size = (self.batch_size, 3, self.image_size, self.image_size)
        return (th.rand(size, generator=generator) * 2 - 1).to(device)


def build(setting, device, steps="", use_checkpoint=False):
    """
    The network of the setting with learned sigma and fixed weights, and its diffusion.

    :param steps: timestep_respacing; "" for all steps.
    """
    flags = model_and_diffusion_defaults()
    flags.update(setting._asdict(), learn_sigma=True, use_checkpoint=use_checkpoint, timestep_respacing=str(steps))
    del flags["batch_size"]
    th.manual_seed(0)
    model, diffusion = create_model_and_diffusion(**flags)
    for p in model.parameters():
        if not p.any():  # zero-initialised layers would switch blocks off
            nn.init.normal_(p, std=0.02)
    return model.to(device), diffusion


def network(name, setting, device, **kwargs):
    """The network of VARIANTS[name] and its diffusion; float16 is set by the callers."""
    variant = VARIANTS[name]
    model, diffusion = build(setting, device, **kwargs)
    if name == "plain":
        return PlainUNet(model), diffusion
    if name == "diffusers":
        return Diffusers(model, setting).to(device), diffusion
    configure_compute(model, use_bf16=variant.dtype == th.bfloat16, compile=variant.compiled)
    return model, diffusion


def sampling_network(name, setting, device, **kwargs):
    model, diffusion = network(name, setting, device, **kwargs)
    if VARIANTS[name].dtype == th.float16:
        model.convert_to_fp16()
    return model.eval(), diffusion


def training_step(name, setting, device, **kwargs):
    """:return: a function without arguments that runs one training step, and its loop."""
    model, diffusion = network(name, setting, device, **kwargs)
    batch = setting.batch(device)
    if name == "plain":
        loop = PlainLoop(model, diffusion)
    else:
        logger.configure(tempfile.gettempdir(), [])  # no log
        loop = TrainLoop(
            model=model,
            diffusion=diffusion,
            data=None,
            batch_size=setting.batch_size,
            microbatch=-1,
            lr=1e-4,
            ema_rate="0.9999",
            log_interval=10**9,
            save_interval=10**9,
            resume_checkpoint="",
            use_fp16=VARIANTS[name].dtype == th.float16,
        )
        loop.step = 1  # step 0 is logged
    return lambda: loop.run_step(batch, {}), loop


def diffusers_is_installed():
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return False
    return True


class Diffusers(nn.Module):
    """diffusers' network with the widths, levels and attention of a UNetModel."""

    def __init__(self, model, setting):
        from diffusers import UNet2DModel

        super().__init__()
        widths = [int(m * model.model_channels) for m in model.channel_mult]
        attends = [2**level in model.attention_resolutions for level in range(len(widths))]
        self.unet = UNet2DModel(
            sample_size=setting.image_size,
            in_channels=3,
            out_channels=model.out_channels,
            block_out_channels=widths,
            layers_per_block=model.num_res_blocks,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            attention_head_dim=widths[-1] // model.num_heads,
            resnet_time_scale_shift="scale_shift",
        )

    def forward(self, x, timesteps):
        return self.unet(x, timesteps).sample
