"""A resumed run: the rest of an uninterrupted one to the last bit, or what the original would do."""

import itertools
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import snapshot, write_images
from hypothesis import example, given, settings
from hypothesis import strategies as st
from training import (
    TinyNet,
    assert_same,
    batches,
    checkpoint_names,
    load,
    make_diffusion,
    make_loop,
    on_one_cpu,
    read_rows,
    train,
)

from improved_diffusion import dist_util, logger, resume_util, train_util
from improved_diffusion.errors import InputError
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel

STEPS = 8


@pytest.fixture(autouse=True)
def one_cpu(monkeypatch):
    on_one_cpu(monkeypatch)
    # one that a network of two parameters does not overflow at
    monkeypatch.setattr(train_util, "INITIAL_LOG_LOSS_SCALE", 8.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Seven images: batches of three leave one over, so that an epoch has two."""
    return write_images(tmp_path_factory.mktemp("images"), count=7)


class Killed(BaseException):
    pass


def killed_after(step):
    """A TrainLoop that dies before it logs or saves anything of the step behind this one."""

    class Dying(TrainLoop):
        def log_step(self):
            if self.step > step:
                raise Killed
            super().log_step()

    return Dying


def run(folder, images, cls=TrainLoop, *, seed=0, net=TinyNet, dropout=0.0, sampler="uniform", workers=0, **parameters):
    """
    A run as image_train.py does it: real images, noise, dropout. Only `seed` sets it apart from another.
    """
    th.manual_seed(seed)
    np.random.seed(seed)
    diffusion = make_diffusion(4, "cosine")
    samplers = {"uniform": UniformSampler, "loss-second-moment": lambda d: LossSecondMomentResampler(d, 2)}
    data = load_data(data_dir=str(images), batch_size=3, image_size=8, num_workers=workers)
    return train(
        folder,
        cls,
        model=net(dropout=dropout),
        diffusion=diffusion,
        data=data,
        schedule_sampler=samplers[sampler](diffusion),
        batch_size=3,
        **parameters,
    )


def small_unet(dropout):
    return UNetModel(3, 32, 3, 1, [], dropout=dropout, channel_mult=(1,))


def latest(folder):
    return str(folder / max(name for name in checkpoint_names(folder) if name.startswith("model")))


def resume(folder, checkpoint=None, **changed):
    """:return: (the loop, the lines that the resumed run added to log.txt)."""
    log = folder / "log.txt"
    before = len(log.read_text()) if log.exists() else 0
    loop = train(folder, resume_checkpoint=checkpoint or latest(folder), **changed)
    return loop, log.read_text()[before:].splitlines()


def assert_continues(folder, whole):
    """All that the uninterrupted run left in `whole` is in `folder` too, to the last bit."""
    for name in checkpoint_names(whole):
        assert_same(load(folder / name), load(whole / name), name)
    assert (folder / "progress.csv").read_text() == (whole / "progress.csv").read_text()


def interrupt_and_resume(folder, images, stop, how, **parameters):
    """STEPS steps in one run and in two, and the two compared."""
    run(folder / "whole", images, max_steps=STEPS, **parameters)
    if how == "ended":
        run(folder / "parts", images, max_steps=stop, **parameters)
    else:
        with pytest.raises(Killed):
            run(folder / "parts", images, killed_after(stop), max_steps=STEPS, **parameters)
    assert os.path.basename(latest(folder / "parts")) < os.path.basename(latest(folder / "whole"))
    loop = run(
        folder / "parts",
        images,
        seed=1,  # which must not matter
        max_steps=STEPS,
        resume_checkpoint=latest(folder / "parts"),
        **parameters,
    )
    assert_continues(folder / "parts", folder / "whole")
    return loop


@pytest.mark.slow
@settings(max_examples=15)
@given(
    stop=st.integers(1, STEPS - 2),
    how=st.sampled_from(["ended", "killed"]),
    save_interval=st.integers(1, 5),
    log_interval=st.integers(1, 4),
    use_fp16=st.booleans(),
    sampler=st.sampled_from(["uniform", "loss-second-moment"]),
    ema_rate=st.sampled_from(["0.9", "0.5,0.99", "0,0.9,0.9999"]),
    microbatch=st.sampled_from([-1, 1, 2]),
    dropout=st.sampled_from([0.0, 0.3]),
    lr_anneal_steps=st.sampled_from([0, STEPS + 3]),
    weight_decay=st.sampled_from([0.0, 0.1]),
)
@example(
    stop=5,
    how="killed",
    save_interval=3,
    log_interval=2,
    use_fp16=True,
    sampler="loss-second-moment",
    ema_rate="0.5,0.99",
    microbatch=2,
    dropout=0.3,
    lr_anneal_steps=STEPS + 3,
    weight_decay=0.1,
)
def test_resumed_is_uninterrupted(images, tmp_path_factory, stop, how, **parameters):
    interrupt_and_resume(tmp_path_factory.mktemp("run"), images, stop, how, **parameters)


@pytest.mark.parametrize(
    "net, parameters",
    [
        (TinyNet, dict(workers=1)),
        (small_unet, dict(dropout=0.1)),
        (small_unet, dict(dropout=0.1, use_fp16=True, microbatch=2)),
    ],
    ids=["worker", "unet", "float16 unet"],
)
def test_real_networks_and_workers(tmp_path, images, net, parameters):
    interrupt_and_resume(tmp_path, images, 5, "killed", net=net, save_interval=3, log_interval=2, **parameters)


def test_overflows_are_counted_on(tmp_path):
    """Twelve before the checkpoint and eight behind it are twenty in a row."""
    nan = dict.fromkeys(range(100), math.nan)
    train(tmp_path, use_fp16=True, data=batches(changes=nan), max_steps=12)
    resumed = dict(use_fp16=True, data=batches(changes=nan), max_steps=100, resume_checkpoint=latest(tmp_path))
    with pytest.raises(train_util.TrainingError, match=r"at step 19 .*model000012.pt"):
        train(tmp_path, **resumed)


@pytest.mark.parametrize("save_interval", [1, 1000])
def test_a_run_that_is_over(tmp_path, save_interval):
    train(tmp_path, max_steps=3, save_interval=save_interval)
    before = {name: data for name, data in snapshot(tmp_path).items() if name != "log.txt"}
    _, lines = resume(tmp_path, max_steps=3, save_interval=save_interval)
    assert {name: data for name, data in snapshot(tmp_path).items() if name != "log.txt"} == before
    assert "saving model..." not in lines


@pytest.mark.parametrize("label, updates", [(2, 3), (4, 4)])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_save_before_the_first_step(tmp_path, label, updates, with_state):
    """As many updates as the checkpoint; a run of the original counts by its label."""
    train(tmp_path, max_steps=4, save_interval=2)
    if not with_state:
        os.remove(tmp_path / f"state{label:06d}.pt")
        updates = label
    with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=[]):
        make_loop(resume_checkpoint=str(tmp_path / f"model{label:06d}.pt")).save()
    (state,) = (tmp_path / "new").glob("state*.pt")
    assert load(state)["updates"] == updates


def test_a_second_run_loop(tmp_path):
    """With a limit raised in between, in one process."""
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
        loop = make_loop(max_steps=2)
        loop.run_loop()
        loop.max_steps = 4
        loop.run_loop()
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]
    assert [name for name in checkpoint_names(tmp_path) if "model" in name] == [
        f"model{label:06d}.pt" for label in (0, 2, 4)
    ]


def test_found_by_means_of_ones_own(tmp_path, monkeypatch):
    """find_resume_checkpoint() has precedence over the parameter."""
    train(tmp_path, max_steps=2)
    monkeypatch.setattr(train_util, "find_resume_checkpoint", lambda: latest(tmp_path))
    assert make_loop(resume_checkpoint=str(tmp_path / "not there.pt")).step == 2


# ---------------------------------------------------------------- what has changed in between


@pytest.mark.parametrize(
    "changed, line",
    [
        (dict(lr=0.5), "lr is 0.5 from here on, and was 0.01 in the checkpoint"),
        (dict(weight_decay=0.25), "weight_decay is 0.25 from here on, and was 0.0 in the checkpoint"),
        (dict(lr=0.5, lr_anneal_steps=8), None),  # it changes by itself
        (dict(), None),
    ],
)
@pytest.mark.parametrize("use_fp16", [False, True])
def test_learning_rate_and_weight_decay(tmp_path, changed, line, use_fp16):
    train(tmp_path, use_fp16=use_fp16)
    loop, lines = resume(tmp_path, use_fp16=use_fp16, max_steps=5, **changed)
    assert [found for found in lines if "from here on" in found] == ([line] if line else [])
    annealed = 1 - 4 / 8 if "lr_anneal_steps" in changed else 1
    group = load(tmp_path / "opt000005.pt")["param_groups"][0]
    assert group["lr"] == loop.opt.param_groups[0]["lr"] == changed.get("lr", 0.01) * annealed
    assert group["weight_decay"] == changed.get("weight_decay", 0)


@pytest.mark.parametrize("before", [False, True])
def test_optimizer_of_another_precision(tmp_path, before):
    train(tmp_path, use_fp16=before)
    with pytest.raises(InputError) as info:
        resume(tmp_path, use_fp16=not before)
    path = tmp_path / "opt000003.pt"
    assert (
        str(info.value)
        == f"{path} does not fit the model's optimizer; a run with use_fp16 {before} would have written it so"
    )


@pytest.mark.parametrize(
    "count, batch_size, warning",
    [
        (7, 3, None),
        (7, 2, "the data cannot continue where it was: batch_size was 3 then and is 2 now"),
        (9, 3, "the data cannot continue where it was: num_images was 7 then and is 9 now"),
    ],
)
def test_other_data(tmp_path, images, count, batch_size, warning):
    """A warning, and training goes on from the data's beginning."""
    run(tmp_path / "run", images, max_steps=2)
    new = load_data(
        data_dir=str(write_images(tmp_path / "images", count=count)),
        batch_size=batch_size,
        image_size=8,
        num_workers=0,
    )
    loop, lines = resume(tmp_path / "run", data=new, batch_size=batch_size, max_steps=4)
    assert [line for line in lines if "cannot continue" in line] == ([warning] if warning else [])
    assert loop.step == 4 and "model000004.pt" in checkpoint_names(tmp_path / "run")


@pytest.mark.parametrize(
    "before, after, warning",
    [
        ((4, 2), (4, 2), None),
        ((4, 2), (4, 3), "the saved loss history is of 4 timesteps with 2 losses each, this sampler's of 4 with 3"),
        ((4, 2), (8, 2), "the saved loss history is of 4 timesteps with 2 losses each, this sampler's of 8 with 2"),
        (None, (4, 2), "'loss_history'"),
        ((4, 2), None, None),
    ],
)
def test_another_timestep_sampler(tmp_path, before, after, warning):
    def setting(numbers):
        diffusion = make_diffusion(numbers[0] if numbers else 4, "cosine")
        sampler = LossSecondMomentResampler(diffusion, numbers[1]) if numbers else UniformSampler(diffusion)
        return dict(diffusion=diffusion, schedule_sampler=sampler)

    train(tmp_path, **setting(before))
    _, lines = resume(tmp_path, max_steps=5, **setting(after))
    expected = [f"the schedule sampler cannot continue where it was: {warning}"] if warning else []
    assert [line for line in lines if "cannot continue" in line] == expected


def test_data_without_a_place(tmp_path):
    """A plain iterator goes on being one."""
    train(tmp_path, data=batches(), max_steps=2)
    assert load(tmp_path / "state000002.pt")["data"] == [None]
    loop, lines = resume(tmp_path, data=itertools.islice(batches(), 2), max_steps=4)
    assert loop.step == 4 and not [line for line in lines if "cannot" in line]


def test_another_number_of_ranks(tmp_path, images):
    """Data and random numbers begin anew, from the seed and the step; what was taken in for the log is not lost."""
    run(tmp_path, images, max_steps=3, save_interval=1000, log_interval=2)
    state = load(tmp_path / "state000003.pt")
    for key in ("rng", "data"):
        state[key] = state[key] * 2
    other = {key: table * 3 for key, table in state["statistics"][0].items()}
    state["statistics"].append(other)
    th.save(state, tmp_path / "state000003.pt")
    drawn = []
    for seed in (0, 7, 7):
        dist_util.seed_everything(seed)
        with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=["log"]):
            loop = make_loop(resume_checkpoint=str(tmp_path / "model000003.pt"))
        drawn.append([th.rand(1).item(), np.random.rand()])
        dist_util.seed_anew(3)
        assert [th.rand(1).item(), np.random.rand()] == drawn[-1]
        assert loop.step == 3
        for key, table in loop._statistics.state_dict().items():
            th.testing.assert_close(table, state["statistics"][0][key] * 4)
    assert drawn[0] != drawn[1] == drawn[2]
    warning = (
        "the checkpoint is of 2 ranks, now there are 1: the data begin anew, and so do the random numbers, "
        "from step 3 and the seed, if one is given"
    )
    assert (tmp_path / "new" / "log.txt").read_text().splitlines().count(warning) == 3


