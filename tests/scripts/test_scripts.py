"""Whole runs of every script on small images and small models: what they write, print and honour."""

import collections
import csv
import itertools
import json
import re
import signal
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, TINY, TRAIN, flags, load_script, run_script, save_weights, snapshot, write_images
from PIL import Image
from processes import finish
from training import assert_same

from improved_diffusion.cli import loop, parser
from improved_diffusion.gaussian_diffusion import GaussianDiffusion
from improved_diffusion.image_datasets import load_data_once
from improved_diffusion.inference import arrays, generate
from improved_diffusion.inference.generate import SampleNoise
from improved_diffusion.script_util import (
    create_model_and_diffusion,
    model_and_diffusion_defaults,
    sr_create_model_and_diffusion,
    sr_model_and_diffusion_defaults,
)
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel

pytestmark = pytest.mark.usefixtures("no_plot")
SAMPLE = dict(TINY, image_size=8, batch_size=2, num_samples=5, timestep_respacing=4)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten images of three classes."""
    return write_images(tmp_path_factory.mktemp("images"), count=10, classes=3)


def train(logdir, data, script="image_train", **changed):
    """Train in this process. :return: {file name: what it holds} of all checkpoints."""
    words = {**TRAIN, "data_dir": data, **changed}
    assert run_script(script, flags(**{k: v for k, v in words.items() if v is not None}), logdir) == 0
    return {path.name: th.load(path, weights_only=True) for path in logdir.glob("*.pt")}


def sample(logdir, weights, script="image_sample", **changed):
    """Sample in this process. :return: (the npz file's name, its arrays)."""
    words = {**SAMPLE, "model_path": weights, **changed}
    assert run_script(script, flags(**{k: v for k, v in words.items() if v is not None}), logdir) == 0
    (path,) = logdir.glob("*.npz")
    with np.load(path) as arrays:
        return path.name, dict(arrays)


def progress(logdir):
    """The rows of the log, but for images/s, which no two runs share."""
    with open(logdir / "progress.csv") as f:
        rows = list(csv.DictReader(f))
    assert all(float(row.pop("images/s")) > 0 for row in rows)
    return rows


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.mark.parametrize(
    "script",
    [
        "image_train",
        "image_sample",
        "image_nll",
        "image_eval",
        "super_res_train",
        "super_res_sample",
        "plan_timesteps",
        "prepare",
    ],
)
def test_help(tmp_path, capfd, script):
    assert run_script(script, ["--help"], tmp_path / "log") == 0
    text = " ".join(capfd.readouterr().out.split())
    assert " ".join(load_script(script).__doc__.split()) in text
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- training


@pytest.mark.parametrize(
    "changed",
    [
        dict(),
        dict(channel_mult="1,2", use_fp16=True),
        dict(class_cond=True, num_classes=3, learn_sigma=True),
        dict(schedule_sampler="loss-second-moment", diffusion_steps=2, batch_size=10),  # warms up
        dict(schedule_sampler="loss-second-moment", use_fp16=True, learn_sigma=True),
        dict(image_channels=1, ema_rate="0.9,0.99"),
        dict(microbatch=3, dropout=0.1, use_checkpoint=True),
        dict(predict_v=True, learn_sigma=True, loss_weighting="min_snr", grad_clip=0.1, lr_warmup_steps=3),
        dict(use_kl=True, predict_xstart=True, sigma_small=True, use_scale_shift_norm=False),
        dict(noise_schedule="linear", timestep_respacing="ddim8", weight_decay=0.1),
    ],
    ids=lambda changed: ",".join(f"{flag}={value}" for flag, value in changed.items()) or "plain",
)
def test_training_leaves_checkpoints_and_a_log(tmp_path, images, changed):
    saved = train(tmp_path, images, preview_samples=4, **changed)
    rates = str(changed.get("ema_rate", "0.9")).split(",")
    names = ["model{}.pt", "opt{}.pt", "state{}.pt", *[f"ema_{rate}_{{}}.pt" for rate in rates]]
    assert sorted(saved) == sorted(name.format(step) for step in ("000000", "000002", "000004") for name in names)
    pictures = {f"preview_{step:06d}_model.png" for step in (2, 4)}  # the average is young
    assert {path.name for path in tmp_path.iterdir()} - set(saved) == {
        "log.txt",
        "progress.csv",
        "config.json",
        *pictures,
    }
    for name in pictures:
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image)
        assert pixels.shape == (2 * 98 + 2, 2 * 98 + 2) + (() if changed.get("image_channels") == 1 else (3,))
        if not changed.get("predict_xstart"):  # which is nothing at first, where noise is something
            assert pixels[2:98, 2:98].std() > 10

    first, last = saved["model000000.pt"], saved["model000004.pt"]
    averaged = saved[f"ema_{rates[0]}_000004.pt"]
    for weights in (first, last, averaged):
        assert all(v.dtype == th.float32 and v.isfinite().all() for v in weights.values())
    assert largest_difference(averaged, last) > 0
    assert 0 < largest_difference(first, last) < 0.1

    rows = progress(tmp_path)
    assert [float(row["step"]) for row in rows] == [0, 1, 2, 3]
    assert [float(row["samples"]) for row in rows] == [n * changed.get("batch_size", 4) for n in (1, 2, 3, 4)]
    keys = ["loss", "grad_norm"] if not changed.get("use_fp16") else ["lg_loss_scale"]
    keys += [] if changed.get("use_kl") else ["mse"]
    keys += ["vb"] if changed.get("learn_sigma") else []
    assert all(np.isfinite(float(row[key])) for row in rows[-1:] for key in keys)


