#include "launcher/exchange_result.h"

#include <sys/resource.h>

#include <algorithm>
#include <map>

#include "absl/strings/str_format.h"
#include "comm/codec.h"
#include "launcher/statistics.h"
#include "xxhash.h"

namespace ternion::launcher {
namespace {

using comm::Phase;
using comm::RowFormat;

// By peer: what was sent, and the message bytes that were received.
Json CountsJson(const CaseRun& run, const comm::Transport& transport, Phase phase) {
  Json peers = Json::array();
  for (int rank = 0; rank < transport.size(); ++rank) {
    const auto count = [&](comm::Direction direction) {
      return run.traffic.at(direction, phase, base::RankId{rank});
    };
    const comm::TrafficCount sent = count(comm::Direction::kSent);
    peers.push_back({sent.payload_bytes, sent.message_bytes, sent.messages, sent.rows,
                     count(comm::Direction::kReceived).message_bytes});
  }
  return peers;
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
      result.received_bytes[rank][to] += told[phase][to][4].get<int64_t>();
    }
  }
}

// Of one exchange, the busier direction of the busiest link: a node's, or a rank's where there is
// one node. `sent` is [from][to].
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

// Of a round over the layers: each layer's dispatch and combine waits for its own busiest link.
int64_t BottleneckBytesOfRound(const std::vector<Json>& ranks, const std::vector<int>& nodes,
                               int num_layers) {
  int64_t sum = 0;
  for (int layer = 0; layer < num_layers; ++layer) {
    for (const char* phase : {"dispatch", "combine"}) {
      std::vector<std::vector<int64_t>> sent;
      for (const Json& told : ranks) sent.push_back(told["layer_bytes"][layer][phase]);
      sum += BottleneckBytes(sent, nodes);
    }
  }
  return sum;
}

// Bytes of the scales of one row, there and back.
double DispatchScaleBytes(RowFormat format) {
  return format == RowFormat::kInt8 || format == RowFormat::kInt4 ? sizeof(float) : 0;
}

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

const char* RowSetName(RowSet rows) {
  if (rows == RowSet::kOncePerExpert) return "once per expert";
  return rows == RowSet::kToAllRanks ? "to all ranks" : "once per rank";
}

Json Ratio(double a, double b) { return b > 0 ? Json(a / b) : Json(); }

Json TimesJson(const std::vector<double>& us) {
  const bool many = us.size() >= kSamplesOfP99;
  return {{"p50", Percentile(us, 0.5)},
          {"p90", Percentile(us, 0.9)},
          {"p99", many ? Json(Percentile(us, 0.99)) : Json()},
          {"max", Percentile(us, 1)}};
}

}  // namespace

std::string RunToText(const CaseRun& run, const comm::Transport& transport) {
  struct rusage usage;
  getrusage(RUSAGE_SELF, &usage);
  Json layers = Json::array();
  for (const LayerBytes& bytes : run.layer_bytes) {
    layers.push_back({{"dispatch", bytes.dispatch}, {"combine", bytes.combine}});
  }
  const Json json = {{"node", transport.NodeOf(transport.rank())},
                     {"verified", run.verified},
                     {"output_hash", run.output_hash},
                     {"dispatch_us", run.dispatch_us},
                     {"combine_us", run.combine_us},
                     {"remote_visits", run.remote_visits},
                     {"remote_routes", run.remote_routes},
                     {"dispatch", CountsJson(run, transport, Phase::kDispatch)},
                     {"combine", CountsJson(run, transport, Phase::kCombine)},
                     {"layer_bytes", layers},
                     {"nic_sent", run.nic.sent_bytes},
                     {"nic_received", run.nic.received_bytes},
                     {"memory", int64_t{usage.ru_maxrss} * 1024}};
  return json.dump();
}

