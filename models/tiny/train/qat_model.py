"""`bitnet_moe` for training: float master weights, quantized forward, straight-through gradients.

The formulas are the oracle's (tests/oracle/oracle); the parameters of a layer's experts are
stacked. One class serves the three precisions of `PRECISIONS`.
"""

from dataclasses import replace
from typing import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle.config import ModelConfig
from oracle.ops import activation, rms_norm, rope_tables, rotate, route
from oracle.quant import cached, quantize_rows, quantize_rows4, ternarize, top_half

# Name -> activation and KV bits; bf16 has float weights and activations.
PRECISIONS = {"bf16": (16, 16), "b158": (8, 16), "a48": (4, 3)}


def with_precision(config: ModelConfig, name: str) -> ModelConfig:
    act_bits, kv_bits = PRECISIONS[name]
    return replace(config, act_bits=act_bits, kv_bits=kv_bits)


INIT_STD = 0.02
# What o_proj and down_proj add to the residual stream must not drown the embedding, which starts at
# INIT_STD: the sub-norms feed them rows of unit size. Their learning rate shrinks alike (train.py).
RESIDUAL_SCALE = 1 / 8
RESIDUAL_PROJECTIONS = ("o_proj", "down_proj")

# Elementwise work is bound by memory, so that each of these is fused into one or two passes.
fused_rms_norm = torch.compile(rms_norm)
fused_rotate = torch.compile(rotate)


@torch.compile
def ternary_values(weight: Tensor) -> Tensor:
    codes, scale = ternarize(weight)
    return codes * scale


@torch.compile
def int8_values(x: Tensor) -> Tensor:
    codes, scale = quantize_rows(x)
    return codes / scale


@torch.compile
def int4_values(x: Tensor) -> Tensor:
    codes, scale = quantize_rows4(x)
    return codes / scale


def top_half_int8_values(x: Tensor) -> Tensor:
    return int8_values(top_half(x))


fused_cached = torch.compile(cached)


@torch.compile
def gated(name: str, gate_up: Tensor, sub_norm: Tensor, eps: float) -> Tensor:
    """sub-norm(act(gate) * up), fp32. gate_up [N, 2 * inner] -> [N, inner]"""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return rms_norm(activation(name, gate) * up, sub_norm, eps)


