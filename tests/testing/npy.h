// NumPy arrays of fp32, as the oracle writes them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/file.h"
#include "base/status.h"

namespace ternion::test {

struct NpyMatrix {
  int64_t rows = 0;
  int64_t columns = 0;
  std::vector<float> values;  // [rows, columns]
};

// A version-1 file of little-endian fp32 in C order with two dimensions.
inline absl::StatusOr<NpyMatrix> ReadNpy(const std::string& path) {
  TERNION_ASSIGN_OR_RETURN(const std::string bytes, base::ReadFile(path));
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  if (bytes.size() < 10 || bytes.substr(0, 8) != std::string("\x93NUMPY\x01\x00", 8)) {
    return absl::InvalidArgumentError(path + " is no version-1 .npy file");
  }
  const size_t data = 10 + byte(8) + 256 * byte(9);
  const std::string header = bytes.substr(10, data - 10);
  NpyMatrix matrix;
  long long rows = 0, columns = 0;
  const int found =
      std::sscanf(header.c_str(), "{'descr': '<f4', 'fortran_order': False, 'shape': (%lld, %lld)",
                  &rows, &columns);
  if (found != 2 || rows < 0 || columns < 0) {
    return absl::InvalidArgumentError(path + " is no fp32 matrix: " + header);
  }
  matrix.rows = rows;
  matrix.columns = columns;
  matrix.values.resize(matrix.rows * matrix.columns);
  if (bytes.size() - data != matrix.values.size() * sizeof(float)) {
    return absl::InvalidArgumentError(path + " has another size than its header says");
  }
  std::memcpy(matrix.values.data(), bytes.data() + data, bytes.size() - data);
  return matrix;
}

}  // namespace ternion::test
