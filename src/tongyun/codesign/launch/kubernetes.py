"""Kubernetes manifests, as plain objects and as YAML.

A kind of replica that fits a machine is a Deployment, or a StatefulSet where a router has to know
each by name; one of several machines is a LeaderWorkerSet, whose controller
(leaderworkerset.x-k8s.io/v1) has to be installed and gives its leaders names of the same form.
"""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.codesign.launch import routing
from tongyun.codesign.launch.block_yaml import Object, to_yaml
from tongyun.codesign.launch.deployment import MIXED, Deployment, Member
from tongyun.codesign.launch.engines import argv, flags, notes
from tongyun.codesign.launch.platforms import ROUTER_IMAGE, ROUTERS, SGLANG, VERSIONS, VLLM
from tongyun.codesign.launch.scripts import BOOTSTRAP_PORT, COMMANDS, MEETING_PORT, PORTS, opens
from tongyun.errors import Infeasible

NO_IMAGE = "set-the-image-of-your-vendor"
NGINX_IMAGE = "nginx:1.29"


def kubernetes(engine: str, deployment: Deployment) -> str:
    """Workloads and Services of a plan, as YAML."""
    if deployment.platform.resource is None:
        raise Infeasible(
            f"{deployment.question.chip.name}: the Kubernetes resource name of this chip is not known"
        )
    objects = [part for member in deployment.members for part in _member(engine, member)]
    if len(deployment.members) > 1:
        objects += _fronts(engine, deployment)
    said = list(dict.fromkeys(note for member in deployment.members for note in notes(engine, member)))
    head = deployment.header(
        *(line for member in deployment.members for line in _load(member)),
        f"flags as {engine} {VERSIONS[engine]} reads them",
        *said,
        *(() if deployment.platform.engines[engine] else (f"no image is published: replace {NO_IMAGE}",)),
        *_rights(deployment),
    )
    return head + "---\n".join(to_yaml(part) for part in objects)


def _load(member: Member) -> list[str]:
    load = f"batch {member.plan.batch} on a replica, {member.plan.step_tokens} tokens a step"
    return [f"{member.label}: {load}" if member.label else load]


def _rights(deployment: Deployment) -> list[str]:
    if not deployment.pools:
        return []
    return [
        "pods of both pools need the cluster's RDMA network for keys and values: add its resource and "
        "network annotations, which differ from cluster to cluster"
    ]


# ── replicas ─────────────────────────────────────────────────────────────────────────


def _member(engine: str, member: Member) -> list[Object]:
    if member.nodes > 1:
        workload = _workers(engine, member)
        # The controller makes a headless service of a labelled one's name itself.
        return [workload] if member.label else [workload, _service(engine, member)]
    if member.label:
        return [_named(engine, member), _headless(engine, member)]
    return [_deployment(engine, member), _service(engine, member)]


def _labels(member: Member) -> dict[str, str]:
    found = {"app": member.deployment.name}
    return found | {"component": member.label} if member.label else found


def _deployment(engine: str, member: Member) -> Object:
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": member.name, "labels": _labels(member)},
        "spec": {
            "replicas": member.plan.replicas,
            "selector": {"matchLabels": _labels(member)},
            "template": _template(engine, member, extra=[], serves=True),
        },
    }


def _named(engine: str, member: Member) -> Object:
    """Replicas that are reached one by one."""
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": {"name": member.name, "labels": _labels(member)},
        "spec": {
            "serviceName": member.name,
            "podManagementPolicy": "Parallel",
            "replicas": member.plan.replicas,
            "selector": {"matchLabels": _labels(member)},
            "template": _template(engine, member, extra=[], serves=True),
        },
    }


def _workers(engine: str, member: Member) -> Object:
    """Leader and workers: the controller sets LWS_GROUP_SIZE, LWS_WORKER_INDEX and LWS_LEADER_ADDRESS."""
    leader, worker = _place(engine, "0"), _place(engine, "$(LWS_WORKER_INDEX)")
    if engine == VLLM:
        worker = [*worker, "--headless"]
    return {
        "apiVersion": "leaderworkerset.x-k8s.io/v1",
        "kind": "LeaderWorkerSet",
        "metadata": {"name": member.name, "labels": _labels(member)},
        "spec": {
            "replicas": member.plan.replicas,
            "leaderWorkerTemplate": {
                "size": member.nodes,
                "restartPolicy": "RecreateGroupOnPodRestart",
                "leaderTemplate": _template(engine, member, extra=leader, serves=True, role="leader"),
                "workerTemplate": _template(engine, member, extra=worker, serves=False, role="worker"),
            },
        },
    }


def _place(engine: str, rank: str) -> list[str]:
    """Where in its group a pod stands."""
    words = ["--nnodes", "$(LWS_GROUP_SIZE)", "--node-rank", rank]
    if engine == SGLANG:
        return [*words, "--dist-init-addr", f"$(LWS_LEADER_ADDRESS):{MEETING_PORT}"]
    return [*words, "--master-addr", "$(LWS_LEADER_ADDRESS)"]


def _template(
    engine: str, member: Member, *, extra: Sequence[str], serves: bool, role: str | None = None
) -> Object:
    labels = _labels(member) if role is None else _labels(member) | {"role": role}
    return {"metadata": {"labels": labels}, "spec": _pod(engine, member, extra=extra, serves=serves)}


