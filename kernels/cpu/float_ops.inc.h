// The float ops of one CPU variant. Included once by each float_ops_<variant>.cc, which is compiled
// with the variant's -m flags and names the table.
#pragma once

#include "kernels/cpu/float_ops_attention.inc.h"
#include "kernels/cpu/float_ops_codec.inc.h"
#include "kernels/cpu/float_ops_dense.inc.h"
#include "kernels/cpu/float_ops_gate.inc.h"
#include "kernels/cpu/float_ops_kv.inc.h"
#include "kernels/cpu/float_ops_rows.inc.h"
#include "kernels/cpu/float_ops_sample.inc.h"
#include "kernels/kernels.h"

namespace ternion::kernels {
namespace {

constexpr Kernels kThisVariant = {
    .rms_norm = RmsNorm,
    .quantize = Quantize,
    .dense_matmul = DenseMatmul,
    .embed = Embed,
    .rope = Rope,
    .hadamard = Hadamard,
    .kv_store = KvStore,
    .attention = Attention,
    .gate_top_k = GateTopK,
    .gather_rows = GatherRows,
    .encode_rows = EncodeRows,
    .decode_rows = DecodeRows,
    .add_rows = AddRows,
    .pack_codes = PackCodes,
    .unpack_int4 = UnpackInt4,
    .sample = Sample,
    .weighted_sum = WeightedSum,
    .zero = ZeroOut,
};

}  // namespace
}  // namespace ternion::kernels
