"""Runs that are cut off anywhere and continued by the same command: the result is that of an uninterrupted run."""

import contextlib
import functools
import itertools
import os
import signal
import sys

import numpy as np
import pytest
import torch as th
from dying_disk import DyingDisk, Killed
from harness import snapshot
from parity_cases import ToyModel, make_diffusion
from training import on_one_cpu

from improved_diffusion import dist_util, logger
from improved_diffusion.data.loader import BatchesInOrder
from improved_diffusion.inference import parts as module
from improved_diffusion.inference.arrays import save_arrays, save_samples
from improved_diffusion.inference.generate import draw_labels, generate
from improved_diffusion.inference.parts import Parts
from improved_diffusion.metrics.likelihood import evaluate_bpd
from improved_diffusion.options import LikelihoodScriptOptions, SampleOptions
from improved_diffusion.utils import files
from improved_diffusion.utils.errors import InputError

STEPS, BATCHES = 4, 3  # of 3, 3 and 1 samples
# a process that is killed runs no destructors, which on Python 3.10 raise here
ignored = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
unraisable_on_python_3_10 = ignored if sys.version_info < (3, 11) else lambda test: test

IMAGES = [(np.random.default_rng(i).uniform(-1, 1, (3, 4, 4)).astype(np.float32), {"y": i}) for i in range(7)]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    on_one_cpu(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def warnings(monkeypatch):
    found = []
    monkeypatch.setattr(logger, "warn", found.append)
    return found


@contextlib.contextmanager
def logging_to(folder):
    with logger.scoped_configure(dir=str(folder), format_strs=[]):
        yield


class Model(ToyModel):
    """Ends the process, as a kill does, at its k-th call."""

    def __init__(self, k=None):
        super().__init__()
        self.k = k

    def forward(self, *args, **kwargs):
        if len(self.seen) == self.k:
            raise Killed
        return super().forward(*args, **kwargs)


def conditions(numbers, noise_fn):
    return {"y": draw_labels(10, len(numbers), noise_fn)}


def sample(folder, seed=None, batch_size=3, model=None, weights=0.0, **changed):
    """What image_sample.py does. :return: the npz's arrays, on rank 0."""
    options = SampleOptions().replace(seed=seed, batch_size=batch_size, **changed)
    with logging_to(folder), Parts(options, weights={"w": th.tensor([weights])}) as parts:
        diffusion, shape = make_diffusion(STEPS, "cosine"), (3, 4, 4)
        kwargs = dict(shape=shape, num_samples=7, batch_size=batch_size, conditions=conditions, seed=seed, parts=parts)
        images, labels = generate(diffusion, model or Model(), **kwargs)
        if dist_util.rank() == 0:
            save_samples(images, labels)
            return np.array(images), np.array(labels)


def evaluate(folder, seed=None, batch_size=3, model=None, images=IMAGES, estimate=0):
    """What image_nll.py does, with every rank's share of some images. :return: the means."""
    options = LikelihoodScriptOptions().replace(seed=seed, batch_size=batch_size, estimate=estimate)
    with logging_to(folder), Parts(options, images=len(images)) as parts:
        data = BatchesInOrder(images[dist_util.rank() :: dist_util.world_size()], batch_size, num_workers=0)
        diffusion = make_diffusion(STEPS, "cosine")
        means, count = evaluate_bpd(model or Model(), diffusion, data, seed=seed, parts=parts, estimate=estimate)
        assert count == len(images)
        if dist_util.rank() == 0:
            save_arrays("terms.npz", *means.values())
        return {name: value.numpy() for name, value in means.items()}


RUNS = {"samples": sample, "likelihood": evaluate}


def npz(folder):
    """The final files; nothing else may be left."""
    files_left = snapshot(folder)
    assert [name for name in files_left if not name.endswith(".npz")] == []
    return files_left


def uninterrupted(folder, run, seed):
    folder.mkdir()
    th.manual_seed(1)
    run(folder, seed)


@unraisable_on_python_3_10
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_killed_at_each_operation_on_files(tmp_path, run, seed):
    """The same command continues, and the files equal those of an uninterrupted run, to the bit."""
    uninterrupted(tmp_path / "whole", run, seed)
    calls = set()
    for k in itertools.count():
        folder = tmp_path / f"{k}"
        folder.mkdir()
        th.manual_seed(1)
        try:
            with DyingDisk(k, (files, module)):
                run(folder, seed)
        except Killed:
            if not list(folder.glob("parts-*/state.pt")):
                th.manual_seed(1)  # nothing is kept of the first batch
            else:
                th.manual_seed(k)
            model = Model()
            run(folder, seed, model=model)
            calls.add(len(model.seen))
            assert npz(folder) == npz(tmp_path / "whole"), k
        else:
            assert k > 20
            break
    assert calls == {STEPS * batches for batches in range(BATCHES + 1)}  # each batch is kept


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_killed_in_each_step_of_the_network(tmp_path, run, seed):
    uninterrupted(tmp_path / "whole", run, seed)
    folder = tmp_path / "parts"
    folder.mkdir()
    th.manual_seed(1)
    for k in (STEPS + 1, STEPS - 1, STEPS, 0):  # one batch, none, one, none
        with pytest.raises(Killed):
            run(folder, seed, model=Model(k))
    run(folder, seed, model=(last := Model()))
    assert len(last.seen) == STEPS
    assert npz(folder) == npz(tmp_path / "whole")


def stop(folder, run=sample, k=STEPS + 1, **changed):
    """A run that has finished its first batch."""
    folder.mkdir(exist_ok=True)
    with pytest.raises(Killed):
        run(folder, model=Model(k), **changed)


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_with_a_seed_other_batch_sizes_and_ranks_continue(on_ranks, tmp_path, run, world_size, batch_size):
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        folder.mkdir()
    whole = run(tmp_path / "whole", 5)
    stop(tmp_path / "parts", run, seed=5)
    models = [Model() for _ in range(world_size)]
    found = on_ranks(world_size, lambda rank: run(tmp_path / "parts", 5, batch_size=batch_size, model=models[rank]))
    assert sum(len(t) for model in models for t in model.seen) == 4 * STEPS  # three of seven are there
    for got, want in zip(*(found[0], whole) if run is sample else (found[0].values(), whole.values()), strict=True):
        if run is sample:
            np.testing.assert_array_equal(got, want)
        else:
            np.testing.assert_allclose(got, want, rtol=1e-12)


PILOT = BATCHES * 2 * STEPS  # calls
estimate = functools.partial(evaluate, estimate=6)


@pytest.mark.parametrize("seed", [None, 5])
def test_a_killed_estimate_continues_without_another_pilot(tmp_path, seed):
    uninterrupted(tmp_path / "whole", estimate, seed)
    folder = tmp_path / "parts"
    folder.mkdir()
    for k in (PILOT // 2, PILOT, PILOT + 5, PILOT + 6):  # nothing is kept, then one batch
        th.manual_seed(1)
        with pytest.raises(Killed):
            estimate(folder, seed, model=Model(k))
    th.manual_seed(7)
    estimate(folder, seed, model=(last := Model()))
    assert len(last.seen) == 6 * 2
    assert npz(folder) == npz(tmp_path / "whole")


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_an_estimate_depends_on_neither_batch_size_nor_ranks(on_ranks, tmp_path, world_size, batch_size):
    for folder in ("whole", "other"):
        (tmp_path / folder).mkdir()
    whole = estimate(tmp_path / "whole", 5)
    found = on_ranks(world_size, lambda rank: estimate(tmp_path / "other", 5, batch_size=batch_size))
    for means in found:
        np.testing.assert_array_equal(means["p"], whole["p"])
        for name, value in whole.items():
            np.testing.assert_allclose(means[name], value, rtol=1e-12)


def test_each_rank_has_its_random_generators_back(on_ranks, tmp_path, monkeypatch):
    restored = {}
    monkeypatch.setattr(module, "rng_state", lambda: {"rank": dist_util.rank()})
    monkeypatch.setattr(module, "set_rng_state", lambda state: restored.update({dist_util.rank(): state["rank"]}))
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(Killed):
        on_ranks(2, lambda rank: sample(folder, model=Model(STEPS), batch_size=2))
    on_ranks(2, lambda rank: sample(folder, batch_size=2))
    assert restored == {0: 0, 1: 1}


@pytest.mark.parametrize(
    ("first", "changed", "named"),
    [
        (dict(), dict(batch_size=2), "batch_size"),
        (dict(), dict(seed=1), "seed"),
        (dict(seed=1), dict(seed=2), "seed"),
        (dict(seed=1), dict(seed=1, weights=1.0), "weights"),
        (dict(seed=1), dict(seed=1, clip_denoised=False), "clip_denoised"),
    ],
)
def test_parts_of_another_run_are_neither_used_nor_lost(tmp_path, warnings, first, changed, named):
    folder = tmp_path / "run"
    stop(folder, **first)
    (kept,) = folder.glob("parts-*")
    before = snapshot(kept)
    sample(folder, model=(model := Model()), **changed)
    assert sum(map(len, model.seen)) == 7 * STEPS
    (line,) = warnings
    assert str(kept) in line and named in line.partition("differs in ")[2]
    assert snapshot(kept) == before and list(folder.glob("parts-*")) == [kept]
    sample(folder, model=(model := Model()), **first)
    assert sum(map(len, model.seen)) == 4 * STEPS and not kept.exists()


def test_the_same_command_in_another_folder_names_the_one_to_continue(tmp_path, warnings):
    (tmp_path / "runs [1]").mkdir()
    stop(tmp_path / "runs [1]" / "a", seed=1)
    sample(tmp_path / "runs [1]" / "b", seed=2)
    assert warnings == []
    sample(tmp_path / "runs [1]" / "c", seed=1)
    (line,) = warnings
    assert str(tmp_path / "runs [1]" / "a") in line


def test_without_a_seed_another_number_of_ranks_starts_over(on_ranks, tmp_path, warnings):
    folder = tmp_path / "run"
    stop(folder)
    models = [Model(), Model()]
    on_ranks(2, lambda rank: sample(folder, model=models[rank]))
    assert sum(len(t) for model in models for t in model.seen) == 7 * STEPS
    assert "ranks" in warnings[0]


def test_options_that_change_no_sample_may_differ(tmp_path, warnings):
    stop(tmp_path / "run", seed=1, model_path="a.pt")
    sample(tmp_path / "run", seed=1, model=(model := Model()), model_path="./a.pt", save_images=True)
    assert len(model.seen) == 2 * STEPS and warnings == []


@pytest.mark.parametrize(("name", "length"), [("images", 20), ("labels", 20), ("state.pt", 100), ("images", None)])
def test_damaged_parts_are_refused(tmp_path, name, length):
    folder = tmp_path / "run"
    stop(folder)
    (path,) = folder.glob(f"parts-*/{name}")
    if length is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:length])
    before = snapshot(folder)
    with pytest.raises(InputError, match=str(path.parent)) as refusal:
        sample(folder)
    assert "\n" not in str(refusal.value)
    assert {k: v for k, v in snapshot(folder).items() if ".lock" not in k} == before
    sample(folder, seed=1)  # other runs do not mind


