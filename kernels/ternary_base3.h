// Base-3 codes of packed ternary matrices: five in a byte, as a fraction (the idea of the TQ1_0
// type of llama.cpp). For host and device.
//
// With v = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4 < 243, the byte is b = ceil(256 v / 243). So b / 256 is
// t0 / 3 + t1 / 9 + .. and less than 1/243 more, and its first n + 1 trits, as one number, are
//   Q_n = floor(b 3^(n+1) / 256),  t_n = Q_n - 3 Q_(n-1):
// four bytes at once, products in 16-bit lanes (255 * 243 < 2^16), differences bytewise (no byte
// of Q_n is less than three times that of Q_(n-1)).
#pragma once

#include <cstdint>

namespace ternion::kernels {

inline constexpr int kTritsOfByte = 5;

// The byte for v.
constexpr uint8_t PackTrits(uint8_t v) { return static_cast<uint8_t>((v * 256 + 242) / 243); }

// Byte i of the result is byte (selector >> 4i & 7) of a, b: one instruction of a device.
constexpr uint32_t SelectBytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t selected = 0;
  for (int i = 0; i < 4; ++i) {
    selected |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return selected;
#endif
}

// codes[n] = t_n of each of four bytes.
constexpr void UnpackTrits(uint32_t bytes, uint32_t* codes) {
  const uint32_t even = bytes & 0x00ff00ff, odd = bytes >> 8 & 0x00ff00ff;
  uint32_t power = 1, above = 0;
  for (int n = 0; n < kTritsOfByte; ++n) {
    power *= 3;
    const uint32_t first = SelectBytes(even * power, odd * power, 0x7351);
    codes[n] = first - 3 * above;
    above = first;
  }
}

// t_0 .. t_3 of one byte, in this order.
constexpr uint32_t UnpackFourTrits(uint32_t byte) {
  const uint32_t first = SelectBytes(byte * (3 | 9 << 16), byte * (27 | 81 << 16), 0x7531);
  return first - 3 * (first << 8);
}

inline constexpr int kOperandsOfBlock = 16;  // of a thread
inline constexpr int kThreadsOfBlock = 32;

// A block of kTilesBase3, shared by a warp: each thread has 12 bytes of four codes of 15 operands,
// and one byte of the last.
struct alignas(16) Base3Block {
  uint32_t left[kThreadsOfBlock][2];  // operands 0 .. 9
  uint32_t right[kThreadsOfBlock];    // 10 .. 14
  uint8_t last[kThreadsOfBlock];      // 15
};
static_assert(sizeof(Base3Block) == 416);

// What a thread has of a block.
struct Base3Words {
  uint32_t word[3];
  uint32_t last;

  // Of operands with four codes in each.
  static constexpr Base3Words Pack(const uint32_t (&operands)[kOperandsOfBlock]) {
    Base3Words packed = {};
    for (int w = 0; w < 3; ++w) {
      uint32_t values = 0;  // no byte gets past 242
      for (int n = 0; n < kTritsOfByte; ++n) values = values * 3 + operands[w * kTritsOfByte + n];
      for (int byte = 0; byte < 4; ++byte) {
        packed.word[w] |= uint32_t{PackTrits(static_cast<uint8_t>(values >> 8 * byte))} << 8 * byte;
      }
    }
    const uint32_t last = operands[kOperandsOfBlock - 1];
    packed.last = PackTrits(static_cast<uint8_t>((last & 0xff) * 81 + (last >> 8 & 0xff) * 27 +
                                                 (last >> 16 & 0xff) * 9 + (last >> 24) * 3));
    return packed;
  }

  // Four codes in each.
  constexpr void Unpack(uint32_t (&operands)[kOperandsOfBlock]) const {
    for (int w = 0; w < 3; ++w) UnpackTrits(word[w], operands + w * kTritsOfByte);
    operands[kOperandsOfBlock - 1] = UnpackFourTrits(last);
  }
};

constexpr Base3Words WordsOfThread(const Base3Block& block, int thread) {
  return {{block.left[thread][0], block.left[thread][1], block.right[thread]}, block.last[thread]};
}

}  // namespace ternion::kernels
