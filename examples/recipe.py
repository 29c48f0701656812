"""The published recipe from its usual parts, as one would write it today; what `benchmark.py` measures RRS against.

Vectors are extracted one sample at a time and kept in files; PEFT's LoRA and transformers' Trainer with a
`compute_loss` that runs the whole model (processor and audio tower for every prompt of every step, hidden states of all
layers, all logits), takes targets from the files and adds ‖(α/r)·B·A‖² of dense products. Where there was a choice, it
has the faster one: `.npy` files, left-padded batches, Trainer's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from rrs import Example, TrainItem, draw
from rrs.hooks import LoRA, linear_paths, locate

if TYPE_CHECKING:
    from benchmark import Setting

Step = Callable[[], None]


def inputs_of(processor: Any, examples: Sequence[Example], texts: Sequence[str]) -> Any:
    """Left-padded model inputs from files."""
    chats = [[{"role": "user", "content": [{"type": "audio"}, {"type": "text", "text": t}]}] for t in texts]
    prompts = [processor.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in chats]
    waves = [soundfile.read(e.audio, dtype="float32")[0] for e in examples]
    processor.tokenizer.padding_side = "left"
    return processor(text=prompts, audio=waves, sampling_rate=16000, padding=True, return_tensors="pt")


@torch.no_grad()
def their_extraction(setting: Setting, model: Any, processor: Any) -> dict[str, Path]:
    """R_b, R_h, R_h+ sample by sample; a file of the target for each example."""
    c, dtype = setting.config, next(model.parameters()).dtype

    def extract(examples: Sequence[Example], text: str) -> Tensor:
        rows = []
        for e in examples:
            inputs = inputs_of(processor, [e], [text]).to(setting.device)
            inputs["input_features"] = inputs["input_features"].to(dtype)
            out = model(**inputs, output_hidden_states=True, use_cache=False)
            rows.append(out.hidden_states[-1][0, -1].float().cpu())
        return torch.stack(rows)

    benign, harmful = extract(setting.benign, c.instruction), extract(setting.harmful, c.instruction)
    delta = extract(setting.harmful, f"{c.instruction} {c.refusal_prompt}").mean(0) - benign.mean(0)
    token = processor.tokenizer(c.refusal, add_special_tokens=False)["input_ids"][0]
    move = delta * (model.lm_head.weight[token].float().cpu() * delta > 0)
    files = {}
    for e, row in zip([*setting.harmful, *setting.benign], [*(harmful + move), *(benign - move)], strict=True):
        files[e.id] = setting.folder / f"{e.id}.npy"
        np.save(files[e.id], row.numpy())
    return files


class Published(transformers.Trainer):
    """The recipe's loss, on batches in the order of the data set; `losses` has one for each batch."""

    penalty = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # Trainer then divides by the number of accumulated batches
        self.losses: list[Tensor] = []
        self.lora = [m for m in self.model.modules() if hasattr(m, "lora_A")]

    def _get_train_sampler(self, *_args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_kwargs: Any) -> Any:
        targets = inputs.pop("targets")
        out = model(**inputs, output_hidden_states=True, use_cache=False)
        loss = F.mse_loss(out.hidden_states[-1][:, -1].float(), targets)
        for m in self.lora:
            update = m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight
            loss = loss + self.penalty * (update**2).sum()
        self.losses.append(loss.detach())
        return (loss, out) if return_outputs else loss


class AfterStep(transformers.TrainerCallback):
    def __init__(self, step: Step) -> None:
        self.step = step

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.step()


def their_fit(setting: Setting, model: Any, processor: Any, step: Step) -> list[float]:
    """As `our_fit`."""
    import peft

    c, files, examples = (
        setting.config,
        their_extraction(setting, model, processor),
        [*setting.harmful, *setting.benign],
    )
    step()
    paths = linear_paths(locate(model), c.target_modules)
    start = LoRA(model, paths, r=c.lora_r, alpha=c.lora_alpha, seed=c.seed)
    settings = peft.LoraConfig(r=c.lora_r, lora_alpha=c.lora_alpha, lora_dropout=0.0, target_modules=paths)
    model = peft.get_peft_model(model, settings)
    wrapped = dict(model.base_model.model.named_modules())
    with torch.no_grad():
        for path, a in zip(paths, start.A, strict=True):
            wrapped[path].lora_A["default"].weight.copy_(a)
    items = [TrainItem(e, "audio-text", torch.empty(0)) for e in examples]
    steps = c.epochs * -(-len(items) // (c.batch_size * c.accumulate))
    order = [(i.example, text) for k in range(steps) for batch in draw(items, c, k) for i, text in batch]

    def collate(rows: Sequence[tuple[Example, str]]) -> dict[str, Tensor]:
        chosen = [e for e, _ in rows]
        targets = torch.from_numpy(np.stack([np.load(files[e.id]) for e in chosen]))
        return {**inputs_of(processor, chosen, [t for _, t in rows]), "targets": targets}

    cpu = setting.device.type == "cpu"
    arguments = transformers.TrainingArguments(
        output_dir=str(setting.folder / "trainer"), max_steps=steps, per_device_train_batch_size=c.batch_size,
        gradient_accumulation_steps=c.accumulate, seed=c.seed, learning_rate=c.learning_rate,
        lr_scheduler_type="linear", adam_beta1=c.betas[0], adam_beta2=c.betas[1], weight_decay=c.weight_decay,
        max_grad_norm=c.max_grad_norm, bf16=not cpu, use_cpu=cpu, remove_unused_columns=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Published(model, arguments, train_dataset=order, data_collator=collate, callbacks=[AfterStep(step)])
    trainer.penalty = c.penalty
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    losses = torch.stack(trainer.losses).view(-1, c.accumulate).mean(1)
    model.unload()  # the model is plain again
    return [float(x) for x in losses]
