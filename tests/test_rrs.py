"""The public API on a tiny random Qwen2-Audio: settings, steps, items, the loop, use, and what stays untouched."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, assert_same, rows, tiny_qwen2_audio
from torch import nn
from torch.nn import functional as F

import rrs
from rrs import RRS, RRSConfig, RRSWarning, TrainItem, draw, make_items, select_features, squared, to_targets
from rrs.data import load_examples
from rrs.hooks import attached, linear_paths

THREE = ("audio-text", "text-only", "audio-only")
ONE = {"prompts": (RRSConfig().instruction,), "lora_dropout": 0.0}  # training as extraction asks


def small(**kwargs):
    """A configuration that trains a tiny model in seconds."""
    return RRSConfig(
        **{"epochs": 3, "batch_size": 3, "accumulate": 2, "learning_rate": 1e-2, "penalty": 1e-3, **kwargs}
    )


def prepared(r, harmful, benign, condition="audio-text"):
    """Steps 1 to 4."""
    return r.prepare(load_examples(harmful), load_examples(benign), condition)


def items_of(r, harmful, benign, condition="audio-text"):
    return prepared(r, harmful, benign, condition).items


@pytest.fixture
def fitted(tiny, harmful, benign):
    return RRS(*tiny, small(conditions=THREE), verbose=False).fit(harmful, benign, preflight=0)


# -- settings


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"top": 0}, "top=0"),
        ({"top": 101}, "top=101"),
        ({"top": "abc"}, "top='abc'"),
        ({"conditions": ("audio",)}, "conditions"),
        ({"conditions": "audio-text"}, "conditions"),
        ({"prompts": ()}, r"prompts=\(\) is empty"),
        ({"refusal": ""}, "refusal='' is empty"),
        ({"lora_r": 0}, "lora_r=0"),
        ({"direction": "loud"}, "direction='loud'"),
        ({"keep_share": 0.0, "keep_tokens": 4}, "keep_share=0.0"),
        ({"keep_share": 0.5}, "has no effect with keep_tokens=0"),
        ({"keep_tokens": -1}, "keep_tokens=-1"),
        ({"layers": (0.5, 0.2)}, "layers="),
        ({"epochs": 1.5}, "epochs=1.5"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"penalty": -1}, "penalty=-1"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"learning_rate": "5e-5"}, "learning_rate='5e-5' must be a number"),
        ({"seed": 1.0}, "seed=1.0 must be a whole number"),
        ({"layers": 0.5}, "layers=0.5 must be two numbers"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\) must lie in"),
        ({"top": None}, "top=None"),
        ({"conditions": None}, "conditions=None must be a sequence of strings"),
        ({"prompts": ("",)}, "holds an empty one"),
    ],
)
def test_config_rejects(kwargs, words):
    with pytest.raises(ValueError, match=words):
        RRSConfig(**kwargs)


def test_a_share_given_for_a_percentage_warns():
    with pytest.warns(RRSWarning, match=r"top=0.1 keeps 0.1 percent.*write 10\."):
        RRSConfig(top=0.1)


def test_a_config_that_is_a_dict_is_said(tiny):
    with pytest.raises(ValueError, match=r"config is a dict; make it an RRSConfig.*from_dict"):
        RRS(*tiny, {"top": 25})


def test_config_survives_json():
    scalars = {"penalty": np.float32(0.5), "epochs": np.int64(3), "top": np.float64(25), "lora_alpha": 8}
    config = RRSConfig(**scalars, conditions=list(THREE), layers=[0, 1])
    assert RRSConfig.from_dict(json.loads(json.dumps(vars(config)))) == config
    assert (type(config.lora_alpha), type(config.epochs), config.layers) == (float, int, (0.0, 1.0))
    config = RRSConfig(top=12.5, conditions=THREE)
    assert RRSConfig.from_dict(json.loads(json.dumps(vars(config)))) == config
    with pytest.raises(ValueError, match="no fields"):
        RRSConfig.from_dict({"learning_rat": 1})


def test_config_defaults_are_the_papers():
    c = RRSConfig()
    assert (c.lora_r, c.lora_alpha, c.lora_dropout, c.learning_rate, c.betas) == (16, 4, 0.1, 5e-5, (0.9, 0.98))
    assert (c.weight_decay, c.max_grad_norm, c.epochs, c.batch_size, c.accumulate) == (1e-3, 1.0, 10, 4, 2)
    assert (c.refusal, c.top, c.penalty, len(c.prompts)) == ("I", "positive", 1.0, 10)
    assert (c.harmful_strength, c.benign_strength, c.keep_tokens, c.keep_share) == (1, 1, 0, 1)
    assert (c.layers, c.system) == ((0, 1), None)
    assert c.direction == "delta"
    assert c.differences() == {}
    assert RRSConfig(top=25).differences() == {"top": 25}


# -- the method


@pytest.mark.filterwarnings("ignore:top=0.1 keeps:rrs.RRSWarning")
@pytest.mark.parametrize(("top", "kept"), [(12.5, 8), (25, 16), (50, 32), (100, 64), (0.1, 1)])
def test_selection_keeps_the_top_percent(top, kept):
    torch.manual_seed(0)
    delta, row = torch.randn(64), torch.randn(64)
    mask = select_features(delta, row, top)
    assert mask.dtype == torch.bool
    assert mask.sum() == kept
    assert (delta * row)[mask].min() >= (delta * row)[~mask].max() if kept < 64 else True


def test_selection_positive_and_own_scorer():
    torch.manual_seed(0)
    delta, row = torch.randn(64), torch.randn(64)
    assert torch.equal(select_features(delta, row), delta * row > 0)
    by_size = select_features(delta, row, 25, scorer=lambda d, _: d.abs())
    assert torch.equal(by_size.nonzero().flatten(), delta.abs().topk(16).indices.sort().values)


def test_selection_rejects():
    with pytest.raises(ValueError, match="must both be"):
        select_features(torch.ones(3), torch.ones(4))
    with pytest.raises(ValueError, match="NaN"):
        select_features(torch.tensor([1.0, math.nan]), torch.ones(2))
    with pytest.raises(ValueError, match="No feature"):
        select_features(-torch.ones(3), torch.ones(3))


def test_the_natural_direction_is_the_natural_gradient():
    """Against a literal Fisher matrix of the head; a step along it changes what the head says least."""
    g = torch.Generator().manual_seed(0)
    head, benign, move = (torch.randn(n, 16, generator=g) for n in (50, 40, 1))
    head, move = head * torch.linspace(0.1, 2, 16), move[0]  # as in real heads, some features say more than others
    fisher = torch.zeros(16, 16)
    for h in benign:
        p = (head @ h).softmax(0)
        fisher += head.T @ (torch.diag(p) - torch.outer(p, p)) @ head / len(benign)
    d = rrs.natural_direction(move, benign, head)
    literal = torch.linalg.inv(fisher + fisher.trace() / 16 * torch.eye(16)) @ move
    assert torch.allclose(d, literal * (move @ move) / (literal @ move), atol=1e-4)
    assert d @ move == pytest.approx(float(move @ move), rel=1e-4)

    def kl(step):
        before, after = ((x @ head.T).log_softmax(-1) for x in (benign, benign - 0.1 * step))
        return F.kl_div(after, before, log_target=True, reduction="batchmean")

    assert kl(d) < 0.5 * kl(move)
    assert torch.allclose(d, rrs.natural_direction(move, benign.repeat_interleave(3, 0), head, most=40), atol=1e-4)


def test_targets_along_the_natural_direction(tiny, harmful, benign):
    r = RRS(*tiny, small(harmful_strength=1.5, benign_strength=0.7), verbose=False)
    found = [prepared(r, harmful, benign)]
    r.config = replace(r.config, direction="natural")
    found.append(prepared(r, harmful, benign))
    vanilla, move = torch.cat([found[0].harmful, found[0].benign]), found[0].direction.delta * found[0].direction.mask
    goals = [torch.stack([i.target[0] for i in p.items]) for p in found]  # [n, hidden] each
    for side, strength in ((slice(6), 1.5), (slice(6, None), -0.7)):
        steps = [(goal - vanilla)[side] @ move for goal in goals]
        assert torch.allclose(steps[0], steps[1], rtol=1e-3)  # as far along Δ
        assert torch.allclose(steps[0], strength * (move @ move), rtol=1e-3)
    before, *after = (r.location.head(x[6:]).log_softmax(-1) for x in (vanilla, *goals))
    changes = [F.kl_div(now, before, log_target=True, reduction="batchmean") for now in after]
    assert changes[1] < changes[0]


# -- representations


@torch.no_grad()
def hidden_states(r, row, text, suffix=()):
    """Of one unpadded pass of the whole model over the processor's inputs: `[layers + 1, length, hidden]`."""
    inputs = r.render(text, load_examples([row])[0].clip[1](RATE))
    ids = torch.cat([inputs["input_ids"], torch.tensor([suffix], dtype=torch.long)], dim=1)
    full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return torch.cat(r.model(**full, output_hidden_states=True).hidden_states)


