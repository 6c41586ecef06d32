"""Writes golden/<name>/: tiny random models with the logits that the runtime must reproduce.

    python make_golden.py [--out golden]

Each directory is a complete checkpoint plus ids.json and logits.npy (float32 [T, vocab]). run.json
is there where the cache runs at another precision than the model's own: {"kv": "int3"}.
"""

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from oracle import checkpoint
from oracle.checkpoint import Checkpoint, encode_linear
from oracle.config import ModelConfig, QuantConfig
from oracle.model import GoldenModel

MIN_GATE_MARGIN = 2e-3  # of gate logits: float noise must not flip an expert
MIN_CODE_MARGIN = 2e-6  # relative, of whatever is rounded: nor a code
MIN_ROUNDING_MARGIN = 1e-5  # of |W|/g from 1/2: a differently summed mean must not flip a code
ONLINE = QuantConfig(quantization_mode="online")
DIVIDING = QuantConfig(linear_class="bitlinear")


@dataclass(frozen=True)
class Case:
    """One golden directory."""

    name: str
    config: ModelConfig
    num_tokens: int = 12
    num_shards: int = 1
    master_dtype: torch.dtype = torch.float32  # of online checkpoints
    scale_dtype: torch.dtype = torch.float32  # of weight_scale
    kv_bits: int | None = None  # of the run, when not the model's own


DENSE = ModelConfig(
    model_type="bitnet",
    vocab_size=131,
    hidden_size=72,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=12,
    intermediate_size=150,
    hidden_act="relu2",
    rope_theta=500000.0,
    bos_token_id=1,
    eos_token_id=2,
    quantization=QuantConfig(modules_to_not_convert=("lm_head",)),
)
MOE = ModelConfig(
    model_type="bitnet_moe",
    vocab_size=131,
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=64,
    num_experts=8,
    num_experts_per_tok=2,
    bos_token_id=1,
    eos_token_id=2,
)
ODD_MOE = replace(
    MOE,
    hidden_size=120,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=20,
    moe_intermediate_size=46,
    num_experts=7,
    num_experts_per_tok=3,
)
# Values are integers times one factor, so that they often stand on an edge between two KV cells:
# few of them, and wide sums, make seeds without such ties findable.
A48 = replace(
    MOE,
    hidden_size=192,
    num_hidden_layers=1,
    num_attention_heads=3,
    num_key_value_heads=1,
    num_experts=5,
    hidden_act="relu2",
    act_bits=4,
    kv_bits=3,
)
QWEN = replace(
    MOE,
    model_type="qwen3_moe",
    hidden_size=72,
    head_dim=20,
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=50,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
)
CASES = [
    Case("bitnet_relu2_tied", DENSE, scale_dtype=torch.bfloat16),
    Case(
        "bitnet_bitlinear_untied", replace(DENSE, tie_word_embeddings=False, quantization=DIVIDING)
    ),
    Case(
        "bitnet_online_bf16",
        replace(DENSE, num_hidden_layers=1, quantization=ONLINE),
        master_dtype=torch.bfloat16,
    ),
    Case("bitnet_moe_silu", MOE, num_tokens=24),
    Case(
        "bitnet_moe_odd_vocab1003",
        replace(ODD_MOE, vocab_size=1003, hidden_size=84, head_dim=14, norm_topk_prob=False),
    ),
    Case(
        "bitnet_moe_shared_relu2",
        replace(
            ODD_MOE,
            hidden_act="relu2",
            shared_expert_intermediate_size=70,
            num_experts=5,
            quantization=DIVIDING,
        ),
    ),
    Case(
        "bitnet_moe_9heads_sharded",
        replace(
            ODD_MOE,
            hidden_size=180,
            num_attention_heads=9,
            num_hidden_layers=1,
            tie_word_embeddings=False,
        ),
        num_shards=3,
    ),
    Case(
        "bitnet_moe_online_fp32",
        replace(
            MOE, num_hidden_layers=1, num_experts=3, moe_intermediate_size=30, quantization=ONLINE
        ),
    ),
    Case("bitnet_moe_a48", A48, num_tokens=9),
    Case(
        "bitnet_moe_a48_odd_shared",
        replace(
            A48,
            hidden_size=172,
            num_attention_heads=2,
            head_dim=20,
            moe_intermediate_size=46,
            shared_expert_intermediate_size=70,
            kv_bits=4,
        ),
        num_tokens=5,
    ),
    Case(
        "bitnet_moe_dense_first",
        replace(
            MOE,
            num_hidden_layers=3,
            first_k_dense_replace=2,
            intermediate_size=150,
            shared_expert_intermediate_size=46,
            num_experts=5,
        ),
    ),
    Case("bitnet_moe_kv8", replace(MOE, kv_bits=8, num_experts=3, num_hidden_layers=1)),
    Case(
        "bitnet_moe_rotated_kv3",
        replace(MOE, hidden_size=128, num_hidden_layers=1, num_experts=3, kv_bits=8),
        num_tokens=9,
        kv_bits=3,
    ),
    Case("qwen3_moe_norm", QWEN),
    Case(
        "qwen3_moe_bitlinear_sharded",
        replace(QWEN, norm_topk_prob=False, tie_word_embeddings=False, quantization=DIVIDING),
        num_shards=2,
    ),
]


