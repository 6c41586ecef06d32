// Ranks as MPI processes.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "comm/transport.h"

namespace ternion::comm {

// True when an MPI launcher (mpirun, srun with PMIx) started this process.
bool LaunchedByMpi();

// Initializes MPI (at least MPI_THREAD_FUNNELED, checked) and wraps MPI_COMM_WORLD in a
// communicator of our own. MPI is finalized when the transport is destroyed. One per process.
// FailedPrecondition when the library cannot give the thread level.
absl::StatusOr<std::unique_ptr<Transport>> MakeMpiTransport();

}  // namespace ternion::comm
