// Norms, quantization, activations and copies against plain code in double precision.
#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

struct Shape {
  int64_t rows;
  int64_t dim;
};
const Shape kShapes[] = {{1, 1},  {2, 15},  {3, 16},    {5, 17},
                         {1, 64}, {7, 100}, {40, 2049}, {1, 9000}};

std::vector<double> NormReference(const std::vector<float>& x, const std::vector<float>& weight,
                                  const Shape& shape, int64_t stride, double eps) {
  std::vector<double> out;
  for (int64_t r = 0; r < shape.rows; ++r) {
    double squares = 0;
    for (int64_t c = 0; c < shape.dim; ++c)
      squares += double{x[r * stride + c]} * x[r * stride + c];
    const double scale = 1.0 / std::sqrt(squares / static_cast<double>(shape.dim) + eps);
    for (int64_t c = 0; c < shape.dim; ++c) out.push_back(x[r * stride + c] * scale * weight[c]);
  }
  return out;
}

TEST(RmsNorm, MatchesFormula) {
  for (const Shape& shape : kShapes) {
    const std::vector<float> x = RandomFloats(shape.rows * shape.dim, 1, 3.0f);
    const std::vector<float> weight = RandomFloats(shape.dim, 2);
    const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      std::vector<float> result(x.size());
      kernels.rms_norm({x.data(), weight.data(), result.data(), shape.rows, shape.dim, shape.dim,
                        shape.dim, 1e-6f},
                       executor);
      return result;
    });
    ExpectNear(out, NormReference(x, weight, shape, shape.dim, 1e-6), 1e-5);
  }
}

TEST(RmsNorm, WorksInPlaceWithStride) {
  const Shape shape = {3, 21};
  const int64_t stride = 30;
  const std::vector<float> x = RandomFloats(shape.rows * stride, 3);
  const std::vector<float> weight = RandomFloats(shape.dim, 4);
  const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    std::vector<float> result = x;
    kernels.rms_norm(
        {result.data(), weight.data(), result.data(), shape.rows, shape.dim, stride, stride, 1e-5f},
        executor);
    return result;
  });
  const std::vector<double> expected = NormReference(x, weight, shape, stride, 1e-5);
  for (int64_t r = 0; r < shape.rows; ++r) {
    for (int64_t c = 0; c < stride; ++c) {
      const double want = c < shape.dim ? expected[r * shape.dim + c] : x[r * stride + c];
      ASSERT_NEAR(out[r * stride + c], want, 1e-5) << r << " " << c;
    }
  }
}

// Codes of the rows with their pads, then the sums, then the scales' bits, then the normed rows'
// bits.
std::vector<int32_t> RunQuantize(const Kernels& kernels, Executor& executor,
                                 const std::vector<float>& x, const float* weight, int64_t dim,
                                 int bits) {
  const int64_t rows = static_cast<int64_t>(x.size()) / dim;
  const int64_t stride = CodeStride(dim);
  std::vector<int8_t> codes(rows * stride, 99);
  std::vector<int32_t> sums(rows, -1);
  std::vector<float> scales(rows), normed(x.size());
  QuantizedRows out = {codes.data(), scales.data(), sums.data(), rows, dim, stride};
  kernels.quantize({x.data(), weight, normed.data(), out, dim, 1e-6f, bits}, executor);
  std::vector<int32_t> all(codes.begin(), codes.end());
  all.insert(all.end(), sums.begin(), sums.end());
  const auto append = [&](const std::vector<float>& values) {
    const size_t old_size = all.size();
    all.resize(old_size + values.size());
    std::memcpy(all.data() + old_size, values.data(), values.size() * sizeof(float));
  };
  append(scales);
  append(normed);
  return all;
}

float FloatAt(const std::vector<int32_t>& values, size_t i) {
  float value;
  std::memcpy(&value, &values[i], sizeof(value));
  return value;
}

