// The menu: every op a rank runs, as one function pointer and one args struct each.
//
// CPU variants (scalar, AVX2, AVX-VNNI, AVX-512 VNNI) and CUDA fill the same table; it is chosen
// once at start (kernels/select.h) and passed down. Ops check nothing: shapes and ids were checked
// where they came from. Ops allocate nothing.
//
// Results. Integer products are exact and equal on all variants. Float ops sum in one fixed order
// (16 lanes over the reduced dimension, lane l taking elements 16i + l in ascending i with a
// product and a sum that are rounded separately; then lanes are added pairwise: l and l+8, l+4,
// l+2, l+1; what norms and quantize sum up over a row, in 64 lanes likewise, from l and l+32 on: a
// row is a long way for one lane of 16), use no library math functions, and treat each row alone: a
// row's result depends neither on the CPU variant, nor on the number of threads, nor on the rows
// beside it. N ranks equal one rank bit for bit because of this.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "kernels/activations.h"
#include "kernels/kv_page.h"
#include "kernels/row_codec.h"
#include "kernels/ternary.h"

namespace ternion::kernels {

// Where an op runs, and where the memory lies that it works on.
//
// On a GPU an op is done some time after the call; ops are done in the order of the calls. Before
// the host reads what an op writes, or writes what one reads, it waits (Kernels::wait).
struct Executor {
  base::ThreadPool* threads = nullptr;  // of the rank; on a CPU they run the ops
  void* stream = nullptr;               // cudaStream_t
  // All pointers in args lie in one of these, and so do the pointers in what they point at. On a
  // CPU both are the host's.
  base::Memory* memory = &base::HostMemory();   // weights, activations, the KV cache
  base::Memory* staging = &base::HostMemory();  // the host reaches it, too: ids, tables, messages
  std::span<uint8_t> scratch = {};  // of a GPU: an op's own until the next; threads have theirs
};

// A bf16 or fp32 matrix that stays dense: embedding, head, gate. A view of mapped or owned memory.
enum class DenseType : uint8_t { kBf16, kFp32 };
struct DenseMatrix {
  const void* data = nullptr;  // [rows, columns], no padding, any alignment of the element
  DenseType type = DenseType::kBf16;
  int64_t rows = 0;
  int64_t columns = 0;
};

// out[r] = x[r] * rsqrt(mean(x[r]^2) + eps) * weight. In place is allowed.
struct RmsNormArgs {
  const float* x = nullptr;       // [num_rows, x_stride]
  const float* weight = nullptr;  // [dim]
  float* out = nullptr;           // [num_rows, out_stride]
  int64_t num_rows = 0;
  int64_t dim = 0;
  int64_t x_stride = 0;
  int64_t out_stride = 0;
  float eps = 0;
};

// What a row may be joined with, element by element, before anything else: x becomes x + y,
// silu(x) * y with silu(x) = x / (1 + exp(-x)), or relu2(x) * y: x^2 * y, and +0 where x <= 0,
// whatever y holds there.
enum class Join : uint8_t { kNothing, kAdd, kSiluTimes, kRelu2Times };

// Of a gated feed-forward: what joins its gate with up.
enum class Activation : uint8_t { kSilu, kRelu2 };
constexpr Join JoinOf(Activation activation) {
  return activation == Activation::kSilu ? Join::kSiluTimes : Join::kRelu2Times;
}

// Optional join, optional RMSNorm, then one scale per row (NUMERICS.md, Activations).
// bits 8: s = 127 / max(absmax, 1e-5), code = clamp(round(x * s), -128, 127), scales = max(absmax,
// 1e-5) / 127. bits 4: b = mean|x|, code = clamp(round(sqrt(7) * x / (b + 1e-5)), -8, 7), scales =
// b / sqrt(7). round is half to even. A row with NaN gives unspecified codes (in range), never
// undefined behaviour.
struct QuantizeArgs {
  const float* x = nullptr;       // [num_rows, x_stride]
  const float* weight = nullptr;  // [dim] norm weight, or null: no norm
  float* normed = nullptr;        // [num_rows, dim] the normed fp32 rows too, or null
  QuantizedRows out;              // num_rows and dim come from here; pads are zeroed, sums are set
  int64_t x_stride = 0;
  float eps = 0;
  int bits = 8;
  bool top_half =
      false;  // codes of the smaller half by |x| (after the norm) become 0: kept are the
              // dim - dim / 2 largest and all that equal the least of these (bits 8 only)
  Join join = Join::kNothing;
  const float* y = nullptr;  // [num_rows, x_stride], or null: nothing to join
  float* joined = nullptr;   // [num_rows, x_stride] what x becomes, may be x; or null
};

// y[i][o] = float(sum_k w[o][k] * code[i][k]) * (w.scale * x.scales[i]) for each group's own rows
// of x and own matrix. One matrix is one group; q, k and v are three groups over the same rows;
// experts are one group each. num_rows may be 0. On a GPU all groups of a call have one layout.
// Work is split over threads by weight bytes and products.
//
// A few rows do not read codes that add nothing to any of them: with kColumns (8 rows, 48 with
// 512-bit vectors), those of inputs that are 0; with kRows (64 rows, fewer where columns are many)
// and a gate, those of outputs whose gate is <= 0. Results are the same bits in every layout.
struct TernaryGroup {
  TernaryMatrix weights;  // columns == x.dim
  int64_t row_begin = 0;  // first row of x
  int64_t num_rows = 0;
  float* y = nullptr;  // [num_rows, y_stride], columns 0 .. weights.rows are written
  int64_t y_stride = 0;
  // [num_rows, y_stride] or null. Not null: y is unspecified where the gate is <= 0. May be NaN.
  const float* gate = nullptr;
};
struct TernaryMatmulArgs {
  QuantizedRows x;
  std::span<const TernaryGroup> groups;
};

// y[i][o] = dot(x[i], w[o]) in the fixed order above.
struct DenseMatmulArgs {
  const float* x = nullptr;  // [num_rows, x_stride]
  DenseMatrix weights;       // [out, in]
  float* y = nullptr;        // [num_rows, y_stride]
  int64_t num_rows = 0;
  int64_t x_stride = 0;
  int64_t y_stride = 0;
};

// out[i] = row ids[i] of the table, as fp32.
struct EmbedArgs {
  DenseMatrix table;             // [vocab, dim]
  const int32_t* ids = nullptr;  // [num_rows], in range
  float* out = nullptr;          // [num_rows, dim]
  int64_t num_rows = 0;
};

// Heads of q and k, in place: RMSNorm of each head where there is a norm, then rotary embedding in
// NeoX halves, (a, b) = (x[d], x[d + head_dim/2]) becomes (a cos - b sin, b cos + a sin) with the
// angle positions[row] * theta^(-2d / head_dim).
struct RopeHeads {
  float* x = nullptr;           // [num_rows, stride], heads * head_dim columns used
  const float* norm = nullptr;  // [head_dim], or null: none
  int64_t stride = 0;
  int heads = 0;
};
struct RopeArgs {
  RopeHeads q = {}, k = {};
  const int32_t* positions = nullptr;  // [num_rows]
  const float* cos_table = nullptr;    // [max_positions, head_dim / 2]
  const float* sin_table = nullptr;    // [max_positions, head_dim / 2]
  int64_t num_rows = 0;
  int head_dim = 0;
  float eps = 0;
};

// x[head] = H x[head] for each head of a row, in place: H is the orthonormal Hadamard matrix (its
// own inverse) of head_dim, a power of two. Elements are multiplied by head_dim^-0.5, then added
// and subtracted in pairs at distances 1, 2, 4, ..
struct HadamardArgs {
  float* x = nullptr;  // [num_rows, stride], heads * head_dim columns used
  int64_t num_rows = 0;
  int64_t stride = 0;
  int heads = 0;
  int head_dim = 0;
};

// Writes rows of k (after RoPE) and v into the slots of their positions (kernels/kv_page.h). Rows
// of one call are of distinct (page table, position).
struct KvStoreArgs {
  const float* k = nullptr;              // [num_rows, stride]
  const float* v = nullptr;              // [num_rows, stride]
  const KvPage* const* pages = nullptr;  // [num_rows] the row's page table: page p holds positions
                                         // p * kPageTokens ..
  const int32_t* positions = nullptr;    // [num_rows]
  int64_t num_rows = 0;
  int64_t stride = 0;
  int kv_heads = 0;
  int head_dim = 0;
  KvFormat format = KvFormat::kBf16;
};

// Causal grouped-query attention of each row over positions 0 .. positions[row] of its own page
// table: out = softmax(q K^T * scale) V in fp32. Each page has a softmax of its own (so that chunks
// of a prefill and single decode steps give the same bits, and a GPU can take all pages at once),
// with m its largest score, l the sum of its weights e^(score - m) in 16 lanes as above, and o the
// sum of its weighted values; pages are joined in ascending order: with M = max(m', m),
// l = l' e^(m' - M) + l e^(m - M), and o likewise, from m' = -infinity, l' = 0, o' = 0. Scores are
// summed over head_dim, and values over tokens, one after the other in ascending order. Below bf16
// the codes take the place of keys and values: a score is (q . code) * (key scale * scale), and a
// weight times its value scale multiplies the codes. Position 0, which stays bf16, has its score
// summed in 16 lanes; its weighted value comes first. (heads / kv_heads) * (head_dim + 48) + 512
// floats fit into a thread's scratch.
struct AttentionArgs {
  const float* q = nullptr;              // [num_rows, q_stride], heads * head_dim columns
  const KvPage* const* pages = nullptr;  // [num_rows] page table of the row's sequence
  const int32_t* positions = nullptr;    // [num_rows]
  float* out = nullptr;                  // [num_rows, out_stride]
  int64_t num_rows = 0;
  int64_t max_tokens = 0;  // no row sees more; a GPU deals out its work by it, or not at all at 0
  int64_t q_stride = 0;
  int64_t out_stride = 0;
  int heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  float scale = 0;
  KvFormat format = KvFormat::kBf16;
};

// Softmax over each row's logits in fp32, then the k largest (ties: the lower index), in descending
// order. `renormalize` divides the chosen weights by their sum. num_experts floats fit into a
// thread's scratch.
struct GateTopKArgs {
  const float* logits = nullptr;  // [num_rows, num_experts]
  int32_t* ids = nullptr;         // [num_rows, k]
  float* weights = nullptr;       // [num_rows, k]
  int64_t num_rows = 0;
  int num_experts = 0;
  int k = 0;
  bool renormalize = false;
};

// out.codes[i] = dim codes at rows[i] (any alignment), pads zeroed, sums computed, scales copied.
struct GatherRowsArgs {
  const int8_t* const* rows = nullptr;  // [out.num_rows]
  const float* scales = nullptr;        // [out.num_rows]
  QuantizedRows out;
};

// Rows of fp32 -> encoded rows, one behind the other (kernels/row_codec.h).
struct EncodeRowsArgs {
  const float* x = nullptr;       // [.., x_stride]
  const int32_t* rows = nullptr;  // [num_rows] rows of x to take, or null: 0 .. num_rows - 1
  uint8_t* out = nullptr;         // [num_rows, EncodedRowBytes(format, dim)]
  int64_t num_rows = 0;
  int64_t dim = 0;
  int64_t x_stride = 0;
  RowFormat format = RowFormat::kFp32;
};

// The way back.
struct DecodeRowsArgs {
  const uint8_t* rows = nullptr;  // [num_rows, EncodedRowBytes(format, dim)]
  float* out = nullptr;           // [num_rows, dim]
  int64_t num_rows = 0;
  int64_t dim = 0;
  RowFormat format = RowFormat::kFp32;
};

// Rows of codes -> one behind the other: at int8 as they are, at int4 (codes in -8 .. 7) as nibbles
// (kernels/row_codec.h).
struct PackCodesArgs {
  const int8_t* codes = nullptr;  // [.., codes_stride]
  const int32_t* rows = nullptr;  // [num_rows] rows to take, or null: 0 .. num_rows - 1
  uint8_t* out = nullptr;         // [num_rows, CodeBytes(format, dim)]
  int64_t num_rows = 0;
  int64_t dim = 0;
  int64_t codes_stride = 0;
  RowFormat format = RowFormat::kInt8;
};

// Rows of nibbles -> rows of codes. (Rows of int8 are used where they lie.)
struct UnpackInt4Args {
  const uint8_t* packed = nullptr;  // [num_rows, CodeBytes(kInt4, dim)]
  int8_t* codes = nullptr;          // [num_rows, codes_stride], columns 0 .. dim are written
  int64_t num_rows = 0;
  int64_t dim = 0;
  int64_t codes_stride = 0;
};

// out[i] = sum over j in [begin[i], begin[i+1]) of weights[j] * terms[j], added in ascending j onto
// out[i] (accumulate) or onto 0. Product and sum are rounded separately.
struct WeightedSumArgs {
  const float* const* terms = nullptr;  // [begin[num_rows]] pointers to dim floats
  const float* weights = nullptr;       // [begin[num_rows]], or null: all 1 (no product)
  const int32_t* begin = nullptr;       // [num_rows + 1]
  float* out = nullptr;                 // [num_rows, dim]
  int64_t num_rows = 0;
  int64_t dim = 0;
  bool accumulate = false;
};

// out[i] += terms[j].weight * terms[j].row for j in [begin[i], begin[i+1]), in ascending j, rounded
// as in WeightedSumArgs: rows are decoded as they are added, so that they are read once.
struct RowTerm {
  const void* row = nullptr;  // [dim] encoded; of any alignment, but fp32 that of floats
  RowFormat format = RowFormat::kFp32;
  float weight = 1;
};
struct AddRowsArgs {
  const RowTerm* terms = nullptr;  // [begin[num_rows]]
  const int32_t* begin = nullptr;  // [num_rows + 1]
  float* out = nullptr;            // [num_rows, dim]
  int64_t num_rows = 0;
  int64_t dim = 0;
};

// The three ops below take rows through experts that are all here, without the host knowing which.
// A route is one of the k choices of a row; route r is of row r / k. Null in tables of CPUs, whose
// host sees for itself.

// Sorts routes by expert, then by number.
struct GroupRoutesArgs {
  const int32_t* experts = nullptr;  // [num_routes], distinct in a row
  int32_t* order = nullptr;          // [num_routes] routes as sorted
  int32_t* places = nullptr;         // [num_routes] where each stands in `order`
  int32_t* begin = nullptr;          // [num_experts + 1] where each expert's begin there
  int32_t* used = nullptr;           // [num_experts] those with routes, ascending, then -1
  int64_t num_routes = 0;
  int num_experts = 0;
};

// ternary_matmul with a group for each expert and each of its one or two matrices. Rows of y are
// routes as sorted, those of expert e are begin[e] .. begin[e + 1] - 1; row i is made of row i of
// x, or of row order[i] / k.
struct ExpertMatrices {
  const TernaryMatrix* weights = nullptr;  // [num_experts], all [rows, x.dim] in `layout`
  float* y = nullptr;                      // [num_routes, rows]
};
struct ExpertMatmulArgs {
  QuantizedRows x;
  ExpertMatrices matrices[2];
  int num_matrices = 1;
  const int32_t* order = nullptr;  // [num_routes], or null
  int k = 1;
  int64_t num_routes = 0;
  const int32_t* begin = nullptr;  // [num_experts + 1]
  const int32_t* used = nullptr;   // [num_experts] as GroupRoutesArgs has it
  int64_t rows = 0;
  int num_experts = 0;
  TernaryLayout layout = TernaryLayout::kTiles;
};

// Per row, in ascending expert id, weights[r] * y[places[r]] of its k routes: added up from 0 and
// then added onto out (presum), or each onto out. Product and sum are rounded separately.
struct SumRoutesArgs {
  const float* y = nullptr;         // [num_rows * k, dim]
  const int32_t* places = nullptr;  // [num_rows, k]
  const float* weights = nullptr;   // [num_rows, k]
  float* out = nullptr;             // [num_rows, dim]
  int64_t num_rows = 0;
  int64_t dim = 0;
  int k = 0;
  bool presum = true;
};

// The next token of each row (kernels/sampling.h). Greedy takes the largest logit, the lower id of
// equal ones; NaN counts as -infinity. Otherwise the top_k largest are kept, of these the fewest
// whose weight is top_p of theirs, and one of them is drawn by `random`. A row's token depends on
// its own logits and params alone.
struct SampleParams {
  float temperature = 0;  // not above 0: greedy
  int32_t top_k = 0;      // 0: all
  float top_p = 1;
  uint64_t random = 0;  // 64 random bits
};
struct SampleArgs {
  const float* logits = nullptr;         // [num_rows, vocab], vocab <= kMaxVocab
  const SampleParams* params = nullptr;  // [num_rows]
  int32_t* tokens = nullptr;             // [num_rows]
  int64_t num_rows = 0;
  int64_t vocab = 0;
};

// A ternary matrix as a seed decides it (kernels/ternary_draw.h), straight into its own layout:
// kTiles or kTilesBase3. All of its bytes are written. Null in tables of CPUs, whose hosts draw by
// themselves. Unlike other ops, several threads may call it at a time, each of which has allocated
// its `codes` itself. Products may touch weights before ops before them are done: wait in between.
struct DrawTernaryArgs {
  uint64_t seed = 0;
  uint64_t first_draw = 0;
  int64_t rows = 0;
  int64_t columns = 0;
  TernaryLayout layout = TernaryLayout::kTiles;
  uint8_t* codes = nullptr;  // [TernaryBytes(rows, columns, layout)]
};

// out[i] = 0.
struct ZeroArgs {
  float* out = nullptr;  // [count]
  int64_t count = 0;
};

// Takes bytes from the executor's staging to its memory, or back. Null where these are the same.
struct CopyArgs {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t bytes = 0;
};

// Ops that were called once and can be done again, over what then lies in the memory they work on.
using Recording = std::shared_ptr<void>;

struct Kernels {
  const char* name = nullptr;  // "scalar", "avx2", "avxvnni", "avx512vnni", "cuda"
  // What ternary_matmul takes: this layout; `smaller_layout`, for weights that do not fit otherwise
  // (the same where there is none); and, with skips_lines, kRows and kColumns, of which it reads
  // less where it can.
  TernaryLayout layout = TernaryLayout::kPanels;
  TernaryLayout smaller_layout = TernaryLayout::kPanels;
  bool skips_lines = false;
  // Returns when all ops called so far are done. Null, or what went wrong with one of them (a
  // device fails for good).
  const char* (*wait)(Executor&) = nullptr;
  void (*rms_norm)(const RmsNormArgs&, Executor&) = nullptr;
  void (*quantize)(const QuantizeArgs&, Executor&) = nullptr;
  void (*ternary_matmul)(const TernaryMatmulArgs&, Executor&) = nullptr;
  void (*dense_matmul)(const DenseMatmulArgs&, Executor&) = nullptr;
  void (*embed)(const EmbedArgs&, Executor&) = nullptr;
  void (*rope)(const RopeArgs&, Executor&) = nullptr;
  void (*hadamard)(const HadamardArgs&, Executor&) = nullptr;
  void (*kv_store)(const KvStoreArgs&, Executor&) = nullptr;
  void (*attention)(const AttentionArgs&, Executor&) = nullptr;
  void (*gate_top_k)(const GateTopKArgs&, Executor&) = nullptr;
  void (*gather_rows)(const GatherRowsArgs&, Executor&) = nullptr;
  void (*encode_rows)(const EncodeRowsArgs&, Executor&) = nullptr;
  void (*decode_rows)(const DecodeRowsArgs&, Executor&) = nullptr;
  void (*add_rows)(const AddRowsArgs&, Executor&) = nullptr;
  void (*pack_codes)(const PackCodesArgs&, Executor&) = nullptr;
  void (*unpack_int4)(const UnpackInt4Args&, Executor&) = nullptr;
  void (*sample)(const SampleArgs&, Executor&) = nullptr;
  void (*draw_ternary)(const DrawTernaryArgs&, Executor&) = nullptr;
  void (*weighted_sum)(const WeightedSumArgs&, Executor&) = nullptr;
  void (*zero)(const ZeroArgs&, Executor&) = nullptr;
  void (*copy)(const CopyArgs&, Executor&) = nullptr;
  void (*group_routes)(const GroupRoutesArgs&, Executor&) = nullptr;
  void (*expert_matmul)(const ExpertMatmulArgs&, Executor&) = nullptr;
  void (*sum_routes)(const SumRoutesArgs&, Executor&) = nullptr;
  // Ops that `calls` calls are recorded, not done; it waits for none and allocates nothing. Null
  // when the device failed. Both are null where calling ops costs little.
  Recording (*record)(const std::function<void()>& calls, Executor&) = nullptr;
  void (*replay)(const Recording&, Executor&) = nullptr;
};

}  // namespace ternion::kernels
