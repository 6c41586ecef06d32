#include "runtime/tokenizer_added.h"

#include <utf8proc.h>

#include <algorithm>
#include <utility>

#include "runtime/utf8.h"

namespace ternion::runtime {
namespace {

// \s of Unicode: the property White_Space.
bool IsSpace(int32_t c) {
  return (c >= 0x9 && c <= 0xD) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

// \w of Unicode (UTS 18): letters, marks, decimal digits, connectors, joiners, and what else is
// Alphabetic: letter numbers and enclosed letters.
bool IsWord(int32_t c) {
  switch (utf8proc_category(c)) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) ||
             (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);
  }
}

// Start of the last character that begins before `end`.
size_t PreviousCharacter(absl::string_view text, size_t end) {
  do {
    --end;
  } while (end > 0 && (static_cast<uint8_t>(text[end]) & 0xC0) == 0x80);
  return end;
}

size_t NextCharacter(absl::string_view text, size_t begin) {
  do {
    ++begin;
  } while (begin < text.size() && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80);
  return begin;
}

int32_t CharacterAt(absl::string_view text, size_t begin) {
  return DecodeUtf8(text.substr(begin, NextCharacter(text, begin) - begin))[0];
}

bool IsWholeWord(absl::string_view text, size_t begin, size_t end) {
  return (begin == 0 || !IsWord(CharacterAt(text, PreviousCharacter(text, begin)))) &&
         (end == text.size() || !IsWord(CharacterAt(text, end)));
}

size_t SkipSpacesLeft(absl::string_view text, size_t begin, size_t limit) {
  while (begin > limit) {
    const size_t previous = PreviousCharacter(text, begin);
    if (!IsSpace(CharacterAt(text, previous))) break;
    begin = previous;
  }
  return begin;
}

size_t SkipSpacesRight(absl::string_view text, size_t end) {
  while (end < text.size() && IsSpace(CharacterAt(text, end))) end = NextCharacter(text, end);
  return end;
}

}  // namespace

AddedTokenFinder::AddedTokenFinder(std::vector<AddedToken> tokens)
    : tokens_(std::move(tokens)), token_at_node_(1, -1) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    int32_t node = kRoot;
    for (const char c : tokens_[i].content) {
      const auto [edge, is_new] =
          edges_.try_emplace(EdgeKey(node, c), static_cast<int32_t>(token_at_node_.size()));
      if (is_new) token_at_node_.push_back(-1);
      node = edge->second;
    }
    token_at_node_[node] = static_cast<int32_t>(i);
  }
}

const AddedToken* AddedTokenFinder::LongestAt(absl::string_view text) const {
  const AddedToken* longest = nullptr;
  int32_t node = kRoot;
  for (const char c : text) {
    const auto edge = edges_.find(EdgeKey(node, c));
    if (edge == edges_.end()) break;
    node = edge->second;
    if (token_at_node_[node] >= 0) longest = &tokens_[token_at_node_[node]];
  }
  return longest;
}

std::vector<AddedTokenFinder::Part> AddedTokenFinder::Find(absl::string_view text) const {
  std::vector<Part> parts;
  size_t done = 0;  // everything before is in `parts`
  const auto add = [&](int32_t id, size_t begin, size_t end) {
    if (begin < end) parts.push_back({id, text.substr(begin, end - begin)});
    done = end;
  };
  for (size_t begin = 0; begin < text.size();) {
    const AddedToken* token = LongestAt(text.substr(begin));
    if (token == nullptr) {
      ++begin;
      continue;
    }
    const size_t end = begin + token->content.size();
    if (!token->is_single_word || IsWholeWord(text, begin, end)) {
      // A token before may have taken white space that belongs to this one.
      const size_t from = token->strips_left ? SkipSpacesLeft(text, begin, done) : begin;
      add(-1, done, from);
      add(token->id, from, token->strips_right ? SkipSpacesRight(text, end) : end);
    }
    begin = end;
  }
  add(-1, done, text.size());
  return parts;
}

}  // namespace ternion::runtime