@pytest.fixture(autouse=True)
def no_seed_left(monkeypatch):
    monkeypatch.setattr(dist_util, "_seed", None)


def test_changed_flags_are_told(tmp_path):
    """By name, old and new value; not what has a line of its own, nor what must change or is new."""
    before = dict(batch_size=4, dropout=0.1, seed=None, lr=0.01, weight_decay=0.0, resume_checkpoint="", gone=1)
    train(tmp_path, flags=before)
    for label in (0, 3):
        assert load(tmp_path / f"state{label:06d}.pt")["flags"] == before
    after = dict(
        batch_size=4, dropout=0.3, seed=5, lr=0.5, weight_decay=0.25, resume_checkpoint=latest(tmp_path), new=2
    )
    _, lines = resume(tmp_path, flags=after, max_steps=4)
    assert [line for line in lines if "from here on" in line] == [
        "dropout is 0.3 from here on, and was 0.1 in the checkpoint",
    ]
    assert load(tmp_path / "state000004.pt")["flags"] == after


def test_flags_are_a_copy_and_may_be_missing(tmp_path):
    """A loop of one's own has none, and a state of earlier runs neither."""
    given_flags = {"a": 1}
    loop = make_loop(flags=given_flags)
    given_flags["a"] = 2
    assert loop.flags == {"a": 1} and make_loop().flags == {}
    train(tmp_path)
    state = load(tmp_path / "state000003.pt")
    assert state.pop("flags") == {}
    th.save(state, tmp_path / "state000003.pt")
    _, lines = resume(tmp_path, flags={"a": 1}, max_steps=4)
    assert not [line for line in lines if "from here on" in line]


