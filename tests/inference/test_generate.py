"""Samples from several batches and ranks come out in order, with their labels, in files that can be read back."""

import json
import math
import os
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch as th
from hypothesis import given
from hypothesis import strategies as st
from parity_cases import ToyModel, make_diffusion

from improved_diffusion import logger
from improved_diffusion.data.images import to_image
from improved_diffusion.data.packed import write_packed
from improved_diffusion.inference.arrays import (
    load_base_samples,
    load_labelled_samples,
    save_arrays,
    save_json,
    save_samples,
    to_uint8,
    write_samples,
)
from improved_diffusion.inference.generate import (
    SampleNoise,
    chosen_labels,
    draw_labels,
    generate,
)
from improved_diffusion.samplers import SAMPLERS
from improved_diffusion.utils.errors import InputError


class StubDiffusion:
    """Sample number i is an image of value i, ten more by DDIM. Notes how it was called."""

    num_timesteps = 4

    def __init__(self):
        self.calls = []

    def p_sample_loop_progressive(self, model, shape, *, plus=0, model_kwargs, **kwargs):
        self.calls.append((tuple(shape), kwargs))
        values = model_kwargs["number"].float() + plus
        sample = (values.view(-1, 1, 1, 1) / 127.5 - 1 + 1e-4).expand(shape)
        return [{"sample": sample, "pred_xstart": sample}] * self.num_timesteps

    def ddim_sample_loop_progressive(self, model, shape, **kwargs):
        return self.p_sample_loop_progressive(model, shape, plus=10, **kwargs)


def numbered(numbers, noise_fn):
    return {"number": th.tensor(list(numbers)), "y": th.tensor([100 + i for i in numbers])}


def draw(diffusion, **changed):
    arguments = dict(shape=(1, 4, 4), num_samples=7, batch_size=3, conditions=numbered)
    return generate(diffusion, None, **{**arguments, **changed})


@pytest.fixture(autouse=True)
def quiet_logger(tmp_path):
    with logger.scoped_configure(dir=str(tmp_path / "log"), format_strs=[]):
        yield


# ---------------------------------------------------------------- drawing


def test_nothing_is_kept_for_gradients_while_samples_are_drawn():
    modes = []

    def conditions(numbers, noise_fn):
        modes.append(th.is_inference_mode_enabled())
        return numbered(numbers, noise_fn)

    draw(StubDiffusion(), conditions=conditions)
    assert modes and all(modes)
    assert not th.is_inference_mode_enabled()


@pytest.mark.parametrize(("num_samples", "batches"), [(1, [1]), (3, [3]), (6, [3, 3]), (7, [3, 3, 1])])
def test_exactly_num_samples_in_order_with_a_smaller_last_batch(num_samples, batches):
    diffusion = StubDiffusion()
    images, labels = draw(diffusion, num_samples=num_samples)
    assert [shape[0] for shape, _ in diffusion.calls] == batches
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (num_samples, 4, 4, 1), np.int64)
    assert images[:, 0, 0, 0].tolist() == list(range(num_samples))
    assert labels.tolist() == [100 + i for i in range(num_samples)]


@pytest.mark.parametrize(("num_samples", "calls"), [(2, 0), (3, 0), (4, 1), (7, 1)])
def test_the_first_of_several_batches_is_shown(num_samples, calls):
    seen = []
    images, labels = draw(StubDiffusion(), num_samples=num_samples, after_first_batch=lambda *args: seen.append(args))
    assert len(seen) == calls
    for first, first_labels, left, seconds in seen:
        np.testing.assert_array_equal(first, images[:3])
        assert first_labels.tolist() == labels[:3].tolist() and left == num_samples and seconds > 0


def test_ddim_and_clipping_are_passed_on():
    diffusion = StubDiffusion()
    images, _ = draw(diffusion, sampler="ddim", clip_denoised=False)
    assert images[:, 0, 0, 0].tolist() == list(range(10, 17))
    assert all(not kwargs["clip_denoised"] and "noise_fn" not in kwargs for _, kwargs in diffusion.calls)


def test_without_labels_there_are_none():
    images, labels = draw(StubDiffusion(), conditions=lambda numbers, _: {"number": th.tensor(list(numbers))})
    assert (len(images), labels) == (7, None)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("num_samples", [1, 5, 6, 13, 18])  # in some, ranks have nothing to do in the last round
