"""The scripts. An installed package holds them as improved_diffusion.scripts."""

import os
import sys

if sys.argv[0] == "-m" or os.path.basename(sys.argv[0]).startswith("improved-diffusion-"):
    from . import _start  # noqa: F401
