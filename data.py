"""Examples in, model inputs out: manifests, audio decoding, resampling, and the three input conditions."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
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


# What one clip may take: files claim and compress what they like, so both are checked before memory is taken.
MAX_SECONDS, MAX_BYTES = 3600.0, 2**30


class DataError(ValueError):
    """Something is wrong with the data that was passed; the message names file and row, and says what to do."""


class DataWarning(UserWarning):
    """The data can be used, but something about it is likely a mistake."""


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
        question = self.meta.get("question")
        if question in (None, ""):
            question = (self.text or "").strip() or self.id
        return str(question)

    @property
    def clip(self) -> tuple[str, Callable[[int], Wave]]:
        """`(key, load)`: a key equal for equal clips, and a function from sampling rate to waveform."""
        return self.audio_hash, lambda rate: load_audio(self.audio, rate, name=self.id)

    @cached_property
    def audio_hash(self) -> str:
        """SHA-256 (hex) of the clip as it is stored, wherever that is; `""` without one."""
        digest = hashlib.sha256()
        if self.audio is None:
            return ""
        if isinstance(self.audio, (str, Path)):
            try:
                with open(_checked_size(self.audio, f"{self.id} ({self.audio})"), "rb") as file:
                    while chunk := file.read(2**20):
                        digest.update(chunk)
            except OSError as error:
                raise DataError(
                    f"{self.id}: audio file {self.audio} can't be read ({error}); check the path."
                ) from None
        elif isinstance(self.audio, Mapping) and "array" in self.audio:
            array = np.asarray(self.audio["array"])
            digest.update(f"{self.audio.get('sampling_rate')} {array.dtype} {array.shape}".encode() + array.tobytes())
        else:
            digest.update(self.audio if isinstance(self.audio, bytes) else repr(self.audio).encode())
        return digest.hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of all that training and evaluation use of the example."""
        return hashlib.sha256(json.dumps([self.id, self.text, self.label, self.audio_hash]).encode()).hexdigest()


def content_hash(examples: Iterable[Example]) -> str:
    """SHA-256 (hex) of examples in their order: equal for equal contents, wherever the files lie."""
    return hashlib.sha256("\n".join(e.digest for e in examples).encode()).hexdigest()


def marks(examples: Iterable[Example]) -> frozenset[int]:
    """What `shared` knows examples by, to be kept without them: 64-bit hashes of their questions, ids and twins."""
    return frozenset(mark for e in examples for mark in _marks(e).values())


def _marks(e: Example) -> dict[str, int]:
    """An example's question (its text; without one, its clip), id and, if it names one, twin, hashed."""
    question = " ".join(e.text.casefold().split()) if e.text else e.audio_hash
    known = {"question": question, "id": e.id, "twin": e.meta.get("twin")}
    return {what: _mark(what, value) for what, value in known.items() if value is not None}


def _mark(what: str, value: object) -> int:
    return int.from_bytes(hashlib.sha256(f"{what} {value}".encode()).digest()[:8], "little", signed=True)


def shared(ours: Sequence[Example], others: Iterable[Example] | frozenset[int], *, twins: bool = False) -> list[str]:
    """Ids of those of `ours` whose question (its text; without one, its clip) is also among `others`.

    Args:
        others: examples, or their `marks`.
        twins: count as well an example that names one of `others` as its `twin`, or is named by one.
    """
    known = others if isinstance(others, frozenset) else marks(others)

    def among(e: Example) -> bool:
        own = _marks(e)
        if own["question"] in known or not twins:
            return own["question"] in known
        return _mark("twin", e.id) in known or ("twin" in own and _mark("id", e.meta["twin"]) in known)

    return [e.id for e in ours if among(e)]


def hold_out(examples: Sequence[Example], share: float = 0.25, seed: int = 0) -> tuple[list[Example], list[Example]]:
    """Examples to train on and, of each label about `share`, examples to choose by.

    Twins, and whatever asks the same question (`Example.cluster`), stay together.
    """
    parent: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    other = {"harmful": "benign", "benign": "harmful"}

    def root(key: tuple[Any, ...]) -> tuple[Any, ...]:
        while parent.setdefault(key, key) != key:
            key = parent[key]
        return key

    def own(e: Example) -> tuple[Any, ...]:
        return "id", e.label, e.id  # two files may number their rows alike

    for e in examples:
        twin = ("id", other.get(e.label or ""), str(e.meta["twin"])) if e.meta.get("twin") else own(e)
        for key in (twin, ("question", e.cluster)):
            parent[root(own(e))] = root(key)
    families: dict[tuple[Any, ...], list[Example]] = {}
    for e in examples:
        families.setdefault(root(own(e)), []).append(e)
    order = sorted(families.values(), key=lambda f: hashlib.sha256(f"{seed} {min(e.id for e in f)}".encode()).digest())
    lacking = {label: share * sum(e.label == label for e in examples) for label in ("harmful", "benign", None)}
    held = set[tuple[Any, ...]]()
    for family in order:
        if any(lacking[e.label] > 0 for e in family):
            for e in family:
                lacking[e.label] -= 1
                held.add(own(e))
    if len(held) == len(examples):
        raise DataError(f"{len(examples)} examples in {len(families)} families of twins are too few to hold some out.")
    return [e for e in examples if own(e) not in held], [e for e in examples if own(e) in held]


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
    subfolder: str = ""
    """Where clips lie that are not at `audio` itself, in terms of other columns."""


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
    "air-bench": Format(
        "question path answer_gt", "question", "path", category="task_name", subfolder="{task_name}_{dataset_name}"
    ),
}  # fmt: skip
"""What `load_examples` knows, by the argument `format`. The one whose columns include all others' that fit wins."""

LABELS: dict[Any, Label] = {"harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign"}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")


def load_examples(
    source: Any, label: Label | None = None, *, format: str | None = None, allow_outside: bool = False
) -> list[Example]:
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
        allow_outside: let a manifest name audio files that are not below its own folder (links are followed).

    Raises:
        DataError: names file and row; for an ambiguous file, what it could be.
    """
    if format not in (None, "lines", "folder", *FORMATS):
        raise DataError(f"format={format!r} is unknown; there are {['lines', 'folder', *FORMATS]}.")
    if isinstance(source, (str, Path)):
        path = Path(source)
        name, folder = str(path), path if path.is_dir() else path.parent
        rows = _read_folder(path, format, allow_outside) if path.is_dir() else _read_file(path, format)
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
        row if isinstance(row, Example) else _example(row, kind, f"{name}, row {i}", i, folder, allow_outside)
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
        examples = [e if e.label else replace(e, label=label) for e in examples if e.label in (None, label)]
    if not examples:
        held = f": its rows are all of the other label; pass the file with the {label} ones" if seen and label else ""
        raise DataError(f"{name}: no {label + ' ' if label else ''}examples in it{held}.")
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


def _read_folder(path: Path, format: str | None, allow_outside: bool) -> list[Any]:
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
        text = None
        if words.is_file():
            text = _read_text(_checked_path(words.relative_to(path), str(path), path, allow_outside)).strip()
        category = place.parent.as_posix() if place.parent.name else None
        rows.append({"id": place.with_suffix("").as_posix(), "text": text, "audio": str(place), "category": category})
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}); save it as UTF-8.") from None


def _read_file(path: Path, format: str | None) -> list[Any]:
    content = _read_text(path)
    if format != "lines":
        if content.lstrip()[:1] in ("[", "{") or path.suffix.lower() in (".json", ".jsonl"):
            return _read_json(path, content)
        if (rows := _read_table(path, content, format)) is not None:
            return rows
        if path.suffix.lower() in (".csv", ".tsv") and len(content.splitlines()) > 1:
            raise DataError(
                f"{path} is no table that can be read: no column is known, or quotes do not match. Rename the column "
                "with the question to 'text' and repair the quotes, or pass format='lines' if each line is a question."
            )
    return [{"text": line.strip()} for line in content.splitlines() if line.strip()]


def _read_json(path: Path, content: str) -> list[Any]:
    if content.lstrip().startswith("["):
        return list(_json(content, str(path)))
    lines = enumerate(content.split("\n"), 1)  # not splitlines(): U+2028 and the like may stand in a JSON string
    return [_json(line, f"{path}, line {number}", "; one object a line") for number, line in lines if line.strip()]


def _json(text: str, where: str, remedy: str = "") -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where += "" if remedy else f", line {error.lineno}"
        raise DataError(f"{where}: not valid JSON ({error.msg}){remedy}.") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise DataError(f"{where}: not JSON that can be read ({error}){remedy}.") from None


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


def _example(
    row: Mapping[str, Any], kind: Format, where: str, number: int, folder: Path | None, allow_outside: bool
) -> Example:
    columns = {str(key).lower(): key for key in row}
    rest = {key: row[key] for key in row}

    def take(column: str) -> Any:
        # No name, no column: pandas writes its index under an empty one.
        value = rest.pop(columns[column]) if column and column in columns else None
        return None if isinstance(value, str) and not value.strip() else value

    text, audio, name = take(kind.text), take(kind.audio), take(kind.id)
    if name is not None and not isinstance(name, (str, int)):
        raise DataError(
            f"{where}: {kind.id!r} must be a string or a number, not {name!r}; leave it out for 'row-{number}'."
        )
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {kind.text!r} must be a string, not {type(text).__name__}.")
    if text and kind.context and (context := take(kind.context)):
        text = f"{context}\n\n{text}"
    label: Label | None = kind.label
    if kind.harmful:
        column, prefix = kind.harmful
        if column not in columns:
            raise DataError(f"{where}: no {column!r}, which tells the label; add it.")
        label = "harmful" if str(row[columns[column]]).startswith(prefix) else "benign"
    if (given := take("label")) is not None:
        if not isinstance(given, str) or given not in LABELS:
            raise DataError(
                f"{where}: label {given!r} is neither 'harmful' nor 'benign' (nor 'unsafe' or 'safe'); rename the "
                "column if it is no label."
            )
        label = LABELS[given]
    if hasattr(audio, "get_all_samples"):  # what `datasets` decodes to
        samples = audio.get_all_samples()
        audio = {"array": samples.data.numpy().T, "sampling_rate": samples.sample_rate}
    elif isinstance(audio, Mapping) and (not audio or ("array" not in audio and audio.keys() & {"bytes", "path"})):
        audio = audio.get("bytes") or audio.get("path") or None
    if text is None and audio is None:
        raise DataError(f"{where}: neither 'text' nor 'audio' in {sorted(columns)}; a row needs one of them.")
    try:
        f"{name}{text}".encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: 'id' or 'text' is no valid Unicode ({error.reason}); re-export the row.") from None
    if isinstance(audio, (str, Path)):
        if kind.subfolder and folder is not None and not os.path.exists(folder / audio):
            with suppress(KeyError):  # the row lacks one of the columns
                audio = Path(kind.subfolder.format_map({c: row[key] for c, key in columns.items()}), audio)
        audio = _checked_path(audio, where, folder, allow_outside)
    elif audio is not None and not isinstance(audio, (bytes, Mapping)):
        raise DataError(f"{where}: 'audio' must be a path, bytes or a dict with 'array', not {type(audio).__name__}.")
    category = take(kind.category) if isinstance(row.get(columns.get(kind.category, "")), str) else None
    for name_ in ("question", "twin", "voice"):  # read from `meta` by these names, however the column is spelt
        if (column := columns.get(name_, name_)) != name_ and column in rest:
            rest[name_] = rest.pop(column)
    return Example(f"row-{number}" if name is None else str(name), text, audio, label, category, rest)


def _checked_path(name: str | Path, where: str, folder: Path | None, allow_outside: bool) -> Path:
    """The path that a row or a folder names; neither can lead to files outside its folder unless that is allowed."""
    path = Path(name) if folder is None else folder / name
    try:
        inside = folder is None or allow_outside or path.resolve().is_relative_to(folder.resolve())
        exists = path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name of 10,000 characters
        raise DataError(f"{where}: the path {str(name)[:200]!r} can't be followed ({error}); correct it.") from None
    if not inside:
        raise DataError(
            f"{where}: {str(name)!r} lies outside the manifest's folder {folder}. Move it there; or, if you "
            "trust the manifest, pass load_examples(path, label, allow_outside=True) instead of the path."
        )
    if not exists:
        raise DataError(f"{where}: the file {path} does not exist, or is no ordinary file; correct the path.")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(
    source: Any, rate: int, *, name: str = "audio", max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> Wave:
    """Any audio as mono float32 `[samples]` in [-1, 1] at `rate` Hz.

    Args:
        source: a path, encoded bytes, or `{"array": …, "sampling_rate": …}` with `[samples]` or `[samples, channels]`.
        rate: wanted sampling rate; the processors of transformers do not resample.
        name: how errors call the clip.
        max_seconds: longer clips raise.
        max_bytes: larger files raise, and clips whose decoded mono samples take more.

    Raises:
        DataError: unreadable, empty, non-finite, too long or too large.
    """
    if isinstance(source, Mapping):
        if not {"array", "sampling_rate"} <= source.keys():
            raise DataError(f"{name}: an audio dict needs 'array' and 'sampling_rate', it has {list(source)}.")
        try:
            wave, source_rate = np.asarray(source["array"]), int(source["sampling_rate"])
        except (TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{name}: 'array' and 'sampling_rate' must be numbers ({error}).") from None
        if wave.dtype.kind not in "iuf":
            raise DataError(f"{name}: 'array' must hold integers or floats, not {wave.dtype}.")
        if wave.ndim == 2 and 0 < wave.shape[0] < wave.shape[1]:  # torchaudio's: the mean would be over time
            raise DataError(f"{name}: 'array' is {list(wave.shape)}, expected [samples, channels]; transpose it.")
        # A list of ints, in JSON say, becomes int64 whatever its samples' width; as a share of 2^63 it would be silent.
        if wave.dtype == np.int64 and wave.any() and wave.min() >= -(2**31) and wave.max() < 2**31:
            raise DataError(
                f"{name}: 'array' holds integers of unknown width (int64, as from a list); pass "
                "np.asarray(array, np.int16) if that is the samples' width, or floats in [-1, 1]: 16-bit PCM / 32768."
            )
        if wave.dtype.kind in "iu":
            full = (int(np.iinfo(wave.dtype).max) + 1) / (2 if wave.dtype.kind == "u" else 1)
            wave = wave / full - (wave.dtype.kind == "u")  # unsigned samples are centred on half of their range
        seconds = len(wave) / max(1, source_rate) if wave.ndim else 0.0
    else:
        name = f"{name} ({source})" if isinstance(source, (str, Path)) else name
        try:
            wave, source_rate, seconds = _decode(source, name, max_seconds, max_bytes)
        except (soundfile.LibsndfileError, OSError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{name}: can't be decoded as audio ({error}); re-encode it (or a video's sound) as WAV, FLAC or OGG."
            ) from None
    if seconds > max_seconds:
        raise DataError(f"{name}: {seconds:.1f} s is longer than the {max_seconds:g} s allowed; cut it.")
    if wave.ndim == 2 and wave.shape[1]:
        wave = wave.mean(axis=1)
    if wave.ndim != 1 or not len(wave):
        raise DataError(f"{name}: no samples (shape {list(wave.shape)}); re-export the clip.")
    if source_rate <= 0 or rate <= 0:
        raise DataError(f"{name}: sampling rates must be positive, got {source_rate} and {rate} Hz.")
    if not 1_000 <= source_rate <= 1_000_000:
        raise DataError(f"{name}: a sampling rate of {source_rate} Hz is no audio's; correct the clip's header.")
    with np.errstate(over="ignore"):
        wave = wave.astype(np.float32)
    if not np.isfinite(wave).all():
        raise DataError(f"{name}: NaN or infinite samples; re-export the clip.")
    peak = float(np.abs(wave).max())
    if peak > 8:  # overshoot of resampling or of lossy codecs stays far below
        raise DataError(f"{name}: its peak is {peak:g}, expected floats in [-1, 1]; divide PCM values by 32768.")
    if peak < 1e-4:  # -80 dB: silence, channels that cancel out, or integers that were scaled twice
        warnings.warn(f"{name}: silent, its peak is {peak:.0e}; export it again, or leave it out.", DataWarning, 2)
    flat = np.abs(wave) >= max(0.99, peak - 1e-4)
    if (flat[:-2] & flat[1:-1] & flat[2:]).mean() > 0.01 if len(wave) > 2 else False:
        warnings.warn(f"{name}: clipped, its peaks are cut off flat; record it at a lower level.", DataWarning, 2)
    return resample(wave, source_rate, rate)


def _decode(source: Any, name: str, max_seconds: float, max_bytes: int) -> tuple[Wave, int, float]:
    """Mono samples, their rate, and the seconds that the file claims to hold or turned out to hold.

    In blocks, with the channels averaged at once: memory is taken for what is there, never for what a header claims.
    """
    if isinstance(source, bytes) and len(source) > max_bytes:
        raise DataError(f"{name}: {len(source)} bytes are more than max_bytes={max_bytes}; cut the clip.")
    encoded = io.BytesIO(source) if isinstance(source, bytes) else str(_checked_size(source, name, max_bytes))
    with soundfile.SoundFile(encoded) as file:
        limit = min(max_seconds * file.samplerate, max_bytes / 4)
        blocks, total, size = [], 0, max(1, 2**20 // file.channels)
        while total <= limit and len(block := file.read(size, dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1))
            total += len(block)
        seconds = total / max(1, file.samplerate)
        if max_seconds * file.samplerate >= total > limit:
            raise DataError(f"{name}: {seconds:.0f} s decode to more than max_bytes={max_bytes}; cut the clip.")
        return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), file.samplerate, seconds


def _checked_size(path: str | Path, name: str, max_bytes: int = MAX_BYTES) -> Path:
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{name}: no such file, or no ordinary one; correct the path.")
    if path.stat().st_size > max_bytes:
        raise DataError(f"{name}: {path.stat().st_size} bytes are more than max_bytes={max_bytes}; cut the clip.")
    return path


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
    if up * down > 2**22:  # rates with hardly a common divisor, e.g. 44,101 Hz: the kernels would take gigabytes
        return _resample_directly(wave, up, down, zeros, rolloff)
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
    return _windowed_sinc(time * cutoff, cutoff, zeros).float()[:, None], width


def _windowed_sinc(position: Tensor, cutoff: float, zeros: int) -> Tensor:
    beta = torch.tensor(14.769656459379492, dtype=torch.float64)
    window = torch.i0(beta * (1 - (position / zeros) ** 2).clamp(min=0).sqrt()) / torch.i0(beta)
    return cutoff * torch.sinc(position) * window * (position.abs() <= zeros)


def _resample_directly(wave: Wave, up: int, down: int, zeros: int, rolloff: float) -> Wave:
    """The same without a table of kernels: each output sample's own, in bounded memory."""
    cutoff = min(up, down) * rolloff / down
    width = math.ceil(zeros / cutoff)
    taps = torch.arange(2 * width + 1)
    padded = torch.nn.functional.pad(torch.from_numpy(np.ascontiguousarray(wave)), (width, width + 1))
    out = []
    for t in torch.arange(math.ceil(len(wave) * up / down)).split(max(1, 2**20 // len(taps))):
        nearest, phase = t * down // up, (t * down % up).double() / up
        kernels = _windowed_sinc((taps - width - phase[:, None]) * cutoff, cutoff, zeros).float()  # [outputs, taps]
        out.append((padded[nearest[:, None] + taps] * kernels).sum(1))
    return torch.cat(out).numpy()


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

    def __init__(self, processor: Any, system: str | None = None, template_kwargs: Any = None) -> None:
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
        if (
            wave is not None and longer and len(inputs.get("input_features", ())) == 1
        ):  # Whisper's extractor cuts without a word
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
