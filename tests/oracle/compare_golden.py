"""Compares freshly made goldens with the committed ones.

    python compare_golden.py FRESH COMMITTED

JSON files must be equal; arrays may differ by the last bits, which another CPU's vector code rounds
otherwise.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

RELATIVE_TOLERANCE = 1e-4


def close(fresh: np.ndarray, committed: np.ndarray) -> bool:
    if fresh.shape != committed.shape or fresh.dtype != committed.dtype:
        return False
    if fresh.dtype == np.uint8:
        return np.array_equal(fresh, committed)
    return bool(np.abs(fresh - committed).max() <= RELATIVE_TOLERANCE * np.abs(committed).max())


def load_floats(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file, with bf16 widened to fp32: NumPy has none."""
    return {
        n: t.numpy() if t.dtype.itemsize != 2 else t.float().numpy()
        for n, t in load_file(path).items()
    }


def same_file(fresh: Path, committed: Path) -> bool:
    if fresh.suffix == ".json":
        return json.loads(fresh.read_text()) == json.loads(committed.read_text())
    if fresh.suffix == ".npy":
        return close(np.load(fresh), np.load(committed))
    a, b = load_floats(fresh), load_floats(committed)
    return a.keys() == b.keys() and all(close(a[name], b[name]) for name in a)


def main() -> None:
    fresh, committed = Path(sys.argv[1]), Path(sys.argv[2])
    names = [
        {p.relative_to(root) for p in root.rglob("*") if p.is_file()} for root in (fresh, committed)
    ]
    wrong = [f"{name} exists on one side only" for name in names[0] ^ names[1]]
    wrong += [
        f"{name} differs"
        for name in sorted(names[0] & names[1])
        if not same_file(fresh / name, committed / name)
    ]
    print("\n".join(wrong) or f"{len(names[0])} golden files agree")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
