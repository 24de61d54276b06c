import dataclasses
import json
import shutil
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cab.config import TextConfig, UserError
from cab.data.documents import documents, files_of
from cab.data.encoded import in_memory, write_encoded
from cab.data.language import (
    Concatenated,
    Isolated,
    Padded,
    Windows,
    load,
)
from cab.data.tokens import ByteTokens, HuggingFaceTokens

TEXTS = ["first document", "second, with ünïcode", "third"]


def lines(folder: Path) -> Path:
    file = folder / "text.jsonl"
    file.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in TEXTS))
    return file


def parquet(folder: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    file = folder / "text.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": TEXTS}), file)
    return file


def text_files(folder: Path) -> Path:
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    return folder


def saved(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_with_splits(folder: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"text": TEXTS})
    datasets.DatasetDict({"test": split.select([0]), "train": split}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("write", [lines, parquet, text_files, saved, saved_with_splits])
def test_documents_of_every_kind_of_file(write: Callable[[Path], Path], tmp_path: Path) -> None:
    assert list(documents(TextConfig(path=str(write(tmp_path))))) == TEXTS


def test_hidden_files_are_no_text_unless_they_are_named(tmp_path: Path) -> None:
    folder = tmp_path / ".data"  # what is hidden around the folder hides nothing in it
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    for name in (".DS_Store", "._0.txt", ".ipynb_checkpoints/0.txt"):
        (folder / name).write_bytes(b"\0")
    with pytest.raises(UserError, match="expected files with text in .*, got an empty folder"):
        list(documents(TextConfig(path=str(folder))))
    text_files(folder)
    assert list(documents(TextConfig(path=str(folder)))) == TEXTS
    (folder / ".notes.txt").write_text("here")
    assert list(documents(TextConfig(path=str(folder / ".notes.txt")))) == ["here"]


@pytest.mark.parametrize("write", [saved, saved_with_splits])
def test_what_a_script_leaves_beside_a_saved_data_set_is_no_document(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    config = TextConfig(path=str(write(tmp_path)))
    before = files_of(config)
    split = before[-1].parent
    datasets = pytest.importorskip("datasets")
    datasets.load_from_disk(str(split)).map(lambda row: {"text": row["text"].upper()})
    (left,) = {*split.iterdir()} - {*before}
    shutil.copy(left, split / "tmp0a1b2c3d")  # as of a script that was killed
    assert files_of(config) == before
    assert list(documents(config)) == TEXTS


def test_text_may_have_the_names_of_what_is_left_beside_saved_data_sets(tmp_path: Path) -> None:
    files = [write(tmp_path, name, b"text") for name in ("cache-0.arrow", "tmp.txt")]
    assert files_of(TextConfig(path=str(tmp_path))) == files


def test_another_field(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"content": "here"}\n\n')
    assert list(documents(TextConfig(path=str(file), field="content"))) == ["here"]


def test_a_json_text_may_hold_separators_of_lines(tmp_path: Path) -> None:
    """Only a newline ends an entry; Python's splitlines took U+2028 for an end too."""
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "one\u2028two\x85three"}, ensure_ascii=False) + "\n")
    assert list(documents(TextConfig(path=str(file)))) == ["one\u2028two\x85three"]


def test_limit_cuts_the_last_document(tmp_path: Path) -> None:
    assert list(documents(TextConfig(path=str(lines(tmp_path)), limit=20))) == ["first document", "second"]


def test_the_standard_library_is_text() -> None:
    found = list(documents(TextConfig(name="python", limit=100_000)))
    assert sum(map(len, found)) == 100_000
    assert "import" in found[0]


def write(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "expected text in .*a.txt, got an empty file"),
        ("a.txt", b" \n", "expected text in .*a.txt, got an empty file"),
        ("a.txt", b"ab\xff\xfe", "expected UTF-8 text in .*a.txt, got other bytes at position 2"),
        ("a.txt", b"ab\0", "expected text in .*a.txt, got a binary file"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "expected JSON in line 2 of .*a.jsonl, got: "),
        ("a.jsonl", b'{"txt": "a"}\n', "expected text under 'text' in line 1 of .*a.jsonl, got txt"),
        ("a.jsonl", b"[1]\n", "expected text under 'text' in line 1 of .*a.jsonl, got list"),
        ("a.parquet", b"PAR0", "expected a parquet file, got .*a.parquet: "),
    ],
)
def test_files_that_hold_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message):
        list(documents(TextConfig(path=str(file))))


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file or folder with text, got no /no/where"):
        list(documents(TextConfig(path="/no/where")))
    with pytest.raises(UserError, match="expected files with text in .*, got an empty folder"):
        list(documents(TextConfig(path=str(tmp_path))))


