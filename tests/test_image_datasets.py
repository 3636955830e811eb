"""From files to batches: which images, which pixels, which labels, in which order, and what is said of bad ones."""

import itertools
import multiprocessing
import os
import shutil
from pathlib import Path

import blobfile as bf
import numpy as np
import PIL
import pytest
import torch as th
from harness import ROOT, write_images
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from PIL import Image
from torch.utils.data import DataLoader

from improved_diffusion import image_datasets, logger
from improved_diffusion.data import images as image_files
from improved_diffusion.data.packed import read_packed
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES
from improved_diffusion.image_datasets import (
    ImageDataset,
    PackedDataset,
    load_data,
    load_data_once,
    load_superres_data,
)
from improved_diffusion.utils.errors import InputError

RECORDED_IMAGES = ROOT / "tests" / "recorded" / "images"


def pixels_of(x):
    """[-1, 1] -> 0..255, exactly."""
    values = (np.asarray(x, dtype=np.float64) + 1) * 127.5
    assert np.abs(values - values.round()).max() < 1e-4
    return values.round().astype(np.uint8)


def resampled(image, size):
    """The original's resampling of a PIL image, written out: uint8 [3, size, size]."""
    width, height = image.size
    while min(width, height) >= 2 * size:
        width, height = width // 2, height // 2
        image = image.resize((width, height), Image.Resampling.BOX)
    scale = size / min(width, height)
    image = image.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
    pixels = np.array(image.convert("RGB"))
    y, x = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[y : y + size, x : x + size].transpose(2, 0, 1)


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


@pytest.fixture
def greys(tmp_path):
    """Writes n images: number i, in sorted order, is all of grey value i. The first half is of one class."""

    def write(n, name="greys"):
        folder = tmp_path / name
        folder.mkdir()
        for i in range(n):
            Image.new("L", (8, 8), i).save(folder / f"{'ab'[i >= n // 2]}_{i:02d}.png")
        return str(folder)

    return write


def numbers(batch):
    """Which of the grey images a batch holds."""
    return [int(v) for v in pixels_of(batch)[:, 0, 0, 0]]


# ---------------------------------------------------------------- which files


def test_listing_is_recursive_and_sorted_and_knows_every_spelling_of_an_extension(tmp_path):
    for name in ["b.PNG", "a.jpg", "Z.JpEg", "c.gif", "m/y.png", "m/x/1.png", "m/x.png", "no.txt", "jpg", "e.png.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "d").mkdir()  # stays empty
    found = image_datasets._list_image_files_recursively(str(tmp_path))
    expected = ["Z.JpEg", "a.jpg", "b.PNG", "c.gif", "m/x/1.png", "m/x.png", "m/y.png"]
    assert [os.path.relpath(path, tmp_path) for path in found] == expected


@pytest.fixture
def odd_folder(tmp_path):
    """Links of all kinds, names that are no names, and a folder that is called an image."""
    for name in ["a/1.png", "b.png/2.png", "a\nb.png", "\udcff.png", " .png", ".png", "png", "c.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for name, target in {
        "broken.png": "nowhere",
        "broken": "nowhere",
        "loop": "loop",
        "loop.jpg": "loop.jpg",
        "file.jpeg": "c.png",
        "other": "c.png",
        "z": "a",
    }.items():
        (tmp_path / name).symlink_to(target)
    return tmp_path


def test_links_and_odd_names(odd_folder):
    """A folder with an image's name and a broken link are found to be unreadable later, by name."""
    found = image_datasets._list_image_files_recursively(str(odd_folder))
    expected = [" .png", "a/1.png", "a\nb.png", "b.png", "broken.png", "c.png", "file.jpeg", "loop.jpg"]
    assert [os.path.relpath(path, odd_folder) for path in found] == [*expected, "z/1.png", "\udcff.png"]


def test_the_listing_looks_at_no_file(monkeypatch, tmp_path):
    """On a disk across a network each look is a journey."""
    write_images(tmp_path / "deep" / "er", count=3)
    (tmp_path / "deep" / "notes.txt").touch()

    stat = os.stat

    def look(path, *args, **kwargs):
        if Path(path).suffix:
            pytest.fail("a file was looked at")
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        for name in ("stat", "lstat"):
            patch.setattr(os, name, look)  # at the folder itself they look
        assert len(image_datasets._list_image_files_recursively(str(tmp_path))) == 3


def test_a_folder_that_cannot_be_listed(monkeypatch, tmp_path):
    write_images(tmp_path / "shut", count=2)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=r": cannot be listed \(.*shut: Permission denied\)"):
        load_data(data_dir=str(tmp_path), batch_size=1, image_size=8)


