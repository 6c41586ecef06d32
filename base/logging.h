// One place to set up spdlog: messages go to stderr, prefixed by the rank that speaks.
#pragma once

#include <string>

#include "spdlog/spdlog.h"

namespace ternion::base {

// Sends log lines to stderr as "[LEVEL] [who] text". `who` may be empty.
void InitLogging(const std::string& who);

}  // namespace ternion::base
