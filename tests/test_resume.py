"""Nothing is lost: interrupted at any moment, a run goes on to the very same adapter, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import rows, tiny_qwen2_audio
from safetensors.torch import load_file

from rrs import RRS, RRSConfig, RRSWarning, describe, squared, to_targets

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
# itself at the given moment (a step, in the middle of a file, before or after a rename), or is killed from outside.
SERVER = f"""
import os, signal, sys
from pathlib import Path
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
    write, replace = Path.write_bytes, os.replace
    Path.write_bytes = lambda path, data: (passing(), write(path, data[:-9]), passing(), write(path, data), passing())
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


# -- two runs in one folder --------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from pathlib import Path
from rrs import holding
with holding(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_the_folder_of_another_process_is_told_and_a_killed_one_blocks_nothing(tmp_path, reference):
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as process:
        assert process.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=rf"Another run is at work in {tmp_path}; wait for its end"):
                fit(tmp_path, resume=resume, callbacks=[raising(AssertionError, 1)])
        assert_identical(fit(tmp_path / "another"), reference)
        process.kill()
        process.wait(60)
    assert (tmp_path / ".lock").exists()
    assert_identical(fit(tmp_path, resume=True), reference)


@pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
def test_a_resumed_run_finds_the_same_refusal(tmp_path):
    auto = {"refusal": "auto", "refusal_prompt": "auto"}
    whole = fit(r=new(**auto))
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, r=new(**auto), checkpoint_every=1, callbacks=[raising(ZeroDivisionError, 3)])
    again = fit(tmp_path, r=new(**auto), checkpoint_every=1, resume=True)
    assert_identical(again, whole)
    assert again.config == whole.config != new(**auto).config


def test_a_second_run_in_the_folder_of_another_thread_is_told(tmp_path, reference):
    said = []

    def second():
        with pytest.raises(BlockingIOError, match="Another run is at work") as error:
            fit(tmp_path, resume=True)
        said.append(str(error.value))

    def start(state):
        if state.step == 2:
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(60)

    assert_identical(fit(tmp_path, callbacks=[start]), reference)
    assert len(said) == 1
    with pytest.raises(KeyboardInterrupt):  # let go after an error, too, while its traceback lives on
        fit(tmp_path / "b", checkpoint_every=1, callbacks=[stop_at(3)])
    with ThreadPoolExecutor() as pool:
        assert_identical(pool.submit(fit, tmp_path / "b", resume=True).result(), reference)


def test_a_file_system_without_locks_is_said(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", raising(OSError(errno.ENOLCK, "No locks available"), 1))
    with pytest.warns(RRSWarning, match=r"can't be locked \(.*No locks available\): start no other run there"):
        assert_identical(fit(tmp_path), reference)


# -- errors ------------------------------------------------------------------------------------------------------------


def stop_at(step, error=KeyboardInterrupt):
    """A callback that raises after this step."""

    def callback(state):
        if state.step == step:
            raise error

    return callback


@pytest.mark.parametrize("every", [1, 2])
def test_interrupted_it_goes_on_from_the_last_checkpoint(tmp_path, reference, every):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, checkpoint_every=every, callbacks=[stop_at(4)])
    assert sorted(p.name for p in tmp_path.iterdir())[-1] == f"step-0000000{4 - every}.safetensors"
    steps = []
    assert_identical(fit(tmp_path, resume=True, callbacks=[lambda state: steps.append(state.step)]), reference)
    assert steps == list(range(5 - every, 7))


def test_resuming_a_finished_run_trains_nothing(tmp_path, reference):
    fit(tmp_path)
    assert_identical(fit(tmp_path, resume=True, callbacks=[raising(AssertionError, 1)]), reference)


def test_a_callback_ends_training_and_resuming_trains_no_further(tmp_path, reference):
    stopped = fit(tmp_path, checkpoint_every=100, callbacks=[lambda _: None, lambda state: state.step == 3])
    assert stopped.history == reference.history[:3]
    assert [p.name for p in tmp_path.glob("*step*")] == ["step-00000003.safetensors"]
    assert not stopped.lora.training
    assert_identical(fit(tmp_path, resume=True, callbacks=[raising(AssertionError, 1)]), stopped)


