"""The report as one self-contained HTML page: no script, no font, no picture from anywhere else."""

import base64
import dataclasses
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import NamedTuple

from matplotlib.figure import Figure

from fxfreeze import pictures
from fxfreeze.checkpoint import replacing
from fxfreeze.compare import Trial
from fxfreeze.recipes import SHORTS
from fxfreeze.report import COLUMNS, OURS, Report, as_json, cells, notes, savings
from fxfreeze.verdict import Summary, caution, summarise, verdict


def write(report: Report, directory: Path) -> Path:
    """Writes report.json and report.html into `directory`, each whole or not at all; the page's path."""
    directory.mkdir(parents=True, exist_ok=True)
    page = directory / "report.html"
    for path, text in ((directory / "report.json", as_json(report)), (page, as_html(report))):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return page


def as_html(report: Report) -> str:
    """One page that needs nothing beside it."""
    rows = summarise(report.trials)
    return PAGE.substitute(
        verdict=escape(verdict(report.trials)),
        caution=escape(caution(report.trials)),
        lead=escape(", ".join(f"{value}" for value in report.subject.values())),
        head="".join(f"<th>{escape(column)}</th>" for column in COLUMNS),
        body="".join(_html_row(summary) for summary in rows),
        legend="".join(f"<dt>{_swatch(row.name)}{escape(row.name)}</dt><dd>{escape(row.about)}</dd>" for row in rows),
        notes="".join(f"<li>{escape(note)}</li>" for note in notes(report)),
        figures="".join(map(_html_figure, figures(report))),
        facts="".join(_fact(key, value) for key, value in _facts(report)),
        command=escape(report.command),
    )


class Shown(NamedTuple):
    """A picture, with a list of remarks under it."""

    heading: str
    caption: str
    picture: Figure
    remarks: Sequence[str] = ()


def figures(report: Report) -> Iterator[Shown]:
    """Those for which there are rows."""
    first = report.shown[0]
    yield Shown(
        "Accuracy against wall time",
        f"Higher and further left is better.{_on_rivals(first)}",
        pictures.accuracy_against_time(report.shown),
    )
    stairs = [row for name, row in first.rows.items() if name not in SHORTS]
    yield Shown(
        "The staircase",
        "Each freeze takes a unit out of the backward pass. Times are running medians of "
        f"{pictures.SMOOTHING_STEPS} steps, of the rows of seed {first.seed}.",
        pictures.staircase(stairs),
    )
    scheduled = next((first.rows[name] for name in ("freezeout", "fxfreeze") if name in first.rows), None)
    if scheduled is not None:
        yield Shown(
            "Learning rates",
            "Each unit's rate falls to zero at its own time, and there the unit freezes; the head's lasts to the end.",
            pictures.learning_rates(scheduled),
        )
    for row in first.rows.values():
        if row.cache is not None and row.cache.epochs:
            yield Shown(
                "Where the cache's samples came from",
                f"Each epoch of {row.name}, seed {first.seed}. Purple: read, in place of computing the frozen part; above the "
                "bars, how fast, where a * marks the first reading of a store. Below, what the cache decided and why.",
                pictures.origins(row.cache.epochs),
                row.cache.notes,
            )
    bars = list(savings(report))
    if len(bars) > 2:
        yield Shown(
            "Saving per step, predicted and measured",
            "Of a plain step's cost, averaged over the training: without a cache, then with one. The prediction counts "
            "FLOPs, a backward pass as two forward passes. Time also counts what FLOPs leave out: a frozen batch "
            "norm takes no statistics, nothing is kept for a backward, and fxfreeze folds the norms away and runs frozen "
            "convolutions channels_last. The cache spares the frozen forward too.",
            pictures.savings(bars),
        )


def _on_rivals(trial: Trial) -> str:
    rivals = [short for short in SHORTS if short in trial.rows]
    if len(rivals) > 1:
        return f" {' and '.join(rivals)} are the rivals that count: each has as much time as its freezing row took."
    return f" {rivals[0]} is the rival that counts: it has as much time as its freezing row took." if rivals else ""


def _html_row(summary: Summary) -> str:
    name, *rest = (escape(cell).replace(" ± ", "<br><small>± ") for cell in cells(summary))
    kind = ' class="ours"' if summary.name in OURS else ""
    figures = "".join(f"<td>{cell}{'</small>' if '<small>' in cell else ''}</td>" for cell in rest)
    return f'<tr{kind}><th scope="row">{_swatch(summary.name)}{name}</th>{figures}</tr>'


