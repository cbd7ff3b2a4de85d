// Built with -mavx512f and what every AVX512 server has besides.
#include "backward.h"
#include "bidirectional.h"
#include "decode.h"
#include "forward_both.h"
#include "salient_backward.h"

namespace linearize {
extern const Kernels avx512_kernels;
const Kernels avx512_kernels = {
    state_floats,   forward_scratch, forward_sum, forward_piece,
    forward_both_scratch, forward_both_piece, backward_scratch, backward_sums,
    backward_piece, step_scratch,    step_unit,   append_scratch, append_unit,
    tree_scratch,   tree_unit,       salient_scratch, salient_unit,
    salient_backward_scratch, salient_backward_unit,
    choosing_scratch, choosing_unit, panel_scratch, panel_unit,
};
}  // namespace linearize
