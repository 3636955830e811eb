"""load_data(random_flip=True): which images are mirrored, and that nothing else changes."""

import pytest
import torch as th
from harness import write_images
from PIL import Image

from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES
from improved_diffusion.image_datasets import load_data, load_data_once, load_superres_data

COUNT = 11
WORDS = dict(batch_size=3, class_cond=True)
EPOCHS = 3 * 3  # batches
PLAIN, SUPERRES = (load_data, dict(image_size=8)), (load_superres_data, dict(large_size=8, small_size=3))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of images, none another's mirror image or its own, and the same packed. :return: their paths."""
    root = tmp_path_factory.mktemp("flips")
    folder = write_images(root / "images", count=COUNT, size=20, classes=4)
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.tobytes() != image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).tobytes()
    paths = {"folder": str(folder)}
    for channels in (1, 3):
        paths[channels] = str(root / f"{channels}.packed")
        write(SOURCES["images"](paths["folder"], image_size=8, image_channels=channels), paths[channels])
    return paths


def sources(images, channels=3):
    """What the same images are loaded from, and by how many workers."""
    return [dict(data_dir=images[which], num_workers=n) for which in ("folder", channels) for n in (0, 1)]


def take(stream, count=EPOCHS):
    """Batches, their conditions and the random numbers behind each."""
    return [(*next(stream), th.get_rng_state()) for _ in range(count)]


def seeded(stream):
    th.manual_seed(3)
    return take(stream)


def assert_same(ours, theirs):
    """Bit for bit."""
    for (x, cond, rng), (expected, expected_cond, expected_rng) in zip(ours, theirs, strict=True):
        assert x.dtype == expected.dtype and th.equal(x, expected) and th.equal(rng, expected_rng)
        assert cond.keys() == expected_cond.keys()
        assert all(th.equal(cond[key], value) for key, value in expected_cond.items())


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_each_image_is_itself_or_its_mirror_image(images, channels, deterministic):
    """All else, the order, labels and random numbers, is what it is without."""
    words = dict(WORDS, image_size=8, image_channels=channels, deterministic=deterministic)
    for source in sources(images, channels):
        flipped, plain = (seeded(load_data(**source, **words, random_flip=flip)) for flip in (True, False))
        seen = []
        for (x, cond, rng), (expected, expected_cond, expected_rng) in zip(flipped, plain, strict=True):
            assert x.dtype == expected.dtype and x.is_contiguous() and th.equal(rng, expected_rng)
            assert cond.keys() == expected_cond.keys() == {"y"} and th.equal(cond["y"], expected_cond["y"])
            for ours, theirs in zip(x, expected, strict=True):
                seen.append(th.equal(ours, theirs.flip(-1)))
                assert seen[-1] != th.equal(ours, theirs)
        assert 5 < sum(seen) < 22  # of 27
        first, second, third = seen[:9], seen[9:18], seen[18:]
        assert first != second != third != first


def test_it_is_off_by_default(images):
    for source in sources(images):
        for load, sizes in (PLAIN, SUPERRES):
            off, default = (load(**source, **sizes, **WORDS, **more) for more in (dict(random_flip=False), {}))
            assert_same(seeded(default), seeded(off))


@pytest.mark.parametrize(("load", "sizes"), [PLAIN, SUPERRES], ids=["plain", "superres"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_are_mirrored_whoever_decodes_them(images, load, sizes, deterministic):
    words = dict(WORDS, **sizes, deterministic=deterministic, random_flip=True)
    first, *others = (seeded(load(**source, **words)) for source in sources(images))
    for batches in others:
        assert_same(batches, first)


@pytest.mark.parametrize("ranks", [1, 2])
def test_low_res_is_made_of_the_mirrored_image(monkeypatch, images, ranks):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("RANK", str(ranks - 1))
    whole, _ = next(load_data_once(data_dir=images[3], batch_size=COUNT, image_size=8))
    for source in sources(images):
        mirrored = 0
        for x, cond, _ in seeded(load_superres_data(**source, **SUPERRES[1], **WORDS, random_flip=True)):
            assert th.equal(cond["low_res"], th.nn.functional.interpolate(x, 3, mode="area"))
            of_folder = [any(th.equal(one, image) for image in whole) for one in x]
            mirrored += of_folder.count(False)
        assert 5 < mirrored < 22


@pytest.mark.parametrize("before", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("change", [(0, 0), (1, 2), (3, 1)], ids=["same", "packed later", "unpacked later"])
def test_a_resumed_run_mirrors_the_same(images, before, change):
    words = dict(WORDS, **SUPERRES[1], random_flip=True)
    stream, resumed = (load_superres_data(**sources(images)[i], **words) for i in change)
    take(stream, before)
    state, rng = stream.state_dict(), th.get_rng_state()
    expected = take(stream)
    resumed.load_state_dict(state)
    th.set_rng_state(rng)
    assert_same(take(resumed), expected)


def test_what_is_known_of_the_images_is_known_of_mirrored_ones(images):
    for source in sources(images):
        stream, plain = (
            load_superres_data(**source, **SUPERRES[1], **WORDS, random_flip=flip) for flip in (True, False)
        )
        assert (stream.dataset.num_images, stream.dataset.class_names) == (COUNT, list("abcd"))
        (x, cond), (expected, expected_cond) = stream.first(4), plain.first(4)  # for previews: as they are
        assert th.equal(x, expected) and th.equal(cond["low_res"], expected_cond["low_res"])
