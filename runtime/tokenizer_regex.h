// The regular expressions of pre-tokenizers, as Hugging Face tokenizers (Oniguruma) understands
// them.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

struct pcre2_real_code_8;
struct pcre2_real_match_context_8;

namespace ternion::runtime {

// `pattern` (Oniguruma, Ruby syntax) in PCRE2 syntax with the same meaning. Unimplemented for what
// the two read differently and no supported tokenizer uses: nested classes, &&, anchors, \w, \h,
// flags other than
// (?i:...), named or captured references.
absl::StatusOr<std::string> TranslateRegex(absl::string_view pattern);

// Immutable; thread-safe.
class TokenizerRegex {
 public:
  static absl::StatusOr<TokenizerRegex> Compile(absl::string_view pattern);

  // Appends to `*pieces` the matches in `text` (valid UTF-8) and what lies between them, in order,
  // all nonempty: HF's Split with behavior Isolated. Should a match exceed the engine's limits (a
  // pattern that backtracks without end), the rest of the text is one piece.
  void Split(absl::string_view text, std::vector<absl::string_view>* pieces) const;

 private:
  struct CodeDeleter {
    void operator()(pcre2_real_code_8* code) const;
  };
  struct ContextDeleter {
    void operator()(pcre2_real_match_context_8* context) const;
  };

  std::unique_ptr<pcre2_real_code_8, CodeDeleter> code_;
  std::unique_ptr<pcre2_real_match_context_8, ContextDeleter> limits_;
};

}  // namespace ternion::runtime
