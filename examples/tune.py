"""Settings found by search on the demo LALM: the most refusals whose cost stays within the budgets.

    pip install -e ".[tune,demo]"
    python examples/tune.py --out out/tune --trials 24       # give it again to go on, to more trials in all

A trial is a training and the scale that `RRS.calibrate` finds for it; the value is by answers to the dev split. Leaves
`study.journal`, and of the best trial `adapter/`, whose `rrs.json` holds its settings.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import quickstart
from compare import merit
from train import open_model

from rrs import RRS, Example, RRSConfig, check_folder
from rrs.hooks import world


def suggest(trial: optuna.Trial, base: RRSConfig) -> RRSConfig:
    """The search space, around a config that trains."""

    def around(name: str, factor: float) -> float:
        return trial.suggest_float(name, getattr(base, name) / factor, getattr(base, name) * factor, log=True)

    return replace(
        base,
        learning_rate=around("learning_rate", 4),
        penalty=around("penalty", 10),
        harmful_strength=around("harmful_strength", 2),
        benign_strength=trial.suggest_float("benign_strength", 0, 2 * base.benign_strength),
        epochs=trial.suggest_int("epochs", 1, 3),
        direction=trial.suggest_categorical("direction", ["delta", "natural"]),
    )


def tune(
    model: RRS,
    train: Mapping[str, Sequence[Example]],
    dev: Any,
    study: optuna.Study,
    trials: int,
    out: Path,
    **how: Any,
) -> optuna.trial.FrozenTrial:
    """Runs trials until the study has so many finished ones; the best adapter so far is in `out/adapter`.

    Args:
        model: with the config to search around.
        how: of `RRS.calibrate`, e.g. `budget`.
    """
    base = model.config

    def value(trial: optuna.Trial) -> float:
        model.config = suggest(trial, base)
        sides = train["harmful"], train["benign"]
        model.train([item for c in base.conditions for item in model.prepare(*sides, c).items])
        found = model.calibrate(dev, base.conditions, **how)
        for group, rate in found.chosen.answers.items():
            trial.set_user_attr(group, rate.value)
        _, score = merit(found)
        if not done() or score > study.best_value:
            model.save(out / "adapter", overwrite=True)
        model.disable()
        return score

    def done() -> int:
        return len(study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))

    try:  # a rate at which training diverges is a failed trial, not the search's end
        study.optimize(value, n_trials=max(0, trials - done()), catch=(FloatingPointError,))
    finally:
        model.config = base
        model.disable()
    return study.best_trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter and study")
    parser.add_argument("--trials", type=int, default=24, help="in all, earlier calls included")
    parser.add_argument("--every", type=int, default=4, help="train on every n-th question only: quicker trials")
    parser.add_argument("--fast", action="store_true", help="two trials on a few questions: does everything run?")
    args = parser.parse_args()
    if args.fast:
        args.trials, args.every = 2, 100
    if world() > 1:
        parser.error("the search runs in one process: each would draw settings of its own")
    check_folder(args.out / "adapter", overwrite=True)
    args.out.mkdir(parents=True, exist_ok=True)
    journal = optuna.storages.journal.JournalFileBackend(str(args.out / "study.journal"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal), study_name="rrs", direction="maximize", load_if_exists=True
    )
    model, train = open_model("demo"), {k: rows[:: args.every] for k, rows in quickstart.training_questions().items()}
    run = {"every": args.every, "fast": args.fast, "config": repr(model.config), "budget": quickstart.BUDGET}
    if study.user_attrs.get("run", run) != run:
        parser.error(f"{args.out} holds a search on other data or from other settings; choose another --out.")
    study.set_user_attr("run", run)
    if "auto" in (model.config.refusal_prompt, model.config.refusal):
        refusal = model.find_refusal(train["harmful"], train["benign"])
        model.config = replace(model.config, refusal_prompt=refusal.prompt, refusal=refusal.words)
    dev = {g: rows[:: 10 if args.fast else 1] for g, rows in quickstart.evaluation_questions("dev").items()}
    print(tune(model, train, dev, study, args.trials, args.out, budget=quickstart.BUDGET))


if __name__ == "__main__":
    main()
