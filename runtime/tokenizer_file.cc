#include "runtime/tokenizer_file.h"

#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "runtime/strict_json.h"

namespace ternion::runtime {
namespace {

using Json = nlohmann::json;

// The member of `json`, or null when it is absent or null.
const Json* FindValue(const Json& json, const char* key) {
  const Json* value = FindMember(json, key);
  return value == nullptr || value->is_null() ? nullptr : value;
}

absl::Status WrongType(absl::string_view key, absl::string_view type) {
  return absl::InvalidArgumentError(absl::StrCat(key, " is missing or no ", type));
}

// Text of a file for a one-line message.
std::string Shown(absl::string_view text) {
  std::string shown(text.substr(0, 100));
  std::replace_if(
      shown.begin(), shown.end(), [](unsigned char c) { return c < 0x20; }, ' ');
  return absl::StrCat("\"", shown, "\"");
}

absl::StatusOr<bool> GetBool(const Json& json, const char* key, bool absent) {
  const Json* value = FindValue(json, key);
  if (value == nullptr) return absent;
  if (!value->is_boolean()) return WrongType(key, "boolean");
  return value->get<bool>();
}

absl::StatusOr<absl::string_view> GetString(const Json& json, const char* key) {
  const Json* value = FindValue(json, key);
  if (value == nullptr || !value->is_string()) return WrongType(key, "string");
  return value->get_ref<const std::string&>();
}

absl::StatusOr<int32_t> ToTokenId(const Json& json, absl::string_view token) {
  if (!json.is_number_unsigned() || json.get<uint64_t>() > kMaxTokenId) {
    return absl::InvalidArgumentError(
        absl::StrCat("the id of token ", Shown(token), " is not a number from 0 to ", kMaxTokenId));
  }
  return json.get<int32_t>();
}

// Calls `parse` for `json`, or for each element of a Sequence of such (`list_key` holds them).
template <typename Parse>
absl::Status ForEachStep(const Json& json, const char* list_key, const Parse& parse) {
  TERNION_ASSIGN_OR_RETURN(const absl::string_view type, GetString(json, "type"));
  if (type != "Sequence") return parse(type, json);
  const Json* list = FindValue(json, list_key);
  if (list == nullptr || !list->is_array()) return WrongType(list_key, "array");
  for (const Json& step : *list) TERNION_RETURN_IF_ERROR(ForEachStep(step, list_key, parse));
  return absl::OkStatus();
}

absl::Status ParseNormalizer(const Json& root, TokenizerFile* file) {
  const Json* normalizer = FindValue(root, "normalizer");
  if (normalizer == nullptr) return absl::OkStatus();
  return ForEachStep(*normalizer, "normalizers", [&](absl::string_view type, const Json&) {
    if (type != "NFC") {
      return absl::UnimplementedError(absl::StrCat(Shown(type), " is not supported"));
    }
    file->is_nfc = true;
    return absl::OkStatus();
  });
}

absl::Status ParseSplit(const Json& split, TokenizerFile* file) {
  const Json* pattern = FindValue(split, "pattern");
  if (pattern == nullptr) return WrongType("pattern", "object");
  TERNION_ASSIGN_OR_RETURN(const absl::string_view behavior, GetString(split, "behavior"));
  if (FindValue(*pattern, "Regex") == nullptr || behavior != "Isolated") {
    return absl::UnimplementedError("only Split by Regex with behavior Isolated is supported");
  }
  TERNION_ASSIGN_OR_RETURN(const absl::string_view regex, GetString(*pattern, "Regex"));
  file->split_patterns.emplace_back(regex);  // `invert` makes no difference to Isolated
  return absl::OkStatus();
}

absl::Status ParsePreTokenizer(const Json& root, TokenizerFile* file) {
  const Json* pre_tokenizer = FindValue(root, "pre_tokenizer");
  bool has_byte_level = false;
  const auto parse = [&](absl::string_view type, const Json& step) -> absl::Status {
    if (has_byte_level) return absl::UnimplementedError("ByteLevel must come last");
    if (type == "Split") return ParseSplit(step, file);
    if (type != "ByteLevel") {
      return absl::UnimplementedError(absl::StrCat(Shown(type), " is not supported"));
    }
    has_byte_level = true;
    TERNION_ASSIGN_OR_RETURN(file->adds_prefix_space, GetBool(step, "add_prefix_space", true));
    TERNION_ASSIGN_OR_RETURN(file->uses_byte_level_regex, GetBool(step, "use_regex", true));
    return absl::OkStatus();
  };
  if (pre_tokenizer != nullptr) {
    TERNION_RETURN_IF_ERROR(ForEachStep(*pre_tokenizer, "pretokenizers", parse));
  }
  if (has_byte_level) return absl::OkStatus();
  return absl::UnimplementedError("without ByteLevel it is not supported");
}

absl::Status ParseDecoder(const Json& root) {
  const Json* decoder = FindValue(root, "decoder");
  if (decoder == nullptr) return absl::UnimplementedError("without ByteLevel it is not supported");
  TERNION_ASSIGN_OR_RETURN(const absl::string_view type, GetString(*decoder, "type"));
  if (type == "ByteLevel") return absl::OkStatus();
  return absl::UnimplementedError(absl::StrCat(Shown(type), " is not supported"));
}

absl::Status ParseVocab(const Json& model, TokenizerFile* file) {
  const Json* vocab = FindValue(model, "vocab");
  if (vocab == nullptr || !vocab->is_object()) return WrongType("vocab", "object");
  absl::flat_hash_map<int32_t, absl::string_view> token_of_id;
  file->vocab.reserve(vocab->size());
  for (const auto& [token, value] : vocab->items()) {
    TERNION_ASSIGN_OR_RETURN(const int32_t id, ToTokenId(value, token));
    const auto [other, is_new] = token_of_id.try_emplace(id, token);
    if (!is_new) {
      return absl::InvalidArgumentError(absl::StrCat("tokens ", Shown(other->second), " and ",
                                                     Shown(token), " have the same id ", id));
    }
    file->vocab[token] = id;
  }
  return absl::OkStatus();
}

// "left right" or ["left", "right"].
absl::StatusOr<std::pair<std::string, std::string>> ParseMerge(const Json& merge) {
  if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
    return std::pair(merge[0].get<std::string>(), merge[1].get<std::string>());
  }
  if (merge.is_string()) {
    const std::string& text = merge.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space != std::string::npos && space == text.rfind(' ')) {
      return std::pair(text.substr(0, space), text.substr(space + 1));
    }
  }
  return absl::InvalidArgumentError("is neither \"left right\" nor a pair of strings");
}

