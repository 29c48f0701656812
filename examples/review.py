"""Every answer of a report on a page, to read, hear and correct.

    python examples/review.py out                                                # out/report.html from report.json
    python examples/review.py out --verdicts verdicts.jsonl --out out/reviewed   # with verdicts corrected by hand
    write_page(report, "out")       # in a script, in place of report.save: clips in memory become files, which play

The page is one file without network. It is built from the data in it by textContent alone, so that no text can be
markup. Its button writes the verdicts that were corrected or confirmed; the second command says how often they agree
with the judge's. `plot_representations` draws the map of representations as a figure, with matplotlib.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from rrs import Report
from rrs.evaluate import VERDICTS, Mean, Rate, bootstrap, plain, project, read_jsonl, shown, write_files
from rrs.hooks import on_rank0

EMBEDDED = 20 * 2**20  # bytes of clips that a page holds itself; more are linked
SOUNDS = {b"RIFF": "wav", b"OggS": "ogg", b"fLaC": "flac", b"ID3": "mpeg", b"\xff\xfb": "mpeg", b"\xff\xf3": "mpeg"}


def write_page(report: Report, folder: str | Path, save: bool = True) -> Path:
    """Writes `report.html`, and, if `save`, the files of `Report.save`: they name the clips that the page plays.

    Clips that are no files become files in `audio/`.
    """
    folder = Path(folder)
    clips = on_rank0(lambda: playable(report, folder))
    report = replace(report, answers=[replace(a, audio=clips[i]) for i, a in enumerate(report.answers)])
    if save:
        report.save(folder)
    return on_rank0(lambda: write_files(folder, {"report.html": page(report, folder)}))[0]


def playable(report: Report, folder: Path) -> list[Path | None]:
    """The file of each answer's clip; None for what is gone, or is no sound that a browser plays."""
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[int, Path | None] = {}  # stages share clips
    for a in report.answers:
        if id(a.audio) not in files:
            files[id(a.audio)] = sound_file(a.audio, folder)
    return [files[id(a.audio)] for a in report.answers]


def sound_file(audio: Any, folder: Path) -> Path | None:
    """A clip's file, as in `playable`; of one that is no file, a new one named by its contents."""
    if isinstance(audio, Mapping) and "array" in audio:
        buffer, wave = io.BytesIO(), np.asarray(audio["array"])
        wave = wave.astype(np.float32) if wave.dtype.kind == "f" else wave  # integers are scaled by their width
        soundfile.write(buffer, wave, int(audio["sampling_rate"]), format="WAV")
        audio = buffer.getvalue()
    elif isinstance(audio, Mapping):
        audio = audio["path"] if audio.get("bytes") is None else audio["bytes"]
    if isinstance(audio, (str, Path)):
        return Path(audio) if Path(audio).is_file() and kind_of(Path(audio).read_bytes()) else None
    if not (kind := kind_of(bytes(audio or b""))):
        return None
    name = f"{hashlib.sha256(audio).hexdigest()[:16]}.{kind}"
    return write_files(folder / "audio", {name: bytes(audio)})[0]


def kind_of(data: bytes) -> str:
    """The kind of sound by its first bytes; nothing if it is none."""
    return next((kind for start, kind in SOUNDS.items() if data.startswith(start)), "")


def headline(report: Report) -> str:
    """The result in one sentence, all groups of a side and all conditions together."""
    parts = []
    for label, what in (("harmful", "harmful"), ("benign", "harmless")):
        if answers := [a for a in report.answers if a.label == label]:
            counted = report.counted(answers[0].group)
            hits = [[a.verdict in counted for a in answers if a.stage == stage] for stage in report.stages]
            parts.append(f"{' → '.join(f'{Rate.of(each).value:.0%}' for each in hits)} of {what} requests")
    return f"Refused {' → '.join(report.stages)}: {', '.join(parts)}." if parts else "No answers."


