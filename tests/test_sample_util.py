"""Samples from several batches and ranks come out in order, with their labels, in files that can be read back."""

import threading

import numpy as np
import pytest
import torch as th

from improved_diffusion import dist_util, logger
from improved_diffusion.errors import InputError
from improved_diffusion.sample_util import (
    generate,
    load_base_samples,
    load_labelled_samples,
    save_arrays,
    save_samples,
    to_uint8,
)


class StubDiffusion:
    """Sample number i is an image of value i, ten more by DDIM. Notes how it was called."""

    def __init__(self):
        self.calls = []

    def _loop(self, model, shape, model_kwargs, plus, **kwargs):
        self.calls.append((tuple(shape), kwargs))
        values = model_kwargs["number"].float() + plus
        return (values.view(-1, 1, 1, 1) / 127.5 - 1 + 1e-4).expand(shape)

    def p_sample_loop(self, model, shape, **kwargs):
        return self._loop(model, shape, plus=0, **kwargs)

    def ddim_sample_loop(self, model, shape, **kwargs):
        return self._loop(model, shape, plus=10, **kwargs)


def numbered(numbers):
    return {"number": th.tensor(list(numbers)), "y": th.tensor([100 + i for i in numbers])}


def draw(diffusion, **changed):
    arguments = dict(shape=(1, 4, 4), num_samples=7, batch_size=3, conditions=numbered)
    return generate(diffusion, None, **{**arguments, **changed})


@pytest.fixture(autouse=True)
def quiet_logger(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=[]):
        yield


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(("num_samples", "batches"), [(1, [1]), (3, [3]), (6, [3, 3]), (7, [3, 3, 1])])
def test_exactly_num_samples_in_order_with_a_smaller_last_batch(num_samples, batches):
    diffusion = StubDiffusion()
    images, labels = draw(diffusion, num_samples=num_samples)
    assert [shape[0] for shape, _ in diffusion.calls] == batches
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (num_samples, 4, 4, 1), np.int64)
    assert images[:, 0, 0, 0].tolist() == list(range(num_samples))
    assert labels.tolist() == [100 + i for i in range(num_samples)]


def test_ddim_and_clipping_are_passed_on():
    diffusion = StubDiffusion()
    images, _ = draw(diffusion, use_ddim=True, clip_denoised=False)
    assert images[:, 0, 0, 0].tolist() == list(range(10, 17))
    assert all(kwargs == dict(clip_denoised=False, device=dist_util.dev()) for _, kwargs in diffusion.calls)


def test_without_labels_there_are_none():
    images, labels = draw(StubDiffusion(), conditions=lambda numbers: {"number": th.tensor(list(numbers))})
    assert (len(images), labels) == (7, None)


@pytest.fixture
def on_ranks(monkeypatch):
    """Runs a function on several ranks, threads that meet in dist_util.all_gather(); gives their results."""

    def run(world_size, function):
        here, meeting, offered = threading.local(), threading.Barrier(world_size), [None] * world_size

        def all_gather(tensor):
            offered[here.rank] = tensor
            meeting.wait(timeout=60)
            everything = th.cat(offered)
            meeting.wait(timeout=60)  # nobody offers the next before all have read
            return everything

        monkeypatch.setattr(dist_util, "rank", lambda: here.rank)
        monkeypatch.setattr(dist_util, "world_size", lambda: world_size)
        monkeypatch.setattr(dist_util, "all_gather", all_gather)
        results = [None] * world_size

        def work(rank):
            here.rank = rank
            results[rank] = function()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    return run


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_samples", [1, 5, 6, 13, 18])  # in some, ranks have nothing to do in the last round
def test_order_and_labels_are_kept_over_ranks(on_ranks, world_size, num_samples):
    (images, labels), *others = on_ranks(world_size, lambda: draw(StubDiffusion(), num_samples=num_samples))
    assert images[:, 0, 0, 0].tolist() == list(range(num_samples))
    assert labels.tolist() == [100 + i for i in range(num_samples)]
    assert others == [(None, None)] * (world_size - 1)


def test_pixels_are_clamped_and_their_fractions_dropped_as_in_the_original():
    values = th.tensor([-9.0, -1.0, -0.5, 0.0, 0.5, 1.0, 9.0]).view(1, 7, 1, 1).expand(1, 7, 2, 3)
    pixels = to_uint8(values)
    assert (pixels.dtype, pixels.shape, pixels.is_contiguous()) == (th.uint8, (1, 2, 3, 7), True)
    assert pixels[0, 1, 2].tolist() == [0, 0, 63, 127, 191, 255, 255]


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_are_written_under_a_name_that_tells_their_shape(tmp_path, channels):
    images = np.arange(5 * 4 * 4 * channels, dtype=np.uint8).reshape(5, 4, 4, channels)
    path = save_samples(images, np.arange(5))
    assert path == str(tmp_path / "log" / f"samples_5x4x4x{channels}.npz")
    with np.load(path) as arrays:
        assert sorted(arrays) == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], images)
        np.testing.assert_array_equal(arrays["arr_1"], np.arange(5))
    save_samples(images)
    with np.load(path) as arrays:
        assert sorted(arrays) == ["arr_0"]


