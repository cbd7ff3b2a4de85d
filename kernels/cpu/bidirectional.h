// Whole sequences whose queries look both ways: every token up to `window` away, and the kept ones, which are
// the same for all queries; see `bidirectional` in kernels/salient_chunk.py. First each (batch, kv head) chooses
// what is kept. Then its queries attend, a panel at a time, whose keys lie turned in the scratch:
//
//   weights = exp(q [kept before | near | kept after]^T)      kept ones that are near are columns of `near`
//   o       = weights v / sum + band v + share (A q + B o + c)
//
// The scratch grows with the length in choosing alone: there it is one row of scores for each voter.
#pragma once
#include "salient.h"

namespace linearize {
namespace {

constexpr int64_t VOTERS = 64;  // as in kernels/salient_chunk.py
constexpr int64_t ASKED = 12;   // queries at a time: whole tiles, and few keys that not all of them see
constexpr float HIDDEN = std::numeric_limits<float>::lowest();

// Scores [n], n a multiple of WIDTH, of a query -> e^(score - largest), in place; returns 1 / their sum, which is
// not a number where a score is none.
float exponentiate(float* row, int64_t n) {
  Vec even = Vec{} + HIDDEN, odd = even;
  int64_t l = 0;
  for (; l + 2 * WIDTH <= n; l += 2 * WIDTH) {
    const Vec x = load(row + l), y = load(row + l + WIDTH);
    even = x > even ? x : even;
    odd = y > odd ? y : odd;
  }
  if (l < n) even = load(row + l) > even ? load(row + l) : even;
  const float top = largest(even > odd ? even : odd);
  Vec total = {};
  for (l = 0; l < n; l += WIDTH) {
    const Vec x = exp_negative(load(row + l) - top);
    store(row + l, x);
    total += x;
  }
  return 1 / sum(total);
}

// Columns of `turned`: an odd number of cache lines, so that rows of it fall into different places of the cache.
constexpr int64_t turned_stride(int64_t columns) { return round_up(columns + WIDTH, 32) + 16; }

constexpr int64_t STEP = TILE_VECTORS * WIDTH;  // keys at a time, where they are read once

// One (batch, kv head) chooses: to[0] positions, in order, at to + 1.
struct Choosing {
  const Bidirectional& s;
  int64_t depth, padded, shared;
  float *keys, *turned, *queries, *votes, *mass;
  int32_t* order;

  Choosing(const Bidirectional& s, Arena& arena) : s(s) {
    depth = round_up(s.dim, WIDTH);
    padded = round_up(s.length, STEP);
    shared = s.heads / s.kv_heads;
    keys = arena.take(STEP * depth);
    turned = arena.take(depth * STEP);
    queries = arena.take((VOTERS + TILE_ROWS) * depth);
    votes = arena.take((VOTERS + TILE_ROWS) * padded);
    mass = arena.take(padded);
    order = reinterpret_cast<int32_t*>(arena.take(padded));
  }

  void run(int64_t unit, int32_t* to) {
    const int64_t b = unit / s.kv_heads, h = unit % s.kv_heads, count = s.count ? s.count[b] : s.length;
    to[0] = 0;
    if (!s.kept() || count <= s.window + 1) return;  // all are near
    const int64_t first = least(s.sinks, count), number = least(s.salient, count - first);
    if (number) {
      weigh(b, h, count);
      for (int64_t l = first; l < count; l++) order[l] = static_cast<int32_t>(l);
      // What is not a number comes first, as in PyTorch; among equals the first.
      for (int64_t l = 0; l < count; l++)
        if (mass[l] != mass[l]) mass[l] = std::numeric_limits<float>::infinity();
      const auto more = [&](int32_t x, int32_t y) { return mass[x] != mass[y] ? mass[x] > mass[y] : x < y; };
      std::nth_element(order + first, order + first + number - 1, order + count, more);
      std::sort(order + first, order + first + number);
    }
    for (int64_t l = 0; l < first; l++) order[l] = static_cast<int32_t>(l);
    std::copy(order, order + first + number, to + 1);
    to[0] = static_cast<int32_t>(first + number);
  }

