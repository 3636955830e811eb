"""
Defaults and factories: how flags become a model and a diffusion.

A flag is a key of a defaults dict; its type is that of its default. The dicts below hold the
original's flags, extra_model_defaults() those that came later.
"""

import argparse
import inspect
import os
import shutil

from . import gaussian_diffusion as gd
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


# ---------------------------------------------------------------- defaults


def model_and_diffusion_defaults():
    """Flags of a model of images and its diffusion."""
    return dict(image_size=64, sigma_small=False, **_shared_defaults())


def sr_model_and_diffusion_defaults():
    """Flags of a super-resolution model and its diffusion."""
    return dict(large_size=256, small_size=64, **_shared_defaults())


def _shared_defaults():
    return dict(
        num_channels=128,
        num_res_blocks=2,
        num_heads=4,
        num_heads_upsample=-1,
        attention_resolutions="16,8",
        dropout=0.0,
        learn_sigma=False,
        class_cond=False,
        diffusion_steps=1000,
        noise_schedule="linear",
        timestep_respacing="",
        use_kl=False,
        predict_xstart=False,
        rescale_timesteps=True,
        rescale_learned_sigmas=True,
        use_checkpoint=False,
        use_scale_shift_norm=True,
    )


def extra_model_defaults():
    """Flags that the factories take beyond the original's; these values change nothing."""
    return dict(num_classes=NUM_CLASSES, image_channels=3, channel_mult="")


def compute_defaults():
    """Flags of how the network computes, see configure_compute()."""
    return dict(use_fp16=False, use_bf16=False, compile=False)


def train_loop_defaults():
    """Flags that TrainLoop takes by the same names."""
    return dict(
        lr=1e-4,
        weight_decay=0.0,
        lr_anneal_steps=0,
        max_steps=0,
        batch_size=1,
        microbatch=-1,
        ema_rate="0.9999",
        log_interval=10,
        save_interval=10000,
        keep_checkpoints=0,
        resume_checkpoint="",
        use_fp16=False,
        fp16_scale_growth=1e-3,
    )


# ---------------------------------------------------------------- factories


def create_model_and_diffusion(
    image_size,
    class_cond,
    learn_sigma,
    sigma_small,
    num_channels,
    num_res_blocks,
    num_heads,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    num_classes=None,
    image_channels=3,
    channel_mult="",
):
    """
    Build what the flags of model_and_diffusion_defaults() and extra_model_defaults() describe.

    :return: (UNetModel, SpacedDiffusion).
    :raises InputError: (a ValueError) naming the flag that cannot work.
    """
    flags = locals()
    diffusion = create_diffusion(flags)  # first: its errors cost nothing
    return _call(create_model, flags), diffusion


def sr_create_model_and_diffusion(
    large_size,
    small_size,
    class_cond,
    learn_sigma,
    num_channels,
    num_res_blocks,
    num_heads,
    num_heads_upsample,
    attention_resolutions,
    dropout,
    diffusion_steps,
    noise_schedule,
    timestep_respacing,
    use_kl,
    predict_xstart,
    rescale_timesteps,
    rescale_learned_sigmas,
    use_checkpoint,
    use_scale_shift_norm,
    num_classes=None,
    image_channels=3,
    channel_mult="",
):
    """
    As create_model_and_diffusion(), for the flags of sr_model_and_diffusion_defaults().

    :return: (SuperResModel, SpacedDiffusion).
    """
    flags = locals()
    diffusion = create_diffusion(flags)
    return _call(sr_create_model, flags), diffusion


def _call(factory, flags, **renamed):
    """Call a factory with those of the flags that it takes."""
    names = inspect.signature(factory).parameters
    return factory(**{name: value for name, value in flags.items() if name in names}, **renamed)


def create_model(
    image_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    num_classes=None,
    image_channels=3,
    channel_mult="",
):
    """
    :param attention_resolutions: image sizes at which there is attention, a string with commas.
    :param num_classes: number of labels, if class_cond; NUM_CLASSES if None.
    :param channel_mult: "" for the one that belongs to the size, or a string such as "1,2,2".
    :return: a UNetModel.
    :raises InputError: if sizes, channels and heads do not go together.
    """
    return _create_unet(UNetModel, "image_size", locals())


def sr_create_model(
    large_size,
    small_size,
    num_channels,
    num_res_blocks,
    learn_sigma,
    class_cond,
    use_checkpoint,
    attention_resolutions,
    num_heads,
    num_heads_upsample,
    use_scale_shift_norm,
    dropout,
    num_classes=None,
    image_channels=3,
    channel_mult="",
):
    """
    As create_model(), at large_size; the network takes low-resolution images of any size.

    :return: a SuperResModel.
    """
    return _create_unet(SuperResModel, "large_size", locals())


