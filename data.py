"""Examples in, model inputs out: manifests, audio decoding, resampling, and the three input conditions."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

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
    def cluster(self) -> str:
        """What statistics take as one question: `meta["question"]`, else the text, else the id.

        Several voices, seeds or paraphrases of a question are no independent draws.
        """
        return str(self.meta.get("question") or (self.text or "").strip() or self.id)

    @property
    def clip(self) -> tuple[str, Callable[[int], Wave]]:
        """`(key, load)`: a key equal for equal clips, and a function from sampling rate to waveform."""
        key = str(self.audio) if isinstance(self.audio, (str, Path)) else f"{self.id}@{id(self.audio)}"
        return key, lambda rate: load_audio(self.audio, rate, name=self.id)


class Format(NamedTuple):
    """How the rows of a public data set become examples: column names, in lower case."""

    needs: str
    """Columns that tell the format, separated by spaces."""
    text: str = ""
    audio: str = ""
    label: Label | None = None
    """Of every row; only for sets that hold one kind. A column `label` wins."""
    category: str = "category"
    id: str = "id"
    harmful: tuple[str, str] | None = None
    """`(column, prefix)`: rows whose column begins with it are harmful, all others benign."""
    context: str = ""
    """Column whose text goes before the question."""


FORMATS = {
    "rrs": Format("text audio", "text", "audio"),  # ours; JALMBench
    "text": Format("text", "text"),
    "audio": Format("audio", "", "audio"),
    "or-bench": Format("prompt", "prompt"),  # hard-benign and toxic files look alike: no label
    "authors": Format("prompt path", "prompt", "path"),
    "voicebench": Format("prompt audio", "prompt", "audio"),
    "advbench": Format("goal target", "goal", label="harmful"),
    "advbench-audio": Format("prompt target audio", "prompt", "audio", "harmful"),
    "xstest": Format("prompt type focus", "prompt", category="type", harmful=("type", "contrast_")),
    "figstep": Format("question instruction category_name", "question", label="harmful", category="category_name"),
    # JailbreakBench's harmful and benign files have the same columns: no label
    "jailbreakbench": Format("goal target behavior category", "goal", id="index"),
    "strongreject": Format("forbidden_prompt", "forbidden_prompt", label="harmful"),
    "harmbench": Format(
        "behavior functionalcategory", "behavior", label="harmful", category="semanticcategory", id="behaviorid",
        context="contextstring",
    ),
    "sarsteer": Format("question audio_file scenario", "question", "audio_file", category="scenario"),
    "air-bench": Format("question path answer_gt", "question", "path", category="task_name"),
}  # fmt: skip
"""What `load_examples` knows, by the argument `format`. The one whose columns include all others' that fit wins."""

LABELS: dict[Any, Label] = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")


def load_examples(source: Any, label: Label | None = None, *, format: str | None = None) -> list[Example]:
    """Examples from a file, a folder of audio, a list of `Example`s, or any iterable of dicts (`datasets` included).

    Files are recognised by content: JSON, JSONL, CSV or TSV whose columns fit one of `FORMATS`, or plain text with a
    question a line. Audio paths are relative to the file's folder. A folder gives one example for each audio file in
    it, with the words of the `.txt` beside it, if there is one, and the subfolder as category.

    `audio` may be a path, encoded bytes, `{"array", "sampling_rate"}` or `{"bytes", "path"}`. With `datasets`, cast the
    column to `Audio(decode=False)`: clips are then decoded one by one, when they are needed.

    Args:
        source: a path, or an iterable of `Example` or dict.
        label: given to rows that have none. Rows that carry the *other* label are left out, so that one file can
            serve as `harmful=` and as `benign=`.
        format: a name of `FORMATS`, "lines" (plain text) or "folder", where the content alone does not decide.

    Raises:
        DataError: names file and row; for an ambiguous file, what it could be.
    """
    if format not in (None, "lines", "folder", *FORMATS):
        raise DataError(f"format={format!r} is unknown; there are {['lines', 'folder', *FORMATS]}.")
    if isinstance(source, (str, Path)):
        path = Path(source)
        name, folder = str(path), path if path.is_dir() else path.parent
        rows = _read_folder(path, format) if path.is_dir() else _read_file(path, format)
    elif isinstance(source, Mapping) or not isinstance(source, Iterable):
        raise DataError(f"Examples must be a path or an iterable of dicts, not {type(source).__name__}.")
    else:
        rows, folder, name = list(source), None, "examples"
    for i, row in enumerate(rows, 1):
        if not isinstance(row, (Example, Mapping)):
            raise DataError(
                f"{name}, row {i}: expected an object with 'text' and/or 'audio', got {type(row).__name__}."
            )
    columns = {str(key).lower() for row in rows if isinstance(row, Mapping) for key in row}
    kind = _format(columns, name, format if format in FORMATS else None) if columns else FORMATS["rrs"]
    examples = [
        row if isinstance(row, Example) else _example(row, kind, f"{name}, row {i}", i, folder)
        for i, row in enumerate(rows, 1)
    ]
    seen: dict[str, int] = {}
    for i, example in enumerate(examples, 1):
        if example.id in seen:
            raise DataError(
                f"{name}: rows {seen[example.id]} and {i} have the same id {example.id!r}; ids must differ."
            )
        seen[example.id] = i
    if label:
        examples = [replace(e, label=label) for e in examples if e.label in (None, label)]
    if not examples:
        raise DataError(f"{name}: no {label + ' ' if label else ''}examples in it.")
    return examples


def _fits(columns: set[str]) -> list[str]:
    """Formats whose columns are all there, without those that another such format includes."""
    fit = {name: set(f.needs.split()) for name, f in FORMATS.items() if set(f.needs.split()) <= columns}
    return [name for name, needs in fit.items() if not any(needs < other for other in fit.values())]


def _format(columns: set[str], name: str, wanted: str | None) -> Format:
    if wanted:
        if missing := sorted(set(FORMATS[wanted].needs.split()) - columns):
            raise DataError(f"{name}: format={wanted!r} needs the columns {missing} too; it has {sorted(columns)}.")
        return FORMATS[wanted]
    fit = _fits(columns)
    if not fit:
        known = "; ".join(f"{key}: {f.needs.replace(' ', ', ')}" for key, f in FORMATS.items())
        raise DataError(
            f"{name}, row 1: neither 'text' nor 'audio' in {sorted(columns)}, nor the columns of a known set "
            f"({known}). Rename the column with the question to 'text'."
        )
    if len(fit) > 1:
        could = " or ".join(f"{key!r} (columns {FORMATS[key].needs.replace(' ', ', ')})" for key in fit)
        raise DataError(f"{name} could be {could}; decide with load_examples(..., format={fit[0]!r}).")
    return FORMATS[fit[0]]


def _read_folder(path: Path, format: str | None) -> list[Any]:
    files = sorted(p for p in path.rglob("*") if p.is_file())
    clips = [p for p in files if p.suffix.lower() in AUDIO_SUFFIXES]
    tables = [p.name for p in files if p.suffix.lower() in (".json", ".jsonl", ".csv", ".tsv")]
    if not clips or (tables and format != "folder"):
        what = f"could be a folder of {len(clips)} clips or what {tables} list" if clips else "holds no audio files"
        fix = ", or pass format='folder' for the clips" if clips else f" ({', '.join(AUDIO_SUFFIXES)})"
        raise DataError(f"{path} {what}; pass the path of a manifest{fix}.")
    rows = []
    for clip in clips:
        words, place = clip.with_suffix(".txt"), clip.relative_to(path)
        text = words.read_text(encoding="utf-8-sig").strip() if words.is_file() else None
        category = place.parent.as_posix() if place.parent.name else None
        rows.append({"id": place.with_suffix("").as_posix(), "text": text, "audio": str(place), "category": category})
    return rows


def _read_file(path: Path, format: str | None) -> list[Any]:
    try:
        content = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}).") from None
    if format != "lines":
        if content.lstrip()[:1] in ("[", "{") or path.suffix.lower() in (".json", ".jsonl"):
            return _read_json(path, content)
        if rows := _read_table(path, content, format):
            return rows
    return [{"text": line.strip()} for line in content.splitlines() if line.strip()]


def _read_json(path: Path, content: str) -> list[Any]:
    if content.lstrip().startswith("["):
        try:
            return list(json.loads(content))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    rows = []
    for number, line in enumerate(content.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not valid JSON ({error.msg}); one object a line.") from None
    return rows


def _read_table(path: Path, content: str, format: str | None) -> list[Any] | None:
    """Rows of a CSV or TSV with known columns; `None` for plain text."""
    for delimiter in ",\t;":
        try:
            records = [r for r in csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True) if r]
        except csv.Error:  # prose with stray quotes
            continue
        names = [name.strip() for name in records[0]] if records else []
        if not all(re.fullmatch(r"[\w.:/-]*( [\w.:/-]+)?", name) for name in names):
            continue
        uneven = [i for i, record in enumerate(records) if len(record) != len(names)]
        if _fits({name.lower() for name in names}) or (format and len(names) > 1):
            if uneven:
                raise DataError(
                    f"{path}, row {uneven[0]}: {len(records[uneven[0]])} fields, but {len(names)} columns {names}; put "
                    "quotes around fields that hold commas, or pass format='lines' if this is plain text."
                )
            return [dict(zip(names, record, strict=True)) for record in records[1:]]
        if len(names) > 1 and len(records) > 1 and not uneven:
            raise DataError(
                f"{path} could be a table with the columns {names}, none of which is known, or plain text with a "
                "question a line. Rename the column with the question to 'text', or pass format='lines'."
            )
    return None


def _example(row: Mapping[str, Any], kind: Format, where: str, number: int, folder: Path | None) -> Example:
    columns = {str(key).lower(): key for key in row}
    rest = {key: row[key] for key in row}

    def take(column: str) -> Any:
        value = rest.pop(columns[column]) if column in columns else None
        return None if isinstance(value, str) and not value.strip() else value

    text, audio, name = take(kind.text), take(kind.audio), take(kind.id)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {kind.text!r} must be a string, not {type(text).__name__}.")
    if text and kind.context and (context := take(kind.context)):
        text = f"{context}\n\n{text}"
    label: Label | None = kind.label
    if kind.harmful:
        column, prefix = kind.harmful
        label = "harmful" if str(row[columns[column]]).startswith(prefix) else "benign"
    if (given := take("label")) is not None:
        if not isinstance(given, str) or given not in LABELS:
            raise DataError(f"{where}: label {given!r} is none of {list(LABELS)}; rename the column if it is no label.")
        label = LABELS[given]
    if hasattr(audio, "get_all_samples"):  # what `datasets` decodes to
        samples = audio.get_all_samples()
        audio = {"array": samples.data.numpy().T, "sampling_rate": samples.sample_rate}
    elif isinstance(audio, Mapping) and not audio.keys() >= {"array", "sampling_rate"}:
        audio = audio.get("bytes") or audio.get("path")
    if text is None and audio is None:
        raise DataError(f"{where}: neither 'text' nor 'audio' in {sorted(columns)}.")
    if isinstance(audio, (str, Path)):
        audio = Path(audio) if folder is None else folder / audio
        if not audio.is_file():
            raise DataError(f"{where}: audio file {audio} does not exist.")
    category = take(kind.category) if isinstance(row.get(columns.get(kind.category)), str) else None
    return Example(str(name) if name is not None else f"row-{number}", text, audio, label, category, rest)


def digest(examples: Iterable[Example]) -> str:
    """A short hash of questions, labels and audio, equal for equal data: 16 hex digits."""
    total = hashlib.sha256()
    for e in examples:
        total.update(json.dumps([e.id, e.text, e.label]).encode())
        if isinstance(e.audio, Mapping):
            total.update(np.ascontiguousarray(e.audio["array"]).tobytes() + str(e.audio["sampling_rate"]).encode())
        elif e.audio is not None:
            total.update(e.audio if isinstance(e.audio, bytes) else Path(e.audio).read_bytes())
    return total.hexdigest()[:16]


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
        self.template = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        if not self.template:
            raise ValueError(
                f"{type(processor).__name__} has no chat template, nor has its tokenizer; set processor.chat_template, "
                "or pass build_inputs=your_function to RRS."
            )
        extractor = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.rate = int(getattr(extractor, "sampling_rate", 0) or 0)
        self.seconds = float(getattr(extractor, "chunk_length", 0) or 0)  # of one window, for extractors that have such

    def __call__(self, text: str | None, wave: Wave | None) -> dict[str, Any]:
        """Model inputs of one prompt, each tensor with a batch dimension of 1.

        Args:
            text: the user's words, after the audio if there is any.
            wave: mono float32 `[samples]` at `self.rate` Hz.
        """
        content: Any = []
        if wave is not None:
            if not self.rate:
                raise ValueError(f"{type(self.processor).__name__} takes no audio; use the condition text-only.")
            content.append({"type": "audio", "audio": "clip"})
        if text:
            content.append({"type": "text", "text": text})
        messages = [{"role": "user", "content": content}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system}]})
        if wave is None:  # templates of text models know strings only, templates of audio models know both
            messages = [{"role": m["role"], "content": m["content"][0]["text"]} for m in messages]
        prompt = self.tokenizer.apply_chat_template(
            messages, chat_template=self.template, tokenize=False, add_generation_prompt=True
        )
        if wave is None:
            inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        else:
            token = getattr(self.processor, "audio_token", None)
            if token and token not in prompt:
                raise ValueError(
                    f"The chat template of {type(self.processor).__name__} drops the audio: {token!r} is not in "
                    f"{prompt!r}. Set processor.chat_template to the one of its model card."
                )
            inputs = self.processor(
                text=[prompt], audio=[wave], sampling_rate=self.rate, return_tensors="pt", add_special_tokens=False
            )
            if self.seconds and len(wave) > self.seconds * self.rate and len(inputs["input_features"]) == 1:
                raise DataError(  # Whisper's extractor cuts without a word
                    f"The clip is {len(wave) / self.rate:.2f} s long, but {type(self.processor).__name__} keeps the "
                    f"first {self.seconds:.2f} s; split it."
                )
        return {k: v for k, v in inputs.items() if isinstance(v, Tensor)}
