"""Speech for the demo LALM's training: sentences, spoken, and what its ear makes of them.

Sentences are templates filled with words (both in `demo_lalm/sentences.json`), words in random order, and what SmolLM2
itself writes into an empty user turn. hibari-tts (one voice), many espeak-ng voices and three flite voices speak them.

    python demo_speech.py --clips 3000          # begun again, it goes on where it was; then train_demo.py

Needs `pip install "rrs[demo]" scipy`, espeak-ng and flite (Debian: apt install espeak-ng flite).
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
import soundfile
import torch
from demo_lalm import DemoLALM, Listener, load_demo
from make_data import speak_flite, speak_hibari
from safetensors.torch import load_file, save_file
from scipy.signal import resample_poly
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

RATE = 16000
MAX_SECONDS = 6.5  # of a training clip
SHARD = 250  # clips of a file
# Speaker f2 of espeak-ng in any accent and flite's slt are never trained on; nor are the held-out questions.
SPEAKERS = ["", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+f1", "+f3", "+f4", "+f5", "+klatt4", "+max"]
SPEAKERS += ["+Andy", "+Annie", "+linda", "+Mike", "+steph", "+belinda", "+adam", "+john", "+paul", "+victor"]
ACCENTS = ["en-us", "en-us", "en-us", "en", "en-gb-x-rp", "en-us-nyc"]
SENTENCES = json.loads((Path(__file__).parent / "demo_lalm" / "sentences.json").read_text(encoding="utf-8"))

# ---------------------------------------------------------------------------------------------------------------------
# Text


def template_text(rng: random.Random) -> str:
    """A template with every {slot} filled at random, "a" turned to "an" where it must be."""
    text = rng.choice(SENTENCES[rng.choice(["how", "how", "about", "misc"])])
    while slot := re.search(r"\{(\w+)\}", text):
        text = text[: slot.start()] + rng.choice(SENTENCES[slot[1]]) + text[slot.end() :]
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def common_words(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Lower-case words that are one token of the LM, most frequent first (BPE merges are in that order)."""
    import hibari

    packed = Path(hibari.__file__).parent / "assets" / "lexicon_us_gold.json.gz"
    lexicon = json.loads(gzip.decompress(packed.read_bytes()))
    words = (tokenizer.decode([token]) for token in range(14000))
    return [word[1:] for word in words if re.fullmatch(r" ([a-z]{2,}|a|i)", word) and word[1:] in lexicon]


def salad_text(words: list[str], rng: random.Random) -> str:
    """Words in no order: no context to lean on, so the sounds themselves must be learned; covers the vocabulary."""
    text = " ".join(words[int(len(words) * rng.random() ** 2)] for _ in range(rng.randint(4, 9)))
    return text[0].upper() + text[1:] + "."


def clean_text(text: str) -> str | None:
    """A sampled sentence, if it is one short plain English sentence; else None."""
    text = text.strip().split("\n")[0].replace("’", "'").strip('" ')
    sentences = re.split(r"(?<=[.?!])\s+", text)
    text = next((s for s in sentences if 3 <= len(s.split()) <= 14), "")
    if not re.fullmatch(r"[A-Z][A-Za-z ,'-]+[.?!]", text) or re.search(r"[a-z][A-Z]|SmolLM|Hugging", text):
        return None
    return text


