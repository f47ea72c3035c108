"""Launch files: they say what the plan says, in words the engines read, and fit the memory it counted."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from tongyun.codesign.launch import TARGETS, Deployment, launch_files, write_files
from tongyun.codesign.launch.block_yaml import to_yaml
from tongyun.codesign.launch.deployment import Member
from tongyun.codesign.launch.engines import Flags
from tongyun.codesign.launch.engines import flags as flags_of
from tongyun.codesign.launch.platforms import PLATFORMS, SGLANG, VLLM
from tongyun.codesign.plan import Figures, Offer, Plan
from tongyun.codesign.space import Question
from tongyun.codesign.steady import USABLE_MEMORY
from tongyun.errors import Infeasible, InputError
from tongyun.model.config import ModelConfig
from tongyun.model.graph import Precision
from tongyun.model.shard import Shard
from tongyun.specs import find_chip, find_model
from tongyun.units import Source

FIGURES = Figures(
    ttft_s=0.5,
    tpot_s=0.02,
    tok_s_per_chip=1000.0,
    joules_per_token=0.4,
    usd_per_mtoken=1.5,
    usd_per_mtoken_total=0.2,
)


def deployed(
    shard: Shard,
    model: str = "Qwen/Qwen3-235B-A22B",
    chip: str = "h200",
    dtype: str = "fp8",
    **changes: Any,
) -> Deployment:
    replicas, group = changes.pop("replicas", 2), changes.pop("group", 24)
    question = Question(
        model=ModelConfig.from_hf(find_model(model)[0], name=model),
        chip=find_chip(chip),
        chips=replicas * shard.ranks,
        isl=4000,
        osl=500,
        precision=Precision.of(dtype, changes.pop("kv", None)),
    )
    found = Plan(
        shard=shard, batch=group * shard.dp * shard.pp, step_tokens=1024, replicas=replicas, idle_chips=0
    )
    slow = replace(FIGURES, tpot_s=0.03)
    offer = Offer(
        plan=found,
        figures=FIGURES,
        slow=slow,
        fast=FIGURES,
        replica_tokens_per_s=1000.0,
        meets=True,
        sources=frozenset({Source.ANALYTIC, Source.ASSUMED}),
    )
    given = {"question": question, "offer": offer, "command": "tongyun plan --chip h200", "weights": model}
    return Deployment(**{**given, **changes})


def alone(deployment: Deployment) -> Member:
    """The replicas of a plan that has one kind."""
    [member] = deployment.members
    return member


def flags(engine: str, deployment: Deployment) -> Flags:
    return flags_of(engine, alone(deployment))


def files(deployment: Deployment) -> dict[str, str]:
    return dict(launch_files(deployment, list(TARGETS)).files)


def manifest(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    workload, service = yaml.safe_load_all(text)
    return workload, service


def words(text: str) -> dict[str, str | None]:
    """A command line's flags with their values."""
    found: dict[str, str | None] = {}
    parts = text.split() if isinstance(text, str) else text
    for i, part in enumerate(parts):
        if part.startswith("--"):
            value = parts[i + 1] if i + 1 < len(parts) and not parts[i + 1].startswith("--") else None
            found[part] = value
    return found


ALL = {name for target in TARGETS.values() for name in target}


def main(names: Any) -> set[str]:
    """Files without the scripts that stand in front of replicas or start several kinds."""
    return {name for name in names if not name.endswith(("-router.sh", "-machine.sh"))}


