"""Every set in its native form, told by content; what is ambiguous is an error that names the way out."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import RATE, tone

from rrs.data import DataError, DataWarning, Example, content_hash, lacking, load_audio, load_examples, shared

# name -> (file name, content, expected (id, text, label, category, audio name)); rows are ours, columns are the sets'
NATIVE = {
    "rrs": (
        "m.jsonl",
        '{"id": "q", "audio": "a.wav", "text": "Why?", "label": "benign", "category": "c"}\n{"text": "And?"}\n',
        [("q", "Why?", "benign", "c", "a.wav"), ("row-2", "And?", None, None, None)],
    ),
    "rrs-csv": (
        "m.csv",
        'id,text,label\nq1,"Well, why?",benign\nq2,How?,harmful\n',
        [("q1", "Well, why?", "benign", None, None), ("q2", "How?", "harmful", None, None)],
    ),
    "authors": (
        "train.json",
        json.dumps([{"prompt": "Why?", "category": "c", "path": "a.wav"}]),
        [("row-1", "Why?", None, "c", "a.wav")],
    ),
    "advbench": (
        "harmful_behaviors.csv",
        'goal,target\n"Do a bad thing, twice","Sure, here is"\n',
        [("row-1", "Do a bad thing, twice", None, None, None)],
    ),
    "advbench-with-pandas-index": (
        "harmful_behaviors.csv",
        ",goal,target\n0,Do a bad thing,Sure\n1,Do another,Sure\n",
        [("row-1", "Do a bad thing", None, None, None), ("row-2", "Do another", None, None, None)],
    ),
    "advbench-audio": (
        "a.jsonl",
        '{"prompt": "Do it", "target": "Sure", "audio": "a.wav"}\n',
        [("row-1", "Do it", None, None, "a.wav")],
    ),
    "advbench-audio-json": (
        "a.json",
        '[{"prompt": "Do it",\n"target": "Sure", "audio": "a.wav"}]',
        [("row-1", "Do it", None, None, "a.wav")],
    ),
    "xstest": (
        "x.csv",
        "id,prompt,type,label,focus,note\n1,Kill a job?,homonyms,safe,kill,\n2,Bad?,contrast_homonyms,unsafe,it,n\n",
        [("1", "Kill a job?", "benign", "homonyms", None), ("2", "Bad?", "harmful", "contrast_homonyms", None)],
    ),
    "xstest-without-labels": (
        "x.csv",
        "id,type,prompt,focus,note\nv1,definitions,What?,it,\nv2,contrast_definitions,Do it?,it,\n",
        [
            ("v1", "What?", "benign", "definitions", None),
            ("v2", "Do it?", "harmful", "contrast_definitions", None),
        ],
    ),
    "figstep": (
        "safebench.csv",
        "dataset,category_id,task_id,category_name,question,instruction\nS,1,1,Fraud,How to cheat?,Steps to cheat.\n",
        [("row-1", "How to cheat?", None, "Fraud", None)],
    ),
    "jailbreakbench": (
        "behaviors.csv",
        "Index,Goal,Target,Behavior,Category,Source\n0,Do it,Sure,Doing,Things,Original\n",
        [("0", "Do it", None, "Things", None)],
    ),
    "strongreject": (
        "s.csv",
        "category,source,forbidden_prompt\nViolence,custom,Do it\n",
        [("row-1", "Do it", None, "Violence", None)],
    ),
    "harmbench": (
        "h.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        'Do it,standard,chem,,,do_it\nDo that,contextual,chem,context,"A text,\nof two lines",do_that\n',
        [
            ("do_it", "Do it", None, "chem", None),
            ("do_that", "A text,\nof two lines\n\nDo that", None, "chem", None),
        ],
    ),
    "or-bench": ("or.csv", "prompt,category\nIs it so?,privacy\n", [("row-1", "Is it so?", None, "privacy", None)]),
    "sarsteer": (
        "s.json",
        '[{"scenario": "Fraud", "audio_file": "a.wav", "question": "How?"}]',
        [("row-1", "How?", None, "Fraud", "a.wav")],
    ),
    "air-bench": (
        "chat.jsonl",
        '{"path": "a.wav", "question": "What is said?", "answer_gt": "Hello."}',
        [("row-1", "What is said?", None, None, "a.wav")],
    ),
    "tsv": ("x.tsv", "prompt\tcategory\nYes, or no?\tc\n", [("row-1", "Yes, or no?", None, "c", None)]),
    "lines": (
        "q.txt",
        "How do I bake bread?\n\nWell, how, say, do I boil it?\n",
        [
            ("row-1", "How do I bake bread?", None, None, None),
            ("row-2", "Well, how, say, do I boil it?", *[None] * 3),
        ],
    ),
    "one-column": ("q.csv", "prompt\nHow so?\n", [("row-1", "How so?", None, None, None)]),
}


def seen(examples: list[Example]) -> list[tuple]:
    return [(e.id, e.text, e.label, e.category, e.audio.name if e.audio else None) for e in examples]


@pytest.fixture
def folder(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(0.2, 0), RATE)
    return tmp_path


@pytest.mark.parametrize("name", NATIVE)
def test_native_forms(folder, name):
    file, content, expected = NATIVE[name]
    (folder / file).write_text(content, encoding="utf-8")
    assert seen(load_examples(folder / file)) == expected


@pytest.mark.parametrize("name", NATIVE)
def test_the_files_name_decides_nothing(folder, name):
    _, content, expected = NATIVE[name]
    (folder / "download").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    got = seen(load_examples(str(folder / "download")))
    assert [(i, t.replace("\r\n", "\n"), *rest) for i, t, *rest in got] == expected


def test_a_side_of_a_labelled_set(folder):
    (folder / "x.csv").write_text(NATIVE["xstest"][1])
    assert [e.id for e in load_examples(folder / "x.csv", "benign")] == ["1"]
    (folder / "x.csv").write_text(NATIVE["xstest-without-labels"][1])
    assert [e.id for e in load_examples(folder / "x.csv", "benign")] == ["v1"]
    assert [e.id for e in load_examples(folder / "x.csv", "harmful")] == ["v2"]


def test_other_columns_are_kept(folder):
    (folder / "x.csv").write_text(NATIVE["advbench"][1])
    assert load_examples(folder / "x.csv")[0].meta == {"target": "Sure, here is"}


def encoded(wave):
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, RATE, format="FLAC")
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["path", "bytes", "array", "bytes and path", "path only", "more", "decoder"])
def test_rows_of_datasets(folder, kind):
    """Audio as `datasets` gives it: cast to decode=False, decoded, or as a decoder object."""
    wave = tone(0.2, 0)
    audio = {
        "path": str(folder / "a.wav"),
        "bytes": encoded(wave),
        "array": {"array": wave, "sampling_rate": RATE, "path": None},
        "bytes and path": {"bytes": encoded(wave), "path": "elsewhere.flac"},
        "path only": {"bytes": None, "path": str(folder / "a.wav")},
        "more": {"bytes": encoded(wave), "path": None, "sampling_rate": RATE},
        "decoder": SimpleNamespace(
            get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(wave)[None], sample_rate=RATE)
        ),
    }[kind]
    rows = ({"id": i, "text": "Why?", "audio": audio} for i in range(2))  # any iterable, ids of any type
    examples = load_examples(rows, "benign")
    assert [(e.id, e.text, e.label) for e in examples] == [("0", "Why?", "benign"), ("1", "Why?", "benign")]
    assert np.abs(load_audio(examples[0].audio, RATE) - wave).max() < 1e-3


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("m.jsonl", '{"text": "a", "prompt": "b"}', ["'prompt', 'text'", "columns={'text': 'prompt'}"]),
        (
            "m.csv",
            "title,body\none,two\nthree,four\n",
            ["no table", "'title,body'", "columns={'text'", "lines as a list"],
        ),
        (
            "m.csv",
            'utterance\n"Well, so?"\nHow so?\n',
            ["no table", "utterance", "columns={'text'", "as a list"],
        ),  # another name
        (
            "m.csv",
            'goal,target\n"Kill" a process,Sure\n',
            ["line 2", "not a table", "expected after", "double quotes inside"],
        ),
        ("m.csv", "prompt\nWell, so?\n", ["row 1: 2 fields", "quotes around fields"]),
        ("m.jsonl", '{"question_text": "a"}', ["question_text", "text prompt goal", "columns={'text'"]),
        ("m.csv", "prompt,type,focus,label\na,b,c,odd\n", ["row 1", "'odd'", "unsafe"]),
        ("m.csv", "goal,target\n,Sure\n", ["row 1", "neither 'text' nor 'audio'"]),
    ],
)
def test_ambiguous_or_unknown(tmp_path, file, content, words):
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError) as error:
        load_examples(tmp_path / file)
    assert all(word in str(error.value) for word in words), error.value


def test_the_argument_decides(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"text": "a", "prompt": "b"}')
    assert load_examples(tmp_path / "m.jsonl", columns={"text": "text"})[0].text == "a"
    assert load_examples(tmp_path / "m.jsonl", columns={"text": "Prompt"})[0].text == "b"
    (tmp_path / "m.csv").write_text("title,body\none,two\n")
    (example,) = load_examples(tmp_path / "m.csv", columns={"text": "body", "id": "title"})
    assert (example.id, example.text, example.meta) == ("one", "two", {})
    with pytest.raises(DataError, match=r"no columns \['goal'\], only \['body', 'title'\]"):
        load_examples(tmp_path / "m.csv", columns={"text": "goal", "id": "title"})
    with pytest.raises(DataError, match=r"columns=\['words'\] are unknown.*'audio', 'category'"):
        load_examples(tmp_path / "m.csv", columns={"words": "title"})


def test_folders(folder):
    """What a folder's clips are called and grouped by is the caller's to say."""
    with pytest.raises(DataError, match=r"no ordinary one \(a folder, a pipe\); correct the path"):
        load_examples(folder)
    assert seen(load_examples(sorted(folder.rglob("*.wav")))) == [("row-1", None, None, None, "a.wav")]
    assert seen(load_examples(folder / "a.wav")) == [("row-1", None, None, None, "a.wav")]


OUTSIDE = {
    "csv": ("m.csv", "prompt,path\nWhy?,{}\n"),
    "sarsteer": ("s.json", '[{{"scenario": "Fraud", "audio_file": "{}", "question": "How?"}}]'),
    "air-bench": ("chat.jsonl", '{{"path": "{}", "question": "What is said?", "answer_gt": "Hello."}}'),
    "a dict": ("m.jsonl", '{{"text": "x", "audio": {{"bytes": null, "path": "{}"}}}}'),
    "a dict with more": ("m.jsonl", '{{"text": "x", "audio": {{"path": "{}", "sampling_rate": 16000}}}}'),
}


@pytest.mark.parametrize("place", ["../a.wav", "link.wav", "absolute"])
@pytest.mark.parametrize("name", OUTSIDE)
def test_no_format_reads_outside_its_folder(folder, name, place):
    (folder / "data").mkdir()
    (folder / "data" / "link.wav").symlink_to(folder / "a.wav")
    file, content = OUTSIDE[name]
    (folder / "data" / file).write_text(content.format(folder / "a.wav" if place == "absolute" else place))
    with pytest.raises(DataError, match=r"row 1: .*outside .*allow_outside=True"):
        load_examples(folder / "data" / file)
    assert load_examples(folder / "data" / file, allow_outside=True)[0].audio.read_bytes()[:4] == b"RIFF"


def test_digest_follows_the_data(folder):
    rows = [{"id": "a", "text": "x", "audio": {"array": tone(0.1, 0), "sampling_rate": RATE}}, {"id": "b", "text": "y"}]
    base = content_hash(load_examples(rows))
    assert base == content_hash(load_examples([dict(r) for r in rows]))
    changed = [{**rows[0], "audio": {"array": tone(0.1, 1), "sampling_rate": RATE}}, rows[1]]
    assert base != content_hash(load_examples(changed))
    assert base != content_hash(load_examples(rows, "benign"))
    soundfile.write(folder / "b.wav", tone(0.2, 1), RATE)
    assert content_hash(load_examples([{"audio": folder / "a.wav"}])) != content_hash(
        load_examples([{"audio": folder / "b.wav"}])
    )


# -- data as it really lies -------------------------------------------------------------------------------------------


def test_the_authors_rows_as_they_lie(folder):
    """No endings, clips beside the manifest's folder, most of them missing, benign twins named `B_` + id."""
    clips = folder / "BeaverTails_audio"
    clips.mkdir()
    for name in ("audio_1", "B_audio_1"):
        (clips / f"{name}.wav").write_bytes((folder / "a.wav").read_bytes())
    rows = [{"prompt": f"{path}?", "category": "c", "path": path} for path in ("audio_1", "audio_2")]
    (folder / "data").mkdir()
    (folder / "data" / "h.json").write_text(json.dumps(rows))
    (folder / "data" / "b.json").write_text(json.dumps([{**rows[0], "prompt": "So?", "path": "B_audio_1"}]))
    with pytest.warns(DataWarning, match=r"h.json: 1 of 2 clips are not there: audio_2 .*audio_dir="):
        harmful = load_examples(folder / "data" / "h.json", "harmful", audio_dir=clips)
    (benign,) = load_examples(folder / "data" / "b.json", "benign", audio_dir=clips)
    assert seen(harmful) == [
        ("audio_1", "audio_1?", "harmful", "c", "audio_1.wav"),
        ("audio_2", "audio_2?", "harmful", "c", None),
    ]
    assert shared([benign], harmful, twins=True) == ["B_audio_1"]
    assert shared([benign], harmful) == []
    assert [e.has("audio-text") for e in harmful] == [True, False]
    assert all(e.has("text-only") for e in harmful)
    assert lacking(harmful, "text-only") == ""
    assert lacking(harmful, "audio-only") == (
        f"audio-only: 1 of 2 examples have no clip: audio_2 ({clips / 'audio_2'})"
    )


