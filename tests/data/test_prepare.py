"""scripts/prepare.py: how images are written, continued and packed, and that training reads both."""

import inspect
import io
import multiprocessing
import os
import re
import signal
import sys

import numpy as np
import pytest
from harness import (
    TINY,
    fill_disk,
    flags,
    on_a_full_disk,
    on_a_terminal,
    run_script,
    save_weights,
    snapshot,
    write_images,
)
from PIL import Image
from training import assert_same, load

from improved_diffusion.data import images as image_files
from improved_diffusion.data.packed import read_packed
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES, Source
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.option_groups import rows
from improved_diffusion.options import PrepareOptions
from improved_diffusion.utils.errors import InputError


class Images(Source):
    """Number i is all of colour i, and of class a or b. Notes which were made."""

    digits = 3

    def __init__(self, count=10, size=6, at=None, event=None, num_workers=0, classes=("a", "b"), folder=None):
        self.classes, self.labels, self.shape = list(classes), [i % 2 for i in range(count)], (size, size, 3)
        self.num_workers, self.made, self.folder = num_workers, [], folder
        self._at, self._event = at, event

    def __getitem__(self, i):
        if i == self._at:
            self._event()
        self.made.append(i)
        return np.full(self.shape, [i, 2 * i, 255 - i], np.uint8)


def interrupt():
    raise KeyboardInterrupt


def refuse():
    raise InputError("a: the image of key b'x': cannot be read as an image")


def assert_whole(folder, images):
    names = [f"{'ab'[i % 2]}_{i:03d}.png" for i in range(len(images))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for i, name in enumerate(names):
        with Image.open(folder / name) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image), images[i])


# ---------------------------------------------------------------- a folder


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_written_once(tmp_path, capfd, num_workers):
    folder = tmp_path / "new" / "folder"
    write(Images(num_workers=num_workers), str(folder))
    assert capfd.readouterr() == (f"wrote 10 images of 2 classes to {folder}\n", "")  # progress is for terminals
    assert_whole(folder, Images())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = Images(num_workers=num_workers)
    write(again, f"{folder}/")
    assert capfd.readouterr().out.startswith(f"wrote 10 images of 2 classes to {folder} (10 ")
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before and again.made == []
    write(Images(count=1), str(tmp_path / "one"))
    assert capfd.readouterr().out == f"wrote 1 image of 1 class to {tmp_path}/one\n"


def test_what_is_left_out_is_noted_whatever_its_name(tmp_path, monkeypatch):
    source = Images()
    source.notes = ["a\udcff: 3 files"]  # no text in UTF-8
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    write(source, str(tmp_path / "a"))
    assert rb"a\udcff: 3 files" in stream.buffer.getvalue()


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_the_bytes_do_not_depend_on_who_writes_them(tmp_path, ending):
    for num_workers in (0, 2):
        write(Images(num_workers=num_workers), str(tmp_path / f"{num_workers}{ending}"))
    assert snapshot(tmp_path / f"0{ending}") == snapshot(tmp_path / f"2{ending}")


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_the_library_reads_them(tmp_path, ending):
    write({"train": Images(), "test": Images(count=2)}, str(tmp_path / f"a{ending}"))
    words = dict(batch_size=10, image_size=6, class_cond=True, num_workers=0)
    for part, count in (("train", 10), ("test", 2)):
        ((x, cond),) = load_data_once(data_dir=str(tmp_path / f"a{ending}" / part), **words)
        order = range(count) if ending else sorted(range(count), key=lambda i: i % 2)
        assert cond["y"].tolist() == [i % 2 for i in order]
        assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == list(order)


@pytest.mark.parametrize(("event", "error"), [(interrupt, KeyboardInterrupt), (refuse, InputError)])
def test_after_an_interruption_it_continues(tmp_path, capfd, event, error):
    with pytest.raises(error):
        write(Images(at=6, event=event), str(tmp_path))
    assert_whole(tmp_path, Images(count=6))
    rest = Images()
    write(rest, str(tmp_path))
    assert capfd.readouterr().out.startswith(f"wrote 10 images of 2 classes to {tmp_path} (6 ")
    assert rest.made == [6, 7, 8, 9]
    assert_whole(tmp_path, Images())


