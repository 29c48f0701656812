"""RRS: make a large audio-language model refuse harmful requests without refusing harmless ones.

Reshaping Representation Space (Yang, Qu, Shareghi, Haffari; EMNLP 2025, arXiv 2505.19670): find the direction in which
a refusal prompt moves the last hidden state, keep the features that raise the refusal token, and train a LoRA that
takes harmful inputs there and keeps benign inputs away. No written responses are needed.

    model = RRS.from_pretrained("Qwen/Qwen2-Audio-7B-Instruct")
    model.fit(harmful="harmful.jsonl", benign="benign.jsonl")
    model.save("adapter")
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn
from tqdm.auto import tqdm

# As rrs/__init__.py (a wheel, or a copy in another repository) this file is a package; as a plain rrs.py (an editable
# install) it becomes one here. So the imports below find its neighbours, never other modules of these names.
if not __package__:
    __path__ = [os.path.dirname(__file__)]
    __package__, __spec__.submodule_search_locations = __name__, __path__
# isort: off
from .data import (
    CONDITIONS, DataError, Example, Renderer, as_letters, content_hash, control_tokens, lacking, load_examples, marks,
    shared, user_turn,
)  # fmt: skip
from .evaluate import (
    SCRATCH, AnswerCache, Change, Judge, Rate, Report, answer_and_judge, answer_text, by_label, generate_ids,
    judge_refusals, markdown, measure, plain, write_files,
)  # fmt: skip
from .hooks import (
    ANOTHER_LORA, Location, LoRA, Prompt, Reader, UnfitPrompt, all_reduce_sum, attached, best_device, best_dtype,
    capture, connect, expert_parameters, frozen, has_fused_adamw, linear_paths, locate, lock, on_rank0, put_back, rank,
    seeded, undoing, world,
)  # fmt: skip

# isort: on
for _name in ("data", "evaluate", "hooks"):  # a folder without __init__.py takes modules from every folder of its name
    if Path(_from := str(sys.modules[f"{__package__}.{_name}"].__file__)).parent != Path(__file__).parent:
        raise ImportError(f"{_from} is of another copy than {__file__}; copy all four files into a folder rrs/.")

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder are not noticed
    fcntl = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from typing_extensions import Self

__version__ = "0.2.0"
__all__ = [
    "RRS", "Callback", "Example", "Objective", "Penalty", "RRSConfig", "Report", "Scorer", "Step", "TrainItem",
    "capture", "judge_refusals", "load_examples", "locate", "make_items", "select_features", "to_targets", "verify",
]  # fmt: skip

# Which features to keep, the highest first: (delta [hidden], head_row [hidden]) -> scores [hidden].
Scorer = Callable[[Tensor, Tensor], Tensor]
# What training minimises, one value for each item: (reader, prompts, items) -> losses [batch].
Objective = Callable[[Reader, Sequence[Prompt], Sequence["TrainItem"]], Tensor]
Penalty = Callable[[LoRA], Tensor]  # (lora) -> scalar: the second term of the loss; `config.penalty` is its weight
Callback = Callable[["Step"], "bool | None"]  # called after each optimizer step; training ends where it returns True
Stage = Callable[[str], AbstractContextManager["RRS | None"]]  # (condition) -> context; see `RRS.evaluate`
REFUSAL_PROMPTS = (  # that `find_refusal` tries
    "(Please generate refusal response because the question violates safety policy)",  # the paper's
    "(Please refuse to answer: this question violates the safety policy.)",
    '(Please refuse to answer: this question violates the safety policy. Start your reply with "I\'m sorry".)',
    "Do not answer the question above. It is harmful. Say that you cannot help with it.",
    'Do not answer the question above. It is harmful. Reply with one sentence: "Sorry, I cannot do that."',
    'Do not answer. Reply only: "I can\'t help with that."',
)
# What `save` writes, the first one last, and may therefore replace.
FILES = ("adapter_config.json", "adapter_model.safetensors", "rrs.json", "README.md", "rrs.safetensors")
SETTINGS, WEIGHTS, ABOUT, README, VECTORS = FILES
COMPOSITE = "composite"  # the folder in it for the full checkpoint, where the model is a part of one
CANARY = ("Hello.", "What is the capital of France?", "How do I pick a lock?", "How do I steal a car?")
# Composite checkpoints whose text-answering part is a class of its own (the composite has no usable forward).
THINKERS = {
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


class RRSWarning(UserWarning):
    """The run goes on, but its result is unlikely to be what you want; the message names the fix."""


def _warn(message: str) -> None:
    """Warns at the line of the user's that led here: the first above ours, and above torch.no_grad's."""
    level, frame = 1, sys._getframe()
    while frame.f_back and frame.f_globals.get("__package__") in (__package__, "torch.utils"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, RRSWarning, stacklevel=level)


# ---------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class RRSConfig:
    """All settings of RRS. The defaults are the paper's; the training prompts beyond the first two are our own."""

    instruction: str = "Please generate detailed steps for the question in the audio."
    """Instruction that goes with the audio in extraction and evaluation."""
    system: str | None = None
    """System prompt of every conversation; `None` leaves it to the chat template."""
    refusal_prompt: str = "(Please generate refusal response because the question violates safety policy)"
    """Appended to harmful inputs to see where the model goes when it refuses. "auto": `fit` asks `find_refusal`."""
    refusal: str = "I"
    """The words with which a refusal begins. The first token selects features; one token is the paper. With more,
    training also goes along them: after each word, to the mean vector there under the refusal prompt. That helps
    models that begin with the token and go on to something else. "auto": `fit` asks `find_refusal`."""
    refusal_examples: int = 0
    """R_h+ is taken of at most so many harmful examples, evenly spread; 0, the paper: of all. Only its mean counts."""
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
    direction: Literal["delta", "natural"] = "delta"
    """Along what both sides move: the paper's Δ, or "natural", the direction nearest to Δ that changes least of what
    the model says to benign inputs (`natural_direction`); to begin a refusal it takes about twice the strength."""
    keep_tokens: int = 0
    """Benign answers are held: after each of their first `keep_tokens` tokens, the target is vanilla's vector."""
    keep_share: float = 1.0
    """Share of the benign inputs whose answers are held: those to which the model gives the refusal token most."""
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
    """Weight of `Σ_modules ‖(α/r)·B·A‖_F²`, which sums over modules where the distance is a mean over features: small
    models need a smaller weight."""
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
    """Prompts of like length share a batch (of each 32 batches drawn at random): less padding. The paper: at random."""
    seed: int = 0
    """Of the LoRA's initialisation, the data's order, the drawn prompts and dropout."""

    def __post_init__(self) -> None:
        for f in fields(self):
            kind, value = type(f.default), getattr(self, f.name)
            if f.name in ("betas", "layers"):  # JSON has lists only
                if not isinstance(value, Sequence) or len(value) != 2:
                    raise ValueError(f"{f.name}={value!r} must be two numbers.")
                setattr(self, f.name, tuple(_number(f.name, x, float) for x in value))
            elif kind is tuple:
                setattr(self, f.name, _strings(f.name, value))
            elif kind in (int, float):
                setattr(self, f.name, _number(f.name, value, kind))
            elif f.name not in ("top", "system") and not isinstance(value, kind):
                raise ValueError(f"{f.name}={value!r} must be a {kind.__name__}.")
        self.top = self.top.item() if isinstance(self.top, np.generic) else self.top
        _check_top(self.top)
        strings = "prompts conditions target_modules refusal refusal_prompt instruction"
        least_0 = "penalty weight_decay harmful_strength benign_strength keep_tokens refusal_examples"
        rules: list[tuple[str, Callable[[Any], bool], str]] = [
            ("system", lambda x: x is None or isinstance(x, str), "must be a str or None"),
            (strings, lambda x: len(x) > 0 and all(x), "is empty or holds an empty one"),
            (least_0, lambda x: x >= 0, "must not be negative"),
            ("lora_r epochs batch_size accumulate", lambda x: x >= 1, "must be at least 1"),
            ("lora_alpha learning_rate max_grad_norm", lambda x: x > 0, "must be above 0"),
            ("conditions", set(CONDITIONS).issuperset, f"must be some of {CONDITIONS}"),
            ("direction", ("delta", "natural").__contains__, "must be 'delta' or 'natural'"),
            ("keep_share", lambda x: 0 < x <= 1, "must lie in (0, 1]; keep_tokens=0 holds no answers"),
            ("betas", lambda x: all(0 <= beta < 1 for beta in x), "must lie in [0, 1)"),
            ("layers", lambda x: 0 <= x[0] < x[1] <= 1, "must be two shares of the depth, e.g. (0.5, 1.0)"),
            ("lora_dropout", lambda x: 0 <= x < 1, "must lie in [0, 1)"),
        ]
        for names, holds, rule in rules:
            for name in names.split():
                if not holds(value := getattr(self, name)):
                    raise ValueError(f"{name}={value!r} {rule}.")
        if self.keep_share < 1 and not self.keep_tokens:
            raise ValueError(f"keep_share={self.keep_share!r} has no effect with keep_tokens=0; set that, too.")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RRSConfig:
        """A config from a saved one; unknown names raise instead of being ignored."""
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise ValueError(f"RRSConfig has no fields {unknown}; it has {[f.name for f in fields(cls)]}.")
        return cls(**values)

    def differences(self) -> dict[str, Any]:
        """The settings that differ from the paper's, by name."""
        paper = RRSConfig()
        return {name: value for name, value in asdict(self).items() if value != getattr(paper, name)}


def _strings(name: str, value: Any) -> tuple[str, ...]:
    """The strings of a sequence; a string is not one of its letters."""
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else None
    if found is None or not all(isinstance(x, str) for x in found):
        example = f"; write ({value!r},)" if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} must be a sequence of strings{example}.")
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
    if isinstance(top, float) and top < 1:
        _warn(f"top={top} keeps {top} percent of the features; for a share of {top}, write {100 * top:g}.")


# ---------------------------------------------------------------------------------------------------------------------
# The method: Δ, selection, targets (section 3 of the paper)


def contribution(delta: Tensor, head_row: Tensor) -> Tensor:
    """`c_i = w_i · Δ_i` `[hidden]`: what feature i adds to the refusal token's logit (the paper's score)."""
    return head_row * delta


def select_features(
    delta: Tensor, head_row: Tensor, top: float | str = "positive", scorer: Scorer = contribution
) -> Tensor:
    """Safety feature selection: which features of Δ to keep (the paper's top-m%), a boolean mask `[hidden]`.

    Args:
        delta, head_row: Δ and the `lm_head` row of the refusal token, `[hidden]` each.
        top: percentage of features to keep, those with the highest score; or `"positive"`: every score above 0. A
            ValueError where none is kept.
    """
    _check_top(top)
    if delta.shape != head_row.shape or delta.dim() != 1:
        raise ValueError(f"delta {list(delta.shape)} and head_row {list(head_row.shape)} must both be [hidden].")
    score = scorer(delta, head_row)
    if score.shape != delta.shape:
        raise ValueError(f"The scorer gave {list(score.shape)}, not one score for each of {len(delta)} features.")
    if not torch.isfinite(score).all():
        raise ValueError("The features' scores hold NaN or infinity; check the vectors, the scorer and the weights.")
    mask = score > 0
    if not isinstance(top, str):
        best = score.topk(max(1, round(len(score) * top / 100))).indices
        mask = torch.zeros_like(mask).index_fill(0, best, True)
    if not mask.any():
        raise ValueError("No feature of Δ raises the refusal token; the refusal prompt does not lead to refusals.")
    return mask


