"""What bounds a scheduler, and what it counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from tongyun.cloud.sched.request import Request
from tongyun.errors import InputError, RequestError


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """The limits of one engine."""

    blocks: int
    """KV blocks in the cache."""
    block_tokens: int = 16
    max_context_tokens: int
    """Prompt and output of one request together."""
    max_sequences: int = 64
    """Requests that may hold blocks at the same time."""
    max_step_tokens: int = 1024
    """Tokens computed in one step, decodes and prompt chunks together."""
    prefix_caching: bool = True
    watermark: float = 0.01
    """Share of the blocks that admission leaves free for running requests to grow into."""
    tiers: tuple[int, ...] | None = None
    """Blocks in each slower memory behind the cache, for executors that heed `Piece.restored`."""
    draft_tokens: int = 0
    """Drafts that a step verifies behind the newest token of every decoding request; 0: none."""
    aging_s: float | None = None
    """None: priorities are strict. Else seconds of waiting that outweigh one step of priority."""

    def __post_init__(self) -> None:
        for name in ("blocks", "block_tokens", "max_context_tokens", "max_sequences", "max_step_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"scheduler: {name}: must be at least 1, not {getattr(self, name)}")
        if self.tiers is not None and min(self.tiers, default=0) < 0:
            raise InputError(f"scheduler: tiers: must be at least 0, not {min(self.tiers)}")
        if self.draft_tokens < 0:
            raise InputError(f"scheduler: draft_tokens: must be at least 0, not {self.draft_tokens}")
        if self.aging_s is not None and not 0 < self.aging_s < inf:
            raise InputError(f"scheduler: aging_s: must be a positive number, not {self.aging_s}")
        if not 0 <= self.watermark < 1:
            raise InputError(f"scheduler: watermark: must be in [0, 1), not {self.watermark}")
        if self.max_step_tokens < self.max_sequences * self.positions:
            # Otherwise decodes alone could fill every step and prompts would never start.
            each = f" · (1 + {self.draft_tokens} drafts)" if self.draft_tokens else ""
            raise InputError(
                f"scheduler: max_step_tokens: {self.max_step_tokens} is less than"
                f" max_sequences {self.max_sequences}{each}; accepted: at least that many"
            )

    @property
    def positions(self) -> int:
        """Tokens that a decoding request takes of a step's budget."""
        return 1 + self.draft_tokens

    def check(self, request: Request) -> None:
        """RequestError if `request` could never run under these limits, however empty the cache."""
        prompt = len(request.prompt)
        if prompt < 1:
            raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
        if request.output_tokens < 1:
            raise RequestError(f"max_tokens is {request.output_tokens}; at least 1", param="max_tokens")
        if not 0 <= request.handed_tokens < prompt:
            # The last token is computed here, whatever came along: it yields the next.
            raise RequestError(f"{request.handed_tokens} of {prompt} prompt tokens cannot be handed over")
        total = prompt + request.output_tokens
        # The last token produced is never fed back and needs no place in the cache.
        capacity = min(self.max_context_tokens, self.blocks * self.block_tokens + 1)
        if total > capacity:
            limit = "context" if capacity == self.max_context_tokens else "KV cache"
            raise RequestError(
                f"{prompt} prompt tokens and {request.output_tokens} output tokens are {total};"
                f" the {limit} holds at most {capacity}",
                param="prompt" if prompt >= capacity else "max_tokens",
                code="context_length_exceeded",
            )


@dataclass(slots=True)
class Counters:
    """What has happened since the start; they only grow."""

    prompt_tokens: int = 0
    """Prompt tokens of admitted requests, cached ones included."""
    prefix_hit_tokens: int = 0
    tier_hit_tokens: list[int] = field(default_factory=list)
    """Those of the hits that lay in each lower tier."""
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    verifications: int = 0
    """Times a request had drafts verified."""
    accepted_tokens: int = 0
    """Output tokens that were drafts."""
    queued_s: float = 0.0
    """Seconds requests spent between arrival and first admission, summed."""
