"""
Gaussian diffusion: the forward process q, the learned reverse process p, and what is minimised.

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239) with the learned variances, hybrid
loss and cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672, "the paper" below).
The chains that draw samples are in sampling.py.

Conventions. Data is [N, C, ...] with any number of trailing axes, in [-1, 1]. Timesteps t
are integer tensors [N] in 0..T-1; t = 0 is the least noisy, so the paper's x_t is index
t - 1 here, and x_start is its x_0. Schedules are float64 numpy arrays of length T.
A model is called as model(x_t, t, **model_kwargs) and gives [N, C, ...], or [N, 2C, ...]
where it learns the variance too.
"""

import enum
import math

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .sampling import Sampling
from .schedules import (
    add_to,
    at_timesteps,
    betas_for_alpha_bar,  # noqa: F401 (part of this module, as in the original)
    get_named_beta_schedule,  # noqa: F401
    is_transformed,
)


class ModelMeanType(enum.Enum):
    """What the model's output stands for."""

    PREVIOUS_X = enum.auto()  # x_{t-1}, the posterior's mean
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t


class ModelVarType(enum.Enum):
    """
    The variance of p(x_{t-1} | x_t).

    LEARNED_RANGE lets the model interpolate, in the log domain, between the two
    fixed choices (the paper's equation 15).
    """

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()  # the posterior's variance
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """What training minimises."""

    MSE = enum.auto()  # simple loss, and the variational bound for a learned variance
    RESCALED_MSE = enum.auto()  # the same with the bound scaled by T / 1000 (lambda of the hybrid loss)
    KL = enum.auto()  # the variational bound's term at t
    RESCALED_KL = enum.auto()  # the same times T: an estimate of the whole bound

    def is_vb(self):
        """Whether this is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(Sampling):
    """
    Training and sampling for one noise schedule.

    Its tables (betas, alphas_cumprod, posterior_variance, ...) are float64 numpy arrays [T].
    They may be changed, whole or in place: the next step sees it.

    :param betas: [T] in (0, 1], the variance of each step.
    :param model_mean_type: a ModelMeanType.
    :param model_var_type: a ModelVarType.
    :param loss_type: a LossType.
    :param rescale_timesteps: give the model fractional timesteps in 0...1000 whatever T is.
    :raises ValueError: if betas is not a one-dimensional array in (0, 1].
    """

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

        self.betas = betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a one-dimensional array of values in (0, 1], not {betas}")
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), the paper's equations 10 to 12
        rest = 1.0 - self.alphas_cumprod
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / rest
        # the first step's posterior has variance 0: its logarithm borrows the second step's
        # variance, and beta where the chain has one step only
        first = self.posterior_variance[1] if self.num_timesteps > 1 else betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / rest
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / rest

        # the two ends of the learned range, and FIXED_LARGE, whose first step is the posterior's
        self._log_betas = np.log(betas)
        self._large_variance = np.append(first, betas[1:])
        self._large_log_variance = np.log(self._large_variance)

    # ---------------------------------------------------------------- q: data to noise

    def q_mean_variance(self, x_start, t):
        """
        Mean, variance and log-variance of q(x_t | x_0), the paper's equation 8.

        :return: three tensors of x_start's shape.
        """
        mean = _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = _extract_into_tensor(1.0 - self.alphas_cumprod, t, x_start.shape)
        log_variance = _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start, t, noise=None):
        """
        Draw x_t from q(x_t | x_0), the paper's equation 9.

        :param noise: standard normal, x_start's shape; drawn if None.
        :return: x_t, x_start's shape.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        tables = self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod
        signal_rate, noise_rate = at_timesteps(tables, t, x_start.dim())
        return add_to(signal_rate * x_start, noise_rate * noise)

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """
        Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), the paper's equations 10 to 12.

        The log-variance is clipped: see posterior_log_variance_clipped.

        :return: three tensors of x_t's shape.
        """
        coefs = self.posterior_mean_coef1, self.posterior_mean_coef2
        variances = self.posterior_variance, self.posterior_log_variance_clipped
        coef1, coef2, variance, log_variance = at_timesteps(coefs + variances, t, x_t.dim())
        return add_to(coef1 * x_start, coef2 * x_t), variance.expand(x_t.shape), log_variance.expand(x_t.shape)

    # ---------------------------------------------------------------- p: noise to data

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """
        The model's p(x_{t-1} | x_t), and the x_0 it implies.

        :param x: x_t, [N, C, ...].
        :param clip_denoised: clamp the implied x_0 to [-1, 1].
        :param denoised_fn: applied to the implied x_0, before clamping.
        :param model_kwargs: further keyword arguments of the model.
        :return: a dict of "mean", "variance", "log_variance" and "pred_xstart", all x's shape.
        :raises ValueError: if t or the model's output has the wrong shape.
        """
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must have shape {tuple(x.shape[:1])}, one timestep a sample, not {tuple(t.shape)}")
        output = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        output, variance, log_variance = self._p_variance(output, x, t)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=output)
        elif self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x_t=x, t=t, eps=output)
        else:
            pred_xstart = output
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _p_variance(self, output, x, t):
        """(what the model says of the mean, variance, log-variance), each of x's shape."""
        wanted = (x.shape[0], x.shape[1] * (2 if self._learns_variance() else 1), *x.shape[2:])
        if output.shape != wanted:
            raise ValueError(f"the model's output must have shape {wanted}, not {tuple(output.shape)}")
        if self.model_var_type == ModelVarType.FIXED_LARGE:
            tables = self._large_variance, self._large_log_variance
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            tables = self.posterior_variance, self.posterior_log_variance_clipped
        else:
            output, log_variance = output.chunk(2, dim=1)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                low, high = at_timesteps((self.posterior_log_variance_clipped, self._log_betas), t, x.dim())
                v = (log_variance + 1).div_(2)  # the output is in about [-1, 1]
                log_variance = add_to(v * high, (1 - v) * low)  # equation 15
            return output, th.exp(log_variance), log_variance
        return output, *(values.expand(x.shape) for values in at_timesteps(tables, t, x.dim()))

    def _learns_variance(self):
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        recip, recipm1 = self._reciprocals(t, x_t)
        return add_to(recip * x_t, recipm1 * eps, alpha=-1)

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # the posterior mean solved for x_0
        coef1, coef2 = at_timesteps((self.posterior_mean_coef1, self.posterior_mean_coef2), t, x_t.dim())
        return (xprev - coef2 * x_t).div_(coef1)

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        recip, recipm1 = self._reciprocals(t, x_t)
        return add_to(recip * x_t, pred_xstart, alpha=-1).div_(recipm1)

    def _reciprocals(self, t, x):
        return at_timesteps((self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod), t, x.dim())

    def _scale_timesteps(self, t):
        if self.rescale_timesteps:
            return t.float() * (1000.0 / self.num_timesteps)
        return t

    # ---------------------------------------------------------------- what is minimised

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """
        The loss of each sample at its timestep.

        :param x_start: [N, C, ...] in [-1, 1].
        :param t: [N] timesteps.
        :param noise: standard normal, x_start's shape; drawn if None.
        :return: a dict of tensors [N]: "loss", and its parts "mse" and "vb" where it has them.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)

        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=False, model_kwargs=model_kwargs)["output"]
            if self.loss_type == LossType.RESCALED_KL:
                loss = loss * self.num_timesteps
            return {"loss": loss}

        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        terms = {}
        if self._learns_variance():
            # L_vb teaches the variance only: the mean inside it is held fixed (the paper, section 3.1)
            mean_output, var_output = output.chunk(2, dim=1)
            frozen = th.cat([mean_output.detach(), var_output], dim=1)
            terms["vb"] = self._vb_terms_bpd(lambda *_, **__: frozen, x_start, x_t, t, clip_denoised=False)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
            output = mean_output

        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        if output.shape != target.shape:
            raise ValueError(f"the model's output must have shape {tuple(target.shape)}, not {tuple(output.shape)}")
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """
        The variational bound's term at t, in bits per dimension: KL(q || p), and at t = 0
        the decoder's negative log-likelihood (the paper's equations 4 to 7).

        :return: a dict of "output" [N] and "pred_xstart", x_t's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        nats, first = mean_flat(kl), t == 0
        # the decoder's term is most of the work, and few samples of a batch need it; to ask a GPU which is to wait
        if t.device.type != "cpu" or is_transformed():
            nats = th.where(first, _decoder_nll(x_start, out["mean"], out["log_variance"]), nats)
        elif first.any():
            decoder_nll = _decoder_nll(x_start[first], out["mean"][first], out["log_variance"][first])
            nats = nats.index_put((first,), decoder_nll)
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]: what no model can change."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=th.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None, noise_fn=th.randn_like):
        """
        The whole variational bound on -log2 p(x_0), and related terms, one noise draw a timestep.

        :param x_start: [N, C, ...] in [-1, 1].
        :param noise_fn: as of p_sample().
        :return: a dict of "total_bpd" [N], "prior_bpd" [N], "vb" [N, T] (bits per dimension of each
                 term), "xstart_mse" [N, T] and "mse" [N, T] (squared errors of the implied x_0 and
                 noise). The first column belongs to the noisiest timestep, T - 1, the last to 0.
        """
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = th.full((x_start.shape[0],), i, device=x_start.device, dtype=th.long)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with th.no_grad():
                out = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))

        vb, xstart_mse, mse = (th.stack(terms, dim=1) for terms in (vb, xstart_mse, mse))
        prior_bpd = self._prior_bpd(x_start)
        return {
            "total_bpd": vb.sum(dim=1) + prior_bpd,
            "prior_bpd": prior_bpd,
            "vb": vb,
            "xstart_mse": xstart_mse,
            "mse": mse,
        }


def _decoder_nll(x_start, means, log_variance):
    """-log p(x_0 | x_1) in nats per dimension, [N]."""
    return mean_flat(-discretized_gaussian_log_likelihood(x_start, means=means, log_scales=0.5 * log_variance))


def _extract_into_tensor(arr, timesteps, broadcast_shape):
    """
    The entries of any array [T] at the timesteps, as float32, for code that was written for the original.

    :return: tensor of broadcast_shape (N, ...), a view that repeats one value a sample.
    """
    values = th.tensor(arr, device=timesteps.device)[timesteps].float()
    return values.view(-1, *[1] * (len(broadcast_shape) - 1)).expand(broadcast_shape)
