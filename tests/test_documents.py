"""README, CONTRIBUTING and docs/: their commands have valid flags, their programs run, what they name exists."""

import argparse
import functools
import json
import re
import shlex
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, TINY, load_script, save_weights
from PIL import Image
from test_script_util import ORIGINAL_FLAGS

from improved_diffusion.cli.flag_table import SCRIPTS, flag_table
from improved_diffusion.cli.parser import parse_flags

PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PATHS}
README = TEXTS["README.md"]
documents = pytest.mark.parametrize("document", TEXTS)


def test_the_readme_is_a_front_door():
    assert len(README.splitlines()) <= 150
    linked = {name for name in re.findall(r"\]\(([^)#]+)\)", README) if name in TEXTS}
    assert linked | {"README.md"} == set(TEXTS)


def test_the_readme_names_each_command_and_extra():
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    commands = re.findall(r"^improved-diffusion(-[a-z-]+) = ", pyproject, flags=re.MULTILINE)
    (extras,) = re.findall(r"^\[project.optional-dependencies\]\n(.*?)^\[", pyproject, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"^(\w+) = \[", extras, flags=re.MULTILINE)
    assert commands and names
    (paragraph,) = re.findall(r"has them as commands too:(.*?)\.", README, flags=re.DOTALL)
    assert sorted(re.findall(r"`(?:improved-diffusion)?(-[a-z-]+)`", paragraph)) == sorted(commands)
    (listed,) = re.findall(r"```\n(pip install -e \..*?Further extras:.*?)\.\s", README, flags=re.DOTALL)
    assert [name for name in names if name not in listed] == []


# ---------------------------------------------------------------- programs


PROGRAMS = {
    f"{name}-{i}": program
    for name, text in TEXTS.items()
    for i, program in enumerate(re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE))
}


def make_run(folder):
    """The run that the program of recipes.md reads, with a tiny network."""
    folder.mkdir(parents=True)
    sizes = {**TINY, "image_size": 64, "attention_resolutions": "32"}
    save_weights(folder / "ema_0.999_030000.pt", **sizes)
    (folder / "config.json").write_text(json.dumps({"script": "image_train", "flags": sizes, "class_names": None}))


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_the_programs_run(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "runs/photos64" in program:
        make_run(tmp_path / "runs" / "photos64")
    names = {}
    exec(compile(program.replace("range(1000)", "range(3)"), "example", "exec"), names)
    tensors = {name: value for name, value in names.items() if isinstance(value, th.Tensor)}
    assert len(tensors) >= 2
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())


def test_the_readme_has_one_program_of_ten_lines():
    (program,) = (text for name, text in PROGRAMS.items() if name.startswith("README"))
    assert 5 <= len([line for line in program.splitlines() if line.strip()]) <= 12


# ---------------------------------------------------------------- commands


def script_calls():
    """The calls of scripts in blocks and tables that are spelled out: (script, words)."""
    for document, text in TEXTS.items():
        text = text.replace("\\\n", " ")
        for name, rest in re.findall(
            r"(?:^|`|\$ )(?:python|torchrun .*|mpiexec .*|srun .*) scripts/(\w+)\.py ([^`\n]*)", text, re.M
        ):
            if "..." not in rest and "SOURCE" not in rest:
                yield pytest.param(name, shlex.split(rest, comments=True), id=f"{document}: {name} {rest}")


CALLS = list(script_calls())


