"""Documents: the texts of files, of a saved data set, or of the Python standard library, one after the other."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from cab.config import TextConfig, UserError
from cab.data.folder import is_hidden

_LEFT = ("cache-*.arrow", "tmp*")  # beside a saved data set: results that are kept, and unfinished ones


def documents(config: TextConfig) -> Iterator[str]:
    """The documents that the configuration names, in a fixed order, up to its limit of characters.

    Raises:
        UserError: there is no such file, or it holds no text.
    """
    left = config.limit
    for document in _documents(config):
        if left is not None:
            document, left = document[:left], left - len(document)
        if document:
            yield document
        if left is not None and left <= 0:
            return


def files_of(config: TextConfig) -> list[Path]:
    """The files that hold the documents, in their order; what is hidden in a folder is none of them.

    Nor is, in a saved data set, what its ``map`` and ``filter`` leave there, in this script or another.

    Raises:
        UserError: there are none.
    """
    if config.name == "python":  # code and docstrings
        return sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    path = Path(config.path or "")
    if not path.exists():
        raise UserError(f"expected a file or folder with text, got no {path}")
    if path.is_file():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.is_file() and not is_hidden(file, path))
    if _is_saved(path):
        files = [file for file in files if not any(map(file.match, _LEFT))]
    if not files:
        raise UserError(f"expected files with text in {path}, got an empty folder")
    return files


def _documents(config: TextConfig) -> Iterator[str]:
    files, path = files_of(config), Path(config.path or "")
    if config.name == "files" and _is_saved(path):
        yield from _saved(path, config.field)
        return
    for file in files:
        if file.suffix in (".jsonl", ".json"):
            yield from _json_lines(file, config.field)
        elif file.suffix == ".parquet":
            yield from _parquet(file, config.field)
        else:
            yield _text(file)


def _text(file: Path) -> str:
    content = file.read_bytes()
    if not content.strip():
        raise UserError(f"expected text in {file}, got an empty file")
    text = _decoded(content, file)
    if "\0" in text:
        raise UserError(f"expected text in {file}, got a binary file")
    return text


def _decoded(content: bytes, file: Path, position: int = 0) -> str:
    """The text of a part of a file that begins at a position."""
    try:
        return content.decode("utf-8" if position else "utf-8-sig")
    except UnicodeDecodeError as error:
        got = f"other bytes at position {position + error.start}"
        raise UserError(f"expected UTF-8 text in {file}, got {got}") from None


def _json_lines(file: Path, field: str) -> Iterator[str]:
    position = 0
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            text = _decoded(line, file, position)
            position += len(line)
            if text.strip():
                yield _entry(text, number, file, field)
    if not position:
        raise UserError(f"expected text in {file}, got an empty file")


def _entry(text: str, number: int, file: Path, field: str) -> str:
    try:
        entry = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"expected JSON in line {number} of {file}, got: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get(field), str):
        got = ", ".join(entry) if isinstance(entry, dict) else type(entry).__name__
        raise UserError(f"expected text under {field!r} in line {number} of {file}, got {got}")
    return entry[field]


def _parquet(file: Path, field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"expected a parquet file, got {file}: {error}") from None
    _has_column(table.schema_arrow.names, field, file)
    for batch in table.iter_batches(batch_size=1024, columns=[field]):
        yield from (text for text in batch.column(0).to_pylist() if text)


def _saved(folder: Path, field: str) -> Iterator[str]:
    """A data set of Hugging Face, written by ``save_to_disk``; of one with several splits the one called "train"."""
    import datasets

    loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if "train" not in loaded:
            raise UserError(f"expected a split 'train' in {folder}, got {', '.join(loaded)}")
        loaded = loaded["train"]
    _has_column(loaded.column_names, field, folder)
    yield from (row[field] for row in loaded.select_columns([field]) if row[field])


def _is_saved(path: Path) -> bool:
    """Whether ``save_to_disk`` wrote the folder: a data set, or one with several splits."""
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _has_column(names: list[str], field: str, path: Path) -> None:
    if field not in names:
        raise UserError(f"expected a column {field!r} in {path}, got {', '.join(names)}; data.field names another")
