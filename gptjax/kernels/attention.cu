// Causal attention with dropout of its weights, forward and backward, after FlashAttention-2 (Dao 2023):
// tiles of 64 queries and 64 keys, whose scores never leave the registers.
//
// Arrays of queries, keys, values and their gradients are bfloat16 (B, LENGTH, HEADS, HEAD); sums are float32. What is
// known of a query, (B, HEADS, LENGTH), is the two words that its mask begins with, the logarithm of its sum (base 2) and
// `delta`, the sum of its result times the result's gradient. Macros: LENGTH, HEADS, HEAD, THRESHOLD (of the mask), KEPT
// (the share of weights that are kept), TILE (64) and THREADS (128).
//
// A block of four warps has a tile of rows, 16 a warp, and goes through the tiles of columns. Lane 4 g + c of a
// warp has of each 16 x 8 numbers rows g and g + 8, columns 2 c and 2 c + 1: what `multiply` returns.

#define TILES (LENGTH / TILE)
#define PITCH (HEAD + 8)  // numbers from row to row in shared memory: eight rows begin in other banks
#define TILE_BYTES (TILE * PITCH * 2)
#define DEEP (HEAD / 16)
#define MINUS_INFINITY __int_as_float(0xff800000)
#define SCALE (rsqrtf(HEAD) * 1.4426950408889634f)  // of scores, as exponents of 2

// Where row t of head h of row b is, in numbers
__device__ __forceinline__ size_t place(int bh, int t) { return (((size_t)(bh / HEADS) * LENGTH + t) * HEADS + bh % HEADS) * HEAD; }

__device__ __forceinline__ void load_tile(char* to, const u16* from, int bh, int first) {
  for (int i = threadIdx.x; i < TILE * (HEAD / 8); i += THREADS) {
    const int row = i / (HEAD / 8), column = i % (HEAD / 8) * 8;
    *(uint4*)(to + (row * PITCH + column) * 2) = *(const uint4*)(from + place(bh, first + row) + column);
  }
}

// acc (16 x 64) += a b^T, of rows of a tile and all rows of another
__device__ __forceinline__ void scores(float acc[8][4], const char* a, const char* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < DEEP; k++) {
    u32 x[4], y[4];
    load_matrices(x, a + (lane % 16 * PITCH + k * 16 + lane / 16 * 8) * 2);
#pragma unroll
    for (int n = 0; n < 4; n++) {
      load_matrices(y, b + ((n * 16 + lane / 16 * 8 + lane % 8) * PITCH + k * 16 + lane / 8 % 2 * 8) * 2);
      multiply(acc[2 * n], x[0], x[1], x[2], x[3], y[0], y[1]);
      multiply(acc[2 * n + 1], x[0], x[1], x[2], x[3], y[2], y[3]);
    }
  }
}

// acc (16 x HEAD) += a b, of what `multiply` returned, rounded, and a tile
__device__ __forceinline__ void add_product(float acc[2 * DEEP][4], const float a[8][4], const char* b) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const float *left = a[2 * k], *right = a[2 * k + 1];
    const u32 x0 = pair(left[0], left[1]), x1 = pair(left[2], left[3]);
    const u32 x2 = pair(right[0], right[1]), x3 = pair(right[2], right[3]);
#pragma unroll
    for (int n = 0; n < DEEP; n++) {
      u32 y[4];
      load_matrices_transposed(y, b + ((k * 16 + lane % 16) * PITCH + n * 16 + lane / 16 * 8) * 2);
      multiply(acc[2 * n], x0, x1, x2, x3, y[0], y[1]);
      multiply(acc[2 * n + 1], x0, x1, x2, x3, y[2], y[3]);
    }
  }
}

// Write a warp's 16 rows, each times a factor
__device__ __forceinline__ void store_rows(u16* to, int bh, int row, const float acc[2 * DEEP][4], const float* factor) {
  const int c = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2 * DEEP; n++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      *(u32*)(to + place(bh, row + 8 * i) + n * 8 + 2 * c) = pair(acc[n][2 * i] * factor[i], acc[n][2 * i + 1] * factor[i]);
}

