"""Every public call leaves the user's model, processor and process as they were, also when it fails half-way."""

from __future__ import annotations

import copy
import random
import signal
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows, tiny_qwen2_audio

from rrs import RRS, RRSConfig, hooks, load_examples
from rrs.hooks import Reader, capture, steer

pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
CONFIG = {"epochs": 1, "lora_r": 2, "conditions": ("audio-text", "text-only"), "penalty": 1e-3, "learning_rate": 1e-2}
HOOKS = [n for n in vars(torch.nn.Module()) if n.endswith("_hooks")]


def snapshot(model, processor):
    """Everything that can be seen of model, processor and process; hashable parts compare by value."""
    tokenizer = processor.tokenizer
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": [(n, h, list(getattr(m, h))) for n, m in model.named_modules() for h in HOOKS],
        "forwards": [n for n, m in model.named_modules() if "forward" in vars(m)],
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "padding": (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id),
        "fast tokenizer": (str(tokenizer._tokenizer.padding), str(tokenizer._tokenizer.truncation)),
        "template": (processor.chat_template, tokenizer.chat_template),
        "extractor": copy.deepcopy(vars(processor.feature_extractor)),
        "rng": [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()],
        "cuda rng": [s.tolist() for s in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else [],
        "torch": (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()),
        "warnings": list(warnings.filters),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    }


def assert_unchanged(before, after):
    for key, value in before.items():
        if key == "weights":
            assert all(torch.equal(value[k], after[key][k]) for k in value.keys() | after[key].keys())
        else:
            assert np.array_equal(repr(value), repr(after[key])), key


HARMFUL, BENIGN = rows("harmful", 4), rows("benign", 4)
CALLS = {
    "RRS": lambda r, _: RRS(r.model, r.processor, verbose=False),
    "prepare": lambda r, _: r.prepare(load_examples(HARMFUL), load_examples(BENIGN), "audio-text"),
    "fit": lambda r, p: r.fit(HARMFUL, BENIGN, preflight=2, checkpoint_dir=p / "run"),
    "generate": lambda r, _: r.generate(HARMFUL, max_new_tokens=2),
    "evaluate": lambda r, _: r.evaluate([*HARMFUL, *BENIGN], ("audio-text", "text-only"), max_new_tokens=2),
    "find_refusal": lambda r, _: r.find_refusal(HARMFUL, prompts=["(no)"], n=2),
    "calibrate": lambda r, _: r.fit(HARMFUL, BENIGN, preflight=0).calibrate(
        [*HARMFUL, *BENIGN], ("text-only",), max_new_tokens=2, most=1.0
    ),
    "save and load": lambda r, p: (
        r.fit(HARMFUL, BENIGN, preflight=0).save(p / "a"),
        r.disable(),
        RRS.load(p / "a", r.model, r.processor, verbose=False).disable(),
    ),
    "disabled": lambda r, _: r.disabled().__enter__(),
}


@pytest.fixture
def user():
    """A model in the user's own, odd state."""
    model, processor = tiny_qwen2_audio()
    model.train()
    model.model.audio_tower.eval()
    model.lm_head.requires_grad_(False)
    processor.tokenizer.padding_side = "right"
    model.generation_config.do_sample = True
    torch.manual_seed(5)
    return RRS(model, processor, RRSConfig(**CONFIG), verbose=False)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_changes_nothing(call, user, tmp_path):
    before = snapshot(user.model, user.processor)
    CALLS[call](user, tmp_path)
    user.disable()
    assert_unchanged(before, snapshot(user.model, user.processor))


class Broken(Exception):  # noqa: N818
    """Injected."""


