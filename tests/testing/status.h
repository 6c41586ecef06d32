// What tests expect of errors.
#pragma once

#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace ternion::test {

// `status` is an error of kind `code` in one line with `text` in it. Use as
// EXPECT_TRUE(IsError(...)).
inline ::testing::AssertionResult IsError(const absl::Status& status, absl::StatusCode code,
                                          const std::string& text) {
  if (status.code() == code && absl::StrContains(status.message(), text) &&
      !absl::StrContains(status.message(), "\n")) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "expected " << absl::StatusCodeToString(code)
                                       << " with \"" << text << "\", got " << status;
}

inline ::testing::AssertionResult IsInvalid(const absl::Status& status, const std::string& text) {
  return IsError(status, absl::StatusCode::kInvalidArgument, text);
}

}  // namespace ternion::test