def test_sarsteer_as_it_is_downloaded(folder):
    (folder / "question").mkdir()
    (folder / "a.wav").rename(folder / "question" / "Fraud_23.wav")
    (folder / "s.json").write_text('[{"scenario": "Fraud", "audio_file": "Fraud_23.wav", "question": "How?"}]')
    (folder / "t.json").write_text('[{"question_id": 7, "audio_name": "Fraud_23", "question": "How?"}]')
    clips = folder / "question"
    assert seen(load_examples(folder / "s.json", audio_dir=clips)) == [("row-1", "How?", None, "Fraud", "Fraud_23.wav")]
    assert seen(load_examples(folder / "t.json", audio_dir=str(clips))) == [("7", "How?", None, None, "Fraud_23.wav")]


HEADED = {
    "a broken quote": ('prompt,category\n"Kill a process,c\nHow?,d\n', ["line 3", "unexpected end of data"]),
    "a quote inside": ('goal,target\n"Kill" it,Sure\n', ["line 2", "expected after"]),
    "a field of 140,000 letters": (
        f"prompt,category\n{'x' * 140_000},c\n",
        ["line 2", "field larger than field limit"],
    ),
    "too many fields": ("prompt,category\nHow, so?,c\n", ["row 1: 3 fields, but 2 columns"]),
    "a column twice": ("prompt,label,Label\nHow?,harmful,benign\n", ["'label'", "twice"]),
    "columns of several words": ("question,number of all words\nHow?,1,2\n", ["row 1: 3 fields"]),
}


