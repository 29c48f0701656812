"""Nothing is lost: interrupted at any moment, a run goes on to the very same adapter, whatever the disk does."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import rows, tiny_qwen2_audio
from safetensors.torch import load_file
from torch.nn import functional as F

import rrs
from rrs import RRS, RRSConfig, RRSWarning
from rrs.hooks import Reader

pytestmark = pytest.mark.filterwarnings("ignore:Only 6 harmful:rrs.RRSWarning")
HARMFUL, BENIGN = rows("harmful", 6), rows("benign", 5)


def config(**kwargs):
    sizes = {
        "conditions": ("text-only",),
        "epochs": 3,
        "batch_size": 3,
        "accumulate": 2,
        "learning_rate": 1e-2,
        "penalty": 1e-3,
        "lora_r": 4,
    }
    return RRSConfig(**{**sizes, "target_modules": ("q_proj", "down_proj"), **kwargs})


def new(**kwargs):
    return RRS(*tiny_qwen2_audio(), config(**kwargs), verbose=False)


def fit(folder=None, r=None, **kwargs):
    return (r or new()).fit(HARMFUL, BENIGN, preflight=0, checkpoint_dir=folder, **kwargs)


@pytest.fixture(scope="module")
def reference():
    """The uninterrupted run: 6 steps."""
    return fit()


def assert_identical(r, reference):
    ours, theirs = r.lora.tensors(), reference.lora.tensors()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert r.history == reference.history


def raising(error, at):
    """A function that raises at its call number `at`, counted from 1."""
    calls = []

    def call(*_args, **_kwargs):
        calls.append(1)
        if len(calls) == at:
            raise error

    return call


# -- SIGKILL -----------------------------------------------------------------------------------------------------------

# Imports once, then forks a child for every line "moments folder seconds": it trains, resuming, and saves; it kills
# itself at the given moment (a step, a sync, before or after a rename), or is killed from outside.
SERVER = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from test_resume import fit, new
for line in sys.stdin:
    moment, folder = line.split(maxsplit=1)
    left, folder = int(moment), folder.strip()
    if pid := os.fork():
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    def passing(*_):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    fsync, replace = os.fsync, os.replace
    os.fsync = lambda handle: (passing(), fsync(handle))
    os.replace = lambda a, b: (passing(), replace(a, b), passing())
    r = new(epochs=6)
    fit(folder, r, checkpoint_every=1, resume=True, callbacks=[passing])
    r.save(folder + "-adapter", overwrite=True)
    r.save(folder + "-adapter", overwrite=True)
    os._exit(0)
"""


@pytest.fixture
def server():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONWARNINGS": "ignore"}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:
        yield process
        process.stdin.close()
        process.wait(60)


def run_child(server, folder, moment=0, seconds=None):
    """One life of a run: its exit status."""
    server.stdin.write(f"{moment} {folder}\n")
    server.stdin.flush()
    pid = int(server.stdout.readline())
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return int(server.stdout.readline())


def survives(server, tmp_path, lives, deaths_wanted):
    uninterrupted, deaths = fit(r=new(epochs=6)), 0
    for attempt in range(100):
        folder = tmp_path / str(attempt)  # a save takes 25 moments, and has to fit into one life
        while status := run_child(server, folder, **lives()):
            assert status == -signal.SIGKILL
            deaths += 1
        assert load_file(f"{folder}-adapter/adapter_model.safetensors").keys()
        assert_identical(RRS.load(f"{folder}-adapter", *tiny_qwen2_audio(), verbose=False), uninterrupted)
        assert sorted(p.name for p in folder.glob("*step-*")) == [f"step-000000{n}.safetensors" for n in (11, 12)]
        if deaths >= deaths_wanted:
            return
    raise AssertionError(f"only {deaths} deaths")


def test_killed_at_random_moments_it_always_resumes(server, tmp_path):
    """SIGKILL at steps and at every stage of writing, save included."""
    random.seed(0)
    survives(server, tmp_path, lambda: {"moment": random.randint(1, 60)}, 10)


@pytest.mark.slow
def test_killed_at_random_times_it_always_resumes(server, tmp_path):
    random.seed(1)
    began = time.perf_counter()
    run_child(server, tmp_path / "timed")
    whole = time.perf_counter() - began
    # Down to a tenth of it: the machine may be faster later than it was for this first run.
    survives(server, tmp_path, lambda: {"seconds": random.uniform(0, whole) * 10 ** -random.random()}, 40)


