#include "runtime/tokenizer.h"

#include <chrono>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/file.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "runtime/tokenizer_bpe.h"
#include "runtime/utf8.h"
#include "tests/testing/temp_dir.h"

namespace ternion::runtime {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using Ids = std::vector<int32_t>;

const fs::path kSource = TERNION_SOURCE_DIR;

absl::StatusOr<Tokenizer> LoadText(const std::string& text) {
  const test::TempDir directory;
  directory.Write("tokenizer.json", text);
  return Tokenizer::Load(directory.path());
}

Tokenizer MustLoad(const Json& json) {
  absl::StatusOr<Tokenizer> tokenizer = LoadText(json.dump());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  return *std::move(tokenizer);
}

// The byte of value b has id b; merges of the byte-level strings given follow from id 256 on.
Json SmallTokenizer(const std::vector<std::pair<std::string, std::string>>& merges = {}) {
  Json vocab = Json::object();
  int32_t next = 0x100;
  for (int32_t byte = 0; byte < 256; ++byte) {
    const bool is_printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
    std::string token;
    AppendCodePoint(is_printable ? byte : next++, &token);
    vocab[token] = byte;
  }
  Json pairs = Json::array();
  for (const auto& [left, right] : merges) {
    if (!vocab.contains(left + right)) vocab[left + right] = vocab.size();
    pairs.push_back(std::vector<std::string>{left, right});
  }
  Json json = Json::parse(R"({
    "added_tokens": [], "normalizer": null, "post_processor": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false},
    "decoder": {"type": "ByteLevel"}, "model": {"type": "BPE"}})");
  json["model"]["vocab"] = std::move(vocab);
  json["model"]["merges"] = std::move(pairs);
  return json;
}

Json Added(int32_t id, const std::string& content, const std::vector<std::string>& flags = {}) {
  Json token;
  token["id"] = id;
  token["content"] = content;
  for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized", "special"}) {
    token[flag] = false;
  }
  for (const std::string& flag : flags) token[flag] = true;
  return token;
}

// --- Cases by HF tokenizers ---

// Checks DIR's tokenizer against every case of `cases_path`; returns their number.
size_t CheckGolden(const fs::path& directory, const fs::path& cases_path) {
  const auto tokenizer = Tokenizer::Load(directory.string());
  EXPECT_TRUE(tokenizer.ok()) << tokenizer.status();
  const auto text = base::ReadFile(cases_path.string());
  EXPECT_TRUE(text.ok()) << text.status();
  if (!tokenizer.ok() || !text.ok()) return 0;
  const Json cases = Json::parse(*text);
  for (const Json& expected : cases) {
    const std::string input = expected["text"];
    const Ids ids = tokenizer->Encode(input);
    EXPECT_EQ(ids, expected["ids"].get<Ids>()) << directory << ": " << expected["text"];
    if (!expected.contains("decoded")) continue;
    std::string decoded;
    AppendAsUtf8(tokenizer->Decode(ids), true, &decoded);
    EXPECT_EQ(decoded, expected["decoded"].get<std::string>()) << directory;
  }
  return cases.size();
}

TEST(TokenizerGoldenTest, TheBundledTokenizerEncodesAsHfDoes) {
  const fs::path cases = kSource / "tests/oracle/golden/tokenizer_cases.json";
  EXPECT_GT(CheckGolden(kSource / "models/tiny", cases), 20u);
}

TEST(TokenizerGoldenTest, EveryStyleEncodesAsHfDoes) {
  size_t num_styles = 0;
  for (const auto& entry : fs::directory_iterator(kSource / "tests/oracle/golden/tokenizers")) {
    EXPECT_GT(CheckGolden(entry.path(), entry.path() / "cases.json"), 20u) << entry.path();
    ++num_styles;
  }
  EXPECT_GE(num_styles, 3u);
}

// --- BPE ---

TEST(TokenizerTest, MergesByRankThenFromTheLeft) {
  // 256: aa, 257: ab, 258: aab, 259: bc
  const Tokenizer t = MustLoad(SmallTokenizer({{"a", "a"}, {"a", "b"}, {"aa", "b"}, {"b", "c"}}));
  EXPECT_EQ(t.Encode("aaa"), (Ids{256, 'a'}));
  EXPECT_EQ(t.Encode("aaaa"), (Ids{256, 256}));
  EXPECT_EQ(t.Encode("aab"), (Ids{258}));
  EXPECT_EQ(t.Encode("aaab"), (Ids{256, 257}));
  EXPECT_EQ(t.Encode("abc"), (Ids{257, 'c'}));
  EXPECT_EQ(t.Encode("bbc"), (Ids{'b', 259}));
  EXPECT_EQ(t.Encode(""), Ids{});
  EXPECT_EQ(t.vocab_size(), 260);
}

