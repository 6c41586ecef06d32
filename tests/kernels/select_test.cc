#include "kernels/select.h"

#include <algorithm>

#include "gtest/gtest.h"

namespace ternion::kernels {
namespace {

TEST(Select, ScalarIsFirstAndTheDefaultIsLast) {
  const std::span<const char* const> isas = AvailableIsas();
  ASSERT_FALSE(isas.empty());
  EXPECT_STREQ(isas.front(), "scalar");
  EXPECT_EQ(SelectCpuKernels(""), SelectCpuKernels(isas.back()));
}

TEST(Select, EveryAvailableNameHasAFullTable) {
  for (const char* isa : AvailableIsas()) {
    const Kernels* kernels = SelectCpuKernels(isa);
    ASSERT_NE(kernels, nullptr) << isa;
    EXPECT_STREQ(kernels->name, isa);
    EXPECT_NE(kernels->rms_norm, nullptr);
    EXPECT_NE(kernels->quantize, nullptr);
    EXPECT_NE(kernels->ternary_matmul, nullptr);
    EXPECT_NE(kernels->dense_matmul, nullptr);
    EXPECT_NE(kernels->embed, nullptr);
    EXPECT_NE(kernels->rope, nullptr);
    EXPECT_NE(kernels->hadamard, nullptr);
    EXPECT_NE(kernels->kv_store, nullptr);
    EXPECT_NE(kernels->attention, nullptr);
    EXPECT_NE(kernels->gate_top_k, nullptr);
    EXPECT_NE(kernels->gather_rows, nullptr);
    EXPECT_NE(kernels->encode_rows, nullptr);
    EXPECT_NE(kernels->decode_rows, nullptr);
    EXPECT_NE(kernels->add_rows, nullptr);
    EXPECT_NE(kernels->pack_codes, nullptr);
    EXPECT_NE(kernels->unpack_int4, nullptr);
    EXPECT_NE(kernels->weighted_sum, nullptr);
    EXPECT_NE(kernels->zero, nullptr);
    EXPECT_NE(kernels->wait, nullptr);
  }
}

TEST(Select, NamesThatThisMachineLacksAreRefused) {
  const std::span<const char* const> isas = AvailableIsas();
  for (const char* isa : {"scalar", "avx2", "avxvnni", "avx512vnni"}) {
    const bool listed = std::find_if(isas.begin(), isas.end(), [&](const char* name) {
                          return std::string(name) == isa;
                        }) != isas.end();
    EXPECT_EQ(SelectCpuKernels(isa) != nullptr, listed) << isa;
  }
  EXPECT_EQ(SelectCpuKernels("neon"), nullptr);
  EXPECT_EQ(SelectCpuKernels("AVX2"), nullptr);
}

}  // namespace
}  // namespace ternion::kernels
