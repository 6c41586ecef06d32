#include <cstdio>
#include <iostream>
#include <map>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/commands.h"
#include "launcher/report.h"
#include "launcher/step_times.h"
#include "runtime/tokenizer.h"
#include "xxhash.h"

namespace ternion::launcher {
namespace {

using runtime::Engine;
using runtime::FinishReason;
using runtime::SequenceEvent;
using runtime::SequenceId;
using runtime::StepReport;

// Tokens and the time they took, for prefill and for decode.
struct Throughput {
  int64_t tokens = 0;  // of prompts and generated ones
  int64_t prompt_tokens = 0;
  int64_t generated_tokens = 0;  // in steps without prompt tokens
  StepTimes prefill;             // steps with prompt tokens
  StepTimes decode;

  void Add(const StepReport& step, const StepTimes& times) {
    tokens += step.prompt_tokens + step.generated_tokens;
    prompt_tokens += step.prompt_tokens;
    if (step.prompt_tokens > 0) {
      prefill += times;
    } else {
      generated_tokens += step.generated_tokens;
      decode += times;
    }
  }
  double prefill_rate() const { return prefill.total > 0 ? prompt_tokens / prefill.total : 0; }
  double decode_rate() const { return decode.total > 0 ? generated_tokens / decode.total : 0; }
};

// One prompt and what has come of it.
struct Generation {
  std::string prompt;
  std::vector<int32_t> token_ids;
  std::string text;
  FinishReason finish = FinishReason::kNone;
  uint64_t logits_hash = 0;
  runtime::Utf8Stream utf8;
};

// Rank 0's side of `run`: feeds the engine and prints.
class Session {
 public:
  Session(const RunOptions& options, LoadedEngine& loaded, const runtime::Tokenizer& tokenizer)
      : options_(options), loaded_(loaded), tokenizer_(tokenizer) {}

  absl::Status Submit(const std::string& prompt);
  absl::Status RunToEnd();
  absl::Status Interact();
  absl::Status Finish(const WorldReport& report, int ranks) const;

 private:
  void Take(const SequenceEvent& event);
  void PrintFinished();
  uint64_t LogitsHash() const;
  Json BytesPerToken(const WorldReport& report) const;
  std::string WireLine(const WorldReport& report) const;
  Json ToJson(const WorldReport& report, int ranks) const;

