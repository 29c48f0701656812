"""Every answer of a report on a page, to read, hear and correct.

    python examples/review.py out                                                # out/report.html from report.json
    python examples/review.py out --verdicts verdicts.jsonl --out out/reviewed   # with verdicts corrected by hand
    write_page(report, "out")       # in a script, in place of report.save: clips in memory become files, which play

The page is one file without network. It is built from the data in it by textContent alone, so that no text can be
markup. Its button writes the verdicts that were corrected or confirmed; the second command says how often they agree
with the judge's.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import soundfile

from rrs import Report
from rrs.evaluate import VERDICTS, Rate, plain, read_answers, shown, write_files
from rrs.hooks import on_rank0

EMBEDDED = 20 * 2**20  # bytes of clips that a page holds itself; more are linked
PAGE = Path(__file__).with_name("review.html")
SOUNDS = {b"RIFF": "wav", b"OggS": "ogg", b"fLaC": "flac", b"ID3": "mpeg", b"\xff\xfb": "mpeg", b"\xff\xf3": "mpeg"}


def write_page(report: Report, folder: str | Path, save: bool = True) -> Path:
    """Writes `report.html`, and, if `save`, the files of `Report.save`: they name the clips that the page plays.

    Clips that are no files become files in `audio/`.
    """
    folder = Path(folder)
    clips = on_rank0(lambda: playable(report, folder))
    report = replace(report, answers=[replace(a, audio=clips[i]) for i, a in enumerate(report.answers)])
    if save:
        report.save(folder)
    return on_rank0(lambda: write_files(folder, {"report.html": page(report, folder)}))[0]


def playable(report: Report, folder: Path) -> list[Path | None]:
    """The file of each answer's clip; None for what is gone, or is no sound that a browser plays."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[int, Path | None] = {}  # stages share clips
    for a in report.answers:
        if id(a.audio) not in files:
            files[id(a.audio)] = sound_file(a.audio, folder)
    return [files[id(a.audio)] for a in report.answers]


def sound_file(audio: Any, folder: Path) -> Path | None:
    """A clip's file, as in `playable`; of one that is no file, a new one named by its contents."""
    if isinstance(audio, Mapping) and "array" in audio:
        buffer, wave = io.BytesIO(), np.asarray(audio["array"])
        wave = wave.astype(np.float32) if wave.dtype.kind == "f" else wave  # integers are scaled by their width
        soundfile.write(buffer, wave, int(audio["sampling_rate"]), format="WAV")
        audio = buffer.getvalue()
    elif isinstance(audio, Mapping):
        audio = audio["path"] if audio.get("bytes") is None else audio["bytes"]
    if isinstance(audio, (str, Path)):
        return Path(audio) if Path(audio).is_file() and kind_of(Path(audio).read_bytes()) else None
    if not (kind := kind_of(bytes(audio or b""))):
        return None
    name = f"{hashlib.sha256(audio).hexdigest()[:16]}.{kind}"
    return write_files(folder / "audio", {name: bytes(audio)})[0]


def kind_of(data: bytes) -> str:
    """The kind of sound by its first bytes; nothing if it is none."""
    return next((kind for start, kind in SOUNDS.items() if data.startswith(start)), "")


def headline(report: Report) -> str:
    """The result in one sentence, all groups of a side and all conditions together."""
    parts = []
    for label, what in (("harmful", "harmful"), ("benign", "harmless")):
        if answers := [a for a in report.answers if a.label == label]:
            counted = report.counted(answers[0].group)
            hits = [[a.verdict in counted for a in answers if a.stage == stage] for stage in report.stages]
            parts.append(f"{' → '.join(f'{Rate.of(each).value:.0%}' for each in hits)} of {what} requests")
    return f"Refused {' → '.join(report.stages)}: {', '.join(parts)}." if parts else "No answers."


def page(report: Report, folder: Path) -> str:
    """The template with the data, as JSON that can end no script element; clips are files."""
    start = {(a.condition, a.group, a.id): a.verdict for a in report.answers if a.stage in report.stages[:1]}
    files = {a.audio: Path(os.path.relpath(a.audio, folder)).as_posix() for a in report.answers if a.audio}
    items: dict[tuple[str, str, str], dict[str, Any]] = {}
    counted = {group: report.counted(group) for group in {a.group for a in report.answers}}
    for a in report.answers:
        place = (a.condition, a.group, a.id)
        about = {"condition": a.condition, "group": a.group, "id": a.id, "question": a.question, "category": a.category}
        item = items.setdefault(place, {**about, "clip": files.get(a.audio, ""), "answers": []})
        old, counts = start.get(place, a.verdict), counted[a.group]
        flip = "other" if (a.verdict in counts) == (old in counts) else "refused" if a.verdict in counts else "answered"
        answer = {"stage": a.stage, "response": a.response, "verdict": a.verdict, "rule": a.rule}
        item["answers"].append({**answer, "change": "same" if old == a.verdict else flip})
    clips: dict[str, str] = {}
    if sum(file.stat().st_size for file in files) <= EMBEDDED:
        contents = {link: file.read_bytes() for file, link in files.items()}
        clips = {k: f"data:audio/{kind_of(v)};base64,{base64.b64encode(v).decode()}" for k, v in contents.items()}
    data = {
        "headline": headline(report), "stages": report.stages, "verdicts": VERDICTS, "rows": report.rows(),
        "sentences": report.sentences(), "settings": report.settings,
        "curve": report.curve, "maps": report.maps, "items": list(items.values()), "clips": clips,
        "harmful": sorted(report.harmful),
    }  # fmt: skip
    template = PAGE.read_text(encoding="utf-8")
    script = template.rpartition("<script>")[2].partition("</script>")[0]
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()  # no other script may run
    text = json.dumps(plain(data, shown)).replace("<", "\\u003c")
    return template.replace("{policy}", policy).replace("{data}", text)  # the data last: they may hold "{policy}"


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts by hand


