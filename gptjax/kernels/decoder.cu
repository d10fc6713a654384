// One GPT-2 decoder for ROWS rows as one kernel that stays on the GPU for `count` tokens, STEPS at most.
//
// A block owns rows of every matrix. Its weights lie in one stream in their order of use, which one thread
// copies into slots of shared memory, a segment of a matrix at a time, ahead of their use and without waiting
// for any activation. Blocks give each other activations as words of 32 bits whose lowest bit says in which use
// of its place the word was written: a reader waits for the data itself, so there are neither barriers nor
// flags. No sum depends on the order in which blocks arrive: the same input gives the same bits.
//
// Most of a token's time goes to waiting for words of other blocks, not to arithmetic. So what does not depend on
// them is done before: the first segment of a matrix lies in registers when they come. And each warp runs the
// layer's code once, so it waits for the instruction cache where that is long: what is unrolled has fixed addresses.
//
// Macros: L layers, D width, H heads, K head dim, ROWS, STEPS, S cache size, VPAD vocabulary (padded), VOCAB;
// NB blocks, NW warps that compute, NS splits of a context; RQ RD RF RG rows a block has of the matrices 3D, D,
// 4D and of a group of the head, NG groups; SLOT bytes of a slot, NSLOT slots;
// LOGITS: write logits, and choose no token; EXACT: GELU with erf; SPINS: tries before a wait is given up.

constexpr int F = 4 * D, B = ROWS, NT = 32 * NW;
constexpr int QUADS = D / 4;                                   // of 4 words in x
constexpr int WPR = NW / B < (QUADS + 31) / 32 ? NW / B : (QUADS + 31) / 32;  // warps for LayerNorm of a row
constexpr int E = (QUADS + 32 * WPR - 1) / (32 * WPR);         // quads a lane has of it
constexpr int LPK = K / 8, GPW = 32 / LPK, KPP = NW * GPW;     // lanes a key, keys at once in a warp, a block
constexpr int DPL = K > 32 ? K / 32 : 1;                       // dims a lane has of a head
constexpr int PW = K + 4;                                      // words of a split: o, max, sum, two unused
__host__ __device__ constexpr int bias_bytes(int r) { return (4 * r + 15) / 16 * 16; }  // in front of r rows of a matrix
__host__ __device__ constexpr long matrix_bytes(int r, int k) { return bias_bytes(r) + 2L * r * k; }
constexpr long STREAM = L * (matrix_bytes(RQ, D) + matrix_bytes(RD, D) + matrix_bytes(RF, D) + matrix_bytes(RD, F)) +
                        NG * matrix_bytes(RG, D);              // bytes of a token
// exchanged words, from here on:
constexpr int AT_QKV = 16, AT_PART = AT_QKV + B * 3 * D, AT_X1 = AT_PART + B * H * NS * PW, AT_X2 = AT_X1 + B * D,
              AT_H = AT_X2 + B * D, AT_BEST = AT_H + 2 * B * F;  // h has two places: see 4.
__host__ __device__ constexpr int row_bytes(int k) { return k * 2 + ((k / 32) % 2 ? 0 : 64); }  // no bank conflicts
__host__ __device__ constexpr int min2(int a, int b) { return a < b ? a : b; }
__host__ __device__ constexpr int max2(int a, int b) { return a > b ? a : b; }
// Pieces of 32 columns in a segment of a matrix (r, k): as many for each warp, as far as a slot holds them.
__host__ __device__ constexpr int per_segment(int r, int k) { return NW * min2(SLOT / (64 * NW * r), (k / 32 + NW - 1) / NW); }
constexpr int ROWS_MAX = max2(max2(RQ, RF), max2(RG, RD)), BIAS = bias_bytes(ROWS_MAX);
constexpr int RED = (NW * B * ROWS_MAX + 3) / 4 * 4;           // floats of one buffer of partial sums
// shared memory, in bytes:
constexpr int AT_XS = NSLOT * (BIAS + SLOT), AT_RED = AT_XS + B * row_bytes(F), AT_STATS = AT_RED + 8 * max2(RED, NW * PW),
              AT_FULL = AT_STATS + 8 * NW, AT_FREE = AT_FULL + 8 * NSLOT, AT_ROW = AT_FREE + 8 * NSLOT,
              AT_DEAD = AT_ROW + 8 * B, AT_OWN = AT_DEAD + 8, AT_BIAS = AT_OWN + 4 * B * RD;

