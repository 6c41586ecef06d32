#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

constexpr RowFormat kFormats[] = {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8,
                                  RowFormat::kInt4};
constexpr RowFormat kBlockFormats[] = {RowFormat::kInt8, RowFormat::kInt4};
constexpr int64_t kDims[] = {1,   2,   15,  16,  17,   31,   32,   33,   47,  64,
                             100, 127, 128, 129, 2047, 2048, 2049, 4099, 7168};
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kTiny = std::numeric_limits<float>::denorm_min();
constexpr float kHuge = std::numeric_limits<float>::max();
constexpr uint8_t kGuard = 0xA5;

// ---- The format, in plain code.

int64_t BlockOf(RowFormat format) { return format == RowFormat::kInt8 ? 128 : 32; }
float LargestCode(RowFormat format) { return format == RowFormat::kInt8 ? 127.0f : 7.0f; }

// The nearer of the two bf16 around x; the even one when both are as near.
uint16_t NearestBf16(float x) {
  const uint16_t below = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
  if (std::isnan(x)) return static_cast<uint16_t>(below | 0x40);
  if (std::isinf(x) || FromBf16(below) == x) return below;
  const double step = std::fabs(double{FromBf16(below)} - FromBf16(below ^ 1));
  const double beyond = std::fabs(double{x} - FromBf16(below));
  if (beyond == step / 2) return static_cast<uint16_t>(below + below % 2);
  return static_cast<uint16_t>(beyond < step / 2 ? below : below + 1);
}

uint16_t LeastBf16Above(float x) {
  uint16_t bits = static_cast<uint16_t>(std::bit_cast<uint32_t>(x) >> 16);
  while (FromBf16(bits) < x) ++bits;
  return bits;
}

struct Block {
  uint16_t scale = 0;
  std::vector<int> codes;
};
Block QuantizeBlock(RowFormat format, const float* x, int64_t count) {
  Block block = {0, std::vector<int>(count)};
  float absmax = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) {
      block.scale = 0x7fc0;
      return block;
    }
    absmax = std::max(absmax, std::fabs(x[i]));
  }
  block.scale = LeastBf16Above(absmax / LargestCode(format));
  if (block.scale == 0) return block;
  for (int64_t i = 0; i < count; ++i) {
    block.codes[i] = static_cast<int>(std::nearbyint(x[i] / FromBf16(block.scale)));
  }
  return block;
}

void Append16(std::vector<uint8_t>* bytes, uint16_t value) {
  bytes->push_back(static_cast<uint8_t>(value & 255));
  bytes->push_back(static_cast<uint8_t>(value >> 8));
}

std::vector<uint8_t> PackNibbles(const std::vector<int>& codes) {
  std::vector<uint8_t> bytes((codes.size() + 1) / 2);
  for (size_t i = 0; i < codes.size(); ++i) bytes[i / 2] |= (codes[i] & 15) << 4 * (i % 2);
  return bytes;
}

std::vector<uint8_t> EncodeReference(RowFormat format, const float* x, int64_t dim) {
  std::vector<uint8_t> bytes;
  if (format == RowFormat::kFp32) {
    bytes.resize(4 * dim);
    std::memcpy(bytes.data(), x, bytes.size());
    return bytes;
  }
  if (format == RowFormat::kBf16) {
    for (int64_t i = 0; i < dim; ++i) Append16(&bytes, NearestBf16(x[i]));
    return bytes;
  }
  std::vector<int> codes;
  for (int64_t begin = 0; begin < dim; begin += BlockOf(format)) {
    const Block block = QuantizeBlock(format, x + begin, std::min(BlockOf(format), dim - begin));
    Append16(&bytes, block.scale);
    codes.insert(codes.end(), block.codes.begin(), block.codes.end());
  }
  const std::vector<uint8_t> packed = format == RowFormat::kInt4
                                          ? PackNibbles(codes)
                                          : std::vector<uint8_t>(codes.begin(), codes.end());
  bytes.insert(bytes.end(), packed.begin(), packed.end());
  return bytes;
}

