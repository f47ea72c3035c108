"""A gateway over the fake engine as a process of its own: `python fake_server.py PORT DRAIN_S TPOT_S`."""

import sys
from functools import partial

from fakes import FakeEngine, served

from tongyun.cloud.gateway.app import Gateway, build_app
from tongyun.cloud.gateway.server import bind, run, url_of

if __name__ == "__main__":
    port, drain_s, tpot_s = sys.argv[1:]
    gateway = Gateway(
        served=served(context_tokens=100_000), start_engine=partial(FakeEngine, tpot_s=float(tpot_s))
    )
    with bind("127.0.0.1", int(port)) as sock:
        url = url_of(sock)
        run(build_app(gateway), sock, drain_s=float(drain_s), on_ready=lambda: print(url, flush=True))
    print("ended", flush=True)
