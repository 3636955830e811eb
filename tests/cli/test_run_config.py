"""Which flags a file of weights belongs to: config.json, shapes, and what the file's name says."""

import dataclasses
import json

import pytest
import torch as th
from harness import TINY, build, build_sr

from improved_diffusion.cli.config_file import read_config
from improved_diffusion.cli.parser import Flags
from improved_diffusion.cli.run_config import of_weights, resumed, save_config
from improved_diffusion.options import SampleOptions, SuperResSampleOptions, TrainOptions
from improved_diffusion.script_util import create_model_and_diffusion, sr_create_model_and_diffusion
from improved_diffusion.training.weights import infer_architecture
from improved_diffusion.utils.errors import InputError

MODEL = dataclasses.asdict(SampleOptions().model) | dataclasses.asdict(SampleOptions().diffusion)


def settle(path, weights=None, options=None, **given):
    """:return: (the values of the model's options, the Run)."""
    options = (options or SampleOptions()).replace(**given, model_path=str(path))
    run = of_weights(Flags(options, frozenset(given)), weights or {})
    values = dataclasses.asdict(run.options.model) | dataclasses.asdict(run.options.diffusion)
    return values, run


def save(directory, class_names=None, **values):
    """A config.json with these flags alone."""
    config = {"script": "image_train", "flags": values, "class_names": class_names}
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture
def run(tmp_path):
    """The folder of a run with flags of its own."""
    save(tmp_path, ["cat", "dog"], **TINY, image_size=8, lr=3e-4, class_cond=True)
    return tmp_path


def test_what_is_saved_is_read(tmp_path):
    assert read_config(str(tmp_path)) is None
    options = TrainOptions().replace(image_size=8, log_dir="here", preset="cifar10", dry_run=True)
    save_config(str(tmp_path), "image_train", options, ["a"])
    config = read_config(str(tmp_path))
    assert config == {"script": "image_train", "flags": options.of_the_run(), "class_names": ["a"]}
    assert config["flags"].keys() == options.values().keys() - {"log_dir", "preset", "dry_run", "config", "overwrite"}


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
        '{"flags": {}, "class_names": []}',
        '{"flags": {}, "class_names": ["a", "a"]}',
        pytest.param("[" * 10**5 + "]" * 10**5, id="deep"),
        pytest.param('{"flags": {"lr": ' + "9" * 10**5 + '}, "class_names": null}', id="long"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("latin1"))
    with pytest.raises(InputError, match=r"config\.json") as refusal:
        read_config(str(tmp_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("image_size", None), ("image_size", "8"), ("image_size", 0), ("learn_sigma", 1), ("noise_schedule", "sigmoid")],
)
def test_values_that_cannot_be_are_refused_by_name(tmp_path, name, value):
    save(tmp_path, **{name: value})
    with pytest.raises(InputError, match=rf"config\.json: {name} '?{value}'?:"):
        settle(tmp_path / "ema_0.9_000050.pt")


@pytest.mark.parametrize(("name", "value"), [("num_res_blocks", 1000), ("num_channels", 2**16), ("num_classes", 2**24)])
def test_a_network_of_another_size_than_the_weights_is_refused_before_it_is_built(run, name, value):
    config = json.loads((run / "config.json").read_text())
    config["flags"].update({"num_classes": 2, name: value})
    (run / "config.json").write_text(json.dumps(config))
    model, _ = build(**{**TINY, "image_size": 8, "class_cond": True, "num_classes": 2})
    with pytest.raises(InputError, match=rf"config\.json: {name} is {value}") as refusal:
        settle(run / "ema_0.9_000050.pt", model.state_dict())
    assert "\n" not in str(refusal.value)
    values, _ = settle(run / "ema_0.9_000050.pt", model.state_dict(), **{name: {**TINY, "num_classes": 2}[name]})
    assert values["num_classes"] == 2


@pytest.mark.parametrize("given", [dict(image_size=16), dict(image_size=16, dropout=0.1)])
def test_an_image_size_of_another_network_is_refused_by_name(tmp_path, given):
    save(tmp_path, **{**TINY, "channel_mult": "1,2", "attention_resolutions": "4"}, image_size=8)
    with pytest.raises(InputError, match=r"^image_size 16: .*with 8.*config\.json.*attention_resolutions"):
        settle(tmp_path / "ema_0.9_000050.pt", **given)
    values, _ = settle(tmp_path / "ema_0.9_000050.pt", image_size=16, attention_resolutions="8")
    assert values["image_size"] == 16
    save(tmp_path, **TINY, image_size=8)  # one level, without attention
    settle(tmp_path / "ema_0.9_000050.pt", image_size=16)
    save(tmp_path, num_channels=32, image_size=64, attention_resolutions="16,8", channel_mult="")  # of other widths
    with pytest.raises(InputError, match="attention_resolutions 32,16 and channel_mult 1,2,3,4"):
        settle(tmp_path / "ema_0.9_000050.pt", image_size=128)
    changed = dict(image_size=128, attention_resolutions="32,16", channel_mult="1,2,3,4")
    models = [build(num_channels=32, **more)[0] for more in ({}, changed)]
    assert models[0].state_dict().keys() == models[1].state_dict().keys()


