"""The command line: a whole run in seconds, and one line and exit status 2 for whatever the user can put right."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from cab.cli import main
from cab.settings import resolve

TINY = [
    "device=cpu",
    "student.depth=1",
    "student.embed_dim=16",
    "student.d_state=4",
    "teacher.depth=1",
    "teacher.embed_dim=16",
    "teacher.num_heads=2",
    "teacher.steps=2",
    "bridge.hidden=8",
    "optim.steps=2",
    "optim.batch_size=64",
]


def distill(*settings: str) -> list[str]:
    return ["distill", *(word for setting in (*TINY, *settings) for word in ("--set", setting))]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([*distill("arms=soft-kd,cab"), "--out", str(folder)]) == 0
    return folder


def test_a_run_leaves_all_that_it_promises(finished: Path) -> None:
    assert sorted(file.name for file in finished.iterdir()) == [
        ".lock",
        "cab",
        "config.yaml",
        "curves.png",
        "index.json",
        "results.json",
        "soft-kd",
        "teacher",
        "teacher.safetensors",
    ]
    assert json.loads((finished / "index.json").read_text())["images"] == 143
    for arm in ("soft-kd", "cab"):
        names = {file.name for file in (finished / arm).iterdir()}
        assert names == {"checkpoint-2", "metrics.jsonl", "result.json", "student.safetensors", "tensorboard"}
        weights = safetensors.torch.load_file(finished / arm / "student.safetensors")
        assert "layers.0.mixer.A_log" in weights
        assert not any("bridge" in name for name in weights)
    rows = {row["name"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    assert list(rows) == ["teacher", "soft-kd", "cab"]
    assert rows["soft-kd"]["alignment"] is None
    assert rows["cab"]["alignment"] > 0
    assert all(row["seconds"] > 0 for row in rows.values())


def test_eval_measures_what_the_run_reported(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(finished.rglob("*"))
    assert main(["eval", str(finished)]) == 0
    assert sorted(finished.rglob("*")) == before
    rows = {row["name"]: row for row in json.loads((finished / "results.json").read_text())["rows"]}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [
        [name, f"{rows[name]['score']:.1%}"] for name in ("soft-kd", "cab")
    ]


def test_threads_are_those_of_the_configuration(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert main(["eval", str(finished)]) == 0
    assert threads == [1]


def test_attention_of_teacher_and_students_is_compared(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), "--attention", str(tmp_path / "attention.png")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"similarity of the attention: {tmp_path / 'attention.png'}"
    with Image.open(tmp_path / "attention.png") as picture:
        assert picture.size == (900, 600)


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


def test_runs_are_compared(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    shutil.rmtree(other / "soft-kd")
    (other / "cab" / "result.json").unlink()  # has not ended: curves, but no row
    assert main(["report", str(finished), str(other), "--out", str(tmp_path / "r.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["arm", "accuracy", "top-5", "alignment", "loss", "seconds", "images/s"]
    assert [line.split()[0] for line in lines[1:-1]] == ["tiny/teacher", "tiny/soft-kd", "tiny/cab", "other/teacher"]
    assert (tmp_path / "r.png").is_file()
    assert main(["report", str(finished), "--out", str(tmp_path / "r.png")]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]] == ["teacher", "soft-kd", "cab"]


def test_runs_of_one_name_are_told_apart(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / parent / "run" for parent in ("a", "b")]
    for folder in folders:
        shutil.copytree(finished, folder)
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "r.png")]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert names == [f"{parent}/run/{arm}" for parent in "ab" for arm in ("teacher", "soft-kd", "cab")]


@pytest.mark.parametrize("option", [["--length", "8"], ["--mqar"]], ids=["length", "mqar"])
def test_options_for_text(option: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(finished), *option]) == 2
    expected = f"expected a run on text for {option[0]}, got one on images in {finished}\n"
    assert capsys.readouterr().err.endswith(expected)


def test_resuming_takes_ended_arms_over_and_trains_what_is_missing(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.json").read_text()
    shutil.rmtree(finished / "cab")
    shutil.rmtree(finished / "soft-kd" / "checkpoint-2")  # not needed for an arm that has ended
    assert main(["distill", "--resume", str(finished)]) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["cab", "cab"]
    rows, old = (json.loads(text)["rows"] for text in ((finished / "results.json").read_text(), before))
    assert rows[:2] == old[:2]
    assert rows[2]["score"] == old[2]["score"]
    assert rows[2]["alignment"] == old[2]["alignment"]
    assert [line.split()[0] for line in out.splitlines() if "%" in line] == ["teacher", "soft-kd", "cab"]


def test_the_saved_configuration_reproduces_the_run(finished: Path, tmp_path: Path) -> None:
    assert main(["distill", "--config", str(finished / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    first, again = (
        json.loads((folder / "results.json").read_text())["rows"] for folder in (finished, tmp_path / "again")
    )
    for one, other in zip(first, again, strict=True):
        assert (one["name"], one["score"], one["alignment"]) == (
            other["name"],
            other["score"],
            other["alignment"],
        )


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


@pytest.mark.parametrize("is_run", [False, True], ids=["other files", "a run"])
def test_a_folder_that_holds_files_is_not_written_to(
    tmp_path: Path, is_run: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ("config.yaml" if is_run else "mine")).write_text("")
    before = list(tmp_path.iterdir())
    assert main([*distill(), "--out", str(tmp_path)]) == 2
    expected = f"cab distill: expected a new or empty folder for --out, got {tmp_path}"
    how = f"; --resume {tmp_path} goes on with it" if is_run else ""
    assert capsys.readouterr().err == f"{expected}{how}\n"
    assert list(tmp_path.iterdir()) == before


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


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of 6 training and 2 test images, 16 x 16."""
    for split, count in (("train", 6), ("val", 2)):
        for name, colour in (("blue", (0, 0, 255)), ("red", (255, 0, 0))):
            (tmp_path / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (16, 16), colour).save(tmp_path / split / name / f"{index}.png")
    return tmp_path