def test_max_steps_leaves_the_learning_rate_alone_and_lr_anneal_steps_lowers_it(tmp_path, images):
    def last_lr(saved, step):
        return saved[f"opt{step:06d}.pt"]["param_groups"][0]["lr"]

    assert last_lr(train(tmp_path / "a", images, max_steps=4), 4) == 1e-3
    annealed = train(tmp_path / "b", images, max_steps=None, lr_anneal_steps=4)
    assert last_lr(annealed, 4) == pytest.approx(1e-3 * (1 - 3 / 4))
    both = train(tmp_path / "c", images, max_steps=2, lr_anneal_steps=4)
    assert last_lr(both, 2) == pytest.approx(1e-3 * (1 - 1 / 4))
    assert "model000004.pt" not in both


@pytest.mark.parametrize("microbatch", [1, 3, 4])
def test_microbatch_changes_memory_only(tmp_path, images, microbatch):
    whole = train(tmp_path / "whole", images, seed=1, class_cond=True, num_classes=3)
    parts = train(tmp_path / "parts", images, seed=1, class_cond=True, num_classes=3, microbatch=microbatch)
    # AdamW divides by the gradient's size, which makes much of the last bits of small gradients
    assert largest_difference(whole["model000000.pt"], parts["model000000.pt"]) < 2e-3
    th.testing.assert_close(
        whole["opt000004.pt"]["state"][0]["exp_avg"], parts["opt000004.pt"]["state"][0]["exp_avg"], rtol=1e-2, atol=1e-5
    )


@pytest.mark.parametrize("num_workers", [1, 2])
def test_num_workers_changes_nothing(tmp_path, images, num_workers):
    train(tmp_path / "none", images, seed=1, batch_size=3)
    train(tmp_path / "some", images, seed=1, batch_size=3, num_workers=num_workers)
    assert progress(tmp_path / "some") == progress(tmp_path / "none")
    assert_same_files(tmp_path / "some", tmp_path / "none", differ={"num_workers"})


def checkpoints(logdir):
    return {name: data for name, data in snapshot(logdir).items() if name.endswith((".pt", ".csv"))}


def assert_same_files(some, others, differ):
    """
    Those of `some` to the last bit, but for what the state files tell of the flags.

    :param differ: the flags whose values differ.
    """
    got, want = checkpoints(some), checkpoints(others)
    for name in got:
        if name.startswith("state"):
            states = [th.load(folder / name, weights_only=True) for folder in (some, others)]
            flags = [state.pop("flags") for state in states]
            assert flags[0].keys() == flags[1].keys()
            assert {flag for flag in flags[0] if flags[0][flag] != flags[1][flag]} == differ, name
            assert_same(*states, name)
        elif name.endswith(".pt"):
            assert got[name] == want[name], name


def test_another_seed_gives_other_weights_and_other_order(tmp_path, images):
    one = train(tmp_path / "1", images, seed=1)
    two = train(tmp_path / "2", images, seed=2)
    assert largest_difference(one["model000000.pt"], two["model000000.pt"]) > 0.1
    assert progress(tmp_path / "1") != progress(tmp_path / "2")


@pytest.mark.parametrize(("use_fp16", "num_workers"), [(False, 1), (True, 0)])
def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, images, use_fp16, num_workers):
    words = dict(
        class_cond=True,
        num_classes=3,
        batch_size=2,
        dropout=0.1,
        schedule_sampler="loss-second-moment",
        max_steps=8,
        save_interval=3,  # a save at step 3 follows 4 of the epoch's 5 batches
        use_fp16=use_fp16,
        num_workers=num_workers,
        seed=1,
    )
    train(tmp_path / "whole", images, **words)
    train(tmp_path / "resumed", images, **words, resume_checkpoint=tmp_path / "whole" / "model000003.pt")
    resumed = checkpoints(tmp_path / "resumed")
    assert sorted(name for name in resumed if name.startswith("model")) == ["model000006.pt", "model000008.pt"]
    assert_same_files(tmp_path / "resumed", tmp_path / "whole", differ={"resume_checkpoint"})
    assert progress(tmp_path / "resumed") == progress(tmp_path / "whole")[4:]


