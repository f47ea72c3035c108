"""The flags by which an engine carries out a plan, or why it cannot.

A flag is its long name and value; a switch has no value. Names and accepted values are
those of the parsers of the releases in `platforms.VERSIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.platforms import SGLANG, VERSIONS, VLLM
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import Infeasible
from tongyun.units import DType

Flags = Mapping[str, int | float | str | None]
WITHOUT_ATTENTION_GROUPS = "0.5.8"
"""The newest release of SGLang whose argument parser was seen to lack `--attn-dp-size`."""


def flags(engine: str, deployment: Deployment) -> Flags:
    """The engine's flags for this plan; what it cannot do is `Infeasible` with the reason."""
    _runs(engine, deployment)
    found = _FLAGS[engine](deployment)
    if deployment.source != deployment.question.model.name:
        found["--served-model-name"] = deployment.question.model.name
    return found


def argv(found: Flags) -> list[str]:
    """Flags as words of a command line."""
    return [
        word for name, value in found.items() for word in ([name] if value is None else [name, str(value)])
    ]


def notes(engine: str, deployment: Deployment) -> list[str]:
    """What somebody who starts the engine has to know."""
    shard = deployment.shard
    found = [] if deployment.platform.note is None else [deployment.platform.note]
    if deployment.quantises:
        found.append("fp8: the engine quantises the released weights while it loads them")
    if deployment.checkpoint is not None:
        found.append(f"{deployment.checkpoint} is taken to be stored in {deployment.recipe}")
    if shard.dp > 1:
        backend = "--all2all-backend" if engine == VLLM else "--moe-a2a-backend"
        found.append(
            "the plan prices dispatch and combine as an all-to-all: where DeepEP is installed choose it "
            f"with {backend}, for the default gathers instead"
        )
    if engine == SGLANG and shard.dp > 1:
        found.append(
            f"SGLang counts chips, tokens and requests over all attention groups: "
            f"--tp-size {shard.tp * shard.dp} holds {shard.dp} groups of tp {shard.tp}"
        )
        found.append(
            f"--attn-dp-size: SGLang {VERSIONS[SGLANG]} has it, {WITHOUT_ATTENTION_GROUPS} does not yet "
            "and stops at this flag"
        )
    if engine == SGLANG:
        found.append("--enable-mixed-chunk: the plan lets decoding and prefill share a step")
    return found


def _runs(engine: str, deployment: Deployment) -> None:
    platform, chip = deployment.platform, deployment.question.chip
    if engine not in platform.engines:
        why = platform.absent.get(engine, f"{engine} is not known to run on it")
        raise Infeasible(f"{chip.name}: {why}")


def _vllm(deployment: Deployment) -> dict[str, int | float | str | None]:
    shard, plan = deployment.shard, deployment.offer.plan
    if shard.ep not in (1, shard.stage_ranks):
        raise Infeasible(
            f"vLLM spreads experts over all {shard.stage_ranks} ranks of a stage or cuts each over all; "
            f"the plan's ep{shard.ep} is neither, SGLang can run it"
        )
    found: dict[str, int | float | str | None] = {
        "--tensor-parallel-size": shard.tp,
        "--pipeline-parallel-size": shard.pp,
        "--data-parallel-size": shard.dp,
    }
    if shard.ep > 1:
        found["--enable-expert-parallel"] = None
    # vLLM refuses a token budget below its number of sequences.
    found |= {
        "--max-num-seqs": deployment.sequences,
        "--max-num-batched-tokens": max(plan.step_tokens, deployment.sequences),
        "--max-model-len": deployment.length,
        "--gpu-memory-utilization": USABLE_MEMORY,
    }
    return found | _types(VLLM, deployment)


def _sglang(deployment: Deployment) -> dict[str, int | float | str | None]:
    shard, plan = deployment.shard, deployment.offer.plan
    found: dict[str, int | float | str | None] = {
        "--tp-size": shard.stage_ranks,
        "--pp-size": shard.pp,
        "--ep-size": shard.ep,
    }
    if shard.dp > 1:
        found["--attn-dp-size"] = shard.dp
    # SGLang ends a request two tokens before its context length.
    longest = min(deployment.length + 2, deployment.question.model.max_positions)
    found |= {
        "--max-running-requests": deployment.sequences * shard.dp,
        "--chunked-prefill-size": plan.step_tokens * shard.dp,
        "--enable-mixed-chunk": None,
        "--context-length": longest,
        "--mem-fraction-static": deployment.static_fraction,
    }
    return found | _types(SGLANG, deployment)


_FLAGS: Mapping[str, Callable[[Deployment], dict[str, int | float | str | None]]] = {
    VLLM: _vllm,
    SGLANG: _sglang,
}
_KV: Mapping[str, Mapping[DType, str]] = {
    VLLM: {DType.FP8: "fp8_e4m3"},
    SGLANG: {DType.FP8: "fp8_e4m3"},
}
"""KV types other than the activations', which is what both engines call auto."""


def _types(engine: str, deployment: Deployment) -> dict[str, int | float | str | None]:
    precision = deployment.question.precision
    found: dict[str, int | float | str | None] = {
        "--dtype": "float32" if precision.activations is DType.F32 else "bfloat16"
    }
    if precision.kv is precision.activations:
        found["--kv-cache-dtype"] = "auto"
    elif precision.kv in _KV[engine]:
        found["--kv-cache-dtype"] = _KV[engine][precision.kv]
    else:
        raise Infeasible(f"{engine} keeps no KV cache in {precision.kv} beside {precision.activations}")
    if deployment.quantises:
        found["--quantization"] = "fp8"
    return found
