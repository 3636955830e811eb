"""
The training loop: what is computed in which order, and when it is logged and saved. One file, since that order is read
in one place, and since the methods for resuming and saving are the class's: forks override them.

One step, for a batch x_0 and timesteps t drawn by the schedule sampler:

    loss = mean(weights(t) * training_losses(x_0, t))     in microbatches, to save memory
    gradient <- gradient * min(1, grad_clip / norm)       if grad_clip is set
    AdamW on the float32 parameters                       unless a float16 gradient overflowed
    ema <- rate * ema + (1 - rate) * parameters           for each rate
"""

import contextlib
import copy
import functools
import math
import os
import traceback

import blobfile as bf  # noqa: F401 (star imports of the original's module give it, as dist)
import numpy as np
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
    zero_grad,  # noqa: F401 (part of this module, as in the original)
)
from .nn import match_gradients, update_ema
from .resample import LossAwareSampler, UniformSampler
from .script_util import takes
from .training import checkpoints, resume
from .training.checkpoints import find_ema_checkpoint, parse_resume_step_from_filename  # noqa: F401 (the original's)
from .training.microbatch import largest_microbatch
from .training.position import Position
from .training.signals import StopSignals
from .training.statistics import StepStatistics, log_loss_dict, per_sample  # noqa: F401 (the second: the original's)
from .training.stopping import stop_run, try_next
from .training.waiting import Waiting
from .training.weights import copy_with, is_young, load_weights
from .utils.errors import is_out_of_memory
from .utils.files import checkpoint_url
from .utils.progress import Progress
from .utils.streams import show_at_once

# In float16 the loss is multiplied by 2^lg_loss_scale, lest small gradients vanish. The scale grows
# slowly, is halved whenever a gradient overflows, and begins high enough to find its place quickly.
INITIAL_LOG_LOSS_SCALE = 20.0
# More overflows in a row are not the scale's fault: the network itself yields NaN.
MAX_OVERFLOWS_IN_A_ROW = 20
# The flag under which the state file has [microbatch, batch_size] of microbatch auto
MEASURED = "measured_microbatch"


