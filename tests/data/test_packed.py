"""Packed images: what is written, who can read it, and what is refused."""

import io
import pickle
import random
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import fill_disk, on_a_full_disk, snapshot
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion.data import packed
from improved_diffusion.data.packed import is_packed, read_packed, write_packed
from improved_diffusion.image_datasets import PackedDataset, load_data_once
from improved_diffusion.utils.errors import InputError

LABELS, CLASSES = [0, 2, 1, 0, 2], ["ant", "日本", "\udcff"]  # the last is a file name that is no text


def pixels(n=5, size=4, channels=3):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, channels)).astype(np.uint8)


def write(path, images=None, batch=2, labels=LABELS, classes=CLASSES):
    images = pixels() if images is None else images
    batches = (images[i : i + batch] for i in range(0, len(images), batch))
    write_packed(str(path), batches, images.shape, labels, classes)
    return str(path)


def old_file(path):
    """As version 1.0 wrote it."""
    np.savez(path, images=pixels(), labels=np.array(LABELS), classes=np.array(CLASSES))


# ---------------------------------------------------------------- writing and reading


@given(n=st.integers(1, 7), size=st.integers(1, 9), channels=st.sampled_from([1, 3]), batch=st.integers(1, 8))
def test_what_is_written_is_read(tmp_path_factory, n, size, channels, batch):
    images, labels = pixels(n, size, channels), [i % 2 for i in range(n)]
    path = write(tmp_path_factory.mktemp("packed") / "a.packed", images, batch, labels, ["a", "b"])
    got, got_labels, got_classes = read_packed(path, with_labels=True)
    np.testing.assert_array_equal(got, images)
    assert (got.dtype, got_labels.dtype) == (np.uint8, np.int64)
    assert (got_labels.tolist(), got_classes) == (labels, ["a", "b"])
    assert read_packed(path, with_labels=False)[1:] == (None, None)


