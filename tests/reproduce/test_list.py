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
                **{f"L_{name}": [number, 2] for name in ("hybrid", "vlb importance", "vlb uniform")},
                "|G|^2": {"L_hybrid": 1.0, "L_vlb": 1.0},
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
    assert in_order(dict(zip("abc", groups, strict=False)), error=9.0)[1] == UNCLEAR
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


class AsThePaper(dict):
    """Results by which each claim holds; mirrored, those that compare have the opposite order."""

    def __init__(self, mirrored=False):
        self.mirrored = mirrored

    def __missing__(self, m):
        settings = dict(m.settings)
        if m.function in ("likelihood", "distance"):
            value = self._bpd(m.run) if m.function == "likelihood" else self._fd(m.run, **settings)
            return {"bpd": value, "fd": value} if not self.mirrored else {"bpd": 1 / value, "fd": 1 / value}
        noise = {"L_hybrid": 10, "L_vlb importance": 1, "L_vlb uniform": 100}
        return {
            "terms": lambda: {"share of first tenth": 0.4 if self.mirrored else 0.9},
            "gradient_noise": lambda: {
                **{k: [1 / v if self.mirrored else v] for k, v in noise.items()},
                "|G|^2": {"L_hybrid": 1.0, "L_vlb": 1.0},
            },
            "methods": lambda: {
                "rows": [{"bpd": 3.0, "standard error of the estimate": 0.1 if not self.mirrored else 0.001}] * 2
                + [{"bpd": 3.1, "standard error of the estimate": 0.1 if not self.mirrored else 0.001}] * 2
            },
            "schedules": lambda: json.loads(json.dumps(measures.schedules(None))),
        }[m.function]()

    @staticmethod
    def _bpd(run):
        flags = dict(run.flags)
        gains = {
            0.3: flags["noise_schedule"] == "cosine",
            0.2: flags["diffusion_steps"] > 1000,
            0.1: flags["learn_sigma"],
            0.05: flags.get("schedule_sampler") == "loss-second-moment",
            0.01: len(flags["channel_mult"]),  # the size
        }
        return 4 - sum(gain * share for gain, share in gains.items())

    @staticmethod
    def _fd(run, samples=FULL.samples, sampler="", evaluations=0, fixed="", skip=0.0, **_):
        flags = dict(run.flags)
        cosine = flags["noise_schedule"] == "cosine"
        if samples == FULL.skip_samples:
            return 100 * (1 + skip * cosine)
        if samples == FULL.few_samples:
            of_chain = 50 + 14_000 / evaluations**2 + 40 * bool(fixed)
            return {"ddim": 78, "unipc": 60, "dpm++2m-sde": 55, "ancestral": of_chain}[sampler]
        return 60 - 10 * cosine + 20 * ("use_kl" in flags) - 4 * len(flags["channel_mult"])


def test_what_the_paper_found_holds():
    results = AsThePaper()
    found = {one.number: one.judge({m: results[m] for m in one.needs}) for one in experiments(FULL).claims}
    assert {number: text for number, (text, verdict) in found.items() if verdict != HOLDS} == {}


def test_the_opposite_does_not():
    results = AsThePaper(mirrored=True)
    found = {one.number: one.judge({m: results[m] for m in one.needs}) for one in experiments(FULL).claims}
    # arithmetic; and that two numbers are about equal, mirrored
    others = {"1a", "1c", "4b", "6a"}
    assert {number for number, (_, verdict) in found.items() if verdict != FAILS} <= others
