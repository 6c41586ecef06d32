#include "launcher/engine_flags.h"

#include <chrono>

#include "base/status.h"
#include "comm/collective.h"
#include "launcher/progress.h"

namespace ternion::launcher {
namespace {

absl::Status CheckPlacement(const EngineFlags& flags) {
  const bool from_trace = flags.placement == "balanced" || flags.placement == "local";
  if (from_trace && flags.trace.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--placement ", flags.placement, " needs --trace"));
  }
  if (!from_trace && !flags.trace.empty()) {
    return absl::InvalidArgumentError("--trace goes with --placement balanced or local");
  }
  return absl::OkStatus();
}

}  // namespace

void AddWorldFlags(CLI::App& command, WorldOptions& options) {
  command
      .add_option("--threads", options.threads,
                  "Threads per rank (default: its share of the cores)")
      ->check(CLI::Range(1, 1024));
  command.add_option("--device", options.device, "Where kernels run")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command
      .add_option("--transport", options.transport,
                  "How ranks exchange activations: mpi; nccl: from GPU to GPU, one for each rank")
      ->check(CLI::IsMember({"mpi", "nccl"}))
      ->capture_default_str();
}

void AddEngineFlags(CLI::App& command, EngineFlags& flags) {
  command.add_option("--model", flags.model, "Model directory (config.json, *.safetensors)")
      ->required();
  const CLI::IsMember formats({"fp32", "bf16", "int8", "int4"});
  command
      .add_option(
          "--wire-dispatch", flags.wire_dispatch,
          "Precision of rows going to experts; auto: the model's own activation width, lossless")
      ->check(CLI::IsMember({"auto", "fp32", "bf16", "int8", "int4"}))
      ->capture_default_str();
  command
      .add_option("--wire-combine", flags.wire_combine, "Precision of expert outputs coming back")
      ->check(formats)
      ->capture_default_str();
  command
      .add_option("--wire", flags.wire,
                  "exact: fp32 rows per expert, summed at the owner; the same bits for any ranks")
      ->check(CLI::IsMember({"exact"}));
  command
      .add_option("--placement", flags.placement,
                  "contiguous; balanced (hot experts replicated) or local (experts that fire "
                  "together side by side), both from --trace; or a JSON file that says which ranks "
                  "hold which experts")
      ->capture_default_str();
  command.add_option("--trace", flags.trace,
                     "Routing trace recorded by `ternion eval --record-trace`, for --placement");
  command
      .add_option("--kv", flags.kv, "Precision of the KV cache; auto: the model's own (kv_bits)")
      ->check(CLI::IsMember({"auto", "bf16", "int8", "int4", "int3"}))
      ->capture_default_str();
  command
      .add_option(
          "--kv-tokens", flags.kv_tokens,
          "KV cache of one rank, in tokens (default: what a quarter of the memory holds, or all "
          "that weights leave)")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 40));
  command
      .add_option(
          "--exchange", flags.exchange,
          "direct: every rank with every other; hierarchical: rows cross between nodes once "
          "and fan out inside (not with --wire exact)")
      ->check(CLI::IsMember({"direct", "hierarchical"}))
      ->capture_default_str();
  command
      .add_option("--micro-batches", flags.micro_batches,
                  "2: a step's rows go through the layers in two halves, so that one travels "
                  "while the other is worked on; auto: whatever proves faster")
      ->check(CLI::IsMember({"auto", "1", "2"}))
      ->capture_default_str();
  AddWorldFlags(command, flags.world);
}

absl::StatusOr<runtime::WireOptions> ResolveWire(const EngineFlags& flags) {
  runtime::WireOptions wire;
  wire.exact = flags.wire == "exact";
  if (flags.wire_dispatch != "auto") {
    TERNION_ASSIGN_OR_RETURN(wire.dispatch, comm::ParseRowFormat(flags.wire_dispatch));
  }
  TERNION_ASSIGN_OR_RETURN(wire.combine, comm::ParseRowFormat(flags.wire_combine));
  if (wire.exact && flags.exchange == "hierarchical") {
    return absl::InvalidArgumentError(
        "--wire exact sums at the owner, --exchange hierarchical on every node: choose one");
  }
  if (wire.exact) wire.combine = comm::RowFormat::kFp32;
  return wire;
}

absl::StatusOr<LoadedEngine> LoadEngine(const EngineFlags& flags, World& world, bool hash_logits,
                                        const kernels::Kernels* kernels) {
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<runtime::WireOptions> wire = ResolveWire(flags);
  absl::Status usable = CheckPlacement(flags);
  usable.Update(wire.status());
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world.transport(), usable));
  runtime::EngineOptions options;
  options.model_directory = flags.model;
  options.placement = flags.placement;
  options.trace = flags.trace;
  options.wire = *wire;
  options.kv = kernels::ParseKvFormat(flags.kv);  // "auto" is none
  options.kv_tokens = flags.kv_tokens;
  options.hierarchical = flags.exchange == "hierarchical";
  options.micro_batches = flags.micro_batches == "auto" ? 0 : std::stoi(flags.micro_batches);
  options.hash_logits = hash_logits;
  ProgressBar bar("loading " + flags.model, world.is_root());
  LoadedEngine loaded;
  runtime::RankResources resources = world.resources();
  if (kernels != nullptr) resources.kernels = kernels;
  TERNION_ASSIGN_OR_RETURN(
      loaded.engine, runtime::Engine::Create(options, resources, [&](int64_t done, int64_t total) {
        bar.Update(done, total);
      }));
  loaded.load_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return loaded;
}

}  // namespace ternion::launcher
