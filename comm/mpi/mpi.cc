#include "comm/mpi/mpi.h"

// Only the C interface: the C++ bindings are long deprecated, and a library of their own.
#define OMPI_SKIP_MPICXX 1
#define MPICH_SKIP_MPICXX 1
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "base/logging.h"
#include "base/status.h"
#include "comm/backoff.h"
#include "comm/mpi/lifeline.h"

namespace ternion::comm {
namespace {

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

absl::Status Gone(RankId rank) {
  return absl::UnavailableError(absl::StrCat("rank ", base::Index(rank), " is gone: it left"));
}

struct Transfer {
  Awaited what;  // incoming: from whom; else to whom
  bool incoming = false;
  bool done = false;
  Message message{};
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
  absl::Status CheckPeers() override { return lifelines_.Check(); }
  void Abort(const absl::Status& status) override;

 private:
  MpiTransport() : Transport(std::make_shared<MessagePool>()) {}
  absl::Status Connect();
  absl::Status FindNodes();
  absl::Status ConnectLifelines();
  absl::Status Idle();
  absl::Status Progress();
  absl::StatusOr<bool> BeginReceive();
  void Add(Transfer transfer, MPI_Request request);
  void Remove(size_t transfer);
  bool IsSending() const;
  std::vector<Transfer>::iterator FindIncoming(const Awaited& what);
  absl::Status WaitFor(MPI_Request* request);
  absl::Status Leave();

  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0;
  std::vector<int> node_of_;  // [size] the lowest rank on the same host
  std::vector<bool> left_;    // [size] ranks that have left
  // Under way, or received and not asked for yet; in the order in which they began.
  std::vector<Transfer> transfers_;
  std::vector<MPI_Request> requests_;  // [transfers]
  std::vector<int> done_;              // what Progress found
  std::vector<MPI_Status> statuses_;
  Backoff backoff_;  // of the wait in progress
  // Of AllToAllV. Where that fails, MPI may go on using them until the transport is no more.
  struct Collective {
    std::vector<int> out, in, out_begin, in_begin;  // bytes by rank, and where they lie
    Message sent, received;
  };
  Collective collective_;
  Lifelines lifelines_;
};

// Over TCP, Open MPI sends up to 64 KiB at once and asks the receiver before it sends more.
// Question and answer queue behind all that is on the links already, which then run dry: messages
// of 0.2 to 2 MB between four hosts take 1.3 times as long. So up to 4 MiB leave at once: a rank
// sends few messages, and only to peers that wait for them. Not where a user has set any of these
// limits, which must fit each other. Before MPI_Init, which reads them.
void SendLargeMessagesAtOnce() {
  constexpr const char* kLimits[] = {"OMPI_MCA_btl_tcp_eager_limit",
                                     "OMPI_MCA_btl_tcp_rndv_eager_limit",
                                     "OMPI_MCA_btl_tcp_max_send_size"};
  for (const char* limit : kLimits) {
    if (std::getenv(limit) != nullptr) return;
  }
  for (const char* limit : kLimits) setenv(limit, "4194304", /*overwrite=*/0);
}

absl::StatusOr<std::unique_ptr<Transport>> MpiTransport::Create() {
  int initialized = 0;
  MPI_Initialized(&initialized);
  if (initialized) return absl::FailedPreconditionError("MPI is already in use in this process");
  SendLargeMessagesAtOnce();
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
absl::Status MpiTransport::Idle() { return backoff_.Wait() ? CheckPeers() : absl::OkStatus(); }

absl::Status MpiTransport::Send(RankId to, Phase phase, Message message) {
  TERNION_CHECK(base::Index(to) != rank_);
  if (left_[base::Index(to)]) return Gone(to);
  if (message.size_bytes > INT_MAX) {
    return absl::InvalidArgumentError(absl::StrCat("message to rank ", base::Index(to), " has ",
                                                   message.size_bytes,
                                                   " bytes; MPI carries at most 2 GiB at once"));
  }
  MPI_Request request = MPI_REQUEST_NULL;
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Isend(message.memory.data(), static_cast<int>(message.size_bytes), MPI_BYTE,
                        base::Index(to), static_cast<int>(phase), comm_, &request),
              "MPI_Isend", base::Index(to)));
  Add({.what = {to, phase}, .message = std::move(message)}, request);
  return absl::OkStatus();
}

void MpiTransport::Add(Transfer transfer, MPI_Request request) {
  transfers_.push_back(std::move(transfer));
  requests_.push_back(request);
}

void MpiTransport::Remove(size_t transfer) {
  transfers_.erase(transfers_.begin() + transfer);
  requests_.erase(requests_.begin() + transfer);
}

// Begins to receive the next message of any peer and phase; false when there is none. Messages of a
// peer are found in the order in which it sent them, the one that says it leaves last.
absl::StatusOr<bool> MpiTransport::BeginReceive() {
  int found = 0, bytes = 0;
  MPI_Message matched = MPI_MESSAGE_NULL;
  MPI_Status status;
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Improbe(MPI_ANY_SOURCE, MPI_ANY_TAG, comm_, &found, &matched, &status), "MPI_Improbe"));
  if (!found) return false;
  TERNION_RETURN_IF_ERROR(FromMpi(MPI_Get_count(&status, MPI_BYTE, &bytes), "MPI_Get_count"));
  const int peer = status.MPI_SOURCE;
  if (status.MPI_TAG == kLeaveTag) {
    left_[peer] = true;
    TERNION_RETURN_IF_ERROR(
        FromMpi(MPI_Mrecv(nullptr, 0, MPI_BYTE, &matched, MPI_STATUS_IGNORE), "MPI_Mrecv", peer));
    return true;
  }
  Message message = Acquire(bytes);
  MPI_Request request = MPI_REQUEST_NULL;
  TERNION_RETURN_IF_ERROR(FromMpi(
      MPI_Imrecv(message.memory.data(), bytes, MPI_BYTE, &matched, &request), "MPI_Imrecv", peer));
  Add({.what = {RankId{peer}, Phase{static_cast<uint8_t>(status.MPI_TAG)}},
       .incoming = true,
       .message = std::move(message)},
      request);
  return true;
}

