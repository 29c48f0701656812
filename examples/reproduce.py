"""Does a recorded run come out the same, here and now? Runs its command again; compares weights and verdicts.

    python examples/reproduce.py out                 # a folder of quickstart.py, train.py or evaluate.py
    python examples/reproduce.py out --again again   # where the second run goes; default: out-again

It works for any script with `--out FOLDER` that adds `origin()` to the settings of what `RRS.evaluate` gave and saves
it there, `report.save(FOLDER)`, and, if it trains, `model.save(FOLDER / "adapter")`. The settings hold versions, and
hashes of model and questions; by `origin` also the command (`sys.argv`), its working directory, hashes of the files
among its arguments, and what of the machine matters.

Exit status: 0 for the same, 1 for different, 2 if it can't be run again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rrs import Report, versions
from rrs.evaluate import shown
from rrs.hooks import best_device


def origin() -> dict[str, Any]:
    """What it takes to run this process again: command, folder, files and adapters it names; facts of the machine."""
    words = dict.fromkeys(word.rpartition("=")[2] for word in sys.argv[1:])
    names = [os.path.join(w, "adapter_model.safetensors") if os.path.isdir(w) else w for w in words]
    files = [n for n in names if os.path.isfile(n) and os.access(n, os.R_OK) and os.path.getsize(n) < 2**30]
    machine = {
        "python": platform.python_version(), "system": platform.system(), "threads": torch.get_num_threads(),
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "device": best_device().type,
    }  # fmt: skip
    hashes = {n: hashlib.sha256(Path(n).read_bytes()).hexdigest() for n in files}
    return {"command": sys.argv, "folder": os.getcwd(), "files": hashes, "machine": machine}


NEEDS = ("command", "folder", "files", "versions", "machine", "data", "model")


class Lost(Exception):  # noqa: N818
    """Why the run can't be done again."""


def differences(what: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each name whose values differ."""
    names = [name for name in dict.fromkeys([*then, *now]) if then.get(name) != now.get(name)]
    return [shown(f"{what} {name}: {then.get(name)} then, {now.get(name)} now") for name in names]


def command_again(settings: Mapping[str, Any], out: Path) -> list[str]:
    """The recorded command with another `--out`; `Lost` where its script, a file or `--out` is not as it was."""
    folder, words = Path(settings["folder"]), list(settings["command"])
    if lost := [str(folder / name) for name in (*words[:1], *settings["files"]) if not (folder / name).is_file()]:
        raise Lost(f"no longer there: {', '.join(lost)}")
    for name, digest in settings["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise Lost(f"{folder / name} has changed since; restore it")
    at = next((i for i, word in enumerate(words) if word.partition("=")[0] == "--out"), None)
    if at is None:
        raise Lost(f"the command has no --out to put another folder in: {' '.join(words)}")
    return [*words[:at], f"--out={out}", *words[at + (2 if words[at] == "--out" else 1) :]]


def weights(folder: Path) -> str | None:
    """The hash of an adapter's tensors, which RRS keeps with them; the file's own depends on their order."""
    path = folder / "adapter" / "adapter_model.safetensors"
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return str((file.metadata() or {}).get("sha256"))


def compared(first: Path, second: Path) -> tuple[bool, list[str]]:
    """Whether two folders have the same weights and verdicts, and what to say of it."""
    old, new = Report.load(first), Report.load(second)
    data, model = (differences(k, old.settings[k], new.settings[k]) for k in ("data", "model"))
    hashes = weights(first), weights(second)
    lines = [*data, *model, f"weights: {'the same' if hashes[0] == hashes[1] else 'different'} ({hashes[0]})"]
    verdicts = [{a.key: a.verdict for a in report.answers} for report in (old, new)]
    keys = dict.fromkeys([*verdicts[0], *verdicts[1]])
    other = [key for key in keys if verdicts[0].get(key) != verdicts[1].get(key)]
    named = differences(" ", *({", ".join(key): said.get(key) for key in other[:5]} for said in verdicts))
    return hashes[0] == hashes[1] and not other, [*lines, f"verdicts: {len(other)} of {len(keys)} differ", *named]


def reproduce(folder: Path, again: Path) -> bool:
    """Runs it once more and prints how it compares."""
    try:
        settings = Report.load(folder).settings
    except ValueError as error:
        raise Lost(str(error)) from None
    if missing := [name for name in NEEDS if name not in settings]:
        raise Lost(f"{folder / 'report.json'} has no record of its run: {', '.join(missing)} missing")
    if again.exists():
        raise Lost(f"{again} is there already; choose another --again")
    command = command_again(settings, again.resolve())
    threads = settings["machine"]["threads"]  # the second run has as many
    told = differences("version", settings["versions"], versions())
    told += differences("machine", settings["machine"], {**origin()["machine"], "threads": threads})
    print(*told or ["versions and machine are as recorded"], sep="\n", flush=True)
    env = os.environ | {"OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, *command], cwd=settings["folder"], env=env, check=False)
    if done.returncode:
        raise Lost(f"the command ended with status {done.returncode}")
    same, lines = compared(folder, again)
    print(*lines, "SAME" if same else "DIFFERENT", sep="\n")
    return same


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the first run")
    parser.add_argument("--again", type=Path, help="new folder for the second one")
    args = parser.parse_args()
    try:
        sys.exit(not reproduce(args.folder, args.again or Path(f"{args.folder}-again")))
    except Lost as error:
        parser.error(f"{error}.")


if __name__ == "__main__":
    main()
