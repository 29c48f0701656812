"""Reading manifests, decoding and resampling audio, rendering prompts."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import soundfile
from conftest import RATE, tiny_qwen2_audio, tone

from rrs.data import DataError, Example, Renderer, load_audio, load_examples, resample, user_turn


def write(path, rows):
    path.write_text("\n".join(json.dumps(r) for r in rows), encoding="utf-8")
    return path


def test_manifest(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.2, 0), RATE)
    row = {"id": "q1", "audio": "a.wav", "text": "Why?", "label": "benign", "category": "c", "twin": "q2", "voice": "v"}
    (example,) = load_examples(write(tmp_path / "m.jsonl", [row]))
    assert (example.id, example.text, example.label, example.category) == ("q1", "Why?", "benign", "c")
    assert example.audio == tmp_path / "a.wav"
    assert example.meta == {"twin": "q2", "voice": "v"}


def test_authors_rows(tmp_path):
    soundfile.write(tmp_path / "1.wav", tone(0.2, 0), RATE)
    path = tmp_path / "train.json"
    path.write_text(json.dumps([{"prompt": "How?", "category": "drug_abuse", "path": "1.wav"}]))
    (example,) = load_examples(path, "harmful")
    assert (example.text, example.category, example.label) == ("How?", "drug_abuse", "harmful")
    assert example.audio == tmp_path / "1.wav"


def test_a_label_selects_from_a_mixed_manifest(tmp_path):
    rows = [{"id": str(i), "text": "x", "label": label} for i, label in enumerate(["harmful", "benign", "harmful"])]
    path = write(tmp_path / "m.jsonl", rows)
    assert [e.id for e in load_examples(path, "harmful")] == ["0", "2"]
    assert [e.id for e in load_examples(path, "benign")] == ["1"]


def test_bom_and_crlf(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"id": "a", "text": "x"}\r\n\r\n{"id": "b", "text": "y"}\r\n')
    assert [e.id for e in load_examples(path)] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"id": "a", "text": "x"}\n{"id": ', ["m.jsonl, line 2", "not valid JSON"]),
        ('[{"text": "x"},]', ["m.jsonl, line 1", "not valid JSON"]),
        ('{"id": "a"}', ["row 1", "neither 'text' nor 'audio'"]),
        ('{"id": "a", "text": 5}', ["row 1", "'text' must be a string"]),
        ('"hello"', ["row 1", "expected an object"]),
        ('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}', ["rows 1 and 2", "same id 'a'"]),
        ('{"id": "a", "text": "x", "label": "bad"}', ["row 1", "'bad'", "harmful"]),
        ('{"id": "a", "audio": "gone.wav"}', ["row 1", "gone.wav", "does not exist"]),
        ("", ["m.jsonl", "no examples"]),
        ('{"id": "a", "text": "\xff"}', ["m.jsonl", "UTF-8"]),
    ],
)
def test_bad_manifests(tmp_path, content, words):
    path = tmp_path / "m.jsonl"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError) as error:
        load_examples(path)
    assert all(word in str(error.value) for word in words), error.value


def test_missing_manifest_and_wrong_type(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="must be a path or an iterable"):
        load_examples(5)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_any_width_and_channels(tmp_path, subtype, channels):
    wave = tone(0.3, 1)
    soundfile.write(tmp_path / "a.wav", np.stack([wave] * channels, axis=1), RATE, subtype=subtype)
    decoded = load_audio(tmp_path / "a.wav", RATE)
    assert decoded.dtype == np.float32
    assert decoded.shape == wave.shape
    assert np.abs(decoded - wave).max() < (0.01 if subtype == "PCM_U8" else 1e-4)


@pytest.mark.parametrize(("format_", "subtype"), [("FLAC", "PCM_16"), ("OGG", "OPUS"), ("OGG", "VORBIS")])
def test_formats_and_bytes(format_, subtype):
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(0.5, 2), RATE, format=format_, subtype=subtype)
    decoded = load_audio(buffer.getvalue(), RATE)
    assert abs(len(decoded) - RATE // 2) <= 1
    assert np.corrcoef(decoded[:7900], tone(0.5, 2)[:7900])[0, 1] > 0.95


def test_arrays_of_integers_are_scaled():
    wave = (tone(0.1, 3) * 32767).astype(np.int16)
    decoded = load_audio({"array": wave, "sampling_rate": RATE}, RATE)
    assert np.abs(decoded - tone(0.1, 3)).max() < 1e-3


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000])
def test_resampling_keeps_a_tone_and_its_time(rate):
    """A 440 Hz tone comes out as the same tone at 16 kHz: same length, phase and level."""
    t = np.arange(rate) / rate
    out = resample(np.sin(2 * np.pi * 440 * t).astype(np.float32), rate, RATE)
    assert len(out) == RATE
    expected = np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    assert np.abs(out - expected)[400:-400].max() < 2e-3


def test_resampling_does_not_alias():
    """What 16 kHz can't carry is gone, not folded back: linear interpolation leaves far more than 1/1000 of it."""
    t = np.arange(48000) / 48000
    out = resample(np.sin(2 * np.pi * 11000 * t).astype(np.float32), 48000, RATE)
    assert np.abs(out[400:-400]).max() < 1e-3


