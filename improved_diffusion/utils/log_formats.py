"""
Outputs of the logger: the terminal, log.txt, CSV, JSON lines, TensorBoard, Weights & Biases.

Files are appended to. A crash at any moment costs at most one row.
"""

import collections
import contextlib
import importlib
import io
import json
import math
import os
import re
import secrets
import sys
import threading
from collections.abc import Callable
from typing import Any

from . import row_files
from .errors import InputError, first_line
from .streams import printable, silence


class StreamEnded(InputError):
    """
    An output outside this machine's files, such as stdout or W&B, accepts no more. Logger drops it and the run
    continues.
    """


class KVWriter:
    """An output for rows of values."""

    damage: str | None = None  # damage found in an existing file, until it is logged

    def writekvs(self, kvs: dict[str, Any]) -> None:
        raise NotImplementedError

    def drop_from(self, key: str, value: float, unless_above: float = math.inf) -> None:
        """Remove the rows whose `key` is a number >= value, unless one of them is > unless_above."""

    def writeimage(self, key: str, pixels: Any, step: int) -> None:
        """Show a picture, uint8 [h, w, 1 or 3]. By default ignored."""

    def writeconfig(self, config: dict[str, Any]) -> None:
        """Show the options of the run, plain values. By default ignored."""

    def close(self) -> None:
        """Close open files. By default there are none."""


class SeqWriter:
    """An output for lines of text."""

    def writeseq(self, seq: list[str]) -> None:
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """
    Boxed tables and lines of text, with control characters escaped.

    :param filename_or_file: a path to append to, or an open text file, which close() leaves open.
    :raises StreamEnded: from writes, if the open file fails; InputError if the file at the path does.
    """

    def __init__(self, filename_or_file):
        self.own_file = isinstance(filename_or_file, (str, os.PathLike))
        self.file = open(filename_or_file, "a", encoding="utf-8") if self.own_file else filename_or_file  # noqa: SIM115

    def writekvs(self, kvs):
        rows = []
        for key, val in sorted(plain(kvs).items(), key=lambda item: item[0].lower()):
            shown = f"{val:<8.3g}" if isinstance(val, float) else str(val)
            rows.append((_shorten(printable(key)), _shorten(printable(shown))))
        key_width = max((len(key) for key, _ in rows), default=0)
        val_width = max((len(val) for _, val in rows), default=0)
        rule = "-" * (key_width + val_width + 7)
        lines = [f"| {key:<{key_width}} | {val:<{val_width}} |" for key, val in rows]
        self.writeseq(["\n".join([rule, *lines, rule])])

    def writeseq(self, seq):
        encoding = getattr(self.file, "encoding", None) or "utf-8"
        # file names may hold bytes that are not text
        text = (printable(" ".join(seq), lines=True) + "\n").encode(encoding, "backslashreplace").decode(encoding)
        try:
            tqdm = None if self.own_file else sys.modules.get("tqdm")  # clears its bar around text on the same stream
            with tqdm.tqdm.external_write_mode(self.file) if tqdm else contextlib.nullcontext():
                self.file.write(text)
                self.file.flush()
        except (OSError, ValueError) as e:  # ValueError for a closed file
            if self.file in (sys.stdout, sys.stderr):
                silence(self.file)
            kind = InputError if self.own_file else StreamEnded
            raise kind(f"{getattr(self.file, 'name', 'the log')}: cannot be written ({first_line(e)})") from None

    def close(self):
        if self.own_file:
            self.file.close()


class LineOutputFormat(HumanOutputFormat):
    """A row as one line, for a terminal: the step, and the values without those of quarters of the timesteps."""

    def writekvs(self, kvs):
        kvs = plain(kvs)
        keys = [key for key in sorted(kvs, key=str.lower) if not re.fullmatch(r"step|samples|.*_q\d", key)]
        cells = [f"{key} {kvs[key]:.3g}" if isinstance(kvs[key], float) else f"{key} {kvs[key]}" for key in keys or kvs]
        step = f"step {kvs['step']}: " if "step" in kvs and keys else ""
        self.writeseq([step + ", ".join(cells)])


class JSONOutputFormat(KVWriter):
    """One JSON object per line, keys in order of logging. The file is open only during a write."""

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        row_files.drop_cut_line(self.filename)

    def writekvs(self, kvs):
        row_files.append(self.filename, json.dumps(plain(kvs), default=str) + "\n")

    def drop_from(self, key, value, unless_above=math.inf):
        """Drop damaged lines too."""
        lines = row_files.lines(self.filename)
        rows = {line: row for line in lines if (row := row_files.json_object(line)) is not None}
        whole = [line for line in lines if line in rows]
        if len(whole) < len(lines):
            self.damage = row_files.set_aside(self.filename, len(lines) - len(whole))
        kept = row_files.rows_kept(whole, [rows[line].get(key) for line in whole], value, unless_above)
        row_files.replace(self.filename, b"".join(line + b"\n" for line in kept))


