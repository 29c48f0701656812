"""Changes of clips and words do what they say, and the table counts them; which questions `find_refusal.py` takes."""

from __future__ import annotations

import argparse
import json
import sys
from types import SimpleNamespace

import find_refusal
import numpy as np
import pytest
from conftest import rows, tone
from quickstart import Groups
from transfer import (
    CLIPS,
    FRAMES,
    RATE,
    band_passed,
    changed,
    coded,
    faster,
    framed,
    main,
    noisy,
    preceded,
    table,
    transfer,
)

from rrs import RRS, RRSConfig, RRSWarning
from rrs.data import load_examples


def power(x: np.ndarray) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))


def peak(wave: np.ndarray) -> float:
    """The loudest frequency in Hz."""
    return float(np.abs(np.fft.rfft(wave)).argmax() * RATE / len(wave))


@pytest.mark.parametrize("snr", [20, 10, 5])
def test_noise_is_as_loud_as_it_says(snr):
    wave = tone(1.0, 0)
    noise = noisy(wave, snr) - wave
    assert 10 * np.log10(power(wave) / power(noise)) == pytest.approx(snr, abs=0.01)
    assert np.array_equal(noisy(wave, snr), noisy(wave, snr))


@pytest.mark.parametrize("factor", [1.2, 0.8])
def test_speed_changes_length_and_pitch(factor):
    wave = tone(1.0, 1)
    quick = faster(wave, factor)
    assert len(quick) == pytest.approx(len(wave) / factor, abs=1)
    assert peak(quick) == pytest.approx(factor * peak(wave), rel=0.01)


def test_a_band_is_all_that_is_left():
    t = np.arange(RATE) / RATE
    low, middle, high = (np.sin(2 * np.pi * f * t).astype(np.float32) for f in (100, 1000, 5000))
    assert np.allclose(band_passed(low + middle + high), middle, atol=1e-4)


@pytest.mark.parametrize(
    ("container", "codec", "least"), [("OGG", "OPUS", 5), ("OGG", "VORBIS", 10), ("WAV", "ULAW", 25)]
)
def test_codecs_keep_the_length_and_lose_something(container, codec, least):
    wave = tone(1.0, 2)
    again = coded(wave, container, codec)
    assert again.shape == wave.shape
    assert again.dtype == np.float32
    kept = 10 * np.log10(power(wave) / power(again - wave))
    assert least < kept < 60


def test_speech_goes_in_front():
    wave, speech = tone(0.5, 3), tone(0.25, 4)
    longer = preceded(wave, speech)
    assert np.array_equal(longer[: len(speech)], speech)
    assert np.array_equal(longer[-len(wave) :], wave)
    assert len(longer) == len(wave) + len(speech) + 0.3 * RATE


def test_no_change_touches_its_input():
    wave = tone(0.3, 5)
    before = wave.copy()
    for name, change in CLIPS.items():
        assert change(wave, wave).dtype == np.float32, name
    assert np.array_equal(wave, before)


def test_frames_keep_the_question():
    for name in FRAMES:
        assert "How do I bake bread" in framed("How do I bake bread?", name) or name == "lower case"
    assert framed("How do I bake bread?", "lower case") == "how do i bake bread"


def test_changed_examples_stay_the_same_question():
    example = load_examples(rows("benign", 1))[0]
    for name in (*CLIPS, *FRAMES):
        other = changed(example, name, tone(0.2, 6))
        assert (other.id, other.label, other.cluster) == (example.id, example.label, example.cluster)
        assert (other.audio_hash != example.audio_hash) == (name in CLIPS)
        assert (other.text != example.text) == (name in FRAMES)


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_the_table_goes_on_where_it_stopped(tiny, tmp_path, monkeypatch):
    config = RRSConfig(conditions=("text-only",), epochs=1, batch_size=4, learning_rate=1e-2, penalty=1e-3)
    rrs = RRS(*tiny, config, verbose=False).fit(rows("harmful", 4), rows("benign", 4), preflight=0)
    voices = [{"voice": v} for v in "ab"]
    test = {
        side: load_examples([{**row, **voice} for row, voice in zip(rows(side, 2, 50), voices, strict=True)])
        for side in ("harmful", "benign")
    }
    names, where = ("clean", "prefilled", "noise 5 dB", "role play"), ("audio-only", "text-only")

    def run():
        return transfer(rrs, test, tone(0.2, 7), tmp_path, names=names, conditions=where, max_new_tokens=2)

    found = run()
    assert {(r["change"], r["condition"]) for r in found} == {
        ("clean", "audio-only"), ("clean", "text-only"), ("voice a", "audio-only"), ("voice b", "audio-only"),
        ("prefilled", "audio-only"), ("prefilled", "text-only"), ("noise 5 dB", "audio-only"),
        ("role play", "text-only"),
    }  # fmt: skip
    assert json.loads((tmp_path / "report.json").read_text())["rows"] == json.loads(json.dumps(found))
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert sum(line.startswith("| audio-only") for line in lines) == 5
    assert table(found).splitlines()[0] == lines[0]
    monkeypatch.setattr(rrs, "_answer", None)  # nothing is answered again
    assert run() == found


