"""`examples/extend.py`: every recipe gives the right value on a tiny model, and is at most ten lines."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import extend
import pytest
import torch
from conftest import rows, tiny_qwen2_audio

from rrs import RRS, RRSConfig, load_examples, to_targets
from rrs.data import user_turn
from rrs.evaluate import Report, first_token_change, judge_refusals
from rrs.hooks import capture

pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
STRONG = {"epochs": 8, "penalty": 0.0, "learning_rate": 1e-2, "lora_r": 4, "lora_dropout": 0.0, "top": 25}
STRONG |= {"prompts": (RRSConfig.instruction,), "harmful_strength": 4.0, "benign_strength": 4.0}
HARMFUL, BENIGN = (load_examples(rows(label, 6), label) for label in ("harmful", "benign"))
SPOKEN = "audio-text"


@pytest.fixture
def model() -> RRS:
    return RRS(*tiny_qwen2_audio(layers=3), RRSConfig(**STRONG), verbose=False)


def inputs(model, example, condition=SPOKEN, refusal_prompt=""):
    """The model's own, unpadded inputs for one example."""
    wave = None if condition.startswith("text") else example.audio["array"]
    return model.render(user_turn(example, condition, model.config.instruction, refusal_prompt), wave)


@torch.no_grad()
def every_layer(model, example, **kwargs):
    """`[blocks + 1, hidden]` at the last token, by transformers alone."""
    last = f"{model.location.layers_path}.{len(model.location.layers) - 1}"  # output_hidden_states norms this one
    with capture(model.model, last, position=-1) as record:
        out = model.model(**inputs(model, example, **kwargs), output_hidden_states=True)
    return torch.stack([*(h[0, -1] for h in out.hidden_states[:-1]), record[last][0][0]])


def at_end(model, examples, condition=SPOKEN):
    """h(x) of the model as it is now, `[n, hidden]`."""
    return model.reader.represent([model.read(e, condition) for e in examples])


def test_recipes_are_short():
    tree = ast.parse(Path(extend.__file__).read_text(encoding="utf-8"))
    for node in [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name != "main"]:
        first = node.body[1]  # behind the docstring
        assert node.body[-1].end_lineno - first.lineno < 10 + 2 * any(
            isinstance(n, ast.FunctionDef) for n in node.body
        ), node.name


def test_separation_by_layer(model):
    mixed = [HARMFUL[3], BENIGN[0], HARMFUL[0], BENIGN[5], HARMFUL[5]]  # lengths neither rise nor fall
    vectors = torch.stack([every_layer(model, e) for e in mixed])
    torch.testing.assert_close(model.extract(mixed, SPOKEN, all_layers=True), vectors, rtol=1e-4, atol=1e-4)

    h, b = (torch.stack([every_layer(model, e) for e in side]) for side in (HARMFUL, BENIGN))
    spread = (h.var(0, correction=0).sum(-1) + b.var(0, correction=0).sum(-1)) / 2  # six each
    wanted = (h.mean(0) - b.mean(0)).norm(dim=-1) / spread.sqrt()
    assert wanted.shape == (4,)
    torch.testing.assert_close(
        extend.separation_by_layer(model, HARMFUL, BENIGN, SPOKEN)[1:], wanted[1:], rtol=1e-3, atol=1e-3
    )


def test_refusal_steering(model):
    delta = torch.stack([every_layer(model, e, refusal_prompt=model.config.refusal_prompt) for e in HARMFUL]).mean(0)
    delta = delta - torch.stack([every_layer(model, e) for e in BENIGN]).mean(0)
    before = model.extract(BENIGN, SPOKEN, all_layers=True)
    with extend.refusal_steering(model, HARMFUL, BENIGN, SPOKEN, block=1, scale=2.0):
        steered = model.extract(BENIGN, SPOKEN, all_layers=True)
        answers = model.generate(BENIGN, SPOKEN, max_new_tokens=4)
    torch.testing.assert_close(steered[:, :2], before[:, :2], rtol=1e-4, atol=1e-4)  # below block 1
    torch.testing.assert_close(steered[:, 2], before[:, 2] + 2 * delta[2], rtol=1e-4, atol=1e-3)
    assert (steered[:, 3] - before[:, 3]).norm() > 1
    block = model.location.layers[1]  # by hand: the prompt's last token, and no generated one
    for example, answer in zip(BENIGN, answers, strict=True):

        def add(_module, _args, out):
            if out.shape[1] > 1:
                out[:, -1] += 2 * delta[2]
            return out

        handle, own = block.register_forward_hook(add), inputs(model, example)
        ids = model.model.generate(**own, do_sample=False, max_new_tokens=4)[0, own["input_ids"].shape[1] :]
        handle.remove()
        assert model.tokenizer.decode(ids, skip_special_tokens=True).strip() == answer
    torch.testing.assert_close(model.extract(BENIGN, SPOKEN, all_layers=True), before, rtol=0, atol=0)


def test_by_size(model):
    direction = model.fit(HARMFUL, BENIGN, preflight=0, scorer=extend.by_size).directions[SPOKEN]
    assert direction.mask.sum() == 8  # 25% of 32
    assert direction.delta[direction.mask].abs().min() > direction.delta[~direction.mask].abs().max()


