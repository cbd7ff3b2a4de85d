// Causal attention after a state whose window rolls: what `schema.py` calls a causal family. The mathematics
// is that of kernels/cpu; only where the past lies is different from kernels/state.py.
//
//   recurrent  sum of k^T v over the tokens older than the window
//   window     the last `rows` tokens as [key | value], newest last, keys already divided by their norms,
//              zeros before the first token; rows >= group - 1 and rows >= taps - 1
#pragma once
#include "abi.h"

namespace linearize {

struct Rolling {
  Core core;  // alpha, local and conv are all there
  Tensor query, key, value, out;
  Tensor past_recurrent, past_window, recurrent, window;
  int64_t rows;
  const int64_t* past_length;  // [batch]
  const bool* real;            // [batch, length]: the other tokens change nothing and give zeros
};

// One instruction set's kernels. A unit is one (batch, kv head); units are independent of each other.
struct RollingKernels {
  size_t (*scratch)(const Rolling&);  // floats
  void (*unit)(const Rolling&, int64_t unit, float* scratch);
};

}  // namespace linearize
