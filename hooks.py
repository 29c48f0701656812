"""What attaches to a model: find its parts, capture and steer vectors, replay the decoder, add a LoRA.

Nothing here edits a module: all of it is hooks and flags, and once they are off the model is bit-identical to before.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import math
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, GenerationConfig
from transformers.utils.versions import require_version

# ---------------------------------------------------------------------------------------------------------------------
# Where things are

# Names of a decoder's own children in transformers. Nothing else is guessed: a wrong layer trains without complaint and
# protects nothing.
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm")

# Classes that can't be served and classes that wrap a model, each with the reason or what to do instead.
REFUSED = {
    "KyutaiSpeechToTextForConditionalGeneration": "its audio codes are part of input_ids and it takes no instruction",
    "VoxtralRealtimeForConditionalGeneration": "it adds audio at every position and reads no text alone; use Voxtral",
    "Qwen2_5OmniForConditionalGeneration": "the composite has no forward; pass its .thinker, or use from_pretrained",
    "Qwen3OmniMoeForConditionalGeneration": "the composite has no forward; pass its .thinker, or use from_pretrained",
    "PeftModel": "pass model.merge_and_unload(), which keeps its adapter, or model.unload(), which drops it",
    "PeftMixedModel": "pass model.merge_and_unload(), which keeps its adapters, or model.unload(), which drops them",
    "OptimizedModule": "pass model._orig_mod",
    "DistributedDataParallel": "pass model.module",
    "DataParallel": "pass model.module",
    "FullyShardedDataParallel": "pass a model that is loaded whole",
}
# The release of transformers before which a class can't be served; FIXED_INPUTS says what it could not be told.
NEEDS = {"VibeVoiceAsrForConditionalGeneration": "5.23"}


@dataclass(frozen=True)
class Location:
    """The parts of a LALM that RRS needs, each with its dotted path in the model."""

    decoder: nn.Module  # the LLM without its head: embeddings in, final-norm output `[batch, length, hidden]` out
    layers: nn.ModuleList  # its blocks; LoRA touches linears below here and nothing else
    norm: nn.Module  # its final norm
    head: nn.Module  # the output embedding (`lm_head`)
    decoder_path: str
    layers_path: str
    norm_path: str
    head_path: str

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix `[vocab, hidden]`; row i is the direction of token i."""
        return cast(Tensor, self.head.weight)


def locate(
    model: nn.Module, *, decoder: str | None = None, norm: str | None = None, head: str | None = None
) -> Location:
    """Find decoder, blocks, final norm and head of a Hugging Face (multimodal) language model.

    `decoder`, `norm` and `head` are dotted paths. Where they are not given, the model's own accessors are asked. An
    error says what to do; it is an ImportError where the class needs a newer transformers, else a ValueError.
    """
    name = type(model).__name__
    if kind := next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in REFUSED), None):
        raise ValueError(f"The model is a {kind}, which is not supported: {REFUSED[kind]}.")
    if name in NEEDS:
        require_version(f"transformers>={NEEDS[name]}", f"RRS can't make {name} repeatable before.")
    paths = {id(module): path for path, module in model.named_modules()}  # first name wins, as in state_dict

    def ending(*names: str) -> list[str]:
        return [path for path in paths.values() if path.rpartition(".")[2] in names]

    # Head: the matrix whose rows are the tokens' directions.
    heads = ending("lm_head")
    head_module = _module_at(model, head, "head") if head else _ask(model, "get_output_embeddings")
    if head_module is None and len(heads) == 1:  # e.g. Nemotron-H-Omni: the head sits on the inner causal LM
        head_module = model.get_submodule(heads[0])
    if not isinstance(getattr(head_module, "weight", None), Tensor) or id(head_module) not in paths:
        raise ValueError(
            f"{name} names no output embedding with a weight matrix; modules called lm_head: {heads}. "
            "Load the class with a language-model head, or pass head='path.to.head'."
        )

    # Decoder: what feeds the head.
    decoder_module = _module_at(model, decoder, "decoder") if decoder else _ask(model, "get_decoder")
    while decoder is None and decoder_module is not None and any(m is head_module for m in decoder_module.modules()):
        inner = _ask(decoder_module, "get_decoder")  # a causal LM: step inside, the head is not part of the decoder
        decoder_module = None if inner is decoder_module else inner
    if decoder_module is None or id(decoder_module) not in paths:
        raise ValueError(
            f"{name} does not tell where its decoder is. Lists of blocks: {ending(*LAYER_LISTS)}. Pass decoder='path' "
            "for the module that owns the one that feeds the head."
        )
    children = dict(decoder_module.named_children())
    lists, norms = ([m for key, m in children.items() if key in names] for names in (LAYER_LISTS, FINAL_NORMS))
    norms = [_module_at(model, norm, "norm")] if norm else norms
    if len(lists) != 1 or len(norms) != 1:
        raise ValueError(
            f"{paths[id(decoder_module)]!r} ({type(decoder_module).__name__}) must have exactly one of {LAYER_LISTS} "
            f"and one of {FINAL_NORMS}; it has {list(children)}. Pass decoder='path', or norm='path'."
        )
    parts: list[Any] = [decoder_module, *lists, *norms, head_module]
    return Location(*parts, *(paths[id(part)] for part in parts))


