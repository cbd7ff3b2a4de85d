// Vectors, rows of tensors and the register tiles everything else is made of. Compiled once per instruction
// set; all of it has internal linkage, so that nothing built for AVX512 can stand in for its AVX2 twin.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "abi.h"

#define INLINE inline __attribute__((always_inline))

namespace linearize {
namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
constexpr int TILE_ROWS = 12;  // 12 x 2 accumulators + 2 columns of B + 1 broadcast of 32 registers
constexpr int ROW_STEP = 4;    // tiles are 4, 8 or 12 rows high
#else
constexpr int WIDTH = 8;
constexpr int TILE_ROWS = 6;  // 6 x 2 of 16 registers
constexpr int ROW_STEP = 2;
#endif
constexpr int TILE_VECTORS = 2;

typedef float Vec __attribute__((vector_size(WIDTH * 4)));
typedef float VecAnywhere __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Bits __attribute__((vector_size(WIDTH * 4)));

INLINE Vec load(const float* p) { return *reinterpret_cast<const VecAnywhere*>(p); }
INLINE void store(float* p, Vec x) { *reinterpret_cast<VecAnywhere*>(p) = x; }
INLINE Vec keep(Ints mask, Vec x) { return (Vec)((Ints)x & mask); }
INLINE Vec positive(Vec x) { return keep(~(x <= Vec{}), x); }  // NaN stays NaN

INLINE float sum(Vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)x);
#else
  __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_add_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#endif
}

INLINE float largest(Vec x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps((__m512)x);
#else
  __m128 y = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  y = _mm_max_ps(y, _mm_movehl_ps(y, y));
  return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
#endif
}

INLINE Ints count_up() {
  Ints x;
  for (int i = 0; i < WIDTH; i++) x[i] = i;
  return x;
}

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements in memory -> float32 and back, WIDTH at a time.
template <int DTYPE>
INLINE Vec widen(const void* p) {
  if constexpr (DTYPE == FLOAT32) return load(static_cast<const float*>(p));
#ifdef __AVX512F__
  __m256i x = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  if constexpr (DTYPE == BFLOAT16) return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
  return (Vec)_mm512_cvtph_ps(x);
#else
  __m128i x = _mm_loadu_si128(static_cast<const __m128i*>(p));
  if constexpr (DTYPE == BFLOAT16) return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
  return (Vec)_mm256_cvtph_ps(x);
#endif
}

template <int DTYPE>
INLINE void narrow(void* p, Vec x) {
  if constexpr (DTYPE == FLOAT32) return store(static_cast<float*>(p), x);
  Bits bits = (Bits)x;
  bits = bits + 0x7fff + ((bits >> 16) & 1);    // to nearest, ties to even
  bits = x == x ? bits : ((Bits)x | 0x400000);  // carried on, a NaN could become infinite or zero
#ifdef __AVX512F__
  __m256i y = DTYPE == BFLOAT16 ? _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)bits, 16))
                                : _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(static_cast<__m256i*>(p), y);
#else
  __m128i y;
  if constexpr (DTYPE == BFLOAT16) {
    __m256i z = _mm256_srli_epi32((__m256i)bits, 16);
    z = _mm256_permute4x64_epi64(_mm256_packus_epi32(z, z), 0x08);
    y = _mm256_castsi256_si128(z);
  } else {
    y = _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
  }
  _mm_storeu_si128(static_cast<__m128i*>(p), y);
#endif
}

INLINE int64_t element_size(int64_t dtype) { return dtype == FLOAT32 ? 4 : 2; }
INLINE char* row_of(const Tensor& x, int64_t dtype, int64_t b, int64_t h, int64_t t) {
  return static_cast<char*>(x.data) + (b * x.batch + h * x.head + t * x.row) * element_size(dtype);
}

