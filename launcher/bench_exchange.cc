#include "launcher/bench_exchange.h"

#include <sys/resource.h>

#include <algorithm>
#include <cmath>
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
#include "launcher/report.h"
#include "launcher/shapes.h"
#include "launcher/statistics.h"

namespace ternion::launcher {
namespace {

using comm::Phase;
using comm::RowFormat;

constexpr int kSyntheticLayers = 4;  // of a trace made here: enough that layers differ
constexpr int64_t kSyntheticTokens = 1 << 14;
constexpr int kMaxLayers = 8;  // of a recorded trace, the first ones

// ---- What is measured

struct Shape {
  std::string name;
  int64_t hidden = 0;
};

// A case as rank 0 knows it once all ranks have told.
struct CaseResult {
  WireCase wire;
  int64_t tokens_per_rank = 0;
  int iterations = 0;
  bool verified = true;
  uint64_t output_hash = 0;
  std::vector<double> dispatch_us, combine_us, total_us;  // [iteration], the slowest rank's
  Json phases = Json::object();                           // dispatch, combine: sums over ranks
  std::vector<std::vector<int64_t>> sent_bytes;           // [from][to] message bytes
  int64_t inter_node_bytes = 0;
  int64_t bottleneck_bytes = 0;  // of the busiest node's (or, on one node, rank's) busier direction
  int64_t nic_sent_bytes = 0, nic_received_bytes = 0;
  int64_t peak_memory_bytes = 0;  // of the largest rank, so far
  double remote_ranks = 0;        // m: other ranks that hold experts of a token
  double remote_routes = 0;       // experts of a token on other ranks

