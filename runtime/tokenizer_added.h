// Tokens that are found in the text before anything else is done to it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"

namespace ternion::runtime {

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool is_special = false;
  bool is_single_word = false;  // not found next to a word character
  bool strips_left = false;     // takes the white space before it
  bool strips_right = false;
  bool is_normalized = false;  // looked for in the normalized text, not in the raw one
};

// Finds added tokens: the leftmost, of these the longest, as HF does. Immutable; thread-safe.
class AddedTokenFinder {
 public:
  explicit AddedTokenFinder(std::vector<AddedToken> tokens);

  // A part of the text: an added token, or text between them (id -1).
  struct Part {
    int32_t id;
    absl::string_view text;
  };
  // All of `text` (valid UTF-8), in order.
  std::vector<Part> Find(absl::string_view text) const;

 private:
  static constexpr int32_t kRoot = 0;

  static uint64_t EdgeKey(int32_t node, char byte) {
    return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
  }

  // The longest token at the start of `text`, or null.
  const AddedToken* LongestAt(absl::string_view text) const;

  std::vector<AddedToken> tokens_;
  // A trie over bytes: (node << 8 | byte) -> node, and the token that ends at a node (-1: none).
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  std::vector<int32_t> token_at_node_;
};

}  // namespace ternion::runtime