@pytest.mark.parametrize(
    "content, problem",
    [
        (None, "there is no such file"),
        ({"conv.weight": th.zeros(3, 3, 1, 1)}, "does not fit the model: Missing key"),
        ({"conv.weight": th.zeros(2, 3, 1, 1), "conv.bias": th.zeros(3)}, "does not fit the model: size mismatch"),
        ([1, 2], "does not fit the model: Expected state_dict to be dict-like"),
        ({1: th.zeros(3)}, "does not fit the model"),
    ],
    ids=["missing", "a part", "another size", "a list", "numbered"],
)
def test_not_a_checkpoint_of_this_model(tmp_path, content, problem):
    path = tmp_path / "model000001.pt"
    if content is not None:
        th.save(content, path)
    with pytest.raises(InputError) as info:
        train(tmp_path, resume_checkpoint=str(path))
    assert str(info.value).startswith(str(path)) and problem in str(info.value) and "\n" not in str(info.value)


# ---------------------------------------------------------------- runs of the original, without a state file


@pytest.fixture
def original(tmp_path):
    """What a run of the original over six steps leaves: model, average, optimizer."""
    folder = tmp_path / "original"
    train(folder, max_steps=6)
    for state in folder.glob("state*.pt"):
        os.remove(state)
    return folder


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("limit", ["max_steps", "lr_anneal_steps"])
def test_steps_of_a_resumed_original(tmp_path, limit, use_fp16):
    """Counted from the file's name; the loop's own step from 0, by which it logs and saves."""
    folder = tmp_path / "original"
    train(folder, max_steps=6, use_fp16=use_fp16)
    for state in folder.glob("state*.pt"):
        os.remove(state)
    source = snapshot(folder)
    loop = train(
        tmp_path / "resumed",
        use_fp16=use_fp16,
        log_interval=2,
        save_interval=3,
        resume_checkpoint=latest(folder),
        **{"max_steps": 0, limit: 11},
    )
    assert (loop.step, loop.resume_step) == (5, 6)
    rows = read_rows(tmp_path / "resumed")
    assert [(row["step"], row["samples"]) for row in rows] == [(6, 28), (8, 36), (10, 44)]
    # it begins with no save, goes on with 9, which follows 10 updates, and closes with 11
    updates = {9: 10, 11: 11}
    assert [name for name in checkpoint_names(tmp_path / "resumed") if "opt" in name] == [
        f"opt{label:06d}.pt" for label in updates
    ]
    for label, count in updates.items():
        assert load(tmp_path / "resumed" / f"opt{label:06d}.pt")["state"][0]["step"] == count
        assert load(tmp_path / "resumed" / f"state{label:06d}.pt")["updates"] == count
    assert load(tmp_path / "resumed" / "opt000011.pt")["param_groups"][0]["lr"] == pytest.approx(
        0.01 * (1 / 11 if limit == "lr_anneal_steps" else 1)
    )
    assert snapshot(folder) == source


