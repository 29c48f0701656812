"""A tiny random Qwen2-Audio with a real processor, built offline; the invariants are tested on it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

torch.set_num_threads(1)  # on models as tiny as these, threads only wait for one another
RATE = 16000
OLDER = Version(transformers.__version__) < Version("5.23")  # than the transformers that the tests are written for
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and the special tokens: a real tokenizer without a vocabulary file."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|im_end|>")


def tiny_qwen2_audio(
    seed: int = 0, hidden: int = 32, layers: int = 2
) -> tuple[Qwen2AudioForConditionalGeneration, Qwen2AudioProcessor]:
    tokenizer = byte_tokenizer()
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    config = Qwen2AudioConfig(
        audio_config={
            "num_mel_bins": 16, "d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32, "max_source_positions": 100,
        },
        text_config={
            "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": hidden, "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None,
            "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|pad|>"], "tie_word_embeddings": False,
        },
        audio_token_index=ids["<|AUDIO|>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():  # initialisation draws tiny numbers; these make hidden states and logits of ordinary size
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(4)
    model.generation_config.update(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|pad|>"])
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2, sampling_rate=RATE)
    return model, Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE)


@pytest.fixture
def tiny() -> tuple[Any, Any]:
    return tiny_qwen2_audio()


def tone(seconds: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    return (0.3 * np.sin(2 * np.pi * rng.uniform(200, 2000) * t) + 0.02 * rng.standard_normal(len(t))).astype(
        np.float32
    )


def rows(label: str, n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Spoken and written questions of different lengths."""
    return [
        {
            "id": f"{label}-{i}",
            "text": f"{label} question {'x' * (3 * i)}?",
            "audio": {"array": tone(0.3 + 0.15 * i, seed + 17 * i + len(label)), "sampling_rate": RATE},
            "label": label,
            "category": "test",
        }
        for i in range(n)
    ]


@pytest.fixture
def harmful() -> list[dict[str, Any]]:
    return rows("harmful", 6)


@pytest.fixture
def benign() -> list[dict[str, Any]]:
    return rows("benign", 5)


@pytest.fixture
def snapshot() -> Callable[[torch.nn.Module], dict[str, Any]]:
    """Everything of a model that a public call must leave alone."""

    def take(model: torch.nn.Module) -> dict[str, Any]:
        return {
            "state": {k: v.clone() for k, v in model.state_dict().items()},
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
            "training": [m.training for m in model.modules()],
            "grads": [(p.requires_grad, p.grad is None) for p in model.parameters()],
            "generation": model.generation_config.to_dict(),
            "rng": torch.get_rng_state().tolist(),
        }

    return take


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["state"].keys() == b["state"].keys()
    assert all(torch.equal(a["state"][k], b["state"][k]) for k in a["state"])
    for key in ("hooks", "training", "grads", "generation", "rng"):
        assert a[key] == b[key], key