absl::Status ParseMerges(const Json& model, TokenizerFile* file) {
  const Json* merges = FindValue(model, "merges");
  if (merges == nullptr || !merges->is_array()) return WrongType("merges", "array");
  file->merges.reserve(merges->size());
  for (size_t i = 0; i < merges->size(); ++i) {
    const Json& merge = (*merges)[i];
    if (merge.is_string() && absl::StartsWith(merge.get_ref<const std::string&>(), "#version")) {
      continue;
    }
    auto pair = ParseMerge(merge);
    if (!pair.ok()) return base::Annotate(pair.status(), absl::StrCat("merge ", i));
    file->merges.push_back(*std::move(pair));
  }
  return absl::OkStatus();
}

// Features of BPE that no byte-level tokenizer uses.
absl::Status CheckModelOptions(const Json& model) {
  if (const Json* type = FindValue(model, "type"); type != nullptr && *type != "BPE") {
    return absl::UnimplementedError(
        absl::StrCat("type ", Shown(type->is_string() ? type->get<std::string>() : "?"),
                     " is not supported, only BPE"));
  }
  if (const Json* dropout = FindValue(model, "dropout"); dropout != nullptr && *dropout != 0.0) {
    return absl::UnimplementedError("dropout is not supported");
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    const Json* affix = FindValue(model, key);
    if (affix != nullptr && *affix != "") {
      return absl::UnimplementedError(absl::StrCat(key, " is not supported"));
    }
  }
  return absl::OkStatus();
}