  // Per token and layer.
  double PerToken(double bytes) const {
    return bytes / static_cast<double>(tokens_per_rank * sent_bytes.size() * iterations);
  }
  double Sum(const char* level) const {
    return phases["dispatch"][level].get<double>() + phases["combine"][level].get<double>();
  }
  double MessageBytes() const { return PerToken(Sum("message_bytes")); }
  double PayloadBytes() const { return PerToken(Sum("payload_bytes")); }
  double InterNodeBytes() const { return PerToken(static_cast<double>(inter_node_bytes)); }
  double NicBytes() const { return PerToken(static_cast<double>(nic_sent_bytes)); }
};

std::vector<WireCase> Cases(bool several_ranks, bool hierarchical) {
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
  if (several_ranks) {
    cases.push_back({bf16, bf16, RowSet::kToAllRanks});
    cases.push_back({int4, int4});
    cases.back().all_to_all = true;
  }
  return cases;
}

// Wires of other systems that this program does not speak: their sizes, on this trace.
struct SizedWire {
  const char* name;
  bool dedup;
  double (*dispatch)(double hidden);  // bytes of a row
  double (*combine)(double hidden);
};
const SizedWire kSizedWires[] = {
    // DeepEP low-latency: E4M3 with an fp32 scale per 128, one copy per expert; bf16 back.
    {"FP8/bf16, no dedup (DeepEP LL sizes)", false, [](double h) { return h + h / 128 * 4; },
     [](double h) { return 2 * h; }},
    {"FP8/bf16 (DeepEP sizes, dedup)", true, [](double h) { return h + h / 128 * 4; },
     [](double h) { return 2 * h; }},
    // TensorRT-LLM: NVFP4, an FP8 scale per 16 and an fp32 scale per row; FP8 back.
    {"NVFP4/FP8 (TensorRT-LLM sizes)", true, [](double h) { return h / 2 + h / 16 + 4; },
     [](double h) { return h; }},
};

// ---- Collecting

Json CountsJson(const CaseRun& run, const comm::Transport& transport, comm::Direction direction,
                Phase phase) {
  Json peers = Json::array();
  for (int rank = 0; rank < transport.size(); ++rank) {
    const comm::TrafficCount count = run.traffic.at(direction, phase, base::RankId{rank});
    peers.push_back({count.payload_bytes, count.message_bytes, count.messages, count.rows});
  }
  return peers;
}

Json ToJson(const CaseRun& run, const comm::Transport& transport) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  return {{"node", transport.NodeOf(transport.rank())},
          {"verified", run.verified},
          {"output_hash", run.output_hash},
          {"dispatch_us", run.dispatch_us},
          {"combine_us", run.combine_us},
          {"remote_visits", run.remote_visits},
          {"remote_routes", run.remote_routes},
          {"dispatch", CountsJson(run, transport, comm::Direction::kSent, Phase::kDispatch)},
          {"combine", CountsJson(run, transport, comm::Direction::kSent, Phase::kCombine)},
          {"nic_sent", run.nic.sent_bytes},
          {"nic_received", run.nic.received_bytes},
          {"memory", int64_t{usage.ru_maxrss} * 1024}};
}

void AddTimes(const Json& rank, CaseResult& result) {
  result.iterations = static_cast<int>(rank["dispatch_us"].size());
  result.dispatch_us.resize(result.iterations);
  result.combine_us.resize(result.iterations);
  result.total_us.resize(result.iterations);
  for (int i = 0; i < result.iterations; ++i) {
    const double dispatch = rank["dispatch_us"][i], combine = rank["combine_us"][i];
    result.dispatch_us[i] = std::max(result.dispatch_us[i], dispatch);
    result.combine_us[i] = std::max(result.combine_us[i], combine);
    result.total_us[i] = std::max(result.total_us[i], dispatch + combine);
  }
}

// Adds what `rank` sent; `nodes` are all ranks'.
void AddTraffic(const Json& told, size_t rank, const std::vector<int>& nodes, CaseResult& result) {
  const char* const levels[] = {"payload_bytes", "message_bytes", "messages", "rows"};
  for (const char* phase : {"dispatch", "combine"}) {
    Json& sums = result.phases[phase];
    for (const char* scope : {"intra_node", "inter_node"}) {
      for (const char* level : levels) {
        if (!sums[scope].contains(level)) sums[scope][level] = int64_t{0};
        if (!sums.contains(level)) sums[level] = int64_t{0};
      }
    }
    for (size_t to = 0; to < nodes.size(); ++to) {
      if (to == rank) continue;
      const char* const scope = nodes[to] == nodes[rank] ? "intra_node" : "inter_node";
      for (int level = 0; level < 4; ++level) {
        const int64_t value = told[phase][to][level];
        sums[levels[level]] = sums[levels[level]].get<int64_t>() + value;
        sums[scope][levels[level]] = sums[scope][levels[level]].get<int64_t>() + value;
      }
      result.sent_bytes[rank][to] += told[phase][to][1].get<int64_t>();
    }
  }
}

// The busier direction of the busiest link: a node's, or a rank's where there is one node.
int64_t BottleneckBytes(const std::vector<std::vector<int64_t>>& sent, std::vector<int> nodes) {
  const bool one_node =
      std::count(nodes.begin(), nodes.end(), nodes[0]) == static_cast<int64_t>(nodes.size());
  for (size_t rank = 0; rank < nodes.size() && one_node; ++rank)
    nodes[rank] = static_cast<int>(rank);
  std::map<int, int64_t> out, in;
  for (size_t from = 0; from < sent.size(); ++from) {
    for (size_t to = 0; to < sent.size(); ++to) {
      if (nodes[from] == nodes[to]) continue;
      out[nodes[from]] += sent[from][to];
      in[nodes[to]] += sent[from][to];
    }
  }
  int64_t most = 0;
  for (const auto& [node, bytes] : out) most = std::max(most, bytes);
  for (const auto& [node, bytes] : in) most = std::max(most, bytes);
  return most;
}

absl::StatusOr<CaseResult> Combine(const std::vector<std::string>& texts, const WireCase& wire,
                                   int64_t tokens_per_rank, int num_layers) {
  CaseResult result;
  result.wire = wire;
  result.tokens_per_rank = tokens_per_rank;
  result.sent_bytes.assign(texts.size(), std::vector<int64_t>(texts.size()));
  std::vector<Json> ranks;
  std::vector<int> nodes;
  for (const std::string& text : texts) {
    ranks.push_back(Json::parse(text, nullptr, /*allow_exceptions=*/false));
    if (!ranks.back().is_object()) return absl::InvalidArgumentError("a rank sent a broken report");
    nodes.push_back(ranks.back()["node"]);
  }
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const Json& told = ranks[rank];
    AddTimes(told, result);
    AddTraffic(told, rank, nodes, result);
    result.verified = result.verified && told["verified"].get<bool>();
    result.output_hash = result.output_hash * 31 + told["output_hash"].get<uint64_t>();
    result.nic_sent_bytes += told["nic_sent"].get<int64_t>();
    result.nic_received_bytes += told["nic_received"].get<int64_t>();
    result.peak_memory_bytes = std::max(result.peak_memory_bytes, told["memory"].get<int64_t>());
  }
  const double tokens = static_cast<double>(tokens_per_rank * num_layers * ranks.size());
  for (const Json& told : ranks) {
    result.remote_ranks += told["remote_visits"].get<double>() / tokens;
    result.remote_routes += told["remote_routes"].get<double>() / tokens;
  }
  for (const char* phase : {"dispatch", "combine"}) {
    result.inter_node_bytes += result.phases[phase]["inter_node"]["message_bytes"].get<int64_t>();
  }
  result.bottleneck_bytes = BottleneckBytes(result.sent_bytes, nodes);
  return result;
}