def test_extract_all_layers_is_the_full_models_and_in_order(tiny, harmful):
    r = RRS(*tiny, verbose=False)
    layers = r.extract(harmful, "audio-text", all_layers=True)
    assert layers.shape == (6, 3, 32)  # embeddings and two blocks
    for row, ours in zip(harmful, layers, strict=True):
        true = hidden_states(r, row, r.config.instruction)[:, -1]
        assert torch.allclose(ours[:-1], true[:-1], atol=1e-5)
        assert torch.allclose(r.location.norm(ours[-1]), true[-1], atol=1e-5)  # hidden_states ends behind the norm
    assert torch.allclose(r.location.norm(layers[:, -1]), r.extract(harmful, "audio-text"), atol=1e-5)
    backwards = r.extract(harmful[::-1], "audio-text", all_layers=True)
    assert torch.allclose(backwards.flip(0), layers, atol=1e-5)


def test_extract_is_of_vanilla_unless_asked(fitted, harmful):
    vanilla, adapted = (fitted.extract(harmful, "audio-text", vanilla=v) for v in (True, False))
    assert fitted.lora.attached
    assert torch.equal(fitted.disable().extract(harmful, "audio-text", vanilla=False), vanilla)
    assert not torch.allclose(vanilla, adapted)


def test_extract_along_is_the_full_models(tiny, harmful):
    r = RRS(*tiny, verbose=False)
    suffixes = [(1, 2, 3), (), (4,), (5, 6), (), (7, 8, 9)]
    found = r.extract_along(load_examples(harmful), "audio-text", suffixes, refusal_prompt=True)
    text = f"{r.config.instruction} {r.config.refusal_prompt}"
    for row, suffix, ours in zip(harmful, suffixes, found, strict=True):
        assert torch.allclose(ours, hidden_states(r, row, text, suffix)[-1, -len(suffix) - 1 :], atol=1e-4)