def test_order_and_labels_are_kept_over_ranks(on_ranks, world_size, num_samples):
    (images, labels), *others = on_ranks(world_size, lambda rank: draw(StubDiffusion(), num_samples=num_samples))
    assert images[:, 0, 0, 0].tolist() == list(range(num_samples))
    assert labels.tolist() == [100 + i for i in range(num_samples)]
    assert others == [(None, None)] * (world_size - 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("use_fp16", [False, True])
def test_samples_that_are_not_finite_end_all_ranks(on_ranks, value, use_fp16):
    """Though one rank alone has one."""

    class Broken(StubDiffusion):
        def p_sample_loop_progressive(self, model, shape, *, model_kwargs, **kwargs):
            x = th.zeros(shape)
            x[model_kwargs["number"] == 4, 0, 0, 0] = value
            return [{"sample": x, "pred_xstart": x}] * self.num_timesteps

    refused = []

    def work(rank):
        with pytest.raises(InputError, match=r"^a\.pt: ") as refusal:
            draw(Broken(), model_path="a.pt", use_fp16=use_fp16)
        refused.append(str(refusal.value))

    on_ranks(2, work)
    assert len(refused) == 2 and all(("use_bf16" in line) == use_fp16 and "\n" not in line for line in refused)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_output_that_is_not_finite_ends_every_sampler(sampler, value):
    """Infinite ones become black or white where the predicted x_start is clipped."""
    calls = []

    def model(x, t):
        calls.append(t)
        return th.full_like(x, value if len(calls) == 2 else 0.5)

    with pytest.raises(InputError, match=r"^a\.pt: "):
        generate(
            make_diffusion(8, "cosine"),
            model,
            shape=(1, 4, 4),
            num_samples=2,
            batch_size=2,
            conditions=lambda numbers, noise_fn: {},
            sampler=sampler,
            sampler_options=None if sampler in ("ancestral", "ddim") else {"steps": 4},
            model_path="a.pt",
        )


# ---------------------------------------------------------------- random numbers of a sample's own

seeds = st.integers(0, 2**63 - 1)
some_numbers = st.lists(st.integers(0, 2**20), min_size=1, max_size=8)


def noise_of(seed, numbers, shape=(2, 3), calls=3):
    """What a chain would draw, as [call, sample, ...]."""
    noise_fn = SampleNoise(seed, numbers)
    return th.stack([noise_fn(th.zeros(len(numbers), *shape)) for _ in range(calls)])


@given(seed=seeds, numbers=some_numbers, data=st.data())
def test_noise_depends_on_the_seed_and_the_samples_number_only(seed, numbers, data):
    """Not on the other samples of its batch, on its place there, or on what is drawn elsewhere."""
    whole = noise_of(seed, numbers)
    cut = data.draw(st.integers(0, len(numbers)))
    th.rand(cut)
    before = th.get_rng_state()
    parts = [noise_of(seed, part) for part in (numbers[:cut], numbers[cut:]) if part]
    assert th.equal(th.cat(parts, dim=1), whole)
    order = data.draw(st.permutations(range(len(numbers))))
    assert th.equal(noise_of(seed, [numbers[i] for i in order]), whole[:, list(order)])
    assert th.equal(th.get_rng_state(), before)


@given(seed=st.integers(0, 2**31), other=st.integers(0, 2**31), numbers=some_numbers)
def test_other_seeds_samples_and_calls_have_other_noise(seed, other, numbers):
    rows = {row.numpy().tobytes() for s in {seed, other} for row in noise_of(s, sorted(set(numbers))).flatten(0, 1)}
    assert len(rows) == 3 * len({seed, other}) * len(set(numbers))


def test_no_two_samples_of_a_large_set_are_one():
    """
    Fifty thousand are what an FID takes. The CPU's generator uses 32 bits of its seed, in which that many seeds at
    random meet by chance; samples that draw the same noise are the same picture.
    """
    numbers = range(60000)
    first = SampleNoise(0, numbers)(th.empty(len(numbers), 4, dtype=th.float64))
    assert len(first.unique(dim=0)) == len(numbers)


def test_noise_is_standard_normal():
    noise = noise_of(0, range(2000), shape=(4, 4), calls=2)
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    for a, b in [(noise[0, :-1], noise[0, 1:]), (noise[0], noise[1])]:  # nor does a sample tell of the next one
        assert abs((a * b).mean()) < 0.02
    assert abs((noise**4).mean() - 3) < 0.1


@pytest.mark.parametrize("dtype", [th.float32, th.float64, th.float16])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 4), (5,), ()])
def test_noise_is_like_the_tensor(dtype, shape):
    x = th.full((2, *shape), 7, dtype=dtype)
    noise = SampleNoise(1, [4, 9])(x)
    assert (noise.dtype, noise.shape, noise.device) == (dtype, x.shape, x.device)
    assert (x == 7).all() and not (noise == 7).any()