// ---- Figures

const WireCase kNarrowest = {RowFormat::kInt4, RowFormat::kInt4};

const CaseResult* Find(const std::vector<CaseResult>& results, const WireCase& wire,
                       int64_t tokens) {
  for (const CaseResult& result : results) {
    if (result.tokens_per_rank == tokens && result.wire.Name() == wire.Name()) return &result;
  }
  return nullptr;
}

// Bytes of the scales of one row, there and back.
double DispatchScaleBytes(RowFormat format) {
  return format == RowFormat::kInt8 || format == RowFormat::kInt4 ? sizeof(float) : 0;
}

// B_min of a token and layer: codes, scales, and an id and a gate weight for each expert elsewhere.
double FloorBytes(const CaseResult& result, int64_t hidden) {
  const double row = static_cast<double>(kernels::CodeBytes(result.wire.dispatch, hidden)) +
                     DispatchScaleBytes(result.wire.dispatch) +
                     static_cast<double>(kernels::EncodedRowBytes(result.wire.combine, hidden));
  const double route = sizeof(uint16_t) + sizeof(float);
  return result.remote_ranks * row + result.remote_routes * route;
}

// The bits-per-byte change of this wire, from a ladder; empty where none has it.
std::optional<double> QualityChange(const std::vector<Json>& ladders, const WireCase& wire) {
  for (const Json& ladder : ladders) {
    for (const Json& rung : ladder["ladder"]) {
      if (rung["exact"].get<bool>() || rung["kv"] != ladder["ladder"][0]["kv"]) continue;
      if (rung["dispatch"] != std::string(comm::RowFormatName(wire.dispatch))) continue;
      if (rung["combine"] != std::string(comm::RowFormatName(wire.combine))) continue;
      return rung["change_percent"].get<double>();
    }
  }
  return std::nullopt;
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

  // Before anything is timed.
  absl::Status Prepare();
  absl::Status Run();

 private:
  void FindNodes();
  absl::Status ReadLadders();
  absl::Status ResolveShape();
  absl::Status ResolveTrace();
  absl::Status CheckMemory() const;
  absl::Status MakePlacements();
  absl::StatusOr<CaseResult> RunCase(const WireCase& wire, int64_t tokens);

  void PrintHeader() const;
  void PrintLadderHeader(int64_t tokens) const;
  void PrintCase(const CaseResult& result) const;
  void PrintSizes(const CaseResult& of) const;
  void PrintFactors(const std::vector<CaseResult>& results) const;
  Json CaseJson(const CaseResult& result) const;
  Json ToJson(const std::vector<CaseResult>& results) const;
  absl::Status WriteMatrix(const std::vector<CaseResult>& results) const;
  bool several_nodes() const { return num_nodes_ > 1; }
  // Several nodes, of several ranks each, equally many.
  bool has_hierarchy() const {
    return several_nodes() && layout_.ok() && layout_->inside.size() > 1;
  }

  const BenchExchangeOptions& options_;
  World& world_;
  Shape shape_;
  experts::RoutingTrace trace_;
  std::string routing_;
  int num_nodes_ = 1;
  absl::StatusOr<experts::NodeLayout> layout_;
  std::vector<std::string> interfaces_;
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
    return absl::OkStatus();
  }
  routing_ = options_.trace;
  TERNION_ASSIGN_OR_RETURN(trace_, experts::LoadTrace(options_.trace));
  const auto check = [&](const char* name, int of_trace, int asked) {
    if (asked == 0 || asked == of_trace) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(options_.trace, " is a trace of ", of_trace, " ", name, ", not of ", asked));
  };
  TERNION_RETURN_IF_ERROR(check("experts", trace_.shape.num_experts, wanted.num_experts));
  return check("experts per token", trace_.shape.top_k, wanted.top_k);
}

