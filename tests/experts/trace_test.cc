#include "experts/trace.h"

#include <algorithm>
#include <limits>
#include <string>
#include <vector>

#include "base/file.h"
#include "gtest/gtest.h"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::experts {
namespace {

using test::IsError;
using test::IsInvalid;

constexpr size_t kHeaderBytes = 48;

void ExpectValid(const RoutingTrace& trace, const TraceShape& shape) {
  ASSERT_EQ(trace.shape, shape);
  ASSERT_EQ(trace.ids.size(),
            static_cast<size_t>(shape.num_layers * shape.num_tokens * shape.top_k));
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const auto ids = trace.ExpertsOf(layer, token);
      for (size_t i = 1; i < ids.size(); ++i) ASSERT_LT(ids[i - 1], ids[i]);
      ASSERT_LT(ids.back(), shape.num_experts);
    }
  }
}

// How often each expert of a layer was taken, most first.
std::vector<int64_t> SortedLoads(const RoutingTrace& trace, int layer) {
  std::vector<int64_t> loads(trace.shape.num_experts, 0);
  for (int64_t token = 0; token < trace.shape.num_tokens; ++token) {
    for (uint16_t id : trace.ExpertsOf(layer, token)) ++loads[id];
  }
  std::sort(loads.rbegin(), loads.rend());
  return loads;
}

TEST(SyntheticTrace, OddShapesAreValid) {
  for (const TraceShape& shape : {TraceShape{1, 1, 1, 1}, TraceShape{3, 17, 5, 5},
                                  TraceShape{2, 40, 7, 6}, TraceShape{1, 9, 65536, 3}}) {
    for (double exponent : {0.0, 0.5, 1.0, 8.0}) {
      ExpectValid(*ZipfTrace(7, exponent, shape), shape);
    }
  }
}

TEST(SyntheticTrace, FollowsFromTheSeed) {
  const TraceShape shape{2, 50, 16, 4};
  EXPECT_EQ(UniformTrace(1, shape)->ids, UniformTrace(1, shape)->ids);
  EXPECT_NE(UniformTrace(1, shape)->ids, UniformTrace(2, shape)->ids);
  EXPECT_EQ(UniformTrace(1, shape)->ids, ZipfTrace(1, 0, shape)->ids);
  // Known values: traces are cited by hash, so they must not change.
  EXPECT_EQ(UniformTrace(1, shape)->Hash(), 7126188180940868781u);
  EXPECT_EQ(ZipfTrace(1, 1.2, shape)->Hash(), 15169624635123855597u);
}

TEST(SyntheticTrace, UniformTakesAllExpertsEquallyOften) {
  const RoutingTrace trace = *UniformTrace(3, {2, 20000, 10, 3});
  for (int layer = 0; layer < 2; ++layer) {
    for (int64_t load : SortedLoads(trace, layer)) EXPECT_NEAR(load, 6000, 300);  // 4.6 sigma
  }
}

TEST(SyntheticTrace, ZipfWeightsAreInverseRanks) {
  const RoutingTrace trace = *ZipfTrace(3, 1, {1, 60000, 4, 1});
  const std::vector<int64_t> loads = SortedLoads(trace, 0);
  const double total = 1 + 1 / 2.0 + 1 / 3.0 + 1 / 4.0;
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(loads[i], 60000 / (i + 1.0) / total, 500);
}

TEST(SyntheticTrace, DrawsWithoutReplacement) {
  // Two of three: the least popular is missing when the other two are drawn, in either order.
  const RoutingTrace trace = *ZipfTrace(5, 1, {1, 60000, 3, 2});
  const double w1 = 6 / 11.0, w2 = 3 / 11.0;
  const double missing = w1 * w2 / (1 - w1) + w2 * w1 / (1 - w2);
  EXPECT_NEAR(SortedLoads(trace, 0)[2], 60000 * (1 - missing), 600);
}

TEST(SyntheticTrace, LayersPreferDifferentExperts) {
  const RoutingTrace trace = *ZipfTrace(3, 3, {8, 1, 64, 1});
  std::vector<uint16_t> first = trace.ids;
  std::sort(first.begin(), first.end());
  EXPECT_GT(std::unique(first.begin(), first.end()) - first.begin(), 4);
}

TEST(SyntheticTrace, RefusesBadCounts) {
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {1, 0, 4, 2}).status(), "num_tokens is 0"));
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {0, 1, 4, 2}).status(), "num_layers is 0"));
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {1, 1, 65537, 2}).status(), "num_experts is 65537"));
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {1, 1, 4, 5}).status(), "top_k is 5"));
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {1, 1, 4, -1}).status(), "top_k"));
  EXPECT_TRUE(IsInvalid(UniformTrace(0, {1, -1, 4, 2}).status(), "num_tokens"));
  EXPECT_TRUE(IsInvalid(ZipfTrace(0, -0.1, {1, 1, 4, 2}).status(), "exponent"));
  EXPECT_TRUE(IsInvalid(ZipfTrace(0, 8.1, {1, 1, 4, 2}).status(), "exponent"));
  const double nan = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(IsInvalid(ZipfTrace(0, nan, {1, 1, 4, 2}).status(), "exponent"));
  EXPECT_TRUE(
      IsInvalid(UniformTrace(0, {1 << 20, INT32_MAX, 65536, 65536}).status(), "too many ids"));
}