  const RunOptions& options_;
  LoadedEngine& loaded_;
  const runtime::Tokenizer& tokenizer_;
  std::vector<Generation> generations_;  // in the order of the prompts
  std::map<SequenceId, size_t> index_;   // into generations_
  size_t printed_ = 0;                   // generations printed in full
  Throughput throughput_;
};

absl::Status Session::Submit(const std::string& prompt) {
  const runtime::ModelConfig& config = loaded_.engine->config();
  runtime::Request request;
  if (config.bos_id >= 0) request.prompt.push_back(config.bos_id);
  const std::vector<int32_t> ids = tokenizer_.Encode(prompt);
  request.prompt.insert(request.prompt.end(), ids.begin(), ids.end());
  request.max_new_tokens = options_.max_tokens;
  request.sampling = options_.sampling;
  request.stop_ids = config.eos_ids;
  TERNION_ASSIGN_OR_RETURN(const SequenceId id, loaded_.engine->Submit(std::move(request)));
  index_[id] = generations_.size();
  generations_.emplace_back().prompt = prompt;
  return absl::OkStatus();
}

void Session::Take(const SequenceEvent& event) {
  Generation& generation = generations_[index_[event.sequence]];
  generation.logits_hash = event.logits_hash;
  generation.finish = event.finish;
  std::string piece;
  if (event.token >= 0) {
    generation.token_ids.push_back(event.token);
    if (!tokenizer_.IsSpecial(event.token)) {
      piece = generation.utf8.Push(tokenizer_.TokenBytes(event.token));
    }
  }
  if (event.finish != FinishReason::kNone) piece += generation.utf8.Flush();
  generation.text += piece;
  // A single prompt streams; several would interleave, so each is printed when it is complete.
  if (generations_.size() == 1) {
    std::fputs(piece.c_str(), stdout);
    std::fflush(stdout);
  }
}

void Session::PrintFinished() {
  for (; printed_ < generations_.size(); ++printed_) {
    const Generation& generation = generations_[printed_];
    if (generation.finish == FinishReason::kNone) return;
    if (generations_.size() == 1) {
      std::puts("");
    } else {
      std::printf("[%zu] %s%s\n", printed_ + 1, generation.prompt.c_str(), generation.text.c_str());
    }
    std::fflush(stdout);
  }
}

absl::Status Session::RunToEnd() {
  if (generations_.size() == 1) {
    std::fputs(generations_[0].prompt.c_str(), stdout);
    std::fflush(stdout);
  }
  while (!loaded_.engine->idle()) {
    TERNION_ASSIGN_OR_RETURN(const TimedStep step, StepTimed(*loaded_.engine));
    throughput_.Add(step.report, step.times);
    for (const SequenceEvent& event : step.report.events) Take(event);
    PrintFinished();
  }
  return absl::OkStatus();
}

absl::Status Session::Interact() {
  std::string line;
  while (std::fputs("> ", stdout), std::fflush(stdout), std::getline(std::cin, line)) {
    if (line.empty()) continue;
    generations_.clear();
    index_.clear();
    printed_ = 0;
    // A prompt that does not fit is the user's to shorten: say so and go on.
    if (const absl::Status status = Submit(line); !status.ok()) {
      std::printf("%s\n", std::string(status.message()).c_str());
      continue;
    }
    TERNION_RETURN_IF_ERROR(RunToEnd());
  }
  std::puts("");
  return absl::OkStatus();
}

// The prompts' hashes, combined in their order.
uint64_t Session::LogitsHash() const {
  uint64_t hash = 0;
  for (const Generation& generation : generations_) {
    hash = XXH3_64bits_withSeed(&generation.logits_hash, sizeof(generation.logits_hash), hash);
  }
  return hash;
}

Json Session::ToJson(const WorldReport& report, int ranks) const {
  Json prompts = Json::array();
  for (const Generation& generation : generations_) {
    prompts.push_back(
        {{"prompt", generation.prompt},
         {"text", generation.text},
         {"token_ids", generation.token_ids},
         {"finish_reason", generation.finish == FinishReason::kStop ? "stop" : "length"},
         {"logits_hash", absl::StrFormat("%016x", generation.logits_hash)}});
  }
  return {{"ranks", ranks},
          {"prompts", std::move(prompts)},
          {"prefill_tok_s", throughput_.prefill_rate()},
          {"decode_tok_s", throughput_.decode_rate()},
          {"prefill_time", throughput_.prefill.ToJson()},
          {"decode_time", throughput_.decode.ToJson()},
          {"bytes_per_token", BytesPerToken(report)},
          {"load_seconds", loaded_.load_seconds},
          {"logits_hash", absl::StrFormat("%016x", LogitsHash())},
          {"wire", WireJson(loaded_.engine->wire())},
          {"kv", kernels::KvFormatName(loaded_.engine->kv_format())},
          {"traffic", report.traffic},
          {"per_rank", report.per_rank}};
}

// Message bytes that went over the wire for each token of the prompts and of what was generated,
// all ranks together.
Json Session::BytesPerToken(const WorldReport& report) const {
  const double tokens = static_cast<double>(throughput_.tokens);
  Json json = Json::object();
  PhaseBytes sum;
  double received = 0;
  for (const char* phase : {"dispatch", "combine"}) {
    const PhaseBytes bytes = PhaseBytesOf(report, phase, loaded_.engine->config().hidden);
    const double came = report.traffic[phase]["received"]["message_bytes"];
    json[phase] = {{"sent", bytes.sent / tokens},
                   {"received", came / tokens},
                   {"at_bf16", bytes.at_bf16 / tokens}};
    sum.sent += bytes.sent;
    sum.at_bf16 += bytes.at_bf16;
    received += came;
  }
  json["sent"] = sum.sent / tokens;
  json["received"] = received / tokens;
  json["at_bf16"] = sum.at_bf16 / tokens;
  json["times_fewer_than_bf16"] = sum.sent > 0 ? Json(sum.at_bf16 / sum.sent) : Json();
  return json;
}

// "dispatch int8 1.5 kB + combine bf16 4.4 kB sent and received per token (bf16 both ways: 8.9 kB,
// 1.51x)": what all ranks sent is what all ranks received.
std::string Session::WireLine(const WorldReport& report) const {
  const runtime::WireOptions& wire = loaded_.engine->wire();
  const std::string combine = wire.exact ? "exact" : std::string(comm::RowFormatName(wire.combine));
  const Json bytes = BytesPerToken(report);
  const auto human = [](const Json& value) { return HumanBytes(value.get<double>()); };
  std::string line = absl::StrFormat(
      "dispatch %s %s + combine %s %s", std::string(comm::RowFormatName(*wire.dispatch)),
      human(bytes["dispatch"]["sent"]), combine, human(bytes["combine"]["sent"]));
  if (bytes["times_fewer_than_bf16"].is_null()) return line;
  return absl::StrCat(
      line, absl::StrFormat(" sent and received per token (bf16 both ways: %s, %.2fx)",
                            human(bytes["at_bf16"]), bytes["times_fewer_than_bf16"].get<double>()));
}

absl::Status Session::Finish(const WorldReport& report, int ranks) const {
  // The empty line keeps it apart from the text, which mpirun may forward later.
  std::fprintf(stderr,
               "\n%d rank%s: prefill %.0f tok/s, decode %.1f tok/s; %s; KV %s; loaded in %.2f s\n",
               ranks, ranks == 1 ? "" : "s", throughput_.prefill_rate(), throughput_.decode_rate(),
               ranks == 1 ? "nothing sent" : WireLine(report).c_str(),
               kernels::KvFormatName(loaded_.engine->kv_format()), loaded_.load_seconds);
  return options_.json.empty() ? absl::OkStatus() : WriteJson(options_.json, ToJson(report, ranks));
}

// Rank 0, before the model is loaded.
absl::StatusOr<std::vector<std::string>> ReadPrompts(const RunOptions& options) {
  TERNION_RETURN_IF_ERROR(CheckWritable(options.json));
  if (options.interactive) return std::vector<std::string>();
  if (options.prompt_file.empty()) {
    if (options.prompt.empty()) return absl::InvalidArgumentError("--prompt is empty");
    return std::vector<std::string>{options.prompt};
  }
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(options.prompt_file));
  std::vector<std::string> prompts = absl::StrSplit(text, '\n');
  if (prompts.back().empty()) prompts.pop_back();  // the file's last newline
  for (size_t i = 0; i < prompts.size(); ++i) {
    if (!prompts[i].empty() && prompts[i].back() == '\r') prompts[i].pop_back();
    if (prompts[i].empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(options.prompt_file, ", line ", i + 1, ": the prompt is empty"));
    }
  }
  if (prompts.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.prompt_file, " holds no prompt"));
  }
  return prompts;
}