def test_any_numpy_reads_it(tmp_path):
    path = write(tmp_path / "a.packed")
    np.testing.assert_array_equal(np.load(f"{path}/images.npy", allow_pickle=False), pixels())
    with np.load(f"{path}/labels.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {"labels": LABELS, "classes": CLASSES}


def by_numpy(path):
    path.mkdir()
    np.save(path / "images.npy", np.asfortranarray(pixels()))
    np.savez_compressed(path / "labels.npz", classes=CLASSES, labels=np.array(LABELS, np.uint8))


def old_and_compressed(path):
    np.savez_compressed(path, images=pixels(), labels=np.array(LABELS, np.uint8), classes=CLASSES)


@pytest.mark.parametrize(
    ("name", "make"),
    [("a.packed", by_numpy), ("any name", by_numpy), ("a.npz", old_file), ("a.npz", old_and_compressed)],
)
def test_what_others_wrote(tmp_path, name, make):
    make(tmp_path / name)
    assert is_packed(str(tmp_path / name))
    images, labels, classes = read_packed(str(tmp_path / name), with_labels=True)
    np.testing.assert_array_equal(images, pixels())
    assert (labels.dtype, labels.tolist(), classes) == (np.int64, LABELS, CLASSES)


@pytest.mark.parametrize("large", [False, True])
def test_a_large_file_of_version_1_is_worth_a_warning(monkeypatch, tmp_path, large):
    warnings = []
    monkeypatch.setattr(packed.logger, "note", warnings.append)
    monkeypatch.setattr(packed, "LARGE", pixels().nbytes - large)
    old_file(tmp_path / "a.npz")
    read_packed(str(tmp_path / "a.npz"), with_labels=False)
    assert len(warnings) == large and all("a.npz" in line and "prepare.py" in line for line in warnings)


def test_labels_are_not_needed_unless_wanted(tmp_path):
    np.save(tmp_path / "images.npy", pixels())
    assert len(read_packed(str(tmp_path), with_labels=False)[0]) == 5


def test_what_is_packed_and_what_is_a_folder_of_images(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    for path in ("images", "images/", "folder.npz", "nowhere", "gs://bucket/images"):
        assert not is_packed(path), path
    for path in ("file", "nowhere.npz", "nowhere.packed", "nowhere.packed/", "gs://bucket/a.packed"):
        assert is_packed(path), path


def test_images_are_mapped_not_loaded(tmp_path):
    """What changes in the file changes in the array; it cannot be written to."""
    path = write(tmp_path / "a.packed")
    images, _, _ = read_packed(path, with_labels=True)
    with open(f"{path}/images.npy", "r+b") as f:
        f.seek(-1, 2)
        f.write(bytes([255 - pixels()[-1, -1, -1, -1]]))
    assert images[-1, -1, -1, -1] == 255 - pixels()[-1, -1, -1, -1]
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_the_same_images_make_the_same_bytes(tmp_path, monkeypatch):
    write(tmp_path / "a", batch=2)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write(tmp_path / "b", batch=3)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


def test_an_empty_folder_is_filled_and_a_temporary_one_replaced(tmp_path):
    (tmp_path / "a.packed").mkdir()
    (tmp_path / "a.packed.tmp").mkdir()  # of a process that was killed
    (tmp_path / "a.packed.tmp" / "images.npy").write_bytes(b"cut off")
    np.testing.assert_array_equal(read_packed(write(tmp_path / "a.packed"), with_labels=True)[0], pixels())
    assert [path.name for path in tmp_path.iterdir()] == ["a.packed"]


# ---------------------------------------------------------------- what cannot be written


def interrupted():
    yield pixels()[:2]
    raise KeyboardInterrupt


def unreadable():
    yield pixels()[:2]
    raise InputError("b_003.png: cannot be read")


@pytest.mark.parametrize(
    ("batches", "labels", "error", "message"),
    [
        (unreadable(), LABELS, InputError, r"b_003\.png"),
        (interrupted(), LABELS, KeyboardInterrupt, "^"),
        ([pixels()[:2], pixels()[2:4]], LABELS, ValueError, "4 images and 5 labels, not 5 of each"),
        ([], LABELS, ValueError, "0 images and 5 labels"),
        ([pixels(), pixels()[:1]], LABELS, ValueError, "6 images and 5 labels"),
        ([pixels()], LABELS[:4], ValueError, "5 images and 4 labels"),
        ([pixels()[:, :3]], LABELS, ValueError, r"images of uint8 \(3, 4, 3\), not of uint8 \(4, 4, 3\)"),
        ([pixels(channels=1)], LABELS, ValueError, r"images of uint8 \(4, 4, 1\)"),
        ([pixels() / 255], LABELS, ValueError, r"images of float64"),
    ],
)
def test_a_failure_leaves_nothing(tmp_path, batches, labels, error, message):
    with pytest.raises(error, match=message):
        write_packed(f"{tmp_path}/a.packed", iter(batches), (5, 4, 4, 3), labels, CLASSES)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("file/a.packed", "cannot be written"),
        ("file", "exists"),
        ("full", "exists"),
        ("link", "exists"),
        ("gs://bucket/a", "local folder"),
    ],
)
def test_a_place_that_cannot_be_written_to_is_refused_before_the_first_image(monkeypatch, tmp_path, path, message):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("full").mkdir()
    Path("full/file").touch()
    Path("link").symlink_to("nowhere")
    before = snapshot(tmp_path)

    def batches():
        pytest.fail("an image was decoded")
        yield

    with pytest.raises(InputError, match=f"^{path}.*: .*{message}"):
        write_packed(path, batches(), (5, 4, 4, 3), LABELS, CLASSES)
    assert snapshot(tmp_path) == before


@on_a_full_disk
def test_a_full_disk_is_one_line(monkeypatch, tmp_path):
    fill_disk(monkeypatch, "images.npy")
    with pytest.raises(InputError, match=r"images\.npy: cannot be written \(No space left on device\)"):
        write(tmp_path / "a.packed", pixels(2000))
    assert list(tmp_path.iterdir()) == []


def test_a_link_under_the_temporary_name_is_not_followed(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "images.npy").write_text("precious")
    (tmp_path / "a.packed.tmp").symlink_to("precious")
    write(tmp_path / "a.packed", pixels())
    assert (tmp_path / "precious" / "images.npy").read_text() == "precious"
    assert not (tmp_path / "a.packed").is_symlink() and not (tmp_path / "a.packed.tmp").is_symlink()