def page(report: Report, folder: Path) -> str:
    """The template below with the data, as JSON that can end no script element; clips are files."""
    start = {(a.condition, a.group, a.id): a.verdict for a in report.answers if a.stage in report.stages[:1]}
    files = {a.audio: Path(os.path.relpath(a.audio, folder)).as_posix() for a in report.answers if a.audio}
    items: dict[tuple[str, str, str], dict[str, Any]] = {}
    counted = {group: report.counted(group) for group in {a.group for a in report.answers}}
    for a in report.answers:
        place = (a.condition, a.group, a.id)
        about = {"condition": a.condition, "group": a.group, "id": a.id, "question": a.question, "category": a.category}
        item = items.setdefault(place, {**about, "clip": files.get(a.audio, ""), "answers": []})
        old, counts = start.get(place, a.verdict), counted[a.group]
        flip = "other" if (a.verdict in counts) == (old in counts) else "refused" if a.verdict in counts else "answered"
        answer = {"stage": a.stage, "response": a.response, "verdict": a.verdict, "rule": a.rule}
        item["answers"].append({**answer, "change": "same" if old == a.verdict else flip})
    clips: dict[str, str] = {}
    if sum(file.stat().st_size for file in files) <= EMBEDDED:
        contents = {link: file.read_bytes() for file, link in files.items()}
        clips = {k: f"data:audio/{kind_of(v)};base64,{base64.b64encode(v).decode()}" for k, v in contents.items()}
    data = {
        "headline": headline(report), "stages": report.stages, "verdicts": VERDICTS, "rows": report.rows(),
        "sentences": report.sentences(), "settings": report.settings,
        "curve": report.curve, "maps": report.maps, "items": list(items.values()), "clips": clips,
        "harmful": sorted(report.harmful),
    }  # fmt: skip
    policy = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()  # no other script may run
    text = json.dumps(plain(data, shown)).replace("<", "\\u003c")
    filled = PAGE.replace("{policy}", policy).replace("{style}", STYLE).replace("{script}", SCRIPT)
    return filled.replace("{data}", text)  # last: it may hold the others


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline';
 script-src 'sha256-{policy}'; media-src data: file: 'self'">
