"""Everything that attaches to a model: find its parts, capture and steer vectors, replay the decoder, add a LoRA.

Nothing here edits a module. Hooks are put on inside context managers (or by `LoRA.attach`) and come off again, which
leaves the model bit-identical to before.
"""

from __future__ import annotations

import atexit
import hashlib
import inspect
import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from transformers import Cache, GenerationConfig
from transformers.utils.versions import require_version

# ---------------------------------------------------------------------------------------------------------------------
# Where things are

# Attribute names that transformers' decoders use. Only an exact match on a direct child counts; anything else is an
# error that lists what was seen, because a wrong layer trains without complaint and protects nothing.
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm")

# Classes that can't be served, each with the reason and what to do instead.
REFUSED = {
    "KyutaiSpeechToTextForConditionalGeneration": "its audio codes are part of input_ids and it takes no instruction",
    "VoxtralRealtimeForConditionalGeneration": "it adds audio at every position and reads no text alone; use Voxtral",
    "Qwen2_5OmniForConditionalGeneration": "the composite has no forward; pass its .thinker, or use from_pretrained",
    "Qwen3OmniMoeForConditionalGeneration": "the composite has no forward; pass its .thinker, or use from_pretrained",
}
# Classes that wrap a model, and what to pass instead.
WRAPPERS = {
    "PeftModel": "model.merge_and_unload(), which keeps its adapter, or model.unload(), which drops it",
    "PeftMixedModel": "model.merge_and_unload(), which keeps its adapters, or model.unload(), which drops them",
    "OptimizedModule": "model._orig_mod",
    "DistributedDataParallel": "model.module",
    "DataParallel": "model.module",
    "FullyShardedDataParallel": "a model that is loaded whole",
}
# The release of transformers before which a class can't be served; FIXED_INPUTS says what it could not be told.
NEEDS = {"VibeVoiceAsrForConditionalGeneration": "5.23"}


@dataclass(frozen=True)
class Location:
    """The parts of a LALM that RRS needs, each with its dotted path in the model.

    Attributes:
        decoder: the LLM without its head: embeddings in, final-norm output `[batch, length, hidden]` out.
        layers: the decoder's blocks; LoRA touches linears below here and nothing else.
        norm: the decoder's final norm.
        head: the output embedding (`lm_head`).
    """

    decoder: nn.Module
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    decoder_path: str
    layers_path: str
    norm_path: str
    head_path: str

    @property
    def head_weight(self) -> Tensor:
        """The head's matrix `[vocab, hidden]`; row i is the direction of token i."""
        return weight_of(self.head)


def locate(
    model: nn.Module, *, decoder: str | None = None, norm: str | None = None, head: str | None = None
) -> Location:
    """Find decoder, blocks, final norm and head of a Hugging Face (multimodal) language model.

    A path given by hand always wins. Otherwise the model's own accessors are asked (`get_decoder`,
    `get_output_embeddings`), and each answer is checked.

    Args:
        model: any loaded model, e.g. `Qwen2AudioForConditionalGeneration`.
        decoder, norm, head: dotted paths, as in `model.named_modules()`.

    Raises:
        ValueError: a part is missing or ambiguous (the message lists the candidates and the argument that decides), or
            the model is wrapped, e.g. by PEFT (the message says how to unwrap it).
        ImportError: the class needs a newer transformers.
    """
    name = type(model).__name__
    if wrapper := next((kind.__name__ for kind in type(model).__mro__ if kind.__name__ in WRAPPERS), None):
        raise ValueError(f"The model is wrapped in a {wrapper}; pass {WRAPPERS[wrapper]}.")
    if name in REFUSED:
        raise ValueError(f"{name} is not supported: {REFUSED[name]}.")
    if name in NEEDS:
        require_version(f"transformers>={NEEDS[name]}", f"RRS can't make {name} repeatable before.")
    paths = {id(module): path for path, module in model.named_modules()}  # first name wins, as in state_dict

    def given(argument: str, path: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            same = [p for p in paths.values() if p.rpartition(".")[2] == path.rpartition(".")[2]]
            near = same or [p for p in paths.values() if p and p.count(".") < 2]
            raise ValueError(f"{argument}={path!r} is not a module of {name}; close: {near}") from None

    # Head: the matrix whose rows are the tokens' directions.
    head_module = given("head", head) if head else _ask(model, "get_output_embeddings")
    named = [p for p in paths.values() if p.rpartition(".")[2] == "lm_head"]
    if head_module is None and len(named) == 1:  # e.g. Nemotron-H-Omni: the head sits on the inner causal LM
        head_module = model.get_submodule(named[0])
    if not isinstance(getattr(head_module, "weight", None), Tensor) or id(head_module) not in paths:
        raise ValueError(
            f"{name} names no output embedding with a weight matrix; modules called lm_head: {named}. "
            "Load the class with a language-model head, or pass head='path.to.head'."
        )

    # Decoder: what feeds the head.
    decoder_module = given("decoder", decoder) if decoder else _ask(model, "get_decoder")
    while decoder is None and decoder_module is not None and any(m is head_module for m in decoder_module.modules()):
        inner = _ask(decoder_module, "get_decoder")  # a causal LM: step inside, the head is not part of the decoder
        decoder_module = None if inner is decoder_module else inner
    if decoder_module is None or id(decoder_module) not in paths:
        owners = [p for p, m in model.named_modules() if _children(m, LAYER_LISTS, nn.ModuleList)]
        raise ValueError(
            f"{name} does not tell where its decoder is. Modules that own a list of blocks: {owners}. "
            "Pass decoder='path' for the one that feeds the head."
        )

    def only_child(names: Sequence[str], kind: type, what: str, then: str) -> Any:
        found = _children(decoder_module, names, kind)
        if len(found) != 1:
            raise ValueError(
                f"{what} of {paths[id(decoder_module)]!r} ({type(decoder_module).__name__}): expected exactly one of "
                f"{list(names)}, found {list(found)} among {[n for n, _ in decoder_module.named_children()]}. {then}"
            )
        return next(iter(found.values()))

    layers = only_child(
        LAYER_LISTS, nn.ModuleList, "The list of blocks", "Pass decoder='path' for the module that owns them."
    )
    norm_module = given("norm", norm) if norm else only_child(FINAL_NORMS, nn.Module, "The norm", "Pass norm='path'.")
    parts: list[Any] = [decoder_module, layers, norm_module, head_module]
    return Location(*parts, *(paths[id(part)] for part in parts))


def _ask(model: nn.Module, accessor: str) -> nn.Module | None:
    method = getattr(model, accessor, None)
    return method() if callable(method) else None


def _children(module: nn.Module, names: Sequence[str], kind: type) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if name in names and isinstance(child, kind)}