@pytest.mark.parametrize("write", [parquet, saved])
def test_missing_column(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError, match="expected a column 'content' in .*, got .*text; data.field names another"):
        list(documents(TextConfig(path=str(path), field="content")))


def test_bytes_come_back() -> None:
    tokens = ByteTokens()
    for text, encoded in zip(TEXTS, tokens.encode(TEXTS), strict=True):
        assert max(encoded) < tokens.end < tokens.size
        assert tokens.decode([*encoded, tokens.end]) == text


def test_bytes_are_saved_as_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    tokens = ByteTokens()
    tokens.save(tmp_path)
    saved = HuggingFaceTokens(str(tmp_path))
    assert (saved.size, saved.end) == (tokens.size, tokens.end)
    for text in (*TEXTS, " a  b\n\t", "<0x41>", "\0", "𝄞 e\u0301"):
        (encoded,) = tokens.encode([text])
        assert saved.encode([text]) == [encoded]
        assert saved.decode(encoded) == text


def test_a_tokenizer_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<end>": 0, "a": 1, "b": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(tmp_path / "with")
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "without")
    tokens = HuggingFaceTokens(str(tmp_path / "with"))
    assert (tokens.encode(["a b a c", "b"]), tokens.size, tokens.end) == ([[1, 2, 1, 3], [2]], 4, 0)
    assert tokens.decode([1, 2]) == "a b"
    with pytest.raises(UserError, match="expected a tokenizer with a token for the end of a text, got .*without"):
        HuggingFaceTokens(str(tmp_path / "without"))
    with pytest.raises(UserError, match=f"expected a tokenizer by name or path, got '{tmp_path}/no'"):
        HuggingFaceTokens(f"{tmp_path}/no")


def test_concatenated_documents_cross_sequences() -> None:
    rows = Concatenated(in_memory([range(7), range(7, 11)]), 4)
    assert [row["input_ids"].tolist() for row in (rows[0], rows[1])] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(rows) == 2
    assert rows[1]["labels"].tolist() == [4, 5, 6, 7]


