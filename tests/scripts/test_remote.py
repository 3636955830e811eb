"""Blobfile URLs, on a double of a remote file system, wherever a path goes in or a checkpoint goes out."""

import os

import blobfile as bf
import numpy as np
import pytest
from harness import TINY, flags, run_script, snapshot, write_images
from training import assert_same, load

BUCKET = "gs://bucket"
TRAINING = {**TINY, "batch_size": 3, "save_interval": 2, "log_interval": 1, "ema_rate": "0.9", "seed": 0}
SAMPLING = {**TINY, "num_samples": 3, "batch_size": 3, "timestep_respacing": "4"}


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder whose files blobfile finds below gs://bucket. A file there is whole or absent, as in a store."""
    folder = tmp_path / "bucket"
    folder.mkdir()

    def local(path):
        assert path == BUCKET or path.startswith(BUCKET + "/"), f"{path} is not a URL any more"
        return str(folder) + path.removeprefix(BUCKET)

    def double(function):
        def called(path, *args, **kwargs):
            return function(local(path) if "://" in path else path, *args, **kwargs)

        return called

    def open_file(path, mode):
        if "w" in mode:
            os.makedirs(os.path.dirname(path), exist_ok=True)  # a store has no folders
        return open(path, mode)

    for name in ("exists", "isdir", "remove"):
        monkeypatch.setattr(bf, name, double(getattr(bf, name)))
    monkeypatch.setattr(bf, "listdir", double(os.listdir))
    monkeypatch.setattr(bf, "BlobFile", double(open_file))
    return folder


def train(logdir, size="image_size", script="image_train", folder="run", **changed):
    words = flags(**{**TRAINING, size: 8, "data_dir": f"{BUCKET}/images", **changed})
    return run_script(script, words, logdir, DIFFUSION_BLOB_LOGDIR=f"{BUCKET}/{folder}")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("workers", [0, 1])
def test_training_and_resuming(tmp_path, bucket, workers):
    """Images from there, checkpoints to there, and nothing of a checkpoint elsewhere."""
    write_images(bucket / "images")
    assert train(tmp_path / "whole", max_steps=6, num_workers=workers) == 0
    whole = {name: load(bucket / "run" / name) for name in names(bucket / "run") if name.endswith(".pt")}
    others = set(names(bucket / "run")) - whole.keys()
    assert len(whole) == 4 * 4 and others == {
        "config.json",
        *(f"preview_{step:06d}_model.png" for step in (2, 4, 6)),
    }
    assert names(tmp_path / "whole") == ["log.txt", "progress.csv"]

    for name in whole:
        os.remove(bucket / "run" / name)
    assert train(tmp_path / "parts", max_steps=4, num_workers=workers) == 0
    checkpoint = f"{BUCKET}/run/model000002.pt"
    assert train(tmp_path / "parts", max_steps=6, resume_checkpoint=checkpoint, num_workers=workers) == 0
    for name in whole:
        if not name.startswith("state"):  # which has the flags
            assert_same(load(bucket / "run" / name), whole[name], name)


def test_auto_and_old_checkpoints(tmp_path, bucket):
    write_images(bucket / "images")
    again = dict(resume_checkpoint="auto", keep_checkpoints=2, num_workers=0)
    assert train(tmp_path / "log", max_steps=4, **again) == 0
    assert [name for name in names(bucket / "run") if name.startswith("model")] == ["model000002.pt", "model000004.pt"]
    damaged = bucket / "run" / "opt000004.pt"
    damaged.write_bytes(damaged.read_bytes()[:-9])
    assert train(tmp_path / "log", max_steps=6, **again) == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert f"the checkpoint of step 4 is left out: {BUCKET}/run/opt000004.pt: not a checkpoint" in log
    assert f"loading model from checkpoint: {BUCKET}/run/model000002.pt..." in log
    assert [name for name in names(bucket / "run") if name.startswith("model")] == ["model000004.pt", "model000006.pt"]


