// Precisions of the wire, of activations and of the KV cache, also changed while an engine lives.

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/runtime/engine_support.h"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;
using Json = nlohmann::json;

TEST(Engine, Int8DispatchIsLossless) {
  const std::vector<Request> requests = ManyPrompts();
  WorldCase c = {.num_ranks = 2};
  c.wire = {.dispatch = comm::RowFormat::kInt8, .combine = comm::RowFormat::kBf16};
  const std::vector<Outcome> int8 = Generate(c, requests);
  c.wire.dispatch = comm::RowFormat::kFp32;
  EXPECT_EQ(Generate(c, requests), int8);
  // The combine wire does round.
  c.wire.combine = comm::RowFormat::kInt8;
  EXPECT_NE(Generate(c, requests), int8);
}

// A bundled model with another activation and KV width in its config: its weights were not trained
// for it, but bits are bits.
class Precisions : public ::testing::Test {
 protected:
  std::string ModelWith(int act_bits, int kv_bits, const char* model = kModel) {
    const std::string path =
        directory_.path() + "/" + std::to_string(act_bits) + "-" + std::to_string(kv_bits);
    std::filesystem::copy(model, path);
    Json config = Json::parse(*base::ReadFile(path + "/config.json"));
    config["act_bits"] = act_bits;
    config["kv_bits"] = kv_bits;
    EXPECT_TRUE(base::WriteFileAtomically(path + "/config.json", config.dump()).ok());
    return path;
  }

  test::TempDir directory_;
};

TEST_F(Precisions, FourBitActivationsAndThreeBitCacheOnAnyNumberOfRanks) {
  const std::string model = kModelA48;
  std::vector<Request> requests = ManyPrompts();
  requests.resize(6);
  requests.push_back(RandomPrompt(150, 6, 7));  // more than a page
  const std::vector<Outcome> expected = Generate({.model = model}, requests);
  for (int num_ranks = 2; num_ranks <= 4; ++num_ranks) {
    EXPECT_EQ(Generate({.num_ranks = num_ranks, .max_rows = 23, .model = model}, requests),
              expected);
  }
  // Both widths do something.
  EXPECT_NE(Generate({.model = ModelWith(8, 3, kModelA48)}, requests), expected);
  EXPECT_NE(Generate({.model = ModelWith(4, 16, kModelA48)}, requests), expected);
  EXPECT_NE(Generate({.kv = kernels::KvFormat::kInt4, .model = model}, requests), expected);
  EXPECT_EQ(Generate({.kv = kernels::KvFormat::kInt3, .model = model}, requests), expected);
}

TEST_F(Precisions, DispatchIsLosslessDownToTheModelsWidth) {
  std::vector<Request> requests = ManyPrompts();
  requests.resize(5);
  for (const int act_bits : {8, 4}) {
    WorldCase c = {.num_ranks = 3, .wire = {}, .model = ModelWith(act_bits, 16)};
    const std::vector<Outcome> expected = Generate(c, requests);
    for (const auto dispatch :
         {comm::RowFormat::kFp32, comm::RowFormat::kInt8, comm::RowFormat::kInt4}) {
      if (act_bits == 8 && dispatch == comm::RowFormat::kInt4) continue;
      c.wire.dispatch = dispatch;
      EXPECT_EQ(Generate(c, requests), expected) << comm::RowFormatName(dispatch).data();
    }
  }
}

TEST_F(Precisions, EveryCacheFormatGivesTheSameBitsEverywhere) {
  const std::vector<Request> requests = {RandomPrompt(140, 4, 1), RandomPrompt(30, 6, 2)};
  std::vector<std::vector<Outcome>> seen;
  for (const auto kv : {kernels::KvFormat::kBf16, kernels::KvFormat::kInt8,
                        kernels::KvFormat::kInt4, kernels::KvFormat::kInt3}) {
    const std::vector<Outcome> expected = Generate({.max_rows = 512, .kv = kv}, requests);
    EXPECT_EQ(Generate({.num_ranks = 2, .max_rows = 9, .kv = kv}, requests), expected);
    for (const std::vector<Outcome>& other : seen) EXPECT_NE(expected, other);
    seen.push_back(expected);
  }
  EXPECT_EQ(Generate({}, requests), seen[0]);  // the model's own
  // This model's heads are rotated at int3, which one trained at 3 bits does without.
  EXPECT_NE(Generate({.model = ModelWith(8, 3)}, requests), seen[3]);
}

// Logits of scored requests, each on the rank that owns it, and what the engine says of itself.
using Scores = std::map<std::pair<SequenceId, int32_t>, std::vector<float>>;
struct Rung {
  WireOptions wire;
  kernels::KvFormat kv;
};

