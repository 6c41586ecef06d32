#include "runtime/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <span>

#include "base/check.h"

namespace ternion::runtime {
namespace {

constexpr int32_t kBeforeHangulFinals = 0x11A7;
constexpr char kReplacement[] = "\xEF\xBF\xBD";  // U+FFFD

// The start of a character: how many of its bytes are there, and whether that is all of it.
struct Prefix {
  size_t bytes;       // at least 1
  bool is_complete;   // a whole character
  bool is_truncated;  // valid as far as it goes, and the text ends here
};

struct LeadByte {
  size_t length;                    // of the whole character; 0: no character starts so
  uint8_t second_low, second_high;  // allowed second bytes: excludes overlong forms and surrogates
};

LeadByte ClassifyLead(uint8_t lead) {
  if (lead < 0x80) return {1, 0, 0};
  if (lead < 0xC2 || lead > 0xF4) return {0, 0, 0};
  if (lead < 0xE0) return {2, 0x80, 0xBF};
  if (lead == 0xE0) return {3, 0xA0, 0xBF};
  if (lead == 0xED) return {3, 0x80, 0x9F};
  if (lead < 0xF0) return {3, 0x80, 0xBF};
  if (lead == 0xF0) return {4, 0x90, 0xBF};
  if (lead == 0xF4) return {4, 0x80, 0x8F};
  return {4, 0x80, 0xBF};
}

Prefix ScanCharacter(absl::string_view text) {
  const LeadByte lead = ClassifyLead(static_cast<uint8_t>(text[0]));
  if (lead.length == 0) return {1, false, false};
  for (size_t i = 1; i < lead.length; ++i) {
    if (i == text.size()) return {i, false, true};
    const uint8_t byte = static_cast<uint8_t>(text[i]);
    const uint8_t low = i == 1 ? lead.second_low : 0x80;
    const uint8_t high = i == 1 ? lead.second_high : 0xBF;
    if (byte < low || byte > high) return {i, false, false};
  }
  return {lead.length, true, false};
}

uint8_t CombiningClass(int32_t code_point) {
  return static_cast<uint8_t>(utf8proc_get_property(code_point)->combining_class);
}

// Canonical decomposition, each character by itself.
std::vector<int32_t> Decompose(const std::vector<int32_t>& text) {
  constexpr utf8proc_option_t kOptions =
      static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE);
  std::vector<int32_t> decomposed;
  decomposed.reserve(text.size());
  for (const int32_t code_point : text) {
    int32_t parts[32];
    int boundary = 0;
    const utf8proc_ssize_t count =
        utf8proc_decompose_char(code_point, parts, std::size(parts), kOptions, &boundary);
    TERNION_CHECK(count > 0 && count <= static_cast<utf8proc_ssize_t>(std::size(parts)));
    decomposed.insert(decomposed.end(), parts, parts + count);
  }
  return decomposed;
}

// Sorts each run of combining marks by class. utf8proc_decompose would take quadratic time for a
// long one.
void OrderMarks(std::vector<int32_t>* text) {
  auto begin = text->begin();
  while (begin != text->end()) {
    const auto end =
        std::find_if(begin, text->end(), [](int32_t c) { return CombiningClass(c) == 0; });
    std::stable_sort(begin, end,
                     [](int32_t a, int32_t b) { return CombiningClass(a) < CombiningClass(b); });
    begin = end == text->end() ? end : end + 1;
  }
}

// Composes decomposed, ordered text in place and appends it.
void AppendComposed(std::span<int32_t> code_points, std::string* text) {
  const utf8proc_ssize_t length = utf8proc_normalize_utf32(
      code_points.data(), static_cast<utf8proc_ssize_t>(code_points.size()),
      static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  TERNION_CHECK(length >= 0);
  for (const int32_t code_point : code_points.first(static_cast<size_t>(length))) {
    AppendCodePoint(code_point, text);
  }
}

}  // namespace

bool IsValidUtf8(absl::string_view bytes) {
  while (!bytes.empty()) {
    const Prefix prefix = ScanCharacter(bytes);
    if (!prefix.is_complete) return false;
    bytes.remove_prefix(prefix.bytes);
  }
  return true;
}

size_t AppendAsUtf8(absl::string_view bytes, bool is_last, std::string* text) {
  size_t consumed = 0;
  while (consumed < bytes.size()) {
    const absl::string_view rest = bytes.substr(consumed);
    const Prefix prefix = ScanCharacter(rest);
    if (prefix.is_truncated && !is_last) break;
    if (prefix.is_complete) {
      text->append(rest.data(), prefix.bytes);
    } else {
      text->append(kReplacement);
    }
    consumed += prefix.bytes;
  }
  return consumed;
}

std::vector<int32_t> DecodeUtf8(absl::string_view text) {
  std::vector<int32_t> code_points;
  code_points.reserve(text.size());
  for (size_t i = 0; i < text.size();) {
    const uint8_t lead = static_cast<uint8_t>(text[i]);
    const size_t length = ClassifyLead(lead).length;
    TERNION_CHECK(length > 0 && i + length <= text.size());
    int32_t code_point = length == 1 ? lead : lead & (0x7F >> length);
    for (size_t k = 1; k < length; ++k) {
      code_point = code_point << 6 | (static_cast<uint8_t>(text[i + k]) & 0x3F);
    }
    code_points.push_back(code_point);
    i += length;
  }
  return code_points;
}

void AppendCodePoint(int32_t code_point, std::string* text) {
  uint8_t bytes[4];
  const utf8proc_ssize_t count = utf8proc_encode_char(code_point, bytes);
  text->append(reinterpret_cast<const char*>(bytes), static_cast<size_t>(count));
}

std::string ToNfc(absl::string_view text) {
  // Below U+0300 (lead byte 0xCC) no character composes with another or decomposes for good.
  const bool is_inert =
      std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0xCC; });
  if (is_inert) return std::string(text);
  std::vector<int32_t> code_points = Decompose(DecodeUtf8(text));
  OrderMarks(&code_points);
  std::string normalized;
  normalized.reserve(text.size());
  // U+11A7 composes with nothing, but utf8proc takes it for a Hangul final consonant: keep it out.
  for (auto begin = code_points.begin(); begin != code_points.end();) {
    const auto end = std::find(begin, code_points.end(), kBeforeHangulFinals);
    AppendComposed({begin, end}, &normalized);
    if (end != code_points.end()) AppendCodePoint(kBeforeHangulFinals, &normalized);
    begin = end == code_points.end() ? end : end + 1;
  }
  return normalized;
}

}  // namespace ternion::runtime