def words(side, n):
    return [{**row, "id": f"w{i}", "audio": None} for i, row in enumerate(rows(side, n, 50))]


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_a_change_takes_the_groups_that_have_what_it_needs(tiny, tmp_path):
    rrs = RRS(*tiny, verbose=False)
    spoken = [{**row, "text": None} for row in rows("benign", 2, 50)]
    test = {"harmful": load_examples(words("harmful", 2)), "benign": load_examples(spoken)}
    found = transfer(
        rrs, test, tone(0.2, 7), tmp_path, names=("clean", "opus", "polite"), conditions=("audio-only", "text-only"),
        max_new_tokens=2,
    )  # fmt: skip
    assert [(r["change"], r["condition"], r["group"]) for r in found] == [
        ("clean", "audio-only", "benign"), ("clean", "text-only", "harmful"), ("opus", "audio-only", "benign"),
        ("polite", "text-only", "harmful"),
    ]  # fmt: skip


def test_no_change_that_applies_is_an_error(tiny, tmp_path):
    test = {"harmful": load_examples(words("harmful", 2))}
    for names, conditions in [(["opus"], ["text-only"]), (["opus", "clean"], ["audio-only"])]:
        with pytest.raises(SystemExit, match=r"None of the changes \['opus'.*applies"):
            transfer(RRS(*tiny, verbose=False), test, tone(0.2, 7), tmp_path, names=names, conditions=conditions)


def test_unreadable_clips_are_left_out_of_every_change(tiny, tmp_path):
    class Written(type(tmp_path)):
        """A name of a voice, or the table's arrow, is not in every system's default encoding."""

        def write_text(self, data, encoding=None, **kwargs):
            assert encoding == "utf-8"
            return super().write_text(data, encoding, **kwargs)

    test = {
        side: load_examples([*rows(side, 2, 50), {"id": "bad", "text": "Why?", "audio": b"no clip"}])
        for side in ("harmful", "benign")
    }
    where = {"names": ("opus", "polite"), "conditions": ("audio-only", "text-only"), "max_new_tokens": 2}
    with pytest.warns(RRSWarning, match="bad: can't be decoded"):
        found = transfer(RRS(*tiny, verbose=False), test, tone(0.2, 7), Written(tmp_path), **where)
    assert [r["refused"]["before"]["n"] for r in found] == [2] * 4
    assert "Left out: 1 harmful examples" in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_a_test_without_a_group_is_named(tmp_path, monkeypatch, capsys):
    command = ["transfer.py", "--adapter", "a", "--out", str(tmp_path), "--model", "none", "--test", "x.csv"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "--test x.csv: expected GROUP=PATH, e.g. --test harmful=x.csv" in capsys.readouterr().err
    (tmp_path / "both.jsonl").write_text(
        "".join(json.dumps({"id": side, "text": side, "label": side}) + "\n" for side in ("harmful", "benign"))
    )
    twice = [f"harmful={tmp_path / 'both.jsonl'}", "--test", f"harmful={tmp_path / 'both.jsonl'}"]
    for given, words in ((twice, "harmful=… is given twice"), (["benign=nowhere.csv"], "nowhere.csv: no such file")):
        monkeypatch.setattr(sys, "argv", [*command[:-1], *given])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert words in capsys.readouterr().err
    parser = argparse.ArgumentParser()
    parser.add_argument("--test", action=Groups, default={})
    groups = parser.parse_args(["--test", twice[0], "--test", twice[0].replace("harmful=", "hard-benign=")]).test
    assert {group: [e.id for e in rows_] for group, rows_ in groups.items()} == {
        "harmful": ["harmful"],
        "hard-benign": ["benign"],
    }


@pytest.mark.parametrize(("n", "length"), [(56, 1190), (56, 140), (56, 111), (4, 10), (9, 5)])
def test_questions_are_spread_over_all(n, length):
    chosen = find_refusal.spread(range(length), n)
    assert len(set(chosen)) == min(n, length)
    assert chosen[0] == 0
    assert length - chosen[-1] <= 2 * -(-length // n)
    if length == 1190:  # of which README tells
        assert chosen == list(range(1190))[::21][:56]


def test_questions_are_those_that_have_what_the_condition_needs(tmp_path, monkeypatch, capsys):
    given = []
    prompt = SimpleNamespace(prompt="No.", refused="1", opening="I", share=1.0)
    fake = SimpleNamespace(
        config=RRSConfig(),
        find_refusal_prompt=lambda questions, *_, **__: given.append([e.id for e in questions]) or [prompt],
        find_refusal_token=lambda questions, *_, **__: given.append([e.id for e in questions]) or [],
    )
    monkeypatch.setattr(find_refusal.RRS, "from_pretrained", lambda _: fake)
    questions = [{"id": str(i), "text": "x", "audio": "m.json" if i % 5 == 4 else None} for i in range(20)]
    (tmp_path / "m.json").write_text(json.dumps(questions))

    def run(path):
        command = ["find_refusal.py", "--model", "m", "--harmful", str(path), "--condition", "audio-text", "--n", "9"]
        monkeypatch.setattr(sys, "argv", command)
        find_refusal.main()

    run(tmp_path / "m.json")
    assert given == [["4", "9", "14", "19"]] * 2
    assert "m, audio-text, 4 harmful questions" in capsys.readouterr().out
    (tmp_path / "words.txt").write_text("Why?\nHow?\n")
    with pytest.raises(SystemExit, match="2"):
        run(tmp_path / "words.txt")
    assert "none of the 2 harmful questions has what --condition audio-text needs" in capsys.readouterr().err