__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ float value(u32 w) { return __uint_as_float(w & ~1u); }
__device__ __forceinline__ void publish(u32* p, float v, u32 use) { store_word(p, (__float_as_uint(v) & ~1u) | (use & 1)); }
__device__ __forceinline__ u32 stale(uint2 w, u32 use) { return (w.x ^ use) | (w.y ^ use); }  // in the lowest bit
__device__ __forceinline__ u32 stale(uint4 w, u32 use) { return ((w.x ^ use) | (w.y ^ use)) | ((w.z ^ use) | (w.w ^ use)); }
template <int N>
__device__ __forceinline__ u32 stale(const u32 (&w)[N], u32 use) {
  u32 bits = w[0] ^ use;
#pragma unroll
  for (int i = 1; i < N; i++) bits |= w[i] ^ use;
  return bits;
}
__device__ __forceinline__ float lane_sum(float v) { for (int o = 16; o; o >>= 1) v += lane_xor(v, o); return v; }
__device__ __forceinline__ float lane_max(float v) { for (int o = 16; o; o >>= 1) v = fmaxf(v, lane_xor(v, o)); return v; }
__device__ __forceinline__ bool better(float v, int i, float than, int at) {  // NaN wins, then the larger, then the first
  return (v != v && than == than) || v > than || ((v == than || (v != v && than != than)) && i < at);
}
__device__ __forceinline__ float activation(float x) {
  if (EXACT) return 0.5f * x * erfcf(-0.70710678f * x);
  return __fdividef(x, 1 + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}
__device__ __forceinline__ void load_dims(const u32* p, u32 (&v)[1]) { v[0] = load_word(p); }
__device__ __forceinline__ void load_dims(const u32* p, u32 (&v)[2]) { const uint2 w = load_words2(p); v[0] = w.x, v[1] = w.y; }
__device__ __forceinline__ void load_dims(const u32* p, u32 (&v)[4]) { const uint4 w = load_words4(p); v[0] = w.x, v[1] = w.y, v[2] = w.z, v[3] = w.w; }

struct Block {
  char* shared;
  int warp, lane;
  u32 slot, parity;  // where the next segment lies, and in which round of the slots
  u32 matrix;        // how many were begun

  // After so many tries in vain a word will not come: the block goes on without it, marks itself, and waits no more.
  __device__ __forceinline__ bool late(u32 tries) {
    volatile int* dead = (int*)(shared + AT_DEAD);
    if (tries < 64 || (tries < SPINS && !*dead)) return false;
    *dead = 1;
    return true;
  }
  // N quads of words at p, p + stride, ..., those below `count`, as soon as all of them are of this use. What has come
  // is not read again: all blocks wait for the same words, and weights come through the same cache.
  template <int N>
  __device__ __forceinline__ void gather(const u32* words, int first, int stride, int count, u32 use, uint4 (&v)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) v[i].x = ~use, v[i].y = v[i].z = v[i].w = use;
#pragma unroll 1
    for (u32 tries = 0;; tries++) {
      u32 old = 0;
#pragma unroll
      for (int i = 0; i < N; i++)
        if (first + i * stride < count && (stale(v[i], use) & 1)) v[i] = load_words4(words + 4 * (first + i * stride));
#pragma unroll
      for (int i = 0; i < N; i++)
        if (first + i * stride < count) old |= stale(v[i], use);
      if (!(old & 1) || late(tries)) return;
    }
  }
  // What a warp multiplies of a segment of a matrix (R, KD): every NW-th piece of 32 columns, in registers.
  template <int R, int KD>
  struct Tile { uint4 a[per_segment(R, KD) / NW][(R + 15) / 16][2]; };
  // Take the next segment, and free its slot. The first of a matrix is taken before its activations are waited for,
  // and with it the rows' biases.
  template <int R, int KD>
  __device__ __forceinline__ void load(Tile<R, KD>& tile, int first = 0) {
    constexpr int T = (R + 15) / 16, P = KD / 32, PPS = per_segment(R, KD);
    if (lane == 0)
      while (!barrier_passed(shared + AT_FULL + 8 * slot, parity)) {}
    sync_warp();
    const char* a = shared + slot * (BIAS + SLOT) + BIAS + warp * (R * 64) + lane * 16;
    if (first == 0) {
      const float* from = (const float*)(shared + slot * (BIAS + SLOT) + BIAS - bias_bytes(R));
      float* to = (float*)(shared + AT_BIAS) + (matrix++ & 1) * ROWS_MAX;
      for (int i = warp * 32 + lane; i < R; i += NT) to[i] = from[i];
    }
#pragma unroll
    for (int i = 0; i < PPS / NW; i++) {
      if (P % PPS && first + i * NW + warp >= P) break;
#pragma unroll
      for (int t = 0; t < T; t++)
        for (int half = 0; half < 2; half++)
          tile.a[i][t][half] = load_shared4(a + i * NW * R * 64 + t * 1024 + half * 512);
    }
    sync_warp();
    if (lane == 0) barrier_arrive(shared + AT_FREE + 8 * slot);
    if (++slot == NSLOT) slot = 0, parity ^= 1;
  }
  // The block's R rows of a matrix (.., KD), whose first segment was taken, times x (B, KD) in xs: each warp leaves
  // its sums in red[warp][row * B + b]. Rows past R and columns past B are read from what lies there, and never
  // written.
  template <int R, int KD>
  __device__ __forceinline__ void product(float* red, Tile<R, KD>& tile) {
    constexpr int T = (R + 15) / 16, P = KD / 32, PPS = per_segment(R, KD);
    const int g = lane >> 2, c = lane & 3;
    const char* x = shared + AT_XS + min2(g, B - 1) * row_bytes(KD) + warp * 64 + c * 16;
    float acc[T][2][4];
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int i = 0; i < 8; i++) acc[t][i / 4][i % 4] = 0;
#pragma unroll 1
    for (int first = 0; first < P; first += PPS, x += PPS * 64) {
      if (first) load(tile, first);
#pragma unroll
      for (int i = 0; i < PPS / NW; i++) {
        if (P % PPS && first + i * NW + warp >= P) break;
        const uint4 b = *(const uint4*)(x + i * NW * 64);
#pragma unroll
        for (int t = 0; t < T; t++) {
          const uint4 a1 = tile.a[i][t][0], a2 = tile.a[i][t][1];
          multiply(acc[t][0], a1.x, a2.x, a1.y, a2.y, b.x, b.y);
          multiply(acc[t][1], a1.z, a2.z, a1.w, a2.w, b.z, b.w);
        }
      }
    }
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = 16 * t + g + (i > 1 ? 8 : 0), n = 2 * c + (i & 1);
        if (r < R && n < B) red[warp * R * B + r * B + n] = acc[t][0][i] + acc[t][1][i];
      }
    sync_threads(NT);
  }
  // Return the warps' sums of number t (row * B + b) and the row's bias.
  template <int R>
  __device__ __forceinline__ float total(const float* red, int t) {
    float y[4] = {((const float*)(shared + AT_BIAS))[(matrix - 1 & 1) * ROWS_MAX + t / B], 0, 0, 0};
#pragma unroll
    for (int w = 0; w < NW; w++) y[w % 4] += red[w * R * B + t];
    return (y[0] + y[1]) + (y[2] + y[3]);
  }
  // x less its mean, over its deviation, into xs as bfloat16: of the x that all blocks publish at `words`, or of the
  // embeddings. LayerNorm's own scale and shift are in the matrix that follows.
  __device__ __forceinline__ void norm(const u32* words, u32 use, const u16* wte, const u16* wpe) {
    const bool mine = warp < B * WPR;
    const int row = warp / WPR, first = warp % WPR * 32 + lane;
    float2* stats = (float2*)(shared + AT_STATS);
    const int *token = (int*)(shared + AT_ROW), *length = token + B;
    uint4 x[E];
    float s = 0, q = 0;
    if (mine) {
      if (words)
        gather(words + row * D, first, 32 * WPR, QUADS, use, x);
      else
#pragma unroll
        for (int i = 0; i < E; i++)
          if (first + i * 32 * WPR < QUADS) {
            const uint2 a = *(const uint2*)(wte + (long)token[row] * D + 4 * (first + i * 32 * WPR));
            const uint2 b = *(const uint2*)(wpe + (long)length[row] * D + 4 * (first + i * 32 * WPR));
            x[i].x = __float_as_uint(low(a.x) + low(b.x)), x[i].y = __float_as_uint(high(a.x) + high(b.x));
            x[i].z = __float_as_uint(low(a.y) + low(b.y)), x[i].w = __float_as_uint(high(a.y) + high(b.y));
          }
#pragma unroll
      for (int i = 0; i < E; i++)
        if (first + i * 32 * WPR < QUADS) {
          const float a = value(x[i].x), b = value(x[i].y), c = value(x[i].z), d = value(x[i].w);
          s += (a + b) + (c + d), q += (a * a + b * b) + (c * c + d * d);
        }
      s = lane_sum(s), q = lane_sum(q);
      if (lane == 0) stats[warp] = make_float2(s, q);
    }
    sync_threads(NT);
    if (mine) {
      s = q = 0;
#pragma unroll
      for (int w = 0; w < WPR; w++) s += stats[row * WPR + w].x, q += stats[row * WPR + w].y;
      const float mean = s * (1.0f / D), factor = rsqrtf(fmaxf(q * (1.0f / D) - mean * mean, 0) + 1e-5f);
#pragma unroll
      for (int i = 0; i < E; i++)
        if (first + i * 32 * WPR < QUADS)
          *(uint2*)(shared + AT_XS + row * row_bytes(D) + 8 * (first + i * 32 * WPR)) =
              make_uint2(pair((value(x[i].x) - mean) * factor, (value(x[i].y) - mean) * factor),
                         pair((value(x[i].z) - mean) * factor, (value(x[i].w) - mean) * factor));
    }
    sync_threads(NT);
  }
};

