"""Quantization-aware training of the tiny models: one command for each precision.

    python train.py --work DIR --precision bf16            # the float twin, for comparison
    python train.py --work DIR --precision b158            # ternary weights, int8 activations
    python train.py --work DIR --precision a48             # goes on from b158's branch point

Reads DIR/train.bin and DIR/validation.bin; writes DIR/<precision>/checkpoint.pt and log.csv. All
three see the same windows in the same order under one cosine schedule over --tokens; a48 takes over
from b158 when BRANCH_FRACTION of them are done. A run that was stopped goes on with --resume.
"""

import argparse
import csv
import math
import time
from pathlib import Path

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
# The twin's is the best of 6e-4, 1e-3, 2e-3 and 4e-3 after a million tokens.
PEAK_LR = {"bf16": 1e-3, "b158": 2e-3, "a48": 2e-3}
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.1
BALANCE_WEIGHT = 0.01
MAX_GRAD_NORM = 1.0
BRANCH_FRACTION = 0.75  # of the tokens: BitNet a4.8's second stage
LOG_EVERY = 20  # steps
VALIDATE_EVERY = 500  # steps
VALIDATION_WINDOWS = 48
SAVE_EVERY_S = 240


class Windows:
    """Non-overlapping windows of a token stream, in a fresh random order each epoch."""

    def __init__(self, path: Path, length: int, seed: int = 1):
        self.ids = np.memmap(path, dtype=np.uint16, mode="r")
        self.length = length
        self.count = (len(self.ids) - 1) // length
        self.seed = seed

    def batch(self, first: int, size: int) -> tuple[Tensor, Tensor]:
        """The ids of windows first.. of the run and their successors, int64 [size, length]."""
        order = np.random.default_rng([self.seed, first // self.count]).permutation(self.count)
        windows = np.stack(
            [
                self.ids[w * self.length : (w + 1) * self.length + 1]
                for w in order[[(first + i) % self.count for i in range(size)]]
            ]
        )
        rows = torch.from_numpy(windows.astype(np.int64))
        return rows[:, :-1], rows[:, 1:]


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


def learning_rate(peak: float, step: int, progress: float) -> float:
    """Warm-up by steps, then cosine to zero over the run's tokens. progress in [0, 1]"""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * min(1.0, (step + 1) / WARMUP_STEPS) * cosine


class Run:
    """A training run: everything that a checkpoint holds."""

    def __init__(self, folder: Path, precision: str, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device = folder, device
        self.config, self.peak_lr = with_precision(CONFIG, precision), PEAK_LR[precision]
        self.model = QatModel(self.config, dtype).to(device)
        self.optimizer = make_optimizer(self.model)
        self.step, self.tokens, self.elapsed_s = 0, 0, 0.0

    def save(self, name: str = "checkpoint.pt") -> None:
        state = {
            "config": self.config,
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
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.tokens, self.elapsed_s = state["step"], state["tokens"], state["elapsed_s"]

    def advance(self, ids: Tensor, targets: Tensor, lr: float) -> tuple[float, float, Tensor]:
        """One optimizer step. Returns the loss, the balance loss and the expert loads."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        loss, balance, loads = self.model(ids.to(self.device), targets.to(self.device))
        (loss + BALANCE_WEIGHT * balance).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        return loss.item(), balance.item(), loads

    @torch.no_grad()
    def validate(self, windows: Windows, batch_size: int) -> float:
        """Mean loss over the first windows, nats per token."""
        losses = []
        for first in range(0, VALIDATION_WINDOWS, batch_size):
            ids, targets = windows.batch(first, batch_size)
            losses.append(self.model(ids.to(self.device), targets.to(self.device))[0].item())
        return sum(losses) / len(losses)


class Log:
    """DIR/<precision>/log.csv, one row per LOG_EVERY steps."""

    def __init__(self, path: Path, first_step: int):
        self.path = path
        self.forget_from(first_step)
        self.start()

    def forget_from(self, step: int) -> None:
        """Drops what a stopped run logged after its last checkpoint."""
        if self.path.exists():
            header, *rows = self.path.read_text().splitlines()
            kept = [row for row in rows if int(row.split(",")[0]) <= step]
            self.path.write_text("\n".join([header, *kept]) + "\n")

    def start(self) -> None:
        self.losses: list[float] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, loss: float, tokens: int) -> None:
        self.losses.append(loss)
        self.tokens += tokens

    def write(
        self, run: Run, lr: float, balance: float, loads: Tensor, validation: float | None
    ) -> None:
        row = {
            "step": run.step,
            "elapsed_s": round(run.elapsed_s),
            "tokens": run.tokens,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "validation": "" if validation is None else round(validation, 4),
            "balance": round(balance, 4),
            "lr": f"{lr:.3g}",
            "tokens_per_s": round(self.tokens / (time.monotonic() - self.since)),
            "max_load": round(loads.max().item(), 4),
            "min_load": round(loads.min().item(), 4),
        }
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)
        self.start()


def train(run: Run, work: Path, batch_size: int, total_tokens: int) -> None:
    length = run.config.max_position_embeddings
    windows = Windows(work / "train.bin", length)
    held_out = Windows(work / "validation.bin", length)
    log = Log(run.folder / "log.csv", run.step)
    last = last_save = time.monotonic()
    while run.tokens < total_tokens:
        lr = learning_rate(run.peak_lr, run.step, run.tokens / total_tokens)
        before = run.tokens
        batch = windows.batch(before // length, batch_size)
        loss, balance, loads = run.advance(*batch, lr)
        now = time.monotonic()
        run.elapsed_s, last = run.elapsed_s + now - last, now
        log.add(loss, run.tokens - before)
        if run.step % LOG_EVERY == 0:
            due = run.step % VALIDATE_EVERY == 0 or run.tokens >= total_tokens
            log.write(run, lr, balance, loads, run.validate(held_out, batch_size) if due else None)
        if before < BRANCH_FRACTION * total_tokens <= run.tokens:
            run.save("branch.pt")
        if now - last_save > SAVE_EVERY_S:
            run.save()
            last_save = now
    run.save()
    print(f"validation loss {run.validate(held_out, batch_size):.4f} nats per token", flush=True)


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
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch._inductor.config.cpp.threads = args.threads  # else kernels cached by another run decide
    torch.set_flush_denormal(True)  # moments of idle experts fade into denormals: half the speed
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    run = Run(args.work / args.precision, args.precision, args.device, getattr(torch, dtype))
    if args.resume:
        run.load(run.folder / "checkpoint.pt")
    elif args.precision == "a48":
        run.load(args.work / "b158" / "branch.pt")
    train(run, args.work, args.batch, int(args.tokens))


if __name__ == "__main__":
    main()