# Where it breaks: (what is replaced, how many calls go well before)
BREAKS = {
    "the processor": (lambda r: (r.processor.feature_extractor, "_np_extract_fbank_features"), 2),
    "the decoder": (lambda r: (Reader, "last_hidden"), 0),
    "training": (lambda r: (torch.optim.AdamW, "step"), 1),
    "generation": (lambda r: (r.model, "generate"), 0),
}


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize("call", ["prepare", "fit", "generate", "evaluate", "find_refusal", "calibrate"])
def test_a_call_that_fails_changes_nothing(call, where, user, tmp_path, monkeypatch):
    choose, well = BREAKS[where]
    owner, name = choose(user)
    original, calls = getattr(owner, name), []

    def breaking(*args, **kwargs):
        calls.append(1)
        if len(calls) > well:
            raise Broken
        return original(*args, **kwargs)

    before = snapshot(user.model, user.processor)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, breaking)
        try:
            CALLS[call](user, tmp_path)
        except Broken:
            pass
        else:
            assert len(calls) <= well  # this call does not get there
    assert user.lora is None or call in ("fit", "calibrate")
    user.disable()
    assert_unchanged(before, snapshot(user.model, user.processor))


def test_a_capture_that_fails_changes_nothing(user):
    before = snapshot(user.model, user.processor)
    with pytest.raises(Broken), capture(user.model, ["lm_head", "model"]):
        raise Broken
    assert_unchanged(before, snapshot(user.model, user.processor))


RESTORING = {
    "undoing", "undo", "put_back", "_changed", "frozen", "_take_off", "capture", "attach", "detach", "disable",
    "enable", "disabled", "_running", "own_lora", "_check", "_pass", "_decoder_inputs", "_head_input",
    "__enter__", "__exit__",
}  # fmt: skip


def interrupted(call, k):
    """The error of a Ctrl-C at the k-th line that runs in what changes a model and puts it back; None past the last."""
    left = [k]

    def trace(frame, event, _arg):
        name, file = frame.f_code.co_name, Path(frame.f_code.co_filename)
        if name not in RESTORING or file.name not in ("hooks.py", "rrs.py", "contextlib.py"):
            return None
        if event == "line":
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    return None


@pytest.fixture
def adapted(user):
    """What a Ctrl-C could spoil: an adapter and a user's odd flags; with what vanilla and the adapter give."""
    user.config = RRSConfig(**{**CONFIG, "conditions": ("text-only",), "target_modules": ("q_proj",)})
    user.fit(HARMFUL, BENIGN, preflight=0)
    vectors = [user.extract(load_examples(BENIGN)[:1], "text-only", vanilla=off) for off in (False, True)]
    assert not torch.equal(*vectors)

    def seen():  # the adapter's hooks are put on anew, under other numbers
        hooks = [(n, h, len(getattr(m, h))) for n, m in user.model.named_modules() for h in HOOKS]
        return snapshot(user.model, user.processor) | {"hooks": hooks}

    before = seen()

    def check(where):
        assert_unchanged(before, seen())
        for off, rows_ in zip((False, True), vectors, strict=True):
            assert torch.equal(user.extract(load_examples(BENIGN)[:1], "text-only", vanilla=off), rows_), where

    return user, check


def toggle(r):
    """All that is changed for a while, from the first prompt on: adapter, flags, hooks that steer and capture."""
    r.reader.exact = None
    with r.disabled(), steer(r.model, torch.ones(32), layer=0):
        pass
    r.extract(load_examples(BENIGN)[:1], "text-only")