TEST(TokenizerTest, AgreesWithTheSimplestPossibleBpe) {
  const std::vector<std::pair<std::string, std::string>> merges = {
      {"a", "b"}, {"b", "a"},  {"ab", "a"}, {"a", "a"},   {"ab", "ab"}, {"ba", "b"}, {"aa", "ab"},
      {"b", "b"}, {"bb", "a"}, {"a", "bb"}, {"ba", "ba"}, {"aba", "b"}};  // some to one token
  const Json json = SmallTokenizer(merges);
  const Tokenizer t = MustLoad(json);
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    std::vector<std::string> symbols(random() % 20);
    for (auto& symbol : symbols) symbol = std::string(1, random() % 2 ? 'a' : 'b');
    std::string text;
    for (const auto& symbol : symbols) text += symbol;
    for (bool merged = true; merged;) {
      merged = false;
      for (size_t m = 0; m < merges.size() && !merged; ++m) {
        for (size_t i = 0; i + 1 < symbols.size() && !merged; ++i) {
          if (symbols[i] != merges[m].first || symbols[i + 1] != merges[m].second) continue;
          symbols[i] += symbols[i + 1];
          symbols.erase(symbols.begin() + i + 1);
          merged = true;
        }
      }
    }
    Ids expected;
    for (const auto& symbol : symbols) expected.push_back(json["model"]["vocab"][symbol]);
    EXPECT_EQ(t.Encode(text), expected) << text;
  }
}

