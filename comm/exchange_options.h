// What an exchange is made with.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "comm/codec.h"

namespace ternion::comm {

struct ExchangeOptions {
  RowFormat dispatch = RowFormat::kInt8;
  RowFormat combine = RowFormat::kBf16;
  bool presum = true;  // false with combine == kFp32 is the exact wire
  int act_bits = 8;    // width the model quantizes activations to: 8 or 4
  int64_t hidden = 0;
  int64_t max_rows = 0;  // own rows of one step, at most
  int top_k = 0;         // routes of one row, at most
  int num_experts = 0;   // ids from the wire must be below
  int micro_batch = 0;   // of exchanges that are under way at a time, each has its own
};

// InvalidArgument, naming the option, when a value is out of range or two options contradict each
// other: int4 dispatch needs 4-bit activations (it must stay lossless).
absl::Status ValidateExchangeOptions(const ExchangeOptions& options);

}  // namespace ternion::comm