def test_extract_says_what_is_lacking(tiny, harmful):
    r = RRS(*tiny, verbose=False)
    with pytest.raises(ValueError, match=r"audio-only: 1 of 6 examples lack what it needs: \['harmful-0'\]"):
        r.extract([{**harmful[0], "audio": None}, *harmful[1:]], "audio-only")
    with pytest.raises(ValueError, match="condition='audio' is unknown"):
        r.extract(harmful, "audio")


def test_the_words_of_a_refusal_are_tokens(tiny):
    r = RRS(*tiny, RRSConfig(refusal="I can't"), verbose=False)
    ids = tuple(r.tokenizer("I can't", add_special_tokens=False)["input_ids"])
    assert r.token_ids("I can't") == ids
    assert r.refusal_token == ids[0]
    assert r.token_ids("") == ()
    assert torch.equal(r.head_row(ids[0]), r.model.lm_head.weight[ids[0]])


# -- items


def test_kept_tokens_are_the_models_own_answers(tiny, harmful, benign):
    """Beyond the prompt's end: the vanilla vectors along its answers to benign inputs; nothing for harmful ones."""
    r = RRS(*tiny, small(keep_tokens=3, **ONE), verbose=False)
    plain = RRS(*tiny, small(**ONE), verbose=False)
    items, paper = items_of(r, harmful, benign), items_of(plain, harmful, benign)
    assert [i.example.id for i in items] == [x["id"] for x in (*harmful, *benign)]
    assert all(torch.equal(i.target[0], p.target[0]) for i, p in zip(items, paper, strict=True))
    assert {(i.suffix, len(i.target)) for i in (*paper, *items[:6])} == {((), 1)}
    for row, item in zip(benign, items[6:], strict=True):
        assert len(item.suffix) == 3
        hidden = hidden_states(r, row, r.config.instruction, item.suffix)[-1]
        assert torch.allclose(item.target[1:], hidden[-3:], atol=1e-4)


