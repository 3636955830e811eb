"""
The finished part of a sampling or evaluation run on disk, so that the same command continues a run that was cut off.

    parts-1f0c.../
        state.pt   what identifies the run, the number of finished samples, random generators, sums
        images     rows of an array, appended as they come; those beyond the number in state.pt do not count

The hash in the folder's name is of all that decides the result: runs with other options have folders of their own.
"""

import contextlib
import glob
import hashlib
import json
import os
import shutil
import signal
import threading
from typing import Any

import numpy as np
import torch as th

from .. import dist_util, logger
from ..options import ScriptOptions
from ..training.checkpoints import rng_state, set_rng_state
from ..utils.errors import InputError, first_line
from ..utils.files import FolderLock, write_files
from ..utils.safe_load import read_state_dict
from ..utils.streams import counted

PREFIX, STATE = "parts-", "state.pt"
# options that do not change the result, or that name files known by their content
LEFT_OUT = {"model_path", "base_samples", "save_images", "num_workers", "pin_memory"}


class Parts:
    """
    A context around a run. Rank 0 alone reads and writes the folder, which is in the log directory. A block that ends
    well removes it; one that ends by an error or SIGTERM (exit status 143) logs how to continue.

    With a seed, samples depend on their index alone: any batch size and number of ranks may continue. Without one, both
    must be the same, and the random generators continue where they were.

    :param contents: what else decides the result: plain values, or dicts of tensors or arrays.
    """

    def __init__(self, options: ScriptOptions, **contents: Any):
        values = {name: v for name, v in options.of_the_run().items() if name not in LEFT_OUT}
        self.seeded = values["seed"] is not None
        if self.seeded:
            del values["batch_size"]
        else:
            values["ranks"] = dist_util.world_size()
        self.done = 0  # number of finished samples
        self.values: Any = None  # the last `values` of save()
        self._rows: dict[str, Any] = {}  # {name: (dtype, shape of a row)}
        if dist_util.rank() == 0:
            self._identity = {**values, **{k: digest(v) if isinstance(v, dict) else v for k, v in contents.items()}}
            name = PREFIX + hashlib.sha256(json.dumps(self._identity, sort_keys=True).encode()).hexdigest()[:16]
            self._log_dir = logger.get_dir()
            self.directory = os.path.join(self._log_dir, name)
            self._lock = FolderLock(self.directory)

    def __enter__(self):
        """:raises InputError: if the folder is damaged, or another process uses it."""
        state = dist_util.broadcast_from_rank_0(self._open)
        if state is not None:
            self.done, self.values, self._rows = state["done"], state["values"], state["rows"]
            if state["random"] is not None:
                set_rng_state(state["random"][dist_util.rank()])
        self._handler = None
        if threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGTERM, _exit)
        return self

    def __exit__(self, kind, *_):
        if self._handler is not None:
            signal.signal(signal.SIGTERM, self._handler)
        if dist_util.rank() > 0:
            return
        finished = kind is None
        if finished and self.done:
            os.remove(os.path.join(self.directory, STATE))  # first: the rest may be mapped, which Windows keeps
        self._lock.release()
        if finished or not self.done:
            shutil.rmtree(self.directory, ignore_errors=True)
        else:
            where = f"the same command with log_dir {self._log_dir} continues"
            logger.log(f"{counted(self.done, 'finished sample')} in {self.directory}: {where}")

    def save(self, done: int, rows: dict[str, np.ndarray] | None = None, values: Any = None) -> None:
        """
        Keep what has been finished since the last call. A collective.

        :param done: the number of finished samples.
        :param rows: on rank 0, arrays to append: [done - self.done, ...] each, the same names and shapes every time.
        :param values: tensors and plain values that replace the last ones.
        :raises InputError: if a file cannot be written.
        """
        random = None if self.seeded else dist_util.all_gather_object(rng_state())
        dist_util.broadcast_from_rank_0(self._write, done, rows or {}, values, random)
        self.done, self.values = done, values

    def rows(self, name: str) -> np.ndarray | None:
        """All rows of this name, mapped into memory, or None. On rank 0."""
        if name not in self._rows:
            return None
        dtype, shape = self._rows[name]
        return np.memmap(self._path(name), dtype, "r", shape=(self.done, *shape))

    def _path(self, name):
        return os.path.join(self.directory, name)

    def _open(self):
        """Lock and read the folder. On rank 0. :return: the state, None for a new run."""
        self._lock.acquire()
        state = self._read(self.directory)
        if state is not None:
            logger.log(f"continuing behind {counted(state['done'], 'finished sample')} in {self.directory}")
            return state
        for name in sorted(os.listdir(self._log_dir)):
            other, state = os.path.join(self._log_dir, name), None
            if name.startswith(PREFIX) and other != self.directory:
                with contextlib.suppress(InputError):
                    state = self._read(other)
            if state is None:
                continue
            theirs = {**dict.fromkeys(self._identity), **state["identity"]}
            differ = [option for option, value in theirs.items() if value != self._identity.get(option)]
            theirs = f"{other} has {counted(state['done'], 'finished sample')} of a run that differs in"
            logger.warn(f"{theirs} {', '.join(differ)}: this run starts over; the folder stays for that one")
        # without a log_dir each run has a new folder, and one that was killed could not name its own
        beside = os.path.join(glob.escape(os.path.dirname(self._log_dir)), "*", os.path.basename(self.directory), STATE)
        for path in sorted(glob.glob(beside)):
            log_dir = os.path.dirname(os.path.dirname(path))
            logger.warn(f"{log_dir} has finished samples of this very command: with that as log_dir it continues them")
        return None

    def _read(self, directory):
        path = os.path.join(directory, STATE)
        if not os.path.exists(path):
            return None
        try:
            state = read_state_dict(path, map_location="cpu")
            if state.keys() != {"identity", "done", "random", "values", "rows"}:
                raise ValueError(f"{STATE} is of another kind")
            for name, (dtype, shape) in state["rows"].items():
                if os.path.getsize(os.path.join(directory, name)) < state["done"] * _row_size(dtype, shape):
                    raise ValueError(f"{name} is too short")
        except (OSError, ValueError, TypeError, AttributeError) as e:
            raise InputError(f"{directory}: damaged ({first_line(e)}); remove the folder to start over") from None
        return state

    def _write(self, done, rows, values, random):
        for name, array in rows.items():
            self._rows[name] = array.dtype.str, list(array.shape[1:])
            try:
                os.makedirs(self.directory, exist_ok=True)
                with open(self._path(name), "r+b" if self.done else "wb") as f:
                    f.truncate(self.done * _row_size(*self._rows[name]))  # rows of a save that was cut off
                    f.seek(0, os.SEEK_END)
                    f.write(array.tobytes())
                    f.flush()
                    os.fsync(f.fileno())
            except OSError as e:
                raise InputError(f"{self._path(name)}: cannot be written ({first_line(e)})") from None
        state = dict(identity=self._identity, done=done, random=random, values=values, rows=self._rows)
        write_files(self.directory, {STATE: lambda f: th.save(state, f)})
        self.done = done  # now: another rank may end before this one is back from the collective


def _exit(number, frame):
    raise SystemExit(128 + number)


def _row_size(dtype, shape):
    return int(np.dtype(dtype).itemsize * np.prod(shape, dtype=np.int64))


def digest(tensors: dict[str, Any]) -> str:
    """A hash of names, types and contents of tensors or arrays."""
    hashed = hashlib.sha256()
    for name, value in tensors.items():
        tensor = th.as_tensor(value)
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.contiguous().reshape(-1).view(th.uint8).numpy().data)
    return hashed.hexdigest()
