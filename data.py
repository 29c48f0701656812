"""Examples in, model inputs out: manifests, audio decoding, resampling, and the input conditions."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
the question typed in the paper's second form, `TEXT_CONTENT`."""

TEXT_CONTENT = "The audio content is: {question}. {instruction}"

# Limits of one file, checked before memory is taken: files claim and compress what they like.
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
    """Whatever else the row held (twin, voice, …); under `missing_clip` the path of a clip that was not found."""
    messages: Turns = ()
    """Earlier turns, before the question. A system prompt among them replaces the renderer's."""

    def __post_init__(self) -> None:
        if not all(isinstance(turn, tuple) and len(turn) == 2 for turn in self.messages):
            raise DataError(f"{self.id}: messages must be pairs (role, text).")

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
        if self.audio is None:
            return ""
        if isinstance(self.audio, (str, Path)):
            stored = _read(self.audio, f"{self.id} ({self.audio})")
        elif isinstance(self.audio, Mapping) and "array" in self.audio:
            array = np.asarray(self.audio["array"])
            stored = f"{self.audio.get('sampling_rate')} {array.dtype} {array.shape}".encode() + array.tobytes()
        else:
            stored = self.audio if isinstance(self.audio, bytes) else repr(self.audio).encode()
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
    return f"{condition}: {len(out)} of {len(examples)} examples have no {what}: {_some(out)}" if out else ""


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _mark(what: str, value: object) -> int:
    return int.from_bytes(hashlib.sha256(f"{what} {value}".encode()).digest()[:8], "little", signed=True)


def _marks(e: Example) -> dict[str, int]:
    """An example's question (its text; without one, its clip), id and, if it names one, twin, hashed."""
    question = " ".join(e.text.casefold().split()) if e.text else e.audio_hash
    known = {"question": question, "id": e.id, "twin": e.meta.get("twin")}
    return {what: _mark(what, value) for what, value in known.items() if value is not None}


def marks(examples: Iterable[Example]) -> frozenset[int]:
    """What `shared` knows examples by, to be kept without them: 64-bit hashes of their questions, ids and twins."""
    return frozenset(mark for e in examples for mark in _marks(e).values())


