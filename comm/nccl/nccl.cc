// Messages travel in rounds. A rank enters a round when it has something to send or hears that a
// peer has entered: it tells every peer, over `control`, how many bytes it has for it (join.h).
// When it knows that of all peers, it starts its part: all its sends and receives of the round, as
// one NCCL group. Which round a message travels in is the sender's choice, so that nobody must know
// what a peer will send or when.
//
// Why no rank waits for ever. NCCL runs the groups of a communicator one after the other, and a
// group ends when all its parts on other ranks run. Rounds are numbered, every rank takes part in
// every one and starts them in order; both ends of a message put it into the same round, and those
// between two ranks come in one order on both. So the parts of the lowest round that is not done
// wait for nothing but for ranks that have yet to start theirs; such a rank can, since all have
// entered, and does with its next call: every wait in here moves rounds on, also those for control
// messages. A CUDA call that happens to wait for the device (to allocate, say) ends, too: the ranks
// that it waits for have not started, so that nothing of this round holds up theirs.
//
// A rank that is lost is noticed by `control`, which all waits look at. What hangs without a loss
// ends when patience does.
#include "comm/nccl/nccl.h"

#include <unistd.h>

#include <algorithm>
#include <optional>
#include <set>
#include <string>

#include "absl/strings/str_join.h"
#include "base/logging.h"
#include "base/status.h"
#include "comm/backoff.h"
#include "comm/collective.h"
#include "comm/nccl/communicator.h"
#include "comm/nccl/join.h"

namespace ternion::comm {
namespace {

using Clock = std::chrono::steady_clock;

// Joins go over `control` as dispatch messages: it carries no others.
constexpr Phase kJoinPhase = Phase::kDispatch;

// For NCCL to clear up, at the end, after what all have received.
constexpr std::chrono::seconds kClosePatience{5};

absl::Status Gone(RankId rank) {
  return absl::UnavailableError(absl::StrCat("rank ", base::Index(rank), " is gone: it left"));
}

std::vector<Awaited> JoinsOfPeers(const Transport& control) {
  std::vector<Awaited> joins;
  for (int rank = 0; rank < control.size(); ++rank) {
    if (RankId{rank} != control.rank()) joins.push_back({RankId{rank}, kJoinPhase});
  }
  return joins;
}

class NcclTransport : public Transport {
 public:
  // `communicator`: null where control carries everything.
  NcclTransport(Transport& control, std::unique_ptr<Communicator> communicator,
                const NcclOptions& options);
  ~NcclTransport() override;

  RankId rank() const override { return control_.rank(); }
  int size() const override { return control_.size(); }
  int NodeOf(RankId rank) const override { return control_.NodeOf(rank); }

  absl::Status Send(RankId to, Phase phase, Message message) override;
  absl::Status Flush() override;
  absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) override;
  absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) override;
  absl::Status CheckPeers() override { return control_.CheckPeers(); }
  void Abort(const absl::Status& status) override;

 private:
  // Of the round: entered by nobody here, entered by this rank, NCCL at work.
  enum class Stage { kOpen, kEntered, kMoving };
  enum class Presence { kHere, kLeaving, kLeft };  // leaving: the round at work is its last
  struct Peer {
    Presence presence = Presence::kHere;
    std::vector<Arrival> outgoing;  // `what` says to whom; for the next round
    std::optional<Join> join;       // of the next round
  };

  absl::Status Progress();
  absl::Status Advance();
  absl::Status TakeJoins();
  bool ShouldEnter() const;
  absl::Status Enter(bool leaving);
  absl::Status StartRound();
  void Plan(RankId rank, Peer& peer);
  void AddMove(RankId peer, bool incoming, Message& message);
  void FinishRound();
  absl::Status CheckPatience() const;
  std::string RoundName() const;

