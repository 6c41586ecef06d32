// The part of NCCL that comm/nccl is written in, for ranks that are threads of one process:
// comm/nccl/communicator.cc compiles against this header and the emulated CUDA runtime.
//
// Names and behaviour are NCCL's (NCCL user guide), and where NCCL may do one thing or the other,
// the one that is worse for its caller. A call returns before its work is done: connecting ends
// when all ranks have called, a group is on its stream some polls of ncclCommGetAsyncError later.
// The groups of a communicator run one after the other; one is done when every send and receive in
// it has met its counterpart in the group that runs at the peer, and else never. Bytes are copied
// when both have met.
#pragma once

#include <cuda_runtime.h>

enum ncclResult_t {
  ncclSuccess = 0,
  ncclSystemError = 2,
  ncclInternalError = 3,
  ncclInvalidArgument = 4,
  ncclRemoteError = 6,
  ncclInProgress = 7
};
enum ncclDataType_t { ncclUint8 = 1 };
using ncclComm_t = struct ncclComm*;

struct ncclUniqueId {
  char internal[128];
};
struct ncclConfig_t {
  int blocking = 1;
};
#define NCCL_CONFIG_INITIALIZER \
  {}

const char* ncclGetErrorString(ncclResult_t result);
const char* ncclGetLastError(ncclComm_t comm);
ncclResult_t ncclGetUniqueId(ncclUniqueId* id);
// Takes a device twice, too, since ranks on emulated nodes all number theirs from 0.
ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config);
ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state);
ncclResult_t ncclCommFinalize(ncclComm_t comm);
// Ends the process where something is under way, which would never return.
ncclResult_t ncclCommDestroy(ncclComm_t comm);
ncclResult_t ncclCommAbort(ncclComm_t comm);
ncclResult_t ncclGroupStart();
ncclResult_t ncclGroupEnd();
ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t type, int peer,
                      ncclComm_t comm, cudaStream_t stream);
ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                      cudaStream_t stream);

namespace ternion::emulator {

// What goes wrong, for all communicators from now on.
struct NcclFaults {
  // Of this rank's communicator: what ncclCommGetAsyncError says.
  int failing_rank = -1;
  ncclResult_t error = ncclSuccess;
  bool stuck = false;  // nothing moves any more, and nobody hears why
};
void SetNcclFaults(const NcclFaults& faults);

// Of all communicators so far.
struct NcclCounts {
  int connected = 0, aborted = 0, destroyed = 0;
  int groups = 0;
};
NcclCounts CountNccl();

}  // namespace ternion::emulator
