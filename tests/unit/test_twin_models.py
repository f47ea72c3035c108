"""A twin of several models does what the simulation of them does, and the gateway tells them apart."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest
from tests.unit.test_twin import Reader

from tongyun.cli.market import read_market
from tongyun.cli.twin import twin_gateway
from tongyun.cloud.engine.protocol import total
from tongyun.cloud.gateway.app import build_app
from tongyun.cloud.latency import Slo
from tongyun.cloud.sched.request import Finish, Request
from tongyun.cloud.sched.router import LeastLoad, RoundRobin
from tongyun.cloud.twin import Lost, Twin, Watch
from tongyun.cloud.workload import Arrival
from tongyun.codesign.at_work import AtWork
from tongyun.codesign.market import Market
from tongyun.codesign.runs import ToldTo
from tongyun.errors import InputError, RequestError
from tongyun.specs import find_market

MARKET = """
name = "market"
chip = "h200"

[[model]]
name = "Qwen/Qwen3-8B"

[[model]]
name = "chat"
config = "Qwen/Qwen3-4B"
copies = 3

[[model]]
name = "tuned"
config = "Qwen/Qwen3-1.7B"
{more}
[[pool]]
models = ["Qwen/Qwen3-8B"]
role = "prefill"
replicas = 1

[[pool]]
models = ["Qwen/Qwen3-8B"]
role = "decode"
replicas = 2

[[pool]]
shared = true
replicas = 2

[sharing]
host_bandwidth = {{ gb_per_s = 400, kind = "assumed", source = "this test" }}
"""
AWAY = """
[failures]
on_failure = "{policy}"

[[failures.event]]
at_s = 0.4
instance = "shared/mixed-0"
for_s = 0.3

[[failures.event]]
at_s = 0.9
instance = "Qwen/Qwen3-8B/decode-1"
for_s = 0.4
"""


def market(folder: Path, more: str = "", *, text: str | None = None) -> Market:
    file = folder / "market.toml"
    file.write_text(MARKET.format(more=more) if text is None else text)
    spec = find_market(file)
    assert spec is not None
    return read_market(file, spec, [Arrival(0.0, 400, 40)], slo=Slo())


def load(names: list[str], twin: Twin) -> list[Request]:
    rng, sent = np.random.default_rng(7), []
    for i in range(60):
        moment_s = time.perf_counter()
        request = Request(
            id=f"r{i}",
            prompt=tuple(range(i, i + int(rng.integers(1, 700)))),
            output_tokens=int(rng.integers(1, 60)),
            arrival_s=moment_s,
            model=names[int(rng.integers(0, len(names)))],
        )
        twin.submit(request)
        sent.append(replace(request, arrival_s=moment_s - twin._origin_s))
        time.sleep(float(rng.exponential(0.02)))
    return sent


@pytest.mark.parametrize("more", ["", AWAY.format(policy="retry"), AWAY.format(policy="lose")])
def test_moments_are_those_of_the_simulation_to_the_last_bit(tmp_path: Path, more: str) -> None:
    several, reader = market(tmp_path, more), Reader()
    chip = several.models["tuned"].question.chip.at()
    words = dict.fromkeys(several.models, range(100))

    def start(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
        told = ToldTo(words=words, watches=watches, lost=lost)
        return several.put_to_work(LeastLoad, chip=chip, told=told)[1]

    twin = Twin(start, reader, grace_s=0.25)
    try:
        sent = load(list(several.models), twin)
        reader.wait(*(request.id for request in sent))
        stats = twin.stats()
    finally:
        twin.close()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0
    assert total(stats.switched.values()).count > 3
    _, simulated = several.put_to_work(LeastLoad, chip=chip)
    records = {record.id: record for record in simulated.play(sent)}
    assert len(records) == 60
    for name, record in records.items():
        told = reader.events[name]
        tokens = [event for event in told if event.token is not None]
        assert len(tokens) == record.output_tokens
        assert (tokens[0].moment_s if tokens else None) == record.first_token_s
        assert told[-1].moment_s == (record.last_token_s if record.ok else record.ended_s)
        last = Finish.LENGTH if record.ok else Finish.ERROR
        assert [event.finish for event in told] == [None] * (len(told) - 1) + [last]
    if not more:
        assert all(record.ok for record in records.values())


MOVING = """
name = "moving"
chip = "h200"

[[model]]
name = "Qwen/Qwen3-8B"

[[model]]
name = "Qwen/Qwen3-4B"

[[model]]
name = "tuned"
config = "Qwen/Qwen3-1.7B"

[[pool]]
models = ["Qwen/Qwen3-8B"]
replicas = 3

[[pool]]
models = ["Qwen/Qwen3-4B"]
replicas = 2

[[pool]]
shared = true
replicas = 1

