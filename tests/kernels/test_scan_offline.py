"""The kernels of the selective scan compile for GPUs that are not here."""

import pytest

pytest.importorskip("triton")

MODULE = "cab_kernels.scan.kernels"
FWD_ABSENT = ("D_ptr", "z_ptr", "delta_bias_ptr", "initial_state_ptr", "cu_seqlens_ptr", "strides_z")
BWD_ABSENT = (*FWD_ABSENT, "dD_ptr", "dz_ptr", "ddelta_bias_ptr", "dinitial_state_ptr", "dlast_state_ptr", "strides_dz")
STRIDES = ["i64"] * 3


def spec(kernel: str, options_on: bool, constant: bool, tile: tuple[int, int]) -> dict:
    """All options on, or all off and every gradient of an absent input too."""
    activations = ("u", "delta", "z", "out", "dout", "du", "ddelta", "dz", "B", "C")
    pointers = [*activations, "A", "D", "delta_bias", "initial_state", "last_state", "dlast_state", "befores", "states"]
    pointers += [f"d{name}" for name in ("A", "B", "C", "D", "delta_bias", "initial_state")]
    signature = {f"{name}_ptr": "*bf16" if name in activations else "*fp32" for name in pointers}
    signature |= {"cu_seqlens_ptr": "*i32"}
    signature |= {f"strides_{name}": STRIDES for name in activations}
    signature |= {f"strides_{name}": STRIDES[:2] if constant else [*STRIDES, "i64"] for name in ("B", "C")}
    signature |= dict.fromkeys(("length", "dim", "dstate", "groups", "befores"), "i32")
    constexprs = {"DELTA_SOFTPLUS": options_on, "REVERSE": options_on, "CONSTANT_B": constant, "CONSTANT_C": constant}
    constexprs |= {"BLOCK_DIM": tile[0], "BLOCK_DSTATE": tile[1]}
    backward = kernel == "_selective_scan_bwd_kernel"
    if backward:
        constexprs["CHUNK"] = 64
    if not options_on:
        constexprs |= dict.fromkeys(BWD_ABSENT if backward else FWD_ABSENT)
    return {
        "module": MODULE,
        "kernel": kernel,
        "signature": signature,
        "constexprs": constexprs,
        "options": {"num_warps": 1, "enable_fp_fusion": True},
    }


def test_compiles_for_sm_80_90_and_100(compile_offline):
    kernels = ("_selective_scan_fwd_kernel", "_selective_scan_bwd_kernel")
    specs = [spec(kernel, True, False, (32, 16)) for kernel in kernels]
    specs += [spec(kernel, False, True, (2, 256)) for kernel in kernels]
    log = compile_offline(specs)
    assert len(log.splitlines()) == 3 * len(specs)