# -- signals, errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint_first(tmp_path, reference, number):
    got = []
    mine = lambda n, _frame: got.append(n) or (_ for _ in ()).throw(KeyboardInterrupt)  # noqa: E731
    before = signal.signal(number, mine)
    try:
        stop = lambda state: signal.raise_signal(number) if state.step == 3 else None  # noqa: E731
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, checkpoint_every=100, callbacks=[stop])
        assert got == [number]
        assert signal.getsignal(number) is mine
        assert [p.name for p in tmp_path.glob("step-*")] == ["step-00000003.safetensors"]
    finally:
        signal.signal(number, before)
    assert_identical(fit(tmp_path, resume=True), reference)


def test_a_handler_that_returns_lets_training_go_on(tmp_path, reference):
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        stop = lambda state: signal.raise_signal(signal.SIGTERM) if state.step == 3 else None  # noqa: E731
        assert_identical(fit(tmp_path, callbacks=[stop]), reference)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_resuming_a_finished_run_trains_nothing(tmp_path, reference, monkeypatch):
    fit(tmp_path)
    monkeypatch.setattr(RRS, "_gradients", raising(AssertionError, 1))
    monkeypatch.setattr(Reader, "represent", raising(AssertionError, 1))  # extraction comes from the cache
    assert_identical(fit(tmp_path, resume=True), reference)


def test_preflight_is_kept(tmp_path):
    with pytest.warns(RRSWarning):
        first = new(epochs=1).fit(HARMFUL, BENIGN, preflight=2, checkpoint_dir=tmp_path)
    assert new(epochs=1).fit(HARMFUL, BENIGN, preflight=2, checkpoint_dir=tmp_path, resume=True).checks == first.checks


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, reference, monkeypatch, code):
    fsync, count = os.fsync, []

    def full(handle):
        count.append(1)
        if len(count) == 2 + 2 * 2 + 1:  # after the extraction and two checkpoints, a file and a folder each
            raise OSError(code, os.strerror(code))
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        OSError, match=r"step 3: .*step-00000003.* can't be written .*last good .*step-00000002"
    ) as error:
        fit(tmp_path, checkpoint_every=1)
    assert error.value.errno == code
    assert sorted(p.name for p in tmp_path.glob("*step*")) == ["step-00000001.safetensors", "step-00000002.safetensors"]
    assert_identical(fit(tmp_path, resume=True), reference)


