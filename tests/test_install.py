"""The ways to use the package: a wheel, an editable install, a copy in another repository."""

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
SIBLINGS = FILES[1:]

# What must hold in each: all four modules are of one folder, beside other modules called evaluate, data and hooks.
PROGRAM = """
import sys, pathlib, warnings
warnings.simplefilter("error", DeprecationWarning), warnings.simplefilter("error", ImportWarning)
import rrs, rrs.hooks, rrs.data, rrs.evaluate
from rrs import RRS, RRSConfig, capture, select_features
from rrs.hooks import locate
home = pathlib.Path(rrs.__file__).resolve().parent
for module in (rrs.hooks, rrs.data, rrs.evaluate):
    assert pathlib.Path(module.__file__).resolve().parent == home, module
assert capture is rrs.hooks.capture and RRS.__module__ == "rrs"
assert {m for m in sys.modules if m.partition(".")[0] == "rrs"} == {"rrs", "rrs.data", "rrs.hooks", "rrs.evaluate"}
import evaluate, data, hooks
assert {m.WHOSE for m in (evaluate, data, hooks)} == {"another repository"}
print(home)
"""


def python(program: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a program in a fresh interpreter that finds modules in its folder, `path` and site-packages."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    script = cwd / "program.py"
    script.write_text(program)
    return subprocess.run([sys.executable, str(script)], cwd=cwd, env=env, capture_output=True, text=True)


def run(path: list[Path], cwd: Path) -> Path:
    """Runs PROGRAM in a repository that has modules called data, hooks and evaluate; the folder that rrs came from."""
    for name in SIBLINGS:
        (cwd / name).write_text('WHOSE = "another repository"\n')
    done = python(PROGRAM, path, cwd)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def copy(to: Path, names: dict[str, str]) -> Path:
    to.mkdir(parents=True)
    for name, new in names.items():
        shutil.copy(ROOT / name, to / new)
    return to


AS_PACKAGE = {name: name for name in SIBLINGS} | {"rrs.py": "__init__.py"}


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


@pytest.fixture(scope="module")
def installed(wheels, tmp_path_factory) -> Path:
    """A folder of installed packages that holds RRS, as pip unpacks its wheel."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheels["standard"]) as wheel:
        wheel.extractall(site)
    return site


def test_no_marker_is_left_beside_the_wheel(wheels):
    assert [p.name for p in wheels["standard"].parent.iterdir() if p.is_file()] == [wheels["standard"].name]


def test_wheel(installed, tmp_path):
    names = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file() and ".dist-info" not in str(p)}
    names = {name for name in names if "__pycache__" not in name}
    assert names == {"rrs/__init__.py", "rrs/hooks.py", "rrs/data.py", "rrs/evaluate.py", "rrs/py.typed"}
    assert run([installed], tmp_path) == installed / "rrs"


def test_editable_holds_no_copies(wheels, tmp_path):
    with zipfile.ZipFile(wheels["editable"]) as wheel:
        names = [n for n in wheel.namelist() if ".dist-info" not in n]
        (pth,) = names
        target = Path(wheel.read(pth).decode().strip())
    assert pth.endswith(".pth")
    assert run([target], tmp_path) == wheels["source"]


def test_a_copy_in_a_folder_of_its_own_beside_foreign_modules_and_an_installed_rrs(installed, tmp_path):
    """The way that the README names."""
    copy(tmp_path / "rrs", AS_PACKAGE)
    assert run([installed], tmp_path) == tmp_path / "rrs"


def test_a_flat_copy_alone(tmp_path):
    """Found by an odd spelling of its path."""
    copy(tmp_path / "lib", {name: name for name in FILES})
    (tmp_path / "work").mkdir()
    assert run([tmp_path / "work" / ".." / "lib"], tmp_path / "work") == tmp_path / "lib"


def test_under_another_name_it_uses_its_own_siblings(installed, tmp_path):
    """`from lib.rrs import RRS`, beside foreign modules: nothing of the installed RRS is touched."""
    copy(tmp_path / "lib", {name: name for name in FILES})
    copy(tmp_path / "libs" / "rrs", AS_PACKAGE)
    for name in SIBLINGS:
        (tmp_path / name).write_text("raise RuntimeError('a foreign module')\n")
    program = """
import pathlib, sys
import lib.rrs, libs.rrs
for package in ("lib", "libs", "rrs"):
    modules = [m for name, m in sys.modules.items() if name.split(".")[0] == package and getattr(m, "__file__", None)]
    print(len(modules), *{pathlib.Path(m.__file__).parent for m in modules})
"""
    done = python(program, [installed], tmp_path)
    assert done.stdout.split() == ["4", str(tmp_path / "lib"), "4", str(tmp_path / "libs" / "rrs"), "0"], done.stderr


def test_parts_of_two_copies_are_an_error_that_says_so(installed, tmp_path):
    copy(tmp_path / "alone", {"rrs.py": "rrs.py", "hooks.py": "hooks.py"})  # the rest is installed
    # a package without __init__.py takes modules from every folder of its name
    copy(tmp_path / "a" / "lib", {name: name for name in SIBLINGS})
    copy(tmp_path / "b" / "lib", {name: name for name in FILES})
    program = """
import importlib
for name in ("rrs", "lib.rrs"):
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(error)
"""
    done = python(program, [tmp_path / "alone", tmp_path / "a", tmp_path / "b", installed], tmp_path)
    first, second = done.stdout.splitlines()
    assert first == "No module named 'rrs.data'", done.stderr
    path, other = tmp_path / "a" / "lib" / "data.py", tmp_path / "b" / "lib" / "rrs.py"
    assert second.startswith(f"{path} is of another copy than {other}; copy all four files"), done.stderr
