"""CPU time the gateway spends on one streamed token: `python benchmarks/gateway.py` (Linux).

A fake engine gives 64 streams 200 tokens a second each; the CPU time of the server's
threads is read from /proc, that of the load generator from its own clock. CPU time
rather than wall time, because it is what the engine cannot have.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tongyun.cloud.load import LoadOptions, measure
from tongyun.cloud.probe import Target
from tongyun.cloud.workload import Arrival

SERVER = Path(__file__).parents[1] / "tests" / "e2e" / "fake_server.py"
STREAMS, TOKENS, STEP_S = 64, 1500, 0.005


def threads_cpu_s(process_id: int) -> list[float]:
    """User and system seconds of each thread, the event loop's first."""
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    found = []
    for task in sorted(Path(f"/proc/{process_id}/task").iterdir(), key=lambda path: int(path.name)):
        fields = (task / "stat").read_text().rpartition(")")[2].split()
        found.append((int(fields[11]) + int(fields[12])) * tick_s)
    return found


def main() -> None:
    command = [sys.executable, str(SERVER), "0", "1", str(STEP_S)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        before, own = threads_cpu_s(server.pid), time.process_time()
        run = measure(Target(url=url), [Arrival(0.0, 50, TOKENS)] * STREAMS, LoadOptions(warmup_requests=0))
        after, own = threads_cpu_s(server.pid), time.process_time() - own
        server.terminate()
        server.communicate()
    tokens = run.report.output_tokens
    spent = [late - early for late, early in zip(after, [*before, *[0.0] * len(after)], strict=False)]
    print(f"{tokens} tokens at {run.report.output_tokens_per_s:.0f}/s, {run.report.failed} failed (measured)")
    print(f"server's event loop: {spent[0] / tokens * 1e6:.1f} µs CPU a token (measured)")
    print(f"fake engine and others: {sum(spent[1:]) / tokens * 1e6:.1f} µs CPU a token (measured)")
    print(f"load generator: {own / tokens * 1e6:.1f} µs CPU a token (measured)")


if __name__ == "__main__":
    main()
