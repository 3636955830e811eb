"""
config.json: the flags of a run, in its folder.

    {"script": "image_train", "flags": {"image_size": 64, ...}, "class_names": ["cat", "dog"] or null}

A safetensors file has the same text in its metadata, as "config".
"""

import json
import math
from typing import Any

import blobfile as bf

from ..option_groups import Option, check, coerce, rows
from ..options import ScriptOptions
from ..utils import safe_tensors
from ..utils.errors import InputError

CONFIG = "config.json"
CONVERT_AGAIN = "convert the weights again"
OF_ITS_RUN = ("resume_checkpoint",)  # flags that a new run does not take from another's file


def read_config(directory: str) -> dict[str, Any] | None:
    """The config.json of a folder; None if there is none. :raises InputError: if it is damaged."""
    path = bf.join(directory, CONFIG)
    if not bf.exists(path):
        return None
    return _read(path, "delete it, and give the flags instead")


def config_of(weights: str) -> tuple[dict[str, Any] | None, str]:
    """
    The config of a file of weights: in the metadata of safetensors, else config.json beside it.

    :return: (the config, None if there is none, the path of the file that has it).
    :raises InputError: if it is damaged.
    """
    text = safe_tensors.read_metadata(weights).get("config") if weights.endswith(safe_tensors.ENDING) else None
    if text is not None:  # the folder may be of another run
        return _parse(text, weights, CONVERT_AGAIN), weights
    return read_config(bf.dirname(weights)), bf.join(bf.dirname(weights), CONFIG)


def flags_of_another(path: str, options: ScriptOptions) -> dict[str, Any]:
    """
    The values in the config.json of another run, as defaults of a new one.

    :param path: the file, or its folder.
    :param options: of the new run's script.
    :raises InputError: if the file is missing, damaged, of another script, or has an invalid value.
    """
    known = {row.name: row for row in rows(type(options))}
    own = {row.name for row in rows(type(options.general))}
    path = bf.join(path, CONFIG) if bf.isdir(path) else path
    values = {name: value for name, value in _read(path)["flags"].items() if name not in (*OF_ITS_RUN, *own)}
    if unknown := sorted(values.keys() - known.keys()):
        raise InputError(f"{path}: {', '.join(unknown)}: no flag of this script; use the script of that run")
    return {name: checked(path, known[name], value) for name, value in values.items()}


def checked(path: str, row: Option, value: Any, advice: str = "") -> Any:
    """A value of a config as the option's type. :raises InputError: if it is invalid, ending in the advice."""
    try:
        value = coerce(row, value)
        check(row, value)
    except InputError as e:
        raise InputError(f"{path}: {e}{advice}") from None
    return value


def _read(path, advice="give the config.json of a run"):
    try:
        with bf.BlobFile(path, "rb") as f:
            text = f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file; {advice}") from None
    except OSError as e:
        raise InputError(f"{path}: not the flags of a run ({type(e).__name__}: {e}); {advice}") from None
    return _parse(text, path, advice)


def _parse(text, path, advice):
    try:
        config = json.loads(text)
        flags, names = config["flags"], config["class_names"]
        if not isinstance(flags, dict) or not (names is None or isinstance(names, list)):
            raise ValueError("no flags in it")
        count = len(names or [])
        if not all(isinstance(name, str) for name in names or []) or count > flags.get("num_classes", math.inf):
            raise ValueError("class_names are not names, or more than num_classes")
        if names == []:
            raise ValueError("class_names are none; null stands for unknown ones")
        if len(set(names or [])) < count:
            raise ValueError("class_names has a name twice")
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        problem = f"not the flags of a run ({type(e).__name__}: {e})"
        raise InputError(f"{path}: {problem}; {advice}") from None
    return config
