"""An adapter acts where it is served, or says that it doesn't: PEFT, composites, merged models, other releases."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import warnings
from contextlib import suppress
from typing import Any

import peft
import pytest
import torch
import transformers as tf
import zoo
from conftest import byte_tokenizer, rows, tiny_qwen2_audio, tone
from huggingface_hub import ModelCard
from torch import nn

import rrs
from rrs import RRS, RRSConfig, RRSWarning, verify
from rrs.evaluate import Answer, Report

FAST = {"epochs": 4, "lora_r": 4, "learning_rate": 1e-2, "penalty": 1e-4}
HARMFUL, BENIGN = rows("harmful", 6), rows("benign", 5)
pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")


def fitted(model: Any, processor: Any, conditions: Any = ("audio-text", "text-only"), **kwargs: Any) -> RRS:
    model = RRS(model, processor, RRSConfig(**FAST, conditions=conditions), verbose=False, **kwargs)
    return model.fit(HARMFUL, BENIGN, preflight=0)


def tiny_llama(seed: int = 0, **config: Any) -> tuple[Any, Any]:
    torch.manual_seed(seed)
    sizes = {k: v for k, v in zoo.decoder().items() if k != "model_type"} | config
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model, tokenizer


def quietly(load: Any) -> Any:
    """What `load()` gives; any warning of ours is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RRSWarning)
        return load()


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def renamed(folder: Any, old: str, new: str) -> None:
    """The adapter as another release would have saved it."""
    tensors, _ = rrs.unpack(folder / "adapter_model.safetensors")
    assert all(f".{old}." in name for name in tensors)
    weights = rrs.pack({name.replace(f".{old}.", f".{new}."): t for name, t in tensors.items()})
    put_weights(folder, weights)