def shared(ours: Sequence[Example], others: Iterable[Example] | frozenset[int], *, twins: bool = False) -> list[str]:
    """Ids of those of `ours` whose question (its text; without one, its clip) is also among `others`.

    `others` may be their `marks`. With `twins`, also ids of those that name one as their `twin`, or are named by one.
    """
    known = others if isinstance(others, frozenset) else marks(others)

    def sought(e: Example) -> set[int]:
        links = {_mark("twin", e.id)} | ({_mark("id", twin)} if (twin := e.meta.get("twin")) else set())
        return {_marks(e)["question"]} | (links if twins else set())

    return [e.id for e in ours if sought(e) & known]


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
        label: given to rows that have none. Rows that carry the *other* label are left out, so that one file can
            serve as `harmful=` and as `benign=`.
        columns: what holds what, where the names do not tell: `{"text": "my question", "audio": "my file"}`.
        audio_dir: folder of the clips; default the file's own.
        allow_outside: let rows name audio files that are not below that folder (links are followed).
    """
    given = {what: column.strip().lower() for what, column in (columns or {}).items()}
    if unknown := sorted(given.keys() - COLUMNS.keys()):
        raise DataError(f"columns={unknown} are unknown; there are {sorted(COLUMNS)}.")
    name, folder, classes = "examples", None, ()
    if isinstance(source, (str, Path)):
        path, name = Path(source), str(source)
        rows, folder = _read_file(path, set(given.values())), path.parent
    elif isinstance(source, Mapping):
        rows = [source]
    elif isinstance(source, Iterable):
        table: Any = source
        rows = list(table.to_dict("records") if hasattr(table, "iterrows") else table)  # pandas
        rows = [{"text": r} if isinstance(r, str) else {"audio": r} if isinstance(r, Path) else r for r in rows]
        numbered = (getattr(source, "features", None) or {}).get(given.get("label", "label"))  # `datasets` count labels
        classes = getattr(numbered, "names", ())
    else:
        raise DataError(f"Examples must be a path or an iterable of dicts, not {type(source).__name__}.")
    rows = [row if isinstance(row, Example) else _cells(row, f"{name}, row {i}") for i, row in enumerate(rows, 1)]
    names = {key for row in rows if not isinstance(row, Example) for key in row}
    fields = _fields(names, given, name) if names else {}
    find = partial(_find, Path(audio_dir) if audio_dir else folder, allow_outside)
    examples, seen = list[Example](), dict[str, int]()
    for i, row in enumerate(rows, 1):
        e = row if isinstance(row, Example) else _example(row, i, f"{name}, row {i}", fields, names, classes, find)
        if seen.setdefault(e.id, i) != i:
            raise DataError(f"{name}: rows {seen[e.id]} and {i} have the same id {e.id!r}; ids must differ.")
        if label is None or e.label in (None, label):
            examples.append(e if e.label or label is None else replace(e, label=label))
    if not examples:
        held = f": its rows are all of the other label; pass the file with the {label} ones" if seen else ""
        raise DataError(f"{name}: no {label + ' ' if label else ''}examples in it{held}.")
    if absent := [f"{e.id} ({e.meta['missing_clip']})" for e in examples if "missing_clip" in e.meta]:
        said = f"{name}: {len(absent)} of {len(examples)} clips are not there: {_some(absent)}. These rows can only be "
        warnings.warn(f"{said}typed; correct the paths, or pass audio_dir='their folder'.", DataWarning, stacklevel=2)
    return examples


def _fields(names: set[str], given: Mapping[str, str], where: str) -> dict[str, str]:
    """Which column holds what: `{field: column}`."""
    if missing := sorted(set(given.values()) - names):
        raise DataError(f"{where}: there are no columns {missing}, only {sorted(names)}; correct columns=.")
    found = dict(given)
    for what, known in COLUMNS.items():
        column = next((c for c in known.split() if c in names and c not in found.values()), None)
        if column and what not in given:
            found[what] = column
    if not found.keys() & {"text", "audio", "messages"}:
        words = f"text: {COLUMNS['text']}; audio: {COLUMNS['audio']}"
        raise DataError(f"{where}, row 1: neither 'text' nor 'audio' in {sorted(names)}, nor ({words}). {COULD_BE}")
    if len(rivals := sorted(RIVALS & names)) > 1 and "text" not in given:
        raise DataError(f"{where}: {rivals} could each be the question; pass columns={{'text': {rivals[0]!r}}}.")
    return found


def _read_file(path: Path, wanted: set[str]) -> list[Any]:
    """The clip; or the rows of JSON, JSONL, a table; or of plain text, one for each line."""
    suffix = path.suffix.lower()
    if path.is_dir():
        clips = f'load_examples(sorted(Path("{path}").rglob("*.wav")))'
        raise DataError(f"{path} is a folder; pass the path of a manifest in it, or its clips: {clips}.")
    if suffix in AUDIO_SUFFIXES:
        return [{"audio": path.name}]
    try:
        content = _read(path, str(path), remedy="split it").decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: can't be read as UTF-8 text ({error}); save it as UTF-8.") from None
    if content.lstrip().startswith("["):
        return list(_json(content, str(path)))
    if content.lstrip().startswith("{") or suffix in (".json", ".jsonl"):
        numbered = enumerate(content.split("\n"), 1)  # not splitlines(): U+2028 and the like may be in a JSON string
        return [_json(line, f"{path}, line {i}", "; one object a line") for i, line in numbered if line.strip()]
    delimiters = ",\t;"
    if content[:4].lower() == "sep=":  # what Excel writes
        delimiters, content = content[4:5], content.partition("\n")[2]
    lines = [line for line in content.splitlines() if line.strip()]
    first = lines[0].strip() if lines else "?"
    known = {*wanted, *COLUMNS["text"].split(), *COLUMNS["audio"].split()}
    for delimiter in delimiters:
        names = [name.strip(' "') for name in first.split(delimiter)]
        if known & {name.lower() for name in names} and first[-1] not in ".?!":
            return _read_table(path, content, delimiter)
        alike = len(lines) > 1 and len(names) > 1 and len({line.count(delimiter) for line in lines}) == 1
        if alike and all(len(name.split()) <= 2 for name in names):
            raise DataError(f"{path} could be a table with unknown columns {names}, or plain text. {COULD_BE}")
    if suffix in (".csv", ".tsv") and lines:
        raise DataError(f"{path} is no table that can be read: {first[:99]!r} names no known column. {COULD_BE}")
    return [{"text": line.strip()} for line in lines]


def _json(text: str, where: str, remedy: str = "") -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(out := dict(pairs)) < len(pairs):
            raise DataError(f"{where}: a key stands twice in {[key for key, _ in pairs][:20]}; remove one.")
        return out

    try:
        return json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except json.JSONDecodeError as error:
        line = "" if remedy else f", line {error.lineno}"
        raise DataError(f"{where}{line}: not valid JSON ({error.msg}){remedy}.") from None
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
        raise DataError(f"{where}: not JSON that can be read ({error}){remedy}.") from None


def _read_table(path: Path, content: str, delimiter: str) -> list[Any]:
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    remedy = "put quotes around fields that hold quotes or commas, and double quotes inside them"
    try:
        header, *records = [record for record in reader if record]
    except csv.Error as error:  # also a field of more than 131,072 characters, as a quote that is never closed gives
        raise DataError(f"{path}, line {reader.line_num}: not a table that can be read ({error}); {remedy}.") from None
    names = [name.strip().lower() for name in header]
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise DataError(f"{path}: the columns {twice} stand twice; rename or remove one.")
    for i, record in enumerate(records, 1):
        if len(record) != len(names):
            raise DataError(f"{path}, row {i}: {len(record)} fields, but {len(names)} columns {names}; {remedy}.")
    return [dict(zip(names, record, strict=True)) for record in records]


def _cells(row: Any, where: str) -> dict[str, Any]:
    """A row by column, in lower case, with Python's types; `None` for NaN, pandas' NA and blanks."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with 'text' or 'audio', got {type(row).__name__}.")
    out: dict[str, Any] = {}
    for key, value in row.items():
        value = value.item() if isinstance(value, np.generic) else value
        missing = value != value if isinstance(value, float) else type(value).__name__ in ("NAType", "NaTType")
        missing = missing or (isinstance(value, str) and not value.strip())
        if (column := str(key).strip().lower()) in out:
            raise DataError(f"{where}: two keys {column!r} in {list(row)}, but for upper and lower case; remove one.")
        if not _is_unicode(f"{column}{value if isinstance(value, str) else ''}"):
            raise DataError(f"{where}: {column!r} is no valid Unicode; re-export the row.")
        out[column] = None if missing else value
    return out