def test_dataloader_can_be_imported_from_here_as_from_the_original():
    assert image_datasets.DataLoader is DataLoader


# ---------------------------------------------------------------- which pixels


@pytest.mark.parametrize("size", [16, 32])
def test_pixels_are_those_that_the_original_gave(size):
    apart = 0 if Version(PIL.__version__) >= Version("13") else 1  # levels: older Pillow rounds differently
    with np.load(ROOT / "tests" / "recorded" / "images.npz") as recorded:
        names = [key.split("/", 1)[1] for key in recorded if key.startswith(f"{size}/")]
        assert len(names) == 6
        dataset = ImageDataset(size, [str(RECORDED_IMAGES / name) for name in names])
        for i, name in enumerate(names):
            x, cond = dataset[i]
            assert (x.dtype, cond) == (np.float32, {})
            levels = pixels_of(x).astype(np.float32)
            np.testing.assert_array_equal(x, levels / 127.5 - 1)
            np.testing.assert_allclose(levels, recorded[f"{size}/{name}"], rtol=0, atol=apart, err_msg=name)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [
        (8, 8, 8),  # as it is
        (5, 9, 8),  # enlarged
        (15, 15, 8),  # below the first halving
        (16, 17, 8),  # at it
        (67, 35, 8),  # odd sizes, twice halved
        (33, 40, 16),
        (9, 200, 4),  # long
    ],
)
def test_rgb_and_greyscale_images_are_resampled_in_their_own_mode(tmp_path, mode, width, height, size):
    image = Image.fromarray(noise(width, height, width, *([3] if mode == "RGB" else [])))
    image.save(tmp_path / "a.png")
    x, _ = ImageDataset(size, [str(tmp_path / "a.png")])[0]
    assert x.shape == (3, size, size)
    np.testing.assert_array_equal(pixels_of(x), resampled(image, size))


