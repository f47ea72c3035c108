"""`tongyun serve --twin`: the gateway before a simulated fleet that keeps pace with the wall clock."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tongyun.cli.fleet import read_fleet
from tongyun.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.ask import Served
    from tongyun.cloud.gateway.ports import Sink, Tokenizer, Vocabulary
    from tongyun.cloud.twin import Lost, Twin, Watch
    from tongyun.codesign.at_work import AtWork
    from tongyun.codesign.fleet import Fleet
    from tongyun.specs import Chip, MarketSpec

ANSWER_TOKENS = 256
"""Of a chat that names no limit: a model would have come to its end by itself."""

USUAL = 1000, 200
"""Tokens of a prompt and its answer, by which turns on shared replicas are measured; assumed."""

GRACE_S = 0.01
"""To read and tokenise a request that has arrived; less where steps are short."""


def twin_gateway(
    file: Path,
    model: str | None,
    *,
    names: tuple[str, ...],
    api_key: str | None,
    body_bytes: int,
    client_s: float = 0.0,
) -> Gateway:
    """The gateway before the fleet of `file`; `model`, where given, has to be the fleet's.

    `client_s` is what the client itself takes for a first token; the twin answers so much earlier.
    """
    from tongyun.specs import find_market

    several = find_market(file)
    if several is not None:
        if model is not None or names:
            said = "--name" if model is None else "MODEL"
            raise InputError(f"{file}: model: the file names its models; leave {said} out")
        return _of_several(file, several, api_key=api_key, body_bytes=body_bytes, client_s=client_s)
    return _of_one(file, model, names, api_key=api_key, body_bytes=body_bytes, client_s=client_s)


def _of_one(
    file: Path,
    model: str | None,
    names: tuple[str, ...],
    *,
    api_key: str | None,
    body_bytes: int,
    client_s: float,
) -> Gateway:
    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.classes import Classes
    from tongyun.cloud.sched.router import find_router
    from tongyun.codesign.classes import headroom
    from tongyun.specs import find_model

    spec, fleet = read_fleet(file)
    own = fleet.question.model.name
    if model is not None and find_model(model)[1] != own:
        raise InputError(f"{file}: model: the fleet serves {own}, not {model}; leave MODEL out or name it")
    chip = fleet.question.chip.at()
    # Refuses what does not fit before a port is announced.
    context_tokens = _context(fleet, chip)
    text = _text(spec.model, fleet.question.model.vocab)

    def start(sink: Sink) -> Twin:
        from tongyun.codesign.at_work import put_to_work

        pools = [fleet.engines(pool, chip, words=text.words) for pool in fleet.pools]
        router = find_router(spec.router, headroom=headroom(fleet.classes))
        return _twin(
            lambda watches, lost: put_to_work(fleet, pools, router, chip, watches=watches, told=lost),
            sink,
            shortest_s=min(pool.table.shortest_s for pool in pools),
            client_s=client_s,
        )

    return Gateway(
        served=_served(names or (own,), context_tokens, fleet.question.model.vocab, text),
        start_engine=start,
        api_key=api_key,
        body_bytes=body_bytes,
        headers=_said(spec.name, own, f"{fleet.question.chips} x {chip.name}", [text]),
        classes=Classes(priorities={one.name: one.priority for one in fleet.classes}),
    )


def _of_several(
    file: Path, spec: MarketSpec, *, api_key: str | None, body_bytes: int, client_s: float
) -> Gateway:
    from tongyun.cli.market import read_market
    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.latency import Slo
    from tongyun.cloud.sched.router import find_router
    from tongyun.cloud.workload import Arrival
    from tongyun.codesign.runs import ToldTo

    find_router(spec.router)
    market = read_market(file, spec, [Arrival(0.0, *USUAL)], slo=Slo())
    chip = next(iter(market.models.values())).question.chip.at()
    shapes = {name: one.config or one.name for one in spec.model for name in one.names}
    vocabs = {name: one.question.model.vocab for name, one in market.models.items()}
    read = {(shape, vocabs[name]): _text(shape, vocabs[name]) for name, shape in shapes.items()}
    texts = {name: read[shape, vocabs[name]] for name, shape in shapes.items()}
    contexts = {
        name: _context(market.fleet(name, part.pools), chip) for part in market.parts for name in part.models
    }

    def start(sink: Sink) -> Twin:
        words = {name: text.words for name, text in texts.items()}

        def begin(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
            told = ToldTo(words=words, watches=watches, lost=lost)
            return market.put_to_work(lambda: find_router(spec.router), chip=chip, told=told)[1]

        runs, _ = market.put_to_work(lambda: find_router(spec.router), chip=chip)
        return _twin(begin, sink, shortest_s=min(run.shortest_s for run in runs), client_s=client_s)

    served = [_served((name,), contexts[name], vocabs[name], texts[name]) for name in market.models]
    return Gateway(
        served=served[0],
        others=tuple(served[1:]),
        start_engine=start,
        api_key=api_key,
        body_bytes=body_bytes,
        headers=_said(
            spec.name, f"{len(served)} models", f"{market.chips} x {chip.name}", list(texts.values())
        ),
    )


def _twin(
    begin: Callable[[tuple[Watch, Watch], Lost], AtWork], sink: Sink, *, shortest_s: float, client_s: float
) -> Twin:
    from tongyun.cloud.twin import Twin

    spare_s = shortest_s - client_s
    if spare_s <= 0:
        raise InputError(
            f"--client-ms {client_s * 1e3:g}: accepted: less than the fleet's shortest step, "
            f"{shortest_s * 1e3:.3g} ms"
        )
    return Twin(begin, sink, grace_s=min(GRACE_S, spare_s / 2), client_s=client_s)


def _context(fleet: Fleet, chip: Chip) -> int:
    """Tokens of the longest request that every pool holds."""
    return min(fleet.limits(chip, pool.plan, pool.role).max_context_tokens for pool in fleet.pools)


@dataclass(frozen=True, kw_only=True)
class _Text:
    """How a model's prompts are counted, and what answers are made of."""

    tokenizer: Tokenizer
    vocabulary: Vocabulary
    words: Sequence[int]
    own: bool


