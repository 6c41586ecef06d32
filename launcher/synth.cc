#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>
#include <utility>

#include "absl/strings/str_format.h"
#include "base/checked.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "launcher/commands.h"
#include "launcher/progress.h"
#include "launcher/report.h"
#include "launcher/shapes.h"
#include "runtime/config.h"
#include "runtime/safetensors.h"
#include "runtime/utf8.h"

namespace ternion::launcher {
namespace {

using runtime::DType;
using runtime::ModelConfig;
using Entry = runtime::SafetensorsWriter::Entry;

constexpr uint64_t kShardBytes = uint64_t{4} << 30;
constexpr size_t kPieceBytes = size_t{1} << 20;

class Random {
 public:
  explicit Random(uint64_t seed) : seed_(seed) {}

  uint64_t Next() { return base::RandomBits(seed_, index_++); }
  // Roughly normal, unit variance: a sum of four 16-bit uniforms.
  float Normal() {
    const uint64_t bits = Next();
    float sum = 0;
    for (int i = 0; i < 4; ++i) sum += static_cast<float>((bits >> (16 * i)) & 0xffff) * 0x1p-16f;
    return (sum - 2.0f) * std::sqrt(3.0f);
  }

 private:
  const uint64_t seed_;
  uint64_t index_ = 0;
};

// How a tensor's bytes are drawn.
enum class Fill { kTernary, kOnes, kNormal, kScale };

struct Tensor {
  Entry entry;
  Fill fill = Fill::kOnes;
  float value = 1;  // standard deviation, or the scale itself

  uint64_t bytes() const {
    uint64_t count = runtime::DTypeBytes(entry.dtype);
    for (int64_t size : entry.shape) count *= size;
    return count;
  }
};

class TensorList {
 public:
  // A scale that keeps the variance: a third of the weights are zero, inputs are normed.
  void Ternary(const std::string& name, int64_t rows, int64_t columns) {
    const float scale = 1.0f / std::sqrt(static_cast<float>(columns) * 2.0f / 3.0f);
    Add(name + ".weight", DType::kU8, {base::CeilDiv(rows, 4), columns}, Fill::kTernary, 0);
    Add(name + ".weight_scale", DType::kF32, {1}, Fill::kScale, scale);
  }
  void Norm(const std::string& name, int64_t size) {
    Add(name + ".weight", DType::kBf16, {size}, Fill::kOnes, 1);
  }
  void Normal(const std::string& name, int64_t rows, int64_t columns, float deviation) {
    Add(name + ".weight", DType::kBf16, {rows, columns}, Fill::kNormal, deviation);
  }
  void Ffn(const std::string& name, int64_t hidden, int64_t intermediate) {
    Ternary(name + ".gate_proj", intermediate, hidden);
    Ternary(name + ".up_proj", intermediate, hidden);
    Ternary(name + ".down_proj", hidden, intermediate);
  }
  std::vector<Tensor> Take() { return std::move(tensors_); }

 private:
  void Add(std::string name, DType dtype, std::vector<int64_t> shape, Fill fill, float value) {
    tensors_.push_back({{std::move(name), dtype, std::move(shape)}, fill, value});
  }

