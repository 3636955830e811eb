"""One, two and three ranks compute the same: gradients, parameters, samples, likelihoods."""

import numpy as np
import pytest
import torch as th
from harness import HELPERS, free_port, save_weights, write_images
from many_ranks import BATCH_SIZES, SAMPLES, SIZED
from processes import finish

WORLDS = (1, 2, 3)
pytestmark = pytest.mark.slow


def start_ranks(server, size, folder, files):
    world = dict(WORLD_SIZE=size, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), CUDA_VISIBLE_DEVICES="")
    words = [str(folder), str(files)]
    return [server.start(HELPERS / "many_ranks.py", words, **world, RANK=rank, LOCAL_RANK=rank) for rank in range(size)]


@pytest.fixture(scope="module")
def worlds(server, tmp_path_factory):
    """{number of ranks: (folder of the scripts' files, what each rank found)}."""
    files = tmp_path_factory.mktemp("files")
    write_images(files / "images", count=SAMPLES + 2, classes=4)
    th.manual_seed(0)
    changed = {k: v for k, v in SIZED.items() if k != "image_size"}
    for path, super_resolution in [("model.pt", False), ("sr_model.pt", True)]:
        save_weights(files / path, super_resolution=super_resolution, noise=0.05, **changed)
    rng = np.random.default_rng(0)
    np.savez(files / "base.npz", rng.integers(0, 256, (5, 4, 4, 3), dtype=np.uint8), rng.integers(0, 4, 5))

    found = {}
    for size in WORLDS:
        folder = tmp_path_factory.mktemp(f"{size}-ranks")
        finish(start_ranks(server, size, folder, files))
        found[size] = folder, [th.load(folder / f"rank{rank}.pt") for rank in range(size)]
    return found


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def on_one_rank(worlds, key):
    """In eager code, all of a batch at once."""
    net, sampler, use_fp16, _ = key
    return worlds[1][1][0]["gradients"][net.removeprefix("compiled "), sampler, use_fp16, -1]


@pytest.mark.parametrize("size", WORLDS[1:])
def test_gradients_are_those_of_one_rank(worlds, size):
    """
    With and without microbatches, of both samplers, compiled or not. The torso's float16 rounds each microbatch's
    gradient to 11 bits, wherever the ranks cut the batch, but what needs no rounding is exact there too.
    """
    for key, answers in worlds[size][1][0]["gradients"].items():
        net, _, use_fp16, _ = key
        want = on_one_rank(worlds, key)["gradient"]
        error = relative_error(answers["gradient"], want)
        assert want.norm() > 0.1
        print(key, size, f"{error:.1e}")
        assert error < (2e-3 if use_fp16 and net == "unet" else 1e-5), key


@pytest.mark.parametrize("size", WORLDS[1:])
def test_ranks_stay_together(worlds, size):
    """To the last bit, and near the run on one rank as far as float16 lets AdamW be."""
    _, ranks = worlds[size]
    for key, answers in ranks[0]["gradients"].items():
        for other in ranks[1:]:
            assert th.equal(other["gradients"][key]["parameters"], answers["parameters"])
            assert th.equal(other["gradients"][key]["sampler"], answers["sampler"])
        use_fp16, want = key[2], on_one_rank(worlds, key)
        assert relative_error(answers["parameters"], want["parameters"]) < (0.05 if use_fp16 else 1e-3)
        assert relative_error(answers["sampler"], want["sampler"]) < 0.01


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("script", ["image_sample", "super_res_sample"])
def test_same_samples(worlds, script, size):
    """For one seed: whatever the ranks and the batch size, up to a rounding."""
    name = f"samples_{SAMPLES}x8x8x3.npz"
    want = np.load(worlds[1][0] / f"{script}-{SAMPLES}" / name)
    assert len(set(want["arr_0"].reshape(SAMPLES, -1).std(axis=1))) == SAMPLES  # all different
    for batch_size in BATCH_SIZES:
        got = np.load(worlds[size][0] / f"{script}-{batch_size}" / name)
        assert got["arr_0"].shape == (SAMPLES, 8, 8, 3)
        assert np.abs(got["arr_0"].astype(int) - want["arr_0"]).max() <= 1
        assert got["arr_1"].tolist() == want["arr_1"].tolist()


@pytest.mark.parametrize("size", WORLDS)
def test_same_likelihood(worlds, size):
    """Each image counts once, with its own noise."""
    for batch_size in BATCH_SIZES:
        folder = worlds[size][0] / f"image_nll-{batch_size}"
        assert f"total bpd over {SAMPLES} images" in (folder / "log.txt").read_text()
        for term in ("vb", "mse", "xstart_mse"):
            got, want = (
                np.load(path / f"{term}_terms.npz")["arr_0"] for path in (folder, worlds[1][0] / f"image_nll-{SAMPLES}")
            )
            assert got == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("size", WORLDS)
def test_same_estimate_of_the_likelihood(worlds, size):
    """With the same probabilities, to the bit, so that each image has the same timesteps."""
    want = np.load(worlds[1][0] / f"image_nll-estimate-{SAMPLES}" / "estimate.npz")
    for batch_size in BATCH_SIZES:
        got = np.load(worlds[size][0] / f"image_nll-estimate-{batch_size}" / "estimate.npz")
        assert got["p"].tolist() == want["p"].tolist()
        assert got["vb"] == pytest.approx(want["vb"], rel=1e-4)


def test_memory_of_other_ranks_does_not_grow(worlds):
    first, other = (rank["memory"] for rank in worlds[2][1])
    assert first > 50e6 and other < 25e6  # half of its samples are 31e6
