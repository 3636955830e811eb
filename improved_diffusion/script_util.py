"""
Defaults and factories: how flags become a model and a diffusion.

The original's interface over options.py: defaults as dictionaries, and factories that take each option by its name.
"""

import argparse
import dataclasses
import os
import shutil
from collections.abc import Iterable
from typing import Any

from . import gaussian_diffusion as gd
from .options import DiffusionOptions, ModelOptions, SuperResModelOptions, rows
from .respace import SpacedDiffusion, space_timesteps
from .unet import SuperResModel, UNetModel
from .utils.errors import InputError

NUM_CLASSES = 1000
MIN_LINEAR_STEPS = 20  # the linear schedule ends at beta = 20 / steps, which is at most 1

CHANNEL_MULT = {  # by image size: channels of each level, as multiples of num_channels
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
    512: (0.5, 1, 1, 2, 2, 4, 4),
}


# options that the original does not have; the factories give them defaults
EXTRA = ("num_classes", "image_channels", "channel_mult")


# ---------------------------------------------------------------- defaults


def model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of an image model and its diffusion, as in the original."""
    return _defaults(ModelOptions, DiffusionOptions)


def sr_model_and_diffusion_defaults() -> dict[str, Any]:
    """Options of a super-resolution model and its diffusion, as in the original."""
    defaults = _defaults(SuperResModelOptions, DiffusionOptions)
    del defaults["sigma_small"]  # not an option of super-resolution in the original
    return defaults


def _defaults(*groups):
    return {row.name: row.default for group in groups for row in rows(group) if row.name not in EXTRA}


# ---------------------------------------------------------------- factories


def create_model_and_diffusion(
    image_size, class_cond, learn_sigma, sigma_small, num_channels, num_res_blocks, num_heads, num_heads_upsample,
    attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart,
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm, num_classes=None, image_channels=3,
    channel_mult="",
) -> tuple[UNetModel, SpacedDiffusion]:  # fmt: skip
    """
    The model and the diffusion of the options in model_and_diffusion_defaults().

    :raises InputError: (a ValueError) naming the option that is not valid.
    """
    # the diffusion first: its errors cost nothing
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing,
    )  # fmt: skip
    model = create_model(
        image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions,
        num_heads, num_heads_upsample, use_scale_shift_norm, dropout, num_classes, image_channels, channel_mult,
    )  # fmt: skip
    return model, diffusion


def sr_create_model_and_diffusion(
    large_size, small_size, class_cond, learn_sigma, num_channels, num_res_blocks, num_heads, num_heads_upsample,
    attention_resolutions, dropout, diffusion_steps, noise_schedule, timestep_respacing, use_kl, predict_xstart,
    rescale_timesteps, rescale_learned_sigmas, use_checkpoint, use_scale_shift_norm, num_classes=None, image_channels=3,
    channel_mult="", sigma_small=False,
) -> tuple[SuperResModel, SpacedDiffusion]:  # fmt: skip
    """create_model_and_diffusion() for the options in sr_model_and_diffusion_defaults()."""
    diffusion = create_gaussian_diffusion(
        steps=diffusion_steps, learn_sigma=learn_sigma, sigma_small=sigma_small, noise_schedule=noise_schedule,
        use_kl=use_kl, predict_xstart=predict_xstart, rescale_timesteps=rescale_timesteps,
        rescale_learned_sigmas=rescale_learned_sigmas, timestep_respacing=timestep_respacing,
    )  # fmt: skip
    model = sr_create_model(
        large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult,
    )  # fmt: skip
    return model, diffusion


def create_model(
    image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint, attention_resolutions, num_heads,
    num_heads_upsample, use_scale_shift_norm, dropout, num_classes=None, image_channels=3, channel_mult="",
) -> UNetModel:  # fmt: skip
    """
    :param attention_resolutions: image sizes with attention, text separated by commas.
    :param num_classes: number of labels, if class_cond; NUM_CLASSES if None.
    :param channel_mult: "" for the multipliers of the size, or text such as "1,2,2".
    :raises InputError: if sizes, channels and heads do not fit together.
    """
    return _create_unet(
        UNetModel, "image_size", image_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult,
    )  # fmt: skip


def sr_create_model(
    large_size, small_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout, num_classes=None,
    image_channels=3, channel_mult="",
) -> SuperResModel:  # fmt: skip
    """create_model() at large_size; the network takes low-resolution images of any size."""
    return _create_unet(
        SuperResModel, "large_size", large_size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
        attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
        num_classes, image_channels, channel_mult,
    )  # fmt: skip


def _create_unet(
    cls, size_name, size, num_channels, num_res_blocks, learn_sigma, class_cond, use_checkpoint,
    attention_resolutions, num_heads, num_heads_upsample, use_scale_shift_norm, dropout,
    num_classes, image_channels, channel_mult,
):  # fmt: skip
    mult = _channel_mult(size_name, size, channel_mult)
    resolutions = _numbers("attention_resolutions", attention_resolutions, int)
    levels = {level for level in range(len(mult)) if 2**level in [size // r for r in resolutions]}
    _check_shapes(size_name, size, num_channels, mult)
    # the middle block has attention too, at the last level
    _check_heads("num_heads", num_heads, [num_channels * mult[level] for level in {*levels, len(mult) - 1}])
    if num_heads_upsample != -1:
        _check_heads("num_heads_upsample", num_heads_upsample, [num_channels * mult[level] for level in levels])
    if num_classes is None:
        num_classes = NUM_CLASSES  # read late: scripts for the original assign to it
    return cls(
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
    )


def _channel_mult(size_name, size, channel_mult):
    if channel_mult:
        return _numbers("channel_mult", channel_mult, float)
    if size not in CHANNEL_MULT:
        raise InputError(
            f"{size_name} {size} has no default channel_mult (the sizes {', '.join(map(str, CHANNEL_MULT))} have one); "
            "give channel_mult, one multiplier per level, such as 1,2,2"
        )
    return CHANNEL_MULT[size]


def _numbers(name, text, number):
    """Text separated by commas, or a sequence, as a tuple of positive numbers."""
    try:
        values = tuple(number(v) for v in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        values = ()
    if not values or not all(v > 0 for v in values):
        raise InputError(f"{name} {text!r}: give positive numbers separated by commas, such as 1,2,2")
    return values


def _check_shapes(size_name, size, num_channels, mult):
    """:raises InputError: for what would fail, or silently go wrong, inside the network."""
    text = ",".join(f"{m:g}" for m in mult)
    for width in [num_channels, *(num_channels * m for m in mult)]:
        if width % 32:
            raise InputError(
                f"num_channels {num_channels} with channel_mult {text} gives a level {width:g} channels, which the "
                "32 groups of GroupNorm do not divide; choose multiples of 32"
            )
    halvings = len(mult) - 1
    if size < 1 or size % 2**halvings:
        raise InputError(
            f"{size_name} {size} cannot be halved {halvings} times, once a level after the first of channel_mult "
            f"{text}; choose a multiple of {2**halvings}"
        )


def _check_heads(name, heads, widths):
    for width in widths:
        if heads < 1 or width % heads:
            raise InputError(f"{name} {heads} does not divide the {width:g} channels of a level with attention")


def create_gaussian_diffusion(
    *, steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="",
):  # fmt: skip
    """
    :param steps: timesteps of the whole process.
    :param sigma_small: the smaller of the two fixed variances.
    :param use_kl: minimise the variational bound instead of the squared error.
    :param predict_xstart: the model predicts x_0 instead of the noise.
    :param rescale_timesteps: show the model timesteps as if there were 1000.
    :param rescale_learned_sigmas: weigh the bound inside the hybrid loss as if there were 1000 timesteps.
    :param timestep_respacing: see space_timesteps(); "" for all steps.
    :return: a SpacedDiffusion.
    :raises InputError: if the schedule or the respacing does not exist.
    """
    if noise_schedule == "linear" and 1 < steps < MIN_LINEAR_STEPS:
        raise InputError(
            f"diffusion_steps {steps} are too few for noise_schedule linear, whose last beta would be above 1; "
            f"give {MIN_LINEAR_STEPS} or more, or noise_schedule cosine"
        )
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
    return SpacedDiffusion(
        use_timesteps=space_timesteps(steps, timestep_respacing or [steps]),
        betas=gd.get_named_beta_schedule(noise_schedule, steps),
        model_mean_type=gd.ModelMeanType.START_X if predict_xstart else gd.ModelMeanType.EPSILON,
        model_var_type=model_var_type,
        loss_type=loss_type,
        rescale_timesteps=rescale_timesteps,
    )


def create_diffusion(options: DiffusionOptions, **changed) -> SpacedDiffusion:
    """
    The diffusion of its options.

    :param changed: options with other values.
    """
    values = {**dataclasses.asdict(options), **changed}
    return create_gaussian_diffusion(steps=values.pop("diffusion_steps"), **values)


def configure_compute(model, *, use_fp16=False, use_bf16=False, compile=False):
    """
    Let a network compute faster, with other rounding. Its weights and their names stay.

    :param use_fp16: its torso in float16, weights included. For sampling: TrainLoop does it itself.
    :param use_bf16: its torso under autocast to bfloat16.
    :param compile: by torch.compile, at the first call with each shape of a batch.
    :raises InputError: if there is nothing to compile with, or for two precisions at once.
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
    """Add a flag for each key, of its value's type; one whose value is None takes text."""
    readers = {bool: str2bool, int: whole_number, type(None): str}
    for name, value in default_dict.items():
        parser.add_argument(f"--{name}", default=value, type=readers.get(type(value), type(value)))


def args_to_dict(args, keys: Iterable[str]) -> dict[str, Any]:
    """The flags named by keys."""
    return {key: getattr(args, key) for key in keys}


def whole_number(text):
    """
    An int as it is typed, 1e6 too.

    :raises argparse.ArgumentTypeError: if it is none.
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        if float(text).is_integer():
            return int(float(text))
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")


def str2bool(v):
    """
    :raises argparse.ArgumentTypeError: if v is neither a bool nor a word for one.
    """
    if isinstance(v, bool):
        return v
    if v.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if v.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{v!r} is neither True nor False")
