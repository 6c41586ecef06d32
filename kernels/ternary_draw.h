// Ternary weights that a seed decides, for models that were never trained. For host and device.
//
// Each byte of a matrix's HF packing (RepackHf) takes one number of the seed's sequence
// (base::RandomBits), which chooses one of the 81 ways to fill its four fields. A seed means the
// same weights for ever.
#pragma once

#include <cstdint>

#include "base/random.h"

namespace ternion::kernels {

inline constexpr uint32_t kTernaryBytes = 81;

// Which of the ways `bits` choose.
constexpr uint32_t TernaryChoice(uint64_t bits) {
  return static_cast<uint32_t>((bits >> 32) * kTernaryBytes >> 32);
}

// Field f of a choice is its digit f in base 3. Its factor, choice * factor >> 11 being
// choice / 3^f:
constexpr uint32_t FactorOfField(int field) {
  return field == 0 ? 2048 : field == 1 ? 683 : field == 2 ? 228 : 76;
}
constexpr uint32_t CodeOfChoice(uint32_t choice, uint32_t factor) {
  return (choice * factor >> 11) % 3;
}

// The byte itself.
constexpr uint8_t ByteOfChoice(uint32_t choice) {
  uint32_t byte = 0;
  for (int field = 0; field < 4; ++field) {
    byte |= CodeOfChoice(choice, FactorOfField(field)) << 2 * field;
  }
  return static_cast<uint8_t>(byte);
}

// An output row of a matrix of ceil(rows / 4) packed rows, whose first byte takes the number
// `first_draw`.
struct DrawnRow {
  uint64_t first_draw;  // what the byte of column 0 takes
  uint32_t factor;      // of the row's field

  static constexpr DrawnRow Of(int64_t row, int64_t packed_rows, int64_t columns,
                               uint64_t first_draw) {
    int field = 0;
    for (; row >= packed_rows; row -= packed_rows) ++field;
    return {first_draw + static_cast<uint64_t>(row * columns), FactorOfField(field)};
  }

  constexpr uint32_t CodeAt(uint64_t seed, int64_t column) const {
    const uint64_t draw = first_draw + static_cast<uint64_t>(column);
    return CodeOfChoice(TernaryChoice(base::RandomBits(seed, draw)), factor);
  }
};

}  // namespace ternion::kernels
