"""Every flag of every script: described, grouped, checked, used."""

import argparse
import re

import numpy as np
import pytest
from harness import ROOT, TINY, flags, load_script, run_script, save_weights, write_images

from improved_diffusion.cli.parser import parse_flags
from improved_diffusion.options import FLAGS, GROUPS

SCRIPTS = ["image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample"]
OTHERS = sorted({path.stem for path in (ROOT / "scripts").glob("*.py")} - set(SCRIPTS))


def flags_of(script):
    """{flag: its default}."""
    return vars(load_script(script).create_argparser().parse_args([]))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_a_line_for_each_flag_with_its_group_and_default(monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "1000")
    parser = load_script(script).create_argparser()
    text = parser.format_help().removesuffix(f"\n{parser.epilog}\n")
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


def parsers_of(script):
    """A script's parser, and those of its sub-commands."""
    parser = load_script(script).create_argparser()
    commands = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser, *(command for choices in commands for command in choices.values())]


def test_no_flag_is_described_in_vain():
    help_of_others = "".join(parser.format_help() for name in OTHERS for parser in parsers_of(name))
    named = set(re.findall(r"--(\w+)", help_of_others))
    assert FLAGS.keys() <= named.union(*(flags_of(script) for script in SCRIPTS))


@pytest.mark.parametrize("script", OTHERS)
def test_the_other_scripts_describe_all_that_they_take(script):
    for parser in parsers_of(script):
        for action in parser._actions:
            assert action.help, action.dest


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flag_is_unused(tmp_path, monkeypatch, script):
    """Each is read in a run of the script, the flags' own checks not counted."""
    words = dict(TINY, batch_size=2)
    words.update(dict(large_size=8, small_size=4) if script.startswith("super") else dict(image_size=8))
    if script in ("image_train", "super_res_train", "image_nll"):
        words.update(data_dir=write_images(tmp_path / "images"), num_workers=0)
    if script.endswith("train"):
        words.update(max_steps=1)
    else:
        model_path = save_weights(tmp_path / "m.pt", super_resolution=script.startswith("super"))
        words.update(model_path=model_path, num_samples=2, timestep_respacing=2)
    if script == "super_res_sample":
        np.savez(tmp_path / "base.npz", np.zeros((2, 4, 4, 3), np.uint8))
        words.update(base_samples=tmp_path / "base.npz")
    read = set()

    class Spy(argparse.Namespace):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(load_script(script), "parse_flags", lambda parser: Spy(**vars(parse_flags(parser))))
    assert run_script(script, flags(**words), tmp_path / "log") == 0
    assert flags_of(script).keys() - read == {"preset"}  # which is taken while flags are parsed


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
        ("fp16_scale_growth", 1e-3, 1e6),
        ("image_size", 1024, 10**30),
        ("large_size", 1024, 10**30),
        ("num_channels", 192, 10**12),
        ("batch_size", 4096, 10**30),
    ):
        assert FLAGS[name].works(good) and not FLAGS[name].works(bad), name
