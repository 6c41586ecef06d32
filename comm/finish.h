// The line between what ops do and what the host does.
#pragma once

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/kernels.h"

namespace ternion::comm {

// Returns when all ops called so far are done: from then on the host may touch what they read and
// wrote. Internal when the device failed.
inline absl::Status Finish(const kernels::Kernels& kernels, kernels::Executor& executor) {
  const char* error = kernels.wait(executor);
  return error == nullptr ? absl::OkStatus()
                          : absl::InternalError(absl::StrCat(kernels.name, ": ", error));
}

}  // namespace ternion::comm
