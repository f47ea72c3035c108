"""Which engines run on whose chips, and how a chip is named to them.

Facts with their sources; decides nothing about a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tongyun.errors import Infeasible
from tongyun.specs import ChipSpec

VLLM, SGLANG = "vLLM", "SGLang"
VERSIONS: Mapping[str, str] = {VLLM: "0.33.0", SGLANG: "0.5.23", "Ray": "2.60.0"}
"""Releases whose argument parsers the flags were checked against."""
ROUTERS: Mapping[str, tuple[str, str]] = {
    VLLM: ("vllm-router", "0.1.17"),
    SGLANG: ("sglang-router", "0.3.2"),
}
"""Each engine's router: its package and release on the Python package index."""
ROUTER_IMAGE = "python:3.12-slim"
"""Neither project publishes an image of its router alone; it is installed as the pod starts."""


@dataclass(frozen=True, kw_only=True)
class Platform:
    """How software reaches the chips of one vendor."""

    engines: Mapping[str, str | None]
    """Engines that run here, each with the image its project publishes; None where there is none."""
    visible: str | None
    """Environment variable that gives a process some of a machine's chips."""
    resource: str | None
    """Name of the chips in Kubernetes."""
    connector: str | None = None
    """vLLM's way for keys and values between pools; None where NixlConnector is not known to run."""
    transfer: str | None = None
    """SGLang's backend for the same."""
    note: str | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    """Why an engine does not run here."""


PLATFORMS: Mapping[str, Platform] = {
    "NVIDIA": Platform(
        engines={VLLM: "vllm/vllm-openai:v0.33.0", SGLANG: "lmsysorg/sglang:v0.5.23"},
        visible="CUDA_VISIBLE_DEVICES",
        resource="nvidia.com/gpu",
        connector="NixlConnector",
        transfer="mooncake",
    ),
    "AMD": Platform(
        engines={VLLM: "vllm/vllm-openai-rocm:latest", SGLANG: None},
        visible="HIP_VISIBLE_DEVICES",
        resource="amd.com/gpu",
        connector="NixlConnector",
        transfer="mori",
        note="ROCm builds of the engines are needed; AMD lists them under rocm.docs.amd.com, inference",
    ),
    "Huawei": Platform(
        engines={VLLM: "quay.io/ascend/vllm-ascend:v0.23.0", SGLANG: None},
        visible="ASCEND_RT_VISIBLE_DEVICES",
        resource="huawei.com/Ascend910",
        transfer="ascend",
        note="vLLM runs with the vllm-ascend plugin, whose newest release follows vLLM 0.23.0; "
        "SGLang with its NPU build (docs.sglang.io, Ascend NPUs)",
    ),
    "Google": Platform(
        engines={VLLM: "vllm/vllm-tpu:latest"},
        visible="TPU_VISIBLE_CHIPS",
        resource="google.com/tpu",
        note="vLLM runs as vllm-tpu (docs.vllm.ai/projects/tpu), which names v7x, v6e and v5e; "
        "on GKE add the node selectors of the TPU type and topology",
        absent={SGLANG: "SGLang's PyTorch engine does not run on TPUs (sglang-jax is another program)"},
    ),
    "AWS": Platform(
        engines={VLLM: None},
        visible="NEURON_RT_VISIBLE_CORES",
        resource="aws.amazon.com/neuron",
        note="vLLM runs with AWS's Neuron plugin, which has flags of its own; NEURON_RT_VISIBLE_CORES "
        "counts cores, not chips",
        absent={SGLANG: "SGLang does not run on Trainium"},
    ),
    "T-Head": Platform(
        engines={VLLM: None, SGLANG: None},
        visible="CUDA_VISIBLE_DEVICES",
        resource=None,
        connector="NixlConnector",
        transfer="mooncake",
        note="the engines run through the SAIL SDK's CUDA wrapper, in images that Alibaba Cloud gives its "
        "PPU customers (PAI serves DeepSeek-R1 on PPUs with both); no public image or version is known, "
        "that CUDA_VISIBLE_DEVICES is obeyed is assumed",
    ),
}

CPU = Platform(
    engines={VLLM: "vllm/vllm-openai-cpu:latest"},
    visible=None,
    resource=None,
    note="vLLM's CPU build is needed; `tongyun serve` runs the plan's model on this machine without it",
    absent={SGLANG: "SGLang on CPUs needs Intel AMX builds and other flags"},
)

RAY_TYPES: Mapping[str, str] = {
    "a100": "A100",
    "h100": "H100",
    "h200": "H200",
    "h20": "H20",
    "b200": "B200",
    "b300": "B300",
    "gb200": "GB200",
    "gb300": "GB300",
    "mi300x": "AMD-Instinct-MI300X-OAM",
    "mi325x": "AMD-Instinct-MI325X-OAM",
    "mi355x": "AMD-Instinct-MI355X-OAM",
    "tpu-v5e": "TPU-V5LITEPOD",
    "tpu-v5p": "TPU-V5P",
    "tpu-v6e": "TPU-V6E",
    "tpu7x": "TPU-V7X",
}
"""Chips that Ray knows by name (`ray.util.accelerators`)."""


def platform_of(chip: ChipSpec) -> Platform:
    """How this chip is reached; a vendor nobody wrote an engine for is `Infeasible`."""
    if chip.kind == "cpu":
        return CPU
    found = PLATFORMS.get(chip.vendor)
    if found is None:
        known = ", ".join(sorted(PLATFORMS))
        raise Infeasible(
            f"{chip.name}: no engine is known to run on chips of vendor '{chip.vendor}' (known: {known})"
        )
    return found