// The rules of QuantizeArgs, one element at a time. The sum behind the mean is summed in 64 lanes.
void QuantizeReference(const float* x, int64_t dim, int bits, std::vector<int32_t>* codes,
                       float* scale) {
  float absmax = 1e-5f;
  float lanes[64] = {};
  for (int64_t c = 0; c < dim; ++c) {
    absmax = std::max(absmax, std::abs(x[c]));
    lanes[c % 64] += std::abs(x[c]);
  }
  for (int half = 32; half > 0; half /= 2) {
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  const float mean = lanes[0] / static_cast<float>(dim);
  *scale = bits == 8 ? absmax / 127.0f : mean / std::sqrt(7.0f);
  const float low = bits == 8 ? -128.0f : -8.0f;
  const float high = bits == 8 ? 127.0f : 7.0f;
  for (int64_t c = 0; c < dim; ++c) {
    const float scaled =
        bits == 8 ? x[c] * (127.0f / absmax) : std::sqrt(7.0f) * x[c] / (mean + 1e-5f);
    const float code = std::nearbyint(scaled);
    codes->push_back(static_cast<int32_t>(std::min(std::max(code, low), high)));
  }
}

void CheckQuantize(const std::vector<float>& x, int64_t dim, int bits) {
  const std::vector<int32_t> all = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    return RunQuantize(kernels, executor, x, nullptr, dim, bits);
  });
  const int64_t rows = static_cast<int64_t>(x.size()) / dim;
  const int64_t stride = CodeStride(dim);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<int32_t> codes;
    float scale;
    QuantizeReference(&x[r * dim], dim, bits, &codes, &scale);
    int32_t sum = 0;
    for (int64_t c = 0; c < stride; ++c) {
      ASSERT_EQ(all[r * stride + c], c < dim ? codes[c] : 0) << "row " << r << " column " << c;
      sum += all[r * stride + c];
    }
    ASSERT_EQ(all[rows * stride + r], sum) << "row " << r;
    ASSERT_EQ(FloatAt(all, rows * (stride + 1) + r), scale) << "row " << r;
    for (int64_t c = 0; c < dim; ++c) {
      ASSERT_EQ(FloatAt(all, rows * (stride + 2) + r * dim + c), x[r * dim + c]);
    }
  }
}

TEST(Quantize, MatchesRules) {
  for (const Shape& shape : kShapes) {
    for (int bits : {4, 8}) {
      SCOPED_TRACE(std::to_string(shape.dim) + " columns, int" + std::to_string(bits));
      CheckQuantize(RandomFloats(shape.rows * shape.dim, 5), shape.dim, bits);
    }
  }
}

TEST(Quantize, RoundsHalfToEven) {
  // absmax 127 makes the scale 1.
  CheckQuantize({127.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f, 0.49999997f, 126.5f, -126.5f}, 10,
                8);
}

TEST(Quantize, ZeroTinyAndHugeRows) {
  for (int bits : {4, 8}) {
    CheckQuantize(std::vector<float>(33, 0.0f), 33, bits);
    CheckQuantize(std::vector<float>(33, -0.0f), 33, bits);
    CheckQuantize(RandomFloats(33, 6, 1e-9f), 33, bits);
    CheckQuantize(RandomFloats(33, 7, 1e-41f), 33, bits);
    CheckQuantize(RandomFloats(33, 8, 1e36f), 33, bits);
  }
  std::vector<float> peak(65, 0.0f);
  peak[64] = -std::numeric_limits<float>::max();
  CheckQuantize(peak, 65, 8);
}

TEST(Quantize, BrokenRowsStayInRange) {
  const int64_t dim = 37;
  for (const std::vector<float>& poison : std::vector<std::vector<float>>{
           {kNan}, {kInfinity}, {-kInfinity, kNan}, {kInfinity, -kInfinity}}) {
    for (int bits : {4, 8}) {
      std::vector<float> x = RandomFloats(3 * dim, 9);
      for (size_t i = 0; i < poison.size(); ++i) x[dim + 5 + 20 * i] = poison[i];
      Executor executor = {&Threads(1)};
      const std::vector<int32_t> all = RunQuantize(Fastest(), executor, x, nullptr, dim, bits);
      const int64_t stride = CodeStride(dim);
      for (int64_t c = 0; c < 3 * stride; ++c) {
        ASSERT_GE(all[c], bits == 8 ? -128 : -8);
        ASSERT_LE(all[c], bits == 8 ? 127 : 7);
        if (c % stride >= dim) {
          ASSERT_EQ(all[c], 0) << "pad " << c;
        }
      }
      OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
        std::vector<int32_t> codes = RunQuantize(kernels, executor, x, nullptr, dim, bits);
        codes.resize(3 * stride);
        return codes;
      });
    }
  }
}

