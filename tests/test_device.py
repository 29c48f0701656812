"""The whole job on a simulated accelerator: what a GPU would refuse, and what passes between it and the host."""

from __future__ import annotations

import ast
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import zoo
from conftest import ROOT, rows, tiny_qwen2_audio

from rrs import RRS, RRSConfig, load_examples
from rrs.hooks import best_device, best_dtype, seeded

if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
    pytest.skip(f"torch {torch.__version__} has no backends in Python", allow_module_level=True)
if torch.accelerator.is_available():
    pytest.skip("a simulated device would hide the real one", allow_module_level=True)

import fake_device

HARMFUL, BENIGN = rows("harmful", 2), rows("benign", 2)
DEV = {"harmful": rows("harmful", 3)[2:], "benign": rows("benign", 3)[2:]}
CLIPS, LENGTH, STEPS = 4, 128, 4  # of the training set; prompts are shorter than that
CONFIG = RRSConfig(
    prompts=("Answer.", "Reply."), conditions=("audio-text", "text-only"), epochs=2, batch_size=2, accumulate=2,
    lora_r=4, learning_rate=1e-3, penalty=1e-3,
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of few examples, and of models that do not refuse


class Killed(Exception):  # noqa: N818
    pass


@pytest.fixture
def device():
    with fake_device.present() as here:
        yield here


def rrs_on(device: torch.device | str, name: str, dtype: torch.dtype) -> RRS:
    model, build_inputs = zoo.tiny(name)
    return RRS(model.to(device, dtype), zoo.TOKENIZER, CONFIG, build_inputs=build_inputs, verbose=False)


def by_us(passed: list[tuple[str, tuple[int, ...]]]) -> list[tuple[str, tuple[int, ...]]]:
    """What a line of our modules asked for, not one of the model's."""
    return [(site, shape) for site, shape in passed if Path(site.rpartition(":")[0]).parent == ROOT]


def test_it_behaves_like_one(device):
    """What the tests below rely on: mixing fails, values are counted on their way, gradients are right."""
    x, weight = torch.ones(2, 3).to(device), torch.full((3,), 2.0, device=device, requires_grad=True)
    assert best_device().type == x.device.type == device.type
    for mix in (lambda: x + torch.ones(3), lambda: torch.cat([x, torch.ones(1, 3)]), lambda: torch.ones(3)[x.long()]):
        with pytest.raises(RuntimeError, match="same device"):
            mix()
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        x.numpy()
    with fake_device.watched() as traffic:
        y = (x * weight * torch.tensor(3.0)).sum()  # a number from the host is welcome
        y.backward()
        x[0] += 1
        assert not traffic.reads
        assert not traffic.copies
        assert y.item() == 36
        assert weight.grad.tolist() == [6, 6, 6]
        assert bool((x == 2).any())
        assert x.cpu().sum() == 9
        assert x[x > 1].shape == (3,)
        assert torch.zeros(2, 3).copy_(x).sum() == 9
        assert [shape for _, shape in traffic.reads] == [(), (3,), (), (2, 3), (2, 3), (2, 3)]
        assert x[torch.tensor([1])].to(device).shape == (1, 3)
        x.copy_(torch.zeros(2, 3))
        assert [shape for _, shape in traffic.copies] == [(1,), (2, 3)]
    assert {Path(site.rpartition(":")[0]).name for site, _ in traffic.reads} == {"test_device.py"}


CASES = [
    ("qwen2_audio", torch.float32, True), ("qwen2_audio", torch.float32, False), ("qwen2_audio", torch.bfloat16, True),
    ("qwen3_omni_moe", torch.float32, True), ("qwen3_omni_moe", torch.bfloat16, True),
    ("gemma3n", torch.float32, True), ("gemma3n", torch.bfloat16, True),
]  # fmt: skip


@pytest.mark.parametrize(("name", "dtype", "fused"), CASES)
def test_the_whole_job(name, dtype, fused, device, tmp_path):
    """As on the CPU; in training one value is read back a step, and what is copied to the device is small."""
    rrs, seen = rrs_on(device, name, dtype), list[tuple[int, int]]()

    def kill(step):
        if step.step == 2:
            raise Killed

    def count(_step):
        seen.append((len(traffic.reads), len(traffic.copies)))

    rrs.model.generation_config.eos_token_id = list(range(zoo.VOCAB))  # any token ends an answer, to save time
    with fake_device.watched() as traffic, patch("rrs.has_fused_adamw", lambda _: fused):
        with pytest.raises(Killed):
            rrs.fit(HARMFUL, BENIGN, preflight=1, callbacks=[kill], checkpoint_dir=tmp_path / "c", checkpoint_every=1)
        rrs.fit(HARMFUL, BENIGN, callbacks=[count], checkpoint_dir=tmp_path / "c", checkpoint_every=STEPS, resume=True)
    assert all(p.device.type == device.type for p in (*rrs.model.parameters(), *rrs.lora.parameters()))

    (read, copied), (read_on, copied_on) = seen[-2:]  # of the last step: every instruction was there before
    assert len(traffic.reads[read:read_on]) == 1  # loss, penalty and norm, stacked
    assert len(by_us(traffic.reads[read:read_on])) == 1
    copies = traffic.copies[copied:copied_on]
    assert len(by_us(copies)) <= 6 * CONFIG.accumulate  # ids of prefix and rest, mask, ends, targets, weights
    features = rrs.render("x", HARMFUL[0]["audio"]["array"])["input_features"]
    assert max(torch.Size(shape).numel() for _, shape in copies) <= CONFIG.batch_size * LENGTH < features.numel()
    # Each clip goes there once, one of them again with each further text, and for answers that need the model's inputs.
    sent = [shape for _, shape in traffic.copies if len(shape) == 3]
    assert len(sent) == CLIPS + 1 + len(CONFIG.prompts) + (0 if rrs.reader.from_embeddings else 3)

    rrs.calibrate(DEV, ("audio-text",), budget=1.0, most=0.5, max_new_tokens=2)
    loaded = RRS.load(rrs.save(tmp_path / "adapter"), rrs.disable().model, zoo.TOKENIZER, build_inputs=rrs.render)
    assert all(torch.equal(a, rrs.lora.tensors()[name]) for name, a in loaded.lora.tensors().items())
    rrs.model.generation_config.eos_token_id = zoo.END
    assert len(loaded.evaluate(DEV, ("audio-text",), max_new_tokens=2, usefulness=1).answers) == 4

    plain = rrs_on("cpu", name, dtype).fit(HARMFUL, BENIGN, preflight=0)
    close = 0.05 if dtype == torch.bfloat16 else {"gemma3n": 1e-4}.get(name, 1e-6)
    assert [row["loss"] for row in rrs.history] == pytest.approx([row["loss"] for row in plain.history], rel=close)


def test_reading_prompts(device):
    """Of a new clip it is read back where the audio is, and whether its rows repeat; of anything known nothing."""
    rrs = rrs_on(device, "qwen2_audio", torch.float32)
    first, second = load_examples(HARMFUL)
    with torch.no_grad():
        for condition in ("audio-text", "text-only"):
            rrs.read(first, condition)
        for example, condition, reads in [
            (second, "audio-text", 2),
            (second, "audio-text", 0),
            (second, "text-only", 0),
        ]:
            with fake_device.watched() as traffic:
                prompts = [rrs.read(example, condition) for _ in range(2)]
            assert len(by_us(traffic.reads)) == reads, (condition, traffic.reads)
            assert reads or not traffic.copies
            assert all(prompt.ids.device.type == "cpu" for prompt in prompts)


def test_where_models_go(device, tmp_path):
    """Without being told: to the accelerator, in bfloat16; generators are of the device that draws."""
    model, processor = tiny_qwen2_audio()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    rrs = RRS.from_pretrained(tmp_path, CONFIG, verbose=False)
    assert (rrs.reader.device.type, rrs.reader.dtype) == (device.type, torch.bfloat16)
    rrs = RRS.from_pretrained(tmp_path, CONFIG, device="cpu", verbose=False)
    assert (rrs.reader.device.type, rrs.reader.dtype) == ("cpu", torch.float32)
    assert best_dtype(torch.device("mps")) == torch.float32
    asked = list[object]()
    with patch.object(torch, "Generator", lambda where: asked.append(where) or fake_device.SimGenerator(where)):
        a, b = (torch.rand(4, generator=seeded(1, "x", device=where)) for where in ("cpu", device))
    assert asked == ["cpu", device]
    assert torch.equal(a, b)


DEVICES = ("best_device", "best_dtype", "has_fused_adamw", "connect", "seeded")


@pytest.mark.parametrize("module", ["rrs.py", "hooks.py", "data.py", "evaluate.py"])
def test_no_kind_of_device_is_assumed(module):
    """The kinds' names stand in five functions of hooks.py and nowhere else."""
    kinds, found = {"cpu", "cuda", "mps", "xpu"}, list[str]()
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    allowed = {node for f in ast.walk(tree) if getattr(f, "name", "") in DEVICES for node in ast.walk(f)}
    for node in (node for node in ast.walk(tree) if node not in allowed):
        word = isinstance(node, ast.Constant) and str(node.value).partition(":")[0] in kinds
        call = isinstance(node, ast.Attribute) and (node.attr in kinds - {"cpu"} or ast.unparse(node) == "torch.cpu")
        if word or call:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    assert not found
