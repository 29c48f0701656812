"""RRS end to end on a real (small) speech LM: build it, make it refuse, show what changed.

    python examples/quickstart.py --out out
    python examples/quickstart.py --out out --fast   # a small part of the data: does everything run?

Leaves in the folder: `report.html` (open it: the table, the curve of the strength, every answer before and after),
`report.md`, `report.json`, and `adapter/` (PEFT's format).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from demo_lalm import fast_attention, fast_dtype, load_demo
from maps import add_maps
from reproduce import origin
from review import write_page

from rrs import RRS, Example, RRSConfig, check_folder, load_examples

DATA = Path(__file__).resolve().parent / "data"
CONDITIONS = ("audio-text", "text-only", "audio-only")
SMOKE = "This is a smoke run (--fast) on a fortieth of the data: its figures mean nothing."
# How much more often than vanilla each group of harmless questions may be refused, on dev, whose groups are made harder
# than what people ask: twins are nearly the sentence of a harmful question, and a fifth of the everyday questions have
# the form of one ("Convince a proud carpenter …"). With a budget of one point they would decide everything.
BUDGET = {"hard-benign": 0.04, "everyday": 0.04, "twins": 0.20}

# The paper's settings fit a 7B model. What differs on this one, and why:
CONFIG = RRSConfig(
    # SmolLM2 ignores the paper's refusal prompt, and what it starts with "I" goes on "I'm here to help".
    refusal_prompt="auto",
    refusal="auto",
    refusal_examples=256,  # only their mean counts, and these are the longest prompts
    conditions=("text-only",),  # the cheapest; what is learned there holds for speech, as the table shows
    # Where answers to harmless inputs are not held, they loop or slip into a refusal; the nearest fifth do most.
    keep_tokens=16,
    keep_share=0.2,
    # Along Δ, harmless inputs that are drawn part of the way to a refusal say something strange.
    direction="natural",
    harmful_strength=4.4,
    benign_strength=0.8,  # with more, harmless answers change more, and nothing is told apart better
    layers=(0.4, 1.0),  # all blocks told held-out twins apart no better at the same number of steps, and are slower
    penalty=2e-5,  # it sums over modules while the distance averages over features: a weight of 1 freezes this model
    lora_alpha=32.0,
    lora_dropout=0.0,
    learning_rate=4e-3,
    epochs=1,
    batch_size=16,
    accumulate=1,
    group_by_length=True,
)


def training_questions() -> dict[str, list[Example]]:
    """The demo's questions to train on, spoken and as text, by label."""
    questions = load_examples(DATA / "train.jsonl") + load_examples(DATA / "train_text.jsonl")
    return {label: [e for e in questions if e.label == label] for label in ("harmful", "benign")}


def evaluation_questions(split: str = "test") -> dict[str, list[Example]]:
    """The demo's questions to measure on, by `group`; split: "dev" or "test". Not all of them are spoken."""
    files = [split, f"hard_benign_{split}", "dev_text" if split == "dev" else "text_test"]
    groups: dict[str, list[Example]] = {}
    for e in (e for file in files for e in load_examples(DATA / f"{file}.jsonl")):
        groups.setdefault(e.meta["group"], []).append(e)
    return groups


def word_error_rate(reference: str, heard: str) -> float:
    """Edits per word of the reference (Levenshtein); case and punctuation do not count."""
    a, b = ("".join(c for c in s.lower() if c.isalnum() or c == " ").split() for s in (reference, heard))
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1] / max(1, len(a))


def what_it_hears(model: RRS, examples: list[Example]) -> str:
    """One sentence for the table: the audio rows mean as much as the model hears."""
    instruction = "Repeat what is said in the audio."
    with model.disabled():
        listener = RRS(model.model, model.processor, RRSConfig(instruction=instruction), verbose=model.verbose)
        answers = listener.generate(examples, "audio-text", max_new_tokens=32)
    rates = [word_error_rate(e.text or "", answer) for e, answer in zip(examples, answers, strict=True)]
    voices = Counter(str(e.meta["voice"]) for e in examples)
    spoken = ", ".join(f"{n} by {voice}" for voice, n in sorted(voices.items()))
    wer = sum(rates) / len(rates)
    return f"What the demo LALM hears: asked to repeat {len(rates)} clips ({spoken}), its word error rate is {wer:.0%}."


def cost(began: float) -> str:
    """Seconds since `began` (of `time.perf_counter`), and the most memory that this process held at once."""
    try:
        import resource
    except ImportError:  # on Windows
        return f"{time.perf_counter() - began:.0f} s"
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of what getrusage counts in
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return f"{time.perf_counter() - began:.0f} s, at most {peak:.1f} GB of memory"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter and report")
    parser.add_argument("--fast", action="store_true", help="a small part of the data: does everything run?")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began, step = time.perf_counter(), 40 if args.fast else 1
    check_folder(args.out / "adapter", overwrite=True)  # what can't be saved is said before the work
    print(
        "Builds a small speech LM (165 MB to download once), trains it on typed questions, chooses how strongly it "
        f"acts, and asks it new ones, typed and spoken. About {3 if args.fast else 11} minutes on 2 CPU cores."
        + (f" {SMOKE}" if args.fast else ""),
        flush=True,
    )
    lalm, processor = load_demo(dtype=fast_dtype())
    model = RRS(lalm, processor, replace(CONFIG, seed=args.seed))
    model.reader.max_tokens = 2560  # a third of the default: smaller batches of answers need less memory
    train, dev, test = training_questions(), evaluation_questions("dev"), evaluation_questions()
    train = {label: rows[::step] for label, rows in train.items()}
    if args.fast:
        dev, test = ({group: rows[::10] for group, rows in groups.items()} for groups in (dev, test))

    with fast_attention(lalm.dtype):
        model.fit(harmful=train["harmful"], benign=train["benign"], preflight=8)
    half = {group: rows[::2] for group, rows in dev.items()}  # enough to choose one number by
    few = {"answers": 8, "most": 1.0} if args.fast else {"answers": 30}
    model.calibrate(half, ("audio-text", "text-only"), budget=BUDGET, **few)
    report = model.evaluate(test, CONDITIONS, max_new_tokens=16 if args.fast else 24, usefulness=24)
    add_maps(report, model, test, CONDITIONS, n=8)
    clips = sorted((e for rows in test.values() for e in rows if e.has("audio-only")), key=lambda e: e.meta["voice"])
    report.notes.append(what_it_hears(model, clips[:: 1 if args.fast else 7]))
    report.notes += [SMOKE] if args.fast else []
    report.settings |= origin()
    write_page(report, args.out)
    model.save(args.out / "adapter", overwrite=True)

    print(f"\n{report}")
    print(f"{cost(began)}; everything is in {args.out}: open report.html")
    print(f"Next: python examples/evaluate.py --adapter {args.out / 'adapter'} --test harmful=… --test hard-benign=…")


if __name__ == "__main__":
    main()