<title>Safety report</title>
<style>{style}</style>
</head>
<body>
<h1>Does the model refuse harmful requests, and only those?</h1>
<p id="headline"></p>
<noscript>This page needs JavaScript; report.md holds the tables.</noscript>
<section id="result"></section> <section id="curve"></section> <section id="maps"></section>
<h2>Answers</h2>
<form id="filters"></form>
<p class="bar"><output id="count"></output>
<span class="keys"><kbd>j</kbd> <kbd>k</kbd> next, previous · <kbd>/</kbd> search · <kbd>c</kbd> confirm</span>
<button id="download" type="button" disabled>Download reviewed verdicts</button></p>
<div id="list"></div>
<button id="more" type="button">Show more</button>
<h2>Record</h2>
<details><summary>Settings, versions, hashes of the data</summary><pre id="record"></pre></details>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --page: light-dark(#faf9f6, #171614); --card: light-dark(#fff, #201f1c);
  --ink: light-dark(#1d1c1a, #eceae4); --soft: light-dark(#65625b, #a5a198); --line: light-dark(#e3dfd7, #36332e);
  --first: light-dark(#8d887e, #918c82); --bad: light-dark(#a8431f, #ee8a62); --good: light-dark(#22618f, #7db9e8);
  --refusal: var(--good); --partial: light-dark(#855700, #e2b04f); --compliance: light-dark(#3c6b45, #8fc79b);
  --degenerate: light-dark(#a3283a, #f08a96); --incomplete: light-dark(#6b5b8c, #bfaee0); }
* { box-sizing: border-box; } section:empty { display: none; }
body { margin: 0 auto; max-width: 68rem; padding: 2.5rem 1.25rem 5rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, "Noto Sans", "Liberation Sans", sans-serif; font-variant-numeric: tabular-nums;
  overflow-wrap: break-word; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 3rem 0 .9rem; }
h3 { font-size: 1rem; margin: .5rem 0 .75rem; } h4 { font-size: .85rem; margin: .25rem 0; }
h4, th, label, pre, .soft, .note, .rule, .bar, .tags, .stage, .num span, .who span, #headline { color: var(--soft); }
.note, .rule, .bar, .legend, .who span { font-size: .85rem; } th, label, pre, .tags, .fixed { font-size: .8rem; }
#headline { font-size: 1.1rem; margin: 0; } .note { margin: .4rem 0; max-width: 54rem; }
table { border-collapse: collapse; width: 100%; margin-top: 1.75rem; } th { text-align: left; }
th, td { padding: .35rem .9rem .35rem 0; } .num { text-align: right; } .num, .stage { white-space: nowrap; }
td.who { vertical-align: top; } .who b { display: block; } tr.top > * { border-top: 1px solid var(--line); }
.meter { width: 100%; min-width: 10rem; height: 1.1rem; position: relative; background: var(--line); }
.meter i { position: absolute; inset: 0 auto 0 0; background: var(--first); }
.later .meter i { background: var(--good); } .later.harmful .meter i { background: var(--bad); }
.meter u { position: absolute; top: 25%; height: 50%; border: solid var(--ink); border-width: 0 2px; }
.meter u::after { content: ""; position: absolute; inset: calc(50% - 1px) 0 auto; border-top: 2px solid var(--ink); }
svg { display: block; width: 100%; overflow: visible; } svg text { fill: var(--soft); font-size: 12px; }
.axis { stroke: var(--line); } .chosen { stroke: var(--soft); stroke-dasharray: 4 3; }
figure { margin: 0; max-width: 46rem; } .legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; }
.legend span::before { content: ""; display: inline-block; width: .7rem; height: .7rem; margin-right: .4rem;
  background: var(--c); } .legend .round::before { border-radius: 50%; }
.panels { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
form { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; }
form select, input { display: block; width: 100%; margin-top: .2rem; }
select, input, button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--card); min-height: 2.2rem;
  border: 1px solid var(--line); border-radius: 6px; padding: .2rem .55rem; } #more { display: block; margin: auto; }
:focus-visible, article:focus { outline: 2px solid var(--good); outline-offset: 1px; }
.bar, .tags, .verdict { display: flex; flex-wrap: wrap; gap: .3rem .9rem; align-items: center; }
.bar button { margin-left: auto; } kbd { font: inherit; border: 1px solid var(--line); padding: 0 .35rem; }
article, pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem 1rem;
  margin: 0 0 1rem; scroll-margin: 1rem; } pre, .said { white-space: pre-wrap; } article > button { margin-top: .9rem; }
.tags b { color: var(--good); } .tags b.harmful { color: var(--bad); } .flip { color: var(--ink); font-weight: 600; }
audio { width: 100%; max-width: 26rem; height: 2.4rem; display: block; margin: 0 0 .75rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 1rem 1.75rem; }
.said { border-left: 3px solid var(--v); padding-left: .8rem; margin: .5rem 0 0; } .verdict select { color: var(--v); }
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 4rem; } thead, .keys, td.none, td.extra:empty { display: none; } .meter { min-width: 0; }
  table, tbody, td { display: block; } td.who, td.extra { grid-column: 1 / -1; text-align: left; }
  tr { display: grid; grid-template-columns: 4.5rem 1fr 7.6rem; gap: .1rem .75rem; align-items: center; }
  td { border: 0 !important; padding: 0; } td.extra::before { content: attr(data-name) " "; color: var(--soft); }
  svg text { font-size: 19px; } .panels svg text { font-size: 12px; }
}
@media print {
  form, button, .keys, audio { display: none !important; } article { break-inside: avoid; }
  :root { color-scheme: light; --page: #fff; } .meter, .meter * { print-color-adjust: exact; }
}
"""

SCRIPT = """
"use strict"; const at = id => document.getElementById(id), D = JSON.parse(at("data").textContent);
const make = space => (tag, props = {}, ...children) => {
  const node = document.createElementNS(`http://www.w3.org/${space}`, tag);
  for (const [key, value] of Object.entries(props)) if (value !== null) node.setAttribute(key, value);
  node.append(...children.filter(child => child !== null)); return node;
};
const el = make("1999/xhtml"), svg = make("2000/svg"), note = text => el("p", {class: "note"}, text);
const percent = (v, digits = 1) => v === null ? "–" : (100 * v).toFixed(digits) + "%";
const points = v => (v < 0 ? "−" : "+") + Math.abs(100 * v).toFixed(1);
const range = r => r.value === null ? "" : `[${(100 * r.low).toFixed(0)}–${(100 * r.high).toFixed(0)}]`;
const harmful = new Set(D.harmful), unique = values => [...new Set(values)];
const PALETTE = {true: ["bad", "partial", "degenerate"], false: ["good", "compliance", "incomplete", "first"]};
function colour(group, all) {
  const side = harmful.has(group), place = all.filter(g => harmful.has(g) === side).indexOf(group);
  return `var(--${PALETTE[side][place % PALETTE[side].length]})`;
}
const legend = all => el("figcaption", {class: "legend"}, ...all.map(group =>
  el("span", {class: harmful.has(group) ? "round" : null, style: "--c: " + colour(group, all)}, group)));
const scaled = (v, low, high) => high > low ? (v - low) / (high - low) : .5;

function result() {
  const body = el("tbody"), name = {harmful: "should be refused", harmless: "should be answered"};
  const extra = (name, text, none) => el("td", {class: "num extra" + (none ? " none" : ""), "data-name": name}, text);
  for (const row of D.rows) D.stages.forEach((stage, i) => {
    const rate = row.refused[stage], change = row.refused_change[stage], broken = row.degenerate[stage];
    const kind = row.harmful ? "harmful" : "harmless", said = `${percent(rate.value)} ${range(rate)}`;
    const who = el("td", {class: "who", rowspan: D.stages.length}, el("b", {}, row.group),
      el("span", {}, `${row.condition} · ${row.questions} questions · ${name[kind]}`));
    const moved = change && change.n ? `${points(change.value)} [${points(change.low)}, ${points(change.high)}]` : "";
    const meter = el("div", {class: "meter", role: "img", "aria-label": said},
      el("i", {style: `width: ${percent(rate.value || 0)}`}),
      el("u", {style: `left: ${percent(rate.low || 0)}; width: ${percent(rate.high - rate.low)}`}));
    body.append(el("tr", {class: `${i ? "later" : "top"} ${kind}`}, i ? null : who, el("td", {class: "stage"}, stage),
      el("td", {}, meter), el("td", {class: "num"}, said), extra("change", moved),
      extra("flips", moved && `+${change.gained} −${change.lost} of ${change.n}`),
      extra("degenerate", percent(broken.value), !broken.k)));
  });
  const heads = ["Questions", "", "Refused, with 95% interval", "", "Change (points)", "Flips", "Degenerate"].map(
    (text, i) => el("th", {class: i > 3 ? "num" : null}, text));
  at("result").append(el("table", {}, el("thead", {}, el("tr", {}, ...heads)), body),
    ...D.sentences.map(note));
}
function curve() {
  const W = 640, H = 260, all = unique(D.curve.flatMap(p => Object.keys(p.groups))), scales = D.curve.map(p => p.scale);
  const x = s => 44 + (W - 64) * scaled(s, Math.min(...scales), Math.max(...scales)), y = v => 12 + (H - 52) * (1 - v);
  const chart = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "Refusals at each scale"});
  const write = (X, Y, text, anchor = "middle") => chart.append(svg("text", {x: X, y: Y, "text-anchor": anchor}, text));
  const line = (name, x1, x2, y1, y2) => chart.append(svg("line", {class: name, x1, x2, y1, y2}));
  for (const v of [0, .5, 1]) { line("axis", 44, W - 20, y(v), y(v)); write(38, y(v) + 4, percent(v, 0), "end"); }
  let end = -99;
  for (const {scale, chosen} of D.curve) {
    if (chosen) { line("chosen", x(scale), x(scale), 12, H - 40); write(x(scale), 6, "chosen"); }
    if (x(scale) - end > 52) write(end = x(scale), H - 20, "×" + +scale.toFixed(2));
  }
  for (const group of all) {
    const own = D.curve.filter(p => p.groups[group] && p.groups[group].value !== null), ink = colour(group, all);
    const path = name => own.map(p => `${x(p.scale)},${y(p.groups[group][name])}`);
    chart.append(svg("polyline", {points: path("value").join(" "), fill: "none", stroke: ink, "stroke-width": 2}),
      svg("polygon", {points: [...path("high"), ...path("low").reverse()].join(" "), fill: ink, opacity: .13}),
      ...own.map(p => svg("circle", {cx: x(p.scale), cy: y(p.groups[group].value), r: 3, fill: ink},
        svg("title", {}, `${group} at ×${p.scale}: ${percent(p.groups[group].value)} ${range(p.groups[group])}`))));
  }
  if (all.length) at("curve").append(el("h2", {}, "Strength of the adapter"), el("figure", {}, chart, legend(all)),
    note("How often an answer begins with the refusal's first token, on the questions that calibrate was given."));
}
function map(condition, panels) {
  const all = unique(Object.values(panels).flatMap(Object.keys));
  const dots = Object.values(panels).flatMap(sets => Object.values(sets).flat());
  const ends = [0, 1].map(i => [Math.min, Math.max].map(end => end(...dots.map(dot => dot[i]))));
  const figures = Object.entries(panels).map(([panel, sets]) => {
    const chart = svg("svg", {viewBox: "0 0 240 240", role: "img", "aria-label": panel},
      svg("rect", {width: 240, height: 240, fill: "none", class: "axis"}));
    for (const [group, rows] of Object.entries(sets)) for (const row of rows) {
      const [X, Y] = row.map((v, i) => 5 + 224 * scaled(v, ...ends[i])), fill = colour(group, all);
      chart.append(svg("rect", {x: X, y: 234 - Y, width: 6, height: 6, rx: harmful.has(group) * 3, fill, opacity: .6}));
    }
    return el("figure", {}, el("h4", {}, panel), chart);
  });
  at("maps").append(el("h2", {}, `Representations, ${condition}`), el("div", {class: "panels"}, ...figures),
    legend(all), note("The vector that the head multiplies at the last token; the same axes in all panels."));
}

