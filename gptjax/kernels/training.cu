// Kernels of the training step. Each computes what the function of its name in training.py says.
//
// Half precision is bfloat16, eight numbers in a uint4; sums are float32. training.py compiles each
// kernel for its shapes, which are macros: N rows, D columns, of logits V columns of which TOKENS
// are tokens. A sum over rows is left in one part for each block, so that it has the same bits
// each time; JAX adds the parts.

typedef unsigned int u32;

#define EPSILON 1e-5f  // of LayerNorm, as in gptjax/functions.py

__device__ __forceinline__ void unpack(uint4 v, float* x) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ u32 pair(float low, float high) {
  u32 word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}

__device__ __forceinline__ uint4 pack(const float* x) {
  return make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
}

__device__ __forceinline__ void load8(const float* p, float* x) {
  const float4 a = *(const float4*)p, b = *(const float4*)(p + 4);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
  x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
}

__device__ __forceinline__ void store8(float* p, const float* x) {
  *(float4*)p = make_float4(x[0], x[1], x[2], x[3]);
  *(float4*)(p + 4) = make_float4(x[4], x[5], x[6], x[7]);
}

__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

#ifdef CROSS_ENTROPY
// A block for a row, which stays in shared memory, so that it is read once. A thread reads only
// the numbers that it copied there itself.
#define VECTORS (V / 8)
#define LOG2E 1.4426950408889634f

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(const uint4* given, const int* targets, uint4* logits, float* losses) {
  extern __shared__ uint4 row[];
  __shared__ float parts[2][32];
  const int t = threadIdx.x, target = targets[blockIdx.x];
  const uint4* from = given + (size_t)blockIdx.x * VECTORS;
  uint4* to = logits + (size_t)blockIdx.x * VECTORS;
  for (int i = t; i < VECTORS; i += THREADS) {
    const u32 shared = (u32)__cvta_generic_to_shared(row + i);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from + i));
  }
  asm volatile("cp.async.commit_group;\ncp.async.wait_group 0;" ::: "memory");

  float x[8], highest = -3.0e38f;
  for (int i = t; i < VECTORS; i += THREADS) {
    unpack(row[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (V == TOKENS || 8 * i + j < TOKENS) highest = fmaxf(highest, x[j]);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, o));
  if (t % 32 == 0) parts[0][t / 32] = highest;
  __syncthreads();
  for (int i = 0; i < THREADS / 32; i++) highest = fmaxf(highest, parts[0][i]);

  float sum = 0;
  for (int i = t; i < VECTORS; i += THREADS) {
    unpack(row[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++)
      if (V == TOKENS || 8 * i + j < TOKENS) sum += exp2f((x[j] - highest) * LOG2E);
  }
  sum = sum_of_warp(sum);
  if (t % 32 == 0) parts[1][t / 32] = sum;
  __syncthreads();
  sum = 0;
  for (int i = 0; i < THREADS / 32; i++) sum += parts[1][i];

  const float total = highest + logf(sum);
  if (t == 0 && (u32)target >= TOKENS) losses[blockIdx.x] = __int_as_float(0x7fc00000);  // NaN
  for (int i = t; i < VECTORS; i += THREADS) {
    unpack(row[i], x);
#pragma unroll
    for (int j = 0; j < 8; j++) {
      const int column = 8 * i + j;
      if (column == target && column < TOKENS) losses[blockIdx.x] = total - x[j];
      const float p = exp2f((x[j] - total) * LOG2E);
      x[j] = V == TOKENS || column < TOKENS ? (p - (column == target)) * (1.0f / N) : 0.0f;
    }
    __stcs(to + i, pack(x));
  }
}
#endif

#if defined(NORM_FORWARD) || defined(NORM_BACKWARD)
// A warp for a row, several rows one after the other; a lane has every 32nd vector of it.
#define VECTORS (D / 8)
#define EACH ((VECTORS + 31) / 32)
#define HAS(i) (VECTORS % 32 == 0 || (i) * 32 + lane < VECTORS)
#endif

#ifdef NORM_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_forward(const uint4* x,
#if ADD
                 const uint4* added,
#endif
                 const float* scale_and_bias,
#if ADD
                 uint4* sum,
#endif
                 uint4* y, float* moments) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32);
  float scales[EACH][8], biases[EACH][8];
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (HAS(i)) {
      load8(scale_and_bias + (i * 32 + lane) * 8, scales[i]);
      load8(scale_and_bias + D + (i * 32 + lane) * 8, biases[i]);
    }
  for (int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; row < N; row += warps) {
    float xs[EACH][8], mean = 0, variance = 0;
    uint4 words[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) words[i] = x[(size_t)row * VECTORS + i * 32 + lane];
#if ADD
    uint4 added_words[EACH];
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) added_words[i] = added[(size_t)row * VECTORS + i * 32 + lane];
#endif
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
        unpack(words[i], xs[i]);
#if ADD
        float more[8];
        unpack(added_words[i], more);
#pragma unroll
        for (int j = 0; j < 8; j++) xs[i][j] += more[j];
        words[i] = pack(xs[i]);
        unpack(words[i], xs[i]);
        sum[(size_t)row * VECTORS + i * 32 + lane] = words[i];
