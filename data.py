"""Examples in, model inputs out: manifests, audio decoding, resampling, and the three input conditions."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import Tensor

Wave: TypeAlias = npt.NDArray[np.float32]
Label: TypeAlias = Literal["harmful", "benign"]

CONDITIONS = ("audio-text", "text-only", "audio-only", "text-content")
"""What the model is given: the spoken question with a text instruction; the question typed; the spoken question alone;
the question typed in the paper's second form, `TEXT_CONTENT`."""

TEXT_CONTENT = "The audio content is: {question}. {instruction}"


class DataError(ValueError):
    """Something is wrong with the data that was passed; the message names file and row, and says what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Examples


@dataclass(frozen=True)
class Example:
    """One question: spoken, written or both."""

    id: str
    """Unique name; it appears in every report."""
    text: str | None = None
    """The question in words; `None` if there is only audio."""
    audio: Any = field(default=None, repr=False)
    """A path, encoded bytes, `{"array": [samples(, channels)], "sampling_rate": hz}`, or `None`."""
    label: Label | None = None
    """`"harmful"` (should be refused) or `"benign"` (should be answered)."""
    category: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Whatever else the row held (twin, voice, …)."""

    def has(self, condition: str) -> bool:
        """Whether the example holds what `condition` needs: text, audio."""
        return (self.text if condition.startswith("text") else self.audio) is not None

    @property
    def clip(self) -> tuple[str, Callable[[int], Wave]]:
        """`(key, load)`: a key equal for equal clips, and a function from sampling rate to waveform."""
        key = str(self.audio) if isinstance(self.audio, (str, Path)) else f"{self.id}@{id(self.audio)}"
        return key, lambda rate: load_audio(self.audio, rate, name=self.id)


def load_examples(source: Any, label: Label | None = None) -> list[Example]:
    """Examples from a manifest, a list of `Example`s, or any iterable of dicts.

    Manifests: JSONL with rows `id, audio, text, label, category, …`, or the RRS authors' JSON list with rows
    `prompt, category, path`. Audio paths are relative to the manifest's folder.

    Args:
        source: a path, or an iterable of `Example` or dict.
        label: given to rows that have none. Rows that carry the *other* label are left out, so that one file can
            serve as `harmful=` and as `benign=`.

    Raises:
        DataError: names file and row.
    """
    if isinstance(source, (str, Path)):
        path = Path(source)
        rows: Iterable[Any] = _read_rows(path)
        folder, name = path.parent, str(path)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"Examples must be a path or an iterable of dicts, not {type(source).__name__}.")
    else:
        rows, folder, name = source, None, "examples"
    examples = [_example(row, f"{name}, row {i}", i, folder) for i, row in enumerate(rows, 1)]
    seen: dict[str, int] = {}
    for i, example in enumerate(examples, 1):
        if example.id in seen:
            raise DataError(
                f"{name}: rows {seen[example.id]} and {i} have the same id {example.id!r}; ids must differ."
            )
        seen[example.id] = i
    if label:
        examples = [
            e if e.label else Example(e.id, e.text, e.audio, label, e.category, e.meta)
            for e in examples
            if e.label in (None, label)
        ]
    if not examples:
        raise DataError(f"{name}: no {label + ' ' if label else ''}examples in it.")
    return examples


def _read_rows(path: Path) -> list[Any]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}).") from None
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
        return list(rows)
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}); one object a line.") from None
    return rows


def _example(row: Any, where: str, number: int, folder: Path | None) -> Example:
    if isinstance(row, Example):
        return row
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with 'text' and/or 'audio', got {type(row).__name__}.")
    rest = dict(row)
    text = rest.pop("text", None) or rest.pop("prompt", None)  # the authors' rows say prompt and path
    audio = rest.pop("audio", None) or rest.pop("path", None)
    label = rest.pop("label", None)
    if label not in ("harmful", "benign", None):
        raise DataError(f"{where}: label {label!r} is neither 'harmful' nor 'benign'.")
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: 'text' must be a string, not {type(text).__name__}.")
    if text is None and audio is None:
        raise DataError(f"{where}: neither 'text' nor 'audio' in {sorted(row)}.")
    if isinstance(audio, (str, Path)):
        audio = Path(audio) if folder is None else folder / audio
        if not audio.is_file():
            raise DataError(f"{where}: audio file {audio} does not exist.")
    return Example(str(rest.pop("id", f"row-{number}")), text, audio, label, rest.pop("category", None), rest)


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(source: Any, rate: int, *, name: str = "audio", max_seconds: float | None = None) -> Wave:
    """Any audio as mono float32 `[samples]` in [-1, 1] at `rate` Hz.

    Args:
        source: a path, encoded bytes, or `{"array": …, "sampling_rate": …}` with `[samples]` or `[samples, channels]`.
        rate: wanted sampling rate; the processors of transformers do not resample.
        name: how errors call the clip.
        max_seconds: longer clips raise.

    Raises:
        DataError: unreadable, empty, non-finite or too long.
    """
    if isinstance(source, Mapping):
        if not {"array", "sampling_rate"} <= source.keys():
            raise DataError(f"{name}: an audio dict needs 'array' and 'sampling_rate', it has {sorted(source)}.")
        wave, source_rate = np.asarray(source["array"]), int(source["sampling_rate"])
        if np.issubdtype(wave.dtype, np.integer):
            wave = wave / -float(np.iinfo(wave.dtype).min or -np.iinfo(wave.dtype).max)
    else:
        name = f"{name} ({source})" if isinstance(source, (str, Path)) else name
        try:
            file = io.BytesIO(source) if isinstance(source, bytes) else str(source)
            wave, source_rate = soundfile.read(file, dtype="float32", always_2d=True)
        except (soundfile.LibsndfileError, OSError, TypeError, RuntimeError) as error:
            raise DataError(f"{name}: can't be decoded as audio ({error}); re-encode it as WAV, FLAC or OGG.") from None
    wave = wave.astype(np.float32)
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    if wave.ndim != 1 or not len(wave):
        raise DataError(f"{name}: no samples (shape {list(wave.shape)}).")
    if not np.isfinite(wave).all():
        raise DataError(f"{name}: NaN or infinite samples; re-export the clip.")
    if max_seconds is not None and len(wave) > max_seconds * source_rate:
        raise DataError(
            f"{name}: {len(wave) / source_rate:.1f} s is longer than the {max_seconds:g} s the model hears; cut it."
        )
    return resample(wave, source_rate, rate)


def resample(wave: Wave, rate: int, new_rate: int, zeros: int = 24, rolloff: float = 0.945) -> Wave:
    """Band-limited resampling of `[samples]`, by a polyphase windowed sinc.

    Args:
        zeros: zero crossings of the sinc on either side; more is sharper and slower.
        rolloff: cut-off as a share of the lower Nyquist frequency.

    Source: Smith, "Digital Audio Resampling"; Kaiser window, β = 14.77 (about 120 dB beyond the transition band).
    """
    if rate <= 0 or new_rate <= 0:
        raise DataError(f"Sampling rates must be positive, got {rate} and {new_rate} Hz.")
    if rate == new_rate:
        return wave
    divisor = math.gcd(rate, new_rate)
    up, down = new_rate // divisor, rate // divisor
    kernels, width = _sinc_kernels(up, down, zeros, rolloff)
    padded = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(wave))[None, None], (width, width + down))
    # One strided convolution per output phase: [1, 1, samples] -> [1, up, frames] -> interleaved [frames * up]
    out = torch.nn.functional.conv1d(padded, kernels, stride=down)[0].T.reshape(-1)
    return out[: math.ceil(len(wave) * up / down)].numpy()


@lru_cache(maxsize=16)
def _sinc_kernels(up: int, down: int, zeros: int, rolloff: float) -> tuple[Tensor, int]:
    """Kernels `[up, 1, 2 * width + down]`: one windowed sinc for each output phase."""
    cutoff = min(up, down) * rolloff / down  # in units of the source's Nyquist frequency
    width = math.ceil(zeros / cutoff)
    # Output phase p sits at source time p * down / up; tap k looks at source sample k - width.
    time = torch.arange(-width, width + down, dtype=torch.float64) - torch.arange(up, dtype=torch.float64)[:, None] * (
        down / up
    )
    position = time * cutoff
    beta = torch.tensor(14.769656459379492, dtype=torch.float64)
    window = torch.i0(beta * (1 - (position / zeros) ** 2).clamp(min=0).sqrt()) / torch.i0(beta)
    kernels = cutoff * torch.sinc(position) * window * (position.abs() <= zeros)
    return kernels.float()[:, None], width


# ---------------------------------------------------------------------------------------------------------------------
# Model inputs


def user_turn(example: Example, condition: str, instruction: str, refusal_prompt: str = "") -> str | None:
    """The text of the user's turn in a condition; `None` if the turn is audio alone.

    Args:
        instruction: goes with the audio (audio-text, text-content).
        refusal_prompt: appended, to put the vanilla model into the refusal zone.
    """
    if condition == "audio-text":
        text = instruction
    elif condition == "text-only":
        text = str(example.text)
    elif condition == "text-content":
        text = TEXT_CONTENT.format(question=str(example.text).rstrip(".?! "), instruction=instruction)
    elif condition == "audio-only":
        text = ""
    else:
        raise ValueError(f"Unknown condition {condition!r}; there are {CONDITIONS}.")
    return " ".join(part for part in (text, refusal_prompt) if part) or None


# What differs between processors, as data.
TEMPLATE_ONLY = ("VoxtralProcessor",)  # audio goes in through apply_chat_template alone, as a path or in base64
TEMPLATES = {  # for processors whose checkpoints come without one
    "Phi4MultimodalProcessor": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ audio_token if c['type'] == 'audio' else c['text'] }}{% endfor %}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
}
SECONDS = {"Gemma3nAudioFeatureExtractor": 30.0, "Gemma4AudioFeatureExtractor": 30.0}  # they cut silently beyond
PACKAGES = {  # what processors import beyond our own requirements
    "torchvision": "torchvision pillow", "pil library": "pillow", "torchaudio": "torchaudio",
    "mistral": "'mistral-common[audio]'", "librosa": "librosa", "timm": "timm torchvision",
    "sentencepiece": "sentencepiece",
}  # fmt: skip


