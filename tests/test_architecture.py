"""Data flows one way, and importing costs nothing that is not used."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Module -> the project's modules that it may import (a prefix stands for all below it).
ALLOWED = {
    "cab_kernels": ["cab_kernels"],
    "cab.layer_map": [],
    "cab.logits": [],
    "cab.refusal": ["cab.config"],
    "cab.token_map": [],
    "cab.zero": [],
    "cab.config": [],
    "cab.files": [],
    "cab.images": [],
    "cab.packing": [],
    "cab.patches": [],
    "cab.placement": [],
    "cab.processes": ["cab.config", "cab.zero"],
    "cab.presets": ["cab.config"],
    "cab.settings": ["cab.config", "cab.presets"],
    "cab.bridge": ["cab_kernels"],
    "cab.students": [
        "cab.logits",
        "cab.packing",
        "cab.patches",
        "cab.placement",
        "cab.students",
        "cab.token_map",
        "cab_kernels",
    ],
    "cab.teachers": [
        "cab.images",
        "cab.logits",
        "cab.patches",
        "cab.placement",
        "cab.teachers",
        "cab.token_map",
        "cab_kernels",
    ],
    "cab.distill": [
        "cab.bridge",
        "cab.distill",
        "cab.images",
        "cab.layer_map",
        "cab.packing",
        "cab.processes",
        "cab.students.student",
        "cab.teachers",
        "cab.token_map",
        "cab_kernels",
    ],
    "cab.data": ["cab.config", "cab.data", "cab.files"],
}
# On top, free to import anything below them; nothing above imports them.
TOP = {"cab", "cab.__main__", "cab.build", "cab.cli", "cab.graphed", "cab.report", "cab.trainer"} | {
    "cab.callbacks",
    "cab.export",
    "cab.language_run",
    "cab.positions",
    "cab.recall",
    "cab.recipe",
    "cab.run",
    "cab.task_options",
    "cab.vision_run",
}

MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("cab", "cab_kernels")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(path: pathlib.Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
    return names


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


@pytest.mark.parametrize("module", sorted(MODULES.keys() - TOP))
def test_layer(module: str) -> None:
    owner = max((layer for layer in ALLOWED if below(module, layer)), key=len, default=None)
    assert owner, f"{module} has no layer: add it to the table, here and in CONTRIBUTING.md"
    project = {name for name in imported(MODULES[module]) if below(name, "cab") or below(name, "cab_kernels")}
    refused = {name for name in project if not any(below(name, allowed) for allowed in ALLOWED[owner])}
    assert not refused, f"{module} must not import {sorted(refused)}"


@pytest.mark.parametrize("module", sorted(name for name in MODULES if below(name, "cab_kernels")))
def test_triton_is_imported_by_kernels_only(module: str) -> None:
    at_module_level = {
        name
        for node in ast.parse(MODULES[module].read_text()).body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    holds_kernels = module.endswith("kernels") and "." in module
    assert holds_kernels or not any(below(str(name), "triton") for name in at_module_level)


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_import_and_run_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch
import cab_kernels
u = torch.randn(1, 2, 3)
out = cab_kernels.selective_scan_fn(u, u, -torch.ones(2, 4), torch.ones(2, 4), torch.ones(2, 4))
print(tuple(out.shape), all(hasattr(cab_kernels, name) for name in cab_kernels.__all__))
"""
    assert run_python(code).strip() == "(1, 2, 3) True"


def test_importing_cab_loads_no_model_library() -> None:
    code = "import sys, cab; print([m for m in ('timm', 'transformers', 'torch') if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_public_names_are_sorted() -> None:
    import cab_kernels

    assert cab_kernels.__all__ == sorted(cab_kernels.__all__)


def test_one_version() -> None:
    """The version is written in pyproject.toml; the citation must not fall behind it."""

    def version(name: str, prefix: str) -> str:
        lines = (ROOT / name).read_text().splitlines()
        return next(line.removeprefix(prefix).strip(' "') for line in lines if line.startswith(prefix))

    assert version("CITATION.cff", "version:") == version("pyproject.toml", "version =")