  // The weight that the voters of all heads give to each token.
  void weigh(int64_t b, int64_t h, int64_t count) {
    const int64_t columns = round_up(count, STEP);
    std::fill_n(mass, columns, 0.0f);
    for (int64_t r = 0; r < shared; r++) {
      for (int64_t i = 0; i < VOTERS; i++)
        read_rows(queries + i * depth, depth, s.query, s.dtype, b, h * shared + r, i * count / VOTERS, 1, s.dim);
      for (int64_t i = 0; i < VOTERS * depth; i += WIDTH)
        store(queries + i, load(queries + i) * static_cast<float>(s.scale));
      for (int64_t l = 0; l < count; l += STEP) {
        const int64_t rows = least(STEP, count - l);
        read_rows(keys, depth, s.key, s.dtype, b, h, l, rows, s.dim, STEP);
        clear_rows(keys, depth, rows, STEP);
        transpose(turned, STEP, keys, depth, STEP, depth);
        product<ROWS, SET>(votes + l, columns, queries, depth, turned, STEP, VOTERS, STEP, depth);
      }
      if (s.softcap) cap(votes, VOTERS * columns, static_cast<float>(s.softcap));
      for (int64_t i = 0; i < VOTERS; i++) {
        float* row = votes + i * columns;
        std::fill(row + count, row + columns, HIDDEN);
        const float inverse = exponentiate(row, columns);
        for (int64_t l = 0; l < columns; l += WIDTH) store(mass + l, load(mass + l) + load(row + l) * inverse);
      }
    }
  }
};

// Queries `first` .. `last` of a (batch, kv head).
struct Panel {
  const Bidirectional& s;
  int64_t depth, width, shared, reach, stride, kept_stride, band_floats;
  int64_t b, h, count, first, last, from, to, kept;  // from, to: tokens that are at hand
  float *read, *turned, *values, *kept_turned, *kept_values, *queries, *scores, *outputs, *bands;
  float *tail, *joined, *added;
  int32_t* is_kept;              // all bits set where a token is
  int32_t *convolves, *estimates;  // whether each head's convolution and tail add anything
  const int32_t* position;

  Panel(const Bidirectional& s, Arena& arena) : s(s) {
    depth = round_up(s.dim, WIDTH);
    width = round_up(s.value_dim, WIDTH);
    shared = s.heads / s.kv_heads;
    reach = most(s.window, s.conv ? s.taps / 2 : 0);
    band_floats = s.conv ? s.taps + 4 * ASKED : 0;
    const int64_t held = least(s.length, s.panel() + 2 * reach), rows = shared * ASKED + TILE_ROWS;
    const int64_t seen = least(s.length, ASKED + 2 * s.window), columns = s.dim + s.value_dim + 1;
    stride = turned_stride(held);
    kept_stride = turned_stride(s.kept());
    read = arena.take(WIDTH * depth);
    turned = arena.take(depth * stride);
    values = arena.take(held * width);
    kept_turned = arena.take(depth * kept_stride);
    kept_values = arena.take(s.kept() * width);
    queries = arena.take(rows * depth);
    scores = arena.take(rows * (seen + s.kept() + 3 * WIDTH));
    outputs = arena.take(rows * width);
    bands = arena.take(shared * band_floats);
    tail = arena.take(s.tail ? shared * columns * width : 0);
    joined = arena.take(s.tail ? (ASKED + TILE_ROWS) * columns : 0);
    added = arena.take(s.tail ? (ASKED + TILE_ROWS) * width : 0);
    is_kept = reinterpret_cast<int32_t*>(arena.take(held + WIDTH));
    convolves = reinterpret_cast<int32_t*>(arena.take(shared));
    estimates = reinterpret_cast<int32_t*>(arena.take(shared));
  }