@contextmanager
def needed_packages(what: str) -> Iterator[None]:
    """Adds the exact `pip install` line to an ImportError raised inside the `with`."""
    try:
        yield
    except ImportError as error:
        said = str(error).lower()
        packages = sorted({package for word, package in PACKAGES.items() if word in said})
        if not packages:
            raise
        raise ImportError(f"{what} needs more packages: pip install {' '.join(packages)}\n({error})") from error


class Renderer:
    """Turns one user turn into the inputs of a Hugging Face processor's model: a single, unpadded prompt.

    Args:
        processor: the model's processor (or tokenizer, for a text-only model).
        system: a system prompt; `None` leaves it to the chat template.

    Raises:
        ValueError: no chat template anywhere.
    """

    def __init__(self, processor: Any, system: str | None = None) -> None:
        self.processor, self.system = processor, system
        self.tokenizer = getattr(processor, "tokenizer", processor)
        name = type(processor).__name__
        self.template_only = name in TEMPLATE_ONLY
        self.template = (
            getattr(processor, "chat_template", None)
            or getattr(self.tokenizer, "chat_template", None)
            or TEMPLATES.get(name)
        )
        if not self.template and not self.template_only:
            raise ValueError(
                f"{type(processor).__name__} has no chat template, nor has its tokenizer; set processor.chat_template, "
                "or pass build_inputs=your_function to RRS."
            )
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.rate = int(getattr(extractor, "sampling_rate", 0) or 0)
        # Length of one window, for extractors that have such.
        self.seconds = float(getattr(extractor, "chunk_length", 0) or SECONDS.get(type(extractor).__name__, 0))

    def __call__(self, text: str | None, wave: Wave | None) -> dict[str, Any]:
        """Model inputs of one prompt, each tensor with a batch dimension of 1.

        Args:
            text: the user's words, after the audio if there is any.
            wave: mono float32 `[samples]` at `self.rate` Hz.
        """
        if wave is not None and not self.rate:
            raise ValueError(f"{type(self.processor).__name__} takes no audio; use the condition text-only.")
        with needed_packages(type(self.processor).__name__):
            if self.template_only:
                inputs = self.processor.apply_chat_template([self._messages(text, wave)])
            elif wave is None:
                inputs = self.tokenizer(self._prompt(text, None), return_tensors="pt", add_special_tokens=False)
            else:
                inputs = self.processor(
                    text=[self._prompt(text, wave)], audio=[wave], sampling_rate=self.rate, return_tensors="pt",
                    add_special_tokens=False,
                )  # fmt: skip
        longer = wave is not None and self.seconds and len(wave) > self.seconds * self.rate
        if longer and len(inputs.get("input_features", ())) == 1:  # Whisper's extractor cuts without a word
            raise DataError(
                f"The clip is {len(wave) / self.rate:.2f} s long, but {type(self.processor).__name__} keeps the "
                f"first {self.seconds:.2f} s; split it."
            )
        return {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def _messages(self, text: str | None, wave: Wave | None, plain: bool = False) -> list[dict[str, Any]]:
        """The chat; `plain`: contents are strings, as templates of text models want them."""
        content: list[dict[str, Any]] = []
        if wave is not None and self.template_only:
            file = io.BytesIO()
            soundfile.write(file, wave, self.rate, format="WAV", subtype="FLOAT")
            content.append({"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()})
        elif wave is not None:
            content.append({"type": "audio", "audio": "clip"})
        if text:
            content.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        if plain:
            messages = [{"role": m["role"], "content": "".join(c["text"] for c in m["content"])} for m in messages]
        return messages

    def _prompt(self, text: str | None, wave: Wave | None) -> str:
        """The rendered chat; text and audio placeholder are verified to be in it."""
        audio_token = getattr(self.processor, "audio_token", None)
        wanted = {
            "audio": audio_token if wave is not None and audio_token else "",
            "text": text.strip() if text else "",
        }
        prompt = ""
        # Templates of text models know strings only, most of audio models both, a few lists only.
        for plain in (True, False) if wave is None else (False,):
            prompt = self.tokenizer.apply_chat_template(
                self._messages(text, wave, plain),
                chat_template=self.template, tokenize=False, add_generation_prompt=True, audio_token=audio_token,
            )  # fmt: skip
            lost = [what for what, part in wanted.items() if part not in prompt]
            if not lost:
                return str(prompt)
        raise ValueError(
            f"The chat template of {type(self.processor).__name__} drops the {' and the '.join(lost)}: "
            f"{[wanted[what] for what in lost]} is not in {prompt!r}. Set processor.chat_template to the one of its "
            "model card, or pass build_inputs=your_function to RRS."
        )
