#include "comm/loopback/loopback.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <utility>

#include "base/status.h"

namespace ternion::comm {
namespace {

// What waits for one rank. Everything in it is guarded by its mutex.
struct Mailbox {
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Arrival> letters;    // in order of arrival
  std::vector<absl::Status> gone;  // [rank] not ok: why nothing more comes from it
};

struct World {
  World(int num_ranks, std::vector<int> nodes)
      : node_of(std::move(nodes)), mailboxes(num_ranks), pool(std::make_shared<MessagePool>()) {
    for (Mailbox& mailbox : mailboxes) mailbox.gone.resize(num_ranks);
  }

  const std::vector<int> node_of;
  std::vector<Mailbox> mailboxes;
  const std::shared_ptr<MessagePool> pool;
};

absl::Status GoneError(RankId rank, const absl::Status& why) {
  return absl::UnavailableError(
      absl::StrCat("rank ", base::Index(rank), " is gone: ", why.message()));
}

// Takes the first awaited letter out of a mailbox whose mutex is held.
absl::StatusOr<std::optional<Arrival>> TakeLetter(Mailbox& mailbox,
                                                  std::span<const Awaited> awaited) {
  const auto is_awaited = [&](const Arrival& letter) {
    return std::find(awaited.begin(), awaited.end(), letter.what) != awaited.end();
  };
  const auto letter = std::find_if(mailbox.letters.begin(), mailbox.letters.end(), is_awaited);
  if (letter != mailbox.letters.end()) {
    std::optional<Arrival> arrival(std::move(*letter));
    mailbox.letters.erase(letter);
    return arrival;
  }
  for (const Awaited& what : awaited) {
    const absl::Status& gone = mailbox.gone[base::Index(what.from)];
    if (!gone.ok()) return GoneError(what.from, gone);
  }
  return std::optional<Arrival>();
}

class LoopbackTransport : public Transport {
 public:
  LoopbackTransport(std::shared_ptr<World> world, RankId rank)
      : Transport(world->pool), world_(std::move(world)), rank_(rank) {}

  ~LoopbackTransport() override { Leave(absl::UnavailableError("it left")); }

  RankId rank() const override { return rank_; }
  int size() const override { return static_cast<int>(world_->mailboxes.size()); }
  int NodeOf(RankId rank) const override { return world_->node_of[base::Index(rank)]; }

  absl::Status Send(RankId to, Phase phase, Message message) override;
  absl::StatusOr<Arrival> Receive(std::span<const Awaited> awaited) override;
  absl::StatusOr<std::optional<Arrival>> TryReceive(std::span<const Awaited> awaited) override;
  void Abort(const absl::Status& status) override { Leave(status); }

 private:
  Mailbox& mailbox(RankId rank) { return world_->mailboxes[base::Index(rank)]; }
  void Leave(const absl::Status& why);

  const std::shared_ptr<World> world_;
  const RankId rank_;
  bool left_ = false;
};

absl::Status LoopbackTransport::Send(RankId to, Phase phase, Message message) {
  TERNION_CHECK(to != rank_);
  {
    Mailbox& own = mailbox(rank_);
    std::lock_guard<std::mutex> lock(own.mutex);
    const absl::Status& gone = own.gone[base::Index(to)];
    if (!gone.ok()) return GoneError(to, gone);
  }
  Mailbox& target = mailbox(to);
  std::lock_guard<std::mutex> lock(target.mutex);
  target.letters.push_back({{rank_, phase}, std::move(message)});
  target.changed.notify_one();
  return absl::OkStatus();
}

absl::StatusOr<Arrival> LoopbackTransport::Receive(std::span<const Awaited> awaited) {
  TERNION_CHECK(!awaited.empty());
  Mailbox& own = mailbox(rank_);
  std::unique_lock<std::mutex> lock(own.mutex);
  while (true) {
    TERNION_ASSIGN_OR_RETURN(std::optional<Arrival> arrival, TakeLetter(own, awaited));
    if (arrival) return *std::move(arrival);
    own.changed.wait(lock);
  }
}

absl::StatusOr<std::optional<Arrival>> LoopbackTransport::TryReceive(
    std::span<const Awaited> awaited) {
  Mailbox& own = mailbox(rank_);
  std::lock_guard<std::mutex> lock(own.mutex);
  return TakeLetter(own, awaited);
}

void LoopbackTransport::Leave(const absl::Status& why) {
  if (std::exchange(left_, true)) return;
  for (Mailbox& mailbox : world_->mailboxes) {
    std::lock_guard<std::mutex> lock(mailbox.mutex);
    mailbox.gone[base::Index(rank_)] = why;
    mailbox.changed.notify_one();
  }
}

}  // namespace

std::vector<std::unique_ptr<Transport>> MakeLoopbackWorld(int num_ranks, std::vector<int> node_of) {
  if (node_of.empty()) node_of.assign(num_ranks, 0);
  TERNION_CHECK(static_cast<int>(node_of.size()) == num_ranks);
  auto world = std::make_shared<World>(num_ranks, std::move(node_of));
  std::vector<std::unique_ptr<Transport>> transports;
  for (int rank = 0; rank < num_ranks; ++rank) {
    transports.push_back(std::make_unique<LoopbackTransport>(world, RankId{rank}));
  }
  return transports;
}

std::vector<absl::Status> RunLoopback(int num_ranks,
                                      const std::function<absl::Status(Transport&)>& body,
                                      std::vector<int> node_of) {
  std::vector<std::unique_ptr<Transport>> world = MakeLoopbackWorld(num_ranks, std::move(node_of));
  std::vector<absl::Status> statuses(num_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([&, rank] {
      statuses[rank] = body(*world[rank]);
      if (!statuses[rank].ok()) world[rank]->Abort(statuses[rank]);
      world[rank].reset();  // peers that still wait for this rank learn that it left
    });
  }
  for (std::thread& thread : threads) thread.join();
  return statuses;
}

}  // namespace ternion::comm
