#include "launcher/bench_exchange.h"

#include <algorithm>
#include <map>
#include <optional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "experts/balance.h"
#include "experts/locality.h"
#include "experts/placement_statistics.h"
#include "launcher/exchange_case.h"
#include "launcher/exchange_result.h"
#include "launcher/report.h"
#include "launcher/shapes.h"
#include "launcher/statistics.h"

namespace ternion::launcher {
namespace {

using comm::RowFormat;

constexpr int kSyntheticLayers = 4;  // of a trace made here: enough that layers differ
constexpr int64_t kSyntheticTokens = 1 << 14;
constexpr int kMaxLayers = 8;  // of a recorded trace, the first ones

// ---- What is measured

struct Shape {
  std::string name;
  int64_t hidden = 0;
};

// `by_mpi`: several ranks, and MPI between them; NCCL has no alltoallv to compare with.
std::vector<WireCase> Cases(bool several_ranks, bool hierarchical, bool by_mpi) {
  const RowFormat int4 = RowFormat::kInt4, int8 = RowFormat::kInt8, bf16 = RowFormat::kBf16;
  std::vector<WireCase> cases = {
      {int4, int4}, {int4, int8}, {int4, bf16}, {int8, int4},
      {int8, int8}, {int8, bf16}, {bf16, bf16},
  };
  cases.push_back({int4, int4, RowSet::kOncePerRank, /*presum=*/false});
  cases.push_back({int4, int4, RowSet::kOncePerExpert});
  cases.push_back({int4, int4, RowSet::kOncePerRank, true, "balanced"});
  cases.push_back({int4, int4, RowSet::kOncePerRank, true, "local"});
  cases.push_back({bf16, bf16, RowSet::kOncePerExpert});
  if (hierarchical) {
    cases.push_back({int4, int4});
    cases.back().hierarchical = true;
  }
  if (several_ranks) cases.push_back({bf16, bf16, RowSet::kToAllRanks});
  if (by_mpi) {
    cases.push_back({int4, int4});
    cases.back().all_to_all = true;
  }
  return cases;
}

// The first layers and some of the tokens.
experts::RoutingTrace Part(const experts::RoutingTrace& trace, int num_layers, int64_t begin,
                           int64_t end) {
  experts::RoutingTrace part;
  part.shape = {num_layers, end - begin, trace.shape.num_experts, trace.shape.top_k};
  for (int layer = 0; layer < num_layers; ++layer) {
    for (int64_t token = begin; token < end; ++token) {
      const auto ids = trace.ExpertsOf(layer, token);
      part.ids.insert(part.ids.end(), ids.begin(), ids.end());
    }
  }
  return part;
}

class Report {
 public:
  Report(const BenchExchangeOptions& options, World& world) : options_(options), world_(world) {}

  // Collective, as is Run. Before anything is timed.
  absl::Status Prepare();
  absl::Status Run();

 private:
  absl::Status CheckOptions();
  absl::Status GatherHosts();
  absl::Status CheckMemory() const;
  void FindNodes();
  absl::Status ReadLadders();
  absl::Status ResolveShape();
  absl::Status ResolveTrace();
  absl::Status MakePlacements();
  absl::Status RunCases(std::vector<CaseResult>& results);
  absl::StatusOr<CaseResult> RunCase(const WireCase& wire, int64_t tokens);

  void PrintHeader() const;
  void PrintLadderHeader(int64_t tokens) const;
  void PrintCase(const CaseResult& result) const;
  void PrintSizes(const CaseResult& of) const;
  void PrintFactors(const std::vector<CaseResult>& results) const;
  Json ToJson(const std::vector<CaseResult>& results, const absl::Status& status) const;
  absl::Status WriteMatrix(const std::vector<CaseResult>& results) const;
  std::string TransportName() const {
    return world_.transport().size() > 1 ? options_.world.transport : "none";
  }
  bool several_nodes() const { return num_nodes_ > 1; }
  // Several nodes, of several ranks each, equally many.
  bool has_hierarchy() const {
    return several_nodes() && layout_.ok() && layout_->inside.size() > 1;
  }

