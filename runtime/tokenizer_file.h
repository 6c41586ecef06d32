// What a tokenizer.json says, checked, as plain data.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "runtime/tokenizer_added.h"
#include "runtime/tokenizer_bpe.h"

namespace ternion::runtime {

struct TokenizerFile {
  // Added tokens: contents and ids are distinct, and agree with the vocabulary where they are in
  // it.
  std::vector<AddedToken> added_tokens;

  bool is_nfc = false;  // text is brought into normalization form C

  // The pre-tokenizers in order: splits, then ByteLevel.
  std::vector<std::string> split_patterns;
  bool adds_prefix_space = false;      // ByteLevel puts a space before a piece that has none
  bool uses_byte_level_regex = false;  // ByteLevel splits by GPT-2's pattern

  Bpe::Vocab vocab;  // ids are distinct, 0 to kMaxTokenId
  std::vector<std::pair<std::string, std::string>> merges;
  bool ignore_merges = false;
};

constexpr int32_t kMaxTokenId = (1 << 22) - 1;

// Unimplemented names a part that is not supported, InvalidArgument one that is wrong.
absl::StatusOr<TokenizerFile> ParseTokenizerFile(absl::string_view json);

}  // namespace ternion::runtime
