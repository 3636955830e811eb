"""What forks of the original do with its loop, factories and loaders: each is a pattern of published code."""

import pathlib

import numpy as np
import pytest
import torch as th
from harness import TINY, build, write_images
from training import NoiselessDiffusion, TinyNet, load, make_loop, read_rows, train

from improved_diffusion import dist_util, image_datasets, logger, script_util, train_util
from improved_diffusion.train_util import TrainLoop
from improved_diffusion.unet import UNetModel


class Counting(NoiselessDiffusion):
    """The loss of step n is n + 1."""

    steps = 0

    def training_losses(self, model, x_start, t, model_kwargs=None):
        terms = super().training_losses(model, x_start, t, model_kwargs)
        self.steps += 1
        return {"loss": terms["loss"] * 0 + self.steps}


def test_rows_at_steps_of_its_own(tmp_path):
    """Dumped before the loop's own interval ends: each row has the mean of all steps since the last."""

    class Dumping(TrainLoop):
        def run_loop(self):
            for self.step in range(8):
                self.run_step(*next(self.data))
                if (self.step + 1) % 4 == 0:
                    logger.dumpkvs()

    train(tmp_path, Dumping, diffusion=Counting(), log_interval=4, max_steps=0)
    assert [row["loss"] for row in read_rows(tmp_path)] == [2.5, 6.5]


@pytest.mark.parametrize("microbatch", [-1, 2, 3])
def test_terms_that_are_numbers_or_not_always_there(tmp_path, microbatch):
    class Terms(NoiselessDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None):
            terms = super().training_losses(model, x_start, t, model_kwargs)
            more = {"topo": 0.25, "reg": terms["mse"].mean(), "one": terms["mse"].new_ones(1)}
            if len(t) == 1:  # the last of passes of three
                more["sometimes"] = th.full_like(terms["mse"], 2.0)
            return {**terms, **more, "loss": terms["loss"] + more["reg"]}

    train(tmp_path, diffusion=Terms(), microbatch=microbatch, max_steps=3)
    for row in read_rows(tmp_path):
        assert row["topo"] == 0.25 and row["one"] == 1 and row["reg"] == pytest.approx(row["mse"], rel=1e-5)
        assert row.get("sometimes") == (2.0 if microbatch == 3 else None)


def test_a_loss_that_is_one_number(tmp_path):
    class Mean(NoiselessDiffusion):
        def training_losses(self, model, x_start, t, model_kwargs=None):
            return {"loss": super().training_losses(model, x_start, t, model_kwargs)["mse"].mean()}

    train(tmp_path / "one", diffusion=Mean(), microbatch=2, max_steps=2)
    assert all(np.isfinite(row["loss"]) for row in read_rows(tmp_path / "one"))


