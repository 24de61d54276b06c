from pathlib import Path

import pytest

from cab.data.fingerprint import difference, fingerprint


def files(root: Path) -> list[str]:
    return [str(root)] if root.is_file() else sorted(str(file) for file in root.rglob("*") if not file.is_dir())


def told(root: Path) -> dict:
    return fingerprint(str(root), files(root))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a", "b/x", "b/y"):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name).write_text("1234")
    (tmp_path / "data" / "b" / "z").symlink_to("nowhere")
    return tmp_path / "data"


def test_what_each_folder_holds(data: Path) -> None:
    found = told(data)
    assert {folder: (held["files"], held["bytes"]) for folder, held in found.items()} == {".": (1, 4), "b": (3, 8)}


def test_data_that_have_moved_are_the_same(data: Path) -> None:
    before = told(data)
    assert difference(str(data), before, told(data.rename(data.with_name("moved")))) is None


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("b/x", "123", "3 files of 8 bytes in DATA/b, got 3 files of 7 bytes"),
        ("b/w", "", "3 files of 8 bytes in DATA/b, got 4 files of 8 bytes"),
        ("c/x", "1", "no file in DATA/c, got 1 file of 1 bytes"),
        ("a", None, "1 file of 4 bytes in DATA, got no file"),
        ("b/x", None, "3 files of 8 bytes in DATA/b, got 2 files of 4 bytes"),
    ],
    ids=["another size", "a file more", "a folder more", "a folder less", "a file less"],
)
def test_what_has_changed_is_named(name: str, text: str | None, expected: str, data: Path) -> None:
    before = told(data)
    if text is None:
        (data / name).unlink()
    else:
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text(text)
    assert difference(str(data), before, told(data)) == expected.replace("DATA", str(data))


def test_another_name_is_a_change_too(data: Path) -> None:
    before = told(data)
    (data / "b" / "x").rename(data / "b" / "w")
    expected = f"3 files of 8 bytes in {data}/b, got as many with other names or sizes"
    assert difference(str(data), before, told(data)) == expected


def test_a_single_file(data: Path) -> None:
    file = data / "a"
    before = told(file)
    (data / "more").write_text("")
    assert difference(str(file), before, told(file)) is None
    file.write_text("12345")
    assert difference(str(file), before, told(file)) == f"1 file of 4 bytes in {file}, got 1 file of 5 bytes"
