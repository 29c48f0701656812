"""Every example in its smallest form, on tiny random models: the values are right, not only the run."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import ablation
import baselines
import benchmark
import compare
import count
import numpy as np
import pytest
import reproduce
import scaling
import torch
import train
import transfer
import zoo
from conftest import ROOT, rows, tiny_qwen2_audio, tone
from safetensors.torch import load_file
from transformers import Qwen2_5OmniThinkerConfig

from rrs import RRS, Calibration, Point, RRSConfig, RRSWarning, TrainItem, contribution, to_targets
from rrs.data import load_examples
from rrs.evaluate import Answer, Rate, Report, answer_text
from rrs.hooks import LoRA, frozen, linear_paths

pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
spec = importlib.util.spec_from_file_location("evaluate_example", ROOT / "examples" / "evaluate.py")
assert spec is not None
assert spec.loader is not None
evaluate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(evaluate)

CONFIG = RRSConfig(
    conditions=("text-only",), epochs=1, batch_size=4, accumulate=1, learning_rate=1e-2, penalty=1e-3, lora_dropout=0.0
)
CONDITIONS = ("audio-text", "text-only", "audio-only")


def sides(n, seed=0):
    return {side: load_examples(rows(side, n, seed)) for side in ("harmful", "benign")}


def tiny(config=CONFIG):
    return RRS(*tiny_qwen2_audio(), config, verbose=False)


def written(folder: Path) -> str:
    model, processor = tiny_qwen2_audio()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def command(monkeypatch, main: Callable[[], None], *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["example.py", *map(str, arguments)])
    main()


# -- train.py and evaluate.py


def test_the_whole_job_and_the_command_it_ends_with(tmp_path, monkeypatch, capsys):
    name, out = written(tmp_path / "model"), tmp_path / "out"
    for side in ("harmful", "benign"):
        lines = [json.dumps({**row, "audio": None}) + "\n" for row in rows(side, 40)]
        (tmp_path / f"{side}.jsonl").write_text("".join(lines))
    files = [f"--{side}={tmp_path / side}.jsonl" for side in ("harmful", "benign")]
    command(monkeypatch, train.main, "--model", name, *files, "--limit", 16, "--out", out)
    said = capsys.readouterr().out
    assert "train     on 10 harmful, 10 benign questions, text-only: 3 steps" in said
    assert "calibrate by 4 questions" in said
    assert "report    on 2 harmful, 2 benign" in said
    record, report = json.loads((out / "adapter" / "rrs.json").read_text()), Report.load(out)
    assert len(record["history"]) == 3
    assert record["calibrated"]["chosen"]["scale"] > 0
    assert "Not evaluated" not in (out / "adapter" / "README.md").read_text()
    assert {a.stage for a in report.answers} == {"before", "after"}
    assert not report.notes  # none of its questions was trained on, which would be noted
    assert f"evaluate.py --model {name} --adapter {out / 'adapter'}" in said

    where = ["--model", name, "--adapter", out / "adapter", "--out", tmp_path / "again"]
    questions = [f"--test={side}={tmp_path / side}.jsonl" for side in ("harmful", "benign")]
    command(monkeypatch, evaluate.main, *where, *questions, "--limit", 2, "--max-new-tokens", 16)
    again = Report.load(tmp_path / "again")
    assert {(a.group, a.condition, a.stage) for a in again.answers} == {
        (group, "text-only", stage) for group in ("harmful", "benign") for stage in ("before", "after")
    }
    assert any("in the training set" in note for note in again.notes)


def test_a_run_is_done_again_and_compared(tmp_path, monkeypatch, capsys):
    out, again = tmp_path / "out", tmp_path / "again"
    written(tmp_path / "model")
    for side in ("harmful", "benign"):
        lines = [json.dumps({**row, "audio": None}) + "\n" for row in rows(side, 32)]
        (tmp_path / f"{side}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)  # from where the second run has to start as well
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = str(ROOT / "examples" / "train.py")
    arguments = ["--model", "model", "--harmful=harmful.jsonl", "--benign", "benign.jsonl", "--limit", "8"]
    monkeypatch.setattr(sys, "argv", [script, *arguments, "--out", "out"])
    train.main()
    monkeypatch.chdir("/")

    def outcome(folder, *more):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            command(monkeypatch, reproduce.main, folder, *more)
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    code, said, _ = outcome(out)
    assert (code, said.splitlines()[-1]) == (0, "SAME"), said
    assert "versions and machine are as recorded" in said
    assert "weights: the same" in said
    assert f"verdicts: 0 of {len(Report.load(out).answers)} differ" in said
    assert load_file(tmp_path / "out-again" / "adapter" / "adapter_model.safetensors")

    path = out / "report.json"
    saved = json.loads(path.read_text())
    record, first = saved["settings"], saved["answers"][0]
    record["versions"]["torch"], record["machine"]["system"] = "0.1", "Plan 9"
    first["verdict"] = next(v for v in ("refusal", "compliance") if v != first["verdict"])
    path.write_text(json.dumps(saved))
    tiny_qwen2_audio(seed=1)[0].save_pretrained(tmp_path / "model")  # another base under the old name
    code, said, _ = outcome(out, "--again", again)
    assert (code, said.splitlines()[-1]) == (1, "DIFFERENT")
    told = ("version torch: 0.1 then", "machine system: Plan 9 then", "model fingerprint: ", "weights: different")
    assert all(words in said for words in told)
    assert f"  {first['group']}, {first['condition']}, {first['stage']}, {first['id']}: {first['verdict']} then" in said
    assert "data " not in said

    def told_of(**settings):
        path.write_text(json.dumps({**saved, "settings": {**record, **settings}}))
        code, _, said = outcome(out, "--again", tmp_path / "third")
        assert code == 2
        return said

    assert f"no longer there: {tmp_path / 'gone.py'}" in told_of(command=["gone.py", "--out", "out"])
    assert f"no longer there: {tmp_path / 'x.csv'}" in told_of(files={"x.csv": ""})
    assert "has no --out" in told_of(command=[script])
    assert "ended with status 2" in told_of(command=[script, "--wrong", "--out=x"])
    (tmp_path / "harmful.jsonl").write_text("")
    assert f"{tmp_path / 'harmful.jsonl'} has changed since; restore it" in told_of()
    del record["folder"]
    assert "report.json has no record of its run: folder missing" in told_of()
    assert outcome(out, "--again", again)[0] == 2
    assert "is no report" in outcome(tmp_path)[2]


def test_recommendations_go_into_the_prompts(tmp_path, monkeypatch):
    name = written(tmp_path / "model")
    monkeypatch.setitem(train.RECOMMENDED, "Qwen2AudioForConditionalGeneration", {"system": "Be kind."})
    model = train.open_model(name, refusal="No")
    assert model.config == RRSConfig(system="Be kind.", refusal="No")
    prompt = model.read(load_examples(["Why?"])[0], "text-only")
    assert "system\nBe kind.<|im_end|>" in model.tokenizer.decode(prompt.ids.tolist())
    assert "Qwen2_5OmniThinkerForConditionalGeneration" in train.RECOMMENDED


@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("layers", [(0.0, 1.0), (0.5, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_that_is_expected_is_what_autograd_keeps(dropout, layers, dtype):
    lalm, processor = tiny_qwen2_audio(hidden=64, layers=4)
    model = RRS(lalm.to(dtype), processor, RRSConfig(lora_dropout=dropout, layers=layers), verbose=False)
    paths = linear_paths(model.location, model.config.target_modules, layers)
    lora = LoRA(lalm, paths, r=16, alpha=4.0, dropout=dropout).attach().train()
    lora.key = (0,)
    model.reader.share_prefix = False
    prompts = [model.read(sides(1)["harmful"][0], "audio-text")] * model.config.batch_size
    weights = {p.untyped_storage().data_ptr() for p in (*lalm.parameters(), *lora.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with frozen(lalm), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.reader.last_hidden(prompts)
    expected = train.expected_memory(model, len(prompts[0]))
    assert expected["activations"] == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.06)
    assert expected["LoRA, its gradients and AdamW's moments"] == 16 * sum(p.numel() for p in lora.parameters())


def test_a_width_for_each_block_is_a_width():
    """Gemma 3n's config has a list."""
    lalm, build_inputs = zoo.tiny("gemma3n")
    model = RRS(lalm, zoo.TOKENIZER, build_inputs=build_inputs, verbose=False)
    widths = lalm.config.get_text_config().intermediate_size
    assert isinstance(widths, list)
    wider = train.expected_memory(model, 8)["activations"]
    lalm.config.get_text_config().intermediate_size = [2 * w for w in widths]
    assert train.expected_memory(model, 8)["activations"] > wider > 0


