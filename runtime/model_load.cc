// Model::LoadWeights: which tensor goes where, and many threads to repack them.
#include <atomic>
#include <functional>
#include <mutex>
#include <utility>

#include "base/logging.h"
#include "base/status.h"
#include "comm/finish.h"
#include "runtime/model.h"

namespace ternion::runtime {
namespace {

using base::ExpertId;
using kernels::TernaryLayout;

// Matrices to load, in parallel. Jobs write to distinct places.
class LoadJobs {
 public:
  // What is loaded moves to the resources' memory.
  LoadJobs(const Checkpoint& checkpoint, const RankResources& resources)
      : checkpoint_(checkpoint),
        kernels_(*resources.kernels),
        executor_(*resources.executor),
        memory_(*executor_.memory),
        draws_(checkpoint.config().random_seed && kernels_.draw_ternary != nullptr) {}

  void Ternary(std::string name, int64_t rows, int64_t columns, kernels::OwnedTernaryMatrix* out,
               TernaryLayout layout = TernaryLayout::kPanels) {
    const bool lines = kernels_.skips_lines && layout != TernaryLayout::kPanels;
    jobs_.push_back([=, this, name = std::move(name)]() -> absl::Status {
      const TernaryLayout used = lines ? layout : layout_;
      TERNION_ASSIGN_OR_RETURN(
          *out, draws_ ? checkpoint_.DrawTernary(name, rows, columns, used, kernels_, executor_)
                       : checkpoint_.LoadTernary(name, rows, columns, used));
      out->MoveTo(memory_);
      return absl::OkStatus();
    });
    const TernaryLayout smaller = lines ? layout : kernels_.smaller_layout;
    bytes_ += kernels::TernaryBytes(rows, columns, lines ? layout : layout_);
    smaller_bytes_ += kernels::TernaryBytes(rows, columns, smaller);
  }
  void Dense(std::string name, int64_t rows, int64_t columns, OwnedDenseMatrix* out) {
    jobs_.push_back([=, this, name = std::move(name)]() -> absl::Status {
      TERNION_ASSIGN_OR_RETURN(*out, checkpoint_.LoadDense(name, rows, columns));
      out->MoveTo(memory_);
      return absl::OkStatus();
    });
    bytes_ += rows * columns * 2;
    smaller_bytes_ += rows * columns * 2;
  }
  void Vector(std::string name, int64_t size, base::Array<float>* out) {
    jobs_.push_back([=, this, name = std::move(name)]() -> absl::Status {
      TERNION_ASSIGN_OR_RETURN(*out, checkpoint_.LoadVector(name, size));
      out->MoveTo(memory_);
      return absl::OkStatus();
    });
  }
  // relu2 leaves many outputs of up unused and inputs of down 0: their codes need not be read.
  void Ffn(const std::string& name, int64_t hidden, int64_t intermediate,
           experts::FfnWeights* out) {
    const bool sparse = checkpoint_.config().activation == kernels::Activation::kRelu2;
    Ternary(name + ".gate_proj", intermediate, hidden, &out->gate);
    Ternary(name + ".up_proj", intermediate, hidden, &out->up,
            sparse ? TernaryLayout::kRows : TernaryLayout::kPanels);
    Ternary(name + ".down_proj", hidden, intermediate, &out->down,
            sparse ? TernaryLayout::kColumns : TernaryLayout::kPanels);
  }

  // When all jobs are there, before Run: packs weights smaller if they do not fit into `room`
  // bytes.
  void FitInto(int64_t room) {
    if (bytes_ <= room || smaller_bytes_ >= bytes_) return;
    spdlog::info(
        "weights are packed in base 3, into {} MB: at two bits they would take {} of {} MB",
        smaller_bytes_ >> 20, bytes_ >> 20, memory_.capacity_bytes() >> 20);
    layout_ = kernels_.smaller_layout;
    bytes_ = smaller_bytes_;
  }

  // Runs all jobs; the error of the first failing job in order, so that it does not depend on
  // threads.
  absl::Status Run(base::ThreadPool& threads, const LoadProgress& progress) {
    std::atomic<size_t> next{0}, done{0};
    std::mutex mutex;
    size_t first_failed = jobs_.size();
    absl::Status status;
    threads.Run([&](int thread) {
      for (size_t i; (i = next.fetch_add(1)) < jobs_.size();) {
        absl::Status result = jobs_[i]();
        const size_t finished = done.fetch_add(1) + 1;
        if (!result.ok()) {
          std::lock_guard lock(mutex);
          if (i < first_failed) status = std::move(result);
          first_failed = std::min(first_failed, i);
        }
        if (thread == 0 && progress) progress(finished, jobs_.size());
      }
    });
    TERNION_RETURN_IF_ERROR(status);
    TERNION_RETURN_IF_ERROR(comm::Finish(kernels_, executor_));  // products do not wait for draws
    if (progress) progress(jobs_.size(), jobs_.size());
    return absl::OkStatus();
  }

