"""Image files: find, label, read, decode, scale, crop."""

import io
import os
import time

import blobfile as bf
import numpy as np
from PIL import Image, UnidentifiedImageError

from ..utils.errors import InputError, first_line
from ..utils.files import is_remote

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
CHECKED_IMAGES = 2000  # check_images() decodes at most this many images
CHECK_SECONDS = 10  # for at most this long
RETRY_PAUSES = (0.1, 1, 3)  # seconds before a failed read is retried, such as while a file server restarts


def find_images(folder: str) -> list[str]:
    """
    list_images() of a folder or a URL for blobfile.

    :raises InputError: if the folder is missing, cannot be listed or has no image.
    """
    try:
        if not bf.isdir(folder):
            raise InputError(f"{folder}: there is no such folder")
        paths = list_images(folder)
    except OSError as e:
        raise InputError(f"{folder}: cannot be listed ({e.filename}: {first_line(e)})") from None
    if not paths:
        raise InputError(f"{folder}: holds no images ({', '.join(EXTENSIONS)})")
    return paths


def list_images(folder: str) -> list[str]:
    """Paths of all images below a folder, depth first, each folder in sorted order."""
    paths: list[str] = []
    for _, path, is_folder in sorted(_entries(folder)):
        paths += list_images(path) if is_folder else [path]
    return paths


def _entries(folder):
    """(name, path, is_folder) of each image and each subfolder of a folder."""
    if is_remote(folder):
        for name in bf.listdir(folder):
            path = bf.join(folder, name)
            if _is_image(name) or bf.isdir(path):
                yield name, path, not _is_image(name)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # scandir() knows the type of all but links; a stat() per file would take minutes for millions
            if _is_image(entry.name):
                yield entry.name, entry.path, False
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                yield entry.name, entry.path, True


def _is_image(name):
    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def label_by_name(paths: list[str]) -> tuple[list[int], list[str]]:
    """
    Label images by the part of their file name before the first underscore.

    :return: (labels, sorted class names that they index).
    """
    prefixes = [path.rpartition("/")[2].split("_")[0] for path in paths]
    names = sorted(set(prefixes))
    index = {name: i for i, name in enumerate(names)}
    return [index[prefix] for prefix in prefixes], names


def check_images(paths: list[str]) -> None:
    """
    Decode a sample of the local images, to refuse most bad folders at the start instead of after hours.

    :raises InputError: naming an image that cannot be decoded.
    """
    local = [path for path in paths if not is_remote(path)]
    start = time.monotonic()
    for path in local[:: -(-len(local) // CHECKED_IMAGES) or 1]:
        read_image(path, retry=False)
        if time.monotonic() - start > CHECK_SECONDS:
            return


def read_image(path: str, retry: bool = True) -> Image.Image:
    """
    Read an image file and decode_image() it.

    :param retry: retry failed reads after each of RETRY_PAUSES. Damaged content is not read twice.
    """
    for pause in (*(RETRY_PAUSES if retry else ()), None):
        try:
            # for local files blobfile would add a tenth of the decoding time
            with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as f:
                content = f.read()
            break
        except MemoryError:
            raise
        except Exception as e:  # cloud storage raises errors of all kinds
            if pause is None:
                raise InputError(f"{path}: cannot be read as an image ({first_line(e)})") from e
            time.sleep(pause)
    return decode_image(content, path)


def decode_image(content: bytes, name: str) -> Image.Image:
    """
    Decode an image file.

    :param name: for messages.
    :return: a PIL image in mode "RGB" or "L".
    :raises InputError: if the file is not an image, or damaged.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content))
        image.load()
    except MemoryError:
        raise  # the file may be intact
    except Exception as e:  # decoders raise anything from SyntaxError to struct.error
        problem = "unknown format" if isinstance(e, UnidentifiedImageError) else e  # its text names the buffer
        raise InputError(f"{name}: cannot be read as an image ({problem})") from e
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's conversion saturates above 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_image(pixels: np.ndarray) -> Image.Image:
    """uint8 [H, W, 1 or 3] -> PIL image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def scale_and_crop(image: Image.Image, size: int, image_channels: int = 3) -> np.ndarray:
    """
    Scale the shorter side to `size`, and centre-crop the longer one.

    :param image: a PIL image in mode "RGB" or "L".
    :param image_channels: 3 for RGB, 1 for greyscale.
    :return: uint8 array [size, size, C].
    """
    if image_channels == 1:
        image = image.convert("L")
    # box filter first, since bicubic alone aliases; the published models were trained on such images
    while min(image.size) >= 2 * size:
        image = _halved(image)
    scale = size / min(image.size)
    width, height = (round(n * scale) for n in image.size)
    image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image if image_channels == 1 else image.convert("RGB"))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].reshape(size, size, image_channels)


def _halved(image):
    """Halve width and height, rounded down, by a box filter."""
    width, height = image.size
    half = (width // 2, height // 2)
    if height > 2 * width:  # Pillow resizes the columns of such images first, and rounding depends on the order
        return image.resize(half, resample=Image.Resampling.BOX)
    # for an even side reduce() gives the same pixels in half the time
    image = image.reduce((2, 1)) if width % 2 == 0 else image.resize((half[0], height), resample=Image.Resampling.BOX)
    return image.reduce((1, 2)) if height % 2 == 0 else image.resize(half, resample=Image.Resampling.BOX)
