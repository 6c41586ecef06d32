// The experts of one layer that live on this rank.
#pragma once

#include <cstdint>
#include <memory>
#include <memory_resource>
#include <span>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "comm/exchange.h"
#include "experts/ffn.h"
#include "kernels/kernels.h"

namespace ternion::experts {

using base::ExpertId;

// Scratch of ExpertShard::Run, shared by all layers of a rank. Rows are worked on in chunks of at
// most `max_routes` (row, expert) pairs, so memory is bounded however many rows arrive.
struct ShardWorkspace {
  ShardWorkspace(int64_t max_routes, int64_t hidden, int64_t intermediate,
                 const kernels::Executor& executor = {});

  struct Work {
    ExpertId expert{};
    int32_t row = 0;
    int32_t route = 0;
  };
  int64_t max_routes = 0;
  int64_t bytes_between = 4 << 20;  // of weights, read between two calls of ShardWork::between: a
                                    // fraction of a millisecond
  FfnWorkspace ffn;
  kernels::QuantizedBuffer gathered;  // [max_routes, hidden]
  base::Array<float> y;               // [max_routes, hidden]
  std::vector<Work> work;             // all pairs, by ascending expert, then row
  std::vector<int32_t> expert_begin;  // counting sort of `work`
  std::vector<FfnGroup> groups;
  // What ops read of a chunk.
  std::pmr::vector<const int8_t*> row_codes;
  std::pmr::vector<float> row_scales;
  std::pmr::vector<int32_t> term_begin;  // per output: its terms
  std::pmr::vector<const float*> terms;
  std::pmr::vector<float> term_weights;
};

// What ExpertShard::Run works on.
struct ShardWork {
  const FfnConfig* config = nullptr;
  const comm::ReceivedRows* received = nullptr;  // all of its experts are held here
  // true: outputs [received rows, hidden] = sum of weight * y in ascending expert id;
  // false: outputs [received routes, hidden] = y, in the order of received->routes.
  bool presum = true;
  float* outputs = nullptr;
  // Called now and then, between experts; an error of it ends the work. Null: never.
  const absl::FunctionRef<absl::Status()>* between = nullptr;
};

class ExpertShard {
 public:
  ExpertShard() = default;
  explicit ExpertShard(int num_experts) : experts_(num_experts) {}

  void Set(ExpertId expert, FfnWeights weights);
  bool Holds(ExpertId expert) const { return experts_[base::Index(expert)] != nullptr; }

  int num_experts() const { return static_cast<int>(experts_.size()); }
  int num_experts_here() const { return num_experts_here_; }
  // One that is held.
  const FfnWeights& at(ExpertId expert) const { return *experts_[base::Index(expert)]; }

  // Runs every route, grouped by expert.
  absl::Status Run(const kernels::Kernels& kernels, kernels::Executor& executor,
                   const ShardWork& work, ShardWorkspace& workspace) const;

 private:
  std::span<const ShardWorkspace::Work> NextChunk(std::span<const ShardWorkspace::Work> left,
                                                  const ShardWork& work,
                                                  ShardWorkspace& workspace) const;

  std::vector<std::unique_ptr<FfnWeights>> experts_;  // [num_experts], null when not here
  int num_experts_here_ = 0;
};

}  // namespace ternion::experts