def test_a_folder_of_that_name(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json: not the flags of a run"):
        read_config(str(tmp_path))


def test_flags_are_those_of_the_run(run):
    values, settled = settle(run / "ema_0.9_000050.pt")
    assert values == {**MODEL, **TINY, "image_size": 8, "class_cond": True}
    assert settled.class_names == ["cat", "dog"]
    assert len(settled.notes) == 1 and f"{run}/config.json" in settled.notes[0]


@pytest.mark.parametrize(
    "names, continues",
    [
        ([], False),
        (["model000004.pt.tmp", "opt000004.pt.tmp"], False),
        (["model000004.pt", "state000004.pt"], True),
        (["model000004.pt", "opt000004.pt"], True),  # of the original
        (["model000004.pt.tmp", "opt000004.pt.tmp", "state000004.pt.tmp"], True),  # auto completes it
        (["model000004.pt", "opt000004.pt", "state000004.pt.tmp"], True),
    ],
)
def test_auto_takes_the_flags_of_a_run_that_has_a_checkpoint(run, names, continues):
    """A run that ended before its first one left config.json alone."""
    for name in names:
        (run / name).touch()
    options = TrainOptions().replace(resume_checkpoint="auto", log_dir=str(run), class_cond=True)
    settled = resumed(Flags(options, frozenset(("resume_checkpoint", "log_dir", "class_cond"))))
    assert settled.class_names == (["cat", "dog"] if continues else None)
    assert settled.options.model.image_size == (8 if continues else 64)


def test_flags_that_are_given_win_with_a_warning_for_each_that_contradicts(run):
    given = dict(noise_schedule="linear", num_heads=2, timestep_respacing="4", dropout=0.5, image_size=16)
    values, settled = settle(run / "ema_0.9_000050.pt", **given)
    assert {name: values[name] for name in given} == given
    size, schedule = settled.notes[1:]  # others are free to choose, or the same
    assert "WARNING" in size and "--image_size 16" in size and "8" in size
    assert "WARNING" in schedule and "--noise_schedule linear" in schedule and "cosine" in schedule


@pytest.mark.parametrize(("before", "now", "fits"), [(0.1, 0.3, True), (0.1, 0.0, False), (0.0, 0.1, False)])
def test_class_dropout_may_change_unless_its_row_comes_or_goes(run, before, now, fits):
    save(run, **TINY, image_size=8, class_cond=True, class_dropout=before)
    if fits:
        values, settled = settle(run / "ema_0.9_000050.pt", class_dropout=now)
        assert values["class_dropout"] == now and len(settled.notes) == 1
    else:
        with pytest.raises(InputError, match=rf"^class_dropout {now}: label_emb\.weight .*{before}"):
            settle(run / "ema_0.9_000050.pt", class_dropout=now)


@pytest.mark.parametrize(
    ("name", "warning"),
    [
        ("model030000.pt", "raw weights"),
        ("model029999.pt", None),  # the average of the run's rate, 0.9999, is worse
        ("ema_0.9_000029.pt", "model000029.pt"),
        ("ema_0.9999_029999.pt", "model029999.pt"),
        ("ema_0.9_000030.pt", None),
        ("ema_0.9999_030000.pt", None),
        ("ema_0.99999999999999999_000050.pt", None),  # the rate is 1.0 as a number
        ("imagenet64_uncond_100M_1500K.pt", None),
    ],
)
def test_weights_that_draw_badly_warn(run, name, warning):
    notes = settle(run / name)[1].notes
    assert len(notes) == (2 if warning else 1)
    assert not warning or (notes[1].startswith(f"WARNING: {name} ") and warning in notes[1])


@pytest.mark.parametrize(
    ("name", "warning"),
    [("model000029.pt", "raw weights"), ("ema_0.9_000001.pt", None), ("ema_0.9999_000029.pt", None)],
)
def test_an_average_that_began_fast_is_not_young(tmp_path, name, warning):
    save(tmp_path, **TINY, image_size=8, ema_warmup=True)
    notes = settle(tmp_path / name)[1].notes
    assert len(notes) == (2 if warning else 1) and (not warning or warning in notes[1])


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
    factory, options = (build_sr, SuperResSampleOptions()) if super_resolution else (build, SampleOptions())
    model, _ = factory(**{**TINY, **sizes, **changed})
    given = dict(sizes, diffusion_steps=24, noise_schedule="cosine", num_heads=2, predict_xstart=False)
    values, settled = settle(tmp_path / "model.pt", model.state_dict(), options, **given)
    create = sr_create_model_and_diffusion if super_resolution else create_model_and_diffusion
    settled.options.call(create)[0].load_state_dict(model.state_dict())
    from_shapes, assumed = settled.notes
    assert settled.class_names is None and "shapes" in from_shapes
    assert "rescale_timesteps True" in assumed
    assert ("sigma_small" in assumed) != changed.get("learn_sigma", False)
    assert ("class_dropout" in assumed) == changed.get("class_cond", False)
    for name, value in changed.items():
        if name not in ("attention_resolutions", "channel_mult"):
            assert values[name] == value


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
    values, settled = settle(tmp_path / "model.pt", model.state_dict())
    assert values == MODEL
    (assumed,) = settled.notes
    names = (
        "image_size",
        "diffusion_steps",
        "noise_schedule",
        "num_heads",
        "rescale_timesteps",
        "predict_v",
        "sigma_small",
    )
    assert [name for name in names if f"{name} {MODEL[name]}" not in assumed] == []


def test_flags_that_contradict_the_shapes_are_left_to_loading(tmp_path):
    model, _ = build(**TINY, image_size=8)
    given = dict(TINY, image_size=8, learn_sigma=True, rescale_timesteps=True, predict_xstart=False, sigma_small=False)
    given["predict_v"] = False
    values, settled = settle(tmp_path / "model.pt", model.state_dict(), **given)
    assert values == {**MODEL, **given} and settled.notes == ()


def test_no_model_and_one_of_the_other_kind_are_left_to_loading(tmp_path):
    assert infer_architecture({}) is None
    model, _ = build_sr(**TINY, large_size=8, small_size=4)
    for weights in (model.state_dict(), {"weight": th.zeros(2)}):
        values, settled = settle(tmp_path / "model.pt", weights)
        assert (values, settled.class_names, settled.notes) == (MODEL, None, ())