def _create_unet(cls, size_flag, flags):
    mult = _channel_mult(size_flag, flags[size_flag], flags["channel_mult"])
    resolutions = _numbers("attention_resolutions", flags["attention_resolutions"], int)
    _check_shapes(size_flag, mult, resolutions, flags)
    return cls(
        in_channels=flags["image_channels"],
        model_channels=flags["num_channels"],
        out_channels=flags["image_channels"] * (2 if flags["learn_sigma"] else 1),
        num_res_blocks=flags["num_res_blocks"],
        attention_resolutions=tuple(flags[size_flag] // r for r in resolutions),
        dropout=flags["dropout"],
        channel_mult=mult,
        num_classes=_num_classes(flags["num_classes"]) if flags["class_cond"] else None,
        use_checkpoint=flags["use_checkpoint"],
        num_heads=flags["num_heads"],
        num_heads_upsample=flags["num_heads_upsample"],
        use_scale_shift_norm=flags["use_scale_shift_norm"],
    )


def _num_classes(num_classes):
    return NUM_CLASSES if num_classes is None else num_classes  # read late: scripts for the original assign to it


def _channel_mult(size_flag, size, channel_mult):
    if channel_mult:
        return _numbers("channel_mult", channel_mult, float)
    if size not in CHANNEL_MULT:
        raise InputError(
            f"{size_flag} {size} has no channel multipliers of its own (the sizes {', '.join(map(str, CHANNEL_MULT))} "
            "have); give channel_mult, one for each level, such as 1,2,2"
        )
    return CHANNEL_MULT[size]


def _numbers(flag, text, number):
    """A string with commas, or a sequence, as a tuple of positive numbers."""
    try:
        values = tuple(number(v) for v in (text.split(",") if isinstance(text, str) else text))
    except ValueError:
        values = ()
    if not values or not all(v > 0 for v in values):
        raise InputError(f"{flag} {text!r}: give positive numbers with commas between them, such as 1,2,2")
    return values


def _check_shapes(size_flag, mult, resolutions, flags):
    """:raises InputError: for what would fail, or silently go wrong, inside the network."""
    channels, size = flags["num_channels"], flags[size_flag]
    widths = [channels * m for m in mult]
    for width in [channels, *widths]:
        if width % 32:
            raise InputError(
                f"num_channels {channels} with channel_mult {_join(mult)} gives a level {width:g} channels, which the "
                "32 groups of GroupNorm do not divide; choose multiples of 32"
            )
    levels_with_attention = {level for level in range(len(mult)) if 2**level in [size // r for r in resolutions]}
    on_the_way_up = flags["num_heads_upsample"]
    for flag, levels in (
        ("num_heads", {*levels_with_attention, len(mult) - 1}),  # the last for the middle block
        ("num_heads" if on_the_way_up == -1 else "num_heads_upsample", levels_with_attention),
    ):
        for level in levels:
            if flags[flag] < 1 or widths[level] % flags[flag]:
                raise InputError(
                    f"{flag} {flags[flag]} does not divide the {widths[level]:g} channels it shall share out"
                )
    halvings = len(mult) - 1
    if size < 1 or size % 2**halvings:
        raise InputError(
            f"{size_flag} {size} cannot be halved {halvings} times, once a level after the first of channel_mult "
            f"{_join(mult)}; choose a multiple of {2**halvings}"
        )


def _join(values):
    return ",".join(f"{v:g}" for v in values)


def create_gaussian_diffusion(
    *,
    steps=1000,
    learn_sigma=False,
    sigma_small=False,
    noise_schedule="linear",
    use_kl=False,
    predict_xstart=False,
    rescale_timesteps=False,
    rescale_learned_sigmas=False,
    timestep_respacing="",
):
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


def create_diffusion(flags):
    """The SpacedDiffusion of the flags of a model and its diffusion, a dict; it may hold others."""
    return _call(create_gaussian_diffusion, flags, steps=flags["diffusion_steps"])


def configure_compute(model, *, use_fp16=False, use_bf16=False, compile=False):
    """
    Let a network compute faster, with other rounding. Its weights and their names stay.

    :param use_fp16: its torso in float16, weights included. For sampling: TrainLoop does it itself.
    :param use_bf16: its torso under autocast to bfloat16.
    :param compile: by torch.compile, when it is first called. Each shape of a batch is compiled anew.
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


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for each key, of its value's type; one whose value is None takes text."""
    for name, value in default_dict.items():
        parser.add_argument(f"--{name}", default=value, type=flag_type(value))


def flag_type(default):
    """What reads the text of a flag with such a default."""
    return {bool: str2bool, int: whole_number, type(None): str}.get(type(default), type(default))


def args_to_dict(args, keys):
    """The flags named by keys, as a dict."""
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
