"""prepare_lsun.py: the images of databases such as the official ones, and what it says of others."""

import io
import multiprocessing
import os
import sys

import lmdb
import numpy as np
import pytest
from harness import flags, run_script, run_subprocess, snapshot
from PIL import Image

from improved_diffusion.image_datasets import ImageDataset

COUNT = 10
SIZES = [(40, 30), (30, 41), (16, 16), (70, 33), (9, 11)]  # width, height


def encoded(i):
    """An image as LSUN has them, WebP or JPEG."""
    width, height = SIZES[i % len(SIZES)]
    ramp = np.linspace(0, 200, width * height * 3).reshape(height, width, 3)
    f = io.BytesIO()
    Image.fromarray((ramp + 5 * i).astype(np.uint8)).save(f, format="JPEG" if i % 3 == 0 else "WEBP")
    return f.getvalue()


VALUES = {f"{i * 7919 % 1000:040x}".encode(): encoded(i) for i in range(COUNT)}
KEYS = sorted(VALUES)  # a database's order


def write_database(path, values=VALUES):
    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    (path / "lock.mdb").unlink()
    return path


def prepare(*words, **values):
    return run_script("prepare_lsun", [*map(str, words), *flags(**values)], "unused")


def assert_images(out, size, tmp_path, class_name="bedroom", count=COUNT):
    """That OUT holds what the library makes of the images in files of their own."""
    names = [f"{class_name}_{i:07d}.png" for i in range(count)]
    assert sorted(os.listdir(out)) == names
    for name, key in zip(names, KEYS, strict=False):
        (tmp_path / "one.jpg").write_bytes(VALUES[key])
        expected = ImageDataset(size, [str(tmp_path / "one.jpg")]).pixels(0)
        with Image.open(out / name) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image), expected)


@pytest.fixture
def src(tmp_path):
    return write_database(tmp_path / "bedroom_train_lmdb")


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [8, 32])
def test_images_are_written(tmp_path, capfd, src, size, num_workers):
    before, out = snapshot(src), tmp_path / "new" / "out"
    assert prepare(src, out, image_size=size, num_workers=num_workers) == 0
    assert capfd.readouterr() == (f"wrote 10 images of 1 class to {out}\n", "")
    assert_images(out, size, tmp_path)
    assert snapshot(src) == before


def test_by_default_they_are_256_pixels_wide(tmp_path, src):
    assert prepare(src, tmp_path / "out", max_images=1) == 0
    assert_images(tmp_path / "out", 256, tmp_path, count=1)


@pytest.mark.parametrize(
    ("folder", "words", "class_name"),
    [
        ("church_outdoor_val_lmdb", {}, "church"),
        ("cat", {}, "cat"),
        ("_lmdb", dict(class_name="dining-room"), "dining-room"),
    ],
)
def test_names_of_classes(tmp_path, folder, words, class_name):
    write_database(tmp_path / folder)
    assert prepare(f"{tmp_path / folder}/", tmp_path / "out", image_size=8, num_workers=0, **words) == 0
    assert_images(tmp_path / "out", 8, tmp_path, class_name)


def test_run_again_it_completes_and_takes_more(tmp_path, capfd, src):
    out, words = tmp_path / "out", dict(image_size=8, num_workers=0)
    assert prepare(src, out, max_images=4, **words) == 0
    assert_images(out, 8, tmp_path, count=4)
    (out / "bedroom_0000001.png").write_bytes((out / "bedroom_0000001.png").read_bytes()[:-5])
    (out / "bedroom_0000002.png").unlink()
    capfd.readouterr()
    for max_images, there in ((0, 2), (100, 10)):
        assert prepare(src, out, max_images=max_images, **words) == 0
        assert capfd.readouterr().out == f"wrote 10 images of 1 class to {out} ({there} were there already)\n"
        assert_images(out, 8, tmp_path)


def test_killed_at_any_moment_it_completes(tmp_path, src):
    """Every write to the disk is a moment."""
    for moment in range(1, 25, 4):
        out = tmp_path / f"out{moment}"
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(moment, src, out))
        process.start()
        process.join(timeout=60)
        assert process.exitcode in (7, 0), moment
        assert process.exitcode == 7 or moment > 2 * COUNT
        for name in os.listdir(out):
            if name.endswith(".png"):
                with Image.open(out / name) as image:
                    image.load()
        assert prepare(src, out, image_size=8, num_workers=0) == 0
        assert_images(out, 8, tmp_path)


