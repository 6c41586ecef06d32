// Ranks that fail, and input that does not fit the model.

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "comm/loopback/loopback.h"
#include "experts/trace.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/comm/faulty_transport.h"
#include "tests/runtime/engine_support.h"
#include "tests/testing/status.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

using test::IsError;
using test::IsInvalid;
using Json = nlohmann::json;

// A rank whose sends fail after a while.
class FailingTransport : public comm::FaultyTransport {
 public:
  FailingTransport(comm::Transport* inner, int good_sends)
      : FaultyTransport(inner), good_sends_(good_sends) {}

  absl::Status Send(RankId to, comm::Phase phase, comm::Message message) override {
    if (good_sends_-- <= 0) return absl::InternalError("pulled the plug");
    return FaultyTransport::Send(to, phase, std::move(message));
  }

 private:
  int good_sends_;
};

TEST(Engine, ARankThatFailsEndsTheOthers) {
  // Wherever it fails: while loading, between dispatch and combine, or with its results.
  for (const int good_sends : {0, 1, 2, 3, 17, 50, 81}) {
    SCOPED_TRACE(good_sends);
    const auto statuses = comm::RunLoopback(3, [&](comm::Transport& world) -> absl::Status {
      const bool fails = world.rank() == RankId{1};
      FailingTransport transport(&world, fails ? good_sends : 1 << 30);
      base::ThreadPool threads(1);
      kernels::Executor executor{.threads = &threads};
      TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                               MakeEngine({.num_ranks = 3}, transport, executor));
      if (world.rank() != RankId{0}) return engine->Follow();
      TERNION_RETURN_IF_ERROR(engine->Submit(RandomPrompt(20, 400, 1)).status());
      std::map<SequenceId, Outcome> outcomes;
      TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
      return engine->Stop();
    });
    EXPECT_TRUE(IsError(statuses[1], absl::StatusCode::kInternal, "pulled the plug"));
    for (const int rank : {0, 2}) {
      EXPECT_TRUE(IsError(statuses[rank], absl::StatusCode::kUnavailable, "is gone")) << rank;
    }
  }
}

// In the midst of a run: the receiver names the sender, and every rank ends.
TEST(Engine, AFlippedBitEndsEveryRank) {
  for (const comm::Phase phase : {comm::Phase::kDispatch, comm::Phase::kCombine}) {
    const auto statuses = comm::RunLoopback(3, [&](comm::Transport& world) -> absl::Status {
      comm::FaultyTransport transport(&world);
      int messages = 0;
      transport.on_send = [&](RankId to, comm::Phase of, comm::Message& message) {
        const bool chosen = world.rank() == RankId{1} && to == RankId{2} && of == phase;
        if (chosen && ++messages == 5) message.bytes().back() ^= 1;
      };
      base::ThreadPool threads(1);
      kernels::Executor executor{.threads = &threads};
      TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                               MakeEngine({.num_ranks = 3}, transport, executor));
      if (world.rank() != RankId{0}) return engine->Follow();
      for (uint32_t seed = 0; seed < 3; ++seed) {  // a sequence for each rank
        TERNION_RETURN_IF_ERROR(engine->Submit(RandomPrompt(20, 400, seed)).status());
      }
      std::map<SequenceId, Outcome> outcomes;
      TERNION_RETURN_IF_ERROR(RunToEnd(*engine, outcomes));
      return engine->Stop();
    });
    EXPECT_TRUE(IsError(statuses[2], absl::StatusCode::kDataLoss, "rank 1"));
    for (const int rank : {0, 1}) {
      EXPECT_TRUE(IsError(statuses[rank], absl::StatusCode::kUnavailable, "rank 2 is gone"));
    }
  }
}

