"""The seconds before a script's main(): packages that are missing, and Ctrl-C while torch is imported."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import metadata

import pytest
from harness import ROOT, environment

from improved_diffusion.cli import parser

SCRIPTS = sorted(path.stem for path in (ROOT / "scripts").glob("[!_]*.py"))
SLOW_TORCH = "import time; print('importing', flush=True); time.sleep(60)"


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_checkout_that_is_not_installed_tells_what_to_install(tmp_path, script):
    """-S: without the installed packages."""
    path = ROOT / "scripts" / f"{script}.py"
    env = {**environment(), "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-S", path], cwd=tmp_path, env=env, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and done.stdout == ""
    assert line.startswith(f"{script}.py: error: improved-diffusion, ") and line.endswith(f"pip install -e {ROOT}")


def test_an_import_that_fails_otherwise_keeps_its_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("import gone_from_here")
    env = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    words = [sys.executable, ROOT / "scripts" / "image_sample.py"]
    done = subprocess.run(words, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("No module named 'gone_from_here'\n")


def test_the_packages_are_those_of_the_project():
    needed = {
        re.match(r"[\w-]+", text)[0] for text in metadata.requires("improved-diffusion") if "extra ==" not in text
    }
    tree = ast.parse((ROOT / "scripts" / "_start.py").read_text())
    (packages,) = (
        node.value for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == "PACKAGES"
    )
    assert set(ast.literal_eval(packages).values()) == {*needed, "improved-diffusion"} - {"mpi4py"}  # only with MPI


@pytest.fixture
def installed(tmp_path):
    """A folder with the package as it is installed, scripts included, and a torch that takes a minute to import."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "improved_diffusion", tmp_path / "improved_diffusion", ignore=ignore)
    shutil.copytree(ROOT / "scripts", tmp_path / "improved_diffusion" / "scripts", ignore=ignore)
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    return tmp_path


COMMAND = "import sys; sys.argv[0] = '/bin/improved-diffusion-nll'; import improved_diffusion.scripts.image_nll"


@pytest.mark.parametrize(
    ("words", "quiet"),
    [
        ([str(ROOT / "scripts" / "image_sample.py")], True),
        ([str(ROOT / "scripts" / "super_res_train.py")], True),
        (["-m", "improved_diffusion.scripts.image_nll"], True),
        (["-c", COMMAND], True),  # a console command
        (["-c", "import improved_diffusion.scripts.image_nll"], False),  # another program's signals are its own
    ],
    ids=["a script", "another", "-m", "a command", "a library"],
)
def test_ctrl_c_during_the_import_is_quiet(installed, words, quiet):
    env = environment(PYTHONPATH=str(installed))
    with subprocess.Popen(
        [sys.executable, *words], cwd=installed, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert (err == "") == quiet and ("KeyboardInterrupt" in err) != quiet


def test_main_has_the_usual_handler():
    before, seen = signal.signal(signal.SIGINT, signal.SIG_DFL), []
    try:
        parser.run(lambda: seen.append(signal.getsignal(signal.SIGINT)))
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [signal.default_int_handler]