[migration]
interval_ms = 50
below_steps = 300000
above_steps = 300000
"""
GONE = """
[failures]
[[failures.event]]
at_s = 0.5
instance = "Qwen/Qwen3-8B/mixed-0"
for_s = 0.3
"""


@pytest.mark.parametrize("more", ["", GONE])
def test_requests_move_at_the_moments_of_the_simulation(tmp_path: Path, more: str) -> None:
    """Turn by turn, one replica of each model gets all the long answers."""
    several, reader = market(tmp_path, text=MOVING + more), Reader()
    chip = several.models["tuned"].question.chip.at()
    words = dict.fromkeys(several.models, range(100))
    names = ("Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-8B", "Qwen/Qwen3-4B", "Qwen/Qwen3-4B", "tuned")
    work: list[AtWork] = []

    def start(watches: tuple[Watch, Watch], lost: Lost) -> AtWork:
        told = ToldTo(words=words, watches=watches, lost=lost)
        work.append(several.put_to_work(RoundRobin, chip=chip, told=told)[1])
        return work[0]

    twin = Twin(start, reader, grace_s=0.25)
    sent = []
    try:
        for i in range(60):
            moment_s = time.perf_counter()
            request = Request(
                id=f"r{i}",
                prompt=tuple(range(i, i + 100)),
                output_tokens=150 if i % 6 in (0, 3) else 5,
                arrival_s=moment_s,
                model=names[i % 6],
            )
            twin.submit(request)
            sent.append(replace(request, arrival_s=moment_s - twin._origin_s))
            time.sleep(0.015)
        reader.wait(*(request.id for request in sent))
        stats = twin.stats()
    finally:
        twin.close()
    assert stats.running == stats.waiting == stats.kv_blocks_used == 0
    work.append(several.put_to_work(RoundRobin, chip=chip)[1])
    records = {record.id: record for record in work[1].play(sent)}
    assert all(record.ok for record in records.values())
    for name, record in records.items():
        tokens = [event for event in reader.events[name] if event.token is not None]
        assert len(tokens) == record.output_tokens
        assert (tokens[0].moment_s, tokens[-1].moment_s) == (record.first_token_s, record.last_token_s)
    logs = [[mover.log for mover in one.movers] for one in work]
    assert logs[0] == logs[1] and len(logs[0]) == 2
    assert sum(move.outcome == "migrated" for move in logs[0][0]) > 2


def test_a_model_that_is_not_there_is_refused_by_the_fleet_too(tmp_path: Path) -> None:
    several = market(tmp_path)
    chip = several.models["tuned"].question.chip.at()
    front = several.put_to_work(LeastLoad, chip=chip)[1].front
    request = Request(id="r", prompt=(1, 2), output_tokens=3, model="Qwen/Qwen3-8B")
    front.check(request)
    with pytest.raises(RequestError, match="context"):
        front.check(replace(request, prompt=tuple(range(50_000))))
    with pytest.raises(RequestError, match="unknown model 'other'"):
        front.check(replace(request, model="other"))


def test_over_http_every_model_answers_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "market.toml"
    file.write_text(MARKET.format(more=""))
    gateway = twin_gateway(file, None, names=(), api_key=None, body_bytes=2**20)
    app = build_app(gateway)

    async def talk() -> None:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://twin") as client,
        ):
            cards = (await client.get("/v1/models")).json()["data"]
            assert [card["id"] for card in cards] == [
                "Qwen/Qwen3-8B",
                *(f"chat-{number}" for number in (1, 2, 3)),
                "tuned",
            ]
            assert (await client.get("/v1/models/chat-2")).json()["max_model_len"] == 40960
            asked = {"prompt": "one two three", "max_tokens": 4}
            answers = await asyncio.gather(
                *(client.post("/v1/completions", json={"model": card["id"], **asked}) for card in cards)
            )
            for card, answer in zip(cards, answers, strict=True):
                assert answer.json()["model"] == card["id"]
                assert answer.json()["usage"]["completion_tokens"] == 4
                assert answer.headers["x-tongyun-twin"] == "fleet=market; model=5 models; chips=5 x h200"
                assert answer.headers["x-tongyun-tokens"] == "counted by a stand-in"
            gone = await client.post("/v1/completions", json={"model": "chat", **asked})
            assert gone.status_code == 404
            assert gone.json()["error"]["code"] == "model_not_found"
            assert "chat-1" in gone.json()["error"]["message"]

    asyncio.run(talk())


def test_what_the_file_says_already_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "market.toml"
    file.write_text(MARKET.format(more=""))
    for model, names, says in (("Qwen/Qwen3-8B", (), "leave MODEL out"), (None, ("m",), "leave --name out")):
        with pytest.raises(InputError, match=says):
            twin_gateway(file, model, names=names, api_key=None, body_bytes=2**20)
    gateway = twin_gateway(file, None, names=(), api_key=None, body_bytes=2**20, client_s=1.0)
    with pytest.raises(InputError, match="less than the fleet's shortest step"):
        gateway.start_engine(lambda events: None)
