"""Shell scripts that start a plan: one for each kind of replica, one for a machine, one for the router.

A replica of one machine shares it with others, each on its own chips and port; a replica
of several machines is started on each of them with its rank.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from tongyun.codesign.launch import routing
from tongyun.codesign.launch.deployment import MIXED, PREFILL, Deployment, Member
from tongyun.codesign.launch.engines import WITH_BOOTSTRAP, Flags, flags, notes
from tongyun.codesign.launch.machines import PORT_STEP, SLOT_STEP, Seat, seats, started
from tongyun.codesign.launch.platforms import ROUTERS, SGLANG, VERSIONS, VLLM

COMMANDS = {VLLM: "vllm serve", SGLANG: "python3 -m sglang.launch_server --model-path"}
PORTS = {VLLM: 8000, SGLANG: 30000}
BOOTSTRAP_PORT = 8998
NIXL_PORT = 5600
NIXL_STEP = 1000
"""Between two members' side channels; a replica takes one for each attention group."""
MEETING_PORT = 20000


def scripts(engine: str, deployment: Deployment) -> dict[str, str]:
    """All scripts of one engine by name."""
    stem = engine.lower()
    found = {_named(stem, member): _script(engine, member) for member in deployment.members}
    places = seats(deployment)
    if len(deployment.members) > 1 or places[-1].machine > 0:
        found[f"{stem}-machine.sh"] = _machine(engine, deployment, places)
    if routing.routers(deployment):
        found[f"{stem}-router.sh"] = _router(engine, deployment, places)
    return found


def _named(stem: str, member: Member) -> str:
    return f"{stem}-{member.label}.sh" if member.label else f"{stem}.sh"


# ── replicas ─────────────────────────────────────────────────────────────────────────


def _script(engine: str, member: Member) -> str:
    """Starts replicas of one member on the machine it runs on."""
    deployment = member.deployment
    found = flags(engine, member)
    body = _one_machine(engine, member) if member.nodes == 1 else _machines(engine, member)
    head = deployment.header(
        f"flags as {engine} {VERSIONS[engine]} reads them",
        *notes(engine, member),
        *_how(engine, member),
        member=member,
    )
    return f"""#!/usr/bin/env bash
{head}set -euo pipefail

MODEL=${{MODEL:-{shlex.quote(deployment.source)}}}
HOST=${{HOST:-127.0.0.1}}
PORT=${{PORT:-{_port(engine, member)}}}
{_settings(engine, member)}serve=(
  {COMMANDS[engine]} "$MODEL"
{_lines(found)}
)

{body}"""


def _port(engine: str, member: Member) -> int:
    return PORTS[engine] + PORT_STEP * member.index


def _settings(engine: str, member: Member) -> str:
    """Variables that only some members have."""
    lines = []
    if member.role != MIXED and engine == VLLM:
        lines += ["ADDRESS=${ADDRESS:-$HOST}", f"NIXL_PORT=${{NIXL_PORT:-{_nixl(member, 0)}}}"]
    if opens(engine, member):
        lines.append(f"BOOTSTRAP_PORT=${{BOOTSTRAP_PORT:-{_bootstrap(member, 0)}}}")
    return "".join(f"{line}\n" for line in lines)


def opens(engine: str, member: Member) -> bool:
    """Whether its replicas wait for the decode pool on a port of their own."""
    return member.role == PREFILL and engine in WITH_BOOTSTRAP


def _bootstrap(member: Member, slot: int) -> int:
    return BOOTSTRAP_PORT + PORT_STEP * member.index + slot


def _nixl(member: Member, slot: int) -> int:
    return NIXL_PORT + NIXL_STEP * member.index + slot * member.shard.dp


def _lines(found: Flags) -> str:
    words = ((name,) if value is None else (name, shlex.quote(str(value))) for name, value in found.items())
    return "\n".join("  " + " ".join(pair) for pair in words)


