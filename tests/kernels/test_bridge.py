import pytest
import torch
import torch.nn.functional as F

from cab_kernels import bridge_mse, bridge_mse_grouped, bridge_mse_grouped_ref, bridge_mse_ref


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
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"x": 1.0}, TypeError, "expected x to be a tensor, got float"),
            ({"x": torch.zeros(2, 9, 4)}, ValueError, r"expected w1 of shape .* = \(7, 4\), got \(7, 5\)"),
            ({"w2": torch.zeros(6, 8)}, ValueError, r"expected w2 of shape \(width, hidden\) = \(6, 7\), got \(6, 8\)"),
            ({"b2": torch.zeros(6, dtype=torch.int64)}, TypeError, "expected b2 of dtype .*, got int64"),
            ({"target": torch.zeros(2, 8, 6)}, ValueError, r"expected target of shape .* = \(2, 9, 6\), got"),
            ({"target": torch.zeros(2, 3, 9, 4)}, ValueError, r"with heads \* head_dim = 6, got 3 \* 4"),
            ({"target": torch.zeros(9, 6)}, ValueError, r"expected target of shape .*, got \(9, 6\)"),
            ({"mask": torch.ones(2, 9)}, TypeError, "expected mask of dtype bool, got float32"),
            ({"token_index": torch.zeros(8, dtype=torch.int64)}, ValueError, r"expected token_index of shape .*\(9,\)"),
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
