"""RRS against the published recipe built from its usual parts: same model, data, order, batch, dtype and device.

    pip install "rrs[bench]"
    python examples/benchmark.py --size tiny                       # a random model: does it run, what is overhead?
    python examples/benchmark.py --size demo --json bench.json     # the demo LALM on its spoken questions
    python examples/benchmark.py --size 7b                         # CUDA: random weights, Qwen2-Audio-7B's dimensions
    python examples/benchmark.py --size omni-7b                    # CUDA: the dimensions of Qwen2.5-Omni-7B's thinker
    python examples/benchmark.py --growth --plot growth.png        # RRS alone: examples, clip length, batch

The published recipe, as one would write it today: vectors are extracted one sample at a time and kept in files; PEFT's
LoRA and transformers' Trainer with a `compute_loss` that runs the whole model (processor and audio tower for every
prompt of every step, hidden states of all layers, all logits), takes targets from the files and adds ‖(α/r)·B·A‖² of
dense products. Where there was a choice, it has the faster one: `.npy` files, left-padded batches, Trainer's defaults.

Both start from the same LoRA and see the same batches with the same instructions. Dropout is off, since its masks could
not be the same, and the learning rate is high enough for the losses to move; the rest is the paper's. Steps are taken
in turn, one of each, in one run, so that a machine that slows down slows both; figures are medians. Peak memory is
that of a process of its own for each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import soundfile
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperFeatureExtractor,
)
from transformers.trainer_callback import PrinterCallback

from rrs import RRS, Example, RRSConfig, _draw, _epoch, load_examples  # the order of training, for the other side too
from rrs.hooks import LoRA, linear_paths, locate, seeded

DATA = Path(__file__).resolve().parent / "data"
PEAK = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16 TFLOP/s, as the vendor states them
Turn = Callable[[], None]

# -- models and data ---------------------------------------------------------------------------------------------------

WHISPER = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
# Audio tower, language model, mel bins, seconds of clips and of the tower's window.
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
        "mel": 128, "seconds": (3.0, 8.0), "window": 30,
    },
}  # fmt: skip

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_lalm(size: str, window: float, device: torch.device) -> tuple[Any, Any]:
    """A Qwen2-Audio of these dimensions with random weights, and a processor that knows the prompts' words."""
    sizes, config = SIZES[size], RRSConfig()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([*config.prompts, config.instruction, config.refusal_prompt, "user assistant"], trainer)
    bpe.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|im_end|>")
    ids = {t: tokenizer.convert_tokens_to_ids(t) for t in SPECIAL}
    lalm = Qwen2AudioConfig(
        audio_config={**sizes["audio"], "num_mel_bins": sizes["mel"], "max_source_positions": round(50 * window)},
        text_config={"model_type": "qwen2", **sizes["text"], "bos_token_id": None, "eos_token_id": ids["<|im_end|>"],
                     "pad_token_id": ids["<|pad|>"], "tie_word_embeddings": False},
        audio_token_index=ids["<|AUDIO|>"],
    )  # fmt: skip
    torch.manual_seed(0)
    with device:
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = Qwen2AudioForConditionalGeneration._from_config(lalm, dtype=dtype)
    extractor = WhisperFeatureExtractor(feature_size=sizes["mel"], chunk_length=math.ceil(window), sampling_rate=16000)
    return model.eval(), Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE)


