// What cuBLAS is asked for, by an emulated one that does it on the emulated device.
#include "kernels/cuda/cublas.h"

#include <algorithm>
#include <cstring>
#include <random>
#include <vector>

#include "base/buffer.h"
#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::kernels {
namespace {

class CublasTest : public testing::Test {
 protected:
  CublasTest() : table_(*SelectCudaKernels(0, executor_, &why_)) {}

  Executor executor_;
  std::string why_;
  const Kernels& table_;
};

uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return static_cast<uint16_t>(bits >> 16);
}

// Numbers whose products and sums are exact: what is compared is which are multiplied.
std::vector<float> SmallIntegers(size_t count, std::mt19937& rng) {
  std::vector<float> numbers(count);
  for (float& number : numbers) number = static_cast<float>(static_cast<int>(rng() % 3)) - 1;
  return numbers;
}

void WriteBf16(const std::vector<float>& numbers, base::Memory& memory, uint16_t* to) {
  std::vector<uint16_t> bits;
  for (float number : numbers) bits.push_back(ToBf16(number));
  memory.Write(bits.data(), bits.size() * sizeof(uint16_t), to);
}

TEST_F(CublasTest, MultipliesRowsByTheWeightsRows) {
  const auto cublas = LoadCublas(TERNION_EMULATED_CUBLAS, executor_, &why_);
  ASSERT_NE(cublas, nullptr) << why_;
  EXPECT_EQ(cublas->version(), "13.0.2");
  constexpr int kRows = 3, kOutputs = 5, kInputs = 7;
  std::mt19937 rng(1);
  const std::vector<float> x = SmallIntegers(kRows * kInputs, rng);
  const std::vector<float> weights = SmallIntegers(kOutputs * kInputs, rng);
  base::Array<uint16_t> device_x(x.size(), *executor_.memory);
  base::Array<uint16_t> device_weights(weights.size(), *executor_.memory);
  base::Array<uint16_t> y(kRows * kOutputs + 1, *executor_.staging);
  WriteBf16(x, *executor_.memory, device_x.data());
  WriteBf16(weights, *executor_.memory, device_weights.data());
  std::fill_n(y.data(), y.size(), ToBf16(2));  // which is not added to
  const Recording recording = table_.record(
      [&] {
        EXPECT_EQ(cublas->Matmul({.x = device_x.data(),
                                  .weights = device_weights.data(),
                                  .y = y.data(),
                                  .num_rows = kRows,
                                  .outputs = kOutputs,
                                  .inputs = kInputs}),
                  nullptr);
      },
      executor_);
  ASSERT_NE(recording, nullptr);
  table_.replay(recording, executor_);
  ASSERT_EQ(table_.wait(executor_), nullptr);
  for (int i = 0; i < kRows; ++i) {
    for (int o = 0; o < kOutputs; ++o) {
      float sum = 0;
      for (int k = 0; k < kInputs; ++k) sum += x[i * kInputs + k] * weights[o * kInputs + k];
      EXPECT_EQ(y[i * kOutputs + o], ToBf16(sum)) << i << ", " << o;
    }
  }
  EXPECT_EQ(y[kRows * kOutputs], ToBf16(2)) << "there is no such row";
}

TEST_F(CublasTest, SaysWhatItRefuses) {
  executor_.scratch = {};
  const auto cublas = LoadCublas(TERNION_EMULATED_CUBLAS, executor_, &why_);
  ASSERT_NE(cublas, nullptr) << why_;
  EXPECT_STREQ(cublas->Matmul({}), "CUBLAS_STATUS_NOT_SUPPORTED") << "it has no workspace";
}

TEST_F(CublasTest, IsAbsentWhereThereIsNone) {
  // The emulated device has none, whatever this machine has.
  EXPECT_EQ(LoadCublas("", executor_, &why_), nullptr);
  EXPECT_EQ(why_, "no driver for it");
  EXPECT_EQ(LoadCublas("/none/libcublas.so", executor_, &why_), nullptr);
  EXPECT_NE(why_.find("/none/libcublas.so"), std::string::npos) << why_;
  EXPECT_EQ(LoadCublas("libm.so.6", executor_, &why_), nullptr);
  EXPECT_EQ(why_, "it has no cublasCreate_v2");
}

}  // namespace
}  // namespace ternion::kernels
