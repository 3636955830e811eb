"""Images that cannot be decoded: refused, or left out."""

import os

import numpy as np
import pytest
from harness import load_script, write_images

from improved_diffusion import dist_util
from improved_diffusion.data import damaged, images
from improved_diffusion.data.damaged import without_damaged
from improved_diffusion.data.folders import list_images
from improved_diffusion.data.packed import read_packed
from improved_diffusion.data.prepare import write
from improved_diffusion.data.sources import SOURCES
from improved_diffusion.image_datasets import load_data, load_data_once
from improved_diffusion.logger import Logger
from improved_diffusion.utils.errors import InputError


@pytest.fixture(autouse=True)
def notes(monkeypatch):
    """The lines for the log of a run that has not begun."""
    monkeypatch.setattr(Logger, "CURRENT", None)
    monkeypatch.setattr(Logger, "EARLY", [])
    return Logger.EARLY


@pytest.fixture
def folder(tmp_path):
    """9 images, of which 3 are damaged: cut off, empty, and text."""
    root = write_images(tmp_path / "photos", count=9)
    bad = [root / name for name in ("a_002.png", "a_004.png", "b_005.png")]
    bad[0].write_bytes(bad[0].read_bytes()[:-40])
    bad[1].write_bytes(b"")
    bad[2].write_text("a page that says: 404")
    return root, bad


def test_without_the_flag_the_error_proposes_it(folder):
    with pytest.raises(InputError) as info:
        load_data(data_dir=str(folder[0]), batch_size=1, image_size=8, num_workers=0)
    message = str(info.value)
    assert message.startswith(f"{folder[1][0]}: ") and "skip_damaged True" in message and "\n" not in message
    with pytest.raises(InputError, match="skip_damaged True"):
        SOURCES["images"](str(folder[0]), image_size=8)[2]


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_images_are_left_out_counted_and_named(folder, notes, workers):
    """All else is as if they did not exist."""
    root, bad = folder
    words = dict(data_dir=str(root), batch_size=6, image_size=8, class_cond=True, deterministic=True, num_workers=0)
    data = load_data(**{**words, "num_workers": workers}, skip_damaged=True)
    assert "3 of 9 " in notes[0] and str(root) in notes[0]
    assert [note.partition(": ")[0] for note in notes[1:]] == [str(path) for path in bad]
    assert data.dataset.num_images == 6
    got = next(data)
    for path in bad:
        path.unlink()
    want = next(load_data(**words))
    assert (got[0] == want[0]).all() and (got[1]["y"] == want[1]["y"]).all()


def test_each_image_counts_once_in_one_epoch(folder):
    words = dict(data_dir=str(folder[0]), batch_size=4, image_size=8, num_workers=0, skip_damaged=True)
    assert [len(x) for x, _ in load_data_once(**words)] == [4, 2]
    assert [len(x) for x, _ in load_data_once(**words, limit=5)] == [4, 1]


def test_packed_images_are_those_of_the_folder(folder, tmp_path):
    root, _ = folder
    source = SOURCES["images"](str(root), image_size=8, num_workers=0, skip_damaged=True)
    assert any("3 of 9 " in note for note in source.notes)
    write(source, str(tmp_path / "p.packed"))
    packed, labels, classes = read_packed(str(tmp_path / "p.packed"), with_labels=True)
    words = dict(batch_size=6, image_size=8, class_cond=True, num_workers=0)
    ((x, cond),) = load_data_once(data_dir=str(root), **words, skip_damaged=True)
    np.testing.assert_array_equal(((x.numpy() + 1) * 127.5).round(), packed.transpose(0, 3, 1, 2))
    assert labels.tolist() == cond["y"].tolist() and classes == ["a", "b"]
    assert (
        load_script("prepare")
        .create_argparser()
        .parse_args(["images", "a", "b", "--skip_damaged", "True"])
        .skip_damaged
    )


def test_a_stream_resumes_where_it_was(folder):
    words = dict(data_dir=str(folder[0]), batch_size=2, image_size=8, num_workers=0, skip_damaged=True)
    data = load_data(**words)
    next(data)
    state, want = data.state_dict(), next(data)[0]
    again = load_data(**words)
    again.load_state_dict(state)
    assert (next(again)[0] == want).all()


@pytest.mark.parametrize("ranks", [2, 3, 20])
def test_all_ranks_leave_out_the_same(folder, monkeypatch, ranks):
    """Each decodes a share."""
    root, bad = folder
    paths, decoded = list_images(str(root)), []
    shares = []
    monkeypatch.setattr(dist_util, "world_size", lambda: ranks)
    monkeypatch.setattr(damaged, "damage", lambda path: decoded.append(path) or images.damage(path))
    for rank in range(ranks):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        shares.append((damaged._problems(paths[rank::ranks], 0), ""))
    assert sorted(decoded) == paths
    monkeypatch.setattr(dist_util, "all_gather_object", lambda mine: shares)
    results = [without_damaged(str(root), paths, 0) for _ in range(2)]
    assert results[0] == results[1] and results[0][0] == [p for p in paths if p not in map(str, bad)]


def test_a_file_that_cannot_be_read_may_be_intact(folder, monkeypatch):
    """A lost file server must not make a smaller data set."""
    root, _ = folder
    monkeypatch.setattr(images, "RETRY_PAUSES", ())
    (root / "b_999.png").symlink_to("nowhere")
    with pytest.raises(InputError, match=r"b_999\.png"):
        load_data(data_dir=str(root), batch_size=1, image_size=8, num_workers=0, skip_damaged=True)


def test_a_folder_of_damaged_images_only(tmp_path):
    root = write_images(tmp_path / "photos", count=2)
    for path in root.iterdir():
        os.truncate(path, 30)
    with pytest.raises(InputError, match=r"photos: none of its 2 images .*a_000\.png"):
        load_data(data_dir=str(root), batch_size=1, image_size=8, num_workers=0, skip_damaged=True)


def test_many_damaged_images_do_not_fill_the_log(folder, notes, monkeypatch):
    monkeypatch.setattr(damaged, "NAMED", 2)
    load_data(data_dir=str(folder[0]), batch_size=1, image_size=8, num_workers=0, skip_damaged=True)
    assert len(notes) == 4 and "1 more" in notes[-1]
