"""Sub-command memory: the peak of one training step, each form in a process of its own."""

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
    "cpu": "Peak: the most that torch's CPU allocator had given out at once (torch.profiler's record of every "
    "allocation), model, optimizer and average included. Resident: how far the process grew (VmHWM, by the page, "
    "with what the C library keeps and oneDNN's own buffers).",
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
    """measure() in a process of its own, since memory that one form has used another would use again."""
    request = json.dumps([name, use_checkpoint, list(setting), str(device)])
    done = subprocess.run([sys.executable, __file__, request], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"benchmarks/memory.py {request} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name, use_checkpoint, setting, device):
    """:return: bytes: the "peak" of a step, what is "kept" between steps, and the "resident" growth, None on a GPU."""
    before = resident("VmRSS")
    step, loop = training_step(name, setting, device, use_checkpoint=use_checkpoint)
    step()  # the first makes the optimizer's state
    kept = tensor_bytes(loop)
    if device.type == "cuda":
        th.cuda.reset_peak_memory_stats()
        step()
        return {"peak": th.cuda.max_memory_allocated(), "kept": kept, "resident": None}
    zero_grad(loop)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    most_resident = resident("VmHWM") - before if before is not None else None
    return {"peak": kept + most_at_once(record), "kept": kept, "resident": most_resident}


def most_at_once(record):
    """Bytes given out beyond those at the start, at the worst moment."""
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def zero_grad(loop):
    """So that the record begins with neither gradients nor activations: what is freed in it was given out in it."""
    for p in loop.model.parameters():
        p.grad = None


def tensor_bytes(loop):
    """Of parameters, optimizer state and moving averages."""
    averages = [p for params in loop.ema_params for p in (params if isinstance(params, list) else [params])]
    state = [v for values in loop.opt.state.values() for v in values.values() if isinstance(v, th.Tensor)]
    return sum(v.numel() * v.element_size() for v in [*loop.model.parameters(), *averages, *state])


def resident(field):
    """VmRSS or VmHWM (the most so far) in bytes; None where the kernel does not tell."""
    if not os.path.exists("/proc/self/status"):
        return None
    with open("/proc/self/status", encoding="utf-8") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(field + ":"))


if __name__ == "__main__":
    name, use_checkpoint, setting, device = json.loads(sys.argv[1])
    print(json.dumps(measure(name, use_checkpoint, Setting(*setting), th.device(device))))
