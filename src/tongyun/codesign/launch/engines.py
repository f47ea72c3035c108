"""The flags by which an engine carries out its part of a plan, or why it cannot.

A flag is its long name and value; a switch has no value. Names and accepted values are
those of the parsers of the releases in `platforms.VERSIONS`. Ports and addresses are `scripts`'
and `kubernetes`' matter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

from tongyun.codesign.launch.deployment import DECODE, MIXED, PREFILL, Deployment, Member
from tongyun.codesign.launch.platforms import SGLANG, VERSIONS, VLLM
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import Infeasible
from tongyun.units import DType

Flags = Mapping[str, int | float | str | None]
_Found = dict[str, int | float | str | None]
WITHOUT_ATTENTION_GROUPS = "0.5.8"
"""The newest release of SGLang whose argument parser was seen to lack `--attn-dp-size`."""
KV_ROLES = {PREFILL: "kv_producer", DECODE: "kv_consumer"}
WITH_BOOTSTRAP = (SGLANG,)
"""Engines whose prefill replicas open a port on which decode replicas find them."""


def flags(engine: str, member: Member) -> Flags:
    """The engine's flags for these replicas; what it cannot do is `Infeasible` with the reason."""
    deployment = member.deployment
    _runs(engine, deployment)
    found = _FLAGS[engine](member)
    if deployment.source != deployment.question.model.name:
        found["--served-model-name"] = deployment.question.model.name
    return found


def argv(found: Flags) -> list[str]:
    """Flags as words of a command line."""
    return [
        word for name, value in found.items() for word in ([name] if value is None else [name, str(value)])
    ]


def notes(engine: str, member: Member) -> list[str]:
    """What somebody who starts the engine has to know."""
    deployment, shard = member.deployment, member.shard
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
    return found + _NOTES[engine](member)


def _vllm_notes(member: Member) -> list[str]:
    if member.role == MIXED:
        return []
    return [
        "keys and values go from prefill to decode by NIXL (`pip install nixl`), which finds its peer at "
        "VLLM_NIXL_SIDE_CHANNEL_HOST"
    ]


def _sglang_notes(member: Member) -> list[str]:
    shard, found = member.shard, []
    if shard.dp > 1:
        found.append(
            f"SGLang counts chips, tokens and requests over all attention groups: "
            f"--tp-size {shard.tp * shard.dp} holds {shard.dp} groups of tp {shard.tp}"
        )
        found.append(
            f"--attn-dp-size: SGLang {VERSIONS[SGLANG]} has it, {WITHOUT_ATTENTION_GROUPS} does not yet "
            "and stops at this flag"
        )
    if member.role != MIXED:
        found.append(
            "keys and values go from prefill to decode by --disaggregation-transfer-backend; "
            "--disaggregation-ib-device names the network cards where the default is not theirs"
        )
    elif member.question.draft_tokens:
        found.append(
            "SGLang gives drafted decoding and prefill steps of their own: the plan lets them share one, "
            "so that TPOT will swing more than predicted"
        )
    else:
        found.append("--enable-mixed-chunk: the plan lets decoding and prefill share a step")
    return found


_NOTES: Mapping[str, Callable[[Member], list[str]]] = {VLLM: _vllm_notes, SGLANG: _sglang_notes}


def _runs(engine: str, deployment: Deployment) -> None:
    platform, chip = deployment.platform, deployment.question.chip
    if engine not in platform.engines:
        why = platform.absent.get(engine, f"{engine} is not known to run on it")
        raise Infeasible(f"{chip.name}: {why}")
    if not deployment.pools:
        return
    backend = {VLLM: platform.connector, SGLANG: platform.transfer}[engine]
    if backend is None:
        raise Infeasible(
            f"{chip.name}: no way is known by which {engine} hands keys and values from pool to pool "
            "there; --pools mixed plans without"
        )
    first, second = deployment.pools
    _HANDS_OVER[engine](first, second)


def _vllm_hands_over(first: Member, second: Member) -> None:
    one, other = first.shard, second.shard
    if one.pp > 1 or other.pp > 1:
        raise Infeasible(
            f"vLLM's NixlConnector hands over between replicas of one pipeline stage, the plan's have "
            f"{one.pp} and {other.pp}: NixlPushConnector takes stages in prefill, but its router does not "
            "drive that one; SGLang can run it, or --pools mixed"
        )
    model = first.question.model
    if one.tp > other.tp and one.tp > model.kv_heads and model.latent is None:
        raise Infeasible(
            f"vLLM's NixlConnector does not gather the {model.kv_heads} key heads that prefill's tp{one.tp} "
            f"copies for decode's tp{other.tp}; --pools mixed plans without"
        )
    _divides("vLLM", one.tp, other.tp)


def _sglang_hands_over(first: Member, second: Member) -> None:
    one, other = first.shard, second.shard
    if other.pp not in (1, one.pp):
        raise Infeasible(
            f"SGLang hands over to decode replicas of one pipeline stage or of as many as in prefill: the "
            f"plan has {one.pp} and {other.pp}"
        )
    _divides("SGLang", one.tp, other.tp)


