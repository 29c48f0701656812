"""Which refusal prompt makes a model refuse, and how must an answer begin to become a refusal? Two tables, no training.

    python examples/find_refusal.py                                                      # the demo LALM
    python examples/find_refusal.py --model Qwen/Qwen2-Audio-7B-Instruct --harmful harmful.jsonl --condition audio-text

The tokens are those that the model begins with under the best of the prompts, and openings that are common elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import replace

from rrs import RRS, Example, RRSConfig, load_examples

OPENINGS = ("I", "I'm", "I'm sorry", "I cannot", "Sorry", "Sorry,", "Unfortunately", "As an AI")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; a vertical bar in a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def spread(questions: Sequence[Example], n: int) -> list[Example]:
    """`n` of them, over all: every k-th, or in uneven steps where that would leave out a step or more at the end."""
    n = min(n, len(questions))
    step = len(questions) // n
    even = len(questions) - n * step < step
    return [questions[i * step if even else i * len(questions) // n] for i in range(n)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="name or folder of any LALM; default: the demo LALM")
    parser.add_argument("--harmful", help="harmful questions; default: the quickstart's to train on")
    parser.add_argument("--condition", default="text-only")
    parser.add_argument("--n", type=int, default=56, help="questions, spread over all")
    args = parser.parse_args()
    if args.n < 1:
        parser.error("--n must be at least 1")

    if args.harmful:
        questions = load_examples(args.harmful, "harmful")
    else:
        from quickstart import training_questions

        questions = training_questions()["harmful"]
    able = [e for e in questions if e.has(args.condition)]
    if not able:
        parser.error(f"none of the {len(questions)} harmful questions has what --condition {args.condition} needs")
    questions = spread(able, args.n)
    if args.model == "demo":
        from demo_lalm import fast_dtype, load_demo

        rrs = RRS(*load_demo(dtype=fast_dtype()), RRSConfig())
    else:
        rrs = RRS.from_pretrained(args.model)

    prompts = rrs.find_refusal_prompt(questions, args.condition, n=args.n)
    rrs.config = replace(rrs.config, refusal_prompt=prompts[0].prompt)
    openings = rrs.find_refusal_token(questions, args.condition, candidates=OPENINGS, n=args.n)
    print(f"\n{args.model}, {args.condition}, {len(questions)} harmful questions\n")
    rows = [(f"`{p.prompt}`", p.refused, f"{p.opening!r} {p.share:.0%}") for p in prompts]
    print(table(["refusal prompt", "refused", "begins most often with"], rows), "\n")
    rows = [(repr(o.text), len(o.ids), f"{o.said:.0%}", o.refused) for o in openings]
    print(table(["opening, forced", "tokens", "begins so under the best prompt", "goes on to a refusal"], rows))


if __name__ == "__main__":
    main()
