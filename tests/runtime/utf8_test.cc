#include "runtime/utf8.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::runtime {
namespace {

std::string Replaced(const std::string& bytes) {
  std::string text;
  EXPECT_EQ(AppendAsUtf8(bytes, /*is_last=*/true, &text), bytes.size());
  return text;
}

// Expected values: Python, bytes.decode(errors="replace").
TEST(Utf8Test, ReplacesMaximalInvalidParts) {
  const std::string r = "\uFFFD";
  const struct {
    std::string bytes, expected;
  } cases[] = {
      {"", ""},
      {std::string("a\0b", 3), std::string("a\0b", 3)},
      {"\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF",
       "\x7F\xC2\x80\xDF\xBF\xE0\xA0\x80\xEF\xBF\xBF\xF0\x90\x80\x80\xF4\x8F\xBF\xBF"},
      {"\x80", r},                                   // a continuation alone
      {"\xC0\x80", r + r},                           // overlong
      {"\xC1\xBF", r + r},                           //
      {"\xE0\x80\x80", r + r + r},                   //
      {"\xE0\x9F\xBF", r + r + r},                   //
      {"\xF0\x8F\xBF\xBF", r + r + r + r},           //
      {"\xED\xA0\x80", r + r + r},                   // a surrogate
      {"\xED\x9F\xBF\xEE\x80\x80", "\uD7FF\uE000"},  // its neighbours
      {"\xF4\x90\x80\x80", r + r + r + r},           // above U+10FFFF
      {"\xF5\x80\x80\x80", r + r + r + r},
      {"\xFE\xFF", r + r},
      {"\xE2\x82", r},  // cut off
      {"\xE2\x82z", r + "z"},
      {"\xF0\x9F\x98z", r + "z"},
      {"\xF0\x9F\xE2\x82\xAC", r + "\u20AC"},
      {"\xC3\xC3\xA9", r + "\u00E9"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(Replaced(c.bytes), c.expected);
    EXPECT_EQ(IsValidUtf8(c.bytes), c.bytes == c.expected);
  }
}

TEST(Utf8Test, AnUnfinishedCharacterWaits) {
  std::string text;
  EXPECT_EQ(AppendAsUtf8("ab\xF0\x9F\x98", /*is_last=*/false, &text), 2u);
  EXPECT_EQ(text, "ab");
  EXPECT_EQ(AppendAsUtf8("\xF0\x80", /*is_last=*/false, &text), 2u);  // can no longer be finished
  EXPECT_EQ(text, "ab\uFFFD\uFFFD");
}

TEST(Utf8Test, CodePointsRoundTrip) {
  std::string text;
  std::vector<int32_t> code_points;
  for (int32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    code_points.push_back(c);
    AppendCodePoint(c, &text);
  }
  EXPECT_TRUE(IsValidUtf8(text));
  EXPECT_EQ(DecodeUtf8(text), code_points);
}

// Expected values: Python, unicodedata.normalize("NFC", ...).
TEST(Utf8Test, ComposesCanonically) {
  const struct {
    const char *text, *expected;
  } cases[] = {
      {"", ""},
      {"plain \u00FF", "plain \u00FF"},
      {"e\u0301", "\u00E9"},
      {"\u212B \u2126", "\u00C5 \u03A9"},             // singletons
      {"\u0958", "\u0915\u093C"},                     // excluded from composition
      {"q\u0307\u0323", "q\u0323\u0307"},             // reordered
      {"s\u0307\u0323\u0307", "\u1E69\u0307"},        // two steps
      {"a\u0323\u0308\u0301", "\u1EA1\u0308\u0301"},  //
      {"a\u0344", "\u00E4\u0301"},                    // a mark of two marks
      {"\u1112\u1161\u11AB", "\uD55C"},               // Hangul
      {"\uAC00\u11A8\u11A8", "\uAC01\u11A8"},         //
      {"\uAC00\u11A7", "\uAC00\u11A7"},               // no final consonant
      {"\u11A7\u11A7e\u0301\u11A7", "\u11A7\u11A7\u00E9\u11A7"},
      {"\u0301e", "\u0301e"},  // a mark without a base
      {"\U0001D15E", "\U0001D157\U0001D165"},
      {"\u0F71\u0F72\u0F74", "\u0F71\u0F72\u0F74"},
  };
  for (const auto& c : cases) {
    EXPECT_EQ(ToNfc(c.text), c.expected) << c.text;
    EXPECT_EQ(ToNfc(ToNfc(c.text)), c.expected) << c.text;
  }
}

// Must not take quadratic time, which would be minutes here.
TEST(Utf8Test, ManyMarksTakeLittleTime) {
  std::string text = "a", low, high;
  for (int i = 0; i < 200'000; ++i) {
    text += "\u0301\u0323";
    low += "\u0323";
    high += "\u0301";
  }
  const std::string expected = "\u1EA1" + low.substr(2) + high;
  EXPECT_TRUE(ToNfc(text) == expected);
}

}  // namespace
}  // namespace ternion::runtime
