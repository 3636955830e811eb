"""Files of samples and other arrays."""

import blobfile as bf
import numpy as np
import torch as th

from .. import logger
from ..data.packed import read_npz
from ..utils.errors import InputError, first_line
from ..utils.files import list_folder, write_files
from ..utils.progress import Progress
from .pictures import grid, sample_names, write_pngs


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
    logger.log(f"saved {path}")
    logger.log(f"saved {bf.join(logger.get_dir(), picture)}")
    if save_images:
        with Progress("writing", len(images), "images", logger.log) as progress:
            for name, image in zip(sample_names(len(images), labels, class_names), images, strict=True):
                write_pngs(_folder(), {name: image})
                progress.update()
        logger.log(f"saved {len(images)} PNG files in {_folder()}")


def refuse_old_images() -> None:
    """:raises InputError: if the folder of write_samples() has files, perhaps of another run."""
    if bf.isdir(_folder()) and any(list_folder(_folder())):
        raise InputError(f"save_images: {_folder()} is not empty; give another log_dir")


def _folder():
    return bf.join(logger.get_dir(), "images")


def save_arrays(name: str, *arrays: np.ndarray) -> str:
    """Write arrays to an npz file in the log directory, as arr_0, arr_1 and so on. Return its path."""
    write_files(logger.get_dir(), {name: lambda f: np.savez(f, *arrays)})
    return bf.join(logger.get_dir(), name)


def load_base_samples(path: str, *, size: int, channels: int, num_classes: int | None = None):
    """
    Load the input of a super-resolution model from a file in the format of save_samples().

    :param num_classes: of a class-conditional model.
    :return: (uint8 [N, size, size, channels], labels, int64 [N]; None without num_classes).
    :raises InputError: if the file is missing, or its arrays are not of these types and shapes.
    """
    images, *labels = _read_npz("base_samples", path, *["arr_0", "arr_1"][: 1 if num_classes is None else 2])
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[1:] != (size, size, channels):
        found = f"arr_0 is {images.dtype} of shape {images.shape}"
        valid = f"uint8 of shape (N, {size}, {size}, {channels})"
        options = f"small_size {size} and image_channels {channels}"
        raise InputError(f"base_samples {path}: {found}; {options} need {valid}")
    if num_classes is None:
        return images, None
    (labels,) = labels
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(f"base_samples {path}: arr_1 has no label per image; class_cond needs them")
    if labels.min() < 0 or labels.max() >= num_classes:
        found = f"arr_1 has labels from {labels.min()} to {labels.max()}"
        raise InputError(f"base_samples {path}: {found}; num_classes {num_classes} allows 0 to {num_classes - 1}")
    return images, labels.astype(np.int64)


def load_labelled_samples(path: str) -> tuple[np.ndarray, np.ndarray]:
    """
    Load class-conditional samples of save_samples(): (uint8 [N, H, W, C], int [N]).

    :raises InputError: if the file is missing or has no labels.
    """
    images, labels = _read_npz("samples", path, "arr_0", "arr_1")
    return images, labels


def _read_npz(option, path, *names):
    if not path:
        raise InputError(f"{option} is not given: give an npz file written by image_sample.py")
    if not bf.exists(path) or bf.isdir(path):
        raise InputError(f"{option} {path}: there is no such file")
    try:
        with bf.BlobFile(path, "rb") as f:
            return read_npz(f, *names)
    except Exception as e:  # a damaged zip archive raises anything
        what = "images and labels (arr_0, arr_1; class_cond needs both)" if "arr_1" in names else "images (arr_0)"
        raise InputError(f"{option} {path}: not an npz file of {what}: {first_line(e)}") from None
