"""
Key-value logging to the terminal, log.txt, CSV, JSON lines and TensorBoard.

    logger.configure(dir="runs/a")    # or OPENAI_LOGDIR; formats from OPENAI_LOG_FORMAT
    logger.logkv("step", 10)          # the last value of a key wins
    logger.logkv_mean("loss", 0.5)    # the mean over the calls since the last dump
    logger.dumpkvs()                  # one row in every output, then a clean slate
    logger.log("saving model...")     # a line of text

Files are appended to: a run that resumes in an earlier one's directory goes on
with its files, and Logger.drop_from() takes back the rows logged past the
checkpoint. A crash at any moment costs at most one row.
"""

import contextlib
import csv
import datetime
import functools
import io
import json
import math
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict

from .errors import InputError
from .files import write_files

DEBUG = 10
INFO = 20
WARN = 30
ERROR = 40
DISABLED = 50


class KVWriter:
    """An output for rows of values."""

    def writekvs(self, kvs):
        raise NotImplementedError

    def drop_from(self, key, value, unless_above=math.inf):
        """
        Remove the rows whose `key` is a number >= value; none if there is one > unless_above. An output
        that cannot keeps them.
        """

    def close(self):
        """Nothing to close, unless a subclass holds something open."""


class SeqWriter:
    """An output for lines of text."""

    def writeseq(self, seq):
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """
    Boxed tables and lines of text, for reading.

    :param filename_or_file: a path, appended to, or an open text file, which close() leaves open.
    """

    def __init__(self, filename_or_file):
        self.own_file = isinstance(filename_or_file, (str, os.PathLike))
        self.file = open(filename_or_file, "a", encoding="utf-8") if self.own_file else filename_or_file  # noqa: SIM115

    def writekvs(self, kvs):
        rows = []
        for key, val in sorted(_plain(kvs).items(), key=lambda item: item[0].lower()):
            shown = f"{val:<8.3g}" if isinstance(val, float) else str(val)
            rows.append((_shorten(key), _shorten(shown)))
        key_width = max((len(key) for key, _ in rows), default=0)
        val_width = max((len(val) for _, val in rows), default=0)
        rule = "-" * (key_width + val_width + 7)
        lines = [f"| {key:<{key_width}} | {val:<{val_width}} |" for key, val in rows]
        self.writeseq(["\n".join([rule, *lines, rule])])

    def writeseq(self, seq):
        with _one_line_error(getattr(self.file, "name", "the log")):
            self.file.write(" ".join(seq) + "\n")
            self.file.flush()

    def close(self):
        if self.own_file:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object a line, keys in the order they were logged. The file is open only during a write."""

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        _drop_cut_line(self.filename)

    def writekvs(self, kvs):
        _append(self.filename, json.dumps(_plain(kvs), default=str) + "\n")

    def drop_from(self, key, value, unless_above=math.inf):
        with open(self.filename, encoding="utf-8") as f:
            lines = f.readlines()
        kept = _rows_kept(lines, [json.loads(line).get(key) for line in lines], value, unless_above)
        _replace(self.filename, "".join(kept))


class CSVOutputFormat(KVWriter):
    """
    A header, then a row a dump. An existing file's columns go on; a new key becomes a column at the right.

    The file is open only during a write, so that os.replace() never leaves a stale handle.
    """

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        _drop_cut_line(self.filename)
        self.keys, _ = self._read()

    def writekvs(self, kvs):
        kvs = _plain(kvs)
        newcomers = sorted(kvs.keys() - set(self.keys))
        if newcomers:
            _, rows = self._read()
            self._rewrite(self.keys + newcomers, [*rows, kvs])
        else:
            _append(self.filename, _csv_line(kvs, self.keys))

    def drop_from(self, key, value, unless_above=math.inf):
        keys, rows = self._read()
        if key in keys:
            self._rewrite(keys, _rows_kept(rows, [row[key] for row in rows], value, unless_above))

    def _read(self):
        """The columns' names, and the rows as dicts of strings, None where a row ends early."""
        with open(self.filename, newline="", encoding="utf-8") as f:
            reader = csv.DictReader(f)
            return list(reader.fieldnames or []), list(reader)

    def _rewrite(self, keys, rows):
        header = dict(zip(keys, keys, strict=True))
        _replace(self.filename, "".join(_csv_line(row, keys) for row in [header, *rows]))
        self.keys = keys


class TensorBoardOutputFormat(KVWriter):
    """
    Scalars in an event file in dir; values that are not numbers are left out.

    A row's step is its "step" where it has one, else one more than the last row's, from 1.

    :raises InputError: a ValueError, if TensorBoard is not installed.
    """

    def __init__(self, dir):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise InputError(
                "OPENAI_LOG_FORMAT tensorboard needs the extra: pip install improved-diffusion[tensorboard]"
            ) from e
        self.writer = SummaryWriter(dir)
        self.step = 0

    def writekvs(self, kvs):
        kvs = _plain(kvs)
        self.step = int(kvs.get("step", self.step + 1))
        for key, val in kvs.items():
            if isinstance(val, (int, float)):
                self.writer.add_scalar(key, val, self.step)
        self.writer.flush()

    def close(self):
        self.writer.close()


