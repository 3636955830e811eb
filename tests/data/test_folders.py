"""Folders of images: links, hidden copies, other endings, and what the classes are."""

import os
import pickle
import re

import numpy as np
import pytest
from harness import write_images
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from improved_diffusion.data.folders import Paths, find_images, label_images, list_images
from improved_diffusion.image_datasets import load_data, load_data_once
from improved_diffusion.logger import Logger
from improved_diffusion.utils.errors import InputError


@pytest.fixture(autouse=True)
def notes(monkeypatch):
    """The lines for the log of a run that has not begun."""
    monkeypatch.setattr(Logger, "CURRENT", None)
    monkeypatch.setattr(Logger, "EARLY", [])
    return Logger.EARLY


def write(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), len(name)).save(path, format="PNG")


def relative(root, paths):
    return [os.path.relpath(path, root) for path in paths]


# ---------------------------------------------------------------- links


def link_to_parent(root):
    (root / "sub" / "up").symlink_to("..")


def links_to_itself(root):
    (root / "one").symlink_to(".")
    (root / "two").symlink_to(".")


def link_to_above(root):
    (root / "sub" / "up").symlink_to("../..")


def folders_that_hold_each_other(root):
    (root / "sub" / "x").symlink_to("../tub")
    (root / "tub").mkdir()
    (root / "tub" / "y").symlink_to("../sub")


CIRCLES = [link_to_parent, links_to_itself, link_to_above, folders_that_hold_each_other]


@pytest.mark.parametrize("link", CIRCLES, ids=lambda link: link.__name__)
def test_links_in_a_circle_leave_each_image_once(tmp_path, link):
    root = tmp_path / "root"
    names = ["sub/a_1.png", "sub/b_2.png", "z.png"]
    write(root, *names)
    link(root)
    paths, notes = find_images(str(root))
    assert relative(root, paths) == names == relative(root, list_images(str(root)))
    (line,) = notes
    assert str(root) in line and any(name in line for name in ("sub/up", "one", "sub/x"))


def test_links_that_lead_in_no_circle_are_followed_as_before(tmp_path):
    write(tmp_path / "root", "a/1.png")
    write(tmp_path / "elsewhere", "2.png")
    (tmp_path / "root" / "b").symlink_to("a")
    (tmp_path / "root" / "c").symlink_to("../elsewhere")
    paths, notes = find_images(str(tmp_path / "root"))
    assert (relative(tmp_path / "root", paths), notes) == (["a/1.png", "b/1.png", "c/2.png"], [])


def test_a_folder_outside_is_read_once_even_if_it_leads_back(tmp_path):
    write(tmp_path / "root", "a/1.png")
    write(tmp_path / "elsewhere", "2.png")
    (tmp_path / "root" / "c").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../root")
    assert relative(tmp_path / "root", list_images(str(tmp_path / "root"))) == ["a/1.png", "c/2.png"]


# ---------------------------------------------------------------- which files


def test_hidden_copies_are_left_out_in_one_line(tmp_path):
    write(tmp_path, "a/x.png", "a/._x.png", "a/.ipynb_checkpoints/x-checkpoint.png", "__MACOSX/a/._x.png", ".b/y.png")
    write(tmp_path, "a/.trashed-1-x.jpg")
    paths, (line,) = find_images(str(tmp_path))
    assert relative(tmp_path, paths) == [".b/y.png", "a/x.png"]
    assert str(tmp_path) in line and "4 " in line and "__MACOSX" in line


def test_photographs_of_phones_that_pillow_does_not_read_are_counted_in_a_line_of_their_own(tmp_path):
    write(tmp_path, "a.jpg", "b.HEIC", "c.heif", "d.webp", "e.dng")
    paths, notes = find_images(str(tmp_path))
    assert relative(tmp_path, paths) == ["a.jpg"]
    (heic,) = [note for note in notes if "HEIC" in note]
    (other,) = [note for note in notes if note != heic]
    assert "2 " in heic and "b.HEIC" in heic and "JPEG" in heic and "2 " in other and "d.webp" in other
    os.remove(tmp_path / "a.jpg")
    os.remove(tmp_path / "d.webp")
    with pytest.raises(InputError, match=r"no images.*2 HEIC files"):
        find_images(str(tmp_path))


def test_files_of_other_endings_are_named_and_counted_beside_the_originals(tmp_path):
    write(tmp_path, "a.png", "b.webp", "c/d.TIFF", "e.avif")
    (tmp_path / "README").write_text("a.png is an image")
    (tmp_path / "notes.txt").touch()
    paths, (line,) = find_images(str(tmp_path))
    assert relative(tmp_path, paths) == ["a.png"]
    assert "3 " in line and "b.webp" in line and "png" in line


