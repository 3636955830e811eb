"""Sub-command memory: the peak of one training step, each form in a fresh process."""

import json
import os
import subprocess
import sys

import torch as th
from models import Setting, training_step
from tables import publish
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
FORMS = {
    "plain, float32": ("plain", False),
    "ours, float32": ("fp32", False),
    "ours, float32, gradient checkpointing": ("fp32", True),
    "ours, bfloat16": ("bf16", False),
    "ours, bfloat16, gradient checkpointing": ("bf16", True),
}
NOTES = {
    "cpu": "Peak: the maximum allocated by torch's CPU allocator (from torch.profiler), model, optimizer and average "
    "included. Resident: growth of the process (VmHWM), with the caches of the C library and oneDNN.",
    "cuda": "Peak: torch.cuda.max_memory_allocated(), model, optimizer and average included.",
}


def memory(args):
    """In MiB, and relative to plain."""
    rows = []
    for image_size in args.image_sizes:
        for batch_size in args.batch_sizes:
            setting = Setting(image_size, args.num_channels, args.num_res_blocks, batch_size)
            chosen = {"plain", *(args.variants or (["fp32"] if args.quick else ["fp32", "bf16"]))}
            forms = {label: form for label, form in FORMS.items() if form[0] in chosen}
            measured = {label: measure_apart(*form, setting, args.device) for label, form in forms.items()}
            plain = measured["plain, float32"]
            rows += [
                {
                    **setting._asdict(),
                    "variant": label,
                    "peak, MiB": m["peak"] / MIB,
                    "times plain": m["peak"] / plain["peak"],
                    "model and optimizer, MiB": m["kept"] / MIB,
                    "beyond these, MiB": (m["peak"] - m["kept"]) / MIB,
                    "beyond, times plain": (m["peak"] - m["kept"]) / (plain["peak"] - plain["kept"]),
                    "resident, MiB": m["resident"] and m["resident"] / MIB,
                }
                for label, m in measured.items()
            ]
    publish("memory", rows, args, [NOTES[args.device.type]])


def measure_apart(name, use_checkpoint, setting, device):
    """measure() in a fresh process, since allocators reuse the memory of earlier forms."""
    request = json.dumps([name, use_checkpoint, list(setting), str(device)])
    done = subprocess.run([sys.executable, __file__, request], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks/memory.py {request} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, use_checkpoint, setting, device):
    """:return: bytes: "peak" of a step, "kept" between steps, and "resident" growth, None on a GPU."""
    before = resident("VmRSS")
    step, loop = training_step(name, setting, device, use_checkpoint=use_checkpoint)
    step()  # the first allocates the optimizer's state
    kept = tensor_bytes(loop)
    if device.type == "cuda":
        th.cuda.reset_peak_memory_stats()
        step()
        return {"peak": th.cuda.max_memory_allocated(), "kept": kept, "resident": None}
    zero_grad(loop)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    growth = resident("VmHWM") - before if before is not None else None
    return {"peak": kept + peak_allocation(record), "kept": kept, "resident": growth}


def peak_allocation(record):
    """Peak of allocated bytes above those at the start."""
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def zero_grad(loop):
    """Free gradients, so that all that the profile frees is allocated in it."""
    for p in loop.model.parameters():
        p.grad = None


def tensor_bytes(loop):
    """Bytes of parameters, optimizer state and moving averages."""
    averages = [p for params in loop.ema_params for p in (params if isinstance(params, list) else [params])]
    state = [v for values in loop.opt.state.values() for v in values.values() if isinstance(v, th.Tensor)]
    return sum(v.numel() * v.element_size() for v in [*loop.model.parameters(), *averages, *state])


def resident(field):
    """VmRSS or VmHWM (its maximum) in bytes; None where /proc does not exist."""
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))


if __name__ == "__main__":
    name, use_checkpoint, setting, device = json.loads(sys.argv[1])
    print(json.dumps(measure(name, use_checkpoint, Setting(*setting), th.device(device))))
