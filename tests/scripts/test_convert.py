"""convert.py: safetensors with their config and back, and guided-diffusion's networks, by recorded answers."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import (
    ROOT,
    TINY,
    TRAIN,
    build,
    build_sr,
    flags,
    load_script,
    run_script,
    save_weights,
    snapshot,
    train_with_class_dropout,
)
from parity_cases import fill_parameters, tensor
from training import assert_same, load

from improved_diffusion.cli.config_file import config_of
from improved_diffusion.cli.interchange import from_guided, guided_defaults, in_order, options_of, to_guided
from improved_diffusion.script_util import create_model_and_diffusion, sr_create_model_and_diffusion
from improved_diffusion.utils import safe_tensors
from improved_diffusion.utils.errors import InputError

pytest.importorskip("safetensors")

with np.load(ROOT / "tests" / "recorded" / "guided_diffusion.npz") as f:
    GUIDED = dict(f)  # recorded from guided-diffusion itself, on weights of fill_parameters()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """:return: (the folder of a run, its images)."""
    return train_with_class_dropout(tmp_path_factory.mktemp("run"))


def convert(*words):
    return run_script("convert", list(map(str, words)), "unused")


def refused(capfd, named, *words):
    capfd.readouterr()
    assert convert(*words) == 2
    err = capfd.readouterr().err
    assert named in err and len(err.strip().splitlines()) == 1, err


# ---------------------------------------------------------------- safetensors


def test_there_and_back(run, tmp_path):
    there, back = tmp_path / "a.safetensors", tmp_path / "b" / "ema_0.9_000004.pt"
    assert convert(run[0] / back.name, there) == 0 and convert(there, back) == 0
    assert_same(load(back), load(run[0] / back.name))  # the order too
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == json.loads((run[0] / "config.json").read_text())


def test_samples_are_those_of_the_run(run, tmp_path):
    path = run[0] / "ema_0.9_000004.pt"
    assert convert(path, tmp_path / "a.safetensors") == 0
    images = []
    for weights in (path, tmp_path / "a.safetensors"):
        folder = tmp_path / weights.suffix[1:]
        sampling = dict(num_samples=3, seed=0, sampler="unipc", sampling_steps=3, guidance_scale=2, classes="b")
        assert run_script("image_sample", flags(model_path=weights, **sampling), folder) == 0
        images.append(np.load(next(folder.glob("*.npz")))["arr_0"])
        assert "classes: 1 b" in (folder / "log.txt").read_text()
    assert np.array_equal(*images)


def test_the_config_inside_comes_before_that_of_the_folder(run, tmp_path):
    """Which may be of another run: the same shapes, but another prediction."""
    path = tmp_path / "a.safetensors"
    assert convert(run[0] / "ema_0.9_000004.pt", path) == 0
    inside = json.loads((run[0] / "config.json").read_text())
    other = {**inside, "flags": {**inside["flags"], "predict_v": True}}
    (tmp_path / "config.json").write_text(json.dumps(other))
    assert config_of(str(path)) == (inside, str(path))
    (tmp_path / "plain.safetensors").write_bytes(safe_tensors.encode("", load(run[0] / "ema_0.9_000004.pt"), {}))
    assert config_of(str(tmp_path / "plain.safetensors")) == (other, str(tmp_path / "config.json"))
    sampling = dict(num_samples=2, seed=0, sampler="unipc", sampling_steps=2)
    images = {}
    for weights in (run[0] / "ema_0.9_000004.pt", path, tmp_path / "plain.safetensors"):
        assert run_script("image_sample", flags(model_path=weights, **sampling), tmp_path / weights.name[:4]) == 0
        images[weights.name] = np.load(next((tmp_path / weights.name[:4]).glob("*.npz")))["arr_0"]
    assert np.array_equal(images["ema_0.9_000004.pt"], images["a.safetensors"])
    assert not np.array_equal(images["a.safetensors"], images["plain.safetensors"])


def test_a_run_begins_from_them(run, tmp_path):
    assert convert(run[0] / "ema_0.9_000004.pt", tmp_path / "a.safetensors") == 0
    own = {name: value for name, value in TRAIN.items() if name not in TINY}
    words = flags(**{**own, "max_steps": 1}, data_dir=run[1], resume_checkpoint=tmp_path / "a.safetensors")
    assert run_script("image_train", words, tmp_path / "b") == 0
    assert load(tmp_path / "b" / "model000000.pt").keys() == load(run[0] / "model000000.pt").keys()


def test_the_commands_of_its_help_run(tmp_path, monkeypatch):
    """In the working directory: names without a folder."""
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python scripts/convert.py (.*)", load_script("convert").__doc__, flags=re.MULTILINE)
    own, (there, back, to_guided, from_guided) = dict(TINY, image_size=8), map(str.split, commands)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    save_weights(there[0])
    Path("runs/a/config.json").write_text(json.dumps({"flags": own, "class_names": None}))
    known = flags(**{name: value for name, value in own.items() if name in guided_defaults(super_res=False)})
    for words in (there, back, to_guided, [*from_guided[: from_guided.index("--") + 1], *known]):
        assert convert(*words) == 0
    for name in ("a.safetensors", back[1], "b.safetensors"):
        assert config_of(name)[0]["flags"]["image_size"] == 8
    assert_same(load(to_guided[1]), load(there[0]))


def test_without_a_config_file(tmp_path, capfd):
    weights = save_weights(tmp_path / "w.pt")
    assert convert(weights, tmp_path / "a.safetensors") == 0
    assert "config.json" in capfd.readouterr().out
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.pt") == 0
    assert not (tmp_path / "config.json").exists()
    assert_same(dict(sorted(load(tmp_path / "b.pt").items())), dict(sorted(load(weights).items())))
    refused(capfd, "config.json", weights, tmp_path / "g.pt", "--to", "guided-diffusion")


def test_nothing_is_overwritten(run, tmp_path, capfd):
    path = run[0] / "ema_0.9_000004.pt"
    assert convert(path, tmp_path / "a.safetensors") == 0
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text('{"flags": {}, "class_names": null}')
    before = snapshot(tmp_path)
    refused(capfd, "a.safetensors", path, tmp_path / "a.safetensors")
    refused(capfd, "config.json", path, other / "new.pt")
    refused(capfd, "new.ckpt", path, tmp_path / "new.ckpt")
    refused(capfd, "missing.pt", tmp_path / "missing.pt", tmp_path / "new.pt")
    assert snapshot(tmp_path) == before


def test_a_config_is_of_no_other_weights(run, tmp_path, capfd):
    """config.json applies to all weights of a folder."""
    path = run[0] / "ema_0.9_000004.pt"
    save_weights(tmp_path / "other.pt")
    refused(capfd, "other.pt", path, tmp_path / "new.pt")
    assert convert(path, tmp_path / "new.safetensors") == 0
    (tmp_path / "other.pt").unlink()
    assert convert(tmp_path / "new.safetensors", tmp_path / "new.pt") == 0  # the one beside it has its own
    (tmp_path / "a").mkdir()
    save_weights(tmp_path / "a" / "plain.pt")
    for out in ("plain.pt", "plain.safetensors"):
        refused(capfd, "config.json", tmp_path / "a" / "plain.pt", tmp_path / out)


@pytest.mark.parametrize("contents", [{}, {1: th.zeros(2)}])
def test_what_is_no_state_dict(tmp_path, capfd, contents):
    th.save(contents, tmp_path / "w.pt")
    refused(capfd, "w.pt: not the weights", tmp_path / "w.pt", tmp_path / "new.safetensors")


def test_a_config_that_does_not_fit_is_refused(run, tmp_path, capfd):
    config = json.loads((run[0] / "config.json").read_text())
    (tmp_path / "model.pt").write_bytes((run[0] / "model000004.pt").read_bytes())
    for name, value in (("num_channels", 64), ("attention_resolutions", "8"), ("num_heads", "two")):
        text = json.dumps({**config, "flags": {**config["flags"], name: value}})
        (tmp_path / "config.json").write_text(text)
        refused(capfd, str(tmp_path), tmp_path / "model.pt", tmp_path / "new.safetensors")


# ---------------------------------------------------------------- guided-diffusion


NETWORK = dict(image_size=8, num_channels=32, num_res_blocks=1, channel_mult="1,2", class_cond=True, num_classes=3)
NETWORK |= dict(learn_sigma=True)
ENLARGING = dict(large_size=64, small_size=16, num_channels=32, num_res_blocks=1, attention_resolutions="8")


def filled(**values):
    """Weights of a network, as they were when guided-diffusion's answers were recorded."""
    make = build_sr if "large_size" in values else build
    return fill_parameters(make(**values)[0]).state_dict()