def test_images_of_any_ending_are_counted_and_other_files_are_not(tmp_path):
    write(tmp_path, "a.png", "b.jpe", "c.jpg_large", "d.png.1", "e.png.2")
    for name in ("LICENSE", "a.txt", "a.json", "._a.txt"):
        (tmp_path / name).write_text("text")
    paths, (line,) = find_images(str(tmp_path))
    assert relative(tmp_path, paths) == ["a.png"] and str(tmp_path) in line
    assert re.search(r": (\d+) ", line)[1] == "5"  # LICENSE has as much of an ending as d.png.1


def test_images_without_an_ending_are_counted_too(tmp_path):
    write(tmp_path, "a.png", "b", "c")
    paths, (line,) = find_images(str(tmp_path))
    assert relative(tmp_path, paths) == ["a.png"] and "2 " in line and str(tmp_path / "b") in line


@pytest.mark.parametrize("ending", ["webp", "BMP", "tif", "tiff", "jfif"])
def test_files_of_other_endings_are_read_where_there_are_no_others(tmp_path, ending):
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    form = {"bmp": "BMP", "webp": "WEBP", "jfif": "JPEG"}.get(ending.lower(), "TIFF")
    words = dict(lossless=True) if form == "WEBP" else {}
    Image.fromarray(pixels).save(tmp_path / f"a_1.{ending}", format=form, **words)
    ((x, _),) = load_data_once(data_dir=str(tmp_path), batch_size=1, image_size=8, num_workers=0)
    if form != "JPEG":
        np.testing.assert_array_equal(((x[0].numpy() + 1) * 127.5).round(), pixels.transpose(2, 0, 1))


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    write(tmp_path, "a.avif", "._x.png")
    with pytest.raises(InputError, match=r"no images.*a.avif.*_x.png") as info:
        find_images(str(tmp_path))
    assert "\n" not in str(info.value)


def test_what_is_left_out_is_logged_once_and_even_before_the_log_begins(tmp_path, monkeypatch):
    from improved_diffusion import logger

    write(tmp_path / "images", "a_1.png", "a_2.webp")
    words = dict(data_dir=str(tmp_path / "images"), batch_size=1, image_size=8, num_workers=0)
    load_data(**words)
    load_data(**words)
    logger.configure(str(tmp_path / "log"), ["log"])
    logger.get_current().close()
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert sum("a_2.webp" in line for line in lines) == 1


# ---------------------------------------------------------------- classes

PREFIX = {  # what auto reads by file name, as the original does
    "flat": ["cat_1.png", "dog_1.png"],
    "flat, without underscores": ["0.png", "1.png"],
    "some beside folders": ["a.png", "cat/1.png", "dog/1.png"],
    "one folder": ["train/cat_0.png", "train/dog_0.png"],
    "one folder and one class": ["images/img_0.png", "images/img_1.png"],
    "splits": ["train/cat_0.png", "train/dog_0.png", "val/cat_1.png"],
    "splits with a name": ["cifar_train/cat_0.png", "cifar_test/cat_1.png"],
    "shards": ["00/cat_0.png", "00/dog_1.png", "01/cat_2.png"],
    "shards with a name": ["part-1/cat_0.png", "part-2/dog_1.png", "part-2/cat_2.png"],
    "both are the same": ["n1/n1_0.png", "n1/n1_1.png", "n2/n2_0.png"],
    "both have the same images": ["x/cat_0.png", "x/cat_1.png", "y/dog_0.png"],
}
FOLDER = {
    "one prefix": ["cat/img_0.png", "dog/img_0.png"],
    "no underscores": ["cat/0.png", "dog/0.png", "dog/1.png"],
    "numbered": ["0/1.png", "1/1.png"],
    "numbered, one prefix": ["0/img_1.png", "1/img_1.png"],
    "deeper": ["cat/x/0.png", "cat/y/0.png", "dog/0.png"],
    "one folder": ["photos/0.png", "photos/1.png"],
}
UNCLEAR = {
    "prefixes within folders": ["cats/tom_1.png", "cats/felix_1.png", "dogs/rex_1.png"],
    "the same prefixes in each": ["cat/front_1.png", "cat/back_1.png", "dog/front_1.png", "dog/back_1.png"],
    "some underscores": ["cat/img_1.png", "dog/1.png"],
    "splits": ["train/0.png", "test/0.png"],
    "class folders in a split": ["train/cat/0.png", "train/dog/0.png"],
}


