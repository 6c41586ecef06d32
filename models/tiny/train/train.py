"""Quantization-aware training of the tiny models: one command for each precision.

    python train.py --work DIR --precision bf16            # the float twin, for comparison
    python train.py --work DIR --precision b158            # ternary weights, int8 activations
    python train.py --work DIR --precision a48             # goes on from b158's branch point

Reads DIR/train.bin and DIR/validation.bin; writes DIR/<precision>/checkpoint.pt and log.csv. All
three see the same windows in the same order under one cosine schedule over --tokens; a48 takes over
from b158 when BRANCH_FRACTION of them are done. The same command goes on with a run that was stopped
(SIGTERM saves first); to begin again, remove DIR/<precision>.
"""

import argparse
import csv
import math
import signal
import time
from functools import lru_cache
from pathlib import Path
from threading import Event

import numpy as np
import torch
import torch._inductor.config
from torch import Tensor

from oracle.config import ModelConfig
from qat_model import PRECISIONS, RESIDUAL_PROJECTIONS, RESIDUAL_SCALE, QatModel, with_precision

CONFIG = ModelConfig(
    model_type="bitnet_moe",
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    moe_intermediate_size=256,
    num_experts=16,
    num_experts_per_tok=2,
    hidden_act="relu2",
    max_position_embeddings=512,
)
# README.md, last paragraph.
PEAK_LR = {"bf16": 1e-3, "b158": 2e-3, "a48": 2e-3}
WARMUP_TOKENS = 204_800
WEIGHT_DECAY = 0.1
BALANCE_WEIGHT = 0.01
MAX_GRAD_NORM = 1.0
BRANCH_FRACTION = 0.75  # of the tokens: BitNet a4.8's second stage
LOG_EVERY = 20  # steps
VALIDATE_EVERY = 500  # steps
SAVE_EVERY_S = 240


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


class Windows:
    """Non-overlapping windows of a token stream, in a fresh random order each epoch."""

    def __init__(self, path: Path, length: int, seed: int = 1):
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")
        self.length = length
        self.count = (len(self.ids) - 1) // length
        self.seed = seed

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """The ids of windows first.. of the run and their successors, int64 [size, length]."""
        rows = [self.window(number) for number in range(first, first + size)]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return ids[:, :-1], ids[:, 1:]

    def window(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.count)
        begin = epoch_order(self.seed, epoch, self.count)[place] * self.length
        return self.ids[begin : begin + self.length + 1]


def make_optimizer(model: QatModel) -> torch.optim.AdamW:
    """Weight decay on matrices only; residual projections learn in their own scale."""
    named = list(model.named_parameters())
    residual = [p for n, p in named if n.endswith(RESIDUAL_PROJECTIONS)]
    matrices = [p for n, p in named if p.dim() > 1 and not n.endswith(RESIDUAL_PROJECTIONS)]
    vectors = [p for _, p in named if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY, "lr_scale": 1.0},
        {"params": residual, "weight_decay": WEIGHT_DECAY, "lr_scale": RESIDUAL_SCALE},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def learning_rate(peak: float, before: int, after: int, total: int) -> float:
    """Of the step that begins `before` and ends `after` so many tokens of `total`: a warm-up, and a
    cosine to zero over all of them."""
    cosine = 0.5 * (1 + math.cos(math.pi * before / total))
    return peak * min(1.0, after / WARMUP_TOKENS) * cosine


