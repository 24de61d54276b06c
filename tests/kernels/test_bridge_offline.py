"""The kernels of the bridge loss compile for GPUs that are not here, and sizes and memory are chosen well."""

import functools
import importlib
from pathlib import Path

import pytest
import torch
from bridge_cases import CHUNKED, FUSED, PASSES, PRODUCTS, SUMS

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
