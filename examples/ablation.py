"""One command, one table: which part of RRS does what? Each row changes one thing in a base configuration.

    python examples/ablation.py --out out/ablation                              # the demo LALM, all rows
    python examples/ablation.py --out out/ablation --rows keep select/random    # groups of rows, or single ones
    python examples/ablation.py --list

A finished row is not run again: give the command again to go on, or to add rows. Every row gets the scale that
`RRS.calibrate` finds for it on the dev split, so that what it refuses compares at about the same over-rejection, and is
then measured there. `--split test` once, at the end. Leaves `table.md`, `rows.jsonl`, and `answers.jsonl` with all
answers in the folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import quickstart
import torch
from torch import Tensor
from torch.nn import functional as F
from train import open_model

from rrs import RRS, Example, RRSConfig, TrainItem, contribution, make_items, to_targets
from rrs.data import content_hash
from rrs.evaluate import Rate, by_label
from rrs.hooks import Prompt, Reader

Groups = Mapping[str, Sequence[Example]]
Objective = Callable[[Reader, Sequence[Prompt], Sequence[TrainItem]], Tensor]

# -- which features


def size(delta: Tensor, _row: Tensor) -> Tensor:
    return delta.abs()


def chance(delta: Tensor, row: Tensor) -> Tensor:
    """The contributions, dealt out at random: as many features are kept, but others."""
    return contribution(delta, row)[torch.randperm(len(delta), generator=torch.Generator().manual_seed(0))]


def all_of_them(delta: Tensor, _row: Tensor) -> Tensor:
    return torch.ones_like(delta)


# -- what is trained on: (model, harmful, benign, condition, scorer) -> items


def plain(model: RRS, harmful: Any, benign: Any, condition: str, scorer: Any) -> list[TrainItem]:
    """As the method says."""
    return model.prepare(harmful, benign, condition, scorer).items


def without_twins(model: RRS, harmful: Any, benign: Any, condition: str, scorer: Any) -> list[TrainItem]:
    """Trains on no benign question that is nearly the sentence of a harmful one."""
    return plain(model, harmful, [e for e in benign if e.meta.get("group") != "twins"], condition, scorer)


def weighted(
    model: RRS, harmful: Any, benign: Any, condition: str, scorer: Any, *, group: str, weight: float
) -> list[TrainItem]:
    """A group's items count `weight` times."""
    items = plain(model, harmful, benign, condition, scorer)
    return [
        replace(i, weight=weight) if (i.example.meta.get("group") or i.example.label) == group else i for i in items
    ]


def harmful_minus_benign(model: RRS, harmful: Any, benign: Any, condition: str, scorer: Any) -> list[TrainItem]:
    """Δ = mean(R_h) − mean(R_b), what tells the sides apart; no refusal prompt in it, and the first token alone."""
    r_h, r_b = model.extract(harmful, condition), model.extract(benign, condition)
    move, c = model.select(r_b, r_h, scorer).move, model.config
    items = make_items(harmful, condition, r_h, c.harmful_strength * move)
    return items + make_items(benign, condition, r_b, -c.benign_strength * move)


def held_by_kl(weight: float) -> Objective:
    """An objective: harmful inputs go to their targets, benign ones keep their first token, by `weight` times the KL
    from what is said at their targets."""

    def objective(reader: Reader, prompts: Sequence[Prompt], items: Sequence[TrainItem]) -> Tensor:
        at = [1 + len(item.suffix) for item in items]  # of the prompt's end, from behind
        h = torch.stack([rows[-n] for rows, n in zip(reader.last_hidden(prompts, max(at)), at, strict=True)]).float()
        goal = torch.stack([item.target[0] for item in items]).to(h)
        before, now = (reader.logits(x).log_softmax(-1) for x in (goal, h))
        kl = F.kl_div(now, before, log_target=True, reduction="none").sum(-1)
        benign = torch.tensor([item.example.label == "benign" for item in items], device=h.device)
        return torch.where(benign, weight * kl, to_targets(reader, prompts, items))

    return objective


# -- the rows


@dataclass(frozen=True)
class Row:
    """What differs from the base: fields of the config, the selection's score, the items, the objective."""

    diff: Mapping[str, Any] = field(default_factory=dict)
    scorer: Callable[[Tensor, Tensor], Tensor] = contribution
    items: Callable[..., list[TrainItem]] = plain
    objective: Objective | None = None

    def __str__(self) -> str:
        parts = [f"{k} = {', '.join(map(str, v)) if isinstance(v, tuple) else v}" for k, v in self.diff.items()]
        parts += [f"score = {self.scorer.__name__}"] if self.scorer is not contribution else []
        how, given = getattr(self.items, "func", self.items), getattr(self.items, "keywords", {})
        parts += [" ".join([how.__name__, *map(str, given.values())])] if self.items is not plain else []
        return "; ".join(parts + ["benign by KL"] * (self.objective is not None)) or "the base"


