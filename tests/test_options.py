"""Every option: declared once, described, grouped, checked, used."""

import re

import pytest
from harness import ROOT, load_script
from hypothesis import given
from hypothesis import strategies as st

from improved_diffusion import options
from improved_diffusion.option_groups import Group, Valid, rows
from improved_diffusion.options import SampleOptions, SamplingOptions, ScriptOptions, TrainOptions
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.utils.errors import InputError

SCRIPTS = {
    "image_train": options.TrainOptions(),
    "image_sample": options.SampleOptions(),
    "image_nll": options.LikelihoodScriptOptions(),
    "plan_timesteps": options.PlanScriptOptions(),
    "super_res_train": options.SuperResTrainOptions(),
    "super_res_sample": options.SuperResSampleOptions(),
}
OTHERS = sorted({path.stem for path in (ROOT / "scripts").glob("[!_]*.py")} - SCRIPTS.keys())


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_line_for_each_option_with_its_group_and_default(monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = load_script(script).create_argparser()
    text = parser.format_help().partition(f"\n{parser.epilog[:20]}")[0]
    groups = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
    sections = dict(zip(groups[1::2], groups[2::2], strict=True))
    metavars = {bool: "True|False", int: "N", float: "X", str: "TEXT"}
    for row in rows(type(SCRIPTS[script])):
        section = " ".join(sections[row.group].split())
        shown = f" [{row.default}]" if row.default not in ("", None) else ""
        found = re.search(rf"--{row.name} (\S+) {re.escape(row.help + shown)}(?= --|$)", section)
        metavar = "|".join([metavars[row.type], *(row.valid.words if row.valid else ())])
        assert found and found[1] == ("PATH" if row.path else metavar), row.name


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_scripts_flags_are_its_options(script):
    flags = vars(load_script(script).create_argparser().parse_args([]))
    assert flags == SCRIPTS[script].values()
    assert len({row.name for row in rows(type(SCRIPTS[script]))}) == len(rows(type(SCRIPTS[script])))


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_describe_all_that_they_take(script):
    for action in load_script(script).create_argparser()._actions:
        assert action.help, action.dest


def every_row():
    groups = [cls for cls in vars(options).values() if isinstance(cls, type) and issubclass(cls, Group)]
    return {(group.__name__, row.name): row for group in groups if group is not Group for row in rows(group)}


@pytest.mark.parametrize("row", every_row().values(), ids=lambda row: f"{row.group}-{row.name}")
def test_a_default_has_the_declared_type_and_is_valid(row):
    assert type(row.default) is row.type or row.default is None
    assert row.valid is None or row.valid.required or row.valid.accepts(row.default)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("batch_size", 1, 0),
        ("batch_size", 4096, 10**30),
        ("dropout", 0.0, 1.0),
        ("dropout", 0.9, -0.1),
        ("dropout", 0.5, float("nan")),
        ("image_channels", 3, 2),
        ("noise_schedule", "cosine", "sigmoid"),
        ("ema_rate", "0.9,0.99", "0.9,1"),
        ("ema_rate", "0", "x"),
        ("num_workers", -1, -2),
        ("preview_samples", 0, -1),
        ("seed", None, -1),
        ("lr", 1e-9, 0.0),
        ("lr", 1.0, float("inf")),
        ("diffusion_steps", 21, 20),  # of the linear schedule: beta = 1
        ("fp16_scale_growth", 1e-3, 1e6),
        ("grad_clip", 0.5, float("nan")),
        ("lr_warmup_steps", 100, -1),
        ("min_snr_gamma", 0.5, 0.0),
        ("loss_weighting", "min_snr", "snr"),
        ("image_size", 1024, 10**30),
        ("num_channels", 192, 10**12),
    ],
)
def test_valid_values_are_taken_and_others_refused_by_name(name, good, bad):
    assert TrainOptions().replace(**{name: good}).values()[name] == good
    with pytest.raises(InputError) as refusal:
        TrainOptions().replace(**{name: bad})
    assert str(refusal.value).startswith(f"{name} {bad}") and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (dict(microbatch=5, batch_size=4), "microbatch 5"),
        (dict(microbatch=0, batch_size=4), "microbatch 0"),
        (dict(use_fp16=True, use_bf16=True), "use_bf16 True"),
    ],
)
def test_values_are_checked_against_each_other(values, named):
    with pytest.raises(InputError, match=named):
        TrainOptions().replace(**values)


