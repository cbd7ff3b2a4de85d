// The whole sequence, both ways: every token of the group, and S = sum k^T v over all groups, which
// `forward_sum` found before. For each group (rows i, j):
//
//   o[i] = alpha q[i] S  +  sum over j of w[i - j] v[j]  +  sum over j of the group of local act(q[i].k[j]) v[j]
//
// The taps are centred: w lies between -taps / 2 and taps / 2. Tiles as in forward.h; groups are independent.
#pragma once
#include "forward.h"

namespace linearize {
namespace {

struct BothScratch {
  int64_t half, band_floats;
  float *keys, *keys_t, *values, *query, *scores, *out, *bands;

  BothScratch(Arena& arena, const Sizes& z, const Core& core) {
    half = core.conv ? core.taps / 2 : 0;
    band_floats = core.conv ? core.taps + 4 * TILE_ROWS : 0;
    keys = arena.take(z.wide_group * z.wide_dim + WIDTH);
    keys_t = arena.take(z.wide_dim * z.wide_group);
    values = arena.take((z.group + 2 * half) * z.wide_value);
    query = arena.take((z.wide_group + TILE_ROWS) * z.wide_dim);
    scores = arena.take(TILE_ROWS * z.wide_group);
    out = arena.take(TILE_ROWS * z.wide_value);
    bands = arena.take(core.heads / core.kv_heads * band_floats);
  }
};

template <int ACTIVATION>
void weigh_both(float* p, int64_t n, float local) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    Vec s = load(p + i);
    if constexpr (ACTIVATION == RELU2) s = positive(s), s = s * s;
    store(p + i, s * local);
  }
}

size_t forward_both_scratch(const Forward& f) {
  Arena arena{nullptr};
  BothScratch counted(arena, Sizes(f.core), f.core);
  return arena.used;
}

// One group of a (batch, kv head); `m` holds its keys and the values `from` on.
void both_group(const Forward& f, const Sizes& z, const BothScratch& m, int64_t b, int64_t kv, int64_t start,
                int64_t rows, int64_t from, int64_t to, const float* sums) {
  const Core& core = f.core;
  const int64_t shared = core.heads / core.kv_heads;
  for (int64_t h = 0; h < shared; h++) {
    const int64_t head = kv * shared + h;
    const float alpha = core.alpha ? core.alpha[head] : 0, local = core.local ? core.local[head] : 0;
    if (core.local || core.alpha)
      read_rows(m.query, z.wide_dim, f.query, core.dtype, b, head, start, rows, z.dim, z.group, core.normalize);
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const int64_t height = least(TILE_ROWS, rows - i), t = start + i;
      const float* query = m.query + i * z.wide_dim;
      with_height(height, [&](auto size) {
        constexpr int R = decltype(size)::value;
        if (core.local) {
          tiles<R, ROWS, SET>(m.scores, z.wide_group, query, z.wide_dim, m.keys_t, z.wide_group, z.dim,
                              z.wide_group);
          if (core.activation == RELU2) weigh_both<RELU2>(m.scores, R * z.wide_group, local);
          else weigh_both<LINEAR>(m.scores, R * z.wide_group, local);
        }
        // Value t - half + k of row r has the tap that stands at k - r, from the last tap to the first.
        const int64_t first = most(from, t - m.half), last = least(to, t + height + m.half);
        const float* band = m.bands + h * m.band_floats + 2 * TILE_ROWS + first - (t - m.half);
        Part state{query, sums, core.alpha ? z.dim : 0};
        Part conv{band, m.values + (first - from) * z.wide_value, core.conv ? last - first : 0};
        Part own{m.scores, m.values + (start - from) * z.wide_value, core.local ? rows : 0};
        for (int64_t e = 0; e < z.wide_value; e += 2 * WIDTH) {
          if (e + WIDTH < z.wide_value)
            output_tile<R, 2>(m.out + e, z.wide_value, alpha, state, z.wide_dim, conv, own, z.wide_group);
          else output_tile<R, 1>(m.out + e, z.wide_value, alpha, state, z.wide_dim, conv, own, z.wide_group);
          state.b += 2 * WIDTH, conv.b += 2 * WIDTH, own.b += 2 * WIDTH;
        }
      });
      write_rows(f.out, core.dtype, b, head, t, m.out, z.wide_value, height, z.value_dim);
    }
  }
}

// `sums`: S of the whole sequence.
void forward_both_piece(const Forward& f, Piece piece, const float* sums, float* scratch) {
  const Core& core = f.core;
  const Sizes z(core);
  Arena arena{scratch};
  BothScratch m(arena, z, core);
  const int64_t b = piece.unit / core.kv_heads, kv = piece.unit % core.kv_heads;
  for (int64_t h = 0; core.conv && h < core.heads / core.kv_heads; h++) {
    float* band = m.bands + h * m.band_floats;
    std::fill_n(band, m.band_floats, 0.0f);
    for (int64_t k = 0; k < core.taps; k++)
      band[2 * TILE_ROWS + k] = core.conv[(kv * (core.heads / core.kv_heads) + h) * core.taps + core.taps - 1 - k];
  }
  for (int64_t g = piece.first; g < piece.last; g++) {
    const int64_t start = g * z.group, rows = least(z.group, core.length - start);
    const int64_t from = most(0, start - m.half), to = least(core.length, start + rows + m.half);
    read_rows(m.values, z.wide_value, f.value, core.dtype, b, kv, from, to - from, z.value_dim);
    if (core.local) {
      read_rows(m.keys, z.wide_dim, f.key, core.dtype, b, kv, start, rows, z.dim, z.group, core.normalize);
      clear_rows(m.keys, z.wide_dim, rows, z.wide_group);
      transpose(m.keys_t, z.wide_group, m.keys, z.wide_dim, z.wide_group, z.wide_dim);
    }
    both_group(f, z, m, b, kv, start, rows, from, to, sums);
  }
}

}  // namespace
}  // namespace linearize
