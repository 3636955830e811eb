"""The runner with a small list of experiments: it does what is missing, continues, and writes what it found."""

import json
import signal
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from harness import ROOT, TINY, Here, run_script, save_weights

sys.path.insert(0, str(ROOT))

from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import Source
from improved_diffusion.logger import Logger
from improved_diffusion.metrics.estimate import pilot_evaluations
from improved_diffusion.utils.errors import TrainingError
from reproduce import jobs, measures, page, plan, runner
from reproduce.declare import Claim, Experiments, Figure, Row, Run, measure

RATE = dict(trained=0.001, evaluated=0.001, features=0.001, seconds=1.0)
FLAGS = dict(
    TINY, image_size=8, batch_size=4, lr=1e-3, ema_rate="0.9", lr_anneal_steps=2, save_interval=2, log_interval=1,
    preview_samples=0, num_workers=0,
)  # fmt: skip


class Images(Source):
    classes, shape = ["a", "b"], (8, 8, 3)

    def __init__(self, count):
        self.labels = [i % 2 for i in range(count)]

    def __getitem__(self, i):
        return np.random.default_rng(i).integers(0, 256, self.shape).astype(np.uint8)


def listed(seeds=(0, 1)):
    """Two runs, three measurements of each and one of the schedules, a claim and two figures."""
    runs = [Run(f"tiny s{seed}", tuple(sorted(dict(FLAGS, seed=seed).items()))) for seed in seeds]
    likelihoods = [measure("likelihood", run, images=4, estimate=4) for run in runs]
    distances = [measure("distance", run, samples=5, evaluations=3, sampler="ddim", reference=8) for run in runs]
    methods = measure("methods", runs[0], images=2, even=5, estimate=4, chosen=3, planned_images=1)

    def judge(results):
        return f"{results[likelihoods[0]]['bpd']:.2f}", "holds"

    claim = Claim("1", "a claim", "a number", likelihoods, judge)
    figures = [Figure("schedules", "schedules", measure("schedules")),
               Figure("samples", "noised", measure("noised"))]  # fmt: skip
    return Experiments([claim], figures, [Row("tiny", runs, likelihoods, distances)], methods)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """With images, and everything in this process. folder.done counts the jobs."""
    found = jobs.Folder(tmp_path / "results")
    write({"train": Images(12), "test": Images(6)}, str(found.data))
    monkeypatch.setattr(jobs, "SIZE", 8)
    jobs.images.cache_clear()
    jobs.trained.cache_clear()
    monkeypatch.setattr(plan, "rates", lambda: RATE)
    monkeypatch.setattr(measures, "network", lambda: None)
    features = lambda images, network, batch_size: measures.th.from_numpy(images[:, ::4, ::4].reshape(len(images), -1))  # noqa: E731
    monkeypatch.setattr(measures, "features_of", lambda *a, **k: features(*a, **k).float())
    row = {"method": "every timestep", "evaluations": 24, "bpd": 3.0, "standard error": 0.1}
    kept = {"rows": [row], "images": 2, "evaluations to choose": 24}
    monkeypatch.setattr(measures, "methods", lambda trained, data, **settings: kept)
    found.done = []
    do, call = jobs.do, jobs.call

    def counted(of, job):
        found.done.append(job)
        return do(of, job)

    def without_training(script, *words):
        log_dir = Path(words[words.index("--log_dir") + 1])
        log_dir.mkdir(parents=True, exist_ok=True)
        save_weights(log_dir / "ema_0.9_000002.pt")
        (log_dir / "state000002.pt").touch()

    monkeypatch.setattr(jobs, "do", counted)
    monkeypatch.setattr(jobs, "call", without_training)
    found.call = call
    return found


def execute(wanted, folder):
    runner.execute(wanted, folder, Here(), workers=1)


def test_everything_is_done_once_and_runs_before_what_measures_them(folder, tmp_path, capsys):
    wanted = listed()
    execute(wanted, folder)
    assert sorted(map(str, folder.done)) == sorted(map(str, [*wanted.runs(), *wanted.measures()]))
    for m in wanted.measures():
        assert m.run is None or folder.done.index(m.run) < folder.done.index(m)
        kept = folder.read(m)
        assert kept["numbers"] and kept["seconds"] >= 0 and (m.run is None) == (kept["flags"] is None)
    assert all(folder.seconds(run) > 0 for run in wanted.runs())
    count = len(folder.done)
    execute(listed(), folder)
    assert len(folder.done) == count
    execute(listed(seeds=(0, 2)), folder)  # other flags: a run, its measurements, no other
    assert {job.name for job in folder.done[count:] if isinstance(job, Run)} == {"tiny s2"}
    assert len(folder.done) == count + 3