def loaded(key, weights):
    """The network and diffusion that guided-diffusion's flags give, with weights."""
    options = options_of(from_guided(str(GUIDED[key]).split(), weights), "weights.pt")
    in_order(weights, options, "weights.pt")
    create = sr_create_model_and_diffusion if hasattr(options.model, "large_size") else create_model_and_diffusion
    model, diffusion = options.call(create)
    model.load_state_dict(weights)
    return model.eval(), diffusion


def assert_close(got, key):
    np.testing.assert_allclose(got.detach().numpy(), GUIDED[key], rtol=0, atol=2e-5 * np.abs(GUIDED[key]).max())


def test_defaults_are_guided_diffusions():
    assert guided_defaults(False) == json.loads(str(GUIDED["defaults"]))
    assert guided_defaults(True) == json.loads(str(GUIDED["sr_defaults"]))


def test_its_networks_answer_as_they_do_there():
    x, t, y = tensor("guided_x", 2, 3, 8, 8), th.tensor([3, 700]), th.tensor([0, 2])
    weights = filled(**NETWORK, num_heads=2, attention_resolutions="8,4")
    assert {name: list(w.shape) for name, w in weights.items()} == json.loads(str(GUIDED["names"]))
    model, diffusion = loaded("flags", weights)
    assert_close(model(x, t, y), "images")
    out = diffusion.p_mean_variance(model, x, t, clip_denoised=False, model_kwargs={"y": y})
    assert_close(out["mean"], "mean")  # the model sees other timesteps by other defaults
    model, _ = loaded("head_channels_flags", filled(**NETWORK, attention_resolutions="4"))
    assert_close(model(x, t, y), "head_channels")
    model, _ = loaded("sr_flags", filled(**ENLARGING))
    low_res = tensor("guided_low", 1, 3, 16, 16)
    out = model(tensor("guided_sr", 1, 3, 64, 64), th.tensor([500]), low_res=low_res)
    assert_close(out[:, :, ::8, ::8], "sr")


