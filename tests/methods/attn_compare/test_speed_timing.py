"""Turns, repeats, noise and the clock that counts, by a clock whose hands the test moves."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from pomona.methods.attn_compare.speed import timing
from pomona.methods.attn_compare.speed.timing import ProcessorClock, Timing, fair, interleaved


class MadeUp:
    """A call takes what the contender's script says next: (wall, cpu); afterwards what it said last."""

    def __init__(self, *, cores: int = 2, loads: float | None = 0.5, device: bool = False) -> None:
        self.cores, self.loads, self.device = cores, loads, device
        self.called: list[str] = []
        self.scripts: dict[str, Iterator[tuple[float, float]]] = {}
        self.last: dict[str, tuple[float, float]] = {}

    def contender(self, name: str, *script: tuple[float, float]) -> Callable[[], object]:
        self.scripts[name], self.last[name] = iter(script), script[-1]
        return lambda: self.called.append(name)

    def time(self, work: Callable[[], object], times: int) -> tuple[float, float]:
        work()
        name = self.called[-1]
        wall, cpu = next(self.scripts[name], self.last[name])
        return wall * times, cpu * times

    def load(self) -> float | None:
        return self.loads


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_contenders_take_turns_after_a_warm_up() -> None:
    clock = MadeUp()
    found = interleaved({name: clock.contender(name, (0.1, 0.1)) for name in "ab"}, 3, clock)
    assert clock.called == ["a", "a", "b", "b", "a", "b", "a", "b", "a", "b"]
    assert list(found["a"].wall) == [0.1] * 3


def test_short_work_is_repeated_within_a_sample_and_long_work_is_repeated_less() -> None:
    clock = MadeUp()
    work = {"short": clock.contender("short", (1e-4, 1e-4)), "long": clock.contender("long", (1.5, 1.5))}
    found = interleaved(work, 7, clock)
    assert clock.called.count("long") == 1 + 3 and len(found["long"].wall) == 3
    assert found["short"].wall == pytest.approx([1e-4] * 7)


def test_a_repeat_half_as_slow_again_is_noise_and_then_processor_time_counts_for_all() -> None:
    clock = MadeUp()
    calm = clock.contender("calm", (0.10, 0.09))
    shaken = clock.contender("shaken", (0.1, 0.09), (0.1, 0.09), (0.10, 0.09), (0.16, 0.09))
    found, used = fair({"calm": calm, "shaken": shaken}, 3, clock)
    assert used == "cpu"
    assert not found["calm"].noisy and found["shaken"].noisy
    row = found["shaken"].as_row(used)
    assert (row["ms"], row["cpu_ms"], row["wall_ms_min"], row["noisy"]) == (90.0, 90.0, 100.0, True)


def test_repeats_just_within_the_bound_are_not_noise() -> None:
    clock = MadeUp()
    steady = clock.contender("steady", (0.1, 0.05), (0.1, 0.05), (0.1, 0.05), (0.149, 0.05))
    found, used = fair({"steady": steady}, 3, clock)
    assert used == "wall" and not found["steady"].noisy
    assert found["steady"].as_row(used)["ms"] == pytest.approx(149.0)  # two of the three repeats


@pytest.mark.parametrize(("load", "noisy"), [(2.0, False), (2.1, True), (None, False)])
def test_more_work_than_cores_is_noise(load: float | None, noisy: bool) -> None:
    clock = MadeUp(cores=2, loads=load)
    found, used = fair({"a": clock.contender("a", (0.1, 0.1))}, 3, clock)
    assert found["a"].noisy is noisy and used == ("cpu" if noisy else "wall")


def test_noise_at_several_threads_is_measured_again_at_one() -> None:
    seen = []

    class Watching(MadeUp):
        def time(self, work: Callable[[], object], times: int) -> tuple[float, float]:
            seen.append(torch.get_num_threads())
            return super().time(work, times)

    torch.set_num_threads(2)
    clock = Watching(loads=9.0)
    found, used = fair({"a": clock.contender("a", (0.1, 0.1))}, 3, clock)
    assert seen == [2] * 5 + [1] * 5 and torch.get_num_threads() == 2
    assert used == "cpu" and found["a"].threads == 1


def test_the_clock_of_a_device_does_not_mind_the_load() -> None:
    clock = MadeUp(loads=99.0, device=True)
    found, used = fair({"a": clock.contender("a", (0.1, 0.3))}, 3, clock)
    assert used == "device" and not found["a"].noisy
    assert found["a"].as_row(used)["ms"] == pytest.approx(100.0)


def test_the_middle_repeat_and_the_least_are_told_of_the_clock_that_counts() -> None:
    row = Timing([0.3, 0.1, 0.2], [0.03, 0.01, 0.02], 1.0, False, 1).as_row("wall")
    assert (row["ms"], row["ms_min"], row["ms_all"]) == (200.0, 100.0, [300.0, 100.0, 200.0])
    assert (row["cpu_ms"], row["cpu_ms_min"]) == (20.0, 10.0)


def test_the_processor_clock_tells_work_from_sleep() -> None:
    import time

    wall, cpu = ProcessorClock().time(lambda: time.sleep(0.05), 2)
    assert wall >= 0.1 and cpu < 0.05
    assert timing.clock_for("cpu").device is False
