"""What the tests of training share: a network of two parameters, a diffusion without noise, short runs in parts."""

import csv
import itertools

import numpy as np
import torch as th
from parity_cases import make_diffusion

from improved_diffusion import logger
from improved_diffusion.fp16_util import convert_module_to_f16
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.train_util import TrainLoop


def on_one_cpu(monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)


class TinyNet(th.nn.Module):
    """A 1x1 convolution, for the loop's own logic; it remembers the sizes of its batches."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = th.nn.Dropout(dropout)
        self.conv = th.nn.Conv2d(3, 3, 1)
        self.batch_sizes = []

    def convert_to_fp16(self):
        self.apply(convert_module_to_f16)

    def forward(self, x, t, shift=None):
        self.batch_sizes.append(len(x))
        h = self.conv(self.dropout(x).type(self.conv.weight.dtype)).type(x.dtype)
        return h if shift is None else h + shift.view(-1, 1, 1, 1)


class NoiselessDiffusion:
    """Losses that follow from the batch alone, so that a test can compute them too."""

    num_timesteps = 8

    def training_losses(self, model, x_start, t, model_kwargs=None):
        error = model(x_start, t, **(model_kwargs or {})) - x_start.flip(-1)
        mse = error.square().mean(dim=(1, 2, 3))
        return {"loss": mse * (1 + t), "mse": mse}


def batches(size=4, changes=None):
    """
    Endless different batches.

    :param changes: {number of a batch: a value that fills it}.
    """
    for k in itertools.count():
        x = th.from_numpy(np.random.default_rng(k).uniform(-1, 1, (size, 3, 8, 8)).astype(np.float32))
        yield th.full_like(x, changes[k]) if changes and k in changes else x, {}


def make_loop(cls=TrainLoop, **changed):
    """A TrainLoop of three steps on a TinyNet, with some parameters changed."""
    parameters = dict(
        diffusion=make_diffusion(8, "cosine"),
        batch_size=4,
        microbatch=-1,
        lr=1e-2,
        ema_rate="0.9",
        log_interval=1,
        save_interval=1000,
        resume_checkpoint="",
        max_steps=3,
    )
    parameters.update(changed)
    if "model" not in parameters:  # building one draws random numbers
        parameters["model"] = TinyNet()
    parameters.setdefault("data", batches(parameters["batch_size"]))
    return cls(**parameters)


def train(folder, cls=TrainLoop, **changed):
    """make_loop().run_loop() with its log in a folder. :return: the loop."""
    with logger.scoped_configure(dir=str(folder), format_strs=["log", "csv"]):
        loop = make_loop(cls, **changed)
        loop.run_loop()
    return loop


def read_rows(folder):
    """progress.csv as a list of {key: number}, without empty cells, and without images/s, which no two runs share."""
    with open(folder / "progress.csv", newline="") as f:
        return [{k: float(v) for k, v in row.items() if v and k != "images/s"} for row in csv.DictReader(f)]


def checkpoint_names(folder):
    return sorted(path.name for path in folder.glob("*.pt"))


def load(path):
    return th.load(path, map_location="cpu", weights_only=True)


def assert_same(got, want, where=""):
    """Equal to the last bit, whatever dicts and lists the tensors are in."""
    if isinstance(want, dict):
        assert list(got) == list(want), where
        for key in want:
            assert_same(got[key], want[key], f"{where}/{key}")
    elif isinstance(want, (list, tuple)):
        assert len(got) == len(want), where
        for i, pair in enumerate(zip(got, want, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(want, th.Tensor):
        assert got.dtype == want.dtype and th.equal(got, want), where
    else:
        assert got == want, where


# ---------------------------------------------------------------- runs that go on


class Killed(BaseException):
    pass


def killed_after(step):
    """A TrainLoop that dies before it logs or saves anything of the step behind this one."""

    class Dying(TrainLoop):
        def log_step(self):
            if self.step > step:
                raise Killed
            super().log_step()

    return Dying


def run(
    folder, images, cls=TrainLoop, *, seed=0, net=TinyNet, dropout=0.0, sampler="uniform", workers=0, process=None,
    class_cond=False, **parameters,
):  # fmt: skip
    """
    A run as image_train.py does it: real images, noise, dropout. Only `seed` sets it apart from another.
    """
    th.manual_seed(seed)
    np.random.seed(seed)
    diffusion = make_diffusion(4, "cosine", **(process or {}))
    samplers = {"uniform": UniformSampler, "loss-second-moment": lambda d: LossSecondMomentResampler(d, 2)}
    data = load_data(data_dir=str(images), batch_size=3, image_size=8, class_cond=class_cond, num_workers=workers)
    return train(
        folder,
        cls,
        model=net(dropout=dropout),
        diffusion=diffusion,
        data=data,
        schedule_sampler=samplers[sampler](diffusion),
        batch_size=3,
        **parameters,
    )


def latest(folder):
    return str(folder / max(name for name in checkpoint_names(folder) if name.startswith("model")))


def resume(folder, checkpoint=None, **changed):
    """:return: (the loop, the lines that the resumed run added to log.txt)."""
    log = folder / "log.txt"
    before = len(log.read_text()) if log.exists() else 0
    loop = train(folder, resume_checkpoint=checkpoint or latest(folder), **changed)
    return loop, log.read_text()[before:].splitlines()


def written_rows(folder):
    """progress.csv cell by cell, as text in its order, but for images/s."""
    with open(folder / "progress.csv", newline="") as f:
        return [[cell for cell in row.items() if cell[0] != "images/s"] for row in csv.DictReader(f)]


def assert_continues(folder, whole):
    """All that the uninterrupted run left in `whole` is in `folder` too, to the last bit."""
    for name in checkpoint_names(whole):
        assert_same(load(folder / name), load(whole / name), name)
    assert written_rows(folder) == written_rows(whole)


def checkpoint_names_of(*labels):
    return sorted(f"{kind}{label:06d}.pt" for label in labels for kind in ("model", "ema_0.9_", "opt", "state"))


def lines_of(folder):
    return (folder / "log.txt").read_text().splitlines()
