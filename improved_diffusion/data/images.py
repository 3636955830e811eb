"""Image files: find, label, read, decode, scale and crop."""

import io
import os
import time

import blobfile as bf
import numpy as np
from PIL import Image, UnidentifiedImageError

from ..utils.errors import InputError, first_line
from ..utils.files import is_remote

EXTENSIONS = ("jpg", "jpeg", "png", "gif")
# check_images() decodes at most this many images, for at most this long
CHECKED_IMAGES = 2000
CHECK_SECONDS = 10
# Seconds before a failed read is retried: file servers restart, and files are replaced
RETRY_PAUSES = (0.1, 1, 3)


def find_images(folder):
    """
    Paths of all images below a folder, or a URL that blobfile lists, as list_images().

    :raises InputError: if there is no such folder, or no image in it.
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


def list_images(folder):
    """Paths of all images below a folder, folder by folder, each in sorted order."""
    paths = []
    for _, path, is_folder in sorted(_entries(folder)):
        paths += list_images(path) if is_folder else [path]
    return paths


def _entries(folder):
    """(name, path, whether it is a folder) of each image and each folder in a folder."""
    if is_remote(folder):
        for name in bf.listdir(folder):
            path = bf.join(folder, name)
            if _is_image(name) or bf.isdir(path):
                yield name, path, not _is_image(name)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            # scandir() knows the kind of all but links; a stat() of each would take minutes for millions of files
            if _is_image(entry.name):
                yield entry.name, entry.path, False
            elif entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path)):
                yield entry.name, entry.path, True


def _is_image(name):
    return "." in name and name.rsplit(".", 1)[1].lower() in EXTENSIONS


def label_by_name(paths):
    """:return: (label of each path, the sorted classes that they are indices into)."""
    prefixes = [path.rpartition("/")[2].split("_")[0] for path in paths]
    names = sorted(set(prefixes))
    place = {name: i for i, name in enumerate(names)}
    return [place[prefix] for prefix in prefixes], names


def check_images(paths):
    """
    Decode local images, evenly spread over `paths`: most bad folders are refused at the start, not hours later.

    :raises InputError: naming one that cannot be decoded.
    """
    local = [path for path in paths if not is_remote(path)]
    start = time.monotonic()
    for path in local[:: -(-len(local) // CHECKED_IMAGES) or 1]:
        read_image(path, retry=False)
        if time.monotonic() - start > CHECK_SECONDS:
            return


def read_image(path, retry=True):
    """
    Read and decode an image file; as decode_image().

    :param retry: retry failed reads, after each of RETRY_PAUSES. Damaged content is not read again.
    """
    content = _read(path, RETRY_PAUSES if retry else ())
    return decode_image(lambda: io.BytesIO(content), path)


def _read(path, pauses):
    for pause in (*pauses, None):
        try:
            # blobfile takes a tenth of the time of decoding for a local file
            with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as f:
                return f.read()
        except MemoryError:
            raise
        except Exception as e:  # clouds and networks have errors of all kinds
            if pause is None:
                raise InputError(f"{path}: cannot be read as an image ({first_line(e)})") from e
            time.sleep(pause)


def decode_image(opened, name):
    """
    :param opened: function that opens a binary file.
    :param name: what messages call the file.
    :return: a PIL image in mode "RGB" or "L".
    :raises InputError: whatever is wrong with the file.
    """
    try:
        with opened() as f:
            image = Image.open(f)
            image.load()
    except MemoryError:
        raise  # the file is not to blame
    except UnidentifiedImageError as e:  # whose text names the buffer
        raise InputError(f"{name}: cannot be read as an image (unknown format)") from e
    except Exception as e:  # decoders of damaged files raise anything from SyntaxError to struct.error
        raise InputError(f"{name}: cannot be read as an image ({e})") from e
    if image.mode in ("RGB", "L"):
        return image
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion saturates above 255
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_image(pixels):
    """uint8 [H, W, 1 or 3] -> PIL image."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def scale_and_crop(image, size, image_channels=3):
    """
    Scale the shorter side to `size`, and crop the longer one at the centre.

    :param image: a PIL image in mode "RGB" or "L".
    :param image_channels: 3 for RGB, 1 for greyscale.
    :return: uint8 array [size, size, C].
    """
    if image_channels == 1:
        image = image.convert("L")

    # halving by boxes first, since bicubic alone would alias; published models saw such images
    while min(image.size) >= 2 * size:
        image = _halved(image)
    scale = size / min(image.size)
    image = image.resize(tuple(round(x * scale) for x in image.size), resample=Image.Resampling.BICUBIC)

    pixels = np.asarray(image if image_channels == 1 else image.convert("RGB"))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].reshape(size, size, image_channels)


def _halved(image):
    """image.resize() by boxes to half its width and height, rounded down."""
    width, height = image.size
    half = (width // 2, height // 2)
    if height > 2 * width:  # Pillow halves such images' columns first, and what is rounded first changes pixels
        return image.resize(half, resample=Image.Resampling.BOX)
    # where a side is even each box is two pixels, whose mean reduce() takes in half the time
    image = image.reduce((2, 1)) if width % 2 == 0 else image.resize((half[0], height), resample=Image.Resampling.BOX)
    return image.reduce((1, 2)) if height % 2 == 0 else image.resize(half, resample=Image.Resampling.BOX)
