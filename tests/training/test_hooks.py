"""Methods of TrainLoop that forks override or call, written as a stranger writes them for the original."""

import copy
import inspect
import os

import blobfile as bf
import numpy as np
import pytest
import torch as th
from training import TinyNet, assert_same, batches, checkpoint_names, latest, load, make_loop, train

from improved_diffusion import dist_util, logger
from improved_diffusion.train_util import (
    INITIAL_LOG_LOSS_SCALE,
    AdamW,
    TrainLoop,
    find_ema_checkpoint,
    find_resume_checkpoint,
    get_blob_logdir,
    log_loss_dict,
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    parse_resume_step_from_filename,
    unflatten_master_params,
    update_ema,
    zero_grad,
)

pytestmark = pytest.mark.usefixtures("one_cpu", "modest_scale")


# ---------------------------------------------------------------- one method each, of its own


def load_and_sync(self):
    path = find_resume_checkpoint() or self.resume_checkpoint
    if path:
        self.resume_step = parse_resume_step_from_filename(path)
        self.model.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))
    dist_util.sync_params(self.model.parameters())


def load_ema(self, rate):
    ema = copy.deepcopy(self.master_params)
    path = find_ema_checkpoint(find_resume_checkpoint() or self.resume_checkpoint, self.resume_step, rate)
    if path:
        ema = self._state_dict_to_master_params(dist_util.load_state_dict(path, map_location=dist_util.dev()))
    dist_util.sync_params(ema)
    return ema


def load_optimizer(self):
    path = bf.join(bf.dirname(find_resume_checkpoint() or self.resume_checkpoint), f"opt{self.resume_step:06}.pt")
    if bf.exists(path):
        self.opt.load_state_dict(dist_util.load_state_dict(path, map_location=dist_util.dev()))


def to_state_dict(self, master_params):
    if self.use_fp16:
        master_params = unflatten_master_params(list(self.model.parameters()), master_params)
    state_dict = self.model.state_dict()
    for (name, _), value in zip(self.model.named_parameters(), master_params, strict=True):
        state_dict[name] = value
    return state_dict


def to_master_params(self, state_dict):
    params = [state_dict[name] for name, _ in self.model.named_parameters()]
    return make_master_params(params) if self.use_fp16 else params


def init(self, *, model, diffusion, data, batch_size, lr, ema_rate, log_interval, save_interval, **others):
    self.model, self.diffusion, self.data = model, diffusion, data
    self.batch_size = self.microbatch = batch_size
    self.lr, self.weight_decay, self.lr_anneal_steps = lr, 0.0, others.pop("max_steps")
    self.lr_anneal_steps = others.pop("lr_anneal_steps", self.lr_anneal_steps)
    self.ema_rate = [float(x) for x in ema_rate.split(",")]
    self.log_interval, self.save_interval = log_interval, save_interval
    self.resume_checkpoint, self.use_fp16 = others["resume_checkpoint"], others.get("use_fp16", False)
    self.fp16_scale_growth, self.lg_loss_scale = 1e-3, INITIAL_LOG_LOSS_SCALE
    from improved_diffusion.resample import UniformSampler

    self.schedule_sampler = UniformSampler(diffusion)
    self.step = 0
    self.resume_step = 0
    self.global_batch = self.batch_size
    self.model_params = list(self.model.parameters())
    self.master_params = self.model_params
    self._load_and_sync_parameters()
    if self.use_fp16:
        self._setup_fp16()
    self.opt = AdamW(self.master_params, lr=self.lr, weight_decay=self.weight_decay)
    if self.resume_step:
        self._load_optimizer_state()
        self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
    else:
        self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]
    self.use_ddp, self.ddp_model = False, self.model


def run_loop(self):
    while not self.lr_anneal_steps or self.step + self.resume_step < self.lr_anneal_steps:
        batch, cond = next(self.data)
        self.run_step(batch, cond)
        if self.step % self.log_interval == 0:
            logger.dumpkvs()
        if self.step % self.save_interval == 0:
            self.save()
        self.step += 1
    if (self.step - 1) % self.save_interval:
        self.save()


def run_step(self, batch, cond):
    self.forward_backward(batch, cond)
    (self.optimize_fp16 if self.use_fp16 else self.optimize_normal)()
    self.log_step()


