"""Which timesteps to train on: uniformly, or by the size of their losses (the paper, section 3.3)."""

from abc import ABC, abstractmethod

import numpy as np
import torch as th
import torch.distributed as dist  # noqa: F401 (part of this module, as in the original)

from . import dist_util


def create_named_schedule_sampler(name: str, diffusion) -> "ScheduleSampler":
    """
    :param name: "uniform" or "loss-second-moment".
    :return: a ScheduleSampler for the diffusion's timesteps.
    :raises NotImplementedError: for another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"unknown schedule sampler {name!r}: there are uniform and loss-second-moment")


class ScheduleSampler(ABC):
    """
    A distribution over timesteps that keeps the expected loss what it is under the uniform one.

    A subclass says how likely each step is; sample() gives the importance weights that undo it.
    """

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights, numpy array [T]; they need not sum to one."""

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw timesteps by numpy's global generator.

        :return: (timesteps int64 [batch_size], weights float32 [batch_size]) on the device.
        """
        w = self.weights()
        p = w / np.sum(w)
        indices = np.random.choice(len(p), size=(batch_size,), p=p)
        importance = 1 / (len(p) * p[indices])
        return _to_device(indices, th.long, device), _to_device(importance, th.float32, device)

    def state_dict(self) -> dict:
        """What the sampler has learned, for load_state_dict(); tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027 (not every sampler has a state)
        """Continue from what state_dict() gave."""


def _to_device(array, dtype, device):
    pinned = th.device(device).type == "cuda"  # so that the copy does not make the host wait
    return th.tensor(array, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


class UniformSampler(ScheduleSampler):
    """Every timestep alike."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that learns from the losses it leads to."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """
        Take in this rank's losses; every rank calls it at the same time, so that all of
        them keep the same weights.

        :param local_ts: timesteps [N], N may differ between ranks.
        :param local_losses: the unweighted loss at each, [N].
        """
        ts = dist_util.all_gather(local_ts)
        losses = dist_util.all_gather(local_losses)
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """
        Take in the losses of all ranks.

        :param ts: list of timesteps.
        :param losses: list of floats, the loss at each.
        """


class LossSecondMomentResampler(LossAwareSampler):
    """
    p(t) proportional to sqrt(E[L_t^2]), over each timestep's latest losses (the paper, equation 18).
    Uniform until every timestep has a full history.

    :param history_per_term: how many losses a timestep remembers.
    :param uniform_prob: share of the probability that stays uniform.
    """

    def __init__(self, diffusion, history_per_term: int = 10, uniform_prob: float = 0.001):
        self.diffusion = diffusion
        self.history_per_term = history_per_term
        self.uniform_prob = uniform_prob
        self._loss_history = np.zeros([diffusion.num_timesteps, history_per_term], dtype=np.float64)
        self._loss_counts = np.zeros([diffusion.num_timesteps], dtype=np.int64)

    def weights(self) -> np.ndarray:
        if not self._warmed_up():
            return np.ones([self.diffusion.num_timesteps], dtype=np.float64)
        w = np.sqrt(np.mean(self._loss_history**2, axis=-1))
        w /= np.sum(w)
        return w * (1 - self.uniform_prob) + self.uniform_prob / len(w)

    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        for t, loss in zip(ts, losses, strict=True):
            if not np.isfinite(loss):
                continue  # a float16 overflow says nothing of the timestep, and would stay in the weights
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]  # forget the oldest
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self):
        return (self._loss_counts == self.history_per_term).all()

    def state_dict(self) -> dict:
        return {
            "loss_history": th.from_numpy(self._loss_history.copy()),
            "loss_counts": th.from_numpy(self._loss_counts.copy()),
        }

    def load_state_dict(self, state: dict) -> None:
        """
        :raises ValueError: if the state is of another number of timesteps or another history length.
        """
        history, counts = state["loss_history"].numpy(), state["loss_counts"].numpy()
        if history.shape != self._loss_history.shape:
            raise ValueError(
                f"the saved loss history is of {history.shape[0]} timesteps with {history.shape[1]} losses each, "
                f"this sampler's of {self._loss_history.shape[0]} with {self._loss_history.shape[1]}"
            )
        self._loss_history, self._loss_counts = history.copy(), counts.copy()