def test_the_source_is_not_overwritten(original):
    """Even where the checkpoints of both runs share a folder."""
    source = {name: data for name, data in snapshot(original).items() if name.endswith(".pt")}
    train(original, max_steps=8, save_interval=1, resume_checkpoint=latest(original))
    after = snapshot(original)
    assert {name: after[name] for name in source} == source
    assert "model000007.pt" in after and "state000006.pt" not in after


def test_everything_of_the_original_is_taken_up(original):
    loop = make_loop(resume_checkpoint=latest(original), max_steps=9)
    assert_same(loop.model.state_dict(), load(original / "model000006.pt"))
    assert_same(loop.opt.state_dict(), load(original / "opt000006.pt"))
    ema = load(original / "ema_0.9_000006.pt")
    assert_same([p.detach() for p in loop.ema_params[0]], list(ema.values()))


@pytest.mark.parametrize(
    "removed, ema_rate, lines",
    [
        ("none", "0.9", []),
        (
            "ema_0.9_000006.pt",
            "0.9",
            ["there is no checkpoint of EMA 0.9: it begins at the model's parameters"],
        ),
        ("none", "0.9,0.99", ["there is no checkpoint of EMA 0.99: it begins at the model's parameters"]),
        ("opt000006.pt", "0.9", ["there is no checkpoint of the optimizer: it begins anew"]),
    ],
)
def test_missing_parts(original, tmp_path, removed, ema_rate, lines):
    (original / removed).unlink(missing_ok=True)
    loop, found = resume(tmp_path / "resumed", latest(original), ema_rate=ema_rate, max_steps=6)
    assert [line for line in found if "there is no" in line] == lines
    assert loop.step == 0 and checkpoint_names(tmp_path / "resumed") == []  # nothing was left to do
    model = load(original / "model000006.pt")
    for rate, params in zip(loop.ema_rate, loop.ema_params, strict=True):
        there = (original / f"ema_{rate}_000006.pt").exists()
        average = load(original / f"ema_{rate}_000006.pt") if there else model
        assert_same([p.detach() for p in params], list(average.values()))
    assert bool(loop.opt.state_dict()["state"]) == (removed != "opt000006.pt")


