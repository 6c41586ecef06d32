#include "kernels/ternary.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/limits.h"
#include "kernels/kernels.h"
#include "kernels/select.h"
#include "tests/kernels/cuda_variant.h"

namespace ternion::kernels {
namespace {

constexpr int64_t kOddRows[] = {1, 3, 15, 16, 17, 64, 1003};
constexpr int64_t kOddColumns[] = {1, 7, 16, 72, 130, 1000};

std::vector<int8_t> RandomTernary(int64_t count, std::mt19937& rng) {
  std::vector<int8_t> weights(count);
  for (int8_t& w : weights) w = static_cast<int8_t>(static_cast<int>(rng() % 3) - 1);
  return weights;
}

// So many rows or less skip lines that add nothing to any of them, in all variants.
constexpr int64_t kFewRows = 8;

// Those that the CPU multiplies, then all.
constexpr TernaryLayout kLayouts[] = {TernaryLayout::kPanels, TernaryLayout::kRows,
                                      TernaryLayout::kColumns};
constexpr TernaryLayout kAllLayouts[] = {TernaryLayout::kPanels, TernaryLayout::kRows,
                                         TernaryLayout::kColumns, TernaryLayout::kTiles,
                                         TernaryLayout::kTilesBase3};

OwnedTernaryMatrix Pack(const std::vector<int8_t>& weights, int64_t rows, int64_t columns,
                        float scale, TernaryLayout layout = TernaryLayout::kPanels) {
  OwnedTernaryMatrix matrix = MakeTernaryMatrix(rows, columns, scale, layout);
  PackTernary(weights.data(), 0, rows, matrix);
  return matrix;
}

std::vector<int8_t> Unpack(const TernaryMatrix& matrix) {
  std::vector<int8_t> weights(matrix.rows * matrix.columns);
  UnpackTernary(matrix, weights.data());
  return weights;
}

// The packing of Hugging Face, by its definition. Fields without an output row hold 0.
std::vector<uint8_t> PackHf(const std::vector<int8_t>& weights, int64_t rows, int64_t columns) {
  const int64_t packed_rows = base::CeilDiv(rows, 4);
  std::vector<uint8_t> packed(packed_rows * columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      packed[row % packed_rows * columns + column] |=
          static_cast<uint8_t>((weights[row * columns + column] + 1) << (row / packed_rows * 2));
    }
  }
  return packed;
}

TEST(Packing, LayoutIsAsDocumented) {
  std::vector<int8_t> weights(17 * 32, -1);
  weights[16 * 32 + 16 + 9] = 1;  // panel 1, its row 0; block 1, column 9 = 8 + 1: byte 1, bits 5 4
  const OwnedTernaryMatrix matrix = Pack(weights, 17, 32, 1.0f);
  ASSERT_EQ(matrix.view.bytes(), 2 * 2 * kBlockBytes);
  for (int64_t i = 0; i < matrix.view.bytes(); ++i) {
    EXPECT_EQ(matrix.view.codes[i], i == 3 * kBlockBytes + 1 ? 2 << 4 : 0) << i;
  }
}

TEST(Packing, LinesAreAsDocumented) {
  std::vector<int8_t> weights(17 * 300, -1);
  weights[16 * 300 + 16 + 9] = 1;
  const OwnedTernaryMatrix rows = Pack(weights, 17, 300, 1.0f, TernaryLayout::kRows);
  ASSERT_EQ(rows.view.bytes(), 32 * 2 * kLineBytes);
  for (int64_t i = 0; i < rows.view.bytes(); ++i) {  // line 16, granule 1, code 9 = 8 + 1
    EXPECT_EQ(rows.view.codes[i], i == 16 * 2 * kLineBytes + 4 + 1 ? 2 << 4 : 0) << i;
  }
  const OwnedTernaryMatrix columns = Pack(weights, 17, 300, 1.0f, TernaryLayout::kColumns);
  ASSERT_EQ(columns.view.bytes(), 304 * kLineBytes);
  for (int64_t i = 0; i < columns.view.bytes(); ++i) {  // line 25, granule 1, code 0
    EXPECT_EQ(columns.view.codes[i], i == 25 * kLineBytes + 4 ? 2 : 0) << i;
  }
}

TEST(Packing, TilesAreAsDocumented) {
  std::vector<int8_t> weights(32 * 128, -1);
  // Panel 1, its row 11 = g + 8 with g = 3; block 1, column 16 * 2 + 8 + 4 + 1: thread 4 * 3 + 2,
  // i = 1, byte 1, bits 7 6.
  weights[27 * 128 + 64 + 45] = 1;
  const OwnedTernaryMatrix matrix = Pack(weights, 32, 128, 1.0f, TernaryLayout::kTiles);
  ASSERT_EQ(matrix.view.bytes(), 4 * kTileBytes);
  for (int64_t i = 0; i < matrix.view.bytes(); ++i) {
    EXPECT_EQ(matrix.view.codes[i], i == 3 * kTileBytes + 8 * 14 + 4 + 1 ? 2 << 6 : 0) << i;
  }
}

// Panel 1, its row 11 = g + 8 with g = 3. A block's column 45 = 16 * 2 + 8 + 4 + 1, as above, is of
// thread 14, i = 1, f = 3, j = 1.
TEST(Packing, Base3IsAsDocumented) {
  const auto expect_single = [](int64_t column, int64_t byte, int value) {
    std::vector<int8_t> weights(32 * 256, -1);
    weights[27 * 256 + column] = 1;
    const OwnedTernaryMatrix matrix = Pack(weights, 32, 256, 1.0f, TernaryLayout::kTilesBase3);
    ASSERT_EQ(matrix.view.bytes(), 4 * 416);
    for (int64_t i = 0; i < matrix.view.bytes(); ++i) {
      const int v = i == 3 * 416 + byte ? value : 0;
      EXPECT_EQ(matrix.view.codes[i], (v * 256 + 242) / 243) << column << ", byte " << i;
    }
  };
  expect_single(128 + 45, 8 * 14 + 4 + 1, 2 * 9);         // operand 7 = 5 + 2 of half 0
  expect_single(128 + 41, 8 * 14 + 4 + 1, 2 * 81);        // operand 5
  expect_single(128 + 64 + 33, 8 * 14 + 4 + 1, 2 * 1);    // operand 9 = 5 + 4
  expect_single(128 + 64 + 41, 256 + 4 * 14 + 1, 2 * 3);  // operand 13 = 10 + 3
  expect_single(128 + 64 + 45, 384 + 14, 2 * 27);         // operand 15, its code 1
}

// The formulas of the device for all there is.
TEST(Packing, AllValuesOfTrits) {
  for (int v = 0; v < 243; ++v) {
    const uint32_t byte = PackTrits(static_cast<uint8_t>(v));
    for (int place = 0; place < 4; ++place) {
      const uint32_t others = 0xff00ff00u >> 8 * (place % 2);  // nothing carries over
      uint32_t codes[5];
      UnpackTrits((others & ~(0xffu << 8 * place)) | byte << 8 * place, codes);
      for (int n = 4, left = v; n >= 0; --n, left /= 3) {
        EXPECT_EQ(codes[n] >> 8 * place & 0xff, static_cast<uint32_t>(left % 3)) << v << ' ' << n;
      }
    }
    const uint32_t four[] = {v / 81u % 3, v / 27u % 3, v / 9u % 3, v / 3u % 3};
    EXPECT_EQ(UnpackFourTrits(byte), four[0] | four[1] << 8 | four[2] << 16 | four[3] << 24) << v;
  }
}

TEST(Packing, RoundTrip) {
  std::mt19937 rng(1);
  for (TernaryLayout layout : kAllLayouts) {
    for (int64_t rows : kOddRows) {
      for (int64_t columns : kOddColumns) {
        const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
        const OwnedTernaryMatrix matrix = Pack(weights, rows, columns, 0.5f, layout);
        EXPECT_EQ(Unpack(matrix.view), weights) << rows << " x " << columns;
        EXPECT_EQ(matrix.view.scale, 0.5f);
      }
    }
  }
}

TEST(Packing, RowRangesAreIndependent) {
  std::mt19937 rng(2);
  const int64_t rows = 53, columns = 40;
  const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
  const std::vector<uint8_t> packed = PackHf(weights, rows, columns);
  const int64_t bounds[] = {0, 2, 19, 32, 53};
  for (TernaryLayout layout : kAllLayouts) {
    OwnedTernaryMatrix from_int8 = MakeTernaryMatrix(rows, columns, 1, layout);
    OwnedTernaryMatrix from_hf = MakeTernaryMatrix(rows, columns, 1, layout);
    for (int i : {3, 0, 2, 1}) {
      PackTernary(&weights[bounds[i] * columns], bounds[i], bounds[i + 1], from_int8);
      EXPECT_TRUE(RepackHf(packed.data(), bounds[i], bounds[i + 1], from_hf));
    }
    EXPECT_EQ(Unpack(from_int8.view), weights);
    EXPECT_EQ(Unpack(from_hf.view), weights);
  }
}

TEST(Packing, FromHf) {
  std::mt19937 rng(3);
  for (TernaryLayout layout : kAllLayouts) {
    for (int64_t rows : kOddRows) {
      for (int64_t columns : kOddColumns) {
        const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
        const std::vector<uint8_t> packed = PackHf(weights, rows, columns);
        OwnedTernaryMatrix matrix = MakeTernaryMatrix(rows, columns, 1, layout);
        EXPECT_TRUE(RepackHf(packed.data(), 0, rows, matrix));
        EXPECT_EQ(Unpack(matrix.view), weights) << rows << " x " << columns;
        const OwnedTernaryMatrix direct = Pack(weights, rows, columns, 1, layout);
        EXPECT_TRUE(std::equal(matrix.view.codes, matrix.view.codes + matrix.view.bytes(),
                               direct.view.codes));
      }
    }
  }
}

TEST(Packing, FromHfRefusesCodeThree) {
  std::mt19937 rng(4);
  for (TernaryLayout layout : kAllLayouts) {
    for (int64_t rows : {3, 17, 64}) {
      const int64_t columns = 24, packed_rows = base::CeilDiv(rows, 4);
      const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t column = static_cast<int64_t>(rng() % columns);
        std::vector<uint8_t> packed = PackHf(weights, rows, columns);
        packed[row % packed_rows * columns + column] |=
            static_cast<uint8_t>(3 << (row / packed_rows * 2));
        OwnedTernaryMatrix matrix = MakeTernaryMatrix(rows, columns, 1, layout);
        EXPECT_FALSE(RepackHf(packed.data(), 0, rows, matrix)) << row;
      }
    }
  }
}

