"""Everything that attaches to a model: find its parts, capture vectors, replay the decoder, add a LoRA.

Nothing here edits a module. Hooks are put on inside context managers (or `LoRA.attach`) and come off again, which
leaves the model bit-identical to before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

# ---------------------------------------------------------------------------------------------------------------------
# Where things are

# Attribute names that transformers' decoders use. Only an exact match on a direct child counts; anything else is an
# error that lists what was seen, because a wrong layer trains without complaint and protects nothing.
LAYER_LISTS = ("layers", "h", "blocks")
FINAL_NORMS = ("norm", "norm_f", "ln_f", "final_layernorm", "final_layer_norm")


@dataclass(frozen=True)
class Location:
    """The parts of a LALM that RRS needs, each with its dotted path in the model."""

    decoder: nn.Module
    """The LLM without its head: embeddings in, final-norm output `[batch, length, hidden]` out."""
    layers: nn.ModuleList
    """The decoder's blocks; LoRA touches linears below here and nothing else."""
    norm: nn.Module
    """The decoder's final norm."""
    head: nn.Module
    """The output embedding (`lm_head`), weight `[vocab, hidden]`."""
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
        ValueError: a part is missing or ambiguous. The message lists the candidates and the argument that decides.
    """
    paths = {id(module): path for path, module in model.named_modules()}  # first name wins, as in state_dict

    def given(path: str, argument: str) -> nn.Module:
        try:
            return model.get_submodule(path)
        except AttributeError:
            near = [p for p in paths.values() if p.rpartition(".")[2] == path.rpartition(".")[2]] or [
                p for p in paths.values() if p and p.count(".") < 2
            ]
            raise ValueError(f"{argument}={path!r} is not a module of {type(model).__name__}; close: {near}") from None

    # Head: the matrix whose rows are the tokens' directions.
    head_module = given(head, "head") if head else _ask(model, "get_output_embeddings")
    if head_module is None:  # e.g. Nemotron-H-Omni: the head sits on the inner causal LM
        named = [m for p, m in model.named_modules() if p.rpartition(".")[2] == "lm_head"]
        if len(named) != 1:
            found = [paths[id(m)] for m in named]
            raise ValueError(
                f"{type(model).__name__} names no output embedding"
                + (f" and has several lm_heads: {found}." if found else " and has no lm_head.")
                + " Load the class with a language-model head, or pass head='path.to.head'."
            )
        head_module = named[0]
    weight = getattr(head_module, "weight", None)
    if not isinstance(weight, Tensor) or id(head_module) not in paths:
        raise ValueError(f"The head {head or type(head_module).__name__} has no weight matrix; pass head='path'.")

    # Decoder: what feeds the head.
    decoder_module = given(decoder, "decoder") if decoder else _ask(model, "get_decoder")
    while decoder is None and decoder_module is not None and any(m is head_module for m in decoder_module.modules()):
        inner = _ask(decoder_module, "get_decoder")  # a causal LM: step inside, the head is not part of the decoder
        decoder_module = None if inner is decoder_module else inner
    if decoder_module is None or id(decoder_module) not in paths:
        owners = [p for p, m in model.named_modules() if _children(m, LAYER_LISTS, nn.ModuleList)]
        raise ValueError(
            f"{type(model).__name__} does not tell where its decoder is. Modules that own a list of blocks: {owners}. "
            "Pass decoder='path' for the one that feeds the head."
        )

    def only_child(names: Sequence[str], kind: type, what: str) -> nn.Module:
        found = _children(decoder_module, names, kind)
        if len(found) != 1:
            raise ValueError(
                f"{what} of {paths[id(decoder_module)]!r} ({type(decoder_module).__name__}): expected exactly one of "
                f"{list(names)}, found {list(found)} among {[n for n, _ in decoder_module.named_children()]}. "
                + ("Pass norm='path'." if kind is nn.Module else "Pass decoder='path' for the module that owns them.")
            )
        return next(iter(found.values()))

    layers = only_child(LAYER_LISTS, nn.ModuleList, "The list of blocks")
    norm_module = given(norm, "norm") if norm else only_child(FINAL_NORMS, nn.Module, "The final norm")
    assert isinstance(layers, nn.ModuleList)
    return Location(
        decoder=decoder_module,
        layers=layers,
        norm=norm_module,
        head=head_module,
        decoder_path=paths[id(decoder_module)],
        layers_path=paths[id(layers)],
        norm_path=paths[id(norm_module)],
        head_path=paths[id(head_module)],
    )


def _ask(model: nn.Module, accessor: str) -> nn.Module | None:
    method = getattr(model, accessor, None)
    return method() if callable(method) else None


def _children(module: nn.Module, names: Sequence[str], kind: type) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_children() if name in names and isinstance(child, kind)}


# ---------------------------------------------------------------------------------------------------------------------
# Capture


ACTIVATIONS = ("inputs_embeds", "hidden_states", "input")  # keyword names of a module's main argument, asked first


class _Stop(Exception):  # noqa: N818
    """Ends a forward pass early; caught by the `capture` that raised it and by nothing else."""


@contextmanager
def capture(
    model: nn.Module,
    modules: str | Sequence[str],
    *,
    where: Literal["input", "output"] = "output",
    position: int | slice | None = None,
    stop: bool = False,
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

    Yields:
        `{path: [one tensor per forward pass]}`, still attached to the autograd graph. Run `backward()` inside the
        `with`: with activation checkpointing the recomputation needs the hooks, and a hook removed too early gives
        wrong gradients without an error.

    Raises:
        ValueError: a path that does not exist, or a module that carries no tensor there.
    """
    paths = [modules] if isinstance(modules, str) else list(modules)
    known = dict(model.named_modules(remove_duplicate=False))
    if missing := [path for path in paths if path not in known]:
        raise ValueError(f"No module {missing} in {type(model).__name__}; see model.named_modules().")
    record: dict[str, list[Tensor]] = {path: [] for path in paths}
    pending = set(paths)
    end = _Stop()

    def keep(path: str, value: Any) -> None:
        tensor = next((t for t in _tensors(value)), None)
        if tensor is None:
            raise ValueError(f"{path} carries no tensor at its {where}, but {type(value).__name__}.")
        record[path].append(tensor if position is None else tensor[:, position])
        pending.discard(path)
        if stop and not pending:
            raise end

    def hook_on(path: str, module: nn.Module) -> RemovableHandle:
        if where == "input":
            return module.register_forward_pre_hook(
                lambda _m, args, kwargs: keep(path, (*args, *(kwargs.get(n) for n in ACTIVATIONS), *kwargs.values())),
                with_kwargs=True,
            )
        return module.register_forward_hook(lambda _m, _args, output: keep(path, output))

    handles: list[RemovableHandle] = []
    try:
        for path in paths:
            handles.append(hook_on(path, known[path]))
        yield record
    except _Stop as error:
        if error is not end:
            raise
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def steer(location: Location, vector: Tensor, strength: float = 1.0) -> Iterator[None]:
    """Adds `strength · vector` to what the head multiplies, at every position, during every pass inside the `with`.

    Inference-time steering, a baseline for RRS without training: the same Δ, added instead of learnt, and to harmful
    and harmless inputs alike.

    Args:
        location: from `locate(model)`.
        vector: `[hidden]`, e.g. Δ ∘ mask.
        strength: 1 adds the vector as it is.
    """

    def add(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + (strength * vector).to(args[0]), *args[1:])

    if vector.shape != (hidden := location.head_weight.shape[1:]):
        raise ValueError(f"The vector {list(vector.shape)} must be [hidden] = {list(hidden)}.")
    handle = location.head.register_forward_pre_hook(add)
    try:
        yield
    finally:
        handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """Floating tensors in a module's arguments or output, in order (token ids and masks are not activations)."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


# ---------------------------------------------------------------------------------------------------------------------
# Replay: the frozen audio tower runs once per clip, the decoder as often as training needs


@dataclass(eq=False)
class Prompt:
    """One prompt as the decoder sees it: token ids, and rows that replace their embeddings where the audio is."""

    ids: Tensor
    """Token ids `[length]`, on the CPU; placeholders at the audio positions."""
    rows: Tensor | None = None
    """Decoder-input rows `[n, hidden]` that are no token embeddings: the projected audio. Shared between prompts."""
    start: int = 0
    """Position of the first row."""
    inputs: dict[str, Any] | None = field(default=None, repr=False)
    """The model's own inputs, kept only where replay is not exact and the full model has to run."""

    def __len__(self) -> int:
        return len(self.ids)

    def extended(self, tokens: Sequence[int]) -> Prompt:
        """The prompt with token ids appended: an answer that has already begun."""
        ids = torch.cat([self.ids, torch.tensor(tokens, dtype=self.ids.dtype)])
        inputs = None
        if self.inputs is not None:
            inputs = dict(self.inputs)
            for name, fill in (("input_ids", torch.tensor(tokens)), ("attention_mask", torch.ones(len(tokens)))):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], fill[None].to(inputs[name])], dim=1)
        return Prompt(ids, self.rows, self.start, inputs)


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
        render: Callable[[str | None, Any], dict[str, Any]],
        max_tokens: int = 8192,
    ) -> None:
        self.model, self.location, self.render, self.max_tokens = model, location, render, max_tokens
        self.exact: bool | None = None  # is replay exact on this model? decided on the first prompts, see `check`
        self.share_prefix = True
        self._texts: dict[str | None, Prompt] = {}
        self._clips: dict[str, Tensor] = {}  # clip id -> projected audio [n, hidden]
        self._frames: dict[str | None, tuple[Tensor, Tensor]] = {}  # instruction -> ids before, ids after the audio

    @property
    def device(self) -> torch.device:
        """Where the decoder starts."""
        return next(self.location.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the decoder's weights and activations."""
        return next(self.location.decoder.parameters()).dtype

    @torch.no_grad()
    def read(self, text: str | None, clip: tuple[str, Callable[[], Any]] | None = None) -> Prompt:
        """The prompt of one user turn: `text`, an audio clip, or the clip followed by the text.

        Args:
            text: the text of the turn; `None` for audio alone.
            clip: `(key, load)`: a key that is equal for equal clips, and a function that returns the waveform
                (float32 `[samples]` at the processor's rate). The clip is loaded and encoded once per key; with every
                further text only token ids are put together, since neither tower nor projector sees the text.
        """
        if clip is None:
            if text not in self._texts:
                prompt = self._run(text, None)
                if prompt.inputs is not None or prompt.rows is not None:
                    return prompt  # too large to keep
                self._texts[text] = prompt
            return self._texts[text]
        key, load = clip
        if key in self._clips and text in self._frames and self.exact is not False:
            before, after = self._frames[text]
            rows = self._clips[key]
            placeholder = before.new_full((len(rows),), -1)
            return Prompt(torch.cat([before, placeholder, after]), rows, len(before))
        prompt = self._run(text, load())
        if prompt.rows is None:
            return prompt
        end = prompt.start + len(prompt.rows)
        frame = (prompt.ids[: prompt.start], prompt.ids[end:])
        known = self._frames.setdefault(text, frame)
        if not all(torch.equal(a, b) for a, b in zip(known, frame, strict=True)):
            # The ids around the audio depend on the clip: no composing, every pair goes through the processor.
            self._frames = _Never()
        self._clips[key] = prompt.rows
        return prompt

    def _run(self, text: str | None, wave: Any) -> Prompt:
        """Processor, tower and projector for one prompt; the pass ends where the decoder starts."""
        inputs = {
            k: v.to(self.device, self.dtype if v.is_floating_point() else None) if isinstance(v, Tensor) else v
            for k, v in self.render(text, wave).items()
        }
        ids = inputs["input_ids"][0].cpu()
        if self.exact is False:
            return Prompt(ids, inputs=inputs)
        seen = None
        with capture(self.model, self.location.decoder_path, where="input", stop=True) as record:
            self.model(**inputs)
        if record[self.location.decoder_path]:
            seen = record[self.location.decoder_path][0][0]  # [length, hidden]
        if seen is None or len(seen) != len(ids):
            self.exact = False
            return Prompt(ids, inputs=inputs)
        plain = self._embed(ids)
        differs = (seen != plain).any(-1).nonzero().flatten()
        prompt = Prompt(ids)
        if len(differs):
            start, end = int(differs[0]), int(differs[-1]) + 1
            prompt = Prompt(ids, seen[start:end].clone(), start)
        if self.exact is None or (len(differs) and not self._clips):  # the first text and the first clip are checked
            difference = self.check(prompt, inputs)
            if difference > self.tolerance and self.share_prefix:  # e.g. a decoder without a key-value cache
                self.share_prefix = False
                difference = self.check(prompt, inputs)
            self.exact = difference <= self.tolerance
            if not self.exact:
                warnings.warn(
                    f"Replaying {type(self.location.decoder).__name__} from cached inputs is off by {difference:.1e}; "
                    "the full model runs for every prompt instead: correct, but slower.",
                    stacklevel=2,
                )
                return Prompt(ids, inputs=inputs)
        return prompt

    @property
    def tolerance(self) -> float:
        """Largest relative difference between replay and full forward that is rounding: 1e-4 in float32, 0.05 else."""
        return 1e-4 if self.dtype == torch.float32 else 0.05

    @torch.no_grad()
    def check(self, prompt: Prompt, inputs: Mapping[str, Any]) -> float:
        """Relative difference between the vector at the head and its replay, shared and padded: `|Δ|_max / |h|_max`."""
        with capture(self.model, self.location.head_path, where="input", position=-1, stop=True) as record:
            self.model(**inputs)
        true = record[self.location.head_path][0][0].float()
        longer = Prompt(torch.cat([prompt.ids, prompt.ids[-1:].expand(3)]), prompt.rows, prompt.start)
        replayed = self._replay([longer, prompt])[1].float()
        return float((replayed - true).abs().max() / true.abs().max())

    def _embed(self, ids: Tensor) -> Tensor:
        """Token embeddings `[length, hidden]`; audio placeholders (-1) embed as token 0 and are replaced later."""
        embedding: nn.Module = self.model.get_input_embeddings()  # type: ignore[operator]
        return embedding(ids.clamp(min=0).to(self.device))

    @torch.no_grad()
    def collate(self, prompts: Sequence[Prompt], skip: int = 0, side: str = "left") -> dict[str, Tensor]:
        """Padded decoder inputs: `inputs_embeds` `[batch, length, hidden]`, `attention_mask` `[batch, length]`.

        Args:
            skip: leave out this many leading positions.
            side: where the padding goes; generation needs it on the left.
        """
        length = max(map(len, prompts)) - skip
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        offsets = [length - (len(p) - skip) if side == "left" else 0 for p in prompts]
        for i, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
            ids[i, offset : offset + len(prompt) - skip] = prompt.ids[skip:]
            mask[i, offset : offset + len(prompt) - skip] = 1
        mask = mask.to(self.device)
        embeds = self._embed(ids) * mask.unsqueeze(-1)
        for i, (prompt, offset) in enumerate(zip(prompts, offsets, strict=True)):
            if prompt.rows is not None:
                start = offset + prompt.start - skip
                embeds[i, start : start + len(prompt.rows)] = prompt.rows.to(embeds)
        return {"inputs_embeds": embeds, "attention_mask": mask}

    def _replay(self, prompts: Sequence[Prompt]) -> Tensor:
        """`h(x)` `[batch, hidden]` from cached decoder inputs.

        Padding goes to the right: attention is causal, so no real position sees it, and no mask is needed. What all
        prompts of the batch begin with (system prompt, opening of the turn) runs once and is shared through the
        key-value cache, gradients included: on short questions that is more than half of all positions.
        """
        decoder = self.location.decoder
        shared = self._shared_prefix(prompts) if self.share_prefix else 0
        embeds = self.collate(prompts, shared, side="right")["inputs_embeds"]
        if shared:
            cache = decoder(inputs_embeds=self._embed(prompts[0].ids[None, :shared]), use_cache=True).past_key_values
            cache.batch_repeat_interleave(len(prompts))
            out = decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True)[0]
        else:
            out = decoder(inputs_embeds=embeds, use_cache=False)[0]
        last = torch.tensor([len(prompt) - shared - 1 for prompt in prompts])
        return out[torch.arange(len(prompts)), last]

    @staticmethod
    def _shared_prefix(prompts: Sequence[Prompt]) -> int:
        """How many leading token ids all prompts of a batch share; at least one position stays for each prompt."""
        longest = min(min(len(p) - 1, p.start if p.rows is not None else len(p)) for p in prompts)
        first = prompts[0].ids[:longest]
        for prompt in prompts[1:]:
            differs = (prompt.ids[: len(first)] != first).nonzero()
            first = first[: int(differs[0])] if len(differs) else first
        return len(first) if len(prompts) > 1 else 0

    def last_hidden(self, prompts: Sequence[Prompt]) -> Tensor:
        """`h(x)` of each prompt, `[batch, hidden]`: what the head multiplies at the last position.

        One forward pass; gradients reach an attached `LoRA` if they are enabled.
        """
        if all(prompt.inputs is None for prompt in prompts):
            return self._replay(prompts)
        rows = []
        for prompt in prompts:  # replay is not exact on this model: the full model runs, unpadded
            inputs = prompt.inputs or {"input_ids": prompt.ids[None].to(self.device)}
            with capture(self.model, self.location.head_path, where="input", position=-1, stop=True) as record:
                self.model(**inputs)
            rows.append(record[self.location.head_path][0][0])
        return torch.stack(rows)

    def batches(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Indices of prompts that go together: sorted by length, as many as `max_tokens` padded positions allow."""
        batch: list[int] = []
        for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
            if batch and (len(batch) + 1) * len(prompts[i]) > self.max_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    @torch.no_grad()
    def represent(self, prompts: Sequence[Prompt], progress: Callable[[int], object] | None = None) -> Tensor:
        """`h(x)` of any number of prompts, float32 `[n, hidden]` on the CPU, batched by length, without gradients."""
        out = torch.empty(len(prompts), self.location.head_weight.shape[1])
        for batch in self.batches(prompts):
            out[batch] = self.last_hidden([prompts[i] for i in batch]).float().cpu()
            if progress:
                progress(len(batch))
        return out


class _Never(dict):  # type: ignore[type-arg]
    """A cache that keeps nothing."""

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def setdefault(self, _key: Any, default: Any = None) -> Any:
        return default


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


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
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], *, r: int, alpha: float, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.paths, self.r, self.scale, self.dropout = list(paths), r, alpha / r, dropout
        self._modules_by_path = {path: model.get_submodule(path) for path in paths}
        self.A, self.B = nn.ParameterList(), nn.ParameterList()
        generator = torch.Generator().manual_seed(seed)
        for path, module in self._modules_by_path.items():
            n_in, n_out = _features(path, module)
            bound = 1 / math.sqrt(n_in)  # kaiming_uniform with a = sqrt(5)
            a = (torch.rand(r, n_in, generator=generator) * 2 - 1) * bound
            device = weight_of(module).device
            self.A.append(nn.Parameter(a.to(device)))
            self.B.append(nn.Parameter(torch.zeros(n_out, r, device=device)))
        self._handles: list[RemovableHandle] = []

    def attach(self) -> LoRA:
        """Adds the update to every forward pass of the model. `detach()` undoes it."""
        if not self._handles:
            for module, a, b in zip(self._modules_by_path.values(), self.A, self.B, strict=True):
                self._handles.append(module.register_forward_hook(self._hook(a, b)))
        return self

    def detach(self) -> LoRA:
        """Takes the update off again: the model is vanilla, bit for bit. `attach()` puts it back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return self

    @property
    def attached(self) -> bool:
        """Whether the model currently runs with the update."""
        return bool(self._handles)

    def _hook(self, a: Tensor, b: Tensor) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def add(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = F.dropout(args[0], self.dropout, self.training)
            update = F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype))
            return output + (update * self.scale).to(output.dtype)

        return add

    def penalty(self) -> Tensor:
        """`Σ_modules ‖(α/r)·B·A‖_F²` (RRS, the loss's second term), a scalar.

        Through the r×r Gram matrices, `‖BA‖_F² = Σ (BᵀB) ∘ (AAᵀ)`: exact, and BA is never formed.
        """
        total = sum(((b.T @ b) * (a @ a.T)).sum() for a, b in zip(self.A, self.B, strict=True))
        return self.scale**2 * torch.as_tensor(total)

    @torch.no_grad()
    def merge(self) -> None:
        """Adds the update to the model's weights and detaches itself. It can't be undone exactly; keep a saved copy."""
        for path, module in self._modules_by_path.items():
            weight = weight_of(module)
            if not weight.is_floating_point() or weight.dim() != 2:
                raise ValueError(f"{path} is quantised ({weight.dtype}); load the model unquantised to merge.")
        for module, a, b in zip(self._modules_by_path.values(), self.A, self.B, strict=True):
            update = self.scale * (b @ a)
            weight = weight_of(module)
            weight += (update.T if _is_conv1d(module) else update).to(weight.dtype)
        self.detach()

    def tensors(self) -> dict[str, Tensor]:
        """Weights by PEFT's names, `base_model.model.{path}.lora_A.weight` `[r, in]`, `.lora_B.weight` `[out, r]`."""
        named = {}
        for path, a, b in zip(self.paths, self.A, self.B, strict=True):
            named[f"base_model.model.{path}.lora_A.weight"] = a.detach().cpu().contiguous()
            named[f"base_model.model.{path}.lora_B.weight"] = b.detach().cpu().contiguous()
        return named

    @torch.no_grad()
    def load_tensors(self, named: Mapping[str, Tensor]) -> None:
        """Fills in weights under PEFT's names; every one must be there, with its shape, and nothing else."""
        own = self.tensors()
        if missing := sorted(own.keys() ^ named.keys()):
            raise ValueError(
                f"The adapter's weights do not fit this model: {missing[:4]} … ({len(missing)} names differ)"
            )
        for path, a, b in zip(self.paths, self.A, self.B, strict=True):
            for parameter, letter in ((a, "A"), (b, "B")):
                value = named[f"base_model.model.{path}.lora_{letter}.weight"]
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{path}.lora_{letter}: the adapter has {list(value.shape)}, this model needs "
                        f"{list(parameter.shape)}; it was made for another base."
                    )
                parameter.copy_(value)


def linear_paths(location: Location, names: Sequence[str]) -> list[str]:
    """Paths of the linears below the decoder's blocks whose last path component is one of `names`, exactly.

    Raises:
        ValueError: a name that matches nothing; the message lists the names that exist.
    """
    found: dict[str, str] = {}
    present: set[str] = set()
    for path, module in location.layers.named_modules():
        name = path.rpartition(".")[2]
        if hasattr(module, "weight") and module.weight is not None and (_is_conv1d(module) or _is_linear(module)):
            present.add(name)
            if name in names:
                found[f"{location.layers_path}.{path}"] = name
    if unmatched := sorted(set(names) - set(found.values())):
        raise ValueError(
            f"target_modules {unmatched} match no linear below {location.layers_path}; there are {sorted(present)}."
        )
    return list(found)


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