def test_a_store_that_takes_nothing(tmp_path, bucket, monkeypatch, capsys):
    write_images(bucket / "images")
    open_file = bf.BlobFile

    def refuse(path, mode):
        if "w" in mode and "opt" in path:
            raise bf.Error("no quota")
        return open_file(path, mode)

    monkeypatch.setattr(bf, "BlobFile", refuse)
    assert train(tmp_path / "log", max_steps=4, num_workers=0) == 2
    error = f"image_train.py: error: {BUCKET}/run/opt000000.pt: cannot be written (no quota)\n"
    assert capsys.readouterr().err == error
    assert "state000000.pt" not in names(bucket / "run")


def test_sampling_measuring_and_enlarging(tmp_path, bucket):
    write_images(bucket / "images")
    assert train(tmp_path / "log", max_steps=1, num_workers=0) == 0
    before = snapshot(bucket)
    weights = dict(SAMPLING, model_path=f"{BUCKET}/run/ema_0.9_000000.pt", image_size=8)
    assert run_script("image_sample", flags(**weights), tmp_path / "samples") == 0
    images = f"{BUCKET}/images"
    assert run_script("image_nll", flags(**weights, data_dir=images, num_workers=0), tmp_path / "nll") == 0
    assert np.isfinite(np.load(tmp_path / "nll" / "vb_terms.npz")["arr_0"]).all()
    assert snapshot(bucket) == before

    (tmp_path / "samples" / "samples_3x8x8x3.npz").rename(bucket / "base.npz")
    enlarging = dict(large_size=16, small_size=8)
    words = dict(enlarging, max_steps=1, num_workers=0)
    assert train(tmp_path / "sr", "large_size", "super_res_train", "large", **words) == 0
    weights = f"{BUCKET}/large/model000000.pt"
    words = flags(**SAMPLING, **enlarging, model_path=weights, base_samples=f"{BUCKET}/base.npz")
    assert run_script("super_res_sample", words, tmp_path / "large") == 0
    assert np.load(tmp_path / "large" / "samples_3x16x16x3.npz")["arr_0"].std() > 0


def test_a_remote_folder_is_of_one_run_and_never_overwritten(tmp_path, bucket, capsys):
    write_images(bucket / "images")
    assert train(tmp_path / "a", max_steps=1, num_workers=0) == 0
    before = snapshot(bucket)
    for overwrite in (False, True):
        capsys.readouterr()
        assert train(tmp_path / "b", max_steps=1, num_workers=0, overwrite=overwrite) == 2
        err = capsys.readouterr().err
        assert f"{BUCKET}/run: " in err and "--resume_checkpoint auto" in err and "--overwrite" not in err
        assert err.count("\n") == 1 and snapshot(bucket) == before


def test_a_remote_folder_is_packed_into_a_local_one(tmp_path, bucket, capfd):
    write_images(bucket / "images")
    write_images(bucket / "images" / "more", count=2)
    packed = str(tmp_path / "a.packed")
    words = ["images", f"{BUCKET}/images", packed, *flags(image_size=8, num_workers=0)]
    assert run_script("prepare", words, tmp_path) == 0
    for name, folder in ((packed, tmp_path / "of packed"), (f"{BUCKET}/images", tmp_path / "of folder")):
        assert train(folder, data_dir=name, max_steps=2, num_workers=0) == 0
        (bucket / "run").rename(folder / "checkpoints")
    for name in ("model000002.pt", "opt000002.pt"):
        ours, theirs = (load(tmp_path / which / "checkpoints" / name) for which in ("of packed", "of folder"))
        assert_same(ours, theirs, name)

    (tmp_path / "a.packed").rename(bucket / "a.packed")
    capfd.readouterr()
    assert train(tmp_path / "log", data_dir=f"{BUCKET}/a.packed", num_workers=0) == 2
    assert f"{BUCKET}/a.packed: packed images" in capfd.readouterr().err
