"""Do one learning rate and one penalty suit models of every size? Trains the same items on random models and compares.

    python examples/scaling.py                        # random models of several widths and depths; two minutes
    python examples/scaling.py --adapter out/adapter  # what an adapter of the demo did, in the same figures

What is compared does not depend on a model's size: the update relative to the weights, ‖ΔW‖ / ‖W‖ over all modules that
get a LoRA, and the progress, the objective at the end over that at the start. The penalty is given relative to both
terms that it stands between: κ = penalty · Σ‖W‖² / (objective at the start).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchmark import SIZES, random_lalm

from rrs import RRS, RRSConfig, load_examples

DATA = Path(__file__).resolve().parent / "data" / "train_text.jsonl"
CONFIG = RRSConfig(
    conditions=("text-only",), lora_alpha=32.0, lora_dropout=0.0, penalty=0.0, epochs=5, batch_size=16, accumulate=1
)  # fmt: skip
SHAPES = ((64, 2), (128, 2), (256, 2), (128, 6))  # width, blocks
RATES, KAPPAS = (2.5e-4, 1e-3, 4e-3), (10.0, 100.0, 1000.0)


def random_model(width: int, blocks: int) -> RRS:
    """A Qwen2-Audio with random weights of the variance that keeps activations as large as they came in."""
    text = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": blocks}
    SIZES["scaling"] = {**SIZES["tiny"], "text": {**SIZES["tiny"]["text"], **text}}
    lalm, processor = random_lalm("scaling", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    model = RRS(lalm, processor, CONFIG, verbose=False)
    with torch.no_grad():
        for module in model.location.layers.modules():
            if isinstance(module, torch.nn.Linear):
                noise = torch.randn(module.weight.shape, generator=generator)
                module.weight.copy_(noise / math.sqrt(module.in_features))
    return model


def figures(model: RRS) -> tuple[float, float, float]:
    """‖ΔW‖ / ‖W‖, progress, and Σ‖W‖² over the objective at the start, of the adapter that was trained."""
    assert model.lora is not None
    modules = [model.model.get_submodule(path) for path in model.lora.paths]
    weights = sum(float(m.weight.detach().float().square().sum()) for m in modules)
    losses = [row["objective"] for row in model.history]
    update = math.sqrt(float(model.lora.penalty().detach()) / weights)
    return update, sum(losses[-4:]) / len(losses[-4:]) / losses[0], weights / losses[0]


def trained(width: int, blocks: int, rate: float, kappa: float, sides: Sequence[Sequence]) -> list[str]:
    """A line of the table."""
    model = random_model(width, blocks)
    items = model.prepare(*sides, "text-only").items
    if kappa:  # a first run tells what the penalty is relative to
        model.config = replace(CONFIG, epochs=1)
        relative = figures(model.train(items))[2]
    model.config = replace(CONFIG, learning_rate=rate, penalty=kappa / relative if kappa else 0.0)
    update, progress, _ = figures(model.train(items))
    return [str(width), str(blocks), f"{rate:g}", f"{kappa:g}", f"{update:.4f}", f"{progress:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, help="of the demo, instead of random models")
    args = parser.parse_args()
    if args.adapter:
        from demo_lalm import fast_dtype, load_demo

        model = RRS.load(args.adapter, *load_demo(dtype=fast_dtype()), verbose=False)
        update, progress, relative = figures(model)
        kappa = model.record["config"]["penalty"] * relative
        print(f"‖ΔW‖/‖W‖ {update:.4f}, progress {progress:.2f}, κ {kappa:.0f}, {len(model.history)} steps")
        return
    rows = load_examples(DATA)
    sides = [[e for e in rows if e.label == label][:640:10] for label in ("harmful", "benign")]
    head = ["width", "blocks", "rate", "κ", "‖ΔW‖/‖W‖", "progress"]
    for cells in (head, ["---"] * len(head)):
        print(f"| {' | '.join(cells)} |")
    for rate, kappa in [*((rate, 0.0) for rate in RATES), *((RATES[-1], kappa) for kappa in KAPPAS)]:
        for width, blocks in SHAPES:
            print(f"| {' | '.join(trained(width, blocks, rate, kappa, sides))} |", flush=True)


if __name__ == "__main__":
    main()
