#!/usr/bin/env python3
"""Writes the tables of docs/results/gpu.md from what `bundle/measure DIRECTORY` left there.

    /usr/bin/python3 scripts/gpu_page.py DIRECTORY

Keeps the JSON beside the page, as docs/results/gpu-*.json.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import NoReturn

RESULTS = Path(__file__).resolve().parent.parent / "docs/results"
PAGE = RESULTS / "gpu.md"
BEGIN, END = "<!-- tables: scripts/gpu_page.py -->\n", "<!-- end of tables -->\n"


def fail(why: str) -> NoReturn:
    sys.exit(f"gpu_page: error: {why}")


def markdown(header: list, lines: list) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows) + "\n"


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def product_line(line: dict) -> list:
    experts = f", {line['experts']} experts, top {line['top_k']}" if line["experts"] > 1 else ""
    cublas, faster = line["cublas_bf16_us"], line["speedup_over_cublas_bf16"]
    return [
        f"{line['outputs']} x {line['inputs']}{experts}",
        f"{line['bits_per_weight']:g}",
        line["tokens"],
        f"{line['us']:.2f}",
        f"{line['weight_gb_per_s']:.0f}",
        f"{line['percent_of_copy_bandwidth']:.1f} %",
        f"{line['gmac_per_s'] / 1e3:.1f}",
        f"{line['percent_of_matrix_rate']:.1f} %",
        "-" if cublas is None else f"{cublas:.2f}",
        "-" if faster is None else f"{faster:.2f}x",
    ]


def kernels_table(report: dict) -> str:
    header = ["weights", "bits", "rows", "us", "GB/s", "of copy", "TMAC/s", "of rate"]
    header += ["cuBLAS bf16, us", "faster"]
    return (
        f"### Ternary products\n\n`bench kernels --device cuda`. {report['device']}: copies "
        f"{report['copied_gb_per_s']:.0f} GB/s (read and written), 8-bit products "
        f"{report['gmac_per_s'] / 1e3:.0f} TMAC/s; cuBLAS {report['cublas'] or 'absent'}.\n\n"
        + markdown(header, [product_line(line) for line in report["ternary_matmul"]])
    )


def memory_lines(memory: dict) -> list:
    def line(what: str, num_bytes: int, more: str = "") -> list:
        return [what, gigabytes(num_bytes), more]

    lines = [line("the device's", memory["bytes"])]
    for kind, of in memory["weights"].items():
        bits = of.get("bits_per_weight")
        lines.append(line(kind, of["bytes"], f"{bits:.3f} bits per weight" if bits else ""))
    lines.append(line("KV cache", memory["kv"]["bytes"], f"{memory['kv']['tokens']} tokens"))
    lines.append(line("activations and others", memory["rest_bytes"]))
    lines.append(line("driver and others", memory["others_bytes"]))
    return [*lines, line("left", memory["left_bytes"])]


def decode_line(batch: dict) -> list:
    read = batch["weight_bytes"] + batch["kv_bytes"]
    experts = batch["experts_of_layer"]
    return [
        batch["batch"],
        f"{batch['tok_s']:.1f}",
        f"{batch['step_ms']['p50']:.3f}",
        f"{batch['step_ms']['p90']:.3f}",
        gigabytes(read),
        "-" if experts is None else f"{experts:.1f}",
        f"{batch['bound_tok_s']:.0f}",
        f"{batch['percent_of_bound']:.1f} %",
    ]


def decode_tables(name: str, report: dict) -> str:
    header = ["sequences", "tok/s", "ms per step", "p90", "read in a step", "experts of a layer"]
    header += ["bound, tok/s", "of bound"]
    batches = ",".join(str(batch["batch"]) for batch in report["batches"])
    return (
        f"### {name}\n\n`bench decode --device cuda --batch {batches}`. Prompts of "
        f"{report['prompt_tokens']} tokens, then {report['tokens']} steps; KV {report['kv']}; loaded "
        f"in {report['load_seconds']:.1f} s. The bound is what a step reads at the speed of copies.\n\n"
        + markdown(header, [decode_line(batch) for batch in report["batches"]])
        + "\n"
        + markdown(["memory", "", ""], memory_lines(report["memory"][0]))
    )


def tables(directory: Path) -> str:
    def read(name: str) -> dict:
        return json.loads((directory / name).read_text())

    device, commit = ((directory / name).read_text().strip() for name in ("device", "commit"))
    parts = [f"Commit {commit}, {device}: `bundle/measure`, one run.\n"]
    if (directory / "kernels.json").exists():
        parts.append(kernels_table(read("kernels.json")))
    for path in sorted(directory.glob("decode-*.json")):
        parts.append(decode_tables(path.stem.removeprefix("decode-"), read(path.name)))
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    page = PAGE.read_text()
    if any(page.count(mark) != 1 for mark in (BEGIN, END)):
        fail(f"{PAGE}: the marks of the tables are missing")
    try:
        text = tables(directory)
        for path in directory.glob("*.json"):
            shutil.copy(path, RESULTS / f"gpu-{path.name}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        fail(f"{directory}: {error!r}")
    before, rest = page.split(BEGIN)
    PAGE.write_text(before + BEGIN + text + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