std::vector<float> DecodeReference(RowFormat format, const uint8_t* bytes, int64_t dim) {
  std::vector<float> row(dim);
  const auto bf16_at = [&](int64_t i) {
    return FromBf16(static_cast<uint16_t>(bytes[2 * i] | bytes[2 * i + 1] << 8));
  };
  if (format == RowFormat::kFp32) std::memcpy(row.data(), bytes, 4 * dim);
  if (format == RowFormat::kBf16) {
    for (int64_t i = 0; i < dim; ++i) row[i] = bf16_at(i);
  }
  if (format == RowFormat::kFp32 || format == RowFormat::kBf16) return row;
  const uint8_t* codes = bytes + 2 * ((dim + BlockOf(format) - 1) / BlockOf(format));
  for (int64_t i = 0; i < dim; ++i) {
    const int nibble = codes[i / 2] >> 4 * (i % 2) & 15;
    const int code =
        format == RowFormat::kInt4 ? nibble - nibble / 8 * 16 : static_cast<int8_t>(codes[i]);
    row[i] = static_cast<float>(code) * bf16_at(i / BlockOf(format));
  }
  return row;
}

// ---- The ops.

// Encodes rows of dim floats into memory that starts at an odd address and ends in a guard.
std::vector<uint8_t> Encode(const Kernels& kernels, Executor& executor, RowFormat format,
                            const std::vector<float>& x, int64_t dim) {
  const int64_t rows = static_cast<int64_t>(x.size()) / dim;
  const int64_t bytes = rows * EncodedRowBytes(format, dim);
  std::vector<uint8_t> out(bytes + 2, kGuard);
  kernels.encode_rows({x.data(), nullptr, out.data() + 1, rows, dim, dim, format}, executor);
  EXPECT_EQ(out.front(), kGuard);
  EXPECT_EQ(out.back(), kGuard);
  return {out.begin() + 1, out.end() - 1};
}

std::vector<float> Decode(const Kernels& kernels, Executor& executor, RowFormat format,
                          const std::vector<uint8_t>& bytes, int64_t dim) {
  const int64_t rows = static_cast<int64_t>(bytes.size()) / EncodedRowBytes(format, dim);
  std::vector<uint8_t> odd(bytes.size() + 1);
  std::copy(bytes.begin(), bytes.end(), odd.begin() + 1);
  std::vector<float> out(rows * dim);
  kernels.decode_rows({odd.data() + 1, out.data(), rows, dim, format}, executor);
  return out;
}

// Every variant encodes to the bytes of the reference; returns them.
std::vector<uint8_t> CheckEncode(RowFormat format, const std::vector<float>& x, int64_t dim) {
  const std::vector<uint8_t> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    return Encode(kernels, executor, format, x, dim);
  });
  std::vector<uint8_t> expected;
  for (size_t row = 0; row * dim < x.size(); ++row) {
    const std::vector<uint8_t> bytes = EncodeReference(format, &x[row * dim], dim);
    expected.insert(expected.end(), bytes.begin(), bytes.end());
  }
  ExpectSameBits(out, expected);
  return out;
}

std::vector<float> RoundTrip(RowFormat format, const std::vector<float>& row) {
  const int64_t dim = static_cast<int64_t>(row.size());
  Executor executor = {&Threads(1)};
  return Decode(Fastest(), executor, format, Encode(Fastest(), executor, format, row, dim), dim);
}

// Magnitudes from 2^-20 to 2^20 in one row, so that blocks differ.
std::vector<float> MixedFloats(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<float> values = RandomFloats(count, seed);
  for (float& value : values) value = std::ldexp(value, static_cast<int>(random() % 41) - 20);
  return values;
}

TEST(RowCodec, SizesAreThoseOfTheTable) {
  EXPECT_EQ(CodeBytes(RowFormat::kFp32, 101), 404);
  EXPECT_EQ(CodeBytes(RowFormat::kBf16, 101), 202);
  EXPECT_EQ(CodeBytes(RowFormat::kInt8, 101), 101);
  EXPECT_EQ(CodeBytes(RowFormat::kInt4, 101), 51);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kFp32, 7168), 28672);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kBf16, 7168), 14336);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kInt8, 7168), 7168 + 2 * 56);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kInt4, 7168), 3584 + 2 * 224);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kInt8, 129), 129 + 2 * 2);
  EXPECT_EQ(EncodedRowBytes(RowFormat::kInt4, 33), 17 + 2 * 2);
}

TEST(EncodeRows, MatchesReference) {
  for (const RowFormat format : kFormats) {
    for (const int64_t dim : kDims) {
      SCOPED_TRACE("format " + std::to_string(static_cast<int>(format)) + " dim " +
                   std::to_string(dim));
      const int64_t rows = dim < 200 ? 300 : 7;  // enough to be split over threads
      CheckEncode(format, MixedFloats(rows * dim, dim), dim);
    }
  }
}

