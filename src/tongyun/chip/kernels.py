"""Which kernel model prices an operator on a data-centre chip.

`Kernels` takes the operators of a step to `matmul`, `grouped`, `attention` and `exchange`,
as they run in one serving engine on one chip, and splits each price into the starts of
its kernels and the rest. Norms and element-wise work are a pass over memory and a
start. Nothing is below its roofline: that is the form of the models, not a bound put on
them. Equal shapes are priced once: a plan asks for the same products on every cut.
Routing is random, every expert as likely as the next or as the cut says. Calibrated
machines and chips that are no accelerators are not priced here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tongyun.chip import exchange
from tongyun.chip.attention import Heads, decode_s, prefill_s
from tongyun.chip.collective import collective_s, link_share
from tongyun.chip.grouped import BINS, experts_launches, experts_parts_s, grouped_s, picked_rows, random_rows
from tongyun.chip.matmul import matmul_s, quantising_launches
from tongyun.chip.rates import rate_dtype
from tongyun.chip.silicon import Silicon, inside_of, is_measured, library, silicon_of
from tongyun.model.graph import COLLECTIVES, Attends, Kind, Operator, Routed
from tongyun.specs import Chip
from tongyun.units import Number, Source

if TYPE_CHECKING:
    from tongyun.chip.ppu.operators import Programs

Array = NDArray[np.float64]
Parts = tuple[Number, float]
Prices = tuple[Array, ...]
WORTH_SORTING = 64
"""Values from which it pays to price equal ones once."""
MOST_KNOWN = 20_000
"""Prices kept before all are forgotten."""


@lru_cache(maxsize=64)
def kernels(chip: Chip) -> Kernels | None:
    """The kernel models of this chip; None for one that is no accelerator or was calibrated."""
    if chip.kind != "accelerator" or chip.calibration is not None:
        return None
    return Kernels(chip)


class Kernels:
    """One chip with one engine's kernels; remembers what it priced."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.silicon = silicon_of(chip)
        self.library = library(chip.library)
        if self.silicon.launch_s is not None:
            self.library = replace(self.library, launch_s=self.silicon.launch_s)
        self._known: dict[object, Prices] = {}
        self._programs: Programs | None = None
        self.modelled: set[str] = set()
        """Operators asked for that are priced by a model although lowered programs were."""
        if chip.is_lowered:
            from tongyun.chip.ppu.operators import Programs

            self._programs = Programs(inside_of(chip))

    def parts_s(self, op: Operator) -> Parts:
        """Seconds of one execution, as its work (or way over the links) and the start of its kernels."""
        if self._programs is not None:
            lowered = self._programs.parts_s(op)
            if lowered is not None:
                return lowered
            self.modelled.add(op.name)
        if op.kind in COLLECTIVES:
            key = ("way", op.kind, op.ranks, op.experts)
            (way_s,) = self._once(key, op.payload_bytes, lambda payload: self._way_s(op, payload))
            return np.maximum(way_s - self.library.launch_s, 0.0), self.library.launch_s
        return self._priced(op)

    @property
    def sources(self) -> frozenset[Source]:
        """Of the fitted numbers: derived from measurements of this chip, or assumed to be like another's."""
        inside = frozenset[Source]() if self._programs is None else self._programs.ppu.sources
        return inside | {Source.DERIVED if is_measured(self.chip) else Source.ASSUMED}

    def is_lowered(self, op: Operator) -> bool:
        """Whether the operator costs what its lowered programs take, and not what a kernel model says."""
        return self._programs is not None and self._programs.parts_s(op) is not None

    def close(self) -> None:
        """Keep prices of programs for the next run."""
        if self._programs is not None:
            self._programs.close()

    def _priced(self, op: Operator) -> Parts:
        if op.kind is Kind.MATMUL:
            return self._product(op)
        if op.routed is not None:
            return self._experts(op, op.routed)
        if op.kind is Kind.GROUPED_MATMUL:
            return self._each_head(op)
        if op.attends is not None:
            return self._attention(op, op.attends)
        if op.is_fused:
            # Its bytes pass in another operator's kernel, beside that one's own.
            return op.moved_bytes / self.silicon.memory_bytes_per_s, 0.0
        passing_s = op.moved_bytes / self.silicon.stream_bytes_per_s
        return self.silicon.fill_s + passing_s, self.library.launch_s

    def _product(self, op: Operator) -> Parts:
        dtype = rate_dtype(self.chip, op.compute)
        launches = 1.0 + quantising_launches(dtype, self.library, block_scales=op.block_scales)
        start_s = launches * self.library.launch_s
        (whole_s,) = self._once(
            (op.n, op.k, dtype, op.stored, op.block_scales),
            op.m,
            lambda m: matmul_s(
                m,
                op.n,
                op.k,
                self.silicon,
                dtype=dtype,
                weight=op.stored,
                block_scales=op.block_scales,
                library=self.library,
            ),
        )
        return whole_s - start_s, start_s

    def _each_head(self, op: Operator) -> Parts:
        """A product for each head, all of the same size."""
        dtype = rate_dtype(self.chip, op.compute)

        def price(rows: Array) -> Array:
            return grouped_s(
                rows[..., None] * np.ones(BINS),
                op.n,
                op.k,
                self.silicon,
                experts=op.groups,
                weight=op.stored,
                compute=dtype,
                efficiency=1.0,
            )

        key = ("heads", op.n, op.k, dtype, op.stored, float(np.max(op.groups)))
        return self._once(key, op.m / op.groups, price)[0], self.library.launch_s

    def _experts(self, op: Operator, routed: Routed) -> Parts:
        """The expert layer is one chain of kernels; its starts are counted with the first product."""
        dtype = rate_dtype(self.chip, routed.compute)
        # A rank sums a fixed share of the tokens routed.
        share = float(np.max(np.asarray(routed.mine) / routed.tokens))
        key = ("experts", routed.per_token, routed.count, routed.local, routed.hidden, routed.inner)
        picks = routed.picks
        up_s, passing_s, down_s = self._once(
            (*key, picks, dtype, op.stored, share),
            routed.tokens,
            lambda tokens: experts_parts_s(
                picked_rows(tokens, picks) if picks else random_rows(tokens, routed.per_token, routed.count),
                routed.hidden,
                routed.inner,
                self.silicon,
                tokens=tokens * share,
                experts=routed.local,
                weight=op.stored,
                compute=dtype,
                library=self.library,
            )[:3],
        )
        if op.kind is not Kind.GROUPED_MATMUL:
            return passing_s, 0.0
        start_s = experts_launches(dtype, self.library) * (self.library.launch_s + self.silicon.fill_s)
        return (up_s, start_s) if op.n == 2 * routed.inner and op.k == routed.hidden else (down_s, 0.0)

    def _attention(self, op: Operator, attends: Attends) -> Parts:
        batch, new, context = even(attends)
        heads = Heads(
            query=op.n,
            key=attends.key_heads,
            width=attends.width,
            value_width=attends.value_width,
            cached_width=attends.cached_width,
            is_latent=attends.is_latent,
        )
        lib, chip = self.library, self.silicon
        cache, window = attends.cache, attends.window
        is_decode = bool((np.asarray(new) == 1).all())
        if np.ndim(batch) or np.ndim(new) or np.ndim(context):
            each = (np.asarray(x, dtype=np.float64) for x in (batch, new, context))
            shapes = np.stack(np.broadcast_arrays(*each))
            place: tuple[object, ...] = shapes.shape, shapes.tobytes()
        else:
            place = float(batch), float(new), float(context)
        key = ("attention", heads, cache, window, is_decode, *place)

        def price() -> Array:
            if is_decode:
                return decode_s(batch, context, heads, chip, cache=cache, window=window, library=lib)
            return prefill_s(batch, new, context, heads, chip, cache=cache, window=window, library=lib)

        start_s = lib.decode_launches * (lib.launch_s + chip.fill_s)
        if not is_decode:
            start_s = lib.prefill_launches * lib.launch_s
        (whole_s,) = self._known.get(key) or self._keep(key, (price(),))
        return whole_s - start_s, start_s

    def _way_s(self, op: Operator, payload_bytes: Array) -> Array:
        return np.asarray(collective_s(replace(op, payload_bytes=payload_bytes), self.chip, self))

    # ── the scale-up domain, as `collective` asks for it ─────────────────────────────

    def all_reduce_s(self, payload_bytes: Number, ranks: int) -> Number:
        """Between captured kernels, by an engine's own kernels where payloads are small."""
        link = self.chip.scale_up
        direct = link is not None and not link.topology.startswith("torus")
        chip = self._wired(ranks)
        return exchange.all_reduce_s(payload_bytes, ranks, chip, direct=direct, library=self.library)

    def gather_s(self, payload_bytes: Number, ranks: int) -> Number:
        return exchange.all_gather_s(payload_bytes, ranks, self._wired(ranks), library=self.library)

    def all_to_all_s(self, payload_bytes: Number, ranks: int) -> Number:
        return exchange.all_to_all_s(payload_bytes, ranks, self._wired(ranks), library=self.library)

    def send_s(self, payload_bytes: Number) -> Number:
        return exchange.send_s(payload_bytes, self._wired(2), library=self.library)

    def _wired(self, ranks: int) -> Silicon:
        """The chip with as much of its links as `ranks` peers give it."""
        link = self.chip.scale_up
        share = 1.0 if link is None else link_share(link, ranks)
        return replace(self.silicon, link_bytes_per_s=self.silicon.link_bytes_per_s * share)

    # ── memory of prices ─────────────────────────────────────────────────────────────

    def _once(self, key: object, over: Number, price: Callable[[Array], Array | tuple[Array, ...]]) -> Prices:
        """`price` of each different value of `over`, laid out as `over` is, and remembered."""
        values = np.asarray(over, dtype=np.float64)
        full = (key, values.shape, values.tobytes())
        known = self._known.get(full)
        if known is not None:
            return known
        if values.size < WORTH_SORTING:
            found = price(values)
            return self._keep(full, found if isinstance(found, tuple) else (found,))
        few, places = _different(values)
        found = price(few)
        parts = found if isinstance(found, tuple) else (found,)
        return self._keep(full, tuple(part[places].reshape(values.shape) for part in parts))

    def _keep(self, key: object, prices: Prices) -> Prices:
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known[key] = prices
        return prices


def _different(values: Array) -> tuple[Array, NDArray[np.intp]]:
    """Each different value once, rising, and where each value stands among them; `np.unique` also loads
    masked arrays, and takes longer."""
    order = values.argsort(axis=None)
    rising = values.ravel()[order]
    is_new = np.concatenate([[True], rising[1:] != rising[:-1]])
    places = np.empty(len(order), dtype=np.intp)
    places[order] = np.cumsum(is_new) - 1
    return rising[is_new], places


def even(attends: Attends) -> tuple[Number, Number, Number]:
    """Sequences, new tokens and context of each, alike for all of a step.

    Ragged sequences become as many as long as a token's own on average, Σn²/Σn, behind
    a token's mean context; tokens and query-key pairs stay as they are.
    """
    group = attends.group
    if not group.ragged:
        return group.count, group.new, group.context
    new, context = np.asarray(group.new, dtype=np.float64), np.asarray(group.context, dtype=np.float64)
    weight = new * group.count
    # The method of arrays takes twice as long for the few chunks of a step.
    total = partial(np.add.reduce, axis=-1)
    tokens = total(weight)
    length = total(weight * new) / tokens
    return tokens / length, length, total(weight * context) / tokens