@pytest.mark.parametrize(("script", "words"), CALLS)
def test_the_calls_of_scripts_have_flags_that_exist_and_values_that_are_valid(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py", *words])
    parser = load_script(script).create_argparser()
    if script in SCRIPTS:
        parse_flags(parser, SCRIPTS[script]())
    else:
        own = (
            load_script(script).split(words)[0] if script == "convert" else words
        )  # after --, flags of another program
        parser.parse_args(own)


def test_every_script_is_called():
    scripts = {path.stem for path in (ROOT / "scripts").glob("[!_]*.py")}
    assert {parameters.values[0] for parameters in CALLS} == scripts


def test_the_quickstart_is_five_commands_each_of_which_reads_what_the_others_wrote():
    (block,) = re.findall(r"^## Quickstart\n+```\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[1] for words in commands] == [
        f"scripts/{name}.py" for name in ("prepare", "image_train", "plot_progress", "image_sample", "image_nll")
    ]
    trained, drawn, measured = (flags_of(commands[i]) for i in (1, 3, 4))
    assert trained["--data_dir"] == measured["--data_dir"] == commands[0][-1]
    assert commands[2][-1] == trained["--log_dir"]
    weights = f"{trained['--log_dir']}/ema_{trained['--ema_rate']}_{int(trained['--lr_anneal_steps']):06d}.pt"
    assert drawn["--model_path"] == measured["--model_path"] == weights


def flags_of(words):
    return dict(zip(words[2::2], words[3::2], strict=True))


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target for text in TEXTS.values() for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE)
    }
    assert {"demo", "test"} <= named <= targets


# ---------------------------------------------------------------- flags


def test_flags_md_is_generated_from_the_options():
    assert TEXTS["docs/flags.md"] == flag_table()


@functools.cache
def known_flags():
    """Of all scripts, and of prepare.py's sources."""
    parsers = [load_script(path.stem).create_argparser() for path in (ROOT / "scripts").glob("[!_]*.py")]
    for parser in parsers:
        for action in parser._actions:
            parsers += (action.choices or {}).values() if isinstance(action, argparse._SubParsersAction) else []
    return {flag for parser in parsers for flag in re.findall(r"--(\w+)", parser.format_help())}


@documents
def test_flags_that_are_named_exist(document):
    launchers = {
        "nproc_per_node",
        "nnodes",
        "node_rank",
        "master_addr",
        "max_restarts",
        "ntasks",
        "gpus",
        "no",
    }  # --no-python
    benchmarks = re.findall(r"^    (\w+)=", (ROOT / "benchmarks/run.py").read_text(), flags=re.MULTILINE)
    reproduce = [
        flag for path in (ROOT / "reproduce").glob("*.py") for flag in re.findall(r'"--(\w+)"', path.read_text())
    ]
    text = re.sub(
        r"^#SBATCH.*|`--requeue`|--kill-on-bad-exit|--index-url", "", TEXTS[document], flags=re.MULTILINE
    )  # Slurm's
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", text))
    assert named <= known_flags() | launchers | {
        *benchmarks,
        *reproduce,
        "variants",
        "out_dir",
    }  # the last is the example's


def test_every_flag_that_the_original_does_not_have_is_a_difference():
    original = {name for flags in ORIGINAL_FLAGS.values() for name in flags}
    new = {name for options in SCRIPTS.values() for name in options().values()} - original
    assert len(new) > 15
    assert {flag for flag in new if f"`--{flag}`" not in TEXTS["docs/differences.md"]} == set()


# ---------------------------------------------------------------- files and links


def test_pictures_are_there():
    found = [ROOT / name for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)]
    found += [
        ROOT / "docs" / name
        for document, text in TEXTS.items()
        if document.startswith("docs/")
        for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    ]
    assert {path.name for path in found} == {path.name for path in (ROOT / "docs").rglob("*.png")}
    for path in found:
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 10


@documents
def test_links_lead_somewhere(document):
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", TEXTS[document]):
        target = (ROOT / document).parent / path if path else ROOT / document
        assert target.exists(), path
        if anchor:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_the_maps_name_files_that_exist(document):
    roots = [ROOT, ROOT / "improved_diffusion", *(p for p in (ROOT / "improved_diffusion").iterdir() if p.is_dir())]
    names = set(re.findall(r"[\w/]+\.py\b", TEXTS[document]))
    assert len(names) > 5
    assert {name for name in names if not any((root / name).exists() for root in roots)} == set()


def test_the_map_names_every_module():
    modules = {path.name for path in (ROOT / "improved_diffusion").rglob("*.py") if path.stem not in ("__init__",)}
    assert {name for name in modules if name not in TEXTS["docs/architecture.md"]} == set()
