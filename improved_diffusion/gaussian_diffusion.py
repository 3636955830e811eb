"""
Gaussian diffusion: the forward process q, the learned reverse process p, and what is minimised.

Denoising diffusion (Ho et al. 2020, arXiv 2006.11239) with the learned variances, hybrid
loss and cosine schedule of Nichol & Dhariwal 2021 (arXiv 2102.09672, "the paper" below).
Whole samplers, as functions of one signature, are in samplers.py.

Conventions. Data is [N, C, ...] with any number of trailing axes, in [-1, 1]. Timesteps t
are integer tensors [N] in 0..T-1; t = 0 is the least noisy, so the paper's x_t is index
t - 1 here, and x_start is its x_0. Schedules are float64 numpy arrays of length T.
A model is called as model(x_t, t, **model_kwargs) and gives [N, C, ...], or [N, 2C, ...]
where it learns the variance too.
"""

import enum
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch as th

from .losses import discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .schedules import (
    _extract_into_tensor,
    betas_for_alpha_bar,  # noqa: F401 (part of this module, as in the original)
    get_named_beta_schedule,  # noqa: F401
    read_only,
)

TABLES = frozenset(
    """betas alphas_cumprod alphas_cumprod_prev alphas_cumprod_next sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod
    log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance
    posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2""".split()  # noqa: SIM905
)
Model = Callable[..., th.Tensor]
Fn = Callable[[th.Tensor], th.Tensor]


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

    def is_vb(self) -> bool:
        """Whether this is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion:
    """
    Training and sampling for one noise schedule.

    Its tables (betas, alphas_cumprod, posterior_variance, ...) are float64 numpy arrays [T], read-only. To change one,
    assign another array: `d.betas = d.betas * 0.5`. The other tables stay as they are.

    :param betas: [T] in (0, 1], the variance of each step.
    :param rescale_timesteps: give the model fractional timesteps in 0...1000 whatever T is.
    :raises ValueError: if betas is not a one-dimensional array in (0, 1].
    """

    def __init__(
        self, *, betas: np.ndarray, model_mean_type: ModelMeanType, model_var_type: ModelVarType, loss_type: LossType,
        rescale_timesteps: bool = False,
    ):  # fmt: skip
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps

        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a one-dimensional array of values in (0, 1], not {betas}")
        self.betas = betas
        self.num_timesteps = len(betas)

        alphas = 1.0 - betas
        self.alphas_cumprod = np.cumprod(alphas)
        self.alphas_cumprod_prev = np.append(1.0, self.alphas_cumprod[:-1])
        self.alphas_cumprod_next = np.append(self.alphas_cumprod[1:], 0.0)

        # q(x_t | x_0)
        self.sqrt_alphas_cumprod = np.sqrt(self.alphas_cumprod)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - self.alphas_cumprod)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - self.alphas_cumprod)
        with np.errstate(divide="ignore"):  # a last beta of 1 leaves no signal: infinity
            self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod)
            self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / self.alphas_cumprod - 1)

        # q(x_{t-1} | x_t, x_0), the paper's equations 10 to 12
        one_minus_alphas_cumprod = 1.0 - self.alphas_cumprod
        self.posterior_variance = betas * (1.0 - self.alphas_cumprod_prev) / one_minus_alphas_cumprod
        # the first step's posterior has variance 0, whose logarithm is minus infinity
        self.posterior_log_variance_clipped = np.log(np.append(self._first_variance(), self.posterior_variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(self.alphas_cumprod_prev) / one_minus_alphas_cumprod
        self.posterior_mean_coef2 = (1.0 - self.alphas_cumprod_prev) * np.sqrt(alphas) / one_minus_alphas_cumprod

    def _first_variance(self):
        """What stands for the first step's variance of 0: the second's, or beta where there is one step only."""
        return self.posterior_variance[1] if len(self.posterior_variance) > 1 else self.betas[0]

    def __setattr__(self, name, value):
        if name in TABLES:
            value = read_only(np.asarray(value))
        super().__setattr__(name, value)
        if name == "betas":
            self._log_betas = read_only(np.log(value))
        if name in ("betas", "posterior_variance") and hasattr(self, "posterior_variance"):  # FIXED_LARGE
            self._large_variance = read_only(np.append(self._first_variance(), self.betas[1:]))
            self._large_log_variance = read_only(np.log(self._large_variance))

    def __setstate__(self, state):
        # neither pickle nor deepcopy() keeps an array read-only
        for name, value in state.items():
            setattr(self, name, value)

    # ---------------------------------------------------------------- q: data to noise

    def q_mean_variance(self, x_start: th.Tensor, t: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Mean, variance and log-variance of q(x_t | x_0), the paper's equation 8.

        :return: three tensors of x_start's shape.
        """
        mean = _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
        variance = _extract_into_tensor(1.0 - self.alphas_cumprod, t, x_start.shape)
        log_variance = _extract_into_tensor(self.log_one_minus_alphas_cumprod, t, x_start.shape)
        return mean, variance, log_variance

    def q_sample(self, x_start: th.Tensor, t: th.Tensor, noise: th.Tensor | None = None) -> th.Tensor:
        """
        Draw x_t from q(x_t | x_0), the paper's equation 9.

        :param t: [N], or any shape whose axes broadcast against x_start's first ones, such as [N, 1, H, W].
        :param noise: standard normal, x_start's shape; drawn if None.
        :return: x_t, x_start's shape.
        :raises ValueError: if the noise has another shape.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        _check_shape("noise", noise, x_start.shape)
        return (
            _extract_into_tensor(self.sqrt_alphas_cumprod, t, x_start.shape) * x_start
            + _extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, x_start.shape) * noise
        )

    def q_posterior_mean_variance(
        self, x_start: th.Tensor, x_t: th.Tensor, t: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), the paper's equations 10 to 12.

        The log-variance is clipped: that of t = 0 is t = 1's.

        :return: three tensors of x_t's shape.
        :raises ValueError: if x_start and x_t differ in shape.
        """
        _check_shape("x_start", x_start, x_t.shape)
        mean = (
            _extract_into_tensor(self.posterior_mean_coef1, t, x_t.shape) * x_start
            + _extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t
        )
        variance = _extract_into_tensor(self.posterior_variance, t, x_t.shape)
        log_variance = _extract_into_tensor(self.posterior_log_variance_clipped, t, x_t.shape)
        return mean, variance, log_variance

    # ---------------------------------------------------------------- p: noise to data

    def p_mean_variance(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        The model's p(x_{t-1} | x_t), and the x_0 it implies.

        :param x: x_t, [N, C, ...].
        :param t: [N].
        :param clip_denoised: clamp the implied x_0 to [-1, 1].
        :param denoised_fn: applied to the implied x_0, before clamping.
        :param model_kwargs: further keyword arguments of the model.
        :return: a dict of "mean", "variance", "log_variance" and "pred_xstart", all x's shape.
        :raises ValueError: if t, the model's output or that of denoised_fn has the wrong shape.
        """
        _check_shape("t", t, x.shape[:1])
        output = self._call_model(model, x, t, model_kwargs)

        if self.model_var_type == ModelVarType.FIXED_LARGE:
            variance = _extract_into_tensor(self._large_variance, t, x.shape)
            log_variance = _extract_into_tensor(self._large_log_variance, t, x.shape)
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            variance = _extract_into_tensor(self.posterior_variance, t, x.shape)
            log_variance = _extract_into_tensor(self.posterior_log_variance_clipped, t, x.shape)
        else:
            output, log_variance = output.chunk(2, dim=1)
            if self.model_var_type == ModelVarType.LEARNED_RANGE:
                min_log = _extract_into_tensor(self.posterior_log_variance_clipped, t, x.shape)
                max_log = _extract_into_tensor(self._log_betas, t, x.shape)
                v = (log_variance + 1) / 2  # the model's output is in about [-1, 1]
                log_variance = v * max_log + (1 - v) * min_log  # equation 15
            variance = th.exp(log_variance)

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
        _check_shape("the implied x_0", pred_xstart, x.shape)

        if self.model_mean_type == ModelMeanType.PREVIOUS_X:
            mean = output
        else:
            mean, _, _ = self.q_posterior_mean_variance(x_start=pred_xstart, x_t=x, t=t)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _call_model(self, model, x_t, t, model_kwargs):
        """The model's output, [N, C, ...] or [N, 2C, ...]."""
        output = model(x_t, self._scale_timesteps(t), **(model_kwargs or {}))
        if not isinstance(output, th.Tensor):
            raise TypeError(f"the model must return a tensor, not {type(output).__name__}: wrap it in a function")
        n, channels, *rest = x_t.shape
        _check_shape("the model's output", output, (n, channels * (2 if self._learns_variance() else 1), *rest))
        return output

    def _learns_variance(self):
        return self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

    def _predict_xstart_from_eps(self, x_t, t, eps):
        _check_shape("eps", eps, x_t.shape)
        return (
            _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t
            - _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape) * eps
        )

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        # equation 11 solved for x_0
        _check_shape("xprev", xprev, x_t.shape)
        return (xprev - _extract_into_tensor(self.posterior_mean_coef2, t, x_t.shape) * x_t) / _extract_into_tensor(
            self.posterior_mean_coef1, t, x_t.shape
        )

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        return (
            _extract_into_tensor(self.sqrt_recip_alphas_cumprod, t, x_t.shape) * x_t - pred_xstart
        ) / _extract_into_tensor(self.sqrt_recipm1_alphas_cumprod, t, x_t.shape)

    def _scale_timesteps(self, t):
        if self.rescale_timesteps:
            return t.float() * (1000.0 / self.num_timesteps)
        return t

    # ---------------------------------------------------------------- sampling

    def p_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One ancestral step: draw x_{t-1} from p(x_{t-1} | x_t). No noise is added at t = 0.

        Parameters as of p_mean_variance().

        :param noise_fn: gives standard normal noise like the tensor it is called with.
        :return: a dict of "sample" and "pred_xstart", x's shape.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        noise = noise_fn(x)
        sample = out["mean"] + _unless_first(t, x) * th.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0, noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One DDIM step from x_t to x_{t-1} (Song et al. 2020, arXiv 2010.02502, equations 12 and 16).

        :param eta: 0 is deterministic, 1 as noisy as the ancestral step.
        :param noise_fn: as of p_sample(); called for eta = 0 too, as the original draws noise there.
        :return: a dict of "sample" and "pred_xstart", x's shape.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        # from the processed x_0, so that clamping it changes the direction too
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar = _extract_into_tensor(self.alphas_cumprod, t, x.shape)
        alpha_bar_prev = _extract_into_tensor(self.alphas_cumprod_prev, t, x.shape)
        sigma = eta * th.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * th.sqrt(1 - alpha_bar / alpha_bar_prev)
        noise = noise_fn(x)
        mean = out["pred_xstart"] * th.sqrt(alpha_bar_prev) + th.sqrt(1 - alpha_bar_prev - sigma**2) * eps
        return {"sample": mean + _unless_first(t, x) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(
        self, model: Model, x: th.Tensor, t: th.Tensor, clip_denoised: bool = True, denoised_fn: Fn | None = None,
        model_kwargs: dict | None = None, eta: float = 0.0,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        One step of the deterministic DDIM chain run backwards, from x_t to x_{t+1}: data to latent.

        :param eta: must be 0, since only the deterministic chain has an inverse.
        :return: a dict of "sample" and "pred_xstart", x's shape.
        :raises ValueError: if eta is not 0.
        """
        if eta != 0.0:
            raise ValueError(f"eta={eta}: only the deterministic chain, eta=0, can be run backwards")
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar_next = _extract_into_tensor(self.alphas_cumprod_next, t, x.shape)
        sample = out["pred_xstart"] * th.sqrt(alpha_bar_next) + th.sqrt(1 - alpha_bar_next) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, noise_fn: Fn | None = None,
    ) -> th.Tensor:  # fmt: skip
        """
        Samples by the whole ancestral chain.

        :param shape: of the samples, (N, C, ...).
        :param noise: where the chain starts; standard normal if None.
        :param device: where to sample; the model's if None.
        :param progress: show a tqdm bar.
        :param noise_fn: draws all noise, as of p_sample(); th.randn_like if None.
        :return: tensor of `shape`.
        """
        kwargs: dict = dict(noise=noise, device=device, progress=progress, **if_given(noise_fn=noise_fn))
        kwargs |= dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        return _last_sample(self.p_sample_loop_progressive(model, shape, **kwargs))

    def p_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, noise_fn: Fn | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """Yield what p_sample() returns at each step of p_sample_loop(), noisiest first."""
        kwargs = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        return self._sample_loop(self.p_sample, model, shape, noise, device, progress, noise_fn, kwargs)

    def ddim_sample_loop(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, eta: float = 0.0, noise_fn: Fn | None = None,
    ) -> th.Tensor:  # fmt: skip
        """Samples by the whole DDIM chain; parameters as of p_sample_loop() and ddim_sample()."""
        kwargs: dict = dict(noise=noise, device=device, progress=progress, eta=eta, **if_given(noise_fn=noise_fn))
        kwargs |= dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs)
        return _last_sample(self.ddim_sample_loop_progressive(model, shape, **kwargs))

    def ddim_sample_loop_progressive(
        self, model: Model, shape: Sequence[int], noise: th.Tensor | None = None, clip_denoised: bool = True,
        denoised_fn: Fn | None = None, model_kwargs: dict | None = None, device: th.device | str | None = None,
        progress: bool = False, eta: float = 0.0, noise_fn: Fn | None = None,
    ) -> Iterator[dict[str, th.Tensor]]:  # fmt: skip
        """Yield what ddim_sample() returns at each step of ddim_sample_loop(), noisiest first."""
        kwargs = dict(clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs, eta=eta)
        return self._sample_loop(self.ddim_sample, model, shape, noise, device, progress, noise_fn, kwargs)

    def _sample_loop(self, step, model, shape, noise, device, progress, noise_fn, step_kwargs):
        if device is None:
            device = _device_of(model, noise)
        x = (noise_fn or th.randn_like)(th.empty(*shape, device=device)) if noise is None else noise
        indices = range(self.num_timesteps)[::-1]
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices, desc="sampling", unit="step")
        for i in indices:
            t = th.full((shape[0],), i, device=device, dtype=th.long)
            # no inference mode here: a model may guide itself by gradients, a caller may train on what it is given
            with th.no_grad():
                out = step(model, x, t, **step_kwargs, **if_given(noise_fn=noise_fn))
            yield out
            x = out["sample"]

    # ---------------------------------------------------------------- what is minimised

    def training_losses(
        self, model: Model, x_start: th.Tensor, t: th.Tensor, model_kwargs: dict | None = None,
        noise: th.Tensor | None = None,
    ) -> dict[str, th.Tensor]:  # fmt: skip
        """
        The loss of each sample at its timestep.

        :param x_start: [N, C, ...] in [-1, 1].
        :param t: [N] timesteps.
        :param noise: standard normal, x_start's shape; drawn if None.
        :return: a dict of tensors [N]: "loss", and its parts "mse" and "vb" where it has them.
        :raises ValueError: if the noise or the model's output has the wrong shape.
        """
        if noise is None:
            noise = th.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)

        if self.loss_type.is_vb():
            loss = self._vb_terms_bpd(
                model=model, x_start=x_start, x_t=x_t, t=t, clip_denoised=False, model_kwargs=model_kwargs
            )["output"]
            if self.loss_type == LossType.RESCALED_KL:
                loss = loss * self.num_timesteps
            return {"loss": loss}

        output = self._call_model(model, x_t, t, model_kwargs)
        terms = {}
        if self._learns_variance():
            # L_vb teaches the variance only: the mean inside it is held fixed (the paper, section 3.1)
            mean_output, var_output = output.chunk(2, dim=1)
            frozen = th.cat([mean_output.detach(), var_output], dim=1)
            terms["vb"] = self._vb_terms_bpd(
                model=lambda *_, **__: frozen, x_start=x_start, x_t=x_t, t=t, clip_denoised=False
            )["output"]
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
            output = mean_output

        if self.model_mean_type == ModelMeanType.EPSILON:
            target = noise
        elif self.model_mean_type == ModelMeanType.START_X:
            target = x_start
        else:
            target, _, _ = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        terms["mse"] = mean_flat((target - output) ** 2)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]  # the paper's equation 16
        return terms

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """
        The variational bound's term at t, in bits per dimension: KL(q || p), and at t = 0
        the decoder's negative log-likelihood (the paper's equations 4 to 7).

        :return: a dict of "output" [N] and "pred_xstart", x_t's shape.
        """
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        out = self.p_mean_variance(model, x_t, t, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        kl = normal_kl(true_mean, true_log_variance, out["mean"], out["log_variance"])
        decoder_nll = -discretized_gaussian_log_likelihood(
            x_start, means=out["mean"], log_scales=0.5 * out["log_variance"]
        )
        nats = th.where(t == 0, mean_flat(decoder_nll), mean_flat(kl))
        return {"output": nats / math.log(2.0), "pred_xstart": out["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]: what no model can change."""
        t = th.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device, dtype=th.long)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(
        self, model: Model, x_start: th.Tensor, clip_denoised: bool = True, model_kwargs: dict | None = None,
        noise_fn: Fn = th.randn_like,
    ) -> dict[str, th.Tensor]:  # fmt: skip
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
                out = self._vb_terms_bpd(
                    model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip_denoised, model_kwargs=model_kwargs
                )
            eps = self._predict_eps_from_xstart(x_t, t, out["pred_xstart"])
            vb.append(out["output"])
            xstart_mse.append(mean_flat((out["pred_xstart"] - x_start) ** 2))
            mse.append(mean_flat((eps - noise) ** 2))

        terms = {"vb": th.stack(vb, dim=1), "xstart_mse": th.stack(xstart_mse, dim=1), "mse": th.stack(mse, dim=1)}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **terms}


# ---------------------------------------------------------------- small things


def _unless_first(t, x):
    """1 where t > 0, 0 where t = 0, to multiply x: the last step adds no noise."""
    return (t != 0).float().view(-1, *[1] * (x.dim() - 1))


def _check_shape(what, tensor, shape):
    if tensor.shape != shape:
        raise ValueError(f"{what} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")


def if_given(**kwargs):
    """Those that are not None: an override with the original's signature does not know the others."""
    return {name: value for name, value in kwargs.items() if value is not None}


def _last_sample(steps):
    for out in steps:
        final = out["sample"]
    return final


def _device_of(model, noise):
    """The model's, else the noise's, else torch's default."""
    for parameter in getattr(model, "parameters", list)():
        return parameter.device
    return th.get_default_device() if noise is None else noise.device
