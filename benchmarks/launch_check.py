"""Launch files of a spread of plans, read by the engines' own parsers, configurations and schemas.

    python benchmarks/launch_check.py --vllm PYTHON --sglang PYTHON --ray PYTHON --kubernetes PYTHON --lws CRD

Each PYTHON is one in which that package can be imported (for Kubernetes: kubernetes-validate and jsonschema);
routers are looked for beside their engine. CRD is leaderworkersets.yaml of a release of kubernetes-sigs/lws.
What is not given is not read, and said so. Ends with 1 where something was refused.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch_cases import CASES, EAGLE, Case, deployment_of
from tongyun.codesign.launch import TARGETS, launch_files, write_files
from tongyun.codesign.launch.platforms import ROUTERS, SGLANG, VLLM
from tongyun.specs import find_model

PARSE = Path(__file__).with_name("launch_parse.py")
STARTS = {VLLM: ("vllm", "serve"), SGLANG: ("python3", "-m", "sglang.launch_server")}
DRAFTS = "drafts"
"""Folder of the draft module's config, beside the model's."""


# ── what files start ─────────────────────────────────────────────────────────────────


def started(folder: Path, name: str, machines: int) -> list[list[str]]:
    """Command lines that a script begins, with a stand-in for every program."""
    stand_ins, log = folder / "bin", folder / "log"
    stand_ins.mkdir(exist_ok=True)
    log.write_text("")
    for program in ("vllm", "python3", "vllm-router", "nginx"):
        place = stand_ins / program
        place.write_text(
            f"#!{sys.executable}\nimport json, sys, time\nwith open({str(log)!r}, 'a') as file:\n"
            f"    file.write(json.dumps([{program!r}, *sys.argv[1:]]) + '\\n')\ntime.sleep(0.3)\n"
        )
        place.chmod(0o755)
    env = {
        **os.environ,
        "PATH": f"{stand_ins}:{os.environ['PATH']}",
        "MACHINES": " ".join(["127.0.0.1"] * machines),
        "MASTER_ADDR": "127.0.0.1",
        "NODE_RANK": "0",
    }
    subprocess.run([folder / name], env=env, check=False, capture_output=True, timeout=60)
    return [json.loads(line) for line in log.read_text().splitlines()]


def in_manifest(text: str) -> Iterator[tuple[str, Any]]:
    """Every object, and every command line of a container."""
    for each in yaml.safe_load_all(text):
        yield "object", each
        spec = each.get("spec", {})
        parts = spec.get("leaderWorkerTemplate", spec)
        for template in ("template", "leaderTemplate", "workerTemplate"):
            for container in parts.get(template, {}).get("spec", {}).get("containers", []):
                words = [*container.get("command", []), *container.get("args", [])]
                places = {
                    "$(LWS_GROUP_SIZE)": str(parts.get("size", 1)),
                    "$(LWS_WORKER_INDEX)": "1",
                    "$(LWS_LEADER_ADDRESS)": "127.0.0.1",
                }
                for name, value in places.items():
                    words = [word.replace(name, value) for word in words]
                if words:
                    yield "words", words


def program_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """Who reads a command line, and the flags it gets."""
    words = list(words)
    if words[:2] == ["sh", "-c"]:
        words = words[4:]
    for engine, start in STARTS.items():
        if tuple(words[: len(start)]) == start:
            return engine, words[len(start) :]
    for package, _ in ROUTERS.values():
        if words[0] == package or f"{package.replace('-', '_')}.launch_router" in words[:3]:
            return package, words[1:] if words[0] == package else words[3:]
    return None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One thing to be read by one program."""

    case: str
    file: str
    program: str
    value: Any


def asked_of(case: Case, folder: Path, schema: Any) -> tuple[list[Asked], Mapping[str, str]]:
    """All that the files of a plan ask engines to read, and the files that there are none of."""
    deployment = deployment_of(case)
    launch = launch_files(deployment, list(TARGETS))
    write_files(launch.files, folder, force=False)
    model = configs(case.model, folder)
    names = {deployment.source: str(model), EAGLE: str(folder / DRAFTS)}
    found = []
    machines = [
        text.split("one of ")[1].split()[0] for text in launch.files.values() if "MACHINE says" in text
    ]
    for name, text in launch.files.items():
        parts: list[tuple[str, Any]] = []
        if name.endswith("-machine.sh"):
            continue
        if name.endswith(".sh"):
            parts = [("words", words) for words in started(folder, name, int(machines[0]) if machines else 1)]
        elif name.startswith("kubernetes"):
            parts = list(in_manifest(text))
        else:
            parts = [("Ray", yaml.safe_load(text))]
        found += [
            Asked(case=case.name, file=name, program=who, value=what)
            for who, what in _read_by(parts, names, schema)
        ]
    return found, launch.refused