@pytest.mark.parametrize("at", ["likelihood", "distance", "train"])
def test_it_continues_after_an_interruption(folder, monkeypatch, at):
    wanted, module = listed(), jobs if at == "train" else measures
    whole, calls = getattr(module, at), []

    def interrupted(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(module, at, interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(wanted, folder)
    before = [job for job in folder.done if folder.has(job)]
    assert before and len(before) == len(folder.done) - 1
    execute(wanted, folder)
    assert all(folder.has(job) for job in [*wanted.runs(), *wanted.measures()])
    assert all(folder.done.count(job) == 1 for job in before)


@pytest.mark.parametrize(
    ("error", "named"), [(TrainingError("it failed"), "it failed"), (BrokenProcessPool(), "trained tiny s0")]
)
def test_a_job_that_fails_ends_the_call_with_its_reason(folder, monkeypatch, error, named):
    monkeypatch.setattr(jobs, "train", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(TrainingError, match=named):
        execute(listed(), folder)


def test_a_process_that_ends_may_have_done_any_job_under_way(folder, monkeypatch):
    """The executor tells of its death by all of them."""
    wanted = listed()
    monkeypatch.setattr(jobs, "do", lambda *_: (_ for _ in ()).throw(BrokenProcessPool()))
    with pytest.raises(TrainingError) as end:
        runner.execute(wanted, folder, Here(), workers=2)
    assert all(runner.describe(job) in str(end.value) for job in runner.in_order(wanted)[:2])
    monkeypatch.setattr(plan, "rates", lambda: (_ for _ in ()).throw(BrokenProcessPool()))
    with pytest.raises(TrainingError, match="plan"):
        execute(wanted, folder)


def test_a_run_is_trained_by_the_script_with_its_flags(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(jobs, "call", lambda script, *words: run_script(script, list(words), tmp_path / "log"))
    (run, _) = listed().runs()
    jobs.do(folder, run)
    assert folder.has(run)
    config = json.loads((folder.run(run) / "config.json").read_text())["flags"]
    assert {name: config[name] for name, _ in run.flags} == dict(run.flags)
    jobs.do(folder, measure("likelihood", run, images=2, estimate=4))


def test_a_run_that_stops_too_early_is_not_measured(folder, monkeypatch):
    monkeypatch.setattr(jobs, "call", lambda *_: None)
    (run, _) = listed().runs()
    with pytest.raises(TrainingError, match=r"tiny.*before step 2"):
        jobs.train(folder, run)


def write_script(path, monkeypatch, name, text):
    (path / "scripts").mkdir()
    (path / "scripts" / f"{name}.py").write_text(text)
    monkeypatch.setattr(jobs, "ROOT", path)


def test_what_a_script_prints_as_it_fails_is_the_reason(folder, tmp_path, monkeypatch):
    write_script(tmp_path, monkeypatch, "image_train", "import sys; sys.exit('image_train.py: error: no images')")
    with pytest.raises(TrainingError, match=r"image_train: .*no images"):
        folder.call("image_train")


@pytest.mark.parametrize("verdicts", [True, False])
def test_the_page_has_what_was_found(folder, tmp_path, verdicts):
    wanted = listed()
    execute(wanted, folder)
    page.write(wanted, folder, tmp_path / "docs" / "paper.md", verdicts)
    text = (tmp_path / "docs" / "paper.md").read_text()
    found = folder.read(wanted.rows[0].likelihoods[0])["numbers"]["bpd"]
    assert f"| 1 | a claim | a number | {found:.2f} | {'holds' if verdicts else '-'} |" in text
    pictures = {path.name for path in (tmp_path / "docs" / "figures").iterdir()}
    assert pictures == {"schedules.png", "samples.png"} and all(f"(figures/{name})" in text for name in pictures)
    assert all(f"--seed {run['seed']}" in text for run in wanted.runs())
    assert " 24 evaluations" in text and f"{pilot_evaluations(24, 2):,}" in text


def test_the_page_of_an_unfinished_run_says_so(folder, tmp_path):
    page.write(listed(), folder, tmp_path / "paper.md")
    text = (tmp_path / "paper.md").read_text()
    assert "| 1 | a claim | a number | not measured |  |" in text and "figures/" not in text


def test_a_worker_ends_with_its_runner_and_so_does_its_script(tmp_path, monkeypatch):
    write_script(tmp_path, monkeypatch, "wait", "import time; time.sleep(100)")
    runner_ended, ended = threading.Event(), threading.Event()
    monkeypatch.setattr(jobs.multiprocessing, "parent_process", lambda: SimpleNamespace(join=runner_ended.wait))
    monkeypatch.setattr(jobs.os, "_exit", lambda _: ended.set())
    monkeypatch.setattr(Logger, "CURRENT", None)
    jobs.initialize()
    threading.Timer(0.5, runner_ended.set).start()
    with pytest.raises(TrainingError):
        jobs.call("wait")
    assert jobs._script.returncode == -signal.SIGTERM
    assert ended.wait(10)
