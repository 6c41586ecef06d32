#!/usr/bin/env python3
"""What every CUDA kernel takes of each GPU it is built for: registers, shared memory, spills.

Compiles kernels/cuda as the given build does and reads what ptxas says. Needs nvcc, no GPU.

    cmake --preset cuda && scripts/ptxas_report.py build/cuda > docs/results/gpu_resources.md
"""

import argparse
import json
import pathlib
import re
import shlex
import subprocess
import sys

ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\S+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


def kernels_of(text):
    """(mangled name, GPU, registers, shared bytes, stack bytes, spilled bytes) from ptxas -v."""
    entry, stack = None, (0, 0)
    for line in text.splitlines():
        if match := ENTRY.search(line):
            entry = match.groups()
        elif match := STACK.search(line):
            frame, stores, loads = map(int, match.groups())
            stack = (frame, stores + loads)
        elif (match := USED.search(line)) and entry:
            shared = SHARED.search(line)
            yield (*entry, int(match[1]), int(shared[1]) if shared else 0, *stack)
            entry = None


def demangle(names):
    out = subprocess.run(["c++filt"], input="\n".join(names), text=True, capture_output=True, check=True)
    return dict(zip(names, out.stdout.splitlines()))


def short(name):
    """`Kernel<..>` without namespaces and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|_GLOBAL__N__\w+::|_NV_ANON_NAMESPACE::", "", name)
    name = re.sub(r"ternion::kernels::", "", name)
    name = re.sub(r"^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=pathlib.Path, help="a configured build directory with CUDA")
    build = parser.parse_args().build
    commands = json.loads((build / "compile_commands.json").read_text())
    rows = []
    for command in commands:
        if not command["file"].endswith(".cu") or "nvcc" not in command["command"]:
            continue
        words = shlex.split(command["command"])
        words[words.index("-o") + 1] = "/dev/null"
        run = subprocess.run(
            words + ["-Xptxas", "-v"], cwd=command["directory"], text=True, capture_output=True
        )
        if run.returncode != 0:
            sys.exit(run.stderr)
        file = pathlib.Path(command["file"]).name
        rows += [(file, *kernel) for kernel in kernels_of(run.stdout + run.stderr)]
    if not rows:
        sys.exit(f"error: {build} builds no CUDA sources; configure it with TERNION_CUDA=ON")
    names = demangle([row[1] for row in rows])
    nvcc = subprocess.run(["nvcc", "--version"], text=True, capture_output=True, check=True).stdout
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], text=True, capture_output=True)
    print("# What the CUDA kernels take of a GPU\n")
    print("`cmake --preset cuda && scripts/ptxas_report.py build/cuda > docs/results/gpu_resources.md`\n")
    print(f"Commit {commit.stdout.strip()}, nvcc {re.search(r'release (.*),', nvcc)[1]}. Bytes of a")
    print("block's shared memory, and registers of a thread by GPU, with its bytes of spills where there")
    print("are any.\n")
    gpus = sorted({row[2] for row in rows}, key=lambda gpu: int(re.sub(r"\D", "", gpu)))
    kernels = {}
    for file, name, gpu, registers, shared, _, spilled in rows:
        kernel = kernels.setdefault((file, short(names[name])), {"shared": shared})
        kernel[gpu] = f"{registers}, {spilled} spilled" if spilled else str(registers)
    print("| kernel | shared | " + " | ".join(gpus) + " |\n| --- |" + " --- |" * (1 + len(gpus)))
    for (file, name), kernel in sorted(kernels.items()):
        cells = [str(kernel["shared"])] + [kernel.get(gpu, "") for gpu in gpus]
        print(f"| {file}: `{name}` | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
