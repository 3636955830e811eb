"""
Settings of the whole suite. Every test starts from the same random numbers; the property tests have no time
limit an example, take the same examples every time and leave nothing on disk. Tensors here are so small that
threads would only wait for each other.
"""

import functools
import gc
import random
import signal
import sys

import numpy as np
import processes
import pytest
import torch as th
import torch.distributed as dist
from harness import leave_outside, load_script, run_on_ranks, write_images
from hypothesis import settings
from training import on_one_cpu

from improved_diffusion import dist_util, train_util

th.set_num_threads(1)
leave_outside()

# Started by nohup, or by a shell with &, a process ignores these, and so would everything that tests start.
for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("suite", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("suite")


def pytest_collection_finish():
    gc.freeze()  # scripts collect garbage when they leave their group, and need not look through all tests and modules


@pytest.fixture(autouse=True)
def same_random_numbers():
    random.seed(0)
    np.random.seed(0)
    th.manual_seed(0)


@pytest.fixture(autouse=True)
def no_sudden_end(monkeypatch):
    """A script that loses another rank ends its process at once; the tests' own goes on."""
    monkeypatch.setattr(dist_util, "exit_at_once", sys.exit)


@pytest.fixture(autouse=True)
def no_signal_left_changed():
    """A signal that one test leaves ignored, the next one's processes would ignore too."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.fixture(autouse=True)
def no_process_group():
    """A group that one test joined would tell the next its rank, against the environment that the next one sets."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def on_ranks(monkeypatch):
    """on_ranks(size, function) is what function(rank) returns on each of several ranks."""
    return functools.partial(run_on_ranks, monkeypatch)


@pytest.fixture
def no_plot(monkeypatch):
    """image_nll.py without nll.png, which takes longer than the rest of it; test_nll.py looks at that."""
    monkeypatch.setattr(load_script("image_nll"), "save_plot", lambda name, figure: name)


@pytest.fixture
def one_cpu(monkeypatch):
    """No GPU, even where there is one."""
    on_one_cpu(monkeypatch)


@pytest.fixture
def modest_scale(monkeypatch):
    """A loss scale that a network of two parameters does not overflow at."""
    monkeypatch.setattr(train_util, "INITIAL_LOG_LOSS_SCALE", 8.0)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts processes that need not import torch: see processes.Server."""
    if sys.platform != "linux":
        pytest.skip("needs /proc and fork")
    server = processes.Server(tmp_path_factory.mktemp("said"))
    yield server
    server.close()
    assert processes.left_behind(processes.listening_sockets()) == ""


@pytest.fixture(scope="session")
def seven_images(tmp_path_factory):
    """Batches of three leave one over, so that an epoch has two."""
    return write_images(tmp_path_factory.mktemp("images"), count=7)