  void run(int64_t index, const int32_t* chosen) {
    const int64_t unit = index / s.panels();
    b = unit / s.kv_heads, h = unit % s.kv_heads;
    count = s.count ? s.count[b] : s.length;
    first = index % s.panels() * s.panel(), last = least(count, first + s.panel());
    if (first >= last) return;
    kept = chosen[0], position = chosen + 1;
    hold();
    for (int64_t t = first; t < last; t += ASKED) attend(t, least(ASKED, last - t));
  }

  // What the queries of the panel see.
  void hold() {
    from = most(0, first - reach), to = least(count, last + reach);
    read_rows(values, width, s.value, s.dtype, b, h, from, to - from, s.value_dim, WIDTH);
    for (int64_t l = from; l < to; l += WIDTH) {
      const int64_t rows = least(WIDTH, to - l);
      read_rows(read, depth, s.key, s.dtype, b, h, l, rows, s.dim, WIDTH);
      clear_rows(read, depth, rows, WIDTH);
      transpose(turned + l - from, stride, read, depth, WIDTH, depth);
    }
    std::fill_n(is_kept, to - from, 0);
    for (int64_t i = 0; i < kept; i += WIDTH) {
      const int64_t rows = least(WIDTH, kept - i);
      for (int64_t j = 0; j < rows; j++) {
        const int64_t p = position[i + j];
        read_rows(read + j * depth, depth, s.key, s.dtype, b, h, p, 1, s.dim);
        read_rows(kept_values + (i + j) * width, width, s.value, s.dtype, b, h, p, 1, s.value_dim);
        if (p >= from && p < to) is_kept[p - from] = -1;
      }
      clear_rows(read, depth, rows, WIDTH);
      transpose(kept_turned + i, kept_stride, read, depth, WIDTH, depth);
    }
    for (int64_t r = 0; r < shared; r++) {
      convolves[r] = s.conv && speak(s.conv + (h * shared + r) * s.taps, s.taps);
      const int64_t size = s.value_dim * estimate_columns(s);
      estimates[r] = s.tail && dropped() > 0 && speak(s.tail + (h * shared + r) * size, size);
      if (convolves[r]) lay_band(r);
      if (estimates[r]) turn_estimate(tail + r * estimate_columns(s) * width, width, s.tail, h * shared + r, s);
    }
  }

  int64_t dropped() const { return count - 2 * s.window - 1 - s.kept(); }

  // The taps of a head from the last to the first, zeros on either side: band[k - i] weighs, for query i of a
  // block at t, the value at t - taps / 2 + k.
  float* band_of(int64_t r) const { return bands + r * band_floats + 2 * ASKED; }
  void lay_band(int64_t r) {
    const float* weight = s.conv + (h * shared + r) * s.taps;
    std::fill_n(bands + r * band_floats, band_floats, 0.0f);
    for (int64_t k = 0; k < s.taps; k++) band_of(r)[k] = weight[s.taps - 1 - k];
  }