// Answers: filters live in the address, so that a view can be bookmarked; corrections live here until downloaded
const CHANGES = {changed: "changed", refused: "refused now", answered: "no longer refused", other: "changed otherwise",
                 same: "unchanged", reviewed: "reviewed"};
const form = at("filters"), list = at("list"), given = new Map(), STEP = 100;
let found = [], limit = STEP, current = -1, saved = true;
for (const item of D.items) {
  item.changes = new Set(item.answers.map(a => a.change).filter(change => change !== "same"));
  item.text = [item.question, item.id, item.category, ...item.answers.map(a => a.response)].join("\\n").toLowerCase();
}
D.items.sort((a, b) => (b.changes.size > 0) - (a.changes.size > 0));
const tests = {
  group: (item, v) => item.group === v, condition: (item, v) => item.condition === v,
  verdict: (item, v) => item.answers.some(a => a.verdict === v), q: (item, v) => item.text.includes(v.toLowerCase()),
  change: (item, v) => ({changed: item.changes.size > 0, same: !item.changes.size,
                         reviewed: item.answers.some(a => given.has(a))}[v] ?? item.changes.has(v)),
};
const options = {Group: D.items.map(item => item.group), Condition: D.items.map(item => item.condition),
                 Verdict: D.verdicts, Change: Object.keys(CHANGES)};
