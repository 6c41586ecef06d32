#include "comm/nccl/communicator.h"

#include <cuda_runtime.h>
#include <nccl.h>

#include <cstring>

#include "base/status.h"

namespace ternion::comm {
namespace {

absl::Status FromCuda(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return absl::OkStatus();
  return absl::InternalError(absl::StrCat(call, ": ", cudaGetErrorString(code)));
}

// A call that goes on in the background has not failed. `comm` may be null.
absl::Status FromNccl(ncclResult_t code, const char* call, ncclComm_t comm) {
  if (code == ncclSuccess || code == ncclInProgress) return absl::OkStatus();
  std::string text = absl::StrCat(call, ": ", ncclGetErrorString(code));
  const char* detail = comm == nullptr ? nullptr : ncclGetLastError(comm);
  if (detail != nullptr && detail[0] != '\0') absl::StrAppend(&text, ": ", detail);
  const bool lost = code == ncclRemoteError || code == ncclSystemError;
  return lost ? absl::UnavailableError(text) : absl::InternalError(text);
}

class NcclCommunicator : public Communicator {
 public:
  NcclCommunicator() = default;
  ~NcclCommunicator() override;

  absl::Status Init(const std::string& id, int rank, int size);
  absl::Status Start(std::span<const Move> moves) override;
  absl::StatusOr<bool> Poll() override;
  absl::Status Close() override;

 private:
  // Launching: NCCL has not put the group on the stream yet. Running: it has, and done_ stands
  // behind it.
  enum class Stage { kIdle, kConnecting, kLaunching, kRunning, kClosing, kClosed };

  absl::StatusOr<bool> CallsAreDone(const char* call);

  Stage stage_ = Stage::kConnecting;
  ncclComm_t comm_ = nullptr;
  cudaStream_t stream_ = nullptr;
  cudaEvent_t done_ = nullptr;
};

NcclCommunicator::~NcclCommunicator() {
  // A kernel that waits for a peer ends with ncclCommAbort and not before.
  if (comm_ != nullptr) stage_ == Stage::kClosed ? ncclCommDestroy(comm_) : ncclCommAbort(comm_);
  if (done_ != nullptr) cudaEventDestroy(done_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::Status NcclCommunicator::Init(const std::string& id, int rank, int size) {
  ncclUniqueId unique_id;
  if (id.size() != sizeof(unique_id)) {
    return absl::InvalidArgumentError("NCCL: an id of another size: another version of it?");
  }
  std::memcpy(&unique_id, id.data(), sizeof(unique_id));
  TERNION_RETURN_IF_ERROR(FromCuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking),
                                   "cudaStreamCreateWithFlags"));
  TERNION_RETURN_IF_ERROR(FromCuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming),
                                   "cudaEventCreateWithFlags"));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  return FromNccl(ncclCommInitRankConfig(&comm_, size, unique_id, rank, &config),
                  "ncclCommInitRankConfig", comm_);
}

absl::Status NcclCommunicator::Start(std::span<const Move> moves) {
  TERNION_CHECK(stage_ == Stage::kIdle);
  TERNION_RETURN_IF_ERROR(FromNccl(ncclGroupStart(), "ncclGroupStart", comm_));
  absl::Status status;
  for (const Move& move : moves) {
    status.Update(
        move.incoming
            ? FromNccl(ncclRecv(move.data, move.bytes, ncclUint8, move.peer, comm_, stream_),
                       "ncclRecv", comm_)
            : FromNccl(ncclSend(move.data, move.bytes, ncclUint8, move.peer, comm_, stream_),
                       "ncclSend", comm_));
  }
  // The group belongs to the thread: it is ended in any case.
  status.Update(FromNccl(ncclGroupEnd(), "ncclGroupEnd", comm_));
  stage_ = Stage::kLaunching;
  return status;
}

// Whether NCCL's last call, which goes on in the background, has ended.
absl::StatusOr<bool> NcclCommunicator::CallsAreDone(const char* call) {
  ncclResult_t state = ncclSuccess;
  TERNION_RETURN_IF_ERROR(
      FromNccl(ncclCommGetAsyncError(comm_, &state), "ncclCommGetAsyncError", comm_));
  TERNION_RETURN_IF_ERROR(FromNccl(state, call, comm_));
  return state == ncclSuccess;
}

absl::StatusOr<bool> NcclCommunicator::Poll() {
  constexpr const char* kCalls[] = {
      "NCCL", "connecting", "ncclGroupEnd", "ncclSend and ncclRecv", "ncclCommFinalize", "NCCL"};
  TERNION_ASSIGN_OR_RETURN(const bool called, CallsAreDone(kCalls[static_cast<int>(stage_)]));
  if (!called) return false;
  if (stage_ == Stage::kLaunching) {
    TERNION_RETURN_IF_ERROR(FromCuda(cudaEventRecord(done_, stream_), "cudaEventRecord"));
    stage_ = Stage::kRunning;
  }
  if (stage_ == Stage::kRunning) {
    const cudaError_t code = cudaEventQuery(done_);
    if (code == cudaErrorNotReady) return false;
    TERNION_RETURN_IF_ERROR(FromCuda(code, "ncclSend and ncclRecv"));
  }
  stage_ = stage_ == Stage::kClosing || stage_ == Stage::kClosed ? Stage::kClosed : Stage::kIdle;
  return true;
}

absl::Status NcclCommunicator::Close() {
  TERNION_CHECK(stage_ == Stage::kIdle);
  stage_ = Stage::kClosing;
  return FromNccl(ncclCommFinalize(comm_), "ncclCommFinalize", comm_);
}

}  // namespace

absl::StatusOr<std::string> DeviceName() {
  int device = 0;
  char name[32] = "";
  TERNION_RETURN_IF_ERROR(FromCuda(cudaGetDevice(&device), "cudaGetDevice"));
  TERNION_RETURN_IF_ERROR(
      FromCuda(cudaDeviceGetPCIBusId(name, sizeof(name), device), "cudaDeviceGetPCIBusId"));
  return std::string(name);
}

absl::StatusOr<std::string> MakeCommunicatorId() {
  ncclUniqueId id;
  TERNION_RETURN_IF_ERROR(FromNccl(ncclGetUniqueId(&id), "ncclGetUniqueId", nullptr));
  return std::string(reinterpret_cast<const char*>(&id), sizeof(id));
}

absl::StatusOr<std::unique_ptr<Communicator>> Communicator::Connect(const std::string& id, int rank,
                                                                    int size) {
  auto communicator = std::make_unique<NcclCommunicator>();
  TERNION_RETURN_IF_ERROR(communicator->Init(id, rank, size));
  return communicator;
}

}  // namespace ternion::comm
