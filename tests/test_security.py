"""Nothing gets in: no code from data, no read outside, no memory for what a header claims, no error but our own."""

from __future__ import annotations

import ast
import io
import json
import os
import tempfile
import time
import tracemalloc
import warnings
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from conftest import RATE, ROOT, tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rrs import RRS
from rrs.data import DataError, Example, load_audio, load_examples

FILES = ("rrs.py", "hooks.py", "data.py", "evaluate.py")
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "subprocess", "socket", "urllib", "requests",
           "http", "httpx", "ctypes", "yaml", "importlib", "runpy"}  # fmt: skip
CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load", "os.system", "os.popen",
         "os.execv", "os.spawnv", "torch.hub.load", "pickle.loads"}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_no_pickle_no_eval_no_shell_no_network(name):
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & MODULES, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in MODULES, ast.unparse(node)
        elif isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in CALLS, ast.unparse(node)
            assert not any(k.arg in ("shell", "allow_pickle") for k in node.keywords), ast.unparse(node)


def test_remote_code_is_off_and_weights_are_safetensors(monkeypatch, tmp_path):
    """What reaches transformers when nothing is asked for."""
    seen = []

    class Model:
        @staticmethod
        def from_pretrained(_name, **kwargs):
            seen.append(kwargs)
            raise InterruptedError

    config = type("Config", (), {"architectures": ["Model"]})
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda _n, **k: seen.append(k) or config)
    monkeypatch.setattr("transformers.Model", Model, raising=False)
    with pytest.raises(InterruptedError):
        RRS.from_pretrained(tmp_path)
    assert [k["trust_remote_code"] for k in seen] == [False, False]
    assert seen[1]["use_safetensors"] is True


def test_a_pickled_adapter_is_not_read(tiny, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match=r"adapter_model\.safetensors"):
        RRS.load(tmp_path, *tiny)


def encoded(wave, rate=RATE, **kwargs):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, **kwargs)
    return buffer.getvalue()


def wav_claiming(size):
    """A WAV whose header claims `size` bytes of samples."""
    data = bytearray(encoded(tone(0.2, 0), format="WAV"))
    data[4:8] = data[40:44] = size.to_bytes(4, "little")
    return bytes(data)


def peak(call):
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_that_claims_two_billion_frames_takes_no_memory():
    wave = []
    assert peak(lambda: wave.append(load_audio(wav_claiming(2**32 - 2), RATE))) < 2**24
    assert len(wave[0]) == 0.2 * RATE


def test_a_decompression_bomb_is_stopped_before_it_fills_memory(monkeypatch):
    """Ten minutes of silence are a few kilobytes of FLAC."""
    bomb = encoded(np.zeros(600 * RATE, np.int16), format="FLAC")
    assert len(bomb) < 2**18
    monkeypatch.setattr("rrs.data.MAX_BYTES", 2**20)

    def decode():
        with pytest.raises(DataError, match=r"s decode to more than MAX_BYTES=.*split it"):
            load_audio(bomb, RATE)

    assert peak(decode) < 2**25


def test_a_clip_at_a_low_rate_can_grow_no_further_than_others(monkeypatch):
    """At the model's rate it is 16 times as long."""
    slow = encoded(np.zeros(2**17, np.int16), 1000, format="FLAC")
    monkeypatch.setattr("rrs.data.MAX_BYTES", 2**20)
    with pytest.raises(DataError, match=r"131 s at 16000 Hz exceed MAX_BYTES=.*split it"):
        load_audio(slow, RATE)


def test_a_manifest_reads_nothing_outside_its_folder(tmp_path):
    """No file outside is opened, not even to see whether it is audio."""
    (tmp_path / "secret.wav").write_bytes(encoded(tone(0.1, 0), format="WAV"))
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "data" / "deep" / "link.wav").symlink_to("../../secret.wav")
    manifest = tmp_path / "data" / "m.jsonl"
    for path in ("../secret.wav", str(tmp_path / "secret.wav"), "deep/link.wav", "deep/../../secret.wav", "/dev/zero"):
        manifest.write_text(json.dumps({"audio": path}))
        with pytest.raises(DataError, match="outside the manifest's folder"):
            load_examples(manifest)


# -- whatever the bytes, nothing but DataError ----------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["id", "text", "prompt", "audio", "path", "label", "category", "twin", "x"])
objects = st.dictionaries(names, values | st.sampled_from(["harmful", "benign", "a.wav", "../a.wav", "/"]), max_size=6)
lines = st.lists(objects.map(json.dumps) | values.map(json.dumps) | st.text(max_size=30), max_size=5)
manifests = st.binary(max_size=80) | lines.map(lambda x: "\n".join(x).encode("utf-8", "surrogatepass"))

SEEDS = [
    encoded(tone(0.05, 0)[:, None].repeat(channels, 1), rate, format=format_, subtype=subtype)
    for format_, subtype, rate, channels in [
        ("WAV", "PCM_16", 16000, 1), ("WAV", "FLOAT", 44100, 2), ("FLAC", "PCM_16", 16000, 1),
        ("WAV", "IMA_ADPCM", 8000, 1),
        ("OGG", "VORBIS", 22050, 1), ("AIFF", "PCM_24", 48000, 2), ("AU", "ULAW", 8000, 1), ("W64", "PCM_16", 16000, 1),
    ]
]  # fmt: skip


@st.composite
def clips(draw):
    """Real files with bytes changed, cut and added: most get past the first look at the header."""
    data = bytearray(draw(st.sampled_from(SEEDS)))
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, min(len(data) - 1, draw(st.sampled_from([64, len(data) - 1])))))] = draw(
            st.integers(0, 255)
        )
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data) + draw(st.binary(max_size=9))


def read_manifest(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "m.jsonl")
        path.write_bytes(content)
        try:
            examples = load_examples(path)
        except DataError:
            pass
        else:
            assert all(isinstance(e, Example) and (e.text or e.audio) for e in examples)
            assert len({e.id for e in examples}) == len(examples)


def read_clip(content: bytes) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wave = load_audio(content, RATE, name="q7")
        except DataError:
            pass
        else:
            assert wave.dtype == np.float32
            assert wave.ndim == 1
            assert len(wave)
            assert np.isfinite(wave).all()


few = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@few
@given(manifests)
def test_any_manifest(content):
    read_manifest(content)


@few
@given(clips())
def test_any_clip(content):
    read_clip(content)


@few
@given(st.lists(objects | values, max_size=4))
def test_any_rows(rows_):
    plain = [{k: v for k, v in r.items() if k not in ("audio", "path")} if isinstance(r, dict) else r for r in rows_]
    with suppress(DataError):
        assert all(isinstance(e, Example) for e in load_examples(plain))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["manifests", "clips"])
def test_fuzz_for_minutes(kind):
    """Each for FUZZ_SECONDS, by default 10 minutes; every round has a new seed."""
    strategy, read = (manifests, read_manifest) if kind == "manifests" else (clips(), read_clip)
    end, rounds = time.monotonic() + float(os.environ.get("FUZZ_SECONDS", 600)), 0
    while time.monotonic() < end:
        settings(few, max_examples=1000)(given(strategy)(read))()
        rounds += 1
    print(f"{kind}: {rounds} rounds of 1000")