@given(seed=seeds, numbers=some_numbers, num_classes=st.integers(1, 1000), cut=st.integers(0, 8))
def test_labels_of_samples(seed, numbers, num_classes, cut):
    """In range, and of each sample alone."""
    labels = SampleNoise(seed, numbers).labels(num_classes)
    assert (labels.dtype, labels.shape) == (th.int64, (len(numbers),))
    assert labels.min() >= 0 and labels.max() < num_classes
    parts = [draw_labels(num_classes, len(p), SampleNoise(seed, p)) for p in (numbers[:cut], numbers[cut:])]
    assert th.equal(th.cat(parts), labels)


def test_all_labels_come_up():
    counts = SampleNoise(0, range(3000)).labels(3).bincount()
    assert len(counts) == 3 and counts.min() > 900


def test_labels_without_a_seed_are_those_of_the_global_generator():
    th.manual_seed(5)
    want = th.randint(0, 10, (6,)), th.rand(1)
    th.manual_seed(5)
    assert th.equal(draw_labels(10, 6), want[0]) and th.equal(th.rand(1), want[1])


def by_seed(seed, batch_size, num_samples=7, sampler="ancestral", labelled=True):
    def conditions(numbers, noise_fn):
        return {"y": draw_labels(10, len(numbers), noise_fn)} if labelled else {}

    return generate(
        make_diffusion(6, "cosine"),
        ToyModel(),
        shape=(3, 4, 4),
        num_samples=num_samples,
        batch_size=batch_size,
        conditions=conditions,
        sampler=sampler,
        seed=seed,
    )


@pytest.mark.parametrize("sampler", ["ancestral", "ddim", "dpm++2m-sde", "unipc"])
@pytest.mark.parametrize("labelled", [False, True])
def test_with_a_seed_the_batch_size_changes_nothing(sampler, labelled):
    """Nor how many samples come behind, nor what was drawn before."""
    images, labels = by_seed(3, 7, sampler=sampler, labelled=labelled)
    assert len({image.tobytes() for image in images}) == 7
    for batch_size in (1, 2, 3, 100):
        th.rand(batch_size)
        same_images, same_labels = by_seed(3, batch_size, sampler=sampler, labelled=labelled)
        np.testing.assert_array_equal(same_images, images)
        np.testing.assert_array_equal(same_labels, labels)
    more, _ = by_seed(3, 4, num_samples=11, sampler=sampler, labelled=labelled)
    np.testing.assert_array_equal(more[:7], images)
    other, _ = by_seed(4, 7, sampler=sampler, labelled=labelled)
    assert (other != images).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(
    "num_samples, sampler", [(1, "ancestral"), (5, "dpm++2m-sde"), (6, "unipc"), (13, "ancestral"), (13, "dpm++2m-sde")]
)
def test_with_a_seed_the_number_of_ranks_changes_nothing(on_ranks, world_size, num_samples, sampler):
    images, labels = by_seed(3, 4, num_samples, sampler)
    (many, many_labels), *others = on_ranks(world_size, lambda rank: by_seed(3, 2, num_samples, sampler))
    assert others == [(None, None)] * (world_size - 1)
    np.testing.assert_array_equal(many, images)
    np.testing.assert_array_equal(many_labels, labels)


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_without_a_seed_samples_are_those_of_the_diffusions_loops(sampler):
    """Batch by batch, labels first, from the global generator."""
    th.manual_seed(8)
    images, labels = by_seed(None, 4, sampler=sampler)
    th.manual_seed(8)
    for part in (slice(0, 4), slice(4, 7)):
        y = th.randint(0, 10, (len(labels[part]),))
        assert y.tolist() == labels[part].tolist()
        diffusion = make_diffusion(6, "cosine")
        loops = {"ancestral": diffusion.p_sample_loop, "ddim": diffusion.ddim_sample_loop}
        if sampler in loops:
            x = loops[sampler](ToyModel(), (len(y), 3, 4, 4), model_kwargs={"y": y})
        else:
            x = SAMPLERS[sampler](diffusion, ToyModel(), th.randn(len(y), 3, 4, 4), model_kwargs={"y": y})
        np.testing.assert_array_equal(to_uint8(x).numpy(), images[part])