  int64_t bytes() const { return bytes_; }

 private:
  const Checkpoint& checkpoint_;
  const kernels::Kernels& kernels_;
  kernels::Executor& executor_;
  base::Memory& memory_;
  const bool draws_;                        // ternary weights, in memory_
  TernaryLayout layout_ = kernels_.layout;  // of all weights but those in lines
  std::vector<std::function<absl::Status()>> jobs_;
  int64_t bytes_ = 0;          // of all jobs
  int64_t smaller_bytes_ = 0;  // and in the kernels' smaller layout
};

std::string LayerName(int layer) { return absl::StrCat("model.layers.", layer); }

std::string ExpertName(int layer, int expert) {
  return absl::StrCat(LayerName(layer), ".mlp.experts.", expert);
}

// Every expert of every layer is there with the right shape, and there are no more than the config
// says.
absl::Status CheckExperts(const Checkpoint& checkpoint) {
  const ModelConfig& config = checkpoint.config();
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const int num_experts = config.has_experts(layer) ? config.num_experts : 0;
    for (int expert = 0; expert < num_experts; ++expert) {
      const std::string name = ExpertName(layer, expert);
      const int64_t inner = config.expert_intermediate;
      TERNION_RETURN_IF_ERROR(checkpoint.CheckTernary(name + ".gate_proj", inner, config.hidden));
      TERNION_RETURN_IF_ERROR(checkpoint.CheckTernary(name + ".up_proj", inner, config.hidden));
      TERNION_RETURN_IF_ERROR(checkpoint.CheckTernary(name + ".down_proj", config.hidden, inner));
    }
    const std::string beyond = ExpertName(layer, num_experts) + ".gate_proj.weight";
    if (checkpoint.tensors().Find(beyond) != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat(
          "the checkpoint holds ", beyond, ", but config.json says ",
          num_experts > 0 ? absl::StrCat("num_experts is ", num_experts)
                          : absl::StrCat("first_k_dense_replace is ", config.num_dense_layers)));
    }
  }
  return absl::OkStatus();
}

void AddAttention(const ModelConfig& config, const std::string& name, AttentionWeights& out,
                  LoadJobs& jobs) {
  jobs.Ternary(name + ".q_proj", config.q_dim(), config.hidden, &out.q);
  jobs.Ternary(name + ".k_proj", config.kv_dim(), config.hidden, &out.k);
  jobs.Ternary(name + ".v_proj", config.kv_dim(), config.hidden, &out.v);
  jobs.Ternary(name + ".o_proj", config.hidden, config.q_dim(), &out.o,
               config.act_bits == 4 ? TernaryLayout::kColumns : TernaryLayout::kPanels);
  if (config.qk_norms) {
    jobs.Vector(name + ".q_norm.weight", config.head_dim, &out.q_norm);
    jobs.Vector(name + ".k_norm.weight", config.head_dim, &out.k_norm);
  }
  if (config.sub_norms) jobs.Vector(name + ".attn_sub_norm.weight", config.q_dim(), &out.sub_norm);
}

// The dense MLP, or the shared expert; each has its own sub-norm.
void AddLocalFfn(const ModelConfig& config, const std::string& name, int64_t intermediate,
                 LayerWeights& out, LoadJobs& jobs) {
  jobs.Ffn(name, config.hidden, intermediate, &out.local_ffn);
  if (config.sub_norms) {
    jobs.Vector(name + ".ffn_sub_norm.weight", intermediate, &out.local_sub_norm);
  }
}

void Add(const kernels::OwnedTernaryMatrix& matrix, WeightSizes::Ternary& sizes) {
  sizes.weights += matrix.view.rows * matrix.view.columns;
  sizes.bytes += static_cast<int64_t>(matrix.codes.size());
}

void Add(const experts::FfnWeights& ffn, WeightSizes::Ternary& sizes) {
  for (const auto* matrix : {&ffn.gate, &ffn.up, &ffn.down}) Add(*matrix, sizes);
}