  const BenchExchangeOptions& options_;
  World& world_;
  Shape shape_;
  experts::RoutingTrace trace_;  // of the whole, the part that is exchanged
  uint64_t trace_hash_ = 0;      // of the whole
  std::string routing_;
  int num_nodes_ = 1;
  absl::StatusOr<experts::NodeLayout> layout_;
  std::vector<std::string> interfaces_;
  std::vector<Json> hosts_;  // rank 0: by rank, what GatherHosts says
  std::map<std::string, experts::Placement> placements_;
  std::map<std::string, experts::PlacementStatistics> statistics_;
  std::vector<Json> ladders_;
};

absl::Status Report::ResolveShape() {
  int64_t experts = options_.experts, top_k = options_.top_k;
  shape_ = {options_.shape.empty() ? "custom" : options_.shape, options_.hidden};
  if (!options_.shape.empty()) {
    TERNION_ASSIGN_OR_RETURN(const Json config, ShapeConfig(options_.shape));
    if (!config.contains("num_experts")) {
      return absl::InvalidArgumentError(
          absl::StrCat("--shape ", options_.shape, " has no experts: nothing is exchanged"));
    }
    if (shape_.hidden == 0) shape_.hidden = config["hidden_size"];
    if (experts == 0) experts = config["num_experts"];
    if (top_k == 0) top_k = config["num_experts_per_tok"];
  }
  trace_.shape = {0, 0, static_cast<int>(experts), static_cast<int>(top_k)};
  if (shape_.hidden > 0 && (!options_.trace.empty() || (experts > 0 && top_k > 0))) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      "give --shape, or --hidden with --experts and --top-k, or --hidden with --trace");
}

absl::Status Report::ResolveTrace() {
  const experts::TraceShape wanted = trace_.shape;
  if (options_.trace.empty()) {
    const int64_t most = *std::max_element(options_.tokens.begin(), options_.tokens.end());
    const int64_t num_tokens = std::max(2 * most * world_.transport().size(), kSyntheticTokens);
    const experts::TraceShape shape = {kSyntheticLayers, num_tokens, wanted.num_experts,
                                       wanted.top_k};
    const bool zipf = options_.routing == "zipf";
    routing_ = zipf ? absl::StrCat("zipf ", options_.zipf_exponent) : "uniform";
    absl::StrAppend(&routing_, ", seed ", options_.seed);
    absl::StatusOr<experts::RoutingTrace> trace =
        zipf ? experts::ZipfTrace(options_.seed, options_.zipf_exponent, shape)
             : experts::UniformTrace(options_.seed, shape);
    if (!trace.ok()) return trace.status();
    trace_ = *std::move(trace);
    trace_hash_ = trace_.Hash();
    return absl::OkStatus();
  }
  routing_ = options_.trace;
  TERNION_ASSIGN_OR_RETURN(trace_, experts::LoadTrace(options_.trace));
  trace_hash_ = trace_.Hash();
  const auto check = [&](const char* name, int of_trace, int asked) {
    if (asked == 0 || asked == of_trace) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(options_.trace, " is a trace of ", of_trace, " ", name, ", not of ", asked));
  };
  TERNION_RETURN_IF_ERROR(check("experts", trace_.shape.num_experts, wanted.num_experts));
  return check("experts per token", trace_.shape.top_k, wanted.top_k);
}

absl::Status Report::GatherHosts() {
  const Json own = {{"host", HostName()},
                    {"machine", MachineName()},
                    {"memory", base::HostMemory().capacity_bytes()},
                    {"device_memory", world_.resources().executor->memory->capacity_bytes()},
                    {"interfaces", interfaces_}};
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(world_.transport(), own.dump()));
  for (const std::string& text : texts) {
    hosts_.push_back(Json::parse(text, nullptr, /*allow_exceptions=*/false));
    if (!hosts_.back().is_object()) return absl::InvalidArgumentError("a rank sent a broken text");
  }
  return absl::OkStatus();
}

// Rank 0: what the ranks of a machine hold at most, where every row goes to all ranks: own rows,
// their codes, sums and the sums that are expected; of each row from elsewhere its message, codes,
// outputs and returning message, with the room that buffers grow ahead. Measured, a rank holds
// about as much. On a device it is less; what ranks that share one hold is not added up.
absl::Status Report::CheckMemory() const {
  const double ranks = world_.transport().size();
  const double most =
      static_cast<double>(*std::max_element(options_.tokens.begin(), options_.tokens.end()));
  const double each = most * static_cast<double>(shape_.hidden) * (16 + 32 * (ranks - 1));
  std::map<std::string, int> ranks_of;
  for (const Json& host : hosts_) ++ranks_of[host["machine"].get<std::string>()];
  for (const Json& host : hosts_) {
    const double bytes = each * ranks_of[host["machine"].get<std::string>()];
    const double memory = host["memory"], device_memory = host["device_memory"];
    const std::string name = host["host"];
    std::string lacks;
    if (bytes >= memory) {
      lacks = absl::StrCat(HumanBytes(bytes), " for the ranks of ", name, "; this machine has ",
                           HumanBytes(memory));
    } else if (each >= device_memory) {
      lacks = absl::StrCat(HumanBytes(each), " for a rank of ", name, "; its device has ",
                           HumanBytes(device_memory));
    }
    if (lacks.empty()) continue;
    return absl::InvalidArgumentError(absl::StrCat("--tokens ", most, " needs some ", lacks));
  }
  return absl::OkStatus();
}

