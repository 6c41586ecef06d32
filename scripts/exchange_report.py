#!/usr/bin/env python3
"""Measures the exchange on a virtual cluster of four hosts and writes docs/results/exchange.*.

    make build && sudo /usr/bin/python3 scripts/exchange_report.py

Takes about an hour on two cores. Each part's JSON is kept as soon as it is measured;
at the end exchange_page.py writes the tables and the picture anew from all that is there. Needs what
cluster/virtual/cluster needs (root, iproute2), and Debian's python3-matplotlib.
"""

import argparse
import datetime
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from exchange_page import RESULTS, ROOT, fail, hand_over, write_page

TERNION = ROOT / "build/release/ternion"
CLUSTER = ROOT / "cluster/virtual/cluster"
LADDERS = [RESULTS / "quality-tiny-a48.json", RESULTS / "quality-tiny.json"]

# Never a user's cluster; and the same in every checkout, as two reports at once would measure nonsense.
os.environ["TERNION_CLUSTER"] = "exchange-report"

RANKS = 16  # of the report; four per host
TOKENS = {"1gbit": [1, 8, 32, 128], "none": [1, 8, 32, 128, 256]}  # by rate, per rank
LADDER = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048]  # of a smaller shape, one rank per host

# The model whose decode is timed, one rank per host. Random weights: speed does not depend on them.
# Real models have dozens of layers; with eight, what nothing hides in a step with two micro-batches
# (the first rows' way out and the last rows' way back) weighs little, as it does there.
MODEL = {
    "architectures": ["BitNetMoeForCausalLM"],
    "model_type": "bitnet_moe",
    "vocab_size": 4096,
    "hidden_size": 2048,
    "num_hidden_layers": 8,
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
    (32, "12mbit", 12, [("bf16", "1"), ("int4", "1"), ("bf16", "2"), ("int4", "2")]),
    (32, "20mbit", 32, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
    (128, "25mbit", 20, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
    (128, "none", 12, [("int4", "1"), ("int4", "2"), ("int4", "auto")]),
]
REPETITIONS = 5


def run(*command: object) -> str:
    return subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def across_hosts(ranks: int, *arguments: object) -> None:
    run(CLUSTER, "run", "-n", ranks, TERNION, *arguments)


def ladder_flags() -> list:
    return [word for path in LADDERS for word in ("--ladder", path)]


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


def keep(path: Path) -> None:
    """Puts a finished file among the results. By a rename: there it is never half-written."""
    part = RESULTS / f".{path.name}.part"
    text = path.read_text()
    if path.suffix == ".json":  # in one line: what ranks sent each other fills tens of thousands
        text = json.dumps(json.loads(text)) + "\n"
    part.write_text(text)
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


def measure_ladder(directory: Path) -> None:
    """From one token to a prefill's, at the shape of Qwen3-30B-A3B."""
    run(CLUSTER, "rate", "1gbit")
    out = directory / "exchange-qwen3-30b-a3b-1gbit.json"
    across_hosts(
        4, "bench", "exchange", "--shape", "qwen3-30b-a3b", "--tokens", ",".join(map(str, LADDER)),
        "--seconds", 0.5, "--json", out,
    )  # fmt: skip
    keep(out)


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
    out.write_text(json.dumps({"machine": about, "model": MODEL, "decode": table}))
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


PARTS = {
    "decode": measure_decodes,
    "trace": measure_trace,
    "ladder": measure_ladder,
    "shape": measure_shape,
}


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, help="measure only this part; may be repeated"
    )
    only = parser.parse_args().only or PARTS
    on_signals(interrupted)
    try:
        check_machine()
        measure([part for part in PARTS if part in only])
        write_page()
    except subprocess.CalledProcessError as error:
        command = shlex.join(map(str, error.cmd))
        fail(f"failed with {error.returncode}, finished parts are kept: {command}")
    except OSError as error:
        fail(str(error))


if __name__ == "__main__":
    main()
