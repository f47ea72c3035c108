"""`tongyun serve --twin`: the gateway before a simulated fleet that keeps pace with the wall clock."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from tongyun.cli.fleet import read_fleet
from tongyun.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.ports import Sink, Tokenizer, Vocabulary
    from tongyun.cloud.twin import Twin
    from tongyun.codesign.fleet import Fleet

ANSWER_TOKENS = 256
"""Of a chat that names no limit: a model would have come to its end by itself."""

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
    from tongyun.cloud.gateway.app import Gateway
    from tongyun.cloud.gateway.ask import Served
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
    limits = [fleet.limits(chip, pool.plan, pool.role) for pool in fleet.pools]
    tokenizer, vocabulary, words = _text(spec.model, fleet)

    def start(sink: Sink) -> Twin:
        from tongyun.cloud.twin import Twin
        from tongyun.codesign.at_work import put_to_work

        pools = [fleet.engines(pool, chip, words=words) for pool in fleet.pools]
        spare_s = min(pool.shortest_s for pool in pools) - client_s
        if spare_s <= 0:
            raise InputError(
                f"--client-ms {client_s * 1e3:g}: accepted: less than the fleet's shortest step, "
                f"{(spare_s + client_s) * 1e3:.3g} ms"
            )
        grace_s = min(GRACE_S, spare_s / 2)
        router = find_router(spec.router, headroom=headroom(fleet.classes))
        return Twin(
            lambda watches, lost: put_to_work(fleet, pools, router, chip, watches=watches, told=lost),
            sink,
            grace_s=grace_s,
            client_s=client_s,
        )

    return Gateway(
        served=Served(
            names=names or (own,),
            context_tokens=min(one.max_context_tokens for one in limits),
            vocab=fleet.question.model.vocab,
            tokenizer=tokenizer,
            vocabulary=vocabulary,
            created=int(time.time()),
            answer_tokens=ANSWER_TOKENS,
        ),
        start_engine=start,
        api_key=api_key,
        body_bytes=body_bytes,
        headers=_said(spec.name, fleet, _own_tokenizer(spec.model)),
        classes=Classes(priorities={one.name: one.priority for one in fleet.classes}),
    )


def _text(model: str, fleet: Fleet) -> tuple[Tokenizer, Vocabulary, Sequence[int]]:
    """Prompts are counted by the model's own tokenizer where its directory has one, else by a stand-in."""
    from tongyun.cloud.gateway.filler import WORDS, Filler

    if not _own_tokenizer(model):
        filler = Filler(fleet.question.model.vocab)
        return filler, filler, filler.words
    from tongyun.model.tokenizer import Tokenizer
    from tongyun.model.vocabulary import Vocabulary

    tokenizer = Tokenizer(Path(model))
    spelled = [tokenizer.encode(f" {word}") for word in WORDS]
    words = [tokens[0] for tokens in spelled if len(tokens) == 1] or [tokens[-1] for tokens in spelled]
    return tokenizer, Vocabulary.load(Path(model)), words


def _own_tokenizer(model: str) -> bool:
    return (Path(model) / "tokenizer.json").is_file()


def _said(name: str, fleet: Fleet, counted: bool) -> dict[str, str]:
    """What every answer says of where it comes from. Headers are ASCII."""
    question = fleet.question
    said = f"fleet={name}; model={question.model.name}; chips={question.chips} x {question.chip.name}"
    return {
        "x-tongyun-twin": said.encode("ascii", "replace").decode(),
        "x-tongyun-pace": "simulated",
        "x-tongyun-text": "filler",
        "x-tongyun-tokens": "counted by the model's tokenizer" if counted else "counted by a stand-in",
    }