// Codes of rows whose top half is kept, with their sums.
std::vector<int32_t> RunTopHalf(const Kernels& kernels, Executor& executor,
                                const std::vector<float>& x, int64_t dim, const float* weight) {
  const int64_t rows = static_cast<int64_t>(x.size()) / dim, stride = CodeStride(dim);
  std::vector<int8_t> codes(rows * stride, 99);
  std::vector<int32_t> sums(rows);
  std::vector<float> scales(rows);
  kernels.quantize({.x = x.data(),
                    .weight = weight,
                    .out = {codes.data(), scales.data(), sums.data(), rows, dim, stride},
                    .x_stride = dim,
                    .eps = 1e-6f,
                    .top_half = true},
                   executor);
  std::vector<int32_t> all(codes.begin(), codes.end());
  all.insert(all.end(), sums.begin(), sums.end());
  for (float scale : scales) all.push_back(std::bit_cast<int32_t>(scale));
  return all;
}

void CheckTopHalf(const std::vector<float>& x, int64_t dim) {
  const std::vector<int32_t> all = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    return RunTopHalf(kernels, executor, x, dim, nullptr);
  });
  const int64_t rows = static_cast<int64_t>(x.size()) / dim, stride = CodeStride(dim);
  for (int64_t r = 0; r < rows; ++r) {
    std::vector<float> sorted;
    for (int64_t c = 0; c < dim; ++c) sorted.push_back(std::abs(x[r * dim + c]));
    std::sort(sorted.rbegin(), sorted.rend());
    const float least = sorted[dim - dim / 2 - 1];
    std::vector<int32_t> codes;
    float scale;
    QuantizeReference(&x[r * dim], dim, 8, &codes, &scale);
    int32_t sum = 0;
    for (int64_t c = 0; c < dim; ++c) {
      const int32_t want = std::abs(x[r * dim + c]) >= least ? codes[c] : 0;
      ASSERT_EQ(all[r * stride + c], want) << "row " << r << " column " << c;
      sum += want;
    }
    ASSERT_EQ(all[rows * stride + r], sum);
    ASSERT_EQ(std::bit_cast<float>(all[rows * (stride + 1) + r]), scale);
  }
}

TEST(Quantize, KeepsTheTopHalf) {
  for (const Shape& shape : kShapes) {
    SCOPED_TRACE(std::to_string(shape.dim) + " columns");
    CheckTopHalf(RandomFloats(shape.rows * shape.dim, 30), shape.dim);
    CheckTopHalf(RandomFloats(shape.rows * shape.dim, 31, 1e-9f), shape.dim);
    std::vector<float> ties = RandomFloats(shape.rows * shape.dim, 32, 1.5f);
    for (float& value : ties) value = std::nearbyint(value);  // many are equal, many 0
    CheckTopHalf(ties, shape.dim);
    CheckTopHalf(std::vector<float>(shape.dim, -2.5f), shape.dim);
    CheckTopHalf(std::vector<float>(shape.dim, 0.0f), shape.dim);
  }
}

TEST(Quantize, TopHalfLooksAtNormedRows) {
  const int64_t dim = 100;
  const std::vector<float> x = RandomFloats(3 * dim, 33), weight = RandomFloats(dim, 34);
  std::vector<float> normed(x.size());
  Executor executor = {&Threads(1)};
  Fastest().rms_norm({x.data(), weight.data(), normed.data(), 3, dim, dim, dim, 1e-6f}, executor);
  ExpectSameBits(RunTopHalf(Fastest(), executor, x, dim, weight.data()),
                 RunTopHalf(Fastest(), executor, normed, dim, nullptr));
}

TEST(Quantize, TopHalfOfBrokenRowsIsBounded) {
  for (const std::vector<float>& x :
       {std::vector<float>{kNan, 1.0f, 2.0f, 3.0f, 4.0f}, std::vector<float>(40, kNan)}) {
    OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      return RunTopHalf(kernels, executor, x, static_cast<int64_t>(x.size()), nullptr);
    });
  }
}

