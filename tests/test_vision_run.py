"""Runs on images from the command line: whole runs in seconds, measured and resumed, and the data that they refuse."""

import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from vision_runs import distill, of_folder

from cab.cli import main
from cab.settings import resolve


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


def test_resuming_takes_ended_arms_over_and_trains_what_is_missing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = (run / "results.json").read_text()
    shutil.rmtree(run / "cab")
    shutil.rmtree(run / "soft-kd" / "checkpoint-2")  # not needed for an arm that has ended
    assert main(["distill", "--resume", str(run)]) == 0
    out, err = capsys.readouterr()
    assert [line.split(":")[0] for line in err.splitlines()] == ["cab", "cab"]
    rows, old = (json.loads(text)["rows"] for text in ((run / "results.json").read_text(), before))
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


@pytest.mark.parametrize("text", ["[]", '"x"', '{"a": 1}', "{"])
def test_what_is_known_of_the_data_is_damaged(text: str, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run := images / "run").mkdir()
    assert main([*of_folder(images), "--print-config"]) == 0
    (run / "config.yaml").write_text(capsys.readouterr().out)
    (run / "files.json").write_text(text)
    assert main(["distill", "--resume", str(run)]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"cab distill: expected the data's files as a run writes them in {run}/files.json, got: ")


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
    monkeypatch.setattr("cab.processes.first", lambda call: call())
    for batch, processes, share in ((3, 1, 3), (6, 2, 3)):
        monkeypatch.setattr("cab.processes.count", lambda count=processes: count)
        words = [*distill(f"data.{kind}=0.8", f"optim.batch_size={batch}"), "--out", str(tmp_path / "run")]
        assert main(words) == 2
        assert capsys.readouterr() == ("", f"cab distill: {line}{share}\n")
        assert not (tmp_path / "run").exists()