// What a case holds at most on a rank, for one that may be sent every row of the others.
absl::Status Report::CheckMemory() const {
  const double ranks = world_.transport().size();
  const double most =
      static_cast<double>(*std::max_element(options_.tokens.begin(), options_.tokens.end()));
  const double row = static_cast<double>(shape_.hidden) * sizeof(float);
  const double copies =
      trace_.shape.top_k > 0 ? std::min<double>(trace_.shape.top_k, ranks) : ranks;
  const double received = most * copies;
  // Own rows with their sums and codes, received rows with their outputs, messages both ways.
  const double bytes = ranks * row * (most * 4 + received * 4);
  const double memory = static_cast<double>(base::MemoryBytes());
  if (several_nodes() || bytes < memory) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("--tokens ", most, " needs some ",
                                                 HumanBytes(bytes), " for ", ranks,
                                                 " ranks; this machine has ", HumanBytes(memory)));
}

absl::Status Report::Prepare() {
  if (options_.tokens.empty()) return absl::InvalidArgumentError("--tokens is empty");
  FindNodes();
  TERNION_RETURN_IF_ERROR(ResolveShape());
  TERNION_RETURN_IF_ERROR(CheckMemory());
  if (world_.is_root()) {
    TERNION_RETURN_IF_ERROR(CheckWritable(options_.json));
    TERNION_RETURN_IF_ERROR(CheckWritable(options_.matrix));
    TERNION_RETURN_IF_ERROR(ReadLadders());
  }
  TERNION_RETURN_IF_ERROR(ResolveTrace());
  return MakePlacements();
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
  const Json own = launcher::ToJson(run, world_.transport());
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(world_.transport(), own.dump()));
  if (!world_.is_root()) return CaseResult();
  return Combine(texts, wire, tokens, trace_.shape.num_layers);
}

absl::Status Report::Run() {
  std::vector<CaseResult> results;
  if (world_.is_root()) PrintHeader();
  for (int64_t tokens : options_.tokens) {
    if (world_.is_root()) PrintLadderHeader(tokens);
    for (const WireCase& wire : Cases(world_.transport().size() > 1, has_hierarchy())) {
      TERNION_ASSIGN_OR_RETURN(CaseResult result, RunCase(wire, tokens));
      if (!world_.is_root()) continue;
      PrintCase(result);
      results.push_back(std::move(result));
    }
    if (world_.is_root()) PrintSizes(*Find(results, kNarrowest, tokens));
  }
  if (!world_.is_root()) return absl::OkStatus();
  PrintFactors(results);
  TERNION_RETURN_IF_ERROR(WriteMatrix(results));
  if (options_.json.empty()) return absl::OkStatus();
  return WriteJson(options_.json, ToJson(results));
}

// ---- Telling

