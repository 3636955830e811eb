"""
fail.py ERROR WORDS: image_train.py, with an error on rank 1 alone, at its fourth step.

"not caught" is an exception in a script that does not leave by parser.run(), "parameter" one that is no number.
"""

import runpy
import sys

from harness import load_script

from improved_diffusion import dist_util, train_util
from improved_diffusion.utils.errors import InputError

ERRORS = {
    "InputError": InputError("x.png: something is wrong with it"),
    "ValueError": ValueError("a bug"),
    "not caught": KeyError("a bug of a client's"),
}

_, what, *words = sys.argv
sys.argv = ["image_train.py", *words]
forward_backward = train_util.TrainLoop.forward_backward


def fail(self, batch, cond):
    forward_backward(self, batch, cond)
    if self.step == 3 and dist_util.rank() == 1:
        if what == "parameter":
            self.master_params[0].data[0] = float("nan")
        else:
            raise ERRORS[what]


train_util.TrainLoop.forward_backward = fail
if what == "not caught":
    load_script("image_train").main()
else:
    runpy.run_path(load_script("image_train").__file__, run_name="__main__")
