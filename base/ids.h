// Distinct integer types for the things we count, so that an expert is never passed for a rank.
#pragma once

#include <cstdint>

namespace ternion::base {

enum class RankId : int32_t {};
enum class ExpertId : int32_t {};

template <typename Id>
constexpr int32_t Index(Id id) {
  return static_cast<int32_t>(id);
}

}  // namespace ternion::base