TEST(Engine, WhenRankZeroFailsTheOthersEnd) {
  const auto statuses = RunEngines({.num_ranks = 3}, [&](Engine& engine) -> absl::Status {
    TERNION_RETURN_IF_ERROR(engine.Submit(RandomPrompt(20, 400, 1)).status());
    for (int step = 0; step < 3; ++step) TERNION_RETURN_IF_ERROR(engine.Step().status());
    return absl::InternalError("pulled the plug");
  });
  EXPECT_TRUE(IsError(statuses[0], absl::StatusCode::kInternal, "pulled the plug"));
  for (const int rank : {1, 2}) {
    EXPECT_TRUE(IsError(statuses[rank], absl::StatusCode::kUnavailable, "rank 0 is gone: pulled"));
  }
}

TEST(Engine, WrongPlacementsAreAgreedErrors) {
  test::TempDir directory;
  // Abseil makes its table of error texts at the first failure, with a lock that ThreadSanitizer
  // does not see.
  EXPECT_FALSE(base::ReadFile(directory.path() + "/none").ok());
  const auto errors = [&](const std::string& placement) {
    return RunEngines({.num_ranks = 2, .placement = placement},
                      [](Engine&) { return absl::OkStatus(); });
  };
  for (const absl::Status& status : errors(directory.path() + "/none.json")) {
    EXPECT_TRUE(IsError(status, absl::StatusCode::kNotFound, "none.json"));
    EXPECT_TRUE(comm::IsAgreed(status));
  }
  const std::string beyond = directory.Write("beyond.json", PlacementJson([](int) { return 2; }));
  for (const absl::Status& status : errors(beyond)) {
    EXPECT_TRUE(IsInvalid(status, "beyond.json: placement of layer 0, expert 0: names rank 2"));
  }
}

// As when a host has another file under the same path.
TEST(Engine, DifferentPlacementsAreAnAgreedError) {
  test::TempDir directory;
  const std::string swapped =
      directory.Write("swapped.json", PlacementJson([](int e) { return e % 2; }));
  const auto statuses = comm::RunLoopback(2, [&](comm::Transport& transport) {
    base::ThreadPool threads(1);
    kernels::Executor executor{.threads = &threads};
    const bool is_root = transport.rank() == base::RankId{0};
    const WorldCase c = {.num_ranks = 2, .placement = is_root ? "contiguous" : swapped};
    return MakeEngine(c, transport, executor).status();
  });
  for (const absl::Status& status : statuses) {
    EXPECT_TRUE(IsInvalid(status, "rank 1 has another placement of experts than rank 0"));
    EXPECT_TRUE(comm::IsAgreed(status));
  }
}

TEST(Engine, TracesOfAnotherModelAreRefused) {
  test::TempDir directory;
  const auto error_with = [&](const experts::TraceShape& shape) {
    const std::string trace = directory.path("trace.bin");
    EXPECT_TRUE(experts::SaveTrace(*experts::UniformTrace(1, shape), trace).ok());
    return RunEngines({.placement = "local", .trace = trace},
                      [](Engine&) { return absl::OkStatus(); })[0];
  };
  EXPECT_TRUE(error_with(kTraceShape).ok());
  EXPECT_TRUE(IsInvalid(error_with({5, 9, 16, 2}),
                        "trace.bin: the trace has 5 layers with experts, the model 4"));
  EXPECT_TRUE(IsInvalid(error_with({4, 9, 8, 2}), "the trace has 8 experts, the model 16"));
  EXPECT_TRUE(
      IsInvalid(error_with({4, 9, 16, 3}), "the trace has 3 experts per token, the model 2"));
}

// A copy of a golden model with its config changed.
class BrokenModel : public ::testing::Test {
 protected:
  absl::Status LoadWith(const std::string& name, const std::string& key, const Json& value,
                        std::optional<kernels::KvFormat> kv = std::nullopt) {
    return LoadWithAll(name, {{key, value}}, kv);
  }
  absl::Status LoadWithAll(const std::string& name, const Json& changes,
                           std::optional<kernels::KvFormat> kv = std::nullopt) {
    const std::string golden = TERNION_SOURCE_DIR "/tests/oracle/golden/" + name;
    for (const auto& entry : std::filesystem::directory_iterator(golden)) {
      std::filesystem::copy(entry.path(),
                            std::filesystem::path(directory_.path()) / entry.path().filename(),
                            std::filesystem::copy_options::overwrite_existing);
    }
    Json config = Json::parse(*base::ReadFile(golden + "/config.json"));
    config.update(changes);
    directory_.Write("config.json", config.dump());
    const auto statuses = comm::RunLoopback(2, [&](comm::Transport& transport) -> absl::Status {
      base::ThreadPool threads(1);
      kernels::Executor executor{.threads = &threads};
      return MakeEngine({.num_ranks = 2, .kv = kv, .model = directory_.path()}, transport, executor)
          .status();
    });
    EXPECT_EQ(statuses[0], statuses[1]);
    return statuses[0];
  }

