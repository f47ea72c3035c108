"""`tongyun serve --twin` as a process, and the openai client in another: the simulated pace, in wall time."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import httpx
import openai
import pytest
from typer.testing import CliRunner

from tongyun.cli import build
from tongyun.cli.fleet import read_fleet
from tongyun.cloud.sched.router import find_router
from tongyun.cloud.workload import Arrivals, Lengths, Process, Workload, sample
from tongyun.errors import InputError

CLIENT = Path(__file__).parents[2] / "benchmarks" / "openai_load.py"
FLEET = """
name = "small"
model = "Qwen/Qwen3-8B"
chip = "a100"

[[pool]]
replicas = 2
step_tokens = 512
"""


SEVERAL = """
name = "several"
chip = "h200"

[[model]]
name = "Qwen/Qwen3-8B"

[[model]]
name = "chat"
config = "Qwen/Qwen3-4B"
copies = 2

[[pool]]
models = ["Qwen/Qwen3-8B"]
replicas = 1

[[pool]]
shared = true
replicas = 1

[sharing]
host_bandwidth = { gb_per_s = 400, kind = "assumed", source = "this test" }
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("twin") / "fleet.toml"
    place.write_text(FLEET)
    return place


@pytest.fixture(scope="module")
def url(file: Path) -> Iterator[str]:
    command = [sys.executable, "-m", "tongyun", "serve", "Qwen/Qwen3-8B", "--twin"]
    with subprocess.Popen(
        [*command, "--fleet", str(file), "--port", "0"], stdout=subprocess.PIPE, text=True, env=os.environ
    ) as server:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert "context 40960" in line
        yield line.rsplit(" ", 1)[-1].strip()
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0


def test_every_model_of_a_file_is_announced_on_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "several.toml").write_text(SEVERAL)
    command = [sys.executable, "-m", "tongyun", "serve", "--twin", "--port", "0", "--fleet", "several.toml"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline() for _ in range(3)]
        server.send_signal(signal.SIGTERM)
        rest = server.stdout.read()
        assert server.wait(20) == 0 and rest == ""
    assert [line.split(": ")[0] for line in lines] == ["Qwen/Qwen3-8B", "chat-1", "chat-2"]
    assert len({line.rsplit(" ", 1)[-1] for line in lines}) == 1
    assert all("context 40960 tokens" in line for line in lines)


def test_every_answer_says_what_it_is(url: str) -> None:
    answer = httpx.post(
        f"{url}/completions", json={"model": "Qwen/Qwen3-8B", "prompt": "a b c", "max_tokens": 5}, timeout=20
    )
    assert answer.json()["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 5,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert answer.headers["x-tongyun-text"] == "filler"
    assert answer.headers["x-tongyun-pace"] == "simulated"
    assert answer.headers["x-tongyun-twin"] == "fleet=small; model=Qwen/Qwen3-8B; chips=2 x a100"
    assert "stand-in" in answer.headers["x-tongyun-tokens"]


def test_a_chat_without_a_limit_ends_and_its_next_turn_finds_the_first_in_the_cache(url: str) -> None:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=30) as client:
        turns = [{"role": "user", "content": "tell me more " * 60}]
        answer = client.chat.completions.create(model="Qwen/Qwen3-8B", messages=turns)
        first = answer.usage
        assert first is not None and first.completion_tokens == 256
        assert answer.choices[0].message.content is not None
        turns.append({"role": "assistant", "content": answer.choices[0].message.content})
        turns.append({"role": "user", "content": "and then"})
        again = client.chat.completions.create(model="Qwen/Qwen3-8B", messages=turns, max_tokens=4)
    # Two engines, and the idle ones are asked in their order: the second turn meets the first one's blocks.
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    cached = again.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and cached >= first.prompt_tokens + first.completion_tokens - 2 * 64


def test_the_client_measures_what_the_simulation_predicts(url: str, file: Path) -> None:
    workload = Workload(
        arrivals=Arrivals(process=Process.POISSON, rate_per_s=10.0),
        prompt=Lengths.fixed(700),
        output=Lengths.fixed(24),
        requests=30,
        seed=2,
    )
    arrivals = sample(workload)
    spec, fleet = read_fleet(file)
    predicted = fleet.play(arrivals, find_router(spec.router), chip=fleet.question.chip.at()).report
    rng = random.Random(0)
    texts = [
        "".join(" " + "".join(rng.choices("abcdefghij", k=5)) for _ in range(one.prompt_tokens))
        for one in arrivals
    ]
    told = {
        "url": url,
        "model": spec.model,
        "requests": [
            [one.time_s, text, one.output_tokens] for one, text in zip(arrivals, texts, strict=True)
        ],
    }
    done = subprocess.run(
        [sys.executable, str(CLIENT)],
        input=json.dumps(told),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    felt = json.loads(done.stdout)
    assert [counted for *_, counted in felt] == [[700, 24]] * 30
    assert predicted.ttft_s is not None and predicted.tpot_s is not None
    tpot_s = median((e2e - ttft) / 23 for _, ttft, e2e, _ in felt)
    # The benchmark has the bars; here other tests share the machine, which delays but cannot hasten.
    assert predicted.tpot_s.p50 * 0.97 < tpot_s < predicted.tpot_s.p50 * 1.1
    ttft_s = median(ttft for _, ttft, _, _ in felt)
    assert predicted.ttft_s.p50 * 0.97 < ttft_s < predicted.ttft_s.p50 * 1.1 + 0.05


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--twin",), "--fleet"),
        (("--fleet", "{file}"), "--twin"),
        (("--twin", "--fleet", "{file}", "--kv-gb", "3"), "--kv-gb: --twin runs no model"),
        (("Qwen/Qwen3-32B", "--twin", "--fleet", "{file}"), "Qwen/Qwen3-8B, not Qwen/Qwen3-32B"),
        ((), "MODEL is missing"),
    ],
)
def test_what_makes_no_twin_is_refused(file: Path, flags: tuple[str, ...], says: str) -> None:
    given = [flag.format(file=file) for flag in flags]
    done = CliRunner().invoke(build(), ["serve", *given, "--port", "0"])
    assert isinstance(done.exception, InputError)
    assert says in str(done.exception)
