"""prepare_imagenet64.py: the images of batches such as the official ones, and what it says of others."""

import os
import pickle

import numpy as np
import pytest
from harness import load_script, run_script, run_subprocess, snapshot

from improved_diffusion.image_datasets import load_data_once

CLASSES = [f"{i:04d}" for i in range(1, 1001)]
COUNTS = {1: 3, 2: 5, 10: 2}  # number of a batch -> of its images


def pixels_of(number, size, count=None):
    count = COUNTS.get(number, 4) if count is None else count
    return np.random.default_rng(number).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def labels_of(number):
    return [(7 * number + 331 * i) % 1000 + 1 for i in range(len(pixels_of(number, 1)))]


def contents(number, size):
    rows = pixels_of(number, size).transpose(0, 3, 1, 2).reshape(-1, 3 * size * size)
    return {"data": rows, "labels": np.array(labels_of(number)), "mean": rows.mean(axis=0)}


def write_npz(path, number, size=64, save=np.savez, **changed):
    arrays = {**contents(number, size), **changed}
    save(path, **{name: array for name, array in arrays.items() if array is not None})


def write_pickle(path, number, size=64):
    batch = contents(number, size)
    path.write_bytes(pickle.dumps({**batch, "labels": batch["labels"].tolist()}))


def write_folder(folder, numbers=range(1, 11), val=True, size=64):
    folder.mkdir()
    for number in numbers:
        write_npz(folder / f"train_data_batch_{number}.npz", number, size)
    if val:
        write_npz(folder / "val_data.npz", 0, size)
    return folder


def prepare(*words):
    return run_script("prepare_imagenet64", [str(word) for word in words], "unused")


def assert_packed(path, numbers, size=64):
    with np.load(path) as arrays:
        images, labels, classes = (arrays[name] for name in ("images", "labels", "classes"))
    np.testing.assert_array_equal(images, np.concatenate([pixels_of(number, size) for number in numbers]))
    assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
    assert classes.tolist() == CLASSES == sorted(CLASSES)
    assert (labels + 1).tolist() == [label for number in numbers for label in labels_of(number)]


@pytest.mark.parametrize("words", [[], ["--split", "train"]])
def test_the_train_batches_are_packed_in_the_order_of_their_numbers(tmp_path, capfd, words):
    src, out = write_folder(tmp_path / "src"), tmp_path / "new" / "a.npz"
    before = snapshot(src)
    assert prepare(src, out, *words) == 0
    megabytes = out.stat().st_size / 1e6
    line = f"wrote 38 images of 1000 classes, 64x64 with 3 channels, {megabytes:.1f} MB: {out}\n"
    assert capfd.readouterr() == (line, "")
    assert_packed(out, range(1, 11))
    assert snapshot(src) == before and [path.name for path in out.parent.iterdir()] == ["a.npz"]


@pytest.mark.parametrize("words", [["--split", "val"], []])
def test_the_val_batch_is_packed_if_asked_for_or_alone(tmp_path, words):
    src = write_folder(tmp_path / "src", numbers=[1] if words else [])
    assert prepare(src, tmp_path / "a.npz", *words) == 0
    assert_packed(tmp_path / "a.npz", [0])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed], ids=["stored", "compressed"])
@pytest.mark.parametrize("size", [64, 32, 8])
def test_one_file_of_any_name_and_size(tmp_path, save, size):
    write_npz(tmp_path / "some.npz", 3, size, save)
    assert prepare(tmp_path / "some.npz", tmp_path / "a.npz") == 0
    assert_packed(tmp_path / "a.npz", [3], size)


def test_pickled_batches(tmp_path):
    (tmp_path / "src").mkdir()
    for number in (1, 2):
        write_pickle(tmp_path / "src" / f"train_data_batch_{number}", number)
    write_pickle(tmp_path / "val_data", 0)
    assert prepare(tmp_path / "src", tmp_path / "a.npz") == 0
    assert_packed(tmp_path / "a.npz", [1, 2])
    assert prepare(tmp_path / "val_data", tmp_path / "b.npz") == 0
    assert_packed(tmp_path / "b.npz", [0])


@pytest.mark.parametrize("write", [write_npz, write_pickle])
def test_batches_larger_than_what_is_read_at_once(monkeypatch, tmp_path, write):
    monkeypatch.setattr(load_script("prepare_imagenet64"), "ROWS", 2)
    path = tmp_path / ("b.npz" if write is write_npz else "b")
    write(path, 2)
    assert prepare(path, tmp_path / "a.npz") == 0
    assert_packed(tmp_path / "a.npz", [2])


def test_training_sees_the_labels(tmp_path):
    assert prepare(write_folder(tmp_path / "src", [1, 2]), tmp_path / "a.npz") == 0
    words = dict(batch_size=8, image_size=64, class_cond=True, num_classes=1000)
    ((x, cond),) = load_data_once(data_dir=str(tmp_path / "a.npz"), **words)
    assert (cond["y"] + 1).tolist() == labels_of(1) + labels_of(2)
    pixels = ((x + 1) * 127.5).round().permute(0, 2, 3, 1)
    np.testing.assert_array_equal(pixels, np.concatenate([pixels_of(1, 64), pixels_of(2, 64)]))


