"""Output of the benchmarks: Markdown tables and JSON."""

import datetime
import json
import os
import platform
import shlex
import sys

import torch as th

from improved_diffusion.utils.streams import show


def markdown(rows):
    """A table of rows: dicts with the same keys, the headings."""
    headings = list(rows[0])
    lines = [headings, ["---"] * len(headings), *([_cell(row[key]) for key in headings] for row in rows)]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _cell(value):
    if value is None:
        return ""
    if isinstance(value, tuple):  # a Spread
        return f"{_cell(value[0])} ({_cell(value[1])}..{_cell(value[2])})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def publish(name, rows, args, notes=()):
    """Print the rows as a table and write them, with machine and settings, to OUT/NAME.json."""
    machine = describe_machine(args.device)
    show(f"## {name}\n\n{machine['date']}, {machine['hardware']}, torch {machine['torch']}: `{machine['command']}`\n")
    show("\n".join([markdown(rows), *(f"\n{note}" for note in notes)]) + "\n")
    os.makedirs(args.out, exist_ok=True)
    # args has values that JSON has not, such as a torch.device
    settings = {key: v for key, v in vars(args).items() if isinstance(v, int | float | str | list | bool | None)}
    rows = [{k: v._asdict() if isinstance(v, tuple) else v for k, v in row.items()} for row in rows]
    with open(os.path.join(args.out, f"{name}.json"), "w", encoding="utf-8") as f:
        json.dump({"machine": machine, "settings": settings, "rows": rows, "notes": list(notes)}, f, indent=1)


def describe_machine(device):
    cpu = f"{th.get_num_threads()} threads of {_processor()}"
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": th.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "processor": cpu,
        "torch": th.__version__,
        "python": platform.python_version(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _processor():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            name = next(line.split(":")[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name} ({th.backends.cpu.get_cpu_capability()})"