def forward_backward(self, batch, cond):
    zero_grad(self.model_params)
    for i in range(0, len(batch), self.microbatch):
        t, weights = self.schedule_sampler.sample(self.microbatch, dist_util.dev())
        losses = self.diffusion.training_losses(self.ddp_model, batch[i : i + self.microbatch], t, model_kwargs=cond)
        loss = (losses["loss"] * weights).mean()
        log_loss_dict(self.diffusion, t, {k: v * weights for k, v in losses.items()})
        (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()


def optimize_normal(self):
    self._log_grad_norm()
    self._anneal_lr()
    self.opt.step()
    for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
        update_ema(params, self.master_params, rate=rate)


def optimize_fp16(self):
    if any(not th.isfinite(p.grad).all() for p in self.model_params):
        self.lg_loss_scale -= 1
        return
    model_grads_to_master_grads(self.model_params, self.master_params)
    self.master_params[0].grad.mul_(1.0 / 2**self.lg_loss_scale)
    optimize_normal(self)
    master_params_to_model_params(self.model_params, self.master_params)
    self.lg_loss_scale += self.fp16_scale_growth


def log_grad_norm(self):
    logger.logkv_mean("grad_norm", np.sqrt(sum((p.grad**2).sum().item() for p in self.master_params)))


def save(self):
    def write(name, contents):
        with bf.BlobFile(bf.join(get_blob_logdir(), name.format(self.step + self.resume_step)), "wb") as f:
            th.save(contents, f)

    write("model{:06d}.pt", self._master_params_to_state_dict(self.master_params))
    for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
        write(f"ema_{rate}_{{:06d}}.pt", self._master_params_to_state_dict(params))
    write("opt{:06d}.pt", self.opt.state_dict())


GRAFTS = {
    "run_loop": run_loop,
    "run_step": run_step,
    "forward_backward": forward_backward,
    "optimize_normal": optimize_normal,
    "optimize_fp16": optimize_fp16,
    "_log_grad_norm": log_grad_norm,
    "save": save,
    "_load_and_sync_parameters": load_and_sync,
    "_load_ema_parameters": load_ema,
    "_load_optimizer_state": load_optimizer,
    "_master_params_to_state_dict": to_state_dict,
    "_state_dict_to_master_params": to_master_params,
}


def follow(folder, cls, initial, checkpoint, use_fp16, save_interval):
    """A run of the class from the checkpoint, "" for none, always with the same random numbers."""
    np.random.seed(3)
    th.manual_seed(3)
    train(
        folder,
        cls,
        model=copy.deepcopy(initial),
        use_fp16=use_fp16,
        ema_rate="0.5,0.9",
        max_steps=0,
        lr_anneal_steps=8,
        save_interval=save_interval,
        resume_checkpoint=checkpoint,
    )


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """ours(source, use_fp16, save_interval): (the folder of a run of TrainLoop's, its network and its checkpoint)."""
    runs = {}

    def get(source, use_fp16, save_interval):
        key = source, use_fp16, save_interval
        if key not in runs:
            folder, checkpoint = tmp_path_factory.mktemp("ours"), ""
            if source != "new":
                train(folder / "source", use_fp16=use_fp16, ema_rate="0.5,0.9", max_steps=4)
                checkpoint = latest(folder / "source")
            for path in (folder / "source").glob("state*.pt") if source == "original" else ():
                path.unlink()
            initial = TinyNet()
            follow(folder / "run", TrainLoop, initial, checkpoint, use_fp16, save_interval)
            runs[key] = folder / "run", initial, checkpoint
        return runs[key]

    return get


@pytest.mark.parametrize("use_fp16", [False, True])
@pytest.mark.parametrize("source", ["new", "ours", "original"])
@pytest.mark.parametrize("name", GRAFTS)
def test_a_method_of_the_original_on_a_subclass(tmp_path, ours, name, source, use_fp16):
    """Equal numbers."""
    called = []

    def graft(self, *args):
        called.append(name)
        return GRAFTS[name](self, *args)

    save_interval = 5 if name == "run_loop" else 3  # which saves at once where it was resumed
    folder, initial, checkpoint = ours(source, use_fp16, save_interval)
    follow(tmp_path, type("Grafted", (TrainLoop,), {name: graft}), initial, checkpoint, use_fp16, save_interval)
    names = [file for file in checkpoint_names(folder) if file.startswith(("model", "ema"))]
    assert set(names) <= set(checkpoint_names(tmp_path)) and len(names) >= 3
    for file in names:
        got, want = load(tmp_path / file), load(folder / file)
        th.testing.assert_close(dict(got), dict(want), rtol=1e-6, atol=1e-7)
    unused = {"optimize_normal"} if use_fp16 else {"optimize_fp16"}
    if source == "new":
        unused |= {"_load_ema_parameters", "_load_optimizer_state", "_state_dict_to_master_params"}
    assert bool(called) == (name not in unused)


@pytest.mark.parametrize("source", ["new", "original"])
def test_a_constructor_of_the_original_on_a_subclass(tmp_path, source):
    """It never calls ours, and sets its own attributes only."""
    folder = tmp_path / "source"
    train(folder, max_steps=4)
    for path in folder.glob("state*.pt"):
        path.unlink()
    initial = TinyNet()
    for cls in (TrainLoop, type("Own", (TrainLoop,), {"__init__": init})):
        np.random.seed(3)
        th.manual_seed(3)
        train(
            tmp_path / cls.__name__,
            cls,
            model=copy.deepcopy(initial),
            max_steps=0,
            lr_anneal_steps=8,
            save_interval=3,
            resume_checkpoint=latest(folder) if source == "original" else "",
        )
    names = [name for name in checkpoint_names(tmp_path / "TrainLoop") if name[0] in "em"]
    assert names == [name for name in checkpoint_names(tmp_path / "Own") if name[0] in "em"]
    for name in names:
        got, want = load(tmp_path / "Own" / name), load(tmp_path / "TrainLoop" / name)
        th.testing.assert_close(dict(got), dict(want), rtol=1e-6, atol=1e-7)


def test_the_signature_is_that_of_the_constructor():
    """Scripts choose arguments by it."""
    names = list(inspect.signature(TrainLoop).parameters)
    assert names[:6] == ["model", "diffusion", "data", "batch_size", "microbatch", "lr"]


# ---------------------------------------------------------------- what forks do with them


def test_what_is_saved_goes_through_the_hook(tmp_path):
    class Prefixed(TrainLoop):
        def _master_params_to_state_dict(self, master_params):
            state_dict = super()._master_params_to_state_dict(master_params)
            return {f"net.{name}": value for name, value in state_dict.items()}

    train(tmp_path, Prefixed)
    for name in ("model000003.pt", "ema_0.9_000003.pt"):
        assert list(load(tmp_path / name)) == ["net.conv.weight", "net.conv.bias"]


def test_losses_between_two_rows_of_the_log(tmp_path):
    """The running mean, as in the original; the row that follows is not changed by reading it."""

    class Reading(TrainLoop):
        def log_step(self):
            super().log_step()
            seen.append(logger.getkvs()["loss"])

    rows = []
    for cls in (TrainLoop, Reading):
        seen = []
        np.random.seed(3)
        th.manual_seed(3)
        train(tmp_path / cls.__name__, cls, model=TinyNet(), log_interval=3, max_steps=7)
        rows.append((tmp_path / cls.__name__ / "progress.csv").read_text().splitlines())
    single = []
    np.random.seed(3)
    th.manual_seed(3)
    train(tmp_path / "single", type("Each", (Reading,), {}), model=TinyNet(), log_interval=1, max_steps=7)
    single = seen[7:]
    assert seen[:7] == pytest.approx(
        [single[0], single[1], np.mean(single[1:3]), np.mean(single[1:4]), single[4], np.mean(single[4:6])]
        + [np.mean(single[4:7])]
    )
    names = rows[0][0].split(",")
    kept = [i for i, name in enumerate(names) if name != "images/s"]
    for without, reading in zip(rows[0], rows[1], strict=True):
        assert [without.split(",")[i] for i in kept] == [reading.split(",")[i] for i in kept]


def test_an_optimizer_that_starts_again(tmp_path):
    train(tmp_path, max_steps=4)
    loop = make_loop(
        type("Own", (TrainLoop,), {"_load_optimizer_state": lambda self: None}), resume_checkpoint=latest(tmp_path)
    )
    assert loop.step == 4 and loop.opt.state_dict()["state"] == {}


def test_averages_may_be_loaded_again(tmp_path):
    train(tmp_path, max_steps=4)
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loop = make_loop(resume_checkpoint=latest(tmp_path), data=batches())
        again = loop._load_ema_parameters(0.9) if loop.resume_step else None
    assert again is None  # with a state file the loop counts on by itself
    os.remove(tmp_path / "state000000.pt")
    os.remove(tmp_path / "state000004.pt")
    with logger.scoped_configure(dir=str(tmp_path), format_strs=[]):
        loop = make_loop(resume_checkpoint=latest(tmp_path), data=batches())
        assert_same([p.detach() for p in loop._load_ema_parameters(0.9)], [p.detach() for p in loop.ema_params[0]])
        assert_same(loop._load_ema_parameters(0.9)[0], load(tmp_path / "ema_0.9_000004.pt")["conv.weight"])
