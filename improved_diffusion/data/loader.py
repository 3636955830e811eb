"""Batches of a dataset, endless or for one epoch, decoded ahead by worker processes."""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from typing import Any

import torch as th
from torch.utils.data import DataLoader, Subset, default_collate

from .. import dist_util
from ..utils.errors import InputError


class BatchStream:
    """
    Endless batches of a dataset, reshuffled each epoch, without the incomplete batch at the end of an epoch.

    torch's global generator seeds the order of each epoch.

    :param random_flip: index the dataset by (i, flip), flip being True with probability 1/2. Drawn from the epoch's
                        seed: independent of workers and of resuming.
    :param pin_memory: with a GPU, batches in page-locked memory, for faster copies.
    """

    def __init__(
        self,
        dataset: Any,  # a Dataset with a length
        batch_size: int,
        shuffle: bool,
        num_workers: int,
        collate_fn: Callable = default_collate,
        random_flip: bool = False,
        pin_memory: bool = True,
    ):
        self.dataset = dataset
        self._order = _EpochOrder(len(dataset), batch_size, shuffle, random_flip)
        kwargs = dict(batch_sampler=self._order, persistent_workers=num_workers > 0)
        self._loader = _loader(dataset, num_workers, collate_fn, pin_memory, **kwargs)
        self._epoch: Iterator | None = None  # over the rest of the epoch
        self._given = 0  # batches returned in this epoch

    def __iter__(self):
        return self

    def __next__(self):
        if self._epoch is None:
            if self._given == 0:
                self._order.reseed()
            self._order.skip = self._given
            self._loader.generator.manual_seed(dist_util.mixed_seed(self._order.seed, self._given, dist_util.rank()))
            self._epoch = _one_line_errors(self._loader)
        try:
            batch, cond = next(self._epoch)
        except StopIteration:
            if self._given < len(self._order):
                raise RuntimeError(f"{type(self.dataset).__name__} raised StopIteration for an image") from None
            self._epoch, self._given = None, 0
            return next(self)
        self._given += 1
        return [batch, cond]  # a list, as of default_collate: client code assigns to its items

    def first(self, count: int):
        """A batch of the dataset's first `count` samples, if there are as many. Leaves the position unchanged."""
        samples = [self.dataset[i] for i in range(min(count, len(self.dataset)))]
        return self._loader.collate_fn(samples)

    def state_dict(self) -> dict[str, Any]:
        """The position in the stream, as plain values."""
        return {**self._order.settings(), "seed": self._order.seed, "given": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Continue from a position.

        :raises ValueError: if it is of another number of images, batch size or shuffle.
        """
        for key, value in self._order.settings().items():
            if state[key] != value:
                raise ValueError(f"{key} was {state[key]} in the state, and is {value} now")
        self._epoch = None
        self._order.seed, self._given = state["seed"], state["given"]


class _EpochOrder:
    """A batch sampler for DataLoader: the indices of each batch of one epoch."""

    def __init__(self, num_images, batch_size, shuffle, random_flip):
        self.num_images, self.batch_size = num_images, batch_size
        self.shuffle, self.random_flip = shuffle, random_flip
        self.seed = 0  # of the epoch's order
        self.skip = 0  # batches to skip

    def settings(self):
        return {"num_images": self.num_images, "batch_size": self.batch_size, "shuffle": self.shuffle}

    def reseed(self):
        # consume as many draws as the original's new DataLoader per epoch: two, or one unshuffled
        for _ in range(2 if self.shuffle else 1):
            self.seed = th.empty((), dtype=th.int64).random_().item()

    def __iter__(self):
        generator = th.Generator().manual_seed(self.seed)
        order = th.randperm(self.num_images, generator=generator) if self.shuffle else th.arange(self.num_images)
        order = order.tolist()
        if self.random_flip:  # drawn after the order, to leave it unchanged
            flips = th.randint(2, (self.num_images,), generator=generator).bool().tolist()
            order = list(zip(order, flips, strict=True))
        for i in range(self.skip, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self):
        return self.num_images // self.batch_size


class BatchesInOrder:
    """Batches of one epoch in order; the last may be smaller. An iterator with a length."""

    def __init__(self, dataset, batch_size: int, num_workers: int, collate_fn=default_collate, pin_memory=False):
        self.dataset = dataset
        self._arguments = dataset, num_workers, collate_fn, pin_memory
        self._batch_size = batch_size
        self.skip(0)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)

    def skip(self, count: int) -> None:
        """Start at sample number `count`. Call it before the first batch."""
        rest = range(count, len(self.dataset))
        self._loader = _loader(*self._arguments, batch_size=self._batch_size, sampler=rest)
        self._batches = _one_line_errors(self._loader)

    def first(self, count: int) -> "BatchesInOrder":
        """Batches of the first `count` samples, decoded in this process. Leaves the position unchanged."""
        dataset, _, collate_fn, _ = self._arguments
        return BatchesInOrder(Subset(dataset, range(count)), self._batch_size, 0, collate_fn)


def _loader(dataset, num_workers, collate_fn, pin_memory, **kwargs):
    generator = th.Generator()  # of the workers' seeds; keeps their draws out of the global generator
    generator.manual_seed(dist_util.mixed_seed(th.initial_seed(), dist_util.rank()))
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        worker_init_fn=_ignore_signals,
        pin_memory=pin_memory and th.cuda.is_available(),
        generator=generator,
        **kwargs,
    )


def _ignore_signals(worker):
    """
    Ignore signals in a data worker, unless its parent sends them or dies.

    A terminal or scheduler signals all processes of a run, but training needs batches until it has saved.
    """
    signal.set_wakeup_fd(-1)  # a forked worker has its parent's, and would tell it of the worker's own signals
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # under forkserver getppid() is another process
    ppid = os.getppid()

    def wait():
        # torch's watchdog misses a parent that dies while the worker starts, and Python 3.10's is_alive() some others
        while parent.is_alive() and os.getppid() == ppid:
            received = signal.sigtimedwait({signal.SIGTERM}, 1)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def _sigterm_blocked():
    """
    Block SIGTERM while workers start. Each of their threads inherits the mask, those of libraries too, which start at
    import: one thread that does not block it is enough for the signal to kill the process.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # now, since it unblocks SIGTERM when it starts
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _one_line_errors(loader):
    """A loader's batches. An InputError in a worker loses the worker's traceback."""
    try:
        with _sigterm_blocked():
            batches = iter(loader)
        yield from batches
        return
    except (EOFError, ConnectionError) as e:  # of a worker that is killed while it sends
        if str(e).startswith("Caught "):  # the dataset's own error, from a worker
            raise
        raise RuntimeError(f"DataLoader worker is gone ({type(e).__name__})") from e
    except InputError as e:
        message = e.args[0]
        if message.startswith("Caught "):  # torch adds the traceback of a worker, whose last line is the error
            message = message.strip().splitlines()[-1].partition("Error: ")[2]
        traceback.clear_frames(e.__traceback__)  # a reference cycle with the iterator would keep the workers alive
    raise InputError(message)