def _text(model: str, vocab: int) -> _Text:
    """By the model's own tokenizer where its directory has one, else by a stand-in."""
    from tongyun.cloud.gateway.filler import WORDS, Filler

    if not _own_tokenizer(model):
        filler = Filler(vocab)
        return _Text(tokenizer=filler, vocabulary=filler, words=filler.words, own=False)
    from tongyun.model.tokenizer import Tokenizer
    from tongyun.model.vocabulary import Vocabulary

    tokenizer = Tokenizer(Path(model))
    spelled = [tokenizer.encode(f" {word}") for word in WORDS]
    words = [tokens[0] for tokens in spelled if len(tokens) == 1] or [tokens[-1] for tokens in spelled]
    return _Text(tokenizer=tokenizer, vocabulary=Vocabulary.load(Path(model)), words=words, own=True)


def _served(names: tuple[str, ...], context_tokens: int, vocab: int, text: _Text) -> Served:
    from tongyun.cloud.gateway.ask import Served

    return Served(
        names=names,
        context_tokens=context_tokens,
        vocab=vocab,
        tokenizer=text.tokenizer,
        vocabulary=text.vocabulary,
        created=int(time.time()),
        answer_tokens=ANSWER_TOKENS,
    )


def _own_tokenizer(model: str) -> bool:
    return (Path(model) / "tokenizer.json").is_file()


def _said(name: str, models: str, chips: str, texts: Sequence[_Text]) -> dict[str, str]:
    """What every answer says of where it comes from. Headers are ASCII."""
    said = f"fleet={name}; model={models}; chips={chips}"
    own = {text.own for text in texts}
    counted = "counted by the model's tokenizer" if own == {True} else "counted by a stand-in"
    return {
        "x-tongyun-twin": said.encode("ascii", "replace").decode(),
        "x-tongyun-pace": "simulated",
        "x-tongyun-text": "filler",
        "x-tongyun-tokens": counted if len(own) == 1 else f"{counted} where a model has no tokenizer",
    }