TEST(EncodeRows, TakesChosenRowsOfAnyStride) {
  const int64_t dim = 133, stride = 140;
  const std::vector<float> x = MixedFloats(50 * stride, 1);
  std::vector<int32_t> rows;
  for (int32_t i = 0; i < 90; ++i) rows.push_back(i * 17 % 50);
  for (const RowFormat format : kFormats) {
    const int64_t row_bytes = EncodedRowBytes(format, dim);
    const std::vector<uint8_t> out =
        OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
          std::vector<uint8_t> bytes(rows.size() * row_bytes);
          kernels.encode_rows({x.data(), rows.data(), bytes.data(),
                               static_cast<int64_t>(rows.size()), dim, stride, format},
                              executor);
          return bytes;
        });
    for (size_t i = 0; i < rows.size(); ++i) {
      ExpectSameBits(
          std::vector<uint8_t>(out.begin() + i * row_bytes, out.begin() + (i + 1) * row_bytes),
          EncodeReference(format, &x[rows[i] * stride], dim));
    }
  }
}

// Blocks whose scale is `scale` and whose other elements are middles of two codes, and the floats
// next to them.
std::vector<float> AroundTies(RowFormat format, float scale) {
  std::vector<float> values;
  for (float code = 0.5f; code < LargestCode(format); ++code) {
    for (const float direction : {0.0f, kInfinity}) {
      float value = code * scale;
      for (int step = 0; step < 4; ++step, value = std::nextafter(value, direction)) {
        if (values.size() % BlockOf(format) == 0) values.push_back(LargestCode(format) * scale);
        values.push_back(values.size() % 2 == 0 ? value : -value);
      }
    }
  }
  return values;
}

TEST(EncodeRows, RoundsTiesAndTheirNeighboursLikeTheQuotient) {
  for (const RowFormat format : kBlockFormats) {
    for (const int exponent : {-126, -120, -101, -100, -99, -20, 0, 1, 60, 117}) {
      for (int mantissa = 128; mantissa < 256; ++mantissa) {
        const float scale = std::ldexp(static_cast<float>(mantissa), exponent - 7);
        const std::vector<float> x = AroundTies(format, scale);
        const int64_t dim = static_cast<int64_t>(x.size());
        std::vector<uint8_t> expected = EncodeReference(format, x.data(), dim);
        uint16_t bits;
        std::memcpy(&bits, expected.data(), sizeof(bits));
        ASSERT_EQ(FromBf16(bits), scale);
        for (const char* isa : AvailableIsas()) {
          Executor executor = {&Threads(1)};
          ASSERT_EQ(Encode(*SelectCpuKernels(isa), executor, format, x, dim), expected)
              << isa << " scale " << scale;
        }
      }
    }
  }
}

TEST(EncodeRows, Bf16RoundsHalfToEven) {
  const struct {
    float in, out;
  } cases[] = {{1.0f, 1.0f},
               {1.0f + 1.0f / 256, 1.0f},               // a tie, to the even below
               {1.0f + 3.0f / 256, 1.0f + 4.0f / 256},  // a tie, to the even above
               {1.0f + 1.1f / 256, 1.0f + 2.0f / 256},
               {-0.0f, -0.0f},
               {kHuge, kInfinity},
               {-kInfinity, -kInfinity}};
  for (const auto& c : cases) {
    ExpectSameBits(RoundTrip(RowFormat::kBf16, {c.in}), std::vector<float>{c.out});
  }
}

TEST(EncodeRows, Bf16KeepsEveryKindOfFloat) {
  std::mt19937 random(2);
  std::vector<float> x;
  for (int i = 0; i < 65536; ++i) {  // every upper half, over lower halves near the tie and others
    for (const uint32_t low :
         {0u, 1u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu, static_cast<uint32_t>(random() % 65536)}) {
      x.push_back(std::bit_cast<float>(static_cast<uint32_t>(i) << 16 | low));
    }
  }
  CheckEncode(RowFormat::kBf16, x, static_cast<int64_t>(x.size()));
}

TEST(EncodeRows, ScalesAreTheLeastBf16ThatCoversTheLargestElement) {
  for (const RowFormat format : kBlockFormats) {
    std::vector<float> x;
    for (int i = 0; i < 2000; ++i) x.push_back(1 + static_cast<float>(i) / 2000);
    const std::vector<uint8_t> out = CheckEncode(format, x, 1);
    for (size_t i = 0; i < x.size(); ++i) {
      uint16_t bits;
      std::memcpy(&bits, &out[3 * i], sizeof(bits));
      EXPECT_GE(FromBf16(bits), x[i] / LargestCode(format));
      EXPECT_LT(FromBf16(bits - 1), x[i] / LargestCode(format));
    }
  }
}