# ---------------------------------------------------------------------------------------------------------------------
# What is changed for a while: hooks to capture and to steer, flags that freeze

ACTIVATIONS = ("inputs_embeds", "hidden_states", "input")  # keyword names of a module's main argument, asked first

_CHANGES: WeakKeyDictionary[nn.Module, list[_Changes]] = WeakKeyDictionary()  # that are on a model now
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


@dataclass(eq=False)
class _Changes:
    """What one `with` has changed on a model."""

    by_position: bool  # does it depend on tokens' places? then passes must show whole prompts and their mask
    undo: list[Callable[[], object]] = field(default_factory=list)  # each may be called twice
    over: bool = False


@contextmanager
def _changes(model: nn.Module, by_position: bool = False) -> Iterator[_Changes]:
    """Changes on a model, undone at the end of the `with`; where Ctrl-C cuts that short, the next use does it."""
    here, changes = _CHANGES.setdefault(model, []), _Changes(by_position)
    for left in [other for other in here if other.over]:
        for undo in reversed(left.undo):
            undo()
        here.remove(left)
        warnings.warn("An interrupt had left hooks or flags of RRS on the model; taken back now.", stacklevel=5)
    try:
        here.append(changes)
        yield changes
    finally:
        changes.over = True  # first, and no call: nothing can come in between
        for undo in reversed(changes.undo):
            undo()
        here[:] = [other for other in here if other is not changes]


def lock(model: nn.Module) -> threading.RLock:
    """The model's lock, to be used as `with lock(model):`; the thread that has it may take it again."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model in eval mode and without gradients inside the `with`; every flag is as it was afterwards."""
    with _changes(model) as changes:
        changes.undo += [partial(setattr, module, "training", module.training) for module in model.modules()]
        changes.undo += [partial(p.requires_grad_, p.requires_grad) for p in model.parameters()]
        model.eval().requires_grad_(False)
        yield


