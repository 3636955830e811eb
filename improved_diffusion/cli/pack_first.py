"""What to do where loading images limits a run."""

import shlex

import blobfile as bf

from ..data.packed import ENDING, is_packed
from ..options import TrainOptions


def loading_advice(options: TrainOptions) -> str:
    """For TrainLoop: the command that packs the images of a run; "" if they are packed, or in memory."""
    data_dir, values = options.data.data_dir.rstrip("/"), options.values()
    if not data_dir or is_packed(data_dir):
        return ""
    packed = f"{bf.basename(data_dir).lstrip('.') or 'images'}{ENDING}"
    words = ["python", "scripts/prepare.py", "images", data_dir, packed]
    words += ["--image_size", str(options.model.size)]
    for name, default in (("image_channels", 3), ("labels", "auto"), ("skip_damaged", False)):
        if values[name] != default:
            words += [f"--{name}", str(values[name])]
    return f"pack them first ({shlex.join(words)}; then --data_dir {shlex.quote(packed)}), or give more --num_workers"
