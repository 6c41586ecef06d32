#include "launcher/report.h"

#include <unistd.h>

#include <fstream>

#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/status.h"
#include "comm/collective.h"
#include "commit.h"

namespace ternion::launcher {
namespace {

using comm::Phase;
using comm::TrafficCount;
using comm::TrafficScope;

Json CountJson(const TrafficCount& count) {
  return {{"payload_bytes", count.payload_bytes},
          {"message_bytes", count.message_bytes},
          {"messages", count.messages},
          {"rows", count.rows}};
}

// What went over the wire in one phase at the top, by where it went below; and what came.
Json PhaseJson(const comm::Transport& transport, Phase phase) {
  const auto sent = [&](TrafficScope scope) {
    return CountJson(transport.Traffic(comm::Direction::kSent, phase, scope));
  };
  Json json = CountJson(transport.WireTraffic(comm::Direction::kSent, phase));
  json["self"] = sent(TrafficScope::kSelf);
  json["intra_node"] = sent(TrafficScope::kIntraNode);
  json["inter_node"] = sent(TrafficScope::kInterNode);
  json["received"] = CountJson(transport.WireTraffic(comm::Direction::kReceived, phase));
  return json;
}

// Adds the numbers of `from` into `to`, object by object.
void AddNumbers(const Json& from, Json& to) {
  for (const auto& [key, value] : from.items()) {
    Json& sum = to[key];
    if (value.is_object()) {
      AddNumbers(value, sum);
    } else {
      sum = (sum.is_null() ? 0 : sum.get<int64_t>()) + value.get<int64_t>();
    }
  }
}

}  // namespace

std::string HostName() {
  char name[256] = "";
  gethostname(name, sizeof(name) - 1);
  return name;
}

std::string MachineName() {
  std::ifstream file("/proc/sys/kernel/random/boot_id");
  std::string name;
  file >> name;
  return name;
}

absl::StatusOr<WorldReport> CollectReport(const LoadedEngine& loaded, World& world) {
  comm::Transport& transport = world.transport();
  const Json own = {{"rank", base::Index(transport.rank())},
                    {"node", transport.NodeOf(transport.rank())},
                    {"host", HostName()},
                    {"threads", world.num_threads()},
                    {"isa", world.isa()},
                    {"experts", loaded.engine->model().num_local_experts()},
                    {"weight_bytes", loaded.engine->model().weight_bytes()},
                    {"kv_tokens", loaded.engine->kv_tokens()},
                    {"load_seconds", loaded.load_seconds},
                    {"wait_seconds", transport.traffic().wait_seconds()},
                    {"wire_seconds", transport.traffic().wire_seconds()},
                    {"traffic",
                     {{"dispatch", PhaseJson(transport, Phase::kDispatch)},
                      {"combine", PhaseJson(transport, Phase::kCombine)}}}};
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> texts,
                           comm::Gather(transport, own.dump()));
  WorldReport report;
  for (const std::string& text : texts) {
    Json rank = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!rank.is_object()) return absl::InvalidArgumentError("a rank sent a malformed report");
    AddNumbers(rank["traffic"], report.traffic);
    report.per_rank.push_back(std::move(rank));
  }
  return report;
}

PhaseBytes PhaseBytesOf(const WorldReport& report, const char* phase, int64_t hidden) {
  const Json& traffic = report.traffic[phase];
  const double message = traffic["message_bytes"], payload = traffic["payload_bytes"];
  const double rows = traffic["rows"];
  return {message, message - payload + rows * 2 * static_cast<double>(hidden)};
}

const char* BuildCommit() { return TERNION_COMMIT; }

Json WireJson(const runtime::WireOptions& wire) {
  return {{"dispatch", std::string(comm::RowFormatName(*wire.dispatch))},
          {"combine", std::string(comm::RowFormatName(wire.combine))},
          {"exact", wire.exact}};
}

absl::Status CheckWritable(const std::string& path) {
  return path.empty() ? absl::OkStatus() : base::AtomicFile::Create(path).status();
}

absl::Status WriteJson(const std::string& path, const Json& json) {
  return base::WriteFileAtomically(path,
                                   json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

std::string HumanBytes(double bytes) {
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  for (; bytes >= 1000 && unit < 4; ++unit) bytes /= 1000;
  return unit == 0 ? absl::StrFormat("%.0f B", bytes)
                   : absl::StrFormat("%.1f %s", bytes, units[unit]);
}

}  // namespace ternion::launcher
