"""What a command line amounts to, without doing it."""

import re

import pytest
import torch as th
from harness import TINY, build, flags, run_script, save_weights

from improved_diffusion.cli.dry_run import estimate_memory
from improved_diffusion.options import SampleOptions, TrainOptions
from improved_diffusion.solvers import half_log_snr, time_grid


def printed(tmp_path, capfd, script, **values):
    assert run_script(script, flags(dry_run=True, **values), tmp_path / "log") == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_training_is_described_and_nothing_is_written(tmp_path, capfd, script):
    sizes = dict(image_size=8) if script == "image_train" else dict(large_size=8, small_size=4)
    out = printed(tmp_path, capfd, script, **TINY, **sizes, lr="1e-3", data_dir="nowhere", timestep_respacing="5")
    for line in ("  --num_channels 32", "  --lr 0.001", "  --data_dir nowhere", "  --seed None", "  --log_dir ''"):
        assert f"{line}\n" in out
    model, _ = build(**TINY, image_size=8)
    count = sum(p.numel() for p in model.parameters()) + (864 if script == "super_res_train" else 0)
    assert f"parameters: {count:,}\n" in out
    assert "memory of a rank, estimated: " in out and "peak of a training step" in out
    assert "timesteps: 5 of 24: 0, 6, 12, 17, 23\n" in out
    assert list(tmp_path.iterdir()) == []


def test_sampling_is_described_with_the_flags_of_the_run(tmp_path, capfd):
    weights = save_weights(tmp_path / "ema.pt", image_channels=1)
    (tmp_path / "config.json").write_text(
        '{"script": "image_train", "class_names": null, "flags": {"image_size": 8, "image_channels": 1, '
        '"num_channels": 32, "channel_mult": "1,2", "num_res_blocks": 1, "num_heads": 2, '
        '"attention_resolutions": "4", "diffusion_steps": 24, "noise_schedule": "cosine"}}'
    )
    out = printed(tmp_path, capfd, "image_sample", model_path=weights, timestep_respacing="ddim8")
    assert "  --image_channels 1\n" in out and "timesteps: 8 of 24: 0, 3, 6, 9, 12, 15, 18, 21\n" in out
    assert "for the weights, " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "ema.pt"]


@pytest.mark.parametrize("precision", ["use_fp16", "use_bf16"])
def test_half_precision_takes_less(tmp_path, capfd, precision):
    words = dict(TINY, image_size=8, batch_size=64)
    peaks = [
        int(re.search(r"([\d,]+) MiB more at the peak", out)[1].replace(",", ""))
        for out in (printed(tmp_path, capfd, "image_train", **words, **more) for more in ({}, {precision: True}))
    ]
    assert 0 < peaks[1] < peaks[0]


def test_many_timesteps_are_shortened(tmp_path, capfd):
    out = printed(tmp_path, capfd, "image_train", **{**TINY, "diffusion_steps": 4000}, image_size=8)
    assert "timesteps: 4000 of 4000: 0, 1, 2, 3, 4, 5, ..., 3997, 3998, 3999\n" in out


def test_the_timesteps_of_a_solver(tmp_path, capfd):
    """Those at which it calls the network; a count that there is not ends in one line."""
    words = dict(TINY, image_size=8, model_path=save_weights(tmp_path / "model.pt"), sampler="unipc", spacing="time")
    out = printed(tmp_path, capfd, "image_sample", **words, sampling_steps=5)
    times = time_grid(half_log_snr(build(**TINY, image_size=8)[1]), 5, "time")
    assert f"timesteps: 5 of 24: {', '.join(map(str, times[-2::-1]))}\n" in out
    assert run_script("image_sample", flags(dry_run=True, **words, sampling_steps=24), tmp_path / "log") == 2
    assert "--sampling_steps 24: " in capfd.readouterr().err


def estimate(training, **changed):
    model_flags = {**TINY, "image_size": 8, **{k: v for k, v in changed.items() if k == "use_checkpoint"}}
    with th.device("meta"):
        model, _ = build(**model_flags)
    options = TrainOptions() if training else SampleOptions()
    options = options.replace(**{"image_size": 8, "batch_size": 4, "ema_rate": "0.9", **changed})
    return sum(p.numel() for p in model.parameters()) * 4, *estimate_memory(model, options)


def test_what_is_held_all_the_time():
    weights, held, _ = estimate(True)
    assert held == 4 * weights  # weights, two moments, one average
    assert estimate(True, ema_rate="0.9,0.99")[1] == 5 * weights
    assert estimate(False)[1] == weights
    assert estimate(False, use_fp16=True)[1] == weights // 2


def test_the_peak_follows_what_a_step_keeps():
    weights, _, peak = estimate(True)
    assert peak > weights  # the gradients
    assert 1.5 < estimate(True, batch_size=32)[2] / estimate(True, batch_size=16)[2] < 2.5
    assert estimate(True, batch_size=8, microbatch=4)[2] == peak
    assert estimate(True, batch_size=64, use_checkpoint=True)[2] < 0.7 * estimate(True, batch_size=64)[2]
    assert estimate(False)[2] < peak / 2


def test_the_estimate_is_what_autograd_keeps():
    """At the end of the forward pass: the gradients come later, so that the peak lies between it and both together."""
    model, _ = build(**TINY, image_size=8)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with th.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(th.zeros(32, 3, 8, 8), th.zeros(32))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    activations = sum(size for pointer, size in kept.items() if pointer not in weights)
    size, _, peak = estimate(True, batch_size=32)
    assert activations < peak < 1.5 * activations + size
