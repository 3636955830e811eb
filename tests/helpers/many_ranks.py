"""
What test_ranks.py starts on one, two and three ranks: many_ranks.py FOLDER FILES

Each rank writes FOLDER/rank0.pt, rank1.pt, ...; the scripts' files are in folders of their own. All worlds have
the same global batches, so that what they compute can be compared.
"""

import faulthandler
import itertools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import TINY, flags, load_script
from training import make_diffusion, make_loop

from improved_diffusion import dist_util, logger, train_util
from improved_diffusion.fp16_util import convert_module_to_f16
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.inference.generate import generate
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.unet import UNetModel

GLOBAL_BATCH = 12
STEPS = 3
SAMPLES = 7
BATCH_SIZES = (2, 7)
SIZED = {**TINY, "image_size": 8, "class_cond": True, "num_classes": 4, "timestep_respacing": "6"}


def mine(values):
    """This rank's share of a global batch."""
    share = GLOBAL_BATCH // dist_util.world_size()
    return values[share * dist_util.rank() :][:share]


class GivenNoise(GaussianDiffusion):
    """Takes the noise of each sample from the batch's conditions."""

    def training_losses(self, model, x_start, t, model_kwargs=None):
        return super().training_losses(model, x_start, t, noise=model_kwargs["noise"])


class WholeNumbers:
    """
    A loss that is linear in the model's output, with factors that every world's batch size divides: with a
    1x1 convolution and images of small whole numbers, float16 has nothing to round.
    """

    num_timesteps = 8

    def training_losses(self, model, x_start, t, model_kwargs=None):
        factors = GLOBAL_BATCH * (1 + t % 3).view(-1, 1, 1, 1)
        return {"loss": (model(x_start, t) * factors).sum(dim=(1, 2, 3))}


