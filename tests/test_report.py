"""The table says what came out and invents nothing; the curves are a picture."""

from pathlib import Path

from PIL import Image

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
