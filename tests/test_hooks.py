"""Invariants of finding, capturing, replaying and the LoRA."""

from __future__ import annotations

import copy
import threading

import peft
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
from rrs.hooks import (
    LoRA,
    Prompt,
    Reader,
    all_gather,
    attached,
    best_device,
    capture,
    frozen,
    linear_paths,
    locate,
    lock,
    on_rank0,
    seeded,
    steer,
)

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
    with pytest.raises(ValueError, match="modules='nope' is not a module"), capture(model, ["lm_head", "nope"]):
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
    mixed, passes, run = [p for each in zip(*kinds, strict=True) for p in each], [], rrs.reader._pass
    monkeypatch.setattr(rrs.reader, "_pass", lambda part, *how: passes.append(part) or run(part, *how))
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
    penalty = lora.penalty()
    assert torch.allclose(penalty, dense, rtol=1e-5)
    for gradient, true in zip(torch.autograd.grad(penalty, list(lora.parameters())), wanted, strict=True):
        assert torch.allclose(gradient, true, rtol=1e-4, atol=1e-5)


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


def test_the_lora_of_a_copied_model_comes_off_there(tiny):
    model, lora = tiny[0], lora_on(tiny[0]).attach()
    copied = copy.deepcopy(model)
    (theirs,) = attached(copied)
    theirs.detach()
    assert not attached(copied)
    assert attached(model) == [lora]


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


def test_a_merge_that_was_broken_off_goes_on(tiny):
    rrs = RRS(*tiny, verbose=False)
    inputs = next(full_inputs(rrs, "audio-text"))
    lora = lora_on(rrs.model).eval().attach()
    adapted, third = rrs.model(**inputs).logits, lora.B[2].data
    lora.B[2].data = third[:, :1]
    with pytest.raises(RuntimeError):
        lora.merge()
    lora.B[2].data = third
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)
    lora.merge()
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)
    lora.merge()
    assert torch.allclose(rrs.model(**inputs).logits, adapted, atol=1e-4)


@pytest.mark.parametrize(
    ("scaling", "capped", "longer"), [(8.0, False, False), (0.25, False, False), (8.0, False, True), (1.0, True, False)]
)
def test_logits_are_scaled_as_the_model_does(scaling, capped, longer):
    """Granite divides what its head gives, also where the decoder sees a longer prompt; a soft cap is no scale."""
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
    if longer:
        twice = model.get_input_embeddings()(ids).detach().repeat(1, 2, 1)
        model.register_forward_pre_hook(lambda *_: ((), {"inputs_embeds": twice}), with_kwargs=True)
    reader = Reader(model.eval(), locate(model), lambda _text, _wave: {"input_ids": ids})
    prompt = reader.read("x")
    assert reader.exact is not longer
    assert reader.logit_scale == pytest.approx(1 if capped else 1 / scaling)
    with torch.no_grad():
        logits = model(ids).logits[0, -1:]
        ours = reader.logits(reader.represent([prompt]))
    assert torch.allclose(ours, logits, atol=1e-3) is not capped
    assert torch.equal(ours.argmax(-1), logits.argmax(-1))


def test_inputs_of_ones_own_may_name_no_mask():
    prompt = Prompt(torch.arange(3), make=lambda: {"input_ids": torch.arange(3)[None], "attention_mask": None})
    assert prompt.extended([7]).inputs()["input_ids"].tolist() == [[0, 1, 2, 7]]


@pytest.mark.parametrize("length", [5, 7, 8])
def test_a_prompt_as_long_as_the_model_has_positions_is_read(length):
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=8)).eval()
    reader = Reader(model, locate(model), lambda _text, _wave: {"input_ids": torch.arange(length)[None]})
    assert len(reader.read("x")) == length
    assert reader.exact


def test_lora_targets_that_match_nothing(tiny):
    with pytest.raises(ValueError, match=r"\['query'\] match no linear .* name some of .*'q_proj'"):
        linear_paths(locate(tiny[0]), ("q_proj", "query"))


