# ruff: noqa: PLR0912, PLR0915 - one loop, compiled
"""The hot loop of `users.py`: one group of users played once, compiled.

Requests are asked, come and are taken up in one order, so that queues are ranges of their indices.
"""

from __future__ import annotations

import heapq
import math

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.int64]

MIXED, WHOLE, FIRST = 0, 1, 2
"""`Prompts`, as numbers."""


@njit(cache=True)
def play(
    prices: tuple[Array, Array, Array],
    lengths: tuple[Counts, Counts],
    seats: tuple[int, int, int],
    habits: tuple[int, bool],
    times: tuple[float, float, float, float, float],
) -> tuple[Array, Array]:
    """Seconds to the first token in the order of first tokens, and for a token in the order of last ones.

    `prices`: seconds of a decode step by sequences; tokens priced; seconds of a step by sequences
    and those tokens. `lengths`: of prompts and answers. `seats`: users, the most sequences at once, and
    the most tokens a step. `habits`: how prompts share steps, and whether steps are planned ahead.
    `times`: those of `Engine` in its order, a prompt's for the whole model.
    """
    decode, axis, mixed = prices
    isl, osl = lengths
    users, most, budget = seats
    prompts, ahead = habits
    step_s, sequence_s, prompt_s, request_s, token_s = times
    number = len(isl)
    sent = np.zeros(number)
    come = np.zeros(number)
    left = isl.copy()
    ttft, tpot = np.zeros(number), np.zeros(number)
    now = front = planned = 0.0
    asked = came = head = started = ended = decoded = 0
    running = [(0, 0.0, 0)]
    running.pop()
    while asked < min(users, number):
        front += request_s
        come[asked] = front
        asked += 1
    while ended < number:
        seen = planned if ahead else now
        while came < asked and come[came] <= seen:
            came += 1
        count = len(running)
        if head < came and count < most:
            # One step with prompts, first come first served.
            decoding = 0 if prompts == FIRST else count
            room = max(budget - decoding, 1)
            first, taken = head, 0
            while head < came and taken < room and count + head - first < most:
                if left[head] > room - taken and taken and prompts == WHOLE:
                    break
                part = min(left[head], room - taken)
                taken += part
                left[head] -= part
                if left[head]:
                    break
                head += 1
            sampled = decoding + head - first
            planned = now
            kernels = np.interp(float(taken), axis, mixed[decoding])
            now += max(kernels, prompt_s) + step_s + sequence_s * sampled
            decoded += prompts != FIRST
            front = max(front, now) + sampled * token_s
            for request in range(first, head):
                ttft[started] = front - sent[request]
                started += 1
                heapq.heappush(running, (decoded + osl[request] - 1, front, request))
        elif count:
            # Alike steps until the next sequence ends, or a question can be taken up.
            each = decode[count] + step_s + sequence_s * count
            steps = max(running[0][0] - decoded, 1)
            if came < asked and count < most:
                until = math.ceil((come[came] - now) / each) + ahead
                steps = min(steps, max(until, 1))
            out = count * token_s
            # The front end may lag behind before these steps, from the first of them on, or not at all.
            late = max(front + steps * out, now + each + steps * out)
            now += steps * each
            front = max(late, now + out)
            planned = now - each
            decoded += steps
        else:
            now = planned = max(now, come[came])
        while running and running[0][0] <= decoded:
            _, first_s, request = heapq.heappop(running)
            tpot[ended] = (front - first_s) / max(osl[request] - 1, 1)
            ended += 1
            if asked < number:
                sent[asked] = front
                front += request_s
                come[asked] = front
                asked += 1
    return ttft, tpot
