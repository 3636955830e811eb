"""The published models: their presets build them, and docs/published_models.md shows the same flags."""

import re

import pytest
import torch as th
from harness import ROOT

from improved_diffusion.cli.estimate import estimate_memory, forward_flops, on_meta
from improved_diffusion.cli.presets import COSTS, PRESETS
from improved_diffusion.options import SuperResTrainOptions, TrainOptions
from improved_diffusion.script_util import create_model_and_diffusion, sr_create_model_and_diffusion

PUBLISHED = {  # parameters of the published checkpoints, and what the diffusion minimises
    "imagenet64": (121_063_942, "RESCALED_MSE", True),
    "imagenet64_vlb": (121_063_942, "RESCALED_KL", True),
    "imagenet64_cond": (273_049_350, "MSE", False),
    "cifar10": (52_546_438, "RESCALED_MSE", True),
    "cifar10_vlb": (52_546_438, "RESCALED_KL", True),
    "upsample256": (279_792_390, "MSE", False),
    "lsun_bedroom": (113_676_678, "MSE", False),
}


def test_every_preset_is_counted():
    assert PUBLISHED.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_builds_the_published_model(name):
    large = "large_size" in PRESETS[name]
    defaults = SuperResTrainOptions() if large else TrainOptions()
    assert {flag: type(value) for flag, value in PRESETS[name].items()} == {
        flag: type(defaults.values()[flag]) for flag in PRESETS[name]
    }
    with th.device("meta"):
        options = defaults.replace(**PRESETS[name])
        model, diffusion = options.call(sr_create_model_and_diffusion if large else create_model_and_diffusion)
    parameters, loss_type, rescale_timesteps = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert diffusion.num_timesteps == PRESETS[name]["diffusion_steps"]
    assert (diffusion.loss_type.name, diffusion.rescale_timesteps) == (loss_type, rescale_timesteps)
    assert (diffusion.model_mean_type.name, diffusion.model_var_type.name) == ("EPSILON", "LEARNED_RANGE")


def test_the_documents_table_has_each_presets_flags():
    text = (ROOT / "docs/published_models.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\| `(--[^`]+)` \|", text, flags=re.MULTILINE))
    assert rows.keys() == PRESETS.keys()
    for name, flags in rows.items():
        words = flags.split()
        shown = {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}
        assert {flag: float(v) if flag == "lr" else v for flag, v in shown.items()} == {
            flag: v if flag == "lr" else str(v) for flag, v in PRESETS[name].items()
        }, name


def preset_cost(name):
    """The parameters, the memory to train with one image in a pass, and forward_flops()."""
    large = "large_size" in PRESETS[name]
    options = (SuperResTrainOptions() if large else TrainOptions()).replace(**{**PRESETS[name], "batch_size": 1})
    model, _ = on_meta(options, sr_create_model_and_diffusion if large else create_model_and_diffusion)
    parameters, flops = sum(p.numel() for p in model.parameters()), forward_flops(model, options)
    gib = sum(estimate_memory(model, options)) / 2**30
    return f"{parameters / 1e6:.0f}M, {gib:.1f} GiB, {flops / 1e9:.0f} GFLOPs"


@pytest.mark.slow
def test_the_costs_are_those_that_are_computed():
    assert {name: preset_cost(name) for name in PRESETS} == COSTS


def test_the_documents_table_has_each_presets_cost():
    text = (ROOT / "docs/published_models.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (\d+M, [^|]+ GFLOPs) \|", text, flags=re.MULTILINE)) == COSTS
