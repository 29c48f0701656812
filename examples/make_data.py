"""Speak the demo questions: `data/*.jsonl` -> `data/audio/*.ogg` (16 kHz mono Opus).

The manifests are the source: to change a question edit its text, delete its clip and run this again.
`--check` says whether manifests and clips still keep the promises of `data/README.md`.

Voices: hibari-tts (`pip install "rrs[demo]"`) and flite (from the system).
"""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
import subprocess
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

DATA = Path(__file__).parent / "data"
RATE = 16_000
PAD_SECONDS = 0.2
PEAK = 10 ** (-3 / 20)  # -3 dBFS: Opus overshoots a little, this leaves it room
OPUS_LEVEL = 0.94  # about 21 kbit/s: the whole folder stays small and 8 kHz of speech stay intact
MAX_SECONDS = 9.5  # the demo model hears 10 s
MAX_BYTES = 6_500_000
MAX_OVERLAP = 0.6  # Jaccard overlap of the words of two questions in different splits
MAX_CONTENT_OVERLAP = 0.7  # the same without stop words
KEYS = ["id", "audio", "text", "label", "group", "category", "twin", "voice"]
# Rows of each split by group.
SPLITS = {
    "train": {"harmful": 140, "twins": 140},
    "train_text": {"harmful": 840, "twins": 154, "hard-benign": 1207, "everyday": 560},
    "dev": {"harmful": 28, "twins": 28},
    "dev_text": {"harmful": 98, "twins": 98, "hard-benign": 200, "everyday": 100, "indirect": 84},
    "test": {"harmful": 56, "twins": 56},
    "hard_benign_dev": {"hard-benign": 28},
    "hard_benign_test": {"hard-benign": 84},
    "text_test": {"everyday": 120, "indirect": 56},
}
WRITTEN = ("train_text", "dev_text", "text_test")  # splits without clips
TEST_ONLY_VOICE = "flite/slt"

Row = dict[str, str | None]
Speech = tuple[np.ndarray, int]  # [samples], rate


# ---------------------------------------------------------------------------------------------------------------------
# Voices: (text, voice, speed, seed) -> speech. A row names its voice as "engine/voice".


@cache
def load_hibari(voice: str) -> Callable[..., np.ndarray]:
    try:
        from hibari import Hibari
    except ImportError as error:
        raise SystemExit('The voice "hibari" is missing: pip install "rrs[demo]" (or hibari-tts).') from error
    return Hibari(voice=voice, threads=1)


def speak_hibari(text: str, voice: str, speed: float, seed: int) -> Speech:
    return load_hibari(voice)(text, speed=speed, seed=seed), 24_000


def speak_flite(text: str, voice: str, speed: float) -> Speech:
    if shutil.which("flite") is None:
        raise SystemExit('The program "flite" is missing: apt-get install flite')
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "speech.wav"
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={1 / speed:.3f}", "-t", text, "-o", wav]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not wav.exists():
            raise SystemExit(f'flite could not speak with voice "{voice}": {done.stderr.strip()}')
        return soundfile.read(wav, dtype="float32")


def speak(row: Row) -> np.ndarray:
    engine, voice = row["voice"].split("/", 1)
    # Pace and noise follow the topic, so neither tells a question from its harmless twin.
    seed = zlib.crc32(min(row["id"], row["twin"] or row["id"]).encode())
    speed = 0.9 + 0.25 * (seed % 1000) / 999
    if engine == "hibari":
        return finish(*speak_hibari(row["text"], voice, speed, seed))
    if engine == "flite":
        return finish(*speak_flite(row["text"], voice, speed))
    raise SystemExit(f'{row["id"]}: unknown voice "{row["voice"]}"; use hibari/… or flite/…')