  absl::StatusOr<std::optional<Arrival>> TakeArrival(std::span<const Awaited> awaited);
  bool IsSending() const;
  absl::Status Idle();
  absl::Status FinishRoundUnderWay();
  absl::Status Leave();
  absl::Status Fail(absl::Status status);

  Transport& control_;
  std::unique_ptr<Communicator> communicator_;
  const NcclOptions options_;
  absl::Status status_;  // the first error; all calls return it from then on
  Backoff backoff_;      // of the wait in progress

  std::vector<Peer> peers_;  // [rank]
  Stage stage_ = Stage::kOpen;
  bool leaving_ = false;          // the round entered is this rank's last
  uint32_t round_ = 0;            // that is being entered, or will be next
  std::vector<Awaited> missing_;  // joins of it that have not come
  // The round at work. Messages to send are here as soon as they are announced.
  std::vector<Arrival> sending_;
  std::vector<Arrival> receiving_;
  std::vector<Move> moves_;
  Clock::time_point started_;

  std::vector<Arrival> arrived_;  // not asked for yet
  std::vector<Awaited> of_control_;
};

NcclTransport::NcclTransport(Transport& control, std::unique_ptr<Communicator> communicator,
                             const NcclOptions& options)
    : Transport(&control),
      control_(control),
      communicator_(std::move(communicator)),
      options_(options),
      peers_(control.size()),
      missing_(JoinsOfPeers(control)) {
  peers_[base::Index(rank())].presence = Presence::kLeft;
}

// ---- Rounds

absl::Status NcclTransport::Progress() {
  if (!status_.ok()) return status_;
  return Fail(Advance());
}

// As far as it goes, but no further than the end of the round.
absl::Status NcclTransport::Advance() {
  TERNION_RETURN_IF_ERROR(TakeJoins());
  if (stage_ == Stage::kMoving) {
    const absl::StatusOr<bool> done = communicator_->Poll();
    if (!done.ok()) return base::Annotate(done.status(), RoundName());
    if (!*done) return CheckPatience();
    FinishRound();
    return absl::OkStatus();
  }
  if (stage_ == Stage::kOpen && ShouldEnter()) TERNION_RETURN_IF_ERROR(Enter(/*leaving=*/false));
  if (stage_ == Stage::kEntered && missing_.empty()) return StartRound();
  return absl::OkStatus();
}

// Looks at control also where nothing is missing: what this rank has sent moves on by that.
absl::Status NcclTransport::TakeJoins() {
  while (true) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, control_.TryReceive(missing_));
    if (!arrival) return absl::OkStatus();
    const RankId from = arrival->what.from;
    TERNION_ASSIGN_OR_RETURN(peers_[base::Index(from)].join,
                             ReadJoin(arrival->message.bytes(), round_, from));
    Recycle(std::move(arrival->message));
    std::erase(missing_, arrival->what);
  }
}

bool NcclTransport::ShouldEnter() const {
  return std::any_of(peers_.begin(), peers_.end(), [](const Peer& peer) {
    return peer.join.has_value() || !peer.outgoing.empty();
  });
}

// Tells every peer what this rank has for it. What is sent from now on waits for the next round.
absl::Status NcclTransport::Enter(bool leaving) {
  for (int rank = 0; rank < size(); ++rank) {
    Peer& peer = peers_[rank];
    if (peer.presence != Presence::kHere) continue;
    Join join{.round = round_, .leaving = leaving, .messages = {}};
    for (Arrival& out : peer.outgoing) {
      join.messages.push_back({out.message.size_bytes, static_cast<uint64_t>(out.what.phase)});
      sending_.push_back(std::move(out));
    }
    peer.outgoing.clear();
    Message message = Acquire(JoinBytes(join));
    WriteJoin(join, message.bytes());
    traffic().Add(Direction::kSent, Phase::kControl, RankId{rank},
                  {.message_bytes = static_cast<int64_t>(message.size_bytes), .messages = 1});
    TERNION_RETURN_IF_ERROR(control_.Send(RankId{rank}, kJoinPhase, std::move(message)));
  }
  leaving_ = leaving;
  stage_ = Stage::kEntered;
  return absl::OkStatus();
}

