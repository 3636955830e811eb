"""
Plot the terms of the variational bound by timestep (Figure 2 of the paper), and their sum from t = 0 up.

Reads what image_nll.py wrote to its log directory: vb_terms.npz, or estimate.npz. Several evaluations share the axes.
"""

import contextlib

if __name__ == "__main__":
    with contextlib.suppress(ImportError):  # not beside the script in sys.path, as by runpy.run_path()
        import _start  # noqa: F401

import os

import numpy as np

from improved_diffusion.cli.parser import FlagParser, path_argument, run
from improved_diffusion.metrics.plots import draw_terms, save_figure
from improved_diffusion.utils.errors import InputError, first_line
from improved_diffusion.utils.streams import show

FILES = {"vb_terms.npz": "arr_0", "estimate.npz": "vb"}  # and the array of terms in it


def main():
    args = create_argparser().parse_args()
    figure = draw_terms({os.path.basename(os.path.abspath(logdir)): read_terms(logdir) for logdir in args.LOGDIR})
    path = args.out or os.path.join(args.LOGDIR[0], "nll.png")
    save_figure(figure, path)
    show(os.path.abspath(path))


def read_terms(logdir: str) -> np.ndarray:
    """
    The terms [T] of an evaluation, noisiest timestep first.

    :raises InputError: if logdir has no file of them, or a damaged one.
    """
    for name, key in FILES.items():
        path = os.path.join(logdir, name)
        if not os.path.exists(path):
            continue
        try:
            with np.load(path, allow_pickle=False) as arrays:
                terms = arrays[key]
            if terms.ndim != 1 or terms.dtype.kind != "f" or not len(terms) or not np.isfinite(terms).all():
                raise ValueError(f"{key} is not a list of finite numbers")
        except Exception as e:  # a damaged zip archive raises anything
            raise InputError(f"{path}: not the terms of image_nll.py: {first_line(e)}") from None
        return terms
    raise InputError(f"{logdir}: has no {' or '.join(FILES)}; give the log directory of image_nll.py")


def create_argparser():
    parser = FlagParser(description=__doc__)
    parser.add_argument("LOGDIR", nargs="+", type=path_argument, help="log directory of image_nll.py")
    parser.add_argument("--out", default="", type=path_argument, help="PNG file; default nll.png in the first LOGDIR")
    return parser


def cli():
    run(main)


if __name__ == "__main__":
    cli()
