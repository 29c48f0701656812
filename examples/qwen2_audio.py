"""RRS on Qwen2-Audio-7B-Instruct with the paper's settings, on one GPU.

    python examples/qwen2_audio.py --out qwen2-audio-rrs
    python examples/qwen2_audio.py --harmful my_harmful.jsonl --benign my_benign.jsonl --test my_test.jsonl --out run

Without manifests of your own it trains on the demo's questions, which is enough to see it run; the paper used about
1400 BeaverTails questions. The checkpoint (17 GB) is downloaded on first use.

Memory, by `expected_memory` below, in bfloat16, with prompts of up to 400 positions (15 s of audio at 25 positions a
second, and the text): 16.8 GB of weights (8.4 billion parameters), 0.6 GB for the LoRA with its gradients and AdamW's
moments (40 million parameters), 12.2 GB of activations: 30 GB, plus what the CUDA context and the allocator keep. The
activations were checked tensor by tensor on a small copy of the decoder on a CPU, the whole was not checked on a GPU;
the script prints at its end what was really used.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from rrs import RRS, RRSConfig, load_examples
from rrs.hooks import linear_paths

DATA = Path(__file__).resolve().parent / "data"


def expected_memory(rrs: RRS, positions: int = 400) -> dict[str, float]:
    """GB of GPU memory by purpose, for training in bfloat16.

    Args:
        positions: length of one prompt.
    """
    text, c = rrs.model.config.get_text_config(), rrs.config
    hidden, mlp = text.hidden_size, text.intermediate_size
    narrow = hidden * text.num_key_value_heads // text.num_attention_heads  # width of keys and values
    modules = [rrs.model.get_submodule(path) for path in linear_paths(rrs.location, c.target_modules)]
    lora = sum(c.lora_r * (m.in_features + m.out_features) for m in modules)
    # Bytes that one position leaves behind in one block for the backward pass; frozen weights need no inputs kept.
    per_position = (
        8 * hidden  # the two norms' inputs, float32
        + 18 * hidden  # inputs of six LoRAs after dropout (q, k, v, o, gate, up), bfloat16, and the masks
        + 4 * hidden + 4 * narrow  # query and output, key and value of attention
        + 6 * mlp  # gate, its activation, up
        + 3 * mlp  # input of the down projection's LoRA after dropout, and the mask
    )  # fmt: skip
    return {
        "weights": 2 * sum(p.numel() for p in rrs.model.parameters()) / 1e9,
        "LoRA, its gradients and AdamW's two moments (float32)": 16 * lora / 1e9,
        "activations": c.batch_size * positions * text.num_hidden_layers * per_position / 1e9,
    }


def run(name: str, config: RRSConfig, description: str) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harmful", type=Path, default=DATA / "train.jsonl", help="manifest, see README")
    parser.add_argument(
        "--benign", type=Path, default=DATA / "train.jsonl", help="may be the same file: rows have labels"
    )
    parser.add_argument("--test", type=Path, default=DATA / "test.jsonl", help="manifest with both labels")
    parser.add_argument("--hard-benign", type=Path, default=DATA / "hard_benign_test.jsonl")
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter and report")
    parser.add_argument("--model", default=name, help="name on the hub, or a folder")
    args = parser.parse_args()
    groups = {  # before hours of training, not after
        "harmful": load_examples(args.test, "harmful"),
        "benign": load_examples(args.test, "benign"),
        "hard-benign": load_examples(args.hard_benign, "benign"),
    }

    rrs = RRS.from_pretrained(args.model, config)
    parts = expected_memory(rrs)
    print(", ".join(f"{what} {gb:.1f} GB" for what, gb in parts.items()), f"– {sum(parts.values()):.0f} GB expected")

    rrs.fit(harmful=args.harmful, benign=args.benign)
    rrs.save(args.out / "adapter", overwrite=True)
    report = rrs.evaluate(groups, ("audio-text", "text-only", "audio-only"))
    report.save(args.out)
    print(report)
    if torch.cuda.is_available():
        print(f"used at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


if __name__ == "__main__":
    run("Qwen/Qwen2-Audio-7B-Instruct", RRSConfig(), str(__doc__))
