"""Adapters on disk: PEFT's format, the same after loading, complete or not at all, and damage is noticed."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from conftest import rows, tiny_qwen2_audio
from safetensors.torch import load_file, save_file

import rrs
from rrs import RRS, RRSConfig, RRSWarning, fingerprint, pack, read_adapter, unpack, write_files
from rrs.data import load_examples
from rrs.hooks import linear_paths

pytestmark = pytest.mark.filterwarnings("ignore:Only 6 harmful:rrs.RRSWarning")
THREE = ("audio-text", "text-only", "audio-only")
HARMFUL, BENIGN = rows("harmful", 6), rows("benign", 5)


def fit(**config):
    sizes = {"epochs": 1, "batch_size": 3, "learning_rate": 1e-2, "penalty": 1e-3, "lora_r": 4}
    config = RRSConfig(**{**sizes, **config})
    return RRS(*tiny_qwen2_audio(), config, verbose=False).fit(HARMFUL, BENIGN, preflight=0)


@pytest.fixture(scope="module")
def fitted():
    return fit(conditions=THREE)


def logits(model):
    """Of the whole model on the processor's inputs of one spoken question."""
    r = RRS(*tiny_qwen2_audio(), verbose=False)
    return model(**r.render(r.config.instruction, load_examples(HARMFUL)[0].clip[1](16000))).logits


def load(folder, **kwargs):
    return RRS.load(folder, *tiny_qwen2_audio(**kwargs), verbose=False)


def test_saved_and_loaded_is_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.config == fitted.config
    for condition in THREE:
        a, b = (r.extract(HARMFUL, condition, vanilla=False) for r in (fitted, loaded))
        assert torch.equal(a, b)
    record = json.loads((tmp_path / "adapter" / "rrs.json").read_text())
    assert record["base"]["class"] == "Qwen2AudioForConditionalGeneration"
    assert len(record["history"]) == len(fitted.history)
    assert loaded.history == fitted.history
    assert loaded.record == json.loads(json.dumps(fitted.record))


def test_directions_are_saved_and_can_be_compared(fitted, tmp_path):
    fitted.save(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    assert loaded.directions.keys() == set(THREE)
    for condition, direction in loaded.directions.items():
        assert all(map(torch.equal, direction, fitted.directions[condition]))
        assert torch.equal(direction.move, direction.delta * direction.mask)
    spoken, written = (loaded.directions[c].delta for c in ("audio-text", "text-only"))
    r_b, r_plus = (
        [r.mean(0) for r in (loaded.extract(x, c, refusal_prompt=x is HARMFUL) for c in ("audio-text", "text-only"))]
        for x in (BENIGN, HARMFUL)
    )
    by_hand = torch.cosine_similarity(r_plus[0] - r_b[0], r_plus[1] - r_b[1], dim=0)
    assert torch.cosine_similarity(spoken, written, dim=0) == pytest.approx(float(by_hand), abs=1e-5)
    assert not torch.allclose(spoken, written)


# -- PEFT


def test_peft_reads_the_adapter(fitted, tmp_path):
    """The format is PEFT's: its logits equal ours, and not one module of the tower is touched."""
    fitted.save(tmp_path / "adapter")
    ours = logits(fitted.model)
    model = peft.PeftModel.from_pretrained(tiny_qwen2_audio()[0], tmp_path / "adapter").eval()
    assert torch.allclose(logits(model), ours, atol=1e-6)
    wrapped = [name for name, m in model.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == len(fitted.lora.paths)
    assert all("audio_tower" not in name for name in wrapped)
    model.save_pretrained(tmp_path / "again")  # whose target_modules may be shortened to the ends of paths
    edit(tmp_path / "again", target_modules=["q_proj", "layers.1.mlp.up_proj"])
    loaded = load(tmp_path / "again")
    assert loaded.lora.paths == fitted.lora.paths
    assert torch.equal(logits(loaded.model), ours)
    assert (loaded.history, loaded.directions, loaded.config) == ([], {}, RRSConfig())


def edit(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def by_peft(tmp_path):
    """A folder that PEFT wrote, its logits, and how to make one with other settings."""

    def make(**settings):
        torch.manual_seed(0)
        base, _ = tiny_qwen2_audio()
        paths = linear_paths(rrs.locate(base), ("q_proj", "down_proj"))
        adapter = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": paths, **settings}
        model = peft.get_peft_model(base, peft.LoraConfig(**adapter)).eval()
        model.save_pretrained(tmp_path / "peft")
        return tmp_path / "peft", logits(model)

    return make


@pytest.mark.parametrize("rslora", [False, True])
def test_adapters_by_peft_have_the_same_logits(by_peft, rslora):
    folder, theirs = by_peft(use_rslora=rslora)
    loaded = load(folder)
    assert loaded.lora.scale == pytest.approx(6 / (2 if rslora else 4))
    assert torch.allclose(logits(loaded.model), theirs, atol=1e-5)
    assert not torch.allclose(logits(loaded.disable().model), theirs, atol=1e-2)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"q_proj": 32}}, {"use_dora": True}, {"bias": "all"},
        {"modules_to_save": ["lm_head"]}, {"lora_bias": True}, {"peft_type": "IA3"}, {"use_of_a_future": "PEFT"},
        {"fan_in_fan_out": True}, {"init_lora_weights": "pissa"}, {"trainable_token_indices": [3]},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_settings_that_change_what_an_adapter_computes_are_refused_by_name(by_peft, settings):
    folder, _ = by_peft()
    edit(folder, **settings)
    with pytest.raises(ValueError, match=rf"The adapter has {next(iter(settings))}=.* load it with PEFT"):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"r": 20_000_000}, r"ranks \[4\], its config says r=20000000"),
        ({"r": "4"}, "its config says r=4"),
        ({"lora_alpha": 1e999}, "lora_alpha=inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan"),
        ({"r": [4]}, r"its config says r=\[4\]"),
        ({"lora_alpha": "6"}, r"adapter_config\.json has lora_alpha='6'"),
        ({"lora_alpha": None}, "lora_alpha=None"),
        ({"lora_alpha": 10**400}, "lora_alpha=1000"),
        ({"lora_dropout": "a little"}, r"adapter_config\.json has lora_dropout='a little'"),
    ],
)
def test_numbers_in_the_settings_are_checked_before_memory_is_taken(by_peft, settings, words, monkeypatch):
    folder, _ = by_peft()
    edit(folder, **settings)
    monkeypatch.setattr(rrs, "LoRA", lambda *_, **__: pytest.fail("memory is taken"))
    with pytest.raises(ValueError, match=words):
        load(folder)


