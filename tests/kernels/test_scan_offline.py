"""The kernels of the selective scan compile for GPUs that are not here."""

import importlib
import inspect

import pytest

pytest.importorskip("triton")

from cab_kernels.scan.launch_kernels import PAD
from cab_kernels.scan.tilings import BACKWARD, IN_WORDS, NARROW, TILINGS, Tiling

ACTIVATIONS = ("u", "delta", "z", "before", "out", "dout", "du", "ddelta", "dz")
ABSENT = ("D", "z", "delta_bias", "initial", "cu_seqlens", "before", "last", "dlast", "start")
ABSENT += ("dD", "dz", "dbias", "dinitial")
# Of a bidirectional scan, these come in pairs.
PAIRS = ("u", "delta", "out", "du", "ddelta", "dz", "A", "B", "C", "D", "delta_bias")
KERNELS = {
    "forward": ("_selective_scan_fwd_kernel", "_pack_kernel"),
    "states": ("_sweep_kernel", "_chain_kernel"),
    "backward": ("_selective_scan_bwd_kernel", "_sum_rows_kernel", "_sum_parts_kernel"),
}


def spec(
    module: str, kernel: str, *, options_on: bool, tiling: Tiling, aligned: bool, native: bool, both: bool = False
) -> dict:
    """All options on and B and C variable, or all options off and B and C constant; ``both`` directions, or one."""
    module = f"cab_kernels.scan.{module}_kernels"
    names = list(inspect.signature(getattr(importlib.import_module(module), kernel).fn).parameters)
    values = {name: getattr(tiling, name) for name in ("S", "R", "NT", "STEPS", "PARTS")}
    values |= {"PAD": PAD, "N": tiling.S * tiling.NT, "BLOCK": 16, "AT_ONCE": 8, "ROWS": 8, "NATIVE": native}
    values |= {"ORDERS": tiling.orders}
    values |= dict.fromkeys(("B_BY_STEP", "dB_BY_STEP"), options_on) | dict.fromkeys(("C_BY_STEP", "dC_BY_STEP"), False)
    values |= dict.fromkeys(("SOFTPLUS", "SPLIT", "ADJOINT", "BACKWARD"), options_on)
    values |= {"REVERSE": options_on and not both}
    values |= {"LOCAL": not options_on}
    values |= {"BOTH": both, "SECOND": options_on and not both}
    for name in ACTIVATIONS:
        values[f"ALIGNED_{name.upper()}"] = aligned
        values[f"STRIDE_{name.upper()}"] = (-1 if options_on and not both else 1) * (1 if aligned else 96)
    if options_on and kernel != "_pack_kernel":  # B and C vary, and are read from what _pack_kernel made of them
        values |= {"B_ptr": None, "C_ptr": None}
    if not options_on:
        values |= {f"{name}_ptr": None for name in ABSENT}
    if both:  # as they come with options of their own
        values |= {f"{name}_ptr": None for name in ("initial", "cu_seqlens", "before", "last", "dlast", "dinitial")}
    signature = {}
    for name in names:
        if name.startswith("strides_"):
            signature[name] = ["i64"] * (4 if name in ("strides_B", "strides_C", "strides_dB", "strides_dC") else 2)
        elif name.endswith("_ptr"):
            kind = "*bf16" if name.removesuffix("_ptr") in ACTIVATIONS else "*fp32"
            pairs = PAIRS + (("dB", "dC") if kernel == "_sum_rows_kernel" else ())
            signature[name] = [kind, kind] if both and name.removesuffix("_ptr") in pairs else kind
        else:
            signature[name] = "i32"
    signature["cu_seqlens_ptr"] = "*i32"
    return {
        "module": module,
        "kernel": kernel,
        "signature": signature,
        "constexprs": {name: value for name, value in values.items() if name in names},
        "options": {"num_warps": 1, "num_stages": 1, "enable_fp_fusion": True},
    }


# Each way to read memory, with the instructions of NVIDIA GPUs and with what stands in for them.
VARIANTS = [
    {"options_on": True, "tiling": TILINGS[16], "aligned": False, "native": True},
    {"options_on": False, "tiling": IN_WORDS[4], "aligned": True, "native": True},
    {"options_on": True, "tiling": TILINGS[4], "aligned": True, "native": False},
    {"options_on": True, "tiling": TILINGS[16], "aligned": False, "native": True, "both": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_for_sm_80_90_and_100(compile_offline, variant):
    specs = [spec(module, kernel, **variant) for module, kernels in KERNELS.items() for kernel in kernels]
    log = compile_offline(specs)
    assert len(log.splitlines()) == 3 * len(specs)


@pytest.mark.parametrize(("module", "tiling"), [("forward", NARROW), ("backward", BACKWARD[64])], ids=str)
def test_compiles_with_a_tiling_of_its_own(compile_offline, module, tiling):
    one = spec(module, KERNELS[module][0], options_on=True, tiling=tiling, aligned=False, native=True)
    assert len(compile_offline([one]).splitlines()) == 3
