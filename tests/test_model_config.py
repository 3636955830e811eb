"""Which flags a file of weights belongs to: config.json, shapes, and what the file's name says."""

import argparse
import json

import pytest
import torch as th
from harness import TINY, build, build_sr

from improved_diffusion.cli.run_config import read_config, save_config, settle_flags
from improved_diffusion.inference.weights import infer_flags
from improved_diffusion.script_util import (
    extra_model_defaults,
    model_and_diffusion_defaults,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.utils.errors import InputError

IMAGE_FLAGS = {**model_and_diffusion_defaults(), **extra_model_defaults()}
SR_FLAGS = {**sr_model_and_diffusion_defaults(), **extra_model_defaults()}


def settle(path, weights=None, model_flags=IMAGE_FLAGS, **given):
    """:return: (the flags that come of it, class names, notes)."""
    args = argparse.Namespace(**{**model_flags, **given}, model_path=str(path), given=list(given))
    names, notes = settle_flags(args, model_flags, weights or {})
    return {name: getattr(args, name) for name in model_flags}, names, notes


@pytest.fixture
def run(tmp_path):
    """The folder of a run with flags of its own."""
    save_config(str(tmp_path), "image_train", dict(TINY, image_size=8, lr=3e-4, class_cond=True), ["cat", "dog"])
    return tmp_path


def test_what_is_saved_is_read(tmp_path):
    assert read_config(str(tmp_path)) is None
    save_config(str(tmp_path), "image_train", {"image_size": 8, "seed": None}, None)
    want = {"script": "image_train", "flags": {"image_size": 8, "seed": None}, "class_names": None}
    assert read_config(str(tmp_path)) == want
    assert json.loads((tmp_path / "config.json").read_text()) == want


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"flags": 1, "class_names": null}',
        '{"flags": {}}',
        "\xff",
        '{"flags": {}, "class_names": [1, 2]}',
        '{"flags": {"num_classes": 1}, "class_names": ["a", "b"]}',
        '{"flags": {"num_classes": "1"}, "class_names": ["a"]}',
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"config\.json: not the flags of a run .*delete it") as refusal:
        read_config(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", None), ("image_size", "8"), ("image_size", 0), ("learn_sigma", 1), ("noise_schedule", "sigmoid")],
)
def test_values_that_cannot_be_are_refused_by_name(tmp_path, name, value):
    save_config(str(tmp_path), "image_train", {name: value}, None)
    with pytest.raises(InputError, match=rf"config\.json: {name} cannot be {value!r}; delete the file"):
        settle(tmp_path / "ema_0.9_000050.pt")


def test_a_folder_of_that_name(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json: not the flags of a run"):
        read_config(str(tmp_path))


def test_flags_are_those_of_the_run(run):
    flags, names, notes = settle(run / "ema_0.9_000050.pt")
    assert flags == {**IMAGE_FLAGS, **TINY, "image_size": 8, "class_cond": True}
    assert names == ["cat", "dog"]
    assert notes == [f"flags of the model: {run}/config.json"]


def test_flags_that_are_given_win_with_a_warning_for_each_that_contradicts(run):
    given = dict(noise_schedule="linear", num_heads=2, timestep_respacing="4", dropout=0.5, image_size=16)
    flags, _, notes = settle(run / "ema_0.9_000050.pt", **given)
    assert {name: flags[name] for name in given} == given
    assert notes[1:] == [  # others are free to choose, or the same
        "WARNING: --image_size 16 is what you gave; the model was trained with 8",
        "WARNING: --noise_schedule linear is what you gave; the model was trained with cosine",
    ]


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("model000100.pt", "raw weights; an ema_ file"),
        ("ema_0.9_000009.pt", "averages over about 10 steps, but has seen 9"),
        ("ema_0.9999_009999.pt", "averages over about 10000 steps, but has seen 9999"),
        ("ema_0.9_000010.pt", None),
        ("ema_0.9999_010000.pt", None),
        ("imagenet64_uncond_100M_1500K.pt", None),
    ],
)
def test_weights_that_draw_badly_warn(run, name, warning):
    _, _, notes = settle(run / name)
    assert len(notes) == (2 if warning else 1)
    assert not warning or (notes[1].startswith(f"WARNING: {name} ") and warning in notes[1])