@given(width=st.integers(2, 150), height=st.integers(2, 150), mode=st.sampled_from(["RGB", "L"]), extreme=st.booleans())
@settings(max_examples=300)
def test_halving_is_that_of_pillow(width, height, mode, extreme):
    pixels = noise(width, height, width, *([3] if mode == "RGB" else []))
    image = Image.fromarray((pixels % 2) * 255 if extreme else pixels)
    expected = image.resize((width // 2, height // 2), Image.Resampling.BOX)
    assert image_files._halved(image).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    "size", [(2, 2), (2, 4), (2, 5), (2, 6), (40, 80), (40, 81), (40, 82), (41, 82), (41, 84), (82, 40)]
)
def test_halving_of_long_images_is_that_of_pillow(size):
    image = Image.fromarray(noise(1, size[1], size[0], 3))
    expected = image.resize(tuple(n // 2 for n in size), Image.Resampling.BOX)
    assert image_files._halved(image).tobytes() == expected.tobytes()


def palette_image(seed):
    image = Image.fromarray(noise(seed, 20, 24) % 16)
    image.putpalette(noise(seed + 1, 48).tolist())
    return image


def palette_colours(image):
    colours = np.array(image.getpalette(), dtype=np.uint8).reshape(-1, 3)
    return colours[np.asarray(image)]


def palette(path):
    image = palette_image(1)
    image.save(path)
    return palette_colours(image)


def palette_with_transparency(path):
    image = palette_image(2)
    image.save(path, transparency=bytes([0, 128, 255, 3]))
    with Image.open(path) as written:
        assert isinstance(written.info["transparency"], bytes)
    alpha = np.full(256, 255)
    alpha[:4] = 0, 128, 255, 3
    return on_white(palette_colours(image), alpha[np.asarray(image)])


def on_white(colours, alpha):
    """Rounded as Pillow does."""
    colours, alpha = colours.astype(int), alpha[..., None].astype(int)
    return np.round((colours * alpha + 255 * (255 - alpha)) / 255).astype(np.uint8)


def rgba(path):
    pixels = noise(3, 20, 24, 4)
    Image.fromarray(pixels).save(path)
    return on_white(pixels[..., :3], pixels[..., 3])


def rgba_opaque(path):
    pixels = noise(3, 20, 24, 4)
    pixels[..., 3] = 255
    Image.fromarray(pixels).save(path)
    return pixels[..., :3]


def rgb_with_transparent_colour(path):
    pixels = noise(4, 20, 24, 3)
    Image.fromarray(pixels).save(path, transparency=(1, 2, 3))
    return pixels


def grey_with_alpha(path):
    pixels = noise(5, 20, 24, 2)
    image = Image.merge("LA", [Image.fromarray(pixels[..., 0]), Image.fromarray(pixels[..., 1])])
    image.save(path)
    return on_white(pixels[..., :1].repeat(3, axis=2), pixels[..., 1])


def one_bit(path):
    pixels = noise(6, 20, 24) > 127
    Image.fromarray(pixels).save(path)
    return np.where(pixels[..., None], 255, 0).astype(np.uint8).repeat(3, axis=2)


def sixteen_bits(path):
    pixels = np.random.default_rng(7).integers(0, 2**16, (20, 24)).astype(np.uint16)
    Image.fromarray(pixels).save(path)
    return (pixels >> 8).astype(np.uint8)[..., None].repeat(3, axis=2)


CONVERTED = [
    palette,
    palette_with_transparency,
    rgba,
    rgba_opaque,
    rgb_with_transparent_colour,
    grey_with_alpha,
    one_bit,
    sixteen_bits,
]


@pytest.mark.parametrize("write", CONVERTED, ids=lambda write: write.__name__)
@pytest.mark.parametrize("size", [8, 20, 32])
def test_other_modes_are_converted_before_resampling(tmp_path, write, size):
    path = str(tmp_path / "a.png")
    expected = resampled(Image.fromarray(write(path)), size)
    np.testing.assert_array_equal(pixels_of(ImageDataset(size, [path])[0][0]), expected)


def test_cmyk_is_converted_before_resampling(tmp_path):
    path = str(tmp_path / "a.jpg")
    Image.fromarray(noise(8, 20, 24, 4)).convert("CMYK").save(path)
    with Image.open(path) as image:
        assert image.mode == "CMYK"
        expected = resampled(image.convert("RGB"), 8)
    np.testing.assert_array_equal(pixels_of(ImageDataset(8, [path])[0][0]), expected)


def test_of_an_animated_gif_the_first_frame_counts(tmp_path):
    path = str(tmp_path / "a.gif")
    first, second = palette_image(9), palette_image(10)
    first.save(path, save_all=True, append_images=[second])
    with Image.open(path) as image:
        assert image.n_frames == 2
    expected = resampled(Image.fromarray(palette_colours(first)), 8)
    np.testing.assert_array_equal(pixels_of(ImageDataset(8, [path])[0][0]), expected)


@pytest.mark.parametrize("mode", ["RGB", "L", "P"])
def test_one_channel_is_greyscale_before_resampling(tmp_path, mode):
    image = palette_image(11) if mode == "P" else Image.fromarray(noise(11, 20, 24, 3)).convert(mode)
    image.save(tmp_path / "a.png")
    x, _ = ImageDataset(8, [str(tmp_path / "a.png")], image_channels=1)[0]
    assert x.shape == (1, 8, 8)
    grey = image.convert("RGB").convert("L") if mode != "L" else image
    np.testing.assert_array_equal(pixels_of(x), resampled(grey, 8)[:1])


# ---------------------------------------------------------------- labels, shards


def test_labels_are_the_places_of_the_prefixes_in_sorted_order(tmp_path):
    for name in ["dog_2.png", "ant_3.png", "sub/cat_1.png", "sub/dog_4_x.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4)).save(tmp_path / name)
    stream = load_data(
        data_dir=str(tmp_path), batch_size=4, image_size=4, class_cond=True, deterministic=True, num_workers=0
    )
    x, cond = next(stream)
    assert (x.dtype, cond["y"].dtype) == (th.float32, th.int64)
    assert cond["y"].tolist() == [0, 2, 1, 2]  # ant, dog, sub/cat, sub/dog


def test_no_labels_unless_asked(greys):
    assert next(load_data(data_dir=greys(2), batch_size=2, image_size=8, num_workers=0))[1] == {}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("load", [load_data, load_data_once])
def test_the_ranks_share_out_the_images_each_once(monkeypatch, greys, ranks, load):
    folder, seen, labels = greys(10), [], []
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        extra = dict(deterministic=True) if load is load_data else {}
        data = iter(load(data_dir=folder, batch_size=1, image_size=8, class_cond=True, num_workers=0, **extra))
        for _ in range(len(range(rank, 10, ranks))):
            x, cond = next(data)
            seen += numbers(x)
            labels += cond["y"].tolist()
    assert sorted(seen) == list(range(10))
    assert labels == [int(number >= 5) for number in seen]


def test_the_dataset_takes_its_shard_as_the_original_does():
    dataset = ImageDataset(8, list("abcdefgh"), classes=list(range(8)), shard=1, num_shards=3)
    assert (dataset.local_images, dataset.local_classes, len(dataset)) == (["b", "e", "h"], [1, 4, 7], 3)


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_deterministic_batches_come_in_sorted_order_for_ever(greys, num_workers):
    stream = load_data(data_dir=greys(7), batch_size=3, image_size=8, deterministic=True, num_workers=num_workers)
    assert [numbers(next(stream)[0]) for _ in range(5)] == [[0, 1, 2], [3, 4, 5]] * 2 + [[0, 1, 2]]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("deterministic", [False, True])
def test_order_and_random_numbers_are_those_of_a_new_dataloader_per_epoch(greys, num_workers, deterministic):
    folder = greys(11)
    dataset = ImageDataset(8, image_datasets._list_image_files_recursively(folder))

    def original():
        while True:
            yield from DataLoader(
                dataset, batch_size=3, shuffle=not deterministic, num_workers=num_workers, drop_last=True
            )

    def run(batches):
        th.manual_seed(5)
        return [(numbers(next(batches)[0]), th.random.get_rng_state().tolist()) for _ in range(10)]

    theirs = run(original())
    ours = run(
        load_data(data_dir=folder, batch_size=3, image_size=8, deterministic=deterministic, num_workers=num_workers)
    )
    assert ours == theirs  # three epochs and the beginning of a fourth; the generator's state after each batch
    epochs = [[number for batch, _ in ours[i : i + 3] for number in batch] for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 9 for epoch in epochs)
    assert deterministic == (epochs[0] == epochs[1])


# ---------------------------------------------------------------- super-resolution


@pytest.mark.parametrize("channels", [1, 3])
def test_low_res_is_the_mean_over_each_small_square(tmp_path, channels):
    write_images(tmp_path, count=4, size=16, channels=channels)
    stream = load_superres_data(
        data_dir=str(tmp_path),
        batch_size=4,
        large_size=16,
        small_size=4,
        class_cond=True,
        image_channels=channels,
        num_workers=0,
    )
    for _ in range(2):
        x, cond = next(stream)
        assert (x.shape, cond["low_res"].shape) == ((4, channels, 16, 16), (4, channels, 4, 4))
        expected = x.reshape(4, channels, 4, 4, 4, 4).mean(dim=(3, 5))
        th.testing.assert_close(cond["low_res"], expected, rtol=0, atol=1e-6)
        assert set(cond) == {"y", "low_res"}


def test_low_res_of_a_size_that_does_not_divide(tmp_path):
    write_images(tmp_path, count=2, size=8)
    stream = load_superres_data(data_dir=str(tmp_path), batch_size=2, large_size=8, small_size=3, num_workers=0)
    x, cond = next(stream)
    # pixel 0 of 3 covers pixels 0, 1, 2 of 8
    th.testing.assert_close(cond["low_res"][:, :, 0, 0], x[:, :, :3, :3].mean(dim=(2, 3)), rtol=0, atol=1e-6)


# ---------------------------------------------------------------- each image once


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, [[0, 1, 2], [3, 4, 5], [6]]),
        (5, [[0, 1, 2], [3, 4]]),
        (3, [[0, 1, 2]]),
        (2, [[0, 1]]),
        (100, [[0, 1, 2], [3, 4, 5], [6]]),
    ],
)
def test_load_data_once(greys, num_workers, limit, expected):
    rng = th.get_rng_state()
    data = load_data_once(
        data_dir=greys(7), batch_size=3, image_size=8, class_cond=True, num_workers=num_workers, limit=limit
    )
    batches = list(data)
    assert [numbers(x) for x, _ in batches] == expected
    assert [cond["y"].tolist() for _, cond in batches] == [[int(i >= 3) for i in batch] for batch in expected]
    assert th.equal(th.get_rng_state(), rng)


# ---------------------------------------------------------------- packed images


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """A folder of eleven images of many sizes and four classes, and the same packed. :return: both paths, as a dict."""
    root = tmp_path_factory.mktemp("photographs")
    for i in range(11):
        name = f"{'dbca'[i % 4]}_{i:02d}.{'jpg' if i % 3 else 'png'}"
        (root / "folder" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i, 17 + 5 * i, 40 - i, 3)).save(root / "folder" / str(i % 2) / name)
    paths = {}
    for channels in (1, 3):
        paths[channels] = str(root / f"{channels}.packed")
        write(SOURCES["images"](str(root / "folder"), image_size=8, image_channels=channels), paths[channels])
    return {"folder": str(root / "folder"), **paths}


