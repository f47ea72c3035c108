"""A byte-level BPE tokenizer, trained on the corpus and saved in the hub's layout.

It decides how text is cut into tokens and how a chat becomes text (ChatML, the form
that Qwen models use). It knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tongyun.cloud.training.corpus import Document

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL = (END_OF_TEXT, TURN_START, TURN_END)

# Words take one sign or blank before them, so that `.append` and ` self` are one token.
# Runs of blanks give their last blank to the word that follows; a line end stands alone,
# so that a prompt that ends in a new line is cut as it was in training.
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class Bpe:
    """A trained tokenizer with the few things training and evaluation ask of it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @classmethod
    def train(cls, documents: Iterable[Document], size: int) -> Bpe:
        """Learn `size` tokens, special ones and the 256 bytes included."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=list(SPECIAL),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator((d.text for d in documents), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, directory: Path) -> Bpe:
        return cls(Tokenizer.from_file(str(directory / "tokenizer.json")))

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Tokens of each text; a special token's spelling in a text is text, never the token."""
        self.tokenizer.encode_special_tokens = True
        return [encoding.ids for encoding in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=False)
        return text

    @property
    def end_of_text(self) -> int:
        token: int = self.tokenizer.token_to_id(END_OF_TEXT)
        return token

    @property
    def size(self) -> int:
        size: int = self.tokenizer.get_vocab_size()
        return size

    def save(self, directory: Path, *, max_positions: int) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as transformers reads them."""
        directory.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_positions,
            "eos_token": END_OF_TEXT,
            "pad_token": END_OF_TEXT,
            "additional_special_tokens": [TURN_START, TURN_END],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        texts = {
            "tokenizer.json": self.tokenizer.to_str(pretty=False),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }
        for name, text in texts.items():
            partial = directory / f".{name}.partial"
            partial.write_text(text)
            partial.replace(directory / name)
