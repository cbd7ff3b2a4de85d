// Which instruction set this processor, and the operating system, can run. Built for any x86-64.
#pragma once
#include <cpuid.h>

#include <cstdint>

namespace linearize {

enum Isa : int64_t { NONE = 0, AVX2 = 1, AVX512 = 2 };

// Asks the processor itself: __builtin_cpu_supports needs a run-time library that not every compiler has.
inline Isa best_isa() {
  unsigned a, b, c, d, low, high;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return NONE;
  const unsigned fma_f16c_and_os = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
  if ((c & fma_f16c_and_os) != fma_f16c_and_os) return NONE;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // which registers the operating system saves
  if ((low & 0x6) != 0x6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return NONE;
  const unsigned wide = bit_AVX512F | bit_AVX512DQ | bit_AVX512BW | bit_AVX512VL;
  return (b & wide) == wide && (low & 0xe6) == 0xe6 ? AVX512 : AVX2;
}

}  // namespace linearize
