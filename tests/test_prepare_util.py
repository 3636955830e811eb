"""What the scripts that prepare data share: which pickles are read, and folders of images that are always whole."""

import builtins
import functools
import io
import os
import pickle
import re

import numpy as np
import pytest
from harness import on_a_terminal, snapshot
from old_pickles import python2_pickle
from PIL import Image

from improved_diffusion.data.prepare import (
    check_class,
    check_packed_name,
    check_planar,
    from_planar,
    load_pickled_dict,
    make_folder,
    pack,
    workers,
    write_images,
)
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.utils.errors import InputError

ROWS = np.random.default_rng(0).integers(0, 256, (5, 3 * 4 * 4)).astype(np.uint8)

# ---------------------------------------------------------------- pickles


def load(content):
    return load_pickled_dict(functools.partial(io.BytesIO, content), "SRC a: batch")


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_pickles_of_python_2(protocol):
    batch = {b"data": ROWS, b"labels": [0, 2, 1], b"batch_label": b"training batch", b"\xc3\xa9": None}
    content = python2_pickle(batch, protocol)
    assert b"_codecs" not in content and b"numpy.core.multiarray" in content
    got = load(content)
    assert list(got) == ["data", "labels", "batch_label", "é"]
    np.testing.assert_array_equal(got["data"], ROWS)
    assert (got["data"].dtype, got["labels"], got["batch_label"]) == (np.uint8, [0, 2, 1], b"training batch")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
def test_pickles_of_python_3(protocol, module):
    content = pickle.dumps({"data": ROWS, b"mean": ROWS / 3, "labels": [1, 2], "name": "é"}, protocol)
    if protocol < 4:  # later ones say how long a name is
        content = content.replace(b"cnumpy._core.", f"c{module}.".encode())
        assert module.encode() in content
    got = load(content)
    assert list(got) == ["data", "mean", "labels", "name"] and got["name"] == "é"
    np.testing.assert_array_equal(got["data"], ROWS)
    np.testing.assert_array_equal(got["mean"], ROWS / 3)


