"""Host memory and storage behind a fleet's KV cache: how many blocks, and how fast they come back.

Every attention group has tiers of its own, its ranks' shares; nothing is shared between
groups. All ranks of a node read storage at once. Writing blocks out takes no time of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from tongyun.cloud.engine.restore import Restore, Way
from tongyun.errors import InputError
from tongyun.specs import CacheSpec, Chip, find_storage
from tongyun.units import GB, Source


@dataclass(frozen=True, kw_only=True)
class CacheTiers:
    """A `[cache]` table, on the chips of a fleet."""

    spec: CacheSpec

    @property
    def names(self) -> tuple[str, ...]:
        """The tiers there are, the fastest first."""
        sizes = {"host": self.spec.host_gb, "storage": self.spec.storage_gb}
        return tuple(name for name, size in sizes.items() if size is not None)

    def blocks(self, rank_block_bytes: float) -> tuple[int, ...]:
        """Blocks in each tier, where each rank keeps `rank_block_bytes` of a block in its share."""
        sizes = (self.spec.host_gb, self.spec.storage_gb)
        return tuple(int(size * GB // rank_block_bytes) for size in sizes if size is not None)

    def restore(self, chip: Chip, rank_block_bytes: float, ranks: int) -> Restore:
        """The ways back: bytes / bandwidth; what is stored comes through the host link as well.

        A read from storage is a node's client bandwidth over its chips, or the host link if slower.
        """
        spec, ways = self.spec, []
        link = chip.host_bytes_per_s if spec.host_bandwidth is None else spec.host_bandwidth.value
        if link is None:
            raise InputError(
                f"{chip.name}: no host_link; say how fast host memory is read: cache.host_bandwidth"
            )
        if spec.host_gb is not None:
            # A copy within the node is started by the step, whose own work on the host is priced.
            ways.append(Way(latency_s=0.0, block_s=rank_block_bytes / link))
        if spec.storage is not None:
            store = find_storage(spec.storage)
            rate = min(link, store.client_bandwidth.value / chip.chips_per_node)
            ways.append(Way(latency_s=store.read_latency.value, block_s=rank_block_bytes / rate))
        return Restore(ways=tuple(ways), overlap=spec.overlap, waiting_w=chip.idle_w * ranks)

    def sources(self, chip: Chip) -> frozenset[Source]:
        """Where the bandwidths and latencies come from."""
        spec = self.spec
        given = spec.host_bandwidth
        found = {chip.provenance["host_link"] if given is None else given.source}
        if spec.storage is not None:
            store = find_storage(spec.storage)
            found |= {store.client_bandwidth.source, store.read_latency.source}
        return frozenset(found)
