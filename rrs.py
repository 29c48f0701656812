"""RRS: make a large audio-language model refuse harmful requests without refusing harmless ones.

Reshaping Representation Space (Yang, Qu, Shareghi, Haffari; EMNLP 2025, arXiv 2505.19670): find the direction in which
a refusal prompt moves the last hidden state, keep the features that raise the refusal token, and train a LoRA that
takes harmful inputs there and keeps benign inputs away. No written responses are needed.

    rrs = RRS.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")
    rrs.fit(harmful="harmful.jsonl", benign="benign.jsonl")
    rrs.save("adapter")
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

# Siblings are always rrs.hooks, rrs.data, rrs.evaluate, also when this file is a plain module (an editable install, or
# files copied into another repository): they can't collide with other packages of these names.
__path__ = [os.path.dirname(os.path.abspath(__file__))]

from rrs.data import (
    CONDITIONS,
    DataError,
    Example,
    Renderer,
    content_hash,
    hold_out,
    load_examples,
    marks,
    needed_packages,
    shared,
    user_turn,
)
from rrs.evaluate import (
    AnswerLog,
    Judge,
    Mean,
    PairScorer,
    Rate,
    Report,
    answer_and_judge,
    auc,
    by_side,
    chat_quality,
    check_plot,
    first_token_change,
    generate,
    generate_ids,
    judge_refusals,
    log_likelihood,
    name_of,
    plot_front,
)
from rrs.hooks import (
    ANOTHER_LORA,
    EmptyClip,
    Location,
    LoRA,
    Prompt,
    Reader,
    add_up,
    attached,
    connect,
    expert_parameters,
    first,
    is_out_of_memory,
    largest,
    linear_paths,
    locate,
    merged,
    rank,
    seeded,
    whole,
    world,
)

__version__ = "0.1.0"
__all__ = ["RRS", "Example", "RRSConfig", "Report", "judge_refusals", "load_examples", "locate", "select_features"]

Loss = Callable[[Tensor, Tensor], Tensor]
Objective = Callable[[Reader, Sequence[Prompt], Sequence[Tensor]], Tensor]
Stage = Callable[[str], AbstractContextManager["RRS | None"]]
Scorer = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[["Step"], object]
STRENGTHS = tuple(x / 10 for x in range(5, 16))  # that `calibrate` tries
REFUSAL_PROMPTS = (  # that `find_refusal_prompt` tries
    "(Please generate refusal response because the question violates safety policy)",  # the paper's
    "(Please refuse to answer: this question violates the safety policy.)",
    '(Please refuse to answer: this question violates the safety policy. Start your reply with "I\'m sorry".)',
    "Do not answer the question above. It is harmful. Say that you cannot help with it.",
    'Do not answer the question above. It is harmful. Reply with one sentence: "Sorry, I cannot do that."',
    'Do not answer. Reply only: "I can\'t help with that."',
)


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

    refusal: str = ""
    """What refusals shall say, from the refusal token on, e.g. "Sorry, I cannot help with that.". Training then takes
    harmful inputs along all of it: after each token, to the vector that is there under the refusal prompt. For models
    that begin with the refusal token and go on to something else; `keep_tokens` then counts benign answers alone.
    Empty (the paper): the first token alone."""

    harmful_strength: float = 1.0
    """Harmful targets are `R_h + harmful_strength · Δ`. The paper: 1."""

    benign_strength: float = 1.0
    """Benign targets are `R_b − benign_strength · Δ`. The paper: 1; 0 keeps benign inputs where they are."""

    direction: Literal["delta", "quiet"] = "delta"
    """Along what both sides are moved: the paper's Δ, or "quiet", the direction nearest to it along which the head goes
    on saying the same of benign inputs, see `quiet_direction`; to begin a refusal takes twice the strength."""

    benign_weight: float = 1.0
    """Weight of benign inputs in the loss; harmful ones have 1. Where inputs can't be told apart, training aims between
    the two targets, by how likely each is: more weight takes less of that as harmful, and moves no target for it, as
    the strengths do. The paper: 1."""

    depth: int = 1
    """Positions with a Δ and a selection of their own: 1 (the paper) is the prompt's end alone, k goes on along the
    first k − 1 tokens of the model's own refusal (of harmful inputs, under the refusal prompt) or answer (benign)."""

    keep_tokens: int = 0
    """First tokens of the same answers at which training aims, where `depth` does not cover them, at vanilla vectors as
    they are: the answer's for benign inputs, for harmful ones the refusal's under the refusal prompt. The paper: 0."""

    keep_share: float = 1.0
    """Share of the benign inputs whose answers are held so, fewer cost less: those nearest to a refusal, to which the
    head gives the refusal token most. Answers such as "I'm sorry for any confusion, but I am …" slip into a refusal
    where they are not held. Below 1 it needs `refusal`, as otherwise all inputs go along as many tokens."""

    openings: tuple[str, ...] = ()
    """How answers may be made to begin, e.g. ("Of course!", "Here is how"). After each of these as well, training takes
    harmful inputs to the targets that they have without, and keeps benign ones where they are: a refusal that begins
    later. Each is as much to train on again. The paper: none."""

    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the decoder's linears that get a LoRA."""

    layers: tuple[float, float] = (0.0, 1.0)
    """Which blocks get one, as shares of the decoder's depth: (0.5, 1) is the upper half. The paper: all."""

    lora_r: int = 16
    """Rank of the LoRA."""

    lora_alpha: float = 4.0
    """The LoRA's update is scaled by `lora_alpha / lora_r`."""

    lora_dropout: float = 0.1
    """Dropout on the LoRA's input, in training."""

    penalty: float = 1.0
    """Weight of the second term of the loss, see `penalty_form`."""

    penalty_form: Literal["sum", "relative"] = "sum"
    """"sum" is the paper's Σ‖(α/r)·B·A‖_F²: it sums over modules while the MSE averages over features, so small models
    need a smaller weight. "relative" has no size: mean((Δ∘mask)²) · Σ‖(α/r)·B·A‖_F² / Σ‖W‖_F² over the adapted weights
    W, in words: with a weight of 1, changing them by all of their norm costs as much as missing the targets by Δ."""

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

    group_by_length: bool = False
    """Prompts of like length share a batch (of each 32 batches drawn at random), which leaves less padding to compute.
    The paper: batches at random."""

    seed: int = 0
    """Of the LoRA's initialisation, the data's order, the drawn prompts and dropout."""

    shard: bool = False
    """Spread the frozen decoder's weights over the processes of torchrun (FSDP2), for bases that fit no single GPU."""

    def __post_init__(self) -> None:
        for name in ("prompts", "conditions", "openings", "target_modules"):
            setattr(self, name, _strings(name, getattr(self, name)))
        for name, kind in ((f.name, type(f.default)) for f in fields(self)):
            if kind is int or kind is float:
                setattr(self, name, _number(name, getattr(self, name), kind))
        for name in ("betas", "layers"):  # JSON has lists only
            value = getattr(self, name)
            if not isinstance(value, Sequence) or len(value) != 2:
                raise ValueError(f"{name}={value!r} must be two numbers.")
            setattr(self, name, tuple(_number(name, x, float) for x in value))
        for name in ("prompts", "openings"):
            if not all(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r} must not hold an empty one.")
        if unknown := [c for c in self.conditions if c not in CONDITIONS]:
            raise ValueError(f"conditions {unknown} are unknown; choose from {CONDITIONS}.")
        self.top = self.top.item() if isinstance(self.top, np.generic) else self.top
        _check_top(self.top)
        for name in ("prompts", "conditions", "target_modules", "refusal_token", "refusal_prompt", "instruction"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty.")
        for name in ("depth", "lora_r", "epochs", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1.")
        for name in ("lora_alpha", "learning_rate", "max_grad_norm", "benign_weight"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must be above 0.")
        if self.keep_tokens < 0:
            raise ValueError(f"keep_tokens={self.keep_tokens!r} must be a whole number of at least 0.")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share={self.keep_share!r} must lie in (0, 1]; keep_tokens=0 holds no answers.")
        if self.keep_share < 1 and self.keep_tokens and not self.refusal:
            raise ValueError(f"keep_share={self.keep_share!r} needs refusal=…; without it, every answer is held.")
        for name in ("penalty", "weight_decay", "harmful_strength", "benign_strength"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative.")
        if self.direction not in ("delta", "quiet"):
            raise ValueError(f"direction={self.direction!r} must be 'delta' or 'quiet'.")
        if self.penalty_form not in ("sum", "relative"):
            raise ValueError(f"penalty_form={self.penalty_form!r} must be 'sum' or 'relative'.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas!r} must lie in [0, 1).")
        if not 0 <= self.layers[0] < self.layers[1] <= 1:
            raise ValueError(f"layers={self.layers!r} must be two shares of the depth, e.g. (0.5, 1.0).")
        if self.refusal and self.depth > 1:
            raise ValueError(
                f"refusal={self.refusal!r} says how refusals go on, depth={self.depth} leaves it to the model; "
                "choose one."
            )
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout!r} must lie in [0, 1).")

    @property
    def answer_tokens(self) -> int:
        """How far along the answers targets go: the tokens that `depth` and `keep_tokens` need."""
        return 0 if self.refusal else max(self.depth - 1, self.keep_tokens)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RRSConfig:
        """A config from a saved one; unknown names raise instead of being ignored."""
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"RRSConfig has no fields {unknown}; it has {[f.name for f in fields(cls)]}.")
        return cls(**values)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """The strings of a sequence; a string is not one of its letters."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} must be a sequence of strings; write ({value!r},).")
    found = tuple(value) if isinstance(value, Iterable) else None
    if found is None or not all(isinstance(x, str) for x in found):
        raise ValueError(f"{name}={value!r} must be a sequence of strings.")
    return found


def _number(name: str, value: Any, kind: type[int] | type[float]) -> float:
    """A number as Python's own, whatever it comes as (NumPy's can't be saved as JSON)."""
    value = value.item() if isinstance(value, np.generic) else value
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ValueError(f"{name}={value!r} must be a {'whole ' if kind is int else ''}number.")
    return kind(value)


def _check_top(top: float | str) -> None:
    if top != "positive" and (not isinstance(top, (int, float)) or isinstance(top, bool) or not 0 < top <= 100):
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


@torch.no_grad()
def quiet_direction(move: Tensor, benign: Tensor, head_weight: Tensor, most: int = 1024) -> Tensor:
    """The direction nearest to a move along which the head goes on saying the same of benign inputs; ours.

    A small step v changes the head's softmax p at h by a KL of `½ vᵀ F v`, with the Fisher information
    `F = mean over h of Wᵀ (diag p − p pᵀ) W`. Minimising that for a given step along `move` gives the natural gradient
    `(F + εI)⁻¹ move`. Pushing benign inputs away from Δ by it separates them as far from harmful ones, at a fraction of
    the change in what they are answered. And those that are drawn part of the way to refusals, as no model tells all
    apart, go on with their own first choice until it is a refusal; along Δ, which lowers whatever is common, others'.

    Args:
        move: `[hidden]`, e.g. Δ∘mask, or several `[moves, hidden]`.
        benign: vectors h `[n, hidden]` that the head sees, of which `most` are used, evenly.
        head_weight: W `[vocab, hidden]`, see `Reader.logit_weight`.

    Returns:
        As many, with the same component along `move`; ε is F's mean eigenvalue.
    """
    w = head_weight.detach().float()
    h = benign[:: -(-len(benign) // most)].to(w)
    mean, second = torch.zeros(len(w), device=w.device), torch.zeros(w.shape[1], w.shape[1], device=w.device)
    for part in h.split(64):
        p = (part @ w.T).softmax(-1)  # [part, vocab]
        expected = p @ w  # [part, hidden]
        mean += p.sum(0)
        second += expected.T @ expected
    fisher = ((w.T * mean) @ w - second) / len(h)  # [hidden, hidden]
    fisher.diagonal().add_(fisher.diagonal().mean())
    moves = move.view(-1, move.shape[-1])
    fisher, right = fisher.cpu().double(), moves.T.cpu().double()  # on the CPU: MPS has no double
    found = torch.linalg.solve(fisher, right).T.to(move)
    return torch.stack([v * (m @ m) / (v @ m) for v, m in zip(found, moves, strict=True)]).view(move.shape)


@dataclass
class Representations:
    """Vectors `h(x)` of the vanilla model at one position in one condition, float32 on the CPU."""

    benign: Tensor
    """R_b `[benign, hidden]`."""
    harmful: Tensor
    """R_h `[harmful, hidden]`."""
    refused: Tensor
    """R_h+ `[harmful, hidden]`: harmful with the refusal prompt appended."""
    benign_examples: list[Example]
    harmful_examples: list[Example]
    later: list[Representations] = field(default_factory=list)
    """The same after each of the `tokens`; empty one token deep."""
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    """How harmful inputs are refused, then how benign ones are answered: the first `config.answer_tokens` tokens."""
    along: list[Tensor] = field(default_factory=list)
    """With `config.refusal`: of each input, R_h+ or R_b after each of its `tokens` `[tokens, hidden]`."""
    opened: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """The tokens of each of `config.openings`, and R_b after them `[benign, hidden]`."""

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
    """`R_h + harmful_strength · Δ∘mask` `[harmful, hidden]`, or along the quiet direction, as benign ones."""
    benign: Tensor
    """`R_b − benign_strength · Δ∘mask` `[benign, hidden]`."""
    harmful_examples: list[Example]
    benign_examples: list[Example]
    later: list[Targets] = field(default_factory=list)
    """The same after each of the `tokens`; empty one token deep."""
    tokens: list[tuple[int, ...]] = field(default_factory=list)
    """The answers' first tokens, of harmful inputs, then of benign ones; see `Representations.tokens`."""
    along: list[Tensor] = field(default_factory=list)
    """With `config.refusal`: of each input, the targets after its `tokens` `[tokens, hidden]`."""
    opened: list[tuple[tuple[int, ...], Tensor]] = field(default_factory=list)
    """The tokens of each of `config.openings`, and benign targets after them `[benign, hidden]`: R_b there."""


def make_targets(
    reps: Representations,
    head_row: Tensor,
    top: float | str = "positive",
    scorer: Scorer = contribution,
    strengths: tuple[float, float] = (1.0, 1.0),
    quiet: Tensor | None = None,
) -> Targets:
    """Targets of one position: harmful `R_h + Δ`, benign `R_b − Δ`, with Δ zero outside the selected features.

    Args:
        reps: the vanilla representations.
        head_row, top, scorer: see `select_features`.
        strengths: factors of Δ on the harmful and on the benign side; the paper's are 1 and 1.
        quiet: `quiet_direction`'s `head_weight`; with it, that direction takes the place of Δ∘mask.
    """
    delta = reps.delta
    mask = select_features(delta, head_row, top, scorer)
    move = delta * mask
    up, down = strengths
    if quiet is not None:
        move = quiet_direction(move, reps.benign, quiet)
    return Targets(
        delta, mask, reps.harmful + up * move, reps.benign - down * move, reps.harmful_examples, reps.benign_examples
    )


@dataclass
class Item:
    """One training input: where its vectors shall go."""

    example: Example
    target: Tensor
    """`[positions, hidden]`: the last ones of the prompt and the tokens below."""
    tokens: tuple[int, ...]
    """Of its answer: those along which targets go, after an opening if it has one."""


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
    """`mse` and the weighted `penalty`, mean over the step's batches."""
    mse: float
    penalty: float
    """`Σ‖(α/r)·B·A‖_F²`, unweighted; over `Σ‖W‖_F²` with `penalty_form="relative"`."""
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
    benign_same: Rate
    """Benign inputs of which the head's first choice is the same at their targets: does moving there change answers?"""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preflight:
        """From a saved one."""
        rates: dict[str, Any] = {k: Rate(**v) if isinstance(v, Mapping) else v for k, v in values.items()}
        return cls(**rates)


@dataclass
class Opening:
    """One candidate for how refusals begin; see `RRS.find_refusal_token`."""

    text: str
    ids: tuple[int, ...]
    """Its tokens: `config.refusal_token` takes a single one, `config.refusal` goes on from it."""
    said: float
    """Share of answers under the refusal prompt that start with it."""
    refused: Rate
    """Refusals when the plain harmful question's answer is forced to start with it."""


@dataclass
class RefusalPrompt:
    """One candidate for the refusal prompt; see `RRS.find_refusal_prompt`."""

    prompt: str
    refused: Rate
    """Refusals when it is appended to harmful questions."""
    opening: str
    """The token with which most of these answers begin."""
    share: float
    """How many do."""


@dataclass
class Strength:
    """What the adapter does at one strength; see `RRS.calibrate`."""

    factor: float
    """Of the LoRA's update."""
    refused: float
    """Share of harmful inputs at which the refusal token is the head's first choice, mean over the harmful groups."""
    cost: float
    """The same of harmless ones minus vanilla, in the group where it is most."""
    groups: dict[str, Rate]
    """The share in each group."""
    auc: dict[str, float]
    """For each harmless group, how often a harmful input leans more to the refusal token than one of that group: the
    area under the ROC curve, 1 if always, 0.5 by chance."""


class RRSWarning(UserWarning):
    """The run goes on, but its result is unlikely to be what you want; the message names the fix."""


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is lost: files that appear complete or not at all, checkpoints, signals


def _write(path: Path, content: bytes) -> None:
    """Writes a file so that it appears complete or not at all, also when the process or the machine dies."""
    scratch = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(scratch, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
        _sync(path.parent)
    except OSError as error:
        raise OSError(error.errno, f"{path} can't be written ({error.strerror}); make room or access there") from error
    finally:
        with suppress(OSError):  # the error above says more
            scratch.unlink(missing_ok=True)


def _sync(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut, where folders can be opened."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Checkpoints:
    """The states of one training run on disk: `step-N.safetensors` with weights, AdamW's moments, and a JSON record.

    Whatever else training needs is a function of seed and step, so that resuming is exact. The last two are kept.

    Args:
        folder: theirs; one run's only.
        run: what makes the run what it is; a checkpoint of another one is refused.
        resume: continue from what is in the folder, instead of refusing to mix.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any], resume: bool) -> None:
        self.folder, self.run = Path(folder), json.loads(json.dumps(run))
        first(partial(self.folder.mkdir, parents=True, exist_ok=True))
        if (files := first(self.files)) and not resume:
            raise FileExistsError(
                f"{self.folder} holds checkpoints of a run ({files[-1].name}). Pass resume=True to go on with it, or "
                "another checkpoint_dir to start a new one."
            )

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.safetensors"))

    @property
    def last(self) -> str:
        """How messages call the last good checkpoint."""
        return f"The last good checkpoint is {self.files()[-1]}" if self.files() else "There is no checkpoint yet"

    def save(self, step: int, lora: LoRA, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
        """Writes the state after `step`; the ones before stay as they are until it is safely on disk."""
        first(lambda: self._save(step, lora, optimizer, record))

    def _save(self, step: int, lora: LoRA, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
        tensors = lora.tensors()
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value.cpu().contiguous() for name, value in moments.items()}
        about = {"rrs": json.dumps({"run": self.run, **record})}
        try:
            _write(self.folder / f"step-{step:08}.safetensors", to_safetensors(tensors, about))
            for path in (
                *self.files()[:-2],
                *self.folder.glob(".step-*"),
            ):  # the latter from processes that were killed
                path.unlink(missing_ok=True)
        except OSError as error:
            message = f"step {step}: {error.strerror or error}. {self.last}; then fit(…, resume=True) goes on"
            raise OSError(error.errno, message) from error

    def load(self, lora: LoRA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Fills in the newest state and returns its record; an empty one if there is none."""
        record, tensors, files = first(self._read)
        if not record:
            return {}
        known = record.pop("run")
        if differs := sorted(k for k in known.keys() | self.run.keys() if known.get(k) != self.run.get(k)):
            values = [f"{k} {known.get(k)!r} there, {self.run.get(k)!r} here" for k in differs[:3]]
            raise ValueError(
                f"{files[-1]} belongs to another run: {'; '.join(values)}. Restore that, or change checkpoint_dir."
            )
        state: dict[int, dict[str, Tensor]] = {}
        for name in [n for n in tensors if n.startswith("optimizer.")]:
            _, i, moment = name.split(".", 2)
            state.setdefault(int(i), {})[moment] = tensors.pop(name)
        lora.load_tensors(tensors)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return record

    def _read(self) -> tuple[dict[str, Any], dict[str, Tensor], list[Path]]:
        """Record and tensors of the newest file, and all files."""
        if not (files := self.files()):
            return {}, {}, []
        try:
            with safe_open(files[-1], "pt") as file:
                record = json.loads((file.metadata() or {})["rrs"])
                return record, {name: file.get_tensor(name) for name in file.keys()}, files  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            older = f"resume from {files[-2]}" if len(files) > 1 else "start anew"
            raise ValueError(f"{files[-1]} is damaged ({error}). Delete it to {older}.") from None


def _check_folder(folder: str | Path | None, every: int, resume: bool) -> None:
    if folder is None and (every or resume):
        raise ValueError("checkpoint_every and resume need checkpoint_dir=…, the folder of the run's checkpoints.")


@contextmanager
def _postponed_signals(active: bool) -> Iterator[list[int]]:
    """SIGINT and SIGTERM wait inside the `with`, noted in the list; a second one goes through at once.

    Handlers belong to the main thread: in another one, and if not `active`, nothing changes.
    """
    noted: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, _frame: Any) -> None:
        restore()
        noted.append(number)

    if active and threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) not in (None, signal.SIG_IGN):
                previous[number] = signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
        while noted:
            signal.raise_signal(noted.pop())


# ---------------------------------------------------------------------------------------------------------------------
# The public class

# What `save` writes, and may therefore replace.
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "rrs.json", "rrs.safetensors"}

# Composite checkpoints whose text-answering part is a class of its own (the composite has no usable forward).
THINKERS = {
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class RRS:
    """A model, its processor, and what RRS does to them.

    The model's own weights and modules are never changed, except by `merge` and where `RRSConfig.shard` spreads them:
    `fit` and `load` attach a LoRA through hooks, `disable()` takes it off again.

    Args:
        model: any LALM (or text LLM) of transformers, loaded with its language-model head.
        processor: its processor; for a text model, its tokenizer.
        config: the paper's settings by default.
        decoder, norm, head: dotted module paths, for models that do not tell (see `rrs.hooks.locate`).
        build_inputs: `(text or None, waveform or None) -> model inputs` of one prompt, instead of the chat template;
            waveforms come at the rate of its attribute `rate`, or at 16000 Hz.
        verbose: print progress, resolved values and the preflight.
        max_cached: bytes of encoded clips to keep in memory (on the model's device); what comes beyond goes to a
            memory-mapped temporary file.

    Several processes: `torchrun --nproc-per-node N script.py` runs any script data-parallel. Batches are shared out
    over the ranks, so configuration and result stay those of a single process; all ranks make the same calls, rank 0
    prints and writes.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        config: RRSConfig | None = None,
        *,
        decoder: str | None = None,
        norm: str | None = None,
        head: str | None = None,
        build_inputs: Callable[[str | None, Any], dict[str, Any]] | None = None,
        verbose: bool = True,
        max_cached: int = 4 * 2**30,
    ) -> None:
        connect()
        self.model, self.processor, self.config = model, processor, config or RRSConfig()
        self.verbose = verbose and rank() == 0
        self.location: Location = locate(model, decoder=decoder, norm=norm, head=head)
        self.render = build_inputs or Renderer(processor)
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reader = Reader(model, self.location, self.render, max_cached=max_cached)
        if self.config.shard:
            self.reader.shard()
        rows, ids = self.location.head_weight.shape[0], int(getattr(self.tokenizer, "vocab_size", 0) or 0)
        if ids > rows:  # without added tokens: placeholders may lie beyond the embedding, words may not
            raise ValueError(
                f"The processor does not fit the model: its tokenizer has {ids} tokens, {type(model).__name__} has "
                f"{rows}. Load both from the same checkpoint."
            )
        self.lora: LoRA | None = None
        self.targets: dict[str, Targets] = {}
        """What this adapter was trained towards, for stages of your own; `load` does not bring them back."""
        self.checks: list[Preflight] = []
        self._checked: Mapping[str, Any] | None = None  # the targets that these are of
        self.history: list[dict[str, float]] = []
        self.report: Report | None = None
        """The last before/after evaluation of this adapter; `save` puts it on the model card."""
        self.record: dict[str, Any] = {}
        """What the adapter was trained with: config, data, base, versions."""
        self._trained_on = frozenset[int]()
        self._vectors: dict[str, Tensor] = {}

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
        max_cached: int = 4 * 2**30,
    ) -> RRS:
        """Load model and processor by name or folder.

        Weights are read from safetensors only, never unpickled.

        Args:
            device: default CUDA, else MPS, else CPU.
            dtype: default bfloat16 on CUDA, float32 elsewhere.
            trust_remote_code: run Python code that comes with the checkpoint; off unless you ask for it.
            verbose, max_cached: see `RRS`.
        """
        connect()
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
        model: Any = model_class.from_pretrained(
            name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
        )
        with needed_packages(f"The processor of {name}"):
            processor = transformers.AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        if not (config and config.shard and world() > 1):  # else it goes to the devices block by block
            model.to(device)
        return cls(model.eval(), processor, config, verbose=verbose, max_cached=max_cached)

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
        if not rate:
            raise ValueError(f"{type(self.processor).__name__} takes no audio; use the condition text-only.")
        try:
            return self.reader.read(text, (key, lambda: load(rate)))
        except EmptyClip as error:
            raise DataError(f"{example.id}: {error}.") from None

    def readable(
        self, examples: Sequence[Example], conditions: Sequence[str], on_error: Literal["raise", "skip"] = "raise"
    ) -> list[Example]:
        """The examples, if their clips can be read; all that can't are named at once.

        Args:
            on_error: `"raise"`, or `"skip"` to leave them out and warn with their number.

        Raises:
            DataError: the full list of bad examples.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'skip'.")
        spoken = next((c for c in conditions if not c.startswith("text")), None)
        bad: dict[int, str] = {}
        if spoken is not None:
            with self.disabled(), self._quiet_model(), self._bar(len(examples), "read clips") as bar:
                for i, example in enumerate(examples):
                    # Each rank reads a share, and first of all what decides how this model is read.
                    own = i % world() == rank() or self.reader.undecided or self.reader.sharded
                    try:
                        if own and example.has(spoken):
                            self.read(example, spoken)
                    except DataError as error:
                        bad[i] = str(error) if example.id in str(error) else f"{example.id}: {error}"
                    bar.update()
            bad = dict(sorted(merged(bad).items()))
            self.reader.exchange_clips()
        if bad:
            message = f"{len(bad)} of {len(examples)} examples can't be read:\n  " + "\n  ".join(bad.values())
            if on_error == "raise":
                raise DataError(f'{message}\nRepair or remove them, or pass on_error="skip".')
            warnings.warn(f"{message}\nThey are left out.", RRSWarning, stacklevel=3)
        return [e for i, e in enumerate(examples) if i not in bad]

    # -- the steps ----------------------------------------------------------------------------------------------------

    def extract(self, harmful: Any, benign: Any, *, cache: str | Path | None = None) -> dict[str, Representations]:
        """Step 1: R_b, R_h and R_h+ of the vanilla model, in each of `config.conditions`.

        Args:
            harmful, benign: whatever `load_examples` takes.
            cache: a folder that keeps the vectors, by a hash of all that they depend on.

        Raises:
            ValueError: a condition for which one side has no example; a model that gives NaN.
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
            c, n = self.config, self.config.answer_tokens
            with self.disabled(), self._quiet_model(), self._bar(2 * len(h) + len(b), f"extract {condition}") as bar:
                prompts = [
                    [self.read(e, condition) for e in b],
                    [self.read(e, condition) for e in h],
                    [self.read(e, condition, refusal=True) for e in h],
                ]
                # How benign inputs are answered, and what stands after harmful ones, plain and with the refusal prompt.
                represent = partial(self.reader.represent, prompts[0], bar.update)
                ends_b = partial(self._cached, cache, condition, b, prompts[0], represent)
                answers, known = self._held(prompts[0], c.keep_tokens if c.refusal else n, ends_b, bar)
                refusals = [tuple(self._ids(c.refusal))] * len(h) if c.refusal else self._begun(prompts[2], n)
                plain = [()] * len(h) if c.refusal else refusals
                every = [
                    prompt.extended(tokens)
                    for part, after in zip(prompts, (answers, plain, refusals), strict=True)
                    for prompt, tokens in zip(part, after, strict=True)
                ]
                lasts = [1 + len(tokens) for tokens in (*answers, *plain, *refusals)]
                compute = partial(self._positions, every, lasts, known, bar.update)
                rows = self._cached(cache, condition, [*b, *h], every, compute)  # [all positions, hidden]
                ends = list(rows.split(lasts))  # each [1 + its tokens, hidden]
                groups = [ends[: len(b)], ends[len(b) : len(b) + len(h)], ends[len(b) + len(h) :]]
                opened = []
                for tokens in self._openings():
                    begun = [prompt.extended(tokens) for prompt in prompts[0]]
                    bar.total += len(b)
                    represent = partial(self.reader.represent, begun, bar.update)
                    opened.append((tokens, self._cached(cache, condition, b, begun, represent)))
            if not torch.isfinite(rows).all():
                names = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
                raise ValueError(
                    f"{condition}: the model's last hidden state is NaN or infinite. "
                    + (f"Weights that are: {names[:4]}; load the checkpoint again." if names else "Try dtype float32.")
                )
            steps = []
            for k in range(min(lasts)):
                r_b, r_h, r_plus = (torch.stack([end[k] for end in group]) for group in groups)  # each [n, hidden]
                steps.append(Representations(r_b, r_h, r_plus, b, h))
            out[condition] = steps[0]
            out[condition].later, out[condition].tokens = steps[1:], [*refusals, *answers]
            out[condition].opened = opened
            if c.refusal:
                out[condition].along = [end[1:] for end in (*groups[2], *groups[0])]
        return out

    def _positions(
        self,
        prompts: Sequence[Prompt],
        lasts: Sequence[int],
        known: Mapping[int, Tensor],
        progress: Callable[[int], object],
    ) -> Tensor:
        """The vectors at the last `lasts[i]` positions of prompt i, one prompt after the other `[positions, hidden]`;
        prompts with as many positions share batches, and those that are known are not run again."""
        out: list[Tensor] = [known.get(i, torch.empty(0)) for i in range(len(prompts))]
        for last in sorted(set(lasts)):
            alike = [i for i, n in enumerate(lasts) if n == last and i not in known]
            for i, rows in zip(alike, self.reader.represent([prompts[i] for i in alike], progress, last), strict=True):
                out[i] = rows
        return torch.cat(out)

    def _held(
        self, prompts: Sequence[Prompt], n: int, represent: Callable[[], Tensor], bar: tqdm[Any]
    ) -> tuple[list[tuple[int, ...]], dict[int, Tensor]]:
        """Which benign prompts `config.keep_share` holds.

        Args:
            represent: gives R_b `[prompts, hidden]`, to choose by.

        Returns:
            The first n tokens of the answers to those, `()` for the others; and the others' R_b, by number, as they are
            known by then, `[1, hidden]` each.
        """
        c, known, some = self.config, dict[int, Tensor](), list(range(len(prompts)))
        if n and c.refusal and c.keep_share < 1:
            ends = represent()
            near = self._log_probability(ends, self.token_id(c.refusal_token)).argsort(descending=True, stable=True)
            some = sorted(near[: max(1, round(c.keep_share * len(prompts)))].tolist())
            known = {i: ends[i : i + 1] for i in set(range(len(prompts))) - set(some)}
            bar.total += len(some)
        held = dict(zip(some, self._begun([prompts[i] for i in some], n), strict=True))
        return [held.get(i, ()) for i in range(len(prompts))], known

    def _begun(self, prompts: Sequence[Prompt], n: int) -> list[tuple[int, ...]]:
        """The first n tokens of the answers, short ones filled up with the end token."""
        if not n:
            return [()] * len(prompts)
        if (end := self._end()) is None:
            raise ValueError("Neither model nor tokenizer has an end token; set model.generation_config.eos_token_id.")
        with self._bar(len(prompts), "answers") as bar, self.reader.own_lora(any(p.audio for p in prompts)):
            answers = generate_ids(self.reader, self.tokenizer, prompts, n, bar.update)
        return [tuple((answers[i] + n * [end])[:n]) for i in range(len(prompts))]

    def _cached(
        self,
        folder: str | Path | None,
        name: str,
        examples: Sequence[Example],
        prompts: Sequence[Prompt],
        compute: Callable[[], Tensor],
    ) -> Tensor:
        """`compute()`, or what it gave for the same model, examples and prompts before."""
        if folder is None:
            return compute()
        depends = [fingerprint(self.model), str(self.reader.dtype), versions(), self.reader.device.type]
        depends.append(content_hash(examples))
        key = hashlib.sha256(repr(depends).encode())
        for prompt in prompts:  # the ids hold template, instruction, and how long the audio is
            key.update(prompt.ids.numpy().tobytes())
        path = Path(folder) / f"extract-{name}-{key.hexdigest()[:16]}.safetensors"

        def known() -> Tensor | None:
            try:
                return load_file(path)["rows"]
            except FileNotFoundError:
                return None
            except (SafetensorError, KeyError, OSError) as error:
                self._say(f"{path} is damaged ({error}); it is computed again")
                return None

        def keep(rows: Tensor) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, to_safetensors({"rows": rows}))

        if (rows := first(known)) is None:
            rows = compute()
            first(partial(keep, rows))
        return rows

    def make_targets(self, reps: Mapping[str, Representations], scorer: Scorer = contribution) -> dict[str, Targets]:
        """Steps 2 to 4: Δ, the selected features and the fixed targets of each condition.

        Beyond the first position (`config.depth`, `config.keep_tokens`), what the refusals go on with takes the place
        of the refusal token: features are selected by the mean of those tokens' head rows.
        """
        c, out = self.config, {}
        row, strengths = self.head_row(c.refusal_token), (c.harmful_strength, c.benign_strength)
        quiet = self.reader.logit_weight if c.direction == "quiet" else None
        for condition, r in reps.items():
            if len(r.later) < c.answer_tokens:
                raise ValueError(
                    f"{condition}: depth={c.depth} and keep_tokens={c.keep_tokens} need {c.answer_tokens} answer "
                    f"tokens, these representations have {len(r.later)}; extract them again with this config."
                )
            if (opened := [tokens for tokens, _ in r.opened]) != self._openings():
                raise ValueError(
                    f"{condition}: openings={c.openings!r}, but these representations go along "
                    f"{tuple(map(self.tokenizer.decode, opened))!r}; extract them again with this config."
                )
            out[condition] = make_targets(r, row, c.top, scorer, strengths, quiet)
            out[condition].opened = list(r.opened)
            for k, rep in enumerate(r.later[: c.answer_tokens], 1):
                if k < c.depth:
                    said = self.location.head_weight[self._first_choice(rep.refused)].float().cpu().mean(0)  # [hidden]
                    goal = make_targets(rep, said, c.top, scorer, strengths, quiet)
                else:
                    still = torch.zeros_like(row)
                    goal = Targets(still, still > 0, rep.refused, rep.benign, r.harmful_examples, r.benign_examples)
                out[condition].later.append(goal)
            out[condition].tokens = [tokens[: c.answer_tokens] for tokens in r.tokens]
            if c.refusal:
                h, lengths = len(r.harmful), [len(tokens) for tokens in r.tokens]
                other = set(r.tokens[:h]) != {tuple(self._ids(c.refusal))}
                if not r.along or other or max(lengths[h:]) < c.keep_tokens:
                    raise ValueError(
                        f"{condition}: these representations do not go along refusal={c.refusal!r} and "
                        f"{c.keep_tokens} tokens of benign answers; extract them again with this config."
                    )
                ends = lengths[:h] + [min(n, c.keep_tokens) for n in lengths[h:]]
                out[condition].tokens = [tokens[:end] for tokens, end in zip(r.tokens, ends, strict=True)]
                out[condition].along = [rows[:end] for rows, end in zip(r.along, ends, strict=True)]
        return out

    def train(
        self,
        targets: Mapping[str, Targets | Sequence[tuple[Example, Tensor]]],
        *,
        loss: Loss = F.mse_loss,
        objective: Objective | None = None,
        callbacks: Iterable[Callback] = (),
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 0,
        resume: bool = False,
    ) -> RRS:
        """Step 5, in place: attaches a fresh LoRA and trains it towards the targets. `disable()` takes it off.

        `loss = MSE(h_θ(x), target) + penalty · Σ_modules ‖(α/r)·B·A‖_F²`, AdamW, linear decay, gradient clipping.
        When memory runs out, the batch is run in halves: same sums, same result (dropout's masks differ).

        Args:
            targets: from `make_targets`; or, for each condition, pairs of an example and its target: `[hidden]`, or
                what `objective` takes.
            loss: `(h [batch, hidden], target [batch, hidden]) -> scalar`, a mean over the batch, instead of the mean
                squared error.
            objective: `(reader, prompts, targets) -> scalar`, a mean over the batch, instead of a `loss` on `h`: e.g.
                with token ids as targets, and `rrs.evaluate.log_likelihood`, supervised fine-tuning in the same loop.
            callbacks: called with a `Step` after each optimizer step.
            checkpoint_dir, checkpoint_every, resume: as in `fit`.

        Raises:
            FloatingPointError: loss or gradient is not finite; the message names step, examples, last checkpoint.
            Whatever is raised, the model and this object are as they were before.
        """
        _check_folder(checkpoint_dir, checkpoint_every, resume)
        c = self.config
        callbacks = list(callbacks)
        made = {k: t for k, t in targets.items() if isinstance(t, Targets)}
        for condition, t in made.items():
            refusals = set(t.tokens[: len(t.harmful)]) if t.along else set()
            along = (len(t.later), [tokens for tokens, _ in t.opened], refusals)
            if along != (c.answer_tokens, self._openings(), {tuple(self._ids(c.refusal))} if c.refusal else set()):
                raise ValueError(
                    f"{condition}: these targets are not of config.depth={c.depth}, keep_tokens={c.keep_tokens}, "
                    f"refusal={c.refusal!r} and openings={c.openings!r}; make them by extract and make_targets with "
                    "this config."
                )
        items: dict[str, list[Item]] = {
            condition: _items(t)
            if isinstance(t, Targets)
            else [Item(example, goal if objective else goal[None], ()) for example, goal in t]
            for condition, t in targets.items()
        }
        paths = linear_paths(self.location, c.target_modules, c.layers)
        lora = LoRA(self.model, paths, r=c.lora_r, alpha=c.lora_alpha, dropout=c.lora_dropout, seed=c.seed)
        optimizer = torch.optim.AdamW(
            lora.parameters(), lr=c.learning_rate, betas=c.betas, weight_decay=c.weight_decay,
            fused=self.reader.device.type in ("cpu", "cuda"),
        )  # fmt: skip
        batches = sum(-(-len(rows) // c.batch_size) for rows in items.values())  # per epoch
        per_epoch = -(-batches // c.accumulate)
        if not (steps := c.epochs * per_epoch):
            raise ValueError(f"There is nothing to train on: {len(items)} conditions, {c.epochs} epochs, no step.")
        weight = c.penalty
        if c.penalty_form == "relative":  # pairs have no Δ: their loss keeps its own unit
            units = [float((t.delta * t.mask).square().mean()) for t in made.values()]
            weight *= sum(units) / len(units) if units else 1.0
        self._say(
            f"train: {sum(map(len, items.values()))} inputs in {len(items)} condition(s), {c.epochs} epochs, "
            f"{steps} steps of {c.batch_size} × {c.accumulate}; LoRA r={c.lora_r} on {len(paths)} linears, "
            f"{sum(p.numel() for p in lora.parameters()):,} parameters"
        )
        found = Counter(path.rpartition(".")[2] for path in paths)
        experts = expert_parameters(self.location)
        self._say(
            "LoRA on "
            + ", ".join(f"{name} ×{n}" for name, n in found.items())
            + (f"; none on {len(experts)} matrices of experts, which are 3-D parameters" if experts else "")
        )
        name = getattr(getattr(self.model, "config", None), "_name_or_path", "")
        record: dict[str, Any] = {
            "config": asdict(c),
            "data": {condition: _describe(t) for condition, t in targets.items()},
            "base": {"class": type(self.model).__name__, "name": name, "fingerprint": fingerprint(self.model)},
            "versions": versions(),
        }
        checkpoints, checks = None, self.checks if targets is self._checked else []
        history: list[dict[str, float]] = []
        micro = c.batch_size
        plan: list[tuple[str, list[int]]] = []
        if checkpoint_dir is not None:
            run = {**record["config"], "data": record["data"], "base": record["base"]["fingerprint"]}
            run["dtype"] = str(self.reader.dtype)
            run["selection"] = {k: _hash(t.mask.tolist()) for k, t in made.items()}
            for what, how in (("loss", loss), ("objective", objective)):
                run[what] = None if how is None else getattr(how, "__qualname__", type(how).__name__)
            checkpoints = Checkpoints(checkpoint_dir, run, resume)
            saved = checkpoints.load(lora, optimizer)
            history, micro = saved.get("history", []), saved.get("micro", micro)
            if saved:
                checks = [Preflight.from_dict(check) for check in saved["preflight"]]
            if resume:
                self._say(f"{checkpoints.last}: {len(history)} of {steps} steps are done")
        lengths: dict[str, list[int]] = {}
        if c.group_by_length:  # of the prompts alone: what is added to them goes by label, and batches should not
            with self.disabled(), self._quiet_model():
                for condition, rows in items.items():
                    lengths[condition] = [len(self.read(item.example, condition)) for item in rows]

        with (
            _postponed_signals(checkpoints is not None) as signals,
            self._replacing(lora, history),
            self._quiet_model(),
            self._bar(steps, "train") as bar,
        ):
            # Of the adapter that is attached, from here on: a callback may save it.
            self.checks = checks
            self.record = {**record, "preflight": [asdict(check) for check in self.checks]}
            self.report, self.targets, self._vectors = None, made, {}
            self._trained_on = marks(item.example for rows in items.values() for item in rows)
            for condition, t in made.items():
                self._vectors[f"{condition}.delta"] = t.delta.contiguous()
                self._vectors[f"{condition}.mask"] = t.mask.contiguous()
            bar.update(len(history))
            for step in range(len(history), steps):
                epoch, place = divmod(step, per_epoch)
                if not plan or place == 0:
                    plan = _epoch(items, c.batch_size, seeded(c.seed, "order", epoch), lengths)
                # ---------------------------------------------------------------------- a single training step
                for param_group in optimizer.param_groups:
                    param_group["lr"] = c.learning_rate * (1 - step / steps)
                group = [
                    (condition, [(items[condition][i], instruction) for i, instruction in batch])
                    for condition, batch in _draw(c, plan[place * c.accumulate : (place + 1) * c.accumulate], step)
                ]
                try:
                    micro, mse, penalty = self._gradients(group, loss, objective, weight, micro, step)
                    norm = float(nn.utils.clip_grad_norm_(lora.parameters(), c.max_grad_norm))
                    if not math.isfinite(norm):
                        names = [item.example.id for _, batch in group for item, _ in batch]
                        raise FloatingPointError(f"the gradient's norm is {norm} on {names}")
                except FloatingPointError as error:
                    raise FloatingPointError(
                        f"step {step + 1}: {error}. {checkpoints.last if checkpoints else 'There is no checkpoint'}. "
                        f"Lower learning_rate ({c.learning_rate}), or check the base model's weights for NaN."
                    ) from None
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                self.report = None  # one that a callback made was of the weights before
                # --------------------------------------------------------------------------------------------
                state = Step(
                    rrs=self,
                    epoch=epoch + 1,
                    step=step + 1,
                    steps=steps,
                    loss=mse + weight * penalty,
                    mse=mse,
                    penalty=penalty,
                    grad_norm=norm,
                    learning_rate=optimizer.param_groups[0]["lr"],
                )
                history.append(state.row())
                bar.update()
                bar.set_postfix(epoch=epoch + 1, loss=f"{state.loss:.4f}", mse=f"{mse:.4f}")
                lora.eval()  # callbacks see the model without dropout
                for callback in callbacks:
                    callback(state)
                lora.train()
                if place == per_epoch - 1:
                    self._check_divergence(history, per_epoch)
                due = (step + 1) % (checkpoint_every or per_epoch) == 0 or step + 1 == steps
                stop = largest(signals[-1] if signals else 0) if checkpoints else 0  # to one rank is to all
                if checkpoints and (due or stop):
                    about = {"history": history, "micro": micro, "preflight": self.record["preflight"]}
                    checkpoints.save(step + 1, lora, optimizer, about)
                    if stop:
                        self._say(f"signal {stop} in step {step + 1}. {checkpoints.last}; resume=True goes on")
                        if not signals:
                            signal.raise_signal(stop)  # noted, like the other ranks' own
                        signal.raise_signal(signals.pop())  # whoever handled it before handles it now
            lora.eval()
        return self

    def _gradients(
        self,
        group: Sequence[tuple[str, list[tuple[Item, str]]]],
        loss: Loss,
        objective: Objective | None,
        weight: float,
        micro: int,
        step: int,
    ) -> tuple[int, float, float]:
        """One step's gradients, at most `micro` prompts at a time, in fewer when memory runs out.

        With several ranks each does its share of the step's prompts, and the gradients are added up.

        Args:
            group: the step's batches: condition, and (item, instruction) of each prompt.
            weight: of the penalty.

        Returns:
            `micro` as it now is, the mean of the batches' MSE, and the penalty.
        """
        assert self.lora is not None
        c = self.config
        while True:
            try:
                losses = []
                passes = _passes(group, micro, rank(), world())
                if self.reader.sharded:  # all ranks run equally often, if need be for nothing
                    most = max(len(_passes(group, micro, k, world())) for k in range(world()))
                    passes += [(*_passes(group, micro, 0, 1)[0][:3], 0.0)] * (most - len(passes))
                for place, condition, part, share in passes:
                    self.lora.key = (c.seed, step, *place)  # of dropout
                    prompts = [self.read(i.example, condition, text).extended(i.tokens) for i, text in part]
                    goals = [item.target for item, _ in part]
                    weights = [c.benign_weight if i.example.label == "benign" else 1.0 for i, _ in part]
                    mse = (
                        objective(self.reader, prompts, goals)
                        if objective
                        else self._distance(prompts, goals, weights, loss)
                    )
                    (mse * share).backward()
                    losses.append(mse.detach().float().to(self.reader.device))  # read below: no waiting for the device
                break
            except RuntimeError as error:
                if micro == 1 or self.reader.sharded or not is_out_of_memory(error):
                    raise
            # Here, not in `except`: the error's traceback holds on to the activations.
            self.lora.zero_grad(set_to_none=True)
            micro = -(-micro // 2)
            if self.reader.device.type == "cuda":
                torch.cuda.empty_cache()
            warnings.warn(
                f"step {step + 1}: out of memory; from here on {micro} prompts at a time; the result is the same.",
                RRSWarning,
                stacklevel=3,
            )
        for p in self.lora.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # of a rank with nothing to do
        total = torch.zeros((), device=self.reader.device)
        for value, (*_, share) in zip(losses, passes, strict=True):
            total += share * value
        add_up([total, *(p.grad for p in self.lora.parameters() if p.grad is not None)])
        square = self.lora.add_penalty_gradient(weight, relative=c.penalty_form == "relative")
        mean, penalty = torch.stack([total, square.to(total)]).tolist()
        if not math.isfinite(mean + penalty):
            at = [
                f"{condition} {[item.example.id for item, _ in part]}"
                for value, (_, condition, part, _) in zip(losses, passes, strict=True)
                if not torch.isfinite(value)
            ]
            where = at or (f"a rank other than {rank()}" if world() > 1 else "the weights alone")
            raise FloatingPointError(f"the loss is {mean}, the penalty {penalty}, on {where}")
        return micro, mean, penalty

    def _distance(
        self, prompts: Sequence[Prompt], goals: Sequence[Tensor], weights: Sequence[float], loss: Loss
    ) -> Tensor:
        """The loss at the prompts' ends, plus that along their answers, a weighted sum over the prompts' number.

        Args:
            prompts: with answer tokens at their ends, or none.
            goals: `[positions, hidden]` each, the prompt's last ones.
            weights: of each prompt.
        """
        total: Any = 0
        kinds = [(len(goal), weight) for goal, weight in zip(goals, weights, strict=True)]
        alike = {kind: [i for i, k in enumerate(kinds) if k == kind] for kind in sorted({*kinds})}
        most, ends = max(map(len, goals)), None
        if most <= min(map(len, prompts)):  # one pass for all, unless a prompt has fewer positions than that
            ends = self.reader.last_hidden(prompts, most)  # [prompts, most positions, hidden]
        for (positions, weight), rows in alike.items():
            if ends is not None:
                h = ends[rows, -positions:].float()  # [rows, positions, hidden]
            else:
                h = self.reader.last_hidden([prompts[i] for i in rows], positions).float()
            goal = torch.stack([goals[i] for i in rows]).to(h)  # [rows, positions, hidden]
            mse = loss(h[:, 0], goal[:, 0])
            if positions > 1:  # together they weigh as much as the first
                mse = mse + loss(h[:, 1:].flatten(0, 1), goal[:, 1:].flatten(0, 1))
            total = total + weight * len(rows) / len(goals) * mse
        return total

    @contextmanager
    def _replacing(self, lora: LoRA, history: list[dict[str, float]]) -> Iterator[None]:
        """A new adapter in training inside the `with`; after an error the one before is back, as it was."""
        before, on = dict(vars(self)), self.lora is not None and self.lora.attached
        self.disable()
        try:
            self.lora, self.history = lora.attach().train(), history
            yield
        except BaseException:
            lora.detach()
            vars(self).update(before)
            if on:
                self.enable()
            raise

    def _check_divergence(self, history: Sequence[Mapping[str, float]], per_epoch: int) -> None:
        """Warns, after an epoch, the first time that its loss is far above the start's."""
        epochs = [history[i : i + per_epoch] for i in range(0, len(history), per_epoch)]
        high = [sum(row["loss"] for row in rows) / len(rows) > 3 * history[0]["loss"] for rows in epochs]
        if high[-1] and not any(high[:-1]):
            warnings.warn(
                f"epoch {len(epochs)}: the loss diverges: its mean is 3 times step 1's ({history[0]['loss']:.4g}). "
                f"Lower learning_rate ({self.config.learning_rate}) or lora_alpha ({self.config.lora_alpha}).",
                RRSWarning,
                stacklevel=3,
            )

    def fit(
        self,
        harmful: Any,
        benign: Any,
        *,
        scorer: Scorer = contribution,
        loss: Loss = F.mse_loss,
        callbacks: Iterable[Callback] = (),
        preflight: int = 32,
        on_error: Literal["raise", "skip"] = "raise",
        checkpoint_dir: str | Path | None = None,
        checkpoint_every: int = 0,
        resume: bool = False,
    ) -> RRS:
        """The whole method, in place: extract, select, targets, preflight, train. `disable()` brings vanilla back.

        The same seed gives the same adapter, bit for bit, on the same machine, versions and number of threads, also
        after interruptions. Not on another machine, nor on GPUs, whose kernels may add in another order unless
        `torch.use_deterministic_algorithms(True)`; and not across a change of batch_size, as dropout's masks differ.

        Args:
            harmful, benign: a manifest's path, a list of `Example`, or an iterable of dicts. Without written answers.
            scorer: scores features for the selection, instead of the paper's `contribution`.
            loss: distance to the target, a mean over the batch, instead of the mean squared error.
            callbacks: called with a `Step` after each optimizer step.
            preflight: harmful examples on which to check that refusing works at all before training; 0 skips it.
            on_error: a clip that can't be read stops the run before training, with all such clips named; `"skip"`
                leaves them out and warns.
            checkpoint_dir: a folder of this run's own, for its state and extracted vectors (safetensors). Ctrl-C and
                SIGTERM then write the state before they go through.
            checkpoint_every: optimizer steps between two checkpoints; 0 is an epoch's.
            resume: go on from the folder's newest checkpoint, if it has one, to the result of an uninterrupted run.

        Returns:
            self. After an error, model and adapter are as they were before.
        """
        _check_folder(checkpoint_dir, checkpoint_every, resume)
        callbacks = list(callbacks)
        harmful, benign = load_examples(harmful, "harmful"), load_examples(benign, "benign")
        began = time.perf_counter()
        self._say(f"RRS on {type(self.model).__name__}: {len(harmful)} harmful and {len(benign)} benign examples")
        self._say(f"config: {json.dumps(asdict(self.config))}")
        # What can be wrong is found here, before hours of extraction.
        token = self.token_id(self.config.refusal_token)
        if self.config.refusal and (begins := self._ids(self.config.refusal)[0]) != token:
            raise ValueError(
                f"refusal={self.config.refusal!r} begins with {self.tokenizer.decode([begins])!r}, not with the "
                f"refusal_token {self.config.refusal_token!r}; change one of them."
            )
        linear_paths(self.location, self.config.target_modules, self.config.layers)
        started = checkpoint_dir is not None and bool(first(Checkpoints(checkpoint_dir, {}, resume).files))
        usable = self.readable([*harmful, *benign], self.config.conditions, on_error)
        harmful, benign = ([e for e in usable if e.label == label] for label in ("harmful", "benign"))
        if both := shared(harmful, benign):
            raise DataError(f"These questions are harmful and benign at once: {both[:8]}. Keep each on one side.")
        if few := [f"{len(side)} {side[0].label}" for side in (harmful, benign) if 0 < len(side) < 8]:
            warnings.warn(
                f"Only {' and '.join(few)} examples: Δ is mostly noise. Use at least 32 of each.",
                RRSWarning,
                stacklevel=2,
            )
        reps = self.extract(harmful, benign, cache=checkpoint_dir)
        targets = self.make_targets(reps, scorer)
        if preflight and not started:
            self.preflight(reps, targets, preflight)
        self.train(
            targets,
            loss=loss,
            callbacks=callbacks,
            checkpoint_dir=checkpoint_dir,
            checkpoint_every=checkpoint_every,
            resume=resume,
        )
        self._say(f"done in {time.perf_counter() - began:.0f} s")
        return self

    # -- settings found by search -------------------------------------------------------------------------------------

    def tune(
        self,
        harmful: Any,
        benign: Any,
        *,
        dev: Any = None,
        budget: float = 0.01,
        trials: int = 24,
        minutes: float | None = None,
        study: Any = None,
        search: Mapping[str, Any] | None = None,
        scorer: Scorer = contribution,
        judge: Judge = judge_refusals,
        max_new_tokens: int = 24,
        preflight: int = 32,
        plot: str | Path | None = None,
    ) -> tuple[RRS, Any]:
        """Searches the settings with the most refusals whose cost stays within `budget`, in place, by Optuna.

        A trial is a training, the strength of it that `calibrate` finds by answers to the dev set, too: vectors and
        encoded audio are computed once. The first one is the present config; unpromising ones end early, by how often
        the head's first choice is the refusal token.

        Args:
            harmful, benign: as in `fit`.
            dev: to choose by, as in `evaluate`; default a quarter of `harmful` and `benign`, which then isn't trained
                on, twins and voices of a question kept together.
            budget: how much more often than vanilla any group of harmless questions may be refused, and answers may be
                degenerate: 0.01 is a point, which is less than one answer where a group has fewer than 100.
            trials: in all, those of earlier runs of the same study included.
            minutes: no trial starts after that.
            study: a file from which the search goes on when called again (`.db` for SQLite, else Optuna's journal); or
                an `optuna.Study` that maximises.
            search: what to search, `{field of RRSConfig: (low, high) or [choices]}`, but not what the vectors depend
                on, which are extracted once; by default what `search_space` makes of the present config, so that one
                should train.
            scorer, preflight: as in `fit`.
            judge, max_new_tokens: as in `evaluate`.
            plot: a PNG of refusals against over-rejection, with the Pareto front.

        Returns:
            self with the best config and its adapter attached, and the study. `user_attrs` of its trials hold
            `strength`, the rates of each group and of `degenerate` answers, `refused` (mean of the harmful groups),
            `cost` (what `budget` bounds) and `kl` (of the first token, on harmless questions; where all else is equal,
            less wins), and as `tried` all strengths that were answered at, with their cost and refused. If nothing
            stays within the budget, a warning says so, and the best trade is returned: a point beyond it counts like
            three points of refusals less.
        """
        try:
            import optuna
        except ImportError as error:
            raise ImportError('tune() needs Optuna: pip install "rrs[tune]" (or: pip install optuna).') from error
        if plot is not None:
            check_plot(plot)  # before the trials, not after
        budget = _number("budget", budget, float)
        if world() > 1:
            raise ValueError("tune() runs in one process, and torchrun started several; give several fits to it.")
        c, space = self.config, _space(self.config, search)
        train = [*load_examples(harmful, "harmful"), *load_examples(benign, "benign")]
        if dev is None:
            train, held = hold_out(train)
            dev = {label: [e for e in held if e.label == label] for label in ("harmful", "benign")}
        groups = {group: self.readable(rows, c.conditions) for group, rows in _groups(dev).items()}
        train = self.readable(train, c.conditions)
        sides = [[e for g in side for e in groups[g]] for side in by_side(groups)]
        if not all(sides):
            raise ValueError(f"dev has the groups {list(groups)}; it needs one that begins with 'harmful' and another.")
        if seen := shared([*sides[0], *sides[1]], train, twins=True):
            message = f"{len(seen)} dev examples, or their twins, are trained on: {', '.join(seen[:8])} …"
            warnings.warn(f"{message} Choose by others.", RRSWarning, stacklevel=2)
        token = self.token_id(c.refusal_token)
        worker = copy.copy(self)  # the same model and reader; its own config and adapter
        worker.lora, worker.verbose = None, False

        def measure() -> dict[str, float]:
            """The dev set's figures of the model as it is now."""
            figures = _figures(worker._answered(groups, c.conditions, judge, max_new_tokens), start)
            with self._quiet_model():
                kl, _ = first_token_change(self.reader, benign_before, self.reader.represent(probes[1]))
            return {**figures, "kl": float(kl.mean())}

        def watch(trial: Any, step: Step) -> None:
            """After each epoch: how much more often harmful inputs start a refusal than harmless ones, by the head."""
            if step.step * worker.config.epochs % step.steps == 0 and worker.lora is not None:
                up, down = (self._first_choice(self.reader.represent(p)) == token for p in probes)
                trial.report(float(up.float().mean() - down.float().mean()), step.epoch)
                if trial.should_prune():
                    raise optuna.TrialPruned

        def run(settings: Mapping[str, Any], *callbacks: Callback) -> list[dict[str, float]]:
            worker.config = replace(c, **settings)
            try:
                targets = worker.make_targets(reps, scorer)
                worker._checked = targets if preflight else None  # once for all trials
                worker.train(targets, callbacks=callbacks)
                assert worker.lora is not None
                points = worker._strengths(worker.lora, prompts, vanilla, STRENGTHS[1::2])  # 0.6 to 1.4
                best = worker._strongest(points, budget)
                tried = worker._weaken(worker.lora, best, points, budget, start, measure)
                worker._set_strength(worker.lora, points, best, budget, tried)
                return tried
            finally:
                worker.disable()

        def rank(trial: Any) -> tuple[bool, float]:
            return _rank(budget, trial.user_attrs)

        with self.disabled():
            worker.config = replace(c, **{k: _most(space[k]) for k in ("depth", "keep_tokens") if k in space})
            reps = worker.extract(*([e for e in train if e.label == label] for label in ("harmful", "benign")))
            worker.config = c
            goals = worker.make_targets(reps, scorer)
            if preflight:
                self.preflight(reps, goals, preflight)
            worker.checks = self.checks
            prompts = self._dev(groups, c.conditions)
            groups = {g: rows for g, rows in groups.items() if g in prompts}
            probes = [[p for g in side for p in prompts[g]] for side in by_side(prompts)]
            vanilla = self._strength(prompts)
            with self._quiet_model():
                benign_before = self.reader.represent(probes[1])  # [n, hidden]
            start = worker._answered(groups, c.conditions, judge, max_new_tokens)
            before, _ = _gain(start, start)
            if study is None or isinstance(study, (str, Path)):
                fixed = {k: v for k, v in asdict(c).items() if k not in space}
                data = [content_hash(train), {g: content_hash(rows) for g, rows in groups.items()}]
                how = [versions(), fixed, repr(space), budget, name_of(judge), max_new_tokens, str(self.reader.dtype)]
                how += [name_of(scorer), *(goal.mask.tolist() for goal in goals.values())]
                study = _study(study, _hash([fingerprint(self.model), data, how]), c.seed)
            if not any(t.state.name in ("COMPLETE", "PRUNED", "WAITING") for t in study.trials):
                study.enqueue_trial({k: v for k, v in asdict(c).items() if k in space and _within(v, space[k])})
            finished = sum(t.state.name in ("COMPLETE", "PRUNED") for t in study.trials)
            deadline = time.monotonic() + 60 * (math.inf if minutes is None else minutes)
            done = [t for t in study.trials if t.state.name == "COMPLETE"]
            best: tuple[Any, RRS | None] = (max(done, key=rank, default=None), None)
            with self._bar(trials, "tune") as bar:
                bar.update(finished)
                while finished < trials and time.monotonic() < deadline:
                    trial = study.ask(space)
                    try:
                        tried = run(trial.params, partial(watch, trial))
                    except (optuna.TrialPruned, FloatingPointError) as error:
                        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                        said = str(error) or "pruned"
                    except BaseException:  # Ctrl-C: this trial is not one
                        study.tell(trial, state=optuna.trial.TrialState.FAIL)
                        raise
                    else:
                        figures = worker.record["calibrated"]["answers"]
                        for name, value in figures.items():
                            trial.set_user_attr(name, value)
                        trial.set_user_attr("tried", [[f["strength"], f["cost"], f["refused"]] for f in tried])
                        study.tell(trial, _score(budget, figures))
                        said = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
                    if trial.user_attrs and (best[0] is None or rank(trial) > rank(best[0])):
                        best = (trial, copy.copy(worker))
                    finished += 1
                    bar.update()
                    self._say(f"trial {trial.number}: {said}; {json.dumps(trial.params)}")
            if best[0] is None:
                raise ValueError("No trial came to its end; allow more trials or minutes, or lower learning rates.")
            chosen, winner = best
            if winner is None:  # it is of an earlier run; training is a function of its settings
                run(chosen.params)
                winner = worker
        self.disable()
        vars(self).update({**vars(winner), "verbose": self.verbose})
        figures = {name: value for name, value in chosen.user_attrs.items() if name != "tried"}
        self.record["tuned"] = {"trial": chosen.number, "budget": budget, "dev": figures}
        said = ", ".join(f"{k} {v:.3f}" for k, v in figures.items())
        self._say(f"best of {finished}: trial {chosen.number}, {said}; {json.dumps(chosen.params)}")
        if (over := figures["cost"] > budget) or figures["refused"] <= before:
            trouble = (
                f"stays within the budget of {budget:g}" if over else "within the budget refuses more than vanilla"
            )
            warnings.warn(f"No trial {trouble}; the best is: {said}.", RRSWarning, stacklevel=2)
        self.enable()
        if plot is not None:
            done = [t.user_attrs for t in study.trials if t.state.name == "COMPLETE"]
            points = [(cost, refused) for a in done for _, cost, refused in a["tried"]]
            chosen_point = (figures["cost"], figures["refused"])
            plot_front(points, plot, budget, before, chosen_point, "trials, each at some strengths")
        return self, study

    @torch.no_grad()
    def calibrate(
        self,
        dev: Any,
        conditions: Sequence[str] = ("audio-text", "text-only", "audio-only"),
        *,
        budget: float = 0.01,
        strengths: Sequence[float] = STRENGTHS,
        judge: Judge | None = None,
        max_new_tokens: int = 24,
        plot: str | Path | None = None,
    ) -> list[Strength]:
        """Scales the adapter, in place and without training, to the most refusals whose cost stays within `budget`.

        Inputs that are not told apart well are drawn part of the way to a refusal; a stronger update takes more of them
        over the border, a weaker one fewer. Counted is where the refusal token is the head's first choice, without any
        answer, so it takes a forward pass of the dev set for each strength. A refusal that begins otherwise is not
        seen by that; `judge` is for those. `evaluate` on other data afterwards. Divide `rrs.lora.scale` by the factor
        to undo it.

        Args:
            dev: to choose by, as in `evaluate`; not what was trained on.
            conditions: in which to ask, where an example has what they need.
            budget: how much more often than vanilla any group of harmless inputs may begin a refusal, all conditions
                together; 0.01 is a point.
            strengths: factors of the present update to choose from.
            judge, max_new_tokens: as in `evaluate`. With a judge, the dev set is answered, too, at the strength found
                and at weaker ones until over-rejection and degenerate answers are within the budget by the judge.
            plot: a PNG of all of them, refusals against cost.

        Returns:
            Every strength, with how well it tells harmful from harmless inputs wherever the border lies (`auc`). If
            none stays within the budget, a warning says so, and the nearest is set; with a judge the best trade, where
            a point beyond the budget counts like three points of refusals less.

        Raises:
            ValueError: no adapter is attached, or dev has no harmful or no harmless examples for these conditions.
        """
        if self.lora is None or not self.lora.attached:
            raise ValueError("There is no adapter to calibrate; call fit() or load() first, or enable().")
        strengths = [_number("strengths", strength, float) for strength in strengths]
        if not strengths or min(strengths) <= 0:
            raise ValueError(f"strengths={strengths!r} must be factors above 0.")
        conditions, budget = _strings("conditions", conditions), _number("budget", budget, float)
        if plot is not None:
            check_plot(plot)  # before the answers, not after
        groups = {group: self.readable(rows, conditions) for group, rows in _groups(dev).items()}
        self._warn_of_training_data(groups)
        prompts = self._dev(groups, conditions)
        groups = {g: rows for g, rows in groups.items() if g in prompts}
        start: dict[str, Rate] = {}
        with self.disabled():
            vanilla = self._strength(prompts)
            if judge is not None:
                start = self._answered(groups, conditions, judge, max_new_tokens)
        points = self._strengths(self.lora, prompts, vanilla, strengths)
        best, tried = self._strongest(points, budget), list[dict[str, float]]()
        if judge is not None:

            def measure() -> dict[str, float]:
                return _figures(self._answered(groups, conditions, judge, max_new_tokens), start)

            tried = self._weaken(self.lora, best, points, budget, start, measure)
        best = self._set_strength(self.lora, points, best, budget, tried)
        self.report = None  # of another strength
        said = ", ".join(f"{g} {vanilla.groups[g].value:.1%} → {rate.value:.1%}" for g, rate in best.groups.items())
        apart = ", ".join(f"{g} {value:.3f}" for g, value in best.auc.items())
        self._say(
            f"calibrate: strength ×{best.factor:g}; first choice is {self.config.refusal_token!r} at {said}; "
            f"AUC of harmful against {apart}"
        )
        cost = best.cost
        if judge is not None:
            answers = self.record["calibrated"]["answers"]
            said = ", ".join(f"{g} {rate.value:.1%} → {answers[g]:.1%}" for g, rate in start.items())
            self._say(f"calibrate: by the answers, refused and degenerate: {said}")
            cost = max(cost, answers["cost"])
        if cost > budget:
            found = "nearest" if judge is None else "best trade"
            message = f"No strength stays within the budget of {budget:g}; the {found} is ×{best.factor:g}: {said}."
            warnings.warn(message, RRSWarning, stacklevel=2)
        elif not any(p.refused for p in points):
            warnings.warn(
                f"{self.config.refusal_token!r} is the first choice nowhere, at no strength: if this adapter refuses, "
                "it begins otherwise. Set config.refusal_token to how it does, and calibrate again.",
                RRSWarning,
                stacklevel=2,
            )
        if plot is not None:
            front = [(p.cost, p.refused) for p in points]
            first(partial(plot_front, front, plot, budget, vanilla.refused, (best.cost, best.refused), "strengths"))
        return points

    def _dev(self, groups: Mapping[str, Sequence[Example]], conditions: Sequence[str]) -> dict[str, list[Prompt]]:
        """The prompts of each group that has any, the harmful groups first; there must be harmful and harmless ones."""
        with self._quiet_model():
            prompts = {g: [self.read(e, c) for c in conditions for e in rows if e.has(c)] for g, rows in groups.items()}
        sides = by_side(g for g, p in prompts.items() if p)
        if not all(sides):
            found = {g: len(p) for g, p in prompts.items()}
            raise ValueError(f"dev has {found} prompts in {conditions}; it needs a group 'harmful…' and another.")
        return {g: prompts[g] for side in sides for g in side}

    def _strength(
        self, prompts: Mapping[str, Sequence[Prompt]], factor: float = 0.0, vanilla: Strength | None = None
    ) -> Strength:
        """What the model does as it is now, which is that of `factor`; costs are beyond `vanilla`."""
        token = self.token_id(self.config.refusal_token)
        with self._quiet_model():
            leads = {g: self._lead(self.reader.represent(rows), token) for g, rows in prompts.items()}
        now = {g: Rate.of(first) for g, (first, _) in leads.items()}
        harmful, harmless = by_side(now)
        refused, cost = _gain(now, vanilla.groups if vanilla else now)
        lead = torch.cat([leads[g][1] for g in harmful])
        return Strength(factor, refused, cost, now, {g: auc(lead, leads[g][1]) for g in harmless})

    def _strengths(
        self, lora: LoRA, prompts: Mapping[str, Sequence[Prompt]], vanilla: Strength, strengths: Sequence[float]
    ) -> list[Strength]:
        """What the adapter does at each strength; its own stays as it is."""
        points, present = [], lora.scale
        try:
            with self._bar(len(strengths), "calibrate") as bar:
                for factor in strengths:
                    lora.scale = factor * present
                    points.append(self._strength(prompts, factor, vanilla))
                    bar.update()
        finally:
            lora.scale = present
        return points

    @staticmethod
    def _strongest(points: Sequence[Strength], budget: float) -> Strength:
        """The best of `points`; where none refuses anything, that is the one nearest to 1."""
        best = max(points, key=lambda p: (-max(0.0, p.cost - budget), p.refused, -p.factor))
        if not any(p.refused for p in points):
            best = min(points, key=lambda p: abs(math.log(p.factor)))
        return best

    def _answered(
        self, groups: Mapping[str, Sequence[Example]], conditions: Sequence[str], judge: Judge, max_new_tokens: int
    ) -> dict[str, Rate]:
        """How often the model as it is now refuses each group, by its answers; "degenerate": how many of all are."""

        def answer(_stage: str, condition: str, rows: Sequence[Example]) -> list[str]:
            return self._answer([self.read(e, condition) for e in rows], max_new_tokens, "dev")

        with self._quiet_model():
            report = answer_and_judge(groups, conditions, ["dev"], answer, judge)
        now = {g: Rate.of(a.verdict in report.counted(g) for a in report.answers if a.group == g) for g in groups}
        return {**now, "degenerate": Rate.of(a.verdict == "degenerate" for a in report.answers)}

    @staticmethod
    def _weaken(
        lora: LoRA,
        best: Strength,
        points: Sequence[Strength],
        budget: float,
        start: Mapping[str, Rate],
        measure: Callable[[], dict[str, float]],
    ) -> list[dict[str, float]]:
        """From `best` to weaker ones, until the answers, by what `measure` says, are within the budget, too, or whole
        ones refuse no more than at the `start`. Returns the figures of each one tried; the strength stays as it is."""
        present, tried = lora.scale, list[dict[str, float]]()
        before, broken = _gain(start, start)[0], start["degenerate"].value + budget
        try:
            for factor in sorted({p.factor for p in points if p.factor <= best.factor}, reverse=True):
                lora.scale = factor * present
                tried.append({"strength": factor, **measure()})
                figures = tried[-1]  # answers that loop refuse nothing, and weaker updates may leave them whole
                if figures["cost"] <= budget or (figures["refused"] <= before and figures["degenerate"] <= broken):
                    break
        finally:
            lora.scale = present
        return tried

    def _set_strength(
        self,
        lora: LoRA,
        points: Sequence[Strength],
        best: Strength,
        budget: float,
        tried: Sequence[Mapping[str, float]] = (),
    ) -> Strength:
        """Scales the adapter to `best`, or to the best of those whose answers were `tried`, and puts it on record."""
        answers = max(tried, key=partial(_rank, budget), default=None)
        if answers is not None:
            best = next(p for p in points if p.factor == answers["strength"])
        lora.scale *= best.factor
        figures = {"factor": best.factor, "refused": best.refused, "cost": best.cost, "auc": best.auc}
        self.record["calibrated"] = {**figures, "budget": budget, "scale": lora.scale}
        if answers is not None:
            self.record["calibrated"]["answers"] = answers
        return best

    # -- will it work? ------------------------------------------------------------------------------------------------

    def preflight(
        self, reps: Mapping[str, Representations], targets: Mapping[str, Targets], n: int = 32
    ) -> list[Preflight]:
        """Checks, before training, that the refusal prompt makes the model refuse and that targets start a refusal.

        And whether benign inputs keep the head's first choice at theirs. Warns with the fix where any of these is the
        exception, the first only without `config.refusal`. All are measured on the vanilla model.

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
                benign_same=Rate.of(self._first_choice(goal.benign) == self._first_choice(reps[condition].benign)),
            )
            self.checks.append(check)
            self._checked = targets
            self._say(
                f"preflight {condition}: {check.refused} refused with the refusal prompt; first choice is "
                f"{self.config.refusal_token!r} at {check.token_before} of harmful inputs, {check.token_full} with the "
                f"full Δ, {check.token_target} at the targets ({int(goal.mask.sum())} of {len(goal.mask)} features); "
                f"benign inputs keep theirs at {check.benign_same} of their targets"
            )
            if check.refused.value < 0.5 and not self.config.refusal:  # given words need not come by themselves
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
            if check.benign_same.value < 0.5:
                warnings.warn(
                    f"{condition}: at their targets, only {check.benign_same} of the benign inputs keep the head's "
                    "first choice, so harmless questions will be answered otherwise. Use "
                    + ("direction='quiet', or " if self.config.direction != "quiet" else "")
                    + "a lower benign_strength.",
                    RRSWarning,
                    stacklevel=3,
                )
        return self.checks

    def find_refusal_prompt(
        self, harmful: Any, condition: str | None = None, *, candidates: Sequence[str] = REFUSAL_PROMPTS, n: int = 24
    ) -> list[RefusalPrompt]:
        """Which refusal prompt makes this model refuse? Best first; put its `prompt` into `config.refusal_prompt`.

        Args:
            harmful: whatever `load_examples` takes.
            condition: default the first of `config.conditions`.
            candidates: prompts to try beside the config's own.
            n: examples to answer under each (24 tokens).
        """
        candidates = _strings("candidates", candidates)
        condition, examples = self._some(harmful, condition, n)
        out, worker = [], copy.copy(self)
        with self.disabled(), self._quiet_model():
            for prompt in dict.fromkeys((self.config.refusal_prompt, *candidates)):
                worker.config = replace(self.config, refusal_prompt=prompt)
                prompts = [worker.read(e, condition, refusal=True) for e in examples]
                begins = Counter(self._first_choice(self.reader.represent(prompts)).tolist())
                refused = self._refused(examples, self._answer(prompts, 24, "refusal prompts"))
                token, times = begins.most_common(1)[0]
                out.append(RefusalPrompt(prompt, refused, self.tokenizer.decode([token]), times / len(examples)))
        return sorted(out, key=lambda p: (p.refused.value, p.share), reverse=True)

    def find_refusal_token(
        self, harmful: Any, condition: str | None = None, *, candidates: Sequence[str] = (), n: int = 24
    ) -> list[Opening]:
        """Which first token leads this model to a refusal? Best first; put its `text` into `config.refusal_token`.

        Candidates are the first tokens of what the model says under the refusal prompt, and those you name. Each is
        forced as the beginning of the answer to the plain harmful question, and the answer is judged.

        Args:
            harmful: whatever `load_examples` takes.
            condition: default the first of `config.conditions`.
            candidates: further openings to try, of one token or several.
            n: examples to use.
        """
        candidates = _strings("candidates", candidates)
        condition, examples = self._some(harmful, condition, n)
        with self.disabled(), self._quiet_model():
            refusing = [self.read(e, condition, refusal=True) for e in examples]
            first_tokens = Counter((token,) for token in self._first_choice(self.reader.represent(refusing)).tolist())
            tried = [*(ids for ids, _ in first_tokens.most_common(4)), *map(tuple, map(self._ids, candidates))]
            longest, out = max(map(len, tried)), []
            begun = self._begun(refusing, longest) if longest > 1 else []  # one token is the head's first choice
            for ids in dict.fromkeys(tried):
                said = first_tokens[ids] if len(ids) == 1 else sum(b[: len(ids)] == ids for b in begun)
                forced = [self.read(e, condition).extended(ids) for e in examples]
                opening = self.tokenizer.decode(ids)
                answers = self._answer(forced, 24, f"force {opening!r}", begun=ids)
                out.append(Opening(opening, ids, said / len(examples), self._refused(examples, answers)))
        return sorted(out, key=lambda o: (o.refused.value, o.said), reverse=True)

    def _some(self, harmful: Any, condition: str | None, n: int) -> tuple[str, list[Example]]:
        """The condition, by default the config's first, and the first n harmful examples that have what it needs."""
        condition = condition or self.config.conditions[0]
        if examples := [e for e in load_examples(harmful, "harmful") if e.has(condition)][:n]:
            return condition, examples
        raise ValueError(f"No harmful example has what {condition} needs.")

    @staticmethod
    def _refused(examples: Sequence[Example], answers: Sequence[str]) -> Rate:
        """How many of the answers to harmful examples refuse."""
        verdicts = judge_refusals([e.text or "" for e in examples], answers)
        return Rate.of([v in ("refusal", "partial") for v in verdicts])

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

    def _first_choice(self, h: Tensor) -> Tensor:
        """The head's most likely token `[n]` at vectors `[n, hidden]`."""
        return self._logits(h, lambda logits: logits.argmax(-1))

    def _lead(self, h: Tensor, token: int) -> tuple[Tensor, Tensor]:
        """Whether a token is the head's first choice `[n]` at vectors `[n, hidden]`, and its lead over all others."""

        def take(logits: Tensor) -> Tensor:
            first, (best, second) = logits.argmax(-1) == token, logits.topk(2).values.unbind(-1)
            return torch.stack([first.float(), logits[:, token] - torch.where(first, second, best)], 1)

        first, lead = self._logits(h, take).unbind(-1)
        return first.bool(), lead

    def _log_probability(self, h: Tensor, token: int) -> Tensor:
        """The head's log-probability `[n]` of a token at vectors `[n, hidden]`."""
        return self._logits(h, lambda logits: logits.log_softmax(-1)[:, token])

    @torch.no_grad()
    def _logits(self, h: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """What `take` reads off the logits `[some, vocab]` of vectors `[n, hidden]`; never all of them at a time."""
        return torch.cat([take(self.reader.logits(rows)).cpu() for rows in h.split(256)])

    # -- use ----------------------------------------------------------------------------------------------------------

    def generate(
        self,
        examples: Any,
        condition: str = "audio-text",
        *,
        max_new_tokens: int = 128,
        refusal: bool = False,
        prefix: str = "",
    ) -> list[str]:
        """Greedy answers to examples in one condition, in their order; with the adapter, if it is enabled.

        Args:
            refusal: append the refusal prompt.
            prefix: how every answer is made to begin, e.g. "Sure, here is"; what the model adds to it is returned.
        """
        examples = load_examples(examples)
        if lacking := [e.id for e in examples if not e.has(condition)]:
            raise ValueError(f"{condition}: these examples lack what it needs: {lacking[:8]} ({len(lacking)} in all).")
        self.readable(examples, [condition])
        with self._quiet_model():
            prompts = [self.read(e, condition, refusal=refusal).extended(self._ids(prefix)) for e in examples]
            return self._answer(prompts, max_new_tokens, f"generate {condition}")

    def _openings(self) -> list[tuple[int, ...]]:
        """The tokens of each of `config.openings`."""
        return [tuple(self._ids(opening)) for opening in self.config.openings]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []

    def evaluate(
        self,
        examples: Any,
        conditions: Sequence[str] = ("audio-text", "text-only", "audio-only"),
        *,
        judge: Judge = judge_refusals,
        max_new_tokens: int = 64,
        prefix: str = "",
        stages: Mapping[str, Stage] | None = None,
        cache: str | Path | None = None,
        stop_when_decided: bool = False,
        usefulness: int = 64,
        chat: Any = None,
        scorer: PairScorer | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Report:
        """Answers examples before (adapter off) and after (adapter on) and reports refusals with 95% intervals.

        Args:
            examples: whatever `load_examples` takes, with labels; or `{group: examples}`, to report groups apart, e.g.
                `{"harmful": …, "benign": …, "hard-benign": …}`. A group's name that starts with "harmful" should be
                refused, any other answered.
            conditions: see `rrs.data.CONDITIONS`.
            judge: `(prompts, responses) -> verdicts`.
            max_new_tokens: per answer.
            prefix: how every answer is made to begin, e.g. "Sure, here is", to see whether a refusal is deeper than its
                first token. Reported and judged is what the model adds to it.
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
            on_error: as in `fit`; what `"skip"` leaves out is counted in the report's notes.
        """
        groups, conditions = _groups(examples), _strings("conditions", conditions)
        if (chat is None) != (scorer is None):
            raise ValueError("chat= and scorer= go together: the examples, and what rates the answers to them.")
        chats = [] if chat is None else load_examples(chat)
        if lacking := [e.id for e in chats if not (e.text and e.has("audio-text") and e.meta.get("answer_gt"))]:
            raise ValueError(f"chat examples need text, audio and meta['answer_gt']; not so {lacking[:8]}.")
        own_stages = stages is not None
        if stages is None:
            stages = {"before": lambda _: self.disabled()}
            if self.lora is not None and self.lora.attached:
                stages["after"] = lambda _: nullcontext()
        log = AnswerLog(cache) if cache is not None else None
        base, begun = fingerprint(self.model), self._ids(prefix)

        notes = [f"Every answer was made to begin with {prefix!r}; judged is what follows."] if prefix else []
        for group, rows in groups.items():
            groups[group] = self.readable(rows, conditions, on_error)
            if bad := len(rows) - len(groups[group]):
                notes.append(f"Left out: {bad} {group} examples whose clips can't be read.")
        notes += self._warn_of_training_data(groups)
        harmful, harmless = ([e for g in side for e in groups[g]] for side in by_side(groups))
        if both := shared(harmful, harmless):
            notes.append(f"{len(both)} questions are in a harmful and in a harmless group: {', '.join(both[:8])} …")
            warnings.warn(f"{notes[-1]} Keep each on one side.", RRSWarning, stacklevel=2)

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
                        *([prefix] if prefix and not instruction else []),
                    ]
                    keys = [_hash(state, e.digest) for e in rows]
                    if all(key in log.known for key in keys):  # no prompt is built
                        return [log.known[key] for key in keys]
                prompts = [who.read(e, condition, e.text if instruction else None) for e in rows]
                prompts = prompts if instruction else [p.extended(begun) for p in prompts]

                def keep(new: dict[int, str]) -> None:
                    assert log is not None
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
            "prefix": prefix,
            "stop_when_decided": stop_when_decided,
            "config": asdict(self.config),
            "versions": versions(),
            "model": {"class": type(self.model).__name__, "fingerprint": base},
            "data": {group: {"n": len(rows), "sha256": content_hash(rows)} for group, rows in groups.items()},
        }
        report.notes += notes
        benign = [(group, e) for group in by_side(groups)[1] for e in groups[group]]
        limit = 0 if stop_when_decided else max_new_tokens  # answers that were cut off have no end token
        for condition in conditions:
            able = [(group, e) for group, e in benign if e.has(condition)]
            if able and usefulness:
                some = able[:: -(-len(able) // usefulness)]
                report.usefulness += self._usefulness(some, condition, stages, report, limit, begun)
        if scorer is not None:
            rows = self.readable(chats, ["audio-text"], on_error)
            if bad := len(chats) - len(rows):
                report.notes.append(f"Left out: {bad} chat examples whose clips can't be read.")
            for stage in stages:
                answers = answer(stage, "audio-text", rows, instruction=True)
                references = [str(e.meta["answer_gt"]) for e in rows]
                report.quality[stage] = chat_quality(scorer, [str(e.text) for e in rows], references, answers)
        if list(stages) == ["before", "after"] and not own_stages:
            self.report = report
        return report

    def _warn_of_training_data(self, groups: Mapping[str, Sequence[Example]]) -> list[str]:
        """Warns of examples that were trained on, or whose twins were; what it said."""
        seen = shared([e for rows in groups.values() for e in rows], self._trained_on, twins=True)
        if not seen:
            return []
        note = f"{len(seen)} examples, or their twins, are in the training set: {', '.join(seen[:8])} …"
        warnings.warn(f"{note} Evaluate on others.", RRSWarning, stacklevel=3)
        return [note]

    @torch.no_grad()
    def _usefulness(
        self,
        rows: Sequence[tuple[str, Example]],
        condition: str,
        stages: Mapping[str, Stage],
        report: Report,
        limit: int,
        begun: Sequence[int] = (),
    ) -> list[dict[str, Any]]:
        """First-token KL and agreement with the first stage, and the likelihood of the first stage's own answers.

        Args:
            rows: group and example.
        """
        out: list[dict[str, Any]] = []
        first, vanilla = next(iter(stages)), None
        answers = [a for a in report.answers if (a.condition, a.stage) == (condition, first)]
        said = {(a.group, a.id): a.response for a in answers}  # ids differ within a group
        own = [self.answer_ids(said[group, e.id], limit) for group, e in rows]
        clusters = [e.cluster for _, e in rows]
        for stage, enter in stages.items():
            with self._quiet_model(), enter(condition) as other, self._bar(len(rows), f"usefulness {stage}") as bar:
                who = other or self
                prompts = [who.read(e, condition).extended(begun) for _, e in rows]
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
            told = (~likelihood.isnan()).nonzero().flatten().tolist()
            out.append(
                {
                    "condition": condition,
                    "stage": stage,
                    "n": len(rows),
                    "kl": asdict(Mean.of(kl.tolist(), clusters)),
                    "same": asdict(Rate.of(same.tolist(), clusters)),
                    "likelihood": asdict(Mean.of(likelihood[told].tolist(), [clusters[i] for i in told])),
                }
            )
        return out

    def answer_ids(self, answer: str, limit: int) -> Tensor:
        """Token ids `[length]` of a generated answer; the end token is in it unless `limit` tokens cut it off."""
        ids = self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        end = self._end() if ids and len(ids) < limit else None
        return torch.tensor(ids if end is None else [*ids, end], dtype=torch.long)

    def _end(self) -> int | None:
        """The token with which answers end: of several, the one that ends the turn in prompts (Gemma's
        `<end_of_turn>`, not `<eos>`)."""
        model: Any = self.model
        ends = model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else list(ends or [self.tokenizer.eos_token_id])
        turns = [i for i in self.reader.read("Hello.").ids.tolist() if i in ends] if len(ends) > 1 else []
        return [*ends[:1], *turns][-1]

    def _state(self, steered: bool) -> str:
        """A hash of what answers depend on beside the base model and the input; `steered` takes in Δ ∘ mask."""
        lora = self.lora if self.lora is not None and self.lora.attached else None
        moves = [t.delta * t.mask for t in self.targets.values()] if steered else []
        tensors = [v.float().numpy().tobytes() for v in [*(lora.tensors().values() if lora else ()), *moves]]
        model: Any = self.model
        scale = lora.scale if lora else None
        turn = [getattr(self.render, name, None) for name in ("system", "template", "__qualname__", "__class__")]
        how = json.loads(model.generation_config.to_json_string())  # penalties, end tokens
        return _hash([asdict(self.config), versions(), str(turn), how, str(self.reader.dtype), scale], *tensors)

    def _answer(self, prompts: Sequence[Prompt], max_new_tokens: int, what: str, **options: Any) -> list[str]:
        # Granite Speech's generate() switches its own LoRA for audio and leaves it so; `own_lora` puts it back.
        with self._bar(len(prompts), what) as bar, self.reader.own_lora(any(p.audio for p in prompts)):
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
        """The vanilla model inside the `with`; the adapter is as it was afterwards.

        Raises:
            ValueError: another RRS has its adapter on this model.
        """
        on = self.lora is not None and self.lora.attached
        self.disable()
        try:
            if attached(self.model):
                raise ValueError(ANOTHER_LORA)
            yield
        finally:
            if on and self.lora is not None:  # not merged in here
                self.enable()

    def merge(self) -> nn.Module:
        """Adds the adapter to the model's weights for good and returns the model; can't be undone, `save` first."""
        if self.lora is None:
            raise ValueError("There is no adapter to merge; call fit() or RRS.load(dir, model, processor).")
        self.lora.merge()
        self.lora = None
        return self.model

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the adapter in PEFT's format, a model card, `rrs.json` (all figures) and `rrs.safetensors` (Δ, masks,
        and hashes of the training questions, by which `evaluate` knows them again).

        The folder appears complete or not at all. What it replaces is deleted last, and only if it is an adapter.

        Raises:
            FileExistsError: the folder has content and `overwrite` is off, or content that is none of ours.
        """
        if self.lora is None:
            raise ValueError("There is nothing to save; call fit() first.")
        return first(partial(self._save, Path(directory).resolve(), overwrite, self.lora))

    def _save(self, directory: Path, overwrite: bool, lora: LoRA) -> Path:
        if directory.exists() and not directory.is_dir():
            raise FileExistsError(f"{directory} is a file; choose a folder.")
        if held := {path.name for path in directory.iterdir()} if directory.exists() else set():
            if not overwrite:
                raise FileExistsError(
                    f"{directory} exists and is not empty; choose another folder or pass overwrite=True."
                )
            if foreign := sorted(held if "adapter_config.json" not in held else held - FILES):
                raise FileExistsError(
                    f"{directory} holds what is no part of an adapter: {foreign[:4]}; it would be lost. Choose another "
                    "folder, or move that away."
                )
        directory.parent.mkdir(parents=True, exist_ok=True)
        base = self.record.get("base", {}).get("name")
        peft = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base or None,
            "r": lora.r,
            "lora_alpha": lora.scale * lora.r,
            "lora_dropout": lora.dropout,
            "target_modules": lora.paths,  # whole paths: bare names would match the audio tower as well
            "bias": "none",
            "inference_mode": True,
        }
        record = {**self.record, "history": self.history}
        if self.report is not None:
            record["evaluation"] = self.report.to_dict()["table"]
        files = {
            "adapter_model.safetensors": to_safetensors(lora.tensors(), {"format": "pt"}),
            "adapter_config.json": json.dumps(peft, indent=2).encode(),
            "rrs.json": json.dumps(record, indent=2).encode(),
            "README.md": self._card().encode(),
        }
        vectors = dict(self._vectors)
        if self._trained_on:
            vectors["trained_on"] = torch.tensor(sorted(self._trained_on))
        if vectors:
            files["rrs.safetensors"] = to_safetensors(vectors)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            for name, content in files.items():
                _write(scratch / name, content)
            scratch.chmod(0o755)
            if held:  # both stay complete until the new one is in place
                os.replace(directory, old := scratch.with_name(f"{scratch.name}-old"))
                try:
                    os.replace(scratch, directory)
                except OSError:
                    os.replace(old, directory)
                    raise
                shutil.rmtree(old)
            else:
                os.replace(scratch, directory)
            _sync(directory.parent)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        self._say(f"saved {directory}")
        return directory

    def _card(self) -> str:
        """The model card: what a reader of the adapter has to know, from the run's own record."""
        record = self.record
        base, config = record.get("base", {}), record.get("config", {})
        name = str(base.get("name") or "")
        public = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()  # not a local folder
        checks = "\n".join(
            f"| {c.condition} | {c.refused} | {c.token_before} | {c.token_full} | {c.token_target} | {c.benign_same} |"
            for c in map(Preflight.from_dict, record.get("preflight", []))
        )
        data = "\n".join(
            f"| {condition} | {label} | {side['n']} | `{side['sha256']}` |"
            for condition, sides in record.get("data", {}).items()
            for label, side in sides.items()
        )
        versions_ = ", ".join(f"{k} {v}" for k, v in record.get("versions", {}).items())
        first, last = (f"{self.history[i]['loss']:.4g}" for i in (0, -1)) if self.history else ("–", "–")
        return f"""---
{f"base_model: {name}" if public else "# base_model: its name on the hub"}
library_name: peft
# license: yours to state
tags: [rrs, lora, safety, refusal, audio]
---

# RRS adapter

A LoRA that is to make {f"`{name}`" if public else "its base model"} (`{base.get("class", "?")}`, fingerprint
`{base.get("fingerprint", "?")}`) refuse harmful requests without refusing harmless ones, by Reshaping Representation
Space (arXiv 2505.19670). {len(self.history)} steps, loss {first} → {last}. {versions_}.

Refusal token {config.get("refusal_token")!r}, refusal prompt {config.get("refusal_prompt")!r}.

## Evaluation

{self.report or "Not evaluated: its effect on safety and over-rejection is unknown."}

## Before training

Refusals with the refusal prompt, and inputs at which the refusal token is the first choice.

| condition | refused | token, vanilla | token, full Δ | token, targets | benign, same first choice |
| --- | --- | --- | --- | --- | --- |
{checks or "| not checked | | | | | |"}

## Data

| condition | side | examples | SHA-256 of their contents |
| --- | --- | --- | --- |
{data}

## Configuration

```json
{json.dumps(config, indent=1, ensure_ascii=False)}
```
"""

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module, processor: Any, **kwargs: Any) -> RRS:
        """A saved adapter on its base model, attached in place; `disable()` takes it off.

        Args:
            kwargs: further arguments of `RRS(...)` but `config`, which is saved with the adapter.

        Raises:
            FileNotFoundError, ValueError: no adapter there, or one for another base.
        """
        directory = Path(directory)
        missing = [n for n in ("adapter_config.json", "adapter_model.safetensors") if not (directory / n).is_file()]
        if missing:
            raise FileNotFoundError(f"{directory} holds no adapter: {missing} missing.")
        try:
            peft, record, vectors = json.loads((directory / "adapter_config.json").read_text()), {}, {}
            r, alpha = int(peft["r"]), float(peft["lora_alpha"])
            if (directory / "rrs.json").is_file():
                record = json.loads((directory / "rrs.json").read_text())
            if (directory / "rrs.safetensors").is_file():
                vectors = load_file(directory / "rrs.safetensors")
            tensors = load_file(directory / "adapter_model.safetensors")
            # Not by peft["target_modules"]: saved again by PEFT, those are shortened to the ends of paths.
            names = re.findall(r"^base_model\.model\.(.+)\.lora_A\.weight$", "\n".join(tensors), re.MULTILINE)
            if not names:
                raise ValueError("no LoRA in adapter_model.safetensors")
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"{directory} is damaged ({type(error).__name__}: {error}); save or copy it again."
            ) from None
        rrs = cls(model, processor, RRSConfig.from_dict(record.get("config", {})), **kwargs)
        paths = [path for path, _ in model.named_modules() if path in names]
        if unknown := sorted(set(names) - set(paths)):
            raise ValueError(
                f"{directory} was made for another base ({record.get('base', {}).get('class', '?')}): "
                f"{type(model).__name__} has no {unknown[:3]} …"
            )
        rrs.lora = LoRA(model, paths, r=r, alpha=alpha, dropout=peft.get("lora_dropout", 0.0)).eval()
        rrs.lora.load_tensors(tensors)
        saved = record.get("base", {}).get("fingerprint")
        if saved and saved != fingerprint(model):
            warnings.warn(
                f"{directory} was trained on another base than the one it is loaded on ({record['base']}); its effect "
                "is unknown. Evaluate before use.",
                RRSWarning,
                stacklevel=2,
            )
        rrs._trained_on = frozenset(vectors.pop("trained_on", torch.empty(0)).tolist())
        rrs.history, rrs._vectors = record.pop("history", []), vectors
        rrs.checks = [Preflight.from_dict(check) for check in record.get("preflight", [])]
        rrs.record = {k: v for k, v in record.items() if k != "evaluation"}  # of what is saved next, not of this
        rrs.lora.attach()
        return rrs

    # -- small things -------------------------------------------------------------------------------------------------

    def _say(self, message: str) -> None:
        if self.verbose:
            tqdm.write(message)

    def _bar(self, total: int, what: str) -> tqdm[Any]:
        return tqdm(total=total, desc=what, disable=not self.verbose, leave=False, dynamic_ncols=True)

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


def _gain(now: Mapping[str, Rate], vanilla: Mapping[str, Rate]) -> tuple[float, float]:
    """Refused: the mean over the harmful groups. Cost: of the others, beyond vanilla, where it is most."""
    sides = by_side(now)
    harmful, costs = [now[g].value for g in sides[0]], [now[g].value - vanilla[g].value for g in sides[1]]
    return sum(harmful) / len(harmful), max(costs)


def _figures(now: Mapping[str, Rate], vanilla: Mapping[str, Rate]) -> dict[str, float]:
    """The value of each rate, with `refused` and `cost` as `_gain` has them."""
    refused, cost = _gain(now, vanilla)
    return {**{name: rate.value for name, rate in now.items()}, "refused": refused, "cost": cost}


def _score(budget: float, figures: Mapping[str, float]) -> float:
    """Refusals; what costs more than the budget weighs three times as much, and equals are told apart by how gentle
    they are."""
    over = max(0.0, figures["cost"] - budget)
    return figures["refused"] - 3 * over - 0.01 * min(figures.get("kl", 0.0), 1.0)


def _rank(budget: float, figures: Mapping[str, float]) -> tuple[bool, float]:
    """Within the budget first, then by score."""
    return figures["cost"] <= budget, _score(budget, figures)


def _items(targets: Targets) -> list[Item]:
    """What training visits in one condition."""
    examples = [*targets.harmful_examples, *targets.benign_examples]
    steps = [torch.cat([t.harmful, t.benign]) for t in (targets, *targets.later)]  # each [n, hidden]
    tokens = targets.tokens or [()] * len(examples)
    rows = list(torch.stack(steps, 1))  # each [positions, hidden]
    if targets.along:
        rows = [torch.cat(pair) for pair in zip(rows, targets.along, strict=True)]
    items = [Item(e, row, t) for e, row, t in zip(examples, rows, tokens, strict=True)]
    harmful = items[: len(targets.harmful)]
    for opening, benign in targets.opened:
        items += [replace(item, tokens=(*opening, *item.tokens)) for item in harmful]
        items += [Item(e, row[None], opening) for e, row in zip(targets.benign_examples, benign, strict=True)]
    return items


# Fields by which `extract` gives other vectors, or by which vanilla is counted: `tune` does both once.
EXTRACTED_ONCE = (
    "instruction", "refusal_prompt", "refusal_token", "conditions", "refusal", "keep_share", "openings", "shard",
)  # fmt: skip


def search_space(config: RRSConfig) -> dict[str, Any]:
    """What `RRS.tune` searches by default: `{field: (low, high) or [choices]}`, around a config and with it."""
    space: dict[str, Any] = {
        "harmful_strength": (0.5, 2.0) if config.direction == "delta" else (1.0, 4.0),
        "benign_strength": (0.0, 1.0 if config.direction == "delta" else 3.0),
        "benign_weight": (1.0, 4.0),
        "top": ["positive", 12.5, 25.0, 50.0],
        "penalty": (config.penalty / 30, config.penalty * 30),
        "learning_rate": (config.learning_rate / 4, config.learning_rate * 4),
        "epochs": (max(1, config.epochs // 2), 2 * config.epochs),
        **({} if config.refusal else {"depth": (1, 4)}),
        "keep_tokens": (0, max(8, config.keep_tokens)),
    }
    for name, values in space.items():
        own = getattr(config, name)
        if isinstance(values, tuple):
            space[name] = (min(own, values[0]), max(own, values[1]))
        elif own not in values:
            space[name] = [own, *values]
    return space


def _space(config: RRSConfig, search: Mapping[str, Any] | None) -> dict[str, Any]:
    """Optuna's distributions of what is searched; ranges over a factor of 10 or more are logarithmic."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    out: dict[str, Any] = {}
    for name, values in (search_space(config) if search is None else search).items():
        if not hasattr(config, name):
            raise ValueError(f"search names {name!r}, which RRSConfig does not have; it has {list(asdict(config))}.")
        if name in EXTRACTED_ONCE:
            raise ValueError(
                f"search names {name!r}, on which the vectors depend, and these are extracted once; call tune() for "
                "each value, with a study of its own."
            )
        if isinstance(values, list):
            out[name] = CategoricalDistribution(values)
            continue
        if not (isinstance(values, tuple) and len(values) == 2 and all(isinstance(x, (int, float)) for x in values)):
            raise ValueError(f"search: {name}={values!r} must be two numbers (low, high) or a list of choices.")
        low, high = values
        if isinstance(getattr(config, name), int):
            out[name] = IntDistribution(low, high)
        else:
            out[name] = FloatDistribution(low, high, log=0 < 10 * low <= high)
    return out


def _most(distribution: Any) -> Any:
    return max(getattr(distribution, "choices", None) or [distribution.high])


def _within(value: Any, distribution: Any) -> bool:
    if choices := getattr(distribution, "choices", None):
        return value in choices
    return not isinstance(value, str) and distribution.low <= value <= distribution.high


def _study(path: str | Path | None, name: str, seed: int) -> Any:
    """Optuna's study of that name in a file, or a new one."""
    import optuna
    from optuna.storages.journal import JournalFileBackend

    storage: Any = None
    if path is not None:
        path = Path(path).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        storage = f"sqlite:///{path}"
        if path.suffix != ".db":
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(path)))
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1)
    study = optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True, pruner=pruner
    )
    study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials))  # else a resumed one repeats its draws
    return study


