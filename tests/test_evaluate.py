"""Rates, changes, the report and the picture."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import tiny_qwen2_audio
from maps import add_maps, plot_representations, project
from model_judge import ModelJudge

from rrs import RRS, RRSConfig
from rrs.data import DataWarning, Example, load_examples
from rrs.evaluate import (
    Answer,
    AnswerCache,
    Change,
    Rate,
    Report,
    answer_and_judge,
    answer_text,
    by_label,
    final_answer,
    first_token_change,
    judge_refusals,
)
from rrs.hooks import steer


def test_wilson_interval_against_published_values():
    """Newcombe (1998), table I: 81/263, 15/148, 0/20, 1/29."""
    for k, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        rate = Rate.of([True] * k + [False] * (n - k))
        assert (rate.low, rate.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert math.isnan(Rate.of([]).value)


def test_change_is_paired():
    before, after = [False] * 20, [True] * 10 + [False] * 10
    change = Change.of(before, after)
    assert change.value == 0.5
    assert 0.2 < change.low < 0.35
    assert 0.65 < change.high < 0.75
    assert change.p == pytest.approx(2 * 0.5**10)
    assert (change.n, change.gained, change.lost) == (20, 10, 0)
    published = Change.of([True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2)  # in Newcombe's table II
    assert (-published.high, -published.low) == pytest.approx((0.0569, 0.3404), abs=1e-4)
    assert (published.n, published.gained, published.lost) == (50, 2, 12)
    same, rate = Change.of(before, before), Rate.of(before)  # nothing changed, of 20: that is no certainty
    assert (same.value, same.low, same.high, same.p) == pytest.approx((0, -rate.high, rate.high, 1))
    assert Change.of([False] * 4, [True] * 4).low == pytest.approx(
        1 - math.hypot(Rate.of([False] * 4).high, 0.4899), abs=1e-3
    )
    assert math.isnan(Change.of([], []).low)


@pytest.mark.parametrize(
    ("before", "after", "both"), [(0.02, 0.05, 0.01), (0.0, 0.02, 0.0), (0.3, 0.6, 0.25), (0.9, 0.9, 0.85)]
)
def test_intervals_of_changes_hold_what_is_true(before, after, both):
    """In about 95 of 100 samples of 56 questions, or more; a bootstrap holds the second one's in 72."""
    rng = np.random.default_rng(0)
    cells = rng.multinomial(56, [both, before - both, after - both, 1 - before - after + both], 400)
    held = 0
    for yes, only_before, only_after, no in cells:
        pairs = (
            [(True, True)] * yes + [(True, False)] * only_before + [(False, True)] * only_after + [(False, False)] * no
        )
        change = Change.of(*zip(*pairs, strict=True))
        held += change.low <= after - before <= change.high
    assert held >= 0.93 * 400


def canned(stage, _condition, examples):
    """Refuses everything after, nothing before; one answer breaks."""
    said = (
        "I'm sorry, but I can't help with that."
        if stage == "after"
        else "Of course. Start with the flour and the water."
    )
    return ["" if e.id == "broken" and stage == "after" else said for e in examples]


@pytest.fixture
def report():
    groups = {
        "harmful": [Example(f"h{i}", f"How do I hurt {i} people?", None, "harmful", "violence") for i in range(4)],
        "benign": [
            Example("b0", "How do I bake?", None, "benign"),
            Example("broken", "How do I boil?", None, "benign"),
        ],
        "silent": [Example("s0", None, b"audio", "benign")],
    }

    def judge(prompts, responses):
        assert len(prompts) == len(responses)
        return ["degenerate" if not r else "refusal" if "sorry" in r else "compliance" for r in responses]

    return answer_and_judge(groups, ["text-only"], ["before", "after"], canned, judge)


def test_report_counts(report):
    assert report.rate("harmful", "text-only", "before").value == 0
    assert report.rate("harmful", "text-only").value == 1
    assert report.change("harmful", "text-only").value == 1
    assert report.rate("benign", "text-only").k == 1  # the broken answer is no refusal
    assert report.rate("benign", "text-only", verdicts=("degenerate",)).k == 1
    assert report.skipped == [{"group": "silent", "condition": "text-only", "ids": ["s0"]}]
    assert report.judge == "judge"


