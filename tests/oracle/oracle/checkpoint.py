"""Hugging Face model directories, as the trainer and the golden generator write them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from oracle.config import ModelConfig, QuantConfig
from oracle.quant import TernaryWeight, absmean_scale, pack, ternarize, unpack

INDEX_NAME = "model.safetensors.index.json"


def encode_linear(name: str, weight: Tensor, quant: QuantConfig) -> dict[str, Tensor]:
    """The tensors on disk of one ternary linear. weight: float master [out, in]"""
    if quant.quantization_mode == "online":
        return {f"{name}.weight": weight.contiguous()}
    codes, g = ternarize(weight.float())
    scale = 1.0 / g if quant.linear_class == "bitlinear" else g
    return {f"{name}.weight": pack(codes), f"{name}.weight_scale": scale.reshape(1)}


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def save(
    model_dir: Path, config: ModelConfig, tensors: dict[str, Tensor], num_shards: int = 1
) -> None:
    """Writes config.json, generation_config.json and the tensors, in num_shards files."""
    model_dir.mkdir(parents=True, exist_ok=True)
    write_json(model_dir / "config.json", config.to_json())
    write_json(
        model_dir / "generation_config.json",
        {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id},
    )
    if num_shards == 1:
        save_file(tensors, model_dir / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, model_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    write_json(
        model_dir / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


class Checkpoint:
    """The tensors of a model directory, by their Hugging Face names."""

    def __init__(self, model_dir: Path):
        self.config = ModelConfig.load(model_dir)
        index = model_dir / INDEX_NAME
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self._tensors: dict[str, Tensor] = {}
        self._linears: dict[str, TernaryWeight] = {}
        for file in files:
            self._tensors |= load_file(model_dir / file)

    def floats(self, name: str) -> Tensor:
        return self._tensors[name].float()

    def linear(self, name: str, out: int) -> TernaryWeight:
        """The ternary linear `name` with `out` output rows; decoded once."""
        if name not in self._linears:
            self._linears[name] = self._decode(name, out)
        return self._linears[name]

    def _decode(self, name: str, out: int) -> TernaryWeight:
        weight = self._tensors[f"{name}.weight"]
        if weight.dtype != torch.uint8:
            codes, g = ternarize(weight.float())
            return TernaryWeight(codes, g.reshape(()))
        scale = self.floats(f"{name}.weight_scale").reshape(())
        divides = self.config.quantization.linear_class == "bitlinear"
        return TernaryWeight(unpack(weight, out), 1.0 / scale if divides else scale)

    def rounding_margin(self) -> float:
        """Online master weights: least distance of any |W|/g from 1/2, where a code would flip."""
        masters = [
            t.float()
            for n, t in self._tensors.items()
            if n.endswith("_proj.weight") and t.is_floating_point()
        ]
        return min(
            (float(((w / absmean_scale(w)).abs() - 0.5).abs().min()) for w in masters), default=1.0
        )
