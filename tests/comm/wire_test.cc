// Messages that are damaged, cut short or made up must be errors that say whose and what.
#include "comm/wire.h"

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

constexpr RankId kFrom{3};

// Bit by bit, as CRC-32C is defined.
uint32_t SlowCrc32c(const std::vector<uint8_t>& bytes) {
  uint32_t crc = ~0u;
  for (uint8_t byte : bytes) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82F63B78u : 0);
  }
  return ~crc;
}

struct Sample {
  ExchangeOptions options;
  MessageHeader header;
  DispatchLayout layout{RowFormat::kFp32, 0, 0, 0};
  std::vector<uint8_t> bytes;
};

// A dispatch message of three rows with 2, 1 and 3 routes.
Sample MakeDispatch(RowFormat format) {
  Sample s;
  s.options = {.dispatch = format,
               .act_bits = format == RowFormat::kInt4 ? 4 : 8,
               .hidden = 11,
               .max_rows = 4,
               .top_k = 3,
               .num_experts = 10};
  s.header.phase = Phase::kDispatch;
  s.header.format = format;
  s.header.step = 70;
  s.header.layer = 5;
  s.header.micro_batch = 1;
  s.header.hidden = 11;
  s.header.rows = 3;
  s.header.routes = 6;
  s.layout = DispatchLayout(format, 11, 3, 6);
  s.header.payload_bytes = s.layout.payload_bytes;
  const std::vector<DispatchPlan::Row> rows = {{0, 0, 2}, {2, 2, 1}, {3, 3, 3}};
  // Ascending throughout, so that wrong counts do not show as wrong ids.
  const std::vector<Route> routes = {{ExpertId{1}, 0.5f},  {ExpertId{2}, 0.25f},
                                     {ExpertId{4}, 1.0f},  {ExpertId{5}, 0.125f},
                                     {ExpertId{7}, 0.75f}, {ExpertId{9}, -2.0f}};
  const float scales[] = {1, 2, 3, 4};
  s.bytes.resize(s.layout.message_bytes);
  WriteDispatchMetadata(s.layout, rows, routes, scales, s.bytes);
  for (size_t i = s.layout.codes; i < s.bytes.size(); ++i) s.bytes[i] = static_cast<uint8_t>(i);
  SealMessage(s.header, s.bytes);
  return s;
}

absl::StatusOr<DispatchView> Read(const Sample& s, std::span<const uint8_t> bytes) {
  // Copied to exactly its size, so that the sanitizer sees reads past the end.
  static std::vector<uint8_t> copy;
  copy = std::vector<uint8_t>(bytes.begin(), bytes.end());
  return ReadDispatch(copy, s.header, s.options, kFrom);
}

absl::StatusOr<DispatchView> Read(const Sample& s) { return Read(s, s.bytes); }

void ExpectError(const absl::Status& status, const std::string& field) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
  EXPECT_NE(status.message().find("rank 3"), absl::string_view::npos) << status;
  EXPECT_NE(status.message().find(field), absl::string_view::npos) << status;
}

class WireTest : public testing::TestWithParam<RowFormat> {};

TEST_P(WireTest, WhatIsWrittenIsRead) {
  const Sample s = MakeDispatch(GetParam());
  const auto view = Read(s);
  ASSERT_TRUE(view.ok()) << view.status();
  EXPECT_EQ(view->num_rows(), 3);
  EXPECT_EQ(view->num_routes(), 6);
  EXPECT_EQ(view->num_routes_of(2), 3);
  EXPECT_EQ(view->route(1).expert, ExpertId{2});
  EXPECT_EQ(view->route(5).weight, -2.0f);
  if (s.layout.scales != s.layout.codes) {
    EXPECT_EQ(view->scale(1), 3) << "scales are those of the rows' sources";
  }
  EXPECT_EQ(*view->codes(1), static_cast<uint8_t>(s.layout.codes + s.layout.row_bytes));
}

