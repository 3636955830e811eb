"""
The networks, by the value of the option network. To add one, write its file and a row here.

Its classes take UNetModel's keyword arguments, as far as they apply, and are called as it is: model(x_t, t, y=None).
"""

from torch import nn

from .unet import SuperResModel, UNetModel

NETWORKS: dict[str, tuple[type[nn.Module], type[nn.Module]]] = {  # (of images, for super-resolution: takes low_res too)
    "unet": (UNetModel, SuperResModel),
}