def tones(folder: Path, n: int, seconds: tuple[float, float]) -> list[Example]:
    """Half harmful, half benign by name; clips are files, all different, of all lengths between the two."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for i in range(n):
        length = seconds[0] + (seconds[1] - seconds[0]) * ((7 * i) % n) / max(1, n - 1)
        wave = 0.3 * np.sin(np.arange(round(16000 * length)) * (0.05 + i / 10000))
        soundfile.write(path := folder / f"{i}.flac", wave, 16000)
        label = "harmful" if i % 2 else "benign"
        out.append(Example(id=f"{label}-{i}", text=f"Question {i}?", audio=str(path), label=label))
    return out


@dataclass
class Setting:
    """What both sides get."""

    size: str
    device: torch.device
    folder: Path
    """For clips and vectors."""
    n: int
    """Examples; eight make a step."""
    steps: int
    """Rounded up to whole epochs."""

    def __post_init__(self) -> None:
        if self.size == "demo":
            rows = load_examples(DATA / "train.jsonl")
            chosen = [[e for e in rows if e.label == label][: self.n // 2] for label in ("harmful", "benign")]
        else:
            rows = tones(self.folder / "clips", self.n, SIZES[self.size]["seconds"])
            chosen = [[e for e in rows if e.label == label] for label in ("harmful", "benign")]
        self.harmful, self.benign = chosen
        # "I" is a token of every tokenizer here; whether it leads to refusals does not matter for time.
        self.config = RRSConfig(lora_dropout=0.0, learning_rate=1e-3, penalty=1e-2, epochs=-(-8 * self.steps // self.n))
        self.steps = self.config.epochs * self.n // 8

    def short(self, n: int, steps: int) -> Setting:
        """The same with less."""
        return replace(self, n=n, steps=steps)

    def load(self) -> tuple[Any, Any]:
        if self.size == "demo":
            from demo_lalm import load_demo

            model, processor = load_demo()
            return model.to(self.device), processor
        return random_lalm(self.size, SIZES[self.size]["window"], self.device)


# -- ours --------------------------------------------------------------------------------------------------------------


def our_fit(setting: Setting, model: Any, processor: Any, turn: Turn) -> list[float]:
    rrs = RRS(model, processor, setting.config, verbose=False)
    rrs.fit(setting.harmful, setting.benign, preflight=0, callbacks=[lambda _: turn()])
    rrs.disable()
    return [row["loss"] for row in rrs.history]


# -- the published recipe ----------------------------------------------------------------------------------------------


def inputs_of(processor: Any, examples: Sequence[Example], texts: Sequence[str]) -> Any:
    """Left-padded model inputs from files."""
    chats = [[{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": t}]}] for t in texts]
    prompts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    waves = [soundfile.read(e.audio, dtype="float32")[0] for e in examples]
    processor.tokenizer.padding_side = "left"
    return processor(text=prompts, audio=waves, sampling_rate=16000, padding=True, return_tensors="pt")


@torch.no_grad()
def their_extraction(setting: Setting, model: Any, processor: Any) -> dict[str, Path]:
    """R_b, R_h, R_h+ sample by sample; a file of the target for each example."""
    dtype = next(model.parameters()).dtype

    def extract(examples: Sequence[Example], text: str) -> Tensor:
        rows = []
        for e in examples:
            inputs = inputs_of(processor, [e], [text]).to(setting.device)
            inputs["input_features"] = inputs["input_features"].to(dtype)
            out = model(**inputs, output_hidden_states=True, use_cache=False)
            rows.append(out.hidden_states[-1][0, -1].float().cpu())
        return torch.stack(rows)

    c = setting.config
    benign, harmful = extract(setting.benign, c.instruction), extract(setting.harmful, c.instruction)
    refused = extract(setting.harmful, f"{c.instruction} {c.refusal_prompt}")
    delta = refused.mean(0) - benign.mean(0)
    token = processor.tokenizer(c.refusal_token, add_special_tokens=False)["input_ids"][0]
    move = delta * (model.lm_head.weight[token].float().cpu() * delta > 0)
    files = {}
    (setting.folder / "targets").mkdir(parents=True, exist_ok=True)
    for e, row in zip([*setting.harmful, *setting.benign], [*(harmful + move), *(benign - move)], strict=True):
        files[e.id] = setting.folder / "targets" / f"{e.id}.npy"
        np.save(files[e.id], row.numpy())
    return files


class Published(Trainer):
    """The recipe's loss, on batches in the order of the data set; `losses` has one for each batch."""

    penalty = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # Trainer then divides by the number of accumulated batches
        self.losses: list[Tensor] = []
        self.lora = [m for m in self.model.modules() if hasattr(m, "lora_A")]

    def _get_train_sampler(self, *_args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_kwargs: Any) -> Any:
        targets = inputs.pop("targets")
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        loss = F.mse_loss(out.hidden_states[-1][:, -1].float(), targets)
        for m in self.lora:
            update = m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
            loss = loss + self.penalty * (update**2).sum()
        self.losses.append(loss.detach())
        return (loss, out) if return_outputs else loss


