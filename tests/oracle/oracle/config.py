"""config.json <-> ModelConfig, for the families that the oracle knows."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {
    "bitnet": "BitNetForCausalLM",
    "bitnet_moe": "BitNetMoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}


@dataclass(frozen=True)
class QuantConfig:
    """`quantization_config`. weight_scale on disk is g for autobitlinear and 1/g for bitlinear."""

    linear_class: str = "autobitlinear"  # or "bitlinear"
    quantization_mode: str = "offline"  # or "online": float master weights on disk
    modules_to_not_convert: tuple[str, ...] = ("lm_head", "gate")

    def to_json(self) -> dict:
        return {
            "quant_method": "bitnet",
            **dataclasses.asdict(self),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }

    @classmethod
    def from_json(cls, fields: dict) -> "QuantConfig":
        return cls(
            fields.get("linear_class", "bitlinear"),
            fields.get("quantization_mode", "offline"),
            tuple(fields.get("modules_to_not_convert") or ("lm_head",)),
        )


@dataclass(frozen=True)
class ModelConfig:
    """One decoder. `intermediate_size` is of layers without experts, the `moe_` fields of those with.

    All layers of a bitnet have none, and the first `first_k_dense_replace` of a bitnet_moe.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int = 0
    first_k_dense_replace: int = 0
    moe_intermediate_size: int = 0
    num_experts: int = 0
    num_experts_per_tok: int = 0
    norm_topk_prob: bool = True
    shared_expert_intermediate_size: int = 0
    hidden_act: str = "silu"  # or "relu2"
    act_bits: int = 8  # 8 (b1.58) or 4 (a4.8)
    kv_bits: int = 16  # 16 (bf16), 8, 4 or 3
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_position_embeddings: int = 512
    tie_word_embeddings: bool = True
    bos_token_id: int = 0
    eos_token_id: int = 0
    quantization: QuantConfig = QuantConfig()

    @property
    def has_sub_norms(self) -> bool:
        """attn_sub_norm and ffn_sub_norm: the bitnet block."""
        return self.model_type in ("bitnet", "bitnet_moe")

    @property
    def has_head_norms(self) -> bool:
        """q_norm and k_norm over head_dim, before RoPE."""
        return self.model_type == "qwen3_moe"

    def has_experts(self, layer: int) -> bool:
        return self.num_experts > 0 and layer >= self.first_k_dense_replace

    def to_json(self) -> dict:
        fields = dataclasses.asdict(self)
        if not self.first_k_dense_replace:
            del fields["first_k_dense_replace"]
        precisions = {name: fields.pop(name) for name in ("act_bits", "kv_bits")}
        del fields["quantization"]
        if self.model_type == "bitnet":
            fields = {
                k: v
                for k, v in fields.items()
                if "exper" not in k and k != "moe_intermediate_size" and k != "norm_topk_prob"
            }
        if self.model_type == "bitnet_moe":
            if not self.first_k_dense_replace:
                del fields["intermediate_size"]
            fields |= precisions
        if self.model_type == "qwen3_moe":
            del fields["shared_expert_intermediate_size"]
            fields |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False}
        return {
            "architectures": [ARCHITECTURES[self.model_type]],
            **fields,
            "torch_dtype": "bfloat16",
            "quantization_config": self.quantization.to_json(),
        }

    @classmethod
    def from_json(cls, fields: dict) -> "ModelConfig":
        known = {f.name for f in dataclasses.fields(cls)} - {"quantization", "head_dim"}
        head_dim = fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]
        return cls(
            **{k: v for k, v in fields.items() if k in known},
            head_dim=head_dim,
            quantization=QuantConfig.from_json(fields["quantization_config"]),
        )

    @classmethod
    def load(cls, model_dir: Path) -> "ModelConfig":
        return cls.from_json(json.loads((model_dir / "config.json").read_text()))