@pytest.mark.parametrize("seed", [None, 5])
def test_a_new_sampler_needs_only_its_row(monkeypatch, seed):
    """It is given standard normal noise of the samples' shape, and what draws more."""
    seen = []

    def still(diffusion, model, x_T, *, model_kwargs, noise_fn, clip_denoised):
        seen.append((x_T.clone(), noise_fn, clip_denoised))
        return x_T

    monkeypatch.setitem(SAMPLERS, "still", still)
    th.manual_seed(3)
    images, _ = draw(StubDiffusion(), sampler="still", clip_denoised=False, seed=seed)
    th.manual_seed(3)
    for (x_T, noise_fn, clip_denoised), start in zip(seen, (0, 3, 6), strict=True):
        numbers = range(start, min(start + 3, 7))
        new = th.randn_like if seed is None else SampleNoise(seed, numbers)
        assert th.equal(x_T, new(th.empty(len(numbers), 1, 4, 4))) and not clip_denoised
        assert (noise_fn is None) == (seed is None)
        np.testing.assert_array_equal(images[list(numbers)], to_uint8(x_T).numpy())


def test_conditions_are_given_the_noise_of_their_samples():
    """So that what they draw belongs to samples too; without a seed there is none."""
    given_noise = []

    def conditions(numbers, noise_fn):
        given_noise.append(noise_fn)
        return numbered(numbers, noise_fn)

    draw(StubDiffusion(), conditions=conditions)
    assert given_noise == [None] * 3
    diffusion = StubDiffusion()
    draw(diffusion, conditions=conditions, seed=0)
    assert [len(noise_fn.generators) for noise_fn in given_noise[3:]] == [3, 3, 1]
    assert [kwargs["noise_fn"] for _, kwargs in diffusion.calls] == given_noise[3:]


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


def test_what_is_not_a_number_is_null_in_json():
    values = {"FD-lite0": 1.5, "KID-lite0": math.nan, "samples": "nan", "count": 3}
    with open(save_json("metrics.json", values)) as f:
        assert json.load(f) == {**values, "KID-lite0": None}


def test_a_picture_of_the_first_samples_says_so(tmp_path):
    images, labels = np.zeros((32, 4, 4, 3), np.uint8), np.arange(32) % 2
    with logger.scoped_configure(dir=str(tmp_path / "pictures"), format_strs=["log"]):
        write_samples(images, labels)
        write_samples(images)
    lines = (tmp_path / "pictures" / "log.txt").read_text().splitlines()
    of_classes, of_all = (line for line in lines if ".png" in line)
    assert "20 of 32" in of_classes and "of 32" not in of_all


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


def folder_of(tmp_path, size=4):
    (tmp_path / "small").mkdir()
    for image, name in zip(IMAGES, ["cat_0", "cat_1", "dog_0", "dog_1", "owl_0", "owl_1"], strict=True):
        to_image(image).resize((size, size), 0).save(tmp_path / "small" / f"{name}.png")
    return str(tmp_path / "small")


def test_base_samples_of_a_folder_of_one_image_and_packed(tmp_path, on_ranks):
    """All of them on each rank."""
    folder, packed = folder_of(tmp_path), str(tmp_path / "small.packed")
    write_packed(packed, [IMAGES], IMAGES.shape, [0, 0, 1, 1, 2, 2], ["cat", "dog", "owl"])
    for path in (folder, packed):
        for images, labels in on_ranks(2, lambda rank, path=path: load_base_samples(path, size=4, channels=3)):
            np.testing.assert_array_equal(images, IMAGES)
            assert labels is None
        images, labels = load_base_samples(
            path, size=4, channels=3, num_classes=5, num_samples=4, class_names=["ant", "cat", "dog", "owl"]
        )
        np.testing.assert_array_equal(images, IMAGES[:4])
        assert labels.tolist() == [1, 1, 2, 2]
    images, labels = load_base_samples(
        f"{folder}/dog_0.png", size=4, channels=3, num_classes=5, class_names=["cat", "dog"]
    )
    np.testing.assert_array_equal(images, IMAGES[2:3])
    assert labels.tolist() == [1]


