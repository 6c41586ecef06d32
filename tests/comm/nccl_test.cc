// The NCCL transport on the emulated NCCL: ranks are threads, each with a device of its own unless
// a test says otherwise.
#include "comm/nccl/nccl.h"

#include <cuda_runtime.h>
#include <nccl.h>

#include <atomic>
#include <cstring>
#include <latch>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "comm/collective.h"
#include "comm/loopback/loopback.h"
#include "comm/nccl/join.h"
#include "comm/wire.h"
#include "gtest/gtest.h"
#include "tests/comm/exchange_case.h"
#include "tests/comm/faulty_transport.h"
#include "tests/emulator/emulator.h"

namespace ternion::comm {
namespace {

using emulator::CountNccl;
using emulator::SetNcclFaults;

constexpr RankId kRank0{0}, kRank1{1}, kRank2{2};

// Memory of the emulated device. The host does not reach kDevice.
class EmulatedMemory : public base::Memory {
 public:
  explicit EmulatedMemory(bool on_device) : on_device_(on_device) {}

  int allocations() const { return allocations_; }

  uint8_t* Allocate(size_t bytes) override {
    ++allocations_;
    void* data = nullptr;
    on_device_ ? cudaMalloc(&data, bytes) : cudaHostAlloc(&data, bytes, cudaHostAllocDefault);
    cudaMemset(data, 0, bytes);
    return static_cast<uint8_t*>(data);
  }
  void Free(uint8_t* data, size_t) override { on_device_ ? cudaFree(data) : cudaFreeHost(data); }
  void Write(const void* from, size_t bytes, void* to) override {
    cudaMemcpy(to, from, bytes, cudaMemcpyDefault);
  }
  int64_t capacity_bytes() const override { return 0; }

 private:
  const bool on_device_;
  std::atomic<int> allocations_ = 0;
};

// As long as the process, as select.cu's are.
EmulatedMemory& Pinned() {
  static EmulatedMemory* const memory = new EmulatedMemory(false);
  return *memory;
}

// What hangs is an error before the test's time is up.
const NcclOptions kBounded{.patience = std::chrono::seconds(20)};

using Body = std::function<absl::Status(Transport&)>;

// As RunLoopback, over NCCL: rank r has device devices[r], by default r.
std::vector<absl::Status> RunNccl(int num_ranks, const Body& body,
                                  const NcclOptions& options = kBounded,
                                  const std::vector<int>& devices = {}) {
  return RunLoopback(num_ranks, [&](Transport& control) -> absl::Status {
    const int rank = base::Index(control.rank());
    control.UseMemory(Pinned());
    cudaSetDevice(devices.empty() ? rank : devices[rank]);
    TERNION_ASSIGN_OR_RETURN(const auto transport, MakeNcclTransport(control, options));
    const absl::Status status = body(*transport);
    if (!status.ok()) transport->Abort(status);
    return status;
  });
}

std::vector<RankId> Others(const Transport& transport) {
  std::vector<RankId> others;
  for (int rank = 0; rank < transport.size(); ++rank) {
    if (RankId{rank} != transport.rank()) others.push_back(RankId{rank});
  }
  return others;
}

absl::Status SendText(Transport& transport, RankId to, Phase phase, const std::string& text) {
  Message message = transport.Acquire(text.size());
  std::memcpy(message.bytes().data(), text.data(), text.size());
  return transport.Send(to, phase, std::move(message));
}

absl::StatusOr<std::string> ReceiveText(Transport& transport, RankId from, Phase phase) {
  TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport.Receive({&from, 1}, phase));
  const auto bytes = arrival.message.bytes();
  std::string text(bytes.begin(), bytes.end());
  transport.Recycle(std::move(arrival.message));
  return text;
}

bool Contains(const absl::Status& status, const std::string& text) {
  return status.message().find(text) != absl::string_view::npos;
}

class NcclTest : public testing::Test {
 protected:
  void SetUp() override { before_ = CountNccl(); }
  void TearDown() override { SetNcclFaults({}); }

  // Since the test began.
  int connected() const { return CountNccl().connected - before_.connected; }
  int aborted() const { return CountNccl().aborted - before_.aborted; }
  int destroyed() const { return CountNccl().destroyed - before_.destroyed; }
  int groups() const { return CountNccl().groups - before_.groups; }