class StraightThrough(torch.autograd.Function):
    """x -> quantizer(x) in `dtype`; the gradient passes unchanged."""

    @staticmethod
    def forward(
        ctx, x: Tensor, quantizer: Callable[[Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        return quantizer(x).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.float(), None, None


class Quantizers:
    """What a precision does to a matrix, to the rows that enter one, and to keys and values; each
    gives the values that the runtime's codes stand for, in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self.config, self.dtype = config, dtype

    def matrix(self, weight: Tensor) -> Tensor:
        return self._apply(weight, ternary_values)

    def block_input(self, x: Tensor) -> Tensor:
        """Rows entering attention or the feed-forward."""
        return self._apply(x, int4_values if self.config.act_bits == 4 else int8_values)

    def attention_output(self, x: Tensor) -> Tensor:
        """Rows entering o_proj."""
        return self._apply(x, top_half_int8_values if self.config.act_bits == 4 else int8_values)

    def gated(self, x: Tensor) -> Tensor:
        """Rows entering down_proj."""
        return self._apply(x, int8_values)

    def keys_or_values(self, x: Tensor) -> Tensor:
        """[B, heads, T, head_dim]. bf16 itself is left to the runtime: it costs nothing."""
        bits = self.config.kv_bits
        if bits == 16:
            return x.to(self.dtype)
        return StraightThrough.apply(x, lambda t: fused_cached(t, bits), self.dtype)

    def _apply(self, x: Tensor, quantizer: Callable[[Tensor], Tensor]) -> Tensor:
        if self.config.act_bits == 16:
            return x.to(self.dtype)
        return StraightThrough.apply(x, quantizer, self.dtype)


def matrix(*shape: int, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * INIT_STD * scale)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = matrix(width, config.hidden_size)
        self.k_proj = matrix(kv_width, config.hidden_size)
        self.v_proj = matrix(kv_width, config.hidden_size)
        self.o_proj = matrix(config.hidden_size, width, scale=RESIDUAL_SCALE)
        self.attn_sub_norm = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, quantizers: Quantizers) -> Tensor:
        """x: fp32 [B, T, hidden], normed."""
        config, (batch, length, _) = self.config, x.shape
        x = quantizers.block_input(x)
        q, k, v = (
            F.linear(x, quantizers.matrix(w))
            .view(batch, length, -1, config.head_dim)
            .transpose(1, 2)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = fused_rotate(q, cos, sin).to(x.dtype), fused_rotate(k, cos, sin)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = (
            quantizers.keys_or_values(t).repeat_interleave(groups, dim=1) for t in (k, v.float())
        )
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, -1)
        )
        y = fused_rms_norm(y, self.attn_sub_norm, config.rms_norm_eps)
        return F.linear(quantizers.attention_output(y), quantizers.matrix(self.o_proj)).float()


def grouped_linear(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """rows sorted by expert [N, in], weights [E, out, in], rows per expert -> [N, out]"""
    if rows.is_cuda:
        return padded_linear(rows, weights, counts)
    parts = zip(rows.split(counts), weights.unbind())
    return torch.cat([F.linear(part, weight) for part, weight in parts])


def padded_linear(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """The same as one product: every expert gets as many rows as the busiest."""
    begin = torch.tensor([0, *counts], device=rows.device).cumsum(0)
    row = torch.arange(len(rows), device=rows.device)
    expert = torch.searchsorted(begin, row, right=True) - 1
    slot = row - begin[expert]
    padded = rows.new_zeros(len(weights), max(counts), rows.shape[1])
    padded = padded.index_put((expert, slot), rows)
    return torch.bmm(padded, weights.transpose(1, 2))[expert, slot]


class Experts(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        experts, hidden, inner = (
            config.num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.gate = matrix(experts, hidden)
        self.gate_up_proj = matrix(experts, 2, inner, hidden)
        self.down_proj = matrix(experts, hidden, inner, scale=RESIDUAL_SCALE)
        self.ffn_sub_norm = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor, quantizers: Quantizers) -> tuple[Tensor, Tensor, Tensor]:
        """x: fp32 [N, hidden], normed -> [N, hidden], balance loss, share of rows per expert [E]"""
        config = self.config
        logits = x @ self.gate.T
        ids, weights = route(logits, config.num_experts_per_tok, config.norm_topk_prob)
        order = ids.flatten().argsort(stable=True)
        tokens = order // config.num_experts_per_tok
        counts = torch.bincount(ids.flatten(), minlength=config.num_experts)
        rows = self.run(
            quantizers.block_input(x).index_select(0, tokens), counts.tolist(), quantizers
        )
        y = torch.zeros_like(x).index_add(0, tokens, rows * weights.flatten()[order, None])
        load = counts / counts.sum()
        balance = config.num_experts * (load * torch.softmax(logits, dim=-1).mean(dim=0)).sum()
        return y, balance, load

    def run(self, rows: Tensor, counts: list[int], quantizers: Quantizers) -> Tensor:
        """Each expert over its rows. [N*k, hidden], sorted by expert -> fp32 [N*k, hidden]"""
        gate_up = quantizers.matrix(self.gate_up_proj).flatten(1, 2)
        gate_up = grouped_linear(rows, gate_up, counts)
        inner = gated(self.config.hidden_act, gate_up, self.ffn_sub_norm, self.config.rms_norm_eps)
        down = quantizers.matrix(self.down_proj)
        return grouped_linear(quantizers.gated(inner), down, counts).float()


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = Experts(config)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, quantizers: Quantizers
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = fused_rms_norm(h, self.input_layernorm, self.eps)
        h = h + self.self_attn(x, cos, sin, quantizers)
        x = fused_rms_norm(h, self.post_attention_layernorm, self.eps)
        y, balance, load = self.mlp(x.flatten(0, 1), quantizers)
        return h + y.view_as(h), balance, load


class QatModel(nn.Module):
    """Master weights, norms, gate, residual stream and loss in fp32; matrix products in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.config, self.quantizers = config, Quantizers(config, dtype)
        self.embed_tokens = matrix(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        cos, sin = rope_tables(config.max_position_embeddings, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids, targets: int64 [B, T] -> mean cross-entropy (nats), balance loss (sum over layers),
        expert loads [layers, E]."""
        length = ids.shape[1]
        h = F.embedding(ids, self.embed_tokens)
        balances, loads = [], []
        for layer in self.layers:
            h, balance, load = layer(h, self.cos[:length], self.sin[:length], self.quantizers)
            balances.append(balance)
            loads.append(load)
        dtype = self.quantizers.dtype
        h = fused_rms_norm(h, self.norm, self.config.rms_norm_eps).to(dtype)
        logits = F.linear(h, self.embed_tokens.to(dtype)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, torch.stack(balances).sum(), torch.stack(loads)
