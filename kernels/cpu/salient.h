// Exact attention to the last, the first and the salient tokens, after a state of a constant size. What is seen
// and what is kept is said in kernels/salient.py, whose state this is, without room to take tokens back: the ring
// has window + BLOCK rows, and the weights of a block of queries have one row of `votes`.
//
// One unit is a (batch, kv head). Its tokens come in spans, each within one block of positions, which ends where
// other tokens are chosen. A long span is two products, of queries and keys and of weights and values; a short one
// reads every row that it sees.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "decode.h"

namespace linearize {
namespace {

constexpr int64_t SALIENT_DELAY = 64;
constexpr float SALIENT_DECAY = 0.9f;
constexpr int32_t UNSEEN = std::numeric_limits<int32_t>::max();
constexpr int64_t SHORT_SPAN = 12;  // rows of queries that are faster one by one
constexpr int64_t SHORT_TAIL = 4;   // tokens

constexpr float LOG2_E = 1.44269504f, LOG2_E_REST = 1.925963033e-8f;  // the sum is closer

// e^x for x <= 0, to 2 units in the last place; 0 below -87. What is not a number stays so.
INLINE Vec exp_negative(Vec x) {
  const Vec magic = Vec{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vec rounded = x * LOG2_E + magic;
  Vec r = x * LOG2_E - (rounded - magic);
  r = r + x * LOG2_E_REST;
  Vec p = Vec{} + 1.535336188319500e-4f;  // 2^r: Cephes' exp2f
  p = p * r + 1.339887440266574e-3f;
  p = p * r + 9.618437357674640e-3f;
  p = p * r + 5.550332471162809e-2f;
  p = p * r + 2.402264791363012e-1f;
  p = p * r + 6.931472028550421e-1f;
  p = p * r + 1.0f;
  const Vec power = (Vec)(((Ints)rounded - ((Ints)magic - 127)) << 23);
  return x < -87.0f ? Vec{} : p * power;
}

// Scores [n], n a multiple of WIDTH -> c tanh(score / c), in place. What is not a number stays so.
void cap(float* scores, int64_t n, float c) {
  for (int64_t l = 0; l < n; l += WIDTH) {
    const Vec x = load(scores + l), e = exp_negative((x < 0.0f ? x : -x) * (2 / c));
    const Vec y = c * (1.0f - e) / (1.0f + e);
    store(scores + l, x < 0.0f ? -y : y);
  }
}

INLINE Ints load_ints(const int32_t* p) {
  typedef int32_t IntsAnywhere __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
  return *reinterpret_cast<const IntsAnywhere*>(p);
}

// Scores [padded] of one query at offset `own` -> weights, in place; what lies at a later one gets none. False,
// and nothing said of the weights, where a score that counts is not finite.
bool soften(const float* seen_at, int64_t padded, float* row, int64_t own) {
  const int32_t* at = reinterpret_cast<const int32_t*>(seen_at);
  const Ints here = Ints{} + static_cast<int32_t>(own);
  const Vec least_score = Vec{} + std::numeric_limits<float>::lowest();
  Vec most_of_all = least_score;
  Ints odd = {};
  for (int64_t l = 0; l < padded; l += WIDTH) {
    const Ints sees = load_ints(at + l) <= here;
    const Vec x = sees ? load(row + l) : least_score;
    store(row + l, x);
    most_of_all = x > most_of_all ? x : most_of_all;
    odd |= ~(x - x == Vec{});  // infinite, or NaN
  }
  int32_t any = 0;
  for (int i = 0; i < WIDTH; i++) any |= odd[i];
  if (any) return false;
  const float top = largest(most_of_all);
  Vec total = {};
  for (int64_t l = 0; l < padded; l += WIDTH) {
    const Vec x = keep(load_ints(at + l) <= here, exp_negative(load(row + l) - top));
    store(row + l, x);
    total += x;
  }
  const float inverse = 1 / sum(total);
  for (int64_t l = 0; l < padded; l += WIDTH) store(row + l, load(row + l) * inverse);
  return true;
}

// Whether weights [n] say anything: they are zero until they are fitted or trained.
INLINE bool speak(const float* weights, int64_t n) {
  return weights && std::any_of(weights, weights + n, [](float w) { return w != 0; });
}

// What kernels/salient_tail.py adds: the columns of a head's weights [value_dim, columns], these turned, and
// share (A q + B o + c) added to rows o [count] of the head. joined and added have TILE_ROWS rows more than count.
template <class Sizes>
int64_t estimate_columns(const Sizes& s) {
  return s.dim + s.value_dim + 1;
}

template <class Sizes>
void turn_estimate(float* to, int64_t width, const float* weights, int64_t head, const Sizes& s) {
  const int64_t columns = estimate_columns(s);
  const float* from = weights + head * s.value_dim * columns;
  for (int64_t c = 0; c < columns; c++)
    for (int64_t d = 0; d < width; d++) to[c * width + d] = d < s.value_dim ? from[d * columns + c] : 0;
}

template <class Sizes>
void add_estimate(float* out, int64_t width, const float* asked, int64_t depth, int64_t count, float share,
                  const float* turned, float* joined, float* added, const Sizes& s) {
  const int64_t columns = estimate_columns(s);
  for (int64_t i = 0; i < count; i++) {
    float* row = joined + i * columns;
    std::copy(asked + i * depth, asked + i * depth + s.dim, row);
    std::copy(out + i * width, out + i * width + s.value_dim, row + s.dim);
    row[columns - 1] = 1;
  }
  product<ROWS, SET>(added, width, joined, columns, turned, width, count, width, columns);
  for (int64_t i = 0; i < count * width; i += WIDTH) store(out + i, load(out + i) + share * load(added + i));
}

// The working memory of one unit, and what it holds of the state as rows of floats.
struct SalientUnit {
  const Salient& s;
  int64_t b, h, slot, first;                   // slot: row of the state's tensors; first: of its tokens
  int64_t rows, padded, depth, width, shared;  // rows of the state; padded: sizes as multiples of WIDTH
  float *keys, *values, *turned, *queries, *scores, *outputs, *seen_at;
  float *moved, *rank, *spare, *tail, *joined, *added;
  int64_t* order;
  int64_t key_stride, value_stride;
  bool in_place_keys, in_place_values;

  SalientUnit(const Salient& s, int64_t unit, Arena& arena)
      : s(s), b(unit / s.kv_heads), h(unit % s.kv_heads), slot(s.slot(b)), first(s.first ? s.first[b] : 0) {
    rows = s.kept() + s.ring();
    padded = round_up(rows, WIDTH);
    depth = round_up(s.dim, WIDTH);
    width = round_up(s.value_dim, WIDTH);
    shared = s.heads / s.kv_heads;
    const int64_t most_rows = round_up(shared * least(s.length, SALIENT_BLOCK), TILE_ROWS) + TILE_ROWS;
    in_place_keys = s.state_dtype == FLOAT32 && s.dim % WIDTH == 0;
    in_place_values = s.state_dtype == FLOAT32 && s.value_dim % WIDTH == 0;
    keys = arena.take(in_place_keys ? 0 : padded * depth);
    values = arena.take(in_place_values ? 0 : padded * width);
    turned = arena.take(shared * least(s.length, SALIENT_BLOCK) > SHORT_SPAN ? depth * padded : 0);
    queries = arena.take(most_rows * depth);
    scores = arena.take(most_rows * padded);
    outputs = arena.take(most_rows * width);
    seen_at = arena.take(padded);
    spare = arena.take(most(most(depth, width), 2 * WIDTH * WIDTH));
    const bool long_tail = s.tail && least(s.length, SALIENT_BLOCK) > SHORT_TAIL;
    tail = arena.take(long_tail ? shared * tail_columns() * width : 0);
    joined = arena.take(s.tail ? (SALIENT_BLOCK + TILE_ROWS) * tail_columns() : 0);
    added = arena.take(s.tail ? (SALIENT_BLOCK + TILE_ROWS) * width : 0);
    moved = arena.take(s.kept() * most(most(s.dim, s.value_dim), 1));
    rank = arena.take(s.kept() + SALIENT_BLOCK);
    order = reinterpret_cast<int64_t*>(arena.take(2 * (s.kept() + SALIENT_BLOCK)));
    key_stride = depth, value_stride = width;
  }

  void open() {
    if (in_place_keys) {
      keys = reinterpret_cast<float*>(row_of(s.keys, FLOAT32, slot, h, 0));
      key_stride = s.keys.row;
    }
    if (in_place_values) {
      values = reinterpret_cast<float*>(row_of(s.values, FLOAT32, slot, h, 0));
      value_stride = s.values.row;
    }
    refresh(0, rows);
    if (!s.tail || least(s.length, SALIENT_BLOCK) <= SHORT_TAIL) return;
    for (int64_t r = 0; r < shared; r++)
      turn_estimate(tail + r * tail_columns() * width, width, s.tail, h * shared + r, s);
  }

  int64_t tail_columns() const { return estimate_columns(s); }
  const float* tail_of(int64_t head) const { return s.tail + head * s.value_dim * tail_columns(); }

  // Copies of state rows, where the state itself cannot be read.
  void refresh(int64_t from, int64_t to) {
    if (!in_place_keys)
      read_rows(keys + from * key_stride, key_stride, s.keys, s.state_dtype, slot, h, from, to - from, s.dim);
    if (!in_place_values)
      read_rows(values + from * value_stride, value_stride, s.values, s.state_dtype, slot, h, from, to - from,
                s.value_dim);
  }

  float* state_scores() const { return s.scores + slot * s.scores_row + h * rows; }
  float* votes(int64_t row) const { return s.votes + slot * s.votes_row + (h * s.vote_rows + row) * rows; }

  // The tokens are kept that the block after `block` is to see.
  void advance(int64_t block) {
    const int64_t kept = s.kept(), counted = block - SALIENT_DELAY / SALIENT_BLOCK;
    float* score = state_scores();
    const float* given = counted >= 0 ? votes(counted % s.vote_rows) : nullptr;
    for (int64_t l = 0; l < rows; l++) score[l] = score[l] * SALIENT_DECAY + (given ? given[l] : 0.0f);
    const int64_t leaving = block * SALIENT_BLOCK - s.window;
    std::copy(score, score + kept, rank);
    for (int64_t i = 0; i < SALIENT_BLOCK; i++) {
      const int64_t position = leaving + i;
      constexpr float infinite = std::numeric_limits<float>::infinity();
      rank[kept + i] = position < 0 ? -infinite : position < s.sinks ? infinite : score[row_at(position)];
    }
    for (int64_t i = 0; i < kept + SALIENT_BLOCK; i++) order[i] = i;
    // Stable, so that among equals the longest kept stays, as in kernels/salient.py.
    std::stable_sort(order, order + kept + SALIENT_BLOCK,
                     [&](int64_t x, int64_t y) { return rank[x] > rank[y]; });
    for (int64_t i = 0; i < kept; i++) {
      score[i] = rank[order[i]];
      if (order[i] >= kept) order[i] = row_at(leaving + order[i] - kept);  // a row of the state from here on
    }
    move(s.keys, s.dim);
    move(s.values, s.value_dim);
    for (int64_t v = 0; v < s.vote_rows; v++) {
      float* row = votes(v);
      for (int64_t i = 0; i < kept; i++) moved[i] = row[order[i]];
      std::copy(moved, moved + kept, row);
    }
    std::fill_n(votes((block + 1) % s.vote_rows), rows, 0.0f);
    refresh(0, kept);
  }

  // Kept rows of a part of the state become those that `order` names.
  void move(const Tensor& x, int64_t columns) {
    const int64_t size = columns * element_size(s.state_dtype);
    char* to = reinterpret_cast<char*>(moved);
    for (int64_t i = 0; i < s.kept(); i++) memcpy(to + i * size, row_of(x, s.state_dtype, slot, h, order[i]), size);
    for (int64_t i = 0; i < s.kept(); i++) memcpy(row_of(x, s.state_dtype, slot, h, i), to + i * size, size);
  }

  int64_t row_at(int64_t position) const {
    const int64_t ring = s.ring(), place = position % ring;
    return s.kept() + (place < 0 ? place + ring : place);
  }

  // The row of the token before that in a row of the ring.
  int64_t row_before(int64_t row) const { return row == s.kept() ? rows - 1 : row - 1; }

  // Tokens `from` .. `from + count` of the call become positions `length` and on.
  void write(int64_t from, int64_t count, int64_t length) {
    float* score = state_scores();
    for (int64_t i = 0; i < count; i++) {
      const int64_t row = row_at(length + i);
      copy_row(s.keys, s.key, row, from + i, s.dim);
      copy_row(s.values, s.value, row, from + i, s.value_dim);
      score[row] = 0;
      for (int64_t v = 0; v < s.vote_rows; v++) votes(v)[row] = 0;
      refresh(row, row + 1);
    }
  }

  void copy_row(const Tensor& to, const Tensor& from, int64_t row, int64_t token, int64_t columns) {
    char* place = row_of(to, s.state_dtype, slot, h, row);
    const char* source = row_of(from, s.dtype, b, h, first + token);
    if (s.state_dtype == s.dtype) {
      memcpy(place, source, columns * element_size(s.dtype));
      return;
    }
    read_rows(spare, round_up(columns, WIDTH), from, s.dtype, b, h, first + token, 1, columns);
    write_rows(to, s.state_dtype, slot, h, row, spare, round_up(columns, WIDTH), 1, columns);
  }

  // At which offset from `start` a query must stand to see each row, `start` being the first position of the
  // block: kept rows at any, a row of the ring at its own token's.
  void look(int64_t block, int64_t length) {
    int32_t* at = reinterpret_cast<int32_t*>(seen_at);
    const float* score = state_scores();
    const int64_t kept = s.kept(), ring = s.ring(), start = block * SALIENT_BLOCK, last = length - 1;
    for (int64_t l = 0; l < kept; l++)
      at[l] = score[l] == -std::numeric_limits<float>::infinity() ? UNSEEN : -1;
    int64_t row = row_at(last);
    for (int64_t back = 0; back < ring; back++, row = row_before(row)) {
      const int64_t position = last - back;
      const bool near = position >= 0 && position >= start - s.window;
      at[row] = near ? static_cast<int32_t>(most(position - start, -1)) : UNSEEN;
    }
    for (int64_t l = rows; l < padded; l++) at[l] = UNSEEN;
  }

  // Outputs of tokens `from` .. `from + count`, which are in the ring at positions `length` and on.
  void attend(int64_t from, int64_t count, int64_t block, int64_t length) {
    const int64_t queries_in_all = shared * count;
    for (int64_t r = 0; r < shared; r++)
      read_rows(queries + r * count * depth, depth, s.query, s.dtype, b, h * shared + r, first + from, count, s.dim);
    for (int64_t i = 0; i < queries_in_all * depth; i += WIDTH) store(queries + i, load(queries + i) * static_cast<float>(s.scale));
    look(block, length + count);
    if (queries_in_all <= SHORT_SPAN) score_each(queries_in_all);
    else score_all(queries_in_all);
    if (s.softcap) cap(scores, queries_in_all * padded, static_cast<float>(s.softcap));
    const int64_t start = length - block * SALIENT_BLOCK;
    float* vote = votes(block % s.vote_rows);
    for (int64_t q = 0; q < queries_in_all; q++) {
      float* weight = scores + q * padded;
      const int64_t own = start + q % count;
      if (!soften(seen_at, padded, weight, own) && !soften_in_double(q, own)) continue;  // NaN gives no votes
      for (int64_t l = 0; l < rows; l++) vote[l] += weight[l];
    }
    product<ROWS, SET>(outputs, width, scores, padded, values, value_stride, queries_in_all, width, rows);
    // 0 * NaN is NaN: a query that does not see a value must get nothing from it.
    for (int64_t q = 0; q < queries_in_all; q++)
      if (!is_finite(outputs + q * width)) gather_seen(q, start + q % count);
    for (int64_t r = 0; r < shared; r++) {
      float* rows_of_head = outputs + r * count * width;
      if (s.taps) convolve(rows_of_head, h * shared + r, count, length);
      if (s.tail) add_tail(rows_of_head, r, count, block);
      write_rows(s.out, FLOAT32, b, h * shared + r, first + from, rows_of_head, width, count, s.value_dim);
    }
  }

  // Products of WIDTH keys at a time: their sums over lanes are sums of vectors once turned.
  void score_each(int64_t count) {
    for (int64_t l = 0; l < padded; l += WIDTH) {
      const int64_t here = least(WIDTH, rows - l);
      for (int64_t q = 0; q < count; q++) {
        float* partial = spare;
        float* sums = spare + WIDTH * WIDTH;
        for (int64_t r = 0; r < WIDTH; r++) {
          Vec total = {};
          for (int64_t i = 0; r < here && i < depth; i += WIDTH)
            total += load(queries + q * depth + i) * load(keys + (l + r) * key_stride + i);
          store(partial + r * WIDTH, total);
        }
        transpose_block(sums, WIDTH, partial, WIDTH);
        Vec score = {};
        for (int64_t r = 0; r < WIDTH; r++) score += load(sums + r * WIDTH);
        store(scores + q * padded + l, score);
      }
    }
  }

  void score_all(int64_t count) {
    const int64_t whole = rows / WIDTH * WIDTH;
    transpose(turned, padded, keys, key_stride, whole, depth);
    for (int64_t l = whole; l < padded; l++)
      for (int64_t i = 0; i < depth; i++) turned[i * padded + l] = l < rows ? keys[l * key_stride + i] : 0;
    product<ROWS, SET>(scores, padded, queries, depth, turned, padded, count, padded, depth);
  }

  // The output of query q at offset `own`, of the rows that it sees alone.
  void gather_seen(int64_t q, int64_t own) {
    const int32_t* at = reinterpret_cast<const int32_t*>(seen_at);
    for (int64_t i = 0; i < width; i += WIDTH) {
      Vec total = {};
      for (int64_t l = 0; l < rows; l++)
        if (at[l] <= own) total += scores[q * padded + l] * load(values + l * value_stride + i);
      store(outputs + q * width + i, total);
    }
  }

  bool is_finite(const float* row) const {
    Ints odd = {};
    for (int64_t i = 0; i < width; i += WIDTH) odd |= ~(load(row + i) - load(row + i) == Vec{});
    int32_t any = 0;
    for (int i = 0; i < WIDTH; i++) any |= odd[i];
    return !any;
  }

  // The weights of query q, whose scores are not all finite in float. False where they are NaN.
  bool soften_in_double(int64_t q, int64_t own) {
    const int32_t* at = reinterpret_cast<const int32_t*>(seen_at);
    const float* query = queries + q * depth;
    float* weight = scores + q * padded;
    auto score = [&](int64_t l) {
      double total = 0;
      for (int64_t i = 0; i < s.dim; i++) total += static_cast<double>(query[i]) * keys[l * key_stride + i];
      return s.softcap ? s.softcap * std::tanh(total / s.softcap) : total;
    };
    double top = -std::numeric_limits<double>::infinity(), total = 0;
    bool defined = true;
    for (int64_t l = 0; l < rows; l++) {
      if (at[l] > own) continue;
      const double x = score(l);
      defined = defined && x < std::numeric_limits<double>::infinity();
      top = x > top ? x : top;
    }
    defined = defined && top > -std::numeric_limits<double>::infinity();
    for (int64_t l = 0; l < padded; l++) {
      const bool sees = at[l] <= own;
      const double x = !sees ? 0 : defined ? std::exp(score(l) - top) : std::numeric_limits<double>::quiet_NaN();
      weight[l] = static_cast<float>(x);
      total += x;
    }
    if (!defined) return false;
    for (int64_t l = 0; l < rows; l++) weight[l] = static_cast<float>(weight[l] / total);
    return true;
  }

  // Adds the convolution over values to rows [count] of a head.
  void convolve(float* out, int64_t head, int64_t count, int64_t length) {
    const float* weight = s.conv + head * s.taps;
    if (!speak(weight, s.taps)) return;
    for (int64_t i = 0; i < count; i++) {
      const int64_t newest = row_at(length + i), taps = least(s.taps, length + i + 1);
      for (int64_t j = 0; j < width; j += WIDTH) {
        Vec total = load(out + i * width + j);
        int64_t row = newest;
        for (int64_t k = 0; k < taps; k++, row = row_before(row))
          total += weight[k] * load(values + row * value_stride + j);
        store(out + i * width + j, total);
      }
    }
  }

  // Adds log(1 + n / E) (A q + B o + c) to rows o [count] of a head; see kernels/salient_tail.py.
  void add_tail(float* out, int64_t r, int64_t count, int64_t block) {
    const int64_t dropped = block * SALIENT_BLOCK - s.window - s.kept(), columns = tail_columns();
    if (dropped <= 0) return;
    const float share = std::log1p(static_cast<float>(dropped) / most(s.window + s.kept(), 1));
    const float* asked = queries + r * count * depth;
    if (count <= SHORT_TAIL) {
      for (int64_t i = 0; i < count; i++) {
        for (int64_t d = 0; d < s.value_dim; d++) {
          const float* weight = tail_of(h * shared + r) + d * columns;
          added[d] = dot(asked + i * depth, weight, s.dim) + dot(out + i * width, weight + s.dim, s.value_dim) +
                     weight[columns - 1];
        }
        for (int64_t d = 0; d < s.value_dim; d++) out[i * width + d] += share * added[d];
      }
      return;
    }
    add_estimate(out, width, asked, depth, count, share, tail + r * columns * width, joined, added, s);
  }
};

size_t salient_scratch(const Salient& s) {
  Arena arena{nullptr};
  SalientUnit unit(s, 0, arena);
  return arena.used;
}

void salient_unit(const Salient& s, int64_t index, float* scratch) {
  Arena arena{scratch};
  SalientUnit unit(s, index, arena);
  int64_t length = s.length_of(unit.b), block = s.block_of(unit.b), from = 0;
  const int64_t count = s.count ? s.count[unit.b] : s.length;
  unit.open();
  while (from < count) {
    while (length / SALIENT_BLOCK > block) unit.advance(block++);
    const int64_t span = least(count - from, SALIENT_BLOCK - length % SALIENT_BLOCK);
    unit.write(from, span, length);
    unit.attend(from, span, block, length);
    length += span, from += span;
  }
}

}  // namespace
}  // namespace linearize
