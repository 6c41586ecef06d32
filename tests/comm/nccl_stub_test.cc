// A build without NCCL says so, on every rank.
#include "comm/loopback/loopback.h"
#include "comm/nccl/nccl.h"
#include "gtest/gtest.h"

namespace ternion::comm {
namespace {

TEST(NcclStubTest, SaysThatThereIsNoNccl) {
  const auto make = [](Transport& control) { return MakeNcclTransport(control).status(); };
  for (int num_ranks : {1, 3}) {
    for (const absl::Status& status : RunLoopback(num_ranks, make)) {
      EXPECT_TRUE(absl::IsUnimplemented(status)) << status;
      EXPECT_EQ(status.message(), "this build has no NCCL transport; use --transport mpi");
    }
  }
}

}  // namespace
}  // namespace ternion::comm
