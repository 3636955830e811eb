"""Derivatives of a network by its input and its weights: forward mode, second order, and both."""

import pytest
import torch as th
from parity_cases import recorded_network, tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own, in forward mode


@pytest.fixture
def score():
    """A function of x in float64, a direction, and the derivative along it by differences."""
    model, x, t = recorded_network()
    model, x, v = model.double(), x.double(), tensor("v", *x.shape).double()

    def f(x):
        return model(x, t)

    with th.no_grad():
        return f, x, v, (f(x + 1e-4 * v) - f(x - 1e-4 * v)) / 2e-4


@pytest.mark.parametrize("grad", [False, True])
def test_jvp(score, grad):
    f, x, v, want = score
    with th.set_grad_enabled(grad):
        _, got = th.func.jvp(f, (x,), (v,))
    th.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weights", ["input_blocks.1.0.in_layers.0.weight", "middle_block.1.qkv.weight"])
def test_jvp_by_weights(weights):
    model, x, t = recorded_network()
    model, x = model.double().requires_grad_(False), x.double()
    w = model.get_parameter(weights)

    def f(w):
        return th.func.functional_call(model, {weights: w}, (x, t))

    _, got = th.func.jvp(f, (w,), (th.ones_like(w),))
    th.testing.assert_close(got, (f(w + 1e-6) - f(w - 1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # fused attention, sample by sample
@pytest.mark.parametrize("grad", [False, True])
def test_vmap(grad):
    """Over samples, and over directions as jacfwd() does."""
    model, x, t = recorded_network()
    model, x = model.double(), x.double()
    with th.set_grad_enabled(grad):
        th.testing.assert_close(th.vmap(lambda x, t: model(x[None], t[None])[0])(x, t), model(x, t))
        basis = th.stack([th.ones_like(x), x])
        _, got = th.vmap(lambda v: th.func.jvp(lambda x: model(x, t), (x,), (v,)))(basis)
        want = th.stack([th.func.jvp(lambda x: model(x, t), (x,), (v,))[1] for v in basis])
    th.testing.assert_close(got, want)


def test_vjp_and_jvp_are_transposes(score):
    f, x, v, want = score
    out, vjp = th.func.vjp(f, x)
    u = th.randn_like(out)
    th.testing.assert_close((vjp(u)[0] * v).sum(), (u * want).sum(), rtol=1e-5, atol=1e-6)


def hvp_of_double_backward(loss, x, v):
    x = x.clone().requires_grad_()
    (gradient,) = th.autograd.grad(loss(x), x, create_graph=True)
    return th.autograd.grad((gradient * v).sum(), x)[0]


def hvp_of_grad_of_grad(loss, x, v):
    return th.func.grad(lambda x: (th.func.grad(loss)(x) * v).sum())(x)


def hvp_of_forward_over_reverse(loss, x, v):
    return th.func.jvp(th.func.grad(loss), (x,), (v,))[1]


@pytest.mark.parametrize("hvp", [hvp_of_double_backward, hvp_of_grad_of_grad, hvp_of_forward_over_reverse])
def test_hessian_vector_product(score, hvp):
    f, x, v, _ = score

    def loss(x):
        return f(x).square().sum()

    want = (th.func.grad(loss)(x + 1e-4 * v) - th.func.grad(loss)(x - 1e-4 * v)) / 2e-4
    th.testing.assert_close(hvp(loss, x, v), want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_gradient_penalty_reaches_the_weights():
    model, x, t = recorded_network()
    x.requires_grad_()
    (gradient,) = th.autograd.grad(model(x, t).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None}
    assert unreached <= {"out.2.bias"} and x.grad.any()


@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a GPU")
def test_second_derivatives_on_a_gpu():
    model, x, t = recorded_network()
    v = th.ones_like(x)
    want = hvp_of_double_backward(lambda x: model(x, t).square().sum(), x, v)
    model, x, t, v = model.cuda(), x.cuda(), t.cuda(), v.cuda()
    with sdpa_kernel(SDPBackend.MATH):
        got = hvp_of_double_backward(lambda x: model(x, t).square().sum(), x, v)
    assert (got.cpu() - want).norm() < 0.01 * want.norm()
