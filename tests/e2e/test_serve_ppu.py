"""`tongyun serve --device ppu`: the engine's tokens come from the simulated chip's program."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tongyun.cli.engines import ServeOptions, build_gateway
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.gateway.server import bind, serving
from tongyun.errors import InputError
from tongyun.model.bundled import DEFAULT

PROMPTS = ["def add(a, b):", "import os\n", "class Queue:\n    def put("]


def options(**more: Any) -> ServeOptions:
    return ServeOptions(
        model=DEFAULT, **{"max_sequences": 4, "max_step_tokens": 64, "context_tokens": 256, **more}
    )


@pytest.fixture(scope="module")
def chip() -> Iterator[str]:
    with serving(build_app(build_gateway(options(device="ppu"))), bind("127.0.0.1", 0)) as url:
        yield url


@pytest.fixture(scope="module")
def cpu() -> Iterator[str]:
    plain = options(kernels="torch", threads=1, kv_bytes=2**24)
    with serving(build_app(build_gateway(plain)), bind("127.0.0.1", 0)) as url:
        yield url


def complete(url: str, prompt: str) -> Any:
    """Text, tokens and their alternatives of a greedy answer."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=300) as client:
        answer = client.completions.create(
            model=DEFAULT, prompt=prompt, max_tokens=10, temperature=0, logprobs=5
        )
    return answer.choices[0]


def metric(url: str, name: str) -> float:
    page = httpx.get(f"{url}/metrics").text
    found = [line.split()[1] for line in page.splitlines() if line.startswith(f"tongyun_{name} ")]
    return float(found[0]) if found else 0.0


def test_greedy_text_is_the_cpus_but_for_near_ties(chip: str, cpu: str) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        # Together: pieces of several sequences share the chip's steps.
        ours = list(pool.map(lambda prompt: complete(chip, prompt), PROMPTS))
    same = 0
    for prompt, got in zip(PROMPTS, ours, strict=True):
        want = complete(cpu, prompt)
        blur = 0.0
        for place, token in enumerate(got.logprobs.tokens):
            mine, theirs = got.logprobs.top_logprobs[place], want.logprobs.top_logprobs[place]
            blur = max([blur, *(abs(mine[name] - theirs[name]) for name in mine.keys() & theirs.keys())])
            if token != want.logprobs.tokens[place]:
                best, second = sorted(theirs.values(), reverse=True)[:2]
                assert best - second <= 2 * blur, f"{prompt!r}: {token!r} at {place} is no near-tie"
                break
            same += 1
        assert blur < 0.3, "log-probabilities in bf16 are near those in f32"
    assert same >= 15


def test_the_chips_time_is_simulated_and_says_so(chip: str) -> None:
    before = metric(chip, "simulated_chip_seconds_total"), metric(chip, "engine_steps_total")
    first = complete(chip, PROMPTS[0])
    # The prompt's full blocks are none, so that the second time the same is computed.
    assert complete(chip, PROMPTS[0]).text == first.text
    seconds = metric(chip, "simulated_chip_seconds_total") - before[0]
    steps = metric(chip, "engine_steps_total") - before[1]
    assert 20e-6 * steps < seconds < 2e-3 * steps, "a step of this model is a fraction of a millisecond"
    assert metric(chip, "simulated_chip_joules_total") > 0
    assert metric(chip, "engine_busy_seconds_total") > 10 * seconds, "what the simulator took is apart"
    page = httpx.get(f"{chip}/metrics").text
    assert "# HELP tongyun_simulated_chip_seconds_total" in page
    assert "simulated, not measured" in page


def test_a_measured_engine_shows_no_simulated_time(cpu: str) -> None:
    assert "simulated" not in httpx.get(f"{cpu}/metrics").text


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"kernels": "native"}, "--kernels native: the PPU runs its own program"),
        ({"kv_dtype": "f32"}, "--kv-dtype f32: on the PPU keys and values are bf16"),
        ({"chip": "zhenwv-810e"}, "zhenwu-810e"),
        ({"kv_bytes": 100}, "no room for a KV cache"),
    ],
)
def test_wishes_the_chip_has_no_answer_to(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_gateway(options(device="ppu", **wish))
