"""The batches of a dataset: who decodes them, and where a stream goes on."""

import io
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch as th
from harness import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from improved_diffusion.data import loader
from improved_diffusion.data.loader import BatchesInOrder, BatchStream

# ---------------------------------------------------------------- processes


class ProcessIds(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        return os.getpid(), {}


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_the_same_workers_serve_all_epochs(num_workers):
    stream = BatchStream(ProcessIds(), batch_size=2, shuffle=True, num_workers=num_workers)
    ids = {i for _ in range(4 * 3) for i in next(stream)[0].tolist()}
    assert len(ids) == max(num_workers, 1)
    assert (os.getpid() in ids) == (num_workers == 0)


class ProcessIdsOnce(ProcessIds):
    def __len__(self):
        return 40


def worker_of(pid):
    (process,) = [child for child in multiprocessing.active_children() if child.pid == pid]
    return process


@pytest.fixture
def start_method():
    """start_method(name): how processes are started from here on; Python 3.14 has another default than those before."""
    before = multiprocessing.get_start_method()
    yield lambda name: multiprocessing.set_start_method(name, force=True)
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="who sent a signal is known on Linux only")
@pytest.mark.parametrize(
    "kind, method", [("stream", "fork"), ("once", "fork"), ("stream", "spawn"), ("stream", "forkserver")]
)
def test_signals_leave_workers_alone_until_their_parent_ends_them(kind, method, start_method):
    """A scheduler's reach all processes of a run; training still needs its batches."""
    start_method(method)
    data = (
        BatchStream(ProcessIds(), 1, False, num_workers=2)
        if kind == "stream"
        else BatchesInOrder(ProcessIdsOnce(), 1, 2)
    )
    pids = sorted({next(data)[0].item() for _ in range(4)})
    assert len(pids) == 2 and os.getpid() not in pids
    for name in ("INT", "TERM", "TERM", "INT"):
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {pids[0]} {pids[1]}"], check=True)
    for _ in range(8):  # more than they have read ahead
        assert next(data)[0].item() in pids
    workers = [worker_of(pid) for pid in pids]
    assert all(worker.is_alive() for worker in workers)
    for worker in workers:
        os.kill(worker.pid, signal.SIGINT)  # the terminal's, whoever sends it
    assert next(data)[0].item() in pids
    for worker in workers:
        worker.terminate()  # as the loader itself does with one that does not end when told to
        worker.join(timeout=60)
    assert [worker.exitcode for worker in workers] == [0, 0]


OWNER = """
import multiprocessing, os, sys, time
from improved_diffusion.data.loader import BatchStream

class Busy:
    # after its first samples, a worker is in no state to see by itself whether its parent is there
    def __len__(self):
        return 6

    def __getitem__(self, i):
        if i > 1:
            time.sleep(600)
        return os.getpid(), {}

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    workers = int(sys.argv[2])
    data = BatchStream(Busy(), 1, False, num_workers=workers)
    print(*(next(data)[0].item() for _ in range(workers)), flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="as above")
@pytest.mark.parametrize("method, workers", [("fork", 2), ("spawn", 1), ("forkserver", 1)])
def test_workers_end_with_a_parent_that_is_killed(tmp_path, method, workers):
    (tmp_path / "owner.py").write_text(OWNER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "owner.py", method, str(workers)]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        pids = [int(word) for word in owner.stdout.readline().split()]
        owner.kill()
    assert len({*pids}) == workers
    end = time.monotonic() + 60
    while any(map(is_alive, pids)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


class WakeupDescriptor(Dataset):
    """Item i is this process's descriptor for signals."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return signal.set_wakeup_fd(-1)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="others inherit nothing")
def test_a_workers_signals_are_not_its_parents(monkeypatch):
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    before = signal.set_wakeup_fd(write_end)
    try:
        assert [batch.tolist() for batch in BatchesInOrder(WakeupDescriptor(), 1, num_workers=1)] == [[-1], [-1]]
    finally:
        assert signal.set_wakeup_fd(before) == write_end
        os.close(read_end)
        os.close(write_end)


