"""prepare_images.py: what it packs and prints, what it refuses, and that training on it is training on the folder."""

import os
import re
import signal

import numpy as np
import pytest
from harness import TINY, flags, run_script, run_subprocess, save_weights, snapshot, write_images
from PIL import Image
from training import assert_same, load

from improved_diffusion import image_datasets
from improved_diffusion.image_datasets import ImageDataset, _list_image_files_recursively


def prepare(*words, logdir="unused", **values):
    return run_script("prepare_images", [*map(str, words), *flags(**values)], logdir)


@pytest.fixture
def images(tmp_path):
    """Images of three classes and other sizes than they are packed at."""
    write_images(tmp_path / "images", count=70, size=19, classes=3)
    write_images(tmp_path / "images" / "more", count=4, size=8, channels=1, classes=4)
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        (dict(image_size=8), (74, 8, 8, 3)),
        (dict(image_size=12, image_channels=1, num_workers=0), (74, 12, 12, 1)),
        (dict(num_workers=2), (74, 64, 64, 3)),
    ],
)
def test_a_folder_is_packed(tmp_path, capfd, images, words, shape):
    before, out = snapshot(images), tmp_path / "new" / "packed.npz"
    assert prepare(images, out, **words) == 0
    count, size, _, channels = shape
    megabytes = out.stat().st_size / 1e6
    expected = f"wrote 74 images of 4 classes, {size}x{size} with {channels} channels, {megabytes:.1f} MB: {out}\n"
    assert capfd.readouterr() == (expected, "")  # progress is for terminals
    assert snapshot(images) == before and [path.name for path in out.parent.iterdir()] == ["packed.npz"]
    with np.load(out) as arrays:
        assert (arrays["images"].shape, arrays["images"].dtype) == (shape, np.uint8)
        paths = _list_image_files_recursively(str(images))
        folder = ImageDataset(size, paths, image_channels=channels)
        np.testing.assert_array_equal(arrays["images"], [folder.pixels(i) for i in range(count)])
        assert arrays["classes"].tolist() == list("abcd")
        assert [list("abcd")[i] for i in arrays["labels"]] == [path.rsplit("/", 1)[1][0] for path in paths]


def test_the_same_command_writes_the_same_bytes(tmp_path, images):
    files = []
    for workers in (0, 2):
        assert prepare(images, tmp_path / "a.npz", image_size=8, num_workers=workers) == 0
        files.append((tmp_path / "a.npz").read_bytes())
    assert files[0] == files[1]