@pytest.mark.parametrize("script", ["image_train", "super_res_train"])
def test_resumed_by_itself_and_few_checkpoints_kept(tmp_path, images, script):
    """The same command line twice: what is left is what one longer run leaves."""
    sizes = dict(image_size=None, large_size=8, small_size=4) if script == "super_res_train" else {}
    words = dict(sizes, script=script, save_interval=2, keep_checkpoints=2, resume_checkpoint="auto", seed=1)
    train(tmp_path / "whole", images, **words, max_steps=6)
    assert {name for name in checkpoints(tmp_path / "whole") if "model" in name} == {"model000004.pt", "model000006.pt"}
    for max_steps in (3, 6):
        train(tmp_path / "parts", images, **words, max_steps=max_steps)
    assert checkpoints(tmp_path / "parts").keys() == checkpoints(tmp_path / "whole").keys()
    assert_same_files(tmp_path / "parts", tmp_path / "whole", differ=set())
    assert progress(tmp_path / "parts") == progress(tmp_path / "whole")
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert "max_steps is 6 from here on, and was 3 in the checkpoint" in log
    assert f"no checkpoint in {tmp_path / 'parts'} yet: a new run starts" in log
    assert re.search(r"^rank 0 of 1, on \S+ of \S+; started by no launcher$", log, re.M)
    flags_kept = th.load(tmp_path / "parts" / "state000006.pt", weights_only=True)["flags"]
    assert flags_kept["max_steps"] == 6 and flags_kept["seed"] == 1 and flags_kept["data_dir"] == str(images)


@pytest.mark.slow
def test_one_seed_twice_gives_the_same_files_to_the_last_bit(server, tmp_path, images):
    """In this process and in another."""

    def in_a_process(name, words, logdir):
        process = server.start(ROOT / "scripts" / f"{name}.py", words, OPENAI_LOGDIR=logdir)
        finish([process])
        return process.status

    common = dict(TINY, image_size=8, class_cond=True, num_classes=3, learn_sigma=True)
    training = dict(common, data_dir=images, batch_size=4, dropout=0.1, max_steps=5, save_interval=3, ema_rate=0.9)
    sampling = dict(common, num_samples=5, batch_size=3, timestep_respacing=4)
    for run, start in (("one", in_a_process), ("two", run_script)):
        assert start("image_train", flags(**training, seed=7), tmp_path / run) == 0
        weights = tmp_path / run / "ema_0.9_000005.pt"
        assert start("image_sample", flags(**sampling, seed=8, model_path=weights), tmp_path / run / "samples") == 0
    one, two = snapshot(tmp_path / "one"), snapshot(tmp_path / "two")
    assert {"model000005.pt", "opt000005.pt", "state000005.pt", "ema_0.9_000005.pt", "progress.csv"} <= one.keys()
    assert "samples/samples_5x8x8x3.npz" in one
    for log in ("log.txt", "samples/log.txt"):  # it has the folder's name in it, and images/s
        assert without_rates(one.pop(log).replace(b"/one", b"/two")) == without_rates(two.pop(log))
    assert progress(tmp_path / "one") == progress(tmp_path / "two")
    del one["progress.csv"], two["progress.csv"]
    assert one == two


def without_rates(log):
    return re.sub(rb"\| images/s +\| \S+ +\|\n|: about .* at the rate of the first batch", b"", log)


@pytest.mark.parametrize("script", ["image", "super_res"])
def test_a_model_of_the_velocity_is_trained_and_used(tmp_path, images, script):
    """config.json has all flags of the run; other scripts take what the model predicts from it, and nothing warns."""
    sizes = dict(image_size=8) if script == "image" else dict(image_size=None, large_size=8, small_size=4)
    new = dict(
        predict_v=True,
        loss_weighting="min_snr",
        min_snr_gamma=4.0,
        grad_clip=0.1,
        lr_warmup_steps=3,
        ema_warmup=True,
    )
    run = tmp_path / "run"
    train(run, images, f"{script}_train", **sizes, learn_sigma=True, ema_rate=0.9999, preview_samples=1, **new)
    saved = json.loads((run / "config.json").read_text())["flags"]
    assert {name: saved[name] for name in new} == new
    assert {path.name for path in run.glob("*.png")} == {"preview_000002.png", "preview_000004.png"}  # of the average
    assert all(0 <= float(row["clipped"]) <= 1 for row in progress(run))
    common = flags(model_path=run / "ema_0.9999_000004.pt", seed=0, batch_size=2, num_samples=2)
    others = {"super_res_sample": ["--base_samples", str(images)]}
    if script == "image":
        data = ["--data_dir", str(images), "--num_workers", "0"]
        others = {"image_sample": [], "image_nll": data, "plan_timesteps": [*data, "--steps", "4"]}
    for name, words in others.items():
        assert run_script(name, [*common, *words], tmp_path / name) == 0
        assert "WARNING" not in (tmp_path / name / "log.txt").read_text()
    name = f"{script}_sample"
    words = [*common, *others[name], "--predict_v", "False"]
    assert run_script(name, words, tmp_path / "of noise") == 0
    assert "WARNING: --predict_v False" in (tmp_path / "of noise" / "log.txt").read_text()
    drawn = [dict(np.load(next((tmp_path / folder).glob("*.npz"))))["arr_0"] for folder in (name, "of noise")]
    assert not np.array_equal(*drawn)


