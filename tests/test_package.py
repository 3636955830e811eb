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

MODULES = sorted(path.stem for path in (ROOT / "improved_diffusion").glob("*.py") if path.stem != "__init__")


# ---------------------------------------------------------------- installing


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where `pip install` of a copy of the sources put the package, without its dependencies."""
    copy, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(
        ROOT / "improved_diffusion", copy / "improved_diffusion", ignore=shutil.ignore_patterns("__pycache__")
    )
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
    assert sorted(path.stem for path in (installed / "improved_diffusion").glob("*.py")) == ["__init__", *MODULES]
    program = f"""if True:
        import importlib, sys
        sys.path.insert(0, {str(installed)!r})
        for name in {MODULES}:
            module = importlib.import_module("improved_diffusion." + name)
            assert module.__file__.startswith({str(installed)!r}), module.__file__
        assert "mpi4py" not in sys.modules  # an installed MPI may be broken, and one process needs none
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.slow
def test_extras(metadata):
    assert (metadata.name, metadata.metadata["License"]) == ("improved-diffusion", "MIT")
    assert {"mpi", "demo", "tensorboard", "lsun", "test"} <= set(metadata.metadata.get_all("Provides-Extra"))
    named = {(extra, r.name) for extra in ("mpi", "demo", "tensorboard", "lsun") for r in required(metadata, extra)}
    assert {("mpi", "mpich"), ("demo", "scikit-learn"), ("demo", "matplotlib"), ("lsun", "lmdb")} <= named
    assert ("tensorboard", "tensorboard") in named


def required(metadata, extra):
    """The requirements that an extra adds to the plain ones."""
    requirements = [Requirement(text) for text in metadata.requires]
    return [r for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})]


@pytest.mark.slow
def test_the_tested_versions_lie_in_the_required_ranges(metadata):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    assert pinned["torch"] == "2.13.0"
    requirements = [Requirement(text) for text in metadata.requires]
    assert {"torch", "numpy", "blobfile", "pillow", "tqdm", "pytest", "ruff"} <= {r.name for r in requirements}
    for requirement in requirements:
        version = pinned[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{requirement.name} {version} is not in {requirement.specifier}"


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
        "import sys, torch, numpy; before = set(sys.modules); import improved_diffusion.script_util; "
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
    suite, faults = ran[-2:]
    assert suite[:3] == faults[:3] == [python, "-m", "pytest"]
    assert {"--cov", "--cov-fail-under=90"} <= set(suite)
    assert suite[suite.index("--ignore") + 1] == faults[3] == "tests/faults"  # which want the machine to themselves
    assert any(words[-1] == ".[test]" for words in ran)


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
    assert list(calls) == ["prepare_digits", "image_train", "plot_progress", "image_sample"]
    trained, drawn = vars(calls["image_train"]), vars(calls["image_sample"])
    assert trained["data_dir"] == calls["prepare_digits"].out_dir
    last = min(trained[flag] for flag in ("max_steps", "lr_anneal_steps") if trained[flag])
    assert drawn["model_path"] == f"{trained['log_dir']}/ema_{trained['ema_rate']}_{last:06d}.pt"  # config.json beside
    size = trained["image_size"]
    picture = f"{drawn['log_dir']}/samples_{drawn['num_samples']}x{size}x{size}x{trained['image_channels']}.png"
    assert drawn["classes"] == ",".join(map(str, range(trained["num_classes"])))
    assert ran[-1][0] == "echo" and ran[-1][-1].endswith(picture)  # it ends with the picture's path
