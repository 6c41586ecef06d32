// Lifelines between ranks that are threads. Silence (a cut cable) is for tests/cluster: it needs a
// network that can be cut.
#include "comm/mpi/lifeline.h"

#include <sys/socket.h>
#include <unistd.h>

#include <barrier>
#include <cstring>
#include <functional>
#include <optional>
#include <thread>

#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

using Clock = std::chrono::steady_clock;
using Contacts = std::span<LifelineContact>;

// Makes a world of threads and lets a test change what they learn of each other.
class LifelineTest : public testing::Test {
 protected:
  // Called by each rank with its own copy of the contacts.
  std::function<void(int rank, Contacts)> change_contacts = [](int, Contacts) {};
  // Called by each rank with its own copy of [size, size] the call by which the row's rank is
  // connected to the column's.
  std::function<void(std::span<uint8_t>)> change_calls = [](std::span<uint8_t>) {};

  void Connect(int size) {
    ranks_.resize(size);
    const std::vector<int> node_of(size, 0);
    std::vector<std::string> slots(size);
    std::barrier barrier(size);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        bool first = true;
        const auto all_gather = [&](const void* mine, size_t bytes, void* all) {
          slots[rank].assign(static_cast<const char*>(mine), bytes);
          barrier.arrive_and_wait();
          for (int r = 0; r < size; ++r) {
            std::memcpy(static_cast<char*>(all) + r * bytes, slots[r].data(), bytes);
          }
          barrier.arrive_and_wait();
          if (first) {
            change_contacts(rank, {static_cast<LifelineContact*>(all), slots.size()});
          } else {
            change_calls({static_cast<uint8_t*>(all), size * bytes});
          }
          first = false;
          return absl::OkStatus();
        };
        absl::StatusOr<Lifelines> lifelines = Lifelines::Connect(rank, node_of, all_gather);
        ASSERT_TRUE(lifelines.ok()) << lifelines.status();
        ranks_[rank] = *std::move(lifelines);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

  // Lets `rank` look until `done`; false after ten seconds.
  bool LookUntil(int rank, const std::function<bool(const absl::Status&)>& done) {
    const Clock::time_point end = Clock::now() + std::chrono::seconds(10);
    while (!done(ranks_[rank]->Check())) {
      if (Clock::now() > end) return false;
      std::this_thread::yield();
    }
    return true;
  }

  std::string LossSeenBy(int rank) {
    LookUntil(rank, [](const absl::Status& status) { return !status.ok(); });
    const absl::Status status = ranks_[rank]->Check();
    EXPECT_TRUE(status.ok() || absl::IsUnavailable(status));
    return std::string(status.message());
  }

  static std::string Gone(int rank, const std::string& how) {
    char host[64];
    gethostname(host, sizeof(host));
    return "rank " + std::to_string(rank) + " (host " + host + ") is gone: its connection " + how;
  }

  std::vector<std::optional<Lifelines>> ranks_;
};

Fd LoopbackSocket() { return Fd(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)); }

sockaddr_in Loopback(in_port_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = port;
  return address;
}

// A port that is taken by `fd`, in network order.
in_port_t TakePort(const Fd& fd) {
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(fd.get(), reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size), 0);
  return address.sin_port;
}

TEST_F(LifelineTest, AllPairsConnect) {
  for (int size : {1, 2, 7}) {
    Connect(size);
    for (auto& rank : ranks_) {
      EXPECT_EQ(rank->num_connected(), size - 1);
      EXPECT_TRUE(rank->Check().ok());
    }
  }
}

TEST_F(LifelineTest, ARankThatEndsIsGoneToAllOthers) {
  Connect(4);
  ranks_[2].reset();
  for (int rank : {0, 1, 3}) EXPECT_EQ(LossSeenBy(rank), Gone(2, "was closed"));
  ranks_[1].reset();
  EXPECT_EQ(LossSeenBy(0), Gone(2, "was closed")) << "the first loss is the one that is told";
}

TEST_F(LifelineTest, AResetIsALoss) {
  Connect(2);
  ranks_[0]->SayGoodbye();
  ranks_[1].reset();  // with the goodbye unread
  EXPECT_EQ(LossSeenBy(0), Gone(1, "was reset"));
}

