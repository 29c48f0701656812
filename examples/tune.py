"""Settings found by search on the demo LALM: the most refusals whose over-rejection stays within a budget.

    python examples/tune.py --out out/tune --minutes 60       # give it again to go on where it stopped
    python examples/tune.py --out out/tune --minutes 20 --every 8 --trials 12 --budget 0.05

Trains on the train split, chooses by the dev split and its hard-benign questions, of which one is 1.5 points (hence a
budget of three), and leaves in the folder: `adapter/` of the best trial, `config.json` (for `examples/compare.py
--config`), `front.png`, and `study.journal` with all trials.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from demo_lalm import fast_dtype, load_demo
from quickstart import CONFIG, evaluation_questions, training_questions

from rrs import RRS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter, config, figure and study")
    parser.add_argument("--budget", type=float, default=0.03, help="over-rejection beyond vanilla: 0.01 is a point")
    parser.add_argument("--trials", type=int, default=40, help="in all, earlier calls included")
    parser.add_argument("--minutes", type=float, default=60, help="no trial starts after that")
    parser.add_argument("--conditions", nargs="+", default=CONFIG.conditions, help="to train and to choose in")
    parser.add_argument("--every", type=int, default=4, help="train on every n-th question only: quicker trials")
    parser.add_argument("--fast", action="store_true", help="one trial on a small part of the data: does it run?")
    args = parser.parse_args()
    dev = evaluation_questions("dev")
    if args.fast:
        args.every, args.trials, dev = 160, 1, {group: examples[::10] for group, examples in dev.items()}

    rrs = RRS(*load_demo(dtype=fast_dtype()), replace(CONFIG, conditions=tuple(args.conditions)))
    train = {side: examples[:: args.every] for side, examples in training_questions().items()}
    best, _ = rrs.tune(
        **train,
        dev=dev,
        budget=args.budget,
        trials=args.trials,
        minutes=args.minutes,
        study=args.out / "study.journal",
        plot=args.out / "front.png",
    )
    best.save(args.out / "adapter", overwrite=True)
    (args.out / "config.json").write_text(json.dumps(asdict(best.config), indent=1, ensure_ascii=False) + "\n")
    print(json.dumps(best.record["tuned"], indent=1))


if __name__ == "__main__":
    main()
