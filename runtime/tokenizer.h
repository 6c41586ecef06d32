// Byte-level BPE from tokenizer.json (GPT-2, Llama-3, Qwen).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ternion::runtime {

// Immutable after loading; thread-safe.
class Tokenizer {
 public:
  // Reads DIR/tokenizer.json. Supported: model BPE (merges as strings or pairs, ignore_merges),
  // normalizer none or NFC, pre-tokenizers ByteLevel (with or without its regex), Split by Regex,
  // and Sequences of them, decoder ByteLevel, added tokens. Anything else is an Unimplemented error
  // that names it.
  static absl::StatusOr<Tokenizer> Load(const std::string& directory);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Text (UTF-8; invalid bytes are replaced by U+FFFD as HF does on str input) -> ids. Added tokens
  // in the text are recognised. The post-processor's special tokens (bos) are not added: the caller
  // does.
  std::vector<int32_t> Encode(absl::string_view text) const;

  // Bytes of one token; a token may be part of a UTF-8 character. Empty for ids without a token.
  std::string TokenBytes(int32_t id) const;
  // All tokens' bytes; special tokens are left out.
  std::string Decode(const std::vector<int32_t>& ids) const;

  bool IsSpecial(int32_t id) const;
  int32_t vocab_size() const;  // one more than the highest id

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Bytes that arrive token by token -> text in whole UTF-8 characters, for streaming.
class Utf8Stream {
 public:
  // Appends bytes and returns what is complete; a truncated character waits.
  std::string Push(absl::string_view bytes);
  // What is left, with U+FFFD for an unfinished character.
  std::string Flush();

 private:
  std::string pending_;
};

}  // namespace ternion::runtime