def test_damaged_base_samples_are_left_out(tmp_path, on_ranks):
    folder = folder_of(tmp_path)
    with open(f"{folder}/cat_1.png", "r+b") as f:
        f.truncate(60)
    arguments = dict(size=4, channels=3)
    with pytest.raises(InputError, match=r"cat_1.png.*skip_damaged True"):
        load_base_samples(folder, **arguments)
    for images, _ in on_ranks(2, lambda rank: load_base_samples(folder, skip_damaged=True, **arguments)):
        np.testing.assert_array_equal(images, IMAGES[[0, 2, 3, 4, 5]])


def test_base_samples_of_a_folder_are_scaled(tmp_path):
    images, _ = load_base_samples(folder_of(tmp_path, size=12), size=4, channels=1)
    assert images.shape == (6, 4, 4, 1)


@pytest.mark.parametrize(
    ("path", "parts"),
    [("gone.png", ["gone.png"]), ("small", ["owl", "(cat, dog)"]), ("small.packed", ["4x4", "8x8"])],
)
def test_folders_that_cannot_work(tmp_path, path, parts):
    folder_of(tmp_path)
    write_packed(str(tmp_path / "small.packed"), [IMAGES], IMAGES.shape, [0] * 6, ["cat"])
    with pytest.raises(InputError) as refusal:
        load_base_samples(str(tmp_path / path), size=8, channels=3, num_classes=5, class_names=["cat", "dog"])
    assert all(part in str(refusal.value) for part in (str(tmp_path / path), *parts))


def test_labelled_samples_are_what_save_samples_wrote(npz):
    images, labels = load_labelled_samples(save_samples(IMAGES, np.arange(6)))
    np.testing.assert_array_equal(images, IMAGES)
    assert labels.tolist() == list(range(6))
    with pytest.raises(InputError, match=r"^samples .*base\.npz: .*holds no arr_1"):
        load_labelled_samples(npz(arr_0=IMAGES))


LABELS = np.zeros(6, np.int64)