int64_t BytesOf(const OwnedDenseMatrix& matrix) {
  return static_cast<int64_t>(matrix.memory.size());
}

}  // namespace

absl::Status Model::LoadWeights(const Checkpoint& checkpoint, const LoadProgress& progress) {
  if (config_.moe()) TERNION_RETURN_IF_ERROR(CheckExperts(checkpoint));
  LoadJobs jobs(checkpoint, resources_);
  jobs.Dense("model.embed_tokens.weight", config_.vocab_size, config_.hidden, &embedding_);
  if (!config_.tied_embeddings) {
    jobs.Dense("lm_head.weight", config_.vocab_size, config_.hidden, &head_);
  }
  jobs.Vector("model.norm.weight", config_.hidden, &final_norm_);

  layers_ = std::vector<LayerWeights>(config_.num_layers);
  // Experts of this rank, in the order of their jobs; they move into their shards when all are
  // loaded.
  std::vector<std::vector<std::pair<ExpertId, experts::FfnWeights>>> local(config_.num_layers);
  for (int index = 0; index < config_.num_layers; ++index) {
    LayerWeights& layer = layers_[index];
    const std::string name = LayerName(index);
    jobs.Vector(name + ".input_layernorm.weight", config_.hidden, &layer.input_norm);
    jobs.Vector(name + ".post_attention_layernorm.weight", config_.hidden,
                &layer.post_attention_norm);
    AddAttention(config_, name + ".self_attn", layer.attention, jobs);
    if (!config_.has_experts(index)) {
      AddLocalFfn(config_, name + ".mlp", config_.dense_intermediate, layer, jobs);
      continue;
    }
    if (config_.shared_intermediate > 0) {
      AddLocalFfn(config_, name + ".mlp.shared_expert", config_.shared_intermediate, layer, jobs);
    }
    const int64_t inner = config_.expert_intermediate;
    jobs.Dense(name + ".mlp.gate.weight", config_.num_experts, config_.hidden, &layer.gate);
    if (config_.sub_norms) {
      jobs.Vector(name + ".mlp.ffn_sub_norm.weight", inner, &layer.expert_sub_norm);
    }
    const std::vector<ExpertId> experts =
        placement_->ExpertsOf(index - config_.num_dense_layers, resources_.transport->rank());
    local[index].resize(experts.size());
    num_local_experts_ += static_cast<int64_t>(experts.size());
    for (size_t i = 0; i < experts.size(); ++i) {
      local[index][i].first = experts[i];
      jobs.Ffn(ExpertName(index, base::Index(experts[i])), config_.hidden, inner,
               &local[index][i].second);
    }
  }
  jobs.FitInto(options_.room_for_weights);
  TERNION_RETURN_IF_ERROR(jobs.Run(*resources_.executor->threads, progress));
  weight_bytes_ = jobs.bytes();

  for (int index = config_.num_dense_layers; index < config_.num_layers; ++index) {
    LayerWeights& layer = layers_[index];
    const float* sub_norm = config_.sub_norms ? layer.expert_sub_norm.data() : nullptr;
    layer.moe.gate = layer.gate.view;
    layer.moe.ffn = {config_.hidden, config_.expert_intermediate, config_.activation, sub_norm,
                     config_.norm_eps};
    layer.moe.shard = experts::ExpertShard(config_.num_experts);
    for (auto& [expert, weights] : local[index]) layer.moe.shard.Set(expert, std::move(weights));
    if (UsesLocalExperts()) {
      layer.moe.tables = experts::ExpertTables::Make(layer.moe.shard, *resources_.executor->memory);
    }
  }
  return absl::OkStatus();
}

WeightSizes Model::weight_sizes() const {
  WeightSizes sizes;
  for (const LayerWeights& layer : layers_) {
    const AttentionWeights& w = layer.attention;
    for (const auto* matrix : {&w.q, &w.k, &w.v, &w.o}) Add(*matrix, sizes.attention);
    Add(layer.local_ffn, sizes.local_ffn);
    const experts::ExpertShard& shard = layer.moe.shard;
    for (int expert = 0; expert < shard.num_experts(); ++expert) {
      if (shard.Holds(ExpertId{expert})) Add(shard.at(ExpertId{expert}), sizes.experts);
    }
    sizes.gate_bytes += BytesOf(layer.gate);
  }
  sizes.embedding_bytes = BytesOf(embedding_);
  sizes.head_bytes = BytesOf(head_);
  return sizes;
}

}  // namespace ternion::runtime