def test_an_interrupted_run_leaves_nothing_and_the_next_one_completes(monkeypatch, tmp_path):
    src, script = write_folder(tmp_path / "src", [1, 2]), load_script("prepare_imagenet64")
    rows_of = script.rows_of

    def interrupted(path):
        yield from rows_of(path)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(script, "rows_of", interrupted)
        assert prepare(src, tmp_path / "a.npz") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
    assert prepare(src, tmp_path / "a.npz") == 0
    assert_packed(tmp_path / "a.npz", [1, 2])


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    done = run_subprocess("prepare_imagenet64", [write_folder(tmp_path / "src"), tmp_path / "a.npz"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote 38 images of 1000 classes")


# ---------------------------------------------------------------- what cannot work


def damaged(change):
    def make(folder):
        path = folder / "val_data.npz"
        write_npz(path, 0)
        path.write_bytes(change(bytearray(path.read_bytes())))

    return make


def flip(content):
    content[5000] ^= 1  # among the pixels
    return content


def val(**changed):
    return lambda folder: write_npz(folder / "val_data.npz", 0, **changed)


def trains(*numbers):
    def make(folder):
        for number in numbers:
            write_npz(folder / f"train_data_batch_{number}.npz", number)

    return make


def both_sizes(folder):
    write_npz(folder / "train_data_batch_1.npz", 1, size=64)
    write_npz(folder / "train_data_batch_2.npz", 2, size=32)


def twice(folder):
    write_npz(folder / "train_data_batch_1.npz", 1)
    write_pickle(folder / "train_data_batch_1", 1)


ROWS = contents(0, 64)["data"]
NOT_WHOLE = ["val_data.npz: not a whole npz file of data and labels"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda folder: folder.rmdir(), ["SRC src: there is no such file or folder"]),
        (lambda folder: None, ["SRC src: holds no train_data_batch_1.npz and so on and no val_data.npz"]),
        (lambda folder: (folder / "1.npz").touch(), ["SRC src: holds no train_data_batch_1.npz"]),
        (trains(1, 3), ["SRC src: holds the train batches [1, 3]"]),
        (trains(2, 3), ["SRC src: holds the train batches [2, 3]"]),
        (twice, ["SRC src: holds the train batches [1, 1]"]),
        (both_sizes, ["SRC src: train_data_batch_2.npz: data", "(5, 3072)", "(N, 12288)"]),
        (lambda folder: (folder / "val_data.npz").touch(), NOT_WHOLE),
        (lambda folder: (folder / "val_data.npz").mkdir(), [*NOT_WHOLE, "directory"]),
        (lambda folder: (folder / "val_data.npz").write_bytes(ROWS.tobytes()), NOT_WHOLE),
        (lambda folder: (folder / "val_data").write_bytes(b"no pickle"), ["val_data: not a whole pickle"]),
        (lambda folder: (folder / "val_data").mkdir(), ["val_data: not a whole pickle", "directory"]),
        (lambda folder: (folder / "val_data").write_bytes(pickle.dumps({"a": os.system})), ["asks for posix.system"]),
        (damaged(lambda content: content[:-1]), NOT_WHOLE),
        (damaged(lambda content: content[: len(content) // 2]), NOT_WHOLE),
        (damaged(flip), [*NOT_WHOLE, "Bad CRC-32"]),
        (val(data=None), [*NOT_WHOLE, "data.npy"]),
        (val(labels=None), [*NOT_WHOLE, "labels.npy"]),
        (val(data=np.array([{}])), ["val_data.npz: data is object of shape (1,)"]),
        (val(data=ROWS / 255), ["val_data.npz: data is float64 of shape (4, 12288)", "uint8 of shape (N, 12288)"]),
        (val(data=ROWS[:, :-1]), ["val_data.npz: data is uint8 of shape (4, 12287)"]),
        (val(data=np.asfortranarray(ROWS)), [*NOT_WHOLE, "Fortran order"]),
        (val(labels=[1, 2, 3]), ["val_data.npz: labels", "from 1 to 1000"]),
        (val(labels=[0, 1, 2, 3]), ["val_data.npz: labels", "from 1 to 1000"]),
        (val(labels=[1, 2, 3, 1001]), ["val_data.npz: labels", "from 1 to 1000"]),
        (val(labels=np.array([1, 2, 3, 4], object)), NOT_WHOLE),
    ],
)
def test_what_are_no_such_batches_ends_in_one_line_and_changes_nothing(tmp_path, monkeypatch, capfd, make, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "src").mkdir()
    make(tmp_path / "src")
    before = snapshot(tmp_path)
    assert prepare("src", "a.npz") == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare_imagenet64.py: error: SRC src"), err
    assert [part for part in parts if part not in err] == [], err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["arguments are required: SRC, OUT"]),
        (["src", "a"], ["OUT a: name a local file that ends in .npz"]),
        (["src", "gs://bucket/a.npz"], ["OUT gs://bucket/a.npz", "local file"]),
        (["src", "folder.npz"], ["OUT folder.npz", "is a folder"]),
        (["src", "file/a.npz"], ["file/a.npz: cannot be written"]),
        (["src", "src/train_data_batch_1.npz"], ["OUT src/train_data_batch_1.npz: is one of the batches"]),
        (["src", "a.npz", "--split", "test"], ["--split", "'test'", "train", "val"]),
        (["src", "a.npz", "--split", "val"], ["SRC src: holds no val_data.npz"]),
    ],
)
def test_words_that_cannot_work(tmp_path, monkeypatch, capfd, words, parts):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "src", [1], val=False)
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    assert prepare(*words) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert [part for part in parts if part not in err] == [], err
    assert snapshot(tmp_path) == before
