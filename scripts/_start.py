"""
Imported before torch by a script that is run: Ctrl-C in the seconds that the import takes ends it without a traceback,
and packages that are not installed are one line.
"""

import os
import signal
import sys
from importlib.util import find_spec

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = {  # by the module to import
    "improved_diffusion": "improved-diffusion",
    "torch": "torch",
    "numpy": "numpy",
    "blobfile": "blobfile",
    "PIL": "pillow",
    "tqdm": "tqdm",
}

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as by nohup
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # cli.parser.run() restores it

if missing := [package for module, package in PACKAGES.items() if find_spec(module) is None]:
    what = f"-e {ROOT}" if os.path.exists(os.path.join(ROOT, "pyproject.toml")) else " ".join(missing)
    script = "improved_diffusion" if sys.argv[0] == "-m" else os.path.basename(sys.argv[0])
    sys.exit(f"{script}: error: {', '.join(missing)} not installed in {sys.prefix}: pip install {what}")