absl::Status NcclTransport::StartRound() {
  for (int rank = 0; rank < size(); ++rank) Plan(RankId{rank}, peers_[rank]);
  moves_.clear();
  for (Arrival& out : sending_) AddMove(out.what.from, /*incoming=*/false, out.message);
  for (Arrival& in : receiving_) AddMove(in.what.from, /*incoming=*/true, in.message);
  ++round_;
  stage_ = Stage::kMoving;
  started_ = Clock::now();
  if (!moves_.empty()) return base::Annotate(communicator_->Start(moves_), RoundName());
  FinishRound();
  return absl::OkStatus();
}

// What comes of a peer in this round, and its join of the next one, if it takes part.
void NcclTransport::Plan(RankId rank, Peer& peer) {
  if (!peer.join) return;
  for (const Announced& announced : peer.join->messages) {
    const Phase phase{static_cast<uint8_t>(announced.phase)};
    receiving_.push_back({{rank, phase}, Acquire(announced.size_bytes)});
  }
  if (peer.join->leaving) {
    peer.presence = Presence::kLeaving;
  } else if (!leaving_) {
    missing_.push_back({rank, kJoinPhase});
  }
  peer.join.reset();
}

void NcclTransport::AddMove(RankId peer, bool incoming, Message& message) {
  if (message.size_bytes == 0) return;
  moves_.push_back({.peer = base::Index(peer),
                    .incoming = incoming,
                    .data = message.memory.data(),
                    .bytes = message.size_bytes});
}

void NcclTransport::FinishRound() {
  for (Arrival& in : receiving_) arrived_.push_back(std::move(in));
  for (Arrival& out : sending_) Recycle(std::move(out.message));
  receiving_.clear();
  sending_.clear();
  for (Peer& peer : peers_) {
    if (peer.presence != Presence::kLeaving) continue;
    peer.presence = Presence::kLeft;
    peer.outgoing.clear();  // nobody will read it
  }
  stage_ = Stage::kOpen;
}

absl::Status NcclTransport::CheckPatience() const {
  if (Clock::now() - started_ < options_.patience) return absl::OkStatus();
  return base::Annotate(absl::DeadlineExceededError(
                            absl::StrCat("not done after ", options_.patience.count(), " ms")),
                        RoundName());
}

// For errors.
std::string NcclTransport::RoundName() const {
  std::set<int> ranks;
  for (const Move& move : moves_) ranks.insert(move.peer);
  return absl::StrCat("exchanging with rank ", absl::StrJoin(ranks, ", "));
}

// ---- Messages

absl::Status NcclTransport::Send(RankId to, Phase phase, Message message) {
  TERNION_CHECK(to != rank());
  if (!status_.ok()) return status_;
  if (phase == Phase::kControl || communicator_ == nullptr) {
    return control_.Send(to, phase, std::move(message));
  }
  Peer& peer = peers_[base::Index(to)];
  if (peer.presence != Presence::kHere) return Gone(to);
  if (message.size_bytes > kMaxNcclMessageBytes) {
    return absl::InvalidArgumentError(absl::StrCat("message to rank ", base::Index(to), " has ",
                                                   message.size_bytes,
                                                   " bytes; at most 2 GiB travel at once"));
  }
  peer.outgoing.push_back({{to, phase}, std::move(message)});
  return absl::OkStatus();
}

bool NcclTransport::IsSending() const {
  return std::any_of(peers_.begin(), peers_.end(),
                     [](const Peer& peer) { return !peer.outgoing.empty(); });
}

// Also ends a round that only others send in: they could not go on while this rank computes.
absl::Status NcclTransport::Flush() {
  if (!status_.ok()) return status_;
  backoff_.Restart();
  while (communicator_ != nullptr) {
    TERNION_RETURN_IF_ERROR(Progress());
    if (stage_ == Stage::kOpen && !IsSending()) break;
    TERNION_RETURN_IF_ERROR(Idle());
  }
  return control_.Flush();
}