class RandomModel:
    """Draws the tensors of a config. Scales are chosen so that every part of the block matters."""

    def __init__(self, case: Case, seed: int):
        self.case, self.config = case, case.config
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors: dict[str, Tensor] = {}

    def normal(self, *shape: int, std: float) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * std

    def add_dense(self, name: str, *shape: int, std: float) -> None:
        self.tensors[name + ".weight"] = self.normal(*shape, std=std).bfloat16()

    def add_norm(self, name: str, size: int) -> None:
        self.tensors[name + ".weight"] = (1 + self.normal(size, std=0.2)).bfloat16()

    def add_linear(self, name: str, out: int, width: int) -> None:
        weight = self.normal(out, width, std=width**-0.5).to(self.case.master_dtype)
        encoded = encode_linear(name, weight, self.config.quantization)
        if f"{name}.weight_scale" in encoded:
            encoded[f"{name}.weight_scale"] = encoded[f"{name}.weight_scale"].to(
                self.case.scale_dtype
            )
        self.tensors |= encoded

    def add_mlp(self, prefix: str, inner: int) -> None:
        hidden = self.config.hidden_size
        self.add_linear(prefix + "gate_proj", inner, hidden)
        self.add_linear(prefix + "up_proj", inner, hidden)
        self.add_linear(prefix + "down_proj", hidden, inner)

    def add_attention(self, prefix: str) -> None:
        config = self.config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.add_linear(prefix + "q_proj", width, config.hidden_size)
        self.add_linear(prefix + "k_proj", kv_width, config.hidden_size)
        self.add_linear(prefix + "v_proj", kv_width, config.hidden_size)
        self.add_linear(prefix + "o_proj", config.hidden_size, width)
        if config.has_sub_norms:
            self.add_norm(prefix + "attn_sub_norm", width)
        if config.has_head_norms:
            self.add_norm(prefix + "q_norm", config.head_dim)
            self.add_norm(prefix + "k_norm", config.head_dim)

    def add_feed_forward(self, prefix: str, has_experts: bool) -> None:
        config = self.config
        inner = config.moe_intermediate_size if has_experts else config.intermediate_size
        if config.has_sub_norms:
            self.add_norm(prefix + "ffn_sub_norm", inner)
        if not has_experts:
            return self.add_mlp(prefix, inner)
        self.add_dense(prefix + "gate", config.num_experts, config.hidden_size, std=0.3)
        for expert in range(config.num_experts):
            self.add_mlp(f"{prefix}experts.{expert}.", inner)
        if config.shared_expert_intermediate_size:
            shared = prefix + "shared_expert."
            self.add_norm(shared + "ffn_sub_norm", config.shared_expert_intermediate_size)
            self.add_mlp(shared, config.shared_expert_intermediate_size)

    def build(self) -> dict[str, Tensor]:
        config = self.config
        self.add_dense("model.embed_tokens", config.vocab_size, config.hidden_size, std=0.3)
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            self.add_norm(prefix + "input_layernorm", config.hidden_size)
            self.add_attention(prefix + "self_attn.")
            self.add_norm(prefix + "post_attention_layernorm", config.hidden_size)
            self.add_feed_forward(prefix + "mlp.", config.has_experts(layer))
        self.add_norm("model.norm", config.hidden_size)
        if not config.tie_word_embeddings:
            self.add_dense("lm_head", config.vocab_size, config.hidden_size, std=0.3)
        return self.tensors


def write_case(case: Case, out: Path) -> None:
    """Tries seeds until no gate choice and no rounding is a near-tie."""
    model_dir = out / case.name
    for seed in range(1, 10000):
        checkpoint.save(model_dir, case.config, RandomModel(case, seed).build(), case.num_shards)
        ids = (
            np.random.default_rng(seed)
            .integers(0, case.config.vocab_size, case.num_tokens)
            .tolist()
        )
        loaded = Checkpoint(model_dir)
        model = GoldenModel(loaded, case.kv_bits)
        logits = model.forward(ids)
        if (
            model.gate_margin >= MIN_GATE_MARGIN
            and model.code_margin >= MIN_CODE_MARGIN
            and loaded.rounding_margin() >= MIN_ROUNDING_MARGIN
        ):
            break
    else:
        raise RuntimeError(f"{case.name}: no seed without near-ties")
    (model_dir / "ids.json").write_text(json.dumps(ids) + "\n")
    if case.kv_bits:
        checkpoint.write_json(model_dir / "run.json", {"kv": f"int{case.kv_bits}"})
    np.save(model_dir / "logits.npy", logits.numpy())
    size = sum(f.stat().st_size for f in model_dir.iterdir())
    print(
        f"{case.name}: seed {seed}, gate margin {model.gate_margin:.2g}, "
        f"code margin {model.code_margin:.2g}, {size / 1e3:.0f} kB, "
        f"|logits| up to {logits.abs().max():.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "golden")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    for case in CASES:
        write_case(case, out)


if __name__ == "__main__":
    main()
