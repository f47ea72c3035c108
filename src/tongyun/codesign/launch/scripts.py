"""Shell scripts that start a plan's replicas on the machine they run on.

A replica of one machine shares it with others, each on its own chips and port; a replica
of several machines is started on each of them with its rank.
"""

from __future__ import annotations

import math
import shlex

from tongyun.codesign.launch.deployment import Deployment
from tongyun.codesign.launch.engines import Flags, flags, notes
from tongyun.codesign.launch.platforms import SGLANG, VERSIONS, VLLM

COMMANDS = {VLLM: "vllm serve", SGLANG: "python3 -m sglang.launch_server --model-path"}
PORTS = {VLLM: 8000, SGLANG: 30000}


def script(engine: str, deployment: Deployment) -> str:
    """A bash script for one engine."""
    found = flags(engine, deployment)
    body = _one_machine(deployment) if deployment.nodes == 1 else _machines(engine, deployment)
    head = deployment.header(
        f"flags as {engine} {VERSIONS[engine]} reads them",
        *notes(engine, deployment),
        *_how(deployment),
    )
    return f"""#!/usr/bin/env bash
{head}set -euo pipefail

MODEL=${{MODEL:-{shlex.quote(deployment.source)}}}
HOST=${{HOST:-127.0.0.1}}
PORT=${{PORT:-{PORTS[engine]}}}
serve=(
  {COMMANDS[engine]} "$MODEL"
{_lines(found)}
)

{body}"""


def _lines(found: Flags) -> str:
    words = ((name,) if value is None else (name, shlex.quote(str(value))) for name, value in found.items())
    return "\n".join("  " + " ".join(pair) for pair in words)


def _how(deployment: Deployment) -> list[str]:
    """How often and where to start the script."""
    replicas, here = deployment.offer.plan.replicas, deployment.replicas_per_node
    if deployment.nodes > 1:
        return [
            f"start it on each of the {deployment.nodes} machines of a replica, with NODE_RANK=0, 1, … and "
            f"MASTER_ADDR=the first one's address; {replicas} replicas in all"
        ]
    machines = math.ceil(replicas / here)
    found = [f"{replicas} replicas, {here} to a machine, on {machines} machine(s); a router shares the load"]
    if replicas % here:
        found.append(f"on the last machine set REPLICAS={replicas % here}")
    return found


def _one_machine(deployment: Deployment) -> str:
    if deployment.replicas_per_node == 1:
        return 'exec "${serve[@]}" --host "$HOST" --port "$PORT"\n'
    visible = deployment.platform.visible
    some = f'{visible}=$(seq -s , "$first" $((first + CHIPS - 1))) ' if visible else ""
    return f"""CHIPS={deployment.chips_per_node}
REPLICAS=${{REPLICAS:-{deployment.replicas_per_node}}}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((i = 0; i < REPLICAS; i++)); do
  first=$((i * CHIPS))
  {some}"${{serve[@]}}" --host "$HOST" --port $((PORT + i)) &
done
# When one replica ends, all do: half a service must not look whole.
wait -n
"""


def _machines(engine: str, deployment: Deployment) -> str:
    needs = """: "${NODE_RANK:?which machine of the replica this is, from 0}"
: "${MASTER_ADDR:?address of the machine with NODE_RANK=0}"
"""
    if engine == SGLANG:
        return f"""{needs}exec "${{serve[@]}}" --host "$HOST" --port "$PORT" \\
  --nnodes {deployment.nodes} --node-rank "$NODE_RANK" --dist-init-addr "$MASTER_ADDR:20000"
"""
    return f"""{needs}place=(
  --nnodes {deployment.nodes} --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
)
if [ "$NODE_RANK" -eq 0 ]; then
  exec "${{serve[@]}}" "${{place[@]}}" --host "$HOST" --port "$PORT"
else
  exec "${{serve[@]}}" "${{place[@]}}" --headless
fi
"""