CHANGES = [
    dict(),
    dict(num_channels=64),
    dict(num_res_blocks=2, learn_sigma=True),
    dict(channel_mult="1,2,2", attention_resolutions="4,2"),
    dict(channel_mult="1,1.5", num_channels=64),
    dict(attention_resolutions="8"),
    dict(attention_resolutions="1"),
    dict(class_cond=True, num_classes=7),
    dict(image_channels=1, use_scale_shift_norm=False),
]


@pytest.mark.parametrize("super_resolution", [False, True])
@pytest.mark.parametrize("changed", CHANGES, ids=str)
def test_shapes_tell_what_they_can(tmp_path, changed, super_resolution):
    """The model of the inferred flags takes the weights."""
    sizes = dict(large_size=8, small_size=4) if super_resolution else dict(image_size=8)
    factory, model_flags = (build_sr, SR_FLAGS) if super_resolution else (build, IMAGE_FLAGS)
    model, _ = factory(**{**TINY, **sizes, **changed})
    given = dict(sizes, diffusion_steps=24, noise_schedule="cosine", num_heads=2, predict_xstart=False)
    flags, names, notes = settle(tmp_path / "model.pt", model.state_dict(), model_flags, **given)
    factory(**flags)[0].load_state_dict(model.state_dict())
    assert names is None and notes[0].startswith("from the shapes of the weights: ")
    fixed = "" if super_resolution or changed.get("learn_sigma") else ", sigma_small False"
    assert notes[1:] == [
        f"no config.json beside the weights: rescale_timesteps True{fixed} are taken for granted; samples are noise if "
        "they are wrong"
    ]
    for name, value in changed.items():
        if name not in ("attention_resolutions", "channel_mult"):
            assert flags[name] == value


def test_what_no_shape_tells_is_asked_for(tmp_path):
    model, _ = build(**TINY, image_size=8)
    with pytest.raises(InputError, match=r"no config\.json beside it") as refusal:
        settle(tmp_path / "model.pt", model.state_dict(), image_size=8)
    message = str(refusal.value)
    assert "num_channels 32" in message and "num_res_blocks 1" in message and "\n" not in message
    assert "--diffusion_steps, --noise_schedule, or --preset, one of imagenet64" in message
    assert "--image_size" not in message


def test_weights_of_the_default_model_are_taken_as_the_original_does(tmp_path):
    with th.device("meta"):
        model, _ = build()
    flags, _, notes = settle(tmp_path / "model.pt", model.state_dict())
    assert flags == IMAGE_FLAGS
    assert notes == [
        "no config.json beside the weights: image_size 64, diffusion_steps 1000, noise_schedule linear, "
        "num_heads 4, rescale_timesteps True, predict_xstart False, sigma_small False are taken for granted; "
        "samples are noise if they are wrong"
    ]


def test_flags_that_contradict_the_shapes_are_left_to_loading(tmp_path):
    model, _ = build(**TINY, image_size=8)
    given = dict(TINY, image_size=8, learn_sigma=True, rescale_timesteps=True, predict_xstart=False, sigma_small=False)
    flags, _, notes = settle(tmp_path / "model.pt", model.state_dict(), **given)
    assert flags == {**IMAGE_FLAGS, **given} and notes == []


def test_no_model_and_one_of_the_other_kind_are_left_to_loading(tmp_path):
    assert infer_flags({}) is None
    model, _ = build_sr(**TINY, large_size=8, small_size=4)
    assert settle(tmp_path / "model.pt", model.state_dict()) == (IMAGE_FLAGS, None, [])
    assert settle(tmp_path / "model.pt", {"weight": th.zeros(2)}) == (IMAGE_FLAGS, None, [])
