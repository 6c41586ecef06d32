#include "kernels/kv_page.h"

namespace ternion::kernels {
namespace {

struct Format {
  KvFormat format;
  const char* name;
  int bits;
};
constexpr Format kFormats[] = {{KvFormat::kBf16, "bf16", 16},
                               {KvFormat::kInt8, "int8", 8},
                               {KvFormat::kInt4, "int4", 4},
                               {KvFormat::kInt3, "int3", 3}};

}  // namespace

const char* KvFormatName(KvFormat format) { return kFormats[static_cast<int>(format)].name; }

int KvBits(KvFormat format) { return kFormats[static_cast<int>(format)].bits; }

std::optional<KvFormat> ParseKvFormat(const std::string& name) {
  for (const Format& format : kFormats) {
    if (name == format.name) return format.format;
  }
  return std::nullopt;
}

std::optional<KvFormat> KvFormatOfBits(int bits) {
  for (const Format& format : kFormats) {
    if (bits == format.bits) return format.format;
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
