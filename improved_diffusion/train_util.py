"""
The training loop: what is computed in which order, and when it is logged and saved.

One step, for a batch x_0 and timesteps t drawn by the schedule sampler:

    loss = mean(weights(t) * training_losses(x_0, t))     in microbatches, to save memory
    AdamW on the float32 parameters                       unless a float16 gradient overflowed
    ema <- rate * ema + (1 - rate) * parameters           for each rate
"""

import contextlib
import copy
import math
import os
import traceback

import blobfile as bf  # noqa: F401 (star imports of the original's module give it, as np and dist)
import numpy as np  # noqa: F401
import torch as th
import torch.distributed as dist  # noqa: F401
from torch.nn.parallel.distributed import DistributedDataParallel as DDP
from torch.optim import AdamW

from . import dist_util, logger
from .fp16_util import (
    make_master_params,
    master_params_to_model_params,
    model_grads_to_master_grads,
    unflatten_master_params,
    zero_grad,
)
from .nn import match_gradients, update_ema
from .resample import LossAwareSampler, UniformSampler
from .training.checkpoints import (
    delete_old_sets,
    ema_filename,
    find_ema_checkpoint,  # noqa: F401 (part of this module, as in the original)
    is_in,
    optimizer_filename,
    parse_resume_step_from_filename,  # noqa: F401
    save_set,
)
from .training.contents import check_weights
from .training.position import Position
from .training.resume import (
    RNG,
    CheckpointIO,
    find_checkpoint,
    load_optimizer,
    log_changes,
    warn_of_other_checkpoints,
)
from .training.signals import StopSignals
from .training.statistics import StepStatistics, log_loss_dict  # noqa: F401 (the second is part of this module)
from .training.stopping import errors_of_ranks, leave
from .training.weights import load_weights
from .utils.errors import TrainingError, is_out_of_memory
from .utils.progress import Progress

# In float16 the loss is multiplied by 2^lg_loss_scale, lest small gradients vanish. The scale grows
# slowly, is halved whenever a gradient overflows, and begins high enough to find its place quickly.
INITIAL_LOG_LOSS_SCALE = 20.0
LONGEST_OVERFLOW = 20  # steps until the loss scale that a run begins with is small enough
# More overflows in a row are not the scale's fault: the network itself yields NaN.
MAX_OVERFLOWS_IN_A_ROW = 20