def put_weights(folder: Any, weights: bytes) -> None:
    """Other weights, as if they had been saved."""
    (folder / "adapter_model.safetensors").write_bytes(weights)
    record = json.loads((folder / "rrs.json").read_text())
    record["sha256"]["adapter_model.safetensors"] = hashlib.sha256(weights).hexdigest()
    (folder / "rrs.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trained RRS and the folder of its adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    model = fitted(*tiny_qwen2_audio())
    return model, model.save(folder / "adapter")


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the adapter's folder."""
    return shutil.copytree(trained[1], tmp_path / "copy")


# -- the canary --------------------------------------------------------------------------------------------------------


def test_verify_tells_where_the_adapter_acts(trained):
    """On PEFT's model, a merged and a loaded one; not on vanilla, other weights, or at another scale."""
    _, folder = trained
    model, processor = tiny_qwen2_audio()
    assert verify(folder, model, processor).startswith("acts as vanilla: ")
    with_peft = peft.PeftModel.from_pretrained(model, folder)
    assert verify(folder, with_peft, processor).startswith("acts as trained: ")
    with with_peft.disable_adapter():
        assert verify(folder, with_peft, processor).startswith("acts as vanilla: ")
    assert verify(folder, with_peft.merge_and_unload(), processor).startswith("acts as trained: ")
    loaded = RRS.load(folder, *tiny_qwen2_audio(), verbose=False)
    assert verify(folder, loaded.model, processor).startswith("acts as trained: ")
    loaded.lora.scale *= 3
    assert verify(folder, loaded.model, processor).startswith("acts as something else: ")
    assert verify(folder, loaded.disable().model, processor).startswith("acts as vanilla: ")
    assert verify(folder, tiny_qwen2_audio(seed=1)[0], processor).startswith("acts as something else: ")
    assert "(5 prompts)" in verify(folder, model, processor)  # four questions and, as it was trained with audio, a tone
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(folder.parent / "peft")
    with pytest.raises(ValueError, match="has no canary"):
        verify(folder.parent / "peft", model, processor)


def test_the_largest_difference_is_that_of_the_logits(trained):
    model, folder = trained
    canary = json.loads((folder / "rrs.json").read_text())["canary"]
    vectors, _ = rrs.unpack(folder / "rrs.safetensors")
    worst = []
    for i, prompt in enumerate(canary[:4]):
        inputs = model.render(prompt["text"], None)
        assert inputs["input_ids"][0].tolist() == prompt["tokens"]
        for name, on in (("trained", model.enable), ("vanilla", model.disable)):
            on()
            now = logits(model.model, inputs)[0, -1]
            assert torch.allclose(now[vectors["canary.ids"][i]], vectors[f"canary.{name}"][i], atol=1e-4)
            assert now.max() == now[vectors["canary.ids"][i]].max()
    model.enable()
    worst = (vectors["canary.trained"] - vectors["canary.vanilla"]).abs().max()
    assert f"{worst:.2g} from trained" in verify(folder, tiny_qwen2_audio()[0], model.processor)


def test_load_warns_where_the_adapter_does_not_act_as_trained(folder):
    quietly(lambda: RRS.load(folder, *tiny_qwen2_audio(), verbose=False))
    tensors, _ = rrs.unpack(folder / "adapter_model.safetensors")
    put_weights(folder, rrs.pack({name: 3 * t for name, t in tensors.items()}))
    with pytest.warns(RRSWarning, match=r"acts as something else: .*\(5 prompts\)\. Evaluate"):
        RRS.load(folder, *tiny_qwen2_audio(), verbose=False)


def test_another_system_prompt_is_named(folder):
    record = json.loads((folder / "rrs.json").read_text())
    record["config"]["system"] = "You are a pirate, and speak like one. " * 3
    (folder / "rrs.json").write_text(json.dumps(record))
    with pytest.warns(RRSWarning, match="prompts have other tokens than in training: chat template, system prompt"):
        RRS.load(folder, *tiny_qwen2_audio(), verbose=False)


# -- full checkpoints --------------------------------------------------------------------------------------------------


def tiny_composite() -> Any:
    """A whole Qwen2.5-Omni: thinker, talker and vocoder."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    tokens = ("text_start", "text_end", "text_pad", "codec_start", "codec_end", "codec_pad", "codec_mask")
    talker = {f"tts_{name}_token_id": i for i, name in enumerate(tokens)} | {
        "vocab_size": 60, "embedding_size": zoo.HIDDEN, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "audio_token_index": zoo.AUDIO, "rope_parameters": rope,
    }  # fmt: skip
    dit = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1, "emb_dim": 8, "head_dim": 8,
        "num_embeds": 60, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 4, "enc_res2net_scale": 2, "enc_se_channels": 4, "look_ahead_layers": [0],
        "look_backward_layers": [0],
    }  # fmt: skip
    vocoder = {
        "mel_dim": 8, "upsample_initial_channel": 16, "upsample_rates": [2, 2], "upsample_kernel_sizes": [4, 4],
        "resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]],
    }  # fmt: skip
    thinker, build_inputs = zoo.tiny("qwen2_5_omni")
    config = tf.Qwen2_5OmniConfig(
        thinker_config=thinker.config.to_dict(), talker_config=talker,
        token2wav_config={"dit_config": dit, "bigvgan_config": vocoder},
    )  # fmt: skip
    torch.manual_seed(0)
    whole = tf.Qwen2_5OmniForConditionalGeneration(config).eval()
    whole.thinker.load_state_dict(thinker.state_dict())
    return whole, build_inputs


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """An adapter of a thinker, what it makes of a prompt, and what vanilla does."""
    whole, build_inputs = tiny_composite()
    model = fitted(whole.thinker, zoo.TOKENIZER, build_inputs=build_inputs)
    folder = model.save(tmp_path_factory.mktemp("omni") / "adapter")
    inputs = build_inputs("hello", tone(0.5, 1))
    ours = logits(whole.thinker, inputs)
    return folder, inputs, ours, logits(model.disable().model, inputs)


@pytest.mark.parametrize("how", ["PeftModel", "load_adapter"])
def test_a_thinkers_adapter_acts_in_the_composite(omni, how):
    folder, inputs, ours, vanilla = omni
    assert (ours - vanilla).abs().max() > 0.1
    whole, build_inputs = tiny_composite()
    if how == "PeftModel":
        outer = peft.PeftModel.from_pretrained(whole, folder / "composite")
    else:
        outer = whole
        whole.load_adapter(str(folder / "composite"))
    assert torch.allclose(logits(whole.thinker, inputs), ours, atol=1e-5)
    changed = {n.partition(".")[0] for n, m in whole.named_modules() if hasattr(m, "lora_A")}
    assert changed == {"thinker"}
    assert verify(folder, outer, zoo.TOKENIZER, build_inputs=build_inputs).startswith("acts as trained: ")
    alone = zoo.tiny("qwen2_5_omni")[0]  # and the thinker's own adapter acts in the thinker
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(alone, folder), inputs), ours, atol=1e-5)


def test_merging_into_the_thinker_merges_into_the_composite(omni, tmp_path):
    folder, inputs, ours, _ = omni
    whole, build_inputs = tiny_composite()
    talker = {k: v.clone() for k, v in whole.talker.state_dict().items()}
    loaded = quietly(lambda: RRS.load(folder, whole.thinker, zoo.TOKENIZER, build_inputs=build_inputs, verbose=False))
    assert loaded.merge() is whole.thinker
    whole.save_pretrained(tmp_path)
    torch.save({}, tmp_path / "spk_dict.pt")  # the speakers, a file of the checkpoint's own
    again = tf.Qwen2_5OmniForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.allclose(logits(again.thinker, inputs), ours, atol=1e-5)
    assert all(torch.equal(v, talker[k]) for k, v in again.talker.state_dict().items())
    assert verify(folder, again, zoo.TOKENIZER, build_inputs=build_inputs).startswith("acts as trained: ")


def test_the_card_of_a_thinker_tells_of_the_composite(omni, trained):
    text = "RRS.load(folder, whole.thinker, processor).merge()"
    assert text in (omni[0] / "README.md").read_text(encoding="utf-8")
    assert text not in (trained[1] / "README.md").read_text(encoding="utf-8")
    assert not (trained[1] / "composite").exists()


# -- other releases, other modules -------------------------------------------------------------------------------------

LAYOUTS = {  # where the blocks of the paper's models lie, by release
    "qwen2_audio": ("language_model.model.layers", "model.language_model.layers"),
    "qwen2_5_omni": ("model.layers", "model.language_model.layers"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_adapter_of_another_release_is_found_by_its_ending(name, tmp_path):
    model, build_inputs = zoo.tiny(name)
    made = fitted(model, zoo.TOKENIZER, build_inputs=build_inputs)
    here = made.location.layers_path
    assert here in LAYOUTS[name]
    folder = made.save(tmp_path / "adapter")
    (there,) = {*LAYOUTS[name]} - {here}
    renamed(folder, here, there)
    inputs = build_inputs("hello", tone(0.5, 1))
    loaded = quietly(
        lambda: RRS.load(folder, zoo.tiny(name)[0], zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)
    )
    assert torch.equal(logits(loaded.model, inputs), logits(model, inputs))
    with pytest.raises(ValueError, match="made for another base"):  # the same names, other weights
        RRS.load(folder, zoo.tiny(name, seed=1)[0], zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)
    renamed(folder, there, "elsewhere.blocks")
    with pytest.raises(ValueError, match=r"has no \['elsewhere\.blocks"):
        RRS.load(folder, zoo.tiny(name)[0], zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)


def test_paths_that_are_the_end_of_others_are_told_apart(tmp_path):
    """PEFT takes every module whose path ends with one of target_modules."""
    model, tokenizer = tiny_llama()
    made = fitted(model, tokenizer, ("text-only",))
    plain = made.save(tmp_path / "plain")
    assert json.loads((plain / "adapter_config.json").read_text())["target_modules"] == made.lora.paths

    def with_speaker() -> Any:
        other = tiny_llama()[0]
        other.speaker = nn.Module()
        other.speaker.model = tiny_llama(seed=1)[0].model
        return other

    made = fitted(with_speaker(), tokenizer, ("text-only",))
    folder = made.save(tmp_path / "speaker")
    read = peft.PeftModel.from_pretrained(with_speaker(), folder)
    touched = {n.removeprefix("base_model.model.") for n, m in read.named_modules() if hasattr(m, "lora_A")}
    assert touched == {*made.lora.paths}
    inputs = made.render("hello", None)
    assert torch.allclose(logits(read, inputs), logits(made.model, inputs), atol=1e-6)


@pytest.mark.parametrize("system", [None, "You are Qwen, a virtual human developed by the Qwen Team."])
def test_the_system_prompt_is_saved_with_the_adapter(system, tmp_path):
    model, processor = tiny_qwen2_audio()
    made = RRS(model, processor, RRSConfig(**FAST, system=system), verbose=False).fit(HARMFUL, BENIGN, preflight=0)
    loaded = quietly(lambda: RRS.load(made.save(tmp_path / "a"), *tiny_qwen2_audio(), verbose=False))
    assert loaded.config.system == system
    said = processor.tokenizer.decode(loaded.render("hello", None)["input_ids"][0])
    assert said.startswith(f"<|im_start|>system\n{system}<|im_end|>" if system else "<|im_start|>user")


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_qwen2_audios_own_template_has_its_system_prompt(system):
    """Its processor brings the template of the released model, with a default that config.system replaces."""
    processor = tf.Qwen2AudioProcessor(tiny_qwen2_audio()[1].feature_extractor, byte_tokenizer())
    made = RRS(tiny_qwen2_audio()[0], processor, RRSConfig(system=system), verbose=False)
    for wave in (None, tone(0.5, 1)):
        said = processor.tokenizer.decode(made.render("hello", wave)["input_ids"][0])
        assert said.startswith(f"<|im_start|>system\n{system or 'You are a helpful assistant.'}<|im_end|>\n")
        assert said.endswith("hello<|im_end|>\n<|im_start|>assistant\n")
        assert said.count("<|im_start|>system") == 1


# -- PEFT's own adapters -----------------------------------------------------------------------------------------------


def by_peft(folder: Any, **settings: Any) -> Any:
    """An adapter that PEFT made, with weights that do something."""
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(tiny_llama()[0], peft.LoraConfig(**given))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(torch.randn_like(p) / 8)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"r": 2}])
def test_what_peft_computes_is_what_rrs_computes(settings, tmp_path):
    theirs = by_peft(tmp_path, **settings)
    loaded = RRS.load(tmp_path, *tiny_llama(), verbose=False)
    inputs = loaded.render("hello", None)
    assert torch.allclose(logits(loaded.model, inputs), logits(theirs, inputs), atol=1e-5)
    assert (logits(loaded.model, inputs) - logits(loaded.disable().model, inputs)).abs().max() > 0.01


REFUSED: dict[str, dict[str, Any]] = {
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "use_dora": {"use_dora": True},
    "bias='all'": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "lora_bias": {"lora_bias": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_rrs_does_not_compute_is_refused_by_name(name, tmp_path):
    by_peft(tmp_path, **REFUSED[name])
    with pytest.raises(ValueError, match=f"The adapter has {name}.*load it with PEFT"):
        RRS.load(tmp_path, *tiny_llama(), verbose=False)


def test_a_setting_of_the_future_is_refused(tmp_path):
    by_peft(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    for value in (None, False, {}, []):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_next": value}))
        RRS.load(tmp_path, *tiny_llama(), verbose=False)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**settings, "use_next": True}))
    with pytest.raises(ValueError, match="has use_next=True"):
        RRS.load(tmp_path, *tiny_llama(), verbose=False)


@pytest.mark.parametrize("wrap", [
    lambda m: peft.get_peft_model(m, peft.LoraConfig(target_modules=["q_proj"])), nn.DataParallel, torch.compile,
])  # fmt: skip
def test_wrapped_bases_are_refused_with_what_unwraps_them(wrap):
    model, tokenizer = tiny_llama()
    with pytest.raises(ValueError, match=r"a \w+, which is not supported: pass model\.\w+"):
        RRS(wrap(model), tokenizer, verbose=False)


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_tied_heads_stay_tied_and_merged_is_saved_right(tmp_path):
    model, tokenizer = tiny_llama(tie_word_embeddings=True)
    made = fitted(model, tokenizer, ("text-only",))
    folder, inputs = made.save(tmp_path / "adapter"), made.render("hello", None)
    ours = logits(model, inputs)
    made.merge().save_pretrained(tmp_path / "merged")
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.allclose(logits(again, inputs), ours, atol=1e-5)
    assert verify(folder, again, tokenizer).startswith("acts as trained: ")


def test_trained_in_bfloat16_and_loaded_in_float32_is_the_same_base(tmp_path):
    model, processor = tiny_qwen2_audio()
    folder = fitted(model.to(torch.bfloat16), processor).save(tmp_path / "adapter")
    model = tiny_qwen2_audio()[0].to(torch.bfloat16).float()
    quietly(lambda: RRS.load(folder, model, processor, verbose=False))
    assert verify(folder, model, processor).startswith("acts as trained: ")


def test_any_flipped_bit_is_refused(folder):
    random.seed(0)
    vectors, missed = rrs.read_adapter(folder)[3], 0
    for name in ("adapter_model.safetensors", "rrs.safetensors"):
        whole = (folder / name).read_bytes()
        for _ in range(30):
            torn, place = bytearray(whole), random.randrange(8 * len(whole))
            torn[place // 8] ^= 1 << place % 8
            (folder / name).write_bytes(torn)
            read = None
            with suppress(ValueError):
                read = rrs.read_adapter(folder)
            if read:  # a bit of the header that nothing is read from
                assert name == "rrs.safetensors"
                assert all(torch.equal(t, vectors[n]) for n, t in read[3].items())
                missed += 1
        (folder / name).write_bytes(whole)
    assert missed <= 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(folder, value):
    tensors, _ = rrs.unpack(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = value
    put_weights(folder, rrs.pack(tensors))
    with pytest.raises(ValueError, match="NaN or infinite"):
        RRS.load(folder, *tiny_qwen2_audio(), verbose=False)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": value}))
    with pytest.raises(ValueError, match="lora_alpha"):
        RRS.load(folder, *tiny_qwen2_audio(), verbose=False)


def test_save_writes_inside_a_folder_that_is_there(trained, tmp_path, monkeypatch):
    """A mount point can be written in, but neither renamed nor removed."""
    (tmp_path / ".left.safetensors.rrs-tmp").write_text("left by a killed run")
    kept = tmp_path.stat().st_ino
    monkeypatch.setattr(shutil, "rmtree", None)
    assert trained[0].save(tmp_path) == tmp_path
    assert tmp_path.stat().st_ino == kept
    assert {p.name for p in tmp_path.iterdir()} == {*rrs.FILES}
    with pytest.raises(FileExistsError):
        trained[0].save(tmp_path)
    trained[0].save(tmp_path, overwrite=True)


def test_saving_leaves_the_model_as_it_was(trained, tmp_path):
    model, _ = trained
    inputs = model.render("hello", None)
    for switch in (model.disable, model.enable):
        switch()
        before = logits(model.model, inputs)
        model.save(tmp_path / switch.__name__)
        assert torch.equal(logits(model.model, inputs), before)
        assert verify(tmp_path / switch.__name__, model.enable().model, model.processor).startswith("acts as trained")
    model.enable()


def test_where_save_would_fail_fit_fails_before_it_trains(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    model = RRS(*tiny_qwen2_audio(), RRSConfig(**FAST), verbose=False)
    for place in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match="choose a"):
            model.fit(HARMFUL, BENIGN, preflight=0, save_to=place, callbacks=[lambda _: 1 / 0])


# -- the card ----------------------------------------------------------------------------------------------------------


def report(group: str = "harmful") -> Report:
    answers = [
        Answer(group, "text-only", stage, str(i), "q", "a", verdict, label="harmful")
        for stage, verdict in (("before", "compliance"), ("after", "refusal"))
        for i in range(2)
    ]
    return Report(answers, [], "a judge")


def test_the_card_has_the_hubs_metadata(trained, tmp_path):
    model, _ = trained
    model.record["base"]["name"], model.report = "Qwen/Qwen2-Audio-7B-Instruct", report()
    try:
        text = (model.save(tmp_path / "a") / "README.md").read_text(encoding="utf-8")
    finally:
        model.record["base"]["name"], model.report = "", None
    about = ModelCard(text).data
    assert (about.base_model, about.library_name, about.pipeline_tag) == (
        "Qwen/Qwen2-Audio-7B-Instruct", "peft", "audio-text-to-text",
    )  # fmt: skip
    assert {"rrs", "lora"} <= {*about.tags}
    (before, after) = about.eval_results
    assert (before.metric_value, after.metric_value, after.dataset_name) == (0.0, 1.0, "harmful, text-only")
    assert "Not evaluated" not in text
    assert report().to_markdown() in text
    assert "`lora_r`: 4" in text
    assert "What is the capital of France?" in text


def test_without_a_report_the_card_says_so(trained):
    text = (trained[1] / "README.md").read_text(encoding="utf-8")
    assert "Not evaluated" in text
    data = ModelCard(text).data
    assert data.base_model is None
    assert data.eval_results is None


def test_markup_in_names_and_answers_is_text_on_the_card(trained):
    record = {**trained[0].record, "base": {"name": "a/b\n# <script>", "class": "X"}}
    record["config"] = {"prompts": ["<img src=x>"], "system": "[click](http://x.y)\n# Head"}
    record["canary"] = [{"condition": "text-only", "text": "|a|", "vanilla": "<b>", "trained": "x\n\n# y"}]
    text = rrs.model_card(record, report("<script>"))
    body = text.split("---", 2)[2].replace("\\<", "").replace("\\[", "")  # what is escaped
    assert "<script>" not in body
    assert "<img" not in body
    assert "[click](" not in body
    assert "\n# y" not in body
    assert "\n# Head" not in body
    assert "| text-only | \\|a\\| | \\<b\\> | x \\# y |" in text


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_what_from_pretrained_hands_on(tmp_path, monkeypatch):
    model, processor = tiny_qwen2_audio()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    seen = {}
    load = tf.Qwen2AudioForConditionalGeneration.from_pretrained.__func__

    def from_pretrained(cls, name, **kwargs):
        seen.update(kwargs)
        kwargs.pop("quantization_config", None)
        return load(cls, name, **{k: v for k, v in kwargs.items() if k != "device_map"})

    monkeypatch.setattr(tf.Qwen2AudioForConditionalGeneration, "from_pretrained", classmethod(from_pretrained))
    given = {"device_map": {"": "cpu"}, "attn_implementation": "eager", "quantization_config": "q"}
    inputs = {"input_ids": torch.tensor([[5, 6, 7]])}
    made = RRS.from_pretrained(
        tmp_path, RRSConfig(system="Be kind."), device="cpu", revision="v1", model_kwargs=given,
        build_inputs=lambda text, wave: inputs, verbose=False,
    )  # fmt: skip
    assert {k: seen[k] for k in given} == given
    assert seen["revision"] == "v1"
    assert made.model.config._attn_implementation == "eager"
    assert made.render("x", None) is inputs
    kind = RRS.from_pretrained(tmp_path, RRSConfig(system="Be kind."), device="cpu", verbose=False)
    assert "system\nBe kind." in processor.tokenizer.decode(kind.render("x", None)["input_ids"][0])
    with pytest.raises(ValueError, match="config is a dict; make it an RRSConfig"):
        RRS.from_pretrained(tmp_path, {"lora_r": 4}, device="cpu")
