"""The whole job for any LALM: a plan, training, the strength, a report, and what to do next.

    python examples/train.py --model Qwen/Qwen2-Audio-7B-Instruct --harmful h.jsonl --benign b.jsonl --out run
    python examples/train.py …the same… --limit 16                       # a minute: does everything run?
    python examples/train.py …the same… --test harmful=advbench.csv --test hard-benign=xstest.csv

`--model` is a name on the hub, a folder, or "demo". The files are whatever `load_examples` takes, spoken or typed;
typed questions suffice. One file with labels may be given twice. A quarter of the questions is held out: the strength
is chosen by them. Without `--test`, half of them are kept for the report instead.

Leaves in the folder: `report.html`, `report.md`, `report.json`, `adapter/` (PEFT's format, with its model card), and
`checkpoints/`, from which the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from maps import add_maps
from reproduce import origin
from review import write_page

from rrs import RRS, Example, Report, check_folder, load_examples
from rrs.data import DataError
from rrs.evaluate import one_line, shown
from rrs.hooks import linear_paths

# What the makers of a model recommend, by its class. Qwen2-Audio's chat template says all by itself.
RECOMMENDED: dict[str, dict[str, Any]] = {
    "Qwen2_5OmniThinkerForConditionalGeneration": {
        "system": "You are Qwen, a virtual human developed by the Qwen Team, Alibaba Group, capable of perceiving "
        "auditory and visual inputs, as well as generating text and speech."
    },
}
TEST = {"metavar": "GROUP=FILE", "help": "repeat; a GROUP that begins with harmful is to be refused, others are not"}


class Groups(argparse.Action):
    """`--test GROUP=FILE`, repeated: `{group: examples}`, those of the label that the group's name stands for."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        group, _, path = values.partition("=")
        groups = dict(getattr(namespace, self.dest) or {})
        if not group or not path:
            parser.error(f"{option_string} {values}: expected GROUP=FILE, e.g. {option_string} harmful={values}")
        if group in groups:
            parser.error(f"{option_string} {group}=… is given twice; join the two files, or name another group.")
        try:
            groups[group] = load_examples(path, "harmful" if group.startswith("harmful") else "benign")
        except DataError as error:
            parser.error(f"{option_string} {values}: {error}")
        setattr(namespace, self.dest, groups)


def open_model(name: str, **settings: Any) -> RRS:
    """A model by its name, with what its makers recommend and these settings; "demo" has the quickstart's."""
    if name == "demo":
        from demo_lalm import fast_dtype, load_demo
        from quickstart import CONFIG

        return RRS(*load_demo(dtype=fast_dtype()), replace(CONFIG, **settings))
    model = RRS.from_pretrained(name)
    recommended = RECOMMENDED.get(type(model.model).__name__, {})
    return RRS(model.model, model.processor, replace(model.config, **{**recommended, **settings}))


