"""Operations and bytes of one training step and of extraction, counted on the real sizes without running them.

    python examples/count.py        # or: python examples/benchmark.py --count

The models are those of benchmark.py, Qwen2-Audio-7B and Qwen2.5-Omni-7B's thinker, in bfloat16 on PyTorch's meta
device: every operation runs, without numbers. Ours is the library's own code. The recipe's is recipe.py's: audio tower,
all hidden states, all logits, dense products in the penalty. The floor is 4 · parameters · tokens for a step, forward
and backward through frozen weights, and 2 · parameters · tokens for extraction (and once the audio tower), each token
counted once: no padding, the prompts' common beginning once, and what R_h and R_h+ have in common once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from benchmark import SIZES, random_lalm
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rrs import Example, RRSConfig, TrainItem, to_targets
from rrs.hooks import LoRA, Prompt, Reader, linear_paths, locate

META = torch.device("meta")
SECONDS = (3.0, 4.7, 6.3, 8.0)  # clips of a batch that is drawn at random
MANY = tuple(3 + 5 * i / 127 for i in range(128))  # of 32 batches, which group_by_length sorts first
BEFORE, AFTER, REFUSAL = 18, 22, 14  # tokens before and after the audio, and of the refusal prompt
EACH, FEW = 16, 2  # prompts in a batch of our extraction, which sorts them by length; R_h+ of few of them
FEWER = f"ours, group_by_length, refusal_examples of 1/{EACH // FEW}"


class Peak(TorchDispatchMode):
    """Bytes of meta tensors that were alive at the same time inside the `with`: `now` and `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.update(storages((args, kwargs)))  # those that were there before, such as weights, do not count
        out = func(*args, **(kwargs or {}))
        for storage in storages(out):
            if storage not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.now -= size


def storages(tree: Any) -> list[Any]:
    return [t.untyped_storage() for t in tree_leaves(tree) if isinstance(t, Tensor) and t.device == META]


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """Floating-point operations, and bytes at the peak beyond what was there before."""
    with Peak() as peak, FlopCounterMode(display=False) as flops:
        run()
    return flops.get_total_flops(), peak.most


class Case:
    """One model on the meta device with its LoRA, and the prompts of a batch."""

    def __init__(self, size: str) -> None:
        self.config, self.size = RRSConfig(lora_dropout=0.0), size
        self.model, _ = random_lalm(size, META)
        self.model.requires_grad_(False)
        where = locate(self.model)
        self.reader = Reader(small := random_lalm("tiny", torch.device("cpu"))[0], locate(small), lambda *_: {})
        self.reader.model, self.reader.location, self.reader.exact = self.model, where, True  # nothing to check here
        self.lora = LoRA(self.model, linear_paths(where, self.config.target_modules), r=16, alpha=4.0).attach().train()
        self.frames, many = ([round(25 * s) for s in seconds] for seconds in (SECONDS, MANY))  # positions of each clip
        self.grouped = [many[i : i + 4] for i in (32, 88)]  # two of the 32 batches, a quarter and two thirds along
        self.weights = sum(p.numel() for p in where.layers.parameters())  # of the decoder's blocks
        inner: Any = getattr(self.model, "model", self.model)  # where transformers has the tower, since 5.24
        self.tower, self.projector = inner.audio_tower, inner.multi_modal_projector

    def prompts(self, frames: Sequence[int], more: int = 0) -> list[Prompt]:
        """Prompts of these clips, with `more` tokens at the end. They share the ids before the audio alone."""
        out, hidden = [], self.reader.location.head_weight.shape[1]
        for i, n in enumerate(frames, 1):
            ids = torch.cat([torch.zeros(BEFORE).long(), torch.full((n + AFTER + more,), i)])
            out.append(Prompt(ids, torch.empty(n, hidden, device=META, dtype=torch.bfloat16), BEFORE, True))
        return out

    def heard(self, clips: int) -> Tensor:
        """Runs the audio tower and the projector for so many clips, in the tower's window."""
        sizes = SIZES[self.size]
        mel = torch.empty(clips, sizes["mel"], 100 * sizes["window"], device=META, dtype=torch.bfloat16)
        return self.projector(self.tower(mel).last_hidden_state)

    def whole(self, prompts: Sequence[Prompt]) -> Any:
        """The whole model on a padded batch, as the recipe runs it."""
        self.heard(len(prompts))
        inputs = self.reader.collate(prompts)
        n = inputs["inputs_embeds"].shape[:2]  # a ready mask: what is in another one would decide, and nothing is
        inputs["attention_mask"] = torch.ones(n[0], 1, n[1], n[1], dtype=torch.bool, device=META)
        out = self.reader.location.decoder(**inputs, output_hidden_states=True, use_cache=False)
        return out, self.reader.location.head(out[0])  # all hidden states and all logits

    # -- a training step of two batches

    def our_step(self, batches: Sequence[Sequence[int]]) -> None:
        for frames in batches:
            prompts = self.prompts(frames)
            items = [TrainItem(Example("x"), "audio-only", torch.zeros(p.rows[:1].shape)) for p in prompts]
            to_targets(self.reader, prompts, items).mean().backward()
        (self.config.penalty * self.lora.penalty()).backward()

    def their_step(self) -> None:
        for _ in range(2):
            out, _logits = self.whole(self.prompts(self.frames))
            loss = F.mse_loss(out[0][:, -1].float(), torch.empty_like(out[0][:, -1], dtype=torch.float32))
            for a, b in zip(self.lora.A, self.lora.B, strict=True):
                loss = loss + self.config.penalty * ((self.lora.scale * b @ a) ** 2).sum()
            loss.backward()

    # -- extraction of a harmful and a benign example with each length: R_b, R_h and R_h+

    @torch.no_grad()
    def our_extraction(self, refused: int) -> None:
        """EACH times as many, in batches of one length, R_h+ of `refused` of them; without the audio tower, which hears
        each clip once."""
        for n in self.frames:
            for more, times in ((0, EACH), (0, EACH), (REFUSAL, refused)):
                self.reader.last_hidden(self.prompts([n] * times, more))

    @cached_property
    def hearing(self) -> tuple[int, int]:
        """What one clip costs."""
        return counted(torch.no_grad()(lambda: self.heard(1)))

    def our_cost(self, refused: int) -> tuple[int, int]:
        """Of extraction, an example of each side and length: operations, and bytes at the peak."""
        (once, alone), (all_, batch) = self.hearing, counted(lambda: self.our_extraction(refused))
        return all_ // EACH + 2 * len(SECONDS) * once, max(alone, batch)

    @torch.no_grad()
    def their_extraction(self) -> None:
        for n in self.frames:
            for more in (0, 0, REFUSAL):
                self.whole(self.prompts([n], more))

    def floor_of_step(self, batches: Sequence[Sequence[int]]) -> float:
        return 4.0 * self.weights * sum(BEFORE + sum(frames) + AFTER * len(frames) for frames in batches)

    def floor_of_extraction(self, refused: float = 1.0) -> float:
        """R_h+ adds to R_h what the refusal prompt adds, for a share of the examples."""
        tower, own = sum(p.numel() for p in self.tower.parameters()), sum(self.frames) + AFTER * len(self.frames)
        heard = 2.0 * tower * 50 * SIZES[self.size]["window"] * 2 * len(self.frames)
        return heard + 2.0 * self.weights * (2 * own + refused * REFUSAL * len(self.frames))


def table(sizes: Sequence[str] = ("7b", "omni-7b")) -> str:
    """Markdown: what each side needs, and how far it is from the floor."""
    lines = [
        "| | step, 10¹² operations | ÷ floor | step, GB | extraction, 10¹² operations | ÷ floor | extraction, GB |"
    ]
    lines.append("| --- " * 7 + "|")
    for size in sizes:
        case = Case(size)
        still = sum(p.numel() * p.element_size() for p in case.model.parameters())
        state = still + 12 * sum(p.numel() for p in case.lora.parameters())  # AdamW's moments; gradients are counted
        random = [case.frames] * 2
        floor, floor_of_step = case.floor_of_extraction(), case.floor_of_step(random)
        lines.append(f"| {size}, floor | {floor_of_step / 1e12:.1f} | 1 | – | {floor / 1e12:.1f} | 1 | – |")
        few = case.floor_of_extraction(FEW / EACH)
        sides = {
            "ours": (partial(case.our_step, random), floor_of_step, case.our_cost(EACH), floor),
            FEWER: (partial(case.our_step, case.grouped), case.floor_of_step(case.grouped), case.our_cost(FEW), few),
            "the recipe's": (case.their_step, floor_of_step, counted(case.their_extraction), floor),
        }
        for name, (step, least, (vectors, most), least_vectors) in sides.items():
            flops, peak = counted(step)
            case.lora.zero_grad(set_to_none=True)
            cells = [f"{flops / 1e12:.1f}", f"{flops / least:.2f}", f"{(state + peak) / 1e9:.1f}"]
            cells += [f"{vectors / 1e12:.1f}", f"{vectors / least_vectors:.2f}", f"{(still + most) / 1e9:.1f}"]
            lines.append(f"| {size}, {name} | {' | '.join(cells)} |")
    about = (
        f"A step: two batches of {len(SECONDS)} prompts with clips of {SECONDS} s; grouped, two of the batches that 128"
        f" clips of 3 to 8 s give, against their own floor; so is R_h+ of one in {EACH // FEW} harmful examples."
    )
    return "\n".join([*lines, f"\n{about} Extraction: a harmful and a benign example with each of the four lengths."])


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
