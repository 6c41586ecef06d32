// The `ternion` command: flags in, exit code out.
#include <cstdio>
#include <exception>
#include <functional>
#include <string>

#include "CLI/CLI.hpp"
#include "absl/strings/str_join.h"
#include "base/logging.h"
#include "base/status.h"
#include "comm/collective.h"
#include "launcher/bench_decode.h"
#include "launcher/bench_exchange.h"
#include "launcher/bench_kernels.h"
#include "launcher/commands.h"
#include "launcher/shapes.h"
#include "launcher/world.h"

namespace ternion::launcher {
namespace {

constexpr int kExitError = 1;
constexpr int kExitUsage = 2;

void PrintError(const absl::Status& status) {
  std::fprintf(stderr, "ternion: error: %s\n", std::string(status.message()).c_str());
}

// What libraries throw, as a status: the other ranks must hear of it.
absl::Status WithoutExceptions(const std::function<absl::Status()>& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

// Runs `body` on this rank. An error that only this rank has is printed by it, and ends the others.
// One that all ranks agree on is rank 0's to tell: the others leave with 0, since mpirun ends the
// job at the first exit code that is not, perhaps before rank 0 has printed.
int RunInWorld(const WorldOptions& options, const std::function<absl::Status(World&)>& body) {
  absl::StatusOr<std::unique_ptr<World>> world = World::Create(options);
  const absl::Status status =
      world.ok() ? WithoutExceptions([&] { return body(**world); }) : world.status();
  if (status.ok()) return 0;
  if (comm::IsAgreed(status)) {
    if (RankFromEnvironment() != 0) return 0;
    PrintError(status);
    return kExitError;
  }
  PrintError(base::Annotate(status, absl::StrCat("rank ", RankFromEnvironment())));
  if (world.ok()) (*world)->transport().Abort(status);
  return kExitError;
}

// Commands of one process: under mpirun, rank 0 does the work.
int RunAlone(const std::function<absl::Status()>& body) {
  if (RankFromEnvironment() != 0) return 0;
  const absl::Status status = WithoutExceptions(body);
  if (status.ok()) return 0;
  PrintError(status);
  return kExitError;
}

void AddRun(CLI::App& app, RunOptions& options) {
  CLI::App* command = app.add_subcommand("run", "Generate text from prompts");
  AddEngineFlags(*command, options.engine);
  CLI::Option_group* source = command->add_option_group("prompt");
  source->add_option("--prompt", options.prompt, "The prompt");
  source->add_option("--prompt-file", options.prompt_file,
                     "A file with one prompt per line; they run as one batch");
  source->add_flag("-i,--interactive", options.interactive, "Read prompts from the terminal");
  source->require_option(1);
  command->add_option("--max-tokens", options.max_tokens, "Tokens to generate per prompt, at most")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--temperature", options.sampling.temperature, "0: greedy")
      ->check(CLI::Range(0.0, 100.0))
      ->capture_default_str();
  command
      ->add_option("--top-k", options.sampling.top_k, "Sample from the k likeliest tokens; 0: all")
      ->check(CLI::Range(0, 1 << 22))
      ->capture_default_str();
  command
      ->add_option("--top-p", options.sampling.top_p,
                   "Sample from the likeliest tokens of this mass")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str();
  command->add_option("--seed", options.sampling.seed, "Seed of sampling")->capture_default_str();
  command->add_option("--json", options.json,
                      "Write tokens, rates, hashes and traffic to this file");
}

void AddEval(CLI::App& app, EvalOptions& options) {
  CLI::App* command = app.add_subcommand(
      "eval", "Logits of given token ids, or bits per byte and perplexity of a text");
  options.engine.micro_batches = "1";  // the messages it counts are the same in each run
  AddEngineFlags(*command, options.engine);
  CLI::Option_group* source = command->add_option_group("input");
  source->add_option("--ids-file", options.ids_file, "JSON array of token ids");
  source->add_option("--text", options.text, "UTF-8 text to score");
  source->require_option(1);
  command->add_option("--logits-out", options.logits_out,
                      "With --ids-file: .npy to write, float32 [tokens, vocabulary]");
  command->add_flag("--ladder", options.ladder,
                    "With --text: walk the precisions of the wire and the KV cache, and compare "
                    "each with the exact wire");
  command->add_option("--record-trace", options.record_trace,
                      "With --text: write which experts each token takes to this file; runs with "
                      "--wire exact, so that it does not depend on ranks");
  command->add_option("--json", options.json, "With --text: write the figures to this file");
}

void AddBenchKernels(CLI::App& bench, BenchKernelsOptions& options) {
  CLI::App* command = bench.add_subcommand("kernels", "Ternary matrix products");
  command->add_option("--device", options.device, "Where kernels run")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--threads", options.num_threads, "Threads (default: all cores)")
      ->check(CLI::Range(1, 1024));
  command->add_option("--cublas", options.cublas,
                      "With --device cuda: the library whose bf16 products stand beside ours "
                      "(default: libcublas.so.13 or .12, where the loader finds one)");
  command->add_option("--json", options.json_path, "Write the figures to this file");
}

void AddBenchExchange(CLI::App& bench, BenchExchangeOptions& options) {
  CLI::App* command = bench.add_subcommand(
      "exchange", "Bytes and time of a layer's activation exchange, wire by wire");
  command->add_option("--shape", options.shape,
                      "Sizes of a public model, one of " + absl::StrJoin(ShapeNames(), ", "));
  command->add_option("--hidden", options.hidden, "Elements of a row")
      ->check(CLI::Range(1, 1 << 24));
  command->add_option("--experts", options.experts, "Experts")->check(CLI::Range(1, 1 << 16));
  command->add_option("--top-k", options.top_k, "Experts per token")->check(CLI::Range(1, 255));
  CLI::Option* trace = command->add_option(
      "--trace", options.trace, "Routing as recorded by eval --record-trace; else synthetic");
  command->add_option("--routing", options.routing, "Synthetic routing")
      ->check(CLI::IsMember({"uniform", "zipf"}))
      ->excludes(trace)
      ->capture_default_str();
  command->add_option("--zipf", options.zipf_exponent, "Exponent of zipf routing")
      ->check(CLI::Range(0.0, 8.0))
      ->capture_default_str();
  command->add_option("--seed", options.seed, "Seed of synthetic routing")->capture_default_str();
  command->add_option("--save-trace", options.save_trace, "Write the routing, for --trace");
  command->add_option("--tokens", options.tokens, "Tokens per rank, a table for each")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--seconds", options.seconds, "Time spent on each line")
      ->check(CLI::Range(0.0, 3600.0))
      ->capture_default_str();
  command->add_option("--ladder", options.ladders,
                      "JSON of eval --ladder: what a wire costs in bits per byte");
  command->add_option("--json", options.json, "Write everything to this file");
  command->add_option(
      "--matrix", options.matrix,
      "CSV for an alltoallv benchmark: bytes of int4/int4 from each rank (line) to each (column), "
      "as fractions of the most");
  AddWorldFlags(*command, options.world);
}

void AddBenchDecode(CLI::App& bench, BenchDecodeOptions& options) {
  CLI::App* command = bench.add_subcommand(
      "decode", "Tokens per second of a model (ternion synth makes one) beside what memory allows");
  AddEngineFlags(*command, options.engine);
  command
      ->add_option("--batch", options.batches,
                   "Sequences that generate together, on all ranks; a line for each")
      ->delimiter(',')
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--prompt-tokens", options.prompt_tokens, "Random tokens before each")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--tokens", options.tokens, "Tokens of each sequence that are timed")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->capture_default_str();
  command->add_option("--seed", options.seed, "Seed of the prompts")->capture_default_str();
  command->add_option("--json", options.json, "Write the figures to this file");
}

void AddInspect(CLI::App& app, InspectOptions& options) {
  CLI::App* command = app.add_subcommand("inspect", "What a checkpoint holds, tensor by tensor");
  command->add_option("--model", options.model, "Model directory")->required();
}

void AddSynth(CLI::App& app, SynthOptions& options) {
  CLI::App* command = app.add_subcommand("synth", "Write a packed random-weight model");
  CLI::Option_group* source = command->add_option_group("shape");
  source->add_option("--config", options.config, "A config.json");
  source->add_option("--shape", options.shape, "One of " + absl::StrJoin(ShapeNames(), ", "));
  source->require_option(1);
  command->add_option("--seed", options.seed, "Seed of the weights")
      ->check(CLI::Range(uint64_t{0}, uint64_t{1} << 53))
      ->capture_default_str();
  command->add_flag("--seed-only", options.seed_only,
                    "Write no weights: whoever loads the model draws the same ones from the seed, "
                    "straight into memory");
  command->add_option("--out", options.out, "Directory to create")->required();
}

// CLI11's verdict on the command line. Every rank sees the same one; rank 0 tells it.
int ExitWithUsage(CLI::App& app, const CLI::ParseError& error) {
  if (RankFromEnvironment() != 0) return 0;
  if (error.get_exit_code() == 0) return app.exit(error);  // --help, --version
  std::fprintf(stderr, "ternion: error: %s (see ternion --help)\n", error.what());
  return kExitUsage;
}

int Main(int argc, char** argv) {
  CLI::App app("Ternion: distributed Mixture-of-Experts inference for ternary models", "ternion");
  app.set_version_flag("--version", TERNION_VERSION);
  app.require_subcommand(0, 1);  // none: see below; CLI11's own check would hide a misspelt one
  RunOptions run;
  EvalOptions eval;
  BenchKernelsOptions bench_kernels;
  BenchExchangeOptions bench_exchange;
  BenchDecodeOptions bench_decode;
  InspectOptions inspect;
  SynthOptions synth;
  AddRun(app, run);
  AddEval(app, eval);
  CLI::App* bench = app.add_subcommand("bench", "Measure, beside what this machine can do at best");
  bench->require_subcommand(1);
  AddBenchKernels(*bench, bench_kernels);
  AddBenchExchange(*bench, bench_exchange);
  AddBenchDecode(*bench, bench_decode);
  AddInspect(app, inspect);
  AddSynth(app, synth);
  try {
    app.parse(argc, argv);
    if (app.get_subcommands().empty()) throw CLI::RequiredError("A subcommand");
  } catch (const CLI::ParseError& error) {
    return ExitWithUsage(app, error);
  }
  if (app.got_subcommand("run")) {
    return RunInWorld(run.engine.world, [&](World& world) { return Run(run, world); });
  }
  if (app.got_subcommand("eval")) {
    return RunInWorld(eval.engine.world, [&](World& world) { return Eval(eval, world); });
  }
  if (bench->got_subcommand("kernels"))
    return RunAlone([&] { return BenchKernels(bench_kernels); });
  if (bench->got_subcommand("exchange")) {
    return RunInWorld(bench_exchange.world,
                      [&](World& world) { return BenchExchange(bench_exchange, world); });
  }
  if (bench->got_subcommand("decode")) {
    return RunInWorld(bench_decode.engine.world,
                      [&](World& world) { return BenchDecode(bench_decode, world); });
  }
  if (app.got_subcommand("inspect")) return RunAlone([&] { return Inspect(inspect); });
  return RunAlone([&] { return Synth(synth); });
}

}  // namespace
}  // namespace ternion::launcher

int main(int argc, char** argv) {
  const int rank = ternion::launcher::RankFromEnvironment();
  ternion::base::InitLogging(rank > 0 ? absl::StrCat("rank ", rank) : "");
  return ternion::launcher::Main(argc, argv);
}
