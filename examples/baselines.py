"""What `compare.py` sets beside RRS, as functions: SARSteer's steering, and fine-tuning on answers (SFT)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

from rrs import RRS, Example, TrainItem, judge_refusals
from rrs.evaluate import answer_text, generate_ids
from rrs.hooks import Prompt, Reader, frozen, steer

SARSTEER_PROMPT, COMPONENTS = "I cannot assist with that.", 10  # as published
REFUSAL = "I'm sorry, but I can't help with that."

# -- SARSteer


@contextmanager
def steered(model: RRS, vectors: Mapping[str, Tensor], alpha: float, condition: str) -> Iterator[None]:
    """`vectors`: of each condition, `[blocks, hidden]`."""
    with model.disabled(), ExitStack() as stack:
        for block, v in enumerate(alpha * vectors[condition]):
            at = {"layer": block, "location": model.location}

            def generated(h: Tensor, v: Tensor = v) -> Tensor:
                return h + v.to(h) if h.shape[-2] == 1 else h  # they come one by one, prompts do not

            stack.enter_context(steer(model.model, v, position=-1, **at))
            stack.enter_context(steer(model.model, generated, **at))
        yield


def sarsteer_vectors(
    model: RRS, harmful: Sequence[Example], benign: Sequence[Example], condition: str, k: int = COMPONENTS
) -> Tensor:
    """SARSteer's direction for every block `[blocks, hidden]`: mean of what the refusal prompt adds, without the part
    in the space of the first `k` principal components of harmless inputs."""
    refused = model.extract(harmful, condition, refusal_prompt=SARSTEER_PROMPT, all_layers=True)
    added = refused - model.extract(harmful, condition, all_layers=True)  # [n, 1 + blocks, hidden]
    direction = added.mean(0)[1:]
    safe = model.extract(benign, condition, all_layers=True)[:, 1:].transpose(0, 1)  # [blocks, n, hidden]
    basis = torch.linalg.svd(safe - safe.mean(1, keepdim=True), full_matrices=False).Vh[:, :k]  # [blocks, k, hidden]
    return direction - (direction[:, None] @ basis.mT @ basis)[:, 0]


# -- SFT


def own_answers(model: RRS, examples: Sequence[Example], condition: str, refusing: bool, limit: int) -> list[TrainItem]:
    """Each example with the token ids of what the vanilla model says to it, or says when it is told to refuse: if that
    is a refusal with the same first token as RRS's, which `calibrate` counts, else those words, or `REFUSAL`."""
    examples = [e for e in examples if e.has(condition)]
    with model.disabled(), frozen(model.model):
        prompts = [model.read(e, condition, refusal_prompt=refusing) for e in examples]
        said = generate_ids(model.reader, model.tokenizer, prompts, limit)
    if refusing:
        texts = [answer_text(model.tokenizer, ids) for ids in said]
        verdicts = judge_refusals([e.text or "" for e in examples], texts)
        words, token = model.token_ids(model.config.refusal), model.refusal_token
        fixed = [*(words if len(words) > 1 else model.token_ids(REFUSAL)), model.tokenizer.eos_token_id][:limit]
        said = [ids if v == "refusal" and ids[0] == token else fixed for ids, v in zip(said, verdicts, strict=True)]
    return [TrainItem(e, condition, torch.tensor(ids)) for e, ids in zip(examples, said, strict=True) if ids]


def negative_log_likelihood(reader: Reader, prompts: Sequence[Prompt], items: Sequence[TrainItem]) -> Tensor:
    """SFT's objective: the mean over each item's answer (its target, token ids `[length]`), in nats, `[batch]`."""
    longer = [prompt.extended(item.target.tolist()) for prompt, item in zip(prompts, items, strict=True)]
    hidden = reader.last_hidden(longer, 1 + max(len(item.target) for item in items))  # [batch, last, hidden]
    # the vector at a position predicts the token behind it
    logits = [reader.logits(h[-1 - len(item.target) : -1]) for h, item in zip(hidden, items, strict=True)]
    losses = [F.cross_entropy(x, item.target.to(x.device)) for x, item in zip(logits, items, strict=True)]
    return torch.stack(losses)
