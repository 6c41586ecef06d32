// Rows that cross between nodes once: with small whole numbers all sums are exact, so that the
// order of adding does not matter and the result must be that of a serial sum.
#include "experts/hierarchical_exchange.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status.h"
#include "comm/loopback/loopback.h"
#include "gtest/gtest.h"
#include "kernels/select.h"
#include "tests/comm/faulty_transport.h"
#include "tests/testing/status.h"

namespace ternion::experts {
namespace {

constexpr int64_t kHidden = 37;
constexpr int kExperts = 12;
constexpr int kTopK = 4;
constexpr int kLayers = 5;
constexpr int kMaxRows = 6;

struct World {
  std::vector<int> node_of;  // [rank]
  int num_ranks() const { return static_cast<int>(node_of.size()); }
};

// A rank's rows of one layer.
struct Rows {
  int num_rows = 0;
  std::vector<int8_t> codes;  // [num_rows, hidden], -3 .. 3
  std::vector<int32_t> ids;   // [num_rows, top_k]
  std::vector<float> weights;
};

Rows RowsOf(int layer, int rank) {
  std::mt19937 random(layer * 100 + rank);
  Rows rows;
  rows.num_rows = random() % (kMaxRows + 1);
  for (int64_t i = 0; i < rows.num_rows * kHidden; ++i) rows.codes.push_back(random() % 7 - 3);
  for (int row = 0; row < rows.num_rows; ++row) {
    std::vector<int32_t> experts(kExperts);
    for (int e = 0; e < kExperts; ++e) experts[e] = e;
    std::shuffle(experts.begin(), experts.end(), random);
    rows.ids.insert(rows.ids.end(), experts.begin(), experts.begin() + kTopK);
    for (int k = 0; k < kTopK; ++k) rows.weights.push_back(1 + random() % 3);
  }
  return rows;
}

// Expert e multiplies by e + 1.
std::vector<float> Expected(const Rows& rows) {
  std::vector<float> out(rows.num_rows * kHidden);
  for (int row = 0; row < rows.num_rows; ++row) {
    float factor = 0;
    for (int k = 0; k < kTopK; ++k) {
      factor += rows.weights[row * kTopK + k] * (rows.ids[row * kTopK + k] + 1);
    }
    for (int64_t i = 0; i < kHidden; ++i) {
      out[row * kHidden + i] = factor * rows.codes[row * kHidden + i];
    }
  }
  return out;
}

// One or two replicas, anywhere; some ranks hold none.
Placement RandomPlacement(int num_ranks, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<LayerRanks> layers(kLayers, LayerRanks(kExperts));
  for (LayerRanks& layer : layers) {
    for (std::vector<RankId>& ranks : layer) {
      const int first = random() % num_ranks, second = random() % num_ranks;
      ranks.push_back(RankId{std::min(first, second)});
      if (first != second && random() % 2 == 0) ranks.push_back(RankId{std::max(first, second)});
    }
  }
  return Placement::FromLayers(layers, num_ranks);
}

comm::ExchangeOptions Options() {
  return {.dispatch = comm::RowFormat::kInt8,
          .combine = comm::RowFormat::kFp32,
          .hidden = kHidden,
          .max_rows = kMaxRows,
          .top_k = kTopK,
          .num_experts = kExperts};
}

absl::Status RunRank(const Placement& placement, comm::Transport& transport) {
  base::ThreadPool threads(1);
  kernels::Executor executor{.threads = &threads};
  TERNION_ASSIGN_OR_RETURN(const NodeLayout layout, NodeLayout::Make(transport));
  HierarchicalExchange exchange(Options(), layout, placement, &transport,
                                kernels::SelectCpuKernels(""), &executor);
  const int rank = base::Index(transport.rank());
  for (int layer = 0; layer < kLayers; ++layer) {
    const Rows rows = RowsOf(layer, rank);
    kernels::QuantizedBuffer buffer(kMaxRows, kHidden);
    const kernels::QuantizedRows codes = buffer.rows(rows.num_rows);
    for (int row = 0; row < rows.num_rows; ++row) {
      std::copy_n(&rows.codes[row * kHidden], kHidden, codes.codes + row * codes.stride);
      codes.scales[row] = 1;
    }
    const GateChoice choice = {rows.ids.data(), rows.weights.data(), rows.num_rows, kTopK};
    TERNION_RETURN_IF_ERROR(exchange.DispatchSend(3, layer, choice, codes, nullptr));
    const auto run = [&](const comm::ReceivedRows& received, float* outputs) {
      std::fill_n(outputs, received.rows.size() * kHidden, 0.0f);
      for (size_t i = 0; i < received.rows.size(); ++i) {
        const comm::ReceivedRow& row = received.rows[i];
        for (int32_t j = row.first_route; j < row.first_route + row.num_routes; ++j) {
          const comm::Route& route = received.routes[j];
          EXPECT_TRUE(placement.Holds(layer, route.expert, transport.rank()));
          const float factor = route.weight * row.scale * (base::Index(route.expert) + 1);
          for (int64_t k = 0; k < kHidden; ++k) outputs[i * kHidden + k] += factor * row.codes[k];
        }
      }
      return absl::OkStatus();
    };
    TERNION_RETURN_IF_ERROR(exchange.RunExperts(run));
    std::vector<float> out(rows.num_rows * kHidden);
    TERNION_RETURN_IF_ERROR(exchange.CombineRecv(out.data()));
    EXPECT_EQ(out, Expected(rows)) << "rank " << rank << ", layer " << layer;
  }
  // A row crosses to a node at most once, there and back.
  int64_t rows = 0;
  for (int layer = 0; layer < kLayers; ++layer) rows += RowsOf(layer, rank).num_rows;
  const auto sent = transport.Traffic(comm::Direction::kSent, comm::Phase::kDispatch,
                                      comm::TrafficScope::kInterNode);
  EXPECT_LE(sent.rows, rows * (layout.num_nodes() - 1));
  return absl::OkStatus();
}

const World kWorlds[] = {{{0}},          {{0, 0}},       {{0, 1}},
                         {{0, 0, 1, 1}}, {{5, 2, 5, 2}}, {{0, 0, 1, 1, 2, 2}},
                         {{0, 1, 1, 0}}, {{0, 0, 0, 0}}, {{0, 0, 0, 1, 1, 1}}};

TEST(HierarchicalExchange, EqualsTheSerialSum) {
  for (const World& world : kWorlds) {
    for (uint32_t seed = 0; seed < 3; ++seed) {
      const Placement placement = RandomPlacement(world.num_ranks(), seed);
      const auto statuses = comm::RunLoopback(
          world.num_ranks(),
          [&](comm::Transport& transport) { return RunRank(placement, transport); }, world.node_of);
      for (const absl::Status& status : statuses) EXPECT_TRUE(status.ok()) << status;
    }
  }
}

// Between nodes or inside one: who takes a damaged message says whose it was.
TEST(HierarchicalExchange, AFlippedBitIsCaughtAndNamed) {
  const World world = {{0, 0, 1, 1}};
  const Placement placement = RandomPlacement(world.num_ranks(), 1);
  for (const int sender : {2, 1}) {
    for (const comm::Phase phase : {comm::Phase::kDispatch, comm::Phase::kCombine}) {
      SCOPED_TRACE(absl::StrCat("rank ", sender, ", phase ", static_cast<int>(phase)));
      const auto statuses = comm::RunLoopback(
          world.num_ranks(),
          [&](comm::Transport& transport) {
            comm::FaultyTransport faulty(&transport);
            bool flipped = false;
            faulty.on_send = [&](RankId to, comm::Phase of, comm::Message& message) {
              const bool chosen =
                  transport.rank() == RankId{sender} && to == RankId{0} && of == phase;
              if (chosen && !std::exchange(flipped, true)) message.bytes().back() ^= 8;
            };
            return RunRank(placement, faulty);
          },
          world.node_of);
      EXPECT_TRUE(absl::IsDataLoss(statuses[0])) << statuses[0];
      EXPECT_TRUE(absl::StrContains(statuses[0].message(), absl::StrCat("rank ", sender)))
          << statuses[0];
      for (int rank = 1; rank < world.num_ranks(); ++rank) {
        EXPECT_TRUE(statuses[rank].ok() || absl::IsUnavailable(statuses[rank])) << statuses[rank];
      }
    }
  }
}

TEST(HierarchicalExchange, NodesOfUnequalSizeAreRefused) {
  const auto world = comm::MakeLoopbackWorld(3, {0, 0, 1});
  EXPECT_TRUE(test::IsInvalid(NodeLayout::Make(*world[2]).status(),
                              "as many ranks on every node; node 0 has 2, node 1 has 1"));
}

}  // namespace
}  // namespace ternion::experts
