// Gradients, in one walk from the last group to the first. With S as in forward.h, dS the sum of alpha q^T do
// over later groups, and rows j (keys), t (queries) of one group, t >= j:
//
//   p[j, t]  = local act(k[j].q[t]) + w[t - j],   dp[j, t] = v[j].do[t],   ds = local act'(k.q) dp
//   dq[t]    = alpha do[t] S^T  +  ds^T[t] k            dalpha += q.(do S^T)
//   dk[j]    = v[j] dS^T        +  ds[j] q              dlocal += act(k.q) dp
//   dv[j]    = k[j] dS          +  p[j] do  +  sum over later t of w[t - j] do[t]
//   dw[l]   += sums of dp along its diagonals, own group and later ones
//
// There is no decay, so subtracting one group's k^T v from S gives the S before it. Every ANCHOR groups S is
// taken from a forward pass instead, so that the rounding of the subtractions does not grow with the length.
#pragma once
#include <new>

#include "forward.h"

namespace linearize {
namespace {

constexpr int64_t ANCHOR = 64;

struct BackwardSizes : Sizes {
  int64_t later;      // groups after its own that a key's convolution reaches
  int64_t band;       // columns of the sums for dw: the own group and the later ones
  int64_t grad_rows;  // rows of do in sight: the own group and `history` after it
  int64_t anchors;

  BackwardSizes(const Core& core, int64_t piece) : Sizes(core) {
    later = (history + group - 1) / group;
    band = (later + 1) * wide_group;
    grad_rows = wide_group + history + TILE_ROWS;
    anchors = core.alpha ? (piece - 1) / ANCHOR : 0;
  }
};

// What a unit keeps for each of its query heads.
struct HeadScratch {
  float *taps, *grad, *grad_t, *band;
  double dalpha = 0, dlocal = 0;

  HeadScratch(Arena& arena, const BackwardSizes& z, bool conv) {
    taps = arena.take(taps_floats(z)) + taps_margin(z);
    grad = arena.take(z.grad_rows * z.wide_value);
    grad_t = arena.take((z.later + 1) * z.wide_value * z.wide_group);  // slot of group g: g % (later + 1)
    band = conv ? arena.take((z.wide_group + TILE_ROWS) * z.band) : nullptr;
  }
};

struct BackwardScratch {
  float *state_t, *anchors, *dstate, *dstate_t, *keys, *key_scale, *values, *dkeys, *dvalues;
  float *query, *query_scale, *query_t, *dquery, *grad_alpha, *weights, *dweights, *dscores;

