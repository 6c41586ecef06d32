// NumPy's .npy files, version 1.0: float32, C order.
// Source: numpy.lib.format.
#pragma once

#include <cstdint>
#include <string>

namespace ternion::launcher {

// The header of a float32 array [rows, columns]; the data follows it row by row, little-endian.
std::string NpyHeader(int64_t rows, int64_t columns);

}  // namespace ternion::launcher