class TrainLoop:
    """
    :param model: the network, on dist_util.dev().
    :param diffusion: the GaussianDiffusion to train it for.
    :param data: an iterator of (x_start [N, C, ...], dict of conditions); one with state_dict(), which is
                 called before each batch, and load_state_dict() is continued where it was when a run resumes.
    :param batch_size: samples a step, on each rank.
    :param microbatch: samples that go through the network at once; -1 for all. Changes memory only.
    :param lr: learning rate of AdamW; it falls to 0 over lr_anneal_steps, if set.
    :param ema_rate: one rate, or a string of several with commas.
    :param log_interval: steps between rows of the log.
    :param save_interval: steps between checkpoints.
    :param resume_checkpoint: a model file to continue from, or "". With the state file beside it, the
                              run continues as if it had not stopped; without, as in the original.
                              "auto" is the newest complete one of get_blob_logdir(), if there is any.
                              A script hands in a Checkpoint that it has opened.
    :param use_fp16: compute the network's torso in float16, with a dynamic loss scale.
    :param fp16_scale_growth: growth of the loss scale's log2 a step.
    :param schedule_sampler: which timesteps to train on; uniform if None.
    :param weight_decay: of AdamW.
    :param lr_anneal_steps: number of steps; 0 = no limit.
    :param max_steps: the same without touching the learning rate.
    :param keep_checkpoints: number of the newest checkpoints to keep; 0 = all.
    :param flags: plain values that describe the run, a dict, kept in the state file. A resumed run
                  logs which of them have changed.
    :param preview: called on rank 0 after each save, with a function that gives a copy of the network with the first
                    average's weights, the folder, and the step of the save.
    :raises InputError: if the checkpoint cannot be read or does not belong to this model.
    """

    # of a subclass that replaces __init__ by the original's
    max_steps = keep_checkpoints = 0
    flags: dict = {}
    preview = None

    def __new__(cls, *_, **__):
        self = super().__new__(cls)
        self.position = Position()
        self._checkpoint = None  # that the run continues
        self._last_checkpoint = None  # the path of the last good one
        self._overflows_in_a_row = 0
        self._statistics = StepStatistics()
        self._progress = None
        self._before_batch = None  # state of data and random numbers before the batch of this step
        self._computing = None  # within a step: whether it has changed nothing but gradients and random numbers
        return self

    def __init__(
        self,
        *,
        model,
        diffusion,
        data,
        batch_size,
        microbatch,
        lr,
        ema_rate,
        log_interval,
        save_interval,
        resume_checkpoint,
        use_fp16=False,
        fp16_scale_growth=1e-3,
        schedule_sampler=None,
        weight_decay=0.0,
        lr_anneal_steps=0,
        max_steps=0,
        keep_checkpoints=0,
        flags=None,
        preview=None,
    ):
        self.model = model
        self.diffusion = diffusion
        self.data = data
        self.batch_size = batch_size
        self.microbatch = microbatch if microbatch > 0 else batch_size
        self.lr = lr
        self.ema_rate = [float(rate) for rate in str(ema_rate).split(",")]
        self.log_interval = log_interval
        self.save_interval = save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16 = use_fp16
        self.fp16_scale_growth = fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.weight_decay = weight_decay
        self.lr_anneal_steps = lr_anneal_steps
        self.max_steps = max_steps
        self.keep_checkpoints = keep_checkpoints
        self.flags = dict(flags or {})
        self.preview = preview

        self.step = 0
        self.resume_step = 0
        self.global_batch = self.batch_size * dist_util.world_size()
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE

        self.model_params = list(self.model.parameters())
        self.master_params = self.model_params
        checkpoint = self._find_checkpoint()
        warn_of_other_checkpoints(checkpoint, get_blob_logdir())
        self._load_and_sync_parameters()
        if self.use_fp16:
            self._setup_fp16()
        self.opt = AdamW(self.master_params, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        self.opt.register_step_pre_hook(match_gradients)
        # a subclass that loads weights for a new run leaves resume_step at 0
        if checkpoint and checkpoint.step == self.resume_step:
            state = checkpoint.read_state(self.data, self.schedule_sampler)
            self._load_optimizer_state()
            self.ema_params = [self._load_ema_parameters(rate) for rate in self.ema_rate]
            if state:
                self._load_state(state)
            self.position.saved = checkpoint.step, self.position.updates
            self._last_checkpoint = checkpoint.path
        else:
            self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]

        self.use_ddp = dist_util.world_size() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            self.ddp_model = DDP(
                self.model,
                device_ids=[dist_util.dev()] if dist_util.dev().type == "cuda" else None,
                bucket_cap_mb=128,
            )

    @property
    def step(self):
        """Steps done by this loop; clients may set it."""
        return self.position.step

    @step.setter
    def step(self, step):
        self.position.move_to(step)

    @property
    def resume_step(self):
        """Steps done before it, where a run without a state file is resumed."""
        return self.position.resume_step

    @resume_step.setter
    def resume_step(self, step):
        self.position.resume_step = step

    def last_step(self):
        """The step that the run ends at, None for no end."""
        return min((limit for limit in (self.lr_anneal_steps, self.max_steps) if limit), default=None)

    # ---------------------------------------------------------------- a checkpoint to continue from

    def _find_checkpoint(self):
        """The checkpoint that the run continues, found once; None for a new run."""
        if self._checkpoint is None:
            own = find_resume_checkpoint()  # by each rank, as in the original; what rank 0 finds counts
            own = dist_util.from_rank_0(lambda: own)
            self._checkpoint = find_checkpoint(own or self.resume_checkpoint, get_blob_logdir())
            if not own:
                self.resume_checkpoint = self._checkpoint.path if self._checkpoint else ""
        return self._checkpoint

    def _load_and_sync_parameters(self):
        """Load the model's weights, and set resume_step if they are a run's."""
        checkpoint = self._find_checkpoint()
        if checkpoint:
            logger.log(f"loading model from checkpoint: {checkpoint.path}...")
            dist_util.from_rank_0(lambda: load_weights(self.model, checkpoint.take(), checkpoint.path))
            if checkpoint.step is None:
                logger.log(f"{checkpoint.path} is not a model000000.pt: a new run starts from its weights")
            self.resume_step = checkpoint.step or 0
        dist_util.sync_params([*self.model.parameters(), *self.model.buffers()])

    def _load_ema_parameters(self, rate):
        """The averages of a rate from the checkpoint, else a copy of the parameters."""
        ema_params = copy.deepcopy(self.master_params)
        checkpoint, name = self._find_checkpoint(), ema_filename(rate, self.resume_step)
        path = checkpoint and checkpoint.find(name)
        if not path:
            logger.log(f"there is no checkpoint of EMA {rate}: it starts at the model's parameters")
            return ema_params

        def load():
            state_dict = checkpoint.take(name)
            check_weights(state_dict, self.model, path, strict=True)
            with th.no_grad():
                for mine, value in zip(ema_params, self._state_dict_to_master_params(state_dict), strict=True):
                    mine.copy_(value)

        logger.log(f"loading EMA from checkpoint: {path}...")
        dist_util.from_rank_0(load)
        dist_util.sync_params(ema_params)
        return ema_params

    def _load_optimizer_state(self):
        """Continue with the checkpoint's moments, if it has some."""
        checkpoint, name = self._find_checkpoint(), optimizer_filename(self.resume_step)
        path = checkpoint and checkpoint.find(name)
        if not path:
            logger.log("there is no checkpoint of the optimizer: it starts without moments")
            return
        logger.log(f"loading optimizer state from checkpoint: {path}")
        # parameters without a gradient so far have no moments; nor has any while all float16 gradients overflow
        allowed = [len(self.master_params), *([0] if self.use_fp16 and self.resume_step <= LONGEST_OVERFLOW else [])]
        if checkpoint.state and "moments" in checkpoint.state:
            allowed = [checkpoint.state["moments"]]
        # an annealed learning rate changes at every step
        report = ["weight_decay"] if self.lr_anneal_steps else ["lr", "weight_decay"]
        load_optimizer(self.opt, lambda: checkpoint.take(name), path, allowed, report)

    def _load_state(self, state):
        """Continue from a state file as if the run had not stopped."""
        self.step, self.resume_step = state["updates"], 0
        self.lg_loss_scale = state["lg_loss_scale"]
        self._overflows_in_a_row = state["overflows_in_a_row"]
        unreported = {"resume_checkpoint", "seed", "lr", "weight_decay"}  # the last two by the optimizer
        log_changes(state.get("flags", {}), {k: v for k, v in self.flags.items() if k not in unreported})
        self._parts().load_state_dict(state, self.step)
        if is_in(self._checkpoint.path, get_blob_logdir()):
            logger.get_current().drop_from("step", self.step)  # rows that will be written again

    def _state(self):
        return {
            "updates": self.position.updates,
            "lg_loss_scale": self.lg_loss_scale,
            "overflows_in_a_row": self._overflows_in_a_row,
            "moments": sum(map(bool, self.opt.state.values())),
            "flags": self.flags,
            **self._parts().state_dict(),
        }

    def _parts(self):
        return CheckpointIO(
            schedule_sampler=self.schedule_sampler, data=self.data, rng=RNG, statistics=self._statistics
        )

    def _setup_fp16(self):
        self.master_params = make_master_params(self.model_params)
        self.model.convert_to_fp16()

    def _master_params_to_state_dict(self, master_params):
        """The network's state dict with these parameters, or averages, in float32."""
        if self.use_fp16:
            master_params = unflatten_master_params(self.model_params, master_params)
        names = [name for name, _ in self.model.named_parameters()]
        return {**self.model.state_dict(), **dict(zip(names, (p.detach() for p in master_params), strict=True))}

    def _state_dict_to_master_params(self, state_dict):
        """The inverse: the parameters in the network's order, flat in float16 training."""
        params = [state_dict[name] for name, _ in self.model.named_parameters()]
        return make_master_params(params) if self.use_fp16 else params

    # ---------------------------------------------------------------- the loop

    def run_loop(self):
        """
        Train until lr_anneal_steps or max_steps is reached; for ever if neither is set.

        SIGTERM, SIGINT or SIGHUP, on any rank, ends the run after a step and a save. So does an error of the data.

        :raises SystemExit: (with status 0) after such a signal.
        :raises TrainingError: if the loss or the gradients are no longer finite, or another rank's data failed.
        """
        with (
            StopSignals() as stop,
            Progress("training", self.last_step(), "steps", self.position.updates, lines=False) as self._progress,
        ):
            batch = self._next_batch(stop)
            while batch is not None:
                self._try_step(*batch)
                self._finish_step()  # subclasses may override run_step() without calling this
                if self.step % self.log_interval == 0:
                    logger.dumpkvs()
                if self.position.save_due(self.save_interval):
                    self._save()
                    if self.step > 0 and dist_util.any_rank(bool(os.environ.get("DIFFUSION_TRAINING_TEST"))):
                        return
                batch = self._next_batch(stop)
                self.step += 1
            if self.position.closing_save_due(self.save_interval):
                self._save()

    def _next_batch(self, stop):
        """
        The next batch, None after the last step. Between two steps, with one message, the ranks agree whether to
        continue: after a signal or a failure of the data on one of them, all save and leave.
        """
        self._before_batch = self._stream().local_state()
        batch = error = None
        if stop.received is None and self.position.updates < (self.last_step() or math.inf):
            try:
                with stop.children():
                    batch = next(self.data)
            except Exception as e:  # an image cannot be read, a worker was killed, memory is full
                error = e
        if dist_util.any_rank(stop.received is not None or error is not None):
            self._stop(stop.received, error)
        return batch

    def _try_step(self, batch, cond):
        """
        run_step(). If it fails, the state before it can be saved as long as only gradients have been computed, as when
        a GPU runs out of memory. An update may be half done, and other ranks may wait within the step: then it cannot.
        """
        self._computing = None
        try:
            self.run_step(batch, cond)
        except Exception as e:
            if not self._computing or dist_util.world_size() > 1 or not self.position.has_news():
                raise
            if is_out_of_memory(e):
                traceback.clear_frames(e.__traceback__)  # they hold activations
            self.position.move_back()
            self._stop(None, e)

    def _stop(self, signal, error):
        """
        Save what the last step left, and leave. All ranks call it.

        :param signal: name of the one that this rank has received, or None.
        :param error: of this rank, or None.
        """
        self._stream().load_local_state(self._before_batch)
        errors = errors_of_ranks(error)
        for rank, (_, text) in errors.items():
            logger.log(f"rank {rank} cannot continue: {text}")
        if self.position.has_news():
            self._save()
        reason = "an error" if errors else signal or "a signal to another rank"
        saved = self._last_checkpoint or "nothing to save"
        logger.log(f"stopped by {reason} at step {self.position.label()}: {saved}")
        leave(error, errors)

    def _stream(self):
        """What a batch is drawn from."""
        return CheckpointIO(data=self.data, rng=RNG)

    def _save(self):
        self.save()
        self.position.mark_saved()

    def run_step(self, batch, cond):
        """
        One step of the optimizer.

        :param batch: x_start, [N, C, ...].
        :param cond: dict of tensors [N, ...], keyword arguments of the model.
        """
        self.forward_backward(batch, cond)
        if self.use_fp16:
            self.optimize_fp16()
        else:
            self.optimize_normal()
        self._finish_step()
        self.log_step()

    def _finish_step(self):
        """Count the step and log if due. Idempotent."""
        self.position.done = True
        if self._progress is not None:
            self._progress.reach(self.position.updates)
        if self.step % self.log_interval == 0:
            self._log_statistics()

    def forward_backward(self, batch, cond):
        """Set the gradients to those of the batch's mean weighted loss (times the loss scale in float16)."""
        # True until something but gradients and random numbers changes, within a step's first passes
        self._computing = self._computing is None
        zero_grad(self.model_params)
        device = dist_util.dev()
        batch = batch.to(device, non_blocking=True)
        cond = {k: v.to(device, non_blocking=True) for k, v in cond.items()}
        t, weights = self.schedule_sampler.sample(len(batch), device)

        terms = []
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = part.stop >= len(batch)
            # ranks exchange gradients once, after the last microbatch
            with contextlib.nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                losses = self.diffusion.training_losses(
                    self.ddp_model,
                    batch[part],
                    t[part],
                    model_kwargs={k: v[part] for k, v in cond.items()},
                )
                # a sum over the whole batch's size: a smaller last microbatch weighs less
                loss = (losses["loss"] * weights[part]).sum() / len(batch)
                (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()
            terms.append({k: v.detach() for k, v in losses.items()})

        losses = {k: th.cat([term[k] for term in terms]) for k in terms[0]}
        self._computing = False
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, losses["loss"])
        self._statistics.add_losses(self.diffusion, t, {k: v * weights for k, v in losses.items()})

    def optimize_normal(self):
        """Update the parameters and their averages."""
        self._log_grad_norm()
        self._anneal_lr()
        self.opt.step()
        self._update_ema()

    def optimize_fp16(self):
        """
        Update the float32 masters, their averages and the model; if a gradient overflowed, halve the loss
        scale instead.

        :raises TrainingError: after MAX_OVERFLOWS_IN_A_ROW overflows.
        """
        model_grads_to_master_grads(self.model_params, self.master_params)
        grad = self.master_params[0].grad
        if dist_util.any_rank(not grad.isfinite().all()):
            self._overflow()
            return
        self._overflows_in_a_row = 0
        grad.mul_(1.0 / 2**self.lg_loss_scale)
        self._log_grad_norm()
        self._anneal_lr()
        self.opt.step()
        self._update_ema()
        master_params_to_model_params(self.model_params, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth

    def _overflow(self):
        self._overflows_in_a_row += 1
        if self._overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
            raise self._diverged(f"float16 gradients overflowed {MAX_OVERFLOWS_IN_A_ROW} times in a row")
        self.lg_loss_scale -= 1
        logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")

    def _update_ema(self):
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.master_params, rate=rate)

    def _anneal_lr(self):
        if not self.lr_anneal_steps:
            return
        frac_done = self.position.label() / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - frac_done)

    # ---------------------------------------------------------------- logging

    def _log_grad_norm(self):
        grads = [p.grad for p in self.master_params if p.grad is not None]
        self._statistics.add("grad_norm", th.linalg.vector_norm(th.stack(th._foreach_norm(grads))))

    def log_step(self):
        """Log how far the run is."""
        logger.logkv("step", self.position.label())
        logger.logkv("samples", (self.position.label() + 1) * self.global_batch)
        if self.use_fp16:
            logger.logkv("lg_loss_scale", self.lg_loss_scale)

    def _log_statistics(self):
        """Give the logger the means since the last time, over all ranks."""
        means = self._statistics.read()
        self._check_finite(means)
        for key, (mean, count) in means.items():
            logger.logkv_mean(key, mean, count)
        if self._progress is not None and means:
            rate = self._progress.rate() * self.global_batch
            logger.logkv("images/s", rate)
            self._progress.show(**{name: means[name][0] for name in ("loss",) if name in means}, **{"images/s": rate})
        self._statistics = StepStatistics()

    def _check_finite(self, means):
        if self.use_fp16:
            return  # an overflow makes a loss infinite, and optimize_fp16() deals with it
        for key in ("loss", "grad_norm"):
            if key in means and not math.isfinite(means[key][0]):
                raise self._diverged(f"{key} is {means[key][0]}")

    def _diverged(self, what, bad=None):
        """
        The error to raise, on all ranks together.

        :param bad: the ranks to name; those whose loss is not finite if None.
        """
        bad = bad or self._statistics.ranks_not_finite("loss") or range(dist_util.world_size())
        return TrainingError(
            f"{what} at step {self.position.label()} on rank {', '.join(map(str, bad))}; "
            f"the last good checkpoint is {self._last_checkpoint or 'none'}. A lower lr helps, or a look at the data"
        )

    # ---------------------------------------------------------------- saving

    def save(self):
        """
        Write the model, its averages, the optimizer and the run's state; all ranks call it, rank 0 writes.

        :raises TrainingError: instead of saving a model whose loss or gradients are not finite.
        """
        self._check_finite(self._statistics.read())
        norms = th.stack(th._foreach_norm([p.detach() for p in self.master_params]))
        if bad := dist_util.ranks_where(not norms.isfinite().all()):
            raise self._diverged("a parameter is not finite", bad)
        model = self._master_params_to_state_dict(self.master_params)
        averages = [self._master_params_to_state_dict(params) for params in self.ema_params]
        path = dist_util.from_rank_0(self._write_checkpoint, model, averages, self._state())
        if self._progress is not None:
            self._progress.rate()  # from here on, without the time that saving took
        # overflows may be the network's, not the loss scale's
        if not self._overflows_in_a_row or self._last_checkpoint is None:
            self._last_checkpoint = path

    def _write_checkpoint(self, model, averages, state):
        logger.log("saving model...")
        directory, label = get_blob_logdir(), self.position.label()
        emas = dict(zip(self.ema_rate, averages, strict=True))
        path = save_set(directory, label, model=model, emas=emas, optimizer=self.opt.state_dict(), state=state)
        logger.log(f"saved {path} and its ema, opt and state")
        if self.preview is not None:
            self.preview(lambda: self._copy_with(averages[0]), directory, label)
        if self.keep_checkpoints and not self._overflows_in_a_row:
            delete_old_sets(directory, label, self.keep_checkpoints)
        return path

    def draw_missing_preview(self):
        """Draw the preview of the checkpoint that the run continues, if it was killed before it drew it."""
        checkpoint, directory = self._checkpoint, get_blob_logdir()
        if self.preview is None or not checkpoint or checkpoint.step is None or not is_in(checkpoint.path, directory):
            return
        if self.preview.is_missing(directory, checkpoint.step):
            average = self._master_params_to_state_dict(self.ema_params[0])
            self.preview(lambda: self._copy_with(average), directory, checkpoint.step)

    def _copy_with(self, state_dict):
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(state_dict)
        return model


def get_blob_logdir():
    """Where checkpoints go: DIFFUSION_BLOB_LOGDIR, else the log directory."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint():
    """
    A model file to continue from, or None. Replace it on infrastructure that finds a restarted job's checkpoints.
    """
    return None
