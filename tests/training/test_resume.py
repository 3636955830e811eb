"""Where a run goes on, what each of its parts takes from there, and what it says of what does not fit."""

import itertools
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch as th
from harness import snapshot, write_images
from training import (
    Killed,
    TinyNet,
    assert_same,
    batches,
    checkpoint_names,
    checkpoint_names_of,
    latest,
    lines_of,
    load,
    make_diffusion,
    make_loop,
    read_rows,
    resume,
    run,
    train,
)

from improved_diffusion import dist_util, logger, train_util
from improved_diffusion.image_datasets import load_data
from improved_diffusion.resample import LossSecondMomentResampler, UniformSampler
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.training import resume as resume_module
from improved_diffusion.utils.errors import InputError, TrainingError

pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


@pytest.mark.parametrize("label, updates", [(2, 3), (4, 4)])
@pytest.mark.parametrize("with_state", [True, False])
def test_a_save_before_the_first_step(tmp_path, label, updates, with_state):
    """As many updates as the checkpoint; a run of the original counts by its label."""
    train(tmp_path, max_steps=4, save_interval=2)
    if not with_state:
        for path in tmp_path.glob("state*.pt"):
            path.unlink()
        updates = label
    with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=[]):
        make_loop(resume_checkpoint=str(tmp_path / f"model{label:06d}.pt")).save()
    (state,) = (tmp_path / "new").glob("state*.pt")
    assert load(state)["updates"] == updates


def test_a_custom_find_resume_checkpoint(tmp_path, monkeypatch):
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
    assert str(info.value).startswith(f"{path}: does not fit the model's optimizer: ")
    assert str(info.value).endswith(f"; a run with use_fp16 {before} would have written it so")


@pytest.mark.parametrize(
    "count, batch_size, warning",
    [
        (7, 3, None),
        (7, 2, "batch_size was 3"),
        (9, 3, "num_images was 7"),
    ],
)
def test_other_data(tmp_path, seven_images, count, batch_size, warning):
    """A warning, and training goes on from the data's beginning."""
    run(tmp_path / "run", seven_images, max_steps=2)
    new = load_data(
        data_dir=str(write_images(tmp_path / "images", count=count)),
        batch_size=batch_size,
        image_size=8,
        num_workers=0,
    )
    loop, lines = resume(tmp_path / "run", data=new, batch_size=batch_size, max_steps=4)
    warnings = [line for line in lines if "cannot continue" in line]
    assert len(warnings) == bool(warning) and all(warning in line for line in warnings)
    assert loop.step == 4 and "model000004.pt" in checkpoint_names(tmp_path / "run")


@pytest.mark.parametrize(
    "before, after, warning",
    [
        ((4, 2), (4, 2), None),
        ((4, 2), (4, 3), "(4, 3)"),
        ((4, 2), (8, 2), "(8, 2)"),
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
    warnings = [line for line in lines if "cannot continue" in line]
    assert len(warnings) == bool(warning) and all("schedule sampler" in w and warning in w for w in warnings)


def test_data_without_a_place(tmp_path):
    """A plain iterator goes on being one."""
    train(tmp_path, data=batches(), max_steps=2)
    assert load(tmp_path / "state000002.pt")["data"] == [None]
    loop, lines = resume(tmp_path, data=itertools.islice(batches(), 2), max_steps=4)
    assert loop.step == 4 and not [line for line in lines if "cannot" in line]


def test_another_number_of_ranks(tmp_path, seven_images):
    """Data and random numbers begin anew, from the seed and the step; what was taken in for the log is not lost."""
    run(tmp_path, seven_images, max_steps=3, save_interval=1000, log_interval=2)
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
        dist_util.reseed(3)
        assert [th.rand(1).item(), np.random.rand()] == drawn[-1]
        assert loop.step == 3
        for key, table in loop._statistics.state_dict().items():
            th.testing.assert_close(table, state["statistics"][0][key] * 4)
    assert drawn[0] != drawn[1] == drawn[2]
    warning = (
        "the checkpoint is of 2 ranks, now there are 1: the data begin again, and so do the random numbers, "
        "from step 3 and the seed, if one is given"
    )
    assert (tmp_path / "new" / "log.txt").read_text().splitlines().count(warning) == 3


@pytest.fixture(autouse=True)
def no_seed_left(monkeypatch):
    monkeypatch.setattr(dist_util, "_seed", None)


def test_changed_flags_are_logged(tmp_path):
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
        (
            {"conv.weight": th.zeros(3, 3, 1, 1)},
            "conv.bias (absent in the file, 3 in the model)",
        ),
        (
            {"conv.weight": th.zeros(2, 3, 1, 1), "conv.bias": th.zeros(3)},
            "conv.weight (2x3x1x1 in the file, 3x3x1x1 in the model)",
        ),
        ([1, 2], "does not fit the model: it holds no tensors by name"),
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
            ["there is no checkpoint of EMA 0.9: it starts at the model's parameters"],
        ),
        ("none", "0.9,0.99", ["there is no checkpoint of EMA 0.99: it starts at the model's parameters"]),
        ("opt000006.pt", "0.9", ["there is no checkpoint of the optimizer: it starts without moments"]),
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
    assert f"{path} is not a model000000.pt: a new run starts from its weights" in (tmp_path / "log.txt").read_text()
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


@pytest.mark.parametrize("older", [True, False])
def test_a_set_without_a_state_behind_sets_that_have_one_is_refused(tmp_path, older):
    """At a URL, writing that was cut off leaves nothing else to tell it by; a run of the original has none at all."""
    train(tmp_path)
    os.remove(tmp_path / "state000003.pt")
    if not older:
        os.remove(tmp_path / "state000000.pt")
        assert resume(tmp_path)[0].step == 0
        return
    with pytest.raises(InputError) as info:
        train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert str(tmp_path / "model000003.pt") in str(info.value) and "cut off" in str(info.value)


@pytest.mark.parametrize("change", [lambda sd: sd.pop("conv.bias"), lambda sd: sd.update({"conv.bias": th.zeros(5)})])
def test_an_average_of_another_model_is_refused(tmp_path, change):
    train(tmp_path)
    path = tmp_path / "ema_0.9_000003.pt"
    state_dict = load(path)
    change(state_dict)
    th.save(state_dict, path)
    with pytest.raises(InputError) as info:
        train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert str(info.value) == f"{path}: does not fit the model: conv.bias is missing or has another shape"


def test_a_damaged_optimizer_file_is_called_damaged(tmp_path):
    train(tmp_path)
    path = tmp_path / "opt000003.pt"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged") as info:
        train(tmp_path, resume_checkpoint=str(tmp_path / "model000003.pt"))
    assert str(path) in str(info.value) and "use_fp16" not in str(info.value)


def test_a_custom_sampler_needs_no_state(tmp_path):
    class FirstStep:
        def sample(self, batch_size, device):
            return th.zeros(batch_size, dtype=th.long), th.ones(batch_size)

    train(tmp_path, schedule_sampler=FirstStep())
    assert load(tmp_path / "state000003.pt")["schedule_sampler"] is None


# ---------------------------------------------------------------- the newest checkpoint of the folder


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path):
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
    assert lines_of(tmp_path).count(f"no checkpoint in {tmp_path} yet: a new run starts") == 2


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