absl::Status Report::CheckOptions() {
  if (options_.tokens.empty()) return absl::InvalidArgumentError("--tokens is empty");
  FindNodes();
  TERNION_RETURN_IF_ERROR(ResolveShape());
  if (!world_.is_root()) return absl::OkStatus();
  for (const std::string& path : {options_.json, options_.matrix, options_.save_trace}) {
    TERNION_RETURN_IF_ERROR(CheckWritable(path));
  }
  return ReadLadders();
}

absl::Status Report::Prepare() {
  comm::Transport& transport = world_.transport();
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(transport, CheckOptions()));
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(transport, GatherHosts()));
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(transport, CheckMemory()));
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(transport, ResolveTrace()));
  TERNION_RETURN_IF_ERROR(comm::AgreeOnValue(transport, "trace", trace_hash_));
  absl::Status status;
  if (world_.is_root() && !options_.save_trace.empty()) {
    status = experts::SaveTrace(trace_, options_.save_trace);
  }
  TERNION_RETURN_IF_ERROR(comm::BroadcastStatus(transport, status));
  return comm::AgreeOnStatus(transport, MakePlacements());
}

void Report::FindNodes() {
  const comm::Transport& transport = world_.transport();
  layout_ = experts::NodeLayout::Make(transport);
  std::vector<int> nodes;
  for (int rank = 0; rank < transport.size(); ++rank) {
    nodes.push_back(transport.NodeOf(base::RankId{rank}));
  }
  // The lowest rank of a node counts for it.
  const int self = base::Index(transport.rank());
  const bool first_of_node =
      std::find(nodes.begin(), nodes.end(), nodes[self]) - nodes.begin() == self;
  if (first_of_node) interfaces_ = NetworkInterfaces();
  std::sort(nodes.begin(), nodes.end());
  num_nodes_ = static_cast<int>(std::unique(nodes.begin(), nodes.end()) - nodes.begin());
}

absl::Status Report::ReadLadders() {
  for (const std::string& path : options_.ladders) {
    TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(path));
    Json ladder = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!ladder.is_object() || !ladder.contains("ladder")) {
      return absl::InvalidArgumentError(absl::StrCat(path, " is no report of eval --ladder"));
    }
    ladders_.push_back(std::move(ladder));
  }
  return absl::OkStatus();
}

// Placements are made from the second half of the trace and tried on the first: what they promise
// on the tokens they were made for, they need not hold on others.
absl::Status Report::MakePlacements() {
  const int64_t half = trace_.shape.num_tokens / 2;
  if (half == 0) return absl::InvalidArgumentError("the trace has one token; two are needed");
  const int layers = std::min(trace_.shape.num_layers, kMaxLayers);
  const experts::RoutingTrace past = Part(trace_, layers, half, 2 * half);
  trace_ = Part(trace_, layers, 0, half);
  const int ranks = world_.transport().size();
  placements_.emplace("contiguous",
                      experts::Placement::Contiguous(layers, trace_.shape.num_experts, ranks));
  placements_.emplace("balanced", experts::BalancedPlacement(past, ranks));
  placements_.emplace("local", experts::LocalPlacement(past, ranks));
  for (const auto& [name, placement] : placements_) {
    statistics_[name] = EvaluatePlacement(placement, trace_);
  }
  return absl::OkStatus();
}

absl::StatusOr<CaseResult> Report::RunCase(const WireCase& wire, int64_t tokens) {
  const ExchangeSetup setup = {.hidden = shape_.hidden,
                               .tokens_per_rank = tokens,
                               .trace = &trace_,
                               .layout = has_hierarchy() ? &*layout_ : nullptr,
                               .num_layers = trace_.shape.num_layers,
                               .interfaces = interfaces_};
  ExchangeCase exchange(wire, placements_.at(wire.placement), setup, world_);
  TERNION_ASSIGN_OR_RETURN(const CaseRun run, exchange.Run(options_.seconds));
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(world_.transport(), RunToText(run, world_.transport())));
  if (!world_.is_root()) return CaseResult();
  return CombineRuns(texts, wire, tokens, trace_.shape.num_layers);
}

