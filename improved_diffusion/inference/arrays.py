"""Files of samples and other arrays."""

import contextlib
import functools
import json
import math
import os
from typing import Any

import blobfile as bf
import numpy as np
import torch as th

from .. import logger
from ..data.folders import is_image
from ..data.packed import read_npz
from ..image_datasets import open_images
from ..utils.errors import InputError, first_line
from ..utils.files import list_folder, write_files
from ..utils.progress import Progress
from ..utils.streams import counted
from .pictures import arrange, grid, sample_names, write_pngs

FIRST = "first_samples.png"  # until the picture of all samples is there


def to_uint8(x: th.Tensor) -> th.Tensor:
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]."""
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def save_samples(images: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Write samples_NxHxWxC.npz to the log directory: arr_0 the images, arr_1 the labels. Return its path."""
    arrays = [images] if labels is None else [images, labels]
    return save_arrays(f"samples_{'x'.join(map(str, images.shape))}.npz", *arrays)


def write_samples(
    images: np.ndarray, labels: np.ndarray | None = None, class_names: list[str] | None = None, save_images=False
) -> None:
    """save_samples(), with a picture of them beside it. With save_images, also PNG files in the folder images."""
    path = save_samples(images, labels)
    picture = bf.basename(path).replace(".npz", ".png")
    write_pngs(logger.get_dir(), {picture: grid(images, labels)})
    with contextlib.suppress(FileNotFoundError):
        os.remove(bf.join(logger.get_dir(), FIRST))
    logger.log(f"saved {path}")
    shown = sum(map(len, arrange(len(images), labels)))
    left_out = f" (the first {shown} of {len(images)}{' by class' * (labels is not None)})" * (shown < len(images))
    logger.log(f"saved {bf.join(logger.get_dir(), picture)}{left_out}")
    if save_images:
        with Progress("writing", len(images), "images", logger.log) as progress:
            for name, image in zip(sample_names(len(images), labels, class_names), images, strict=True):
                write_pngs(_folder(), {name: image})
                progress.update()
        logger.log(f"saved {counted(len(images), 'PNG file')} in {_folder()}")


def write_first_samples(images: np.ndarray, labels: np.ndarray | None = None) -> str:
    """Write a picture of the first batch, which write_samples() replaces. Return its path."""
    write_pngs(logger.get_dir(), {FIRST: grid(images, labels)})
    return bf.join(logger.get_dir(), FIRST)


def refuse_old_images() -> None:
    """:raises InputError: if the folder of write_samples() has files, perhaps of another run."""
    if bf.isdir(_folder()) and any(list_folder(_folder())):
        raise InputError(f"save_images: {_folder()} is not empty; give another log_dir")


def _folder():
    return bf.join(logger.get_dir(), "images")


def save_arrays(name: str, *arrays: np.ndarray, **named: np.ndarray) -> str:
    """Write arrays to an npz file in the log directory, as arr_0, arr_1 and so on or by name. Return its path."""
    write_files(logger.get_dir(), {name: lambda f: np.savez(f, *arrays, **named)})  # type: ignore[arg-type]
    return bf.join(logger.get_dir(), name)


def save_json(name: str, values: dict[str, Any]) -> str:
    """Write numbers and texts to a JSON file in the log directory, NaN as null. Return its path."""
    nan = {k: None for k, v in values.items() if isinstance(v, float) and math.isnan(v)}
    text = json.dumps({**values, **nan}, indent=1).encode()
    write_files(logger.get_dir(), {name: lambda f: f.write(text)})
    return bf.join(logger.get_dir(), name)


def save_plot(name: str, figure: Any) -> str:
    """Write a matplotlib Figure as a PNG file to the log directory. Return its path."""
    write_files(logger.get_dir(), {name: functools.partial(figure.savefig, format="png")})
    return bf.join(logger.get_dir(), name)


def load_base_samples(
    path: str, *, size: int, channels: int, num_classes: int | None = None, num_samples: int | None = None,
    class_names: list[str] | None = None, skip_damaged: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:  # fmt: skip
    """
    Load the input of a super-resolution model from a file in the format of save_samples(); a folder of images or one
    image, scaled and cropped to `size`; or packed images.

    :param num_classes: of a class-conditional model.
    :param num_samples: load the first images only, at most this many; None for all.
    :param class_names: of the model, if known: labels of a folder index them.
    :param skip_damaged: leave out images of a folder that cannot be decoded. A collective.
    :return: (uint8 [N, size, size, channels], labels, int64 [N]; None without num_classes).
    :raises InputError: if the file is missing, or its arrays are not of these types and shapes.
    """
    if path and (is_image(path) or bf.isdir(path)):
        which: dict[str, Any] = dict(class_names=class_names, limit=num_samples, skip_damaged=skip_damaged)
        dataset = open_images(path, size, num_classes is not None, channels, num_classes, **which)
        return np.stack([dataset.pixels(i) for i in range(len(dataset))]), dataset.local_classes

    file = f"base_samples {path}"

    def check(headers):
        dtype, shape = headers["arr_0"]
        if dtype != np.uint8 or len(shape) != 4 or not shape[0] or shape[1:] != (size, size, channels):
            valid = f"uint8 of shape (N, {size}, {size}, {channels})"
            options = f"small_size {size} and image_channels {channels}"
            raise InputError(f"{file}: arr_0 is {dtype} of shape {shape}; {options} need {valid}")
        _check_labels(file, headers)

    names = ["arr_0"] if num_classes is None else ["arr_0", "arr_1"]
    images, *labels = _read_npz("base_samples", path, names, check, num_samples)
    if num_classes is None:
        return images, None
    (labels,) = labels
    if labels.min() < 0 or labels.max() >= num_classes:
        found = f"arr_1 has labels from {labels.min()} to {labels.max()}"
        raise InputError(f"{file}: {found}; num_classes {num_classes} allows 0 to {num_classes - 1}")
    return images, labels.astype(np.int64)


def load_labelled_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Load class-conditional samples of save_samples(): (uint8 [N, H, W, C], int [N]).

    :raises InputError: if the file is missing or has no labels.
    """
    check = functools.partial(_check_labels, f"samples {path}")
    images, labels = _read_npz("samples", path, ["arr_0", "arr_1"], check)
    return images, labels


def _check_labels(file, headers):
    dtype, shape = headers.get("arr_1", (None, None))
    wanted = headers["arr_0"][1][:1]
    if dtype is not None and (dtype.kind not in "iu" or shape != wanted):
        raise InputError(f"{file}: arr_1 is {dtype} of shape {shape}; class_cond needs integers of shape {wanted}")


def _read_npz(option, path, names, check, limit=None):
    if not path:
        raise InputError(f"{option} is not given: give an npz file written by image_sample.py")
    if not bf.exists(path) or bf.isdir(path):
        raise InputError(f"{option} {path}: there is no such file")
    try:
        with bf.BlobFile(path, "rb") as f:
            return read_npz(f, *names, check=check, limit=limit)
    except InputError:
        raise
    except Exception as e:  # a damaged zip archive raises anything
        what = "images and labels (arr_0, arr_1; class_cond needs both)" if "arr_1" in names else "images (arr_0)"
        raise InputError(f"{option} {path}: not an npz file of {what}: {first_line(e)}") from None
