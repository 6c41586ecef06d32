#include <nccl.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "tests/emulator/emulator.h"

namespace {

// Polls that find a call in progress which could have ended.
constexpr int kSlowPolls = 2;

[[noreturn]] void Fail(const char* what) {
  std::fprintf(stderr, "emulated NCCL: %s\n", what);
  std::abort();
}

struct Operation {
  bool sends = false;
  int peer = 0;
  void* data = nullptr;
  size_t bytes = 0;
  bool done = false;
};

struct Group {
  std::vector<Operation> operations;
  std::shared_ptr<bool> done = std::make_shared<bool>(false);
  cudaStream_t stream = nullptr;
};

struct World {
  std::vector<ncclComm*> members;  // [rank] null: not there, or gone
  int connected = 0;
};

// Guards everything in this file.
std::mutex mutex;
ternion::emulator::NcclFaults faults;
ternion::emulator::NcclCounts counts;
std::map<std::string, std::shared_ptr<World>> worlds;  // by id

}  // namespace

struct ncclComm {
  std::shared_ptr<World> world;
  int rank = 0;
  ncclResult_t error = ncclSuccess;
  const char* detail = "";
  std::deque<Group> launching;
  int slow_polls = 0;
  bool connected = false;
  std::deque<Group> running;  // the first one runs

  bool AllHaveCalled() const { return world->connected == static_cast<int>(world->members.size()); }
};

namespace {

// The first operation of the group that runs at `comm` that waits for `peer`.
Operation* FindWaiting(ncclComm* comm, int peer, bool sends) {
  if (comm == nullptr || comm->running.empty()) return nullptr;
  for (Operation& operation : comm->running.front().operations) {
    if (operation.peer == peer && operation.sends == sends && !operation.done) return &operation;
  }
  return nullptr;
}

// Moves what can move from or to `comm`; whether anything did.
bool Meet(ncclComm* comm) {
  if (comm == nullptr || comm->running.empty()) return false;
  bool moved = false;
  for (Operation& operation : comm->running.front().operations) {
    if (operation.done || !operation.sends) continue;
    // Not past an earlier one to the same peer.
    if (FindWaiting(comm, operation.peer, true) != &operation) continue;
    ncclComm* const peer = comm->world->members[operation.peer];
    Operation* const other = FindWaiting(peer, comm->rank, false);
    if (other == nullptr) continue;
    if (other->bytes != operation.bytes) {
      comm->error = peer->error = ncclInternalError;
      comm->detail = peer->detail = "sizes differ";
      return false;
    }
    ternion::emulator::CopyNow(other->data, operation.data, operation.bytes);
    operation.done = other->done = moved = true;
  }
  Group& group = comm->running.front();
  const auto is_done = [](const Operation& operation) { return operation.done; };
  if (std::all_of(group.operations.begin(), group.operations.end(), is_done)) {
    *group.done = true;
    comm->running.pop_front();
    moved = true;
  }
  return moved;
}

void MoveAll(World& world) {
  for (bool moved = !faults.stuck; moved;) {
    moved = false;
    for (ncclComm* member : world.members) moved = Meet(member) || moved;
  }
}

// The rest of what was called is done: groups are on their streams.
void Launch(ncclComm* comm) {
  for (; !comm->launching.empty(); comm->launching.pop_front()) {
    Group& group = comm->launching.front();
    ternion::emulator::AddToStream(group.stream, [done = group.done, world = comm->world] {
      const std::lock_guard lock(mutex);
      MoveAll(*world);
      return *done;
    });
    comm->running.push_back(std::move(group));
  }
}

// Groups belong to threads.
thread_local int group_depth = 0;
thread_local ncclComm* group_comm = nullptr;
thread_local Group open_group;

ncclResult_t Add(Operation operation, ncclComm_t comm, cudaStream_t stream) {
  if (operation.peer < 0 || operation.peer >= static_cast<int>(comm->world->members.size())) {
    return ncclInvalidArgument;
  }
  ternion::emulator::CheckBytes(&operation.data, sizeof(operation.data));
  ncclGroupStart();
  group_comm = comm;
  open_group.stream = stream;
  open_group.operations.push_back(operation);
  return ncclGroupEnd();
}

void Remove(ncclComm* comm) {
  comm->world->members[comm->rank] = nullptr;
  delete comm;
}

}  // namespace

