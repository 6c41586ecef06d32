#!/usr/bin/env python3
"""Measures the exchange on a virtual cluster of four hosts and writes docs/results/exchange.*.

    make build && sudo /usr/bin/python3 scripts/exchange_report.py

Takes about half an hour on two cores. Each part's JSON is kept as soon as it is measured; at the end
exchange.svg and the tables between the marks of docs/results/exchange.md are written anew from all
JSON that is there. Needs what cluster/virtual/cluster needs (root, iproute2), and Debian's
python3-matplotlib. --tables and --draw need neither root nor a cluster.
"""

import argparse
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
TERNION = ROOT / "build/release/ternion"
CLUSTER = ROOT / "cluster/virtual/cluster"
RESULTS = ROOT / "docs/results"
LADDERS = [ROOT / "docs/results/quality-tiny-a48.json", ROOT / "docs/results/quality-tiny.json"]

# Never a user's cluster; and the same in every checkout, as two reports at once would measure nonsense.
os.environ["TERNION_CLUSTER"] = "exchange-report"

RANKS = 16  # of the report; four per host
TOKENS = {"1gbit": [1, 8, 32, 128], "none": [1, 8, 32, 128, 256]}  # by rate, per rank

# The model whose decode is timed, one rank per host. Random weights: speed does not depend on them.
MODEL = {
    "architectures": ["BitNetMoeForCausalLM"],
    "model_type": "bitnet_moe",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "moe_intermediate_size": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "shared_expert_intermediate_size": 0,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "act_bits": 4,
    "kv_bits": 3,
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": ["lm_head", "gate"],
    },
}
# What is compared, by turns: sequences in all, rate, tokens each, and (wire, micro-batches).
DECODES = [
    (32, "12mbit", 20, [("bf16", "1"), ("int4", "1"), ("bf16", "2"), ("int4", "2")]),
    (32, "20mbit", 32, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
    (128, "25mbit", 20, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
    (128, "none", 20, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
]
REPETITIONS = 5


def fail(why: str) -> NoReturn:
    sys.exit(f"exchange_report: error: {why}")


def run(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def across_hosts(ranks: int, *arguments: object) -> None:
    run(CLUSTER, "run", "-n", ranks, TERNION, *arguments)


def ladder_flags() -> list:
    return [word for path in LADDERS for word in ("--ladder", path)]


# ---- Measuring


def check_machine() -> None:
    """Fails where nothing could be measured."""
    if os.geteuid() != 0:
        fail("a virtual cluster needs root: sudo /usr/bin/python3 scripts/exchange_report.py")
    if not os.access(TERNION, os.X_OK):
        fail(f"{TERNION} is missing: make build")
    for tool in ("ip", "tc", "mpirun"):
        if not shutil.which(tool):
            fail(f"'{tool}' is missing: apt install iproute2 openmpi-bin")
    if not run(CLUSTER, "status").endswith(": down\n"):
        down = f"sudo env TERNION_CLUSTER={os.environ['TERNION_CLUSTER']} {CLUSTER} down"
        fail(f"its cluster is up: another report is running, or was killed; then {down}")


def hand_over(path: Path) -> None:
    """Results belong to whoever called sudo."""
    if os.geteuid() == 0 and "SUDO_UID" in os.environ:
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ["SUDO_GID"]))


def keep(path: Path) -> None:
    """Puts a finished file among the results. By a rename: there it is never half-written."""
    part = RESULTS / f".{path.name}.part"
    shutil.copyfile(path, part)
    hand_over(part)
    part.rename(RESULTS / path.name)


def measure_shape(directory: Path) -> None:
    """Every wire at the shape of DeepSeek-V3."""
    for rate in TOKENS:
        run(CLUSTER, "rate", rate)
        out = directory / f"exchange-deepseek-v3-{rate}.json"
        matrix = out.with_suffix(".csv")
        across_hosts(
            RANKS, "bench", "exchange", "--shape", "deepseek-v3",
            "--tokens", ",".join(map(str, TOKENS[rate])), "--seconds", 0.5, *ladder_flags(),
            "--json", out, "--matrix", matrix,
        )  # fmt: skip
        keep(out)
        keep(matrix)


def measure_trace(directory: Path) -> None:
    """The routing of a bundled model, whose placements have something to save."""
    trace = directory / "tiny-a48.trace"
    run(
        TERNION, "eval", "--model", ROOT / "models/tiny-a48",
        "--text", ROOT / "models/tiny/test.txt", "--record-trace", trace,
    )  # fmt: skip
    for rate in ("1gbit", "100mbit"):
        run(CLUSTER, "rate", rate)
        out = directory / f"exchange-trace-{rate}.json"
        across_hosts(
            4, "bench", "exchange", "--trace", trace, "--hidden", 2048, "--tokens", 128,
            "--seconds", 2, "--json", out,
        )  # fmt: skip
        keep(out)


def write_prompts(path: Path, count: int) -> None:
    words = "candle ship storm water house garden letter stone winter bread river king".split()
    choose = random.Random(1)
    lines = (" ".join(choose.choice(words) for _ in range(3)) for _ in range(count))
    path.write_text("\n".join(lines) + "\n")


def measure_decode(model: Path, prompts: Path, tokens: int, wire: str, batches: str) -> dict:
    out = prompts.with_suffix(".json")
    across_hosts(
        4, "run", "--model", model, "--prompt-file", prompts, "--max-tokens", tokens,
        "--wire-dispatch", wire, "--wire-combine", wire, "--micro-batches", batches,
        "--json", out,
    )  # fmt: skip
    report = json.loads(out.read_text())
    return {"decode_tok_s": report["decode_tok_s"], **report["decode_time"]}


def measure_decodes(directory: Path) -> None:
    """Decode rates of MODEL, by wire and micro-batches."""
    about = machine()
    config, model, prompts = directory / "config.json", directory / "model", directory / "p.txt"
    config.write_text(json.dumps(MODEL))
    run(TERNION, "synth", "--config", config, "--out", model)
    table = []
    for sequences, rate, tokens, variants in DECODES:
        run(CLUSTER, "rate", rate)
        write_prompts(prompts, sequences)
        runs = {variant: [] for variant in variants}
        for _ in range(REPETITIONS):
            for variant in variants:  # by turns: a slow minute of the machine hits all alike
                runs[variant].append(measure_decode(model, prompts, tokens, *variant))
        for (wire, batches), of_variant in runs.items():
            table.append(
                {"sequences": sequences, "rate": rate, "wire": wire, "micro_batches": batches,
                 "runs": of_variant}
            )  # fmt: skip
            print(sequences, rate, wire, batches, [round(r["decode_tok_s"]) for r in of_variant])
    out = directory / "exchange-decode.json"
    out.write_text(json.dumps({"machine": about, "model": MODEL, "decode": table}, indent=1) + "\n")
    keep(out)


def machine() -> dict:
    cpu = next(
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    )
    commit = run("git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=7").strip()
    return {
        "commit": commit,
        "cpu": cpu,
        "cores": os.cpu_count(),
        "kernel": os.uname().release,
        "date": datetime.date.today().isoformat(),
    }


PARTS = {"decode": measure_decodes, "trace": measure_trace, "shape": measure_shape}


def on_signals(action: object) -> None:
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, action)


def interrupted(*_: object) -> None:
    on_signals(signal.SIG_IGN)  # a second Ctrl-C must not leave the cluster up
    fail("interrupted; parts that were finished are kept")


def measure(parts: list) -> None:
    with tempfile.TemporaryDirectory() as directory:
        try:
            run(CLUSTER, "up", 4)
            for part in parts:
                PARTS[part](Path(directory))
        finally:
            on_signals(signal.SIG_IGN)
            subprocess.run([CLUSTER, "down"])  # says itself what it cannot do


# ---- Telling


TRACES = ["trace-1gbit", "trace-100mbit"]


def read(name: str) -> dict:
    return json.loads((RESULTS / f"exchange-{name}.json").read_text())


def case_of(report: dict, wire: str, tokens: int) -> dict:
    return next(c for c in report["cases"] if c["wire"] == wire and c["tokens_per_rank"] == tokens)


def p50_ms(case: dict) -> float:
    return case["time_us"]["total"]["p50"] * 1e-3


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


def ladder_table() -> str:
    lines = []
    for rate in TOKENS:
        report = read(f"deepseek-v3-{rate}")
        for tokens in TOKENS[rate]:
            line = ["1 Gbit/s" if rate == "1gbit" else "unshaped", tokens]
            for wire in ("int4/int4", "int8/bf16", "bf16/bf16", "bf16/bf16, no dedup"):
                line.append(f"{p50_ms(case_of(report, wire, tokens)):.1f}")
            line.append(f"{p50_ms(case_of(report, 'int4/int4, alltoallv', tokens)):.1f}")
            each = case_of(report, "int4/int4", tokens)
            bytes_each = each["per_token_and_layer"]
            messages = sum(each["traffic"][p]["messages"] for p in ("dispatch", "combine"))
            total = sum(each["traffic"][p]["message_bytes"] for p in ("dispatch", "combine"))
            line.append(f"{total / messages / 1e3:.1f}")
            line.append(f"{bytes_each['nic_bytes'] / bytes_each['inter_node_bytes']:.3f}")
            lines.append(line)
    header = ["links", "tokens per rank", "int4/int4", "int8/bf16", "bf16/bf16"]
    header += ["bf16/bf16, no dedup", "int4/int4 by alltoallv", "kB per message", "NIC/message"]
    return markdown(header, lines)


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
    cases = shaped["cases"] + unshaped["cases"]
    # By rank; the reports of f8705dd have the largest rank's alone.
    held = [case["peak_memory_bytes"] for case in cases]
    memory = max(max(h) if isinstance(h, list) else h for h in held) / 1e6
    tokens = max(case["tokens_per_rank"] for case in cases)
    # With --only, parts may have been measured at different commits.
    commits = {report["commit"] for report in (shaped, unshaped, *map(read, TRACES))}
    others = sorted(commit for commit in commits if not commit.startswith(about["commit"]))
    return "\n".join(
        [
            f"Commit {', '.join([about['commit'], *others])}, {about['cores']} cores of an "
            f"{about['cpu']} ({shaped['isa']}), Linux {about['kernel']}, {about['date']}.\n",
            "### Wires: kB per token and layer, 128 tokens per rank\n",
            wire_table(),
            f"16 ranks, four per host; the largest held {memory:.0f} MB at up to {tokens} tokens.\n",
            "### Tokens per rank: ms for one layer, dispatch and combine\n",
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
BEGIN, END = "<!-- tables: scripts/exchange_report.py -->\n", "<!-- end of tables -->\n"


def write_tables() -> None:
    before, rest = PAGE.read_text().split(BEGIN)
    PAGE.write_text(before + BEGIN + tables() + END + rest.split(END)[1])
    hand_over(PAGE)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--only", action="append", choices=PARTS, help="measure only this part; may be repeated"
    )
    modes.add_argument("--tables", action="store_true", help="tables and picture, no measuring")
    modes.add_argument(
        "--draw", nargs="+", type=Path, metavar="FILE",
        help="A.json [B.json] OUT.svg: the picture of one or two ternion bench exchange --json",
    )  # fmt: skip
    args = parser.parse_args()
    if args.draw and (len(args.draw) not in (2, 3) or args.draw[-1].suffix != ".svg"):
        parser.error("--draw takes one or two reports and then the picture's name, OUT.svg")
    return args


def main() -> None:
    args = parse_arguments()
    on_signals(interrupted)
    try:
        if args.draw:
            draw_others(args.draw[:-1], args.draw[-1])
            return
        if any(PAGE.read_text().count(mark) != 1 for mark in (BEGIN, END)):
            fail(f"{PAGE}: the marks of the tables are missing")
        if not args.tables:
            check_machine()
            measure([part for part in PARTS if part in (args.only or PARTS)])
        draw_own()
        write_tables()
    except subprocess.CalledProcessError as error:
        command = shlex.join(map(str, error.cmd))
        fail(f"failed with {error.returncode}, finished parts are kept: {command}")
    except OSError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