TEST(Quantize, NormsLikeRmsNorm) {
  for (const Shape& shape : kShapes) {
    const std::vector<float> x = RandomFloats(shape.rows * shape.dim, 10, 2.0f);
    const std::vector<float> weight = RandomFloats(shape.dim, 11);
    std::vector<float> normed(x.size());
    Executor executor = {&Threads(1)};
    Fastest().rms_norm({x.data(), weight.data(), normed.data(), shape.rows, shape.dim, shape.dim,
                        shape.dim, 1e-6f},
                       executor);
    for (int bits : {4, 8}) {
      const std::vector<int32_t> fused =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            return RunQuantize(kernels, executor, x, weight.data(), shape.dim, bits);
          });
      ExpectSameBits(fused, RunQuantize(Fastest(), executor, normed, nullptr, shape.dim, bits));
    }
  }
}

TEST(GatherRows, CopiesUnalignedRows) {
  const int64_t dim = 75, rows = 300, stride = CodeStride(dim);
  std::vector<int8_t> bytes(rows * (dim + 3));
  std::mt19937 random(12);
  for (int8_t& byte : bytes) byte = static_cast<int8_t>(random());
  std::vector<const int8_t*> sources;
  for (int64_t r = 0; r < rows; ++r) sources.push_back(&bytes[(rows - 1 - r) * (dim + 3) + 3]);
  const std::vector<float> scales = RandomFloats(rows, 13);
  OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
    std::vector<int8_t> codes(rows * stride, 99);
    std::vector<float> out_scales(rows);
    std::vector<int32_t> sums(rows);
    kernels.gather_rows({sources.data(),
                         scales.data(),
                         {codes.data(), out_scales.data(), sums.data(), rows, dim, stride}},
                        executor);
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t c = 0; c < dim; ++c) sum += sources[r][c];
      EXPECT_EQ(sums[r], sum);
      EXPECT_EQ(std::memcmp(&codes[r * stride], sources[r], dim), 0);
      for (int64_t c = dim; c < stride; ++c) EXPECT_EQ(codes[r * stride + c], 0);
    }
    ExpectSameBits(out_scales, scales);
    return codes;
  });
}

TEST(WeightedSum, AddsTermsInOrder) {
  for (int64_t dim : {1, 19, 32, 3000}) {
    const std::vector<int32_t> begin = {0, 3, 3, 4, 12, 13, 40};
    const int64_t rows = 6;
    const std::vector<float> data = RandomFloats(40 * dim, 14);
    const std::vector<float> weights = RandomFloats(40, 15);
    const std::vector<float> start = RandomFloats(rows * dim, 16);
    std::vector<const float*> terms;
    for (int64_t j = 0; j < 40; ++j) terms.push_back(&data[j * dim]);
    for (const bool accumulate : {false, true}) {
      for (const float* factors : {weights.data(), static_cast<const float*>(nullptr)}) {
        const std::vector<float> out =
            OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
              std::vector<float> result = start;
              kernels.weighted_sum(
                  {terms.data(), factors, begin.data(), result.data(), rows, dim, accumulate},
                  executor);
              return result;
            });
        std::vector<float> expected;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t c = 0; c < dim; ++c) {
            float sum = accumulate ? start[r * dim + c] : 0.0f;
            for (int32_t j = begin[r]; j < begin[r + 1]; ++j) {
              sum += factors == nullptr ? terms[j][c] : factors[j] * terms[j][c];
            }
            expected.push_back(sum);
          }
        }
        ExpectSameBits(out, expected);
      }
    }
  }
}

TEST(Embed, WidensRows) {
  for (int64_t dim : {1, 20, 48, 2500}) {
    const std::vector<uint16_t> narrow = RandomBf16(9 * dim, 17);
    std::vector<float> wide;
    for (uint16_t value : narrow) wide.push_back(FromBf16(value));
    std::vector<int32_t> ids;
    for (int i = 0; i < 40; ++i) ids.push_back(i * 7 % 9);
    std::vector<float> expected;
    for (int32_t id : ids) {
      expected.insert(expected.end(), wide.begin() + id * dim, wide.begin() + (id + 1) * dim);
    }
    for (const DenseMatrix& table : {DenseMatrix{narrow.data(), DenseType::kBf16, 9, dim},
                                     DenseMatrix{wide.data(), DenseType::kFp32, 9, dim}}) {
      const std::vector<float> out =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            std::vector<float> result(expected.size());
            kernels.embed({table, ids.data(), result.data(), 40}, executor);
            return result;
          });
      ExpectSameBits(out, expected);
    }
  }
}

