"""The layout of the package: imports point downwards, and each layer knows only its own concerns."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "improved_diffusion"

# From top to bottom; the modules of a line may import each other, but not in a circle.
LAYERS = (
    ("scripts",),
    ("notebook",),
    ("cli",),
    ("metrics",),
    ("inference",),
    ("train_util",),
    ("training",),
    ("image_datasets",),  # above data, of which it is the original's interface
    ("data",),
    ("script_util",),
    ("options",),
    ("option_groups",),
    ("samplers",),
    ("solvers",),
    ("guidance",),
    ("respace",),
    ("gaussian_diffusion",),
    ("forward_process",),
    ("resample",),  # gathers losses over the ranks
    ("networks",),
    ("unet", "fp16_util", "nn", "losses", "schedules"),
    ("logger",),  # its file names hold the rank
    ("dist_util",),
    ("utils",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Strings of the library that begin a flag: (module, string) -> why
FLAGS_ALLOWED = {
    ("script_util", "--"): "add_dict_to_argparser() is the original's, and forks call it",
}

# Private names of torch: (module, name) -> why
PRIVATE_ALLOWED = {
    ("nn", "th._foreach_mul_"): "the multi-tensor kernels have no public name; optimizers and timm use this one",
    ("nn", "th._foreach_add_"): "as above",
    ("utils.memory", "torch.utils._python_dispatch.TorchDispatchMode"): "torch documents the mode under this name only",
}


def module_name(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__").removeprefix("improved_diffusion.")


FILES = {
    module_name(p): p for folder in ("improved_diffusion", "scripts") for p in sorted((ROOT / folder).rglob("*.py"))
}
FILES.pop("improved_diffusion")  # imports nothing, see below
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def layer(module):
    return module.partition(".")[0]


def imported(module, tree, known):
    """Our modules that a module imports, at its top or inside functions."""
    package = f"improved_diffusion.{module}".split(".")
    if not module.startswith("scripts") and FILES[module].name != "__init__.py":
        package.pop()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            name = name.removeprefix("improved_diffusion.") if name.startswith("improved_diffusion") else None
            while name and name not in known:
                name = name.rpartition(".")[0]
            if name:
                found.add(name)
    return found


def upward(imports):
    """Imports of a higher layer."""
    return [(m, t) for m, targets in imports.items() for t in targets if LEVEL[layer(t)] < LEVEL[layer(m)]]


def circle(imports):
    """Modules that import each other, directly or not: one such list, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return None
        done.add(module)
        path.append(module)
        found = next(filter(None, map(visit, sorted(imports.get(module, ())))), None)
        path.pop()
        return found

    return next(filter(None, map(visit, sorted(imports))), None)


def docstrings(tree):
    nodes = [n for n in ast.walk(tree) if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef))]
    return {id(n.body[0].value) for n in nodes if n.body and isinstance(n.body[0], ast.Expr)}


def flag_strings(tree):
    """Strings that begin a flag or name one, without docstrings."""
    skipped = docstrings(tree)
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [
        n.value
        for n in strings
        if id(n) not in skipped
        and (n.value.startswith("--") or any(w.startswith("--") and w[2:3].isalpha() for w in n.value.split()))
    ]


def dotted(node):
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def is_private(name):
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


def private_torch(tree):
    """Private names of torch that a module uses."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [dotted(node)]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name for name in names if name.startswith(("th.", "torch.", "dist.", "F.")) and is_private(name)}
    # of th._C._f both th._C and the whole name are found
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


def mentions_namespace(tree):
    """Whether a module knows argparse's Namespace, or probes one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "Namespace":
            return True
        if isinstance(node, (ast.Name, ast.alias)) and getattr(node, "id", getattr(node, "name", "")) == "Namespace":
            return True
        probes = isinstance(node, ast.Call) and dotted(node.func) in ("hasattr", "vars") and node.args
        if probes and dotted(node.args[0]).split(".")[-1] == "args":
            return True
    return False


IMPORTS = {module: imported(module, tree, FILES.keys()) - {module} for module, tree in TREES.items()}


