"""Quantization-aware training of the tiny model.

    python train.py --work DIR --minutes 65 [--resume]

Reads DIR/train.bin, writes DIR/checkpoint.pt and DIR/train_log.csv. The learning rate follows the
clock (cosine over --minutes), so that a run ends well on a machine that is shared.
"""

import argparse
import csv
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oracle.config import ModelConfig
from qat_model import RESIDUAL_PROJECTIONS, RESIDUAL_SCALE, QatModel

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
    max_position_embeddings=512,
)
PEAK_LR = 2e-3
WARMUP_STEPS = 60
WEIGHT_DECAY = 0.1
BALANCE_WEIGHT = 0.01
MAX_GRAD_NORM = 1.0
LOG_EVERY = 10  # steps
SAVE_EVERY_S = 240


class Windows:
    """Non-overlapping windows of the token stream, in a fresh random order each epoch."""

    def __init__(self, path: Path, length: int, seed: int):
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
    return torch.optim.AdamW(groups, lr=PEAK_LR, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, progress: float) -> float:
    """Warm-up by steps, then cosine to zero over the run's time. progress in [0, 1]"""
    return (
        PEAK_LR
        * min(1.0, (step + 1) / WARMUP_STEPS)
        * 0.5
        * (1 + math.cos(math.pi * min(progress, 1.0)))
    )


class Run:
    """A training run: everything that a checkpoint holds."""

    def __init__(self, work: Path, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        self.path, self.log_path = work / "checkpoint.pt", work / "train_log.csv"
        self.device = device
        self.model = QatModel(CONFIG, dtype).to(device)
        self.optimizer = make_optimizer(self.model)
        self.step, self.elapsed_s, self.tokens = 0, 0.0, 0

    def save(self) -> None:
        state = {
            "config": CONFIG,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "tokens": self.tokens,
        }
        partial = self.path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self.path)

    def resume(self) -> None:
        state = torch.load(self.path, map_location=self.device, weights_only=False)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.elapsed_s, self.tokens = state["step"], state["elapsed_s"], state["tokens"]

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

    def log(
        self,
        losses: list[float],
        balance: float,
        loads: Tensor,
        lr: float,
        seconds: float,
        tokens: int,
    ) -> None:
        row = {
            "step": self.step,
            "elapsed_s": round(self.elapsed_s),
            "tokens": self.tokens,
            "loss": round(sum(losses) / len(losses), 4),
            "balance": round(balance, 4),
            "lr": f"{lr:.3g}",
            "tokens_per_s": round(tokens / seconds),
            "max_load": round(loads.max().item(), 4),
            "min_load": round(loads.min().item(), 4),
        }
        new = not self.log_path.exists()
        with self.log_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if new:
                writer.writeheader()
            writer.writerow(row)
        print(row, flush=True)


def train(run: Run, windows: Windows, batch_size: int, total_s: float) -> None:
    losses: list[float] = []
    start = last_log = last_save = time.monotonic()
    spent_before = run.elapsed_s
    while run.elapsed_s < total_s:
        lr = learning_rate(run.step, run.elapsed_s / total_s)
        loss, balance, loads = run.advance(
            *windows.batch(run.tokens // windows.length, batch_size), lr
        )
        losses.append(loss)
        now = time.monotonic()
        run.elapsed_s = spent_before + now - start
        if run.step % LOG_EVERY == 0:
            tokens = len(losses) * batch_size * windows.length
            run.log(losses, balance, loads, lr, now - last_log, tokens)
            losses, last_log = [], now
        if now - last_save > SAVE_EVERY_S:
            run.save()
            last_save = now
    run.save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.work, args.device, getattr(torch, args.dtype))
    if args.resume:
        run.resume()
    windows = Windows(args.work / "train.bin", CONFIG.max_position_embeddings, seed=1)
    train(run, windows, args.batch, args.minutes * 60)


if __name__ == "__main__":
    main()
