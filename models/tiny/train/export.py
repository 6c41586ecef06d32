"""Packs a training checkpoint into a Hugging Face directory, and measures it.

python export.py --checkpoint DIR/checkpoint.pt --out ..          # writes the model
python export.py --out .. --evaluate ../heldout.txt               # bits per byte, golden path
"""

import argparse
import math
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from oracle import checkpoint
from oracle.checkpoint import Checkpoint, encode_linear
from oracle.config import ModelConfig
from oracle.model import GoldenModel

STACKED = ("gate_proj", "up_proj", "down_proj")  # [experts, out, in] in training
TERNARY = STACKED + ("q_proj", "k_proj", "v_proj", "o_proj")


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Names and packing of the directory; what is not ternary becomes bf16."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        name, leaf = "model." + name, name.rsplit(".", 1)[-1]
        if leaf in STACKED:
            prefix = name.removesuffix(leaf)
            for expert, weight in enumerate(value):
                tensors |= encode_linear(
                    f"{prefix}experts.{expert}.{leaf}", weight, config.quantization
                )
        elif leaf in TERNARY:
            tensors |= encode_linear(name, value, config.quantization)
        else:
            tensors[name + ".weight"] = value.bfloat16()
    return tensors


def export(checkpoint_path: Path, out: Path) -> None:
    saved = torch.load(checkpoint_path, map_location="cpu", weights_only=False)
    checkpoint.save(out, saved["config"], to_huggingface(saved["model"], saved["config"]))
    size = (out / "model.safetensors").stat().st_size
    print(
        f"step {saved['step']}, {saved['tokens']} tokens, {saved['elapsed_s']:.0f} s; {size} bytes"
    )


def text_nats(model: GoldenModel, ids: list[int], window: int) -> float:
    """Sum of -ln p over ids[1:]; windows overlap by one token, so each is predicted once."""
    nats = 0.0
    for first in range(0, len(ids) - 1, window - 1):
        part = ids[first : first + window]
        log_probs = model.forward(part).log_softmax(dim=-1)
        nats -= log_probs[torch.arange(len(part) - 1), torch.tensor(part[1:])].double().sum().item()
    return nats


def evaluate(model_dir: Path, text_path: Path) -> None:
    text = text_path.read_bytes().decode()
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    loaded = Checkpoint(model_dir)
    ids = [loaded.config.bos_token_id, *tokenizer.encode(text).ids]
    nats = text_nats(GoldenModel(loaded), ids, loaded.config.max_position_embeddings)
    num_bytes = len(text.encode())
    print(
        f"{num_bytes} bytes, {len(ids) - 1} tokens, "
        f"{nats / math.log(2) / num_bytes:.4f} bits per byte, "
        f"perplexity {math.exp(nats / (len(ids) - 1)):.2f} per token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--evaluate", type=Path, metavar="TEXT")
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.checkpoint:
        export(args.checkpoint, args.out)
    if args.evaluate:
        evaluate(args.out, args.evaluate)


if __name__ == "__main__":
    main()