# ---------------------------------------------------------------- sampling


@pytest.fixture
def steps_taken(monkeypatch):
    """Counts the steps that sampling takes, by kind."""
    counts = collections.Counter()

    def count(name):
        method = getattr(GaussianDiffusion, name)

        def counted(self, *args, **kwargs):
            counts[name] += 1
            return method(self, *args, **kwargs)

        monkeypatch.setattr(GaussianDiffusion, name, counted)

    count("p_sample")
    count("ddim_sample")
    return counts


@pytest.mark.parametrize("channels", [1, 3])
def test_exactly_num_samples_are_written(tmp_path, steps_taken, channels):
    weights = save_weights(tmp_path / "model.pt", image_channels=channels)
    name, arrays = sample(tmp_path / "log", weights, image_channels=channels)
    assert name == f"samples_5x8x8x{channels}.npz"
    assert list(arrays) == ["arr_0"]
    assert (arrays["arr_0"].dtype, arrays["arr_0"].shape) == (np.uint8, (5, 8, 8, channels))
    assert len({image.tobytes() for image in arrays["arr_0"]}) == 5
    assert steps_taken == {"p_sample": 3 * 4}  # batches of 2, 2 and 1, four steps each


@pytest.mark.parametrize(("respacing", "steps"), [("", 24), ("6", 6), ("2,3", 5), ("ddim8", 8)])
@pytest.mark.parametrize("use_ddim", [False, True])
def test_use_ddim_and_timestep_respacing(tmp_path, steps_taken, use_ddim, respacing, steps):
    weights = save_weights(tmp_path / "model.pt")
    sample(tmp_path / "log", weights, use_ddim=use_ddim, timestep_respacing=respacing, num_samples=2)
    assert steps_taken == {"ddim_sample" if use_ddim else "p_sample": steps}


def test_use_ddim_is_the_sampler_ddim(tmp_path):
    weights, common = save_weights(tmp_path / "model.pt"), dict(num_samples=2, timestep_respacing=4, seed=2)
    words = dict(old=dict(use_ddim=True), new=dict(sampler="ddim"), other=dict(sampler="ancestral"))
    found = {name: sample(tmp_path / name, weights, **common, **more)[1]["arr_0"] for name, more in words.items()}
    np.testing.assert_array_equal(found["old"], found["new"])
    assert (found["new"] != found["other"]).any()


@pytest.mark.parametrize("script", ["image_sample", "super_res_sample"])
def test_a_solver_takes_sampling_steps(tmp_path, monkeypatch, script):
    """With a seed in batches of any size, each evaluating the network as often as asked."""
    words, calls = dict(sampler="dpm++2m-sde", sampling_steps=3, timestep_respacing=None, seed=3), []
    if script == "super_res_sample":
        np.savez(tmp_path / "base.npz", np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8))
        words.update(image_size=None, large_size=8, small_size=4, base_samples=tmp_path / "base.npz")
    weights = save_weights(tmp_path / "model.pt", super_resolution=script == "super_res_sample", fill=0.02)
    forward = UNetModel.forward

    def counted(self, x, *args, **kwargs):
        calls.append(len(x))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNetModel, "forward", counted)
    _, two = sample(tmp_path / "two", weights, script, **words)
    assert calls == [2] * 3 + [2] * 3 + [1] * 3
    _, five = sample(tmp_path / "five", weights, script, **words, batch_size=5)
    assert np.abs(two["arr_0"].astype(int) - five["arr_0"]).max() <= 1
    _, ode = sample(tmp_path / "ode", weights, script, **words, eta=0)
    assert (ode["arr_0"] != two["arr_0"]).any()


@pytest.mark.parametrize("num_classes", [1, 3])
def test_labels_are_drawn_among_num_classes_and_written(tmp_path, num_classes):
    words = dict(class_cond=True, num_classes=num_classes)
    weights = save_weights(tmp_path / "model.pt", **words)
    _, arrays = sample(tmp_path / "log", weights, **words, num_samples=40, batch_size=16, timestep_respacing=1, seed=0)
    assert (arrays["arr_0"].shape, arrays["arr_1"].dtype) == ((40, 8, 8, 3), np.int64)
    assert set(arrays["arr_1"].tolist()) == set(range(num_classes))


def test_clip_denoised_is_honoured(tmp_path):
    weights = save_weights(tmp_path / "model.pt", fill=0.02)
    words = dict(seed=3, timestep_respacing=24)
    _, clipped = sample(tmp_path / "clipped", weights, **words)
    _, free = sample(tmp_path / "free", weights, **words, clip_denoised=False)
    assert (clipped["arr_0"] != free["arr_0"]).any()


