"""What image_nll.py, plot_nll.py and plan_timesteps.py report, write and draw."""

import importlib.util
import json
import re
import sys

import numpy as np
import pytest
import torch as th
from harness import TINY, flags, load_script, run_script, save_weights, shows, write_images
from PIL import Image

from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.inference.generate import SampleNoise
from improved_diffusion.options import LikelihoodOptions
from improved_diffusion.respace import space_timesteps
from improved_diffusion.script_util import create_model_and_diffusion, model_and_diffusion_defaults

MODEL = dict(TINY, image_size=8, channel_mult="1", learn_sigma=True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), count=10, classes=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_weights(tmp_path_factory.mktemp("weights") / "model.pt", learn_sigma=True, channel_mult="1", fill=0.02)


def measure(folder, images, weights, script="image_nll", **changed):
    """:return: the arrays of the files, {name: {key: array}}."""
    words = dict(MODEL, data_dir=images, model_path=weights, batch_size=4, num_workers=0, seed=4)
    assert run_script(script, flags(**{**words, **changed}), folder) == 0
    return {path.stem: dict(np.load(path)) for path in folder.glob("*.npz")}


def report(folder):
    return json.loads((folder / "nll.json").read_text())


# ---------------------------------------------------------------- image_nll


@pytest.mark.parametrize("changed", [dict(), dict(estimate=8)], ids=["chain", "estimate"])
def test_the_bound_and_its_parts(tmp_path, images, weights, changed):
    arrays = measure(tmp_path, images, weights, **changed)
    found, text = report(tmp_path), (tmp_path / "log.txt").read_text()
    if changed:
        assert arrays.keys() == {"estimate"}
        vb, p, timesteps = (arrays["estimate"][key] for key in ("vb", "p", "timesteps"))
        assert timesteps.tolist() == list(range(24)) and p.sum() == pytest.approx(1)
        assert 0 < found["standard_error_of_estimate"] < found["bpd"]
    else:
        assert arrays.keys() == {"vb_terms", "mse_terms", "xstart_mse_terms"}
        vb = arrays["vb_terms"]["arr_0"]
        assert "standard_error_of_estimate" not in found
    assert f"evaluating 10 images, the network {changed.get('estimate', 24)} times each" in text
    assert (found["images"], found["t0"], vb.shape) == (10, vb[-1], (24,))
    assert vb.sum() + found["prior"] == pytest.approx(found["bpd"])
    assert f"total bpd over 10 images: {found['bpd']:.4f}" in text
    for part in (found["standard_error"], found["t0"]):
        assert f" {part:.4f}" in text
    assert f"{found['t0'] / found['bpd']:.1%}" in text
    if importlib.util.find_spec("matplotlib"):
        with Image.open(tmp_path / "nll.png") as picture:
            assert picture.format == "PNG"


@pytest.mark.parametrize(
    ("changed", "steps", "parts"),
    [
        (dict(), 4000, ["1,000 images", "4,000 times", "--estimate 100 "]),
        (dict(num_samples=3), 250, ["3 images", "250 times"]),
        (dict(estimate=200), 4000, ["1,000 images", "200 times"]),
    ],
)
def test_a_costly_evaluation_names_the_estimate(changed, steps, parts):
    text = load_script("image_nll").describe(LikelihoodOptions(**changed), 5000, steps)
    assert all(part in text for part in parts) and ("--estimate" in text) == (not changed)


def test_the_standard_error_is_that_of_the_mean(tmp_path, images, weights):
    """By hand, image by image; one image has none."""
    model, diffusion = create_model_and_diffusion(**{**model_and_diffusion_defaults(), **MODEL})
    model.load_state_dict(th.load(weights, weights_only=True))
    data = load_data_once(data_dir=str(images), batch_size=1, image_size=8, num_workers=0)
    bpd = [diffusion.calc_bpd_loop(model.eval(), x, noise_fn=SampleNoise(4, [i])) for i, (x, _) in enumerate(data)]
    error = th.cat([out["total_bpd"] for out in bpd]).double().std().item() / 10**0.5
    for count, want in ((1, None), (10, pytest.approx(error, rel=1e-3))):
        measure(tmp_path / f"{count}", images, weights, num_samples=count)
        assert report(tmp_path / f"{count}")["standard_error"] == want


