"""What a command line amounts to, without doing it."""

import re

import pytest
import torch as th
from harness import TINY, build, flags, run_script, save_weights, write_images
from training import assert_same

from improved_diffusion.cli import dry_run, run_config
from improved_diffusion.cli import estimate as estimate_module
from improved_diffusion.cli.estimate import (
    estimate_memory,
    flags_that_fit,
    forward_flops,
    memory_warnings,
    on_meta,
)
from improved_diffusion.logger import Logger
from improved_diffusion.options import SampleOptions, TrainOptions
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.solvers import half_log_snr, time_grid
from improved_diffusion.training.checkpoints import rng_state


def printed(tmp_path, capfd, script, **values):
    assert run_script(script, flags(dry_run=True, **values), tmp_path / "log") == 0
    out, err = capfd.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_training_is_described_and_nothing_is_written(tmp_path, capfd, script):
    sizes = dict(image_size=8) if script == "image_train" else dict(large_size=8, small_size=4)
    out = printed(tmp_path, capfd, script, **TINY, **sizes, lr="1e-3", timestep_respacing="5")
    for line in ("  --num_channels 32", "  --lr 0.001", "  --data_dir ''", "  --seed None", "  --log_dir ''"):
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
        '"num_channels": 32, "channel_mult": "1", "num_res_blocks": 1, "num_heads": 2, '
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
    assert peak < estimate(True, batch_size=8, microbatch=4)[2] <= peak + weights  # gradients, from the second pass
    assert estimate(True, microbatch="auto")[2] == peak
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


# ---------------------------------------------------------------- operations


def test_operations_are_those_of_convolutions_and_products():
    """2 per multiplication and addition, whatever the batch."""
    convolution = th.nn.Conv2d(3, 6, 3, padding=1, device="meta")

    class Net(th.nn.Module):
        def forward(self, x, t):
            return convolution(x)

    for batch_size in (1, 4):
        options = TrainOptions().replace(image_size=8, batch_size=batch_size)
        assert forward_flops(Net(), options) == 2 * 8 * 8 * 6 * 3 * 9


def test_operations_are_printed(tmp_path, capfd):
    out = printed(tmp_path, capfd, "image_train", **TINY, image_size=8)
    forward, step = map(float, re.search(r"GFLOPs per image: ([\d.]+) .*? ([\d.]+)", out).groups())
    assert step == pytest.approx(3 * forward, abs=0.2)


# ---------------------------------------------------------------- does it fit?


SMALL = TrainOptions().replace(**TINY, image_size=8, batch_size=64)


@pytest.fixture
def linear(monkeypatch):
    """An estimate of 100 bytes and 10 an image in a pass, a quarter of them with recomputation."""

    def estimated(model, options):
        values = options.values()
        size = values.get("microbatch", -1)
        size = values["batch_size"] if size in (-1, "auto") else size
        return 100, 10 * size // (4 if values["use_checkpoint"] else 1)

    monkeypatch.setattr(estimate_module, "estimate_memory", estimated)


@pytest.mark.parametrize(
    ("available", "changed"),
    [
        (740, {}),
        (739, {"microbatch": 32}),
        (420, {"microbatch": 32}),
        (419, {"microbatch": 16}),
        (110, {"microbatch": 1}),
        (109, {"microbatch": 2, "use_checkpoint": True}),
        (99, None),
    ],
)
def test_the_proposal_is_the_largest_microbatch_that_fits(linear, available, changed):
    assert flags_that_fit(SMALL, create_model_and_diffusion, available) == changed


def test_sampling_is_offered_a_smaller_batch(linear):
    options = SampleOptions().replace(**TINY, image_size=8, batch_size=64)
    assert flags_that_fit(options, create_model_and_diffusion, 300) == {"batch_size": 16}


def test_the_proposal_is_by_the_estimate():
    memory = sum(estimate_memory(on_meta(SMALL, create_model_and_diffusion)[0], SMALL))
    assert flags_that_fit(SMALL, create_model_and_diffusion, memory) == {}
    assert flags_that_fit(SMALL, create_model_and_diffusion, memory - 1) == {"microbatch": 32}