def of_folder(images: Path, *settings: str) -> list[str]:
    vision = ["data.name=folder", f"data.root={images}", "data.image_size=16", "optim.batch_size=4", "arms=cab"]
    return [*distill(*vision, *settings), "--out", str(images / "run")]


def test_a_folder_of_images_is_distilled_and_measured(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["subset", str(images), "--fraction", "0.5", "--out", str(images / "i.json")]) == 0
    assert main(of_folder(images, f"data.index={images / 'i.json'}", "data.augment=crop")) == 0
    assert "student sees 6 of 12 training images, tested on 4" in capsys.readouterr().out
    (images / "val").rename(images / "away")
    assert main(["eval", str(images / "run")]) == 2
    assert "expected a folder " in capsys.readouterr().err


def test_a_run_does_not_go_on_with_other_images(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(of_folder(images)) == 0
    held = (images / "run" / "files.json").read_bytes()
    assert main(["distill", "--resume", str(images / "run")]) == 0
    shutil.copy(images / "val" / "red" / "0.png", images / "val" / "red" / "more.png")
    capsys.readouterr()
    assert main(["distill", "--resume", str(images / "run")]) == 2
    expected = f"expected the data with which {images / 'run'} began, 2 files of "
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert re.match(rf"cab distill: {expected}\d+ bytes in {images}/val/red, got 3 files of \d+ bytes\n", err)
    assert (images / "run" / "files.json").read_bytes() == held
    assert main(["eval", str(images / "run")]) == 0
    (images / "run" / "files.json").unlink()  # as of a run that began before there was one
    assert main(["distill", "--resume", str(images / "run")]) == 0
    assert (images / "run" / "files.json").read_bytes() != held


def test_a_run_is_measured_from_anywhere(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images.parent)
    assert main(of_folder(images, f"data.root={images.name}")) == 0
    monkeypatch.chdir("/")
    assert main(["eval", str(images / "run")]) == 0
    monkeypatch.setenv("HOME", str(images.parent))
    folder = ["data.name=folder", "data.image_size=16"]
    assert resolve(settings=[*folder, f"data.root=~/{images.name}"]).data.root == str(images)
    assert resolve(settings=[*folder, "data.root=~/none"]).data.root == str(images.parent / "none")


def test_a_teacher_of_another_resolution_is_trained_and_teaches(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(of_folder(images, "teacher.image_size=32", "data.fraction=1")) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "%" in line] == ["teacher", "cab"]
    with safetensors.safe_open(images / "run" / "teacher.safetensors", "pt") as weights:
        assert weights.get_tensor("pos_embed").shape[1] == 1 + (32 // 2) ** 2


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # newer Pythons warn of how torch starts its processes
def test_a_broken_image_ends_the_run_with_its_name(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error crosses a process: it arrives with that process' traceback around it."""
    (images / "train" / "red" / "3.png").write_bytes(b"no image")
    assert main(of_folder(images, "data.fraction=1", "data.workers=1")) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[-1].startswith(f"cab distill: expected an image that can be read, got {images}/train/red/3.png: ")
    assert not any("Traceback" in line for line in err)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name in ("cab.vision_run", "cab.build")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main(["distill"]) == 2
    assert capsys.readouterr().err == (
        "cab distill: expected the packages of cab-kernels[vision], got no module 'timm'\n"
    )


def test_an_export_of_a_damaged_student_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(finished, tmp_path / "run") / "cab" / "student.safetensors"
    student.write_bytes(student.read_bytes()[:100])
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "s.safetensors"), "--arm", "cab"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cab export: expected a whole student in {student}, got: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["student.safetensors", "result.json"])
def test_a_run_with_a_damaged_file_is_one_line(
    name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = shutil.copytree(finished, tmp_path / "run") / "cab" / name
    damaged.write_bytes(damaged.read_bytes()[:20])
    command = ["eval"] if name == "student.safetensors" else ["report", "--out", str(tmp_path / "r.png")]
    assert main([*command, str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert re.match(rf"cab {command[0]}: expected .* in {damaged}, got: ", err)
    assert err.count("\n") == 1


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 64 bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("options", [[], ["--traceback"]], ids=["", "traceback"])
def test_a_full_disk_is_one_line(
    images: Path, full_disk: None, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["subset", str(images), "--fraction", "1", "--out", str(images / "i.json"), *options]) == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("cab subset: expected files that can be read and written, got: [Errno 27] ")
    assert bool(before) == bool(options)


@pytest.mark.parametrize(("kind", "file"), [("timm", "s.pth"), ("safetensors", "s.safetensors")])
def test_an_export_to_a_full_disk_is_one_line(
    finished: Path, tmp_path: Path, full_disk: None, kind: str, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(finished), str(tmp_path / file), "--arm", "cab", "--to", kind]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cab export: expected a file that can be written, {tmp_path / file}, got: ")
    assert err.count("\n") == 1
    assert not (tmp_path / file).exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can make a file")
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", "/proc/r.png"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cab report: expected a file in a folder that can be written, got /proc/r.png: ")


@pytest.mark.parametrize("words", [["report", "RUN", "--out"], ["eval", "RUN", "--attention"]], ids=lambda w: w[0])
@pytest.mark.parametrize("name", ["r.xyz", "r", ".png"])
def test_the_name_of_a_figure_is_refused_before_the_work(
    words: list[str], name: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(str(finished) if word == "RUN" else word for word in words), str(tmp_path / name)]) == 2
    expected = f"cab {words[0]}: expected a figure's name to end in .png, .pdf or .svg, got {tmp_path / name}\n"
    assert capsys.readouterr() == ("", expected)
    assert list(tmp_path.iterdir()) == []


def test_a_figure_has_the_name_and_the_form_that_were_asked_for(finished: Path, tmp_path: Path) -> None:
    for name, begins in (("r.PNG", b"\x89PNG"), ("r.pdf", b"%PDF"), ("r.b.svg", b"<?xml")):
        assert main(["report", str(finished), "--out", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.png").mkdir()
    assert main(["report", str(finished), "--out", str(tmp_path / "r.png")]) == 2
    assert capsys.readouterr() == ("", f"cab report: expected a file, got the folder {tmp_path / 'r.png'}\n")


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


FAKE_WANDB = """
import json, os
config, run = {}, None
class Config(dict):
    def update(self, values, allow_val_change=False):
        super().update(values)
class Run:
    id, url, summary = "0", "", {}
    def _label(self, **labels): pass
def tell(**what):
    with open(os.environ["TOLD"], "a") as lines:
        lines.write(json.dumps(what, default=str) + "\\n")
def init(project, name, dir, config):
    global run
    assert run is None and config["optim.steps"] == 2
    run = Run()
    tell(init=name)
def log(values, **kwargs): tell(log=values)
def finish():
    global run
    run = None
    tell(finish=True)
def termwarn(*args, **kwargs): pass
config, summary = Config(), {}
"""


def test_wandb_is_told_of_each_arm(tmp_path: Path) -> None:
    """A module in the place of wandb: nothing here reaches a network."""
    package = tmp_path / "packages" / "wandb"
    (package / "sdk" / "lib").mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE_WANDB)
    for part in ("sdk", "sdk/lib"):
        (package / part / "__init__.py").write_text("")
    (package / "sdk" / "lib" / "config_util.py").write_text("class ConfigError(Exception): pass")
    paths = os.pathsep.join([str(tmp_path / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths, "TOLD": str(tmp_path / "told")}
    words = [*distill("arms=soft-kd,cab", "wandb=true"), "--out", str(tmp_path / "run")]
    for command in (words, ["eval", str(tmp_path / "run")]):  # what only measures is no run
        done = subprocess.run([sys.executable, "-m", "cab", *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in (tmp_path / "told").read_text().splitlines()]
    assert [entry["init"] for entry in told if "init" in entry] == ["run/teacher", "run/soft-kd", "run/cab"]
    assert sum("finish" in entry for entry in told) == 3
    names = {name for entry in told for name in entry.get("log", {})}
    assert {"train/loss", "train/kl", "train/align", "train/align_layers/00", "eval/accuracy"} <= names


def test_wandb_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cab.callbacks.is_wandb_available", lambda: False)
    assert main([*distill("wandb=true"), "--out", str(tmp_path / "run")]) == 2
    expected = "cab distill: expected the packages of cab-kernels[wandb] for wandb=true, got no module 'wandb'\n"
    assert capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        *(
            (
                {"ACCELERATE_USE_DEEPSPEED": "true", name: value},
                f"expected {name}={wanted}, as launch/zero3.yaml has it, got {value}",
            )
            for name, wanted, value in [
                ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3", "2"),
                ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none", "cpu"),
                ("ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE", "none", "nvme"),
                ("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none", "zero.json"),
            ]
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
            "expected FSDP_VERSION=2, as launch/fsdp2.yaml has it, got 1",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"},
            "expected FSDP_OFFLOAD_PARAMS=false, as launch/fsdp2.yaml has it, got true",
        ),
    ],
    ids=["ZeRO-2", "ZeRO-Offload", "ZeRO-Infinity", "DeepSpeed's file", "FSDP1", "offloading"],
)
def test_launchers_that_are_refused(
    settings: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert main([*distill(), "--out", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"cab distill: {message}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"WORLD_SIZE": "two"}, "expected WORLD_SIZE, which a launcher sets, to be a whole number, got two"),
        ({"WORLD_SIZE": "2"}, "expected LOCAL_RANK, which a launcher sets, to be a whole number, got none"),
        (
            {"WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "expected what a launcher sets for 2 processes, as torchrun does, got: Error initializing ",
        ),
    ],
    ids=["size", "rank", "address"],
)
def test_what_no_launcher_sets_is_refused(
    settings: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert main([*distill(), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"cab distill: {message}")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("switch", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_accelerate_itself_is_not_asked_to_shard(switch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr("cab.processes.start", lambda *options: started.append(options))
    monkeypatch.setenv("DS_ACCELERATOR", "")
    for name, value in {switch: "true", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "taken").write_text("")
    assert main([*distill("device=cpu"), "--out", str(tmp_path)]) == 2
    assert switch not in os.environ
    assert started == [(0, True, switch == "ACCELERATE_USE_DEEPSPEED")]


def test_deepspeed_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    for name, value in {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main([*distill(), "--out", str(tmp_path / "run")]) == 2
    expected = "cab distill: expected the packages of cab-kernels[deepspeed], got no module 'deepspeed'\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    "words",
    [
        ["eval", "RUN", "--attention", "no/dir/a.png"],
        ["report", "RUN", "--out", "no/dir/r.png"],
        ["export", "RUN", "no/dir/s.pth", "--to", "timm", "--arm", "cab"],
        ["subset", "RUN", "--fraction", "0.5", "--out", "no/dir/i.json"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_in_no_folder(words: list[str], finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = next(word for word in words if word.startswith("no/dir"))
    assert main([str(finished) if word == "RUN" else word for word in words]) == 2
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"cab {words[0]}: expected a file in a folder that exists, got {file}\n")


def test_a_run_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*distill(), "--out", str(tmp_path / "file" / "run")]) == 2
    expected = f"cab distill: expected a folder for the run that can be made, {tmp_path}/file/run, got: [Errno 20] "
    assert capsys.readouterr().err.startswith(expected)


def image_folder(root: Path, classes: list[str]) -> Path:
    """A folder with two training images and one test image of each class."""
    for split, count in (("train", 2), ("val", 1)):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (8, 8), (30 * index, 60, 90)).save(root / split / name / f"{index}.png")
    return root


def test_a_run_on_digits_is_measured_on_a_folder(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), "--data", str(tmp_path / "no")]) == 2
    assert capsys.readouterr() == (
        "",
        f"cab eval: expected a folder {tmp_path}/no/train with one folder of images for each class, "
        "got no such folder\n",
    )
    run = shutil.copytree(finished, tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert "index: null" in config
    (run / "config.yaml").write_text(config.replace("index: null", "index: of-other-images.json"))
    data = image_folder(tmp_path / "data", [str(digit) for digit in range(10)])
    assert main(["eval", str(run), "--data", str(data)]) == 0
    scores = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert scores == ["10.0%", "10.0%"]  # every image is the same


@pytest.mark.parametrize(
    ("classes", "got"),
    [
        (["blue", "red"], "(10 classes: 0, 1, 2, ...), got 2 classes: blue, red in DATA"),
        ([*"012345678", "x"], "(10 classes: ..., 9), got 10 classes: ..., x in DATA"),
        ([*"0123456789", "x"], "(10 classes: ..., 9), got 11 classes: ..., x in DATA"),
    ],
)
def test_other_classes_are_not_measured(
    classes: list[str], got: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = image_folder(tmp_path, classes)
    assert main(["eval", str(finished), "--data", str(data)]) == 2
    line = f"cab eval: expected the classes of {finished} {got.replace('DATA', str(data))}\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_images_are_mixed_in_pairs(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "expected an even number of images a process in optim.batch_size for data.mixup and data.cutmix, got "
    monkeypatch.setattr("cab.processes.agree", lambda value: value)
    for batch, processes, share in ((3, 1, 3), (6, 2, 3)):
        monkeypatch.setattr("cab.processes.count", lambda count=processes: count)
        words = [*distill(f"data.{kind}=0.8", f"optim.batch_size={batch}"), "--out", str(tmp_path / "run")]
        assert main(words) == 2
        assert capsys.readouterr() == ("", f"cab distill: {line}{share}\n")
        assert not (tmp_path / "run").exists()
