"""Real processors, built offline around a byte tokenizer, with the tiny models of the zoo: the whole job end to end.

And the models that come without one: text LLMs, vision LLMs, remote code through `build_inputs`.
"""

from __future__ import annotations

import base64
import io
import json

import numpy as np
import pytest
import soundfile
import torch
import transformers as tf
import zoo
from conftest import OLDER, RATE, TEMPLATE, byte_tokenizer, rows, tone
from torch import nn

from rrs import RRS, RRSConfig
from rrs.data import DataError, Renderer, load_examples
from rrs.hooks import LoRA, capture

THREE = ("audio-text", "text-only", "audio-only")
HARMFUL, BENIGN = rows("harmful", 3), rows("benign", 3)
SMALL = {"learning_rate": 1e-2, "penalty": 1e-3, "batch_size": 3, "epochs": 1, "lora_r": 2}


newest = pytest.mark.skipif(OLDER, reason="the stand-in knows the insides of this processor in 5.23")


def job(rrs: RRS, again, tmp_path, conditions=THREE) -> None:
    """Fit, save, load, answer, evaluate; the first vectors are those of the full model."""
    rrs.config = RRSConfig(**{**SMALL, "conditions": conditions, "target_modules": rrs.config.target_modules})
    for condition in conditions:
        example = load_examples(HARMFUL)[0]
        text = {"audio-text": rrs.config.instruction, "text-only": example.text, "audio-only": None}[condition]
        inputs = rrs.render(text, None if condition == "text-only" else example.clip[1](rrs.render.rate))
        path = rrs.location.head_path
        with torch.no_grad(), capture(rrs.model, path, where="input", position=-1, stop=True) as record:
            rrs.model(**inputs)
        ours = rrs.reader.represent([rrs.read(example, condition)])[0]
        assert (ours - record[path][0][0]).abs().max() <= 1e-4 * ours.abs().max()
    rrs.fit(HARMFUL, BENIGN, preflight=0).save(tmp_path / "adapter")
    loaded = again(tmp_path / "adapter")
    for condition in conditions:
        answers = rrs.generate(HARMFUL, condition, max_new_tokens=3)
        assert loaded.generate(HARMFUL, condition, max_new_tokens=3) == answers
    assert {r["condition"] for r in rrs.evaluate(HARMFUL + BENIGN, conditions, max_new_tokens=2).rows()} == {
        *conditions
    }


def extractor(**kwargs):
    return tf.WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE, **kwargs)


def whole_job(name, processor, tmp_path):
    job(
        RRS(zoo.tiny(name)[0], processor, verbose=False),
        lambda d: RRS.load(d, zoo.tiny(name)[0], processor, verbose=False),
        tmp_path,
    )


def test_audio_flamingo_3(tmp_path):
    processor = tf.AudioFlamingo3Processor(
        extractor(chunk_length=2), byte_tokenizer(), chat_template=TEMPLATE, audio_token="<|AUDIO|>"
    )
    whole_job("audioflamingo3", processor, tmp_path)


class TekkenLike(tf.PreTrainedTokenizerFast):
    """Stands in for mistral-common's tokenizer: ids and waveforms come out of one call, there is no template."""

    def apply_chat_template(self, conversations, **_kwargs):
        ids, audio = [], []
        for message in conversations[0]:
            for item in message["content"]:
                if item["type"] == "audio":
                    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(item["base64"])), dtype="float32")
                    assert rate == RATE
                    audio.append(wave)
                    ids += [zoo.AUDIO] * 15
                else:
                    ids += self(item["text"], add_special_tokens=False)["input_ids"]
        ids.append(zoo.END)
        out = {"input_ids": [ids], "attention_mask": [[1] * len(ids)]}
        return {**out, "audio": audio} if audio else out


@newest
def test_voxtral_takes_audio_through_its_template_only(tmp_path, monkeypatch):
    tokenizer = TekkenLike(tokenizer_object=byte_tokenizer().backend_tokenizer, pad_token="<|pad|>")
    processor = tf.VoxtralProcessor(extractor(chunk_length=1), tokenizer)
    settings = {**processor.audio_kwargs, "pad_to_multiple_of": 120 * 160, "max_source_positions": 120}
    monkeypatch.setattr(processor, "audio_kwargs", settings)
    monkeypatch.setattr(type(processor), "_merge_kwargs", lambda self, **_: {
        "text_kwargs": dict(self.text_kwargs), "audio_kwargs": dict(self.audio_kwargs)})  # fmt: skip
    whole_job("voxtral", processor, tmp_path)


