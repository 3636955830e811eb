"""The file of packed images: what is in it, who can read it, and what is said of a damaged one."""

import random
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.data.packed import read_packed_images, write_packed_images
from improved_diffusion.utils.errors import InputError

LABELS, CLASSES = [0, 2, 1, 0, 2], ["ant", "日本", "\udcff"]  # the last is a file name that is no text


def pixels(n=5, size=4, channels=3):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, channels)).astype(np.uint8)


def write(path, images=None, batch=2, labels=LABELS, classes=CLASSES):
    images = pixels() if images is None else images
    batches = (images[i : i + batch] for i in range(0, len(images), batch))
    write_packed_images(str(path), batches, images.shape, labels, classes)
    return str(path)


def written(folder, **kwargs):
    """The bytes of such a file."""
    return Path(write(folder / "a.npz", **kwargs)).read_bytes()


# ---------------------------------------------------------------- writing and reading


@given(n=st.integers(1, 7), size=st.integers(1, 9), channels=st.sampled_from([1, 3]), batch=st.integers(1, 8))
def test_what_is_written_is_read(tmp_path_factory, n, size, channels, batch):
    images, labels = pixels(n, size, channels), [i % 2 for i in range(n)]
    path = write(tmp_path_factory.mktemp("packed") / "a.npz", images, batch, labels, ["a", "b"])
    got, got_labels, got_classes = read_packed_images(path, with_labels=True)
    np.testing.assert_array_equal(got, images)
    assert (got.dtype, got_labels.dtype) == (np.uint8, np.int64)
    assert (got_labels.tolist(), got_classes) == (labels, ["a", "b"])
    assert read_packed_images(path, with_labels=False)[1:] == (None, None)


def test_any_numpy_reads_it(tmp_path):
    with np.load(write(tmp_path / "a.npz"), allow_pickle=False) as arrays:
        assert sorted(arrays) == ["classes", "images", "labels"]
        np.testing.assert_array_equal(arrays["images"], pixels())
        assert (arrays["labels"].tolist(), arrays["classes"].tolist()) == (LABELS, CLASSES)
        assert arrays.zip.testzip() is None


def by_savez(path):
    np.savez(path, classes=np.array(CLASSES), images=pixels(), labels=np.array(LABELS, np.uint8))


def by_zip(path):
    """Not zip64, with a comment, behind other bytes."""
    by_savez(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    path.write_bytes(b"other bytes")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"a comment"
        for name, content in members.items():
            archive.writestr(name, content)


@pytest.mark.parametrize("made", [by_savez, by_zip], ids=lambda made: made.__name__)
def test_a_file_from_elsewhere(tmp_path, made):
    made(tmp_path / "a.npz")
    images, labels, classes = read_packed_images(str(tmp_path / "a.npz"), with_labels=True)
    np.testing.assert_array_equal(images, pixels())
    assert (labels.dtype, labels.tolist(), classes) == (np.int64, LABELS, CLASSES)


def test_labels_are_not_needed_unless_wanted(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels())
    assert len(read_packed_images(str(tmp_path / "a.npz"), with_labels=False)[0]) == 5


def test_images_are_mapped_not_loaded(tmp_path):
    """What changes in the file changes in the array; it cannot be written to."""
    path = tmp_path / "a.npz"
    images, _, _ = read_packed_images(write(path), with_labels=True)
    content = path.read_bytes()
    at = content.index(pixels()[3].tobytes())
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(bytes([255 - content[at]]))
    assert images[3, 0, 0, 0] == 255 - pixels()[3, 0, 0, 0]
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_the_same_images_make_the_same_file(tmp_path, monkeypatch):
    first = written(tmp_path, batch=2)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    assert written(tmp_path, batch=3) == first


def test_a_file_in_use_may_be_written_anew(tmp_path):
    images, _, _ = read_packed_images(write(tmp_path / "a.npz"), with_labels=False)
    write(tmp_path / "a.npz", pixels(2), labels=[0, 0])
    np.testing.assert_array_equal(images, pixels())
    assert len(read_packed_images(str(tmp_path / "a.npz"), with_labels=False)[0]) == 2


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_failure_leaves_what_was_there(tmp_path, before):
    path = tmp_path / "a.npz"
    if before:
        path.write_bytes(before)

    def batches():
        yield pixels()[:2]
        raise InputError("b_003.png: cannot be read")

    with pytest.raises(InputError, match=r"b_003\.png"):
        write_packed_images(str(path), batches(), (5, 4, 4, 3), LABELS, CLASSES)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("a.npz", before)] if before else [])


def test_a_place_that_cannot_be_written_to_is_said_before_the_first_image(tmp_path):
    (tmp_path / "file").touch()

    def batches():
        pytest.fail("an image was decoded")
        yield

    with pytest.raises(InputError, match=r"file/a\.npz: cannot be written"):
        write_packed_images(f"{tmp_path}/file/a.npz", batches(), (5, 4, 4, 3), LABELS, CLASSES)


