"""Which timesteps to train on: uniform, or importance-sampled by their losses (arXiv 2102.09672, section 3.3)."""

from abc import ABC, abstractmethod

import numpy as np
import torch as th
import torch.distributed as dist  # noqa: F401 (the original offers it by star import)

from . import dist_util


def create_named_schedule_sampler(name: str, diffusion) -> "ScheduleSampler":
    """
    :param name: "uniform" or "loss-second-moment".
    :param diffusion: its num_timesteps is used.
    :raises NotImplementedError: for another name.
    """
    if name == "uniform":
        return UniformSampler(diffusion)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(diffusion)
    raise NotImplementedError(f"unknown schedule sampler {name!r}: choose uniform or loss-second-moment")


class ScheduleSampler(ABC):
    """
    A distribution over timesteps. Importance weights keep the expected loss that of uniform timesteps.

    A subclass defines weights().
    """

    @abstractmethod
    def weights(self) -> np.ndarray:
        """Positive weights [T], proportional to the probabilities."""

    def sample(self, batch_size: int, device: th.device) -> tuple[th.Tensor, th.Tensor]:
        """
        Draw timesteps from numpy's global generator.

        :return: timesteps, int64 [batch_size], and importance weights 1 / (T p(t)), float32 [batch_size].
        """
        w = self.weights()
        p = w / np.sum(w)
        indices = np.random.choice(len(p), size=(batch_size,), p=p)
        importance = 1 / (len(p) * p[indices])
        return _to_device(indices, th.long, device), _to_device(importance, th.float32, device)

    def state_dict(self) -> dict:
        """Tensors and plain values for load_state_dict()."""
        return {}

    def load_state_dict(self, state: dict) -> None:  # noqa: B027 (not every sampler has a state)
        """Restore the result of state_dict()."""


def _to_device(array, dtype, device):
    pinned = th.device(device).type == "cuda"  # else the copy would synchronise
    return th.tensor(array, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


class UniformSampler(ScheduleSampler):
    """All timesteps are equally likely."""

    def __init__(self, diffusion):
        self.diffusion = diffusion
        self._weights = np.ones([diffusion.num_timesteps])

    def weights(self) -> np.ndarray:
        return self._weights


class LossAwareSampler(ScheduleSampler):
    """A sampler that adapts to the losses of the model."""

    def update_with_local_losses(self, local_ts: th.Tensor, local_losses: th.Tensor) -> None:
        """
        Gather the losses of all ranks and update with them. A collective: all ranks keep the same weights.

        :param local_ts: timesteps [N]; N may differ between ranks.
        :param local_losses: unweighted losses [N].
        """
        ts, losses = dist_util.all_gather(local_ts), dist_util.all_gather(local_losses)
        self.update_with_all_losses(ts.tolist(), losses.tolist())

    @abstractmethod
    def update_with_all_losses(self, ts: list[int], losses: list[float]) -> None:
        """Update with the losses of all ranks, losses[i] at timestep ts[i]. Same arguments on every rank."""


class LossSecondMomentResampler(LossAwareSampler):
    """
    p(t) proportional to sqrt(E[L_t^2]) over the latest losses of each timestep (equation 18). Uniform until every
    timestep has a full history.

    :param history_per_term: number of losses kept per timestep.
    :param uniform_prob: weight of the uniform distribution that is mixed in.
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
                continue  # a float16 overflow tells nothing about the timestep and would stay in the weights
            if self._loss_counts[t] == self.history_per_term:
                self._loss_history[t, :-1] = self._loss_history[t, 1:]  # drop the oldest
                self._loss_history[t, -1] = loss
            else:
                self._loss_history[t, self._loss_counts[t]] = loss
                self._loss_counts[t] += 1

    def _warmed_up(self):
        return (self._loss_counts == self.history_per_term).all()

    def state_dict(self) -> dict:
        return {"loss_history": th.tensor(self._loss_history), "loss_counts": th.tensor(self._loss_counts)}

    def load_state_dict(self, state: dict) -> None:
        """:raises ValueError: if the state has another number of timesteps or another history length."""
        history, counts = state["loss_history"].numpy(), state["loss_counts"].numpy()
        if history.shape != self._loss_history.shape:
            own = f"this sampler's has {self._loss_history.shape}"
            raise ValueError(f"the saved loss history has shape {history.shape} (timesteps, losses of each), {own}")
        self._loss_history, self._loss_counts = history.copy(), counts.copy()
