"""The card of a saved adapter as a model hub shows it: with the measured rates as metadata, and the canary's answers.

    python examples/card.py out/adapter        # before you publish the folder; README.md in it is written anew

`RRS.save` writes the card itself: base model, licence, the evaluation's table, how to use it, settings. This adds what
is read from `rrs.json` beside it; no model is loaded.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rrs.evaluate import markdown, write_files

CANARY = "A server that has the adapter answers these prompts, greedily, as in the last column:"


def results(record: dict[str, Any], task: str) -> list[dict[str, Any]]:
    """The evaluation's rates, as the hub's `model-index` has them."""
    return [
        {
            "task": {"type": task},
            "dataset": {"type": "own", "name": f"{row['group']}, {row['condition']}"},
            "metrics": [
                {"type": "refusal_rate", "name": f"refused {stage}", "value": rate["value"]}
                for stage, rate in row["refused"].items()
                if rate["n"]
            ],
        }
        for row in record.get("evaluation", [])
    ]


def canary_table(canary: list[dict[str, Any]]) -> str:
    """Markdown: prompts with vanilla's and the adapter's answers, their markup escaped."""
    columns = ("condition", "text", "vanilla", "trained")
    head = "| condition | prompt | vanilla's answer | with the adapter |\n| --- | --- | --- | --- |\n"
    return head + "".join(f"| {' | '.join(markdown(p[key]) for key in columns)} |\n" for p in canary)


def long_card(folder: Path) -> str:
    """The card in an adapter's folder with both; one that has them already is returned as it is."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    record = json.loads((folder / "rrs.json").read_text(encoding="utf-8"))
    if CANARY in card:
        return card
    head, rule, body = card.removeprefix("---\n").partition("\n---\n")
    meta = dict(line.split(": ", 1) for line in head.splitlines())
    if found := results(record, json.loads(meta["pipeline_tag"])):
        head += f"\nmodel-index: {json.dumps([{'name': 'RRS adapter', 'results': found}])}"
    return f"---\n{head}{rule}{body}\n## Canary\n\n{CANARY}\n\n{canary_table(record['canary'])}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an adapter's, as RRS.save wrote it")
    folder = parser.parse_args().folder
    print(*write_files(folder, {"README.md": long_card(folder)}))


if __name__ == "__main__":
    main()