def named_tokenizer(extra: int = 0, **named: str):
    """The byte tokenizer with `extra` unused tokens before the last of `named`, and the names that processors ask."""
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<unused{i}>" for i in range(extra)], special_tokens=True)
    tokenizer.add_tokens([t for t in named.values() if t not in tokenizer.get_vocab()], special_tokens=True)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>",
        extra_special_tokens=named,
    )  # fmt: skip


def test_gemma3n(tmp_path):
    tokenizer = named_tokenizer(
        extra=9,  # the zoo's Gemma 3n embeds audio tokens from there on
        audio_token="<audio_soft_token>", boa_token="<|audio_bos|>", eoa_token="<|audio_eos|>",
        image_token="<unused0>", boi_token="<unused1>", eoi_token="<unused2>",
    )  # fmt: skip
    processor = tf.Gemma3nProcessor(
        tf.Gemma3nAudioFeatureExtractor(feature_size=16, sampling_rate=RATE), tf.ImageProcessingMixin(), tokenizer,
        chat_template=TEMPLATE.replace("<|audio_bos|><|AUDIO|><|audio_eos|>", "<audio_soft_token>"),
        audio_seq_length=30,
    )  # fmt: skip
    whole_job("gemma3n", processor, tmp_path)
    with pytest.raises(DataError, match=r"31\.00 s long, and Gemma3nProcessor drops its end"):
        Renderer(processor)("hi", np.zeros(31 * RATE, dtype=np.float32))


@newest
def test_qwen2_5_omni(tmp_path, monkeypatch):
    tokenizer = named_tokenizer(
        audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
        image_token="<|pad|>", video_token="<|pad|>", vision_bos_token="<|pad|>", vision_eos_token="<|pad|>",
    )  # fmt: skip
    # Its image and video parts need torchvision; audio passes them by.
    monkeypatch.setattr(tf.Qwen2_5OmniProcessor, "check_argument_for_proper_class", lambda *_: None)
    nothing = tf.ImageProcessingMixin()
    processor = tf.Qwen2_5OmniProcessor(nothing, nothing, extractor(chunk_length=2), tokenizer, chat_template=TEMPLATE)
    whole_job("qwen2_5_omni", processor, tmp_path)


def windowed(name, tokenizer):
    return getattr(tf, f"{name}Processor")(
        extractor(chunk_length=2), tokenizer, chat_template=TEMPLATE, audio_token="<|AUDIO|>", max_audio_len=4
    )


@pytest.mark.parametrize("name", ["AudioFlamingo3", "MusicFlamingo", "GlmAsr"])
def test_what_processors_cut_silently_is_refused(name):
    """Two windows of 2 s are heard, a third is dropped."""
    render = Renderer(windowed(name, byte_tokenizer()))
    assert render("Why?", tone(3.9, 0))["input_features"].shape[0] == 2
    with pytest.raises(DataError, match=rf"5\.00 s long, and {name}Processor drops its end .*split it"):
        render("Why?", tone(5, 0))


@newest
@pytest.mark.parametrize("name", ["Qwen3OmniMoe", "Qwen3ASR"])
def test_what_processors_keep_is_not_refused(name, monkeypatch):
    """The extractor's window says 30 s, but nothing is cut."""
    tokenizer = named_tokenizer(
        audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>",
        image_token="<|pad|>", video_token="<|pad|>", vision_bos_token="<|pad|>", vision_eos_token="<|pad|>",
    )  # fmt: skip
    if name == "Qwen3ASR":
        features = tf.Qwen3ASRFeatureExtractor(feature_size=16, sampling_rate=RATE)
        processor = tf.Qwen3ASRProcessor(features, tokenizer, chat_template=TEMPLATE)
    else:
        monkeypatch.setattr(tf.Qwen3OmniMoeProcessor, "check_argument_for_proper_class", lambda *_: None)
        nothing = tf.ImageProcessingMixin()
        processor = tf.Qwen3OmniMoeProcessor(nothing, nothing, extractor(), tokenizer, chat_template=TEMPLATE)
    render = Renderer(processor)
    short, long = (int(render("Why?", tone(s, 0))["input_features"].shape[-1]) for s in (29, 31))
    assert long - short == 200
    assert render.kept == 31 * RATE


