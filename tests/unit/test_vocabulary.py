"""The bytes of tokens, against Hugging Face's own decoder."""

import json

import pytest

from tongyun.errors import SpecError
from tongyun.model.tokenizer import Tokenizer, write_byte_tokenizer
from tongyun.model.vocabulary import Vocabulary, byte_characters


def test_alphabet_is_that_of_the_tokenizers_library():
    from tokenizers import pre_tokenizers

    assert sorted(byte_characters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert len(set(byte_characters())) == 256


def test_every_token_decodes_as_hugging_face_does(tmp_path):
    write_byte_tokenizer(tmp_path)
    tokenizer, vocabulary = Tokenizer(tmp_path), Vocabulary.load(tmp_path)
    assert len(vocabulary) == tokenizer.vocab == 258
    text = "def f(x):\n    return 'é' + '漢字' + '🐍'\x00\t"
    assert b"".join(map(vocabulary.bytes_of, tokenizer.encode(text))).decode() == text
    for token in range(258):
        assert vocabulary.bytes_of(token).decode(errors="replace") == tokenizer.decode([token])


def test_special_tokens_have_a_name_and_no_text():
    added = [
        {"id": 1, "content": "<|end|>", "special": True},
        {"id": 2, "content": "<think>", "special": False},
    ]
    vocabulary = Vocabulary.of({"Ġa": 0}, added)
    assert [vocabulary.bytes_of(i) for i in (0, 1, 2, 99)] == [b" a", b"", b"<think>", b""]
    assert [vocabulary.name_of(i) for i in (0, 1, 2, 99)] == [b" a", b"<|end|>", b"<think>", b"<token 99>"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not JSON"),
        (json.dumps({"decoder": {"type": "Metaspace"}}), "decoder: not byte-level"),
        (json.dumps({"decoder": {"type": "ByteLevel"}, "model": {"vocab": {"漢": 0}}}), "stands for no byte"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path, content, says):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(SpecError, match=says):
        Vocabulary.load(tmp_path)
