#include "launcher/ladder.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "launcher/scoring.h"
#include "launcher/statistics.h"

namespace ternion::launcher {
namespace {

using comm::RowFormat;
using kernels::KvFormat;

// One combination of precisions.
struct Rung {
  runtime::WireOptions wire;
  KvFormat kv;
};

// The exact wire first: the reference. Then the other dispatches, with its combine; then each
// combine with each KV cache, at the model's own dispatch; then bf16 both ways, which others are
// measured against. Where no row travels only caches differ.
std::vector<Rung> MakeRungs(const runtime::ModelConfig& config, bool rows_travel) {
  const RowFormat formats[] = {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8,
                               RowFormat::kInt4};
  const KvFormat caches[] = {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kInt4, KvFormat::kInt3};
  const RowFormat own_dispatch = *runtime::ResolveWire(config, {}).dispatch;
  const KvFormat own_kv = *kernels::KvFormatOfBits(config.kv_bits);
  std::vector<Rung> rungs;
  const auto add = [&](const runtime::WireOptions& wire, KvFormat kv) {
    const runtime::ModelOptions options = {.max_rows = 1, .wire = wire, .kv = kv};
    if (runtime::CheckPrecisions(config, options).ok()) rungs.push_back({wire, kv});
  };
  const runtime::WireOptions exact = {own_dispatch, RowFormat::kFp32, /*exact=*/true};
  add(exact, own_kv);
  if (!rows_travel) {
    for (KvFormat kv : caches) {
      if (kv != own_kv) add(exact, kv);
    }
    return rungs;
  }
  for (RowFormat dispatch : formats) {
    if (dispatch != own_dispatch) add({dispatch, RowFormat::kFp32, /*exact=*/true}, own_kv);
  }
  for (KvFormat kv : caches) {
    for (RowFormat combine : formats) add({own_dispatch, combine}, kv);
  }
  add({RowFormat::kBf16, RowFormat::kBf16}, own_kv);
  return rungs;
}

size_t ArgMax(std::span<const float> logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// What one rung came to, on one rank or on all of them.
struct RungResult {
  double nll = 0;              // of all predicted tokens; rank 0 only
  int64_t same_top = 0;        // rows with the reference's likeliest token
  std::vector<float> kl;       // of each row, nats
  int64_t dispatch_bytes = 0;  // messages on the wire
  int64_t combine_bytes = 0;

  std::string Serialize() const {
    const int64_t numbers[] = {same_top, dispatch_bytes, combine_bytes};
    std::string bytes(reinterpret_cast<const char*>(numbers), sizeof(numbers));
    return bytes.append(reinterpret_cast<const char*>(kl.data()), kl.size() * sizeof(float));
  }
  // Adds what another rank serialized.
  absl::Status Add(const std::string& bytes) {
    int64_t numbers[3];
    if (bytes.size() < sizeof(numbers) || bytes.size() % sizeof(float) != 0) {
      return absl::InvalidArgumentError("a rank sent malformed ladder results");
    }
    std::memcpy(numbers, bytes.data(), sizeof(numbers));
    same_top += numbers[0];
    dispatch_bytes += numbers[1];
    combine_bytes += numbers[2];
    const size_t count = (bytes.size() - sizeof(numbers)) / sizeof(float), old = kl.size();
    if (count == 0) return absl::OkStatus();  // a rank that owns no row
    kl.resize(old + count);
    std::memcpy(kl.data() + old, bytes.data() + sizeof(numbers), count * sizeof(float));
    return absl::OkStatus();
  }
};

// The rows that this rank owns, rung against reference. Every rung runs the same windows in the
// same steps on the same ranks, so that rows come in the same order.
class RowComparison {
 public:
  void StartReference() {
    reference_.clear();
    next_row_ = 0;
    keep_ = true;
  }
  void StartRung() {
    TERNION_CHECK(next_row_ == reference_.size());
    next_row_ = 0;
    keep_ = false;
  }
  void Take(std::span<const float> logits, RungResult& result) {
    const double log_sum = LogSumExp(logits);
    if (keep_) reference_.push_back({{logits.begin(), logits.end()}, log_sum});
    TERNION_CHECK(next_row_ < reference_.size());
    const Row& row = reference_[next_row_++];
    result.kl.push_back(static_cast<float>(KlDivergence(row.logits, row.log_sum, logits, log_sum)));
    result.same_top += ArgMax(logits) == ArgMax(row.logits);
  }

 private:
  struct Row {
    std::vector<float> logits;  // [vocab]
    double log_sum;
  };
  std::vector<Row> reference_;
  size_t next_row_ = 0;
  bool keep_ = true;
};

// One rank's side of the ladder.
class Ladder {
 public:
  Ladder(const EvalOptions& options, World& world, runtime::Engine& engine, int64_t reference_bytes)
      : options_(options),
        world_(world),
        engine_(engine),
        reference_bytes_(reference_bytes),
        rungs_(MakeRungs(engine.config(), engine.config().moe() && engine.num_ranks() > 1)),
        results_(rungs_.size()) {}

  absl::Status Run();

 private:
  absl::Status CutGroups();
  absl::Status RunGroup(std::span<const TokenIds> windows, ProgressBar& bar);
  absl::Status RunRung(std::span<const TokenIds> windows, RungResult& result, ProgressBar& bar);
  absl::Status GatherResults();
  absl::Status CheckFinite() const;
  absl::Status Report() const;
  Json RungJson(size_t index) const;
  double BitsPerByte(const RungResult& result) const {
    return result.nll / std::log(2.0) / static_cast<double>(text_.num_bytes);
  }

  const EvalOptions& options_;
  World& world_;
  runtime::Engine& engine_;
  const int64_t reference_bytes_;
  const std::vector<Rung> rungs_;
  std::vector<RungResult> results_;  // [rungs]
  RowComparison rows_;
  ScoredText text_;                                // rank 0
  std::vector<std::span<const TokenIds>> groups_;  // of its windows; elsewhere empty ones
  int64_t positions_ = 0, positions_run_ = 0;
};

// Rank 0 cuts the text, into windows as for `eval` and these into groups of at least one; the
// others learn how many groups there are.
absl::Status Ladder::CutGroups() {
  absl::Status status;
  if (world_.is_root()) {
    absl::StatusOr<ScoredText> text =
        CutText(options_.text, options_.engine.model, engine_.config(), MaxWindow(engine_));
    status = text.status();
    if (text.ok()) text_ = *std::move(text);
  }
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(world_.transport(), status));
  const int64_t rows = reference_bytes_ / (engine_.config().vocab_size * int64_t{sizeof(float)});
  const std::span<const TokenIds> windows(text_.windows);
  for (size_t begin = 0, end; begin < windows.size(); begin = end) {
    int64_t taken = static_cast<int64_t>(windows[begin].size());
    for (end = begin + 1; end < windows.size(); ++end) {
      taken += static_cast<int64_t>(windows[end].size());
      if (taken > rows) break;
    }
    groups_.push_back(windows.subspan(begin, end - begin));
  }
  for (const TokenIds& window : windows) positions_ += static_cast<int64_t>(window.size());
  TERNION_ASSIGN_OR_RETURN(const std::string count,
                           comm::Broadcast(world_.transport(), absl::StrCat(groups_.size())));
  uint32_t num_groups = 0;
  if (!absl::SimpleAtoi(count, &num_groups)) {
    return absl::InvalidArgumentError("rank 0 sent a malformed number of groups");
  }
  groups_.resize(num_groups);
  return absl::OkStatus();
}

absl::Status Ladder::RunRung(std::span<const TokenIds> windows, RungResult& result,
                             ProgressBar& bar) {
  engine_.set_logits_sink([&](runtime::SequenceId, int32_t, std::span<const float> logits) {
    rows_.Take(logits, result);
  });
  if (world_.is_root()) {
    TERNION_RETURN_IF_ERROR(SubmitWindows(windows, engine_));
    const int64_t total = positions_ * static_cast<int64_t>(rungs_.size());
    TERNION_ASSIGN_OR_RETURN(const double nll, RunToIdle(engine_, [&](int64_t count) {
                               bar.Update(positions_run_ += count, total);
                             }));
    result.nll += nll;
    TERNION_RETURN_IF_ERROR(engine_.Stop());
  } else {
    TERNION_RETURN_IF_ERROR(engine_.Follow());
  }
  const auto sent = [&](comm::Phase phase) {
    return world_.transport().WireTraffic(comm::Direction::kSent, phase).message_bytes;
  };
  result.dispatch_bytes += sent(comm::Phase::kDispatch);
  result.combine_bytes += sent(comm::Phase::kCombine);
  return absl::OkStatus();
}

absl::Status Ladder::RunGroup(std::span<const TokenIds> windows, ProgressBar& bar) {
  for (size_t i = 0; i < rungs_.size(); ++i) {
    TERNION_RETURN_IF_ERROR(engine_.Reconfigure(rungs_[i].wire, rungs_[i].kv));
    if (i == 0) {
      rows_.StartReference();
    } else {
      rows_.StartRung();
    }
    TERNION_RETURN_IF_ERROR(RunRung(windows, results_[i], bar));
  }
  return absl::OkStatus();
}

absl::Status Ladder::GatherResults() {
  for (RungResult& result : results_) {
    TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> parts,
                             comm::Gather(world_.transport(), result.Serialize()));
    RungResult all;
    all.nll = result.nll;
    for (const std::string& part : parts) TERNION_RETURN_IF_ERROR(all.Add(part));
    result = std::move(all);
  }
  return absl::OkStatus();
}

absl::Status Ladder::Run() {
  TERNION_RETURN_IF_ERROR(CutGroups());
  {
    ProgressBar bar("climbing the ladder", world_.is_root());
    for (const std::span<const TokenIds> group : groups_) {
      TERNION_RETURN_IF_ERROR(RunGroup(group, bar));
    }
  }
  TERNION_RETURN_IF_ERROR(GatherResults());
  const absl::Status reported = world_.is_root() ? Report() : absl::OkStatus();
  return comm::BroadcastStatus(world_.transport(), reported);
}

double Mean(std::span<const float> values) {
  double sum = 0;
  for (float value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

// Rank 0, once all results are here.
absl::Status Ladder::CheckFinite() const {
  for (size_t i = 0; i < rungs_.size(); ++i) {
    for (float kl : results_[i].kl) {
      if (std::isfinite(kl)) continue;
      return absl::InvalidArgumentError(absl::StrCat(options_.engine.model,
                                                     " gives logits that are not finite (KV cache ",
                                                     kernels::KvFormatName(rungs_[i].kv), ")"));
    }
  }
  return absl::OkStatus();
}

Json Ladder::RungJson(size_t index) const {
  const RungResult& result = results_[index];
  const double bits = BitsPerByte(result), reference = BitsPerByte(results_[0]);
  const double rows = static_cast<double>(result.kl.size());
  const runtime::ModelConfig& config = engine_.config();
  const runtime::KvShape shape = {config.num_layers, config.kv_heads, config.head_dim,
                                  rungs_[index].kv};
  Json json = WireJson(rungs_[index].wire);
  json.update({{"kv", kernels::KvFormatName(rungs_[index].kv)},
               {"bits_per_byte", bits},
               {"change_percent", 100 * (bits / reference - 1)},
               {"same_top_percent", 100 * static_cast<double>(result.same_top) / rows},
               {"kl_mean", Mean(result.kl)},
               {"kl_p999", Percentile(result.kl, 0.999)},
               {"dispatch_bytes_per_token", static_cast<double>(result.dispatch_bytes) / rows},
               {"combine_bytes_per_token", static_cast<double>(result.combine_bytes) / rows},
               {"kv_bytes_per_token", shape.bytes_per_token()}});
  return json;
}

absl::Status Ladder::Report() const {
  TERNION_RETURN_IF_ERROR(CheckFinite());
  Json ladder = Json::array();
  std::printf("%s on %s: %lld tokens, %lld bytes, %d ranks; KL in nats, bytes per token\n\n",
              options_.engine.model.c_str(), options_.text.c_str(),
              static_cast<long long>(text_.num_predicted), static_cast<long long>(text_.num_bytes),
              engine_.num_ranks());
  std::printf(
      "dispatch combine kv    bits/byte   change  same top   mean KL  99.9%% KL"
      "  dispatch  combine     KV\n");
  for (size_t i = 0; i < rungs_.size(); ++i) {
    const Json rung = RungJson(i);
    std::printf("%-8s %-7s %-5s %9.4f %+7.3f%% %8.2f%% %9.2e %9.2e %9.0f %8.0f %6lld\n",
                rung["dispatch"].get<std::string>().c_str(),
                rung["exact"] ? "exact" : rung["combine"].get<std::string>().c_str(),
                rung["kv"].get<std::string>().c_str(), rung["bits_per_byte"].get<double>(),
                rung["change_percent"].get<double>(), rung["same_top_percent"].get<double>(),
                rung["kl_mean"].get<double>(), rung["kl_p999"].get<double>(),
                rung["dispatch_bytes_per_token"].get<double>(),
                rung["combine_bytes_per_token"].get<double>(),
                rung["kv_bytes_per_token"].get<long long>());
    ladder.push_back(rung);
  }
  if (options_.json.empty()) return absl::OkStatus();
  return WriteJson(options_.json, {{"model", options_.engine.model},
                                   {"text", options_.text},
                                   {"tokens", text_.num_predicted},
                                   {"bytes", text_.num_bytes},
                                   {"ranks", engine_.num_ranks()},
                                   {"isa", world_.isa()},
                                   {"ladder", ladder}});
}

}  // namespace

absl::Status EvalLadder(const EvalOptions& options, World& world, int64_t reference_bytes) {
  // Loaded with the widest cache, so that it holds as many tokens at every precision.
  EngineFlags flags = options.engine;
  flags.kv = "bf16";
  TERNION_ASSIGN_OR_RETURN(LoadedEngine loaded, LoadEngine(flags, world));
  return Ladder(options, world, *loaded.engine, reference_bytes).Run();
}

}  // namespace ternion::launcher
