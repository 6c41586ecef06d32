#include "launcher/ladder.h"

#include <string>
#include <vector>

#include "base/file.h"
#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/testing/temp_dir.h"

namespace ternion::launcher {
namespace {

using Json = nlohmann::json;

constexpr char kTiny[] = TERNION_SOURCE_DIR "/models/tiny";

// The ladder over `num_ranks` threads.
Json Climb(int num_ranks, int64_t num_chars, int64_t reference_bytes) {
  const test::TempDir directory;
  const std::string text = *base::ReadFile(std::string(kTiny) + "/test.txt");
  EvalOptions options;
  options.engine.model = kTiny;
  options.engine.kv_tokens = 1024;
  options.text = directory.Write("text.txt", text.substr(0, num_chars));
  options.json = directory.path("ladder.json");
  const auto statuses =
      comm::RunLoopback(num_ranks, [&](comm::Transport& transport) -> absl::Status {
        TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<World> world,
                                 World::CreateOn(&transport, {.threads = 1}));
        return EvalLadder(options, *world, reference_bytes);
      });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  return Json::parse(*base::ReadFile(options.json));
}

// Windows one at a time, as a large vocabulary forces, or all at once. With two ranks other rows
// travel then, which changes nothing where the wire loses nothing.
TEST(Ladder, GroupsOfWindowsChangeNothing) {
  for (int num_ranks : {1, 2}) {
    const Json together = Climb(num_ranks, 2500, kLadderReferenceBytes);
    const Json apart = Climb(num_ranks, 2500, 1);
    ASSERT_GT(together["tokens"], 512);  // more than one window
    ASSERT_EQ(together["ladder"].size(), apart["ladder"].size());
    for (size_t i = 0; i < together["ladder"].size(); ++i) {
      const Json &rung = together["ladder"][i], &other = apart["ladder"][i];
      if (!rung["exact"] || rung["dispatch"] == "bf16") continue;
      SCOPED_TRACE(rung.dump());
      for (const char* key : {"bits_per_byte", "same_top_percent", "kl_mean", "kl_p999"}) {
        EXPECT_NEAR(rung[key].get<double>(), other[key].get<double>(), 1e-9) << key;
      }
    }
  }
}

// On one rank no row travels, so that only caches make rungs.
TEST(Ladder, OneRankHasCachesOnly) {
  const Json ladder = Climb(1, 1000, kLadderReferenceBytes)["ladder"];
  ASSERT_EQ(ladder.size(), 4u);
  for (const Json& rung : ladder) {
    EXPECT_EQ(rung["exact"], true);
    EXPECT_EQ(rung["combine_bytes_per_token"], 0);
  }
  EXPECT_EQ(ladder[0]["kv"], "bf16");
  EXPECT_EQ(ladder[0]["kl_p999"], 0);
  EXPECT_GT(ladder[3]["kl_mean"], ladder[1]["kl_mean"]);  // int3, int8
}

}  // namespace
}  // namespace ternion::launcher
