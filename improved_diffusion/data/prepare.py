"""
What the scripts that prepare data share: reading the pickles of others safely, and writing images to a folder
or packed in a file, with progress on terminals and one line at the end.
"""

import codecs
import functools
import math
import os
import pickle
import re
import struct

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..utils.errors import InputError, first_line
from ..utils.files import is_remote, write_files
from ..utils.progress import Progress
from .loader import BatchesInOrder
from .packed import ENDING, write_packed_images

# ---------------------------------------------------------------- batches of pixels


def _dtype(name, align=False, copy=False):
    """numpy.dtype() as old pickles call it, with 0 and 1 for what it takes bools for today."""
    return np.dtype(name, bool(align), bool(copy))


_RECONSTRUCT = np.ndarray(0).__reduce__()[0]  # numpy calls the module that it is in private
_SAFE = {  # what a pickle of arrays, lists and bytes asks for; a pickle that may ask for anything may do anything
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,  # Python 3's bytes in Python 2's protocol
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, arrays and lists alone are read")
        return _SAFE[module, name]


def load_pickled_dict(opened, name):
    """
    A dict of arrays and lists, as Python 2 or 3 pickled it; nothing else can come of it, or be run by it.

    :param opened: function that opens a binary file.
    :param name: what messages call the file.
    :return: the dict; keys that are bytes become text, what else was text in Python 2 is bytes.
    :raises InputError: if it is anything else, or damaged.
    """
    try:
        with opened() as f:
            content = _SafeUnpickler(f, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except Exception as e:  # damaged ones raise anything
        raise InputError(f"{name}: not a whole pickle of a dict of arrays ({first_line(e)})") from None


def check_planar(src, batches, allowed):
    """
    That batches hold images as the tiny-image data sets do: an image's red values, then its green, then its blue ones.

    :param src: the file or folder they are in, for messages.
    :param batches: an iterable of (name, data, labels). Right are data of uint8 [N, 3 * S * S], or anything with such
                    an array's dtype and shape, and N labels of `allowed`.
    :param allowed: a range.
    :return: (S, int64 labels of all together).
    :raises InputError: if one holds anything else, or another S than the first.
    """
    size, all_labels = None, []
    for name, data, labels in batches:
        dtype, shape = getattr(data, "dtype", type(data).__name__), getattr(data, "shape", ())
        side = math.isqrt(shape[1] // 3) if len(shape) == 2 else 0
        size = side if size is None else size
        if dtype != np.uint8 or 0 in (*shape, side) or shape[1] != 3 * side * side or side != size:
            wanted = f"uint8 of shape (N, {3 * size * size if size else '3 * S * S'})"
            raise InputError(f"SRC {src}: {name}: data is {dtype} of shape {shape}; {wanted} is wanted")
        try:
            labels = np.array(labels)
        except ValueError:  # lists of several lengths
            labels = np.array(None)
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu" or not np.isin(labels, allowed).all():
            raise InputError(
                f"SRC {src}: {name}: labels are not one for each image, all integers from {allowed[0]} to {allowed[-1]}"
            )
        all_labels.append(labels.astype(np.int64))
    return size, np.concatenate(all_labels)


def from_planar(rows, size):
    """uint8 [N, 3 * size * size] -> [N, size, size, 3]."""
    return rows.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)


# ---------------------------------------------------------------- images in a folder

PNG_BEGIN, PNG_END = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\0\0\0\0IEND\xaeB`\x82"


COMPRESSION = 3  # of 9; Pillow's default takes nearly three times as long, to make photographs a tenth smaller


def make_folder(path, flag="OUT"):
    """
    :param flag: what the folder was given as, for messages.
    :raises InputError: if it cannot be made, or be written to.
    """
    if is_remote(path):
        raise InputError(f"{flag} {path}: name a local folder")
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as e:
        raise InputError(f"{flag} {path}: cannot be made a folder ({first_line(e)})") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise InputError(f"{flag} {path}: may not be written to; name another folder, or change its permissions")


def check_class(name, given):
    """
    :param given: where the name of a class comes from, for messages.
    :raises InputError: if file names that begin with it would be of another class, or in another folder.
    """
    if not re.fullmatch(r"[^\W_]+(?:[.-][^\W_]+)*", name):
        raise InputError(f"{given}: {name!r} cannot begin file names as a class; letters, digits and - can")


def write_images(folder, images, num_classes, num_workers=0):
    """
    Write images as PNG files. Each is whole or absent, and what is there already stays: a run that was
    interrupted goes on where it was. Ends with a line on stdout.

    :param folder: a local folder.
    :param images: has len(), size (S), name(i), a file name that ends in .png, and pixels(i), uint8 [S, S, 3].
    :param num_workers: processes that make them; 0 makes them in this one.
    :raises InputError: if one cannot be written, or is there in another size; and what pixels() raises.
    """
    there = 0
    with Progress(folder, len(images), "images", say=print) as progress:
        for were_there in BatchesInOrder(_ImageFiles(folder, images), 64, num_workers, collate_fn=list):
            there += sum(were_there)
            progress.update(len(were_there))
    classes = f"{num_classes} class{'es' * (num_classes != 1)}"
    print(f"wrote {len(images)} images of {classes} to {folder}{f' ({there} were there already)' * (there > 0)}")


class _ImageFiles(Dataset):
    """Item i is whether image i was there; if not, it is now."""

    def __init__(self, folder, images):
        super().__init__()
        self._folder = folder
        self._images = images

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        name = self._images.name(i)
        there = _is_there(os.path.join(self._folder, name), self._images.size)
        if not there:
            image = Image.fromarray(self._images.pixels(i))
            save = functools.partial(image.save, format="PNG", compress_level=COMPRESSION)
            write_files(self._folder, {name: save}, flush=False)
        return there


def _is_there(path, size):
    """Whether a PNG file is, with its beginning and its end: a crash of the machine cuts files short."""
    try:
        with open(path, "rb") as f:
            begin = f.read(len(PNG_BEGIN) + 8)
            f.seek(max(f.seek(0, os.SEEK_END) - len(PNG_END), 0))
            if not (begin.startswith(PNG_BEGIN) and f.read() == PNG_END):
                return False
    except OSError:  # if it is not absent but unreadable, writing it will say why
        return False
    width, height = struct.unpack(">II", begin[len(PNG_BEGIN) :])
    if (width, height) != (size, size):
        raise InputError(f"{path}: is there already, as {width}x{height}, not {size}x{size}; give another OUT")
    return True


# ---------------------------------------------------------------- images packed in a file


def check_packed_name(path):
    """
    :raises InputError: if OUT cannot be a file of packed images by its name.
    """
    if is_remote(path) or not path.endswith(ENDING):
        raise InputError(f"OUT {path}: name a local file that ends in {ENDING}")
    if os.path.isdir(path):
        raise InputError(f"OUT {path}: is a folder; name a file")


def pack(path, batches, shape, labels, classes):
    """write_packed_images(), and a line on stdout."""
    write_packed_images(path, _with_progress(batches, shape[0]), shape, labels, classes)
    count, size, _, channels = shape
    megabytes = os.path.getsize(path) / 1e6
    print(
        f"wrote {count} images of {len(classes)} classes, {size}x{size} with {channels} channels, "
        f"{megabytes:.1f} MB: {path}"
    )


def _with_progress(batches, count):
    with Progress("packing", count, "images", say=print) as progress:
        for batch in batches:
            yield batch
            progress.update(len(batch))


# ---------------------------------------------------------------- processes


def workers(num_workers):
    """The flag's value, or where it is -1, how many cores this process may use."""
    if num_workers >= 0:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
