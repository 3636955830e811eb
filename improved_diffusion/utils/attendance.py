"""Names the ranks that others wait for: at the start, and later at each collective."""

import platform
import sys
import threading
import time

from .errors import InputError

MEETING_LIMIT = 600.0  # seconds for all ranks to arrive, as torchrun gives its nodes
# Seconds of waiting after which a line names the missing ranks
MEETING_NOTICE = 10.0
COLLECTIVE_NOTICE = 60.0
PERIOD = 5.0  # seconds between checks by Attendance


def _in_words(ranks):
    """[1] -> "rank 1"; long lists are cut."""
    ranks = list(map(str, ranks))
    shown = ranks if len(ranks) <= 8 else [*ranks[:8], f"{len(ranks) - 8} more"]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(shown)}"


def _place(rank):
    """The store's key of a rank's host name, set when it arrives."""
    return f"place of rank {rank}"


class Meeting:
    """
    Within `with Meeting(...)`, a launcher's ranks find each other. After MEETING_NOTICE a line on stderr names the
    missing ones. After MEETING_LIMIT a thread ends the process, which may be blocked in C++: by a port that is another
    program's.

    :param promise: which launcher promises how many ranks, for the line.
    :param where: returns the meeting place, for the line.
    :param end: called with the status 2 at the limit.
    """

    def __init__(self, promise, rank, size, where, end):
        self.promise, self.rank, self.size, self.where, self.end = promise, rank, size, where, end
        self._missing = lambda: "rank 0" if rank else "the other ranks"  # the store is rank 0's
        self._over = threading.Event()

    def __enter__(self):
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join(PERIOD)

    def wait_for_all(self, store):
        """
        Register in the store, and return when all ranks have.

        :raises InputError: naming the missing ranks, after MEETING_LIMIT.
        """
        keys = [_place(rank) for rank in range(self.size)]
        store.set(keys[self.rank], platform.node())
        self._missing = lambda: _in_words(rank for rank, key in enumerate(keys) if not store.check([key]))
        while not store.check(keys):
            if time.monotonic() - self._began > MEETING_LIMIT:
                raise InputError(self._line())
            time.sleep(0.05)
        self._missing = lambda: "a connection to the other ranks"  # all have arrived

    def _line(self):
        try:
            missing = self._missing()
        except RuntimeError:  # rank 0 has just gone, and its store
            missing = "rank 0"
        waited = time.monotonic() - self._began
        return f"rank {self.rank} has waited {waited:.0f} s for {missing} {self.where()}: {self.promise}"

    def _watch(self):
        if self._over.wait(MEETING_NOTICE):
            return
        print(self._line(), file=sys.stderr, flush=True)
        if not self._over.wait(MEETING_LIMIT - MEETING_NOTICE + PERIOD):  # after wait_for_all() would have raised
            print(f"error: {self._line()}", file=sys.stderr, flush=True)
            self.end(2)


class Attendance:
    """
    Counts this rank's arrivals at collectives, `with attendance: dist.all_reduce(...)`. A thread publishes the count in
    the store. When ranks are missing at a collective for COLLECTIVE_NOTICE seconds, the first of the waiting ranks
    names them on stderr, once. A step costs an addition, and no message.

    :param store: of all ranks, after Meeting.wait_for_all().
    """

    def __init__(self, store, rank, size):
        self._store, self._rank, self._size = store, rank, size
        self._count = 0
        self._since = None  # when this rank arrived at the collective it is in
        self._noticed = 0  # the last collective that was reported
        self._left = threading.Event()
        self._publish()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __enter__(self):
        self._since = time.monotonic()
        self._count += 1

    def __exit__(self, *_):
        self._since = None

    def leave(self):
        """End the thread: in C++ at the interpreter's end, it could abort the process."""
        self._left.set()
        self._thread.join()

    def _publish(self):
        self._store.set(f"arrivals of rank {self._rank}", str(self._count))

    def _watch(self):
        try:
            while not self._left.wait(PERIOD):
                self._publish()
                self._look()
        except RuntimeError:  # rank 0 is gone, and its store
            pass

    def _look(self):
        since, count = self._since, self._count
        if since is None or count == self._noticed or time.monotonic() - since < COLLECTIVE_NOTICE:
            return
        keys = [f"arrivals of rank {rank}" for rank in range(self._size)]
        arrivals = [int(self._store.get(key)) if self._store.check([key]) else 0 for key in keys]
        missing = [rank for rank, arrived in enumerate(arrivals) if arrived < count]
        if not missing or self._since != since:  # what is left is the exchange itself
            return
        self._noticed = count
        if self._rank == min(set(range(self._size)) - set(missing)):
            places = dict.fromkeys(self._store.get(_place(rank)).decode() for rank in missing[:8])
            waited = time.monotonic() - since
            line = f"rank {self._rank} has waited {waited:.0f} s for {_in_words(missing)} on {', '.join(places)}"
            print(line, file=sys.stderr, flush=True)