@pytest.mark.parametrize("script", ["image_sample", "super_res_sample"])
def test_sampling_drops_nothing_out(tmp_path, script):
    words = dict(seed=3)
    if script == "super_res_sample":
        np.savez(tmp_path / "base.npz", np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8))
        words.update(image_size=None, large_size=8, small_size=4, base_samples=tmp_path / "base.npz")
    weights = save_weights(tmp_path / "model.pt", super_resolution=script == "super_res_sample", fill=0.02)
    _, without = sample(tmp_path / "without", weights, script, **words)
    _, dropout = sample(tmp_path / "with", weights, script, **words, dropout=0.9)
    np.testing.assert_array_equal(without["arr_0"], dropout["arr_0"])


def test_seeds_of_samples(tmp_path):
    weights = save_weights(tmp_path / "model.pt")
    drawn = {seed: sample(tmp_path / f"{seed}", weights, seed=seed)[1]["arr_0"] for seed in (1, 2)}
    again = sample(tmp_path / "again", weights, seed=1)[1]["arr_0"]
    np.testing.assert_array_equal(drawn[1], again)
    assert (drawn[1] != drawn[2]).any()


@pytest.mark.parametrize("precision", ["use_fp16", "use_bf16"])
@pytest.mark.parametrize("script", ["image_sample", "super_res_sample", "image_nll"])
def test_a_network_that_overflows_ends_in_one_line(tmp_path, capfd, images, script, precision):
    weights = save_weights(tmp_path / "model.pt", script == "super_res_sample", fill=1e35)
    words = {**SAMPLE, "model_path": weights, precision: True}
    if script == "super_res_sample":
        np.savez(tmp_path / "base.npz", np.zeros((5, 4, 4, 3), np.uint8))
        del words["image_size"]
        words.update(large_size=8, small_size=4, base_samples=tmp_path / "base.npz")
    if script == "image_nll":
        words.update(data_dir=images, num_workers=0)
    assert run_script(script, flags(**words), tmp_path / "log") == 2
    err = capfd.readouterr().err
    assert err.startswith(f"{script}.py: error: --model_path {weights}: ") and err.count("\n") == 1
    assert ("use_bf16 True" in err) == (precision == "use_fp16")
    assert {path.name for path in (tmp_path / "log").iterdir()} <= {"log.txt", "progress.csv"}


@pytest.mark.parametrize("save_images", [False, True])
@pytest.mark.parametrize("stage", ["sampling", "pictures"])
@pytest.mark.parametrize("script", ["image_sample", "super_res_sample"])
def test_interrupted_samples_continue(tmp_path, capfd, script, stage, save_images):
    words = dict(seed=3, save_images=save_images)
    if script == "super_res_sample":
        base = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
        np.savez(tmp_path / "base.npz", base)
        words.update(image_size=None, large_size=8, small_size=4, base_samples=tmp_path / "base.npz")
    weights = save_weights(tmp_path / "model.pt", script == "super_res_sample", fill=0.02)
    sample(tmp_path / "whole", weights, script, **words)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(
            patch, *((generate, "to_uint8", 1) if stage == "sampling" else (arrays, "write_pngs", 2 * save_images))
        )
        given = {k: v for k, v in {**SAMPLE, "model_path": weights, **words}.items() if v is not None}
        assert run_script(script, flags(**given), tmp_path / "parts") == 128 + signal.SIGINT
    out, err = capfd.readouterr()
    assert err == f"{script}.py: error: interrupted\n"
    assert f"the same command with log_dir {tmp_path / 'parts'} continues" in out
    sample(tmp_path / "parts", weights, script, **words)
    kept = [{k: v for k, v in snapshot(tmp_path / run).items() if k != "log.txt"} for run in ("whole", "parts")]
    assert kept[0] == kept[1] and "parts-" not in str(kept[1].keys())


def interrupt_after(patch, module, name, count):
    """Ctrl-C at a later call of a function than the first `count`."""
    function, calls = getattr(module, name), itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == count:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    patch.setattr(module, name, interrupted)


def test_interrupted_likelihood_continues(tmp_path, capfd, images):
    weights = save_weights(tmp_path / "model.pt", channel_mult="1", fill=0.02)
    words = dict(channel_mult="1", timestep_respacing=6, seed=3)
    whole = measure(capfd, tmp_path / "whole", images, weights, **words)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        interrupt_after(patch, GaussianDiffusion, "calc_bpd_loop", 2)
        measure(capfd, tmp_path / "parts", images, weights, **words)
    parts = measure(capfd, tmp_path / "parts", images, weights, **words)
    assert parts[:2] == whole[:2]
    assert snapshot(tmp_path / "parts").keys() == snapshot(tmp_path / "whole").keys()
    for name, values in whole[2].items():
        np.testing.assert_array_equal(parts[2][name], values)


@pytest.mark.parametrize("name", ["model000002.pt", "ema_0.9_000002.pt"])
def test_a_checkpoint_of_float16_training_draws_samples(tmp_path, images, name):
    train(tmp_path / "run", images, use_fp16=True, max_steps=2)
    _, arrays = sample(tmp_path / "samples", tmp_path / "run" / name)
    assert arrays["arr_0"].shape == (5, 8, 8, 3)