absl::StatusOr<Arrival> NcclTransport::Receive(std::span<const Awaited> awaited) {
  TERNION_CHECK(!awaited.empty());
  if (!status_.ok()) return status_;
  if (communicator_ == nullptr) return control_.Receive(awaited);
  backoff_.Restart();
  while (true) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, TryReceive(awaited));
    if (arrival) return *std::move(arrival);
    TERNION_RETURN_IF_ERROR(Idle());
  }
}

absl::StatusOr<std::optional<Arrival>> NcclTransport::TryReceive(std::span<const Awaited> awaited) {
  if (!status_.ok()) return status_;
  if (communicator_ == nullptr) return control_.TryReceive(awaited);
  TERNION_RETURN_IF_ERROR(Progress());
  return TakeArrival(awaited);
}

absl::StatusOr<std::optional<Arrival>> NcclTransport::TakeArrival(
    std::span<const Awaited> awaited) {
  const auto found = std::find_if(arrived_.begin(), arrived_.end(), [&](const Arrival& arrival) {
    return std::find(awaited.begin(), awaited.end(), arrival.what) != awaited.end();
  });
  if (found != arrived_.end()) {
    std::optional<Arrival> arrival(std::move(*found));
    arrived_.erase(found);
    return arrival;
  }
  of_control_.clear();
  for (const Awaited& what : awaited) {
    if (what.phase == Phase::kControl) {
      of_control_.push_back(what);
    } else if (peers_[base::Index(what.from)].presence == Presence::kLeft) {
      return Gone(what.from);
    }
  }
  if (of_control_.empty()) return std::optional<Arrival>();
  return control_.TryReceive(of_control_);
}

// ---- The beginning and the end

absl::Status NcclTransport::Idle() {
  return backoff_.Wait() ? Fail(control_.CheckPeers()) : absl::OkStatus();
}

// The first error ends what is under way: kernels would wait for peers on and on.
absl::Status NcclTransport::Fail(absl::Status status) {
  if (status.ok() || !status_.ok()) return status;
  communicator_.reset();
  return status_ = std::move(status);
}

absl::Status NcclTransport::FinishRoundUnderWay() {
  backoff_.Restart();
  const Clock::time_point start = Clock::now();
  while (true) {
    TERNION_RETURN_IF_ERROR(Progress());
    if (stage_ == Stage::kOpen) return absl::OkStatus();
    if (Clock::now() - start > options_.patience) {
      return Fail(absl::DeadlineExceededError("not all ranks take part"));
    }
    TERNION_RETURN_IF_ERROR(Idle());
  }
}

// Takes part in one more round, with what is still to be sent, and says that it is the last: what
// peers have announced by then is taken in, and they send nothing after it.
absl::Status NcclTransport::Leave() {
  TERNION_RETURN_IF_ERROR(FinishRoundUnderWay());
  TERNION_RETURN_IF_ERROR(Fail(Enter(/*leaving=*/true)));
  TERNION_RETURN_IF_ERROR(FinishRoundUnderWay());
  TERNION_RETURN_IF_ERROR(Fail(communicator_->Close()));
  const Clock::time_point start = Clock::now();
  backoff_.Restart();
  while (Clock::now() - start < kClosePatience) {
    TERNION_ASSIGN_OR_RETURN(const bool closed, communicator_->Poll());
    if (closed) return absl::OkStatus();
    backoff_.Wait();
  }
  return absl::DeadlineExceededError("ncclCommFinalize does not end");
}

NcclTransport::~NcclTransport() {
  if (communicator_ == nullptr) return;
  if (const absl::Status status = Leave(); !status.ok()) {
    spdlog::error("leaving the NCCL exchange: {}", std::string(status.message()));
  }
}

