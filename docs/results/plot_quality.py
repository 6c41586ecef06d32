"""Draws quality.svg from the ladders that `ternion eval --ladder --json` wrote.

    python3 plot_quality.py quality-tiny.json quality-tiny-a48.json --out quality.svg

Needs Debian's python3-matplotlib.
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

COLORS = {"bf16": "#1b6ca8", "int8": "#2a9d5c", "int4": "#e08e1a", "int3": "#c0392b"}


def wire_bytes(rung: dict) -> float:
    return rung["dispatch_bytes_per_token"] + rung["combine_bytes_per_token"]


def draw(axes: pyplot.Axes, report: dict) -> None:
    """One line per KV precision: what the combine's precision costs, over the bytes it leaves. Rungs
    with another dispatch than the model's own are in the table only."""
    reference = report["ladder"][0]
    for kv, color in COLORS.items():
        rungs = [
            r
            for r in report["ladder"]
            if r["kv"] == kv and not r["exact"] and r["dispatch"] == reference["dispatch"]
        ]
        if not rungs:  # a precision that the model does not go with
            continue
        label = f"KV {kv}" + (" (the model's own)" if kv == reference["kv"] else "")
        points = [(wire_bytes(r), r["change_percent"], r["combine"]) for r in rungs]
        axes.plot(*zip(*(p[:2] for p in points)), "o-", color=color, label=label)
        for x, y, combine in points:
            axes.annotate(combine, (x, y), (0, 5), textcoords="offset points", fontsize=7)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_title(
        f"{Path(report['model']).name}: {reference['dispatch']} dispatch, {report['ranks']} ranks, "
        f"exact {reference['bits_per_byte']:.4f} bits per byte",
        fontsize=9,
    )
    axes.set_xlabel("message bytes per token, all layers (dispatch + combine)")
    axes.set_ylabel("change in bits per byte, %")
    axes.set_xlim(left=0)
    axes.legend(fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ladders", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    matplotlib.rcParams.update({"svg.hashsalt": "ternion", "svg.fonttype": "none"})
    figure, all_axes = pyplot.subplots(
        1, len(args.ladders), figsize=(6 * len(args.ladders), 4.2), squeeze=False
    )
    for axes, path in zip(all_axes[0], args.ladders):
        draw(axes, json.loads(path.read_text()))
    figure.tight_layout()
    figure.savefig(args.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
