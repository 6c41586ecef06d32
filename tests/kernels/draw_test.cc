// Ternary matrices drawn by a device, against what its host draws and packs.
#include <algorithm>
#include <thread>

#include "base/random.h"
#include "kernels/ternary_draw.h"
#include "tests/kernels/float_ops_support.h"

namespace ternion::kernels {
namespace {

TEST(TernaryDraw, EachWayToFillAByteOnce) {
  for (uint32_t i = 0; i < kTernaryBytes; ++i) {
    EXPECT_EQ(ByteOfChoice(i), i % 3 | i / 3 % 3 << 2 | i / 9 % 3 << 4 | i / 27 << 6);
  }
  EXPECT_EQ(TernaryChoice(0), 0u);
  EXPECT_EQ(TernaryChoice(~uint64_t{0}), kTernaryBytes - 1);
}

struct Drawn {
  uint64_t seed, first_draw;
  int64_t rows, columns;
  TernaryLayout layout;

  DrawTernaryArgs Args(uint8_t* codes) const {
    return {seed, first_draw, rows, columns, layout, codes};
  }
};

// The packed matrix, with bytes behind it.
constexpr int kGuardBytes = 64;
constexpr uint8_t kGuard = 0xa5;

std::vector<uint8_t> DrawByHand(const Drawn& drawn) {
  std::vector<uint8_t> packed(base::CeilDiv(drawn.rows, 4) * drawn.columns);
  for (size_t i = 0; i < packed.size(); ++i) {
    const uint64_t bits = base::RandomBits(drawn.seed, drawn.first_draw + i);
    packed[i] = ByteOfChoice(static_cast<uint32_t>((bits >> 32) * 81 >> 32));
  }
  OwnedTernaryMatrix matrix = MakeTernaryMatrix(drawn.rows, drawn.columns, 1, drawn.layout);
  EXPECT_TRUE(RepackHf(packed.data(), 0, drawn.rows, matrix));
  std::vector<uint8_t> bytes(matrix.codes.data(), matrix.codes.data() + matrix.view.bytes());
  bytes.resize(bytes.size() + kGuardBytes, kGuard);
  return bytes;
}

class DrawTernary : public testing::TestWithParam<TernaryLayout> {
 protected:
  void SetUp() override { ASSERT_NE(cuda_ = CudaVariant(executor_), nullptr); }

  std::vector<uint8_t> Room(const Drawn& drawn) const {
    return std::vector<uint8_t>(TernaryBytes(drawn.rows, drawn.columns, drawn.layout) + kGuardBytes,
                                kGuard);
  }

  Executor executor_;
  const Kernels* cuda_ = nullptr;
};
INSTANTIATE_TEST_SUITE_P(Layouts, DrawTernary,
                         testing::Values(TernaryLayout::kTiles, TernaryLayout::kTilesBase3),
                         [](const auto& info) {
                           return info.param == TernaryLayout::kTiles ? "Tiles" : "Base3";
                         });

TEST_P(DrawTernary, OddShapes) {
  const uint64_t seeds[] = {0, 7, uint64_t{1} << 53};
  const uint64_t first_draws[] = {0, 12345, (uint64_t{1} << 38) + 1};
  int shape = 0;
  for (const int64_t rows : {1, 3, 4, 5, 16, 17, 40, 64, 130}) {
    for (const int64_t columns : {1, 15, 64, 65, 127, 128, 129, 1100}) {
      const Drawn drawn = {seeds[shape % 3], first_draws[shape / 3 % 3], rows, columns, GetParam()};
      ++shape;
      SCOPED_TRACE(std::to_string(rows) + " x " + std::to_string(columns));
      std::vector<uint8_t> codes = Room(drawn);
      cuda_->draw_ternary(drawn.Args(codes.data()), executor_);
      ASSERT_EQ(cuda_->wait(executor_), nullptr);
      ExpectSameBits(codes, DrawByHand(drawn));
    }
  }
}

TEST_P(DrawTernary, SeveralThreadsAtATime) {
  constexpr int kThreads = 4, kMatrices = 20;
  std::vector<Drawn> drawn;
  std::vector<std::vector<uint8_t>> codes;
  for (int i = 0; i < kThreads * kMatrices; ++i) {
    drawn.push_back({3, 1000u * i, 20 + i, 90, GetParam()});
    codes.push_back(Room(drawn.back()));
  }
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] {
      for (int i = thread; i < kThreads * kMatrices; i += kThreads) {
        cuda_->draw_ternary(drawn[i].Args(codes[i].data()), executor_);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  ASSERT_EQ(cuda_->wait(executor_), nullptr);
  for (size_t i = 0; i < codes.size(); ++i) ExpectSameBits(codes[i], DrawByHand(drawn[i]));
}

}  // namespace
}  // namespace ternion::kernels