// One row of n elements -> padded floats (zeros behind the row); returns the sum of squares where asked for it.
template <int DTYPE, bool SQUARES>
INLINE float read_row(float* to, const char* from, int64_t n) {
  constexpr int size = DTYPE == FLOAT32 ? 4 : 2;
  Vec squares = {};
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) {
    Vec x = widen<DTYPE>(from + i * size);
    store(to + i, x);
    if constexpr (SQUARES) squares += x * x;
  }
  if (i < n) {
    alignas(64) char tail[WIDTH * 4] = {};
    memcpy(tail, from + i * size, (n - i) * size);
    Vec x = widen<DTYPE>(tail);
    store(to + i, x);
    if constexpr (SQUARES) squares += x * x;
  }
  return SQUARES ? sum(squares) : 0;
}

template <int DTYPE>
INLINE void write_row(char* to, const float* from, int64_t n) {
  constexpr int size = DTYPE == FLOAT32 ? 4 : 2;
  int64_t i = 0;
  for (; i + WIDTH <= n; i += WIDTH) narrow<DTYPE>(to + i * size, load(from + i));
  if (i < n) {
    alignas(64) char tail[WIDTH * 4];
    narrow<DTYPE>(tail, load(from + i));
    memcpy(to + i * size, tail, (n - i) * size);
  }
}

// The row divided by its norm, in place; returns 1 / norm, or 1 for a row of zeros.
INLINE float normalize_row(float* x, float squares, int64_t n) {
  if (__builtin_expect(squares > 1e-30f && squares < 1e37f, 1)) {
    float inverse = 1 / std::sqrt(squares);
    for (int64_t i = 0; i < n; i += WIDTH) store(x + i, load(x + i) * inverse);
    return inverse;
  }
  double exact = 0;  // squares of very large or small numbers leave float's range
  for (int64_t i = 0; i < n; i++) exact += static_cast<double>(x[i]) * x[i];
  if (exact == 0) return 1;
  double inverse = 1 / std::sqrt(exact);
  for (int64_t i = 0; i < n; i++) x[i] = static_cast<float>(x[i] * inverse);
  return static_cast<float>(inverse);
}

template <int DTYPE>
INLINE void read_rows_as(float* to, int64_t stride, const char* from, int64_t step, int64_t rows, int64_t n,
                         int64_t next, bool normalize, float* inverse) {
  for (int64_t i = 0; i < rows; i++) {
    if (next)
      for (int64_t j = 0; j < n * (DTYPE == FLOAT32 ? 4 : 2); j += 64)
        __builtin_prefetch(from + (i + next) * step + j, 0, 2);
    float* row = to + i * stride;
    float scale = 1;
    if (normalize) scale = normalize_row(row, read_row<DTYPE, true>(row, from + i * step, n), n);
    else read_row<DTYPE, false>(row, from + i * step, n);
    if (inverse) inverse[i] = scale;
  }
}

// Rows t .. t+rows of a head -> to[rows][stride], made unit if asked. The rows `next` further on will be read
// soon: fetching them now hides the way from memory behind the products of a group.
void read_rows(float* to, int64_t stride, const Tensor& x, int64_t dtype, int64_t b, int64_t h, int64_t t,
               int64_t rows, int64_t n, int64_t next = 0, bool normalize = false, float* inverse = nullptr) {
  const char* from = row_of(x, dtype, b, h, t);
  int64_t step = x.row * element_size(dtype);
  if (dtype == FLOAT32) read_rows_as<FLOAT32>(to, stride, from, step, rows, n, next, normalize, inverse);
  if (dtype == BFLOAT16) read_rows_as<BFLOAT16>(to, stride, from, step, rows, n, next, normalize, inverse);
  if (dtype == FLOAT16) read_rows_as<FLOAT16>(to, stride, from, step, rows, n, next, normalize, inverse);
}

void write_rows(const Tensor& x, int64_t dtype, int64_t b, int64_t h, int64_t t, const float* from,
                int64_t stride, int64_t rows, int64_t n) {
  char* to = row_of(x, dtype, b, h, t);
  int64_t step = x.row * element_size(dtype);
  for (int64_t i = 0; i < rows; i++) {
    if (dtype == FLOAT32) write_row<FLOAT32>(to + i * step, from + i * stride, n);
    if (dtype == BFLOAT16) write_row<BFLOAT16>(to + i * step, from + i * stride, n);
    if (dtype == FLOAT16) write_row<FLOAT16>(to + i * step, from + i * stride, n);
  }
}

