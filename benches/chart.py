"""Draws docs/speed.svg from the newest CPU results in benches/results, without measuring again.

The background is transparent and the text is gray, so that light and dark pages can show it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib import pyplot, rc_context
from matplotlib.axes import Axes

from benches.tables import in_order, size_and_dtype

_ROOT = Path(__file__).parent.parent
_GRAY, _BLUE, _LIGHT_GRAY = "#7d8590", "#2f81f7", "#a5adb6"
_STYLE: Any = {
    "axes.titlelocation": "left",
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "paramstats",  # the same results give the same file
    **dict.fromkeys(["xtick.major.size", "ytick.major.size"], 0),
    **dict.fromkeys([f"axes.spines.{s}" for s in ("left", "right", "top", "bottom")], False),
    **dict.fromkeys(["text.color", "axes.labelcolor", "xtick.color", "ytick.color"], _GRAY),
}


def draw(report: dict[str, Any]) -> None:
    with rc_context(_STYLE):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
        _draw_shares(left, list(report["cases"].values()))
        _draw_steps(right, report["step_cost"]["steps"]["gpt2"])
        cpu, torch = report["hardware"]["cpu"], report["versions"]["torch"]
        figure.supxlabel(f"{cpu}, torch {torch}, {report['date']}", x=0.01, ha="left", fontsize=8)
        figure.savefig(_ROOT / "docs/speed.svg", transparent=True, metadata={"Date": None})


def _draw_shares(axes: Axes, cases: list[dict[str, Any]]) -> None:
    """Draw a cell per dtype and size, at the largest number of threads that was measured."""
    cases = sorted(cases, key=lambda case: (case["bytes"], case["threads"]))
    seconds = {size_and_dtype(case): case["median_s"] for case in cases if case["tensors"] == 1}
    sizes = list(dict.fromkeys(size for size, _ in seconds))
    dtypes = in_order(dtype for _, dtype in seconds)
    shares = [[float("nan")] * len(sizes) for _ in dtypes]
    for (size, dtype), median in seconds.items():
        x, y = sizes.index(size), dtypes.index(dtype)
        shares[y][x] = share = median["read_only"] / median["paramstats"]
        axes.text(x, y, f"{share:.2f}", ha="center", va="center", color="w" if share > 0.6 else "k")
    axes.pcolormesh(sizes, dtypes, shares, cmap="Blues", vmin=0, vmax=1.1, edgecolors="face")
    axes.set_title("Reading one tensor (1.00: the memory limit)", weight="bold")
    axes.invert_yaxis()


def _draw_steps(axes: Axes, step: dict[str, Any]) -> None:
    """Draw a bar per tool."""
    tools = [(name, tool) for name, tool in step["tools"].items() if name != "nothing"]
    tools.sort(key=lambda item: -float(item[1]["added_s"]))
    titles = [tool["title"].replace("`", "") for _, tool in tools]
    colours = [_BLUE if name.startswith("paramstats") else _LIGHT_GRAY for name, _ in tools]
    bars = axes.barh(titles, [tool["added_s"] for _, tool in tools], color=colours)
    labels = [f"{tool['added_s'] * 1e3:+,.0f} ms ({tool['more']:+.1%})" for _, tool in tools]
    axes.bar_label(bars, labels, padding=4)
    axes.set(xticks=[], xlim=(0, 1.6 * tools[0][1]["added_s"]))
    axes.set_title(f"Added to a training step of {step['title'][:5]}", weight="bold")


if __name__ == "__main__":
    results = [json.loads(path.read_text()) for path in (_ROOT / "benches/results").glob("*.json")]
    draw(max((r for r in results if r["device"] == "cpu"), key=lambda r: str(r["date"])))