#endif
#pragma unroll
        for (int j = 0; j < 8; j++) mean += xs[i][j];
      }
    mean = sum_of_warp(mean) * (1.0f / D);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
#pragma unroll
        for (int j = 0; j < 8; j++) variance += (xs[i][j] - mean) * (xs[i][j] - mean);
      }
    const float rstd = rsqrtf(sum_of_warp(variance) * (1.0f / D) + EPSILON);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
#pragma unroll
        for (int j = 0; j < 8; j++)
          xs[i][j] = (xs[i][j] - mean) * rstd * scales[i][j] + biases[i][j];
        y[(size_t)row * VECTORS + i * 32 + lane] = pack(xs[i]);
      }
    if (lane == 0) *(float2*)(moments + 2 * (size_t)row) = make_float2(mean, rstd);
  }
}
#endif

#ifdef NORM_BACKWARD
// `sums` has a row for each block: D sums for the scale, then with BIAS D for the bias.
extern "C" __global__ void __launch_bounds__(THREADS)
    norm_backward(const uint4* x, const float* scale_and_bias, const float* moments, const uint4* dy,
                  const uint4* residual, uint4* dx, float* sums) {
  extern __shared__ float shared[];  // a row of sums
  const int lane = threadIdx.x % 32, warps = gridDim.x * (THREADS / 32);
  float scales[EACH][8], dscale[EACH][8] = {};
#if BIAS
  float dbias[EACH][8] = {};
#endif
#pragma unroll
  for (int i = 0; i < EACH; i++)
    if (HAS(i)) load8(scale_and_bias + (i * 32 + lane) * 8, scales[i]);
  for (int row = blockIdx.x * (THREADS / 32) + threadIdx.x / 32; row < N; row += warps) {
    uint4 xs[EACH], gs[EACH], rs[EACH];
    const float2 moment = *(const float2*)(moments + 2 * (size_t)row);
    float mean_g = 0, slope = 0;
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
        const size_t at = (size_t)row * VECTORS + i * 32 + lane;
        xs[i] = x[at], gs[i] = dy[at], rs[i] = residual[at];
      }
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
        float a[8], g[8];
        unpack(xs[i], a), unpack(gs[i], g);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          a[j] = (a[j] - moment.x) * moment.y;
          dscale[i][j] += g[j] * a[j];
#if BIAS
          dbias[i][j] += g[j];
#endif
          g[j] *= scales[i][j];
          mean_g += g[j], slope += g[j] * a[j];
        }
      }
    mean_g = sum_of_warp(mean_g) * (1.0f / D), slope = sum_of_warp(slope) * (1.0f / D);
#pragma unroll
    for (int i = 0; i < EACH; i++)
      if (HAS(i)) {
        float a[8], g[8], r[8];
        unpack(xs[i], a), unpack(gs[i], g), unpack(rs[i], r);
#pragma unroll
        for (int j = 0; j < 8; j++) {
          a[j] = (a[j] - moment.x) * moment.y;
          r[j] += moment.y * (g[j] * scales[i][j] - mean_g - slope * a[j]);
        }
        dx[(size_t)row * VECTORS + i * 32 + lane] = pack(r);
      }
  }
  // The warps add theirs one after the other, always in the same order.
#if BIAS
  const int width = 2 * D;
#else
  const int width = D;
#endif
  for (int warp = 0; warp < THREADS / 32; warp++) {
    if (threadIdx.x / 32 == warp)
#pragma unroll
      for (int i = 0; i < EACH; i++)
        if (HAS(i)) {
          float* p = shared + (i * 32 + lane) * 8;
          float old[8] = {};
          if (warp) load8(p, old);
#pragma unroll
          for (int j = 0; j < 8; j++) old[j] += dscale[i][j];
          store8(p, old);
#if BIAS
          float older[8] = {};
          if (warp) load8(p + D, older);
#pragma unroll
          for (int j = 0; j < 8; j++) older[j] += dbias[i][j];
          store8(p + D, older);
#endif
        }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < width; i += THREADS)
    sums[(size_t)blockIdx.x * width + i] = shared[i];
}
#endif

#ifdef JOIN
// Three arrays (N, D / 3) side by side, with the sums of columns. A thread for eight columns, a
// block for every gridDim.x-th row.
extern "C" __global__ void __launch_bounds__(D / 8)
    join(const uint4* q, const uint4* k, const uint4* v, uint4* qkv, float* sums) {
  const int part = threadIdx.x / (D / 24), column = threadIdx.x % (D / 24);
  const uint4* from = part == 0 ? q : part == 1 ? k : v;
  float x[8], sum[8] = {};
#pragma unroll 4
  for (int row = blockIdx.x; row < N; row += gridDim.x) {
    const uint4 word = __ldcs(from + (size_t)row * (D / 24) + column);
    unpack(word, x);
#pragma unroll
    for (int j = 0; j < 8; j++) sum[j] += x[j];
    qkv[(size_t)row * (D / 8) + threadIdx.x] = word;
  }
  store8(sums + (size_t)blockIdx.x * D + threadIdx.x * 8, sum);
}
#endif