PAPER = {
    n: getattr(RRSConfig(), n)
    for n in ("direction", "harmful_strength", "benign_strength", "keep_tokens", "keep_share", "layers", "top")
}
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
STILL = {"benign_strength": 0.0}
ROWS = {
    "base": Row(),
    "paper/as published": Row({**PAPER, "refusal": "first token"}),  # filled in by `ablate`, as rates are
    "paper/first token": Row({"refusal": "first token"}),
    "direction/delta": Row({"direction": "delta"}),
    "direction/delta, paper's strengths": Row({"direction": "delta", "harmful_strength": 1.0, "benign_strength": 1.0}),
    "direction/harmful − benign": Row({"refusal": "first token"}, items=harmful_minus_benign),
    **{f"strength/harmful {x:g}": Row({"harmful_strength": x}) for x in (1.0, 2.2, 6.6)},
    **{f"strength/benign {x:g}": Row({"benign_strength": x}) for x in (0.0, 0.6, 1.2, 2.4)},
    **{f"select/top {x:g}": Row({"top": x}) for x in (12.5, 25.0, 50.0)},
    "select/size, top 25": Row({"top": 25.0}, size),
    "select/random": Row(scorer=chance),
    "select/all": Row(scorer=all_of_them),
    "layers/all": Row({"layers": (0.0, 1.0)}),
    "layers/lower half": Row({"layers": (0.0, 0.5)}),
    "layers/upper half": Row({"layers": (0.5, 1.0)}),
    "modules/attention": Row({"target_modules": ATTENTION}),
    "modules/MLP": Row({"target_modules": MLP}),
    "modules/q and v": Row({"target_modules": ("q_proj", "v_proj")}),
    **{f"penalty/{x:g}": Row({"penalty": x}) for x in (0.0, 1e-4, 1e-2, 1.0)},
    **{f"rate/×{x:g}": Row({"learning_rate": f"×{x:g}"}) for x in (0.25, 0.5, 2.0)},
    "keep/none": Row({"keep_tokens": 0, "keep_share": 1.0}),
    "keep/4 tokens": Row({"keep_tokens": 4}),
    "keep/all answers": Row({"keep_share": 1.0}),
    "keep/all answers, none moved": Row({"keep_share": 1.0, **STILL}),
    "keep/KL": Row(STILL, objective=held_by_kl(1.0)),
    "keep/KL ×10": Row(STILL, objective=held_by_kl(10.0)),
    "twins/none": Row(items=without_twins),
    "weights/twins ×0.3": Row(items=partial(weighted, group="twins", weight=0.3)),
    "weights/hard-benign ×3": Row(items=partial(weighted, group="hard-benign", weight=3.0)),
    "weights/harmful ×3": Row(items=partial(weighted, group="harmful", weight=3.0)),
}


def rows_for(wanted: Sequence[str] = ()) -> dict[str, Row]:
    """The rows of some groups, or of these names; all of them by default."""
    if unknown := [w for w in wanted if not any(w in (name, name.partition("/")[0]) for name in ROWS)]:
        raise SystemExit(f"--rows {unknown} match nothing; there are {list(ROWS)}.")
    return {n: r for n, r in ROWS.items() if not wanted or n in wanted or n.partition("/")[0] in wanted}


def config_of(model: RRS, base: RRSConfig, row: Row) -> RRSConfig:
    diff = dict(row.diff)
    if diff.get("refusal") == "first token":
        diff["refusal"] = model.tokenizer.decode(model.token_ids(base.refusal)[:1])
    if "learning_rate" in diff:
        diff["learning_rate"] = base.learning_rate * float(diff["learning_rate"].removeprefix("×"))
    return replace(base, **diff)


# -- measuring


def ablate(
    model: RRS, rows: Mapping[str, Row], train: Groups, dev: Groups, test: Groups, out: Path, *,
    budget: float | Mapping[str, float] = 0.01, max_new_tokens: int = 40,
) -> list[dict[str, Any]]:  # fmt: skip
    """Trains and measures every row that is not in `out/rows.jsonl` yet, and writes the table after each.

    Args:
        model: with the base configuration.
        train: `{"harmful": …, "benign": …}`.
        dev: to calibrate each row by; test: `{group: examples}`, to measure on. Both in the config's conditions.
        budget: as in `RRS.calibrate`.
    """
    out.mkdir(parents=True, exist_ok=True)
    log, base, conditions = out / "rows.jsonl", model.config, model.config.conditions
    known = {r["key"]: r for r in map(json.loads, log.read_text().splitlines())} if log.exists() else {}
    data = [content_hash(chain(*groups.values())) for groups in (train, dev, test)]
    done = []
    for number, (name, row) in enumerate(rows.items(), 1):
        same = json.dumps([asdict(base), data, repr(budget), max_new_tokens, name, str(row)])
        key = hashlib.sha256(same.encode()).hexdigest()[:16]
        if key not in known:
            print(f"[{number}/{len(rows)}] {name}: {row}")
            model.config, began = config_of(model, base, row), time.perf_counter()
            items = [i for c in conditions for i in row.items(model, train["harmful"], train["benign"], c, row.scorer)]
            model.train(items, **({"objective": row.objective} if row.objective else {}))
            found = {"key": key, "name": name, "diff": str(row), "seconds": round(time.perf_counter() - began)}
            point = model.calibrate(dev, conditions, budget=budget).chosen
            found |= {"scale": point.scale, "auc": separation(model, dev, conditions)}
            known[key] = found | measure(model, test, out, max_new_tokens)
            model.disable()
            model.config = base
            with log.open("a") as file:
                file.write(json.dumps(known[key], ensure_ascii=False) + "\n")
        done.append(known[key])
        (out / "table.md").write_text(table(done), encoding="utf-8")
    return done