def test_the_folder_is_whole_whatever_launcher_was_there(tmp_path, images):
    words = [str(images), str(tmp_path / "a.npz"), *flags(image_size=8, num_workers=0)]
    assert run_script("prepare_images", words, tmp_path, RANK="0", WORLD_SIZE="2") == 0
    with np.load(tmp_path / "a.npz") as arrays:
        assert len(arrays["images"]) == len(arrays["labels"]) == 74


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["arguments are required: SRC, OUT"]),
        (["images"], ["arguments are required: OUT"]),
        (["nowhere", "a.npz"], ["SRC nowhere", "no such folder"]),
        (["images/a_000.png", "a.npz"], ["SRC images/a_000.png", "no such folder"]),
        (["empty", "a.npz"], ["SRC empty", "no images", "jpg, jpeg, png, gif"]),
        (["images", "packed"], ["OUT packed", "ends in .npz"]),
        (["images", "gs://bucket/a.npz"], ["OUT gs://bucket/a.npz", "local file"]),
        (["images", "folder.npz"], ["OUT folder.npz", "is a folder"]),
        (["images", "images/a_000.png/a.npz"], ["images/a_000.png/a.npz", "cannot be written"]),
        (["images", "a.npz", "--image_size", "0"], ["--image_size 0", "1 or more"]),
        (["images", "a.npz", "--image_channels", "4"], ["--image_channels 4", "1 or 3"]),
        (["images", "a.npz", "--num_workers", "-2"], ["--num_workers -2", "0 or more"]),
        (["corrupt", "a.npz", "--num_workers", "0"], ["corrupt/b_003.png", "cannot be read as an image"]),
        (["corrupt", "old.npz", "--num_workers", "0"], ["corrupt/b_003.png", "cannot be read as an image"]),
        pytest.param(
            ["corrupt", "a.npz", "--num_workers", "1"],
            ["corrupt/b_003.png", "cannot be read as an image"],
            marks=pytest.mark.slow,  # torch waits five seconds for a worker that has raised
        ),
    ],
)
def test_what_cannot_work_ends_in_one_line_and_changes_nothing(monkeypatch, tmp_path, capfd, words, parts):
    for name in ("images", "corrupt"):
        write_images(tmp_path / name)
    (tmp_path / "corrupt" / "b_003.png").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "old.npz").write_bytes(b"what was there")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert prepare(*words) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("prepare_images.py: error: ")
    assert [part for part in parts if part not in err] == [], err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_a_process_that_is_killed_is_not_a_full_disk(monkeypatch, tmp_path, capfd, images, before):
    """As the system does when memory runs out; workers are forked of this process and kill themselves here."""
    out, main = tmp_path / "a.npz", os.getpid()
    if before:
        out.write_bytes(before)

    def die(*_):
        assert os.getpid() != main
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(image_datasets, "decode_image", die)
    assert prepare(images, out, image_size=8, num_workers=1) == 1
    printed, err = capfd.readouterr()
    expected = r"prepare_images\.py: error: a process .* \(.*(killed by signal: Killed|unexpectedly).*\); .*memory.*\n"
    assert re.fullmatch(expected, err), err
    assert printed == "" and (out.read_bytes() if out.exists() else None) == before
    assert not (tmp_path / "a.npz.tmp").exists()


@pytest.mark.slow
def test_in_a_process_of_its_own(tmp_path, images):
    done = run_subprocess("prepare_images", [str(images), str(tmp_path / "a.npz"), "--image_size", "8"], tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("wrote 74 images of 4 classes")


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_training_on_packed_images_writes_the_bits_of_training_on_the_folder(tmp_path, images, script):
    assert prepare(images, tmp_path / "packed.npz", image_size=8) == 0
    sizes = dict(image_size=8) if script == "image_train" else dict(large_size=8, small_size=4)
    words = dict(TINY, **sizes, batch_size=4, max_steps=3, class_cond=True, num_classes=4, seed=0, ema_rate=0.9)
    for name in ("images", "packed.npz"):
        assert run_script(script, flags(data_dir=tmp_path / name, **words), tmp_path / f"of {name}") == 0
    for name in ("model000003.pt", "ema_0.9_000003.pt", "opt000003.pt"):
        assert_same(load(tmp_path / "of packed.npz" / name), load(tmp_path / "of images" / name), name)


def test_likelihood_of_packed_images(tmp_path, images):
    assert prepare(images, tmp_path / "packed.npz", image_size=8) == 0
    words = dict(
        TINY, image_size=8, model_path=save_weights(tmp_path / "model.pt"), num_samples=6, batch_size=4, seed=0
    )
    for name in ("images", "packed.npz"):
        words.update(data_dir=tmp_path / name, timestep_respacing=4)
        assert run_script("image_nll", flags(**words), tmp_path / f"of {name}") == 0
    ours, theirs = (np.load(tmp_path / f"of {name}" / "vb_terms.npz")["arr_0"] for name in ("packed.npz", "images"))
    np.testing.assert_array_equal(ours, theirs)


def test_pictures_are_what_is_packed(tmp_path):
    """Seen with other eyes than the library's."""
    picture = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(picture).save(tmp_path / "images" / "cat_1.png")
    assert prepare(tmp_path / "images", tmp_path / "a.npz", image_size=6, num_workers=0) == 0
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], picture[None])
        assert (arrays["labels"].tolist(), arrays["classes"].tolist()) == ([0], ["cat"])