def label(names, by="auto", folder="/data", class_names=None):
    labels, classes, note = label_images(folder, [os.path.join(folder, name) for name in names], by, class_names)
    return [classes[i] for i in labels], classes, note


def prefixes(names):
    return [name.rpartition("/")[2].split("_")[0] for name in names]


def folders(names):
    return [name.split("/")[0] for name in names]


@pytest.mark.parametrize("case", PREFIX)
def test_auto_keeps_the_originals_classes(case):
    assert label(PREFIX[case]) == (prefixes(PREFIX[case]), sorted(set(prefixes(PREFIX[case]))), "")


@pytest.mark.parametrize("end", ["", "/", "//"])
@pytest.mark.parametrize("case", FOLDER)
def test_auto_takes_class_folders_where_names_give_no_classes_and_says_so(case, end):
    names = FOLDER[case]
    labels, classes, note = label(names, folder=f"/data{end}")
    assert (labels, classes) == (folders(names), sorted(set(folders(names))))
    assert "/data" in note and all(name in note for name in classes)


@pytest.mark.parametrize("case", UNCLEAR)
def test_auto_refuses_what_may_be_either_and_names_both(case):
    names = UNCLEAR[case]
    with pytest.raises(InputError) as info:
        label(names)
    message = str(info.value)
    assert all(name in message for name in (*prefixes(names), *folders(names), "labels prefix", "labels folder"))
    assert "\n" not in message and ("/data/train" in message or "deeper" not in case)
    assert label(names, "prefix")[0] == prefixes(names) and label(names, "folder")[0] == folders(names)


@pytest.mark.parametrize("case", [*FOLDER, *UNCLEAR])
def test_a_resumed_run_keeps_its_reading(case):
    names = {**FOLDER, **UNCLEAR}[case]
    for reading in (prefixes, folders):
        assert label(names, class_names=[*reading(names), "another"])[0] == reading(names)


def test_names_in_notes_are_escaped(tmp_path):
    """A note is a line, and prepare.py prints it."""
    write(tmp_path, "a\n\x1b[31m/0.png", "a\n\x1b[31m/0.webp", "b/0.png", "b/1.png")
    paths, (left_out,) = find_images(str(tmp_path))
    for line in (left_out, label_images(str(tmp_path), paths)[2]):
        assert line.isprintable() and r"a\n\x1b[31m" in line


def test_labels_by_folder_need_folders():
    with pytest.raises(InputError, match=r"/data: .*b\.png"):
        label(["a/1.png", "b.png"], "folder")
    with pytest.raises(InputError, match=r"labels name: .*prefix.*folder"):
        label(["a/1.png"], "name")


@pytest.mark.parametrize("load", [load_data, load_data_once])
def test_class_folders_train_and_resume(tmp_path, notes, load):
    write(tmp_path, "cat/img_0.png", "dog/img_0.png", "dog/img_1.png")
    words = dict(data_dir=str(tmp_path), batch_size=3, image_size=8, class_cond=True, num_workers=0)
    words |= dict(deterministic=True) if load is load_data else {}
    data = load(**words)
    assert data.dataset.class_names == ["cat", "dog"] and next(data)[1]["y"].tolist() == [0, 1, 1]
    assert len(notes) == 1 and "cat, dog" in notes[0]
    data = load(**words, class_names=["ant", "cat", "dog"])
    assert data.dataset.class_names == ["ant", "cat", "dog"] and next(data)[1]["y"].tolist() == [1, 2, 2]
    assert load(**words, labels="prefix").dataset.class_names == ["img"]


# ---------------------------------------------------------------- many paths


@given(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=8), max_size=8))
def test_paths_are_a_list_of_str(names):
    paths = pickle.loads(pickle.dumps(Paths(names)))
    assert paths == names and list(paths) == names and len(paths) == len(names) and repr(paths) == repr(names)
    assert [paths[i] for i in range(-len(names), len(names))] == names + names
    assert paths[1:3] == names[1:3] and paths[::-2] == names[::-2]
    for i in (len(names), -len(names) - 1):
        with pytest.raises(IndexError):
            paths[i]


def test_many_paths_take_the_memory_of_their_characters():
    names = [f"/data/images/{i:06d}.png" for i in range(10000)]
    assert len(pickle.dumps(Paths(names))) < 10000 * (len(names[0]) + 8) + 1000


def test_names_that_are_no_text_are_read(tmp_path):
    write_images(tmp_path, count=2)
    os.rename(tmp_path / "a_000.png", os.path.join(os.fsencode(tmp_path), b"a_\xff.png"))
    ((x, _),) = load_data_once(data_dir=str(tmp_path), batch_size=2, image_size=8, num_workers=0)
    assert len(x) == 2
