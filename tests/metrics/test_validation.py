"""Held-out images during training: the values are right and comparable, and the run is as without them."""

import csv
import os
import signal

import numpy as np
import pytest
import torch as th
from harness import TINY, TRAIN, build, flags, noisy_network, run_on_ranks, run_script, write_images
from training import assert_same, checkpoint_names, latest, load, train

from improved_diffusion.inference.generate import SampleNoise
from improved_diffusion.metrics import validation
from improved_diffusion.metrics.validation import create_validation
from improved_diffusion.options import TrainOptions
from improved_diffusion.training.checkpoints import rng_state
from improved_diffusion.utils.errors import InputError


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "images", count=8)


@pytest.fixture
def held_out(tmp_path):
    return write_images(tmp_path / "held out", count=11)


def options_of(held_out, **changed):
    return TrainOptions().replace(**{**TRAIN, "valid_dir": str(held_out), "data_dir": "elsewhere", **changed})


def go_on():
    return False


@pytest.mark.parametrize(
    "changed", [{}, {"learn_sigma": True}, {"use_kl": True}, {"class_cond": True, "num_classes": 2}]
)
def test_the_values_are_those_of_the_diffusion_on_the_same_draws(held_out, changed):
    model, diffusion = noisy_network(**changed)
    measure = create_validation(options_of(held_out, **changed), diffusion, None)
    numbers = [number for batch, _, _ in measure.batches for number in batch]
    x, cond = th.cat([x for _, x, _ in measure.batches]), {}
    if "class_cond" in changed:
        cond["y"] = th.cat([c["y"] for _, _, c in measure.batches])
        assert sorted(cond["y"].tolist()) == [0] * 6 + [1] * 5
    assert numbers == list(range(11)) and x.shape == (11, 3, 8, 8)
    with th.no_grad():
        noise_fn, losses = SampleNoise(0, numbers), []
        for draw in range(4):
            t = th.tensor([measure.timestep(number, draw) for number in numbers])
            terms = diffusion.training_losses(model.eval(), x, t, model_kwargs=cond, noise=noise_fn(x))
            losses.append(terms["loss"])
        chain = build(**{**TINY, "image_size": 8, **changed, "timestep_respacing": "20"})[1]
        bounds = chain.calc_bpd_loop(model, x, model_kwargs=cond, noise_fn=SampleNoise(0, numbers))["total_bpd"]
    got = measure(model, None, go_on)
    assert got == pytest.approx({"valid_loss": th.stack(losses).mean().item(), "valid_bpd": bounds.mean().item()}, 1e-4)
    assert measure(model, None, go_on) == got


def test_timesteps_are_spread_evenly(held_out):
    measure = create_validation(options_of(held_out, diffusion_steps=1000), build(diffusion_steps=1000)[1], None)
    t = [measure.timestep(number, draw) for number in range(64) for draw in range(4)]
    counts, _ = np.histogram(t, bins=16, range=(0, 1000))
    assert counts.min() >= 14 and counts.max() <= 18 and min(t) >= 0 and max(t) < 1000


def test_many_images_are_represented_by_some_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(validation, "MAX_IMAGES", 6)
    folder = write_images(tmp_path / "many", count=40, classes=3)
    options = options_of(folder, class_cond=True, num_classes=3)
    measure = create_validation(options, build(diffusion_steps=24)[1], ["a", "b", "c"])
    assert sorted(y for _, _, cond in measure.batches for y in cond["y"].tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [2, 3, 12])
def test_ranks_share_the_work_and_find_the_same(held_out, monkeypatch, size):
    model, diffusion = noisy_network()
    want = create_validation(options_of(held_out), diffusion, None)(model, None, go_on)
    shares = []

    def on_rank(rank):
        measure = create_validation(options_of(held_out), diffusion, None)
        shares.append([number for batch, _, _ in measure.batches for number in batch])
        return measure(model, None, go_on)

    found = run_on_ranks(monkeypatch, size, on_rank)
    assert sorted(number for share in shares for number in share) == list(range(11))
    assert all(values == found[0] for values in found)
    assert found[0] == pytest.approx(want, 1e-5)