@pytest.mark.parametrize(
    ("arrays", "parts"),
    [
        (dict(images=IMAGES), ["holds no arr_0", "but images"]),
        (dict(), ["holds no arr_0", "but nothing"]),
        (dict(arr_0=IMAGES[:, :2], arr_1=LABELS), ["(6, 2, 4, 3)", "small_size 4", "(N, 4, 4, 3)"]),
        (dict(arr_0=IMAGES[..., :1], arr_1=LABELS), ["(6, 4, 4, 1)", "image_channels 3"]),
        (dict(arr_0=IMAGES[:0], arr_1=LABELS), ["(0, 4, 4, 3)"]),
        (dict(arr_0=IMAGES[0], arr_1=LABELS), ["(4, 4, 3)"]),
        (dict(arr_0=IMAGES / 255, arr_1=LABELS), ["float64", "uint8"]),
        (dict(arr_0=np.float32(3), arr_1=LABELS), ["float32", "uint8"]),
        (dict(arr_0=IMAGES), ["holds no arr_1", "class_cond"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros(5, int)), ["arr_1", "class_cond"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros(6)), ["arr_1 is float64 of shape (6,)"]),
        (dict(arr_0=IMAGES, arr_1=np.array([0, 1, 1.7, np.nan, 0, 0])), ["arr_1 is float64"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros(6, complex)), ["arr_1 is complex128"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros(6, bool)), ["arr_1 is bool"]),
        (dict(arr_0=IMAGES, arr_1=np.array(list("aabbcc"))), ["arr_1 is <U1"]),
        (dict(arr_0=IMAGES, arr_1=np.array(["2020-01-01"] * 6, "M8[D]")), ["arr_1 is datetime64[D]"]),
        (dict(arr_0=IMAGES, arr_1=np.array([0, 1, 2, 0, 1, 2**64 - 1], "u8")), [f"labels from 0 to {2**64 - 1}"]),
        (dict(arr_0=IMAGES, arr_1=np.zeros((6, 1), int)), ["arr_1 is int64 of shape (6, 1)"]),
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


def test_the_samples_wanted_alone_are_kept(npz):
    labels = np.array([2, 0, 1, 1, 0, 9])
    for images in (IMAGES, np.asfortranarray(IMAGES)):
        path = npz(arr_0=images, arr_1=labels)
        for wanted, found in ((1, 1), (4, 4), (9, 6)):
            first, theirs = load_base_samples(path, size=4, channels=3, num_classes=10, num_samples=wanted)
            np.testing.assert_array_equal(first, IMAGES[:found])
            assert theirs.tolist() == labels[:found].tolist()


def peak_of(function):
    """Bytes that a call holds at its peak."""
    tracemalloc.start()
    try:
        function()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def test_a_small_file_that_unpacks_to_a_large_one(tmp_path):
    """Neither other arrays nor samples beyond those wanted are in memory."""
    path, large = str(tmp_path / "small.npz"), np.zeros((10**6, 4, 4, 3), np.uint8)
    np.savez_compressed(path, large, np.zeros(10**6, int), other=np.zeros(10**7))
    assert os.path.getsize(path) < 10**6
    images = []

    def load():
        images.append(load_base_samples(path, size=4, channels=3, num_classes=3, num_samples=5)[0])

    assert peak_of(load) < 2e7 and images[0].shape == (5, 4, 4, 3)


def test_another_shape_is_refused_before_it_is_read(npz):
    path = npz(arr_0=np.zeros((10**6, 4, 4, 3), np.uint8), arr_1=np.zeros((10**6, 3), int))

    def load(size):
        with pytest.raises(InputError, match="arr_"):
            load_base_samples(path, size=size, channels=3, num_classes=3)

    assert peak_of(lambda: load(8)) < 2e7 and peak_of(lambda: load(4)) < 2e7  # blobfile buffers 8 MB


@pytest.mark.parametrize("count", [3, 10**12])
def test_a_header_that_promises_more_than_there_is(tmp_path, count):
    path = str(tmp_path / "lie.npz")
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|u1", "fortran_order": False, "shape": (count, 4, 4, 3)})
        f.write(bytes(2 * 48))
    with pytest.raises(InputError, match="header"):
        load_base_samples(path, size=4, channels=3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "not an npz file of images"),
        (b"text", "not an npz file of images"),
        ("cut short", "not an npz file of images"),
        ("one array", "not an npz file of images"),
        ("objects", "not an npz file of images"),
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
    with pytest.raises(InputError, match=r"^samples is not given: "):
        load_labelled_samples("")
    with pytest.raises(InputError, match=r"^base_samples is not given: "):
        load_base_samples("", size=4, channels=3)


# ---------------------------------------------------------------- which classes


@pytest.mark.parametrize(
    ("classes", "num_samples", "labels"),
    [
        ("3,7", 5, [3, 7, 3, 7, 3]),
        ("7", 2, [7, 7]),
        ("3:2,7:1", None, [3, 3, 7]),
        ("3:2,7:1", 3, [3, 3, 7]),
        (" 3 , 7 ", 2, [3, 7]),
        ("3:1,3:2", None, [3, 3, 3]),
    ],
)
def test_labels_that_are_asked_for(classes, num_samples, labels):
    chosen = chosen_labels(classes, num_samples, 10)
    assert chosen.dtype == np.int64 and chosen.tolist() == labels


def test_classes_by_their_names():
    assert chosen_labels("dog:1,cat:2,1:1", None, 1000, ["bird", "cat", "dog"]).tolist() == [2, 1, 1, 1]
    assert chosen_labels("7,1", 2, 1000, ["1", "2", "7"]).tolist() == [2, 0]  # not the numbers 7 and 1


@pytest.mark.parametrize(
    ("classes", "num_samples", "names", "message"),
    [
        ("10", 2, None, "classes: '10' is .* 0 to 9"),
        ("0:99999999999999", None, None, "classes 0:99999999999999: "),
        ("-1", 2, None, "'-1' is .*"),
        ("3,", 2, None, "'' is .*"),
        ("cat", 2, None, "'cat' is .*"),
        ("2", 2, ["cat", "dog"], "give a number from 0 to 1 or one of cat, dog"),
        ("0", 2, ["1", "2", "7"], "'0' is .* 1, 2, 7"),
        ("3:2,7", None, None, "classes 3:2,7: "),
        ("3:0", None, None, "number of samples"),
        ("3:x", None, None, "number of samples"),
        ("3:2", 3, None, "classes 3:2 .*num_samples is 3"),
    ],
)
def test_classes_that_cannot_be(classes, num_samples, names, message):
    with pytest.raises(InputError) as refusal:
        chosen_labels(classes, num_samples, 10, names)
    assert re.search(message, str(refusal.value)) and "\n" not in str(refusal.value)
