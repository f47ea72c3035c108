"""What each token of a byte-level vocabulary adds to a text, as bytes.

Read from `tokenizer.json` once. A server that streams looks tokens up here instead of
decoding a window of them again with every token. Knows no text longer than a token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongyun.errors import SpecError


class Vocabulary:
    """Bytes and names by token id; ids that a padded model table adds have no bytes."""

    def __init__(self, table: Sequence[bytes | None], special: Mapping[int, str]) -> None:
        self._table = table
        self._special = special

    @classmethod
    def load(cls, directory: Path) -> Vocabulary:
        """Read a model directory's `tokenizer.json`; only byte-level vocabularies are accepted."""
        file = directory / "tokenizer.json"
        try:
            raw = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SpecError(file, "", "no such file; a served model needs its tokenizer") from None
        except json.JSONDecodeError as error:
            raise SpecError(file, "", f"not JSON: {error}") from None
        if not _is_byte_level(raw.get("decoder")):
            raise SpecError(file, "decoder", "not byte-level; accepted: decoders with a ByteLevel stage")
        return cls.of(raw.get("model", {}).get("vocab", {}), raw.get("added_tokens", []), file=file)

    @classmethod
    def of(
        cls, vocab: Mapping[str, int], added: Sequence[Mapping[str, Any]], *, file: object = "tokenizer.json"
    ) -> Vocabulary:
        """Translate the `vocab` and `added_tokens` of a `tokenizer.json`."""
        size = max([-1, *vocab.values(), *(token["id"] for token in added)]) + 1
        table: list[bytes | None] = [None] * size
        byte_of = {character: byte for byte, character in enumerate(byte_characters())}
        for spelling, token in vocab.items():
            try:
                table[token] = bytes([byte_of[character] for character in spelling])
            except KeyError as error:
                raise SpecError(file, "model.vocab", f"'{spelling}': {error} stands for no byte") from None
        special = {}
        for entry in added:
            # Added tokens are written as they are; only the special ones are not part of the text.
            table[entry["id"]] = b"" if entry.get("special") else entry["content"].encode()
            if entry.get("special"):
                special[entry["id"]] = entry["content"]
        return cls(table, special)

    def __len__(self) -> int:
        return len(self._table)

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to the text; nothing for a special or unnamed one."""
        return (self._table[token] or b"") if token < len(self._table) else b""

    def name_of(self, token: int) -> bytes:
        """A token spelled out, special ones by their name, for log-probabilities."""
        if token in self._special:
            return self._special[token].encode()
        return self.bytes_of(token) or f"<token {token}>".encode()


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in a byte-level vocabulary, by byte.

    GPT-2's alphabet: bytes that print stand for themselves, the others take the
    characters from U+0100 on, in order.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printing else chr(next(others)) for byte in range(256)]


def _is_byte_level(decoder: Mapping[str, Any] | None) -> bool:
    if decoder is None:
        return False
    return decoder.get("type") == "ByteLevel" or any(map(_is_byte_level, decoder.get("decoders", ())))
