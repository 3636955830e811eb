"""What the scripts share: where a run is, what it says of itself, and what its model takes along."""

import contextlib
import csv
import functools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios

import numpy as np
import pytest
from harness import (
    ROOT,
    TINY,
    TRAIN,
    build,
    environment,
    flags,
    free_port,
    on_a_terminal,
    run_script,
    snapshot,
    write_images,
)
from PIL import Image
from processes import finish

from improved_diffusion import logger
from improved_diffusion.cli import loop, parser
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel
from improved_diffusion.utils import files, progress
from improved_diffusion.utils.errors import InputError


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", count=10, classes=3)  # a, b and c


def run(script, logdir, **words):
    assert run_script(script, flags(**words), logdir) == 0


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    images = write_images(folder / "images", count=10, classes=3)
    words = dict(TRAIN, class_cond=True, num_classes=5, data_dir=images, learn_sigma=True, seed=0)
    run("image_train", folder / "run", **words)
    return folder / "run"


@pytest.fixture
def trained(tmp_path, trained_once, capfd):
    """The folder of a class-conditional run, the test's own."""
    shutil.copytree(trained_once, tmp_path / "run")
    capfd.readouterr()
    return tmp_path / "run"


# ---------------------------------------------------------------- where a run is


def test_log_dir_then_the_variable_then_a_new_folder(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/image_sample.py"])
    monkeypatch.setattr(logger.Logger, "CURRENT", None)

    def folder(log_dir):
        with parser.logging_to(log_dir, ["a note"]):
            logger.log("work")
        logger.get_current().close()
        return logger.get_dir()

    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "variable"))
    assert folder(str(tmp_path / "flag")) == str(tmp_path / "flag")
    assert folder("") == str(tmp_path / "variable")
    monkeypatch.delenv("OPENAI_LOGDIR")
    capfd.readouterr()
    new = [folder("") for _ in range(3)]  # within a second, too
    assert len(set(new)) == 3
    assert all(re.fullmatch(r"runs/image_sample-\d{4}-\d\d-\d\d-\d{6}(-\d)?", name) for name in new)
    lines = capfd.readouterr().out.splitlines()[:5]
    assert lines[0] == f"Logging to {new[0]}"
    assert lines[1].startswith("rank 0 of 1") and lines[2:4] == ["a note", "work"]
    assert lines[4] == f"all files are in {new[0]}"


@pytest.mark.parametrize("named", [True, False])
def test_a_run_locks_its_folder(images, tmp_path, monkeypatch, named):
    """Also a new one that no flag names."""
    monkeypatch.chdir(tmp_path)
    refusals = []

    class Meanwhile(TrainLoop):
        def run_loop(self):
            code = "import sys; from improved_diffusion.utils.files import FolderLock as F; F(sys.argv[1], 0).acquire()"
            command = [sys.executable, "-c", code, logger.get_dir()]
            other = subprocess.run(command, stderr=subprocess.PIPE, text=True)
            refusals.append(other.stderr)
            super().run_loop()

    monkeypatch.setattr(loop, "TrainLoop", Meanwhile)
    assert run_script("image_train", flags(**TRAIN, data_dir=images), tmp_path / "run" if named else "") == 0
    folder = tmp_path / "run" if named else next((tmp_path / "runs").iterdir())
    assert len(refusals) == 1 and folder.name in refusals[0] and str(os.getpid()) in refusals[0]
    assert not (folder / files.FolderLock.NAME).exists()


@pytest.mark.parametrize(
    "words, named", [(dict(log_dir="gs://bucket/run"), "--log_dir"), ({}, "OPENAI_LOGDIR")], ids=["flag", "variable"]
)
def test_a_url_is_no_log_directory(capfd, words, named):
    assert run_script("image_train", flags(**words, data_dir="nowhere"), "gs://bucket/run") == 2
    assert f"{named} gs://bucket/run: " in capfd.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scripts/image_sample.py"])
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    (tmp_path / "runs").write_text("")
    with (
        pytest.raises(InputError, match=r"^runs/image_sample-.*: .*\(.*\); give --log_dir$"),
        parser.logging_to(""),
    ):
        pass


