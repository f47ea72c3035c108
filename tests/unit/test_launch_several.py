"""Launch files of plans with two pools, drafts, or several kinds of replica."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tongyun.codesign.answer import Figures, Offer, Plan
from tongyun.codesign.launch import TARGETS, Deployment, launch_files, write_files
from tongyun.codesign.launch.engines import flags
from tongyun.codesign.launch.machines import SLOT_STEP, seats, started
from tongyun.codesign.launch.platforms import SGLANG, VLLM
from tongyun.codesign.launch.routing import weights
from tongyun.codesign.plan import plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import Infeasible, InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model
from tongyun.units import Source

DENSE, SPARSE, LATENT = "Qwen/Qwen3-32B", "Qwen/Qwen3-235B-A22B", "deepseek-ai/DeepSeek-V3"


def kind(shard: Shard, replicas: int, batch: int = 24, step_tokens: int = 1024) -> Plan:
    each = batch * shard.dp * shard.pp
    return Plan(shard=shard, batch=each, step_tokens=step_tokens, replicas=replicas, idle_chips=0)


def deployed(found: Plan, model: str = DENSE, **changes: Any) -> Deployment:
    asked = {key: changes.pop(key) for key in ("draft_tokens", "acceptance") if key in changes}
    question = Question(
        model=ModelConfig.from_hf(find_model(model)[0], name=model),
        chip=find_chip(changes.pop("chip", "h200")),
        chips=found.chips,
        isl=4000,
        osl=500,
        precision=Precision.of("fp8"),
        **asked,
    )
    figures = Figures(
        ttft_s=0.5,
        tpot_s=0.02,
        tok_s_per_chip=5000.0,
        joules_per_token=0.4,
        usd_per_mtoken=1.5,
        usd_per_mtoken_total=0.2,
    )
    offer = Offer(
        plan=found,
        figures=figures,
        slow=None,
        fast=None,
        replica_tokens_per_s=1000.0,
        meets=True,
        sources=frozenset({Source.ANALYTIC}),
    )
    return Deployment(question=question, offer=offer, command="tongyun plan", weights=model, **changes)


def pools(first: Plan, second: Plan, *others: Plan) -> Plan:
    return replace(second, prefill=first, others=others)


PAIR = pools(kind(Shard(tp=2), 2, batch=1, step_tokens=4096), kind(Shard(tp=4), 1, batch=48, step_tokens=48))
WIDE = pools(
    kind(Shard(ep=8, dp=8), 3, batch=1, step_tokens=4096),
    kind(Shard(tp=2, ep=16, dp=8), 2, batch=40, step_tokens=40),
)
THREE = pools(kind(Shard(tp=2), 1, batch=1, step_tokens=4096), kind(Shard(tp=4), 1), kind(Shard(tp=2), 1))
TWO = replace(kind(Shard(tp=4), 3), others=(kind(Shard(tp=2), 2), kind(Shard(), 1)))


def texts(deployment: Deployment, *targets: str) -> dict[str, str]:
    return dict(launch_files(deployment, targets or list(TARGETS)).files)


# ── flags ────────────────────────────────────────────────────────────────────────────


def test_pools_are_told_their_task_and_load() -> None:
    first, second = deployed(PAIR).members
    assert (first.label, second.label) == ("prefill", "decode")
    one, other = flags(VLLM, first), flags(VLLM, second)
    said = [json.loads(str(each["--kv-transfer-config"])) for each in (one, other)]
    assert [each["kv_role"] for each in said] == ["kv_producer", "kv_consumer"]
    assert {each["kv_connector"] for each in said} == {"NixlConnector"}
    assert (one["--max-num-seqs"], one["--max-num-batched-tokens"]) == (2, 4096)
    assert (other["--max-num-seqs"], other["--max-num-batched-tokens"]) == (48, 48)
    one, other = flags(SGLANG, first), flags(SGLANG, second)
    assert [each["--disaggregation-mode"] for each in (one, other)] == ["prefill", "decode"]
    assert one["--chunked-prefill-size"] == 4096 and "--chunked-prefill-size" not in other
    assert not {"--enable-mixed-chunk"} & {*one, *other}


@pytest.mark.parametrize("found", [PAIR, WIDE, THREE, TWO])
def test_memory_of_every_kind_fits(found: Plan) -> None:
    deployment = deployed(found, SPARSE if found is WIDE else DENSE)
    capacity = deployment.question.chip.memory.capacity.value
    for member in deployment.members:
        memory = member.memory
        assert float(memory.total[0]) <= USABLE_MEMORY * capacity
        static = float(str(flags(SGLANG, member)["--mem-fraction-static"]))
        assert memory.weights + float(memory.kv[0]) <= static * capacity
        assert static * capacity + float(memory.activations[0]) <= USABLE_MEMORY * capacity * (1 + 1e-9)
        held = member.sequences if member.role == "prefill" else member.plan.batch // member.shard.dp
        assert member.sequences >= held > 0


def test_a_model_drafts_with_its_own_module() -> None:
    deployment = deployed(kind(Shard(ep=8, dp=8), 1), LATENT, draft_tokens=2, acceptance=0.8)
    [member] = deployment.members
    said = json.loads(str(flags(VLLM, member)["--speculative-config"]))
    assert said == {"method": "mtp", "num_speculative_tokens": 2}
    found = flags(SGLANG, member)
    assert found["--speculative-algorithm"] == "NEXTN"
    assert [found[f"--speculative-{key}"] for key in ("num-steps", "eagle-topk", "num-draft-tokens")] == [
        2,
        1,
        3,
    ]
    assert "--enable-mixed-chunk" not in found and "--speculative-draft-model-path" not in found
    assert "gives drafted decoding and prefill steps of their own" in texts(deployment)["sglang.sh"]


def test_other_models_draft_with_named_weights() -> None:
    asked = {"draft_tokens": 3, "acceptance": 0.7}
    with pytest.raises(InputError, match="--draft-weights"):
        texts(deployed(kind(Shard(tp=4), 1), **asked))
    [member] = deployed(kind(Shard(tp=4), 1), draft="me/eagle3", **asked).members
    said = json.loads(str(flags(VLLM, member)["--speculative-config"]))
    assert said == {"method": "eagle3", "model": "me/eagle3", "num_speculative_tokens": 3}
    found = flags(SGLANG, member)
    assert found["--speculative-algorithm"] == "EAGLE3"
    assert found["--speculative-draft-model-path"] == "me/eagle3"


def test_pools_that_draft_say_so_on_both_sides() -> None:
    deployment = deployed(WIDE, LATENT, draft_tokens=1, acceptance=0.8)
    for member in deployment.members:
        assert "--speculative-config" in flags(VLLM, member)
        assert "--speculative-algorithm" in flags(SGLANG, member)


@pytest.mark.parametrize(
    ("first", "second", "refused", "says"),
    [
        (Shard(tp=2, pp=2), Shard(tp=2), {VLLM}, "one pipeline stage"),
        (Shard(tp=2), Shard(tp=2, pp=2), {VLLM, SGLANG}, "pipeline stage"),
        (Shard(tp=16), Shard(tp=8), {VLLM}, "8 key heads"),
        (Shard(tp=4), Shard(tp=8), set(), ""),
    ],
)
def test_hand_overs_engines_do_not_have_are_refused(
    first: Shard, second: Shard, refused: set[str], says: str
) -> None:
    deployment = deployed(pools(kind(first, 1, 1, 4096), kind(second, 1)))
    launch = launch_files(deployment, list(TARGETS)) if refused < {VLLM, SGLANG} else None
    for engine in (VLLM, SGLANG):
        if engine in refused:
            with pytest.raises(Infeasible, match=says):
                flags(engine, deployment.members[0])
        else:
            assert launch is not None and f"kubernetes-{engine.lower()}.yaml" in launch.files


def test_platforms_without_a_known_way_are_refused() -> None:
    found = pools(kind(Shard(tp=4), 1, 1, 4096), kind(Shard(tp=4), 1))
    with pytest.raises(Infeasible, match=r"tpu-v6e.*pool to pool"):
        texts(deployed(found, chip="tpu-v6e"), "vllm")
    assert (
        "--disaggregation-transfer-backend mori" in texts(deployed(found, chip="mi300x"))["sglang-decode.sh"]
    )


# ── machines ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("found", [PAIR, WIDE, THREE, TWO])
def test_no_chip_and_no_port_is_taken_twice(found: Plan) -> None:
    deployment = deployed(found, SPARSE if found is WIDE else DENSE)
    per_node = int(deployment.question.chip.chips_per_node.value)
    chips: set[tuple[int, int]] = set()
    ports: set[tuple[int, int]] = set()
    for seat in started(seats(deployment)):
        assert seat.first_chip + seat.replicas * seat.member.chips_per_node <= per_node
        for chip in range(seat.replicas * seat.member.chips_per_node):
            place = (seat.machine, seat.first_chip + chip)
            assert place not in chips
            chips.add(place)
        for replica in range(seat.replicas):
            port = seat.port_offset + SLOT_STEP * replica
            # SGLang's attention groups meet at ports of their own.
            taken = {(seat.machine, each) for each in (port, *range(port + 233, port + 240))}
            assert not taken & ports
            ports |= taken
    assert len(chips) == found.chips
    assert len({machine for machine, _ in chips}) == -(-found.chips // per_node)


def run(folder: Path, script: str, **env: str) -> list[tuple[dict[str, str], list[str]]]:
    """Start a script with stand-ins for the engines: their environment and words."""
    stand_in = folder / "bin" / "engine"
    stand_in.parent.mkdir(exist_ok=True)
    log = folder / "log"
    log.write_text("")
    stand_in.write_text(
        "#!/usr/bin/env python3\nimport json, os, sys, time\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    file.write(json.dumps([dict(os.environ), sys.argv]) + '\\n')\n"
        "time.sleep(0.3)\n"
    )
    stand_in.chmod(0o755)
    for name in ("vllm", "vllm-router", "nginx"):
        place = stand_in.with_name(name)
        if not place.exists():
            place.symlink_to(stand_in)
    path = f"{stand_in.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [folder / script],
        env={**os.environ, "PATH": path, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "unbound" not in done.stderr and "rror" not in done.stderr, done.stderr
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()]  # type: ignore[misc]


def after(words: list[str], name: str) -> list[str]:
    return [words[i + 1] for i, word in enumerate(words) if word == name]


def test_two_pools_start_on_one_machine_and_find_each_other(tmp_path: Path) -> None:
    write_files(texts(deployed(PAIR), "vllm"), tmp_path, force=False)
    begun = run(tmp_path, "vllm-machine.sh")
    assert len(begun) == 3
    seen = sorted(env["CUDA_VISIBLE_DEVICES"] for env, _ in begun)
    assert seen == ["0,1", "2,3", "4,5,6,7"]
    assert len({env["VLLM_NIXL_SIDE_CHANNEL_PORT"] for env, _ in begun}) == 3
    [(_, router)] = run(tmp_path, "vllm-router.sh")
    assert "--vllm-pd-disaggregation" in router
    for role in ("prefill", "decode"):
        listening = {
            f"http://127.0.0.1:{after(words, '--port')[0]}"
            for _, words in begun
            if after(words, "--tensor-parallel-size") == [{"prefill": "2", "decode": "4"}[role]]
        }
        assert set(after(router, f"--{role}")) == listening


def test_pools_and_mixed_replicas_stand_behind_two_routers(tmp_path: Path) -> None:
    deployment = deployed(THREE)
    write_files(texts(deployment, "vllm"), tmp_path, force=False)
    begun = run(tmp_path, "vllm-router.sh", PORT="7000")
    by_name = {Path(words[0]).name: [] for _, words in begun}
    for _, words in begun:
        by_name[Path(words[0]).name].append(words)
    assert len(by_name["vllm-router"]) == 2 and len(by_name["nginx"]) == 1
    assert sorted(after(words, "--port")[0] for words in by_name["vllm-router"]) == ["7001", "7002"]
    shares = weights(deployment)
    text = (tmp_path / "vllm-router.sh").read_text()
    assert all(f"weight={share};" in text for share in shares)
    assert sum(shares) == pytest.approx(1000, abs=1)
    pools_rate, both_rate = deployment.shares
    assert shares[1] / 1000 == pytest.approx(both_rate / (pools_rate + both_rate), abs=1e-3)


def test_machines_of_wide_replicas_meet_at_their_first(tmp_path: Path) -> None:
    deployment = deployed(WIDE, SPARSE)
    write_files(texts(deployment), tmp_path, force=False)
    count = 1 + max(seat.machine for seat in seats(deployment))
    names = " ".join(f"10.0.0.{i}" for i in range(count))
    assert count == 7
    leaders: dict[str, list[str]] = {}
    for machine in range(count):
        for env, words in run(tmp_path, "vllm-machine.sh", MACHINE=str(machine), MACHINES=names):
            if "--node-rank" in words:
                leaders.setdefault(after(words, "--master-addr")[0], []).append(
                    after(words, "--node-rank")[0]
                )
            assert env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == f"10.0.0.{machine}"
    assert {tuple(ranks) for ranks in leaders.values()} == {("0", "1")} and len(leaders) == 2
    router = (tmp_path / "sglang-router.sh").read_text()
    assert router.count("--decode ") == 2 and router.count("--prefill ") == 3
    for script in tmp_path.glob("*.sh"):
        subprocess.run(["bash", "-n", script], check=True)


def test_a_machine_that_is_not_there_is_refused(tmp_path: Path) -> None:
    write_files(texts(deployed(WIDE, SPARSE), "sglang"), tmp_path, force=False)
    for env in ({"MACHINE": "9", "MACHINES": "a b c d e f g"}, {"MACHINE": "0", "MACHINES": "a b"}):
        done = subprocess.run(
            [tmp_path / "sglang-machine.sh"],
            env={**os.environ, **env},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2 and done.stderr


# ── manifests ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("engine", [VLLM, SGLANG])
@pytest.mark.parametrize("found", [PAIR, WIDE, THREE, TWO])
def test_routers_of_manifests_name_every_replica(found: Plan, engine: str) -> None:
    deployment = deployed(found, SPARSE if found is WIDE else DENSE)
    objects = list(yaml.safe_load_all(texts(deployment, "kubernetes")[f"kubernetes-{engine.lower()}.yaml"]))
    by_kind: dict[str, dict[str, Any]] = {}
    for each in objects:
        assert each["metadata"]["name"] not in by_kind.setdefault(each["kind"], {})
        by_kind[each["kind"]][each["metadata"]["name"]] = each
    served = {**by_kind.get("StatefulSet", {}), **by_kind.get("LeaderWorkerSet", {})}
    assert {name: each["spec"]["replicas"] for name, each in served.items()} == {
        member.name: member.plan.replicas for member in deployment.members
    }
    urls = {
        word
        for each in by_kind["Deployment"].values()
        for word in each["spec"]["template"]["spec"]["containers"][0].get("args", [])
        if word.startswith("http://")
    }
    port = {VLLM: 8000, SGLANG: 30000}[engine]
    assert urls == {
        f"http://{name}-{i}.{name}:{port}"
        for name, each in served.items()
        for i in range(each["spec"]["replicas"])
    }
    services = by_kind["Service"]
    # A LeaderWorkerSet's own controller makes the service of its name.
    assert not set(services) & set(by_kind.get("LeaderWorkerSet", {}))
    assert set(by_kind.get("StatefulSet", {})) < set(services)
    assert deployment.name in services
    for each in by_kind["Deployment"].values():
        labels = each["spec"]["template"]["metadata"]["labels"]
        assert (
            sum(service["spec"]["selector"].items() <= labels.items() for service in services.values()) == 1
        )


def test_ray_builds_pools_together_and_kinds_apart() -> None:
    [application] = yaml.safe_load(texts(deployed(PAIR), "ray")["ray-serve.yaml"])["applications"]
    assert application["import_path"] == "ray.serve.llm:build_pd_openai_app"
    configs = application["args"]
    assert set(configs) == {"prefill_config", "decode_config"}
    for role, config in configs.items():
        transfer = config["engine_kwargs"]["kv_transfer_config"]
        assert transfer["kv_role"] == {"prefill_config": "kv_producer", "decode_config": "kv_consumer"}[role]
    bases = [config["experimental_configs"]["NIXL_SIDE_CHANNEL_PORT_BASE"] for config in configs.values()]
    assert len(set(bases)) == 2
    text = texts(deployed(TWO), "ray")["ray-serve.yaml"]
    applications = yaml.safe_load(text)["applications"]
    assert [each["route_prefix"] for each in applications] == ["/", "/1", "/2"]
    assert len({each["name"] for each in applications}) == 3
    assert "share requests so: / " in text


def test_what_the_planner_answers_can_be_written() -> None:
    """A plan of two pools and one with a leftover, as the search gives them."""

    def asked(**changes: Any) -> Deployment:
        question = Question(
            model=ModelConfig.from_hf(find_model(DENSE)[0], name=DENSE),
            chip=find_chip("h200"),
            isl=4000,
            osl=500,
            precision=Precision.of("bf16"),
            ttft_s=2.0,
            **changes,
        )
        found = plan(question).best
        assert found is not None
        return Deployment(question=question, offer=found, command="tongyun plan", weights=DENSE)

    split = asked(chips=8, pools="split", tpot_s=0.03)
    assert {member.role for member in split.members} == {"prefill", "decode"}
    assert {"vllm-prefill.sh", "sglang-decode.sh", "ray-serve.yaml"} <= set(texts(split))
    rest = asked(chips=7, pools="mixed", tpot_s=0.03)
    assert len(rest.members) > 1
    assert {f"vllm-{member.label}.sh" for member in rest.members} <= set(texts(rest))
    whole = rest.offer.figures.tok_s_per_chip * rest.question.chips
    assert sum(member.tokens_per_s for member in rest.members) == pytest.approx(whole, rel=1e-6)
