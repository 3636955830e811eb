"""Files of tensors that unpack to more than they are."""

import zipfile

import pytest
import torch as th

from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.safe_load import read_state_dict


def rewrite(source, path, compression=zipfile.ZIP_STORED, twice=()):
    """Copy a zip archive. Members in `twice` are listed twice, though they are there once."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
        for name in twice:
            new.filelist.append(new.getinfo(name))
    return str(path)


@pytest.fixture
def whole(tmp_path):
    th.save({"w": th.zeros(10**6)}, tmp_path / "model.pt")
    return tmp_path / "model.pt"


def test_a_copy_is_read(whole, tmp_path):
    assert read_state_dict(rewrite(whole, tmp_path / "copy.pt"))["w"].shape == (10**6,)


def test_compressed_tensors_are_refused(whole, tmp_path, monkeypatch):
    """Before they are unpacked."""
    path = rewrite(whole, tmp_path / "small.pt", zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(zipfile.ZipFile, "testzip", None)
    monkeypatch.setattr(th, "load", None)
    with pytest.raises(InputError, match=rf"^{path}: .*unpacks to") as refusal:
        read_state_dict(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_tensors_that_are_listed_many_times_are_refused(whole, tmp_path, monkeypatch):
    path = rewrite(whole, tmp_path / "small.pt", twice=["model/data/0"] * 100)
    monkeypatch.setattr(th, "load", None)
    with pytest.raises(InputError, match=rf"^{path}: .*unpacks to"):
        read_state_dict(path)