// What the padding fields of the last packed rows hold does not matter.
TEST(Packing, FromHfIgnoresFieldsWithoutRows) {
  std::mt19937 rng(5);
  const int64_t rows = 5, columns = 20;  // 2 packed rows, 8 fields
  const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
  std::vector<uint8_t> packed = PackHf(weights, rows, columns);
  for (int64_t c = 0; c < columns; ++c) {
    packed[c] |= 0xc0;
    packed[columns + c] |= 0xf0;
  }
  for (TernaryLayout layout : kAllLayouts) {
    OwnedTernaryMatrix matrix = MakeTernaryMatrix(rows, columns, 1, layout);
    EXPECT_TRUE(RepackHf(packed.data(), 0, rows, matrix));
    EXPECT_EQ(Unpack(matrix.view), weights);
  }
}

// Activations with sums and scales; codes are random, or all `constant`.
struct Rows {
  QuantizedBuffer buffer;
  QuantizedRows view;

  Rows(int64_t num_rows, int64_t dim, std::mt19937& rng, const int8_t* constant = nullptr)
      : buffer(std::max<int64_t>(num_rows, 1), dim), view(buffer.rows(num_rows)) {
    for (int64_t r = 0; r < num_rows; ++r) {
      view.scales[r] = 0.001f * static_cast<float>(1 + rng() % 1000);
      for (int64_t c = 0; c < dim; ++c) {
        const int8_t code = constant ? *constant : static_cast<int8_t>(rng());
        view.codes[r * view.stride + c] = code;
        view.sums[r] += code;
      }
    }
  }
};

