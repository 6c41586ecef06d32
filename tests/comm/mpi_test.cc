// Started by mpirun: the MPI transport, and an exchange over it.
#include "comm/mpi/mpi.h"

#include "comm/collective.h"
#include "gtest/gtest.h"
#include "tests/comm/exchange_case.h"

namespace ternion::comm {
namespace {

Transport* world = nullptr;

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
    const int rank = base::Index(world->rank());
    std::vector<std::vector<float>> outs;
    ASSERT_TRUE(RunRank(c, *world, &outs).ok());
    for (int layer = 0; layer < c.num_layers; ++layer) {
      EXPECT_EQ(outs[layer], ReferenceOut(c, layer, rank)) << "layer " << layer;
    }
  }
}

}  // namespace
}  // namespace ternion::comm

// A failed rank aborts the job, so that the others do not wait for it.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  auto transport = ternion::comm::MakeMpiTransport();
  if (!transport.ok()) {
    fprintf(stderr, "%s\n", transport.status().ToString().c_str());
    return 1;
  }
  ternion::comm::world = transport->get();
  const int failed = RUN_ALL_TESTS();
  if (failed != 0) (*transport)->Abort(absl::InternalError("a test failed"));
  return failed;
}