  BackwardScratch(Arena& arena, const BackwardSizes& z) {
    const int64_t rows = z.wide_group + TILE_ROWS;
    state_t = arena.take((z.wide_value + TILE_ROWS) * z.wide_dim);
    anchors = arena.take(z.anchors * z.wide_value * z.wide_dim);
    dstate = arena.take((z.wide_dim + TILE_ROWS) * z.wide_value);
    dstate_t = arena.take(z.wide_value * z.wide_dim);
    keys = arena.take(rows * z.wide_dim), key_scale = arena.take(z.wide_group);
    values = arena.take(rows * z.wide_value);
    dkeys = arena.take(rows * z.wide_dim), dvalues = arena.take(rows * z.wide_value);
    query = arena.take(rows * z.wide_dim), query_scale = arena.take(z.wide_group);
    query_t = arena.take(z.wide_dim * z.wide_group), dquery = arena.take(rows * z.wide_dim);
    grad_alpha = arena.take(z.wide_group * z.wide_value);
    weights = arena.take(TILE_ROWS * z.wide_group), dweights = arena.take(TILE_ROWS * z.wide_group);
    dscores = arena.take(rows * z.wide_group);
  }
};

// Scores and dp of keys j0 .. j0+rows and queries first .. last -> p, ds, the sums for dw and dlocal's share.
template <int ACTIVATION>
INLINE float weigh_backward(float* p, const float* dp, float* ds, float* band, int64_t stride,
                            int64_t band_stride, int64_t j0, int64_t rows, int64_t first, int64_t last,
                            float local, const float* taps) {
  const Ints lane = count_up();
  Vec dlocal = {};
  for (int64_t r = 0; r < rows; r++) {
    const int32_t j = static_cast<int32_t>(j0 + r);
    for (int32_t t = static_cast<int32_t>(first); t < last; t += WIDTH) {
      const Ints seen = lane + t >= j;
      const Vec s = load(p + r * stride + t), d = keep(seen, load(dp + r * stride + t));
      Vec act = s, slope = d;
      if constexpr (ACTIVATION == RELU2) {
        const Vec up = positive(s);
        act = up * up, slope = (up + up) * d;
      }
      dlocal += act * d;
      store(ds + r * stride + t, slope * local);
      Vec weight = act * local;
      if (taps) {
        weight = weight + load(taps + t - j);
        float* sums = band + r * band_stride + t;
        store(sums, load(sums) + d);
      }
      store(p + r * stride + t, keep(seen, weight));
    }
  }
  return sum(dlocal);
}

// The gradient of x from that of its unit row, in place; scale is 1 / |x|.
INLINE void through_norm(float* grad, const float* unit, const float* scale, int64_t rows, int64_t wide) {
  for (int64_t i = 0; i < rows; i++, grad += wide, unit += wide) {
    Vec products = {};
    for (int64_t d = 0; d < wide; d += WIDTH) products += load(grad + d) * load(unit + d);
    const float along = sum(products);
    for (int64_t d = 0; d < wide; d += WIDTH)
      store(grad + d, (load(grad + d) - load(unit + d) * along) * scale[i]);
  }
}

// One piece on its walk.
struct BackwardWalk {
  const Backward& f;
  const Core& core;
  const BackwardSizes z;
  BackwardScratch m;
  const Piece piece;
  const int64_t b, kv, shared;
  int64_t start = 0, rows = 0;  // of the group at hand

  BackwardWalk(const Backward& call, Piece part, Arena& arena)
      : f(call),
        core(call.core),
        z(call.core, part.last - part.first),
        m(arena, z),
        piece(part),
        b(part.unit / core.kv_heads),
        kv(part.unit % core.kv_heads),
        shared(core.heads / core.kv_heads) {}

  void open(int64_t g, int64_t next) {
    start = g * z.group, rows = least(z.group, core.length - start);
    read_rows(m.keys, z.wide_dim, f.key, core.dtype, b, kv, start, rows, z.dim, next, core.normalize,
              m.key_scale);
    read_rows(m.values, z.wide_value, f.value, core.dtype, b, kv, start, rows, z.value_dim, next);
    clear_rows(m.keys, z.wide_dim, rows, z.wide_group);
    clear_rows(m.values, z.wide_value, rows, z.wide_group);
  }

  template <Into INTO>
  void fold() {
    product<COLUMNS, INTO>(m.state_t, z.wide_dim, m.values, z.wide_value, m.keys, z.wide_dim, z.value_dim,
                           z.wide_dim, rows);
  }

  size_t state_bytes() const { return z.wide_value * z.wide_dim * sizeof(float); }

  // S every ANCHOR groups, and of the last group in state_t.
  void drop_anchors(const float* before) {
    if (before) memcpy(m.state_t, before, state_bytes());
    else clear_rows(m.state_t, z.wide_dim, 0, z.wide_value);
    for (int64_t g = piece.first; g + 1 < piece.last; g++) {
      open(g, z.group);
      fold<ADD>();
      if (float* kept = anchor(g + 1)) memcpy(kept, m.state_t, state_bytes());
    }
  }
  float* anchor(int64_t g) const {
    const int64_t walked = g - piece.first;
    return walked % ANCHOR ? nullptr : m.anchors + (walked / ANCHOR - 1) * z.wide_value * z.wide_dim;
  }

