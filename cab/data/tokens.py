"""Tokenizers: the bytes of a text, or any tokenizer of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from cab.config import TextConfig, UserError


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

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts, without any that stand for their beginning or end."""
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

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

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

    def encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens)

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(folder)


def tokenizer(config: TextConfig, teacher: str | None = None) -> Tokens:
    """The tokenizer that the configuration names."""
    if config.tokenizer == "bytes":
        return ByteTokens()
    return HuggingFaceTokens(teacher or "" if config.tokenizer == "teacher" else config.tokenizer)