def test_a_topic_that_both_labels_share_is_two_groups():
    data = [{"text": f"q{i}", "label": label, "group": group} for i, (label, group) in enumerate(
        [("harmful", "fraud"), ("benign", "fraud"), ("benign", "chat"), ("harmful", None)]
    )]  # fmt: skip
    groups = train.grouped(load_examples(data))
    assert {name: [e.text for e in rows] for name, rows in groups.items()} == {
        "fraud (harmful)": ["q0"], "fraud (benign)": ["q1"], "chat": ["q2"], "harmful": ["q3"]
    }  # fmt: skip


def test_groups_from_the_command_line(tmp_path, capsys):
    path = tmp_path / "both.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"text": "a", "label": "harmful"}, {"text": "b"}]))
    parser = argparse.ArgumentParser()
    parser.add_argument("--test", action=train.Groups, default={}, **train.TEST)
    given = parser.parse_args(["--test", f"harmful-new={path}", "--test", f"chat={path}"]).test
    assert {g: [(e.text, e.label) for e in rows_] for g, rows_ in given.items()} == {
        "harmful-new": [("a", "harmful"), ("b", "harmful")],
        "chat": [("b", "benign")],
    }
    for wrong, words in (
        (["x.csv"], "expected GROUP=FILE, e.g. --test harmful=x.csv"),
        ([f"chat={path}", "--test", f"chat={path}"], "chat=… is given twice"),
        (["chat=nowhere.csv"], "nowhere.csv: no such file"),
    ):
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(["--test", *wrong])
        assert words in capsys.readouterr().err


