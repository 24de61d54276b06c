"""The command line: its arguments, and one line and exit status 2 for whatever the user can put right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cab.cli import main


@pytest.mark.parametrize("option", [["--length", "8"], ["--mqar"]], ids=["length", "mqar"])
def test_options_for_text(option: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), *option]) == 2
    expected = f"expected a run on text for {option[0]}, got one on images in {finished}\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["distill", "--set", "optim.lrr=1"], "expected a known key, got 'optim.lrr'; did you mean 'optim.lr'?"),
        (
            ["distill", "--preset", "digit"],
            "expected preset to be one of digits, vision, imagenet-vim-tiny, ",
        ),
        (["distill", "--config", "no.yaml"], "expected a configuration file, got no file no.yaml"),
        (["distill", "--preset", "vision"], "expected data.root, a folder with train/CLASS and val/CLASS, got none"),
        (
            ["distill", "--preset", "vision", "--set", "data.root=no"],
            "expected a folder no/train with one folder of images for each class, got no such folder",
        ),
        (["distill", "--set", "data.image_size=16"], "expected data.image_size=8 for digits, got 16"),
        (
            ["distill", "--set", "teacher.name=vit_tinny_patch16_224"],
            "expected teacher.name to be a model that timm knows, got 'vit_tinny_patch16_224'; did you mean "
            "'vit_tiny_patch16_224'?",
        ),
        (
            ["distill", "--set", "student.name=mamba"],
            "expected student.name to be one of vim_base_patch16_224, vim_micro_patch2_8, vim_small_patch16_224, "
            "vim_tiny_patch16_224, got 'mamba'",
        ),
        (
            ["distill", "--set", "teacher.num_heads=5"],
            "expected teacher.name=vit_tiny_patch16_224 to take images of 8 x 8 pixels, patch_size=2, embed_dim=64, "
            "depth=4, num_heads=5, got: ",
        ),
        (
            ["distill", "--set", "teacher.weights=no.safetensors"],
            "expected a file with the teacher's weights, got no file no.safetensors",
        ),
        (
            ["distill", "--set", "teacher.weights=teacher.pth"],
            "expected teacher.weights to be a .safetensors file, got teacher.pth",
        ),
        (["distill", "--set", "data.index=no.json"], "expected an index file, got no file no.json"),
        (["distill", "--resume", "no"], "expected the folder of a run, got no folder no"),
        (["distill", "--resume", "no", "--print-config"], "expected the folder of a run, got no folder no"),
        (["distill", "--resume", "no", "--set", "seed=1"], "expected --resume alone, "),
        (["distill", "--resume", "no", "--data", "x"], "expected --resume alone, "),
        (
            ["distill", "--teacher", "vit_tinny_patch16_224"],
            "expected teacher.name to be a model that timm knows, got ",
        ),
        (
            ["distill", "--teacher", "vit_tiny_patch16_224.nope"],
            "expected teacher.name to be a model that timm knows, got: ",
        ),
        (["distill", "--set", "preset=lm"], "expected --preset lm, got --set preset=lm"),
        (["distill", "--student", "mamba"], "expected student.name to be one of vim_base_patch16_224, "),
        (["distill", "--fraction", "2"], "expected data.fraction to be at most 1, got 2.0"),
        (
            ["distill", "--set", "bridge.layer_map=0,1", "--set", "student.depth=1", "--set", "teacher.depth=1"],
            "layer_map: expected proportional, learned, last-1 to last-1, or 1 teacher layers from 0 to 0 that never ",
        ),
        (["distill", "--data", "no"], "expected a folder no/train with one folder of images for each class, got no "),
        (["eval", "no"], "expected the folder of a run, got no folder no"),
        (["report", "no"], "expected the folder of a run, got no folder no"),
        (["export", "no", "s.safetensors"], "expected the folder of a run, got no folder no"),
        (["subset", "no", "--fraction", "0.1", "--out", "i.json"], "expected a folder no/train with one folder of "),
    ],
)
def test_refusal(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"cab {arguments[0]}: {line}")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


SHAPELESS = [f"teacher.{name}=none" for name in ("patch_size", "embed_dim", "depth", "num_heads")]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vim_micro_patch2_8", "TimmTeacher: cannot read Q and K of vim_micro_patch2_8: it has no list of 'blocks'"),
        ("resnet18", "expected teacher.name=resnet18 to take images of 8 x 8 pixels, got: ResNet.__init__() got an "),
    ],
)
def test_refusal_of_a_teacher(name: str, line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = [f"teacher.name={name}", *SHAPELESS]
    words = [word for setting in settings for word in ("--set", setting)]
    assert main(["distill", *words, "--out", str(tmp_path / "run")]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"cab distill: {line}")
    assert not (tmp_path / "run").exists()


def test_traceback_is_there_for_who_asks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--set", "seed=x", "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "cab: the following arguments are required: COMMAND; see cab --help"),
        (["distil"], "cab: argument COMMAND: invalid choice: 'distil'"),
        (["distill", "--lr", "1"], "unrecognized arguments: --lr 1"),
        (["subset", "x"], "cab subset: the following arguments are required: --fraction, --out; see cab subset --help"),
    ],
)
def test_refusal_of_arguments(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("begun", [False, True], ids=["before the run has begun", "after"])
def test_an_interruption_says_how_to_go_on_where_there_is_a_run(
    tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: object, folder: Path, say: object) -> None:
        if begun:
            folder.mkdir()
            (folder / "config.yaml").write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr("cab.run.distill", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["distill", "--out", str(tmp_path / "run")])
    assert caught.value.code == 130
    how = f"; cab distill --resume {tmp_path / 'run'} goes on" if begun else ""
    assert capsys.readouterr().err == f"\ninterrupted{how}\n"


def test_any_command_may_be_interrupted(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cab.run.evaluate", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["eval", str(finished)])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name in ("cab.vision_run", "cab.build")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["distill"]) == 2
    assert capsys.readouterr().err == (
        "cab distill: expected the packages of cab-kernels[vision], got no module 'timm'\n"
    )


def test_presets_and_arms_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["presets"]) == 0
    words = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert words[:2] == ["digits", "vision"]
    assert {"cab", "soft-kd", "soft-kd-a0", "ce", "custom"} <= set(words[2:])


def test_print_config_is_a_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--print-config", "--set", "optim.lr=0.25"]) == 0
    (tmp_path / "my.yaml").write_text(capsys.readouterr().out)
    assert main(["distill", "--print-config", "--config", str(tmp_path / "my.yaml")]) == 0
    printed = capsys.readouterr().out
    assert "  lr: 0.25  # peak learning rate" in printed
    (tmp_path / "config.yaml").write_text(printed)
    assert main(["distill", "--print-config", "--resume", str(tmp_path)]) == 0
    assert capsys.readouterr().out == printed


def test_subset_writes_an_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for index in range(10):
            Image.new("RGB", (2, 2)).save(tmp_path / "train" / name / f"{index}.png")
    out = tmp_path / "i.json"
    assert main(["subset", str(tmp_path), "--fraction", "0.2", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 4 of 20 images, 2 classes\n"
    assert {name: len(images) for name, images in json.loads(out.read_text())["classes"].items()} == {"a": 2, "b": 2}


def test_help_does_not_load_torch() -> None:
    code = """
import sys
from cab.cli import main
try:
    main(["distill", "--help"])
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--print-config" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


def test_flags_reach_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--teacher", "deit_base_patch16_224", "--student", "vim_small_patch16_224", "--fraction", "0.01"]
    assert main(["distill", "--data", "/data/x", *flags, "--print-config"]) == 0
    lines = [line.split("  #")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert {"preset: vision", "root: /data/x", "name: deit_base_patch16_224", "fraction: 0.01"} <= set(lines)


def test_the_module_exits_with_the_status() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cab", "distill", "--set", "seed=x"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (2, "cab distill: expected seed to be a whole number, got 'x'\n")
