"""Files that are cut short or have other bytes than were written: refused in one line, or left out; never believed."""

import json
import shutil

import numpy as np
import pytest
import torch as th
from harness import HELPERS, snapshot
from PIL import Image
from processes import KINDS, finish, names_of, start, where_it_began
from training import load

from improved_diffusion.inference.arrays import load_base_samples
from improved_diffusion.utils.errors import InputError


@pytest.fixture(scope="module")
def three_sets(server, images, tmp_path_factory):
    """The folder of a run that has saved the steps 0, 2 and 4."""
    folder = tmp_path_factory.mktemp("three")
    finish(start(server, images, folder, max_steps=5))
    assert {path.name for path in folder.glob("*.pt")} == {*names_of(0), *names_of(2), *names_of(4)}
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_file_cut_short(server, images, three_sets, tmp_path, kind):
    """Named, the set is refused and the line says which file it is; "auto" says so too and takes the set before it."""
    folder = tmp_path / "run"
    shutil.copytree(three_sets, folder)
    before = snapshot(folder)
    process = server.start(HELPERS / "cut.py", [kind, str(folder), str(images)])
    finish([process])
    found = json.loads((folder / "cut.json").read_text())
    print(f"{kind}000004.pt of {len(before[f'{kind}000004.pt'])} bytes cut to {[*found]} bytes")
    assert len(found) == 10
    path = folder / f"{kind}000004.pt"
    for length, (named, auto) in found.items():
        assert named[0] == 2, (length, named)
        (line,) = named[1].splitlines()
        assert line.startswith("image_train.py: error: ") and str(path) in line, (length, line)
        assert auto[:2] == [0, ""] and where_it_began(auto[2]) == 2, (length, auto)
        (warning,) = [line for line in auto[2] if "is left out" in line]
        assert warning.startswith(f"the checkpoint of step 4 is left out: {path}: not a checkpoint"), length
    print(f"named: {line}\nauto: {warning}")
    after = snapshot(folder)
    assert after.keys() - {"cut.json", "choice"} == before.keys()
    assert all(after[name] == content for name, content in before.items() if name.endswith(".pt"))


@pytest.mark.parametrize("kind", KINDS)
def test_file_cut_short_on_two_ranks(server, images, three_sets, tmp_path, kind):
    """Rank 0 reads; the other must not wait for it for ever."""
    folder = tmp_path / "run"
    shutil.copytree(three_sets, folder)
    path = folder / f"{kind}000004.pt"
    path.write_bytes(path.read_bytes()[:-100])
    flags = dict(max_steps=9, batch_size=2, resume_checkpoint=folder / "model000004.pt")
    processes = start(server, images, folder, 2, **flags)
    assert [process.wait() for process in processes] == [2, 2], processes[0].stderr
    for process in processes:
        (line,) = process.stderr.splitlines()
        assert str(path) in line
    print(line)


# ---------------------------------------------------------------- wrong contents


def of_every_parameter(value):
    """A change of both moments of each parameter."""

    def change(contents):
        for entry in contents["state"].values():
            entry.update({key: value(entry[key]) for key in ("exp_avg", "exp_avg_sq")})

    return change


def of_each(value):
    def change(contents):
        contents.update({name: value(tensor) for name, tensor in contents.items()})

    return change


