#include "launcher/npy.h"

#include "absl/strings/str_cat.h"

namespace ternion::launcher {

std::string NpyHeader(int64_t rows, int64_t columns) {
  std::string dict = absl::StrCat("{'descr': '<f4', 'fortran_order': False, 'shape': (", rows, ", ",
                                  columns, "), }");
  // Magic, version and length take 10 bytes; the whole header is a multiple of 64 and ends in a
  // newline.
  dict.append(63 - (10 + dict.size()) % 64, ' ');
  dict.push_back('\n');
  std::string header("\x93NUMPY\x01\x00", 8);
  header.push_back(static_cast<char>(dict.size() & 0xff));
  header.push_back(static_cast<char>(dict.size() >> 8));
  return header + dict;
}

}  // namespace ternion::launcher
