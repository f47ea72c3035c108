"""Ray Serve LLM configs, for `serve run` or `serve deploy`.

Two pools are one application; so is each kind of replica that does both, with a route of its own.
"""

from __future__ import annotations

import json

from tongyun.codesign.launch.block_yaml import Object, to_yaml
from tongyun.codesign.launch.deployment import MIXED, Deployment, Member
from tongyun.codesign.launch.engines import flags, notes
from tongyun.codesign.launch.platforms import RAY_TYPES, VERSIONS, VLLM

BUILDERS = "ray.serve.llm"
NIXL_BASES = {"prefill": 20000, "decode": 22000}
"""Ray's own: side channels of the two pools, apart where they share a machine."""


def ray_serve(deployment: Deployment) -> str:
    """The applications of a plan, as YAML."""
    applications = []
    if deployment.pools:
        applications.append(_pools(deployment))
    applications += [_application(member) for member in deployment.mixed]
    for number, application in enumerate(applications):
        application["route_prefix"] = "/" if number == 0 else f"/{number}"
    said = list(dict.fromkeys(note for member in deployment.members for note in notes(VLLM, member)))
    head = deployment.header(
        f"keys as Ray {VERSIONS['Ray']} and vLLM {VERSIONS[VLLM]} read them",
        *_loads(deployment),
        *said,
        *_routes(deployment, applications),
    )
    return head + to_yaml({"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": applications})


def _loads(deployment: Deployment) -> list[str]:
    return [
        f"{member.label}: {load}" if member.label else load
        for member in deployment.members
        for load in (f"batch {member.plan.batch} on a replica, {member.plan.step_tokens} tokens a step",)
    ]


def _routes(deployment: Deployment, applications: list[Object]) -> list[str]:
    """Ray shares requests within an application; among several whoever asks has to."""
    if len(applications) == 1:
        return []
    rates = [
        *([deployment.shares[0]] if deployment.pools else []),
        *(m.tokens_per_s for m in deployment.mixed),
    ]
    parts = ", ".join(
        f"{application['route_prefix']} {rate / sum(rates):.1%}"
        for application, rate in zip(applications, rates, strict=True)
    )
    return [f"each kind of replica has a route; share requests so: {parts}"]


def _application(member: Member) -> Object:
    spread = member.shard.dp > 1
    builder = "build_dp_openai_app" if spread else "build_openai_app"
    config = _config(member)
    return {
        "name": member.name,
        "route_prefix": "/",
        "import_path": f"{BUILDERS}:{builder}",
        "args": {"llm_config": config} if spread else {"llm_configs": [config]},
    }


def _pools(deployment: Deployment) -> Object:
    configs = {f"{member.role}_config": _config(member) for member in deployment.pools}
    return {
        "name": deployment.name,
        "route_prefix": "/",
        "import_path": f"{BUILDERS}:build_pd_openai_app",
        "args": configs,
    }


def _config(member: Member) -> Object:
    """An LLMConfig."""
    deployment = member.deployment
    config: Object = {
        "model_loading_config": {
            "model_id": deployment.question.model.name,
            "model_source": deployment.source,
        }
    }
    if deployment.question.chip.name in RAY_TYPES:
        config["accelerator_type"] = RAY_TYPES[deployment.question.chip.name]
    config["engine_kwargs"] = _kwargs(member)
    # Of a data-parallel app Ray multiplies the replicas by its groups.
    config["deployment_config"] = {"num_replicas": member.plan.replicas}
    if member.role != MIXED:
        config["experimental_configs"] = {"NIXL_SIDE_CHANNEL_PORT_BASE": NIXL_BASES[member.role]}
    return config


def _kwargs(member: Member) -> Object:
    """Flags as the engine's own arguments; JSON ones as what they say."""
    found: Object = {}
    for name, value in flags(VLLM, member).items():
        if name == "--served-model-name":
            continue
        said = json.loads(value) if isinstance(value, str) and value.startswith("{") else value
        found[name.removeprefix("--").replace("-", "_")] = True if said is None else said
    return found