def test_a_parameter_that_a_step_does_not_use_moves_by_its_momentum():
    """The original sets gradients to zero, not to None."""

    class TwoParts(th.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (th.nn.Parameter(th.ones(1)) for _ in range(2))
            self.calls = 0

        def forward(self, x, t):
            self.calls += 1
            return x * (self.a * self.b if self.calls == 1 else self.a)

    loop, gradients = make_loop(model=TwoParts(), diffusion=NoiselessDiffusion(), weight_decay=0.1), []
    x = th.linspace(-1, 1, 8).expand(4, 3, 8, 8)
    with logger.scoped_configure(format_strs=[]):
        for _ in range(4):
            loop.forward_backward(x, {})
            gradients.append(loop.model.b.grad.clone())
            loop.optimize_normal()
    assert gradients[0] != 0 and gradients[1:] == [0, 0, 0]
    alone = th.nn.Parameter(th.ones(1))
    optimizer = th.optim.AdamW([alone], lr=loop.lr, weight_decay=0.1)
    for alone.grad in gradients:
        optimizer.step()
    th.testing.assert_close(loop.model.b, alone)


def test_a_frozen_parameter_stays_after_resuming(tmp_path):
    """Its moments are in the optimizer's file."""
    train(tmp_path, weight_decay=0.1)
    net = TinyNet()
    net.conv.bias.requires_grad_(False)
    checkpoint = str(tmp_path / "model000003.pt")
    loop = train(tmp_path / "more", model=net, resume_checkpoint=checkpoint, max_steps=6, weight_decay=0.1)
    assert th.equal(loop.model.conv.bias, load(checkpoint)["conv.bias"])
    assert not th.equal(loop.model.conv.weight, load(checkpoint)["conv.weight"])


def test_gradients_are_set_to_zero():
    p = th.nn.Parameter(th.ones(2))
    p.grad = kept = th.ones(2)
    train_util.zero_grad([p, th.nn.Parameter(th.ones(1))])
    assert p.grad is kept and kept.tolist() == [0, 0]


def test_classes_that_are_assigned_to_the_factories(monkeypatch):
    class Mine(UNetModel):
        pass

    class Spaced(script_util.SpacedDiffusion):
        def __init__(self, use_timesteps, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False):
            kinds = dict(model_mean_type=model_mean_type, model_var_type=model_var_type, loss_type=loss_type)
            super().__init__(use_timesteps, betas=betas, rescale_timesteps=rescale_timesteps, **kinds)

    monkeypatch.setattr(script_util, "UNetModel", Mine)
    monkeypatch.setattr(script_util, "SpacedDiffusion", Spaced)
    model, diffusion = build(**TINY, image_size=8)
    assert type(model) is Mine and type(diffusion) is Spaced


def test_a_logger_whose_means_take_no_count(tmp_path, monkeypatch):
    whole, seen = logger.logkv_mean, []
    monkeypatch.setattr(logger, "logkv_mean", lambda k, v: (seen.append(k), whole(k, v)))
    train(tmp_path, log_interval=2)
    assert "loss" in seen and read_rows(tmp_path)


def test_a_run_of_a_smaller_network_is_continued_by_a_loop_that_reads_it(tmp_path):
    class Larger(TinyNet):
        def __init__(self):
            super().__init__()
            self.extra = th.nn.Parameter(th.full((1,), 7.0))

        def forward(self, x, t, shift=None):
            return super().forward(x, t, shift) + 0 * self.extra

    class Reading(TrainLoop):
        def _load_and_sync_parameters(self):
            self.model.load_state_dict(load(tmp_path / "old" / "model000003.pt"), strict=False)
            self.resume_step = 3

        def _load_optimizer_state(self):
            pass

        def _state_dict_to_master_params(self, state_dict):
            return [state_dict.get(name, p.detach()) for name, p in self.model.named_parameters()]

    train(tmp_path / "new")
    (tmp_path / "old").mkdir()
    for name in ("model000003.pt", "ema_0.9_000003.pt"):  # as the original leaves them, without a state
        (tmp_path / "new" / name).rename(tmp_path / "old" / name)
    checkpoint = str(tmp_path / "old" / "model000003.pt")
    loop = train(tmp_path / "more", Reading, model=Larger(), resume_checkpoint=checkpoint, max_steps=5)
    average = dict(zip(dict(loop.model.named_parameters()), loop.ema_params[0], strict=True))
    assert average["extra"].item() == pytest.approx(7.0)


def test_missing_files_are_what_python_calls_them(tmp_path):
    with pytest.raises(FileNotFoundError):
        dist_util.load_state_dict(str(tmp_path / "x.pt"))
    with pytest.raises(OSError, match="missing"):
        image_datasets.load_data(data_dir=str(tmp_path / "missing"), batch_size=1, image_size=8)


def test_batches_and_paths(tmp_path):
    images = write_images(tmp_path / "images", count=4)
    batch = next(image_datasets.load_data(data_dir=str(images), batch_size=2, image_size=8, num_workers=0))
    batch[0] = batch[0] * 2  # as of a list
    paths = image_datasets._list_image_files_recursively(data_dir=str(images))
    dataset = image_datasets.ImageDataset(8, [pathlib.Path(path) for path in paths])
    assert dataset.local_images == paths and dataset[0][0].shape == (3, 8, 8)


def test_conditions_that_move_by_themselves(tmp_path):
    """Such as a tokenizer's: to(device) is all that they have."""

    class Text:
        def __init__(self, shift):
            self.shift = shift

        def to(self, device):
            return self

        def __getitem__(self, part):
            return self.shift[part]

    batches = iter([(th.zeros(4, 3, 8, 8), {"shift": Text(th.ones(4))})] * 3)
    train(tmp_path, data=batches, max_steps=2)


def test_the_order_of_features():
    model, _ = build(**TINY, image_size=8)
    assert list(model.get_feature_vectors(th.zeros(1, 3, 8, 8), th.zeros(1))) == ["down", "up", "middle"]
