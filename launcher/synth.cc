#include <cstdio>
#include <filesystem>
#include <functional>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/file.h"
#include "base/status.h"
#include "launcher/commands.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "launcher/shapes.h"
#include "runtime/config.h"
#include "runtime/random_weights.h"
#include "runtime/safetensors.h"
#include "runtime/utf8.h"

namespace ternion::launcher {
namespace {

using runtime::ModelConfig;
using runtime::RandomTensor;
using Entry = runtime::SafetensorsWriter::Entry;

constexpr int64_t kShardBytes = int64_t{4} << 30;
constexpr int64_t kPieceBytes = int64_t{1} << 20;

// Tensors in order, cut into files of at most kShardBytes (a larger tensor gets its own).
std::vector<std::span<const RandomTensor>> CutShards(std::span<const RandomTensor> tensors) {
  std::vector<std::span<const RandomTensor>> shards;
  size_t begin = 0;
  int64_t bytes = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (i > begin && bytes + tensors[i].bytes() > kShardBytes) {
      shards.push_back(tensors.subspan(begin, i - begin));
      begin = i;
      bytes = 0;
    }
    bytes += tensors[i].bytes();
  }
  shards.push_back(tensors.subspan(begin));
  return shards;
}

absl::Status WriteShard(const std::string& path, std::span<const RandomTensor> tensors,
                        uint64_t seed, const std::function<void(int64_t)>& wrote) {
  std::vector<Entry> entries;
  for (const RandomTensor& tensor : tensors) entries.push_back(tensor.entry);
  TERNION_ASSIGN_OR_RETURN(runtime::SafetensorsWriter writer,
                           runtime::SafetensorsWriter::Create(path, entries));
  std::vector<uint8_t> piece(kPieceBytes);
  for (const RandomTensor& tensor : tensors) {
    for (int64_t begin = 0; begin < tensor.bytes(); begin += kPieceBytes) {
      const std::span<uint8_t> out(piece.data(), std::min(tensor.bytes() - begin, kPieceBytes));
      tensor.Draw(seed, begin, out);
      TERNION_RETURN_IF_ERROR(writer.Append(out));
      wrote(static_cast<int64_t>(out.size()));
    }
  }
  return writer.Finish();
}

absl::Status WriteWeights(const std::string& directory, const ModelConfig& config, uint64_t seed) {
  const std::vector<RandomTensor> tensors = runtime::RandomTensors(config);
  const std::vector<std::span<const RandomTensor>> shards = CutShards(tensors);
  int64_t total = 0, done = 0;
  for (const RandomTensor& tensor : tensors) total += tensor.bytes();
  std::error_code error;
  const int64_t free = std::filesystem::space(directory, error).available;
  if (!error && free < total) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the weights take ", HumanBytes(static_cast<double>(total)), "; the disk of ",
                     directory, " has ", HumanBytes(static_cast<double>(free))));
  }
  ProgressBar bar("writing " + HumanBytes(static_cast<double>(total)), true);
  Json weight_map = Json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? "model.safetensors"
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  i + 1, shards.size());
    for (const RandomTensor& tensor : shards[i]) weight_map[tensor.entry.name] = name;
    TERNION_RETURN_IF_ERROR(WriteShard(directory + "/" + name, shards[i], seed, [&](int64_t bytes) {
      done += bytes;
      bar.Update(done, total);
    }));
  }
  if (shards.size() == 1) return absl::OkStatus();
  return WriteJson(directory + "/model.safetensors.index.json",
                   {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}});
}

// A tokenizer whose tokens are the 256 bytes: random weights need no better one. The stand-in
// characters of byte-level BPE: printable Latin-1 stands for itself, the rest for U+0100 and on.
Json ByteTokenizer() {
  Json vocab = Json::object();
  int next_stand_in = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= '!' && byte <= '~') || (byte >= 0xa1 && byte <= 0xac) || byte >= 0xae;
    const int c = printable ? byte : next_stand_in++;
    std::string stand_in;
    runtime::AppendCodePoint(c, &stand_in);
    vocab[stand_in] = byte;
  }
  const Json byte_level = {{"type", "ByteLevel"},
                           {"add_prefix_space", false},
                           {"trim_offsets", true},
                           {"use_regex", true}};
  return {{"version", "1.0"},
          {"added_tokens", Json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", byte_level},
          {"post_processor", nullptr},
          {"decoder", byte_level},
          {"model", {{"type", "BPE"}, {"vocab", std::move(vocab)}, {"merges", Json::array()}}}};
}

// The config to write: what was asked for, with packed weights.
absl::StatusOr<Json> ReadConfig(const SynthOptions& options) {
  if (options.config.empty() == options.shape.empty()) {
    return absl::InvalidArgumentError("synth needs either --config or --shape");
  }
  Json config;
  if (!options.shape.empty()) {
    TERNION_ASSIGN_OR_RETURN(config, ShapeConfig(options.shape));
  } else {
    TERNION_ASSIGN_OR_RETURN(const std::string text, base::ReadFile(options.config));
    config = Json::parse(text, nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) {
      return absl::InvalidArgumentError(options.config + " is not a JSON object");
    }
  }
  config["quantization_config"] = {{"quant_method", "bitnet"},
                                   {"linear_class", "autobitlinear"},
                                   {"quantization_mode", "offline"},
                                   {"modules_to_not_convert", {"lm_head", "gate"}}};
  if (options.seed_only) config["random_weights_seed"] = options.seed;
  return config;
}

absl::Status WriteModel(const std::string& directory, const Json& json, const ModelConfig& config,
                        uint64_t seed) {
  TERNION_RETURN_IF_ERROR(WriteJson(directory + "/config.json", json));
  if (config.vocab_size >= 256) {
    TERNION_RETURN_IF_ERROR(WriteJson(directory + "/tokenizer.json", ByteTokenizer()));
  }
  return config.random_seed ? absl::OkStatus() : WriteWeights(directory, config, seed);
}

}  // namespace

absl::Status Synth(const SynthOptions& options) {
  TERNION_ASSIGN_OR_RETURN(const Json json, ReadConfig(options));
  TERNION_ASSIGN_OR_RETURN(const ModelConfig config, runtime::ParseModelConfig(json.dump()));
  if (options.out.empty()) return absl::InvalidArgumentError("--out is empty");
  std::error_code error;
  if (std::filesystem::exists(options.out, error)) {
    return absl::AlreadyExistsError(absl::StrCat("--out ", options.out, " exists already"));
  }
  // Written under another name and renamed at the end: a model directory is whole or not there.
  const std::string partial = options.out + ".partial";
  std::filesystem::remove_all(partial, error);
  if (!std::filesystem::create_directories(partial, error)) {
    return absl::InvalidArgumentError(
        absl::StrCat("cannot create ", partial, ": ", error.message()));
  }
  absl::Status status = WriteModel(partial, json, config, options.seed);
  if (status.ok()) {
    std::filesystem::rename(partial, options.out, error);
    if (error)
      status = absl::InvalidArgumentError(absl::StrCat(options.out, ": ", error.message()));
  }
  if (!status.ok()) std::filesystem::remove_all(partial, error);
  TERNION_RETURN_IF_ERROR(status);
  std::printf("wrote %s\n", options.out.c_str());
  return absl::OkStatus();
}

}  // namespace ternion::launcher