// Moves all messages on. With few calls, since every one looks at all connections: all messages are
// begun as they are found, whether somebody waits for them yet or not.
absl::Status MpiTransport::Progress() {
  for (bool found = true; found;) {
    TERNION_ASSIGN_OR_RETURN(found, BeginReceive());
  }
  if (requests_.empty()) return absl::OkStatus();
  int num_done = 0;
  done_.resize(requests_.size());
  statuses_.resize(requests_.size());
  const int code = MPI_Testsome(static_cast<int>(requests_.size()), requests_.data(), &num_done,
                                done_.data(), statuses_.data());
  if (code != MPI_ERR_IN_STATUS) TERNION_RETURN_IF_ERROR(FromMpi(code, "MPI_Testsome"));
  // Where all were done before, num_done is MPI_UNDEFINED, which is negative.
  for (int i = 0; i < num_done; ++i) transfers_[done_[i]].done = true;
  for (int i = 0; i < num_done && code == MPI_ERR_IN_STATUS; ++i) {
    const Transfer& transfer = transfers_[done_[i]];
    TERNION_RETURN_IF_ERROR(FromMpi(statuses_[i].MPI_ERROR,
                                    transfer.incoming ? "MPI_Imrecv" : "MPI_Isend",
                                    base::Index(transfer.what.from)));
  }
  for (size_t i = transfers_.size(); i-- > 0;) {
    if (transfers_[i].incoming || !transfers_[i].done) continue;
    Recycle(std::move(transfers_[i].message));
    Remove(i);
  }
  return absl::OkStatus();
}

bool MpiTransport::IsSending() const {
  return std::any_of(transfers_.begin(), transfers_.end(),
                     [](const Transfer& transfer) { return !transfer.incoming; });
}

absl::Status MpiTransport::Flush() {
  backoff_.Restart();
  while (true) {
    TERNION_RETURN_IF_ERROR(Progress());
    if (!IsSending()) return absl::OkStatus();
    TERNION_RETURN_IF_ERROR(Idle());
  }
}

absl::StatusOr<Arrival> MpiTransport::Receive(std::span<const Awaited> awaited) {
  TERNION_CHECK(!awaited.empty());
  backoff_.Restart();
  while (true) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, TryReceive(awaited));
    if (arrival) return *std::move(arrival);
    TERNION_RETURN_IF_ERROR(Idle());
  }
}