  // What groups after the piece leave to its convolution.
  void look_ahead(HeadScratch& own, int64_t head) {
    const int64_t end = piece.last * z.group;
    if (end >= core.length) return;
    read_rows(own.grad, z.wide_value, f.grad, core.dtype, b, head, end, least(z.history, core.length - end),
              z.value_dim);
    for (int64_t g = piece.last; g < least(z.groups, piece.last + z.later); g++) {
      const int64_t some = least(z.group, core.length - g * z.group);
      read_rows(m.grad_alpha, z.wide_value, f.grad, core.dtype, b, head, g * z.group, some, z.value_dim);
      clear_rows(m.grad_alpha, z.wide_value, some, z.wide_group);
      transpose(grad_t(own, g), z.wide_group, m.grad_alpha, z.wide_value, z.wide_group, z.wide_value);
    }
  }

  void read_head(HeadScratch& own, int64_t head, int64_t g) {
    read_rows(m.query, z.wide_dim, f.query, core.dtype, b, head, start, rows, z.dim, -z.group, core.normalize,
              m.query_scale);
    clear_rows(m.query, z.wide_dim, rows, z.wide_group);
    if (z.history)
      memmove(own.grad + z.group * z.wide_value, own.grad, z.history * z.wide_value * sizeof(float));
    read_rows(own.grad, z.wide_value, f.grad, core.dtype, b, head, start, rows, z.value_dim, -z.group);
    clear_rows(own.grad, z.wide_value, rows, z.group);
    if (core.local) transpose(m.query_t, z.wide_group, m.query, z.wide_dim, z.wide_group, z.wide_dim);
    if (core.local || core.conv)
      transpose(grad_t(own, g), z.wide_group, own.grad, z.wide_value, z.wide_group, z.wide_value);
  }
  float* grad_t(HeadScratch& own, int64_t g) const {
    return own.grad_t + g % (z.later + 1) * z.wide_value * z.wide_group;
  }

  // dq through S, and dalpha.
  void linear_query(HeadScratch& own, float alpha) {
    product<ROWS, SET>(m.dquery, z.wide_dim, own.grad, z.wide_value, m.state_t, z.wide_dim, rows, z.wide_dim,
                       z.value_dim);
    Vec dalpha = {};
    for (int64_t i = 0; i < rows * z.wide_dim; i += WIDTH) {
      const Vec x = load(m.dquery + i);
      dalpha += x * load(m.query + i);
      store(m.dquery + i, x * alpha);
    }
    own.dalpha += sum(dalpha);
  }

  // What keys j .. j+R of the group owe to the group's queries and to the convolution of later ones.
  template <int R>
  void key_block(HeadScratch& own, int64_t g, int64_t j, float local) {
    const int64_t first = j / WIDTH * WIDTH, last = least(z.wide_group, round_up(rows, WIDTH));
    const float *values = m.values + j * z.wide_value, *keys = m.keys + j * z.wide_dim;
    float *p = m.weights, *dp = m.dweights, *ds = m.dscores + j * z.wide_group;
    float* band = core.conv ? own.band + j * z.band : nullptr;
    float* dvalues = m.dvalues + j * z.wide_value;
    const float* taps = core.conv ? own.taps : nullptr;
    if (core.local) {
      tiles<R, ROWS, SET>(p + first, z.wide_group, keys, z.wide_dim, m.query_t + first, z.wide_group, z.dim,
                          last - first);
      tiles<R, ROWS, SET>(dp + first, z.wide_group, values, z.wide_value, grad_t(own, g) + first,
                          z.wide_group, z.value_dim, last - first);
      auto weigh = core.activation == RELU2 ? weigh_backward<RELU2> : weigh_backward<LINEAR>;
      own.dlocal += weigh(p, dp, ds, band, z.wide_group, z.band, j, R, first, last, local, taps);
      tiles<R, ROWS, ADD>(m.dkeys + j * z.wide_dim, z.wide_dim, ds + j, z.wide_group,
                          m.query + j * z.wide_dim, z.wide_dim, rows - j, z.wide_dim);
      tiles<R, ROWS, ADD>(dvalues, z.wide_value, p + j, z.wide_group, own.grad + j * z.wide_value,
                          z.wide_value, rows - j, z.wide_value);
    } else if (core.conv) {
      tiles<R, BAND, ADD>(dvalues, z.wide_value, taps, 0, own.grad + j * z.wide_value, z.wide_value, rows - j,
                          z.wide_value);
      tiles<R, ROWS, ADD>(band + first, z.band, values, z.wide_value, grad_t(own, g) + first, z.wide_group,
                          z.value_dim, last - first);
    }
    if (!core.conv) return;
    // Later rows with a lag below `taps` from any key of the block, as far as there are any.
    const int64_t reach =
        least(j + R - 1 + z.history - (z.group - 1), least(z.history, core.length - start - rows));
    if (reach > 0)
      tiles<R, BAND, ADD>(dvalues, z.wide_value, taps + z.group - j, 0, own.grad + z.group * z.wide_value,
                          z.wide_value, reach, z.wide_value);
    for (int64_t ahead = 1; ahead <= z.later && g + ahead < z.groups; ahead++) {
      const int64_t columns =
          least(z.wide_group, round_up(j + R - 1 + z.history + 1 - ahead * z.group, WIDTH));
      if (columns > 0)
        tiles<R, ROWS, ADD>(band + ahead * z.wide_group, z.band, values, z.wide_value, grad_t(own, g + ahead),
                            z.wide_group, z.value_dim, columns);
    }
  }