def test_preflight_is_kept(tmp_path):
    with pytest.warns(RRSWarning):
        first = new(epochs=1).fit(HARMFUL, BENIGN, preflight=2, checkpoint_dir=tmp_path)
    again = new(epochs=1).fit(HARMFUL, BENIGN, preflight=2, checkpoint_dir=tmp_path, resume=True)
    assert again.record["preflight"] == first.record["preflight"]
    assert len(again.record["preflight"]) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, reference, monkeypatch, code):
    write, count = Path.write_bytes, []

    def full(path, content):
        count.append(1)
        if len(count) == 3:
            write(path, content[: len(content) // 2])
            raise OSError(code, os.strerror(code))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
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


def test_a_folder_that_can_not_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file"):
        fit(tmp_path / "file" / "folder", callbacks=[raising(AssertionError, 1)])  # noticed before training


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
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, new(**three), checkpoint_every=1, callbacks=[stop_at(2)])
    assert_identical(fit(tmp_path, new(**three), resume=True), fit(r=new(**three)))


def test_without_a_checkpoint_it_starts_anew(tmp_path, reference):
    assert_identical(fit(tmp_path / "new", resume=True), reference)


def test_runs_are_not_mixed(tmp_path):
    fit(tmp_path)
    with pytest.raises(FileExistsError, match=r"step-00000006.*resume=True"):
        fit(tmp_path)
    fewer = partial(new().fit, HARMFUL[:-1], BENIGN, preflight=0, checkpoint_dir=tmp_path)
    another = RRS(*tiny_qwen2_audio(seed=1), config(), verbose=False)
    for run, words in (
        (partial(fit, tmp_path, r=new(learning_rate=0.02)), "config .*'learning_rate': 0.01.* there, .*0.02"),
        (fewer, "data"),
        (partial(fit, tmp_path, r=another), "base"),
        (partial(fit, tmp_path, scorer=lambda delta, _row: delta), "targets"),
    ):
        with pytest.raises(ValueError, match=f"another run: {words}"):
            run(resume=True)
    model, processor = tiny_qwen2_audio()
    model.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})  # both dtypes hold these
    r = fit(tmp_path / "other", r=RRS(model, processor, config(), verbose=False)).disable()
    with pytest.raises(ValueError, match=r"another run: dtype"):
        fit(tmp_path / "other", r=RRS(r.model.bfloat16(), processor, config(), verbose=False), resume=True)


def objective(factor):
    """An objective with a number of its own, as an edit of its source would change it."""
    scope = {"squared": squared, "to_targets": to_targets}
    exec(f"def own(*args):\n    return {factor} * to_targets(*args)", scope)
    return scope["own"]


def times(factor):
    return lambda lora: factor * lora.penalty()


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"objective": objective(2)}, {"objective": objective(3)}),
        (
            {"objective": partial(to_targets, distance=lambda h, t: squared(h, t))},
            {"objective": partial(to_targets, distance=lambda h, t: 2 * squared(h, t))},
        ),
        ({"penalty": lambda lora: lora.penalty()}, {"penalty": lambda lora: 2 * lora.penalty()}),
        ({"penalty": times(1)}, {"penalty": times(2)}),
    ],
    ids=["edited", "distance", "penalty", "a number from outside"],
)
def test_a_resumed_run_keeps_its_functions(tmp_path, there, here):
    first = fit(tmp_path, r=new(epochs=1), **there)
    with pytest.raises(ValueError, match="another run: how"):
        fit(tmp_path, r=new(epochs=1), resume=True, **here)
    assert_identical(fit(tmp_path, r=new(epochs=1), resume=True, **there), first)


def test_a_function_is_described_alike_in_every_process():
    """Also one with a set of strings, whose order changes from process to process."""
    program = "from rrs import describe\ndef f(x):\n    return x in {'a', 'b', 'c', 'd', 'e', 'f'}\nprint(describe(f))"
    said = set()
    for seed in "12":
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": seed}
        said.add(subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, check=True).stdout)
    assert len(said) == 1
    assert describe(to_targets) != describe(squared)
    edited = [  # as README's penalty; each of one name
        lambda lora: sum(b.norm() for b in lora.B),
        lambda lora: sum(b.norm(1) for b in lora.B),
        lambda lora: sum(b.norm(dim=(0, 1)) for b in lora.B),
        lambda lora: sum(b.norm(dim=(1, 0)) for b in lora.B),
    ]
    assert len({describe(penalty) for penalty in edited}) == len(edited)


@pytest.mark.parametrize("without", [{"resume": True}, {"checkpoint_every": 2}])
def test_checkpoints_need_a_folder(without):
    with pytest.raises(ValueError, match="need checkpoint_dir"):
        fit(**without)


def test_a_failed_fit_leaves_the_adapter_before(tmp_path, reference):
    r = fit(r=new())
    lora, history, record = r.lora, r.history, r.record
    with pytest.raises(ZeroDivisionError):
        fit(r=r, callbacks=[raising(ZeroDivisionError, 2)])
    assert (r.lora, r.history, r.record) == (lora, history, record)
    assert r.lora.attached
    assert_identical(r, reference)


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_out_of_memory_is_raised_and_leaves_all_as_it_was(reference):
    r = fit(r=new())
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        fit(r=r, objective=raising(torch.OutOfMemoryError("CUDA out of memory (injected)"), 1))
    assert r.lora.attached
    assert_identical(r, reference)


def test_a_gradient_that_is_not_finite_stops(tmp_path):
    """The loss is finite, its gradient is not; nothing of it reaches the weights."""
    calls = []

    def distance(h, target):
        calls.append(1)
        return squared(h, target) + ((h * 0).sum(-1).sqrt() if len(calls) > 5 else 0)

    with pytest.raises(
        FloatingPointError,
        match=r"step 3: loss or gradient is not finite on \['text-only (harmful|benign)-.*last good .*step-00000002",
    ):
        fit(tmp_path, objective=partial(to_targets, distance=distance), checkpoint_every=1)
    saved = load_file(tmp_path / "step-00000002.safetensors")
    assert all(torch.isfinite(v).all() for k, v in saved.items() if v.is_floating_point())


def test_interrupted_or_not_the_history_is_json(tmp_path):
    fit(tmp_path, r=new(epochs=1))
    r = fit(tmp_path, r=new(epochs=1), resume=True)
    assert json.loads(json.dumps(r.history)) == r.history
