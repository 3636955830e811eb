"""Image files: read, decode, scale, crop."""

import io
import os
import stat
import time
import warnings

import blobfile as bf
import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..utils.errors import InputError, first_line
from ..utils.files import is_remote

# given to Pillow, whose others include EPS, which runs Ghostscript
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
MAX_PIXELS = 2**28  # of an image file: 16,384 x 16,384, 0.8 GB when decoded
CHECKED_IMAGES = 2000  # check_images() decodes at most this many images
CHECK_SECONDS = 10  # for at most this long
LONG = 64  # sides longer than this many times the shorter one are cropped before scaling
ORIENTATION = 0x0112  # of EXIF: how a camera was held
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
RETRY_PAUSES = (0.1, 1, 3)  # seconds before a failed read is retried, such as while a file server restarts

# Pillow's limits are for uploads by strangers: scans and panoramas exceed them
if Image.MAX_IMAGE_PIXELS is not None:
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, MAX_PIXELS)
PngImagePlugin.MAX_TEXT_CHUNK = max(PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY)


class DamagedImageError(InputError):
    """A file that was read cannot be decoded as an image."""


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
    try:
        return decode_image(_read_file(path, retry), path)
    except DamagedImageError as e:
        raise DamagedImageError(f"{e}; skip_damaged True leaves such images out") from e.__cause__


def damage(path: str) -> str:
    """
    Why an image file cannot be decoded, in a line that begins with its path; "" if it can.

    :raises InputError: if it cannot be read: it may be intact.
    """
    try:
        decode_image(_read_file(path), path)
    except DamagedImageError as e:
        return str(e)
    return ""


def _read_file(path, retry=True):
    for pause in (*(RETRY_PAUSES if retry else ()), None):
        try:
            if not is_remote(path) and not stat.S_ISREG(os.stat(path).st_mode):  # reading a pipe would wait
                raise InputError(f"{path}: cannot be read as an image (not a regular file)")
            # for local files blobfile would add a tenth of the decoding time
            with bf.BlobFile(path, "rb") if is_remote(path) else open(path, "rb") as f:
                return f.read()
        except (MemoryError, InputError):
            raise
        except Exception as e:  # cloud storage raises errors of all kinds
            if pause is None:
                raise InputError(f"{path}: cannot be read as an image ({first_line(e)})") from e
            time.sleep(pause)


def decode_image(content: bytes, name: str) -> Image.Image:
    """
    Decode an image file.

    :param name: for messages.
    :return: a PIL image in mode "RGB" or "L", upright by its EXIF orientation.
    :raises DamagedImageError: if the file is not an image of FORMATS, damaged, too large, or of unclear range.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=FORMATS)
        if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        turn = UPRIGHT.get(_orientation(image))  # most files have none, or 1
        image = _to_rgb_or_grey(image)
        return image if turn is None else image.transpose(turn)
    except MemoryError:
        raise  # the file may be intact
    except Exception as e:  # decoders raise anything from SyntaxError to struct.error
        problem = first_line(e)
        if isinstance(e, UnidentifiedImageError):  # its text names the buffer
            problem = f"not one of {', '.join(FORMATS)}" if content else "it is empty"
        elif isinstance(e, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
            problem = f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down, or crop it"
        raise DamagedImageError(f"{name}: cannot be read as an image ({problem})") from e


def _orientation(image):
    """The EXIF orientation; None if there is none, or EXIF is damaged: the pixels may be intact."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return image.getexif().get(ORIENTATION)
    except Exception:  # as for damaged images
        return None


def _to_rgb_or_grey(image):
    if image.mode in ("RGB", "L") and "transparency" not in image.info:
        return image
    if image.mode.startswith("I;") or (image.mode == "I" and image.format == "PNG"):  # 16 bits
        return Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        return Image.fromarray(_to_uint8(np.asarray(image)))
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    has_alpha = has_alpha or (image.mode == "P" and image.palette.mode.endswith("A"))
    return _on_white(image) if has_alpha else image.convert("RGB")


def _to_uint8(values):
    """Greyscale values of 32 bits as uint8: 0 to 255, or floats from 0 to 1. :raises ValueError: for other values."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        return np.round(values * 255).astype(np.uint8)
    if low >= 0 and high <= 255 and (values == np.round(values)).all():
        return values.astype(np.uint8)
    wanted = "0 to 255" if values.dtype.kind == "i" else "0 to 1, or whole numbers from 0 to 255"
    raise ValueError(f"its values are {low:g} to {high:g}, not {wanted}; convert it to 8 bits")


def _on_white(image):
    """Composite an image with alpha, or with a transparent colour, on white."""
    rgba = image.convert({"La": "LA"}.get(image.mode, "RGBA")).convert("RGBA")
    opaque = Image.new("RGB", image.size, "white")
    opaque.paste(rgba, mask=rgba)
    return opaque


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
    if max(width, height) > LONG * size:
        image = _scaled_centre(image, width, height, size)
    else:
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image if image_channels == 1 else image.convert("RGB"))
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size].reshape(size, size, image_channels)


def _scaled_centre(image, width, height, size):
    """The central square of a long image scaled to (width, height), which as a whole would take gigabytes."""
    left, top = (width - size) // 2, (height - size) // 2
    x, y = image.width / width, image.height / height
    box = (left * x, top * y, (left + size) * x, (top + size) * y)
    return image.resize((size, size), resample=Image.Resampling.BICUBIC, box=box)


def _halved(image):
    """Halve width and height, rounded down, by a box filter."""
    width, height = image.size
    half = (width // 2, height // 2)
    if height > 2 * width:  # Pillow resizes the columns of such images first, and rounding depends on the order
        return image.resize(half, resample=Image.Resampling.BOX)
    # for an even side reduce() gives the same pixels in half the time
    image = image.reduce((2, 1)) if width % 2 == 0 else image.resize((half[0], height), resample=Image.Resampling.BOX)
    return image.reduce((1, 2)) if height % 2 == 0 else image.resize(half, resample=Image.Resampling.BOX)
