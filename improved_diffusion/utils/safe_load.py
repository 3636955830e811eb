"""Files of tensors, such as checkpoints, decoded without running code."""

import io
import pickle
import warnings
import zipfile

import blobfile as bf
import torch as th

from .errors import FileAccessError, InputError, first_line


def read_state_dict(path, **kwargs):
    """
    Read a file of tensors and plain values, never of code.

    :param path: a local path or any URL that blobfile reads.
    :param kwargs: for torch.load, such as map_location (by default, without a GPU: the CPU).
    :raises InputError: if there is no such file, or it is not a checkpoint, or is damaged,
                        or holds objects whose loading could run code.
    """
    return decode(path, read_bytes(path), **kwargs)


def read_bytes(path):
    """:raises InputError: if the file cannot be read; a FileAccessError if the system refuses or fails."""
    try:
        with bf.BlobFile(path, "rb") as f:
            return f.read()
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: is a directory; give the .pt file in it") from None
    except PermissionError:
        raise FileAccessError(f"{path}: no permission to read it") from None
    except OSError as e:  # EIO, ESTALE
        raise FileAccessError(f"{path}: cannot be read ({first_line(e)})") from None


def decode(path, data, **kwargs):
    """
    read_state_dict() of bytes.

    :param path: for messages.
    """
    if not th.cuda.is_available():
        kwargs.setdefault("map_location", "cpu")
    f = io.BytesIO(data)
    try:
        if zipfile.is_zipfile(f) and zipfile.ZipFile(f).testzip():
            raise ValueError("a tensor's checksum is wrong")  # torch does not verify it
        f.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, about pickles that it then refuses
            return th.load(f, **{"weights_only": True, **kwargs})
    except (th.OutOfMemoryError, MemoryError):
        raise  # the file is not to blame
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e) or "unrecognized function" in str(e):
            raise InputError(
                f"{path}: refused, since it holds more than tensors and plain values and loading it could run code"
            ) from None
        raise InputError(f"{path}: not a checkpoint (a file that torch.save wrote)") from None
    except Exception:  # the readers raise anything for a truncated file or another format
        raise InputError(f"{path}: not a checkpoint (a file that torch.save wrote), or damaged") from None
