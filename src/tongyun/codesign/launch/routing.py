"""What stands in front of a plan's replicas: the engine's router, and a share for each where two are needed.

Routers of both engines take the same words but for the one that names two pools. A router drives
either two pools or replicas that do both; a plan with both has one of each behind weighted nginx.
"""

from __future__ import annotations

from collections.abc import Sequence

from tongyun.codesign.launch.deployment import PREFILL, Deployment, Member
from tongyun.codesign.launch.engines import WITH_BOOTSTRAP
from tongyun.codesign.launch.platforms import SGLANG, VLLM

POOLS, MIXED = "pools", "mixed"
COMMANDS = {VLLM: ("vllm-router",), SGLANG: ("python3", "-m", "sglang_router.launch_router")}
_POOLED = {VLLM: "--vllm-pd-disaggregation", SGLANG: "--pd-disaggregation"}
PORT = 8890
METRICS_PORT = 29000
STARTUP_S = 3600
"""How long a router waits for its replicas to load their weights."""


def routers(deployment: Deployment) -> list[str]:
    """Which routers the plan needs; none where one replica is all there is."""
    if deployment.pools:
        return [POOLS, MIXED] if deployment.mixed else [POOLS]
    return [MIXED] if sum(member.plan.replicas for member in deployment.mixed) > 1 else []


def members_of(router: str, deployment: Deployment) -> tuple[Member, ...]:
    return deployment.pools if router == POOLS else deployment.mixed


def command(
    engine: str, router: str, deployment: Deployment, urls: Sequence[tuple[Member, str, int]]
) -> list[tuple[str, ...]]:
    """A router's command line but for its own address, a flag with its values each. `urls` are the
    replicas', each with its member and bootstrap port."""
    first = "cache_aware" if deployment.question.prefix_hit else "power_of_two"
    words: list[tuple[str, ...]] = [COMMANDS[engine], ("--worker-startup-timeout-secs", str(STARTUP_S))]
    if router == MIXED:
        return [*words, ("--policy", first), ("--worker-urls", *(url for _, url, _ in urls))]
    words += [(_POOLED[engine],), ("--prefill-policy", first), ("--decode-policy", "power_of_two")]
    for member, url, bootstrap in urls:
        opens = member.role == PREFILL and engine in WITH_BOOTSTRAP
        words.append((f"--{member.role}", url, *((str(bootstrap),) if opens else ())))
    return words


def weights(deployment: Deployment) -> tuple[int, int]:
    """Parts of a thousand requests for the two pools and for the rest, by predicted rate."""
    pools, both = deployment.shares
    part = round(1000 * pools / (pools + both))
    return min(max(part, 1), 999), min(max(1000 - part, 1), 999)


def nginx(listen: str, upstreams: Sequence[tuple[str, int]]) -> str:
    """A configuration that shares requests by weight and streams answers."""
    servers = "".join(f"    server {address} weight={weight};\n" for address, weight in upstreams)
    return f"""events {{}}
http {{
  access_log off;
  client_max_body_size 0;
  upstream plan {{
{servers}  }}
  server {{
    listen {listen};
    location / {{
      proxy_pass http://plan;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 1h;
    }}
  }}
}}
"""
