#include <cstdio>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status.h"
#include "launcher/commands.h"
#include "launcher/report.h"
#include "runtime/checkpoint.h"

namespace ternion::launcher {
namespace {

using runtime::ModelConfig;
using runtime::TensorView;

void PrintConfig(const ModelConfig& config) {
  std::printf("%s: %d layers, hidden %lld, %d heads (%d key/value) of %d, vocabulary %lld\n",
              config.model_type.c_str(), config.num_layers, static_cast<long long>(config.hidden),
              config.heads, config.kv_heads, config.head_dim,
              static_cast<long long>(config.vocab_size));
  if (config.moe()) {
    std::printf("%d experts, top-%d, intermediate %lld", config.num_experts, config.top_k,
                static_cast<long long>(config.expert_intermediate));
    if (config.shared_intermediate > 0) {
      std::printf(", a shared expert of %lld", static_cast<long long>(config.shared_intermediate));
    }
    if (config.num_dense_layers > 0) {
      std::printf("; dense layers first: %d, intermediate %lld", config.num_dense_layers,
                  static_cast<long long>(config.dense_intermediate));
    }
    std::printf("\n");
  } else {
    std::printf("dense, intermediate %lld\n", static_cast<long long>(config.dense_intermediate));
  }
  std::printf("ternary weights: %s, weight_scale %s\n",
              config.quantization.online ? "float masters, ternarized at load" : "packed",
              config.quantization.scale_divides ? "divides (1/g)" : "multiplies (g)");
  std::printf("activations: %d bits; KV cache: %d bits\n", config.act_bits, config.kv_bits);
}

// (layer, expert) of a tensor named "model.layers.L.mlp.experts.E...", if it is one.
bool ParseExpert(absl::string_view name, std::pair<int, int>& expert) {
  constexpr absl::string_view kLayers = "model.layers.", kExperts = ".mlp.experts.";
  const size_t at = name.find(kExperts);
  if (!absl::StartsWith(name, kLayers) || at == absl::string_view::npos) return false;
  const absl::string_view layer = name.substr(kLayers.size(), at - kLayers.size());
  absl::string_view rest = name.substr(at + kExperts.size());
  rest = rest.substr(0, rest.find('.'));
  return absl::SimpleAtoi(layer, &expert.first) && absl::SimpleAtoi(rest, &expert.second);
}

}  // namespace

absl::Status Inspect(const InspectOptions& options) {
  TERNION_ASSIGN_OR_RETURN(const runtime::Checkpoint checkpoint,
                           runtime::Checkpoint::Open(options.model));
  PrintConfig(checkpoint.config());
  std::map<std::pair<int, int>, int64_t> expert_bytes;
  int64_t total_bytes = 0, routed_bytes = 0;
  for (const std::string& name : checkpoint.tensors().Names()) {
    const TensorView& tensor = *checkpoint.tensors().Find(name);
    const int64_t bytes = tensor.bytes();
    std::printf("%-64s %-5s [%s]  %s\n", name.c_str(),
                std::string(runtime::DTypeName(tensor.dtype)).c_str(),
                absl::StrJoin(tensor.shape, ", ").c_str(),
                HumanBytes(static_cast<double>(bytes)).c_str());
    total_bytes += bytes;
    std::pair<int, int> expert;
    if (!ParseExpert(name, expert)) continue;
    expert_bytes[expert] += bytes;
    routed_bytes += bytes;
  }
  int64_t largest = 0;
  for (const auto& [expert, bytes] : expert_bytes) largest = std::max(largest, bytes);
  std::printf("total %s", HumanBytes(static_cast<double>(total_bytes)).c_str());
  if (!expert_bytes.empty()) {
    std::printf(": %zu experts of at most %s make %s; everything else, on every rank, %s",
                expert_bytes.size(), HumanBytes(static_cast<double>(largest)).c_str(),
                HumanBytes(static_cast<double>(routed_bytes)).c_str(),
                HumanBytes(static_cast<double>(total_bytes - routed_bytes)).c_str());
  }
  std::printf("\n");
  return absl::OkStatus();
}

}  // namespace ternion::launcher