def test_answers_side_by_side():
    def answer(group, i, stage, verdict):
        label = "harmful" if group == "harmful" else "benign"
        return Answer(group, "text-only", stage, str(i), f"{group} {i}?", f"{stage} {i}", verdict, label=label)

    answers = [
        answer(g, i, s, "compliance") for g in ("harmful", "chat") for i in range(4) for s in ("before", "after")
    ]
    answers[5] = replace(answers[5], verdict="refusal")  # harmful 2, after
    text = train.side_by_side(Report(answers, [], "judge"), 3)
    asked = [line.split(": ")[1] for line in text.splitlines() if line.endswith("?")]
    assert asked == ["harmful 2?", "chat 0?", "harmful 0?"]  # what changed first
    assert "compliance: before 2" in text.split("|")[1]
    assert "| refusal: after 2" in text


def test_an_adapter_that_peft_wrote(tmp_path):
    """Also one in the audio tower, whose clips must not be shared with the model before."""
    peft = pytest.importorskip("peft")
    lalm, processor = tiny_qwen2_audio()
    settings = peft.LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    wrapped = peft.get_peft_model(lalm, settings)
    wrapped.save_pretrained(tmp_path)
    test = sides(3)
    report = evaluate.evaluate(tiny(), tmp_path, test, max_new_tokens=5, cache=tmp_path / "answers.jsonl")
    models = {"before": tiny(), "after": RRS(wrapped.merge_and_unload(), processor, CONFIG, verbose=False)}
    assert report.stages == [*models]
    for stage, model in models.items():
        for condition in CONDITIONS:
            said = [a.response for a in report.answers if (a.stage, a.condition) == (stage, condition)]
            assert said == model.generate([e for g in test.values() for e in g], condition, max_new_tokens=5)
    assert all(u["kl"] > 1e-3 for u in report.usefulness if u["stage"] == "after")


# -- compare.py