def test_isolated_documents_count_their_own_positions() -> None:
    """Documents of six, two, one and four tokens; the first is cut, and its rest begins anew."""
    rows = Isolated(in_memory([range(6), range(6, 8), [8], range(9, 13)]), 4)
    seen = [
        tuple(row[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        for row in map(rows.__getitem__, range(len(rows)))
    ]
    assert seen == [
        ([0, 1, 2, 3], [0, 1, 2, 3], [-100, 1, 2, 3]),
        ([4, 5, 6, 7], [0, 1, 0, 1], [-100, 5, -100, 7]),
        ([8, 9, 10, 11], [0, 0, 1, 2], [-100, -100, 10, 11]),
    ]


def test_padded_documents_share_no_sequence() -> None:
    rows = Padded(in_memory([[1, 2, 3, 4, 5, 6], [0], [7, 8], [9, 10, 11, 12, 13]]), 4)
    seen = [
        (row["input_ids"].tolist(), row["attention_mask"].tolist()) for row in map(rows.__getitem__, range(len(rows)))
    ]
    assert seen == [
        ([1, 2, 3, 4], [1, 1, 1, 1]),
        ([5, 6, 0, 0], [1, 1, 0, 0]),
        ([7, 8, 0, 0], [1, 1, 0, 0]),
        ([9, 10, 11, 12], [1, 1, 1, 1]),  # the thirteenth alone would predict nothing
    ]
    assert rows[1]["labels"].tolist() == [5, 6, -100, -100]


def test_windows_predict_each_token_once() -> None:
    windows = Windows(torch.arange(15, dtype=torch.int32), 6)
    counted = [label for row in map(windows.__getitem__, range(len(windows))) for label in row["labels"][1:].tolist()]
    assert [label for label in counted if label != -100] == list(range(1, 15))
    assert windows[1]["input_ids"].tolist() == [3, 4, 5, 6, 7, 8]
    assert windows[1]["labels"].tolist() == [-100, -100, -100, 6, 7, 8]


def test_documents_are_held_out_whole(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number:02}.txt").write_text(chr(97 + number) * 9)
    config = TextConfig(path=str(tmp_path), tokenizer="bytes", length=10, held_out=0.1)
    splits = load(config)
    assert (splits.test_tokens, splits.train_tokens) == (20, 180)
    assert set(splits.test.stream.tolist()) & set(splits.train.stream.tolist()) == {256}
    assert splits.test.stream.tolist() == load(config).test.stream.tolist()
    assert load(TextConfig(path=str(tmp_path), tokenizer="bytes", length=10, packing="padded"))[0][0].keys() == {
        "input_ids",
        "labels",
        "attention_mask",
    }
    assert (
        "position_ids" in load(TextConfig(path=str(tmp_path), tokenizer="bytes", length=10, packing="isolated"))[0][0]
    )


def many(folder: Path, documents: int = 300) -> TextConfig:
    """JSON lines, of documents that differ in length, and a cache."""
    file = folder / "many.jsonl"
    file.write_text("".join(json.dumps({"text": f"{n} " * (n % 13 + 1)}) + "\n" for n in range(documents)))
    return TextConfig(path=str(file), tokenizer="bytes", length=16, held_out=0.1, cache=str(folder / "cache"))


@pytest.mark.parametrize("packing", ["concatenated", "isolated", "padded"])
def test_cached_tokens_are_those_in_memory(packing: str, tmp_path: Path) -> None:
    cached = dataclasses.replace(many(tmp_path), packing=packing, test_tokens=300)
    on_disk, held = load(cached), load(dataclasses.replace(cached, cache=None))
    assert (on_disk.train_tokens, on_disk.test_tokens) == (held.train_tokens, 300)
    for part, expected in ((on_disk.train, held.train), (on_disk.test, held.test)):
        assert len(part) == len(expected)
        for index in range(len(part)):
            torch.testing.assert_close(part[index], expected[index], rtol=0, atol=0)


def test_cached_tokens_of_a_single_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "b" * 20)
    config = TextConfig(path=str(tmp_path / "a.txt"), tokenizer="bytes", length=8, cache=str(tmp_path / "cache"))
    splits = load(dataclasses.replace(config, held_out=0.25))
    assert splits.test.stream.tolist() == [98] * 19 + [256]


def test_text_is_encoded_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, encoded = many(tmp_path), []
    encode = ByteTokens.encode
    monkeypatch.setattr(ByteTokens, "encode", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    with ThreadPoolExecutor(3) as pool:
        (before,) = {splits.train_tokens for splits in pool.map(load, [config] * 3)}
    assert len(encoded) == 300
    assert load(dataclasses.replace(config, length=8, packing="isolated", test_tokens=9)).train_tokens == before
    assert len(encoded) == 300
    for other in (
        many(tmp_path, 301),
        *(dataclasses.replace(config, **change) for change in ({"seed": 1}, {"limit": 999})),
    ):
        encoded.clear()
        assert load(other).train_tokens != before
        assert encoded


def test_a_cache_that_was_interrupted_is_begun_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = many(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("cab.data.encoded.write_encoded", lambda folder, part: (write_encoded(folder, part), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            load(config)
    assert load(config).train_tokens == load(dataclasses.replace(config, cache=None)).train_tokens


def test_neither_text_nor_tokens_are_held_in_memory(tmp_path: Path) -> None:
    config = many(tmp_path, 40_000)  # 1.5 MB of text, 6 MB of tokens
    tracemalloc.start()
    splits = load(config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert splits.train_tokens + splits.test_tokens == sum(len(f"{n} ") * (n % 13 + 1) + 1 for n in range(40_000))
    assert peak < 3_000_000


def test_of_a_single_document_the_end_is_held_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 60 + "b" * 20)
    splits = load(TextConfig(path=str(tmp_path / "a.txt"), tokenizer="bytes", length=8, held_out=0.25))
    assert splits.test.stream.tolist() == [98] * 19 + [256]


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected test text of at least data.length=30 tokens, got"):
        load(TextConfig(path=str(lines(tmp_path)), tokenizer="bytes", length=30))
    with pytest.raises(UserError, match="expected training text of at least data.length=11 tokens, got 10"):
        load(TextConfig(path=str(write(tmp_path, "a.txt", b"a" * 20)), tokenizer="bytes", length=11, held_out=0.5))