void Report::PrintHeader() const {
  const experts::PlacementStatistics& statistics = statistics_.at("contiguous");
  const int ranks = world_.transport().size();
  absl::PrintF(
      "# ternion bench exchange: %s, hidden %d, %d experts, top %d; %d rank%s on %d node%s\n",
      shape_.name, shape_.hidden, trace_.shape.num_experts, trace_.shape.top_k, ranks,
      ranks == 1 ? "" : "s", num_nodes_, num_nodes_ == 1 ? "" : "s");
  absl::PrintF("# routing %s (%d layers, trace %016x)\n", routing_, trace_.shape.num_layers,
               trace_.Hash());
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
  absl::PrintF("%-38s %8.2f %8.2f %8.2f %8s %6.1f%% %9.0f %9.0f %9.0f %8s%s\n", result.wire.Name(),
               result.PayloadBytes() * 1e-3, message * 1e-3, result.InterNodeBytes() * 1e-3,
               several_nodes() ? absl::StrFormat("%.2f", result.NicBytes() * 1e-3) : "-",
               message > 0 ? 100 * floor / message : 100, Percentile(result.total_us, 0.5),
               Percentile(result.total_us, 0.9), Percentile(result.total_us, 0.99),
               quality ? absl::StrFormat("%+.3f%%", *quality) : "-",
               result.verified ? "" : "  WRONG SUMS");
  std::fflush(stdout);
}

// `of`: a case of the same tokens.
double PayloadBytes(const SizedWire& wire, const CaseResult& of, int64_t hidden) {
  const double copies = wire.dedup ? of.remote_ranks : of.remote_routes;
  const double elements = static_cast<double>(hidden);
  return copies * (wire.dispatch(elements) + wire.combine(elements));
}

void Report::PrintSizes(const CaseResult& of) const {
  for (const SizedWire& wire : kSizedWires) {
    absl::PrintF("%-38s %8.2f %8s %8s %8s %7s %9s %9s %9s %8s\n", wire.name,
                 ternion::launcher::PayloadBytes(wire, of, shape_.hidden) * 1e-3, "-", "-", "-",
                 "-", "-", "-", "-", "-");
  }
}

// Two cases that differ in one switch.
struct Factor {
  const char* what;
  WireCase without, with;
};

std::vector<Factor> Factors() {
  const WireCase bf16 = {RowFormat::kBf16, RowFormat::kBf16};
  const WireCase int4 = {RowFormat::kInt4, RowFormat::kInt4};
  const auto with = [](WireCase wire, auto edit) {
    edit(wire);
    return wire;
  };
  return {
      {"precision", bf16, int4},
      {"dedup", with(int4, [](auto& w) { w.rows = RowSet::kOncePerExpert; }), int4},
      {"dedup, at bf16", with(bf16, [](auto& w) { w.rows = RowSet::kOncePerExpert; }), bf16},
      {"local pre-sum", with(int4, [](auto& w) { w.presum = false; }), int4},
      {"once per node", int4, with(int4, [](auto& w) { w.hierarchical = true; })},
      {"own messages, not alltoallv", with(int4, [](auto& w) { w.all_to_all = true; }), int4},
      {"placement balanced", int4, with(int4, [](auto& w) { w.placement = "balanced"; })},
      {"placement local", int4, with(int4, [](auto& w) { w.placement = "local"; })},
      {"precision and dedup", with(bf16, [](auto& w) { w.rows = RowSet::kOncePerExpert; }), int4},
  };
}

Json Ratio(double a, double b) { return b > 0 ? Json(a / b) : Json(); }

Json FactorsJson(const std::vector<CaseResult>& results, int64_t tokens) {
  Json factors = Json::array();
  for (const Factor& factor : Factors()) {
    const CaseResult* const without = Find(results, factor.without, tokens);
    const CaseResult* const with = Find(results, factor.with, tokens);
    if (without == nullptr || with == nullptr || with->MessageBytes() == 0) continue;
    factors.push_back(
        {{"what", factor.what},
         {"from", factor.without.Name()},
         {"to", factor.with.Name()},
         {"bytes", without->MessageBytes() / with->MessageBytes()},
         {"inter_node_bytes", Ratio(without->InterNodeBytes(), with->InterNodeBytes())},
         {"time", Percentile(without->total_us, 0.5) / Percentile(with->total_us, 0.5)}});
  }
  return factors;
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
  for (const CaseResult& result : results) memory = std::max(memory, result.peak_memory_bytes);
  absl::PrintF("# memory of the largest rank: %s\n", HumanBytes(static_cast<double>(memory)));
}

