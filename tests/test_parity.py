"""RRS as published, written out the long way, and ours beside it at every step.

The reference is the recipe of section 3 and of the authors' training script, from usual parts: the processor for every
prompt, the whole model with its audio tower, hidden states of all layers, PEFT's LoRA, ‖(α/r)·B·A‖² on dense matrices.
"""

from __future__ import annotations

import peft
import pytest
import torch
from conftest import rows, tiny_qwen2_audio

import rrs
from rrs import RRS, RRSConfig, make_items
from rrs.data import load_examples
from rrs.hooks import linear_paths, locate

HARMFUL, BENIGN = rows("harmful", 9), rows("benign", 8)
INSTRUCTION = "Please generate detailed steps for the question in the audio."
REFUSAL = "(Please generate refusal response because the question violates safety policy)"


def reference_inputs(processor, row, text):
    chat = [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    return processor(text=prompt, audio=row["audio"]["array"], sampling_rate=16000, return_tensors="pt")


@torch.no_grad()
def reference_hidden(model, processor, data, text):
    """R: last layer, last token, one sample at a time."""
    vectors = []
    for row in data:
        out = model(**reference_inputs(processor, row, text), output_hidden_states=True)
        vectors.append(out.hidden_states[-1][0, -1])
    return torch.stack(vectors)


def reference_mask(delta, row, top):
    """Top-m% of c_i = w_i Δ_i, by sorting."""
    c = [float(w * d) for w, d in zip(row.detach(), delta, strict=True)]
    if top == "positive":
        return torch.tensor([x > 0 for x in c])
    kept = sorted(range(len(c)), key=lambda i: c[i], reverse=True)[: round(len(c) * top / 100)]
    return torch.tensor([i in kept for i in range(len(c))])


def reference_targets(model, processor, top):
    r_b = reference_hidden(model, processor, BENIGN, INSTRUCTION)
    r_h = reference_hidden(model, processor, HARMFUL, INSTRUCTION)
    r_plus = reference_hidden(model, processor, HARMFUL, f"{INSTRUCTION} {REFUSAL}")
    delta = r_plus.mean(0) - r_b.mean(0)
    head_row = model.lm_head.weight[processor.tokenizer.convert_tokens_to_ids("I")]
    mask = reference_mask(delta, head_row, top)
    move = torch.where(mask, delta, torch.zeros_like(delta))
    return delta, mask, r_h + move, r_b - move


@pytest.mark.parametrize("top", [12.5, 25, 50, "positive"])
def test_delta_mask_and_targets(top):
    delta, mask, harmful, benign = reference_targets(*tiny_qwen2_audio(), top)
    ours = RRS(*tiny_qwen2_audio(), RRSConfig(top=top), verbose=False)
    r_b, r_h, r_plus = (
        ours.extract(examples, "audio-text", refusal_prompt=refused)
        for examples, refused in ((BENIGN, False), (HARMFUL, False), (HARMFUL, True))
    )
    direction = ours.select(r_b, r_plus)
    examples = load_examples(HARMFUL), load_examples(BENIGN)
    items = make_items(examples[0], "audio-text", r_h, direction.move)
    items += make_items(examples[1], "audio-text", r_b, -direction.move)
    prepared = ours.prepare(*examples, "audio-text")
    for found, things in ((direction, items), (prepared.direction, prepared.items)):
        assert torch.allclose(found.delta, delta, atol=1e-5)
        assert torch.equal(found.mask, mask)
        assert [i.example.id for i in things] == [row["id"] for row in HARMFUL + BENIGN]
        targets = torch.stack([i.target for i in things])[:, 0]  # one position each
        assert torch.allclose(targets, torch.cat([harmful, benign]), atol=1e-5)


def reference_losses(config, plan, initial, steps):
    """The first losses of the published training recipe on a given order of batches."""
    model, processor = tiny_qwen2_audio()
    _, _, goal_h, goal_b = reference_targets(model, processor, config.top)
    goals = dict(zip([r["id"] for r in HARMFUL + BENIGN], [*goal_h, *goal_b], strict=True))
    by_id = {r["id"]: r for r in HARMFUL + BENIGN}

    settings = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0,
        target_modules=linear_paths(locate(model), config.target_modules),
    )
    model = peft.get_peft_model(model, settings).eval()
    lora = [m for m in model.modules() if isinstance(m, peft.tuners.lora.Linear)]
    for module, a in zip(lora, initial, strict=True):
        module.lora_A["default"].weight.data.copy_(a)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 - t / len(plan))
    processor.tokenizer.padding_side = "left"
    losses = []
    for group in plan[:steps]:
        step_loss = 0.0
        for batch in group:
            chats = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": text}]}],
                    add_generation_prompt=True,
                    tokenize=False,
                )
                for _, text in batch
            ]
            audio = [by_id[i]["audio"]["array"] for i, _ in batch]
            inputs = processor(text=chats, audio=audio, sampling_rate=16000, padding=True, return_tensors="pt")
            h = model(**inputs, output_hidden_states=True).hidden_states[-1][:, -1]  # [batch, hidden]
            loss = torch.nn.functional.mse_loss(h, torch.stack([goals[i] for i, _ in batch]))
            for m in lora:
                update = m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
                loss = loss + config.penalty * (update**2).sum()
            (loss / len(group)).backward()
            step_loss += loss.item() / len(group)
        torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(step_loss)
    return losses


@pytest.mark.parametrize("penalty", [1.0, 1e-2])
def test_the_first_twenty_losses(penalty, monkeypatch):
    config = RRSConfig(lora_dropout=0.0, learning_rate=1e-3, epochs=8, penalty=penalty)
    ours = RRS(*tiny_qwen2_audio(), config, verbose=False)

    # Record what our loop draws (order and instructions), and A before the first step.
    plan, initial, draw = [], [], rrs.draw

    def recording(*args):
        if not initial:
            initial.extend(a.detach().clone() for a in ours.lora.A)
        batches = draw(*args)
        plan.append([[(item.example.id, text) for item, text in batch] for batch in batches])
        return batches

    monkeypatch.setattr(rrs, "draw", recording)
    ours.fit(HARMFUL, BENIGN, preflight=0)
    assert len(plan) == len(ours.history) >= 20
    per_epoch = len(plan) // config.epochs
    for k in range(0, len(plan), per_epoch):  # every epoch visits every input once
        seen = [i for group in plan[k : k + per_epoch] for batch in group for i, _ in batch]
        assert sorted(seen) == sorted(row["id"] for row in HARMFUL + BENIGN)

    reference = reference_losses(config, plan, initial, 20)
    losses = [row["loss"] for row in ours.history[:20]]
    assert losses == pytest.approx(reference, abs=1e-4)
    assert losses[0] != pytest.approx(losses[19], abs=1e-3)  # and it is training


def test_config_has_the_published_prompts():
    assert RRSConfig().instruction == INSTRUCTION
    assert RRSConfig().refusal_prompt == REFUSAL
    assert RRSConfig().prompts[:2] == ("Answer the question in the audio.", "Follow the instruction in the audio.")
    assert {r["id"] for r in HARMFUL} == {e.id for e in load_examples(HARMFUL)}