// One number of dropout.mask_of_words
__device__ __forceinline__ bool is_kept(uint2 words, u32 key) {
  u32 x = words.x + key * 0x9E3779B9u;
  x = (x ^ (x >> 16)) * 0x7FEB352Du;
  x = ((x ^ (x >> 15)) + words.y) * 0x846CA68Bu;
  return x >= (u32)THRESHOLD;
}

#ifdef ATTENTION_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS)
    attention_forward(const u16* q, const u16* k, const u16* v, const uint2* words, u16* y, float* log_sums) {
  SHARED_MEMORY(shared);
  char *const q_tile = shared, *const k_tile = shared + TILE_BYTES, *const v_tile = shared + 2 * TILE_BYTES;
  const int all_heads = gridDim.x / TILES, bh = blockIdx.x % all_heads;
  const int tile = TILES - 1 - blockIdx.x / all_heads;  // those with the most keys first
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int row = tile * TILE + warp * 16 + g;  // and row + 8
  load_tile(q_tile, q, bh, tile * TILE);
  uint2 row_words[2];
  float acc[2 * DEEP][4] = {}, highest[2] = {MINUS_INFINITY, MINUS_INFINITY}, sum[2] = {0, 0};
  for (int i = 0; i < 2; i++) row_words[i] = words[(size_t)bh * LENGTH + row + 8 * i];

  for (int other = 0; other <= tile; other++) {
    __syncthreads();
    load_tile(k_tile, k, bh, other * TILE);
    load_tile(v_tile, v, bh, other * TILE);
    __syncthreads();
    float s[8][4] = {};
    scores(s, q_tile + warp * 16 * PITCH * 2, k_tile);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float top = highest[i], part = 0;
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = s[n][2 * i + j];
          if (other == tile && n * 8 + 2 * c + j > warp * 16 + g + 8 * i) x = MINUS_INFINITY;
          top = fmaxf(top, x);
        }
      top = fmaxf(top, lane_xor(top, 1));
      top = fmaxf(top, lane_xor(top, 2));
      const float before = exp2f((highest[i] - top) * SCALE);
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float& x = s[n][2 * i + j];
          x = exp2f((x - top) * SCALE);
          part += x;
          if (!is_kept(row_words[i], other * TILE + n * 8 + 2 * c + j)) x = 0;
        }
      sum[i] = sum[i] * before + part;
      highest[i] = top;
#pragma unroll
      for (int n = 0; n < 2 * DEEP; n++) acc[n][2 * i] *= before, acc[n][2 * i + 1] *= before;
    }
    add_product(acc, s, v_tile);
  }
  float factor[2];
  for (int i = 0; i < 2; i++) {
    sum[i] += lane_xor(sum[i], 1);
    sum[i] += lane_xor(sum[i], 2);
    factor[i] = 1 / (sum[i] * (float)KEPT);
    if (c == 0) log_sums[(size_t)bh * LENGTH + row + 8 * i] = highest[i] * SCALE + log2f(sum[i]);
  }
  store_rows(y, bh, row, acc, factor);
}
#endif

