"""The package as others get it: installed elsewhere, its metadata, its commands, and what the README promises."""

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch as th
from harness import ROOT, load_script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from PIL import Image
from test_script_util import ORIGINAL_FLAGS

import improved_diffusion
from improved_diffusion.cli.parser import parse_flags

MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "improved_diffusion").rglob("*.py"))
SCRIPTS = ["image_train", "image_sample", "image_nll", "super_res_train", "super_res_sample"]
README = (ROOT / "README.md").read_text(encoding="utf-8")


# ---------------------------------------------------------------- installing


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where `pip install` of a copy of the sources put the package, without its dependencies."""
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("improved_diffusion", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", target, copy]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def metadata(installed):
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    return distribution


@pytest.mark.slow
def test_an_installed_package_works_elsewhere(installed, tmp_path):
    scripts = [f"improved_diffusion/scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")]
    shipped = [str(path.relative_to(installed)) for path in (installed / "improved_diffusion").rglob("*.py")]
    assert sorted(shipped) == sorted(MODULES + scripts)
    assert (installed / "improved_diffusion/py.typed").exists()
    names = [path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in shipped]
    program = f"""if True:
        import importlib, sys
        sys.path.insert(0, {str(installed)!r})
        for name in {names}:
            module = importlib.import_module(name)
            assert module.__file__.startswith({str(installed)!r}), module.__file__
        assert "mpi4py" not in sys.modules  # an installed MPI may be broken, and one process needs none
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_every_script_has_a_console_command(installed, metadata, tmp_path):
    """But for those that prepare data sets."""
    commands = {entry.name: entry.value for entry in metadata.entry_points if entry.group == "console_scripts"}
    scripts = {path.stem for path in (ROOT / "scripts").glob("[!_]*.py") if not path.stem.startswith("prepare_")}
    assert sorted(commands.values()) == sorted(f"improved_diffusion.scripts.{script}:cli" for script in scripts)
    for command in commands:
        words, env = [installed / "bin" / command, "--help"], {**os.environ, "PYTHONPATH": str(installed)}
        done = subprocess.run(words, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: {command} ")


@pytest.mark.slow
def test_the_version_has_one_source(metadata):
    assert metadata.version == improved_diffusion.__version__


@pytest.mark.slow
def test_extras(metadata):
    assert (metadata.name, metadata.metadata["License-Expression"]) == ("improved-diffusion", "MIT")
    assert {"mpi", "demo", "tensorboard", "lsun", "test"} <= set(metadata.metadata.get_all("Provides-Extra"))
    named = {(extra, r.name) for extra in ("mpi", "demo", "tensorboard", "lsun") for r in required(metadata, extra)}
    assert {("mpi", "mpich"), ("demo", "scikit-learn"), ("demo", "matplotlib"), ("lsun", "lmdb")} <= named
    assert ("tensorboard", "tensorboard") in named


def required(metadata, extra):
    """The requirements that an extra adds to the plain ones."""
    requirements = [Requirement(text) for text in metadata.requires]
    return [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})]


