"""The files that samples and likelihoods end in, and samples read back."""

import blobfile as bf
import numpy as np
import torch as th

from .. import logger
from ..data.packed import read_npz
from ..utils.errors import InputError, first_line
from ..utils.files import list_folder, write_files
from ..utils.progress import Progress
from .pictures import grid, sample_names, write_pngs


def to_uint8(x):
    """[N, C, H, W] in [-1, 1] -> uint8 [N, H, W, C]."""
    return ((x + 1) * 127.5).clamp(0, 255).to(th.uint8).permute(0, 2, 3, 1).contiguous()


def save_samples(images, labels=None):
    """
    Write samples to samples_NxHxWxC.npz in the log directory: arr_0 the images, arr_1 the labels, if any.

    :return: the path.
    """
    arrays = [images] if labels is None else [images, labels]
    return save_arrays(f"samples_{'x'.join(map(str, images.shape))}.npz", *arrays)


def write_samples(images, labels=None, class_names=None, save_images=False):
    """
    save_samples(), a picture of them beside it, and with save_images each as a PNG file in the folder images; the log
    names the files.
    """
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


def refuse_old_images():
    """:raises InputError: if the folder of write_samples() has files, which would be taken for samples of this run."""
    if bf.isdir(_folder()) and any(list_folder(_folder())):
        raise InputError(f"save_images: {_folder()} has files in it already; give another log_dir")


def _folder():
    return bf.join(logger.get_dir(), "images")


def save_arrays(name, *arrays):
    """Write arrays to a file of the log directory, as arr_0, arr_1, ...; return its path."""
    write_files(logger.get_dir(), {name: lambda f: np.savez(f, *arrays)})
    return bf.join(logger.get_dir(), name)


def load_base_samples(path, *, size, channels, num_classes=None):
    """
    Images for a super-resolution model to enlarge, from a file such as save_samples() writes.

    :param size: height and width that the model expects.
    :param num_classes: for a class-conditional model, how many labels it knows.
    :return: (uint8 array [N, size, size, channels], int64 array [N], or None without num_classes).
    :raises InputError: if the file is missing, or is anything else.
    """
    images, *labels = _read_npz("base_samples", path, *["arr_0", "arr_1"][: 1 if num_classes is None else 2])
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images) or images.shape[1:] != (size, size, channels):
        raise InputError(
            f"base_samples {path}: arr_0 is {images.dtype} of shape {images.shape}; small_size {size} and "
            f"image_channels {channels} want uint8 of shape (N, {size}, {size}, {channels})"
        )
    if num_classes is None:
        return images, None
    (labels,) = labels
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise InputError(f"base_samples {path}: arr_1 holds no label for each image, which class_cond needs")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise InputError(
            f"base_samples {path}: arr_1 has labels from {labels.min()} to {labels.max()}, "
            f"num_classes {num_classes} allows 0 to {num_classes - 1}"
        )
    return images, labels.astype(np.int64)


def load_labelled_samples(path):
    """
    What save_samples() wrote for a class-conditional model.

    :return: (uint8 array [N, H, W, C], int array [N]).
    :raises InputError: if the file is missing or has no labels.
    """
    images, labels = _read_npz("samples", path, "arr_0", "arr_1")
    return images, labels


def _read_npz(option, path, *names):
    """:raises InputError: naming the option, if the path is "", missing, or not a file of these arrays."""
    if not path:
        raise InputError(f"{option} is not given: name an npz file that image_sample.py wrote")
    if not bf.exists(path) or bf.isdir(path):
        raise InputError(f"{option} {path}: there is no such file")
    try:
        with bf.BlobFile(path, "rb") as f:
            return read_npz(f, *names)
    except Exception as e:  # a damaged zip archive raises anything
        what = "images and labels (arr_0, arr_1), which class_cond needs" if "arr_1" in names else "images (arr_0)"
        raise InputError(f"{option} {path}: not an npz file of {what}: {first_line(e)}") from None