def assert_same_batches(ours, theirs, count):
    """The bits of images, conditions and random numbers of `count` batches."""
    th.manual_seed(3)
    expected = [(*next(theirs), th.get_rng_state()) for _ in range(count)]
    th.manual_seed(3)
    for x, cond, rng in expected:
        got, got_cond = next(ours)
        assert (got.dtype, got.shape) == (x.dtype, x.shape) and got.is_contiguous()
        assert th.equal(got.view(th.int32), x.view(th.int32)) and th.equal(th.get_rng_state(), rng)
        assert got_cond.keys() == cond.keys()
        assert all(th.equal(got_cond[k], v) and got_cond[k].dtype == v.dtype for k, v in cond.items())


@pytest.mark.parametrize(
    "rank, channels, num_workers", [*itertools.product([None, 1], [1, 3], [-1, 0]), (None, 3, 2), (1, 1, 2)]
)
def test_packed_images_give_the_batches_of_their_folder(monkeypatch, photographs, rank, channels, num_workers):
    if rank is not None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", str(rank))
    for class_cond in (False, True):
        words = dict(
            batch_size=2, image_size=8, image_channels=channels, class_cond=class_cond, num_workers=num_workers
        )
        for deterministic in (False, True):
            streams = [
                load_data(data_dir=photographs[which], deterministic=deterministic, **words)
                for which in (channels, "folder")
            ]
            assert_same_batches(*streams, 13)


