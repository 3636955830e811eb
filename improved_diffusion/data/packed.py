"""
A folder's images in one file, decoded once instead of every epoch.

It is an uncompressed npz archive, which numpy.load() reads, and numpy.savez(path, images=..., labels=..., classes=...)
writes:

    images.npy    uint8 [N, S, S, C], in the order of the folder; C is 1 or 3
    labels.npy    int64 [N], places in classes
    classes.npy   [K] names

The images are mapped into memory and never read as a whole: not at the start, so that their checksum goes unchecked and
damage inside the pixels unnoticed, and not into the memory of each rank of a node. While a file is in use it may be
replaced by a renamed one, as write_packed_images() does, but not cut short.
"""

import io
import math
import os
import struct
import zipfile

import numpy as np

from ..utils.errors import InputError, first_line
from ..utils.files import is_remote, write_files

ENDING = ".npz"
EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time that an archive can hold: the same images make the same file
LOCAL_HEADER = 30  # bytes before a member's name; the last four are the lengths of its name and its extra field


def write_packed_images(path, batches, shape, labels, classes):
    """
    Write a file of packed images, batch by batch; it is whole or absent.

    :param batches: an iterator of uint8 arrays [n, S, S, C], of N images together.
    :param shape: (N, S, S, C).
    :param labels: N integers.
    :param classes: the names that they are places in.
    :raises InputError: if the file cannot be written. What `batches` raises comes through, and leaves no file.
    :raises ValueError: if `batches` or `labels` are not what `shape` says; this leaves no file either.
    """

    def write(f):
        with zipfile.ZipFile(f, "w") as archive:
            with archive.open(zipfile.ZipInfo("images.npy", EPOCH), "w", force_zip64=True) as member:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                given = 0
                for batch in batches:
                    if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
                        raise ValueError(f"{path}: images of {batch.dtype} {batch.shape[1:]}, not of uint8 {shape[1:]}")
                    member.write(np.ascontiguousarray(batch).data)
                    given += len(batch)
                if not given == len(labels) == shape[0]:
                    raise ValueError(f"{path}: {given} images and {len(labels)} labels, not {shape[0]} of each")
            for name, array in {"labels": np.array(labels, np.int64), "classes": np.array(classes, str)}.items():
                with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    write_files(os.path.dirname(path) or ".", {os.path.basename(path): write})


def read_packed_images(path, with_labels):
    """
    :param with_labels: whether labels and classes are wanted.
    :return: (uint8 array [N, S, S, C], mapped from the file; int64 array [N] or None; list of names or None).
    :raises InputError: if the file is missing, at a URL, cut off, or anything else.
    """
    if is_remote(path):
        raise InputError(f"data_dir {path}: packed images are mapped from a local disk; copy the file to one")
    try:
        with open(path, "rb") as f, zipfile.ZipFile(f) as archive:
            images = _map_images(f, archive)
            return images, *(_read_labels(archive, len(images)) if with_labels else (None, None))
    except _Unfit as e:
        raise InputError(f"data_dir {path}: {e}") from None
    except OSError as e:
        raise InputError(f"data_dir {path}: cannot be read ({first_line(e)})") from None
    except Exception as e:  # a damaged zip archive raises anything
        raise InputError(
            f"data_dir {path}: not a whole file of packed images ({first_line(e)}); prepare_images.py makes one"
        ) from None


class _Unfit(Exception):
    """What is wrong with a file that could be read."""


def _map_images(f, archive):
    if "images.npy" not in archive.namelist():
        raise _Unfit(f"no images in it (it has {', '.join(archive.namelist()) or 'nothing'})")
    info = archive.getinfo("images.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise _Unfit("its images are compressed and cannot be mapped; write it with numpy.savez, or prepare_images.py")
    with archive.open(info) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("images.npy has no header that is known")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        header = member.tell()
    square = len(shape) == 4 and min(shape) > 0 and shape[1] == shape[2] and shape[3] in (1, 3)
    if dtype != np.uint8 or fortran_order or not square:
        raise _Unfit(
            f"images are {dtype} of shape {shape}{' in Fortran order' if fortran_order else ''}; "
            "uint8 of shape (N, S, S, 1 or 3) in C order is wanted"
        )
    f.seek(info.header_offset + LOCAL_HEADER - 4)
    start = info.header_offset + LOCAL_HEADER + sum(struct.unpack("<HH", f.read(4))) + header
    size = math.prod(shape)
    if not header + size == info.file_size == info.compress_size or start + size > os.fstat(f.fileno()).st_size:
        raise ValueError("its images are cut off")
    return np.memmap(f, dtype=np.uint8, mode="r", offset=start, shape=shape).view(np.ndarray)


def _read_labels(archive, count):
    missing = [name for name in ("labels", "classes") if f"{name}.npy" not in archive.namelist()]
    if missing:
        raise _Unfit(f"no {' and no '.join(missing)} in it, which class_cond needs")
    # read() looks at the checksum; numpy reads no further than a shape says
    labels, classes = (
        np.lib.format.read_array(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)
        for name in ("labels", "classes")
    )
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise _Unfit(f"labels are {labels.dtype} of shape {labels.shape}; {count} integers are wanted, one an image")
    if classes.dtype.kind != "U" or classes.ndim != 1:
        raise _Unfit(f"classes are {classes.dtype} of shape {classes.shape}; a list of names is wanted")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise _Unfit(
            f"labels from {labels.min()} to {labels.max()}, but {len(classes)} classes allow 0 to {len(classes) - 1}"
        )
    return labels.astype(np.int64), classes.tolist()
