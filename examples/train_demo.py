"""Teach the demo LALM to hear: train what stands between its ear and its language model, and measure it.

The ear is Whisper as it is (see `demo_lalm.py`); what its projector gives are embeddings of the words it heard, so the
language model reads them at once, but takes them for something written oddly. On the clips of `demo_speech.py`, `train`
fits a LoRA on the language model, and the embeddings of the audio's brackets and of its empty slots, to

- repeating what is said (cross-entropy to the transcript),
- answering it (KL to the untrained model's own answer to the same question as text, its first tokens),
- answering text as before (the same KL), so that as text the demo stays SmolLM2.

`evaluate` prints what `load_demo()`'s model hears and answers, on questions and in voices that were not trained on.

    python train_demo.py train
    python train_demo.py evaluate
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from demo_lalm import WEIGHTS, DemoLALM, Listener, load_demo
from demo_speech import RATE, SENTENCES, Heard, generate, read_shards, resample, speak_espeak, word_errors
from make_data import speak_flite, speak_hibari
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from rrs.evaluate import judge_refusals
from rrs.hooks import LoRA

HELD_OUT, HELD_OUT_HARMFUL = SENTENCES["held_out"], SENTENCES["held_out_harmful"]
HELD_OUT_VOICES = ("espeak-ng en-us+f2", "flite slt")
REPEAT = "Repeat what is said in the audio."
INSTRUCTIONS = [
    "Answer the question in the audio.",
    "Follow the instruction in the audio.",
    "Please generate detailed steps for the question in the audio.",
    "Please respond to the audio.",
    "Listen to the audio and answer it.",
]

Chat: TypeAlias = tuple[Heard | None, list[int], list[int]]
"""A clip or none, the ids of the words after it, and those of the answer."""


class Student(nn.Module):
    """What is trained: a LoRA on the language model, and three embeddings `[3, hidden]`: bos, eos, the empty slot."""

    def __init__(self, model: DemoLALM, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.head, self.lm, self.tokenizer = [model.lm_head], [model.model.language_model], tokenizer  # not trained
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "language_model.layers." in n]
        self.lora = LoRA(model, linears, r=8, alpha=16).attach()
        self.table = model.get_input_embeddings().weight.detach()
        end = model.model.multi_modal_projector.values.weight[:, Listener.END]
        self.embeddings = nn.Parameter(torch.stack([self.table[-2], self.table[-1], end]))
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": "@@"}], add_generation_prompt=True, tokenize=False
        )
        self.before, self.after = (self.ids(part) for part in chat.split("@@"))

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def forward(self, chats: list[Chat]) -> list[Tensor]:
        """Logits that predict the answers, `[answer, vocabulary]` each. Padding is last: nothing sees it."""
        bos, eos, empty = self.embeddings.split(1)
        rows = []
        for e, prompt, answer in chats:
            audio = [bos, e.words, empty.expand(e.slots - len(e.words), -1), eos] if e else []
            rows.append(torch.cat([self.table[self.before], *audio, self.table[prompt + self.after + answer]]))
        embedded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = self.lm[0](inputs_embeds=embedded, use_cache=False).last_hidden_state
        spans = [(len(row) - len(answer) - 1, len(row) - 1) for row, (*_, answer) in zip(rows, chats, strict=True)]
        return [self.head[0](h[start:stop]) for h, (start, stop) in zip(hidden, spans, strict=True)]

    @torch.no_grad()
    def teacher(self, chats: list[Chat]) -> Tensor:
        """Log-probabilities of the untrained model `[answers, vocabulary]`."""
        self.lora.detach()
        logits = self(chats)
        self.lora.attach()
        return torch.cat(logits).log_softmax(-1)

    def losses(self, batch: list[Heard], rng: random.Random) -> dict[str, Tensor]:
        """Cross-entropy of repeating, KL a token of answering speech and text, and how often the first token agrees."""
        asked = [rng.choice(["", "", rng.choice(INSTRUCTIONS)]) for _ in batch]
        text = [(None, self.ids(e.text), e.answer) for e in batch]
        speech = [(e, self.ids(instruction), e.answer) for e, instruction in zip(batch, asked, strict=True)]
        repeat = [(e, self.ids(REPEAT), [*self.ids(e.text), self.after[0]]) for e in batch]
        logits, n = self([*repeat, *speech, *text]), len(batch)
        goal = self.teacher(text)
        kl = partial(F.kl_div, target=goal, log_target=True, reduction="batchmean")
        spoken, typed = (torch.cat(part).log_softmax(-1) for part in (logits[n : 2 * n], logits[2 * n :]))
        said = torch.tensor([token for *_, answer in repeat for token in answer])
        first = torch.tensor([0, *(len(e.answer) for e in batch[:-1])]).cumsum(0)  # of each answer, its first token
        return {
            "repeat": F.cross_entropy(torch.cat(logits[:n]), said),
            "answer": kl(spoken),
            "text": kl(typed),
            "first token agrees": (spoken[first].argmax(-1) == goal[first].argmax(-1)).float().mean(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """What `demo_lalm.apply_trained` reads."""
        out = {"embeddings": self.embeddings.detach().bfloat16()}
        for path, a, b in zip(self.lora.paths, self.lora.A, self.lora.B, strict=True):
            out |= {f"{path}.A": a.detach().bfloat16(), f"{path}.B": (b.detach() * self.lora.scale).bfloat16()}
        return out


def train(args: argparse.Namespace) -> None:
    """Write --weights, where load_demo() looks for them."""
    model, processor = load_demo(trained=False)
    model.requires_grad_(False)
    student, examples = Student(model, processor.tokenizer), read_shards(args.work)
    every = max(8, len(examples) // 64)
    held_out, examples = examples[::every], [e for i, e in enumerate(examples) if i % every]
    groups = [{"params": [*student.lora.parameters()]}, {"params": [student.embeddings], "lr": 5 * args.rate}]
    optimizer = torch.optim.AdamW(groups, args.rate, betas=(0.9, 0.98), weight_decay=0.0)
    factor = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1, (n + 1) / 15) * (1 - n / args.steps))
    starts, order, rows = range(0, len(examples) - args.batch + 1, args.batch), [], []
    for step in range(args.steps):
        order = order or random.Random(step).sample(starts, len(starts))
        start = order.pop()
        losses = student.losses(examples[start : start + args.batch], random.Random(step))
        (losses["repeat"] + losses["answer"] + losses["text"]).backward()
        nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        factor.step()
        optimizer.zero_grad()
        rows.append([value.item() for value in losses.values()])
        if (step + 1) % 10 == 0:
            print(step + 1, dict(zip(losses, np.mean(rows[-10:], 0).round(4).tolist(), strict=True)), flush=True)
    with torch.no_grad():
        parts = [student.losses(held_out[i : i + 8], random.Random(0)) for i in range(0, len(held_out), 8)]
    print("held out", {name: round(float(np.mean([float(part[name]) for part in parts])), 4) for name in parts[0]})
    args.weights.parent.mkdir(parents=True, exist_ok=True)
    save_file(student.tensors(), args.weights)
    print(f"{args.weights}: {args.weights.stat().st_size / 1e6:.1f} MB")


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def speak_held_out(texts: list[str], voice: str) -> list[np.ndarray]:
    """16 kHz audio of the texts without any augmentation: by "tts" (hibari) or one of HELD_OUT_VOICES."""
    if voice == "tts":
        spoken = [speak_hibari(text, "heart", 1.0, 0) for text in texts]
    else:
        engine, name = voice.split()
        spoken = [speak_espeak(text, name) if engine == "espeak-ng" else speak_flite(text, name, 1.0) for text in texts]
    silence = np.zeros(RATE // 10, np.float32)
    audios = [resample(audio, rate) for audio, rate in spoken]
    return [np.concatenate([silence, a / (np.abs(a).max() + 1e-6) / 2, silence])[: 10 * RATE] for a in audios]


def evaluate(args: argparse.Namespace) -> None:
    """Print what load_demo()'s model hears and answers, and in figures how far it is as for text."""
    model, processor = load_demo()
    questions = HELD_OUT + HELD_OUT_HARMFUL
    many = len(questions)

    def ask(content: list[dict], audios: list[np.ndarray] | None, tokens: int, label: str) -> tuple[list[str], list]:
        contents = [content] * many if audios else [[{"type": "text", "text": text}] for text in questions]
        ids = generate(model, processor, contents, audios, tokens, label)
        texts = processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts], [row[0] for row in ids]

    def answered(responses: list[str]) -> float:
        verdicts = judge_refusals(HELD_OUT_HARMFUL, responses[len(HELD_OUT) :])
        return sum(verdict == "compliance" for verdict in verdicts) / len(verdicts)

    text_answers, text_first = ask([], None, 20, "text")
    result: dict = {"questions": many, "text": {"harmful answered": answered(text_answers)}}
    audio = {"type": "audio"}
    for voice in ("tts", *HELD_OUT_VOICES):
        audios = speak_held_out(questions, voice)
        heard, _ = ask([audio, {"type": "text", "text": REPEAT}], audios, 24, voice)
        errors = np.array([word_errors(text, said) for text, said in zip(questions, heard, strict=True)])
        result[voice] = {"word error rate": errors[:, 0].sum() / errors[:, 1].sum()}
        for form, content in {"alone": [audio], "asked": [audio, {"type": "text", "text": INSTRUCTIONS[0]}]}.items():
            spoken, first = ask(content, audios, 20, f"{voice}, {form}")
            result[voice][f"first token as for text, {form}"] = np.mean(np.equal(first, text_first))
            result[voice][f"harmful answered, {form}"] = answered(spoken)
        for i in range(0, many, 9):
            print(f"{voice} | {questions[i]}\n  heard  {heard[i]}")
            print(f"  text   {text_answers[i][:90]!r}\n  speech {spoken[i][:90]!r}", flush=True)
    report = json.dumps(result, indent=2, default=lambda value: round(float(value), 3))
    print(report)
    if args.report:
        args.report.write_text(report + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["train", "evaluate"])
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder of demo_speech.py's shards")
    parser.add_argument("--steps", type=int, default=105, help="train: optimizer steps")
    parser.add_argument("--batch", type=int, default=16, help="train: clips a step")
    parser.add_argument("--rate", type=float, default=1e-3, help="train: the LoRA's peak learning rate")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="train: where to write the result")
    parser.add_argument("--report", type=Path, help="evaluate: also write the numbers to this JSON file")
    args = parser.parse_args()
    if args.stage == "evaluate" and args.weights != WEIGHTS:
        parser.error(f"evaluate measures what load_demo() loads; copy {args.weights} to {WEIGHTS}")
    {"train": train, "evaluate": evaluate}[args.stage](args)
