"""The bridge loss: its definition, its errors, and its kernels, each path, against the definition."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from bridge_cases import CHUNKED, KERNELS, NAMES, PRODUCTS, made_products, make, run, whole
from torch._subclasses.fake_tensor import FakeTensorMode

from cab_kernels import bridge_mse, bridge_mse_grouped, bridge_mse_grouped_ref, bridge_mse_ref


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