// ---- Attention: an item is a row, a head and a split of its context ----

constexpr int U = 3;                  // keys a group of lanes has under way
constexpr int LINES = (K + 63) / 64;  // of 128 bytes a head has of a key
struct Item {
  int row, head, n, m, from;  // n keys in the cache; this split has m of them, from `from` on
  bool newest;                // and the newest key, which no cache has
};
__device__ __forceinline__ int splits(int n) { return max2(1, min2(NS, (n + U * KPP - 1) / (U * KPP))); }
__device__ __forceinline__ Item item_of(int number, const int* length) {
  Item a;
  const int split = number % NS;
  a.row = number / (H * NS), a.head = number / NS % H;
  if (a.row >= B) a.row = 0;
  a.n = length[a.row];
  const int ns = splits(a.n), per = (a.n + ns - 1) / ns;
  a.from = split * per;
  a.m = split < ns && number < B * H * NS ? max2(0, min2(per, a.n - a.from)) : 0;
  a.newest = split == 0 && number < B * H * NS;
  return a;
}
// Keys and values of the U keys of this group of lanes from number j on.
__device__ __forceinline__ void load_keys(const Item& a, int j, int e, const u16* kl, const u16* vl, uint4 (&k)[U], uint4 (&v)[U]) {
#pragma unroll
  for (int u = 0; u < U; u++) {
    k[u] = v[u] = make_uint4(0, 0, 0, 0);
    if (j + u * KPP < a.m) {
      const int o = (a.row * S + a.from + j + u * KPP) * D + a.head * K + 8 * e;
      k[u] = load_words4((const u32*)(kl + o)), v[u] = load_words4((const u32*)(vl + o));
    }
  }
}
__device__ __forceinline__ float dot(uint4 k, const float (&q)[8]) {
  return (low(k.x) * q[0] + high(k.x) * q[1] + low(k.y) * q[2] + high(k.y) * q[3]) +
         (low(k.z) * q[4] + high(k.z) * q[5] + low(k.w) * q[6] + high(k.w) * q[7]);
}
__device__ __forceinline__ void add(float (&o)[8], float p, uint4 v) {
  o[0] += p * low(v.x), o[1] += p * high(v.x), o[2] += p * low(v.y), o[3] += p * high(v.y);
  o[4] += p * low(v.z), o[5] += p * high(v.z), o[6] += p * low(v.w), o[7] += p * high(v.w);
}
__device__ __forceinline__ uint4 eight(const uint4 (&v)[2]) {
  return make_uint4(pair(value(v[0].x), value(v[0].y)), pair(value(v[0].z), value(v[0].w)),
                    pair(value(v[1].x), value(v[1].y)), pair(value(v[1].z), value(v[1].w)));
}
// Write into acc[warp] the sum, the largest score of this warp's keys, and the sum of their weights.
__device__ __forceinline__ void attend(Block& me, const Item& a, const u32* ex, u32 use, u16* kl, u16* vl, float* acc) {
  const int e = me.lane % LPK, group = me.warp * GPW + me.lane / LPK;
  const u32* qkv = ex + AT_QKV + a.row * 3 * D + a.head * K;
  const bool newest = a.newest && group == 0;
  float o[8] = {0, 0, 0, 0, 0, 0, 0, 0}, top = -1e30f, sum = 0;
  if (a.m > me.warp * GPW || (a.newest && me.warp == 0)) {
    uint4 w[2], k[U], v[U];
    float q[8];
    load_keys(a, group, e, kl, vl, k, v);
    me.gather(qkv, 2 * e, 1, 2 * e + 2, use, w);
    const float f = rsqrtf((float)K);
    q[0] = value(w[0].x) * f, q[1] = value(w[0].y) * f, q[2] = value(w[0].z) * f, q[3] = value(w[0].w) * f;
    q[4] = value(w[1].x) * f, q[5] = value(w[1].y) * f, q[6] = value(w[1].z) * f, q[7] = value(w[1].w) * f;
#pragma unroll 1
    for (int j = group;; j += U * KPP) {
      float s[U], t = top;
#pragma unroll
      for (int u = 0; u < U; u++) s[u] = dot(k[u], q);
#pragma unroll
      for (int i = LPK / 2; i; i >>= 1)
#pragma unroll
        for (int u = 0; u < U; u++) s[u] += lane_xor(s[u], i);
#pragma unroll
      for (int u = 0; u < U; u++) {
        if (j + u * KPP >= a.m) s[u] = -2e30f;  // far below `top`: its weight is 0
        t = fmaxf(t, s[u]);
      }
      const float keep = __expf(top - t);
      top = t, sum *= keep;
#pragma unroll
      for (int d = 0; d < 8; d++) o[d] *= keep;
#pragma unroll
      for (int u = 0; u < U; u++) {
        const float p = __expf(s[u] - t);
        sum += p, add(o, p, v[u]);
      }
      if (j - me.lane / LPK + U * KPP >= a.m) break;  // the same for all lanes
      load_keys(a, j + U * KPP, e, kl, vl, k, v);
    }
    if (a.newest && me.warp == 0) {  // from the blocks that computed it, into the cache
      me.gather(qkv + D, 2 * e, 1, 2 * e + 2, use, w), k[0] = eight(w);
      me.gather(qkv + 2 * D, 2 * e, 1, 2 * e + 2, use, w), v[0] = eight(w);
      const int to = (a.row * S + a.n) * D + a.head * K + 8 * e;
      if (newest) store_words4(kl + to, k[0]), store_words4(vl + to, v[0]);
      sync_warp();
      float s = dot(k[0], q);
#pragma unroll
      for (int i = LPK / 2; i; i >>= 1) s += lane_xor(s, i);
      const float t = newest ? fmaxf(top, s) : top, keep = __expf(top - t), p = newest ? __expf(s - t) : 0;
      top = t, sum = sum * keep + p;
#pragma unroll
      for (int d = 0; d < 8; d++) o[d] *= keep;
      add(o, p, v[0]);
    }
    float t = top;
#pragma unroll
    for (int i = LPK; i < 32; i <<= 1) t = fmaxf(t, lane_xor(t, i));
    const float keep = __expf(top - t);
    top = t, sum *= keep;
#pragma unroll
    for (int d = 0; d < 8; d++) o[d] *= keep;
#pragma unroll
    for (int i = LPK; i < 32; i <<= 1) {
      sum += lane_xor(sum, i);
#pragma unroll
      for (int d = 0; d < 8; d++) o[d] += lane_xor(o[d], i);
    }
  }
  acc += me.warp * PW;
  if (me.lane < LPK) {
    *(float4*)(acc + 8 * e) = make_float4(o[0], o[1], o[2], o[3]), *(float4*)(acc + 8 * e + 4) = make_float4(o[4], o[5], o[6], o[7]);
    if (e == 0) acc[K] = top, acc[K + 1] = sum;
  }
}
// Merge the splits of all heads, which all blocks read, into xs.
__device__ __forceinline__ void merge(Block& me, const u32* ex, u32 use, const int* length) {
  const int lane = me.lane;
#pragma unroll 1
  for (int pairs = me.warp; pairs < B * H; pairs += NW) {
    const int row = pairs / H, ns = splits(length[row]), dim = lane * DPL % K;
    const u32* p = ex + AT_PART + pairs * NS * PW;
    u32 o[NS][DPL];
    uint2 w = make_uint2(lane < ns ? ~use : use, use);
#pragma unroll
    for (int s = 0; s < NS; s++)
#pragma unroll
      for (int d = 0; d < DPL; d++) o[s][d] = ~use;
#pragma unroll 1
    for (u32 tries = 0;; tries++) {
      u32 old = 0;
      if (stale(w, use) & 1) w = load_words2(p + lane * PW + K);
#pragma unroll
      for (int s = 0; s < NS; s++)
        if (s < ns && (stale(o[s], use) & 1)) load_dims(p + s * PW + dim, o[s]);
      old = stale(w, use);
#pragma unroll
      for (int s = 0; s < NS; s++)
        if (s < ns)
#pragma unroll
          for (int d = 0; d < DPL; d++) old |= o[s][d] ^ use;
      if (!(old & 1) || me.late(tries)) break;
    }
    sync_warp();
    const float top = lane_max(lane < ns ? value(w.x) : -1e30f), f = lane < ns ? __expf(value(w.x) - top) : 0;
    const float share = __fdividef(f, lane_sum(lane < ns ? f * value(w.y) : 0));
    float y[DPL];
#pragma unroll
    for (int d = 0; d < DPL; d++) y[d] = 0;
#pragma unroll
    for (int s = 0; s < NS; s++) {
      const float g = lane_of(share, s);
      if (s < ns)
#pragma unroll
        for (int d = 0; d < DPL; d++) y[d] += g * value(o[s][d]);
    }
    u16* to = (u16*)(me.shared + AT_XS + row * row_bytes(D)) + pairs % H * K + dim;
#pragma unroll
    for (int d = 0; d < DPL; d++)
      if (lane < K) to[d] = (u16)pair(y[d], 0);
  }
  sync_threads(NT);
}