SHARDS = [
    Shard(),
    Shard(tp=4),
    Shard(tp=4, ep=4),
    Shard(tp=8, pp=2),
    Shard(ep=8, dp=8),
    Shard(tp=2, ep=16, dp=8),
    Shard(tp=4, pp=2, ep=8, dp=2),
]


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_flags_hold_the_cut(shard: Shard) -> None:
    deployment = deployed(shard, model="Qwen/Qwen3-30B-A3B" if shard == Shard() else "Qwen/Qwen3-235B-A22B")
    vllm, sglang = flags(VLLM, deployment), flags(SGLANG, deployment)
    back = Shard(
        tp=int(str(vllm["--tensor-parallel-size"])),
        pp=int(str(vllm["--pipeline-parallel-size"])),
        dp=int(str(vllm["--data-parallel-size"])),
        ep=shard.stage_ranks if "--enable-expert-parallel" in vllm else 1,
    )
    assert back == shard
    dp = int(str(sglang.get("--attn-dp-size", 1)))
    again = Shard(
        tp=int(str(sglang["--tp-size"])) // dp,
        pp=int(str(sglang["--pp-size"])),
        ep=int(str(sglang["--ep-size"])),
        dp=dp,
    )
    assert again == shard


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_a_script_names_the_release_that_its_flags_need(shard: Shard) -> None:
    deployment = deployed(shard, model="Qwen/Qwen3-30B-A3B" if shard == Shard() else "Qwen/Qwen3-235B-A22B")
    text = files(deployment)["sglang.sh"]
    assert ("# --attn-dp-size: SGLang 0.5.23 has it" in text) is (
        "--attn-dp-size" in flags(SGLANG, deployment)
    )


@pytest.mark.parametrize("shard", SHARDS, ids=str)
def test_flags_hold_the_load_and_the_memory(shard: Shard) -> None:
    deployment = deployed(shard, model="Qwen/Qwen3-30B-A3B" if shard == Shard() else "Qwen/Qwen3-235B-A22B")
    vllm, sglang = flags(VLLM, deployment), flags(SGLANG, deployment)
    groups = shard.dp
    assert int(str(vllm["--max-num-seqs"])) * groups >= deployment.offer.plan.batch
    assert int(str(vllm["--max-num-batched-tokens"])) >= int(str(vllm["--max-num-seqs"]))
    assert int(str(sglang["--max-running-requests"])) == int(str(vllm["--max-num-seqs"])) * groups
    assert int(str(sglang["--chunked-prefill-size"])) == 1024 * groups
    assert vllm["--max-model-len"] == 4500
    assert int(str(sglang["--context-length"])) >= 4500
    memory, capacity = alone(deployment).memory, deployment.question.chip.memory.capacity.value
    static = float(str(sglang["--mem-fraction-static"]))
    assert memory.weights + float(memory.kv[0]) <= static * capacity
    assert static * capacity + float(memory.activations[0]) <= USABLE_MEMORY * capacity * (1 + 1e-9)
    assert float(memory.total[0]) <= float(str(vllm["--gpu-memory-utilization"])) * capacity


def test_memory_fraction_keeps_weights_and_kv_when_they_fill_the_chip() -> None:
    def at(group: int) -> Deployment:
        return deployed(Shard(tp=4, ep=4), group=group)

    capacity = at(1).question.chip.memory.capacity.value
    fits = [g for g in range(300, 340) if float(alone(at(g)).memory.total[0]) <= USABLE_MEMORY * capacity]
    full = alone(at(max(fits)))
    assert 300 < max(fits) < 339
    needed = full.memory.weights + float(full.memory.kv[0])
    assert needed <= full.static_fraction * capacity
    assert full.static_fraction < USABLE_MEMORY
    assert (full.static_fraction * capacity - needed) / capacity < 0.005


def test_scripts_are_bash_and_pass_the_flags(tmp_path: Path) -> None:
    """Started with stand-ins for the engines, the scripts run them with the plan's words."""
    deployment = deployed(Shard(tp=4, ep=4))
    places = write_files(files(deployment), tmp_path, force=False)
    scripts = [place for place in places if place.name in ("vllm.sh", "sglang.sh")]
    assert len(scripts) == 2
    for name in ("vllm", "python3"):
        stand_in = tmp_path / "bin" / name
        stand_in.parent.mkdir(exist_ok=True)
        stand_in.write_text('#!/bin/bash\necho "$CUDA_VISIBLE_DEVICES|$*"; sleep 0.3\n')
        stand_in.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for place, engine in zip(scripts, (VLLM, SGLANG), strict=True):
        assert stat.S_IMODE(place.stat().st_mode) == 0o755
        done = subprocess.run(
            [place], env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False, timeout=30
        )
        lines = sorted(done.stdout.splitlines())
        assert [line.split("|")[0] for line in lines] == ["0,1,2,3", "4,5,6,7"], done.stderr
        ports = []
        for line in lines:
            said = words(line.split("|")[1])
            ports.append(said.pop("--port"))
            assert said.pop("--host") == "127.0.0.1"
            if engine == SGLANG:
                assert said.pop("--model-path") == "Qwen/Qwen3-235B-A22B"
            assert said == {k: None if v is None else str(v) for k, v in flags(engine, deployment).items()}
        assert len(set(ports)) == 2