class Run:
    """A training run: everything that a checkpoint holds."""

    def __init__(
        self, folder: Path, precision: str, total_tokens: int, device: str, dtype: torch.dtype
    ):
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.total_tokens, self.device = folder, total_tokens, device
        self.config, self.peak_lr = with_precision(CONFIG, precision), PEAK_LR[precision]
        self.model = QatModel(self.config, dtype).to(device)
        self.optimizer = make_optimizer(self.model)
        self.step, self.tokens, self.elapsed_s = 0, 0, 0.0

    def save(self, name: str = "checkpoint.pt") -> None:
        state = {
            "config": self.config,
            "total_tokens": self.total_tokens,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "tokens": self.tokens,
            "elapsed_s": self.elapsed_s,
        }
        partial = self.folder / f"{name}.partial"
        torch.save(state, partial)
        partial.replace(self.folder / name)

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=False)
        if state["total_tokens"] != self.total_tokens:
            raise SystemExit(f"{path} is of a schedule over {state['total_tokens']} tokens")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]

    def advance(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One optimizer step. Returns the loss, the balance loss and the expert loads."""
        after = self.tokens + ids.numel()
        lr = learning_rate(self.peak_lr, self.tokens, after, self.total_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss, balance, loads = self.model(ids.to(self.device), targets.to(self.device))
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step, self.tokens, self.lr = self.step + 1, after, lr
        return loss.detach(), balance.detach(), loads

    @torch.no_grad()
    def validate(self, windows: Windows, batch_size: int) -> float:
        """Mean loss over all windows, nats per token."""
        total = 0.0
        for first in range(0, windows.count, batch_size):
            size = min(batch_size, windows.count - first)
            ids, targets = windows.batch(first, size)
            total += size * self.model(ids.to(self.device), targets.to(self.device))[0].item()
        return total / windows.count


class Log:
    """DIR/<precision>/log.csv, one row per LOG_EVERY steps."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.forget_from(first_step)
        self.start()

    def forget_from(self, step: int) -> None:
        """Drops what a stopped run logged after its last checkpoint."""
        if self.path.exists():
            header, *rows = self.path.read_text().splitlines() or [""]
            kept = [row for row in rows if int(row.split(",")[0]) <= step]
            self.path.write_text("".join(line + "\n" for line in (header, *kept) if line))

    def start(self) -> None:
        self.losses: list[Tensor] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, loss: Tensor, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens

    def tokens_per_s(self) -> float:
        return self.tokens / (time.monotonic() - self.since)

    def write(self, row: dict) -> None:
        new = not self.path.exists() or self.path.stat().st_size == 0
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        self.start()


def log_row(run: Run, log: Log, balance: Tensor, loads: Tensor) -> dict:
    return {
        "step": run.step,
        "elapsed_s": round(run.elapsed_s),
        "tokens": run.tokens,
        "loss": round(torch.stack(log.losses).mean().item(), 4),
        "balance": round(balance.item(), 4),
        "lr": f"{run.lr:.3g}",
        "tokens_per_s": round(log.tokens_per_s()),
        "max_load": round(loads.max().item(), 4),
        "min_load": round(loads.min().item(), 4),
        "validation": "",
    }


def train(run: Run, work: Path, batch_size: int) -> None:
    length = run.config.max_position_embeddings
    windows = Windows(work / "train.bin", length)
    held_out = Windows(work / "validation.bin", length)
    log = Log(run.folder / "log.csv", run.step)
    stopping = Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    last = last_save = time.monotonic()
    while run.tokens < run.total_tokens and not stopping.is_set():
        before = run.tokens
        loss, balance, loads = run.advance(*windows.batch(before // length, batch_size))
        now = time.monotonic()
        run.elapsed_s, last = run.elapsed_s + now - last, now
        log.add(loss, run.tokens - before)
        done = run.tokens >= run.total_tokens
        if run.step % LOG_EVERY == 0 or done:
            row = log_row(run, log, balance, loads)
            if run.step % VALIDATE_EVERY == 0 or done:
                row["validation"] = round(run.validate(held_out, batch_size), 4)
            log.write(row)
        if before < BRANCH_FRACTION * run.total_tokens <= run.tokens:
            run.save("branch.pt")
        if now - last_save > SAVE_EVERY_S:
            run.save()
            last_save = now
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--precision", choices=PRECISIONS, required=True)
    parser.add_argument("--tokens", type=float, default=15e6, help="of the whole schedule")
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of matrix products")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.threads = args.threads  # else kernels cached by another run decide
    torch.set_flush_denormal(True)  # moments of idle experts fade into denormals: half the speed
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    folder = args.work / args.precision
    run = Run(folder, args.precision, int(args.tokens), args.device, getattr(torch, dtype))
    if (folder / "checkpoint.pt").exists():
        run.load(folder / "checkpoint.pt")
    elif args.precision == "a48":
        run.load(args.work / "b158" / "branch.pt")
    train(run, args.work, args.batch)


if __name__ == "__main__":
    main()
