"""
From noise to data, step by step: the ancestral chain (Ho et al. 2020) and DDIM (Song et al. 2020, arXiv 2010.02502).
"""

import torch as th

from .schedules import add_to, at_timesteps, is_transformed, one_a_sample


class Sampling:
    """
    The samplers of a GaussianDiffusion, whose p_mean_variance(), tables and conventions they use.
    """

    def p_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, noise_fn=th.randn_like):
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
        std = th.exp(0.5 * one_a_sample(out["log_variance"]))
        std = _unless_first(t, std)
        ours = noise_fn is th.randn_like and noise.dtype == std.dtype and not is_transformed()
        sample = add_to(noise.mul_(std) if ours else std * noise, out["mean"])
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        noise_fn=None,
    ):
        """
        Samples by the whole ancestral chain.

        :param shape: of the samples, (N, C, ...).
        :param noise: where the chain starts; standard normal if None.
        :param device: where to sample; the model's if None.
        :param progress: show a tqdm bar.
        :param noise_fn: draws all noise, as of p_sample(); th.randn_like if None.
        :return: tensor of `shape`.
        """
        return _last_sample(
            self.p_sample_loop_progressive(
                model,
                shape,
                noise=noise,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                model_kwargs=model_kwargs,
                device=device,
                progress=progress,
                noise_fn=noise_fn,
            )
        )

    def p_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        noise_fn=None,
    ):
        """Yield what p_sample() returns at each step of p_sample_loop(), noisiest first."""
        yield from self._sample_loop(
            self.p_sample,
            model,
            shape,
            noise,
            device,
            progress,
            noise_fn,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
        )

    def _sample_loop(self, step, model, shape, noise, device, progress, noise_fn, **step_kwargs):
        if device is None:
            device = next(model.parameters()).device
        x = (noise_fn or th.randn_like)(th.empty(*shape, device=device)) if noise is None else noise
        if noise_fn is not None:
            step_kwargs["noise_fn"] = noise_fn  # else not even named: a subclass's step may not know it
        indices = reversed(range(self.num_timesteps))
        if progress:
            from tqdm.auto import tqdm

            indices = tqdm(indices, total=self.num_timesteps, desc="sampling", unit="step")
        for i in indices:
            t = th.full((shape[0],), i, device=device, dtype=th.long)
            # no inference mode here: a model may guide itself by gradients, a caller may train on what it is given
            with th.no_grad():
                out = step(model, x, t, **step_kwargs)
            yield out
            x = out["sample"]

    # ---------------------------------------------------------------- DDIM

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0, noise_fn=th.randn_like
    ):
        """
        One DDIM step from x_t to x_{t-1} (Song et al. 2020, equation 12).

        :param eta: 0 is deterministic, 1 as noisy as the ancestral step.
        :param noise_fn: as of p_sample().
        :return: a dict of "sample" and "pred_xstart", x's shape.
        """
        out = self.p_mean_variance(
            model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
        )
        # from the processed x_0, so that clamping it changes the direction too
        eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
        alpha_bar, alpha_bar_prev = at_timesteps((self.alphas_cumprod, self.alphas_cumprod_prev), t, x.dim())
        noise = noise_fn(x)  # for eta = 0 too: a seeded script goes on with the random numbers it always had
        noisy = isinstance(eta, th.Tensor) or eta != 0
        sigma = eta * th.sqrt((1 - alpha_bar_prev) / (1 - alpha_bar)) * th.sqrt(1 - alpha_bar / alpha_bar_prev)
        eps_rate = th.sqrt(1 - alpha_bar_prev - sigma**2) if noisy else th.sqrt(1 - alpha_bar_prev)
        sample = add_to(th.sqrt(alpha_bar_prev) * out["pred_xstart"], eps_rate * eps)
        if noisy:
            sample = add_to(_unless_first(t, sigma) * noise, sample)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
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
        (alpha_bar_next,) = at_timesteps((self.alphas_cumprod_next,), t, x.dim())
        sample = add_to(th.sqrt(alpha_bar_next) * out["pred_xstart"], th.sqrt(1 - alpha_bar_next) * eps)
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample_loop(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        noise_fn=None,
    ):
        """Samples by the whole DDIM chain; parameters as of p_sample_loop() and ddim_sample()."""
        return _last_sample(
            self.ddim_sample_loop_progressive(
                model,
                shape,
                noise=noise,
                clip_denoised=clip_denoised,
                denoised_fn=denoised_fn,
                model_kwargs=model_kwargs,
                device=device,
                progress=progress,
                eta=eta,
                noise_fn=noise_fn,
            )
        )

    def ddim_sample_loop_progressive(
        self,
        model,
        shape,
        noise=None,
        clip_denoised=True,
        denoised_fn=None,
        model_kwargs=None,
        device=None,
        progress=False,
        eta=0.0,
        noise_fn=None,
    ):
        """Yield what ddim_sample() returns at each step of ddim_sample_loop(), noisiest first."""
        yield from self._sample_loop(
            self.ddim_sample,
            model,
            shape,
            noise,
            device,
            progress,
            noise_fn,
            clip_denoised=clip_denoised,
            denoised_fn=denoised_fn,
            model_kwargs=model_kwargs,
            eta=eta,
        )


def _last_sample(steps):
    for out in steps:
        final = out["sample"]
    return final


def _unless_first(t, std):
    """`std` where t > 0, 0 where t = 0: the last step adds no noise."""
    return std * (t != 0).view(-1, *[1] * (std.dim() - 1))