def test_cosine(model):
    items = model.prepare(HARMFUL, BENIGN, SPOKEN).items
    targets, start = torch.stack([i.target[0] for i in items]), model.extract(HARMFUL + BENIGN, SPOKEN)
    objective = partial(to_targets, distance=extend.cosine)
    wanted = 1 - (start * targets).sum(-1) / (start.norm(dim=-1) * targets.norm(dim=-1))
    found = objective(model.reader, [model.read(i.example, SPOKEN) for i in items], items)
    torch.testing.assert_close(found.detach(), wanted, rtol=1e-3, atol=1e-5)
    model.train(items[:6], objective=objective)
    assert extend.cosine(at_end(model, HARMFUL), targets[:6]).mean() < 0.5 * wanted[:6].mean()


def test_to_one_place(model):
    items = extend.to_one_place(model, HARMFUL, BENIGN, SPOKEN)
    prompt = model.config.refusal_prompt
    place = torch.stack([every_layer(model, e, refusal_prompt=prompt)[-1] for e in HARMFUL])
    place = model.location.norm(place).mean(0).detach()  # a mean of what the head multiplies
    stay = at_end(model, BENIGN)
    torch.testing.assert_close(torch.cat([i.target for i in items]), torch.cat([place.expand(6, -1), stay]))
    far, apart = ((side - place).norm(dim=-1) for side in (at_end(model, HARMFUL), stay))
    model.train(items)
    assert (at_end(model, HARMFUL) - place).norm(dim=-1).mean() < 0.5 * far.mean()
    assert (at_end(model, BENIGN) - stay).norm(dim=-1).mean() < 0.5 * apart.mean()


def test_with_benign_kl(model):
    prompts = [model.read(e, SPOKEN) for e in HARMFUL + BENIGN]
    vanilla, means = model.reader.represent(prompts), {}
    for weight in (0.0, 100.0):
        model.fit(HARMFUL, BENIGN, preflight=0, objective=extend.with_benign_kl(model, weight))
        kl, _ = first_token_change(model.reader, vanilla[6:], at_end(model, BENIGN))
        means[weight] = float(kl.mean())
    assert means[100.0] < 0.1 * means[0.0]
    # on the last adapter: the term is that of transformers' own logits, and nothing but it reaches benign inputs
    items = model.prepare(HARMFUL, BENIGN, SPOKEN).items
    extra = (
        extend.with_benign_kl(model, 2.0)(model.reader, prompts, items) - to_targets(model.reader, prompts, items)
    ).detach()
    assert torch.equal(extra[:6], torch.zeros(6))
    for example, found in zip(BENIGN, extra[6:], strict=True):
        with torch.no_grad():
            q = model.model(**inputs(model, example)).logits[0, -1].log_softmax(-1)
            with model.disabled():
                p = model.model(**inputs(model, example)).logits[0, -1].log_softmax(-1)
        assert float(found) == pytest.approx(2 * float((p.exp() * (p - q)).sum()), rel=1e-2, abs=1e-5)


def test_a_further_term_of_weight_0_changes_nothing(model):
    """Taking the adapter off within the loss does not disturb its gradients."""
    adapters = []
    for objective in (to_targets, extend.with_benign_kl(model, 0.0)):
        model.fit(HARMFUL, BENIGN, preflight=0, objective=objective)
        adapters.append(model.lora.tensors())
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-5)


def test_a_resumed_run_knows_another_weight(model, tmp_path):
    model.fit(HARMFUL, BENIGN, preflight=0, objective=extend.with_benign_kl(model, 0.1), checkpoint_dir=tmp_path)
    again = partial(model.fit, HARMFUL, BENIGN, preflight=0, checkpoint_dir=tmp_path, resume=True)
    again(objective=extend.with_benign_kl(model, 0.1))
    with pytest.raises(ValueError, match="another run"):
        again(objective=extend.with_benign_kl(model, 0.2))


def test_few_modules(model):
    seen = []

    def note(step):
        updates = [model.lora.scale * b @ a for a, b in zip(model.lora.A, model.lora.B, strict=True)]
        seen.append(sum(float(torch.linalg.matrix_norm(u)) for u in updates))

    model.fit(HARMFUL, BENIGN, preflight=0, penalty=extend.few_modules, callbacks=[note])
    assert [row["penalty"] for row in model.history[1:]] == pytest.approx(seen[:-1], rel=1e-4)
    without = seen[-1]
    model.config.penalty = 10.0
    model.fit(HARMFUL, BENIGN, preflight=0, penalty=extend.few_modules, callbacks=[note])
    assert seen[-1] < 0.5 * without


def test_stop_when_refusing(model):
    items = model.prepare(HARMFUL, BENIGN, SPOKEN).items[:6]
    towards = model.head_row(model.refusal_token)  # far along it, the first choice is the refusal token
    items = [replace(item, target=item.target + 20 * towards / towards.norm()) for item in items]
    shares = []

    def note(_step):
        ids = [model.model(**inputs(model, e)).logits[0, -1].argmax().item() for e in HARMFUL]
        shares.append(ids.count(model.refusal_token) / 6)

    model.train(items, callbacks=[note])
    first = next(i for i, share in enumerate(shares, 1) if share >= 0.5)
    model.train(items, callbacks=[extend.stop_when_refusing(HARMFUL, SPOKEN, 0.5)])
    assert 1 < len(model.history) == first < len(shares)


