"""The benchmarks work, and what they compare is the same arithmetic. Their figures are not judged here."""

import json
import sys

import pytest
import torch as th
import torch.nn.functional as F
from harness import ROOT
from torch.profiler import ProfilerActivity, profile

from improved_diffusion.cli.parser import run
from improved_diffusion.logger import Logger

sys.path.insert(0, str(ROOT / "benchmarks"))

import memory
import models
import plain
import run as benchmarks
import tables
import timing

CPU = th.device("cpu")
TINY = models.Setting(image_size=32, num_channels=32, num_res_blocks=1, batch_size=2)


@pytest.fixture
def benchmark(monkeypatch, tmp_path, capsys):
    """Run a sub-command. :return: (exit status, the rows of its JSON, what it printed)."""
    for name in ("CURRENT", "DEFAULT"):
        monkeypatch.setattr(Logger, name, None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def call(command, *words):
        monkeypatch.setattr(sys, "argv", ["run.py", command, "--quick", "--out", str(tmp_path), *words])
        try:
            run(benchmarks.main)
        except SystemExit as e:
            return e.code, [], capsys.readouterr().err
        printed = capsys.readouterr().out
        written = json.loads((tmp_path / f"{command}.json").read_text())
        assert written["machine"]["command"].startswith(f"python run.py {command} --quick")
        assert printed.count("\n| ") == len(written["rows"]) + 2  # headings and the line below them
        return 0, written["rows"], printed

    return call


def figures(row):
    """All numbers of a row."""
    for value in row.values():
        yield from figures(value) if isinstance(value, dict) else [value] if isinstance(value, int | float) else []


def assert_sound(rows):
    for row in rows:
        assert all(number > 0 for number in figures(row)), row
        for value in row.values():
            if isinstance(value, dict):
                assert value["least"] <= value["median"] <= value["most"]


def test_train(benchmark):
    status, rows, printed = benchmark("train", "--variants", "plain,fp32,bf16")
    assert status == 0
    assert [row["variant"] for row in rows] == ["plain, float32", "ours, float32", "ours, bfloat16"]
    assert rows[0]["times plain"] == 1
    assert_sound(rows)
    assert "Peak during the rows of training step, 32x32, batch 2: " in printed


def test_sample(benchmark):
    status, rows, _ = benchmark("sample", "--variants", "plain,fp32", "--batch_sizes", "1,2")
    assert status == 0
    works = ["forward"] * 2 + ["ancestral step"] * 2 + ["DDIM step"] * 2
    assert [(row["batch_size"], row["work"]) for row in rows] == [(n, work) for n in (1, 2) for work in works]
    assert_sound(rows)


def test_load(benchmark):
    status, rows, _ = benchmark("load")
    assert status == 0
    assert {row["source"] for row in rows} == {"JPEG folder", "packed images"}
    assert_sound([{**row, "workers": None} for row in rows])


def test_memory(benchmark):
    status, rows, _ = benchmark("memory")
    assert status == 0
    assert_sound(rows)
    peaks = {row["variant"]: row["peak, MiB"] for row in rows}
    assert peaks["ours, float32, gradient checkpointing"] < peaks["ours, float32"] <= peaks["plain, float32"]


def test_startup(benchmark):
    status, rows, _ = benchmark("startup")
    assert status == 0
    assert [row["work"] for row in rows][2:] == ["image_train.py --help"]
    assert_sound(rows)


@pytest.mark.parametrize(
    "words, named",
    [
        (["walk"], "walk"),
        (["train", "--variants", "fp31"], "fp31"),
        (["train", "--batch_sizes", "4,none"], "none"),
        (["train", "--repetitions", "0"], "'0' is not a number above 0"),
        (["train", "--out", "s3://b/x"], "s3://b/x"),
        (["train", "--device", "cuda"], "--device cuda: there is no GPU here"),
        (
            ["train", "--variants", "plain,diffusers"],
            "--variants diffusers: it is not installed; pip install diffusers",
        ),
        (["all", "--variants", "plain,fp32_compiled"], "memory has no such form"),  # before the others take their time
    ],
)
def test_bad_flags(benchmark, words, named, monkeypatch):
    monkeypatch.setattr(th.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(benchmarks.COMMANDS, "sample", None)
    status, _, error = benchmark(*words)
    assert status == 2
    assert named in error
    assert error.count("\n") == 1


def test_all_is_every_command_with_its_own_defaults(monkeypatch, tmp_path):
    seen = {}
    for name in benchmarks.COMMANDS:
        monkeypatch.setitem(benchmarks.COMMANDS, name, lambda args, name=name: seen.update({name: args}))
    monkeypatch.setattr(benchmarks.dist_util, "setup_dist", lambda: None)
    monkeypatch.setattr(sys, "argv", ["run.py", "all", "--num_res_blocks", "1"])
    benchmarks.main()
    assert list(seen) == ["train", "sample", "load", "memory", "startup"]
    assert seen["train"].image_sizes == [32]
    assert seen["memory"].image_sizes == seen["load"].image_sizes == [64]
    assert {args.num_res_blocks for args in seen.values()} == {1}


def test_the_functions_take_turns():
    calls = []
    taken = timing.alternate({name: lambda name=name: calls.append(name) for name in "abc"}, 4, CPU)
    assert calls == list("abc") * 5  # the first round is not measured
    assert {name: len(seconds) for name, seconds in taken.items()} == dict.fromkeys("abc", 4)


def test_spread():
    assert timing.spread([3.0, 1.0, 7.0]) == timing.Spread(median=3.0, least=1.0, most=7.0)


def test_flops_are_those_counted_by_hand():
    x, weight = th.randn(2, 3, 8, 8), th.randn(5, 3, 3, 3)
    assert timing.count_flops(lambda: F.conv2d(x, weight, padding=1)) == 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_the_peak_does_what_it_counts(dtype):
    peak = timing.Peak(CPU, dtype, quick=True)
    assert peak.flops == timing.count_flops(peak) == 2 * (2 * 32 * 8 * 8) * (32 * 9)


def test_a_table():
    rows = [{"what": "a", "seconds": timing.Spread(0.25, 0.125, 1234.0)}, {"what": None, "seconds": 2}]
    assert tables.markdown(rows) == ("| what | seconds |\n| --- | --- |\n| a | 0.25 (0.125..1,234) |\n|  | 2 |")


@pytest.mark.parametrize("flags", [{}, {"class_cond": True, "num_classes": 3}, {"use_scale_shift_norm": False}])
def test_plain_and_ours_are_the_same_function(flags):
    defaults = {**models.model_and_diffusion_defaults(), "image_size": 32, "num_channels": 32, "num_res_blocks": 1}
    model, _ = models.create_model_and_diffusion(**{**defaults, **flags})
    for p in model.parameters():
        th.nn.init.normal_(p, std=0.05)
    x, t, target = th.randn(2, 3, 32, 32), th.tensor([3, 700]), th.randn(2, 3, 32, 32)
    cond = {"y": th.tensor([0, 2])} if "class_cond" in flags else {}

    def output_and_gradients(network):
        model.zero_grad()
        output = network(x, t, **cond)
        ((output - target) ** 2).mean().backward()
        return [output.detach(), *(p.grad.clone() for p in model.parameters())]

    ours, theirs = output_and_gradients(model), output_and_gradients(plain.PlainUNet(model))
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-7


def test_plain_and_ours_train_alike():
    def trained(name):
        step, loop = models.training_step(name, TINY, CPU)
        th.manual_seed(0)
        training_losses = loop.diffusion.training_losses

        def at_fixed_times(model, x_start, t, **kwargs):
            return training_losses(model, x_start, th.tensor([10, 600]), noise=th.ones_like(x_start), **kwargs)

        loop.diffusion.training_losses = at_fixed_times
        loop.ema_rate = 0.5 if name == "plain" else [0.5]
        before = [p.detach().clone() for p in loop.model.parameters()]
        step()
        averages = loop.ema_params if name == "plain" else loop.ema_params[0]
        moved = [p.detach() - b for p, b in zip(loop.model.parameters(), before, strict=True)]
        return th.cat([m.flatten() for m in moved]), th.cat(
            [(a.detach() - b).flatten() for a, b in zip(averages, before, strict=True)]
        )

    (ours, our_average), (theirs, their_average) = trained("fp32"), trained("plain")
    # the first step of Adam is the gradient's sign, which rounding decides where a gradient is all but zero
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 1e-2
    for moved, average in ((ours, our_average), (theirs, their_average)):
        th.testing.assert_close(average, moved / 2, rtol=0, atol=1e-6)
        assert average.abs().max() > 1e-5


def test_what_is_compiled_and_in_which_precision(monkeypatch):
    compiled = []
    monkeypatch.setattr(th.nn.Module, "compile", lambda self, **_: compiled.append(self))
    for name, variant in models.VARIANTS.items():
        if name == "diffusers":
            continue
        model, _ = models.sampling_network(name, TINY, CPU)
        assert (compiled[-1:] == [model]) == variant.compiled
        if name == "plain":  # it calls no module
            continue
        dtypes = set()
        conv = next(m for m in model.modules() if isinstance(m, th.nn.Conv2d) and m.in_channels == 64)
        conv.register_forward_hook(lambda module, inputs, output, dtypes=dtypes: dtypes.add(output.dtype))
        with th.inference_mode():
            model(th.randn(1, 3, 8, 8), th.tensor([1]))
        assert dtypes == {variant.dtype}


def test_the_peak_of_memory_is_that_of_the_worst_moment():
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        a = th.empty(1000, 1000)
        b = th.empty(500, 1000)
        del a, b
        c = th.empty(700, 1000)
        del c
    assert memory.peak_allocation(record) == 4 * 1_500_000
