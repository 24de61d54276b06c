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
        "arm  perplexity  alignment loss  seconds  sequences/s",
        "cab       3.142               -      1.0            2",
    ]


def test_curves(tmp_path: Path) -> None:
    entries = [
        {"step": 0, "split": "test", "accuracy": 0.1},
        {"step": 1, "split": "train", "loss": 2.0},
        {"step": 2, "split": "train", "loss": 1.0},
        {"step": 2, "split": "test", "accuracy": 0.9},
    ]
    sizes = []
    for teacher in (None, 0.95):
        plot(ACCURACY, {"cab": entries, "ce": entries[2:]}, teacher, "title", tmp_path / "curves.png")
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.size == (1500, 600)
            sizes.append(len(set(picture.convert("RGB").get_flattened_data())))
    assert min(sizes) > 100  # colours: lines and text were drawn
