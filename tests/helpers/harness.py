"""What the tests of the scripts share: small images, small models, and runs of a script in this process."""

import functools
import importlib.util
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
import torch as th
import torch.distributed as dist
from PIL import Image

from improved_diffusion import script_util
from improved_diffusion.cli import parser
from improved_diffusion.logger import Logger
from improved_diffusion.utils import files

ROOT = Path(__file__).resolve().parent.parent.parent
HELPERS = ROOT / "tests" / "helpers"  # scripts that tests start, too

# Variables by which launchers are known: rank, world size, rank within the node; further ones
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
OPEN_MPI = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
MPICH = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID")
SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS")
LAUNCHERS = (*TORCHRUN, *OPEN_MPI, *MPICH, *SLURM, *SLURM_STEP, "MASTER_ADDR", "MASTER_PORT")
SETTINGS = (
    *("OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "OPENAI_LOG_FORMAT_MPI"),
    *("DIFFUSION_BLOB_LOGDIR", "DIFFUSION_TRAINING_TEST"),
)

FULL = "/dev/full"
on_a_full_disk = pytest.mark.skipif(not os.path.exists(FULL), reason="the device that is always full is Linux's")

# a model of 8x8 images that builds in milliseconds; attention is in its middle
TINY = dict(
    num_channels=32,
    channel_mult="1",
    num_res_blocks=1,
    num_heads=2,
    attention_resolutions="4",
    diffusion_steps=24,
    noise_schedule="cosine",
)


# a few steps of it
TRAIN = dict(
    TINY,
    image_size=8,
    batch_size=4,
    lr=1e-3,
    ema_rate=0.9,
    max_steps=4,
    save_interval=2,
    log_interval=1,
    num_workers=0,
    preview_samples=0,
)


def fill_disk(monkeypatch, name):
    """The disk is full from now on for a file of this name, while it is temporary."""
    create = files._create

    def create_on_full_disk(path):
        return create(path) if not path.endswith(f"{name}{files.TEMPORARY}") else open(FULL, "wb")

    monkeypatch.setattr(files, "_create", create_on_full_disk)


class Here(Executor):
    """An executor that works in this process, at once."""

    def submit(self, function, *args):
        future: Future = Future()
        try:
            future.set_result(function(*args))
        except Exception as e:
            future.set_exception(e)
        return future


def leave_outside():
    """Take out of this process's environment what launchers and users set: tests begin without."""
    for name in (*LAUNCHERS, *SETTINGS):
        os.environ.pop(name, None)


def environment(**changed):
    """The environment of a process that a test starts: this library, one thread, neither pytest nor coverage."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV_", "PYTEST_"))}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changed}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def flags(**values):
    """A command line: flags(batch_size=4) is ["--batch_size", "4"]."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@functools.cache
def load_script(name):
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_script(name, words, logdir, **environment):
    """
    What `OPENAI_LOGDIR=logdir python scripts/NAME.py WORDS` does, in this process.

    :param environment: further variables.
    :return: the exit status.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"scripts/{name}.py", *words])
        patch.setattr(Logger, "CURRENT", None)
        patch.setattr(Logger, "DEFAULT", None)
        patch.setenv("OPENAI_LOGDIR", str(logdir))
        for variable, value in environment.items():
            patch.setenv(variable, value)
        threads = th.get_num_threads()
        th.set_num_threads(1)  # in so small a network several only wait for each other
        try:
            parser.run(load_script(name).main)
        except SystemExit as e:
            return e.code
        finally:
            th.set_num_threads(threads)
            if Logger.CURRENT is not None:
                Logger.CURRENT.close()
    return 0


def run_subprocess(name, words, logdir, **kwargs):
    """The same in a process of its own. :return: a subprocess.CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / f"{name}.py", *words],
        env=environment(OPENAI_LOGDIR=str(logdir)),
        capture_output=True,
        text=True,
        **kwargs,
    )


