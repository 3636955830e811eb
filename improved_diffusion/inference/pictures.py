"""Samples as pictures: a grid, or a file for each."""

import functools
import math
import re

import numpy as np

from ..data.images import to_image
from ..utils.files import write_files

COLUMNS, ROWS = 10, 20  # at most
GAP = 2  # pixels between images
MIN_SIZE = 96  # pixels


def arrange(count: int, labels: np.ndarray | None = None, columns: int | None = None) -> list[np.ndarray]:
    """The numbers of the images in each row of grid()."""
    if labels is not None and 1 < len(np.unique(labels)) <= ROWS:
        return [np.flatnonzero(labels == label)[:COLUMNS] for label in np.unique(labels)]
    columns = columns or min(COLUMNS, math.ceil(math.sqrt(count)))
    shown = min(count, columns * ROWS)
    return np.split(np.arange(shown), range(columns, shown, columns))


def grid(
    images: np.ndarray, labels: np.ndarray | None = None, columns: int | None = None, min_size: int = MIN_SIZE
) -> np.ndarray:
    """
    Arrange images in a white grid, one row per class if there are 2 to ROWS classes.

    :param images: uint8 [N, H, W, 1 or 3]; those past columns x ROWS are left out.
    :param labels: int [N], if any.
    :param columns: default: about the root of N, at most COLUMNS.
    :param min_size: smaller images are enlarged to this by an integer factor.
    :return: uint8 [h, w, 1 or 3].
    """
    images = np.asarray(images)
    rows = [images[numbers] for numbers in arrange(len(images), labels, columns)]
    scale = max(1, math.ceil(min_size / images.shape[1]))
    h, w = (n * scale + GAP for n in images.shape[1:3])
    picture = np.full((len(rows) * h + GAP, max(map(len, rows)) * w + GAP, images.shape[3]), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = GAP + i * h, GAP + j * w
            picture[top : top + h - GAP, left : left + w - GAP] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return picture


def write_pngs(directory: str, pictures: dict[str, np.ndarray]) -> None:
    """
    Write PNG files, each whole or absent.

    :param pictures: {file name: uint8 [h, w, 1 or 3]}.
    :raises InputError: if a file cannot be written.
    """
    for name, pixels in pictures.items():
        write_files(directory, {name: functools.partial(to_image(pixels).save, format="png")}, flush=False)


def sample_names(count: int, labels: np.ndarray | None = None, class_names=None) -> list[str]:
    """
    A file name per sample: its class, as in an image folder, and its index.

    :param labels: int [count], if any.
    :param class_names: indexed by the labels, if known.
    """
    if labels is None:
        return [f"{i:06d}.png" for i in range(count)]
    # names that an image folder reads back as the class
    if class_names is None or not all(re.fullmatch(r"[^\W_]([^\W_]|[.+ -])*", name) for name in class_names):
        class_names = {label: str(label) for label in labels}
    return [f"{class_names[label]}_{i:06d}.png" for i, label in enumerate(labels)]
