"""Every kind of row trains and is measured, and finished rows are not run again."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from ablation import ROWS, ablate, chance, harmful_minus_benign, of_its_own, pair, plain, rows_for
from conftest import rows

from rrs import RRS, RRSConfig, contribution
from rrs.data import load_examples

pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
CONFIG = RRSConfig(
    conditions=("text-only",), epochs=1, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3, lora_dropout=0.0
)


def twins(n):
    """Harmful and benign questions that name each other, in two categories."""
    data = []
    for side, other in (("harmful", "benign"), ("benign", "harmful")):
        for i, row in enumerate(rows(side, n)):
            data.append({**row, "twin": f"{other}-{i}", "category": "ab"[i % 2]})
    return {side: load_examples(data, side) for side in ("harmful", "benign")}


def test_rows_train_and_go_on(tiny, tmp_path, monkeypatch):
    rrs = RRS(*tiny, CONFIG, verbose=False)
    names = ["base", "benign/KL", "delta", "where/upper half", "penalty/relative 100", "depth/2"]
    chosen = rows_for(CONFIG, names)
    assert list(chosen) == ["base", "benign/KL", *(n for n in ROWS if n.startswith("delta/")), *names[3:]]
    test = {"harmful": load_examples(rows("harmful", 2, 9)), "benign": load_examples(rows("benign", 2, 9))}

    def run(which):
        return ablate(rrs, which, twins(4), test, tmp_path, conditions=("text-only",), max_new_tokens=2, dev=test)

    done = run({name: chosen[name] for name in list(chosen)[:3]})
    done = run(chosen)
    assert [r["name"] for r in done] == list(chosen)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(chosen)
    assert all(r["moved"] > 0 and r["kl"] > 0 and 0 <= r["auc"]["benign"] <= 1 for r in done)
    assert len({r["moved"] for r in done}) == len(done)  # each is another adapter
    assert json.loads((tmp_path / "table.json").read_text()) == done
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(chosen) + 2  # below the head: rule, vanilla, rows
    monkeypatch.setattr(rrs, "train", None)
    assert run({"base": chosen["base"]}) == done[:1]  # the table keeps the others
    assert json.loads((tmp_path / "table.json").read_text()) == done
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    assert run(chosen) == done  # nothing is trained again
    assert rrs.config == CONFIG
    with pytest.raises(SystemExit, match="nowhere"):
        rows_for(CONFIG, ["nowhere"])


def test_a_delta_for_each_group(tiny, monkeypatch):
    held = {"refusal": "I can't.", "keep_tokens": 2, "keep_share": 0.3}  # some groups have no answer that is held
    rrs = RRS(*tiny, replace(CONFIG, top=100.0, **held), verbose=False)
    sides = twins(4)
    reps = rrs.extract(sides["harmful"], sides["benign"])
    monkeypatch.setattr(rrs, "train", lambda targets: vars(rrs).update(targets=targets))
    of_its_own(rrs, reps, ROWS["base"], pair)
    rep, goal = reps["text-only"], rrs.targets["text-only"]
    # With all features: from the twin's place.
    assert torch.allclose(goal.harmful, rep.harmful + rep.refused - rep.benign, atol=1e-5)
    assert torch.allclose(goal.benign, rep.benign - rep.refused + rep.benign, atol=1e-5)
    rrs.config = replace(rrs.config, direction="quiet")
    of_its_own(rrs, reps, ROWS["base"], pair)
    quiet = rrs.targets["text-only"].harmful - rep.harmful  # as far along its own Δ
    along = ((rep.refused - rep.benign) * quiet).sum(-1)
    assert torch.allclose(along, (rep.refused - rep.benign).square().sum(-1), rtol=1e-3)
    assert not torch.allclose(quiet, rep.refused - rep.benign, atol=1e-2)
    rrs.config = replace(rrs.config, direction="delta")
    of_its_own(rrs, reps, ROWS["base"], lambda e: e.category)
    delta = rep.refused[::2].mean(0) - rep.benign[::2].mean(0)
    assert torch.allclose(rrs.targets["text-only"].harmful[::2], rep.harmful[::2] + delta, atol=1e-5)
    of_its_own(rrs, reps, ROWS["base"], lambda e: e.label)  # no group has both sides: the Δ of all
    alone = rrs.targets["text-only"].harmful
    plain(rrs, reps, ROWS["base"])
    assert torch.equal(rrs.targets["text-only"].harmful, alone)
    harmful_minus_benign(rrs, reps, ROWS["base"])
    assert torch.allclose(rrs.targets["text-only"].delta, rep.harmful.mean(0) - rep.benign.mean(0), atol=1e-6)


def test_chance_keeps_as_many():
    delta, row = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    scores = chance(delta, row)
    assert (scores > 0).sum() == (contribution(delta, row) > 0).sum()
    assert not torch.equal(scores > 0, contribution(delta, row) > 0)