absl::Status Report::RunCases(std::vector<CaseResult>& results) {
  const std::vector<WireCase> cases =
      Cases(world_.transport().size() > 1, has_hierarchy(), TransportName() == "mpi");
  for (int64_t tokens : options_.tokens) {
    if (world_.is_root()) PrintLadderHeader(tokens);
    for (const WireCase& wire : cases) {
      TERNION_ASSIGN_OR_RETURN(CaseResult result, RunCase(wire, tokens));
      if (!world_.is_root()) continue;
      PrintCase(result);
      results.push_back(std::move(result));
    }
    if (world_.is_root()) PrintSizes(*Find(results, kNarrowest, tokens));
  }
  return absl::OkStatus();
}

absl::Status Report::Run() {
  std::vector<CaseResult> results;
  if (world_.is_root()) PrintHeader();
  const absl::Status status = RunCases(results);
  if (!world_.is_root()) return status;
  if (!options_.json.empty()) {
    TERNION_RETURN_IF_ERROR(WriteJson(options_.json, ToJson(results, status)));
  }
  TERNION_RETURN_IF_ERROR(status);
  PrintFactors(results);
  TERNION_RETURN_IF_ERROR(WriteMatrix(results));
  for (const CaseResult& result : results) {
    if (result.verified) continue;
    return absl::DataLossError(absl::StrCat("sums of ", result.wire.Name(), " are wrong at ",
                                            result.tokens_per_rank, " tokens per rank"));
  }
  return absl::OkStatus();
}

// ---- Telling

void Report::PrintHeader() const {
  const experts::PlacementStatistics& statistics = statistics_.at("contiguous");
  const int ranks = world_.transport().size();
  absl::PrintF(
      "# ternion bench exchange: %s, hidden %d, %d experts, top %d; %d rank%s on %d node%s\n",
      shape_.name, shape_.hidden, trace_.shape.num_experts, trace_.shape.top_k, ranks,
      ranks == 1 ? "" : "s", num_nodes_, num_nodes_ == 1 ? "" : "s");
  absl::PrintF("# device %s, transport %s\n", options_.world.device, TransportName());
  absl::PrintF("# routing %s (%d layers, trace %016x)\n", routing_, trace_.shape.num_layers,
               trace_hash_);
  absl::PrintF(
      "# a token's experts are on %.2f other ranks (uniform routing: %.2f); load max/mean %.2f\n",
      statistics.remote_ranks, statistics.uniform_remote_ranks, statistics.max_over_mean_load);
  if (!several_nodes()) absl::PrintF("# one node: nothing crosses a network\n");
  std::fflush(stdout);
}

void Report::PrintLadderHeader(int64_t tokens) const {
  absl::PrintF("\n# %d token%s per rank; kB per token and layer; time of one layer's exchange\n",
               tokens, tokens == 1 ? "" : "s");
  absl::PrintF("%-38s %8s %8s %8s %8s %7s %9s %9s %9s %8s\n", "# dispatch/combine", "payload",
               "message", "inter", "NIC", "floor", "p50 us", "p90 us", "p99 us", "quality");
  std::fflush(stdout);
}

void Report::PrintCase(const CaseResult& result) const {
  const double message = result.MessageBytes();
  const double floor = FloorBytes(result, shape_.hidden);
  const std::optional<double> quality = QualityChange(ladders_, result.wire);
  absl::PrintF("%-38s %8.2f %8.2f %8.2f %8s %6.1f%% %9.0f %9.0f %9s %8s%s\n", result.wire.Name(),
               result.PayloadBytes() * 1e-3, message * 1e-3, result.InterNodeBytes() * 1e-3,
               several_nodes() ? absl::StrFormat("%.2f", result.NicBytes() * 1e-3) : "-",
               message > 0 ? 100 * floor / message : 100, Percentile(result.total_us, 0.5),
               Percentile(result.total_us, 0.9),
               result.iterations < kSamplesOfP99
                   ? "-"
                   : absl::StrFormat("%.0f", Percentile(result.total_us, 0.99)),
               quality ? absl::StrFormat("%+.3f%%", *quality) : "-",
               result.verified ? "" : "  WRONG SUMS");
  std::fflush(stdout);
}

void Report::PrintSizes(const CaseResult& of) const {
  for (const SizedWire& wire : SizedWires()) {
    absl::PrintF("%-38s %8.2f %8s %8s %8s %7s %9s %9s %9s %8s\n", wire.name,
                 PayloadBytesOf(wire, of, shape_.hidden) * 1e-3, "-", "-", "-", "-", "-", "-", "-",
                 "-");
  }
}

