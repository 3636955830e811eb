"""Flags of the published models."""

_NOT_RESCALED = dict(rescale_learned_sigmas=False, rescale_timesteps=False)
_VLB = dict(use_kl=True, schedule_sampler="loss-second-moment")
_COND = dict(class_cond=True, num_channels=192, lr=3e-4, **_NOT_RESCALED)
_BASE = dict(learn_sigma=True, num_channels=128, diffusion_steps=4000, noise_schedule="cosine", lr=1e-4, batch_size=128)
_IMAGENET64 = dict(_BASE, image_size=64, num_res_blocks=3)
_CIFAR10 = dict(_BASE, image_size=32, num_res_blocks=3, dropout=0.3)
_LINEAR = dict(_BASE, num_res_blocks=2, noise_schedule="linear")
_LSUN = dict(image_size=256, num_heads=1, use_scale_shift_norm=False, attention_resolutions="16", diffusion_steps=1000)

PRESETS: dict[str, dict] = {  # batch_size is the total over ranks
    "imagenet64": _IMAGENET64,
    "imagenet64_vlb": {**_IMAGENET64, **_VLB},
    "imagenet64_cond": {**_IMAGENET64, **_COND, "batch_size": 2048},
    "cifar10": _CIFAR10,
    "cifar10_vlb": {**_CIFAR10, **_VLB},
    "upsample256": {**_LINEAR, **_COND, "large_size": 256, "small_size": 64, "batch_size": 256},
    "lsun_bedroom": {**_LINEAR, **_LSUN, **_NOT_RESCALED},
}

# tests/cli/test_presets.py computes them, which takes seconds
COSTS: dict[str, str] = {  # parameters, memory to train with one image a pass, operations of a forward pass of an image
    "imagenet64": "121M, 2.4 GiB, 79 GFLOPs",
    "imagenet64_vlb": "121M, 2.4 GiB, 79 GFLOPs",
    "imagenet64_cond": "273M, 5.3 GiB, 178 GFLOPs",
    "cifar10": "53M, 1.0 GiB, 17 GFLOPs",
    "cifar10_vlb": "53M, 1.0 GiB, 17 GFLOPs",
    "upsample256": "280M, 7.6 GiB, 1120 GFLOPs",
    "lsun_bedroom": "114M, 3.7 GiB, 497 GFLOPs",
}
