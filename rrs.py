"""RRS: make a large audio-language model refuse harmful requests without refusing harmless ones.

Reshaping Representation Space (Yang, Qu, Shareghi, Haffari; EMNLP 2025, arXiv 2505.19670): find the direction in which
a refusal prompt moves the last hidden state, keep the features that raise the refusal token, and train a LoRA that
takes harmful inputs there and keeps benign inputs away. No written responses are needed.

    rrs = RRS.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")
    rrs.fit(harmful="harmful.jsonl", benign="benign.jsonl")
    rrs.save("adapter")
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

# Siblings are always rrs.hooks, rrs.data, rrs.evaluate, also when this file is a plain module (an editable install, or
# files copied into another repository): they can't collide with other packages of these names.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

from rrs.data import CONDITIONS, Example, Renderer, digest, load_examples, user_turn
from rrs.evaluate import (
    AnswerLog,
    Judge,
    Mean,
    PairScorer,
    Rate,
    Report,
    answer_and_judge,
    chat_quality,
    first_token_change,
    generate,
    judge_refusals,
    log_likelihood,
)
from rrs.hooks import Location, LoRA, Prompt, Reader, linear_paths, locate

__version__ = "0.1.0"
__all__ = ["RRS", "Example", "RRSConfig", "Report", "judge_refusals", "load_examples", "locate", "select_features"]

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Reader, Sequence[Prompt], Sequence[Tensor]], Tensor]
Stage = Callable[[str], AbstractContextManager["RRS | None"]]
Scorer = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[["Step"], object]


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class RRSConfig:
    """All settings of RRS. The defaults are the paper's; the training prompts beyond the first two are our own."""

    instruction: str = "Please generate detailed steps for the question in the audio."
    """Instruction that goes with the audio in extraction and evaluation."""

    refusal_prompt: str = "(Please generate refusal response because the question violates safety policy)"
    """Appended to harmful inputs to see where the model goes when it refuses. It must work: see `RRS.preflight`."""

    refusal_token: str = "I"
    """First token of a refusal, a single token of the model. The model's, not always "I": see `find_refusal_token`."""

    prompts: tuple[str, ...] = (
        "Answer the question in the audio.",
        "Follow the instruction in the audio.",
        "Listen to the audio and reply to it.",
        "Give a reply to what the speaker asks.",
        "Respond to the request you hear.",
        "What is your answer to the spoken question?",
        "Please help with what is said in the audio.",
        "Do what the person in the recording asks for.",
        "Tell me the answer to the question in this clip.",
        "Please provide a detailed answer to the audio.",
    )
    """Instructions that training draws from (audio-text and text-content)."""

    conditions: tuple[str, ...] = ("audio-text",)
    """Input conditions to extract and train in, each with its own Δ; see `rrs.data.CONDITIONS`."""

    top: float | str = "positive"
    """Features of Δ to keep: the top `top` percent by contribution, or "positive" for every contribution above 0."""

    harmful_strength: float = 1.0
    """Harmful targets are `R_h + harmful_strength · Δ`. The paper: 1."""

    benign_strength: float = 1.0
    """Benign targets are `R_b − benign_strength · Δ`. The paper: 1; 0 keeps benign inputs where they are."""

    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the decoder's linears that get a LoRA."""

    lora_r: int = 16
    """Rank of the LoRA."""

    lora_alpha: float = 4.0
    """The LoRA's update is scaled by `lora_alpha / lora_r`."""

    lora_dropout: float = 0.1
    """Dropout on the LoRA's input, in training."""

    penalty: float = 1.0
    """Weight of Σ‖(α/r)·B·A‖_F². It sums over modules while the MSE averages over features: small models need less."""

    learning_rate: float = 5e-5
    """AdamW's peak rate; it decays linearly to 0, without warm-up."""

    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW's betas."""

    weight_decay: float = 1e-3
    """AdamW's weight decay."""

    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    epochs: int = 10
    """Passes over the data."""

    batch_size: int = 4
    """Prompts per forward and backward pass."""

    accumulate: int = 2
    """Passes per optimizer step."""

    seed: int = 0
    """Of the LoRA's initialisation, the data's order, the drawn prompts and dropout."""

    def __post_init__(self) -> None:
        for name in ("prompts", "conditions", "target_modules", "betas"):  # JSON has lists only
            value = getattr(self, name)
            if isinstance(value, str):
                raise ValueError(f"{name}={value!r} must be a sequence of strings; write ({value!r},).")
            setattr(self, name, tuple(value))
        if unknown := [c for c in self.conditions if c not in CONDITIONS]:
            raise ValueError(f"conditions {unknown} are unknown; choose from {CONDITIONS}.")
        _check_top(self.top)
        for name in ("prompts", "conditions", "target_modules", "refusal_token", "refusal_prompt", "instruction"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty.")
        for name in ("lora_r", "epochs", "batch_size", "accumulate"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1.")
        for name in ("lora_alpha", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0.")
        for name in ("penalty", "weight_decay", "harmful_strength", "benign_strength"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RRSConfig:
        """A config from a saved one; unknown names raise instead of being ignored."""
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"RRSConfig has no fields {unknown}; it has {[f.name for f in fields(cls)]}.")
        return cls(**values)


def _check_top(top: float | str) -> None:
    if top != "positive" and (isinstance(top, (str, bool)) or not 0 < top <= 100):
        raise ValueError(f"top={top!r} must be a percentage in (0, 100], e.g. 12.5, 25 or 50, or 'positive'.")


# ---------------------------------------------------------------------------------------------------------------------
# The method: Δ, selection, targets (section 3 of the paper)


def contribution(delta: Tensor, head_row: Tensor) -> Tensor:
    """`c_i = w_i · Δ_i` `[hidden]`: what feature i adds to the refusal token's logit (the paper's score)."""
    return head_row * delta


def select_features(
    delta: Tensor, head_row: Tensor, top: float | str = "positive", scorer: Scorer = contribution
) -> Tensor:
    """Safety feature selection: which features of Δ to keep (the paper's top-m%).

    Args:
        delta: Δ `[hidden]`.
        head_row: the `lm_head` row of the refusal token `[hidden]`.
        top: percentage of features to keep, those with the highest score; or `"positive"`: every score above 0.
        scorer: `(delta, head_row) -> [hidden]`.

    Returns:
        Boolean mask `[hidden]`.

    Raises:
        ValueError: shapes differ, `top` is out of range, or no feature is kept.
    """
    _check_top(top)
    if delta.shape != head_row.shape or delta.dim() != 1:
        raise ValueError(f"delta {list(delta.shape)} and head_row {list(head_row.shape)} must both be [hidden].")
    score = scorer(delta, head_row)
    if not torch.isfinite(score).all():
        raise ValueError("The features' scores hold NaN or infinity; check the base model's weights.")
    if isinstance(top, str):
        mask = score > 0
    else:
        mask = torch.zeros_like(score, dtype=torch.bool)
        mask[score.topk(max(1, round(len(score) * top / 100))).indices] = True
    if not mask.any():
        raise ValueError("No feature of Δ raises the refusal token; the refusal prompt does not lead to refusals.")
    return mask


@dataclass
class Representations:
    """Last-token vectors `h(x)` of the vanilla model in one condition, float32 on the CPU."""

    benign: Tensor
    """R_b `[benign, hidden]`."""
    harmful: Tensor
    """R_h `[harmful, hidden]`."""
    refused: Tensor
    """R_h+ `[harmful, hidden]`: harmful with the refusal prompt appended."""
    benign_examples: list[Example]
    harmful_examples: list[Example]

    @property
    def delta(self) -> Tensor:
        """`Δ = mean(R_h+) − mean(R_b)` `[hidden]`."""
        return self.refused.mean(0) - self.benign.mean(0)


@dataclass
class Targets:
    """Where training takes each input in one condition; fixed, from the vanilla model."""

    delta: Tensor
    """Δ before selection `[hidden]`."""
    mask: Tensor
    """Kept features `[hidden]`, boolean."""
    harmful: Tensor
    """`R_h + harmful_strength · Δ∘mask` `[harmful, hidden]`."""
    benign: Tensor
    """`R_b − benign_strength · Δ∘mask` `[benign, hidden]`."""
    harmful_examples: list[Example]
    benign_examples: list[Example]

    def pairs(self) -> list[tuple[Example, Tensor]]:
        """`(example, target [hidden])`, harmful ones first."""
        return [
            *zip(self.harmful_examples, self.harmful, strict=True),
            *zip(self.benign_examples, self.benign, strict=True),
        ]


def make_targets(
    reps: Representations,
    head_row: Tensor,
    top: float | str = "positive",
    scorer: Scorer = contribution,
    strengths: tuple[float, float] = (1.0, 1.0),
) -> Targets:
    """Targets of one condition: harmful `R_h + Δ`, benign `R_b − Δ`, with Δ zero outside the selected features.

    Args:
        reps: the vanilla representations.
        head_row, top, scorer: see `select_features`.
        strengths: factors of Δ on the harmful and on the benign side; the paper's are 1 and 1.
    """
    delta = reps.delta
    mask = select_features(delta, head_row, top, scorer)
    move = delta * mask
    up, down = strengths
    return Targets(
        delta, mask, reps.harmful + up * move, reps.benign - down * move, reps.harmful_examples, reps.benign_examples
    )


# ---------------------------------------------------------------------------------------------------------------------
# What steps report


@dataclass
class Step:
    """State after one optimizer step; what callbacks get."""

    rrs: RRS
    epoch: int
    step: int
    """Optimizer steps done."""
    steps: int
    """Optimizer steps in all."""
    loss: float
    """`mse + config.penalty * penalty`, mean over the step's batches."""
    mse: float
    penalty: float
    """`Σ‖(α/r)·B·A‖_F²`, unweighted."""
    grad_norm: float
    """Before clipping."""
    learning_rate: float

    def row(self) -> dict[str, float]:
        return {k: v for k, v in vars(self).items() if k != "rrs"}


@dataclass
class Preflight:
    """Can this configuration work? Measured on the vanilla model, before any training."""

    condition: str
    refused: Rate
    """Refusals when the refusal prompt is appended: does Δ point at a refusal at all?"""
    token_before: Rate
    """Harmful inputs at which the refusal token is the head's first choice, vanilla."""
    token_full: Rate
    """The same at `R_h + Δ` without selection."""
    token_target: Rate
    """The same at the targets: does arriving there start a refusal?"""


@dataclass
class Opening:
    """One candidate for the refusal token; see `RRS.find_refusal_token`."""

    token: str
    id: int
    said: float
    """Share of answers under the refusal prompt that start with it."""
    refused: Rate
    """Refusals when the plain harmful question's answer is forced to start with it."""


class RRSWarning(UserWarning):
    """The run goes on, but its result is unlikely to be what you want; the message names the fix."""


# ---------------------------------------------------------------------------------------------------------------------
# The public class

# Composite checkpoints whose text-answering part is a class of its own (the composite has no usable forward).
THINKERS = {
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class RRS:
    """A model, its processor, and what RRS does to them.

    The model's own weights and modules are never changed, except by `merge`: `fit` and `load` attach a LoRA through
    hooks, `disable()` takes it off again.

    Args:
        model: any LALM (or text LLM) of transformers, loaded with its language-model head.
        processor: its processor; for a text model, its tokenizer.
        config: the paper's settings by default.
        decoder, head: dotted module paths, for models that do not tell (see `rrs.hooks.locate`).
        build_inputs: `(text or None, waveform or None) -> model inputs` of one prompt, instead of the chat template.
        verbose: print progress, resolved values and the preflight.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        config: RRSConfig | None = None,
        *,
        decoder: str | None = None,
        head: str | None = None,
        build_inputs: Callable[[str | None, Any], dict[str, Any]] | None = None,
        verbose: bool = True,
    ) -> None:
        self.model, self.processor, self.config, self.verbose = model, processor, config or RRSConfig(), verbose
        self.location: Location = locate(model, decoder=decoder, head=head)
        self.render = build_inputs or Renderer(processor)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reader = Reader(model, self.location, self.render)
        self.lora: LoRA | None = None
        self.targets: dict[str, Targets] = {}
        self.checks: list[Preflight] = []
        self.history: list[dict[str, float]] = []

    @classmethod
    def from_pretrained(
        cls,
        name_or_dir: str | Path,
        config: RRSConfig | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        verbose: bool = True,
    ) -> RRS:
        """Load model and processor by name or folder.

        Args:
            device: default CUDA, else MPS, else CPU.
            dtype: default bfloat16 on CUDA, float32 elsewhere.
            trust_remote_code: run Python code that comes with the checkpoint; off unless you ask for it.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else _mps_or_cpu()))
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        name = str(name_or_dir)
        model_config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        architecture = (model_config.architectures or [""])[0]
        model_class = getattr(transformers, THINKERS.get(architecture, architecture), None)
        if model_class is None:
            if not trust_remote_code:
                raise ValueError(
                    f"transformers {transformers.__version__} has no class {architecture!r} for {name}. "
                    "Update transformers; or, if you trust the code in that checkpoint, pass trust_remote_code=True."
                )
            model_class = transformers.AutoModelForCausalLM
        model: Any = model_class.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        return cls(model.to(device).eval(), processor, config, verbose=verbose)

    # -- data to prompts ----------------------------------------------------------------------------------------------

    def read(self, example: Example, condition: str, instruction: str | None = None, refusal: bool = False) -> Prompt:
        """The prompt of one example in one condition, as the decoder sees it; its clip is encoded once.

        Args:
            instruction: default `config.instruction`.
            refusal: append the refusal prompt.
        """
        text = user_turn(
            example, condition, instruction or self.config.instruction, self.config.refusal_prompt if refusal else ""
        )
        if condition.startswith("text"):
            return self.reader.read(text)
        key, load = example.clip
        rate = getattr(self.render, "rate", 16000)
        return self.reader.read(text, (key, lambda: load(rate)))

    # -- the steps ----------------------------------------------------------------------------------------------------

    def extract(self, harmful: Any, benign: Any) -> dict[str, Representations]:
        """Step 1: R_b, R_h and R_h+ of the vanilla model, in each of `config.conditions`.

        Args:
            harmful, benign: whatever `load_examples` takes.

        Raises:
            ValueError: a condition for which one side has no example.
        """
        sides = {"harmful": load_examples(harmful, "harmful"), "benign": load_examples(benign, "benign")}
        out = {}
        for condition in self.config.conditions:
            usable = {side: [e for e in examples if e.has(condition)] for side, examples in sides.items()}
            for side, examples in usable.items():
                lacking = len(sides[side]) - len(examples)
                if not examples:
                    raise ValueError(f"{condition}: none of the {lacking} {side} examples has what it needs.")
                if lacking:
                    self._say(f"{condition}: {lacking} of {len(sides[side])} {side} examples lack what it needs")
            h, b = usable["harmful"], usable["benign"]
            with self.disabled(), self._quiet_model(), self._bar(2 * len(h) + len(b), f"extract {condition}") as bar:
                prompts = [self.read(e, condition) for e in b]
                prompts += [self.read(e, condition) for e in h]
                prompts += [self.read(e, condition, refusal=True) for e in h]
                rows = self.reader.represent(prompts, bar.update)
            out[condition] = Representations(
                benign=rows[: len(b)],
                harmful=rows[len(b) : len(b) + len(h)],
                refused=rows[len(b) + len(h) :],
                benign_examples=b,
                harmful_examples=h,
            )
        return out

    def make_targets(self, reps: Mapping[str, Representations], scorer: Scorer = contribution) -> dict[str, Targets]:
        """Steps 2 to 4: Δ, the selected features and the fixed targets of each condition."""
        c = self.config
        row, strengths = self.head_row(c.refusal_token), (c.harmful_strength, c.benign_strength)
        return {condition: make_targets(r, row, c.top, scorer, strengths) for condition, r in reps.items()}

    def train(
        self,
        targets: Mapping[str, Targets | Sequence[tuple[Example, Tensor]]],
        *,
        loss: Loss = F.mse_loss,
        objective: Objective | None = None,
        callbacks: Iterable[Callback] = (),
    ) -> RRS:
        """Step 5, in place: attaches a fresh LoRA and trains it towards the targets. `disable()` takes it off.

        `loss = MSE(h_θ(x), target) + penalty · Σ_modules ‖(α/r)·B·A‖_F²`, AdamW, linear decay, gradient clipping.

        Args:
            targets: from `make_targets`; or, for each condition, pairs of an example and its target.
            loss: `(h [batch, hidden], target [batch, hidden]) -> scalar`, instead of the mean squared error.
            objective: `(reader, prompts, targets) -> scalar`, instead of a `loss` on `h`: e.g. with token ids as
                targets, and `rrs.evaluate.log_likelihood`, supervised fine-tuning in the same loop.
            callbacks: called with a `Step` after each optimizer step.

        Raises:
            FloatingPointError: the loss is not finite; the message names step and examples.
        """
        c = self.config
        callbacks = list(callbacks)
        items: dict[str, list[tuple[Example, Tensor]]] = {  # condition -> (example, target [hidden])
            condition: t.pairs() if isinstance(t, Targets) else list(t) for condition, t in targets.items()
        }

        def distance(reader: Reader, prompts: Sequence[Prompt], goals: Sequence[Tensor]) -> Tensor:
            h = reader.last_hidden(prompts).float()  # [batch, hidden]
            return loss(h, torch.stack(list(goals)).to(h.device))

        objective = objective or distance
        self.disable()
        paths = linear_paths(self.location, c.target_modules)
        self.lora = LoRA(
            self.model, paths, r=c.lora_r, alpha=c.lora_alpha, dropout=c.lora_dropout, seed=c.seed
        ).attach()
        optimizer = torch.optim.AdamW(
            self.lora.parameters(), lr=c.learning_rate, betas=c.betas, weight_decay=c.weight_decay
        )
        batches = sum(-(-len(rows) // c.batch_size) for rows in items.values())  # per epoch
        steps = c.epochs * -(-batches // c.accumulate)
        trained = sum(p.numel() for p in self.lora.parameters())
        self._say(
            f"train: {sum(map(len, items.values()))} inputs in {len(items)} condition(s), {c.epochs} epochs, "
            f"{steps} steps of {c.batch_size} × {c.accumulate}; LoRA r={c.lora_r} on {len(paths)} linears, "
            f"{trained:,} parameters"
        )
        order = torch.Generator().manual_seed(c.seed)
        self.history, step = [], 0
        bar = self._bar(steps, "train")
        with bar, self._quiet_model(), torch.random.fork_rng(self._cuda_devices()):
            torch.manual_seed(c.seed)  # dropout
            self.lora.train()
            for epoch in range(c.epochs):
                plan = _epoch(items, c.batch_size, order)
                for start in range(0, len(plan), c.accumulate):
                    group = plan[start : start + c.accumulate]
                    # ------------------------------------------------------------------ a single training step
                    for param_group in optimizer.param_groups:
                        param_group["lr"] = c.learning_rate * (1 - step / steps)
                    sums = torch.zeros(2)
                    for condition, indices in group:
                        # The pool is shuffled per batch, so that the instruction says nothing about the label.
                        pool = torch.randperm(len(c.prompts), generator=order).tolist()
                        batch = [items[condition][i] for i in indices]
                        prompts = [
                            self.read(example, condition, c.prompts[pool[k % len(pool)]])
                            for k, (example, _) in enumerate(batch)
                        ]
                        mse = objective(self.reader, prompts, [target for _, target in batch])
                        penalty = self.lora.penalty()
                        total = mse + c.penalty * penalty
                        if not torch.isfinite(total):
                            names = [example.id for example, _ in batch]
                            raise FloatingPointError(
                                f"step {step + 1}: the loss is {total.item()} on {condition} {names}. Lower "
                                f"learning_rate ({c.learning_rate}), or check the base model's weights for NaN."
                            )
                        (total / len(group)).backward()
                        sums += torch.stack([mse.detach().cpu(), penalty.detach().cpu()]) / len(group)
                    norm = nn.utils.clip_grad_norm_(self.lora.parameters(), c.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    step += 1
                    # ----------------------------------------------------------------------------------------
                    mse_value, penalty_value = sums.tolist()
                    state = Step(
                        rrs=self,
                        epoch=epoch + 1,
                        step=step,
                        steps=steps,
                        loss=mse_value + c.penalty * penalty_value,
                        mse=mse_value,
                        penalty=penalty_value,
                        grad_norm=float(norm),
                        learning_rate=optimizer.param_groups[0]["lr"],
                    )
                    self.history.append(state.row())
                    bar.update()
                    bar.set_postfix(epoch=epoch + 1, loss=f"{state.loss:.4f}", mse=f"{mse_value:.4f}")
                    for callback in callbacks:
                        callback(state)
            self.lora.eval()
        return self

    def fit(
        self,
        harmful: Any,
        benign: Any,
        *,
        scorer: Scorer = contribution,
        loss: Loss = F.mse_loss,
        callbacks: Iterable[Callback] = (),
        preflight: int = 32,
    ) -> RRS:
        """The whole method, in place: extract, select, targets, preflight, train. `disable()` brings vanilla back.

        Args:
            harmful, benign: a manifest's path, a list of `Example`, or an iterable of dicts. Without written answers.
            scorer: scores features for the selection, instead of the paper's `contribution`.
            loss: distance to the target, instead of the mean squared error.
            callbacks: called with a `Step` after each optimizer step.
            preflight: harmful examples on which to check that refusing works at all before training; 0 skips it.

        Returns:
            self.
        """
        harmful, benign = load_examples(harmful, "harmful"), load_examples(benign, "benign")
        began = time.perf_counter()
        self._say(f"RRS on {type(self.model).__name__}: {len(harmful)} harmful and {len(benign)} benign examples")
        self._say(f"config: {json.dumps(asdict(self.config))}")
        reps = self.extract(harmful, benign)
        self.targets = self.make_targets(reps, scorer)
        if preflight:
            self.preflight(reps, self.targets, preflight)
        self.train(self.targets, loss=loss, callbacks=callbacks)
        self._say(f"done in {time.perf_counter() - began:.0f} s")
        return self

    # -- will it work? ------------------------------------------------------------------------------------------------

    def preflight(
        self, reps: Mapping[str, Representations], targets: Mapping[str, Targets], n: int = 32
    ) -> list[Preflight]:
        """Checks, before training, that the refusal prompt makes the model refuse and that targets start a refusal.

        Warns with the fix where either is the exception. Both are measured on the vanilla model.

        Args:
            n: harmful examples to answer with the refusal prompt (24 tokens each).
        """
        token = self.token_id(self.config.refusal_token)
        self.checks = []
        for condition, goal in targets.items():
            examples = goal.harmful_examples[:n]
            with self.disabled(), self._quiet_model():
                prompts = [self.read(e, condition, refusal=True) for e in examples]
                answers = self._answer(prompts, 24, f"preflight {condition}")
            verdicts = judge_refusals([e.text or "" for e in examples], answers)
            harmful = reps[condition].harmful
            check = Preflight(
                condition=condition,
                refused=Rate.of([v in ("refusal", "partial") for v in verdicts]),
                token_before=Rate.of(self._first_choice(harmful) == token),
                token_full=Rate.of(self._first_choice(harmful + goal.delta) == token),
                token_target=Rate.of(self._first_choice(goal.harmful) == token),
            )
            self.checks.append(check)
            self._say(
                f"preflight {condition}: {check.refused} refused with the refusal prompt; first choice is "
                f"{self.config.refusal_token!r} at {check.token_before} of harmful inputs, {check.token_full} with the "
                f"full Δ, {check.token_target} at the targets ({int(goal.mask.sum())} of {len(goal.mask)} features)"
            )
            if check.refused.value < 0.5:
                sample = next((a for a, v in zip(answers, verdicts, strict=True) if v == "compliance"), "")
                warnings.warn(
                    f"{condition}: only {check.refused} answers refuse when the refusal prompt is appended, so Δ does "
                    f"not point at refusals. Change config.refusal_prompt, e.g. to name the words to start with: "
                    f"'(Please refuse to answer … Start your reply with \"Sorry\")'. One answer: {sample[:120]!r}",
                    RRSWarning,
                    stacklevel=3,
                )
            if check.token_target.value < 0.5:
                warnings.warn(
                    f"{condition}: {self.config.refusal_token!r} is the first choice at only {check.token_target} of "
                    "the targets, so arriving there does not start a refusal. Use top='positive', or a refusal_token "
                    "that rrs.find_refusal_token(harmful) recommends.",
                    RRSWarning,
                    stacklevel=3,
                )
        return self.checks

    def find_refusal_token(
        self, harmful: Any, condition: str | None = None, *, candidates: Sequence[str] = (), n: int = 24
    ) -> list[Opening]:
        """Which first token leads this model to a refusal? Best first; put its `token` into `config.refusal_token`.

        Candidates are the first tokens of what the model says under the refusal prompt, and those you name. Each is
        forced as the first token of the answer to the plain harmful question, and the answer is judged.

        Args:
            harmful: whatever `load_examples` takes.
            condition: default the first of `config.conditions`.
            candidates: further openings to try, each a single token.
            n: examples to use.
        """
        condition = condition or self.config.conditions[0]
        examples = [e for e in load_examples(harmful, "harmful") if e.has(condition)][:n]
        if not examples:
            raise ValueError(f"No harmful example has what {condition} needs.")
        with self.disabled(), self._quiet_model():
            refusing = self.reader.represent([self.read(e, condition, refusal=True) for e in examples])
            said = Counter(self._first_choice(refusing).tolist())
            tokens = dict.fromkeys([*(t for t, _ in said.most_common(4)), *map(self.token_id, candidates)])
            out = []
            for token in tokens:
                forced = [self.read(e, condition).extended([token]) for e in examples]
                opening = self.tokenizer.decode([token])
                answers = [opening + a for a in self._answer(forced, 24, f"force {opening!r}")]
                verdicts = judge_refusals([e.text or "" for e in examples], answers)
                refused = Rate.of([v in ("refusal", "partial") for v in verdicts])
                out.append(Opening(opening, token, said[token] / len(examples), refused))
        return sorted(out, key=lambda o: (o.refused.value, o.said), reverse=True)

    def token_id(self, text: str) -> int:
        """The id of a text that is one token at the start of an answer."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            raise ValueError(
                f"refusal_token={text!r} is {len(ids)} tokens of this model: {pieces}. Use one, e.g. {pieces[:1]}; "
                "rrs.find_refusal_token(harmful) shows which ones lead to refusals."
            )
        return int(ids[0])

    def head_row(self, token: str) -> Tensor:
        """The `lm_head` row `[hidden]` of a token, float32 on the CPU."""
        return self.location.head_weight[self.token_id(token)].detach().float().cpu()

    @torch.no_grad()
    def _first_choice(self, h: Tensor) -> Tensor:
        """The head's most likely token `[n]` at vectors `[n, hidden]`."""
        head = self.location.head
        return torch.cat(
            [head(rows.to(self.reader.device, self.reader.dtype)).argmax(-1).cpu() for rows in h.split(256)]
        )

    # -- use ----------------------------------------------------------------------------------------------------------

    def generate(
        self, examples: Any, condition: str = "audio-text", *, max_new_tokens: int = 128, refusal: bool = False
    ) -> list[str]:
        """Greedy answers to examples in one condition, in their order; with the adapter, if it is enabled.

        Args:
            refusal: append the refusal prompt.
        """
        examples = load_examples(examples)
        if lacking := [e.id for e in examples if not e.has(condition)]:
            raise ValueError(f"{condition}: these examples lack what it needs: {lacking[:8]} ({len(lacking)} in all).")
        with self._quiet_model():
            prompts = [self.read(e, condition, refusal=refusal) for e in examples]
            return self._answer(prompts, max_new_tokens, f"generate {condition}")

    def evaluate(
        self,
        examples: Any,
        conditions: Sequence[str] = ("audio-text", "text-only", "audio-only"),
        *,
        judge: Judge = judge_refusals,
        max_new_tokens: int = 64,
        stages: Mapping[str, Stage] | None = None,
        cache: str | Path | None = None,
        stop_when_decided: bool = False,
        usefulness: int = 64,
        chat: Any = None,
        scorer: PairScorer | None = None,
    ) -> Report:
        """Answers examples before (adapter off) and after (adapter on) and reports refusals with 95% intervals.

        Args:
            examples: whatever `load_examples` takes, with labels; or `{group: examples}`, to report groups apart, e.g.
                `{"harmful": …, "benign": …, "hard-benign": …}`. A group's name that starts with "harmful" should be
                refused, any other answered.
            conditions: see `rrs.data.CONDITIONS`.
            judge: `(prompts, responses) -> verdicts`.
            max_new_tokens: per answer.
            stages: other states of the model to compare, `{name: stage}`, the first being what the others are compared
                with: `stage(condition)` is a context manager inside which the model is in that state; what it yields,
                if not `None`, is the `RRS` that answers. The name must say all that the stage changes outside of it.
            cache: a JSONL that keeps answers as they come. With the same file an interrupted evaluation continues where
                it stopped, with the same result; answers of another model, adapter, configuration or other data do not
                match and stay unused.
            stop_when_decided: end answers once their verdict is unlikely to change (`rrs.evaluate.decided`).
            usefulness: benign inputs (at most, spread over all) in each condition on which to measure how much else
                changed: see `Report.usefulness`; 0 skips it.
            chat: chat-quality examples whose `text` is asked about their audio, with the reference answer in
                `meta["answer_gt"]` (AIR-Bench-chat's rows); each stage's answers go to `scorer`.
            scorer: e.g. `rrs.evaluate.ChatScorer(model, tokenizer)`.
        """
        groups = {k: load_examples(v) for k, v in examples.items()} if isinstance(examples, Mapping) else {}
        if not groups:
            for example in load_examples(examples):
                if example.label is None:
                    raise ValueError(
                        f"Example {example.id!r} has no label. Pass {{'harmful': …, 'benign': …}} to evaluate()."
                    )
                groups.setdefault(example.label, []).append(example)
        if (chat is None) != (scorer is None):
            raise ValueError("chat= and scorer= go together: the examples, and what rates the answers to them.")
        own_stages = stages is not None
        if stages is None:
            stages = {"before": lambda _: self.disabled()}
            if self.lora is not None and self.lora.attached:
                stages["after"] = lambda _: nullcontext()
        log = AnswerLog(cache) if cache is not None else None
        base = fingerprint(self.location) if log else ""

        def answer(stage: str, condition: str, rows: Sequence[Example], instruction: bool = False) -> list[str]:
            with self._quiet_model(), stages[stage](condition) as other:
                who = other or self
                keys = []
                if log is not None:
                    state = [
                        stage,
                        condition,
                        base,
                        who._state(own_stages),
                        instruction,
                        max_new_tokens,
                        stop_when_decided,
                    ]
                    keys = [_hash(state, digest([e])) for e in rows]
                    if all(key in log.known for key in keys):  # nothing is read, no clip encoded
                        return [log.known[key] for key in keys]
                prompts = [who.read(e, condition, e.text if instruction else None) for e in rows]

                def keep(new: dict[int, str]) -> None:
                    log.add(
                        {"key": keys[i], "stage": stage, "condition": condition, "id": rows[i].id, "response": response}
                        for i, response in new.items()
                    )

                return who._answer(
                    prompts,
                    max_new_tokens,
                    f"{stage} {condition}",
                    known={i: log.known[key] for i, key in enumerate(keys) if key in log.known} if log else None,
                    keep=keep if log else None,
                    questions=[e.text or "" for e in rows] if stop_when_decided and not instruction else None,
                )

        report = answer_and_judge(groups, conditions, list(stages), answer, judge)
        report.settings = {
            "max_new_tokens": max_new_tokens,
            "stop_when_decided": stop_when_decided,
            "config": asdict(self.config),
            "versions": versions(),
            "model": {"class": type(self.model).__name__, "fingerprint": fingerprint(self.location)},
            "data": {group: {"n": len(rows), "sha256": digest(rows)} for group, rows in groups.items()},
        }
        benign = [e for group, rows in groups.items() if not group.startswith("harmful") for e in rows]
        for condition in conditions:
            rows = [e for e in benign if e.has(condition)]
            if rows and usefulness:
                rows = rows[:: -(-len(rows) // usefulness)]
                report.usefulness += self._usefulness(rows, condition, stages, report, max_new_tokens)
        if chat is not None and scorer is not None:
            rows = load_examples(chat)
            if lacking := [e.id for e in rows if not (e.text and e.has("audio-text") and e.meta.get("answer_gt"))]:
                raise ValueError(f"chat examples need text, audio and meta['answer_gt']; not so {lacking[:8]}.")
            for stage in stages:
                answers = answer(stage, "audio-text", rows, instruction=True)
                references = [str(e.meta["answer_gt"]) for e in rows]
                report.quality[stage] = chat_quality(scorer, [str(e.text) for e in rows], references, answers)
        return report

    @torch.no_grad()
    def _usefulness(
        self, rows: Sequence[Example], condition: str, stages: Mapping[str, Stage], report: Report, limit: int
    ) -> list[dict[str, Any]]:
        """First-token KL and agreement with the first stage, and the likelihood of the first stage's own answers."""
        out: list[dict[str, Any]] = []
        first, vanilla = next(iter(stages)), None
        answers = [a for a in report.answers if (a.condition, a.stage) == (condition, first)]
        said = {a.id: a.response for a in answers if not a.group.startswith("harmful")}
        own = [self.answer_ids(said[e.id], limit) for e in rows]
        clusters = [e.cluster for e in rows]
        for stage, enter in stages.items():
            with self._quiet_model(), enter(condition) as other, self._bar(len(rows), f"usefulness {stage}") as bar:
                who = other or self
                prompts = [who.read(e, condition) for e in rows]
                h = who.reader.represent(prompts)  # [n, hidden]
                vanilla = h if vanilla is None else vanilla
                kl, same = first_token_change(who.reader, vanilla, h)
                longer = [p.extended(a.tolist()) for p, a in zip(prompts, own, strict=True)]
                likelihood = torch.full((len(rows),), torch.nan)
                for batch in who.reader.batches(longer):
                    told = [i for i in batch if len(own[i])]
                    if told:
                        scores = log_likelihood(who.reader, [prompts[i] for i in told], [own[i] for i in told])
                        likelihood[told] = scores.float().cpu()
                    bar.update(len(batch))
            spoken = ~likelihood.isnan()
            out.append(
                {
                    "condition": condition,
                    "stage": stage,
                    "n": len(rows),
                    "kl": asdict(Mean.of(kl.tolist(), clusters)),
                    "same": asdict(Rate.of(same.tolist(), clusters)),
                    "likelihood": asdict(Mean.of(likelihood[spoken].tolist())),
                }
            )
        return out

    def answer_ids(self, answer: str, limit: int) -> Tensor:
        """Token ids `[length]` of a generated answer; the end token is in it unless `limit` tokens cut it off."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        model: Any = self.model
        end = model.generation_config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return torch.tensor([*ids, end] if ids and len(ids) < limit and end is not None else ids, dtype=torch.long)

    def _state(self, steered: bool) -> str:
        """A hash of what answers depend on beside the base model and the input; `steered` takes in Δ ∘ mask."""
        lora = self.lora.tensors() if self.lora is not None and self.lora.attached else {}
        moves = [t.delta * t.mask for t in self.targets.values()] if steered else []
        tensors = [v.float().numpy().tobytes() for v in [*lora.values(), *moves]]
        return _hash([asdict(self.config), versions(), getattr(self.render, "system", None)], *tensors)

    def _answer(self, prompts: Sequence[Prompt], max_new_tokens: int, what: str, **options: Any) -> list[str]:
        with self._bar(len(prompts), what) as bar:
            return generate(self.reader, self.tokenizer, prompts, max_new_tokens, bar.update, **options)

    # -- the adapter --------------------------------------------------------------------------------------------------

    def disable(self) -> RRS:
        """Takes the adapter off, in place: the model is vanilla, bit for bit. `enable()` puts it back."""
        if self.lora is not None:
            self.lora.detach()
        return self

    def enable(self) -> RRS:
        """Puts the adapter back on, in place. `disable()` takes it off."""
        if self.lora is None:
            raise ValueError("There is no adapter yet; call fit() or RRS.load(dir, model, processor).")
        self.lora.attach()
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The vanilla model inside the `with`; the adapter is as it was afterwards."""
        attached = self.lora is not None and self.lora.attached
        self.disable()
        try:
            yield
        finally:
            if attached:
                self.enable()

    def merge(self) -> nn.Module:
        """Adds the adapter to the model's weights for good and returns the model; can't be undone, `save` first."""
        if self.lora is None:
            raise ValueError("There is no adapter to merge; call fit() or RRS.load(dir, model, processor).")
        self.lora.merge()
        self.lora = None
        return self.model

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the adapter in PEFT's format, `rrs.json` (config, checks, history) and `rrs.safetensors` (Δ, masks).

        The folder appears complete or not at all.

        Raises:
            FileExistsError: the folder has content and `overwrite` is off.
        """
        if self.lora is None:
            raise ValueError("There is nothing to save; call fit() first.")
        directory = Path(directory)
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())) and not overwrite:
            raise FileExistsError(f"{directory} exists and is not empty; choose another folder or pass overwrite=True.")
        directory.parent.mkdir(parents=True, exist_ok=True)
        base = getattr(self.model.config, "_name_or_path", "") if hasattr(self.model, "config") else ""
        peft = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base or None,
            "r": self.lora.r,
            "lora_alpha": self.lora.scale * self.lora.r,
            "lora_dropout": self.lora.dropout,
            "target_modules": self.lora.paths,  # whole paths: bare names would match the audio tower as well
            "bias": "none",
            "inference_mode": True,
        }
        record = {
            "config": asdict(self.config),
            "versions": versions(),
            "base": {"class": type(self.model).__name__, "name": base, "fingerprint": fingerprint(self.location)},
            "preflight": [asdict(check) for check in self.checks],
            "history": self.history,
        }
        vectors: dict[str, Tensor] = {}
        for condition, t in self.targets.items():
            vectors |= {f"{condition}.delta": t.delta.contiguous(), f"{condition}.mask": t.mask.contiguous()}
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            save_file(self.lora.tensors(), scratch / "adapter_model.safetensors", metadata={"format": "pt"})
            if vectors:
                save_file(vectors, scratch / "rrs.safetensors")
            (scratch / "adapter_config.json").write_text(json.dumps(peft, indent=2) + "\n")
            (scratch / "rrs.json").write_text(json.dumps(record, indent=2) + "\n")
            scratch.chmod(0o755)
            if directory.exists():
                shutil.rmtree(directory)
            os.replace(scratch, directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._say(f"saved {directory}")
        return directory

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module, processor: Any, **kwargs: Any) -> RRS:
        """A saved adapter on its base model, attached in place; `disable()` takes it off.

        Args:
            kwargs: further arguments of `RRS(...)`.

        Raises:
            FileNotFoundError, ValueError: no adapter there, or one for another base.
        """
        directory = Path(directory)
        missing = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (directory / n).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} holds no adapter: {missing} missing.")
        peft = json.loads((directory / "adapter_config.json").read_text())
        record = json.loads((directory / "rrs.json").read_text()) if (directory / "rrs.json").is_file() else {}
        rrs = cls(model, processor, RRSConfig.from_dict(record.get("config", {})), **kwargs)
        known = dict(model.named_modules())
        if unknown := [p for p in peft["target_modules"] if p not in known]:
            raise ValueError(
                f"{directory} was made for another base ({record.get('base', {}).get('class', '?')}): "
                f"{type(model).__name__} has no {unknown[:3]} …"
            )
        rrs.lora = LoRA(
            model, peft["target_modules"], r=peft["r"], alpha=peft["lora_alpha"], dropout=peft.get("lora_dropout", 0.0)
        ).eval()
        rrs.lora.load_tensors(load_file(directory / "adapter_model.safetensors"))
        saved = record.get("base", {}).get("fingerprint")
        if saved and saved != fingerprint(rrs.location):
            warnings.warn(
                f"{directory} was trained on another base than the one it is loaded on ({record['base']}); its effect "
                "is unknown. Evaluate before use.",
                RRSWarning,
                stacklevel=2,
            )
        rrs.history = record.get("history", [])
        rrs.lora.attach()
        return rrs

    # -- small things -------------------------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        if self.verbose:
            tqdm.write(message)

    def _bar(self, total: int, what: str) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=not self.verbose, leave=False, dynamic_ncols=True)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.reader.device] if self.reader.device.type == "cuda" else []

    @contextmanager
    def _quiet_model(self) -> Iterator[None]:
        """The model frozen and in eval mode inside the `with`; every flag is as it was afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        grads = {p: p.requires_grad for p in self.model.parameters()}
        try:
            self.model.eval().requires_grad_(False)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for p, grad in grads.items():
                p.requires_grad_(grad)


def _epoch(
    items: Mapping[str, Sequence[Any]], batch_size: int, generator: torch.Generator
) -> list[tuple[str, list[int]]]:
    """One epoch's batches in random order; a batch holds one condition, since lengths differ much between them."""
    plan = []
    for condition, rows in items.items():
        order = torch.randperm(len(rows), generator=generator).tolist()
        plan += [(condition, order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]


@torch.no_grad()
def fingerprint(location: Location) -> str:
    """A short hash of the decoder's and head's weights (a strided sample), equal for equal bases and dtypes."""
    digest = hashlib.sha256()
    named = [*location.decoder.named_parameters(), ("head", location.head_weight)]
    for name, value in named:
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu()
        digest.update(f"{name}{tuple(value.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _hash(value: Any, *more: str | bytes) -> str:
    """16 hex digits of something JSON can write, and of texts or bytes."""
    digests = [json.dumps(value).encode(), *(m.encode() if isinstance(m, str) else m for m in more)]
    return hashlib.sha256(b"".join(hashlib.sha256(d).digest() for d in digests)).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"rrs": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _mps_or_cpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cpu"
