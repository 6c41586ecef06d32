#include "tests/runtime/engine_support.h"

#include <random>
#include <utility>

#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/select.h"

namespace ternion::runtime {

using Json = nlohmann::json;

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const WorldCase& c, comm::Transport& transport,
                                                   kernels::Executor& executor) {
  EngineOptions options;
  options.model_directory = c.model;
  options.placement = c.placement;
  options.trace = c.trace;
  options.wire = c.wire;
  options.max_rows = c.max_rows;
  options.kv_tokens = c.kv_tokens;
  options.kv = c.kv;
  options.micro_batches = c.micro_batches;
  options.hierarchical = c.hierarchical;
  options.hash_logits = true;
  return Engine::Create(options, {&transport, kernels::SelectCpuKernels(""), &executor}, nullptr);
}

std::vector<absl::Status> RunEngines(const WorldCase& c,
                                     const std::function<absl::Status(Engine&)>& drive) {
  return comm::RunLoopback(
      c.num_ranks,
      [&](comm::Transport& transport) -> absl::Status {
        const bool is_root = transport.rank() == RankId{0};
        // Ranks with different numbers of threads.
        base::ThreadPool threads(1 + base::Index(transport.rank()) % 2);
        kernels::Executor executor{.threads = &threads};
        TERNION_ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine,
                                 MakeEngine(c, transport, executor));
        if (!is_root) return engine->Follow();
        TERNION_RETURN_IF_ERROR(drive(*engine));
        return engine->Stop();
      },
      c.node_of);
}

std::ostream& operator<<(std::ostream& out, const Outcome& outcome) {
  out << "hash " << outcome.logits_hash << ", tokens";
  for (int32_t token : outcome.tokens) out << ' ' << token;
  return out;
}

absl::Status RunToEnd(Engine& engine, std::map<SequenceId, Outcome>& outcomes,
                      std::set<int>* micro_batches) {
  for (int step = 0; !engine.idle(); ++step) {
    if (step > 10000) return absl::InternalError("it never ends");
    TERNION_ASSIGN_OR_RETURN(const StepReport report, engine.Step());
    if (micro_batches != nullptr) micro_batches->insert(report.micro_batches);
    for (const SequenceEvent& event : report.events) {
      Outcome& outcome = outcomes[event.sequence];
      if (event.token >= 0) outcome.tokens.push_back(event.token);
      outcome.logits_hash = event.logits_hash;
      outcome.nll += event.nll;
      outcome.finish = event.finish;
    }
  }
  return absl::OkStatus();
}

std::vector<Outcome> Generate(const WorldCase& c, const std::vector<Request>& requests) {
  std::map<SequenceId, Outcome> outcomes;
  const auto statuses = RunEngines(c, [&](Engine& engine) -> absl::Status {
    for (const Request& request : requests) {
      TERNION_RETURN_IF_ERROR(engine.Submit(request).status());
    }
    return RunToEnd(engine, outcomes);
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  std::vector<Outcome> list;
  for (auto& [id, outcome] : outcomes) list.push_back(std::move(outcome));
  EXPECT_EQ(list.size(), requests.size());
  return list;
}

Request RandomPrompt(size_t size, int32_t max_new_tokens, uint32_t seed) {
  std::mt19937 random(seed);
  Request request;
  request.max_new_tokens = max_new_tokens;
  for (size_t i = 0; i < size; ++i) request.prompt.push_back(random() % kVocab);
  return request;
}

std::vector<Request> ManyPrompts() {
  std::vector<Request> requests = {RandomPrompt(23, 8, 1)};
  for (uint32_t i = 1; i < 16; ++i) {
    requests.push_back(RandomPrompt(i == 5 ? 1 : 1 + i * 37 % 60, 4 + i % 5, 100 + i));
  }
  return requests;
}

std::string PlacementJson(const std::function<Json(int)>& ranks_of) {
  Json experts = Json::array();
  for (int expert = 0; expert < kExperts; ++expert) experts.push_back(ranks_of(expert));
  return Json{{"experts", experts}}.dump();
}

}  // namespace ternion::runtime