def test_arrays_that_cannot_be_written_are_one_line(tmp_path):
    (tmp_path / "log" / "a.npz.tmp").mkdir()
    with pytest.raises(InputError, match=r"^.*a\.npz: cannot be written \(.*\)$"):
        save_arrays("a.npz", np.zeros(3))


@pytest.fixture
def npz(tmp_path):
    def write(**arrays):
        np.savez(tmp_path / "base.npz", **arrays)
        return str(tmp_path / "base.npz")

    return write


IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3)).astype(np.uint8)


def test_base_samples_are_what_save_samples_wrote():
    labels = np.array([2, 0, 1, 1, 0, 2])
    path = save_samples(IMAGES, labels)
    images, none = load_base_samples(path, size=4, channels=3)
    np.testing.assert_array_equal(images, IMAGES)
    assert none is None
    images, read = load_base_samples(path, size=4, channels=3, num_classes=3)
    np.testing.assert_array_equal(images, IMAGES)
    assert (read.dtype, read.tolist()) == (np.int64, labels.tolist())


def test_labelled_samples_are_what_save_samples_wrote(npz):
    images, labels = load_labelled_samples(save_samples(IMAGES, np.arange(6)))
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == list(range(6))
    with pytest.raises(InputError, match=r"^samples .*base\.npz: no labelled images in it"):
        load_labelled_samples(npz(arr_0=IMAGES))


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        (dict(images=IMAGES), ["has no arr_0", "it has images"]),
        (dict(), ["has no arr_0", "it has nothing"]),
        (dict(arr_0=IMAGES[:, :2]), ["(6, 2, 4, 3)", "small_size 4", "(N, 4, 4, 3)"]),
        (dict(arr_0=IMAGES[..., :1]), ["(6, 4, 4, 1)", "image_channels 3"]),
        (dict(arr_0=IMAGES[:0]), ["(0, 4, 4, 3)"]),
        (dict(arr_0=IMAGES[0]), ["(4, 4, 3)"]),
        (dict(arr_0=IMAGES / 255), ["float64", "uint8"]),
        (dict(arr_0=np.float32(3)), ["float32", "uint8"]),
        (dict(arr_0=IMAGES), ["no label for each image in arr_1", "class_cond"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros(5, int)), ["no label for each image in arr_1"]),
        (dict(arr_0=IMAGES, arr_1=np.arange(6)), ["labels from 0 to 5", "num_classes 3 allows 0 to 2"]),
        (dict(arr_0=IMAGES, arr_1=np.arange(6) % 4), ["labels from 0 to 3", "num_classes 3 allows 0 to 2"]),
        (dict(arr_0=IMAGES, arr_1=np.arange(6) - 4), ["labels from -4 to 1", "num_classes 3 allows 0 to 2"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, (dict, list)) else None,
)
def test_base_samples_that_cannot_work(npz, arrays, parts):
    path = npz(**arrays)
    with pytest.raises(InputError) as refusal:
        load_base_samples(path, size=4, channels=3, num_classes=3)
    assert str(refusal.value).startswith(f"base_samples {path}")
    assert [part for part in parts if part not in str(refusal.value)] == []
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "not an npz file of numbers"),
        (b"text", "not an npz file of numbers"),
        ("cut short", "not an npz file of numbers"),
        ("one array", "not an npz file of numbers"),
        ("objects", "not an npz file of numbers"),
        ("folder", "there is no such file"),
    ],
)
def test_files_that_are_no_npz(tmp_path, content, message):
    path = tmp_path / "file.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "cut short":
        np.savez(path, IMAGES)
        path.write_bytes(path.read_bytes()[:-100])
    elif content == "one array":
        with open(path, "wb") as f:
            np.save(f, IMAGES)
    elif content == "objects":
        np.savez(path, np.array([{}], dtype=object))
    elif content == "folder":
        path.mkdir()
    with pytest.raises(InputError) as refusal:
        load_labelled_samples(str(path))
    assert str(refusal.value).startswith(f"samples {path}: {message}")
    assert "\n" not in str(refusal.value)


def test_no_path_at_all():
    with pytest.raises(InputError, match=r"^samples is not given: name an npz file"):
        load_labelled_samples("")
    with pytest.raises(InputError, match=r"^base_samples is not given: name an npz file"):
        load_base_samples("", size=4, channels=3)