// One group's weights and its outputs, with guards around what may be written.
struct Group {
  static constexpr float kGuard = -123.0f;

  OwnedTernaryMatrix matrix;
  std::vector<float> y;
  TernaryGroup group;

  Group(OwnedTernaryMatrix weights, int64_t row_begin, int64_t num_rows)
      : matrix(std::move(weights)) {
    const int64_t stride = matrix.view.rows + 3;
    y.assign(num_rows * stride + 1, kGuard);
    group = {matrix.view, row_begin, num_rows, y.data(), stride};
  }
};

std::vector<std::vector<float>> Product(const Kernels& kernels, Executor& executor,
                                        const QuantizedRows& x, std::vector<Group>& groups) {
  std::vector<TernaryGroup> views;
  for (Group& group : groups) {
    std::fill(group.y.begin(), group.y.end(), Group::kGuard);
    views.push_back(group.group);
  }
  kernels.ternary_matmul({x, views}, executor);
  std::vector<std::vector<float>> results;
  for (const Group& group : groups) results.push_back(group.y);
  return results;
}

std::vector<std::vector<float>> Product(const char* isa, const QuantizedRows& x,
                                        std::vector<Group>& groups, int num_threads) {
  base::ThreadPool threads(num_threads);
  Executor executor{.threads = &threads};
  return Product(*SelectCpuKernels(isa), executor, x, groups);
}

