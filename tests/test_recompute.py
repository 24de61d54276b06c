import gc
import weakref

import torch
from torch import Tensor

from cab.students.recompute import Recomputed


def test_recipe_runs_once_and_gives_the_same_gradients() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return 2 * x

    x = torch.randn(3, 4, requires_grad=True)
    recomputed = Recomputed()
    with recomputed:
        u = double(x)
        recomputed.register(u, double, x)
        out = (u.square() * u.T.reshape(3, 4)).sum() + u.transpose(0, 1).exp().sum()
    out.backward()
    assert calls == [True, False]
    gradient, x.grad = x.grad, None
    u = 2 * x
    ((u.square() * u.T.reshape(3, 4)).sum() + u.transpose(0, 1).exp().sum()).backward()
    assert torch.equal(gradient, x.grad)


def test_backward_leaves_nothing_behind() -> None:
    """Not even for the garbage collector, which does not run often enough on a GPU's memory."""
    made: list[weakref.ref[Tensor]] = []

    def double(x: Tensor) -> Tensor:
        u = 2 * x
        made.append(weakref.ref(u))
        return u

    gc.disable()
    try:
        x = torch.randn(3, requires_grad=True)
        recomputed = Recomputed()
        with recomputed:
            middle = x.exp()
            u = double(middle)
            recomputed.register(u, double, middle)
            square = u.square()
            low = u.sin()
            v = double(low)
            recomputed.register(v, double, low)
            out = (square + v.square()).sum()
        del recomputed, middle, u, low, v, square
        out.backward()
        assert len(made) == 4
        assert [tensor() for tensor in made] == [None] * 4
    finally:
        gc.enable()


def test_a_graph_that_is_dropped_leaves_nothing_behind() -> None:
    def recipe(low: Tensor) -> Tensor:
        return 2 * low

    x = torch.randn(3, requires_grad=True)
    recomputed = Recomputed()
    with recomputed:
        low = x.exp()  # saves its own result
        u = recipe(low)
        recomputed.register(u, recipe, low)
        out = (u * low).sum()  # saves low beside u: its graph has the recipe, which must not have the graph
    kept = weakref.ref(recipe)
    del recomputed, recipe, low, u, out
    gc.collect()
    assert kept() is None


def test_what_is_not_registered_is_kept() -> None:
    x = torch.randn(3, requires_grad=True)
    with Recomputed():
        out = x.exp().square().sum()
    out.backward()
    torch.testing.assert_close(x.grad, 2 * (2 * x).exp())


def test_backward_uses_the_recipe_and_not_the_tensor() -> None:
    x = torch.ones(3, requires_grad=True)
    recomputed = Recomputed()
    with recomputed:
        u = 2 * x
        recomputed.register(u, lambda: torch.full((3,), 5.0))
        out = u.square().sum()
    out.backward()
    assert x.grad.tolist() == [20.0] * 3


def test_stands_back_where_another_context_decides_what_is_kept() -> None:
    """Gradient checkpointing is such a context: it would keep what only the innermost one is asked about."""
    asked: list[Tensor] = []
    x = torch.ones(3, requires_grad=True)
    recomputed = Recomputed()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: asked.append(t) or t, lambda t: t), recomputed:
        u = 2 * x
        recomputed.register(u, lambda: torch.full((3,), 5.0))
        out = u.square().sum()
    assert [tensor.tolist() for tensor in asked] == [[2.0] * 3]
    out.backward()
    assert x.grad.tolist() == [8.0] * 3
