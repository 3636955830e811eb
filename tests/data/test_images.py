"""Image files from anywhere: what Pillow would run or wait for, and values of other ranges."""

import io
import os
import struct
import subprocess
import tracemalloc
import warnings
import zlib

import numpy as np
import PIL
import pytest
from harness import write_images
from PIL import Image, ImageOps, PngImagePlugin

from improved_diffusion.data import images
from improved_diffusion.data.images import read_image, scale_and_crop
from improved_diffusion.image_datasets import load_data
from improved_diffusion.utils.errors import InputError


def refused(path, *parts):
    with pytest.raises(InputError) as info:
        read_image(str(path))
    message = str(info.value)
    assert "\n" not in message and message.startswith(f"{path}: ")
    assert [part for part in parts if part not in message] == []


# ---------------------------------------------------------------- what is no image


def test_postscript_does_not_run(tmp_path, monkeypatch):
    def run(*_, **__):
        pytest.fail("a program was started")

    monkeypatch.setattr(subprocess, "Popen", run)
    monkeypatch.setattr(subprocess, "check_call", run)
    path = tmp_path / "z.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")
    refused(path, "PNG", "TIFF")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in folders are Unix's")
def test_pipes_devices_and_folders_are_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(images.time, "sleep", None)  # no second try
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe", "device", "folder"):
        refused(tmp_path / f"{name}.png", "regular file")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="as above")
def test_a_pipe_among_the_images_is_found_at_the_start(tmp_path):
    write_images(tmp_path, count=3)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(InputError, match=r"pipe\.png"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=8)


# ---------------------------------------------------------------- large and long images


def blank_png(width, height):
    """A greyscale PNG file of zeros, a thousandth of its decoded size."""
    pack = zlib.compressobj(9)
    data = b"".join(pack.compress(bytes(width + 1)) for _ in range(height)) + pack.flush()
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b"")]
    body = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def test_a_large_image_is_read(tmp_path):
    """14,000 x 14,000 pixels, over Pillow's own limit for an error."""
    path = tmp_path / "a.png"
    path.write_bytes(blank_png(14000, 14000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(str(path)).size == (14000, 14000)


@pytest.mark.parametrize("width", [2**14 + 1, 2**20, 2**30])
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, width):
    height = min(width, 2**20)
    path = tmp_path / "bomb.png"
    whole = blank_png(8, 8)
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])
    tracemalloc.start()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own
        refused(path, "scale it down")
    assert tracemalloc.get_traced_memory()[1] < 10e6
    tracemalloc.stop()


def test_a_png_file_with_megabytes_of_text_is_read(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a photograph " * 250_000, zip=True)
    text.add_itxt("xml", "<x/>" * 800_000, zip=True)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", pnginfo=text)
    assert read_image(str(tmp_path / "a.png")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (3, 20_001), (700, 3)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_long_images_are_cropped_first(monkeypatch, size, mode):
    rng = np.random.default_rng(0)
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    image = Image.fromarray(rng.integers(100, 156, shape).astype(np.uint8))  # clips at no end
    resize, pixels = Image.Image.resize, []

    def measured(self, size, *args, **kwargs):
        pixels.append(size[0] * size[1])
        return resize(self, size, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "resize", measured)
        cropped = scale_and_crop(image, 16)
    assert max(pixels) <= images.LONG * 16 * 16
    monkeypatch.setattr(images, "LONG", 10**9)
    whole = scale_and_crop(image, 16)
    assert np.abs(cropped.astype(int) - whole).max() <= 1


# ---------------------------------------------------------------- other values


LEVELS = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    "values",
    [(LEVELS / 255).astype(np.float32), LEVELS.astype(np.float32), LEVELS.astype(np.int32)],
    ids=["0 to 1", "floats", "int32"],
)
def test_values_of_32_bits_are_scaled(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "a.tiff"))), LEVELS)