void clear_rows(float* x, int64_t stride, int64_t first, int64_t last) {
  if (first < last) memset(x + first * stride, 0, (last - first) * stride * sizeof(float));
}

// to[column][row] = from[row][column] for one WIDTH x WIDTH block.
INLINE void transpose_block(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
#ifdef __AVX512F__
  __m512 q[4][4];
  for (int i = 0; i < 4; i++) {
    const float* p = from + 4 * i * from_stride;
    __m512 r0 = (__m512)load(p), r1 = (__m512)load(p + from_stride);
    __m512 r2 = (__m512)load(p + 2 * from_stride), r3 = (__m512)load(p + 3 * from_stride);
    __m512d a = (__m512d)_mm512_unpacklo_ps(r0, r1), b = (__m512d)_mm512_unpackhi_ps(r0, r1);
    __m512d c = (__m512d)_mm512_unpacklo_ps(r2, r3), d = (__m512d)_mm512_unpackhi_ps(r2, r3);
    q[i][0] = (__m512)_mm512_unpacklo_pd(a, c);  // 128-bit lane l: rows 4i..4i+3 of column 4l
    q[i][1] = (__m512)_mm512_unpackhi_pd(a, c);
    q[i][2] = (__m512)_mm512_unpacklo_pd(b, d);
    q[i][3] = (__m512)_mm512_unpackhi_pd(b, d);
  }
  for (int m = 0; m < 4; m++) {
    __m512 x = _mm512_shuffle_f32x4(q[0][m], q[1][m], 0x44), y = _mm512_shuffle_f32x4(q[0][m], q[1][m], 0xee);
    __m512 z = _mm512_shuffle_f32x4(q[2][m], q[3][m], 0x44), w = _mm512_shuffle_f32x4(q[2][m], q[3][m], 0xee);
    store(to + m * to_stride, (Vec)_mm512_shuffle_f32x4(x, z, 0x88));
    store(to + (m + 4) * to_stride, (Vec)_mm512_shuffle_f32x4(x, z, 0xdd));
    store(to + (m + 8) * to_stride, (Vec)_mm512_shuffle_f32x4(y, w, 0x88));
    store(to + (m + 12) * to_stride, (Vec)_mm512_shuffle_f32x4(y, w, 0xdd));
  }
#else
  __m256 q[2][4];
  for (int i = 0; i < 2; i++) {
    const float* p = from + 4 * i * from_stride;
    __m256 r0 = (__m256)load(p), r1 = (__m256)load(p + from_stride);
    __m256 r2 = (__m256)load(p + 2 * from_stride), r3 = (__m256)load(p + 3 * from_stride);
    __m256d a = (__m256d)_mm256_unpacklo_ps(r0, r1), b = (__m256d)_mm256_unpackhi_ps(r0, r1);
    __m256d c = (__m256d)_mm256_unpacklo_ps(r2, r3), d = (__m256d)_mm256_unpackhi_ps(r2, r3);
    q[i][0] = (__m256)_mm256_unpacklo_pd(a, c);
    q[i][1] = (__m256)_mm256_unpackhi_pd(a, c);
    q[i][2] = (__m256)_mm256_unpacklo_pd(b, d);
    q[i][3] = (__m256)_mm256_unpackhi_pd(b, d);
  }
  for (int m = 0; m < 4; m++) {
    store(to + m * to_stride, (Vec)_mm256_permute2f128_ps(q[0][m], q[1][m], 0x20));
    store(to + (m + 4) * to_stride, (Vec)_mm256_permute2f128_ps(q[0][m], q[1][m], 0x31));
  }
#endif
}

// rows and columns are multiples of WIDTH.
void transpose(float* to, int64_t to_stride, const float* from, int64_t from_stride, int64_t rows,
               int64_t columns) {
  for (int64_t i = 0; i < rows; i += WIDTH)
    for (int64_t j = 0; j < columns; j += WIDTH)
      transpose_block(to + j * to_stride + i, to_stride, from + i * from_stride + j, from_stride);
}