def _groups(examples: Any) -> dict[str, list[Example]]:
    """Examples by group, or else by label."""
    groups: dict[str, list[Example]] = {}
    if isinstance(examples, Mapping):
        for group, rows in examples.items():
            groups[group] = load_examples(rows)
            own = "harmful" if group.startswith("harmful") else "benign"
            if other := [e.id for e in groups[group] if e.label not in (own, None)]:
                raise ValueError(
                    f"The group {group!r} counts as {own} by its name, but {len(other)} of its {len(groups[group])} "
                    f"examples are labelled otherwise: {other[:4]}. Give it load_examples(…, {own!r}), which leaves "
                    "those out, or call a group of harmful questions 'harmful…'."
                )
        return groups
    for example in load_examples(examples):
        if example.label is None:
            raise ValueError(f"Example {example.id!r} has no label. Pass {{'harmful': …, 'benign': …}} instead.")
        groups.setdefault(example.label, []).append(example)
    return groups


def _epoch(
    items: Mapping[str, Sequence[Any]],
    batch_size: int,
    generator: torch.Generator,
    lengths: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[str, list[int]]]:
    """One epoch's batches in random order; a batch holds one condition, since lengths differ much between them.

    Args:
        lengths: of each condition's prompts; with them those of like length share a batch.
    """
    plan = []
    for condition, rows in items.items():
        order = torch.randperm(len(rows), generator=generator).tolist()
        if lengths:
            stretch = 32 * batch_size
            parts = (order[i : i + stretch] for i in range(0, len(order), stretch))
            order = [i for part in parts for i in sorted(part, key=lengths[condition].__getitem__)]
        plan += [(condition, order[i : i + batch_size]) for i in range(0, len(order), batch_size)]
    return [plan[i] for i in torch.randperm(len(plan), generator=generator).tolist()]


