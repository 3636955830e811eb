"""
Every flag of the scripts: its group in --help, what it says there, and which values can work.

Types and defaults are those of the dicts in script_util.py and of the scripts.
"""

from typing import NamedTuple

from .cli.presets import PRESETS


class Flag(NamedTuple):
    """One line of --help, and a check of the value by itself."""

    group: str
    help: str
    works: object = None  # function of the value, whether it can work; None for whatever the type allows
    right: str = ""  # what can, in words


def _at_least(least):
    return (lambda v: v >= least), f"{least} or more"


def _between(least, most):
    return (lambda v: least <= v <= most), f"{least} or more, at most {most}"


def _one_of(*names):
    return (lambda v: v in names), " or ".join(map(str, names))


def _floats(text):
    try:
        return [float(v) for v in str(text).split(",")]
    except ValueError:
        return [-1.0]


MODEL, DIFFUSION, TRAINING, DATA, SAMPLING, OUTPUT, COMPUTING = (
    "model",
    "diffusion",
    "training",
    "data",
    "sampling",
    "output",
    "computing",
)
PIXELS = 2**16  # of an image's side, at most
GROUPS = (DATA, MODEL, DIFFUSION, TRAINING, SAMPLING, OUTPUT, COMPUTING)  # in the order of --help

FLAGS = {
    # ---- data
    "data_dir": Flag(DATA, "folder of images, searched recursively, or packed images"),
    "base_samples": Flag(DATA, "npz file of small images to enlarge, such as image_sample.py writes"),
    "random_flip": Flag(DATA, "mirror half of the images, drawn anew each time an image comes"),
    "num_workers": Flag(
        DATA,
        "processes that decode images; 0 for none but this one; -1 for one (none for packed images), or to prepare "
        "images for one a processor core",
        (lambda v: v >= -1),
        "0 or more, or -1",
    ),
    "pin_memory": Flag(DATA, "where there is a GPU, read images into page-locked memory, for quicker copies to it"),
    "class_name": Flag(DATA, "class of all images; by default the folder's name up to its first underscore"),
    "split": Flag(
        DATA,
        "train or val; by default train, or val if it is alone",
        (lambda v: v in ("", "train", "val")),
        "train or val",
    ),
    "max_images": Flag(DATA, "use only so many images; 0 for all", *_at_least(0)),
    "batch_size": Flag(DATA, "images at once on each rank", *_between(1, 2**24)),
    # ---- model
    "preset": Flag(MODEL, f"flags of a published model, where they are not given: {', '.join(PRESETS)}"),
    "model_path": Flag(MODEL, "weights, such as ema_0.9999_200000.pt; the config.json beside it gives the flags"),
    "image_size": Flag(MODEL, "height and width of the images, in pixels", *_between(1, PIXELS)),
    "large_size": Flag(MODEL, "height and width of the enlarged images, in pixels", *_between(1, PIXELS)),
    "small_size": Flag(MODEL, "height and width of the images to enlarge, in pixels"),
    "image_channels": Flag(MODEL, "3 for RGB, 1 for greyscale", *_one_of(1, 3)),
    "num_channels": Flag(MODEL, "channels of the first level, a multiple of 32", *_between(32, 2**16)),
    "channel_mult": Flag(
        MODEL,
        "channels of each level as multiples of num_channels, such as 1,2,2; "
        "built in for sizes 32, 64, 128, 256 and 512",
    ),
    "num_res_blocks": Flag(MODEL, "residual blocks a level", *_at_least(1)),
    "attention_resolutions": Flag(MODEL, "sizes at which there is attention, with commas, in pixels"),
    "num_heads": Flag(MODEL, "heads of attention"),
    "num_heads_upsample": Flag(MODEL, "heads on the way up; -1 for num_heads"),
    "use_scale_shift_norm": Flag(MODEL, "the step's embedding scales and shifts normalised features; else it is added"),
    "dropout": Flag(
        MODEL, "fraction of features dropped in training", (lambda v: 0 <= v < 1), "at least 0 and below 1"
    ),
    "class_cond": Flag(MODEL, "class-conditional; the class of a file is its name up to the first underscore"),
    "num_classes": Flag(MODEL, "classes that a class-conditional model knows", *_at_least(1)),
    "learn_sigma": Flag(MODEL, "the model also predicts the variances of the reverse process"),
    # ---- diffusion
    "diffusion_steps": Flag(DIFFUSION, "timesteps of the whole process", *_at_least(1)),
    "noise_schedule": Flag(DIFFUSION, "how the noise grows: linear or cosine", *_one_of("linear", "cosine")),
    "timestep_respacing": Flag(
        DIFFUSION, "timesteps to use: 250, ddim50, or counts for equal sections, such as 10,15; empty for all"
    ),
    "sigma_small": Flag(DIFFUSION, "the smaller of the two fixed variances, where none is learned"),
    "predict_xstart": Flag(DIFFUSION, "the model predicts the image instead of the noise"),
    "rescale_timesteps": Flag(DIFFUSION, "show the model timesteps as if there were 1000"),
    "use_kl": Flag(DIFFUSION, "minimise the variational bound instead of the squared error"),
    "rescale_learned_sigmas": Flag(DIFFUSION, "weigh the bound in the hybrid loss as if there were 1000 timesteps"),
    # ---- training
    "schedule_sampler": Flag(
        TRAINING,
        "which timesteps to train on: uniform or loss-second-moment",
        *_one_of("uniform", "loss-second-moment"),
    ),
    "lr": Flag(TRAINING, "learning rate of AdamW", (lambda v: v > 0), "more than 0"),
    "weight_decay": Flag(TRAINING, "weight decay of AdamW", *_at_least(0)),
    "lr_anneal_steps": Flag(
        TRAINING, "stop after so many steps, the learning rate falling to 0; 0 for never", *_at_least(0)
    ),
    "max_steps": Flag(TRAINING, "stop after so many steps; 0 for never", *_at_least(0)),
    "microbatch": Flag(TRAINING, "images at once in the network: memory only; -1 for batch_size"),
    "ema_rate": Flag(
        TRAINING,
        "decay of the weights' moving average a step; several with commas",
        (lambda v: all(0 <= rate < 1 for rate in _floats(v))),
        "at least 0 and below 1, or several with commas",
    ),
    "resume_checkpoint": Flag(
        TRAINING, "model file to continue from, or auto: the newest complete one of the log directory"
    ),
    "fp16_scale_growth": Flag(TRAINING, "growth of the float16 loss scale's log2 a step", *_between(0, 1)),
    # ---- sampling
    "num_samples": Flag(SAMPLING, "images to draw, or for image_nll to measure", *_at_least(1)),
    "classes": Flag(SAMPLING, "classes to draw, in turn (3,7 or cat,dog), or with how many of each (3:10,7:5)"),
    "use_ddim": Flag(SAMPLING, "sample by DDIM, for few timesteps"),
    "clip_denoised": Flag(SAMPLING, "clip predicted images to the range of pixels"),
    # ---- output
    "log_dir": Flag(OUTPUT, "folder for all that is written; default OPENAI_LOGDIR, else a new one in runs/"),
    "log_interval": Flag(OUTPUT, "steps between rows of the log", *_at_least(1)),
    "save_interval": Flag(OUTPUT, "steps between checkpoints", *_at_least(1)),
    "keep_checkpoints": Flag(OUTPUT, "delete all but so many of the newest checkpoints; 0 keeps all", *_at_least(0)),
    "preview_samples": Flag(OUTPUT, "samples drawn at each checkpoint, as a picture; 0 for none", *_at_least(0)),
    "save_images": Flag(OUTPUT, "also write each sample as a PNG file"),
    "dry_run": Flag(OUTPUT, "print the flags, the model's size, the memory it takes and the timesteps, and stop"),
    # ---- computing
    "use_checkpoint": Flag(COMPUTING, "recompute activations instead of keeping them: less memory, more time"),
    "use_fp16": Flag(COMPUTING, "the network's torso in float16"),
    "use_bf16": Flag(COMPUTING, "the network's torso under autocast to bfloat16"),
    "compile": Flag(COMPUTING, "the network through torch.compile"),
    "seed": Flag(
        COMPUTING,
        "makes a run on one CPU machine repeatable to the last bit; default: another one each time",
        (lambda v: v is None or 0 <= v < 2**63),
        f"0 or more, at most {2**63 - 1}",
    ),
}
