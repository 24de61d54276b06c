"""A student on its own, in a file."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from cab.cli import main


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize(("kind", "file"), [("timm", "s.pth"), ("safetensors", "s.safetensors")])
def test_an_exported_student_is_the_student(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, file: str
) -> None:
    assert main(["export", str(finished), str(tmp_path / file), "--arm", "cab", "--to", kind]) == 0
    line = capsys.readouterr().out.strip()
    prefix = "timm.create_model('vim_micro_patch2_8', img_size=8, depth=1, embed_dim=16, d_state=4, num_classes=10, "
    assert sorted(line.split(", ")) == sorted(f"{prefix}checkpoint_path={str(tmp_path / file)!r})".split(", "))
    sizes = {"img_size": 8, "embed_dim": 16, "depth": 1, "d_state": 4, "num_classes": 10}
    loaded = timm.create_model("vim_micro_patch2_8", **sizes, checkpoint_path=str(tmp_path / file)).state_dict()
    kept = safetensors.torch.load_file(finished / "cab" / "student.safetensors")
    assert loaded.keys() == kept.keys()
    assert all(torch.equal(value, kept[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["s.safetensors"], "expected --arm to be one of soft-kd, cab, got none"),
        (["s.safetensors", "--arm", "cap"], "expected --arm to be one of soft-kd, cab, got 'cap'; did you mean 'cab'?"),
        (["s.pth", "--arm", "cab"], "expected a file s.safetensors for --to safetensors, got s.pth"),
    ],
)
def test_refusal_of_an_export(
    finished: Path, arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), *arguments]) == 2
    assert capsys.readouterr().err == f"cab export: {line}\n"


def test_an_export_of_a_damaged_student_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(finished, tmp_path / "run") / "cab" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:100])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "s.safetensors"), "--arm", "cab"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cab export: expected a whole student in {student}, got: ")
    assert err.count("\n") == 1