def test_an_interruption_while_a_file_is_written_leaves_none(monkeypatch, tmp_path):
    save = Image.Image.save

    def interrupted(image, f, **kwargs):
        save(image, f, **kwargs)
        f.truncate(30)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write(Images(), str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 1, 7, 20, 24, 30, -1])
def test_what_a_crash_cut_short_is_rewritten(tmp_path, capfd, length):
    """A process that is killed leaves a temporary file, a machine that crashes one that is cut short."""
    write(Images(), str(tmp_path))
    content = (tmp_path / "a_004.png").read_bytes()
    (tmp_path / "a_004.png").write_bytes(content[:length])
    (tmp_path / "b_005.png").unlink()
    (tmp_path / "b_005.png.tmp").write_bytes(content[:10])
    (tmp_path / "a_006.png").write_bytes(b"no image, but longer than the end of one")
    capfd.readouterr()
    again = Images()
    write(again, str(tmp_path))
    assert capfd.readouterr().out.startswith(f"wrote 10 images of 2 classes to {tmp_path} (7 ")
    assert again.made == [4, 5, 6]
    assert_whole(tmp_path, Images())


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_killed_at_any_moment_it_completes(tmp_path, ending):
    """Every opening of a file to write and every renaming is a moment. Killed, it leaves images that are whole."""
    killed = 0
    images = [Images()[i] for i in range(10)]
    for moment in range(1, 10 if ending else 25, 1 if ending else 4):
        out = tmp_path / f"out{moment}{ending}"
        process = multiprocessing.get_context("fork").Process(target=die_at, args=(moment, str(out)))
        process.start()
        process.join(timeout=60)
        assert process.exitcode in (7, 0), moment
        killed += process.exitcode == 7
        if ending and process.exitcode == 7:
            assert not out.exists()
        if process.exitcode == 7:
            write(Images(), str(out))
        if not ending:
            assert_whole(out, Images())
        else:
            np.testing.assert_array_equal(read_packed(str(out), with_labels=True)[0], images)
            assert not (tmp_path / f"{out.name}.tmp").exists()
    assert killed >= 4


def die_at(moment, out):
    """Begin and end with status 7 before the so-many-th opening of a new file or renaming of one."""
    left = moment

    def count(event, args):
        nonlocal left
        writes = event == "open" and str(args[0]).endswith(".tmp")
        left -= writes or event == "os.rename"
        if left == 0:
            os._exit(7)

    sys.addaudithook(count)
    write(Images(), out)
    os._exit(0)


def test_images_of_another_size_are_not_taken_for_these(tmp_path):
    write(Images(), str(tmp_path))
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"a_000\.png: exists as 6x6, not 7x7"):
        write(Images(size=7), str(tmp_path))
    assert snapshot(tmp_path) == before


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "a_002.png").mkdir()
    with pytest.raises(InputError, match=r"a_002\.png: cannot be written \(Is a directory\)"):
        write(Images(), str(tmp_path))


@on_a_full_disk
@pytest.mark.parametrize(("out", "file"), [("out", "b_001.png"), ("a.packed", "labels.npz")])
def test_a_full_disk(monkeypatch, tmp_path, out, file):
    fill_disk(monkeypatch, file)
    with pytest.raises(InputError, match=rf"{re.escape(file)}: cannot be written \(No space left on device\)"):
        write(Images(), str(tmp_path / out))
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if out == "out" else [])


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("ending", ["", ".packed"])
def test_an_image_that_cannot_be_made_ends_it_in_one_line(tmp_path, num_workers, ending):
    with pytest.raises(InputError, match=r"^a: the image of key b'x': cannot be read as an image$"):
        write(Images(at=3, event=refuse, num_workers=num_workers), f"{tmp_path}/out{ending}")
    if ending:
        assert list(tmp_path.iterdir()) == []
    else:
        assert_whole(tmp_path / "out", Images(count=3))


