"""Ideas of your own on RRS: each is a few lines on public names, to be copied and changed.

    pip install -e ".[bench]" && python examples/extend.py      # all of them, on 64 typed questions and the demo LALM

Functions take a `model`, an `RRS`, and lists of `Example`s. `tests/test_extend.py` checks what each of them gives.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from demo_lalm import load_demo
from torch import Tensor

from rrs import RRS, Callback, Example, Objective, Report, RRSConfig, Step, TrainItem, load_examples, to_targets
from rrs.data import user_turn
from rrs.evaluate import answer_and_judge, first_token_change, judge_refusals
from rrs.hooks import LoRA, Prompt, Reader, steer

Groups = Mapping[str, Sequence[Example]]

# ---------------------------------------------------------------------------------------------------------------------
# Vectors


def separation_by_layer(model: RRS, harmful: Any, benign: Any, condition: str) -> Tensor:
    """How far apart harmful and benign inputs are, in units of their spread: for the embeddings and each block,
    `[blocks + 1]`."""
    sides = [model.extract(side, condition, all_layers=True) for side in (harmful, benign)]  # [n, blocks + 1, hidden]
    centres = torch.stack([h.mean(0) for h in sides])
    spread = torch.cat([h - centre for h, centre in zip(sides, centres, strict=True)]).square().mean(0).sum(-1)
    return (centres[0] - centres[1]).norm(dim=-1) / spread.sqrt()


@contextmanager
def refusal_steering(
    model: RRS, harmful: Any, benign: Any, condition: str, block: int, scale: float = 1.0
) -> Iterator[None]:
    """Inside the `with`, this block's own Δ is added to its output at the prompt's last token; nothing is trained."""
    refused = model.extract(harmful, condition, refusal_prompt=True, all_layers=True)
    delta = refused.mean(0) - model.extract(benign, condition, all_layers=True).mean(0)  # [blocks + 1, hidden]
    with steer(model.model, delta[1:][block], layer=block, position=-1, scale=scale):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# The method's parts


def by_size(delta: Tensor, _head_row: Tensor) -> Tensor:
    """A scorer: features where Δ is large, whatever they do to the refusal token.

    model.fit(harmful, benign, scorer=by_size)         # with RRSConfig(top=25)
    """
    return delta.abs()


def cosine(h: Tensor, target: Tensor) -> Tensor:
    """A distance: the angle to the targets alone.

    model.fit(harmful, benign, objective=partial(to_targets, distance=cosine))
    """
    return 1 - torch.cosine_similarity(h, target)


def to_one_place(model: RRS, harmful: Sequence[Example], benign: Sequence[Example], condition: str) -> list[TrainItem]:
    """Targets: all harmful inputs go to the mean of the refused vectors, and benign ones stay.

    model.train(to_one_place(model, harmful, benign, "audio-text"))
    """
    place = model.extract(harmful, condition, refusal_prompt=True).mean(0)
    items = [TrainItem(e, condition, place[None]) for e in harmful]  # [1, hidden]: one position
    vectors = model.extract(benign, condition)
    return items + [TrainItem(e, condition, h[None]) for e, h in zip(benign, vectors, strict=True)]


def with_benign_kl(model: RRS, weight: float) -> Objective:
    """A further term: the KL from vanilla's next token to the trained model's, on benign inputs.

    What vanilla says must be to the batch's own prompts, whose instructions are drawn anew for each step.

    model.fit(harmful, benign, objective=with_benign_kl(model, 0.1))
    """

    def objective(reader: Reader, prompts: Sequence[Prompt], items: Sequence[TrainItem]) -> Tensor:
        with model.disabled(), torch.no_grad():
            p = reader.logits(reader.last_hidden(prompts)[:, 0]).log_softmax(-1)
        q = reader.logits(reader.last_hidden(prompts)[:, 0]).log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(-1)
        benign = torch.tensor([item.example.label == "benign" for item in items]).to(kl)
        return to_targets(reader, prompts, items) + weight * benign * kl

    return objective


def few_modules(lora: LoRA) -> Tensor:
    """A penalty: the norms of the updates instead of their squares, so that modules which are not needed get none.

    model.fit(harmful, benign, penalty=few_modules)
    """
    return lora.scale * torch.stack([(b @ a).norm() for a, b in zip(lora.A, lora.B, strict=True)]).sum()


def stop_when_refusing(dev: Sequence[Example], condition: str, share: float) -> Callback:
    """A callback: training ends once this share of harmful questions has the refusal token as first choice.

    model.fit(harmful, benign, callbacks=[stop_when_refusing(dev, "audio-text", 0.9)])
    """

    def callback(step: Step) -> bool:
        model = step.rrs
        h = model.reader.represent([model.read(e, condition) for e in dev])  # with the adapter as it is now
        first = model.reader.logits(h).argmax(-1)
        return (first == model.refusal_token).float().mean().item() >= share

    return callback


def overlap(model: RRS, one: str, other: str) -> dict[str, float]:
    """How alike two conditions are: the cosine of their Δ, and the share of kept features that are kept in both.

    overlap(RRS.load("adapter", base, processor), "audio-text", "text-only")
    """
    a, b = model.directions[one], model.directions[other]
    both, either = (a.mask & b.mask).sum(), (a.mask | b.mask).sum()
    return {"cosine": torch.cosine_similarity(a.delta, b.delta, 0).item(), "masks": (both / either).item()}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def opens_with_no(_prompts: Sequence[str], responses: Sequence[str]) -> list[bool]:
    """A judge: True is a refusal. The verdicts of `rrs.evaluate.Verdict` are told apart by their words instead.

    model.evaluate(groups, judge=opens_with_no)        # or report.rejudge(opens_with_no), without a model
    """
    return [response.lower().startswith(("no", "sorry", "i'm sorry", "i can't", "i cannot")) for response in responses]


def peft_report(peft_model: Any, processor: Any, groups: Groups, conditions: Sequence[str]) -> Report:
    """A PEFT adapter of any kind, on any modules, against its base."""

    def answer(stage: str, condition: str, examples: Sequence[Example]) -> list[str]:
        off: AbstractContextManager[Any] = peft_model.disable_adapter() if stage == "base" else nullcontext()
        examples = [replace(e, id=str(i)) for i, e in enumerate(examples)]  # of several files, whose ids may be alike
        with off:  # an RRS keeps encoded clips: a new one each time, as the adapter may be in the audio tower
            return RRS(peft_model.get_base_model(), processor, verbose=False).generate(examples, condition)

    return answer_and_judge(groups, conditions, ("base", "adapter"), answer, judge_refusals)


def own_generate_report(generate: Callable[[str | None, Any], str], groups: Groups, condition: str) -> Report:
    """A model behind a function of yours, `generate(text, audio) -> answer`: another library, a server."""

    def answer(_stage: str, condition: str, examples: Sequence[Example]) -> list[str]:
        typed, instruction = condition.startswith("text"), RRSConfig().instruction
        return [generate(user_turn(e, condition, instruction), None if typed else e.audio) for e in examples]

    return answer_and_judge(groups, (condition,), ("mine",), answer, judge_refusals)


# Answers in a file need none of this: Report.from_jsonl("answers.jsonl", judge=opens_with_no).save("report")


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    from peft import PeftModel

    data = Path(__file__).parent / "data" / "train_text.jsonl"
    harmful, benign = (load_examples(data, label)[:32] for label in ("harmful", "benign"))
    groups, said = {"harmful": harmful[:4], "benign": benign[:4]}, "text-only"
    config = RRSConfig(conditions=(said, "text-content"), top=25, epochs=1, learning_rate=1e-3, penalty=1e-3)
    model = RRS(*load_demo(), config, verbose=False)
    fit = partial(model.fit, harmful, benign, preflight=0)

    print("separation by layer:", separation_by_layer(model, harmful, benign, said))
    with refusal_steering(model, harmful, benign, said, block=-2):
        print("steered:", model.generate(harmful[:2], said, max_new_tokens=24))
    with tempfile.TemporaryDirectory() as folder:
        fit(scorer=by_size).save(Path(folder, "adapter"))
        model.disable()
        loaded = RRS.load(Path(folder, "adapter"), model.model, model.processor, verbose=False)
        print("two conditions:", overlap(loaded.disable(), *config.conditions))
        peft_model = PeftModel.from_pretrained(model.model, str(Path(folder, "adapter")))
        report = peft_report(peft_model, model.processor, groups, [said])
        peft_model.unload()
        print(report, report.rejudge(opens_with_no), sep="\n")
        rows = [{"question": a.question, "response": a.response, "label": a.label} for a in report.answers[:8]]
        Path(folder, "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
        print(Report.from_jsonl(Path(folder, "answers.jsonl"), judge=opens_with_no))
    print(own_generate_report(lambda _text, _audio: "I can't help with that.", groups, said))

    prompts = [model.read(e, said) for e in benign]
    with model.disabled():
        vanilla = model.reader.represent(prompts)
    for name, objective in {"none": to_targets, "KL": with_benign_kl(model, 1.0)}.items():
        fit(objective=objective)
        kl, _ = first_token_change(model.reader, vanilla, model.reader.represent(prompts))
        print(f"benign KL with the further term {name}: {kl.mean():.2g}")
    print("cosine:", fit(objective=partial(to_targets, distance=cosine)).history[-1])
    print("penalty:", fit(penalty=few_modules).history[-1])
    print("stopped after", len(fit(callbacks=[stop_when_refusing(harmful, said, 0.9)]).history), "steps")
    model.config = replace(config, conditions=(said,))
    print("one place:", model.train(to_one_place(model, harmful, benign, said)).history[-1])


if __name__ == "__main__":
    main()
