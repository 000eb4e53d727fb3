// y = W x for an output head of 8- or 4-bit integers (docs/format.md, Outer matrices), inputs in fp32, one row after the
// other from the stored bytes as they lie.
//
// All variants do the same float operations in the same order for each output, so they agree to the last bit, whatever
// the number of tokens or threads. A group has eight sums: channel i is added to sum i mod 8.
//     s[l] = fma(code / unit, x, s[l])      for each channel of the group, from s = 0
//     t[l] = fma(s[l], scale * unit, t[l])  for each group, from t = 0
//     y = ((t[0] + t[4]) + (t[2] + t[6])) + ((t[1] + t[5]) + (t[3] + t[7]))
// `unit` is 1, for 4 bits 2^-28: a nibble needs not be moved down to be a number. Powers of two change no rounding.
#pragma once
#include "../site.h"

namespace bitwright {

// codes: int8 [rows][columns], or two to a byte [rows][row_bytes()], the even channel in the low nibble, two's
// complement; scales fp16 [rows][groups()]. `group` is a multiple of 8.
struct HeadRows {
  const uint8_t* codes;
  const uint16_t* scales;
  int64_t rows, columns, group;
  int bits;  // 8 or 4

  BITWRIGHT_INLINE int64_t row_bytes() const { return (columns * bits + 7) / 8; }
  BITWRIGHT_INLINE float unit() const { return bits == 8 ? 1.0f : 0x1p-28f; }
  BITWRIGHT_INLINE int64_t groups() const { return (columns + group - 1) / group; }
};

// rows first..last of y [tokens][rows]; x [tokens][columns]
using HeadFunction = void(const HeadRows&, const float* x, int64_t tokens, float* y, int64_t first, int64_t last);

HeadFunction head_scalar, head_avx2;

}  // namespace bitwright
