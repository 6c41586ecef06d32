// This process among the ranks: transport, threads and kernels, set up once.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/thread_pool.h"
#include "comm/transport.h"
#include "kernels/select.h"
#include "runtime/model.h"

namespace ternion::launcher {

struct WorldOptions {
  int threads = 0;                // 0: this rank's share of the cores it may use
  std::string device = "cpu";     // cpu | cuda
  std::string transport = "mpi";  // mpi | nccl, which needs cuda
};

// Rank of this process as the MPI launcher's environment tells it, 0 without one. Usable before MPI
// is set up.
int RankFromEnvironment();

// The CPU kernels that TERNION_ISA names, else the fastest this machine can run. InvalidArgument
// lists what it can when the name is not among them.
absl::StatusOr<const kernels::Kernels*> ChooseCpuKernels();

// Everything a command needs to run on this rank. Not movable: the parts point at each other.
class World {
 public:
  // MPI when a launcher started this process, else one rank alone. Collective. Errors are agreed
  // on.
  static absl::StatusOr<std::unique_ptr<World>> Create(const WorldOptions& options);
  // A world on a given transport, for ranks that are threads. That outlives it, and is not used
  // past it: NCCL may stand on top.
  static absl::StatusOr<std::unique_ptr<World>> CreateOn(comm::Transport* transport,
                                                         const WorldOptions& options);

  comm::Transport& transport() { return *transport_; }
  bool is_root() const { return transport_->rank() == base::RankId{0}; }
  int num_threads() const { return threads_->num_threads(); }
  const char* isa() const { return kernels_->name; }
  const kernels::Kernels& kernels() const { return *kernels_; }
  runtime::RankResources resources() { return {transport_, kernels_, &executor_}; }

 private:
  World() = default;

  std::unique_ptr<comm::Transport> host_transport_;
  std::unique_ptr<comm::Transport> nccl_transport_;  // on top of the host's
  comm::Transport* transport_ = nullptr;
  std::unique_ptr<base::ThreadPool> threads_;
  const kernels::Kernels* kernels_ = nullptr;
  kernels::Executor executor_;
};

}  // namespace ternion::launcher
