// The whole sequence, one pass. For each group of tokens (rows i, j; S sums k^T v over earlier groups):
//
//   p[i, j] = local act(q[i].k[j]) + w[i - j]   for j <= i
//   o[i]    = alpha q[i] S  +  sum over earlier j of w[i - j] v[j]  +  p[i] v
//   S      += k^T v
//
// Work is done by blocks of TILE_ROWS queries, so that what lies above the diagonal is skipped, and the three
// products of a block meet in registers. Nothing grows with the length.
#pragma once
#include "vector.h"

namespace linearize {
namespace {

// Sizes in floats. `wide` sizes are rounded up to whole vectors.
struct Sizes {
  int64_t dim, wide_dim, value_dim, wide_value, group, wide_group, groups, history;

  explicit Sizes(const Core& core) {
    dim = core.dim, wide_dim = round_up(dim, WIDTH);
    value_dim = core.value_dim, wide_value = round_up(value_dim, WIDTH);
    group = least(core.group, core.length), wide_group = round_up(group, WIDTH);
    groups = (core.length + group - 1) / group;
    history = core.conv ? core.taps - 1 : 0;  // rows of v the convolution reads before a group
  }
};

// The taps of a head lie in a vector that can be read at any lag met in a group: zeros where there is no tap.
INLINE int64_t taps_margin(const Sizes& z) { return z.wide_group + 2 * TILE_ROWS + WIDTH; }
INLINE int64_t taps_floats(const Sizes& z) { return 2 * taps_margin(z) + z.history + 1; }

struct ForwardScratch {
  float *state, *keys, *keys_t, *values, *query, *scores, *out;