class AfterStep(TrainerCallback):
    def __init__(self, turn: Turn) -> None:
        self.turn = turn

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.turn()


def their_fit(setting: Setting, model: Any, processor: Any, turn: Turn) -> list[float]:
    import peft

    c, files = setting.config, their_extraction(setting, model, processor)
    paths = linear_paths(locate(model), c.target_modules)
    start = LoRA(model, paths, r=c.lora_r, alpha=c.lora_alpha, seed=c.seed)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=c.lora_r, lora_alpha=c.lora_alpha, lora_dropout=0.0, target_modules=paths)
    )
    wrapped = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for path, a in zip(paths, start.A, strict=True):
            wrapped[path].lora_A["default"].weight.copy_(a)

    order, step = [], 0  # (example, instruction) of every prompt of the run
    examples = [*setting.harmful, *setting.benign]
    for epoch in range(c.epochs):
        plan = _epoch({"audio-text": examples}, c.batch_size, seeded(c.seed, "order", epoch))
        for at in range(0, len(plan), c.accumulate):
            order += [(examples[i], t) for _, b in _draw(c, plan[at : at + c.accumulate], step) for i, t in b]
            step += 1

    def collate(rows: Sequence[tuple[Example, str]]) -> dict[str, Tensor]:
        chosen = [e for e, _ in rows]
        targets = torch.from_numpy(np.stack([np.load(files[e.id]) for e in chosen]))
        return {**inputs_of(processor, chosen, [t for _, t in rows]), "targets": targets}

    on_cuda = setting.device.type == "cuda"
    settings = TrainingArguments(
        output_dir=str(setting.folder / "trainer"), max_steps=len(order) // c.batch_size // c.accumulate,
        per_device_train_batch_size=c.batch_size, gradient_accumulation_steps=c.accumulate, seed=c.seed,
        learning_rate=c.learning_rate, lr_scheduler_type="linear", adam_beta1=c.betas[0], adam_beta2=c.betas[1],
        weight_decay=c.weight_decay, max_grad_norm=c.max_grad_norm, bf16=on_cuda, use_cpu=not on_cuda,
        remove_unused_columns=False, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Published(model, settings, train_dataset=order, data_collator=collate, callbacks=[AfterStep(turn)])
    trainer.penalty = c.penalty
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = torch.stack(trainer.losses).view(-1, c.accumulate).mean(1)
    model.unload()  # the model is plain again
    return [float(x) for x in losses]


FITS = {"published": their_fit, "rrs": our_fit}

# -- measuring ---------------------------------------------------------------------------------------------------------


def wait(device: torch.device) -> float:
    """The time, once all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(device: torch.device, *runs: Callable[[Turn], Any]) -> tuple[list[Any], list[list[float]]]:
    """Runs functions side by side, but one at a time: each calls its `turn` when the next may go on.

    Returns:
        Their results, and the seconds of each one's turns.
    """
    batons, over = [threading.Event() for _ in runs], [False] * len(runs)
    seconds: list[list[float]] = [[] for _ in runs]

    def start(k: int) -> Any:
        batons[k].wait()
        began = [wait(device)]

        def give() -> None:
            seconds[k].append(wait(device) - began[0])
            batons[k].clear()
            others = [(k + i) % len(runs) for i in range(1, len(runs) + 1)]
            batons[next((o for o in others if not over[o]), k)].set()

        def turn() -> None:
            give()
            batons[k].wait()
            began[0] = wait(device)

        try:
            return runs[k](turn)
        finally:
            over[k] = True
            give()

    with ThreadPoolExecutor(len(runs)) as pool:
        futures = [pool.submit(start, k) for k in range(len(runs))]
        batons[0].set()
        return [f.result() for f in futures], seconds


def compare_extraction(setting: Setting, loaded: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Vectors per second of both, in turn, each time from nothing: ours checks its replay of the model as well."""

    def ours(part: Setting, model: Any, processor: Any) -> None:
        rrs = RRS(model, processor, part.config, verbose=False)
        rrs.make_targets(rrs.extract(part.harmful, part.benign))

    part = setting.short(16, 1)
    rates: dict[str, list[float]] = {name: [] for name in FITS}
    for _ in tqdm(range(rounds), desc="extraction", leave=False):
        for name, extract in (("published", their_extraction), ("rrs", ours)):
            began = wait(part.device)
            extract(part, *loaded[name])
            rates[name].append((2 * len(part.harmful) + len(part.benign)) / (wait(part.device) - began))
    return rates


def compare_fits(setting: Setting, loaded: Mapping[str, Any]) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Losses, and seconds per turn, of both whole fits, step by step in turn."""
    with tqdm(total=2 * setting.steps, desc="steps", leave=False) as bar:

        def run(name: str, turn: Turn) -> list[float]:
            def after() -> None:
                bar.update()
                turn()

            return FITS[name](setting, *loaded[name], after)

        losses, seconds = in_turn(setting.device, *(partial(run, name) for name in FITS))
    return dict(zip(FITS, losses, strict=True)), dict(zip(FITS, seconds, strict=True))


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:  # not ru_maxrss there: a child's begins at what its parent had when it was started
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(*arguments: str) -> dict[str, Any]:
    """This script in a process of its own; the last line that it prints is JSON."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed; its message is above.")
    return json.loads(done.stdout.splitlines()[-1])