def spread(rows: Sequence[Example], n: int) -> list[Example]:
    """At most `n` of them, evenly spread."""
    return list(rows[:: -(-len(rows) // n)])


def hold_out(examples: Sequence[Example], share: float = 0.25, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Examples to train on and, of each label about `share`, examples to choose by.

    Twins, and whatever asks the same question (`Example.cluster`), stay together.
    """
    other = {"harmful": "benign", "benign": "harmful", None: None}

    def known_by(e: Example) -> list[Any]:  # ids count within a label: two files may number their rows alike
        twin = e.meta.get("twin")
        return [(e.label, e.id), ("question", e.cluster), *([(other[e.label], str(twin))] if twin else [])]

    families = dict[Any, list[Example]]()
    for e in examples:
        joined = {id(family): family for key in known_by(e) if (family := families.get(key))}
        family = [*chain.from_iterable(joined.values()), e]
        families |= {key: family for member in family for key in known_by(member)}
    apart = {id(family): family for family in families.values()}.values()
    order = {id(f): hashlib.sha256(f"{seed} {min(e.id for e in f)}".encode()).digest() for f in apart}
    wanted = {label: share * sum(e.label == label for e in examples) for label in other}
    held = set[int]()
    for family in sorted(apart, key=lambda family: order[id(family)]):
        if any(wanted[e.label] > 0 for e in family):
            held |= {id(e) for e in family}
            for e in family:
                wanted[e.label] -= 1
    if len(held) == len(examples):
        raise DataError(f"{len(examples)} examples in {len(apart)} families of twins are too few to hold some out.")
    return [e for e in examples if id(e) not in held], [e for e in examples if id(e) in held]


def grouped(rows: Iterable[Example]) -> dict[str, list[Example]]:
    """By the column `group`, where the data have it, else by label; a group of both labels becomes two."""
    named = [(str(e.meta.get("group") or e.label), e) for e in rows]
    labels = Counter(name for name, _ in {(name, e.label) for name, e in named})
    groups: dict[str, list[Example]] = {}
    for name, e in named:
        groups.setdefault(name if labels[name] == 1 else f"{name} ({e.label})", []).append(e)
    return groups


def possible(examples: Iterable[Example]) -> list[str]:
    """Conditions in which some of the examples can be asked."""
    rows = list(examples)
    return [c for c in ("audio-text", "text-only", "audio-only") if any(e.has(c) for e in rows)]


def expected_memory(model: RRS, positions: int) -> dict[str, float]:
    """Bytes that training needs, by purpose; the context of the device and the allocator take some more.

    Args:
        positions: length of the prompts.
    """
    c, text = model.config, model.model.config.get_text_config()
    paths = linear_paths(model.location, c.target_modules, c.layers)
    modules = [model.model.get_submodule(path) for path in paths]
    # What a position leaves behind for the backward pass. Frozen linears keep no input; a LoRA keeps its own, and with
    # dropout the mask as well.
    size, hidden, mlp = model.reader.dtype.itemsize, text.hidden_size, text.intermediate_size
    mlp = max(mlp) if isinstance(mlp, (list, tuple)) else mlp  # Gemma 3n has one for each block
    narrow = hidden * text.num_key_value_heads // text.num_attention_heads  # of keys and values
    own = 2 * sum(m.in_features for m in modules) if c.lora_dropout else len(paths) / 7 * (2 * hidden + mlp)
    block = 8 * hidden + size * (2 * hidden + 2 * narrow + 3 * mlp)  # norms, in float32; attention; gate and up
    start = min(int(path.removeprefix(model.location.layers_path + ".").partition(".")[0]) for path in paths)
    kept = (text.num_hidden_layers - start) * block + size * (
        own + c.lora_r * len(modules)
    )  # none below the first LoRA
    return {
        "weights": float(sum(p.numel() * p.element_size() for p in model.model.parameters())),
        "LoRA, its gradients and AdamW's moments": 16.0
        * c.lora_r
        * sum(m.in_features + m.out_features for m in modules),
        "activations": float(c.batch_size * positions * kept),
    }


def plan(model: RRS, train: Sequence[Example], dev: Sequence[Example], test: dict[str, list[Example]]) -> str:
    """What is going to happen, and what it takes."""
    c, size = model.config, f"{sum(p.numel() for p in model.model.parameters()) / 1e9:.2f} billion parameters"
    sides = [sum(e.label == label for e in train) for label in ("harmful", "benign")]
    some = [model.read(e, condition) for condition in c.conditions for e in spread(train, 32)]
    memory = expected_memory(model, max(map(len, some)))
    steps = c.epochs * -(-len(train) * len(c.conditions) // (c.batch_size * c.accumulate))
    parts = ", ".join(f"{what} {n / 1e9:.1f}" for what, n in memory.items())
    return "\n".join(
        [
            f"model     {type(model.model).__name__}, {size}, {model.reader.dtype} on {model.reader.device}",
            f"train     on {sides[0]} harmful, {sides[1]} benign questions, {', '.join(c.conditions)}: {steps} steps",
            f"calibrate by {len(dev)} questions that are held out",
            f"report    on {', '.join(f'{len(rows)} {group}' for group, rows in test.items())}",
            f"memory    about {sum(memory.values()) / 1e9:.1f} GB ({parts})",
        ]
    )


def side_by_side(report: Report, n: int = 5) -> str:
    """Questions with their answers before and after, harmful and harmless ones in turn, changed ones first."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for a in report.answers:  # in the first condition in which it was asked
        pairs.setdefault((a.group, a.id), {}).setdefault(a.stage, a)
    sides = [[p for p in pairs.values() if p["after"].label == label] for label in ("harmful", "benign")]
    for side in sides:
        side.sort(key=lambda p: p["before"].verdict == p["after"].verdict)
    width, lines = max(30, (shutil.get_terminal_size((100, 24)).columns - 3) // 2), list[str]()
    for pair in [p for both in zip_longest(*sides) for p in both if p][:n]:
        asked, texts = pair["before"], [one_line(pair[stage].response) for stage in ("before", "after")]
        columns = [
            textwrap.wrap(f"{pair[s].verdict}: {t}", width) for s, t in zip(("before", "after"), texts, strict=True)
        ]
        lines += ["", f"{asked.group}, {asked.condition}: {shown(asked.question or asked.id)}"]
        lines += [f"{a:{width}} | {b}" for a, b in zip_longest(*columns, fillvalue="")]
    return "\n".join([f"{'before':{width}} | after", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help='name or folder of any LALM, or "demo"')
    parser.add_argument("--harmful", required=True, help="questions to refuse")
    parser.add_argument(
        "--benign", required=True, help="questions to answer; may be the same file, if rows have labels"
    )
    parser.add_argument("--test", action=Groups, default={}, **TEST)
    parser.add_argument("--out", type=Path, required=True, help="folder for adapter and report")
    parser.add_argument("--limit", type=int, help="use so many questions of each side only: does everything run?")
    parser.add_argument(
        "--auto", action="store_true", help="ask the model for its best refusal prompt and its refusals' words"
    )
    args = parser.parse_args()
    if args.limit is not None and args.limit < 8:
        parser.error("--limit must be at least 8")
    questions = [load_examples(getattr(args, label), label) for label in ("harmful", "benign")]
    if args.limit:
        questions = [spread(rows, args.limit) for rows in questions]
        args.test = {group: spread(rows, args.limit // 4) for group, rows in args.test.items()}
    train, held = hold_out([*chain(*questions)])
    dev, rest = (held, []) if args.test else hold_out(held, 0.5)
    test: dict[str, list[Example]] = args.test or grouped(rest)

    model = open_model(args.model, **({"refusal_prompt": "auto", "refusal": "auto"} if args.auto else {}))
    if not all(e.has(c) for e in train for c in model.config.conditions):
        model.config = replace(model.config, conditions=("text-only",))
    if args.limit:
        model.config = replace(model.config, epochs=1)
    asked = possible(chain(*test.values()))
    print(plan(model, train, dev, test))
    model.readable([*chain(*test.values(), dev)], asked)  # what can't be asked, or saved, is said before the work
    check_folder(args.out / "adapter", overwrite=True)

    keep = {} if args.limit else {"checkpoint_dir": args.out / "checkpoints", "resume": True}
    harmful, benign = ([e for e in train if e.label == label] for label in ("harmful", "benign"))
    model.fit(harmful, benign, preflight=8 if args.limit else 32, **keep)
    model.calibrate(grouped(dev), possible(dev), max_new_tokens=16 if args.limit else 24)
    report = model.evaluate(test, asked, max_new_tokens=16 if args.limit else 64)
    add_maps(report, model, test, asked)
    report.settings |= origin()
    page = write_page(report, args.out)
    model.save(args.out / "adapter", overwrite=True)

    print(f"\n{report}\n{side_by_side(report)}\n")
    if torch.accelerator.is_available():
        print(f"{torch.accelerator.max_memory_allocated() / 1e9:.1f} GB were used at most.")
    if args.limit:
        print("This was a trial run on a few questions: its figures mean nothing. Leave --limit out for the real one.")
    adapter, same = args.out / "adapter", f"--model {args.model} --adapter {args.out / 'adapter'}"
    print(
        f"Read every answer:      {page}\n"
        f"Ask other questions:    python examples/evaluate.py {same} --test harmful=FILE\n"
        f"Put them in other ways: python examples/transfer.py {same} --out {args.out}-2\n"
        f'Use it:                 model = RRS.load("{adapter}", base_model, processor); model.generate("Hello!")'
    )


if __name__ == "__main__":
    main()