def test_resampling_at_the_same_rate_is_the_identity():
    wave = tone(0.1, 4)
    assert resample(wave, RATE, RATE) is wave


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "can't be decoded"),
        (b"just text, not audio", "can't be decoded"),
        ({"array": np.zeros(0), "sampling_rate": RATE}, "no samples"),
        ({"array": np.array([0.0, np.nan]), "sampling_rate": RATE}, "NaN"),
        ({"array": np.zeros(9)}, "sampling_rate"),
        ({"array": np.zeros(9), "sampling_rate": 0}, "must be positive"),
        ({"array": np.zeros((1, 9)), "sampling_rate": RATE}, r"q7: .*\[1, 9\].*\[samples, channels\]; transpose"),
        ({"array": np.zeros((2, 9), np.int16), "sampling_rate": RATE}, "transpose"),
        ({"array": [0, 12000, -32768], "sampling_rate": RATE}, r"q7: .*unknown width.*np\.asarray\(array, np\.int16\)"),
        ({"array": [0, 2**23 - 1, -(2**23)], "sampling_rate": RATE}, "unknown width"),  # 24 bits would be as silent
        ({"array": [0.0, 12000.0, -32768.0], "sampling_rate": RATE}, r"q7: .*32768, expected floats.*divide PCM"),
    ],
)
def test_bad_audio(content, words):
    with pytest.raises(DataError, match=words):
        load_audio(content, RATE, name="q7")


WAVE = tone(0.1, 3)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.stack([WAVE, WAVE], 1), WAVE),
        (np.zeros(9, int), np.zeros(9)),  # silent at any width
        ((WAVE.astype(np.float64) * 2**63).astype(np.int64), WAVE),
        (4 * WAVE, 4 * WAVE),  # overshoot
    ],
)
def test_arrays_that_leave_no_doubt_are_fine(array, expected):
    assert np.abs(load_audio({"array": array, "sampling_rate": RATE}, RATE) - expected).max() < 1e-6


def test_too_long_audio_names_the_limit():
    with pytest.raises(DataError, match=r"q7: 2.0 s is longer than the 1 s"):
        load_audio({"array": np.zeros(2 * RATE), "sampling_rate": RATE}, RATE, name="q7", max_seconds=1)


def test_user_turns():
    e = Example("a", text="How do I bake bread?", audio=b"")
    assert user_turn(e, "audio-text", "Answer it.") == "Answer it."
    assert user_turn(e, "audio-text", "Answer it.", "(Refuse.)") == "Answer it. (Refuse.)"
    assert user_turn(e, "audio-only", "Answer it.") is None
    assert user_turn(e, "audio-only", "Answer it.", "(Refuse.)") == "(Refuse.)"
    assert user_turn(e, "text-only", "Answer it.") == "How do I bake bread?"
    assert user_turn(e, "text-content", "Answer it.") == "The audio content is: How do I bake bread. Answer it."
    with pytest.raises(ValueError, match="Unknown condition"):
        user_turn(e, "video", "")


def test_a_clip_that_the_processor_would_cut_is_refused():
    """The tiny processor hears 2 s; it would drop the rest without a word."""
    _, processor = tiny_qwen2_audio()
    with pytest.raises(DataError, match=r"2\.50 s .* 2\.00 s"):
        Renderer(processor)("Answer.", tone(2.5, 0))


def test_a_template_that_drops_the_audio_is_refused():
    _, processor = tiny_qwen2_audio()
    processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(ValueError, match="drops the audio"):
        Renderer(processor)("Answer.", tone(0.5, 0))


def test_no_template_and_no_audio():
    _, processor = tiny_qwen2_audio()
    tokenizer = processor.tokenizer
    with pytest.raises(ValueError, match="no chat template"):
        Renderer(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(ValueError, match="takes no audio"):
        Renderer(tokenizer)("Answer.", tone(0.5, 0))