def _module_at(model: nn.Module, path: str, argument: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError:
        paths, end = [p for p, _ in model.named_modules()], path.rpartition(".")[2]
        near = [p for p in paths if p.rpartition(".")[2] == end] or [p for p in paths if p.count(".") < 2]
        raise ValueError(f"{argument}={path!r} is not a module of {type(model).__name__}; close: {near}") from None


def _ask(model: Any, accessor: str) -> nn.Module | None:
    return getattr(model, accessor, lambda: None)()


# ---------------------------------------------------------------------------------------------------------------------
# What is changed for a while: flags that freeze, hooks that capture and steer

ACTIVATIONS = ("inputs_embeds", "hidden_states", "input")  # keyword names of a module's main argument, asked first
Hook = tuple[Any, Any, dict[str, Any]]  # `module.register_…`, what is registered, and keywords

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LEFT: WeakKeyDictionary[nn.Module, list[Callable[[], object]]] = WeakKeyDictionary()


def lock(model: nn.Module) -> threading.RLock:
    """The model's lock, to be used as `with lock(model):`; the thread that has it may take it again."""
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def undoing(model: nn.Module, undo: Callable[[], object]) -> Iterator[None]:
    """Calls `undo` after the `with`, also when Ctrl-C comes in the middle of that: `undo` must bear to be repeated."""
    try:
        try:
            yield
        finally:
            undo()
    except KeyboardInterrupt:  # perhaps in undo(); should yet another one come, `put_back` goes on before the next use
        _LEFT.setdefault(model, []).append(undo)
        undo()
        _LEFT[model].remove(undo)
        raise


def put_back(model: nn.Module) -> None:
    """Undoes, before a use of the model, what interrupts left on it, and says so."""
    if isinstance(last := getattr(sys, "last_value", None), KeyboardInterrupt):
        traceback.clear_frames(last.__traceback__)  # a notebook keeps them, and in them contexts that did not end
    if left := _LEFT.get(model):
        while left:
            left[-1]()
            left.pop()
        warnings.warn("Interrupts left hooks or flags of RRS on the model; they are as they were now.", stacklevel=2)


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass early; caught by the `with` that raised it and by nothing else."""


@contextmanager
def _changed(
    model: nn.Module, hooks: Sequence[Hook] = (), flags: Sequence[tuple[Any, str, bool]] = (),
    end: _Stop | None = None, record: Any = None,
) -> Iterator[Any]:  # fmt: skip
    """Inside the `with`, hooks are on and flags `(object, name, value)` are set. `end`, raised in a hook, ends it;
    `record` is what it yields."""
    before = [getattr(each, name) for each, name, _ in flags]

    def undo() -> None:
        for register, hook, _ in hooks:
            _take_off(register.__self__, hook)
        for (each, name, _), own in zip(flags, before, strict=True):
            setattr(each, name, own)

    try:
        with undoing(model, undo):
            for each, name, value in flags:
                setattr(each, name, value)
            for register, hook, keywords in hooks:
                register(hook, **keywords)
            yield record
    except _Stop as error:
        if error is not end:
            raise


def _take_off(module: Any, hook: Any) -> None:
    """Removes a hook; not by its handle, which an interrupt may have kept from being returned."""
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        for number in [number for number, other in getattr(module, kind).items() if other is hook]:
            getattr(module, f"{kind}_with_kwargs").pop(number, None)
            getattr(module, kind).pop(number, None)


def frozen(model: nn.Module) -> AbstractContextManager[None]:
    """The model in eval mode and without gradients inside the `with`; every flag is as it was afterwards."""
    flags: list[Any] = [(module, "training", False) for module in model.modules()]
    return _changed(model, flags=flags + [(p, "requires_grad", False) for p in model.parameters()])


def capture(
    model: nn.Module, modules: str | Sequence[str], *,
    where: Literal["input", "output"] = "output", position: int | slice | None = None, stop: bool = False,
) -> AbstractContextManager[dict[str, list[Tensor]]]:  # fmt: skip
    """Record what goes into or comes out of modules during every forward pass inside the `with`.

    The vector that RRS moves is `capture(model, location.head_path, where="input", position=-1, stop=True)`: what
    `lm_head` multiplies at the last token, with the logits never computed.

    Args:
        modules: dotted path(s) in `model`.
        where: the first tensor argument (`"input"`; before other hooks change it), or the first tensor put out.
        position: keep `tensor[:, position]` only; `None` keeps all positions.
        stop: end the `with` once all `modules` are recorded, so the pass must be its last statement.

    `as` gives `{path: [one tensor per forward pass]}`, on the autograd graph. Run `backward()` inside the `with`:
    gradient checkpointing runs the hooks once more.
    """
    paths = [modules] if isinstance(modules, str) else list(modules)
    record: dict[str, list[Tensor]] = {path: [] for path in paths}
    end = _Stop()

    def keep(path: str, _module: nn.Module, args: tuple[Any, ...], value: Any) -> None:
        if where == "input":  # `value` are its keyword arguments, else its output
            value = (*args, *(value.get(name) for name in ACTIVATIONS), *value.values())
        tensor = next(_tensors(value), None)
        if tensor is None:
            raise ValueError(f"{path} carries no tensor at its {where}, but {type(value).__name__}.")
        record[path].append(tensor if position is None else tensor[:, position])
        if stop and all(record.values()):
            raise end

    register, keywords = "register_forward_hook", {}
    if where == "input":
        register, keywords = "register_forward_pre_hook", {"with_kwargs": True, "prepend": True}
    hooks = [(getattr(_module_at(model, path, "modules"), register), partial(keep, path), keywords) for path in paths]
    return _changed(model, hooks, end=end, record=record)


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors in a module's arguments or output, in order (token ids and masks are not activations)."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def steer(
    model: nn.Module, vector: Tensor | Callable[[Tensor], Tensor], *, layer: int | str | None = None,
    position: int | slice | None = None, scale: float = 1.0, location: Location | None = None,
) -> AbstractContextManager[None]:  # fmt: skip
    """Moves hidden states during every forward pass inside the `with`: steering without training.

    Args:
        vector: `[hidden]`, added to hidden states `[batch, length, hidden]`; or a function from old to new ones, e.g.
            `lambda h: h - (h @ v)[..., None] * v` to take a unit direction out.
        layer: output of a block (a number, -1 is the last) or of a module (its path); `None`: what the head multiplies.
        position: only tokens `prompt[position]`, padding not counted; `None`: all tokens, generated ones too.
        scale: factor of the vector, or of the change that the function makes.
        location: of a model that `locate` needs help with.
    """
    place = location or locate(model)
    try:
        block = _module_at(model, layer, "layer") if isinstance(layer, str) else place.layers[layer or 0]
    except IndexError:
        raise ValueError(f"layer={layer} is not a block; there are {len(place.layers)}.") from None
    if position is not None and layer is None:
        raise ValueError("position= needs layer=; the head need not see more than the last token.")
    hidden = place.head_weight.shape[1:]
    if isinstance(vector, Tensor) and not isinstance(layer, str) and vector.shape != hidden:
        raise ValueError(f"The vector {list(vector.shape)} must be [hidden] = {list(hidden)}.")
    mask: list[Any] = []  # of the pass that is running

    def note_mask(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask[:] = [kwargs.get("attention_mask")]

    def moved(h: Tensor) -> Tensor:
        new = h + (scale * (vector if isinstance(vector, Tensor) else vector(h) - h)).to(h)
        return new if position is None else torch.where(_of_prompts(h, mask[0], position), new, h)

    def move_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return moved(output) if isinstance(output, Tensor) else (moved(output[0]), *output[1:])

    hooks: list[Hook] = [(block.register_forward_hook, move_output, {})]
    if layer is None:
        hooks = [(place.head.register_forward_pre_hook, lambda _module, args: (moved(args[0]), *args[1:]), {})]
    if position is not None:
        hooks.append((place.decoder.register_forward_pre_hook, note_mask, {"with_kwargs": True}))
    return _changed(model, hooks)


def _of_prompts(h: Tensor, mask: Any, position: int | slice) -> Tensor:
    """Where hidden states `[…, batch, length, hidden]` are at a position of their prompts: `[batch, length, 1]`."""
    chosen = torch.zeros(h.shape[-3:-1], dtype=torch.bool)
    padded = isinstance(mask, Tensor) and mask.dim() == 2
    real = mask.cpu().bool() if padded else torch.ones_like(chosen)
    if real.shape == chosen.shape and chosen.shape[1] > 1:  # else the prompts are in a cache: generated tokens
        for row, tokens in zip(chosen, real, strict=True):
            row[tokens.nonzero().flatten()[position]] = True
    return chosen[..., None].to(h.device)


# ---------------------------------------------------------------------------------------------------------------------
# Replay: the frozen audio tower runs once per clip, the decoder as often as training needs

# What differs between model classes, as data.
PER_TOKEN = "per_layer_inputs"  # the decoder's argument that follows from the token ids (Gemma 3n, Gemma 4)
FIXED_INPUTS = {"VibeVoiceAsrForConditionalGeneration": {"sample": False}}  # else its audio encoder draws noise
OWN_AUDIO_LORA = ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration")
PER_TOKEN_INPUTS = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}  # and their values for text
# Generation settings that look at the prompt's token ids or length, with the values that do nothing. Padding would
# mislead them, so prompts are answered one by one, from the model's own inputs.
READS_PROMPT: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0, "min_length": 0, "bad_words_ids": None, "sequence_bias": None, "forced_bos_token_id": None,
    "stop_strings": None, "watermarking_config": None, "prompt_lookup_num_tokens": None,
}  # fmt: skip


class UnfitPrompt(ValueError):  # noqa: N818
    """A prompt that is no input of this model: its clip gives no audio token, or it has more tokens than positions."""


@dataclass(eq=False)
class Prompt:
    """One prompt as the decoder sees it: token ids, and rows that replace their embeddings where the audio is."""

    ids: Tensor  # [length], on the CPU; placeholders at the audio positions
    rows: Tensor | None = None  # [n, hidden], the projected audio; prompts share it
    start: int = 0  # position of the first row
    audio: bool = False
    make: Callable[[], dict[str, Any]] | None = field(default=None, repr=False)  # the model's own inputs
    name: str = "The prompt"  # of the example, for messages

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self) -> dict[str, Any]:
        """The model's own inputs for this prompt alone, `input_ids` `[1, length]` among them."""
        own = self.make() if self.make else {"input_ids": self.ids[None]}
        more = len(self) - own["input_ids"].shape[1]  # see `extended`
        longer = {k: F.pad(own[k], (0, more), value=v) for k, v in PER_TOKEN_INPUTS.items() if own.get(k) is not None}
        return {**own, **longer, "input_ids": self.ids[None]}

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with token ids appended: an answer that has already begun."""
        return replace(self, ids=torch.cat([self.ids, torch.tensor(tokens, dtype=self.ids.dtype)]))


class Reader:
    """Runs prompts through a model in eval mode: what the decoder sees is computed once and replayed from then on.

    `render`: `(text or None, waveform or None) -> model inputs` of one unpadded prompt, `input_ids` `[1, length]` among
    them (`rrs.data.Renderer`, or your own).
    """

    def __init__(self, model: nn.Module, location: Location, render: Callable[..., dict[str, Any]]) -> None:
        if any(p.device.type == "meta" for p in location.decoder.parameters()):
            raise ValueError("The decoder's weights are offloaded to CPU or disk; put them on devices, by device_map.")
        self.model, self.location, self.render = model, location, render
        self.max_tokens = 8192  # positions per forward pass (prompts × padded length) without gradients
        self.exact: bool | None = None  # is replay exact on this model? decided on the first prompts
        self.from_embeddings = True  # may generate() start from embeddings?
        self.share_prefix = True  # may prompts of a batch share what they begin with?
        self.scale = 1.0  # what the model multiplies the decoder's output with on its way to the head (Inkling)
        self.logit_scale = 1.0  # what it multiplies the head's output with (Granite, Cohere, Muse Spark)
        self._per_token = False  # does the decoder take PER_TOKEN?
        self._clips: dict[str, tuple[Tensor, Tensor]] = {}  # clip -> placeholder ids, projected audio [n, hidden]
        self._frames: dict[Any, tuple[Tensor, Tensor]] = {}  # text and turns -> ids before, ids after the audio
        self._composes = True  # is every prompt its clip and its frame, put together?

    @property
    def device(self) -> torch.device:
        """Where the decoder starts."""
        return next(self.location.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's activations."""
        return next(p.dtype for p in self.location.decoder.parameters() if p.is_floating_point())

    @property
    def tolerance(self) -> float:
        """Largest relative difference between replay and full forward that is rounding: 1e-4 in float32, 0.05 else."""
        return 1e-4 if self.dtype == torch.float32 else 0.05

    @property
    def positions(self) -> float:
        """How many tokens prompt and answer may have together."""
        return getattr(getattr(self.location.decoder, "config", None), "max_position_embeddings", None) or math.inf

    def check_length(self, prompts: Sequence[Prompt], more: int = 0) -> None:
        """UnfitPrompt where a prompt and `more` tokens do not fit into the model's positions: learned ones end in an
        IndexError, or on a GPU with the process; rotary ones go on where the model was never trained."""
        for p in prompts:
            if len(p) + more > (most := self.positions):
                answer = f" and max_new_tokens={more}" if more else ""
                raise UnfitPrompt(f"{p.name} has {len(p)} tokens{answer}, the model {most} positions; shorten it")

    # -- from text and audio to what the decoder sees -----------------------------------------------------------------

    @torch.no_grad()
    def read(
        self, text: str | None, clip: tuple[str, Callable[[], Any]] | None = None, turns: tuple[Any, ...] = ()
    ) -> Prompt:
        """The prompt of one user turn: `text`, an audio clip, or the clip followed by the text. UnfitPrompt where the
        clip gives no audio token, or the prompt is too long.

        Args:
            clip: `(key, load)`: equal for equal clips, and what returns the waveform (float32 `[samples]`). Each is
                encoded once: towers don't see the text, so with another text only token ids are put together.
            turns: earlier ones of the conversation; `render` gets them as a third argument, if there are any.
        """
        (key, load), frame = clip or ("", None), (text, turns)

        def make() -> dict[str, Any]:
            given = self.render(text, load and load(), *([turns] if turns else []))
            return {**given, **FIXED_INPUTS.get(type(self.model).__name__, {})}

        def composed() -> Prompt:
            (before, after), (ids, rows) = self._frames[frame], self._clips[key]
            return Prompt(torch.cat([before, ids, after]), rows, len(before), True, make)

        if self._composes and key in self._clips and frame in self._frames:
            self.check_length([known := composed()])
            return known
        given = make()
        prompt = Prompt(given["input_ids"][0].cpu(), audio=clip is not None, make=make)
        self.check_length([prompt])
        if self.exact is None or (self.exact and prompt.audio):
            self._run(prompt, self._on_device(given))
        if prompt.rows is None:
            return prompt
        end = prompt.start + len(prompt.rows)
        self._frames.setdefault(frame, (prompt.ids[: prompt.start], prompt.ids[end:]))
        self._clips.setdefault(key, (prompt.ids[prompt.start : end], prompt.rows))
        known, (_, rows) = composed(), self._clips[key]
        if torch.equal(known.ids, prompt.ids) and _difference(prompt.rows, rows) <= self.tolerance:
            return known
        self._composes = False  # the ids around the audio depend on the clip, or the projected audio on the text
        return prompt

    def _run(self, prompt: Prompt, inputs: dict[str, Any]) -> None:
        """Sets a prompt's rows by processor, tower and projector; the first text and the first clip are checked."""
        seen = self._decoder_inputs(inputs)
        self._per_token = PER_TOKEN in seen
        embeds = seen["inputs_embeds"][0]  # [length, hidden]
        off = 0.0 if len(embeds) == len(prompt) else math.inf
        if prompt.audio and not off:  # it is where the embeddings are not those of the token ids
            text = self._embed(prompt.ids[None])["inputs_embeds"][0]
            differs = (embeds != text).any(-1).cpu().nonzero().flatten()
            if not len(differs):
                raise UnfitPrompt("the clip is too short: it gives this model no audio token; remove or pad it")
            prompt.start = int(differs[0])
            prompt.rows = embeds[prompt.start : int(differs[-1]) + 1].clone()
        if not (self.exact and self._clips):
            off = max(off, self._check(prompt, inputs))
        if off > self.tolerance:
            self.exact, prompt.rows = False, None
            warnings.warn(
                f"{type(self.location.decoder).__name__}, replayed from cached inputs, is off by {off:.1e}, with "
                f"{len(embeds)} positions for {len(prompt)} token ids; the full model runs instead, which is slower.",
                stacklevel=4,
            )

    def _on_device(self, value: Any) -> Any:
        """Inputs on the model's device, numbers in its dtype."""
        if isinstance(value, Mapping):  # also within inputs: first-generation Qwen-Audio's audio_info
            return {k: self._on_device(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _check(self, prompt: Prompt, inputs: dict[str, Any]) -> float:
        """How far a prompt's replay, shared and padded, is from the full model; decides what may be done on it."""
        path = self.location.head_path
        few = {"logits_to_keep": 1} if _takes(self.model.forward, "logits_to_keep") else {}
        with self.own_lora(prompt.audio), capture(self.model, path, where="input") as record:
            logits = self.model(**inputs, **few).logits[0, -1]
        true = record[path][0][0, -1]
        ours = self.logits(true[None])[0]
        self.logit_scale *= self._factor(ours, logits)[0]  # a soft cap leaves small logits as they are
        more = int(min(3, self.positions - len(prompt)))
        pair = [prompt.extended([int(prompt.ids[-1])] * more), prompt]
        factor, off = self._factor(self._pass(pair)[1, 0], true)
        self.scale *= factor
        if off > self.tolerance:
            return off
        self.exact = True
        # generate() must accept embeddings, go on from them (with PER_TOKEN it does not), and end at the same vector
        # if they are padded on the left. Granite Speech switches its own LoRA by the presence of input_features.
        self.from_embeddings = (
            self.from_embeddings
            and not (self._per_token or type(self.model).__name__ in OWN_AUDIO_LORA)
            and _takes(getattr(self.model, "prepare_inputs_for_generation", None), "inputs_embeds")
            and _difference(self._head_input(self.collate(pair))[1, -1], true) <= self.tolerance
        )
        return off

    def _factor(self, ours: Tensor, true: Tensor) -> tuple[float, float]:
        """What `ours` `[n]` must be multiplied with to be `true`, and how far off it is then; 1 where nothing helps."""
        ours, true = ours.float(), true.float()
        off = _difference(ours, true)
        if self.tolerance < off < math.inf:
            factor = float(true @ ours / (ours @ ours))
            if (scaled := _difference(factor * ours, true)) <= self.tolerance:
                return factor, scaled
        return 1.0, off

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the decoder works on, `inputs_embeds` `[batch, length, hidden]` and PER_TOKEN; the pass ends there."""
        seen: dict[str, Tensor] = {}
        block, end = self.location.layers[0], _Stop()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if module is block:  # given token ids, the decoder merges the audio inside, as Phi-4's
                kwargs = {"inputs_embeds": next(_tensors((*args, kwargs)))}
            seen.update({k: kwargs[k] for k in ("inputs_embeds", PER_TOKEN) if kwargs.get(k) is not None})
            if "inputs_embeds" in seen:
                raise end

        starts = (self.location.decoder, block)
        hooks = [(module.register_forward_pre_hook, note, {"with_kwargs": True}) for module in starts]
        with _changed(self.model, hooks, end=end):
            self.model(**inputs)
        if "inputs_embeds" not in seen:
            raise ValueError(f"{self.location.decoder_path} never ran; pass decoder='path' of the one that does.")
        return seen

    def _head_input(self, inputs: Mapping[str, Any]) -> Tensor:
        """`[batch, length, hidden]`: what the head multiplies when the whole model runs."""
        path = self.location.head_path
        # In no variable of this frame, which `_Stop`'s traceback keeps: after a Ctrl-C it has to end with the call.
        with capture(self.model, path, where="input", stop=True) as record:
            self.model(**inputs)
        return record[path][0]

    def own_lora(self, audio: bool) -> AbstractContextManager[None]:
        """Granite Speech comes with a LoRA for audio: on for prompts with audio, off for text, and then as it was."""
        has, switch = type(self.model).__name__ in OWN_AUDIO_LORA, "_disable_adapters"
        # PEFT's enable_adapters() would change requires_grad, too.
        flags = [(m, switch, not audio) for m in self.model.modules() if has and hasattr(m, switch)]
        return _changed(self.model, flags=flags)

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> dict[str, Tensor]:
        """Decoder inputs of token ids `[batch, length]`: `inputs_embeds` `[batch, length, hidden]` and PER_TOKEN."""
        embedding: Any = _ask(self.model, "get_input_embeddings")
        if embedding is None or self._per_token:
            return self._decoder_inputs({"input_ids": ids.to(self.device)})
        return {"inputs_embeds": embedding(ids.clamp(max=len(embedding.weight) - 1).to(self.device))}

    @torch.no_grad()
    def collate(self, prompts: Sequence[Prompt], skip: int = 0, side: str = "left") -> dict[str, Tensor]:
        """Padded decoder inputs: `inputs_embeds` `[batch, length, hidden]`, `attention_mask` `[batch, length]`, and
        PER_TOKEN `[batch, length, …]` where the decoder takes them. `skip` leading positions are left out. The padding
        goes to `side`; generation needs it on the left."""
        ids, mask = _padded([prompt.ids[skip:] for prompt in prompts], side)
        inputs, starts, mask = self._embed(ids), mask.argmax(1).tolist(), mask.to(self.device)
        embeds = inputs["inputs_embeds"] * mask.unsqueeze(-1)
        for row, prompt, start in zip(embeds, prompts, starts, strict=True):
            if prompt.rows is not None:
                at = start + prompt.start - skip
                row[at : at + len(prompt.rows)] = prompt.rows.to(embeds)
        return {**inputs, "inputs_embeds": embeds, "attention_mask": mask}

    # -- from what the decoder sees to vectors ------------------------------------------------------------------------

    def _pass(self, prompts: Sequence[Prompt], last: int = 1, layers: bool = False) -> Tensor:
        """`last_hidden` in one forward pass: replay of prompts all with audio or all without, or the full model of one.

        Padding goes to the right: attention is causal, so no real position sees it, and no mask is needed. What all
        prompts begin with runs once, gradients included: on short questions more than half of all positions.
        """
        decoder, scale = self.location.decoder, 1.0
        paths = [f"{self.location.layers_path}.{i}" for i in range(len(self.location.layers)) if layers]
        # What model.gradient_checkpointing_enable() has set is looked at in training mode only. The children of these
        # modules, such as dropouts, stay in eval.
        enabled = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
        recomputed = [(m, "training", True) for m in enabled if torch.is_grad_enabled()]
        with (
            self.own_lora(prompts[0].audio),
            _changed(self.model, flags=recomputed),
            capture(self.model, paths[:1], where="input") as first,
            capture(self.model, paths) as blocks,
        ):
            if self.exact is False:
                out = self._head_input(self._on_device(prompts[0].inputs()))
                lengths = [out.shape[1]]
            else:
                hooked = bool(decoder._forward_pre_hooks)  # such as that of `steer`; they see whole prompts and a mask
                whole = hooked or recomputed or not self.share_prefix  # what is recomputed has no cache
                shared, cache = (0, {}) if whole else self._shared(prompts, last)
                inputs = self.collate(prompts, shared, side="right")
                if not hooked:
                    del inputs["attention_mask"]
                out, scale = decoder(**inputs, **cache, use_cache=bool(cache))[0], self.scale
                lengths = [len(prompt) - shared for prompt in prompts]
        if not layers:
            return _ends(out, lengths, last) * scale
        states = [first[paths[0]][-1], *(blocks[path][-1] for path in paths)]
        if states[1].dim() != 3:  # Gemma 3n
            raise ValueError("The blocks give several streams, not [batch, length, hidden]; use layers=False.")
        return torch.stack([_ends(h, lengths, last) for h in states], 2)

    def _shared(self, prompts: Sequence[Prompt], last: int) -> tuple[int, dict[str, Any]]:
        """How many leading token ids all prompts share, `last` positions of each left out, and the decoder's argument
        that has their keys and values. Where that can't be had, nothing is shared from then on."""
        longest = min(min(len(p) - last, p.start if p.rows is not None else len(p)) for p in prompts)
        ids = torch.stack([p.ids[: max(0, longest)] for p in prompts])
        length = int((ids == ids[0]).all(0).cumprod(0).sum())
        if not length or len(prompts) == 1:
            return 0, {}
        decoder = self.location.decoder
        name = "cache" if _takes(decoder.forward, "cache") else "past_key_values"  # renamed in transformers 5.24
        cache = getattr(decoder(**self._embed(ids[:1, :length]), use_cache=True), name, None)
        # Not repeatable: tuples of keys and values (remote code), states of convolutions or state-space layers.
        if not isinstance(cache, Cache) or any(hasattr(layer, "conv_states") for layer in cache.layers):
            self.share_prefix = False
            return 0, {}
        cache.batch_repeat_interleave(len(prompts))
        return length, {name: cache}

    def last_hidden(self, prompts: Sequence[Prompt], last: int = 1, layers: bool = False) -> Tensor:
        """What the head multiplies at the last `last` positions of each prompt, `[batch, last, hidden]`.

        One forward pass; gradients reach an attached `LoRA`. A prompt with fewer positions repeats its first one.
        `layers`: what goes into the first block, then what each block gives, `[batch, last, blocks + 1, hidden]`.
        """
        self.check_length(prompts)
        # Apart with audio and without: Granite Speech's own LoRA is on for the one and off for the other.
        parts = [[i for i, p in enumerate(prompts) if p.audio is audio] for audio in (False, True)]
        if self.exact is False:
            parts = [[i] for i in range(len(prompts))]
        rows = torch.cat([self._pass([prompts[i] for i in part], last, layers) for part in parts if part])
        order = torch.tensor([i for part in parts for i in part])
        return rows if torch.equal(order, order.sort().values) else rows[order.argsort()]

    def batches(self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None) -> list[list[int]]:
        """Indices of prompts that go together: with audio or without, sorted by length, as many as `max_tokens` padded
        positions allow; one by one where answers with these `settings` need it."""
        most = 0 if settings and self._one_by_one(settings) else self.max_tokens
        out: list[list[int]] = []
        for i in sorted(range(len(prompts)), key=lambda i: (prompts[i].audio, len(prompts[i]))):
            alike = out and prompts[i].audio == prompts[out[-1][-1]].audio
            if alike and (len(out[-1]) + 1) * len(prompts[i]) <= most:
                out[-1].append(i)
            else:
                out.append([i])
        return out

    @torch.no_grad()
    def represent(
        self, prompts: Sequence[Prompt], progress: Callable[[int], object] = lambda _: None,
        last: int | None = None, layers: bool = False,
    ) -> Tensor:  # fmt: skip
        """`h(x)` of any number of prompts, float32 `[n, hidden]` on the CPU, batched by length, without gradients.

        `last` and `layers` are as in `last_hidden`, and each has an axis if it is given. `progress` is called with the
        number of prompts of each batch. Several ranks share the batches of a single process; all get all rows.
        """
        shape = [len(self.location.layers) + 1] if layers else []
        out = torch.zeros(len(prompts), last or 1, *shape, self.location.head_weight.shape[1])
        for number, batch in enumerate(self.batches(prompts)):
            if number % world() == rank():
                out[batch] = self.last_hidden([prompts[i] for i in batch], last or 1, layers).float().cpu()
            progress(len(batch))
        all_reduce_sum([out])
        return out if last else out[:, 0]

    # -- logits and answers -------------------------------------------------------------------------------------------

    def logits(self, h: Tensor, *, vanilla: bool = False) -> Tensor:
        """The model's logits `[n, vocab]`, float32, of vectors `[n, hidden]`; all but a soft cap. `vanilla`: past all
        hooks on the head, such as steering ones."""
        head = self.location.head.forward if vanilla else self.location.head
        return head(h.to(self.device, self.dtype)).float() * self.logit_scale

    def _one_by_one(self, settings: GenerationConfig) -> bool:
        """Whether answers are the model's own only from its own inputs, a prompt at a time."""
        reads = any(getattr(settings, name, None) not in (None, neutral) for name, neutral in READS_PROMPT.items())
        return reads or not (self.exact and self.from_embeddings)

    def generation_inputs(self, prompts: Sequence[Prompt], settings: GenerationConfig) -> dict[str, Any]:
        """What `model.generate` starts from, so that answers are the model's own; for one of `batches(…, settings)`. If
        `input_ids` are among them, generate() returns the prompts' ids in front of the new ones, else these alone."""
        if self._one_by_one(settings):
            (prompt,) = prompts
            return dict(self._on_device(prompt.inputs()))
        inputs: dict[str, Any] = self.collate(prompts)
        if settings.repetition_penalty not in (None, 1.0):
            # It looks at which ids there are; padding with one of the prompt's own changes nothing.
            inputs["input_ids"] = _padded([prompt.ids for prompt in prompts], "left")[0].to(self.device)
        return inputs


def _takes(function: Any, argument: str) -> bool:
    return function is not None and argument in inspect.signature(function).parameters


def _padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Token ids `[batch, length]`, padded with each row's own first one, and their mask."""
    ids = pad_sequence(list(rows), batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    first = torch.stack([row[:1] for row in rows])
    return torch.where(mask.bool(), ids, first), mask


def _ends(h: Tensor, lengths: Sequence[int], last: int) -> Tensor:
    """`h` `[batch, length, …]` at each row's last positions, `[batch, last, …]`; a shorter row repeats its first."""
    ends = (torch.tensor(lengths)[:, None] + torch.arange(-last, 0)).clamp(min=0)
    # Indices on its device: from the CPU backward would copy them once more.
    return h[torch.arange(len(h), device=h.device)[:, None], ends.to(h.device)]


def _difference(a: Tensor, b: Tensor) -> float:
    """`|a − b|_max / |b|_max`; infinite for other shapes."""
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max()) if a.shape == b.shape else math.inf


# ---------------------------------------------------------------------------------------------------------------------
# LoRA

ANOTHER_LORA = (
    "Another RRS has its adapter on this model, and the two would add up. Call its disable() first, or, if that object "
    "is gone: for lora in rrs.hooks.attached(model): lora.detach()"
)


def attached(model: nn.Module) -> list[LoRA]:
    """The LoRAs that are on a model, or on one of its linears."""
    owners = (_lora_of(hook) for module in model.modules() for hook in module._forward_hooks.values())
    return list(dict.fromkeys(owner for owner in owners if isinstance(owner, LoRA)))


def _lora_of(hook: Any) -> Any:
    return getattr(getattr(hook, "func", None), "__self__", None)  # it is partial(lora._add, i)


class LoRA(nn.Module):
    """Low-rank updates `W + (α/r)·B·A` on named linears of a model, added by forward hooks.

    The model's own modules, names and flags stay as they are. A and B are float32, as the penalty needs it, and
    cast to the activations' dtype for the matmul.

    Args:
        paths: exact dotted paths of linears in `model`.
        r, alpha, dropout: as in LoRA (Hu et al. 2021); the update is scaled by `alpha / r`.
        seed: of A's initialisation (Kaiming uniform, as in PEFT); B starts at zero, so training starts at vanilla.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], *, r: int, alpha: float, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.paths, self.r, self.scale, self.dropout = list(paths), r, alpha / r, dropout
        self.key: tuple[int, ...] | None = None  # of dropout's masks; set it before each forward pass in training
        self._check_finite({})
        self._linears: list[Any] = [model.get_submodule(path) for path in self.paths]
        self.A, self.B, generator = nn.ParameterList(), nn.ParameterList(), torch.Generator().manual_seed(seed)
        for linear in self._linears:
            bound, device = 1 / math.sqrt(linear.in_features), linear.weight.device  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(r, linear.in_features, generator=generator) * 2 - 1) * bound
            self.A.append(nn.Parameter(a.to(device)))
            self.B.append(nn.Parameter(torch.zeros(linear.out_features, r, device=device)))

    def _add(self, i: int, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The hook of linear i: its output and the update."""
        x, a, b = args[0], self.A[i], self.B[i]
        if self.training and self.dropout:
            if self.key is None:
                raise RuntimeError("Set lora.key, e.g. to (step,), before each forward pass in training, for dropout.")
            generator = seeded(*self.key, i, *x.shape, device=x.device)
            keep = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
            x = x * keep.div_(1 - self.dropout)
        # The scale goes into B, which is small: a pass over the activations less, and one less in backward.
        update = F.linear(F.linear(x, a.to(x)), (self.scale * b).to(x))  # the model may have moved since
        return output + update.to(output.dtype)

    def attach(self) -> LoRA:
        """Adds the update to every forward pass. A ValueError if another LoRA is on a linear: both would act."""
        self.detach()
        if any(attached(linear) for linear in self._linears):
            raise ValueError(ANOTHER_LORA)
        for i, linear in enumerate(self._linears):
            linear.register_forward_hook(partial(self._add, i))
        return self

    def detach(self) -> LoRA:
        """Takes the update off again: the model is vanilla, bit for bit. `attach()` puts it back."""
        for linear in self._linears:
            for hook in [hook for hook in linear._forward_hooks.values() if _lora_of(hook) is self]:
                _take_off(linear, hook)
        return self

    @property
    def attached(self) -> bool:
        """Whether the model currently runs with the update."""
        return any(self in attached(linear) for linear in self._linears)

    def penalty(self) -> Tensor:
        """`Σ_modules ‖(α/r)·B·A‖_F²`, the loss's second term, by r×r Gram matrices: `‖BA‖_F² = Σ (BᵀB) ∘ (AAᵀ)`."""
        squares = [((a @ a.T) * (b.T @ b)).sum() for a, b in zip(self.A, self.B, strict=True)]
        return self.scale**2 * torch.stack([s.to(squares[0].device) for s in squares]).sum()  # maybe of several devices

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the model's weights, and is zero and detached. It can't be undone; keep a saved copy."""
        self._check_finite(self.tensors())
        # Where a PEFT layer stands (Granite Speech's own LoRA), the weight is that of the linear inside it.
        weights = [getattr(linear, "base_layer", linear).weight for linear in self._linears]
        for path, weight in zip(self.paths, weights, strict=True):  # codes: integers, 4-bit blocks, unscaled float8
            if not weight.is_floating_point() or weight.dim() != 2 or weight.element_size() < 2:
                raise ValueError(f"{path} is quantised; load the model unquantised to merge.")
        for weight, a, b in zip(weights, self.A, self.B, strict=True):
            weight += (self.scale * (b @ a)).to(weight.dtype)
            b.zero_()  # it is in the weights: after an error (memory, Ctrl-C) another merge() does the rest
        self.detach()

    def _by_name(self) -> dict[str, nn.Parameter]:
        names = [f"base_model.model.{path}.lora_{k}.weight" for path in self.paths for k in "AB"]
        return dict(zip(names, [p for pair in zip(self.A, self.B, strict=True) for p in pair], strict=True))

    def tensors(self) -> dict[str, Tensor]:
        """Weights by PEFT's names, `base_model.model.{path}.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]`."""
        return {name: p.detach().cpu().contiguous() for name, p in self._by_name().items()}

    @torch.no_grad()
    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Fills in weights under PEFT's names; every one must be there, finite, with its shape, and nothing else."""
        own = self._by_name()
        has, needs = ({name: tuple(t.shape) for name, t in each.items()} for each in (named, own))
        if other := sorted({name for name, _ in has.items() ^ needs.items()}):
            first = f"{other[0]} has shape {has.get(other[0])}, needed is {needs.get(other[0])}"
            raise ValueError(f"The adapter was made for another base: {first}; {len(other)} weights differ.")
        self._check_finite(named)
        for name, p in own.items():
            p.copy_(named[name])

    def _check_finite(self, named: Mapping[str, Tensor]) -> None:
        if bad := [name for name, value in named.items() if not value.isfinite().all()]:
            raise ValueError(f"The adapter holds NaN or infinite numbers, in {bad[0]} and {len(bad) - 1} more.")
        if not math.isfinite(self.scale):
            raise ValueError(f"The adapter's scale, alpha / r, is {self.scale}; it must be finite.")


def seeded(*key: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose numbers depend on `key` alone."""
    seed = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(seed, "big") >> 1)


# Names under which some decoders hold the same projections: fused (Phi-4), or factored (multi-head latent attention).
SAME_AS = {
    "q_proj": ("qkv_proj", "q_a_proj", "q_b_proj"),
    "k_proj": ("qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "v_proj": ("qkv_proj", "kv_a_proj_with_mqa", "kv_b_proj"),
    "gate_proj": ("gate_up_proj",),
    "up_proj": ("gate_up_proj",),
}
MLP = ("gate_proj", "up_proj", "down_proj")


def linear_paths(location: Location, names: Sequence[str], layers: tuple[float, float] = (0.0, 1.0)) -> list[str]:
    """Paths of the linears below the decoder's blocks whose last path component is one of `names`, exactly.

    `layers`: only blocks whose middle lies within these shares of the depth. A name without a match stands for those in
    `SAME_AS`. If that matches nothing it is a ValueError, but for an MLP's names where experts have 3-D parameters.
    """
    carried = ("in_features", "out_features", "weight")  # by nn.Linear, its subclasses and quantised stand-ins
    modules = [path for path, m in location.layers.named_modules() if all(hasattr(m, name) for name in carried)]
    linears = {path: path.rpartition(".")[2] for path in modules}
    present, experts = sorted(set(linears.values())), expert_parameters(location)
    why = " Matrices of experts are 3-D parameters, which get no LoRA." if experts else ""
    known = {n: [n] if n in present else [s for s in SAME_AS.get(n, ()) if s in present] for n in names}
    wanted = {n for found in known.values() for n in found}
    if unmatched := [n for n, found in known.items() if not found and not (wanted and n in MLP and experts)]:
        said = f"target_modules {unmatched} match no linear below {location.layers_path}; name some of"
        raise ValueError(f"{said} {present}.{why}")
    depth, (low, high) = len(location.layers), layers
    inside = {str(i) for i in range(depth) if low <= (i + 0.5) / depth <= high}
    chosen = [path for path, name in linears.items() if name in wanted and path.partition(".")[0] in inside]
    if not chosen:
        raise ValueError(f"layers={layers} hold none of the {depth} blocks with {sorted(wanted)}; widen it.")
    return [f"{location.layers_path}.{path}" for path in chosen]


def expert_parameters(location: Location) -> list[str]:
    """Paths of 3-D MLP weights `[experts, …]` below the decoder's blocks, which no LoRA is added to."""
    cubes = [path for path, p in location.layers.named_parameters() if p.dim() == 3]
    names = (*MLP, "gate_up_proj")
    return [f"{location.layers_path}.{path}" for path in cubes if path.rpartition(".")[2] in names]


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes: torchrun starts the same script N times. Each rank does a share of the work and all of them get
# all of its results, so that nothing but the time differs from a single process. Alone, all this does nothing.

T = TypeVar("T")


def best_device() -> torch.device:
    """The accelerator of this machine (CUDA, MPS, XPU, …), or the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """Of a model's weights: bfloat16, but float32 on the CPU and MPS, which are slow in bfloat16."""
    return torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16


def has_fused_adamw(device: torch.device) -> bool:
    """Whether PyTorch has AdamW as one kernel there; elsewhere it raises an error when asked for that."""
    return device.type in ("cpu", "cuda", "mps", "xpu")


def connect() -> None:
    """Joins the processes that torchrun started, if it did, and takes this rank's device."""
    if dist.is_available() and dist.is_torchelastic_launched() and not dist.is_initialized():
        device, backend = best_device().type, "gloo"
        if device != "cpu":
            torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]) % torch.accelerator.device_count())
            backend = f"cpu:gloo,{device}:{dist.Backend.default_device_backend_map[device]}"
        dist.init_process_group(backend)
        # before the interpreter goes: the group's threads could abort a process that is done
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    if world() > 1 and "cpu" not in dist.get_backend_config():
        raise ValueError('The process group has no CPU backend; call dist.init_process_group("cpu:gloo,…") with it.')


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this process is; rank 0 prints and writes."""
    return dist.get_rank() if world() > 1 else 0


def all_reduce_sum(tensors: Sequence[Tensor]) -> None:
    """Sums tensors over the ranks, in place, in one go: the same bits on every rank."""
    if world() > 1:
        flat = torch.cat([t.flatten().to(tensors[0].device) for t in tensors])
        dist.all_reduce(flat)
        for t, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            t.copy_(total.view_as(t))


def all_gather(own: dict[Any, T]) -> dict[Any, T]:
    """What all ranks have, in one dict."""
    parts: list[Any] = [own] * world()
    if world() > 1:
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def on_rank0(compute: Callable[[], T]) -> T:
    """What `compute()` gives on rank 0, on all of them; an error there is an error everywhere. For files."""
    done: dict[int, tuple[Any, Exception | None]] = {}
    if rank() == 0:
        try:
            done[0] = compute(), None
        except Exception as error:  # raised below, on every rank
            done[0] = None, error
    value, failed = (all_gather(done) | done)[0]  # on rank 0 its own error, with its traceback
    if failed is not None:
        raise failed
    return cast(T, value)