# ---------------------------------------------------------------- likelihood


def measure(capfd, logdir, data, weights, **changed):
    """:return: (images, bits per dimension) that image_nll prints, and the arrays of its files."""
    words = dict(TINY, image_size=8, data_dir=data, model_path=weights, batch_size=4, num_workers=0)
    assert run_script("image_nll", flags(**{**words, **changed}), logdir) == 0
    found = re.search(r"total bpd over (\d+) images?: (\d+\.\d+) bits/dim", capfd.readouterr().out)
    terms = {path.stem: np.load(path)["arr_0"] for path in logdir.glob("*.npz")}
    return int(found[1]), float(found[2]), terms


@pytest.mark.parametrize(("respacing", "steps"), [("", 24), ("6", 6)])
def test_nll_prints_a_total_and_writes_its_terms(tmp_path, capfd, images, respacing, steps):
    weights = save_weights(tmp_path / "model.pt", learn_sigma=True, channel_mult="1", fill=0.02)
    words = dict(learn_sigma=True, timestep_respacing=respacing, channel_mult="1", dropout=0.5)  # which must be off
    count, total, terms = measure(capfd, tmp_path / "log", images, weights, **words, seed=4)
    assert count == 10
    assert sorted(terms) == ["mse_terms", "vb_terms", "xstart_mse_terms"]
    assert all(values.shape == (steps,) and np.isfinite(values).all() for values in terms.values())

    # the same by hand
    model, diffusion = create_model_and_diffusion(
        **{**model_and_diffusion_defaults(), **TINY, "image_size": 8, **words}
    )
    model.load_state_dict(th.load(weights, weights_only=True))
    data = load_data_once(data_dir=str(images), batch_size=4, image_size=8, num_workers=0)
    numbers = iter([range(4), range(4, 8), range(8, 10)])  # the noise is of the image's number
    batches = [diffusion.calc_bpd_loop(model.eval(), x, noise_fn=SampleNoise(4, next(numbers))) for x, _ in data]
    joined = {key: th.cat([batch[key] for batch in batches]) for key in ("total_bpd", "vb", "mse", "xstart_mse")}
    assert total == pytest.approx(joined["total_bpd"].mean().item(), abs=6e-5)
    for key in ("vb", "mse", "xstart_mse"):
        np.testing.assert_allclose(terms[f"{key}_terms"], joined[key].double().mean(dim=0), rtol=1e-5)


def test_with_a_seed_the_likelihood_does_not_depend_on_the_batch_size(tmp_path, capfd, images):
    weights = save_weights(tmp_path / "model.pt", channel_mult="1", fill=0.02)
    words = dict(channel_mult="1", timestep_respacing=6)
    found = {}
    for batch_size, num_workers in ((1, 0), (3, 1), (10, 0)):
        logdir = tmp_path / f"{batch_size}"
        _, _, found[batch_size] = measure(
            capfd, logdir, images, weights, **words, seed=4, batch_size=batch_size, num_workers=num_workers
        )
    _, _, other = measure(capfd, tmp_path / "other", images, weights, **words, seed=5)
    for key, values in found[10].items():
        np.testing.assert_allclose(found[1][key], values, rtol=1e-5)
        np.testing.assert_allclose(found[3][key], values, rtol=1e-5)
        assert np.abs(other[key] / values - 1).max() > 1e-4


@pytest.mark.parametrize("script", ["image_sample", "super_res_sample"])
def test_with_a_seed_samples_do_not_depend_on_the_batch_size(tmp_path, script):
    words = dict(seed=3, class_cond=True, num_classes=4)
    if script == "super_res_sample":
        np.savez(
            tmp_path / "base.npz",
            np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8),
            np.arange(5) % 4,
        )
        words.update(image_size=None, large_size=8, small_size=4, base_samples=tmp_path / "base.npz")
    weights = save_weights(
        tmp_path / "model.pt", super_resolution=script == "super_res_sample", fill=0.02, class_cond=True, num_classes=4
    )
    _, want = sample(tmp_path / "5", weights, script, **words, batch_size=5)
    for batch_size in (1, 2):
        _, got = sample(tmp_path / f"{batch_size}", weights, script, **words, batch_size=batch_size)
        np.testing.assert_array_equal(got["arr_1"], want["arr_1"])
        # networks may round otherwise in batches of another size
        assert np.abs(got["arr_0"].astype(int) - want["arr_0"]).max() <= 1


def test_help_under_a_launcher(monkeypatch, tmp_path, capfd):
    """It ends before the ranks meet, and well."""
    monkeypatch.setattr(sys, "argv", ["scripts/image_sample.py", "--help"])
    for name, value in dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    parser.run(load_script("image_sample").main)
    out, err = capfd.readouterr()
    assert err == "" and "--model_path" in out


