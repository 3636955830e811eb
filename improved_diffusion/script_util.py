"""
Defaults, factories and flags: how the scripts turn a command line into a model and a diffusion.

A flag is a key of a defaults dict; its type is that of its default. The dicts below hold the
original's flags, extra_model_defaults() those that came later.
"""

import argparse
import inspect
import os
import signal
import sys

import torch as th

from . import dist_util
from . import gaussian_diffusion as gd
from .errors import InputError, TrainingError, first_line
from .respace import SpacedDiffusion, space_timesteps
from .unet import SuperResModel, UNetModel

NUM_CLASSES = 1000
LOG_DIRECTORIES = ("OPENAI_LOGDIR", "DIFFUSION_BLOB_LOGDIR")
MIN_LINEAR_STEPS = 21  # the linear schedule ends at beta = 20 / steps, and 1 leaves nothing to divide by

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
    diffusion = _call(create_gaussian_diffusion, flags, steps=diffusion_steps)  # first: its errors cost nothing
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
    diffusion = _call(create_gaussian_diffusion, flags, steps=diffusion_steps)
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
            f"diffusion_steps {steps} are too few for noise_schedule linear, whose last beta would reach 1; "
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


# ---------------------------------------------------------------- flags


class FlagParser(argparse.ArgumentParser):
    """A parser of flags spelled out in full; whatever is wrong with them ends in one line and status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")  # one line, without the list of all flags


def create_parser(defaults, description):
    """A FlagParser of the flags in `defaults`, and of --seed."""
    parser = FlagParser(description=description)
    add_dict_to_argparser(parser, defaults)
    parser.add_argument("--seed", type=int, help="makes a run on one CPU machine repeatable to the last bit")
    return parser


def add_dict_to_argparser(parser, default_dict):
    """Add a flag for each key, of its value's type; one whose value is None takes text."""
    for name, value in default_dict.items():
        kind = str if value is None else str2bool if isinstance(value, bool) else type(value)
        parser.add_argument(f"--{name}", default=value, type=kind)


def args_to_dict(args, keys):
    """The flags named by keys, as a dict."""
    return {key: getattr(args, key) for key in keys}


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


def _at_least(least):
    return (lambda v: v >= least), f"{least} or more"


def _one_of(*names):
    return (lambda v: v in names), " or ".join(map(str, names))


_ALLOWED = {  # flag -> (whether a value can work, what can)
    "batch_size": _at_least(1),
    "num_samples": _at_least(1),
    "num_channels": _at_least(32),
    "num_res_blocks": _at_least(1),
    "num_classes": _at_least(1),
    "image_channels": _one_of(1, 3),
    "diffusion_steps": _at_least(1),
    "noise_schedule": _one_of("linear", "cosine"),
    "schedule_sampler": _one_of("uniform", "loss-second-moment"),
    "dropout": ((lambda v: 0 <= v < 1), "at least 0 and below 1"),
    "lr": ((lambda v: v > 0), "more than 0"),
    "weight_decay": _at_least(0),
    "ema_rate": (
        (lambda v: all(0 <= rate < 1 for rate in _floats(v))),
        "at least 0 and below 1, or several with commas",
    ),
    "lr_anneal_steps": _at_least(0),
    "max_steps": _at_least(0),
    "log_interval": _at_least(1),
    "save_interval": _at_least(1),
    "keep_checkpoints": _at_least(0),
    "num_workers": _at_least(0),
    "seed": ((lambda v: v is None or 0 <= v < 2**63), "0 or more"),
}


def _floats(text):
    try:
        return [float(v) for v in str(text).split(",")]
    except ValueError:
        return [-1.0]


def parse_flags(parser):
    """
    The command line's flags, each checked by itself and against the others.

    Bad ones end the process with status 2 and one line; nothing has been written by then.
    """
    args = parser.parse_args()
    for flag, (works, right) in _ALLOWED.items():
        if hasattr(args, flag) and not works(getattr(args, flag)):
            parser.error(f"--{flag} {getattr(args, flag)}: give {right}")
    if hasattr(args, "microbatch") and not (args.microbatch == -1 or 1 <= args.microbatch <= args.batch_size):
        parser.error(f"--microbatch {args.microbatch}: give 1 to batch_size ({args.batch_size}), or -1 for all of it")
    if getattr(args, "resume_checkpoint", "") == "auto" and not any(map(os.environ.get, LOG_DIRECTORIES)):
        parser.error("--resume_checkpoint auto: set OPENAI_LOGDIR, the folder that the run's files are in")
    if hasattr(args, "small_size") and not 1 <= args.small_size <= args.large_size:
        parser.error(f"--small_size {args.small_size}: give 1 to large_size ({args.large_size})")
    return args