TEST_F(LifelineTest, ARankThatSaidGoodbyeMayEnd) {
  Connect(3);
  ranks_[1]->SayGoodbye();
  ranks_[0]->SayGoodbye();
  ranks_[1].reset();
  for (int rank : {0, 2}) {
    const auto noticed = [&](const absl::Status&) { return ranks_[rank]->num_connected() == 1; };
    EXPECT_TRUE(LookUntil(rank, noticed));
    EXPECT_TRUE(ranks_[rank]->Check().ok()) << ranks_[rank]->Check();
  }
  ranks_[2].reset();
  EXPECT_EQ(LossSeenBy(0).substr(0, 6), "rank 2") << "the others are still watched";
}

TEST_F(LifelineTest, StrangersWhoCallAreDropped) {
  std::vector<Fd> strangers;
  change_contacts = [&](int rank, Contacts contacts) {
    if (rank != 0) return;
    const sockaddr_in to = Loopback(contacts[0].port);
    const struct {
      LifelineContact::Token token = {1, 2, 3};
      int32_t rank = 1;
      int32_t call = 1;
    } greeting;
    for (size_t bytes : {size_t{0}, size_t{5}, sizeof(greeting)}) {
      strangers.push_back(LoopbackSocket());
      ASSERT_EQ(connect(strangers.back().get(), reinterpret_cast<const sockaddr*>(&to), sizeof(to)),
                0);
      ASSERT_EQ(send(strangers.back().get(), &greeting, bytes, 0), static_cast<ssize_t>(bytes));
    }
  };
  Connect(3);
  for (auto& rank : ranks_) EXPECT_EQ(rank->num_connected(), 2);
  for (const Fd& stranger : strangers) {
    char byte;
    EXPECT_LE(recv(stranger.get(), &byte, 1, 0), 0) << "the end, and no word before it";
  }
}

// Some other program has the address that we believe a peer to have.
TEST_F(LifelineTest, AStrangerWhoIsCalledIsNotTakenForARank) {
  const Fd listener = LoopbackSocket();
  const in_port_t port = TakePort(listener);
  ASSERT_EQ(listen(listener.get(), 1), 0);
  std::thread stranger([&] {
    const Fd caller(accept(listener.get(), nullptr, nullptr));
    char greeting[24];
    ASSERT_EQ(recv(caller.get(), greeting, sizeof(greeting), MSG_WAITALL), 24);
    std::memset(greeting + 16, 0, 4);  // "I am rank 0"
    send(caller.get(), greeting, sizeof(greeting), MSG_NOSIGNAL);
    while (recv(caller.get(), greeting, 1, 0) > 0) {
    }
  });
  change_contacts = [&](int rank, Contacts contacts) {
    if (rank == 1) contacts[0].port = port;
  };
  Connect(2);
  stranger.join();
  EXPECT_EQ(ranks_[1]->num_connected(), 0);
  EXPECT_EQ(ranks_[0]->num_connected(), 0);
}

TEST_F(LifelineTest, RanksThatDoNotReachEachOtherGoWithout) {
  const Fd closed = LoopbackSocket();
  const in_port_t port = TakePort(closed);  // and nobody listens
  change_contacts = [&](int, Contacts contacts) { contacts[1].port = port; };
  const Clock::time_point start = Clock::now();
  Connect(4);
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(20));
  const int expected[] = {3, 1, 2, 2};  // rank 1 calls rank 0, nobody calls rank 1
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(ranks_[rank]->num_connected(), expected[rank]) << rank;
    EXPECT_TRUE(ranks_[rank]->Check().ok());
  }
}

TEST_F(LifelineTest, AConnectionThatOnlyOneEndHasIsDropped) {
  for (uint8_t call : {0, 2}) {  // of rank 2 to rank 0: none, or another than rank 0 took
    change_calls = [&](std::span<uint8_t> calls) { calls[2 * 3 + 0] = call; };
    Connect(3);
    EXPECT_EQ(ranks_[0]->num_connected(), 1);
    EXPECT_EQ(ranks_[1]->num_connected(), 2);
    EXPECT_EQ(ranks_[2]->num_connected(), 1);
    for (auto& rank : ranks_) EXPECT_TRUE(rank->Check().ok());
  }
}

}  // namespace
}  // namespace ternion::comm
