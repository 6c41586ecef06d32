// What --json files say about ranks and their traffic. Documented in docs/json.md.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "comm/traffic.h"
#include "launcher/engine_flags.h"
#include "launcher/world.h"
#include "nlohmann/json.hpp"

namespace ternion::launcher {

using Json = nlohmann::ordered_json;

// What ranks tell rank 0 at the end of a command.
struct WorldReport {
  Json per_rank = Json::array();  // one object per rank
  Json traffic = Json::object();  // dispatch, combine: bytes over all ranks, without self traffic
};

// Message bytes of one phase on the wire, of all ranks (what one sends another receives), and what
// they would be if the same rows travelled at bf16.
struct PhaseBytes {
  double sent = 0;
  double at_bf16 = 0;
};
// `phase`: "dispatch" or "combine"; rows have `hidden` elements.
PhaseBytes PhaseBytesOf(const WorldReport& report, const char* phase, int64_t hidden);

// Collective; the report is filled on rank 0.
absl::StatusOr<WorldReport> CollectReport(const LoadedEngine& loaded, World& world);

std::string HostName();
// The running kernel's name, which ranks of one machine share whatever their hosts are called.
std::string MachineName();

// The commit that this program was built from, "-dirty" when files had changed; or "unknown".
const char* BuildCommit();

// {"dispatch", "combine", "exact"} as the engine runs them (Engine::wire).
Json WireJson(const runtime::WireOptions& wire);

// Whether `path` can be written, to be asked before the work whose result goes there. An empty path
// can.
absl::Status CheckWritable(const std::string& path);

// Writes `json` to `path`, whole or not at all. Text that is not UTF-8 is replaced by U+FFFD.
absl::Status WriteJson(const std::string& path, const Json& json);

// The tensors' bytes in human units: "412 B", "1.3 kB", "5.2 MB", "7.1 GB".
std::string HumanBytes(double bytes);

}  // namespace ternion::launcher
