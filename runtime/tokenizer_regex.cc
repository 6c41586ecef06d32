#include "runtime/tokenizer_regex.h"

#include <algorithm>
#include <cctype>
#include <utility>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/check.h"
#include "base/status.h"
#include "runtime/tokenizer_unicode.h"

namespace ternion::runtime {
namespace {

constexpr uint32_t kMatchLimit = 100'000'000;  // backtracking steps: about a second
constexpr uint32_t kHeapLimitKib = 1 << 20;
constexpr size_t kMaxPatternBytes = 1 << 16;

// Members of \s and \S as class content. PCRE2's own \s also holds U+180E, Oniguruma's does not.
constexpr char kSpace[] =
    "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";
constexpr char kNoSpace[] =
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}\\x{1681}-\\x{1fff}"
    "\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}\\x{2060}-\\x{2fff}"
    "\\x{3001}-\\x{10ffff}";

// The newer characters of `property`, a general category ("L", "Lu") or "Han", as class content.
std::string NewerMembers(absl::string_view property) {
  std::string members;
  for (const CategoryRange& range : kNewerCharacters) {
    const bool is_han = range.first == 0x2B739 || range.first == 0x2EBF0 || range.first == 0x31350;
    if (property == "Han" ? !is_han : !absl::StartsWith(range.category, property)) continue;
    absl::StrAppend(&members, "\\x{", absl::Hex(range.first), "}-\\x{", absl::Hex(range.last), "}");
  }
  return members;
}

// Walks a pattern once, copying what means the same in both dialects.
class Translator {
 public:
  explicit Translator(absl::string_view pattern) : rest_(pattern) {}

  absl::StatusOr<std::string> Run() {
    while (!rest_.empty()) TERNION_RETURN_IF_ERROR(Item());
    if (in_class_) return absl::InvalidArgumentError("unfinished character class");
    return std::move(out_);
  }

 private:
  absl::Status Item() {
    switch (rest_[0]) {
      case '\\':
        return Escape();
      case '[':
        return OpenClass();
      case ']':
        in_class_ = false;
        return Copy(1);
      case '(':
        return in_class_ ? Copy(1) : OpenGroup();
      case '{':
        if (!in_class_) return Repeat();
        return Copy(1);
      case '^':
      case '$':
        return in_class_ ? Copy(1) : Unsupported("an anchor");
      case '&':
        return in_class_ && StartsWith("&&") ? Unsupported("&& in a class") : Copy(1);
      default:
        return Copy(1);
    }
  }

  absl::Status OpenClass() {
    if (in_class_) return Unsupported("[ in a class");
    in_class_ = true;
    TERNION_RETURN_IF_ERROR(Copy(StartsWith("[^") ? 2 : 1));
    class_begin_ = out_.size();
    return StartsWith("]") ? Unsupported("] at the start of a class") : absl::OkStatus();
  }

  absl::Status OpenGroup() {
    for (const absl::string_view group : {"(?:", "(?=", "(?!", "(?<=", "(?<!", "(?>", "(?i:"}) {
      if (StartsWith(group)) return Copy(group.size());
    }
    return StartsWith("(?") || StartsWith("(*") ? Unsupported("this kind of group") : Copy(1);
  }

  // {n}, {n,}, {n,m}. Ruby also has {,m}, and reads {n,m}+ as a repeated repeat, PCRE2 as
  // possessive.
  absl::Status Repeat() {
    const size_t end = rest_.find('}');
    if (end == absl::string_view::npos || !std::isdigit(static_cast<unsigned char>(rest_[1])) ||
        !std::all_of(rest_.begin() + 1, rest_.begin() + end,
                     [](unsigned char c) { return std::isdigit(c) || c == ','; })) {
      return Unsupported("this use of {");
    }
    if (end + 1 < rest_.size() && rest_[end + 1] == '+') return Unsupported("+ after }");
    return Copy(end + 1);
  }

