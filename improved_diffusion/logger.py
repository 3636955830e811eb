"""
Key-value logging to the terminal, log.txt, CSV, JSON lines, TensorBoard and Weights & Biases.

    logger.configure(dir="runs/a")    # or OPENAI_LOGDIR; formats from OPENAI_LOG_FORMAT
    logger.logkv("step", 10)          # the last value of a key wins
    logger.logkv_mean("loss", 0.5)    # the mean over the calls since the last dump
    logger.dumpkvs()                  # write one row to every output, and clear
    logger.log("saving model...")     # a line of text

Files are appended to: a resumed run continues the files in its directory, after Logger.drop_from() removed the rows
past the checkpoint. A crash at any moment costs at most one row.
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
from typing import Any

from .utils.errors import InputError
from .utils.log_formats import (
    CSVOutputFormat,  # noqa: F401 (part of this module, as in the original)
    HumanOutputFormat,  # noqa: F401
    JSONOutputFormat,  # noqa: F401
    KVWriter,
    SeqWriter,
    StreamEnded,
    TensorBoardOutputFormat,  # noqa: F401
    WandbOutputFormat,  # noqa: F401
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
    Values until the next dump, and the outputs.

    :param output_formats: a list of KVWriters and SeqWriters.
    :param comm: an mpi4py-like communicator: dumps are weighted means over its ranks.
    """

    DEFAULT: "Logger | None" = None  # after reset(); created by the first use before configure()
    CURRENT: "Logger | None" = None  # used by the module's functions
    EARLY: list[str] = []  # lines of note() before the first logger

    def __init__(self, dir, output_formats, comm=None):
        self.name2val = defaultdict(float)
        self.name2cnt = defaultdict(int)  # number of observations of each mean
        self.pending: Any = None  # a StepStatistics, read on request only: it waits for the device
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        self.name2val[key] = val
        self.name2cnt.pop(key, None)  # no longer a mean

    def logkv_mean(self, key, val, count=1):
        if count == 0:
            return  # val may be NaN, and NaN * 0 is NaN
        before = self.name2cnt[key]
        total = self.name2cnt[key] = before + count
        old = self.name2val[key] * before / total if before else 0.0
        self.name2val[key] = old + float(val) * count / total

    def getkvs(self):
        return self._with_pending()[0] if self.pending else self.name2val

    def _with_pending(self):
        """Copies of name2val and name2cnt, with the means of the steps that are pending."""
        whole = Logger(self.dir, [])
        whole.name2val.update(self.name2val)
        whole.name2cnt.update(self.name2cnt)
        for key, (mean, count) in (self.pending.read(over_ranks=False) if self.pending else {}).items():
            whole.logkv_mean(key, mean, count)
        return whole.name2val, whole.name2cnt

    def dumpkvs(self):
        # read tensors only here: it waits for the device
        values, counts = self._with_pending()
        row = plain(values)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {k: (v, counts.get(k, 1)) for k, v in row.items()})
        if row and self.level != DISABLED:
            self._write(self._outputs(KVWriter), lambda fmt: fmt.writekvs(row))
        self.warn_of_damage()
        self.name2val.clear()
        self.name2cnt.clear()
        if self.pending:
            self.pending.clear()
        return row

    def drop_from(self, key, value, unless_above=math.inf):
        """Call KVWriter.drop_from() of every output."""
        for fmt in self._outputs(KVWriter):
            fmt.drop_from(key, value, unless_above)
        self.warn_of_damage()

    def warn_of_damage(self):
        """Warn of damage that outputs have found in existing files."""
        for fmt in self._outputs(KVWriter):
            if fmt.damage:
                message, fmt.damage = fmt.damage, None
                self.log(f"WARNING: {message}", level=WARN)

    def log(self, *args, level=INFO):
        if self.level <= level:
            self._write(self._outputs(SeqWriter), lambda fmt: fmt.writeseq([str(arg) for arg in args]))

    def writeimage(self, key, pixels, step):
        """Write a picture, uint8 [h, w, 1 or 3], to the outputs that support it."""
        self._write(self._outputs(KVWriter), lambda fmt: fmt.writeimage(key, pixels, step))

    def writeconfig(self, config):
        """Give the options of the run, plain values, to the outputs that show them."""
        self._write(self._outputs(KVWriter), lambda fmt: fmt.writeconfig(config))

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        lines = self._outputs(SeqWriter)  # last: they take the warning of one that fails
        self._write([fmt for fmt in self.output_formats if fmt not in lines], lambda fmt: fmt.close())
        self._write(lines, lambda fmt: fmt.close())

    def _write(self, outputs, write):
        """Call write() with each output. Drop one that has ended, and log that to the others."""
        closed = []
        for fmt in outputs:
            try:
                write(fmt)
            except StreamEnded as e:
                self.output_formats = [other for other in self.output_formats if other is not fmt]
                closed.append(str(e))
        for message in closed:
            self.log(f"{message}: this output is dropped", level=WARN)

    def _outputs(self, kind):
        return [fmt for fmt in self.output_formats if isinstance(fmt, kind)]


def mpi_weighted_mean(comm, local_name2valcount: dict[str, tuple[Any, float]]) -> dict[str, float]:
    """
    Means over the ranks of comm, weighted by count. A collective.

    :param local_name2valcount: this rank's {name: (value, count)}.
    :return: {name: mean} on rank 0, {} on the others. Values that are not numbers are skipped with a warning.
    """
    gathered = comm.gather(local_name2valcount)
    if comm.rank != 0:
        return {}
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
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