def test_auto_continues_a_run_of_the_original(tmp_path):
    train(tmp_path, max_steps=4)
    for path in tmp_path.glob("state*.pt"):
        path.unlink()
    loop = train(tmp_path, max_steps=6, resume_checkpoint="auto")
    assert (loop.step, loop.resume_step) == (2, 4)


def test_a_path_that_is_no_checkpoint_does_not_start_over(tmp_path):
    """Only the word auto may find nothing."""
    with pytest.raises(InputError, match="there is no such file"):
        train(tmp_path, resume_checkpoint=str(tmp_path / "auto"))


@pytest.mark.parametrize("how", ["auto", "path", "opened"])
@pytest.mark.parametrize("cut_off", [False, True])
def test_each_file_is_read_once(tmp_path, monkeypatch, how, cut_off):
    """And nothing of it is held when the run begins."""
    train(tmp_path, max_steps=4)
    if cut_off and how == "auto":
        os.rename(tmp_path / "state000004.pt", tmp_path / "state000004.pt.tmp")
    paths, read = [], dist_util.read_state_dict
    monkeypatch.setattr(dist_util, "read_state_dict", lambda path, **_: paths.append(Path(path)) or read(path, **_))
    model, checkpoint = TinyNet(), {"auto": "auto"}.get(how, latest(tmp_path))
    if how == "opened":
        checkpoint = resume_module.open_checkpoint(checkpoint, model)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=["log"]):
        loop = make_loop(model=model, resume_checkpoint=checkpoint)
    assert sorted(path.name.removesuffix(".tmp") for path in paths) == checkpoint_names_of(4)
    assert loop.step == 4 and loop.resume_checkpoint == latest(tmp_path)
    assert loop._checkpoint._contents == {} and loop._checkpoint.state is None


@pytest.mark.parametrize("opened", [False, True])
def test_weights_from_inside_ddp_begin_a_run(tmp_path, opened):
    want = TinyNet().state_dict()
    path = str(tmp_path / "weights.pt")
    th.save({f"module.{name}": value for name, value in want.items()}, path)
    model = TinyNet()
    checkpoint = resume_module.open_checkpoint(path, model) if opened else path
    assert make_loop(model=model, resume_checkpoint=checkpoint).step == 0
    assert_same(dict(model.state_dict()), dict(want))


# ---------------------------------------------------------------- what a run must not lose


def test_a_used_folder_is_warned_of(tmp_path):
    """A new run among the checkpoints of another overwrites some; one that continues the newest is told nothing."""
    train(tmp_path, max_steps=4)
    warning = f"{tmp_path} has checkpoints up to step 4 that this run does not continue"
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
        with pytest.raises(TrainingError, match=r"a parameter is not finite at step 2 .*model000002.pt"):
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
        th.save({**opt.state_dict(), "state": state}, tmp_path / "opt000003.pt")
        resume_module.load_optimizer(opt, resume_module.Checkpoint(str(tmp_path / "model000003.pt")), 3)
        for p in model.parameters():
            p.data.zero_()
            p.grad = th.ones_like(p)
        opt.step()
        after.append(model.weight.detach())
    assert after[0].abs().max() > 0
    th.testing.assert_close(after[1], after[0])