def _is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8: JSON lets half a character (a lone surrogate) through."""
    return text == text.encode(errors="ignore").decode()


def _example(
    row: dict[str, Any], number: int, where: str, fields: dict[str, str], names: set[str], classes: Any, find: Any
) -> Example:
    """The example of a row; `fields` says which of the source's columns (`names`) holds what."""
    meta = {column: value for column, value in row.items() if column}
    wanted = ("text", "audio", "messages", "label", "id", "category")
    text, audio, chat, said, name, category = (meta.pop(fields.get(field, ""), None) for field in wanted)
    if text is not None and not isinstance(text, str):
        raise DataError(f"{where}: {fields['text']!r} must be a string, not {type(text).__name__}.")
    if text and meta.get("contextstring"):  # HarmBench's
        text = f"{meta.pop('contextstring')}\n\n{text}"
    messages: Turns = ()
    audio = _encoded(audio)
    if chat is not None:
        messages, text, audio = _turns(chat, text, audio, where)
    if text is None and audio is None:
        raise DataError(f"{where}: neither 'text' nor 'audio' in {sorted(row)}; a row needs one of them.")
    if isinstance(audio, (str, Path)):
        if name is None and Path(audio).stem == str(audio):  # neither folder nor ending: the authors' rows
            name = str(audio)
        audio = place = find(audio, where)
        if not place.is_file():
            meta["missing_clip"], audio = str(place), None
        if audio is None and text is None:
            raise DataError(f"{where}: {place} does not exist, or is no ordinary file; correct the path or audio_dir=.")
    elif audio is not None and not isinstance(audio, (bytes, Mapping)):
        raise DataError(f"{where}: 'audio' must be a path, bytes or a dict with 'array', not {type(audio).__name__}.")
    name = int(name) if isinstance(name, float) and name.is_integer() else f"row-{number}" if name is None else name
    if not isinstance(name, (str, int)):
        raise DataError(f"{where}: 'id' must be a string or a number, not {name!r}; leave it out for 'row-{number}'.")
    if str(name).startswith("B_"):  # so the authors name a twin
        meta["twin"] = meta.get("twin") or str(name)[2:]
    said = classes[said] if isinstance(said, int) and 0 <= said < len(classes) else said
    if said is None and {"prompt", "type", "focus"} <= names:  # XSTest; unlike those of others, its rows differ
        said = "unsafe" if str(category).startswith("contrast_") else "safe"
    label = LABELS.get(str(said).strip().lower())
    if said is not None and label is None:
        words = "neither 'harmful' nor 'benign' (nor 'unsafe' or 'safe')"
        raise DataError(f"{where}: label {said!r} is {words}; rename the column if it is no label.")
    return Example(str(name), text, audio, label, None if category is None else str(category), meta, messages)