@pytest.mark.parametrize(
    "values",
    [
        dict(NETWORK, attention_resolutions="8,4", num_heads=2, noise_schedule="cosine", predict_xstart=True),
        dict(NETWORK, class_cond=False, num_classes=1000, image_size=32, channel_mult="", diffusion_steps=4000),
        dict(ENLARGING, learn_sigma=True, rescale_timesteps=False, dropout=0.3),
    ],
)
def test_flags_there_and_back(values):
    weights, names = filled(**values), {k: v for k, v in values.items() if k != "channel_mult"}
    options = options_of({"flags": values, "class_names": None}, "config.json")
    text, notes = to_guided(options)
    back = options_of(from_guided(text.split(), weights), "config.json")
    assert {name: back.values()[name] for name in names} == names
    assert back.replace(channel_mult=options.model.channel_mult) == options
    assert bool(notes) == (values.get("class_cond", False)) and all("NUM_CLASSES = 3" in note for note in notes)


def test_the_script_writes_and_reads_them(run, tmp_path, capfd):
    weights = save_weights(tmp_path / "w.pt", class_cond=True, num_classes=2)
    (tmp_path / "config.json").write_text(json.dumps({"flags": dict(TINY, image_size=8, class_cond=True, num_classes=2),
                                                      "class_names": None}))  # fmt: skip
    assert convert(weights, tmp_path / "g" / "g.pt", "--to", "guided-diffusion") == 0
    out = capfd.readouterr().out
    assert [path.name for path in (tmp_path / "g").iterdir()] == ["g.pt"]
    assert_same(load(tmp_path / "g" / "g.pt"), load(weights))
    words = out.partition("MODEL_FLAGS='")[2].partition("'")[0].split()
    refused(capfd, "g.safetensors", weights, tmp_path / "g.safetensors", "--to", "guided-diffusion")
    assert convert(tmp_path / "g" / "g.pt", tmp_path / "back.safetensors", "--", *words) == 0
    assert convert(tmp_path / "g" / "g.pt", tmp_path / "again.pt", "--to", "guided-diffusion", "--", *words) == 0
    assert_same(load(tmp_path / "again.pt"), load(weights))
    (tmp_path / "g" / "opt000100.pt").touch()
    assert convert(tmp_path / "g" / "g.pt", tmp_path / "g" / "ours.pt", "--", *words) == 0  # the config is of both
    (tmp_path / "g" / "config.json").unlink()
    refused(capfd, "ours.pt", tmp_path / "g" / "g.pt", tmp_path / "g" / "other.pt", "--", *words)
    sampling = flags(model_path=tmp_path / "back.safetensors", num_samples=1, sampler="unipc", sampling_steps=2)
    (tmp_path / "config.json").unlink()
    assert run_script("image_sample", sampling, tmp_path / "log") == 0


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--resblock_updown True", "resblock_updown"),
        ("--use_new_attention_order True", "use_new_attention_order"),
        ("--num_head_channels 32 --attention_resolutions 8,4", "num_head_channels 32: 1, 2 heads"),
        ("--num_head_channels 48", "num_head_channels 48"),
        ("--lr 1e-4", "--lr"),
        ("--image_size big", "image_size"),
        ("--num_channels 64", "num_channels"),
        ("--image_size 8 --channel_mult 1,3", "channel_mult"),
    ],
)
def test_networks_that_have_no_counterpart_here(tmp_path, capfd, words, named):
    weights = save_weights(tmp_path / "w.pt")
    common = "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --attention_resolutions 4"
    refused(capfd, named, weights, tmp_path / "new.safetensors", "--", *common.split(), *words.split())
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.parametrize(
    "values",
    [
        dict(image_channels=1),
        dict(sigma_small=True),
        dict(channel_mult="2,2"),
        dict(channel_mult="1,1.5"),
        dict(class_dropout=0.1, class_cond=True),
        dict(large_size=128, small_size=32),
    ],
)
def test_networks_that_have_no_counterpart_there(values):
    common = {**({"image_size": 8, "channel_mult": "1,2"} if "large_size" not in values else {}), **values}
    with pytest.raises(InputError, match=f"{next(iter(values))} .*guided-diffusion"):
        to_guided(options_of({"flags": common, "class_names": None}, "config.json"))
