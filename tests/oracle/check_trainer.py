"""Compares the trainer (models/tiny/train) with the oracle.

    python check_trainer.py

What is trained must be what the runtime computes: a random QatModel, exported, gives the same loss
as the golden forward pass. And the product over experts that a GPU runs equals the CPU's.
"""

import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # torch.compile would want a C++ compiler and <Python.h>

import torch  # noqa: E402

from oracle import checkpoint  # noqa: E402
from oracle.checkpoint import Checkpoint  # noqa: E402
from oracle.config import ModelConfig  # noqa: E402
from oracle.model import GoldenModel  # noqa: E402
from oracle.quant import cached  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[2] / "models" / "tiny" / "train"))
from export import golden_log_likelihood, to_huggingface  # noqa: E402
from qat_model import (  # noqa: E402
    QatModel,
    Quantizers,
    grouped_linear,
    padded_linear,
    with_precision,
)

CONFIG = ModelConfig(
    model_type="bitnet_moe",
    vocab_size=300,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=48,
    num_experts=8,
    num_experts_per_tok=2,
    hidden_act="relu2",
    max_position_embeddings=64,
)
# One code that falls to the other side of a tie spreads through a random model, so that the median of
# several is looked at. With a 3-bit cache that is every model: an integer sum of 0 lies on the edge
# of a cell, and the trainer's float sums fall to either side. There the cache is compared by itself.
NUM_MODELS = 7
NUM_TOKENS = 48
MAX_LOSS_DIFFERENCE = {  # nats per token
    "b158": 1e-5,
    "a48 with fp32 KV": 1e-5,
    "a48": 5e-2,
    "b158, bf16 products": 5e-3,
}
MAX_PRODUCT_DIFFERENCE = 1e-5


def random_model(config: ModelConfig, dtype: torch.dtype) -> QatModel:
    """Every float tensor is a bf16 number, as on disk."""
    model = QatModel(config, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter.data)
        if "proj" not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


@torch.no_grad()
def loss_difference(config: ModelConfig, dtype: torch.dtype) -> float:
    """16-bit K and V are left at fp32 on both sides, as the trainer does."""
    model = random_model(config, dtype)
    ids = torch.randint(0, config.vocab_size, (1, NUM_TOKENS))
    trained = model(ids[:, :-1], ids[:, 1:])[0].item()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), config, to_huggingface(model.state_dict(), config))
        golden = GoldenModel(Checkpoint(Path(folder)), 32 if config.kv_bits == 16 else None)
    nats = -golden_log_likelihood(golden)(ids[0].tolist())
    return abs(trained - nats / (ids.shape[1] - 1))


def caches_agree(config: ModelConfig) -> bool:
    x = torch.randn(2, config.num_key_value_heads, NUM_TOKENS, config.head_dim)
    trained = Quantizers(config, torch.float32).keys_or_values(x)
    return torch.equal(trained, x if config.kv_bits == 16 else cached(x, config.kv_bits))


def product_difference() -> float:
    counts = [5, 0, 9, 1]
    rows, weights = torch.randn(sum(counts), 24), torch.randn(len(counts), 12, 24)
    difference = grouped_linear(rows, weights, counts) - padded_linear(rows, weights, counts)
    return difference.abs().max().item()


def main() -> None:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    failed = False
    b158, a48 = with_precision(CONFIG, "b158"), with_precision(CONFIG, "a48")
    cases = {
        "b158": (b158, torch.float32),
        "a48 with fp32 KV": (replace(a48, kv_bits=16), torch.float32),
        "a48": (a48, torch.float32),
        "b158, bf16 products": (b158, torch.bfloat16),
    }
    for name, (config, dtype) in cases.items():
        difference = statistics.median(loss_difference(config, dtype) for _ in range(NUM_MODELS))
        failed |= difference > MAX_LOSS_DIFFERENCE[name] or not caches_agree(config)
        print(f"{name}: trainer and oracle differ by {difference:.1e} nats per token")
    difference = product_difference()
    failed |= difference > MAX_PRODUCT_DIFFERENCE
    print(f"experts padded to one product differ by {difference:.1e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
