// N ranks as threads of one process.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "comm/transport.h"

namespace ternion::comm {

// A world of `num_ranks` connected transports; `node_of` gives each rank's node (empty: all on node
// 0). Element r is used by one thread at a time. The world lives as long as any of its transports.
std::vector<std::unique_ptr<Transport>> MakeLoopbackWorld(int num_ranks,
                                                          std::vector<int> node_of = {});

// Runs body(transport) on num_ranks threads and waits for all. A rank that returns an error aborts
// its transport, so that the others end too. Returns each rank's status. `node_of` as above.
std::vector<absl::Status> RunLoopback(int num_ranks,
                                      const std::function<absl::Status(Transport&)>& body,
                                      std::vector<int> node_of = {});

}  // namespace ternion::comm