def _divides(engine: str, one: int, other: int) -> None:
    if one % other and other % one:
        raise Infeasible(
            f"{engine} hands over between tensor-parallel sizes of which one divides the other: "
            f"prefill's tp{one} and decode's tp{other} do not"
        )


_HANDS_OVER: Mapping[str, Callable[[Member, Member], None]] = {
    VLLM: _vllm_hands_over,
    SGLANG: _sglang_hands_over,
}


def _vllm(member: Member) -> _Found:
    shard, deployment = member.shard, member.deployment
    if shard.ep not in (1, shard.stage_ranks):
        raise Infeasible(
            f"vLLM spreads experts over all {shard.stage_ranks} ranks of a stage or cuts each over all; "
            f"the plan's ep{shard.ep} is neither, SGLang can run it"
        )
    found: _Found = {
        "--tensor-parallel-size": shard.tp,
        "--pipeline-parallel-size": shard.pp,
        "--data-parallel-size": shard.dp,
    }
    if shard.ep > 1:
        found["--enable-expert-parallel"] = None
    # vLLM refuses a token budget below its number of sequences.
    found |= {
        "--max-num-seqs": member.sequences,
        "--max-num-batched-tokens": member.step_tokens,
        "--max-model-len": member.length,
        "--gpu-memory-utilization": USABLE_MEMORY,
    }
    if member.role != MIXED:
        transfer = {"kv_connector": deployment.platform.connector, "kv_role": KV_ROLES[member.role]}
        found["--kv-transfer-config"] = json.dumps(transfer)
    return found | _types(VLLM, member) | _vllm_drafts(member)


def _vllm_drafts(member: Member) -> _Found:
    """Both pools draft: the draft module's keys and values are handed over too."""
    count = member.question.draft_tokens
    if not count:
        return {}
    drafter = member.deployment.drafter
    said = {"method": "mtp"} if drafter is None else {"method": "eagle3", "model": drafter}
    return {"--speculative-config": json.dumps({**said, "num_speculative_tokens": count})}


def _sglang(member: Member) -> _Found:
    shard = member.shard
    found: _Found = {
        "--tp-size": shard.stage_ranks,
        "--pp-size": shard.pp,
        "--ep-size": shard.ep,
    }
    if shard.dp > 1:
        found["--attn-dp-size"] = shard.dp
    # SGLang ends a request two tokens before its context length.
    longest = min(member.length + 2, member.question.model.max_positions)
    found["--max-running-requests"] = member.sequences * shard.dp
    if member.role != DECODE:
        found["--chunked-prefill-size"] = member.plan.step_tokens * shard.dp
    if member.role == MIXED and not member.question.draft_tokens:
        found["--enable-mixed-chunk"] = None
    found |= {"--context-length": longest, "--mem-fraction-static": member.static_fraction}
    if member.role != MIXED:
        found["--disaggregation-mode"] = member.role
        found["--disaggregation-transfer-backend"] = member.deployment.platform.transfer
    return found | _types(SGLANG, member) | _sglang_drafts(member)


def _sglang_drafts(member: Member) -> _Found:
    """A chain of drafts: one candidate a step, all of them and the next token verified together."""
    count = member.question.draft_tokens
    if not count:
        return {}
    drafter = member.deployment.drafter
    if drafter is not None and member.shard.pp > 1:
        raise Infeasible(
            f"SGLang drafts over several pipeline stages with a model's own module alone: not with {drafter} "
            f"on the plan's pp{member.shard.pp}"
        )
    found: _Found = {"--speculative-algorithm": "NEXTN" if drafter is None else "EAGLE3"}
    if drafter is not None:
        found["--speculative-draft-model-path"] = drafter
    return found | {
        "--speculative-num-steps": count,
        "--speculative-eagle-topk": 1,
        "--speculative-num-draft-tokens": count + 1,
    }


_FLAGS: Mapping[str, Callable[[Member], _Found]] = {VLLM: _vllm, SGLANG: _sglang}
_KV: Mapping[str, Mapping[DType, str]] = {
    VLLM: {DType.FP8: "fp8_e4m3"},
    SGLANG: {DType.FP8: "fp8_e4m3"},
}
"""KV types other than the activations', which is what both engines call auto."""


def _types(engine: str, member: Member) -> _Found:
    precision = member.question.precision
    found: _Found = {"--dtype": "float32" if precision.activations is DType.F32 else "bfloat16"}
    if precision.kv is precision.activations:
        found["--kv-cache-dtype"] = "auto"
    elif precision.kv in _KV[engine]:
        found["--kv-cache-dtype"] = _KV[engine][precision.kv]
    else:
        raise Infeasible(f"{engine} keeps no KV cache in {precision.kv} beside {precision.activations}")
    if member.deployment.quantises:
        found["--quantization"] = "fp8"
    return found
