// The subcommands: options in, status out. Each runs on every rank of `world`.
#pragma once

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "launcher/engine_flags.h"
#include "launcher/world.h"

namespace ternion::launcher {

struct RunOptions {
  EngineFlags engine;
  std::string prompt;
  std::string prompt_file;   // one prompt per line
  bool interactive = false;  // prompts from the terminal
  int max_tokens = 128;
  runtime::SamplingParams sampling;
  std::string json;
};
// Generates from prompts; text streams to stdout.
absl::Status Run(const RunOptions& options, World& world);

struct EvalOptions {
  EngineFlags engine;
  std::string ids_file;      // JSON array of token ids, with logits_out
  std::string logits_out;    // .npy, float32 [tokens, vocab]
  std::string text;          // UTF-8 file to score
  bool ladder = false;       // with text: every wire and KV precision (ladder.h)
  std::string record_trace;  // with text: routing trace to write
  std::string json;
};
// Logits of given ids, or bits per byte and perplexity of a text, and its routing trace.
absl::Status Eval(const EvalOptions& options, World& world);

struct InspectOptions {
  std::string model;
};
// Prints what a checkpoint holds. One process.
absl::Status Inspect(const InspectOptions& options);

struct SynthOptions {
  std::string config;  // path of a config.json
  std::string shape;   // or a name, see shapes.h
  std::string out;     // directory to create
  uint64_t seed = 0;
  bool seed_only = false;  // no weights: whoever loads the model draws them
};
// Writes a packed random-weight model. One process.
absl::Status Synth(const SynthOptions& options);

}  // namespace ternion::launcher