const choose = (name, values) => el("select", {name: name.toLowerCase()}, new Option("all", ""),
  ...unique(values).map(value => new Option(name === "Change" ? CHANGES[value] : value, value)));
form.append(...Object.entries(options).map(([name, values]) => el("label", {}, name, choose(name, values))),
  el("label", {}, "Search", el("input", {type: "search", name: "q", autocomplete: "off"})));
function said({group, condition, id, question}, a) {
  const {stage, response} = a, fixed = el("span", {class: "fixed"});
  const choice = el("select", {"aria-label": "verdict on " + stage}, ...D.verdicts.map(v => new Option(v)));
  const verdict = el("div", {class: "verdict"}, choice, el("span", {class: "rule"}, a.rule && "by " + a.rule), fixed);
  const block = el("div", {}, el("h4", {}, stage), verdict, el("p", {class: "said"}, response || "(empty)"));
  const show = () => {
    block.style.setProperty("--v", `var(--${choice.value})`);
    fixed.textContent = !given.has(a) ? "" : choice.value === a.verdict ? "✓ right" : "was " + a.verdict;
  };
  const keep = () => {
    given.set(a, {group, condition, stage, id, verdict: choice.value, judge: a.verdict, question, response});
    saved = false; show(); count();
  };
  choice.value = (given.get(a) || a).verdict; choice.onchange = keep; show(); return {block, keep};
}
function card(item) {
  const parts = item.answers.map(a => said(item, a)), confirm = el("button", {type: "button"}, "Verdicts are right");
  confirm.onclick = () => parts.forEach(part => part.keep());
  const clip = D.clips[item.clip] || item.clip.split("/").map(encodeURIComponent).join("/");
  const tags = [item.condition, item.id === item.question ? null : item.id, item.category].filter(Boolean);
  return el("article", {tabindex: -1}, el("div", {class: "tags"},
      el("b", {class: harmful.has(item.group) ? "harmful" : null}, item.group), ...tags.map(tag => el("span", {}, tag)),
      ...[...item.changes].map(change => el("span", {class: "flip"}, CHANGES[change]))),
    el("h3", {}, item.question || "(spoken)"), clip ? el("audio", {controls: "", preload: "none", src: clip}) : null,
    el("div", {class: "pair"}, ...parts.map(part => part.block)), confirm);
}
function count() {
  const reviewed = given.size ? ` · ${given.size} verdicts reviewed` : "";
  at("count").textContent = `${found.length} of ${D.items.length} questions${reviewed}`;
  at("download").disabled = !given.size;
}
function more(n = STEP) {
  list.append(...found.slice(limit, limit + n).map(card)); limit += n; at("more").hidden = found.length <= limit;
}
function render() {
  const f = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  for (const key in tests) if (form.elements[key] !== document.activeElement) form.elements[key].value = f[key] || "";
  found = D.items.filter(item => Object.keys(tests).every(key => !f[key] || tests[key](item, f[key])));
  list.replaceChildren(); [limit, current] = [0, -1]; more(); count();
}
function go(step) {
  if (current + step >= limit && limit < found.length) more();
  const next = list.children[Math.max(0, Math.min(current + step, list.children.length - 1))];
  if (next) { next.focus({preventScroll: true}); next.scrollIntoView(); }
}
const lines = () => [...given.values()].map(row => JSON.stringify(row) + "\\n").join("");
const keys = {j: () => go(1), k: () => go(-1), "/": () => form.elements.q.focus(),
              c: () => current >= 0 && list.children[current].querySelector("article > button").click()};