TEST(EncodeRows, ZerosAndExtremes) {
  for (const RowFormat format : kBlockFormats) {
    for (const float value : {0.0f, -0.0f, kTiny, 64 * kTiny, 1e-40f, 1e-36f, 1e-30f, kHuge}) {
      for (const int64_t dim : {1, 31, 128, 130, 4200}) {
        std::vector<float> row(dim, value);
        CheckEncode(format, row, dim);
        for (int64_t i = 0; i < dim; i += 3) row[i] = -value / 3;
        CheckEncode(format, row, dim);
      }
    }
    EXPECT_EQ(RoundTrip(format, std::vector<float>(200, 0.0f)), std::vector<float>(200, 0.0f));
    EXPECT_NEAR(RoundTrip(format, {kHuge / 2})[0], kHuge / 2, kHuge / 2 / LargestCode(format));
    EXPECT_LE(std::fabs(RoundTrip(format, {kTiny})[0]), 1e-36f);
  }
}

TEST(EncodeRows, ABrokenValueBreaksItsBlockAlone) {
  const float odd_nan = std::bit_cast<float>(0xff800001u);  // its upper half is infinity
  for (const RowFormat format : kBlockFormats) {
    for (const float bad : {kInfinity, -kInfinity, kNan, -kNan, odd_nan}) {
      for (const int64_t at : {0, 3, 15, 16, 31, 127, 140, 161}) {
        std::vector<float> row = RandomFloats(162, 3);
        row[at] = bad;
        CheckEncode(format, row, 162);
        const std::vector<float> decoded = RoundTrip(format, row);
        for (int64_t i = 0; i < 162; ++i) {
          EXPECT_EQ(std::isnan(decoded[i]), i / BlockOf(format) == at / BlockOf(format));
        }
      }
    }
  }
}

// The largest error of an element, from the format's definition.
float ErrorBound(RowFormat format, const std::vector<float>& row, int64_t element) {
  if (format == RowFormat::kFp32) return 0;
  if (format == RowFormat::kBf16) return std::fabs(row[element]) / 256;
  const int64_t begin = element / BlockOf(format) * BlockOf(format);
  const int64_t end = std::min<int64_t>(begin + BlockOf(format), row.size());
  float absmax = 0;
  for (int64_t i = begin; i < end; ++i) absmax = std::max(absmax, std::fabs(row[i]));
  // Half a step; the scale is at most one part in 128 above absmax / code.
  return absmax / LargestCode(format) * (1 + 1.0f / 128) * 0.50001f;
}

TEST(DecodeRows, ErrorsStayWithinTheBound) {
  for (const RowFormat format : kFormats) {
    for (const int64_t dim : kDims) {
      const std::vector<float> row = MixedFloats(dim, dim);
      const std::vector<float> decoded = RoundTrip(format, row);
      for (int64_t i = 0; i < dim; ++i) {
        ASSERT_LE(std::fabs(decoded[i] - row[i]), ErrorBound(format, row, i))
            << "format " << static_cast<int>(format) << " dim " << dim << " element " << i;
      }
    }
  }
}

// Bytes as a peer may send them: every code, and scales that are infinite, NaN or negative.
TEST(DecodeRows, MatchesReferenceOnAnyBytes) {
  std::mt19937 random(4);
  for (const RowFormat format : kFormats) {
    for (const int64_t dim : kDims) {
      const int64_t rows = dim < 200 ? 300 : 5, row_bytes = EncodedRowBytes(format, dim);
      std::vector<uint8_t> bytes(rows * row_bytes);
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
      const std::vector<float> out =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            std::vector<float> decoded = Decode(kernels, executor, format, bytes, dim);
            for (float& value : decoded) value = std::isnan(value) ? NAN : value;  // of any payload
            return decoded;
          });
      for (int64_t r = 0; r < rows; ++r) {
        const std::vector<float> expected = DecodeReference(format, &bytes[r * row_bytes], dim);
        for (int64_t i = 0; i < dim; ++i) {
          const float value = out[r * dim + i];
          ASSERT_TRUE(value == expected[i] || (std::isnan(value) && std::isnan(expected[i])))
              << value << " instead of " << expected[i];
        }
      }
    }
  }
}

