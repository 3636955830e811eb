"""Samples as pictures: many in a grid, or each in a file."""

import functools
import math
import re

import numpy as np

from ..data.images import to_image
from ..utils.files import write_files

COLUMNS = 10
ROWS = 20
GAP = 2  # pixels between images
LEAST = 48  # pixels: smaller images are enlarged to this by whole factors


def grid(images, labels=None):
    """
    Many images as one: a row for each class, or as they come where there are no labels or too many classes.

    :param images: uint8 [N, H, W, 1 or 3].
    :param labels: int [N], if any.
    :return: uint8 [h, w, 1 or 3]. It has COLUMNS x ROWS images at most; where a row has fewer, it stays white.
    """
    images = np.asarray(images)
    if labels is not None and 1 < len(np.unique(labels)) <= ROWS:
        rows = [images[labels == label][:COLUMNS] for label in np.unique(labels)]
    else:
        columns = min(COLUMNS, math.ceil(math.sqrt(len(images))))
        rows = [images[i : i + columns] for i in range(0, min(len(images), columns * ROWS), columns)]
    scale = max(1, math.ceil(LEAST / images.shape[1]))
    h, w = (n * scale + GAP for n in images.shape[1:3])
    picture = np.full((len(rows) * h + GAP, max(map(len, rows)) * w + GAP, images.shape[3]), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            top, left = GAP + i * h, GAP + j * w
            picture[top : top + h - GAP, left : left + w - GAP] = image.repeat(scale, axis=0).repeat(scale, axis=1)
    return picture


def write_pngs(directory, pictures):
    """
    Write pictures to a folder, each whole or absent.

    :param pictures: {file name: uint8 [h, w, 1 or 3]}.
    :raises InputError: if one cannot be written.
    """
    for name, pixels in pictures.items():
        write_files(directory, {name: functools.partial(to_image(pixels).save, format="png")}, flush=False)


def sample_names(count, labels=None, class_names=None):
    """
    A file name for each sample: its class, as image folders have it, and its number.

    :param labels: int [count], if any.
    :param class_names: what the labels are places in, if known.
    """
    if labels is None:
        return [f"{i:06d}.png" for i in range(count)]
    # what an image folder takes for the class
    if class_names is None or not all(re.fullmatch(r"[^\W_]([^\W_]|[.+ -])*", name) for name in class_names):
        class_names = {label: str(label) for label in labels}
    return [f"{class_names[label]}_{i:06d}.png" for i, label in enumerate(labels)]
