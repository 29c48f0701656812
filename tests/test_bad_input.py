"""What users get wrong: each case stops with one clear error that names the file, row or argument, and the remedy."""

from __future__ import annotations

import io
import json
import os
import struct
from contextlib import nullcontext

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import RATE, byte_tokenizer, rows, tiny_qwen2_audio, tone
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

from rrs import RRS, RRSConfig, RRSWarning
from rrs.data import DataError, DataWarning, load_audio, load_examples, resample

pytestmark = pytest.mark.filterwarnings("ignore:Only .* examples:rrs.RRSWarning")


def wav(wave, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, **{"format": "WAV", **kwargs})
    return buffer.getvalue()


def flac_claiming(frames):
    """A FLAC whose header claims another number of samples (36 bits at bit 108 of STREAMINFO)."""
    data = bytearray(wav(tone(0.2, 0), format="FLAC"))
    data[21] = (data[21] & 0xF0) | (frames >> 32)
    data[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(data)


GOOD = wav(tone(0.2, 0))
MP4 = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"isom", 512, b"isom", b"mp42") + b"\0" * 64  # a video's first bytes

# name -> (content of clip.wav, MAX_BYTES, words of the error)
AUDIO = {
    "missing": (None, 2**30, ["q7", "clip.wav", "no such file", "correct the path"]),
    "empty": (b"", 2**30, ["q7", "clip.wav", "can't be decoded", "re-encode"]),
    "a text file": (b"This is a text.", 2**30, ["q7", "clip.wav", "can't be decoded", "WAV, FLAC or OGG"]),
    "a video": (MP4, 2**30, ["q7", "clip.wav", "a video's sound", "re-encode"]),
    "corrupt": (b"RIFF" + bytes(range(256)), 2**30, ["q7", "clip.wav", "can't be decoded", "re-encode"]),
    "only a header": (GOOD[:44], 2**30, ["q7", "clip.wav", "no samples", "re-export"]),
    "zero length": (wav(np.zeros(0)), 2**30, ["q7", "clip.wav", "no samples", "re-export"]),
    "NaN": (wav(np.array([0.0, np.nan]), subtype="FLOAT"), 2**30, ["q7", "clip.wav", "NaN", "re-export"]),
    "infinite": (wav(np.array([0.0, np.inf]), subtype="FLOAT"), 2**30, ["q7", "clip.wav", "infinite", "re-export"]),
    "too large": (GOOD, 999, ["q7", "clip.wav", "MAX_BYTES=999", "split it"]),
    "decodes to too much": (
        wav(np.zeros(9 * RATE), format="FLAC"),
        99_999,
        ["clip.wav", "9 s decode to more than MAX_BYTES=99999"],
    ),
    "a rate of 7 Hz": (wav(np.zeros(99), rate=7), 2**30, ["q7", "clip.wav", "7 Hz", "correct the clip's header"]),
    "claims 2^36 frames": (flac_claiming(2**36 - 1), 2**30, ["q7", "clip.wav", "can't be decoded", "re-encode"]),
}


@pytest.mark.parametrize("case", AUDIO)
def test_audio(case, tmp_path, monkeypatch):
    content, limit, words = AUDIO[case]
    monkeypatch.setattr("rrs.data.MAX_BYTES", limit)
    if content is not None:
        (tmp_path / "clip.wav").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_audio(tmp_path / "clip.wav", RATE, name="q7")
    assert all(word in str(error.value) for word in words), error.value


