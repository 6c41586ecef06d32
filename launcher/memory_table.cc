#include "launcher/memory_table.h"

#include <algorithm>
#include <optional>

#include "absl/strings/str_format.h"
#include "base/status.h"
#include "comm/collective.h"

namespace ternion::launcher {
namespace {

Json TernaryJson(const runtime::WeightSizes::Ternary& of) {
  return {{"bytes", of.bytes}, {"bits_per_weight", 8.0 * of.bytes / of.weights}};
}

// What there is, by kind.
Json WeightsJson(const runtime::WeightSizes& sizes) {
  Json json = Json::object();
  json["attention"] = TernaryJson(sizes.attention);
  if (sizes.local_ffn.weights > 0) json["ffn"] = TernaryJson(sizes.local_ffn);
  if (sizes.experts.weights > 0) json["experts"] = TernaryJson(sizes.experts);
  if (sizes.gate_bytes > 0) json["gates"] = {{"bytes", sizes.gate_bytes}};
  json["embedding"] = {{"bytes", sizes.embedding_bytes}};
  if (sizes.head_bytes > 0) json["head"] = {{"bytes", sizes.head_bytes}};
  return json;
}

// Of this rank.
Json MemoryJson(const runtime::Engine& engine, World& world) {
  const base::Memory& memory = *world.resources().executor->memory;
  const runtime::WeightSizes sizes = engine.model().weight_sizes();
  const int64_t allocated = memory.allocated_bytes();
  // A device says what the driver and others took of it; the host's memory is shared by its ranks.
  const std::optional<int64_t> free = memory.free_bytes();
  const int64_t total =
      free ? memory.capacity_bytes()
           : memory.capacity_bytes() / static_cast<int64_t>(world.transport().ranks_of_node());
  const int64_t left = free ? *free : total - allocated;
  return {{"rank", base::Index(world.transport().rank())},
          {"where", free ? "device" : "host"},
          {"bytes", total},
          {"weights", WeightsJson(sizes)},
          {"kv", {{"tokens", engine.kv_tokens()}, {"bytes", engine.kv_bytes()}}},
          {"rest_bytes", allocated - sizes.bytes() - engine.kv_bytes()},
          {"others_bytes", std::max<int64_t>(0, total - left - allocated)},
          {"left_bytes", left}};
}

void PrintLine(const std::string& what, const Json& bytes, const std::string& more = "") {
  absl::PrintF("%-24s %10s%s%s\n", what, HumanBytes(bytes.get<double>()), more.empty() ? "" : "  ",
               more);
}

}  // namespace

absl::StatusOr<Json> CollectMemory(const runtime::Engine& engine, World& world) {
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(world.transport(), MemoryJson(engine, world).dump()));
  Json all = Json::array();
  for (const std::string& text : texts) {
    Json of_rank = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!of_rank.is_object()) return absl::InvalidArgumentError("a rank sent a malformed report");
    all.push_back(std::move(of_rank));
  }
  return all;
}

void PrintMemory(const Json& memory) {
  const Json* fullest = &memory[0];
  for (const Json& of_rank : memory) {
    if (of_rank["left_bytes"] < (*fullest)["left_bytes"]) fullest = &of_rank;
  }
  const Json& of = *fullest;
  const bool on_device = of["where"] == "device";
  absl::PrintF("# memory of rank %d", of["rank"].get<int>());
  if (memory.size() > 1) absl::PrintF(", which has least left of %d", memory.size());
  absl::PrintF("\n");
  PrintLine(on_device ? "the device's" : "its share of the host's", of["bytes"]);
  for (const auto& [kind, weights] : of["weights"].items()) {
    PrintLine(
        "  " + kind, weights["bytes"],
        weights.contains("bits_per_weight")
            ? absl::StrFormat("%.2f bits per weight", weights["bits_per_weight"].get<double>())
            : "");
  }
  const Json& kv = of["kv"];
  const int64_t tokens = kv["tokens"], bytes = kv["bytes"];
  PrintLine("  KV cache", bytes,
            absl::StrFormat("%d tokens of %s", tokens,
                            HumanBytes(static_cast<double>(bytes) / static_cast<double>(tokens))));
  PrintLine("  activations and others", of["rest_bytes"]);
  if (on_device) PrintLine("  driver and others", of["others_bytes"]);
  PrintLine("left", of["left_bytes"]);
}

}  // namespace ternion::launcher
