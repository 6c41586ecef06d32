// Named model shapes for synth (and for planning): the sizes of public models, ternary throughout.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace ternion::launcher {

std::vector<std::string> ShapeNames();

// The config.json of a named shape. InvalidArgument lists the names.
//   bitnet-2b        BitNet b1.58 2B4T, dense
//   mixtral-8x7b     as bitnet_moe: 8 experts, top-2
//   qwen3-30b-a3b    128 experts, top-8
//   deepseek-v3      as bitnet_moe: 3 dense layers, then 58 of 256 experts, top-8 and a shared
//                    one; grouped-query attention in place of MLA
absl::StatusOr<nlohmann::ordered_json> ShapeConfig(const std::string& name);

}  // namespace ternion::launcher
