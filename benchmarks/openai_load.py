"""An outside load generator: the openai client, in a process of its own, knowing nothing of Tongyun.

    python benchmarks/openai_load.py < load.json > felt.json

Reads {"url", "model", "requests": [[moment_s, prompt, output tokens], …]}; streams each completion
from its moment on, and writes for each [lag_s, ttft_s, end-to-end seconds, [prompt tokens, output
tokens]], counted from the moment at which it was due. `lag_s` is how late it left.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from typing import Any

import openai

WARM = 32
"""Connections that are open when the load begins; a fleet of the benchmark streams about as many at once."""


async def one(client: openai.AsyncOpenAI, model: str, due_s: float, request: list[Any]) -> list[Any]:
    """Send a request that is due now and read its stream to the end."""
    _, prompt, output_tokens = request
    lag_s = time.perf_counter() - due_s
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=output_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    )
    first_s = last_s = 0.0
    counted: list[int] = []
    async for chunk in stream:
        if chunk.choices:
            last_s = time.perf_counter()
            first_s = first_s or last_s
        if chunk.usage is not None:
            counted = [chunk.usage.prompt_tokens, chunk.usage.completion_tokens]
    return [lag_s, first_s - due_s, last_s - due_s, counted]


async def load(told: dict[str, Any]) -> list[list[Any]]:
    """Every request at its moment, whether or not earlier ones have come back."""
    async with openai.AsyncOpenAI(base_url=told["url"], api_key="none", max_retries=0) as client:
        # First requests open connections, which a client at work has, and import what it imports late.
        hello = [0.0, "hello", 2]
        await asyncio.gather(*(one(client, told["model"], time.perf_counter(), hello) for _ in range(WARM)))
        gc.freeze()
        begin_s = time.perf_counter() + 0.1
        tasks = []
        for request in told["requests"]:
            due_s = begin_s + request[0]
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.create_task(one(client, told["model"], due_s, request)))
        return await asyncio.gather(*tasks)


if __name__ == "__main__":
    json.dump(asyncio.run(load(json.load(sys.stdin))), sys.stdout)