def _find(folder: Path | None, allow_outside: bool, name: str | Path, where: str) -> Path:
    """The file of a clip; where it should be, if there is none.

    Names may lack their ending, have backslashes between folders, or compose their accents in another way.
    """
    endings = ("",) if Path(name).suffix.lower() in AUDIO_SUFFIXES else ("", *AUDIO_SUFFIXES)
    plain = str(name).replace("\\", "/")
    forms = dict.fromkeys([str(name), plain, *(unicodedata.normalize(form, plain) for form in ("NFC", "NFD"))])
    paths = [_inside(folder, f"{form}{ending}", where, allow_outside) for form in forms for ending in endings]
    return next((path for path in paths if path.is_file()), paths[0])


def _inside(folder: Path | None, name: str, where: str, allow_outside: bool) -> Path:
    """The path that a row names; it can't lead outside its folder unless that is allowed."""
    path = Path(name) if folder is None else folder / name
    try:
        real = path.resolve()
        path.is_file()
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name of 10,000 characters
        raise DataError(f"{where}: the path {name[:200]!r} can't be followed ({error}); correct it.") from None
    if folder is None or allow_outside:
        return path
    root = folder.resolve()  # files in the hub's cache are links from `snapshots/…` to `blobs`
    roots = [root, *(above.parent / "blobs" for above in root.parents if above.name == "snapshots")]
    if not any(real.is_relative_to(root) for root in roots):
        raise DataError(
            f"{where}: {name!r} lies outside the manifest's folder {folder}. Move it there; or, if you "
            "trust the manifest, pass load_examples(path, label, allow_outside=True) instead of the path."
        )
    return path


def _encoded(audio: Any) -> Any:
    """Audio as `datasets` gives it, as a path, bytes or an array."""
    if hasattr(audio, "get_all_samples"):  # a decoder
        samples = audio.get_all_samples()
        return {"array": samples.data.numpy().T, "sampling_rate": samples.sample_rate}
    if isinstance(audio, Mapping) and (not audio or ("array" not in audio and audio.keys() & {"bytes", "path"})):
        data, path = audio.get("bytes"), audio.get("path")
        # libsndfile tells an MP3 with padding before its first frame by the file's ending, which bytes do not have.
        if data and str(path).lower().endswith(".mp3") and (frame := re.search(rb"ID3|\xff[\xe0-\xff]", data)):
            return data[frame.start() :]
        return data or path or None
    return audio


def _turns(chat: Any, text: str | None, audio: Any, where: str) -> tuple[Turns, str | None, Any]:
    """Earlier turns, question and clip. The question is the chat's last user turn, if no other column holds it."""
    turns, clips = list[tuple[str, str]](), list[list[Any]]()
    for turn in chat if isinstance(chat, (list, tuple, np.ndarray)) else [chat]:
        turn = turn if isinstance(turn, Mapping) else {}
        role, content = ROLES.get(str(turn.get("role", turn.get("from")))), turn.get("content", turn.get("value"))
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role is None or not isinstance(parts, (list, tuple)) or not all(isinstance(part, Mapping) for part in parts):
            raise DataError(f"{where}: 'messages' must be a list of {{'role': {sorted(ROLES)}, 'content': …}}.")
        clips.append([part.get("audio", part) for part in parts if part.get("type") == "audio"])
        turns.append((role, "\n".join(str(part["text"]) for part in parts if part.get("text"))))
    while text is None and audio is None and turns and turns[-1][0] == "assistant":  # the answer to the question
        turns.pop(), clips.pop()
    if text is None and turns and turns[-1][0] == "user":
        text, spoken = turns.pop()[1] or None, clips.pop()
        audio = _encoded(spoken[0]) if audio is None and spoken else audio
    if any(clips) or ("user", text) in turns:
        raise DataError(f"{where}: a clip, or the question itself, in an earlier turn of 'messages'; take it out.")
    if not _is_unicode("".join([text or "", *(words for _, words in turns)])):
        raise DataError(f"{where}: 'messages' are no valid Unicode; re-export the row.")
    return tuple(turns), text, audio


