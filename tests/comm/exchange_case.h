// One seeded world of rows, routes and fake experts: every rank's part of it, and what must come
// out.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "comm/exchange.h"

namespace ternion::comm {

struct ExchangeCase {
  ExchangeOptions options;
  int num_ranks = 1;
  int num_layers = 2;
  uint32_t seed = 1;            // of rows and routes
  uint32_t placement_seed = 1;  // of where experts live
  int micro_batches = 1;
  int64_t min_routes = Exchange::kAllRoutes;  // DispatchRecv's
};

// A rank's rows of one layer, and where each route goes.
struct RankBatch {
  struct Choice {
    int row = 0;
    Route route;
    int rank = 0;  // that holds the expert
  };
  int num_rows = 0;
  std::vector<float> x;         // [num_rows, hidden], normed rows
  std::vector<float> residual;  // [num_rows, hidden], what `out` holds before
  std::vector<Choice> choices;  // by row, ascending expert id
};
RankBatch MakeBatch(const ExchangeCase& c, int layer, int rank);
// Of rows begin .. end - 1 of the batch, which are rows 0 .. of the plan.
DispatchPlan MakePlan(const ExchangeCase& c, const RankBatch& batch, int begin, int end);

// out[hidden] of a fake expert: cheap, and different for every expert, code, scale and position.
void RunFakeExpert(ExpertId expert, const int8_t* codes, float scale, int64_t hidden, float* out);

// What a rank must get in one layer, computed without an exchange.
std::vector<float> ReferenceOut(const ExchangeCase& c, int layer, int rank);

// What the experts hand to CombineSend for `received`.
std::vector<float> RunFakeExperts(const ExchangeOptions& options, const ReceivedRows& received);

// Goes through all layers of the case as `transport`'s rank; (*outs)[layer] is what CombineRecv
// left. Two micro-batches take turns as in a model.
absl::Status RunRank(const ExchangeCase& c, Transport& transport,
                     std::vector<std::vector<float>>* outs);

}  // namespace ternion::comm
