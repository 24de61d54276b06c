import functools
import importlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cab_kernels import bridge_mse, bridge_mse_grouped, bridge_mse_grouped_ref, bridge_mse_ref

FUSED = "cab_kernels.bridge.fused_kernels"
CHUNKED = "cab_kernels.bridge.chunked_kernels"
PASSES = "cab_kernels.bridge.passes_kernels"
PRODUCTS = "cab_kernels.bridge.product_kernels"
KERNELS = "cab_kernels.bridge.kernels"
SUMS = "cab_kernels.bridge.sums_kernels"


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


def grads(loss, inputs, scale=1.0):
    return torch.autograd.grad(loss, inputs, torch.full_like(loss, scale))


class TestReference:
    def test_is_the_mean_squared_error_of_two_linear_layers(self):
        x, w1, b1, w2, b2, target = make()
        expected = F.mse_loss(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2), target)
        torch.testing.assert_close(bridge_mse_ref(x, w1, b1, w2, b2, target), expected)

    def test_gradients(self):
        *inputs, target = make(batch=1, length=4, d_state=3, hidden=4, width=2)
        inputs = [value.requires_grad_() for value in inputs]
        mask = torch.tensor([[True, False, True, True]])
        index = torch.tensor([3, 0, -1, 1])

        def loss(*inputs):
            return bridge_mse_ref(*inputs, target, mask=mask, token_index=index)

        assert torch.autograd.gradcheck(loss, inputs)

    def test_an_index_matches_tokens(self):
        x, *weights, target = make()
        index = torch.tensor([8, 7, 6, 5, 4, 3, 2, 1, 0])
        torch.testing.assert_close(
            bridge_mse_ref(x, *weights, target, token_index=index), bridge_mse_ref(x, *weights, target.flip(1))
        )

    def test_an_index_of_minus_one_leaves_out(self):
        x, *weights, target = make()
        index = torch.tensor([-1, 0, 1, 2, 3, -1, 4, 5, 6])
        kept = index >= 0
        expected = bridge_mse_ref(x[:, kept], *weights, target[:, :7])
        torch.testing.assert_close(bridge_mse_ref(x, *weights, target, token_index=index), expected)

    def test_an_index_is_not_read_where_it_has_no_values_yet(self):
        """By a compiler, and of tensors without values; it may be beyond the target there."""
        *inputs, target = make(dtype=torch.float32)
        index = torch.arange(8, -1, -1)
        compiled = torch.compile(bridge_mse, fullgraph=True, backend="aot_eager")
        expected = bridge_mse(*inputs, target, token_index=index)
        torch.testing.assert_close(compiled(*inputs, target, token_index=index), expected)
        beyond = (*inputs, target, index + 1)
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(value) for value in beyond]
            assert bridge_mse(*fake[:-1], token_index=fake[-1]).shape == ()

    def test_heads_are_flattened_head_by_head(self):
        x, *weights, target = make()
        heads = target.unflatten(2, (3, 2)).transpose(1, 2)
        assert torch.equal(bridge_mse_ref(x, *weights, heads), bridge_mse_ref(x, *weights, target))

    def test_nan_behind_the_mask_is_harmless(self):
        x, *weights, target = make()
        mask = torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) > 0.4
        inputs = [value.clone().requires_grad_() for value in (x, *weights)]
        expected = grads(bridge_mse_ref(*inputs, target, mask=mask), inputs)
        spoiled = [x.masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_(), *inputs[1:]]
        target = target.masked_fill(~mask.unsqueeze(-1), torch.nan)
        for got, want in zip(grads(bridge_mse_ref(*spoiled, target, mask=mask), spoiled), expected, strict=True):
            torch.testing.assert_close(got, want)

    def test_nothing_counted_is_zero(self):
        *inputs, target = make()
        inputs = [value.requires_grad_() for value in inputs]
        loss = bridge_mse_ref(*inputs, target, mask=torch.zeros(2, 9, dtype=torch.bool))
        assert loss == 0
        assert all(not grad.any() for grad in grads(loss, inputs))

    def test_no_tokens_is_zero(self):
        x, *weights, target = make(length=0)
        assert bridge_mse_ref(x, *weights, target) == 0

    def test_standardises_the_target(self):
        x, *weights, target = make()
        mean, std = target.mean((0, 1)), target.std((0, 1))
        got = bridge_mse_ref(x, *weights, target, target_mean=mean, target_rstd=1 / std)
        torch.testing.assert_close(got, bridge_mse_ref(x, *weights, (target - mean) / std))

    def test_computes_in_float32_under_autocast(self):
        inputs = make(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(bridge_mse(*inputs), bridge_mse_ref(*inputs))


class TestGroupedReference:
    def test_each_bridge_meets_its_own(self):
        cases = [make(seed) for seed in range(4)]
        xs, *stacks = ([case[i] for case in cases] for i in range(5))
        stacks = [torch.stack(stack) for stack in stacks]
        targets = [cases[0][5], cases[1][5]]
        index = torch.stack([torch.arange(9), torch.arange(9).flip(0)] * 2)
        mask = torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(1)) > 0.4
        got = bridge_mse_grouped_ref(xs, *stacks, targets, mask=mask, token_index=index)
        for i, case in enumerate(cases):
            want = bridge_mse_ref(*case[:5], targets[i // 2], mask=mask[i], token_index=index[i])
            torch.testing.assert_close(got[i], want)

    def test_two_axes_are_one_batch(self):
        x, *weights, target = make(batch=1)
        stacks = [value.unsqueeze(0) for value in weights]
        mask = torch.arange(9) % 3 > 0
        got = bridge_mse_grouped_ref([x[0]], *stacks, target[0], mask=mask, token_index=torch.arange(9).flip(0))
        want = bridge_mse_ref(x, *weights, target, mask=mask[None], token_index=torch.arange(9).flip(0))
        torch.testing.assert_close(got[0], want)


class TestBadInput:
    def test_float64_is_for_the_reference(self):
        with pytest.raises(TypeError, match="expected x of 32 or 16 bits for backend 'triton', got float64"):
            bridge_mse(*make(device="cuda" if torch.cuda.is_available() else "cpu"), backend="triton")

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": 1.0}, TypeError, "expected x to be a tensor, got float"),
            ({"x": torch.zeros(2, 9, 4)}, ValueError, r"expected w1 of shape .* = \(7, 4\), got \(7, 5\)"),
            ({"w2": torch.zeros(6, 8)}, ValueError, r"expected w2 of shape \(width, hidden\) = \(6, 7\), got \(6, 8\)"),
            ({"b2": torch.zeros(6, dtype=torch.int64)}, TypeError, "expected b2 of dtype .*, got int64"),
            ({"b1": torch.zeros(7, dtype=torch.bfloat16)}, ValueError, "b1 of dtype .*32 like w1, got torch.bfloat16"),
            ({"w1": torch.zeros(0, 5)}, ValueError, r"expected w1 of no axis of size 0, got \(0, 5\)"),
            ({"target": torch.zeros(2, 8, 6)}, ValueError, r"expected target of shape .* = \(2, 9, 6\), got"),
            ({"target": torch.zeros(2, 3, 9, 4)}, ValueError, r"with heads \* head_dim = 6, got 3 \* 4"),
            ({"target": torch.zeros(9, 6)}, ValueError, r"expected target of shape .*, got \(9, 6\)"),
            ({"mask": torch.ones(2, 9)}, TypeError, "expected mask of dtype bool, got float32"),
            ({"token_index": torch.zeros(8, dtype=torch.int64)}, ValueError, r"expected token_index of shape .*\(9,\)"),
            ({"token_index": torch.arange(9) + 3}, ValueError, "token_index below target_length = 9, got 11"),
            ({"target_mean": torch.zeros(6)}, ValueError, "expected target_mean and target_rstd together"),
            ({"backend": "cuda"}, ValueError, "expected backend None, 'triton' or 'reference', got 'cuda'"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_is_named(self, change, error, message):
        names = ("x", "w1", "b1", "w2", "b2", "target")
        arguments = dict(zip(names, make(dtype=torch.float32), strict=True)) | change
        with pytest.raises(error, match="bridge_mse: .*" + message):
            bridge_mse(**arguments)

    def test_is_named_in_a_group(self):
        x, *weights, target = make(dtype=torch.float32)
        stacks = [torch.stack([value, value]) for value in weights]
        with pytest.raises(ValueError, match=r"bridge_mse_grouped: expected xs\[1\] of shape"):
            bridge_mse_grouped([x, x[:, :4]], *stacks, target)
        with pytest.raises(ValueError, match="expected the number of targets to divide 2, got 3"):
            bridge_mse_grouped([x, x], *stacks, [target] * 3)
        with pytest.raises(ValueError, match="expected xs to hold at least one tensor, got none"):
            bridge_mse_grouped([], *stacks, target)
        with pytest.raises(ValueError, match=r"expected w1 of shape .* = \(1, 'hidden', 5\), got \(2, 7, 5\)"):
            bridge_mse_grouped([x], *stacks, target)

    def test_is_named_in_stacks(self):
        x, *weights, target = make(dtype=torch.float32)
        stacks = [[value[None], value[None]] for value in weights]
        xs, targets = [x, x], [target, target]
        assert bridge_mse_grouped(xs, *stacks, targets).shape == (2,)
        w1, b1, w2, b2 = stacks
        with pytest.raises(TypeError, match="expected b1 to be stacks like w1, got Tensor"):
            bridge_mse_grouped(xs, w1, b1[0], w2, b2, targets)
        with pytest.raises(TypeError, match="expected b2 to be a tensor, got list"):
            bridge_mse_grouped(xs, *(torch.cat(stack) for stack in stacks[:3]), b2, targets)
        with pytest.raises(ValueError, match="expected w2 of as many stacks as there are targets, 2, got 1"):
            bridge_mse_grouped(xs, w1, b1, w2[:1], b2, targets)
        with pytest.raises(ValueError, match=r"expected w1\[1\] of shape \(bridges_of_a_target, .* = \(1, 7, 5\), got"):
            bridge_mse_grouped(xs, [w1[0], torch.cat(w1)], b1, w2, b2, targets)
        with pytest.raises(ValueError, match=r"expected b1\[1\] of dtype torch.float32 like w1, got torch.bfloat16"):
            bridge_mse_grouped(xs, w1, [b1[0], b1[1].bfloat16()], w2, b2, targets)


NAMES = ("loss", "x", "w1", "b1", "w2", "b2")
SHAPES = [
    pytest.param({"length": 9}, id="below a block"),
    pytest.param({"length": 75, "d_state": 17, "hidden": 33, "width": 70}, id="odd, above two blocks"),
    pytest.param({"length": 64, "d_state": 16, "hidden": 64, "width": 64, "batch": 1}, id="exactly a block"),
    pytest.param({"length": 140, "d_state": 16, "hidden": 100, "width": 150}, id="three blocks of w2"),
    pytest.param({"length": 5, "width": 200}, id="few tokens of many channels"),
    pytest.param({"length": 140, "d_state": 20, "hidden": 132, "width": 260}, id="several tiles of products, cut off"),
    pytest.param({"length": 150, "d_state": 36, "hidden": 12, "width": 8}, id="hidden narrower than x, in whole units"),
    pytest.param({"length": 150, "d_state": 20, "hidden": 12, "width": 9}, id="hidden narrower than x"),
    pytest.param({"batch": 1, "length": 1, "d_state": 1, "hidden": 1, "width": 1}, id="ones"),
    pytest.param({"length": 0}, id="empty"),
]


@pytest.fixture(
    params=[
        "fused",
        "chunked, small",
        "chunked, float32",
        "chunked, bfloat16",
        "products, bfloat16",
        "products, float16",
    ]
)
def path(request, monkeypatch, device):
    """Run float32 bridges, all that the interpreter can do, each of the ways that bridges go, in small chunks."""
    way = request.param
    if way.startswith(("fused", "products")) and device == "cuda":
        pytest.skip("a GPU runs float32 in chunks and by cuBLAS only; TestOnGPU has the rest")
    kernels, chunked = importlib.import_module(KERNELS), importlib.import_module(CHUNKED)
    monkeypatch.setattr(kernels, "FUSED_DTYPES", (torch.float32,) if way == "fused" else ())
    monkeypatch.setattr(chunked, "CHUNK_TOKENS", 64 if way == "chunked, small" else 128)
    monkeypatch.setattr(chunked, "ONE_STEP_TOKENS", 128)
    monkeypatch.setattr(chunked, "STEP_BYTES", 0)
    if way != "chunked, small":
        monkeypatch.setattr(chunked, "BATCHED_WEIGHT", 0)
    if way.endswith("bfloat16"):
        monkeypatch.setattr(chunked, "DEFERRED_DTYPES", (torch.float32,))
    if way.endswith(("bfloat16", "float16")):
        monkeypatch.setattr(chunked, "ONE_STEP_DTYPES", ())
    if way.startswith("products"):
        monkeypatch.setattr(importlib.import_module(PRODUCTS), "DTYPES", (torch.float32,))
    return way


def made_products(monkeypatch):
    """A list that gets an entry for each bridge that goes through ``Products``."""
    products, made = importlib.import_module(PRODUCTS).Products, []
    init = products.__init__
    monkeypatch.setattr(products, "__init__", lambda self, *given: made.append(self) or init(self, *given))
    return made


def run(function, inputs, *arguments, incoming=None, **options):
    """The loss and the gradients of the inputs."""
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    loss = function(*inputs, *arguments, **options)
    incoming = torch.ones_like(loss) if incoming is None else incoming
    return [loss.detach(), *torch.autograd.grad(loss, inputs, incoming)]


def assert_close(got, want):
    for name, one, other in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(
            one, other.to(one.dtype), rtol=2e-5, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.usefixtures("path")
class TestKernels:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_agree_with_the_definition(self, shape, device):
        *inputs, target = make(dtype=torch.float32, device=device, **shape)
        incoming = torch.tensor(3.0, device=device)
        got = run(bridge_mse, inputs, target, backend="triton", incoming=incoming)
        want = run(bridge_mse_ref, [value.double() for value in inputs], target.double(), incoming=incoming.double())
        assert_close(got, want)

    def test_products_run_on_their_own_path_alone(self, path, device, monkeypatch):
        made = made_products(monkeypatch)
        *inputs, target = whole(device=device)
        bridge_mse(*inputs, target, backend="triton")
        assert bool(made) == path.startswith("products")

    def test_read_any_strides(self, device):
        x, *weights, target = whole(device=device, length=20, width=12)
        heads = torch.randn(2, 20, 3, 3, 4, device=device)  # a packed qkv: (batch, length, part, head, channel)
        views = [
            (torch.cat((x, x, x), -1)[..., 8:16], target, target),
            (torch.cat((x, x, x), -1)[..., 1:9].copy_(x), F.pad(target, (1, 3))[..., 1:-3], target),
            (
                x.transpose(1, 2).contiguous().transpose(1, 2),
                target.transpose(1, 2).contiguous().transpose(1, 2),
                target,
            ),
            (x, heads[:, :, 1].transpose(1, 2), heads[:, :, 1].flatten(2)),
            (x, heads.transpose(3, 4)[:, :, 0].transpose(2, 3).transpose(1, 2), heads[:, :, 0].flatten(2)),
            (x, heads.permute(2, 0, 3, 1, 4).contiguous()[2], heads[:, :, 2].flatten(2)),
        ]
        for view, seen, plain in views:
            got = run(bridge_mse, (view, *weights), seen, backend="triton")
            assert_close(got, run(bridge_mse_ref, (x, *weights), plain))

    @pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
    def test_mask_index_and_statistics(self, device, index_dtype):
        generator = torch.Generator(device).manual_seed(1)
        x, *weights, target = whole(device=device, length=70, width=8)
        mask = torch.rand(2, 70, generator=generator, device=device) > 0.4
        index = (torch.randperm(70, generator=generator, device=device) - 1).to(index_dtype)  # one token is left out
        mean, rstd = target.mean((0, 1)), 1 / target.std((0, 1))
        options = {"mask": mask, "token_index": index, "target_mean": mean, "target_rstd": rstd}
        want = run(bridge_mse_ref, (x, *weights), target, **options)
        counted = mask & (index >= 0)
        unseen = torch.ones(2, 70, dtype=torch.bool, device=device)
        rows, tokens = counted.nonzero(as_tuple=True)
        unseen[rows, index[tokens].long()] = False
        x = x.masked_fill(~counted.unsqueeze(-1), torch.nan)
        target = target.masked_fill(unseen.unsqueeze(-1), torch.nan)
        assert_close(run(bridge_mse, (x, *weights), target, backend="triton", **options), want)

    def test_nothing_counted_is_zero(self, device):
        *inputs, target = whole(device=device)
        mask = torch.zeros(2, 9, dtype=torch.bool, device=device)
        got = run(bridge_mse, inputs, target.fill_(torch.nan), mask=mask, backend="triton")
        assert all(not value.any() for value in got)

    def test_an_index_beyond_the_target_makes_the_loss_nan(self, device):
        *inputs, target = whole(device=device)
        index = torch.arange(9, device=device)
        assert not bridge_mse(*inputs, target, token_index=index, backend="triton").isnan()
        assert bridge_mse(*inputs, target, token_index=index + 1, backend="triton").isnan()

    @pytest.mark.parametrize("stacked", [True, False], ids=["one stack", "a stack for each target"])
    @pytest.mark.parametrize("hidden", [12, 4], ids=["wider than x", "narrower than x"])
    def test_a_group_is_its_bridges(self, hidden, stacked, device):
        sizes = {"length": 35, "hidden": hidden, "width": 12}
        cases = [whole(seed, device=device, **sizes) for seed in range(4)]
        stacks = [torch.stack([case[i] for case in cases]).requires_grad_() for i in range(1, 5)]
        xs = [case[0].clone().requires_grad_() for case in cases]
        targets = [cases[0][5], cases[1][5]]
        mask = torch.rand(4, 2, 35, generator=torch.Generator(device).manual_seed(1), device=device) > 0.4
        index = torch.stack([torch.arange(35), torch.arange(35).flip(0)] * 2).to(device)
        mean, rstd = torch.randn(2, 12, device=device), torch.rand(2, 12, device=device)
        options = {"mask": mask, "token_index": index, "target_mean": mean, "target_rstd": rstd}
        incoming = torch.tensor([1.0, 2.0, 3.0, 4.0], device=device)
        results = []
        for backend in ("triton", "reference"):
            weights = stacks if stacked else [stack.split(2) for stack in stacks]
            losses = bridge_mse_grouped(xs, *weights, targets, backend=backend, **options)
            results.append((losses, *torch.autograd.grad(losses, [*xs, *stacks], incoming)))
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)

    @pytest.mark.parametrize("hidden", [12, 4], ids=["wider than x", "narrower than x"])
    @pytest.mark.parametrize("frozen", range(5), ids=NAMES[1:])
    def test_frozen_inputs_get_nothing_and_change_nothing(self, frozen, hidden, device):
        *inputs, target = whole(device=device, hidden=hidden)
        want = run(bridge_mse_ref, inputs, target)
        inputs = [value.requires_grad_(i != frozen) for i, value in enumerate(inputs)]
        bridge_mse(*inputs, target, backend="triton").backward()
        assert inputs[frozen].grad is None
        kept = [i for i in range(5) if i != frozen]
        for i in kept:
            torch.testing.assert_close(inputs[i].grad, want[1 + i], rtol=2e-5, atol=2e-6)

    def test_without_gradients_only_the_loss_is_made(self, device):
        *inputs, target = whole(device=device)
        inputs = [value.requires_grad_() for value in inputs]
        with torch.no_grad():
            loss = bridge_mse(*inputs, target, backend="triton")
        assert not loss.requires_grad
        torch.testing.assert_close(loss, bridge_mse_ref(*inputs, target).detach())

    def test_a_retained_graph_can_be_walked_twice_but_not_differentiated(self, device):
        *inputs, target = whole(device=device)
        inputs = [value.requires_grad_() for value in inputs]
        loss = bridge_mse(*inputs, target, backend="triton")
        first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
        incoming = torch.ones_like(loss, requires_grad=True)
        (dx,) = torch.autograd.grad(loss, inputs[:1], incoming, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            dx.sum().backward()

    def test_two_runs_give_the_same_bits(self, device):
        *inputs, target = whole(device=device, length=300)
        first, second = (run(bridge_mse, inputs, target, backend="triton") for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))

    def test_compiles_as_one_graph(self, device, monkeypatch):
        # Whether the interpreter runs is a question that only this test would compile.
        monkeypatch.setattr("cab_kernels.bridge.op.choose_backend", lambda *_: "triton")
        *inputs, target = whole(device=device)
        mask = torch.arange(9, device=device).expand(2, 9) % 3 > 0
        compiled = torch.compile(bridge_mse, fullgraph=True, backend="aot_eager")
        got = run(compiled, inputs, target, mask=mask, backend="triton")
        assert_close(got, run(bridge_mse_ref, inputs, target, mask=mask))

    def test_stacks_compile_as_one_graph(self, device, monkeypatch):
        monkeypatch.setattr("cab_kernels.bridge.op.choose_backend", lambda *_: "triton")
        cases = [whole(seed, device=device) for seed in range(2)]
        inputs = [case[i].unsqueeze(0) if i else case[i] for i in range(5) for case in cases]

        def losses(*inputs):
            xs, *stacks = (inputs[i : i + 2] for i in range(0, 10, 2))
            return bridge_mse_grouped(xs, *stacks, [case[5] for case in cases], backend="triton").sum()

        got = run(torch.compile(losses, fullgraph=True, backend="aot_eager"), inputs)
        want = [run(bridge_mse_ref, case[:5], case[5]) for case in cases]
        torch.testing.assert_close(got[0], want[0][0] + want[1][0], rtol=2e-5, atol=2e-6)
        for i, gradient in enumerate(got[1:]):
            torch.testing.assert_close(gradient.view_as(want[i % 2][1 + i // 2]), want[i % 2][1 + i // 2])

    def test_float16_keeps_the_gradients_of_x_themselves(self, device):
        """In float32, where other dtypes keep dz and make them of it."""
        kernels = importlib.import_module(KERNELS)
        kept, totals = torch.randn(1, 2, 70, 20, device=device), torch.zeros(0, device=device)
        incoming, factor, w1 = torch.ones(1, device=device), torch.tensor([0.5], device=device), torch.ones(1, 12, 20)
        given = (incoming, factor, kept, totals, w1.to(device), 9, torch.float16, torch.float16, kernels.NEEDS_X)
        (dx,) = kernels._backward(*given, retained=False)
        assert torch.equal(dx, (0.5 * kept).half())

    def test_the_last_walk_of_a_graph_needs_no_second_place_for_dx(self, path, device):
        *inputs, target = whole(device=device, hidden=4, length=200)
        x = inputs[0].requires_grad_()
        loss = bridge_mse(*inputs, target, backend="triton")
        function, _ = loss.grad_fn.next_functions[0]
        places = {value.untyped_storage().data_ptr() for value in function.saved_tensors}
        (first,) = torch.autograd.grad(loss, x, retain_graph=True)
        (last,) = torch.autograd.grad(loss, x)
        assert first.untyped_storage().data_ptr() not in places
        assert (last.untyped_storage().data_ptr() in places) == (not path.endswith("bfloat16"))
        assert torch.equal(first, last)

    @pytest.mark.parametrize("channels_first", [False, True], ids=["channels last", "channels first"])
    def test_ops_are_what_they_declare(self, channels_first, device):
        kernels = importlib.import_module(KERNELS)
        x, w1, b1, w2, b2, target = whole(device=device)
        x = x.transpose(1, 2).contiguous().transpose(1, 2) if channels_first else x
        weights = [[torch.stack((value, value))] for value in (w1, b1, w2, b2)]
        arguments = ([x, x], *weights, [target], None, None, None, None, torch.float32, 31)
        torch.library.opcheck(torch.ops.cab_kernels.bridge_mse.default, arguments)
        loss, *saved = kernels._forward(*arguments)
        sizes = (weights[0][0], target.shape[2], torch.float32, torch.float32)
        torch.library.opcheck(torch.ops.cab_kernels.bridge_mse_backward.default, (loss, *saved, *sizes, 31))


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 1.225), (torch.bfloat16, 0.695)], ids=["float32", "bfloat16"]
)
def test_memory_is_gradients_and_little_else(dtype, most, monkeypatch):
    """GiB, of twelve bridges of 768: in float32 1.125 for dx and 0.053 for the weights' gradients."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "bench")
    memory = importlib.import_module("memory_vs_fullmatrix")
    size = memory.GPT2
    layer = functools.partial(memory.bridge_layer, size, 32, 1024, dtype, "cpu", memory.our_bridge)
    assert memory.peak(layer, size.layers, "cpu") <= most * 2**30


def test_splits_fill_the_gpu():
    choose = importlib.import_module(FUSED).choose_splits
    assert choose(4, 394, 264, 1000) == 66  # one round of programs, 6 blocks each
    assert choose(4, 394, 264, 40) == 40
    assert choose(1, 1, 264, 1000) == 1
    assert choose(2000, 5, 264, 0) == 1


def test_chunks_are_full_rounds_of_tiles():
    choose = functools.partial(importlib.import_module(CHUNKED).choose_chunk, processors=132, rows=64)
    half, single = torch.bfloat16, torch.float32
    passes, products = {"small": False, "one_step": False}, {"small": False, "one_step": True}
    # 128 * 3 tiles of 128 x 256: 3 rounds
    assert choose(32768, 2 * 768 * 2, 768, half, **passes) == (16384, 16384)
    assert choose(8192, 2 * 2048 * 2, 2048, half, **passes) == (8192, 4096)
    assert choose(8192, 2 * 2048 * 2, 2048, half, **products) == (8192, 8192)
    # as few as may be
    assert choose(25216, 4 * (3 * 128 + 192) * 4, 4 * 192, single, small=True, one_step=True) == (13952, 13952)
    assert choose(32768, 2 * 768 * 4, 768, single, **products) == (5504, 5504)  # 43 * 3 tiles: one round
    assert choose(32768, 2 * 1024 * 4, 1024, single, **products) == (4096, 4096)  # 32 * 4 tiles, not twice as many
    assert choose(0, 100, 16, half, **passes) == (17408, 128)


def eager(x, w1, b1, w2, b2, target):
    return F.mse_loss(F.linear(F.silu(F.linear(x, w1, b1)), w2, b2), target)


def autocast(function, dtype):
    def call(*arguments, **options):
        with torch.autocast("cuda", dtype):
            return function(*arguments, **options)

    return call


@pytest.mark.gpu
class TestOnGPU:
    @pytest.mark.parametrize("noise", [None, 0.01], ids=["at the start", "near convergence"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
    @pytest.mark.parametrize(
        "shape",
        [(591, 16, 128, 192), (64, 24, 64, 200), (315, 64, 128, 384), (65, 128, 128, 1024), (63, 192, 128, 64),
         (1182, 16, 256, 768), (600, 192, 768, 768), (8191, 16, 128, 192), (512, 2048, 2048, 2048), (65, 16, 4096, 64)],
        ids=str,
    )  # fmt: skip
    def test_errs_less_than_autocast(self, shape, dtype, noise):
        tokens, d_state, hidden, width = shape
        *inputs, target = make(
            batch=1, length=tokens, d_state=d_state, hidden=hidden, width=width, dtype=torch.float32, device="cuda"
        )
        inputs[0] = inputs[0].to(dtype)
        if noise:
            hidden_layer = F.silu(F.linear(inputs[0].float(), *inputs[1:3]))
            target = F.linear(hidden_layer, *inputs[3:5]) + noise * target
        target = target.to(dtype)
        scale = torch.tensor(2.0**16 if dtype == torch.float16 else 1.0, device="cuda")
        truth = run(bridge_mse_ref, [value.double() for value in inputs], target.double(), incoming=scale.double())
        plain = run(autocast(eager, dtype), inputs, target, incoming=scale)
        ours = run(autocast(bridge_mse, dtype), inputs, target, incoming=scale)
        for name, exact, theirs, got in zip(NAMES, truth, plain, ours, strict=True):
            error, allowed = ((value.double() - exact).norm() / exact.norm() for value in (got, theirs))
            # The loss is one number, whose error may happen to be nothing: it gets a small part of a rounding.
            slack = torch.finfo(dtype).eps / 16 if name == "loss" else 0
            assert error <= 1.1 * allowed + slack, name

    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_float32_honours_the_matmul_precision(self, precision):
        *inputs, target = make(dtype=torch.float32, device="cuda", length=600, d_state=16, hidden=128, width=192)
        truth = run(bridge_mse_ref, [value.double() for value in inputs], target.double())
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            ours, plain = run(bridge_mse, inputs, target), run(eager, inputs, target)
        finally:
            torch.set_float32_matmul_precision(before)
        for name, exact, theirs, got in zip(NAMES[1:], truth[1:], plain[1:], ours[1:], strict=True):
            error, allowed = ((value.double() - exact).norm() / exact.norm() for value in (got, theirs))
            assert error <= 1.1 * allowed + 1e-7, name
            assert (error > 1e-5) == (precision == "high"), name

    @pytest.mark.parametrize("path", ["fused", "chunked"])
    def test_memory_is_gradients_and_buffers(self, path):
        sizes = (
            {"d_state": 16, "hidden": 128, "width": 192}
            if path == "fused"
            else {"d_state": 64, "hidden": 1024, "width": 1024}
        )
        peaks = []
        for length in (256, 1024, 4096):
            *inputs, target = make(batch=65536 // length, length=length, dtype=torch.bfloat16, device="cuda", **sizes)
            inputs = [value.requires_grad_() for value in inputs]
            bridge_mse(*inputs, target)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            loss = bridge_mse(*inputs, target)
            peaks.append(torch.cuda.max_memory_allocated() - before)
            del loss
        one_tensor = 65536 * min(sizes["hidden"], sizes["width"]) * 2
        dx = 65536 * sizes["d_state"] * 2
        buffers = 40 * 2**20 if path == "fused" else 100 * 2**20
        assert peaks[0] == peaks[1] == peaks[2]
        assert peaks[0] < dx + buffers
        assert path == "chunked" or peaks[0] - dx < one_tensor * 2.5

    def test_a_hundred_runs_give_the_same_bits(self):
        *inputs, target = make(
            dtype=torch.bfloat16, device="cuda", batch=8, length=591, d_state=16, hidden=128, width=192
        )
        first = run(bridge_mse, inputs, target)
        for _ in range(99):
            again = run(bridge_mse, inputs, target)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))

    def test_large_bridges_run_as_products_on_a_hopper_gpu(self, monkeypatch):
        made = made_products(monkeypatch)
        sizes = {"length": 200, "d_state": 768, "hidden": 768, "width": 768}
        bridge_mse(*make(dtype=torch.bfloat16, device="cuda", **sizes))
        assert bool(made) == (torch.cuda.get_device_capability()[0] == 9)

    @pytest.mark.parametrize(
        ("d_state", "hidden", "width"),
        [(16, 128, 192), (16, 768, 192), (768, 768, 768)],
        ids=["fused", "chunked, small", "products"],
    )
    def test_replays_as_a_cuda_graph(self, d_state, hidden, width):
        sizes = {"length": 200, "d_state": d_state, "hidden": hidden, "width": width}
        *inputs, target = make(dtype=torch.bfloat16, device="cuda", **sizes)
        inputs = [value.requires_grad_() for value in inputs]

        def step():
            loss = bridge_mse(*inputs, target)
            return [loss, *torch.autograd.grad(loss, inputs)]

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            target.copy_(torch.randn_like(target))
            inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        assert all(torch.equal(one, other) for one, other in zip(captured, step(), strict=True))

    def test_offsets_beyond_two_to_the_31(self):
        tokens = 2**31 // 192 + 100
        x, *weights, _ = make(batch=1, length=1, dtype=torch.bfloat16, device="cuda", d_state=16, hidden=64, width=192)
        target = torch.zeros(tokens, 192, dtype=torch.bfloat16, device="cuda")
        target[-64:] = 1
        x = x[0].expand(tokens, 16)
        index = torch.full((tokens,), -1, device="cuda")
        index[:64] = torch.arange(tokens - 64, tokens, device="cuda")
        got = bridge_mse(x, *weights, target, token_index=index)
        torch.testing.assert_close(got, bridge_mse(x[:64], *weights, target[-64:]))


FLAGS = {"HAS_MASK": True, "HAS_INDEX": True, "HAS_HEADS": True, "HAS_STATISTICS": True}
BLOCKS = {"BLOCK_TOKENS": 128, "BLOCK_STATE": 16, "BLOCK_HIDDEN": 128, "BLOCK_WIDTH": 64, "NVIDIA_BF16": True}
ROWS = {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64}
TYPES = {
    "*fp32": "w1 b1 w2 b2 mean rstd partials inner outer squares totals loss factor incoming db1 db2 out_w1 out_b1 "
    "out_w2 out_b2",
    "*bf16": "x dx out_x out z h r dh dz",
    "*i32": "counts",
    "*i1": "mask",
    "*i64": "index",
}


def spec(module, kernel, constexprs, **options):
    """A kernel's types by the names of its arguments: pointers end in _ptr, all else is a size or a stride."""
    names = importlib.import_module(module).__dict__[kernel].arg_names
    types = {f"{name}_ptr": kind for kind, group in TYPES.items() for name in group.split()}
    signature = {name: types.get(name, "i32") for name in names} | {"xs": ["*bf16"] * 4, "targets": ["*bf16"] * 2}
    weights = {"w1s": "*fp32", "b1s": "*fp32", "w2s": "*bf16", "b2s": "*fp32"}
    signature |= {name: [kind] * 2 for name, kind in weights.items() if name in names}
    options = {"num_warps": 4, "num_stages": 3} | options
    return {
        "module": module, "kernel": kernel, "signature": signature, "constexprs": constexprs, "options": options,
    }  # fmt: skip


def test_fused_kernels_compile_for_gpus_that_are_not_here(compile_offline):
    tiles = {"num_warps": 8, "num_stages": 1}
    nothing = {"mask_ptr": None, "index_ptr": None, "mean_ptr": None, "rstd_ptr": None} | dict.fromkeys(FLAGS, False)
    gradients, nobody = {"NEEDS_X": True, "NEEDS_W1": True}, {"NEEDS_X": False, "NEEDS_W1": False}
    outer = BLOCKS | {"STAGES": 1, "BLOCK_TOKENS": 64}
    log = compile_offline(
        [
            spec(FUSED, "_bridge_inner_kernel", FLAGS | BLOCKS | gradients | {"STAGES": 1}, **tiles),
            spec(FUSED, "_bridge_inner_kernel", nothing | BLOCKS | nobody | {"STAGES": 1}, **tiles),
            spec(FUSED, "_bridge_outer_kernel", FLAGS | outer, num_warps=4, num_stages=1),
        ]
    )
    assert log.count("sm_90") == 3
    # As a Hopper GPU runs them, with the next blocks fetched ahead.
    hopper = [
        spec(FUSED, "_bridge_inner_kernel", FLAGS | BLOCKS | gradients | {"STAGES": 3}, **tiles),
        spec(FUSED, "_bridge_outer_kernel", nothing | outer | {"STAGES": 3}, num_warps=4, num_stages=1),
    ]
    assert compile_offline([kernel | {"capabilities": [90]} for kernel in hopper]).count("sm_90") == 2


@pytest.mark.parametrize("kernel", ["_bridge_outer_kernel", "_bridge_inner_kernel"])
def test_what_comes_next_is_fetched_ahead(kernel, compile_offline):
    """Even what an index points to: x and the target of the next tokens, or the next blocks of w2 and of the target."""
    tiling = importlib.import_module(FUSED).OUTER if "outer" in kernel else importlib.import_module(FUSED).INNER
    constexprs = {"mask_ptr": None, "mean_ptr": None, "rstd_ptr": None} | dict.fromkeys(FLAGS, False) | BLOCKS
    constexprs |= {"HAS_INDEX": True, "BLOCK_TOKENS": tiling.tokens, "STAGES": tiling.stages}
    constexprs |= {"stride_x_state": 1, "stride_target_dim": 1}
    if "inner" in kernel:
        constexprs |= {"NEEDS_X": True, "NEEDS_W1": True}
    ahead = spec(FUSED, kernel, constexprs, num_warps=tiling.warps, num_stages=1)
    aligned = [name for name in ahead["signature"] if name not in constexprs and name != "length"]
    log = compile_offline([ahead | {"capabilities": [90], "aligned": aligned}])
    waits = [int(count) for count in log.rpartition("waits ")[2].split()]
    assert max(waits) >= 2, waits


def test_other_kernels_compile_for_gpus_that_are_not_here(compile_offline):
    log = compile_offline(
        [
            spec(SUMS, "_bridge_reduce_kernel", {"BLOCK": 128, "BLOCK_SPLITS": 64, "BLOCK_PARTS": 1024}),
            spec(SUMS, "_bridge_scale_kernel", {"BLOCK": 1024}),
            spec(CHUNKED, "_chunk_x_kernel", ROWS | {"HAS_MASK": True, "HAS_INDEX": True}),
            spec(PASSES, "_pass_silu_kernel", ROWS | {"NVIDIA_BF16": True}),
            spec(PASSES, "_pass_residual_kernel", FLAGS | ROWS),
            spec(PASSES, "_pass_slope_kernel", ROWS | {"NVIDIA_BF16": True}),
        ]
    )
    assert log.count("sm_90") == 6


def test_two_programs_of_a_product_fit_on_a_hopper_gpu(compile_offline):
    products = importlib.import_module(PRODUCTS)
    rows, columns = products.Products.ROWS, products.Products.COLUMNS
    blocks = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": products.DEPTH, "STAGES": products.STAGES}
    blocks_of = {"left": (rows, products.DEPTH), "right": (columns, products.DEPTH), "read": (rows, columns)}
    left, right, read = (f"tensordesc<bf16{list(block)}>" for block in blocks_of.values())
    swapped, out = (f"tensordesc<bf16{block}>" for block in ([products.DEPTH, columns], [rows, columns // 4]))
    slope, slope_read = (kind.replace("bf16", "fp16") for kind in (out, read))
    nothing = {"mask_ptr": None, "index_ptr": None, "mean_ptr": None, "rstd_ptr": None} | dict.fromkeys(FLAGS, False)
    cases = [
        ("_product_silu_kernel", {"x": left, "w1": right, "slope": slope, "h": out}, {"NVIDIA_BF16": True}),
        ("_product_residual_kernel", {"h": left, "w2": right, "r": out, "target": read}, nothing | {"IS_MATRIX": True}),
        (
            "_product_residual_kernel",
            {"h": left, "w2": right, "r": out, "target": "*bf16"},
            FLAGS | {"IS_MATRIX": False, "stride_target_dim": 1},
        ),
        ("_product_slope_kernel", {"r": left, "w2": swapped, "slope": slope_read, "dz": out}, {}),
    ]
    specs = [spec(PRODUCTS, kernel, blocks | flags, num_stages=products.STAGES) for kernel, _, flags in cases]
    for one, (_, types, _) in zip(specs, cases, strict=True):
        one["signature"] |= types
        aligned = [
            name
            for name, kind in one["signature"].items()
            if name not in one["constexprs"] and "tensordesc" not in kind
        ]
        one |= {"capabilities": [90], "aligned": aligned}
    log = compile_offline(specs)
    most = [int(line.split()[0]) for line in log.split("shared ")[1:]]
    assert len(most) == len(cases)
    assert all(products.PROGRAMS * (shared + 1024) <= 228 * 1024 for shared in most), most