@pytest.mark.parametrize(("num_samples", "counted"), [(1, 1), (7, 7), (1000, 10)])
def test_nll_measures_each_image_once_and_num_samples_at_most(tmp_path, capfd, images, num_samples, counted):
    weights = save_weights(tmp_path / "model.pt", class_cond=True, num_classes=3)
    count, _, _ = measure(
        capfd,
        tmp_path / "log",
        images,
        weights,
        class_cond=True,
        num_classes=3,
        num_samples=num_samples,
        timestep_respacing=2,
        num_workers=1,
    )
    assert count == counted


@pytest.mark.slow
def test_the_bound_falls_when_the_model_is_trained_longer(tmp_path, capfd):
    data = write_images(tmp_path / "data", count=32, channels=1)
    words = dict(image_channels=1, learn_sigma=True, channel_mult="1", attention_resolutions="1000")
    train(tmp_path / "run", data, **words, batch_size=16, max_steps=40, save_interval=20, log_interval=1000, seed=1)
    words.update(batch_size=16, num_samples=16, seed=1)
    bits = []
    for step in (0, 20, 40):
        weights = tmp_path / "run" / f"model{step:06d}.pt"
        bits.append(measure(capfd, tmp_path / f"{step}", data, weights, **words)[1])
    assert bits[0] > bits[1] + 1 and bits[1] > bits[2], bits


# ---------------------------------------------------------------- super-resolution


SUPER = dict(TINY, image_size=None, large_size=16, small_size=8)


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    """Crops of scikit-learn's two photographs, 32x32 pixels, six of each."""
    folder = tmp_path_factory.mktemp("crops")
    from sklearn.datasets import load_sample_images

    for name, photograph in zip("ab", load_sample_images().images, strict=True):
        for i in range(6):
            top, left = 60 * i, 90 * i
            Image.fromarray(photograph[top : top + 32, left : left + 32]).save(folder / f"{name}_{i}.png")
    return folder


def low_res_of(crops):
    """The crops scaled down to 8x8 by averaging, as uint8 [12, 8, 8, 3]."""
    loaded = [np.asarray(Image.open(path), dtype=np.float64) for path in sorted(crops.iterdir())]
    return np.stack(loaded).reshape(12, 8, 4, 8, 4, 3).mean(axis=(2, 4)).round().astype(np.uint8)


def copying_weights(path, **changed):
    """
    Weights with which a model of COPYING's flags predicts the normalised low_res image, whatever the noisy one is:
    the first layer keeps z and -z of each colour, the last block takes them from its skip connection, and
    silu(z) - silu(-z) = z.
    """
    words = {**sr_model_and_diffusion_defaults(), **COPYING, **changed}
    model, _ = sr_create_model_and_diffusion(**{k: v for k, v in words.items() if v is not None})
    with th.no_grad():
        for p in model.parameters():
            p.zero_()
        join = model.output_blocks[-1][0].skip_connection.weight
        for i in range(32):
            join[i, 32 + i] = 1
        model.out[0].weight.fill_(1)
        for colour in range(3):
            for i, sign in ((2 * colour, 1), (2 * colour + 1, -1)):
                model.input_blocks[0][0].weight[i, 3 + colour, 1, 1] = sign
                model.out[2].weight[colour, i, 1, 1] = 0.3 * sign
    th.save(model.state_dict(), path)
    return path


COPYING = dict(SUPER, channel_mult="1", attention_resolutions="1000", predict_xstart=True)


def correlations(samples, base):
    """[N, M]: of each sample, scaled down, with each image of the base."""
    small = samples.reshape(-1, 8, 2, 8, 2, 3).mean(axis=(2, 4))

    def normalised(x):
        x = x.astype(np.float64) - x.mean(axis=(1, 2), keepdims=True)
        return (x / (x.std(axis=(1, 2), keepdims=True) + 1e-6)).reshape(len(x), -1) / np.sqrt(64 * 3)

    return normalised(small) @ normalised(base).T


@pytest.mark.parametrize("use_ddim", [False, True])
@pytest.mark.parametrize("class_cond", [False, True])
def test_the_output_keeps_the_order_and_the_labels_of_its_input(tmp_path, steps_taken, crops, use_ddim, class_cond):
    base, labels = low_res_of(crops), np.arange(12) * 5 % 12
    np.savez(tmp_path / "base.npz", base, labels)
    words = dict(COPYING, class_cond=class_cond, num_classes=12)
    weights = copying_weights(tmp_path / "model.pt", **words)
    words.update(base_samples=tmp_path / "base.npz", num_samples=17, batch_size=5, use_ddim=use_ddim)
    name, arrays = sample(tmp_path / "log", weights, script="super_res_sample", **words)
    assert name == "samples_17x16x16x3.npz"
    similar = correlations(arrays["arr_0"], base)
    expected = [*range(12), *range(5)]  # once through, and again from the beginning
    assert similar.argmax(axis=1).tolist() == expected
    assert similar[range(17), expected].min() > 0.95
    assert steps_taken == {"ddim_sample" if use_ddim else "p_sample": 4 * 4}
    if class_cond:
        assert arrays["arr_1"].tolist() == labels[expected].tolist()
    else:
        assert list(arrays) == ["arr_0"]


