// After a state of constant size: one token (step), tokens whose outputs are known (append) or a tree of N
// draft nodes. The state is that of
// kernels/recurrent.py: `recurrent` holds tokens before `folded`, position p of the rest is row p % window of the
// two rings, keys already divided by their norms. The output at position t is one row of weights x:
//
//   o = alpha q recurrent + sum of x[p] v[p]
//   x[p] = local act(q.k[p]) + w[t - p]  in t's own group,  alpha q.k[p] + w[t - p]  in earlier ones
#pragma once
#include "forward.h"

namespace linearize {
namespace {

// The first n of WIDTH floats, zeros behind them.
INLINE Vec load_first(const float* p, int64_t n) {
  if (n >= WIDTH) return load(p);
#ifdef __AVX512F__
  return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#else
  const Ints first = count_up() < static_cast<int32_t>(n);
  return (Vec)_mm256_maskload_ps(p, (__m256i)first);
#endif
}

INLINE float dot(const float* x, const float* y, int64_t n) {  // x is padded, y is not
  Vec total = {};
  for (int64_t i = 0; i < n; i += WIDTH) total += load(x + i) * load_first(y + i, n - i);
  return sum(total);
}

// out[columns] += sum over r of x[r] rows[r][columns]; `out` is padded.
INLINE void add_rows(float* out, const float* x, const float* rows, int64_t stride, int64_t count,
                     int64_t columns) {
  constexpr int V = 4;
  int64_t c = 0;
  for (; c + V * WIDTH <= columns; c += V * WIDTH) {
    Vec even[V] = {}, odd[V] = {};  // two chains of additions each, to hide their latency
    const float* p = rows + c;
    int64_t r = 0;
    for (; r + 2 <= count; r += 2, p += 2 * stride)
      for (int j = 0; j < V; j++) {
        even[j] += x[r] * load(p + j * WIDTH);
        odd[j] += x[r + 1] * load(p + stride + j * WIDTH);
      }
    for (int j = 0; j < V; j++) {
      if (r < count) even[j] += x[r] * load(p + j * WIDTH);
      store(out + c + j * WIDTH, load(out + c + j * WIDTH) + (even[j] + odd[j]));
    }
  }
  for (; c < columns; c += WIDTH) {
    Vec even = {}, odd = {};
    int64_t r = 0;
    for (; r + 2 <= count; r += 2) {
      even += x[r] * load_first(rows + r * stride + c, columns - c);
      odd += x[r + 1] * load_first(rows + (r + 1) * stride + c, columns - c);
    }
    if (r < count) even += x[r] * load_first(rows + r * stride + c, columns - c);
    store(out + c, load(out + c) + (even + odd));
  }
}

INLINE const float* recurrent_of(const State& s, int64_t b, int64_t kv) {
  return reinterpret_cast<const float*>(row_of(s.recurrent, FLOAT32, b, kv, 0));
}

// Ring rows of positions first .. last -> f(rows as floats, stride, position of the first, how many), in one
// or two parts. Rows that are not float32 go through `copy`.
template <class F>
INLINE void ring_rows(const State& s, const Tensor& ring, int64_t b, int64_t kv, int64_t first, int64_t last,
                      int64_t n, float* copy, F&& f) {
  while (first < last) {
    const int64_t row = first % s.window, count = least(last - first, s.window - row);
    if (s.window_dtype == FLOAT32) {
      f(reinterpret_cast<const float*>(row_of(ring, FLOAT32, b, kv, row)), ring.row, first, count);
    } else {
      const int64_t wide = round_up(n, WIDTH);
      read_rows(copy, wide, ring, s.window_dtype, b, kv, row, count, n);
      f(static_cast<const float*>(copy), wide, first, count);
    }
    first += count;
  }
}

struct StepScratch {
  float *query, *key, *value, *weights, *out, *rows, *keys, *values, *state;

