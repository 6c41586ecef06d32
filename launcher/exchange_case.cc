#include "launcher/exchange_case.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "base/checked.h"
#include "base/random.h"
#include "base/status.h"
#include "comm/codec.h"
#include "comm/collective.h"
#include "comm/finish.h"
#include "xxhash.h"

namespace ternion::launcher {
namespace {

using Clock = std::chrono::steady_clock;
using comm::DispatchPlan;
using comm::RowFormat;

constexpr size_t kRowsAtOnce = 64;  // that experts' stand-ins work on

double MicrosecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

comm::ExchangeOptions OptionsOf(const WireCase& wire, const ExchangeSetup& setup) {
  const experts::TraceShape& shape = setup.trace->shape;
  return {
      .dispatch = wire.dispatch,
      .combine = wire.combine,
      .presum = wire.presum,
      .act_bits = wire.dispatch == RowFormat::kInt4 ? 4 : 8,
      .hidden = setup.hidden,
      .max_rows = setup.tokens_per_rank * (wire.rows == RowSet::kOncePerExpert ? shape.top_k : 1),
      .top_k = shape.top_k,
      .num_experts = shape.num_experts};
}

// The experts of a rank's tokens, [tokens, top_k]. These are consecutive ones of the trace, which
// starts again at its end.
std::vector<int32_t> ExpertsOf(const ExchangeSetup& setup, int layer, comm::RankId self) {
  const experts::RoutingTrace& trace = *setup.trace;
  std::vector<int32_t> ids;
  for (int64_t i = 0; i < setup.tokens_per_rank; ++i) {
    const int64_t token = base::Index(self) * setup.tokens_per_rank + i;
    for (uint16_t id : trace.ExpertsOf(layer, token % trace.shape.num_tokens)) ids.push_back(id);
  }
  return ids;
}

DispatchPlan OneRowPerExpert(const DispatchPlan& plan) {
  DispatchPlan split;
  split.routes = plan.routes;
  for (size_t rank = 0; rank + 1 < plan.rank_begin.size(); ++rank) {
    split.rank_begin.push_back(static_cast<int32_t>(split.rows.size()));
    for (int32_t i = plan.rank_begin[rank]; i < plan.rank_begin[rank + 1]; ++i) {
      const DispatchPlan::Row& row = plan.rows[i];
      for (int32_t j = 0; j < row.num_routes; ++j) {
        split.rows.push_back({row.source, row.first_route + j, 1});
      }
    }
  }
  split.rank_begin.push_back(static_cast<int32_t>(split.rows.size()));
  return split;
}

DispatchPlan AllRowsToAllRanks(const DispatchPlan& plan, int32_t num_rows) {
  DispatchPlan all;
  all.routes = plan.routes;
  for (size_t rank = 0; rank + 1 < plan.rank_begin.size(); ++rank) {
    all.rank_begin.push_back(static_cast<int32_t>(all.rows.size()));
    int32_t next = plan.rank_begin[rank];
    for (int32_t source = 0; source < num_rows; ++source) {
      const bool routed = next < plan.rank_begin[rank + 1] && plan.rows[next].source == source;
      all.rows.push_back(routed ? plan.rows[next++] : DispatchPlan::Row{source, 0, 0});
    }
  }
  all.rank_begin.push_back(static_cast<int32_t>(all.rows.size()));
  return all;
}

// Factor by which a stand-in for an expert multiplies its rows.
float FactorOf(base::ExpertId expert) {
  return 1.0f / (1.5f + static_cast<float>(base::Index(expert)));
}

// out[i] = codes[i] * factor.
void Scale(const int8_t* codes, float factor, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<float>(codes[i]) * factor;
}

// The weighted sum of the row's experts, as one factor.
float FactorOf(std::span<const comm::Route> routes) {
  float factor = 0;
  for (const comm::Route& route : routes) factor += route.weight * FactorOf(route.expert);
  return factor;
}

// Leaves of rows of `dim`, on the host, what arrives of them at `format`.
void Travel(const runtime::RankResources& host, RowFormat format, int64_t dim,
            std::span<float> rows) {
  const int64_t num_rows = static_cast<int64_t>(rows.size()) / dim;
  std::vector<uint8_t> bytes(num_rows * kernels::EncodedRowBytes(format, dim));
  host.kernels->encode_rows({.x = rows.data(),
                             .out = bytes.data(),
                             .num_rows = num_rows,
                             .dim = dim,
                             .x_stride = dim,
                             .format = format},
                            *host.executor);
  host.kernels->decode_rows({.rows = bytes.data(),
                             .out = rows.data(),
                             .num_rows = num_rows,
                             .dim = dim,
                             .format = format},
                            *host.executor);
}

void Quantize(const runtime::RankResources& rank, const float* rows, int bits,
              const kernels::QuantizedRows& out) {
  rank.kernels->quantize({.x = rows, .out = out, .x_stride = out.dim, .bits = bits},
                         *rank.executor);
}

}  // namespace

std::string WireCase::Name() const {
  std::string name = absl::StrCat(comm::RowFormatName(dispatch), "/", comm::RowFormatName(combine));
  if (rows == RowSet::kOncePerExpert) absl::StrAppend(&name, ", no dedup");
  if (rows == RowSet::kToAllRanks) absl::StrAppend(&name, ", allgather");
  if (!presum) absl::StrAppend(&name, ", no pre-sum");
  if (hierarchical) absl::StrAppend(&name, ", hierarchical");
  if (all_to_all) absl::StrAppend(&name, ", alltoallv");
  if (placement != "contiguous") absl::StrAppend(&name, ", ", placement);
  return name;
}

ExchangeCase::ExchangeCase(const WireCase& wire, const experts::Placement& placement,
                           const ExchangeSetup& setup, World& world)
    : wire_(wire),
      setup_(setup),
      world_(world),
      collective_(&world.transport()),
      transport_(wire.all_to_all ? static_cast<comm::Transport&>(collective_) : world.transport()),
      exchange_(OptionsOf(wire, setup), &transport_, world.resources().kernels,
                world.resources().executor),
      rows_(setup.tokens_per_rank * setup.hidden),
      codes_(setup.tokens_per_rank, setup.hidden, *world.resources().executor->memory),
      out_(setup.tokens_per_rank * setup.hidden, *world.resources().executor->memory),
      row_codes_(world.resources().executor->staging),
      row_scales_(world.resources().executor->staging),
      gathered_(kRowsAtOnce, setup.hidden, *world.resources().executor->staging),
      host_executor_{.threads = world.resources().executor->threads},
      host_{&transport_, kernels::SelectCpuKernels(""), &host_executor_},
      host_codes_(setup.tokens_per_rank, setup.hidden),
      remote_codes_(setup.tokens_per_rank, setup.hidden),
      host_out_(world.resources().kernels->copy == nullptr ? 0 : out_.size(),
                *world.resources().executor->staging) {
  collective_.UseMemory(*world.resources().executor->staging);
  const comm::RankId self = world.transport().rank();
  const int top_k = setup.trace->shape.top_k;
  weights_.assign(setup.tokens_per_rank * top_k, 1.0f / static_cast<float>(top_k));
  if (wire.hierarchical) {
    hierarchical_ = std::make_unique<experts::HierarchicalExchange>(
        exchange_.options(), *setup.layout, placement, &transport_, world.resources().kernels,
        world.resources().executor);
  }
  for (int layer = 0; layer < setup.num_layers; ++layer) {
    ids_.push_back(ExpertsOf(setup, layer, self));
    experts::RoutingWorkspace workspace;
    AddPlan(PlanDispatch(placement, layer, self, ChoiceOf(layer), workspace));
  }
  MakeRows();
}

void ExchangeCase::MakeRows() {
  const runtime::RankResources rank = world_.resources();
  const int64_t tokens = setup_.tokens_per_rank;
  for (size_t i = 0; i < rows_.size(); ++i) {
    const uint64_t bits = base::RandomBits(base::Index(rank.transport->rank()), i) >> 40;
    rows_[i] = static_cast<float>(bits) / static_cast<float>(1 << 23) - 1.0f;
  }
  const int act_bits = exchange_.options().act_bits;
  Quantize(host_, rows_.data(), act_bits, host_codes_.rows(tokens));
  std::vector<float> arrived(rows_.data(), rows_.data() + rows_.size());
  if (wire_.dispatch == RowFormat::kBf16) Travel(host_, wire_.dispatch, setup_.hidden, arrived);
  Quantize(host_, arrived.data(), act_bits, remote_codes_.rows(tokens));
  rows_.MoveTo(*rank.executor->memory);
  Quantize(rank, rows_.data(), act_bits, codes_.rows(tokens));
}

experts::GateChoice ExchangeCase::ChoiceOf(int layer) const {
  return {ids_[layer].data(), weights_.data(), setup_.tokens_per_rank, setup_.trace->shape.top_k};
}

// `plan` sends a token once to every rank.
void ExchangeCase::AddPlan(DispatchPlan plan) {
  const int self = base::Index(world_.transport().rank());
  const auto at_home = std::span(plan.rows).subspan(
      plan.rank_begin[self], plan.rank_begin[self + 1] - plan.rank_begin[self]);
  run_.remote_visits += plan.rows.size() - at_home.size();
  run_.remote_routes += plan.routes.size();
  for (const DispatchPlan::Row& row : at_home) run_.remote_routes -= row.num_routes;
  if (wire_.rows == RowSet::kOncePerExpert) plan = OneRowPerExpert(plan);
  if (wire_.rows == RowSet::kToAllRanks) {
    plan = AllRowsToAllRanks(plan, static_cast<int32_t>(setup_.tokens_per_rank));
  }
  plans_.push_back(std::move(plan));
}

absl::Status ExchangeCase::RunExperts(const comm::ReceivedRows& received, float* outputs) {
  const auto [_, kernels, executor] = world_.resources();
  const int64_t hidden = setup_.hidden;
  std::vector<float> made;  // of the rows of one turn
  for (size_t begin = 0; begin < received.rows.size(); begin += kRowsAtOnce) {
    const auto rows = std::span(received.rows)
                          .subspan(begin, std::min(kRowsAtOnce, received.rows.size() - begin));
    row_codes_.clear();
    row_scales_.clear();
    for (const comm::ReceivedRow& row : rows) {
      row_codes_.push_back(row.codes);
      row_scales_.push_back(row.scale);
    }
    const kernels::QuantizedRows codes = gathered_.rows(static_cast<int64_t>(rows.size()));
    kernels->gather_rows({row_codes_.data(), row_scales_.data(), codes}, *executor);
    TERNION_RETURN_IF_ERROR(comm::Finish(*kernels, *executor));
    made.clear();
    for (size_t i = 0; i < rows.size(); ++i) {
      const auto routes =
          std::span(received.routes).subspan(rows[i].first_route, rows[i].num_routes);
      const auto append = [&](float factor) {
        made.resize(made.size() + hidden);
        Scale(codes.codes + i * codes.stride, codes.scales[i] * factor, hidden,
              &*(made.end() - hidden));
      };
      if (wire_.presum) append(FactorOf(routes));
      for (size_t j = 0; j < routes.size() && !wire_.presum; ++j) {
        append(FactorOf(routes[j].expert));
      }
    }
    const int64_t first = wire_.presum ? static_cast<int64_t>(begin) : rows[0].first_route;
    executor->memory->Write(made.data(), made.size() * sizeof(float), outputs + first * hidden);
  }
  return absl::OkStatus();
}

// As Exchange. The work on the way counts as dispatch.
absl::Status ExchangeCase::ExchangeByNode(int layer, bool fresh_outputs, CaseRun* run) {
  const Clock::time_point start = Clock::now();
  TERNION_RETURN_IF_ERROR(hierarchical_->DispatchSend(
      step_++, layer, ChoiceOf(layer), codes_.rows(setup_.tokens_per_rank), rows_.data()));
  const auto run_experts = [&](const comm::ReceivedRows& received, float* outputs) {
    return fresh_outputs ? RunExperts(received, outputs) : absl::OkStatus();
  };
  TERNION_RETURN_IF_ERROR(hierarchical_->RunExperts(run_experts));
  if (run != nullptr) run->dispatch_us.push_back(MicrosecondsSince(start));
  const Clock::time_point combine_start = Clock::now();
  TERNION_RETURN_IF_ERROR(hierarchical_->CombineRecv(out_.data()));
  if (run != nullptr) run->combine_us.push_back(MicrosecondsSince(combine_start));
  return absl::OkStatus();
}

absl::Status ExchangeCase::Exchange(int layer, bool fresh_outputs, CaseRun* run) {
  if (hierarchical_ != nullptr) return ExchangeByNode(layer, fresh_outputs, run);
  const Clock::time_point start = Clock::now();
  TERNION_RETURN_IF_ERROR(exchange_.DispatchSend(
      step_++, layer, plans_[layer], codes_.rows(setup_.tokens_per_rank), rows_.data()));
  if (wire_.all_to_all) TERNION_RETURN_IF_ERROR(transport_.Flush());
  TERNION_ASSIGN_OR_RETURN(const comm::ReceivedRows* received, exchange_.DispatchRecv());
  const auto [_, kernels, executor] = world_.resources();
  TERNION_RETURN_IF_ERROR(comm::Finish(*kernels, *executor));  // codes are there, unpacked
  if (run != nullptr) run->dispatch_us.push_back(MicrosecondsSince(start));
  if (received != nullptr && fresh_outputs) {
    const size_t count = wire_.presum ? received->rows.size() : received->routes.size();
    const size_t floats = count * setup_.hidden;
    if (outputs_.size() < floats) outputs_ = base::Array<float>(floats, *executor->memory);
    TERNION_RETURN_IF_ERROR(RunExperts(*received, outputs_.data()));
  }
  const Clock::time_point combine_start = Clock::now();
  if (received != nullptr) {
    TERNION_RETURN_IF_ERROR(exchange_.CombineSend(outputs_.data()));
    TERNION_RETURN_IF_ERROR(exchange_.DispatchRecv().status());
  }
  if (wire_.all_to_all) TERNION_RETURN_IF_ERROR(transport_.Flush());
  TERNION_RETURN_IF_ERROR(exchange_.CombineRecv(out_.data()));
  if (run != nullptr) run->combine_us.push_back(MicrosecondsSince(combine_start));
  return absl::OkStatus();
}

// What is added onto own rows: by row, in the order of the sum.
std::vector<ExchangeCase::Summand> ExchangeCase::SummandsOf(const DispatchPlan& plan) const {
  std::vector<Summand> summands;
  for (int rank = 0; rank + 1 < static_cast<int>(plan.rank_begin.size()); ++rank) {
    const int place = wire_.hierarchical ? setup_.layout->node_of[rank] : rank;
    for (int32_t i = plan.rank_begin[rank]; i < plan.rank_begin[rank + 1]; ++i) {
      const DispatchPlan::Row& row = plan.rows[i];
      const auto routes = std::span(plan.routes).subspan(row.first_route, row.num_routes);
      if (wire_.presum) summands.push_back({row.source, place, place, FactorOf(routes), 1});
      for (size_t j = 0; j < routes.size() && !wire_.presum; ++j) {
        summands.push_back({row.source, base::Index(routes[j].expert), place,
                            FactorOf(routes[j].expert), routes[j].weight});
      }
    }
  }
  std::stable_sort(summands.begin(), summands.end(), [](const Summand& a, const Summand& b) {
    return std::tie(a.source, a.order) < std::tie(b.source, b.order);
  });
  return summands;
}

// The sums of own rows, computed here.
std::vector<float> ExchangeCase::Expected(int layer) {
  const int64_t hidden = setup_.hidden;
  const int self = base::Index(world_.transport().rank());
  const int home = wire_.hierarchical ? setup_.layout->node_of[self] : self;
  std::vector<float> out(out_.size()), one(hidden), term(hidden);
  const std::vector<Summand> summands = SummandsOf(plans_[layer]);
  for (size_t i = 0; i < summands.size(); ++i) {
    const Summand& summand = summands[i];
    const bool at_home = summand.place == home;
    const kernels::QuantizedRows codes =
        (at_home ? host_codes_ : remote_codes_).rows(setup_.tokens_per_rank);
    Scale(codes.codes + summand.source * codes.stride,
          codes.scales[summand.source] * summand.factor, hidden, one.data());
    // The ranks of a node add up before they return.
    const auto joins = [&](size_t a, size_t b) {
      return wire_.hierarchical && b < summands.size() &&
             summands[a].source == summands[b].source && summands[a].place == summands[b].place;
    };
    for (int64_t j = 0; j < hidden; ++j) {
      term[j] = i > 0 && joins(i - 1, i) ? term[j] + one[j] : one[j];
    }
    if (joins(i, i + 1)) continue;
    if (!at_home) Travel(host_, wire_.combine, hidden, term);
    float* const sum = &out[summand.source * hidden];
    for (int64_t j = 0; j < hidden; ++j) sum[j] += summand.weight * term[j];
  }
  return out;
}

// Since the traffic was last reset.
LayerBytes ExchangeCase::SentBytes() const {
  LayerBytes bytes;
  for (int rank = 0; rank < transport_.size(); ++rank) {
    const auto sent = [&](comm::Phase phase) {
      return transport_.traffic()
          .at(comm::Direction::kSent, phase, base::RankId{rank})
          .message_bytes;
    };
    bytes.dispatch.push_back(sent(comm::Phase::kDispatch));
    bytes.combine.push_back(sent(comm::Phase::kCombine));
  }
  return bytes;
}

// out_, where the host may read it.
absl::StatusOr<const float*> ExchangeCase::SumsOnHost() {
  const auto [_, kernels, executor] = world_.resources();
  if (host_out_.size() == 0) return out_.data();
  const int64_t bytes = static_cast<int64_t>(out_.size() * sizeof(float));
  kernels->copy({out_.data(), host_out_.data(), bytes}, *executor);
  TERNION_RETURN_IF_ERROR(comm::Finish(*kernels, *executor));
  return host_out_.data();
}

absl::StatusOr<ExchangeCase::Round> ExchangeCase::Verify() {
  const auto [_, kernels, executor] = world_.resources();
  const int64_t count = static_cast<int64_t>(out_.size());
  Round round;
  for (int layer = 0; layer < setup_.num_layers; ++layer) {
    kernels->zero({out_.data(), count}, *executor);
    transport_.traffic().Reset();
    TERNION_RETURN_IF_ERROR(Exchange(layer, /*fresh_outputs=*/true, nullptr));
    round.layer_bytes.push_back(SentBytes());
    const std::vector<float> expected = Expected(layer);
    TERNION_ASSIGN_OR_RETURN(const float* sums, SumsOnHost());
    round.equal = round.equal && std::equal(expected.begin(), expected.end(), sums);
    round.output_hash = XXH3_64bits_withSeed(sums, count * sizeof(float), round.output_hash);
  }
  return round;
}

// As many exchanges as fit into `seconds`, by what a few of them take on rank 0; they warm up, too.
absl::StatusOr<int> ExchangeCase::ChooseIterations(double seconds) {
  constexpr int kTrials = 4;
  const Clock::time_point start = Clock::now();
  for (int i = 0; i < kTrials; ++i) {
    TERNION_RETURN_IF_ERROR(Exchange(i % setup_.num_layers, /*fresh_outputs=*/false, nullptr));
  }
  const double each = MicrosecondsSince(start) * 1e-6 / kTrials;
  const int wanted =
      static_cast<int>(std::clamp(seconds / each, double{kMinIterations}, double{kMaxIterations}));
  // Whole rounds over the layers, so that bytes per layer are those of the trace.
  const int rounds = static_cast<int>(base::CeilDiv(wanted, setup_.num_layers));
  TERNION_ASSIGN_OR_RETURN(const std::string chosen,
                           comm::Broadcast(world_.transport(), absl::StrCat(rounds)));
  return std::atoi(chosen.c_str()) * setup_.num_layers;
}

absl::Status ExchangeCase::Time(int iterations, CaseRun* run) {
  // Nothing of before is under way.
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world_.transport(), absl::OkStatus()));
  transport_.traffic().Reset();
  const NicCount before = CountNic(setup_.interfaces);
  for (int i = 0; i < iterations; ++i) {
    // Together again: one rank's delay is not another's wait in the next exchange.
    TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world_.transport(), absl::OkStatus()));
    TERNION_RETURN_IF_ERROR(Exchange(i % setup_.num_layers, /*fresh_outputs=*/false, run));
  }
  if (!wire_.all_to_all) TERNION_RETURN_IF_ERROR(transport_.Flush());
  run->traffic = transport_.traffic();
  TERNION_RETURN_IF_ERROR(
      comm::AgreeOnStatus(world_.transport(), absl::OkStatus()));  // all arrived
  const NicCount after = CountNic(setup_.interfaces);
  // Nobody sends on before all nodes have counted.
  TERNION_RETURN_IF_ERROR(comm::AgreeOnStatus(world_.transport(), absl::OkStatus()));
  run->nic = {after.sent_bytes - before.sent_bytes, after.received_bytes - before.received_bytes};
  return absl::OkStatus();
}

absl::StatusOr<CaseRun> ExchangeCase::Run(double seconds) {
  CaseRun run = run_;
  TERNION_ASSIGN_OR_RETURN(const Round before, Verify());
  TERNION_ASSIGN_OR_RETURN(const int iterations, ChooseIterations(seconds));
  TERNION_RETURN_IF_ERROR(Time(iterations, &run));
  TERNION_ASSIGN_OR_RETURN(const Round after, Verify());
  run.verified = before.equal && after.equal && before.output_hash == after.output_hash;
  run.output_hash = before.output_hash;
  run.layer_bytes = before.layer_bytes;
  return run;
}

}  // namespace ternion::launcher