def test_phi4_has_a_template_of_ours():
    class Phi4MultimodalProcessor:
        tokenizer, audio_token = byte_tokenizer(), "<|AUDIO|>"

    prompt = Renderer(Phi4MultimodalProcessor())._prompt("Answer.", np.zeros(9, dtype=np.float32))
    assert prompt == "<|user|><|AUDIO|>Answer.<|end|><|assistant|>"


def test_templates_that_drop_the_question_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ 'Task: check the conversation' }}"
    with pytest.raises(ValueError, match=r"drops \['Hello'\]"):
        Renderer(tokenizer)("Hello", None)


def test_templates_that_know_lists_only():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    assert Renderer(tokenizer)("Hello", None)["input_ids"].shape == (1, 5)


# -- no audio at all ---------------------------------------------------------------------------------------------------

TEXT = [{k: v for k, v in r.items() if k != "audio"} for r in HARMFUL + BENIGN]


def text_job(make, tmp_path, **config):
    model, processor = make()
    rrs = RRS(model, processor, RRSConfig(**{**SMALL, "conditions": ("text-only",), **config}), verbose=False)
    rrs.fit(TEXT, TEXT, preflight=0).save(tmp_path / "a")
    loaded = RRS.load(tmp_path / "a", *make(), verbose=False)
    assert rrs.reader.exact
    assert rrs.generate(TEXT, "text-only", max_new_tokens=3) == loaded.generate(TEXT, "text-only", max_new_tokens=3)
    report = rrs.evaluate(TEXT, ("text-only",), max_new_tokens=2)
    assert {r["condition"] for r in report.rows()} == {"text-only"}


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_text_llm(tmp_path):
    def make():
        torch.manual_seed(0)
        config = {k: v for k, v in zoo.decoder().items() if k != "model_type"}
        return tf.LlamaForCausalLM(tf.LlamaConfig(**config)).eval(), chat_tokenizer()

    text_job(make, tmp_path)


def test_text_llm_with_learned_positions(tmp_path):
    def make():
        torch.manual_seed(0)
        config = tf.OPTConfig(
            hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
            vocab_size=zoo.VOCAB, eos_token_id=zoo.END, pad_token_id=zoo.PAD, bos_token_id=zoo.END,
        )  # fmt: skip
        return tf.OPTForCausalLM(config).eval(), chat_tokenizer()

    text_job(make, tmp_path, target_modules=("q_proj", "out_proj", "fc1"))


def test_vision_llm(tmp_path):
    def make():
        torch.manual_seed(0)
        config = tf.LlavaConfig(
            vision_config={"model_type": "siglip_vision_model", **zoo.ENCODER, "image_size": 28, "patch_size": 14},
            text_config=zoo.decoder("llama"), image_token_index=zoo.PAD,
        )  # fmt: skip

        class Processor:  # like LlavaProcessor, whose image processor needs torchvision
            tokenizer, image_processor, chat_template = byte_tokenizer(), object(), TEMPLATE

        return tf.LlavaForConditionalGeneration(config).eval(), Processor()

    text_job(make, tmp_path)
    with pytest.raises(ValueError, match="takes no audio"):
        RRS(*make(), verbose=False).generate(HARMFUL, "audio-text")


# -- remote code: the shape of first-generation Qwen-Audio -------------------------------------------------------------