@given(value=st.integers() | st.floats(), low=st.integers(-9, 9), high=st.integers(-9, 9))
def test_bounds(value, low, high):
    assert Valid(minimum=low, maximum=high).accepts(value) == (low <= value <= high)
    assert Valid(above=low, below=high).accepts(value) == (low < value < high)


def test_words_beside_numbers():
    valid = Valid(minimum=1, words=("auto",))
    assert [valid.accepts(value) for value in (1, 0, "auto", "1", "")] == [True, False, True, False, False]
    assert TrainOptions().replace(microbatch="auto").training.microbatch == "auto"
    with pytest.raises(InputError, match=r"microbatch most: give .* or auto"):
        TrainOptions().replace(microbatch="most")


def test_a_function_is_called_with_the_options_it_takes():
    def function(lr, image_size, other=3, **_):
        return lr, image_size, other

    settings = TrainOptions().replace(lr=0.5, image_size=8)
    assert settings.call(function) == (0.5, 8, 3)
    assert settings.call(function, lr=2, other=4) == (2, 8, 4)


def test_groups_are_frozen_and_replaced_as_a_whole():
    settings = TrainOptions()
    with pytest.raises(AttributeError):
        settings.training.lr = 1.0
    assert settings.replace(lr=1.0, no_option=3).training.lr == 1.0 and settings.training.lr == 1e-4
    assert isinstance(settings, ScriptOptions)


def test_samplers_are_the_functions_of_the_table():
    for name in SAMPLERS:
        assert SamplingOptions(sampler=name).sampler_name == name
    assert SamplingOptions(use_ddim=True).sampler_name == "ddim"
    (row,) = [row for row in rows(SamplingOptions) if row.name == "sampler"]
    assert all(name in row.help for name in SAMPLERS)
    with pytest.raises(InputError, match="sampler nowhere"):
        SamplingOptions(sampler="nowhere")


def test_options_of_samplers():
    assert SamplingOptions().sampler_options == {}
    assert SamplingOptions(use_ddim=True, eta=0.5).sampler_options == {"eta": 0.5}
    assert SamplingOptions(sampler="unipc").sampler_options == {"steps": None, "spacing": "lam"}
    options = SamplingOptions(sampler="dpm++2m", sampling_steps=7, spacing="time", eta=1.0)
    assert options.sampler_options == {"steps": 7, "spacing": "time", "eta": 1.0}


@pytest.mark.parametrize(
    "values, named",
    [
        (dict(sampling_steps=5), r"^sampling_steps 5: .*ancestral.* timestep_respacing"),
        (dict(use_ddim=True, sampling_steps=5), r"^sampling_steps 5: .*ddim"),
        (dict(spacing="karras"), r"^spacing karras: .*ancestral"),
        (dict(eta=0.0), r"^eta 0.0: .*ancestral"),
        (dict(use_ddim=True, sampler="unipc"), r"^use_ddim True: .*unipc"),
        (dict(sampler="unipc", eta=0.5), r"^eta 0.5: .*unipc"),
        (dict(sampler="unipc", timestep_respacing="50"), r"^timestep_respacing 50: .*unipc.* sampling_steps"),
    ],
    ids=str,
)
def test_options_that_a_sampler_has_no_use_for(values, named):
    with pytest.raises(InputError, match=named):
        SampleOptions().replace(**values)