// Rank 0, before any step: everything that can be wrong with the input.
absl::Status Prepare(const RunOptions& options, const std::vector<std::string>& prompts,
                     std::unique_ptr<runtime::Tokenizer>& tokenizer, LoadedEngine& loaded,
                     std::unique_ptr<Session>& session) {
  TERNION_ASSIGN_OR_RETURN(runtime::Tokenizer loaded_tokenizer,
                           runtime::Tokenizer::Load(options.engine.model));
  tokenizer = std::make_unique<runtime::Tokenizer>(std::move(loaded_tokenizer));
  session = std::make_unique<Session>(options, loaded, *tokenizer);
  for (const std::string& prompt : prompts) TERNION_RETURN_IF_ERROR(session->Submit(prompt));
  return absl::OkStatus();
}

}  // namespace

absl::Status Run(const RunOptions& options, World& world) {
  absl::StatusOr<std::vector<std::string>> prompts;
  prompts = world.is_root() ? ReadPrompts(options) : std::vector<std::string>();
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), prompts.status()));
  TERNION_ASSIGN_OR_RETURN(LoadedEngine loaded, LoadEngine(options.engine, world,
                                                           /*hash_logits=*/!options.json.empty()));
  std::unique_ptr<runtime::Tokenizer> tokenizer;
  std::unique_ptr<Session> session;
  absl::Status ready;
  if (world.is_root()) ready = Prepare(options, *prompts, tokenizer, loaded, session);
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world.transport(), ready));

  if (world.is_root()) {
    TERNION_RETURN_IF_ERROR(options.interactive ? session->Interact() : session->RunToEnd());
    TERNION_RETURN_IF_ERROR(loaded.engine->Stop());
  } else {
    TERNION_RETURN_IF_ERROR(loaded.engine->Follow());
  }
  TERNION_ASSIGN_OR_RETURN(const WorldReport report, CollectReport(loaded, world));
  const absl::Status finished =
      world.is_root() ? session->Finish(report, world.transport().size()) : absl::OkStatus();
  return comm::BroadcastStatus(world.transport(), finished);
}

}  // namespace ternion::launcher
