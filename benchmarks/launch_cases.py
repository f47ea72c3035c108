"""A spread of plans that launch files are written for: `launch_check.py` has them read.

Small and wide, dense, sparse and with latent attention, in one pool and in two, with drafts by a module
of their own and by another's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tongyun.codesign.answer import Offer
from tongyun.codesign.launch import Deployment
from tongyun.codesign.offers import Found, Pair, Place, offers
from tongyun.codesign.plan import plan
from tongyun.codesign.space import Question, default_dtype
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model

DENSE, SPARSE, LATENT = "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V3"
EAGLE = "me/eagle3"
"""Weights that draft for a model that has no module of its own to do so."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A plan of the search, or one of given cuts: (cut, batch of a group, budget, replicas)."""

    name: str
    model: str
    chips: int
    given: tuple[tuple[Shard, float, float, int], ...] = ()
    pooled: bool = False
    """The first two of `given` are a prefill and a decode pool."""
    asked: Mapping[str, Any] | None = None
    chip: str = "h200"
    dtype: str | None = None


CASES = (
    Case(name="dense, searched", model=DENSE, chips=8, asked={"tpot_s": 0.03, "pools": "mixed"}),
    Case(name="dense, fp8", model=DENSE, chips=8, dtype="fp8", asked={"tpot_s": 0.03, "pools": "mixed"}),
    Case(name="dense, pp", model=DENSE, chips=8, given=((Shard(tp=2, pp=4), 8, 1024, 1),)),
    Case(name="dense, two machines", model=DENSE, chips=16, given=((Shard(tp=8, pp=2), 8, 1024, 1),)),
    Case(name="experts on tp", model=SPARSE, chips=8, given=((Shard(tp=8, ep=8), 16, 1024, 1),)),
    Case(name="experts cut", model=SPARSE, chips=8, given=((Shard(tp=8), 16, 1024, 1),)),
    Case(name="attention groups", model=SPARSE, chips=8, given=((Shard(tp=2, ep=8, dp=4), 16, 1024, 1),)),
    Case(
        name="groups and stages", model=SPARSE, chips=16, given=((Shard(tp=4, pp=2, ep=8, dp=2), 8, 1024, 1),)
    ),
    Case(name="wide experts", model=LATENT, chips=32, given=((Shard(tp=2, ep=32, dp=16), 16, 1024, 1),)),
    Case(name="dense, two pools", model=DENSE, chips=8, asked={"tpot_s": 0.03, "pools": "split"}),
    Case(
        name="unequal pools",
        model=DENSE,
        chips=8,
        pooled=True,
        given=((Shard(tp=2), 1, 4096, 2), (Shard(tp=4), 48, 48, 1)),
    ),
    Case(name="wide pools, searched", model=LATENT, chips=64, asked={"tpot_s": 0.03, "pools": "both"}),
    Case(
        name="wide pools",
        model=LATENT,
        chips=48,
        pooled=True,
        given=((Shard(ep=8, dp=8), 1, 4096, 2), (Shard(ep=32, dp=32), 16, 16, 1)),
    ),
    Case(
        name="pools and replicas beside",
        model=DENSE,
        chips=8,
        pooled=True,
        given=((Shard(tp=2), 1, 4096, 1), (Shard(tp=4), 48, 48, 1), (Shard(tp=2), 8, 1024, 1)),
    ),
    Case(name="several kinds", model=DENSE, chips=7, asked={"tpot_s": 0.03, "pools": "mixed"}),
    Case(
        name="own drafts",
        model=LATENT,
        chips=16,
        given=((Shard(ep=8, dp=8), 8, 1024, 2),),
        asked={"draft_tokens": 2, "acceptance": 0.8},
    ),
    Case(
        name="own drafts, pools",
        model=LATENT,
        chips=24,
        pooled=True,
        given=((Shard(ep=8, dp=8), 1, 4096, 1), (Shard(ep=16, dp=16), 16, 32, 1)),
        asked={"draft_tokens": 1, "acceptance": 0.8},
    ),
    Case(
        name="named drafts",
        model=DENSE,
        chips=8,
        given=((Shard(tp=4), 16, 1024, 2),),
        asked={"draft_tokens": 3, "acceptance": 0.7},
    ),
)


def deployment_of(case: Case) -> Deployment:
    config, chip = ModelConfig.from_hf(find_model(case.model)[0], name=case.model), find_chip(case.chip)
    question = Question(
        model=config,
        chip=chip,
        chips=case.chips,
        isl=4000,
        osl=500,
        precision=Precision.of(case.dtype or default_dtype(config, chip)),
        ttft_s=2.0,
        **(case.asked or {}),
    )
    own = config.mtp_layers or not question.draft_tokens
    return Deployment(
        question=question,
        offer=_offer(case, question),
        command="tongyun plan",
        weights=case.model,
        draft=None if own else EAGLE,
    )


def _offer(case: Case, question: Question) -> Offer:
    if not case.given:
        found = plan(question).best
        if found is None:
            raise SystemExit(f"{case.name}: no plan")
        return found
    kinds = tuple(
        (Place(shard=shard, batch=batch, budget=budget), count) for shard, batch, budget, count in case.given
    )
    if case.pooled:
        one: Found | Pair = Pair(
            prefill=kinds[0], decode=kinds[1], others=kinds[2:], idle_chips=0, idle_reason="", meets=True
        )
    else:
        one = Found(kinds=kinds, idle_chips=0, idle_reason="", meets=True)
    return offers(question, [one])[0]