// What is told of matrices with codes 3 where nobody must look.
constexpr char kPoisoned[] = "poisoned";

// All variants and numbers of threads give what the scalar variant gives on one thread, bit for
// bit.
void ExpectAllEqual(const QuantizedRows& x, std::vector<Group>& groups, const std::string& what) {
  const auto expected = Product("scalar", x, groups, 1);
  for (const char* isa : AvailableIsas()) {
    for (int num_threads : {1, 2, 3, 4}) {
      const auto actual = Product(isa, x, groups, num_threads);
      for (size_t g = 0; g < groups.size(); ++g) {
        ASSERT_EQ(actual[g], expected[g])
            << isa << ", " << num_threads << " threads, group " << g << ": " << what;
      }
    }
  }
  Executor of_device;
  const Kernels* cuda = CudaVariant(of_device);
  if (cuda == nullptr) return;
  for (const TernaryLayout layout : {cuda->layout, TernaryLayout::kTilesBase3}) {
    // There is no way to write a code that is none.
    if (layout == TernaryLayout::kTilesBase3 && what == kPoisoned) continue;
    std::vector<Group> packed_anew;
    for (const Group& group : groups) {
      const TernaryMatrix& view = group.matrix.view;
      packed_anew.emplace_back(Pack(Unpack(view), view.rows, view.columns, view.scale, layout),
                               group.group.row_begin, group.group.num_rows);
    }
    ASSERT_EQ(Product(*cuda, of_device, x, packed_anew), expected)
        << "CUDA, layout " << static_cast<int>(layout) << ": " << what;
  }
}

// The scalar variant against the definition.
class ScalarMatmul : public testing::TestWithParam<TernaryLayout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, ScalarMatmul, testing::ValuesIn(kLayouts));

