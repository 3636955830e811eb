"""
What rows of values and lines of text are written to: the terminal, log.txt, CSV, JSON lines, TensorBoard.

Files are appended to, and a crash at any moment costs at most one row.
"""

import collections
import contextlib
import csv
import io
import itertools
import json
import math
import os
import sys

from .errors import InputError, first_line
from .files import write_files
from .streams import silence


class StreamEnded(InputError):
    """An open stream, such as stdout, takes no more text. The run can do without it; Logger drops it."""


class KVWriter:
    """An output for rows of values."""

    damage = None  # what was wrong with an existing file, until it is logged

    def writekvs(self, kvs):
        raise NotImplementedError

    def drop_from(self, key, value, unless_above=math.inf):
        """Remove the rows whose `key` is a number >= value; none if there is one > unless_above."""

    def writeimage(self, key, pixels, step):
        """Show a picture, uint8 [h, w, 1 or 3], where the output can."""

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
    :raises StreamEnded: from writes, if the open file takes no more; InputError if the path does not.
    """

    def __init__(self, filename_or_file):
        self.own_file = isinstance(filename_or_file, (str, os.PathLike))
        self.file = open(filename_or_file, "a", encoding="utf-8") if self.own_file else filename_or_file  # noqa: SIM115

    def writekvs(self, kvs):
        rows = []
        for key, val in sorted(plain(kvs).items(), key=lambda item: item[0].lower()):
            shown = f"{val:<8.3g}" if isinstance(val, float) else str(val)
            rows.append((_shorten(key), _shorten(shown)))
        key_width = max((len(key) for key, _ in rows), default=0)
        val_width = max((len(val) for _, val in rows), default=0)
        rule = "-" * (key_width + val_width + 7)
        lines = [f"| {key:<{key_width}} | {val:<{val_width}} |" for key, val in rows]
        self.writeseq(["\n".join([rule, *lines, rule])])

    def writeseq(self, seq):
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        # names of files may be no text; what cannot be shown is escaped
        text = (" ".join(seq) + "\n").encode(encoding, "backslashreplace").decode(encoding)
        try:
            with self._beside_a_bar():
                self.file.write(text)
                self.file.flush()
        except (OSError, ValueError) as e:  # the second for a file that is closed
            if self.file in (sys.stdout, sys.stderr):
                silence(self.file)
            kind = InputError if self.own_file else StreamEnded
            raise kind(f"{getattr(self.file, 'name', 'the log')}: cannot be written ({first_line(e)})") from None

    def _beside_a_bar(self):
        """A progress bar on the same terminal makes room for the text."""
        tqdm = sys.modules.get("tqdm")
        return tqdm.tqdm.external_write_mode(self.file) if tqdm and not self.own_file else contextlib.nullcontext()

    def close(self):
        if self.own_file:
            self.file.close()


class JSONOutputFormat(KVWriter):
    """One JSON object per line, keys in the order of logging. The file is open only during a write."""

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        _drop_cut_line(self.filename)

    def writekvs(self, kvs):
        _append(self.filename, json.dumps(plain(kvs), default=str) + "\n")

    def drop_from(self, key, value, unless_above=math.inf):
        """Lines that are no JSON objects go too."""
        lines = _lines(self.filename)
        rows = [_json_object(line) for line in lines]
        whole = [(line, row) for line, row in zip(lines, rows, strict=True) if row is not None]
        if len(whole) < len(lines):
            self.damage = _set_aside(self.filename, len(lines) - len(whole))
        kept = _rows_kept([line for line, _ in whole], [row.get(key) for _, row in whole], value, unless_above)
        _replace(self.filename, b"".join(line + b"\n" for line in kept))


class CSVOutputFormat(KVWriter):
    """
    A header, then a row per dump. An existing file's columns stay; a new key becomes a column at the right.

    The file is open only during a write, so that os.replace() never leaves a stale handle. Damaged lines of an existing
    file are dropped; a copy of the file is kept beside it.
    """

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        _drop_cut_line(self.filename)
        self.keys, _ = self._read()

    def writekvs(self, kvs):
        kvs = plain(kvs)
        newcomers = sorted(kvs.keys() - set(self.keys))
        if newcomers:
            _, rows = self._read()
            self._rewrite(self.keys + newcomers, [*rows, kvs])
        else:
            _append(self.filename, _csv_line(kvs, self.keys))

    def drop_from(self, key, value, unless_above=math.inf):
        keys, rows = self._read()
        if key in keys:
            i = keys.index(key)
            values = [row[i] if i < len(row) else None for row in rows]
            self._rewrite(keys, _rows_kept(rows, values, value, unless_above))

    def _read(self):
        """The columns' names, and the rows as lists of cells; a row may end early."""
        lines = _lines(self.filename)
        if not lines:
            return [], []
        header, *rows = map(_csv_cells, lines)
        # of a damaged header, the names that are left
        keys = lines[0].decode(errors="replace").replace("\0", "?").split(",") if header is None else header
        # most rows are whole and of one length: where they are longer than the header, it has lost a comma
        usual = collections.Counter(len(row) for row in rows if row is not None).most_common(1)
        keys = keys + [f"column {i + 1}" for i in range(len(keys), usual[0][0] if usual else 0)]
        whole = [row for row in rows if row is not None and len(row) <= len(keys)]
        damaged = len(rows) - len(whole) + (keys != header)
        if damaged:
            self.damage = _set_aside(self.filename, damaged)
            self._rewrite(keys, whole)
        return keys, whole

    def _rewrite(self, keys, rows):
        _replace(self.filename, "".join(_csv_line(row, keys) for row in [keys, *rows]).encode())
        self.keys = keys