  void run_head(HeadScratch& own, int64_t head, int64_t g) {
    const float alpha = core.alpha ? core.alpha[head] : 0, local = core.local ? core.local[head] : 0;
    read_head(own, head, g);
    if (core.alpha && g > 0) linear_query(own, alpha);
    else clear_rows(m.dquery, z.wide_dim, 0, rows);
    for (int64_t j = 0; j < rows; j += TILE_ROWS)
      with_height(rows - j, [&](auto height) { key_block<decltype(height)::value>(own, g, j, local); });
    if (core.local)
      for (int64_t t = 0; t < rows; t += TILE_ROWS)
        with_height(rows - t, [&](auto height) {
          constexpr int R = decltype(height)::value;
          tiles<R, COLUMNS, ADD>(m.dquery + t * z.wide_dim, z.wide_dim, m.dscores + t, z.wide_group, m.keys,
                                 z.wide_dim, least(t + R, rows), z.wide_dim);
        });
    if (core.normalize) through_norm(m.dquery, m.query, m.query_scale, rows, z.wide_dim);
    write_rows(f.dquery, core.dtype, b, head, start, m.dquery, z.wide_dim, rows, z.dim);
    if (core.alpha && g > piece.first) fold_query(own, alpha);
  }

  void fold_query(const HeadScratch& own, float alpha) {
    for (int64_t i = 0; i < rows * z.wide_value; i += WIDTH)
      store(m.grad_alpha + i, load(own.grad + i) * alpha);
    product<COLUMNS, ADD>(m.dstate, z.wide_value, m.query, z.wide_dim, m.grad_alpha, z.wide_value, z.dim,
                          z.wide_value, rows);
  }

  void run_group(HeadScratch* heads, int64_t g) {
    open(g, -z.group);
    if (core.alpha && g + 1 < piece.last) {
      if (const float* kept = anchor(g + 1)) memcpy(m.state_t, kept, state_bytes());
      fold<SUBTRACT>();
    }
    if (core.alpha && g + 1 < z.groups) {
      transpose(m.dstate_t, z.wide_dim, m.dstate, z.wide_value, z.wide_dim, z.wide_value);
      product<ROWS, SET>(m.dkeys, z.wide_dim, m.values, z.wide_value, m.dstate_t, z.wide_dim, rows,
                         z.wide_dim, z.value_dim);
      product<ROWS, SET>(m.dvalues, z.wide_value, m.keys, z.wide_dim, m.dstate, z.wide_value, rows,
                         z.wide_value, z.dim);
    } else {
      clear_rows(m.dkeys, z.wide_dim, 0, rows);
      clear_rows(m.dvalues, z.wide_value, 0, rows);
    }
    for (int64_t h = 0; h < shared; h++) run_head(heads[h], kv * shared + h, g);
    if (core.normalize) through_norm(m.dkeys, m.keys, m.key_scale, rows, z.wide_dim);
    write_rows(f.dkey, core.dtype, b, kv, start, m.dkeys, z.wide_dim, rows, z.dim);
    write_rows(f.dvalue, core.dtype, b, kv, start, m.dvalues, z.wide_value, rows, z.value_dim);
  }

