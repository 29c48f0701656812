"""Maps the flat files into the package `rrs` when a wheel is built; an editable install uses the files in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class FlatLayout(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":  # never in an editable wheel: copies there would go stale
            build_data["force_include"] |= {"rrs.py": "rrs/__init__.py"} | {
                f"{name}.py": f"rrs/{name}.py" for name in ("hooks", "data", "evaluate")
            }
            marker = Path(self.directory) / "py.typed"  # the annotations are for type checkers (PEP 561)
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
            build_data["force_include"][str(marker)] = "rrs/py.typed"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        (Path(self.directory) / "py.typed").unlink(missing_ok=True)  # only wheels and the like stay in dist/
