"""The published models: the flags that they were trained with."""

_IMAGENET64 = dict(
    image_size=64,
    num_channels=128,
    num_res_blocks=3,
    learn_sigma=True,
    diffusion_steps=4000,
    noise_schedule="cosine",
    lr=1e-4,
    batch_size=128,
)
_CIFAR10 = dict(_IMAGENET64, image_size=32, dropout=0.3)
_VLB = dict(use_kl=True, schedule_sampler="loss-second-moment")
_NOT_RESCALED = dict(rescale_learned_sigmas=False, rescale_timesteps=False)

PRESETS = {  # batch_size is that of all ranks together
    "imagenet64": _IMAGENET64,
    "imagenet64_vlb": {**_IMAGENET64, **_VLB},
    "imagenet64_cond": dict(_IMAGENET64, num_channels=192, class_cond=True, lr=3e-4, batch_size=2048, **_NOT_RESCALED),
    "cifar10": _CIFAR10,
    "cifar10_vlb": {**_CIFAR10, **_VLB},
    "upsample256": dict(
        large_size=256,
        small_size=64,
        num_channels=192,
        num_res_blocks=2,
        learn_sigma=True,
        class_cond=True,
        diffusion_steps=4000,
        noise_schedule="linear",
        lr=3e-4,
        batch_size=256,
        **_NOT_RESCALED,
    ),
    "lsun_bedroom": dict(
        image_size=256,
        num_channels=128,
        num_res_blocks=2,
        num_heads=1,
        learn_sigma=True,
        use_scale_shift_norm=False,
        attention_resolutions="16",
        diffusion_steps=1000,
        noise_schedule="linear",
        lr=1e-4,
        batch_size=128,
        **_NOT_RESCALED,
    ),
}