def _read_by(
    parts: list[tuple[str, Any]], names: Mapping[str, str], schema: Any
) -> Iterator[tuple[str, Any]]:
    for kind, value in parts:
        if kind == "words":
            known = program_of(value)
            if known is not None:
                yield known[0], [_local(word, names) for word in known[1]]
        elif kind == "object":
            custom = value["kind"] == "LeaderWorkerSet"
            yield (
                "LeaderWorkerSet" if custom else "Kubernetes",
                {"object": value, "schema": schema if custom else None},
            )
        else:
            yield kind, value


def _local(word: str, names: Mapping[str, str]) -> str:
    """A word with names of weights as folders that hold their config alone."""
    for name, folder in names.items():
        word = word.replace(name, folder)
    return word


def configs(model: str, folder: Path) -> Path:
    """Folders with the config of a model, and of an EAGLE-3 module as wide."""
    raw = find_model(model)[0]
    place = folder / "model"
    for name, config in (("model", raw), (DRAFTS, _draft(raw))):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config))
    return place


def _draft(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    rest = ("head_dim", "max_position_embeddings", "rms_norm_eps")
    return {
        **{key: raw[key] for key in (*kept, *rest) if key in raw},
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "draft_vocab_size": raw["vocab_size"],
        "dtype": "bfloat16",
    }


# ── who reads ────────────────────────────────────────────────────────────────────────


WRONG: Mapping[str, Any] = {
    "Ray": {"applications": [{"import_path": "ray.serve.llm:build_openai_app", "args": {"llm_config": 1}}]},
    "Kubernetes": {"object": {"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replica": 1}}},
}
"""What each program has to refuse; of command lines it is a flag that there is not."""


def read(python: str, program: str, asked: Sequence[Asked]) -> list[tuple[str, str]]:
    """Verdicts of a program, from its own Python; one that refuses nothing has read nothing."""
    first = asked[0].value
    wrong = WRONG.get(program) or [*first, "--no-such-flag"]
    if program == "Kubernetes" and first["schema"]:
        wrong = {"object": {**first["object"], "spec": {"replica": 1}}, "schema": first["schema"]}
    done = subprocess.run(
        [python, str(PARSE)],
        input=json.dumps({"program": program, "cases": [wrong, *(each.value for each in asked)]}),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no word"]
        return [("unread", f"{program} cannot be asked: {last[0]}")] * len(asked)
    control, *verdicts = json.loads(done.stdout)
    if control[0] != "refused":
        return [("unread", f"{program} accepts what it has to refuse")] * len(asked)
    return [tuple(each) for each in verdicts]


def pythons(given: argparse.Namespace) -> dict[str, str | None]:
    return {
        VLLM: given.vllm,
        ROUTERS[VLLM][0]: given.vllm,
        SGLANG: given.sglang,
        ROUTERS[SGLANG][0]: given.sglang,
        "Ray": given.ray,
        "Kubernetes": given.kubernetes,
        "LeaderWorkerSet": given.kubernetes if given.lws else None,
    }


def check(given: argparse.Namespace) -> list[tuple[Asked, str, str]]:
    """Everything asked, each with its verdict and the reason."""
    schema = None
    if given.lws:
        definition = yaml.safe_load(given.lws.read_text())
        schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    asked: list[Asked] = []
    found: list[tuple[Asked, str, str]] = []
    for case in CASES:
        if given.only and given.only not in case.name:
            continue
        folder = Path(tempfile.mkdtemp(prefix="launch-"))
        more, refused = asked_of(case, folder, schema)
        asked += more
        found += [
            (Asked(case=case.name, file=name, program="tongyun", value=None), "no file", why)
            for name, why in refused.items()
        ]
    for program, python in pythons(given).items():
        mine = [each for each in asked if each.program == program]
        reader = "Kubernetes" if program == "LeaderWorkerSet" else program
        verdicts = (
            [("unread", "not given")] * len(mine)
            if python is None or not mine
            else read(python, reader, mine)
        )
        found += [(one, *verdict) for one, verdict in zip(mine, verdicts, strict=True)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("vllm", "sglang", "ray", "kubernetes"):
        parser.add_argument(f"--{name}", metavar="PYTHON")
    parser.add_argument("--lws", metavar="CRD", type=Path)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    given = parser.parse_args()
    found = check(given)
    order = [case.name for case in CASES]
    rows: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for one, verdict, why in sorted(found, key=lambda row: (order.index(row[0].case), row[0].file)):
        rows.setdefault((one.case, one.file, one.program), []).append((verdict, why))
    for (case, file, program), verdicts in rows.items():
        said = {verdict: sum(each == verdict for each, _ in verdicts) for verdict, _ in verdicts}
        counts = ", ".join(f"{count} {verdict}" for verdict, count in said.items())
        why = "; ".join(dict.fromkeys(why for _, why in verdicts if why))
        print(f"{case:26} {file:24} {program:16} {counts}{'  ' + why if why else ''}")
    bad = 0
    for program in pythons(given):
        said = [verdict for one, verdict, _ in found if one.program == program]
        refused = said.count("refused")
        bad += refused
        print(
            f"{program}: {said.count('accepted')} accepted, {refused} refused, {said.count('unread')} unread"
        )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