FILE_FORMATS = {  # name: writer, and its file's name around the suffix
    "log": (HumanOutputFormat, "log{}.txt"),
    "csv": (CSVOutputFormat, "progress{}.csv"),
    "json": (JSONOutputFormat, "progress{}.json"),
    "tensorboard": (TensorBoardOutputFormat, "tb{}"),
}


def make_output_format(format, ev_dir, log_suffix=""):
    """
    Open the output called "stdout" or as in FILE_FORMATS, in the directory ev_dir, made if need be.

    :raises InputError: a ValueError, for any other name, or if the format's library is missing.
    """
    _check_format(format)
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout)
    writer, name = FILE_FORMATS[format]
    return writer(os.path.join(ev_dir, name.format(log_suffix)))


def _check_format(name):
    if name != "stdout" and name not in FILE_FORMATS:
        raise InputError(f"unknown log format {name!r}: not one of stdout, {', '.join(FILE_FORMATS)}")


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
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        self.name2val[key] = val
        self.name2cnt.pop(key, None)  # a mean begun under this key goes with its value

    def logkv_mean(self, key, val, count=1):
        if count == 0:
            return  # the mean of nothing may be NaN, and NaN * 0 is NaN
        before = self.name2cnt[key]
        total = self.name2cnt[key] = before + count
        old = self.name2val[key] * before / total if before else 0.0
        self.name2val[key] = old + float(val) * count / total

    def dumpkvs(self):
        # tensors become numbers only here: reading one waits for the device
        row = _plain(self.name2val)
        if self.comm is not None:
            row = mpi_weighted_mean(self.comm, {k: (v, self.name2cnt.get(k, 1)) for k, v in row.items()})
        if row and self.level != DISABLED:
            for fmt in self._kv_writers():
                fmt.writekvs(row)
        self.name2val.clear()
        self.name2cnt.clear()
        return row

    def drop_from(self, key, value, unless_above=math.inf):
        """KVWriter.drop_from() of every output."""
        for fmt in self._kv_writers():
            fmt.drop_from(key, value, unless_above)

    def log(self, *args, level=INFO):
        if self.level <= level:
            for fmt in self.output_formats:
                if isinstance(fmt, SeqWriter):
                    fmt.writeseq([str(arg) for arg in args])

    def set_level(self, level):
        self.level = level

    def set_comm(self, comm):
        self.comm = comm

    def get_dir(self):
        return self.dir

    def close(self):
        for fmt in self.output_formats:
            fmt.close()

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
    Make a new current logger. The one before stays open, for whoever still holds it.

    :param dir: default $OPENAI_LOGDIR, else a new directory among the system's temporary ones.
    :param format_strs: a list of names, see make_output_format(); default $OPENAI_LOG_FORMAT (commas
        between) or stdout,log,csv on rank 0, $OPENAI_LOG_FORMAT_MPI or log on the others.
    :param comm: as in Logger.
    :param log_suffix: goes into file names; ranks above 0 add "-rank001" and so on.
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
        _check_format(name)
    try:
        os.makedirs(dir, exist_ok=True)
        outputs = [make_output_format(name, dir, log_suffix) for name in format_strs if name]
    except OSError as e:
        raise InputError(f"OPENAI_LOGDIR {dir}: cannot be made a folder for logs ({e.strerror})") from None

    Logger.CURRENT = Logger(dir, outputs, comm)
    log(f"Logging to {dir}")


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
    return get_current().name2val


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
    return profile_kv(n)  # contextlib's context managers decorate, timing each call anew


def _plain(kvs):
    """A copy of a dict with numpy scalars and one-element tensors as Python floats."""

    def plain(val):
        if not hasattr(val, "dtype") or math.prod(val.shape) != 1:
            return val
        item = val.item()
        return float(item) if isinstance(item, (int, float)) else item

    return {key: plain(val) for key, val in kvs.items()}


def _rows_kept(rows, values, least, unless_above):
    """The rows whose value is not a number >= least; all of them if there is a number > unless_above."""
    numbers = [_number(value) for value in values]
    if any(number > unless_above for number in numbers):
        return rows
    return [row for row, number in zip(rows, numbers, strict=True) if not number >= least]


def _number(val):
    """val as a float; NaN, which is >= nothing, where it is no number."""
    try:
        return float(val)
    except (TypeError, ValueError):
        return math.nan


def _shorten(text):
    return text if len(text) <= 30 else text[:27] + "..."


def _csv_line(row, keys):
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([row.get(key, "") for key in keys])
    # a row that breaks inside a value and is cut there by a crash would pass for a whole one
    return " ".join(text.getvalue().splitlines()) + "\n"


@contextlib.contextmanager
def _one_line_error(path):
    try:
        yield
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


def _append(path, text):
    with _one_line_error(path), open(path, "a", newline="", encoding="utf-8") as f:
        f.write(text)


def _drop_cut_line(path):
    """Take off a last line without its newline, which a crash cut short. Makes the file if there is none."""
    with open(path, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)


def _replace(path, text):
    directory, name = os.path.split(path)
    write_files(directory, {name: lambda f: f.write(text.encode())})
