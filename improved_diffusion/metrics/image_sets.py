"""Sets of images to compare: samples_*.npz, packed images, folders, and files of statistics."""

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any

import blobfile as bf
import numpy as np

from .. import dist_util
from ..data.packed import is_packed, npz_headers, npz_rows, read_npz, read_packed
from ..image_datasets import load_data_once
from ..utils.errors import InputError, first_line

IMAGES = "arr_0"  # in the files of image_sample.py, and in OpenAI's reference batches

Shape = tuple[int, int, int]


class ImageSet:
    """
    One of the sets above, opened and checked. `shape` is that of an image, (H, W, C), and `count` the number of images.
    A folder has both after scale_to(); of statistics both may be None. `arrays` are the headers of an npz file.

    :param batch_size: images per batch on each rank.
    :param num_workers: processes that decode a folder's images, as in load_data().
    :raises InputError: if the path is none of these, or there are fewer than two images.
    """

    def __init__(self, path: str, batch_size: int = 50, num_workers: int = -1):
        self.path, self.batch_size, self.num_workers = path, batch_size, num_workers
        self.shape: Shape | None = None
        self.count: int | None = None
        self.arrays = _npz_arrays(path)
        self._loader: Any = None
        if self.arrays is not None:
            self.shape, self.count = self._of_npz(self.arrays)
        elif is_packed(path):
            images, _, _ = read_packed(path, with_labels=False)
            self.shape, self.count = images.shape[1:], len(images)
        self._check_count()

    @property
    def has_images(self) -> bool:
        return self.arrays is None or IMAGES in self.arrays

    def scale_to(self, shape: Shape) -> None:
        """
        Scale and crop a folder's images to this shape.

        :raises InputError: if other images have another shape, or the folder has fewer than two images.
        """
        if self.shape not in (None, shape):
            (h, w, c), (height, width, channels) = self.shape, shape
            found = f"{h}x{w} with {c} channels, not {height}x{width} with {channels}"
            raise InputError(f"{self.path}: images are {found}; compare images of one size")
        if self.arrays is None:
            self._loader = load_data_once(
                data_dir=self.path, batch_size=self.batch_size, image_size=shape[0], image_channels=shape[2],
                num_workers=self.num_workers, pin_memory=False,
            )  # fmt: skip
            self.shape, self.count = shape, self._loader.dataset.num_images
            self._check_count()

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """
        This rank's share in one pass: (int [n], the numbers of the images; uint8 [n, H, W, C]).

        :raises InputError: if they cannot be read.
        """
        rank, world = dist_util.rank(), dist_util.world_size()
        first = 0
        if self.arrays is None:
            self._loader.skip(0)
            for x, _ in self._loader:
                images = ((x + 1) * 127.5).round().byte().permute(0, 2, 3, 1)  # the loader's scaling, undone exactly
                yield rank + world * np.arange(first, first + len(images)), images.contiguous().numpy()
                first += len(images)
            return
        with self._reading() as f:
            for rows in npz_rows(f, IMAGES, self.batch_size * world):
                numbers = np.arange(first, first + len(rows))
                mine = numbers % world == rank
                yield numbers[mine], rows[mine]
                first += len(rows)

    def read(self, *names: str) -> list[np.ndarray]:
        """Arrays of an npz file. :raises InputError: if it is damaged."""
        with self._reading() as f:
            return read_npz(f, *names)

    @contextlib.contextmanager
    def _reading(self):
        try:
            with bf.BlobFile(self.path, "rb") as f:
                yield f
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
            raise e if isinstance(e, InputError) else InputError(f"{self.path}: damaged ({first_line(e)})") from None

    def _check_count(self):
        if self.count is not None and self.count < 2:
            raise InputError(f"{self.path}: {self.count} images; a distance needs 2 or more")

    def _of_npz(self, arrays):
        if IMAGES in arrays:
            dtype, shape = arrays[IMAGES]
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3):
                valid = "uint8 of shape (N, H, W, 1 or 3), as image_sample.py writes them"
                raise InputError(f"{self.path}: {IMAGES} is {dtype} of shape {shape}; give {valid}")
            return shape[1:], shape[0]
        if not {"mu", "sigma"} <= arrays.keys():
            found = ", ".join(arrays) or "nothing"
            raise InputError(f"{self.path}: holds {found}; give images ({IMAGES}) or statistics (mu, sigma)")
        shape = tuple(map(int, self.read("shape")[0])) if "shape" in arrays else None
        return shape, int(self.read("count")[0]) if "count" in arrays else None


def evenly(count: int, of: int) -> np.ndarray:
    """Indices of `count` of `of` images, spread evenly, since neighbours are alike; all if there are fewer."""
    count = min(count, of)
    return (2 * np.arange(count) + 1) * of // (2 * count)


def _npz_arrays(path):
    """The headers of an npz file of images or statistics; None for a folder or packed images."""
    if bf.isdir(path) or not path.endswith(".npz"):
        return None
    if not bf.exists(path):
        raise InputError(f"{path}: there is no such file")
    try:
        with bf.BlobFile(path, "rb") as f:
            arrays = npz_headers(f)
    except Exception as e:  # a damaged zip archive raises anything
        raise InputError(f"{path}: not an npz file of images or statistics ({first_line(e)})") from None
    return None if "images" in arrays else arrays  # packed by version 1.0


def open_pair(
    samples: str, reference: str, image_size: int = 0, batch_size: int = 50, num_workers: int = -1
) -> tuple[ImageSet, ImageSet]:
    """
    Open two sets of images of one shape: that of the set that has one; of two folders (image_size, image_size, 3).

    :raises InputError: as ImageSet; if two folders are given without image_size, or shapes differ.
    """
    a, b = ImageSet(samples, batch_size, num_workers), ImageSet(reference, batch_size, num_workers)
    shape = b.shape or a.shape
    if image_size:
        shape = (image_size, image_size, shape[2] if shape else 3)
    for images in (a, b):
        if shape is not None:
            images.scale_to(shape)
        elif images.arrays is None:
            raise InputError(f"image_size is not given: {images.path} is a folder, whose images are scaled to it")
    return a, b