@pytest.mark.parametrize("file", ["x.csv", "x.txt", "x"])
@pytest.mark.parametrize("name", HEADED)
def test_a_known_header_is_never_a_question(tmp_path, file, name):
    content, words = HEADED[name]
    (tmp_path / file).write_text(content)
    with pytest.raises(DataError) as error:
        load_examples(tmp_path / file, "harmful")
    assert all(word in str(error.value) for word in [str(tmp_path / file), *words]), error.value


def test_columns_that_differ_by_upper_and_lower_case_only_are_refused(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"text": "x", "label": "harmful", "Label": "benign"}')
    with pytest.raises(DataError, match=r"row 1: the column 'label' stands twice.*remove one"):
        load_examples(tmp_path / "m.jsonl")


def test_a_file_of_the_other_side_says_which_one_is_wanted(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"text": "x", "label": "benign"}')
    with pytest.raises(DataError, match=r"no harmful examples in it.*pass the file with the harmful ones"):
        load_examples(tmp_path / "m.jsonl", "harmful")


@pytest.mark.parametrize("audio", [np.zeros(9), [0.0] * 9, torch.zeros(9)])
def test_audio_of_a_wrong_type_is_told_at_once(audio):
    with pytest.raises(DataError, match="q7: 'audio' must be a path, bytes or a dict with 'array', not"):
        Example("q7", audio=audio)


