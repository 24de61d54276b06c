"""Compiles kernels for GPUs that are not here. A process of its own: the tests' own process may be interpreting.

    python compile_offline.py SPEC.json

SPEC.json is a list of {"module", "kernel", "signature", "constexprs", "options"}, as Triton's ``ASTSource`` takes them;
each is compiled for its "capabilities", or all of ``CAPABILITIES``, and a line is printed for each that compiled.
"""

import importlib
import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)


def compile_kernel(spec: dict, capability: int) -> None:
    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    types = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in spec["signature"].items()}
    signature = {name: "constexpr" if name in spec["constexprs"] else types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=spec["constexprs"])
    triton.compile(source, target=GPUTarget("cuda", capability, 32), options=spec["options"])


def main() -> None:
    with open(sys.argv[1]) as file:
        specs = json.load(file)
    for spec in specs:
        for capability in spec.get("capabilities", CAPABILITIES):
            compile_kernel(spec, capability)
            print(f"{spec['module']}:{spec['kernel']} sm_{capability} {spec['constexprs']}")


if __name__ == "__main__":
    main()
