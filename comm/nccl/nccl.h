// Ranks on GPUs that exchange through NCCL.
#pragma once

#include <chrono>
#include <memory>

#include "absl/status/statusor.h"
#include "comm/transport.h"

namespace ternion::comm {

struct NcclOptions {
  // For how long NCCL may be at something without getting it done, while no peer is known to be
  // lost. Longer than a rank ever computes without a call to the transport.
  std::chrono::milliseconds patience{120'000};
};

// A transport between the devices that `control`'s ranks have chosen (cudaSetDevice). Dispatch and
// combine messages travel by NCCL, from memory that the device reaches to such memory (UseMemory);
// control messages, and what the ranks agree on before bytes travel, go over `control`. That
// outlives it, shares its pool, and is nobody else's to use meanwhile.
//
// Ranks that are threads of one process on one device hand messages to each other, as `control`
// does: NCCL refuses a device twice. InvalidArgument where processes share one.
//
// Collective. Unimplemented in a build without NCCL. A transport that has returned an error is
// unusable, and has ended what was under way.
absl::StatusOr<std::unique_ptr<Transport>> MakeNcclTransport(Transport& control,
                                                             const NcclOptions& options = {});

}  // namespace ternion::comm