def test_without_matplotlib_there_is_no_plot(tmp_path, monkeypatch, images, weights):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "vb_terms" in measure(tmp_path, images, weights, timestep_respacing="nll2")
    assert not (tmp_path / "nll.png").exists()
    assert re.search(r"no nll\.png.*matplotlib", (tmp_path / "log.txt").read_text())


# ---------------------------------------------------------------- plan_timesteps


@pytest.mark.parametrize("respacing", ["", "nll6"])
def test_chosen_timesteps_have_the_bound_that_was_promised(tmp_path, images, weights, respacing):
    """They are a value of image_nll.py's --timestep_respacing, of the process that they are chosen from."""
    measure(tmp_path / "plan", images, weights, "plan_timesteps", steps="1,5", timestep_respacing=respacing)
    out = (tmp_path / "plan" / "log.txt").read_text()
    lines = re.findall(r"(\d+) timesteps: even ([\d.]+), chosen ([\d.]+) .*\n--timestep_respacing at:(\S+)", out)
    assert [int(count) for count, *_ in lines] == [1, 5]
    assert "samples look worse" in out
    for count, even, promised, value in lines:
        steps = [int(t) for t in value.split(",")]
        assert len(steps) == int(count) and set(steps) <= space_timesteps(24, respacing or [24])
        assert float(promised) <= float(even) + 1e-4
        measure(tmp_path / count, images, weights, timestep_respacing=f"at:{value}")
        assert report(tmp_path / count)["bpd"] == pytest.approx(float(promised), rel=0.05)  # of other noise


# ---------------------------------------------------------------- plot_nll


def terms(folder, values, name="vb_terms.npz", **arrays):
    """Write the file of an evaluation. :return: the folder, as text."""
    folder.mkdir()
    np.savez(folder / name, *([] if arrays else [np.asarray(values)]), **arrays)
    return str(folder)


def plot(*words):
    return run_script("plot_nll", list(words), "unused")


def test_each_evaluation_has_a_colour(tmp_path, capfd):
    pytest.importorskip("matplotlib")
    runs = [terms(tmp_path / name, 1 / np.arange(n, 0, -1.0)) for name, n in [("a", 1000), ("_b$", 4000), ("c", 1)]]
    estimated = np.where(np.arange(1000) % 3, 0, 0.2)
    runs.append(terms(tmp_path / "d", None, "estimate.npz", vb=estimated, p=estimated))
    assert plot(*runs) == 0
    assert capfd.readouterr() == (f"{runs[0]}/nll.png\n", "")
    for colour in [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)]:
        assert shows(f"{runs[0]}/nll.png", colour, 20)
    assert plot(runs[3], "--out", str(tmp_path / "d.png")) == 0
    assert (tmp_path / "d.png").exists() and not (tmp_path / "d" / "nll.png").exists()


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        (None, ["a: has no vb_terms.npz or estimate.npz"]),
        ([1.0, np.nan], ["a/vb_terms.npz", "finite"]),
        ([], ["a/vb_terms.npz", "finite"]),
        ([[1.0]], ["a/vb_terms.npz", "finite"]),
        ([1, 2], ["a/vb_terms.npz", "finite"]),
        (b"no archive", ["a/vb_terms.npz"]),
        (dict(other=np.ones(3)), ["a/vb_terms.npz", "arr_0"]),
    ],
    ids=str,
)
def test_what_cannot_be_plotted_ends_in_one_line(tmp_path, capfd, values, parts):
    folder = tmp_path / "a"
    if isinstance(values, dict):
        terms(folder, None, **values)
    elif isinstance(values, list):
        terms(folder, values)
    else:
        folder.mkdir()
    if isinstance(values, bytes):
        (folder / "vb_terms.npz").write_bytes(values)
    assert plot(str(folder)) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1) and err.startswith("plot_nll.py: error: ")
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("out", ["a.pdf", "nowhere/a.png"])
def test_names_that_a_plot_cannot_have(tmp_path, capfd, monkeypatch, out):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert plot(terms(tmp_path / "a", [1.0, 2.0]), "--out", out) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"--out {out}" in err