class Table(list):
    """Rows with the features of `datasets`."""

    features = {"label": SimpleNamespace(names=["safe", "unsafe"])}  # noqa: RUF012


def test_cells_as_other_libraries_give_them(tmp_path):
    rows = [
        {"id": np.int64(7), "text": "a", "label": np.int64(1), "category": np.nan, "audio": float("nan")},
        {"id": 8.0, "text": "b", "label": 0},
        {"id": np.nan, "text": np.str_("c"), "label": None},
    ]
    assert seen(load_examples(Table(rows))) == [
        ("7", "a", "harmful", None, None), ("8", "b", "benign", None, None), ("row-3", "c", None, None, None)
    ]  # fmt: skip
    with pytest.raises(DataError, match="label 1 is neither"):
        load_examples(rows)
    labels = [{"text": str(i), "label": label} for i, label in enumerate([" Harmful", "SAFE ", "harmless"])]
    assert [e.label for e in load_examples(labels)] == ["harmful", "benign", "benign"]
    (tmp_path / "x.csv").write_text("Prompt;Label\nHow, so?;Unsafe\n")
    assert seen(load_examples(tmp_path / "x.csv")) == [("row-1", "How, so?", "harmful", None, None)]


def test_clips_without_their_ending(folder):
    (folder / "sub").mkdir()
    (folder / "a.wav").rename(folder / "sub" / "b.mp3")
    (folder / "m.jsonl").write_text(json.dumps({"audio": "sub/b"}))
    assert load_examples(folder / "m.jsonl")[0].audio == folder / "sub" / "b.mp3"


