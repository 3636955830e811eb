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

import torch as th
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
    find_ema_checkpoint,  # noqa: F401 (part of this module, as in the original)
    is_in,
    is_of_a_run,
    parse_resume_step_from_filename,
    save_set,
)
from .training.resume import Resumable, find_checkpoint, load_model, warn_of_other_checkpoints
from .training.signals import StopSignals
from .training.statistics import StepStatistics, log_loss_dict  # noqa: F401 (the second is part of this module)
from .training.stopping import Stoppable
from .utils.errors import TrainingError
from .utils.progress import Progress

# In float16 the loss is multiplied by 2^lg_loss_scale, lest small gradients vanish. The scale grows
# slowly, is halved whenever a gradient overflows, and begins high enough to find its place quickly.
INITIAL_LOG_LOSS_SCALE = 20.0
# So many overflows in a row no scale explains: the network itself yields NaN.
MAX_OVERFLOWS_IN_A_ROW = 20


class TrainLoop(Resumable, Stoppable):
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
                              run goes on as if it had not stopped; without, as the original would.
                              "auto" is the newest complete one of get_blob_logdir(), if there is any.
    :param use_fp16: compute the network's torso in float16, with a dynamic loss scale.
    :param fp16_scale_growth: growth of the loss scale's log2 a step.
    :param schedule_sampler: which timesteps to train on; uniform if None.
    :param weight_decay: of AdamW.
    :param lr_anneal_steps: stop after this many steps, 0 for never.
    :param max_steps: the same without touching the learning rate.
    :param keep_checkpoints: so many of the newest checkpoints are kept; 0 for all.
    :param flags: plain values that describe the run, a dict, kept in the state file. A resumed run
                  logs which of them have changed.
    :param preview: called on rank 0 after each save, with a function that gives a copy of the network with the first
                    average's weights, the folder, and the step of the save.
    :raises InputError: if the checkpoint cannot be read or does not belong to this model.
    """

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

        # Steps are counted from resume_step where a run of the original is resumed, which is also how it
        # counted. With a state file, step itself goes on, and resume_step stays 0.
        self.step = 0
        self.resume_step = 0
        self.global_batch = self.batch_size * dist_util.world_size()
        self.lg_loss_scale = INITIAL_LOG_LOSS_SCALE
        self._updates = 0  # steps done since the run's very beginning
        self._saved = None  # of the last checkpoint: the number in its name, and the updates it follows
        self._last_checkpoint = None
        self._overflows_in_a_row = 0
        self._statistics = StepStatistics()
        self._progress = None

        self.model_params = list(self.model.parameters())
        self.master_params = self.model_params
        found = find_resume_checkpoint()  # by each rank, as in the original; what rank 0 finds counts
        main_checkpoint = dist_util.from_rank_0(lambda: found) or find_checkpoint(resume_checkpoint, get_blob_logdir())
        warn_of_other_checkpoints(main_checkpoint, get_blob_logdir())
        if main_checkpoint:
            load_model(self.model, main_checkpoint)
            self.resume_step = parse_resume_step_from_filename(main_checkpoint)
        dist_util.sync_params(self.model_params)
        if self.use_fp16:
            self._setup_fp16()
        self.opt = AdamW(self.master_params, lr=self.lr, weight_decay=self.weight_decay, fused=True)
        self.opt.register_step_pre_hook(match_gradients)
        self.ema_params = [copy.deepcopy(self.master_params) for _ in self.ema_rate]
        if main_checkpoint:
            self._resume(main_checkpoint, get_blob_logdir())

        self.use_ddp = dist_util.world_size() > 1
        self.ddp_model = self.model
        if self.use_ddp:
            self.ddp_model = DDP(
                self.model,
                device_ids=[dist_util.dev()] if dist_util.dev().type == "cuda" else None,
                bucket_cap_mb=128,
            )

    def _setup_fp16(self):
        self.master_params = make_master_params(self.model_params)
        self.model.convert_to_fp16()

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
            Progress(
                "training", self._last_step, "steps", None, done=self._total_step, show=dist_util.rank() == 0
            ) as self._progress,
        ):
            batch = self._next_batch(self._total_step, stop)
            while batch is not None:
                self._run_step(*batch)
                self._step_done()  # again, for a run_step() of one's own
                if self.step % self.log_interval == 0:
                    logger.dumpkvs()
                if self.step % self.save_interval == 0 and not self._is_resumed_from_here():
                    self._save_once()
                    if self.step > 0 and dist_util.any_rank(bool(os.environ.get("DIFFUSION_TRAINING_TEST"))):
                        return
                batch = self._next_batch(self._total_step + 1, stop)
                self.step += 1
            last_was_regular = (self.step - 1) % self.save_interval == 0
            if not last_was_regular or self._saved != (self._total_step - 1, self._updates):
                self._save_once()

    @property
    def _total_step(self):
        """Steps before this one since the run's very beginning; a checkpoint written now has it in its name."""
        return self.step + self.resume_step

    def _save_once(self):
        """save(), unless it would write what was written last, or resumed from."""
        if self._saved != (self._total_step, self._updates):
            self.save()
            self._saved = self._total_step, self._updates

    @property
    def _last_step(self):
        return min((limit for limit in (self.lr_anneal_steps, self.max_steps) if limit), default=None)

    def _ends_before(self, step):
        return self._last_step is not None and step >= self._last_step

    def next_save(self):
        """The step of the next checkpoint, if nothing stops the run before."""
        waits = -self.step % self.save_interval or self.save_interval * self._is_resumed_from_here()
        return max(self._total_step, min(self._total_step + waits, self._last_step or math.inf))

    def _is_resumed_from_here(self):
        """Whether a save now would overwrite the checkpoint of the original that this run came from."""
        return self.step == 0 and self.resume_step > 0

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
        self._step_done()
        self.log_step()

    def _step_done(self):
        """Count the step, and give the logger what is due; a second time changes nothing."""
        self._updates = self._total_step + 1
        if self._progress is not None:
            self._progress.reach(self._updates)
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
        frac_done = self._total_step / self.lr_anneal_steps
        for group in self.opt.param_groups:
            group["lr"] = self.lr * (1 - frac_done)

    # ---------------------------------------------------------------- logging

    def _log_grad_norm(self):
        grads = [p.grad for p in self.master_params if p.grad is not None]
        self._statistics.add("grad_norm", th.nn.utils.get_total_norm(grads))

    def log_step(self):
        """Log how far the run is."""
        logger.logkv("step", self._total_step)
        logger.logkv("samples", (self._total_step + 1) * self.global_batch)
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
            f"{what} at step {self._total_step} on rank {', '.join(map(str, bad))}; "
            f"the last good checkpoint is {self._last_checkpoint or 'none'}. A lower lr helps, or a look at the data"
        )

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
        path = dist_util.from_rank_0(self._write_checkpoint, self._total_step, self._state())
        if self._progress is not None:
            self._progress.rate()  # from here on, without the time that saving took
        # overflows may be the network's, not the loss scale's
        if not self._overflows_in_a_row or self._last_checkpoint is None:
            self._last_checkpoint = path

    def _write_checkpoint(self, label, state):
        logger.log("saving model...")
        emas = {rate: self._state_dict_of(params) for rate, params in zip(self.ema_rate, self.ema_params, strict=True)}
        path = save_set(
            get_blob_logdir(),
            label,
            model=self._state_dict_of(self.master_params),
            emas=emas,
            optimizer=self.opt.state_dict(),
            state=state,
        )
        logger.log(f"saved {path} and its ema, opt and state")
        if self.preview is not None:
            self.preview(lambda: self._copy_with(emas[self.ema_rate[0]]), get_blob_logdir(), label)
        if self.keep_checkpoints and not self._overflows_in_a_row:
            delete_old_sets(get_blob_logdir(), label, self.keep_checkpoints)
        return path

    def draw_missing_preview(self):
        """Draw the preview of the checkpoint that the run resumes from, if a kill came before it was drawn."""
        path, directory = self._last_checkpoint, get_blob_logdir()
        if self.preview is None or not path or not is_of_a_run(path) or not is_in(path, directory):
            return
        step = parse_resume_step_from_filename(path)
        if self.preview.is_missing(directory, step):
            average = self._state_dict_of(self.ema_params[0])
            self.preview(lambda: self._copy_with(average), directory, step)

    def _copy_with(self, state_dict):
        model = copy.deepcopy(self.model).eval()
        model.load_state_dict(state_dict)
        return model

    def _state_dict_of(self, master_params):
        if self.use_fp16:
            master_params = unflatten_master_params(self.model_params, master_params)
        names = [name for name, _ in self.model.named_parameters()]
        return {**self.model.state_dict(), **dict(zip(names, (p.detach() for p in master_params), strict=True))}


def get_blob_logdir():
    """Where checkpoints go: DIFFUSION_BLOB_LOGDIR, else the log directory."""
    return os.environ.get("DIFFUSION_BLOB_LOGDIR") or logger.get_dir()


def find_resume_checkpoint():
    """
    A model file to continue from, found by means of one's own; None for none. To be replaced on
    infrastructure that looks for a restarted job's checkpoints by itself.
    """
    return None
