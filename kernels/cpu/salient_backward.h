// Gradients of whole sequences under the attention of salient.h. Which tokens each block keeps is given, and has
// no gradient. One unit is a (batch, kv head), whose blocks come one after the other, because they add to the
// gradients of the same keys.
#pragma once
#include "salient.h"

namespace linearize {
namespace {

struct SalientGradient {
  const SalientBackward& s;
  int64_t b, h, rows, padded, depth, width, shared;
  float *queries, *grads, *keys, *values, *turned, *scores, *slopes, *steep, *seen_at, *part;
  int64_t* position;

  SalientGradient(const SalientBackward& s, int64_t unit, Arena& arena)
      : s(s), b(unit / s.kv_heads), h(unit % s.kv_heads) {
    rows = s.kept + s.window + SALIENT_BLOCK;
    padded = round_up(rows, WIDTH);
    depth = round_up(s.dim, WIDTH);
    width = round_up(s.value_dim, WIDTH);
    shared = s.heads / s.kv_heads;
    const int64_t asked = shared * SALIENT_BLOCK + TILE_ROWS, held = padded + TILE_ROWS;
    queries = arena.take(asked * depth);
    grads = arena.take(asked * width);
    keys = arena.take(held * depth);
    values = arena.take(held * width);
    turned = arena.take(most(depth, width) * padded);
    scores = arena.take(asked * padded);
    slopes = arena.take(asked * padded);
    steep = arena.take(s.softcap ? asked * padded : 0);
    seen_at = arena.take(padded);
    part = arena.take(most(held, asked) * most(depth, width));
    position = reinterpret_cast<int64_t*>(arena.take(2 * padded));
  }

  // The tokens that a block's queries see, at which offset from `start`, and their keys and values.
  int64_t gather(int64_t block, int64_t last) {
    int32_t* at = reinterpret_cast<int32_t*>(seen_at);
    const int64_t start = block * SALIENT_BLOCK;
    const int64_t* kept = s.positions + ((b * s.kv_heads + h) * s.blocks + block) * s.kept;
    int64_t count = 0;
    for (int64_t i = 0; i < s.kept; i++)
      if (kept[i] >= 0) position[count] = kept[i], at[count++] = -1;
    for (int64_t p = most(0, start - s.window); p < last; p++)
      position[count] = p, at[count++] = static_cast<int32_t>(most(p - start, -1));
    for (int64_t l = count; l < padded; l++) at[l] = UNSEEN;
    for (int64_t l = 0; l < count; l++) {
      read_rows(keys + l * depth, depth, s.key, s.dtype, b, h, position[l], 1, s.dim);
      read_rows(values + l * width, width, s.value, s.dtype, b, h, position[l], 1, s.value_dim);
    }
    clear_rows(keys, depth, count, padded);
    clear_rows(values, width, count, padded);
    return count;
  }

  void run(int64_t block, int64_t tokens) {
    const int64_t start = block * SALIENT_BLOCK, span = least(SALIENT_BLOCK, tokens - start);
    const int64_t asked = shared * span, count = gather(block, start + span);
    for (int64_t r = 0; r < shared; r++) {
      read_rows(queries + r * span * depth, depth, s.query, s.dtype, b, h * shared + r, start, span, s.dim);
      read_rows(grads + r * span * width, width, s.grad, FLOAT32, b, h * shared + r, start, span, s.value_dim);
    }
    const float scale = static_cast<float>(s.scale);
    for (int64_t i = 0; i < asked * depth; i += WIDTH) store(queries + i, load(queries + i) * scale);
    transpose(turned, padded, keys, depth, padded, depth);
    product<ROWS, SET>(scores, padded, queries, depth, turned, padded, asked, padded, depth);
    if (s.softcap) flatten(asked * padded);
    for (int64_t q = 0; q < asked; q++) {
      float* row = scores + q * padded;
      // Beyond what a float holds there is no gradient, and none that looks like one.
      if (!soften(seen_at, padded, row, q % span)) std::fill(row, row + padded, std::numeric_limits<float>::quiet_NaN());
    }
    transpose(turned, padded, values, width, padded, width);
    product<ROWS, SET>(slopes, padded, grads, width, turned, padded, asked, padded, width);
    for (int64_t q = 0; q < asked; q++) differentiate(slopes + q * padded, scores + q * padded);
    if (s.softcap)
      for (int64_t i = 0; i < asked * padded; i += WIDTH) store(slopes + i, load(slopes + i) * load(steep + i));
    product<ROWS, SET>(part, depth, slopes, padded, keys, depth, asked, depth, count);
    for (int64_t i = 0; i < asked * depth; i += WIDTH) store(part + i, load(part + i) * scale);
    for (int64_t r = 0; r < shared; r++)
      write_rows(s.dquery, FLOAT32, b, h * shared + r, start, part + r * span * depth, depth, span, s.dim);
    product<COLUMNS, SET>(part, depth, slopes, padded, queries, depth, count, depth, asked);
    scatter(s.dkey, depth, s.dim, count);
    product<COLUMNS, SET>(part, width, scores, padded, grads, width, count, width, asked);
    scatter(s.dvalue, width, s.value_dim, count);
  }

  // Scores [n] are capped; `steep` is by how much they still grow with what they were.
  void flatten(int64_t n) {
    const float c = static_cast<float>(s.softcap);
    cap(scores, n, c);
    for (int64_t i = 0; i < n; i += WIDTH) {
      const Vec x = load(scores + i) / c;
      store(steep + i, 1.0f - x * x);
    }
  }

  // Gradients of weights -> of scores, in place.
  void differentiate(float* slope, const float* weight) {
    Vec total = {};
    for (int64_t l = 0; l < padded; l += WIDTH) total += load(slope + l) * load(weight + l);
    const float mean = sum(total);
    for (int64_t l = 0; l < padded; l += WIDTH)
      store(slope + l, (load(slope + l) - mean) * load(weight + l));
  }

  void scatter(const Tensor& to, int64_t stride, int64_t columns, int64_t count) {
    for (int64_t l = 0; l < count; l++) {
      float* row = reinterpret_cast<float*>(row_of(to, FLOAT32, b, h, position[l]));
      for (int64_t i = 0; i < columns; i++) row[i] += part[l * stride + i];
    }
  }
};

size_t salient_backward_scratch(const SalientBackward& s) {
  Arena arena{nullptr};
  SalientGradient unit(s, 0, arena);
  return arena.used;
}

void salient_backward_unit(const SalientBackward& s, int64_t index, float* scratch) {
  Arena arena{scratch};
  SalientGradient unit(s, index, arena);
  const int64_t tokens = s.count ? s.count[unit.b] : s.length;
  for (int64_t block = 0; block * SALIENT_BLOCK < tokens; block++) unit.run(block, tokens);
}

}  // namespace
}  // namespace linearize