#ifdef ATTENTION_BACKWARD
// With KEYS the rows are keys, and the result the gradients of keys and values; else the rows are queries, and the
// result is their gradient. `row_a` and `row_b` are q and dy, or k and v, and `column_a` and `column_b` the others.
// Each gradient is summed up by one warp in one order, so that it has the same bits each time.
template <bool KEYS>
__device__ void backward(char* shared, const u16* row_a, const u16* row_b, const u16* column_a, const u16* column_b, const uint2* words,
                         const float* log_sums, const float* deltas, u16* row_gradient, u16* value_gradient, int bh, int tile) {
  char *const rows_a = shared, *const rows_b = rows_a + TILE_BYTES;
  char *const columns_a = rows_b + TILE_BYTES, *const columns_b = columns_a + TILE_BYTES;
  uint2* const column_words = (uint2*)(columns_b + TILE_BYTES);
  float *const column_log = (float*)(column_words + TILE), *const column_delta = column_log + TILE;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int row = tile * TILE + warp * 16 + g;
  load_tile(rows_a, row_a, bh, tile * TILE);
  load_tile(rows_b, row_b, bh, tile * TILE);
  uint2 row_words[2];
  float row_log[2], row_delta[2], acc[2 * DEEP][4] = {}, acc_values[2 * DEEP][4] = {};
  if (!KEYS)
    for (int i = 0; i < 2; i++) {
      const size_t at = (size_t)bh * LENGTH + row + 8 * i;
      row_words[i] = words[at], row_log[i] = log_sums[at], row_delta[i] = deltas[at];
    }

  for (int other = KEYS ? tile : 0; other < (KEYS ? TILES : tile + 1); other++) {
    __syncthreads();
    load_tile(columns_a, column_a, bh, other * TILE);
    load_tile(columns_b, column_b, bh, other * TILE);
    if (KEYS && threadIdx.x < TILE) {
      const size_t at = (size_t)bh * LENGTH + other * TILE + threadIdx.x;
      column_words[threadIdx.x] = words[at], column_log[threadIdx.x] = log_sums[at], column_delta[threadIdx.x] = deltas[at];
    }
    __syncthreads();
    float p[8][4] = {}, dp[8][4] = {};
    scores(p, rows_a + warp * 16 * PITCH * 2, columns_a);
    u32 kept = 0;
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int column = n * 8 + 2 * c + i % 2, r = warp * 16 + g + i / 2 * 8;
        const bool keep = KEYS ? is_kept(column_words[column], tile * TILE + r) : is_kept(row_words[i / 2], other * TILE + column);
        p[n][i] = exp2f(p[n][i] * SCALE - (KEYS ? column_log[column] : row_log[i / 2]));
        if (other == tile && (KEYS ? column < r : column > r)) p[n][i] = 0;
        kept |= (u32)keep << (n * 4 + i);
      }
    if (KEYS) {
      float dropped[8][4];
#pragma unroll
      for (int n = 0; n < 8; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) dropped[n][i] = kept >> (n * 4 + i) & 1 ? p[n][i] : 0;
      add_product(acc_values, dropped, columns_b);
    }
    scores(dp, rows_b + warp * 16 * PITCH * 2, columns_b);
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float delta = KEYS ? column_delta[n * 8 + 2 * c + i % 2] : row_delta[i / 2];
        p[n][i] *= (kept >> (n * 4 + i) & 1 ? dp[n][i] * (float)(1 / KEPT) : 0) - delta;
      }
    add_product(acc, p, columns_a);
  }
  const float root = rsqrtf(HEAD), scale[2] = {root, root}, more[2] = {1 / KEPT, 1 / KEPT};
  store_rows(row_gradient, bh, row, acc, scale);
  if (KEYS) store_rows(value_gradient, bh, row, acc_values, more);
}

// Three blocks on a multiprocessor, so at most 168 registers a thread: 8 % faster than two with 190
extern "C" __global__ void __launch_bounds__(THREADS, 3)
    attention_backward(const u16* q, const u16* k, const u16* v, const uint2* words, const float* log_sums,
                       const float* deltas, const u16* dy, u16* dq, u16* dk, u16* dv) {
  SHARED_MEMORY(shared);
  const int half = gridDim.x / 2, all_heads = half / TILES, i = blockIdx.x / 2, bh = i % all_heads, turn = i / all_heads;
  if (blockIdx.x % 2)
    backward<false>(shared, q, dy, k, v, words, log_sums, deltas, dq, nullptr, bh, TILES - 1 - turn);
  else
    backward<true>(shared, k, v, q, dy, words, log_sums, deltas, dk, dv, bh, turn);
}
#endif
