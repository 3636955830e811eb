"""Name the ranks that others wait for: while they connect, and later at each collective."""

import platform
import threading
import time
from collections.abc import Callable, Iterable

from torch.distributed import Store

from .errors import InputError
from .streams import show

MEETING_LIMIT = 600.0  # seconds for all ranks to arrive, torchrun's limit for its nodes
MEETING_NOTICE = 10.0  # seconds until a line names the missing ranks, while they connect
COLLECTIVE_NOTICE = 60.0  # and at a collective
PERIOD = 5.0  # seconds between checks by Attendance


def _format_ranks(ranks: Iterable[int]) -> str:
    """[1] -> "rank 1"; long lists are cut."""
    names = list(map(str, ranks))
    shown = names if len(names) <= 8 else [*names[:8], f"{len(names) - 8} more"]
    return f"rank{'s' * (len(names) > 1)} {', '.join(shown)}"


def _host_key(rank: int) -> str:
    """The store's key of a rank's host name, set when it arrives."""
    return f"place of rank {rank}"


class Meeting:
    """
    `with Meeting(...)` around the code in which the ranks connect. After MEETING_NOTICE a line on stderr names the
    missing ranks. After MEETING_LIMIT a thread ends the process: the main thread may be blocked in C++, by a port that
    belongs to another program.

    :param promise: the launcher and its number of ranks, for the line.
    :param where: returns the store's address, for the line.
    :param end: called with exit status 2 at the limit.
    """

    def __init__(self, promise: str, rank: int, size: int, where: Callable[[], str], end: Callable[[int], None]):
        self.promise, self.rank, self.size, self.where, self.end = promise, rank, size, where, end
        self._missing = lambda: "rank 0" if rank else "the other ranks"  # rank 0 serves the store
        self._over = threading.Event()

    def __enter__(self):
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join(PERIOD)

    def wait_for_all(self, store: Store) -> None:
        """
        Register this rank in the store and wait for the others.

        :raises InputError: after MEETING_LIMIT, naming the missing ranks.
        """
        keys = [_host_key(rank) for rank in range(self.size)]
        store.set(keys[self.rank], platform.node())
        self._missing = lambda: _format_ranks(rank for rank, key in enumerate(keys) if not store.check([key]))
        while not store.check(keys):
            if time.monotonic() - self._began > MEETING_LIMIT:
                raise InputError(self._line())
            time.sleep(0.05)
        self._missing = lambda: "a connection to the other ranks"  # all are in the store

    def _line(self):
        try:
            missing = self._missing()
        except RuntimeError:  # rank 0 and its store are gone
            missing = "rank 0"
        waited = time.monotonic() - self._began
        return f"rank {self.rank} has waited {waited:.0f} s for {missing} {self.where()}: {self.promise}"

    def _watch(self):
        if self._over.wait(MEETING_NOTICE):
            return
        show(self._line(), error=True)
        if not self._over.wait(MEETING_LIMIT - MEETING_NOTICE + PERIOD):  # later than wait_for_all() raises
            show(f"error: {self._line()}", error=True)
            self.end(2)


class Attendance:
    """
    Count this rank's collectives: `with attendance: dist.all_reduce(...)`.

    A thread publishes the count in the store. When ranks are missing at a collective for COLLECTIVE_NOTICE seconds,
    the first of the waiting ranks names them on stderr, once. A step costs an addition and no communication.

    :param store: shared by all ranks, after Meeting.wait_for_all().
    """

    def __init__(self, store: Store, rank: int, size: int):
        self._store, self._rank, self._size = store, rank, size
        self._count = self._reported = 0  # collectives entered; the last of them that was reported
        self._since: float | None = None  # when this rank entered the current collective
        self._left = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __enter__(self):
        self._since = time.monotonic()
        self._count += 1

    def __exit__(self, *_):
        self._since = None

    def leave(self) -> None:
        """Stop the thread: inside C++ at the interpreter's exit, it could abort the process."""
        self._left.set()
        self._thread.join()

    def _publish(self):
        self._store.set(f"arrivals of rank {self._rank}", str(self._count))

    def _watch(self):
        try:
            while not self._left.wait(PERIOD):
                self._publish()
                self._report_missing()
        except RuntimeError:  # rank 0 and its store are gone
            pass

    def _report_missing(self):
        since, count = self._since, self._count
        if since is None or count == self._reported or time.monotonic() - since < COLLECTIVE_NOTICE:
            return
        keys = [f"arrivals of rank {rank}" for rank in range(self._size)]
        arrivals = [int(self._store.get(key)) if self._store.check([key]) else 0 for key in keys]
        missing = [rank for rank, arrived in enumerate(arrivals) if arrived < count]
        if not missing or self._since != since:  # all are here and exchange data
            return
        self._reported = count
        if self._rank == min(set(range(self._size)) - set(missing)):
            hosts = ", ".join(dict.fromkeys(self._store.get(_host_key(rank)).decode() for rank in missing[:8]))
            waited = f"rank {self._rank} has waited {time.monotonic() - since:.0f} s"
            show(f"{waited} for {_format_ranks(missing)} on {hosts}", error=True)
