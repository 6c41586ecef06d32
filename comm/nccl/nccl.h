// Ranks on GPUs that exchange device buffers through NCCL.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "comm/transport.h"

namespace ternion::comm {

// A transport between the GPUs of `control`'s ranks; control messages stay on `control`, which must
// outlive it. Unimplemented in a build without NCCL.
absl::StatusOr<std::unique_ptr<Transport>> MakeNcclTransport(Transport& control);

}  // namespace ternion::comm
