#include "launcher/world.h"

#include <algorithm>
#include <cstdlib>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "base/status.h"
#include "comm/collective.h"
#include "comm/loopback/loopback.h"
#include "comm/mpi/mpi.h"
#include "comm/nccl/nccl.h"

namespace ternion::launcher {
namespace {

// Sets the executor up for what it returns.
absl::StatusOr<const kernels::Kernels*> ChooseKernels(const std::string& device,
                                                      const comm::Transport& transport,
                                                      kernels::Executor& executor) {
  if (device != "cuda") return ChooseCpuKernels();
  int place = 0;  // among the ranks of this node
  for (int rank = 0; rank < base::Index(transport.rank()); ++rank) {
    place += transport.NodeOf(base::RankId{rank}) == transport.NodeOf(transport.rank());
  }
  std::string why;
  const kernels::Kernels* table = kernels::SelectCudaKernels(place, executor, &why);
  if (table == nullptr) return absl::FailedPreconditionError("--device cuda: " + why);
  return table;
}

absl::Status CheckTransport(const WorldOptions& options) {
  if (options.transport != "nccl" || options.device == "cuda") return absl::OkStatus();
  return absl::InvalidArgumentError("--transport nccl (NCCL, between GPUs) needs --device cuda");
}

// Between processes, or for one alone.
absl::StatusOr<std::unique_ptr<comm::Transport>> MakeHostTransport() {
  if (comm::LaunchedByMpi()) return comm::MakeMpiTransport();
  return std::move(comm::MakeLoopbackWorld(1)[0]);
}

// The CPUs this rank should use. mpirun may have bound each rank to cores of its own; if the ranks
// of a node may all use the same ones, they are dealt out in turn, so that oversubscribed ranks do
// not pile up.
absl::StatusOr<std::vector<int>> ShareOfCpus(comm::Transport& transport) {
  const std::vector<int> mine = base::AllowedCpus();
  const std::string key = absl::StrJoin(mine, ",");
  const std::string line = absl::StrCat(transport.NodeOf(transport.rank()), ":", key);
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> lines, comm::Gather(transport, line));
  TERNION_ASSIGN_OR_RETURN(const std::string all,
                           comm::Broadcast(transport, absl::StrJoin(lines, ";")));
  std::vector<int> alike;  // ranks with the same node and CPUs
  const std::vector<std::string> keys = absl::StrSplit(all, ';');
  for (size_t rank = 0; rank < keys.size(); ++rank) {
    if (keys[rank] == line) alike.push_back(static_cast<int>(rank));
  }
  const int place = static_cast<int>(
      std::find(alike.begin(), alike.end(), base::Index(transport.rank())) - alike.begin());
  const int sharers = static_cast<int>(alike.size());
  const int cpus = static_cast<int>(mine.size());
  std::vector<int> share;
  for (int i = place; i < cpus; i += sharers) share.push_back(mine[i]);
  if (share.empty() && cpus > 0) share.push_back(mine[place % cpus]);
  return share;
}

}  // namespace

int RankFromEnvironment() {
  for (const char* name : {"OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK"}) {
    if (const char* value = std::getenv(name)) return std::atoi(value);
  }
  return 0;
}

absl::StatusOr<const kernels::Kernels*> ChooseCpuKernels() {
  const char* isa = std::getenv("TERNION_ISA");
  const kernels::Kernels* table = kernels::SelectCpuKernels(isa == nullptr ? "" : isa);
  if (table == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat("TERNION_ISA=", isa, ": this machine has ",
                                                   absl::StrJoin(kernels::AvailableIsas(), ", ")));
  }
  return table;
}

absl::StatusOr<std::unique_ptr<World>> World::Create(const WorldOptions& options) {
  TERNION_ASSIGN_OR_RETURN(std::unique_ptr<comm::Transport> transport, MakeHostTransport());
  TERNION_ASSIGN_OR_RETURN(std::unique_ptr<World> world, CreateOn(transport.get(), options));
  world->host_transport_ = std::move(transport);
  return world;
}

absl::StatusOr<std::unique_ptr<World>> World::CreateOn(comm::Transport* transport,
                                                       const WorldOptions& options) {
  std::unique_ptr<World> world(new World);
  absl::StatusOr<const kernels::Kernels*> kernels =
      ChooseKernels(options.device, *transport, world->executor_);
  absl::Status usable = CheckTransport(options);
  usable.Update(kernels.status());
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(*transport, usable));
  TERNION_ASSIGN_OR_RETURN(std::vector<int> cpus, ShareOfCpus(*transport));
  world->kernels_ = *kernels;
  transport->UseMemory(*world->executor_.staging);
  world->transport_ = transport;
  if (options.transport == "nccl") {
    TERNION_ASSIGN_OR_RETURN(world->nccl_transport_, comm::MakeNcclTransport(*transport));
    world->transport_ = world->nccl_transport_.get();
  }
  const int threads = options.threads > 0 ? options.threads : std::max<int>(1, cpus.size());
  world->threads_ = std::make_unique<base::ThreadPool>(threads, std::move(cpus));
  world->executor_.threads = world->threads_.get();
  return world;
}

}  // namespace ternion::launcher