void Report::PrintFactors(const std::vector<CaseResult>& results) const {
  const int64_t tokens = options_.tokens.back();
  absl::PrintF(
      "\n# saved by one switch each, %d tokens per rank: times fewer message bytes, times less "
      "time\n",
      tokens);
  for (const Json& factor : FactorsJson(results, tokens)) {
    absl::PrintF("%-28s %6.2fx %6.2fx   %s -> %s\n", factor["what"].get<std::string>(),
                 factor["bytes"].get<double>(), factor["time"].get<double>(),
                 factor["from"].get<std::string>(), factor["to"].get<std::string>());
  }
  for (const auto& [name, statistics] : statistics_) {
    absl::PrintF("# placement %-10s remote ranks %.3f, load max/mean %.3f\n", name,
                 statistics.remote_ranks, statistics.max_over_mean_load);
  }
  int64_t memory = 0;
  for (int64_t of_rank : results.back().peak_memory_bytes) memory = std::max(memory, of_rank);
  absl::PrintF("# memory of the largest rank: %s\n", HumanBytes(static_cast<double>(memory)));
}

Json Report::ToJson(const std::vector<CaseResult>& results, const absl::Status& status) const {
  Json cases = Json::array(), factors = Json::object(), placements = Json::object();
  Json hosts = Json::array();
  for (const Json& host : hosts_) {
    hosts.push_back({{"host", host["host"]}, {"interfaces", host["interfaces"]}});
  }
  for (const CaseResult& of : results) cases.push_back(CaseToJson(of, shape_.hidden, ladders_));
  for (int64_t tokens : options_.tokens) {
    factors[absl::StrCat(tokens)] = FactorsJson(results, tokens);
  }
  for (const auto& [name, statistics] : statistics_) {
    placements[name] = {{"remote_ranks", statistics.remote_ranks},
                        {"remote_ranks_uniform", statistics.uniform_remote_ranks},
                        {"max_over_mean_load", statistics.max_over_mean_load}};
  }
  Json sizes = Json::array();
  for (int64_t tokens : options_.tokens) {
    const CaseResult* const of = Find(results, kNarrowest, tokens);
    if (of == nullptr) continue;  // an error came before
    for (const SizedWire& wire : SizedWires()) {
      const double bytes = PayloadBytesOf(wire, *of, shape_.hidden);
      sizes.push_back({{"wire", wire.name}, {"tokens_per_rank", tokens}, {"payload_bytes", bytes}});
    }
  }
  return {{"shape", shape_.name},
          {"hidden", shape_.hidden},
          {"experts", trace_.shape.num_experts},
          {"top_k", trace_.shape.top_k},
          {"layers", trace_.shape.num_layers},
          {"ranks", world_.transport().size()},
          {"nodes", num_nodes_},
          {"transport", TransportName()},
          {"device", options_.world.device},
          {"isa", world_.isa()},
          {"threads", world_.num_threads()},
          {"routing", routing_},
          {"seed", options_.seed},
          {"trace_hash", absl::StrFormat("%016x", trace_hash_)},
          {"seconds", options_.seconds},
          {"hosts", hosts},
          {"commit", BuildCommit()},
          {"placements", placements},
          {"cases", cases},
          {"sizes_only", sizes},
          {"factors", factors},
          {"error", status.ok() ? Json() : Json(std::string(status.message()))}};
}

// Lines are senders and columns receivers: the bytes of int4/int4 over the largest entry, as
// the alltoallv benchmark that was proposed for nccl-tests reads them (its pull request 157).
absl::Status Report::WriteMatrix(const std::vector<CaseResult>& results) const {
  if (options_.matrix.empty()) return absl::OkStatus();
  const CaseResult* const result = Find(results, kNarrowest, options_.tokens.back());
  int64_t most = 1;
  for (const std::vector<int64_t>& line : result->sent_bytes) {
    most = std::max(most, *std::max_element(line.begin(), line.end()));
  }
  std::string text;
  for (const std::vector<int64_t>& line : result->sent_bytes) {
    const auto append = [&](std::string* out, int64_t bytes) {
      absl::StrAppend(out, absl::StrFormat("%.6f", static_cast<double>(bytes) / most));
    };
    absl::StrAppend(&text, absl::StrJoin(line, ",", append), "\n");
  }
  absl::PrintF("# %s: fractions of %d bytes\n", options_.matrix, most / result->iterations);
  return base::WriteFileAtomically(options_.matrix, text);
}

}  // namespace

absl::Status BenchExchange(const BenchExchangeOptions& options, World& world) {
  Report report(options, world);
  TERNION_RETURN_IF_ERROR(report.Prepare());
  return report.Run();
}

}  // namespace ternion::launcher