double JoinReference(double x, double y, Join join) {
  if (join == Join::kAdd) return x + y;
  if (join == Join::kSiluTimes) return x / (1.0 + std::exp(-x)) * y;
  return x > 0 ? x * x * y : 0.0;
}

// x [rows, stride] joined with y, as quantize leaves it.
std::vector<float> Joined(const Kernels& kernels, Executor& executor, std::vector<float> x,
                          const std::vector<float>& y, int64_t rows, int64_t dim, int64_t stride,
                          Join join) {
  QuantizedBuffer codes(rows, dim);
  kernels.quantize({.x = x.data(),
                    .out = codes.rows(rows),
                    .x_stride = stride,
                    .join = join,
                    .y = y.data(),
                    .joined = x.data()},
                   executor);
  return x;
}
std::vector<float> JoinedRow(const Kernels& kernels, Executor& executor,
                             const std::vector<float>& x, const std::vector<float>& y, Join join) {
  const int64_t dim = static_cast<int64_t>(x.size());
  return Joined(kernels, executor, x, y, 1, dim, dim, join);
}

TEST(Join, MatchesFormula) {
  for (const Join join : {Join::kAdd, Join::kSiluTimes, Join::kRelu2Times}) {
    for (const Shape& shape : kShapes) {
      const int64_t stride = shape.dim + 3;
      std::vector<float> gate = RandomFloats(shape.rows * stride, 18, 8.0f);
      gate[0] = -95.0f;
      const std::vector<float> up = RandomFloats(gate.size(), 19);
      const std::vector<float> out =
          OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
            return Joined(kernels, executor, gate, up, shape.rows, shape.dim, stride, join);
          });
      for (size_t i = 0; i < out.size(); ++i) {
        const bool inside = static_cast<int64_t>(i) % stride < shape.dim;
        const double want = inside ? JoinReference(gate[i], up[i], join) : gate[i];
        ASSERT_NEAR(out[i], want, 1e-6 * (1e-30 + std::abs(want))) << gate[i];
      }
    }
  }
}

// silu(x) = x / (1 + e^-x) tells e^-x: its error is measured over the whole range of exponents.
TEST(Join, ExponentialIsAccurate) {
  std::vector<float> gate;
  for (float x = -87.0f; x < 100.0f; x += 0.0137f) gate.push_back(x);
  const std::vector<float> up(gate.size(), 1.0f);
  Executor executor = {&Threads(1)};
  const std::vector<float> out = JoinedRow(Fastest(), executor, gate, up, Join::kSiluTimes);
  double worst = 0;
  for (size_t i = 0; i < gate.size(); ++i) {
    const double want = JoinReference(gate[i], 1.0, Join::kSiluTimes);
    worst = std::max(worst, std::abs(out[i] - want) / std::abs(want));
  }
  EXPECT_LT(worst, 2.5e-7);  // 2^-23 = 1.2e-7: two units with those of the sum and the quotient
}

// up is not looked at where the gate is not above 0.
TEST(Join, Relu2IsPlusZeroWhateverUpHolds) {
  const std::vector<float> gate = {-1.0f, -0.0f, 0.0f, -kInfinity, -1e-45f, 1e-45f, 2.0f};
  for (const float up_value : {kNan, kInfinity, -kInfinity, -3.0f}) {
    const std::vector<float> up(gate.size(), up_value);
    const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      std::vector<float> result = JoinedRow(kernels, executor, gate, up, Join::kRelu2Times);
      for (int i = 0; i < 5; ++i) EXPECT_EQ(std::bit_cast<uint32_t>(result[i]), 0u) << i;
      for (float& value : result) value = std::isnan(value) ? kNan : value;  // of any sign
      return result;
    });
    if (!std::isnan(up_value)) {
      EXPECT_EQ(out.back(), 4.0f * up_value);
    }
  }
}

