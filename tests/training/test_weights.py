"""Weights that fit the flags, and flags that do not fit the weights."""

import argparse
import math
import re

import pytest
import torch as th
from harness import TINY, build, build_sr
from training import assert_same
from training import load as load_file

from improved_diffusion.training.weights import check_fits, infer_architecture, is_young, load_weights, read_weights
from improved_diffusion.utils.errors import InputError


def load(model, path):
    load_weights(model, read_weights(path), path)


FILE = dict(TINY, channel_mult="1,2", image_size=8, class_cond=True, num_classes=5)


DEFAULT_MULT = dict(image_size=32, channel_mult="")


@pytest.fixture
def weights(tmp_path):
    """Writes the weights of a model of FILE's flags, with some changed, and gives their path."""

    def write(super_resolution=False, **changed):
        flags = {**FILE, **changed}
        if super_resolution:
            flags["large_size"] = flags.pop("image_size")
            model, _ = build_sr(**flags, small_size=4)
        else:
            model, _ = build(**flags)
        th.save(model.state_dict(), tmp_path / "model000010.pt")
        return str(tmp_path / "model000010.pt")

    return write


def test_weights_that_fit_are_loaded(weights):
    path = weights()
    model, _ = build(**FILE)
    load(model, path)
    expected = th.load(path, weights_only=True)
    assert model.state_dict().keys() == expected.keys()
    assert all(th.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("in_file", "by_flags", "cause"),
    [
        (dict(num_channels=64), dict(), "num_channels, 64 in the file"),
        (dict(), dict(num_channels=64), "num_channels, 32 in the file"),
        (dict(image_channels=1), dict(), "image_channels, 1 in the file"),
        (dict(), dict(image_channels=1), "image_channels, 3 in the file"),
        (dict(class_cond=False), dict(), "class_cond, False in the file"),
        (dict(), dict(class_cond=False), "class_cond, True in the file"),
        (dict(num_classes=7), dict(), "num_classes, 7 in the file"),
        (dict(learn_sigma=True), dict(), "learn_sigma, True in the file"),
        (dict(), dict(learn_sigma=True), "learn_sigma, False in the file"),
        (dict(attention_resolutions="8"), dict(), "attention_resolutions"),
        (dict(attention_resolutions="8,4"), dict(), "attention_resolutions"),
        (dict(), dict(attention_resolutions="1000"), "attention_resolutions"),
        (dict(), dict(image_size=16), "attention_resolutions, or the image size"),
        (dict(use_scale_shift_norm=False), dict(), "use_scale_shift_norm, False in the file"),
        (dict(), dict(use_scale_shift_norm=False), "use_scale_shift_norm, True in the file"),
        (dict(num_res_blocks=2), dict(), "num_res_blocks, 2 in the file"),
        (dict(), dict(num_res_blocks=2), "num_res_blocks, 1 in the file"),
        (dict(channel_mult="1,1"), dict(), "channel_mult, 1,1 in the file"),
        (dict(channel_mult="1,2,2"), dict(), "channel_mult, 1,2,2 in the file"),
        (dict(), dict(channel_mult="2,2"), "channel_mult, 1,2 in the file"),
        (DEFAULT_MULT, dict(DEFAULT_MULT, image_size=64), "the image size, which chooses channel_mult: 1,2,2,2 in the"),
        (dict(DEFAULT_MULT, image_size=64), DEFAULT_MULT, "the image size, which chooses channel_mult: 1,2,3,4 in the"),
        (dict(super_resolution=True), dict(), "the script: one of the two is a model for super-resolution"),
        (dict(), dict(super_resolution=True), "the script: one of the two is a model for super-resolution"),
        (dict(super_resolution=True, image_channels=1), dict(), "the script: one of the two is a model for"),
        (
            dict(super_resolution=True, image_channels=1),
            dict(super_resolution=True),
            "image_channels, 1 in the file",
        ),
        (
            dict(super_resolution=True),
            dict(super_resolution=True, image_channels=1),
            "image_channels, 3 in the file",
        ),
    ],
    ids=str,
)
def test_weights_that_do_not_fit_name_up_to_three_tensors_and_the_likely_flag(weights, in_file, by_flags, cause):
    path = weights(**in_file)
    flags, factory = {**FILE, **by_flags}, build
    if flags.pop("super_resolution", False):
        flags.update(large_size=flags.pop("image_size"), small_size=4)
        factory = build_sr
    model, _ = factory(**flags)
    with pytest.raises(InputError) as refusal:
        load(model, path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ")
    assert f"; the likely cause is {cause}" in message
    assert 1 <= message.count(" in the model)") <= 3
    assert "\n" not in message


def changed(path, change):
    """Replace the contents of a file by a function of them."""
    th.save(change(th.load(path, weights_only=True)), path)
    return path


def refusal(path):
    with pytest.raises(InputError) as info:
        load(build(**FILE)[0], path)
    assert str(info.value).startswith(f"{path}: ") and "\n" not in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("name", ["extra.weight", "input_blocks.1.0.more"])
def test_a_tensor_too_many_is_no_options_fault(weights, name):
    message = refusal(changed(weights(), lambda c: {**c, name: th.zeros(3)}))
    assert f"{name} (3 in the file, absent in the model)" in message and "likely cause" not in message


def test_a_tensor_too_few_is_no_options_fault(weights):
    message = refusal(changed(weights(), lambda c: {name: v for name, v in c.items() if name != "out.0.weight"}))
    assert "out.0.weight (absent in the file, 32 in the model)" in message and "likely cause" not in message


def under(prefix):
    return lambda contents: {prefix + name: value for name, value in contents.items()}


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module."]
)
def test_names_from_inside_ddp_and_compile(weights, prefix):
    path = weights()
    want = th.load(path, weights_only=True)
    changed(path, under(prefix))
    assert read_weights(path).keys() == want.keys()
    model, _ = build(**FILE)
    load(model, path)
    assert_same(dict(model.state_dict()), dict(want))
    model, _ = build(**FILE)
    check_fits(model, load_file(path), path)
    load_weights(model, load_file(path), path)
    assert_same(dict(model.state_dict()), dict(want))