def test_a_run_that_fails_says_where_it_is_too(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(logger.Logger, "CURRENT", None)
    with pytest.raises(KeyError), parser.logging_to(str(tmp_path)):
        raise KeyError("x")
    logger.get_current().close()
    assert capfd.readouterr().out.endswith(f"all files are in {tmp_path}\n")
    with pytest.raises(InputError), parser.logging_to(str(tmp_path)):
        raise InputError("lr 0: give more")
    logger.get_current().close()
    assert "all files" not in capfd.readouterr().out


# ---------------------------------------------------------------- training


def test_a_run_says_what_it_is_and_what_it_wrote(tmp_path, images, capfd):
    words = dict(TRAIN, class_cond=True, num_classes=3, data_dir=images, preview_samples=4)
    run("image_train", tmp_path / "run", **words, log_dir=tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    lines = capfd.readouterr().out.splitlines()
    parameters = sum(p.numel() for p in build(**TINY, image_size=8, class_cond=True, num_classes=3)[0].parameters())
    assert lines[0] == f"Logging to {folder}"
    assert "classes: 0 a, 1 b, 2 c" in lines
    assert (
        f"10 images of 3 classes, {parameters:,} parameters, 1 rank of 4 images a step; training to step 4; "
        "next checkpoint: step 0, then every 2" in lines
    )
    assert [line.split(",")[0] for line in lines if line.endswith(" left")] == ["3 of 4 steps"]
    for step in (0, 2, 4):
        assert f"saved {folder}/model{step:06d}.pt and its ema, opt and state" in lines
        assert (f"drew {folder}/preview_{step:06d}_model.png" in lines) == (step > 0)
    assert lines[-1] == f"all files are in {folder}"
    assert not (tmp_path / "run").exists()
    with open(folder / "progress.csv") as f:
        assert all(float(row["images/s"]) > 0 for row in csv.DictReader(f))

    config = json.loads((folder / "config.json").read_text())
    assert config["script"] == "image_train" and config["class_names"] == ["a", "b", "c"]
    assert {name: config["flags"][name] for name in TINY} == TINY
    assert config["flags"].keys().isdisjoint({"given", "log_dir", "preset", "dry_run"})

    words.update(resume_checkpoint=folder / "model000002.pt", max_steps=6)
    run("image_train", folder, **words)
    assert "training to step 6; next checkpoint: step 4, then every 2" in capfd.readouterr().out


def test_no_preview_where_none_is_wanted(tmp_path, images):
    run("image_train", tmp_path / "run", **TRAIN, data_dir=images)
    assert list((tmp_path / "run").glob("preview*")) == []


def test_previews_of_super_resolution(tmp_path, images):
    words = {**TRAIN, "data_dir": images, "large_size": 8, "small_size": 4, "preview_samples": 3}
    del words["image_size"]
    run("super_res_train", tmp_path / "run", **words)
    with Image.open(tmp_path / "run" / "preview_000004_model.png") as picture:
        assert picture.size == (2 * 194 + 2, 2 * 98 + 2)  # small images on the left of large ones


def test_a_continued_run_keeps_the_numbers_of_its_classes(tmp_path, images, trained, capfd):
    for path in images.glob("a_*"):
        path.unlink()
    words = dict(TRAIN, class_cond=True, num_classes=5, data_dir=images, learn_sigma=True, max_steps=5)
    for resume_checkpoint in (trained / "model000002.pt", "auto"):
        run("image_train", trained, **words, resume_checkpoint=resume_checkpoint)
        assert "classes: 0 a, 1 b, 2 c\n" in capfd.readouterr().out
    Image.new("RGB", (8, 8)).save(images / "d_0.png")
    run("image_train", tmp_path / "new", **words, resume_checkpoint=trained / "ema_0.9_000004.pt")  # a new run
    assert "classes: 0 b, 1 c, 2 d\n" in capfd.readouterr().out
    assert run_script("image_train", flags(**words, resume_checkpoint="auto"), trained) == 2
    err = capfd.readouterr().err
    assert "the class d " in err and "(a, b, c)" in err


def test_a_continued_run_has_its_model_even_where_flags_were_forgotten(tmp_path, images, capfd):
    words = dict(TRAIN, data_dir=images, dropout=0.25)
    run("image_train", tmp_path / "run", **words)
    config = (tmp_path / "run" / "config.json").read_text()
    for name in ("noise_schedule", "dropout", "num_heads"):
        del words[name]
    words.update(max_steps=6, resume_checkpoint="auto")
    run("image_train", tmp_path / "run", **words)
    out = capfd.readouterr().out
    assert f"flags of the model: {tmp_path}/run/config.json" in out and "noise_schedule is" not in out
    then, now = json.loads(config), json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: now["flags"][name] for name in TINY} == TINY and now["flags"]["dropout"] == 0.25
    assert {name for name in then["flags"] if then["flags"][name] != now["flags"][name]} == {
        "max_steps",
        "resume_checkpoint",
    }
    words.update(max_steps=7, noise_schedule="linear")  # on purpose
    run("image_train", tmp_path / "run", **words)
    out = capfd.readouterr().out
    assert "WARNING: --noise_schedule linear is given; the model was trained with cosine" in out
    assert "noise_schedule is linear from here on, and was cosine in the checkpoint" in out


def test_nothing_left_to_train(tmp_path, images, capfd):
    words = dict(TRAIN, data_dir=images, resume_checkpoint="auto")
    run("image_train", tmp_path / "run", **words)
    capfd.readouterr()
    run("image_train", tmp_path / "run", **{**words, "max_steps": 2})
    out = capfd.readouterr().out
    assert "the run is at step 4 already: nothing is left to train\n" in out and "next checkpoint" not in out


def test_a_folder_below_the_home_directory(tmp_path, images, monkeypatch, capfd):
    """~ is the same folder for the log, for auto and for the classes so far."""
    monkeypatch.setenv("HOME", str(tmp_path))
    words = dict(TRAIN, class_cond=True, num_classes=5, data_dir=images, resume_checkpoint="auto", log_dir="~/r")
    run("image_train", "unused", **words)
    for path in images.glob("a_*"):
        path.unlink()
    run("image_train", "unused", **{**words, "max_steps": 6})
    assert capfd.readouterr().out.count("classes: 0 a, 1 b, 2 c\n") == 2
    assert (tmp_path / "r" / "model000006.pt").exists()


def test_checkpoints_elsewhere(tmp_path, images, capfd):
    words = flags(**{**TRAIN, "preview_samples": 4}, data_dir=images, log_dir=tmp_path / "log")
    assert run_script("image_train", words, "unused", DIFFUSION_BLOB_LOGDIR=str(tmp_path / "blob")) == 0
    assert capfd.readouterr().out.endswith(f"all files are in {tmp_path}/log, checkpoints in {tmp_path}/blob\n")
    assert {path.name for path in (tmp_path / "log").iterdir()} == {"log.txt", "progress.csv"}
    assert {"config.json", "model000004.pt", "preview_000004_model.png"} <= {
        p.name for p in (tmp_path / "blob").iterdir()
    }


@pytest.mark.skipif(files.fcntl is None, reason="no fcntl here")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_folder_has_one_run(tmp_path, images, elsewhere, monkeypatch, capfd):
    """A second one ends before it changes a file; the log directory counts only where checkpoints go there."""
    monkeypatch.setattr(parser, "FolderLock", functools.partial(files.FolderLock, patience=0))
    log, blob = (tmp_path / name for name in ("log", "blob" if elsewhere else "log"))
    words = flags(**dict(TRAIN, data_dir=images, resume_checkpoint="auto"))
    variables = {"DIFFUSION_BLOB_LOGDIR": str(blob)} if elsewhere else {}
    code = (
        "import sys; from improved_diffusion.utils.files import FolderLock\n"
        "lock = FolderLock(sys.argv[1]); lock.acquire(); print(flush=True); sys.stdin.read(); lock.release()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(blob)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        holder.stdout.readline()
        before = snapshot(tmp_path)
        assert run_script("image_train", words, log, **variables) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{blob} is in use" in line and f"process {holder.pid}" in line
        assert snapshot(tmp_path) == before
    assert run_script("image_train", words, log, **variables) == 0
    assert (blob / "model000004.pt").exists() and not list(tmp_path.rglob(".lock"))


def test_names_that_are_no_text(tmp_path, images, capfd):
    os.rename(bytes(images / "a_000.png"), bytes(images) + b"/caf\xe9_1.png")
    run("image_train", tmp_path / "run", **dict(TRAIN, class_cond=True, num_classes=5, data_dir=images))
    assert "3 caf\\udce9\n" in capfd.readouterr().out
    assert "3 caf\\udce9\n" in (tmp_path / "run" / "log.txt").read_text()


# ---------------------------------------------------------------- trained models


def test_the_weights_are_enough(tmp_path, images, trained, capfd):
    weights = trained / "ema_0.9_000004.pt"
    run("image_sample", tmp_path / "s", model_path=weights, num_samples=40, timestep_respacing=1, seed=0)
    with np.load(tmp_path / "s" / "samples_40x8x8x3.npz") as arrays:
        assert set(arrays["arr_1"].tolist()) == {0, 1, 2}  # of the five that it has room for
    out = capfd.readouterr().out
    assert f"flags of the model: {trained}/config.json" in out and "classes: 0 a, 1 b, 2 c\n" in out
    assert f"WARNING: {weights.name} averages over about 10 steps, but has seen 4, not 30" in out
    name = f"{tmp_path}/s/samples_40x8x8x3"
    assert f"saved {name}.npz\nsaved {name}.png (the first 30 of 40 by class)\n" in out
    picture = np.asarray(Image.open(tmp_path / "s" / "samples_40x8x8x3.png"))
    assert picture.shape == (3 * 98 + 2, 10 * 98 + 2, 3) and picture.std() > 10

    run("image_nll", tmp_path / "n", model_path=weights, data_dir=images, timestep_respacing=2, num_samples=3)
    assert "total bpd over 3 images" in capfd.readouterr().out


def test_chosen_classes_and_a_file_for_each_sample(tmp_path, trained):
    weights = trained / "ema_0.9_000004.pt"
    words = dict(model_path=weights, timestep_respacing=1, save_images=True, batch_size=4)
    run("image_sample", tmp_path / "s", **words, classes="c:3,1:2")
    with np.load(tmp_path / "s" / "samples_5x8x8x3.npz") as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.tolist() == [2, 2, 2, 1, 1]
    names = ["c_000000.png", "c_000001.png", "c_000002.png", "b_000003.png", "b_000004.png"]
    assert sorted(path.name for path in (tmp_path / "s" / "images").iterdir()) == sorted(names)
    for name, image in zip(names, images, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s" / "images" / name)), image)

    run("image_sample", tmp_path / "t", **words, classes="0,2", num_samples=5)
    with np.load(tmp_path / "t" / "samples_5x8x8x3.npz") as arrays:
        assert arrays["arr_1"].tolist() == [0, 2, 0, 2, 0]


def test_images_of_two_calls_do_not_mix(tmp_path, trained, capfd):
    words = dict(model_path=trained / "ema_0.9_000004.pt", timestep_respacing=1, save_images=True)
    run("image_sample", tmp_path / "s", **words, num_samples=4)
    assert run_script("image_sample", flags(**words, num_samples=2), tmp_path / "s") == 2
    assert f"save_images: {tmp_path}/s/images " in capfd.readouterr().err
    assert len(list((tmp_path / "s" / "images").iterdir())) == 4


def test_a_dry_run_warns_too(tmp_path, trained, capfd):
    words = dict(model_path=trained / "ema_0.9_000004.pt", noise_schedule="linear", dry_run=True)
    run("image_sample", tmp_path / "s", **words)
    out = capfd.readouterr().out
    assert "WARNING: --noise_schedule linear is given; the model was trained with cosine\n" in out
    assert not (tmp_path / "s").exists()


def test_a_validation_folder_without_a_class_keeps_the_numbers(tmp_path, images, trained, monkeypatch):
    seen = []
    weights = trained / "ema_0.9_000004.pt"
    for path in images.glob("a_*"):
        path.unlink()
    forward = UNetModel.forward

    def spy(self, x, t, y):
        seen.append(y.tolist())
        return forward(self, x, t, y)

    monkeypatch.setattr(UNetModel, "forward", spy)
    run("image_nll", tmp_path / "n", model_path=weights, data_dir=images, timestep_respacing=1, batch_size=6)
    assert seen == [[1, 1, 1, 2, 2, 2]]  # b and c, as when a was there


# ---------------------------------------------------------------- on a terminal


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_on_a_terminal_and_only_there(tmp_path, images, terminal):
    """A real one: the other end of a pseudo-terminal."""
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 200))
    words = [sys.executable, ROOT / "scripts" / "image_train.py", *flags(**TRAIN, data_dir=images)]
    stderr = writer if terminal else subprocess.PIPE
    done = subprocess.run(
        words, env=environment(OPENAI_LOGDIR=str(tmp_path / "run")), stdout=subprocess.PIPE, stderr=stderr
    )
    os.close(writer)
    shown = read_all(reader) if terminal else done.stderr.decode()
    os.close(reader)
    assert done.returncode == 0
    assert b"| loss " in done.stdout and b"training:" not in done.stdout
    if terminal:
        assert re.search(r"training: 100%\|.*\| 4/4 \[.*steps/s, loss=[\d.]+, images/s=[\d.]+\]", shown)
    else:
        assert shown == ""


def test_bars_of_sampling_writing_and_evaluating(tmp_path, images, trained, monkeypatch):
    terminal = on_a_terminal(monkeypatch)
    words = dict(model_path=trained / "ema_0.9_000004.pt", num_samples=6)
    run("image_sample", tmp_path / "s", **words, batch_size=3, timestep_respacing=4, save_images=True)
    run("image_nll", tmp_path / "n", **words, batch_size=2, timestep_respacing=3, data_dir=images)
    shown = terminal.getvalue()
    for bar in ("sampling", r"8/8 \["), ("writing", r"6/6 \["), ("evaluating", r"9/9 \["):
        assert re.search(r"{}: 100%\|.*\| {}".format(*bar), shown), bar


def test_lines_of_sampling_writing_and_evaluating_where_there_is_no_terminal(
    tmp_path, images, trained, monkeypatch, capfd
):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    words = dict(model_path=trained / "ema_0.9_000004.pt", num_samples=6)
    run("image_sample", tmp_path / "s", **words, batch_size=3, timestep_respacing=4, save_images=True)
    run("image_nll", tmp_path / "n", **words, batch_size=2, timestep_respacing=3, data_dir=images)
    out, err = capfd.readouterr()
    assert err == ""
    for line in "sampling: 8 of 8 steps", "writing: 6 of 6 images", "evaluating: 9 of 9 steps":
        assert f"{line}, 0 s left\n" in out


def read_all(descriptor):
    parts = []
    with contextlib.suppress(OSError):  # which is how a terminal says that it has ended
        while part := os.read(descriptor, 100_000):
            parts.append(part)
    return b"".join(parts).decode()


# ---------------------------------------------------------------- on two ranks


def launch(server, script, cwd, **words):
    """A script on two ranks, without a log directory. :return: what rank 0 prints."""
    world = dict(WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    path, words = ROOT / "scripts" / f"{script}.py", flags(**words)
    ranks = [server.start(path, words, cwd=cwd, **world, RANK=rank, LOCAL_RANK=rank) for rank in range(2)]
    finish(ranks)
    return ranks[0].out.read_text()


@pytest.mark.slow
def test_two_ranks_share_a_folder_a_picture_and_the_classes(server, tmp_path, images):
    words = dict(TRAIN, class_cond=True, num_classes=5, data_dir=images, learn_sigma=True)
    out = launch(server, "image_train", tmp_path, **{**words, "preview_samples": 4})
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"Logging to runs/{folder.name}" in out and "10 images of 3 classes" in out and "2 ranks of 4 images" in out
    files = {path.name for path in folder.iterdir()}
    assert {"config.json", "log.txt", "log-rank001.txt", "preview_000004_model.png", "ema_0.9_000004.pt"} <= files

    weights = folder / "ema_0.9_000004.pt"
    drawing = dict(model_path=weights, classes="c:3,a:2", timestep_respacing=1, save_images=True)
    out = launch(server, "image_sample", tmp_path, **drawing)
    assert "classes: 0 a, 2 c" in out
    (folder,) = set((tmp_path / "runs").iterdir()) - {folder}
    names = [path.name for path in sorted((folder / "images").iterdir())]
    assert names == ["a_000003.png", "a_000004.png", "c_000000.png", "c_000001.png", "c_000002.png"]