TEST(Join, NanShows) {
  const std::vector<float> gate = {kNan, 1.0f}, up = {1.0f, 1.0f};
  for (const Join join : {Join::kAdd, Join::kSiluTimes, Join::kRelu2Times}) {
    for (const char* isa : AvailableIsas()) {
      Executor executor = {&Threads(1)};
      const std::vector<float> out = JoinedRow(*SelectCpuKernels(isa), executor, gate, up, join);
      EXPECT_TRUE(std::isnan(out[0]));
      EXPECT_FALSE(std::isnan(out[1]));
    }
  }
}

TEST(Rope, MatchesFormula) {
  for (const int head_dim : {2, 20, 32, 72, 128}) {
    const int heads = 3, kv_heads = 2, max_positions = 50;
    const int64_t rows = 60, stride = heads * head_dim + 5, half = head_dim / 2;
    std::vector<float> cosines, sines;
    for (int p = 0; p < max_positions; ++p) {
      for (int d = 0; d < half; ++d) {
        const double angle = p * std::pow(10000.0, -2.0 * d / head_dim);
        cosines.push_back(static_cast<float>(std::cos(angle)));
        sines.push_back(static_cast<float>(std::sin(angle)));
      }
    }
    const std::vector<float> x = RandomFloats(rows * stride, 20);
    const std::vector<float> keys = RandomFloats(rows * stride, 21);
    const std::vector<float> norm = RandomFloats(head_dim, 22);
    std::vector<int32_t> positions;
    for (int r = 0; r < rows; ++r) positions.push_back(r * 17 % max_positions);
    const auto rope = [&](const Kernels& kernels, Executor& executor, const float* k_norm) {
      std::vector<float> result = x;
      result.insert(result.end(), keys.begin(), keys.end());
      kernels.rope({.q = {result.data(), nullptr, stride, heads},
                    .k = {result.data() + x.size(), k_norm, stride, kv_heads},
                    .positions = positions.data(),
                    .cos_table = cosines.data(),
                    .sin_table = sines.data(),
                    .num_rows = rows,
                    .head_dim = head_dim,
                    .eps = 1e-3f},
                   executor);
      return result;
    };
    const std::vector<float> out = OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
      return rope(kernels, executor, nullptr);
    });
    std::vector<double> expected(x.begin(), x.end());
    expected.insert(expected.end(), keys.begin(), keys.end());
    const auto turn = [&](double* heads_of_row, int count, int32_t position) {
      for (int h = 0; h < count; ++h) {
        for (int d = 0; d < half; ++d) {
          const double angle = position * std::pow(10000.0, -2.0 * d / head_dim);
          double& a = heads_of_row[h * head_dim + d];
          double& b = heads_of_row[h * head_dim + d + half];
          const double turned = a * std::cos(angle) - b * std::sin(angle);
          b = b * std::cos(angle) + a * std::sin(angle);
          a = turned;
        }
      }
    };
    for (int64_t r = 0; r < rows; ++r) {
      turn(&expected[r * stride], heads, positions[r]);
      turn(&expected[(rows + r) * stride], kv_heads, positions[r]);
    }
    ExpectNear(out, expected, 1e-6);
    // With a norm, the bits of rms_norm first.
    const std::vector<float> normed =
        OnEveryVariant([&](const Kernels& kernels, Executor& executor) {
          return rope(kernels, executor, norm.data());
        });
    Executor executor = {&Threads(1)};
    std::vector<float> by_hand = keys;
    for (int64_t r = 0; r < rows; ++r) {
      float* const row = &by_hand[r * stride];
      Fastest().rms_norm({row, norm.data(), row, kv_heads, head_dim, head_dim, head_dim, 1e-3f},
                         executor);
    }
    Fastest().rope({.k = {by_hand.data(), nullptr, stride, kv_heads},
                    .positions = positions.data(),
                    .cos_table = cosines.data(),
                    .sin_table = sines.data(),
                    .num_rows = rows,
                    .head_dim = head_dim},
                   executor);
    const std::vector<float> keys_out(normed.begin() + static_cast<int64_t>(x.size()),
                                      normed.end());
    ExpectSameBits(keys_out, by_hand);
  }
}

}  // namespace
}  // namespace ternion::kernels
