#include "experts/trace.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>

#include "base/checked.h"
#include "base/file.h"
#include "base/random.h"
#include "base/status.h"
#include "xxhash.h"

namespace ternion::experts {
namespace {

static_assert(std::endian::native == std::endian::little, "files hold values as memory does");

constexpr char kMagic[8] = {'T', 'R', 'N', 'T', 'R', 'A', 'C', 'E'};
constexpr uint32_t kVersion = 1;
constexpr int kMaxExperts = 1 << 16;
constexpr int kMaxLayers = 1 << 20;
constexpr int64_t kMaxTokens = (int64_t{1} << 31) - 1;
constexpr double kMaxZipfExponent = 8;

// What is hashed besides the ids.
struct FileCounts {
  uint32_t num_layers = 0;
  uint32_t num_experts = 0;
  uint32_t top_k = 0;
  uint32_t zero = 0;
  uint64_t num_tokens = 0;
};

// The first bytes of a file; ids follow (docs/trace.md).
struct FileHeader {
  char magic[8];
  uint32_t version = kVersion;
  uint32_t zero = 0;
  FileCounts counts;
  uint64_t checksum = 0;  // RoutingTrace::Hash
};
static_assert(sizeof(FileHeader) == 48);

FileCounts CountsOf(const TraceShape& shape) {
  return {static_cast<uint32_t>(shape.num_layers), static_cast<uint32_t>(shape.num_experts),
          static_cast<uint32_t>(shape.top_k), 0, static_cast<uint64_t>(shape.num_tokens)};
}

absl::Status CheckRange(absl::string_view field, uint64_t value, uint64_t most) {
  if (value >= 1 && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", value, "; it must be 1 to ", most));
}

// The number of ids, when all counts make sense and their bytes can be addressed.
absl::StatusOr<size_t> CheckCounts(const FileCounts& counts) {
  TERNION_RETURN_IF_ERROR(CheckRange("num_layers", counts.num_layers, kMaxLayers));
  TERNION_RETURN_IF_ERROR(CheckRange("num_tokens", counts.num_tokens, kMaxTokens));
  TERNION_RETURN_IF_ERROR(CheckRange("num_experts", counts.num_experts, kMaxExperts));
  TERNION_RETURN_IF_ERROR(CheckRange("top_k", counts.top_k, counts.num_experts));
  const uint64_t factors[] = {counts.num_layers, counts.num_tokens, counts.top_k};
  const auto num_ids = base::CheckedProduct(factors);
  if (!num_ids || *num_ids > std::numeric_limits<int64_t>::max() / sizeof(uint16_t)) {
    return absl::InvalidArgumentError("num_layers, num_tokens and top_k: too many ids for memory");
  }
  return static_cast<size_t>(*num_ids);
}

absl::Status CheckIds(const RoutingTrace& trace) {
  const TraceShape& shape = trace.shape;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      const std::span<const uint16_t> ids = trace.ExpertsOf(layer, token);
      const bool ascending =
          std::adjacent_find(ids.begin(), ids.end(), std::greater_equal<>()) == ids.end();
      if (!ascending || ids.back() >= shape.num_experts) {
        return absl::InvalidArgumentError(absl::StrCat("ids of layer ", layer, ", token ", token,
                                                       " do not ascend below ", shape.num_experts));
      }
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RoutingTrace> ParseTrace(std::span<const uint8_t> bytes) {
  FileHeader header;
  if (bytes.size() < sizeof(header) || std::memcmp(bytes.data(), kMagic, sizeof(kMagic)) != 0) {
    return absl::InvalidArgumentError("magic: this is no routing trace");
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  const FileCounts& counts = header.counts;
  if (header.version != kVersion) {
    return absl::InvalidArgumentError(
        absl::StrCat("version is ", header.version, "; this program reads ", kVersion));
  }
  if (header.zero != 0 || counts.zero != 0) {
    return absl::InvalidArgumentError("reserved bytes are not zero");
  }
  TERNION_ASSIGN_OR_RETURN(const size_t num_ids, CheckCounts(counts));
  const std::span<const uint8_t> ids = bytes.subspan(sizeof(header));
  if (ids.size() != num_ids * sizeof(uint16_t)) {
    return absl::InvalidArgumentError(
        absl::StrCat("ids have ", ids.size(), " bytes instead of ", num_ids * sizeof(uint16_t)));
  }
  RoutingTrace trace;
  trace.shape = {static_cast<int>(counts.num_layers), static_cast<int64_t>(counts.num_tokens),
                 static_cast<int>(counts.num_experts), static_cast<int>(counts.top_k)};
  trace.ids.resize(num_ids);
  std::memcpy(trace.ids.data(), ids.data(), ids.size());
  if (trace.Hash() != header.checksum) {
    return absl::DataLossError("checksum does not match counts and ids");
  }
  TERNION_RETURN_IF_ERROR(CheckIds(trace));
  return trace;
}

// base^-exponent, exponent to 16 binary places. Only correctly rounded operations: the same bits
// wherever it runs, unlike std::pow.
double NegativePower(double base, double exponent) {
  const uint32_t bits = static_cast<uint32_t>(std::lround(exponent * 65536));
  double power = 1, root = base;
  for (uint32_t i = 0; i < bits >> 16; ++i) power *= base;
  for (uint32_t bit = 1u << 15; bit != 0; bit >>= 1) {
    root = std::sqrt(root);
    if (bits & bit) power *= root;
  }
  return 1 / power;
}

// Draws experts of one layer by popularity, without replacement.
class Popularity {
 public:
  Popularity(uint64_t seed, std::span<const uint64_t> weights) : seed_(seed) {
    const int num_experts = static_cast<int>(weights.size());
    expert_.resize(num_experts);
    std::iota(expert_.begin(), expert_.end(), 0);
    for (int i = num_experts - 1; i > 0; --i) std::swap(expert_[i], expert_[NextBelow(i + 1)]);
    begin_.assign(1, 0);
    for (uint64_t weight : weights) begin_.push_back(begin_.back() + weight);
  }

  // Fills `ids` with distinct experts, ascending.
  void Draw(std::span<uint16_t> ids) {
    places_.clear();
    uint64_t left = begin_.back();
    for (uint16_t& id : ids) {
      // A number among those of the experts not yet taken: skip the taken ones before it.
      uint64_t number = NextBelow(left);
      auto taken = places_.begin();
      for (; taken != places_.end() && number >= begin_[*taken]; ++taken) number += Weight(*taken);
      const int place = static_cast<int>(std::upper_bound(begin_.begin(), begin_.end(), number) -
                                         begin_.begin()) -
                        1;
      places_.insert(taken, place);
      left -= Weight(place);
      id = expert_[place];
    }
    std::sort(ids.begin(), ids.end());
  }

 private:
  uint64_t Weight(int place) const { return begin_[place + 1] - begin_[place]; }
  uint64_t NextBelow(uint64_t bound) {
    using Wide = unsigned __int128;
    return static_cast<uint64_t>((Wide{base::RandomBits(seed_, next_++)} * bound) >> 64);
  }

  const uint64_t seed_;
  uint64_t next_ = 0;
  std::vector<uint16_t> expert_;  // by popularity
  std::vector<uint64_t> begin_;   // sum of the weights before each place
  std::vector<int> places_;       // taken by this token, ascending
};

}  // namespace

uint64_t RoutingTrace::Hash() const {
  const FileCounts counts = CountsOf(shape);
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(),
                                                                       XXH3_freeState);
  XXH3_64bits_reset(state.get());
  XXH3_64bits_update(state.get(), &counts, sizeof(counts));
  XXH3_64bits_update(state.get(), ids.data(), ids.size() * sizeof(uint16_t));
  return XXH3_64bits_digest(state.get());
}

absl::StatusOr<RoutingTrace> LoadTrace(const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(const base::MappedFile file, base::MappedFile::Open(path));
  absl::StatusOr<RoutingTrace> trace = ParseTrace(file.bytes());
  if (!trace.ok()) return base::Annotate(trace.status(), path);
  return trace;
}

absl::Status SaveTrace(const RoutingTrace& trace, const std::string& path) {
  FileHeader header;
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  header.counts = CountsOf(trace.shape);
  header.checksum = trace.Hash();
  TERNION_ASSIGN_OR_RETURN(base::AtomicFile file, base::AtomicFile::Create(path));
  TERNION_RETURN_IF_ERROR(file.Write({reinterpret_cast<const uint8_t*>(&header), sizeof(header)}));
  TERNION_RETURN_IF_ERROR(file.Write(
      {reinterpret_cast<const uint8_t*>(trace.ids.data()), trace.ids.size() * sizeof(uint16_t)}));
  return file.Commit();
}

absl::StatusOr<RoutingTrace> UniformTrace(uint64_t seed, const TraceShape& shape) {
  return ZipfTrace(seed, 0, shape);
}

absl::StatusOr<RoutingTrace> ZipfTrace(uint64_t seed, double exponent, const TraceShape& shape) {
  TERNION_ASSIGN_OR_RETURN(const size_t num_ids, CheckCounts(CountsOf(shape)));
  if (!(exponent >= 0 && exponent <= kMaxZipfExponent)) {
    return absl::InvalidArgumentError(
        absl::StrCat("Zipf exponent is ", exponent, "; it must be 0 to ", kMaxZipfExponent));
  }
  std::vector<uint64_t> weights(shape.num_experts);
  for (int i = 0; i < shape.num_experts; ++i) {
    const double share = NegativePower(i + 1.0, exponent);
    weights[i] = std::max<uint64_t>(1, static_cast<uint64_t>(share * (uint64_t{1} << 32)));
  }
  RoutingTrace trace{shape, std::vector<uint16_t>(num_ids)};
  std::span<uint16_t> rest(trace.ids);
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    Popularity popularity(base::RandomBits(seed, layer), weights);
    for (int64_t token = 0; token < shape.num_tokens; ++token) {
      popularity.Draw(rest.first(shape.top_k));
      rest = rest.subspan(shape.top_k);
    }
  }
  return trace;
}

}  // namespace ternion::experts