def test_nothing_is_left_on_a_model_where_the_canary_can_not_be_asked(fitted, tmp_path, monkeypatch):
    fitted.save(tmp_path / "adapter")
    model, processor = tiny_qwen2_audio()

    def unable(*_):
        raise TypeError("no audio")

    with monkeypatch.context() as patched:
        patched.setattr(RRS, "_acts", unable)
        with pytest.raises(TypeError, match="no audio"):
            RRS.load(tmp_path / "adapter", model, processor, verbose=False)
    RRS.load(tmp_path / "adapter", model, processor, verbose=False)  # there is room for it


WRONG = {
    "config": [[], "x", {"lora_r": "x"}, {"lora_r": 1.5}, {"instruction": 5}, {"system": []}, {"refusal": None},
               {"group_by_length": "no"}, {"betas": {"a": 1}}, {"penalty": 10**400}, {"conditions": 1}, {"top": [1]},
               {"direction": 3}, {"prompts": [1]}, {"layers": None}],
    "base": ["x", []], "data": [[]], "sha256": [[], "x", {"adapter_model.safetensors": []}], "preflight": ["x"],
    "history": ["x"], "canary": ["x"], "calibrated": ["x"], "template_kwargs": ["x", [1]], "scale": ["x", None],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_record_of_wrong_types_is_named_with_its_file(fitted, tmp_path, name):
    fitted.save(tmp_path / "a")
    path = tmp_path / "a" / "rrs.json"
    record = json.loads(path.read_text())
    for value in WRONG[name]:
        path.write_text(json.dumps({**record, name: value}))
        for use in (load, lambda folder: rrs.verify(folder, *tiny_qwen2_audio(), verbose=False)):
            with pytest.raises(ValueError, match=rf"{tmp_path / 'a'} is damaged .*(rrs\.json).*save or copy it again"):
                use(tmp_path / "a")
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"is damaged .*rrs\.json"):
        load(tmp_path / "a")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_adapters_with_nan_are_refused(by_peft, bad):
    folder, _ = by_peft()
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[3]
    tensors[name][0, 0] = bad
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"NaN or infinite numbers, in {name}"):
        load(folder)


# -- files