@pytest.mark.parametrize(
    ("batches", "labels", "message"),
    [
        ([pixels()[:2], pixels()[2:4]], LABELS, "4 images and 5 labels, not 5 of each"),
        ([], LABELS, "0 images and 5 labels"),
        ([pixels(), pixels()[:1]], LABELS, "6 images and 5 labels"),
        ([pixels()], LABELS[:4], "5 images and 4 labels"),
        ([pixels()[:, :3]], LABELS, r"images of uint8 \(3, 4, 3\), not of uint8 \(4, 4, 3\)"),
        ([pixels(channels=1)], LABELS, r"images of uint8 \(4, 4, 1\)"),
        ([pixels() / 255], LABELS, r"images of float64"),
    ],
    ids=["too few", "none", "too many", "too few labels", "other size", "other channels", "other type"],
)
@pytest.mark.parametrize("before", [None, b"what was there"])
def test_images_that_are_not_as_announced_leave_no_file(tmp_path, before, batches, labels, message):
    if before:
        (tmp_path / "a.npz").write_bytes(before)
    with pytest.raises(ValueError, match=f"a\\.npz: {message}"):
        write_packed_images(f"{tmp_path}/a.npz", iter(batches), (5, 4, 4, 3), labels, CLASSES)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == ([("a.npz", before)] if before else [])


# ---------------------------------------------------------------- what cannot work


def saved(**arrays):
    return lambda path: np.savez(path, **{"images": pixels(), "labels": LABELS, "classes": CLASSES, **arrays})


NOT_WHOLE = ["not a whole file of packed images", "prepare_images.py"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["cannot be read", "No such file"]),
        (lambda path: path.mkdir(), ["cannot be read", "directory"]),
        (lambda path: path.touch(), NOT_WHOLE),
        (lambda path: path.write_text("images"), NOT_WHOLE),
        (lambda path: path.write_bytes(pixels().tobytes()), NOT_WHOLE),
        (lambda path: np.savez(path, pixels(), LABELS), ["no images in it", "arr_0.npy, arr_1.npy"]),
        (lambda path: np.savez(path), ["no images in it", "nothing"]),
        (lambda path: np.savez_compressed(path, images=pixels()), ["compressed", "numpy.savez"]),
        (saved(images=pixels() / 255), ["float64 of shape (5, 4, 4, 3)", "uint8 of shape (N, S, S, 1 or 3)"]),
        (saved(images=pixels().astype(np.int8)), ["int8 of shape"]),
        (saved(images=pixels()[0]), ["uint8 of shape (4, 4, 3)"]),
        (saved(images=pixels()[:, :3]), ["uint8 of shape (5, 3, 4, 3)"]),
        (saved(images=pixels(channels=4)), ["uint8 of shape (5, 4, 4, 4)"]),
        (saved(images=pixels()[:0], labels=[]), ["uint8 of shape (0, 4, 4, 3)"]),
        (saved(images=np.asfortranarray(pixels())), ["Fortran order"]),
        (saved(images=np.array([{}])), ["object of shape (1,)"]),
        (lambda path: np.savez(path, images=pixels()), ["no labels and no classes", "class_cond"]),
        (lambda path: np.savez(path, images=pixels(), labels=LABELS), ["no classes in it", "class_cond"]),
        (saved(labels=LABELS[:4]), ["labels are int64 of shape (4,)", "5 integers"]),
        (saved(labels=np.array(LABELS) / 2), ["labels are float64", "5 integers"]),
        (saved(labels=np.array(LABELS, object)), NOT_WHOLE),
        (saved(labels=[0, 1, 2, 3, 0]), ["labels from 0 to 3", "3 classes allow 0 to 2"]),
        (saved(labels=[0, 1, 2, -1, 0]), ["labels from -1 to 2", "3 classes allow 0 to 2"]),
        (saved(classes=[1, 2, 3]), ["classes are int64 of shape (3,)", "names"]),
        (saved(classes=[["a", "b", "c"]]), ["classes are <U1 of shape (1, 3)", "names"]),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, make, parts):
    path = tmp_path / "a.npz"
    make(path)
    with pytest.raises(InputError) as refusal:
        read_packed_images(str(path), with_labels=True)
    message = str(refusal.value)
    assert message.startswith(f"data_dir {path}: ") and "\n" not in message
    assert [part for part in parts if part not in message] == []


def test_a_url_is_refused():
    with pytest.raises(InputError, match=r"data_dir gs://bucket/a\.npz: .* copy the file"):
        read_packed_images("gs://bucket/a.npz", with_labels=False)


def read_damaged(path, content):
    """The images of a damaged file, None if it was refused as it should be."""
    path.write_bytes(content)
    try:
        images, labels, classes = read_packed_images(str(path), with_labels=True)
    except InputError as e:
        assert str(path) in str(e) and "\n" not in str(e)
        return None
    # damaged pixels go unnoticed; all else is checked
    assert (images.dtype, images.shape) == (np.uint8, (5, 4, 4, 3))
    assert (labels.tolist(), classes) == (LABELS, CLASSES)
    return images.copy()


def test_every_truncation_is_noticed(tmp_path):
    content = written(tmp_path)
    for length in range(len(content)):
        assert read_damaged(tmp_path / "b.npz", content[:length]) is None, length


def test_every_flipped_bit_outside_the_pixels_is_noticed_or_changes_nothing(tmp_path):
    content = bytearray(written(tmp_path))
    refused = 0
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        refused += read_damaged(tmp_path / "b.npz", content) is None
        content[at] ^= 1 << at % 8
    assert refused > 100


@pytest.mark.parametrize("seed", range(4))
def test_random_damage(tmp_path, seed):
    rng = random.Random(seed)
    whole = written(tmp_path)
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 5])):
            at, count = rng.randrange(len(content)), rng.choice([1, 2, 4, 30])
            how = rng.choice(["overwrite", "insert", "delete"])
            if how == "overwrite":
                content[at : at + count] = rng.randbytes(count)
            elif how == "insert":
                content[at:at] = rng.randbytes(count)
            else:
                del content[at : at + count]
        read_damaged(tmp_path / "b.npz", content)