TEST_P(ScalarMatmul, IsRight) {
  std::mt19937 rng(6);
  const int64_t rows = 19, columns = 45;
  const std::vector<int8_t> weights = RandomTernary(rows * columns, rng);
  Rows x(3, columns, rng);
  std::vector<Group> groups;
  groups.emplace_back(Pack(weights, rows, columns, 0.25f, GetParam()), 1, 2);
  const std::vector<float> y = Product("scalar", x.view, groups, 1)[0];
  for (int64_t r = 0; r < 2; ++r) {
    for (int64_t o = 0; o < rows; ++o) {
      int dot = 0;
      for (int64_t c = 0; c < columns; ++c) {
        dot += weights[o * columns + c] * x.view.codes[(r + 1) * x.view.stride + c];
      }
      const float expected = static_cast<float>(dot) * (0.25f * x.view.scales[r + 1]);
      EXPECT_EQ(y[r * (rows + 3) + o], expected);
    }
    for (int64_t o = rows; o < rows + 3; ++o) EXPECT_EQ(y[r * (rows + 3) + o], Group::kGuard);
  }
}

class MatmulLayouts : public testing::TestWithParam<TernaryLayout> {};
INSTANTIATE_TEST_SUITE_P(Layouts, MatmulLayouts, testing::ValuesIn(kLayouts));

TEST_P(MatmulLayouts, VariantsAgreeOnOddShapes) {
  std::mt19937 rng(7);
  for (int64_t num_rows : {0, 1, 2, 3, 4, 5, 6, 7, 12, 13, 24, 25, 31, 49, 64, 100}) {
    for (int trial = 0; trial < 3; ++trial) {
      const int64_t rows = 1 + static_cast<int64_t>(rng() % 120);
      const int64_t columns = 1 + static_cast<int64_t>(rng() % 600);
      Rows x(num_rows, columns, rng);
      std::vector<Group> groups;
      groups.emplace_back(Pack(RandomTernary(rows * columns, rng), rows, columns, 0.7f, GetParam()),
                          0, num_rows);
      ExpectAllEqual(x.view, groups,
                     std::to_string(num_rows) + " x " + std::to_string(rows) + " x " +
                         std::to_string(columns));
    }
  }
}

// More rows and columns than one block of the tiled loops, and enough work for several threads.
TEST_P(MatmulLayouts, VariantsAgreeAcrossBlocks) {
  std::mt19937 rng(8);
  for (const auto& [num_rows, rows, columns] :
       {std::array<int64_t, 3>{241, 18, 2100}, {51, 33, 4200}, {3, 700, 2050}}) {
    Rows x(num_rows, columns, rng);
    std::vector<Group> groups;
    groups.emplace_back(Pack(RandomTernary(rows * columns, rng), rows, columns, 1.3f, GetParam()),
                        0, num_rows);
    ExpectAllEqual(x.view, groups, std::to_string(num_rows) + " rows");
  }
}

TEST(Matmul, VariantsAgreeOnGroups) {
  std::mt19937 rng(9);
  for (int trial = 0; trial < 6; ++trial) {
    const int64_t columns = 1 + static_cast<int64_t>(rng() % 300);
    const int64_t num_rows = 90;
    Rows x(num_rows, columns, rng);
    std::vector<Group> groups;
    for (int g = 0; g < 9; ++g) {  // rows of groups overlap; some groups are empty
      const int64_t count = static_cast<int64_t>(g % 3 == 1 ? 0 : rng() % 70);
      const int64_t begin = static_cast<int64_t>(rng() % (num_rows - count + 1));
      const int64_t rows = 1 + static_cast<int64_t>(rng() % 100);
      groups.emplace_back(
          Pack(RandomTernary(rows * columns, rng), rows, columns, 0.1f, kLayouts[g / 3]), begin,
          count);
    }
    ExpectAllEqual(x.view, groups, "trial " + std::to_string(trial));
  }
}

