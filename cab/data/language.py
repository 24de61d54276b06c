"""Sequences of tokens for a language model: text, tokenised, held out in part, and cut to a length."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from cab.config import TextConfig, UserError
from cab.data.documents import documents, files_of
from cab.data.encoded import Encoded, in_memory, read_encoded, write_encoded
from cab.files import save_whole

IGNORED = -100  # the label of what is not learnt


class Tokens(Protocol):
    """What is asked of a tokenizer.

    Attributes:
        size: number of tokens.
        end: the token that ends a document.
        key: what tells it from other tokenizers.
    """

    size: int
    end: int
    key: str

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any that stand for its beginning or end."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def save(self, folder: Path) -> None:
        """Write it as transformers' ``AutoTokenizer`` reads it."""
        ...


class ByteTokens:
    """The bytes of UTF-8, and one token more for the end of a document."""

    size = 257
    end = 256
    key = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(token for token in tokens if token < self.end).decode(errors="replace")

    def save(self, folder: Path) -> None:
        from tokenizers import Tokenizer, decoders
        from tokenizers.models import BPE
        from transformers import PreTrainedTokenizerFast

        # It knows no text at all, and falls back to bytes.
        names = {f"<0x{byte:02X}>": byte for byte in range(self.end)}
        tokenizer = Tokenizer(BPE({**names, "<end>": self.end}, [], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
        saved.save_pretrained(folder)


class HuggingFaceTokens:
    """A tokenizer of transformers.

    Raises:
        UserError: no such tokenizer, or one without a token for the end of a document.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"expected a tokenizer by name or path, got {name!r}: {reason}") from None
        if self.tokenizer.eos_token_id is None:
            raise UserError(f"expected a tokenizer with a token for the end of a text, got {name!r} without")
        self.size: int = len(self.tokenizer)
        self.end: int = self.tokenizer.eos_token_id
        self.key = repr(sorted(self.tokenizer.get_vocab().items()))

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


class Row(TypedDict, total=False):
    """One sequence: its tokens, the labels of a language model (-100 does not count), and what its data set adds.

    That is 0 where a token is padding, or of each token its position in its document.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor


class TextSplits(NamedTuple):
    """The data of a run.

    Attributes:
        train: what is learnt.
        test: windows over the text that was held out.
        tokens: the tokenizer.
        train_tokens, test_tokens: how many.
    """

    train: Concatenated | Isolated | Padded
    test: Windows
    tokens: Tokens
    train_tokens: int
    test_tokens: int


def load(config: TextConfig, teacher: str | None = None) -> TextSplits:
    """The splits that the configuration describes.

    Whole documents are held out for the test; of a single document the end.

    Args:
        config: of the data.
        teacher: the model whose tokenizer is meant by "teacher".

    Raises:
        UserError: no such file or tokenizer, no text, or less of it than a sequence.
    """
    tokens = tokenizer(config, teacher)
    train, test = _encoded(config, tokens)
    test_stream = test.stream[: config.test_tokens]
    for name, count in (("test", len(test_stream)), ("training", len(train.stream))):
        if count < config.length:
            raise UserError(f"expected {name} text of at least data.length={config.length} tokens, got {count}")
    rows, windows = _PACKINGS[config.packing](train, config.length), Windows(test_stream, config.length)
    return TextSplits(rows, windows, tokens, len(train.stream), len(test_stream))


def tokenizer(config: TextConfig, teacher: str | None = None) -> Tokens:
    """The tokenizer that the configuration names."""
    if config.tokenizer == "bytes":
        return ByteTokens()
    return HuggingFaceTokens(teacher or "" if config.tokenizer == "teacher" else config.tokenizer)


class Concatenated(Dataset[Row]):
    """Documents end to end, cut into sequences of one length; a shorter rest is dropped."""

    def __init__(self, documents: Encoded, length: int) -> None:
        self.stream = documents.stream
        self.length = length

    def __len__(self) -> int:
        return len(self.stream) // self.length

    def __getitem__(self, index: int) -> Row:
        ids = self.stream[index * self.length :][: self.length].long()
        return {"input_ids": ids, "labels": ids}


class Isolated(Concatenated):
    """The same sequences, of which each token knows its position in its document.

    Positions start again with each document and with each sequence: the rest of a document that was cut begins anew.
    The first token of either is not predicted.
    """

    def __init__(self, documents: Encoded, length: int) -> None:
        super().__init__(documents, length)
        self.bounds = documents.bounds

    def __getitem__(self, index: int) -> Row:
        ids = super().__getitem__(index)["input_ids"]
        first = index * self.length
        at = torch.arange(first, first + self.length)
        document = torch.searchsorted(self.bounds, at, right=True) - 1
        positions = at - self.bounds[document].clamp(min=first)
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}


class Padded(Dataset[Row]):
    """Documents cut into sequences of one length; what is shorter is filled up with padding on its right."""

    def __init__(self, documents: Encoded, length: int) -> None:
        self.documents = documents
        self.length = length
        # A single token predicts nothing.
        of_documents = (documents.bounds.diff() + length - 2) // length
        self.rows = F.pad(of_documents.cumsum(0), (1, 0))

    def __len__(self) -> int:
        return int(self.rows[-1])

    def __getitem__(self, index: int) -> Row:
        bounds = self.documents.bounds
        document = int(torch.searchsorted(self.rows, index, right=True)) - 1
        start = int(bounds[document] + (index - self.rows[document]) * self.length)
        size = min(self.length, int(bounds[document + 1]) - start)
        ids = torch.zeros(self.length, dtype=torch.int64)
        ids[:size] = self.documents.stream[start : start + size]
        mask = torch.arange(self.length) < size
        return {"input_ids": ids, "labels": ids.masked_fill(~mask, IGNORED), "attention_mask": mask.long()}


_PACKINGS: dict[str, Callable[[Encoded, int], Concatenated | Isolated | Padded]] = {
    "concatenated": Concatenated,
    "isolated": Isolated,
    "padded": Padded,
}


class Windows(Dataset[Row]):
    """Windows of ``length`` tokens that move on by half of it, over a whole stream.

    Each token is predicted once, in the first window that holds it: with at least half a window of context, but for
    those of the first half.
    """

    def __init__(self, stream: Tensor, length: int) -> None:
        self.stream = stream
        self.length = length
        self.stride = length // 2

    def __len__(self) -> int:
        return (len(self.stream) - self.length) // self.stride + 1

    def __getitem__(self, index: int) -> Row:
        ids = self.stream[index * self.stride :][: self.length].long()
        labels = ids.clone()
        if index:
            labels[: self.length - self.stride] = IGNORED
        return {"input_ids": ids, "labels": labels}


def _encoded(config: TextConfig, tokens: Tokens) -> tuple[Encoded, Encoded]:
    """The documents for training, and those for the test."""
    if config.cache is None:
        training, test = _parts(config, tokens)
        return in_memory(training), in_memory(test)
    folder = Path(config.cache) / _key(config, tokens)
    with _locked(Path(config.cache)):  # whoever else wants these tokens finds them
        if not folder.is_dir():
            save_whole(folder, lambda unfinished: _write_parts(unfinished, _parts(config, tokens)))
    return read_encoded(folder / "train"), read_encoded(folder / "test")


def _parts(config: TextConfig, tokens: Tokens) -> tuple[Iterable[list[int]], Iterable[list[int]]]:
    """The documents for training and for the test, each read anew and encoded one by one."""

    def encoded(chosen: Callable[[int], bool]) -> Iterator[list[int]]:
        for index, text in enumerate(documents(config)):
            if chosen(index):
                yield [*tokens.encode(text), tokens.end]

    total = sum(1 for _ in documents(config))
    if total == 1:
        (only,) = encoded(lambda index: True)
        cut = max(round(len(only) * (1 - config.held_out)), 1)
        return [only[:cut]], [only[cut:]]
    count = max(round(total * config.held_out), 1)
    test = set(random.Random(config.seed).sample(range(total), count)) if total else set()
    return encoded(lambda index: index not in test), encoded(test.__contains__)


def _write_parts(folder: Path, parts: tuple[Iterable[list[int]], Iterable[list[int]]]) -> None:
    for name, part in zip(("train", "test"), parts, strict=True):
        write_encoded(folder / name, part)


def _key(config: TextConfig, tokens: Tokens) -> str:
    """What tells these documents, so encoded and held out, from others: files that changed are others."""
    files = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files_of(config)]
    told = (files, config.field, config.limit, config.held_out, config.seed, tokens.key)
    return hashlib.blake2b(repr(told).encode(), digest_size=16).hexdigest()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time in; the lock of a process that was killed is gone with it."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
