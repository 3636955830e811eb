"""How much memory a device has, and how much a computation takes."""

import os
import re
import weakref

import torch as th
from torch.utils._python_dispatch import TorchDispatchMode

MEMINFO, OWN_CGROUPS, CGROUPS = "/proc/meminfo", "/proc/self/cgroup", "/sys/fs/cgroup"


def available_memory(device: th.device) -> int | None:
    """
    Bytes that a process can still allocate on a device; None if the system does not tell.

    Of a GPU, what is free now, with what torch has reserved and does not use. Of a CPU, what the system can give
    without swapping, within the limits of the process's cgroups (containers, Slurm).
    """
    if device.type == "cuda":
        unused = th.cuda.memory_reserved(device) - th.cuda.memory_allocated(device)
        return th.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu":
        return None
    return min([bytes_left for bytes_left in (_system_memory(), *_cgroup_memory()) if bytes_left], default=None)


def _system_memory():
    found = re.search(r"MemAvailable: +(\d+) kB", _read(MEMINFO))
    if found:
        return int(found[1]) * 1024
    names = getattr(os, "sysconf_names", {})  # macOS has no /proc; Windows neither
    if "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _cgroup_memory():
    """Bytes left in each cgroup that contains the process and has a limit: limit - usage + file cache."""
    for line in _read(OWN_CGROUPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            root, limit, usage, cache = CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, cache = f"{CGROUPS}/memory", "total_inactive_file"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        parts = [part for part in path.split("/") if part]
        for depth in range(len(parts) + 1):  # in a container only the root may exist
            folder = os.path.join(root, *parts[:depth])
            numbers = [_read(os.path.join(folder, name)).strip() for name in (limit, usage)]
            if all(number.isdecimal() for number in numbers):  # "max" for no limit
                cached = re.search(rf"^{cache} (\d+)", _read(os.path.join(folder, "memory.stat")), re.MULTILINE)
                yield max(1, int(numbers[0]) - int(numbers[1]) + (int(cached[1]) if cached else 0))


def _read(path):
    try:
        with open(path, encoding="utf-8", errors="replace") as f:
            return f.read()
    except OSError:
        return ""


class LiveBytes(TorchDispatchMode):
    """Measure the peak of the bytes in tensors created within the mode, on any device, "meta" included."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            storage = tensor.untyped_storage() if isinstance(tensor, th.Tensor) else None
            if storage is not None and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, size):
        self.now -= size
