"""--config: a new run with the flags of another."""

import json
import os
import sys

import pytest

from improved_diffusion.cli.parser import create_parser, parse_flags
from improved_diffusion.cli.run_config import resumed, save_config
from improved_diffusion.options import SuperResTrainOptions, TrainOptions


def parse(monkeypatch, *words, options=None):
    monkeypatch.setattr(sys, "argv", ["here/image_train.py", *map(str, words)])
    options = options or TrainOptions()
    return parse_flags(create_parser(options, "something"), options)


def refused(monkeypatch, capfd, *words, options=None):
    with pytest.raises(SystemExit) as left:
        parse(monkeypatch, *words, options=options)
    err = capfd.readouterr().err
    assert left.value.code == 2 and err.count("\n") == 1
    return err


@pytest.fixture
def other(tmp_path):
    """The folder of another run; every flag differs from its default."""
    options = TrainOptions().replace(
        data_dir="photos", image_size=32, lr=2e-4, batch_size=8, microbatch=4, learn_sigma=True, seed=3, max_steps=9
    )
    options = options.replace(resume_checkpoint="runs/x/model000001.pt", log_dir="runs/other", overwrite=True)
    save_config(str(tmp_path), "image_train", options, ["cat", "dog"])
    return tmp_path / "config.json", options


def test_a_new_run_takes_all_flags_but_those_of_the_other_run_itself(monkeypatch, other):
    path, options = other
    flags = parse(monkeypatch, "--config", path)
    kept = dict(resume_checkpoint="", log_dir="", overwrite=False, config=str(path))
    assert flags.options == options.replace(**kept)
    run = resumed(flags)
    assert run.options == flags.options and run.class_names is None  # its images have their own classes
    assert str(path) in run.notes[0]


def test_a_word_beside_numbers_is_taken(monkeypatch, tmp_path):
    save_config(str(tmp_path), "image_train", TrainOptions().replace(data_dir="photos", microbatch="auto"), None)
    assert parse(monkeypatch, "--config", tmp_path / "config.json").options.training.microbatch == "auto"


def test_flags_that_are_given_take_precedence_even_with_the_default(monkeypatch, other):
    path, _ = other
    words = ["--image_size", 64, "--lr=1e-4", "--learn_sigma", "False", "--log_dir", "runs/b"]
    values = parse(monkeypatch, *words, "--config", path).options.values()
    got = [values[name] for name in ("image_size", "lr", "learn_sigma", "log_dir", "batch_size")]
    assert got == [64, 1e-4, False, "runs/b", 8]
    preset = parse(monkeypatch, "--config", path, "--preset", "cifar10", "--microbatch", 64).options.values()
    assert [preset[name] for name in ("dropout", "batch_size", "data_dir")] == [0.3, 128, "photos"]


def test_values_are_validated_together(monkeypatch, capfd, other):
    assert "microbatch 4: give 1 to batch_size (2)" in refused(
        monkeypatch, capfd, "--config", other[0], "--batch_size", 2
    )


def test_a_file_of_an_earlier_version_has_fewer_flags(monkeypatch, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"script": "image_train", "flags": {"data_dir": "x", "lr": 1}, "class_names": None}))
    values = parse(monkeypatch, "--config", path).options.values()
    assert values == {**TrainOptions().values(), "data_dir": "x", "lr": 1.0, "config": str(path)}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (None, "config.json"),
        ("{", "config.json"),
        ('{"flags": 1, "class_names": null}', "config.json"),
        ('{"flags": {"lr": "1"}, "class_names": null}', "lr '1':"),
        ('{"flags": {"lr": 0}, "class_names": null}', "lr 0"),
        ('{"flags": {"batch_size": true}, "class_names": null}', "batch_size True:"),
        ('{"flags": {"batch_size": null}, "class_names": null}', "batch_size None:"),
        ('{"flags": {"noise_schedule": "x"}, "class_names": null}', "noise_schedule x"),
        ('{"flags": {"microbatch": "many"}, "class_names": null}', "microbatch 'many':"),
        ('{"flags": {"microbatch": ["auto"]}, "class_names": null}', "microbatch ['auto']:"),
        ('{"flags": {"guidance": 2}, "class_names": null}', "guidance"),
    ],
)
def test_other_files_are_refused_in_one_line(monkeypatch, capfd, tmp_path, text, part):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    err = refused(monkeypatch, capfd, "--config", path, "--data_dir", "x")
    assert f"--config {path}: " in err and part in err
    assert "--config" in refused(monkeypatch, capfd, "--config", tmp_path / "none", "--data_dir", "x")


def test_a_run_of_the_other_training_script_is_refused(monkeypatch, capfd, other):
    assert "image_size" in refused(monkeypatch, capfd, "--config", other[0], options=SuperResTrainOptions())


def test_the_folder_of_a_run_is_as_good(monkeypatch, other):
    path, folder = other[0], os.path.dirname(other[0])
    assert (
        parse(monkeypatch, "--config", folder).options.training == parse(monkeypatch, "--config", path).options.training
    )


def test_a_resumed_run_keeps_its_own_flags(monkeypatch, other, tmp_path):
    folder = tmp_path / "own"
    save_config(str(folder), "image_train", TrainOptions().replace(image_size=16), None)
    for name in ("model000004.pt", "opt000004.pt"):
        (folder / name).touch()
    words = ["--config", other[0], "--resume_checkpoint", "auto", "--log_dir", folder]
    values = resumed(parse(monkeypatch, *words)).options.values()
    assert (values["image_size"], values["lr"]) == (16, 2e-4)