def pins(name):
    """The versions that a file of constraints names: {package: version}."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(package): version for package, version in (line.split("==") for line in lines)}


@pytest.mark.slow
def test_the_tested_versions_lie_in_the_required_ranges(metadata):
    tested, oldest = pins("constraints.txt"), pins("constraints-oldest.txt")
    assert tested["torch"] == "2.13.0"
    requirements = [r for r in map(Requirement, metadata.requires) if not r.extras]
    assert {"torch", "numpy", "blobfile", "mpi4py", "pillow", "tqdm", "pytest", "ruff"} <= {
        r.name for r in requirements
    }
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert tested[name] in requirement.specifier, f"{name} {tested[name]} is not in {requirement.specifier}"
        assert {part.operator for part in requirement.specifier} == {">="}, f"{name} has an upper bound"
        (least,) = (Version(part.version) for part in requirement.specifier)
        if name in oldest:  # the tests' tools may be newer
            assert Version(oldest[name]) == least, f"{name}: {requirement.specifier} is not what was tested"
    plain = {canonicalize_name(r.name) for r in requirements if r.marker is None}
    assert plain <= set(oldest)


# ---------------------------------------------------------------- commands


def commands(target):
    """The command lines that `make TARGET` runs where nothing has been made yet, each as a list of words."""
    words = ["make", "--dry-run", "--always-make", "--no-print-directory", target]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]


def test_importing_the_factories_imports_nothing_heavy():
    """Next to torch and numpy: what looks at files, images, ranks or compilers comes when it is used."""
    code = (
        "import sys, torch.utils.checkpoint, numpy; before = set(sys.modules); import improved_diffusion.script_util; "
        "print({name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("{'improved_diffusion'}\n", "")


def test_the_automatic_check_is_make_test():
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK)
    assert "make test" in run.read_text().splitlines()


def test_make_test_lints_and_runs_the_suite_with_coverage():
    ran = commands("test")
    python = ".venv/bin/python"
    assert [python, "-m", "ruff", "check", "."] in ran
    assert [python, "-m", "ruff", "format", "--check", "."] in ran
    assert [python, "-m", "mypy"] in ran
    suite, faults = ran[-2:]
    assert suite[:3] == faults[:3] == [python, "-m", "pytest"]
    assert {"--cov", "--cov-fail-under=90"} <= set(suite)
    assert suite[suite.index("--ignore") + 1] == faults[3] == "tests/faults"  # which want the machine to themselves
    assert any(words[-1] == ".[test]" for words in ran)


def test_make_compatibility_tests_the_newest_and_the_oldest_versions():
    ran = commands("compatibility")
    newest, oldest = (words for words in ran if words[-1] == ".[test]")
    assert "--constraint" not in newest
    assert oldest[oldest.index("--constraint") + 1] == "constraints-oldest.txt"
    suites = [words for words in ran if words[1:3] == ["-m", "pytest"]]
    assert [words[0] for words in suites] == [newest[0], oldest[0]]


def test_make_demo_calls_the_scripts_with_flags_that_they_have():
    ran = commands("demo")
    assert any(words[-1] == ".[demo]" for words in ran)
    calls = {}
    for words in ran:
        names = [word for word in words if word.startswith("scripts/")]
        if names:
            name = names[0].removeprefix("scripts/").removesuffix(".py")
            rest = words[words.index(names[0]) + 1 :]
            calls[name] = load_script(name).create_argparser().parse_args(rest)
    assert list(calls) == ["prepare", "image_train", "plot_progress", "image_sample"]
    trained, drawn = vars(calls["image_train"]), vars(calls["image_sample"])
    assert trained["data_dir"] == calls["prepare"].out
    last = min(trained[flag] for flag in ("max_steps", "lr_anneal_steps") if trained[flag])
    assert drawn["model_path"] == f"{trained['log_dir']}/ema_{trained['ema_rate']}_{last:06d}.pt"  # config.json beside
    size = trained["image_size"]
    picture = f"{drawn['log_dir']}/samples_{drawn['num_samples']}x{size}x{size}x{trained['image_channels']}.png"
    assert drawn["classes"] == ",".join(map(str, range(trained["num_classes"])))
    assert ran[-1][0] == "echo" and ran[-1][-1].endswith(picture)  # it ends with the picture's path


# ---------------------------------------------------------------- the README


PROGRAMS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_the_readmes_examples_run(program):
    names = {}
    exec(compile(program.replace("range(1000)", "range(3)"), "README.md", "exec"), names)
    tensors = {name: value for name, value in names.items() if isinstance(value, th.Tensor)}
    assert len(tensors) >= 2
    assert all(value.isfinite().all() for value in tensors.values())


def test_the_readmes_first_example_has_ten_lines():
    assert len(PROGRAMS) == 2
    assert 5 <= len([line for line in PROGRAMS[0].splitlines() if line.strip()]) <= 12


def script_calls():
    """The calls of scripts in the README's blocks and tables that are spelled out: (script, words)."""
    text = README.replace("\\\n", " ")
    for line in re.findall(r"(?:^|`|\$ )python scripts/(\w+\.py [^`\n]*)", text, flags=re.MULTILINE):
        name, *words = shlex.split(line)
        if "..." not in line:
            yield pytest.param(name.removesuffix(".py"), words, id=line)


@pytest.mark.parametrize(("script", "words"), list(script_calls()))
def test_the_readmes_calls_of_scripts_have_flags_that_work(monkeypatch, script, words):
    monkeypatch.setattr(sys, "argv", [f"scripts/{script}.py", *words])
    assert parse_flags(load_script(script).create_argparser())


def test_the_readme_calls_every_script():
    called = {parameters.values[0] for parameters in script_calls()}
    assert called == {path.stem for path in (ROOT / "scripts").glob("[!_]*.py")}


def test_the_readmes_pictures_and_links_are_there():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) >= 5
    for name in pictures:
        with Image.open(ROOT / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / name).exists(), name
    anchors = {
        re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)", README, re.M)
    }
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_the_readme_names_no_flag_that_does_not_exist():
    scripts = [path.stem for path in (ROOT / "scripts").glob("[!_]*.py")]
    helps = "".join(load_script(name).create_argparser().format_help() for name in scripts)
    known = {"out_dir", *re.findall(r"--(\w+)", helps)}  # the first is an example's
    others = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "max_restarts", "ntasks", "gpus"}  # launchers'
    measured = {"variants", *re.findall(r"^    (\w+)=", (ROOT / "benchmarks/run.py").read_text(), flags=re.MULTILINE)}
    named = set(re.findall(r"(?<![\w-])--([a-z]\w+)", README))
    assert len(named) > 30
    assert named - known - others - measured == set()


def test_the_readme_names_every_flag_that_the_original_did_not_have():
    original = {name for flags in ORIGINAL_FLAGS.values() for name in flags}
    new = {
        name for script in SCRIPTS for name in vars(load_script(script).create_argparser().parse_args([]))
    } - original
    assert len(new) > 15
    assert {flag for flag in new if f"--{flag}" not in README} == set()
