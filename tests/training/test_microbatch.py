"""microbatch auto: the largest that fits, found without leaving a trace."""

import json
import math

import pytest
import torch as th
from harness import TRAIN, flags, run_script, write_images
from training import TinyNet, assert_continues, assert_same, batches, checkpoint_names, load, make_loop, run, train

from improved_diffusion import dist_util
from improved_diffusion.training import microbatch
from improved_diffusion.training.checkpoints import rng_state
from improved_diffusion.utils.errors import TrainingError


class Limited(TinyNet):
    """Out of memory above `limit` samples. It has a buffer that each pass changes."""

    limit, error = 3, th.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def __init__(self, dropout=0.0):
        super().__init__(dropout)
        self.register_buffer("calls", th.zeros(()))

    def forward(self, x, t):
        if len(x) > self.limit:
            raise self.error
        self.calls += 1
        return super().forward(x, t)


@pytest.fixture(autouse=True)
def plenty(monkeypatch):
    monkeypatch.setattr(microbatch, "available_memory", lambda device: 2**40)


def limited(limit, error=Limited.error, dropout=0.0):
    net = Limited(dropout)
    net.limit, net.error = limit, error
    return net


@pytest.mark.parametrize(("limit", "size"), [(99, 10), (10, 10), (9, 5), (4, 3), (2, 2), (1, 1)])
def test_the_largest_of_the_halves_that_fits(tmp_path, limit, size):
    net = limited(limit)
    loop = train(tmp_path, model=net, batch_size=10, microbatch="auto", max_steps=1, save_interval=9)
    assert loop.microbatch == size
    step = net.batch_sizes[-math.ceil(10 / size) :]
    assert sum(step) == 10 and max(step) == size


def test_it_leaves_random_numbers_gradients_and_buffers(tmp_path):
    loop = make_loop(model=limited(2, dropout=0.5), batch_size=8)
    x, before, state = next(batches(8))[0], rng_state(), {k: v.clone() for k, v in loop.model.state_dict().items()}
    assert microbatch.largest_microbatch(loop, x, {}, 8) == 2
    assert_same(rng_state(), before)
    assert_same(dict(loop.model.state_dict()), state)
    assert all(p.grad is None for p in loop.model.parameters()) and not loop.opt.state


def test_a_run_equals_one_with_the_number(tmp_path):
    for name, size in (("auto", "auto"), ("given", 2)):
        dist_util.seed_everything(0)
        train(tmp_path / name, model=limited(3, dropout=0.2), batch_size=8, microbatch=size, save_interval=2)
    assert len(checkpoint_names(tmp_path / "given")) == 8
    for name in checkpoint_names(tmp_path / "given"):
        got, want = load(tmp_path / "auto" / name), load(tmp_path / "given" / name)
        if name.startswith("state"):
            assert got.pop("flags") == {"measured_microbatch": [2, 8]} and want.pop("flags") == {}
            got.pop("files"), want.pop("files")  # checksums
        assert_same(got, want, name)


@pytest.mark.parametrize("message", ["DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"])
def test_other_words_for_out_of_memory(tmp_path, message):
    net = limited(2, RuntimeError(message))
    assert train(tmp_path, model=net, microbatch="auto", max_steps=1).microbatch == 2
    assert message in (tmp_path / "log.txt").read_text()


def test_one_sample_that_does_not_fit_ends_the_run(tmp_path):
    with pytest.raises(TrainingError) as failed:
        train(tmp_path, model=limited(0), microbatch="auto")
    assert "Tried to allocate 2 GiB" in str(failed.value) and "use_checkpoint" in str(failed.value)
    assert checkpoint_names(tmp_path) == []


