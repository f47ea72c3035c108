"""Which files a plan becomes, and which it cannot become and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.kubernetes import kubernetes
from tongyun.codesign.launch.platforms import SGLANG, VLLM
from tongyun.codesign.launch.ray_serve import ray_serve
from tongyun.codesign.launch.scripts import scripts
from tongyun.errors import Infeasible, InputError, unknown

Writes = Callable[[Deployment], Mapping[str, str]]
TARGETS: Mapping[str, Mapping[str, Writes]] = {
    "vllm": {"vllm.sh": lambda deployment: scripts(VLLM, deployment)},
    "sglang": {"sglang.sh": lambda deployment: scripts(SGLANG, deployment)},
    "kubernetes": {
        "kubernetes-vllm.yaml": lambda plan: {"kubernetes-vllm.yaml": kubernetes(VLLM, plan)},
        "kubernetes-sglang.yaml": lambda plan: {"kubernetes-sglang.yaml": kubernetes(SGLANG, plan)},
    },
    "ray": {"ray-serve.yaml": lambda deployment: {"ray-serve.yaml": ray_serve(deployment)}},
}
"""What `--engine` accepts, with what each writes: a file, or scripts whose names begin as its does."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Files by name, and the reason for each that there is none of."""

    files: Mapping[str, str]
    refused: Mapping[str, str]


def launch_files(deployment: Deployment, targets: Sequence[str]) -> Launch:
    """The files of these targets; `Infeasible` when not one of them can be had."""
    for target in targets:
        if target not in TARGETS:
            raise InputError(unknown("engine", target, list(TARGETS)))
    files: dict[str, str] = {}
    refused: dict[str, str] = {}
    for target in targets:
        for name, texts in TARGETS[target].items():
            try:
                files |= texts(deployment)
            except Infeasible as no:
                refused[name] = str(no)
    if not files:
        raise Infeasible("no launch file: " + "; ".join(dict.fromkeys(refused.values())))
    return Launch(files=files, refused=refused)
