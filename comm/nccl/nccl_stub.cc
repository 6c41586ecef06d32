// Stands in for the NCCL transport in a build without it.
#include "comm/nccl/nccl.h"

namespace ternion::comm {

absl::StatusOr<std::unique_ptr<Transport>> MakeNcclTransport(Transport&) {
  return absl::UnimplementedError("this build has no NCCL transport; use --transport mpi");
}

}  // namespace ternion::comm
