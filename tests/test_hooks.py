"""Invariants of finding, capturing, replaying and the LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import assert_same, rows
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from rrs import RRS, RRSConfig
from rrs.data import load_examples
from rrs.hooks import LoRA, Reader, capture, linear_paths, locate

CONDITIONS = ("audio-text", "text-only", "audio-only")


def prompts_of(rrs, condition, n=4):
    return [rrs.read(e, condition) for e in load_examples(rows("harmful", n))]


def full_inputs(rrs, condition, n=4):
    """The processor's own inputs, one prompt at a time, by the long way round."""
    for example in load_examples(rows("harmful", n)):
        text = {"audio-text": rrs.config.instruction, "text-only": example.text, "audio-only": None}[condition]
        yield rrs.render(text, None if condition == "text-only" else example.clip[1](16000))


def tiny_llama(**kwargs):
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, **kwargs)).eval()


def test_locate_names_every_part(tiny):
    model, _ = tiny
    where = locate(model)
    assert where.decoder is model.get_submodule(where.decoder_path) is model.model.language_model
    assert where.head is model.get_submodule(where.head_path) is model.lm_head
    assert where.norm is model.get_submodule(where.norm_path) is model.model.language_model.norm
    assert where.layers is model.get_submodule(where.layers_path) is model.model.language_model.layers


def test_locate_on_text_models():
    llama = tiny_llama()
    assert locate(llama).decoder_path == "model"
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50))
    where = locate(gpt2)
    assert (where.decoder_path, where.layers_path, where.norm_path) == (
        "transformer",
        "transformer.h",
        "transformer.ln_f",
    )


def test_locate_tied_head_is_the_head():
    assert locate(tiny_llama(tie_word_embeddings=True)).head_path == "lm_head"


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"decoder": "model.languge_model"}, ["decoder='model.languge_model'", "close"]),
        ({"head": "nowhere"}, ["head='nowhere'"]),
        ({"decoder": "model.audio_tower"}, ["norm", "model.audio_tower"]),
    ],
)
def test_locate_errors_name_argument_and_candidates(tiny, kwargs, words):
    with pytest.raises(ValueError) as error:
        locate(tiny[0], **kwargs)
    assert all(word in str(error.value) for word in words)


def test_locate_refuses_a_model_without_head(tiny):
    with pytest.raises(ValueError, match="language-model head"):
        locate(tiny[0].model)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_captured_is_what_the_head_multiplies(tiny, condition):
    rrs = RRS(*tiny, verbose=False)
    for inputs in full_inputs(rrs, condition):
        with torch.no_grad():
            with capture(rrs.model, "lm_head", where="input") as every:
                logits = rrs.model(**inputs).logits
            with capture(rrs.model, "lm_head", where="input", position=-1, stop=True) as last:
                rrs.model(**inputs)
            assert torch.equal(rrs.location.head(every["lm_head"][0]), logits)
            assert torch.equal(last["lm_head"][0], every["lm_head"][0][:, -1])


def test_capture_records_modules_positions_and_passes(tiny):
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "text-only"))
    length = inputs["input_ids"].shape[1]
    paths = ["model.language_model.layers.0", "model.language_model.layers.1.mlp"]
    with torch.no_grad(), capture(rrs.model, paths) as record:
        rrs.model(**inputs)
        rrs.model(**inputs)
    assert [len(record[p]) for p in paths] == [2, 2]
    assert record[paths[0]][0].shape == (1, length, 32)
    with torch.no_grad(), capture(rrs.model, paths[0], position=slice(0, 2)) as part:
        rrs.model(**inputs)
    assert torch.equal(part[paths[0]][0], record[paths[0]][0][:, 0:2])


def test_stopping_skips_the_head(tiny):
    rrs = RRS(*tiny, verbose=False)
    ran = []
    handle = rrs.model.lm_head.register_forward_hook(lambda *_: ran.append(1))
    with capture(rrs.model, "lm_head", where="input", position=-1, stop=True) as record:
        rrs.model(**next(full_inputs(rrs, "text-only")))
    handle.remove()
    assert len(record["lm_head"]) == 1
    assert not ran


def test_no_hook_is_left_after_an_error(tiny, snapshot):
    model, _ = tiny
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="mine"), capture(model, ["lm_head", "model"]):
        raise RuntimeError("mine")
    with pytest.raises(ValueError, match=r"No module \['nope'\]"), capture(model, ["lm_head", "nope"]):
        pass
    assert_same(before, snapshot(model))


def test_nested_stops_end_their_own_capture(tiny):
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "text-only"))
    with capture(rrs.model, "lm_head", where="input") as outer:
        with capture(rrs.model, "model.language_model.layers.0", stop=True) as inner:
            rrs.model(**inputs)
        rrs.model(**inputs)
    assert len(inner["model.language_model.layers.0"]) == 1
    assert len(outer["lm_head"]) == 1