def test_a_compiled_part(weights):
    path = weights()
    changed(path, lambda c: {name.replace("out.", "out._orig_mod."): v for name, v in c.items()})
    load(build(**FILE)[0], path)


def test_a_network_with_such_names_keeps_them(tmp_path):
    wrapper = th.nn.Module()
    wrapper.module = th.nn.Linear(2, 3)
    want = {name: value.clone() for name, value in wrapper.state_dict().items()}
    th.nn.init.zeros_(wrapper.module.weight)
    load_weights(wrapper, want, "a.pt")
    assert_same(dict(wrapper.state_dict()), want)


def test_names_that_would_collide_stay(weights):
    message = refusal(changed(weights(), lambda c: {**under("module.")(c), **c}))
    assert "module.time_embed.0.weight" in message


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "unet."])
def test_other_prefixes_are_named(weights, prefix):
    path = changed(weights(), lambda c: {**under(prefix)(c), "model_ema.decay": th.ones(())})
    message = refusal(path)
    assert f"the likely cause is the prefix {prefix}" in message and f"p = {prefix!r}" in message
    assert ("Lightning" in message) == (prefix == "model.diffusion_model.")
    # what the line proposes
    changed(path, lambda c: {k.removeprefix(prefix): v for k, v in c.items() if k.startswith(prefix)})
    load(build(**FILE)[0], path)


def test_weights_inside_an_entry_are_named(weights):
    path = changed(weights(), lambda c: {"epoch": 3, "state_dict": under("model.diffusion_model.")(c)})
    assert "its entry 'state_dict'" in refusal(path)
    with pytest.raises(InputError, match="its entry 'state_dict'"):
        check_fits(build(**FILE)[0], load_file(path), path)


