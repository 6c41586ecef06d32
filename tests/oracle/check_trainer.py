"""Compares the trainer (models/tiny/train) with the oracle.

    python check_trainer.py

What is trained must be what the runtime computes: a random QatModel, exported, gives the same loss
as the golden forward pass. And the product over experts that a GPU runs equals the CPU's.
"""

import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from oracle import checkpoint
from oracle.checkpoint import Checkpoint
from oracle.config import ModelConfig
from oracle.model import GoldenModel

sys.path.append(str(Path(__file__).resolve().parents[2] / "models" / "tiny" / "train"))
from export import golden_log_likelihood, to_huggingface  # noqa: E402
from qat_model import (  # noqa: E402
    QatModel,
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
# several models is looked at; values often stand on the very edge of a 3-bit KV cell.
NUM_MODELS = 7
MAX_LOSS_DIFFERENCE = {"b158": 1e-5, "a48 with fp32 KV": 1e-5, "a48": 5e-2}  # nats per token
MAX_PRODUCT_DIFFERENCE = 1e-5


def random_model(config: ModelConfig) -> QatModel:
    """Every float tensor is a bf16 number, as on disk."""
    model = QatModel(config, torch.float32)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data + 0.05 * torch.randn_like(parameter.data)
        if "proj" not in name:
            parameter.data = parameter.data.bfloat16().float()
    return model


@torch.no_grad()
def loss_difference(config: ModelConfig) -> float:
    """16-bit K and V are left at fp32 on both sides, as the trainer does."""
    model = random_model(config)
    ids = torch.randint(0, config.vocab_size, (1, 48))
    trained = model(ids[:, :-1], ids[:, 1:])[0].item()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), config, to_huggingface(model.state_dict(), config))
        golden = GoldenModel(Checkpoint(Path(folder)), 32 if config.kv_bits == 16 else None)
    nats = -golden_log_likelihood(golden)(ids[0].tolist())
    return abs(trained - nats / (ids.shape[1] - 1))


def product_difference() -> float:
    counts = [5, 0, 9, 1]
    rows, weights = torch.randn(sum(counts), 24), torch.randn(len(counts), 12, 24)
    difference = grouped_linear(rows, weights, counts) - padded_linear(rows, weights, counts)
    return difference.abs().max().item()


def main() -> None:
    torch.manual_seed(3)
    torch.set_num_threads(1)
    failed = False
    configs = {
        "b158": with_precision(CONFIG, "b158"),
        "a48 with fp32 KV": replace(with_precision(CONFIG, "a48"), kv_bits=16),
        "a48": with_precision(CONFIG, "a48"),
    }
    for name, config in configs.items():
        difference = statistics.median(loss_difference(config) for _ in range(NUM_MODELS))
        failed |= difference > MAX_LOSS_DIFFERENCE[name]
        print(f"{name}: trainer and oracle differ by {difference:.1e} nats per token")
    difference = product_difference()
    failed |= difference > MAX_PRODUCT_DIFFERENCE
    print(f"experts padded to one product differ by {difference:.1e}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
