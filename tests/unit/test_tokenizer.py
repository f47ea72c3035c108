"""Text streams out in whole characters, and stop tokens come from the model's own files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tongyun.errors import RequestError, SpecError
from tongyun.model.tokenizer import Tokenizer, eos_ids, write_byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_byte_tokenizer(directory)
    return Tokenizer(directory)


@pytest.mark.parametrize("text", ["plain", " leading  spaces\n", "数据中心的芯片", "e\u0301 👩‍🚀 mixed 𝛼"])
def test_text_survives(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


@given(text=st.text(max_size=40))
@settings(max_examples=60, deadline=None)
def test_whole_characters_only(tokenizer: Tokenizer, text: str) -> None:
    """Increments hold no unfinished character and add up to the text."""
    detokenizer = tokenizer.detokenizer()
    increments = [detokenizer.add(token) for token in tokenizer.encode(text)]
    assert all("\ufffd" not in part for part in increments) or "\ufffd" in text
    assert "".join(increments) + detokenizer.finish() == text


@given(tokens=st.lists(st.integers(0, 257), max_size=80))
@settings(max_examples=150, deadline=None)
def test_any_bytes_add_up(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """Tokens that are no UTF-8 at all still stream to exactly what decoding them at once gives."""
    detokenizer = tokenizer.detokenizer()
    streamed = "".join(detokenizer.add(token) for token in tokens) + detokenizer.finish()
    assert streamed == tokenizer.decode(tokens)


def test_an_unfinished_character_is_held_and_then_shown(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.add(*tokenizer.encode("a中")[:-1]) == "a"
    assert detokenizer.finish() == "\ufffd"
    assert detokenizer.add(*tokenizer.encode("b")) == "b"


def test_chat_ends_where_the_assistant_speaks(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.chat([{"role": "user", "content": "hello"}])
    assert tokenizer.decode(tokens) == "user: hello\nassistant: "


def test_no_chat_template_is_a_request_error(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    for file in (tmp_path / "chat_template.jinja", tmp_path / "tokenizer_config.json"):
        if file.name == "chat_template.jinja":
            file.unlink()
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(tmp_path).chat([{"role": "user", "content": "hello"}])


def test_eos_ids_prefer_the_generation_config(tmp_path: Path) -> None:
    assert eos_ids(tmp_path) == ()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 3}))
    assert eos_ids(tmp_path) == (3,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 3]}))
    assert eos_ids(tmp_path) == (5, 3)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(SpecError, match=r"generation_config\.json"):
        eos_ids(tmp_path)


def test_tokenizer_s_own_eos_is_the_last_resort(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_ids == (256,)


def test_a_directory_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)