class EmptyClip(ValueError):  # noqa: N818
    """A clip that gives the model no audio token."""


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass early; caught by the `with` that raised it and by nothing else."""


@contextmanager
def capture(
    model: nn.Module,
    modules: str | Sequence[str],
    *,
    where: Literal["input", "output"] = "output",
    position: int | slice | None = None,
    stop: bool = False,
    first: bool = False,
) -> Iterator[dict[str, list[Tensor]]]:
    """Record what goes into or comes out of modules during every forward pass inside the `with`.

    The vector that RRS moves is `capture(model, location.head_path, where="input", position=-1, stop=True)`: what
    `lm_head` multiplies at the last token, with the logits never computed.

    Args:
        modules: dotted path(s) in `model`.
        where: `"input"` records the first tensor argument, `"output"` the output (its first tensor, if it is a tuple).
        position: keep `tensor[:, position]` only; `None` keeps all positions.
        stop: end the pass once every module in `modules` has been recorded. The statement that runs the model is the
            last one of the `with` body that is executed.
        first: record before the hooks that are there already, e.g. those of `steer`, change anything.

    Yields:
        `{path: [one tensor per forward pass]}`, still attached to the autograd graph. Run `backward()` inside the
        `with`: with gradient checkpointing the recomputation needs the hooks, and a hook removed too early gives
        wrong gradients without an error.

    Raises:
        ValueError: a path that does not exist, or a module that carries no tensor there.
    """
    paths = [modules] if isinstance(modules, str) else list(modules)
    known = dict(model.named_modules(remove_duplicate=False))
    if missing := [path for path in paths if path not in known]:
        raise ValueError(f"No module {missing} in {type(model).__name__}; see model.named_modules().")
    record: dict[str, list[Tensor]] = {path: [] for path in paths}
    pending, end = set(paths), _Stop()

    def keep(path: str, value: Any) -> None:
        tensor = next(_tensors(value), None)
        if tensor is None:
            raise ValueError(f"{path} carries no tensor at its {where}, but {type(value).__name__}.")
        record[path].append(tensor if position is None else tensor[:, position])
        pending.discard(path)
        if stop and not pending:
            raise end

    def keep_input(path: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(path, (*args, *(kwargs.get(name) for name in ACTIVATIONS), *kwargs.values()))

    def keep_output(path: str, _module: nn.Module, _args: Any, output: Any) -> None:
        keep(path, output)

    try:
        with _changes(model) as changes:
            for path in paths:
                if where == "input":
                    hook: Any = partial(keep_input, path)
                    handle = known[path].register_forward_pre_hook(hook, with_kwargs=True, prepend=first)
                else:
                    handle = known[path].register_forward_hook(partial(keep_output, path), prepend=first)
                changes.undo.append(handle.remove)
            yield record
    except _Stop as error:
        if error is not end:
            raise


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors in a module's arguments or output, in order (token ids and masks are not activations)."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


@contextmanager
def steer(
    model: nn.Module,
    vector: Tensor | Callable[[Tensor], Tensor],
    *,
    layer: int | str | None = None,
    position: int | slice | None = None,
    scale: float = 1.0,
    location: Location | None = None,
) -> Iterator[None]:
    """Moves hidden states during every forward pass inside the `with`: steering without training.

    Args:
        model: the model.
        vector: `[hidden]`, added to hidden states `[batch, length, hidden]`; or a function from old to new ones, e.g.
            `lambda h: h - (h @ v)[..., None] * v` to take a unit direction out.
        layer: a decoder block by number (its output; -1 is the last), a module by its path (its output), or `None` for
            what the head multiplies.
        position: tokens of the prompt, as in `prompt[position]`, padding not counted; generated ones stay. `None` moves
            all tokens, generated ones too.
        scale: factor of the vector, or of the change that the function makes.
        location: of a model that `locate` needs help with.

    Raises:
        ValueError: no such layer; a vector of another size; a position without a layer.
    """
    where = location or locate(model)
    try:
        block = model.get_submodule(layer) if isinstance(layer, str) else where.layers[layer or 0]
    except (AttributeError, IndexError):
        message = f"layer={layer!r} is neither a block (there are {len(where.layers)}) nor a module's path."
        raise ValueError(message) from None
    if position is not None and layer is None:
        raise ValueError("position= needs layer=; the head need not see more than the last token.")
    hidden = where.head_weight.shape[1:]
    if isinstance(vector, Tensor) and not isinstance(layer, str) and vector.shape != hidden:
        raise ValueError(f"The vector {list(vector.shape)} must be [hidden] = {list(hidden)}.")
    mask: list[Any] = []  # of the pass that is running

    def note_mask(_module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        mask[:] = [kwargs.get("attention_mask")]

    def moved(h: Tensor) -> Tensor:
        new = h + (scale * (vector if isinstance(vector, Tensor) else vector(h) - h)).to(h)
        return new if position is None else torch.where(_of_prompts(h, mask[0], position), new, h)

    def move_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (moved(args[0]), *args[1:])

    def move_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return moved(output) if isinstance(output, Tensor) else (moved(output[0]), *output[1:])

    with _changes(model, by_position=position is not None) as changes:
        if position is not None:
            handle = where.decoder.register_forward_pre_hook(note_mask, with_kwargs=True)
            changes.undo.append(handle.remove)
        if layer is None:
            changes.undo.append(where.head.register_forward_pre_hook(move_input).remove)
        else:
            changes.undo.append(block.register_forward_hook(move_output).remove)
        yield


def _of_prompts(h: Tensor, mask: Any, position: int | slice) -> Tensor:
    """Where hidden states `[…, batch, length, hidden]` are at a position of their prompts: `[batch, length, 1]`."""
    batch, length = h.shape[-3:-1]
    chosen = torch.zeros(batch, length, 1, dtype=torch.bool)
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = torch.ones(batch, length if length > 1 else 0)  # nothing is padded; a single token is a generated one
    if mask.shape[1] == length:  # else the prompts are in a cache, and these tokens are generated
        for row, real in zip(chosen, mask.cpu().bool(), strict=True):
            row[real.nonzero().flatten()[position]] = True
    return chosen.to(h.device)


# ---------------------------------------------------------------------------------------------------------------------
# Replay: the frozen audio tower runs once per clip, the decoder as often as training needs

# What differs between model classes, as data.
PER_TOKEN = ("per_layer_inputs",)  # decoder arguments that follow from the token ids (Gemma 3n, Gemma 4)
FIXED_INPUTS = {"VibeVoiceAsrForConditionalGeneration": {"sample": False}}  # else its audio encoder draws noise
OWN_AUDIO_LORA = ("GraniteSpeechForConditionalGeneration", "GraniteSpeechPlusForConditionalGeneration")
# generate() from embeddings is not the same as from the model's own inputs: Gemma 3n can't pass per_layer_inputs on
# after the first token, Granite Speech switches its own LoRA by the presence of input_features.
GENERATES_FROM_INPUTS = ("Gemma3nForConditionalGeneration", *OWN_AUDIO_LORA)
PER_TOKEN_INPUTS = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}  # and their values for text
# Generation settings that look at the prompt's token ids or length, with the values that do nothing. Padding would
# mislead them, so prompts are answered one by one, from the model's own inputs.
READS_PROMPT: dict[str, Any] = {
    "encoder_repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": 1.0, "min_length": 0, "bad_words_ids": None, "sequence_bias": None, "forced_bos_token_id": None,
    "stop_strings": None, "watermarking_config": None, "prompt_lookup_num_tokens": None,
}  # fmt: skip


@dataclass(eq=False)
class Prompt:
    """One prompt as the decoder sees it: token ids, and rows that replace their embeddings where the audio is.

    Attributes:
        ids: token ids `[length]`, on the CPU; placeholders at the audio positions.
        rows: decoder-input rows `[n, hidden]` that are no token embeddings: the projected audio. Prompts share them.
        start: position of the first row.
        audio: whether the prompt has audio.
        make: makes the model's own inputs, where the full model has to run; `None` if the ids are all there is.
    """

    ids: Tensor
    rows: Tensor | None = None
    start: int = 0
    audio: bool = False
    make: Callable[[], dict[str, Any]] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def inputs(self) -> dict[str, Any]:
        """The model's own inputs for this prompt alone, `input_ids` `[1, length]` among them."""
        return self.make() if self.make else {"input_ids": self.ids[None]}

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with token ids appended: an answer that has already begun."""
        more = torch.tensor(tokens, dtype=self.ids.dtype)

        def make() -> dict[str, Any]:
            own = self.inputs()
            tails = {name: torch.full_like(more, fill) for name, fill in PER_TOKEN_INPUTS.items()}
            for name, tail in {"input_ids": more, **tails}.items():
                if name in own:
                    own[name] = torch.cat([own[name], tail[None].to(own[name])], dim=1)
            return own

        return replace(self, ids=torch.cat([self.ids, more]), make=make)


class Reader:
    """Runs prompts through a model: what the decoder sees is computed once and replayed from then on.

    Args:
        model: the model, in eval mode.
        location: from `locate(model)`.
        render: `(text or None, waveform or None) -> model inputs` for one unpadded prompt, `input_ids` `[1, length]`
            among them (`rrs.data.Renderer`, or your own).
        max_tokens: positions per forward pass (prompts × padded length) where gradients are not needed.
    """

    def __init__(
        self,
        model: nn.Module,
        location: Location,
        render: Callable[..., dict[str, Any]],
        max_tokens: int = 8192,
    ) -> None:
        if offloaded := [path for path, p in location.decoder.named_parameters() if p.device.type == "meta"]:
            raise ValueError(
                f"The decoder's weights are offloaded ({offloaded[0]} and {len(offloaded) - 1} more), and training "
                "needs them in place; load the model with a device_map that puts all of it on devices."
            )
        self.model, self.location, self.render, self.max_tokens = model, location, render, max_tokens
        self.exact: bool | None = None  # is replay exact on this model? decided on the first prompts, see `check`
        self.from_embeddings = True  # may generate() start from embeddings?
        self.share_prefix = True  # may prompts of a batch share what they begin with?
        self.scale = 1.0  # what the model multiplies the decoder's output with on its way to the head
        self.logit_scale = 1.0  # what it multiplies the head's output with; see `_logit_scale`
        self._per_token = False  # does the decoder take PER_TOKEN arguments?
        self._clips: dict[str, tuple[Tensor, Tensor]] = {}  # clip -> placeholder ids, projected audio [n, hidden]
        self._frames: dict[Any, tuple[Tensor, Tensor]] = {}  # text and turns -> ids before, ids after the audio
        self._composes = True  # is every prompt its clip and its frame, put together?

    @property
    def device(self) -> torch.device:
        """Where the decoder starts."""
        return next(self.location.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's activations (and of its weights, unless they are quantised)."""
        return next(p.dtype for p in self.location.decoder.parameters() if p.is_floating_point())

    @property
    def tolerance(self) -> float:
        """Largest relative difference between replay and full forward that is rounding: 1e-4 in float32, 0.05 else."""
        return 1e-4 if self.dtype == torch.float32 else 0.05

    def _close(self, a: Tensor, b: Tensor) -> bool:
        return a.shape == b.shape and bool((a - b).abs().max() <= self.tolerance * b.abs().max())

    # -- from text and audio to what the decoder sees -----------------------------------------------------------------

    @torch.no_grad()
    def read(
        self, text: str | None, clip: tuple[str, Callable[[], Any]] | None = None, turns: tuple[Any, ...] = ()
    ) -> Prompt:
        """The prompt of one user turn: `text`, an audio clip, or the clip followed by the text.

        Args:
            text: the text of the turn; `None` for audio alone.
            clip: `(key, load)`: a key that is equal for equal clips, and a function that returns the waveform
                (float32 `[samples]` at the processor's rate). The clip is loaded and encoded once per key; with every
                further text only token ids are put together, since neither tower nor projector sees the text.
            turns: earlier ones of the conversation; `render` gets them as a third argument, if there are any.

        Raises:
            EmptyClip: the clip gives no audio token.
        """
        if clip is None:
            return self._run(text, None, turns)
        (key, load), frame = clip, (text, turns)
        if self._composes and key in self._clips and frame in self._frames and self.exact is not False:
            (before, after), (ids, rows) = self._frames[frame], self._clips[key]
            whole = torch.cat([before, ids, after])
            return Prompt(whole, rows, len(before), True, lambda: self._inputs(text, load(), turns))
        prompt = self._run(text, load, turns)
        if prompt.rows is None:
            return prompt
        end = prompt.start + len(prompt.rows)
        before, after = self._frames.setdefault(frame, (prompt.ids[: prompt.start], prompt.ids[end:]))
        ids, rows = self._clips.setdefault(key, (prompt.ids[prompt.start : end], prompt.rows.clone()))
        same_rows = self._close(rows, prompt.rows)
        if not same_rows or not torch.equal(torch.cat([before, ids, after]), prompt.ids):
            self._composes = False  # the ids around the audio depend on the clip, or the projected audio on the text
        return replace(prompt, rows=rows if same_rows else prompt.rows.clone())

    def _inputs(self, text: str | None, wave: Any, turns: tuple[Any, ...] = ()) -> dict[str, Any]:
        """The model's own inputs of one prompt, on its device and in its dtype."""
        return self._on_device(
            {**self.render(text, wave, *([turns] if turns else [])), **FIXED_INPUTS.get(type(self.model).__name__, {})}
        )

    def _on_device(self, value: Any) -> Any:
        if isinstance(value, Mapping):  # also within inputs: first-generation Qwen-Audio's audio_info
            return {k: self._on_device(v) for k, v in value.items()}
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, self.dtype if value.is_floating_point() else None)

    def _run(self, text: str | None, load: Callable[[], Any] | None, turns: tuple[Any, ...]) -> Prompt:
        """Processor, tower and projector for one prompt; the pass ends where the decoder starts."""

        def make() -> dict[str, Any]:
            return self._inputs(text, load and load(), turns)

        inputs, audio = make(), load is not None
        ids = inputs["input_ids"][0].cpu()
        prompt, begins = Prompt(ids, audio=audio, make=make), self.exact is None
        if begins:
            self.logit_scale = self._logit_scale(inputs, audio)
            if not all(_accepts(self.location.decoder, name) for name in ("inputs_embeds", "use_cache")):
                return self._fall_back(prompt, "its forward takes no inputs_embeds or use_cache")
        if self.exact is False or not (begins or audio):
            return prompt
        seen = self._decoder_inputs(inputs)
        self._per_token = any(name in seen for name in PER_TOKEN)
        embeds = seen["inputs_embeds"][0]  # [length, hidden]
        if len(embeds) != len(ids):
            return self._fall_back(prompt, f"it sees {len(embeds)} positions for {len(ids)} token ids")
        if audio:
            differs = (embeds != self._embed(ids[None])["inputs_embeds"][0]).any(-1).nonzero().flatten()
            if not len(differs):
                raise EmptyClip("the clip is too short: it gives this model no audio token; remove or pad it")
            start, end = int(differs[0]), int(differs[-1]) + 1
            prompt = replace(prompt, rows=embeds[start:end], start=start)
        if begins or not self._clips:  # the first text and the first clip are checked
            true = self._head_input(inputs, audio)[0, 0].float()
            difference = self.check(prompt, true)
            if difference > self.tolerance and self.share_prefix:  # e.g. a decoder without a key-value cache
                self.share_prefix, self.scale = False, 1.0
                difference = self.check(prompt, true)
            if difference > self.tolerance:
                return self._fall_back(replace(prompt, rows=None), f"it is off by {difference:.1e}")
            self.exact = True
            self.from_embeddings = self.from_embeddings and self._generates_from_embeddings(prompt, true)
        return prompt

    def _fall_back(self, prompt: Prompt, why: str) -> Prompt:
        self.exact = False
        warnings.warn(
            f"{type(self.location.decoder).__name__} can't be replayed from cached inputs: {why}; the full model runs "
            "for every prompt instead: correct, but slower.",
            stacklevel=5,
        )
        return prompt

    def _decoder_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the decoder works on, `inputs_embeds` `[batch, length, hidden]` and PER_TOKEN; the pass ends there."""
        seen: dict[str, Tensor] = {}
        block, end = self.location.layers[0], _Stop()

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if module is block:  # given token ids, the decoder merges the audio inside, as Phi-4's
                kwargs = {"inputs_embeds": next(_tensors((*args, kwargs)))}
            names = ("inputs_embeds", *PER_TOKEN)
            seen.update({name: kwargs[name] for name in names if kwargs.get(name) is not None})
            if "inputs_embeds" in seen:
                raise end

        try:
            with _changes(self.model) as changes:
                for module in (self.location.decoder, block):
                    changes.undo.append(module.register_forward_pre_hook(note, with_kwargs=True).remove)
                self.model(**inputs)
        except _Stop as error:
            if error is not end:
                raise
        if "inputs_embeds" not in seen:
            path = f"{self.location.layers_path}.0"
            raise ValueError(f"{path} never ran in a forward pass; pass decoder='path' of the one that does.")
        return seen

    def _head_input(self, inputs: Mapping[str, Any], audio: bool, last: int = 1) -> Tensor:
        """`[batch, last, hidden]`: what the head multiplies at the last positions when the whole model runs."""
        path, at = self.location.head_path, slice(-last, None)
        heads = capture(self.model, path, where="input", position=at, stop=True, first=True)
        with self.own_lora(audio), heads as record:
            self.model(**inputs)
        return record[path][0]

    @torch.no_grad()
    def check(self, prompt: Prompt, true: Tensor) -> float:
        """Relative difference `|Δ|_max / |h|_max` between `true` `[hidden]`, what the head multiplied at the prompt's
        end, and its replay, shared and padded. A constant factor between the two is found and kept in `scale`.
        """
        longer = prompt.extended([int(prompt.ids[-1])] * 3)
        replayed = self._replay([longer, prompt])[1, 0].float()
        difference, factor = (replayed - true).abs().max(), float(true @ replayed / (replayed @ replayed))
        if difference > self.tolerance * true.abs().max():  # e.g. Inkling divides by a width multiplier
            difference, self.scale = (factor * replayed - true).abs().max(), self.scale * factor
        return float(difference / true.abs().max())

    @torch.no_grad()
    def _generates_from_embeddings(self, prompt: Prompt, true: Tensor) -> bool:
        """Does the whole model, started from left-padded embeddings, end at the same vector?"""
        prepare = getattr(self.model, "prepare_inputs_for_generation", None)
        accepted = prepare and "inputs_embeds" in inspect.signature(prepare).parameters  # what generate() asks as well
        if not accepted or type(self.model).__name__ in GENERATES_FROM_INPUTS:
            return False
        longer = prompt.extended([int(prompt.ids[-1])] * 3)
        return self._close(self._head_input(self.collate([longer, prompt]), prompt.audio)[1, 0].float(), true)

    def _logit_scale(self, inputs: Mapping[str, Any], audio: bool) -> float:
        """What the model multiplies the head's output with (Granite, Cohere, Muse Spark); 1 where it does nothing of
        the kind, and for a soft cap, which leaves small logits as they are."""
        known, path = inspect.signature(self.model.forward).parameters, self.location.head_path
        few = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
        with self.own_lora(audio), capture(self.model, path, position=slice(-1, None)) as record:
            logits = getattr(self.model(**inputs, **few), "logits", None)
        head = record[path][0][0, -1].float()
        if not isinstance(logits, Tensor) or logits.shape[-1:] != head.shape:
            return 1.0
        true = logits[0, -1].float()
        factor = float(true @ head / (head @ head))
        return factor if factor > 0 and abs(factor - 1) > self.tolerance and self._close(factor * head, true) else 1.0

    @contextmanager
    def own_lora(self, audio: bool) -> Iterator[None]:
        """Granite Speech comes with a LoRA for audio: on for prompts with audio, off for text, and then as it was."""
        layers: list[Any] = []
        if type(self.model).__name__ in OWN_AUDIO_LORA:
            layers = [m for m in self.model.modules() if hasattr(m, "lora_A") and hasattr(m, "enable_adapters")]
        flags = [partial(p.requires_grad_, p.requires_grad) for layer in layers for p in layer.parameters()]
        with _changes(self.model) as changes:
            changes.undo += flags  # PEFT changes these as well; put back last
            changes.undo += [partial(layer.enable_adapters, not layer.disable_adapters) for layer in layers]
            for layer in layers:
                layer.enable_adapters(audio)
            for put_back in flags:
                put_back()
            yield

    @torch.no_grad()
    def _embed(self, ids: Tensor) -> dict[str, Tensor]:
        """Decoder inputs of token ids `[batch, length]`: `inputs_embeds` `[batch, length, hidden]` and PER_TOKEN."""
        embedding = _ask(self.model, "get_input_embeddings")
        if embedding is None or self._per_token:
            return self._decoder_inputs({"input_ids": ids.to(self.device)})
        return {"inputs_embeds": embedding(ids.clamp(max=len(weight_of(embedding)) - 1).to(self.device))}

    @torch.no_grad()
    def collate(self, prompts: Sequence[Prompt], skip: int = 0, side: str = "left") -> dict[str, Tensor]:
        """Padded decoder inputs: `inputs_embeds` `[batch, length, hidden]`, `attention_mask` `[batch, length]`, and
        PER_TOKEN `[batch, length, …]` where the decoder takes them.

        Args:
            skip: leave out this many leading positions.
            side: where the padding goes; generation needs it on the left.
        """
        ids, mask, starts = _padded([prompt.ids[skip:] for prompt in prompts], side)
        mask = mask.to(self.device)
        inputs = self._embed(ids)
        embeds = inputs["inputs_embeds"] * mask.unsqueeze(-1)
        for i, (prompt, start) in enumerate(zip(prompts, starts, strict=True)):
            if prompt.rows is not None:
                at = start + prompt.start - skip
                embeds[i, at : at + len(prompt.rows)] = prompt.rows.to(embeds)
        return {**inputs, "inputs_embeds": embeds, "attention_mask": mask}

    # -- from what the decoder sees to vectors ------------------------------------------------------------------------

    def _replay(self, prompts: Sequence[Prompt], last: int = 1, layers: bool = False) -> Tensor:
        """The last `last` positions' vectors from cached decoder inputs; see `last_hidden`.

        Padding goes to the right: attention is causal, so no real position sees it, and no mask is needed. What all
        prompts of the batch begin with (system prompt, opening of the turn) runs once and is shared through the
        key-value cache, gradients included: on short questions that is more than half of all positions.
        """
        decoder, by_position = self.location.decoder, any(c.by_position for c in _CHANGES.get(self.model, ()))
        with self.own_lora(prompts[0].audio), self._checkpointing() as recomputes:
            whole = by_position or recomputes or not self.share_prefix  # what is recomputed has no cache
            shared, cache = self._prefix_cache(prompts, 0 if whole else self._shared_prefix(prompts, last))
            inputs: dict[str, Any] = self.collate(prompts, shared, side="right")
            if not by_position:
                del inputs["attention_mask"]
            if cache is not None:
                inputs[_cache_name(decoder)] = cache
            with self._blocks(layers) as hidden:
                out = decoder(**inputs, use_cache=cache is not None)[0]
        lengths = torch.tensor([len(prompt) - shared for prompt in prompts])
        ends = (lengths[:, None] + torch.arange(-last, 0)).clamp(min=0)
        rows = torch.arange(len(prompts))[:, None]
        if layers:
            return torch.stack([h[rows, ends] for h in hidden()], 2)
        return out[rows, ends] if self.scale == 1 else out[rows, ends] * self.scale

    def _full(self, prompt: Prompt, last: int, layers: bool) -> Tensor:
        """One prompt's vectors where replay is not exact: the full model runs, unpadded."""
        with self._checkpointing(), self._blocks(layers) as hidden:
            h = self._head_input(self._on_device(prompt.inputs()), prompt.audio, last)
        if layers:
            h = torch.stack([each[:, -last:] for each in hidden()], 2)
        return torch.cat([h[:, :1]] * (last - h.shape[1]) + [h], 1)

    @staticmethod
    def _shared_prefix(prompts: Sequence[Prompt], last: int) -> int:
        """How many leading token ids all prompts of a batch share; at least `last` positions stay for each prompt."""
        longest = max(0, min(min(len(p) - last, p.start if p.rows is not None else len(p)) for p in prompts))
        ids = torch.stack([p.ids[:longest] for p in prompts])
        return int((ids == ids[0]).all(0).cumprod(0).sum()) if len(prompts) > 1 else 0

    def _prefix_cache(self, prompts: Sequence[Prompt], length: int) -> tuple[int, Cache | None]:
        """The key-value cache of the first `length` positions, which all prompts share, once for each of them; none,
        and no more sharing from then on, where it can't be repeated."""
        if not length:
            return 0, None
        out = self.location.decoder(**self._embed(prompts[0].ids[None, :length]), use_cache=True)
        cache = getattr(out, _cache_name(self.location.decoder), None)
        # Not repeatable: tuples of keys and values (remote code), states of convolutions or state-space layers.
        if not isinstance(cache, Cache) or any(hasattr(layer, "conv_states") for layer in cache.layers):
            self.share_prefix = False
            return 0, None
        cache.batch_repeat_interleave(len(prompts))
        return length, cache

    @contextmanager
    def _checkpointing(self) -> Iterator[bool]:
        """Makes `model.gradient_checkpointing_enable()` act in the passes inside the `with`, and says whether it does.

        Modules look at it in training mode only. Those that have the setting are in it meanwhile; their children, such
        as dropouts, are not.
        """
        modules: list[Any] = []
        if torch.is_grad_enabled():
            modules = [m for m in self.location.decoder.modules() if getattr(m, "gradient_checkpointing", False)]
        functions = [getattr(module, "_gradient_checkpointing_func", None) for module in modules]
        if any(isinstance(f, partial) and f.keywords.get("use_reentrant", True) for f in functions):
            raise ValueError(
                "Reentrant gradient checkpointing loses the adapter's gradients; call "
                'model.gradient_checkpointing_enable({"use_reentrant": False}).'
            )
        with _changes(self.model) as changes:
            changes.undo += [partial(setattr, module, "training", module.training) for module in modules]
            for module in modules:
                module.training = True
            yield bool(modules)

    @contextmanager
    def _blocks(self, wanted: bool) -> Iterator[Callable[[], list[Tensor]]]:
        """Gives, after a pass, what went into the first block and what each block gave, `[batch, length, hidden]`."""
        paths = [f"{self.location.layers_path}.{i}" for i in range(len(self.location.layers))] if wanted else []

        def hidden() -> list[Tensor]:
            seen = [first[paths[0]][-1], *(outputs[path][-1] for path in paths)]
            if any(h.dim() != 3 for h in seen):  # Gemma 3n
                raise ValueError(
                    f"Blocks of {type(self.location.decoder).__name__} give {list(seen[1].shape)}, several streams "
                    "instead of [batch, length, hidden]; use layers=False."
                )
            return seen

        with capture(self.model, paths[:1], where="input") as first, capture(self.model, paths) as outputs:
            yield hidden

    def last_hidden(self, prompts: Sequence[Prompt], last: int = 1, layers: bool = False) -> Tensor:
        """What the head multiplies at the last `last` positions of each prompt, `[batch, last, hidden]`.

        One forward pass; gradients reach an attached `LoRA` if they are enabled. A prompt with fewer positions repeats
        its first one.

        Args:
            layers: `[batch, last, blocks + 1, hidden]` instead: what goes into the first block, then what each block
                gives, before the final norm.
        """
        if self.exact is False:
            return torch.cat([self._full(prompt, last, layers) for prompt in prompts])
        # Apart with audio and without: Granite Speech's own LoRA is on for the one and off for the other.
        kinds = [[i for i, p in enumerate(prompts) if p.audio is audio] for audio in (False, True)]
        rows = torch.cat([self._replay([prompts[i] for i in kind], last, layers) for kind in kinds if kind])
        return rows if not all(kinds) else rows[torch.tensor([*kinds[0], *kinds[1]]).argsort()]

    def batches(self, prompts: Sequence[Prompt], settings: GenerationConfig | None = None) -> Iterator[list[int]]:
        """Indices of prompts that go together: with audio or without, sorted by length, as many as `max_tokens` padded
        positions allow.

        Args:
            settings: of answers; some can be had one by one only, see `generation_inputs`.
        """
        single = settings is not None and self._one_by_one(settings)
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: (prompts[i].audio, len(prompts[i]))):
            full = (len(batch) + 1) * len(prompts[i]) > self.max_tokens
            if batch and (single or full or prompts[i].audio != prompts[batch[-1]].audio):
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def represent(
        self,
        prompts: Sequence[Prompt],
        progress: Callable[[int], object] | None = None,
        last: int | None = None,
        layers: bool = False,
    ) -> Tensor:
        """`h(x)` of any number of prompts, float32 `[n, hidden]` on the CPU, batched by length, without gradients.

        With several ranks each does some of the batches, the same ones as a single process; all get all rows.

        Args:
            progress: called with the number of prompts done, batch by batch.
            last: the vectors of that many last positions instead, `[n, last, hidden]`.
            layers: what goes into the first block and what each block gives, before the final norm, instead:
                `[n, blocks + 1, hidden]`, or with `last` `[n, last, blocks + 1, hidden]`.
        """
        shape = [len(self.location.layers) + 1] if layers else []
        out = torch.zeros(len(prompts), last or 1, *shape, self.location.head_weight.shape[1])
        for batch, done in in_rounds(list(self.batches(prompts))):
            if batch:
                out[batch] = self.last_hidden([prompts[i] for i in batch], last or 1, layers).float().cpu()
            if progress:
                progress(done)
        all_reduce_sum([out])
        return out if last else out[:, 0]

    # -- logits and answers -------------------------------------------------------------------------------------------

    @property
    def logit_weight(self) -> Tensor:
        """The matrix `[vocab, hidden]` that gives the logits: the head's, times `logit_scale`."""
        weight = self.location.head_weight
        return weight if self.logit_scale == 1 else weight * self.logit_scale

    def logits(self, h: Tensor, *, vanilla: bool = False) -> Tensor:
        """The model's logits `[n, vocab]`, float32, of vectors `[n, hidden]`; all but a soft cap.

        Args:
            vanilla: past all hooks on the head, such as steering ones.
        """
        head = self.location.head.forward if vanilla else self.location.head
        logits = head(h.to(self.device, self.dtype)).float()
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def _one_by_one(self, settings: GenerationConfig) -> bool:
        """Whether answers are the model's own only from its own inputs, a prompt at a time."""
        reads = any(getattr(settings, name, None) not in (None, neutral) for name, neutral in READS_PROMPT.items())
        return reads or not (self.exact and self.from_embeddings)

    def generation_inputs(self, prompts: Sequence[Prompt], settings: GenerationConfig) -> dict[str, Any]:
        """What `model.generate` starts from, so that answers are the model's own; for prompts of one of the
        `batches(prompts, settings)`.

        If `input_ids` are among them, generate() returns the prompts' ids in front of the new ones, else these alone.
        """
        if self._one_by_one(settings):
            (prompt,) = prompts
            return dict(self._on_device(prompt.inputs()))
        inputs: dict[str, Any] = self.collate(prompts)
        if settings.repetition_penalty not in (None, 1.0):
            # It looks at which ids there are; padding with one of the prompt's own changes nothing.
            inputs["input_ids"] = _padded([prompt.ids for prompt in prompts], "left")[0].to(self.device)
        return inputs


