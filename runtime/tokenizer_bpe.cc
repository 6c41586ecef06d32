#include "runtime/tokenizer_bpe.h"

#include <algorithm>
#include <queue>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "runtime/utf8.h"

namespace ternion::runtime {
namespace {

constexpr int32_t kNumAlphabetCodePoints = 0x144;  // the alphabet ends at U+0143

// alphabet[byte] = code point. Printable Latin-1 stands for itself, the other 68 bytes follow from
// U+0100.
std::array<int32_t, 256> MakeAlphabet() {
  std::array<int32_t, 256> alphabet;
  int32_t next = 0x100;
  for (int32_t byte = 0; byte < 256; ++byte) {
    const bool is_printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
    alphabet[byte] = is_printable ? byte : next++;
  }
  return alphabet;
}

std::array<int16_t, kNumAlphabetCodePoints> MakeReverseAlphabet() {
  std::array<int16_t, kNumAlphabetCodePoints> bytes;
  bytes.fill(-1);
  const std::array<int32_t, 256> alphabet = MakeAlphabet();
  for (int byte = 0; byte < 256; ++byte) bytes[alphabet[byte]] = static_cast<int16_t>(byte);
  return bytes;
}

absl::StatusOr<int32_t> FindToken(const Bpe::Vocab& vocab, const std::string& token, size_t merge) {
  const auto found = vocab.find(token);
  if (found == vocab.end()) {
    return absl::InvalidArgumentError(absl::StrCat("merge ", merge, " needs the token \"",
                                                   token.substr(0, 200),
                                                   "\", which is not in the vocabulary"));
  }
  return found->second;
}

}  // namespace

bool BytesOfToken(absl::string_view token, std::string* bytes) {
  static const std::array<int16_t, kNumAlphabetCodePoints> reverse = MakeReverseAlphabet();
  bytes->clear();
  for (const int32_t code_point : DecodeUtf8(token)) {
    if (code_point >= kNumAlphabetCodePoints || reverse[code_point] < 0) return false;
    bytes->push_back(static_cast<char>(reverse[code_point]));
  }
  return true;
}

// A node of the doubly linked list of a pre-token's symbols; -1: none.
struct Bpe::Symbol {
  int32_t id;  // -1: merged into the one before
  int64_t previous;
  int64_t next;
};

// A possible merge of the symbol at `position` with its next. Stale once either has changed.
struct Bpe::Candidate {
  int32_t rank;
  int32_t id;
  int64_t position;

  // For std::priority_queue, whose top is the largest.
  bool operator<(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : position > other.position;
  }
};

absl::StatusOr<Bpe> Bpe::Create(const Vocab& vocab,
                                const std::vector<std::pair<std::string, std::string>>& merges,
                                bool ignore_merges) {
  Bpe bpe;
  const std::array<int32_t, 256> alphabet = MakeAlphabet();
  for (int byte = 0; byte < 256; ++byte) {
    std::string token;
    AppendCodePoint(alphabet[byte], &token);
    const auto found = vocab.find(token);
    bpe.byte_ids_[byte] = found == vocab.end() ? -1 : found->second;
  }
  bpe.merges_.reserve(merges.size());
  for (size_t i = 0; i < merges.size(); ++i) {
    const auto& [left, right] = merges[i];
    TERNION_ASSIGN_OR_RETURN(const int32_t left_id, FindToken(vocab, left, i));
    TERNION_ASSIGN_OR_RETURN(const int32_t right_id, FindToken(vocab, right, i));
    TERNION_ASSIGN_OR_RETURN(const int32_t id, FindToken(vocab, left + right, i));
    bpe.merges_[PairKey(left_id, right_id)] = {static_cast<int32_t>(i), id};
  }
  std::string bytes;
  for (const auto& [token, id] : vocab) {
    if (ignore_merges && BytesOfToken(token, &bytes)) bpe.whole_[bytes] = id;
  }
  return bpe;
}

bool Bpe::covers_all_bytes() const {
  return std::all_of(byte_ids_.begin(), byte_ids_.end(), [](int32_t id) { return id >= 0; });
}

void Bpe::Encode(absl::string_view bytes, std::vector<int32_t>* ids) const {
  if (const auto whole = whole_.find(bytes); whole != whole_.end()) {
    ids->push_back(whole->second);
    return;
  }
  std::vector<Symbol> symbols;
  symbols.reserve(bytes.size());
  for (const char byte : bytes) {
    const int32_t id = byte_ids_[static_cast<uint8_t>(byte)];
    if (id < 0) continue;
    const int64_t position = static_cast<int64_t>(symbols.size());
    symbols.push_back({id, position - 1, position + 1});
  }
  if (symbols.empty()) return;
  symbols.back().next = -1;

  std::priority_queue<Candidate> queue;
  const auto consider = [&](int64_t position) {
    if (position < 0 || symbols[position].next < 0) return;
    const auto merge =
        merges_.find(PairKey(symbols[position].id, symbols[symbols[position].next].id));
    if (merge == merges_.end()) return;
    queue.push({merge->second.rank, merge->second.id, position});
  };
  for (int64_t i = 0; i < static_cast<int64_t>(symbols.size()); ++i) consider(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.position];
    if (left.id < 0 || left.next < 0) continue;
    Symbol& right = symbols[left.next];
    const auto merge = merges_.find(PairKey(left.id, right.id));
    if (merge == merges_.end() || merge->second.id != best.id) continue;  // stale
    left.id = best.id;
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = best.position;
    consider(left.previous);
    consider(best.position);
  }
  for (int64_t i = 0; i >= 0; i = symbols[i].next) ids->push_back(symbols[i].id);
}

}  // namespace ternion::runtime