  StepScratch(Arena& arena, const Step& s) {
    const int64_t wide_dim = round_up(s.core.dim, WIDTH), wide_value = round_up(s.core.value_dim, WIDTH);
    query = arena.take(wide_dim), key = arena.take(wide_dim);
    value = arena.take(wide_value), out = arena.take(wide_value);
    weights = arena.take(s.core.heads / s.core.kv_heads * (s.state.window + 1));
    rows = arena.take(s.state.window * most(wide_dim, wide_value));
    keys = arena.take(s.core.group * wide_dim), values = arena.take(s.core.group * wide_value);
    state = arena.take((wide_dim + TILE_ROWS) * wide_value);
  }
};

size_t step_scratch(const Step& s) {
  Arena arena{nullptr};
  StepScratch counted(arena, s);
  return arena.used;
}

// Moves the group after `folded` from the rings into `recurrent`.
void fold_group(const Step& s, StepScratch& m, int64_t b, int64_t kv, int64_t folded) {
  const Core& core = s.core;
  const int64_t wide_dim = round_up(core.dim, WIDTH), wide_value = round_up(core.value_dim, WIDTH);
  const int64_t row = folded % s.state.window;  // a group never wraps: the window is a multiple of it
  read_rows(m.keys, wide_dim, s.state.key_window, s.state.window_dtype, b, kv, row, core.group, core.dim);
  read_rows(m.values, wide_value, s.state.value_window, s.state.window_dtype, b, kv, row, core.group,
            core.value_dim);
  read_rows(m.state, wide_value, s.state.recurrent, FLOAT32, b, kv, 0, core.dim, core.value_dim);
  product<COLUMNS, ADD>(m.state, wide_value, m.keys, wide_dim, m.values, wide_value, core.dim, wide_value,
                        core.group);
  write_rows(s.state.recurrent, FLOAT32, b, kv, 0, m.state, wide_value, core.dim, core.value_dim);
}

void step_unit(const Step& s, int64_t unit, float* scratch) {
  const Core& core = s.core;
  Arena arena{scratch};
  StepScratch m(arena, s);
  const int64_t b = unit / core.kv_heads, kv = unit % core.kv_heads, shared = core.heads / core.kv_heads;
  const int64_t wide_value = round_up(core.value_dim, WIDTH), window = s.state.window;
  if (s.active && !s.active[b]) {
    memset(m.out, 0, wide_value * sizeof(float));
    for (int64_t h = 0; h < shared; h++)
      write_rows(s.out, core.dtype, b, kv * shared + h, 0, m.out, wide_value, 1, core.value_dim);
    return;
  }
  const int64_t now = s.state.length[b];
  int64_t folded = s.state.folded[b];
  if (now - folded == window) {
    fold_group(s, m, b, kv, folded);
    folded += core.group;
  }
  read_rows(m.key, 0, s.key, core.dtype, b, kv, 0, 1, core.dim, 0, core.normalize);
  read_rows(m.value, 0, s.value, core.dtype, b, kv, 0, 1, core.value_dim);
  write_rows(s.state.key_window, s.state.window_dtype, b, kv, now % window, m.key, 0, 1, core.dim);
  write_rows(s.state.value_window, s.state.window_dtype, b, kv, now % window, m.value, 0, 1, core.value_dim);

  const int64_t group_start = now - now % core.group;
  // Positions that matter: scored ones, and what the taps reach.
  const int64_t held = now - window + 1;  // no position before this one is in the rings
  const int64_t scored = most(held, core.alpha ? folded : core.local ? group_start : now);
  const int64_t tapped = most(most(0, held), core.conv ? now - core.taps + 1 : now);
  const int64_t first = least(scored, tapped);
  // Without a local part only the taps read the own group: what lies between may be NaN, and is left out.
  const int64_t earlier = core.local ? now : least(now, most(first, group_start));
  for (int64_t h = 0; h < shared; h++) {
    const int64_t head = kv * shared + h;
    const float alpha = core.alpha ? core.alpha[head] : 0, local = core.local ? core.local[head] : 0;
    float* x = m.weights - first;  // by position
    read_rows(m.query, 0, s.query, core.dtype, b, head, 0, 1, core.dim, 0, core.normalize);
    for (int64_t p = first; p <= now; p++) x[p] = 0;
    auto score = [&](const float* keys, int64_t stride, int64_t from, int64_t count) {
      for (int64_t i = 0; i < count; i++) {
        const float product = dot(m.query, keys + i * stride, core.dim);
        const float kept = core.activation == RELU2 && product < 0 ? 0 : product;
        x[from + i] = from + i < group_start ? alpha * product
                                             : local * (core.activation == RELU2 ? kept * kept : product);
      }
    };
    ring_rows(s.state, s.state.key_window, b, kv, scored, earlier, core.dim, m.rows, score);
    if (core.local) score(m.key, 0, now, 1);
    if (core.conv)
      for (int64_t p = tapped; p <= now; p++) x[p] += core.conv[head * core.taps + now - p];
    memset(m.out, 0, wide_value * sizeof(float));
    auto add = [&](const float* values, int64_t stride, int64_t from, int64_t count) {
      add_rows(m.out, x + from, values, stride, count, core.value_dim);
    };
    ring_rows(s.state, s.state.value_window, b, kv, first, earlier, core.value_dim, m.rows, add);
    ring_rows(s.state, s.state.value_window, b, kv, most(earlier, tapped), now, core.value_dim, m.rows, add);
    if (core.local || core.conv) add(m.value, 0, now, 1);
    if (core.alpha && folded > 0) {
      for (int64_t d = 0; d < core.dim; d++) m.query[d] *= alpha;
      add_rows(m.out, m.query, recurrent_of(s.state, b, kv), s.state.recurrent.row, core.dim, core.value_dim);
    }
    write_rows(s.out, core.dtype, b, head, 0, m.out, 0, 1, core.value_dim);
  }
}

struct AppendScratch {
  float *keys, *values, *state, *row;

