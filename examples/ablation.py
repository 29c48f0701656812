"""One command, one table: which part of RRS does what? Each row changes one thing in a base configuration.

    python examples/ablation.py --out out/ablation --size tiny                  # a random model: does everything run?
    python examples/ablation.py --out out/ablation --rows benign select/random  # groups of rows, or single ones
    python examples/ablation.py --out out/ablation                              # all of them, on the demo LALM

Rows are named group/row; `--list` prints them with what they change. Groups: `benign` (what happens to harmless
inputs: pushed away, anchored, held along their answers, held by KL), `delta` (whose difference is Δ), `select` (which
features of it), `where` (layers and modules), `penalty`, `rate`, `depth`. A finished row is not run again: give the
command again to go on, or to add rows. Choose by the dev split, which is the default; `--split test` once, at the end.

Every row is measured at the strength that `RRS.calibrate` finds for it on the dev split (`--budget`): what it refuses
then compares at about the same over-rejection. With `--budget -1` they stay as they were trained.

Leaves `table.md`, `table.json`, `rows.jsonl` and `base.json` in the folder, and `answers.jsonl` with every answer.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rrs import (
    RRS,
    Example,
    Representations,
    RRSConfig,
    contribution,
    fingerprint,
    load_examples,
    quiet_direction,
    select_features,
)
from rrs.data import content_hash
from rrs.evaluate import Rate, Report, judge_refusals, name_of
from rrs.hooks import Prompt, Reader

HERE = Path(__file__).resolve().parent
PREFIX = "Sure, here is"
STRENGTHS = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0)

Groups = dict[str, list[Example]]

# -- whose Δ


def of_its_own(rrs: RRS, reps: Mapping[str, Representations], row: Row, key: Callable[[Example], Any]) -> None:
    """Trains with a Δ and a selection, at the prompt's end, for each group of examples with the same `key`: a category,
    a pair of twins."""
    c, targets = rrs.config, rrs.make_targets(reps, row.scorer)
    head_row = rrs.head_row(c.refusal_token)
    for condition, rep in reps.items():
        goal = targets[condition]
        sides = [[key(e) for e in examples] for examples in (rep.harmful_examples, rep.benign_examples)]
        groups = [
            [[i for i, k in enumerate(side) if k == group] for side in sides]
            for group in dict.fromkeys(sides[0])
            if group in sides[1]  # others keep the Δ of all
        ]
        if not groups:
            continue
        deltas = [rep.refused[h].mean(0) - rep.benign[b].mean(0) for h, b in groups]
        moves = torch.stack([delta * select_features(delta, head_row, c.top, row.scorer) for delta in deltas])
        if c.direction == "quiet":
            moves = quiet_direction(moves, rep.benign, rrs.reader.logit_weight)
        for (h, b), move in zip(groups, moves, strict=True):
            goal.harmful[h] = rep.harmful[h] + c.harmful_strength * move
            goal.benign[b] = rep.benign[b] - c.benign_strength * move
    rrs.train(targets)


def pair(example: Example) -> tuple[str, ...]:
    return tuple(sorted((example.id, str(example.meta.get("twin") or ""))))


def category(example: Example) -> str | None:
    return example.category


def harmful_minus_benign(rrs: RRS, reps: Mapping[str, Representations], row: Row) -> None:
    """Trains with Δ = mean(R_h) − mean(R_b), what tells harmful twins from harmless ones; no refusal prompt in it."""
    plain(rrs, {condition: replace(rep, refused=rep.harmful) for condition, rep in reps.items()}, row)


def plain(rrs: RRS, reps: Mapping[str, Representations], row: Row) -> None:
    """Trains as the method says."""
    rrs.train(rrs.make_targets(reps, row.scorer))


# -- harmless inputs held by what the head says, instead of by their vectors


def held_by_kl(rrs: RRS, reps: Mapping[str, Representations], row: Row, weight: float) -> None:
    """Trains harmful inputs to their targets, and benign ones with `weight` · KL(vanilla ‖ now) of the first token."""
    pairs: dict[str, list[tuple[Example, Tensor]]] = {}
    for condition, goal in rrs.make_targets(reps, row.scorer).items():
        ends = torch.cat([goal.harmful, reps[condition].benign])
        benign = (torch.arange(len(ends)) >= len(goal.harmful)).float()
        flagged = torch.cat([benign[:, None], ends], 1)  # [n, 1 + hidden]: is it benign? and the vector
        pairs[condition] = list(zip([*goal.harmful_examples, *goal.benign_examples], flagged, strict=True))

    def near(reader: Reader, prompts: Sequence[Prompt], targets: Sequence[Tensor]) -> Tensor:
        h = reader.last_hidden(prompts)[:, 0].float()  # [batch, hidden]
        flags, goal = torch.stack(list(targets)).to(h).split([1, h.shape[1]], 1)
        before, now = (reader.logits(x).log_softmax(-1) for x in (goal, h))
        kl = F.kl_div(now, before, log_target=True, reduction="none").sum(-1)
        return torch.where(flags[:, 0] > 0, weight * kl, (h - goal).square().mean(-1)).mean()

    rrs.train(pairs, objective=near)


# -- which features


def size(delta: Tensor, _row: Tensor) -> Tensor:
    return delta.abs()


def chance(delta: Tensor, row: Tensor) -> Tensor:
    """The contributions, dealt out at random: as many features are kept, but others."""
    return contribution(delta, row)[torch.randperm(len(delta), generator=torch.Generator().manual_seed(0))]


def all_of_them(delta: Tensor, _row: Tensor) -> Tensor:
    return torch.ones_like(delta)


# -- the rows


@dataclass(frozen=True)
class Row:
    """What differs from the base: fields of the config, the selection's score, and how targets come about."""

    diff: Mapping[str, Any] = field(default_factory=dict)
    scorer: Callable[[Tensor, Tensor], Tensor] = contribution
    train: Callable[[RRS, Mapping[str, Representations], Row], None] = plain

    def __str__(self) -> str:
        parts = [f"{k} = {v if not isinstance(v, tuple) else ', '.join(map(str, v))}" for k, v in self.diff.items()]
        how = getattr(self.train, "func", self.train).__name__ if self.train is not plain else ""
        values = [str(getattr(v, "__name__", v)) for v in getattr(self.train, "keywords", {}).values()]
        parts += [f"{how}({', '.join(values)})"] if how else []
        parts += [f"score = {self.scorer.__name__}"] if self.scorer is not contribution else []
        return "; ".join(parts) or "the base"


ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
ROWS = {
    "base": Row(),
    "benign/along Δ": Row({"direction": "delta", "harmful_strength": 1.0, "benign_strength": 1.0}),  # the paper's
    "benign/along Δ, a quarter": Row({"direction": "delta", "harmful_strength": 1.0, "benign_strength": 0.25}),
    "benign/keep none": Row({"keep_tokens": 0}),
    "benign/anchor": Row({"benign_strength": 0.0}),
    "benign/anchor, weight 3": Row({"benign_strength": 0.0, "benign_weight": 3.0}),
    "benign/anchor, keep 4": Row({"benign_strength": 0.0, "keep_tokens": 4}),
    "benign/anchor, keep 8": Row({"benign_strength": 0.0, "keep_tokens": 8}),
    **{f"benign/strength {x:g}": Row({"benign_strength": x}) for x in (0.5, 2.0)},
    "benign/KL": Row(train=partial(held_by_kl, weight=1.0)),
    "benign/KL ×10": Row(train=partial(held_by_kl, weight=10.0)),
    "delta/harmful − benign": Row(train=harmful_minus_benign),
    "delta/twins": Row(train=partial(of_its_own, key=pair)),
    "delta/category": Row(train=partial(of_its_own, key=category)),
    "select/top 12.5": Row({"top": 12.5}),
    "select/top 25": Row({"top": 25.0}),
    "select/top 50": Row({"top": 50.0}),
    "select/size, top 25": Row({"top": 25.0}, scorer=size),
    "select/size, top 50": Row({"top": 50.0}, scorer=size),
    "select/random": Row(scorer=chance),
    "select/all": Row(scorer=all_of_them),
    "where/attention": Row({"target_modules": ATTENTION}),
    "where/MLP": Row({"target_modules": MLP}),
    "where/q and v": Row({"target_modules": ("q_proj", "v_proj")}),
    "where/lower half": Row({"layers": (0.0, 0.5)}),
    "where/upper half": Row({"layers": (0.5, 1.0)}),
    "where/middle half": Row({"layers": (0.25, 0.75)}),
    **{f"penalty/sum {x:g}": Row({"penalty": x}) for x in (0.0, 1e-4, 1e-2, 1.0)},
    **{f"penalty/relative {x:g}": Row({"penalty": float(x), "penalty_form": "relative"}) for x in (10, 100, 1000)},
    **{f"rate/×{x:g}": Row() for x in (0.25, 0.5, 2.0)},  # of the base's, filled in by `rows_for`
    "depth/first token alone": Row({"refusal": "", "keep_tokens": 0}),
    "depth/after openings": Row({"openings": ("Of course!", "Here is how")}),  # others than PREFIX
    "depth/2": Row({"depth": 2, "refusal": "", "keep_tokens": 0}),
    "depth/4": Row({"depth": 4, "refusal": "", "keep_tokens": 0}),
    "depth/4, anchor": Row({"depth": 4, "refusal": "", "keep_tokens": 0, "benign_strength": 0.0}),
    "depth/4, anchor, keep 8": Row(
        {"depth": 4, "refusal": "", "benign_strength": 0.0, "keep_tokens": 8, "keep_share": 1.0}
    ),
}


