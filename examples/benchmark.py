"""RRS against the published recipe built from its usual parts: same model, data, order, batch, dtype and device.

    pip install "rrs[bench]"
    python examples/benchmark.py --size tiny                       # a random model: does it run, what is overhead?
    python examples/benchmark.py --size demo --json bench.json     # the demo LALM on its spoken questions
    python examples/benchmark.py --size 7b                         # a GPU: random weights, Qwen2-Audio-7B's dimensions
    python examples/benchmark.py --size omni-7b                    # a GPU: those of Qwen2.5-Omni-7B's thinker
    python examples/benchmark.py --count                           # both 7B models counted instead; see count.py

The recipe is in recipe.py. Both start from the same LoRA and see the same batches with the same instructions. Dropout
is off, since its masks could not be the same; rate and penalty are such that the losses move, epochs are few; the rest
is the paper's. The two take turns for a few rounds, so that a machine that slows down slows both; figures are medians.
Peak memory is that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from recipe import Step, their_fit
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.flop_counter import FlopCounterMode

from rrs import RRS, Example, RRSConfig, load_examples
from rrs.hooks import best_device

DATA = Path(__file__).resolve().parent / "data"
PEAK = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16 TFLOP/s, as the vendor states them

# -- models and data ---------------------------------------------------------------------------------------------------

WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
# Audio tower, language model, mel bins, seconds of clips and of the tower's window. "7b" is config.json of
# Qwen/Qwen2-Audio-7B-Instruct; "omni-7b" is thinker_config of Qwen/Qwen2.5-Omni-7B, whose tower has no fixed window.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "audio": {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64},
        "text": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 2048},
        "mel": 80, "seconds": (0.5, 1.5), "window": 2,
    },
    "7b": {
        "audio": WHISPER,
        "text": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 156032},
        "mel": 128, "seconds": (3.0, 8.0), "window": 30,
    },
    "omni-7b": {
        "audio": WHISPER,
        "text": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
                 "num_key_value_heads": 4, "vocab_size": 152064},
        "mel": 128, "seconds": (3.0, 8.0), "window": 8,
    },
}  # fmt: skip
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_lalm(size: str, device: torch.device) -> tuple[Any, Any]:
    """A Qwen2-Audio of these dimensions with random weights, and a processor that knows the prompts' words."""
    sizes, config = SIZES[size], RRSConfig()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*config.prompts, config.instruction, config.refusal_prompt, "user assistant"], trainer)
    bpe.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    lalm = transformers.Qwen2AudioConfig(
        audio_config={**sizes["audio"], "num_mel_bins": sizes["mel"], "max_source_positions": 50 * sizes["window"]},
        text_config={"model_type": "qwen2", **sizes["text"], "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
                     "pad_token_id": ids["<|pad|>"], "tie_word_embeddings": False},
        audio_token_index=ids["<|AUDIO|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        model = transformers.Qwen2AudioForConditionalGeneration._from_config(lalm, dtype=dtype)
    extractor = transformers.WhisperFeatureExtractor(feature_size=sizes["mel"], chunk_length=sizes["window"])
    return model.eval(), transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE)


def tones(folder: Path, n: int, seconds: tuple[float, float]) -> list[Example]:
    """Half harmful, half benign by name; clips are files, all different, of all lengths between the two."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(n):
        length = seconds[0] + (seconds[1] - seconds[0]) * ((7 * i) % n) / max(1, n - 1)
        wave = 0.3 * np.sin(np.arange(round(16000 * length)) * (0.05 + i / 10000))
        soundfile.write(path := folder / f"{i}.flac", wave, 16000)
        label: Any = "harmful" if i % 2 else "benign"
        out.append(Example(id=f"{label}-{i}", text=f"Question {i}?", audio=str(path), label=label))
    return out


@dataclass
class Setting:
    """What both sides get; eight examples make a step."""

    size: str
    device: torch.device
    folder: Path  # for clips and vectors
    n: int  # examples
    epochs: int

    def __post_init__(self) -> None:
        demo = self.size == "demo"
        rows = load_examples(DATA / "train.jsonl") if demo else tones(self.folder, self.n, SIZES[self.size]["seconds"])
        sides = [[e for e in rows if e.label == label] for label in ("harmful", "benign")]
        self.harmful, self.benign = (side[: self.n // 2] for side in sides)
        # "I" is a token of every tokenizer here; whether it leads to refusals does not matter for time.
        self.config = RRSConfig(lora_dropout=0.0, learning_rate=1e-3, penalty=1e-2, epochs=self.epochs)

    def load(self) -> tuple[Any, Any]:
        if self.size != "demo":
            return random_lalm(self.size, self.device)
        from demo_lalm import load_demo

        model, processor = load_demo()
        return model.to(self.device), processor


# -- ours --------------------------------------------------------------------------------------------------------------


def our_fit(setting: Setting, model: Any, processor: Any, step: Step) -> list[float]:
    """The losses; `step` is called after extraction and after each optimizer step."""
    ours = RRS(model, processor, setting.config, verbose=False)
    items = ours.prepare(setting.harmful, setting.benign, "audio-text").items
    step()
    ours.train(items, callbacks=[lambda _: step()]).disable()
    return [row["loss"] for row in ours.history]


FITS = {"published": their_fit, "rrs": our_fit}

# -- measuring ---------------------------------------------------------------------------------------------------------


def timed_fit(name: str, setting: Setting, model: Any, processor: Any) -> tuple[list[float], list[float]]:
    """Losses, and seconds of the extraction and of each step."""

    def now() -> float:
        if setting.device.type != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    times = [now()]
    losses = FITS[name](setting, model, processor, lambda: times.append(now()))
    return losses, np.diff(times).tolist()


def peak_bytes(device: torch.device) -> int:
    if device.type != "cpu":
        return int(torch.accelerator.max_memory_allocated())
    status = Path("/proc/self/status")  # not ru_maxrss there: a child's begins at what its parent had at its start
    if status.exists() and (found := [x for x in status.read_text().splitlines() if x.startswith("VmHWM:")]):
        return int(found[0].split()[1]) * 1024
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def alone(setting: Setting, name: str) -> dict[str, float]:
    """In a child: peak memory after loading, and after a fit; floating-point operations of a step."""
    model, processor = setting.load()
    loaded, counts = peak_bytes(setting.device), list[int]()
    FITS[name](setting, model, processor, lambda: None)
    peak = peak_bytes(setting.device)
    with FlopCounterMode(display=False) as counter:
        FITS[name](setting, model, processor, lambda: counts.append(counter.get_total_flops()))
    return {"loaded": loaded, "peak": peak, "flop": counts[2] - counts[1]}


def in_child(setting: Setting, name: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--size", setting.size, "--device", str(setting.device), "--only", name]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed; its message is above.")
    return json.loads(done.stdout.splitlines()[-1])


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{(names or [platform.processor()])[0]}, {torch.get_num_threads()} threads"


def compare(setting: Setting, rounds: int) -> tuple[str, dict[str, Any]]:
    """The table, and the figures that it is made of."""
    loaded = {name: setting.load() for name in FITS}
    runs: dict[str, list[Any]] = {name: [] for name in FITS}
    for _ in range(rounds):
        for name in FITS:
            runs[name].append(timed_fit(name, setting, *loaded[name]))
    del loaded
    memory = {name: in_child(setting, name) for name in FITS}
    step = {k: median(s for _, seconds in v for s in seconds[1:]) for k, v in runs.items()}
    vectors = 2 * len(setting.harmful) + len(setting.benign)
    rate = {k: vectors / median(seconds[0] for _, seconds in v) for k, v in runs.items()}
    fit = {k: median(sum(seconds) for _, seconds in v) for k, v in runs.items()}
    losses = {k: v[0][0] for k, v in runs.items()}
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    rows = [
        ("seconds per optimizer step", step, "{:.3f}", True),
        ("peak memory, MiB", {k: v["peak"] / 2**20 for k, v in memory.items()}, "{:.0f}", True),
        ("of it after loading, MiB", {k: (v["peak"] - v["loaded"]) / 2**20 for k, v in memory.items()}, "{:.0f}", True),
        ("extraction, vectors per second", rate, "{:.2f}", False),
        (f"whole fit, s: {setting.n} examples, {len(losses['rrs'])} steps", fit, "{:.1f}", True),
        ("10⁹ floating-point operations per step", {k: v["flop"] / 1e9 for k, v in memory.items()}, "{:.1f}", True),
    ]
    top = next((v for k, v in PEAK.items() if k in machine(setting.device)), math.nan)
    used = {k: memory[k]["flop"] / step[k] / top / 1e10 for k in step}
    rows += [(f"of the peak of {top:.0f} TFLOP/s (MFU), %", used, "{:.0f}", False)] if top == top else []
    lines = [
        f"{setting.size}, batch {setting.config.batch_size} × {setting.config.accumulate}, medians of {rounds} rounds; "
        f"{machine(setting.device)}; torch {torch.__version__}; {date.today()}\n",
        "| | published recipe | RRS | ratio |\n| --- | --- | --- | --- |",
    ]
    ratios = {}
    for what, values, form, less in rows:
        theirs, ours = values["published"], values["rrs"]
        ratios[what] = theirs / max(ours, 1e-9) if less else ours / theirs
        lines.append(f"| {what} | {form.format(theirs)} | {form.format(ours)} | {ratios[what]:.2f}× |")
    lines.append(
        f"\nLargest difference of losses: {difference:.1e} ({losses['rrs'][0]:.4f} → {losses['rrs'][-1]:.4f})."
    )
    figures = {"size": setting.size, "machine": machine(setting.device), "date": str(date.today()), "ratios": ratios}
    return "\n".join(lines), {**figures, "difference": difference, "runs": runs, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "demo"], default="tiny")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", type=torch.device, default=best_device())
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument(
        "--count", action="store_true", help="operations and bytes of the 7B models, without running them"
    )
    parser.add_argument("--only", choices=list(FITS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.count and args.json:
        parser.error("--count only prints its figures; leave out --json")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    if args.count:
        from count import main as count

        return count()
    if args.size.endswith("7b") and args.device.type == "cpu":
        parser.error(f"--size {args.size} needs a GPU; --count does not.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        n, epochs = (16, 1) if args.only else (24, 2) if args.size == "demo" else (40, 4)
        setting = Setting(args.size, args.device, Path(scratch), n, epochs)
        if args.only:
            return print(json.dumps(alone(setting, args.only)))
        table, figures = compare(setting, args.rounds)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