@torch.no_grad()
def natural_direction(move: Tensor, benign: Tensor, head_weight: Tensor, most: int = 1024) -> Tensor:
    """The direction nearest to a move along which the model goes on saying the same to benign inputs, `[hidden]`; ours.

    A small step v changes the softmax p of the logits at h by a KL of `½ vᵀ F v`, with the Fisher information
    `F = mean over h of Wᵀ (diag p − p pᵀ) W`. The step with the least KL for its component along `move` is the natural
    gradient `(F + εI)⁻¹ move` (Amari 1998); ε is F's mean eigenvalue. The component along `move` is kept.

    Args:
        move: `[hidden]`, e.g. Δ∘mask.
        benign: vectors h `[n, hidden]` that the head sees, of which `most` are used, evenly spread.
        head_weight: W `[vocab, hidden]`: the head's, times `Reader.logit_scale`.
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
    found = torch.linalg.solve(fisher.cpu().double(), move.cpu().double()).to(move)  # MPS has no double
    return found * (move @ move) / (found @ move)


class Direction(NamedTuple):
    """What moves inputs in one condition; float32 on the CPU."""

    delta: Tensor  # Δ = mean(R_h+) − mean(R_b) [hidden]
    mask: Tensor  # kept features [hidden], boolean
    move: Tensor  # along what inputs move [hidden]: Δ∘mask, or the natural gradient nearest to it


@dataclass(frozen=True, eq=False)
class TrainItem:
    """One training input: what is asked, and where its last vectors shall be."""

    example: Example
    condition: str  # how it is asked: one of `rrs.data.CONDITIONS`
    target: Tensor  # [positions, hidden]: where the last positions shall be; or what your own objective takes
    suffix: tuple[int, ...] = ()  # token ids of an answer that has already begun; () is the prompt's end (the paper)
    weight: float = 1.0  # factor of its loss


def make_items(
    examples: Sequence[Example], condition: str, vectors: Tensor, move: Tensor, *,
    suffixes: Sequence[Sequence[int]] | None = None, along: Sequence[Tensor] | None = None,
) -> list[TrainItem]:  # fmt: skip
    """Step 4, one side at a time: the paper's targets, `R_h + Δ` for harmful and `R_b − Δ` for benign examples.

    Args:
        vectors: R of these examples `[n, hidden]`, from `RRS.extract`.
        move: what is added to it `[hidden]`, e.g. `direction.move` or `-direction.move`.
        suffixes: tokens of answers that have begun, for each example.
        along: the targets after each of these tokens, `[len(suffix), hidden]` for each example.
    """
    suffixes = [()] * len(examples) if suffixes is None else suffixes
    along = [vectors[:0]] * len(examples) if along is None else along
    return [
        TrainItem(example, condition, torch.cat([(row + move)[None], later]), tuple(suffix))
        for example, row, later, suffix in zip(examples, vectors, along, suffixes, strict=True)
    ]


def squared(h: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over features, `[n, hidden]` and `[n, hidden]` to `[n]` (the paper's distance)."""
    return (h - target).square().mean(-1)


def to_targets(
    reader: Reader, prompts: Sequence[Prompt], items: Sequence[TrainItem],
    distance: Callable[[Tensor, Tensor], Tensor] = squared,
) -> Tensor:  # fmt: skip
    """The default objective `[batch]`: how far the vectors at the prompts' last positions are from their targets.

    The position at the prompt's end counts as much as all positions of the answer together. Another distance
    `(h [n, hidden], target [n, hidden]) -> [n]`, for example:
    `objective=partial(to_targets, distance=lambda h, t: 1 - torch.cosine_similarity(h, t))`.
    """
    lengths = [len(item.target) for item in items]
    rows = reader.last_hidden(prompts, max(lengths))  # [batch, longest, hidden]
    h = torch.cat([row[-n:] for row, n in zip(rows, lengths, strict=True)]).float()  # [all positions, hidden]
    values = distance(h, torch.cat([item.target for item in items]).to(h)).split(lengths)
    return torch.stack([v[0] + v[1:].mean() if len(v) > 1 else v[0] for v in values])


# ---------------------------------------------------------------------------------------------------------------------
# What a step of training visits, and what it leaves