# -- layers, steering --------------------------------------------------------------------------------------------------


def every_layer(rrs, inputs):
    """`[layers + 1, hidden]` at the last token of one unpadded prompt, by hooks of one's own."""
    seen = []
    blocks = rrs.location.layers
    handles = [blocks[0].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0, -1]))]
    for block in blocks:
        handles.append(block.register_forward_hook(lambda _m, _a, out: seen.append(out[0, -1])))
    with torch.no_grad():
        rrs.model(**inputs)
    for handle in handles:
        handle.remove()
    return torch.stack(seen)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_layers_are_those_of_unpadded_full_passes(tiny, condition, exact):
    rrs = RRS(*tiny, verbose=False)
    prompts = prompts_of(rrs, condition)
    rrs.reader.exact = exact
    rows_ = rrs.reader.represent(prompts, layers=True)
    wanted = torch.stack([every_layer(rrs, inputs) for inputs in full_inputs(rrs, condition)])
    assert rows_.shape == (len(prompts), 3, 32)
    assert torch.allclose(rows_, wanted, atol=1e-5)
    some = rrs.reader.represent(prompts, layers=True, last=2)
    assert torch.allclose(some[:, -1], wanted, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(rrs.location.norm(some[:, :, -1]), rrs.reader.represent(prompts, last=2), atol=1e-5)


def test_more_positions_than_a_prompt_has_repeat_its_first(tiny):
    rrs = RRS(*tiny, verbose=False)
    prompts = [Prompt(torch.tensor([5, 6])), Prompt(torch.tensor([5, 6, 7, 8]))]
    rrs.reader.read("hello")
    for exact in (True, False):
        rrs.reader.exact = exact
        rows_ = rrs.reader.represent(prompts, last=4)
        assert torch.equal(rows_[0, 0], rows_[0, 2])
        assert not torch.allclose(rows_[0, 2], rows_[0, 3])
        assert torch.allclose(rows_[0, 2:], rows_[1, :2], atol=1e-5)


VECTOR = torch.linspace(-1, 1, 32)


@pytest.mark.parametrize("position", [None, -1, 0, slice(1, 4), slice(-3, None)])
@pytest.mark.parametrize("layer", [0, 1, -1, "model.language_model.layers.0.mlp"])
def test_steering_in_batches_is_steering_one_prompt(tiny, layer, position):
    """Under padding, shared prefixes and in answers, the position is the prompt's own."""
    rrs = RRS(*tiny, verbose=False)
    for condition in CONDITIONS:
        prompts = prompts_of(rrs, condition)
        vanilla = rrs.reader.represent(prompts)
        answers = []
        with steer(rrs.model, VECTOR, layer=layer, position=position, scale=3.0):
            ours = rrs.reader.represent(prompts)
            texts = rrs.generate(rows("harmful", 4), condition, max_new_tokens=4)
        where = rrs.location.layers[layer] if isinstance(layer, int) else rrs.model.get_submodule(layer)
        for row, inputs in zip(ours, full_inputs(rrs, condition), strict=True):
            length = inputs["input_ids"].shape[1]

            def add(_module, _args, out, length=length):
                if position is None:
                    return out + 3 * VECTOR
                if out.shape[1] == length:
                    out[:, position] += 3 * VECTOR
                return out

            handle = where.register_forward_hook(add)
            with torch.no_grad(), capture(rrs.model, "lm_head", where="input", position=-1, stop=True) as record:
                rrs.model(**inputs)
            new = rrs.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, length:]
            handle.remove()
            answers.append(rrs.tokenizer.decode(new, skip_special_tokens=True).strip())
            assert torch.allclose(row, record["lm_head"][0][0], atol=1e-4)
        assert not torch.allclose(ours, vanilla, atol=1e-2) or (layer in (1, -1) and position not in (None, -1))
        assert texts == answers
        assert torch.equal(rrs.reader.represent(prompts), vanilla)


