"""What lies in an instance's memory where several models share it: weights, and KV blocks.

The model at work has its weights and all of its blocks there. The others keep what fits;
the rest of their blocks lies in host memory, where a copy of all weights is. Decides what
makes way: first cached blocks nobody holds, then weights of models without requests, then
blocks or weights of those whose turn is farthest. Knows no bandwidth and no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from tongyun.cloud.sched.blocks import BlockPool


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a model on one rank."""

    weights: float
    block: float
    working: float
    """Beside weights and blocks while it runs."""


class Moved(NamedTuple):
    """Bytes that came to the chip and that left it, on one rank."""

    loaded: bool
    """Whether weights came."""
    in_bytes: float
    out_bytes: float


class Residence:
    """The memory of one instance and the host memory behind it, in bytes of a rank."""

    def __init__(
        self,
        memory_bytes: float,
        host_bytes: float,
        footprints: Mapping[str, Footprint],
        pools: Mapping[str, BlockPool],
        surrender: Callable[[str], None],
    ) -> None:
        """`host_bytes` is for blocks alone; `surrender` makes a model release every block it holds."""
        self.memory_bytes, self.host_bytes = memory_bytes, host_bytes
        self._footprints, self._pools, self._surrender = footprints, pools, surrender
        # Longest unused first.
        self.resident: dict[str, None] = {}
        """Models whose weights are in the memory."""
        self._away = dict.fromkeys(footprints, 0)
        self._active: str | None = None
        self._others_bytes = 0.0

    def clear(self) -> None:
        """Nothing is here any more, nor in host memory but weights; no model may hold a block."""
        self.resident.clear()
        self._away = dict.fromkeys(self._footprints, 0)
        self._active = None
        self._note()

    def pool(self, model: str) -> BlockPool:
        return self._pools[model]

    def away(self, model: str) -> int:
        """Blocks in host memory: of those that are held now, for a request may end while they are."""
        gone = self._away[model]
        return min(gone, self._pools[model].used) if gone else 0

    def here(self, model: str) -> int:
        """Blocks in the memory, cached ones included."""
        pool = self._pools[model]
        return pool.total - pool.blank - self.away(model)

    @property
    def used_bytes(self) -> float:
        """Of the memory: weights and blocks, and what the model at work needs beside them."""
        sizes = self._footprints
        weights = sum(sizes[model].weights for model in self.resident)
        working = sizes[self._active].working if self._active is not None else 0.0
        blocks = 0.0
        for model, pool in self._pools.items():
            # Of many models few have any.
            if pool.blank < pool.total:
                blocks += self.here(model) * sizes[model].block
        return weights + working + blocks

    @property
    def away_bytes(self) -> float:
        """Blocks in host memory."""
        return sum(self.away(model) * size.block for model, size in self._footprints.items())

    def missing_bytes(self, model: str) -> float:
        """What would have to come before `model` can run."""
        size = self._footprints[model]
        weights = 0.0 if model in self.resident else size.weights
        return weights + self.away(model) * size.block

    def slack(self, model: str) -> int:
        """Blocks that `model`, at work, can take before others have to make way."""
        size = self._footprints[model].block
        return int(max(self.memory_bytes - self._others_bytes - self.here(model) * size, 0.0) // size)

    def enter(self, model: str, order: Sequence[str], more: int) -> Moved:
        """Bring all of `model` to the chip, and make room for so many `more` of its blocks.

        `order` is that of the turns, of models with requests.
        """
        loaded, in_bytes = model not in self.resident, self.missing_bytes(model)
        self._active = model
        out_bytes = self._make_way(in_bytes + self._room(model, more), order)
        self._away[model] = 0
        self.resident.pop(model, None)
        self.resident[model] = None
        self._note()
        return Moved(loaded, in_bytes, out_bytes)

    def settle(self, order: Sequence[str], more: int) -> float:
        """Make up for blocks that the model at work has taken, and room for so many `more`.

        Returns the bytes that left for them.
        """
        active = self._active
        if active is None:
            return 0.0
        grown = self.here(active) * self._footprints[active].block
        if self._others_bytes + grown <= self.memory_bytes:
            return 0.0
        out_bytes = self._make_way(self._room(active, more), order)
        self._note()
        return out_bytes

    def _room(self, model: str, more: int) -> float:
        """Bytes of so many more blocks, or of all it may ever take."""
        pool = self._pools[model]
        return min(more, pool.blank) * self._footprints[model].block

    def fetch(self, model: str, order: Sequence[str]) -> bool:
        """Let the weights of `model` lie here too, where they take the place of nobody's with requests."""
        if model in self.resident:
            return False
        wanted = self._footprints[model].weights
        spare = [name for name in self.resident if name not in order and name != self._active]
        idle = sum(self._pools[name].idle * size.block for name, size in self._footprints.items())
        could = idle + sum(self._footprints[name].weights for name in spare)
        if self.used_bytes + wanted - could > self.memory_bytes:
            return False
        self._make_way(wanted, order)
        self.resident[model] = None
        self._note()
        return True

    def _note(self) -> None:
        """Remember what does not change while the model at work grows."""
        active = self._active
        grows = 0.0 if active is None else self.here(active) * self._footprints[active].block
        self._others_bytes = self.used_bytes - grows

    def _make_way(self, coming_bytes: float, order: Sequence[str]) -> float:
        """Free as many bytes as are lacking for `coming_bytes`; returns those that go to the host."""
        lacking = self.used_bytes + coming_bytes - self.memory_bytes
        if lacking <= 0:
            return 0.0
        late = [model for model in reversed(order) if model != self._active]
        # Of models without requests only caches are here; the model at work loses its cache last.
        unused = [model for model in self._pools if model != self._active]
        for model in (*unused, *([self._active] if self._active is not None else ())):
            lacking -= self._drop(model, lacking)
        for model in [name for name in self.resident if name not in order and name != self._active]:
            if lacking > 0:
                lacking -= self._evict(model)
        held = sum(self.here(model) * self._footprints[model].block for model in late)
        for model in late:
            # Blocks go both ways and weights only one, but weights come and go as a whole.
            if lacking > held and model in self.resident:
                lacking -= self._evict(model)
        out_bytes = 0.0
        for model in late:
            if lacking > 0:
                freed, sent = self._send(model, lacking)
                lacking, out_bytes = lacking - freed, out_bytes + sent
        # Sums of floats: less than a byte is nothing.
        if lacking >= 1:
            raise RuntimeError(f"{self._active} does not fit: {lacking:.0f} bytes are missing")
        return out_bytes

    def _drop(self, model: str, lacking: float) -> float:
        """Forget cached blocks that nobody holds, as many as are lacking."""
        size = self._footprints[model].block
        return size * self._pools[model].forget(max(ceil(lacking / size), 0))

    def _evict(self, model: str) -> float:
        del self.resident[model]
        return self._footprints[model].weights

    def _send(self, model: str, lacking: float) -> tuple[float, float]:
        """Blocks of `model` to the host; bytes freed and bytes sent. Lost where the host is full."""
        size = self._footprints[model].block
        count = min(self.here(model), ceil(lacking / size))
        if self.away_bytes + count * size <= self.host_bytes:
            self._away[model] = self.away(model) + count
            return count * size, count * size
        before, gone = self.here(model), self.away(model)
        self._surrender(model)
        self._away[model] = 0
        # What is cached still was in the memory at most as far as it had not been sent away.
        self._pools[model].forget(gone + ceil(lacking / size))
        return (before - self.here(model)) * size, 0.0