def _draw(
    config: RRSConfig, batches: Sequence[tuple[str, list[int]]], step: int
) -> list[tuple[str, list[tuple[int, str]]]]:
    """A step's batches of `_epoch`, with an instruction for each index."""
    out, drawn = [], seeded(config.seed, "instructions", step)
    for condition, indices in batches:
        # The pool is shuffled per batch, so that the instruction says nothing about the label.
        pool = torch.randperm(len(config.prompts), generator=drawn).tolist()
        out.append((condition, [(i, config.prompts[pool[k % len(pool)]]) for k, i in enumerate(indices)]))
    return out


def _passes(
    group: Sequence[tuple[str, list[Any]]], micro: int, rank: int, world: int
) -> list[tuple[tuple[int, int], str, list[Any], float]]:
    """A rank's share of a step's batches, at most `micro` prompts at a time: (place, condition, prompts, weight).

    A batch's mean counts `1 / len(group)`, however it is cut, and whether or not it is full.
    """
    n, before, out = sum(len(batch) for _, batch in group), 0, []
    for k, (condition, batch) in enumerate(group):
        own = range(max(n * rank // world - before, 0), min(n * (rank + 1) // world - before, len(batch)))
        for start in own[::micro]:
            part = batch[start : min(start + micro, own.stop)]
            out.append(((k, start), condition, part, len(part) / len(batch) / len(group)))
        before += len(batch)
    return out


def _describe(targets: Targets | Sequence[tuple[Example, Tensor]]) -> dict[str, dict[str, Any]]:
    if not isinstance(targets, Targets):
        goals = _hash(None, *(goal.detach().float().cpu().numpy().tobytes() for _, goal in targets))
        return {"pairs": {"n": len(targets), "sha256": content_hash(e for e, _ in targets), "targets": goals}}
    sides = {"harmful": targets.harmful_examples, "benign": targets.benign_examples}
    return {label: {"n": len(side), "sha256": content_hash(side)} for label, side in sides.items()}


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """A short hash of the model's weights (a strided sample of each), as float32.

    Names play no part: versions of transformers differ in them. Nor does the dtype, where it holds the weights exactly.
    """
    samples = []
    for parameter in model.parameters():
        value = whole(parameter)
        flat = value.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].float().cpu().numpy()
        samples.append(hashlib.sha256(f"{tuple(value.shape)}".encode() + sample.tobytes()).digest())
    return hashlib.sha256(b"".join(sorted(samples))).hexdigest()[:16]


def _hash(value: Any, *more: str | bytes) -> str:
    """16 hex digits of something JSON can write, and of texts or bytes."""
    digests = [json.dumps(value).encode(), *(m.encode() if isinstance(m, str) else m for m in more)]
    return hashlib.sha256(b"".join(hashlib.sha256(d).digest() for d in digests)).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"rrs": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _mps_or_cpu() -> str:
    return "mps" if torch.backends.mps.is_available() else "cpu"
