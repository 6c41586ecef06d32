#include "launcher/weight_reads.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace ternion::launcher {
namespace {

using kernels::TernaryGroup;
using kernels::TernaryLayout;

thread_local WeightReads* current = nullptr;

// Outputs that some row of the group wants.
int64_t LiveOutputs(const TernaryGroup& group) {
  int64_t live = 0;
  for (int64_t output = 0; output < group.weights.rows; ++output) {
    bool wanted = false;
    for (int64_t row = 0; row < group.num_rows && !wanted; ++row) {
      wanted = !(group.gate[row * group.y_stride + output] <= 0);  // NaN is wanted
    }
    live += wanted;
  }
  return live;
}

// Inputs that are not 0 in some row of the group.
int64_t LiveInputs(const TernaryGroup& group, const kernels::QuantizedRows& x) {
  int64_t live = 0;
  for (int64_t input = 0; input < group.weights.columns; ++input) {
    bool used = false;
    for (int64_t row = 0; row < group.num_rows && !used; ++row) {
      used = x.codes[(group.row_begin + row) * x.stride + input] != 0;
    }
    live += used;
  }
  return live;
}

int64_t BytesRead(const TernaryGroup& group, const kernels::QuantizedRows& x) {
  const kernels::TernaryMatrix& weights = group.weights;
  if (weights.layout == TernaryLayout::kColumns) {
    return LiveInputs(group, x) * weights.stride_bytes();
  }
  if (weights.layout == TernaryLayout::kRows && group.gate != nullptr) {
    return LiveOutputs(group) * weights.stride_bytes();
  }
  return weights.bytes();
}

int64_t SumOf(const std::unordered_map<const void*, int64_t>& bytes) {
  int64_t sum = 0;
  for (const auto& [matrix, of_matrix] : bytes) sum += of_matrix;
  return sum;
}

}  // namespace

WeightReads::WeightReads(const kernels::Kernels& kernels, const kernels::Executor& executor)
    : kernels_(kernels), counting_kernels_(kernels), staging_(*executor.staging) {
  TERNION_CHECK(current == nullptr);
  current = this;
  counting_kernels_.ternary_matmul = TernaryMatmul;
  counting_kernels_.dense_matmul = DenseMatmul;
  counting_kernels_.embed = Embed;
  if (kernels.expert_matmul != nullptr) counting_kernels_.expert_matmul = ExpertMatmul;
}

WeightReads::~WeightReads() { current = nullptr; }

WeightReads& WeightReads::Current() {
  TERNION_CHECK(current != nullptr);
  return *current;
}

void WeightReads::Start() {
  counts_ = {};
  is_counting_ = true;
  counting_kernels_.record = nullptr;  // what is replayed is not called
}

WeightReadCounts WeightReads::Stop() {
  EndStep();
  is_counting_ = false;
  counting_kernels_.record = kernels_.record;
  return counts_;
}

void WeightReads::EndStep() {
  counts_.ternary_matrices += static_cast<int64_t>(ternary_bytes_.size());
  counts_.bytes += SumOf(ternary_bytes_) + SumOf(dense_bytes_);
  ternary_bytes_.clear();
  dense_bytes_.clear();
}

void WeightReads::TernaryMatmul(const kernels::TernaryMatmulArgs& args,
                                kernels::Executor& executor) {
  WeightReads& reads = Current();
  for (const TernaryGroup& group : args.groups) {
    if (!reads.is_counting_ || group.num_rows == 0) continue;
    int64_t& bytes = reads.ternary_bytes_[group.weights.codes];
    bytes = std::max(bytes, BytesRead(group, args.x));
  }
  reads.kernels_.ternary_matmul(args, executor);
}

void WeightReads::DenseMatmul(const kernels::DenseMatmulArgs& args, kernels::Executor& executor) {
  WeightReads& reads = Current();
  if (reads.is_counting_ && args.num_rows > 0) {
    const int64_t element = args.weights.type == kernels::DenseType::kBf16 ? 2 : 4;
    reads.dense_bytes_[args.weights.data] = args.weights.rows * args.weights.columns * element;
  }
  reads.kernels_.dense_matmul(args, executor);
}

void WeightReads::ExpertMatmul(const kernels::ExpertMatmulArgs& args, kernels::Executor& executor) {
  WeightReads& reads = Current();
  if (reads.is_counting_) reads.Count(args, executor);
  reads.kernels_.expert_matmul(args, executor);
}

void WeightReads::Count(const kernels::ExpertMatmulArgs& args, kernels::Executor& executor) {
  const size_t size = args.num_experts + 1;
  if (begin_.size() < size) begin_ = base::Array<int32_t>(size, staging_);
  kernels_.copy({args.begin, begin_.data(), static_cast<int64_t>(size * sizeof(int32_t))},
                executor);
  kernels_.wait(executor);  // what went wrong, the step's own wait says
  const int64_t bytes = kernels::TernaryBytes(args.rows, args.x.dim, args.layout);
  for (int expert = 0; expert < args.num_experts; ++expert) {
    if (begin_[expert] == begin_[expert + 1]) continue;
    for (int i = 0; i < args.num_matrices; ++i) {
      ternary_bytes_[args.matrices[i].weights + expert] = bytes;
    }
  }
}

// Every step begins with an embedding, on ranks without rows too.
void WeightReads::Embed(const kernels::EmbedArgs& args, kernels::Executor& executor) {
  WeightReads& reads = Current();
  if (reads.is_counting_) {
    reads.EndStep();
    ++reads.counts_.steps;
    reads.counts_.rows += args.num_rows;
  }
  reads.kernels_.embed(args, executor);
}

}  // namespace ternion::launcher