TEST_P(WireTest, EveryFlippedByteIsAnError) {
  Sample s = MakeDispatch(GetParam());
  for (uint8_t& byte : s.bytes) {
    for (int mask : {0x01, 0x80, 0xFF}) {
      byte ^= mask;
      const absl::Status status = Read(s).status();
      EXPECT_FALSE(status.ok()) << "byte " << &byte - s.bytes.data();
      EXPECT_NE(status.message().find("rank 3"), absl::string_view::npos) << status;
      byte ^= mask;
    }
  }
  EXPECT_TRUE(Read(s).ok());
}

TEST_P(WireTest, EveryTruncationAndExtensionIsAnError) {
  Sample s = MakeDispatch(GetParam());
  for (size_t size = 0; size < s.bytes.size(); ++size) {
    EXPECT_FALSE(Read(s, std::span(s.bytes).first(size)).ok()) << size;
    // The same with a checksum that fits: sizes alone must be enough to refuse it.
    std::vector<uint8_t> cut(s.bytes.begin(), s.bytes.begin() + size);
    if (size < sizeof(MessageHeader)) continue;
    SealMessage(s.header, cut);
    ExpectError(Read(s, cut).status(), "size");
  }
  s.bytes.push_back(0);
  EXPECT_EQ(Read(s).status().code(), absl::StatusCode::kDataLoss);
  SealMessage(s.header, s.bytes);
  ExpectError(Read(s).status(), "size");
}

TEST_P(WireTest, HostileHeadersWithARightChecksumAreErrors) {
  using Edit = std::function<void(MessageHeader&)>;
  const struct {
    const char* field;
    Edit edit;
  } cases[] = {
      {"magic", [](auto& h) { h.magic ^= 1; }},
      {"version", [](auto& h) { ++h.version; }},
      {"phase", [](auto& h) { h.phase = Phase::kCombine; }},
      {"phase", [](auto& h) { h.phase = static_cast<Phase>(200); }},
      {"row format", [](auto& h) { h.format = static_cast<RowFormat>(77); }},
      {"step", [](auto& h) { ++h.step; }},
      {"layer", [](auto& h) { --h.layer; }},
      {"micro-batch", [](auto& h) { ++h.micro_batch; }},
      {"hidden", [](auto& h) { h.hidden = 12; }},
      {"hidden", [](auto& h) { h.hidden = UINT32_MAX; }},
      {"rows", [](auto& h) { h.rows = 5; }},
      {"rows", [](auto& h) { h.rows = UINT32_MAX; }},
      {"routes", [](auto& h) { h.routes = 10; }},  // more than top_k each
      {"routes", [](auto& h) { h.routes = UINT32_MAX; }},
      {"payload bytes", [](auto& h) { ++h.payload_bytes; }},
      {"payload bytes", [](auto& h) { h.payload_bytes = UINT64_MAX; }},
      {"payload bytes", [](auto& h) { h.rows = 4; }},
      {"size", [](auto& h) { h.routes = 5; }},
  };
  for (const auto& c : cases) {
    Sample s = MakeDispatch(GetParam());
    MessageHeader header = s.header;
    c.edit(header);
    SealMessage(header, s.bytes);
    ExpectError(Read(s).status(), c.field);
  }
}

TEST_P(WireTest, HostileRoutesWithARightChecksumAreErrors) {
  const Sample good = MakeDispatch(GetParam());
  const auto with = [&](int64_t offset, std::vector<uint8_t> bytes) {
    Sample s = good;
    std::copy(bytes.begin(), bytes.end(), s.bytes.begin() + offset);
    SealMessage(s.header, s.bytes);
    return Read(s).status();
  };
  ExpectError(with(good.layout.counts, {0}), "sum of route counts");
  ExpectError(with(good.layout.counts, {4}), "route count");
  ExpectError(with(good.layout.counts, {255}), "route count");
  ExpectError(with(good.layout.counts, {3, 3, 3}), "route count");
  ExpectError(with(good.layout.counts, {1, 1, 3}), "sum of route counts");
  ExpectError(with(good.layout.ids, {10, 0}), "expert id");  // not below num_experts
  ExpectError(with(good.layout.ids, {255, 255}), "expert id");
  ExpectError(with(good.layout.ids, {9, 0, 1, 0}), "expert id");  // descending
  ExpectError(with(good.layout.ids, {9, 0, 9, 0}), "expert id");  // twice
}