const char* ncclGetErrorString(ncclResult_t result) {
  switch (result) {
    case ncclSuccess:
      return "no error";
    case ncclRemoteError:
      return "remote process exited or there was a network error";
    default:
      return "internal error";
  }
}

const char* ncclGetLastError(ncclComm_t comm) { return comm->detail; }

ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  const std::lock_guard lock(mutex);
  *id = {};
  std::snprintf(id->internal, sizeof(id->internal), "world %zu", worlds.size());
  worlds[id->internal] = std::make_shared<World>();
  return ncclSuccess;
}

ncclResult_t ncclCommInitRankConfig(ncclComm_t* comm, int size, ncclUniqueId id, int rank,
                                    ncclConfig_t* config) {
  if (config->blocking != 0) Fail("a communicator whose calls may block");
  const std::lock_guard lock(mutex);
  const auto found = worlds.find(id.internal);
  if (found == worlds.end() || rank < 0 || rank >= size) return ncclInvalidArgument;
  const std::shared_ptr<World> world = found->second;
  world->members.resize(size);
  *comm = new ncclComm;
  (*comm)->world = world;
  (*comm)->rank = rank;
  (*comm)->slow_polls = kSlowPolls;
  world->members[rank] = *comm;
  ++world->connected;
  ++counts.connected;
  return ncclInProgress;
}

ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* state) {
  const std::lock_guard lock(mutex);
  *state = ncclSuccess;
  if (faults.failing_rank == comm->rank) comm->error = faults.error;
  if (comm->error != ncclSuccess) {
    *state = comm->error;
  } else if (!comm->AllHaveCalled() || comm->slow_polls-- > 0) {
    *state = ncclInProgress;
  } else {
    comm->connected = true;
    Launch(comm);
  }
  return ncclSuccess;
}

ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclInProgress; }

ncclResult_t ncclCommDestroy(ncclComm_t comm) {
  const std::lock_guard lock(mutex);
  if (!comm->running.empty() || !comm->launching.empty()) Fail("destroyed while it waits");
  ++counts.destroyed;
  Remove(comm);
  return ncclSuccess;
}

ncclResult_t ncclCommAbort(ncclComm_t comm) {
  const std::lock_guard lock(mutex);
  ++counts.aborted;
  Remove(comm);
  return ncclSuccess;
}

ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}

ncclResult_t ncclGroupEnd() {
  if (--group_depth > 0) return ncclSuccess;
  const std::lock_guard lock(mutex);
  if (group_comm == nullptr) return ncclSuccess;
  if (!group_comm->connected) Fail("a group before the communicator is connected");
  ++counts.groups;
  group_comm->slow_polls = kSlowPolls;
  group_comm->launching.push_back(std::exchange(open_group, Group()));
  group_comm = nullptr;
  return ncclInProgress;
}

ncclResult_t ncclSend(const void* data, size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return Add({.sends = true, .peer = peer, .data = const_cast<void*>(data), .bytes = count}, comm,
             stream);
}

ncclResult_t ncclRecv(void* data, size_t count, ncclDataType_t, int peer, ncclComm_t comm,
                      cudaStream_t stream) {
  return Add({.sends = false, .peer = peer, .data = data, .bytes = count}, comm, stream);
}

namespace ternion::emulator {

void SetNcclFaults(const NcclFaults& new_faults) {
  const std::lock_guard lock(mutex);
  faults = new_faults;
}

NcclCounts CountNccl() {
  const std::lock_guard lock(mutex);
  return counts;
}

}  // namespace ternion::emulator
