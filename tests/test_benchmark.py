"""The benchmark compares what does the same: both sides' losses agree, and steps are timed in turn."""

from __future__ import annotations

import time

import benchmark
import pytest
import torch

CPU = torch.device("cpu")


def test_both_sides_have_the_same_losses(tmp_path):
    setting = benchmark.Setting("tiny", CPU, tmp_path, n=16, steps=10)
    losses, seconds = benchmark.compare_fits(setting, {name: setting.load() for name in benchmark.FITS})
    assert len(losses["rrs"]) == len(losses["published"]) == setting.steps == 10
    assert losses["rrs"] == pytest.approx(losses["published"], abs=1e-5)
    assert losses["rrs"][0] != pytest.approx(losses["rrs"][-1], rel=1e-2)  # they move
    assert all(len(s) == setting.steps + 1 for s in seconds.values())  # what comes after the last step is a turn too


def test_runs_take_turns():
    log = []

    def run(name, n):
        def go(turn):
            for k in range(n):
                log.append((name, k))
                time.sleep(0.01)
                turn()
            return name

        return go

    results, seconds = benchmark.in_turn(CPU, run("a", 3), run("b", 5))
    assert results == ["a", "b"]
    assert log == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2), ("b", 3), ("b", 4)]
    assert [len(s) for s in seconds] == [4, 6]


def test_a_side_that_fails_stops_the_other():
    def fails(turn):
        turn()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        benchmark.in_turn(CPU, fails, lambda turn: [turn() for _ in range(5)])
