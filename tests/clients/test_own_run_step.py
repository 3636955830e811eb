"""A TrainLoop with its own step: plain SGD, no weight decay, without a call of the loop's own step."""

import torch as th
from training import NoiselessDiffusion, TinyNet, batches, load, train

from improved_diffusion import logger
from improved_diffusion.train_util import TrainLoop, update_ema


class SGDLoop(TrainLoop):
    def run_step(self, batch, cond):
        t = th.zeros(len(batch), dtype=th.long)
        loss = self.diffusion.training_losses(self.ddp_model, batch, t, model_kwargs=cond)["loss"].mean()
        loss.backward()
        with th.no_grad():
            for p in self.model_params:
                p -= self.lr * p.grad
                p.grad = None
        for rate, params in zip(self.ema_rate, self.ema_params):  # noqa: B905
            update_ema(params, self.master_params, rate=rate)
        logger.logkv_mean("my_loss", loss.item())
        self.log_step()


def test_a_step_of_stochastic_gradient_descent(tmp_path):
    train(tmp_path, SGDLoop, model=(model := TinyNet()), diffusion=NoiselessDiffusion(), max_steps=1, lr=0.1)
    after = load(tmp_path / "model000000.pt")
    ema = load(tmp_path / "ema_0.9_000000.pt")
    assert "my_loss" in (tmp_path / "progress.csv").read_text()

    th.manual_seed(0)
    initial = TinyNet()
    x, _ = next(batches())
    residual = initial(x, None) - x.flip(-1)  # gradient of the mean square: 2 * mean of the residual, for the bias
    want = initial.conv.bias - 0.1 * 2 * residual.mean(dim=(0, 2, 3)) / 3
    th.testing.assert_close(after["conv.bias"], want)
    th.testing.assert_close(ema["conv.bias"], 0.9 * initial.conv.bias + 0.1 * want)
    assert set(after) == set(dict(model.named_parameters()))
