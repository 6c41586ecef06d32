#include "kernels/kv_page.h"

namespace ternion::kernels {
namespace {

constexpr KvFormat kFormats[] = {KvFormat::kBf16, KvFormat::kInt8, KvFormat::kInt4,
                                 KvFormat::kInt3};

}  // namespace

const char* KvFormatName(KvFormat format) {
  constexpr const char* kNames[] = {"bf16", "int8", "int4", "int3"};
  return kNames[static_cast<int>(format)];
}

std::optional<KvFormat> ParseKvFormat(const std::string& name) {
  for (KvFormat format : kFormats) {
    if (name == KvFormatName(format)) return format;
  }
  return std::nullopt;
}

std::optional<KvFormat> KvFormatOfBits(int bits) {
  for (KvFormat format : kFormats) {
    if (bits == KvBits(format)) return format;
  }
  return std::nullopt;
}

KvPageSize SizeOfKvPage(KvFormat format, int kv_heads, int head_dim) {
  const int bits = KvBits(format);
  const bool packed = bits < 8;  // their values lie in blocks of 16 elements
  const int64_t value_dim = packed ? (head_dim + 15) / 16 * 16 : head_dim;
  const int64_t heads_tokens = int64_t{kv_heads} * kPageTokens;
  KvPageSize size;
  size.key_bytes = heads_tokens * head_dim * bits / 8;
  size.value_bytes = heads_tokens * value_dim * bits / 8;
  if (format != KvFormat::kBf16) size.scale_bytes = heads_tokens * sizeof(float);
  return size;
}

}  // namespace ternion::kernels
