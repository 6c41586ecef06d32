// How a rank deals out its share of a memory: weights, the KV cache, and a 64th for all else
// (activations, messages, what a device's driver takes).
#pragma once

#include <algorithm>
#include <cstdint>

namespace ternion::runtime {

// Bytes that weights may take beside a KV cache of `kv_bytes`; 0: of whatever is left, at least a
// sixteenth of the share.
constexpr int64_t RoomForWeights(int64_t share_bytes, int64_t kv_bytes) {
  return share_bytes - share_bytes / 64 - (kv_bytes > 0 ? kv_bytes : share_bytes / 16);
}

// What a KV cache takes that nobody gave a size: a quarter of the share, or what weights leave.
constexpr int64_t DefaultKvBytes(int64_t share_bytes, int64_t weight_bytes) {
  const int64_t left = share_bytes - share_bytes / 64 - weight_bytes;
  return std::clamp<int64_t>(left, 0, share_bytes / 4);
}

}  // namespace ternion::runtime