def alone(setting: Setting, name: str) -> dict[str, float]:
    """In a child: peak memory after loading, and after a short fit; floating-point operations of a step."""
    model, processor = setting.load()
    loaded = peak_bytes(setting.device)
    FITS[name](setting.short(16, 2), model, processor, lambda: None)
    peak, counts = peak_bytes(setting.device), []
    with FlopCounterMode(display=False) as counter:
        FITS[name](setting.short(8, 2), model, processor, lambda: counts.append(counter.get_total_flops()))
    return {"loaded": loaded, "peak": peak, "flop": counts[1] - counts[0]}


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def compare(setting: Setting, rounds: int) -> tuple[str, dict[str, Any]]:
    """The table, and the figures that it is made of."""
    device = setting.device
    loaded = {name: setting.load() for name in FITS}
    rates = compare_extraction(setting, loaded, rounds)
    losses, seconds = compare_fits(setting, loaded)
    del loaded
    memory = {
        name: child("--size", setting.size, "--device", str(device), "--only", name)
        for name in tqdm(FITS, desc="memory", leave=False)
    }
    work = {k: v["flop"] for k, v in memory.items()}

    step = {k: median(v[1 : setting.steps]) for k, v in seconds.items()}  # the first includes extraction
    fit = {k: sum(v) for k, v in seconds.items()}
    rate = {k: median(v) for k, v in rates.items()}
    peak = {k: v["peak"] for k, v in memory.items()}
    grown = {k: v["peak"] - v["loaded"] for k, v in memory.items()}
    difference = max(abs(a - b) for a, b in zip(*losses.values(), strict=True))
    rows = [
        (f"seconds per optimizer step, median of {setting.steps - 1}", step, "{:.3f}", True),
        ("peak memory, MiB", {k: v / 2**20 for k, v in peak.items()}, "{:.0f}", True),
        ("of it after loading the model, MiB", {k: v / 2**20 for k, v in grown.items()}, "{:.0f}", True),
        (f"extraction, vectors per second, median of {rounds}", rate, "{:.2f}", False),
        (f"whole fit, s: {setting.n} examples, {setting.steps} steps", fit, "{:.1f}", True),
        ("10⁹ floating-point operations per step", {k: v / 1e9 for k, v in work.items()}, "{:.1f}", True),
    ]
    if device.type == "cuda":
        speed = {k: work[k] / step[k] / 1e12 for k in step}
        rows.append(("TFLOP/s", speed, "{:.0f}", False))
        if top := next((v for k, v in PEAK.items() if k in torch.cuda.get_device_name()), None):
            used = {k: 100 * v / top for k, v in speed.items()}
            rows.append((f"of the peak of {top:.0f} TFLOP/s (MFU), %", used, "{:.0f}", False))
    lines = [
        f"{setting.size}, {'bfloat16' if device.type == 'cuda' else 'float32'}, batch "
        f"{setting.config.batch_size} × {setting.config.accumulate}; {machine(device)}; torch {torch.__version__}; "
        f"{date.today()}",
        "",
        "| | published recipe | RRS | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for what, values, form, less in rows:
        theirs, ours = values["published"], values["rrs"]
        top, bottom = (theirs, ours) if less else (ours, theirs)
        ratio = f"{top / bottom:.2f}×" if bottom else "–"
        lines.append(f"| {what} | {form.format(theirs)} | {form.format(ours)} | {ratio} |")
    first, last = (", ".join(f"{losses[k][i]:.4f}" for k in FITS) for i in (0, -1))
    lines += ["", f"Largest difference of losses over {setting.steps} steps: {difference:.1e} ({first} → {last})."]
    figures = {
        "step_speedup": step["published"] / step["rrs"],
        "memory_ratio": peak["rrs"] / peak["published"],
        "extraction_speedup": rate["rrs"] / rate["published"],
        "fit_speedup": fit["published"] / fit["rrs"],
        "max_loss_difference": difference,
        "size": setting.size, "steps": setting.steps, "machine": machine(device), "date": str(date.today()),
        "seconds_per_step": step, "fit_seconds": fit, "vectors_per_second": rate,
        "memory": memory, "losses": losses,
    }  # fmt: skip
    return "\n".join(lines), figures


# -- growth ------------------------------------------------------------------------------------------------------------

GROWTH = {"examples": [100, 1000, 10_000], "seconds": [1.0, 3.0, 10.0, 30.0], "batch": [1, 4, 16, 64]}
BASE = {"examples": 64, "seconds": 1.0, "batch": 4}


def growth_point(
    size: str, device: torch.device, folder: Path, at: Mapping[str, Any], max_cached: int
) -> dict[str, Any]:
    """In a child: RRS with so many examples of this length in this batch; at most 20 steps are timed."""
    seconds, batch = at["seconds"], at["batch"]
    model, processor = random_lalm(size, max(2.0, seconds), device)
    rows = tones(folder, at["examples"], (seconds, seconds))
    epochs = max(1, math.ceil(21 * batch / at["examples"]))
    config = RRSConfig(lora_dropout=0.0, batch_size=batch, accumulate=1, epochs=epochs)
    rrs = RRS(model, processor, config, verbose=False, max_cached=max_cached)
    loaded, times = peak_bytes(device), []

    class Enough(Exception):  # noqa: N818
        pass

    def note(_step: Any) -> None:
        times.append(wait(device))
        if len(times) == 21:
            raise Enough

    began = wait(device)
    examples = {label: [e for e in rows if e.label == label] for label in ("harmful", "benign")}
    with suppress(Enough):
        rrs.fit(**examples, preflight=0, callbacks=[note])
    return {
        **at,
        "until_first_step": times[0] - began,
        "step": median(b - a for a, b in pairwise(times)),
        "grown_mib": (peak_bytes(device) - loaded) / 2**20,
    }


def growth(size: str, device: torch.device, limit: int, max_cached: int) -> tuple[str, list[dict[str, Any]]]:
    """The table, and its rows; one child a point."""
    points = [(what, {**BASE, what: x}) for what, xs in GROWTH.items() for x in xs if x <= limit or what != "examples"]
    rows = []
    for what, at in tqdm(points, desc="growth"):
        given = {"--size": size, "--device": device, "--max-cached": max_cached, "--point": json.dumps(at)}
        found = child(*(str(word) for pair in given.items() for word in pair))
        rows.append({"varies": what, **found})
    lines = [
        f"{size}; {machine(device)}; torch {torch.__version__}; {date.today()}; otherwise {BASE}",
        "",
        "| | | until the first step, s | step, s | memory beyond the model, MiB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for what in GROWTH:
        own = [row for row in rows if row["varies"] == what]
        for row in own:
            figures = f"{row['until_first_step']:.2f} | {row['step']:.4f} | {row['grown_mib']:.0f}"
            lines.append(f"| {what} | {row[what]:g} | {figures} |")
        if len(own) < 2:  # nothing to draw a slope through
            continue
        (a, b), cells = (own[-2], own[-1]), []
        for key in ("until_first_step", "step", "grown_mib"):  # the exponent e of time ~ x^e at the upper end
            slope = math.log(max(b[key], 1e-9) / max(a[key], 1e-9)) / math.log(b[what] / a[what])
            cells.append(f"~ x^{slope:.2f}")
        lines.append(f"| {what} | last two | {' | '.join(cells)} |")
    return "\n".join(lines), rows


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SystemExit('--plot needs matplotlib: pip install "rrs[plot]".') from error
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for ax, what in zip(figure.subplots(1, len(GROWTH)), GROWTH, strict=True):
        own = [row for row in rows if row["varies"] == what]
        for key, label in (("until_first_step", "until the first step, s"), ("step", "step, s"), ("grown_mib", "MiB")):
            ax.plot([r[what] for r in own], [r[key] for r in own], "o-", label=label)
        ax.set(xscale="log", yscale="log", xlabel="seconds of audio" if what == "seconds" else what)
        ax.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def profile(setting: Setting) -> str:
    """Where RRS's steps spend their time, after the first."""
    model, processor = setting.load()
    cuda = setting.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * cuda
    recorder, steps = torch.profiler.profile(activities=kinds), iter(range(10**6))

    def note() -> None:
        if next(steps) == 0:
            recorder.start()

    our_fit(setting.short(16, 4), model, processor, note)
    recorder.stop()
    return recorder.key_averages().table(sort_by=f"self_{'device' if cuda else 'cpu'}_time_total", row_limit=16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["tiny", "demo", "7b", "omni-7b"], default="tiny")
    parser.add_argument("--steps", type=int, help="optimizer steps of each side; default 50, demo 15")
    parser.add_argument("--rounds", type=int, default=5, help="of extraction")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--profile", action="store_true", help="where RRS's time goes, instead")
    parser.add_argument("--growth", action="store_true", help="RRS against examples, clip length and batch, instead")
    parser.add_argument("--max-examples", type=int, default=10_000, help="of --growth")
    parser.add_argument("--max-cached", type=int, default=2**32, help="of --growth: bytes of clips kept in memory")
    parser.add_argument("--plot", type=Path, help="PNG of --growth")
    parser.add_argument("--only", choices=list(FITS), help=argparse.SUPPRESS)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.growth and args.size == "demo":
        parser.error("--growth makes clips of any length: use --size tiny, 7b or omni-7b.")
    if args.size.endswith("7b") and device.type != "cuda":
        parser.error(f"--size {args.size} needs CUDA.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if args.point:
            print(json.dumps(growth_point(args.size, device, folder, args.point, args.max_cached)))
            return
        if args.growth:
            table, rows = growth(args.size, device, args.max_examples, args.max_cached)
            if args.plot:
                plot(rows, args.plot)
            figures: Any = rows
        else:
            demo = args.size == "demo"
            setting = Setting(args.size, device, folder, 24 if demo else 40, args.steps or (15 if demo else 50))
            if args.only:
                print(json.dumps(alone(setting, args.only)))
                return
            if args.profile:
                print(profile(setting))
                return
            table, figures = compare(setting, args.rounds)
    print(table)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