@pytest.mark.parametrize("class_cond", [False, True])
def test_packed_images_for_super_resolution(photographs, class_cond):
    words = dict(batch_size=3, large_size=8, small_size=4, class_cond=class_cond, num_workers=0)
    streams = [load_superres_data(data_dir=photographs[which], **words) for which in (3, "folder")]
    assert "low_res" in next(streams[0])[1] and next(streams[1])
    assert_same_batches(*(load_superres_data(data_dir=photographs[which], **words) for which in (3, "folder")), 7)


@pytest.mark.parametrize("limit", [None, 5, 100])
@pytest.mark.parametrize("rank", [0, 1])
def test_packed_images_once(monkeypatch, photographs, limit, rank):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    words = dict(batch_size=2, image_size=8, class_cond=True, num_workers=0, limit=limit)
    ours, theirs = (list(load_data_once(data_dir=photographs[which], **words)) for which in (3, "folder"))
    assert len(ours) == len(theirs)
    assert_same_batches(iter(ours), iter(theirs), len(theirs))


@pytest.mark.parametrize("before", [0, 1, 4, 6])
@pytest.mark.parametrize("change", [("folder", 3), (3, "folder"), (3, 3)], ids=str)
def test_a_run_continues_from_one_to_the_other(photographs, before, change):
    words = dict(batch_size=2, image_size=8, class_cond=True, num_workers=0)
    first, second = (load_data(data_dir=photographs[which], **words) for which in change)
    for _ in range(before):
        next(first)
    second.load_state_dict(first.state_dict())
    assert_same_batches(second, first, 9)


