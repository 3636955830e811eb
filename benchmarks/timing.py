"""Alternating timings, FLOP counts, and the peak rate of the machine."""

import statistics
import time
from typing import NamedTuple

import torch as th
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode


class Spread(NamedTuple):
    """Median and range of repeated measurements."""

    median: float
    least: float
    most: float


def spread(values):
    return Spread(statistics.median(values), min(values), max(values))


def alternate(functions, repetitions, device):
    """
    Time the functions in alternation, so that other load affects all equally.

    The first call of each, which compiles, allocates and selects kernels, is not counted.

    :param functions: {name: function without arguments}.
    :return: {name: seconds, a list of `repetitions`}.
    """
    seconds = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            elapsed = time_once(function, device)
            if repetition:
                seconds[name].append(elapsed)
    return seconds


def time_once(function, device):
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device):
    if device.type == "cuda":
        th.cuda.synchronize(device)


def count_flops(function):
    """Floating-point operations of the convolutions and matrix products in a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


class Peak:
    """
    Work at the machine's peak rate in a dtype: a wide 3x3 convolution on a CPU, a large matrix product on a GPU.

    A call does `flops` floating-point operations. On GPUs float32 means TF32, the default of their convolutions.
    """

    def __init__(self, device, dtype, quick=False):
        if device.type == "cuda":
            size = 1024 if quick else 8192
            self._inputs = [th.randn(size, size, device=device, dtype=dtype) for _ in range(2)]
            self._work = th.mm
        else:
            channels, width, batch = (32, 8, 2) if quick else (128, 32, 16)
            x, weight = th.randn(batch, channels, width, width), th.randn(channels, channels, 3, 3) / channels
            self._inputs = [v.to(dtype) for v in (x, weight)]
            self._work = lambda x, weight: F.conv2d(x, weight, padding=1)
            self._choose_layout(device)
        self.flops = count_flops(self)

    def _choose_layout(self, device):
        inputs = self._inputs
        layouts = [inputs, [v.to(memory_format=th.channels_last) for v in inputs]]

        def seconds(layout):
            self._inputs = layout
            return min(time_once(self, device) for _ in range(4))

        self._inputs = min(layouts, key=seconds)

    def __call__(self):
        precision = th.get_float32_matmul_precision()
        th.set_float32_matmul_precision("high")
        try:
            with th.inference_mode():
                self._work(*self._inputs)
        finally:
            th.set_float32_matmul_precision(precision)
