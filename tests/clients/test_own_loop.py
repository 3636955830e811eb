"""A loop and a step of the client's that log and save by themselves."""

import numpy as np
import pytest
import torch as th
from training import TinyNet, read_rows, train

from improved_diffusion import logger
from improved_diffusion.train_util import TrainLoop


class OwnLoop(TrainLoop):
    def run_loop(self):
        while self.step < self.lr_anneal_steps:
            self.run_step(*next(self.data))
            if self.step % self.log_interval == 0:
                logger.dumpkvs()
            self.step += 1
        self.save()

    def run_step(self, batch, cond):
        self.forward_backward(batch, cond)
        (self.optimize_fp16 if self.use_fp16 else self.optimize_normal)()
        self.log_step()


@pytest.mark.parametrize("use_fp16", [False, True])
def test_rows_of_the_log(tmp_path, use_fp16):
    """Each row has the means since the row before, as TrainLoop's own."""
    rows = []
    for cls in (TrainLoop, OwnLoop):
        th.manual_seed(3)
        np.random.seed(3)
        numbers = dict(max_steps=0, lr_anneal_steps=8, log_interval=3, use_fp16=use_fp16)
        train(tmp_path / cls.__name__, cls, model=TinyNet(), **numbers)
        rows.append(read_rows(tmp_path / cls.__name__))
    assert len(rows[0]) == len(rows[1]) == 3
    for own, want in zip(rows[1], rows[0], strict=True):
        assert "loss" in own and own == pytest.approx(want)


def test_rows_between_those_of_the_loop(tmp_path):
    """A row that a client writes has the steps since the last one, and the next row the others."""

    class Writing(TrainLoop):
        def run_step(self, batch, cond):
            super().run_step(batch, cond)
            if self.step in (1, 2):
                logger.dumpkvs()

    losses = []
    for cls, log_interval in ((TrainLoop, 1), (Writing, 4)):
        th.manual_seed(3)
        np.random.seed(3)
        train(tmp_path / cls.__name__, cls, model=TinyNet(), log_interval=log_interval, max_steps=5)
        losses.append([row["loss"] for row in read_rows(tmp_path / cls.__name__)])
    each, rows = losses
    assert rows == pytest.approx([each[0], each[1], each[2], np.mean(each[3:])])