def configure(dir: str | None = None, format_strs: list[str] | None = None, comm=None, log_suffix: str = "") -> None:
    """
    Create a new current logger. The previous one stays open, for code that holds it.

    :param dir: default: $OPENAI_LOGDIR, else a new temporary directory.
    :param format_strs: names for make_output_format(). Default: $OPENAI_LOG_FORMAT or stdout,log,csv on rank 0,
                        $OPENAI_LOG_FORMAT_MPI or log on other ranks. A stdout that neither names shows a line per row
                        on a terminal, instead of a table.
    :param comm: as in Logger.
    :param log_suffix: part of file names; ranks above 0 append "-rank001" etc.
    :raises InputError: for an invalid directory or format name.
    """
    if dir is None:
        now = datetime.datetime.now().strftime("openai-%Y-%m-%d-%H-%M-%S-%f")
        dir = os.environ.get("OPENAI_LOGDIR") or os.path.join(tempfile.gettempdir(), now)
    dir = os.path.expanduser(dir)

    rank = get_rank_without_mpi_import()
    if rank > 0:
        log_suffix += f"-rank{rank:03d}"
    by_default = format_strs is None and _formats_variable(rank) not in os.environ
    names = checked_formats(format_strs)
    try:
        os.makedirs(dir, exist_ok=True)
        outputs = [make_output_format(name, dir, log_suffix, by_default) for name in names]
    except OSError as e:
        raise InputError(f"log_dir {dir}: cannot be a folder for logs ({e.strerror})") from None

    Logger.CURRENT = Logger(dir, outputs, comm)
    log(f"Logging to {dir}")
    Logger.CURRENT.warn_of_damage()
    while Logger.EARLY:
        log(Logger.EARLY.pop(0))


def checked_formats(format_strs: list[str] | None = None) -> list[str]:
    """
    The names of this rank's formats.

    :param format_strs: as in configure().
    :raises InputError: if one is unknown, or its library cannot be imported.
    """
    if format_strs is None:
        rank = get_rank_without_mpi_import()
        names = os.environ.get(_formats_variable(rank), "log" if rank else "stdout,log,csv")
        format_strs = [name.strip() for name in names.split(",")]
    found = [name for name in format_strs if name]
    for name in found:
        check_format(name)
    return found


def _formats_variable(rank):
    return "OPENAI_LOG_FORMAT_MPI" if rank else "OPENAI_LOG_FORMAT"


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None):
    """Use a new logger within a with block; then close it and restore the previous one."""
    before = Logger.CURRENT
    configure(dir, format_strs, comm)
    scoped = Logger.CURRENT
    try:
        yield
    finally:
        scoped.close()
        Logger.CURRENT = before


def reset() -> None:
    """Restore the default logger, and close the current one if it is another."""
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
    Logger.CURRENT = Logger.DEFAULT


def get_current() -> Logger:
    """The current logger, or without one the default logger, configured from the environment."""
    if Logger.CURRENT is None:
        if Logger.DEFAULT is None:
            configure()
            Logger.DEFAULT = Logger.CURRENT
        Logger.CURRENT = Logger.DEFAULT
    return Logger.CURRENT  # type: ignore[return-value]


def logkv(key: str, val: Any) -> None:
    """Set a key's value in the next dump. A 0-dim tensor is read at the dump."""
    get_current().logkv(key, val)


def logkv_mean(key: str, val: Any, count: int = 1) -> None:
    """Add val, a mean of `count` observations, to a key's running mean. A 0-dim tensor is read now."""
    get_current().logkv_mean(key, val, count)


def logkvs(d: dict[str, Any]) -> None:
    for key, val in d.items():
        logkv(key, val)


def dumpkvs() -> dict[str, Any]:
    """Write the values to every output, unless the level is DISABLED; clear them and return a copy."""
    return get_current().dumpkvs()


def getkvs() -> dict[str, Any]:
    """The values for the next dump: the logger's dict, but a copy while a TrainLoop has statistics to add."""
    return get_current().getkvs()


def log(*args, level: int = INFO) -> None:
    """Write the arguments, joined by spaces, as a line of text if the logger's level is at most `level`."""
    get_current().log(*args, level=level)


def note(line: str) -> None:
    """log() a line, or keep it for the first logger: data are opened before a run has a directory."""
    if Logger.CURRENT is not None:
        log(line)
    elif line not in Logger.EARLY:
        Logger.EARLY.append(line)


debug = functools.partial(log, level=DEBUG)
info = functools.partial(log, level=INFO)
warn = functools.partial(log, level=WARN)
error = functools.partial(log, level=ERROR)


def set_level(level: int) -> None:
    get_current().set_level(level)


def set_comm(comm) -> None:
    get_current().set_comm(comm)


def get_dir() -> str:
    return get_current().get_dir()


def get_rank_without_mpi_import() -> int:
    from . import dist_util  # here, since it imports torch

    return dist_util.rank()


record_tabular = logkv
dump_tabular = dumpkvs


@contextlib.contextmanager
def profile_kv(scopename):
    """Add the duration of a with block, in seconds, to the key "wait_" + scopename."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().name2val["wait_" + scopename] += time.perf_counter() - start


def profile(n):
    """Decorate a function so that its calls run under profile_kv(n)."""
    return profile_kv(n)  # a context manager of contextlib is a decorator too
