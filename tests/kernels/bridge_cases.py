"""Bridges, how they are run, and the kernels' modules, which the tests of the bridge loss share."""

import importlib

import torch

FUSED = "cab_kernels.bridge.fused_kernels"
CHUNKED = "cab_kernels.bridge.chunked_kernels"
PASSES = "cab_kernels.bridge.passes_kernels"
PRODUCTS = "cab_kernels.bridge.product_kernels"
KERNELS = "cab_kernels.bridge.kernels"
SUMS = "cab_kernels.bridge.sums_kernels"
NAMES = ("loss", "x", "w1", "b1", "w2", "b2")


def make(seed=0, *, batch=2, length=9, d_state=5, hidden=7, width=6, dtype=torch.float64, device="cpu"):
    """x, w1, b1, w2, b2, target of a bridge, each of the scale that a fresh bridge gives them."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, device=device, dtype=torch.float32)).to(dtype)

    return (
        draw(batch, length, d_state),
        draw(hidden, d_state, scale=d_state**-0.5),
        draw(hidden, scale=0.5),
        draw(width, hidden, scale=hidden**-0.5),
        draw(width, scale=0.5),
        draw(batch, length, width),
    )


def whole(seed=0, **sizes):
    """A float32 bridge whose rows are whole units of what TMA moves, so that every path takes it."""
    return make(seed, dtype=torch.float32, **{"d_state": 8, "hidden": 12, "width": 8} | sizes)


def run(function, inputs, *arguments, incoming=None, **options):
    """The loss and the gradients of the inputs."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    loss = function(*inputs, *arguments, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming
    return [loss.detach(), *torch.autograd.grad(loss, inputs, incoming)]


def made_products(monkeypatch):
    """A list that gets an entry for each bridge that goes through ``Products``."""
    products, made = importlib.import_module(PRODUCTS).Products, []
    init = products.__init__
    monkeypatch.setattr(products, "__init__", lambda self, *given: made.append(self) or init(self, *given))
    return made