def test_the_devices_memory_is_compared(tmp_path, capfd, monkeypatch, linear):
    words = dict(TINY, image_size=8, batch_size=64)
    for available, line in [(300, "--microbatch 16 fits"), (2**40, "memory of cpu: 1,048,576 MiB free; it fits")]:
        monkeypatch.setattr(dry_run, "available_memory", lambda device, available=available: available)
        assert f"{line}\n" in printed(tmp_path, capfd, "image_train", **words)
    monkeypatch.setattr(dry_run, "available_memory", lambda device: None)
    assert "memory of cpu" not in printed(tmp_path, capfd, "image_train", **words)


@pytest.mark.parametrize("microbatch", [-1, 64, "auto"])
def test_a_run_warns_only_where_the_memory_is_too_small(monkeypatch, linear, microbatch):
    options = SMALL.replace(microbatch=microbatch)
    before = rng_state()
    for available, flag in [(2**40, None), (740, None), (739, "--microbatch 32"), (99, "--use_bf16")]:
        monkeypatch.setattr(estimate_module, "available_memory", lambda device, available=available: available)
        lines = memory_warnings(options, create_model_and_diffusion)
        assert [flag in line for line in lines] == ([True] if flag and microbatch != "auto" else [])
    assert_same(rng_state(), before)


def test_a_training_run_begins_with_the_warning(tmp_path, capfd, monkeypatch):
    words = dict(TINY, image_size=8, batch_size=4, max_steps=1, num_workers=0, preview_samples=0)
    words["data_dir"] = write_images(tmp_path / "images")
    monkeypatch.setattr(estimate_module, "available_memory", lambda device: 2**20)
    assert run_script("image_train", flags(**words), tmp_path / "log") == 0
    log = (tmp_path / "log" / "log.txt").read_text()
    assert log.index("cpu has 1 MiB free") < log.index("next checkpoint")


# ---------------------------------------------------------------- data


def test_the_data_are_opened_counted_and_decoded(tmp_path, capfd):
    images = write_images(tmp_path / "images", count=6)
    (images / "later.webp").write_bytes(b"left out")
    words = dict(TINY, class_cond=True, num_classes=2, data_dir=images, batch_size=4)
    out = printed(tmp_path, capfd, "image_train", **words, image_size=8)
    assert "data: 6 images of 2 classes, decoded to 3x8x8\n" in out and "webp" in out
    out = printed(tmp_path, capfd, "super_res_train", **words, large_size=16, small_size=8)
    assert "data: 6 images of 2 classes, decoded to 3x16x16\n" in out


def test_ranks_open_the_data_together(tmp_path, capsys, on_ranks, monkeypatch):
    """Leaving out damaged images is a collective."""
    monkeypatch.setattr(Logger, "CURRENT", None)
    monkeypatch.setattr(Logger, "EARLY", [])
    images = write_images(tmp_path / "images", count=6)
    (images / "a_000.png").write_bytes(b"no image")
    options = TrainOptions().replace(**TINY, image_size=8, data_dir=str(images), batch_size=2, skip_damaged=True)
    run = run_config.Run(options)
    on_ranks(2, lambda rank: dry_run.print_dry_run(run, create_model_and_diffusion))
    out = capsys.readouterr().out
    assert out.count("data: 5 images") == 1 and out.count("a_000.png") == 1


def test_images_left_out_are_counted_if_the_rest_is_refused(tmp_path, capfd):
    images = write_images(tmp_path / "images", count=6)
    (images / "later.webp").write_bytes(b"left out")
    words = dict(TINY, image_size=8, batch_size=9, dry_run=True, data_dir=images)
    assert run_script("image_train", flags(**words), tmp_path / "log") == 2
    out, err = capfd.readouterr()
    assert "webp" in out and "batch_size 6" in err


@pytest.mark.parametrize("problem", ["missing", "few", "damaged"])
def test_data_that_a_run_would_refuse_are_refused(tmp_path, capfd, problem):
    images = write_images(tmp_path / "images", count=6)
    if problem == "damaged":
        (images / "a_000.png").write_bytes(b"no image")
    words = dict(TINY, image_size=8, batch_size=7 if problem == "few" else 2, dry_run=True)
    words["data_dir"] = tmp_path / "missing" if problem == "missing" else images
    assert run_script("image_train", flags(**words), tmp_path / "log") == 2
    out, err = capfd.readouterr()
    assert "timesteps: 24 of 24" in out  # the rest comes first
    assert err.count("\n") == 1 and str(words["data_dir"]) in err