  std::vector<Tensor> tensors_;
};

void AddFfns(const ModelConfig& config, const std::string& name, TensorList& tensors) {
  const int64_t hidden = config.hidden;
  if (!config.moe()) {
    tensors.Ffn(name, hidden, config.dense_intermediate);
    if (config.sub_norms) tensors.Norm(name + ".ffn_sub_norm", config.dense_intermediate);
    return;
  }
  tensors.Normal(name + ".gate", config.num_experts, hidden,
                 1.0f / std::sqrt(static_cast<float>(hidden)));
  if (config.sub_norms) tensors.Norm(name + ".ffn_sub_norm", config.expert_intermediate);
  for (int expert = 0; expert < config.num_experts; ++expert) {
    tensors.Ffn(absl::StrCat(name, ".experts.", expert), hidden, config.expert_intermediate);
  }
  if (config.shared_intermediate == 0) return;
  tensors.Ffn(name + ".shared_expert", hidden, config.shared_intermediate);
  if (config.sub_norms)
    tensors.Norm(name + ".shared_expert.ffn_sub_norm", config.shared_intermediate);
}

std::vector<Tensor> ListTensors(const ModelConfig& config) {
  TensorList tensors;
  tensors.Normal("model.embed_tokens", config.vocab_size, config.hidden, 1.0f);
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const std::string name = absl::StrCat("model.layers.", layer);
    const std::string attention = name + ".self_attn";
    tensors.Norm(name + ".input_layernorm", config.hidden);
    tensors.Ternary(attention + ".q_proj", config.q_dim(), config.hidden);
    tensors.Ternary(attention + ".k_proj", config.kv_dim(), config.hidden);
    tensors.Ternary(attention + ".v_proj", config.kv_dim(), config.hidden);
    tensors.Ternary(attention + ".o_proj", config.hidden, config.q_dim());
    if (config.sub_norms) tensors.Norm(attention + ".attn_sub_norm", config.q_dim());
    if (config.qk_norms) {
      tensors.Norm(attention + ".q_norm", config.head_dim);
      tensors.Norm(attention + ".k_norm", config.head_dim);
    }
    tensors.Norm(name + ".post_attention_layernorm", config.hidden);
    AddFfns(config, name + ".mlp", tensors);
  }
  tensors.Norm("model.norm", config.hidden);
  if (!config.tied_embeddings) {
    tensors.Normal("lm_head", config.vocab_size, config.hidden,
                   1.0f / std::sqrt(static_cast<float>(config.hidden)));
  }
  return tensors.Take();
}

// Bytes of four codes {0, 1, 2}: 81 of 256.
const uint8_t* TernaryBytes() {
  static const auto table = [] {
    std::array<uint8_t, 81> bytes{};
    for (int i = 0; i < 81; ++i) {
      bytes[i] = static_cast<uint8_t>(i % 3 | i / 3 % 3 << 2 | i / 9 % 3 << 4 | i / 27 << 6);
    }
    return bytes;
  }();
  return table.data();
}

uint16_t ToBf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Fills `out`, a whole number of elements of the tensor.
void FillPiece(const Tensor& tensor, Random& random, std::span<uint8_t> out) {
  if (tensor.fill == Fill::kTernary) {
    const uint8_t* bytes = TernaryBytes();
    for (size_t i = 0; i < out.size(); ++i) {
      out[i] = bytes[(random.Next() >> 32) * 81 >> 32];
    }
    return;
  }
  if (tensor.fill == Fill::kScale) {
    std::memcpy(out.data(), &tensor.value, sizeof(float));
    return;
  }
  for (size_t i = 0; i < out.size(); i += 2) {
    const float x = tensor.fill == Fill::kOnes ? 1.0f : random.Normal() * tensor.value;
    const uint16_t bits = ToBf16(x);
    std::memcpy(&out[i], &bits, 2);
  }
}

// Tensors in order, cut into files of at most kShardBytes (a larger tensor gets its own).
std::vector<std::span<const Tensor>> CutShards(std::span<const Tensor> tensors) {
  std::vector<std::span<const Tensor>> shards;
  size_t begin = 0;
  uint64_t bytes = 0;
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

absl::Status WriteShard(const std::string& path, std::span<const Tensor> tensors, Random& random,
                        const std::function<void(uint64_t)>& wrote) {
  std::vector<Entry> entries;
  for (const Tensor& tensor : tensors) entries.push_back(tensor.entry);
  TERNION_ASSIGN_OR_RETURN(runtime::SafetensorsWriter writer,
                           runtime::SafetensorsWriter::Create(path, entries));
  std::vector<uint8_t> piece(kPieceBytes);
  for (const Tensor& tensor : tensors) {
    for (uint64_t left = tensor.bytes(); left > 0;) {
      const std::span<uint8_t> out(piece.data(), std::min<uint64_t>(left, piece.size()));
      FillPiece(tensor, random, out);
      TERNION_RETURN_IF_ERROR(writer.Append(out));
      left -= out.size();
      wrote(out.size());
    }
  }
  return writer.Finish();
}

absl::Status WriteWeights(const std::string& directory, const ModelConfig& config, uint64_t seed) {
  const std::vector<Tensor> tensors = ListTensors(config);
  const std::vector<std::span<const Tensor>> shards = CutShards(tensors);
  uint64_t total = 0, done = 0;
  for (const Tensor& tensor : tensors) total += tensor.bytes();
  std::error_code error;
  const uint64_t free = std::filesystem::space(directory, error).available;
  if (!error && free < total) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the weights take ", HumanBytes(static_cast<double>(total)), "; the disk of ",
                     directory, " has ", HumanBytes(static_cast<double>(free))));
  }
  ProgressBar bar("writing " + HumanBytes(static_cast<double>(total)), true);
  Random random(seed);
  Json weight_map = Json::object();
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = shards.size() == 1 ? "model.safetensors"
                                                : absl::StrFormat("model-%05d-of-%05d.safetensors",
                                                                  i + 1, shards.size());
    for (const Tensor& tensor : shards[i]) weight_map[tensor.entry.name] = name;
    TERNION_RETURN_IF_ERROR(
        WriteShard(directory + "/" + name, shards[i], random, [&](uint64_t bytes) {
          done += bytes;
          bar.Update(static_cast<int64_t>(done), static_cast<int64_t>(total));
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
  return config;
}

absl::Status WriteModel(const std::string& directory, const Json& json, const ModelConfig& config,
                        uint64_t seed) {
  TERNION_RETURN_IF_ERROR(WriteJson(directory + "/config.json", json));
  if (config.vocab_size >= 256) {
    TERNION_RETURN_IF_ERROR(WriteJson(directory + "/tokenizer.json", ByteTokenizer()));
  }
  return WriteWeights(directory, config, seed);
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
