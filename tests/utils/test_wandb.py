"""Weights & Biases as an output of the logger, by a module that stands in for wandb, and offline by wandb itself."""

import csv
import sys
import types

import numpy as np
import pytest
import torch as th
from harness import TRAIN, flags, run_script, write_images

from improved_diffusion import logger
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.log_formats import WandbOutputFormat, make_output_format


class Run:
    def __init__(self, **arguments):
        self.arguments, self.rows, self.finished, self.options = arguments, [], False, {}
        self.config = types.SimpleNamespace(update=lambda values, allow_val_change: self.options.update(values))

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished = True


@pytest.fixture
def runs(monkeypatch):
    """The runs that wandb.init() has made, in order."""
    made = []
    monkeypatch.setattr(logger.Logger, "CURRENT", logger.Logger.CURRENT)  # else the next test logs to a closed one
    module = types.ModuleType("wandb")
    module.Error, module.Image = type("Error", (Exception,), {}), lambda pixels: ("image", pixels.shape)
    module.init = lambda **arguments: made.append(Run(**arguments)) or made[-1]
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_PROJECT", "WANDB_NAME"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_rows_pictures_and_options(runs, tmp_path):
    out = make_output_format("wandb", str(tmp_path / "a"))
    out.writekvs({"loss": th.tensor(0.25), "text": "left out", "step": 100})
    out.writekvs({"loss": 0.125})
    out.writeimage("preview", np.zeros((4, 5, 1), np.uint8), 7)
    out.writeconfig({"lr": 0.5, "seed": None})
    out.drop_from("step", 50)
    out.close()
    (run,) = runs
    assert run.rows == [
        {"loss": 0.25, "step": 100},
        {"loss": 0.125, "step": 101},
        {"preview": ("image", (4, 5, 1)), "step": 7},
    ]
    assert run.options == {"lr": 0.5, "seed": None} and run.finished
    assert (run.arguments["name"], run.arguments["dir"]) == ("a", str(tmp_path / "a"))


def test_a_folder_and_a_rank_have_one_run(runs, tmp_path, monkeypatch):
    for folder, suffix in (("a", ""), ("a", ""), ("a", "-rank001"), ("b", "")):
        make_output_format("wandb", str(tmp_path / folder), suffix)
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    make_output_format("wandb", str(tmp_path / "b"))
    ids = [run.arguments["id"] for run in runs]
    assert ids[0] == ids[1] and ids[3] == ids[4] and len(set(ids)) == 3
    assert all(run.arguments["resume"] == "allow" for run in runs)
    assert [run.arguments["project"] for run in runs[3:]] == ["improved-diffusion", "mine"]


def test_what_fails_is_one_line(runs, tmp_path, monkeypatch):
    def no_key(**arguments):
        raise sys.modules["wandb"].Error("no API key\nand more")

    (tmp_path / "wandb-id.txt").write_text("a b/")
    with pytest.raises(InputError, match=r"wandb-id\.txt"):
        make_output_format("wandb", str(tmp_path))
    monkeypatch.setattr(sys.modules["wandb"], "init", no_key)
    with pytest.raises(InputError) as refusal:
        make_output_format("wandb", str(tmp_path / "b"))
    assert "wandb: no API key" in str(refusal.value) and "\n" not in str(refusal.value)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"wandb .*pip install '\.\[wandb\]'"):
        logger.configure(tmp_path, ["wandb"])


class Down(Run):
    """A service that is down from some call on."""

    error = ConnectionError("network is down\nand more")

    def log(self, row):
        if len(self.rows) == 2:
            raise self.error
        super().log(row)


@pytest.mark.parametrize("error", [ConnectionError("network is down\nand more"), RuntimeError("network is down")])
def test_a_service_that_fails_later_does_not_end_a_run(runs, tmp_path, monkeypatch, error):
    monkeypatch.setattr(Down, "error", error)
    made = []
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **arguments: made.append(Down(**arguments)) or made[-1])
    words = flags(**TRAIN, data_dir=write_images(tmp_path / "images"))
    assert run_script("image_train", words, tmp_path / "run", OPENAI_LOG_FORMAT="log,csv,wandb") == 0
    assert (tmp_path / "run" / "model000004.pt").exists() and len(made[0].rows) == 2
    (line,) = [line for line in (tmp_path / "run" / "log.txt").read_text().splitlines() if "network is down" in line]
    assert "wandb" in line and "dropped" in line


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("log", lambda log: log.writeimage("preview", np.zeros((4, 5, 1), np.uint8), 7)),
        ("finish", lambda log: log.close()),
    ],
)
def test_each_write_may_fail(runs, tmp_path, monkeypatch, name, call):
    def fails(*args):
        raise sys.modules["wandb"].Error("network is down")

    logger.configure(str(tmp_path), ["log", "wandb"])
    log = logger.get_current()
    monkeypatch.setattr(runs[0], name, fails)
    call(log)
    assert [type(fmt).__name__ for fmt in log.output_formats] == ["HumanOutputFormat"]
    assert "network is down" in (tmp_path / "log.txt").read_text()
    log.close()


def test_options_may_fail(runs, tmp_path):
    logger.configure(str(tmp_path), ["log", "wandb"])
    runs[0].config = None
    logger.get_current().writeconfig({"lr": 1})
    assert len(logger.get_current().output_formats) == 1
    logger.get_current().close()


def test_a_run_without_wandb_moves_no_files(runs, tmp_path, monkeypatch, capfd):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model000004.pt").touch()
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = flags(**TRAIN, data_dir=write_images(tmp_path / "images"), overwrite=True)
    assert run_script("image_train", words, tmp_path / "run", OPENAI_LOG_FORMAT="csv,wandb") == 2
    assert "pip install" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["model000004.pt"]


def test_a_run_of_image_train_is_one_run(runs, tmp_path):
    images, folder = write_images(tmp_path / "images"), tmp_path / "run"
    words = {**TRAIN, "data_dir": images, "preview_samples": 2, "resume_checkpoint": "auto"}
    for max_steps in (2, 4):
        formats = {"OPENAI_LOG_FORMAT": "csv,wandb"}
        assert run_script("image_train", flags(**{**words, "max_steps": max_steps}), folder, **formats) == 0
    first, second = runs
    assert first.arguments["id"] == second.arguments["id"] and first.finished and second.finished
    assert second.options["max_steps"] == 4 and second.options["num_channels"] == 32
    with open(folder / "progress.csv") as f:
        losses = {int(row["step"]): float(row["loss"]) for row in csv.DictReader(f)}
    rows = [row for run in runs for row in run.rows]
    assert {row["step"]: row["loss"] for row in rows if "loss" in row} == losses
    assert {row["step"] for row in rows if "preview" in row} == {2, 4}
    assert (
        run_script("image_train", flags(**{**words, "resume_checkpoint": ""}, overwrite=True), folder, **formats) == 0
    )
    assert runs[2].arguments["id"] != first.arguments["id"]
    assert (folder / "earlier-1" / "wandb-id.txt").read_text() == first.arguments["id"]


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (5, 3):  # the second continues before the first's end
        out = WandbOutputFormat(str(tmp_path / "wandb-id.txt"))
        out.writekvs({"loss": 0.5, "step": step})
        out.writeimage("preview", np.zeros((8, 8, 3), np.uint8), step)
        out.writeconfig({"lr": step})
        out.close()
    name = (tmp_path / "wandb-id.txt").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files and all(path.stat().st_size for path in files)
