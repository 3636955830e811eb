"""safetensors files: what is written is read, and what is no such file is refused in one line."""

import json
import sys

import pytest
import torch as th
from training import assert_same

from improved_diffusion import dist_util
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.safe_load import read_state_dict
from improved_diffusion.utils.safe_tensors import encode, read_metadata

pytest.importorskip("safetensors")

TENSORS = {"b": th.arange(6.0).view(2, 3), "a": th.tensor(3), "c": th.zeros(0, 2), "h": th.ones(2, dtype=th.bfloat16)}


def write(path, tensors=TENSORS, **metadata):
    path.write_bytes(encode(str(path), tensors, metadata))
    return str(path)


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path / "a.safetensors", config="{}", name="ä")
    assert_same(read_state_dict(path), dict(sorted(TENSORS.items())))
    assert_same(read_state_dict(path, map_location="cpu"), dist_util.load_state_dict(path))
    assert read_metadata(path) == {"format": "pt", "config": "{}", "name": "ä"}


def test_tied_and_transposed_tensors(tmp_path):
    x = th.arange(6.0).view(2, 3)
    path = write(tmp_path / "a.safetensors", {"x": x, "tied": x, "t": x.T})
    assert_same(read_state_dict(path), {"t": x.T, "tied": x, "x": x})


def test_damaged_files_are_refused_in_one_line(tmp_path):
    path = tmp_path / "a.safetensors"
    whole = encode(str(path), TENSORS, {"config": "{}"})
    deep = json.dumps({"__metadata__": 3}).encode()
    for data in (whole[:-1], whole[:40], whole[:4], b"", bytes(100), b"\xff" * 100, whole[:8] + b"x" * 300,
                 len(deep).to_bytes(8, "little") + deep):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(InputError) as refusal:
            read_state_dict(str(path))
        assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
        if data != whole[:-1]:  # whose header is whole
            with pytest.raises(InputError, match=r"a\.safetensors"):
                read_metadata(str(path))
    with pytest.raises(InputError, match=r"nothing\.safetensors"):
        read_metadata(str(tmp_path / "nothing.safetensors"))


def test_without_the_package_a_line_names_what_to_install(tmp_path, monkeypatch):
    path = write(tmp_path / "a.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for act in (lambda: read_state_dict(path), lambda: encode(path, TENSORS, {})):
        with pytest.raises(InputError, match=r"a\.safetensors: .*pip install '\.\[safetensors\]'"):
            act()