  AppendScratch(Arena& arena, const Append& a) {
    const int64_t wide_dim = round_up(a.core.dim, WIDTH), wide_value = round_up(a.core.value_dim, WIDTH);
    keys = arena.take(a.core.group * wide_dim), values = arena.take(a.core.group * wide_value);
    state = arena.take((wide_dim + TILE_ROWS) * wide_value);
    row = arena.take(most(wide_dim, wide_value));
  }
};

size_t append_scratch(const Append& a) {
  Arena arena{nullptr};
  AppendScratch counted(arena, a);
  return arena.used;
}

// Writes the new tokens of a row of the batch, after moving into `recurrent` what the rings cannot hold then.
void append_unit(const Append& a, Appended to, int64_t unit, float* scratch) {
  const Core& core = a.core;
  const State& s = a.state;
  Arena arena{scratch};
  AppendScratch m(arena, a);
  const int64_t b = unit / core.kv_heads, kv = unit % core.kv_heads;
  const int64_t wide_dim = round_up(core.dim, WIDTH), wide_value = round_up(core.value_dim, WIDTH);
  const int64_t now = s.length[b], was = s.folded[b];
  const int64_t* path = a.path ? a.path + b * a.steps : nullptr;

  // New tokens are in the order of the path, with gaps.
  int64_t step = 0;
  auto next = [&] {
    if (!path) return step++;
    while (path[step] < 0) step++;
    return path[step++];
  };
  if (to.folded > was)
    read_rows(m.state, wide_value, s.recurrent, FLOAT32, b, kv, 0, core.dim, core.value_dim);
  for (int64_t first = was; first < to.folded; first += core.group) {
    // A group never wraps around the rings, but it may begin there and end with new tokens.
    const int64_t held = most(0, least(core.group, now - first)), row = first % s.window;
    read_rows(m.keys, wide_dim, s.key_window, s.window_dtype, b, kv, row, held, core.dim);
    read_rows(m.values, wide_value, s.value_window, s.window_dtype, b, kv, row, held, core.value_dim);
    for (int64_t i = held; i < core.group; i++) {
      const int64_t token = next();
      read_rows(m.keys + i * wide_dim, 0, a.key, core.dtype, b, kv, token, 1, core.dim, 0, core.normalize);
      read_rows(m.values + i * wide_value, 0, a.value, core.dtype, b, kv, token, 1, core.value_dim);
    }
    product<COLUMNS, ADD>(m.state, wide_value, m.keys, wide_dim, m.values, wide_value, core.dim, wide_value,
                          core.group);
  }
  if (to.folded > was)
    write_rows(s.recurrent, FLOAT32, b, kv, 0, m.state, wide_value, core.dim, core.value_dim);

  step = 0;
  for (int64_t p = now; p < to.length; p++) {
    const int64_t token = next();
    if (p < to.length - s.window) continue;
    read_rows(m.row, 0, a.key, core.dtype, b, kv, token, 1, core.dim, 0, core.normalize);
    write_rows(s.key_window, s.window_dtype, b, kv, p % s.window, m.row, 0, 1, core.dim);
    read_rows(m.row, 0, a.value, core.dtype, b, kv, token, 1, core.value_dim);
    write_rows(s.value_window, s.window_dtype, b, kv, p % s.window, m.row, 0, 1, core.value_dim);
  }
}

struct TreeScratch {
  int64_t nodes, wide_dim, wide_value;
  float *keys, *keys_t, *values, *query, *scores, *out, *state, *same, *earlier;
  int32_t *depth, *ancestors, *ancestors_end;