  void finish_head(const HeadScratch& own, float* share) const {
    share[0] = static_cast<float>(own.dalpha);
    share[1] = static_cast<float>(own.dlocal);
    for (int64_t l = 0; core.conv && l < core.taps; l++) {
      double total = 0;
      for (int64_t j = 0; j < z.group; j++)
        total += own.band[j * z.band + (j + l) / z.group * z.wide_group + (j + l) % z.group];
      share[2 + l] = static_cast<float>(total);
    }
  }
};

size_t backward_scratch(const Backward& f, int64_t groups) {
  Arena arena{nullptr};
  const BackwardSizes z(f.core, groups);
  BackwardScratch counted(arena, z);
  const int64_t shared = f.core.heads / f.core.kv_heads;
  for (int64_t h = 0; h < shared; h++) HeadScratch head(arena, z, f.core.conv);
  arena.take(shared * sizeof(HeadScratch) / sizeof(float));
  return arena.used;
}

void backward_sums(const Backward& f, Piece piece, float* total, float* dtotal, float* scratch) {
  Arena arena{scratch};
  BackwardWalk walk(f, piece, arena);
  const BackwardSizes& z = walk.z;
  HeadScratch own(arena, z, false);
  clear_rows(walk.m.state_t, z.wide_dim, 0, z.wide_value);
  clear_rows(walk.m.dstate, z.wide_value, 0, z.dim);
  for (int64_t g = piece.first; g < piece.last; g++) {
    walk.open(g, z.group);
    walk.fold<ADD>();
    for (int64_t h = 0; h < walk.shared; h++) {
      const int64_t head = walk.kv * walk.shared + h;
      read_rows(walk.m.query, z.wide_dim, f.query, f.core.dtype, walk.b, head, walk.start, walk.rows, z.dim,
                z.group, f.core.normalize);
      read_rows(own.grad, z.wide_value, f.grad, f.core.dtype, walk.b, head, walk.start, walk.rows,
                z.value_dim, z.group);
      walk.fold_query(own, f.core.alpha[head]);
    }
  }
  memcpy(total, walk.m.state_t, walk.state_bytes());
  memcpy(dtotal, walk.m.dstate, walk.state_bytes());
}

void backward_piece(const Backward& f, Piece piece, const float* before, const float* after, float* shares,
                    float* scratch) {
  Arena arena{scratch};
  BackwardWalk walk(f, piece, arena);
  const Core& core = f.core;
  HeadScratch* heads =
      reinterpret_cast<HeadScratch*>(arena.take(walk.shared * sizeof(HeadScratch) / sizeof(float)));
  for (int64_t h = 0; h < walk.shared; h++) {
    HeadScratch& own = *new (heads + h) HeadScratch(arena, walk.z, core.conv);
    if (!core.conv) continue;
    memcpy(own.taps, core.conv + (walk.kv * walk.shared + h) * core.taps, core.taps * sizeof(float));
    clear_rows(own.band, walk.z.band, 0, walk.z.group);
    walk.look_ahead(own, walk.kv * walk.shared + h);
  }
  if (after) memcpy(walk.m.dstate, after, walk.state_bytes());
  else clear_rows(walk.m.dstate, walk.z.wide_value, 0, walk.z.dim);
  if (core.alpha) walk.drop_anchors(before);
  for (int64_t g = piece.last; g-- > piece.first;) walk.run_group(heads, g);
  for (int64_t h = 0; h < walk.shared; h++) walk.finish_head(heads[h], shares + h * (2 + core.taps));
}

}  // namespace
}  // namespace linearize
