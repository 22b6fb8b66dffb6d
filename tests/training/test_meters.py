import json
from math import inf, nan

import pytest
import torch

from mars.training.meters import Meter, Pace, measured_peak, peak_memory

CPU = torch.device("cpu")


def test_means_are_over_the_steps_that_had_a_value() -> None:
    meter = Meter()
    for values in ({"a": 1.0, "b": 8.0}, {"a": 3.0}, {"a": nan, "b": inf}):
        meter.add(values)
    assert meter.means() == {"a": 2.0, "b": 8.0}
    assert Meter().means() == {}


def test_sums_survive_being_stored_to_the_bit() -> None:
    values = torch.rand(40, dtype=torch.float64).tolist()
    whole, first, second = Meter(), Meter(), Meter()
    for number, value in enumerate(values):
        whole.add({"loss": value})
        (first if number < 13 else second).add({"loss": value})
        if number == 12:
            second.load(json.loads(json.dumps(first.state())))
    assert second.means() == whole.means()


def test_a_pace_is_per_second_and_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("mars.training.meters.time.perf_counter", lambda: now[0])
    pace = Pace(peak=1000.0)
    for _ in range(2):
        pace.add(images=3, tokens=10, flops=500)
    now[0] += 4
    assert pace.per_second() == {"images_per_second": 1.5, "tokens_per_second": 5.0, "mfu": 0.25}
    pace.start()
    now[0] += 1
    assert set(pace.per_second().values()) == {0.0}


def test_what_a_device_can_do_is_a_speed() -> None:
    assert 1e8 < measured_peak(CPU, torch.float32) < 1e14


def test_memory_that_was_held_is_remembered() -> None:
    before = peak_memory(CPU)
    held = torch.ones(2**25)
    assert float(held[-1]) == 1
    assert 0.1 < before <= peak_memory(CPU)
