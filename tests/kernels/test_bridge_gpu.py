"""What the bridge loss' kernels do only on a GPU: low precision, memory, graphs, large sizes."""

import pytest
import torch
import torch.nn.functional as F
from bridge_cases import NAMES, made_products, make, run

from cab_kernels import bridge_mse, bridge_mse_ref


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
