"""Facts as data: chips, fabrics, storage, models, prices and workloads, each figure with its source."""

from tongyun.specs.cache import CacheSpec
from tongyun.specs.drafts import DraftsSpec
from tongyun.specs.experts import ExpertsSpec
from tongyun.specs.figure import Corner, Figure
from tongyun.specs.find import (
    every,
    find_chip,
    find_fabric,
    find_fleet,
    find_market,
    find_model,
    find_ppu,
    find_price,
    find_storage,
    find_workload,
    load,
    loads,
    names,
)
from tongyun.specs.fleet import FleetSpec, PoolSpec
from tongyun.specs.market import MarketPoolSpec, MarketSpec, ServedSpec, SharingSpec
from tongyun.specs.ppu import Ppu, PpuSpec
from tongyun.specs.schema import (
    Calibration,
    Chip,
    ChipSpec,
    FabricSpec,
    Link,
    PriceSpec,
    StorageSpec,
)
from tongyun.specs.upkeep import AutoscaleSpec, FailureSpec, OutageSpec
from tongyun.specs.workload import WorkloadSpec
from tongyun.specs.write import dumps, save

__all__ = [
    "AutoscaleSpec",
    "CacheSpec",
    "Calibration",
    "Chip",
    "ChipSpec",
    "Corner",
    "DraftsSpec",
    "ExpertsSpec",
    "FabricSpec",
    "FailureSpec",
    "Figure",
    "FleetSpec",
    "Link",
    "MarketPoolSpec",
    "MarketSpec",
    "OutageSpec",
    "PoolSpec",
    "Ppu",
    "PpuSpec",
    "PriceSpec",
    "ServedSpec",
    "SharingSpec",
    "StorageSpec",
    "WorkloadSpec",
    "dumps",
    "every",
    "find_chip",
    "find_fabric",
    "find_fleet",
    "find_market",
    "find_model",
    "find_ppu",
    "find_price",
    "find_storage",
    "find_workload",
    "load",
    "loads",
    "names",
    "save",
]