def test_all_methods_in_one_table(tmp_path, monkeypatch):
    model, data = tiny(replace(CONFIG, refusal="I can't")), sides(4)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    test = {"harmful": data["harmful"][:2], "hard-benign": load_examples(rows("benign", 2, 50))}
    dev = {group: [replace(e, audio=None) for e in examples] for group, examples in test.items()}
    options = {"rates": (1.0,), "epochs": (1,), "alphas": (0.1, 0.8), "max_new_tokens": 3, "budget": 1.0}
    report = compare.compare(model, data, dev, test, tmp_path, **options)
    assert [s.partition(",")[0] for s in report.stages] == [
        "vanilla", "system prompt", "SARSteer", "SARSteer", "SFT basic", "SFT mirror", "SFT parallel", "RRS", "RRS"
    ]  # fmt: skip
    assert len(report.answers) == 9 * 3 * 4
    kl = {(u["condition"], u["stage"]): u["kl"] for u in report.usefulness}
    assert {c for c, _ in kl} == {*CONDITIONS}
    trained = {stage for stage in report.stages if stage.startswith(("SFT", "RRS", "system"))}
    assert all(kl[c, s] > 1e-6 for c in CONDITIONS for s in trained)
    assert all(kl[c, "vanilla"] < 1e-6 for c in CONDITIONS)
    assert len({kl["text-only", s] for s in trained}) == len(trained)
    # what is left on the model is RRS's adapter and nothing else
    assert model.config.refusal == "I can't" == model.record["config"]["refusal"]
    assert all(torch.equal(v, before[k]) for k, v in model.model.state_dict().items())
    now = model.extract(data["harmful"], "text-only", vanilla=False)
    vanilla = model.disable().extract(data["harmful"], "text-only")
    loaded = RRS.load(tmp_path / "adapter", model.model, model.processor, verbose=False)
    assert torch.equal(loaded.extract(data["harmful"], "text-only", vanilla=False), now)
    assert [p["scale"] for p in report.curve][1:] == [
        p["scale"] for p in model.record["calibrated"]["points"]
    ]  # its own
    loaded.disable()
    other = RRS.load(tmp_path / "SFT-mirror", model.model, model.processor, verbose=False)
    assert not torch.equal(other.extract(data["harmful"], "text-only", vanilla=False), now)
    other.disable()
    assert torch.equal(tiny().extract(data["harmful"], "text-only"), vanilla)
    with monkeypatch.context() as patched:  # once more: nothing is trained or answered anew
        patched.setattr(torch.optim.AdamW, "step", lambda *_, **__: pytest.fail("trained again"))
        again = tiny(replace(CONFIG, refusal="I can't"))
        assert compare.compare(again, data, dev, test, tmp_path, **options).answers == report.answers
    typed = {side: [replace(e, audio=None) for e in examples] for side, examples in data.items()}
    with pytest.raises(ValueError, match="audio-text: no harmful and no benign example to train on"):
        compare.compare(model, typed, test, test, tmp_path)


@pytest.mark.parametrize("exact", [True, False])
def test_likelihoods_equal_the_full_models(exact):
    model, examples = tiny(), sides(3)["benign"]
    if not exact:
        model.reader.exact = False  # as on a model whose decoder can't be replayed
    prompts = [model.read(e, "audio-text") for e in examples]
    answers = [torch.tensor(a) for a in ([5, 6, 7], [9], [11, 12])]
    items = [TrainItem(e, "audio-text", answer) for e, answer in zip(examples, answers, strict=True)]
    ours = -baselines.negative_log_likelihood(model.reader, prompts, items)
    for item, value in zip(items, ours, strict=True):
        answer, inputs = item.target, model.render(model.config.instruction, item.example.clip[1](16000))
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer[None]], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        logp = model.model(**inputs).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        assert value.item() == pytest.approx(logp[range(len(answer)), answer].mean().item(), abs=1e-4)


def test_likelihoods_of_mixed_prompts():
    model, cells = tiny(), [(e, c) for e in sides(2)["benign"] for c in ("audio-text", "text-only")]
    prompts = [model.read(*cell) for cell in cells]
    items = [TrainItem(*cell, torch.tensor([5 + i, 6])) for i, cell in enumerate(cells)]
    loss = partial(baselines.negative_log_likelihood, model.reader)
    alone = [loss([p], [i]) for p, i in zip(prompts, items, strict=True)]
    assert torch.allclose(loss(prompts, items), torch.cat(alone), atol=1e-5)


def test_fine_tuning_learns_its_answers():
    """The loss is the likelihood of the targets: they become likelier, in RRS's own loop."""
    model = tiny(replace(CONFIG, epochs=60, penalty=0.0))
    items = baselines.own_answers(model, sides(4)["harmful"], "text-only", True, 12)
    assert all(baselines.REFUSAL.startswith(model.tokenizer.decode(i.target)) for i in items)  # it can't refuse
    prompts = [model.read(i.example, "text-only") for i in items]

    def loss() -> float:
        with torch.no_grad():
            return baselines.negative_log_likelihood(model.reader, prompts, items).mean().item()

    vanilla = loss()
    model.train(items, objective=baselines.negative_log_likelihood)
    trained, lora = loss(), model.lora
    assert trained < 0.8 * vanilla
    model.disable().lora = None
    with compare.adapted(model, lora, "text-only"):
        assert loss() == trained
    assert loss() == vanilla
    answers = baselines.own_answers(model, sides(2)["benign"], "text-only", False, 12)
    said = model.generate(sides(2)["benign"], "text-only", max_new_tokens=12)
    for item, text in zip(answers, said, strict=True):
        assert answer_text(model.tokenizer, item.target.tolist()) == text


