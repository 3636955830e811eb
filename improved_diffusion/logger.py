"""
Key-value logging to the terminal, log.txt, CSV, JSON lines and TensorBoard.

    logger.configure(dir="runs/a")    # or OPENAI_LOGDIR; formats from OPENAI_LOG_FORMAT
    logger.logkv("step", 10)          # the last value of a key wins
    logger.logkv_mean("loss", 0.5)    # the mean over the calls since the last dump
    logger.dumpkvs()                  # one row in every output, then a clean slate
    logger.log("saving model...")     # a line of text

Files are appended to: a run that resumes in an earlier one's directory continues its files, and Logger.drop_from()
removes the rows logged past the checkpoint. A crash at any moment costs at most one row.
"""

import contextlib
import datetime
import functools
import math
import os
import tempfile
import time
import warnings
from collections import defaultdict

from .utils.errors import InputError
from .utils.log_formats import (
    CSVOutputFormat,  # noqa: F401 (part of this module, as in the original)
    HumanOutputFormat,  # noqa: F401
    JSONOutputFormat,  # noqa: F401
    KVWriter,
    SeqWriter,
    StreamEnded,
    TensorBoardOutputFormat,  # noqa: F401
    check_format,
    make_output_format,
    plain,
)

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50


class Logger:
    """
    The values waiting for the next dump, and the outputs they go to.

    :param output_formats: a list of KVWriters and SeqWriters.
    :param comm: an mpi4py-like communicator; with one, dumps are weighted means over its ranks.
    """

    DEFAULT = None  # what reset() goes back to: made when something is logged before any configure()
    CURRENT = None  # what the module's functions log to

    def __init__(self, dir, output_formats, comm=None):
        self.name2val = defaultdict(float)
        self.name2cnt = defaultdict(int)  # observations behind each running mean
        self.pending = None  # a function that gives {key: value} on request: reading a device takes time
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        self.name2val[key] = val
        self.name2cnt.pop(key, None)  # ends a mean under this key

    def logkv_mean(self, key, val, count=1):
        if count == 0:
            return  # the mean of nothing may be NaN, and NaN * 0 is NaN
        before = self.name2cnt[key]
        total = self.name2cnt[key] = before + count
        old = self.name2val[key] * before / total if before else 0.0
        self.name2val[key] = old + float(val) * count / total

    def getkvs(self):
        for key, val in (self.pending() if self.pending else {}).items():
            self.logkv(key, val)
        return self.name2val

    def dumpkvs(self):
        # tensors become numbers only here: reading one waits for the device
        row = plain(self.name2val)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {k: (v, self.name2cnt.get(k, 1)) for k, v in row.items()})
        if row and self.level != DISABLED:
            self._write(KVWriter, lambda fmt: fmt.writekvs(row))
        self.tell_damage()
        self.name2val.clear()
        self.name2cnt.clear()
        self.pending = None
        return row

    def drop_from(self, key, value, unless_above=math.inf):
        """KVWriter.drop_from() of every output."""
        for fmt in self._kv_writers():
            fmt.drop_from(key, value, unless_above)
        self.tell_damage()

    def tell_damage(self):
        """Warn of what was wrong with the outputs' existing files."""
        for fmt in self._kv_writers():
            if fmt.damage:
                message, fmt.damage = fmt.damage, None
                self.log(f"WARNING: {message}", level=WARN)

    def log(self, *args, level=INFO):
        if self.level <= level:
            self._write(SeqWriter, lambda fmt: fmt.writeseq([str(arg) for arg in args]))

    def writeimage(self, key, pixels, step):
        """A picture, uint8 [h, w, 1 or 3], to the outputs that can show one."""
        for fmt in self._kv_writers():
            fmt.writeimage(key, pixels, step)

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        for fmt in self.output_formats:
            fmt.close()

    def _write(self, kind, write):
        """Call write() with each output of a kind. A stream that has ended is dropped, and the others log it."""
        errors = []
        for fmt in [fmt for fmt in self.output_formats if isinstance(fmt, kind)]:
            try:
                write(fmt)
            except StreamEnded as e:
                self.output_formats = [other for other in self.output_formats if other is not fmt]
                errors.append(e)
        for e in errors:
            self.log(f"{e}: nothing more is written there", level=WARN)

    def _kv_writers(self):
        return [fmt for fmt in self.output_formats if isinstance(fmt, KVWriter)]


