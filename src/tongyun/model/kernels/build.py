"""Build, cache and load the C++ kernels.

They are compiled at first use for the processor at hand and kept in a cache directory
under a name made of everything that could change them: sources, PyTorch, Python,
compiler flags, processor. Knows nothing of models.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import platform
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
FLAGS = (
    "-std=c++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-pthread",
)
NAME = "tongyun_kernels"


class BuildFailed(Exception):
    """The kernels cannot be had here; the message is one line."""


def load_kernels() -> ModuleType:
    """The compiled module, built first if this machine has not built it yet (about a minute)."""
    directory = _cache() / f"kernels-{_key()}"
    library = directory / f"{NAME}.so"
    if not library.exists():
        with _locked(directory.with_suffix(".lock")):
            if not library.exists():
                _build(directory)
    return _import(library)


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    path = Path(base) / "tongyun"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildFailed(f"cannot write the cache: {error}") from None
    return path


def _key() -> str:
    digest = hashlib.sha256()
    for file in sorted(SOURCES.iterdir()):
        digest.update(file.read_bytes())
    facts = (
        torch.__version__,
        sys.version,
        sysconfig.get_platform(),
        FLAGS,
        os.environ.get("CXX"),
        _processor(),
    )
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Only one process builds; the others wait. The lock goes with its process."""
    with file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(directory: Path) -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        raise BuildFailed("no C++ compiler found")
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is None:
        raise BuildFailed("ninja is not installed")
    log.info("building the C++ kernels into %s (once, about a minute)", directory)
    work = directory.with_name(f"{directory.name}.{os.getpid()}.part")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        _compile(work)
        work.rename(directory)
    except (RuntimeError, OSError, ImportError) as error:
        first = next((line for line in str(error).splitlines() if "error" in line.lower()), str(error))
        raise BuildFailed(f"the build failed: {first.strip()[:200]}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(work: Path) -> None:
    from torch.utils import cpp_extension

    sources = [str(file) for file in sorted(SOURCES.glob("*.cpp"))]
    path = os.environ.get("PATH", "")
    try:
        # ninja installed by pip sits beside the interpreter, which need not be on the path.
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), path])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cpp_extension.load(
                NAME,
                sources,
                extra_cflags=list(FLAGS),
                extra_ldflags=["-pthread"],
                build_directory=str(work),
                is_python_module=False,
            )
    finally:
        os.environ["PATH"] = path


def _import(library: Path) -> ModuleType:
    loader = importlib.machinery.ExtensionFileLoader(NAME, str(library))
    spec = importlib.util.spec_from_file_location(NAME, library, loader=loader)
    assert spec is not None
    try:
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except ImportError as error:
        raise BuildFailed(f"{library} cannot be loaded: {error}") from error
    return module