  TreeScratch(Arena& arena, const Tree& t) {
    wide_dim = round_up(t.core.dim, WIDTH), wide_value = round_up(t.core.value_dim, WIDTH);
    nodes = t.core.length;
    const int64_t columns = round_up(t.state.window + nodes, WIDTH), wide_nodes = round_up(nodes, WIDTH);
    keys = arena.take(columns * wide_dim), keys_t = arena.take(columns * most(wide_dim, wide_value));
    values = arena.take(columns * wide_value);
    query = arena.take((nodes + TILE_ROWS) * wide_dim);
    scores = arena.take(TILE_ROWS * (columns + WIDTH)), out = arena.take((nodes + TILE_ROWS) * wide_value);
    state = arena.take(wide_dim * wide_value);
    same = arena.take(nodes * wide_nodes), earlier = arena.take(nodes * wide_nodes);
    depth = reinterpret_cast<int32_t*>(arena.take(nodes));
    ancestors = reinterpret_cast<int32_t*>(arena.take(nodes * (nodes + 1) / 2));
    ancestors_end = reinterpret_cast<int32_t*>(arena.take(nodes));
  }
};

size_t tree_scratch(const Tree& t) {
  Arena arena{nullptr};
  TreeScratch counted(arena, t);
  return arena.used;
}

// Which nodes a node sees, and how: 1 or 0 for its own group and for earlier ones, and the list of those that
// the taps reach. No node sees a later one.
void tree_tables(const Tree& t, TreeScratch& m, int64_t b, int64_t now) {
  const int64_t n = m.nodes, wide_nodes = round_up(n, WIDTH);
  memset(m.same, 0, n * wide_nodes * sizeof(float));
  memset(m.earlier, 0, n * wide_nodes * sizeof(float));
  int32_t listed = 0;
  for (int64_t u = 0; u < n; u++) {
    m.depth[u] = static_cast<int32_t>(t.depth[b * n + u]);
    const uint8_t* seen = t.ancestors + (b * n + u) * n;
    for (int64_t a = 0; a <= u; a++) {
      if (!seen[a]) continue;
      const bool same = (now + m.depth[u]) / t.core.group == (now + m.depth[a]) / t.core.group;
      (same ? m.same : m.earlier)[u * wide_nodes + a] = 1;
      if (m.depth[u] - m.depth[a] < t.core.taps) m.ancestors[listed++] = static_cast<int32_t>(a);
    }
    m.ancestors_end[u] = listed;
  }
}

// A row of scores (positions first .. now, then nodes) -> weights, for node u.
template <int ACTIVATION>
void weigh_node(const Tree& t, const TreeScratch& m, float* row, int64_t u, int64_t now, int64_t first,
                int64_t folded, int64_t head) {
  auto act = [](float s) { return ACTIVATION == RELU2 ? (s > 0 ? s * s : 0.f) : s; };
  const Core& core = t.core;
  const float alpha = core.alpha ? core.alpha[head] : 0, local = core.local ? core.local[head] : 0;
  const float* taps = core.conv + head * core.taps;
  const int64_t at = now + m.depth[u], group_start = at - at % core.group;
  float* x = row - first;  // by position
  const int64_t linear = least(now, most(first, folded)), own = least(now, most(linear, group_start));
  for (int64_t p = first; p < linear; p++) x[p] = 0;
  for (int64_t p = linear; p < own; p++) x[p] *= alpha;
  for (int64_t p = own; p < now; p++) x[p] = act(x[p]) * local;
  for (int64_t p = most(first, at - core.taps + 1); p < now; p++) x[p] += taps[at - p];
  float* nodes = x + now;
  const float* same = m.same + u * round_up(m.nodes, WIDTH);
  const float* earlier = m.earlier + u * round_up(m.nodes, WIDTH);
  for (int64_t a = 0; a <= u; a += WIDTH) {
    const Vec s = load(nodes + a), kept = ACTIVATION == RELU2 ? positive(s) * s : s;
    store(nodes + a, kept * (load(same + a) * local) + s * (load(earlier + a) * alpha));
  }
  for (int64_t i = u ? m.ancestors_end[u - 1] : 0; i < m.ancestors_end[u]; i++)
    nodes[m.ancestors[i]] += taps[m.depth[u] - m.depth[m.ancestors[i]]];
}

void tree_unit(const Tree& t, int64_t unit, float* scratch) {
  const Core& core = t.core;
  Arena arena{scratch};
  TreeScratch m(arena, t);
  const int64_t b = unit / core.kv_heads, kv = unit % core.kv_heads, shared = core.heads / core.kv_heads;
  const int64_t now = t.state.length[b], folded = t.state.folded[b], n = m.nodes;
  tree_tables(t, m, b, now);

  const int64_t scored = core.alpha ? folded : core.local ? now - now % core.group : now;
  const int64_t first =
      most(most(0, now - t.state.window), least(scored, core.conv ? now - core.taps + 1 : now));
  const int64_t count = now - first, columns = round_up(count + n, WIDTH);
  float* row = m.keys;
  auto copy = [&row](const float* rows, int64_t stride, int64_t some, int64_t width) {
    for (int64_t i = 0; i < some; i++, row += round_up(width, WIDTH))
      for (int64_t d = 0; d < width; d += WIDTH) store(row + d, load_first(rows + i * stride + d, width - d));
  };
  ring_rows(
      t.state, t.state.key_window, b, kv, first, now, core.dim, m.keys_t,
      [&](const float* rows, int64_t stride, int64_t, int64_t some) { copy(rows, stride, some, core.dim); });
  read_rows(row, m.wide_dim, t.key, core.dtype, b, kv, 0, n, core.dim, 0, core.normalize);
  clear_rows(m.keys, m.wide_dim, count + n, columns);
  row = m.values;
  ring_rows(t.state, t.state.value_window, b, kv, first, now, core.value_dim, m.keys_t,
            [&](const float* rows, int64_t stride, int64_t, int64_t some) {
              copy(rows, stride, some, core.value_dim);
            });
  read_rows(row, m.wide_value, t.value, core.dtype, b, kv, 0, n, core.value_dim);
  transpose(m.keys_t, columns, m.keys, m.wide_dim, columns, m.wide_dim);
  const bool linear = core.alpha && folded > 0;
  if (linear)
    read_rows(m.state, m.wide_value, t.state.recurrent, FLOAT32, b, kv, 0, core.dim, core.value_dim);

  for (int64_t h = 0; h < shared; h++) {
    const int64_t head = kv * shared + h;
    read_rows(m.query, m.wide_dim, t.query, core.dtype, b, head, 0, n, core.dim, 0, core.normalize);
    // A few nodes at a time: parents come first, so that what is behind the last of them is never scored.
    for (int64_t u = 0; u < n; u += TILE_ROWS) {
      const int64_t rows = least(TILE_ROWS, n - u), seen = count + u + rows;
      const int64_t width = round_up(seen, WIDTH);
      const float* query = m.query + u * m.wide_dim;
      float* out = m.out + u * m.wide_value;
      product<ROWS, SET>(m.scores, width + WIDTH, query, m.wide_dim, m.keys_t, columns, rows, width,
                         core.dim);
      for (int64_t i = 0; i < rows; i++) {
        float* scores = m.scores + i * (width + WIDTH);
        if (core.activation == RELU2) weigh_node<RELU2>(t, m, scores, u + i, now, first, folded, head);
        else weigh_node<LINEAR>(t, m, scores, u + i, now, first, folded, head);
        for (int64_t a = round_up(u + i + 1, WIDTH); a < u + rows; a++) scores[count + a] = 0;
      }
      product<ROWS, SET>(out, m.wide_value, m.scores, width + WIDTH, m.values, m.wide_value, rows,
                         m.wide_value, seen);
    }
    if (linear) {
      const float alpha = core.alpha[head];
      for (int64_t i = 0; i < n * m.wide_dim; i += WIDTH) store(m.query + i, load(m.query + i) * alpha);
      product<ROWS, ADD>(m.out, m.wide_value, m.query, m.wide_dim, m.state, m.wide_value, n, m.wide_value,
                         core.dim);
    }
    write_rows(t.out, core.dtype, b, head, 0, m.out, m.wide_value, n, core.value_dim);
  }
}

}  // namespace
}  // namespace linearize