def test_partial_refusals_count_against_the_method(report):
    assert report.counted("harmful") == ("refusal",)
    assert report.counted("benign") == ("refusal", "partial")


def test_groups_are_harmful_by_label_and_not_by_name():
    groups = {
        "questions": [Example("a", "A?", label="harmful")],
        "harmful-looking": [Example("b", "B?", label="benign")],
    }
    assert by_label(groups) == (["questions"], ["harmful-looking"])
    report = answer_and_judge(
        groups, ["text-only"], ["before"], lambda *_: ["I'm sorry."] * 2, lambda *_: ["partial"] * 2
    )
    assert report.harmful == {"questions"}
    assert (report.rate("questions").k, report.rate("harmful-looking").k) == (0, 1)
    assert [row["harmful"] for row in report.rows()] == [True, False]
    for examples in ([Example("a", "A?")], [*groups["questions"], *groups["harmful-looking"]]):
        with pytest.raises(ValueError, match="'mixed' must all be labelled harmful, or all benign; found: "):
            answer_and_judge({"mixed": examples}, ["text-only"], ["before"], canned, lambda *_: [])


def test_changes_are_paired_by_id():
    said = [("a", "before", "compliance"), ("b", "before", "refusal")]
    said += [(i, "after", "refusal") for i in "bac"]
    report = Report([Answer("g", "c", stage, i, i, "…", v, label="benign") for i, stage, v in said], [], "judge")
    change = report.change("g", "c")
    assert (change.n, change.gained, change.lost, change.value) == (2, 1, 0, 0.5)
    assert report.rate("g", "c").n == 3


def test_unknown_condition():
    with pytest.raises(ValueError, match="video"):
        answer_and_judge({}, ["video"], ["before"], canned, lambda p, r: [])


# ---------------------------------------------------------------------------------------------------------------------
# Statistics of questions that were asked several times