def test_what_comes_into_the_way_meanwhile_is_not_overwritten(tmp_path):
    def batches():
        (tmp_path / "a.packed").mkdir()
        (tmp_path / "a.packed" / "file").touch()
        yield pixels()

    with pytest.raises(InputError, match=r"a\.packed: cannot be written \(Directory not empty\)"):
        write_packed(f"{tmp_path}/a.packed", batches(), (5, 4, 4, 3), LABELS, CLASSES)
    assert snapshot(tmp_path) == {"a.packed": None, "a.packed/file": b""}


# ---------------------------------------------------------------- what cannot be read


def savez(path, *arrays, **named):
    with open(path, "wb") as f:  # numpy would append .npz to a name
        np.savez(f, *arrays, **named)


def saved(**arrays):
    arrays = {"images": pixels(), "labels": LABELS, "classes": CLASSES, **arrays}

    def folder(path):
        path.mkdir()
        np.save(path / "images.npy", arrays["images"])
        np.savez(
            path / "labels.npz", **{name: arrays[name] for name in ("labels", "classes") if arrays[name] is not None}
        )

    return folder


def also(change):
    def make(path):
        saved()(path)
        change(path)

    return make


def append(path):
    with open(path, "ab") as f:
        f.write(b"more")


def longer_labels(path):
    """A whole archive of an array with more behind it than its header says."""
    member = io.BytesIO()
    np.save(member, np.array(LABELS))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", member.getvalue() + b"more")
        archive.writestr("classes.npy", member.getvalue())


NOT_WHOLE = ["not packed images", "prepare.py"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["cannot be read", "No such file"]),
        (lambda path: path.mkdir(), ["images.npy: cannot be read", "No such file"]),
        (also(lambda path: (path / "labels.npz").unlink()), ["labels.npz: cannot be read", "No such file"]),
        (also(lambda path: (path / "images.npy").write_bytes(b"")), NOT_WHOLE),
        (also(lambda path: (path / "images.npy").write_bytes(pixels().tobytes())), NOT_WHOLE),
        (also(lambda path: savez(path / "images.npy", pixels())), NOT_WHOLE),
        (also(lambda path: (path / "labels.npz").write_bytes(b"labels")), NOT_WHOLE),
        (also(lambda path: append(path / "images.npy")), NOT_WHOLE),
        (also(lambda path: longer_labels(path / "labels.npz")), NOT_WHOLE),
        (lambda path: path.touch(), NOT_WHOLE),
        (lambda path: path.write_text("images"), NOT_WHOLE),
        (lambda path: savez(path, pixels(), LABELS), ["no images", "arr_0, arr_1"]),
        (lambda path: savez(path), ["no images", "nothing"]),
        (saved(images=pixels() / 255), ["float64 of shape (5, 4, 4, 3)", "uint8 of shape (N, S, S, 1 or 3)"]),
        (saved(images=pixels().astype(np.int8)), ["int8 of shape"]),
        (saved(images=pixels()[0]), ["uint8 of shape (4, 4, 3)"]),
        (saved(images=pixels()[:, :3]), ["uint8 of shape (5, 3, 4, 3)"]),
        (saved(images=pixels(channels=4)), ["uint8 of shape (5, 4, 4, 4)"]),
        (saved(images=pixels()[:0], labels=[]), [""]),
        (saved(images=np.array([{}])), NOT_WHOLE),
        (saved(labels=None, classes=None), ["no labels and no classes"]),
        (saved(classes=None), ["no classes"]),
        (saved(labels=LABELS[:4]), ["labels are int64 of shape (4,)", "5 integers"]),
        (saved(labels=np.array(LABELS) / 2), ["labels are float64", "5 integers"]),
        (saved(labels=np.array(LABELS, object)), NOT_WHOLE),
        (saved(labels=[0, 1, 2, 3, 0]), ["labels from 0 to 3", "3 classes allow 0 to 2"]),
        (saved(labels=[0, 1, 2, -1, 0]), ["labels from -1 to 2", "3 classes allow 0 to 2"]),
        (saved(classes=[1, 2, 3]), ["classes are int64 of shape (3,)", "names"]),
        (saved(classes=[["a", "b", "c"]]), ["classes are <U1 of shape (1, 3)", "names"]),
    ],
)
def test_what_is_something_else_is_refused_in_one_line(tmp_path, make, parts):
    path = tmp_path / "a.packed"
    make(path)
    with pytest.raises(InputError) as refusal:
        read_packed(str(path), with_labels=True)
    message = str(refusal.value)
    assert message.startswith(str(path)) and "\n" not in message
    assert [part for part in parts if part not in message] == []