  absl::Status Escape() {
    if (rest_.size() < 2) return absl::InvalidArgumentError("ends in a backslash");
    const unsigned char c = rest_[1];
    switch (c) {
      case 's':
        return Class(kSpace, 2);
      case 'S':
        return Class(kNoSpace, 2);
      case 'd':
        return Property("Nd", /*is_negated=*/false, 2);
      case 'D':
        return Property("Nd", /*is_negated=*/true, 2);
      case 'p':
      case 'P':
        return NamedProperty();
      case 'x':
      case 'u':
        return CodePoint();
      default:
        if (std::ispunct(c) || c == 'n' || c == 'r' || c == 't' || c == 'f') return Copy(2);
        return Unsupported("this escape");
    }
  }

  // \p{L}, \P{Lu}, \p{^N}, \p{Han}.
  absl::Status NamedProperty() {
    const size_t end = rest_.find('}');
    if (rest_[2] != '{' || end == absl::string_view::npos) return Unsupported("this property");
    absl::string_view name = rest_.substr(3, end - 3);
    const bool is_negated = (rest_[1] == 'P') != absl::ConsumePrefix(&name, "^");
    if (name.empty() || !std::all_of(name.begin(), name.end(),
                                     [](unsigned char c) { return std::isalpha(c) || c == '_'; })) {
      return Unsupported("this property");
    }
    return Property(name, is_negated, end + 1);
  }

  absl::Status Property(absl::string_view name, bool is_negated, size_t length) {
    // Short names are general categories. A long one must be a script, where PCRE2 would take the
    // script's extensions too unless told not to.
    const absl::string_view kind = name.size() <= 2 ? "" : "sc:";
    // A negated property in brackets counts the newer characters wrongly: there is no way to say
    // it.
    if (is_negated && in_class_) return Class(absl::StrCat("\\P{", kind, name, "}"), length);
    return Class(absl::StrCat(is_negated ? "^" : "", "\\p{", kind, name, "}", NewerMembers(name)),
                 length);
  }

  // \x{H...}, which PCRE2 checks, or \uHHHH.
  absl::Status CodePoint() {
    if (StartsWith("\\x{")) {
      const size_t end = rest_.find('}');
      return end == absl::string_view::npos ? Unsupported("this escape") : Copy(end + 1);
    }
    const absl::string_view digits = rest_.substr(2, 4);
    if (!StartsWith("\\u") || digits.size() != 4 ||
        !std::all_of(digits.begin(), digits.end(),
                     [](unsigned char c) { return std::isxdigit(c); })) {
      return Unsupported("this escape");
    }
    absl::StrAppend(&out_, "\\x{", digits, "}");
    rest_.remove_prefix(6);
    return absl::OkStatus();
  }

  // Emits the class `content` in place of the next `length` bytes, inside or outside of brackets.
  absl::Status Class(absl::string_view content, size_t length) {
    const bool ends_range = in_class_ && out_.size() > class_begin_ + 1 && out_.back() == '-' &&
                            !absl::EndsWith(out_, "\\-");
    rest_.remove_prefix(length);
    if (ends_range || (in_class_ && StartsWith("-") && !StartsWith("-]"))) {
      return Unsupported("a range of classes");
    }
    absl::StrAppend(&out_, in_class_ ? "" : "[", content, in_class_ ? "" : "]");
    return absl::OkStatus();
  }

  absl::Status Copy(size_t length) {
    absl::StrAppend(&out_, rest_.substr(0, length));
    rest_.remove_prefix(length);
    return absl::OkStatus();
  }

  bool StartsWith(absl::string_view prefix) const { return absl::StartsWith(rest_, prefix); }

  absl::Status Unsupported(absl::string_view what) const {
    return absl::UnimplementedError(absl::StrCat(what, " (before ", rest_.size(),
                                                 " more bytes of the pattern) is not supported"));
  }