def test_held_answers_are_the_tokens_the_model_chose(harmful, benign):
    """Token for token: decoded and read again, an answer would lose a line break at its end, or its end token."""
    r = RRS(*tiny_qwen2_audio(), small(keep_tokens=3), verbose=False)
    (newline,), end = r.token_ids("\n"), 79  # which this model says second, to one of them
    r.model.generation_config.eos_token_id = end
    with torch.no_grad():
        r.location.head_weight[newline] *= 100  # first choice wherever the product is positive
    items = items_of(r, harmful, benign)[len(harmful) :]
    for item in items:
        ids, chosen = r.read(item.example, "audio-text"), []
        while len(chosen) < 3 and end not in chosen:
            chosen.append(int(r.location.head(r.reader.represent([ids.extended(chosen)])).argmax()))
        assert item.suffix == tuple(chosen)
        assert len(item.target) == 1 + len(chosen)
    assert any(i.suffix[-1] == newline for i in items)
    assert any(i.suffix[-1] == end for i in items)


def test_a_refusal_in_words(harmful, benign):
    """Harmful inputs have targets along the words, as under the refusal prompt; benign ones along their answers."""
    config = small(refusal="I can't.", keep_tokens=2, epochs=12, **ONE)
    r = RRS(*tiny_qwen2_audio(), config, verbose=False)
    ids = r.tokenizer("I can't.", add_special_tokens=False)["input_ids"]
    items = items_of(r, harmful, benign)
    own = items_of(RRS(r.model, r.processor, small(keep_tokens=2, **ONE), verbose=False), harmful, benign)
    assert [i.suffix for i in items] == [tuple(ids)] * len(harmful) + [i.suffix for i in own[len(harmful) :]]
    assert all(torch.allclose(x.target[0], y.target[0], atol=1e-5) for x, y in zip(items, own, strict=True))
    pairs = list(zip(items, own, strict=True))[len(harmful) :]
    assert all(torch.allclose(x.target, y.target, atol=1e-4) for x, y in pairs)
    for item in items[: len(harmful)]:
        refused = r.read(item.example, "audio-text", refusal_prompt=True)
        alone = [r.reader.represent([refused.extended(ids[: k + 1])])[0] for k in range(len(ids))]
        assert torch.allclose(item.target[1:], torch.stack(alone), atol=1e-4)

    prompts = [r.read(i.example, "audio-text").extended(i.suffix) for i in items[: len(harmful)]]
    goal = torch.stack([i.target[1:] for i in items[: len(harmful)]])
    before = F.mse_loss(r.reader.represent(prompts, last=len(ids)), goal)
    r.fit(harmful, benign, preflight=0)
    assert F.mse_loss(r.reader.represent(prompts, last=len(ids)), goal) < 0.7 * before


