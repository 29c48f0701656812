"""The same invariants on every audio-language class of transformers, each a tiny random model (see zoo.py)."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
import zoo
from compare import negative_log_likelihood
from conftest import OLDER, rows
from torch import nn

from rrs import RRS, RRSConfig, TrainItem
from rrs.data import load_examples
from rrs.hooks import LoRA, capture, expert_parameters, frozen, linear_paths, locate

THREE = ("audio-text", "text-only", "audio-only")
HARMFUL, BENIGN = rows("harmful", 3), rows("benign", 3)
CONFIG = {
    "learning_rate": 1e-2,
    "penalty": 1e-3,
    "lora_dropout": 0.0,
    "batch_size": 3,
    "accumulate": 2,
    "lora_r": 4,
}


def tiny_rrs(name: str, **config) -> RRS:
    model, build_inputs = zoo.tiny(name)
    return RRS(model, zoo.TOKENIZER, RRSConfig(**{**CONFIG, **config}), build_inputs=build_inputs, verbose=False)


def text_of(rrs: RRS, example, condition: str) -> str | None:
    return {"audio-text": rrs.config.instruction, "text-only": example.text, "audio-only": None}[condition]


def full_inputs(rrs: RRS, condition: str):
    for e in load_examples(HARMFUL):
        yield rrs.render(text_of(rrs, e, condition), None if condition == "text-only" else e.clip[1](16000))


@torch.no_grad()
def true_vector(rrs: RRS, inputs, audio: bool) -> torch.Tensor:
    """What the head multiplies when the whole model runs on the prompt's own inputs, unpadded and alone."""
    if hasattr(rrs.model, "enable_adapters") and getattr(rrs.model, "_hf_peft_config_loaded", False):
        (rrs.model.enable_adapters if audio else rrs.model.disable_adapters)()  # as its generate() does
    with capture(rrs.model, rrs.location.head_path, where="input") as record:
        logits = rrs.model(**inputs).logits
    (vector,) = record[rrs.location.head_path]
    out = rrs.location.head(vector[:, -1])  # and it is what makes the logits, up to the model's own scaling or capping
    assert torch.equal(out.argmax(-1), logits[:, -1].argmax(-1))
    return vector[0, -1]


def test_no_class_is_left_out():
    """Of 21, the oldest transformers lacks 4; newer ones at most those that want a PEFT that is not out."""
    assert len(zoo.ZOO) == 21
    later = {"moss_transcribe_diarize", "muse_spark", "dots3_note", "vibevoice_asr"}
    assert zoo.LACKING.keys() <= {"granite_speech", "granite_speech_plus"} | (later if OLDER else set())
    assert all(transformers.__version__ in why for why in zoo.LACKING.values())


@pytest.mark.parametrize("name", zoo.NAMES)
def test_replayed_in_a_batch_is_the_models_own_vector(name):
    """Cached clips, composed prompts, shared prefix, padding = the full model, one unpadded prompt at a time."""
    rrs = tiny_rrs(name)
    for condition in THREE:
        examples = load_examples(HARMFUL)
        for instruction in (rrs.config.prompts[0], None):  # the second time, prompts are composed from cached clips
            prompts = [rrs.read(e, condition, instruction) for e in examples]
        assert rrs.reader.exact
        batched = rrs.reader.represent(prompts)
        for row, inputs in zip(batched, full_inputs(rrs, condition), strict=True):
            true = true_vector(rrs, inputs, condition != "text-only")
            assert (row - true).abs().max() <= 1e-4 * true.abs().max(), condition
        if rrs.reader.from_embeddings:  # generation starts from left-padded embeddings
            padded = rrs.reader.collate(prompts)
            with torch.no_grad(), capture(rrs.model, rrs.location.head_path, where="input", position=-1) as record:
                rrs.model(**padded)
            left = record[rrs.location.head_path][0]
            assert (left - batched).abs().max() <= 1e-4 * batched.abs().max(), condition