  void attend(int64_t t, int64_t asked) {
    const int64_t rows = shared * asked;
    for (int64_t r = 0; r < shared; r++)
      read_rows(queries + r * asked * depth, depth, s.query, s.dtype, b, h * shared + r, t, asked, s.dim, ASKED);
    for (int64_t i = 0; i < rows * depth; i += WIDTH)
      store(queries + i, load(queries + i) * static_cast<float>(s.scale));
    const int64_t start = most(0, t - s.window), stop = least(count, t + asked + s.window);
    const int64_t before = std::lower_bound(position, position + kept, start) - position;
    const int64_t beyond = std::lower_bound(position, position + kept, stop) - position, after = kept - beyond;
    const int64_t near_at = round_up(before, WIDTH), after_at = near_at + round_up(stop - start, WIDTH);
    const int64_t padded = after_at + round_up(after, WIDTH);
    score(0, before, kept_turned, kept_stride, rows, padded);
    score(near_at, stop - start, turned + start - from, stride, rows, padded);
    score(after_at, after, kept_turned + beyond, kept_stride, rows, padded);
    for (int64_t q = 0; q < rows; q++) {
      // Tokens that some query of the block sees, and this one does not.
      const int64_t own = t + q % asked, last_near = own + s.window;
      float* row = scores + q * padded + near_at - start;
      hide(row, start, own - s.window);
      hide(row, last_near + 1, stop);
    }
    float inverse[TILE_ROWS];
    for (int64_t i = 0; i < rows; i += TILE_ROWS) {
      const int64_t some = least(TILE_ROWS, rows - i);
      float *weights = scores + i * padded, *out = outputs + i * width;
      for (int64_t q = 0; q < some; q++) inverse[q] = exponentiate(weights + q * padded, padded);
      product<ROWS, SET>(out, width, weights + near_at, padded, values + (start - from) * width, width, some,
                         width, stop - start);
      if (before) product<ROWS, ADD>(out, width, weights, padded, kept_values, width, some, width, before);
      if (after)
        product<ROWS, ADD>(out, width, weights + after_at, padded, kept_values + beyond * width, width, some,
                           width, after);
      for (int64_t q = 0; q < some; q++)
        for (int64_t d = 0; d < width; d += WIDTH)
          store(out + q * width + d, load(out + q * width + d) * inverse[q]);
    }
    // From the last head on: a tile adds to the rows behind those that it is for.
    for (int64_t r = shared - 1; r >= 0; r--) finish(r, t, asked);
  }

  // Scores of `number` keys from column `at` on, and columns behind them that are hidden.
  void score(int64_t at, int64_t number, const float* keys, int64_t key_stride, int64_t rows, int64_t padded) {
    if (!number) return;
    const int64_t columns = round_up(number, WIDTH);
    product<ROWS, SET>(scores + at, padded, queries, depth, keys, key_stride, rows, columns, depth);
    for (int64_t q = 0; q < rows; q++) {
      float* row = scores + q * padded + at;
      if (s.softcap) cap(row, columns, static_cast<float>(s.softcap));
      std::fill(row + number, row + columns, HIDDEN);
    }
  }

  // Of a row of scores the tokens first .. last, fewer than ASKED, unless they are kept.
  void hide(float* row, int64_t first, int64_t last) {
    for (; first < last; first += WIDTH) {
      const Ints lost = ~load_ints(is_kept + first - from) & (count_up() < static_cast<int32_t>(last - first));
      store(row + first, lost ? Vec{} + HIDDEN : load(row + first));
    }
  }

  // Convolution and tail of a head, and its rows of the output.
  void finish(int64_t r, int64_t t, int64_t asked) {
    float* out = outputs + r * asked * width;
    if (convolves[r]) {
      const int64_t newest = t - s.taps / 2, skip = most(0, -newest);
      const int64_t number = least(asked - 1 + s.taps, count - newest) - skip;
      if (number > 0)
        product<BAND, ADD>(out, width, band_of(r) + skip, 0, values + (newest + skip - from) * width, width,
                           asked, width, number);
    }
    if (estimates[r]) {
      const float share = std::log1p(static_cast<float>(dropped()) / most(s.window + s.kept(), 1));
      add_estimate(out, width, queries + r * asked * depth, depth, asked, share,
                   tail + r * estimate_columns(s) * width, joined, added, s);
    }
    write_rows(s.out, FLOAT32, b, h * shared + r, t, out, width, asked, s.value_dim);
  }
};

size_t choosing_scratch(const Bidirectional& s) {
  Arena arena{nullptr};
  Choosing counted(s, arena);
  return arena.used;
}

void choosing_unit(const Bidirectional& s, int64_t unit, int32_t* to, float* scratch) {
  Arena arena{scratch};
  Choosing(s, arena).run(unit, to);
}

size_t panel_scratch(const Bidirectional& s) {
  Arena arena{nullptr};
  Panel counted(s, arena);
  return arena.used;
}

void panel_unit(const Bidirectional& s, int64_t index, const int32_t* chosen, float* scratch) {
  Arena arena{scratch};
  Panel(s, arena).run(index, chosen);
}

}  // namespace
}  // namespace linearize
