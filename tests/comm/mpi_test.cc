// Started by mpirun: the MPI transport, and an exchange over it.
#include "comm/mpi/mpi.h"

#include <fcntl.h>
#include <semaphore.h>
#include <time.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "base/status.h"
#include "comm/collective.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/comm/exchange_case.h"
#include "tests/comm/faulty_transport.h"

namespace ternion::comm {
namespace {

std::unique_ptr<Transport> world;

std::vector<RankId> Others() {
  std::vector<RankId> others;
  for (int rank = 0; rank < world->size(); ++rank) {
    if (RankId{rank} != world->rank()) others.push_back(RankId{rank});
  }
  return others;
}

TEST(MpiTest, TheLauncherIsSeen) {
  EXPECT_TRUE(LaunchedByMpi());
  EXPECT_GT(world->size(), 1);
  EXPECT_EQ(MakeMpiTransport().status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(MpiTest, RanksOfOneHostShareANode) {
  for (RankId rank : Others()) EXPECT_EQ(world->ScopeOf(rank), TrafficScope::kIntraNode);
  EXPECT_EQ(world->ScopeOf(world->rank()), TrafficScope::kSelf);
}

// Sizes on both sides of MPI's switch from eager to rendezvous, several under way at a time.
TEST(MpiTest, MessagesKeepTheirOrderAndBytes) {
  const size_t sizes[] = {0, 1, 4000, 65'536, 3'000'000, 17, 200'000};
  for (size_t size : sizes) {
    for (RankId to : Others()) {
      Message message = world->Acquire(size);
      std::memset(message.memory.data(), static_cast<int>(size % 251), size);
      ASSERT_TRUE(world->Send(to, Phase::kCombine, std::move(message)).ok());
    }
  }
  for (size_t size : sizes) {
    std::vector<RankId> waiting = Others();
    while (!waiting.empty()) {
      auto arrival = world->Receive(waiting, Phase::kCombine);
      ASSERT_TRUE(arrival.ok()) << arrival.status();
      EXPECT_EQ(arrival->message.size_bytes, size);
      for (uint8_t byte : arrival->message.bytes()) ASSERT_EQ(byte, size % 251);
      EXPECT_EQ(std::erase(waiting, arrival->what.from), 1u);
      world->Recycle(std::move(arrival->message));
    }
  }
}

// Messages too large to leave before their receiver takes them, and nobody asks for one.
TEST(MpiTest, RanksMayFlushBeforeTheyReceive) {
  constexpr size_t kSize = 3'000'000;
  for (Phase phase : {Phase::kDispatch, Phase::kCombine}) {
    for (RankId to : Others()) {
      Message message = world->Acquire(kSize);
      std::memset(message.memory.data(), base::Index(world->rank()), kSize);
      ASSERT_TRUE(world->Send(to, phase, std::move(message)).ok());
    }
    ASSERT_TRUE(world->Flush().ok());
    for (RankId from : Others()) {
      auto arrival = world->Receive({&from, 1}, phase);
      ASSERT_TRUE(arrival.ok()) << arrival.status();
      ASSERT_EQ(arrival->message.size_bytes, kSize);
      for (uint8_t byte : arrival->message.bytes()) ASSERT_EQ(byte, base::Index(from));
      world->Recycle(std::move(arrival->message));
    }
  }
}

TEST(MpiTest, ExchangeEqualsItsReference) {
  for (bool presum : {false, true}) {
    ExchangeCase c;
    c.num_ranks = world->size();
    c.options = {.dispatch = RowFormat::kInt8,
                 .combine = presum ? RowFormat::kBf16 : RowFormat::kFp32,
                 .presum = presum,
                 .act_bits = 8,
                 .hidden = 1001,
                 .max_rows = 50,
                 .top_k = 3,
                 .num_experts = 8};
    c.num_layers = 5;
    for (c.micro_batches = 1; c.micro_batches <= 2; ++c.micro_batches) {
      c.min_routes = c.micro_batches == 2 ? 20 : Exchange::kAllRoutes;
      std::vector<std::vector<float>> outs;
      const absl::Status status = RunRank(c, *world, &outs);
      ASSERT_TRUE(status.ok()) << status;
      for (int layer = 0; layer < c.num_layers; ++layer) {
        EXPECT_EQ(outs[layer], ReferenceOut(c, layer, base::Index(world->rank()))) << layer;
      }
    }
  }
}

TEST(MpiTest, Collectives) {
  const int rank = base::Index(world->rank());
  const std::string plan(300'000, 'p');
  EXPECT_EQ(Broadcast(*world, rank == 0 ? plan : "").value(), plan);
  const auto all = Gather(*world, std::string(rank, 'r'));
  ASSERT_TRUE(all.ok()) << all.status();
  for (size_t i = 0; i < all->size(); ++i) EXPECT_EQ((*all)[i], std::string(i, 'r'));
  const absl::Status own = rank == 1 ? absl::DataLossError("shard 5 is damaged") : absl::Status();
  const absl::Status agreed = AgreeOnStatus(*world, own);
  EXPECT_EQ(agreed.ToString(absl::StatusToStringMode::kWithNoExtraData),
            "DATA_LOSS: rank 1: shard 5 is damaged");
  EXPECT_TRUE(AgreeOnStatus(*world, absl::OkStatus()).ok());
}

// All ranks meet, without MPI: whose messages still need an MPI call of theirs does not get past
// this.
bool MeetOutsideMpi(const std::string& where) {
  const auto semaphore_of = [&](RankId rank) {
    // Ranks of one host are children of one mpirun.
    return absl::StrCat("/ternion_", getppid(), "_", where, "_", base::Index(rank));
  };
  for (RankId other : Others()) {
    sem_t* semaphore = sem_open(semaphore_of(other).c_str(), O_CREAT, 0600, 0);
    if (semaphore == SEM_FAILED || sem_post(semaphore) != 0) return false;
    sem_close(semaphore);
  }
  sem_t* own = sem_open(semaphore_of(world->rank()).c_str(), O_CREAT, 0600, 0);
  if (own == SEM_FAILED) return false;
  timespec deadline;
  clock_gettime(CLOCK_REALTIME, &deadline);
  deadline.tv_sec += 30;
  bool met = true;
  for (size_t i = 0; i < Others().size(); ++i) met = met && sem_timedwait(own, &deadline) == 0;
  sem_close(own);
  sem_unlink(semaphore_of(world->rank()).c_str());
  return met;
}

TEST(MpiTest, NoRankWaitsForRowsWhileTheirSenderComputes) {
  constexpr int kRows = 40;
  const ExchangeOptions options = {.dispatch = RowFormat::kFp32,
                                   .combine = RowFormat::kFp32,
                                   .hidden = 4096,
                                   .max_rows = kRows,
                                   .top_k = 1,
                                   .num_experts = 1};
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  Exchange exchange(options, world.get(), kernels::SelectCpuKernels(""), &executor);
  DispatchPlan plan;  // all rows to all other ranks
  for (int rank = 0; rank < world->size(); ++rank) {
    plan.rank_begin.push_back(plan.rows.size());
    for (int row = 0; row < kRows && RankId{rank} != world->rank(); ++row) {
      plan.rows.push_back({row, static_cast<int32_t>(plan.routes.size()), 1});
      plan.routes.push_back({ExpertId{0}, 1.0f});
    }
  }
  plan.rank_begin.push_back(plan.rows.size());
  kernels::QuantizedBuffer codes(kRows, options.hidden);
  std::vector<float> rows(kRows * options.hidden * (world->size() - 1));
  ASSERT_TRUE(exchange.DispatchSend(1, 1, plan, codes.rows(kRows), rows.data()).ok());
  ASSERT_TRUE(exchange.DispatchRecv().ok());
  ASSERT_TRUE(exchange.Flush().ok());
  ASSERT_TRUE(MeetOutsideMpi("dispatch")) << "a dispatch message was still on its way";
  ASSERT_TRUE(exchange.CombineSend(rows.data()).ok());
  std::vector<float> out(kRows * options.hidden);
  ASSERT_EQ(exchange.DispatchRecv().value(), nullptr);
  ASSERT_TRUE(exchange.CombineRecv(out.data()).ok());
  ASSERT_TRUE(exchange.Flush().ok());
  ASSERT_TRUE(MeetOutsideMpi("combine")) << "a combine message was still on its way";
}

// Last: rank 1 leaves with a message unread, and those who wait for it learn so.
TEST(MpiTest, ARankThatLeavesIsAnErrorToThoseThatWait) {
  constexpr RankId kLeaver{1};
  if (world->rank() == kLeaver) {
    ASSERT_TRUE(world->Send(RankId{0}, Phase::kDispatch, world->Acquire(1'000'000)).ok());
  } else {
    Message never_read = world->Acquire(1'000'000);
    ASSERT_TRUE(world->Send(kLeaver, Phase::kDispatch, std::move(never_read)).ok());
    if (world->rank() == RankId{0}) {
      EXPECT_TRUE(world->Receive({&kLeaver, 1}, Phase::kDispatch).ok());
    }
    const absl::Status status = world->Receive({&kLeaver, 1}, Phase::kDispatch).status();
    EXPECT_TRUE(absl::IsUnavailable(status));
    EXPECT_EQ(status.message(), "rank 1 is gone: it left");
  }
  world.reset();
}

}  // namespace

// Rank 1 aborts while the others wait for it.
int AbortOneRank() {
  if (world->rank() == RankId{1}) world->Abort(absl::InternalError("broken on purpose"));
  constexpr RankId kRank1{1};
  return world->Receive({&kRank1, 1}, Phase::kDispatch).ok() ? 0 : 2;
}

// One bit of a message of rank 1 flips on its way: rank 0 says whose it was, and ends the job.
int FlipOneBit() {
  FaultyTransport faulty(world.get());
  faulty.on_send = [](RankId to, Phase, Message& message) {
    if (world->rank() == RankId{1} && to == RankId{0}) message.bytes().back() ^= 4;
  };
  ExchangeCase c;
  c.num_ranks = world->size();
  c.options = {.hidden = 1001, .max_rows = 50, .top_k = 3, .num_experts = 8};
  std::vector<std::vector<float>> outs;
  const absl::Status status = RunRank(c, faulty, &outs);
  if (world->rank() == RankId{0}) std::fprintf(stderr, "%s\n", status.ToString().c_str());
  if (!status.ok()) world->Abort(status);
  return 0;
}

int RunTests() {
  const int failed = RUN_ALL_TESTS();
  // The others may wait for this rank.
  if (failed != 0 && world != nullptr) world->Abort(absl::InternalError("a test failed"));
  return failed;
}

}  // namespace ternion::comm

int main(int argc, char** argv) {
  using namespace ternion::comm;
  testing::InitGoogleTest(&argc, argv);
  auto transport = MakeMpiTransport();
  if (!transport.ok()) {
    std::fprintf(stderr, "%s\n", transport.status().ToString().c_str());
    return 1;
  }
  world = *std::move(transport);
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "--abort") return AbortOneRank();
  return mode == "--flip" ? FlipOneBit() : RunTests();
}