absl::Status ParseModel(const Json& root, TokenizerFile* file) {
  const Json* model = FindValue(root, "model");
  if (model == nullptr || !model->is_object()) return WrongType("model", "object");
  TERNION_RETURN_IF_ERROR(CheckModelOptions(*model));
  TERNION_RETURN_IF_ERROR(ParseVocab(*model, file));
  TERNION_RETURN_IF_ERROR(ParseMerges(*model, file));
  TERNION_ASSIGN_OR_RETURN(file->ignore_merges, GetBool(*model, "ignore_merges", false));
  return absl::OkStatus();
}

absl::StatusOr<AddedToken> ParseAddedToken(const Json& json) {
  AddedToken token;
  TERNION_ASSIGN_OR_RETURN(const absl::string_view content, GetString(json, "content"));
  token.content = std::string(content);
  const Json* id = FindValue(json, "id");
  TERNION_ASSIGN_OR_RETURN(token.id, ToTokenId(id == nullptr ? Json() : *id, token.content));
  TERNION_ASSIGN_OR_RETURN(token.is_special, GetBool(json, "special", false));
  TERNION_ASSIGN_OR_RETURN(token.is_single_word, GetBool(json, "single_word", false));
  TERNION_ASSIGN_OR_RETURN(token.strips_left, GetBool(json, "lstrip", false));
  TERNION_ASSIGN_OR_RETURN(token.strips_right, GetBool(json, "rstrip", false));
  TERNION_ASSIGN_OR_RETURN(token.is_normalized, GetBool(json, "normalized", !token.is_special));
  if (token.content.empty()) return absl::InvalidArgumentError("content is empty");
  return token;
}

// Ids and contents must be distinct, and an added token that the vocabulary has too is the same
// there.
absl::Status CheckAddedTokens(const TokenizerFile& file) {
  absl::flat_hash_set<int32_t> vocab_ids;
  for (const auto& [token, id] : file.vocab) vocab_ids.insert(id);
  absl::flat_hash_set<int32_t> ids;
  absl::flat_hash_set<absl::string_view> contents;
  for (const AddedToken& token : file.added_tokens) {
    const auto in_vocab = file.vocab.find(token.content);
    const bool clashes =
        in_vocab == file.vocab.end() ? vocab_ids.contains(token.id) : in_vocab->second != token.id;
    if (clashes || !ids.insert(token.id).second || !contents.insert(token.content).second) {
      return absl::InvalidArgumentError(absl::StrCat("token ", Shown(token.content), " with id ",
                                                     token.id, " clashes with another token"));
    }
  }
  return absl::OkStatus();
}

absl::Status ParseAddedTokens(const Json& root, TokenizerFile* file) {
  const Json* list = FindValue(root, "added_tokens");
  if (list == nullptr) return absl::OkStatus();
  if (!list->is_array()) return WrongType("the list", "array");
  for (size_t i = 0; i < list->size(); ++i) {
    absl::StatusOr<AddedToken> token = ParseAddedToken((*list)[i]);
    if (!token.ok()) return base::Annotate(token.status(), absl::StrCat("entry ", i));
    file->added_tokens.push_back(*std::move(token));
  }
  return CheckAddedTokens(*file);
}

}  // namespace

absl::StatusOr<TokenizerFile> ParseTokenizerFile(absl::string_view json) {
  TERNION_ASSIGN_OR_RETURN(const Json root, ParseJson(json));
  if (!root.is_object()) return absl::InvalidArgumentError("not a JSON object");
  TokenizerFile file;
  TERNION_RETURN_IF_ERROR(base::Annotate(ParseModel(root, &file), "model"));
  TERNION_RETURN_IF_ERROR(base::Annotate(ParseNormalizer(root, &file), "normalizer"));
  TERNION_RETURN_IF_ERROR(base::Annotate(ParsePreTokenizer(root, &file), "pre_tokenizer"));
  TERNION_RETURN_IF_ERROR(base::Annotate(ParseDecoder(root), "decoder"));
  TERNION_RETURN_IF_ERROR(base::Annotate(ParseAddedTokens(root, &file), "added_tokens"));
  return file;
}

}  // namespace ternion::runtime
