"""Files and folders that cannot be read, made or written: one line, and nothing is lost."""

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from vision_runs import distill

from cab.cli import main


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


def test_a_run_below_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*distill(), "--out", str(tmp_path / "file" / "run")]) == 2
    expected = f"cab distill: expected a folder for the run that can be made, {tmp_path}/file/run, got: [Errno 20] "
    assert capsys.readouterr().err.startswith(expected)


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


def test_a_folder_in_the_place_of_a_file_is_refused_before_the_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.png").mkdir()
    assert main(["report", str(finished), "--out", str(tmp_path / "r.png")]) == 2
    assert capsys.readouterr() == ("", f"cab report: expected a file, got the folder {tmp_path / 'r.png'}\n")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder in which nobody can make a file")
def test_a_folder_that_cannot_be_written_is_refused_before_the_work(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(finished), "--out", "/proc/r.png"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("cab report: expected a file in a folder that can be written, got /proc/r.png: ")


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
