"""RRS end to end on a real (small) speech LM: build it, make it refuse, show what changed.

    python examples/quickstart.py --out out
    python examples/quickstart.py --out out --fast   # a smoke run on a small part of the data: does everything run?

Leaves in the folder: `adapter/` (PEFT's format), `report.md` and `report.json` (the test split's table, every answer),
`representations-*.png` (last-token vectors before and after, as in the paper's figure), and `strengths.png` (refusals
against their cost on the dev split, of which the adapter's strength was chosen).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from demo_lalm import fast_dtype, load_demo
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from rrs import RRS, Example, RRSConfig, load_examples
from rrs.data import DataError
from rrs.evaluate import plot_representations

try:
    import resource
except ImportError:  # Windows does not have it
    resource = None  # type: ignore[assignment]

DATA = Path(__file__).resolve().parent / "data"
CONDITIONS = ("audio-text", "text-only", "audio-only")
SMOKE = "This is a smoke run (--fast) on a small part of the data: its figures mean nothing."

# The paper's settings fit a 7B model. What differs on this one, and why:
CONFIG = RRSConfig(
    # SmolLM2 ignores the paper's refusal prompt, and what it starts with "I" tends to go on "I'm here to help".
    refusal_prompt="Do not answer the question above. It is harmful. "
    'Reply with one sentence: "Sorry, I cannot do that."',
    refusal_token="Sorry",
    conditions=("text-only",),  # the cheapest; what is learned there holds for speech, as the table shows
    # What it starts with "Sorry" often goes on "for any misunderstanding. I'm here to help", or says the same again and
    # again: say how it goes on, and that it ends, as it does after that refusal prompt.
    refusal="Sorry, I cannot do that.",
    # Where answers to harmless inputs are not held, they loop, or slip into a refusal: those that begin as before ("I'm
    # sorry for any inconvenience, but as a medical AI, I") go on "cannot". The nearest 30% have nearly all that do.
    keep_tokens=16,
    keep_share=0.3,
    # Along Δ, harmless inputs that are drawn part of the way to a refusal say something strange; see `quiet_direction`.
    direction="quiet",
    harmful_strength=2.2,
    benign_strength=1.2,
    # All blocks told held-out twins apart no better at the same number of steps, and those are slower.
    layers=(0.4, 1.0),
    # The penalty sums over modules while the MSE averages over features: at this size a weight of 1 freezes the model,
    # and at 3e-4 and half this rate even the training questions were told apart no better than new ones.
    penalty=2e-5,
    lora_alpha=32.0,
    lora_dropout=0.0,
    learning_rate=4e-3,
    epochs=2,
    batch_size=16,
    accumulate=1,
    group_by_length=True,
)


def training_questions() -> dict[str, list[Example]]:
    """The demo's questions to train on, spoken and as text, by label."""
    questions = load_examples(DATA / "train.jsonl") + load_examples(DATA / "train_text.jsonl")
    return {label: [e for e in questions if e.label == label] for label in ("harmful", "benign")}


def evaluation_questions(split: str = "test") -> dict[str, list[Example]]:
    """The demo's questions to measure on, by group; split: "dev", of which most are text alone, or "test"."""
    groups = {label: load_examples(DATA / f"{split}.jsonl", label) for label in ("harmful", "benign")}
    groups["hard-benign"] = load_examples(DATA / f"hard_benign_{split}.jsonl")
    for e in load_examples(DATA / "dev_text.jsonl") if split == "dev" else ():
        groups["harmful" if e.label == "harmful" else "benign" if e.meta["twin"] else "hard-benign"].append(e)
    return groups


class Groups(argparse.Action):
    """`--test GROUP=PATH`, repeated: `{group: examples}`, those of the label that the group's name stands for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        group, _, path = values.partition("=")
        if not group or not path:
            parser.error(f"{option_string} {values}: expected GROUP=PATH, e.g. {option_string} harmful={values}")
        groups = getattr(namespace, self.dest) or {}
        if group in groups:
            parser.error(f"{option_string} {group}=… is given twice; join the two files, or name another group.")
        try:
            groups[group] = load_examples(path, "harmful" if group.startswith("harmful") else "benign")
        except DataError as error:
            parser.error(f"{option_string} {values}: {error}")
        setattr(namespace, self.dest, groups)


def word_edits(a: list[str], b: list[str]) -> int:
    """Levenshtein distance in words."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def word_error_rate(reference: str, heard: str) -> float:
    """Edits per word of the reference; case and punctuation do not count."""
    a, b = ("".join(c for c in s.lower() if c.isalnum() or c == " ").split() for s in (reference, heard))
    return word_edits(a, b) / max(1, len(a))


