"""`bitnet_moe` for training: float master weights, ternary forward, straight-through gradients.

The formulas are the oracle's (tests/oracle/oracle); parameters of a layer's experts are stacked.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from oracle.config import ModelConfig
from oracle.ops import activation, rms_norm, rope_tables, rotate, route
from oracle.quant import quantize_rows, ternarize

INIT_STD = 0.02
# What o_proj and down_proj add to the residual stream must not drown the embedding, which starts at
# INIT_STD: the sub-norms feed them rows of unit size. Their learning rate shrinks alike (train.py).
RESIDUAL_SCALE = 1 / 8
RESIDUAL_PROJECTIONS = ("o_proj", "down_proj")

# Elementwise work is bound by memory, so that each of these is fused into one or two passes.
fused_rms_norm = torch.compile(rms_norm)
fused_rotate = torch.compile(rotate)


@torch.compile
def fake_ternary(weight: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = ternarize(weight)
    return (codes * scale).to(dtype)


@torch.compile
def fake_int8(x: Tensor, dtype: torch.dtype) -> Tensor:
    codes, scale = quantize_rows(x)
    return (codes / scale).to(dtype)


@torch.compile
def gated(name: str, gate_up: Tensor, sub_norm: Tensor, eps: float) -> Tensor:
    """sub-norm(act(gate) * up), fp32. gate_up [N, 2 * inner] -> [N, inner]"""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return rms_norm(activation(name, gate) * up, sub_norm, eps)


class StraightThroughTernary(torch.autograd.Function):
    """W -> W_q * g in the compute type; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return fake_ternary(weight, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.float(), None


class StraightThroughInt8(torch.autograd.Function):
    """x -> x_q / s in the compute type; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, x: Tensor, dtype: torch.dtype) -> Tensor:
        return fake_int8(x, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.float(), None


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

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        """x: fp32 [B, T, hidden], normed."""
        config, (batch, length, _) = self.config, x.shape
        x = StraightThroughInt8.apply(x, dtype)
        q, k, v = (
            F.linear(x, StraightThroughTernary.apply(w, dtype))
            .view(batch, length, -1, config.head_dim)
            .transpose(1, 2)
            for w in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = fused_rotate(q, cos, sin).to(dtype), fused_rotate(k, cos, sin).to(dtype)
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        y = (
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .reshape(batch, length, -1)
        )
        y = StraightThroughInt8.apply(
            fused_rms_norm(y, self.attn_sub_norm, config.rms_norm_eps), dtype
        )
        return F.linear(y, StraightThroughTernary.apply(self.o_proj, dtype)).float()


def grouped_linear(rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """rows sorted by expert [N, in], weights [E, out, in], rows per expert -> [N, out]"""
    parts = zip(rows.split(counts), weights.unbind())
    return torch.cat([F.linear(part, weight) for part, weight in parts])


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
        self.gate_proj = matrix(experts, inner, hidden)
        self.up_proj = matrix(experts, inner, hidden)
        self.down_proj = matrix(experts, hidden, inner, scale=RESIDUAL_SCALE)
        self.ffn_sub_norm = nn.Parameter(torch.ones(inner))

    def forward(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x: fp32 [N, hidden], normed -> [N, hidden], balance loss, share of rows per expert [E]"""
        config = self.config
        logits = x @ self.gate.T
        ids, weights = route(logits, config.num_experts_per_tok, config.norm_topk_prob)
        order = ids.flatten().argsort(stable=True)
        tokens = order // config.num_experts_per_tok
        counts = torch.bincount(ids.flatten(), minlength=config.num_experts)
        rows = self.run(
            StraightThroughInt8.apply(x, dtype).index_select(0, tokens), counts.tolist(), dtype
        )
        y = torch.zeros_like(x).index_add(0, tokens, rows * weights.flatten()[order, None])
        load = counts / counts.sum()
        balance = config.num_experts * (load * torch.softmax(logits, dim=-1).mean(dim=0)).sum()
        return y, balance, load

    def run(self, rows: Tensor, counts: list[int], dtype: torch.dtype) -> Tensor:
        """Each expert over its rows. [N*k, hidden], sorted by expert -> fp32 [N*k, hidden]"""
        gate, up, down = (
            StraightThroughTernary.apply(w, dtype)
            for w in (self.gate_proj, self.up_proj, self.down_proj)
        )
        gate_up = grouped_linear(rows, torch.cat([gate, up], dim=1), counts)
        inner = gated(self.config.hidden_act, gate_up, self.ffn_sub_norm, self.config.rms_norm_eps)
        return grouped_linear(StraightThroughInt8.apply(inner, dtype), down, counts).float()


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp = Experts(config)

    def forward(
        self, h: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        h = h + self.self_attn(fused_rms_norm(h, self.input_layernorm, self.eps), cos, sin, dtype)
        x = fused_rms_norm(h, self.post_attention_layernorm, self.eps)
        y, balance, load = self.mlp(x.flatten(0, 1), dtype)
        return h + y.view_as(h), balance, load


class QatModel(nn.Module):
    """Master weights, norms, gate, residual stream and loss in fp32; matrix products in `dtype`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.config, self.dtype = config, dtype
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
            h, balance, load = layer(h, self.cos[:length], self.sin[:length], self.dtype)
            balances.append(balance)
            loads.append(load)
        h = fused_rms_norm(h, self.norm, self.config.rms_norm_eps).to(self.dtype)
        logits = F.linear(h, self.embed_tokens.to(self.dtype)).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        return loss, torch.stack(balances).sum(), torch.stack(loads)
