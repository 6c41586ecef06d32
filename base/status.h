// Status macros that Debian's Abseil lacks, and CHECK for our own bugs.
//
// Errors of the world (files, network, users, dead peers) travel as absl::Status. A failed CHECK is
// a bug in Ternion: it prints the condition and aborts.
#pragma once

#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"

#define TERNION_CONCAT_INNER(a, b) a##b
#define TERNION_CONCAT(a, b) TERNION_CONCAT_INNER(a, b)

// Returns from the enclosing function if `expr` (an absl::Status) is not ok.
#define TERNION_RETURN_IF_ERROR(expr)                                 \
  do {                                                                \
    if (absl::Status status_ = (expr); !status_.ok()) return status_; \
  } while (false)

// Evaluates `expr` (an absl::StatusOr<T>), returns its status on error, else moves the value to
// `lhs`.
#define TERNION_ASSIGN_OR_RETURN(lhs, expr) \
  TERNION_ASSIGN_OR_RETURN_IMPL(TERNION_CONCAT(status_or_, __LINE__), lhs, expr)
#define TERNION_ASSIGN_OR_RETURN_IMPL(tmp, lhs, expr) \
  auto tmp = (expr);                                  \
  if (!tmp.ok()) return std::move(tmp).status();      \
  lhs = std::move(tmp).value()

namespace ternion::base {

// `status` with "`context`: " before its message; ok stays ok.
inline absl::Status Annotate(const absl::Status& status, absl::string_view context) {
  if (status.ok()) return status;
  return absl::Status(status.code(), absl::StrCat(context, ": ", status.message()));
}

}  // namespace ternion::base
