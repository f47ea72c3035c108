"""Text to tokens and back, with the chat template and stop tokens of a model directory.

`Detokenizer` turns a growing list of tokens into text that never has to be taken
back: a character whose bytes are not all there yet is held until they are. Knows no
request, model or cache.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tongyun.errors import RequestError, SpecError

REPLACEMENT = "\ufffd"
_LONGEST_CHARACTER = 4
"""Bytes of the longest UTF-8 character; no more tokens than this can be waiting for one."""


class Tokenizer:
    """A Hugging Face tokenizer with what serving needs of it."""

    def __init__(self, directory: Path) -> None:
        """Load from a model directory; a directory without a tokenizer is refused."""
        from transformers import AutoTokenizer

        if not (directory / "tokenizer.json").exists() and not (directory / "vocab.json").exists():
            raise SpecError(directory, "", "no tokenizer; expected tokenizer.json")
        try:
            self._inner: Any = AutoTokenizer.from_pretrained(str(directory))
        except (OSError, ValueError, KeyError) as error:
            raise SpecError(directory / "tokenizer.json", "", f"cannot be loaded: {error}") from None
        self.eos_ids = eos_ids(directory) or _only(self._inner.eos_token_id)

    @property
    def vocab(self) -> int:
        """Tokens known, added ones included; a model's table may be padded beyond it."""
        return len(self._inner)

    @property
    def has_chat_template(self) -> bool:
        return bool(self._inner.chat_template)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokens of a text as it stands, special tokens recognised but none added."""
        return tuple(self._inner.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens without special ones; incomplete characters become U+FFFD."""
        text: str = self._inner.decode(
            list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def token_text(self, token: int) -> str:
        """One token on its own, special ones spelt out, as log-probabilities report it."""
        return str(self._inner.decode([token], clean_up_tokenization_spaces=False))

    def chat(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> tuple[int, ...]:
        """Tokens of a conversation, ending where the assistant is to speak.

        `template` goes to the chat template (`tools`, `enable_thinking` …).
        """
        if not self.has_chat_template:
            raise RequestError("this model has no chat template; use /v1/completions", param="messages")
        from jinja2 import TemplateError

        try:
            text: str = self._inner.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=False, **template
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", param="messages"
            ) from None
        return self.encode(text)

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self)


class Detokenizer:
    """Text of a growing list of tokens, as increments whose sum is the text of all of them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._sent = 0

    def add(self, *tokens: int) -> str:
        """The text these tokens complete; empty while a character is still missing bytes."""
        self._window += tokens
        text = self._decode(self._window)
        # A last U+FFFD may be the beginning of a character. Everything before it is final.
        ready = text[:-1] if text.endswith(REPLACEMENT) else text
        new = ready[self._sent :]
        self._sent = max(self._sent, len(ready))
        if len(self._window) > 4 * _LONGEST_CHARACTER:
            self._shorten()
        return new

    def finish(self) -> str:
        """What was held back, an incomplete character as U+FFFD; the detokenizer is empty afterwards."""
        rest = self._decode(self._window)[self._sent :]
        self._window, self._sent = [], 0
        return rest

    def _shorten(self) -> None:
        """Forget all but the tokens that the text of the next one can depend on."""
        self._window = self._window[-2 * _LONGEST_CHARACTER :]
        text = self._decode(self._window)
        self._sent = len(text) - text.endswith(REPLACEMENT)


def eos_ids(directory: Path) -> tuple[int, ...]:
    """Tokens that end a generation: `generation_config.json`, else `config.json`, else none."""
    for name in ("generation_config.json", "config.json"):
        file = directory / name
        if file.exists():
            try:
                found = _only(json.loads(file.read_text()).get("eos_token_id"))
            except json.JSONDecodeError as error:
                raise SpecError(file, "", f"not JSON: {error}") from None
            if found:
                return found
    return ()


def _only(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def write_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer of the 256 bytes and two special tokens, for models of random weights.

    Token 256 ends a text and 257 pads; the chat template is one line a message.
    """
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # The alphabet maps each byte to a printable character; sorting makes the ids repeatable.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Fast(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token="<|end|>", pad_token="<|pad|>")
    wrapped.chat_template = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    directory.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(str(directory))