def test_weights_of_another_kind_of_file(tmp_path):
    """
    An average of one's own run starts a new one, at step 0: no row of the log is taken back, and what lies beside
    it under the names of step 0 is not its own.
    """
    train(tmp_path, max_steps=4)
    assert {"opt000000.pt", "ema_0.9_000000.pt", "state000000.pt"} <= set(checkpoint_names(tmp_path))
    path = str(tmp_path / "ema_0.9_000004.pt")
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log", "csv"]):
        loop = make_loop(resume_checkpoint=path)
    assert f"{path} is not a model000000.pt: a new run begins at its weights" in (tmp_path / "log.txt").read_text()
    assert (loop.step, loop.resume_step, loop.opt.state_dict()["state"]) == (0, 0, {})
    assert_same(loop.model.state_dict(), load(path))
    assert_same([p.detach() for p in loop.ema_params[0]], list(load(path).values()))
    assert len(read_rows(tmp_path)) == 4


def test_a_new_run_at_weights_of_another_kind_of_file(tmp_path):
    """It writes all the checkpoints that a run writes."""
    train(tmp_path / "a", max_steps=4)
    train(tmp_path / "b", max_steps=3, resume_checkpoint=str(tmp_path / "a" / "ema_0.9_000004.pt"))
    assert checkpoint_names(tmp_path / "b") == checkpoint_names_of(0, 3)
    assert [row["step"] for row in read_rows(tmp_path / "b")] == [0, 1, 2]


def checkpoint_names_of(*labels):
    return sorted(f"{kind}{label:06d}.pt" for label in labels for kind in ("model", "ema_0.9_", "opt", "state"))


def test_a_loop_of_ones_own_logs_and_resumes(tmp_path):
    """Research code often has its own run_loop() around run_step()."""

    class OwnLoop(TrainLoop):
        def run_loop(self):
            for _ in range(3):
                self.run_step(*next(self.data))
                logger.dumpkvs()
                self.step += 1
            self.save()

    train(tmp_path, OwnLoop)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2] and all({"loss", "grad_norm"} <= row.keys() for row in rows)
    loop = train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"), max_steps=4)
    assert (loop.step, loop.resume_step) == (4, 0)
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2, 3]


def test_rows_of_another_folder_are_left_alone(tmp_path):
    train(tmp_path / "first")
    train(tmp_path / "second")
    train(tmp_path / "second", resume_checkpoint=str(tmp_path / "first" / "model000000.pt"), max_steps=3)
    assert [row["step"] for row in read_rows(tmp_path / "second")] == [0, 1, 2, 1, 2]


def test_a_set_whose_writing_was_cut_off_is_refused(tmp_path):
    train(tmp_path)
    os.rename(tmp_path / "state000003.pt", tmp_path / "state000003.pt.tmp")
    path = str(tmp_path / "model000003.pt")
    with pytest.raises(InputError, match="cut off; resume from the one before it") as info:
        train(tmp_path, resume_checkpoint=path)
    assert path in str(info.value)


@pytest.mark.parametrize("change", [lambda sd: sd.pop("conv.bias"), lambda sd: sd.update({"conv.bias": th.zeros(5)})])
def test_an_average_of_another_model_is_refused(tmp_path, change):
    train(tmp_path)
    path = tmp_path / "ema_0.9_000003.pt"
    state_dict = load(path)
    change(state_dict)
    th.save(state_dict, path)
    with pytest.raises(InputError) as info:
        train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert str(info.value) == f"{path} does not fit the model: conv.bias is missing or has another shape"


def test_a_damaged_optimizer_file_is_called_damaged(tmp_path):
    train(tmp_path)
    path = tmp_path / "opt000003.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged") as info:
        train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert str(path) in str(info.value) and "use_fp16" not in str(info.value)


def test_a_sampler_of_ones_own_needs_no_state(tmp_path):
    class FirstStep:
        def sample(self, batch_size, device):
            return th.zeros(batch_size, dtype=th.long), th.ones(batch_size)

    train(tmp_path, schedule_sampler=FirstStep())
    assert load(tmp_path / "state000003.pt")["schedule_sampler"] is None


# ---------------------------------------------------------------- the newest checkpoint of the folder


