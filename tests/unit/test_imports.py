"""Imports run one way, and some rooms may not know some things."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "tongyun"

# A room may import itself and every room on a line above its own.
FLOORS = [
    {"errors"},
    {"units"},
    {"report"},
    {"store"},
    {"specs"},
    {"model"},
    {"chip"},
    {"cost"},
    {"cloud"},
    {"codesign"},
    {"cli"},
    {"__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

TORCH_ROOMS = ("cloud/engine/", "cloud/training/", "chip/ppu/")
TORCHLESS_MODEL = {"config.py", "graph.py", "options.py", "shard.py", "vocabulary.py"}
SCHED_FORBIDDEN = {"torch", "time", "random", "datetime", "tongyun.cost", "tongyun.cloud.engine"}
DEFINITIONS = (
    ast.Import,
    ast.ImportFrom,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
    ast.ClassDef,
    ast.Assign,
    ast.AnnAssign,
    ast.Expr,
    ast.If,
)
FORBIDDEN_NAMES = {"utils", "helpers", "common", "misc", "util"}


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(dotted: str) -> str:
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else ""


def place(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def starts_with(name: str, prefixes: set[str]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", modules(), ids=place)
def test_imports_run_one_way(path: Path) -> None:
    here = place(path).split("/")[0].removesuffix(".py")
    if here == "__init__":
        assert not any(name.startswith("tongyun") for name in imports(path))
        return
    assert here in FLOOR, f"{here}: a room the floor plan does not know"
    for name in imports(path):
        there = room(name) if name.startswith("tongyun.") else ""
        if there in ("", here, "__version__"):
            continue
        assert there in FLOOR, f"{place(path)} imports the unknown room {there}"
        assert FLOOR[there] < FLOOR[here], f"{place(path)} imports {name}: upwards"


@pytest.mark.parametrize("path", modules(), ids=place)
def test_torch_stays_in_its_rooms(path: Path) -> None:
    if not starts_with_any(imports(path), {"torch"}):
        return
    where = place(path)
    in_model = where.startswith("model/") and path.name not in TORCHLESS_MODEL
    assert in_model or where.startswith(TORCH_ROOMS), f"{where} imports torch"


def starts_with_any(names: set[str], prefixes: set[str]) -> bool:
    return any(starts_with(name, prefixes) for name in names)


@pytest.mark.parametrize("path", sorted((SOURCE / "cloud" / "sched").rglob("*.py")), ids=place)
def test_the_scheduler_knows_no_clock_tensor_or_chip(path: Path) -> None:
    assert not starts_with_any(imports(path), SCHED_FORBIDDEN)


@pytest.mark.parametrize("path", sorted((SOURCE / "cloud" / "gateway").rglob("*.py")), ids=place)
def test_the_gateway_does_not_call_the_planner(path: Path) -> None:
    assert not starts_with_any(imports(path), {"tongyun.codesign", "tongyun.cost", "tongyun.chip"})


@pytest.mark.parametrize("path", modules(), ids=place)
def test_module_names_say_what_is_inside(path: Path) -> None:
    assert path.stem not in FORBIDDEN_NAMES


@pytest.mark.parametrize("path", modules(), ids=place)
def test_no_loop_or_call_chain_runs_at_import(path: Path) -> None:
    """The top level of a module defines; it does not compute, read or print."""
    for node in ast.parse(path.read_text()).body:
        assert isinstance(node, DEFINITIONS), f"{place(path)}:{node.lineno} runs at import"
        if isinstance(node, ast.Expr):
            docstring = isinstance(node.value, ast.Constant)
            assert docstring or path.name == "__main__.py", f"{place(path)}:{node.lineno} runs at import"


@pytest.mark.parametrize("command", ["specs", "plan"])
def test_planning_starts_without_torch(command: str) -> None:
    code = f"""
import sys
from typer.testing import CliRunner
from tongyun.cli import build
CliRunner().invoke(build(), ["{command}", "--help"])
heavy = {{"torch", "transformers", "matplotlib", "fastapi"}} & set(sys.modules)
sys.exit(str(heavy) if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
