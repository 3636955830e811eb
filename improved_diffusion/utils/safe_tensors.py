"""safetensors files: tensors by name, and text. Reading them runs no code."""

import json
from typing import Any

import blobfile as bf
import torch as th

from .errors import FileAccessError, InputError, first_line

ENDING = ".safetensors"
LONGEST_HEADER = 100_000_000  # bytes, by the format


def decode(path: str, data: bytes) -> dict[str, th.Tensor]:
    """
    The tensors of a file, on the CPU, by name in alphabetical order.

    :param path: for messages.
    :raises InputError: if it is damaged, or the package safetensors is missing.
    """
    library = _library(path)
    try:
        return dict(sorted(library.load(data).items()))  # in any order otherwise
    except Exception as e:  # of the format, or a dtype that this torch does not have
        raise InputError(f"{path}: not a safetensors file, or damaged ({first_line(e)})") from None


def encode(path: str, tensors: dict[str, th.Tensor], metadata: dict[str, str]) -> bytes:
    """
    The bytes of a file.

    :param path: for messages.
    :raises InputError: if the package safetensors is missing, or a tensor has no plain data.
    """
    library = _library(path)
    try:
        # copies, since tied parameters share memory
        return library.save({name: t.clone().contiguous() for name, t in tensors.items()}, {"format": "pt", **metadata})
    except (ValueError, RuntimeError, KeyError) as e:
        raise InputError(f"{path}: cannot hold these tensors ({first_line(e)})") from None


def read_metadata(path: str) -> dict[str, str]:
    """
    The text beside the tensors, by name. Reads the header alone.

    :raises InputError: if it is damaged.
    """
    try:
        with bf.BlobFile(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if length > LONGEST_HEADER:
                raise ValueError("the header is too long")
            header = json.loads(f.read(length))
        return {str(name): str(text) for name, text in header.get("__metadata__", {}).items()}
    except OSError as e:
        raise FileAccessError(f"{path}: cannot be read ({first_line(e)})") from None
    except (ValueError, AttributeError, RecursionError) as e:
        raise InputError(f"{path}: not a safetensors file, or damaged ({first_line(e)})") from None


def _library(path) -> Any:
    try:
        import safetensors.torch
    except ImportError:
        install = "pip install '.[safetensors]'"
        raise InputError(f"{path}: needs the package safetensors: {install}") from None
    return safetensors.torch
