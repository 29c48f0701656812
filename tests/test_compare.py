"""The baselines in the same harness, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from compare import CONDITIONS, REFUSAL, adapted, compare, own_answers, unlikelihood
from conftest import rows

from rrs import RRS, RRSConfig
from rrs.data import load_examples

CONFIG = RRSConfig(
    conditions=CONDITIONS, epochs=2, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3, lora_dropout=0.0
)
TRAIN = {"harmful": load_examples(rows("harmful", 4)), "benign": load_examples(rows("benign", 4))}


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_all_methods_in_one_table(tiny, tmp_path):
    model, processor = tiny
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rrs = RRS(model, processor, CONFIG, verbose=False)
    test = {"harmful": load_examples(rows("harmful", 3)), "hard-benign": load_examples(rows("benign", 3))}
    report = compare(rrs, TRAIN, test, tmp_path, strengths=(0.5, 1.0), max_new_tokens=4, preflight=0)
    methods = ["vanilla", "system prompt", "steering ×0.5", "steering ×1"]
    methods += ["SFT basic", "SFT mirror", "SFT parallel", "RRS"]
    assert report.stages == methods
    assert len(report.answers) == 8 * 3 * 6
    changed = {(u["condition"], u["stage"]): u["kl"]["value"] for u in report.usefulness}
    assert {c for c, _ in changed} == set(CONDITIONS)
    assert all((kl > 1e-6) == (stage != "vanilla") for (_, stage), kl in changed.items())
    saved = json.loads((tmp_path / "report.json").read_text())
    assert set(saved["table"][0]["refused_change"]) == set(methods[1:])
    text = (tmp_path / "report.md").read_text()
    assert all(f"| audio-only | {method} |" in text for method in methods)
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2 : 2 + len(methods)]] == [f"| {m}" for m in methods]
    cells = lines[2].removesuffix(" |").split(" | ")
    rows_of = {(row["condition"], row["group"]): row for row in saved["table"]}
    for cell, group in zip(cells[1:], test, strict=False):
        shares = [rows_of[c, group]["refused"]["vanilla"]["value"] for c in CONDITIONS]
        assert cell == " / ".join(f"{100 * x:.0f}" for x in shares)
    assert cells[-1] == "0.00 / 0.00 / 0.00"
    # what is left on the model is RRS's adapter and nothing else
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    own = RRS(model, processor, CONFIG, verbose=False)
    prompts = [rrs.read(e, "text-only") for e in test["harmful"]]
    adapter = rrs.reader.represent(prompts)
    rrs.disable()
    assert torch.equal(own.reader.represent(prompts), rrs.reader.represent(prompts))
    loaded = RRS.load(tmp_path / "adapter", model, processor, verbose=False)
    assert torch.equal(loaded.reader.represent(prompts), adapter)


def test_fine_tuning_learns_its_answers(tiny):
    """The loss is the likelihood of the targets: they become likelier, in RRS's own loop."""
    rrs = RRS(*tiny, replace(CONFIG, epochs=60, penalty=0.0), verbose=False)
    pairs = own_answers(rrs, TRAIN["harmful"], "text-only", True, 12)
    assert all(REFUSAL.startswith(rrs.tokenizer.decode(ids[:12])) for _, ids in pairs)  # a random model can't refuse
    prompts, answers = [rrs.read(e, "text-only") for e, _ in pairs], [ids for _, ids in pairs]

    def loss() -> float:
        with torch.no_grad():
            return unlikelihood(rrs.reader, prompts, answers).item()

    vanilla = loss()
    rrs.train({"text-only": pairs}, objective=unlikelihood)
    trained, lora = loss(), rrs.lora
    assert trained < 0.8 * vanilla
    rrs.disable().lora = None
    with adapted(rrs, lora, "text-only"):
        assert loss() == trained
    assert loss() == vanilla


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_conditions_that_rrs_is_not_trained_in(tiny, tmp_path):
    """RRS learns from text alone; steering has a Δ of its own in each condition, SFT parallel is trained in each."""
    config = replace(CONFIG, conditions=("text-only",), epochs=1, refusal="I can't.", keep_tokens=2, keep_share=0.5)
    rrs = RRS(*tiny, config, verbose=False)
    settings = {"strengths": (1.0,), "max_new_tokens": 2, "preflight": 0}
    report = compare(rrs, TRAIN, TRAIN, tmp_path, **settings, dev=TRAIN, budget=1.0)
    assert "SFT basic ×" in report.notes[-1]
    assert "RRS ×" in report.notes[-1]
    assert rrs.record["calibrated"]["budget"] == 1.0
    assert rrs.record["config"]["penalty"] == config.penalty > 0  # RRS's, not the last SFT's
    changed = {(u["condition"], u["stage"]): u["kl"]["value"] for u in report.usefulness}
    kinds = ("steering ×1", "SFT parallel")
    assert len({changed[c, kind] for c in CONDITIONS for kind in kinds}) == 6
    assert list(rrs.targets) == ["text-only"]
    assert rrs.config == config


def test_a_condition_without_examples_is_named(tiny, tmp_path):
    written = {side: [replace(e, audio=None) for e in examples] for side, examples in TRAIN.items()}
    with pytest.raises(ValueError, match="audio-text: no harmful and no benign example to train on"):
        compare(RRS(*tiny, CONFIG, verbose=False), written, TRAIN, tmp_path)
