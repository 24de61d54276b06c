"""Q and K out of a packed qkv, against a copy of as many bytes and against plain PyTorch.

    pytest bench/test_qk.py --benchmark-only -p no:xdist -o addopts=""

Each time is of EACH calls in one replay of a CUDA graph. Bytes: Q and K read once and written once, 4 * tokens * width
values; the copy moves the same.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cab_kernels import Rope, extract_qk, extract_qk_ref

EACH = 16
CASES = {  # batch, tokens, heads, head_dim
    "DeiT-Tiny": (128, 197, 3, 64),
    "DeiT-Base": (128, 197, 12, 64),
    "GPT-2": (32, 1024, 12, 64),
    "Phi": (4, 2048, 32, 64),
}
KINDS = ("moved", "reversed", "rotated", "half rotated")

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(scope="module", autouse=True)
def headed(report: Callable[[str], None]) -> None:
    report("| case | what | us | of a copy's speed | TB/s | plain PyTorch us |\n|---|---|---|---|---|---|")


def options(kind: str, tokens: int, head_dim: int) -> dict[str, object]:
    if kind == "reversed":
        return {"token_index": torch.arange(tokens, device="cuda").flip(0)}
    if kind == "moved":
        return {}
    half = head_dim // (2 if kind == "rotated" else 4)
    angles = torch.arange(tokens, device="cuda")[:, None] * 0.7 ** torch.arange(half, device="cuda")
    return {"rope": Rope(angles.cos(), angles.sin())}


def milliseconds(function: Callable[[], object]) -> float:
    """Median of a call, from replays of a graph of EACH calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(EACH):
            function()
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / EACH)
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_packed(benchmark, case: str, kind: str, report: Callable[[str], None]) -> None:
    batch, tokens, heads, head_dim = CASES[case]
    source = torch.randn(batch, tokens, 3 * heads * head_dim, device="cuda").bfloat16()
    kwargs = options(kind, tokens, head_dim)
    for got, want in zip(
        extract_qk(source, num_heads=heads, **kwargs), extract_qk_ref(source, num_heads=heads, **kwargs), strict=True
    ):
        if (got - want).abs().max() > 2**-7 * want.abs().max():
            pytest.fail("extract_qk disagrees with its definition: no figures")
    moved = 2 * batch * tokens * heads * head_dim * 2
    one, other = (torch.empty(moved // 2, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = milliseconds(lambda: other.copy_(one))
    ours = milliseconds(lambda: extract_qk(source, num_heads=heads, **kwargs))
    plain = milliseconds(lambda: extract_qk_ref(source, num_heads=heads, **kwargs))
    us, of_copy, rate = 1e3 * ours, copy / ours, 2 * moved / ours / 1e9
    report(f"| {case} | {kind} | {us:.1f} | {of_copy:.2f} | {rate:.2f} | {1e3 * plain:.1f} |")
    benchmark.extra_info |= {"us": us, "of_copy": of_copy, "tb_per_s": rate, "plain_us": 1e3 * plain}
    benchmark.pedantic(lambda: extract_qk(source, num_heads=heads, **kwargs), rounds=5)
