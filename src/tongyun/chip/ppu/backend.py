"""`torch.compile(model, backend="ppu")`: capture, lower, and run on the simulated chip.

PyTorch finds the backend through its entry point; nothing needs to be imported. `options` takes `chip` (a
PPU spec's name or file), `without` (fusions to switch off), `check` (watch for races) and `cores` (how
many compute: fewer are quicker to simulate and give the same result). No operator is left to the
host: what the compiler does not know it refuses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule

from tongyun.chip.ppu.functional import Chip, Counts
from tongyun.chip.ppu.fusions import Fusions
from tongyun.chip.ppu.lower import Lowered, lower
from tongyun.errors import InputError, unknown
from tongyun.specs import Ppu, find_ppu

CHIP = "zhenwu-810e"
_OPTIONS = ("chip", "without", "check", "cores")


@dataclass
class Compiled:
    """One graph on one chip: called with the graph's inputs, returns its outputs."""

    lowered: Lowered
    ppu: Ppu
    check: bool = False
    cores: int | None = None
    """Cores that compute; None is the chip's. Any number gives the same result: a program reads it."""
    runs: list[Counts] = field(default_factory=list)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def chip(self) -> Chip:
        """The machine, made at the first call: while the graph is captured, tensors hold no numbers."""
        chip = Chip(
            self.lowered.program,
            cores=self.cores or self.ppu.cores,
            sram_bytes=self.ppu.sram_bytes,
            check=self.check,
        )
        for name, value in self.lowered.constants.items():
            chip.put(name, torch.from_numpy(value))
        return chip

    def __call__(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        for name, value in zip(self.lowered.inputs, inputs, strict=True):
            if name is not None:
                self._put(name, value)
        self.runs.append(self.chip.run())
        pairs = zip(self.lowered.outputs, self.lowered.output_shapes, strict=True)
        return [self.chip.view(name).reshape(shape).clone() for name, shape in pairs]

    def _put(self, name: str, value: torch.Tensor) -> None:
        # Weights are copied once: the same storage at the same version holds the same numbers.
        stamp = (value.data_ptr(), value._version)
        is_weight = isinstance(value, torch.nn.Parameter)
        if not is_weight or self._seen.get(name) != stamp:
            self.chip.put(name, value.detach().reshape(self.lowered.program.tensor(name).shape))
            self._seen[name] = stamp


@dataclass(frozen=True, kw_only=True)
class Backend:
    """A backend of `torch.compile` that keeps what it compiled."""

    ppu: Ppu
    fusions: Fusions = field(default_factory=Fusions)
    check: bool = False
    cores: int | None = None
    compiled: list[Compiled] = field(default_factory=list)
    """Oldest first: programs and what their runs counted."""

    def __call__(self, graph: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., Any]:
        stages = aot_autograd(fw_compiler=_training, inference_compiler=self._inference)
        made: Callable[..., Any] = stages(graph, list(inputs))
        return made

    def _inference(self, graph: GraphModule, _: Sequence[torch.Tensor]) -> Callable[..., Any]:
        lowered = lower(graph, self.ppu, self.fusions)
        self.compiled.append(Compiled(lowered, self.ppu, self.check, self.cores))
        call = self.compiled[-1].__call__

        def boxed(arguments: list[torch.Tensor]) -> list[torch.Tensor]:
            values = list(arguments)
            arguments.clear()
            return call(*values)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed


def _training(*_: Any) -> Callable[..., Any]:
    raise InputError("the PPU backend runs inference: call the model under torch.no_grad()")


compiled: list[Compiled] = []
"""Graphs compiled through the entry point in this process, oldest first."""


def ppu(
    graph: GraphModule, inputs: Sequence[torch.Tensor], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend's entry point. InputError for an option or operator that is not known."""
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            raise InputError(unknown("option", name, _OPTIONS))
    backend = Backend(
        ppu=find_ppu(given.get("chip", CHIP)).at(),
        fusions=Fusions.without(*given.get("without", ())),
        check=bool(given.get("check", False)),
        cores=given.get("cores"),
        compiled=compiled,
    )
    return backend(graph, inputs)