@pytest.mark.parametrize("name", ["a.packed", "a.npz"])
def test_a_url_is_refused(name):
    with pytest.raises(InputError, match=rf"^gs://bucket/{name}: .* copy "):
        read_packed(f"gs://bucket/{name}", with_labels=False)


def damages(path, file):
    """
    :return: (function that replaces the bytes of a file and reads: the images, or None if they are refused in one line;
             the bytes).
    """
    content = file.read_bytes()

    def read(changed):
        file.write_bytes(changed)
        try:
            images, labels, classes = read_packed(str(path), with_labels=True)
        except InputError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            return None
        # damaged pixels go unnoticed in a folder; all else is checked
        assert (images.dtype, images.shape) == (np.uint8, (5, 4, 4, 3))
        assert (labels.tolist(), classes) == (LABELS, CLASSES)
        if path.suffix == ".npz":
            np.testing.assert_array_equal(images, pixels())
        return images.copy()

    assert read(content) is not None
    return read, content


FILES = ["a.packed/images.npy", "a.packed/labels.npz", "a.npz"]


@pytest.fixture(params=FILES)
def damaged(request, tmp_path):
    write(tmp_path / "a.packed")
    old_file(tmp_path / "a.npz")
    return damages(tmp_path / request.param.split("/")[0], tmp_path / request.param)


def test_every_truncation_is_noticed(damaged):
    read, content = damaged
    for length in range(len(content)):
        assert read(content[:length]) is None, length


def test_every_flipped_bit_outside_the_pixels_is_noticed_or_changes_nothing(damaged):
    read, content = damaged
    content, refused = bytearray(content), 0
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        refused += read(content) is None
        content[at] ^= 1 << at % 8
    assert refused > 30


@pytest.mark.parametrize("seed", range(2))
def test_random_damage(damaged, seed):
    rng = random.Random(seed)
    read, whole = damaged
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
        read(content)


def test_another_process_maps_the_images_again(tmp_path):
    """A data set travels to a worker that is not forked as the place of its images, not as their pixels."""
    write(tmp_path / "a.packed", pixels(400, 16), labels=[0] * 400, classes=["a"])
    images, labels, _ = read_packed(str(tmp_path / "a.packed"), with_labels=True)
    for share in (slice(None), slice(1, None, 3), slice(5, 6)):
        dataset = PackedDataset(images[share], labels[share])
        sent = pickle.dumps(dataset)
        received = pickle.loads(sent)
        assert len(sent) < 10_000
        np.testing.assert_array_equal(received.local_images, images[share])
        assert not received.local_images.flags.writeable and list(received.local_classes) == [0] * len(dataset)


@pytest.mark.parametrize("kind", ["in memory", "removed"])
def test_images_that_cannot_be_mapped_again_are_copied(tmp_path, kind):
    write(tmp_path / "a.packed")
    images = read_packed(str(tmp_path / "a.packed"), with_labels=False)[0] if kind == "removed" else pixels()
    shutil.rmtree(tmp_path / "a.packed")
    received = pickle.loads(pickle.dumps(PackedDataset(images[::2], None)))
    np.testing.assert_array_equal(received.local_images, pixels()[::2])


def test_workers_that_are_spawned_read_the_same_packed_images(tmp_path):
    write(tmp_path / "a.packed")
    words = dict(data_dir=str(tmp_path / "a.packed"), batch_size=2, image_size=pixels().shape[1], class_cond=True)
    expected = list(load_data_once(**words, num_workers=0))
    data = load_data_once(**words, num_workers=1)
    data._loader.multiprocessing_context = "spawn"
    for (x, cond), (x0, cond0) in zip(data, expected, strict=True):
        assert th.equal(x, x0) and th.equal(cond["y"], cond0["y"])