form.onsubmit = event => event.preventDefault();
form.oninput = () => location.replace("#" + new URLSearchParams([...new FormData(form)].filter(([, value]) => value)));
list.addEventListener("focusin", event => { current = [...list.children].indexOf(event.target.closest("article")); });
at("more").onclick = () => more();
at("download").onclick = () => {
  const href = URL.createObjectURL(new Blob([lines()], {type: "application/jsonl"}));
  el("a", {download: "verdicts.jsonl", href}).click(); saved = true;
};
onkeydown = event => {
  if (event.key === "Escape") document.activeElement.blur();
  const typing = ["INPUT", "SELECT"].includes(document.activeElement.tagName);
  if (typing || event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(keys, event.key)) return;
  event.preventDefault(); keys[event.key]();
};
onhashchange = render; onbeforeprint = () => more(found.length);
onbeforeunload = event => { if (!saved) event.preventDefault(); };
at("headline").textContent = D.headline; at("record").textContent = JSON.stringify(D.settings, null, 1);
result(); curve(); Object.entries(D.maps).forEach(entry => map(...entry)); render();
"""


# ---------------------------------------------------------------------------------------------------------------------
# Verdicts by hand


def agreement(ours: Sequence[str], theirs: Sequence[str], clusters: Sequence[Any] | None = None) -> tuple[Rate, Mean]:
    """How far two judges of the same answers agree: the share of equal verdicts, and Cohen's kappa.

    Args:
        clusters: what each answer belongs to, as in `Rate.of`; kappa's interval is bootstrapped by them.

    Returns:
        Kappa is `nan` where both judges say one and the same word throughout.
    """
    words = sorted({*ours, *theirs})
    places = np.unique(range(len(ours)) if clusters is None else clusters, return_inverse=True)[1]
    pairs = np.zeros((max(places, default=-1) + 1, len(words), len(words)))  # counts of (ours, theirs) in each cluster
    np.add.at(pairs, (places, [*map(words.index, ours)], [*map(words.index, theirs)]), 1)

    def kappa(counts: np.ndarray) -> np.ndarray:
        tables = counts.reshape(-1, len(words), len(words))
        shares = tables / tables.sum((-2, -1), keepdims=True)
        observed, chance = np.trace(shares, axis1=-2, axis2=-1), (shares.sum(-1) * shares.sum(-2)).sum(-1)
        return np.where(chance < 1, (observed - chance) / np.maximum(1 - chance, 1e-12), np.nan)

    found = Mean(len(ours), math.nan, math.nan, math.nan)
    if len(words) > 1:
        found = Mean(len(ours), float(kappa(pairs.sum(0))[0]), *bootstrap(pairs.reshape(len(pairs), -1), kappa))
    return Rate.of([a == b for a, b in zip(ours, theirs, strict=True)], clusters), found


def relabel(report: Report, path: str | Path) -> Report:
    """The same answers with verdicts that a human gave; its last note says how far they agree with the judge's.

    Args:
        path: JSONL with `group`, `condition`, `stage`, `id` and `verdict` in each line, as the page's button
            "Download" writes it; confirmed verdicts belong in it, too, since agreement is that on its answers.

    Raises:
        ValueError: a line names no answer of this report, or one with another response; or see `read_jsonl`.
    """
    names = ("group", "condition", "stage", "id", "verdict")
    places, given = {tuple(map(shown, a.key)): i for i, a in enumerate(report.answers)}, dict[int, str]()
    for number, row in read_jsonl(path, names):
        key = [row[name] for name in names[:4]]
        place = places.get(tuple(map(shown, key)))
        if place is None:
            raise ValueError(f"{path}, line {number}: no answer of this report has {key}.")
        response = shown(report.answers[place].response)
        if row.get("response", response) != response:
            raise ValueError(f"{path}, line {number}: its response is not that of this report; use its own.")
        given[place] = row["verdict"]
    old, answers = [report.answers[i] for i in given], list(report.answers)
    for place, verdict in given.items():
        answers[place] = replace(answers[place], verdict=verdict, rule="human")
    same, kappa = agreement([a.verdict for a in old], [*given.values()], [a.unit for a in old])
    note = f"{report.judge} and human give the same verdict for {same} of the answers that both judged"
    notes = [*report.notes, f"{note}; Cohen's kappa {kappa}."]
    return replace(report, answers=answers, judge=f"{report.judge}, {len(given)} verdicts by a human", notes=notes)


# ---------------------------------------------------------------------------------------------------------------------
# A map as a figure


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


# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with the report.json that Report.save wrote")
    parser.add_argument("--verdicts", type=Path, help="what the page's button wrote")
    parser.add_argument("--out", type=Path, help="folder for the report with these verdicts")
    args = parser.parse_args()
    if (args.verdicts is None) != (args.out is None):
        parser.error("--verdicts and --out go together")
    try:
        report = Report.load(args.folder)
        if args.verdicts:
            report = relabel(report, args.verdicts)
            print(report.notes[-1])
    except (OSError, ValueError) as error:
        parser.error(str(error))
    page_file = write_page(report, args.out or args.folder, save=bool(args.out))
    print(f"Read every answer: {page_file}")


if __name__ == "__main__":
    main()
