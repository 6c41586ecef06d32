#include "comm/codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

constexpr RowFormat kFormats[] = {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8,
                                  RowFormat::kInt4};
constexpr int64_t kDims[] = {1, 2, 31, 32, 33, 64, 72, 100, 127, 128, 129, 257, 1000};

std::vector<float> RandomRow(int64_t dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> row(dim);
  // Magnitudes from 2^-20 to 2^20 in one row, so that blocks differ.
  for (float& value : row) value = std::ldexp(normal(random), static_cast<int>(random() % 41) - 20);
  return row;
}

std::vector<float> RoundTrip(RowFormat format, const std::vector<float>& row) {
  const int64_t dim = row.size();
  std::vector<uint8_t> bytes(CombineRowBytes(format, dim) + 1, 0xA5);
  EncodeCombineRow(format, row.data(), dim, bytes.data());
  EXPECT_EQ(bytes.back(), 0xA5) << "wrote past the row";
  std::vector<float> decoded(dim);
  DecodeCombineRow(format, bytes.data(), dim, decoded.data());
  return decoded;
}

// The largest error of an element of this block, from the format's definition.
float ErrorBound(RowFormat format, const std::vector<float>& row, int64_t element) {
  if (format == RowFormat::kFp32) return 0;
  if (format == RowFormat::kBf16) return std::fabs(row[element]) / 256;
  const int64_t block = format == RowFormat::kInt8 ? 128 : 32;
  const float max_code = format == RowFormat::kInt8 ? 127 : 7;
  const int64_t begin = element / block * block;
  float absmax = 0;
  for (int64_t i = begin; i < std::min<int64_t>(begin + block, row.size()); ++i) {
    absmax = std::max(absmax, std::fabs(row[i]));
  }
  // Half a step; the scale is at most one part in 128 above absmax / max_code.
  return absmax / max_code * (1 + 1.0f / 128) * 0.50001f;
}

TEST(CodecTest, NamesRoundTrip) {
  for (RowFormat format : kFormats) {
    EXPECT_EQ(ParseRowFormat(RowFormatName(format)).value(), format);
  }
  const absl::Status unknown = ParseRowFormat("fp16").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.message().find("fp32, bf16, int8 or int4"), absl::string_view::npos);
}

TEST(CodecTest, SizesAreThoseOfTheTable) {
  EXPECT_EQ(CodeBytes(RowFormat::kFp32, 101), 404);
  EXPECT_EQ(CodeBytes(RowFormat::kBf16, 101), 202);
  EXPECT_EQ(CodeBytes(RowFormat::kInt8, 101), 101);
  EXPECT_EQ(CodeBytes(RowFormat::kInt4, 101), 51);
  EXPECT_EQ(CombineRowBytes(RowFormat::kFp32, 7168), 28672);
  EXPECT_EQ(CombineRowBytes(RowFormat::kBf16, 7168), 14336);
  EXPECT_EQ(CombineRowBytes(RowFormat::kInt8, 7168), 7168 + 2 * 56);
  EXPECT_EQ(CombineRowBytes(RowFormat::kInt4, 7168), 3584 + 2 * 224);
  EXPECT_EQ(CombineRowBytes(RowFormat::kInt8, 129), 129 + 2 * 2);
  EXPECT_EQ(CombineRowBytes(RowFormat::kInt4, 33), 17 + 2 * 2);
}

TEST(CodecTest, Int4CodesSurvivePacking) {
  for (int64_t dim : kDims) {
    std::mt19937 random(dim);
    std::vector<int8_t> codes(dim), unpacked(dim);
    for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random() % 16) - 8);
    std::vector<uint8_t> packed(CodeBytes(RowFormat::kInt4, dim) + 1, 0xA5);
    PackInt4(codes.data(), dim, packed.data());
    EXPECT_EQ(packed.back(), 0xA5);
    UnpackInt4(packed.data(), dim, unpacked.data());
    EXPECT_EQ(unpacked, codes) << dim;
  }
  const int8_t two[] = {-8, 7};
  uint8_t byte;
  PackInt4(two, 2, &byte);
  EXPECT_EQ(byte, 0x78);  // low nibble first
}