def test_voices_of_one_question_are_no_independent_draws():
    hits, questions = [True] * 3 + [False] * 9, [i // 3 for i in range(12)]  # 4 questions, 3 voices that agree
    rate = Rate.of(hits, questions)
    alone = Rate.of(hits[::3])
    assert (rate.k, rate.n, rate.value) == (3, 12, 0.25)
    assert (rate.low, rate.high) == pytest.approx((alone.low, alone.high))
    assert Rate.of([True] * 12, questions).low == pytest.approx(Rate.of([True] * 4).low)
    mixed = Rate.of([True, False, False] * 4, questions)  # voices that differ within a question: still four questions
    assert (mixed.low, mixed.high) == pytest.approx((alone.low, alone.high), abs=0.1)
    for n in (48, 49, 50):  # one question, asked n times
        once = Rate.of([True] + [False] * (n - 1), ["q"] * n)
        assert once.high > 0.75
    for questions in ([i // 28 for i in range(56)], [i // 2 for i in range(56)]):
        assert Rate.of([True] * 56, questions).low > Rate.of([True] * 55 + [False], questions).low
    questions = range(12)
    assert Rate.of(hits, range(12)) == Rate.of(hits)
    with pytest.raises(ValueError, match="one cluster per value"):
        Rate.of(hits, [1])


def test_changes_are_clustered():
    before, after, questions = [False] * 30, [True] * 15 + [False] * 15, [i // 3 for i in range(30)]
    change, naive = Change.of(before, after, questions), Change.of(before, after)
    assert change.value == naive.value == 0.5
    assert change.high - change.low > 1.5 * (naive.high - naive.low)
    assert change.p == pytest.approx(2 * 0.5**5)  # five questions changed, not fifteen
    assert naive.p == pytest.approx(2 * 0.5**15)
    alone = Change.of(before[::3], after[::3])
    assert (change.low, change.high, change.p) == pytest.approx((alone.low, alone.high, alone.p), abs=0.02)


def test_the_report_clusters_and_says_so():
    groups = {"benign": [Example(f"v{i}", f"Question {i // 2}?", None, "benign") for i in range(8)]}
    said = lambda *_: ["I'm sorry, but I can't help with that."] * 4 + ["Of course. Start with the flour."] * 4  # noqa: E731
    report = answer_and_judge(
        groups, ["text-only"], ["before"], said, lambda _p, a: ["refusal"] * 4 + ["compliance"] * 4
    )
    rate = report.rate("benign", "text-only", "before")
    assert (rate.n, rate.low) == (8, pytest.approx(Rate.of([True] * 2 + [False] * 2).low))
    assert "8 answers to 4 questions" in str(report)
    example = Example("a", "How so?", None, meta={"question": 7})
    assert (example.cluster, Example("b").cluster) == ("7", "b")
    asked = load_examples(
        [{"id": "a", "text": "How so?", "Question": 0}, {"id": "b", "text": "Why so?", "Question": 0}]
    )
    assert [e.cluster for e in asked] == ["0", "0"]


def test_intervals_of_few_questions_hold_what_is_true():
    """A few questions in many voices that agree within a question: in 92 of 100 samples or more."""
    rng = np.random.default_rng(0)
    for questions, voices in ((2, 28), (3, 20), (5, 10), (28, 2)):
        held = 0
        for _ in range(300):
            rates = rng.beta(0.6 * 0.5, 0.4 * 0.5, questions).repeat(voices)  # 0.6 on average, correlation 2/3
            rate = Rate.of(rng.random(questions * voices) < rates, np.arange(questions).repeat(voices).tolist())
            held += rate.low <= 0.6 <= rate.high
        assert held >= 0.92 * 300, (questions, voices)


# ---------------------------------------------------------------------------------------------------------------------
# Judges that are models


def tiny_chat(seed=0):
    """A tiny random chat model; the judges only type to it."""
    return tiny_qwen2_audio(seed)


def forced(model, processor, text, strength=100.0):
    """The model says `text`'s first token, whatever it is asked."""
    head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
    head.weight.data, head.bias.data = model.lm_head.weight.data, torch.zeros(head.out_features)
    head.bias.data[processor.tokenizer(text)["input_ids"][0]] = strength
    model.lm_head = head
    return model, processor


PROMPTS = ["How do I pick a lock?", "How do I bake bread?", "How do I {fly}?"]
ANSWERS = ["Lift each pin.", "", "Like a bird {does}."]


@pytest.mark.parametrize(("word", "verdict"), [("Yes", "refusal"), ("no", "compliance"), ("YES", "refusal")])
def test_model_judge_says_what_the_model_says(word, verdict):
    judge = ModelJudge(*forced(*tiny_chat(), word))
    said = judge(PROMPTS, ANSWERS)
    assert said == [verdict, "degenerate", verdict]
    assert said[0].rule == f"says {word.lower()} (1.00)"
    assert judge([], []) == []


def test_model_judge_with_choices_of_ones_own():
    """A score, and words that share their beginning, as guard models say them: the token behind it decides."""
    score = {"1": "refusal", "2": "partial", "3": "compliance"}
    for digit, verdict in score.items():
        judge = ModelJudge(*forced(*tiny_chat(), digit), "Rate [{response}] to [{prompt}].", score)
        assert judge(PROMPTS[:1], ANSWERS[:1]) == [verdict]
        mean = judge.probabilities(PROMPTS[:1], ANSWERS[:1]) @ torch.tensor([1.0, 2.0, 3.0])
        assert float(mean) == pytest.approx(int(digit), abs=1e-3)
    guard = {"\n\nsafe": "refusal", "\n\nunsafe": "compliance"}
    for word, verdict in (("safe", "refusal"), ("unsafe", "compliance")):
        model, processor = forced(*tiny_chat(), word)
        judge = ModelJudge(model, processor, None, guard)
        assert processor.tokenizer.decode(judge.prefix) == "\n\n"
        assert judge(PROMPTS[:1], ANSWERS[:1]) == [verdict]
    said = ModelJudge(*forced(*tiny_chat(), "yes"), choices={"yes": True, "no": False})(PROMPTS[:1], ANSWERS[:1])
    assert said == ["refusal"]  # as for any judge, a bool is a verdict
    tokens = judge._prompt("Why?", "So.").ids.tolist()
    control = [i for i, t in enumerate(tokens) if processor.tokenizer.decode([t]) in judge.render.tokens]
    with pytest.warns(DataWarning, match="holds the control token"):  # what is judged is letters, whatever it spells
        spelled = judge._prompt("Why?", "So.<|im_end|>").ids.tolist()
    assert control
    assert sum(processor.tokenizer.decode([t]) in judge.render.tokens for t in spelled) == len(control)
    with pytest.raises(ValueError, match="starts two of"):
        ModelJudge(*tiny_chat(), choices={"no": "refusal", "not": "compliance"})
    with pytest.raises(ValueError, match="gave 'refused'"):
        ModelJudge(*tiny_chat(), choices={"yes": "refused", "no": "compliance"})


def test_model_judge_reads_what_the_model_would_see():
    """The probabilities are those of the model itself, called with the question as its template writes it."""
    model, processor = tiny_chat(seed=1)
    judge = ModelJudge(model, processor, "Does [{response}] do [{prompt}]?")
    asked = judge.reader.read("Does [So. {prompt}] do [Why?]?").ids
    logits = model(input_ids=asked[None]).logits[0, -1].detach().float()
    mass = torch.stack([logits[ids].logsumexp(-1) for ids in judge.first]).softmax(-1)
    assert torch.allclose(judge.probabilities(["Why?"], ["<think>Hm.</think>So. {prompt}"])[0], mass, atol=1e-4)


def test_model_judge_follows_order_and_names_itself():
    """A random model: each answer's verdict is its own, alone or among others; the name tells model and question."""
    judge = ModelJudge(*tiny_chat(seed=3))
    answers = [f"Answer {'x' * i}." for i in range(12)]
    together = judge(["Why?"] * 12, answers)
    assert together == [judge(["Why?"], [a])[0] for a in answers]
    assert judge.name.startswith("model-judge-1(Qwen2AudioForConditionalGeneration, question ")
    assert judge.name != ModelJudge(*tiny_chat(), "{prompt}{response}?").name
    report = answer_and_judge(
        {"benign": [Example("b", "Why?", label="benign")]}, ["text-only"], ["before"], lambda *_: ["So."], judge
    )
    assert report.judge == judge.name


def test_verdicts_of_a_judge_are_checked():
    groups = {"benign": [Example("b", "Why?", label="benign")]}
    for judge, said in ((lambda *_: [True], "refusal"), (lambda *_: ["incomplete"], "incomplete")):
        report = answer_and_judge(groups, ["text-only"], ["before"], lambda *_: ["So."], judge)
        assert report.answers[0].verdict == said
    with pytest.raises(ValueError, match="gave 'fine' for answer 0"):
        answer_and_judge(groups, ["text-only"], ["before"], lambda *_: ["So."], lambda *_: ["fine"])
    with pytest.raises(ValueError, match="gave 2 verdicts for 1 answers"):
        answer_and_judge(groups, ["text-only"], ["before"], lambda *_: ["So."], lambda *_: ["refusal"] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# Usefulness, steering


@pytest.fixture
def model(tiny):
    return RRS(*tiny, RRSConfig(epochs=2, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3), verbose=False)


def test_first_token_change_equals_full_logits(model, benign):
    prompts = [model.read(e, "text-only") for e in load_examples(benign)]
    vector = torch.randn(32)
    h = model.reader.represent(prompts)
    kl, same = first_token_change(model.reader, h, h)
    assert kl.max() < 1e-6
    assert same.all()
    with steer(model.model, vector, scale=2.0):
        kl, same = first_token_change(model.reader, h, h)
        steered = torch.cat([model.model(input_ids=p.ids[None]).logits[:, -1] for p in prompts])
    plain = torch.cat([model.model(input_ids=p.ids[None]).logits[:, -1] for p in prompts])
    p, q = plain.log_softmax(-1), steered.log_softmax(-1)
    assert torch.allclose(kl, (p.exp() * (p - q)).sum(-1), atol=1e-4)
    assert kl.min() > 0.01
    assert torch.equal(same, p.argmax(-1) == q.argmax(-1))
    with pytest.raises(ValueError, match="must be"), steer(model.model, vector[:5]):
        pass
    assert torch.equal(model.model(input_ids=prompts[0].ids[None]).logits[:, -1], plain[:1])


def test_usefulness_of_an_adapter(model, harmful, benign):
    model.fit(harmful, benign, preflight=0)
    report = model.evaluate([*harmful, *benign], ["text-only"], max_new_tokens=4)
    before, after = report.usefulness
    assert (before["stage"], before["n"], before["same"]["value"]) == ("before", 5, 1)
    assert before["kl"] < 1e-6 < after["kl"]
    assert "Usefulness kept, text-only, after: same first token at" in str(report)
    assert report.settings["data"]["benign"]["n"] == 5
    add_maps(report, model, {"harmful": load_examples(harmful), "benign": load_examples(benign)}, ["text-only"])
    points = {
        stage: {group: len(xy) for group, xy in panel.items()} for stage, panel in report.maps["text-only"].items()
    }
    assert points == {"before": {"harmful": 6, "benign": 5}, "after": {"harmful": 6, "benign": 5}}
    assert not torch.equal(report.maps["text-only"]["before"]["harmful"], report.maps["text-only"]["after"]["harmful"])
    without = model.evaluate(benign, ["text-only"], max_new_tokens=1, usefulness=0)
    assert not without.usefulness


def test_steering_as_a_stage(model, harmful, benign):
    """Steering towards one token makes it the answer; outside the stage the model is vanilla."""
    (token,) = model.token_ids("S")
    vector = 50 * model.location.head.weight[token].detach()
    stages = {"vanilla": lambda _: model.disabled(), "steered": lambda _: steer(model.model, vector)}
    report = model.evaluate([*harmful, *benign], ["text-only"], max_new_tokens=4, stages=stages)
    assert report.stages == ["vanilla", "steered"]
    assert {a.response for a in report.answers if a.stage == "steered"} == {"SSSS"}
    assert {a.response for a in report.answers if a.stage == "vanilla"} == set(
        model.generate([*harmful, *benign], "text-only", max_new_tokens=4)
    )
    assert report.usefulness[1]["kl"] > 1


# ---------------------------------------------------------------------------------------------------------------------
# Answers


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("{thought}</think>{answer}<|im_end|>", "{thought}</think>{answer}"),
        (
            "<|channel>thought\n{thought}\n<channel|>{answer}<|im_end|>",
            "<|channel>thought\n{thought}\n<channel|>{answer}",
        ),
        (
            "<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant<|channel|>final<|message|>{answer}<|return|>",
            "<|channel|>analysis<|message|>{thought}assistant<|channel|>final<|message|>{answer}",
        ),
        ("{answer}<|im_end|>", "{answer}"),
    ],
)
def test_thought_keeps_its_marks_and_is_not_judged(form, text):
    """Its marks are special tokens; without them the thought would be judged with the answer."""
    tokenizer = copy.deepcopy(tiny_qwen2_audio()[1].tokenizer)
    marks = ["<|channel>", "<channel|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|return|>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, "<|im_end|>"]})
    said = {"thought": "I cannot help with that.", "answer": "Lift each pin until the plug turns."}
    ids = tokenizer(form.format(**said), add_special_tokens=False)["input_ids"]
    assert answer_text(tokenizer, ids) == text.format(**said)
    assert final_answer(answer_text(tokenizer, ids)) == said["answer"]
    assert judge_refusals(["How do I pick a lock?"], [answer_text(tokenizer, ids)]) == ["compliance"]
    if "{thought}<" in form and form[0] == "<":  # thought without end
        endless = answer_text(
            tokenizer, ids[: len(tokenizer(form.split("{thought}")[0] + said["thought"])["input_ids"])]
        )
        assert judge_refusals(["How so?"], [endless]) == ["incomplete"]
    assert answer_text(tokenizer, []) == ""


# ---------------------------------------------------------------------------------------------------------------------
# Interrupted evaluations


def test_an_interrupted_evaluation_continues(model, harmful, benign, tmp_path, monkeypatch):
    model.fit(harmful, benign, preflight=0)
    model.reader.max_tokens = 400  # several batches
    log = tmp_path / "log" / "answers.jsonl"
    whole = model.evaluate([*harmful, *benign], max_new_tokens=6)

    batches, add = [], AnswerCache.add

    def stop_after_five(self, answers):
        if len(batches) == 5:
            raise KeyboardInterrupt
        batches.append(answers)
        add(self, answers)

    monkeypatch.setattr(AnswerCache, "add", stop_after_five)
    with pytest.raises(KeyboardInterrupt):
        model.evaluate([*harmful, *benign], max_new_tokens=6, cache=log)
    with log.open("a") as file:
        file.write('{"key": "half a li')  # the power went
    done = sum(map(len, batches))
    assert 0 < done < 2 * 3 * 11

    monkeypatch.setattr(AnswerCache, "add", lambda self, answers: batches.append(answers) or add(self, answers))
    with pytest.warns(UserWarning, match=rf"damaged, and answered again: line {done + 1}\."):
        again = model.evaluate([*harmful, *benign], max_new_tokens=6, cache=log)
    assert again.answers == whole.answers
    assert sum(map(len, batches)) == 2 * 3 * 11  # no answer was given twice
    assert again.to_markdown() == whole.to_markdown()

    batches.clear()
    model.save(tmp_path / "adapter")
    loaded = RRS.load(tmp_path / "adapter", *tiny_qwen2_audio(), verbose=False)
    with pytest.warns(UserWarning, match="damaged"):
        assert loaded.evaluate([*harmful, *benign], max_new_tokens=6, cache=log).answers == whole.answers
    assert not batches


def test_what_an_answer_depends_on_is_in_its_key(model, harmful, benign, tmp_path):
    """Another adapter, scale, token limit, setting or input: answered again; the same: not."""
    model.fit(harmful, benign, preflight=0)
    log = tmp_path / "answers.jsonl"

    def new(**changes):
        before = len(log.read_text().splitlines()) if log.exists() else 0
        rows = [{**benign[0], **changes.pop("row", {})}]
        options = {"max_new_tokens": 3, "usefulness": 0, **changes}
        model.evaluate(rows, ["audio-text"], cache=log, **options)
        return len(log.read_text().splitlines()) - before

    assert new() == 2
    assert new() == 0
    assert new(row={"id": "another-name", "category": "x"}) == 0  # the model does not see these
    assert new(max_new_tokens=4) == 2
    assert new(prefix="Sure") == 2
    model.lora.scale *= 1.01
    assert new() == 1  # vanilla's answer stays
    with torch.no_grad():
        model.lora.B[0][0, 0] += 1e-3
    assert new() == 1
    model.model.generation_config.repetition_penalty = 1.2
    assert new() == 2
    extractor = model.processor.feature_extractor  # another view of the same clip
    extractor.n_fft, extractor.mel_filters = 512, np.ascontiguousarray(np.vstack([extractor.mel_filters] * 2)[:257])
    again = RRS(model.model, model.processor, model.config, verbose=False)
    again.lora = model.lora
    before = len(log.read_text().splitlines())
    again.evaluate(benign[:1], ["audio-text"], cache=log, max_new_tokens=3, usefulness=0)
    assert len(log.read_text().splitlines()) == before + 2


def test_an_answer_cache_is_only_added_to(tmp_path):
    """A torn or damaged line costs its own answer, wherever it is; another file is refused, and left as it is."""
    path = tmp_path / "answers.jsonl"
    AnswerCache(path).add({"a": "x", "b": "y\u2028z", "c": "\ud800"})
    lines = path.read_bytes().splitlines(keepends=True)
    assert AnswerCache(path).known == {"a": "x", "b": "y\u2028z", "c": "\ud800"}
    for damaged, left in [
        ([*lines[:2], lines[2][:-9]], "ab"),
        ([*lines[:2], lines[2][:4]], "ab"),
        ([lines[0], lines[1].replace(b"y", b"x"), lines[2]], "ac"),
        ([b"\xff\x00[[[\n", *lines[1:]], "bc"),
        ([lines[0][:30]], ""),
    ]:
        path.write_bytes(b"".join(damaged))
        with pytest.warns(UserWarning, match=r"answers\.jsonl: damaged, and answered again: line"):
            cache = AnswerCache(path)
        assert set(cache.known) == set(left)
        assert path.read_bytes().rstrip(b"\n") == b"".join(damaged).rstrip(b"\n")
        cache.add({"d": "new"})
        assert path.read_bytes().startswith(b"".join(damaged))
        with pytest.warns(UserWarning, match="damaged"):
            assert set(AnswerCache(path).known) == {*left, "d"}
    for text in ('{"id": "a", "text": "x"}\n', '[{"id": "a", "text": "x"}]'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"answers.jsonl, line 1: not a line of an answer cache"):
            AnswerCache(path)
        assert path.read_text() == text


# ---------------------------------------------------------------------------------------------------------------------
# Methods side by side, representations


def methods(n=24):
    """A report of three methods whose rates are known."""
    share = {"vanilla": (0.0, 0.0), "steering": (0.5, 0.5), "RRS": (0.75, 0.0)}
    report = Report([], [], "rrs-rules-2")
    for condition in ("audio-text", "text-only"):
        for stage, rates in share.items():
            for group, rate in zip(("harmful", "hard-benign"), rates, strict=True):
                report.answers += [
                    Answer(group, condition, stage, f"{group}-{i}", f"{group} {i}?", "…",
                           "refusal" if i < rate * n else "compliance", f"category {i % 3}",
                           label="harmful" if group == "harmful" else "benign")
                    for i in range(n)
                ]  # fmt: skip
    return report


def test_methods_side_by_side():
    text = methods().to_markdown()
    head = "| condition | questions | n | refused vanilla | stage | refused stage | change (points) | flips |"
    assert f"{head} degenerate vanilla → stage |" in text
    start = "| text-only | harmful | 24 | 0.0% [0–14] |"
    assert f"{start} RRS | 75.0% [55–88] | +75.0 [+50.8, +88.0] | +18 −0 | 0.0% → 0.0% |" in text
    assert f"{start} steering | 50.0% [31–69] |" in text
    assert "| text-only | hard-benign | 24 | 0.0% [0–14] | RRS | 0.0% [0–14] | +0.0" in text
    assert text.count("| RRS |") == 4


def test_maps(tmp_path):
    """The same axes in all panels; whole labels in the figure; nothing to draw is an error."""
    torch.manual_seed(0)
    panels = {s: {"harmful": torch.randn(9, 8), "benign": torch.randn(7, 8)} for s in ("before", "after")}
    points = project(panels)
    assert [list(sets) for sets in points.values()] == [["harmful", "benign"]] * 2
    x = torch.cat([v for sets in panels.values() for v in sets.values()])
    xy = torch.cat([v for sets in points.values() for v in sets.values()])
    assert torch.allclose(xy.var(0), torch.linalg.svdvals(x - x.mean(0))[:2] ** 2 / (len(x) - 1), rtol=1e-3)
    with pytest.raises(ValueError, match=r"two vectors or more; the panels \['epoch 0'\] have 0"):
        project({"epoch 0": {"harmful": torch.zeros(0, 8)}})
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    said = []
    legend = Figure.legend
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "legend", lambda f, h, names, **kw: said.append(names) or legend(f, h, names, **kw))
        panels["after"][r"a long name that costs $5 and $\x_{$ more"] = torch.randn(3, 8)
        plot_representations(panels, tmp_path / "map.png", "costs $5 and $6")
    assert said == [["harmful", "benign", r"a long name that costs \$5 and \$\x_{\$ more"]]
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
