"""
Improved denoising diffusion probabilistic models (Nichol & Dhariwal 2021, arXiv 2102.09672).

A run, from images to samples:

    from improved_diffusion import load, train
    train("photos", "runs/a", image_size=64, max_steps=10_000)
    samples = load("runs/a").sample(16)  # [16, 3, 64, 64]

Two lines build a model and its diffusion:

    from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults
    model, diffusion = create_model_and_diffusion(**model_and_diffusion_defaults())

diffusion.training_losses(model, x_start, t)    what is minimized, [N]
diffusion.p_sample_loop(model, shape)           ancestral samples
diffusion.ddim_sample_loop(model, shape)        DDIM samples
diffusion.calc_bpd_loop(model, x_start)         the bound on the likelihood, bits per dimension

The map, from top to bottom. A module imports those below it, never above:

notebook        train and load: a run in a few lines of Python
cli             the scripts' flags, config.json, exit status
metrics         how good a model is
inference       samples and previews from trained weights
train_util      TrainLoop: what happens in a step, and when
training        parts of the loop: checkpoints, resuming, statistics, signals
image_datasets  load_data: images from a folder, or packed
data            batches, packed images, preparation of data sets
script_util     factories and the original's dictionaries of defaults
options         every option: name, type, default, help, valid values
option_groups   what an option is
samplers        one function per sampler
solvers         good samples in 10 to 20 evaluations of the network
guidance        samples that fit their class better
respace         fewer timesteps of a longer process
gaussian_diffusion   the reverse process p, losses, the bound
forward_process   the tables of a noise schedule, and q
resample        which timesteps to train on
networks        the table of networks
unet            the network of the paper
nn, fp16_util, losses, schedules   their parts
logger          key-value logging
dist_util       ranks, devices, collectives
utils           errors, files, checkpoints as bytes, progress; imports nothing of the package
"""

import importlib
import os
import typing

__version__ = "1.0.0"

# this process and its parent: a launcher may be killed during the seconds in which torch is imported
STARTED_AS = os.getpid(), os.getppid()


def __getattr__(name: str) -> typing.Any:
    """train, load and picture, on first use: they import torch."""
    if name in ("train", "load", "picture"):
        return getattr(importlib.import_module(".notebook", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
