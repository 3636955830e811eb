"""
Gaussian diffusion: the reverse process p, training losses, and the variational bound; q is forward_process.py's.

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239) with the learned variances and the hybrid loss of
Nichol & Dhariwal 2021 (arXiv 2102.09672, "the paper" below). samplers.py has the samplers as functions.

Conventions of data, timesteps and tables are forward_process.py's. A model is called as model(x_t, t, **model_kwargs)
and returns [N, C, ...], or [N, 2C, ...] if it learns the variance.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th

from .forward_process import ForwardProcess, at, check_shape
from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .schedules import (  # noqa: F401 (the original defines them here)
    _extract_into_tensor,
    betas_for_alpha_bar,
    get_named_beta_schedule,
)
from .utils.errors import InputError

Model = Callable[..., th.Tensor]
Fn = Callable[[th.Tensor], th.Tensor]


class ModelMeanType(enum.Enum):
    """What the model predicts."""

    PREVIOUS_X = enum.auto()  # the mean of x_{t-1}
    START_X = enum.auto()  # x_0
    EPSILON = enum.auto()  # the noise in x_t
    VELOCITY = enum.auto()  # sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans & Ho 2022, arXiv 2202.00512, section 4)


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t)."""

    LEARNED = enum.auto()  # the model predicts its logarithm
    FIXED_SMALL = enum.auto()  # the posterior's variance
    FIXED_LARGE = enum.auto()  # beta
    LEARNED_RANGE = enum.auto()  # the model interpolates between the two, in the log domain (equation 15)