def lines_of(folder):
    return (folder / "log.txt").read_text().splitlines()


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("save_interval", [1, 2, 3])
def test_the_same_command_again_goes_on(tmp_path, images, stop, save_interval):
    """However often it is killed, the files end up as if it never was."""
    common = dict(max_steps=STEPS, save_interval=save_interval, dropout=0.3, resume_checkpoint="auto")
    run(tmp_path / "whole", images, **common)
    for i, step in enumerate((0, stop, stop + 1)):
        with pytest.raises(Killed):
            run(tmp_path / "parts", images, killed_after(step), seed=i, **common)
    run(tmp_path / "parts", images, seed=9, **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")
    assert checkpoint_names(tmp_path / "parts") == checkpoint_names(tmp_path / "whole")


def test_a_run_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    """The row that it left would be there twice."""

    class DyingBeforeItsSave(TrainLoop):
        def save(self):
            raise Killed

    with pytest.raises(Killed):
        train(tmp_path, DyingBeforeItsSave, resume_checkpoint="auto")
    assert [row["step"] for row in read_rows(tmp_path)] == [0] and checkpoint_names(tmp_path) == []
    loop = train(tmp_path, resume_checkpoint="auto")
    assert [row["step"] for row in read_rows(tmp_path)] == [0, 1, 2]
    assert (loop.step, checkpoint_names(tmp_path)) == (3, checkpoint_names_of(0, 3))
    assert lines_of(tmp_path).count(f"no complete checkpoint in {tmp_path}: the run begins anew") == 2


def test_the_newest_is_of_the_folder_for_checkpoints(tmp_path, monkeypatch):
    """DIFFUSION_BLOB_LOGDIR, if it is set; the log's rows are those of another folder, and stay."""
    monkeypatch.setenv("DIFFUSION_BLOB_LOGDIR", str(tmp_path / "blobs"))
    train(tmp_path / "log", resume_checkpoint="auto")
    loop = train(tmp_path / "log", resume_checkpoint="auto", max_steps=5)
    assert loop.step == 5 and f"loading model from checkpoint: {tmp_path}/blobs/model000003.pt..." in lines_of(
        tmp_path / "log"
    )
    assert checkpoint_names(tmp_path / "blobs") == checkpoint_names_of(0, 3, 5)


def test_past_a_damaged_checkpoint(tmp_path):
    """From the one before it, over the damaged one."""
    train(tmp_path, max_steps=6, save_interval=2)
    (tmp_path / "opt000006.pt").write_bytes(b"")
    loop = train(tmp_path, max_steps=6, save_interval=2, resume_checkpoint="auto")
    assert loop.step == 6
    warnings = [line for line in lines_of(tmp_path) if "left out" in line]
    assert len(warnings) == 1 and warnings[0].startswith("the checkpoint of step 6 is left out: ")
    assert load(tmp_path / "opt000006.pt")["state"][0]["step"] == 6
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(6))


def test_an_original_goes_on_by_itself(tmp_path):
    train(tmp_path, max_steps=4)
    for path in tmp_path.glob("state*.pt"):
        path.unlink()
    loop = train(tmp_path, max_steps=6, resume_checkpoint="auto")
    assert (loop.step, loop.resume_step) == (2, 4)


def test_a_path_that_is_no_checkpoint_does_not_begin_anew(tmp_path):
    """Only the word auto may find nothing."""
    with pytest.raises(InputError, match="there is no such file"):
        train(tmp_path, resume_checkpoint=str(tmp_path / "auto"))


# ---------------------------------------------------------------- how many checkpoints stay


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 9])
def test_as_many_checkpoints_as_asked_for(tmp_path, keep):
    train(tmp_path, max_steps=8, save_interval=2, keep_checkpoints=keep)
    labels = [0, 2, 4, 6, 8]
    assert checkpoint_names(tmp_path) == checkpoint_names_of(*(labels[-keep:] if keep else labels))
    assert {"progress.csv", "log.txt"} <= {path.name for path in tmp_path.iterdir()}


def test_kept_checkpoints_of_a_resumed_run(tmp_path):
    """Those of the part before count, those of a longer run stay."""
    train(tmp_path, max_steps=8, save_interval=2)
    train(
        tmp_path, max_steps=6, save_interval=2, keep_checkpoints=2, resume_checkpoint=str(tmp_path / "model000004.pt")
    )
    assert checkpoint_names(tmp_path) == checkpoint_names_of(4, 6, 8)


def test_a_full_disk_deletes_nothing(tmp_path, monkeypatch):
    """Old checkpoints go when the new one is there, not before."""
    train(tmp_path, max_steps=3, keep_checkpoints=1)
    before = checkpoint_names(tmp_path)

    def full(value, f):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(th, "save", full)
    with pytest.raises(InputError, match="No space left on device"):
        train(tmp_path, max_steps=5, keep_checkpoints=1, resume_checkpoint="auto")
    assert checkpoint_names(tmp_path) == before == checkpoint_names_of(3)


