"""The list of experiments: what it names exists, judges and figures read what is measured. No verdict is asserted."""

import json
import sys

import pytest
from harness import ROOT

sys.path.insert(0, str(ROOT))

from improved_diffusion.options import TrainOptions
from reproduce import figures, jobs, measures, plan
from reproduce.declare import FULL, QUICK, filled, measure
from reproduce.experiments import experiments
from reproduce.verdicts import FAILS, HOLDS, UNCLEAR, about_equal, clear, in_order

BOTH = pytest.mark.parametrize("counts", [FULL, QUICK], ids=["full", "quick"])
RATE = dict(trained=0.005, evaluated=0.002, features=0.03, seconds=1.0)


class Made(dict):
    """Results as the functions of measures.py return them, with numbers that are made up."""

    def __missing__(self, m):
        settings = dict(m.settings)
        number = 1 + len(self) % 7
        self[m] = {
            "likelihood": lambda: {"bpd": number, "standard error": 0.1},
            "distance": lambda: {"fd": 100.0 + number, "precision": 0.5, "recall": 0.5},
            "real": lambda: {"fd": 50.0, "precision": 0.5, "recall": 0.5},
            "terms": lambda: {"vb": [1.0 / (t + 1) for t in range(settings["length"])], "share of first tenth": 0.9},
            "gradient_noise": lambda: {
                f"L_{name}": [number, 2] for name in ("hybrid", "vlb importance", "vlb uniform")
            },
            "methods": lambda: {"rows": [{"bpd": 3.0, "standard error of the estimate": 0.1}] * 4},
            "size": lambda: {"parameters": 1000, "flops": 10_000},
            "schedules": lambda: json.loads(json.dumps(measures.schedules(None))),
        }.get(m.function, lambda: {"images": [[[[255, 0, 0]] * 16] * 16] * 6, "columns": 3})()
        return self[m]


@BOTH
def test_all_that_the_list_names_exists(counts):
    found = experiments(counts)
    assert len({m.key for m in found.measures()}) == len(found.measures())
    assert len({run.key for run in found.runs()}) == len(found.runs()) <= 15
    for run in found.runs():
        assert TrainOptions().replace(**dict(run.flags)).compute.seed in counts.seeds
    for m in found.measures():
        assert callable(getattr(measures, m.function))
        step = dict(m.settings).get("step")
        assert step is None or step % m.run["save_interval"] == 0  # a checkpoint that the run keeps
    assert {one.draw for one in found.figures} <= set(vars(figures))
    assert [int(one.number[0]) for one in found.claims] == sorted(int(one.number[0]) for one in found.claims)
    assert {one.number[0] for one in found.claims} == set("12345678")


@BOTH
def test_judges_and_figures_read_what_is_measured(counts):
    found, results = experiments(counts), Made()
    for one in found.claims:
        assert {m.function for m in one.needs} <= set(vars(measures))
        here, verdict = one.judge({m: results[m] for m in one.needs})
        assert here and verdict in (HOLDS, FAILS, UNCLEAR)
    for one in found.figures:
        assert getattr(figures, one.draw)(filled(one.series, {m: results[m] for m in one.needs})) is not None


@BOTH
def test_the_plan_counts_every_job(counts):
    found = experiments(counts)
    every = [*found.runs(), *found.measures()]
    assert all(plan.seconds(job, RATE) > 0 for job in every)
    last = plan.table(every, RATE, workers=2).splitlines()[-1].split()
    assert int(last[1]) == len(every)
    assert float(last[2]) == pytest.approx(sum(plan.seconds(job, RATE) for job in every) / 120, abs=0.06)


def test_a_result_belongs_to_its_settings(tmp_path):
    runs = experiments(QUICK).runs()
    folder = jobs.Folder(tmp_path)
    paths = {folder.file(measure("size", run, **more)) for run in runs for more in ({}, {"step": 1}, {"step": 2})}
    assert len(paths) == 3 * len(runs)
    assert folder.file(measure("size", runs[0], a=1, b=2)) == folder.file(measure("size", runs[0], b=2, a=1))


# ---------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("groups", "verdict"),
    [
        (([1, 2], [3, 4]), HOLDS),
        (([3, 4], [1, 2]), FAILS),
        (([1, 3], [2, 4]), UNCLEAR),
        (([1], [2], [3]), HOLDS),
        (([1], [3], [2]), FAILS),
        (([1], [2, 4], [3]), UNCLEAR),
    ],
)
def test_in_order(groups, verdict):
    found, judged = in_order(dict(zip("abc", groups, strict=False)), form=".0f")
    assert judged == verdict
    assert all(f"{label} " in found for label in "abc"[: len(groups)])


@pytest.mark.parametrize(("other", "verdict"), [([9, 11], HOLDS), ([8], HOLDS), ([10, 13], UNCLEAR), ([12, 13], FAILS)])
def test_about_equal(other, verdict):
    assert about_equal({"a": [10, 10], "b": other}, share=0.1)[1] == verdict


@pytest.mark.parametrize(
    ("margin", "error", "verdict"),
    [
        (0.1, 0.05, HOLDS),
        (0.04, 0.05, UNCLEAR),
        (-0.04, 0.05, UNCLEAR),
        (-0.1, 0.05, FAILS),
        (1, 0, HOLDS),
        (-1, 0, FAILS),
    ],
)
def test_clear(margin, error, verdict):
    assert clear("x", margin, error) == ("x", verdict)
