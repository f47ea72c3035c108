"""Find specs by name, alias or path, and read them.

A name is a catalogue file's stem, in any case; a path (something with a slash, or
ending in .toml) is a user's own file. Decides where specs are looked for, not what
they may say.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast

from tongyun.errors import SpecError, unknown
from tongyun.specs.fleet import FleetSpec
from tongyun.specs.form import Where, read_fields
from tongyun.specs.market import MarketSpec
from tongyun.specs.ppu import PpuSpec
from tongyun.specs.reference import followed
from tongyun.specs.schema import SCHEMAS, ChipSpec, FabricSpec, PriceSpec, Spec, StorageSpec
from tongyun.specs.workload import WorkloadSpec

S = TypeVar("S", bound=Spec)

CATALOG = Path(__file__).parent / "catalog"
KINDS = (*SCHEMAS, "models")
LOCAL = "local"


def find(kind: str, name: str) -> Any:
    """A spec of any kind; a model is its full name and raw config."""
    if kind == "models":
        raw, full = find_model(name)
        return full, raw
    return _find(kind, SCHEMAS[kind], name)


def find_chip(name: str) -> ChipSpec:
    """A chip by catalogue name, alias or path of a TOML file; `local` is this machine as calibrated."""
    if name.lower() == LOCAL:
        # What keeps files brings databases and sockets, which catalogue chips do without.
        from tongyun.store import home

        path = home() / "chips" / f"{LOCAL}.toml"
        if not path.exists():
            raise SpecError(path, "", "this machine is not calibrated yet: run `tongyun calibrate`")
        return load(path, ChipSpec)
    return _find("chips", ChipSpec, name)


def find_ppu(name: str) -> PpuSpec:
    """The inside of a chip by catalogue name, alias or path of a TOML file."""
    return _find("ppus", PpuSpec, name)


def find_fabric(name: str) -> FabricSpec:
    """A fabric by catalogue name, alias or path of a TOML file."""
    return _find("fabrics", FabricSpec, name)


def find_storage(name: str) -> StorageSpec:
    """A file system by catalogue name, alias or path of a TOML file."""
    return _find("storage", StorageSpec, name)


def find_workload(name: str) -> WorkloadSpec:
    """A workload by catalogue name, alias or path of a TOML file."""
    return _find("workloads", WorkloadSpec, name)


def find_fleet(path: str | Path) -> FleetSpec:
    """A fleet, which is always the user's own TOML file."""
    return load(Path(path).expanduser(), FleetSpec)


def find_market(path: str | Path) -> MarketSpec | None:
    """A fleet file with several models; None where `model` is no list of tables, as `find_fleet` reads it."""
    file = Path(path).expanduser()
    try:
        several = isinstance(tomllib.loads(file.read_text(encoding="utf-8")).get("model"), list)
    except (OSError, ValueError, RecursionError):
        # `find_fleet` says what is wrong with it.
        return None
    return load(file, MarketSpec) if several else None


def find_price(chip: str) -> PriceSpec:
    """The price of a chip, by the chip's catalogue name, or by path."""
    return _find("prices", PriceSpec, chip)


def find_model(name: str) -> tuple[dict[str, Any], str]:
    """The raw `config.json` of a catalogue model or of a directory, and the model's full name.

    `Qwen/Qwen3-32B` in any case, or only `qwen3-32b` where that is unambiguous.
    """
    path = Path(name)
    if (path / "config.json").is_file() or path.is_file():
        file = path / "config.json" if path.is_dir() else path
        return _read_json(file), (file.parent if file.name == "config.json" else file).name
    models = {full.lower(): full for full in names("models")}
    full = models.get(name.lower()) or next(
        (full for low, full in models.items() if low.split("/")[1] == name.lower()), None
    )
    if full is None:
        raise SpecError("models", "", unknown("model", name, models.values()))
    return _read_json(CATALOG / "models" / f"{full}.json"), full


def names(kind: str) -> list[str]:
    """Catalogue names of one kind, sorted, without reading the files."""
    folder = CATALOG / kind
    if kind == "models":
        return sorted(file.relative_to(folder).as_posix()[:-5] for file in folder.glob("*/*.json"))
    return sorted(file.stem for file in folder.glob("*.toml"))


def every(kind: str) -> Iterator[Spec]:
    """All catalogue specs of one kind but models, in the order of their names."""
    seen: dict[str, Path] = {}
    for name in names(kind):
        file = CATALOG / kind / f"{name}.toml"
        spec = load(file, SCHEMAS[kind])
        for alias in (spec.name, *getattr(spec, "aliases", ())):
            if alias in seen:
                raise SpecError(file, "name", f"'{alias}' already names {seen[alias]}")
            seen[alias] = file
        yield spec


def load(path: Path, schema: type[S]) -> S:
    """Read and check one spec file; the same unchanged file is read once."""
    try:
        stamp = path.stat()
    except (OSError, ValueError):
        raise SpecError(path, "", "no such file") from None
    return cast(S, _load(path, cast(Any, schema), stamp.st_mtime_ns, stamp.st_size))


@lru_cache(maxsize=512)
def _load(path: Path, schema: type[Spec], mtime_ns: int, size: int) -> Spec:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(path, "", f"cannot be read: {error}") from None
    return loads(text, schema, file=path)


def loads(text: str, schema: type[S], *, file: object = "text") -> S:
    """Read and check a spec from TOML text; `file` only names the place in errors."""
    where = Where(file)
    return read_fields(schema, followed(_parsed(text, file), _raw, where), where)


def _raw(kind: str, name: str, where: Where) -> dict[str, Any]:
    """The table of a catalogue file that another one names."""
    if kind not in SCHEMAS:
        raise where.wrong(unknown("kind", kind, SCHEMAS))
    if name not in names(kind):
        raise where.wrong(unknown(kind.removesuffix("s"), name, names(kind)))
    file = CATALOG / kind / f"{name}.toml"
    return _parsed(file.read_text(encoding="utf-8"), file)


def _parsed(text: str, file: object) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        found = re.search(r"line (\d+)", str(error))
        line = found[1] if found else len(text.rstrip().splitlines())  # else: "at end of document"
        raise SpecError(file, f"line {line}", f"not TOML: {error}") from None
    except RecursionError:
        raise SpecError(file, "", "nested too deeply") from None


def _find(kind: str, schema: type[S], name: str) -> S:
    if name.endswith(".toml") or "/" in name:
        return load(Path(name).expanduser(), schema)
    wanted = name.lower()
    file = CATALOG / kind / f"{wanted}.toml"
    if wanted in names(kind):
        return load(file, schema)
    for spec in every(kind):
        if wanted in getattr(spec, "aliases", ()):
            return cast(S, spec)
    raise SpecError(kind, "", unknown(kind.removesuffix("s"), name, names(kind)))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(file, "", f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise SpecError(file, "", "expected a JSON object")
    return raw