@pytest.mark.parametrize("condition", CONDITIONS)
def test_replay_equals_the_full_forward(tiny, condition):
    """Cached clips, composed prompts, left-padded in one batch = the full model, one unpadded prompt at a time."""
    rrs = RRS(*tiny, verbose=False)
    prompts = prompts_of(rrs, condition)
    assert len({len(p) for p in prompts}) > 1
    batched = rrs.reader.represent(prompts)
    assert rrs.reader.exact
    for row, inputs in zip(batched, full_inputs(rrs, condition), strict=True):
        with torch.no_grad(), capture(rrs.model, "lm_head", where="input", position=-1, stop=True) as record:
            rrs.model(**inputs)
        assert torch.allclose(row, record["lm_head"][0][0], atol=1e-5)


def test_prompts_with_and_without_audio_mix(tiny, monkeypatch):
    """In any order, each vector is its own prompt's; a pass takes one kind, and as many of it as there are."""
    rrs = RRS(*tiny, verbose=False)
    kinds = [prompts_of(rrs, condition) for condition in CONDITIONS]
    rows_ = (
        torch.cat([rrs.reader.represent(kind) for kind in kinds]).unflatten(0, (3, -1)).transpose(0, 1).flatten(0, 1)
    )
    mixed, passes, replay = [p for each in zip(*kinds, strict=True) for p in each], [], rrs.reader._replay
    monkeypatch.setattr(rrs.reader, "_replay", lambda part, last: passes.append(part) or replay(part, last))
    with torch.no_grad():
        assert torch.allclose(rrs.reader.last_hidden(mixed)[:, 0], rows_, atol=1e-5)
    assert torch.allclose(rrs.reader.represent(mixed), rows_, atol=1e-5)
    assert [len(part) for part in passes] == [4, 8, 4, 8]


def test_the_tower_runs_once_per_clip(tiny):
    rrs = RRS(*tiny, RRSConfig(), verbose=False)
    runs = []
    handle = rrs.model.model.audio_tower.register_forward_hook(lambda *_: runs.append(1))
    examples = load_examples(rows("harmful", 4))
    for _ in range(2):
        for instruction in rrs.config.prompts:
            for example in examples:
                rrs.read(example, "audio-text", instruction)
    handle.remove()
    # once per clip, once more per instruction (its ids around the audio are learnt), plus one check of the first clip
    assert len(runs) <= len(examples) + len(rrs.config.prompts) + 1


def test_composed_prompts_equal_the_processors(tiny):
    rrs, other = RRS(*tiny, verbose=False), RRS(*tiny, verbose=False)
    for example in load_examples(rows("harmful", 3)):
        for instruction in rrs.config.prompts[:3]:
            composed = rrs.reader.collate([rrs.read(example, "audio-text", instruction)])
            other.reader._clips.clear()
            fresh = other.reader.collate([other.read(example, "audio-text", instruction)])
            assert torch.equal(composed["inputs_embeds"], fresh["inputs_embeds"])


@pytest.mark.parametrize("limit", [0, 3000])
def test_clips_beyond_the_limit_are_on_disk(tiny, limit):
    """All or some of them; what comes back is bit for bit what was put there, and the files go with the reader."""
    free, bounded = RRS(*tiny, verbose=False), RRS(*tiny, verbose=False, max_cached=limit)
    pairs = [[r.read(e, "audio-text") for e in load_examples(rows("harmful", 6))] for r in (free, bounded)]
    assert torch.equal(*(r.reader.represent(p) for r, p in zip((free, bounded), pairs, strict=True)))
    in_memory = [p.rows for p in pairs[1] if not p.rows.untyped_storage().filename]
    assert sum(rows_.numel() * 4 for rows_ in in_memory) <= limit
    assert bool(in_memory) is (limit > 0)
    assert free.reader._folder is None
    folder = Path(bounded.reader._folder.name)
    assert list(folder.iterdir())
    bounded.reader._folder.cleanup()
    assert not folder.exists()


def test_inexact_replay_falls_back_to_the_full_model(tiny):
    """A model whose head sees something else than the decoder's output is noticed, said, and still right."""

    model, processor = tiny

    def bend(_module, _args, out):
        out["last_hidden_state"] = out["last_hidden_state"].tanh()
        return out

    model.model.register_forward_hook(bend)
    rrs = RRS(model, processor, verbose=False)
    with pytest.warns(UserWarning, match="the full model runs"):
        prompts = prompts_of(rrs, "audio-text", 2)
    rows_ = rrs.reader.represent(prompts)
    for row, inputs in zip(rows_, full_inputs(rrs, "audio-text", 2), strict=True):
        with torch.no_grad(), capture(model, "lm_head", where="input", position=-1, stop=True) as record:
            model(**inputs)
        assert torch.equal(row, record["lm_head"][0][0])
    assert len(rrs.generate(rows("harmful", 2), max_new_tokens=4)) == 2


