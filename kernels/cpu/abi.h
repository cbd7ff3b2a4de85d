// What crosses the C ABI: blocks of 64-bit fields, packed by `__init__.py` in the same order.
#pragma once
#include <cstddef>
#include <cstdint>

namespace linearize {

enum Dtype : int64_t { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
enum Activation : int64_t { RELU2 = 0, LINEAR = 1 };
constexpr int64_t SALIENT_BLOCK = 32;  // BLOCK of kernels/salient.py

// [batch, head, row, column] with strides in elements; columns are adjacent.
struct Tensor {
  void* data;
  int64_t batch, head, row;
};

// The operator of kernels/naive.py in its causal form, or of the forward both ways. A null pointer leaves that part out.
struct Core {
  int64_t dtype, batch, heads, kv_heads, length, dim, value_dim;
  int64_t group, taps, activation, normalize;
  const float *alpha, *local, *conv;  // [heads], [heads], [heads, taps]
};

struct Forward {
  Core core;
  Tensor query, key, value, out;
};

struct Backward {
  Core core;
  Tensor grad, query, key, value, dquery, dkey, dvalue;
  float *dalpha, *dlocal, *dconv;  // [heads], [heads], [heads, taps]
};

// What is kept between calls; see kernels/recurrent.py. The windows are rings of `window` rows.
struct State {
  Tensor recurrent, key_window, value_window;
  int64_t window_dtype, window;
  int64_t *length, *folded;  // [batch]
};

struct Step {
  Core core;
  Tensor query, key, value, out;
  State state;
  const uint8_t* active;  // [batch] or null
};

struct Append {
  Core core;  // one query head for each kv head; length: the number of tokens in key and value
  Tensor key, value;
  State state;
  const int64_t* path;  // [batch, steps]: the tokens to append in order, -1 for none; null: all of them
  int64_t steps;
};

// The state of a row of the batch after it.
struct Appended {
  int64_t length, folded;
};

struct Tree {
  Core core;  // length: the number of nodes
  Tensor query, key, value, out;
  State state;
  const int64_t* depth;      // [batch, nodes]
  const uint8_t* ancestors;  // [batch, nodes, nodes]
};

// Tokens after a state of kernels/salient.py that takes none back: float32 scores and votes, [batch, kv head,
// rows] and [batch, kv head, vote_rows, rows], rows = sinks + salient + window +
// SALIENT_BLOCK.
struct Salient {
  int64_t dtype, state_dtype, batch, heads, kv_heads, length, dim, value_dim;
  int64_t window, sinks, salient, vote_rows, taps;
  double scale, softcap;  // scores are softcap tanh(scale q.k / softcap), or scale q.k where that is 0
  Tensor query, key, value, out;  // out is float32
  Tensor keys, values;
  float *scores, *votes;
  int64_t *state_length, *state_block;  // a number for each row of the state
  const int64_t* count;                 // [batch] tokens that are real, the first ones; null: all
  const float* conv;                    // [heads, taps] or null
  const float* tail;                    // [heads, value_dim, dim + value_dim + 1] or null
  // Where the states lie: in these rows of the state's tensors [batch], null for a row each, in order; and how far
  // apart rows are, in elements.
  const int64_t* slots;
  int64_t scores_row, votes_row, length_row, block_row;
  const int64_t* first;  // [batch] the row of tokens that each sequence begins at, or null: 0

  int64_t kept() const { return sinks + salient; }
  int64_t ring() const { return window + SALIENT_BLOCK; }
  int64_t slot(int64_t b) const { return slots ? slots[b] : b; }
  int64_t& length_of(int64_t b) const { return state_length[slot(b) * length_row]; }
  int64_t& block_of(int64_t b) const { return state_block[slot(b) * block_row]; }
};

// Whole sequences of the same attention; `positions` [batch, kv head, blocks, kept] of the tokens that each block
// keeps, -1 for none. The gradients are float32, those of key and value zero before.
struct SalientBackward {
  int64_t dtype, batch, heads, kv_heads, length, dim, value_dim, window, kept, blocks;
  double scale, softcap;
  Tensor query, key, value, grad, dquery, dkey, dvalue;
  const int64_t *positions, *count;
};

// Whole sequences whose queries look both ways: `window` tokens on either side, and kept ones, which the call
// chooses. Several panels of queries read the same keys.
struct Bidirectional {
  int64_t dtype, batch, heads, kv_heads, length, dim, value_dim;
  int64_t window, sinks, salient, taps;
  double scale, softcap;
  Tensor query, key, value, out;  // out is float32
  const int64_t* count;           // [batch] tokens that are real, the first ones; null: all
  const float* conv;              // [heads, taps], an odd number, the present token's in the middle, or null
  const float* tail;              // [heads, value_dim, dim + value_dim + 1] or null

  int64_t kept() const { return sinks + salient; }
  int64_t panel() const {
    const int64_t wide = window > 128 ? 4 * window : 512;
    return wide < length ? wide : length;
  }
  int64_t panels() const { return (length + panel() - 1) / panel(); }
};

// One (batch, kv head), and of its groups those from `first` to before `last`. A sequence that is shared
// between threads is cut into several.
struct Piece {
  int64_t unit, first, last;
};

// One instruction set's kernels. Pieces are independent of each other. `scratch` is memory for as many floats
// as the `_scratch` function says, zeroed for forward and backward.
struct Kernels {
  size_t (*state_floats)(const Core&);  // of one sum of k^T v, or of q^T do

  size_t (*forward_scratch)(const Forward&);
  // The piece's own sum of k^T v.
  void (*forward_sum)(const Forward&, Piece, float* sum, float* scratch);
  // `before`: the sum over everything before the piece.
  void (*forward_piece)(const Forward&, Piece, const float* before, float* scratch);

  size_t (*forward_both_scratch)(const Forward&);
  // Of a sequence that looks both ways; `sums`: k^T v over all of it.
  void (*forward_both_piece)(const Forward&, Piece, const float* sums, float* scratch);

  size_t (*backward_scratch)(const Backward&, int64_t groups);
  // The piece's own sums of k^T v and of alpha q^T do.
  void (*backward_sums)(const Backward&, Piece, float* sum, float* dsum, float* scratch);
  // `after`: the sum of alpha q^T do over everything after the piece. The piece's share of dalpha, dlocal and
  // dconv goes to `shares` [heads that read the kv head, 2 + taps].
  void (*backward_piece)(const Backward&, Piece, const float* before, const float* after, float* shares,
                         float* scratch);

  size_t (*step_scratch)(const Step&);
  void (*step_unit)(const Step&, int64_t unit, float* scratch);
  size_t (*append_scratch)(const Append&);
  void (*append_unit)(const Append&, Appended to, int64_t unit, float* scratch);
  size_t (*tree_scratch)(const Tree&);
  void (*tree_unit)(const Tree&, int64_t unit, float* scratch);
  size_t (*salient_scratch)(const Salient&);
  void (*salient_unit)(const Salient&, int64_t unit, float* scratch);
  size_t (*salient_backward_scratch)(const SalientBackward&);
  void (*salient_backward_unit)(const SalientBackward&, int64_t unit, float* scratch);
  size_t (*choosing_scratch)(const Bidirectional&);
  // What a (batch, kv head) keeps: to[0] positions, in order, from to[1] on.
  void (*choosing_unit)(const Bidirectional&, int64_t unit, int32_t* to, float* scratch);
  size_t (*panel_scratch)(const Bidirectional&);
  void (*panel_unit)(const Bidirectional&, int64_t index, const int32_t* chosen, float* scratch);
};

}  // namespace linearize