@pytest.mark.parametrize("name", zoo.NAMES)
def test_replayed_likelihoods_are_the_models_own(name):
    rrs, examples = tiny_rrs(name), load_examples(HARMFUL)
    answers = [torch.tensor(a) for a in ([5, 6, 7], [9], [11, 12])]
    for condition in THREE:
        items = [TrainItem(e, condition, answer) for e, answer in zip(examples, answers, strict=True)]
        rrs.reader.exact = None
        ours = negative_log_likelihood(rrs.reader, [rrs.read(e, condition) for e in examples], items)
        assert rrs.reader.exact
        rrs.reader.exact = False
        prompts = [rrs.read(e, condition) for e in examples]
        assert all(prompt.inputs for prompt in prompts)
        assert torch.allclose(ours, negative_log_likelihood(rrs.reader, prompts, items), atol=1e-3), condition


@pytest.mark.parametrize("name", zoo.NAMES)
def test_lora_touches_the_decoder_only(name):
    rrs = tiny_rrs(name)
    paths = linear_paths(rrs.location, rrs.config.target_modules)
    assert paths
    assert all(p.startswith(f"{rrs.location.decoder_path}.") for p in paths)
    towers = ("audio", "vision", "encoder", "projector", "talker", "tower", "embed", "lora_")
    assert not [p for p in paths if any(word in p for word in towers)]
    attention = {p.rpartition(".")[2] for p in paths}
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= attention or attention & {"qkv_proj", "kv_b_proj"}
    assert ("down_proj" in attention) or expert_parameters(rrs.location)


@pytest.mark.parametrize("name", zoo.NAMES)
def test_the_whole_job(name, tmp_path):
    """Train in three conditions, save, load with PEFT and by ourselves, answer, merge."""
    rrs = tiny_rrs(name, conditions=THREE, epochs=1, prompts=(RRSConfig().instruction,), batch_size=6, accumulate=1)
    before = {k: v.clone() for k, v in rrs.model.state_dict().items()}
    examples = load_examples(HARMFUL), load_examples(BENIGN)
    items = {condition: rrs.prepare(*examples, condition).items for condition in THREE}
    rrs.config.learning_rate, rrs.config.epochs = 1e-5, 4  # one batch again and again: downhill, if steps are small
    for condition in THREE:
        losses = [row["loss"] for row in rrs.train(items[condition]).history]
        assert losses[3] < losses[0], condition
    rrs.config.learning_rate, rrs.config.epochs = CONFIG["learning_rate"], 2
    rrs.train([item for condition in THREE for item in items[condition]])
    assert len(rrs.history) == 6
    after = rrs.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)

    ours = {c: [rrs.model(**i).logits for i in full_inputs(rrs, c)] for c in THREE}
    rrs.save(tmp_path / "adapter")
    model, build_inputs = zoo.tiny(name)
    loaded = RRS.load(tmp_path / "adapter", model, zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)
    theirs = peft.PeftModel.from_pretrained(zoo.tiny(name)[0], tmp_path / "adapter", adapter_name="rrs").eval()
    if name.startswith("granite"):
        theirs.base_model.set_adapter(["default", "rrs"])  # its own LoRA for audio is called "default"
    for condition in THREE:
        for i, logits in zip(full_inputs(rrs, condition), ours[condition], strict=True):
            assert torch.allclose(loaded.model(**i).logits, logits, atol=1e-6)
            assert torch.allclose(theirs(**i).logits, logits, atol=1e-5)
        assert rrs.generate(HARMFUL, condition, max_new_tokens=3) == loaded.generate(
            HARMFUL, condition, max_new_tokens=3
        )
    merged = rrs.merge()
    for condition in THREE:
        for i, logits in zip(full_inputs(rrs, condition), ours[condition], strict=True):
            assert torch.allclose(merged(**i).logits, logits, atol=1e-3 * float(logits.abs().max()))