  ForwardScratch(Arena& arena, const Sizes& z) {
    state = arena.take(z.wide_dim * z.wide_value + TILE_ROWS * z.wide_value);
    keys = arena.take(z.wide_group * z.wide_dim + WIDTH);
    keys_t = arena.take(z.wide_dim * z.wide_group);
    values = arena.take((z.history + z.wide_group) * z.wide_value);
    query = arena.take((z.wide_group + TILE_ROWS) * z.wide_dim);
    scores = arena.take(TILE_ROWS * z.wide_group);
    out = arena.take(TILE_ROWS * z.wide_value);
  }
};

// p = local act(s) + w below the diagonal, zero above it; row 0 of the block is row i0 of the group.
template <int ACTIVATION>
INLINE void weigh(float* p, int64_t stride, int64_t i0, int64_t rows, int64_t columns, float local,
                  const float* reversed_taps) {
  const Ints lane = count_up();
  for (int64_t r = 0; r < rows; r++) {
    const int32_t i = static_cast<int32_t>(i0 + r);
    for (int32_t j = 0; j < columns; j += WIDTH) {
      float* at = p + r * stride + j;
      Vec s = load(at);
      if constexpr (ACTIVATION == RELU2) s = positive(s), s = s * s;
      s = s * local;
      if (reversed_taps) s = s + load(reversed_taps - i + j);
      store(at, j + WIDTH - 1 <= i ? s : keep(lane + j <= i, s));
    }
  }
}

struct Part {
  const float *a, *b;
  int64_t n;
};

// o[R][V * WIDTH] = alpha q S + band v + p v
template <int R, int V>
__attribute__((noinline)) void output_tile(float* o, int64_t stride, float alpha, Part state,
                                           int64_t query_stride, Part band, Part local,
                                           int64_t score_stride) {
  Vec x[R][V] = {};
  if (state.n) {
    multiply<R, V, ROWS>(x, state.a, query_stride, state.b, stride, state.n);
    for (int r = 0; r < R; r++)
      for (int j = 0; j < V; j++) x[r][j] = x[r][j] * alpha;
  }
  multiply<R, V, BAND>(x, band.a, 0, band.b, stride, band.n);
  multiply<R, V, ROWS>(x, local.a, score_stride, local.b, stride, local.n);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) store(o + r * stride + j * WIDTH, x[r][j]);
}

size_t state_floats(const Core& core) {
  const Sizes z(core);
  return z.wide_dim * z.wide_value;
}

size_t forward_scratch(const Forward& f) {
  Arena arena{nullptr};
  Sizes z(f.core);
  ForwardScratch counted(arena, z);
  arena.take(f.core.heads / f.core.kv_heads * taps_floats(z));
  return arena.used;
}

void forward_sum(const Forward& f, Piece piece, float* total, float* scratch) {
  const Core& core = f.core;
  const Sizes z(core);
  Arena arena{scratch};
  ForwardScratch m(arena, z);
  const int64_t b = piece.unit / core.kv_heads, kv = piece.unit % core.kv_heads;
  clear_rows(m.state, z.wide_value, 0, z.dim);
  for (int64_t g = piece.first; g < piece.last; g++) {
    const int64_t start = g * z.group, rows = least(z.group, core.length - start);
    read_rows(m.keys, z.wide_dim, f.key, core.dtype, b, kv, start, rows, z.dim, z.group, core.normalize);
    read_rows(m.values, z.wide_value, f.value, core.dtype, b, kv, start, rows, z.value_dim, z.group);
    product<COLUMNS, ADD>(m.state, z.wide_value, m.keys, z.wide_dim, m.values, z.wide_value, z.dim,
                          z.wide_value, rows);
  }
  memcpy(total, m.state, z.wide_dim * z.wide_value * sizeof(float));
}

void forward_piece(const Forward& f, Piece piece, const float* before, float* scratch) {
  const Core& core = f.core;
  const Sizes z(core);
  Arena arena{scratch};
  ForwardScratch m(arena, z);
  const int64_t b = piece.unit / core.kv_heads, kv = piece.unit % core.kv_heads;
  const int64_t shared = core.heads / core.kv_heads;

  // Taps from the last to the first, so that a row of the band, in which the lag falls, is read in order.
  const int64_t taps_stride = taps_floats(z);
  float* reversed = arena.take(shared * taps_stride) + taps_stride - 1 - taps_margin(z);
  if (core.conv)
    for (int64_t h = 0; h < shared; h++)
      for (int64_t l = 0; l < core.taps; l++)
        reversed[h * taps_stride - l] = core.conv[(kv * shared + h) * core.taps + l];

  float* own_values = m.values + z.history * z.wide_value;
  if (before) memcpy(m.state, before, z.wide_dim * z.wide_value * sizeof(float));
  else clear_rows(m.state, z.wide_value, 0, z.dim);
  const int64_t earlier = least(z.history, piece.first * z.group);
  read_rows(own_values - earlier * z.wide_value, z.wide_value, f.value, core.dtype, b, kv,
            piece.first * z.group - earlier, earlier, z.value_dim);
  for (int64_t g = piece.first; g < piece.last; g++) {
    const int64_t start = g * z.group, rows = least(z.group, core.length - start);
    read_rows(own_values, z.wide_value, f.value, core.dtype, b, kv, start, rows, z.value_dim, z.group);
    if (core.local || core.alpha) {
      read_rows(m.keys, z.wide_dim, f.key, core.dtype, b, kv, start, rows, z.dim, z.group, core.normalize);
      if (core.local) {
        clear_rows(m.keys, z.wide_dim, rows, z.wide_group);
        transpose(m.keys_t, z.wide_group, m.keys, z.wide_dim, z.wide_group, z.wide_dim);
      }
    }
    const int64_t known = least(z.history, start);  // rows of history that exist
    for (int64_t h = 0; h < shared; h++) {
      const int64_t head = kv * shared + h;
      const float alpha = core.alpha ? core.alpha[head] : 0, local = core.local ? core.local[head] : 0;
      const float* taps = core.conv ? reversed + h * taps_stride : nullptr;
      if (core.local || core.alpha)
        read_rows(m.query, z.wide_dim, f.query, core.dtype, b, head, start, rows, z.dim, z.group,
                  core.normalize);
      for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        const int64_t height = least(TILE_ROWS, rows - i), reach = i + height;
        const float* query = m.query + i * z.wide_dim;
        with_height(height, [&](auto size) {
          constexpr int R = decltype(size)::value;
          Part state{query, m.state, core.alpha && g > 0 ? z.dim : 0};
          // The convolution's earlier rows; rows of the group itself are in the scores when there are scores.
          const int64_t first = most(-known, i - z.history), last = core.local ? 0 : reach;
          Part band{taps - i + first, own_values + first * z.wide_value,
                    taps && first < last ? last - first : 0};
          Part own{m.scores, own_values, core.local ? reach : 0};
          if (core.local) {
            const int64_t columns = least(z.wide_group, round_up(reach, WIDTH));
            tiles<R, ROWS, SET>(m.scores, z.wide_group, query, z.wide_dim, m.keys_t, z.wide_group, z.dim,
                                columns);
            if (core.activation == RELU2) weigh<RELU2>(m.scores, z.wide_group, i, R, columns, local, taps);
            else weigh<LINEAR>(m.scores, z.wide_group, i, R, columns, local, taps);
          }
          for (int64_t e = 0; e < z.wide_value; e += 2 * WIDTH) {
            if (e + WIDTH < z.wide_value)
              output_tile<R, 2>(m.out + e, z.wide_value, alpha, state, z.wide_dim, band, own, z.wide_group);
            else
              output_tile<R, 1>(m.out + e, z.wide_value, alpha, state, z.wide_dim, band, own, z.wide_group);
            state.b += 2 * WIDTH, band.b += 2 * WIDTH, own.b += 2 * WIDTH;
          }
        });
        write_rows(f.out, core.dtype, b, head, start + i, m.out, z.wide_value, height, z.value_dim);
      }
    }
    if (g + 1 == piece.last) break;
    if (core.alpha)
      product<COLUMNS, ADD>(m.state, z.wide_value, m.keys, z.wide_dim, own_values, z.wide_value, z.dim,
                            z.wide_value, rows);
    if (z.history)
      memmove(m.values, m.values + z.group * z.wide_value, z.history * z.wide_value * sizeof(float));
  }
}

}  // namespace
}  // namespace linearize