def test_a_factor_between_decoder_and_head_is_replayed(tiny):
    model, processor = tiny

    def divide(_module, _args, out):
        out["last_hidden_state"] = out["last_hidden_state"] / 24
        return out

    model.model.register_forward_hook(divide)
    rrs = RRS(model, processor, verbose=False)
    rows_ = rrs.reader.represent(prompts_of(rrs, "audio-text", 3))
    assert rrs.reader.exact
    assert rrs.reader.scale == pytest.approx(1 / 24, rel=1e-4)
    for row, inputs in zip(rows_, full_inputs(rrs, "audio-text", 3), strict=True):
        with torch.no_grad(), capture(model, "lm_head", where="input", position=-1, stop=True) as record:
            model(**inputs)
        assert torch.allclose(row, record["lm_head"][0][0], atol=1e-6)


def lora_on(model, **kwargs):
    where = locate(model)
    lora = LoRA(model, linear_paths(where, ("q_proj", "down_proj")), r=4, alpha=8, **kwargs)
    for b in lora.B:
        nn.init.normal_(b, std=0.2)
    return lora


def test_lora_penalty_is_the_dense_one(tiny):
    lora = lora_on(tiny[0])
    dense = sum(((lora.scale * b @ a) ** 2).sum() for a, b in zip(lora.A, lora.B, strict=True))
    wanted = torch.autograd.grad(dense, list(lora.parameters()))
    for times in (1, 2):  # it adds to gradients that are there
        assert torch.allclose(lora.add_penalty_gradient(0.5), dense, rtol=1e-5)
        for parameter, gradient in zip(lora.parameters(), wanted, strict=True):
            assert torch.allclose(parameter.grad, 0.5 * times * gradient, rtol=1e-4, atol=1e-5)


def test_lora_detached_is_bit_identical(tiny, snapshot):
    model, _ = tiny
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "audio-text"))
    lora = lora_on(model).eval()
    before, vanilla = snapshot(model), model(**inputs).logits
    lora.attach()
    assert not torch.equal(model(**inputs).logits, vanilla)
    lora.attach()  # twice is once
    lora.detach()
    assert torch.equal(model(**inputs).logits, vanilla)
    assert_same(before, snapshot(model))


def test_lora_touches_the_decoder_only(tiny):
    where = locate(tiny[0])
    paths = linear_paths(where, RRSConfig().target_modules)
    assert len(paths) == 2 * 7
    assert all(path.startswith("model.language_model.layers.") for path in paths)


def test_lora_merge_equals_adapter(tiny):
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "audio-text"))
    lora = lora_on(rrs.model).eval().attach()
    adapted = rrs.model(**inputs).logits
    lora.merge()
    assert not lora.attached
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)


def test_a_merge_that_was_broken_off_goes_on(tiny, monkeypatch):
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "audio-text"))
    lora = lora_on(rrs.model).eval().attach()
    adapted, seen = rrs.model(**inputs).logits, []

    def third_fails(module):
        seen.append(module)
        if len(seen) == 3:
            raise torch.OutOfMemoryError
        return False

    with monkeypatch.context() as patch:
        patch.setattr("rrs.hooks._is_conv1d", third_fails)
        with pytest.raises(torch.OutOfMemoryError):
            lora.merge()
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)
    lora.merge()
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)


def test_lora_on_transposed_linears():
    """GPT-2's Conv1D stores [in, out]."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50)).eval()
    lora = LoRA(model, linear_paths(locate(model), ("c_attn",)), r=2, alpha=2)
    nn.init.normal_(lora.B[0])
    ids = torch.arange(5)[None]
    lora.eval().attach()
    adapted = model(ids).logits
    lora.merge()
    assert torch.allclose(model(ids).logits, adapted, atol=1e-5)


@pytest.mark.parametrize(("scaling", "capped"), [(8.0, False), (0.25, False), (1.0, True)])
def test_logits_are_scaled_as_the_model_does(scaling, capped):
    """Granite divides what its head gives; a soft cap is no scale."""
    torch.manual_seed(0)
    common = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 300, "initializer_range": 0.5,
    }  # fmt: skip
    if capped:
        model = Gemma2ForCausalLM(Gemma2Config(**common, head_dim=16, final_logit_softcapping=2.0))
    else:
        model = GraniteForCausalLM(GraniteConfig(**common, logits_scaling=scaling))
    ids = torch.arange(5, 12)[None]
    reader = Reader(model.eval(), locate(model), lambda _text, _wave: {"input_ids": ids})
    prompt = reader.read("x")
    assert reader.logit_scale == pytest.approx(1 if capped else 1 / scaling)
    with torch.no_grad():
        logits = model(ids).logits[0, -1:]
        ours = reader.logits(reader.represent([prompt]))
    assert torch.allclose(ours, logits, atol=1e-3) is not capped
    assert torch.equal(ours.argmax(-1), logits.argmax(-1))


def test_lora_targets_that_match_nothing(tiny):
    with pytest.raises(ValueError, match=r"\['query'\] match no linear .* there are .*'q_proj'"):
        linear_paths(locate(tiny[0]), ("q_proj", "query"))
