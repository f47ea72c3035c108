"""How a finished run reads: tables and completions in Markdown, for the documentation.

Every figure comes from the outcome; nothing is computed here.
"""

from __future__ import annotations

from tongyun.cloud.training.finish import Outcome
from tongyun.report import number

_GREEDY = "The likeliest next token each time. The prompt is what stands before `⟦`."
_HOW = "Sampled at temperature {:g}, the first sample of each. The prompt is what stands before `⟦`."


def markdown(outcome: Outcome) -> str:
    """The results of a run as a page."""
    return "\n".join([*_head(outcome), *_scores(outcome), *_completions(outcome)])


def _head(outcome: Outcome) -> list[str]:
    facts = {
        "parameters": f"{outcome.parameters:,}",
        "model directory": f"{number(outcome.model_bytes / 1e6, 4)} MB",
        "text to train on": f"{number(outcome.train_bytes / 1e6)} MB, {outcome.train_tokens:,} tokens",
        "tokens trained": (
            f"{outcome.trained_tokens:,} ({number(outcome.trained_tokens / outcome.train_tokens)} epochs)"
        ),
        "training time": f"{number(outcome.training_s / 60)} min on {outcome.threads} CPU thread(s)",
        "training loss at the end": f"{number(outcome.loss)} nats per token",
        "versions": ", ".join(f"{name} {version}" for name, version in outcome.versions.items()),
        "corpus": f"SHA-256 `{outcome.corpus_digest[:16]}…`",
    }
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    title = f"# {outcome.name}: results of the run"
    return [title, "", f"Written by `tongyun train`; {outcome.source}.", "", "| | |", "|---|---|", *rows, ""]


def _scores(outcome: Outcome) -> list[str]:
    rows = [f"| {outcome.name} | {number(outcome.bits_per_byte)} |"]
    rows += [f"| {name} | {number(bits)} |" for name, bits in outcome.compressors.items()]
    files = [f"| {name} | {number(bits)} |" for name, bits in outcome.bits_per_byte_of.items()]
    size = f"{number(outcome.held_out_bytes / 1e3)} kB in {len(files)} files"
    head = ["## Held-out bits per byte", "", f"Lower is better; {size}, each from its own beginning.", ""]
    return [
        *head,
        "| | bits per byte |",
        "|---|---:|",
        *rows,
        "",
        "| file | bits per byte |",
        "|---|---:|",
        *files,
        "",
    ]


def _completions(outcome: Outcome) -> list[str]:
    lines = [
        "## Completions",
        "",
        _HOW.format(outcome.temperature) if outcome.temperature else _GREEDY,
        "",
    ]
    for prompt, completion in outcome.completions.items():
        lines += ["````python", f"{prompt}⟦{completion}⟧", "````", ""]
    return lines