def test_each_image_of_a_folder_is_enlarged_once(tmp_path, steps_taken, crops):
    """Not 10,000 images in all."""
    weights = copying_weights(tmp_path / "model.pt", **COPYING)
    words = dict(COPYING, base_samples=crops, batch_size=5, num_samples=None)
    count = len(list(crops.iterdir()))
    name, _ = sample(tmp_path / "log", weights, script="super_res_sample", **words)
    assert name == f"samples_{count}x16x16x3.npz"
    assert not (tmp_path / "log" / "first_samples.png").exists()
    log = (tmp_path / "log" / "log.txt").read_text()
    assert f"{count} samples of 4 evaluations: about " in log and "first_samples.png" in log


@pytest.mark.parametrize("channels", [1, 3])
def test_super_resolution_from_photographs_and_from_samples(tmp_path, crops, channels):
    words = dict(SUPER, image_channels=channels, class_cond=True, num_classes=2, use_fp16=channels == 1)
    saved = train(tmp_path / "run", crops, script="super_res_train", **words)
    assert {"model000004.pt", "ema_0.9_000004.pt", "opt000004.pt", "state000004.pt"} <= saved.keys()
    assert saved["model000004.pt"]["input_blocks.0.0.weight"].shape[1] == 2 * channels
    assert largest_difference(saved["model000000.pt"], saved["model000004.pt"]) > 0

    small = dict(image_channels=channels, class_cond=True, num_classes=2)
    name, base = sample(tmp_path / "small", save_weights(tmp_path / "model.pt", **small), **small)
    words.update(base_samples=tmp_path / "small" / name, batch_size=3, timestep_respacing="ddim4", use_ddim=True)
    trained = tmp_path / "run" / "ema_0.9_000004.pt"
    name, large = sample(tmp_path / "large", trained, script="super_res_sample", **words)
    assert name == f"samples_5x16x16x{channels}.npz"
    assert large["arr_0"].shape == (5, 16, 16, channels)
    assert large["arr_1"].tolist() == base["arr_1"].tolist()


def test_super_resolution_is_trained_on_images_of_both_sizes(monkeypatch, tmp_path, crops):
    batches = []

    class Spy(TrainLoop):
        def run_loop(self):
            batches.append(next(self.data))

    monkeypatch.setattr(loop, "TrainLoop", Spy)
    train(tmp_path, crops, script="super_res_train", **{**SUPER, "small_size": 2}, class_cond=True, num_classes=2)
    ((x, cond),) = batches
    assert (x.shape, cond["low_res"].shape, cond["y"].shape) == ((4, 3, 16, 16), (4, 3, 2, 2), (4,))


# ---------------------------------------------------------------- digits and pictures


def test_digits_are_drawn_end_to_end(tmp_path, capfd):
    """What `make demo` does, with fewer steps."""
    from sklearn.datasets import load_digits

    folder = tmp_path / "digits"
    assert run_script("prepare", ["digits", str(folder)], tmp_path / "log") == 0
    assert f"wrote 1,797 images of 10 classes to {folder}" in capfd.readouterr().out
    digits = load_digits()
    names = [f"{label}_{i:05d}.png" for i, label in enumerate(digits.target)]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    with Image.open(folder / names[3]) as image:
        assert (image.mode, image.size) == ("L", (16, 16))
        small = np.asarray(image, dtype=float).reshape(8, 2, 8, 2).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), digits.images[3].ravel())[0, 1] > 0.95

    model = dict(image_size=16, image_channels=1, class_cond=True, num_classes=10)
    train(tmp_path / "run", folder, **model, max_steps=1)
    weights = tmp_path / "run" / "ema_0.9_000000.pt"  # one step is saved as step 0
    name, arrays = sample(tmp_path / "samples", weights, **model, num_samples=30, batch_size=30, seed=1)
    assert name == "samples_30x16x16x1.npz"

    classes = np.unique(arrays["arr_1"])
    with Image.open(tmp_path / "samples" / "samples_30x16x16x1.png") as image:
        pixels = np.asarray(image)
    longest = max(np.sum(arrays["arr_1"] == label) for label in classes)
    assert pixels.shape == (len(classes) * 98 + 2, longest * 98 + 2)  # 16 pixels six times enlarged, and gaps of 2
    for row, label in enumerate(classes):
        of_class = arrays["arr_0"][arrays["arr_1"] == label, ..., 0]
        for column in range(longest):
            cell = pixels[2 + row * 98 : 98 + row * 98, 2 + column * 98 : 98 + column * 98]
            expected = of_class[column] if column < len(of_class) else np.full((16, 16), 255)
            np.testing.assert_array_equal(cell[1::6, 1::6], expected)


def test_an_unusable_output_ends_in_one_line(tmp_path, capfd):
    file = tmp_path / "file"
    file.touch()
    assert run_script("prepare", ["digits", str(file)], tmp_path) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"error: {file}: " in err