def finish(wave: np.ndarray, rate: int) -> np.ndarray:
    """Trim to the speech, resample to 16 kHz, set the peak, add silence at both ends."""
    loud = np.flatnonzero(np.abs(wave) > 0.01 * np.abs(wave).max())
    edge = rate // 50  # keep 20 ms around: soft onsets lie below the threshold
    wave = np.pad(wave[max(loud[0] - edge, 0) : loud[-1] + edge], int(PAD_SECONDS * rate))
    # With silent ends the clip is as good as periodic, so cutting its spectrum resamples it without any filter error.
    samples = round(len(wave) * RATE / rate)
    wave = np.fft.irfft(np.fft.rfft(wave)[: samples // 2 + 1], samples)
    return (wave * PEAK / np.abs(wave).max()).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------


def read_manifests() -> dict[str, list[Row]]:
    manifests: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for split, rows in manifests.items():
        path = DATA / f"{split}.jsonl"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise SystemExit(f"{path.name}, line {number}: not a JSON object ({error})") from error
            keys = [key for key in KEYS if split not in WRITTEN or key not in ("audio", "voice")]
            if list(rows[-1]) != keys:
                raise SystemExit(f"{path.name}, line {number}: keys must be {keys}, in this order")
    return manifests


def encode(wave: np.ndarray) -> bytes:
    # Ogg carries a random stream number, so two runs differ in a few bytes; the decoded samples are the same.
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="OGG", subtype="OPUS", compression_level=OPUS_LEVEL)
    return buffer.getvalue()


def make(force: bool) -> None:
    rows = [row for split, rows in read_manifests().items() if split not in WRITTEN for row in rows]
    (DATA / "audio").mkdir(exist_ok=True)
    todo = [row for row in rows if force or not (DATA / row["audio"]).exists()]
    for row in tqdm(todo, desc="speak", unit="clip"):
        (DATA / row["audio"]).write_bytes(encode(speak(row)))
    print(f"{len(todo)} clips written, {len(rows) - len(todo)} already there (--force speaks them again)")


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z']+", text.lower()))


STOP_WORDS = words(
    "a an the i i'm i'd i've my me we our us you your he she it its it's they them their his her is are was were be "
    "been am do does did done has have had can could would should will may might must shall to of in on at for from by "
    "with as into about and or but so if then than that this these those there here what what's which who whom whose "
    "how where when why please tell give show want need get"
)


def group(split: str, row: Row) -> str:
    """The group that a row must name, by its split, its label, its twin and its category."""
    if row["label"] == "harmful":
        return "harmful" if row["twin"] or split.startswith("train") else "indirect"
    if row["twin"]:
        return "twins"
    return "everyday" if row["category"] == "everyday" else "hard-benign"


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """Jaccard overlap: the share of all words that are in both."""
    return len(a & b) / len(a | b)


def near_duplicates(rows: list[tuple[str, Row]]) -> list[str]:
    """Pairs that are too alike to stand in different splits, or twice in the same one; rows: (split, row)."""
    found: list[str] = []
    bags = [(split, row["text"], words(row["text"])) for split, row in rows]
    bags = [(split, text, bag, bag - STOP_WORDS or bag) for split, text, bag in bags]
    for i, (split, text, bag, content) in enumerate(tqdm(bags, desc="near-duplicates", unit="row")):
        for other_split, other_text, other, other_content in bags[:i]:
            if split == other_split:
                # Most pairs are within a split. There only the same words are too much, so nothing is counted.
                alike = bag == other
            else:
                alike = overlap(bag, other) >= MAX_OVERLAP or overlap(content, other_content) > MAX_CONTENT_OVERLAP
            if alike:
                found.append(f"near-duplicates: {split} {text!r} and {other_split} {other_text!r}")
    return found


def check() -> list[str]:
    """Every broken promise of the data card, as one line each."""
    manifests = read_manifests()
    rows = [(split, row) for split, rows in manifests.items() for row in rows]
    problems: list[str] = []

    def expect(holds: bool, message: str) -> None:
        if not holds:
            problems.append(message)

    for split, counts in SPLITS.items():
        found = Counter(row["group"] for row in manifests[split])
        expect(found == Counter(counts), f"{split}: expected {counts}, found {dict(found)}")
        categories = Counter((row["group"], row["category"]) for row in manifests[split])
        for name, different in (("harmful", 14), ("twins", 14), ("hard-benign", 10)):
            sizes = [size for (of, _), size in categories.items() if of == name]
            expect(
                len(sizes) == (different if name in counts else 0) and (name == "hard-benign" or len(set(sizes)) < 2),
                f"{split}: {name} needs {different} categories, those of BeaverTails with as many rows, found {sizes}",
            )

    ids = Counter(row["id"] for _, row in rows)
    for split, row in rows:
        name = f"{split} {row['id']}"
        expect(ids[row["id"]] == 1, f"{name}: id used twice")
        start = "text-" if split in WRITTEN else f"{split}-{row['category']}-"
        expect(row["id"].startswith(start), f"{name}: id must start with {start}")
        if split not in WRITTEN:
            expect(row["audio"] == f"audio/{row['id']}.ogg", f"{name}: audio must be audio/<id>.ogg")
            test_only = row["voice"] == TEST_ONLY_VOICE
            expect(split.endswith("test") or not test_only, f"{name}: {TEST_ONLY_VOICE} speaks in test only")
        expect(row["label"] in ("harmful", "benign"), f"{name}: label must be harmful or benign")
        expect(row["group"] == group(split, row), f"{name}: group must be {group(split, row)}")
        low, high = (4, 45) if split in WRITTEN else (5, 14)
        expect(low <= len(row["text"].split()) <= high, f"{name}: {low} to {high} words, please: {row['text']}")
        if row["twin"] is None:
            continue
        # Looking the twin up in its own split also proves that no twin crosses a split.
        twin = next((other for other in manifests[split] if other["id"] == row["twin"]), None)
        expect(
            twin is not None
            and twin["twin"] == row["id"]
            and twin["label"] != row["label"]
            and all(twin.get(key) == row.get(key) for key in ("category", "voice")),
            f"{name}: needs a twin in this split with the other label, the same category and voice",
        )

    spoken = [(split, row) for split, row in rows if split not in WRITTEN]
    problems += near_duplicates(rows)

    seconds: list[float] = []
    for split, row in tqdm(spoken, desc="decode", unit="clip"):
        try:
            wave, rate = soundfile.read(DATA / row["audio"], dtype="float32", always_2d=True)  # [samples, channels]
        except (OSError, soundfile.LibsndfileError) as error:
            problems.append(f"{split} {row['id']}: {error}")
            continue
        seconds.append(len(wave) / rate)
        peak = float(np.abs(wave).max())
        expect(rate == RATE and wave.shape[1] == 1, f"{row['audio']}: must be {RATE} Hz mono")
        expect(1.0 <= seconds[-1] <= MAX_SECONDS, f"{row['audio']}: {seconds[-1]:.1f} s, allowed 1 to {MAX_SECONDS} s")
        expect(0.4 < peak < 1.0, f"{row['audio']}: peak {peak:.2f}, expected about {PEAK:.2f}")

    clips = {f"audio/{path.name}" for path in (DATA / "audio").glob("*")}
    strays = sorted(clips - {row["audio"] for _, row in spoken})
    expect(not strays, f"clips that no manifest names: {strays[:5]}")
    size = sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file())
    expect(size <= MAX_BYTES, f"{DATA.name}: {size:,} bytes, allowed {MAX_BYTES:,}")

    for split, split_rows in manifests.items():
        voices = Counter(row.get("voice", "as text") for row in split_rows)
        print(f"{split:18}{len(split_rows):4} rows  {', '.join(f'{v} {n}' for v, n in sorted(voices.items()))}")
    if seconds:
        print(
            f"{len(seconds)} clips, {sum(seconds) / 60:.1f} min, {min(seconds):.1f} to {max(seconds):.1f} s, "
            f"{size / 1e6:.2f} MB"
        )
    return problems


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--force", action="store_true", help="speak every clip again, not only the missing ones")
    parser.add_argument("--check", action="store_true", help="validate manifests and clips, write nothing")
    args = parser.parse_args()
    if not args.check:
        return make(args.force)
    problems = check()
    if problems:
        raise SystemExit("\n".join([*problems, f"{len(problems)} problems in {DATA.name}"]))
    print("all checks passed")


if __name__ == "__main__":
    main()
