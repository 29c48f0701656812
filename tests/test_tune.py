"""The search for settings, on a tiny random model and a judge that can see it move."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from conftest import rows, tiny_qwen2_audio

from rrs import RRS, RRSConfig, RRSWarning, _space, search_space
from rrs.data import DataError, hold_out, load_examples

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.filterwarnings("ignore:No trial:rrs.RRSWarning")
HARMFUL, BENIGN = rows("harmful", 8), rows("benign", 8)
CONFIG = RRSConfig(
    conditions=("text-only",), epochs=2, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3, lora_r=4
)
SPACE = {"learning_rate": (1e-3, 3e-2), "benign_strength": (0.0, 1.0), "depth": [1, 2], "top": ["positive", 50.0]}


def judge(_prompts, answers):
    return ["refusal" if sum(map(ord, a)) % 3 == 0 else "compliance" for a in answers]


def tune(trials, study=None, **kwargs):
    r = RRS(*tiny_qwen2_audio(), CONFIG, verbose=False)
    settings = {"search": SPACE, "judge": judge, "max_new_tokens": 3, "preflight": 0, **kwargs}
    return r.tune(HARMFUL, BENIGN, trials=trials, study=study, **settings)


def test_the_best_trial_comes_back_attached(tmp_path):
    r, study = tune(4, budget=0.5, plot=tmp_path / "plots" / "front.png")
    assert (tmp_path / "plots" / "front.png").stat().st_size > 10_000
    assert len(study.trials) == 4
    assert study.trials[0].params["learning_rate"] == CONFIG.learning_rate  # the given config goes first
    inside = [t for t in study.trials if t.user_attrs and t.user_attrs["cost"] <= 0.5]
    best = max(inside, key=lambda t: t.user_attrs["refused"] - 0.01 * t.user_attrs["kl"])
    assert {k: getattr(r.config, k) for k in SPACE} == best.params
    assert r.record["tuned"]["trial"] == best.number
    assert r.lora.attached
    held = hold_out([*load_examples(HARMFUL), *load_examples(BENIGN)])[1]
    report = r.evaluate(held, ("text-only",), judge=judge, max_new_tokens=3)
    for group in ("harmful", "benign"):
        assert report.rate(group, "text-only").value == best.user_attrs[group]
    assert report.usefulness[1]["kl"]["value"] == pytest.approx(best.user_attrs["kl"], abs=1e-4)


def test_answers_beyond_the_budget_are_tried_at_weaker_strengths():
    """The first choice is no refusal token anywhere, so strength 1 is where it begins."""
    calls = []

    def first_two_costly(_prompts, answers):
        calls.append(answers)
        n = len(calls)  # vanilla, then the first trial's strengths
        return ["refusal" if n in (2, 3) or (n == 4 and i < 2) else "compliance" for i in range(len(answers))]

    r = RRS(*tiny_qwen2_audio(), CONFIG, verbose=False)
    _, study = r.tune(
        HARMFUL, BENIGN, trials=1, search=SPACE, judge=first_two_costly, max_new_tokens=2, preflight=0, budget=0.1
    )
    tried = study.trials[0].user_attrs["tried"]
    assert [strength for strength, _, _ in tried] == [1.0, 0.8, 0.6]
    assert [cost for _, cost, _ in tried] == [1.0, 1.0, 0.0]  # the harmful group is answered first
    assert [refused for *_, refused in tried] == [1.0, 1.0, 1.0]
    assert study.trials[0].user_attrs["strength"] == 0.6 == r.record["tuned"]["dev"]["strength"]
    assert r.lora.scale == pytest.approx(0.6 * CONFIG.lora_alpha / CONFIG.lora_r)


def test_the_present_config_is_in_the_space_and_whole_bounds_of_a_share_are_a_range():
    config = replace(CONFIG, top=10.0, harmful_strength=5.0, benign_weight=0.5, depth=6)
    space = search_space(config)
    for name, values in space.items():
        own = getattr(config, name)
        assert own in values if isinstance(values, list) else values[0] <= own <= values[1], name
    found = _space(config, {"benign_strength": (0, 1), "depth": (1, 4)})
    assert isinstance(found["benign_strength"], optuna.distributions.FloatDistribution)
    assert isinstance(found["depth"], optuna.distributions.IntDistribution)


def test_whole_numbers_in_the_config_leave_ranges_ranges():
    space = _space(RRSConfig(penalty=1, benign_strength=0, harmful_strength=1), None)
    kinds = {type(space[name]).__name__ for name in ("penalty", "benign_strength", "harmful_strength")}
    assert kinds == {"FloatDistribution"}
    r, _ = tune(1, search={"top": (10.0, 50.0)})  # the config's own, "positive", lies outside
    assert 10 <= r.config.top <= 50


def test_a_group_that_the_conditions_leave_out_does_not_count():
    spoken_only = [{"id": f"x{i}", "audio": {"array": [0.1, -0.1] * 4000, "sampling_rate": 16000}} for i in range(2)]
    dev = {"harmful": rows("harmful", 3, seed=5), "hard-benign": spoken_only, "benign": rows("benign", 3, seed=5)}
    _, study = tune(1, dev=dev, budget=0.5)
    figures = study.trials[0].user_attrs
    assert "hard-benign" not in figures
    assert figures["cost"] == figures["cost"] <= 1  # not NaN, which no budget bounds


def test_a_trial_that_is_broken_off_is_run_again(tmp_path):
    def broken(_prompts, _answers):
        if len(answered) == 1:
            raise KeyboardInterrupt
        answered.append(1)
        return ["compliance"] * len(_answers)

    broken.name = judge.name = "one and the same"
    answered: list[int] = []
    try:
        with pytest.raises(KeyboardInterrupt):
            tune(1, tmp_path / "study.journal", budget=0.5, judge=broken)
        _, study = tune(1, tmp_path / "study.journal", budget=0.5)
    finally:
        del judge.name
    assert [t.state.name for t in study.trials] == ["FAIL", "COMPLETE"]
    assert study.trials[1].params["learning_rate"] == CONFIG.learning_rate


@pytest.mark.parametrize("name", ["study.journal", "study.db"])
def test_trials_go_on_where_they_stopped(name, tmp_path):
    """A second call runs the missing trials only, and its adapter, trained again, is the same bit for bit."""
    first, study = tune(2, tmp_path / name, budget=0.5)
    known = [t.params for t in study.trials]
    again, same = tune(2, tmp_path / name, budget=0.5)
    assert [t.params for t in same.trials] == known
    assert all(torch.equal(x, again.lora.tensors()[k]) for k, x in first.lora.tensors().items())
    assert again.history == first.history
    _, longer = tune(3, tmp_path / name, budget=0.5)
    assert [t.params for t in longer.trials][:2] == known
    assert len(longer.trials) == 3
    _, other = tune(1, tmp_path / name, budget=0.25)  # another problem is another study, in the same file
    assert len(other.trials) == 1


def test_nothing_within_the_budget_is_said_and_the_best_trade_returned():
    with pytest.warns(RRSWarning, match="No trial stays within the budget of -2"):
        r, study = tune(2, budget=-2)
    trades = {t.number: t.user_attrs["refused"] - 3 * (t.user_attrs["cost"] + 2) for t in study.trials}
    assert trades[r.record["tuned"]["trial"]] == max(trades.values())
    assert study.best_trial.number == r.record["tuned"]["trial"]


def test_unpromising_trials_end_early():
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.ThresholdPruner(lower=2.0))
    with pytest.raises(ValueError, match="No trial came to its end"):
        tune(2, study)
    assert [t.state.name for t in study.trials] == ["PRUNED", "PRUNED"]
    assert all(list(t.intermediate_values) == [1] for t in study.trials)  # after the first of two epochs


def test_an_error_leaves_the_adapter_before(harmful, benign):
    r = RRS(*tiny_qwen2_audio(), CONFIG, verbose=False)
    with pytest.warns(RRSWarning, match="Δ is mostly noise"):
        r.fit(harmful, benign, preflight=0)
    lora, before = r.lora, r.lora.tensors()

    def broken(_prompts, _answers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        r.tune(HARMFUL, BENIGN, trials=1, judge=broken, preflight=0)
    assert r.lora is lora
    assert lora.attached
    assert r.config == CONFIG
    assert all(torch.equal(x, before[k]) for k, x in r.lora.tensors().items())


def test_without_optuna_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "rrs\[tune\]"'):
        tune(1)


def test_without_matplotlib_a_plot_ends_the_search_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "rrs\[plot\]"'):
        tune(1, tmp_path / "study.journal", plot=tmp_path / "front.png")
    assert not (tmp_path / "study.journal").exists()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"search": {"learning_rat": (1, 2)}}, "search names 'learning_rat'"),
        ({"search": {"refusal_prompt": ["No.", "Never."]}}, "search names 'refusal_prompt'.*extracted once"),
        ({"search": {"top": (12.5, 25, 50)}}, r"top=\(12.5, 25, 50\) must be two numbers \(low, high\) or a list"),
        ({"search": {"direction": ("delta", "quiet")}}, "direction=.* or a list of choices"),
        ({"plot": "front.foo"}, "front.foo' must end in .png"),
        ({"dev": HARMFUL}, r"groups \['harmful'\]; it needs"),
    ],
)
def test_mistakes_are_named(kwargs, words):
    with pytest.raises(ValueError, match=words):
        tune(1, **kwargs)


def test_rows_that_are_numbered_alike(tmp_path):
    """Plain text has no ids: row 1 of one file has nothing to do with row 1 of the other."""
    for side in ("harmful", "benign"):
        (tmp_path / f"{side}.txt").write_text("".join(f"{row['text']} {i}\n" for i, row in enumerate(rows(side, 8))))
    r = RRS(*tiny_qwen2_audio(), CONFIG, verbose=False)
    files = tmp_path / "harmful.txt", tmp_path / "benign.txt"
    r.tune(*files, trials=1, search=SPACE, judge=judge, max_new_tokens=2, preflight=0)
    train, held = hold_out([*load_examples(files[0], "harmful"), *load_examples(files[1], "benign")])
    assert {(e.label, e.text) for e in train}.isdisjoint((e.label, e.text) for e in held)
    assert [sum(e.label == label for e in held) for label in ("harmful", "benign")] == [2, 2]
    assert len(train) == 12


def test_choosing_by_what_is_trained_on_is_noticed():
    with pytest.warns(RRSWarning, match="16 dev examples, or their twins, are trained on"):
        tune(1, dev={"harmful": HARMFUL, "benign": BENIGN})


def test_twins_named_by_numbers_are_held_out_together():
    harmful = [{"id": i, "text": f"h{i}", "label": "harmful", "twin": 100 + i} for i in range(8)]
    benign = [{"id": 100 + i, "text": f"b{i}", "label": "benign", "twin": i} for i in range(8)]
    train, held = hold_out(load_examples([*harmful, *benign]))
    assert {int(e.id) % 100 for e in train}.isdisjoint(int(e.id) % 100 for e in held)


def test_twins_and_voices_are_held_out_together():
    data = []
    for i in range(12):
        for voice in ("a", "b"):
            for side, other in (("harmful", "benign"), ("benign", "harmful")):
                twin = {"twin": f"{other}-{i}-{voice}", "question": f"{side}-{i}"}
                data.append({"id": f"{side}-{i}-{voice}", "text": f"{side} {i} {voice}", "label": side, **twin})
    examples = load_examples(data)
    kept, held = hold_out(examples)
    assert sorted(e.id for e in (*kept, *held)) == sorted(e.id for e in examples)
    assert {e.id.split("-")[1] for e in kept}.isdisjoint({e.id.split("-")[1] for e in held})
    assert [sum(e.label == side for e in held) for side in ("harmful", "benign")] == [6, 6]
    assert [e.id for e in hold_out(examples[::-1])[1]] == [e.id for e in held[::-1]]  # whatever their order
    with pytest.raises(DataError, match="too few"):
        hold_out(examples[:2])
