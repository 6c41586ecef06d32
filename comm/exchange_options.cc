#include "comm/exchange_options.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "base/status.h"

namespace ternion::comm {
namespace {

constexpr int64_t kMaxHidden = int64_t{1} << 24;
constexpr int64_t kMaxRows = int64_t{1} << 24;
constexpr int kMaxTopK = 255;         // counts are one byte on the wire
constexpr int kMaxExperts = 1 << 16;  // ids are two
constexpr int kMaxMicroBatch = UINT16_MAX;

absl::Status CheckOption(const char* name, int64_t value, int64_t least, int64_t most) {
  if (least <= value && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("exchange: ", name, " is ", value, ", must be ", least, " to ", most));
}

}  // namespace

absl::Status ValidateExchangeOptions(const ExchangeOptions& options) {
  TERNION_RETURN_IF_ERROR(CheckOption("hidden", options.hidden, 1, kMaxHidden));
  TERNION_RETURN_IF_ERROR(CheckOption("max_rows", options.max_rows, 1, kMaxRows));
  TERNION_RETURN_IF_ERROR(CheckOption("num_experts", options.num_experts, 1, kMaxExperts));
  TERNION_RETURN_IF_ERROR(
      CheckOption("top_k", options.top_k, 1, std::min(kMaxTopK, options.num_experts)));
  TERNION_RETURN_IF_ERROR(CheckOption("micro_batch", options.micro_batch, 0, kMaxMicroBatch));
  if (options.act_bits != 8 && options.act_bits != 4) {
    return absl::InvalidArgumentError(
        absl::StrCat("exchange: act_bits is ", options.act_bits, ", must be 8 or 4"));
  }
  if (options.dispatch == RowFormat::kInt4 && options.act_bits != 4) {
    return absl::InvalidArgumentError(
        "exchange: int4 dispatch would round this model's 8-bit activations; choose int8");
  }
  return absl::OkStatus();
}

}  // namespace ternion::comm