// More threads than a matrix has lines of columns: they share lines.
TEST(Matmul, ThreadsShareLines) {
  std::mt19937 rng(15);
  for (int64_t num_rows : {1, 3, 8, 9, 60}) {
    const int64_t rows = 1000, columns = 1500;
    Rows x(num_rows, columns, rng);
    std::vector<Group> groups;
    groups.emplace_back(
        Pack(RandomTernary(rows * columns, rng), rows, columns, 1, TernaryLayout::kColumns), 0,
        num_rows);
    const auto expected = Product("scalar", x.view, groups, 1);
    for (const char* isa : AvailableIsas()) {
      for (int num_threads : {5, 16}) {
        EXPECT_EQ(Product(isa, x.view, groups, num_threads), expected) << isa << num_threads;
      }
    }
  }
}

TEST(Matmul, NoGroupsAtAll) {
  std::mt19937 rng(10);
  Rows x(1, 16, rng);
  std::vector<Group> groups;
  ExpectAllEqual(x.view, groups, "no groups");
}

// The largest sums there can be, up to the largest number of columns.
TEST_P(MatmulLayouts, ExtremeCodesDoNotOverflow) {
  std::mt19937 rng(11);
  for (int8_t code : {int8_t{-128}, int8_t{127}}) {
    for (int64_t columns : {int64_t{2048}, int64_t{2064}, kMaxColumns}) {
      for (int8_t weight : {int8_t{-1}, int8_t{1}}) {
        for (int64_t num_rows : {1, 5, 12, 13, 50}) {
          const int64_t rows = columns == kMaxColumns ? 2 : 17;
          Rows x(num_rows, columns, rng, &code);
          std::vector<Group> groups;
          groups.emplace_back(
              Pack(std::vector<int8_t>(rows * columns, weight), rows, columns, 1, GetParam()), 0,
              num_rows);
          const std::vector<float> gate(groups[0].y.size(), 1.0f);
          groups[0].group.gate = gate.data();
          for (const char* isa : AvailableIsas()) {
            const std::vector<float> y = Product(isa, x.view, groups, 1)[0];
            for (int64_t r = 0; r < num_rows; ++r) {
              const float expected =
                  static_cast<float>(weight * code * columns) * (1.0f * x.view.scales[r]);
              for (int64_t o = 0; o < rows; ++o) ASSERT_EQ(y[r * (rows + 3) + o], expected) << isa;
            }
          }
        }
      }
    }
  }
}

enum class Live { kNone, kFew, kMost, kApart };  // apart: few in each row, others in the next

// Whether each of `count` things is live.
std::vector<bool> RandomLive(int64_t count, Live live, std::mt19937& rng) {
  std::vector<bool> mask(count);
  for (int64_t i = 0; i < count; ++i) {
    mask[i] = live == Live::kApart || (live == Live::kMost  ? rng() % 8 != 0
                                       : live == Live::kFew ? rng() % 8 == 0
                                                            : false);
  }
  return mask;
}

// Whether one of them is live in a row.
bool LiveInRow(bool in_some, Live live, std::mt19937& rng) {
  return in_some && (live == Live::kApart ? rng() % 8 == 0 : rng() % 4 != 0);
}

// Sets all codes in the line of `index` (an output of kRows, an input of kColumns) to 3.
void PoisonLine(OwnedTernaryMatrix& matrix, int64_t index) {
  const int64_t stride = matrix.view.stride_bytes();
  std::fill_n(matrix.codes.data() + index * stride, stride, 0xff);
}

struct SparseCase {
  int64_t num_rows, rows, columns;
  Live live;

  std::string Name() const {
    return std::to_string(num_rows) + " x " + std::to_string(rows) + " x " +
           std::to_string(columns) + ", live " + std::to_string(static_cast<int>(live));
  }
};