def _how(engine: str, member: Member) -> list[str]:
    """How often and where to start the script."""
    replicas, here = member.plan.replicas, member.replicas_per_node
    found = []
    if member.nodes > 1:
        found.append(
            f"start it on each of the {member.nodes} machines of a replica, with NODE_RANK=0, 1, … and "
            f"MASTER_ADDR=the first one's address; replicas in all: {replicas}"
        )
    elif not member.label:
        machines = -(-replicas // here)
        found.append(f"{replicas} replicas, {here} to a machine, on {machines} machine(s)")
        if replicas % here:
            found.append(f"on the last machine set REPLICAS={replicas % here}")
    stem = engine.lower()
    if member.label:
        found.append(f"{stem}-machine.sh starts it with the chips and ports of each machine")
    if member.role != MIXED and engine == VLLM:
        found.append("ADDRESS is where the other pool reaches this machine")
    if routing.routers(member.deployment):
        found.append(f"{stem}-router.sh shares the load")
    return found


def _prefix(engine: str, member: Member, number: str) -> str:
    """Environment of one replica's process."""
    if member.role == MIXED or engine != VLLM:
        return ""
    port = f"$((NIXL_PORT + {number} * {member.shard.dp}))" if number else '"$NIXL_PORT"'
    return f'VLLM_NIXL_SIDE_CHANNEL_HOST="$ADDRESS" VLLM_NIXL_SIDE_CHANNEL_PORT={port} '


def _suffix(engine: str, member: Member, number: str) -> str:
    """Words of one replica beside its address."""
    if not opens(engine, member):
        return ""
    port = f"$((BOOTSTRAP_PORT + {number}))" if number else '"$BOOTSTRAP_PORT"'
    return f" --disaggregation-bootstrap-port {port}"


def _one_machine(engine: str, member: Member) -> str:
    if member.replicas_per_node == 1 and not member.label:
        return 'exec "${serve[@]}" --host "$HOST" --port "$PORT"\n'
    visible = member.deployment.platform.visible
    some = f'{visible}=$(seq -s , "$first" $((first + CHIPS - 1))) ' if visible else ""
    return f"""CHIPS={member.chips_per_node}
FIRST_CHIP=${{FIRST_CHIP:-0}}
REPLICAS=${{REPLICAS:-{member.replicas_per_node}}}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
for ((i = 0; i < REPLICAS; i++)); do
  first=$((FIRST_CHIP + i * CHIPS))
  {some}{_prefix(engine, member, "i")}"${{serve[@]}}" \\
    --host "$HOST" --port $((PORT + {SLOT_STEP} * i)){_suffix(engine, member, "i")} &
done
# When one replica ends, all do: half a service must not look whole.
wait -n
"""


def _machines(engine: str, member: Member) -> str:
    needs = """: "${NODE_RANK:?which machine of the replica this is, from 0}"
: "${MASTER_ADDR:?address of the machine with NODE_RANK=0}"
"""
    if engine == SGLANG:
        meeting = MEETING_PORT + PORT_STEP * member.index
        return f"""{needs}exec "${{serve[@]}}" --host "$HOST" --port "$PORT"{_suffix(engine, member, "")} \\
  --nnodes {member.nodes} --node-rank "$NODE_RANK" --dist-init-addr "$MASTER_ADDR:{meeting}"
"""
    side = _prefix(engine, member, "")
    exports = f"export {side.strip()}\n" if side else ""
    return f"""{needs}{exports}place=(
  --nnodes {member.nodes} --node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR"
)
if [ "$NODE_RANK" -eq 0 ]; then
  exec "${{serve[@]}}" "${{place[@]}}" --host "$HOST" --port "$PORT"
else
  exec "${{serve[@]}}" "${{place[@]}}" --headless
fi
"""


# ── a machine ────────────────────────────────────────────────────────────────────────


def _machine(engine: str, deployment: Deployment, places: list[Seat]) -> str:
    """Starts all that stands on one machine."""
    bodies: dict[str, list[int]] = {}
    for number in range(places[-1].machine + 1):
        starts = [_start(engine, seat) for seat in started(places) if seat.machine == number]
        bodies.setdefault("".join(starts), []).append(number)
    cases = "".join(f"  {' | '.join(map(str, numbers))})\n{body}    ;;\n" for body, numbers in bodies.items())
    count = places[-1].machine + 1
    head = deployment.header(
        f"starts what stands on one of {count} machine(s): MACHINE says which, from 0; MACHINES are the "
        "addresses of all, in order"
    )
    return f"""#!/usr/bin/env bash
{head}set -euo pipefail

{_addresses(count, "MACHINE")}cd "$(dirname "$0")"
export HOST=${{at[MACHINE]:-}}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
case "$MACHINE" in
{cases}  *)
    echo "MACHINE has to be from 0 to {count - 1}" >&2
    exit 2
    ;;
esac
wait -n
"""


def _addresses(count: int, *others: str) -> str:
    """Lines that read MACHINES; of a single machine nothing has to be said."""
    if count == 1:
        lines = ["MACHINES=${MACHINES:-127.0.0.1}", *(f"{other}=${{{other}:-0}}" for other in others)]
    else:
        lines = [f': "${{MACHINES:?addresses of the {count} machines, in order}}"']
        lines += [f': "${{{other}:?which machine this is, from 0 to {count - 1}}}"' for other in others]
    check = f'[ "${{#at[@]}}" -eq {count} ] || {{ echo "MACHINES has to name {count}" >&2; exit 2; }}'
    return "".join(f"{line}\n" for line in (*lines, 'read -ra at <<< "$MACHINES"', check))


def _start(engine: str, seat: Seat) -> str:
    member, said = seat.member, {"PORT": str(PORTS[engine] + seat.port_offset)}
    if member.nodes > 1:
        said |= {"NODE_RANK": str(seat.rank), "MASTER_ADDR": f'"${{at[{seat.leader}]}}"'}
    elif member.label or member.replicas_per_node > 1:
        said |= {"FIRST_CHIP": str(seat.first_chip), "REPLICAS": str(seat.replicas)}
    if member.role != MIXED and engine == VLLM:
        said["NIXL_PORT"] = str(_nixl(member, seat.slot))
    if opens(engine, member):
        said["BOOTSTRAP_PORT"] = str(_bootstrap(member, seat.slot))
    return f"    {_set(said)} ./{_named(engine.lower(), member)} &\n"


def _set(values: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


# ── the router ───────────────────────────────────────────────────────────────────────


def _router(engine: str, deployment: Deployment, places: Sequence[Seat]) -> str:
    """Starts the router, or two of them and what shares requests between them."""
    wanted = routing.routers(deployment)
    package, version = ROUTERS[engine]
    notices = [f"needs {package} {version}: pip install {package}=={version}"]
    if len(wanted) == 1:
        body = f'exec {_routed(engine, wanted[0], deployment, places)} \\\n  --host "$HOST" --port "$PORT"\n'
    else:
        notices.append("a router drives pools or replicas that do both: one of each stands behind nginx")
        body = _both(engine, deployment, places)
    head = deployment.header(*notices, "MACHINES are the addresses of all machines, in order")
    return f"""#!/usr/bin/env bash
{head}set -euo pipefail

HOST=${{HOST:-127.0.0.1}}
PORT=${{PORT:-{routing.PORT}}}
{_addresses(1 + max(seat.machine for seat in places))}{body}"""


def _routed(engine: str, router: str, deployment: Deployment, places: Sequence[Seat]) -> str:
    wanted = {member.index for member in routing.members_of(router, deployment)}
    urls = [
        (
            seat.member,
            f"http://${{at[{seat.machine}]}}:{PORTS[engine] + seat.port_offset}",
            _bootstrap(seat.member, seat.slot),
        )
        for seat in places
        if seat.rank == 0 and seat.member.index in wanted
    ]
    words = routing.command(engine, router, deployment, urls)
    quoted = [[f'"{word}"' if word.startswith("http") else word for word in group] for group in words]
    return " \\\n  ".join(" ".join(group) for group in quoted)


def _both(engine: str, deployment: Deployment, places: Sequence[Seat]) -> str:
    parts = []
    for number, router in enumerate((routing.POOLS, routing.MIXED), start=1):
        parts.append(
            f"{_routed(engine, router, deployment, places)} \\\n"
            f"  --host 127.0.0.1 --port $((PORT + {number})) "
            f"--prometheus-port {routing.METRICS_PORT + number} &\n"
        )
    shares = zip((1, 2), routing.weights(deployment), strict=True)
    text = routing.nginx(
        "$HOST:$PORT", [(f"127.0.0.1:$((PORT + {number}))", share) for number, share in shares]
    )
    return f"""conf=$(mktemp)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$conf"' EXIT
cat > "$conf" << END
{text}END
{"".join(parts)}nginx -g 'daemon off;' -c "$conf" &
wait -n
"""