def test_every_module_has_a_layer():
    assert {layer(module) for module in FILES} == set(LEVEL)


def test_the_map_in_the_packages_docstring_is_this_one():
    """In this order, each layer once."""
    text = ast.get_docstring(ast.parse((PACKAGE / "__init__.py").read_text())).partition("The map")[2]
    rows = [re.match(r"([a-z_]\w*(?:, \w+)*)  +\S", line) for line in text.splitlines()]
    names = [name for row in rows if row for name in row[1].split(", ")]
    assert sorted(names) == sorted(LEVEL.keys() - {"scripts"})
    assert [LEVEL[name] for name in names] == sorted(LEVEL[name] for name in names)


def test_imports_point_downwards():
    assert upward(IMPORTS) == []


def test_there_is_no_circle():
    assert circle(IMPORTS) is None


def test_the_package_itself_imports_nothing():
    assert not [n for n in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text())) if isinstance(n, ast.ImportFrom)]


def test_utils_import_nothing_of_ours():
    assert {t for m, targets in IMPORTS.items() if layer(m) == "utils" for t in targets if layer(t) != "utils"} == set()


def library():
    return {module: tree for module, tree in TREES.items() if layer(module) not in ("cli", "scripts")}


def test_only_cli_knows_flags():
    assert {(module, s) for module, tree in library().items() for s in flag_strings(tree)} == set(FLAGS_ALLOWED)


def test_only_cli_knows_a_namespace():
    assert [module for module, tree in library().items() if mentions_namespace(tree)] == []


def test_no_private_name_of_torch():
    assert {(module, name) for module, tree in TREES.items() for name in private_torch(tree)} == set(PRIVATE_ALLOWED)


# ---------------------------------------------------------------- what the checks see


def of(source, module="data.loader"):
    return imported(module, ast.parse(source), FILES.keys())


def test_imports_of_all_forms_are_seen():
    assert of("from .. import logger, dist_util") == {"logger", "dist_util"}
    assert of("from ..utils.errors import InputError") == {"utils.errors"}
    assert of("def f():\n    from ..image_datasets import load_data") == {"image_datasets"}
    assert of("from . import packed\nfrom .images import read_image") == {"data.packed", "data.images"}
    assert of("import improved_diffusion.train_util as t\nimport torch.nn, os") == {"train_util"}
    assert of("from improved_diffusion import nn") == {"nn"}
    assert of("from . import dist_util", "logger") == {"dist_util"}
    assert of("from improved_diffusion.cli.parser import run", "scripts.image_nll") == {"cli.parser"}


def test_upward_arrows_and_circles_are_seen():
    assert upward({"utils.files": {"logger"}, "logger": {"utils.files"}}) == [("utils.files", "logger")]
    assert circle({"nn": {"unet"}, "unet": {"losses"}, "losses": {"nn"}}) == ["losses", "nn", "unet"]
    assert circle({"nn": {"unet", "losses"}, "unet": {"losses"}}) is None


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('raise InputError("give another --log_dir")', ["give another --log_dir"]),
        ('f("--seed")', ["--seed"]),
        ('f(f"--{name}")', ["--"]),
        ('"""The module of --seed."""\nx = "a -- b", "-" * 3', []),
    ],
)
def test_flags_are_seen(source, found):
    assert flag_strings(ast.parse(source)) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("th._C._functorch.f(x)", {"th._C._functorch.f"}),
        ("from torch._dynamo import config", {"torch._dynamo.config"}),
        ("import torch._C", {"torch._C"}),
        ("th.nn.utils.get_total_norm(x); self._x; th.__version__", set()),
    ],
)
def test_private_names_are_seen(source, found):
    assert private_torch(ast.parse(source)) == found


@pytest.mark.parametrize("source", ["hasattr(args, 'lr')", "argparse.Namespace(a=1)", "from argparse import Namespace"])
def test_namespaces_are_seen(source):
    assert mentions_namespace(ast.parse(source))
    assert not mentions_namespace(ast.parse("hasattr(part, 'state_dict')"))
