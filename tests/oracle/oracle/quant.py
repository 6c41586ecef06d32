"""Ternary weights (BitNet b1.58, arXiv 2402.17764), quantized rows (int8; BitNet a4.8, arXiv
2411.04965: int4 and Top-50%), KV precisions, and HF transformers' packing."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FIELDS_PER_BYTE = 4
MIN_SCALE = 1e-5


def absmean_scale(weight: Tensor) -> Tensor:
    """g = mean|W| of each matrix. [..., out, in] -> [..., 1, 1]"""
    return weight.abs().mean(dim=(-2, -1), keepdim=True).clamp(min=MIN_SCALE)


def ternarize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in {-1, 0, 1} (as float) and g. [..., out, in] -> [..., out, in], [..., 1, 1]"""
    scale = absmean_scale(weight)
    return (weight / scale).round().clamp(-1, 1), scale


def absmax(x: Tensor) -> Tensor:
    """Of each row, not below MIN_SCALE. [..., n] -> [..., 1]"""
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_SCALE)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (as float) and s = 127 / absmax of each row, so that x is about codes / s.

    [..., n] -> [..., n], [..., 1]
    """
    scale = 127.0 / absmax(x)
    return (x * scale).round().clamp(-128, 127), scale


def quantize_rows4(x: Tensor) -> tuple[Tensor, Tensor]:
    """int4 codes (as float) and s = sqrt(7) / mean|x| of each row.

    [..., n] -> [..., n], [..., 1]
    """
    mean = x.abs().mean(dim=-1, keepdim=True)
    codes = (math.sqrt(7) * x / (mean + 1e-5)).round().clamp(-8, 7)
    return codes, math.sqrt(7) / mean


def top_half(x: Tensor) -> Tensor:
    """The larger half of each row by magnitude, ties at the edge included; the rest becomes 0."""
    dropped = x.shape[-1] // 2
    threshold = x.abs().sort(dim=-1).values[..., dropped : dropped + 1]
    return x * (x.abs() >= threshold)


def cached(x: Tensor, bits: int) -> Tensor:
    """Keys (after RoPE) or values as the KV cache gives them back. x [..., T, head_dim]

    16: bf16. 8: round to 127 steps of absmax. 4 and 3: the middle of 2^bits equal cells between
    -absmax and absmax. One scale per vector. The first position is always kept at bf16.
    """
    if bits == 16:
        return x.bfloat16().float()
    largest = absmax(x)
    if bits == 8:
        values = (x * (127.0 / largest)).round().clamp(-127, 127) * (largest / 127.0)
    else:
        half = 2 ** (bits - 1)
        cells = (x * (half / largest)).floor().clamp(-half, half - 1)
        values = (cells + 0.5) * (largest / half)
    return torch.cat([x[..., :1, :].bfloat16().float(), values[..., 1:, :]], dim=-2)


def hadamard(x: Tensor) -> Tensor:
    """Each vector of the last dimension (a power of two) times the orthonormal Hadamard matrix."""
    size = x.shape[-1]
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return x @ matrix / math.sqrt(size)


def pack(codes: Tensor) -> Tensor:
    """[out, in] codes -> uint8 [rows, in], rows = ceil(out/4).

    HF's layout: bits 2i and 2i+1 of packed row r are output row i * rows + r, as code + 1.
    """
    out, width = codes.shape
    rows = -(-out // FIELDS_PER_BYTE)
    fields = torch.zeros(FIELDS_PER_BYTE * rows, width, dtype=torch.uint8)
    fields[:out] = (codes + 1).to(torch.uint8)
    fields = fields.view(FIELDS_PER_BYTE, rows, width)
    return fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6


def unpack(packed: Tensor, out: int) -> Tensor:
    """Inverse of pack: uint8 [ceil(out/4), in] -> float codes [out, in]."""
    fields = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)])
    return fields.flatten(0, 1)[:out].float() - 1


@dataclass(frozen=True)
class TernaryWeight:
    """y = (codes . x_q) * g / s."""

    codes: Tensor  # float, values -1, 0, 1: [out, in]
    g: Tensor  # fp32 scalar

    def __call__(self, rows: tuple[Tensor, Tensor]) -> Tensor:
        """rows: what quantize_rows or quantize_rows4 returned.

        Integer sums below 2^24 are exact in fp32, whatever their order.
        """
        codes, scale = rows
        assert 128 * codes.shape[-1] < 2**24
        return codes @ self.codes.T * self.g / scale
