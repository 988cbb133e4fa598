"""Draws docs/speed.svg from the newest results of a CPU in benches/results.

    python -m benches.chart
    python -m benches.chart --json FILE --out FILE

Left: how near one tensor's read comes to the memory limit, by type and size. Right: what each tool
adds to a training step. The same results give the same bytes: no date, no random identifiers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benches.tables.cpu import in_order, size_and_dtype

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HERE = Path(__file__).parent
_OUT = _HERE.parent / "docs" / "speed.svg"
_STEP = "gpt2"
"""The training of the right panel; the README's table has the others."""

_INK, _QUIET, _PAPER = "#1f2933", "#616e7c", "#ffffff"
_OURS, _OTHERS = "#0072b2", "#b3bcc6"
"""Blue and grey differ in lightness, too: for every kind of colour vision, and in print."""

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "paramstats",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans", "sans-serif"],
    "font.size": 10,
    "text.color": _INK,
    "figure.facecolor": _PAPER,
    "savefig.facecolor": _PAPER,  # GitHub's dark theme shows a white card
}

Report = dict[str, Any]


def newest(folder: Path) -> Report:
    """Of the CPU's results there."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    of_cpu = [report for report in reports if report["device"] == "cpu"]
    if not of_cpu:
        sys.exit(f"benches.chart: expected results of a CPU in {folder}")
    return max(of_cpu, key=lambda report: str(report["date"]))


def shares(report: Report) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Types, sizes from the smallest, and the limit's time in parts of paramstats' for each pair,
    by as many threads as were tried."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    sizes: dict[int, str] = {}
    for case in report["cases"].values():
        seconds, limit = (case["median_s"].get(name) for name in ("paramstats", "read_only"))
        if case["tensors"] > 1 or seconds is None or limit is None:
            continue
        size, dtype = size_and_dtype(case)
        sizes[case["bytes"]] = size
        threads, _ = found.get((dtype, size), (0, 0.0))
        if case["threads"] > threads:
            found[dtype, size] = (case["threads"], limit / seconds)
    parts = {key: share for key, (_, share) in found.items()}
    return in_order(dtype for dtype, _ in found), [sizes[size] for size in sorted(sizes)], parts


def added(report: Report) -> tuple[str, list[tuple[str, float, float, bool]]]:
    """The training's title; each tool's title, seconds added to a step, the same in parts of the
    step, and whether it is paramstats, from the least on."""
    step = report.get("step_cost", {}).get("steps", {}).get(_STEP)
    if step is None:
        return "", []
    tools = [
        (tool["title"].replace("`", ""), tool["added_s"], tool["more"], "paramstats" in name)
        for name, tool in step["tools"].items()
        if name != "nothing"
    ]
    title = f"{step['title']}: {step['tools']['nothing']['step_s'] * 1e3:.0f} ms"
    return title, sorted(tools, key=lambda tool: tool[1])


def draw(report: Report, out: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        sys.exit("benches.chart: expected matplotlib (pip install '.[chart]')")
    matplotlib.use("svg")
    from matplotlib import pyplot

    title, tools = added(report)
    with matplotlib.rc_context(_SETTINGS):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10.5, 3.6), width_ratios=(1, 1.3) if tools else (1, 0.01)
        )
        _draw_shares(left, *shares(report))
        if tools:
            _draw_added(right, title, tools)
        else:
            right.set_axis_off()
        hardware = report["hardware"]
        figure.text(
            0.01,
            0.01,
            f"{hardware['cpu']}, {hardware['threads']} threads, "
            f"torch {report['versions']['torch']}, {report['date']}",
            fontsize=8,
            color=_QUIET,
        )
        figure.tight_layout(rect=(0, 0.04, 1, 1), w_pad=3)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _draw_shares(
    axes: Axes, dtypes: list[str], sizes: list[str], found: dict[tuple[str, str], float]
) -> None:
    """A cell for each type and size, the darker the nearer to the limit, with its number."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    colours = colormaps["Blues"]
    for y, dtype in enumerate(dtypes):
        for x, size in enumerate(sizes):
            share = found.get((dtype, size))
            if share is None:
                continue
            depth = min(1.0, share)
            cell = Rectangle((x, y), 0.96, 0.92, color=colours(0.05 + 0.8 * depth), linewidth=0)
            axes.add_patch(cell)
            ink = "#ffffff" if depth > 0.6 else _INK
            axes.text(x + 0.48, y + 0.48, f"{share:.2f}", ha="center", va="center", color=ink)
    axes.set_xlim(0, max(1, len(sizes)))
    axes.set_ylim(len(dtypes), 0)
    axes.set_xticks([x + 0.48 for x in range(len(sizes))], sizes)
    axes.set_yticks([y + 0.46 for y in range(len(dtypes))], dtypes)
    below = "1.00: as fast as a loop that only reads"
    _plain(axes, "One tensor: speed in parts of the read-only limit", below)


def _draw_added(axes: Axes, title: str, tools: list[tuple[str, float, float, bool]]) -> None:
    """A bar for each tool, with its name and its statistics."""
    widest = max(seconds for _, seconds, _, _ in tools)
    for y, (name, seconds, more, ours) in enumerate(tools):
        axes.barh(y, max(seconds, 0), 0.72, color=_OURS if ours else _OTHERS)
        axes.text(
            max(seconds, 0) + widest * 0.02,
            y,
            f"{seconds * 1e3:+,.0f} ms ({more:+.{0 if abs(more) >= 0.1 else 1}%})",
            va="center",
            fontweight="bold" if ours else "normal",
        )
        axes.text(-widest * 0.03, y, name, ha="right", va="center")
    axes.set_xlim(0, widest * 2.1)
    axes.set_ylim(len(tools) - 0.5, -0.5)
    axes.set_xticks([])
    axes.set_yticks([])
    _plain(axes, "Added to a training step, by tool", title)


def _plain(axes: Axes, title: str, below: str) -> None:
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=22)
    axes.text(0, 1.04, below, transform=axes.transAxes, color=_QUIET, fontsize=9)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benches.chart", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", type=Path, help="of benches/results (default: the newest)")
    parser.add_argument("--out", type=Path, default=_OUT, help="(default: docs/speed.svg)")
    options = parser.parse_args()
    report = json.loads(options.json.read_text()) if options.json else newest(_HERE / "results")
    draw(report, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e3:.0f} KB")


if __name__ == "__main__":
    main()