def _swatch(name: str) -> str:
    return f'<i style="background:{pictures.COLOURS[name]}"></i>'


def _html_figure(shown: Shown) -> str:
    # As an image of its own, a picture's element ids can't collide with another's.
    data = base64.b64encode(pictures.as_svg(shown.picture).encode()).decode()
    heading, remarks = escape(shown.heading), "".join(f"<li>{escape(remark)}</li>" for remark in shown.remarks)
    return (
        f"<section><h2>{heading}</h2><p>{escape(shown.caption)}</p>"
        f'<img alt="{heading}" src="data:image/svg+xml;base64,{data}">{f"<ul>{remarks}</ul>" if remarks else ""}</section>'
    )


def _fact(key: str, value: str) -> str:
    return f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>"


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    yield from report.environment.items()
    for key, value in dataclasses.asdict(report.settings).items():
        yield key.replace("_", " "), str(value)
    if len(report.trials) > 1:
        yield "seeds", ", ".join(str(trial.seed) for trial in report.trials)


PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fxfreeze compare</title>
<style>
:root { color-scheme: light; --ink: #24241f; --soft: #6b6b63; --line: #e4e4de; --accent: #d55e00; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f6f2; color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 48px 24px 72px; }
header p.lead { margin: 0 0 10px; }
h1 { font-size: 24px; line-height: 1.4; font-weight: 640; margin: 0 0 10px; text-wrap: balance; }
header p { color: var(--soft); margin: 0 0 28px; font-size: 15px; }
h2 { font-size: 18px; margin: 0 0 4px; font-weight: 640; }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 22px 24px; margin: 0 0 20px; }
section > p { color: var(--soft); margin: 0 0 14px; font-size: 15px; text-wrap: pretty; }
img { display: block; width: 100%; height: auto; }
/* Shadows where there is more to the side: covers move with the table, shadows stay. */
.scroll { overflow-x: auto; scrollbar-width: thin; scrollbar-color: #b0b0a8 var(--line); background:
  linear-gradient(to right, #fff 30%, #fff0) left / 48px 100% no-repeat local,
  linear-gradient(to left, #fff 30%, #fff0) right / 48px 100% no-repeat local,
  linear-gradient(to right, #0003, #0000) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, #0003, #0000) right / 14px 100% no-repeat scroll; }
.hint { display: none; }
table { border-collapse: collapse; width: 100%; font-size: 15px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 8px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { color: var(--soft); font-weight: 500; font-size: 13.5px; }
th:first-child { text-align: left; padding-left: 0; }
tbody th { font-weight: 500; }
tr.ours th, tr.ours td { font-weight: 680; }
small { color: var(--soft); font-weight: 400; }
tbody tr:last-child > * { border-bottom: 0; }
i { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin-right: 9px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; margin: 0; font-size: 15px; }
dt { color: var(--ink); white-space: nowrap; } dd { margin: 0; color: var(--soft); }
dl.facts { grid-template-columns: repeat(2, max-content 1fr); font-size: 14px; }
dl.facts dt { color: var(--soft); } dl.facts dd { color: var(--ink); }
ul { margin: 18px 0 0; padding: 16px 0 0 18px; border-top: 1px solid var(--line); }
ul li { color: var(--soft); font-size: 14px; }
li { margin: 3px 0; }
pre { background: #f6f6f2; border-radius: 8px; padding: 12px 14px; overflow-x: auto; margin: 18px 0 0; }
pre { font-size: 13.5px; }
@media (max-width: 900px) {
  thead th { white-space: normal; vertical-align: bottom; }
  th, td { padding: 8px 7px; }
}
@media (max-width: 720px) {
  dl, dl.facts { grid-template-columns: max-content 1fr; }
  main { padding: 24px 14px; }
  section { padding: 18px 14px; }
  section > p.hint { display: block; margin: 0 0 8px; font-size: 13.5px; }
}
</style>
</head>
<body>
<main>
<header><p class="lead">fxfreeze compare · $lead</p><h1>$verdict</h1><p>$caution</p></header>
<section><p class="hint">A table wider than this window scrolls sideways.</p>
<div class="scroll" tabindex="0" role="region" aria-label="The rows' figures">
<table><thead><tr>$head</tr></thead><tbody>$body</tbody></table></div>
<ul>$notes</ul></section>
<section><h2>The rows</h2><dl>$legend</dl></section>
$figures
<section><h2>How to repeat it</h2><dl class="facts">$facts</dl><pre>$command</pre></section>
</main>
</body>
</html>
""")