void NcclTransport::Abort(const absl::Status& status) {
  Fail(status).IgnoreError();
  control_.Abort(status);
}

// ---- Who talks how

// A rank's place: ranks with the same device have the first two parts in common, threads of one
// process all three.
std::string PlaceOf(const Transport& control, const std::string& device) {
  return absl::StrCat(control.NodeOf(control.rank()), " ", device, " ", getpid());
}

// Null if no two ranks share a device, else an error that names two.
absl::Status CheckDevices(const std::vector<std::string>& places) {
  std::vector<std::string> devices;
  for (const std::string& place : places) {
    const std::string device = place.substr(0, place.rfind(' '));
    const auto first = std::find(devices.begin(), devices.end(), device);
    if (first != devices.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("ranks ", first - devices.begin(), " and ", devices.size(), " share device ",
                       device.substr(device.find(' ') + 1),
                       "; NCCL needs one for each rank: start fewer ranks or use --transport mpi"));
    }
    devices.push_back(device);
  }
  return absl::OkStatus();
}

// Rank 0's: the id of the communicator to connect to, nothing where none is needed.
absl::StatusOr<std::string> ChooseId(const std::vector<std::string>& places) {
  const auto others = std::count(places.begin(), places.end(), places[0]);
  if (others == static_cast<int64_t>(places.size())) return std::string();
  TERNION_RETURN_IF_ERROR(CheckDevices(places));
  return MakeCommunicatorId();
}

absl::Status AwaitConnection(Transport& control, Communicator& communicator,
                             const NcclOptions& options) {
  const std::vector<Awaited> joins = JoinsOfPeers(control);
  const Clock::time_point start = Clock::now();
  Backoff backoff;
  while (true) {
    TERNION_ASSIGN_OR_RETURN(const bool connected, communicator.Poll());
    if (connected) return absl::OkStatus();
    // No rank sends one before all are connected, but this fails when a peer is gone.
    TERNION_RETURN_IF_ERROR(control.TryReceive(joins).status());
    if (backoff.Wait()) TERNION_RETURN_IF_ERROR(control.CheckPeers());
    if (Clock::now() - start > options.patience) {
      return absl::DeadlineExceededError(
          absl::StrCat("not done after ", options.patience.count(), " ms"));
    }
  }
}

// Collective. Null where control is to carry everything.
absl::StatusOr<std::unique_ptr<Communicator>> ConnectRanks(Transport& control,
                                                           const NcclOptions& options) {
  const absl::StatusOr<std::string> device = DeviceName();
  TERNION_RETURN_IF_ERROR(AgreeOnStatus(control, device.status()));
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> places,
                           Gather(control, PlaceOf(control, *device)));
  absl::StatusOr<std::string> id = std::string();
  if (control.rank() == RankId{0}) id = ChooseId(places);
  TERNION_RETURN_IF_ERROR(BroadcastStatus(control, id.status()));
  TERNION_ASSIGN_OR_RETURN(const std::string agreed, Broadcast(control, *id));
  if (agreed.empty()) return nullptr;
  absl::StatusOr<std::unique_ptr<Communicator>> communicator =
      Communicator::Connect(agreed, base::Index(control.rank()), control.size());
  TERNION_RETURN_IF_ERROR(AgreeOnStatus(control, communicator.status()));
  const absl::Status connected =
      base::Annotate(AwaitConnection(control, **communicator, options), "connecting GPUs by NCCL");
  TERNION_RETURN_IF_ERROR(AgreeOnStatus(control, connected));
  return communicator;
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transport>> MakeNcclTransport(Transport& control,
                                                             const NcclOptions& options) {
  TERNION_ASSIGN_OR_RETURN(std::unique_ptr<Communicator> communicator,
                           ConnectRanks(control, options));
  return std::make_unique<NcclTransport>(control, std::move(communicator), options);
}

}  // namespace ternion::comm