def test_sarsteer_moves_the_last_prompt_token_of_every_block():
    model, data, k = tiny(), sides(12), 3
    vectors = baselines.sarsteer_vectors(model, data["harmful"], data["benign"], "text-only", k)
    safe = model.extract(data["benign"], "text-only", all_layers=True)[:, 1:]
    plain = model.extract(data["harmful"], "text-only", all_layers=True)[:, 1:]
    model.config = replace(CONFIG, refusal_prompt=baselines.SARSTEER_PROMPT)
    added = model.extract(data["harmful"], "text-only", refusal_prompt=True, all_layers=True)[:, 1:] - plain
    for block, v in enumerate(vectors):
        spread = safe[:, block].numpy() - safe[:, block].numpy().mean(0)
        values, directions = np.linalg.eigh(spread.T @ spread)
        main = torch.from_numpy(directions[:, values.argsort()[-k:]].copy()).float()  # [hidden, k]
        mean = added[:, block].mean(0)
        assert torch.allclose(v, mean - main @ (main.T @ mean), atol=1e-4)
    questions = data["benign"][:3]
    before = model.extract(questions, "text-only", all_layers=True)
    with baselines.steered(model, {"text-only": vectors}, 0.1, "text-only"):
        after = model.extract(questions, "text-only", all_layers=True)
        assert model.generate(questions, "text-only", max_new_tokens=3)
    assert torch.allclose(after[:, 1] - before[:, 1], 0.1 * vectors[0].expand(3, -1), atol=1e-5)
    assert torch.equal(after[:, 0], before[:, 0])
    assert torch.equal(model.extract(questions, "text-only", all_layers=True), before)


def test_merit_is_refusals_within_the_budgets():
    def merit(harmful, over):
        answers = {"harmful": Rate(harmful, 10, harmful / 10), "chat": Rate(5, 10, 0.5), "degenerate": Rate(0, 20, 0.0)}
        point = Point(1.0, {}, 0.0, 0.0, answers)
        return compare.merit(Calibration({"chat": 0.02, "degenerate": 0.01}, point, [point], point, over))

    found = [merit(9, 0.5), merit(9, 0.03), merit(3, 0.02), merit(2, 0.0), merit(8, -0.01)]
    assert found == sorted(found)  # what is beyond the budgets comes before what is within
    assert found[0] == (False, -0.5)
    assert found[-1] == (True, 0.8)


# -- ablation.py


def test_auc_counts_every_pair():
    above, below = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 0.0, 3.0])
    pairs = [(a > b) + (a == b) / 2 for a in above.tolist() for b in below.tolist()]
    assert ablation.auc(above, below) == pytest.approx(sum(pairs) / len(pairs))
    assert ablation.auc(torch.arange(1e5), torch.arange(1e5)) == pytest.approx(0.5)  # no matrix of 10^10 pairs


def twins(n):
    """Harmful and benign questions that name each other, with groups."""
    data = [{**row, "group": "harmful"} for row in rows("harmful", n)]
    data += [{**row, "group": ("twins", "everyday")[i % 2]} for i, row in enumerate(rows("benign", n))]
    return {side: load_examples(data, side) for side in ("harmful", "benign")}


def test_separation_counted_by_hand():
    model, groups = tiny(replace(CONFIG, refusal="S")), sides(5, 9)
    (token,), leads = model.token_ids("S"), {}
    for group, examples in groups.items():
        logits = model.location.head(model.extract(examples, "text-only"))
        others = torch.cat([logits[:, :token], logits[:, token + 1 :]], 1)
        leads[group] = (logits[:, token] - others.max(1).values).tolist()
    pairs = [(h > b) + (h == b) / 2 for h in leads["harmful"] for b in leads["benign"]]
    found = ablation.separation(model, groups, ("text-only",))
    assert found == {"benign": pytest.approx(sum(pairs) / len(pairs))}
    assert 0 < found["benign"] < 1


