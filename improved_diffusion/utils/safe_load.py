"""Decode files of tensors, such as checkpoints and safetensors, without running code."""

import io
import pickle
import warnings
import zipfile
from typing import Any

import blobfile as bf
import torch as th

from . import safe_tensors
from .errors import FileAccessError, InputError, MissingFileError, first_line


def read_state_dict(path: str, **kwargs) -> Any:
    """
    Read a file of tensors and plain values.

    :param path: a local path or a URL for blobfile; safetensors if it ends so.
    :param kwargs: for torch.load, such as map_location (default without a GPU: the CPU).
    :raises InputError: if the file is missing, damaged, not a checkpoint, or could run code.
    """
    return decode(path, read_bytes(path), **kwargs)


def read_bytes(path: str) -> bytes:
    """
    The content of a file.

    :raises InputError: if it is a folder; MissingFileError if it is missing, FileAccessError if the system refuses or
                        fails.
    """
    try:
        with bf.BlobFile(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise MissingFileError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; give the .pt file in it") from None
    except PermissionError:
        raise FileAccessError(f"{path}: no permission to read it") from None
    except OSError as e:  # EIO, ESTALE
        raise FileAccessError(f"{path}: cannot be read ({first_line(e)})") from None


def decode(path: str, data: bytes, **kwargs) -> Any:
    """
    Decode bytes as read_state_dict() does.

    :param path: for messages.
    :raises InputError: as read_state_dict(), and for a device in map_location that is absent.
    """
    if not th.cuda.is_available():
        kwargs.setdefault("map_location", "cpu")
    if path.endswith(safe_tensors.ENDING):
        device = kwargs.get("map_location", "cpu")
        return {name: tensor.to(device) for name, tensor in safe_tensors.decode(path, data).items()}
    f = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(f):
            archive = zipfile.ZipFile(f)
            size = sum(member.file_size for member in archive.infolist())
            if size > len(data):
                problem = f"unpacks to {size / 1e6:,.0f} MB from {len(data) / 1e6:,.0f}"
                raise InputError(f"{path}: {problem}; torch.save does not compress")
            if archive.testzip():
                raise ValueError("checksum mismatch")  # torch does not verify it
        f.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles before it refuses them
            return th.load(f, **{"weights_only": True, **kwargs})
    except (th.OutOfMemoryError, MemoryError, InputError):
        raise  # out of memory: the file may be intact
    except Exception as e:  # the readers raise anything for a truncated file or another format
        device = kwargs.get("map_location")
        if str(device) != "cpu":
            decode(path, data, **{**kwargs, "map_location": "cpu"})  # raises if the file is to blame
            problem = f"cannot load its tensors to {device or 'the device that they were saved from'} ({first_line(e)})"
            raise InputError(f"{path}: {problem}; map_location cpu can") from e
        text = str(e) if isinstance(e, pickle.UnpicklingError) else ""
        if "GLOBAL" in text or "unrecognized function" in text:
            problem = "refused: it holds more than tensors and plain values, and loading it could run code"
        else:
            problem = "not a checkpoint (a file written by torch.save), or damaged"
        raise InputError(f"{path}: {problem}") from None
