"""
Factories of models and diffusions, and their defaults.

The original's interface: defaults as dictionaries, derived from options.py, and one parameter per option.
"""

import argparse
import contextlib
import dataclasses
import inspect
import os
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from . import gaussian_diffusion as gd
from .networks import NETWORKS
from .option_groups import rows
from .options import (
    MAX_CHANNELS,
    MAX_PIXELS,
    MIN_LINEAR_STEPS,
    DiffusionOptions,
    ModelOptions,
    SuperResModelOptions,
)
from .respace import SpacedDiffusion, space_timesteps
from .unet import SuperResModel, UNetModel
from .utils.errors import InputError

NUM_CLASSES = 1000
MAX_LEVELS = MAX_PIXELS.bit_length()  # more cannot be halved

CHANNEL_MULT = {  # by image size: width of each level in num_channels
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}
# not options of the original: absent from its dictionaries
EXTRA = ("num_classes", "image_channels", "channel_mult", "network", "predict_v", "class_dropout")


# ---------------------------------------------------------------- defaults


def model_and_diffusion_defaults() -> dict[str, Any]:
    """The original's options of a model and its diffusion."""
    return _defaults(ModelOptions, DiffusionOptions)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """The original's options of a super-resolution model and its diffusion."""
    defaults = _defaults(SuperResModelOptions, DiffusionOptions)
    del defaults["sigma_small"]  # not an option of super-resolution in the original
    return defaults


def _defaults(*groups):
    return {row.name: row.default for group in groups for row in rows(group) if row.name not in EXTRA}


# ---------------------------------------------------------------- factories


def create_model_and_diffusion(
    image_size: int, class_cond: bool, learn_sigma: bool, sigma_small: bool, num_channels: int, num_res_blocks: int,
    num_heads: int, num_heads_upsample: int, attention_resolutions: str | Sequence[int], dropout: float,
    diffusion_steps: int, noise_schedule: str, timestep_respacing: str | int | Sequence[int], use_kl: bool,
    predict_xstart: bool, rescale_timesteps: bool, rescale_learned_sigmas: bool, use_checkpoint: bool,
    use_scale_shift_norm: bool, num_classes: int | None = None, image_channels: int = 3,
    channel_mult: str | Sequence[float] = "", network: str = "unet", predict_v: bool = False,
    loss_weighting: str = "uniform", min_snr_gamma: float = 5.0, class_dropout: float = 0.0,
) -> tuple[nn.Module, SpacedDiffusion]:  # fmt: skip
    """
    A model and its diffusion. Parameters as in create_model() and create_gaussian_diffusion().

    :raises InputError: (a ValueError) if an option is invalid; names it.
    """
    # the diffusion first: it is cheap, and so are its errors
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing, predict_v=predict_v,
        loss_weighting=loss_weighting, min_snr_gamma=min_snr_gamma,
    )  # fmt: skip
    model = create_model(
        image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
        num_heads, num_heads_upsample, use_scale_shift_norm, dropout, num_classes, image_channels, channel_mult,
        network, class_dropout,
    )  # fmt: skip
    return model, diffusion


def sr_create_model_and_diffusion(
    large_size: int, small_size: int, class_cond: bool, learn_sigma: bool, num_channels: int, num_res_blocks: int,
    num_heads: int, num_heads_upsample: int, attention_resolutions: str | Sequence[int], dropout: float,
    diffusion_steps: int, noise_schedule: str, timestep_respacing: str | int | Sequence[int], use_kl: bool,
    predict_xstart: bool, rescale_timesteps: bool, rescale_learned_sigmas: bool, use_checkpoint: bool,
    use_scale_shift_norm: bool, num_classes: int | None = None, image_channels: int = 3,
    channel_mult: str | Sequence[float] = "", sigma_small: bool = False, network: str = "unet",
    predict_v: bool = False, loss_weighting: str = "uniform", min_snr_gamma: float = 5.0, class_dropout: float = 0.0,
) -> tuple[nn.Module, SpacedDiffusion]:  # fmt: skip
    """A super-resolution model and its diffusion. Parameters as in create_model_and_diffusion()."""
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing, predict_v=predict_v,
        loss_weighting=loss_weighting, min_snr_gamma=min_snr_gamma,
    )  # fmt: skip
    model = sr_create_model(
        large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult, network, class_dropout,
    )  # fmt: skip
    return model, diffusion


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool, class_cond: bool, use_checkpoint: bool,
    attention_resolutions: str | Sequence[int], num_heads: int, num_heads_upsample: int, use_scale_shift_norm: bool,
    dropout: float, num_classes: int | None = None, image_channels: int = 3, channel_mult: str | Sequence[float] = "",
    network: str = "unet", class_dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """
    A network for images [N, image_channels, image_size, image_size].

    :param num_channels: width of the first level, a multiple of 32.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: feature map sizes with attention, such as "16,8".
    :param num_classes: number of labels, if class_cond; NUM_CLASSES if None.
    :param channel_mult: width of each level in num_channels, such as "1,2,2"; "" for that of the image size.
    :param network: a key of NETWORKS.
    :param class_dropout: probability in training that a label is replaced by null_label, a further row of label_emb.
    :raises InputError: (a ValueError) if sizes, widths and heads do not fit together.
    """
    return _create_network(
        0, network, "image_size", image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult, class_dropout,
    )  # fmt: skip