def die_at(moment, src, out):
    """Begin and end with status 7 before the so-many-th opening of a new file or renaming of one."""
    left = moment

    def count(event, args):
        nonlocal left
        writes = event == "open" and str(args[0]).endswith(".tmp")
        left -= writes or event == "os.rename"
        if left == 0:
            os._exit(7)

    sys.addaudithook(count)
    prepare(src, out, image_size=8, num_workers=0)
    os._exit(0)


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path, src):
    done = run_subprocess("prepare_lsun", [src, tmp_path / "out", "--image_size", "8"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote 10 images of 1 class to ")
    assert_images(tmp_path / "out", 8, tmp_path)


# ---------------------------------------------------------------- what cannot work


def refused(capfd, parts, *words, **values):
    assert prepare(*words, **values) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare_lsun.py: error: "), err
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize(
    ("words", "values", "parts"),
    [
        ([], {}, ["arguments are required: SRC, OUT"]),
        (["nowhere", "out"], {}, ["SRC nowhere: has no data.mdb", "bedroom_train_lmdb"]),
        (["file", "out"], {}, ["SRC file: has no data.mdb"]),
        (["text_lmdb", "out"], {}, ["SRC text_lmdb: not a database that lmdb can read"]),
        (["nothing_lmdb", "out"], {}, ["SRC nothing_lmdb: not a database that lmdb can read"]),
        (["empty_lmdb", "out"], {}, ["SRC empty_lmdb: holds no images"]),
        (["bedroom_train_lmdb", "file"], {}, ["OUT file: cannot be made a folder"]),
        (["bedroom_train_lmdb", "gs://bucket/out"], {}, ["OUT gs://bucket/out: name a local folder"]),
        (["bedroom_train_lmdb", "out"], dict(image_size=0), ["--image_size 0", "1 or more"]),
        (["bedroom_train_lmdb", "out"], dict(max_images=-1), ["max_images -1", "0 or more"]),
        (["bedroom_train_lmdb", "out"], dict(num_workers=-2), ["--num_workers -2"]),
        (["bedroom_train_lmdb", "out"], dict(class_name="dining_room"), ["class_name: 'dining_room' cannot begin"]),
        (["_lmdb", "out"], {}, ["SRC _lmdb", "without --class_name", "'' cannot begin"]),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_changes_nothing(monkeypatch, tmp_path, capfd, src, words, values, parts):
    monkeypatch.chdir(tmp_path)
    write_database(tmp_path / "empty_lmdb", {})
    for name, content in {"text_lmdb": b"no database" * 1000, "nothing_lmdb": b""}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.mdb").write_bytes(content)
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    refused(capfd, parts, *words, **values)
    assert snapshot(tmp_path) == before


def test_every_database_that_is_cut_off_is_noticed(tmp_path, capfd, src):
    content = (src / "data.mdb").read_bytes()
    for length in [*range(0, len(content), 4096), 1, 5000, len(content) - 1]:
        (src / "data.mdb").write_bytes(content[:length])
        refused(capfd, ["SRC "], src, tmp_path / "out", image_size=8, num_workers=0)
    assert not (tmp_path / "out").exists()


def test_pages_that_are_damaged(tmp_path, capfd, src):
    content = bytearray((src / "data.mdb").read_bytes())
    at = content.index(KEYS[3])
    page = at - at % 4096
    content[page : page + 16] = b"\xff" * 16
    (src / "data.mdb").write_bytes(content)
    refused(capfd, [f"SRC {src}: is damaged"], src, tmp_path / "out", image_size=8, num_workers=0)


@pytest.mark.parametrize("value", [b"", b"no image", encoded(0)[:-90], encoded(1)[:-90]], ids=lambda v: f"{len(v)}")
def test_an_image_that_cannot_be_read_is_named(tmp_path, capfd, value):
    src = write_database(tmp_path / "cat_lmdb", {**VALUES, KEYS[3]: value})
    parts = [f"SRC {src}: the image of key {KEYS[3]!r}: cannot be read as an image"]
    refused(capfd, parts, src, tmp_path / "out", image_size=8, num_workers=0)


def test_without_lmdb(monkeypatch, tmp_path, capfd, src):
    monkeypatch.setitem(sys.modules, "lmdb", None)
    refused(capfd, ["pip install improved-diffusion[lsun]"], src, tmp_path / "out")
    assert not (tmp_path / "out").exists()
