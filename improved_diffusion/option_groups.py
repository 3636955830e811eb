"""
What an option is: a field of a frozen dataclass, with a default, help, and its valid values as data.

    @dataclass(frozen=True)
    class DataOptions(Group):
        title = "data"
        num_workers: int = option(-1, "processes that decode", minimum=-1)

    rows(DataOptions)  # for parsers, checks and documents
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Any

from .utils.errors import InputError


@dataclass(frozen=True)
class Valid:
    """
    The valid values of an option.

    :param above, below: exclusive bounds.
    :param several: the value is a str of numbers separated by commas, each within the bounds.
    :param required: "" is invalid; describes what to give.
    :param words: str values that are valid too.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    choices: tuple = ()
    several: bool = False
    required: str = ""
    words: tuple[str, ...] = ()

    def accepts(self, value: Any) -> bool:
        """Whether the value is valid. None, for no value, is."""
        if isinstance(value, str) and self.words:
            return value in self.words
        if self.several:
            try:
                return all(self._in_range(float(v)) for v in str(value).split(","))
            except ValueError:
                return False
        if self.required:
            return value != ""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        return value is None or (value in self.choices if self.choices else self._in_range(value))

    def _in_range(self, value):
        # NaN is in no range, since it compares False
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self):
        if self.required or self.choices:
            return self.required or " or ".join(map(str, self.choices))
        least = "{}" if self.maximum is not None else "{} or more," if self.below is not None else "{} or more"
        bounds = {least: self.minimum, "more than {}": self.above, "to {}": self.maximum, "below {}": self.below}
        text = " ".join(words.format(bound) for words, bound in bounds.items() if bound is not None)
        text = " or ".join([text, *self.words])
        return f"{text}, or several separated by commas" if self.several else text


def option(default, help, path=False, **valid) -> Any:
    """A row: a dataclass field with help and Valid values."""
    metadata = {"help": help, "path": path, "valid": Valid(**valid) if valid else None}
    return dataclasses.field(default=default, metadata=metadata)


def path_option(help, **valid) -> Any:
    """A row of a local path or URL. The default is ""."""
    return option("", help, path=True, **valid)


@dataclass(frozen=True)
class Option:
    """A row, for parsers and documents."""

    name: str
    type: type
    default: Any
    group: str
    help: str
    path: bool
    valid: Valid | None


class Group:
    """Base class of the groups. :raises InputError: naming an option with an invalid value."""

    title: typing.ClassVar[str]

    def __post_init__(self):
        for row in rows(type(self)):
            check(row, getattr(self, row.name))


def check(row: Option, value) -> None:
    """:raises InputError: if the value is invalid for the option."""
    if row.valid is not None and not row.valid.required and not row.valid.accepts(value):
        raise InputError(f"{row.name} {value}: give {row.valid}")


KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def coerce(row: Option, value: Any) -> Any:
    """
    A value from Python or JSON as the option's type: 1e4 or numpy's integers for an int, 1 for a float.

    :raises InputError: for a value of another type.
    """
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # of numpy or torch
    words = row.valid.words if row.valid is not None else ()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if type(value) is row.type or value in words or (value is None and row.default is None):
        return value
    if row.type is float and number:
        return float(value)
    if row.type is int and number and value.is_integer():
        return int(value)
    raise InputError(f"{row.name} {value!r}: give {' or '.join([KINDS[row.type], *words])}")


def rows(group: Any) -> tuple[Option, ...]:
    """The options of a Group, or of all groups in a ScriptOptions class, in order of declaration."""
    found: list[Option] = []
    for field in dataclasses.fields(group):
        if isinstance(field.type, type) and issubclass(field.type, Group):
            found += rows(field.type)
            continue
        kinds = [kind for kind in typing.get_args(field.type) if kind is not type(None)]  # of int | None
        kind: Any = kinds[0] if kinds else field.type  # the first of int | str
        found.append(Option(field.name, kind, field.default, group.title, **field.metadata))
    return tuple(found)
