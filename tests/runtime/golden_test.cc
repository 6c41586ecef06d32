// Whole models against the oracle's logits (tests/oracle), on every CPU variant.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "nlohmann/json.hpp"
#include "runtime/engine.h"
#include "tests/testing/npy.h"

namespace ternion::runtime {
namespace {

namespace fs = std::filesystem;

// The goldens sit away from rounding ties (tests/oracle/README.md), so that only fp32 summation
// order differs: observed is 6e-6, on logits of up to 20.
constexpr float kTolerance = 1e-3f;

std::vector<std::string> GoldenDirectories() {
  std::vector<std::string> directories;
  for (const auto& entry : fs::directory_iterator(TERNION_SOURCE_DIR "/tests/oracle/golden")) {
    if (fs::exists(entry.path() / "logits.npy")) directories.push_back(entry.path().string());
  }
  std::sort(directories.begin(), directories.end());
  return directories;
}

// The precision of the KV cache that run.json asks for; none where there is no such file.
absl::StatusOr<std::optional<kernels::KvFormat>> KvOfRun(const std::string& directory) {
  if (!fs::exists(directory + "/run.json")) return std::nullopt;
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(directory + "/run.json"));
  const std::string name = nlohmann::json::parse(text).value("kv", "");
  const std::optional<kernels::KvFormat> kv = kernels::ParseKvFormat(name);
  if (!kv) return absl::InvalidArgumentError(directory + "/run.json has no KV format: " + name);
  return kv;
}

// Logits [ids, vocab] of one scored sequence on one rank.
absl::StatusOr<std::vector<float>> RunModel(const std::string& directory,
                                            const std::vector<int32_t>& ids, const char* isa,
                                            int num_threads, int64_t max_rows) {
  const auto transport = std::move(comm::MakeLoopbackWorld(1)[0]);
  base::ThreadPool threads(num_threads);
  kernels::Executor executor{.threads = &threads};
  const RankResources resources = {transport.get(), kernels::SelectCpuKernels(isa), &executor};
  EngineOptions options;
  options.model_directory = directory;
  options.placement = "contiguous";
  options.max_rows = max_rows;
  options.kv_tokens = 256;
  TERNION_ASSIGN_OR_RETURN(options.kv, KvOfRun(directory));
  TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                           Engine::Create(options, resources, nullptr));
  std::vector<float> all;
  engine->set_logits_sink([&](SequenceId, int32_t, std::span<const float> logits) {
    all.insert(all.end(), logits.begin(), logits.end());
  });
  Request request;
  request.prompt = ids;
  request.score = true;
  TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
  while (!engine->idle()) TERNION_RETURN_IF_ERROR(engine->Step().status());
  return all;
}

bool SameBits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

TEST(Golden, ThereAreSome) { EXPECT_GE(GoldenDirectories().size(), 15u); }

class GoldenTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    const auto text = base::ReadFile(GetParam() + "/ids.json");
    ASSERT_TRUE(text.ok()) << text.status();
    ids_ = nlohmann::json::parse(*text).get<std::vector<int32_t>>();
    auto logits = test::ReadNpy(GetParam() + "/logits.npy");
    ASSERT_TRUE(logits.ok()) << logits.status();
    golden_ = *std::move(logits);
    ASSERT_EQ(golden_.rows, static_cast<int64_t>(ids_.size()));
    ASSERT_GT(golden_.values.size(), 0u);
  }

  std::vector<float> Logits(const char* isa, int num_threads, int64_t max_rows) const {
    const auto logits = RunModel(GetParam(), ids_, isa, num_threads, max_rows);
    EXPECT_TRUE(logits.ok()) << logits.status();
    return logits.ok() ? *logits : std::vector<float>();
  }

  std::vector<int32_t> ids_;
  test::NpyMatrix golden_;
};

TEST_P(GoldenTest, LogitsAreTheOracles) {
  const std::vector<float> logits = Logits("scalar", 1, 64);
  ASSERT_EQ(logits.size(), golden_.values.size());
  float largest = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const float difference = std::abs(logits[i] - golden_.values[i]);
    // Not a NaN either.
    ASSERT_TRUE(difference <= kTolerance)
        << "token " << i / golden_.columns << ", logit " << i % golden_.columns << ": " << logits[i]
        << " instead of " << golden_.values[i];
    largest = std::max(largest, difference);
  }
  RecordProperty("largest_difference", std::to_string(largest));
}

TEST_P(GoldenTest, EveryVariantGivesTheSameBits) {
  const std::vector<float> expected = Logits("scalar", 1, 64);
  ASSERT_FALSE(expected.empty());
  for (const char* isa : kernels::AvailableIsas()) {
    EXPECT_TRUE(SameBits(Logits(isa, 2, 64), expected)) << isa;
  }
  // In chunks of five tokens.
  EXPECT_TRUE(SameBits(Logits("", 1, 5), expected));
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, ::testing::ValuesIn(GoldenDirectories()),
                         [](const auto& info) { return fs::path(info.param).filename().string(); });

}  // namespace
}  // namespace ternion::runtime