class TensorBoardOutputFormat(KVWriter):
    """
    Scalars in an event file in dir; values that are not numbers are left out.

    A row's step is its "step", else the last row's plus one.

    :raises InputError: if TensorBoard is not installed.
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
        kvs = plain(kvs)
        self.step = int(kvs.get("step", self.step + 1))
        for key, val in kvs.items():
            if isinstance(val, (int, float)):
                self.writer.add_scalar(key, val, self.step)
        self.writer.flush()

    def writeimage(self, key, pixels, step):
        self.writer.add_image(key, pixels, step, dataformats="HWC")
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
    Open the output "stdout", or one of FILE_FORMATS in the directory ev_dir, which is created.

    :raises InputError: (a ValueError) for any other name, or if the format's library is missing.
    """
    check_format(format)
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        return HumanOutputFormat(sys.stdout or io.StringIO())  # None if it was closed before Python began
    writer, name = FILE_FORMATS[format]
    return writer(os.path.join(ev_dir, name.format(log_suffix)))


def check_format(name):
    if name != "stdout" and name not in FILE_FORMATS:
        raise InputError(f"unknown log format {name!r}: not one of stdout, {', '.join(FILE_FORMATS)}")


def plain(kvs):
    """A copy of a dict with numpy scalars and one-element tensors as Python floats."""

    def unwrapped(val):
        if not hasattr(val, "dtype") or math.prod(val.shape) != 1:
            return val
        item = val.item()
        return float(item) if isinstance(item, (int, float)) else item

    return {key: unwrapped(val) for key, val in kvs.items()}


def _rows_kept(rows, values, least, unless_above):
    """The rows whose value is not a number >= least; all of them if there is a number > unless_above."""
    numbers = [number(value) for value in values]
    if any(number > unless_above for number in numbers):
        return rows
    return [row for row, number in zip(rows, numbers, strict=True) if not number >= least]


def number(val):
    """val as a float; NaN, which is >= nothing, where it is no number."""
    try:
        return float(val)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _shorten(text):
    return text if len(text) <= 30 else text[:27] + "..."


def _csv_line(row, keys):
    """:param row: a list of cells, or a dict."""
    if isinstance(row, dict):
        row = [row.get(key, "") for key in keys]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*row, *[""] * (len(keys) - len(row))])
    # a crash inside a value with line breaks would leave a line that passes for a whole row
    return " ".join(text.getvalue().splitlines()) + "\n"


def _csv_cells(line):
    """The cells in a line of bytes, None if it is damaged."""
    try:
        rows = list(csv.reader([line.decode()], strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    return rows[0] if len(rows) == 1 and "\0" not in "".join(rows[0]) else None


def _json_object(line):
    """The object in a line of bytes, None if there is none."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _append(path, text):
    try:
        with open(path, "a", newline="", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


def _drop_cut_line(path):
    """Take off a last line without its newline, which a crash cut short. Makes the file if there is none."""
    with open(path, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)


def _lines(path):
    """The lines of a file, as bytes, without empty ones."""
    with open(path, "rb") as f:
        return [line for line in f.read().split(b"\n") if line.strip()]


def _set_aside(path, count):
    """Keep a copy of a file with `count` damaged lines; return a line about it."""
    names = itertools.chain([path + ".damaged"], (f"{path}.damaged{i}" for i in itertools.count(2)))
    copy = next(name for name in names if not os.path.lexists(name))
    with open(path, "rb") as f:
        _replace(copy, f.read())
    return f"{path}: {count} damaged line{'s' if count > 1 else ''} dropped; the file as it was is {copy}"


def _replace(path, content):
    directory, name = os.path.split(path)
    write_files(directory, {name: lambda f: f.write(content)})
