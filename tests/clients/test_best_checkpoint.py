"""A run that keeps the average with the lowest loss."""

import numpy as np
import pytest
import torch as th
from training import TinyNet, load, train

from improved_diffusion import logger
from improved_diffusion.train_util import TrainLoop


@pytest.mark.parametrize("use_fp16", [False, True])
def test_a_client_keeps_its_best_checkpoint(tmp_path, use_fp16):
    """By the loss of every step, whatever log_interval is."""

    class KeepsBest(TrainLoop):
        losses = ()

        def run_step(self, batch, cond):
            super().run_step(batch, cond)
            self.losses = (*self.losses, float(logger.getkvs()["loss"]))
            if self.losses[-1] == min(self.losses):
                th.save(self._master_params_to_state_dict(self.ema_params[0]), tmp_path / "best.pt")

    loop = train(tmp_path, KeepsBest, use_fp16=use_fp16, log_interval=100, max_steps=5)
    assert len(loop.losses) == 5 and all(np.isfinite(loop.losses))
    TinyNet().load_state_dict(load(tmp_path / "best.pt"))
