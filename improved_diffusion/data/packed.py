"""
Packed images: a folder of arrays, decoded, scaled and cropped once instead of every epoch.

    images.npy    uint8 [N, S, S, C], C is 1 or 3
    labels.npz    labels: int64 [N], indices into classes; classes: [K] names

numpy.save and numpy.savez can write them. The images are memory-mapped, shared by all processes of a machine, and not
verified: damaged pixels go unnoticed. A folder in use may be renamed or removed, but images.npy not truncated.

Version 1.0 packed images in one .npz file of images, labels and classes. It is read into memory.
"""

import io
import math
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .. import logger
from ..utils.errors import InputError, first_line
from ..utils.files import TEMPORARY, is_remote, write_files

ENDING = ".packed"
OLD_ENDING = ".npz"
IMAGES, LABELS = "images.npy", "labels.npz"
LARGE = 2**30  # bytes; a larger .npz file is worth packing again
CHUNK = 2**20  # bytes to read at once


def is_packed(path: str) -> bool:
    """Whether a path is that of packed images, not of a folder of image files."""
    path = path.rstrip("/")
    if path.endswith(ENDING) or os.path.isfile(path):
        return True
    return os.path.isfile(os.path.join(path, IMAGES)) or (path.endswith(OLD_ENDING) and not os.path.isdir(path))


def check_new(path: str) -> None:
    """:raises InputError: if `path` is a URL, or exists and is not an empty folder."""
    if is_remote(path):
        raise InputError(f"{path}: give a local folder")
    if os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise InputError(f"{path}: exists; remove it, or give another folder")


def write_packed(
    path: str, batches: Iterable[np.ndarray], shape: tuple[int, ...], labels: Sequence[int], classes: list[str]
) -> None:
    """
    Write packed images, batch by batch. The folder is whole or absent.

    :param path: a new or empty folder.
    :param batches: uint8 arrays [n, S, S, C], N images in total.
    :param shape: (N, S, S, C).
    :param labels: N indices into classes.
    :raises InputError: if the folder cannot be written.
    :raises ValueError: if `batches` or `labels` do not match `shape`.
    """
    check_new(path)

    def write_images(f):
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": tuple(shape)})
        count = 0
        for batch in batches:
            if batch.dtype != np.uint8 or batch.shape[1:] != tuple(shape[1:]):
                raise ValueError(f"{path}: images of {batch.dtype} {batch.shape[1:]}, not of uint8 {shape[1:]}")
            f.write(np.ascontiguousarray(batch).data)
            count += len(batch)
        if not count == len(labels) == shape[0]:
            raise ValueError(f"{path}: {count} images and {len(labels)} labels, not {shape[0]} of each")

    def write_labels(f):
        content = io.BytesIO()  # an archive that cannot be written complains again when it is garbage
        np.savez(content, labels=np.array(labels, np.int64), classes=np.array(classes, str))
        f.write(content.getbuffer())

    temporary = path.rstrip("/") + TEMPORARY
    try:
        if os.path.islink(temporary):
            os.remove(temporary)  # its target is not ours to overwrite
        write_files(temporary, {IMAGES: write_images, LABELS: write_labels})
        os.rename(temporary, path)
    except OSError as e:
        raise InputError(f"{path}: cannot be written ({first_line(e)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_packed(path: str, with_labels: bool) -> tuple[np.ndarray, np.ndarray | None, list[str] | None]:
    """
    Map packed images.

    :param path: a folder written by write_packed(), or a file of version 1.0.
    :return: (uint8 array [N, S, S, C], memory-mapped from a folder; labels, int64 [N]; class names). The last two are
             None unless with_labels.
    :raises InputError: if the path is missing, a URL, damaged, or something else.
    """
    if is_remote(path):
        raise InputError(f"{path}: packed images must be on a local disk; copy them")
    try:
        if os.path.isdir(path):
            file, labels = os.path.join(path, IMAGES), os.path.join(path, LABELS)
            mapped = np.lib.format.open_memmap(file, mode="r")
            if mapped.offset + mapped.nbytes != os.path.getsize(file):
                raise ValueError(f"{IMAGES} is not as long as its header says")
            images = mapped.view(np.ndarray)
        else:
            (images,), labels = read_npz(path, "images"), path
        n, height, width, channels = images.shape if images.ndim == 4 else (0, 0, 0, 0)
        if images.dtype != np.uint8 or n * height == 0 or height != width or channels not in (1, 3):
            wanted = "uint8 of shape (N, S, S, 1 or 3)"
            raise InputError(f"{path}: images are {images.dtype} of shape {images.shape}; give {wanted}")
        found = images, *(_read_labels(labels, len(images)) if with_labels else (None, None))
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"{e.filename or path}: cannot be read ({first_line(e)})") from None
    except MemoryError:
        raise
    except Exception as e:  # damaged files raise anything
        raise InputError(f"{path}: not packed images, or damaged ({first_line(e)}); prepare.py writes them") from None
    if not os.path.isdir(path) and images.nbytes > LARGE:
        advice = "a folder written by scripts/prepare.py images is mapped instead"
        logger.note(f"{path}: each rank reads {images.nbytes / 1e9:.1f} GB; {advice}")
    return found