TEST(TokenizerTest, LongWordsTakeLittleTime) {
  const Tokenizer t =
      MustLoad(SmallTokenizer({{"a", "a"}, {"aa", "aa"}, {"aaaa", "aaaa"}, {"b", "a"}}));
  const auto begin = std::chrono::steady_clock::now();
  const std::string word(200'000, 'a');
  EXPECT_EQ(t.Encode(word), Ids(25'000, 258));
  EXPECT_EQ(t.Decode(t.Encode(word)), word);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(seconds.count(), 20.0);  // quadratic time would be minutes
}

TEST(TokenizerTest, IgnoreMergesTakesWholeTokens) {
  Json json = SmallTokenizer({{"a", "b"}});
  json["model"]["vocab"]["cab"] = 257;
  json["model"]["vocab"]["Ġx"] = 258;
  EXPECT_EQ(MustLoad(json).Encode("cab"), (Ids{'c', 256}));
  json["model"]["ignore_merges"] = true;
  EXPECT_EQ(MustLoad(json).Encode("cab"), (Ids{257}));
  EXPECT_EQ(MustLoad(json).Encode(" x"), (Ids{258}));
  EXPECT_EQ(MustLoad(json).Encode("cabb"), (Ids{'c', 256, 'b'}));
}

TEST(TokenizerTest, MergesMayBeStrings) {
  Json json = SmallTokenizer({{"a", "b"}});
  json["model"]["merges"] = Json::parse(R"(["#version: 0.2", "a b"])");
  EXPECT_EQ(MustLoad(json).Encode("ab"), (Ids{256}));
}

TEST(TokenizerTest, BytesWithoutATokenAreLeftOut) {
  Json json = SmallTokenizer({{"a", "c"}});
  json["model"]["vocab"].erase("b");
  EXPECT_EQ(MustLoad(json).Encode("abcb"), (Ids{256}));
}

// --- Around it ---

TEST(TokenizerTest, Gpt2PatternAndPrefixSpace) {
  Json json = SmallTokenizer({{"Ġ", "a"}, {"'", "s"}, {"Ġ", "Ġ"}});  // 256, 257, 258
  EXPECT_EQ(MustLoad(json).Encode("a's   a"), (Ids{'a', 257, 258, 256}));
  json["pre_tokenizer"]["add_prefix_space"] = true;
  json["pre_tokenizer"]["use_regex"] = true;
  EXPECT_EQ(MustLoad(json).Encode("a's   a"), (Ids{256, 257, 258, 256}));
  EXPECT_EQ(MustLoad(json).Encode(" a"), (Ids{256}));
  EXPECT_EQ(MustLoad(json).Encode("   a"), (Ids{258, 256}));
}

TEST(TokenizerTest, AddedTokensAreFoundAsHfDoes) {
  Json json = SmallTokenizer();
  json["added_tokens"] =
      std::vector<Json>{Added(300, "<x>", {"special"}),      Added(301, "<x>>"),
                        Added(302, "word", {"single_word"}), Added(303, "<l>", {"lstrip"}),
                        Added(304, "<r>", {"rstrip"}),       Added(305, "  ", {"normalized"})};
  const Tokenizer t = MustLoad(json);
  EXPECT_EQ(t.Encode("a<x>b"), (Ids{'a', 300, 'b'}));
  EXPECT_EQ(t.Encode("<x>><x>"), (Ids{301, 300}));  // the longest
  EXPECT_EQ(t.Encode("<<x"), (Ids{'<', '<', 'x'}));
  EXPECT_EQ(t.Encode("word-word"), (Ids{302, '-', 302}));
  EXPECT_EQ(t.Encode("words"), (Ids{'w', 'o', 'r', 'd', 's'}));
  EXPECT_EQ(t.Encode("\xC3\xA9word"), (Ids{0xC3, 0xA9, 'w', 'o', 'r', 'd'}));
  EXPECT_EQ(t.Encode("a \xC2\xA0<l> b"), (Ids{'a', 303, ' ', 'b'}));
  EXPECT_EQ(t.Encode("a <r>\n\xE3\x80\x80 b"), (Ids{'a', ' ', 304, 'b'}));
  EXPECT_EQ(t.Encode("<r>  <l>"), (Ids{304, 303}));
  EXPECT_EQ(t.Encode("a  b"), (Ids{'a', 305, 'b'}));
  EXPECT_TRUE(t.IsSpecial(300));
  EXPECT_FALSE(t.IsSpecial(301));
  EXPECT_FALSE(t.IsSpecial(-1));
  EXPECT_FALSE(t.IsSpecial(306));
  EXPECT_EQ(t.vocab_size(), 306);
  EXPECT_EQ(t.TokenBytes(300), "<x>");
  EXPECT_EQ(t.TokenBytes(299), "");
  EXPECT_EQ(t.TokenBytes(-1), "");
  EXPECT_EQ(t.TokenBytes(306), "");
  EXPECT_EQ(t.Decode({'a', 300, 305, 'b', 302, 999, -5}), "a  bword");
}

TEST(TokenizerTest, NfcNormalizesTextAndNormalizedTokens) {
  Json json = SmallTokenizer();
  json["added_tokens"] =
      std::vector<Json>{Added(300, "e\u0301!", {"normalized"}), Added(301, "e\u0301?")};
  json["normalizer"]["type"] = "NFC";
  const Tokenizer t = MustLoad(json);
  EXPECT_EQ(t.Encode("e\u0301"), (Ids{0xC3, 0xA9}));
  EXPECT_EQ(t.Encode("\u00E9!e\u0301!"), (Ids{300, 300}));
  EXPECT_EQ(t.Encode("\u00E9?e\u0301?"), (Ids{0xC3, 0xA9, '?', 301}));
}

TEST(TokenizerTest, InvalidUtf8IsReplaced) {
  const Tokenizer t = MustLoad(SmallTokenizer());
  EXPECT_EQ(t.Encode("a\xFF"), (Ids{'a', 0xEF, 0xBF, 0xBD}));
  EXPECT_EQ(t.Decode(t.Encode("a\xE2\x82")), "a\xEF\xBF\xBD");
}

TEST(TokenizerTest, EveryValidTextComesBack) {
  const auto t = Tokenizer::Load((kSource / "models/tiny").string());
  ASSERT_TRUE(t.ok()) << t.status();
  std::mt19937 random(4);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (int i = random() % 50; i > 0; --i) {
      const int32_t limits[] = {0x80, 0x800, 0x3000, 0x110000};
      int32_t c = static_cast<int32_t>(random() % limits[random() % 4]);
      if (c >= 0xD800 && c <= 0xDFFF) c = ' ';
      AppendCodePoint(c, &text);
    }
    const Ids ids = t->Encode(text);
    EXPECT_EQ(t->Decode(ids), text);
    Utf8Stream stream;
    std::string streamed;
    for (const int32_t id : ids) {
      const std::string part = stream.Push(t->TokenBytes(id));
      EXPECT_TRUE(IsValidUtf8(part));
      streamed += part;
    }
    EXPECT_EQ(streamed + stream.Flush(), text);
  }
}

TEST(TokenizerTest, ThreadsShareATokenizer) {
  const auto t = Tokenizer::Load((kSource / "models/tiny").string());
  ASSERT_TRUE(t.ok()) << t.status();
  const std::string text =
      "The quick brown fox, it's 1234567 \xE2\x82\xAC\n\n  jumps<|endoftext|>!";
  const Ids expected = t->Encode(text);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 200; ++k) EXPECT_EQ(t->Encode(text), expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(Utf8StreamTest, WaitsForWholeCharacters) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("a\xE2"), "a");
  EXPECT_EQ(stream.Push("\x82"), "");
  EXPECT_EQ(stream.Push("\xAC\xF0\x9F"), "\xE2\x82\xAC");
  EXPECT_EQ(stream.Push("x"), "\xEF\xBF\xBDx");  // the character was never finished
  EXPECT_EQ(stream.Push("\xF0\x9F\x98"), "");
  EXPECT_EQ(stream.Flush(), "\xEF\xBF\xBD");
  EXPECT_EQ(stream.Flush(), "");
}

// --- Bad files ---

void ExpectRefused(const std::string& text, absl::StatusCode code, const std::string& expected) {
  const absl::Status status = LoadText(text).status();
  EXPECT_EQ(status.code(), code) << status << "\n" << text.substr(0, 200);
  EXPECT_TRUE(absl::StrContains(status.message(), expected)) << expected << ": " << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "tokenizer.json")) << status;
  EXPECT_FALSE(absl::StrContains(status.message(), "\n")) << status;
}

