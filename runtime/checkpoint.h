// Tensors of a checkpoint in the form the kernels want.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/buffer.h"
#include "kernels/kernels.h"
#include "kernels/ternary.h"
#include "runtime/config.h"
#include "runtime/random_weights.h"
#include "runtime/safetensors.h"

namespace ternion::runtime {

// A dense matrix in memory of our own: mapped files lie on small pages, which slow a streaming
// kernel down.
struct OwnedDenseMatrix {
  base::Buffer memory;
  kernels::DenseMatrix view;

  void MoveTo(base::Memory& to) {
    memory.MoveTo(to);
    view.data = memory.data();
  }
};

// Reads tensors by name, checking shape, type and values; every error names the tensor. Immutable
// and thread-safe: matrices are loaded by many threads at once.
class Checkpoint {
 public:
  static absl::StatusOr<Checkpoint> Open(const std::string& directory);

  const ModelConfig& config() const { return config_; }
  const TensorStore& tensors() const { return tensors_; }

  // `name`.weight as a packed ternary matrix [rows, columns]: repacked from HF codes, or ternarized
  // from float master weights (NUMERICS.md, Weights). weight_scale is read by its meaning in this
  // checkpoint.
  absl::StatusOr<kernels::OwnedTernaryMatrix> LoadTernary(
      const std::string& name, int64_t rows, int64_t columns,
      kernels::TernaryLayout layout = kernels::TernaryLayout::kPanels) const;
  // The same in the executor's memory, drawn there by kernels that can (Kernels::draw_ternary) once
  // they come to it. For a checkpoint that is a seed.
  absl::StatusOr<kernels::OwnedTernaryMatrix> DrawTernary(const std::string& name, int64_t rows,
                                                          int64_t columns,
                                                          kernels::TernaryLayout layout,
                                                          const kernels::Kernels& kernels,
                                                          kernels::Executor& executor) const;
  // The checks of LoadTernary that need no weight bytes: presence, type, shape.
  absl::Status CheckTernary(const std::string& name, int64_t rows, int64_t columns) const;

  // A bf16 or fp32 matrix as it is, fp16 widened to fp32.
  absl::StatusOr<OwnedDenseMatrix> LoadDense(const std::string& name, int64_t rows,
                                             int64_t columns) const;
  // A vector as fp32.
  absl::StatusOr<base::Array<float>> LoadVector(const std::string& name, int64_t size) const;

 private:
  // A tensor with its data, which is mapped or was drawn just now.
  struct Tensor {
    TensorView view;
    std::vector<uint8_t> drawn;
  };
  absl::StatusOr<Tensor> Read(const std::string& name) const;
  absl::StatusOr<float> LoadScale(const std::string& name) const;

  ModelConfig config_;
  TensorStore tensors_;
  std::map<std::string, RandomTensor> random_;  // where the config has a seed: all tensors
};

}  // namespace ternion::runtime