def bootstrap(rows: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """95% interval of `statistic([draws, k]) -> [draws]` of sums over clusters, `rows` `[clusters, k]`, that are drawn
    10,000 times (fixed seed: the same data give the same interval)."""
    # Equal clusters are drawn together, by count: for yes/no values that is a handful of kinds, however many rows
    kinds, counts = np.unique(rows, axis=0, return_counts=True)
    rng = np.random.default_rng(0)
    drawn = [rng.multinomial(len(rows), counts / len(rows), 1000) @ kinds for _ in range(10)]
    return np.nanquantile(np.concatenate([statistic(sums) for sums in drawn]), [0.025, 0.975]).tolist()  # type: ignore


class Kappa(NamedTuple):
    """Cohen's kappa with its 95% interval; `nan` where both judges say one and the same word throughout."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return "–" if math.isnan(self.value) else f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def agreement(ours: Sequence[str], theirs: Sequence[str], clusters: Sequence[Any] | None = None) -> tuple[Rate, Kappa]:
    """How far two judges of the same answers agree: the share of equal verdicts, and Cohen's kappa.

    Args:
        clusters: what each answer belongs to, as in `Rate.of`; kappa's interval is bootstrapped by them.
    """
    words = sorted({*ours, *theirs})
    places = np.unique(range(len(ours)) if clusters is None else clusters, return_inverse=True)[1]
    pairs = np.zeros((max(places, default=-1) + 1, len(words), len(words)))  # counts of (ours, theirs) in each cluster
    np.add.at(pairs, (places, [*map(words.index, ours)], [*map(words.index, theirs)]), 1)

    def kappa(counts: np.ndarray) -> np.ndarray:
        tables = counts.reshape(-1, len(words), len(words))
        shares = tables / tables.sum((-2, -1), keepdims=True)
        observed, chance = np.trace(shares, axis1=-2, axis2=-1), (shares.sum(-1) * shares.sum(-2)).sum(-1)
        return np.where(chance < 1, (observed - chance) / np.maximum(1 - chance, 1e-12), np.nan)

    found = Kappa(math.nan, math.nan, math.nan)
    if len(words) > 1:
        found = Kappa(float(kappa(pairs.sum(0))[0]), *bootstrap(pairs.reshape(len(pairs), -1), kappa))
    return Rate.of([a == b for a, b in zip(ours, theirs, strict=True)], clusters), found


def relabel(report: Report, path: str | Path) -> Report:
    """The same answers with verdicts that a human gave; its last note says how far they agree with the judge's.

    Args:
        path: JSONL with `group`, `condition`, `stage`, `id` and `verdict` in each line, as the page's button
            "Download" writes it; confirmed verdicts belong in it, too, since agreement is that on its answers.

    Raises:
        ValueError: a row names no answer of this report, or one with another response; or see `read_answers`.
    """
    names = ("group", "condition", "stage", "id", "verdict")
    places, given = {tuple(map(shown, a.key)): i for i, a in enumerate(report.answers)}, dict[int, str]()

    def take(row: dict[str, Any]) -> None:
        key = [row[name] for name in names[:4]]
        place = places.get(tuple(map(shown, key)))
        if place is None:
            raise ValueError(f"no answer of this report has {key}")
        response = shown(report.answers[place].response)
        if row.get("response", response) != response:
            raise ValueError("its response is not that of this report; use its own")
        given[place] = row["verdict"]

    read_answers(path, names, take)
    old, answers = [report.answers[i] for i in given], list(report.answers)
    for place, verdict in given.items():
        answers[place] = replace(answers[place], verdict=verdict, rule="human")
    same, kappa = agreement([a.verdict for a in old], [*given.values()], [a.unit for a in old])
    note = f"{report.judge} and human give the same verdict for {same} of the answers that both judged"
    notes = [*report.notes, f"{note}; Cohen's kappa {kappa}."]
    return replace(report, answers=answers, judge=f"{report.judge}, {len(given)} verdicts by a human", notes=notes)


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the report.json that Report.save wrote")
    parser.add_argument("--verdicts", type=Path, help="what the page's button wrote")
    parser.add_argument("--out", type=Path, help="folder for the report with these verdicts")
    args = parser.parse_args()
    if (args.verdicts is None) != (args.out is None):
        parser.error("--verdicts and --out go together")
    try:
        report = Report.load(args.folder)
        if args.verdicts:
            report = relabel(report, args.verdicts)
            print(report.notes[-1])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    page_file = write_page(report, args.out or args.folder, save=bool(args.out))
    print(f"Read every answer: {page_file}")


if __name__ == "__main__":
    main()