TEST_P(WireTest, RandomBytesBehindAValidHeaderNeverCrash) {
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    Sample s = MakeDispatch(GetParam());
    for (int change = random() % 8; change >= 0; --change) {
      s.bytes[sizeof(MessageHeader) + random() % (s.bytes.size() - sizeof(MessageHeader))] =
          static_cast<uint8_t>(random() % 12);
    }
    MessageHeader header = s.header;
    if (random() % 2) header.rows = random() % 6;
    if (random() % 2) header.routes = random() % 14;
    header.payload_bytes = DispatchLayout(GetParam(), 11, header.rows, header.routes).payload_bytes;
    s.bytes.resize(DispatchLayout(GetParam(), 11, header.rows, header.routes).message_bytes);
    SealMessage(header, s.bytes);
    if (const auto view = Read(s); view.ok()) {
      for (int64_t j = 0; j < view->num_routes(); ++j) {
        EXPECT_LT(base::Index(view->route(j).expert), 10);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, WireTest,
                         testing::Values(RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8,
                                         RowFormat::kInt4),
                         [](const auto& info) { return std::string(RowFormatName(info.param)); });

TEST(WireHeaderTest, ChecksumIsCrc32cOfTheWholeMessage) {
  EXPECT_EQ(SlowCrc32c({'1', '2', '3', '4', '5', '6', '7', '8', '9'}), 0xE3069283u);
  Sample s = MakeDispatch(RowFormat::kInt8);
  MessageHeader header;
  std::memcpy(&header, s.bytes.data(), sizeof(header));
  const uint32_t crc = header.crc32c;
  header.crc32c = 0;
  std::memcpy(s.bytes.data(), &header, sizeof(header));
  EXPECT_EQ(crc, SlowCrc32c(s.bytes));
}

TEST(WireHeaderTest, BytesOnTheWireStayAsTheyAre) {
  const Sample s = MakeDispatch(RowFormat::kInt8);
  EXPECT_EQ(std::string(s.bytes.begin(), s.bytes.begin() + 4), "TERN");
  const uint8_t fields[] = {2,  0, 1, 2, 70, 0, 0, 0, 5, 0, 1, 0,
                            11, 0, 0, 0, 3,  0, 0, 0, 6, 0, 0, 0};
  EXPECT_EQ(std::memcmp(s.bytes.data() + 4, fields, sizeof(fields)), 0);
  EXPECT_EQ(s.layout.ids, 40 + 6 * 4);
  EXPECT_EQ(s.layout.counts, 40 + 6 * 4 + 6 * 2);
  EXPECT_EQ(s.layout.scales, 80);  // 79 and one byte of padding
  EXPECT_EQ(s.layout.codes, 80 + 3 * 4);
  EXPECT_EQ(s.layout.message_bytes, 80 + 3 * 4 + 3 * 11);
  EXPECT_EQ(s.layout.payload_bytes, 3 * 4 + 3 * 11);
}

TEST(WireCombineTest, OnlyWhatTheOwnerExpectsPasses) {
  MessageHeader expected;
  expected.phase = Phase::kCombine;
  expected.format = RowFormat::kBf16;
  expected.step = 2;
  expected.hidden = 5;
  expected.rows = 3;
  expected.payload_bytes = 30;
  std::vector<uint8_t> bytes(sizeof(expected) + 30, 7);
  const auto check = [&](MessageHeader header) {
    SealMessage(header, bytes);
    return CheckCombine(bytes, expected, kFrom);
  };
  EXPECT_TRUE(check(expected).ok());
  MessageHeader header = expected;
  header.rows = 2;
  ExpectError(check(header), "rows");
  header = expected;
  header.routes = 3;
  ExpectError(check(header), "routes");
  header = expected;
  header.payload_bytes = 31;
  ExpectError(check(header), "payload bytes");
  bytes.push_back(0);
  ExpectError(check(expected), "size");
  bytes.resize(bytes.size() - 1);
  EXPECT_TRUE(check(expected).ok());
  for (uint8_t& byte : bytes) {
    byte ^= 0x10;
    EXPECT_FALSE(CheckCombine(bytes, expected, kFrom).ok());
    byte ^= 0x10;
  }
}

}  // namespace
}  // namespace ternion::comm
