"""Data preparation: which files, which tokens, which rows, and that nothing is lost."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tongyun.cloud.training.bpe import END_OF_TEXT, SPECIAL, TURN_END, TURN_START, Bpe
from tongyun.cloud.training.corpus import Document, Windows, compressed_bits_per_byte, encode, gather
from tongyun.cloud.training.prepare import prepare
from tongyun.cloud.training.recipe import Recipe
from tongyun.errors import InputError, SpecError


def test_files_are_split_sorted_and_filtered(recipe: Recipe) -> None:
    corpus = gather(recipe)
    assert [d.name for d in corpus.train] == ["a.py", "b.py", "pkg/kept.py"]
    assert [d.name for d in corpus.held_out] == ["pkg/held.py"]
    assert corpus.digest == gather(recipe).digest


def test_the_digest_notices_one_changed_letter(recipe: Recipe) -> None:
    before = gather(recipe).digest
    file = recipe.file.parent / "code" / "a.py"
    file.write_text(file.read_text().replace("class", "clasS"))
    assert gather(recipe).digest != before


def test_a_held_out_file_that_is_not_there_is_named(recipe: Recipe) -> None:
    data = dataclasses.replace(recipe.data, held_out=("pkg/hold.py",))
    with pytest.raises(SpecError, match=r"held_out\[0\].*pkg/held\.py"):
        gather(dataclasses.replace(recipe, data=data))


def test_a_directory_that_is_not_there_is_named(recipe: Recipe) -> None:
    data = dataclasses.replace(recipe.data, path="nowhere")
    with pytest.raises(SpecError, match=r"data\.path: no such directory"):
        gather(dataclasses.replace(recipe, data=data))


def test_the_standard_library_is_found_and_free_of_this_machine() -> None:
    recipe = Recipe.load(Path(__file__).parents[3] / "recipes" / "stdlib-moe.toml")
    corpus = gather(recipe)
    names = {d.name for d in corpus.train}
    assert {"os.py", "argparse.py", "asyncio/events.py"} <= names
    assert not names & set(recipe.data.held_out)
    assert not any("sysconfigdata" in name or "site-packages" in name or "/test" in name for name in names)
    assert sum(d.size_bytes for d in corpus.train) > 5e6


def test_tokens_give_back_every_byte(recipe: Recipe) -> None:
    prepared = prepare(recipe)
    texts = [
        "def f():\n    return 'naïve 通云'\n\n\n\tx\r\n",
        END_OF_TEXT + " in a string",
        "   ",
        "\x00\x7f",
    ]
    for text, row in zip(texts, prepared.bpe.encode_all(texts), strict=True):
        assert prepared.bpe.decode(row) == text
        assert prepared.bpe.end_of_text not in row, "spelling a special token does not make one"


def test_documents_are_separated(recipe: Recipe) -> None:
    prepared = prepare(recipe)
    tokens = encode(prepared.corpus.train, prepared.bpe)
    end = prepared.bpe.end_of_text
    assert tokens[0] == tokens[-1] == end
    assert int((tokens == end).sum()) == len(prepared.corpus.train) + 1
    text = prepared.bpe.decode(tokens.tolist())
    assert text == END_OF_TEXT + "".join(d.text + END_OF_TEXT for d in prepared.corpus.train)


def test_a_vocabulary_the_corpus_cannot_fill_is_refused(recipe: Recipe) -> None:
    greedy = dataclasses.replace(recipe, tokenizer=dataclasses.replace(recipe.tokenizer, vocab=60_000))
    with pytest.raises(SpecError, match=r"tokenizer\.vocab: the corpus yields only"):
        prepare(greedy)


def test_the_digest_follows_what_decides_the_weights(recipe: Recipe) -> None:
    digest = prepare(recipe).digest
    assert prepare(recipe).digest == digest
    assert prepare(dataclasses.replace(recipe, seed=4)).digest != digest
    evaluation = dataclasses.replace(recipe.evaluation, prompts=())
    assert prepare(dataclasses.replace(recipe, evaluation=evaluation)).digest == digest


def test_transformers_reads_the_tokenizer_and_its_chat_template(recipe: Recipe, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    bpe = prepare(recipe).bpe
    bpe.save(tmp_path / "tokenizer", max_positions=64)
    loaded = AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))
    assert len(loaded) == 320
    assert loaded.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2]
    assert loaded.eos_token == END_OF_TEXT
    text = "    def total(self):\n        return 1\n"
    assert loaded.encode(text, add_special_tokens=False) == bpe.encode_all([text])[0]
    chat = [{"role": "user", "content": "Hello"}]
    rendered = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == f"{TURN_START}user\nHello{TURN_END}\n{TURN_START}assistant\n"
    assert loaded.encode(rendered, add_special_tokens=False)[0] == 1


def test_an_epoch_reads_every_token_once() -> None:
    tokens = np.arange(1003, dtype=np.uint16)
    windows = Windows(tokens=tokens, sequence=10, seed=1)
    epoch = windows.rows(0, 99)
    assert epoch.shape == (99, 11)
    assert (np.diff(epoch, axis=1) == 1).all(), "rows are stretches of the text"
    starts = epoch[:, 0]
    assert len(set(starts.tolist())) == 99
    assert len(set((starts % 10).tolist())) == 1, "rows do not overlap"
    assert list(starts) != sorted(starts)
    assert set(windows.rows(99, 99)[:, 0].tolist()) != set(starts.tolist()), "the next epoch cuts elsewhere"


def test_rows_do_not_depend_on_how_they_are_asked_for() -> None:
    windows = Windows(tokens=np.arange(1003, dtype=np.uint16), sequence=10, seed=1)
    together = windows.rows(0, 250)
    apart = np.concatenate([windows.rows(i, 25) for i in range(0, 250, 25)])
    assert (together == apart).all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(InputError, match="too few"):
        Windows(tokens=np.arange(15, dtype=np.uint16), sequence=10, seed=1).rows(0, 1)


def test_compressors_are_measured_a_file_at_a_time() -> None:
    one = Document(name="a.py", text="x = 1\n" * 100)
    bits = compressed_bits_per_byte([one])
    assert 0 < bits["gzip"] < 1
    assert compressed_bits_per_byte([one, one]) == bits, "no file helps another"


def test_the_tokenizer_is_repeatable() -> None:
    documents = [Document(name="a.py", text="def add(a, b):\n    return a + b\n" * 3)]
    first, second = (Bpe.train(documents, 280).tokenizer.to_str() for _ in range(2))
    assert first == second