TEST(TokenizerTest, RefusesBadFiles) {
  EXPECT_EQ(Tokenizer::Load("/no/such/folder").status().code(), absl::StatusCode::kNotFound);
  constexpr auto kWrong = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnsupported = absl::StatusCode::kUnimplemented;
  const struct {
    const char* pointer;  // what is changed
    const char* value;    // JSON
    absl::StatusCode code;
    const char* expected;
  } cases[] = {
      {"/model", "null", kWrong, "model"},
      {"/model/type", "\"WordPiece\"", kUnsupported, "WordPiece"},
      {"/model/type", "3", kUnsupported, "type"},
      {"/model/dropout", "0.1", kUnsupported, "dropout"},
      {"/model/continuing_subword_prefix", "\"##\"", kUnsupported, "prefix"},
      {"/model/end_of_word_suffix", "\"</w>\"", kUnsupported, "suffix"},
      {"/model/ignore_merges", "\"yes\"", kWrong, "ignore_merges"},
      {"/model/vocab", "[]", kWrong, "vocab"},
      {"/model/vocab/zz", "-1", kWrong, "\"zz\""},
      {"/model/vocab/zz", "1.5", kWrong, "\"zz\""},
      {"/model/vocab/zz", "\"7\"", kWrong, "\"zz\""},
      {"/model/vocab/zz", "4194304", kWrong, "\"zz\""},
      {"/model/vocab/zz", "1e18", kWrong, "\"zz\""},
      {"/model/vocab/zz", "65", kWrong, "same id 65"},
      {"/model/merges", "{}", kWrong, "merges"},
      {"/model/merges/0", "\"a\"", kWrong, "merge 0"},
      {"/model/merges/0", "\"a b c\"", kWrong, "merge 0"},
      {"/model/merges/0", "[\"a\"]", kWrong, "merge 0"},
      {"/model/merges/0", "[\"a\", 3]", kWrong, "merge 0"},
      {"/model/merges/0", "\"a zz\"", kWrong, "\"zz\""},
      {"/model/merges/0", "\"b a\"", kWrong, "\"ba\""},
      {"/normalizer", R"({"type": "NFKC"})", kUnsupported, "NFKC"},
      {"/normalizer", "3", kWrong, "normalizer"},
      {"/pre_tokenizer", "null", kUnsupported, "pre_tokenizer"},
      {"/pre_tokenizer/type", "\"Metaspace\"", kUnsupported, "Metaspace"},
      {"/pre_tokenizer/use_regex", "1", kWrong, "use_regex"},
      {"/decoder", "null", kUnsupported, "decoder"},
      {"/decoder/type", "\"WordPiece\"", kUnsupported, "WordPiece"},
      {"/added_tokens", "3", kWrong, "added_tokens"},
      {"/added_tokens/0", "3", kWrong, "added_tokens: entry 0"},
      {"/added_tokens/0", R"({"id": 300, "content": ""})", kWrong, "empty"},
      {"/added_tokens/0", R"({"id": -1, "content": "x"})", kWrong, "\"x\""},
      {"/added_tokens/0", R"({"content": "x"})", kWrong, "\"x\""},
      {"/added_tokens/0", R"({"id": 65, "content": "<x>"})", kWrong, "\"<x>\""},
      {"/added_tokens/0", R"({"id": 300, "content": "A"})", kWrong, "\"A\""},
      {"/added_tokens/1", R"({"id": 301, "content": "<y>"})", kWrong, "\"<y>\""},
      {"/added_tokens/1", R"({"id": 302, "content": "<x>"})", kWrong, "\"<x>\""},
  };
  for (const auto& bad : cases) {
    Json json = SmallTokenizer({{"a", "b"}});
    json["added_tokens"] = std::vector<Json>{Added(301, "<x>")};
    ASSERT_TRUE(LoadText(json.dump()).ok());
    json[Json::json_pointer(bad.pointer)] = Json::parse(bad.value);
    ExpectRefused(json.dump(), bad.code, bad.expected);
  }
  ExpectRefused("[1]", absl::StatusCode::kInvalidArgument, "not a JSON object");
  ExpectRefused("{\"model\":", absl::StatusCode::kInvalidArgument, "parse error");
  ExpectRefused("{\"model\":{},\"model\":{}}", absl::StatusCode::kInvalidArgument, "duplicate key");
}