  absl::string_view rest_;
  std::string out_;
  bool in_class_ = false;
  size_t class_begin_ = 0;  // where the content of the open class begins in out_
};

std::string Pcre2Message(int code) {
  PCRE2_UCHAR8 message[256];
  pcre2_get_error_message_8(code, message, sizeof(message));
  return reinterpret_cast<const char*>(message);
}

struct MatchDataDeleter {
  void operator()(pcre2_match_data_8* data) const { pcre2_match_data_free_8(data); }
};

}  // namespace

absl::StatusOr<std::string> TranslateRegex(absl::string_view pattern) {
  return Translator(pattern).Run();
}

void TokenizerRegex::CodeDeleter::operator()(pcre2_code_8* code) const { pcre2_code_free_8(code); }

void TokenizerRegex::ContextDeleter::operator()(pcre2_match_context_8* context) const {
  pcre2_match_context_free_8(context);
}

absl::StatusOr<TokenizerRegex> TokenizerRegex::Compile(absl::string_view pattern) {
  if (pattern.size() > kMaxPatternBytes) {
    return absl::InvalidArgumentError("the regular expression is too long");
  }
  TERNION_ASSIGN_OR_RETURN(const std::string translated, TranslateRegex(pattern));
  const std::unique_ptr<pcre2_compile_context_8, void (*)(pcre2_compile_context_8*)> context(
      pcre2_compile_context_create_8(nullptr), pcre2_compile_context_free_8);
  TERNION_CHECK(context != nullptr);
  pcre2_set_newline_8(context.get(), PCRE2_NEWLINE_LF);
  int error = 0;
  PCRE2_SIZE error_offset = 0;
  TokenizerRegex regex;
  regex.code_.reset(pcre2_compile_8(
      reinterpret_cast<PCRE2_SPTR8>(translated.data()), translated.size(),
      PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &error_offset, context.get()));
  if (regex.code_ == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("bad regular expression: ", Pcre2Message(error)));
  }
  // Only for speed: where there is no JIT, matching interprets.
  pcre2_jit_compile_8(regex.code_.get(), PCRE2_JIT_COMPLETE);
  regex.limits_.reset(pcre2_match_context_create_8(nullptr));
  TERNION_CHECK(regex.limits_ != nullptr);
  pcre2_set_match_limit_8(regex.limits_.get(), kMatchLimit);
  pcre2_set_heap_limit_8(regex.limits_.get(), kHeapLimitKib);
  return regex;
}

void TokenizerRegex::Split(absl::string_view text, std::vector<absl::string_view>* pieces) const {
  const std::unique_ptr<pcre2_match_data_8, MatchDataDeleter> data(
      pcre2_match_data_create_8(1, nullptr));
  TERNION_CHECK(data != nullptr);
  const PCRE2_SIZE* const bounds = pcre2_get_ovector_pointer_8(data.get());
  const auto emit = [&](size_t begin, size_t end) {
    if (begin < end) pieces->push_back(text.substr(begin, end - begin));
  };
  const auto match = [&](size_t from, uint32_t options) {
    return pcre2_match_8(code_.get(), reinterpret_cast<PCRE2_SPTR8>(text.data()), text.size(), from,
                         options | PCRE2_NO_UTF_CHECK, data.get(), limits_.get());
  };
  size_t done = 0;  // everything before is in `pieces`
  size_t from = 0;
  while (from < text.size()) {
    int result = match(from, 0);
    if (result == PCRE2_ERROR_JIT_STACKLIMIT) result = match(from, PCRE2_NO_JIT);
    if (result < 0) break;  // no further match, or a limit
    emit(done, bounds[0]);
    emit(bounds[0], bounds[1]);
    done = bounds[1];
    from = done;
    if (bounds[0] == bounds[1]) {  // an empty match: go on behind the next character
      do {
        ++from;
      } while (from < text.size() && (static_cast<uint8_t>(text[from]) & 0xC0) == 0x80);
    }
  }
  emit(done, text.size());
}

}  // namespace ternion::runtime