# Unknown to the original, whose clients may count columns from the left.
LAST_COLUMNS = ("clipped", "images/s", "valid_", "FD-", "FID", "KID", "sFID")


class CSVOutputFormat(KVWriter):
    """
    A header, then a row per dump. Columns keep their order; new keys are appended as columns, but before the last ones
    that begin as one of LAST_COLUMNS.

    The file is open only during a write, so os.replace() leaves no stale handle. Damaged lines of an existing file are
    dropped, after a copy of the file.
    """

    def __init__(self, filename):
        self.filename = os.path.abspath(filename)
        row_files.drop_cut_line(self.filename)
        self.keys, _ = self._read()

    def writekvs(self, kvs):
        kvs = plain(kvs)
        newcomers = sorted(kvs.keys() - set(self.keys))
        if newcomers:
            _, rows = self._read()
            rows = [dict(zip(self.keys, row, strict=False)) for row in rows]  # a row may be shorter
            self._rewrite(_with_columns(self.keys, newcomers), [*rows, kvs])
        else:
            row_files.append(self.filename, row_files.csv_line(kvs, self.keys))

    def drop_from(self, key, value, unless_above=math.inf):
        keys, rows = self._read()
        if key in keys:
            i = keys.index(key)
            values = [row[i] if i < len(row) else None for row in rows]
            self._rewrite(keys, row_files.rows_kept(rows, values, value, unless_above))

    def _read(self):
        """The names of the columns, and the rows as lists of cells, possibly shorter than the header."""
        lines = row_files.lines(self.filename)
        if not lines:
            return [], []
        header, *rows = map(row_files.csv_cells, lines)
        # a damaged header keeps its readable names
        keys = lines[0].decode(errors="replace").replace("\0", "?").split(",") if header is None else header
        # most rows have the same length; a shorter header has lost a comma
        usual = collections.Counter(len(row) for row in rows if row is not None).most_common(1)
        keys = keys + [f"column {i + 1}" for i in range(len(keys), usual[0][0] if usual else 0)]
        whole = [row for row in rows if row is not None and len(row) <= len(keys)]
        damaged = len(rows) - len(whole) + (keys != header)
        if damaged:
            self.damage = row_files.set_aside(self.filename, damaged)
            self._rewrite(keys, whole)
        return keys, whole

    def _rewrite(self, keys, rows):
        row_files.replace(self.filename, "".join(row_files.csv_line(row, keys) for row in [keys, *rows]).encode())
        self.keys = keys


def _with_columns(keys, newcomers):
    end = len(keys)
    while end and keys[end - 1].startswith(LAST_COLUMNS):
        end -= 1
    return keys[:end] + sorted(keys[end:] + newcomers, key=lambda key: key.startswith(LAST_COLUMNS))


class TensorBoardOutputFormat(KVWriter):
    """
    Scalars in an event file in dir; other values are skipped. A row's step is its "step", else the previous one + 1.

    :raises InputError: if TensorBoard is not installed; from writes, if the event file cannot be written.
    """

    def __init__(self, dir):
        library = _library("tensorboard")
        _silence_writer_threads()
        self.dir = dir
        self.writer = library.SummaryWriter(dir)
        self.step = 0

    def writekvs(self, kvs):
        kvs = plain(kvs)
        self.step = int(kvs.get("step", self.step + 1))
        with self._written():
            for key, val in kvs.items():
                if isinstance(val, (int, float)):
                    self.writer.add_scalar(key, val, self.step)
            self.writer.flush()

    def writeimage(self, key, pixels, step):
        with self._written():
            self.writer.add_image(key, pixels, step, dataformats="HWC")
            self.writer.flush()

    def close(self):
        with self._written():
            self.writer.close()

    @contextlib.contextmanager
    def _written(self):
        try:
            yield
        except OSError as e:
            raise InputError(f"{self.dir}: cannot be written ({e.strerror})") from None


def _silence_writer_threads():
    """No traceback on stderr from TensorBoard's threads: their error is raised again by the next flush."""
    hook = threading.excepthook
    if getattr(hook, "silences_tensorboard", False):
        return

    def quiet(args):
        if not type(args.thread).__module__.startswith("tensorboard"):
            hook(args)

    quiet.silences_tensorboard = True  # type: ignore[attr-defined]
    threading.excepthook = quiet