std::vector<SparseCase> SparseCases(std::mt19937& rng) {
  std::vector<SparseCase> cases = {{1, 700, 2600, Live::kFew},  // several stretches
                                   {2, 600, 2600, Live::kMost},   {13, 300, 1100, Live::kMost},
                                   {1, 9000, 40, Live::kMost},  // several chunks of outputs
                                   {3, 4096 + 5, 30, Live::kFew}, {41, 3001, 20, Live::kMost},
                                   {9, 300, 1100, Live::kApart},  {33, 70, 2000, Live::kApart}};
  for (int64_t num_rows = 1; num_rows <= 40; ++num_rows) {
    for (Live live : {Live::kFew, Live::kMost}) {
      cases.push_back({num_rows, 1 + static_cast<int64_t>(rng() % 400),
                       1 + static_cast<int64_t>(rng() % 400), live});
    }
  }
  for (int64_t num_rows : {49, 65, 70}) cases.push_back({num_rows, 300, 200, Live::kMost});
  for (int64_t num_rows : {1, 5, 20, 50}) cases.push_back({num_rows, 90, 100, Live::kNone});
  return cases;
}

// Inputs that are 0 in all rows, and in single rows, change nothing; neither does what the codes of
// the former are, where few rows let them be skipped.
TEST(Sparse, ColumnsOfZeros) {
  std::mt19937 rng(12);
  for (const SparseCase& c : SparseCases(rng)) {
    SCOPED_TRACE(c.Name());
    Rows x(c.num_rows, c.columns, rng);
    const std::vector<bool> live = RandomLive(c.columns, c.live, rng);
    for (int64_t r = 0; r < c.num_rows; ++r) {
      x.view.sums[r] = 0;
      for (int64_t k = 0; k < c.columns; ++k) {
        int8_t& code = x.view.codes[r * x.view.stride + k];
        if (!LiveInRow(live[k], c.live, rng)) code = 0;
        x.view.sums[r] += code;
      }
    }
    const std::vector<int8_t> weights = RandomTernary(c.rows * c.columns, rng);
    std::vector<Group> dense, sparse;
    dense.emplace_back(Pack(weights, c.rows, c.columns, 0.3f), 0, c.num_rows);
    sparse.emplace_back(Pack(weights, c.rows, c.columns, 0.3f, TernaryLayout::kColumns), 0,
                        c.num_rows);
    const auto expected = Product("scalar", x.view, dense, 1);
    EXPECT_EQ(Product("scalar", x.view, sparse, 1), expected);
    ExpectAllEqual(x.view, sparse, "clean");
    if (c.num_rows > kFewRows) continue;
    for (int64_t k = 0; k < c.columns; ++k) {
      if (!live[k]) PoisonLine(sparse[0].matrix, k);
    }
    EXPECT_EQ(Product("scalar", x.view, sparse, 1), expected);
    ExpectAllEqual(x.view, sparse, kPoisoned);
  }
}

// Where the gate is above 0 or NaN, outputs are right; nothing else is written but outputs; and
// with few rows those that are dead in all rows are not touched: the guards say so.
TEST(Sparse, GatedRows) {
  std::mt19937 rng(13);
  for (const SparseCase& c : SparseCases(rng)) {
    SCOPED_TRACE(c.Name());
    const Rows x(c.num_rows, c.columns, rng);
    const std::vector<int8_t> weights = RandomTernary(c.rows * c.columns, rng);
    std::vector<Group> dense, sparse;
    dense.emplace_back(Pack(weights, c.rows, c.columns, 0.3f), 0, c.num_rows);
    sparse.emplace_back(Pack(weights, c.rows, c.columns, 0.3f, TernaryLayout::kRows), 0,
                        c.num_rows);
    const std::vector<bool> live = RandomLive(c.rows, c.live, rng);
    const int64_t stride = sparse[0].group.y_stride;
    std::vector<float> gate(c.num_rows * stride, 1.0f);
    for (int64_t i = 0; i < static_cast<int64_t>(gate.size()); ++i) {
      const int64_t o = i % stride;
      const float dead[] = {0.0f, -0.0f, -1.0f, -std::numeric_limits<float>::infinity()};
      const float alive[] = {1e-45f, 2.0f, std::numeric_limits<float>::quiet_NaN()};
      if (o < c.rows)
        gate[i] = LiveInRow(live[o], c.live, rng) ? alive[rng() % 3] : dead[rng() % 4];
    }
    const std::vector<float> expected = Product("scalar", x.view, dense, 1)[0];
    if (c.num_rows <= kFewRows) {
      for (int64_t o = 0; o < c.rows; ++o) {
        if (!live[o]) PoisonLine(sparse[0].matrix, o);
      }
    }
    sparse[0].group.gate = gate.data();
    for (const char* isa : AvailableIsas()) {
      for (int num_threads : {1, 3}) {
        const std::vector<float> y = Product(isa, x.view, sparse, num_threads)[0];
        for (int64_t i = 0; i < static_cast<int64_t>(gate.size()); ++i) {
          const int64_t o = i % stride;
          if (o >= c.rows) {
            ASSERT_EQ(y[i], Group::kGuard) << isa << " wrote past the outputs, at " << i;
          } else if (!(gate[i] <= 0)) {
            ASSERT_EQ(y[i], expected[i]) << isa << ", output " << o;
          } else if (!live[o] && c.num_rows <= kFewRows) {
            ASSERT_EQ(y[i], Group::kGuard) << isa << " computed the dead output " << o;
          }
        }
      }
    }
  }
}