def test_the_network_and_random_numbers_stay(held_out):
    model, diffusion = noisy_network(dropout=0.5)
    model.train()
    model.out.eval()  # as of a fine-tuning that freezes a part
    modes, before = [module.training for module in model.modules()], rng_state()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    measure = create_validation(options_of(held_out), diffusion, None)
    for stopped, count in ((go_on, 2), (lambda: True, 0)):
        assert len(measure(model, None, stopped)) == count
        assert [module.training for module in model.modules()] == modes
        assert_same(rng_state(), before)
        assert_same(dict(model.state_dict()), state)
    assert all(p.grad is None for p in model.parameters())


def test_a_compiled_network_is_not_compiled_again(held_out, monkeypatch):
    model, diffusion = noisy_network()
    want = create_validation(options_of(held_out), diffusion, None)(model, None, go_on)

    def fail(*args, **kwargs):
        raise AssertionError("compiled")

    model.compile(backend=fail)
    assert create_validation(options_of(held_out), diffusion, None)(model, None, go_on) == want


@pytest.mark.parametrize("where", ["the same", "inside", "around"])
def test_training_images_are_not_held_out(tmp_path, capfd, where):
    images = write_images(tmp_path / "all" / "train")
    data, valid = {"the same": (images, images), "inside": (tmp_path / "all", images)}.get(
        where, (images, tmp_path / "all")
    )
    assert run_script("image_train", flags(**TRAIN, data_dir=data, valid_dir=valid), tmp_path / "log") == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and f"--valid_dir {valid}" in err and str(data) in err
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("problem", ["missing", "class"])
def test_held_out_images_that_do_not_fit_are_refused(tmp_path, images, held_out, problem):
    valid = tmp_path / "none" if problem == "missing" else write_images(tmp_path / "more", classes=3)
    options = options_of(valid, class_cond=True, num_classes=4)
    with pytest.raises(InputError, match="none" if problem == "missing" else "the class c"):
        create_validation(options, build(diffusion_steps=24)[1], ["a", "b"])


# ---------------------------------------------------------------- in a run


def run(folder, images, script="image_train", **changed):
    words = {**TRAIN, "max_steps": 6, "log_interval": 2, "seed": 0, "dropout": 0.1, "data_dir": images, **changed}
    assert run_script(script, flags(**{k: v for k, v in words.items() if v != ""}), folder) == 0


def rows(folder):
    """progress.csv as text, without images/s; its header."""
    with open(folder / "progress.csv", newline="") as f:
        reader = csv.DictReader(f)
        found = [{k: v for k, v in row.items() if v and k != "images/s"} for row in reader]
        return found, reader.fieldnames


def without(row):
    return {k: v for k, v in row.items() if not k.startswith("valid_")}


def test_a_run_is_as_without_and_has_the_values_at_its_checkpoints(tmp_path, images, held_out):
    run(tmp_path / "plain", images)
    run(tmp_path / "valid", images, valid_dir=held_out)
    for name in checkpoint_names(tmp_path / "plain"):
        if not name.startswith("state"):  # which names the flags
            assert_same(load(tmp_path / "valid" / name), load(tmp_path / "plain" / name), name)
    for name in ("state000002.pt", "state000006.pt"):
        got, want = load(tmp_path / "valid" / name), load(tmp_path / "plain" / name)
        assert_same({**got, "flags": 0}, {**want, "flags": 0})
    (got, columns), (want, original) = rows(tmp_path / "valid"), rows(tmp_path / "plain")
    assert columns == [*original, "valid_bpd", "valid_loss"]
    assert [without(row) for row in got if row["step"] != "6"] == want
    log = (tmp_path / "valid" / "log.txt").read_text()
    assert log.count(" held-out images...") == 4  # it may take minutes
    assert {row["step"]: len(row) - len(without(row)) for row in got} == {"0": 2, "2": 2, "4": 2, "6": 2}
    assert got[-1]["samples"] == str(6 * 4)