# ---------------------------------------------------------------------------------------------------------------------
# Audio


def load_audio(
    source: Any, rate: int, *, name: str = "audio", max_seconds: float = MAX_SECONDS, max_bytes: int = MAX_BYTES
) -> Wave:
    """Any audio as mono float32 `[samples]` in [-1, 1] at `rate` Hz.

    Args:
        source: a path, encoded bytes, or `{"array": …, "sampling_rate": …}` with `[samples]` or `[samples, channels]`.
        name: how errors call the clip.
        max_seconds, max_bytes: longer clips raise a DataError, and larger ones (the file, or mono samples as float32).
    """
    if isinstance(source, Mapping):
        wave, source_rate = _array(source, name)
    else:
        name = f"{name} ({source})" if isinstance(source, (str, Path)) else name
        try:
            wave, source_rate = _decode(source, name, max_seconds, max_bytes)
        except DataError:
            raise
        except (soundfile.LibsndfileError, OSError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{name}: can't be decoded as audio ({error}); re-encode it (or a video's sound) as WAV, FLAC or OGG."
            ) from None
    if wave.ndim == 2 and wave.shape[1]:
        wave = wave.mean(axis=1)
    if wave.ndim != 1 or not len(wave):
        raise DataError(f"{name}: no samples (shape {list(wave.shape)}); re-export the clip.")
    if not 1_000 <= source_rate <= 1_000_000:
        raise DataError(f"{name}: a rate of {source_rate} Hz: must be positive and sound's; correct the clip's header.")
    if (seconds := len(wave) / source_rate) > max_seconds:
        raise DataError(f"{name}: {seconds:.1f} s is longer than the {max_seconds:g} s allowed; cut it.")
    with np.errstate(over="ignore"):
        wave = wave.astype(np.float32, copy=False)
    peak = float(np.abs(wave).max())
    if not math.isfinite(peak):
        raise DataError(f"{name}: NaN or infinite samples; re-export the clip.")
    if peak > 8:  # overshoot of resampling or of lossy codecs stays far below
        raise DataError(f"{name}: its peak is {peak:g}, expected floats in [-1, 1]; divide PCM values by 32768.")
    if peak < 1e-4:  # -80 dB: silence, channels that cancel out, or integers that were scaled twice
        warnings.warn(f"{name}: silent, its peak is {peak:.0e}; export it again, or leave it out.", DataWarning, 2)
    return resample(wave, source_rate, rate)


def _array(source: Mapping[str, Any], name: str) -> tuple[npt.NDArray[Any], int]:
    """The samples and the rate of an audio dict; integers become floats in [-1, 1]."""
    if not {"array", "sampling_rate"} <= source.keys():
        raise DataError(f"{name}: an audio dict needs 'array' and 'sampling_rate', it has {list(source)}.")
    try:
        wave, rate = np.asarray(source["array"]), int(source["sampling_rate"])
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
    return wave, rate