def test_a_replica_of_several_machines_is_placed_by_rank(tmp_path: Path) -> None:
    deployment = deployed(Shard(tp=8, pp=2))
    assert (alone(deployment).nodes, alone(deployment).chips_per_node) == (2, 8)
    write_files(files(deployment), tmp_path, force=False)
    fake = tmp_path / "vllm"
    fake.write_text('#!/bin/bash\necho "$*"\n')
    fake.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_ADDR": "10.0.0.1"}

    def start(**more: str) -> subprocess.CompletedProcess[str]:
        script = tmp_path / "vllm.sh"
        return subprocess.run([script], env=env | more, capture_output=True, text=True, check=False)

    leader, worker = words(start(NODE_RANK="0").stdout), words(start(NODE_RANK="1").stdout)
    assert (leader["--node-rank"], worker["--node-rank"]) == ("0", "1")
    assert leader["--nnodes"] == worker["--nnodes"] == "2"
    assert "--headless" in worker and "--headless" not in leader and "--port" in leader
    missing = start()
    assert missing.returncode != 0 and "NODE_RANK" in missing.stderr
    sglang = (tmp_path / "sglang.sh").read_text()
    assert '--nnodes 2 --node-rank "$NODE_RANK" --dist-init-addr "$MASTER_ADDR:20000"' in sglang
    for script in ("vllm.sh", "sglang.sh"):
        subprocess.run(["bash", "-n", tmp_path / script], check=True)


def test_ranks_are_spread_evenly_over_machines() -> None:
    def of(shard: Shard, model: str = "Qwen/Qwen3-32B") -> Member:
        return alone(deployed(shard, model=model))

    assert of(Shard(tp=4, pp=3)).nodes == 2
    assert of(Shard(tp=1, pp=3)).nodes == 1
    assert of(Shard(tp=1, pp=3)).replicas_per_node == 2
    assert of(Shard(ep=64, dp=64), "Qwen/Qwen3-235B-A22B").nodes == 8


@pytest.mark.parametrize("engine", [VLLM, SGLANG])
def test_one_machine_is_a_deployment(engine: str) -> None:
    deployment = deployed(Shard(tp=4, ep=4), replicas=3)
    workload, service = manifest(files(deployment)[f"kubernetes-{engine.lower()}.yaml"])
    assert (workload["apiVersion"], workload["kind"]) == ("apps/v1", "Deployment")
    assert workload["spec"]["replicas"] == 3
    template = workload["spec"]["template"]
    assert workload["spec"]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    said = words(container["command"])
    assert {
        k: None if v is None else str(v) for k, v in flags(engine, deployment).items()
    }.items() <= said.items()
    port = container["ports"][0]["containerPort"]
    assert said["--port"] == str(port) == str(container["readinessProbe"]["httpGet"]["port"])
    assert service["spec"]["ports"][0]["targetPort"] == port
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()


@pytest.mark.parametrize("engine", [VLLM, SGLANG])
def test_several_machines_are_a_leader_worker_set(engine: str) -> None:
    """Keys as the resource definition of leaderworkerset.x-k8s.io/v1 has them."""
    deployment = deployed(Shard(ep=16, dp=16), replicas=2)
    workload, service = manifest(files(deployment)[f"kubernetes-{engine.lower()}.yaml"])
    assert (workload["apiVersion"], workload["kind"]) == ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet")
    assert set(workload["spec"]) == {"replicas", "leaderWorkerTemplate"}
    assert workload["spec"]["replicas"] == 2
    template = workload["spec"]["leaderWorkerTemplate"]
    assert set(template) == {"size", "restartPolicy", "leaderTemplate", "workerTemplate"}
    assert (template["size"], template["restartPolicy"]) == (2, "RecreateGroupOnPodRestart")
    [leader], [worker] = (template[f"{role}Template"]["spec"]["containers"] for role in ("leader", "worker"))
    for container in (leader, worker):
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
        said = words(container["command"])
        assert said["--nnodes"] == "$(LWS_GROUP_SIZE)"
        assert "$(LWS_LEADER_ADDRESS)" in " ".join(container["command"])
    assert words(leader["command"])["--node-rank"] == "0"
    assert words(worker["command"])["--node-rank"] == "$(LWS_WORKER_INDEX)"
    assert ("--headless" in worker["command"]) == (engine == VLLM)
    assert "readinessProbe" in leader and "readinessProbe" not in worker
    assert service["spec"]["selector"]["role"] == "leader"