class TrainLoop:
    """
    :param model: the network, on dist_util.dev().
    :param diffusion: the GaussianDiffusion to train it for.
    :param data: an iterator of (x_start [N, C, ...], dict of conditions); one with state_dict(), which is
                 called before each batch, and load_state_dict() is continued where it was when a run resumes.
    :param batch_size: samples a step, on each rank.
    :param microbatch: samples that go through the network at once; -1 for all. The gradient's expectation is the
                       same. "auto" is the largest that fits, measured before the first step.
    :param lr: learning rate of AdamW; it falls to 0 over lr_anneal_steps, if set.
    :param ema_rate: one rate, a list of them, or a string of them with commas.
    :param log_interval: steps between rows of the log.
    :param save_interval: steps between checkpoints.
    :param resume_checkpoint: a model file (or an opened Checkpoint) to continue from, or "". With the state file beside
                              it, the run continues as if it had not stopped; without, as in the original. "auto" is
                              the newest complete one of get_blob_logdir(), if there is any.
    :param use_fp16: compute the network's torso in float16, with a dynamic loss scale.
    :param fp16_scale_growth: growth of the loss scale's log2 a step.
    :param schedule_sampler: which timesteps to train on; uniform if None.
    :param weight_decay: of AdamW.
    :param lr_anneal_steps: number of steps; 0 = no limit.
    :param max_steps: the same without touching the learning rate.
    :param keep_checkpoints: number of the newest checkpoints to keep; 0 = all.
    :param flags: a dict of plain values that describe the run, for the state file; a resumed run logs which changed.
    :param preview: called on rank 0 after each save of a trained network, with a function that returns a copy of it,
                    the folder, the step, the name of the copy's weights ("ema_0.9999", or "model" while that average
                    is_young()), and a function that returns whether the run is to stop.
    :param measures: functions, called on all ranks before each save but that of an interruption, with the network, a
                     function that returns a copy of it with the first average's weights, and a function that returns,
                     the same on all ranks, whether a signal has come. They return {key: value} for the log.
    :param loading_advice: logged once, if the steps wait for the data much of the time; "" for nothing.
    :param grad_clip: the norm of the gradient, over all parameters, that larger ones are scaled down to; 0 = none.
    :param lr_warmup_steps: number of steps in which the learning rate rises linearly; 0 = none.
    :param ema_warmup: after n steps the averages have the rate min(rate, (1 + n) / (10 + n)), so that they forget the
                       initial weights early.
    :raises InputError: if the checkpoint cannot be read or does not belong to this model.
    """

    # Here, since a subclass may have the original's __init__:
    max_steps, keep_checkpoints, flags = 0, 0, {}  # type: ignore[var-annotated]
    preview, measures, loading_advice = None, (), ""  # type: ignore[var-annotated]
    grad_clip, lr_warmup_steps, ema_warmup = 0.0, 0, False
    position = functools.cached_property(lambda self: Position())
    _statistics = functools.cached_property(lambda self: StepStatistics())
    _waiting = functools.cached_property(lambda self: Waiting())
    _overflows_in_a_row = 0
    _checkpoint = False  # to continue from; None for none, False before it is looked for
    _last_checkpoint = None  # path of the last good one
    _before_batch = None  # state of data and random numbers
    _computing = None  # within a step: whether it has changed nothing but gradients and random numbers
    _progress = None
    _signals = None  # StopSignals, within run_loop()
    _auto_microbatch, _measured_before = False, None  # the latter by the run that is resumed

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
        measures=(),
        loading_advice="",
        grad_clip=0.0,
        lr_warmup_steps=0,
        ema_warmup=False,
    ):
        self.model, self.diffusion, self.data = model, diffusion, data
        self.batch_size = batch_size
        self._auto_microbatch = microbatch == "auto"
        self.microbatch = batch_size if self._auto_microbatch or microbatch <= 0 else microbatch
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        rates = ema_rate.split(",") if isinstance(ema_rate, str) else np.atleast_1d(ema_rate)
        self.ema_rate = [float(rate) for rate in rates]
        self.log_interval, self.save_interval = log_interval, save_interval
        self.resume_checkpoint = resume_checkpoint
        self.use_fp16, self.fp16_scale_growth = use_fp16, fp16_scale_growth
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion)
        self.max_steps, self.keep_checkpoints = max_steps, keep_checkpoints
        self.flags, self.preview = dict(flags or {}), preview
        self.measures, self.loading_advice = tuple(measures), loading_advice
        self.grad_clip, self.lr_warmup_steps, self.ema_warmup = grad_clip, lr_warmup_steps, ema_warmup

        self.step = self.resume_step = 0
        self.global_batch = self.batch_size * dist_util.world_size()
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE
        self.sync_cuda = th.cuda.is_available()  # for client code
        self.master_params = self.model_params = list(self.model.parameters())
        checkpoint = self._find_checkpoint()
        resume.warn_of_other_checkpoints(checkpoint, get_blob_logdir())
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
            checkpoint.forget()
        else:
            self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]

        self.use_ddp = dist_util.world_size() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            devices = [dist_util.dev()] if dist_util.dev().type == "cuda" else None
            self.ddp_model = DDP(self.model, device_ids=devices, bucket_cap_mb=128)

    # Clients read and set both: steps of this loop, and those before it where a run of the original is resumed.
    step = property(lambda self: self.position.step, lambda self, step: self.position.move_to(step))
    resume_step = property(
        lambda self: self.position.resume_step, lambda self, step: setattr(self.position, "resume_step", step)
    )

    def last_step(self):
        """The step that the run ends at, None for no end."""
        return min((limit for limit in (self.lr_anneal_steps, self.max_steps) if limit), default=None)

    # ---------------------------------------------------------------- resuming: methods that forks override

    def _find_checkpoint(self):
        """The resume.Checkpoint that the run continues, found once; None for a new run."""
        if self._checkpoint is False:
            own = find_resume_checkpoint()  # by each rank, as in the original; what rank 0 finds counts
            path = dist_util.broadcast_from_rank_0(lambda: own) or self.resume_checkpoint
            self._checkpoint = resume.find_checkpoint(path, get_blob_logdir())
            self._last_checkpoint = self._checkpoint and self._checkpoint.path
            self.resume_checkpoint = self._last_checkpoint or ""
        return self._checkpoint

    def _load_and_sync_parameters(self):
        """Load the model's weights, and set resume_step if they are a run's."""
        if checkpoint := self._find_checkpoint():
            logger.log(f"loading model from checkpoint: {checkpoint.path}...")
            dist_util.broadcast_from_rank_0(lambda: load_weights(self.model, checkpoint.take(), checkpoint.path))
            if checkpoint.step is None:
                logger.log(f"{checkpoint.path} is not a model000000.pt: a new run starts from its weights")
            self.resume_step = checkpoint.step or 0
        dist_util.sync_params(self.model.parameters())

    def _load_ema_parameters(self, rate):
        """The averages of a rate from the checkpoint, else a copy of the parameters."""
        params = [p.detach() for p in copy.deepcopy(self.master_params)]
        to_master_params = self._state_dict_to_master_params
        own = type(self)._state_dict_to_master_params is TrainLoop._state_dict_to_master_params
        checkpoint = self._find_checkpoint()
        # a subclass may read files of other networks
        resume.load_average(checkpoint, rate, self.resume_step, params, self.model, to_master_params, strict=own)
        return params

    def _load_optimizer_state(self):
        """Continue with the checkpoint's moments, if it has some."""
        overflowing = self.use_fp16 and self.resume_step <= MAX_OVERFLOWS_IN_A_ROW  # perhaps at each step
        # an annealed learning rate changes at every step
        report = ["lr", "weight_decay"] if self._lr_is_constant() else ["weight_decay"]
        resume.load_optimizer(self.opt, self._find_checkpoint(), self.resume_step, overflowing, report)

    def _load_state(self, state):
        """Continue from a state file as if the run had not stopped."""
        self.step, self.resume_step = state["updates"], 0
        self.lg_loss_scale = state["lg_loss_scale"]
        self._overflows_in_a_row = state["overflows_in_a_row"]
        self._measured_before = state.get("flags", {}).get(MEASURED)
        unreported = {"resume_checkpoint", "seed", "weight_decay"}  # the last by the optimizer, as a constant lr
        unreported |= {"lr"} if self._lr_is_constant() else set()
        resume.log_changes(state.get("flags", {}), {k: v for k, v in self.flags.items() if k not in unreported})
        self._parts().load_state_dict(state, self.step)
        if self._checkpoint.is_in(get_blob_logdir()):  # drop the rows that will be written again
            finished = self.step >= (self.last_step() or math.inf)  # then the row of the closing checkpoint stays
            logger.get_current().drop_from("step", self._checkpoint.step + 1 if finished else self.step)

    def _parts(self):
        parts = dict(schedule_sampler=self.schedule_sampler, data=self.data, statistics=self._statistics)
        return resume.CheckpointIO(**parts, rng=resume.RNG)

    def _setup_fp16(self):
        self.master_params = make_master_params(self.model_params)
        self.model.convert_to_fp16()

    def _master_params_to_state_dict(self, master_params):
        """The network's state dict with these parameters, or averages, in float32."""
        if self.use_fp16:
            master_params = unflatten_master_params(self.model_params, master_params)
        values = dict(zip(self.model.parameters(), (p.detach() for p in master_params), strict=True))
        names = self.model.named_parameters(remove_duplicate=False)  # a tied parameter has several
        return {**self.model.state_dict(), **{name: values[p] for name, p in names}}

    def _state_dict_to_master_params(self, state_dict):
        """The inverse: parameters in the network's order, one flat vector in float16 training."""
        params = [state_dict[name] for name, _ in self.model.named_parameters()]
        return make_master_params(params) if self.use_fp16 else params

    # ---------------------------------------------------------------- the loop

    def run_loop(self):
        """
        Train until lr_anneal_steps or max_steps, without limit if neither is set. SIGTERM, SIGINT or SIGHUP on any rank
        ends the run after a step and a save. So does an error of the data.

        :raises SystemExit: (with status 0) after such a signal.
        :raises TrainingError: if the loss or the gradients are no longer finite, or another rank's data failed.
        """
        done, show = self.position.updates, dist_util.rank() == 0
        with (
            StopSignals(show_at_once if show else None) as stop,
            Progress("training", self.last_step(), "steps", None, done, show) as self._progress,
        ):
            self._signals = stop
            batch = self._next_batch(stop)
            if batch is not None and self._auto_microbatch:
                self._measure_microbatch(*batch)
            while batch is not None:
                self._try_step(*batch)
                self._finish_step()  # subclasses may override run_step() without calling this
                save_due = self.position.save_due(self.save_interval)
                measured = save_due and self._measure(stop)
                if self.step % self.log_interval == 0 or measured:
                    logger.dumpkvs()
                if save_due:
                    self._save()
                    if self.step > 0 and dist_util.any_rank(bool(os.environ.get("DIFFUSION_TRAINING_TEST"))):
                        return
                batch = self._next_batch(stop)
                self.step += 1
            if self.position.closing_save_due(self.save_interval):
                if self._measure(stop):
                    logger.logkv("step", self.position.label())
                    logger.logkv("samples", self.position.label() * self.global_batch)
                    logger.dumpkvs()
                self._save()

    def _measure(self, stop):
        """Give the logger what the measures return, or save if one fails. :return: whether there is anything."""

        def average():
            return copy_with(self.model, self._master_params_to_state_dict(self.ema_params[0]))

        def stopped():
            return dist_util.any_rank(stop.received is not None)

        values = {}
        try:
            for measure in self.measures:
                values.update(measure(self.model, average, stopped))
        except Exception:
            if dist_util.world_size() == 1:  # else others may wait within the measure
                self._save()
            raise
        if values:
            logger.get_current().pending = None  # losses are for the next row of the log
        for key, value in values.items():
            logger.logkv(key, value)
        return bool(values)

    def _measure_microbatch(self, batch, cond):
        """Set microbatch to what fits. A resumed run takes no more than before, and so draws the same noise."""
        before, of_batch = self._measured_before or (self.batch_size, self.batch_size)
        at_most = before if of_batch == self.batch_size else self.batch_size
        self.microbatch = largest_microbatch(self, batch, cond, at_most)
        self.flags[MEASURED] = [self.microbatch, self.batch_size]

    def _next_batch(self, stop):
        """
        The next batch, None after the last step. Between two steps, with one message, the ranks agree whether to
        continue: after a signal or a failure of the data on one of them, all save and leave.
        """
        self._before_batch = self._parts().local_state("data", "rng")
        batch = error = None
        if stop.received is None and self.position.updates < (self.last_step() or math.inf):
            with self._waiting.for_data():
                batch, error = try_next(self.data, stop)
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
        """Save what the last step left, and leave. All ranks call it."""
        self._parts().load_local_state(self._before_batch)
        stop_run(signal, error, self._save_news)

    def _save_news(self):
        if self.position.has_news():
            self._save()
        return f"at step {self.position.label()}: {self._last_checkpoint or 'nothing to save'}"

    def _save(self):
        self.save()  # which subclasses may override
        self.position.mark_saved()
        done, last = self.position.updates, self.last_step() or 0
        left = self._progress.left() if self._progress and 1 < done < last else ""  # the first step compiles
        if left:
            logger.log(f"{done:,} of {last:,} steps, {left} left")

    def run_step(self, batch, cond):
        """One step: `batch` is x_start [N, C, ...], `cond` the model's keyword arguments, tensors [N, ...]."""
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
        had = [] if self.use_fp16 else [p for p in self.model_params if p.grad is not None]
        for p in self.model_params:
            p.grad = None  # frees its memory
        device = dist_util.dev()
        batch = batch.to(device, non_blocking=True)
        cond = {
            k: v.to(device, non_blocking=True) if isinstance(v, th.Tensor) else v.to(device) for k, v in cond.items()
        }
        t, weights = self.schedule_sampler.sample(len(batch), device)

        passes = []
        for start in range(0, len(batch), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = part.stop >= len(batch)
            # all-reduce gradients once, after the last microbatch
            with contextlib.nullcontext() if last or not self.use_ddp else self.ddp_model.no_sync():
                kwargs = {k: v[part] for k, v in cond.items()}
                losses = self.diffusion.training_losses(self.ddp_model, batch[part], t[part], model_kwargs=kwargs)
                # a sum over the whole batch's size: a smaller last microbatch weighs less
                loss = (losses["loss"] * weights[part]).sum() / len(batch)
                (loss * 2**self.lg_loss_scale if self.use_fp16 else loss).backward()
            passes.append((part, per_sample(losses, weights[part])))

        for p in had:
            if p.grad is None:  # not used in this step: momentum and weight decay still move it, as in the original
                p.grad = th.zeros_like(p)
        self._computing = False
        if isinstance(self.schedule_sampler, LossAwareSampler):
            self.schedule_sampler.update_with_local_losses(t, th.cat([losses["loss"] for _, losses in passes]))
        for part, losses in passes:
            weighted = {k: v * weights[part] for k, v in losses.items()}
            self._statistics.add_losses(self.diffusion, t[part], weighted, share=len(t[part]) / len(t))
        logger.get_current().pending = self._statistics  # for clients that read or write rows by themselves

    def optimize_normal(self):
        """Update the parameters and their averages."""
        self._clip_gradient(self._log_grad_norm())
        self._anneal_lr()
        self.opt.step()
        self._update_ema()

    def optimize_fp16(self):
        """
        Update the float32 masters, their averages and the model; after an overflow, halve the loss scale instead.

        :raises TrainingError: after MAX_OVERFLOWS_IN_A_ROW overflows.
        """
        model_grads_to_master_grads(self.model_params, self.master_params)
        grad = self.master_params[0].grad
        if dist_util.any_rank(not grad.isfinite().all()):
            self._overflows_in_a_row += 1
            if self._overflows_in_a_row >= MAX_OVERFLOWS_IN_A_ROW:
                raise self._diverged(f"float16 gradients overflowed {MAX_OVERFLOWS_IN_A_ROW} times in a row")
            self.lg_loss_scale -= 1
            logger.log(f"Found NaN, decreased lg_loss_scale to {self.lg_loss_scale}")
            return
        self._overflows_in_a_row = 0
        grad.mul_(1.0 / 2**self.lg_loss_scale)
        self._clip_gradient(self._log_grad_norm())
        self._anneal_lr()
        self.opt.step()
        self._update_ema()
        master_params_to_model_params(self.model_params, self.master_params)
        self.lg_loss_scale += self.fp16_scale_growth

    def _clip_gradient(self, norm):
        if self.grad_clip:
            self._statistics.add("clipped", norm > self.grad_clip)
            th.nn.utils.clip_grads_with_norm_(self.master_params, self.grad_clip, norm)

    def _update_ema(self):
        n = self.position.label()
        for rate, params in zip(self.ema_rate, self.ema_params, strict=True):
            update_ema(params, self.master_params, rate=min(rate, (1 + n) / (10 + n)) if self.ema_warmup else rate)

    def _lr_is_constant(self):
        return not self.lr_anneal_steps and not self.lr_warmup_steps

    def _anneal_lr(self):
        if self._lr_is_constant():
            return
        step, lr = self.position.label(), self.lr
        if self.lr_warmup_steps:
            lr *= min(1, (step + 1) / self.lr_warmup_steps)
        if self.lr_anneal_steps:
            lr *= 1 - step / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = lr

    # ---------------------------------------------------------------- logging

    def _log_grad_norm(self):
        norm = th.nn.utils.get_total_norm([p.grad for p in self.master_params if p.grad is not None])
        self._statistics.add("grad_norm", norm)
        return norm

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
        counted = takes(logger.logkv_mean, "count")  # a fork's logger may not
        for key, (mean, count) in means.items():
            logger.logkv_mean(key, mean, **({"count": count} if counted else {}))
        if self._progress is not None and means:
            rate = self._progress.rate() * self.global_batch
            logger.logkv("images/s", rate)
            self._progress.show(**{name: means[name][0] for name in ("loss",) if name in means}, **{"images/s": rate})
        self._statistics, logger.get_current().pending = StepStatistics(), None
        if self.loading_advice and (share := self._waiting.is_much()):
            logger.log(f"{share:.0%} of the time the steps wait for data: {self.loading_advice}")
            self.loading_advice = ""

    def _check_finite(self, means):
        if self.use_fp16:
            return  # an overflow makes a loss infinite, and optimize_fp16() deals with it
        for key in ("loss", "grad_norm"):
            if key in means and not math.isfinite(means[key][0]):
                raise self._diverged(f"{key} is {means[key][0]}")

    def _diverged(self, what, bad=()):
        return self._statistics.diverged(what, self.position.label(), self._last_checkpoint, bad)

    # ---------------------------------------------------------------- saving

    def save(self):
        """
        Write the model, its averages, the optimizer and the run's state; all ranks call it, rank 0 writes.

        :raises TrainingError: instead of saving a model whose loss or gradients are not finite.
        """
        self._check_finite(self._statistics.read())
        norm = th.nn.utils.get_total_norm([p.detach() for p in self.master_params])
        if bad := dist_util.ranks_where(not norm.isfinite()):
            raise self._diverged("a parameter is not finite", bad)
        model = self._master_params_to_state_dict(self.master_params)
        averages = [self._master_params_to_state_dict(params) for params in self.ema_params]
        state = {
            "updates": self.position.updates,
            "lg_loss_scale": self.lg_loss_scale,
            "overflows_in_a_row": self._overflows_in_a_row,
            "moments": sum(map(bool, self.opt.state.values())),
            "flags": self.flags,
            **self._parts().state_dict(),
        }
        path = dist_util.broadcast_from_rank_0(self._write_checkpoint, model, averages, state)
        if self._progress is not None:
            self._progress.rate()  # from here on, without the time that saving took
        # overflows may be the network's, not the loss scale's
        if not self._overflows_in_a_row or self._last_checkpoint is None:
            self._last_checkpoint = path

    def _write_checkpoint(self, model, averages, state):
        logger.log("saving model...")
        directory, label = get_blob_logdir(), self.position.label()
        emas, optimizer = dict(zip(self.ema_rate, averages, strict=True)), self.opt.state_dict()
        path = checkpoints.save_set(directory, label, model=model, emas=emas, optimizer=optimizer, state=state)
        logger.log(f"saved {path} and its ema, opt and state")
        if label > 0 or self._checkpoint:  # the network is trained
            self._draw_preview(model, averages[0], label)
        if self.keep_checkpoints and not self._overflows_in_a_row:
            checkpoints.delete_old_sets(directory, label, self.keep_checkpoints)
        return path

    def draw_missing_preview(self):
        """Draw the preview of the checkpoint that the run continues, if it was killed before it drew it."""
        start, directory = self._checkpoint, get_blob_logdir()
        here = self.preview is not None and start and start.is_in(directory) and start.step > 0
        if here and self.preview.is_missing(directory, start.step):
            weights = map(self._master_params_to_state_dict, (self.master_params, self.ema_params[0]))
            self._draw_preview(*weights, start.step)

    def _draw_preview(self, model, average, step):
        if self.preview is not None:
            rate = self.ema_rate[0]
            newest = is_young(rate, self.position.updates, self.ema_warmup)
            name, weights = ("model", model) if newest else (f"ema_{rate}", average)
            self.preview(lambda: copy_with(self.model, weights), get_blob_logdir(), step, name, self._is_stopping)

    def _is_stopping(self):
        return self._signals is not None and self._signals.received is not None


def get_blob_logdir():
    """Where checkpoints go: DIFFUSION_BLOB_LOGDIR, else the log directory."""
    return checkpoint_url() or logger.get_dir()


def find_resume_checkpoint():
    """A model file to continue from, or None. Replace it where a restarted job's checkpoints are found otherwise."""
    return None