def test_saving_never_mixes_runs(fitted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        fitted.save(tmp_path / "full")
    assert (tmp_path / "full" / "other.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match=r"no part of an adapter: \['other.txt'\]"):  # nor is it deleted
        fitted.save(tmp_path / "full", overwrite=True)
    assert (tmp_path / "full" / "other.txt").read_text() == "mine"
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")  # the name of a file of ours does not make it an adapter
    with pytest.raises(FileExistsError, match=r"no part of an adapter: \['README.md'\]"):
        fitted.save(tmp_path / "notes", overwrite=True)
    assert (tmp_path / "notes" / "README.md").read_text() == "mine"
    fitted.save(tmp_path / "mine")
    (tmp_path / "mine" / "rrs.safetensors").write_bytes(b"stale")
    fitted.save(tmp_path / "mine", overwrite=True)
    assert load(tmp_path / "mine").lora.tensors().keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "mine", "notes"]  # no scratch folder left


def test_where_to_save_is_checked_before_training(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    r = RRS(*tiny_qwen2_audio(), RRSConfig(epochs=1, lora_r=2), verbose=False)
    fit_to = partial(r.fit, HARMFUL, BENIGN, preflight=0)
    with monkeypatch.context() as patch:
        patch.setattr(RRS, "prepare", lambda *_, **__: pytest.fail("work has begun"))
        for folder, words in (("full", "is not empty"), ("file", "is a file")):
            with pytest.raises(FileExistsError, match=words):
                fit_to(save_to=tmp_path / folder)
    fit_to(save_to=tmp_path / "new")
    assert torch.equal(load(tmp_path / "new").extract(HARMFUL, "audio-text"), r.extract(HARMFUL, "audio-text"))
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(rrs.FILES)


def test_a_save_that_is_broken_off_is_the_old_one_the_new_one_or_said(fitted, tmp_path, monkeypatch):
    """At each of its renames; and the next save may replace what is there."""
    other = fit(conditions=THREE, seed=1)
    other.lora.scale *= 2
    expected = {name: logits(r.model) for name, r in (("old", fitted), ("new", other))}
    directions = {name: r.directions for name, r in (("old", fitted), ("new", other))}
    replace, found, said = os.replace, [], []
    for first in (False, True):
        for at in range(5):
            folder, calls = tmp_path / f"{first}-{at}", []
            if not first:
                fitted.save(folder)

            def killed(a, b, at=at, calls=calls):
                calls.append(1)
                if len(calls) > at:
                    raise KeyboardInterrupt
                replace(a, b)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", killed)
                with pytest.raises(KeyboardInterrupt):
                    other.save(folder, overwrite=True)
            try:
                loaded = load(folder)
            except (ValueError, FileNotFoundError) as error:
                said.append(str(error))
            else:
                (name,) = [n for n, x in expected.items() if torch.equal(logits(loaded.model), x)]
                assert all(map(torch.equal, loaded.directions["text-only"], directions[name]["text-only"]))
                found.append(name)
            other.save(folder, overwrite=True)
            assert torch.equal(logits(load(folder).model), expected["new"])
            assert sorted(p.name for p in folder.iterdir()) == sorted(rrs.FILES)
    assert "old" in found
    assert all("save or copy it again" in x or "another scale" in x or "holds no adapter" in x for x in said)


def test_files_appear_complete_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / ".left.rrs-tmp").write_text("by a killed run")
    write_files(tmp_path, {"a": b"1", "b": b"2"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"1", "b": b"2"}
    order, replace, write = [], os.replace, Path.write_bytes
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    write_files(tmp_path, {"a": b"3", "b": b"4"})
    assert order == ["b", "a"]

    def full(path, content):
        write(path, content)
        if path.name == ".b.rrs-tmp":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"b can't be written \(No space left on device\); make room"):
        write_files(tmp_path, {"a": b"5", "b": b"6"})
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"3", "b": b"4"}


def test_what_is_packed_is_unpacked(tmp_path):
    tensors = {"a": torch.randn(3, 1), "b": torch.tensor([True, False]), "c": torch.tensor(2), "d": torch.empty(0, 4)}
    tensors["e"] = torch.randn(4, 3, dtype=torch.bfloat16).T.contiguous()
    (tmp_path / "x").write_bytes(pack(tensors, {"n": [1, "é"]}))
    found, record = unpack(tmp_path / "x")
    assert record == {"n": [1, "é"]}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())
    save_file({"a": tensors["a"]}, tmp_path / "plain")
    assert unpack(tmp_path / "plain")[1] is None  # others' files carry no checksum


def damage(path, positions, check):
    """Flips a bit at each position in turn."""
    whole = path.read_bytes()
    for k in positions:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 1 << k % 8]) + whole[k + 1 :])
        check(k)
    path.write_bytes(whole)


