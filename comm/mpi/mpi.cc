#include "comm/mpi/mpi.h"

// Only the C interface: the C++ bindings are long deprecated, and a library of their own.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>
#include <sched.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "base/logging.h"
#include "base/status.h"
#include "comm/mpi/lifeline.h"

namespace ternion::comm {
namespace {

using Clock = std::chrono::steady_clock;

// The tag of a message is its phase; this one says that the sender has left and sends nothing more.
constexpr int kLeaveTag = kNumPhases;

// mpirun ends a job that has lost a host, and the ranks of it that are left, 6 to 8 seconds after
// the loss (cluster/openmpi.sh); the lifelines know after 3 to 4. An MPI_Abort in between would
// have it wait for the lost host's daemon, for many minutes.
constexpr std::chrono::seconds kLossGrace{7};

// `call`: the MPI function that returned `code`; `peer`: whom it concerned, or -1.
absl::Status FromMpi(int code, const char* call, int peer = -1) {
  if (code == MPI_SUCCESS) return absl::OkStatus();
  char text[MPI_MAX_ERROR_STRING] = "unknown error";
  int length = 0;
  MPI_Error_string(code, text, &length);
  const std::string whom = peer < 0 ? "" : absl::StrCat(" (rank ", peer, ")");
  return absl::UnavailableError(absl::StrCat(call, whom, ": ", text));
}

// Spends the time between two polls: first not at all, then by letting others run, then asleep, so
// that more ranks than cores do not starve each other.
class Backoff {
 public:
  // Returns whether it slept.
  bool Wait() {
    const auto idle = Clock::now() - start_;
    if (idle < std::chrono::microseconds(20)) return false;
    if (idle < std::chrono::microseconds(200)) {
      sched_yield();
      return false;
    }
    const timespec pause{0, 20'000};
    nanosleep(&pause, nullptr);
    return true;
  }

 private:
  const Clock::time_point start_ = Clock::now();
};

absl::StatusOr<bool> IsDone(MPI_Request* request) {
  int done = 0;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Test(request, &done, MPI_STATUS_IGNORE), "MPI_Test"));
  return done != 0;
}

struct Outgoing {
  MPI_Request request = MPI_REQUEST_NULL;
  Message message;
};

struct Incoming {
  Awaited what;
  MPI_Request request = MPI_REQUEST_NULL;
  Message message;
};

class MpiTransport : public Transport {
 public:
  static absl::StatusOr<std::unique_ptr<Transport>> Create();
  ~MpiTransport() override;

  RankId rank() const override { return RankId{rank_}; }
  int size() const override { return static_cast<int>(node_of_.size()); }
  int NodeOf(RankId rank) const override { return node_of_[base::Index(rank)]; }

  absl::Status Send(RankId to, Phase phase, Message message) override;
  absl::Status Flush() override;
  absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) override;
  absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) override;
  absl::StatusOr<std::vector<Message>> AllToAllV(std::vector<Message> to_ranks) override;
  void Abort(const absl::Status& status) override;

 private:
  MpiTransport() : Transport(std::make_shared<MessagePool>()) {}
  absl::Status Connect();
  absl::Status FindNodes();
  absl::Status ConnectLifelines();
  absl::Status Idle(Backoff& backoff);
  absl::Status ReclaimSent();
  absl::Status WaitFor(MPI_Request* request);
  bool IsReceiving(const Awaited& what) const;
  absl::Status StartReceive(const Awaited& what);
  absl::Status NoteLeavers(std::span<const Awaited> awaited);
  absl::Status Leave();
  absl::StatusOr<bool> DropOneMessage();

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  std::vector<int> node_of_;        // [size] the lowest rank on the same host
  std::vector<bool> left_;          // [size] ranks that are known to have left
  std::vector<Outgoing> outgoing_;  // whose bytes have not left yet
  std::vector<Incoming> incoming_;  // begun and not handed out yet; one per (rank, phase)
  Lifelines lifelines_;
};

absl::StatusOr<std::unique_ptr<Transport>> MpiTransport::Create() {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) return absl::FailedPreconditionError("MPI is already in use in this process");
  int provided = 0;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided),
                                  "MPI_Init_thread"));
  std::unique_ptr<MpiTransport> transport(new MpiTransport());
  if (provided < MPI_THREAD_FUNNELED) {
    return absl::FailedPreconditionError(
        "this MPI library does not support threads (MPI_THREAD_FUNNELED)");
  }
  TERNION_RETURN_IF_ERROR(transport->Connect());
  return transport;
}

