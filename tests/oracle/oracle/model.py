"""The golden forward pass: integer codes, exact accumulators, fp32 everywhere else, and the KV
cache's precision."""

import math

import torch
from torch import Tensor

from oracle.checkpoint import Checkpoint
from oracle.ops import activation, rms_norm, rope_tables, rotate, route
from oracle.quant import cached, hadamard, quantize_rows, quantize_rows4, top_half


def tie_margin(exact: Tensor) -> float:
    """Least relative distance of any number from the nearest tie between two integers."""
    exact = exact.abs()
    return float(((exact - exact.floor() - 0.5).abs() / exact.clamp(min=0.5)).min())


def bf16_margin(x: Tensor) -> float:
    """Least relative distance of any x from the nearest tie between two bf16 numbers."""
    low_bits = x.view(torch.int32) & 0xFFFF
    return float(((low_bits - 0x8000).abs() * 2.0**-24).min())


def half_margin(x: Tensor) -> float:
    """Least relative gap, in any row, between what top_half keeps and what it drops."""
    ordered = x.abs().sort(dim=-1).values
    dropped = x.shape[-1] // 2
    return float((1 - ordered[..., dropped - 1] / ordered[..., dropped]).min())


class GoldenModel:
    """One sequence at a time, no cache. Tensors are fp32; T is the sequence's length."""

    def __init__(self, checkpoint: Checkpoint, kv_bits: int | None = None):
        """kv_bits: instead of the checkpoint's own; 32 leaves keys and values as they are."""
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.kv_bits = kv_bits or self.config.kv_bits
        self.zeros: dict[str, tuple[int, int]] = {}  # projection -> needless terms, all terms
        # Few bits that training did not see: turned so that no element stands out.
        self.rotates = self.kv_bits < min(8, self.config.kv_bits)
        # Least gap between the last chosen and the first refused gate logit.
        self.gate_margin = math.inf
        # Least relative distance from a tie in anything that was rounded.
        self.code_margin = math.inf

    @torch.no_grad()
    def forward(self, ids: list[int]) -> Tensor:
        """Logits [T, vocab]."""
        embeddings = self.checkpoint.floats("model.embed_tokens.weight")
        h = embeddings[torch.tensor(ids)]
        for layer in range(self.config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            h = h + self._attention(prefix, self._norm(prefix + "input_layernorm", h))
            x = self._norm(prefix + "post_attention_layernorm", h)
            h = h + self._feed_forward(prefix, x, self.config.has_experts(layer))
        h = self._norm("model.norm", h)
        head = (
            embeddings
            if self.config.tie_word_embeddings
            else self.checkpoint.floats("lm_head.weight")
        )
        return h @ head.T

    def _norm(self, name: str, x: Tensor) -> Tensor:
        return rms_norm(x, self.checkpoint.floats(name + ".weight"), self.config.rms_norm_eps)

    def _quantize(self, x: Tensor, bits: int = 8) -> tuple[Tensor, Tensor]:
        if bits == 4:
            codes, scale = quantize_rows4(x)
            exact = math.sqrt(7) * x / (x.abs().mean(dim=-1, keepdim=True) + 1e-5)
        else:
            codes, scale = quantize_rows(x)
            exact = x * scale
        self._watch_code(tie_margin(exact))
        return codes, scale

    def _cached(self, x: Tensor) -> Tensor:
        """K (after RoPE) or V as the runtime's pages give it back. x [heads, T, head_dim]"""
        if self.kv_bits == 32:
            return x
        self._watch_code(bf16_margin(x if self.kv_bits == 16 else x[..., :1, :].contiguous()))
        if self.kv_bits < 16 and x.shape[-2] > 1:
            steps = 127 if self.kv_bits == 8 else 2 ** (self.kv_bits - 1)
            exact = (x * (steps / x.abs().amax(dim=-1, keepdim=True)))[..., 1:, :]
            # Exact on every machine: zeros, and the largest element, on the last edge.
            inner = exact[(exact != 0) & (exact.abs() < steps * (1 - 1e-6))]
            self._watch_code(tie_margin(inner if self.kv_bits == 8 else inner + 0.5))
        return cached(x, self.kv_bits)

    def _count_zeros(self, projection: str, values: Tensor) -> None:
        zeros, total = self.zeros.get(projection, (0, 0))
        self.zeros[projection] = (zeros + int((values == 0).sum()), total + values.numel())

    def _watch_code(self, margin: float) -> None:
        self.code_margin = min(self.code_margin, margin)

    def _project_heads(self, name: str, rows: tuple[Tensor, Tensor], heads: int) -> Tensor:
        """[T, hidden] -> [heads, T, head_dim]"""
        head_dim = self.config.head_dim
        linear = self.checkpoint.linear(name, heads * head_dim)
        return linear(rows).view(-1, heads, head_dim).transpose(0, 1)

    def _attention(self, prefix: str, x: Tensor) -> Tensor:
        """Causal grouped-query attention of normed rows x [T, hidden]."""
        config, prefix = self.config, prefix + "self_attn."
        rows = self._quantize(x, config.act_bits)
        self._count_zeros("qkv", rows[0])
        q = self._project_heads(prefix + "q_proj", rows, config.num_attention_heads)
        k = self._project_heads(prefix + "k_proj", rows, config.num_key_value_heads)
        v = self._project_heads(prefix + "v_proj", rows, config.num_key_value_heads)
        if config.has_head_norms:
            q, k = self._norm(prefix + "q_norm", q), self._norm(prefix + "k_norm", k)
        cos, sin = rope_tables(len(x), config.head_dim, config.rope_theta)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.rotates:
            q, k, v = hadamard(q), hadamard(k), hadamard(v)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (self._cached(t).repeat_interleave(groups, dim=0) for t in (k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(config.head_dim)
        scores += torch.full_like(scores, -math.inf).triu(1)
        y = scores.softmax(dim=-1) @ v
        if self.rotates:
            y = hadamard(y)
        y = y.transpose(0, 1).flatten(1)
        if config.has_sub_norms:
            y = self._norm(prefix + "attn_sub_norm", y)
        if config.act_bits == 4:
            self._watch_code(half_margin(y))
            y = top_half(y)
        rows = self._quantize(y)
        self._count_zeros("out", rows[0])
        return self.checkpoint.linear(prefix + "o_proj", config.hidden_size)(rows)

    def _feed_forward(self, prefix: str, x: Tensor, has_experts: bool) -> Tensor:
        config, prefix = self.config, prefix + "mlp."
        rows = self._quantize(x, config.act_bits)
        sub_norm = prefix + "ffn_sub_norm"
        if not has_experts:
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
        live = activation(self.config.hidden_act, gate(rows))
        inner = live * up(rows)
        if self.config.has_sub_norms:
            inner = self._norm(sub_norm, inner)
        inner_rows = self._quantize(inner)
        self._count_zeros("gate", rows[0])
        self._count_zeros("up", live)
        self._count_zeros("down", inner_rows[0])
        return self.checkpoint.linear(prefix + "down_proj", self.config.hidden_size)(inner_rows)

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
