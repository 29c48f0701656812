"""What does an adapter refuse? Any adapter that RRS or PEFT wrote, on your own questions, in one table.

    python examples/evaluate.py --adapter out/adapter --test harmful=advbench.csv --test hard-benign=xstest.csv
    python examples/evaluate.py --adapter someones-lora --model Qwen/Qwen2-Audio-7B-Instruct --test harmful=figstep.csv

Every question is asked without the adapter and with it, in each condition for which the data has what it needs: typed,
spoken, spoken with an instruction. With `--out`, a folder gets `report.html`, `report.md` and `report.json`, and
for RRS's adapters `answers.jsonl`, from which an interrupted evaluation goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from maps import add_maps
from reproduce import origin
from review import write_page
from train import TEST, Groups, open_model, possible, spread

from rrs import RRS, Example, Report


def evaluate(model: RRS, adapter: Path, test: dict[str, list[Example]], **options: Any) -> Report:
    """Answers before and after. The model has no adapter when it comes, and may have one afterwards.

    Args:
        options: of `RRS.evaluate`.
    """
    conditions = possible(chain(*test.values()))
    if (adapter / "rrs.json").is_file():  # RRS's own: it knows its settings and what it was trained on
        ours = RRS.load(adapter, model.model, model.processor)
        report = ours.evaluate(test, conditions, **options)
        add_maps(report, ours, test, conditions)
        return report
    try:
        from peft import PeftModel
    except ImportError as error:
        raise SystemExit(
            'An adapter that PEFT wrote needs PEFT: pip install "rrs[bench]" (or: pip install peft).'
        ) from error
    wrapped = PeftModel.from_pretrained(model.model, str(adapter))
    # An RRS keeps encoded clips, and the adapter may be in the audio tower: each state has its own.
    after = RRS(wrapped.get_base_model(), model.processor, model.config)

    @contextmanager
    def before(_condition: str) -> Iterator[RRS]:
        with wrapped.disable_adapter():
            yield model

    @contextmanager
    def with_adapter(_condition: str) -> Iterator[RRS]:
        yield after

    options["cache"] = None  # it knows answers by the weights and RRS's own adapter, not by PEFT's settings
    stages = {"before": before, "after": with_adapter}
    report = after.evaluate(test, conditions, stages=stages, **options)
    add_maps(report, after, test, conditions, stages)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, required=True, help="folder that RRS or PEFT wrote")
    parser.add_argument("--model", default="demo", help="name or folder of its base; default: the demo LALM")
    parser.add_argument("--test", action=Groups, required=True, **TEST)
    parser.add_argument("--limit", type=int, help="ask at most so many questions of each group")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="per answer")
    parser.add_argument("--out", type=Path, help="folder for the report")
    args = parser.parse_args()
    test = {group: spread(rows, args.limit) if args.limit else rows for group, rows in args.test.items()}
    cache = args.out / "answers.jsonl" if args.out else None
    report = evaluate(open_model(args.model), args.adapter, test, max_new_tokens=args.max_new_tokens, cache=cache)
    print(report)
    if args.out:
        report.settings |= origin()
        print(f"Read every answer: {write_page(report, args.out)}")


if __name__ == "__main__":
    main()