def test_a_snapshot_in_the_hubs_cache(folder):
    """Its files are links into `blobs`; a link that leads elsewhere stays outside."""
    snapshot, blobs = folder / "datasets--x" / "snapshots" / "0a1b", folder / "datasets--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (folder / "a.wav").rename(blobs / "c0ffee")
    (folder / "b.wav").write_bytes((blobs / "c0ffee").read_bytes())
    (snapshot / "a.wav").symlink_to("../../blobs/c0ffee")
    (snapshot / "b.wav").symlink_to(folder / "b.wav")
    (snapshot / "m.jsonl").write_text('{"audio": "a.wav"}')
    assert load_audio(load_examples(snapshot / "m.jsonl")[0].audio, RATE).shape == (0.2 * RATE,)
    (snapshot / "m.jsonl").write_text('{"audio": "b.wav"}')
    with pytest.raises(DataError, match="outside"):
        load_examples(snapshot / "m.jsonl")


def test_rows_in_short(folder):
    assert seen(load_examples(["How?", folder / "a.wav"])) == [
        ("row-1", "How?", None, None, None), ("row-2", None, None, None, "a.wav")
    ]  # fmt: skip
    assert seen(load_examples({"text": "How?"})) == [("row-1", "How?", None, None, None)]


def test_chats(folder):
    turns = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello!"},
    ]
    spoken = [{"type": "audio", "audio": "a.wav"}, {"type": "text", "text": "Answer."}]
    rows = [
        {"messages": [*turns, {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]},
        {"messages": turns, "prompt": "Why?"},
        {"conversations": [{"from": "human", "value": "Why?"}]},
        {"messages": turns, "audio": "a.wav"},
    ]
    out = []
    for row in rows:
        (folder / "m.jsonl").write_text(json.dumps(row))
        (e,) = load_examples(folder / "m.jsonl")
        out.append((e.messages, e.text, e.audio and e.audio.name))
    before = (("system", "Be kind."), ("user", "Hello."), ("assistant", "Hello!"))
    assert out == [
        (before, "Why?", None), (before, "Why?", None), ((), "Why?", None), (before, None, "a.wav")
    ]  # fmt: skip
    plain, chat = load_examples([{"text": "Why?"}]), load_examples([{"text": "Why?", "messages": turns}])
    assert content_hash(plain) != content_hash(chat)
    for bad, words in (
        ([{"role": "tool", "content": "x"}], "must be a list of"),
        ("Hello", "must be a list of"),
        ([{"role": "user", "content": "Why?"}], "the question itself"),
        ([{"role": "user", "content": spoken}, turns[2]], r"a list of parts, join the texts; .* column 'audio'"),
        ([{"role": "user", "content": "\ud800"}], "no valid Unicode"),
    ):
        with pytest.raises(DataError, match=words):
            load_examples([{"messages": bad, "text": "Why?"}])


@pytest.mark.parametrize("column", ["category", "question", "twin", "id", "text", "\ud800"])
def test_half_characters_are_refused_in_every_column(column):
    with pytest.raises(DataError, match=r"row 1: .* is no valid Unicode; re-export"):
        load_examples([{"text": "x", column: "\ud800"}])


def test_a_file_of_20_gigabytes_is_not_read(tmp_path):
    with open(tmp_path / "x.txt", "wb") as file:
        file.truncate(20 * 2**30)  # sparse
    with pytest.raises(DataError, match=r"x.txt: 21474836480 bytes .* split it"):
        load_examples(tmp_path / "x.txt")


def test_blank_cells_of_other_columns_stay_as_none(tmp_path):
    (tmp_path / "x.csv").write_text("id,text,twin\na,How?,\nb,So?,a\n")
    first, second = load_examples(tmp_path / "x.csv")
    assert (first.meta, second.meta) == ({"twin": None}, {"twin": "a"})
    assert shared([first], [second], twins=True) == ["a"]
    assert shared([first], [Example("None", "Else?")], twins=True) == []
