#include "base/logging.h"

#include "spdlog/sinks/stdout_color_sinks.h"

namespace ternion::base {

void InitLogging(const std::string& who) {
  auto logger = std::make_shared<spdlog::logger>(
      "ternion", std::make_shared<spdlog::sinks::stderr_color_sink_mt>());
  logger->set_pattern(who.empty() ? "%^%l%$: %v" : "%^%l%$: " + who + ": %v");
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace ternion::base