def test_a_share_of_the_answers_is_held(tiny, harmful, benign):
    """keep_share: the benign inputs that are most likely to be refused, as many as it says, go along their answers, to
    the same vectors; the rest to one."""
    every = small(refusal="I can't.", keep_tokens=2)
    r = RRS(*tiny, every, verbose=False)
    found = prepared(r, harmful, benign)
    odds = r.model.lm_head(found.benign).softmax(-1)[:, r.refusal_token]
    nearest = {benign[i]["id"] for i in odds.topk(2).indices}
    r.config = replace(every, keep_share=0.4)
    part = items_of(r, harmful, benign)
    assert [i.example.id for i in part] == [i.example.id for i in found.items]
    lengths = {i.example.id: len(i.target) for i in part[len(harmful) :]}
    assert lengths == {row["id"]: 3 if row["id"] in nearest else 1 for row in benign}
    for some, item in zip(part, found.items, strict=True):
        assert some.suffix == item.suffix[: len(some.suffix)]
        assert torch.allclose(some.target, item.target[: len(some.target)], atol=1e-4)
    r.fit(harmful, benign, preflight=0)
    assert all(math.isfinite(row["loss"]) for row in r.history)


@pytest.mark.parametrize("most", [5, 400], ids=["one pass", "a prompt is shorter than that"])
def test_the_loss_of_prompts_with_different_numbers_of_targets(tiny, harmful, most):
    """Together, each counts as it does alone, at its own positions."""
    r = RRS(*tiny, small(), verbose=False)
    items = [
        TrainItem(e, "text-only", torch.randn(n, 32, generator=torch.Generator().manual_seed(n)), tuple(range(n - 1)))
        for e, n in zip(load_examples(harmful), [1, 3, most], strict=False)
    ]
    prompts = [r.read(i.example, "text-only").extended(i.suffix) for i in items]
    assert (most > len(prompts[0])) == (most == 400)
    for distance in (squared, lambda h, t: (h - t).abs().sum(-1)):
        alone = []
        for prompt, item in zip(prompts, items, strict=True):
            values = distance(r.reader.represent([prompt], last=len(item.target))[0], item.target)
            alone.append(values[0] + (values[1:].mean() if len(values) > 1 else 0))
        with torch.no_grad():
            assert torch.allclose(to_targets(r.reader, prompts, items, distance), torch.stack(alone), atol=1e-4)
    assert torch.allclose(squared(values, values + 2), torch.tensor(4.0))


def broken_item(example, **kwargs):
    return replace(TrainItem(example, "text-only", torch.zeros(1, 32)), **kwargs)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"target": torch.zeros(32)}, r"text-only harmful-0: the target \[32\] must be .*vector\[None\]"),
        ({"target": torch.zeros(1, 31)}, r"the target \[1, 31\] must be \[positions, 32\]"),
        ({"target": torch.zeros(0, 32)}, r"the target \[0, 32\]"),
        ({"target": torch.zeros(3, 32), "suffix": (1,)}, r"the target \[3, 32\] .*at most 2 positions"),
        ({"target": torch.full((1, 32), math.nan)}, "text-only harmful-0: the target holds NaN"),
        ({"target": torch.full((1, 32), math.inf)}, "the target holds NaN or infinity"),
        ({"condition": "audio-only"}, "audio-only harmful-0: the example lacks what this condition needs"),
    ],
)  # fmt: skip
def test_items_that_can_not_be_trained_on_are_named(tiny, harmful, kwargs, words):
    r = RRS(*tiny, small(), verbose=False)
    good, bad = load_examples([harmful[1], {**harmful[0], "audio": None}])
    with pytest.raises(ValueError, match=words):
        r.train([broken_item(good), broken_item(bad, **kwargs)])
    assert r.lora is None
    own = lambda reader, prompts, items: reader.last_hidden(prompts)[:, 0].square().mean(-1)  # noqa: E731
    if "shape" in words or "must be" in words or "0, 32" in words:  # an objective of one's own takes any target
        assert len(r.train([broken_item(bad, **kwargs)], objective=own).history) == 3


# -- the loop