class QwenAudioLike(tf.PreTrainedModel, tf.GenerationMixin):
    """What transformers does not know: other names everywhere, audio as `audio_info`, tuples for a cache."""

    config_class = tf.PretrainedConfig
    main_input_name = "input_ids"

    def __init__(self, config):
        super().__init__(config)
        self.transformer, self.lm_head = Body(), nn.Linear(32, zoo.VOCAB, bias=False)
        self.all_tied_weights_keys = {}
        self.generation_config.use_cache = False

    def prepare_inputs_for_generation(self, input_ids, audio_info=None, **_):
        return {"input_ids": input_ids, "audio_info": audio_info}

    def get_input_embeddings(self):
        return self.transformer.wte

    def forward(self, input_ids=None, attention_mask=None, audio_info=None, **_):
        hidden = self.transformer(input_ids, audio_info=audio_info)[0]
        return tf.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(hidden))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(32), nn.LayerNorm(32)
        self.attn = nn.Module()
        self.attn.c_attn, self.attn.c_proj = nn.Linear(32, 96), nn.Linear(32, 32, bias=False)
        self.mlp = nn.Module()
        self.mlp.w1, self.mlp.w2 = nn.Linear(32, 24, bias=False), nn.Linear(32, 24, bias=False)
        self.mlp.c_proj = nn.Linear(24, 32, bias=False)

    def forward(self, hidden_states):
        q, k, v = self.attn.c_attn(self.ln_1(hidden_states)).chunk(3, -1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        hidden_states = hidden_states + self.attn.c_proj(attended)
        x = self.ln_2(hidden_states)
        return hidden_states + self.mlp.c_proj(self.mlp.w1(x) * nn.functional.silu(self.mlp.w2(x)))


class Body(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.audio = nn.Embedding(zoo.VOCAB, 32), nn.Linear(16, 32)
        self.h, self.ln_f = nn.ModuleList([Block(), Block()]), nn.LayerNorm(32)

    def forward(self, input_ids=None, audio_info=None, inputs_embeds=None, use_cache=None):
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds
        if audio_info is not None:
            start = audio_info["audio_span"]
            x = torch.cat([x[:, :start], self.audio(audio_info["mel"]), x[:, start + audio_info["mel"].shape[1] :]], 1)
        for block in self.h:
            x = block(x)
        return (self.ln_f(x),)


def qwen_audio_inputs(text, wave):
    def encode(s):
        return zoo.TOKENIZER(s, add_special_tokens=False)["input_ids"]

    head, tail, more = encode("user: "), encode(f"{text or ''}\nassistant: "), {}
    if wave is not None:
        mel = zoo.frames(wave, 16)
        more = {"audio_info": {"audio_span": len(head), "mel": mel[None]}}
        head = head + [zoo.AUDIO] * len(mel)
    return {"input_ids": torch.tensor([head + tail]), **more}


def test_remote_code_through_the_escape_hatch(tmp_path):
    parts = {"decoder": "transformer", "head": "lm_head", "build_inputs": qwen_audio_inputs, "verbose": False}
    config = RRSConfig(**{**SMALL, "conditions": THREE, "target_modules": ("c_attn", "c_proj", "w1", "w2")})

    def model():
        torch.manual_seed(0)
        return QwenAudioLike(tf.PretrainedConfig(eos_token_id=zoo.END, pad_token_id=zoo.PAD)).eval()

    rrs = RRS(model(), zoo.TOKENIZER, config, **parts)
    assert rrs.location.layers_path == "transformer.h"
    rrs.fit(HARMFUL, BENIGN, preflight=0).save(tmp_path / "a")
    assert rrs.reader.exact
    assert not rrs.reader.share_prefix
    assert len(rrs.lora.paths) == 2 * 5
    loaded = RRS.load(tmp_path / "a", model(), zoo.TOKENIZER, **parts)
    for condition in THREE:
        answers = rrs.generate(HARMFUL, condition, max_new_tokens=3)
        assert answers == loaded.generate(HARMFUL, condition, max_new_tokens=3)
        for example, answer in zip(load_examples(HARMFUL), answers, strict=True):
            text = {"audio-text": rrs.config.instruction, "text-only": example.text, "audio-only": None}[condition]
            ids = qwen_audio_inputs(text, None if condition == "text-only" else example.clip[1](RATE))
            for _ in range(3):
                new = rrs.model(**ids).logits[:, -1:].argmax(-1)
                ids["input_ids"] = torch.cat([ids["input_ids"], new], 1)
            assert answer == zoo.TOKENIZER.decode(ids["input_ids"][0, -3:], skip_special_tokens=True).strip()
    merged = rrs.merge()
    inputs = qwen_audio_inputs("hi", tone(0.4, 1))
    assert torch.allclose(merged(**inputs).logits, loaded.model(**inputs).logits, atol=1e-4)


def test_remote_code_is_never_run_unasked(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"model_type": "qwen2", "architectures": ["QWenLMHeadModel"],
                    "auto_map": {"AutoModelForCausalLM": "modeling.QWenLMHeadModel"}})
    )  # fmt: skip
    (folder / "modeling.py").write_text("raise SystemExit('remote code ran')\n")
    with pytest.raises(ValueError, match=r"no class 'QWenLMHeadModel' .* trust_remote_code=True"):
        RRS.from_pretrained(folder, verbose=False)


