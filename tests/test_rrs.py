"""The public API on a tiny random Qwen2-Audio: steps, loop, saving, loading, merging, and what stays untouched."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import assert_same, rows, tiny_qwen2_audio
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import rrs
from rrs import RRS, RRSConfig, _epoch, select_features
from rrs.data import load_examples
from rrs.hooks import attached, linear_paths, seeded

THREE = ("audio-text", "text-only", "audio-only")


def small(**kwargs):
    """A configuration that trains a tiny model in seconds."""
    return RRSConfig(
        **{"epochs": 3, "batch_size": 3, "accumulate": 2, "learning_rate": 1e-2, "penalty": 1e-3, **kwargs}
    )


@pytest.fixture
def fitted(tiny, harmful, benign):
    return RRS(*tiny, small(conditions=THREE), verbose=False).fit(harmful, benign, preflight=0)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"top": 0}, "top=0"),
        ({"top": 101}, "top=101"),
        ({"top": "abc"}, "top='abc'"),
        ({"conditions": ("audio",)}, "conditions"),
        ({"conditions": "audio-text"}, "conditions"),
        ({"prompts": ()}, "prompts is empty"),
        ({"openings": "Sure"}, "openings='Sure'"),
        ({"openings": ("Sure", "")}, "must not hold an empty one"),
        ({"lora_r": 0}, "lora_r=0"),
        ({"benign_weight": 0.0}, "benign_weight=0.0"),
        ({"direction": "loud"}, "direction='loud'"),
        ({"keep_share": 0.0, "refusal": "Sorry"}, "keep_share=0.0"),
        ({"keep_share": 0.5, "keep_tokens": 4}, "needs refusal"),
        ({"depth": 0}, "depth=0"),
        ({"layers": (0.5, 0.2)}, "layers="),
        ({"penalty_form": "mean"}, "penalty_form='mean'"),
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
        ({"prompts": ("",)}, "must not hold an empty one"),
    ],
)
def test_config_rejects(kwargs, words):
    with pytest.raises(ValueError, match=words):
        RRSConfig(**kwargs)


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
    assert (c.refusal_token, c.top, c.penalty, len(c.prompts)) == ("I", "positive", 1.0, 10)
    assert (c.harmful_strength, c.benign_strength, c.depth, c.keep_tokens) == (1, 1, 1, 0)
    assert (c.penalty_form, c.layers, c.benign_weight) == ("sum", (0, 1), 1)
    assert c.direction == "delta"


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


def test_the_quiet_direction_is_the_natural_gradient():
    """Against a literal Fisher matrix of the head; a step along it changes what the head says least."""
    g = torch.Generator().manual_seed(0)
    head, benign, move = (torch.randn(n, 16, generator=g) for n in (50, 40, 1))
    head, move = head * torch.linspace(0.1, 2, 16), move[0]  # as in real heads, some features say more than others
    fisher = torch.zeros(16, 16)
    for h in benign:
        p = (head @ h).softmax(0)
        fisher += head.T @ (torch.diag(p) - torch.outer(p, p)) @ head / len(benign)
    d = rrs.quiet_direction(move, benign, head)
    literal = torch.linalg.inv(fisher + fisher.trace() / 16 * torch.eye(16)) @ move
    assert torch.allclose(d, literal * (move @ move) / (literal @ move), atol=1e-4)
    assert d @ move == pytest.approx(float(move @ move), rel=1e-4)

    def kl(step):
        before, after = ((x @ head.T).log_softmax(-1) for x in (benign, benign - 0.1 * step))
        return F.kl_div(after, before, log_target=True, reduction="batchmean")

    assert kl(d) < 0.5 * kl(move)
    assert torch.allclose(d, rrs.quiet_direction(move, benign.repeat_interleave(3, 0), head, most=40), atol=1e-4)


def test_targets_along_the_quiet_direction(tiny, harmful, benign):
    r = RRS(*tiny, small(harmful_strength=1.5, benign_strength=0.7), verbose=False)
    reps = r.extract(harmful, benign)
    (paper,) = r.make_targets(reps).values()
    r.config = replace(r.config, direction="quiet")
    (quiet,) = r.make_targets(reps).values()
    vanilla, move = reps["audio-text"], paper.delta * paper.mask
    for side in ("harmful", "benign"):
        steps = [getattr(t, side) - getattr(vanilla, side) for t in (paper, quiet)]  # each [n, hidden]
        assert torch.allclose(steps[0] @ move, steps[1] @ move, rtol=1e-3)  # as far along Δ
    before, *after = (r.location.head(x).log_softmax(-1) for x in (vanilla.benign, paper.benign, quiet.benign))
    changes = [F.kl_div(now, before, log_target=True, reduction="batchmean") for now in after]
    assert changes[1] < changes[0]


def test_fit_moves_towards_the_targets(tiny, harmful, benign):
    one = (RRSConfig().instruction,)  # a random model takes every paraphrase for something else
    r = RRS(*tiny, small(conditions=THREE, epochs=25, prompts=one, lora_dropout=0.0), verbose=False)
    assert r.fit(harmful=harmful, benign=benign, preflight=0) is r
    for condition, target in r.targets.items():
        prompts = [r.read(e, condition) for e in target.harmful_examples]
        with r.disabled():
            far = F.mse_loss(r.reader.represent(prompts), target.harmful)
        near = F.mse_loss(r.reader.represent(prompts), target.harmful)
        assert near < 0.7 * far, condition


def test_own_loss_and_callbacks(tiny, harmful, benign):
    steps, calls = [], []

    def loss(h, goal):
        calls.append(h.shape)
        return (h - goal).abs().mean()

    r = RRS(*tiny, small(), verbose=False)
    r.fit(harmful, benign, loss=loss, callbacks=[steps.append], preflight=0)
    assert len(steps) == steps[-1].steps == 3 * 2  # 11 inputs in batches of 3 make 4 batches, 2 steps an epoch
    assert len(calls) == 3 * 4
    assert [s.step for s in steps] == list(range(1, 7))
    assert steps[0].learning_rate == pytest.approx(1e-2)
    assert steps[-1].learning_rate == pytest.approx(1e-2 / 6)
    assert r.history[-1]["loss"] == pytest.approx(steps[-1].mse + r.config.penalty * steps[-1].penalty)


def test_training_stops_at_a_loss_that_is_not_finite(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(FloatingPointError, match=r"step 1: .*(harmful|benign)-"):
        r.fit(harmful, benign, loss=lambda h, _: h.sum() * math.nan, preflight=0)


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
    assert (loaded.record["preflight"], len(loaded.history)) == ([], len(seen))
    before = dict(vars(loaded))
    with pytest.raises(ZeroDivisionError):
        loaded.train(r.targets, callbacks=[lambda _: 1 / 0])
    assert loaded.lora.attached
    assert vars(loaded) == before
    loaded.disable()
    targets, lora = r.targets, r.enable().lora
    with pytest.raises(ZeroDivisionError):
        r.fit(harmful, benign[:-1], preflight=0, callbacks=[lambda _: 1 / 0])
    assert (r.targets is targets, r.lora is lora) == (True, True)


def test_refitting_starts_from_vanilla(fitted, harmful, benign):
    first = fitted.lora.tensors()
    again = fitted.fit(harmful, benign, preflight=0).lora.tensors()
    assert all(torch.equal(first[k], again[k]) for k in first)


def test_saved_and_loaded_is_the_same(fitted, harmful, tmp_path):
    fitted.save(tmp_path / "adapter")
    loaded = RRS.load(tmp_path / "adapter", *tiny_qwen2_audio(), verbose=False)
    assert loaded.config == fitted.config
    for condition in THREE:
        examples = load_examples(harmful)
        a, b = ([r.read(e, condition) for e in examples] for r in (fitted, loaded))
        assert torch.equal(fitted.reader.represent(a), loaded.reader.represent(b))
    record = json.loads((tmp_path / "adapter" / "rrs.json").read_text())
    assert record["base"]["class"] == "Qwen2AudioForConditionalGeneration"
    assert len(record["history"]) == len(fitted.history)


def test_peft_reads_the_adapter(fitted, harmful, tmp_path):
    """The format is PEFT's: its logits equal ours, and not one module of the tower is touched."""
    peft = pytest.importorskip("peft")
    fitted.save(tmp_path / "adapter")
    inputs = fitted.render(fitted.config.instruction, load_examples(harmful)[0].clip[1](16000))
    ours = fitted.model(**inputs).logits
    model = peft.PeftModel.from_pretrained(tiny_qwen2_audio()[0], tmp_path / "adapter").eval()
    assert torch.allclose(model(**inputs).logits, ours, atol=1e-6)
    wrapped = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == len(fitted.lora.paths)
    assert all("audio_tower" not in name for name in wrapped)
    model.save_pretrained(tmp_path / "again")  # whose target_modules may be shortened to the ends of paths
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    settings["target_modules"] = ["q_proj", "layers.1.mlp.up_proj"]
    (tmp_path / "again" / "adapter_config.json").write_text(json.dumps(settings))
    loaded = RRS.load(tmp_path / "again", *tiny_qwen2_audio(), verbose=False)
    assert loaded.lora.paths == fitted.lora.paths
    assert torch.equal(loaded.model(**inputs).logits, ours)


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