# ---------------------------------------------------------------- stopped by a signal


def stopped_at(step, number=signal.SIGTERM, when="forward_backward"):
    """A TrainLoop that receives a signal in the middle of a step; counts its saves."""

    class Stopped(TrainLoop):
        saves = []

        def _signal(self, name):
            if name == when and self.step + self.resume_step == step:
                signal.raise_signal(number)

        def forward_backward(self, batch, cond):
            self._signal("forward_backward")
            super().forward_backward(batch, cond)

        def log_step(self):
            super().log_step()
            self._signal("log_step")

        def save(self):
            self._signal("save")
            self.saves.append(self.step + self.resume_step)
            super().save()

    return Stopped


def signal_state():
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    return signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), descriptor


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("when", ["forward_backward", "log_step"])
@pytest.mark.parametrize(
    "step, save_interval, saves",
    [(0, 1000, [0]), (0, 1, [0]), (2, 1000, [0, 2]), (4, 2, [0, 2, 4]), (5, 2, [0, 2, 4, 5]), (7, 1000, [0, 7])],
)
def test_a_signal_ends_the_run_after_its_step_and_one_save(tmp_path, number, when, step, save_interval, saves):
    before = signal_state()
    cls = stopped_at(step, number, when)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, cls, max_steps=8, save_interval=save_interval)
    assert left.value.code == 0
    assert cls.saves == saves
    assert load(tmp_path / f"state{step:06d}.pt")["updates"] == step + 1
    assert [row["step"] for row in read_rows(tmp_path)] == list(range(step + 1))
    path = tmp_path / f"model{step:06d}.pt"
    assert lines_of(tmp_path)[-1] == f"stopped by {number.name} at step {step}: {path}"
    assert signal_state() == before


def test_a_signal_during_a_save(tmp_path):
    """It is finished, and is the run's last."""
    cls = stopped_at(4, when="save")
    with pytest.raises(SystemExit):
        train(tmp_path, cls, max_steps=8, save_interval=4)
    assert cls.saves == [0, 4] and checkpoint_names(tmp_path) == checkpoint_names_of(0, 4)


@pytest.mark.parametrize("stop", range(STEPS))
@pytest.mark.parametrize("save_interval", [1, 3, 7, 1000])
def test_stopped_and_continued_is_uninterrupted(tmp_path, images, stop, save_interval):
    """With the closing checkpoint too, wherever the signal came."""
    common = dict(max_steps=STEPS, save_interval=save_interval, dropout=0.3, log_interval=2)
    run(tmp_path / "whole", images, **common)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", images, stopped_at(stop), **common)
    run(tmp_path / "parts", images, seed=1, resume_checkpoint="auto", **common)
    assert_continues(tmp_path / "parts", tmp_path / "whole")


def test_stopped_in_the_first_step_after_a_closing_checkpoint(tmp_path, images):
    """Its number is that of the checkpoint it came from, but the step is in it."""
    run(tmp_path / "whole", images, max_steps=STEPS)
    run(tmp_path / "parts", images, max_steps=5)
    with pytest.raises(SystemExit):
        run(tmp_path / "parts", images, stopped_at(5), max_steps=STEPS, resume_checkpoint="auto")
    assert load(tmp_path / "parts" / "state000005.pt")["updates"] == 6
    run(tmp_path / "parts", images, max_steps=STEPS, resume_checkpoint="auto")
    assert_continues(tmp_path / "parts", tmp_path / "whole")


def test_a_stopped_run_of_the_original(tmp_path):
    """Labels go on from the file's name; the original's own checkpoint is not written over in the step after it."""
    train(tmp_path, max_steps=4)
    for path in tmp_path.glob("state*.pt"):
        path.unlink()
    before = (tmp_path / "model000004.pt").read_bytes()
    with pytest.raises(SystemExit):
        train(tmp_path / "new", stopped_at(6), max_steps=9, resume_checkpoint=latest(tmp_path))
    assert checkpoint_names(tmp_path / "new") == checkpoint_names_of(6)
    assert (tmp_path / "model000004.pt").read_bytes() == before


def test_a_signal_to_another_rank(tmp_path, monkeypatch):
    """All ranks end together, after the same step."""
    asked = []
    monkeypatch.setattr(dist_util, "any_rank", lambda flag: asked.append(flag) or len(asked) == 3)
    with pytest.raises(SystemExit) as left:
        train(tmp_path, max_steps=8)
    assert left.value.code == 0 and asked == [False] * 3
    assert lines_of(tmp_path)[-1] == f"stopped by a signal to another rank at step 2: {tmp_path}/model000002.pt"