// Walks the rungs on one engine per rank that was made for the first of them.
std::vector<std::vector<Scores>> WalkLadder(const WorldCase& c, const std::vector<Rung>& rungs,
                                            const std::vector<Request>& requests) {
  std::vector<std::vector<Scores>> scores(rungs.size(), std::vector<Scores>(c.num_ranks));
  const auto statuses = comm::RunLoopback(c.num_ranks, [&](comm::Transport& transport) {
    const int rank = base::Index(transport.rank());
    base::ThreadPool threads(1 + rank % 2);
    kernels::Executor executor{.threads = &threads};
    const auto walk = [&]() -> absl::Status {
      WorldCase first = c;
      first.wire = rungs[0].wire;
      first.kv = rungs[0].kv;
      TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                               MakeEngine(first, transport, executor));
      for (size_t i = 0; i < rungs.size(); ++i) {
        if (i > 0) TERNION_RETURN_IF_ERROR(engine->Reconfigure(rungs[i].wire, rungs[i].kv));
        EXPECT_EQ(engine->kv_format(), rungs[i].kv);
        EXPECT_EQ(engine->wire().dispatch.value(),
                  rungs[i].wire.dispatch.value_or(comm::RowFormat::kInt8));
        engine->set_logits_sink(
            [&](SequenceId id, int32_t position, std::span<const float> logits) {
              scores[i][rank][{id, position}].assign(logits.begin(), logits.end());
            });
        if (rank != 0) {
          TERNION_RETURN_IF_ERROR(engine->Follow());
          continue;
        }
        for (const Request& request : requests) {
          TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
        }
        std::map<SequenceId, Outcome> outcomes;
        TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
        TERNION_RETURN_IF_ERROR(engine->Stop());
      }
      return absl::OkStatus();
    };
    return walk();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return scores;
}

TEST(Reconfigure, GivesTheBitsOfAFreshEngine) {
  std::vector<Request> requests;
  for (uint32_t i = 0; i < 7; ++i) {
    requests.push_back(RandomPrompt(20 + 19 * i, 0, i));
    requests.back().score = true;
  }
  using kernels::KvFormat;
  const std::vector<Rung> rungs = {{kExact, KvFormat::kInt3},
                                   {{}, KvFormat::kBf16},
                                   {{.combine = comm::RowFormat::kInt4}, KvFormat::kInt8},
                                   {{.dispatch = comm::RowFormat::kFp32}, KvFormat::kInt4},
                                   {kExact, KvFormat::kInt3}};
  const WorldCase c = {.num_ranks = 3, .kv_tokens = 512};
  const auto walked = WalkLadder(c, rungs, requests);
  for (size_t i = 0; i < rungs.size(); ++i) {
    SCOPED_TRACE("rung " + std::to_string(i));
    EXPECT_EQ(walked[i], WalkLadder(c, {rungs[i]}, requests)[0]);
    size_t rows = 0;
    for (int rank = 0; rank < c.num_ranks; ++rank) {
      EXPECT_FALSE(walked[i][rank].empty());
      rows += walked[i][rank].size();
      // The same owners on every rung.
      EXPECT_EQ(walked[i][rank].size(), walked[0][rank].size());
      for (const auto& [row, logits] : walked[i][rank]) EXPECT_TRUE(walked[0][rank].contains(row));
    }
    size_t expected_rows = 0;
    for (const Request& request : requests) expected_rows += request.prompt.size();
    EXPECT_EQ(rows, expected_rows);
  }
  EXPECT_NE(walked[1], walked[0]);
  EXPECT_EQ(walked[4], walked[0]);
}

TEST(Reconfigure, WhatDoesNotGoIsAnAgreedErrorAndChangesNothing) {
  const std::vector<Request> requests = {RandomPrompt(30, 6, 1), RandomPrompt(20, 4, 2)};
  const std::vector<Outcome> expected = Generate({.num_ranks = 2}, requests);
  std::map<SequenceId, Outcome> outcomes;
  const auto statuses = comm::RunLoopback(2, [&](comm::Transport& transport) -> absl::Status {
    base::ThreadPool threads(1);
    kernels::Executor executor{.threads = &threads};
    TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                             MakeEngine({.num_ranks = 2}, transport, executor));
    const bool is_root = transport.rank() == RankId{0};
    const WireOptions int4 = {.dispatch = comm::RowFormat::kInt4};
    const absl::Status refused = engine->Reconfigure(int4, kernels::KvFormat::kInt8);
    EXPECT_TRUE(IsInvalid(refused, "int4 dispatch"));
    EXPECT_TRUE(comm::IsAgreed(refused));
    for (const Request& request : requests) {
      if (is_root) TERNION_RETURN_IF_ERROR(engine->Submit(request).status());
    }
    const absl::Status busy = engine->Reconfigure({}, kernels::KvFormat::kInt8);
    EXPECT_TRUE(IsError(busy, absl::StatusCode::kFailedPrecondition, "still running"));
    EXPECT_EQ(engine->kv_format(), kernels::KvFormat::kBf16);
    EXPECT_TRUE(engine->wire().exact);
    if (!is_root) return engine->Follow();
    TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
    return engine->Stop();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  ASSERT_EQ(outcomes.size(), 2u);
  EXPECT_EQ(outcomes[SequenceId{0}], expected[0]);
  EXPECT_EQ(outcomes[SequenceId{1}], expected[1]);
}

}  // namespace
}  // namespace ternion::runtime
