"""The paper's figure 2: where inputs lie before and after, harmful and harmless ones, as a map.

    add_maps(report, model, test, conditions)      # before write_page of review.py, whose page then has them
    plot_representations({"before": {"harmful": r_h, "benign": r_b}, "after": …}, "map.pdf")    # for a paper

A map shows the vectors that the head multiplies at the last token, on two principal components of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rrs import RRS, Report, grouped
from rrs.evaluate import shown


def add_maps(
    report: Report,
    model: RRS,
    groups: Mapping[str, Any],
    conditions: Sequence[str],
    stages: Mapping[str, Callable[[str], AbstractContextManager[RRS | None]]] | None = None,
    n: int = 32,
) -> None:
    """Puts a map of each condition into `report.maps`.

    Args:
        groups, conditions, stages: what `model.evaluate` was given.
        n: inputs of each group at most, spread over all.
    """
    groups = grouped(groups)
    stages = stages or {"before": lambda _: model.disabled(), "after": lambda _: nullcontext()}
    for condition in conditions:
        able = {group: [e for e in rows if e.has(condition)] for group, rows in groups.items()}
        some = {group: rows[:: -(-len(rows) // n)] for group, rows in able.items() if rows}
        panels = dict[str, dict[str, Tensor]]()
        for stage, state in stages.items():
            with state(condition) as other:
                who = other or model
                panels[stage] = {g: who.extract(rows, condition, vanilla=False) for g, rows in some.items()}
        if some:
            report.maps[condition] = project(panels)


def project(panels: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Coordinates `{panel: {group: [n, 2]}}` of vectors `{panel: {group: [n, hidden]}}`, one panel for each stage: two
    principal components, the same ones for all panels; a ValueError for fewer than two vectors."""
    parts = [x.float().cpu() for panel in panels.values() for x in panel.values()]
    if (count := sum(map(len, parts))) < 2:
        raise ValueError(f"A map takes two vectors or more; the panels {list(panels)} have {count}.")
    centred = torch.cat(parts) - torch.cat(parts).mean(0)
    axes = torch.linalg.svd(centred.double(), full_matrices=False).Vh[:2].float().T  # [hidden, 2]
    points = iter((centred @ axes).split([len(x) for x in parts]))
    return {panel: {group: next(points) for group in groups} for panel, groups in panels.items()}


def plot_representations(
    panels: Mapping[str, Mapping[str, Tensor]],
    path: str | Path,
    title: str = "",
    *,
    harmful: Collection[str] = ("harmful",),
) -> None:
    """The paper's representation map as a figure: a panel for each stage, the same axes (see `project`) for all.

    Args:
        panels: as `project` takes them.
        path: of the figure, e.g. a PNG or PDF.
        harmful: groups to draw in reds.

    Raises:
        ImportError: matplotlib is missing (`pip install "rrs[plot]"`).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('Plots need matplotlib: pip install "rrs[plot]" (or: pip install matplotlib).') from error
    points, colours = project(panels), dict[str, str]()
    for group in dict.fromkeys(group for sets in points.values() for group in sets):
        palette = ("C3", "C1", "C5") if group in harmful else ("C0", "C2", "C4", "C8", "C9")
        before = sum((other in harmful) == (group in harmful) for other in colours)
        colours[group] = palette[before % len(palette)]
    figure = Figure(figsize=(3.6 * len(points) + 0.6, 4.2), layout="constrained")
    grid = figure.subplots(1, len(points), sharex=True, sharey=True, squeeze=False)[0]
    names = {text: shown(text).replace("$", r"\$") for text in (*colours, *points, title)}  # no formulas
    for ax, (panel, sets) in zip(grid, points.items(), strict=True):
        ax.set_title(names[panel])
        for group, xy in sets.items():
            ax.scatter(*xy.T, s=16, alpha=0.7, linewidths=0, color=colours[group])
    handles = [grid[0].scatter([], [], color=colour) for colour in colours.values()]
    figure.legend(handles, [names[g] for g in colours], loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(names[title])
    figure.savefig(path, dpi=150)
