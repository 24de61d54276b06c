"""The table says what came out and invents nothing; the curves are a picture; several runs are compared in both."""

import shutil
from pathlib import Path

import pytest
from PIL import Image

from cab.cli import main
from cab.report import ACCURACY, PERPLEXITY, Row, plot, table


def test_table() -> None:
    rows = [Row("teacher", 0.9652), Row("soft-kd", 0.5, None, 12.34, 1234.5), Row("cab", 1.0, 0.98765, 100.0, 7.0)]
    assert table(ACCURACY, rows).splitlines() == [
        "arm      accuracy  alignment loss  seconds  images/s",
        "teacher     96.5%               -        -         -",
        "soft-kd     50.0%               -     12.3     1,234",
        "cab        100.0%          0.9877    100.0         7",
    ]


def test_table_of_a_run_on_text() -> None:
    assert table(PERPLEXITY, [Row("cab", 3.14159, None, 1.0, 2.0)]).splitlines() == [
        "arm  perplexity  seconds  sequences/s",
        "cab       3.142      1.0            2",
    ]


def test_curves(tmp_path: Path) -> None:
    tested = [{"step": step, "split": "test", "accuracy": step / 10} for step in (0, 2)]
    with_teacher = [{"step": step, "split": "train", "loss": 9.0, "kl": 2.0 / step, "ce": 1.0} for step in (1, 2)]
    without = [{"step": step, "split": "train", "loss": 9.0, "ce": 1.0 / step} for step in (1, 2)]
    pictures = []
    for curves in ({"cab": tested + with_teacher, "ce": tested + without}, {"ce": tested + without}, {"ce": tested}):
        plot(ACCURACY, curves, 0.95, "title", tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size == (1500, 600)
            pictures.append(picture.convert("RGB").tobytes())
    assert len(set(pictures)) == 3


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