def test_signals_where_their_senders_are_not_known(monkeypatch):
    """SIGINT is left to the parent there too, SIGTERM works as ever."""
    monkeypatch.delattr(signal, "sigtimedwait", raising=False)
    numbers, threads = (signal.SIGINT, signal.SIGHUP), threading.active_count()
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        loader._ignore_signals(0)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert threading.active_count() == threads
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- going on where another stream was


class Identity(Dataset):
    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        return i, {}


def take(stream, count):
    return [next(stream)[0].tolist() for _ in range(count)]


def take_pairs(stream, count):
    """Batches of (i, flip)."""
    return [list(zip(*(part.tolist() for part in next(stream)[0]), strict=True)) for _ in range(count)]


def through_a_file(state):
    """A state as it comes back from a checkpoint, which may hold plain values and tensors only."""
    file = io.BytesIO()
    th.save(state, file)
    file.seek(0)
    return th.load(file, weights_only=True)


@given(
    num_images=st.integers(1, 12),
    batch_size=st.integers(1, 4),
    shuffle=st.booleans(),
    before=st.integers(0, 30),
    used=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
@settings(deadline=None, max_examples=60)
def test_a_loaded_state_continues_exactly(num_images, batch_size, shuffle, before, used, seed):
    batch_size = min(batch_size, num_images)
    th.manual_seed(seed)
    stream = BatchStream(Identity(num_images), batch_size, shuffle, num_workers=0)
    take(stream, before)
    state, rng = through_a_file(stream.state_dict()), th.get_rng_state()
    expected, rng_after = take(stream, 14), th.get_rng_state()

    th.manual_seed(seed + 1)
    resumed = BatchStream(Identity(num_images), batch_size, shuffle, num_workers=0)
    take(resumed, used)  # a stream in use may load, too
    resumed.load_state_dict(state)
    th.set_rng_state(rng)
    assert take(resumed, 14) == expected
    assert th.equal(th.get_rng_state(), rng_after)


@pytest.mark.parametrize("before", [0, 1, 2, 3, 4], ids=lambda n: f"after_{n}_of_3_batches")
def test_a_loaded_state_continues_exactly_with_workers_that_decode_ahead(before):
    th.manual_seed(1)
    stream = BatchStream(Identity(7), 2, shuffle=True, num_workers=1)
    take(stream, before)
    state, rng = stream.state_dict(), th.get_rng_state()
    expected = take(stream, 7)
    stream.load_state_dict(state)
    th.set_rng_state(rng)
    assert take(stream, 7) == expected


@pytest.mark.parametrize("shuffle", [False, True])
def test_other_half_of_the_samples_is_flipped_each_epoch(shuffle):
    """The dataset is asked for (i, flip) instead of i; the order and the global generator do not depend on it."""
    streams = [BatchStream(Identity(1000), 10, shuffle, 0, random_flip=random_flip) for random_flip in (False, True)]
    plain, flipped = [], []
    for stream, batches, get in zip(streams, (plain, flipped), (take, take_pairs), strict=True):
        th.manual_seed(4)
        batches += get(stream, 300)
        batches.append(th.get_rng_state().tolist())
    assert [[i for i, _ in batch] for batch in flipped[:-1]] == plain[:-1] and flipped[-1] == plain[-1]
    masks = th.tensor([[flip for _, flip in batch] for batch in flipped[:-1]]).view(3, 1000)
    for epoch in masks:
        assert 440 < epoch.sum() < 560  # four standard deviations are 63
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert 440 < (masks[one] ^ masks[other]).sum() < 560


@pytest.mark.parametrize("workers", [(0, 0), (0, 1), (1, 0)], ids=str)
@pytest.mark.parametrize("before", [0, 1, 3, 5])
def test_a_loaded_state_flips_on_exactly(before, workers):
    th.manual_seed(1)
    stream, resumed = (BatchStream(Identity(7), 2, True, num_workers, random_flip=True) for num_workers in workers)
    take_pairs(stream, before)
    state, rng = through_a_file(stream.state_dict()), th.get_rng_state()
    expected = take_pairs(stream, 10)
    resumed.load_state_dict(state)
    th.set_rng_state(rng)
    assert take_pairs(resumed, 10) == expected and {flip for batch in expected for _, flip in batch} == {True, False}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dict(dataset=Identity(9)), "num_images was 8 .* is 9"),
        (dict(batch_size=3), "batch_size was 2 .* is 3"),
        (dict(shuffle=False), "shuffle was True .* is False"),
    ],
)
def test_a_state_of_other_data_is_refused_with_the_numbers(other, message):
    settings = dict(dataset=Identity(8), batch_size=2, shuffle=True, num_workers=0)
    state = BatchStream(**settings).state_dict()
    with pytest.raises(ValueError, match=message):
        BatchStream(**{**settings, **other}).load_state_dict(state)