def test_saving_never_mixes_runs(fitted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fitted.save(tmp_path / "full")
    assert (tmp_path / "full" / "other.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"no part of an adapter: \['other.txt'\]"):  # nor is it deleted
        fitted.save(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "other.txt").read_text() == "mine"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")  # the name of a file of ours does not make it an adapter
    with pytest.raises(FileExistsError, match=r"no part of an adapter: \['README.md'\]"):
        fitted.save(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"
    fitted.save(tmp_path / "mine")
    (tmp_path / "mine" / "rrs.safetensors").write_bytes(b"stale")
    fitted.save(tmp_path / "mine", overwrite=True)
    assert RRS.load(tmp_path / "mine", *tiny_qwen2_audio(), verbose=False).lora.tensors().keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "mine", "notes"]  # no scratch folder left


def test_loading_errors(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        RRS.load(tmp_path, *tiny_qwen2_audio())
    fitted.save(tmp_path / "a")
    with pytest.warns(rrs.RRSWarning, match="another base"):
        RRS.load(tmp_path / "a", *tiny_qwen2_audio(seed=1), verbose=False)
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    deeper = {name.replace("layers.1.", "layers.7."): value for name, value in tensors.items()}
    save_file(deeper, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"made for another base .*layers\.7"):
        RRS.load(tmp_path / "a", *tiny_qwen2_audio(), verbose=False)
    save_file({"x": torch.zeros(1)}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"damaged .*no LoRA in adapter_model\.safetensors"):
        RRS.load(tmp_path / "a", *tiny_qwen2_audio(), verbose=False)


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
    with pytest.raises(ValueError, match=r"audio-only: these examples lack .*harmful-0"):
        r.generate(rows_, "audio-only")


def test_groups_are_what_their_names_say(tiny, harmful, benign):
    """Harmful questions in a group that counts as harmless, or the other way round, are an error."""
    r = RRS(*tiny, small(), verbose=False)
    for groups in ({"harmful": [*harmful, *benign]}, {"AdvBench": harmful}):
        with pytest.raises(ValueError, match=r"labelled otherwise.*load_examples"):
            r.evaluate(groups, ("text-only",))


def test_the_likelihood_is_of_a_questions_own_answer(tiny, benign):
    """Also where two groups number their questions alike."""
    r, found = RRS(*tiny, small(), verbose=False), []
    for ids in ("ab", "aa"):
        pair = [[{**benign[i], "id": name}] for i, name in enumerate(ids)]
        report = r.evaluate({"benign": pair[0], "hard-benign": pair[1]}, ("text-only",), max_new_tokens=8)
        found.append(report.usefulness[0]["likelihood"]["value"])
    assert len({a.response for a in report.answers}) == 2
    assert found[0] == found[1]


def test_of_several_end_tokens_the_one_that_ends_turns(tiny):
    r = RRS(*tiny, small(), verbose=False)
    end = r.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in r.reader.read("Hello.").ids
    for ends in (end, [end], [1, end], [end, 1]):
        r.model.generation_config.eos_token_id = ends
        assert r._end() == end
    r.model.generation_config.eos_token_id = [7, 8]  # none of them in prompts
    assert r._end() == 7


def test_preflight_warns_with_the_fix(tiny, harmful, benign):
    """A random model never refuses, and a push of many Δ changes what it says: each check must say so."""
    r = RRS(*tiny, small(epochs=1, benign_strength=40.0), verbose=False)
    with pytest.warns(rrs.RRSWarning) as caught:
        r.fit(harmful, benign, preflight=3)
    for words in ("refusal_prompt", "refusal_token", "direction='quiet'"):
        assert any(words in str(w.message) for w in caught), words
    assert len(r.checks) == 1
    assert r.checks[0].benign_same.n == 5
    assert r.checks[0].refused.n == 3
    assert r.checks[0].token_target.n == 6


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_a_preflight_is_on_record_with_its_own_targets(tiny, harmful, benign, tmp_path):
    r = RRS(*tiny, small(epochs=1), verbose=False).fit(harmful, benign, preflight=3)
    assert len(r.record["preflight"]) == 1
    r.save(tmp_path / "adapter")
    r.disable()
    loaded = RRS.load(tmp_path / "adapter", *tiny, verbose=False)
    assert loaded.checks == r.checks
    reps = loaded.extract(harmful, benign)
    targets = loaded.make_targets(reps)
    assert loaded.train(targets).record["preflight"] == []  # the saved adapter's is of other targets
    loaded.preflight(reps, targets, n=2)
    assert [check["refused"]["n"] for check in loaded.train(targets).record["preflight"]] == [2]


def test_nothing_to_train_on_is_said(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    for nothing in ({}, {"text-only": []}):
        with pytest.raises(ValueError, match="nothing to train on"):
            r.train(nothing)
    with pytest.raises(TypeError, match="not iterable"):
        r.fit(harmful, benign, callbacks=print)
    assert r.lora is None


def test_a_string_is_not_its_letters(tiny, harmful):
    r = RRS(*tiny, small(), verbose=False)
    for call in (r.find_refusal_token, r.find_refusal_prompt):
        with pytest.raises(ValueError, match=r"candidates='Sorry' must be a sequence of strings; write \('Sorry',\)"):
            call(harmful, candidates="Sorry")
    with pytest.raises(ValueError, match="conditions='text-only' must be a sequence"):
        r.evaluate(harmful, "text-only")
    assert r.evaluate(harmful, iter(["text-only"]), max_new_tokens=1).answers


def test_preflight_asks_for_no_refusals_where_their_words_are_given(tiny, harmful, benign):
    r = RRS(*tiny, small(refusal="I c"), verbose=False)
    reps = r.extract(harmful, benign)
    targets = r.make_targets(reps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rrs.RRSWarning)
        warnings.filterwarnings("error", "(?s).*config.refusal_prompt", rrs.RRSWarning)
        (check,) = r.preflight(reps, targets, n=3)
    assert check.refused.value == 0
    r.config = replace(r.config, refusal="")
    with pytest.warns(rrs.RRSWarning, match="refusal_prompt"):
        r.preflight(reps, targets, n=3)


def test_find_refusal_token_ranks_openings(tiny, harmful, monkeypatch):
    r = RRS(*tiny, verbose=False)
    # A judge that takes answers opening with "I" for refusals: the ranking must follow it.
    monkeypatch.setattr(
        rrs, "judge_refusals", lambda _p, a: ["refusal" if x.startswith("I") else "compliance" for x in a]
    )
    openings = r.find_refusal_token(harmful, candidates=["S", "I", "I am"], n=4)
    assert {o.text for o in openings[:2]} == {"I", "I am"}
    assert [o.refused.value for o in openings[:2]] == [1, 1]
    assert {"S", "I", "I am"} <= {o.text for o in openings}
    assert all(r.tokenizer.decode(o.ids) == o.text for o in openings)


def test_find_refusal_prompt_ranks_prompts(tiny, harmful, monkeypatch):
    """The share that refuses, and the token that most answers begin with, are those of answers under each prompt."""
    r = RRS(*tiny, verbose=False)
    monkeypatch.setattr(
        rrs, "judge_refusals", lambda _p, a: ["refusal" if sum(map(ord, x)) % 3 else "compliance" for x in a]
    )
    prompts = r.find_refusal_prompt(harmful, candidates=["(no)", "(Say no to this)", "x" * 40], n=6)
    assert [p.prompt for p in prompts].count(r.config.refusal_prompt) == 1
    assert len(prompts) == 4
    assert len({p.refused.value for p in prompts}) > 1
    assert prompts == sorted(prompts, key=lambda p: (p.refused.value, p.share), reverse=True)
    for found in prompts:
        plain = RRS(*tiny_qwen2_audio(), replace(r.config, refusal_prompt=found.prompt), verbose=False)
        answers = plain.generate(harmful, max_new_tokens=24, refusal=True)
        assert found.refused.value == sum(sum(map(ord, x)) % 3 > 0 for x in answers) / 6


def test_forced_openings_keep_their_spaces(tiny, harmful, monkeypatch):
    """What is judged is the whole answer as the model wrote it: "I cannot", never "Icannot"."""
    r, judged = RRS(*tiny, verbose=False), []
    monkeypatch.setattr(rrs, "judge_refusals", lambda _p, a: judged.extend(a) or ["compliance"] * len(a))
    space = r.token_id(" ")

    def generate(inputs_embeds, **_kwargs):
        return torch.tensor([[space, r.token_id("c")]] * len(inputs_embeds))

    monkeypatch.setattr(r.model, "generate", generate)
    r.find_refusal_token(harmful, candidates=["I"], n=2)
    assert judged[-2:] == ["I c", "I c"]


def test_refusal_token_of_several_tokens(tiny):
    with pytest.raises(ValueError, match=r"'Sorry' is 5 tokens .*find_refusal_token"):
        RRS(*tiny, verbose=False).token_id("Sorry")


def test_one_side_without_examples(tiny, harmful):
    r = RRS(*tiny, small(), verbose=False)
    with pytest.raises(ValueError, match="no benign examples"):
        r.fit(harmful, [])
    silent = [{"text": "no audio here", "label": "benign"}]
    with pytest.raises(ValueError, match="audio-text: none of the 1 benign examples"):
        r.fit(harmful, silent)


def test_pairs_train_as_targets_do(harmful, benign):
    """Examples with vectors of one's own are trained on in the same loop, bit for bit."""
    adapters = []
    for plain in (False, True):
        r = RRS(*tiny_qwen2_audio(), small(), verbose=False)
        targets = r.make_targets(r.extract(harmful, benign))
        pairs = {
            c: [
                (e, x)
                for s in ("harmful", "benign")
                for e, x in zip(getattr(t, f"{s}_examples"), getattr(t, s), strict=True)
            ]
            for c, t in targets.items()
        }
        adapters.append(r.train(pairs if plain else targets).lora.tensors())
    assert all(torch.equal(x, adapters[1][name]) for name, x in adapters[0].items())


def test_a_resumed_run_keeps_its_objective(tiny, harmful, tmp_path):
    def near(reader, prompts, targets):
        return F.mse_loss(reader.last_hidden(prompts)[:, 0], torch.stack(list(targets)))

    def far(*args):
        return -near(*args)

    r = RRS(*tiny, small(epochs=1), verbose=False)
    pairs = {"audio-text": [(e, torch.ones(32)) for e in load_examples(harmful)]}
    r.train(pairs, objective=near, checkpoint_dir=tmp_path)
    again = RRS(*tiny_qwen2_audio(), small(epochs=1), verbose=False)
    with pytest.raises(ValueError, match=r"another run: objective .*near.* there, .*far.* here"):
        again.train(pairs, objective=far, checkpoint_dir=tmp_path, resume=True)
    other = {"audio-text": [(e, 2 * x) for e, x in pairs["audio-text"]]}
    with pytest.raises(ValueError, match="another run: data"):
        again.train(other, objective=near, checkpoint_dir=tmp_path, resume=True)
    again.train(pairs, objective=near, checkpoint_dir=tmp_path, resume=True)
    assert all(torch.equal(x, again.lora.tensors()[name]) for name, x in r.lora.tensors().items())


def test_kept_tokens_are_the_models_own_answers_and_refusals(tiny, harmful, benign):
    """Beyond the first token: the vanilla vectors along its answer to benign, its refusal of harmful inputs."""
    config = small(keep_tokens=3, lora_dropout=0.0, prompts=(RRSConfig().instruction,))
    r = RRS(*tiny, config, verbose=False)
    targets = r.make_targets(r.extract(harmful, benign))
    items = rrs._items(targets["audio-text"])
    assert [i.example.id for i in items] == [x["id"] for x in (*harmful, *benign)]
    assert torch.equal(torch.stack([i.target[0] for i in items[:6]]), targets["audio-text"].harmful)
    assert torch.equal(torch.stack([i.target[0] for i in items[6:]]), targets["audio-text"].benign)
    for i, item in enumerate(items):
        text = r.config.instruction + (f" {r.config.refusal_prompt}" if i < 6 else "")
        inputs = r.render(text, item.example.clip[1](16000))
        ids = torch.cat([inputs["input_ids"], torch.tensor([item.tokens])], dim=1)
        full = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.no_grad():
            hidden = r.model(**full, output_hidden_states=True).hidden_states[-1][0]
        assert torch.allclose(item.target[1:], hidden[-3:], atol=1e-4)


def test_held_answers_are_the_tokens_the_model_chose(harmful, benign):
    """Token for token: decoded and read again, an answer loses a line break at its end, and gets an end token there."""
    r = RRS(*tiny_qwen2_audio(), small(keep_tokens=3), verbose=False)
    newline, end = r.token_id("\n"), 79  # which this model says second, to one of them
    r.model.generation_config.eos_token_id = end
    with torch.no_grad():
        r.location.head_weight[newline] *= 100  # first choice wherever the product is positive
    items = rrs._items(r.make_targets(r.extract(harmful, benign))["audio-text"])[len(harmful) :]
    for item in items:
        ids, chosen = r.read(item.example, "audio-text"), []
        for _ in range(3):
            token = int(r.location.head(r.reader.represent([ids.extended(chosen)])).argmax())
            chosen.append(end if chosen[-1:] == [end] else token)
        assert item.tokens == tuple(chosen)
    assert any(i.tokens[-1] == newline for i in items)
    assert any(end in i.tokens for i in items)


def test_a_refusal_in_words(harmful, benign):
    """Harmful inputs have targets along the text, as under the refusal prompt; benign ones along their answers."""
    config = small(refusal="I can't.", keep_tokens=2, epochs=12, prompts=(RRSConfig().instruction,), lora_dropout=0.0)
    r = RRS(*tiny_qwen2_audio(), config, verbose=False)
    ids = r.tokenizer("I can't.", add_special_tokens=False)["input_ids"]
    reps = r.extract(harmful, benign)
    items = rrs._items(r.make_targets(reps)["audio-text"])
    plain = RRS(r.model, r.processor, small(prompts=config.prompts, keep_tokens=2), verbose=False)
    own = rrs._items(plain.make_targets(plain.extract(harmful, benign))["audio-text"])
    assert [i.tokens for i in items] == [tuple(ids)] * len(harmful) + [i.tokens for i in own[len(harmful) :]]
    assert all(torch.allclose(x.target[0], y.target[0], atol=1e-5) for x, y in zip(items, own, strict=True))
    pairs = list(zip(items, own, strict=True))[len(harmful) :]
    assert all(torch.allclose(x.target, y.target, atol=1e-4) for x, y in pairs)
    r.config = replace(config, keep_tokens=1)
    assert {len(i.target) for i in rrs._items(r.make_targets(reps)["audio-text"])[len(harmful) :]} == {2}
    r.config = replace(config, keep_tokens=3)
    with pytest.raises(ValueError, match="extract them again"):
        r.make_targets(reps)
    r.config = replace(config, refusal="I won't.")
    with pytest.raises(ValueError, match=r"refusal=\"I won't.\".*extract them again"):
        r.make_targets(reps)
    r.config = config
    targets = r.make_targets(reps)
    for other in ("I won't.", ""):
        r.config = replace(config, refusal=other, keep_tokens=0)
        with pytest.raises(ValueError, match="audio-text: these targets are not of"):
            r.train(targets)
    r.config = config
    for item in items[: len(harmful)]:
        refused = r.read(item.example, "audio-text", refusal=True)
        alone = [r.reader.represent([refused.extended(ids[: k + 1])])[0] for k in range(len(ids))]
        assert torch.allclose(item.target[1:], torch.stack(alone), atol=1e-4)

    prompts = [r.read(i.example, "audio-text").extended(i.tokens) for i in items[: len(harmful)]]
    goal = torch.stack([i.target[1:] for i in items[: len(harmful)]])
    before = F.mse_loss(r.reader.represent(prompts, last=len(ids)), goal)
    r.fit(harmful, benign, preflight=0)
    assert F.mse_loss(r.reader.represent(prompts, last=len(ids)), goal) < 0.7 * before


def test_a_share_of_the_answers_is_held(tiny, harmful, benign, tmp_path):
    """keep_share: the benign inputs that are most likely to be refused, as many as it says, go along their answers, to
    the same vectors; the rest to one."""
    every = small(refusal="I can't.", keep_tokens=2)
    r = RRS(*tiny, every, verbose=False)
    reps = r.extract(harmful, benign)["audio-text"]
    odds = r.model.lm_head(reps.benign).softmax(-1)[:, r.token_id("I")]
    nearest = {reps.benign_examples[i].id for i in odds.topk(2).indices}
    full = rrs._items(r.make_targets({"audio-text": reps})["audio-text"])
    r.config = replace(every, keep_share=0.4)
    for _ in range(2):  # the second time from the cache
        part = rrs._items(r.make_targets(r.extract(harmful, benign, cache=tmp_path))["audio-text"])
        assert [i.example.id for i in part] == [i.example.id for i in full]
        lengths = {i.example.id: len(i.target) for i in part[len(harmful) :]}
        assert lengths == {e.id: 3 if e.id in nearest else 1 for e in reps.benign_examples}
        for some, item in zip(part, full, strict=True):
            assert some.tokens == item.tokens[: len(some.tokens)]
            assert torch.allclose(some.target, item.target[: len(some.target)], atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2  # to choose by, and the rest
    r.fit(harmful, benign, preflight=0)
    assert all(math.isfinite(row["loss"]) for row in r.history)


@pytest.mark.parametrize("most", [5, 400], ids=["one pass", "a prompt is shorter than that"])
def test_the_loss_of_prompts_with_different_numbers_of_targets(tiny, harmful, most):
    """Together, each counts as it does alone, at its own positions."""
    r = RRS(*tiny, small(), verbose=False)
    examples, lengths = load_examples(harmful)[:3], [1, 3, most]
    prompts = [r.read(e, "text-only").extended(range(n - 1)) for e, n in zip(examples, lengths, strict=True)]
    goals = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n)) for n in lengths]
    assert (most > len(prompts[0])) == (most == 400)
    alone = []
    for prompt, goal in zip(prompts, goals, strict=True):
        h = r.reader.represent([prompt], last=len(goal))[0]
        alone.append(F.mse_loss(h[0], goal[0]) + (F.mse_loss(h[1:], goal[1:]) if len(goal) > 1 else 0))
    for weights in ([1.0, 1.0, 1.0], [1.0, 3.0, 0.5]):
        true = (torch.stack(alone) * torch.tensor(weights)).mean()
        with torch.no_grad():
            assert torch.allclose(r._distance(prompts, goals, weights, F.mse_loss), true, atol=1e-5)


def test_benign_weight_counts_benign_inputs_alone(tiny, harmful, benign):
    """In the first step, before anything is learnt, the gradient is that of harmful inputs and w times the others'."""

    def gradients(weight: float) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []
        n = len(harmful) + len(benign)
        c = small(batch_size=n, accumulate=1, penalty=0.0, benign_weight=weight, max_grad_norm=1e9, lora_dropout=0.0)
        r = RRS(*tiny, c, verbose=False)
        clip = nn.utils.clip_grad_norm_

        def note(parameters, most):
            parameters = list(parameters)
            seen.extend([] if seen else [p.grad.clone() for p in parameters])
            return clip(parameters, most)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.utils, "clip_grad_norm_", note)
            r.fit(harmful, benign, preflight=0)
        r.disable()
        return seen

    one, two, five = (gradients(w) for w in (1.0, 2.0, 5.0))
    assert any(not torch.allclose(a, b, rtol=1e-2) for a, b in zip(one, two, strict=True))
    for a, b, c in zip(one, two, five, strict=True):  # linear in the weight
        assert torch.allclose(c - a, 4 * (b - a), atol=1e-5 * float(c.abs().max() + 1))


def test_a_refusal_begins_with_the_refusal_token(tiny, harmful, benign):
    with pytest.raises(ValueError, match=r"begins with 'N', not with the refusal_token 'I'"):
        RRS(*tiny, small(refusal="No."), verbose=False).fit(harmful, benign)
    with pytest.raises(ValueError, match="choose one"):
        small(refusal="I can't.", depth=2)


def test_training_keeps_tokens(harmful, benign):
    """Trained with keep_tokens, the vectors along those answers come closer to their targets than without."""
    distance = []
    for keep in (0, 3):
        one = (RRSConfig().instruction,)
        config = small(keep_tokens=keep, lora_dropout=0.0, prompts=one, epochs=12)
        r = RRS(*tiny_qwen2_audio(), config, verbose=False).fit(harmful, benign, preflight=0)
        probe = RRS(r.model, r.processor, small(keep_tokens=3), verbose=False)
        with r.disabled():
            items = rrs._items(probe.make_targets(probe.extract(harmful, benign))["audio-text"])
        prompts = [r.read(i.example, "audio-text").extended(i.tokens) for i in items]
        now = r.reader.represent(prompts, last=3)
        distance.append(F.mse_loss(now, torch.stack([i.target[1:] for i in items])).item())
    assert distance[1] < 0.7 * distance[0]


def test_depth_goes_along_all_answers_whatever_share_would_be_held(tiny, harmful, benign):
    """keep_share is of `refusal`'s benign answers; without it, all inputs go equally deep."""
    r = RRS(*tiny, small(depth=3, keep_share=0.4), verbose=False)
    target = r.make_targets(r.extract(harmful, benign))["audio-text"]
    assert len(target.later) == 2
    assert {len(tokens) for tokens in target.tokens} == {2}


def test_deeper_targets_are_the_papers_at_each_position(tiny, harmful, benign):
    """depth=3, keep_tokens=4: Δ and mask of their own at 3 positions along refusal and answer, 2 more as they are."""
    r = RRS(*tiny, small(depth=3, keep_tokens=4), verbose=False)
    reps = r.extract(harmful, benign)["audio-text"]
    target = r.make_targets({"audio-text": reps})["audio-text"]
    refusals, answers = (
        r.generate(rows_, max_new_tokens=4, refusal=refusal) for rows_, refusal in ((harmful, True), (benign, False))
    )
    for tokens, said in zip(target.tokens, [*refusals, *answers], strict=True):
        assert r.tokenizer.decode(tokens, skip_special_tokens=True).strip() == said

    def vanilla(rows_, tokens, refusal=False):  # one at a time, [n, hidden]
        prompts = [r.read(e, "audio-text", refusal=refusal) for e in load_examples(rows_)]
        return torch.cat([r.reader.represent([p.extended(t)]) for p, t in zip(prompts, tokens, strict=True)])

    for k, (goal, rep) in enumerate(zip([target, *target.later], [reps, *reps.later], strict=True)):
        begun = [t[:k] for t in target.tokens]
        plain, own = vanilla(harmful, begun[:6]), vanilla(benign, begun[6:])
        refused = vanilla(harmful, begun[:6], True)
        for ours, reference in ((rep.harmful, plain), (rep.benign, own), (rep.refused, refused)):
            assert torch.allclose(ours, reference, atol=1e-4)
        if k >= 3:
            assert torch.equal(goal.harmful, rep.refused)
            assert torch.equal(goal.benign, rep.benign)
            continue
        next_tokens = r.location.head(refused).argmax(-1) if k else [r.token_id("I")]  # what the refusals go on with
        row = r.location.head_weight[next_tokens].mean(0).detach()
        delta = refused.mean(0) - own.mean(0)
        assert torch.allclose(goal.delta, delta, atol=1e-4)
        close = (row * delta).abs() < 1e-4
        assert torch.equal(goal.mask | close, (row * delta > 0) | close)
        assert torch.allclose(goal.harmful, plain + delta * goal.mask, atol=1e-3)
        assert torch.allclose(goal.benign, own - delta * goal.mask, atol=1e-3)


OPENED = [{}, {"depth": 2}, {"refusal": "I can't.", "keep_tokens": 2}]


@pytest.mark.parametrize("how", OPENED, ids=["the paper's", "deep", "a refusal in words"])
def test_after_an_opening_harmful_inputs_go_where_they_go_without(harmful, benign, tmp_path, how):
    """openings: harmful inputs have the same targets after each, benign ones stay where they are there."""
    one = {"prompts": (RRSConfig().instruction,), "lora_dropout": 0.0, "epochs": 12, **how}
    r = RRS(*tiny_qwen2_audio(), small(**one, openings=("Sure,", "Here is")), verbose=False)
    first, again = (r.make_targets(r.extract(harmful, benign, cache=tmp_path)) for _ in range(2))
    items = rrs._items(first["audio-text"])
    assert all(torch.equal(x.target, y.target) for x, y in zip(items, rrs._items(again["audio-text"]), strict=True))
    n, h = len(harmful) + len(benign), len(harmful)
    plain, opened = items[:n], [items[n : 2 * n], items[2 * n :]]
    for opening, rows_ in zip(r.config.openings, opened, strict=True):
        ids = tuple(r.tokenizer(opening, add_special_tokens=False)["input_ids"])
        for own, without in zip(rows_[:h], plain[:h], strict=True):
            assert (own.example, own.tokens) == (without.example, ids + without.tokens)
            assert torch.equal(own.target, without.target)
        for own, without in zip(rows_[h:], plain[h:], strict=True):
            assert (own.example, own.tokens) == (without.example, ids)
            alone = r.reader.represent([r.read(own.example, "audio-text").extended(ids)])
            assert torch.allclose(own.target, alone, atol=1e-4)

    def distance(part: list[rrs.Item]) -> float:
        prompts = [r.read(i.example, "audio-text").extended(i.tokens) for i in part]
        now = r.reader.represent(prompts, last=len(part[0].target))
        return F.mse_loss(now, torch.stack([i.target for i in part])).item()

    up, still = ([i for rows_ in opened for i in rows_[part]] for part in (slice(h), slice(h, None)))
    before = distance(up)
    assert distance(still) < 1e-6
    r.train(first)
    assert (after := distance(up)) < 0.7 * before
    r.config = small(**one)
    r.train(r.make_targets(r.extract(harmful, benign, cache=tmp_path)))
    assert after < distance(up)


def test_openings_need_representations_after_them(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    reps = r.extract(harmful, benign)
    targets = r.make_targets(reps)
    r.config = small(openings=("Sure,",))
    with pytest.raises(ValueError, match=r"openings=\('Sure,',\).*go along \(\); extract them again"):
        r.make_targets(reps)
    with pytest.raises(ValueError, match=r"these targets are not of .*openings=\('Sure,',\)"):
        r.train(targets)
    reps = r.extract(harmful, benign)
    targets = r.make_targets(reps)
    r.config = small(openings=("Of course,",))  # as many, but another
    with pytest.raises(ValueError, match=r"go along \('Sure,',\); extract them again"):
        r.make_targets(reps)
    with pytest.raises(ValueError, match=r"these targets are not of .*openings=\('Of course,',\)"):
        r.train(targets)


def test_deeper_targets_need_deeper_representations(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)
    reps = r.extract(harmful, benign)
    targets = r.make_targets(reps)
    r.config = small(depth=2)
    with pytest.raises(ValueError, match="extract them again"):
        r.make_targets(reps)
    with pytest.raises(ValueError, match=r"audio-text: these targets are not of config\.depth=2"):
        r.train(targets)


def test_a_prefix_begins_the_answer(fitted, harmful, tmp_path):
    """What is returned is what the model adds to it: its own greedy continuation of the prompt and the prefix."""
    ours = fitted.generate(harmful, max_new_tokens=4, prefix="Sure")
    for example, answer in zip(load_examples(harmful), ours, strict=True):
        inputs = fitted.render(fitted.config.instruction, example.clip[1](16000))
        ids = torch.cat([inputs["input_ids"], torch.tensor([fitted._ids("Sure")])], dim=1)
        own = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        new = fitted.model.generate(**own, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
        assert answer == fitted.tokenizer.decode(new, skip_special_tokens=True).strip()
    settings = {"conditions": ("audio-text",), "max_new_tokens": 4, "cache": tmp_path / "answers.jsonl"}
    plain, forced = (fitted.evaluate(harmful, **settings, prefix=p) for p in ("", "Sure"))
    assert [a.response for a in forced.answers if a.stage == "after"] == ours
    assert [a.response for a in plain.answers] != [a.response for a in forced.answers]  # the cache tells them apart
    assert "made to begin with 'Sure'" in str(forced)


def test_layers_choose_blocks(tiny):
    r = RRS(*tiny, verbose=False)
    every = linear_paths(r.location, ("q_proj", "up_proj"))
    lower, upper = (linear_paths(r.location, ("q_proj", "up_proj"), half) for half in ((0, 0.5), (0.5, 1)))
    assert len(lower) == len(upper) == 2
    assert lower + upper == every
    with pytest.raises(ValueError, match="hold none of the 2 blocks"):
        linear_paths(r.location, ("q_proj",), (0.4, 0.6))


def louder(factor):
    """The tiny model with larger hidden states and the same logits."""
    model, processor = tiny_qwen2_audio()
    with torch.no_grad():
        model.model.language_model.norm.weight *= factor
        model.lm_head.weight /= factor
    return model, processor


@pytest.mark.parametrize("form", ["sum", "relative"])
def test_the_relative_penalty_has_no_scale(form, harmful, benign):
    """Hidden states 8 times as large are the same model: the same weight leads to the same adapter only if relative."""
    change = []
    for factor in (1.0, 8.0):  # clipping acts on the gradient's absolute size: off
        config = small(penalty_form=form, penalty=30.0 if form == "relative" else 0.05, max_grad_norm=1e9, epochs=4)
        r = RRS(*louder(factor), config, verbose=False).fit(harmful, benign, preflight=0)
        change.append(r.lora.add_penalty_gradient(0.0, relative=True).item())
    assert (change[1] == pytest.approx(change[0], rel=0.02)) == (form == "relative")


def test_the_relative_penalty_by_hand(fitted):
    dense = [fitted.lora.scale * (b @ a) for a, b in zip(fitted.lora.A, fitted.lora.B, strict=True)]
    weights = [fitted.model.get_submodule(path).weight for path in fitted.lora.paths]
    share = sum(w.square().sum() for w in dense) / sum(w.square().sum() for w in weights)
    assert fitted.lora.add_penalty_gradient(0.0, relative=True).item() == pytest.approx(share.item(), rel=1e-4)


def test_the_relative_penalty_transfers_between_sizes():
    """The same weight moves a wider, deeper model by a similar share of its weights; the paper's sum does not."""
    ratios = {}
    for form, penalty in (("sum", 0.1), ("relative", 30.0)):
        moved = []
        for hidden, layers in ((32, 2), (64, 4)):
            one = {"conditions": ("text-only",), "prompts": (RRSConfig().instruction,), "lora_dropout": 0.0}
            sizes = {"epochs": 20, "batch_size": 8, "accumulate": 1, "learning_rate": 5e-3, "lora_alpha": 16.0}
            config = RRSConfig(**one, **sizes, penalty=penalty, penalty_form=form)
            r = RRS(*tiny_qwen2_audio(0, hidden, layers), config, verbose=False)
            r.train(r.make_targets(r.extract(rows("harmful", 8), rows("benign", 8))))
            moved.append(r.lora.add_penalty_gradient(0.0, relative=True).sqrt().item())
        ratios[form] = moved[0] / moved[1]
    assert 1 / 1.7 < ratios["relative"] < 1.7
    assert ratios["sum"] > 1.3 * ratios["relative"], ratios


def test_grouping_by_length_only_reorders():
    rows, size = {"text-only": list(range(101)), "audio-only": list(range(7))}, 4
    lengths = {k: [(37 * i) % 29 for i in v] for k, v in rows.items()}
    plain = _epoch(rows, size, seeded(0))
    grouped = _epoch(rows, size, seeded(0), lengths)

    def padding(plan):
        return sum(len(b) * max(lengths[k][i] for i in b) - sum(lengths[k][i] for i in b) for k, b in plan)

    for plan in (plain, grouped):
        assert sorted((k, i) for k, b in plan for i in b) == sorted((k, i) for k, v in rows.items() for i in v)
        assert sorted(len(b) for _, b in plan) == sorted([size] * 26 + [1, 3])
    assert padding(grouped) < padding(plain) / 3
    assert grouped == _epoch(rows, size, seeded(0), lengths)
    assert grouped != _epoch(rows, size, seeded(1), lengths)


def test_training_on_prompts_grouped_by_length(tiny, harmful, benign):
    seen = []

    def note(h, goal):
        seen.append(len(h))
        return F.mse_loss(h, goal)

    r = RRS(*tiny, small(epochs=1, group_by_length=True), verbose=False).fit(harmful, benign, loss=note, preflight=0)
    assert sorted(seen) == [2, 3, 3, 3]
    assert len(r.history) == 2
    fresh = RRS(*tiny_qwen2_audio(), small(epochs=1, group_by_length=True), verbose=False)  # its clips are not read yet
    fresh.train({"audio-text": [(e, torch.zeros(32)) for e in load_examples(harmful)]})
    assert len(fresh.history) == 1


# -- how strongly the adapter acts


@pytest.fixture
def drawn(tiny):
    """Harmful text drawn towards the token "S": twice the update takes most of it there, and some harmless text."""
    aims = {"conditions": ("text-only",), "refusal_token": "S", "harmful_strength": 4.0, "benign_strength": 0.0}
    config = small(**aims, lora_dropout=0.0, epochs=6, batch_size=8, accumulate=1)
    return RRS(*tiny, config, verbose=False).fit(rows("harmful", 8), rows("benign", 8), preflight=0)


DEV = {"harmful": rows("harmful", 6, seed=1), "benign": rows("benign", 5, seed=1)}


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_calibrate_takes_the_most_refusals_within_the_budget(drawn, tmp_path):
    strengths, before = [0.5, 1.0, 1.25, 1.5, 2.0, 3.0], drawn.lora.scale
    points = drawn.calibrate(DEV, ["text-only"], budget=0.5, strengths=strengths, plot=tmp_path / "front.png")
    assert [p.factor for p in points] == strengths
    assert max(p.cost for p in points) > 0.5  # or there is nothing to choose
    inside = [p for p in points if p.cost <= 0.5]
    best = max(inside, key=lambda p: (p.refused, -p.factor))
    assert drawn.lora.scale == pytest.approx(best.factor * before)
    assert drawn.record["calibrated"]["factor"] == best.factor
    assert drawn.record["calibrated"]["auc"] == best.auc
    assert (tmp_path / "front.png").stat().st_size > 10_000
    (again,) = drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=[1.0])  # what was counted is what it does
    assert (again.refused, again.cost, again.groups) == (best.refused, best.cost, best.groups)


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_the_first_choice_counted_by_hand(drawn):
    (point,) = drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=[2.0])
    for group, examples in DEV.items():
        starts = [a[:1] == "S" for a in drawn.generate(examples, "text-only", max_new_tokens=1)]
        assert point.groups[group].value == sum(starts) / len(starts)


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_how_well_calibrate_finds_groups_told_apart_counted_by_hand(drawn):
    (point,) = drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=[2.0])
    token, leads = drawn.token_id("S"), {}
    for group, examples in DEV.items():
        vectors = drawn.reader.represent([drawn.read(e, "text-only") for e in load_examples(examples)])
        logits = drawn.location.head(vectors)
        others = torch.cat([logits[:, :token], logits[:, token + 1 :]], 1)
        leads[group] = (logits[:, token] - others.max(1).values).tolist()
    pairs = [(h > b) + (h == b) / 2 for h in leads["harmful"] for b in leads["benign"]]
    assert point.auc == {"benign": pytest.approx(sum(pairs) / len(pairs))}
    assert 0.5 < point.auc["benign"] < 1


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_a_calibrated_adapter_is_saved_as_it_acts(drawn, tmp_path):
    drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=[2.0])
    drawn.save(tmp_path / "adapter")
    prompts = [drawn.read(e, "text-only") for e in load_examples(DEV["harmful"])]
    loaded = RRS.load(tmp_path / "adapter", *tiny_qwen2_audio(), verbose=False)
    assert torch.equal(loaded.reader.represent(prompts), drawn.reader.represent(prompts))
    assert loaded.record["calibrated"]["factor"] == 2.0


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_answers_of_another_strength_are_not_reused(drawn, tmp_path):
    answers = []
    for strengths in ([1.0], [2.0]):
        drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=strengths)
        report = drawn.evaluate(DEV, ["text-only"], max_new_tokens=3, cache=tmp_path / "log.jsonl", usefulness=0)
        fresh = drawn.evaluate(DEV, ["text-only"], max_new_tokens=3, usefulness=0)
        answers.append([a.response for a in report.answers])
        assert answers[-1] == [a.response for a in fresh.answers]
    assert answers[0] != answers[1]


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_an_adapter_that_refuses_with_other_words_is_left_as_it_is(drawn):
    scale, never = drawn.lora.scale, drawn.tokenizer.convert_ids_to_tokens(3)
    drawn.token_id = lambda _text: 3  # the first choice nowhere
    with pytest.warns(rrs.RRSWarning, match="is the first choice nowhere"):
        drawn.calibrate(DEV, ("text-only",), strengths=(0.5, 1.1, 2.0))
    assert drawn.lora.scale == pytest.approx(1.1 * scale), never


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_with_a_judge_calibrate_goes_on_to_weaker_strengths(drawn):
    """By a judge for whom every answer that vanilla would not give is a refusal, those count that begin otherwise."""
    before, strengths = drawn.lora.scale, [0.02, 0.5, 1.0, 1.5, 2.0]
    with drawn.disabled():
        plain = {a for rows in DEV.values() for a in drawn.generate(rows, "text-only", max_new_tokens=3)}
    answered = []

    def judge(_prompts, answers):
        answered.append(drawn.lora.scale if drawn.lora.attached else 0.0)
        return ["compliance" if a in plain else "refusal" for a in answers]

    drawn.calibrate(DEV, ["text-only"], budget=0.5, strengths=strengths)
    by_first_choice = drawn.record["calibrated"]["factor"]
    drawn.lora.scale = before
    points = drawn.calibrate(DEV, ["text-only"], budget=0.5, strengths=strengths, judge=judge, max_new_tokens=3)
    found = drawn.record["calibrated"]
    assert [p.factor for p in points] == strengths
    assert found["factor"] < by_first_choice
    tried = [s for s in reversed(strengths) if found["factor"] <= s <= by_first_choice]
    assert answered == [0.0, *(pytest.approx(s * before) for s in tried)]  # vanilla, then weaker and weaker
    assert drawn.lora.scale == found["scale"] == pytest.approx(found["factor"] * before)
    report = drawn.evaluate(DEV, ["text-only"], judge=judge, max_new_tokens=3, usefulness=0)
    for group in DEV:
        assert found["answers"][group] == report.rate(group, "text-only").value
    assert found["answers"]["cost"] == found["answers"]["benign"] <= 0.5


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_with_a_judge_a_broken_strength_is_not_the_last_one_tried(drawn):
    """Answers that loop refuse nothing; weaker updates may leave them whole."""
    before = drawn.lora.scale

    def judge(prompts, answers):
        if not drawn.lora.attached:
            return ["compliance"] * len(answers)
        return ["degenerate" if drawn.lora.scale > 1.2 * before else "compliance"] * len(answers)

    strengths = [0.5, 1.0, 1.5, 2.0, 3.0]
    points = drawn.calibrate(DEV, ["text-only"], budget=0.8, strengths=strengths, judge=judge, max_new_tokens=2)
    found = drawn.record["calibrated"]
    assert found["factor"] <= 1.0
    assert found["answers"]["degenerate"] == 0
    point = next(p for p in points if p.factor == found["factor"])  # all figures are of the same strength
    assert (found["refused"], found["cost"], found["auc"]) == (point.refused, point.cost, point.auc)