@pytest.mark.parametrize(
    ("out", "words", "message"),
    [
        ("file", {}, r"^file: .*\(File exists\)$"),
        ("file/a", {}, r"^file/a: .*\(Not a directory\)$"),
        ("gs://bucket/a", {}, "^gs://bucket/a: .*local folder$"),
        ("gs://bucket/a.packed", {}, "^gs://bucket/a.packed: .*local folder$"),
        ("file/a.packed", {}, r"file/a\.packed.*: cannot be written"),
        ("old.packed", {}, "^old.packed: exists"),
        ("old.packed/", {}, "^old.packed: exists"),
        ("a.npz", {}, r"^a\.npz: .*\.packed"),
        (".", dict(folder="."), r"^\.: .* \."),
        ("src/a/b", dict(folder="src"), "^src/a/b: .* src"),
        *[
            ("out", dict(classes=["a", name]), f"^class {re.escape(repr(name))}: ")
            for name in ("", "a_b", "_", "a/b", "../a", "..", ".a", "a\n", "a\0")
        ],
    ],
)
def test_what_cannot_be_written_to_is_refused_at_once(monkeypatch, tmp_path, out, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "src").mkdir()
    (tmp_path / "old.packed").mkdir()
    (tmp_path / "old.packed" / "file").touch()
    before, images = snapshot(tmp_path), Images(**words)
    with pytest.raises(InputError, match=message):
        write(images, out)
    assert snapshot(tmp_path) == before and images.made == []


def test_a_folder_without_permission(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="permission"):
        write(Images(), str(tmp_path))


@pytest.mark.parametrize("name", ["bedroom", "0001", "T-shirt", "été", "v1.5", "a b", "IMG (1).png", "日本", "\udcff"])
def test_names_of_classes(tmp_path, name):
    write(Images(classes=["a", name]), str(tmp_path))
    assert (tmp_path / f"{name}_001.png").exists()


def test_bars(tmp_path, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    write(Images(), str(tmp_path / "a"))
    write(Images(), str(tmp_path / "a.packed"))
    shown = terminal.getvalue()
    assert re.search(rf"{tmp_path}/a: 100%\|.*\| 10/10 \[", shown)
    assert re.search(r"packing: 100%\|.*\| 10/10 \[", shown)


# ---------------------------------------------------------------- the script


def prepare(*words, **values):
    return run_script("prepare", [*map(str, words), *flags(**values)], "unused")


@pytest.fixture
def images(tmp_path):
    """Images of three classes and other sizes than they are packed at."""
    return write_images(tmp_path / "images", count=7, size=19, classes=3)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["arguments are required: SOURCE"]),
        (["photos"], ["'photos'", "cifar10", "digits"]),
        (["cifar10"], ["arguments are required: SRC, OUT"]),
        (["images", "images"], ["arguments are required: OUT"]),
        (["images", "images", "a", "--size", "8"], ["there is no flag --size"]),
        (["cifar10", "images", "a", "--image_size", "8"], ["there is no flag --image_size"]),
        (["digits", "a", "b"], ["unrecognized arguments: b"]),
        (["images", "nowhere", "a.packed"], ["nowhere: there is no such folder"]),
        (["images", "images/a_000.png", "a.packed"], ["images/a_000.png: not packed images"]),
        (["images", "images", "a.npz"], ["a.npz: packed images are a folder", ".packed"]),
        (["images", "images", "images"], ["images: "]),
        (["images", "images", "a", "--image_size", "0"], ["--image_size 0", "1 to"]),
        (["images", "images", "a", "--image_channels", "4"], ["--image_channels 4", "1 or 3"]),
        (["images", "images", "a", "--num_workers", "-2"], ["--num_workers -2", "-1 or more"]),
        (["lsun", "images", "a", "--max_images", "-1"], ["--max_images -1", "0 or more"]),
        (["imagenet64", "images", "a", "--split", "test"], ["--split test", "train or val"]),
        (["imagenet64", "images", "a", "--split", "val"], ["images: holds no val_data.npz"]),
    ],
)
def test_words_that_cannot_work(monkeypatch, tmp_path, capfd, images, words, parts):
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert prepare(*words) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare.py")
    assert [part for part in parts if part not in err] == [], err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("source", SOURCES)