def test_overlap_after_loading(model, tmp_path):
    model.config = RRSConfig(**{**STRONG, "epochs": 1}, conditions=(SPOKEN, "text-only"))
    model.fit(HARMFUL, BENIGN, preflight=0).save(tmp_path / "adapter")
    a, b = (model.directions[c] for c in (SPOKEN, "text-only"))
    kept = [{i for i in range(32) if d.mask[i]} for d in (a, b)]
    wanted = {
        "cosine": float(a.delta @ b.delta / (a.delta.norm() * b.delta.norm())),
        "masks": len(kept[0] & kept[1]) / len(kept[0] | kept[1]),
    }
    loaded = RRS.load(tmp_path / "adapter", *tiny_qwen2_audio(layers=3), verbose=False)
    assert extend.overlap(loaded, SPOKEN, "text-only") == pytest.approx(wanted, rel=1e-5)


def test_opens_with_no_and_answers_in_a_file(tmp_path):
    """Without any model."""
    said = [("harmful", "No."), ("harmful", "Sure, first"), ("benign", "I can't say."), ("benign", "Paris.")]
    lines = [{"question": f"q{i}", "response": r, "label": label} for i, (label, r) in enumerate(said)]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, lines)))
    report = Report.from_jsonl(tmp_path / "answers.jsonl", judge=extend.opens_with_no)
    assert [a.verdict for a in report.answers] == ["refusal", "compliance"] * 2
    assert [report.rate(group).value for group in ("harmful", "benign")] == [0.5, 0.5]
    assert report.rejudge(lambda p, r: ["partial"] * len(r)).rate("benign").value == 1
    with pytest.raises(ValueError, match="REFUSAL"):
        report.rejudge(lambda p, r: ["REFUSAL"] * len(r))


def test_peft_report(model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    groups = {"harmful": HARMFUL, "benign": BENIGN}
    model.fit(HARMFUL, BENIGN, preflight=0).save(tmp_path / "adapter")
    wanted = {}
    for stage in ("adapter", "base"):
        wanted |= {(g, stage): model.generate(e, SPOKEN) for g, e in groups.items()}
        model.disable()
    assert wanted["harmful", "adapter"] != wanted["harmful", "base"]
    theirs = PeftModel.from_pretrained(tiny_qwen2_audio(layers=3)[0], str(tmp_path / "adapter"))
    report = extend.peft_report(theirs, model.processor, groups, [SPOKEN])
    for key, answers in wanted.items():
        assert [a.response for a in report.answers if (a.group, a.stage) == key] == answers, key
        questions = [e.text for e in groups[key[0]]]
        refused = [v == "refusal" for v in judge_refusals(questions, answers)]
        assert report.rate(key[0], SPOKEN, key[1], ["refusal"]).k == sum(refused)

    # an adapter in the audio tower, too
    torch.manual_seed(0)
    settings = LoraConfig(target_modules=["q_proj", "fc1"], init_lora_weights=False, lora_alpha=32)
    other = get_peft_model(tiny_qwen2_audio(layers=3)[0], settings)
    report = extend.peft_report(other, model.processor, {"benign": BENIGN}, [SPOKEN])
    own = []
    for example in BENIGN:
        given = inputs(model, example)
        ids = other.generate(**given, do_sample=False, max_new_tokens=128)[0, given["input_ids"].shape[1] :]
        own.append(model.tokenizer.decode(ids, skip_special_tokens=True).strip())
    assert [a.response for a in report.answers if a.stage == "adapter"] == own
    assert [a.response for a in report.answers if a.stage == "base"] == wanted["benign", "base"]


def test_own_generate_report():
    given = []

    def generate(text, audio):
        given.append((text, audio))
        return "I'm sorry, I can't help with that." if str(text).startswith("harmful") else "It is a lake in the north."

    report = extend.own_generate_report(generate, {"harmful": HARMFUL, "benign": BENIGN}, "text-only")
    assert (report.rate("harmful").value, report.rate("benign").value) == (1.0, 0.0)
    assert given == [(e.text, None) for e in (*HARMFUL, *BENIGN)]
    for condition, text in ((SPOKEN, RRSConfig().instruction), ("audio-only", None)):
        given.clear()
        extend.own_generate_report(generate, {"harmful": HARMFUL}, condition)
        assert given == [(text, e.audio) for e in HARMFUL]


def test_all_of_it_runs(monkeypatch, capsys):
    monkeypatch.setattr(extend, "load_demo", tiny_qwen2_audio)
    extend.main()
    said = capsys.readouterr().out
    assert "Refused" in said
    kl = [float(line.rpartition(" ")[2]) for line in said.splitlines() if line.startswith("benign KL")]
    assert len(kl) == 2
    assert kl[1] < kl[0]