def auc(above: Tensor, below: Tensor) -> float:
    """How often one of `above` is greater than one of `below`, of all pairs; equals count half (Mann-Whitney's U)."""
    below = below.sort().values
    less, not_more = (torch.searchsorted(below, above, right=right).double() for right in (False, True))
    return float((less + not_more).mean() / (2 * len(below)))


def separation(model: RRS, groups: Groups, conditions: Sequence[str]) -> dict[str, float]:
    """How well harmful inputs are told from each harmless group, wherever the border lies: the area under the ROC curve
    of the refusal token's lead over all others, of the model as it acts now."""
    token, leads = model.refusal_token, dict[str, Tensor]()
    for group, rows in groups.items():
        some = {c: kept for c in conditions if (kept := [e for e in rows if e.has(c)])}
        h = torch.cat([model.extract(kept, c, vanilla=False) for c, kept in some.items()])  # [n, hidden]
        others = model.reader.logits(h).cpu()  # [n, vocab]
        lead = others[:, token].clone()
        others[:, token] = -torch.inf
        leads[group] = lead - others.amax(1)
    harmful, harmless = by_label(groups)
    above = torch.cat([leads[g] for g in harmful])
    return {g: auc(above, leads[g]) for g in harmless}


def measure(model: RRS, test: Groups, out: Path, max_new_tokens: int) -> dict[str, Any]:
    """Rates of each group before and after, conditions together, and the KL."""
    cache, conditions = out / "answers.jsonl", model.config.conditions
    report = model.evaluate(test, conditions, cache=cache, max_new_tokens=max_new_tokens)
    kl = [u["kl"] for u in report.usefulness if u["stage"] == "after"]
    return {
        "refused": {group: [report.rate(group, stage=stage).value for stage in report.stages] for group in test},
        "degenerate": [report.rate(stage=stage, verdicts=("degenerate",)).value for stage in report.stages],
        "kl": sum(kl) / len(kl),
        "n": {group: Rate.of(a.group == group for a in report.answers).k // 2 for group in test},
    }


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: the first line is vanilla, then a line a row."""
    first = records[0]
    groups, aucs = list(first["refused"]), list(first["auc"])
    head = ["row", "what differs", *(f"{g} refused" for g in groups), "degenerate", *(f"AUC, {g}" for g in aucs)]
    head += ["KL", "scale", "s"]

    def rates(record: Mapping[str, Any], stage: int) -> list[str]:
        return [f"{share[stage]:.1%}" for share in (*record["refused"].values(), record["degenerate"])]

    lines = [head, ["---"] * len(head), ["vanilla", "no adapter", *rates(first, 0), *["–"] * (len(aucs) + 3)]]
    for r in records:
        lines.append([r["name"], r["diff"], *rates(r, 1), *(f"{r['auc'][g]:.3f}" for g in aucs)])
        lines[-1] += [f"{r['kl']:.3f}", f"{r['scale']:.2f}", str(r["seconds"])]
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    counts = ", ".join(f"{n} {group}" for group, n in first["n"].items())
    return f"{text}\nAnswers: {counts}. AUC: on dev, of harmful \
inputs' lead of the refusal token against that of harmless ones. Scale: of the update, by dev. s: of training.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/ablation"), help="folder for table, rows and answers")
    parser.add_argument("--rows", nargs="+", default=(), metavar="ROW", help="groups or names; default: all")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument("--split", choices=("dev", "test"), default="dev", help="of the demo data, to measure on")
    parser.add_argument("--every", type=int, default=4, help="train on every n-th question only")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name}: {row}" for name, row in rows_for(args.rows).items()))
        return
    train = {side: rows[:: args.every] for side, rows in quickstart.training_questions().items()}
    dev, test = quickstart.evaluation_questions("dev"), quickstart.evaluation_questions(args.split)
    model = open_model("demo")
    if "auto" in (model.config.refusal_prompt, model.config.refusal):
        found = model.find_refusal(train["harmful"], train["benign"])  # once for all rows
        model.config = replace(model.config, refusal_prompt=found.prompt, refusal=found.words)
    ablate(model, rows_for(args.rows), train, dev, test, args.out, budget=quickstart.BUDGET)
    print((args.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