absl::StatusOr<CaseResult> CombineRuns(const std::vector<std::string>& texts, const WireCase& wire,
                                       int64_t tokens_per_rank, int num_layers) {
  CaseResult result;
  result.wire = wire;
  result.tokens_per_rank = tokens_per_rank;
  result.sent_bytes.assign(texts.size(), std::vector<int64_t>(texts.size()));
  result.received_bytes = result.sent_bytes;
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
    const uint64_t hash = told["output_hash"];
    result.output_hash = XXH3_64bits_withSeed(&hash, sizeof(hash), result.output_hash);
    result.nic_sent_bytes += told["nic_sent"].get<int64_t>();
    result.nic_received_bytes += told["nic_received"].get<int64_t>();
    result.peak_memory_bytes.push_back(told["memory"].get<int64_t>());
  }
  const double tokens = static_cast<double>(tokens_per_rank * num_layers * ranks.size());
  for (const Json& told : ranks) {
    result.remote_ranks += told["remote_visits"].get<double>() / tokens;
    result.remote_routes += told["remote_routes"].get<double>() / tokens;
  }
  for (const char* phase : {"dispatch", "combine"}) {
    result.inter_node_bytes += result.phases[phase]["inter_node"]["message_bytes"].get<int64_t>();
  }
  result.bottleneck_bytes =
      static_cast<double>(BottleneckBytesOfRound(ranks, nodes, num_layers)) / tokens;
  return result;
}

const CaseResult* Find(const std::vector<CaseResult>& results, const WireCase& wire,
                       int64_t tokens) {
  for (const CaseResult& result : results) {
    if (result.tokens_per_rank == tokens && result.wire.Name() == wire.Name()) return &result;
  }
  return nullptr;
}

double FloorBytes(const CaseResult& result, int64_t hidden) {
  const double row = static_cast<double>(kernels::CodeBytes(result.wire.dispatch, hidden)) +
                     DispatchScaleBytes(result.wire.dispatch) +
                     static_cast<double>(kernels::EncodedRowBytes(result.wire.combine, hidden));
  const double route = sizeof(uint16_t) + sizeof(float);
  return result.remote_ranks * row + result.remote_routes * route;
}

std::span<const SizedWire> SizedWires() { return kSizedWires; }

double PayloadBytesOf(const SizedWire& wire, const CaseResult& of, int64_t hidden) {
  const double copies = wire.dedup ? of.remote_ranks : of.remote_routes;
  const double elements = static_cast<double>(hidden);
  return copies * (wire.dispatch(elements) + wire.combine(elements));
}

std::optional<double> QualityChange(const std::vector<Json>& ladders, const WireCase& wire) {
  if (wire.rows != RowSet::kOncePerRank || !wire.presum || wire.hierarchical) return std::nullopt;
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

Json CaseToJson(const CaseResult& result, int64_t hidden, const std::vector<Json>& ladders) {
  const std::optional<double> quality = QualityChange(ladders, result.wire);
  const double floor = FloorBytes(result, hidden);
  return {{"wire", result.wire.Name()},
          {"dispatch_format", std::string(comm::RowFormatName(result.wire.dispatch))},
          {"combine_format", std::string(comm::RowFormatName(result.wire.combine))},
          {"rows", RowSetName(result.wire.rows)},
          {"presum", result.wire.presum},
          {"hierarchical", result.wire.hierarchical},
          {"alltoallv", result.wire.all_to_all},
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
            {"remote_ranks", result.remote_ranks},
            {"bottleneck_link_bytes", result.bottleneck_bytes}}},
          {"efficiency", result.MessageBytes() > 0 ? floor / result.MessageBytes() : 1.0},
          {"traffic", result.phases},
          {"sent_bytes", result.sent_bytes},
          {"received_bytes", result.received_bytes},
          {"nic",
           {{"sent_bytes", result.nic_sent_bytes}, {"received_bytes", result.nic_received_bytes}}},
          {"time_us",
           {{"dispatch", TimesJson(result.dispatch_us)},
            {"combine", TimesJson(result.combine_us)},
            {"total", TimesJson(result.total_us)}}},
          {"quality_change_percent", quality ? Json(*quality) : Json()},
          {"peak_memory_bytes", result.peak_memory_bytes}};
}

}  // namespace ternion::launcher