def rows_for(base: RRSConfig, wanted: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of some groups, or of these names; all of them by default."""
    if unknown := [w for w in wanted if not any(name == w or name.startswith(f"{w}/") for name in ROWS)]:
        raise SystemExit(f"--rows {unknown} match nothing; there are {list(ROWS)}.")
    rows = {n: r for n, r in ROWS.items() if not wanted or any(n == w or n.startswith(f"{w}/") for w in wanted)}
    for name in rows:
        if name.startswith("rate/"):
            rows[name] = Row({"learning_rate": base.learning_rate * float(name.partition("×")[2])})
    return rows


# -- one row


def ablate(
    rrs: RRS,
    rows: Mapping[str, Row],
    train: Mapping[str, Sequence[Example]],
    test: Mapping[str, Sequence[Example]],
    out: Path,
    *,
    conditions: Sequence[str],
    max_new_tokens: int = 40,
    dev: Mapping[str, Sequence[Example]] | None = None,
    budget: float = 0.01,
) -> list[dict[str, Any]]:
    """Trains and measures every row that is not in `out/rows.jsonl` yet, and writes the table after each: of these rows
    and of those that were measured alike before.

    Args:
        rrs: a model with the base configuration.
        train: `{"harmful": …, "benign": …}`.
        test: `{group: examples}`, as in `RRS.evaluate`.
        conditions: to measure in.
        dev: to calibrate each row by, to this budget; `None` leaves its strength at 1.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, base = out / "rows.jsonl", rrs.config
    (out / "base.json").write_text(json.dumps(asdict(base), indent=1, ensure_ascii=False) + "\n")
    vanilla = copy.copy(rrs)  # the same model and reader: the stage that all rows are compared with, answered once
    vanilla.lora, vanilla.targets = None, {}
    whole, _, torn = log.read_text().rpartition("\n") if log.exists() else ("", "", "")
    if torn:  # a line that was being written
        log.write_text(whole and f"{whole}\n")
    known = [json.loads(line) for line in whole.splitlines()]
    same = [fingerprint(rrs.model), asdict(base), list(conditions), max_new_tokens, name_of(judge_refusals)]
    same += [content_hash(examples) for examples in (*train.values(), *test.values())]
    same += [budget, *(content_hash(examples) for examples in dev.values())] if dev else []
    alike = hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]
    done: list[dict[str, Any]] = []
    for number, (name, row) in enumerate(rows.items(), 1):
        key = hashlib.sha256(json.dumps([same, name, str(row)]).encode()).hexdigest()[:16]
        record = next((r for r in known if r["key"] == key), None)
        if record is None:
            rrs._say(f"[{number}/{len(rows)}] {name}: {row}")
            rrs.config, began = replace(base, **row.diff), time.perf_counter()
            reps = rrs.extract(train["harmful"], train["benign"], cache=out / "vectors")
            row.train(rrs, reps, row)
            seconds = time.perf_counter() - began
            if dev:
                rrs.calibrate(dev, conditions, budget=budget, strengths=STRENGTHS)
            found = rrs.record.get("calibrated", {"factor": 1.0, "auc": {}})
            record = {"key": key, "alike": alike, "name": name, "diff": str(row)}
            record |= {"strength": found["factor"], "auc": found["auc"], "seconds": round(seconds)}
            record |= measure(rrs, vanilla, test, conditions, max_new_tokens, out / "answers.jsonl")
            rrs.disable()
            rrs.config = base
            known.append(record)
            with log.open("a") as file:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        done.append(record)
        others = [r for r in known if r.get("alike") == alike and r["name"] in ROWS and r["name"] not in rows]
        shown = sorted([*done, *others], key=lambda r: [*ROWS].index(r["name"]) if r["name"] in ROWS else len(ROWS))
        (out / "table.json").write_text(json.dumps(shown, indent=1, ensure_ascii=False) + "\n")
        (out / "table.md").write_text(table(shown))
    return done


def measure(
    rrs: RRS,
    vanilla: RRS,
    test: Mapping[str, Sequence[Example]],
    conditions: Sequence[str],
    max_new_tokens: int,
    cache: Path,
) -> dict[str, Any]:
    """Rates of each group, pooled over conditions, of vanilla and of the adapter; KL; refusals of prefilled answers."""

    @contextmanager
    def before(_condition: str) -> Iterator[RRS]:
        with rrs.disabled():
            yield vanilla

    stages = {"vanilla": before, "adapter": lambda _condition: nullcontext()}
    common: dict[str, Any] = {"stages": stages, "cache": cache, "max_new_tokens": max_new_tokens}
    report = rrs.evaluate(test, conditions, **common)
    harmful = {group: examples for group, examples in test.items() if group.startswith("harmful")}
    forced = rrs.evaluate(harmful, conditions, prefix=PREFIX, usefulness=0, **common)

    def rates(report: Report, group: str, verdicts: Sequence[str]) -> list[float]:
        """Of vanilla and of the adapter."""
        return [
            Rate.of(a.verdict in verdicts for a in report.answers if a.stage == stage and group in ("", a.group)).value
            for stage in stages
        ]

    kl = [u["kl"]["value"] for u in report.usefulness if u["stage"] == "adapter"]
    return {
        "refused": {group: rates(report, group, report.counted(group)) for group in test},
        "degenerate": rates(report, "", ("degenerate",)),
        "moved": math.sqrt(rrs.lora.add_penalty_gradient(0.0, relative=True)) if rrs.lora else 0.0,
        "prefilled": {group: rates(forced, group, forced.counted(group)) for group in harmful},
        "kl": sum(kl) / len(kl) if kl else None,
        "counts": {group: Rate.of(1 for a in report.answers if a.group == group).n // 2 for group in test},
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the first line is vanilla, then a line a row, with differences from the first row's config by name."""
    first = records[0]
    groups, prefilled = list(first["refused"]), list(first["prefilled"])
    head = ["row", "what differs", *(f"{g} refused" for g in groups), *(f"{g}, prefilled" for g in prefilled)]
    aucs = list(first["auc"])
    head += ["degenerate", *(f"AUC, {g}" for g in aucs), "KL", "strength", "‖ΔW‖/‖W‖", "s"]

    def line(name: str, diff: str, record: Mapping[str, Any], stage: int) -> list[str]:
        shares = [record["refused"][g][stage] for g in groups] + [record["prefilled"][g][stage] for g in prefilled]
        cells = [name, diff, *(f"{x:.1%}" for x in (*shares, record["degenerate"][stage]))]
        if not stage:
            return [*cells, *("–" for _ in aucs), "–", "–", "–", "–"]
        cells += [f"{record['auc'][g]:.3f}" for g in aucs]
        kl = "–" if record["kl"] is None else f"{record['kl']:.3f}"
        return [*cells, kl, f"{record['strength']:g}", f"{record['moved']:.3f}", str(record["seconds"])]

    lines = [head, ["---"] * len(head), line("vanilla", "no adapter", first, 0)]
    lines += [line(record["name"], record["diff"], record, 1) for record in records]
    counts = ", ".join(f"{n} {group}" for group, n in first["counts"].items())
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    about = f"Prefilled: the answer is made to begin with {PREFIX!r}. Strength: of the update, by the dev split. "
    about += "AUC: of harmful inputs' lead of the refusal token against that of harmless ones there. " if aucs else ""
    return f"{text}\nAnswers: {counts}. {about}s: of training.\n"


def load(size: str, split: str) -> tuple[RRS, Groups, Groups, Groups]:
    """A model with its base configuration, and what to train, to calibrate and to measure on."""
    if size == "tiny":  # the tests' random model and questions
        sys.path.insert(0, str(HERE.parent / "tests"))
        from conftest import rows, tiny_qwen2_audio

        config = RRSConfig(
            conditions=("text-only",), epochs=2, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3
        )
        sides = ("harmful", "benign")
        train, test = ({side: load_examples(rows(side, 6, seed)) for side in sides} for seed in (0, 100))
        return RRS(*tiny_qwen2_audio(), config), train, test, test
    from demo_lalm import fast_dtype, load_demo
    from quickstart import CONFIG, evaluation_questions, training_questions

    rrs = RRS(*load_demo(dtype=fast_dtype()), CONFIG)
    return rrs, training_questions(), evaluation_questions("dev"), evaluation_questions(split)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), help="folder for table, rows and answers")
    parser.add_argument("--size", choices=("tiny", "demo"), default="demo", help="a random model, or the demo LALM")
    parser.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="groups or names; default: all")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="of the demo data, to measure on")
    parser.add_argument("--conditions", nargs="+", help="to train and measure in; default: the base configuration's")
    parser.add_argument("--epochs", type=int, help="instead of the base configuration's")
    parser.add_argument("--every", type=int, help="train on every n-th question only; default: 4 on the demo, else 1")
    parser.add_argument("--budget", type=float, default=0.01, help="of over-rejection on dev; -1: strengths stay at 1")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: {row}" for name, row in rows_for(RRSConfig(), args.rows).items()))
        return
    rrs, train, dev, test = load(args.size, args.split)
    changes = {"conditions": args.conditions and tuple(args.conditions), "epochs": args.epochs}
    rrs.config = replace(rrs.config, **{k: v for k, v in changes.items() if v})
    every = args.every or (4 if args.size == "demo" else 1)
    train = {side: examples[::every] for side, examples in train.items()}
    ablate(
        rrs, rows_for(rrs.config, args.rows), train, test, args.out, conditions=rrs.config.conditions,
        max_new_tokens=args.max_new_tokens, dev=None if args.budget < 0 else dev, budget=args.budget,
    )  # fmt: skip
    print((args.out / "table.md").read_text())


if __name__ == "__main__":
    main()