def write_images(folder, count=6, size=8, channels=3, classes=2):
    """PNG files of smooth random gradients, named CLASS_NUMBER.png. :return: the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count * 1000 + size)
    ramp = np.linspace(-1, 1, size)
    for i in range(count):
        across, down = rng.uniform(-60, 60, (2, channels))
        pixels = 128 + across * ramp[:, None, None] + down * ramp[None, :, None]
        image = Image.fromarray(pixels.round().astype(np.uint8).squeeze())
        image.save(folder / f"{'abcdefgh'[i % classes]}_{i:03d}.png")
    return folder


def train_with_class_dropout(folder):
    """A run of image_train.py on two classes. :return: (its folder, its images)."""
    images = write_images(folder / "images")
    words = flags(**TRAIN, data_dir=images, class_cond=True, num_classes=2, class_dropout=0.5)
    assert run_script("image_train", words, folder / "run") == 0
    return folder / "run", images


def build(**changed):
    """The default model and diffusion, with some flags changed."""
    return script_util.create_model_and_diffusion(**{**script_util.model_and_diffusion_defaults(), **changed})


def build_sr(**changed):
    """The same for super-resolution."""
    return script_util.sr_create_model_and_diffusion(**{**script_util.sr_model_and_diffusion_defaults(), **changed})


def noisy_network(**changed):
    """A TINY network whose output is not zero, and its diffusion."""
    th.manual_seed(0)
    model, diffusion = build(**{**TINY, "image_size": 8, **changed})
    for p in model.parameters():
        p.data += 0.02 * th.randn_like(p)
    return model.eval(), diffusion


def random_images(n, size=8, channels=3, seed=0):
    """uint8 [n, size, size, channels]."""
    return np.random.RandomState(seed).randint(0, 256, (n, size, size, channels), dtype=np.uint8)


def save_npz(path, images=None, **arrays):
    """An npz file. :return: the path, as text."""
    np.savez(path, **({} if images is None else {"arr_0": images}), **arrays)
    return str(path)


def read_picture(path):
    """The pixels of a whole PNG file, uint8 [h, w, 3]."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def shows(path, colour, pixels):
    """Whether a picture has a colour in more than this number of pixels."""
    return (np.abs(read_picture(path).astype(int) - colour).max(axis=-1) <= 3).sum() > pixels


def save_weights(path, super_resolution=False, fill=None, noise=0.0, **changed):
    """
    The weights of a new TINY model, with some flags changed.

    :param fill: a number for all of them.
    :param noise: standard deviation of noise that is added, since some layers begin at zero.
    :return: the path.
    """
    if super_resolution:
        model, _ = build_sr(**{"large_size": 8, "small_size": 4, **TINY, **changed})
    else:
        model, _ = build(**{"image_size": 8, **TINY, **changed})
    if fill is not None:
        for p in model.parameters():
            th.nn.init.constant_(p, fill)
    th.save({name: w + noise * th.randn_like(w) for name, w in model.state_dict().items()}, path)
    return path


def run_in_threads(size, function):
    """
    What function(rank) returns, called in a thread for each rank.

    :raises: when all of them have ended, what the first of them raised: the others may have waited for it in vain.
    """
    results, errors = [None] * size, []

    def work(rank):
        try:
            results[rank] = function(rank)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def run_on_ranks(patch, size, function):
    """
    run_in_threads(), with as much of torch.distributed as the ranks ask for.

    :param patch: a MonkeyPatch.
    """
    here, meeting, table = threading.local(), threading.Barrier(size, timeout=60), {}

    def exchange(value):
        """What each rank has brought, once all have."""
        table[here.rank] = value
        meeting.wait()
        brought = [table[rank] for rank in range(size)]
        meeting.wait()  # nobody brings the next before all have read
        return brought

    def broadcast_object_list(objects, source, group=None):
        sent = exchange(pickle.dumps(objects))[source]
        if here.rank != source:
            objects[:] = pickle.loads(sent)  # the others get copies

    def all_gather_object(objects, value, group=None):
        objects[:] = [pickle.loads(sent) for sent in exchange(pickle.dumps(value))]

    def all_gather(tensors, tensor, group=None):
        for mine, sent in zip(tensors, exchange(tensor.clone()), strict=True):
            mine.copy_(sent)

    def all_reduce(tensor, group=None):
        tensor.copy_(sum(exchange(tensor.clone())))

    for collective in (broadcast_object_list, all_gather_object, all_gather, all_reduce):
        patch.setattr(dist, collective.__name__, collective)
    patch.setattr(dist, "is_initialized", lambda: hasattr(here, "rank"))
    patch.setattr(dist, "get_rank", lambda: here.rank)
    patch.setattr(dist, "get_world_size", lambda: size)
    patch.setattr(dist, "get_backend", lambda: "gloo")

    def work(rank):
        here.rank = rank
        try:
            return function(rank)
        except BaseException:
            meeting.abort()
            raise

    return run_in_threads(size, work)


class _Terminal(io.StringIO):
    def isatty(self):
        return True


def on_a_terminal(monkeypatch):
    """:return: what stderr writes to from here on. Not a fixture: pytest sets stderr anew when a test begins."""
    monkeypatch.setattr(sys, "stderr", _Terminal())
    return sys.stderr


def snapshot(folder):
    """{relative path: bytes} of all files below a folder, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }
