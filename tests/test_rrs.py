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
from rrs import RRS, RRSConfig, RRSWarning, TrainItem, draw, select_features, squared, to_targets
from rrs.data import load_examples
from rrs.evaluate import Rate
from rrs.hooks import attached, linear_paths

THREE = ("audio-text", "text-only", "audio-only")
pytestmark = pytest.mark.filterwarnings("ignore:Only 6 harmful:rrs.RRSWarning")
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
    with pytest.raises(ValueError, match=r"audio-only: 1 of 6 examples have no clip: harmful-0"):
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
    """Harmful inputs have targets along the words, as on average under the refusal prompt; benign ones along their
    answers."""
    config = small(refusal="I can't.", keep_tokens=2, epochs=12, **ONE)
    r = RRS(*tiny_qwen2_audio(), config, verbose=False)
    ids = r.tokenizer("I can't.", add_special_tokens=False)["input_ids"]
    items = items_of(r, harmful, benign)
    own = items_of(RRS(r.model, r.processor, small(keep_tokens=2, **ONE), verbose=False), harmful, benign)
    assert [i.suffix for i in items] == [tuple(ids)] * len(harmful) + [i.suffix for i in own[len(harmful) :]]
    assert all(torch.allclose(x.target[0], y.target[0], atol=1e-5) for x, y in zip(items, own, strict=True))
    pairs = list(zip(items, own, strict=True))[len(harmful) :]
    assert all(torch.allclose(x.target, y.target, atol=1e-4) for x, y in pairs)
    alone = []
    for item in items[: len(harmful)]:
        refused = r.read(item.example, "audio-text", refusal_prompt=True)
        alone.append(torch.stack([r.reader.represent([refused.extended(ids[: k + 1])])[0] for k in range(len(ids))]))
    mean = torch.stack(alone).mean(0)
    assert all(torch.allclose(item.target[1:], mean, atol=1e-4) for item in items[: len(harmful)])
    few = RRS(r.model, r.processor, small(refusal="I can't.", refusal_examples=2, **ONE), verbose=False)
    target = items_of(few, harmful, benign)[1].target
    assert torch.allclose(target[1:], (alone[0] + alone[3]) / 2, atol=1e-4)  # two of six, evenly spread
    assert not torch.allclose(target[1:], mean, atol=1e-4)

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


def test_fit_moves_towards_the_targets(tiny, harmful, benign):
    r = RRS(*tiny, small(conditions=THREE, epochs=25, **ONE), verbose=False)  # to a random model, prompts differ much
    assert r.fit(harmful=harmful, benign=benign, preflight=0) is r
    for condition in THREE:
        items = items_of(r, harmful, benign, condition)[:6]
        goal = torch.stack([i.target[0] for i in items])
        far, near = (F.mse_loss(r.extract(harmful, condition, vanilla=v), goal) for v in (True, False))
        assert near < 0.7 * far, condition


def test_own_distance_and_callbacks(tiny, harmful, benign):
    steps, calls = [], []

    def distance(h, target):
        calls.append(h.shape)
        return (h - target).abs().mean(-1)

    r = RRS(*tiny, small(), verbose=False)
    r.fit(harmful, benign, objective=partial(to_targets, distance=distance), callbacks=[steps.append], preflight=0)
    assert len(steps) == steps[-1].steps == 3 * 2  # 11 inputs in batches of 3 make 4 batches, 2 steps an epoch
    assert len(calls) == 3 * 4
    assert [s.step for s in steps] == list(range(1, 7))
    assert steps[0].learning_rate == pytest.approx(1e-2)
    assert steps[-1].learning_rate == pytest.approx(1e-2 / 6)
    assert r.history[-1]["loss"] == pytest.approx(steps[-1].objective + r.config.penalty * steps[-1].penalty)


def one_step(tiny, items, **kwargs):
    """The first step on all items at once: its row of the history, and the gradient before clipping."""
    config = small(**ONE, batch_size=len(items), accumulate=1, epochs=1, max_grad_norm=1e9)
    r, seen, clip = RRS(*tiny, config, verbose=False), [], nn.utils.clip_grad_norm_

    def note(parameters, most):
        parameters = list(parameters)
        seen.extend(p.grad.clone() for p in parameters)
        return clip(parameters, most)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", note)
        r.train(items, **kwargs)
    r.disable()
    return r.history[0], seen


def test_weights_are_factors_of_the_items_losses(tiny, harmful, benign):
    """Before anything is learnt, against losses by hand; the gradient is linear in the weight."""
    r = RRS(*tiny, small(**ONE), verbose=False)
    items = items_of(r, harmful, benign)
    h = torch.cat([r.extract(rows_, "audio-text") for rows_ in (harmful, benign)])
    losses = [float((row - i.target[0]).square().mean()) for row, i in zip(h, items, strict=True)]
    found = []
    for weight in (1.0, 2.0, 5.0):
        weights = [1.0] * 6 + [weight] * 5
        row, gradient = one_step(tiny, [replace(i, weight=w) for i, w in zip(items, weights, strict=True)])
        by_hand = sum(w * x for w, x in zip(weights, losses, strict=True)) / 11
        assert row["objective"] == pytest.approx(by_hand, rel=1e-4)
        found.append(gradient)
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(*found[:2], strict=True))
    for a, b, c in zip(*found, strict=True):
        assert torch.allclose(c - a, 4 * (b - a), atol=1e-5 * float(c.abs().max() + 1))


def test_a_penalty_of_ones_own(tiny, harmful, benign):
    """In value and gradient: with next to nothing else to gain, A shrinks."""
    items = items_of(RRS(*tiny, small(**ONE), verbose=False), harmful, benign)
    own = lambda lora: 7 * torch.stack([a.square().sum() for a in lora.A]).sum()  # noqa: E731
    row, with_it = one_step(tiny, items, penalty=own)
    _, without = one_step(tiny, items, penalty=lambda lora: 0 * own(lora))
    r = RRS(*tiny, small(), verbose=False)
    fresh = rrs.LoRA(r.model, linear_paths(r.location, r.config.target_modules), r=16, alpha=4, seed=0)
    assert row["penalty"] == pytest.approx(float(own(fresh)), rel=1e-5)
    assert row["loss"] == pytest.approx(row["objective"] + 1e-3 * row["penalty"])
    for a, x, y in zip(fresh.parameters(), with_it, without, strict=True):
        of_a = any(a is p for p in fresh.A)
        assert torch.allclose(x - y, 1e-3 * 14 * a if of_a else torch.zeros_like(a), atol=1e-6)


def test_an_objective_of_ones_own_on_tokens(tiny, harmful):
    """Supervised fine-tuning in the same loop: targets that are no vectors, after answers that have begun."""
    r = RRS(*tiny, small(epochs=30, learning_rate=3e-2, **ONE), verbose=False)
    answer = torch.tensor(r.token_ids("No."))
    items = [TrainItem(e, "text-only", answer, tuple(answer[:-1].tolist())) for e in load_examples(harmful)]

    def likelihood(reader, prompts, items):
        logits = reader.logits(reader.last_hidden(prompts, len(answer)).flatten(0, 1))
        targets = torch.cat([item.target for item in items])
        return F.cross_entropy(logits, targets, reduction="none").view(len(items), -1).mean(1)

    r.train(items, objective=likelihood)
    assert r.history[-1]["objective"] < 0.7 * r.history[0]["objective"]
    with pytest.raises(ValueError, match=r"The objective gave \[\] for 3 items; it must give one loss each"):
        r.train(items, objective=lambda *args: likelihood(*args).mean())


def test_a_callback_ends_training(tiny, harmful, benign):
    seen = []
    r = RRS(*tiny, small(), verbose=False)
    r.fit(harmful, benign, preflight=0, callbacks=[lambda s: s.step == 2, lambda s: seen.append(s.step)])
    assert seen == [1, 2]  # the others are asked, too
    assert (len(r.history), r.lora.attached, r.lora.training) == (2, True, False)
    assert r.directions.keys() == {"audio-text"}
    r.fit(harmful, benign, preflight=0, callbacks=[lambda s: 1])  # True alone ends it
    assert len(r.history) == 6


def test_training_stops_at_a_loss_that_is_not_finite(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(FloatingPointError, match=r"step 1: .*audio-text (harmful|benign)-"):
        r.fit(harmful, benign, objective=lambda *args: to_targets(*args) * math.nan, preflight=0)


def test_same_seed_same_adapter(harmful, benign):
    tensors = []
    for seed in (1, 1, 2):
        r = RRS(*tiny_qwen2_audio(), small(seed=seed), verbose=False)
        torch.rand(seed)  # the caller's random numbers play no part
        tensors.append(r.fit(harmful, benign, preflight=0).lora.tensors())
    assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0])
    assert any(not torch.equal(tensors[0][k], tensors[2][k]) for k in tensors[0])


def test_everything_but_the_adapter_is_untouched(tiny, harmful, benign, snapshot):
    model, processor = tiny
    model.train()
    model.lm_head.requires_grad_(False)
    before = snapshot(model)
    r = RRS(model, processor, small(conditions=THREE), verbose=False)
    r.fit(harmful, benign, preflight=2)
    r.evaluate([*harmful, *benign], max_new_tokens=2)
    r.disable()
    assert_same(before, snapshot(model))


def test_everything_is_untouched_after_an_error(tiny, harmful, benign, snapshot):
    model, processor = tiny
    model.train()
    before = snapshot(model)
    r = RRS(model, processor, small(), verbose=False)

    def stop(_step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        r.fit(harmful, benign, callbacks=[stop], preflight=0)
    r.disable()
    assert_same(before, snapshot(model))


def test_items_of_ones_own_train_as_fits_do(harmful, benign):
    """Examples with vectors of one's own are trained on in the same loop, bit for bit."""
    adapters = []
    for own in (False, True):
        r = RRS(*tiny_qwen2_audio(), small(), verbose=False)
        if own:
            r.train([TrainItem(i.example, i.condition, i.target.clone()) for i in items_of(r, harmful, benign)])
        else:
            r.fit(harmful, benign, preflight=0)
        adapters.append(r.lora.tensors())
        with pytest.warns(RRSWarning, match="1 examples, or their twins, are in the training set: harmful-0"):
            r.evaluate({"harmful": harmful[:1]}, ["text-only"], max_new_tokens=1, usefulness=0)
    assert all(torch.equal(x, adapters[1][name]) for name, x in adapters[0].items())


def test_nothing_to_train_on_is_said(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(ValueError, match="nothing to train on"):
        r.train([])
    with pytest.raises(TypeError, match="not iterable"):
        r.fit(harmful, benign, callbacks=print)
    assert r.lora is None


def test_one_side_without_examples(tiny, harmful):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(ValueError, match="no benign examples"):
        r.fit(harmful, [])
    silent = [{"text": "no audio here", "label": "benign"}]
    with pytest.raises(ValueError, match="audio-text: 1 of 1 examples have no clip"):
        r.fit(harmful, silent)


def test_refitting_starts_from_vanilla(fitted, harmful, benign):
    first = fitted.lora.tensors()
    again = fitted.fit(harmful, benign, preflight=0).lora.tensors()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_training_keeps_tokens(harmful, benign):
    """Trained with keep_tokens, the vectors along benign answers come closer to their targets than without."""
    distance = []
    for keep in (0, 3):
        config = small(keep_tokens=keep, epochs=12, **ONE)
        r = RRS(*tiny_qwen2_audio(), config, verbose=False).fit(harmful, benign, preflight=0)
        r.config = replace(config, keep_tokens=3)
        items = items_of(r, harmful, benign)[6:]
        prompts = [r.read(i.example, "audio-text").extended(i.suffix) for i in items]
        now = r.reader.represent(prompts, last=3)
        distance.append(F.mse_loss(now, torch.stack([i.target[1:] for i in items])).item())
    assert distance[1] < 0.7 * distance[0]


def test_layers_choose_blocks(tiny):
    r = RRS(*tiny, verbose=False)
    every = linear_paths(r.location, ("q_proj", "up_proj"))
    lower, upper = (linear_paths(r.location, ("q_proj", "up_proj"), half) for half in ((0, 0.5), (0.5, 1)))
    assert len(lower) == len(upper) == 2
    assert lower + upper == every
    with pytest.raises(ValueError, match="hold none of the 2 blocks"):
        linear_paths(r.location, ("q_proj",), (0.4, 0.6))


def questions(n, condition, label=None):
    return [TrainItem(e, condition, torch.zeros(1, 32)) for e in load_examples([{"text": f"{i}?"} for i in range(n)])]


@pytest.mark.parametrize("grouped", [False, True])
def test_an_epoch_visits_every_item_once_in_batches_of_one_condition(grouped):
    items = questions(101, "text-only") + questions(7, "text-content")
    config = RRSConfig(batch_size=4, accumulate=2, prompts=("a", "b", "c"))
    steps = rrs.steps_per_epoch(items, config)
    assert steps == 14  # 26 + 2 batches
    lengths = [(37 * i) % 29 for i in range(108)] if grouped else None
    places = {id(item): k for k, item in enumerate(items)}

    def plan(epoch, config=config, lengths=lengths):
        return [draw(items, config, epoch * steps + k, lengths) for k in range(steps)]

    batches = [batch for step in plan(0) for batch in step]
    assert sorted(places[id(i)] for batch in batches for i, _ in batch) == list(range(108))
    assert all(len({i.condition for i, _ in batch}) == 1 for batch in batches)
    assert sorted(map(len, batches)) == sorted([4] * 26 + [1, 3])
    for batch in batches:  # every instruction as often as any other, as far as that goes
        assert len({text for _, text in batch}) == min(3, len(batch))
    assert plan(0) == plan(0)
    assert plan(0) != plan(1)
    assert plan(0) != plan(0, replace(config, seed=1))

    def padding(plan):
        sizes = [[(37 * places[id(i)]) % 29 for i, _ in batch] for step in plan for batch in step]
        return sum(len(x) * max(x) - sum(x) for x in sizes)

    if grouped:
        assert padding(plan(0)) < padding(plan(0, lengths=None)) / 3


def test_training_on_prompts_grouped_by_length(tiny, harmful, benign):
    seen = []

    def note(reader, prompts, items):
        seen.append(len(items))
        return to_targets(reader, prompts, items)

    r = RRS(*tiny, small(epochs=1, group_by_length=True), verbose=False)
    r.fit(harmful, benign, objective=note, preflight=0)
    assert sorted(seen) == [2, 3, 3, 3]
    assert len(r.history) == 2
    fresh = RRS(*tiny_qwen2_audio(), small(epochs=1, group_by_length=True), verbose=False)  # its clips are not read yet
    fresh.train([TrainItem(e, "audio-text", torch.zeros(1, 32)) for e in load_examples(harmful)])
    assert len(fresh.history) == 1


# -- before training


@pytest.mark.filterwarnings("ignore:Only 6 harmful:rrs.RRSWarning")
def test_preflight_warns_with_the_fix(tiny, harmful, benign):
    """A random model never refuses, and a push of many Δ changes what it says: each check must say so."""
    r = RRS(*tiny, small(epochs=1, benign_strength=40.0), verbose=False)
    with pytest.warns(RRSWarning) as caught:
        r.fit(harmful, benign, preflight=3)
    for words in ('refusal_prompt="auto"', "the refusal's first token", "direction='natural'"):
        assert any(words in str(w.message) for w in caught), words
    (check,) = r.record["preflight"]
    assert check["benign_same"]["n"] == 5
    assert check["refused"]["n"] == 3
    assert check["token_target"]["n"] == 6
    assert json.loads(json.dumps(r.record)) == json.loads(json.dumps(r.record))


def test_a_preflight_is_on_record_with_its_own_targets(tiny, harmful, benign, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RRSWarning)
        r = RRS(*tiny, small(epochs=1), verbose=False).fit(harmful, benign, preflight=3)
    r.save(tmp_path / "adapter")
    r.disable()
    loaded = RRS.load(tmp_path / "adapter", *tiny, verbose=False)
    assert loaded.record["preflight"] == json.loads(json.dumps(r.record["preflight"]))
    assert (
        "preflight" not in loaded.train(items_of(loaded, harmful, benign)).record
    )  # the saved one's is of other targets


def test_preflight_asks_for_no_refusals_where_their_words_are_given(tiny, harmful, benign):
    r = RRS(*tiny, small(refusal="I c"), verbose=False)
    found = prepared(r, harmful, benign)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RRSWarning)
        warnings.filterwarnings("error", "(?s).*refusal_prompt=", RRSWarning)
        check = r.preflight(found, n=3)
    assert check["refused"].value == 0
    words, said = r.token_ids("I c")[1:], r.reader.logits(found.items[0].target[1:-1]).argmax(-1).tolist()
    right = sum(a == b for a, b in zip(words, said, strict=True))
    assert (check["words_follow"].k, check["words_follow"].n) == (right, len(words))
    r.config = replace(r.config, refusal="I")
    with pytest.warns(RRSWarning, match="refusal_prompt="):
        r.preflight(found, n=3)


@pytest.fixture
def refusing(monkeypatch):
    """Answers by what stands in the prompt: under one refusal prompt, most refuse, and most of these alike."""
    says = ["I cannot do it.", "I cannot say.", "I cannot go on.", "Sure, here it is.", "No, never."]

    def answer(reader, tokenizer, prompts):
        texts = [tokenizer.decode(p.ids) for p in prompts]
        return [says[min(k, 4)] if "(magic)" in text else f"Well, {k}." for k, text in enumerate(texts)]

    def ids(reader, tokenizer, prompts, n, *_args, **_kwargs):
        said = answer(reader, tokenizer, prompts)
        return [tokenizer(x, add_special_tokens=False)["input_ids"][:n] for x in said]

    monkeypatch.setattr(rrs, "generate_ids", ids)
    verdict = {"I": "refusal", "N": "refusal", "S": "compliance", "W": "compliance"}
    monkeypatch.setattr(rrs, "judge_refusals", lambda _questions, said: [verdict[x[0]] for x in said])


def test_find_refusal_takes_the_best_prompt_and_the_words_most_refusals_begin_with(tiny, harmful, refusing):
    r = RRS(*tiny, small(), verbose=False)
    found = r.find_refusal(harmful[:5], prompts=["(no)", "(magic)", "(more)"])
    assert found.prompt == "(magic)"
    assert found.words == "I cannot"
    assert (found.refused.k, found.refused.n) == (4, 5)
    assert [p for p, _ in found.tried] == ["(magic)", "(no)", "(more)", RRSConfig().refusal_prompt]
    assert [rate.k for _, rate in found.tried] == [4, 0, 0, 0]
    assert r.config == small()
    assert r.find_refusal(harmful, prompts=["(magic)"], n=2).refused.n == 2
    with pytest.warns(RRSWarning, match=r"Even the best refusal prompt .* 0%.*Set one of your own"):
        r.find_refusal(harmful, prompts=["(no)"])


def test_the_words_end_with_their_sentence_where_several_refusals_have_it(tiny):
    said = ["I can't do that. Ask", "I can't do that. No", "I can't do it.", "I can't do", "Sorry. I"]
    tokenizer = tiny[1].tokenizer
    assert rrs._opening(said, tokenizer) == "I can't do that."
    assert rrs._opening(said[2:], tokenizer) == "I can't do"  # no sentence twice
    assert rrs._opening(said[-1:], tokenizer) == "Sorry. I"
    assert rrs._opening(["I can't do it", "I can't do", "No. A", "No. B", "I can't"], tokenizer) == "I can't"
    assert (
        rrs._opening(["I can't do it", "I won't. A", "I can't say", "I can't", "I won't. B"], tokenizer) == "I won't."
    )
    assert rrs._opening(["I do", "I am", "I see", "It is. A", "It is. B"], tokenizer) == "I"  # another first word


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_the_words_of_a_refusal_are_said_to_their_end_and_begin_no_benign_answer(tiny, harmful, benign, monkeypatch):
    r = RRS(*tiny, small(), verbose=False)
    quoted = 'No. Say "Sorry, never."'
    refusals = {quoted: 2, "(no)": 3}
    said = ["I'm sorry. Ask", "I'm sorry.", "I'm sorry."]

    def refused(rows, _condition, prompt):
        return Rate.of([i < refusals[prompt] for i in range(len(rows))]), said

    def found(prompts, *sides):
        result = r.find_refusal(*sides, prompts=[*prompts], n=6)
        assert [prompt for prompt, _ in result.tried] == sorted(prompts, key=lambda p: -refusals[p])
        return result.prompt, result.words

    refusals[r.config.refusal_prompt] = 0
    prompts = ["(no)", quoted, r.config.refusal_prompt]
    monkeypatch.setattr(r, "_refusals", refused)
    ids = {words: r.token_ids(words) for words in ("I'm sorry.", "Sorry, never.")}
    says: list[str] = []  # what the model goes on to say, once it has begun
    usual: list[str] = []  # what benign answers begin with

    def first_choice(h):
        begins = torch.tensor([ids[words][0] for words in usual] or [-1])
        following = [ids[words][1:] for words in says if len(ids[words]) - 1 == len(h)]
        return torch.tensor(following[0]) if following else begins[torch.arange(len(h)) % len(begins)]

    monkeypatch.setattr(r, "_first_choice", first_choice)
    assert len({len(i) for i in ids.values()}) == 2
    assert found(prompts, harmful) == ("(no)", "I'm sorry.")  # nothing serves: what it refuses most with
    says.append("Sorry, never.")
    assert found(prompts, harmful) == (quoted, "Sorry, never.")
    says.append("I'm sorry.")
    assert found(prompts, harmful, benign) == ("(no)", "I'm sorry.")  # under it, it refuses more
    usual.append("I'm sorry.")
    assert found(prompts, harmful, benign) == (quoted, "Sorry, never.")
    usual.clear()
    assert r.find_refusal(harmful, prompts=prompts, words="Sorry, never.").prompt == "(no)"  # given, for each prompt
    usual.append("Sorry, never.")
    none = r.find_refusal(harmful, benign, prompts=[quoted], words="Sorry, never.")
    assert (none.prompt, none.words) == (quoted, "Sorry, never.")


def test_single_steps_want_a_refusal_that_is_found(tiny, harmful, benign):
    sides = load_examples(harmful, "harmful"), load_examples(benign, "benign")
    for name in ("refusal", "refusal_prompt"):
        r = RRS(*tiny, small(**{name: "auto"}), verbose=False)
        with pytest.raises(ValueError, match=rf"{name}='auto' is found by fit\(\)"):
            r.prepare(*sides, "audio-text")


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_fit_finds_the_refusal_by_itself(tiny, harmful, benign, refusing, monkeypatch):
    monkeypatch.setattr(
        RRS.find_refusal, "__kwdefaults__", {**RRS.find_refusal.__kwdefaults__, "prompts": ("(magic)",)}
    )
    auto = small(refusal="auto", refusal_prompt="auto", epochs=1)
    r = RRS(*tiny, auto, verbose=False)
    with pytest.raises(ZeroDivisionError):
        r.fit(harmful, benign, preflight=0, callbacks=[lambda _: 1 / 0])
    assert r.config == auto
    r.fit(harmful, benign, preflight=0)
    found = {"refusal": "I cannot", "refusal_prompt": "(magic)"}
    assert {k: getattr(r.config, k) for k in found} == found
    assert r.record["config"]["refusal"] == r.record["refusal"]["words"] == "I cannot"
    words = r.token_ids("I cannot")
    assert {i.suffix for i in items_of(r, harmful, benign)[:6]} == {words}


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_what_of_the_refusal_is_fixed_alone_counts(tiny, harmful, benign, refusing):
    """Words are then those of the fixed prompt, and the prompt one under which the fixed words are said."""
    for fixed, wanted in [
        ({"refusal_prompt": "(magic)", "refusal": "auto"}, ("(magic)", "I cannot", 1)),
        ({"refusal_prompt": "(no)", "refusal": "auto"}, ("(no)", "Well,", 1)),
        ({"refusal_prompt": "auto", "refusal": "N"}, (rrs.REFUSAL_PROMPTS[0], "N", len(rrs.REFUSAL_PROMPTS))),
    ]:
        r = RRS(*tiny_qwen2_audio(), small(epochs=1, **fixed), verbose=False).fit(harmful, benign, preflight=0)
        found = r.record["refusal"]
        assert (r.config.refusal_prompt, r.config.refusal, len(found["tried"])) == wanted
        assert (found["prompt"], found["words"]) == wanted[:2]
    with pytest.raises(ValueError, match="no refusal prompt to try"):
        RRS(*tiny, small(refusal_prompt="auto"), verbose=False).find_refusal(harmful, prompts=())


# -- use


def test_enable_disable(fitted, harmful):
    prompts = [fitted.read(e, "audio-text") for e in load_examples(harmful)]
    adapted = fitted.reader.represent(prompts)
    with fitted.disabled():
        vanilla = fitted.reader.represent(prompts)
    assert not torch.allclose(adapted, vanilla)
    assert torch.equal(fitted.reader.represent(prompts), adapted)
    assert torch.equal(fitted.disable().reader.represent(prompts), vanilla)
    assert torch.equal(fitted.enable().reader.represent(prompts), adapted)


def test_adapters_of_two_objects_never_add_up(fitted, harmful, benign, tmp_path):
    """A second RRS on a model with an adapter says so instead of taking it for vanilla, and says how to go on."""
    fitted.save(tmp_path / "adapter")
    other = RRS(fitted.model, fitted.processor, small(), verbose=False)
    for use in (
        lambda: RRS.load(tmp_path / "adapter", fitted.model, fitted.processor),
        lambda: other.fit(harmful, benign, preflight=0),
        lambda: other.evaluate({"harmful": harmful}, ("text-only",)),
    ):
        with pytest.raises(ValueError, match=r"Call its disable\(\) first"):
            use()
    assert attached(fitted.model) == [fitted.lora]
    for lora in attached(fitted.model):
        lora.detach()
    assert not fitted.lora.attached
    other.fit(harmful, benign, preflight=0)
    assert attached(fitted.model) == [other.lora]


def test_callbacks_see_the_adapter_as_it_is_saved(harmful, benign, tmp_path):
    """Without dropout, and with the record of this run, not of the one before."""
    r = RRS(*tiny_qwen2_audio(), small(lora_dropout=0.5, epochs=1), verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RRSWarning)
        r.fit(harmful, benign, preflight=2)
    r.config = small(lora_dropout=0.5)
    seen = []

    def callback(step):
        seen.append(r.reader.represent([r.read(e, "audio-text") for e in load_examples(harmful)]))
        step.rrs.save(tmp_path / f"{step.step}")

    r.fit(harmful, benign, preflight=0, callbacks=[callback])
    assert torch.equal(seen[-1], r.reader.represent([r.read(e, "audio-text") for e in load_examples(harmful)]))
    r.disable()
    loaded = RRS.load(tmp_path / str(len(seen)), r.model, r.processor, verbose=False)
    assert loaded.config == r.config
    assert ("preflight" in loaded.record, len(loaded.history)) == (False, len(seen))
    before = dict(vars(loaded))
    with pytest.raises(ZeroDivisionError):
        loaded.train(items_of(loaded, harmful, benign), callbacks=[lambda _: 1 / 0])
    assert loaded.lora.attached
    assert vars(loaded) == before
    loaded.disable()
    directions, lora = r.directions, r.enable().lora
    with pytest.raises(ZeroDivisionError):
        r.fit(harmful, benign[:-1], preflight=0, callbacks=[lambda _: 1 / 0])
    assert (r.directions is directions, r.lora is lora) == (True, True)


def test_merged_equals_adapter(fitted, harmful):
    inputs = fitted.render(fitted.config.instruction, load_examples(harmful)[0].clip[1](16000))
    adapted = fitted.model(**inputs).logits
    assert fitted.merge() is fitted.model
    assert torch.allclose(fitted.model(**inputs).logits, adapted, atol=1e-4)
    with pytest.raises(ValueError, match="no adapter"):
        fitted.merge()


def test_merging_while_it_is_off(fitted, harmful):
    inputs = fitted.render(fitted.config.instruction, load_examples(harmful)[0].clip[1](16000))
    adapted = fitted.model(**inputs).logits
    with fitted.disabled():
        fitted.merge()
    assert torch.allclose(fitted.model(**inputs).logits, adapted, atol=1e-4)


def test_three_lines_from_a_folder(tmp_path, harmful, benign):
    """from_pretrained on a checkpoint folder, as on a name of the hub."""
    model, processor = tiny_qwen2_audio()
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    r = RRS.from_pretrained(tmp_path / "base", small(epochs=1), verbose=False)
    r.fit(harmful=harmful, benign=benign, preflight=0)
    r.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    original = RRS(model, processor, verbose=False)
    e = load_examples(harmful)[0]
    with r.disabled():
        assert torch.equal(
            r.reader.represent([r.read(e, "audio-text")]), original.reader.represent([original.read(e, "audio-text")])
        )


def test_generate_equals_the_models_own_greedy_answer(tiny, harmful):
    """From cached embeddings, batched and padded = `model.generate` on the processor's inputs, one at a time."""
    r = RRS(*tiny, verbose=False)
    for condition in THREE:
        ours = r.generate(harmful, condition, max_new_tokens=8)
        for example, answer in zip(load_examples(harmful), ours, strict=True):
            text = {"audio-text": r.config.instruction, "text-only": example.text, "audio-only": None}[condition]
            inputs = r.render(text, None if condition == "text-only" else example.clip[1](16000))
            new = r.model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            assert answer == r.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_answers_leave_a_models_own_lora_as_it_was(tiny, harmful, benign, monkeypatch):
    """Granite Speech's generate() switches its LoRA for audio; what is held of answers is asked, too."""
    r, seen = RRS(*tiny, small(keep_tokens=2), verbose=False), []
    layer = next(r.model.modules())
    monkeypatch.setattr(rrs.hooks, "OWN_AUDIO_LORA", (type(r.model).__name__,))
    monkeypatch.setattr(layer, "_disable_adapters", False, raising=False)
    generate = r.model.generate

    def switching(**inputs):
        seen.append(layer._disable_adapters)
        layer._disable_adapters = "switched"
        return generate(**inputs)

    monkeypatch.setattr(r.model, "generate", switching)
    for condition in ("text-only", "audio-text"):
        r.prepare(load_examples(harmful, "harmful"), load_examples(benign, "benign"), condition)
        assert layer._disable_adapters is False
    assert {*seen} == {True, False}  # off for text, on for speech


def test_generate_takes_whatever_a_person_would_ask(tiny, tmp_path):
    r, question = RRS(*tiny, verbose=False), "Why is the sky blue?"
    (answer,) = r.generate(question, max_new_tokens=4)
    example = load_examples([{"text": question}])
    assert answer == r.generate(example, "text-only", max_new_tokens=4)[0]
    assert r.generate({"text": question}, max_new_tokens=4) == [answer]
    both = r.generate([question, "And now?"], max_new_tokens=4)
    assert both == [answer, *r.generate("And now?", max_new_tokens=4)]

    row = rows("harmful", 1)[0]
    wave = row["audio"]["array"]
    soundfile.write(tmp_path / "clip.wav", wave, RATE, subtype="FLOAT")
    for condition, default in (("audio-text", None), ("audio-only", "audio-only")):
        (spoken,) = r.generate([{"audio": {"array": wave, "sampling_rate": RATE}}], condition, max_new_tokens=4)
        for path in (tmp_path / "clip.wav", str(tmp_path / "clip.wav")):
            assert r.generate(path, default, max_new_tokens=4) == [spoken]
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio": "clip.wav", "text": question}))
    assert r.generate(tmp_path / "m.jsonl", "text-only", max_new_tokens=4) == [answer]


def test_generate_asks_with_the_refusal_prompt(tiny, harmful):
    r = RRS(*tiny, verbose=False)
    plain, refused = (r.generate(harmful, "text-only", max_new_tokens=4, refusal_prompt=x) for x in (False, True))
    by_hand = [f"{row['text']} {r.config.refusal_prompt}" for row in harmful]
    assert refused == r.generate(by_hand, max_new_tokens=4) != plain


def test_evaluate_reports_before_and_after(fitted, harmful, benign):
    report = fitted.evaluate({"harmful": harmful, "benign": benign, "hard-benign": rows("benign", 3)}, max_new_tokens=4)
    assert len(report.answers) == 2 * 3 * (6 + 5 + 3)
    assert {(r["condition"], r["group"]) for r in report.rows()} == {
        (c, g) for c in THREE for g in ("harmful", "benign", "hard-benign")
    }
    vanilla = fitted.disable().evaluate(harmful, max_new_tokens=4)
    assert {a.stage for a in vanilla.answers} == {"before"}
    assert [a.response for a in vanilla.answers] == [
        a.response for a in report.answers if a.stage == "before" and a.group == "harmful"
    ]


def test_what_a_condition_lacks_is_counted(tiny, harmful):
    rows_ = [{**harmful[0], "audio": None}, *harmful[1:]]
    r = RRS(*tiny, verbose=False)
    report = r.evaluate(rows_, max_new_tokens=2)
    assert {"group": "harmful", "condition": "audio-only", "ids": ["harmful-0"]} in report.skipped
    assert "1 harmful examples lack what audio-only needs" in str(report)
    with pytest.raises(ValueError, match=r"audio-only: 1 of 6 examples have no clip: harmful-0"):
        r.generate(rows_, "audio-only")


def test_groups_are_what_their_labels_say(tiny, harmful, benign):
    """A group has one label, whatever its name; unlabelled rows take that of a group called by it."""
    r = RRS(*tiny, small(), verbose=False)
    plain = [{k: v for k, v in row.items() if k != "label"} for row in harmful]
    for groups in ({"harmful": [*harmful, *benign]}, {"AdvBench": plain}, {"benign": harmful}):
        with pytest.raises(ValueError, match=r"The group .* has examples labelled .*load_examples"):
            r.evaluate(groups, ("text-only",))
    found = rrs.grouped({"AdvBench": harmful, "harmful": plain, "everyday": benign})
    assert {g: {e.label for e in rows} for g, rows in found.items()} == {
        "AdvBench": {"harmful"}, "harmful": {"harmful"}, "everyday": {"benign"},
    }  # fmt: skip
    assert {g: len(rows) for g, rows in rrs.grouped([*harmful, *benign]).items()} == {"harmful": 6, "benign": 5}


def test_a_string_is_not_its_letters(tiny, harmful):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(
        ValueError, match=r"conditions='text-only' must be a sequence of strings; write \('text-only',\)"
    ):
        r.evaluate(harmful, "text-only")
    assert r.evaluate(harmful, iter(["text-only"]), max_new_tokens=1).answers


def test_a_prefix_begins_the_answer(fitted, harmful, tmp_path):
    """What is returned is what the model adds to it: its own greedy continuation of the prompt and the prefix."""
    ours = fitted.generate(harmful, max_new_tokens=4, prefix="Sure")
    for example, answer in zip(load_examples(harmful), ours, strict=True):
        inputs = fitted.render(fitted.config.instruction, example.clip[1](16000))
        ids = torch.cat([inputs["input_ids"], torch.tensor([fitted.token_ids("Sure")])], dim=1)
        own = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        new = fitted.model.generate(**own, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
        assert answer == fitted.tokenizer.decode(new, skip_special_tokens=True).strip()
    settings = {"conditions": ("audio-text",), "max_new_tokens": 4, "cache": tmp_path / "answers.jsonl"}
    plain, forced = (fitted.evaluate(harmful, **settings, prefix=p) for p in ("", "Sure"))
    assert [a.response for a in forced.answers if a.stage == "after"] == ours
    assert [a.response for a in plain.answers] != [a.response for a in forced.answers]  # the cache tells them apart
    assert "made to begin with 'Sure'" in str(forced)


def test_a_report_that_a_callback_made_is_not_the_trained_adapters(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)

    def look(step):
        if step.step == 1:
            step.rrs.evaluate({"harmful": harmful}, ["text-only"], max_new_tokens=1, usefulness=0)
            assert step.rrs.report is not None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RRSWarning)
        r.fit(harmful, benign, callbacks=[look], preflight=0)
    assert r.report is None