class WandbOutputFormat(KVWriter):
    """
    Weights & Biases: scalars, pictures and options, by their step. A resumed run continues the same W&B run, and shows
    the rows after its checkpoint twice.

    WANDB_MODE=offline, WANDB_PROJECT, WANDB_NAME and the other variables of wandb apply.

    :param id_path: file with the id of the W&B run, written by a new one. wandb's own files go beside it.
    :raises InputError: if wandb is not installed or cannot start, such as without an API key.
    :raises StreamEnded: from writes, if wandb fails: training does not depend on it.
    """

    def __init__(self, id_path):
        self.wandb, self.step = _library("wandb"), 0
        folder = os.path.dirname(os.path.abspath(id_path))
        with self._reported(InputError, (self.wandb.Error, OSError)):
            self.run = self.wandb.init(
                project=os.environ.get("WANDB_PROJECT", "improved-diffusion"),
                name=os.environ.get("WANDB_NAME", os.path.basename(folder)),
                dir=folder,
                id=_run_id(id_path),
                resume="allow",
                reinit="create_new",  # another logger may have a run of its own
                settings={"console": "off"},  # else wandb replaces stdout
            )
            self.run.define_metric("*", step_metric="step")  # unlike wandb's own, this may fall when a run is resumed

    def writekvs(self, kvs):
        kvs = plain(kvs)
        self.step = int(kvs.get("step", self.step + 1))
        scalars = {key: val for key, val in kvs.items() if isinstance(val, (int, float))}
        with self._reported():
            self.run.log({**scalars, "step": self.step})

    def writeimage(self, key, pixels, step):
        with self._reported():
            self.run.log({key: self.wandb.Image(pixels), "step": step})

    def writeconfig(self, config):
        with self._reported():
            self.run.config.update(config, allow_val_change=True)

    def close(self):
        with self._reported():
            self.run.finish()

    @contextlib.contextmanager
    def _reported(self, kind=StreamEnded, errors=Exception):  # those of its service are not all wandb.Error
        try:
            yield
        except errors as e:
            raise kind(f"OPENAI_LOG_FORMAT wandb: {first_line(e)}") from None


def _run_id(path):
    """The id in a file, which is written if it is missing."""
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8", errors="replace") as f:
        if not re.fullmatch(r"[\w-]+", found := f.read().strip()):
            raise InputError(f"{path}: not the id of a W&B run; delete it to begin another one")
        return found
    new = secrets.token_hex(4)
    row_files.replace(path, new.encode())
    return new


FILE_FORMATS: dict[str, tuple[Callable[[str], Any], str]] = {  # name: (writer, file name with the suffix)
    "log": (HumanOutputFormat, "log{}.txt"),
    "csv": (CSVOutputFormat, "progress{}.csv"),
    "json": (JSONOutputFormat, "progress{}.json"),
    "tensorboard": (TensorBoardOutputFormat, "tb{}"),
    "wandb": (WandbOutputFormat, "wandb-id{}.txt"),
}
LIBRARIES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def make_output_format(format: str, ev_dir: str, log_suffix: str = "", lines: bool = False):
    """
    Open "stdout" or one of FILE_FORMATS in the directory ev_dir, which is created.

    :param lines: if stdout is a terminal, show a line per row instead of a table.
    :raises InputError: for any other name, or if the format's library is missing.
    """
    check_format(format)
    os.makedirs(ev_dir, exist_ok=True)
    if format == "stdout":
        stream = sys.stdout or io.StringIO()  # None if closed before Python started
        notebook = type(stream).__module__.startswith("ipykernel.")  # its cells are no terminal, but narrow
        on_a_terminal = notebook or getattr(stream, "isatty", bool)()  # what replaces stdout may have only write()
        return LineOutputFormat(stream) if lines and on_a_terminal else HumanOutputFormat(stream)
    writer, name = FILE_FORMATS[format]
    return writer(os.path.join(ev_dir, name.format(log_suffix)))


def check_format(name: str) -> None:
    """:raises InputError: if `name` is not an output format, or its library cannot be imported."""
    if name != "stdout" and name not in FILE_FORMATS:
        raise InputError(f"unknown log format {name!r}: not one of stdout, {', '.join(FILE_FORMATS)}")
    if name in LIBRARIES:
        _library(name)


def _library(format):
    try:
        return importlib.import_module(LIBRARIES[format])
    except ImportError as e:
        install = f"pip install '.[{format}]'"
        raise InputError(f"OPENAI_LOG_FORMAT {format} needs {LIBRARIES[format]}: {install}") from e


def plain(kvs: dict[str, Any]) -> dict[str, Any]:
    """Copy a dict, with numpy scalars and one-element tensors as Python floats."""

    def unwrapped(val):
        if not hasattr(val, "dtype") or math.prod(val.shape) != 1:
            return val
        item = val.item()
        return float(item) if isinstance(item, (int, float)) else item

    return {key: unwrapped(val) for key, val in kvs.items()}


def _shorten(text):
    return text if len(text) <= 30 else text[:27] + "..."