 private:
  emulator::NcclCounts before_;
};

TEST_F(NcclTest, MessagesKeepTheirOrderAndBytes) {
  const size_t sizes[] = {0, 1, 4000, 65'536, 300'000, 17, 0, 200'000};
  const auto statuses = RunNccl(4, [&](Transport& transport) -> absl::Status {
    for (size_t size : sizes) {
      for (RankId to : Others(transport)) {
        Message message = transport.Acquire(size);
        std::memset(message.memory.data(), static_cast<int>(size % 251), size);
        TERNION_RETURN_IF_ERROR(transport.Send(to, Phase::kCombine, std::move(message)));
      }
    }
    for (size_t size : sizes) {
      std::vector<RankId> waiting = Others(transport);
      while (!waiting.empty()) {
        TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport.Receive(waiting, Phase::kCombine));
        EXPECT_EQ(arrival.message.size_bytes, size);
        const auto bytes = arrival.message.bytes();
        EXPECT_EQ(std::count(bytes.begin(), bytes.end(), size % 251), bytes.size());
        EXPECT_EQ(std::erase(waiting, arrival.what.from), 1u);
        transport.Recycle(std::move(arrival.message));
      }
    }
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(connected(), 4);
  EXPECT_EQ(destroyed(), 4) << "closed in peace";
  EXPECT_EQ(groups(), 4) << "one for each rank: all was known when the first one waited";
}

// The host cannot touch what travels: nothing but the devices may.
TEST_F(NcclTest, MessagesMayLieOnTheDevice) {
  constexpr size_t kSize = 10'000;
  static EmulatedMemory* const device_memory = new EmulatedMemory(true);
  const auto statuses = RunLoopback(2, [&](Transport& control) -> absl::Status {
    cudaSetDevice(base::Index(control.rank()));
    control.UseMemory(Pinned());
    TERNION_ASSIGN_OR_RETURN(const auto transport, MakeNcclTransport(control));
    const RankId peer = Others(*transport)[0];
    Message message{base::Buffer(kSize, *device_memory), kSize};
    const std::string text(kSize, static_cast<char>('a' + base::Index(control.rank())));
    device_memory->Write(text.data(), kSize, message.memory.data());
    TERNION_RETURN_IF_ERROR(transport->Send(peer, Phase::kDispatch, std::move(message)));
    TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport->Receive({&peer, 1}, Phase::kDispatch));
    std::string got(kSize, ' ');
    cudaMemcpy(got.data(), arrival.message.memory.data(), kSize, cudaMemcpyDefault);
    EXPECT_EQ(got, std::string(kSize, static_cast<char>('a' + base::Index(peer))));
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(NcclTest, ExchangeEqualsItsReference) {
  for (int num_ranks : {2, 3, 5}) {
    for (bool presum : {false, true}) {
      for (int micro_batches : {1, 2}) {
        ExchangeCase c;
        c.num_ranks = num_ranks;
        c.options = {.dispatch = RowFormat::kInt8,
                     .combine = presum ? RowFormat::kBf16 : RowFormat::kFp32,
                     .presum = presum,
                     .act_bits = 8,
                     .hidden = 201,
                     .max_rows = 30,
                     .top_k = 3,
                     .num_experts = 8};
        c.num_layers = 6;
        c.micro_batches = micro_batches;
        c.min_routes = micro_batches == 2 ? 12 : Exchange::kAllRoutes;
        const auto statuses = RunNccl(num_ranks, [&](Transport& transport) -> absl::Status {
          std::vector<std::vector<float>> outs;
          TERNION_RETURN_IF_ERROR(RunRank(c, transport, &outs));
          for (int layer = 0; layer < c.num_layers; ++layer) {
            EXPECT_EQ(outs[layer], ReferenceOut(c, layer, base::Index(transport.rank()))) << layer;
          }
          return absl::OkStatus();
        });
        for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
      }
    }
  }
}

// Every rank sends to all when it likes, waits for its messages in an order of its own, and is
// asked for control messages in between.
TEST_F(NcclTest, RanksMayComeInAnyOrder) {
  constexpr int kRanks = 5, kTurns = 40;
  const auto statuses = RunNccl(kRanks, [&](Transport& transport) -> absl::Status {
    const int self = base::Index(transport.rank());
    for (int turn = 0; turn < kTurns; ++turn) {
      const Phase phase = turn % 3 == 0 ? Phase::kCombine : Phase::kDispatch;
      const RankId to{(self + 1 + turn % (kRanks - 1)) % kRanks};
      const RankId from{(self + kRanks - 1 - turn % (kRanks - 1)) % kRanks};
      TERNION_RETURN_IF_ERROR(SendText(transport, to, phase, absl::StrCat(turn, " of ", self)));
      if ((turn + self) % 4 == 0) TERNION_RETURN_IF_ERROR(transport.Flush());
      if (turn % 10 == 9) {
        TERNION_RETURN_IF_ERROR(AgreeOnStatus(transport, absl::OkStatus()));
      }
      TERNION_ASSIGN_OR_RETURN(const std::string text, ReceiveText(transport, from, phase));
      EXPECT_EQ(text, absl::StrCat(turn, " of ", base::Index(from)));
    }
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

// A message around a ring, each rank sending only when it has received: no two do at a time.
TEST_F(NcclTest, OneMessageAtATimeAroundARing) {
  constexpr int kRanks = 4, kTurns = 10;
  const auto statuses = RunNccl(kRanks, [&](Transport& transport) -> absl::Status {
    const int self = base::Index(transport.rank());
    const RankId next{(self + 1) % kRanks}, previous{(self + kRanks - 1) % kRanks};
    std::string text = "x";
    for (int turn = 0; turn < kTurns; ++turn) {
      if (self != 0 || turn > 0) {
        TERNION_ASSIGN_OR_RETURN(text, ReceiveText(transport, previous, Phase::kDispatch));
        EXPECT_EQ(text.size(), turn * kRanks + self);
        text += 'x';
      }
      TERNION_RETURN_IF_ERROR(SendText(transport, next, Phase::kDispatch, text));
    }
    if (self != 0) return absl::OkStatus();
    return ReceiveText(transport, previous, Phase::kDispatch).status();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(NcclTest, FlushEndsWhenTheBytesHaveLeft) {
  std::latch flushed(2);
  const auto statuses = RunNccl(2, [&](Transport& transport) -> absl::Status {
    const RankId peer = Others(transport)[0];
    TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, "rows"));
    TERNION_RETURN_IF_ERROR(transport.Flush());
    flushed.arrive_and_wait();  // nobody calls the transport meanwhile
    const Awaited what{peer, Phase::kDispatch};
    TERNION_ASSIGN_OR_RETURN(const auto arrival, transport.TryReceive({&what, 1}));
    EXPECT_TRUE(arrival.has_value());
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

TEST_F(NcclTest, BuffersCirculate) {
  const auto statuses = RunNccl(2, [&](Transport& transport) -> absl::Status {
    const RankId peer = Others(transport)[0];
    int allocations = 0;
    for (int turn = 0; turn < 50; ++turn) {
      if (turn == 10) allocations = Pinned().allocations();
      TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, std::string(9000, 'x')));
      TERNION_ASSIGN_OR_RETURN(Arrival arrival, transport.Receive({&peer, 1}, Phase::kDispatch));
      transport.Recycle(std::move(arrival.message));
    }
    // The pool is both ranks', and one of them may be ahead.
    EXPECT_LE(Pinned().allocations(), allocations + 4);
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
}

// ---- Devices

TEST_F(NcclTest, ThreadsOnOneDeviceHandMessagesOver) {
  ExchangeCase c;
  c.num_ranks = 3;
  c.options = {.hidden = 100, .max_rows = 20, .top_k = 2, .num_experts = 6};
  const auto run = [&](Transport& transport) -> absl::Status {
    std::vector<std::vector<float>> outs;
    TERNION_RETURN_IF_ERROR(RunRank(c, transport, &outs));
    for (int layer = 0; layer < c.num_layers; ++layer) {
      EXPECT_EQ(outs[layer], ReferenceOut(c, layer, base::Index(transport.rank()))) << layer;
    }
    return transport.Flush();
  };
  for (const absl::Status& status : RunNccl(3, run, kBounded, {0, 0, 0})) {
    EXPECT_TRUE(status.ok()) << status;
  }
  EXPECT_EQ(connected(), 0);
}

TEST_F(NcclTest, SomeRanksOnOneDeviceAreAnError) {
  const auto never = [](Transport&) -> absl::Status { return absl::InternalError("connected"); };
  for (const absl::Status& status : RunNccl(3, never, kBounded, {0, 1, 0})) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_TRUE(Contains(status, "ranks 0 and 2 share device 0000:01:00.0")) << status;
  }
  EXPECT_EQ(connected(), 0);
}

// ---- What goes wrong

TEST_F(NcclTest, ARankThatAbortsEndsTheOthersWithItsReason) {
  const auto statuses = RunNccl(4, [](Transport& transport) -> absl::Status {
    if (transport.rank() == kRank2) return absl::DataLossError("shard 5 is damaged");
    return ReceiveText(transport, kRank2, Phase::kDispatch).status();
  });
  EXPECT_TRUE(absl::IsDataLoss(statuses[2]));
  for (int rank : {0, 1, 3}) {
    EXPECT_TRUE(absl::IsUnavailable(statuses[rank])) << statuses[rank];
    EXPECT_TRUE(Contains(statuses[rank], "rank 2 is gone: shard 5 is damaged")) << statuses[rank];
  }
  EXPECT_EQ(aborted(), 4);
}

// A kernel of rank 0 waits for rank 1 when that dies: NCCL alone would wait on.
TEST_F(NcclTest, ARankThatIsLostWhileBytesMoveIsAnError) {
  SetNcclFaults({.stuck = true});
  const auto statuses = RunNccl(3, [&](Transport& transport) -> absl::Status {
    for (RankId to : Others(transport)) {
      TERNION_RETURN_IF_ERROR(SendText(transport, to, Phase::kDispatch, "rows"));
    }
    const Awaited what{kRank0, Phase::kDispatch};
    // Three groups: all have begun.
    while (transport.rank() == kRank1) {
      TERNION_RETURN_IF_ERROR(transport.TryReceive({&what, 1}).status());
      if (groups() == 3) return absl::InternalError("the device fell off the bus");
    }
    return ReceiveText(transport, kRank1, Phase::kDispatch).status();
  });
  for (int rank : {0, 2}) {
    EXPECT_TRUE(absl::IsUnavailable(statuses[rank])) << statuses[rank];
    EXPECT_TRUE(Contains(statuses[rank], "rank 1 is gone: the device fell off the bus"));
  }
  EXPECT_EQ(aborted(), 3);
}

TEST_F(NcclTest, ARankThatDiesBeforeItConnectsIsAnError) {
  const auto statuses = RunLoopback(2, [&](Transport& control) -> absl::Status {
    cudaSetDevice(base::Index(control.rank()));
    if (control.rank() == kRank1) return absl::InternalError("no driver");
    return MakeNcclTransport(control).status();
  });
  EXPECT_TRUE(absl::IsUnavailable(statuses[0])) << statuses[0];
  EXPECT_TRUE(Contains(statuses[0], "rank 1 is gone: no driver")) << statuses[0];
}

TEST_F(NcclTest, WhatNcclReportsIsAnErrorThatNamesThePeers) {
  std::atomic<int> waiting = 0;
  const auto statuses = RunNccl(3, [&](Transport& transport) -> absl::Status {
    if (transport.rank() == kRank2) return ReceiveText(transport, kRank0, Phase::kCombine).status();
    const RankId peer = transport.rank() == kRank0 ? kRank1 : kRank0;
    TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, "rows"));
    TERNION_RETURN_IF_ERROR(ReceiveText(transport, peer, Phase::kDispatch).status());
    if (++waiting == 2) SetNcclFaults({.failing_rank = 0, .error = ncclRemoteError, .stuck = true});
    TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kCombine, "rows"));
    return ReceiveText(transport, peer, Phase::kCombine).status();
  });
  EXPECT_TRUE(absl::IsUnavailable(statuses[0])) << statuses[0];
  EXPECT_TRUE(Contains(statuses[0], "exchanging with rank 1: ")) << statuses[0];
  EXPECT_TRUE(Contains(statuses[0], "network error")) << statuses[0];
  for (int rank : {1, 2}) EXPECT_TRUE(Contains(statuses[rank], "rank 0 is gone")) << statuses[rank];
  EXPECT_EQ(aborted(), 3);
}

TEST_F(NcclTest, WhatHangsEndsWithAnError) {
  const NcclOptions options{.patience = std::chrono::milliseconds(200)};
  SetNcclFaults({.stuck = true});
  const auto statuses = RunNccl(
      2,
      [&](Transport& transport) -> absl::Status {
        const RankId peer = Others(transport)[0];
        TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, "rows"));
        return ReceiveText(transport, peer, Phase::kDispatch).status();
      },
      options);
  // The first to lose patience is gone for the other, if that has any left.
  const auto lost_patience = [](const absl::Status& status) {
    return absl::IsDeadlineExceeded(status) && Contains(status, "exchanging with rank ") &&
           Contains(status, "not done after 200 ms");
  };
  EXPECT_TRUE(lost_patience(statuses[0]) || lost_patience(statuses[1])) << statuses[0];
  EXPECT_TRUE(!statuses[0].ok() && !statuses[1].ok());
  EXPECT_EQ(aborted(), 2);
}

TEST_F(NcclTest, AfterAnErrorAllCallsReturnIt) {
  SetNcclFaults({.failing_rank = 0, .error = ncclInternalError});
  RunLoopback(2, [&](Transport& control) -> absl::Status {
    cudaSetDevice(base::Index(control.rank()));
    control.UseMemory(Pinned());
    const absl::Status status = MakeNcclTransport(control).status();
    EXPECT_TRUE(absl::IsInternal(status)) << status;
    EXPECT_TRUE(Contains(status, "rank 0: connecting GPUs by NCCL: ")) << status;
    return absl::OkStatus();
  });
  SetNcclFaults({});
  RunNccl(2, [&](Transport& transport) -> absl::Status {
    const RankId peer = Others(transport)[0];
    TERNION_RETURN_IF_ERROR(AgreeOnStatus(transport, absl::OkStatus()));
    SetNcclFaults({.failing_rank = base::Index(transport.rank()), .error = ncclInternalError});
    TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, "rows"));
    const absl::Status failed = ReceiveText(transport, peer, Phase::kDispatch).status();
    EXPECT_FALSE(failed.ok());
    const Awaited what{peer, Phase::kDispatch};
    EXPECT_EQ(transport.Flush(), failed);
    EXPECT_EQ(transport.TryReceive({&what, 1}).status(), failed);
    EXPECT_EQ(transport.Receive({&what, 1}).status(), failed);
    EXPECT_EQ(SendText(transport, peer, Phase::kControl, "x"), failed);
    return failed;
  });
}

// ---- Leaving

TEST_F(NcclTest, WhatWasSentBeforeLeavingIsRead) {
  const auto statuses = RunNccl(3, [](Transport& transport) -> absl::Status {
    if (transport.rank() == kRank1) {
      return SendText(transport, kRank0, Phase::kDispatch, "last");
    }
    // The one that leaves never reads this.
    TERNION_RETURN_IF_ERROR(SendText(transport, kRank1, Phase::kCombine, "unread"));
    if (transport.rank() == kRank0) {
      TERNION_ASSIGN_OR_RETURN(const std::string text,
                               ReceiveText(transport, kRank1, Phase::kDispatch));
      EXPECT_EQ(text, "last");
    }
    const absl::Status gone = ReceiveText(transport, kRank1, Phase::kDispatch).status();
    EXPECT_EQ(gone, absl::UnavailableError("rank 1 is gone: it left"));
    EXPECT_EQ(SendText(transport, kRank1, Phase::kDispatch, "late"), gone);
    // The rest goes on.
    const RankId peer = transport.rank() == kRank0 ? kRank2 : kRank0;
    for (int turn = 0; turn < 3; ++turn) {
      TERNION_RETURN_IF_ERROR(SendText(transport, peer, Phase::kDispatch, "on"));
      TERNION_RETURN_IF_ERROR(ReceiveText(transport, peer, Phase::kDispatch).status());
    }
    return absl::OkStatus();
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(destroyed(), 3);
}

TEST_F(NcclTest, LeavingEndsThoughAPeerIsLost) {
  const auto statuses = RunLoopback(2, [&](Transport& control) -> absl::Status {
    cudaSetDevice(base::Index(control.rank()));
    control.UseMemory(Pinned());
    TERNION_ASSIGN_OR_RETURN(auto transport, MakeNcclTransport(control));
    if (control.rank() == kRank1) transport->Abort(absl::InternalError("broken"));
    return absl::OkStatus();  // rank 0 waits for its peer in the destructor
  });
  for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
  EXPECT_EQ(aborted(), 2);
}

// ---- What ranks announce

TEST(JoinTest, WhatIsWrittenIsRead) {
  const Join join{.round = 7, .leaving = true, .messages = {{100, 1}, {0, 2}, {INT32_MAX, 1}}};
  std::vector<uint8_t> bytes(JoinBytes(join));
  WriteJoin(join, bytes);
  const Join read = ReadJoin(bytes, 7, kRank1).value();
  EXPECT_EQ(read.messages, join.messages);
  EXPECT_TRUE(read.leaving);
}

TEST(JoinTest, DamageIsAnErrorThatNamesTheRank) {
  const Join join{.round = 7, .leaving = false, .messages = {{100, 1}}};
  std::vector<uint8_t> good(JoinBytes(join));
  WriteJoin(join, good);
  for (size_t i = 0; i < good.size(); ++i) {
    std::vector<uint8_t> bad = good;
    bad[i] ^= 0x20;
    const absl::Status status = ReadJoin(bad, 7, kRank1).status();
    EXPECT_FALSE(status.ok()) << "byte " << i;
    EXPECT_TRUE(Contains(status, "rank 1 announced for round 7")) << status;
    EXPECT_FALSE(ReadJoin({good.data(), i}, 7, kRank1).ok()) << "size " << i;
  }
  EXPECT_FALSE(ReadJoin(good, 8, kRank1).ok()) << "of another round";
}

TEST(JoinTest, WhatNobodySendsIsAnError) {
  const Announced absurd[] = {{uint64_t{1} << 31, 1}, {UINT64_MAX, 2}, {5, 0}, {5, 3}, {5, 257}};
  for (const Announced& announced : absurd) {
    const Join join{.round = 0, .leaving = false, .messages = {announced}};
    std::vector<uint8_t> bytes(JoinBytes(join));
    WriteJoin(join, bytes);
    EXPECT_TRUE(absl::IsInvalidArgument(ReadJoin(bytes, 0, kRank1).status()));
  }
  const Join join{.round = 0, .leaving = false, .messages = {{5, 1}}};
  std::vector<uint8_t> bytes(JoinBytes(join));
  WriteJoin(join, bytes);
  MessageHeader header;
  std::memcpy(&header, bytes.data(), sizeof(header));
  const auto read_as = [&](uint32_t rows, uint32_t routes, uint64_t payload_bytes) {
    header.rows = rows;
    header.routes = routes;
    header.payload_bytes = payload_bytes;
    SealMessage(header, bytes);
    return ReadJoin(bytes, 0, kRank1).status();
  };
  EXPECT_TRUE(read_as(1, 1, 16).ok());
  EXPECT_TRUE(absl::IsInvalidArgument(read_as(0, 0, 16)));
  EXPECT_TRUE(absl::IsInvalidArgument(read_as(1, 0, 17)));
  EXPECT_TRUE(absl::IsInvalidArgument(read_as(2, 0, 32)));
  EXPECT_TRUE(absl::IsInvalidArgument(read_as(1, 2, 16)));
}

// A join that is damaged on its way: no rank takes other bytes for what it got.
TEST_F(NcclTest, ADamagedJoinIsAnError) {
  const auto statuses = RunLoopback(2, [&](Transport& control) -> absl::Status {
    FaultyTransport faulty(&control);
    faulty.on_send = [&](RankId, Phase phase, Message& message) {
      if (control.rank() == kRank1 && phase == Phase::kDispatch) message.bytes().back() ^= 4;
    };
    faulty.UseMemory(Pinned());
    cudaSetDevice(base::Index(control.rank()));
    TERNION_ASSIGN_OR_RETURN(const auto transport, MakeNcclTransport(faulty));
    const RankId peer = Others(control)[0];
    absl::Status status = SendText(*transport, peer, Phase::kDispatch, "rows");
    status.Update(ReceiveText(*transport, peer, Phase::kDispatch).status());
    if (!status.ok()) transport->Abort(status);
    return status;
  });
  EXPECT_TRUE(absl::IsDataLoss(statuses[0])) << statuses[0];
  EXPECT_TRUE(Contains(statuses[0], "rank 1 announced for round 0")) << statuses[0];
}

}  // namespace
}  // namespace ternion::comm