WRONG = {
    "opt moments of one element": ("opt", of_every_parameter(lambda t: th.zeros(1))),
    "opt moments of none": ("opt", of_every_parameter(lambda t: th.zeros(0))),
    "opt moments of half the width": ("opt", of_every_parameter(lambda t: t[: len(t) // 2])),
    "opt expanded": ("opt", of_every_parameter(lambda t: th.zeros(1).expand(t.numel()))),
    "opt transposed": ("opt", of_every_parameter(lambda t: t.reshape(t.shape[::-1]))),
    "opt integers": ("opt", of_every_parameter(lambda t: t.long())),
    "opt empty": ("opt", lambda contents: contents.update(state={})),
    "opt half": ("opt", lambda contents: [contents["state"].pop(i) for i in range(0, len(contents["state"]), 2)]),
    "ema integers": ("ema_0.9_", of_each(lambda t: t.long())),
    "ema complex": ("ema_0.9_", of_each(lambda t: t.to(th.complex64))),
    "model NaN": ("model", of_each(lambda t: t * th.nan)),
    "model sparse": ("model", of_each(lambda t: t.to_sparse())),
    "model meta": ("model", of_each(lambda t: t.to("meta"))),
    "state trained without end": ("state", lambda contents: contents.update(updates=-(10**12))),
    "state of a word": ("state", lambda contents: contents.update(lg_loss_scale="20")),
    "state of a position outside": ("state", lambda contents: contents["rng"][0]["numpy"].__setitem__(2, 10**6)),
}


@pytest.mark.parametrize("kinds", [[*WRONG][i::4] for i in range(4)], ids="1234")
def test_wrong_contents(server, images, three_sets, tmp_path, kinds):
    """In processes of their own: the fused update of AdamW does not look where it reads and writes."""
    running = {}
    for i, kind in enumerate(kinds):
        folder = tmp_path / str(i)
        shutil.copytree(three_sets, folder)
        name, change = WRONG[kind]
        path = folder / f"{name}000004.pt"
        contents = load(path)
        change(contents)
        th.save(contents, path)
        words = dict(max_steps=9, resume_checkpoint=folder / "model000004.pt")
        running[kind] = path, snapshot(folder), start(server, images, folder, **words)[0]
    for kind, (path, before, process) in running.items():
        status = process.wait()
        assert status == 2, (kind, status, process.stderr)
        (line,) = process.stderr.splitlines()
        assert line.startswith("image_train.py: error: ") and str(path) in line, (kind, line)
        after = snapshot(path.parent)
        changed = {name for name in after if after[name] != before.get(name)}
        assert changed <= {"log.txt", "config.json"} and after.keys() == before.keys(), (kind, changed)
        print(f"{kind}: {line}")


# ---------------------------------------------------------------- random bytes


def write_sources(kind, folder, three_sets):
    """A few files of each kind that a run reads."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    if kind == "checkpoint":
        for name in names_of(4):
            shutil.copy(three_sets / name, folder)
    elif kind == "npz":
        samples = rng.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8), np.arange(5) * 2
        np.savez(folder / "samples.npz", *samples)
        np.savez_compressed(folder / "compressed.npz", *samples)
        np.savez(folder / "many.npz", rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 10)
    else:
        pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        rgb = Image.fromarray(pixels)
        rgb.save(folder / "rgb.png")
        rgb.convert("L").save(folder / "grey.png")
        rgb.convert("RGBA").save(folder / "alpha.png")
        rgb.quantize(64).save(folder / "palette.png", transparency=3)
        Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(folder / "sixteen.png")
        rgb.save(folder / "rgb.jpg")
        rgb.save(folder / "progressive.jpg", progressive=True)
        rgb.convert("L").save(folder / "grey.jpeg")
        rgb.convert("CMYK").save(folder / "cmyk.jpg")
        rgb.save(folder / "rgb.gif")


@pytest.mark.parametrize("kind, count", [("image", 200), ("npz", 200), ("checkpoint", 200)])
def test_random_bytes(server, three_sets, tmp_path, kind, count):
    """In a process of its own, since decoders are C code: it neither dies nor hangs, nor believes what is wrong."""
    write_sources(kind, tmp_path / "whole", three_sets)
    process = server.start(HELPERS / "corrupt.py", [kind, str(tmp_path), str(count), "0"])
    status = process.wait(300)
    assert status == 0, (status, (tmp_path / "damage").read_text(), process.stderr)
    found = json.loads((tmp_path / "outcomes.json").read_text())
    print(f"{count} damaged files ({kind}): {found}")
    assert found["wrong"] == []
    assert sum(found["outcomes"].values()) == count
    assert found["outcomes"]["refused"] > count // 4  # the damage is real


def test_npz_with_another_digit_in_its_shape(tmp_path):
    """numpy reads as many bytes as the shape says; the checksum, which is of all of them, must be looked at still."""
    path = tmp_path / "samples.npz"
    np.savez(path, np.zeros((60, 8, 8, 3), dtype=np.uint8))
    data = path.read_bytes()
    assert data.count(b"'shape': (60, ") == 1
    path.write_bytes(data.replace(b"'shape': (60, ", b"'shape': (20, "))
    with pytest.raises(InputError, match="not an npz file of images"):
        load_base_samples(str(path), size=8, channels=3)