def _pod(engine: str, member: Member, *, extra: Sequence[str], serves: bool) -> Object:
    deployment, port = member.deployment, PORTS[engine]
    words = [*COMMANDS[engine].split(), deployment.source, *argv(flags(engine, member)), *extra]
    headless = engine == VLLM and not serves
    if not headless:
        words += ["--host", "0.0.0.0", "--port", str(port)]
    if opens(engine, member):
        words += ["--disaggregation-bootstrap-port", str(BOOTSTRAP_PORT)]
    container: Object = {
        "name": engine.lower(),
        "image": deployment.platform.engines[engine] or NO_IMAGE,
        "command": words,
        "env": _environment(engine, member),
        "resources": {"limits": {str(deployment.platform.resource): str(member.chips_per_node)}},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    if serves:
        container["ports"] = [{"containerPort": port, "name": "http"}]
        container["readinessProbe"] = {"httpGet": {"path": "/health", "port": port}, "periodSeconds": 10}
    return {"containers": [container], "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory"}}]}


def _environment(engine: str, member: Member) -> list[Object]:
    token = {"secretKeyRef": {"name": "hf-token", "key": "token", "optional": True}}
    found: list[Object] = [{"name": "HF_TOKEN", "valueFrom": token}]
    if engine == VLLM and member.role != MIXED:
        address = {"fieldRef": {"fieldPath": "status.podIP"}}
        found.append({"name": "VLLM_NIXL_SIDE_CHANNEL_HOST", "valueFrom": address})
    return found


def _service(engine: str, member: Member) -> Object:
    selector = _labels(member) | ({"role": "leader"} if member.nodes > 1 else {})
    return _balanced(member.name, selector, PORTS[engine])


def _headless(engine: str, member: Member) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": member.name},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": _labels(member),
            "ports": [{"name": "http", "port": PORTS[engine]}],
        },
    }


# ── in front of them ─────────────────────────────────────────────────────────────────


def _fronts(engine: str, deployment: Deployment) -> list[Object]:
    """A router, or two of them and what shares requests between them; and the Service of all."""
    wanted = routing.routers(deployment)
    if len(wanted) == 1:
        return _router(engine, deployment, wanted[0], deployment.name)
    names = [f"{deployment.name}-{router}" for router in wanted]
    found = [
        part
        for router, name in zip(wanted, names, strict=True)
        for part in _router(engine, deployment, router, name)
    ]
    return [*found, *_shared(deployment, names)]


def _router(engine: str, deployment: Deployment, router: str, name: str) -> list[Object]:
    """Its pod and its Service of the same name."""
    urls = [
        (member, f"http://{member.name}-{replica}.{member.name}:{PORTS[engine]}", BOOTSTRAP_PORT)
        for member in routing.members_of(router, deployment)
        for replica in range(member.plan.replicas)
    ]
    words = [word for group in routing.command(engine, router, deployment, urls) for word in group]
    words += ["--host", "0.0.0.0", "--port", str(routing.PORT)]
    package, version = ROUTERS[engine]
    container: Object = {
        "name": "router",
        "image": ROUTER_IMAGE,
        "command": ["sh", "-c", f'pip install --quiet {package}=={version} && exec "$@"', "router"],
        "args": words,
        "ports": [{"containerPort": routing.PORT, "name": "http"}],
        "readinessProbe": {"httpGet": {"path": "/health", "port": routing.PORT}, "periodSeconds": 10},
    }
    return [
        _single(deployment, name, container, []),
        _balanced(name, _router_labels(deployment, name), routing.PORT),
    ]


def _router_labels(deployment: Deployment, name: str) -> dict[str, str]:
    rest = name.removeprefix(deployment.name)
    return {"app": deployment.name, "component": f"router{rest}"}


def _single(deployment: Deployment, name: str, container: Object, volumes: list[Object]) -> Object:
    """One pod under its own labels, started again when it ends."""
    labels = _router_labels(deployment, name)
    spec: Object = {"containers": [container]} | ({"volumes": volumes} if volumes else {})
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": f"{name}-router", "labels": labels},
        "spec": {
            "replicas": 1,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": spec},
        },
    }


def _shared(deployment: Deployment, names: Sequence[str]) -> list[Object]:
    """nginx in front of both routers' Services."""
    name, shares = deployment.name, routing.weights(deployment)
    upstreams = [(f"{each}:80", share) for each, share in zip(names, shares, strict=True)]
    container: Object = {
        "name": "nginx",
        "image": NGINX_IMAGE,
        "ports": [{"containerPort": routing.PORT, "name": "http"}],
        "volumeMounts": [{"name": "conf", "mountPath": "/etc/nginx/nginx.conf", "subPath": "nginx.conf"}],
    }
    text = routing.nginx(str(routing.PORT), upstreams)
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{name}-nginx"},
            "data": {"nginx.conf": text},
        },
        _single(deployment, name, container, [{"name": "conf", "configMap": {"name": f"{name}-nginx"}}]),
        _balanced(name, _router_labels(deployment, name), routing.PORT),
    ]


def _balanced(name: str, selector: dict[str, str], port: int) -> Object:
    """A Service on port 80."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": selector, "ports": [{"name": "http", "port": 80, "targetPort": port}]},
    }