absl::Status MpiTransport::Connect() {
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Comm_dup(MPI_COMM_WORLD, &comm_), "MPI_Comm_dup"));
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler"));
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Comm_rank(comm_, &rank_), "MPI_Comm_rank"));
  TERNION_RETURN_IF_ERROR(FindNodes());
  return ConnectLifelines();
}

// A node is named by its lowest rank.
absl::Status MpiTransport::FindNodes() {
  int size = 0;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Comm_size(comm_, &size), "MPI_Comm_size"));
  MPI_Comm node = MPI_COMM_NULL;
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Comm_split_type(comm_, MPI_COMM_TYPE_SHARED, rank_, MPI_INFO_NULL, &node),
              "MPI_Comm_split_type"));
  int leader = rank_;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Bcast(&leader, 1, MPI_INT, 0, node), "MPI_Bcast"));
  node_of_.resize(size);
  left_.resize(size);
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Allgather(&leader, 1, MPI_INT, node_of_.data(), 1, MPI_INT, comm_), "MPI_Allgather"));
  return FromMpi(MPI_Comm_free(&node), "MPI_Comm_free");
}

absl::Status MpiTransport::ConnectLifelines() {
  const auto all_gather = [&](const void* mine, size_t bytes, void* all) {
    const int count = static_cast<int>(bytes);
    return FromMpi(MPI_Allgather(mine, count, MPI_BYTE, all, count, MPI_BYTE, comm_),
                   "MPI_Allgather");
  };
  TERNION_ASSIGN_OR_RETURN(lifelines_, Lifelines::Connect(rank_, node_of_, all_gather));
  return absl::OkStatus();
}

// Between two polls. A rank that is lost is an error to all, also to those that do not wait for it:
// a step is collective.
absl::Status MpiTransport::Idle(Backoff& backoff) {
  return backoff.Wait() ? lifelines_.Check() : absl::OkStatus();
}

absl::Status MpiTransport::Send(RankId to, Phase phase, Message message) {
  TERNION_CHECK(base::Index(to) != rank_);
  TERNION_RETURN_IF_ERROR(ReclaimSent());
  if (message.size_bytes > INT_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("message to rank ", base::Index(to), " has ",
                                                   message.size_bytes,
                                                   " bytes; MPI carries at most 2 GiB at once"));
  }
  Outgoing outgoing{MPI_REQUEST_NULL, std::move(message)};
  TERNION_RETURN_IF_ERROR(base::Annotate(
      FromMpi(
          MPI_Isend(outgoing.message.memory.data(), static_cast<int>(outgoing.message.size_bytes),
                    MPI_BYTE, base::Index(to), static_cast<int>(phase), comm_, &outgoing.request),
          "MPI_Isend"),
      absl::StrCat("sending to rank ", base::Index(to))));
  outgoing_.push_back(std::move(outgoing));
  return absl::OkStatus();
}

// Returns the buffers of finished sends to the pool.
absl::Status MpiTransport::ReclaimSent() {
  for (Outgoing& outgoing : outgoing_) {
    TERNION_ASSIGN_OR_RETURN(const bool done, IsDone(&outgoing.request));
    if (done) Recycle(std::move(outgoing.message));
  }
  std::erase_if(outgoing_, [](const Outgoing& o) { return o.request == MPI_REQUEST_NULL; });
  return absl::OkStatus();
}

// Peers that flush at the same time wait for this rank to receive: what they sent is taken in here,
// and handed out when it is asked for.
absl::Status MpiTransport::Flush() {
  Backoff backoff;
  while (true) {
    TERNION_RETURN_IF_ERROR(ReclaimSent());
    if (outgoing_.empty()) return absl::OkStatus();
    for (int rank = 0; rank < size(); ++rank) {
      for (Phase phase : {Phase::kControl, Phase::kDispatch, Phase::kCombine}) {
        const Awaited what{RankId{rank}, phase};
        if (rank == rank_ || left_[rank] || IsReceiving(what)) continue;
        TERNION_RETURN_IF_ERROR(StartReceive(what));
      }
    }
    TERNION_RETURN_IF_ERROR(Idle(backoff));
  }
}

