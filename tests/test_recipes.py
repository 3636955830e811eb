"""docs/recipes.md: its commands run on stand-ins, and its costs are those of its commands."""

import os
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from harness import ROOT, TINY, load_script, run_script, save_weights
from PIL import Image

from improved_diffusion.cli.estimate import estimate_memory, forward_flops, on_meta
from improved_diffusion.cli.parser import parse_flags
from improved_diffusion.options import TrainOptions
from improved_diffusion.script_util import create_model_and_diffusion

TEXT = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
CALLS = [
    (script, shlex.split(rest))
    for script, rest in re.findall(r"^python scripts/(\w+)\.py (.*)", TEXT.replace("\\\n", " "), flags=re.MULTILINE)
]
TRAINED = [words for script, words in CALLS if script == "image_train"]
SMALL = dict(TINY, image_size=8, batch_size=4, save_interval=2, max_steps=4, log_interval=1, preview_samples=2)


def photographs(folder, count):
    """JPEG files of different sizes: a sky, a hill and a sun."""
    folder.mkdir()
    rng = np.random.default_rng(count)
    for i in range(count):
        w, h = rng.integers(24, 60, 2)
        x, y = np.meshgrid(np.linspace(0, 1, w), np.linspace(0, 1, h))
        pixels = np.stack([120 + 60 * y, 150 + 40 * y, 230 - 60 * y], axis=-1)
        pixels[y > 0.6 + 0.2 * np.sin(6 * x + rng.uniform(0, 6))] = rng.uniform(20, 120, 3)
        pixels[(x - rng.uniform()) ** 2 + (y - 0.3) ** 2 < 0.02] = (250, 220, 120)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"img{i:03d}.jpg")


def small(script, words):
    """The words of a command with the stand-in's flags: a tiny network of 8x8 images, few steps and samples."""
    words = [re.sub(r"_0\d{5}\.pt$", "_000004.pt", word) for word in words]
    if script == "prepare":
        return [word if not word.isdecimal() else "8" for word in words]
    flags = dict(zip(words[::2], words[1::2], strict=True))
    if script == "image_train":
        flags.pop("--preset", None)
        changed = {**SMALL, "num_workers": 0}
    else:
        changed = dict(num_samples=4, batch_size=2)
        changed |= {name: 5 for name in ("timestep_respacing", "sampling_steps") if f"--{name}" in flags}
    flags.update({f"--{name}": str(value) for name, value in {**changed, "use_bf16": False}.items()})
    return [word for pair in flags.items() for word in pair]


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "photos", 24)
    photographs(tmp_path / "held_out", 4)
    for weights in re.findall(r"--resume_checkpoint (\S+\.pt)", TEXT):
        save_weights(tmp_path / weights)
    for script, words in CALLS:
        words = small(script, words)
        if script == "plot_progress":
            words = words[:1]
            pytest.importorskip("matplotlib")
        assert run_script(script, words, tmp_path / "unused") == 0, words
    assert len(list((tmp_path / "runs" / "photos64-fid" / "images").iterdir())) == 4
    for words in TRAINED:
        folder = tmp_path / words[words.index("--log_dir") + 1]
        assert (folder / "ema_0.999_000004.pt").exists()
        assert "valid_bpd" in (folder / "progress.csv").read_text().splitlines()[0]


def test_the_costs_are_those_of_the_commands(monkeypatch):
    row = r"^\| `(\S+)` \| (\d+)M \| ([\d.]+) \| ([\d.]+) GiB \| ([\d,]+) of (\d+) \| ([\d.]+) \|$"
    found = {
        name: [float(n.replace(",", "")) for n in numbers] for name, *numbers in re.findall(row, TEXT, re.MULTILINE)
    }
    assert len(found) == len(TRAINED) == 4
    for words in TRAINED:
        monkeypatch.setattr(sys, "argv", ["image_train.py", *words])
        options = parse_flags(load_script("image_train").create_argparser(), TrainOptions()).options
        model, _ = on_meta(options, create_model_and_diffusion)
        parameters, flops = sum(p.numel() for p in model.parameters()), forward_flops(model, options)
        steps, batch_size = options.training.max_steps, options.training.batch_size
        hours = steps * batch_size * 3 * flops / 20e12 / 3600
        want = [parameters / 1e6, flops / 1e9, sum(estimate_memory(model, options)) / 2**30, steps, batch_size, hours]
        assert found[options.general.log_dir] == pytest.approx(want, rel=0.03), options.general.log_dir


@pytest.mark.parametrize(("finished", "status"), [(False, 0), (True, 0), (False, 1)])
def test_the_slurm_script_requeues_an_unfinished_run(tmp_path, finished, status):
    (script,) = re.findall(r"^```bash\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)
    for name, line in (("srun", f"exit {status}"), ("scontrol", 'echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    if finished:
        (tmp_path / "runs" / "cluster").mkdir(parents=True)
        (tmp_path / "runs" / "cluster" / "model030000.pt").touch()
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=env)
    assert (tmp_path / "requeued").exists() == (status == 0 and not finished)
    if not finished and not status:
        assert (tmp_path / "requeued").read_text() == "requeue 7\n"


def test_the_slurm_script_trains_as_the_recipe_does():
    """Four ranks share its batch."""
    (words,) = re.findall(r"^srun .*scripts/image_train\.py (.*)", TEXT.replace("\\\n", " "), flags=re.MULTILINE)
    cluster, alone = (dict(zip(w[::2], w[1::2], strict=True)) for w in (shlex.split(words), TRAINED[0]))
    assert int(cluster.pop("--batch_size")) * 4 == int(alone.pop("--batch_size"))
    assert {**cluster, "--log_dir": ""} == {**alone, "--log_dir": ""}
