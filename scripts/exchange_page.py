#!/usr/bin/env python3
"""Writes the tables of docs/results/exchange.md and its picture from the JSON beside it.

    /usr/bin/python3 scripts/exchange_page.py

exchange_report.py measures that JSON and calls this at its end. --draw makes the same picture of any
reports of `ternion bench exchange --json`. Needs Debian's python3-matplotlib.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import NoReturn

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs/results"
TRACES = ["trace-1gbit", "trace-100mbit"]


def fail(why: str) -> NoReturn:
    sys.exit(f"{Path(sys.argv[0]).stem}: error: {why}")


def hand_over(path: Path) -> None:
    """Results belong to whoever called sudo."""
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))


def read(name: str) -> dict:
    return json.loads((RESULTS / f"exchange-{name}.json").read_text())


def case_of(report: dict, wire: str, tokens: int) -> dict:
    return next(c for c in report["cases"] if c["wire"] == wire and c["tokens_per_rank"] == tokens)


def p50_ms(case: dict) -> float:
    return case["time_us"]["total"]["p50"] * 1e-3


def kilobytes_per_message(case: dict) -> float:
    phases = [case["traffic"][phase] for phase in ("dispatch", "combine")]
    return sum(p["message_bytes"] for p in phases) / sum(p["messages"] for p in phases) / 1e3


def markdown(header: list, lines: list) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def wire_table(tokens: int = 128) -> str:
    shaped, unshaped = read("deepseek-v3-1gbit"), read("deepseek-v3-none")
    base = case_of(shaped, "bf16/bf16", tokens)["per_token_and_layer"]["message_bytes"]
    lines = []
    for case in shaped["cases"]:
        if case["tokens_per_rank"] != tokens:
            continue
        each, quality = case["per_token_and_layer"], case["quality_change_percent"]
        times = case["time_us"]["total"]
        lines.append(
            [case["wire"]]
            + [f"{each[k] / 1e3:.2f}" for k in ("payload_bytes", "message_bytes")]
            + [f"{100 * case['efficiency']:.1f} %", f"{base / each['message_bytes']:.2f}x"]
            + [f"{each[k] / 1e3:.2f}" for k in ("inter_node_bytes", "nic_bytes")]
            + [f"{times['p50'] / 1e3:.0f} / {times['p90'] / 1e3:.0f}"]
            + [f"{p50_ms(case_of(unshaped, case['wire'], tokens)):.0f}"]
            + ["" if quality is None else f"{quality:+.3f} %"]
            + ["yes" if case["verified"] else "**no**"]
        )
    for size in shaped["sizes_only"]:
        if size["tokens_per_rank"] == tokens:
            kilobytes = f"{size['payload_bytes'] / 1e3:.2f}"
            lines.append([size["wire"] + ", sizes only", kilobytes] + [""] * 9)
    header = ["wire (dispatch/combine)", "payload", "message", "floor/message", "bf16/bf16 over it"]
    header += ["inter-node", "NIC", "ms, 1 Gbit/s: p50 / p90", "ms, unshaped", "bits per byte"]
    return markdown(header + ["sums right"], lines)


def shape_ladder_table() -> str:
    lines = []
    for rate, links in (("1gbit", "1 Gbit/s"), ("none", "unshaped")):
        report = read(f"deepseek-v3-{rate}")
        for tokens in sorted({case["tokens_per_rank"] for case in report["cases"]}):
            line = [links, tokens]
            for wire in ("int4/int4", "int8/bf16", "bf16/bf16", "bf16/bf16, no dedup"):
                line.append(f"{p50_ms(case_of(report, wire, tokens)):.1f}")
            line.append(f"{p50_ms(case_of(report, 'int4/int4, alltoallv', tokens)):.1f}")
            each = case_of(report, "int4/int4", tokens)
            bytes_each = each["per_token_and_layer"]
            line.append(f"{kilobytes_per_message(each):.1f}")
            line.append(f"{bytes_each['nic_bytes'] / bytes_each['inter_node_bytes']:.3f}")
            lines.append(line)
    header = ["links", "tokens per rank", "int4/int4", "int8/bf16", "bf16/bf16"]
    header += ["bf16/bf16, no dedup", "int4/int4 by alltoallv", "kB per message", "NIC/message"]
    return markdown(header, lines)


def ladder_table(gigabits: float = 1) -> str:
    report = read("qwen3-30b-a3b-1gbit")
    wires = ("int4/int4", "int8/bf16", "bf16/bf16", "bf16/bf16, no dedup", "int4/int4, alltoallv")
    lines = []
    for tokens in sorted({case["tokens_per_rank"] for case in report["cases"]}):
        times = [p50_ms(case_of(report, wire, tokens)) for wire in wires]
        case = case_of(report, "int4/int4", tokens)
        # Of a layer, of all hosts: what the busiest link needs at the rate, over what it took.
        busiest = case["per_token_and_layer"]["bottleneck_link_bytes"] * tokens * report["ranks"]
        lines.append(
            [tokens, *(f"{time:.2f}" for time in times), f"{times[2] / times[0]:.2f}x"]
            + [
                f"{kilobytes_per_message(case):.1f}",
                f"{busiest * 8e-6 / gigabits / times[0] * 100:.0f} %",
            ]
        )
    header = ["tokens per rank", *wires[:-1], "int4/int4 by alltoallv", "bf16/bf16 over int4/int4"]
    return markdown(header + ["kB per message", "of the rate"], lines)


def factor_table(tokens: int = 128) -> str:
    shaped, unshaped = read("deepseek-v3-1gbit"), read("deepseek-v3-none")
    lines = []
    for factor, other in zip(shaped["factors"][str(tokens)], unshaped["factors"][str(tokens)]):
        lines.append(
            [factor["what"], f"{factor['from']} → {factor['to']}"]
            + [f"{factor[k]:.2f}x" for k in ("bytes", "inter_node_bytes", "time")]
            + [f"{other['time']:.2f}x"]
        )
    header = ["switch", "from → to", "fewer message bytes", "fewer inter-node bytes"]
    return markdown(header + ["less time, 1 Gbit/s", "less time, unshaped"], lines)


def placement_table(tokens: int = 128) -> str:
    reports = [read(name) for name in TRACES]
    lines = []
    for name in ("contiguous", "balanced", "local"):
        statistics_of = reports[0]["placements"][name]
        wire = "int4/int4" + ("" if name == "contiguous" else f", {name}")
        cases = [case_of(report, wire, tokens) for report in reports]
        lines.append(
            [name, f"{statistics_of['remote_ranks']:.3f}"]
            + [f"{statistics_of['max_over_mean_load']:.3f}"]
            + [
                f"{cases[0]['per_token_and_layer'][key] / 1e3:.3f}"
                for key in ("message_bytes", "bottleneck_link_bytes")
            ]
            + [f"{p50_ms(case):.1f}" for case in cases]
        )
    header = ["placement", "remote ranks", "load max/mean", "message kB", "busiest link kB"]
    return markdown(header + ["ms, 1 Gbit/s", "ms, 100 Mbit/s"], lines)


def median_of(runs: list, key: str) -> float:
    return statistics.median(one[key] for one in runs)


def ratio_of(entry: dict, base: dict) -> str:
    """Decode rates over those of `base`, run by run: the median, the least and the greatest."""
    if entry is base:
        return "1"
    pairs = zip(entry["runs"], base["runs"])
    ratios = sorted(a["decode_tok_s"] / b["decode_tok_s"] for a, b in pairs)
    return f"**{statistics.median(ratios):.2f}** ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def decode_table() -> str:
    lines = []
    table = read("decode")["decode"]
    for entry in table:
        block = [e for e in table if all(e[k] == entry[k] for k in ("sequences", "rate"))]
        undivided = next(
            e for e in block if (e["wire"], e["micro_batches"]) == (entry["wire"], "1")
        )
        lines.append(
            [entry["sequences"], entry["rate"], f"{entry['wire']}/{entry['wire']}"]
            + [entry["micro_batches"], f"{median_of(entry['runs'], 'decode_tok_s'):.1f}"]
            + [ratio_of(entry, block[0]), ratio_of(entry, undivided)]
            + [
                f"{median_of(entry['runs'], key):.0f}"
                for key in ("step_ms", "compute_ms", "wire_ms", "wait_ms")
            ]
        )
    header = ["sequences", "links", "wire", "micro-batches", "decode tok/s"]
    header += ["times the first of the block", "times one micro-batch"]
    return markdown(header + ["step ms", "compute ms", "wire ms", "wait ms"], lines)


def tables() -> str:
    about = read("decode")["machine"]
    shaped, unshaped = read("deepseek-v3-1gbit"), read("deepseek-v3-none")
    ladder = read("qwen3-30b-a3b-1gbit")
    cases = shaped["cases"] + unshaped["cases"]
    memory = max(max(case["peak_memory_bytes"]) for case in cases) / 1e6
    tokens = max(case["tokens_per_rank"] for case in cases)
    # With --only, parts may have been measured at different commits.
    commits = {report["commit"] for report in (shaped, unshaped, ladder, *map(read, TRACES))}
    others = sorted(commit for commit in commits if not commit.startswith(about["commit"]))
    return "\n".join(
        [
            f"Commit {', '.join([about['commit'], *others])}, {about['cores']} cores of an "
            f"{about['cpu']} ({shaped['isa']}), Linux {about['kernel']}, {about['date']}.\n",
            "### Wires: kB per token and layer, 128 tokens per rank\n",
            wire_table(),
            f"16 ranks, four per host; the largest held {memory:.0f} MB at up to {tokens} tokens.\n",
            "### Tokens per rank: ms for one layer, dispatch and combine\n",
            shape_ladder_table(),
            "### Qwen3-30B-A3B's shape, one rank per host, 1 Gbit/s: ms for one layer\n",
            ladder_table(),
            "### One switch each, 128 tokens per rank\n",
            factor_table(),
            "### Placements, recorded routing\n",
            placement_table(),
            "### Decode\n",
            decode_table(),
        ]
    )


def phase_kilobytes(case: dict, phase: str) -> float:
    total = sum(case["traffic"][p]["message_bytes"] for p in ("dispatch", "combine"))
    share = case["traffic"][phase]["message_bytes"] / total
    return share * case["per_token_and_layer"]["message_bytes"] / 1e3


WIRES = ["int4/int4", "int4/int8", "int8/int8", "int4/bf16", "int8/bf16", "bf16/bf16"]
WIRES += ["bf16/bf16, no dedup"]


def draw(labels: list, reports: list, title: str, out: Path) -> None:
    """Bytes of the first report and times of all, at the most tokens per rank that all have."""
    all_cases = [{(c["wire"], c["tokens_per_rank"]): c for c in r["cases"]} for r in reports]
    shared = [key for key in all_cases[0] if all(key in cases for cases in all_cases)]
    tokens = max((tokens for wire, tokens in shared if wire in WIRES), default=0)
    wires = [wire for wire in WIRES if (wire, tokens) in shared]
    if not wires:
        fail(f"nothing to draw: no wire is in all of {', '.join(labels)}")
    cases = [all_cases[0][wire, tokens] for wire in wires]
    matplotlib.rcParams.update({"svg.hashsalt": "ternion", "svg.fonttype": "none"})
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    starts = [0.0] * len(cases)
    for phase, color in (("dispatch", "#1b6ca8"), ("combine", "#e08e1a")):
        kilobytes = [phase_kilobytes(case, phase) for case in cases]
        left.barh(wires, kilobytes, left=starts, color=color, label=phase)
        starts = [start + more for start, more in zip(starts, kilobytes)]
    left.set_xlabel("message kB per token and layer")
    left.legend(fontsize=8)
    left.invert_yaxis()
    height = 0.8 / len(reports)
    for i, (label, of, color) in enumerate(zip(labels, all_cases, ("#1b6ca8", "#2a9d5c"))):
        shift = height * (i - (len(reports) - 1) / 2)
        positions = [position + shift for position in range(len(wires))]
        times = [p50_ms(of[wire, tokens]) for wire in wires]
        right.barh(positions, times, height=height, color=color, label=label)
    right.set_xlabel(f"ms for one layer, {tokens} tokens per rank (median)")
    right.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})
    hand_over(out)


def draw_own() -> None:
    reports = [read("deepseek-v3-1gbit"), read("deepseek-v3-none")]
    title = "DeepSeek-V3's shape, 16 ranks on 4 virtual hosts of one machine"
    draw(["1 Gbit/s", "unshaped"], reports, title, RESULTS / "exchange.svg")


def draw_others(paths: list, out: Path) -> None:
    about = "{shape}, rows of {hidden}, {ranks} ranks on {nodes} hosts"
    try:
        reports = [json.loads(path.read_text()) for path in paths]
        titles = dict.fromkeys(about.format(**report) for report in reports)
    except (ValueError, KeyError, TypeError):
        fail("--draw takes reports of ternion bench exchange --json")
    names = [path.name for path in paths]
    labels = names if len(set(names)) == len(names) else [str(path) for path in paths]
    draw(labels, reports, "; times also of ".join(titles), out)


PAGE = RESULTS / "exchange.md"
BEGIN, END = "<!-- tables: scripts/exchange_page.py -->\n", "<!-- end of tables -->\n"


def write_tables() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.split(END)[1])
    hand_over(PAGE)


def write_page() -> None:
    if any(PAGE.read_text().count(mark) != 1 for mark in (BEGIN, END)):
        fail(f"{PAGE}: the marks of the tables are missing")
    draw_own()
    write_tables()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--draw", nargs="+", type=Path, metavar="FILE",
        help="A.json [B.json] OUT.svg: only the picture, of one or two reports",
    )  # fmt: skip
    files = parser.parse_args().draw
    if files and (len(files) not in (2, 3) or files[-1].suffix != ".svg"):
        parser.error("--draw takes one or two reports and then the picture's name, OUT.svg")
    try:
        draw_others(files[:-1], files[-1]) if files else write_page()
    except OSError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