def test_a_file_size_limit(tmp_path, reference):
    """A real write that fails half-way."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(state):
        if state.step == 2:
            size = (tmp_path / "step-00000001.safetensors").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))

    try:
        with pytest.raises(OSError, match=r"step 2: .*last good .*step-00000001") as error:
            fit(tmp_path, checkpoint_every=1, callbacks=[limit])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.errno == errno.EFBIG
    assert_identical(fit(tmp_path, resume=True), reference)


def test_a_folder_that_can_not_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        fit(tmp_path / "file" / "folder")
    monkeypatch.setattr(rrs, "open", raising(PermissionError(errno.EACCES, "Permission denied"), 1), raising=False)
    monkeypatch.setattr(RRS, "_gradients", raising(AssertionError, 1))  # it is noticed before training
    with pytest.raises(
        PermissionError, match=r"ro.extract-.* can't be written \(Permission denied\); make room or access"
    ):
        fit(tmp_path / "ro")


def test_a_truncated_checkpoint_is_named_and_the_one_before_is_there(tmp_path, reference):
    fit(tmp_path, checkpoint_every=1, r=new())
    newest = tmp_path / "step-00000006.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"step-00000006.* is damaged .*Delete it to resume from .*step-00000005"):
        fit(tmp_path, resume=True)
    newest.unlink()
    assert_identical(fit(tmp_path, resume=True), reference)


def test_all_conditions_resume(tmp_path):
    three = {"conditions": ("audio-text", "text-only", "audio-only"), "epochs": 1}
    stop = lambda state: signal.raise_signal(signal.SIGINT) if state.step == 2 else None  # noqa: E731
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell starts tests with "&"
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(tmp_path, new(**three), callbacks=[stop])
    finally:
        signal.signal(signal.SIGINT, before)
    assert_identical(fit(tmp_path, new(**three), resume=True), fit(r=new(**three)))


def test_without_a_checkpoint_it_starts_anew(tmp_path, reference):
    assert_identical(fit(tmp_path / "new", resume=True), reference)


def test_runs_are_not_mixed(tmp_path):
    fit(tmp_path)
    with pytest.raises(FileExistsError, match=r"step-00000006.*resume=True"):
        fit(tmp_path)
    with pytest.raises(ValueError, match=r"another run: learning_rate 0.01 there, 0.02 here"):
        fit(tmp_path, r=new(learning_rate=0.02), resume=True)
    with pytest.raises(ValueError, match=r"another run: data"):
        new().fit(HARMFUL[:-1], BENIGN, preflight=0, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"another run: base"):
        fit(tmp_path, r=RRS(*tiny_qwen2_audio(seed=1), config(), verbose=False), resume=True)
    with pytest.raises(ValueError, match=r"another run: selection"):
        fit(tmp_path, scorer=lambda delta, _row: delta, resume=True)
    model, processor = tiny_qwen2_audio()
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})  # both dtypes hold these
    r = fit(tmp_path / "other", r=RRS(model, processor, config(), verbose=False)).disable()
    with pytest.raises(ValueError, match=r"another run: dtype"):
        fit(tmp_path / "other", r=RRS(r.model.bfloat16(), processor, config(), verbose=False), resume=True)


@pytest.mark.parametrize("without", [{"resume": True}, {"checkpoint_every": 2}])
def test_checkpoints_need_a_folder(without):
    with pytest.raises(ValueError, match="need checkpoint_dir"):
        fit(**without)


def test_the_cache_goes_by_content(tmp_path, monkeypatch):
    """The same contents are read back; another clip, text, prompt or model is extracted."""
    calls = []
    represent = Reader.represent
    monkeypatch.setattr(Reader, "represent", lambda *a: calls.append(1) or represent(*a))
    spoken = {"conditions": ("audio-text",)}
    louder = [{**HARMFUL[0], "audio": {**HARMFUL[0]["audio"], "array": 2 * HARMFUL[0]["audio"]["array"]}}, *HARMFUL[1:]]
    runs = [(new(**spoken), HARMFUL), (new(**spoken), louder), (new(**spoken, refusal_prompt="(No.)"), HARMFUL)]
    runs.append((RRS(*tiny_qwen2_audio(seed=1), config(**spoken), verbose=False), HARMFUL))
    for n, (r, harmful) in enumerate(runs, 1):
        for _ in range(2):
            r.extract(harmful, BENIGN, cache=tmp_path)
            assert len(calls) == n
    files = list(tmp_path.iterdir())
    assert len(files) == len(runs)
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert torch.equal(
        new(**spoken).extract(HARMFUL, BENIGN, cache=tmp_path)["audio-text"].refused,
        new(**spoken).extract(HARMFUL, BENIGN)["audio-text"].refused,
    )
    assert len(calls) == len(runs) + 2


def test_a_failed_fit_leaves_the_adapter_before(tmp_path, reference):
    r = fit(r=new())
    lora, history, record = r.lora, r.history, r.record
    with pytest.raises(ZeroDivisionError):
        fit(r=r, callbacks=[raising(ZeroDivisionError, 2)])
    assert (r.lora, r.history, r.record) == (lora, history, record)
    assert r.lora.attached
    assert_identical(r, reference)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_what_runs_at_once(monkeypatch):
    plain = fit(r=new(lora_dropout=0.0))
    sizes = []

    def loss(h, goal):
        sizes.append(len(h))
        if len(h) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return F.mse_loss(h, goal)

    with pytest.warns(RRSWarning, match=r"step 1: out of memory; from here on [12] prompts at a time") as caught:
        frugal = fit(r=new(lora_dropout=0.0), loss=loss)
    assert sum("out of memory" in str(w.message) for w in caught) == 2  # 3 -> 2 -> 1, once and for all
    assert sizes[:3] == [3, 2, 1]
    for a, b in zip(plain.history, frugal.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    for k, value in plain.lora.tensors().items():
        assert torch.allclose(value, frugal.lora.tensors()[k], atol=1e-4), k


def test_out_of_memory_for_a_single_prompt_is_raised():
    def loss(h, goal):
        raise RuntimeError("MPS backend out of memory")

    with (
        pytest.warns(RRSWarning, match="out of memory"),
        pytest.raises(RuntimeError, match="MPS backend out of memory"),
    ):
        fit(loss=loss)


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    """The loss is finite, its gradient is not; nothing of it reaches the weights."""
    calls = []

    def loss(h, goal):
        calls.append(1)
        return F.mse_loss(h, goal) + ((h * 0).sum().sqrt() if len(calls) > 5 else 0)

    with pytest.raises(
        FloatingPointError,
        match=r"step 3: the gradient's norm is nan on \['(harmful|benign)-.*last good .*step-00000002",
    ):
        fit(tmp_path, loss=loss, checkpoint_every=1)
    saved = load_file(tmp_path / "step-00000002.safetensors")
    assert all(torch.isfinite(v).all() for k, v in saved.items() if v.is_floating_point())


def test_divergence_is_noticed():
    with pytest.warns(RRSWarning, match=r"epoch \d: the loss diverges.* Lower learning_rate \(3.0\)"):
        fit(r=new(learning_rate=3.0, lora_alpha=64, max_grad_norm=100.0))


def test_interrupted_or_not_the_history_is_json(tmp_path):
    fit(tmp_path, r=new(epochs=1))
    r = fit(tmp_path, r=new(epochs=1), resume=True)
    assert json.loads(json.dumps(r.history)) == r.history
