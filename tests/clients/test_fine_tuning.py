"""Fine-tuning of a larger network from another one's weights."""

import torch as th
from training import TinyNet, assert_same, latest, load, make_loop, train

from improved_diffusion import dist_util, logger
from improved_diffusion.train_util import TrainLoop


class FineTuned(TrainLoop):
    """Loads what fits, and starts a new run."""

    def _load_and_sync_parameters(self):
        weights = dist_util.load_state_dict(self.resume_checkpoint, map_location="cpu")
        self.model.load_state_dict(weights, strict=False)
        dist_util.sync_params(self.model.parameters())


class LargerNet(TinyNet):
    def __init__(self):
        super().__init__()
        self.scale = th.nn.Parameter(th.ones(1))


def test_fine_tuning_of_what_fits(tmp_path):
    train(tmp_path, max_steps=4)
    with logger.scoped_configure(dir=str(tmp_path / "new"), format_strs=[]):
        loop = make_loop(FineTuned, model=LargerNet(), resume_checkpoint=latest(tmp_path))
        assert (loop.step, loop.resume_step, loop.opt.state_dict()["state"]) == (0, 0, {})
        weights = load(tmp_path / "model000004.pt")
        assert_same(loop.model.conv.weight.detach(), weights["conv.weight"])
        assert_same([p.detach() for p in loop.ema_params[0]], [p.detach() for p in loop.model_params])
        loop.run_loop()
    assert set(load(tmp_path / "new" / "model000003.pt")) == {"scale", *weights}
