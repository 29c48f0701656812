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
from packaging.version import Version

import rrs as package
from rrs import RRS, RRSConfig, _passes

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
from test_distributed import run
from rrs.hooks import rank, world
assert world() == 1  # nothing happens on import
folder = Path(sys.argv[1])
r, report = run(folder)
assert world() == 2
torch.save({
    "targets": {c: (t.delta, t.mask, t.harmful, t.benign) for c, t in r.targets.items()},
    "adapter": r.lora.tensors(), "history": r.history, "clips": sorted(r.reader._clips),
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
        for condition, ours in r.targets.items():
            for a, b in zip(
                (ours.delta, ours.mask, ours.harmful, ours.benign), theirs["targets"][condition], strict=True
            ):
                assert torch.equal(a, b)


def test_the_adapter_is_that_of_one_process(both):
    r, _, _, ranks, _ = both
    for name, value in r.lora.tensors().items():
        assert torch.equal(ranks[0]["adapter"][name], ranks[1]["adapter"][name])  # ranks stay together
        assert torch.allclose(ranks[0]["adapter"][name], value, atol=1e-5, rtol=0), name
    for mine, theirs in zip(r.history, ranks[0]["history"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert ranks[0]["history"] == ranks[1]["history"]


def test_every_rank_has_every_clip_and_every_answer(both):
    r, report, _, ranks, _ = both
    for theirs in ranks:
        assert theirs["clips"] == sorted(r.reader._clips)
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


SHARDED = """
import sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from test_distributed import run
from rrs.hooks import rank
folder = Path(sys.argv[1])
r, report = run(folder, shard=True)
spread = [p for p in r.location.layers.parameters() if isinstance(p, DTensor)]
assert len(spread) == sum(1 for _ in r.location.layers.parameters())
assert all(p.to_local().numel() < p.numel() for p in spread if p.dim() > 1)
answers = [(a.id, a.stage, a.condition, a.response) for a in report.answers]
kept = {"adapter": r.lora.tensors(), "answers": answers, "norm": r.lora.weights_norm}
torch.save(kept, folder / f"rank-{rank()}.pt")
"""


@pytest.mark.skipif(Version(torch.__version__) < Version("2.8"), reason="FSDP2 is for GPUs only in torch 2.6 and 2.7")
def test_spread_weights_give_the_same_adapter(both, tmp_path):
    """FSDP2 over gloo: unequal shares, generation of unequal length, and a vanilla model that is never whole."""
    r, report, *_ = both
    done = launch(SHARDED, str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank-{k}.pt", weights_only=False) for k in (0, 1)]
    for name, value in r.lora.tensors().items():
        assert torch.equal(ranks[0]["adapter"][name], ranks[1]["adapter"][name])
        assert torch.allclose(ranks[0]["adapter"][name], value, atol=1e-5, rtol=0), name
    assert [rank["norm"] for rank in ranks] == [pytest.approx(r.lora.weights_norm)] * 2  # of whole weights
    before = [(a.id, a.stage, a.condition, a.response) for a in report.answers if a.stage == "before"]
    assert [row for row in ranks[0]["answers"] if row[1] == "before"] == before


def test_alone_there_is_nothing_to_spread(tiny):
    r = RRS(*tiny, RRSConfig(shard=True), verbose=False)
    assert not r.reader.sharded


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
@pytest.mark.parametrize("micro", [1, 3, 4])
def test_every_prompt_is_run_once_with_its_weight(world, micro):
    group = [("a", list("abcd")), ("b", list("ef"))]
    passes = [p for k in range(world) for p in _passes(group, micro, k, world)]
    assert sorted(x for _, _, part, _ in passes for x in part) == list("abcdef")
    assert all(0 < len(part) <= micro for _, _, part, _ in passes)
    assert sum(weight for *_, weight in passes) == pytest.approx(1)
    for _, condition, part, weight in passes:
        assert weight / len(part) == pytest.approx(1 / 2 / (4 if condition == "a" else 2))
    assert len({place for place, *_ in passes}) == len(passes)  # no two share dropout's masks


def test_errors_of_rank_0_are_everyones(monkeypatch):
    """`first` on a rank that is not 0: it gets the value or the error, and computes nothing itself."""
    hooks = package.hooks
    monkeypatch.setattr(hooks, "world", lambda: 2)
    monkeypatch.setattr(hooks, "rank", lambda: 1)
    for sent in ([5, None], [None, OSError(28, "full")]):
        monkeypatch.setattr(
            hooks.dist, "broadcast_object_list", lambda box, sent=sent: box.__setitem__(slice(None), sent)
        )
        if sent[1]:
            with pytest.raises(OSError, match="full"):
                hooks.first(lambda: 1 / 0)
        else:
            assert hooks.first(lambda: 1 / 0) == 5