def test_ray_serve_config() -> None:
    deployment = deployed(Shard(tp=4, ep=4), replicas=3)
    found = yaml.safe_load(files(deployment)["ray-serve.yaml"])
    [application] = found["applications"]
    assert application["import_path"] == "ray.serve.llm:build_openai_app"
    [config] = application["args"]["llm_configs"]
    assert config["model_loading_config"]["model_source"] == "Qwen/Qwen3-235B-A22B"
    assert config["accelerator_type"] == "H200"
    assert config["deployment_config"]["num_replicas"] == 3
    kwargs = config["engine_kwargs"]
    expected = {k[2:].replace("-", "_"): True if v is None else v for k, v in flags(VLLM, deployment).items()}
    assert kwargs == expected
    spread = yaml.safe_load(files(deployed(Shard(ep=8, dp=8)))["ray-serve.yaml"])["applications"][0]
    assert spread["import_path"] == "ray.serve.llm:build_dp_openai_app"
    assert spread["args"]["llm_config"]["engine_kwargs"]["data_parallel_size"] == 8


def test_headers_name_plan_figures_and_sources() -> None:
    for name, text in files(deployed(Shard(tp=4, ep=4))).items():
        head = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        for said in (
            "Qwen/Qwen3-235B-A22B (fp8) on 8 × NVIDIA H200 SXM: 2 × (tp4 pp1 ep4 dp1)",
            "TPOT 20 (20–30) ms",
            "not measured (analytic+assumed)",
            "tongyun plan --chip h200",
            "$1.5",
            "memory of the fullest chip: weights",
        ):
            assert said in head, (name, said)


@pytest.mark.parametrize(
    ("model", "dtype", "kv", "expected"),
    [
        ("Qwen/Qwen3-32B", "bf16", None, {"--dtype": "bfloat16", "--kv-cache-dtype": "auto"}),
        ("Qwen/Qwen3-32B", "fp8", "fp8", {"--quantization": "fp8", "--kv-cache-dtype": "fp8_e4m3"}),
        ("Qwen/Qwen3-32B", "f32", None, {"--dtype": "float32"}),
        ("deepseek-ai/DeepSeek-V3", "fp8", None, {"--dtype": "bfloat16"}),
        ("openai/gpt-oss-120b", "mxfp4", None, {"--dtype": "bfloat16"}),
    ],
)
def test_types(model: str, dtype: str, kv: str | None, expected: dict[str, str]) -> None:
    deployment = deployed(Shard(tp=8), model=model, dtype=dtype, kv=kv)
    for engine in (VLLM, SGLANG):
        found = flags(engine, deployment)
        assert expected.items() <= found.items()
        assert ("--quantization" in found) == ("--quantization" in expected)


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("Qwen/Qwen3-32B", "int4"), ("Qwen/Qwen3-32B", "int8"), ("deepseek-ai/DeepSeek-V3", "bf16")],
)
def test_weights_that_engines_cannot_make_have_to_be_named(model: str, dtype: str) -> None:
    with pytest.raises(InputError, match="--checkpoint"):
        files(deployed(Shard(tp=8), model=model, dtype=dtype))
    deployment = deployed(Shard(tp=8), model=model, dtype=dtype, checkpoint="me/quantised")
    texts = files(deployment)
    assert "MODEL=${MODEL:-me/quantised}" in texts["vllm.sh"]
    assert f"--served-model-name {model}" in texts["vllm.sh"]
    assert (
        "me/quantised"
        in manifest(texts["kubernetes-vllm.yaml"])[0]["spec"]["template"]["spec"]["containers"][0]["command"]
    )