def test_a_data_set_that_raises_stop_iteration_ends_no_epoch_early():
    """torch's DataLoader takes it for the end of the epoch."""

    class Ending(Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, i):
            return next(iter([])) if i == 5 else (th.zeros(1), {})

    stream = BatchStream(Ending(), 2, False, 0)
    with pytest.raises(RuntimeError, match="Ending raised StopIteration"):
        [next(stream) for _ in range(8)]


@pytest.mark.parametrize("cls", ["stream", "once"])
@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_memory_is_pinned_where_there_is_a_gpu_and_it_is_wanted(monkeypatch, cls, gpu, wanted):
    """The loader is only asked: without a GPU it would warn."""
    monkeypatch.setattr(th.cuda, "is_available", lambda: gpu)
    data = list(range(4))
    stream = (
        BatchStream(data, 2, False, 0, pin_memory=wanted)
        if cls == "stream"
        else BatchesInOrder(data, 2, 0, pin_memory=wanted)
    )
    assert stream._loader.pin_memory == (gpu and wanted)


# ---------------------------------------------------------------- random numbers in the workers


class Zeros(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return 0, {}


def draw(samples):
    """Collate to what the worker's generators draw."""
    return th.tensor([th.randint(2**40, ()), np.random.randint(2**31), random.getrandbits(40)]), {}


def drawn(monkeypatch, seed, rank=0, given=0):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    th.manual_seed(seed)
    stream = BatchStream(Zeros(), 2, True, num_workers=1, collate_fn=draw)
    if given:
        stream.load_state_dict({**stream.state_dict(), "seed": seed, "given": given})
    return next(stream)[0].tolist(), th.get_rng_state().tolist()


def test_workers_draw_other_numbers_in_each_run_rank_and_place_and_the_same_again(monkeypatch):
    cases = [dict(seed=1), dict(seed=2), dict(seed=1, rank=1), dict(seed=1, given=1)]
    numbers = [drawn(monkeypatch, **case)[0] for case in cases]
    assert all(len(set(kind)) == len(cases) for kind in zip(*numbers, strict=True))
    assert [drawn(monkeypatch, **case)[0] for case in cases] == numbers


def test_the_seeds_of_workers_cost_no_draw(monkeypatch):
    """One epoch draws twice, as the original's new DataLoader does."""
    _, after = drawn(monkeypatch, 1)
    th.manual_seed(1)
    for _ in range(2):
        th.empty((), dtype=th.int64).random_()
    assert th.get_rng_state().tolist() == after


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "Connection reset by peer")], ids=repr)
def test_a_worker_killed_while_it_sends(error):
    """The queue's error is one of a killed worker; the dataset's own of the same type stays what it is."""
    with pytest.raises(RuntimeError, match=r"^DataLoader worker"):
        next(loader._one_line_errors(Raising(error)))
    with pytest.raises(EOFError, match="Caught"):
        next(loader._one_line_errors(Raising(EOFError("Caught EOFError in DataLoader worker process 0."))))


class Raising:
    def __init__(self, error):
        self.error = error

    def __iter__(self):
        return self

    def __next__(self):
        raise self.error