// Codes of lines that add nothing are not read: they lie on a page that must not be. Nor is
// anything past the matrix, however its outputs are split.
class DeadLines : public testing::TestWithParam<int64_t> {};
INSTANTIATE_TEST_SUITE_P(Rows, DeadLines, testing::Values(1, 2, 4, kFewRows));

TEST_P(DeadLines, AreNotRead) {
  const int64_t num_rows = GetParam();
  const int64_t page = sysconf(_SC_PAGESIZE);
  std::mt19937 rng(14);
  for (TernaryLayout layout : {TernaryLayout::kRows, TernaryLayout::kColumns}) {
    const bool by_rows = layout == TernaryLayout::kRows;
    const int64_t lines = 3 * page / kLineBytes;  // three pages of lines, those of the second dead
    const int64_t rows = by_rows ? lines : 250, columns = by_rows ? 250 : lines;
    const OwnedTernaryMatrix matrix =
        Pack(RandomTernary(rows * columns, rng), rows, columns, 1.0f, layout);
    ASSERT_EQ(matrix.view.bytes(), 3 * page);
    void* const memory =
        mmap(nullptr, 4 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT_NE(memory, MAP_FAILED);
    std::memcpy(memory, matrix.view.codes, 3 * page);
    for (int64_t i : {1, 3}) {
      ASSERT_EQ(mprotect(static_cast<uint8_t*>(memory) + i * page, page, PROT_NONE), 0);
    }

    Rows x(num_rows, columns, rng);
    std::vector<float> gate(num_rows * rows, 1.0f), y(num_rows * rows);
    for (int64_t r = 0; r < num_rows; ++r) {
      for (int64_t i = lines / 3; i < lines / 3 * 2; ++i) {
        if (by_rows) {
          gate[r * rows + i] = -1.0f;
        } else {
          x.view.codes[r * x.view.stride + i] = 0;
        }
      }
    }
    TernaryMatrix view = matrix.view;
    view.codes = static_cast<const uint8_t*>(memory);
    const TernaryGroup group[] = {
        {view, 0, num_rows, y.data(), rows, by_rows ? gate.data() : nullptr}};
    for (int num_threads : {1, 4}) {
      base::ThreadPool threads(num_threads);
      Executor executor{.threads = &threads};
      for (const char* isa : AvailableIsas()) {
        SelectCpuKernels(isa)->ternary_matmul({x.view, group}, executor);
      }
    }
    munmap(memory, 4 * page);
  }
}

TEST(Limits, AreMeasured) {
  base::ThreadPool threads(2);
  const base::Array<uint8_t> memory(1 << 16);
  EXPECT_GT(ReadBandwidth(memory.span(), threads), 0);
  EXPECT_EQ(DotPeak("scalar", threads), 0);
  for (const char* isa : AvailableIsas().subspan(1)) EXPECT_GT(DotPeak(isa, threads), 0) << isa;
}

}  // namespace
}  // namespace ternion::kernels