absl::StatusOr<std::optional<Arrival>> MpiTransport::TryReceive(std::span<const Awaited> awaited) {
  TERNION_RETURN_IF_ERROR(Progress());
  for (auto next = transfers_.begin(); next != transfers_.end(); ++next) {
    if (!next->incoming || !next->done) continue;
    if (std::find(awaited.begin(), awaited.end(), next->what) == awaited.end()) continue;
    if (FindIncoming(next->what) != next) continue;  // an earlier one is still under way
    std::optional<Arrival> arrival({next->what, std::move(next->message)});
    Remove(next - transfers_.begin());
    return arrival;
  }
  for (const Awaited& what : awaited) {
    if (left_[base::Index(what.from)] && FindIncoming(what) == transfers_.end()) {
      return Gone(what.from);
    }
  }
  return std::optional<Arrival>();
}

// The first one that is not handed out.
std::vector<Transfer>::iterator MpiTransport::FindIncoming(const Awaited& what) {
  return std::find_if(transfers_.begin(), transfers_.end(), [&](const Transfer& transfer) {
    return transfer.incoming && transfer.what == what;
  });
}

// MPI_Ialltoall of the sizes and MPI_Ialltoallv of the bytes, which it wants in one buffer each.
absl::StatusOr<std::vector<Message>> MpiTransport::AllToAllV(std::vector<Message> to_ranks) {
  auto& [out, in, out_begin, in_begin, sent, received] = collective_;
  for (std::vector<int>* counts : {&out, &in, &out_begin, &in_begin}) counts->assign(size() + 1, 0);
  for (int rank = 0; rank < size(); ++rank) {
    const size_t end = out_begin[rank] + to_ranks[rank].size_bytes;
    if (end > INT_MAX) {
      return absl::InvalidArgumentError("MPI_Ialltoallv carries at most 2 GiB from a rank");
    }
    out[rank] = static_cast<int>(to_ranks[rank].size_bytes);
    out_begin[rank + 1] = static_cast<int>(end);
  }
  MPI_Request request = MPI_REQUEST_NULL;
  TERNION_RETURN_IF_ERROR(
      FromMpi(MPI_Ialltoall(out.data(), 1, MPI_INT, in.data(), 1, MPI_INT, comm_, &request),
              "MPI_Ialltoall"));
  TERNION_RETURN_IF_ERROR(WaitFor(&request));
  for (int rank = 0; rank < size(); ++rank) {
    const int64_t end = int64_t{in_begin[rank]} + in[rank];
    if (end > INT_MAX) {
      return absl::InvalidArgumentError("MPI_Ialltoallv carries at most 2 GiB to a rank");
    }
    in_begin[rank + 1] = static_cast<int>(end);
  }
  sent = Acquire(out_begin[size()]);
  received = Acquire(in_begin[size()]);
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

absl::Status MpiTransport::WaitFor(MPI_Request* request) {
  backoff_.Restart();
  while (true) {
    int done = 0;
    TERNION_RETURN_IF_ERROR(FromMpi(MPI_Test(request, &done, MPI_STATUS_IGNORE), "MPI_Test"));
    if (done) return absl::OkStatus();
    TERNION_RETURN_IF_ERROR(Idle());
  }
}

MpiTransport::~MpiTransport() {
  if (const absl::Status status = Leave(); !status.ok()) {
    spdlog::error("leaving the MPI job: {}", std::string(status.message()));
    Abort(status);  // MPI_Finalize would wait for all ranks
  }
  MPI_Finalize();
}

// Tells all peers that nothing more comes, and takes in what they still send until they leave too:
// neither side is stuck with a message that the other never reads.
absl::Status MpiTransport::Leave() {
  if (comm_ == MPI_COMM_NULL) return absl::OkStatus();
  lifelines_.SayGoodbye();
  if (left_.empty()) return absl::OkStatus();  // connecting failed
  left_[rank_] = true;
  for (int peer = 0; peer < size(); ++peer) {
    if (peer == rank_) continue;
    MPI_Request request = MPI_REQUEST_NULL;
    TERNION_RETURN_IF_ERROR(FromMpi(
        MPI_Isend(nullptr, 0, MPI_BYTE, peer, kLeaveTag, comm_, &request), "MPI_Isend", peer));
    Add({.what = {RankId{peer}, Phase::kControl}}, request);
  }
  backoff_.Restart();
  const auto is_done = [](const Transfer& transfer) { return transfer.done; };
  while (!std::all_of(transfers_.begin(), transfers_.end(), is_done) ||
         std::find(left_.begin(), left_.end(), false) != left_.end()) {
    TERNION_RETURN_IF_ERROR(Progress());
    TERNION_RETURN_IF_ERROR(Idle());
  }
  return FromMpi(MPI_Comm_free(&comm_), "MPI_Comm_free");
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
