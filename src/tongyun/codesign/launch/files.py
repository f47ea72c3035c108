"""Which files a plan becomes, and which it cannot become and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.manifests import kubernetes, ray_serve
from tongyun.codesign.launch.platforms import SGLANG, VLLM
from tongyun.codesign.launch.scripts import script
from tongyun.errors import Infeasible, InputError, unknown

TARGETS: Mapping[str, Mapping[str, Callable[[Deployment], str]]] = {
    "vllm": {"vllm.sh": lambda deployment: script(VLLM, deployment)},
    "sglang": {"sglang.sh": lambda deployment: script(SGLANG, deployment)},
    "kubernetes": {
        "kubernetes-vllm.yaml": lambda deployment: kubernetes(VLLM, deployment),
        "kubernetes-sglang.yaml": lambda deployment: kubernetes(SGLANG, deployment),
    },
    "ray": {"ray-serve.yaml": ray_serve},
}
"""What `--engine` accepts, with the files each writes."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Files by name, and the reason for each that there is none of."""

    files: Mapping[str, str]
    refused: Mapping[str, str]


def launch_files(deployment: Deployment, targets: Sequence[str]) -> Launch:
    """The files of these targets; `Infeasible` when not one of them can be had."""
    for target in targets:
        if target not in TARGETS:
            raise InputError(unknown("engine", target, TARGETS))
    files, refused = {}, {}
    for target in targets:
        for name, text in TARGETS[target].items():
            try:
                files[name] = text(deployment)
            except Infeasible as no:
                refused[name] = str(no)
    if not files:
        raise Infeasible("no launch file: " + "; ".join(dict.fromkeys(refused.values())))
    return Launch(files=files, refused=refused)