@pytest.mark.filterwarnings("ignore:.*are in the training set:rrs.RRSWarning")
def test_a_judge_that_fails_leaves_the_strength(drawn):
    before, known = drawn.lora.scale, drawn.record.get("calibrated")

    def judge(prompts, answers):
        if drawn.lora.attached:
            raise ConnectionError("no answer")
        return ["compliance"] * len(answers)

    with pytest.raises(ConnectionError):
        drawn.calibrate(DEV, ["text-only"], budget=1.0, strengths=[0.5, 2.0], judge=judge, max_new_tokens=2)
    assert drawn.lora.scale == before
    assert drawn.record.get("calibrated") == known


def test_a_report_that_a_callback_made_is_not_the_trained_adapters(tiny, harmful, benign):
    r = RRS(*tiny, small(), verbose=False)

    def look(step):
        if step.step == 1:
            step.rrs.evaluate({"harmful": harmful}, ["text-only"], max_new_tokens=1, usefulness=0)
            assert step.rrs.report is not None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rrs.RRSWarning)
        r.fit(harmful, benign, callbacks=[look], preflight=0)
    assert r.report is None


def test_calibrate_says_what_is_wrong_and_leaves_the_strength(drawn):
    before = drawn.lora.scale
    for call, words in (
        (lambda: drawn.calibrate({"harmful": DEV["harmful"]}, ["text-only"]), "'harmful': 6"),
        (lambda: drawn.calibrate(DEV, ["text-only"], strengths=[0.0]), "factors above 0"),
        (lambda: drawn.disable().calibrate(DEV, ["text-only"]), "no adapter to calibrate"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    drawn.enable()
    assert drawn.lora.scale == before
    with pytest.warns(rrs.RRSWarning, match="No strength stays within the budget of -1"):
        points = drawn.calibrate(DEV, ["text-only"], budget=-1, strengths=[0.5, 1.0])
    assert drawn.record["calibrated"]["cost"] == min(p.cost for p in points)
