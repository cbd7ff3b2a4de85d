// Compiled once per instruction set, with its flags and -DKERNELS=its name.
#include "rolling.h"

#include "decode.h"

namespace linearize {
namespace {

// Where the state is before some tokens: in the past's tensors, then in the present's.
struct Held {
  Tensor recurrent, window;
};

struct RollingScratch {
  int64_t wide_dim, wide_value;
  int64_t before, staged;  // rows of a staged sequence: whole groups before the open one, all
  float *query, *key, *value, *weights, *out, *keys, *values;
  float *queries, *outs, *state, *sum, *forward;
  size_t forward_floats;

  RollingScratch(Arena& arena, const Rolling& r) {
    const Core& core = r.core;
    const int64_t shared = core.heads / core.kv_heads;
    wide_dim = round_up(core.dim, WIDTH), wide_value = round_up(core.value_dim, WIDTH);
    before = most(1, (core.taps - 1 + core.group - 1) / core.group) * core.group;
    staged = before + core.group + round_up(core.taps - 1, core.group);
    query = arena.take(wide_dim), key = arena.take(wide_dim), value = arena.take(wide_value);
    weights = arena.take(r.rows + 1), out = arena.take(wide_value);
    const int64_t rows = most(staged, r.rows);
    keys = arena.take(rows * wide_dim), values = arena.take(rows * wide_value);
    if (core.length == 1) return;  // `roll_token` needs no more
    queries = arena.take(shared * staged * wide_dim), outs = arena.take(shared * staged * wide_value);
    state = arena.take((wide_dim + TILE_ROWS) * wide_value);
    sum = arena.take((wide_dim + TILE_ROWS) * wide_value);
    Forward longest{};
    longest.core = core;
    longest.core.length = staged;
    forward_floats = forward_scratch(longest);
    forward = arena.take(forward_floats);
  }
};

size_t rolling_scratch(const Rolling& r) {
  Arena arena{nullptr};
  RollingScratch counted(arena, r);
  return arena.used;
}

// The head's rows from row t on, as a tensor of one batch row whose first head and row they are.
Tensor from(const Tensor& x, int64_t dtype, int64_t b, int64_t h, int64_t t) {
  return {row_of(x, dtype, b, h, t), 0, x.head, x.row};
}

Tensor value_columns(const Rolling& r, const Tensor& window) {
  Tensor x = window;
  x.data = static_cast<char*>(x.data) + r.core.dim * element_size(r.core.dtype);
  return x;
}

// state += k^T v over `count` rows; keys and values are scratch for as many.
void add_products(const Rolling& r, float* state, const Tensor& key, const Tensor& value, int64_t b,
                  int64_t kv, int64_t first, int64_t count, bool normalize, float* keys, float* values) {
  const Core& core = r.core;
  const int64_t wide_dim = round_up(core.dim, WIDTH), wide_value = round_up(core.value_dim, WIDTH);
  if (count <= 0) return;
  read_rows(keys, wide_dim, key, core.dtype, b, kv, first, count, core.dim, 0, normalize);
  read_rows(values, wide_value, value, core.dtype, b, kv, first, count, core.value_dim);
  product<COLUMNS, ADD>(state, wide_value, keys, wide_dim, values, wide_value, core.dim, wide_value, count);
}

// The window after `count` new tokens, the first of them token t; it may be where the past one is.
void roll_window(const Rolling& r, RollingScratch& m, const Tensor& past, int64_t b, int64_t kv, int64_t t,
                 int64_t count) {
  const Core& core = r.core;
  const int64_t row = r.window.row * element_size(core.dtype), fresh = least(count, r.rows);
  char* to = row_of(r.window, core.dtype, b, kv, 0);
  memmove(to, row_of(past, core.dtype, b, kv, fresh), (r.rows - fresh) * row);
  const Tensor values = value_columns(r, r.window);
  for (int64_t i = r.rows - fresh; i < r.rows; i++) {
    const int64_t token = t + count - r.rows + i;
    read_rows(m.key, 0, r.key, core.dtype, b, kv, token, 1, core.dim, 0, core.normalize);
    read_rows(m.value, 0, r.value, core.dtype, b, kv, token, 1, core.value_dim);
    write_rows(r.window, core.dtype, b, kv, i, m.key, 0, 1, core.dim);
    write_rows(values, core.dtype, b, kv, i, m.value, 0, 1, core.value_dim);
  }
}

// One token: one row of weights over the window and itself, and what the sum of older tokens gives.
void roll_token(const Rolling& r, RollingScratch& m, const Held& past, int64_t b, int64_t kv, int64_t t,
                int64_t length) {
  const Core& core = r.core;
  const int64_t shared = core.heads / core.kv_heads;
  read_rows(m.key, 0, r.key, core.dtype, b, kv, t, 1, core.dim, 0, core.normalize);
  read_rows(m.value, 0, r.value, core.dtype, b, kv, t, 1, core.value_dim);
  // Rows of the window that are tokens; those from `open` on are of the token's own group.
  const int64_t first = most(0, r.rows - length), open = r.rows - length % core.group;
  const float *keys, *values;
  int64_t key_stride, value_stride;
  if (core.dtype == FLOAT32) {
    keys = reinterpret_cast<const float*>(row_of(past.window, FLOAT32, b, kv, 0));
    values = keys + core.dim;
    key_stride = value_stride = past.window.row;
  } else {
    keys = m.keys, values = m.values, key_stride = m.wide_dim, value_stride = m.wide_value;
    read_rows(m.keys, m.wide_dim, past.window, core.dtype, b, kv, 0, r.rows, core.dim);
    read_rows(m.values, m.wide_value, value_columns(r, past.window), core.dtype, b, kv, 0, r.rows,
              core.value_dim);
  }
  const float* sums = reinterpret_cast<const float*>(row_of(past.recurrent, FLOAT32, b, kv, 0));
  float* x = m.weights;
  for (int64_t head = kv * shared; head < (kv + 1) * shared; head++) {
    const float alpha = core.alpha[head], local = core.local[head];
    const float* taps = core.conv + head * core.taps;
    read_rows(m.query, 0, r.query, core.dtype, b, head, t, 1, core.dim, 0, core.normalize);
    auto own = [&](float s) { return local * (core.activation == RELU2 ? (s > 0 ? s * s : 0) : s); };
    for (int64_t i = first; i < open; i++) x[i] = alpha * dot(m.query, keys + i * key_stride, core.dim);
    for (int64_t i = most(first, open); i < r.rows; i++)
      x[i] = own(dot(m.query, keys + i * key_stride, core.dim));
    x[r.rows] = own(dot(m.query, m.key, core.dim));
    for (int64_t i = most(first, r.rows - core.taps + 1); i <= r.rows; i++) x[i] += taps[r.rows - i];
    memset(m.out, 0, m.wide_value * sizeof(float));
    add_rows(m.out, x + first, values + first * value_stride, value_stride, r.rows - first, core.value_dim);
    add_rows(m.out, x + r.rows, m.value, 0, 1, core.value_dim);
    for (int64_t d = 0; d < core.dim; d++) m.query[d] *= alpha;
    add_rows(m.out, m.query, sums, past.recurrent.row, core.dim, core.value_dim);
    write_rows(r.out, core.dtype, b, head, t, m.out, 0, 1, core.value_dim);
  }
  // The oldest row leaves the window for the sum.
  read_rows(m.key, 0, past.window, core.dtype, b, kv, 0, 1, core.dim);
  read_rows(m.value, 0, value_columns(r, past.window), core.dtype, b, kv, 0, 1, core.value_dim);
  float* to = reinterpret_cast<float*>(row_of(r.recurrent, FLOAT32, b, kv, 0));
  for (int64_t d = 0; d < core.dim; d++, sums += past.recurrent.row, to += r.recurrent.row) {
    int64_t c = 0;
    for (; c + WIDTH <= core.value_dim; c += WIDTH)
      store(to + c, load(sums + c) + m.key[d] * load(m.value + c));
    for (; c < core.value_dim; c++) to[c] = sums[c] + m.key[d] * m.value[c];
  }
}

// Groups first .. last of f, from the sum in `state`, which becomes the sum before group `last`.
void forward_groups(const Forward& f, RollingScratch& m, int64_t first, int64_t last) {
  if (first >= last) return;
  memset(m.forward, 0, m.forward_floats * sizeof(float));
  forward_piece(f, {0, first, last}, m.state, m.forward);
  // The piece ends before its last group is added, and still holds that group's rows.
  const Sizes z(f.core);
  Arena arena{m.forward};
  ForwardScratch held(arena, z);
  const int64_t rows = least(z.group, f.core.length - (last - 1) * z.group);
  product<COLUMNS, ADD>(held.state, z.wide_value, held.keys, z.wide_dim,
                        held.values + z.history * z.wide_value, z.wide_value, z.dim, z.wide_value, rows);
  memcpy(m.state, held.state, z.wide_dim * z.wide_value * sizeof(float));
}

// Many tokens, in two sequences that begin at a group's border: a short copy of what the window holds of
// earlier groups and the first tokens, then the rest where it is. Values before a border are there in both.
void roll_tokens(const Rolling& r, RollingScratch& m, const Held& past, int64_t b, int64_t kv, int64_t t,
                 int64_t count, int64_t length) {
  const int64_t shared = r.core.heads / r.core.kv_heads, group = r.core.group;
  Forward f{};
  f.core = r.core;
  f.core.batch = f.core.kv_heads = 1, f.core.heads = shared;
  f.core.alpha += kv * shared, f.core.local += kv * shared, f.core.conv += kv * shared * r.core.taps;
  const Core& core = f.core;
  const Tensor past_values = value_columns(r, past.window);

  // The new sum: `leaving` rows of the window, then new tokens up to `kept`.
  const int64_t leaving = least(count, r.rows), kept = most(0, count - r.rows);
  const int64_t open = length % group, start = m.before + open;
  const int64_t reach = round_up(most(core.taps - 1, 1) + open, group) - open;  // to a border, taps' reach
  const int64_t head = least(count, reach);

  read_rows(m.state, m.wide_value, past.recurrent, FLOAT32, b, kv, 0, core.dim, core.value_dim);
  add_products(r, m.state, past.window, past_values, b, kv, 0, r.rows - open, false, m.keys, m.values);

  const int64_t known = least(r.rows, start);
  clear_rows(m.values, m.wide_value, 0, start - known);
  read_rows(m.values + (start - known) * m.wide_value, m.wide_value, past_values, core.dtype, b, kv,
            r.rows - known, known, core.value_dim);
  read_rows(m.keys + m.before * m.wide_dim, m.wide_dim, past.window, core.dtype, b, kv, r.rows - open, open,
            core.dim);
  read_rows(m.keys + start * m.wide_dim, m.wide_dim, r.key, core.dtype, b, kv, t, head, core.dim, 0,
            core.normalize);
  read_rows(m.values + start * m.wide_value, m.wide_value, r.value, core.dtype, b, kv, t, head,
            core.value_dim);
  for (int64_t h = 0; h < shared; h++) {
    float* queries = m.queries + h * m.staged * m.wide_dim;
    clear_rows(queries, m.wide_dim, m.before, start);
    read_rows(queries + start * m.wide_dim, m.wide_dim, r.query, core.dtype, b, kv * shared + h, t, head,
              core.dim, 0, core.normalize);
  }
  Forward first = f;
  first.core.dtype = FLOAT32, first.core.normalize = false, first.core.length = start + head;
  first.query = {m.queries, 0, m.staged * m.wide_dim, m.wide_dim};
  first.key = {m.keys, 0, 0, m.wide_dim};
  first.value = {m.values, 0, 0, m.wide_value};
  first.out = {m.outs, 0, m.staged * m.wide_value, m.wide_value};
  forward_groups(first, m, m.before / group, (first.core.length + group - 1) / group);
  for (int64_t h = 0; h < shared; h++)
    write_rows(r.out, core.dtype, b, kv * shared + h, t, m.outs + (h * m.staged + start) * m.wide_value,
               m.wide_value, head, core.value_dim);

  bool summed = false;
  if (head < count) {
    const int64_t at = t + head - m.before;
    f.core.length = m.before + count - head;
    f.query = from(r.query, core.dtype, b, kv * shared, at), f.out = from(r.out, core.dtype, b, kv * shared, at);
    f.key = from(r.key, core.dtype, b, kv, at), f.value = from(r.value, core.dtype, b, kv, at);
    const int64_t begin = m.before / group, end = (f.core.length + group - 1) / group;
    const int64_t border = kept < head ? begin : begin + (kept - head) / group;
    forward_groups(f, m, begin, border);
    if (kept >= head) {
      memcpy(m.sum, m.state, m.wide_dim * m.wide_value * sizeof(float));
      add_products(r, m.sum, f.key, f.value, 0, 0, border * group, kept - head - (border - begin) * group,
                   core.normalize, m.keys, m.values);
      summed = true;
    }
    forward_groups(f, m, border, end);
  }
  if (!summed) {
    read_rows(m.sum, m.wide_value, past.recurrent, FLOAT32, b, kv, 0, core.dim, core.value_dim);
    add_products(r, m.sum, past.window, past_values, b, kv, 0, leaving, false, m.keys, m.values);
    add_products(r, m.sum, r.key, r.value, b, kv, t, kept, core.normalize, m.keys, m.values);
  }
  write_rows(r.recurrent, FLOAT32, b, kv, 0, m.sum, m.wide_value, core.dim, core.value_dim);
}

void rolling_unit(const Rolling& r, int64_t unit, float* scratch) {
  const Core& core = r.core;
  Arena arena{scratch};
  RollingScratch m(arena, r);
  const int64_t b = unit / core.kv_heads, kv = unit % core.kv_heads, shared = core.heads / core.kv_heads;
  const bool* real = r.real + b * core.length;
  int64_t length = r.past_length[b];
  Held held{r.past_recurrent, r.past_window};
  for (int64_t t = 0, count; t < core.length; t += count) {
    count = 1;
    while (t + count < core.length && real[t + count] == real[t]) count++;
    if (!real[t]) {
      memset(m.out, 0, m.wide_value * sizeof(float));
      for (int64_t h = kv * shared; h < (kv + 1) * shared; h++)
        write_rows(r.out, core.dtype, b, h, t, m.out, 0, count, core.value_dim);
      continue;
    }
    if (count == 1) roll_token(r, m, held, b, kv, t, length);
    else roll_tokens(r, m, held, b, kv, t, count, length);
    roll_window(r, m, held.window, b, kv, t, count);
    held = {r.recurrent, r.window};
    length += count;
  }
  if (length > r.past_length[b]) return;
  const auto keep = [&](const Tensor& to, const Tensor& from, int64_t dtype, int64_t rows) {
    memmove(row_of(to, dtype, b, kv, 0), row_of(from, dtype, b, kv, 0), rows * to.row * element_size(dtype));
  };
  keep(r.recurrent, r.past_recurrent, FLOAT32, core.dim);
  keep(r.window, r.past_window, core.dtype, r.rows);
}

}  // namespace

extern const RollingKernels KERNELS;
const RollingKernels KERNELS = {rolling_scratch, rolling_unit};

}  // namespace linearize