def test_what_an_engine_cannot_do_is_refused_with_the_reason() -> None:
    launch = launch_files(deployed(Shard(tp=8, ep=2)), list(TARGETS))
    assert main(launch.files) == {"sglang.sh", "kubernetes-sglang.yaml"}
    assert all("SGLang can" in why for why in launch.refused.values())
    with pytest.raises(Infeasible, match="ep2"):
        launch_files(deployed(Shard(tp=8, ep=2)), ["vllm"])
    with pytest.raises(Infeasible, match="no KV cache in int8"):
        launch_files(deployed(Shard(tp=8, ep=8), kv="int8"), ["vllm"])
    with pytest.raises(InputError, match=r"did you mean vllm"):
        launch_files(deployed(Shard(tp=8, ep=8)), ["vlm"])


@pytest.mark.parametrize(
    ("chip", "written", "says"),
    [
        ("zhenwu-810e", {"vllm.sh", "sglang.sh", "ray-serve.yaml"}, "SAIL SDK's CUDA wrapper"),
        ("tpu-v6e", {"vllm.sh", "kubernetes-vllm.yaml", "ray-serve.yaml"}, "vllm-tpu"),
        ("mi300x", ALL, "ROCm builds"),
        ("ascend-910b2", ALL, "vllm-ascend"),
    ],
)
def test_chips_engines_need_something_for_are_said(chip: str, written: set[str], says: str) -> None:
    launch = launch_files(
        deployed(Shard(tp=4), model="Qwen/Qwen3-32B", dtype="bf16", chip=chip), list(TARGETS)
    )
    assert main(launch.files) == written
    assert all(says in launch.files[name] for name in written)
    assert set(launch.refused) == ALL - written
    visible = {"mi300x": "HIP_VISIBLE_DEVICES", "ascend-910b2": "ASCEND_RT_VISIBLE_DEVICES"}
    assert visible.get(chip, "") in launch.files["vllm.sh"]


def test_a_vendor_nobody_knows_is_refused() -> None:
    deployment = deployed(Shard(tp=4, ep=4))
    own = replace(deployment.question.chip, vendor="Me & Co", name="mine")
    with pytest.raises(Infeasible, match="vendor 'Me & Co'"):
        files(replace(deployment, question=replace(deployment.question, chip=own)))


def test_every_vendor_of_the_catalogue_has_a_platform() -> None:
    from tongyun.specs import every

    accelerators = [spec for spec in every("chips") if getattr(spec, "kind", "") == "accelerator"]
    assert {spec.vendor for spec in accelerators} <= set(PLATFORMS)  # type: ignore[union-attr]


def test_files_are_never_replaced_unasked(tmp_path: Path) -> None:
    texts = {"a.sh": "one\n", "b.yaml": "two\n"}
    write_files(texts, tmp_path / "new", force=False)
    (tmp_path / "new" / "a.sh").write_text("mine\n")
    with pytest.raises(InputError, match=r"a\.sh.*--force"):
        write_files({"c.sh": "three\n", "a.sh": "one\n"}, tmp_path / "new", force=False)
    assert (tmp_path / "new" / "a.sh").read_text() == "mine\n"
    assert not (tmp_path / "new" / "c.sh").exists()
    write_files(texts, tmp_path / "new", force=True)
    assert (tmp_path / "new" / "a.sh").read_text() == "one\n"
    assert sorted(place.name for place in (tmp_path / "new").iterdir()) == ["a.sh", "b.yaml"]


def test_yaml_reads_back() -> None:
    value = {
        "a": {"b": [1, 2.5, True, None, "on", "1e3", "yes: no", "# x", "", "µ"], "c": []},
        "d": [{"e": [[1, 2], {"f": {}}], "g": "h"}],
    }
    assert yaml.safe_load(to_yaml(value)) == value
    assert json.loads(json.dumps(value)) == value


def test_names_are_dns_labels() -> None:
    assert re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?", deployed(Shard(tp=8, ep=8)).name)