  test::TempDir directory_;
};

TEST_F(BrokenModel, ConfigAndTensorsThatDisagree) {
  constexpr char kMoe[] = "bitnet_moe_silu";
  EXPECT_TRUE(LoadWith(kMoe, "num_experts", 8).ok());
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "num_experts", 7), "num_experts is 7"));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "num_experts", 9), absl::StatusCode::kNotFound,
                      "model.layers.0.mlp.experts.8.gate_proj.weight"));
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "moe_intermediate_size", 68),
                        "experts.0.gate_proj.weight has shape"));
  EXPECT_TRUE(IsInvalid(LoadWith(kMoe, "vocab_size", 132), "embed_tokens.weight has shape"));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "num_hidden_layers", 3), absl::StatusCode::kNotFound,
                      "model.layers.2."));
  EXPECT_TRUE(IsError(LoadWith(kMoe, "tie_word_embeddings", false), absl::StatusCode::kNotFound,
                      "lm_head.weight"));
  EXPECT_TRUE(IsInvalid(LoadWith("bitnet_relu2_tied", "num_key_value_heads", 6),
                        "k_proj.weight has shape"));
}

TEST_F(BrokenModel, OtherLayersAreDenseThanTheConfigSays) {
  constexpr char kDenseFirst[] = "bitnet_moe_dense_first";
  EXPECT_TRUE(LoadWith(kDenseFirst, "first_k_dense_replace", 2).ok());
  EXPECT_TRUE(IsError(LoadWith(kDenseFirst, "first_k_dense_replace", 1),
                      absl::StatusCode::kNotFound, "model.layers.1.mlp.experts.0."));
  EXPECT_TRUE(IsInvalid(LoadWith(kDenseFirst, "intermediate_size", 160),
                        "model.layers.0.mlp.gate_proj.weight has shape"));
  EXPECT_TRUE(IsInvalid(
      LoadWithAll("bitnet_moe_silu", {{"first_k_dense_replace", 1}, {"intermediate_size", 64}}),
      "holds model.layers.0.mlp.experts.0.gate_proj.weight, but config.json says "
      "first_k_dense_replace is 1"));
}

TEST_F(BrokenModel, HeadsThatCannotBeRotated) {
  constexpr char kDense[] = "bitnet_relu2_tied";
  const std::string golden = TERNION_SOURCE_DIR "/tests/oracle/golden/";
  const Json config = Json::parse(*base::ReadFile(golden + kDense + "/config.json"));
  const int head_dim = config["head_dim"];
  ASSERT_NE(head_dim & (head_dim - 1), 0) << head_dim;
  for (const auto kv : {kernels::KvFormat::kInt4, kernels::KvFormat::kInt3}) {
    const absl::Status status = LoadWith(kDense, "kv_bits", 16, kv);
    EXPECT_TRUE(IsInvalid(status, "power of two"));
    EXPECT_TRUE(comm::IsAgreed(status));
    EXPECT_TRUE(IsInvalid(LoadWith(kDense, "kv_bits", 8, kv), "power of two"));
    EXPECT_TRUE(LoadWith(kDense, "kv_bits", 3, kv).ok());  // trained for it: no rotation
  }
  EXPECT_TRUE(LoadWith(kDense, "kv_bits", 16, kernels::KvFormat::kInt8).ok());
  EXPECT_TRUE(LoadWith(kDense, "kv_bits", 4).ok());
}

}  // namespace
}  // namespace ternion::runtime
