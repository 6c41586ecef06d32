// Stands in for NCCL in a build without it.
#include "comm/nccl/communicator.h"

namespace ternion::comm {
namespace {

absl::Status Absent() {
  return absl::UnimplementedError("this build has no NCCL transport; use --transport mpi");
}

}  // namespace

absl::StatusOr<std::string> DeviceName() { return Absent(); }
absl::StatusOr<std::string> MakeCommunicatorId() { return Absent(); }
absl::StatusOr<std::unique_ptr<Communicator>> Communicator::Connect(const std::string&, int, int) {
  return Absent();
}

}  // namespace ternion::comm