# name -> (an audio dict or the like, words)
ARRAYS = {
    "strings": ({"array": ["a"], "sampling_rate": RATE}, ["q7", "'array'", "integers or floats"]),
    "ragged": ({"array": [[0.0], [0.0, 1.0]], "sampling_rate": RATE}, ["q7", "'array'", "numbers"]),
    "no rate": ({"array": np.zeros(9)}, ["q7", "needs 'array' and 'sampling_rate'"]),
    "a rate in words": (
        {"array": np.zeros(9), "sampling_rate": "cd"},
        ["q7", "'sampling_rate', which must be numbers"],
    ),
    "negative rate": ({"array": np.zeros(9), "sampling_rate": -1}, ["q7", "must be positive"]),
    "three dimensions": ({"array": np.zeros((9, 1, 1)), "sampling_rate": RATE}, ["q7", "no samples", "[9, 1, 1]"]),
    "a number": (5, ["q7", "can't be decoded", "no such file"]),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_arrays(case):
    content, words = ARRAYS[case]
    with pytest.raises(DataError) as error:
        load_audio(content, RATE, name="q7")
    assert any(word in str(error.value) for word in words[1:]), error.value
    assert words[0] in str(error.value)


def test_eight_channels_at_96_khz_are_fine():
    assert len(load_audio(wav(np.stack([tone(0.6, 1)] * 8, 1), rate=96_000), RATE)) == 0.6 * RATE * RATE / 96_000


def test_a_rate_without_common_divisor_is_fine_and_small():
    """44,101 Hz: a table of kernels would take 5 GB."""
    wave = np.sin(2 * np.pi * 440 * np.arange(4411) / 44_101).astype(np.float32)
    expected = np.sin(2 * np.pi * 440 * np.arange(1601) / RATE)
    assert np.abs(resample(wave, 44_101, RATE) - expected)[100:-100].max() < 2e-3


def test_silence_warns():
    left = tone(0.5, 0)
    for wave in (np.zeros(RATE), np.stack([left, -left], 1), 1e-5 * left):  # the second: channels that cancel out
        with pytest.warns(DataWarning, match="q7: silent"):
            load_audio({"array": wave, "sampling_rate": RATE}, RATE, name="q7")


def line(**row):
    return json.dumps(row).encode()


AB = line(id="a", text="x", label="harmful") + b"\n" + line(id="b", text="y", label="benign")
# name -> (content of m.jsonl, label asked for, words)
MANIFESTS = {
    "missing": (None, None, ["m.jsonl", "no such file"]),
    "wrong JSON": (AB + b"\n{'id': 3}", None, ["m.jsonl, line 3", "not valid JSON", "one object a line"]),
    "a list that is cut off": (b'[{"text": "x"}', None, ["m.jsonl, line 1", "not valid JSON"]),
    "100,000 brackets": (b"[" * 100_000, None, ["m.jsonl", "not valid JSON"]),
    "a number of 5,000 digits": (b'{"id": ' + b"1" * 5000 + b"}", None, ["m.jsonl, line 1", "one object a line"]),
    "not an object": (b"5\n", None, ["m.jsonl, row 1", "expected an object"]),
    "UTF-16": ('{"text": "x"}'.encode("utf-16"), None, ["m.jsonl", "save it as UTF-8"]),
    "Latin-1": ('{"text": "Käse"}'.encode("latin-1"), None, ["m.jsonl", "save it as UTF-8"]),
    "a lone surrogate": (b'{"text": "\\ud800"}', None, ["m.jsonl, row 1", "no valid Unicode", "re-export"]),
    "duplicate ids": (AB + b"\n" + line(id="a", text="z"), None, ["m.jsonl", "rows 1 and 3", "'a'", "must differ"]),
    "unknown label": (line(text="x", label="bad"), None, ["m.jsonl, row 1", "'bad'", "'harmful' nor 'benign'"]),
    "text of a wrong type": (line(text=["x"]), None, ["m.jsonl, row 1", "'text' must be a string"]),
    "neither text nor audio": (line(id="a", text=" "), None, ["m.jsonl, row 1", "needs one of them"]),
    "audio of a wrong type": (line(audio=[1, 2]), None, ["m.jsonl, row 1", "'audio' must be a path"]),
    "no rows": (b"\n\n", None, ["m.jsonl", "no examples"]),
    "one class only": (line(text="x", label="benign"), "harmful", ["m.jsonl", "no harmful", "pass the file with"]),
    "missing audio": (line(audio="gone.wav"), None, ["m.jsonl, row 1", "gone.wav", "correct the path"]),
    "audio above the folder": (line(audio="../a.wav"), None, ["m.jsonl, row 1", "outside", "allow_outside=True"]),
    "absolute audio": (line(audio="/etc/hostname"), None, ["m.jsonl, row 1", "outside", "allow_outside=True"]),
    "a link that leads outside": (line(audio="out.wav"), None, ["m.jsonl, row 1", "outside", "allow_outside=True"]),
    "a link to itself": (line(audio="loop.wav"), None, ["m.jsonl, row 1", "loop.wav", "correct"]),
    "a NUL in the path": (line(audio="a\0.wav"), None, ["m.jsonl, row 1", "correct"]),
    "a path of 9,000 letters": (line(audio="a" * 9000), None, ["m.jsonl, row 1", "correct"]),
    "a pipe": (line(audio="pipe.wav"), None, ["m.jsonl, row 1", "no ordinary file", "correct the path"]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_manifests(case, tmp_path):
    content, label, words = MANIFESTS[case]
    folder = tmp_path / "data"
    folder.mkdir()
    (tmp_path / "a.wav").write_bytes(GOOD)
    (folder / "out.wav").symlink_to(tmp_path / "a.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    os.mkfifo(folder / "pipe.wav")
    if content is not None:
        (folder / "m.jsonl").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_examples(folder / "m.jsonl", label)
    assert all(word in str(error.value) for word in words), error.value


def test_manifests_that_are_fine(tmp_path):
    (tmp_path / "a.wav").write_bytes(GOOD)
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + line(text="one") + b"\r\n" + '{"text": "two\u2028lines"}'.encode() + b"\r\n")
    assert [(e.id, e.text) for e in load_examples(path)] == [("row-1", "one"), ("row-2", "two\u2028lines")]
    path.write_bytes(line(audio="../a.wav") + b"\n" + line(audio=str(tmp_path / "a.wav")))
    assert len({e.audio_hash for e in load_examples(path, allow_outside=True)}) == 1


def fit(tiny, harmful=None, benign=None, config=None, **kwargs):
    config = config or RRSConfig(epochs=1, lora_r=2)
    harmful, benign = (
        rows("harmful", 3) if harmful is None else harmful,
        rows("benign", 3) if benign is None else benign,
    )
    return RRS(*tiny, config, verbose=False).fit(harmful, benign, preflight=0, **kwargs)


def with_nan(tiny):
    with torch.no_grad():
        tiny[0].model.language_model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    return fit(tiny)


def small_vocabulary(tiny):
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    return RRS(model, tiny[1])


def damaged(tiny, tmp_path, name, content, without=()):
    r = fit(tiny)
    r.save(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes(content)
    for other in without:
        (tmp_path / "a" / other).unlink()
    return RRS.load(tmp_path / "a", *tiny)


BOTH = [{**rows("benign", 1)[0], "text": "HARMFUL  question ?"}]
# name -> (call, exception, words)
CALLS = {
    "processor of another model": (
        lambda t, _: small_vocabulary(t),
        ValueError,
        ["256 tokens", "100", "same checkpoint"],
    ),
    "no head": (lambda t, _: RRS(t[0].model, t[1]), ValueError, ["Qwen2AudioModel", "head='path.to.head'"]),
    "a config that is a dict": (lambda t, _: RRS(*t, {"top": 25}), ValueError, ["config is a dict", "from_dict"]),
    "no words of a refusal": (lambda *_: RRSConfig(refusal=""), ValueError, ["refusal='' is empty"]),
    "without gradients": (
        lambda t, _: torch.no_grad()(fit)(t),
        ValueError,
        ["Training needs gradients", "torch.no_grad()"],
    ),
    "in inference mode": (
        lambda t, _: torch.inference_mode()(fit)(t),
        ValueError,
        ["Training needs gradients", "torch.inference_mode()"],
    ),
    "training without gradients": (
        lambda t, _: torch.no_grad()(RRS(*t).train)([]),
        ValueError,
        ["Training needs gradients", "torch.no_grad()"],
    ),
    "an unknown condition": (
        lambda t, _: RRS(*t).generate("Hi.", "audio"),
        ValueError,
        ["'audio' is unknown", "text-only"],
    ),
    "top 0": (lambda *_: RRSConfig(top=0), ValueError, ["top=0", "'positive'"]),
    "top 101": (lambda *_: RRSConfig(top=101), ValueError, ["top=101", "(0, 100]"]),
    "top abc": (lambda *_: RRSConfig(top="abc"), ValueError, ["top='abc'", "'positive'"]),
    "NaN in the base": (
        lambda t, _: with_nan(t),
        ValueError,
        ["layers.1.mlp.up_proj.weight", "load the checkpoint again"],
    ),
    "LoRA on nothing": (
        lambda t, _: fit(t, config=RRSConfig(target_modules=("query",))),
        ValueError,
        ["target_modules ['query']", "q_proj"],
    ),
    "no example": (lambda t, _: fit(t, harmful=[]), DataError, ["no harmful examples"]),
    "harmful and benign at once": (
        lambda t, _: fit(t, benign=BOTH),
        DataError,
        ["harmful and benign at once", "harmful-0", "on one side"],
    ),
    "adapter of another base": (
        lambda t, p: damaged(
            t,
            p,
            "adapter_model.safetensors",
            safetensors.torch.save({f"base_model.model.x.q.lora_{c}.weight": torch.zeros(2, 2) for c in "AB"}),
            without=["rrs.json", "rrs.safetensors"],
        ),
        ValueError,
        ["another base", "x.q"],
    ),
    "cut-off adapter": (
        lambda t, p: damaged(t, p, "adapter_model.safetensors", b"\x10\0\0\0\0\0\0\0{"),
        ValueError,
        ["is damaged", "copy it again"],
    ),
    "adapter settings that are no object": (
        lambda t, p: damaged(t, p, "adapter_config.json", b"[]"),
        ValueError,
        ["is damaged", "copy it again"],
    ),
    "unknown setting in an adapter": (
        lambda t, p: damaged(t, p, "rrs.json", b'{"config": {"learning_rat": 1}}'),
        ValueError,
        ["no fields ['learning_rat']"],
    ),
    "no adapter": (lambda t, p: RRS.load(p, *t), FileNotFoundError, ["holds no adapter", "adapter_config.json"]),
    "nothing to save": (lambda t, p: RRS(*t).save(p / "a"), ValueError, ["call fit() first"]),
}


@pytest.mark.filterwarnings("ignore:Replaying:UserWarning")  # with NaN in the weights
@pytest.mark.parametrize("case", CALLS)
def test_calls(case, tiny, tmp_path):
    call, exception, words = CALLS[case]
    with pytest.raises(exception) as error:
        call(tiny, tmp_path)
    assert all(word in str(error.value) for word in words), error.value


def learned_positions(positions):
    """A text model that looks its positions up in a table."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": positions, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**sizes)).eval(), tokenizer


def rotary(positions):
    model, processor = tiny_qwen2_audio()
    model.config.text_config.max_position_embeddings = positions
    return model, processor


@pytest.mark.parametrize("make", [learned_positions, rotary])
def test_prompts_beyond_the_models_positions_are_named(make):
    long = {"id": "long", "text": "Why " * 40, "label": "benign"}
    model, processor = make(130)
    sizes = {"conditions": ("text-only",), "target_modules": ("q_proj",), "epochs": 1, "lora_r": 2}
    config = RRSConfig(refusal_prompt="No.", **sizes)
    r = RRS(model, processor, config, verbose=False)
    said = r"long: The prompt has 1\d\d tokens, the model 130 positions; shorten it"
    for call in (
        lambda: r.extract([long], "text-only"),  # the first prompt, which is read by the full model
        lambda: r.extract([*rows("harmful", 2), long], "text-only"),
        lambda: r.generate([long], "text-only", max_new_tokens=2),
        lambda: r.evaluate([long], ("text-only",), max_new_tokens=2),
        lambda: r.fit(rows("harmful", 3), [*rows("benign", 3), long], preflight=0),
    ):
        with pytest.raises(DataError, match=said):
            call()
    with pytest.raises(ValueError, match=r"harmful-0 has \d+ tokens and max_new_tokens=128, the model 130 positions"):
        r.generate(rows("harmful", 1), "text-only", max_new_tokens=128)
    assert len(r.generate(rows("harmful", 2), "text-only", max_new_tokens=4)) == 2
    assert r.fit(rows("harmful", 3), rows("benign", 3), preflight=2).history


def test_spoken_prompts_beyond_the_models_positions_can_be_left_out():
    r = RRS(*rotary(9999), RRSConfig(epochs=1, lora_r=2, refusal_prompt="(No.)"), verbose=False)
    harmful = [*rows("harmful", 4), {**rows("harmful", 1)[0], "id": "long", "audio": rows("x", 9)[8]["audio"]}]
    longest = max(len(r.read(e, "audio-text")) for e in load_examples(harmful))
    r.model.config.text_config.max_position_embeddings = longest - 1
    with pytest.raises(DataError, match="long: The prompt has"):
        r.generate(harmful)
    with pytest.warns(RRSWarning, match=r"1 of 7 examples can't be read:\n  long: The prompt has"):
        kept = r.readable(load_examples([*harmful, *rows("benign", 2)]), r.config.conditions, skip=True)
    assert "long" not in {e.id for e in kept}
    r.fit(*([e for e in kept if e.label == label] for label in ("harmful", "benign")), preflight=0)


def bad_rows(tmp_path):
    """Six harmful rows, the second, fourth and fifth of which can't be used."""
    out = rows("harmful", 6)
    (tmp_path / "text.wav").write_text("no audio")
    out[1]["audio"] = tmp_path / "text.wav"
    out[3]["audio"] = {"array": np.full(99, np.nan), "sampling_rate": RATE}
    out[4]["audio"] = {"array": np.zeros(9 * RATE), "sampling_rate": RATE}  # longer than the processor's window
    return out


def test_all_bad_rows_are_named_before_training(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(RRS, "train", lambda *_, **__: pytest.fail("training has begun"))
    with pytest.raises(DataError) as error:
        fit(tiny, harmful=bad_rows(tmp_path))
    words = ["3 of 9 examples", "harmful-1", "text.wav", "harmful-3", "NaN", "harmful-4", "9.00 s", "skip=True"]
    assert all(word in str(error.value) for word in words), error.value


def readable(tiny, harmful):
    return RRS(*tiny, verbose=False).readable(load_examples(harmful), ("audio-text",), skip=True)


def test_bad_rows_are_left_out_where_that_is_asked_for(tiny, tmp_path):
    harmful = bad_rows(tmp_path)
    with pytest.warns(RRSWarning, match=r"3 of 6 examples can't be read"):
        kept = readable(tiny, harmful)
    r = fit(tiny, harmful=kept)
    assert r.record["data"]["audio-text"]["harmful"]["n"] == 3
    for use in (r.generate, lambda rows_: r.evaluate({"harmful": rows_}, ("audio-text",), max_new_tokens=2)):
        assert use(kept)
        with pytest.raises(DataError, match="3 of 6 examples"):
            use(harmful)


def test_clips_too_short_for_one_audio_token_are_named(tiny):
    short = {"array": tone(0.2, 0)[:150], "sampling_rate": RATE}
    harmful = [*rows("harmful", 3), {"id": "short", "text": "Why?", "audio": short, "label": "harmful"}]
    with pytest.raises(DataError, match="short: the clip is too short: it gives this model no audio token"):
        fit(tiny, harmful=harmful)
    with pytest.warns(RRSWarning, match="1 of 4 examples can't be read"):
        r = fit(tiny, harmful=readable(tiny, harmful))
    assert r.record["data"]["audio-text"]["harmful"]["n"] == 3


def test_a_table_without_rows_is_no_question(tmp_path):
    (tmp_path / "x.csv").write_text("id,text,label\n")
    with pytest.raises(DataError, match="no harmful examples in it"):
        load_examples(tmp_path / "x.csv", "harmful")


def test_a_question_in_a_harmful_and_in_a_harmless_group_is_said(tiny):
    same = [{"id": "a", "text": "Why so?"}]
    with pytest.warns(RRSWarning, match="1 questions are in a harmful and in a harmless group: a"):
        report = RRS(*tiny, verbose=False).evaluate({"harmful": same, "benign": same}, ("text-only",), max_new_tokens=1)
    assert "in a harmful and in a harmless group" in str(report)


def test_evaluating_on_the_training_set_or_its_twins_warns(tiny, tmp_path):
    """Also after saving and loading."""
    benign = [{**row, "twin": f"lost-{i}"} for i, row in enumerate(rows("benign", 3))]
    r = fit(tiny, benign=benign)
    r.save(tmp_path / "adapter")
    r.disable()
    loaded = RRS.load(tmp_path / "adapter", *tiny, verbose=False)
    asked = [
        {"id": "t", "text": "names a twin", "twin": benign[1]["id"]},
        {"id": "lost-2", "text": "is named as a twin"},
        {"id": "same", "text": f"  {benign[0]['text'].upper()} "},
        {"id": "other", "text": "another"},
    ]
    asked = [{**row, "label": "harmful"} for row in asked]
    for who in (loaded, r):
        with pytest.warns(RRSWarning, match=r"3 examples, or their twins, .*: t, lost-2, same .*Evaluate on others"):
            report = who.evaluate(asked, ("text-only",), max_new_tokens=2, stages={"now": lambda _: nullcontext()})
        assert "in the training set" in str(report)


@pytest.mark.parametrize("n", [1, 2])
def test_few_examples_warn(tiny, n):
    with pytest.warns(RRSWarning, match=rf"Only {n} harmful and {n} benign examples: .*at least 32"):
        fit(tiny, rows("harmful", n), rows("benign", n), RRSConfig(epochs=1, lora_r=2, conditions=("text-only",)))


def test_tied_heads_and_top_100_are_fine(tiny):
    model, _ = tiny
    model.lm_head.weight = model.get_input_embeddings().weight
    before = {k: v.clone() for k, v in model.state_dict().items()}
    r = fit(tiny, config=RRSConfig(epochs=1, lora_r=2, top=100))
    assert r.directions["audio-text"].mask.all()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_there_are_enough_cases():
    assert sum(map(len, (AUDIO, ARRAYS, MANIFESTS, CALLS))) >= 40