class LossType(enum.Enum):
    """The training objective."""

    MSE = enum.auto()  # L_simple, plus L_vlb if the variance is learned
    RESCALED_MSE = enum.auto()  # the same, L_vlb weighted by T / 1000 (lambda in equation 16)
    KL = enum.auto()  # the term of L_vlb at t
    RESCALED_KL = enum.auto()  # the same times T: an unbiased estimate of L_vlb

    def is_vb(self) -> bool:
        """Whether this is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(ForwardProcess):
    """
    Training and sampling for one noise schedule.

    :param betas: [T] in (0, 1], the variance of each step, see ForwardProcess.
    :param rescale_timesteps: pass timesteps to the model as floats in 0..1000, whatever T is.
    :param min_snr_gamma: weigh the squared error of x_0 by min(SNR, gamma), SNR = abar / (1 - abar), and that of other
                          predictions by the equivalent (Hang et al. 2023, arXiv 2303.09556). None for weights of 1.
    :raises ValueError: if betas is not a one-dimensional array in (0, 1]; InputError (a ValueError) if min_snr_gamma is
                        not above 0, or given for a bound.
    """

    min_snr_gamma: float | None = None  # objects pickled with the original have none

    def __init__(
        self, *, betas: np.ndarray, model_mean_type: ModelMeanType, model_var_type: ModelVarType, loss_type: LossType,
        rescale_timesteps: bool = False, min_snr_gamma: float | None = None,
    ):  # fmt: skip
        if min_snr_gamma is not None and loss_type.is_vb():
            raise InputError(f"min_snr_gamma {min_snr_gamma}: weighs the squared error, but the loss is {loss_type}")
        if min_snr_gamma is not None and not min_snr_gamma > 0:
            raise InputError(f"min_snr_gamma {min_snr_gamma}: give more than 0")
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        self.min_snr_gamma = min_snr_gamma

        super().__init__(betas)

    # ---------------------------------------------------------------- p, the reverse process

    def p_mean_variance(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        p(x_{t-1} | x_t) and the predicted x_0.

        :param x: x_t, [N, C, ...].
        :param t: [N].
        :param clip_denoised: clamp the predicted x_0 to [-1, 1].
        :param denoised_fn: applied to the predicted x_0 before it is clamped.
        :param model_kwargs: keyword arguments for the model.
        :return: "mean", "variance", "log_variance" and "pred_xstart", each of x's shape.
        :raises ValueError: if t, the model's output or denoised_fn's has the wrong shape.
        :raises TypeError: if the model does not return a tensor.
        """
        check_shape("t", t, x.shape[:1])
        output = self._call_model(model, x, t, model_kwargs)

        if self.model_var_type == ModelVarType.FIXED_LARGE:
            variance = at(self._large_variance, t, x.shape)
            log_variance = at(self._large_log_variance, t, x.shape)
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            variance = at(self.posterior_variance, t, x.shape)
            log_variance = at(self.posterior_log_variance_clipped, t, x.shape)
        else:
            output, log_variance = output.chunk(2, dim=1)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                min_log = at(self.posterior_log_variance_clipped, t, x.shape)
                max_log = at(self._log_betas, t, x.shape)
                v = (log_variance + 1) / 2  # from [-1, 1], about where outputs lie
                log_variance = v * max_log + (1 - v) * min_log  # equation 15
            variance = th.exp(log_variance)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            pred_xstart = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=output)
        elif self.model_mean_type == ModelMeanType.EPSILON:
            pred_xstart = self._predict_xstart_from_eps(x_t=x, t=t, eps=output)
        elif self.model_mean_type == ModelMeanType.VELOCITY:
            pred_xstart = self._predict_xstart_from_velocity(x_t=x, t=t, velocity=output)
        else:
            pred_xstart = output
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        check_shape("the predicted x_0", pred_xstart, x.shape)

        mean = output
        if self.model_mean_type != ModelMeanType.PREVIOUS_X:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _call_model(self, model, x_t, t, model_kwargs):
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        n, channels, *rest = x_t.shape
        shape = (n, channels * (2 if self._learns_variance() else 1), *rest)
        if not isinstance(output, th.Tensor):
            raise TypeError(f"the model must return a tensor of shape {shape}, not {type(output).__name__}")
        check_shape("the model's output", output, shape)
        return output

    def _learns_variance(self):
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        check_shape("eps", eps, x_t.shape)
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return scaled - at(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * eps

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        check_shape("xprev", xprev, x_t.shape)
        coef1, coef2 = at(self.posterior_mean_coef1, t, x_t.shape), at(self.posterior_mean_coef2, t, x_t.shape)
        return (xprev - coef2 * x_t) / coef1  # equation 11 solved for x_0

    def _predict_xstart_from_velocity(self, x_t, t, velocity):
        check_shape("the velocity", velocity, x_t.shape)
        # no division by sqrt(abar): at the noisiest timesteps an error of the velocity does not grow
        signal = at(self.sqrt_alphas_cumprod, t, x_t.shape) * x_t
        return signal - at(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape) * velocity

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        if self.model_mean_type == ModelMeanType.VELOCITY:  # equation 9 solved for eps, also where abar is 0
            noise = x_t - at(self.sqrt_alphas_cumprod, t, x_t.shape) * pred_xstart
            return noise / at(self.sqrt_one_minus_alphas_cumprod, t, x_t.shape)
        scaled = at(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
        return (scaled - pred_xstart) / at(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def _scale_timesteps(self, t):
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # ---------------------------------------------------------------- sampling

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One ancestral step: draw x_{t-1} from p(x_{t-1} | x_t). Parameters as in p_mean_variance().

        :param noise_fn: returns standard normal noise of its argument's shape, dtype and device.
        :return: "sample" and "pred_xstart", each of x's shape.
        """
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        out = self.p_mean_variance(model, x, t, **kwargs)
        noise = noise_fn(x)
        sample = out["mean"] + _unless_first(t, x) * th.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0, noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One DDIM step from x_t to x_{t-1} (Song et al. 2020, arXiv 2010.02502, equations 12 and 16).

        :param eta: 0 is deterministic, 1 has the noise of the ancestral step.
        :param noise_fn: as in p_sample(). Called for eta = 0 too: the original draws there.
        :return: "sample" and "pred_xstart", each of x's shape.
        """
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        out = self.p_mean_variance(model, x, t, **kwargs)
        # derived from pred_xstart, since clamping changes the direction too
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar = at(self.alphas_cumprod, t, x.shape)
        alpha_bar_prev = at(self.alphas_cumprod_prev, t, x.shape)
        sigma = eta * th.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * th.sqrt(1 - alpha_bar / alpha_bar_prev)
        noise = noise_fn(x)
        square = 1 - alpha_bar_prev - sigma**2
        if eta <= 1:
            square = square.clamp(min=0)  # rounding may be below
        mean = out["pred_xstart"] * th.sqrt(alpha_bar_prev) + th.sqrt(square) * eps
        return {"sample": mean + _unless_first(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One step of the DDIM ODE towards noise, from x_t to x_{t+1}: encodes data.

        :param eta: must be 0: only the deterministic chain is invertible.
        :return: "sample" and "pred_xstart", each of x's shape.
        :raises ValueError: if eta is not 0.
        """
        if eta != 0.0:
            raise ValueError(f"eta={eta}: only the deterministic chain, eta=0, is invertible")
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        out = self.p_mean_variance(model, x, t, **kwargs)
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = at(self.alphas_cumprod_next, t, x.shape)
        sample = out["pred_xstart"] * th.sqrt(alpha_bar_next) + th.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, noise_fn: Fn | None = None,
    ) -> th.Tensor:  # fmt: skip
        """
        Sample with the whole ancestral chain.

        :param shape: (N, C, ...) of the samples.
        :param noise: x_T; standard normal if None.
        :param device: of the samples; the model's if None.
        :param progress: show a tqdm bar.
        :param noise_fn: draws all noise, as in p_sample(); th.randn_like if None.
        :return: tensor of `shape`.
        """
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        kwargs |= dict(noise=noise, device=device, progress=progress, **if_given(noise_fn=noise_fn))
        return _last_sample(self.p_sample_loop_progressive(model, shape, **kwargs))

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, noise_fn: Fn | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """Yield the result of p_sample() at each step of p_sample_loop(), t = T - 1 first."""
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        return self._sample_loop(self.p_sample, model, shape, noise, device, progress, noise_fn, kwargs)

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, eta: float = 0.0, noise_fn: Fn | None = None,
    ) -> th.Tensor:  # fmt: skip
        """Sample with the whole DDIM chain. Parameters as in p_sample_loop() and ddim_sample()."""
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        kwargs |= dict(noise=noise, device=device, progress=progress, eta=eta, **if_given(noise_fn=noise_fn))
        return _last_sample(self.ddim_sample_loop_progressive(model, shape, **kwargs))

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, eta: float = 0.0, noise_fn: Fn | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """Yield the result of ddim_sample() at each step of ddim_sample_loop(), t = T - 1 first."""
        kwargs: dict = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs, eta=eta)
        return self._sample_loop(self.ddim_sample, model, shape, noise, device, progress, noise_fn, kwargs)

    def _sample_loop(self, step, model, shape, noise, device, progress, noise_fn, step_kwargs):
        if device is None:  # the model's, else the noise's, else torch's default
            parameter = next(iter(getattr(model, "parameters", list)()), noise)
            device = th.get_default_device() if parameter is None else parameter.device
        x = (noise_fn or th.randn_like)(th.empty(*shape, device=device)) if noise is None else noise
        indices = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices, desc="sampling", unit="step")
        for i in indices:
            t = th.full((shape[0],), i, device=device, dtype=th.long)
            # not inference_mode: models may take gradients for guidance, callers may train on the samples
            with th.no_grad():
                out = step(model, x, t, **step_kwargs, **if_given(noise_fn=noise_fn))
            yield out
            x = out["sample"]

    # ---------------------------------------------------------------- losses and the bound

    def training_losses(
        self, model: Model, x_start: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        The loss of each sample at its timestep: L_simple, L_hybrid (equation 16) or L_vlb.

        :param x_start: [N, C, ...] in [-1, 1].
        :param t: [N].
        :param noise: standard normal, x_start's shape; drawn if None.
        :return: tensors [N]: "loss", and its terms "mse" and "vb" (bits per dimension) if it has them. min_snr_gamma
                 weighs the squared error in "loss" alone.
        :raises ValueError: if the noise or the model's output has the wrong shape, or t with min_snr_gamma.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)

        inputs: dict = dict(x_start=x_start, x_t=x_t, t=t, clip_denoised=False)
        if self.loss_type.is_vb():
            vb = self._vb_terms_bpd(model=model, model_kwargs=model_kwargs, **inputs)["output"]
            return {"loss": vb * self.num_timesteps if self.loss_type == LossType.RESCALED_KL else vb}

        output = self._call_model(model, x_t, t, model_kwargs)
        terms = {}
        if self._learns_variance():
            # L_vlb trains the variance only: no gradient through the mean (section 3.1)
            output, var_output = output.chunk(2, dim=1)
            frozen = th.cat([output.detach(), var_output], dim=1)
            terms["vb"] = self._vb_terms_bpd(model=lambda *_, **__: frozen, **inputs)["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)

        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        elif self.model_mean_type == ModelMeanType.VELOCITY:
            target = at(self.sqrt_alphas_cumprod, t, x_start.shape) * noise
            target = target - at(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * x_start
        else:
            target, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        loss = terms["mse"] = mean_flat((target - output) ** 2)
        if self.min_snr_gamma is not None:
            check_shape("t", t, loss.shape)
            loss = self._min_snr_weight(t) * loss
        terms["loss"] = loss + terms["vb"] if "vb" in terms else loss  # equation 16
        return terms

    def _min_snr_weight(self, t):
        """The weight of the squared error of a prediction at t [N]: min(SNR, gamma) (d x_0 / d prediction)^2."""
        snr = (at(self.sqrt_alphas_cumprod, t, t.shape) / at(self.sqrt_one_minus_alphas_cumprod, t, t.shape)) ** 2
        if self.model_mean_type == ModelMeanType.EPSILON:
            return (self.min_snr_gamma / snr).clamp(max=1)  # min(SNR, gamma) / SNR, also where SNR is 0
        weight = snr.clamp(max=self.min_snr_gamma)
        if self.model_mean_type == ModelMeanType.VELOCITY:
            return weight / (snr + 1)
        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            return weight / at(self.posterior_mean_coef1, t, t.shape) ** 2
        return weight

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """
        The term of L_vlb at t, in bits per dimension: KL(q || p), and at t = 0 the decoder's negative
        log-likelihood (equations 4 to 7).

        :return: "output" [N] and "pred_xstart", x_t's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        log_scales = 0.5 * out["log_variance"]
        decoder_nll = -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=log_scales)
        nats = th.where(t == 0, mean_flat(decoder_nll), mean_flat(kl))
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]: independent of the model."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=th.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self, model: Model, x_start: th.Tensor, clip_denoised: bool = True, model_kwargs: dict | None = None,
        noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        L_vlb (equation 4), the variational bound on -log2 p(x_0), with one noise sample per timestep.

        :param x_start: [N, C, ...] in [-1, 1].
        :param noise_fn: as in p_sample().
        :return: "total_bpd" and "prior_bpd" [N], "vb" [N, T], its terms, all in bits per dimension; "xstart_mse" and
                 "mse" [N, T], squared errors of the predicted x_0 and noise. The first column is t = T - 1.
        """
        vb, xstart_mse, mse = [], [], []
        for i in reversed(range(self.num_timesteps)):
            t = th.full((x_start.shape[0],), i, device=x_start.device, dtype=th.long)
            noise = noise_fn(x_start)
            x_t = self.q_sample(x_start, t, noise=noise)
            with th.no_grad():
                kwargs: dict = dict(clip_denoised=clip_denoised, model_kwargs=model_kwargs)
                out = self._vb_terms_bpd(model, x_start=x_start, x_t=x_t, t=t, **kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))

        terms = {"vb": th.stack(vb, dim=1), "xstart_mse": th.stack(xstart_mse, dim=1), "mse": th.stack(mse, dim=1)}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}


# ---------------------------------------------------------------- helpers


def _unless_first(t, x):
    """0 at t = 0, else 1, broadcastable to x: the last step adds no noise."""
    return (t != 0).float().view(-1, *[1] * (x.dim() - 1))


def if_given(**kwargs):
    """The arguments that are not None: overrides with the original's signature lack the new ones."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _last_sample(steps):
    for out in steps:
        final = out["sample"]
    return final