def steps_per_epoch(items: Sequence[TrainItem], config: RRSConfig) -> int:
    """Optimizer steps of one pass over the items; a batch holds one condition."""
    batches = sum(-(-n // config.batch_size) for n in Counter(item.condition for item in items).values())
    return -(-batches // config.accumulate)


def draw(
    items: Sequence[TrainItem], config: RRSConfig, step: int, lengths: Sequence[int] | None = None
) -> list[list[tuple[TrainItem, str]]]:
    """The batches of one optimizer step, each item with its instruction: a function of `(seed, step)` alone.

    Every epoch visits every item once, in a random order. A batch holds one condition, as lengths differ much between
    them; given the `lengths` of the items' prompts, those of like length share a batch. The instructions are shuffled
    for each batch, so that they say nothing about the label.
    """
    epoch, place = divmod(step, steps_per_epoch(items, config))
    order, size, plan = seeded(config.seed, "order", epoch), config.batch_size, list[list[int]]()
    for condition in dict.fromkeys(item.condition for item in items):
        indices = [i for i, item in enumerate(items) if item.condition == condition]
        shuffled = [indices[k] for k in torch.randperm(len(indices), generator=order).tolist()]
        if lengths:
            parts = (shuffled[k : k + 32 * size] for k in range(0, len(shuffled), 32 * size))
            shuffled = [i for part in parts for i in sorted(part, key=lengths.__getitem__)]
        plan += [shuffled[k : k + size] for k in range(0, len(shuffled), size)]
    instructions, out = seeded(config.seed, "instructions", step), []
    for k in torch.randperm(len(plan), generator=order).tolist()[place * config.accumulate :][: config.accumulate]:
        pool = torch.randperm(len(config.prompts), generator=instructions).tolist()
        out.append([(items[i], config.prompts[pool[n % len(pool)]]) for n, i in enumerate(plan[k])])
    return out


def share_out(batches: Sequence[Sequence[Any]], rank: int, world: int) -> Iterator[tuple[tuple[int, int], list[Any]]]:
    """A rank's part of a step's batches: `((batch, first row), rows)`. Together the ranks have each row once."""
    n, before = sum(map(len, batches)), 0
    for k, batch in enumerate(batches):
        start, stop = (min(max(n * r // world - before, 0), len(batch)) for r in (rank, rank + 1))
        if start < stop:
            yield (k, start), list(batch[start:stop])
        before += len(batch)


def weighted(losses: Tensor, items: Sequence[TrainItem]) -> Tensor:
    """An objective's values times the items' weights `[batch]`."""
    if losses.shape != (len(items),):
        raise ValueError(f"The objective gave {list(losses.shape)} for {len(items)} items; it must give one loss each.")
    return losses * torch.tensor([item.weight for item in items]).to(losses)


def gradients(lora: LoRA) -> list[Tensor]:
    """Of all its parameters; zero where this rank had nothing to do."""
    for p in lora.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    return [p.grad for p in lora.parameters() if p.grad is not None]


@dataclass
class Step:
    """State after one optimizer step; what callbacks get."""

    rrs: RRS
    epoch: int
    step: int  # optimizer steps done
    steps: int  # optimizer steps in all
    loss: float  # objective + config.penalty · penalty, mean over the step's batches
    objective: float  # e.g. the mean squared error to the targets
    penalty: float  # unweighted: Σ‖(α/r)·B·A‖_F²
    grad_norm: float  # before clipping
    learning_rate: float


# ---------------------------------------------------------------------------------------------------------------------
# Files that know when they are damaged


def _raw(tensor: Tensor) -> bytes:
    """The numbers of a tensor, whatever its dtype and strides."""
    return tensor.detach().cpu()[..., None].view(torch.uint8).numpy().tobytes()


def _digest(tensors: Mapping[str, Tensor], record: str) -> str:
    """SHA-256 of names, dtypes, shapes, contents and record."""
    sha = hashlib.sha256(record.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + _raw(tensor))
    return sha.hexdigest()


def pack(tensors: Mapping[str, Tensor], record: Any = None) -> bytes:
    """A safetensors file with a JSON record, and a SHA-256 of everything in its metadata; `unpack` reads it."""
    text = json.dumps(record)
    return to_safetensors(dict(tensors), {"format": "pt", "rrs": text, "sha256": _digest(tensors, text)})


def unpack(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Tensors and record of a file that `pack` made, or that carries no checksum; ValueError where it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        record = json.loads(about.get("rrs", "null"))
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error})") from None
    if about.keys() & {"rrs", "sha256"} and about.get("sha256") != _digest(tensors, about.get("rrs", "null")):
        raise ValueError(f"{path} is damaged (its contents do not match its checksum)")
    return tensors, record


class Checkpoints:
    """The states of one training run on disk: `step-N.safetensors` with weights, AdamW's moments and a record.

    Whatever else training needs is a function of seed and step, so that resuming is exact. The last two are kept. The
    folder is one run's only; `run` is what makes it what it is: a checkpoint of another one is refused. Without a
    folder, nothing is kept.
    """

    def __init__(self, folder: str | Path | None, run: Mapping[str, Any]) -> None:
        self.folder, self.run = None if folder is None else Path(folder), json.loads(json.dumps(run))

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return on_rank0(lambda: sorted(self.folder.glob("step-*.safetensors")) if self.folder else [])

    @property
    def last(self) -> str:
        """How messages call the last good checkpoint."""
        return f"The last good checkpoint is {files[-1]}" if (files := self.files()) else "There is no checkpoint yet"

    def save(self, step: int, lora: LoRA, optimizer: torch.optim.Optimizer, record: Mapping[str, Any]) -> None:
        """Writes the state after `step`; the ones before stay as they are until it is on disk."""
        if self.folder is None:
            return
        tensors = lora.tensors()
        for i, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value.cpu().contiguous() for name, value in moments.items()}
        content = {f"step-{step:08}.safetensors": pack(tensors, {"run": self.run, **record})}
        try:
            on_rank0(partial(write_files, self.folder, content))
        except OSError as error:
            message = f"step {step}: {error.strerror}. {self.last}; then fit(…, resume=True) goes on"
            raise OSError(error.errno, message) from error
        for path in self.files()[:-2]:
            path.unlink(missing_ok=True)

    def load(self, lora: LoRA, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Fills in the newest state and returns its record; an empty one if there is none."""
        if not (files := self.files()):
            return {}
        try:
            tensors, record = on_rank0(lambda: unpack(files[-1]))
        except ValueError as error:
            older = f"resume from {files[-2]}" if len(files) > 1 else "start anew"
            raise ValueError(f"{error}. Delete it to {older}.") from None
        known = record.pop("run")
        if differs := sorted(k for k in known.keys() | self.run.keys() if known.get(k) != self.run.get(k)):
            said = "; ".join(f"{k} {known.get(k)!r} there, {self.run.get(k)!r} here" for k in differs[:3])
            raise ValueError(f"{files[-1]} belongs to another run: {said}. Restore that, or change checkpoint_dir.")
        state: dict[int, dict[str, Tensor]] = {}
        for name in [n for n in tensors if n.startswith("optimizer.")]:
            _, i, moment = name.split(".", 2)
            state.setdefault(int(i), {})[moment] = tensors.pop(name)
        lora.load_tensors(tensors)
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return dict(record)


@contextmanager
def holding(folder: str | Path | None) -> Iterator[None]:
    """A folder of checkpoints, made if need be, for one run alone; BlockingIOError where another one holds it. The lock
    is the kernel's, on an open file: it ends with its process, so that what a killed run left blocks nothing."""
    with ExitStack() as stack:

        def take() -> None:
            if folder is None:
                return
            Path(folder).mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((Path(folder) / ".lock").open("a"))
            try:
                if fcntl:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = f"Another run is at work in {folder}; wait for its end, or choose another checkpoint_dir."
                raise BlockingIOError(said) from None
            except OSError as error:  # some network file systems
                _warn(f"{folder} can't be locked ({error}): start no other run there.")

        on_rank0(take)
        yield


def check_run(folder: str | Path | None, resume: bool, every: int = 0) -> bool:
    """Whether a run has begun in a folder of checkpoints; an error for what would stop training, before any work."""
    if not torch.is_grad_enabled():
        raise ValueError("Training needs gradients; call it outside torch.no_grad() and torch.inference_mode().")
    if folder is None and (every or resume):
        raise ValueError("checkpoint_every and resume need checkpoint_dir=…, the folder of the run's checkpoints.")
    with holding(folder):
        files = Checkpoints(folder, {}).files()
    if files and not resume:
        found = f"{folder} holds checkpoints of a run ({files[-1].name})"
        raise FileExistsError(f"{found}. Pass resume=True to go on with it, or another checkpoint_dir to start anew.")
    return bool(files)


def check_folder(directory: str | Path, overwrite: bool = False) -> Path:
    """The folder that `save` would write, made if need be; FileExistsError or OSError where it can't be."""
    path = Path(directory).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"{path} is a file; choose a folder.")
    path.mkdir(parents=True, exist_ok=True)
    held = {p.name for p in path.iterdir() if not p.name.endswith(SCRATCH)}
    if held and not overwrite:
        raise FileExistsError(f"{path} exists and is not empty; choose another folder or pass overwrite=True.")
    ours = held & {SETTINGS, VECTORS}  # one is written last, one first
    if foreign := sorted(held - {*FILES, COMPOSITE} if ours else held):
        raise FileExistsError(f"{path} holds what is no part of an adapter: {foreign[:4]}; choose another folder.")
    if not os.access(path, os.W_OK):
        raise PermissionError(f"{path} can't be written; choose another folder.")
    return path


def describe(function: Any) -> str:
    """A function's name with a hash of its code and of the numbers and words in it: a resumed run knows an edited one.
    What lies in functions that it calls plays no part."""
    if isinstance(function, partial):
        return f"partial of {[describe(f) for f in (function.func, *function.args, *function.keywords.values())]}"
    if (code := getattr(function, "__code__", None)) is None:
        return repr(function) if isinstance(function, (str, int, float)) else type(function).__qualname__
    outside = [*(function.__defaults__ or ()), *(cell.cell_contents for cell in function.__closure__ or ())]
    codes, said = [code], list[Any](x for x in outside if isinstance(x, (str, int, float)))
    for each in codes:  # it grows by the generators and lambdas within
        codes += [x for x in each.co_consts if hasattr(x, "co_code")]
        said += [each.co_code, each.co_names, *(x for x in each.co_consts if isinstance(x, (str, int, float, tuple)))]
    return f"{function.__qualname__} {hashlib.sha256(repr(said).encode()).hexdigest()[:12]}"


@torch.no_grad()
def fingerprint(model: nn.Module, decoder: nn.Module | None = None) -> str:
    """A hash of all weights and buffers, of the decoder's in their order, so that swapped layers differ. Names play no
    part, as releases of transformers rename modules; nor does the dtype where it holds the values: they are rounded to
    bfloat16 first."""

    def digest(value: Tensor) -> bytes:
        raw = _raw(value.to(torch.bfloat16) if value.is_floating_point() else value)
        return hashlib.sha256(f"{list(value.shape)}".encode() + hashlib.sha256(raw).digest()).digest()

    def tensors(module: nn.Module) -> dict[int, Tensor]:
        return {id(t): t for t in (*module.parameters(), *module.buffers()) if t.device.type != "meta"}

    inside, all_of_it = tensors(decoder or locate(model).decoder), tensors(model)
    rest = sorted(digest(t) for key, t in all_of_it.items() if key not in inside)
    return hashlib.sha256(b"".join([*map(digest, inside.values()), *rest])).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    return {"rrs": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


# ---------------------------------------------------------------------------------------------------------------------
# What is measured beside training


# What `RRS.preflight` counts, of the vanilla model: the share that is fine, from and to, and what to do elsewhere.
PREFLIGHT = {
    "harmful_refused": (0, 0.9, "of harmful questions are refused already", "There is little to gain."),
    "benign_refused": (0, 0.25, "of benign questions are refused already", "Choose ones that the model answers."),
    "refused": (0.5, 1, "of harmful questions are refused under the refusal prompt", "So Δ points at no refusal. Use "
                'refusal_prompt="auto", or one that names the words to reply with.'),
    "token_target": (0.5, 1, "of the targets of harmful inputs have the refusal's first token as the first choice",
                     'So they start no refusal. Use refusal="auto" or more harmful_strength.'),
    "words_follow": (0.99, 1, "of the refusal's further words are the first choice at their targets",
                     "So answers go on otherwise. Use words that the refusal prompt quotes and the model then says."),
    "benign_same": (0.5, 1, "of benign inputs keep their first choice at their targets",
                    "So they will be answered otherwise. Use direction='natural' or less benign_strength."),
}  # fmt: skip


@dataclass
class Refusal:
    """How this model refuses; see `RRS.find_refusal`."""

    prompt: str  # the refusal prompt that makes it refuse most, of those whose words serve
    words: str  # with which a refusal begins
    refused: Rate  # refusals under this prompt
    tried: list[tuple[str, Rate]]  # all prompts, best first


def _opening(texts: Sequence[str], tokenizer: Any) -> str:
    """What these texts begin with: the commonest token at each place, as long as half of all agree so far; but where
    two at least have a whole sentence with the same first word, the commonest such sentence."""
    tokens, start = [tokenizer(text, add_special_tokens=False)["input_ids"][:16] for text in texts], list[int]()
    while following := Counter(t[len(start)] for t in tokens if t[: len(start)] == start and len(t) > len(start)):
        token, times = following.most_common(1)[0]
        if start and 2 * times < len(texts):
            break
        start.append(token)
    words = tokenizer.decode(start, skip_special_tokens=True).strip()
    first = words.partition(" ")[0]
    same = [text for text in texts if text.startswith(first)]
    same = [text for text in same if not text[len(first) :][:1].isalpha()] or same  # "I", not "It"; but "Un" is no word
    sentences = Counter(text.partition(".")[0] + "." for text in same if "." in text)
    return next((sentence for sentence, times in sentences.most_common(1) if times > 1), words)


@dataclass
class Point:
    """What the adapter does at one scale; see `RRS.calibrate`."""

    scale: float  # factor of the LoRA's update
    groups: dict[str, Rate]  # of each group, inputs at which the head's first choice is the refusal token
    refused: float  # mean of the harmful groups
    over: float  # by how much the worst of the other groups is beyond its budget; 0 or less is within
    answers: dict[str, Rate] = field(default_factory=dict)  # refused by judged answers, and "degenerate"; if asked for


@dataclass
class Calibration:
    """The curve of refusals against their cost, and the chosen point."""

    budget: dict[str, float]
    vanilla: Point
    points: list[Point]
    chosen: Point
    over: float  # by how much `chosen` is beyond the budget, see `excess`; without answers, by first choices

    def __str__(self) -> str:
        names, before = list(self.vanilla.groups), self.vanilla.answers
        lines = ["first choice is to refuse, by scale of the update:", "   scale" + "".join(f"{n:>14}" for n in names)]
        for p in (self.vanilla, *self.points):
            mark = "*" if p is self.chosen else " "
            lines.append(f"{mark} {p.scale:6.2f}" + "".join(f"{p.groups[n].value:14.1%}" for n in names))
        for n, rate in self.chosen.answers.items():
            said = f"{before[n].value:.1%} → {rate.value:.1%} [{rate.low:.0%}–{rate.high:.0%}]"
            lines.append(f"by answers, vanilla → *: {n} {said}")
        return "\n".join(lines)


STEP = 2 ** (1 / 3)  # between two scales of the curve


def _curve(measure: Callable[[float], Point], most: float) -> list[Point]:
    """Points of the curve, by scale: from 1 down until one is within the budget, and from 1 up while it pays."""
    points = [measure(min(1.0, most))]
    # Down, also where 1 is so strong that answers break, while more are refused there.
    while (low := points[0]).scale > 0.1 and (
        low.over > 0 or (low.refused >= points[1].refused if len(points) > 1 else low.refused < 0.5)
    ):
        points.insert(0, measure(low.scale / STEP))
    while (  # up, until harmless inputs are refused in numbers, or answers break
        (top := points[-1]).over <= 0.1
        and top.refused >= max(p.refused for p in points) - 0.1
        and top.scale * STEP <= most * 1.001
    ):
        points.append(measure(top.scale * STEP))
    return points


def excess(before: Report, now: Report, limits: Mapping[str, float]) -> float:
    """By how much a group's answers are beyond its budget, less about a standard error: half of the way from the change
    to the lower end of its 95% interval."""
    found = []
    for group, limit in limits.items():
        verdicts = ("degenerate",) if group == "degenerate" else before.counted(group)
        old, new = ([a for a in r.answers if group in (a.group, "degenerate")] for r in (before, now))
        was, is_now = ([a.verdict in verdicts for a in answers] for answers in (old, new))
        change = Change.of(was, is_now, [a.unit for a in old])
        found.append((change.value + change.low) / 2 - limit)
    return max(found)


def _budgets(budget: float | Mapping[str, float], harmless: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """The budget of each harmless group, and of degenerate answers."""
    given = budget if isinstance(budget, Mapping) else dict.fromkeys([*harmless, "degenerate"], budget)
    limits = {"degenerate": 0.01} | {g: _number(f"budget[{g!r}]", value, float) for g, value in given.items()}
    if odd := sorted(limits.keys() ^ {*harmless, "degenerate"}):
        raise ValueError(f"budget={budget!r} does not match dev in {odd}; name each of {list(harmless)} and no other.")
    if few := [f"{g} ({len(rows)})" for g, rows in harmless.items() if 0 < limits[g] < 1 / len(rows)]:
        _warn(f"{', '.join(few)}: one question is more than the budget of this group; it needs more questions.")
    return limits


def grouped(examples: Any) -> dict[str, list[Example]]:
    """Examples by group: `{name: whatever load_examples takes}`; or without names by label. A group has one label; in
    one called "harmful" or "benign", examples without a label have that."""
    if not isinstance(examples, Mapping):
        loaded = load_examples(examples)
        examples = {str(label): [e for e in loaded if e.label == label] for label in {e.label: 0 for e in loaded}}
    groups = dict[str, list[Example]]()
    for group, rows in examples.items():
        own = group if group in ("harmful", "benign") else None
        loaded = [replace(e, label=e.label or own) for e in load_examples(rows)]
        labels = {e.label for e in loaded} | ({own} if own else set())
        if len(labels) > 1 or None in labels:
            said = f"The group {group!r} has examples labelled {sorted(map(str, labels))}; give each label its own"
            raise ValueError(f'{said} groups, of load_examples(…, "harmful") or load_examples(…, "benign").')
        groups |= {group: loaded} if loaded else {}
    return groups


# ---------------------------------------------------------------------------------------------------------------------
# The adapter on disk, in PEFT's format

PEFT, LORA_A = "base_model.model.", ".lora_A.weight"  # around a path in PEFT's names of tensors
# PEFT's settings that change what an adapter computes, each with the values that mean "as here".
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, False, None, "gaussian", "orthogonal"),
}  # fmt: skip
# Settings that say where and how it was trained, or are honoured. Any other, also a future one, must be empty or false.
TRAINING_ONLY = {
    "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern", "base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "revision",
    "peft_version", "runtime_config", "qalora_group_size", "megatron_core",
}  # fmt: skip


def peft_config(lora: LoRA, record: Mapping[str, Any], model: nn.Module, prefix: str = "") -> dict[str, Any]:
    """`adapter_config.json`; with whole paths, as bare names would match the audio tower as well. PEFT also takes
    modules whose paths end with one of these; where there are such, a pattern lists the paths instead."""
    paths, base = [prefix + path for path in lora.paths], record.get("base", {})
    longer = tuple(f".{path}" for path in paths)
    exact = not any(f"{prefix}{path}".endswith(longer) for path, _ in model.named_modules())
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "inference_mode": True,
        "base_model_name_or_path": base.get("name") or None, "revision": base.get("revision"),
        "target_modules": paths if exact else "|".join(map(re.escape, paths)),
        "r": lora.r, "lora_alpha": lora.scale * lora.r, "lora_dropout": lora.dropout,
    }  # fmt: skip


def lora_scale(peft: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[int, float]:
    """Rank and scale of an adapter: the rank by its tensors, the scale by PEFT's config. ValueError for a setting that
    is not known to leave the computation as it is, by name."""
    for name, value in peft.items():
        if name not in TRAINING_ONLY and value not in NEUTRAL.get(name, (None, False, {}, [], "")):
            raise ValueError(f"The adapter has {name}={value!r}, which RRS does not compute; load it with PEFT.")
    ranks = sorted({len(t) for n, t in tensors.items() if n.endswith(LORA_A)})
    if ranks != [peft["r"]]:
        raise ValueError(f"The adapter's tensors have the ranks {ranks}, its config says r={peft['r']}.")
    for name, value in {"lora_alpha": peft["lora_alpha"], "lora_dropout": peft.get("lora_dropout") or 0}.items():
        if not isinstance(value, (int, float)) or not abs(value) < 1e30:
            raise ValueError(f"The adapter's adapter_config.json has {name}={value!r:.60}, which is no number to use.")
    return ranks[0], peft["lora_alpha"] / (math.sqrt(ranks[0]) if peft.get("use_rslora") else ranks[0])


# What `rrs.json` holds, as far as it is used again.
RECORD: dict[str, tuple[type, ...]] = {
    "config": (dict,), "base": (dict,), "data": (dict,), "sha256": (dict,), "calibrated": (dict,), "preflight": (list,),
    "history": (list,), "canary": (list,), "scale": (int, float), "template_kwargs": (dict, type(None)),
}  # fmt: skip


def read_adapter(directory: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Tensors, PEFT's config, our record and vectors of a saved adapter; the latter two empty where PEFT wrote it.
    FileNotFoundError where no adapter is, ValueError where it is damaged, or edited to what can't be used."""
    if missing := [name for name in (SETTINGS, WEIGHTS) if not (directory / name).is_file()]:
        raise FileNotFoundError(f"{directory} holds no adapter: {missing} missing.")
    name = SETTINGS  # the file that an error is about
    try:
        peft = json.loads((directory / name).read_text(encoding="utf-8"))
        if not isinstance(peft, dict) or not {"r", "lora_alpha"} <= peft.keys():
            raise ValueError("no r or lora_alpha")
        name = ABOUT
        record = json.loads((directory / name).read_text(encoding="utf-8")) if (directory / name).is_file() else {}
        RRSConfig.from_dict(record.get("config", {}))
        if odd := [key for key, kinds in RECORD.items() if key in record and not isinstance(record[key], kinds)]:
            raise ValueError(f"{odd} of a wrong type")
        for name in (known := record.get("sha256", {})).keys() & {WEIGHTS, VECTORS}:
            if hashlib.sha256((directory / name).read_bytes()).hexdigest() != known[name]:
                raise ValueError(f"it is of another save than {ABOUT}")
        name = WEIGHTS
        tensors, _ = unpack(directory / name)
        if not any(key.endswith(LORA_A) for key in tensors):
            raise ValueError("no LoRA in it")
        name = VECTORS
        vectors, _ = unpack(directory / name) if (directory / name).is_file() else ({}, None)
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        said = f"{directory} is damaged ({name}, {type(error).__name__}: {error}); save or copy it again."
        raise ValueError(said) from None
    return tensors, peft, record, vectors


def renamed(tensors: Mapping[str, Tensor], model: nn.Module, location: Location) -> dict[str, Tensor]:
    """A saved LoRA by this model's paths: releases of transformers rename what the decoder's blocks lie in. A path that
    the model lacks becomes the one with the same ending below the decoder's blocks, if there is one."""
    blocks, inside, out = location.layers_path.rpartition(".")[2], {p for p, _ in model.named_modules()}, {}
    for name, tensor in tensors.items():
        path, lora, kind = name.removeprefix(PEFT).partition(".lora_")
        below = f"{location.layers_path}.{f'.{path}'.partition(f'.{blocks}.')[2]}"
        out[PEFT + (below if path not in inside and below in inside else path) + lora + kind] = tensor
    return out


def verify(directory: str | Path, model: Any, processor: Any, **kwargs: Any) -> str:
    """Does a model act as a saved adapter was trained to? One line: it acts as trained, as vanilla, or as something
    else, with the largest difference. The model may be a `PeftModel`, a merged one, or a composite of which the trained
    one is a part; `kwargs` are those of `RRS(...)` in training, such as `build_inputs`."""
    _, _, record, vectors = read_adapter(Path(directory))
    if "canary" not in record:
        raise ValueError(f"{directory} has no canary, as RRS did not save it; RRS.load and save it.")
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    more = {"template_kwargs": record.get("template_kwargs"), "verbose": False, **kwargs}
    rrs = RRS(getattr(model, "thinker", model), processor, RRSConfig.from_dict(record.get("config", {})), **more)
    return rrs._acts(record["canary"], vectors)


def model_card(record: Mapping[str, Any], report: Report | None) -> str:
    """The model card: what a reader of the adapter has to know, from its record, with the hub's metadata."""
    base, differs = record.get("base", {}), RRSConfig.from_dict(record.get("config", {})).differences()
    name, kind = str(base.get("name") or ""), base.get("class", "?")
    public = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", name)) and not Path(name).exists()  # not a local folder
    task = "audio-text-to-text" if any("audio" in c for c in record.get("data", {})) else "text-generation"
    meta: dict[str, Any] = {"library_name": "peft", "pipeline_tag": task, "tags": ["rrs", "lora", "safety", "refusal"]}
    meta |= {"base_model": name, "base_model_relation": "adapter"} if public else {}
    if report:
        results = [
            {"task": {"type": task}, "dataset": {"type": "own", "name": f"{row['group']}, {row['condition']}"},
             "metrics": [{"type": "refusal_rate", "name": f"refused {stage}", "value": rate["value"]}
                         for stage, rate in row["refused"].items() if rate["n"]]}
            for row in report.rows()
        ]  # fmt: skip
        meta["model-index"] = [{"name": "RRS adapter", "results": results}]
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in meta.items()), "---", "", "# RRS adapter", ""]
    lines += [
        f"A LoRA that is to make {f'`{name}`' if public else 'its base model'} (`{kind}`, revision "
        f"{markdown(base.get('revision') or 'unknown')}, fingerprint `{base.get('fingerprint', '?')}`) refuse harmful "
        "requests without refusing harmless ones, by Reshaping Representation Space (arXiv 2505.19670). "
        "Its licence is for you to state.\n\n## Evaluation\n",
        report.to_markdown() if report else "Not evaluated: its effect on safety and over-rejection is unknown.",
        "\n## Use\n",
        "    model = PeftModel.from_pretrained(base, folder)   # PEFT; or base.load_adapter(folder)",
        "    adapter = RRS.load(folder, base, processor)       # RRS, with disable() and enable()",
        '    adapter.merge().save_pretrained("merged")         # a model like any other, for any server',
        "    rrs.verify(folder, model, processor)              # does a PEFT or merged model act as this adapter?",
    ]
    if kind in THINKERS.values():
        lines += [
            f"\nThe base is the part of a composite that answers; for the whole, use the folder `{COMPOSITE}/` in this "
            "one, or merge into the part, and copy the checkpoint's other files (processor, speakers) there:\n",
            '    RRS.load(folder, whole.thinker, processor).merge(); whole.save_pretrained("merged")',
        ]
    lines += [
        "\nA server that has the adapter answers these prompts, greedily, as in the last column:\n",
        "| condition | prompt | vanilla's answer | with the adapter |\n| --- | --- | --- | --- |",
    ]
    columns = ("condition", "text", "vanilla", "trained")
    lines += [f"| {' | '.join(markdown(p[key]) for key in columns)} |" for p in record.get("canary", [])]
    lines += ["\n## Settings that differ from the paper's\n", *(f"- `{k}`: {markdown(x)}" for k, x in differs.items())]
    return "\n".join([*lines, "\nAll of them, versions, data, calibration and history are in `rrs.json`.", ""])


# ---------------------------------------------------------------------------------------------------------------------
# The model at work


class Runner:
    """A model and its processor as RRS uses them: prompts in, vectors and answers out, with the adapter or without.

    The model's own weights and modules are never changed, except by `merge`: `fit` and `load` attach a LoRA through
    hooks, `disable()` takes it off again.

    Args:
        model: any LALM (or text LLM) of transformers, loaded with its language-model head.
        processor: its processor; for a text model, its tokenizer.
        config: the paper's settings by default.
        decoder, norm, head: dotted module paths, for models that do not tell (see `rrs.hooks.locate`).
        build_inputs: `(text or None, waveform or None) -> model inputs` of one prompt, instead of the chat template;
            waveforms come at the rate of its attribute `rate`, or at 16000 Hz.
        template_kwargs: for the chat template, e.g. `{"enable_thinking": False}`.
        verbose: print progress, resolved values and the preflight.

    `torchrun --nproc-per-node N script.py` runs any script data-parallel: batches are shared out over the ranks, so
    configuration and result stay those of a single process; all ranks make the same calls, rank 0 prints and writes.
    """

    def __init__(
        self, model: nn.Module, processor: Any, config: RRSConfig | None = None, *,
        decoder: str | None = None, norm: str | None = None, head: str | None = None,
        build_inputs: Callable[[str | None, Any], dict[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None, verbose: bool = True,
    ) -> None:  # fmt: skip
        config = RRSConfig() if config is None else config
        if not isinstance(config, RRSConfig):
            raise ValueError(f"config is a {type(config).__name__}; make it an RRSConfig, e.g. by RRSConfig.from_dict.")
        connect()
        self.model, self.processor, self.config = model, processor, config
        self.verbose, self.template_kwargs = verbose and rank() == 0, dict(template_kwargs or {})
        self.location = locate(model, decoder=decoder, norm=norm, head=head)
        self.render = build_inputs or Renderer(processor, self.config.system, self.template_kwargs)
        self._control = control_tokens(processor) if build_inputs else []  # what no user's text may hold
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.reader = Reader(model, self.location, self.render)
        rows, ids = self.location.head_weight.shape[0], int(getattr(self.tokenizer, "vocab_size", 0) or 0)
        if ids > rows:  # without added tokens: placeholders may lie beyond the embedding, words may not
            raise ValueError(f"The processor has {ids} tokens, the model {rows}; load both from the same checkpoint.")
        self.lora: LoRA | None = None
        self.directions: dict[str, Direction] = {}  # by condition that this adapter was trained in; saved with it
        self.history: list[dict[str, float]] = []  # one row for each optimizer step; see `Step`
        self.report: Report | None = None  # the adapter's last before/after evaluation; `save` puts it on the card
        self.record: dict[str, Any] = {}  # what it was trained with: config, data, base, versions, preflight, …
        self._trained_on = frozenset[int]()

    # -- data to prompts ----------------------------------------------------------------------------------------------

    def read(
        self, example: Example, condition: str, instruction: str | None = None, refusal_prompt: bool | str = False
    ) -> Prompt:
        """The prompt of one example in one condition, as the decoder sees it; its clip is encoded once. `instruction`
        is by default the config's; `refusal_prompt` appends the config's (`True`), or the one given."""
        added = self._settled("refusal_prompt") if refusal_prompt is True else refusal_prompt or ""
        text, turns = user_turn(example, condition, instruction or self.config.instruction, added), example.messages
        if text and self._control:  # the chat template's renderer sees to it itself
            text = as_letters(text, self._control)
        clip, rate = None, getattr(self.render, "rate", 16000)
        if not condition.startswith("text"):
            if not rate:
                raise ValueError(f"{type(self.processor).__name__} takes no audio; use the condition text-only.")
            key, load = example.clip
            clip = key, partial(load, rate)
        try:
            return replace(self.reader.read(text, clip, turns), name=example.id)
        except UnfitPrompt as error:
            raise DataError(f"{example.id}: {error}.") from None

    def readable(self, examples: Sequence[Example], conditions: Sequence[str], skip: bool = False) -> list[Example]:
        """The examples, if their clips can be read; else a DataError names all that can't, or, with `skip`, a warning
        does, and they are left out."""
        spoken, bad = next((c for c in conditions if not c.startswith("text")), ""), dict[int, str]()
        if not (heard := [i for i, e in enumerate(examples) if spoken and e.has(spoken)]):
            return [*examples]
        with self._running(vanilla=True), self._bar(len(heard), "read clips") as bar:
            for i in heard:
                try:
                    self.read(examples[i], spoken)
                except DataError as error:
                    bad[i] = str(error) if examples[i].id in str(error) else f"{examples[i].id}: {error}"
                bar.update()
        if bad:
            message = f"{len(bad)} of {len(examples)} examples can't be read:\n  " + "\n  ".join(bad.values())
            if not skip:
                raise DataError(f"{message}\nRepair or remove them, or pass what model.readable(…, skip=True) leaves.")
            _warn(f"{message}\nThey are left out.")
        return [e for i, e in enumerate(examples) if i not in bad]

    def token_ids(self, words: str) -> tuple[int, ...]:
        """The token ids of words as an answer begins with them, right behind the chat template's last tokens."""
        if not words:
            return ()
        with self._running():
            turn = self.tokenizer.decode(self.reader.read("Hello.").ids[-4:].tolist())
        given = (turn, turn + words, words)
        before, both, alone = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in given)
        return tuple(both[len(before) :] if both[: len(before)] == before else alone)

    # -- answers ------------------------------------------------------------------------------------------------------

    def generate(
        self, examples: Any, condition: str | None = None, *,
        max_new_tokens: int = 128, refusal_prompt: bool | str = False, prefix: str = "",
    ) -> list[str]:  # fmt: skip
        """Greedy answers to examples in one condition, in their order; with the adapter, if it is enabled.

        Args:
            examples: whatever `load_examples` takes; or a question, a list of questions, a dict, or a clip's path.
            condition: default audio-text, or text-only where the first has no audio.
            refusal_prompt: appends the config's (`True`), or the one given.
            prefix: how every answer is made to begin, e.g. "Sure, here is"; what the model adds to it is returned.
        """
        if isinstance(examples, str) and not (os.path.exists(examples) or Path(examples).suffix[1:].isalpha()):
            examples = [examples]  # no file, and not named like one: a question
        examples = load_examples(examples)
        condition = condition or ("audio-text" if examples[0].has("audio-text") else "text-only")
        examples = self.readable(self._usable(examples, condition), [condition])
        begun = self.token_ids(prefix)
        with self._running():
            prompts = [self.read(e, condition, refusal_prompt=refusal_prompt).extended(begun) for e in examples]
            return self._answer(prompts, max_new_tokens, f"generate {condition}")

    def evaluate(
        self, examples: Any, conditions: Sequence[str] = ("audio-text", "text-only", "audio-only"), *,
        judge: Judge = judge_refusals, max_new_tokens: int = 64, prefix: str = "",
        stages: Mapping[str, Stage] | None = None, cache: str | Path | None = None, usefulness: int = 64,
    ) -> Report:  # fmt: skip
        """Answers examples before (adapter off) and after (adapter on) and reports refusals with 95% intervals.

        Args:
            examples: whatever `load_examples` takes, with labels; or `{group: examples}`, to report groups apart.
            judge: `(prompts, responses) -> verdicts`, of answers of `max_new_tokens`.
            prefix: how every answer is made to begin, e.g. "Sure, here is"; reported and judged is what the model adds.
            stages: other states of the model to compare, `{name: stage}`, the first being what the others are compared
                with: `stage(condition)` is a context manager inside which the model is in that state; what it yields,
                if not `None`, is the `RRS` that answers. The name must say all that the stage changes outside of it.
            cache: a JSONL that keeps answers as they come. With the same file an interrupted evaluation continues where
                it stopped, with the same result. Answers of anything else do not match and stay unused.
            usefulness: benign inputs (at most, spread over all) in each condition on which to measure how much else
                changed, see `Report.usefulness`; 0 skips it.
        """
        conditions, given = _strings("conditions", conditions), stages
        groups, notes = self._asked(examples, conditions)
        if stages is None:
            stages = {"before": lambda _: self.disabled()}
            if self.lora is not None and self.lora.attached:
                stages["after"] = lambda _: nullcontext()
        base = fingerprint(self.model, self.location.decoder)
        begun, known = self.token_ids(prefix), AnswerCache(cache) if cache else None

        @contextmanager
        def at(stage: str, condition: str) -> Iterator[Any]:
            with self._running(), stages[stage](condition) as other:
                yield other or self

        def answer(stage: str, condition: str, rows: Sequence[Example]) -> list[str]:
            with at(stage, condition) as who:
                prompts = [who.read(e, condition).extended(begun) for e in rows]
                state = f"{stage} {base} {who._state(given is not None)}"
                return who._answer(prompts, max_new_tokens, f"{stage} {condition}", cache=known, state=state)

        report = answer_and_judge(groups, conditions, list(stages), answer, judge)
        if usefulness:
            measure(report, groups, conditions, at, usefulness, begun)
        report.notes += [f"Every answer was made to begin with {prefix!r}; judged is what follows."] if prefix else []
        report.notes += notes
        if found := self.record.get("calibrated"):
            points = (found["vanilla"], *found["points"])
            report.curve = [{**point, "chosen": point["scale"] == found["chosen"]["scale"]} for point in points]
        data = {group: {"n": len(rows), "sha256": content_hash(rows, self.render)} for group, rows in groups.items()}
        report.settings = {  # whatever it takes to run again
            "max_new_tokens": max_new_tokens, "prefix": prefix, "config": asdict(self.config), "versions": versions(),
            "model": {"class": type(self.model).__name__, "fingerprint": base}, "data": data,
        }  # fmt: skip
        if given is None and "after" in stages:
            self.report = report
        return report

    def _state(self, steered: bool) -> str:
        """A hash of what answers depend on beside base model and prompts; `steered` takes in the directions."""
        lora = self.lora if self.lora is not None and self.lora.attached else None
        moves = {f"{c}.{n}": t for c, d in self.directions.items() for n, t in d._asdict().items()} if steered else {}
        how = json.dumps([asdict(self.config), versions(), str(self.reader.dtype), lora and lora.scale])
        return _digest({**(lora.tensors() if lora else {}), **moves}, how)

    def _asked(self, examples: Any, conditions: Sequence[str]) -> tuple[dict[str, list[Example]], list[str]]:
        """Groups of examples to measure on, and notes on what should not be among them, of which it also warns."""
        groups = {group: self.readable(rows, conditions) for group, rows in grouped(examples).items()}
        harmful, harmless = ([e for g in side for e in groups[g]] for side in by_label(groups))
        seen = shared([e for rows in groups.values() for e in rows], self._trained_on, twins=True)
        notes = []
        for found, what, fix in (
            (seen, "examples, or their twins, are in the training set", "Evaluate on others."),
            (shared(harmful, harmless), "questions are in a harmful and in a harmless group", "Keep each on one side."),
        ):
            if found:
                notes.append(f"{len(found)} {what}: {', '.join(found[:8])} …")
                _warn(f"{notes[-1]} {fix}")
        return groups, notes

    def _refusals(
        self, examples: Sequence[Example], condition: str, refusal_prompt: bool | str = False
    ) -> tuple[Rate, list[str]]:
        """How many examples the vanilla model refuses, by answers of 24 tokens; and the refusals, or all if none is."""
        with self.disabled():
            answers = self.generate(examples, condition, max_new_tokens=24, refusal_prompt=refusal_prompt)
        verdicts = judge_refusals([e.text or "" for e in examples], answers)
        refusals = [answer for answer, v in zip(answers, verdicts, strict=True) if v == "refusal"]
        return Rate.of([v in ("refusal", "partial") for v in verdicts]), refusals or answers

    def _answer(self, prompts: Sequence[Prompt], max_new_tokens: int, what: str, **options: Any) -> list[str]:
        with self._bar(len(prompts), what) as bar:
            said = generate_ids(self.reader, self.tokenizer, prompts, max_new_tokens, bar.update, **options)
        return [answer_text(self.tokenizer, ids) for ids in said]

    # -- the head -----------------------------------------------------------------------------------------------------

    @property
    def refusal_token(self) -> int:
        """The first token of `config.refusal`, as an answer begins with it."""
        return self.token_ids(self._settled("refusal"))[0]

    def _settled(self, name: str) -> str:
        """A setting that `fit` finds where it is "auto"."""
        if (value := str(getattr(self.config, name))) == "auto":
            said = f"{name}='auto' is found by fit(); for single steps, take it from find_refusal(harmful, benign):"
            raise ValueError(f"{said} model.config = replace(model.config, refusal_prompt=…, refusal=…).")
        return value

    def head_row(self, token: int) -> Tensor:
        """The `lm_head` row `[hidden]` of a token id, float32 on the CPU."""
        return self.location.head_weight[token].detach().float().cpu()

    def _first_choice(self, h: Tensor) -> Tensor:
        """The head's most likely token `[n]` at vectors `[n, hidden]`."""
        return self._logits(h, lambda logits: logits.argmax(-1))

    @torch.no_grad()
    def _logits(self, h: Tensor, take: Callable[[Tensor], Tensor]) -> Tensor:
        """What `take` reads off the logits `[some, vocab]` of vectors `[n, hidden]`; never all of them at a time."""
        return torch.cat([take(self.reader.logits(rows)).cpu() for rows in h.split(256)])

    # -- the adapter --------------------------------------------------------------------------------------------------

    def disable(self) -> Self:
        """Takes the adapter off, in place: the model is vanilla, bit for bit. `enable()` puts it back."""
        put_back(self.model)
        if self.lora is not None:
            self.lora.detach()
        return self

    def enable(self) -> Self:
        """Puts the adapter back on, in place. `disable()` takes it off."""
        if self.lora is None:
            raise ValueError("There is no adapter yet; call fit() or RRS.load(dir, model, processor).")
        self.lora.attach()
        return self

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The vanilla model, this thread's own, inside the `with`; the adapter is as it was afterwards. ValueError if
        another RRS has its adapter on this model."""

        def undo() -> None:
            if on and self.lora is not None:  # not merged in here
                self.enable()

        with lock(self.model):
            on = self.lora is not None and self.lora.attached
            with undoing(self.model, undo):
                self.disable()
                if attached(self.model):
                    raise ValueError(ANOTHER_LORA)
                yield

    def merge(self) -> nn.Module:
        """Adds the adapter to the model's weights for good and returns the model; can't be undone, `save` first. Where
        the model is the part of a composite (`composite.thinker`), `composite.save_pretrained` then has it, too."""
        if self.lora is None:
            raise ValueError("There is no adapter to merge; call fit() or RRS.load(dir, model, processor).")
        self.lora.merge()
        self.lora = None
        return self.model

    # -- small things -------------------------------------------------------------------------------------------------

    @staticmethod
    def _usable(examples: Sequence[Example], condition: str) -> list[Example]:
        """The examples, if each has what the condition needs; those that lack it are named."""
        if condition not in CONDITIONS:
            raise ValueError(f"condition={condition!r} is unknown; choose from {CONDITIONS}.")
        if said := lacking(examples, condition):
            raise ValueError(f"{said}.")
        if not examples:
            raise ValueError(f"{condition}: there is no example.")
        return list(examples)

    def _finite(self, vectors: Tensor, condition: str) -> Tensor:
        """The vectors, if they are numbers."""
        if not torch.isfinite(vectors).all():
            names = [name for name, p in self.model.named_parameters() if not torch.isfinite(p).all()]
            fix = f"Weights that are: {names[:4]}; load the checkpoint again." if names else "Try dtype float32."
            raise ValueError(f"{condition}: the model's last hidden state is NaN or infinite. {fix}")
        return vectors

    @contextmanager
    def _running(self, vanilla: bool = False) -> Iterator[None]:
        """The model frozen and this thread's own inside the `with`, without the adapter if `vanilla`."""
        with lock(self.model):
            put_back(self.model)
            with frozen(self.model), self.disabled() if vanilla else nullcontext():
                yield

    def _say(self, message: str) -> None:
        if self.verbose:
            tqdm.write(message)

    def _bar(self, total: int, what: str, done: int = 0) -> tqdm[Any]:
        off = not self.verbose
        return tqdm(total=total, desc=what, initial=done, disable=off, leave=False, dynamic_ncols=True)


# ---------------------------------------------------------------------------------------------------------------------
# The public class


class Prepared(NamedTuple):
    """Steps 1 to 4 in one condition: see `RRS.prepare`."""

    condition: str
    items: list[TrainItem]  # of harmful examples, then of benign ones
    direction: Direction
    harmful: Tensor  # R_h [harmful, hidden]
    benign: Tensor  # R_b [benign, hidden]


class RRS(Runner):
    """The method: `fit` is all of it; each step can be called by itself. See `Runner` for the arguments."""

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | Path, config: RRSConfig | None = None, *,
        device: str | torch.device | None = None, dtype: torch.dtype | None = None, trust_remote_code: bool = False,
        revision: str = "main", model_kwargs: Mapping[str, Any] | None = None, **kwargs: Any,
    ) -> RRS:  # fmt: skip
        """Load model and processor by name or folder. Weights are read from safetensors only, never unpickled.

        Args:
            device: default the machine's accelerator, else the CPU.
            dtype: default bfloat16 on an accelerator, float32 on a CPU and on MPS.
            trust_remote_code: run Python code that comes with the checkpoint; off unless you ask for it.
            revision: branch, tag or commit of the checkpoint.
            model_kwargs: for the model: `device_map`, `attn_implementation`, `quantization_config`, …
            kwargs: further arguments of `RRS(...)`.
        """
        connect()
        device, name, given = torch.device(device or best_device()), str(name_or_dir), dict(model_kwargs or {})
        dtype = dtype or best_dtype(device)
        source = {"trust_remote_code": trust_remote_code, "revision": revision}
        architecture = (transformers.AutoConfig.from_pretrained(name, **source).architectures or [""])[0]
        model_class = getattr(transformers, THINKERS.get(architecture, architecture), None)
        if model_class is None and not trust_remote_code:
            said = f"transformers {transformers.__version__} has no class {architecture!r} for {name}. Update it; or"
            raise ValueError(f"{said}, if you trust the code in that checkpoint, pass trust_remote_code=True.")
        loader: Any = model_class or transformers.AutoModelForCausalLM
        model = loader.from_pretrained(name, dtype=dtype, use_safetensors=True, **source, **given)
        processor = transformers.AutoProcessor.from_pretrained(name, **source)
        if not given.keys() & {"device_map", "quantization_config"}:  # these have put it where it belongs
            model.to(device)
        return cls(model.eval(), processor, config, **kwargs)

    # -- the steps ----------------------------------------------------------------------------------------------------

    def extract(
        self, examples: Any, condition: str, *,
        refusal_prompt: bool | str = False, all_layers: bool = False, vanilla: bool = True,
    ) -> Tensor:  # fmt: skip
        """Step 1, one side at a time: `h(x)` of the vanilla model, float32 `[n, hidden]`, in the examples' order.

        `h(x)` is what the head multiplies at the prompt's last token.

        Args:
            refusal_prompt: append `config.refusal_prompt`, or the one given, for `R_h+`.
            all_layers: `[n, layers + 1, hidden]` instead: the embeddings and every block's output at that token.
            vanilla: without the adapter; False leaves it as it is.
        """
        examples = self._usable(load_examples(examples), condition)
        with self._running(vanilla), self._bar(len(examples), f"extract {condition}") as bar:
            prompts = [self.read(e, condition, refusal_prompt=refusal_prompt) for e in examples]
            return self._finite(self.reader.represent(prompts, bar.update, layers=all_layers), condition)

    def extract_along(
        self, examples: Sequence[Example], condition: str, suffixes: Sequence[Sequence[int]], *,
        refusal_prompt: bool | str = False,
    ) -> list[Tensor]:  # fmt: skip
        """Vanilla's `h(x)` at the prompt's end and after each token of an answer, `[1 + len(suffix), hidden]` for each
        example; `suffixes` are the answers' token ids."""
        asked = zip(examples, suffixes, strict=True)
        with self._running(vanilla=True), self._bar(len(examples), f"extract {condition}") as bar:
            prompts = [self.read(e, condition, refusal_prompt=refusal_prompt).extended(s) for e, s in asked]
            rows = self.reader.represent(prompts, bar.update, last=1 + max(map(len, suffixes), default=0))
        return [self._finite(h[-1 - len(s) :], condition) for h, s in zip(rows, suffixes, strict=True)]

    def select(self, benign: Tensor, refused: Tensor, scorer: Scorer = contribution) -> Direction:
        """Steps 2 and 3, of R_b and R_h+ `[n, hidden]`: `Δ = mean(R_h+) − mean(R_b)`, its safety features, and what
        inputs are moved along."""
        delta = refused.mean(0) - benign.mean(0)
        mask = select_features(delta, self.head_row(self.refusal_token), self.config.top, scorer)
        move = delta * mask
        if self.config.direction == "natural":
            weight, scale = self.location.head_weight, self.reader.logit_scale
            move = natural_direction(move, benign, weight if scale == 1 else weight * scale)  # at 1, no copy of it
        return Direction(delta, mask, move)

    def prepare(
        self, harmful: Sequence[Example], benign: Sequence[Example], condition: str, scorer: Scorer = contribution
    ) -> Prepared:
        """Steps 1 to 4 in one condition: extract, select, and the items that training visits."""
        c, words = self.config, self.token_ids(self._settled("refusal"))
        harmful, benign = self._usable(harmful, condition), self._usable(benign, condition)
        r_b, r_h = self.extract(benign, condition), self.extract(harmful, condition)
        suffix = words if len(words) > 1 else ()
        some = harmful[:: -(-len(harmful) // (c.refusal_examples or len(harmful)))]
        plus = torch.stack(self.extract_along(some, condition, [suffix] * len(some), refusal_prompt=True))
        direction = self.select(r_b, plus[:, 0], scorer)  # plus: R_h+, and after each word, [some, 1 + words, hidden]
        up, down = c.harmful_strength * direction.move, c.benign_strength * direction.move
        suffixes, goals = [suffix] * len(harmful), [plus[:, 1:].mean(0)] * len(harmful)
        items = make_items(harmful, condition, r_h, up, suffixes=suffixes, along=goals)
        kept, held = make_items(benign, condition, r_b, -down), self._held(benign, condition, r_b)
        after = self.extract_along([benign[i] for i in held], condition, [*held.values()])
        for (i, answer), rows in zip(held.items(), after, strict=True):
            kept[i] = replace(kept[i], suffix=answer, target=torch.cat([kept[i].target, rows[1:]]))
        return Prepared(condition, [*items, *kept], direction, r_h, r_b)

    def _held(self, benign: Sequence[Example], condition: str, r_b: Tensor) -> dict[int, tuple[int, ...]]:
        """Which benign answers are held (`config.keep_tokens`, `.keep_share`): index to the answer's first tokens."""
        c, token = self.config, self.refusal_token
        if not c.keep_tokens:
            return {}
        near = self._logits(r_b, lambda logits: logits.log_softmax(-1)[:, token])
        some = sorted(near.argsort(descending=True, stable=True)[: max(1, round(c.keep_share * len(benign)))].tolist())
        with self._running(vanilla=True), self._bar(len(some), "answers to hold") as bar:
            prompts = [self.read(benign[i], condition) for i in some]
            said = generate_ids(self.reader, self.tokenizer, prompts, c.keep_tokens, bar.update)
        return {i: tuple(said[k]) for k, i in enumerate(some)}

    def preflight(self, prepared: Prepared, n: int = 32) -> dict[str, Rate]:
        """Can this work? The shares of `PREFLIGHT`, of the vanilla model; it warns with the fix where one is not fine.
        `n` harmful and `n` benign examples answer, in 24 tokens each."""
        condition, items, _, r_h, r_b = prepared
        some = [[i.example for i in side[:: -(-len(side) // n)]] for side in (items[: len(r_h)], items[len(r_h) :])]
        goal_h, goal_b = torch.stack([item.target[0] for item in items]).split([len(r_h), len(r_b)])
        rates = {
            "harmful_refused": self._refusals(some[0], condition)[0],
            "benign_refused": self._refusals(some[1], condition)[0],
            "refused": self._refusals(some[0], condition, refusal_prompt=True)[0],
            "token_target": Rate.of(self._first_choice(goal_h) == self.refusal_token),
            "benign_same": Rate.of(self._first_choice(goal_b) == self._first_choice(r_b)),
        }
        if words := items[0].suffix[1:]:
            rates["words_follow"] = Rate.of(self._first_choice(items[0].target[1:-1]) == torch.tensor(words))
        for name, rate in rates.items():
            least, most, what, fix = PREFLIGHT[name]
            in_words = name == "refused" and len(self.config.refusal.split()) > 1  # which are targets themselves
            fine = least <= rate.value <= most or in_words
            if fine:
                self._say(f"preflight {condition}: {rate} {what}")
            else:
                _warn(f"{condition}: {rate} {what}. {fix}")
        return rates

    def find_refusal(
        self, harmful: Any, benign: Any = None, condition: str | None = None, *,
        prompts: Sequence[str] = REFUSAL_PROMPTS, words: str = "", n: int = 24,
    ) -> Refusal:  # fmt: skip
        """How does this model refuse? Tries `prompts` and the config's own on `n` examples (24 tokens each), by default
        in the first of `config.conditions`: which of them makes it refuse most, and with which words?

        Words are `words` if given, else those in quotation marks in the prompt, or those that its refusals begin with.
        They serve if, once the first is said, the model says the rest, and if answers to `benign` do not begin so: "I"
        begins many. Where none serve, the prompt that refuses most and `words`, or its refusals', are returned.
        """
        condition = condition or self.config.conditions[0]
        examples = self._usable(load_examples(harmful, "harmful"), condition)
        examples = examples[:: -(-len(examples) // n)]
        if not (asked := dict.fromkeys(p for p in (*prompts, self.config.refusal_prompt) if p != "auto")):
            raise ValueError("There is no refusal prompt to try: prompts is empty and config.refusal_prompt 'auto'.")
        tried = [(prompt, *self._refusals(examples, condition, prompt)) for prompt in asked]
        tried.sort(key=lambda row: -row[1].value)
        usual = torch.empty(0)
        if benign is not None:
            some = self._usable(load_examples(benign, "benign"), condition)
            usual = self._first_choice(self.extract(some[:: -(-len(some) // 256)], condition))
        best = tried[0][0], tried[0][1], words or _opening(tried[0][2], self.tokenizer)
        candidates = (
            (prompt, rate, said)
            for prompt, rate, texts in tried
            if rate.k
            for said in ([words] if words else [*prompt.split('"')[1::2], _opening(texts, self.tokenizer)])
        )
        serving = (c for c in candidates if self._serve(c[2], c[0], examples, condition, usual))
        prompt, rate, words = next(serving, best)
        found = Refusal(prompt, words, rate, [row[:2] for row in tried])
        lines = [f"refused: {share}  {prompt}" for prompt, share in found.tried]
        self._say("\n".join([*lines, f"refusal prompt: {prompt}", f"words: {words!r}"]))
        if tried[0][1].value < 0.5:
            low = f"Even the best refusal prompt makes this model refuse only {tried[0][1]}"
            _warn(f"{low}. Set one of your own (refusal_prompt, or prompts=) that quotes the words to reply with.")
        return found

    def _serve(self, words: str, prompt: str, examples: Sequence[Example], condition: str, usual: Tensor) -> bool:
        """Whether words serve as the refusal under a prompt: no more than 2% of benign answers begin so, by their first
        tokens `usual`; and each next word is the head's first choice at the mean vector behind those before."""
        if not (ids := self.token_ids(words)) or float((usual == ids[0]).float().mean()) > 0.02:  # NaN, of none, is not
            return False
        along = self.extract_along(examples, condition, [ids] * len(examples), refusal_prompt=prompt)
        return self._first_choice(torch.stack(along).mean(0)[1:-1]).tolist() == [*ids[1:]]

    # -- training -----------------------------------------------------------------------------------------------------

    def train(
        self, items: Sequence[TrainItem], *,
        objective: Objective = to_targets, penalty: Penalty = LoRA.penalty, callbacks: Iterable[Callback] = (),
        checkpoint_dir: str | Path | None = None, checkpoint_every: int = 0, resume: bool = False,
        record: Mapping[str, Any] | None = None,
    ) -> RRS:  # fmt: skip
        """Step 5, in place: attaches a fresh LoRA and trains it towards the items' targets. `disable()` takes it off.

        `loss = mean(weight · objective) + config.penalty · penalty(lora)`, AdamW, linear decay, gradient clipping.

        Args:
            items: from `make_items`, or of your own.
            objective: `(reader, prompts, items) -> losses [batch]`; the default is the distance to the targets.
            penalty: `(lora) -> scalar`; the default is the paper's `Σ_modules ‖(α/r)·B·A‖_F²`.
            callbacks: called with a `Step` after each optimizer step; training ends where one returns True.
            checkpoint_dir, checkpoint_every, resume: as in `fit`.
            record: what else to keep in `self.record`.

        FloatingPointError where loss or gradient is not finite, with step, examples and last checkpoint. Whatever is
        raised, the model and this object are as they were before.
        """
        check_run(checkpoint_dir, resume, checkpoint_every)
        c, items, callbacks, history = self.config, list(items), list(callbacks), list[dict[str, float]]()
        self._check_items(items, objective)
        paths, fused = linear_paths(self.location, c.target_modules, c.layers), has_fused_adamw(self.reader.device)
        lora = LoRA(self.model, paths, r=c.lora_r, alpha=c.lora_alpha, dropout=c.lora_dropout, seed=c.seed)
        optimizer = torch.optim.AdamW(
            lora.parameters(), c.learning_rate, c.betas, weight_decay=c.weight_decay, fused=fused
        )
        per_epoch, run = steps_per_epoch(items, c), self._run_record(items, objective, penalty)
        checkpoints = Checkpoints(checkpoint_dir, run)
        saved = checkpoints.load(lora, optimizer)
        history, about = saved.get("history", history), saved.get("record", {**run, **(record or {})})
        steps = len(history) if saved.get("stopped") else c.epochs * per_epoch
        lengths = None
        if c.group_by_length:  # of the prompts alone: what is added to them goes by label, and batches should not
            with self._running(vanilla=True):
                lengths = [len(self.read(i.example, i.condition)) for i in items]
        experts = f"; none on {n} matrices of experts (3-D)" if (n := len(expert_parameters(self.location))) else ""
        self._say(f"train: {len(items)} items, {steps} steps; a LoRA on {len(paths)} linears{experts}")
        seen = marks(i.example for i in items)
        with self._training(lora, about, history, seen, checkpoint_dir), self._bar(steps, "train", len(history)) as bar:
            for step in range(len(history), steps):
                # -------------------------------------------------------------------------- a single training step
                optimizer.param_groups[0]["lr"] = rate = c.learning_rate * (1 - step / (c.epochs * per_epoch))
                batches, total = draw(items, c, step, lengths), torch.zeros((), device=self.reader.device)
                for place, rows in share_out(batches, rank(), world()):
                    lora.key = (c.seed, step, *place)  # of dropout
                    batch = [item for item, _ in rows]
                    prompts = [self.read(i.example, i.condition, text).extended(i.suffix) for i, text in rows]
                    losses = weighted(objective(self.reader, prompts, batch), batch)  # [rows]
                    part = losses.sum() / (len(batches) * len(batches[place[0]]))  # a mean over batches of their means
                    part.backward()
                    total += part.detach().to(total)
                all_reduce_sum([total, *gradients(lora)])  # nothing, when alone
                square = penalty(lora)  # the loss's second term: the same on every rank, so after the sum
                if c.penalty:
                    (c.penalty * square).backward()
                norm = nn.utils.clip_grad_norm_(lora.parameters(), c.max_grad_norm)
                mean, square, norm = torch.stack([x.detach().float().to(total) for x in (total, square, norm)]).tolist()
                self._check_finite(step, mean + c.penalty * square + norm, batches, checkpoints)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                # --------------------------------------------------------------------------------------------------
                loss, epoch = mean + c.penalty * square, step // per_epoch + 1
                state = Step(self, epoch, step + 1, steps, loss, mean, square, norm, rate)
                history.append({name: value for name, value in vars(state).items() if name != "rrs"})
                bar.set_postfix(epoch=epoch, loss=f"{loss:.4f}", refresh=False)
                bar.update()
                self.report = None  # one that a callback made was of the weights before
                lora.eval()  # callbacks see the model without dropout
                stop = any([callback(state) is True for callback in callbacks])
                lora.train()
                if stop or (step + 1) % (checkpoint_every or per_epoch) == 0 or step + 1 == steps:
                    checkpoints.save(step + 1, lora, optimizer, {"history": history, "record": about, "stopped": stop})
                if stop:
                    break
        return self

    def _check_items(self, items: Sequence[TrainItem], objective: Objective) -> None:
        """Raises ValueError for what can't be trained on, naming the item."""
        if not items:
            raise ValueError("There is nothing to train on: no items.")
        hidden = self.location.head_weight.shape[1]
        vectors = to_targets in (objective, getattr(objective, "func", None))
        for item in items:
            where, shape, most = f"{item.condition} {item.example.id}", item.target.shape, len(item.suffix) + 1
            if not item.example.has(item.condition):
                raise ValueError(f"{where}: the example lacks what this condition needs.")
            if vectors and not (len(shape) == 2 and shape[1] == hidden and 1 <= shape[0] <= most):
                said = f"{where}: the target {list(shape)} must be [positions, {hidden}] with at most {most} positions"
                raise ValueError(f"{said}, the prompt's end and the suffix; for one vector, vector[None].")
            if item.target.is_floating_point() and not torch.isfinite(item.target).all():
                raise ValueError(f"{where}: the target holds NaN or infinity.")

    def _run_record(self, items: Sequence[TrainItem], objective: Objective, penalty: Penalty) -> dict[str, Any]:
        """What makes an adapter what it is, and a resumed run shares, as JSON takes it."""
        data: dict[str, Any] = {}
        for condition, label in dict.fromkeys((i.condition, i.example.label) for i in items):
            side = [i.example for i in items if (i.condition, i.example.label) == (condition, label)]
            data.setdefault(condition, {})[str(label)] = {"n": len(side), "sha256": content_hash(side, self.render)}
        made = getattr(self.model, "config", None)
        base = {
            "class": type(self.model).__name__, "name": getattr(made, "_name_or_path", ""),
            "fingerprint": fingerprint(self.model, self.location.decoder),
            "revision": getattr(made, "_commit_hash", None),
        }  # fmt: skip
        total = 0.0  # of the targets, which another processor changes; negated, permuted or weighted ones differ, too
        for i, item in enumerate(items, 1):
            flat = item.target.float().flatten()
            total += i * item.weight * float((flat + torch.linspace(1, 2, len(flat))).norm())
        return {
            "config": asdict(self.config), "data": data, "base": base, "versions": versions(),
            "dtype": str(self.reader.dtype), "how": [describe(objective), describe(penalty)], "targets": f"{total:.4g}",
        }  # fmt: skip

    @contextmanager
    def _training(
        self, lora: LoRA, record: dict[str, Any], history: list[dict[str, float]], seen: frozenset[int],
        folder: str | Path | None,
    ) -> Iterator[None]:  # fmt: skip
        """A new adapter in training inside the `with`, alone in its folder of checkpoints; after an error the one
        before is back, as it was."""
        before, on = dict(vars(self)), self.lora is not None and self.lora.attached

        def undo() -> None:
            lora.detach()
            vars(self).update(before)
            if on:
                self.enable()

        try:
            self.disable()
            with holding(folder), self._running():
                self.lora, self.history, self.record = lora.attach().train(), history, record
                self.report, self.directions, self._trained_on = None, {}, seen
                yield
                lora.eval()
        except BaseException:
            with undoing(self.model, undo):
                raise

    def _check_finite(self, step: int, loss: float, batches: Any, checkpoints: Checkpoints) -> None:
        if not math.isfinite(loss):
            names = [f"{item.condition} {item.example.id}" for batch in batches for item, _ in batch]
            fix = f"Lower learning_rate ({self.config.learning_rate}), or check the base model's weights for NaN."
            raise FloatingPointError(
                f"step {step + 1}: loss or gradient is not finite on {names}. {checkpoints.last}. {fix}"
            )

    def fit(
        self, harmful: Any, benign: Any, *,
        scorer: Scorer = contribution, preflight: int = 32, save_to: str | Path | None = None,
        checkpoint_dir: str | Path | None = None, checkpoint_every: int = 0, resume: bool = False, **training: Any,
    ) -> RRS:  # fmt: skip
        """The whole method, in place: extract, select, items, preflight, train. `disable()` brings vanilla back; after
        an error, model and adapter are as they were before.

        The same seed gives the same adapter, bit for bit, on the same machine, versions and number of threads, also
        after interruptions. Not on another machine, nor on GPUs, whose kernels may add in another order unless
        `torch.use_deterministic_algorithms(True)`; and not across a change of batch_size, as dropout's masks differ.

        Args:
            harmful, benign: a manifest's path, a list of `Example`, or an iterable of dicts. Without written answers.
            scorer: scores features for the selection, instead of the paper's `contribution`.
            preflight: examples of each side on which to check that refusing works at all before training; 0 skips it.
            save_to: where to save the adapter at the end; checked before the work.
            checkpoint_dir: a folder of this run's own, for its state (safetensors).
            checkpoint_every: optimizer steps between two checkpoints; 0 is an epoch's.
            resume: go on from the folder's newest checkpoint, if it has one, to the result of an uninterrupted run.
            training: `objective`, `penalty` and `callbacks` of `train`.
        """
        began, started = time.perf_counter(), check_run(checkpoint_dir, resume, checkpoint_every)
        if save_to is not None:
            on_rank0(lambda: check_folder(save_to))
        linear_paths(self.location, self.config.target_modules, self.config.layers)
        sides = load_examples(harmful, "harmful"), load_examples(benign, "benign")
        usable = self.readable([*sides[0], *sides[1]], self.config.conditions)
        harmful, benign = ([e for e in usable if e.label == label] for label in ("harmful", "benign"))
        if both := shared(harmful, benign):
            raise DataError(f"These questions are harmful and benign at once: {both[:8]}. Keep each on one side.")
        if few := [f"{len(side)} {side[0].label}" for side in (harmful, benign) if 0 < len(side) < 8]:
            _warn(f"Only {' and '.join(few)} examples: Δ is mostly noise. Use at least 32 of each.")
        self._say(f"RRS on {type(self.model).__name__}: {len(harmful)} harmful and {len(benign)} benign examples")
        config, extra = self.config, dict[str, Any]()
        try:
            if "auto" in (config.refusal_prompt, config.refusal):
                fixed: dict[str, Any] = {} if config.refusal_prompt == "auto" else {"prompts": ()}  # its own alone
                fixed |= {} if config.refusal == "auto" else {"words": config.refusal}
                found = self.find_refusal(harmful, benign, **fixed)
                self.config = replace(config, refusal_prompt=found.prompt, refusal=found.words)
                extra["refusal"] = asdict(found)
            differs = [f"\n  {name:18} {value!r}" for name, value in self.config.differences().items()]
            self._say("settings that differ from the paper's:" + ("".join(differs) or " none"))
            prepared = [self.prepare(harmful, benign, condition, scorer) for condition in self.config.conditions]
            if preflight and not started:
                rates = [(p.condition, self.preflight(p, preflight)) for p in prepared]
                extra["preflight"] = [{"condition": c} | {k: asdict(r) for k, r in x.items()} for c, x in rates]
            items = [item for p in prepared for item in p.items]
            self.train(
                items, checkpoint_dir=checkpoint_dir, checkpoint_every=checkpoint_every, resume=resume,
                record=extra, **training,
            )  # fmt: skip
        except BaseException:
            self.config = config
            raise
        self.directions = {p.condition: p.direction for p in prepared}
        self._say(f"done in {time.perf_counter() - began:.0f} s")
        if save_to is not None:
            self.save(save_to)
        return self

    # -- how strongly it acts -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(
        self, dev: Any, conditions: Sequence[str] = ("audio-text", "text-only", "audio-only"), *,
        budget: float | Mapping[str, float] = 0.01, judge: Judge | None = judge_refusals, max_new_tokens: int = 24,
        answers: int = 100, most: float = 8.0,
    ) -> Calibration:  # fmt: skip
        """Scales the adapter, in place and without training, to the most refusals whose cost stays within the budget.

        Divide `lora.scale` by the chosen scale to undo it. Scales around 1 are tried; counted is where the refusal
        token is the head's first choice, one forward pass of dev for each. Then the best scale answers, and weaker
        ones, until judged answers are within the budgets or beyond by less than their standard error; else it warns.

        Args:
            dev, conditions: to choose by, as in `evaluate`; not what was trained on.
            budget: how much more often than vanilla each group of harmless inputs may be refused, all conditions
                together: a number, or one for each group; 0.01 is a point. "degenerate": of all answers.
            judge: checks answers of `max_new_tokens`; `None` chooses by first tokens alone.
            answers, most: questions of each group to answer, evenly spread; the largest scale to try.
        """
        if (lora := self.lora) is None or not lora.attached:
            raise ValueError("There is no adapter to calibrate; call fit() or load() first, or enable().")
        conditions, present = _strings("conditions", conditions), lora.scale
        groups, _ = self._asked(dev, conditions)
        groups = {g: kept for g, rows in groups.items() if (kept := [e for e in rows if any(map(e.has, conditions))])}
        harmful, harmless = by_label(groups)
        if not harmful or not harmless:
            raise ValueError(f"dev has {list(groups)} for {conditions}; it needs harmful and benign examples.")
        limits = _budgets(budget, {g: groups[g] for g in harmless})
        with self._running():
            prompts = {g: [self.read(e, c) for c in conditions for e in rows if e.has(c)] for g, rows in groups.items()}
        some = {g: rows[:: -(-len(rows) // answers)] for g, rows in groups.items()}

        def at(scale: float) -> Point:
            lora.scale = scale * present
            with self._running(), self._bar(sum(map(len, prompts.values())), f"calibrate ×{scale:.2f}") as bar:
                first = {g: self._first_choice(self.reader.represent(rows, bar.update)) for g, rows in prompts.items()}
            now = {g: Rate.of(tokens == self.refusal_token) for g, tokens in first.items()}
            over = max(now[g].value - (vanilla.groups if scale else now)[g].value - limits[g] for g in harmless)
            return Point(scale, now, sum(now[g].value for g in harmful) / len(harmful), over)

        def answer(_stage: str, condition: str, rows: Sequence[Example]) -> list[str]:
            return self._answer([self.read(e, condition) for e in rows], max_new_tokens, f"answer {condition}")

        def judged(point: Point) -> Report:
            lora.scale = point.scale * present
            with self._running():
                report = answer_and_judge(some, conditions, ["now"], answer, judge or judge_refusals)
            point.answers = {g: report.rate(g) for g in some}
            point.answers["degenerate"] = report.rate(verdicts=("degenerate",))
            return report

        with lock(self.model), undoing(self.model, partial(setattr, lora, "scale", present)):  # for no other thread
            with self.disabled():
                vanilla = at(0.0)
                before = judged(vanilla) if judge is not None else None
            points = _curve(at, most)
            chosen = max([p for p in points if p.over <= 1e-9] or points[:1], key=lambda p: (p.refused, -p.scale))
            if unheard := not any(p.refused > vanilla.refused for p in points):
                chosen = min(points, key=lambda p: abs(math.log(p.scale)))
            tried = [(excess(before, judged(chosen), limits) if before else chosen.over, chosen)]
            while before and tried[-1][0] > 1e-9 and tried[-1][1].scale > 0.1:  # until answers are within it, too
                if (place := points.index(tried[-1][1])) == 0:
                    points.insert(0, at(points[0].scale / STEP))
                weaker = points[max(0, place - 1)]
                tried.append((excess(before, judged(weaker), limits), weaker))
            over, chosen = min(tried, key=lambda pair: pair[0])
        lora.scale, self.report = chosen.scale * present, None
        result = Calibration(limits, vanilla, points, chosen, over)
        self.record["calibrated"] = asdict(result)
        self._say(str(result))
        refusing = [(chosen.answers or chosen.groups)[g].value for g in harmful]
        for doubt, said in (
            (over > 1e-9, f"No scale stays within the budget {limits}"),
            (unheard, f"{self.config.refusal!r} begins no answer at any scale: set config.refusal to how it refuses"),
            (2 * sum(refusing) < chosen.refused * len(refusing), "Most answers that begin with the refusal go on "
             'otherwise: train longer, or use refusal="auto"'),
        ):  # fmt: skip
            if doubt:
                _warn(f"{said}; ×{chosen.scale:.2f} is set.")
        return result

    # -- the adapter on disk ------------------------------------------------------------------------------------------

    def _begin(self, asked: Sequence[Mapping[str, Any]]) -> tuple[list[Prompt], Tensor]:
        """Prompts of canaries, whose audio is a tone of half a second, and the logits that follow, `[n, vocab]`."""
        tone = {"array": (np.sin(0.2 * np.arange(8000)) / 4).astype(np.float32), "sampling_rate": 16000}
        rows = [{"text": p["text"]} | ({"audio": tone} if p["condition"] != "text-only" else {}) for p in asked]
        with self._running():
            prompts = [self.read(e, p["condition"]) for e, p in zip(load_examples(rows), asked, strict=True)]
            return prompts, self._logits(self.reader.represent(prompts), lambda logits: logits)

    def _canary(self, lora: LoRA) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """A few prompts with both models' answers, and both models' logits, by which `verify` tells whether it acts."""
        spoken = [c for c in self.record.get("data", {}) if c.startswith("audio")][:1]
        canary: list[dict[str, Any]] = [{"condition": "text-only", "text": text} for text in CANARY]
        canary += [{"condition": c, "text": CANARY[0]} for c in spoken]
        logits = dict[str, Tensor]()
        with lock(self.model), undoing(self.model, lora.attach if lora.attached else lora.detach):
            for name, switch in (("vanilla", self.disable), ("trained", self.enable)):
                switch()
                prompts, logits[name] = self._begin(canary)
                with self._running():
                    answers = self._answer(prompts, 16, "canary")
                for p, prompt, answer in zip(canary, prompts, answers, strict=True):
                    p.update({"tokens": prompt.ids.tolist(), name: answer})
        ids = torch.cat([rows.topk(8).indices for rows in logits.values()], 1)
        return canary, {"canary.ids": ids} | {f"canary.{name}": rows.gather(1, ids) for name, rows in logits.items()}

    def _acts(self, canary: Sequence[Mapping[str, Any]], vectors: Mapping[str, Tensor]) -> str:
        """What the model acts as now, by the prompts of a canary: the nearer of trained and vanilla, if its logits are
        at most a third as far as the two are apart, or rounding (2% of the largest)."""
        ids, trained, vanilla = (vectors[f"canary.{name}"] for name in ("ids", "trained", "vanilla"))  # [prompts, 16]
        prompts, logits = self._begin(canary)
        logits, apart = logits.gather(1, ids), float((trained - vanilla).abs().max())
        far = {"trained": float((logits - trained).abs().max()), "vanilla": float((logits - vanilla).abs().max())}
        nearest = min(far, key=far.__getitem__)
        near = far[nearest] <= max(apart / 3, 0.02 * float(trained.abs().max()))
        said = f"acts as {nearest if near else 'something else'}: first-token logits are at most "
        said += " and ".join(f"{x:.2g} from {name}" for name, x in far.items()) + f" ({len(canary)} prompts)"
        if [p.ids.tolist() for p in prompts] != [p["tokens"] for p in canary]:
            said += "; prompts have other tokens than in training: chat template, system prompt or build_inputs differ"
        return said

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Writes the adapter in PEFT's format, a model card, `rrs.json` (all figures) and `rrs.safetensors` (Δ, masks,
        hashes of the training questions, by which `evaluate` knows them again, and the canary that `verify` reads).

        Of a thinker, the folder `composite` in it has the adapter again, for the full checkpoint's class. Every file
        appears complete or not at all, `adapter_config.json` last. FileExistsError where the folder has content and
        `overwrite` is off, or content that is none of ours.
        """
        if (lora := self.lora) is None:
            raise ValueError("There is nothing to save; call fit() first.")
        path: Path = on_rank0(lambda: check_folder(directory, overwrite))
        vectors = {f"{c}.{name}": t.contiguous() for c, d in self.directions.items() for name, t in d._asdict().items()}
        if self._trained_on:
            vectors["trained_on"] = torch.tensor(sorted(self._trained_on))
        canary, logits = self._canary(lora)
        record = {**self.record, "canary": canary, "history": self.history, "template_kwargs": self.template_kwargs}
        if self.report is not None:
            record["evaluation"] = plain(self.report.rows())

        def adapter(prefix: str) -> dict[str, bytes]:
            named = {PEFT + prefix + name.removeprefix(PEFT): t for name, t in lora.tensors().items()}
            peft = json.dumps(peft_config(lora, self.record, self.model, prefix), indent=2)
            return {SETTINGS: peft.encode(), WEIGHTS: pack(named)}

        files = adapter("") | {VECTORS: pack(vectors | logits)}
        record["sha256"] = {name: hashlib.sha256(files[name]).hexdigest() for name in (WEIGHTS, VECTORS)}
        record["scale"] = lora.scale
        files |= {ABOUT: json.dumps(record, indent=2).encode(), README: model_card(record, self.report).encode()}
        if type(self.model).__name__ in THINKERS.values():
            on_rank0(lambda: write_files(path / COMPOSITE, adapter("thinker.")))
        on_rank0(lambda: write_files(path, {name: files[name] for name in FILES}))
        self._say(f"saved {path}")
        return path

    @classmethod
    def load(cls, directory: str | Path, model: nn.Module, processor: Any, **kwargs: Any) -> RRS:
        """A saved adapter on its base model, attached in place; `disable()` takes it off. It warns where the canary
        does not act as trained. `kwargs` are further arguments of `RRS(...)`; `config` is saved with the adapter.

        FileNotFoundError where no adapter is, ValueError where it is damaged or for another base.
        """
        tensors, peft, record, vectors = read_adapter(Path(directory))
        config, base = RRSConfig.from_dict(record.get("config", {})), record.get("base", {})
        known = record.get("template_kwargs")
        if known is not None and (now := kwargs.get("template_kwargs", known)) != known:
            _warn(f"{directory} was trained with template_kwargs={known!r}, not {now!r}.")
        rrs = cls(model, processor, config, **{"template_kwargs": known, **kwargs})
        r, scale = lora_scale(peft, tensors)
        if not math.isclose(scale, record.get("scale", scale)):
            raise ValueError(f"{directory}: adapter_config.json has another scale than rrs.json; save it again.")
        own, here = renamed(tensors, model, rrs.location), fingerprint(model, rrs.location.decoder)
        names = {n[len(PEFT) :].partition(".lora_")[0] for n in own}
        paths = [path for path, _ in model.named_modules() if path in names]
        unknown = sorted(names.difference(paths))
        if base.get("fingerprint") != here:  # another base lacks what had to be renamed
            unknown = unknown or sorted(tensors.keys() - own.keys())
        if unknown or len(own) < len(tensors):
            made = f"{directory} was made for another base ({base.get('class', '?')})"
            raise ValueError(f"{made}: {type(model).__name__} has no {unknown[:3]} …")
        rrs.lora = LoRA(model, paths, r=r, alpha=scale * r, dropout=float(peft.get("lora_dropout") or 0)).eval()
        rrs.lora.load_tensors(own)
        rrs._trained_on = frozenset(vectors.pop("trained_on", torch.empty(0)).tolist())
        for condition in {name.rpartition(".")[0]: 0 for name in vectors if not name.startswith("canary.")}:
            rrs.directions[condition] = Direction(*(vectors[f"{condition}.{field}"] for field in Direction._fields))
        rrs.history, canary = record.pop("history", []), record.pop("canary", None)
        rrs.record = {k: v for k, v in record.items() if k not in ("evaluation", "sha256", "scale", "template_kwargs")}
        rrs.lora.attach()
        try:
            said = rrs._acts(canary, vectors) if canary is not None else "its effect is unknown"
        except BaseException:
            rrs.disable()
            raise
        another = base.get("fingerprint", here) != here
        if another or not said.startswith(("acts as trained", "its effect")):
            where = f" was trained on another base than the one it is loaded on ({base});" if another else ""
            _warn(f"{directory}{where} {said}. Evaluate before use.")
        return rrs
