#include "runtime/tokenizer.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "base/status.h"
#include "runtime/tokenizer_added.h"
#include "runtime/tokenizer_bpe.h"
#include "runtime/tokenizer_file.h"
#include "runtime/tokenizer_regex.h"
#include "runtime/utf8.h"

namespace ternion::runtime {
namespace {

constexpr size_t kMaxFileBytes = size_t{256} << 20;

// What ByteLevel with use_regex splits by: contractions; words, numbers and other characters with
// the space before them; white space.
constexpr char kGpt2Pattern[] =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

struct Token {
  std::string bytes;
  bool is_special = false;
};

std::vector<Token> MakeTokens(const TokenizerFile& file) {
  int32_t max_id = -1;
  for (const auto& [token, id] : file.vocab) max_id = std::max(max_id, id);
  for (const AddedToken& added : file.added_tokens) max_id = std::max(max_id, added.id);
  std::vector<Token> tokens(static_cast<size_t>(max_id) + 1);
  for (const auto& [token, id] : file.vocab) {
    if (!BytesOfToken(token, &tokens[id].bytes)) tokens[id].bytes = token;
  }
  for (const AddedToken& added : file.added_tokens) {
    tokens[added.id] = {added.content, added.is_special};
  }
  return tokens;
}

// The added tokens that are looked for in normalized text (true) or in raw text (false).
AddedTokenFinder MakeFinder(const TokenizerFile& file, bool is_normalized) {
  std::vector<AddedToken> chosen;
  for (const AddedToken& token : file.added_tokens) {
    if (token.is_normalized != is_normalized) continue;
    chosen.push_back(token);
    if (is_normalized && file.is_nfc) chosen.back().content = ToNfc(token.content);
  }
  return AddedTokenFinder(std::move(chosen));
}

absl::StatusOr<std::vector<TokenizerRegex>> CompileSplits(
    const std::vector<std::string>& patterns) {
  std::vector<TokenizerRegex> splits;
  for (const std::string& pattern : patterns) {
    absl::StatusOr<TokenizerRegex> split = TokenizerRegex::Compile(pattern);
    if (!split.ok()) return base::Annotate(split.status(), "pre_tokenizer");
    splits.push_back(*std::move(split));
  }
  return splits;
}

}  // namespace

struct Tokenizer::Impl {
  std::vector<Token> tokens;  // by id
  AddedTokenFinder raw_added;
  AddedTokenFinder normalized_added;
  bool is_nfc;
  std::vector<TokenizerRegex> splits;
  bool adds_prefix_space;
  std::optional<TokenizerRegex> byte_level_split;
  Bpe bpe;

  static absl::StatusOr<std::unique_ptr<Impl>> Make(const TokenizerFile& file);

  // Appends the ids of normalized text without added tokens.
  void EncodePlain(absl::string_view text, std::vector<int32_t>* ids) const;
  // The same for a piece that the splits have made.
  void EncodePiece(absl::string_view piece, std::vector<int32_t>* ids) const;
};

absl::StatusOr<std::unique_ptr<Tokenizer::Impl>> Tokenizer::Impl::Make(const TokenizerFile& file) {
  TERNION_ASSIGN_OR_RETURN(std::vector<TokenizerRegex> splits, CompileSplits(file.split_patterns));
  std::optional<TokenizerRegex> byte_level_split;
  if (file.uses_byte_level_regex) {
    TERNION_ASSIGN_OR_RETURN(byte_level_split, TokenizerRegex::Compile(kGpt2Pattern));
  }
  TERNION_ASSIGN_OR_RETURN(Bpe bpe, Bpe::Create(file.vocab, file.merges, file.ignore_merges));
  return std::unique_ptr<Impl>(new Impl{
      MakeTokens(file), MakeFinder(file, false), MakeFinder(file, true), file.is_nfc,
      std::move(splits), file.adds_prefix_space, std::move(byte_level_split), std::move(bpe)});
}

void Tokenizer::Impl::EncodePlain(absl::string_view text, std::vector<int32_t>* ids) const {
  std::vector<absl::string_view> pieces = {text};
  for (const TokenizerRegex& split : splits) {
    std::vector<absl::string_view> finer;
    for (const absl::string_view piece : pieces) split.Split(piece, &finer);
    pieces = std::move(finer);
  }
  for (const absl::string_view piece : pieces) EncodePiece(piece, ids);
}

void Tokenizer::Impl::EncodePiece(absl::string_view piece, std::vector<int32_t>* ids) const {
  std::string prefixed;
  if (adds_prefix_space && !absl::StartsWith(piece, " ")) {
    prefixed = absl::StrCat(" ", piece);
    piece = prefixed;
  }
  if (!byte_level_split.has_value()) return bpe.Encode(piece, ids);
  std::vector<absl::string_view> words;
  byte_level_split->Split(piece, &words);
  for (const absl::string_view word : words) bpe.Encode(word, ids);
}

absl::StatusOr<Tokenizer> Tokenizer::Load(const std::string& directory) {
  const std::string path = absl::StrCat(directory, "/tokenizer.json");
  TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(path, kMaxFileBytes));
  const absl::StatusOr<TokenizerFile> file = ParseTokenizerFile(text);
  if (!file.ok()) return base::Annotate(file.status(), path);
  absl::StatusOr<std::unique_ptr<Impl>> impl = Impl::Make(*file);
  if (!impl.ok()) return base::Annotate(impl.status(), path);
  return Tokenizer(*std::move(impl));
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::Encode(absl::string_view text) const {
  std::string valid;
  AppendAsUtf8(text, /*is_last=*/true, &valid);
  std::vector<int32_t> ids;
  for (const auto& raw : impl_->raw_added.Find(valid)) {
    if (raw.id >= 0) {
      ids.push_back(raw.id);
      continue;
    }
    const std::string normalized = impl_->is_nfc ? ToNfc(raw.text) : std::string(raw.text);
    for (const auto& part : impl_->normalized_added.Find(normalized)) {
      if (part.id >= 0) {
        ids.push_back(part.id);
      } else {
        impl_->EncodePlain(part.text, &ids);
      }
    }
  }
  return ids;
}

std::string Tokenizer::TokenBytes(int32_t id) const {
  return id < 0 || id >= vocab_size() ? "" : impl_->tokens[id].bytes;
}

std::string Tokenizer::Decode(const std::vector<int32_t>& ids) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!IsSpecial(id)) bytes += TokenBytes(id);
  }
  return bytes;
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && impl_->tokens[id].is_special;
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->tokens.size()); }

std::string Utf8Stream::Push(absl::string_view bytes) {
  pending_.append(bytes.data(), bytes.size());
  std::string text;
  pending_.erase(0, AppendAsUtf8(pending_, /*is_last=*/false, &text));
  return text;
}

std::string Utf8Stream::Flush() {
  std::string text;
  AppendAsUtf8(pending_, /*is_last=*/true, &text);
  pending_.clear();
  return text;
}

}  // namespace ternion::runtime