def test_packed_images_are_read_in_this_process_unless_told(photographs):
    workers = {
        (which, n): load_data(
            data_dir=photographs[which], batch_size=2, image_size=8, num_workers=n
        )._loader.num_workers
        for which in (3, "folder")
        for n in (-1, 0, 2)
    }
    assert workers == {(3, -1): 0, (3, 0): 0, (3, 2): 2, ("folder", -1): 1, ("folder", 0): 0, ("folder", 2): 2}


def test_a_sample_of_packed_images_is_that_of_the_folder(photographs):
    images, labels, _ = read_packed(photographs[3], with_labels=True)
    packed = PackedDataset(images, labels)
    folder = ImageDataset(8, image_datasets._list_image_files_recursively(photographs["folder"]), classes=list(labels))
    assert len(packed) == len(folder) == 11
    for i in range(11):
        (x, cond), (expected, expected_cond) = packed[i], folder[i]
        np.testing.assert_array_equal(x, expected)
        assert x.dtype == np.float32 and cond == expected_cond
        np.testing.assert_array_equal(packed.pixels(i), folder.pixels(i))


@pytest.mark.parametrize("load", [load_data, load_data_once])
@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (dict(image_size=16), ["8x8 with 3", "16x16 with 3", "prepare.py images"]),
        (dict(image_channels=1), ["8x8 with 3", "8x8 with 1"]),
        (dict(class_cond=True, num_classes=3), ["4 classes (a, b, c, ...)", "num_classes is 3"]),
        (dict(data_dir="gs://bucket/images.npz"), ["gs://bucket/images.npz", "local disk"]),
        (dict(data_dir="/nowhere/images.npz"), ["/nowhere/images.npz", "No such file"]),
        (dict(data_dir=__file__), [__file__, "not packed images"]),
    ],
)
def test_packed_images_that_cannot_work_are_refused_at_once(monkeypatch, photographs, load, wrong, parts):
    monkeypatch.setattr(bf, "isdir", os.path.isdir)  # asks no store
    with pytest.raises(InputError) as refusal:
        load(**{**dict(data_dir=photographs[3], batch_size=2, image_size=8), **wrong})
    message = str(refusal.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_fewer_packed_images_than_a_batch_are_refused_with_the_numbers(photographs):
    with pytest.raises(InputError, match=r"3\.packed: 11 images: fewer than a batch; give batch_size 11 or"):
        load_data(data_dir=photographs[3], batch_size=12, image_size=8)


def test_a_rank_without_images_asks_for_fewer_ranks(on_ranks, tmp_path):
    def refusal(rank):
        try:
            load_data(data_dir=str(write_images(tmp_path / f"{rank}", count=1)), batch_size=1, image_size=8)
        except InputError as e:
            return str(e)

    first, second = on_ranks(2, refusal)
    assert first is None and "give fewer ranks" in second


# ---------------------------------------------------------------- what cannot work


def corrupt(path):
    path.write_bytes(b"no image")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-60])


