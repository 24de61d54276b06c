"""Compiles kernels for GPUs that are not here. A process of its own: the tests' own process may be interpreting.

    python compile_offline.py SPEC.json

SPEC.json is a list of {"module", "kernel", "signature", "constexprs", "options"}, as Triton's ``ASTSource`` takes them;
each is compiled for its "capabilities", or all of ``CAPABILITIES``, and a line is printed for each that compiled.
Arguments that are "aligned" are multiples of 16, as most are when launched. A line ends with how many bytes of shared
memory the kernel takes, and how many later fetches may still be under way at each of its waits for memory that is
fetched ahead.
"""

import importlib
import json
import os
import re
import sys

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = (80, 90, 100)


def compile_kernel(spec: dict, capability: int) -> tuple[int, list[str]]:
    kernel = getattr(importlib.import_module(spec["module"]), spec["kernel"])
    types = {name: tuple(kind) if isinstance(kind, list) else kind for name, kind in spec["signature"].items()}
    signature = {name: "constexpr" if name in spec["constexprs"] else types[name] for name in kernel.arg_names}
    attrs = {}
    for at, name in enumerate(kernel.arg_names):
        if name in spec.get("aligned", ()):
            paths = [(at, i) for i in range(len(types[name]))] if isinstance(types[name], tuple) else [(at,)]
            attrs |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(fn=kernel, signature=signature, constexprs=spec["constexprs"], attrs=attrs)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=spec["options"])
    return compiled.metadata.shared, re.findall(r"async_wait .*?num = (\d+)", compiled.asm["ttgir"])


def main() -> None:
    with open(sys.argv[1]) as file:
        specs = json.load(file)
    for spec in specs:
        for capability in spec.get("capabilities", CAPABILITIES):
            shared, waits = compile_kernel(spec, capability)
            name = f"{spec['module']}:{spec['kernel']} sm_{capability} {spec['constexprs']}"
            print(f"{name} shared {shared} waits {' '.join(waits)}")


if __name__ == "__main__":
    main()
