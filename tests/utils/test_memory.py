"""What a device can still allocate, and what a computation takes."""

import pytest
import torch as th

from improved_diffusion.utils import memory
from improved_diffusion.utils.memory import LiveBytes, available_memory

GIB = 2**30
CPU = th.device("cpu")


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A function that writes the files of /proc and /sys that available_memory() reads."""

    def write(meminfo="", cgroups="", **files):
        for name, text in {"meminfo": meminfo, "cgroups": cgroups, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    for name, path in (("MEMINFO", "meminfo"), ("OWN_CGROUPS", "cgroups"), ("CGROUPS", "groups")):
        monkeypatch.setattr(memory, name, str(tmp_path / path))
    return write


MEMINFO = f"MemTotal: {16 * 2**20} kB\nMemFree: 5 kB\nMemAvailable:    {8 * 2**20} kB\n"


def test_a_cpu_has_what_the_system_can_give(system):
    system(MEMINFO)
    assert available_memory(CPU) == 8 * GIB


@pytest.mark.parametrize("folder", ["groups", "groups/slurm", "groups/slurm/job_1"])
def test_the_limit_of_any_cgroup_counts(system, folder):
    files = {
        "memory.max": f"{4 * GIB}\n",
        "memory.current": f"{3 * GIB}\n",
        "memory.stat": f"anon 7\ninactive_file {GIB}\n",
    }
    system(MEMINFO, "0::/slurm/job_1\n", **{f"{folder}/{name}": text for name, text in files.items()})
    assert available_memory(CPU) == 2 * GIB  # the file cache can be dropped


def test_cgroups_of_version_1(system):
    files = {"memory.limit_in_bytes": f"{3 * GIB}", "memory.usage_in_bytes": f"{GIB}", "memory.stat": "cache 5\n"}
    cgroups = "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n"
    system(MEMINFO, cgroups, **{f"groups/memory/{name}": text for name, text in files.items()})
    assert available_memory(CPU) == 2 * GIB


def test_no_limit_and_limits_above_the_systems_memory_change_nothing(system):
    files = {"groups/memory.max": "max\n", "groups/memory.current": "5\n"}
    files.update({"groups/a/memory.max": f"{99 * GIB}\n", "groups/a/memory.current": "5\n"})
    system(MEMINFO, "0::/a\n", **files)
    assert available_memory(CPU) == 8 * GIB


def test_a_group_over_its_limit_has_next_to_nothing_left(system):
    system(MEMINFO, "0::/\n", **{"groups/memory.max": "4\n", "groups/memory.current": "5\n"})
    assert available_memory(CPU) == 1


def test_this_machine_tells():
    assert available_memory(CPU) > 2**20


def test_systems_that_tell_nothing(system, monkeypatch):
    system()
    monkeypatch.setattr(memory.os, "sysconf_names", {}, raising=False)
    assert available_memory(CPU) is None
    assert available_memory(th.device("meta")) is None


def test_a_gpu_has_what_is_free_and_what_torch_holds_unused(monkeypatch):
    figures = dict(mem_get_info=(10 * GIB, 24 * GIB), memory_reserved=3 * GIB, memory_allocated=GIB)
    for name, value in figures.items():
        monkeypatch.setattr(th.cuda, name, lambda device, value=value: value)
    assert available_memory(th.device("cuda", 0)) == 12 * GIB


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_peak_of_live_bytes(device):
    with LiveBytes() as live:
        x = th.zeros(1000, device=device)
        for _ in range(3):
            y = x + 1  # the one before is freed after the next is there
        del y
        z = x.view(10, 100)[3]  # no memory of its own
    assert (live.peak, live.now) == (12000, 4000) and z.shape == (100,)