class WholeNet(th.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = th.nn.Conv2d(3, 3, 1)

    def convert_to_fp16(self):
        self.apply(convert_module_to_f16)

    def forward(self, x, t):
        return self.conv(x.type(self.conv.weight.dtype)).type(x.dtype)


def shared(sampler):
    """A sampler whose draws are the same global ones in every world."""

    class Shared(sampler):
        drawn = 0

        def sample(self, batch_size, device):
            assert batch_size == len(mine(range(GLOBAL_BATCH)))
            self.drawn += 1
            np.random.seed(self.drawn)
            t, weights = super().sample(GLOBAL_BATCH, device)
            return mine(t), mine(weights)

    return Shared


def given_noise():
    diffusion = make_diffusion(8, "cosine")
    diffusion.__class__ = GivenNoise
    return diffusion


def gradients(net, sampler, use_fp16, microbatch):
    """The first step's gradient, and the parameters and sampler weights after STEPS steps."""
    th.manual_seed(0)
    whole = net == "whole numbers"
    diffusion = WholeNumbers() if whole else given_noise()
    schedule_sampler = shared(sampler)(diffusion)
    if sampler is LossSecondMomentResampler:  # as after a while of training
        history = np.random.default_rng(0).integers(1, 9, (8, 10))
        schedule_sampler.update_with_all_losses(list(range(8)) * 10, (history**2.0).T.ravel().tolist())
    loop = make_loop(
        model=WholeNet()
        if whole
        else UNetModel(3, 32, 3, 1, [1], channel_mult=(1,), num_heads=2, use_checkpoint=net == "compiled unet"),
        diffusion=diffusion,
        schedule_sampler=schedule_sampler,
        batch_size=GLOBAL_BATCH // dist_util.world_size(),
        microbatch=microbatch,
        use_fp16=use_fp16,
        lr=1e-3,
    )
    if not whole:  # its last layer begins at zero, and would hide the others
        for p in loop.master_params:
            p.data.add_(th.randn(p.shape, generator=th.Generator().manual_seed(1)), alpha=0.02)
        if use_fp16:
            train_util.master_params_to_model_params(loop.model_params, loop.master_params)
    if net == "compiled unet":
        loop.model.compile(backend="eager", dynamic=False)  # needs no compiler
    rng = np.random.default_rng(2)
    scale = 2**loop.lg_loss_scale if use_fp16 else 1
    gradient = None
    for _ in range(STEPS):
        x = rng.integers(-2, 3, (GLOBAL_BATCH, 3, 4, 4)) if whole else rng.uniform(-1, 1, (GLOBAL_BATCH, 3, 8, 8))
        noise = th.from_numpy(rng.standard_normal(x.shape)).float()
        batch = mine(th.from_numpy(x).float()), {} if whole else {"noise": mine(noise)}
        loop.forward_backward(*batch)
        if gradient is None:
            gradient = th.cat([p.grad.float().flatten() for p in loop.model_params]) / scale
        (loop.optimize_fp16 if use_fp16 else loop.optimize_normal)()
        loop.step += 1
    return {
        "gradient": gradient,
        "parameters": th.cat([p.detach().float().flatten() for p in loop.model_params]),
        "sampler": th.from_numpy(np.asarray(schedule_sampler.weights())),
    }


def all_gradients():
    train_util.INITIAL_LOG_LOSS_SCALE = 4.0  # which a sum of whole numbers does not overflow
    ranks = dist_util.world_size()
    cases = [
        *itertools.product(["unet"], (UniformSampler, LossSecondMomentResampler), [False], (-1, 3)),
        # for importance weights there are no whole numbers
        *itertools.product(["whole numbers"], [UniformSampler], (False, True), (-1, 3)),
        # seconds each: a CPU is slow in float16, and in tracing
        *[("unet", UniformSampler, True, -1 if ranks == 1 else 3)] * (ranks < 3),
        *[("compiled unet", UniformSampler, False, 4)] * (ranks == 2),
    ]
    return {
        (net, sampler.__name__, use_fp16, microbatch): gradients(net, sampler, use_fp16, microbatch)
        for net, sampler, use_fp16, microbatch in cases
    }


def run_scripts(folder, files):
    """The scripts that share out work, for several batch sizes; the files are in folder/NAME-BATCHSIZE."""
    common = dict(SIZED, seed=3)
    enlarging = {k: v for k, v in common.items() if k != "image_size"} | dict(large_size=8, small_size=4)
    calls = {
        "image_sample": dict(common, num_samples=SAMPLES, model_path=files / "model.pt"),
        "super_res_sample": dict(
            enlarging,
            num_samples=SAMPLES,
            model_path=files / "sr_model.pt",
            base_samples=files / "base.npz",
            sampler="ddim",
        ),
        "image_nll": dict(
            common, num_samples=SAMPLES, model_path=files / "model.pt", data_dir=files / "images", num_workers=0
        ),
    }
    calls["image_nll-estimate"] = dict(calls["image_nll"], estimate=4)
    for (name, words), batch_size in itertools.product(calls.items(), BATCH_SIZES):
        script = name.partition("-")[0]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script, *flags(**words, batch_size=batch_size)])
            patch.setattr(logger.Logger, "CURRENT", None)
            patch.setattr(logger.Logger, "DEFAULT", None)
            patch.setenv("OPENAI_LOGDIR", str(folder / f"{name}-{batch_size}"))
            patch.setenv("OPENAI_LOG_FORMAT", "log")
            if script == "image_nll":
                patch.setattr(load_script(script), "save_plot", lambda name, figure: name)  # a second each
            load_script(script).main()
            logger.Logger.CURRENT.close()


class Blank:
    """Draws black images without a model."""

    num_timesteps = 1

    def p_sample_loop_progressive(self, model, shape, **kwargs):
        yield {"sample": th.full(shape, -1.0), "pred_xstart": None}


def memory_growth():
    """Bytes that this rank's memory grows by when 6,000 samples of 12 KB are drawn instead of 100."""
    peaks = []
    for num_samples in (100, 6000):
        generate(
            Blank(), None, shape=(3, 64, 64), num_samples=num_samples, batch_size=50, conditions=lambda *_: {}, seed=0
        )
        # not getrusage(), which gives a process the peak of the one that started it
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        peaks.append(int(peak.split()[1]) * 1024)
    return peaks[1] - peaks[0]


def main():
    folder, files = map(Path, sys.argv[1:])
    faulthandler.dump_traceback_later(240, exit=True)  # ranks that wait for each other for ever say where
    os.environ["OPENAI_LOG_FORMAT"] = os.environ["OPENAI_LOG_FORMAT_MPI"] = "log"
    dist_util.setup_dist()
    with logger.scoped_configure(dir=str(folder / "log"), format_strs=[]):
        answers = {"gradients": all_gradients()}
        if dist_util.world_size() == 2:
            answers["memory"] = memory_growth()
    run_scripts(folder, files)
    th.save(answers, folder / f"rank{dist_util.rank()}.pt")
    dist_util.leave()