# -- quantised and spread weights --------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """The shape of bitsandbytes' linears: integer weights beside a scale, and both sizes as attributes."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def quantised():
    model, build_inputs = zoo.tiny("qwen2_audio")
    for block in model.model.language_model.layers:
        for module in list(block.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, Int8Linear(child))
    return model, build_inputs


def test_float8_weights_are_codes_too():
    linear = torch.nn.Sequential(torch.nn.Linear(4, 4, bias=False))
    lora = LoRA(linear, ["0"], r=2, alpha=2)
    linear[0].weight.requires_grad_(False)
    linear[0].weight.data = linear[0].weight.data.to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="0 is quantised; load the model unquantised"):
        lora.merge()


def test_quantised_linears(tmp_path):
    model, build_inputs = quantised()
    config = RRSConfig(**{**SMALL, "conditions": THREE, "epochs": 3, "lora_dropout": 0.0})
    rrs = RRS(model, zoo.TOKENIZER, config, build_inputs=build_inputs, verbose=False)
    rrs.fit(HARMFUL, BENIGN, preflight=0).save(tmp_path / "a")
    assert len(rrs.lora.paths) == 2 * 7
    loaded = RRS.load(tmp_path / "a", quantised()[0], zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)
    assert rrs.generate(HARMFUL, max_new_tokens=3) == loaded.generate(HARMFUL, max_new_tokens=3)
    with pytest.raises(ValueError, match="q_proj is quantised; load the model unquantised to merge"):
        rrs.merge()


def test_models_dispatched_by_a_device_map():
    accelerate = pytest.importorskip("accelerate")
    plain, build_inputs = zoo.tiny("qwen2_audio")
    model = accelerate.dispatch_model(zoo.tiny("qwen2_audio")[0], {"": "cpu"}, force_hooks=True)
    config = RRSConfig(**{**SMALL, "lora_dropout": 0.0})
    pair = [RRS(m, zoo.TOKENIZER, config, build_inputs=build_inputs, verbose=False) for m in (plain, model)]
    for rrs in pair:
        rrs.fit(HARMFUL, BENIGN, preflight=0)
    a, b = (rrs.lora.tensors() for rrs in pair)
    assert all(torch.allclose(a[k], b[k], atol=1e-6) for k in a)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    model, build_inputs = zoo.tiny("qwen2_audio")
    model = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"weights are offloaded .* device_map"):
        RRS(model, zoo.TOKENIZER, RRSConfig(**SMALL), build_inputs=build_inputs, verbose=False).fit(
            HARMFUL, BENIGN, preflight=0
        )


def test_the_thinker_of_a_full_omni_checkpoint(tmp_path, monkeypatch):
    """The composite checkpoint loads as its text-answering part, with the same weights."""
    thinker, build_inputs = zoo.tiny("qwen2_5_omni")
    config = tf.Qwen2_5OmniConfig(thinker_config=thinker.config.to_dict(), enable_audio_output=False)
    config.architectures = ["Qwen2_5OmniModel"]  # as in the released checkpoint
    tensors = {f"thinker.{k}": v.contiguous() for k, v in thinker.state_dict().items()}
    from safetensors.torch import save_file

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(tmp_path)
    # Its processor needs torchvision; only the model is at stake here.
    monkeypatch.setattr(tf.AutoProcessor, "from_pretrained", lambda *_a, **_k: chat_tokenizer())
    rrs = RRS.from_pretrained(tmp_path, device="cpu", verbose=False)
    assert type(rrs.model).__name__ == "Qwen2_5OmniThinkerForConditionalGeneration"
    inputs = build_inputs("hello", tone(0.5, 1))
    assert torch.equal(rrs.model(**inputs).logits, thinker(**inputs).logits)
