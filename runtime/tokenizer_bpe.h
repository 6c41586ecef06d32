// Byte-pair encoding of one pre-token, over bytes.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace ternion::runtime {

// Token strings in vocabulary files are made of 256 printable characters, one per byte (GPT-2's
// bytes_to_unicode). True, with the bytes in `*bytes`, if all of `token` (UTF-8) is; else false.
bool BytesOfToken(absl::string_view token, std::string* bytes);

// Immutable; thread-safe.
class Bpe {
 public:
  using Vocab = absl::flat_hash_map<std::string, int32_t>;  // token strings, as in the file

  // `merges` in order of priority. InvalidArgument for merges of or to unknown tokens.
  // `ignore_merges`: a pre-token that is itself a token becomes that token, merges or not.
  static absl::StatusOr<Bpe> Create(const Vocab& vocab,
                                    const std::vector<std::pair<std::string, std::string>>& merges,
                                    bool ignore_merges);

  // Whether each byte has a token. Bytes without one are left out by Encode, as HF does without
  // unk_token.
  bool covers_all_bytes() const;

  // Appends the ids of `bytes`: repeatedly merges the pair of best rank, the leftmost of equals.
  // O(n log n).
  void Encode(absl::string_view bytes, std::vector<int32_t>* ids) const;

 private:
  struct Merge {
    int32_t rank;
    int32_t id;  // of the merged token
  };
  struct Symbol;
  struct Candidate;

  static uint64_t PairKey(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }

  std::array<int32_t, 256> byte_ids_;  // -1: none
  absl::flat_hash_map<uint64_t, Merge> merges_;
  absl::flat_hash_map<std::string, int32_t> whole_;  // bytes -> id, filled if ignore_merges
};

}  // namespace ternion::runtime
