"""The demo LALM, the demo data and the main job, as a new user meets them. Downloads 165 MB once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

from rrs import RRS, RRSConfig, load_examples

EXAMPLES = ROOT / "examples"


def run(*command: str, timeout: int = 900) -> str:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}  # tests run on all cores at once
    done = subprocess.run(
        [sys.executable, *command], cwd=EXAMPLES, env=env, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo():
    from demo_lalm import load_demo

    return load_demo()


def test_data_keeps_its_promises():
    """Counts, twins, splits, near-duplicates, every clip decodes."""
    assert "all checks passed" in run("make_data.py", "--check")


def test_demo_reads_text_like_its_language_model(demo):
    """As text, the demo is SmolLM2: a spoken and a written refusal mean the same model refused."""
    model, processor = demo
    rrs = RRS(model, processor, verbose=False)
    answer = rrs.generate([{"text": "What is the tallest mountain in the world?"}], "text-only", max_new_tokens=12)[0]
    assert "Everest" in answer
    prompt = processor.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user\nHi<|im_end|>" in prompt
    assert "AUDIO" not in prompt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_demo_hears(dtype):
    """Asked to repeat, it says the words: half of them, of three clips, would be a broken ear."""
    from demo_lalm import load_demo
    from quickstart import word_error_rate

    rrs = RRS(*load_demo(dtype=dtype), RRSConfig(instruction="Repeat what is said in the audio."), verbose=False)
    examples = load_examples(EXAMPLES / "data" / "dev.jsonl")[3:6]
    said = rrs.generate(examples, "audio-text", max_new_tokens=24)
    errors = [word_error_rate(e.text, answer) for e, answer in zip(examples, said, strict=True)]
    assert sum(errors) / len(errors) < 0.5, said


def test_the_ear_stops_at_silence_and_at_loops(demo):
    """States past the last word are the end state, in every slot; batched or alone, they are the same."""
    model, processor = demo
    examples = load_examples(EXAMPLES / "data" / "dev.jsonl")[:3]
    waves = [e.clip[1](16000) for e in examples]
    features = processor.feature_extractor(waves, sampling_rate=16000, return_tensors="pt")["input_features"]
    tower = model.model.audio_tower
    together = tower(features).last_hidden_state
    alone = torch.cat([tower(row[None]).last_hidden_state for row in features])
    assert torch.allclose(together, alone, atol=1e-2)
    ends = (together - together[:, -1:]).norm(dim=-1) < 1e-4  # [clips, slots]
    assert ends.any(1).all()
    assert all(row[int(row.int().argmax()) :].all() for row in ends)
    assert not ends[:, :4].any()


def test_replay_is_exact_on_the_demo(demo):
    rrs = RRS(*demo, verbose=False)
    examples = load_examples(EXAMPLES / "data" / "dev.jsonl")[:3]
    for condition in ("audio-text", "text-only", "audio-only"):
        batched = rrs.reader.represent([rrs.read(e, condition) for e in examples])
        alone = torch.cat([rrs.reader.represent([rrs.read(e, condition)]) for e in examples])
        assert torch.allclose(batched, alone, atol=1e-3)
    assert rrs.reader.exact
    assert rrs.reader.share_prefix


def test_quickstart_fast(tmp_path):
    out = run("quickstart.py", "--fast", "--out", str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    cells = {(row["condition"], row["group"]) for row in report["table"]}
    assert len(cells) == 3 * 3 + 1  # everyday questions are typed only
    assert all({"before", "after"} == row["refused"].keys() for row in report["table"])
    assert all({"after"} == row["refused_change"].keys() for row in report["table"])
    assert "| condition |" in out
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 18  # A and B of seven linears in each of the upper 18 blocks
    assert any(v.abs().max() > 0 for k, v in adapter.items() if "lora_B" in k)
    for condition in ("text-only", "audio-only"):
        assert Path(tmp_path / "out" / f"representations-{condition}.png").stat().st_size > 10_000