def test_steering_at_the_head_moves_logits_and_not_what_is_read(tiny):
    rrs = RRS(*tiny, verbose=False)
    prompts = prompts_of(rrs, "text-only")
    before = rrs.reader.represent(prompts)
    for exact in (True, False):
        rrs.reader.exact = exact
        with steer(rrs.model, VECTOR, scale=0.5), torch.no_grad():
            now = rrs.reader.represent(prompts)
            moved, same = rrs.reader.logits(now), rrs.reader.logits(now, vanilla=True)
            full = torch.cat([rrs.model(**i).logits[:, -1] for i in full_inputs(rrs, "text-only")])
        assert torch.allclose(now, before, atol=1e-5)
        with torch.no_grad():
            assert torch.allclose(moved, rrs.location.head(before + 0.5 * VECTOR), atol=1e-4)
            assert torch.allclose(same, rrs.location.head(before), atol=1e-4)
        assert torch.allclose(moved, full, atol=1e-4)


def test_a_function_steers(tiny, snapshot):
    """Taking a direction out: nothing along it is left behind the block."""
    rrs = RRS(*tiny, verbose=False)
    prompts, unit, before = prompts_of(rrs, "audio-text"), VECTOR / VECTOR.norm(), snapshot(rrs.model)
    with steer(rrs.model, lambda h: h - (h @ unit)[..., None] * unit, layer=0):
        out = rrs.reader.represent(prompts, layers=True)
    assert torch.allclose(out[:, 1] @ unit, torch.zeros(4), atol=1e-5)
    assert_same(before, snapshot(rrs.model))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"layer": 2}, "there are 2"),
        ({"layer": "model.nowhere"}, "'model.nowhere'"),
        ({"position": 0}, "needs layer="),
        ({"vector": torch.ones(5)}, r"\[5\] must be \[hidden\] = \[32\]"),
    ],
)
def test_steering_errors(tiny, kwargs, words):
    with pytest.raises(ValueError, match=words), steer(tiny[0], **{"vector": VECTOR, **kwargs}):
        pass


# -- answers are the model's own ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 1},
        {"repetition_penalty": 1.1, "no_repeat_ngram_size": 3},
        {"encoder_repetition_penalty": 2.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"guidance_scale": 2.0},
        {"min_length": 60, "eos_token_id": list(range(250))},
        {"sequence_bias": [[[64, 77], 50.0]]},
    ],
    ids=lambda s: "+".join(s),
)
def test_generation_settings_that_read_the_prompt(tiny, setting):
    rrs = RRS(*tiny, verbose=False)
    plain = rrs.generate(rows("harmful", 4), "audio-text", max_new_tokens=8)
    rrs.model.generation_config.update(**setting)
    for condition in CONDITIONS:
        ours = rrs.generate(rows("harmful", 4), condition, max_new_tokens=8)
        for inputs, answer in zip(full_inputs(rrs, condition), ours, strict=True):
            new = rrs.model.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
            assert answer == rrs.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert rrs.generate(rows("harmful", 4), "audio-text", max_new_tokens=8) != plain or "sequence_bias" in setting


def test_a_repetition_penalty_keeps_the_batches(tiny):
    rrs = RRS(*tiny, verbose=False)
    prompts, settings = prompts_of(rrs, "audio-text"), rrs.model.generation_config
    settings.update(repetition_penalty=1.3)
    assert len(list(rrs.reader.batches(prompts, settings))) == 1
    settings.update(no_repeat_ngram_size=2)
    assert len(list(rrs.reader.batches(prompts, settings))) == 4


# -- gradient checkpointing --------------------------------------------------------------------------------------------


def gradients(rrs, prompts):
    torch.manual_seed(3)
    lora = lora_on(rrs.model, dropout=0.5).attach().train()
    lora.key, runs = (1,), []
    handle = rrs.location.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    with frozen(rrs.model):
        rrs.reader.last_hidden(prompts, 2).square().sum().backward()
    handle.remove()
    lora.detach()
    return [p.grad for p in lora.parameters()], len(runs)


