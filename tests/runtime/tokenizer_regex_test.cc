#include "runtime/tokenizer_regex.h"

#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace ternion::runtime {
namespace {

using Pieces = std::vector<std::string>;

Pieces Split(const std::string& pattern, const std::string& text) {
  const auto regex = TokenizerRegex::Compile(pattern);
  EXPECT_TRUE(regex.ok()) << pattern << ": " << regex.status();
  if (!regex.ok()) return {};
  std::vector<absl::string_view> pieces;
  regex->Split(text, &pieces);
  return Pieces(pieces.begin(), pieces.end());
}

TEST(TokenizerRegexTest, SplitsIntoMatchesAndGaps) {
  EXPECT_EQ(Split("b+", "abbcb"), (Pieces{"a", "bb", "c", "b"}));
  EXPECT_EQ(Split("x", "abc"), (Pieces{"abc"}));
  EXPECT_EQ(Split("x", ""), Pieces{});
  EXPECT_EQ(Split("(a)(b)|c", "xabc"), (Pieces{"x", "ab", "c"}));
  EXPECT_EQ(Split("(?<=a)b", "abb"), (Pieces{"a", "b", "b"}));
  EXPECT_EQ(Split("b", std::string("a\0b", 3)), (Pieces{std::string("a\0", 2), "b"}));
}

// Expected values: HF tokenizers.
TEST(TokenizerRegexTest, EmptyMatchesGoOnBehindTheNextCharacter) {
  EXPECT_EQ(Split("x*", "axxb\u00E9"), (Pieces{"a", "xx", "b", "\u00E9"}));
  EXPECT_EQ(Split("(?=b)", "abab"), (Pieces{"a", "ba", "b"}));
  EXPECT_EQ(Split("x*|b", "bb"), (Pieces{"b", "b"}));
}

TEST(TokenizerRegexTest, SpaceIsUnicodeWhiteSpaceAndNothingElse) {
  for (const char* space : {"\t", "\n", "\v", "\f", "\r", " ", "\u0085", "\u00A0", "\u1680",
                            "\u2000", "\u200A", "\u2028", "\u2029", "\u202F", "\u205F", "\u3000"}) {
    const std::string text = std::string("a") + space + "b";
    EXPECT_EQ(Split("\\s", text).size(), 3u) << text;
    EXPECT_EQ(Split("[^\\s]+", text).size(), 3u) << text;
    EXPECT_EQ(Split("\\S+", text).size(), 3u) << text;
    EXPECT_EQ(Split("[\\Sx]+", text).size(), 3u) << text;
  }
  for (const char* other :
       {"\x1C", "\x1D", "\x1E", "\x1F", "\u180E", "\u200B", "\u2060", "\uFEFF"}) {
    const std::string text = std::string("a") + other + "b";
    EXPECT_EQ(Split("\\s", text).size(), 1u) << text;
    EXPECT_EQ(Split("\\S+", text).size(), 1u) << text;
    EXPECT_EQ(Split("[^\\S]", text).size(), 1u) << text;
  }
}

TEST(TokenizerRegexTest, PropertiesKnowNewCharacters) {
  const std::string letter = "\U0002EDF5";  // CJK extension I, Unicode 15.1
  EXPECT_EQ(Split("\\p{L}+", "1a" + letter + "1"), (Pieces{"1", "a" + letter, "1"}));
  EXPECT_EQ(Split("\\p{Lu}+", "a" + letter), (Pieces{"a" + letter}));
  EXPECT_EQ(Split("[^\\p{L}]+", "1a" + letter + "1"), (Pieces{"1", "a" + letter, "1"}));
  EXPECT_EQ(Split("\\P{L}+", "1a" + letter + "1"), (Pieces{"1", "a" + letter, "1"}));
  EXPECT_EQ(Split("\\p{^L}+", "1a"), (Pieces{"1", "a"}));
  EXPECT_EQ(Split("\\p{Han}+", "a\u4E2D" + letter), (Pieces{"a", "\u4E2D" + letter}));
  EXPECT_EQ(Split("\\d+", "a1\u0663\U00011DA0"), (Pieces{"a", "1\u0663\U00011DA0"}));
  EXPECT_EQ(Split("\\D+", "a1"), (Pieces{"a", "1"}));
}

// A script is the characters of that script, without those that it shares (script extensions).
TEST(TokenizerRegexTest, ScriptsAreWithoutExtensions) {
  EXPECT_EQ(Split("\\p{Han}+", "\u4E2D\u3001"), (Pieces{"\u4E2D", "\u3001"}));
}

TEST(TokenizerRegexTest, CaseIsIgnoredInGroupsThatSaySo) {
  EXPECT_EQ(Split("(?i:'s|'re)", "x'Sx'rEx'\u017F"),
            (Pieces{"x", "'S", "x", "'rE", "x", "'\u017F"}));
  EXPECT_EQ(Split("'s", "x'S"), (Pieces{"x'S"}));
}

TEST(TokenizerRegexTest, EscapesAndRepeats) {
  EXPECT_EQ(Split("[\\-\\]\\[\\\\]", "a-b]c"), (Pieces{"a", "-", "b", "]", "c"}));
  EXPECT_EQ(Split("\\x{4e2d}|\\u00e9", "a\u4E2Db\u00E9"), (Pieces{"a", "\u4E2D", "b", "\u00E9"}));
  EXPECT_EQ(Split("[\\s-]", "a-b"), (Pieces{"a", "-", "b"}));
  EXPECT_EQ(Split("\\p{N}{1,3}", "12345"), (Pieces{"123", "45"}));
  EXPECT_EQ(Split(".", "a\r\n"), (Pieces{"a", "\r", "\n"}));
  EXPECT_EQ(Split("[&{(^$]", "a&(b"), (Pieces{"a", "&", "(", "b"}));
}

TEST(TokenizerRegexTest, RefusesWhatOnigurumaReadsDifferently) {
  for (const char* pattern :
       {"^a",    "a$",       "\\w",     "\\W",        "\\h",         "\\v",     "\\b",
        "\\A",   "\\z",      "\\Z",     "\\G",        "\\K",         "\\R",     "\\X",
        "\\1",   "\\k<a>",   "\\Qa",    "\\x41",      "\\u12",       "\\u12}4", "\\pL",
        "\\p{",  "\\p{L&}",  "\\p{}",   "[[a]b]",     "[[:alpha:]]", "[a&&b]",  "[]a]",
        "[^]a]", "[a-\\s]",  "[\\s-a]", "[\\p{L}-z]", "(?i)a",       "(?m:a)",  "(?<n>a)",
        "(?#a)", "(?P<n>a)", "(*FAIL)", "(?R)",       "a{,3}",       "a{x}",    "a{1,2}+",
        "{"}) {
    const auto regex = TokenizerRegex::Compile(pattern);
    EXPECT_EQ(regex.status().code(), absl::StatusCode::kUnimplemented) << pattern;
  }
  for (const char* pattern : {"(a", "a)", "[a", "[z-a]", "*a", "\\", "\\p{Nonsense}", "\\p{Zx}",
                              "\\x{110000}", "\\x{zz}", "a{3,1}", "(?<=a*)b"}) {
    const auto regex = TokenizerRegex::Compile(pattern);
    EXPECT_EQ(regex.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
    EXPECT_FALSE(absl::StrContains(regex.status().message(), "\n"));
  }
  EXPECT_FALSE(TokenizerRegex::Compile(std::string(70'000, 'a')).ok());
  EXPECT_FALSE(TokenizerRegex::Compile(std::string(10'000, '(')).ok());
}

// The usual patterns take linear time on runs of one kind of character.
TEST(TokenizerRegexTest, LongRunsTakeLittleTime) {
  const std::string pattern =
      "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}"
      "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
  const size_t n = 1'000'000;
  EXPECT_EQ(Split(pattern, std::string(n, ' ') + "x").size(), 2u);
  EXPECT_EQ(Split(pattern, std::string(n, 'x')).size(), 1u);
  EXPECT_EQ(Split(pattern, std::string(n, '.')).size(), 1u);
  EXPECT_EQ(Split(pattern, std::string(n, '\n')).size(), 1u);
  EXPECT_EQ(Split(pattern, std::string(300'000, '7')).size(), 100'000u);
}

TEST(TokenizerRegexTest, EndlessBacktrackingEnds) {
  const std::string text = "b" + std::string(100, 'a');
  EXPECT_EQ(Split("b|(?:a|a)+c", text), (Pieces{"b", std::string(100, 'a')}));
}

}  // namespace
}  // namespace ternion::runtime
