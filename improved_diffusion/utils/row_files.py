"""
Files of rows, as CSV or JSON lines, that survive a crash: a row is appended by one write, a cut-off or damaged line is
recognized, and a file is rewritten whole or not at all.
"""

import csv
import io
import itertools
import json
import math
import os
from collections.abc import Sequence
from typing import Any, TypeVar

from .errors import InputError
from .files import write_files

Row = TypeVar("Row")


# ---------------------------------------------------------------- files


def append(path: str, text: str) -> None:
    """:raises InputError: if the file cannot be written."""
    try:
        with open(path, "a", newline="", encoding="utf-8") as f:
            f.write(text)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({e.strerror})") from None


def lines(path: str) -> list[bytes]:
    """The non-empty lines of a file."""
    with open(path, "rb") as f:
        return [line for line in f.read().split(b"\n") if line.strip()]


def drop_cut_line(path: str) -> None:
    """Remove a last line without newline, cut off by a crash. Create the file if it is missing."""
    with open(path, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)


def set_aside(path: str, count: int) -> str:
    """Copy a file with `count` damaged lines; return a message about it."""
    names = (f"{path}.damaged{i if i > 1 else ''}" for i in itertools.count(1))
    copy = next(name for name in names if not os.path.lexists(name))
    with open(path, "rb") as f:
        replace(copy, f.read())
    return f"{path}: {count} damaged line{'s' if count > 1 else ''} dropped; the damaged file is kept as {copy}"


def replace(path: str, content: bytes) -> None:
    """Write a file, whole or not at all."""
    directory, name = os.path.split(path)
    write_files(directory, {name: lambda f: f.write(content)})


# ---------------------------------------------------------------- rows


def csv_line(row: list | dict[str, Any], keys: Sequence[str]) -> str:
    """:param row: cells, possibly fewer than the keys; or {key: cell}."""
    if isinstance(row, dict):
        row = [row.get(key, "") for key in keys]
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow([*row, *[""] * (len(keys) - len(row))])
    # a crash within a multi-line value would leave what looks like a whole row
    return " ".join(text.getvalue().splitlines()) + "\n"


def csv_cells(line: bytes) -> list[str] | None:
    """The cells of a line; None if it is damaged."""
    try:
        rows = list(csv.reader([line.decode()], strict=True))
    except (UnicodeDecodeError, csv.Error):
        return None
    return rows[0] if len(rows) == 1 and "\0" not in "".join(rows[0]) else None


def json_object(line: bytes) -> dict[str, Any] | None:
    """The object in a line; None if it is damaged."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def rows_kept(rows: list[Row], values: list[Any], least: float, unless_above: float) -> list[Row]:
    """The rows whose value is not a number >= least; all rows if any value is > unless_above."""
    numbers = list(map(number, values))
    if any(n > unless_above for n in numbers):
        return rows
    return [row for row, n in zip(rows, numbers, strict=True) if not n >= least]


def number(value: Any) -> float:
    """As a float; NaN, which is never >= a number, if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan
