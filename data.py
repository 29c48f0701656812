"""Examples in, model inputs out: manifests, audio decoding, resampling, and the input conditions."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import soundfile
import torch
from torch import Tensor

Wave: TypeAlias = npt.NDArray[np.float32]
Label: TypeAlias = Literal["harmful", "benign"]
Turns: TypeAlias = tuple[tuple[str, str], ...]
"""Turns of a conversation: `(role, text)` each, with the roles system, user and assistant."""

CONDITIONS = ("audio-text", "text-only", "audio-only", "text-content")
"""What the model is given: the spoken question with a text instruction; the question typed; the spoken question alone;
the question typed in the paper's second form, "The audio content is: …"."""

MAX_BYTES = 2**30
"""The most that a file may hold, or a clip as mono float32, before and after resampling (93 minutes at 48 kHz): files
compress what they like."""


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
    """Whatever else the row held (twin, voice, …); under `missing_clip` the path of a clip that was not found."""
    messages: Turns = ()
    """Earlier turns, before the question. A system prompt among them replaces the renderer's."""

    def __post_init__(self) -> None:
        if not all(isinstance(turn, tuple) and len(turn) == 2 for turn in self.messages):
            raise DataError(f"{self.id}: messages must be pairs (role, text).")
        if not isinstance(self.audio, (str, Path, bytes, Mapping, type(None))):
            kind = type(self.audio).__name__
            raise DataError(f"{self.id}: 'audio' must be a path, bytes or a dict with 'array', not {kind}.")

    def has(self, condition: str) -> bool:
        """Whether the example holds what `condition` needs: text, audio."""
        return (self.text if condition.startswith("text") else self.audio) is not None

    @property
    def cluster(self) -> str:
        """What statistics take as one question, whatever its voices: `meta["question"]`, else the text, else the id."""
        question = self.meta.get("question")
        return (self.text or "").strip() or self.id if question in (None, "") else str(question)

    @property
    def clip(self) -> tuple[str, Callable[[int], Wave]]:
        """`(key, load)`: a key equal for equal clips, and a function from sampling rate to waveform."""
        return self.audio_hash, lambda rate: load_audio(self.audio, rate, name=self.id)

    @cached_property
    def audio_hash(self) -> str:
        """SHA-256 (hex) of the clip as it is stored, wherever that is; `""` without one."""
        if self.audio is None:
            return ""
        stored = self.audio
        if isinstance(stored, (str, Path)):
            stored = _read(stored, f"{self.id} ({stored})")
        elif isinstance(stored, Mapping):
            array = np.asarray(stored.get("array"))
            stored = f"{stored.get('sampling_rate')} {array.dtype} {array.shape}".encode() + array.tobytes()
        return hashlib.sha256(stored).hexdigest()


def content_hash(examples: Iterable[Example], render: Any = None) -> str:
    """SHA-256 (hex) of examples in their order, wherever their files lie, and of the settings of a `Renderer`."""
    lines = [json.dumps(getattr(render, "settings", None), sort_keys=True, default=repr)]
    for e in examples:
        used = json.dumps([e.id, e.text, e.label, e.audio_hash, e.messages])  # by training and evaluation
        lines.append(hashlib.sha256(used.encode()).hexdigest())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def lacking(examples: Sequence[Example], condition: str) -> str:
    """How many examples can't be used in a condition, which, and what they lack; `""` if all can."""
    out = [f"{e.id} ({e.meta.get('missing_clip', 'none given')})" for e in examples if not e.has(condition)]
    what = "text" if condition.startswith("text") else "clip"
    return f"{condition}: {len(out)} of {len(examples)} examples have no {what}: {listed(out)}" if out else ""


def listed(names: Sequence[str]) -> str:
    """The first eight names, and how many more there are."""
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def marks(examples: Iterable[Example]) -> frozenset[int]:
    """What `shared` knows examples by, to be kept without them: 64-bit hashes of their questions, ids and twins."""
    return frozenset(mark for e in examples for mark in _marks(e, e.id, e.meta.get("twin")))


def shared(ours: Sequence[Example], others: Iterable[Example] | frozenset[int], *, twins: bool = False) -> list[str]:
    """Ids of those of `ours` whose question (its text; without one, its clip) is also among `others`.

    `others` may be their `marks`. With `twins`, also ids of those that name one as their `twin`, or are named by one.
    """
    known = others if isinstance(others, frozenset) else marks(others)
    return [e.id for e in ours if known & (_marks(e, e.meta.get("twin"), e.id) if twins else _marks(e))]


def _marks(e: Example, id: object = None, twin: object = None) -> set[int]:
    question = " ".join(e.text.casefold().split()) if e.text else e.audio_hash
    named = {"question": question, "id": id, "twin": twin}.items()
    digests = [hashlib.sha256(f"{what} {value}".encode()).digest() for what, value in named if value is not None]
    return {int.from_bytes(digest[:8], "little", signed=True) for digest in digests}


# ---------------------------------------------------------------------------------------------------------------------
# Files and rows to examples

COLUMNS = {
    "id": "id index behaviorid question_id",
    "text": "text prompt goal forbidden_prompt question behavior query transcription transcript sentence",
    "audio": "audio path audio_path audio_file audio_name file_name",
    "label": "label",
    "category": "category category_name semanticcategory scenario task_name type",
    "messages": "messages conversation conversations",
}
"""What the data sets of the field call their columns. The first name that is there is taken."""

RIVALS = {"text", "prompt", "goal", "forbidden_prompt"}  # of two of these, nobody can tell which is the question
LABELS: dict[str, Label] = {
    "harmful": "harmful", "unsafe": "harmful", "benign": "benign", "safe": "benign", "harmless": "benign",
}  # fmt: skip
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64")
COULD_BE = "Pass columns={'text': 'the column with the question'}, or the lines as a list if each is a question."


def load_examples(
    source: Any,
    label: Label | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    audio_dir: str | Path | None = None,
    allow_outside: bool = False,
) -> list[Example]:
    """Examples from a file, or from any iterable of rows (of `datasets` and pandas too).

    A file is JSON, JSONL, CSV or TSV, whatever its name, or plain text with a question a line. Columns are found by
    their usual names, `COLUMNS`; the others go to `meta`, in lower case. A row is a dict, an `Example`, a string (a
    question) or a `Path` (a clip). If its clip is not there, its text can still be used.

    `audio` may be a path, encoded bytes, `{"array", "sampling_rate"}` or `{"bytes", "path"}`. With `datasets`, cast the
    column to `Audio(decode=False)`: clips are then decoded one by one, when they are needed.

    Args:
        label: given to rows that have none; rows with the *other* label are left out, so one file can serve both sides.
        columns: what holds what, where the names do not tell: `{"text": "my question", "audio": "my file"}`.
        audio_dir: folder of the clips; default the file's own.
        allow_outside: let rows name audio files that are not below that folder (links are followed).
    """
    given = {what: column.strip().lower() for what, column in (columns or {}).items()}
    if unknown := sorted(given.keys() - COLUMNS.keys()):
        raise DataError(f"columns={unknown} are unknown; there are {sorted(COLUMNS)}.")
    name, folder = "examples", Path(audio_dir) if audio_dir else None
    if isinstance(source, (str, Path)):
        name, folder = str(source), folder or Path(source).parent
        rows = read_file(Path(source), set(given.values()))
    elif isinstance(source, Iterable):
        table: Any = [source] if isinstance(source, Mapping) else source
        rows = list(table.to_dict("records") if hasattr(table, "iterrows") else table)  # pandas
        rows = [{"text": r} if isinstance(r, str) else {"audio": r} if isinstance(r, Path) else r for r in rows]
    else:
        raise DataError(f"Examples must be a path or an iterable of dicts, not {type(source).__name__}.")
    names = {str(key).strip().lower() for row in rows if isinstance(row, Mapping) for key in row}
    fields = _fields(names, given, name) if names else {}
    features = getattr(source, "features", None)  # of `datasets`, which count labels
    classes = getattr(features.get(fields.get("label")), "names", ()) if isinstance(features, Mapping) else ()
    find = partial(_find, folder, allow_outside)
    examples, seen = list[Example](), dict[str, int]()
    for i, row in enumerate(rows, 1):
        try:
            e = row if isinstance(row, Example) else _example(row, f"row-{i}", fields, classes, find)
        except DataError as error:
            raise DataError(f"{name}, row {i}: {error}") from None
        if seen.setdefault(e.id, i) != i:
            raise DataError(f"{name}: rows {seen[e.id]} and {i} have the same id {e.id!r}; ids must differ.")
        if label is None or e.label in (None, label):
            examples.append(e if e.label or label is None else replace(e, label=label))
    if not examples:
        held = f": its rows are all of the other label; pass the file with the {label} ones" if seen else ""
        raise DataError(f"{name}: no {label + ' ' if label else ''}examples in it{held}.")
    if absent := [f"{e.id} ({e.meta['missing_clip']})" for e in examples if "missing_clip" in e.meta]:
        said = f"{name}: {len(absent)} of {len(examples)} clips are not there: {listed(absent)}"
        remedy = "These rows can only be typed; correct the paths, or pass audio_dir='their folder'."
        warnings.warn(f"{said}. {remedy}", DataWarning, stacklevel=2)
    return examples


def read_file(path: Path, wanted: set[str]) -> list[Any]:
    """The clip; or the rows of JSON, JSONL, a table; or of plain text, one for each line.

    A file is a table if its first line names a column that is known or `wanted`.
    """
    suffix = path.suffix.lower()
    if suffix in AUDIO_SUFFIXES:
        return [{"audio": path.name}]
    try:
        content = _read(path, str(path)).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}); save it as UTF-8.") from None
    if content.lstrip()[:1] in ("[", "{") or suffix in (".json", ".jsonl"):
        return _read_json(path, content)
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    first = lines[0] if lines else "?"
    known = {*wanted, *COLUMNS["text"].split(), *COLUMNS["audio"].split()}
    table = suffix in (".csv", ".tsv")
    for delimiter in ",\t;":
        names = {name.strip(' "').lower() for name in first.split(delimiter)}
        if known & names and first[-1] not in ".?!":
            return _read_table(path, content, delimiter)
        alike = len(names) > 1 and len(lines) > 1 and len({line.count(delimiter) for line in lines}) == 1
        table |= alike and all(len(name.split()) <= 2 for name in names)
    if table and lines:
        raise DataError(f"{path} is no table that can be read: {first[:99]!r} names no known column. {COULD_BE}")
    return [{"text": line} for line in lines]


def _read_json(path: Path, content: str) -> list[Any]:
    """The objects of a file, one after the other or in a list."""
    decoder, rows, at = json.JSONDecoder(object_pairs_hook=_object), list[Any](), 0
    while start := re.compile(r"\S").search(content, at):
        try:
            value, at = decoder.raw_decode(content, start.start())
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, 100,000 brackets
            ends = (start.start(), getattr(error, "pos", start.start()))
            lines = " to ".join(dict.fromkeys(str(content.count("\n", 0, at) + 1) for at in ends))
            said = f"{path}, line {lines}: not valid JSON ({getattr(error, 'msg', error)})"
            raise DataError(f"{said}; a file holds one object a line, or a list of them.") from None
        rows += value if isinstance(value, list) else [value]
    return rows


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of a key that stands twice, Python would take the last value without a word."""
    if len(pairs) > len(out := dict(pairs)):
        raise ValueError(f"a key stands twice in {pairs}"[:300])
    return out


def _read_table(path: Path, content: str, delimiter: str) -> list[Any]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    remedy = "put quotes around fields that hold quotes or commas, and double quotes inside them"
    try:
        header, *records = filter(None, reader)
    except csv.Error as error:  # also a field of more than 131,072 characters, as a quote that is never closed gives
        raise DataError(f"{path}, line {reader.line_num}: not a table that can be read ({error}); {remedy}.") from None
    names = [name.strip().lower() for name in header]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: the columns {twice} stand twice; rename or remove one.")
    for i, record in enumerate(records, 1):
        if len(record) != len(header):
            raise DataError(f"{path}, row {i}: {len(record)} fields, but {len(header)} columns {header}; {remedy}.")
    return [dict(zip(header, record, strict=True)) for record in records]


def _fields(names: set[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column holds what: `{field: column}`, with `""` for none."""
    if missing := sorted(set(given.values()) - names):
        raise DataError(f"{where}: there are no columns {missing}, only {sorted(names)}; correct columns=.")
    fields = dict(given)
    for what, known in COLUMNS.items():
        free = (column for column in known.split() if column in names - set(fields.values()))
        fields.setdefault(what, next(free, ""))
    if len(rivals := sorted(RIVALS & names)) > 1 and "text" not in given:
        raise DataError(f"{where}: {rivals} could each be the question; pass columns={{'text': {rivals[0]!r}}}.")
    return fields


def _cells(row: Any) -> dict[str, Any]:
    """A row by column, in lower case, with Python's types; `None` for NaN, pandas' NA and blanks."""
    if not isinstance(row, Mapping):
        raise DataError(f"expected an object with 'text' or 'audio', got {type(row).__name__}.")
    cells: dict[str, Any] = {}
    for key, value in row.items():
        value = value.item() if isinstance(value, np.generic) else value
        missing = value != value if isinstance(value, float) else type(value).__name__ in ("NAType", "NaTType")
        missing = missing or (isinstance(value, str) and not value.strip())
        if (column := str(key).strip().lower()) in cells:
            raise DataError(f"the column {column!r} stands twice, but for upper and lower case; rename or remove one.")
        if column:  # pandas writes its index without a name
            cells[column] = None if missing else value
    return cells


def _example(
    row: Any, default_id: str, fields: Mapping[str, str], classes: Sequence[str], find: Callable[[str | Path], Path]
) -> Example:
    """The example of a row; `fields` says which column holds what, `classes` what numbers in place of labels mean."""
    meta = _cells(row)
    columns = sorted(meta)
    wanted = ("text", "audio", "messages", "label", "id", "category")
    text, audio, chat, said, name, category = (meta.pop(fields.get(field, ""), None) for field in wanted)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{fields['text']!r} must be a string, not {type(text).__name__}.")
    if text and meta.get("contextstring"):  # HarmBench's
        text = f"{meta.pop('contextstring')}\n\n{text}"
    if hasattr(audio, "get_all_samples"):  # a decoder of `datasets`
        samples = audio.get_all_samples()
        audio = {"array": samples.data.numpy().T, "sampling_rate": samples.sample_rate}
    if isinstance(audio, Mapping) and (not audio or ("array" not in audio and audio.keys() & {"bytes", "path"})):
        audio = audio.get("bytes") or audio.get("path") or None
    messages, text = ((), text) if chat is None else _turns(chat, text, spoken=audio is not None)
    if text is None and audio is None:
        known = f"text: {COLUMNS['text']}; audio: {COLUMNS['audio']}"
        raise DataError(f"neither 'text' nor 'audio' in {columns}; a row needs one of them ({known}). {COULD_BE}")
    if isinstance(audio, (str, Path)):
        if name is None and Path(audio).stem == str(audio):  # neither folder nor ending: the authors' rows
            name = str(audio)
        place = find(audio)
        audio = place if place.is_file() else None
        if audio is None and text is None:
            raise DataError(f"{place} does not exist, or is no ordinary file; correct the path or audio_dir=.")
        if audio is None:
            meta["missing_clip"] = str(place)
    name = int(name) if isinstance(name, float) and name.is_integer() else default_id if name is None else name
    if str(name).startswith("B_"):  # so the authors name a twin
        meta["twin"] = meta.get("twin") or str(name)[2:]
    said = classes[said] if isinstance(said, int) and 0 <= said < len(classes) else said
    if said is None and {"prompt", "type", "focus"} <= set(columns):  # XSTest; unlike those of others, its rows differ
        said = "unsafe" if str(category).startswith("contrast_") else "safe"
    label = LABELS.get(str(said).strip().lower())
    if said is not None and label is None:
        words = "neither 'harmful' nor 'benign' (nor 'unsafe' or 'safe')"
        raise DataError(f"label {said!r} is {words}; rename the column if it is no label.")
    for value in (str(name), text, category, *meta, *meta.values(), *(words for _, words in messages)):
        if isinstance(value, str) and value != value.encode(errors="ignore").decode():  # JSON may hold half a character
            raise DataError(f"{value[:60]!r} is no valid Unicode; re-export the row.")
    return Example(str(name), text, audio, label, None if category is None else str(category), meta, messages)


def _turns(chat: Any, text: str | None, spoken: bool) -> tuple[Turns, str | None]:
    """Earlier turns and the question, which is the chat's last user turn if no column holds it."""
    try:
        turns = [(ROLES[t.get("role", t.get("from"))], t.get("content", t.get("value"))) for t in chat]
    except (AttributeError, KeyError, TypeError):
        raise DataError(f"'messages' must be a list of {{'role': {sorted(ROLES)}, 'content': 'words'}}.") from None
    if not all(isinstance(words, str) for _, words in turns):
        remedy = "of a list of parts, join the texts; the question's clip goes to the row's column 'audio'"
        raise DataError(f"each 'content' in 'messages' must be a string; {remedy}.")
    while text is None and not spoken and turns and turns[-1][0] == "assistant":  # the answer to the question
        turns.pop()
    if text is None and turns and turns[-1][0] == "user":
        text = turns.pop()[1] or None
    if ("user", text) in turns:
        raise DataError("the question itself in an earlier turn of 'messages'; take it out.")
    return tuple(turns), text


def _find(folder: Path | None, any_place: bool, name: str | Path) -> Path:
    """The file of a clip (its name may lack the ending), or where it should be; in the folder, but for `any_place`."""
    path = Path(name) if folder is None else folder / name
    endings = () if path.suffix.lower() in AUDIO_SUFFIXES else AUDIO_SUFFIXES
    try:
        path = next((p for p in [path, *(Path(f"{path}{ending}") for ending in endings)] if p.is_file()), path)
        real = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name of 10,000 characters
        raise DataError(f"the path {str(name)[:200]!r} can't be followed ({error}); correct it.") from None
    if folder is None or any_place:
        return path
    root = folder.resolve()  # files in the hub's cache are links from `snapshots/…` to `blobs`
    roots = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    if not any(real.is_relative_to(root) for root in roots):
        remedy = "if you trust the manifest, pass load_examples(path, label, allow_outside=True) instead of the path"
        raise DataError(f"{str(name)!r} lies outside the manifest's folder {folder}. Move it there; or, {remedy}.")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(source: Any, rate: int, *, name: str = "audio") -> Wave:
    """Any audio as mono float32 `[samples]` in [-1, 1] at `rate` Hz; a DataError if it can't be, or is no sound.

    Args:
        source: a path, encoded bytes, or `{"array": …, "sampling_rate": …}` with `[samples]` or `[samples, channels]`.
        name: how errors call the clip.
    """
    name = name if isinstance(source, (bytes, Mapping)) else f"{name} ({source})"
    wave, source_rate = _array(source, name) if isinstance(source, Mapping) else _decode(source, name)
    if wave.ndim == 2 and wave.shape[1]:
        wave = wave.mean(axis=1)
    if wave.ndim != 1 or not len(wave):
        raise DataError(f"{name}: no samples (shape {list(wave.shape)}); re-export the clip.")
    if not 1_000 <= source_rate <= 1_000_000:
        raise DataError(f"{name}: a rate of {source_rate} Hz: must be positive and sound's; correct the clip's header.")
    if len(wave) * rate > source_rate * MAX_BYTES / 4:
        raise DataError(f"{name}: {len(wave) / source_rate:.0f} s at {rate} Hz exceed MAX_BYTES={MAX_BYTES}; split it.")
    peak = float(np.abs(wave).max())
    if not math.isfinite(peak):
        raise DataError(f"{name}: NaN or infinite samples; re-export the clip.")
    if peak > 8:  # overshoot of resampling or of lossy codecs stays far below
        raise DataError(f"{name}: its peak is {peak:g}, expected floats in [-1, 1]; divide PCM values by 32768.")
    if peak < 1e-4:  # -80 dB: silence, channels that cancel out, or integers that were scaled twice
        warnings.warn(f"{name}: silent, its peak is {peak:.0e}; export it again, or leave it out.", DataWarning, 2)
    return resample(wave.astype(np.float32, copy=False), source_rate, rate)