// Where a tile finds element (r, k) of its left operand.
enum Left {
  ROWS,     // a[r * stride + k]
  COLUMNS,  // a[k * stride + r]: the transpose of what is stored
  BAND,     // a[k - r]: a Toeplitz matrix kept as one vector
};

// x[R][V * WIDTH] += a[R][n] b[n][V * WIDTH]
template <int R, int V, Left LEFT>
INLINE void multiply(Vec (&x)[R][V], const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                     int64_t n) {
  constexpr int BASES = (R + 2) / 3;  // one address register serves three rows: base, base + s, base + 2s
  const float* base[BASES];
  if constexpr (LEFT == ROWS)
    for (int i = 0; i < BASES; i++) base[i] = a + 3 * i * a_stride;
  for (int64_t k = 0; k < n; k++) {
    Vec y[V];
    for (int j = 0; j < V; j++) y[j] = load(b + j * WIDTH);
    b += b_stride;
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      float s = LEFT == ROWS ? base[r / 3][r % 3 * a_stride] : LEFT == COLUMNS ? a[r] : a[-r];
      for (int j = 0; j < V; j++) x[r][j] += s * y[j];
    }
    if constexpr (LEFT == ROWS)
      for (int i = 0; i < BASES; i++) base[i]++;
    else a += LEFT == COLUMNS ? a_stride : 1;
  }
}

enum Into { SET, ADD, SUBTRACT };

template <int R, int V, Left LEFT, Into INTO>
__attribute__((noinline)) void tile(float* c, int64_t c_stride, const float* a, int64_t a_stride,
                                    const float* b, int64_t b_stride, int64_t n) {
  Vec x[R][V] = {};
  multiply<R, V, LEFT>(x, a, a_stride, b, b_stride, n);
  for (int r = 0; r < R; r++)
    for (int j = 0; j < V; j++) {
      float* to = c + r * c_stride + j * WIDTH;
      store(to, INTO == SET ? x[r][j] : INTO == ADD ? load(to) + x[r][j] : load(to) - x[r][j]);
    }
}

template <int R, Left LEFT, Into INTO>
INLINE void tiles(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
                  int64_t b_stride, int64_t n, int64_t columns) {
  int64_t j = 0;
  for (; j + 2 * WIDTH <= columns; j += 2 * WIDTH)
    tile<R, 2, LEFT, INTO>(c + j, c_stride, a, a_stride, b + j, b_stride, n);
  if (j < columns) tile<R, 1, LEFT, INTO>(c + j, c_stride, a, a_stride, b + j, b_stride, n);
}

template <int ROWS>
struct Height {
  static constexpr int value = ROWS;
};

// Calls f with the height of the tile, a constant, that covers `rows` (at most TILE_ROWS) rows.
template <class F>
INLINE void with_height(int64_t rows, F&& f) {
  if (rows > 2 * ROW_STEP) f(Height<3 * ROW_STEP>{});
  else if (rows > ROW_STEP) f(Height<2 * ROW_STEP>{});
  else f(Height<ROW_STEP>{});
}

// c[rows][columns] (=, +=, -=) a b over n. columns is a multiple of WIDTH. Up to ROW_STEP - 1 rows behind the
// last one are read from a and written to c.
template <Left LEFT, Into INTO>
INLINE void product(float* c, int64_t c_stride, const float* a, int64_t a_stride, const float* b,
                    int64_t b_stride, int64_t rows, int64_t columns, int64_t n) {
  for (int64_t i = 0; i < rows; i += TILE_ROWS)
    with_height(rows - i, [&](auto height) {
      const float* left = LEFT == ROWS ? a + i * a_stride : LEFT == COLUMNS ? a + i : a - i;
      tiles<decltype(height)::value, LEFT, INTO>(c + i * c_stride, c_stride, left, a_stride, b, b_stride, n,
                                                 columns);
    });
}

// Hands out pieces of one block of memory, each on its own cache line; with no block it only counts.
struct Arena {
  float* block;
  size_t used = 0;
  float* take(int64_t floats) {
    float* piece = block ? block + used : nullptr;
    used += round_up(floats, 16);
    return piece;
  }
};

}  // namespace
}  // namespace linearize