def test_one_flipped_bit_anywhere_in_a_packed_file_is_refused(tmp_path):
    """Or changes nothing: in the name of the checksum, which is then no checksum."""
    path = tmp_path / "x"
    path.write_bytes(pack({"a": torch.arange(4.0), "b": torch.ones(2)}, {"step": 1}))
    whole, record = unpack(path)
    refused = []

    def check(k):
        try:
            tensors, found = unpack(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert found == record
            assert tensors.keys() == whole.keys()
            assert all(torch.equal(tensors[name], whole[name]) for name in whole)

    size = len(path.read_bytes())
    damage(path, range(size), check)
    assert all("is damaged" in said for said in refused)
    assert len(refused) >= size - len("format") - len("pt") - len("sha256") - 8  # padding


def test_one_flipped_bit_anywhere_in_an_adapter_is_refused(fitted, tmp_path):
    fitted.save(tmp_path / "a")

    def check(k):
        with pytest.raises(ValueError, match="is damaged"):
            read_adapter(tmp_path / "a")

    for name in ("adapter_model.safetensors", "rrs.safetensors"):
        size = (tmp_path / "a" / name).stat().st_size
        damage(tmp_path / "a" / name, [*range(0, 300, 7), *range(300, size, size // 40), size - 1], check)


def test_one_flipped_bit_in_a_checkpoint_is_refused(tmp_path):
    r = RRS(*tiny_qwen2_audio(), RRSConfig(epochs=1, lora_r=2, conditions=("text-only",)), verbose=False)
    run = partial(r.fit, HARMFUL, BENIGN, preflight=0, checkpoint_dir=tmp_path)
    run()
    (path,) = tmp_path.glob("*step*")

    def check(k):
        with pytest.raises(ValueError, match=r"step-0.* is damaged .*Delete it to start anew"):
            run(resume=True)

    size = path.stat().st_size
    damage(path, [9, *range(size // 2, size, size // 9), size - 1], check)
    run(resume=True)


def test_a_scale_of_another_save_is_noticed(fitted, tmp_path):
    fitted.save(tmp_path / "a")
    edit(tmp_path / "a", lora_alpha=5.0)
    with pytest.raises(ValueError, match=r"adapter_config\.json has another scale than rrs\.json"):
        load(tmp_path / "a")
    edit(tmp_path / "a", lora_alpha=4.0, base_model_name_or_path="someone/model")  # which may be filled in
    assert load(tmp_path / "a").lora.scale == 1


def test_loading_errors(fitted, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no adapter"):
        load(tmp_path)
    fitted.save(tmp_path / "a")
    with pytest.warns(RRSWarning, match="another base"):
        load(tmp_path / "a", seed=1)
    weights = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(weights)
    deeper = {name.replace("layers.1.", "layers.7."): value for name, value in tensors.items()}
    save_file(deeper, weights)
    with pytest.raises(ValueError, match=r"damaged \(adapter_model\.safetensors, .*of another save than rrs\.json"):
        load(tmp_path / "a")
    (tmp_path / "a" / "rrs.json").unlink()
    with pytest.raises(ValueError, match=r"made for another base .*layers\.7"):
        load(tmp_path / "a")
    save_file({"x": torch.zeros(1)}, weights)
    with pytest.raises(ValueError, match=r"damaged \(adapter_model\.safetensors, .*no LoRA in it"):
        load(tmp_path / "a")


# -- which model it is


def test_a_fingerprint_goes_by_the_weights_and_not_by_their_dtype():
    model, _ = tiny_qwen2_audio()
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})  # both dtypes hold these
    whole = fingerprint(model)
    assert whole == fingerprint(model)
    assert fingerprint(model.bfloat16()) == whole
    assert fingerprint(tiny_qwen2_audio(seed=1)[0]) != whole


def swap_layers(model):
    layers = model.model.language_model.layers
    layers[0], layers[1] = layers[1], layers[0]


def edit_embedding(model):
    model.get_input_embeddings().weight[7] *= 1.01


def edit_head(model):
    model.lm_head.weight[7, 0] += 0.1


def edit_tower(model):
    model.model.audio_tower.layers[0].fc1.weight[0, 0] += 0.1


def edit_buffer(model):
    model.model.language_model.rotary_emb.inv_freq[1] *= 2


@pytest.mark.parametrize("change", [swap_layers, edit_embedding, edit_head, edit_tower, edit_buffer])
def test_a_fingerprint_tells_models_apart(change):
    model, _ = tiny_qwen2_audio()
    whole = fingerprint(model)
    with torch.no_grad():
        change(model)
    assert fingerprint(model) != whole


def test_a_fingerprint_is_the_bases(fitted):
    before = fingerprint(fitted.model)
    assert fitted.record["base"]["fingerprint"] == before
    with fitted.disabled():
        assert fingerprint(fitted.model) == before


def test_other_template_settings_than_in_training_are_said(tmp_path, harmful, benign):
    r = RRS(*tiny_qwen2_audio(), RRSConfig(epochs=1), verbose=False, template_kwargs={"enable_thinking": False})
    r.fit(harmful, benign, preflight=0).save(tmp_path / "a")
    assert RRS.load(tmp_path / "a", *tiny_qwen2_audio(), verbose=False).template_kwargs == {"enable_thinking": False}
    with pytest.warns(RRSWarning, match=r"was trained with template_kwargs=.*False.* not .*True"):
        RRS.load(tmp_path / "a", *tiny_qwen2_audio(), verbose=False, template_kwargs={"enable_thinking": True})
