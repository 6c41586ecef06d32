#include "launcher/trace_recorder.h"

#include <algorithm>
#include <span>

#include "base/bytes.h"
#include "base/status.h"
#include "comm/collective.h"

namespace ternion::launcher {

TraceRecorder::TraceRecorder(runtime::Engine& engine) : engine_(engine) {
  engine.set_routing_sink([this](runtime::SequenceId sequence, int32_t position, int /*layer*/,
                                 std::span<const int32_t> experts) {
    // A row passes the layers in their order.
    std::vector<uint16_t>& row = rows_[{base::Index(sequence), position}];
    row.insert(row.end(), experts.begin(), experts.end());
  });
}

std::string TraceRecorder::Serialize() const {
  base::ByteWriter writer;
  for (const auto& [row, experts] : rows_) {
    writer.Put(row);
    writer.PutVector(experts);
  }
  return writer.Take();
}

absl::Status TraceRecorder::AddRowsOf(const std::string& bytes) {
  const runtime::ModelConfig& config = engine_.config();
  const size_t ids_of_row = size_t(config.num_expert_layers()) * config.top_k;
  for (base::ByteReader reader(bytes); !reader.AtEnd();) {
    const Row row = reader.Get<Row>();
    std::vector<uint16_t> experts = reader.GetVector<uint16_t>();
    const bool known = std::all_of(experts.begin(), experts.end(),
                                   [&](uint16_t id) { return id < config.num_experts; });
    if (!reader.ok() || experts.size() != ids_of_row || !known) {
      return absl::InvalidArgumentError("a rank recorded rows that are not of this model");
    }
    rows_[row] = std::move(experts);
  }
  return absl::OkStatus();
}

absl::StatusOr<experts::RoutingTrace> TraceRecorder::Gather(comm::Transport& transport) {
  TERNION_ASSIGN_OR_RETURN(const std::vector<std::string> gathered,
                           comm::Gather(transport, Serialize()));
  experts::RoutingTrace trace;
  if (gathered.empty()) return trace;
  for (const std::string& bytes : gathered) TERNION_RETURN_IF_ERROR(AddRowsOf(bytes));
  std::erase_if(rows_,
                [](const auto& row) { return row.first.sequence > 0 && row.first.position == 0; });
  if (rows_.empty()) return absl::InvalidArgumentError("no row was recorded");

  const runtime::ModelConfig& config = engine_.config();
  trace.shape = {config.num_expert_layers(), static_cast<int64_t>(rows_.size()), config.num_experts,
                 config.top_k};
  for (int64_t layer = 0; layer < trace.shape.num_layers; ++layer) {
    for (auto& [row, experts] : rows_) {
      const auto ids = std::span(experts).subspan(layer * config.top_k, config.top_k);
      std::sort(ids.begin(), ids.end());
      trace.ids.insert(trace.ids.end(), ids.begin(), ids.end());
    }
  }
  return trace;
}

}  // namespace ternion::launcher
