"""The baselines in the same harness, on a tiny random model."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import quickstart
import torch
from compare import CONDITIONS, DEMO, REFUSAL, adapted, compare, own_answers, unlikelihood
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


def test_the_demo_is_trained_where_steering_needs_it():
    assert set(CONDITIONS) <= set(replace(quickstart.CONFIG, **DEMO).conditions)


def test_steering_needs_a_direction(tiny, tmp_path):
    rrs = RRS(*tiny, RRSConfig(), verbose=False)
    with pytest.raises(ValueError, match=r"Steering needs Δ in \['text-only', 'audio-only'\]"):
        compare(rrs, TRAIN, TRAIN, tmp_path)
