"""What remains of a run: the model in the hub's layout, its score, its curve and a few completions.

Everything is measured on the model as saved, rounded weights included, read back
from its files. It decides nothing about training.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from tongyun.cloud.training.bpe import Bpe
from tongyun.cloud.training.corpus import Document, compressed_bits_per_byte
from tongyun.cloud.training.evaluate import score, total
from tongyun.cloud.training.forward import causal
from tongyun.cloud.training.loop import Point, Run, write_curve
from tongyun.cloud.training.prepare import Prepared
from tongyun.model.checkpoint import save_model
from tongyun.model.qwen3 import Qwen3
from tongyun.model.weights import load_model
from tongyun.report import plot, to_json
from tongyun.store import versions
from tongyun.units import Source


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The record of a finished run, as `record.json` holds it."""

    name: str
    source: Source
    parameters: int
    model_bytes: int
    train_bytes: int
    train_tokens: int
    held_out_bytes: int
    trained_tokens: int
    training_s: float
    loss: float
    """Mean over the last twentieth of the steps, in nats per token."""
    bits_per_byte: float
    bits_per_byte_of: Mapping[str, float]
    """The same for each held-out file."""
    compressors: Mapping[str, float]
    completions: Mapping[str, str]
    temperature: float
    """Of the completions."""
    corpus_digest: str
    versions: Mapping[str, str]
    threads: int


def finish(run: Run, prepared: Prepared, model_directory: Path, report_directory: Path) -> Outcome:
    """Save the model, score what was saved, and write `record.json`, `curve.csv` and `loss.png`."""
    recipe, bpe = run.recipe, prepared.bpe
    save_model(run.model, model_directory)
    bpe.save(model_directory, max_positions=recipe.model.max_positions)
    outcome = _measure(run, prepared, model_directory)
    report_directory.mkdir(parents=True, exist_ok=True)
    write_curve(run.curve, report_directory / "curve.csv")
    draw_curve(run.curve, report_directory / "loss.png", recipe.name)
    write_text(report_directory / "record.json", to_json(outcome) + "\n")
    return outcome


def write_text(file: Path, text: str) -> None:
    """Write under a temporary name and rename, so that a reader never sees half a file."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _measure(run: Run, prepared: Prepared, model_directory: Path) -> Outcome:
    corpus, curve, bpe, asked = prepared.corpus, run.curve, prepared.bpe, run.recipe.evaluation
    model = load_model(model_directory)
    scores = score(model, corpus.held_out, bpe, context=asked.context, stride=asked.stride)
    tail = curve[-max(1, len(curve) // 20) :]
    return Outcome(
        name=run.recipe.name,
        source=Source.MEASURED,
        parameters=sum(p.numel() for p in run.model.parameters()),
        model_bytes=sum(file.stat().st_size for file in model_directory.iterdir()),
        train_bytes=_bytes(corpus.train),
        train_tokens=len(prepared.tokens.train),
        held_out_bytes=_bytes(corpus.held_out),
        trained_tokens=curve[-1].tokens,
        training_s=curve[-1].seconds,
        loss=sum(point.loss for point in tail) / len(tail),
        bits_per_byte=total(scores.values()).bits_per_byte,
        bits_per_byte_of={name: s.bits_per_byte for name, s in scores.items()},
        compressors=compressed_bits_per_byte(corpus.held_out),
        completions=_completions(run, model, bpe),
        temperature=asked.temperature,
        corpus_digest=corpus.digest,
        versions=versions(),
        threads=torch.get_num_threads(),
    )


def _bytes(documents: Iterable[Document]) -> int:
    return sum(document.size_bytes for document in documents)


def _completions(run: Run, model: Qwen3, bpe: Bpe) -> dict[str, str]:
    """A continuation of each prompt of the recipe; its seed makes them repeatable."""
    asked = run.recipe.evaluation
    generator = torch.Generator().manual_seed(run.recipe.seed)
    return {
        prompt: complete(model, bpe, prompt, asked.prompt_tokens, asked.temperature, generator)
        for prompt in asked.prompts
    }


@torch.no_grad()
def complete(
    model: Qwen3,
    bpe: Bpe,
    prompt: str,
    tokens: int,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> str:
    """A continuation of `prompt`, token by token, up to `tokens` or the end of the text.

    Every token reads the whole prefix again: a few samples need no cache. The prompt is
    read as the server reads it, as a piece of some document; an empty one begins a
    document. Temperature 0 takes the likeliest token.
    """
    (row,) = bpe.encode_all([prompt])
    prefix = list(row) or [bpe.end_of_text]
    asked = len(prefix)
    while len(prefix) < min(asked + tokens, model.config.max_positions):
        hidden_TD = model(torch.tensor(prefix), torch.arange(len(prefix)), causal(len(prefix)))
        scores_V = model.logits(hidden_TD[-1:])[0]
        if temperature > 0:
            chances_V = (scores_V / temperature).softmax(-1)
            token = int(torch.multinomial(chances_V, 1, generator=generator))
        else:
            token = int(scores_V.argmax())
        if token in model.config.eos_token_ids:
            break
        prefix.append(token)
    return bpe.decode(prefix[asked:])


def draw_curve(curve: list[Point], file: Path, name: str) -> None:
    """Loss in nats per token over tokens trained, with the held-out loss beside it."""
    with plot(file, title=f"{name}: loss", x="million tokens trained", y="nats per token") as axes:
        axes.plot([p.tokens / 1e6 for p in curve], [p.loss for p in curve], alpha=0.6, label="training batch")
        held_out = [(p.tokens / 1e6, p.held_out_loss) for p in curve if p.held_out_loss is not None]
        axes.plot(*zip(*held_out, strict=True), marker="o", markersize=3, label="held out (part)")
