"""Batches of a dataset, endless and shuffled or once and in order, decoded ahead by worker processes."""

import multiprocessing
import os
import signal
import threading
import traceback

import torch as th
from torch.utils.data import DataLoader, default_collate

from ..utils.errors import InputError


class BatchStream:
    """
    Endless batches of a dataset, each epoch in a new order, without the incomplete batch at an epoch's end.

    torch's global generator seeds each epoch's order.

    :param random_flip: ask the dataset for (i, flip) instead of i, flip being True with probability 1/2. Drawn from
                        the epoch's seed: which process decodes, and where a run was resumed, change nothing.
    :param pin_memory: with a GPU, give batches in page-locked memory, for faster copies.
    """

    def __init__(
        self, dataset, batch_size, shuffle, num_workers, collate_fn=default_collate, random_flip=False, pin_memory=True
    ):
        self.dataset = dataset
        self._order = _EpochOrder(len(dataset), batch_size, shuffle, random_flip)
        kwargs = dict(batch_sampler=self._order, persistent_workers=num_workers > 0)
        self._loader = _loader(dataset, num_workers, collate_fn, pin_memory, **kwargs)
        self._epoch = None  # iterator over the rest of the epoch
        self._given = 0  # batches of this epoch so far

    def __iter__(self):
        return self

    def __next__(self):
        if self._epoch is None:
            if self._given == 0:
                self._order.reseed()
            self._order.skip = self._given
            self._epoch = _one_line_errors(self._loader)
        try:
            batch, cond = next(self._epoch)
        except StopIteration:
            self._epoch, self._given = None, 0
            return next(self)
        self._given += 1
        return batch, cond

    def first(self, count):
        """A batch of the dataset's first `count` samples, or of all; the position does not change."""
        samples = [self.dataset[i] for i in range(min(count, len(self.dataset)))]
        return self._loader.collate_fn(samples)

    def state_dict(self):
        """The position, for load_state_dict(); plain values only."""
        return {**self._order.settings(), "seed": self._order.seed, "given": self._given}

    def load_state_dict(self, state):
        """
        Continue at the position of `state`.

        :raises ValueError: if its stream had another number of images, batch size or shuffle.
        """
        for key, mine in self._order.settings().items():
            if state[key] != mine:
                raise ValueError(f"{key} was {state[key]} then and is {mine} now")
        self._epoch = None
        self._order.seed, self._given = state["seed"], state["given"]


class _EpochOrder:
    """The indices of each batch of one epoch: a batch sampler for DataLoader."""

    def __init__(self, num_images, batch_size, shuffle, random_flip):
        self.num_images = num_images
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.random_flip = random_flip
        self.seed = 0
        self.skip = 0

    def settings(self):
        return {"num_images": self.num_images, "batch_size": self.batch_size, "shuffle": self.shuffle}

    def reseed(self):
        # two draws an epoch, the first unused (one unshuffled), as a new DataLoader takes
        for _ in range(2 if self.shuffle else 1):
            self.seed = th.empty((), dtype=th.int64).random_().item()

    def __iter__(self):
        generator = th.Generator().manual_seed(self.seed)
        order = th.randperm(self.num_images, generator=generator) if self.shuffle else th.arange(self.num_images)
        order = order.tolist()
        if self.random_flip:  # drawn after the order, which does not depend on it
            flips = th.randint(2, (self.num_images,), generator=generator).bool().tolist()
            order = list(zip(order, flips, strict=True))
        for i in range(self.skip, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size]

    def __len__(self):
        return self.num_images // self.batch_size


class BatchesInOrder:
    """A dataset's batches in its order, each sample once; the last batch may be smaller. An iterator with a length."""

    def __init__(self, dataset, batch_size, num_workers, collate_fn=default_collate, pin_memory=False):
        self.dataset = dataset
        self._loader = _loader(dataset, num_workers, collate_fn, pin_memory, batch_size=batch_size)
        self._batches = _one_line_errors(self._loader)

    def __len__(self):
        return len(self._loader)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._batches)


def _loader(dataset, num_workers, collate_fn, pin_memory, **kwargs):
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=collate_fn,
        worker_init_fn=_leave_signals_to_the_parent,
        pin_memory=pin_memory and th.cuda.is_available(),
        generator=th.Generator(),  # the loader's own draws must not disturb the global generator's order
        **kwargs,
    )


def _leave_signals_to_the_parent(worker):
    """
    A terminal or a scheduler sends SIGINT, SIGHUP and SIGTERM to all processes of a run. Training still needs batches
    until it has saved: workers end when it terminates them, or is gone itself.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    parent = multiprocessing.parent_process()  # by getppid() it is unknown to a process that a fork server started
    above = os.getppid()

    def wait():
        # torch looks too, but not at a parent that died while the worker began; Python 3.10's is_alive() is not enough
        while parent.is_alive() and os.getppid() == above:
            received = signal.sigtimedwait({signal.SIGTERM}, 1)
            if received is not None and received.si_pid == parent.pid:
                break
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _one_line_errors(loader):
    """A loader's batches; an InputError of a worker comes without the worker's traceback."""
    try:
        yield from loader
        return
    except InputError as e:
        message = str(e).strip().splitlines()[-1].split("InputError: ")[-1]
        traceback.clear_frames(e.__traceback__)  # in a cycle with the loader's iterator, which holds workers
    raise InputError(message)