TEST(TokenizerTest, RefusesUnsupportedSplits) {
  // SmallTokenizer with a Split before its ByteLevel.
  const auto with_split = [](const std::string& pattern, const std::string& behavior) {
    Json json = SmallTokenizer();
    Json split = Json::parse(R"({"type": "Split", "invert": false})");
    split["pattern"] = Json::parse(pattern);
    split["behavior"] = behavior;
    Json sequence = Json::parse(R"({"type": "Sequence", "pretokenizers": []})");
    sequence["pretokenizers"].push_back(split);
    sequence["pretokenizers"].push_back(json["pre_tokenizer"]);
    json["pre_tokenizer"] = sequence;
    return json;
  };
  const std::string good = R"({"Regex": "b"})";
  EXPECT_EQ(MustLoad(with_split(good, "Isolated")).Encode("abc").size(), 3u);
  const auto code = absl::StatusCode::kUnimplemented;
  ExpectRefused(with_split(R"({"String": "b"})", "Isolated").dump(), code, "Split");
  ExpectRefused(with_split(good, "Removed").dump(), code, "Isolated");
  ExpectRefused(with_split(R"({"Regex": "^b"})", "Isolated").dump(), code, "anchor");
  ExpectRefused(with_split(R"({"Regex": "(b"})", "Isolated").dump(),
                absl::StatusCode::kInvalidArgument, "regular expression");
  Json reversed = with_split(good, "Isolated");
  std::swap(reversed["pre_tokenizer"]["pretokenizers"][0],
            reversed["pre_tokenizer"]["pretokenizers"][1]);
  ExpectRefused(reversed.dump(), code, "ByteLevel must come last");
}

TEST(TokenizerTest, DamagedFilesAreErrorsOrLoad) {
  Json json = SmallTokenizer({{"a", "b"}, {"ab", "c"}});
  json["added_tokens"] = std::vector<Json>{Added(300, "<x>", {"special"})};
  json["pre_tokenizer"] = Json::parse(R"({"type": "Sequence", "pretokenizers": [
    {"type": "Split", "pattern": {"Regex": "\\p{L}+|[^\\s]"}, "behavior": "Isolated"},
    {"type": "ByteLevel", "add_prefix_space": false, "use_regex": false}]})");
  const std::string whole = json.dump();
  const std::string words[] = {"[", "]", "{", "}", ",", ":", "\"", "-1", "1e30", "null", "\\", "0"};
  std::mt19937 random(5);
  int num_loaded = 0;
  for (int round = 0; round < 1000; ++round) {
    std::string text = whole;
    for (int edits = 1 + random() % 3; edits > 0; --edits) {
      const size_t at = random() % text.size();
      text.replace(at, random() % 3, words[random() % std::size(words)]);
    }
    const auto tokenizer = LoadText(text);
    if (!tokenizer.ok()) continue;
    ++num_loaded;
    tokenizer->Decode(tokenizer->Encode("abc <x> \xF0\x9F\x98\x80 12"));
  }
  EXPECT_LT(num_loaded, 900);
}

}  // namespace
}  // namespace ternion::runtime