absl::Status MpiTransport::WaitFor(MPI_Request* request) {
  Backoff backoff;
  while (true) {
    TERNION_ASSIGN_OR_RETURN(const bool done, IsDone(request));
    if (done) return absl::OkStatus();
    TERNION_RETURN_IF_ERROR(Idle(backoff));
  }
}

absl::StatusOr<Arrival> MpiTransport::Receive(std::span<const Awaited> awaited) {
  TERNION_CHECK(!awaited.empty());
  Backoff backoff;
  while (true) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, TryReceive(awaited));
    if (arrival) return *std::move(arrival);
    if (!backoff.Wait()) continue;
    TERNION_RETURN_IF_ERROR(NoteLeavers(awaited));
    TERNION_RETURN_IF_ERROR(lifelines_.Check());
  }
}

absl::StatusOr<std::optional<Arrival>> MpiTransport::TryReceive(std::span<const Awaited> awaited) {
  for (const Awaited& what : awaited) {
    if (!IsReceiving(what)) TERNION_RETURN_IF_ERROR(StartReceive(what));
  }
  for (auto incoming = incoming_.begin(); incoming != incoming_.end(); ++incoming) {
    if (std::find(awaited.begin(), awaited.end(), incoming->what) == awaited.end()) continue;
    TERNION_ASSIGN_OR_RETURN(const bool done, IsDone(&incoming->request));
    if (!done) continue;
    std::optional<Arrival> arrival({incoming->what, std::move(incoming->message)});
    incoming_.erase(incoming);
    return arrival;
  }
  TERNION_RETURN_IF_ERROR(ReclaimSent());
  return std::optional<Arrival>();
}

// MPI_Alltoall of the sizes and MPI_Alltoallv of the bytes, which it wants in one buffer each.
absl::StatusOr<std::vector<Message>> MpiTransport::AllToAllV(std::vector<Message> to_ranks) {
  std::vector<int> out(size()), in(size()), out_begin(size() + 1), in_begin(size() + 1);
  for (int rank = 0; rank < size(); ++rank) {
    out[rank] = static_cast<int>(to_ranks[rank].size_bytes);
    if (int64_t{out_begin[rank]} + out[rank] > INT_MAX) {
      return absl::InvalidArgumentError("MPI_Alltoallv carries at most 2 GiB from a rank");
    }
    out_begin[rank + 1] = out_begin[rank] + out[rank];
  }
  MPI_Request request = MPI_REQUEST_NULL;
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Ialltoall(out.data(), 1, MPI_INT, in.data(), 1, MPI_INT, comm_, &request),
              "MPI_Ialltoall"));
  TERNION_RETURN_IF_ERROR(WaitFor(&request));
  for (int rank = 0; rank < size(); ++rank) in_begin[rank + 1] = in_begin[rank] + in[rank];
  Message sent = Acquire(out_begin[size()]), received = Acquire(in_begin[size()]);
  for (int rank = 0; rank < size(); ++rank) {
    const std::span<const uint8_t> bytes = to_ranks[rank].bytes();
    std::copy(bytes.begin(), bytes.end(), sent.bytes().begin() + out_begin[rank]);
    Recycle(std::move(to_ranks[rank]));
  }
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Ialltoallv(sent.memory.data(), out.data(), out_begin.data(), MPI_BYTE,
                     received.memory.data(), in.data(), in_begin.data(), MPI_BYTE, comm_, &request),
      "MPI_Ialltoallv"));
  TERNION_RETURN_IF_ERROR(WaitFor(&request));
  std::vector<Message> from_ranks(size());
  for (int rank = 0; rank < size(); ++rank) {
    if (in[rank] == 0) continue;
    from_ranks[rank] = Acquire(in[rank]);
    std::copy_n(received.bytes().begin() + in_begin[rank], in[rank],
                from_ranks[rank].bytes().begin());
  }
  Recycle(std::move(sent));
  Recycle(std::move(received));
  return from_ranks;
}

bool MpiTransport::IsReceiving(const Awaited& what) const {
  return std::any_of(incoming_.begin(), incoming_.end(),
                     [&](const Incoming& incoming) { return incoming.what == what; });
}

