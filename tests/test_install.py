"""The three ways to use the package: a wheel, an editable install, files copied into another repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).resolve().parent.parent
FILES = ("rrs.py", "hooks.py", "data.py", "evaluate.py")

# What must hold in each of them: the siblings are ours, also beside packages that are called evaluate, data and hooks.
PROGRAM = """
import sys, pathlib
import rrs, rrs.hooks, rrs.data, rrs.evaluate
from rrs import RRS, RRSConfig, select_features
from rrs.hooks import locate, capture
from rrs.evaluate import judge_refusals
home = pathlib.Path(rrs.__file__).resolve().parent
for module in (rrs.hooks, rrs.data, rrs.evaluate):
    assert pathlib.Path(module.__file__).resolve().parent == home, module
import evaluate
assert evaluate.WHOSE == "another package", evaluate
print(home)
"""


def run(path: list[Path], cwd: Path) -> Path:
    """Run PROGRAM in a fresh interpreter that finds modules in `path` only (and in site-packages)."""
    others = cwd / "others"
    others.mkdir(exist_ok=True)
    for name in ("evaluate", "data", "hooks"):
        (others / f"{name}.py").write_text('WHOSE = "another package"\n')
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, [others, *path]))
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    """A standard and an editable wheel, built from a copy of the sources by the project's own build backend."""
    source = tmp_path_factory.mktemp("source")
    for name in (*FILES, "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    out = tmp_path_factory.mktemp("wheels")
    here = Path.cwd()
    os.chdir(source)
    try:
        return {
            "source": source,
            "standard": out / build.build_wheel(str(out)),
            "editable": Path(out, "e", build.build_editable(str(out / "e"))),
        }
    finally:
        os.chdir(here)


def test_no_marker_is_left_beside_the_wheel(wheels):
    assert [p.name for p in wheels["standard"].parent.iterdir() if p.is_file()] == [wheels["standard"].name]


def test_wheel(wheels, tmp_path):
    with zipfile.ZipFile(wheels["standard"]) as wheel:
        names = {n for n in wheel.namelist() if ".dist-info" not in n}
        wheel.extractall(tmp_path / "site")
    assert names == {"rrs/__init__.py", "rrs/hooks.py", "rrs/data.py", "rrs/evaluate.py", "rrs/py.typed"}
    assert run([tmp_path / "site"], tmp_path) == tmp_path / "site" / "rrs"


def test_editable_holds_no_copies(wheels, tmp_path):
    with zipfile.ZipFile(wheels["editable"]) as wheel:
        names = [n for n in wheel.namelist() if ".dist-info" not in n]
        (pth,) = names
        target = Path(wheel.read(pth).decode().strip())
    assert pth.endswith(".pth")
    assert run([target], tmp_path) == wheels["source"]


def test_copied_files(tmp_path):
    (tmp_path / "repo").mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / "repo")
    assert run([tmp_path / "repo"], tmp_path) == tmp_path / "repo"