def _decode(source: Any, name: str, max_seconds: float, max_bytes: int) -> tuple[Wave, int]:
    """Mono samples and their rate; warns where the file states another length.

    In blocks, with the channels averaged at once: memory is taken for what is there, never for what a header claims.
    """
    if isinstance(source, bytes) and len(source) > max_bytes:
        raise DataError(f"{name}: {len(source)} bytes are more than max_bytes={max_bytes}; cut the clip.")
    content = source if isinstance(source, bytes) else _read(source, name, max_bytes)
    wav, stated_bytes, there = _wav_lengths(content)
    encoded = io.BytesIO(wav or content) if wav or isinstance(source, bytes) else str(source)
    with soundfile.SoundFile(encoded) as file:
        limit = min(max_seconds * file.samplerate, max_bytes / 4)
        blocks, total, size = [], 0, max(1, 2**20 // file.channels)
        while total <= limit and len(block := file.read(size, dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1))
            total += len(block)
        rate, stated = file.samplerate, total * stated_bytes / there if there else file.frames
        whole = file.format != "OGG" or (content[content.rfind(b"OggS") + 5 :] or b"\0")[0] & 4  # marks the last page
    if max_seconds * rate >= total > limit:
        raise DataError(f"{name}: {total / rate:.0f} s decode to more than max_bytes={max_bytes}; cut the clip.")
    if total <= limit and (not whole or abs(stated - total) > rate / 20):
        states = f"its header states {stated / rate:.2f} s" if whole else "its end is missing"
        warnings.warn(f"{name}: damaged: {states}, {total / rate:.2f} s are there; export it again.", DataWarning, 3)
    return np.concatenate(blocks) if blocks else np.zeros(0, np.float32), rate


def _wav_lengths(content: bytes) -> tuple[bytes | None, int, int]:
    """Of a WAV `(repaired, bytes of samples stated, bytes there)`; zeros for no WAV, or a stream of unknown length.

    Repaired is a file that states less than there is, e.g. 0, as programs leave it that can't go back to the header.
    """
    at = 12
    while content[:4] + content[8:12] == b"RIFFWAVE" and at + 8 < min(len(content), 2**20):
        stated, there = int.from_bytes(content[at + 4 : at + 8], "little"), len(content) - at - 8
        if content[at : at + 4] == b"data":
            end = at + 8 + stated + stated % 2
            if stated >= 2**31 - 2**10:
                break
            if stated < there - 8 and not content[end : end + 4].strip().isalnum():  # as chunks are named
                return content[: at + 4] + b"\xff" * 4 + content[at + 8 :], stated, there
            return None, max(stated, there), there
        at += 8 + stated + stated % 2
    return None, 0, 0


def _read(path: str | Path, name: str, max_bytes: int = MAX_BYTES, remedy: str = "cut the clip") -> bytes:
    """The bytes of a file that is not too large."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{name}: no such file, or no ordinary one; correct the path.")
    if path.stat().st_size > max_bytes:
        raise DataError(f"{name}: {path.stat().st_size} bytes are more than max_bytes={max_bytes}; {remedy}.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: can't be read ({error}); check the file and its permissions.") from None


def resample(wave: Wave, rate: int, new_rate: int) -> Wave:
    """Band-limited resampling of `[samples]`, by a polyphase windowed sinc (Smith, "Digital Audio Resampling")."""
    if rate <= 0 or new_rate <= 0:
        raise DataError(f"Sampling rates must be positive, got {rate} and {new_rate} Hz.")
    if rate == new_rate:
        return wave
    ratio = Fraction(new_rate, rate)
    if ratio.numerator * ratio.denominator > 2**22:  # e.g. 44,101 Hz: the kernels would take gigabytes
        ratio = ratio.limit_denominator(math.isqrt(2**22 * rate // new_rate))  # off by 0.02% at most
    up, down = ratio.numerator, ratio.denominator
    kernels, width = _sinc_kernels(up, down)
    length = math.ceil(len(wave) * new_rate / rate)
    frames = math.ceil(length / up)  # a frame: `down` samples in, `up` samples out
    padded = np.pad(wave, (width, max(0, (frames + 1) * down - len(wave)) + width))
    out, size = np.empty((frames, up), np.float32), max(1, 2**22 // (kernels.shape[-1] + up))
    for start in range(0, frames, size):  # in blocks: an hour would take gigabytes
        stop = min(start + size, frames)
        block = torch.from_numpy(padded[start * down : (stop - 1) * down + kernels.shape[-1]])
        # One strided convolution per output phase: [1, 1, samples] -> [1, up, frames]
        out[start:stop] = torch.nn.functional.conv1d(block[None, None], kernels, stride=down)[0].T.numpy()
    return out.reshape(-1)[:length]


@lru_cache(maxsize=16)
def _sinc_kernels(up: int, down: int) -> tuple[Tensor, int]:
    """Kernels `[up, 1, 2 * width + down]`: one windowed sinc for each output phase.

    More zero crossings on either side are sharper and slower. Kaiser window, β = 14.77: about -120 dB.
    """
    zeros, cutoff = 24, 0.945 * min(up, down) / down  # cut-off in units of the source's Nyquist frequency
    width = math.ceil(zeros / cutoff)
    # Output phase p sits at source time p * down / up; tap k looks at source sample k - width.
    phases = torch.arange(up, dtype=torch.float64)[:, None] * (down / up)
    position = (torch.arange(-width, width + down, dtype=torch.float64) - phases) * cutoff
    beta = torch.tensor(14.769656459379492, dtype=torch.float64)
    window = torch.i0(beta * (1 - (position / zeros) ** 2).clamp(min=0).sqrt()) / torch.i0(beta)
    kernels = cutoff * torch.sinc(position) * window * (position.abs() <= zeros)
    return kernels.float()[:, None], width


# ---------------------------------------------------------------------------------------------------------------------
# Model inputs


def user_turn(example: Example, condition: str, instruction: str, refusal_prompt: str = "") -> str | None:
    """The text of the user's turn in a condition; `None` if the turn is audio alone.

    The instruction goes with the audio. The refusal prompt is appended, to put the vanilla model into the refusal zone.
    """
    question = str(example.text)
    content = TEXT_CONTENT.format(question=question.rstrip(".?! "), instruction=instruction)
    texts = {"audio-text": instruction, "text-only": question, "audio-only": "", "text-content": content}
    if condition not in texts:
        raise ValueError(f"Unknown condition {condition!r}; there are {CONDITIONS}.")
    return " ".join(part for part in (texts[condition], refusal_prompt) if part) or None


# What differs between processors, as data.
TEMPLATE_ONLY = ("VoxtralProcessor",)  # audio goes in through apply_chat_template alone, as a path or in base64
TEMPLATES = {  # for processors whose checkpoints come without one
    "Phi4MultimodalProcessor": (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for c in m['content'] %}{{ audio_token if c['type'] == 'audio' else c['text'] }}{% endfor %}{% endif %}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
}
PACKAGES = {  # what processors import beyond our own requirements
    "torchvision": "torchvision pillow", "pil library": "pillow", "torchaudio": "torchaudio",
    "mistral": "'mistral-common[audio]'", "timm": "timm torchvision",
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


def control_tokens(processor: Any) -> list[str]:
    """What a tokenizer or processor does not take as the letters it is written in: special tokens, placeholders."""
    tokenizer = getattr(processor, "tokenizer", processor)
    tokens = {str(t) for t in getattr(tokenizer, "added_tokens_decoder", {}).values() if t.special}
    tokens |= {str(t) for t in getattr(tokenizer, "all_special_tokens", ())}
    tokens |= {str(getattr(processor, name, None) or "") for name in dir(processor) if name.endswith("_token")}
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
    """Turns one user turn into the inputs of a Hugging Face processor's model: a single, unpadded prompt.

    Args:
        processor: the model's processor (or tokenizer, for a text-only model).
        system: a system prompt; `None` leaves it to the chat template.
        template_kwargs: more arguments of the chat template, e.g. `{"enable_thinking": False}`.

    Raises:
        ValueError: no chat template anywhere.
    """

    def __init__(
        self, processor: Any, system: str | None = None, template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.processor, self.system, self.template_kwargs = processor, system, dict(template_kwargs or {})
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.name, self.tokens = type(processor).__name__, control_tokens(processor)
        found = (getattr(owner, "chat_template", None) for owner in (processor, self.tokenizer))
        self.template: Any = next(filter(None, found), TEMPLATES.get(self.name))
        if isinstance(self.template, Mapping):  # several, by name
            self.template = self.template.get("default") or self.template
            if not isinstance(self.template, str):
                raise ValueError(
                    f"Set processor.chat_template to one of {self.name}'s templates {list(self.template)}."
                )
        if not self.template and self.name not in TEMPLATE_ONLY:
            raise ValueError(
                f"{self.name} has no chat template, nor has its tokenizer; set processor.chat_template, "
                "or pass build_inputs=your_function to RRS."
            )
        found = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
        self.extractor: Any = next(filter(None, found), None)
        self.rate = int(getattr(self.extractor, "sampling_rate", 0) or 0)
        self.kept = self.rate  # samples of the longest clip of which the processor is known to keep all

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what a prompt looks like, for hashes and records."""
        own = {name: getattr(self, name) for name in ("name", "template", "system", "template_kwargs")}
        return {**own, "extractor": self.extractor.to_dict() if hasattr(self.extractor, "to_dict") else None}

    def __call__(self, text: str | None, wave: Wave | None, messages: Turns = ()) -> dict[str, Any]:
        """Model inputs of one prompt, each tensor with a batch dimension of 1: earlier turns, then audio, then text.

        `wave` is mono float32, `[samples]` at `self.rate` Hz.
        """
        if wave is None:
            return self._inputs(text, None, messages)
        if not self.rate:
            raise ValueError(f"{self.name} takes no audio; use the condition text-only.")
        inputs = self._inputs(text, wave, messages)
        if len(wave) > self.kept:
            self._check_kept(wave, inputs, lambda other: self._inputs(text, other, messages))
        return inputs

    def _check_kept(self, wave: Wave, inputs: Mapping[str, Tensor], make: Callable[[Wave], Any]) -> None:
        """Raises if the end of a clip has no effect on the model's inputs: processors cut without a word."""
        end = len(wave) - self.rate // 10  # what is cut but for a tenth of a second is not missed
        other = wave.copy()
        other[end:] = np.random.default_rng(0).uniform(-0.5, 0.5, len(wave) - end)
        changed = make(other)
        if all(k in changed and torch.equal(v, changed[k]) for k, v in inputs.items()):
            long = len(wave) / self.rate
            raise DataError(f"The clip is {long:.2f} s long, and {self.name} drops its end without a word; split it.")
        self.kept = len(wave)

    def _inputs(self, text: str | None, wave: Wave | None, turns: Turns) -> dict[str, Tensor]:
        with needed_packages(self.name):
            if self.name in TEMPLATE_ONLY:
                chat = [self._messages(text, wave, turns)]
                inputs = self.processor.apply_chat_template(chat, **self.template_kwargs)
            elif wave is None:
                prompt = self._prompt(text, None, turns)
                inputs = self.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
            else:
                inputs = self.processor(
                    text=[self._prompt(text, wave, turns)], audio=[wave], sampling_rate=self.rate, return_tensors="pt",
                    add_special_tokens=False,
                )  # fmt: skip
        return {k: v for k, v in inputs.items() if isinstance(v, Tensor)}

    def _messages(self, text: str | None, wave: Wave | None, turns: Turns) -> list[dict[str, Any]]:
        """The chat in the form of the chat templates: system prompt, earlier turns, and the user's."""
        if self.system is not None and not any(role == "system" for role, _ in turns):
            turns = (("system", self.system), *turns)
        chat = [(role, [{"type": "text", "text": as_letters(words, self.tokens)}]) for role, words in turns]
        content: list[dict[str, Any]] = []
        if wave is not None and self.name in TEMPLATE_ONLY:
            file = io.BytesIO()
            soundfile.write(file, wave, self.rate, format="WAV", subtype="FLOAT")
            content.append({"type": "audio", "base64": base64.b64encode(file.getvalue()).decode()})
        elif wave is not None:
            content.append({"type": "audio", "audio": "clip"})
        if text:
            content.append({"type": "text", "text": as_letters(text, self.tokens)})
        return [{"role": role, "content": content} for role, content in [*chat, ("user", content)]]

    def _prompt(self, text: str | None, wave: Wave | None, turns: Turns = ()) -> str:
        """The rendered chat; texts and audio placeholder are verified to be in it."""
        audio_token = getattr(self.processor, "audio_token", None) or ""
        chat = self._messages(text, wave, turns)
        plain = [{"role": m["role"], "content": "".join(c.get("text", "") for c in m["content"])} for m in chat]
        wanted = [("audio", audio_token if wave is not None else "")]
        wanted += [("text" if m["role"] == "user" else f"{m['role']} turn", m["content"].strip()) for m in plain]
        # Templates of text models know strings only, most of audio models both, a few lists only.
        for messages in (plain, chat) if wave is None else (chat,):
            prompt = self.tokenizer.apply_chat_template(
                messages, chat_template=self.template, tokenize=False, add_generation_prompt=True,
                audio_token=audio_token or None, **self.template_kwargs,
            )  # fmt: skip
            lost = [(what, part) for what, part in wanted if part not in prompt]
            if not lost:
                return str(prompt)
        raise ValueError(
            f"The chat template of {self.name} drops the {' and the '.join(what for what, _ in lost)}: "
            f"{[part for _, part in lost]} is not in {prompt!r}. Set processor.chat_template to the one of its "
            "model card, or pass build_inputs=your_function to RRS."
        )