TEST(Hash, DependsOnCountsAndIds) {
  const RoutingTrace trace = *UniformTrace(1, {2, 6, 9, 2});
  RoutingTrace other = trace;
  other.ids[0] ^= 1;
  EXPECT_NE(other.Hash(), trace.Hash());
  other = trace;
  other.shape = {6, 2, 9, 2};
  EXPECT_NE(other.Hash(), trace.Hash());
  other.shape = {2, 6, 10, 2};
  EXPECT_NE(other.Hash(), trace.Hash());
}

class TraceFile : public ::testing::Test {
 protected:
  TraceFile() : trace_(*ZipfTrace(11, 0.8, {3, 25, 12, 4})), path_(dir_.path("trace.bin")) {
    EXPECT_TRUE(SaveTrace(trace_, path_).ok());
    bytes_ = *base::ReadFile(path_);
  }

  // What loading says after `change` of the file's bytes.
  absl::Status AfterChange(size_t offset, const std::string& change) {
    std::string bytes = bytes_;
    bytes.replace(offset, change.size(), change);
    return LoadTrace(dir_.Write("changed.bin", bytes)).status();
  }
  // The same with a checksum that fits: what is left to find are the values.
  absl::Status AfterChangeOfId(size_t index, uint16_t id) {
    RoutingTrace changed = trace_;
    changed.ids[index] = id;
    EXPECT_TRUE(SaveTrace(changed, dir_.path("changed.bin")).ok());
    return LoadTrace(dir_.path("changed.bin")).status();
  }

  test::TempDir dir_;
  const RoutingTrace trace_;
  const std::string path_;
  std::string bytes_;
};

std::string Bytes(uint64_t value, int count) {
  return std::string(reinterpret_cast<const char*>(&value), count);
}

TEST_F(TraceFile, ComesBackAsItWas) {
  const auto loaded = LoadTrace(path_);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(loaded->shape, trace_.shape);
  EXPECT_EQ(loaded->ids, trace_.ids);
  EXPECT_EQ(dir_.num_entries(), 1);
}

TEST_F(TraceFile, LiesAsDocumented) {
  const std::string header = "TRNTRACE" + Bytes(1, 4) + Bytes(0, 4) + Bytes(3, 4) + Bytes(12, 4) +
                             Bytes(4, 4) + Bytes(0, 4) + Bytes(25, 8) + Bytes(trace_.Hash(), 8);
  EXPECT_EQ(bytes_.substr(0, kHeaderBytes), header);
  EXPECT_EQ(bytes_.size(), kHeaderBytes + 2 * 3 * 25 * 4);
  EXPECT_EQ(bytes_.substr(kHeaderBytes, 2), Bytes(trace_.ids[0], 2));
}

TEST_F(TraceFile, EveryFieldIsChecked) {
  EXPECT_TRUE(IsInvalid(AfterChange(0, "X"), "changed.bin: magic"));
  EXPECT_TRUE(IsInvalid(AfterChange(8, Bytes(2, 4)), "changed.bin: version is 2"));
  EXPECT_TRUE(IsInvalid(AfterChange(12, Bytes(1, 1)), "reserved"));
  EXPECT_TRUE(IsInvalid(AfterChange(28, Bytes(1, 1)), "reserved"));
  EXPECT_TRUE(IsInvalid(AfterChange(16, Bytes(0, 4)), "num_layers is 0"));
  EXPECT_TRUE(IsInvalid(AfterChange(16, Bytes(0xffffffff, 4)), "num_layers is 4294967295"));
  EXPECT_TRUE(IsInvalid(AfterChange(20, Bytes(65537, 4)), "num_experts is 65537"));
  EXPECT_TRUE(IsInvalid(AfterChange(24, Bytes(13, 4)), "top_k is 13"));
  EXPECT_TRUE(IsInvalid(AfterChange(24, Bytes(0, 4)), "top_k is 0"));
  EXPECT_TRUE(IsInvalid(AfterChange(32, Bytes(0, 8)), "num_tokens is 0"));
  EXPECT_TRUE(IsInvalid(AfterChange(32, Bytes(~0ull, 8)), "num_tokens is 18446744073709551615"));
  EXPECT_TRUE(IsInvalid(AfterChange(32, Bytes(24, 8)), "ids have 600 bytes instead of 576"));
  EXPECT_TRUE(IsError(AfterChange(20, Bytes(13, 4)), absl::StatusCode::kDataLoss, "checksum"));
  EXPECT_TRUE(IsError(AfterChange(kHeaderBytes + 5, Bytes(1, 1)), absl::StatusCode::kDataLoss,
                      "changed.bin: checksum"));
}

TEST_F(TraceFile, IdsAreChecked) {
  EXPECT_TRUE(IsInvalid(AfterChangeOfId(4 * 26 + 3, 12), "ids of layer 1, token 1"));
  EXPECT_TRUE(IsInvalid(AfterChangeOfId(1, trace_.ids[0]), "ids of layer 0, token 0"));
}

TEST_F(TraceFile, CutFilesAreRefused) {
  for (size_t size = 1; size < bytes_.size(); size += size < kHeaderBytes ? 1 : 37) {
    EXPECT_TRUE(IsInvalid(LoadTrace(dir_.Write("cut.bin", bytes_.substr(0, size))).status(),
                          size < kHeaderBytes ? "magic" : "ids have"));
  }
  EXPECT_TRUE(IsInvalid(LoadTrace(dir_.Write("long.bin", bytes_ + "x")).status(), "ids have"));
  EXPECT_TRUE(IsInvalid(LoadTrace(dir_.Write("empty.bin", "")).status(), "empty"));
  EXPECT_EQ(LoadTrace(dir_.path("missing.bin")).status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace ternion::experts
