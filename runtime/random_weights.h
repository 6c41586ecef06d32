// Weights of a model that was never trained.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/config.h"
#include "runtime/safetensors.h"

namespace ternion::runtime {

// A tensor whose bytes a seed decides, together with the tensors before it.
struct RandomTensor {
  enum class Fill : uint8_t { kTernary, kOnes, kNormal, kScale };

  SafetensorsWriter::Entry entry;
  Fill fill = Fill::kOnes;
  float value = 1;          // standard deviation, or the scale itself
  uint64_t first_draw = 0;  // of the seed's numbers

  int64_t bytes() const;
  // Fills `out` with the tensor's bytes from `begin` on; both are whole elements.
  void Draw(uint64_t seed, int64_t begin, std::span<uint8_t> out) const;
};

// All tensors of a model with packed ternary weights, in the order in which files hold them.
std::vector<RandomTensor> RandomTensors(const ModelConfig& config);

}  // namespace ternion::runtime