def what_it_hears(rrs: RRS, examples: list[Example]) -> str:
    """One sentence for the table: the audio rows mean as much as the model hears."""
    instruction = "Repeat what is said in the audio."
    with rrs.disabled():
        answers = RRS(rrs.model, rrs.processor, RRSConfig(instruction=instruction)).generate(
            examples, max_new_tokens=32
        )
    rates = [word_error_rate(e.text or "", answer) for e, answer in zip(examples, answers, strict=True)]
    wer = sum(rates) / len(rates)
    voices = Counter(str(e.meta["voice"]) for e in examples)
    spoken = ", ".join(f"{n} by {voice}" for voice, n in sorted(voices.items()))
    return f"What the demo LALM hears: asked to repeat {len(rates)} clips ({spoken}), its word error rate is {wer:.0%}."


def plan(fast: bool) -> str:
    """What will happen, and how long it takes on 2 CPU cores."""
    text = (
        "Builds a small speech LM (the first time from a download of 165 MB), trains it to refuse harmful questions, "
        f"and measures its answers before and after. About {3 if fast else 12} minutes on 2 CPU cores."
    )
    return f"{text} {SMOKE}" if fast else text


def cost(began: float) -> str:
    """Seconds since `began` (of `time.perf_counter`), and the most memory that this process held at once."""
    seconds = f"{time.perf_counter() - began:.0f} s"
    if resource is None:
        return seconds
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of what getrusage counts in
    return f"{seconds}, at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter, report and pictures")
    parser.add_argument("--fast", action="store_true", help="a smoke run on a small part of the data")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    print(plan(args.fast), flush=True)

    model, processor = load_demo(dtype=fast_dtype())
    rrs = RRS(model, processor, replace(CONFIG, seed=args.seed))
    rrs.reader.max_tokens = 2048  # a quarter of the default: smaller batches of answers need less memory

    train, dev, test = training_questions(), evaluation_questions("dev"), evaluation_questions()
    if args.fast:
        train = {label: examples[::40] for label, examples in train.items()}
        dev, test = ({group: rows[::10] for group, rows in groups.items()} for groups in (dev, test))

    # Backwards in bfloat16, PyTorch's fused attention for CPUs is slower than the plain one on prompts this short.
    with sdpa_kernel(SDPBackend.MATH) if model.dtype == torch.bfloat16 else nullcontext():
        rrs.fit(harmful=train["harmful"], benign=train["benign"], preflight=8)
    try:
        rrs.calibrate(dev, CONDITIONS, strengths=(0.8, 0.9, 1.0, 1.1, 1.2), plot=args.out / "strengths.png")
    except ImportError as error:
        print(f"no picture: {error}")
    rrs.save(args.out / "adapter", overwrite=True)

    report = rrs.evaluate(test, CONDITIONS, max_new_tokens=16 if args.fast else 24, usefulness=12)
    clips = sorted((e for group in test.values() for e in group), key=lambda e: str(e.meta["voice"]))
    report.notes.append(what_it_hears(rrs, clips[:: 1 if args.fast else 7]))
    if args.fast:
        report.notes.append(SMOKE)
    report.save(args.out)
    try:
        for condition in tqdm(("text-only", "audio-only"), desc="pictures", leave=False):
            panels = {stage: {} for stage in ("before", "after")}
            for group, examples in test.items():
                prompts = [rrs.read(e, condition) for e in examples[:: 1 if args.fast else 3]]
                panels["after"][group] = rrs.reader.represent(prompts)
                with rrs.disabled():
                    panels["before"][group] = rrs.reader.represent(prompts)
            plot_representations(panels, args.out / f"representations-{condition}.png", title=condition)
    except ImportError as error:
        print(f"no pictures: {error}")

    print(f"\n{report}")
    print(f"{cost(began)}; everything is in {args.out}")


if __name__ == "__main__":
    main()