// ---- The kernel ----

extern "C" __global__ void __launch_bounds__(NT + 32, 1)
decode(const int* token_in, const int* length_in, const int* count, const char* weights, const u16* wte,
       const u16* wpe, const u32* ex_in, const u16* k_in, const u16* v_in,  // the last three are the outputs' memory
       u32* ex, u16* k_cache, u16* v_cache, int* tokens, float* logits, int* given_up) {
  SHARED_MEMORY(shared);
  const int t = threadIdx.x, id = blockIdx.x, steps = min2(*count, STEPS);
  Block me = {shared, t / 32, t % 32, 0, 0, 0};
  int *token = (int*)(shared + AT_ROW), *length = token + B, *dead = (int*)(shared + AT_DEAD);
  float *red = (float*)(shared + AT_RED), *own = (float*)(shared + AT_OWN);
  if (t == 0) {
#pragma unroll 1
    for (int i = 0; i < NSLOT; i++) barrier_init(shared + AT_FULL + 8 * i, 1), barrier_init(shared + AT_FREE + 8 * i, NW);
    barriers_are_ready();
    *dead = load_word(ex + 2);  // whether an earlier launch was given up
  }
  if (t < B) token[t] = token_in[t], length[t] = length_in[t] < S ? length_in[t] : S - 1;
  __syncthreads();
  if (me.warp == NW) {  // this warp copies weights, and does nothing else
    u32 round = 0;
    const char* from;
    // Copy a matrix in segments of so many pieces of so many bytes; `head` bytes of biases come before the first.
    auto copy = [&](int pieces, int per, int bytes, int head) {
#pragma unroll 1
      for (int first = 0; first < pieces; first += per, head = 0) {
        const int size = head + min2(per, pieces - first) * bytes;
        if (round)
          while (!barrier_passed(shared + AT_FREE + 8 * me.slot, me.parity ^ 1)) {}
        fetch(shared + me.slot * (BIAS + SLOT) + BIAS - head, from, size, shared + AT_FULL + 8 * me.slot);
        // One segment is under way at a time. If all free slots were asked for at once, the words that blocks
        // exchange would wait behind them: GPT-2 XL then takes 1,753 us a token instead of 1,394.
        while (!barrier_passed(shared + AT_FULL + 8 * me.slot, me.parity)) {}
        from += size;
        if (++me.slot == NSLOT) me.slot = 0, me.parity ^= 1, round = 1;
      }
    };
    if (me.lane == 0)
#pragma unroll 1
      for (int step = 0; step < steps; step++) {
        from = weights + id * STREAM;
#pragma unroll 1
        for (int m = 0; m < 4 * L; m++) {
          const int k = m % 4 == 3 ? F : D, r = m % 4 == 0 ? RQ : m % 4 == 2 ? RF : RD;
          copy(k / 32, per_segment(r, k), 64 * r, bias_bytes(r));
        }
#pragma unroll 1
        for (int g = 0; g < NG; g++) copy(D / 32, per_segment(RG, D), 64 * RG, bias_bytes(RG));
      }
    return;
  }
  const u32 uses = load_word(ex), chosen = load_word(ex + 1);  // of each place, by earlier launches
#pragma unroll 1
  for (int step = 0; step < steps; step++) {
    u32 use = uses + step * L;
    // The residual stream: each block keeps its own rows, and all of x only as far as LayerNorm.
#pragma unroll 1
    for (int i = t; i < B * RD; i += NT) {
      const int row = i % B, d = id * RD + i / B;
      if (d < D) own[i] = low(wte[(long)token[row] * D + d]) + low(wpe[(long)length[row] * D + d]);
    }
#pragma unroll 1
    for (int l = 0; l < L; l++) {
      use++;
      u16 *kl = k_cache + (long)l * B * S * D, *vl = v_cache + (long)l * B * S * D;
      Item a = item_of(id, length);
#pragma unroll 1
      for (int i = t; i < 2 * LINES * a.m; i += NT) {  // the next layer's keys and values, into L2
        const int key = (a.row * S + a.from + i / (2 * LINES)) * D + a.head * K + i / 2 % LINES * 64;
        prefetch((i & 1 ? v_cache : k_cache) + (l + 1) % L * (long)B * S * D + key);
      }
      // 1. LayerNorm, query, key and value
      Block::Tile<RQ, D> tile1;
      me.load<RQ, D>(tile1);
      me.norm(l ? ex + AT_X2 : nullptr, use - 1, wte, wpe);
      me.product<RQ, D>(red, tile1);
#pragma unroll 1
      for (int i = t; i < B * RQ; i += NT) {
        const int o = id * RQ + i / B;
        if (o < 3 * D) publish(ex + AT_QKV + i % B * 3 * D + o, me.total<RQ>(red, i), use);
      }
      // 2. Attention
      float* acc = red + RED;
#pragma unroll 1
      for (int number = id; number < B * H * NS; number += NB) {
        if (number != id) {
          sync_threads(NT);  // acc has been read
          a = item_of(number, length);
        }
        attend(me, a, ex, use, kl, vl, acc);
        sync_threads(NT);
        u32* part = ex + AT_PART + number * PW;
        if (t < K) {
          float top = -1e30f, y = 0, sum = 0;
#pragma unroll
          for (int w = 0; w < NW; w++) top = fmaxf(top, acc[w * PW + K]);
#pragma unroll
          for (int w = 0; w < NW; w++) {
            const float f = __expf(acc[w * PW + K] - top);
            y += f * acc[w * PW + t], sum += f * acc[w * PW + K + 1];
          }
          publish(part + t, y, use);
          if (t == 0) publish(part + K, top, use), publish(part + K + 1, sum, use);
        }
      }
      // 3. The splits together, projection, residual
      const int o = id * RD + t / B;
      const bool mine = t < B * RD && o < D;
      Block::Tile<RD, D> tile2;
      me.load<RD, D>(tile2);
      merge(me, ex, use, length);
      me.product<RD, D>(red, tile2);
      if (mine) publish(ex + AT_X1 + t % B * D + o, own[t] += me.total<RD>(red, t), use);
      // 4. LayerNorm, widen, GELU
      Block::Tile<RF, D> tile3;
      me.load<RF, D>(tile3);
      me.norm(ex + AT_X1, use, wte, wpe);
      me.product<RF, D>(red, tile3);
      // A block may have rows of this matrix alone, as the last one of XL: then nobody waits for it until the next
      // layer's h, which must not take the place of words that it has not read.
      u32* wide_words = ex + AT_H + (use & 1) * B * F;
      const u32 wide_use = (use + 1) >> 1;
#pragma unroll 1
      for (int i = t; i < B * RF; i += NT) {
        const int wide = id * RF + i / B;
        if (wide < F) publish(wide_words + i % B * F + wide, activation(me.total<RF>(red, i)), wide_use);
      }
      // 5. Narrow, residual
      Block::Tile<RD, F> tile4;
      me.load<RD, F>(tile4);
      constexpr int WPH = NW / B, G = min2(5, (D + 32 * WPH - 1) / (32 * WPH));
      if (me.warp < B * WPH)
#pragma unroll 1
        for (int first = me.warp % WPH * 32 + me.lane; first < D; first += G * 32 * WPH) {
          uint4 w[G];
          me.gather(wide_words + me.warp / WPH * F, first, 32 * WPH, D, wide_use, w);
#pragma unroll
          for (int i = 0; i < G; i++)
            if (first + i * 32 * WPH < D)
              *(uint2*)(shared + AT_XS + me.warp / WPH * row_bytes(F) + 8 * (first + i * 32 * WPH)) =
                  make_uint2(pair(value(w[i].x), value(w[i].y)), pair(value(w[i].z), value(w[i].w)));
        }
      sync_threads(NT);
      me.product<RD, F>(red, tile4);
      if (mine) publish(ex + AT_X2 + t % B * D + o, own[t] += me.total<RD>(red, t), use);
    }
    // The head: logits, or the likeliest token
    if (STEPS > 1) __threadfence();  // what this token left in the cache, before blocks can go on to the next
    me.norm(ex + AT_X2, use, wte, wpe);
    float best = -__int_as_float(0x7f800000);
    int index = VPAD;
#pragma unroll 1
    for (int g = 0; g < NG; g++) {
      float* sums = red + (g & 1) * RED;
      Block::Tile<RG, D> tile;
      me.load<RG, D>(tile);
      me.product<RG, D>(sums, tile);
      const int row = t % B, o = (id * NG + g) * RG + t / B;
      if (t < B * RG && o < VPAD) {
        const float y = o < VOCAB ? me.total<RG>(sums, t) : -__int_as_float(0x7f800000);
        if (LOGITS) logits[row * VPAD + o] = y;
        if (o < VOCAB && better(y, o, best, index)) best = y, index = o;
      }
    }
    if (LOGITS) continue;
    sync_threads(NT);
    float* values = red;
    int* indices = (int*)(red + RED);
    if (t < B * RG) values[t] = best, indices[t] = index;
    sync_threads(NT);
    const u32 choice = chosen + step + 1;
#pragma unroll 1
    for (int row = me.warp; row < B; row += NW) {
      best = -__int_as_float(0x7f800000), index = VPAD;
#pragma unroll 1
      for (int i = me.lane; i < RG; i += 32)
        if (better(values[i * B + row], indices[i * B + row], best, index)) best = values[i * B + row], index = indices[i * B + row];
#pragma unroll 1
      for (int turn = 0; turn < 2; turn++) {  // of this block, then of all blocks
#pragma unroll 1
        for (int i = 16; i; i >>= 1) {
          const float y = lane_xor(best, i);
          const int o = __float_as_int(lane_xor(__int_as_float(index), i));
          if (better(y, o, best, index)) best = y, index = o;
        }
        if (turn) break;
        u32* mine = ex + AT_BEST + 2 * (row * NB + id);
        if (me.lane == 0) {  // the value's lowest bit lies beside the index
          const u32 bits = __float_as_uint(best);
          store_word(mine, (bits & ~1u) | (choice & 1));
          store_word(mine + 1, (u32)index << 2 | (bits & 1) << 1 | (choice & 1));
        }
        best = -__int_as_float(0x7f800000), index = VPAD;
#pragma unroll 1
        for (int b = me.lane; b < NB; b += 32) {
          uint2 w;
#pragma unroll 1
          for (u32 tries = 0;; tries++) {
            w = load_words2(ex + AT_BEST + 2 * (row * NB + b));
            if (!(stale(w, choice) & 1) || me.late(tries)) break;
          }
          const float y = __uint_as_float((w.x & ~1u) | (w.y >> 1 & 1));
          if (better(y, w.y >> 2, best, index)) best = y, index = w.y >> 2;
        }
        sync_warp();
      }
      if (me.lane == 0) {
        token[row] = index < VOCAB ? index : 0;
        length[row] = length[row] < S - 1 ? length[row] + 1 : S - 1;
        if (id == 0) tokens[step * B + row] = index, logits[step * B + row] = best;
      }
      __threadfence();
    }
    sync_threads(NT);
  }
  sync_threads(NT);
  if (t == 0) given_up[id] = *dead;
  if (t == 0 && *dead) store_word(ex + 2, 1);
  if (t == 0 && id == 0) store_word(ex, uses + steps * L), store_word(ex + 1, chosen + steps);
}