def test_each_source_describes_itself_and_its_flags(capfd, source):
    """A new source is a function in the table; nothing else names it."""
    assert prepare(source, "--help") == 0
    text = " ".join(capfd.readouterr().out.split())
    known = {row.name for row in rows(PrepareOptions)}
    assert " ".join(inspect.getdoc(SOURCES[source]).split()) in text
    for name, parameter in inspect.signature(SOURCES[source]).parameters.items():
        assert name == "src" or (f"--{name} " in text and name in known and parameter.default is not parameter.empty)
    assert prepare("--help") == 0
    assert source in capfd.readouterr().out


def test_the_folder_is_whole_whatever_launcher_was_there(tmp_path, images):
    words = ["images", str(images), str(tmp_path / "a.packed"), *flags(image_size=8, num_workers=0)]
    assert run_script("prepare", words, tmp_path, RANK="0", WORLD_SIZE="2") == 0
    assert len(read_packed(str(tmp_path / "a.packed"), with_labels=True)[1]) == 7


@pytest.mark.parametrize("ending", ["", ".packed"])
def test_a_process_that_is_killed_is_not_a_full_disk(monkeypatch, tmp_path, capfd, images, ending):
    """As the system does when memory runs out; workers are forked of this process and kill themselves here."""
    main = os.getpid()

    def die(*_):
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(image_files, "decode_image", die)
    assert prepare("images", images, tmp_path / f"a{ending}", image_size=8, num_workers=1) == 1
    printed, err = capfd.readouterr()
    expected = r"prepare\.py: error: a process .* \(.*(killed by signal: Killed|unexpectedly).*\); .*memory.*\n"
    assert re.fullmatch(expected, err), err
    assert printed == "" and [path.name for path in tmp_path.glob("a*")] == ([] if ending else ["a"])


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_training_on_packed_images_writes_the_bits_of_training_on_the_folder(tmp_path, images, script):
    assert prepare("images", images, tmp_path / "a.packed", image_size=8) == 0
    with_labels = read_packed(str(tmp_path / "a.packed"), with_labels=True)
    np.savez(tmp_path / "old.npz", **dict(zip(("images", "labels", "classes"), with_labels, strict=True)))
    sizes = dict(image_size=8) if script == "image_train" else dict(large_size=8, small_size=4)
    words = dict(TINY, **sizes, batch_size=4, max_steps=3, class_cond=True, num_classes=4, seed=0, preview_samples=0)
    sources = [("images", -1), ("a.packed", -1), ("a.packed", 2), ("old.npz", -1)]
    runs = [tmp_path / f"{name} by {workers}" for name, workers in sources]
    for log, (name, workers) in zip(runs, sources, strict=True):
        assert run_script(script, flags(data_dir=tmp_path / name, num_workers=workers, **words), log) == 0
    for log in runs[1:]:
        for name in ("model000003.pt", "ema_0.9999_000003.pt", "opt000003.pt"):
            assert_same(load(log / name), load(runs[0] / name), name)


def test_likelihood_of_packed_images(tmp_path, images):
    assert prepare("images", images, tmp_path / "a.packed", image_size=8) == 0
    words = dict(
        TINY, image_size=8, model_path=save_weights(tmp_path / "model.pt"), num_samples=6, batch_size=4, seed=0
    )
    for name in ("images", "a.packed"):
        words.update(data_dir=tmp_path / name, timestep_respacing=4)
        assert run_script("image_nll", flags(**words), tmp_path / f"of {name}") == 0
    ours, theirs = (np.load(tmp_path / f"of {name}" / "vb_terms.npz")["arr_0"] for name in ("a.packed", "images"))
    np.testing.assert_array_equal(ours, theirs)