def sr_create_model(
    large_size: int, small_size: int, num_channels: int, num_res_blocks: int, learn_sigma: bool, class_cond: bool,
    use_checkpoint: bool, attention_resolutions: str | Sequence[int], num_heads: int, num_heads_upsample: int,
    use_scale_shift_norm: bool, dropout: float, num_classes: int | None = None, image_channels: int = 3,
    channel_mult: str | Sequence[float] = "", network: str = "unet", class_dropout: float = 0.0,
) -> nn.Module:  # fmt: skip
    """create_model() at large_size, with low-resolution images of any size as second input."""
    return _create_network(
        1, network, "large_size", large_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult, class_dropout,
    )  # fmt: skip


def _create_network(
    kind, network, size_name, size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
    num_classes, image_channels, channel_mult, class_dropout,
):  # fmt: skip
    if network not in NETWORKS:
        raise InputError(f"network {network}: give one of {', '.join(NETWORKS)}")
    if class_dropout and not class_cond:
        raise InputError(f"class_dropout {class_dropout}: needs class_cond True")
    mult = _channel_mult(size_name, size, channel_mult)
    resolutions = _numbers("attention_resolutions", attention_resolutions, int)
    levels = {level for level in range(len(mult)) if 2**level in [size // r for r in resolutions]}
    _check_shapes(size_name, size, num_channels, mult)
    # the middle block, at the last level, has attention too
    _check_heads("num_heads", num_heads, [num_channels * mult[level] for level in {*levels, len(mult) - 1}])
    if num_heads_upsample != -1:
        _check_heads("num_heads_upsample", num_heads_upsample, [num_channels * mult[level] for level in levels])
    if num_classes is None:
        num_classes = NUM_CLASSES  # not a default: client code assigns to it
    # looked up here, since forks replace script_util.UNetModel
    factory = (UNetModel, SuperResModel)[kind] if network == "unet" else NETWORKS[network][kind]
    if class_dropout and not takes(factory, "class_dropout"):
        raise InputError(f"network {network}: has no class_dropout; give class_dropout 0")
    return factory(
        in_channels=image_channels,
        model_channels=num_channels,
        out_channels=image_channels * (2 if learn_sigma else 1),
        num_res_blocks=num_res_blocks,
        attention_resolutions=tuple(size // r for r in resolutions),
        dropout=dropout,
        channel_mult=mult,
        num_classes=num_classes if class_cond else None,
        use_checkpoint=use_checkpoint,
        num_heads=num_heads,
        num_heads_upsample=num_heads_upsample,
        use_scale_shift_norm=use_scale_shift_norm,
        **({"class_dropout": class_dropout} if class_dropout else {}),  # other networks need not know it
    )


def takes(function: Any, name: str) -> bool:
    """Whether a function has a parameter of this name, or **kwargs."""
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _channel_mult(size_name, size, channel_mult):
    if channel_mult:
        values = _numbers("channel_mult", channel_mult, float)
        if len(values) > MAX_LEVELS:
            raise InputError(f"channel_mult has {len(values)} levels; give {MAX_LEVELS} or less")
        return values
    if size not in CHANNEL_MULT:
        sizes = ", ".join(map(str, CHANNEL_MULT))
        raise InputError(f"{size_name} {size} has no default channel_mult ({sizes} have); give one such as 1,2,2")
    return CHANNEL_MULT[size]


def _numbers(name, text, number):
    """Positive numbers, from text such as "1,2,2" or a sequence."""
    try:
        values = tuple(number(v) for v in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        values = ()
    if not values or not all(v > 0 for v in values):
        raise InputError(f"{name} {text!r}: give positive numbers separated by commas, such as 1,2,2")
    return values


def _check_shapes(size_name, size, num_channels, mult):
    text = ",".join(f"{m:g}" for m in mult)
    for width in [num_channels, *(num_channels * m for m in mult)]:
        problem = f"num_channels {num_channels} with channel_mult {text} gives a level of {width:g} channels"
        if width > MAX_CHANNELS:
            raise InputError(f"{problem}; give {MAX_CHANNELS} or less")
        if width % 32:
            raise InputError(f"{problem}, which GroupNorm's 32 groups do not divide; choose multiples of 32")
    halvings = len(mult) - 1
    if size < 1 or size % 2**halvings:
        problem = f"cannot be halved {halvings} times, as channel_mult {text} requires"
        raise InputError(f"{size_name} {size} {problem}; give a multiple of {2**halvings}")


def _check_heads(name, heads, widths):
    for width in widths:
        if heads < 1 or width % heads:
            raise InputError(f"{name} {heads} does not divide the {width:g} channels of a level with attention")


def create_gaussian_diffusion(
    *, steps: int = 1000, learn_sigma: bool = False, sigma_small: bool = False, noise_schedule: str = "linear",
    use_kl: bool = False, predict_xstart: bool = False, rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False, timestep_respacing: str | int | Sequence[int] = "",
    predict_v: bool = False, loss_weighting: str = "uniform", min_snr_gamma: float = 5.0,
) -> SpacedDiffusion:  # fmt: skip
    """
    A diffusion process, and what its model predicts and minimises.

    :param steps: timesteps of the whole process.
    :param learn_sigma: the model predicts variances too, between beta and the posterior's.
    :param sigma_small: fixed variances are the posterior's, not beta.
    :param noise_schedule: see get_named_beta_schedule().
    :param use_kl: minimise the variational bound instead of the mean squared error.
    :param predict_xstart: the model predicts x_0 instead of the noise.
    :param rescale_timesteps: the model receives timesteps in 0..1000.
    :param rescale_learned_sigmas: weight the bound in the hybrid loss by steps / 1000.
    :param timestep_respacing: see space_timesteps(); "" for all steps.
    :param predict_v: the model predicts the velocity, sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.
    :param loss_weighting: of the squared error by timestep, "uniform" or "min_snr".
    :param min_snr_gamma: of the latter, see GaussianDiffusion.
    :raises InputError: (a ValueError) if the schedule has no such number of steps, the respacing is invalid, or options
                        contradict each other.
    :raises NotImplementedError: if there is no such schedule.
    """
    if noise_schedule == "linear" and 1 < steps < MIN_LINEAR_STEPS:
        advice = f"give {MIN_LINEAR_STEPS + 1} or more, or noise_schedule cosine"
        raise InputError(f"diffusion_steps {steps}: the last beta of noise_schedule linear would exceed 1; {advice}")
    if predict_v and predict_xstart:
        raise InputError("predict_v True and predict_xstart True: choose one of them")
    if loss_weighting not in ("uniform", "min_snr"):
        raise InputError(f"loss_weighting {loss_weighting}: give uniform or min_snr")
    if loss_weighting == "min_snr" and use_kl:
        raise InputError("loss_weighting min_snr: weighs the squared error, which use_kl True replaces by the bound")
    if use_kl:
        loss_type = gd.LossType.RESCALED_KL
    elif rescale_learned_sigmas:
        loss_type = gd.LossType.RESCALED_MSE
    else:
        loss_type = gd.LossType.MSE
    if learn_sigma:
        model_var_type = gd.ModelVarType.LEARNED_RANGE
    elif sigma_small:
        model_var_type = gd.ModelVarType.FIXED_SMALL
    else:
        model_var_type = gd.ModelVarType.FIXED_LARGE
    if predict_xstart:
        model_mean_type = gd.ModelMeanType.START_X
    elif predict_v:
        model_mean_type = gd.ModelMeanType.VELOCITY
    else:
        model_mean_type = gd.ModelMeanType.EPSILON
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=model_mean_type,
        model_var_type=model_var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
        # omitted by default: a fork's SpacedDiffusion may not take it
        **({"min_snr_gamma": min_snr_gamma} if loss_weighting == "min_snr" else {}),
    )


def create_diffusion(options: DiffusionOptions, **changed) -> SpacedDiffusion:
    """A diffusion by its options. Keywords override them."""
    values = {**dataclasses.asdict(options), **changed}
    return create_gaussian_diffusion(steps=values.pop("diffusion_steps"), **values)


def configure_compute(model: Any, *, use_fp16: bool = False, use_bf16: bool = False, compile: bool = False) -> None:
    """
    Set the precision of a network and compile it, in place. Parameters keep their names.

    :param use_fp16: the torso in float16, parameters included. For sampling; TrainLoop converts by itself.
    :param use_bf16: the torso under autocast to bfloat16.
    :param compile: use torch.compile, at the first call with each batch shape.
    :raises InputError: for both precisions at once, or if there is no C++ compiler.
    """
    if use_fp16 and use_bf16:
        raise InputError("use_fp16 True and use_bf16 True: choose one of them")
    if use_fp16:
        model.convert_to_fp16()
    if use_bf16:
        model.convert_to_bf16()
    if compile:
        if os.name == "posix" and not shutil.which(os.environ.get("CXX", "g++")):
            raise InputError("compile True needs a C++ compiler: install g++, or set CXX to one")
        model.compile(dynamic=False)


# ---------------------------------------------------------------- flags


def add_dict_to_argparser(parser, default_dict: dict[str, Any]) -> None:
    """Add a flag for each key, of its default's type; str if the default is None."""
    readers = {bool: str2bool, int: whole_number, type(None): str}
    for name, value in default_dict.items():
        parser.add_argument(f"--{name}", default=value, type=readers.get(type(value), type(value)))


def args_to_dict(args, keys: Iterable[str]) -> dict[str, Any]:
    """The attributes of args named by keys."""
    return {key: getattr(args, key) for key in keys}


def whole_number(text: str) -> int:
    """
    Parse an int; 1e6 is one.

    :raises argparse.ArgumentTypeError: if text is not an integer.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if float(text).is_integer():
            return int(float(text))
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def str2bool(v: str | bool) -> bool:
    """
    Parse True or False, yes or no, t or f, 1 or 0, in any case.

    :raises argparse.ArgumentTypeError: if v is neither.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is neither True nor False")