// Begins to receive the next message of `what` if there is one.
absl::Status MpiTransport::StartReceive(const Awaited& what) {
  const int source = base::Index(what.from);
  int found = 0;
  MPI_Message matched = MPI_MESSAGE_NULL;
  MPI_Status status;
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Improbe(source, static_cast<int>(what.phase), comm_, &found, &matched, &status),
              "MPI_Improbe", source));
  if (!found) {
    if (!left_[source]) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat("rank ", source, " is gone: it left"));
  }
  int bytes = 0;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count"));
  incoming_.push_back({what, MPI_REQUEST_NULL, Acquire(bytes)});
  Incoming& incoming = incoming_.back();
  return FromMpi(
      MPI_Imrecv(incoming.message.memory.data(), bytes, MPI_BYTE, &matched, &incoming.request),
      "MPI_Imrecv", source);
}

// What a peer sent before it left matches before its leave message does: who is noted here gets one
// more look for messages (StartReceive) before it counts as gone.
absl::Status MpiTransport::NoteLeavers(std::span<const Awaited> awaited) {
  for (const Awaited& what : awaited) {
    const int rank = base::Index(what.from);
    int left = 0;
    TERNION_RETURN_IF_ERROR(
        FromMpi(MPI_Iprobe(rank, kLeaveTag, comm_, &left, MPI_STATUS_IGNORE), "MPI_Iprobe"));
    if (left) left_[rank] = true;
  }
  return absl::OkStatus();
}

MpiTransport::~MpiTransport() {
  if (const absl::Status status = Leave(); !status.ok()) {
    spdlog::error("leaving the MPI job: {}", std::string(status.message()));
    Abort(status);  // MPI_Finalize would wait for all ranks
  }
  MPI_Finalize();
}

// Tells all peers that nothing more comes, and takes in (and drops) what they still send until they
// leave too: neither side is stuck with a message that the other never reads.
absl::Status MpiTransport::Leave() {
  if (comm_ == MPI_COMM_NULL) return absl::OkStatus();
  lifelines_.SayGoodbye();
  Backoff backoff;
  for (Incoming& incoming : incoming_) {
    while (true) {
      TERNION_ASSIGN_OR_RETURN(const bool done, IsDone(&incoming.request));
      if (done) break;
      TERNION_RETURN_IF_ERROR(Idle(backoff));
    }
  }
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    Outgoing leave;
    TERNION_RETURN_IF_ERROR(FromMpi(
        MPI_Isend(nullptr, 0, MPI_BYTE, peer, kLeaveTag, comm_, &leave.request), "MPI_Isend"));
    outgoing_.push_back(std::move(leave));
  }
  for (int staying = size() - 1; staying > 0 || !outgoing_.empty();) {
    TERNION_RETURN_IF_ERROR(ReclaimSent());
    TERNION_ASSIGN_OR_RETURN(const bool somebody_left, DropOneMessage());
    if (somebody_left) --staying;
    TERNION_RETURN_IF_ERROR(Idle(backoff));
  }
  return FromMpi(MPI_Comm_free(&comm_), "MPI_Comm_free");
}

// Receives any message there is; true when it was a leave message.
absl::StatusOr<bool> MpiTransport::DropOneMessage() {
  int found = 0;
  int bytes = 0;
  MPI_Message matched = MPI_MESSAGE_NULL;
  MPI_Status status;
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &found, &matched, &status), "MPI_Improbe"));
  if (!found) return false;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count"));
  Message message = Acquire(bytes);
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Mrecv(message.memory.data(), bytes, MPI_BYTE, &matched, MPI_STATUS_IGNORE), "MPI_Mrecv"));
  Recycle(std::move(message));
  return status.MPI_TAG == kLeaveTag;
}

// mpirun ends the other ranks; why, the caller has said. Of a lost rank the others learn by
// themselves.
void MpiTransport::Abort(const absl::Status&) {
  std::fflush(nullptr);
  lifelines_.SayGoodbye();
  if (!lifelines_.Check().ok()) std::this_thread::sleep_for(kLossGrace);
  MPI_Abort(MPI_COMM_WORLD, 1);
}

}  // namespace

bool LaunchedByMpi() {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  return false;
}

absl::StatusOr<std::unique_ptr<Transport>> MakeMpiTransport() { return MpiTransport::Create(); }

}  // namespace ternion::comm
