#include "comm/codec.h"

#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

TEST(CodecTest, NamesRoundTrip) {
  for (RowFormat format :
       {RowFormat::kFp32, RowFormat::kBf16, RowFormat::kInt8, RowFormat::kInt4}) {
    EXPECT_EQ(ParseRowFormat(RowFormatName(format)).value(), format);
  }
  const absl::Status unknown = ParseRowFormat("fp16").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(unknown.message().find("fp32, bf16, int8 or int4"), absl::string_view::npos);
}

}  // namespace
}  // namespace ternion::comm