def test_gradient_checkpointing_acts_and_changes_nothing(tiny, snapshot):
    rrs = RRS(*tiny, verbose=False)
    prompts = prompts_of(rrs, "audio-text")
    for layer in rrs.location.layers:
        layer.self_attn.attention_dropout = 0.5  # must stay off
    rrs.reader.share_prefix = False
    wanted, once = gradients(rrs, prompts)
    rrs.reader.share_prefix = True
    rrs.model.gradient_checkpointing_enable({"use_reentrant": False})
    before = snapshot(rrs.model)
    ours, twice = gradients(rrs, prompts)
    assert (once, twice) == (1, 2)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, wanted, strict=True))
    assert before["training"] == snapshot(rrs.model)["training"]
    rrs.reader.exact = False  # the full model runs, one by one, so that dropout draws others
    assert gradients(rrs, prompts)[1] == 2 * len(prompts)


# -- flags, locks, interrupts, wrappers --------------------------------------------------------------------------------


def test_frozen_restores_every_flag(tiny, snapshot):
    model, _ = tiny
    model.model.audio_tower.train()
    model.lm_head.requires_grad_(False)
    before = snapshot(model)
    with frozen(model), frozen(model):
        assert not any(m.training for m in model.modules())
        assert not any(p.requires_grad for p in model.parameters())
    assert_same(before, snapshot(model))


def test_a_lora_that_was_cut_short_comes_off(tiny, snapshot, monkeypatch):
    model, _ = tiny
    lora, real, calls = lora_on(model), nn.Module.register_forward_hook, []
    before = snapshot(model)

    def third_fails(module, hook, **how):
        calls.append(module)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(module, hook, **how)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_forward_hook", third_fails)
        with pytest.raises(KeyboardInterrupt):
            lora.attach()
    assert attached(model) == [lora]
    assert lora.attached
    assert snapshot(lora.attach() and model)["hooks"] == before["hooks"] + len(lora.paths)
    lora.detach()
    assert_same(before, snapshot(model))


def test_a_lock_is_one_per_model_and_reentrant(tiny):
    model, seen = tiny[0], []
    assert lock(model) is lock(model) is not lock(tiny_llama())

    def other():
        with lock(model):
            seen.append("other")

    thread = threading.Thread(target=other)
    with lock(model), lock(model):
        thread.start()
        thread.join(0.1)
        seen.append("first")
    thread.join()
    assert seen == ["first", "other"]


def test_wrapped_models_are_refused_with_the_way_out(tiny):
    model, _ = tiny
    with pytest.raises(ValueError, match=r"OptimizedModule, .* not supported: pass model\._orig_mod"):
        locate(torch.compile(model))
    with pytest.raises(ValueError, match=r"DataParallel, .* not supported: pass model\.module"):
        locate(nn.DataParallel(model))
    with pytest.raises(ValueError, match=r"PeftModel, .* not supported: pass model\.merge_and_unload\(\)"):
        locate(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])))


def test_a_lora_of_no_numbers_is_refused(tiny):
    lora = lora_on(tiny[0])
    named = lora.tensors()
    key = next(iter(named))
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"NaN or infinite.*{key}"):
            lora.load_tensors({**named, key: named[key] * value})
    assert all(torch.equal(a, b) for a, b in zip(lora.tensors().values(), named.values(), strict=True))
    with pytest.raises(ValueError, match="alpha / r, is inf"):
        LoRA(tiny[0], lora.paths, r=2, alpha=float("inf"))
    lora.scale = float("nan")
    with pytest.raises(ValueError, match="scale"):
        lora.merge()


def test_alone_collectives_do_nothing():
    assert all_gather({"a": 1}) == {"a": 1}
    assert on_rank0(lambda: 5) == 5
    assert best_device() == torch.device("cpu") or torch.accelerator.is_available()
    assert torch.equal(torch.rand(2, generator=seeded(1, "a")), torch.rand(2, generator=seeded(1, "a")))
