"""Compares Ternion with Hugging Face transformers, which knows neither our code nor our oracle.

    python check_hf.py --ternion build/release/ternion

Random `bitnet` and `qwen3_moe` models with the bitnet quantizer are written by transformers, loaded
by transformers, by the oracle and by `ternion eval`, and the logits are compared in float32:

  oracle without bf16 KV - HF: the same arithmetic in another order (TIGHT).
  ternion - oracle: the runtime's own contract, bf16 KV on both sides (TIGHT).
  ternion - HF: the runtime keeps K and V as bf16, HF as fp32: a relative error of 2^-9 on each, and
      int8 codes that flip for it, which a random model amplifies to a few percent (LOOSE).
The tokens are chosen so that nothing the oracle rounds lies near a tie; otherwise one flipped code
would hide or fake an error under TIGHT. Errors are per token: RMS over the vocabulary, relative to
the RMS of the logits.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "TORCHDYNAMO_DISABLE", "1"
)  # HF compiles its unpacking; eager is exact and quick

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitNetConfig, PretrainedConfig, Qwen3MoeConfig
from transformers.integrations.bitnet import pack_weights

from oracle.checkpoint import Checkpoint
from oracle.model import GoldenModel

NUM_TOKENS = 12
MIN_CODE_MARGIN, MIN_GATE_MARGIN = 2e-6, 2e-3  # as in make_golden.py
TIGHT = 1e-4  # of the worst token
LOOSE = 5e-2  # of the median token: a gate choice that flips spoils single tokens

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 128,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def bitnet_config() -> PretrainedConfig:
    return BitNetConfig(**SHAPE, intermediate_size=172, tie_word_embeddings=True)


def qwen3_moe_config() -> PretrainedConfig:
    return Qwen3MoeConfig(
        **SHAPE,
        head_dim=20,
        intermediate_size=172,
        moe_intermediate_size=68,
        num_experts=6,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        tie_word_embeddings=False,
    )


FAMILIES = {"bitnet": bitnet_config, "qwen3_moe": qwen3_moe_config}
QUANTIZERS = [("bitlinear", "offline"), ("autobitlinear", "offline"), ("autobitlinear", "online")]


@dataclass(frozen=True)
class Variant:
    family: str
    linear_class: str
    mode: str

    def __str__(self) -> str:
        return f"{self.family}, {self.linear_class} {self.mode}"


def random_model(config: PretrainedConfig) -> torch.nn.Module:
    """Weights large enough, and norms uneven enough, for every part to matter."""
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def is_ternary(name: str) -> bool:
    return name.endswith("_proj.weight")


def packed_state(model: torch.nn.Module, linear_class: str) -> dict[str, Tensor]:
    """The state dict with ternary linears in HF's packing. BitLinear divides by its scale."""
    state = {}
    for name, value in model.state_dict().items():
        if not is_ternary(name):
            state[name] = value
            continue
        inverse = 1.0 / value.abs().mean().clamp(min=1e-5)
        state[name] = pack_weights((value * inverse).round().clamp(-1, 1))
        scale = inverse if linear_class == "bitlinear" else 1.0 / inverse
        state[name.replace(".weight", ".weight_scale")] = scale.reshape(1)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return state


def write_checkpoint(variant: Variant, out: Path) -> None:
    model = random_model(FAMILIES[variant.family]())
    model.config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": variant.linear_class,
        "quantization_mode": variant.mode,
        "modules_to_not_convert": (
            ["lm_head", "mlp.gate"] if variant.family == "qwen3_moe" else ["lm_head"]
        ),
    }
    state = None if variant.mode == "online" else packed_state(model, variant.linear_class)
    model.save_pretrained(out, state_dict=state)


@torch.no_grad()
def hf_logits(model_dir: Path, ids: list[int]) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(
        model_dir, torch_dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def oracle_logits(model_dir: Path) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Token ids without near-ties, and their logits without and with bf16 KV."""
    loaded = Checkpoint(model_dir)
    for _ in range(2000):
        ids = torch.randint(0, SHAPE["vocab_size"], (NUM_TOKENS,)).tolist()
        models = [GoldenModel(loaded, kv_bits) for kv_bits in (32, 16)]
        exact, golden = (model.forward(ids).numpy() for model in models)
        if all(
            m.code_margin >= MIN_CODE_MARGIN and m.gate_margin >= MIN_GATE_MARGIN for m in models
        ):
            return ids, exact, golden
    raise RuntimeError("no ids without near-ties")


def ternion_logits(ternion: Path, model_dir: Path, ids: list[int]) -> np.ndarray:
    ids_file, logits_file = model_dir / "ids.json", model_dir / "logits.npy"
    ids_file.write_text(json.dumps(ids))
    subprocess.run(
        [
            ternion,
            "eval",
            "--model",
            model_dir,
            "--ids-file",
            ids_file,
            "--logits-out",
            logits_file,
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return np.load(logits_file)


def token_errors(actual: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Per token: RMS error relative to the RMS of all expected logits. [T]"""
    assert actual.shape == expected.shape, f"{actual.shape} against {expected.shape}"
    return np.sqrt(np.square(actual - expected).mean(axis=1) / np.square(expected).mean())


def report_tight(label: str, errors: np.ndarray) -> bool:
    good = bool(errors.max() <= TIGHT)
    print(
        f"  {label:28s} worst token  {errors.max():.1e} (<= {TIGHT:.0e})"
        f"  {'ok' if good else 'FAILED'}"
    )
    return good


def report_loose(label: str, errors: np.ndarray) -> bool:
    good = bool(np.median(errors) <= LOOSE)
    print(
        f"  {label:28s} median token {np.median(errors):.1e} (<= {LOOSE:.0e})"
        f"  {'ok' if good else 'FAILED'}"
    )
    return good


def check(variant: Variant, ternion: Path | None) -> bool:
    print(variant)
    torch.manual_seed(len(str(variant)))
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder)
        write_checkpoint(variant, model_dir)
        ids, exact, golden = oracle_logits(model_dir)
        hf = hf_logits(model_dir, ids)
        results = [report_tight("oracle without bf16 KV - HF", token_errors(exact, hf))]
        if ternion:
            logits = ternion_logits(ternion, model_dir, ids)
            results.append(report_tight("ternion - oracle", token_errors(logits, golden)))
            results.append(report_loose("ternion - HF", token_errors(logits, hf)))
        else:
            results.append(report_loose("oracle - HF", token_errors(golden, hf)))
    return all(results)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ternion", type=Path, help="the built command; without it only oracle and HF meet"
    )
    ternion = parser.parse_args().ternion
    torch.set_num_threads(1)
    variants = [Variant(family, *quantizer) for family in FAMILIES for quantizer in QUANTIZERS]
    failed = [str(v) for v in variants if not check(v, ternion)]
    sys.exit(f"failed: {failed}" if failed else 0)


if __name__ == "__main__":
    main()