def test_experts_alone_get_no_lora():
    rrs = tiny_rrs("qwen3_omni_moe")
    with pytest.raises(ValueError, match=r"name some of .*'q_proj'.* experts are 3-D parameters, which get no LoRA"):
        linear_paths(rrs.location, ("gate_proj", "up_proj", "down_proj"))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_logits_are_the_models_own(name):
    """But for a soft cap (Gemma), which leaves small ones nearly as they are."""
    rrs = tiny_rrs(name)
    for condition in THREE:
        prompts = [rrs.read(e, condition) for e in load_examples(HARMFUL)]
        ours = rrs.reader.logits(rrs.reader.represent(prompts))
        for mine, inputs in zip(ours, full_inputs(rrs, condition), strict=True):
            with rrs.reader.own_lora(condition != "text-only"), torch.no_grad():
                logits = rrs.model(**inputs).logits[0, -1]
            assert torch.allclose(mine, logits, atol=1e-2 * float(logits.abs().max()))


@pytest.mark.parametrize("name", zoo.NAMES)
def test_batched_answers_are_the_models_own(name):
    rrs = tiny_rrs(name)
    for condition in THREE:
        answers = rrs.generate(HARMFUL, condition, max_new_tokens=4)
        for inputs, answer in zip(full_inputs(rrs, condition), answers, strict=True):
            new = rrs.model.generate(**inputs, do_sample=False, max_new_tokens=4)[0, inputs["input_ids"].shape[1] :]
            assert answer == zoo.TOKENIZER.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", zoo.NAMES)
def test_a_repetition_penalty_reads_the_prompt_as_the_model_does(name):
    rrs = tiny_rrs(name)
    rrs.model.generation_config.update(repetition_penalty=1.3)
    for condition in THREE:
        answers = rrs.generate(HARMFUL, condition, max_new_tokens=6)
        for inputs, answer in zip(full_inputs(rrs, condition), answers, strict=True):
            new = rrs.model.generate(**inputs, do_sample=False, max_new_tokens=6)[0, inputs["input_ids"].shape[1] :]
            assert answer == zoo.TOKENIZER.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("name", [p for p in zoo.NAMES if not p.values[0].startswith("granite")])  # it can't checkpoint
def test_gradient_checkpointing_changes_no_gradient(name):
    rrs = tiny_rrs(name)
    lora = LoRA(rrs.model, linear_paths(rrs.location, rrs.config.target_modules), r=4, alpha=8)
    for b in lora.B:
        nn.init.normal_(b, std=0.02)
    prompts = [rrs.read(e, "audio-text") for e in load_examples(HARMFUL)]

    def gradient():
        with frozen(rrs.model):
            loss = rrs.reader.last_hidden(prompts)[:, 0, ::2].sum()  # no norm: that of an RMSNorm's output is constant
            grads = torch.autograd.grad(loss, list(lora.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in grads if g is not None])

    lora.attach()
    plain = gradient()
    rrs.model.gradient_checkpointing_enable()
    assert (gradient() - plain).abs().max() <= 1e-5 * plain.abs().max()
    if name == "gemma3n":
        with pytest.raises(ValueError, match="several streams"):
            rrs.reader.represent(prompts, layers=True)
    else:
        assert rrs.reader.represent(prompts, layers=True).shape == (3, len(rrs.location.layers) + 1, zoo.HIDDEN)


@pytest.mark.parametrize(
    "name", ["KyutaiSpeechToTextForConditionalGeneration", "VoxtralRealtimeForConditionalGeneration",
             "Qwen2_5OmniForConditionalGeneration", "Qwen3OmniMoeForConditionalGeneration"],
)  # fmt: skip
def test_classes_that_cannot_be_served_say_why(name):
    import transformers

    assert hasattr(transformers, name)
    model = type(name, (nn.Module,), {})()
    with pytest.raises(ValueError, match=f"{name}, which is not supported: ."):
        locate(model)