Json TimesJson(const std::vector<double>& us) {
  return {
      {"p50", Percentile(us, 0.5)}, {"p90", Percentile(us, 0.9)}, {"p99", Percentile(us, 0.99)}};
}

Json Report::CaseJson(const CaseResult& result) const {
  const std::optional<double> quality = QualityChange(ladders_, result.wire);
  const double floor = FloorBytes(result, shape_.hidden);
  return {
      {"wire", result.wire.Name()},
      {"dispatch_format", std::string(comm::RowFormatName(result.wire.dispatch))},
      {"combine_format", std::string(comm::RowFormatName(result.wire.combine))},
      {"dedup", result.wire.rows == RowSet::kOncePerRank},
      {"presum", result.wire.presum},
      {"placement", result.wire.placement},
      {"tokens_per_rank", result.tokens_per_rank},
      {"iterations", result.iterations},
      {"verified", result.verified},
      {"output_hash", absl::StrFormat("%016x", result.output_hash)},
      {"per_token_and_layer",
       {{"payload_bytes", result.PayloadBytes()},
        {"message_bytes", result.MessageBytes()},
        {"inter_node_bytes", result.InterNodeBytes()},
        {"nic_bytes", result.NicBytes()},
        {"floor_bytes", floor},
        {"bottleneck_link_bytes", result.PerToken(static_cast<double>(result.bottleneck_bytes))}}},
      {"efficiency", result.MessageBytes() > 0 ? floor / result.MessageBytes() : 1.0},
      {"traffic", result.phases},
      {"sent_bytes", result.sent_bytes},
      {"nic",
       {{"sent_bytes", result.nic_sent_bytes}, {"received_bytes", result.nic_received_bytes}}},
      {"time_us",
       {{"dispatch", TimesJson(result.dispatch_us)},
        {"combine", TimesJson(result.combine_us)},
        {"total", TimesJson(result.total_us)}}},
      {"quality_change_percent", quality ? Json(*quality) : Json()},
      {"peak_memory_bytes", result.peak_memory_bytes}};
}

Json Report::ToJson(const std::vector<CaseResult>& results) const {
  Json cases = Json::array(), factors = Json::object(), placements = Json::object();
  for (const CaseResult& result : results) cases.push_back(CaseJson(result));
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
    for (const SizedWire& wire : kSizedWires) {
      const double bytes =
          ternion::launcher::PayloadBytes(wire, *Find(results, kNarrowest, tokens), shape_.hidden);
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
          {"transport", world_.transport().size() > 1 ? "mpi" : "none"},
          {"isa", world_.isa()},
          {"threads", world_.num_threads()},
          {"routing", routing_},
          {"seed", options_.seed},
          {"trace_hash", absl::StrFormat("%016x", trace_.Hash())},
          {"interfaces", interfaces_},
          {"commit", BuildCommit()},
          {"placements", placements},
          {"cases", cases},
          {"sizes_only", sizes},
          {"factors", factors}};
}

// Lines are senders and columns receivers, in bytes of one exchange of the last case of int4/int4.
absl::Status Report::WriteMatrix(const std::vector<CaseResult>& results) const {
  if (options_.matrix.empty()) return absl::OkStatus();
  const CaseResult* const result = Find(results, kNarrowest, options_.tokens.back());
  std::string text;
  for (const std::vector<int64_t>& line : result->sent_bytes) {
    std::vector<int64_t> each;
    for (int64_t bytes : line) each.push_back(bytes / result->iterations);
    absl::StrAppend(&text, absl::StrJoin(each, ","), "\n");
  }
  return base::WriteFileAtomically(options_.matrix, text);
}

}  // namespace

absl::Status BenchExchange(const BenchExchangeOptions& options, World& world) {
  Report report(options, world);
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world.transport(), report.Prepare()));
  return report.Run();
}

}  // namespace ternion::launcher