TEST(AddRows, AddsDecodedTermsInOrder) {
  for (const int64_t dim : {1, 19, 33, 130, 3000}) {
    const std::vector<int32_t> begin = {0, 3, 3, 4, 12, 13, 40};
    const int64_t rows = 6;
    const std::vector<float> weights = RandomFloats(40, 5), start = RandomFloats(rows * dim, 6);
    std::vector<std::vector<uint8_t>> encoded;  // at any address but for fp32
    std::vector<RowTerm> terms;
    for (int j = 0; j < 40; ++j) {
      const RowFormat format = kFormats[j * 7 % 4];
      const int64_t shift = format == RowFormat::kFp32 ? 0 : j % 3;
      encoded.push_back(EncodeReference(format, RandomFloats(dim, 100 + j).data(), dim));
      encoded.back().insert(encoded.back().begin(), shift, kGuard);
      terms.push_back({encoded.back().data() + shift, format, j < 20 ? weights[j] : 1.0f});
    }
    const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      std::vector<float> result = start;
      kernels.add_rows({terms.data(), begin.data(), result.data(), rows, dim}, executor);
      return result;
    });
    std::vector<float> expected = start;
    for (int64_t r = 0; r < rows; ++r) {
      for (int32_t j = begin[r]; j < begin[r + 1]; ++j) {
        const std::vector<float> row =
            DecodeReference(terms[j].format, static_cast<const uint8_t*>(terms[j].row), dim);
        for (int64_t c = 0; c < dim; ++c) expected[r * dim + c] += terms[j].weight * row[c];
      }
    }
    ExpectSameBits(out, expected);
  }
}

// The rows of `chosen` (null: all), packed behind one guard and before another.
std::vector<uint8_t> Pack(RowFormat format, const std::vector<int8_t>& codes, int64_t dim,
                          int64_t stride, const std::vector<int32_t>* chosen) {
  const int64_t num_rows = chosen == nullptr ? codes.size() / stride : chosen->size();
  const int32_t* rows = chosen == nullptr ? nullptr : chosen->data();
  return OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    std::vector<uint8_t> packed(num_rows * CodeBytes(format, dim) + 2, kGuard);
    kernels.pack_codes({codes.data(), rows, packed.data() + 1, num_rows, dim, stride, format},
                       executor);
    EXPECT_EQ(packed.front(), kGuard);
    EXPECT_EQ(packed.back(), kGuard);
    return packed;
  });
}

std::vector<int8_t> RandomNibbles(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int8_t> codes(count);
  for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random() % 16) - 8);
  return codes;
}

TEST(PackCodes, MatchesReference) {
  std::vector<int32_t> chosen;
  for (int32_t i = 0; i < 200; ++i) chosen.push_back(i * 7 % 60);
  for (const int64_t dim : kDims) {
    const int64_t stride = dim + 5;
    const std::vector<int8_t> codes = RandomNibbles(60 * stride, dim);
    for (const std::vector<int32_t>* rows :
         {static_cast<std::vector<int32_t>*>(nullptr), &chosen}) {
      const std::vector<uint8_t> int4 = Pack(RowFormat::kInt4, codes, dim, stride, rows);
      const std::vector<uint8_t> int8 = Pack(RowFormat::kInt8, codes, dim, stride, rows);
      for (int64_t r = 0; r < (rows == nullptr ? 60 : 200); ++r) {
        const int8_t* row = &codes[(rows == nullptr ? r : chosen[r]) * stride];
        const std::vector<uint8_t> nibbles = PackNibbles(std::vector<int>(row, row + dim));
        ASSERT_TRUE(std::equal(nibbles.begin(), nibbles.end(), &int4[1 + r * nibbles.size()]));
        ASSERT_EQ(std::memcmp(&int8[1 + r * dim], row, dim), 0);
      }
    }
  }
  EXPECT_EQ(Pack(RowFormat::kInt4, {-8, 7}, 2, 2, nullptr)[1], 0x78);  // low nibble first
}

TEST(UnpackInt4, IsTheInverse) {
  for (const int64_t dim : kDims) {
    const int64_t rows = 60, stride = dim + 5;
    std::vector<int8_t> codes = RandomNibbles(rows * stride, dim);
    for (int64_t r = 0; r < rows; ++r) std::fill_n(&codes[r * stride + dim], 5, 99);
    const std::vector<uint8_t> packed = Pack(RowFormat::kInt4, codes, dim, stride, nullptr);
    const std::vector<int8_t> back =
        OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
          std::vector<int8_t> result(rows * stride, 99);  // which stays between rows
          kernels.unpack_int4({packed.data() + 1, result.data(), rows, dim, stride}, executor);
          return result;
        });
    ExpectSameBits(back, codes);
  }
}

}  // namespace
}  // namespace ternion::kernels