def test_blocks_of_guided_diffusion_are_named(weights):
    """Its resblock_updown has residual blocks where this network has a convolution."""

    def change(contents):
        renamed = {re.sub(r"\.(op|conv)\.", ".in_layers.2.", name): value for name, value in contents.items()}
        assert renamed.keys() != contents.keys()
        return renamed

    path = changed(weights(), change)
    assert "the likely cause is resblock_updown" in refusal(path)
    assert infer_architecture({name: tuple(v.shape) for name, v in load_file(path).items()}) is None


def test_tensors_are_named_with_both_shapes(weights):
    model, _ = build(**FILE)
    with pytest.raises(InputError) as refusal:
        load(model, weights(num_classes=7))
    assert "model: label_emb.weight (7x128 in the file, 5x128 in the model); the" in str(refusal.value)
    with pytest.raises(InputError, match=r"label_emb.weight \(absent in the file, 5x128 in the model\)"):
        load(model, weights(class_cond=False))
    with pytest.raises(InputError, match=r"in the model\), \.\.\.; the likely"):
        load(model, weights(num_channels=64))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no such file"]),
        (b"", ["not a checkpoint"]),
        (b"text", ["not a checkpoint"]),
        ([1, 2], ["not the weights of a model", "model*.pt or ema_*.pt"]),
        ({"state": {}, "param_groups": []}, ["not the weights of a model"]),
        ({"epoch": 3, "weight": th.zeros(2)}, ["not the weights of a model"]),
        ({"weight": th.zeros(2)}, ["does not fit", "it is not of this kind of model"]),
        ({}, ["not the weights of a model"]),
        ({5: th.zeros(2)}, ["not the weights of a model"]),
        (argparse.Namespace(a=1), ["refused", "run code"]),
    ],
    ids=repr,
)
def test_files_that_are_no_weights(tmp_path, content, parts):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        th.save(content, path)
    with pytest.raises(InputError) as refusal:
        load(build(**FILE)[0], str(path))
    assert [part for part in [str(path), *parts] if part not in str(refusal.value)] == []
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change", [lambda t: t * math.nan, lambda t: t.long(), lambda t: t.to("meta")])
def test_weights_that_are_no_finite_numbers(weights, change):
    path = weights()
    state_dict = th.load(path, weights_only=True)
    state_dict["out.2.bias"] = change(state_dict["out.2.bias"])
    th.save(state_dict, path)
    with pytest.raises(InputError, match=r"does not fit the model: out\.2\.bias is ") as refusal:
        load(build(**FILE)[0], path)
    assert str(refusal.value).startswith(path) and "\n" not in str(refusal.value)


def test_a_missing_tensor_is_not_blamed_on_the_kind_of_model(weights):
    path = weights()
    state_dict = th.load(path, weights_only=True)
    del state_dict["out.2.bias"]
    th.save(state_dict, path)
    with pytest.raises(InputError, match=r"out\.2\.bias \(absent in the file, \w+ in the model\)$"):
        load(build(**FILE)[0], path)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_no_weights(weights):
    path = weights()
    th.save({**th.load(path, weights_only=True), "x": th.nested.nested_tensor([th.zeros(2), th.zeros(3)])}, path)
    with pytest.raises(InputError, match="not the weights of a model"):
        read_weights(path)


def test_a_folder_as_path(tmp_path):
    model, _ = build(**FILE)
    with pytest.raises(InputError, match=r"is a directory; give the \.pt file in it"):
        load(model, str(tmp_path))


@pytest.mark.parametrize("rate, horizon", [(0.0, 3), (0.9, 30), (0.99, 300), (0.9999, 30000)])
def test_an_average_is_young_until_it_has_seen_three_horizons(rate, horizon):
    assert is_young(rate, horizon - 1) and not is_young(rate, horizon)


def test_an_average_that_keeps_the_initial_weights_stays_young():
    assert is_young(1.0, 10**9)