@pytest.mark.parametrize("notebook", [False, True])
@pytest.mark.parametrize("step", [13, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_putting_back_leaves_nothing(step, notebook, adapted, monkeypatch):
    """A notebook keeps the error, and the frames that it went through: there the next use puts back."""
    (r, check), k, left = adapted, 1, 0
    wanted = sum(len(m._forward_hooks) for m in r.model.modules())
    while (error := interrupted(lambda: toggle(r), k)) is not None:
        if notebook:
            monkeypatch.setattr(sys, "last_value", error, raising=False)
            left += sum(len(m._forward_hooks) for m in r.model.modules()) != wanted
            r.extract(load_examples(BENIGN)[:1], "text-only")
        error = None
        check(k)
        k += step
    assert k > 1000
    assert bool(left) == notebook  # what is tested happens


def test_what_two_interrupts_leave_is_put_back_before_the_next_use_and_said(adapted, monkeypatch):
    (r, check), real, calls, k = adapted, hooks._take_off, [], 0

    def twice(module, ours):
        calls.append(1)
        if k <= len(calls) <= k + 1:
            raise KeyboardInterrupt
        real(module, ours)

    told = 0
    while True:
        k, r.reader.exact = k + 1, None
        calls.clear()
        monkeypatch.setattr(hooks, "_take_off", twice)
        try:
            toggle(r)
        except KeyboardInterrupt:
            monkeypatch.setattr(hooks, "_take_off", real)
        else:
            break
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            r.extract(load_examples(BENIGN)[:1], "text-only")
        told += any("Interrupts left hooks or flags of RRS on the model" in str(w.message) for w in said)
        check(k)
    assert told >= 5  # what is tested happens


def test_two_threads_two_models_same_results():
    """Dropout, order and instructions come from generators of their own."""

    def train(seed, into):
        r = RRS(*tiny_qwen2_audio(seed), RRSConfig(**{**CONFIG, "epochs": 3, "seed": seed}), verbose=False)
        into[seed] = r.fit(HARMFUL, BENIGN, preflight=0).lora.tensors()

    one, two = {}, {}
    for seed in (1, 2):
        train(seed, one)
    models = {seed: tiny_qwen2_audio(seed) for seed in (1, 2)}  # building draws global random numbers: not in threads

    def train_in_thread(seed):
        r = RRS(*models[seed], RRSConfig(**{**CONFIG, "epochs": 3, "seed": seed}), verbose=False)
        two[seed] = r.fit(HARMFUL, BENIGN, preflight=0).lora.tensors()

    threads = [threading.Thread(target=train_in_thread, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(value, two[seed][k]) for seed in one for k, value in one[seed].items())


def test_two_threads_on_one_model_get_each_its_own_answers(user):
    """One switches its adapter, measures it at many scales and saves it; the other asks, with words of its own."""
    one = RRS(user.model, user.processor, RRSConfig(**{**CONFIG, "conditions": ("text-only",)}), verbose=False).fit(
        HARMFUL, BENIGN, preflight=0
    )
    two = RRS(user.model, user.processor, RRSConfig(instruction="Be brief.", system="You are kind."), verbose=False)
    dev = {"harmful": HARMFUL[:2], "everyday": BENIGN[:2]}
    calls = [
        lambda: [a.response for a in one.evaluate(dev, ("text-only",), max_new_tokens=4, usefulness=2).answers],
        lambda: one.extract(HARMFUL, "text-only").tolist(),
        lambda: str(one.calibrate(dev, ("text-only",), max_new_tokens=2, most=2.0)),
        lambda: [p["trained"] + p["vanilla"] for p in one._canary(one.lora)[0]],
    ]

    def ask(who=two):
        vectors = who.extract(HARMFUL, "text-only", vanilla=False)
        return vectors.tolist(), who.generate(HARMFUL, "text-only", max_new_tokens=3)

    scale, alone, wrong, done = one.lora.scale, [], [], threading.Event()
    for call in calls:
        alone.append(call())
        one.lora.scale = scale
    wanted = ask()
    assert wanted != ask(one)
    with one.disabled():
        assert wanted != ask()  # it would tell if it were answered in the middle of a switch

    def go_on():
        while not done.is_set():
            wrong.extend([] if (said := ask()) == wanted else [said])
            asked.append(1)

    asked, thread = [], threading.Thread(target=go_on)
    thread.start()
    try:
        for _ in range(3):
            for call, expected in zip(calls, alone, strict=True):
                assert call() == expected
                one.lora.scale = scale
    finally:
        done.set()
        thread.join()
    assert not wrong
    assert len(asked) > 1


@pytest.mark.parametrize("category", [DeprecationWarning, PendingDeprecationWarning, FutureWarning])
def test_what_our_own_calls_deprecate_is_an_error(category):
    """pyproject.toml's filters: the tests fail on a warning that a call from our modules causes."""
    for module in ("rrs", "rrs.hooks", "rrs.data", "rrs.evaluate", "demo_lalm"):
        with pytest.raises(category):
            warnings.warn_explicit("on its way out", category, "somewhere.py", 1, module=module)
    with pytest.warns(category):
        warnings.warn_explicit("on its way out", category, "somewhere.py", 1, module="transformers.models")