class Mapped:
    """
    Where a view of a memory-mapped uint8 array lies, to map it in another process instead of copying it.

    :raises ValueError: if the array is not mapped from a file that exists.
    """

    def __init__(self, array: np.ndarray):
        base: Any = array
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        if not isinstance(base, np.memmap) or not base.filename or not os.path.isfile(base.filename):
            raise ValueError("not mapped from a file")
        self.file, self.shape, self.strides = str(base.filename), array.shape, array.strides
        self.offset = base.offset + array.ctypes.data - base.ctypes.data

    def read(self) -> np.ndarray:
        """Map the view again, read-only."""
        return np.ndarray(self.shape, np.uint8, np.memmap(self.file, np.uint8, "r"), self.offset, self.strides)


def read_npz(file, *names: str, check: Callable | None = None, limit: int | None = None) -> list[np.ndarray]:
    """
    The arrays of these names, with verified checksums.

    :param file: a path or an open binary file.
    :param check: called with {name: (dtype, shape)} before an array is read: a small file may unpack to terabytes.
    :param limit: keep the first rows of each array, at most this many.
    :raises Exception: of any kind, if an array is missing or the file is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        found = _names(archive)
        if missing := [name for name in names if name not in found]:
            raise ValueError(f"it holds no {' and no '.join(missing)}, but {', '.join(found) or 'nothing'}")
        if check is not None:
            check(_headers(archive, names))
        return [_read_array(archive, f"{name}.npy", limit) for name in names]


def npz_headers(file) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """{name: (dtype, shape)} of the arrays in an npz file. :raises Exception: of any kind, if it is damaged."""
    with zipfile.ZipFile(file) as archive:
        return _headers(archive, _names(archive))


def _names(archive):
    return [name.removesuffix(".npy") for name in archive.namelist()]


def _headers(archive, names):
    headers = {}
    for name in names:
        with archive.open(f"{name}.npy") as member:
            shape, _, dtype = _read_header(member)
            headers[name] = dtype, shape
    return headers


def npz_rows(file, name: str, count: int) -> Iterator[np.ndarray]:
    """
    An array of an npz file in parts of `count` rows, the last may have fewer, without reading it whole.

    :raises Exception: of any kind, if the array is missing or the file is damaged; the checksum is verified at the end.
    """
    with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as member:
        shape, by_columns, dtype = _read_header(member)
        if by_columns:
            raise ValueError(f"{name} is in Fortran's order")
        for start in range(0, shape[0], count):
            part = (min(count, shape[0] - start), *shape[1:])
            data = member.read(math.prod(part) * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(part).copy()
        if member.read(1):
            raise ValueError(f"{name} is not as long as its header says")


def _read_array(archive, name, limit):
    with archive.open(name) as member:
        shape, by_columns, dtype = _read_header(member)
        if member.tell() + math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size:
            raise ValueError(f"{name} is not as long as its header says")
        kept = shape if limit is None or by_columns else (min(limit, shape[0]), *shape[1:])
        data = np.empty(math.prod(kept) * dtype.itemsize, np.uint8)
        for i in range(0, len(data), CHUNK):
            data[i : i + CHUNK] = np.frombuffer(member.read(min(CHUNK, len(data) - i)), np.uint8)
        while member.read(CHUNK):  # zipfile verifies the checksum only at the end of the member
            pass
    array = data.view(dtype)
    array = array.reshape(kept[::-1]).T if by_columns else array.reshape(kept)
    return array if limit is None else array[:limit]


def _read_header(member):
    version = np.lib.format.read_magic(member)
    if version != (1, 0):  # headers of other versions may have 4 GB
        raise ValueError(f".npy data of version {version}; numbers and text have (1, 0)")
    return np.lib.format.read_array_header_1_0(member)


def _read_labels(path, count):
    labels, classes = read_npz(path, "labels", "classes")
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(f"{path}: labels are {labels.dtype} of shape {labels.shape}; give {count} integers")
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise InputError(f"{path}: classes are {classes.dtype} of shape {classes.shape}; give a list of names")
    low, high = labels.min(), labels.max()
    if low < 0 or high >= len(classes):
        raise InputError(f"{path}: labels from {low} to {high}; {len(classes)} classes allow 0 to {len(classes) - 1}")
    return labels.astype(np.int64), classes.tolist()