class Call:
    """Pickled, a call of a function."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("call", "asks_for"),
    [
        (Call(os.system, "touch broken_in"), "posix.system"),
        (Call(builtins.eval, "open('broken_in', 'w')"), "__builtin__.eval|builtins.eval"),
        (Call(builtins.getattr, ROWS, "tofile"), "__builtin__.getattr|builtins.getattr"),
        (Call(np.save, "broken_in", [1]), "numpy.save"),
        (Call(np.memmap, "broken_in", "uint8", "w+", 0, (3,)), "numpy.memmap"),
        (Call(InputError, "x"), "improved_diffusion.errors.InputError"),
    ],
    ids=["system", "eval", "getattr", "save", "memmap", "class"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_may_ask_for_nothing_but_arrays(monkeypatch, tmp_path, call, asks_for, protocol):
    monkeypatch.chdir(tmp_path)
    for content in (call, {"data": call}, {"data": [ROWS, call]}):
        with pytest.raises(InputError, match=rf"^SRC a: batch: not a whole pickle.*\(it asks for ({asks_for}), "):
            load(pickle.dumps(content, protocol))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2]), pickle.dumps(ROWS)])
def test_other_content_is_refused_in_one_line(content):
    with pytest.raises(InputError, match=r"^SRC a: batch: not a whole pickle of a dict of arrays \(.+\)$"):
        load(content)


def test_a_file_that_cannot_be_opened(tmp_path):
    with pytest.raises(InputError, match=r"SRC a: not a whole pickle .*No such file"):
        load_pickled_dict(functools.partial(open, tmp_path / "a", "rb"), "SRC a")


def test_every_truncation_is_noticed():
    content = python2_pickle({b"data": ROWS, b"labels": [1, 2]})
    for length in range(len(content)):
        with pytest.raises(InputError, match="SRC a: batch"):
            load(content[:length])


def test_every_flipped_bit_is_refused_or_gives_other_values():
    content = bytearray(python2_pickle({b"data": ROWS[:1], b"labels": [1, 2]}))
    for at in range(len(content)):
        content[at] ^= 1 << at % 8
        try:
            assert isinstance(load(bytes(content)), dict)
        except InputError as e:
            assert "\n" not in str(e)
        content[at] ^= 1 << at % 8


# ---------------------------------------------------------------- batches


def test_planar_batches():
    batches = [("a", ROWS, [1, 2, 3, 1, 2]), ("b", ROWS[:1], np.array([3], np.uint8))]
    size, labels = check_planar("src", batches, range(1, 4))
    assert (size, labels.dtype, labels.tolist()) == (4, np.int64, [1, 2, 3, 1, 2, 3])
    images = from_planar(ROWS, 4)
    assert images.shape == (5, 4, 4, 3)
    for i, y, x, c in np.ndindex(images.shape):
        assert images[i, y, x, c] == ROWS[i, c * 16 + y * 4 + x]


@pytest.mark.parametrize(
    ("data", "labels", "parts"),
    [
        (None, [1] * 5, ["data is NoneType of shape ()", "(N, 3 * S * S)"]),
        (b"bytes", [1] * 5, ["data is bytes"]),
        (ROWS / 255, [1] * 5, ["data is float64 of shape (5, 48)"]),
        (ROWS.astype(np.int8), [1] * 5, ["data is int8"]),
        (ROWS[0], [1] * 5, ["of shape (48,)"]),
        (ROWS[:, :47], [1] * 5, ["of shape (5, 47)"]),
        (ROWS[:, :2], [1] * 5, ["of shape (5, 2)"]),
        (ROWS[:0], [], ["of shape (0, 48)"]),
        (ROWS.reshape(5, 3, 4, 4), [1] * 5, ["of shape (5, 3, 4, 4)"]),
        (ROWS, None, ["labels", "for each image", "from 1 to 3"]),
        (ROWS, [1] * 4, ["labels"]),
        (ROWS, [1, 2, 3, 4, 1], ["labels"]),
        (ROWS, [0, 2, 3, 1, 1], ["labels"]),
        (ROWS, [1.0] * 5, ["labels"]),
        (ROWS, [[1], [1, 2], 1, 1, 1], ["labels"]),
        (ROWS, [b"1"] * 5, ["labels"]),
    ],
)
def test_other_batches_are_refused(data, labels, parts):
    with pytest.raises(InputError, match=r"^SRC src: b: ") as refusal:
        check_planar("src", iter([("b", data, labels)]), range(1, 4))
    assert "\n" not in str(refusal.value)
    assert [part for part in parts if part not in str(refusal.value)] == []


def test_batches_of_several_sizes_are_refused():
    batches = [("a", ROWS, [1] * 5), ("b", ROWS[:, :12], [1] * 5)]
    with pytest.raises(InputError, match=r"SRC src: b: data is uint8 of shape \(5, 12\); uint8 of shape \(N, 48\) is"):
        check_planar("src", batches, range(1, 4))


# ---------------------------------------------------------------- folders


class Images:
    """Number i is all of colour i, and of class a or b. Notes which were made."""

    def __init__(self, count=10, size=6, at=None, event=None):
        self.size, self.made = size, []
        self._count, self._at, self._event = count, at, event

    def __len__(self):
        return self._count

    def name(self, i):
        return f"{'ab'[i % 2]}_{i:03d}.png"

    def pixels(self, i):
        if i == self._at:
            self._event()
        self.made.append(i)
        return np.full((self.size, self.size, 3), [i, 2 * i, 255 - i], np.uint8)


def assert_whole(folder, images):
    assert sorted(path.name for path in folder.iterdir()) == sorted(images.name(i) for i in range(len(images)))
    for i in range(len(images)):
        with Image.open(folder / images.name(i)) as image:
            assert (image.format, image.mode) == ("PNG", "RGB")
            np.testing.assert_array_equal(np.asarray(image), images.pixels(i))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_are_written_once(tmp_path, capfd, num_workers):
    folder = tmp_path / "new" / "folder"
    write_images(str(folder), Images(), 2, num_workers)
    assert capfd.readouterr() == (f"wrote 10 images of 2 classes to {folder}\n", "")  # progress is for terminals
    assert_whole(folder, Images())
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    again = Images()
    write_images(str(folder), again, 2, num_workers)
    assert capfd.readouterr().out == f"wrote 10 images of 2 classes to {folder} (10 were there already)\n"
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before and again.made == []


def test_the_bytes_do_not_depend_on_who_writes_them(tmp_path):
    for num_workers in (0, 2):
        write_images(str(tmp_path / str(num_workers)), Images(), 1, num_workers)
    assert snapshot(tmp_path / "0") == snapshot(tmp_path / "2")


def test_one_class_is_no_classes(tmp_path, capfd):
    write_images(str(tmp_path), Images(count=3), 1)
    assert capfd.readouterr().out == f"wrote 3 images of 1 class to {tmp_path}\n"


def test_the_library_reads_them(tmp_path):
    write_images(str(tmp_path), Images(), 2)
    ((x, cond),) = load_data_once(data_dir=str(tmp_path), batch_size=10, image_size=6, class_cond=True, num_workers=0)
    assert cond["y"].tolist() == [0] * 5 + [1] * 5
    assert ((x[:, 0, 0, 0] + 1) * 127.5).round().int().tolist() == [0, 2, 4, 6, 8, 1, 3, 5, 7, 9]


def interrupt():
    raise KeyboardInterrupt


def test_after_an_interruption_it_goes_on(tmp_path, capfd):
    with pytest.raises(KeyboardInterrupt):
        write_images(str(tmp_path), Images(at=6, event=interrupt), 2)
    assert_whole(tmp_path, Images(count=6))
    rest = Images()
    write_images(str(tmp_path), rest, 2)
    assert capfd.readouterr().out == f"wrote 10 images of 2 classes to {tmp_path} (6 were there already)\n"
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
            write_images(str(tmp_path), Images(), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [0, 1, 7, 20, 24, 30, -1])
def test_what_a_crash_cut_short_is_written_anew(tmp_path, capfd, length):
    """A process that is killed leaves a temporary file, a machine that crashes one that is cut short."""
    write_images(str(tmp_path), Images(), 2)
    content = (tmp_path / "a_004.png").read_bytes()
    (tmp_path / "a_004.png").write_bytes(content[:length])
    (tmp_path / "b_005.png").unlink()
    (tmp_path / "b_005.png.tmp").write_bytes(content[:10])
    capfd.readouterr()
    again = Images()
    write_images(str(tmp_path), again, 2)
    assert capfd.readouterr().out == f"wrote 10 images of 2 classes to {tmp_path} (8 were there already)\n"
    assert again.made == [4, 5]
    assert_whole(tmp_path, Images())


def test_images_of_another_size_are_not_taken_for_these(tmp_path):
    write_images(str(tmp_path), Images(), 2)
    before = snapshot(tmp_path)
    with pytest.raises(InputError, match=r"a_000\.png: is there already, as 6x6, not 7x7; give another OUT"):
        write_images(str(tmp_path), Images(size=7), 2)
    assert snapshot(tmp_path) == before


def test_other_content_under_an_images_name_is_replaced(tmp_path):
    (tmp_path / "a_000.png").write_bytes(b"no image, but longer than the end of one")
    write_images(str(tmp_path), Images(count=2), 2)
    assert_whole(tmp_path, Images(count=2))


def test_a_file_that_cannot_be_written(tmp_path):
    (tmp_path / "a_002.png").mkdir()
    with pytest.raises(InputError, match=r"a_002\.png: cannot be written \(Is a directory\)"):
        write_images(str(tmp_path), Images(), 2)


def refuse():
    raise InputError("SRC a: the image of key b'x': cannot be read as an image")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_made_ends_it_in_one_line(tmp_path, num_workers):
    with pytest.raises(InputError, match=r"^SRC a: the image of key b'x': cannot be read as an image$"):
        write_images(str(tmp_path), Images(at=3, event=refuse), 2, num_workers)
    assert_whole(tmp_path, Images(count=3))


def test_a_folder_is_made(tmp_path):
    make_folder(str(tmp_path / "a" / "b"))
    make_folder(str(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir()


def test_folders_that_cannot_be(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^OUT .*file: cannot be made a folder \(File exists\)$"):
        make_folder(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"^out_dir .*file/a: cannot be made a folder \(Not a directory\)$"):
        make_folder(str(tmp_path / "file" / "a"), flag="out_dir")
    with pytest.raises(InputError, match=r"^OUT gs://bucket/a: name a local folder$"):
        make_folder("gs://bucket/a")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(InputError, match="may not be written to"):
        make_folder(str(tmp_path))


@pytest.mark.parametrize("name", ["bedroom", "0001", "T-shirt", "été", "v1.5"])
def test_names_of_classes(name):
    check_class(name, "given")


@pytest.mark.parametrize("name", ["", "a_b", "_", "a/b", "../a", "..", ".a", "a.", "a b", "a\n", "-a", "a\0"])
def test_names_that_are_of_no_class(name):
    with pytest.raises(InputError, match=f"^given: {re.escape(repr(name))} cannot begin file names"):
        check_class(name, "given")


# ---------------------------------------------------------------- packed files


def test_packing(tmp_path, capfd):
    path = str(tmp_path / "a.npz")
    pack(path, iter([from_planar(ROWS, 4)]), (5, 4, 4, 3), [0, 1, 0, 1, 0], ["a", "b"])
    megabytes = os.path.getsize(path) / 1e6
    out = f"wrote 5 images of 2 classes, 4x4 with 3 channels, {megabytes:.1f} MB: {path}\n"
    assert capfd.readouterr() == (out, "")
    with np.load(path) as arrays:
        np.testing.assert_array_equal(arrays["images"], from_planar(ROWS, 4))


def test_names_of_packed_files(tmp_path):
    check_packed_name(str(tmp_path / "a.npz"))
    (tmp_path / "folder.npz").mkdir()
    for name, message in {
        "a": "ends in .npz",
        "gs://b/a.npz": "local file",
        f"{tmp_path}/folder.npz": "folder",
    }.items():
        with pytest.raises(InputError, match=f"^OUT {re.escape(name)}: .*{message}"):
            check_packed_name(name)


def test_workers(monkeypatch):
    assert [workers(0), workers(3)] == [0, 3] and workers(-1) >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert workers(-1) == os.cpu_count()


# ---------------------------------------------------------------- progress


def test_bars(tmp_path, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    write_images(str(tmp_path), Images(), 2)
    pixels = np.zeros((4, 6, 6, 3), dtype=np.uint8)
    pack(str(tmp_path / "a.npz"), [pixels[:3], pixels[3:]], pixels.shape, [0] * 4, ["a"])
    shown = terminal.getvalue()
    assert re.search(rf"{tmp_path}: 100%\|.*\| 10/10 \[", shown)
    assert re.search(r"packing: 100%\|.*\| 4/4 \[", shown)
