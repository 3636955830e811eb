"""A network exported by torch.jit.trace."""

import io

import pytest
import torch as th
from parity_cases import assert_recorded, recorded_network


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_jit_trace(grad):
    model, x, t = recorded_network()
    with th.set_grad_enabled(grad):
        traced = th.jit.trace(model, (x, t))
    file = io.BytesIO()
    th.jit.save(traced, file)
    file.seek(0)
    loaded = th.jit.load(file)
    assert_recorded("unet/0/out", loaded(x, t), rtol=2e-4)
    with th.no_grad():
        assert_recorded("unet/0/out", loaded(x, t), rtol=2e-4)
        th.testing.assert_close(loaded(x[:1], t[1:]), model(x[:1], t[1:]), rtol=1e-3, atol=1e-4)
