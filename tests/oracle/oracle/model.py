"""The golden forward pass: integer codes, exact accumulators, fp32 everywhere else, bf16 KV."""

import math

import torch
from torch import Tensor

from oracle.checkpoint import Checkpoint
from oracle.ops import activation, rms_norm, rope_tables, rotate, route
from oracle.quant import quantize_rows


def int8_margin(x: Tensor, scale: Tensor) -> Tensor:
    """Relative distance of each x * scale from the nearest tie between two int8 codes."""
    exact = (x * scale).abs()
    return (exact - exact.floor() - 0.5).abs() / exact.clamp(min=0.5)


def bf16_margin(x: Tensor) -> Tensor:
    """Relative distance of each x from the nearest tie between two bf16 numbers."""
    low_bits = x.view(torch.int32) & 0xFFFF
    return (low_bits - 0x8000).abs() * 2.0**-24


class GoldenModel:
    """One sequence at a time, no cache. Tensors are fp32; T is the sequence's length."""

    def __init__(self, checkpoint: Checkpoint, bf16_kv: bool = True):
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.bf16_kv = bf16_kv
        self.gate_margin = (
            math.inf
        )  # least gap between the last chosen and the first refused gate logit
        self.code_margin = (
            math.inf
        )  # least relative distance from a tie in anything that was rounded

    @torch.no_grad()
    def forward(self, ids: list[int]) -> Tensor:
        """Logits [T, vocab]."""
        embeddings = self.checkpoint.floats("model.embed_tokens.weight")
        h = embeddings[torch.tensor(ids)]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            h = h + self._attention(prefix, self._norm(prefix + "input_layernorm", h))
            h = h + self._feed_forward(prefix, self._norm(prefix + "post_attention_layernorm", h))
        h = self._norm("model.norm", h)
        head = (
            embeddings
            if self.config.tie_word_embeddings
            else self.checkpoint.floats("lm_head.weight")
        )
        return h @ head.T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.checkpoint.floats(name + ".weight"), self.config.rms_norm_eps)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale = quantize_rows(x)
        self.code_margin = min(self.code_margin, float(int8_margin(x, scale).min()))
        return codes, scale

    def _cached(self, x: Tensor) -> Tensor:
        """K (after RoPE) or V as the runtime's pages give it back: rounded to bf16."""
        if not self.bf16_kv:
            return x
        self.code_margin = min(self.code_margin, float(bf16_margin(x).min()))
        return x.bfloat16().float()

    def _project_heads(self, name: str, rows: tuple[Tensor, Tensor], heads: int) -> Tensor:
        """[T, hidden] -> [heads, T, head_dim]"""
        head_dim = self.config.head_dim
        linear = self.checkpoint.linear(name, heads * head_dim)
        return linear(rows).view(-1, heads, head_dim).transpose(0, 1)

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        """Causal grouped-query attention of normed rows x [T, hidden]."""
        config, prefix = self.config, prefix + "self_attn."
        rows = self._quantize(x)
        q = self._project_heads(prefix + "q_proj", rows, config.num_attention_heads)
        k = self._project_heads(prefix + "k_proj", rows, config.num_key_value_heads)
        v = self._project_heads(prefix + "v_proj", rows, config.num_key_value_heads)
        if config.has_head_norms:
            q, k = self._norm(prefix + "q_norm", q), self._norm(prefix + "k_norm", k)
        cos, sin = rope_tables(len(x), config.head_dim, config.rope_theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (self._cached(t).repeat_interleave(groups, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
        scores += torch.full_like(scores, -math.inf).triu(1)
        y = (scores.softmax(dim=-1) @ v).transpose(0, 1).flatten(1)
        if config.has_sub_norms:
            y = self._norm(prefix + "attn_sub_norm", y)
        return self.checkpoint.linear(prefix + "o_proj", config.hidden_size)(self._quantize(y))

    def _feed_forward(self, prefix: str, x: Tensor) -> Tensor:
        config, prefix = self.config, prefix + "mlp."
        rows = self._quantize(x)
        sub_norm = prefix + "ffn_sub_norm"
        if not config.num_experts:
            return self._expert(prefix, config.intermediate_size, sub_norm, rows)
        y = self._experts(prefix, x, rows)
        if config.shared_expert_intermediate_size:
            shared = prefix + "shared_expert."
            y += self._expert(
                shared, config.shared_expert_intermediate_size, shared + "ffn_sub_norm", rows
            )
        return y

    def _expert(
        self, prefix: str, inner_size: int, sub_norm: str, rows: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One gated MLP. rows: codes and scales of [n, hidden] -> [n, hidden]"""
        gate = self.checkpoint.linear(prefix + "gate_proj", inner_size)
        up = self.checkpoint.linear(prefix + "up_proj", inner_size)
        inner = activation(self.config.hidden_act, gate(rows)) * up(rows)
        if self.config.has_sub_norms:
            inner = self._norm(sub_norm, inner)
        return self.checkpoint.linear(prefix + "down_proj", self.config.hidden_size)(
            self._quantize(inner)
        )

    def _experts(self, prefix: str, x: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
        """Routed experts, summed in ascending id. The gate reads x, the experts its codes."""
        config = self.config
        logits = x @ self.checkpoint.floats(prefix + "gate.weight").T
        self._watch_margin(logits)
        ids, weights = route(logits, config.num_experts_per_tok, config.norm_topk_prob)
        y = torch.zeros_like(x)
        for expert in range(config.num_experts):
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            if len(tokens):
                chosen = (rows[0][tokens], rows[1][tokens])
                name = f"{prefix}experts.{expert}."
                out = self._expert(
                    name, config.moe_intermediate_size, prefix + "ffn_sub_norm", chosen
                )
                y[tokens] += out * weights[tokens, slots, None]
        return y

    def _watch_margin(self, logits: Tensor) -> None:
        ordered = logits.sort(dim=-1, descending=True).values
        k = self.config.num_experts_per_tok
        if k < self.config.num_experts:
            gap = ordered[:, k - 1] - ordered[:, k]
            self.gate_margin = min(self.gate_margin, float(gap.min()))
