"""Kubernetes manifests and Ray Serve configs, as plain objects and as YAML.

One machine a replica is a Deployment; several are a LeaderWorkerSet, whose controller
(leaderworkerset.x-k8s.io/v1) has to be installed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.engines import argv, flags, notes
from tongyun.codesign.launch.platforms import RAY_TYPES, SGLANG, VERSIONS, VLLM
from tongyun.codesign.launch.scripts import COMMANDS, PORTS
from tongyun.errors import Infeasible

Object = dict[str, Any]
NO_IMAGE = "set-the-image-of-your-vendor"


def kubernetes(engine: str, deployment: Deployment) -> str:
    """A Deployment or LeaderWorkerSet and its Service, as YAML."""
    if deployment.platform.resource is None:
        raise Infeasible(
            f"{deployment.question.chip.name}: the Kubernetes resource name of this chip is not known"
        )
    workload = _deployment(engine, deployment) if deployment.nodes == 1 else _workers(engine, deployment)
    head = deployment.header(
        f"flags as {engine} {VERSIONS[engine]} reads them",
        *notes(engine, deployment),
        *(() if deployment.platform.engines[engine] else (f"no image is published: replace {NO_IMAGE}",)),
    )
    return head + "---\n".join(to_yaml(part) for part in (workload, _service(engine, deployment)))


def ray_serve(deployment: Deployment) -> str:
    """A Ray Serve LLM application on vLLM, as YAML for `serve run` or `serve deploy`."""
    found = flags(VLLM, deployment)
    kwargs = {
        name.removeprefix("--").replace("-", "_"): True if value is None else value
        for name, value in found.items()
        if name != "--served-model-name"
    }
    config: Object = {
        "model_loading_config": {
            "model_id": deployment.question.model.name,
            "model_source": deployment.source,
        }
    }
    if deployment.question.chip.name in RAY_TYPES:
        config["accelerator_type"] = RAY_TYPES[deployment.question.chip.name]
    config["engine_kwargs"] = kwargs
    # Of a data-parallel app Ray multiplies the replicas by its groups.
    config["deployment_config"] = {"num_replicas": deployment.offer.plan.replicas}
    spread = deployment.shard.dp > 1
    application = {
        "name": deployment.name,
        "route_prefix": "/",
        "import_path": f"ray.serve.llm:{'build_dp_openai_app' if spread else 'build_openai_app'}",
        "args": {"llm_config": config} if spread else {"llm_configs": [config]},
    }
    head = deployment.header(
        f"keys as Ray {VERSIONS['Ray']} and vLLM {VERSIONS[VLLM]} read them", *notes(VLLM, deployment)
    )
    return head + to_yaml(
        {"http_options": {"host": "127.0.0.1", "port": 8000}, "applications": [application]}
    )


def _deployment(engine: str, deployment: Deployment) -> Object:
    labels = {"app": deployment.name}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": deployment.name, "labels": labels},
        "spec": {
            "replicas": deployment.offer.plan.replicas,
            "selector": {"matchLabels": labels},
            "template": {
                "metadata": {"labels": labels},
                "spec": _pod(engine, deployment, extra=[], serves=True),
            },
        },
    }


def _workers(engine: str, deployment: Deployment) -> Object:
    """Leader and workers: the controller sets LWS_GROUP_SIZE, LWS_WORKER_INDEX and LWS_LEADER_ADDRESS."""
    labels = {"app": deployment.name}
    leader, worker = _place(engine, "0"), _place(engine, "$(LWS_WORKER_INDEX)")
    if engine == VLLM:
        worker = [*worker, "--headless"]
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": deployment.name, "labels": labels},
        "spec": {
            "replicas": deployment.offer.plan.replicas,
            "leaderWorkerTemplate": {
                "size": deployment.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": {
                    "metadata": {"labels": labels | {"role": "leader"}},
                    "spec": _pod(engine, deployment, extra=leader, serves=True),
                },
                "workerTemplate": {
                    "metadata": {"labels": labels | {"role": "worker"}},
                    "spec": _pod(engine, deployment, extra=worker, serves=False),
                },
            },
        },
    }


def _place(engine: str, rank: str) -> list[str]:
    """Where in its group a pod stands."""
    words = ["--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", rank]
    if engine == SGLANG:
        return [*words, "--dist-init-addr", "$(LWS_LEADER_ADDRESS):20000"]
    return [*words, "--master-addr", "$(LWS_LEADER_ADDRESS)"]


def _pod(engine: str, deployment: Deployment, *, extra: Sequence[str], serves: bool) -> Object:
    port = PORTS[engine]
    words = [*COMMANDS[engine].split(), deployment.source, *argv(flags(engine, deployment)), *extra]
    headless = engine == VLLM and not serves
    if not headless:
        words += ["--host", "0.0.0.0", "--port", str(port)]
    token = {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}
    container: Object = {
        "name": engine.lower(),
        "image": deployment.platform.engines[engine] or NO_IMAGE,
        "command": words,
        "env": [{"name": "HF_TOKEN", "valueFrom": token}],
        "resources": {"limits": {str(deployment.platform.resource): str(deployment.chips_per_node)}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if serves:
        container["ports"] = [{"containerPort": port, "name": "http"}]
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": port}, "periodSeconds": 10}
    return {"containers": [container], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}


def _service(engine: str, deployment: Deployment) -> Object:
    selector = {"app": deployment.name}
    if deployment.nodes > 1:
        selector["role"] = "leader"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": deployment.name},
        "spec": {
            "selector": selector,
            "ports": [{"name": "http", "port": 80, "targetPort": PORTS[engine]}],
        },
    }


# ── YAML ─────────────────────────────────────────────────────────────────────────────


def to_yaml(value: Object) -> str:
    """YAML of nested objects and lists in block style; texts are quoted, so that none turns into a number."""
    return "".join(f"{line}\n" for line in _block(value))


def _block(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        return [line for key, item in value.items() for line in _entry(f"{key}:", item)]
    return [line for item in value for line in _item(item)]


def _entry(head: str, item: Any) -> list[str]:
    if not _nested(item):
        return [f"{head} {_scalar(item)}"]
    return [head, *(f"  {line}" for line in _block(item))]


def _item(item: Any) -> list[str]:
    if not _nested(item):
        return [f"- {_scalar(item)}"]
    first, *rest = _block(item)
    return [f"- {first}", *(f"  {line}" for line in rest)]


def _nested(item: Any) -> bool:
    return isinstance(item, Mapping | list | tuple) and bool(item)


def _scalar(item: Any) -> str:
    return json.dumps(item, ensure_ascii=False)