def mpi_weighted_mean(comm, local_name2valcount):
    """
    Means over the ranks of comm, weighted by count. A collective: every rank must call it.

    :param local_name2valcount: this rank's {name: (value, count)}.
    :return: {name: mean} on rank 0, {} on the others. What is no number is left out, with a warning.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    sums, counts = defaultdict(float), defaultdict(float)
    for name2valcount in gathered:
        for name, (val, count) in name2valcount.items():
            try:
                number = float(val)
            except (TypeError, ValueError):
                warnings.warn(f"no mean over ranks of {name}: {val!r} is not a number", stacklevel=2)
            else:
                sums[name] += number * count
                counts[name] += count
    return {name: sums[name] / counts[name] for name in sums}


def configure(dir=None, format_strs=None, comm=None, log_suffix=""):
    """
    Make a new current logger. The previous one stays open, for whoever still holds it.

    :param dir: default $OPENAI_LOGDIR, else a new temporary directory.
    :param format_strs: names as of make_output_format(); default $OPENAI_LOG_FORMAT or stdout,log,csv on rank 0,
                        $OPENAI_LOG_FORMAT_MPI or log on the others.
    :param comm: as in Logger.
    :param log_suffix: part of file names; ranks above 0 add "-rank001" and so on.
    :raises InputError: as make_output_format().
    """
    if dir is None:
        now = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        dir = os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), now)
    dir = os.path.expanduser(dir)

    variable, names = "OPENAI_LOG_FORMAT", "stdout,log,csv"
    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
        variable, names = "OPENAI_LOG_FORMAT_MPI", "log"
    if format_strs is None:
        format_strs = [name.strip() for name in os.environ.get(variable, names).split(",")]
    for name in filter(None, format_strs):
        check_format(name)
    try:
        os.makedirs(dir, exist_ok=True)
        outputs = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    except OSError as e:
        raise InputError(f"log_dir {dir}: cannot be made a folder for logs ({e.strerror})") from None

    Logger.CURRENT = Logger(dir, outputs, comm)
    log(f"Logging to {dir}")
    Logger.CURRENT.tell_damage()


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """configure() for the length of a with block; then close it and go back to the logger of before."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    scoped = Logger.CURRENT
    try:
        yield
    finally:
        scoped.close()
        Logger.CURRENT = before


def reset():
    """Go back to the default logger, and close the current one if it is another."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
    Logger.CURRENT = Logger.DEFAULT


def get_current():
    """The current logger; the default one, configured by the environment alone, if there is none."""
    if Logger.CURRENT is None:
        if Logger.DEFAULT is None:
            configure()
            Logger.DEFAULT = Logger.CURRENT
        Logger.CURRENT = Logger.DEFAULT
    return Logger.CURRENT


def logkv(key, val):
    """Set a key's value in the next dump. A 0-dim tensor is read at the dump."""
    get_current().logkv(key, val)


def logkv_mean(key, val, count=1):
    """Add val, the mean of `count` observations, to a key's running mean; a 0-dim tensor is read now."""
    get_current().logkv_mean(key, val, count)


def logkvs(d):
    for key, val in d.items():
        logkv(key, val)


def dumpkvs():
    """Write the values to every output, unless the level is DISABLED; forget them, and return a copy."""
    return get_current().dumpkvs()


def getkvs():
    """The values waiting for the next dump: the logger's own dict, not a copy."""
    return get_current().getkvs()


def log(*args, level=INFO):
    """Write a line of text, the arguments with spaces between, if the logger's level is at most `level`."""
    get_current().log(*args, level=level)


debug = functools.partial(log, level=DEBUG)
info = functools.partial(log, level=INFO)
warn = functools.partial(log, level=WARN)
error = functools.partial(log, level=ERROR)


def set_level(level):
    get_current().set_level(level)


def set_comm(comm):
    get_current().set_comm(comm)


def get_dir():
    return get_current().get_dir()


def get_rank_without_mpi_import():
    from . import dist_util  # here, because it imports torch, and importing the logger stays light

    return dist_util.rank()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename):
    """Add the seconds that a with block takes to the key "wait_" + scopename."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().name2val["wait_" + scopename] += time.perf_counter() - start


def profile(n):
    """Decorate a function so that its calls run under profile_kv(n)."""
    return profile_kv(n)  # contextlib's context managers are decorators too, which time each call