@torch.inference_mode()
def sample_texts(model: DemoLALM, tokenizer: PreTrainedTokenizerBase, n: int) -> Iterator[str]:
    """Sentences that the language model writes when asked for nothing: it continues an empty user turn."""
    torch.manual_seed(0)
    rng = random.Random(0)
    while n > 0:
        start = rng.choice(SENTENCES["start"])
        prompt = tokenizer(["<|im_start|>user\n" + start] * 48, return_tensors="pt")
        out = model.generate(**prompt, do_sample=True, temperature=0.9, top_p=0.95, max_new_tokens=20)
        texts = tokenizer.batch_decode(out[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        good = [sentence for text in texts if (sentence := clean_text(start + text))]
        n -= len(good)
        yield from good


# ---------------------------------------------------------------------------------------------------------------------
# Speech


def resample(audio: np.ndarray, rate: float) -> np.ndarray:
    """To 16 kHz, polyphase windowed sinc."""
    ratio = Fraction(RATE / rate).limit_denominator(500)
    return resample_poly(audio, ratio.numerator, ratio.denominator).astype(np.float32)


def speak_espeak(text: str, voice: str, words_a_minute: int = 165, pitch: int = 50) -> tuple[np.ndarray, int]:
    command = ["espeak-ng", "-v", voice, "-s", str(words_a_minute), "-p", str(pitch), "--stdout", text]
    spoken = subprocess.run(command, capture_output=True, check=True).stdout
    return soundfile.read(io.BytesIO(spoken), dtype="float32")


def speak(text: str, rng: random.Random) -> np.ndarray:
    """The text in a random voice, at a random pace, as 16 kHz audio."""
    engine = rng.choices(["hibari", "espeak-ng", "flite"], [0.45, 0.25, 0.3])[0]
    warp = 1.0  # playing at another rate shifts pitch and formants: one voice becomes many
    if engine == "hibari":
        audio, rate = speak_hibari(text, "heart", rng.uniform(0.9, 1.4), rng.getrandbits(31))
        warp = rng.uniform(0.82, 1.12) if rng.random() < 0.6 else 1.0
    elif engine == "espeak-ng":
        voice = rng.choice(ACCENTS) + rng.choice(SPEAKERS)
        audio, rate = speak_espeak(text, voice, rng.randint(150, 230), rng.randint(25, 75))
    else:
        audio, rate = speak_flite(text, rng.choice(["rms", "rms", "awb", "kal16"]), 1 / rng.uniform(0.75, 1.1))
        warp = rng.uniform(0.88, 1.12) if rng.random() < 0.5 else 1.0
    return resample(audio, rate * warp)


def augment(audio: np.ndarray, rng: random.Random) -> np.ndarray:
    """Silence at the ends, level, spectral tilt, noise."""
    noise = np.random.default_rng(rng.getrandbits(32))
    audio = np.pad(audio, (int(rng.uniform(0, 0.2) * RATE), int(rng.uniform(0.02, 0.25) * RATE)))
    audio = audio / (np.abs(audio).max() + 1e-6)
    if rng.random() < 0.4:  # first-order tilt: darker or brighter
        audio = audio - rng.uniform(-0.5, 0.6) * np.pad(audio, (1, 0))[:-1]
        audio = audio / (np.abs(audio).max() + 1e-6)
    if rng.random() < 0.6:
        hiss = noise.standard_normal(len(audio))
        if rng.random() < 0.5:
            hiss = np.convolve(hiss, np.ones(8) / 8, "same")
        level = np.sqrt(np.mean(audio**2)) * 10 ** (-rng.uniform(12, 40) / 20)
        audio = audio + hiss * level / (hiss.std() + 1e-9)
    return (audio * 10 ** (-rng.uniform(0, 20) / 20)).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# What the ear gives for a sentence, and what the language model answers to it


@dataclass
class Heard:
    """One training example."""

    text: str
    slots: int
    """Audio tokens of the clip."""
    words: Tensor
    """What the projector gives for its filled slots `[words, hidden]`; the other slots are all alike."""
    answer: list[int]
    """The first tokens of the untrained language model's answer to the text."""


def norm(text: str) -> str:
    return " ".join(re.findall(r"[a-z']+|\d+", text.lower()))


def excluded_texts() -> set[str]:
    """Normalised texts that must not be trained on: the held-out questions and the demo data."""
    paths = (Path(__file__).resolve().parent / "data").glob("*.jsonl")
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines() if line]
    held_out = SENTENCES["held_out"] + SENTENCES["held_out_harmful"]
    return {norm(text) for text in [*held_out, *(row["text"] for row in rows)]}


def word_errors(reference: str, heard: str) -> tuple[int, int]:
    """Levenshtein distance in words, and the number of words of the reference."""
    a, b = norm(reference).split(), norm(heard).split()
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1], len(a)