def test_a_run_that_is_ignored_signals_goes_on(tmp_path):
    """Under nohup and the like, say for SIGINT."""
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        loop = train(tmp_path, stopped_at(1, signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, handler)
    assert loop.step == 3 and "stopped" not in (tmp_path / "log.txt").read_text()


def test_a_run_in_a_thread(tmp_path):
    """It cannot handle signals, and does without."""
    before, found = signal_state(), []

    def work():
        with logger.scoped_configure(dir=str(tmp_path), format_strs=["csv"]):
            loop = make_loop()
            loop.save = lambda: found.append((signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)))
            loop.run_loop()
            found.append(loop.step)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before[:2], before[:2], 3] and signal_state() == before


@pytest.mark.parametrize("error", [InputError("x"), KeyError("x"), KeyboardInterrupt()], ids=repr)
def test_signals_are_given_back_when_a_run_fails(tmp_path, error):
    before = signal_state()

    class Failing(TrainLoop):
        def log_step(self):
            raise error

    with pytest.raises(type(error)):
        train(tmp_path, Failing)
    assert signal_state() == before


def test_a_stop_does_not_save_what_is_not_finite(tmp_path):
    """The last good checkpoint stays the last."""
    with pytest.raises(
        train_util.TrainingError, match=r"at step 3 on rank 0; the last good checkpoint is .*model000002"
    ):
        train(
            tmp_path, stopped_at(3), data=batches(changes={3: math.nan}), max_steps=9, save_interval=2, log_interval=10
        )
    assert checkpoint_names(tmp_path) == checkpoint_names_of(0, 2)


# ---------------------------------------------------------------- what a run must not lose


def test_a_used_folder_is_warned_of(tmp_path):
    """A new run among the checkpoints of another overwrites some; one that continues the newest is told nothing."""
    train(tmp_path, max_steps=4)
    warning = f"{tmp_path} has checkpoints up to step 4 of a run that this one does not continue"
    for checkpoint, warned in [("", True), ("ema_0.9_000004.pt", True), ("model000000.pt", True), ("auto", False)]:
        path = checkpoint if checkpoint in ("", "auto") else str(tmp_path / checkpoint)
        before = len((tmp_path / "log.txt").read_text())
        with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
            make_loop(resume_checkpoint=path)
        assert (warning in (tmp_path / "log.txt").read_text()[before:]) == warned, checkpoint


@pytest.mark.parametrize("flags", [dict(size=np.int64(3)), dict(folder=Path("x"))], ids=["numpy", "path"])
def test_a_state_that_could_not_be_read_again_is_not_written(tmp_path, flags):
    with pytest.raises(InputError, match="flags is more than tensors and plain values"):
        train(tmp_path, flags=flags)
    assert checkpoint_names(tmp_path) == []


def test_no_checkpoint_of_parameters_that_are_not_finite(tmp_path):
    """Even where a step of one's own hides the norm of the gradient, and the loss is not yet seen."""
    train(tmp_path, max_steps=2)
    before = snapshot(tmp_path)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loop = make_loop(resume_checkpoint=latest(tmp_path), keep_checkpoints=1)
        with th.no_grad():
            loop.master_params[0][0] = math.nan
        with pytest.raises(train_util.TrainingError, match=r"a parameter is not finite at step 2 .*model000002.pt"):
            loop.save()
    assert {name: data for name, data in snapshot(tmp_path).items() if name.endswith(".pt")} == {
        name: data for name, data in before.items() if name.endswith(".pt")
    }


def test_a_signal_in_the_first_step_leaves_the_originals_checkpoint_alone(original):
    class Signalled(TrainLoop):
        def log_step(self):
            super().log_step()
            os.kill(os.getpid(), signal.SIGTERM)

    source = {name: data for name, data in snapshot(original).items() if name.endswith(".pt")}
    with pytest.raises(SystemExit) as left:
        train(original, Signalled, resume_checkpoint=latest(original), max_steps=9)
    assert left.value.code == 0
    assert {name: data for name, data in snapshot(original).items() if name.endswith(".pt")} == source


def test_moments_lie_in_memory_as_their_parameters(tmp_path):
    """The fused update of AdamW does not look whether they do."""
    after = []
    for memory_format in (th.contiguous_format, th.channels_last):
        model = th.nn.Conv2d(3, 4, 3, padding=1).to(memory_format=memory_format)
        opt = th.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        generator = th.Generator().manual_seed(0)
        moments = [th.rand(p.shape, generator=generator) for p in model.parameters() for _ in range(2)]
        state = {
            i: {"step": th.tensor(3.0), "exp_avg": moments[2 * i], "exp_avg_sq": moments[2 * i + 1]} for i in range(2)
        }
        th.save({**opt.state_dict(), "state": state}, tmp_path / "opt.pt")
        resume_util.load_optimizer(opt, str(tmp_path / "opt.pt"), use_fp16=False)
        for p in model.parameters():
            p.data.zero_()
            p.grad = th.ones_like(p)
        opt.step()
        after.append(model.weight.detach())
    assert after[0].abs().max() > 0
    th.testing.assert_close(after[1], after[0])