def test_rows_that_cannot_be_written_end_in_one_line(tmp_path, monkeypatch):
    """What is there stays."""
    folder = tmp_path / "run"
    stop(folder, seed=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "open", full, raising=False)
        with pytest.raises(InputError, match=r"/images: cannot be written \(No space left"):
            sample(folder, seed=1)
    sample(folder, seed=1, model=(model := Model()))
    assert len(model.seen) == 2 * STEPS


def test_nothing_is_left_of_a_run_that_finished_no_batch(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(Killed):
        sample(tmp_path / "run", model=Model(1))
    assert snapshot(tmp_path / "run") == {}


def test_sigterm(tmp_path, monkeypatch):
    """Exit status 143, after a line that says how to continue; the handler is as before."""
    lines, handler = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(logger, "log", lines.append)

    class Stopped(Model):
        def forward(self, *args, **kwargs):
            if len(self.seen) == STEPS:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(*args, **kwargs)

    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(SystemExit) as end:
        sample(folder, model=Stopped())
    assert end.value.code == 128 + signal.SIGTERM
    assert lines[-1].startswith("3 finished samples") and f"log_dir {folder}" in lines[-1]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_samples_are_not_held_in_memory(tmp_path):
    """They are mapped from the file."""
    with logging_to(tmp_path), Parts(SampleOptions()) as parts:
        images = np.zeros((5, 4, 4, 3), np.uint8)
        parts.save(5, {"images": images})
        assert isinstance(parts.rows("images"), np.memmap)
        np.testing.assert_array_equal(parts.rows("images"), images)
        assert parts.rows("labels") is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_bound_of_an_output_that_is_not_finite(tmp_path, value):
    """Clipping hides infinite ones from the bound."""
    calls = []

    def model(x, t, **conditions):
        calls.append(t)
        return th.full_like(x, value if len(calls) == 2 else 0.5)

    with pytest.raises(InputError, match="the model: "):
        evaluate(tmp_path, model=model)