def test_16_bits_of_a_tiff_file_are_divided_by_256(tmp_path):
    values = (LEVELS.astype(np.uint16) << 8) + 77
    Image.fromarray(values).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "a.tiff"))), LEVELS)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (np.float32([[0, 1.5]]), ["0 to 1.5"]),
        (np.float32([[-1, 1]]), ["-1 to 1"]),
        (np.float32([[0, 65535]]), ["0 to 65535"]),
        (np.float32([[0, np.nan]]), ["nan"]),
        (np.float32([[0, np.inf]]), ["inf"]),
        (np.int32([[0, 65535]]), ["0 to 65535"]),
        (np.int32([[-1, 5]]), ["-1 to 5"]),
    ],
    ids=str,
)
def test_values_of_unclear_range_are_refused(tmp_path, values, parts):
    Image.fromarray(values).save(tmp_path / "a.tiff")
    refused(tmp_path / "a.tiff", *parts, "8 bits")


@pytest.mark.parametrize(
    ("name", "mode"), [("a.png", "RGBA"), ("a.png", "LA"), ("a.webp", "RGBA"), ("a.gif", "RGBA"), ("a.tiff", "LA")]
)
def test_transparent_pixels_are_white(tmp_path, name, mode):
    """Their hidden colour, black here, is an accident of the program that wrote the file."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((200, 200, 200, 255), (0, 0, 8, 4))
    words = dict(lossless=True) if name == "a.webp" else {}
    image.convert(mode).save(tmp_path / name, **words)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:4] = 200
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / name))), expected)


@pytest.mark.parametrize(("mode", "hidden", "opaque"), [("RGB", (0, 0, 9), (200, 0, 9)), ("L", 9, 200)])
def test_a_transparent_colour_is_white(tmp_path, mode, hidden, opaque):
    image = Image.new(mode, (8, 8), hidden)
    image.paste(opaque, (0, 0, 8, 4))
    image.save(tmp_path / "a.png", transparency=hidden)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:4] = opaque
    np.testing.assert_array_equal(np.asarray(read_image(str(tmp_path / "a.png"))), expected)


# ---------------------------------------------------------------- photographs


def exif(orientation):
    found = Image.Exif()
    found[images.ORIENTATION] = orientation
    return found


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs_stand_upright(tmp_path, form, mode):
    """By each orientation of EXIF, whatever the format."""
    if form == "TIFF" and int(PIL.__version__.split(".")[0]) < 10:
        pytest.skip("Pillow 9.5 neither writes nor applies the orientation of TIFF files")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    path = str(tmp_path / "a.jpg")
    words = {"WEBP": dict(lossless=True), "JPEG": dict(quality=95)}.get(form, {})
    image.save(path, form, **words)
    plain = read_image(path)
    for orientation in range(1, 9):
        image.save(path, form, exif=exif(orientation), **words)
        content = io.BytesIO((tmp_path / "a.jpg").read_bytes())  # Pillow 13 scrambles mapped files of one channel
        expected = ImageOps.exif_transpose(Image.open(content)).convert(plain.mode)
        got = read_image(path)
        np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
        assert got.size == ((8, 16) if orientation < 5 else (16, 8))
        if orientation == 1:
            np.testing.assert_array_equal(np.asarray(got), np.asarray(plain))


def test_an_image_is_turned_before_it_is_cropped(tmp_path):
    image = Image.new("RGB", (8, 24), "blue")
    image.paste("red", (0, 0, 8, 8))  # the top of the file is the right side of the picture
    image.save(tmp_path / "a.png", exif=exif(6))
    pixels = np.asarray(read_image(str(tmp_path / "a.png")))
    assert pixels.shape == (8, 24, 3) and pixels[0, -1].tolist() == [255, 0, 0] and pixels[0, 0].tolist() == [0, 0, 255]


@pytest.mark.parametrize(
    "value", [b"", b"Exif", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(range(64)), exif(0), exif(9)]
)
def test_damaged_exif_does_not_damage_the_image(tmp_path, value):
    image = Image.new("RGB", (8, 16), "red")
    for form in ("JPEG", "PNG"):
        image.save(tmp_path / "a.png", form, exif=value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own, when it opens the file
            assert read_image(str(tmp_path / "a.png")).size == (8, 16)


def test_draft_mode_of_jpeg_would_change_pixels(tmp_path):
    """Why it is not used: a DCT of fewer coefficients is not the mean of the pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    whole = scale_and_crop(read_image(str(tmp_path / "a.jpg")), 16)
    for size in (32, 16):
        with Image.open(tmp_path / "a.jpg") as drafted:
            drafted.draft("L", (size, size))
            assert drafted.size == (size, size) and (scale_and_crop(drafted, 16) != whole).any()