def test_other_errors_are_raised(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"):
        train(tmp_path, model=limited(0, RuntimeError("shapes do not match")), microbatch="auto")


def test_another_ranks_failure_counts(tmp_path, monkeypatch):
    answers = iter([True, False])
    loop = make_loop(microbatch="auto", batch_size=8)
    monkeypatch.setattr(dist_util, "any_rank", lambda flag: next(answers))
    assert microbatch.largest_microbatch(loop, next(batches(8))[0], {}, 8) == 4


def test_a_cpu_is_not_filled_to_find_out(tmp_path, monkeypatch):
    """The system would kill the process: one and two samples tell what is tried first."""
    needed = {}
    for size in (2, 4, 8):
        loop = make_loop(batch_size=8)
        with microbatch.LiveBytes() as live:
            microbatch._passes(loop.diffusion, loop.model, next(batches(8))[0][:size], {}, size)
        needed[size] = live.peak
    net = TinyNet()
    monkeypatch.setattr(microbatch, "available_memory", lambda device: needed[4] + 1000)
    assert train(tmp_path, model=net, batch_size=8, microbatch="auto", max_steps=1).microbatch == 4
    assert max(net.batch_sizes) == 4
    monkeypatch.setattr(microbatch, "available_memory", lambda device: None)
    assert train(tmp_path / "b", batch_size=8, microbatch="auto", max_steps=1).microbatch == 8


def test_a_compiled_network_is_compiled_for_the_steps(tmp_path):
    """Not for the passes that are measured, after which torch.compile would leave it alone."""
    graphs = []

    class Net(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = th.nn.Conv2d(3, 3, 1)

        def forward(self, x, t):
            return self.conv(x)

    def backend(graph, inputs):
        graphs.append([tensor.shape for tensor in inputs if tensor.dim() == 4 and tensor.shape[-1] == 8])
        return graph.forward

    model = Net()
    model.compile(backend=backend, dynamic=False)
    assert train(tmp_path, model=model, microbatch="auto", max_steps=2).microbatch == 4
    assert graphs == [[(4, 3, 8, 8)]]


def test_a_resumed_run_takes_what_the_first_part_took(tmp_path, monkeypatch):
    """With dropout, whose masks depend on it: the parts equal the whole."""
    images = write_images(tmp_path / "images")
    words = dict(net=Limited, dropout=0.3, microbatch="auto", save_interval=2)
    monkeypatch.setattr(Limited, "limit", 2)
    run(tmp_path / "whole", images, max_steps=6, **words)
    run(tmp_path / "parts", images, max_steps=3, **words)
    monkeypatch.setattr(Limited, "limit", 99)
    loop = run(tmp_path / "parts", images, seed=5, max_steps=6, resume_checkpoint="auto", **words)
    assert loop.microbatch == 2
    assert_continues(tmp_path / "parts", tmp_path / "whole")
    assert "measured_microbatch" not in (tmp_path / "parts" / "log.txt").read_text()


def test_a_resumed_run_of_another_batch_size_measures_again(tmp_path, monkeypatch):
    monkeypatch.setattr(Limited, "limit", 2)
    train(tmp_path, model=Limited(), microbatch="auto", max_steps=2)
    monkeypatch.setattr(Limited, "limit", 99)
    resumed = dict(microbatch="auto", resume_checkpoint=str(tmp_path / "model000002.pt"), max_steps=3)
    assert train(tmp_path, model=Limited(), batch_size=6, **resumed).microbatch == 6


def test_as_a_flag(tmp_path, capfd):
    words = dict(TRAIN, data_dir=write_images(tmp_path / "images"), microbatch="auto", max_steps=1)
    assert run_script("image_train", flags(**words), tmp_path / "log") == 0
    assert "microbatch auto: 4 of 4" in (tmp_path / "log" / "log.txt").read_text()
    assert json.loads((tmp_path / "log" / "config.json").read_text())["flags"]["microbatch"] == "auto"
    for value in ("all", "-2", "5"):
        capfd.readouterr()
        assert run_script("image_train", flags(**{**words, "microbatch": value}), tmp_path / "log") == 2
        err = capfd.readouterr().err
        assert err.count("\n") == 1 and "--microbatch" in err and value in err
