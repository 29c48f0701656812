"""CI runs what README tells users to run, and every extra."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
from conftest import ROOT

SCRIPT = ROOT / ".ci" / "run"
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = re.findall(r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n\n")[0], re.M)
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="CI's script is not part of the source distribution")


def commands(script=SCRIPT) -> list[str]:
    done = subprocess.run(["bash", script, "commands"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_the_commands_are_those_of_the_readme():
    quickstart, tests = commands()
    install, _, run = quickstart.partition(" && ")
    assert re.fullmatch(r'pip install -e "\.\[[\w,]+\]"', install)
    assert run == "python examples/quickstart.py --out out"  # what CI adds to goes last
    assert tests == 'pip install -e ".[test]" && python -m pytest'
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for command in (quickstart, tests):
        assert sum(line.partition("    #")[0].rstrip() == command for line in readme) == 1
    named = {extra for command in (quickstart, tests) for extra in re.search(r"\[(.*)\]", command)[1].split(",")}
    assert named <= set(EXTRAS)


def test_only_the_first_block_under_its_heading_is_read(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(SCRIPT, tmp_path / ".ci")
    readme = """
        # A
        ```bash
        not this
        ```
        ## Two commands on a fresh machine
        ```python
        nor_this()
        ```
        ```bash
        first --out "a#b" && second    # and why
        third
        ```
        ```bash
        nor this
        ```
        ## More
        ```bash
        nor that
        ```
    """
    (tmp_path / "README.md").write_text(re.sub("^ {8}", "", readme, flags=re.M))
    assert commands(tmp_path / ".ci" / "run") == ['first --out "a#b" && second', "third"]


def test_every_extra_has_a_part():
    """`test` is README's second command; the others are run by themselves."""
    assert EXTRAS
    (parts,) = re.findall(r"^\[ \$# -gt 0 \] \|\| parts=\((.*)\)$", SCRIPT.read_text(encoding="utf-8"), re.M)
    assert set(parts.split()) == {"quickstart", "newest", "oldest"} | set(EXTRAS) - {"test"}
    assert parts.split()[-1] == "oldest"  # the last lines are those of pytest


def test_a_part_that_fails_fails_the_script():
    done = subprocess.run(["bash", SCRIPT, "no-such-part", "commands"], capture_output=True, text=True)
    assert done.returncode
    assert "pip install" not in done.stdout


def test_transformers_is_not_capped():
    """What users get is what is tested: the newest release that pip finds."""
    asked = re.findall(r'"(transformers[^"]*)"', PROJECT)
    assert len(asked) == 1
    assert re.fullmatch(r"transformers>=[\d.]+", asked[0])


def test_the_hosted_workflow_calls_the_same_script():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert re.findall(r"^ +- run: (.*)$", workflow, re.M) == [".ci/run"]
