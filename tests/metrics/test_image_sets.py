"""Sets of images: each kind gives the same pixels, shared by the ranks; what cannot be compared is named at once."""

import io
import zipfile

import numpy as np
import pytest
from harness import random_images, save_npz, write_images
from PIL import Image

from improved_diffusion.data.packed import write_packed
from improved_diffusion.metrics.image_sets import ImageSet, evenly, open_pair
from improved_diffusion.utils.errors import InputError


def save_folder(path, images):
    path.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(path / f"{i:03d}.png")
    return str(path)


def save_packed(path, images):
    write_packed(str(path), [images], images.shape, [0] * len(images), ["a"])
    return str(path)


def save_old_packed(path, images):
    np.savez(path, images=images, labels=np.zeros(len(images), np.int64), classes=np.array(["a"]))
    return str(path)


KINDS = {
    "images.npz": save_npz,
    "folder": save_folder,
    "images.packed": save_packed,
    "old.npz": save_old_packed,
    "compressed.npz": lambda path, images: np.savez_compressed(path, arr_0=images) or str(path),
}


def all_of(images):
    parts = list(images.batches())
    return np.concatenate([n for n, _ in parts]), np.concatenate([x for _, x in parts])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_kind_gives_the_same_pixels_in_order_twice(tmp_path, kind, channels):
    x = random_images(7, channels=channels)
    images = ImageSet(KINDS[kind](tmp_path / kind, x), batch_size=3, num_workers=0)
    images.scale_to((8, 8, channels))
    assert (images.count, images.shape, images.has_images) == (7, (8, 8, channels), True)
    for _ in range(2):
        numbers, found = all_of(images)
        assert numbers.tolist() == list(range(7)) and (found == x).all()


@pytest.mark.parametrize("kind", ["images.npz", "folder", "images.packed"])
@pytest.mark.parametrize("size", [2, 3, 9])
def test_ranks_share_the_images(tmp_path, on_ranks, kind, size):
    path, x = KINDS[kind](tmp_path / kind, random_images(7)), random_images(7)

    def on_rank(rank):
        images = ImageSet(path, batch_size=2, num_workers=0)
        images.scale_to((8, 8, 3))
        return images.count, list(images.batches())

    found = {}
    for count, parts in on_ranks(size, on_rank):
        assert count == 7
        for numbers, batch in parts:
            found.update(zip(numbers.tolist(), batch, strict=True))
    assert sorted(found) == list(range(7)) and all((found[i] == x[i]).all() for i in found)


@pytest.mark.parametrize("of", [1, 7, 100])
def test_indices_that_are_spread_evenly(of):
    for count in (1, of // 2 + 1, of, 2 * of):
        found = evenly(count, of)
        gaps = np.diff(found)
        assert len(found) == min(count, of) and found[0] >= 0 and found[-1] < of
        assert len(found) < 2 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)
        assert abs(found[0] - (of - 1 - found[-1])) <= 1  # as far from either end


def test_a_folder_is_scaled_to_the_size_of_the_other_set(tmp_path):
    samples = save_npz(tmp_path / "a.npz", random_images(7, channels=1))
    folder = str(write_images(tmp_path / "photos", size=20))
    for a, b in ((samples, folder), (folder, samples)):
        assert [images.shape for images in open_pair(a, b, num_workers=0)] == [(8, 8, 1)] * 2
    assert [images.shape for images in open_pair(folder, folder, 5, num_workers=0)] == [(5, 5, 3)] * 2


def test_statistics_have_no_images(tmp_path):
    path = save_npz(tmp_path / "stats.npz", mu=np.zeros(2), sigma=np.eye(2), count=9, shape=[8, 8, 3])
    images = ImageSet(path)
    assert (images.count, images.shape, images.has_images) == (9, (8, 8, 3), False)
    plain = ImageSet(save_npz(tmp_path / "plain.npz", mu=np.zeros(2), sigma=np.eye(2)))
    assert (plain.count, plain.shape, plain.has_images) == (None, None, False)


def truncated(path, images):
    data = io.BytesIO()
    np.savez(data, arr_0=images)
    path.write_bytes(data.getvalue()[:-40])
    return str(path)


@pytest.mark.parametrize(
    ("write", "named"),
    [
        (lambda p: save_npz(p, random_images(7) / 255), ["float64", "uint8"]),
        (lambda p: save_npz(p, random_images(7)[0]), ["(8, 8, 3)"]),
        (lambda p: save_npz(p, random_images(7, channels=2)), ["(7, 8, 8, 2)"]),
        (lambda p: save_npz(p, random_images(1)), ["1 images", "2 or more"]),
        (lambda p: save_npz(p, mu=np.zeros(2)), ["mu", "arr_0"]),
        (lambda p: truncated(p, random_images(7)), ["not an npz file"]),
        (lambda p: str(p), ["no such file"]),
        (lambda p: str(p)[:-4], ["no such folder"]),
        (lambda p: save_folder(p.with_name("one"), random_images(1)), ["1 images", "2 or more"]),
        (lambda p: p.with_name("empty").mkdir() or str(p.with_name("empty")), ["no images"]),
    ],
)
def test_what_is_no_set_of_images(tmp_path, write, named):
    path = write(tmp_path / "a.npz")
    with pytest.raises(InputError) as e:
        ImageSet(path, num_workers=0).scale_to((8, 8, 3))
    assert path in str(e.value) and all(text in str(e.value) for text in named)


def test_sets_of_unequal_sizes_are_not_compared(tmp_path):
    a, b = save_npz(tmp_path / "a.npz", random_images(7)), save_packed(tmp_path / "b.packed", random_images(7, size=4))
    with pytest.raises(InputError, match=r"a\.npz: .*8x8.*4x4"):
        open_pair(a, b)
    with pytest.raises(InputError, match=r"b\.packed: .*4x4.*8x8"):
        open_pair(a, b, image_size=8)
    grey = save_npz(tmp_path / "grey.npz", random_images(7, channels=1))
    with pytest.raises(InputError, match=r"3 channels"):
        open_pair(a, grey)
    folder = str(write_images(tmp_path / "photos"))
    with pytest.raises(InputError, match=f"image_size.*{folder}"):
        open_pair(folder, folder)


def test_damaged_pixels_are_noticed(tmp_path):
    path = tmp_path / "a.npz"
    save_npz(path, random_images(7, size=64))
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        data[archive.getinfo("arr_0.npy").header_offset + 80_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"a\.npz: damaged"):
        all_of(ImageSet(str(path)))
