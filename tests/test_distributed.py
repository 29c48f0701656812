"""Two processes on the CPU give what one gives: Δ and masks bit for bit, the adapter up to rounding; none hangs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import rows, tiny_qwen2_audio

from rrs import RRS, RRSConfig, hooks, share_out
from rrs.data import load_examples

pytestmark = pytest.mark.filterwarnings("ignore::rrs.RRSWarning")
HERE = Path(__file__).parent
CONDITIONS = ("audio-text", "text-only")


def run(folder: Path, resume: bool = False, **changes):
    """The whole of it: fit, evaluate, save. 13 inputs in batches of 4 × 2: unequal shares and a last partial batch."""
    config = RRSConfig(
        **{"conditions": CONDITIONS, "epochs": 2, "learning_rate": 1e-3, "penalty": 1e-3, "lora_dropout": 0.0},
        **changes,
    )
    r = RRS(*tiny_qwen2_audio(), config, verbose=False)
    r.reader.max_tokens = 300  # several batches to share out
    harmful, benign = rows("harmful", 7), rows("benign", 6)
    r.fit(harmful, benign, preflight=3, checkpoint_dir=folder / "run", resume=resume)
    report = r.evaluate(
        {"harmful": harmful, "benign": benign}, CONDITIONS, max_new_tokens=3, cache=folder / "answers.jsonl"
    )
    report.save(folder / "report")
    r.save(folder / "adapter")
    return r, report


def targets(r: RRS) -> torch.Tensor:
    """Where all inputs shall be, [n, hidden]."""
    harmful, benign = load_examples(rows("harmful", 7)), load_examples(rows("benign", 6))
    return torch.cat([i.target for c in CONDITIONS for i in r.prepare(harmful, benign, c).items])


def launch(script: str, *args: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    """The script under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]), "OMP_NUM_THREADS": "1"}
    path = Path(args[0]) / "script.py"
    path.write_text(script)
    return subprocess.run([*command, str(path), *args], capture_output=True, text=True, env=env, timeout=300)


SAME = """
import sys
from pathlib import Path
import torch
from test_distributed import run, targets
from rrs.hooks import rank, world
assert world() == 1  # nothing happens on import
folder = Path(sys.argv[1])
r, report = run(folder)
assert world() == 2
torch.save({
    "directions": {c: tuple(d) for c, d in r.directions.items()}, "targets": targets(r),
    "adapter": r.lora.tensors(), "history": r.history,
    "answers": [(a.id, a.stage, a.condition, a.response) for a in report.answers], "usefulness": report.usefulness,
}, folder / f"rank-{rank()}.pt")
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One process, and what the two ranks had."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(SAME, str(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    alone = tmp_path_factory.mktemp("one")
    return (*run(alone), alone, [torch.load(folder / f"rank-{k}.pt", weights_only=False) for k in (0, 1)], folder)


def test_delta_mask_and_targets_are_the_same_bits(both):
    r, _, _, ranks, _ = both
    for theirs in ranks:
        assert torch.equal(targets(r), theirs["targets"])
        for condition in CONDITIONS:
            assert all(map(torch.equal, r.directions[condition], theirs["directions"][condition]))


def test_the_adapter_is_that_of_one_process(both):
    r, _, _, ranks, _ = both
    for name, value in r.lora.tensors().items():
        assert torch.equal(ranks[0]["adapter"][name], ranks[1]["adapter"][name])  # ranks stay together
        assert torch.allclose(ranks[0]["adapter"][name], value, atol=1e-5, rtol=0), name
    for mine, theirs in zip(r.history, ranks[0]["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ranks[0]["history"] == ranks[1]["history"]


def test_every_rank_has_every_answer(both):
    _, report, _, ranks, _ = both
    for theirs in ranks:
        ours = [(a.id, a.stage, a.condition, a.response) for a in report.answers]
        before = [row for row in ours if row[1] == "before"]
        assert [row for row in theirs["answers"] if row[1] == "before"] == before
        assert len(theirs["answers"]) == len(ours)
    assert ranks[0]["answers"] == ranks[1]["answers"]
    assert ranks[0]["usefulness"] == ranks[1]["usefulness"]


def test_rank_0_writes_once(both):
    _, _, alone, _, folder = both
    for name in ("run", "adapter", "report"):
        ours, theirs = (sorted(p.name for p in (f / name).iterdir()) for f in (alone, folder))
        assert ours == theirs
    ours, theirs = ([json.loads(line)["key"] for line in (f / "answers.jsonl").open()] for f in (alone, folder))
    assert len(theirs) == len(set(theirs)) == len(ours)


FAILS = """
import sys
from test_distributed import rows, tiny_qwen2_audio
from rrs import RRS, RRSConfig
from rrs.hooks import rank

def fail(state):
    if state.step == 2 and rank() == 1:
        raise ZeroDivisionError("rank 1 is no more")

config = RRSConfig(conditions=("text-only",), epochs=50, lora_dropout=0.0)
r = RRS(*tiny_qwen2_audio(), config, verbose=False)
r.fit(rows("harmful", 8), rows("benign", 8), preflight=0, callbacks=[fail], checkpoint_dir=sys.argv[1] + "/run")
"""


def test_a_rank_that_dies_ends_the_run_with_its_error(tmp_path):
    began = time.monotonic()
    done = launch(FAILS, str(tmp_path))
    assert done.returncode != 0
    assert "ZeroDivisionError: rank 1 is no more" in done.stderr
    assert time.monotonic() - began < 200  # torchrun's own limit to a hang is 30 s; importing takes the rest


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16])
def test_every_prompt_is_run_once(world):
    batches = [list("abcd"), list("ef")]
    parts = [part for k in range(world) for part in share_out(batches, k, world)]
    assert "".join(x for _, part in parts for x in part) == "abcdef"
    for (batch, first), part in parts:
        assert part == batches[batch][first : first + len(part)]
    assert len({place for place, _ in parts}) == len(parts)  # no two share dropout's masks
    shares = [sum(len(part) for _, part in share_out(batches, k, world)) for k in range(world)]
    assert max(shares) - min(shares) <= 1


def test_errors_of_rank_0_are_everyones(monkeypatch):
    """`on_rank0` on a rank that is not 0: it gets the value or the error, and computes nothing itself."""
    monkeypatch.setattr(hooks, "world", lambda: 2)
    monkeypatch.setattr(hooks, "rank", lambda: 1)
    for sent in ((5, None), (None, OSError(28, "full"))):
        monkeypatch.setattr(
            hooks.dist, "all_gather_object", lambda box, own, sent=sent: box.__setitem__(slice(None), [{0: sent}, own])
        )
        if sent[1]:
            with pytest.raises(OSError, match="full"):
                hooks.on_rank0(lambda: 1 / 0)
        else:
            assert hooks.on_rank0(lambda: 1 / 0) == 5
    monkeypatch.setattr(hooks, "rank", lambda: 0)  # which has its own error, traceback included
    with pytest.raises(ZeroDivisionError):
        hooks.on_rank0(lambda: 1 / 0)