def test_the_bound_is_what_image_nll_finds(tmp_path, images, held_out, capfd):
    run(tmp_path / "a", images, valid_dir=held_out)
    row = rows(tmp_path / "a")[0][1]
    words = dict(model_path=tmp_path / "a" / "model000002.pt", data_dir=held_out, seed=0, num_samples=64, batch_size=4)
    assert run_script("image_nll", flags(**words, timestep_respacing=20, num_workers=0), tmp_path / "nll") == 0
    assert f"total bpd over 11 images: {float(row['valid_bpd']):.4f} bits/dim" in capfd.readouterr().out


def test_a_resumed_run_finds_the_same(tmp_path, images, held_out):
    run(tmp_path / "whole", images, valid_dir=held_out)
    run(tmp_path / "parts", images, valid_dir=held_out, max_steps=4)
    assert rows(tmp_path / "parts")[0][-1]["step"] == "4"  # of the closing checkpoint
    run(tmp_path / "parts", images, valid_dir=held_out, seed=9, resume_checkpoint="auto")
    want = rows(tmp_path / "whole")
    assert [len(row) - len(without(row)) for row in want[0]] == [2, 2, 2, 2]
    assert rows(tmp_path / "parts") == want
    run(tmp_path / "parts", images, valid_dir=held_out, resume_checkpoint="auto")  # nothing is left to do
    assert rows(tmp_path / "parts") == want


def test_rows_between_those_of_the_log(tmp_path, images, held_out):
    """At checkpoints that no row of the log falls on, with the statistics left to the next row."""
    run(tmp_path / "plain", images, log_interval=4, save_interval=3, max_steps=9)
    run(tmp_path / "valid", images, log_interval=4, save_interval=3, max_steps=9, valid_dir=held_out)
    got, want = rows(tmp_path / "valid")[0], rows(tmp_path / "plain")[0]
    assert [row["step"] for row in got] == ["0", "3", "4", "6", "8", "9"]
    assert [without(row) for row in got if row["step"] in "048"] == want
    assert sorted(got[1]) == ["samples", "step", "valid_bpd", "valid_loss"]


def test_super_resolution(tmp_path, images, held_out):
    sizes = dict(image_size="", large_size=8, small_size=4)
    run(tmp_path / "a", images, "super_res_train", valid_dir=held_out, **sizes)
    assert float(rows(tmp_path / "a")[0][-1]["valid_bpd"]) > 0


def test_a_signal_ends_the_evaluation(tmp_path):
    """The checkpoint is saved at once, and the row has no values."""

    def measure(model, average, stopped):
        os.kill(os.getpid(), signal.SIGTERM)
        return {} if stopped() else {"valid_loss": 1.0}

    with pytest.raises(SystemExit) as left:
        train(tmp_path, measures=[measure], save_interval=5, max_steps=20)
    assert left.value.code == 0 and os.path.exists(latest(tmp_path))
    assert [row["step"] for row in rows(tmp_path)[0]] == ["0"] and "valid_loss" not in rows(tmp_path)[1]


def test_a_measure_that_fails_loses_no_step(tmp_path):
    def measure(model, average, stopped):
        if model.training and (tmp_path / "model000000.pt").exists():
            raise ValueError("no memory left")
        return {"valid_loss": 1.0}

    with pytest.raises(ValueError, match="no memory left"):
        train(tmp_path, measures=[measure], save_interval=5, max_steps=20)
    assert os.path.basename(latest(tmp_path)) == "model000005.pt"


def test_the_checkpoint_of_a_signal_is_not_evaluated(tmp_path):
    calls = []

    def data():
        for x in range(9):
            if x == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            yield th.zeros(4, 3, 8, 8), {}

    with pytest.raises(SystemExit):
        train(tmp_path, data=data(), measures=[lambda *_: calls.append(1) or {"valid_loss": 1.0}], max_steps=9)
    assert len(calls) == 1  # of step 0