def test_rows_train_and_go_on(tmp_path, monkeypatch):
    model, test = tiny(replace(CONFIG, refusal="I can't", keep_tokens=2)), sides(2, 9)
    names = ["base", "paper", "keep/KL", "twins", "rate/×2"]
    chosen = ablation.rows_for(names)
    assert [*chosen][:3] == ["base", "paper/as published", "paper/first token"]

    def run(which):
        return ablation.ablate(model, which, twins(4), test, test, tmp_path, max_new_tokens=2, budget=1.0)

    run({name: chosen[name] for name in list(chosen)[:2]})
    done = run(chosen)
    assert [r["name"] for r in done] == [*chosen]
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(chosen)
    assert all(r["kl"] > 0 and 0 <= r["auc"]["benign"] <= 1 for r in done)
    assert len({r["kl"] for r in done}) == len(done)  # each is another adapter
    assert (tmp_path / "table.md").read_text().count("\n| ") == len(chosen) + 2  # below the head: rule, vanilla, rows
    monkeypatch.setattr(model, "train", None)
    assert run(chosen) == done  # nothing is trained again
    assert model.config.refusal == "I can't"
    with pytest.raises(SystemExit, match="nowhere"):
        ablation.rows_for(["nowhere"])


def test_what_rows_train_on():
    model, data = tiny(replace(CONFIG, top=100.0)), twins(4)
    given = (model, data["harmful"], data["benign"], "text-only", contribution)
    plain = ablation.plain(*given)
    fewer = ablation.without_twins(*given)
    assert [i.example.id for i in fewer if i.example.label == "benign"] == ["benign-1", "benign-3"]
    weights = {i.example.id: i.weight for i in ablation.weighted(*given, group="everyday", weight=3.0)}
    assert weights == {i.example.id: 3.0 if i.example.id in ("benign-1", "benign-3") else 1.0 for i in plain}
    r_h, r_b = (model.extract(data[side], "text-only") for side in ("harmful", "benign"))
    items = ablation.harmful_minus_benign(*given)
    delta = r_h.mean(0) - r_b.mean(0)
    goals = torch.cat([r_h + delta, r_b - delta])
    assert torch.allclose(torch.stack([i.target[0] for i in items]), goals, atol=1e-5)
    first = ablation.config_of(model, replace(CONFIG, refusal="I can't"), ablation.ROWS["paper/as published"])
    assert first == replace(CONFIG, refusal="I")
    words = (*model.token_ids("I can't"),)
    plain = [
        replace(i, suffix=words, target=i.target.repeat(1 + len(words), 1)) if n < 4 else i for n, i in enumerate(plain)
    ]
    prompts = [model.read(i.example, "text-only").extended(i.suffix) for i in plain]
    harmful = slice(len(data["harmful"]))  # without a benign input, the same as the method's own, along all words
    with torch.no_grad():
        ours = ablation.held_by_kl(2.0)(model.reader, prompts, plain)
        assert torch.allclose(ours[harmful], to_targets(model.reader, prompts, plain)[harmful], atol=1e-6)
        p, q = (model.reader.logits(h).log_softmax(-1) for h in (goals_of(plain)[4:], r_b))
    assert torch.allclose(ours[4:], 2 * (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-5)


def goals_of(items):
    return torch.stack([item.target[0] for item in items])


def test_chance_keeps_as_many():
    delta, row = torch.randn(2, 64, generator=torch.Generator().manual_seed(1))
    scores = ablation.chance(delta, row)
    assert (scores > 0).sum() == (contribution(delta, row) > 0).sum()
    assert not torch.equal(scores > 0, contribution(delta, row) > 0)


# -- transfer.py


def power(x: np.ndarray) -> float:
    return float(np.mean(np.square(x, dtype=np.float64)))


def peak(wave: np.ndarray) -> float:
    """The loudest frequency in Hz."""
    return float(np.abs(np.fft.rfft(wave)).argmax() * transfer.RATE / len(wave))


def test_clips_are_changed_as_it_says():
    wave, speech = tone(1.0, 0), tone(0.25, 4)
    before = wave.copy()
    for snr in (20, 10, 5):
        noise = transfer.noisy(wave, snr) - wave
        assert 10 * np.log10(power(wave) / power(noise)) == pytest.approx(snr, abs=0.01)
    for factor in (1.2, 0.8):
        quick = transfer.faster(wave, factor)
        assert len(quick) == pytest.approx(len(wave) / factor, abs=1)
        assert peak(quick) == pytest.approx(factor * peak(wave), rel=0.01)
    t = np.arange(transfer.RATE) / transfer.RATE
    low, middle, high = (np.sin(2 * np.pi * f * t).astype(np.float32) for f in (100, 1000, 5000))
    assert np.allclose(transfer.band_passed(low + middle + high), middle, atol=1e-4)
    longer = transfer.preceded(wave, speech)
    assert np.array_equal(longer[: len(speech)], speech)
    assert np.array_equal(longer[-len(wave) :], wave)
    assert len(longer) == len(wave) + len(speech) + 0.3 * transfer.RATE
    for name, change in transfer.CLIPS.items():
        assert change(wave, wave).dtype == np.float32, name
    assert np.array_equal(wave, before)


@pytest.mark.parametrize(
    ("container", "codec", "least"), [("OGG", "OPUS", 5), ("OGG", "VORBIS", 10), ("WAV", "ULAW", 25)]
)
def test_codecs_keep_the_length_and_lose_something(container, codec, least):
    wave = tone(1.0, 2)
    again = transfer.coded(wave, container, codec)
    assert again.shape == wave.shape
    kept = 10 * np.log10(power(wave) / power(again - wave))
    assert least < kept < 60


def test_changed_examples_stay_the_same_question():
    example = load_examples(rows("benign", 1))[0]
    for name in (*transfer.CLIPS, *transfer.FRAMES):
        other = transfer.changed(example, name, tone(0.2, 6))
        assert (other.id, other.label, other.cluster) == (example.id, example.label, example.cluster)
        assert (other.audio_hash != example.audio_hash) == (name in transfer.CLIPS)
        assert (other.text != example.text) == (name in transfer.FRAMES)
    for name in transfer.FRAMES:
        framed = transfer.framed("How do I bake bread?", name)
        assert "How do I bake bread" in framed or framed == "how do i bake bread"


def test_one_report_of_all_changes_goes_on_where_it_stopped(tmp_path, monkeypatch):
    data = sides(4)
    model = tiny().train(tiny().prepare(data["harmful"], data["benign"], "text-only").items)
    test = {}
    for side in ("harmful", "benign"):
        data = [{**row, "voice": v} for row, v in zip(rows(side, 2, 50), "ab", strict=True)]
        test[side] = load_examples([*data, {"id": "typed", "text": "Why?"}])
    names = ("clean", "prefilled", "noise 5 dB", "role play")

    def run():
        return transfer.transfer(model, test, tone(0.2, 7), tmp_path, names=names, max_new_tokens=2)

    report = run()
    spoken = ("clean", "voice a", "voice b", "prefilled", "noise 5 dB")
    assert {a.condition for a in report.answers} == {
        *(f"{c}, {name}" for c in ("audio-text", "audio-only") for name in spoken),
        *(f"text-only, {name}" for name in ("clean", "prefilled", "role play")),
    }
    counts = {row["condition"]: row["refused"]["before"]["n"] for row in report.rows() if row["harmful"]}
    assert counts["audio-only, noise 5 dB"] == 2
    assert counts["audio-only, voice a"] == 1
    assert counts["text-only, role play"] == 3
    assert [a.response for a in Report.load(tmp_path).answers] == [a.response for a in report.answers]
    monkeypatch.setattr(model.model, "generate", None)  # nothing is answered again
    assert [a.key for a in run().answers] == [a.key for a in report.answers]
    typed = {"harmful": load_examples(["Why?"], "harmful")}
    with pytest.raises(SystemExit, match=r"None of the changes \['opus'\] applies"):
        transfer.transfer(model, typed, tone(0.2, 7), tmp_path, names=["opus"])


def test_a_change_leaves_out_what_the_model_can_not_hear(tmp_path):
    """The tiny model hears 2 s, and a slower clip is longer."""
    data = sides(4)
    model = tiny().train(tiny().prepare(data["harmful"], data["benign"], "text-only").items)
    clips = [
        {
            "id": str(seconds),
            "text": f"{seconds}?",
            "audio": {"array": tone(seconds, 3), "sampling_rate": transfer.RATE},
        }
        for seconds in (0.5, 1.9)
    ]
    test = {"harmful": load_examples(clips, "harmful")}
    with pytest.warns(RRSWarning, match=r"(?s)1 of 2 examples can't be read:.*1\.9.*They are left out"):
        report = transfer.transfer(model, test, tone(0.2, 7), tmp_path, names=["20% slower"], max_new_tokens=2)
    assert {a.id for a in report.answers} == {"0.5"}
    assert not any("made to begin" in note for note in report.notes)  # no answer was


# -- tune.py


def test_the_search_goes_on_and_keeps_the_best(tmp_path):
    optuna = pytest.importorskip("optuna")
    import tune

    model, train_, dev = tiny(), sides(4), sides(3, 40)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def judge(_prompts, answers):
        return ["refusal" if sum(map(ord, a)) % 3 == 0 else "compliance" for a in answers]

    for trials in (1, 3, 3):
        best = tune.tune(model, train_, dev, study, trials, tmp_path, judge=judge, budget=1.0, max_new_tokens=2)
        assert len(study.trials) == trials
    assert model.config == CONFIG
    assert best.value == max(t.value for t in study.trials) == best.user_attrs["harmful"]
    saved = json.loads((tmp_path / "adapter" / "rrs.json").read_text())["config"]
    assert {name: saved[name] for name in best.params} == best.params


# -- benchmark.py and count.py


def test_both_sides_have_the_same_losses(tmp_path):
    setting = benchmark.Setting("tiny", torch.device("cpu"), tmp_path, n=16, epochs=3)
    losses, seconds = zip(
        *(benchmark.timed_fit(name, setting, *setting.load()) for name in benchmark.FITS), strict=True
    )
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-2)  # they move
    assert [len(s) for s in seconds] == [7, 7]  # extraction, and six steps
    assert min(map(min, seconds)) > 0


