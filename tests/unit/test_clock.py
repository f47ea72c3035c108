import time

from tongyun.cloud.engine.clock import VirtualClock, WallClock


def test_virtual_time_passes_only_when_waited_for():
    clock = VirtualClock(5.0)
    clock.wait_until(7.5)
    assert clock.now() == 7.5
    clock.wait_until(6.0)
    assert clock.now() == 7.5


def test_wall_clock_sleeps_until_the_moment_and_never_less():
    clock = WallClock()
    began = time.perf_counter()
    clock.wait_until(clock.now() + 0.02)
    assert time.perf_counter() - began >= 0.02
    moment = clock.now()
    clock.wait_until(moment - 10.0)
    assert clock.now() - moment < 0.5