def run(main):
    """
    Call a script's main(), and leave as a good process does: errors that a user can mend, an interruption
    and the end of another rank become one line and an exit status.
    """
    try:
        try:
            main()
        except SystemExit as e:
            if e.code:
                raise
        dist_util.leave()
    except InputError as e:
        _exit(2, e)
    except TrainingError as e:
        _exit(1, e)
    except KeyboardInterrupt:
        _exit(128 + signal.SIGINT, "interrupted")
    except Exception as e:
        if not dist_util.is_loss_of_a_rank(e):
            raise
        _print_error(f"rank {dist_util.rank()}: another rank, or the connection to it, is gone: {first_line(e)}")
        dist_util.end_at_once(1)


def _exit(status, message):
    _print_error(message)
    sys.exit(status)


def _print_error(message):
    print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)


# ---------------------------------------------------------------- weights


def load_weights(model, path, flag="model_path"):
    """
    Load a state dict strictly.

    :param flag: what the path was given as, for messages.
    :raises InputError: if there is no such checkpoint or it does not fit; it names at most three
                        tensors and the flag that is the likely cause.
    """
    if not path:
        raise InputError(f"{flag} is not given: name a file such as ema_0.9999_200000.pt")
    state_dict = dist_util.load_state_dict(path, map_location="cpu")
    if not isinstance(state_dict, dict) or not all(isinstance(v, th.Tensor) for v in state_dict.values()):
        raise InputError(f"{flag} {path}: not the weights of a model; give a model*.pt or ema_*.pt file")
    there = {name: tuple(v.shape) for name, v in state_dict.items()}
    here = {name: tuple(v.shape) for name, v in model.state_dict().items()}
    wrong = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if wrong:
        tensors = ", ".join(
            f"{name} ({_shape(there, name)} in the file, {_shape(here, name)} by the flags)" for name in wrong[:3]
        )
        raise InputError(
            f"{flag} {path} does not fit the flags: {tensors}{', ...' if len(wrong) > 3 else ''}; "
            f"the likely cause is {_likely_cause(there, here)}"
        )
    model.load_state_dict(state_dict)


def _shape(shapes, name):
    return "x".join(map(str, shapes[name])) if name in shapes else "absent"


def _likely_cause(there, here):
    """The flag by which a file's tensors most likely differ from the model's, with its value in the file."""
    first, label, last = "input_blocks.0.0.weight", "label_emb.weight", "out.2.bias"
    if first not in there or last not in there:
        return "the file: it is not of this kind of model"
    if there[first][0] != here[first][0]:
        return f"--num_channels, {there[first][0]} in the file"
    channels, super_resolution = _inputs(there[first])
    channels_here, super_resolution_here = _inputs(here[first])
    if super_resolution != super_resolution_here:
        return "the script: one of the two is a model for super-resolution"
    if channels != channels_here:
        return f"--image_channels, {channels} in the file"
    if (label in there) != (label in here):
        return f"--class_cond, {label in there} in the file"
    if label in there and there[label] != here[label]:
        return f"--num_classes, {there[label][0]} in the file"
    if there[last] != here[last]:
        return f"--learn_sigma, {there[last][0] > here[last][0]} in the file"
    different = there.keys() ^ here.keys()
    same_blocks = all(there[name] == here[name] for name in there.keys() & here.keys())
    if same_blocks and not any(".0.in_layers" in name for name in different):
        return "--attention_resolutions, or the image size that they are fractions of"
    embeddings = [name for name in here if name.endswith("emb_layers.1.bias")]
    if not different and all(there[name] != here[name] for name in embeddings):
        return f"--use_scale_shift_norm, {there[embeddings[0]] > here[embeddings[0]]} in the file"
    return "--num_res_blocks or --channel_mult (or the image size, which chooses it)"


def _inputs(shape):
    """(image channels, whether for super-resolution) of a first layer: a smaller image doubles 1 or 3 channels."""
    return (shape[1] // 2, True) if shape[1] % 2 == 0 else (shape[1], False)