def test_sizes_are_those_of_the_checkpoints():
    text = Qwen2_5OmniThinkerConfig().text_config  # whose defaults are the 7B model's
    assert {name: getattr(text, name) for name in benchmark.SIZES["omni-7b"]["text"]} == benchmark.SIZES["omni-7b"][
        "text"
    ]


def test_bytes_that_are_alive():
    there = torch.empty(100, device="meta")
    with count.Peak() as peak:
        x = there.view(10, 10) + 1  # 400 bytes; `there` was there before
        y = x * 2
        assert (peak.now, peak.most) == (800, 800)
        del x
        assert peak.now == 400
        y.add_(1)
        assert (y[0].shape, peak.now, peak.most) == ((10,), 400, 800)
    flops, most = count.counted(lambda: torch.empty(3, 5, device="meta") @ torch.empty(5, 7, device="meta"))
    assert (flops, most) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 21))


def test_counted_steps_lie_between_the_floor_and_the_recipe(monkeypatch):
    monkeypatch.setattr(count, "SECONDS", (0.5, 0.5))
    monkeypatch.setattr(count, "MANY", (0.5,) * 128)
    case = count.Case("tiny")
    tokens = 18 + 2 * (12 + 22)  # common beginning once, then audio and what follows, for each
    assert case.floor_of_step([case.frames] * 2) == 4 * case.weights * tokens * 2
    assert case.floor_of_step(case.grouped) == 4 * case.weights * (18 + 4 * (12 + 22)) * 2
    lines = [line.strip("| ").split(" | ") for line in count.table(["tiny"]).splitlines()[2:6]]
    names = ("floor", "ours", count.FEWER, "the recipe's")
    assert [line[0] for line in lines] == [f"tiny, {name}" for name in names]
    for column in (2, 5):  # how far each is from the floor, in a step and in extraction
        ours, grouped, theirs = (float(line[column]) for line in lines[1:])
        # all clips are of one length here; four in a batch share their beginning, two do as well
        assert 1 < grouped <= ours < theirs


def test_the_figures_of_an_update_do_not_depend_on_its_scale_alone():
    """A penalty far above the objective holds the update; the weights' own size is taken out of both."""
    examples = load_examples(rows("harmful", 8)), load_examples(rows("benign", 8))
    free, held = (scaling.trained(64, 2, 4e-3, kappa, examples) for kappa in (0.0, 1e5))
    assert [*free[:4], *held[:4]] == ["64", "2", "0.004", "0", "64", "2", "0.004", "100000"]
    assert float(held[4]) < 0.5 * float(free[4])
    assert float(free[5]) < float(held[5]) < 1.2


def test_train_demo_finds_its_names():
    """It made the demo's projector; nothing runs it any more."""
    pytest.importorskip("scipy")
    import train_demo

    assert train_demo.LoRA is LoRA
