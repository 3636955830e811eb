"""Every flag of every script: described, grouped, checked, used."""

import inspect
import re

import pytest
from harness import ROOT, load_script

from improved_diffusion.flags import FLAGS, GROUPS
from improved_diffusion.script_util import compute_defaults, extra_model_defaults, train_loop_defaults
from improved_diffusion.train_util import TrainLoop

SCRIPTS = ["image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample"]
OTHERS = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - set(SCRIPTS))


def flags_of(script):
    """{flag: its default}."""
    return vars(load_script(script).create_argparser().parse_args([]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_line_for_each_flag_with_its_group_and_default(monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "1000")
    text = load_script(script).create_argparser().format_help()
    groups = re.split(r"^(\w+):$", text, flags=re.MULTILINE)
    sections = dict(zip(groups[1::2], groups[2::2], strict=True))
    flags = flags_of(script)
    for name, default in flags.items():
        section = " ".join(sections[FLAGS[name].group].split())
        shown = f" [{default}]" if default not in ("", None) else ""
        found = re.search(rf"--{name} (\S+) {re.escape(FLAGS[name].help + shown)}(?= --|$)", section)
        assert found, name
        kind = {bool: "True|False", int: "N", float: "X", str: "TEXT", type(None): "N"}[type(default)]
        assert found[1] == kind, name
    assert len(flags) > 20 and sections.keys() - {"options"} <= set(GROUPS)


def test_no_flag_is_described_in_vain():
    help_of_others = "".join(load_script(name).create_argparser().format_help() for name in OTHERS)
    named = set(re.findall(r"--(\w+)", help_of_others))
    assert FLAGS.keys() <= named.union(*(flags_of(script) for script in SCRIPTS))


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_describe_all_that_they_take(script):
    for action in load_script(script).create_argparser()._actions:
        assert action.help, action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_unused(script):
    """A flag goes into the model, the training loop or the computing, or some code reads it."""
    module = load_script(script)
    taken = {*module.MODEL_FLAGS, *extra_model_defaults(), *compute_defaults()}
    if script.endswith("train"):
        assert train_loop_defaults().keys() <= inspect.signature(TrainLoop).parameters.keys()
        taken |= train_loop_defaults().keys()
    readers = [ROOT / "scripts" / f"{script}.py"]
    readers += [ROOT / "improved_diffusion" / f"{name}.py" for name in ("runs", "dry_run", "command_line")]
    read = set(re.findall(r"\bargs\.(\w+)", "\n".join(path.read_text() for path in readers)))
    assert flags_of(script).keys() - taken - read == set()


def test_checks_take_what_they_name_and_refuse_the_rest():
    for name, flag in FLAGS.items():
        assert (flag.works is None) == (flag.right == ""), name
    for name, good, bad in (
        ("batch_size", 1, 0),
        ("dropout", 0.0, 1.0),
        ("dropout", 0.9, -0.1),
        ("image_channels", 3, 2),
        ("noise_schedule", "cosine", "sigmoid"),
        ("ema_rate", "0.9,0.99", "0.9,1"),
        ("ema_rate", "0", "x"),
        ("num_workers", -1, -2),
        ("preview_samples", 0, -1),
        ("seed", None, -1),
        ("lr", 1e-9, 0.0),
    ):
        assert FLAGS[name].works(good) and not FLAGS[name].works(bad), name