def _padded(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids `[batch, length]`, padded with each row's own first one, their mask, and where each row starts."""
    length = max(map(len, rows))
    starts = [length - len(row) if side == "left" else 0 for row in rows]
    ids = torch.stack([row[:1].expand(length) for row in rows])
    mask = torch.zeros_like(ids)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, start : start + len(row)] = row
        mask[i, start : start + len(row)] = 1
    return ids, mask, starts


def _accepts(module: nn.Module, name: str) -> bool:
    """Whether a module's forward takes an argument of that name."""
    parameters = inspect.signature(module.forward).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _cache_name(module: nn.Module) -> str:
    """What a module's forward calls its key-value cache: transformers renamed it in 5.24."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


ANOTHER_LORA = (
    "Another RRS has its adapter on this model, and the two would add up. Call its disable() first, or, if that object "
    "is gone: for lora in rrs.hooks.attached(model): lora.detach()"
)


def attached(model: nn.Module) -> list[LoRA]:
    """The LoRAs that are on a model, or on one of its linears."""
    found = (getattr(hook, "lora", None) for module in model.modules() for hook in module._forward_hooks.values())
    return list(dict.fromkeys(lora for lora in found if isinstance(lora, LoRA)))


def _is_packed(weight: Tensor) -> bool:
    """Whether a weight holds codes instead of numbers: integers, 4-bit blocks, or float8 without its scales."""
    return not weight.is_floating_point() or weight.dim() != 2 or weight.element_size() < 2


class LoRA(nn.Module):
    """Low-rank updates `W + (α/r)·B·A` on named linears of a model, added by forward hooks.

    The model's own modules, parameter names and `requires_grad` flags stay as they are: `detach()` is all it takes to
    have the vanilla model back, bit for bit. A and B are float32 (the penalty needs it) and are cast to the
    activations' dtype for the matmul.

    Args:
        model: the model that holds the linears.
        paths: their exact dotted paths.
        r, alpha, dropout: as in LoRA (Hu et al. 2021); the update is scaled by `alpha / r`.
        seed: of A's initialisation (Kaiming uniform, as in PEFT); B starts at zero, so training starts at vanilla.

    Attributes:
        key: what dropout's masks derive from, with module and shape. Set it to something new, e.g. the step, before
            each forward pass in training. The global random numbers play no part, so runs in two threads do not
            disturb each other, a resumed run needs no generator's state, and a pass that activation checkpointing runs
            again in backward gets the masks that it had.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], *, r: int, alpha: float, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.paths, self.r, self.scale, self.dropout = list(paths), r, alpha / r, dropout
        self._modules_by_path = {path: model.get_submodule(path) for path in paths}
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        self.key: tuple[int, ...] | None = None
        generator = torch.Generator().manual_seed(seed)
        self._check_finite({})
        for path, module in self._modules_by_path.items():
            n_in, n_out = _features(path, module)
            bound = 1 / math.sqrt(n_in)  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(r, n_in, generator=generator) * 2 - 1) * bound
            device = weight_of(module).device
            self.A.append(nn.Parameter(a.to(device)))
            self.B.append(nn.Parameter(torch.zeros(n_out, r, device=device)))

    def attach(self) -> LoRA:
        """Adds the update to every forward pass of the model. `detach()` undoes it.

        Raises:
            ValueError: another LoRA is on one of the linears; the two would add up.
        """
        self.detach()
        if any(attached(module) for module in self._modules_by_path.values()):
            raise ValueError(ANOTHER_LORA)
        for i, (module, a, b) in enumerate(zip(self._modules_by_path.values(), self.A, self.B, strict=True)):
            module.register_forward_hook(self._hook(i, a, b))
        return self

    def detach(self) -> LoRA:
        """Takes the update off again: the model is vanilla, bit for bit. `attach()` puts it back."""
        for module in self._modules_by_path.values():
            for number, hook in [*module._forward_hooks.items()]:
                if getattr(hook, "lora", None) is self:
                    del module._forward_hooks[number]
        return self

    @property
    def attached(self) -> bool:
        """Whether the model currently runs with the update."""
        return any(self in attached(module) for module in self._modules_by_path.values())

    def _hook(self, i: int, a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = self._drop(i, args[0]) if self.training and self.dropout else args[0]
            # The scale goes into B, which is small: a pass over the activations less, and one less in backward.
            update = F.linear(F.linear(x, a.to(x)), (self.scale * b).to(x))  # the model may have moved since
            return output + update.to(output.dtype)

        add.lora = self  # type: ignore[attr-defined]  # see `attached`
        return add

    def _drop(self, i: int, x: Tensor) -> Tensor:
        """Dropout of module i's input `x`; see `key`."""
        if self.key is None:
            raise RuntimeError("Set lora.key, e.g. to (step,), before each forward pass in training: dropout needs it.")
        generator = seeded(*self.key, i, *x.shape, device=x.device)
        keep = torch.empty_like(x).bernoulli_(1 - self.dropout, generator=generator)
        return x * keep.div_(1 - self.dropout)

    def penalty(self) -> Tensor:
        """`Σ_modules ‖(α/r)·B·A‖_F²`, the loss's second term, with its gradient.

        Through the r×r Gram matrices, exact, BA never formed: `‖BA‖_F² = Σ (BᵀB) ∘ (AAᵀ)`.
        """
        squares = [((a @ a.T) * (b.T @ b)).sum() for a, b in zip(self.A, self.B, strict=True)]
        return self.scale**2 * torch.stack([s.to(squares[0].device) for s in squares]).sum()  # maybe of several devices

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the model's weights, and is zero and detached. It can't be undone; keep a saved copy."""
        self._check_finite(self.tensors())
        # Where a PEFT layer stands (Granite Speech's own LoRA), the weight is that of the linear inside it.
        inner = {path: getattr(module, "base_layer", module) for path, module in self._modules_by_path.items()}
        if packed := [path for path, module in inner.items() if _is_packed(weight_of(module))]:
            raise ValueError(f"{packed[0]} is quantised; load the model unquantised to merge.")
        for module, a, b in zip(inner.values(), self.A, self.B, strict=True):
            update = self.scale * (b @ a)
            weight = weight_of(module)
            weight += (update.T if _is_conv1d(module) else update).to(weight.dtype)
            b.zero_()  # it is in the weights: after an error (memory, Ctrl-C) another merge() does the rest
        self.detach()

    def _parameters_by_name(self) -> dict[str, nn.Parameter]:
        """By PEFT's names, A before B."""
        pairs = zip(self.paths, self.A, self.B, strict=True)
        named = {path: {"A": a, "B": b} for path, a, b in pairs}
        return {f"base_model.model.{path}.lora_{k}.weight": p for path, ab in named.items() for k, p in ab.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Weights by PEFT's names, `base_model.model.{path}.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]`."""
        return {name: p.detach().cpu().contiguous() for name, p in self._parameters_by_name().items()}

    @torch.no_grad()
    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Fills in weights under PEFT's names; every one must be there, finite, with its shape, and nothing else."""
        own = self._parameters_by_name()
        if missing := sorted(own.keys() ^ named.keys()):
            raise ValueError(
                f"The adapter's weights do not fit this model: {missing[:4]} … ({len(missing)} names differ)"
            )
        for name, p in own.items():
            if named[name].shape != p.shape:
                raise ValueError(
                    f"{name}: the adapter has {list(named[name].shape)}, this model needs {list(p.shape)}; it was made "
                    "for another base."
                )
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

    Only in blocks whose middle lies within `layers`, shares of the decoder's depth. A name without a match stands for
    the names in `SAME_AS`. Mixtures of experts keep an MLP's weights in 3-D parameters; there, and only there, the
    names of its projections may match nothing.

    Raises:
        ValueError: a name that matches nothing; the message lists the names that exist.
    """
    linears = {
        path: path.rpartition(".")[2]
        for path, module in location.layers.named_modules()
        if isinstance(getattr(module, "weight", None), Tensor) and (_is_conv1d(module) or _is_linear(module))
    }
    present, unmatched, wanted = set(linears.values()), [], set()
    for name in names:
        known = [n for n in (name, *SAME_AS.get(name, ())) if n in present]
        wanted.update(known[:1] if known[:1] == [name] else known)
        if not known and not (name in MLP and expert_parameters(location)):
            unmatched.append(name)
    if unmatched:
        where = location.layers_path
        raise ValueError(
            f"target_modules {sorted(unmatched)} match no linear below {where}; there are {sorted(present)}."
        )
    depth, (low, high) = len(location.layers), layers
    inside = {path for path in linears if low <= (int(path.partition(".")[0]) + 0.5) / depth <= high}
    paths = [f"{location.layers_path}.{path}" for path, name in linears.items() if name in wanted and path in inside]
    if not wanted:
        raise ValueError(
            f"target_modules {list(names)} are all matrices of experts, 3-D parameters, which get no LoRA; name some "
            f"of {sorted(present)}."
        )
    if not paths:
        raise ValueError(f"layers={layers} hold none of the {depth} blocks with {sorted(wanted)}; widen it.")
    return paths


def expert_parameters(location: Location) -> list[str]:
    """Paths of 3-D MLP weights `[experts, …]` below the decoder's blocks, which no LoRA is added to."""
    return [
        f"{location.layers_path}.{path}"
        for path, p in location.layers.named_parameters()
        if p.dim() == 3 and path.rpartition(".")[2] in (*MLP, "gate_up_proj")
    ]


def weight_of(module: nn.Module) -> Tensor:
    """A module's weight matrix."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, its subclasses and quantised stand-ins, all of which carry both sizes."""
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")  # transformers' transposed linear (GPT-2)


def _features(path: str, module: nn.Module) -> tuple[int, int]:
    if _is_linear(module):
        return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]
    if _is_conv1d(module):
        n_in, n_out = weight_of(module).shape
        return n_in, n_out
    raise ValueError(f"{path} is a {type(module).__name__}, not a linear; LoRA can't be added to it.")


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


def connect() -> None:
    """Joins the processes that torchrun started, if it did, and takes this rank's device.

    Raises:
        ValueError: a process group is there, but can't move what lies on the CPU.
    """
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


def all_reduce_max(value: int) -> int:
    """The maximum over the ranks."""
    return max(all_gather({rank(): value}).values())


def all_gather(own: dict[Any, T]) -> dict[Any, T]:
    """What all ranks have, in one dict."""
    parts: list[Any] = [own]
    if world() > 1:
        parts = [None] * world()
        dist.all_gather_object(parts, own)
    return {key: value for part in parts for key, value in part.items()}


def on_rank0(compute: Callable[[], T]) -> T:
    """What `compute()` gives on rank 0, on all of them; an error there is an error everywhere. For files."""
    if world() == 1:
        return compute()
    result: list[Any] = [None, None]
    if rank() == 0:
        try:
            result = [compute(), None]
        except Exception as error:  # raised below, on every rank
            result = [None, error]
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise result[1]
    return result[0]  # type: ignore[no-any-return]


def in_rounds(batches: Sequence[list[int]]) -> Iterator[tuple[list[int], int]]:
    """Shares batches out in rounds: `(this rank's batch, items done in the round)`.

    All ranks see the same number of rounds; in a last round that is not full, the batch of some is empty.
    """
    for start in range(0, len(batches), world()):
        now = batches[start : start + world()]
        yield now[rank()] if rank() < len(now) else [], sum(map(len, now))