def _array(source: Mapping[str, Any], name: str) -> tuple[npt.NDArray[Any], int]:
    """The samples, as floats in [-1, 1], and the rate of an audio dict."""
    try:
        wave, rate = np.asarray(source["array"]), int(source["sampling_rate"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        said = f"{name}: an audio dict needs 'array' and 'sampling_rate', which must be numbers"
        raise DataError(f"{said} ({error!r}).") from None
    if wave.ndim == 2 and 0 < wave.shape[0] < wave.shape[1]:  # torchaudio's: the mean would be over time
        raise DataError(f"{name}: 'array' is {list(wave.shape)}, expected [samples, channels]; transpose it.")
    if wave.dtype in (np.int16, np.int32):
        wave = wave / -float(np.iinfo(wave.dtype).min)
    if wave.dtype.kind != "f":  # a list of integers becomes int64, whatever its samples' width
        remedy = "np.asarray(array, np.int16) for 16 bits, array / 128 - 1 for unsigned 8-bit, or floats in [-1, 1]"
        raise DataError(f"{name}: 'array' holds {wave.dtype}, samples of unknown width; pass {remedy}.")
    return wave, rate


def _decode(source: Any, name: str) -> tuple[Wave, int]:
    """Mono samples and their rate; warns if some are missing.

    In blocks, with the channels averaged at once: memory is taken for what is there, never for what a header claims.
    """
    content = source if isinstance(source, bytes) else _read(source, name)
    blocks, total = [np.zeros(0, np.float32)], 0
    try:  # libsndfile knows some MP3s by the ending of their file
        with soundfile.SoundFile(io.BytesIO(content) if isinstance(source, bytes) else str(source)) as file:
            rate, stated, kind = file.samplerate, file.frames, file.format
            while total <= MAX_BYTES / 4 and len(block := file.read(2**20 // file.channels, "float32", always_2d=True)):
                blocks.append(block.mean(axis=1))
                total += len(block)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        remedy = "re-encode it (or a video's sound) as WAV, FLAC or OGG"
        raise DataError(f"{name}: can't be decoded as audio ({error}); {remedy}.") from None
    if total > MAX_BYTES / 4:
        raise DataError(f"{name}: {total / rate:.0f} s decode to more than MAX_BYTES={MAX_BYTES}; split it.")
    damage, size = "", int.from_bytes(content[4:8], "little") + 8  # of a WAV's file; streams state 2 GB or more
    if content[:4] == b"RIFF" and size < 2**31 - 2**16 and abs(size - len(content)) > 1000:
        damage = f"its header states {size} bytes, {len(content)} are there"
    elif kind == "OGG" and not (content[content.rfind(b"OggS") + 5 :] or b"\0")[0] & 4:  # marks the last page
        damage = "its end is missing"
    elif abs(stated - total) > rate / 20:
        damage = f"its header states {stated / rate:.2f} s"
    if damage:
        warnings.warn(f"{name}: damaged: {damage}; {total / rate:.2f} s were read; export it again.", DataWarning, 3)
    return np.concatenate(blocks), rate


def _read(source: object, name: str) -> bytes:
    """The bytes of a file that is not too large."""
    path = Path(str(source))
    if not path.is_file():
        raise DataError(f"{name}: no such file, or no ordinary one (a folder, a pipe); correct the path.")
    if (size := path.stat().st_size) > MAX_BYTES:
        raise DataError(f"{name}: {size} bytes are more than MAX_BYTES={MAX_BYTES}; split it.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error}); check the file and its permissions.") from None


def resample(wave: Wave, rate: int, new_rate: int) -> Wave:
    """Band-limited resampling of `[samples]`, by a polyphase windowed sinc (Smith, "Digital Audio Resampling")."""
    if rate == new_rate:
        return wave
    # Exact kernels of odd rates, such as 44,101 Hz, would take gigabytes: such a rate is off by 0.02% at most.
    ratio = Fraction(new_rate, rate).limit_denominator(math.isqrt(2**22 * rate // new_rate))
    up, down = ratio.numerator, ratio.denominator
    kernels = _sinc_kernels(up, down)
    taps, length = kernels.shape[-1], math.ceil(len(wave) * new_rate / rate)
    frames = math.ceil(length / up)  # a frame: `down` samples in, `up` samples out
    size = min(frames, max(1, 2**22 // (taps + up)))  # in blocks of so many frames: an hour would take gigabytes
    before, needed = (taps - down) // 2, (math.ceil(frames / size) * size - 1) * down + taps
    padded = np.pad(wave, (before, max(0, needed - before - len(wave))))
    blocks = torch.from_numpy(padded).unfold(0, (size - 1) * down + taps, size * down)
    # One strided convolution per output phase: [1, 1, samples] -> [1, up, frames]
    out = [torch.nn.functional.conv1d(block[None, None], kernels, stride=down)[0].T for block in blocks]
    return torch.cat(out).flatten()[:length].numpy()


@lru_cache(maxsize=16)
def _sinc_kernels(up: int, down: int) -> Tensor:
    """Kernels `[up, 1, 2 * width + down]`: one windowed sinc for each output phase.

    More zero crossings on either side are sharper and slower. Kaiser window, β = 14.77: about -120 dB.
    """
    zeros, cutoff = 24, 0.945 * min(up, down) / down  # cut-off in units of the source's Nyquist frequency
    width = math.ceil(zeros / cutoff)
    # Output phase p sits at source time p * down / up; tap k looks at source sample k - width.
    position = (np.arange(-width, width + down) - np.arange(up)[:, None] * (down / up)) * cutoff
    window = np.i0(14.77 * np.sqrt(np.clip(1 - (position / zeros) ** 2, 0, None))) / np.i0(14.77)
    kernels = cutoff * np.sinc(position) * window * (np.abs(position) <= zeros)
    return torch.from_numpy(kernels.astype(np.float32))[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Model inputs


def user_turn(example: Example, condition: str, instruction: str, refusal_prompt: str = "") -> str | None:
    """The text of the user's turn in a condition; `None` if the turn is audio alone.

    The instruction goes with the audio. The refusal prompt is appended, to put the vanilla model into the refusal zone.
    """
    question = str(example.text)
    content = f"The audio content is: {question.rstrip('.?! ')}. {instruction}"
    texts = {"audio-text": instruction, "text-only": question, "audio-only": "", "text-content": content}
    if condition not in texts:
        raise ValueError(f"Unknown condition {condition!r}; there are {CONDITIONS}.")
    return " ".join(part for part in (texts[condition], refusal_prompt) if part) or None


# What differs between processors, as data.
TEMPLATE_ONLY = ("VoxtralProcessor",)  # audio goes in through apply_chat_template alone, as a path or in base64
OWN_TEMPLATE = "set processor.chat_template to its model card's, or pass build_inputs=your_function to RRS"
TEMPLATES = {  # for processors whose checkpoints come without one
    "Phi4MultimodalProcessor": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ audio_token if c['type'] == 'audio' else c['text'] }}{% endfor %}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
}


def control_tokens(processor: Any) -> list[str]:
    """What a tokenizer or processor does not take as the letters it is written in: special tokens, placeholders."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special}
    tokens |= {str(t) for t in getattr(tokenizer, "all_special_tokens", ())}
    named = [getattr(processor, name, None) for name in dir(processor) if name.endswith("_token")]
    tokens |= {str(t) for t in named if t and not callable(t)}  # methods are called so, too
    return sorted((t for t in tokens if len(t) > 2), key=len, reverse=True)


def as_letters(text: str, tokens: Iterable[str]) -> str:
    """The text with a space put into each of `tokens`, so that nothing a user types acts as a control token."""
    for token in tokens:
        if token in text:
            letters = f"{token[0]} {token[1:]}"
            warnings.warn(f"{text[:60]!r} holds the control token {token!r}; read as {letters!r}.", DataWarning, 2)
            text = text.replace(token, letters)
    return text


class Renderer:
    """Turns a user's turn into the inputs of a Hugging Face processor's model: a single, unpadded prompt.

    Args:
        processor: the model's processor (or tokenizer, for a text-only model).
        system: a system prompt; `None` leaves it to the chat template.
        template_kwargs: more arguments of the chat template, e.g. `{"enable_thinking": False}`.
    """

    def __init__(
        self, processor: Any, system: str | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.processor, self.system, self.template_kwargs = processor, system, dict(template_kwargs or {})
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.name, self.tokens = type(processor).__name__, control_tokens(processor)
        template: Any = getattr(processor, "chat_template", None) or getattr(self.tokenizer, "chat_template", None)
        several = f" 'default', only {list(template)}" if isinstance(template, Mapping) else ""
        self.template = template.get("default") if several else template or TEMPLATES.get(self.name)
        if not self.template and self.name not in TEMPLATE_ONLY:
            raise ValueError(f"{self.name} and its tokenizer have no chat template{several}; {OWN_TEMPLATE}.")
        audio_processor = getattr(processor, "audio_processor", None)  # Phi-4's
        self.extractor: Any = getattr(processor, "feature_extractor", None) or audio_processor
        self.rate = int(getattr(self.extractor, "sampling_rate", 0) or 0)
        self.kept = self.rate  # samples of the longest clip of which the processor is known to keep all

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a prompt looks like, for hashes and records."""
        own = {name: getattr(self, name) for name in ("name", "template", "system", "template_kwargs")}
        return {**own, "extractor": self.extractor.to_dict() if hasattr(self.extractor, "to_dict") else None}

    def __call__(self, text: str | None, wave: Wave | None, messages: Turns = ()) -> dict[str, Any]:
        """Tensors of one prompt, batch dimension 1: earlier turns, audio (`[samples]` at `self.rate` Hz), then text."""
        if wave is not None and not self.rate:
            raise ValueError(f"{self.name} takes no audio; use the condition text-only.")
        inputs = self._inputs(text, wave, messages)
        if wave is not None and len(wave) > self.kept:  # processors cut without a word: does its end change anything?
            other, end = wave.copy(), len(wave) - self.rate // 10  # a tenth of a second is not missed
            other[end:] = np.random.default_rng(0).uniform(-0.5, 0.5, len(wave) - end)
            changed = self._inputs(text, other, messages)
            if all(k in changed and torch.equal(v, changed[k]) for k, v in inputs.items()):
                said = f"The clip is {len(wave) / self.rate:.2f} s long, and {self.name} drops its end without a word"
                raise DataError(f"{said}; split it.")
            self.kept = len(wave)
        return inputs

    def _inputs(self, text: str | None, wave: Wave | None, turns: Turns) -> dict[str, Tensor]:
        if self.name in TEMPLATE_ONLY:
            chat = self._messages(text, wave, turns)
            if wave is not None:
                soundfile.write(file := io.BytesIO(), wave, self.rate, format="WAV", subtype="FLOAT")
                chat[-1]["content"][0] = {"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()}
            inputs = self.processor.apply_chat_template([chat], **self.template_kwargs)
        else:
            prompt, options = self._prompt(text, wave, turns), {"return_tensors": "pt", "add_special_tokens": False}
            if wave is None:
                inputs = self.tokenizer(prompt, **options)
            else:
                inputs = self.processor(text=[prompt], audio=[wave], sampling_rate=self.rate, **options)
        return {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def _messages(self, text: str | None, wave: Wave | None, turns: Turns) -> list[dict[str, Any]]:
        """The chat in the form of the chat templates: system prompt, earlier turns, and the user's."""
        if self.system is not None and not any(role == "system" for role, _ in turns):
            turns = (("system", self.system), *turns)
        chat = [(role, [{"type": "text", "text": as_letters(words, self.tokens)}]) for role, words in turns]
        spoken = [{"type": "audio", "audio": "clip"}] if wave is not None else []
        typed = [{"type": "text", "text": as_letters(text, self.tokens)}] if text else []
        return [{"role": role, "content": content} for role, content in [*chat, ("user", spoken + typed)]]

    def _prompt(self, text: str | None, wave: Wave | None, turns: Turns = ()) -> str:
        """The rendered chat; texts and audio placeholder are verified to be in it."""
        audio_token = getattr(self.processor, "audio_token", None) or ""
        chat = self._messages(text, wave, turns)
        plain = [{"role": m["role"], "content": "".join(c.get("text", "") for c in m["content"])} for m in chat]
        wanted = [*(m["content"].strip() for m in plain), audio_token if wave is not None else ""]
        # Templates of text models know strings only, most of audio models both, a few lists only.
        for messages in (plain, chat) if wave is None else (chat,):
            prompt = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True,
                audio_token=audio_token or None, **self.template_kwargs,
            )  # fmt: skip
            if not (lost := [part for part in wanted if part not in prompt]):
                return str(prompt)
        raise ValueError(f"The chat template of {self.name} drops {lost}, not in {prompt!r}; {OWN_TEMPLATE}.")
