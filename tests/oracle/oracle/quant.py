"""Ternary weights (BitNet b1.58, arXiv 2402.17764), int8 rows, and HF transformers' packing."""

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


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (as float) and s = 127 / absmax of each row, so that x is about codes / s.

    [..., n] -> [..., n], [..., 1]
    """
    scale = 127.0 / x.abs().amax(dim=-1, keepdim=True).clamp(min=MIN_SCALE)
    return (x * scale).round().clamp(-128, 127), scale


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
        """rows: what quantize_rows returned.

        Integer sums below 2^24 are exact in fp32, whatever their order.
        """
        codes, scale = rows
        assert 128 * codes.shape[-1] < 2**24
        return codes @ self.codes.T * self.g / scale