def flipped(path):
    """Bytes in the middle of the file changed."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 20] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize("load", [load_data, load_data_once])
@pytest.mark.parametrize(
    ("wrong", "parts"),
    [
        (dict(data_dir=""), ["data_dir", "folder"]),
        (dict(data_dir=None), ["data_dir", "folder"]),
        (dict(data_dir="{folder}/nowhere"), ["nowhere: ", "no such folder"]),
        (dict(data_dir="{folder}/empty"), ["empty: ", "no images", "jpg, jpeg, png, gif"]),
        (dict(class_cond=True, num_classes=2), ["3 classes", "a, b, c", "file names", "num_classes is 2"]),
    ],
)
def test_a_folder_that_cannot_work_is_refused_at_once(tmp_path, load, wrong, parts):
    write_images(tmp_path, count=6, classes=3)
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    (tmp_path / "empty" / "notes.txt").touch()
    arguments = {**dict(data_dir="{folder}", batch_size=2, image_size=8), **wrong}
    if arguments["data_dir"]:
        arguments["data_dir"] = arguments["data_dir"].format(folder=tmp_path)
    with pytest.raises(InputError) as refusal:
        load(**arguments)
    message = str(refusal.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("num_classes", [3, 4, None])
def test_as_many_classes_as_there_are_labels_are_enough(tmp_path, num_classes):
    write_images(tmp_path, count=6, classes=3)
    data = load_data_once(
        data_dir=str(tmp_path), batch_size=6, image_size=8, class_cond=True, num_classes=num_classes, num_workers=0
    )
    assert sorted(next(iter(data))[1]["y"].tolist()) == [0, 0, 1, 1, 2, 2]


def test_images_that_are_classes_of_their_own_are_noticed(tmp_path, monkeypatch):
    """As photographs named IMG1.png and so on are."""
    for i in range(4):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"IMG{i}.png")
    notes = []
    monkeypatch.setattr(logger, "note", notes.append)
    words = dict(data_dir=str(tmp_path), batch_size=2, image_size=8, class_cond=True)
    load_data(**words)
    assert any(note.startswith("WARNING") and "class of its own" in note for note in notes)
    with pytest.raises(InputError, match=r"num_classes is 2.*CLASS_NUMBER"):
        load_data(**words, num_classes=2)
    (tmp_path / "IMG1.png").rename(tmp_path / "IMG0.png_1.png")
    notes.clear()
    load_data(**words)
    assert not notes


def test_an_image_is_no_folder(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(InputError, match=r"a\.png: is an image"):
        load_data(data_dir=str(path), batch_size=1, image_size=8)


def test_fewer_images_than_a_batch_are_refused_with_the_numbers(monkeypatch, greys):
    folder = greys(5)
    with pytest.raises(InputError, match=r"greys: 5 images: fewer than a batch; give batch_size 5 or less"):
        load_data(data_dir=folder, batch_size=6, image_size=8)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(InputError, match=r"1 image for this one of 3 ranks: fewer .* give batch_size 1 or less"):
        load_data(data_dir=folder, batch_size=2, image_size=8)


@pytest.mark.parametrize("load", [load_data, load_data_once])
@pytest.mark.parametrize("damage", [corrupt, cut_short, flipped], ids=lambda damage: damage.__name__)
def test_an_unreadable_image_is_found_at_once(tmp_path, load, damage):
    write_images(tmp_path, count=5, size=32)
    bad = tmp_path / "b_003.png"
    damage(bad)
    with pytest.raises(InputError) as refusal:
        load(data_dir=str(tmp_path), batch_size=2, image_size=8)
    assert str(refusal.value).startswith(f"{bad}: cannot be read as an image")
    assert "\n" not in str(refusal.value)


def test_of_a_large_folder_images_from_all_over_it_are_checked(monkeypatch, greys):
    folder, decoded = greys(10), []
    monkeypatch.setattr(image_files, "CHECKED_IMAGES", 3)
    monkeypatch.setattr(image_files, "read_image", lambda path, retry: decoded.append(path))
    load_data(data_dir=folder, batch_size=2, image_size=8)
    assert [os.path.basename(path) for path in decoded] == ["a_00.png", "a_04.png", "b_08.png"]


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("load", [load_data, load_data_once])
def test_an_image_found_unreadable_later_is_named_in_one_line(monkeypatch, tmp_path, load, num_workers):
    write_images(tmp_path, count=6)
    bad = (tmp_path / "b_003.png").rename(tmp_path / "b_003\n\x1b.png")
    corrupt(bad)
    monkeypatch.setattr(image_files, "CHECKED_IMAGES", 2)  # the first and the fourth
    before = {process.pid for process in multiprocessing.active_children()}
    data = iter(load(data_dir=str(tmp_path), batch_size=6, image_size=8, num_workers=num_workers))
    with pytest.raises(InputError) as refusal:
        next(data)
    assert str(refusal.value).startswith(rf"{tmp_path}/b_003\n\x1b.png: cannot be read as an image")
    assert "\n" not in str(refusal.value) and " at 0x" not in str(refusal.value)
    del data, refusal  # and with them the workers; were they the garbage collector's, it would wait 5 s for each
    assert {process.pid for process in multiprocessing.active_children()} <= before


class Flaky:
    """open() that fails a few times."""

    def __init__(self, errors):
        self.errors = list(errors)

    def __call__(self, path, mode):
        if self.errors:
            raise self.errors.pop(0)
        return open(path, mode)


ERRORS = [OSError(5, "Input/output error"), OSError(116, "Stale file handle"), FileNotFoundError(2, "No such file")]


@pytest.mark.parametrize("error", [*ERRORS, ConnectionError("cut off"), KeyError("a cloud's own")], ids=repr)
@pytest.mark.parametrize("where", ["local", "remote"])
def test_a_read_that_fails_is_tried_again(monkeypatch, greys, error, where):
    folder, pauses = greys(3), []
    monkeypatch.setattr(image_files.time, "sleep", pauses.append)
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
    whole = ImageDataset(8, paths).pixels(0)
    flaky = Flaky([error] * len(image_files.RETRY_PAUSES))
    monkeypatch.setattr(image_files, "is_remote", lambda path: where == "remote")
    monkeypatch.setattr(image_files.bf, "BlobFile", flaky)
    monkeypatch.setattr(image_files, "open", flaky, raising=False)
    assert np.array_equal(ImageDataset(8, paths).pixels(0), whole)
    assert pauses == [*image_files.RETRY_PAUSES] and sum(image_files.RETRY_PAUSES) < 10
    flaky.errors = [error] * (len(image_files.RETRY_PAUSES) + 1)
    with pytest.raises(InputError) as info:
        ImageDataset(8, paths).pixels(0)
    assert paths[0] in str(info.value) and flaky.errors == []


@pytest.mark.parametrize("damage", [corrupt, cut_short])
def test_a_damaged_image_is_not_tried_again(monkeypatch, greys, damage):
    monkeypatch.setattr(image_files.time, "sleep", None)
    path = Path(greys(3), "b_02.png")
    damage(path)
    with pytest.raises(InputError, match=path.stem):
        ImageDataset(8, [str(path)]).pixels(0)


def test_a_read_without_memory_is_no_damage(monkeypatch, greys):
    monkeypatch.setattr(image_files, "open", Flaky([MemoryError()]), raising=False)
    with pytest.raises(MemoryError):
        ImageDataset(8, [os.path.join(greys(3), "b_02.png")]).pixels(0)


def test_a_broken_link_is_found_at_once(tmp_path):
    write_images(tmp_path, count=3)
    link = tmp_path / "c_link.png"
    link.symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(InputError) as refusal:
        load_data(data_dir=str(tmp_path), batch_size=2, image_size=8)
    assert str(link) in str(refusal.value)


def test_the_check_of_large_images_ends(monkeypatch, greys):
    folder, decoded = greys(10), []
    monkeypatch.setattr(image_files, "CHECK_SECONDS", -1)
    monkeypatch.setattr(image_files, "read_image", lambda path, retry: decoded.append(path))
    load_data(data_dir=folder, batch_size=2, image_size=8)
    assert len(decoded) == 1


@pytest.mark.parametrize("kind", ["folder", "packed"])
def test_a_checksum_is_of_the_images_and_labels_not_of_their_division(tmp_path, greys, monkeypatch, kind):
    """What tells interrupted evaluations of replaced images apart."""

    def checksum(**kwargs):
        kwargs = dict(data_dir=str(data), batch_size=1, image_size=8, class_cond=True, num_workers=0) | kwargs
        return load_data_once(**kwargs).dataset.checksum()

    def replace_one_and_pack(image):
        if image is not None:
            Image.fromarray(image).save(sorted(Path(folder).iterdir())[2])
        if kind == "packed":
            shutil.rmtree(data, ignore_errors=True)
            write(SOURCES["images"](folder, image_size=8), data)

    folder = greys(5)
    data = folder if kind == "folder" else str(tmp_path / "all.packed")
    replace_one_and_pack(None)
    whole = checksum()
    assert whole == checksum() and len({whole, checksum(limit=4), checksum(class_cond=False)}) == 3
    with monkeypatch.context() as patch:
        patch.setattr(image_datasets.dist_util, "world_size", lambda: 2)
        shares = []
        for rank in range(2):
            patch.setattr(image_datasets.dist_util, "rank", lambda rank=rank: rank)
            shares.append(checksum())
    assert sum(shares) == whole
    replace_one_and_pack(noise(0, 8, 8, 3))
    assert checksum() != whole