@torch.inference_mode()
def synth_shard(texts: list[str], seed: int, path: Path) -> None:
    """Speak the texts of one shard, listen, and save what was heard and what the language model answers."""
    torch.set_num_threads(1)
    model, processor = load_demo(trained=False)
    tokenizer, rng = processor.tokenizer, random.Random(seed)
    spoken = [(text, augment(speak(text, rng), rng)) for text in texts]
    spoken = [(text, clip) for text, clip in spoken if len(clip) <= MAX_SECONDS * RATE]
    tensors: dict[str, Tensor] = {}
    lexicon = model.model.multi_modal_projector
    embeddings = model.get_input_embeddings().weight
    end = lexicon.values.weight[:, Listener.END]
    answers = generate(model, processor, [[{"type": "text", "text": text}] for text, _ in spoken], None, 8, "answers")
    for i, (text, clip) in enumerate(spoken):
        features = processor.feature_extractor(
            clip, sampling_rate=RATE, return_attention_mask=True, return_tensors="pt"
        )
        slots = (int(features["attention_mask"].sum()) - 1) // Listener.SLOT + 1
        words = lexicon(model.model.audio_tower(features["input_features"]).last_hidden_state)[0, :slots]
        words = words[(words - end).norm(dim=-1) > 1e-3]
        near = embeddings[:-3] @ words.T / embeddings[:-3].norm(dim=-1, keepdim=True)  # [vocabulary, words]
        errors, length = word_errors(text, tokenizer.decode(near.argmax(0)))
        if len(words) and errors <= length / 2:  # else there is nothing to learn from it but to make things up
            tensors[f"{i}.words"] = words.half()
            tensors[f"{i}.answer"] = torch.tensor(answers[i])
            tensors[f"{i}.slots"] = torch.tensor(slots)
            tensors[f"{i}.text"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@torch.inference_mode()
def generate(
    model: DemoLALM, processor, contents: list[list[dict]], audios: list[np.ndarray] | None, tokens: int, label: str
) -> list[list[int]]:
    """Greedy answers to user turns, as token ids up to the end. One audio for each turn, or none at all."""
    out = []
    stop = model.generation_config.eos_token_id
    chats = [[{"role": "user", "content": content}] for content in contents]
    for i in tqdm(range(0, len(chats), 8), desc=label, leave=False):
        prompts = processor.apply_chat_template(chats[i : i + 8], add_generation_prompt=True, tokenize=False)
        audio = audios[i : i + 8] if audios else None
        inputs = processor(text=prompts, audio=audio, sampling_rate=RATE, padding=True, return_tensors="pt")
        for row in model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1] :].tolist():
            out.append(row[: row.index(stop) + 1] if stop in row else row)
    return out


def synth(args: argparse.Namespace) -> None:
    """Write the shards that are not there yet, until there are --clips."""
    if missing := [program for program in ("espeak-ng", "flite") if not shutil.which(program)]:
        raise SystemExit(f"Missing programs: {' '.join(missing)} (Debian: apt install {' '.join(missing)})")
    args.work.mkdir(parents=True, exist_ok=True)
    model, processor = load_demo(trained=False)
    sampled = list(tqdm(sample_texts(model, processor.tokenizer, 150), desc="sentences by the LM"))
    words, excluded = common_words(processor.tokenizer), excluded_texts()
    jobs = []
    for index in range(math.ceil(args.clips / SHARD)):
        rng, texts = random.Random(1000 + index), []
        for kind in rng.choices(["template", "sampled", "salad"], [0.6, 0.25, 0.15], k=SHARD):
            if kind == "sampled":
                texts.append(rng.choice(sampled))
            else:
                texts.append(salad_text(words, rng) if kind == "salad" else template_text(rng))
        path = args.work / f"{index:04d}.safetensors"
        if not path.exists():
            jobs.append(([text for text in texts if norm(text) not in excluded], index, path))
    with multiprocessing.get_context("spawn").Pool() as pool:
        results = [pool.apply_async(synth_shard, job) for job in jobs]
        for result in tqdm(results, desc=f"shards of {SHARD} clips"):
            result.get()


def read_shards(folder: Path) -> list[Heard]:
    """All examples, by length: a batch is a stretch of them."""
    examples = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        rows = load_file(path)
        for i in sorted({name.split(".")[0] for name in rows}, key=int):
            text = bytes(rows[f"{i}.text"].tolist()).decode()
            words, answer = rows[f"{i}.words"].float(), rows[f"{i}.answer"].tolist()
            examples.append(Heard(text, int(rows[f"{i}.slots"]), words, answer))
    if not examples:
        raise SystemExit(f"{folder} holds no shards: run `python demo_speech.py --work {folder}` first")
    return sorted(examples, key=lambda e: e.slots + len(e.text) / 6)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder for the shards")
    parser.add_argument("--clips", type=int, default=3000, help="clips in all, in shards of 250")
    synth(parser.parse_args())
