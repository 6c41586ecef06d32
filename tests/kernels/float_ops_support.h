// Helpers of the float-op tests: random data, and one op on every variant and number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/kernels/cuda_variant.h"

namespace ternion::kernels {

inline std::vector<float> RandomFloats(size_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

inline float FromBf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Random bf16 weights: floats with the lower half cut off.
inline std::vector<uint16_t> RandomBf16(size_t count, uint32_t seed, float scale = 1.0f) {
  std::vector<uint16_t> values;
  for (float value : RandomFloats(count, seed, scale)) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    values.push_back(static_cast<uint16_t>(bits >> 16));
  }
  return values;
}

template <typename T>
void ExpectSameBits(const std::vector<T>& actual, const std::vector<T>& expected) {
  ASSERT_EQ(actual.size(), expected.size());
  if (std::memcmp(actual.data(), expected.data(), actual.size() * sizeof(T)) == 0) return;
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_EQ(std::memcmp(&actual[i], &expected[i], sizeof(T)), 0)
        << "element " << i << ": " << +actual[i] << " instead of " << +expected[i];
  }
}

inline void ExpectNear(const std::vector<float>& actual, const std::vector<double>& expected,
                       double tolerance) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], tolerance * (1.0 + std::abs(expected[i])))
        << "element " << i;
  }
}

inline base::ThreadPool& Threads(int count) {
  static base::ThreadPool one(1), two(2), three(3);
  return count == 1 ? one : count == 2 ? two : three;
}

// Calls op(kernels, executor) on one scalar thread, then on every variant and 1 to 3 threads, whose
// results must be the same bits. Returns the first; op returns a vector.
template <typename F>
auto OnEveryVariant(F op) {
  Executor alone = {&Threads(1)};
  const auto expected = op(*SelectCpuKernels("scalar"), alone);
  for (const char* isa : AvailableIsas()) {
    for (int threads = 1; threads <= 3; ++threads) {
      SCOPED_TRACE(std::string(isa) + " on " + std::to_string(threads) + " threads");
      Executor executor = {&Threads(threads)};
      ExpectSameBits(op(*SelectCpuKernels(isa), executor), expected);
    }
  }
  Executor of_device;
  if (const Kernels* cuda = CudaVariant(of_device)) {
    SCOPED_TRACE("CUDA");
    ExpectSameBits(op(*cuda, of_device), expected);
  }
  return expected;
}

// The fastest variant on one thread, for properties that OnEveryVariant carries over to the others.
inline const Kernels& Fastest() { return *SelectCpuKernels(""); }

}  // namespace ternion::kernels
