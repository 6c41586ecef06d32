"""Packs a training checkpoint into a Hugging Face directory, and measures models.

    python export.py --checkpoint DIR/b158/checkpoint.pt --out ..       # writes the model
    python export.py --out .. --evaluate ../test.txt                    # bits per byte, golden path
    python export.py --checkpoint DIR/bf16/checkpoint.pt --tokenizer .. --evaluate ../test.txt

The last form measures the float twin, its weights rounded to bf16; it is never packed.
"""

import argparse
import math
from pathlib import Path
from typing import Callable

import torch
from tokenizers import Tokenizer
from torch import Tensor

from oracle import checkpoint
from oracle.checkpoint import Checkpoint, encode_linear
from oracle.config import ModelConfig
from oracle.model import GoldenModel
from qat_model import QatModel

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def split_experts(leaf: str, value: Tensor) -> dict[str, Tensor]:
    """The stacked matrices of training: name -> [experts, out, in]."""
    if leaf == "gate_up_proj":
        return {"gate_proj": value[:, 0], "up_proj": value[:, 1]}
    return {leaf: value} if leaf == "down_proj" else {}


def to_huggingface(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Names and packing of the directory; what is not ternary becomes bf16."""
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        name, leaf = "model." + name, name.rsplit(".", 1)[-1]
        prefix = name.removesuffix(leaf)
        for linear, matrices in split_experts(leaf, value).items():
            for expert, weight in enumerate(matrices):
                tensors |= encode_linear(
                    f"{prefix}experts.{expert}.{linear}", weight, config.quantization
                )
        if leaf in ATTENTION:
            tensors |= encode_linear(name, value, config.quantization)
        elif "proj" not in leaf:
            tensors[name + ".weight"] = value.bfloat16()
    return tensors


def export(checkpoint_path: Path, out: Path) -> None:
    saved = torch.load(checkpoint_path, map_location="cpu", weights_only=False)
    if saved["config"].act_bits == 16:
        raise SystemExit("the float twin is only measured: give --tokenizer instead of --out")
    checkpoint.save(out, saved["config"], to_huggingface(saved["model"], saved["config"]))
    size = (out / "model.safetensors").stat().st_size
    print(
        f"step {saved['step']}, {saved['tokens']} tokens, {saved['elapsed_s']:.0f} s; {size} bytes"
    )


def text_nats(log_likelihood: Callable[[list[int]], float], ids: list[int], window: int) -> float:
    """Sum of -ln p over ids[1:]; windows overlap by one token, so each is predicted once."""
    return -sum(
        log_likelihood(ids[first : first + window]) for first in range(0, len(ids) - 1, window - 1)
    )


def golden_log_likelihood(model: GoldenModel) -> Callable[[list[int]], float]:
    def of(ids: list[int]) -> float:
        log_probs = model.forward(ids).log_softmax(dim=-1)
        return log_probs[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].double().sum().item()

    return of


def twin_log_likelihood(checkpoint_path: Path) -> tuple[Callable[[list[int]], float], ModelConfig]:
    saved = torch.load(checkpoint_path, map_location="cpu", weights_only=False)
    if saved["config"].act_bits != 16:
        raise SystemExit("a ternary model is measured from its directory: export it first")
    model = QatModel(saved["config"], torch.float32)
    model.load_state_dict({name: t.bfloat16().float() for name, t in saved["model"].items()})

    @torch.no_grad()
    def of(ids: list[int]) -> float:
        row = torch.tensor([ids])
        return -model(row[:, :-1], row[:, 1:])[0].item() * (len(ids) - 1)

    return of, saved["config"]


def evaluate(
    text_path: Path,
    tokenizer_dir: Path,
    log_likelihood: Callable[[list[int]], float],
    config: ModelConfig,
) -> None:
    text = text_path.read_bytes().decode()
    tokenizer = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    ids = [config.bos_token_id, *tokenizer.encode(text).ids]
    nats = text_nats(log_likelihood, ids, config.max_position_embeddings)
    num_bytes = len(text.encode())
    print(
        f"{num_bytes} bytes, {len(ids) - 1} tokens, "
        f"{nats / math.log(2) / num_bytes:.5f} bits per byte, "
        f"perplexity {math.exp(nats / (len(ids) - 1)):.2f} per token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--out", type=Path, help="the model's directory")
    parser.add_argument("--tokenizer", type=Path, help="a directory with the twin's tokenizer.json")
    parser.add_argument("--evaluate", type=Path, metavar="TEXT")
    args = parser.parse_args()
    if args.out is None:
        if not (args.checkpoint and args.tokenizer and args.evaluate):
            parser.error("without --out: --checkpoint, --tokenizer and --evaluate")
        evaluate(args.evaluate, args.tokenizer, *twin_log_likelihood(args.checkpoint))
        return
    if args.checkpoint:
        export(args.checkpoint, args.out)
    if args.evaluate:
        loaded = Checkpoint(args.out)
        model = GoldenModel(loaded)
        evaluate(args.evaluate, args.out, golden_log_likelihood(model), loaded.config)
        shares = [f"{name} {100 * z / n:.0f}" for name, (z, n) in model.zeros.items()]
        print(f"zeros per projection, %: {', '.join(shares)}")


if __name__ == "__main__":
    main()
