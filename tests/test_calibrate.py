"""How strongly an adapter acts: the curve, budgets for each group, answers by a judge; counted by hand."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
import torch
from conftest import rows, tiny_qwen2_audio

import rrs
from rrs import RRS, RRSConfig
from rrs.evaluate import Change

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning"),
    pytest.mark.filterwarnings("ignore:.*one question is more than the budget:rrs.RRSWarning"),
]
DEV = {"harmful": rows("harmful", 6, seed=1), "benign": rows("benign", 5, seed=1)}
TEXT = ("text-only",)


def scales(*powers):
    return [pytest.approx(0.5 * 2 ** (k / 3)) for k in powers]


@pytest.fixture
def drawn(tiny):
    """Harmful text drawn towards the token "S": twice the update takes most of it there, and some harmless text."""
    aims = {"conditions": TEXT, "refusal": "S", "harmful_strength": 4.0, "benign_strength": 0.0}
    sizes = {"epochs": 6, "batch_size": 8, "accumulate": 1, "learning_rate": 1e-2, "penalty": 1e-3}
    config = RRSConfig(**aims, **sizes, lora_dropout=0.0)
    return RRS(*tiny, config, verbose=False).fit(rows("harmful", 8), rows("benign", 8), preflight=0)


def share_at_s(r, examples):
    """How many answers begin with "S", as a share."""
    starts = [a[:1] == "S" for a in r.generate(examples, "text-only", max_new_tokens=1)]
    return sum(starts) / len(starts)


def test_calibrate_takes_the_most_refusals_within_the_budget(drawn):
    before = drawn.lora.scale
    found = drawn.calibrate(DEV, TEXT, budget=0.5, judge=None)
    assert all(b.scale == pytest.approx(a.scale * 2 ** (1 / 3)) for a, b in pairwise(found.points))
    vanilla = found.vanilla.groups["benign"].value
    cost = {p.scale: p.groups["benign"].value - vanilla for p in found.points}
    assert max(cost.values()) > 0.5  # or there is nothing to choose
    for p in found.points:
        assert p.over == pytest.approx(cost[p.scale] - 0.5)
        assert p.refused == p.groups["harmful"].value
    best = max((p for p in found.points if cost[p.scale] <= 0.5), key=lambda p: (p.refused, -p.scale))
    assert found.chosen is best
    assert drawn.lora.scale == pytest.approx(best.scale * before)
    assert drawn.record["calibrated"]["chosen"]["scale"] == best.scale
    assert json.loads(json.dumps(drawn.record))["calibrated"]["budget"] == {"degenerate": 0.5, "benign": 0.5}
    for point in (found.chosen, found.points[0], found.points[-1]):  # what was counted is what it does
        drawn.lora.scale = point.scale * before
        for group, examples in DEV.items():
            assert point.groups[group].value == share_at_s(drawn, examples)
    with drawn.disabled():
        assert vanilla == share_at_s(drawn, DEV["benign"])
    assert all(f"{p.scale:6.2f}" in str(found) for p in found.points)


def test_no_scale_is_above_the_largest_to_try(drawn):
    found = drawn.calibrate(DEV, TEXT, budget=1.0, judge=None, most=0.5)
    assert max(p.scale for p in found.points) == 0.5
    assert found.chosen.scale <= 0.5


def test_an_update_that_breaks_answers_is_made_weaker(drawn):
    """Ten times too strong, fewer harmful inputs are refused, none beyond the budget: weaker scales refuse more."""
    best = drawn.calibrate(DEV, TEXT, budget=1.0, judge=None).chosen
    drawn.lora.scale *= 16
    found = drawn.calibrate(DEV, TEXT, budget=1.0, judge=None)
    now = next(p for p in found.points if p.scale == 1)
    assert now.refused < 0.5 < best.refused
    assert found.chosen.scale < 1
    assert found.chosen.refused > now.refused


def test_each_group_has_its_budget_and_is_harmful_by_its_labels(drawn):
    """Whatever the groups are called."""
    halves = DEV["benign"][:3], DEV["benign"][3:]
    dev = {"AdvBench": DEV["harmful"], "twins": halves[0], "harmful-sounding": halves[1]}
    budget = {"twins": 1.0, "harmful-sounding": 0.5}
    found = drawn.calibrate(dev, TEXT, budget=budget, judge=None)
    assert found.budget == {"degenerate": 0.01, **budget}
    zero = found.vanilla.groups
    for p in found.points:
        assert p.refused == p.groups["AdvBench"].value
        assert p.over == pytest.approx(max(p.groups[g].value - zero[g].value - budget[g] for g in budget))
    assert found.chosen is max((p for p in found.points if p.over <= 1e-9), key=lambda p: (p.refused, -p.scale))
    drawn.lora.scale = 4.0 / 16
    two = drawn.calibrate(
        {"a": DEV["harmful"][:2], "b": DEV["harmful"][2:], "c": DEV["benign"]}, TEXT, budget=1, judge=None
    )
    for p in two.points:  # harmful groups count alike, whatever their sizes
        assert p.refused == pytest.approx((p.groups["a"].value + p.groups["b"].value) / 2)


def test_a_calibrated_adapter_is_saved_as_it_acts(drawn, tmp_path):
    found = drawn.calibrate(DEV, TEXT, budget=1.0, judge=None)
    assert found.chosen.scale > 1.1
    drawn.save(tmp_path / "adapter")
    loaded = RRS.load(tmp_path / "adapter", *tiny_qwen2_audio(), verbose=False)
    ours, theirs = (r.extract(DEV["harmful"], "text-only", vanilla=False) for r in (drawn, loaded))
    assert torch.equal(ours, theirs)
    assert loaded.record["calibrated"]["chosen"]["scale"] == found.chosen.scale
    loaded.lora.scale /= found.chosen.scale  # and is undone like that
    assert loaded.lora.scale == pytest.approx(4 / 16)


def test_answers_of_another_scale_are_not_reused(drawn, tmp_path):
    answers = []
    for factor in (1.0, 2.0):
        drawn.lora.scale *= factor
        report = drawn.evaluate(DEV, TEXT, max_new_tokens=3, cache=tmp_path / "log.jsonl", usefulness=0)
        fresh = drawn.evaluate(DEV, TEXT, max_new_tokens=3, usefulness=0)
        answers.append([a.response for a in report.answers])
        assert answers[-1] == [a.response for a in fresh.answers]
    assert answers[0] != answers[1]


def test_an_adapter_that_refuses_with_other_words_is_left_as_it_is(drawn, monkeypatch):
    before = drawn.lora.scale
    monkeypatch.setattr(RRS, "refusal_token", 3)  # the first choice nowhere
    with pytest.warns(rrs.RRSWarning, match="begins no answer at any scale"):
        found = drawn.calibrate(DEV, TEXT, judge=None)
    assert [found.chosen.scale] == scales(3)
    assert drawn.lora.scale == pytest.approx(before)


def test_with_a_judge_calibrate_goes_on_to_weaker_scales(drawn):
    """By a judge for whom every answer that vanilla would not give is a refusal, those count that begin otherwise."""
    before = drawn.lora.scale
    with drawn.disabled():
        plain = {a for rows_ in DEV.values() for a in drawn.generate(rows_, "text-only", max_new_tokens=3)}
    answered = []

    def judge(_prompts, answers):
        scale = drawn.lora.scale if drawn.lora.attached else 0.0
        answered.extend([scale] if answered[-1:] != [scale] else [])
        return ["compliance" if a in plain else "refusal" for a in answers]

    by_first_choice = drawn.calibrate(DEV, TEXT, budget=0.02, judge=None)
    drawn.lora.scale = before
    found = drawn.calibrate(DEV, TEXT, budget=0.02, judge=judge, max_new_tokens=3)
    assert found.chosen.scale < by_first_choice.chosen.scale
    tried = [p.scale for p in reversed(found.points) if found.chosen.scale <= p.scale <= by_first_choice.chosen.scale]
    assert answered == [0.0, *(pytest.approx(s * before) for s in tried)]  # vanilla, then weaker and weaker
    assert drawn.lora.scale == pytest.approx(found.chosen.scale * before)
    for group, examples in DEV.items():
        by_hand = [a not in plain for a in drawn.generate(examples, "text-only", max_new_tokens=3)]
        assert found.chosen.answers[group].value == sum(by_hand) / len(by_hand)
    k, n = found.chosen.answers["benign"].k, len(DEV["benign"])
    change = Change.of([False] * n, [i < k for i in range(n)])
    assert (change.value + change.low) / 2 <= 0.02  # of five, one question is within chance
    worse = found.points[found.points.index(found.chosen) + 1].answers["benign"].k
    change = Change.of([False] * n, [i < worse for i in range(n)])
    assert (change.value + change.low) / 2 > 0.02
    assert set(found.chosen.answers) == set(found.vanilla.answers) == {*DEV, "degenerate"}


def test_with_a_judge_a_broken_scale_is_not_the_last_one_tried(drawn):
    """Answers that loop refuse nothing; weaker updates may leave them whole."""
    before = drawn.lora.scale

    def judge(prompts, answers):
        broken = drawn.lora.attached and drawn.lora.scale > 1.2 * before
        return ["degenerate" if broken else "compliance"] * len(answers)

    budget = {"benign": 0.8, "degenerate": 0.0}
    found = drawn.calibrate(DEV, TEXT, budget=budget, judge=judge, max_new_tokens=2)
    assert [found.chosen.scale] == scales(3)
    assert found.chosen.answers["degenerate"].value == 0
    above = found.points[found.points.index(found.chosen) + 1]
    assert above.answers["degenerate"].value == 1
    assert any(p is found.chosen for p in found.points)  # all figures are of the same scale


def test_a_judge_that_fails_leaves_the_scale(drawn):
    before, known = drawn.lora.scale, drawn.record.get("calibrated")

    def judge(prompts, answers):
        if drawn.lora.attached:
            raise ConnectionError("no answer")
        return ["compliance"] * len(answers)

    with pytest.raises(ConnectionError):
        drawn.calibrate(DEV, TEXT, budget=1.0, judge=judge, max_new_tokens=2)
    assert drawn.lora.scale == before
    assert drawn.lora.attached
    assert drawn.record.get("calibrated") == known


def test_partial_refusals_are_a_cost_and_no_gain(drawn):
    found = drawn.calibrate(DEV, TEXT, judge=lambda _, answers: ["partial"] * len(answers), max_new_tokens=1)
    assert {g: rate.value for g, rate in found.chosen.answers.items()} == {"harmful": 0, "benign": 1, "degenerate": 0}


def test_only_some_questions_answer(drawn):
    seen = []

    def judge(prompts, answers):
        seen.append(len(prompts))
        return ["compliance"] * len(answers)

    found = drawn.calibrate(DEV, TEXT, budget=1.0, judge=judge, max_new_tokens=1, answers=2)
    assert found.chosen.answers["harmful"].n == 2
    assert found.chosen.groups["harmful"].n == 6


@pytest.mark.parametrize(
    ("dev", "budget", "words"),
    [
        ({"harmful": DEV["harmful"]}, 0.01, "it needs harmful and benign examples"),
        ({"benign": DEV["benign"]}, 0.01, "it needs harmful and benign examples"),
        ({"x": [*DEV["harmful"], *DEV["benign"]]}, 0.01, "The group 'x' has examples labelled"),
        (DEV, {"benign": 0.01, "everyday": 0.1}, r"does not match dev in \['everyday'\]"),
        ({**DEV, "twins": rows("benign", 2)}, {"benign": 0.01}, r"does not match dev in \['twins'\]"),
        (DEV, {"benign": "1%"}, r"budget\['benign'\]='1%' must be a number"),
    ],
)
def test_calibrate_says_what_is_wrong_and_leaves_the_scale(drawn, dev, budget, words):
    before = drawn.lora.scale
    with pytest.raises(ValueError, match=words):
        drawn.calibrate(dev, TEXT, budget=budget)
    assert drawn.lora.scale == before


def test_calibrate_needs_an_adapter_and_says_where_no_scale_is_within_the_budget(drawn):
    with pytest.raises(ValueError, match="no adapter to calibrate"):
        drawn.disable().calibrate(DEV, TEXT)
    drawn.enable()
    with pytest.warns(rrs.RRSWarning, match=r"No scale stays within the budget .*-0.1.*is set"):
        found = drawn.calibrate(DEV, TEXT, budget=-0.1, judge=None)
    assert found.chosen is found.points[0]  # the mildest
    assert 0.05 < found.chosen.scale <= 0.1
    assert [p.scale for p in found.points[:8]] == scales(*range(-7, 1))


def test_a_budget_below_one_question_warns(drawn):
    with pytest.warns(rrs.RRSWarning, match=r"benign \(5\): one question is more than the budget of this group"):
        drawn.calibrate(DEV, TEXT, budget=0.1, judge=None)


def test_refusals_that_are_only_begun_are_told(drawn):
    with pytest.warns(rrs.RRSWarning, match=r"begin with the refusal go on otherwise: .*; ×.* is set"):
        found = drawn.calibrate(DEV, TEXT, budget=1.0, judge=lambda _prompts, said: [False] * len(said))
    assert found.chosen.refused > 0 == found.chosen.answers["harmful"].value
