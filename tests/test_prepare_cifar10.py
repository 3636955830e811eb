"""prepare_cifar10.py: the images of archives such as the official one, and what it says of others."""

import gzip
import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from harness import run_script, run_subprocess, snapshot
from old_pickles import python2_pickle
from PIL import Image

from improved_diffusion.image_datasets import load_data_once

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCH = 4  # images; the official ones have 10,000
SPLITS = {"train": 5 * BATCH, "test": BATCH}


def labels_of(count, shift):
    return [(3 * i + shift) % 10 for i in range(count)]


PIXELS = {  # split -> uint8 [N, 32, 32, 3]
    split: np.random.default_rng(count).integers(0, 256, (count, 32, 32, 3)).astype(np.uint8)
    for split, count in SPLITS.items()
}
LABELS = {split: labels_of(count, shift) for shift, (split, count) in enumerate(SPLITS.items())}


def official(**changed):
    """{name: content} of an archive as the official one is; None leaves a file out."""
    files = {
        "batches.meta": python2_pickle(
            {b"num_cases_per_batch": BATCH, b"label_names": [name.encode() for name in CLASSES], b"num_vis": 3072}, 0
        ),
        "readme.html": b'<meta HTTP-EQUIV="REFRESH">',
    }
    for split in SPLITS:
        for i in range(SPLITS[split] // BATCH):
            rows = PIXELS[split].transpose(0, 3, 1, 2).reshape(-1, 3072)
            batch = slice(i * BATCH, (i + 1) * BATCH)
            content = {
                b"data": rows[batch],
                b"labels": LABELS[split][batch],
                b"batch_label": b"a batch",
                b"filenames": [b"name.png"] * BATCH,
            }
            files[f"data_batch_{i + 1}" if split == "train" else "test_batch"] = python2_pickle(content)
    files.update(changed)
    return {name: content for name, content in files.items() if content is not None}


def write_archive(path, files=None, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("cifar-10-batches-py")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in (official() if files is None else files).items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_folder(path, files=None):
    path.mkdir()
    for name, content in (official() if files is None else files).items():
        (path / name).write_bytes(content)
    return path


def prepare(*words):
    return run_script("prepare_cifar10", [str(word) for word in words], "unused")


def assert_official(out):
    """That OUT holds what the archive of official() does."""
    assert sorted(os.listdir(out)) == ["test", "train"]
    for split, count in SPLITS.items():
        names = [f"{CLASSES[LABELS[split][i]]}_{i:05d}.png" for i in range(count)]
        assert sorted(os.listdir(out / split)) == sorted(names)
        for name, pixels in zip(names, PIXELS[split], strict=True):
            with Image.open(out / split / name) as image:
                assert (image.format, image.mode) == ("PNG", "RGB")
                np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(
    "write",
    [write_archive, write_folder, lambda path: write_archive(path, mode="w")],
    ids=["archive", "folder", "archive that was unzipped"],
)
def test_images_are_written(tmp_path, capfd, write):
    src = write(tmp_path / "cifar-10-python.tar.gz")
    before, out = snapshot(tmp_path), tmp_path / "new" / "out"
    assert prepare(src, out) == 0
    lines = f"wrote 20 images of 10 classes to {out}/train\nwrote 4 images of 10 classes to {out}/test\n"
    assert capfd.readouterr() == (lines, "")
    assert_official(out)
    assert {name: content for name, content in snapshot(tmp_path).items() if not name.startswith("new")} == before


@pytest.mark.parametrize("protocol", [2, 4])
def test_archives_that_python_3_pickled(tmp_path, protocol):
    files = {
        name: pickle.dumps(pickle.loads(content, encoding="latin1"), protocol) if name == "batches.meta" else content
        for name, content in official().items()
    }
    assert prepare(write_archive(tmp_path / "a.tar.gz", files), tmp_path / "out") == 0
    assert_official(tmp_path / "out")


def test_run_again_it_completes(tmp_path, capfd):
    src, out = write_archive(tmp_path / "a.tar.gz"), tmp_path / "out"
    assert prepare(src, out) == 0
    written, gone = snapshot(out), sorted((out / "train").iterdir())[3:7]
    for path in gone:
        path.unlink()
    capfd.readouterr()
    assert prepare(src, out) == 0
    assert capfd.readouterr().out == (
        f"wrote 20 images of 10 classes to {out}/train (16 were there already)\n"
        f"wrote 4 images of 10 classes to {out}/test (4 were there already)\n"
    )
    assert snapshot(out) == written


def test_training_sees_the_labels(tmp_path):
    assert prepare(write_archive(tmp_path / "a.tar.gz"), tmp_path / "out") == 0
    batches = load_data_once(
        data_dir=str(tmp_path / "out" / "train"), batch_size=20, image_size=32, class_cond=True, num_workers=0
    )
    x, cond = next(batches)
    order = sorted(range(20), key=lambda i: f"{CLASSES[LABELS['train'][i]]}_{i:05d}.png")
    assert cond["y"].tolist() == [LABELS["train"][i] for i in order]
    np.testing.assert_array_equal(((x + 1) * 127.5).round().permute(0, 2, 3, 1), PIXELS["train"][order])


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path):
    done = run_subprocess("prepare_cifar10", [write_archive(tmp_path / "a.tar.gz"), tmp_path / "out"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") == 2
    assert_official(tmp_path / "out")


# ---------------------------------------------------------------- what cannot work

RIGHT = ["cifar-10-python.tar.gz", "cifar-10-batches-py"]


def damaged(change):
    def write(path):
        write_archive(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def unpacked(**changed):
    return lambda path: write_folder(path, official(**changed))


def batch(**content):
    return python2_pickle({key.encode(): value for key, value in content.items()})


ROWS = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda path: None, ["No such file", *RIGHT]),
        (lambda path: path.mkdir(), ["holds no batches.meta, no data_batch_1", *RIGHT]),
        (lambda path: path.write_bytes(b""), ["cannot be read", *RIGHT]),
        (lambda path: path.write_bytes(b"no archive"), ["cannot be read", *RIGHT]),
        (lambda path: path.write_bytes(gzip.compress(b"no archive")), ["cannot be read", *RIGHT]),
        (lambda path: write_archive(path, {"train": b"CIFAR-100's"}), ["holds no batches.meta", *RIGHT]),
        (lambda path: write_archive(path, official(data_batch_3=None)), ["holds no data_batch_3;", *RIGHT]),
        (damaged(lambda content: content[:-1]), ["cannot be read", "end"]),
        (damaged(lambda content: content[: len(content) // 2]), [""]),
        (damaged(lambda content: flipped(content, -8)), ["cannot be read (CRC check failed"]),
        (damaged(lambda content: flipped(content, len(content) // 2)), [""]),
        (unpacked(test_batch=None), ["holds no test_batch;"]),
        (unpacked(test_batch=b"x"), ["test_batch: not a whole pickle"]),
        (unpacked(data_batch_2=official()["data_batch_2"][:-9]), ["data_batch_2: not a whole pickle"]),
        (unpacked(test_batch=pickle.dumps({"data": os.system})), ["test_batch: ", "asks for posix.system"]),
        (unpacked(test_batch=batch(labels=[1] * 4)), ["test_batch: data is NoneType", "uint8 of shape (N, 3 * S * S)"]),
        (unpacked(test_batch=batch(data=ROWS)), ["test_batch: labels", "from 0 to 9"]),
        (unpacked(test_batch=batch(data=ROWS, labels=[0, 1, 2, 10])), ["test_batch: labels", "from 0 to 9"]),
        (unpacked(data_batch_5=batch(data=ROWS[:, :12], labels=[1] * 4)), ["data_batch_5: data", "(N, 3072)"]),
        (unpacked(**{"batches.meta": batch(num_vis=3)}), ["batches.meta: holds no label_names"]),
        (unpacked(**{"batches.meta": batch(label_names=[])}), ["batches.meta: holds no label_names"]),
        (unpacked(**{"batches.meta": batch(label_names=[b"../a"])}), ["batches.meta: '../a' cannot begin"]),
    ],
)
def test_what_is_no_such_archive_ends_in_one_line_and_changes_nothing(tmp_path, monkeypatch, capfd, make, parts):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "src")
    before = snapshot(tmp_path)
    assert prepare("src", "out") == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare_cifar10.py: error: SRC src: "), err
    assert [part for part in parts if part not in err] == [], err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["arguments are required: SRC, OUT"]),
        (["src"], ["arguments are required: OUT"]),
        (["src", "file"], ["OUT file/train: cannot be made a folder"]),
        (["src", "gs://bucket/a"], ["OUT gs://bucket/a/train: name a local folder"]),
    ],
)
def test_words_that_cannot_work(tmp_path, monkeypatch, capfd, words, parts):
    monkeypatch.chdir(tmp_path)
    write_archive(tmp_path / "src")
    (tmp_path / "file").touch()
    assert prepare(*words) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert [part for part in parts if part not in err] == [], err


def test_every_tenth_truncation_is_noticed(tmp_path, capfd):
    content = write_archive(tmp_path / "a.tar.gz").read_bytes()
    for length in range(0, len(content), len(content) // 10):
        (tmp_path / "a.tar.gz").write_bytes(content[:length])
        assert prepare(tmp_path / "a.tar.gz", tmp_path / "out") == 2
        assert capfd.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()