TEST(CodecTest, Bf16RoundsHalfToEven) {
  const float inf = std::numeric_limits<float>::infinity();
  const struct {
    float in, out;
  } cases[] = {{1.0f, 1.0f},
               {1.0f + 1.0f / 256, 1.0f},               // a tie, to the even below
               {1.0f + 3.0f / 256, 1.0f + 4.0f / 256},  // a tie, to the even above
               {1.0f + 1.1f / 256, 1.0f + 2.0f / 256},
               {-0.0f, -0.0f},
               {std::numeric_limits<float>::max(), inf},
               {-inf, -inf}};
  for (const auto& c : cases) {
    const float out = RoundTrip(RowFormat::kBf16, {c.in})[0];
    EXPECT_EQ(out, c.out);
    EXPECT_EQ(std::signbit(out), std::signbit(c.out));
  }
  const uint32_t nan_bits = 0x7F800001;  // whose top half alone would be infinity
  float nan;
  std::memcpy(&nan, &nan_bits, 4);
  EXPECT_TRUE(std::isnan(RoundTrip(RowFormat::kBf16, {nan})[0]));
}

TEST(CodecTest, ErrorsStayWithinTheBound) {
  for (RowFormat format : kFormats) {
    for (int64_t dim : kDims) {
      const std::vector<float> row = RandomRow(dim, dim);
      const std::vector<float> decoded = RoundTrip(format, row);
      for (int64_t i = 0; i < dim; ++i) {
        ASSERT_LE(std::fabs(decoded[i] - row[i]), ErrorBound(format, row, i))
            << RowFormatName(format) << " dim " << dim << " element " << i;
      }
      EXPECT_EQ(RoundTrip(format, row), decoded);
    }
  }
}

TEST(CodecTest, ScalesAreTheLeastBf16ThatCoversTheLargestElement) {
  for (RowFormat format : {RowFormat::kInt8, RowFormat::kInt4}) {
    for (int i = 0; i < 2000; ++i) {
      const float x = 1 + static_cast<float>(i) / 2000;
      const float exact = x / (format == RowFormat::kInt8 ? 127.0f : 7.0f);
      uint8_t bytes[3];
      EncodeCombineRow(format, &x, 1, bytes);
      uint16_t bits;
      std::memcpy(&bits, bytes, sizeof(bits));
      EXPECT_GE(std::bit_cast<float>(uint32_t{bits} << 16), exact);
      EXPECT_LT(std::bit_cast<float>((uint32_t{bits} - 1) << 16), exact);
      EXPECT_EQ(RoundTrip(format, {-x})[0], -RoundTrip(format, {x})[0]);
    }
  }
}

TEST(CodecTest, ZerosAndExtremes) {
  const float inf = std::numeric_limits<float>::infinity();
  const float tiny = std::numeric_limits<float>::denorm_min();
  const float huge = std::numeric_limits<float>::max() / 2;
  for (RowFormat format : {RowFormat::kInt8, RowFormat::kInt4}) {
    EXPECT_EQ(RoundTrip(format, std::vector<float>(200, 0.0f)), std::vector<float>(200, 0.0f));
    const float step = huge / (format == RowFormat::kInt8 ? 127 : 7);
    EXPECT_NEAR(RoundTrip(format, {huge})[0], huge, step);
    EXPECT_LE(std::fabs(RoundTrip(format, {tiny})[0]), 1e-36f);
    for (float bad : {inf, -inf, std::nanf("")}) {
      std::vector<float> row(130, 1.0f);
      row[3] = bad;
      const std::vector<float> decoded = RoundTrip(format, row);
      EXPECT_TRUE(std::isnan(decoded[3])) << "a broken value must not turn into a number";
      EXPECT_NEAR(decoded[129], 1.0f, 0.01f) << "another block is untouched";
    }
  }
}

}  // namespace
}  // namespace ternion::comm
