// One GPT-2 decoder for ROWS rows as one kernel that stays on the GPU for STEPS tokens.
//
// A block owns rows of every matrix. Its weights lie in one stream in their order of use, which one thread
// copies into a ring in shared memory, ahead of their use and without waiting for any activation. Blocks give
// each other activations as words of 32 bits whose lowest bit says in which use of its place the word was
// written: a reader waits for the data itself, so there are neither barriers nor flags. No sum depends on the
// order in which blocks arrive: the same input gives the same bits.
//
// Macros: L layers, D width, H heads, K head dim, ROWS, STEPS, S cache size, VPAD vocabulary (padded), VOCAB;
// NB blocks, NW warps that compute, NS splits of a context; RQ RD RF RG rows a block has of the matrices 3D, D,
// 4D and of a group of the head, NG groups; CH bytes of a stage, NST stages in the ring, SPT stages a token;
// LOGITS: write logits, and choose no token; EXACT: GELU with erf; SPINS: tries before a wait is given up.

constexpr int F = 4 * D, B = ROWS, NT = 32 * NW, RING = NST * CH;
constexpr int QUADS = D / 4;                                   // of 4 words in x
constexpr int WPR = NW / B < (QUADS + 31) / 32 ? NW / B : (QUADS + 31) / 32;  // warps for LayerNorm of a row
constexpr int E = (QUADS + 32 * WPR - 1) / (32 * WPR);         // quads a lane has of it
constexpr int LPK = K / 8, GPW = 32 / LPK, KPP = NW * GPW;     // lanes a key, keys at once in a warp, a block
constexpr int U = 2;                                           // keys a group of lanes has under way
constexpr int PW = K + 4;                                      // words of a split: o, max, sum, two unused
constexpr int BQ = RQ * D * 2, BD = RD * D * 2, BF = RF * D * 2, BM = RD * F * 2, BG = RG * D * 2;  // bytes
constexpr int LAYER = BQ + BD + BF + BM;
constexpr int VL = 5 * D + D + 2 * D + F + D;                  // vectors of a layer, see `pack`
// exchanged words, from here on:
constexpr int AT_QKV = 16, AT_PART = AT_QKV + B * 3 * D, AT_X1 = AT_PART + B * H * NS * PW, AT_X2 = AT_X1 + B * D,
              AT_H = AT_X2 + B * D, AT_BEST = AT_H + B * F;
__host__ __device__ constexpr int row_bytes(int k) { return k * 2 + ((k / 32) % 2 ? 0 : 64); }  // no bank conflicts
__host__ __device__ constexpr int max2(int a, int b) { return a > b ? a : b; }
constexpr int RED = NW * B * max2(max2(RQ, RF), max2(RG, RD)); // floats of one buffer of partial sums
// shared memory, in bytes:
constexpr int AT_XS = RING, AT_RED = AT_XS + B * row_bytes(F), AT_STATS = AT_RED + 8 * max2(RED, NW * PW),
              AT_FULL = AT_STATS + 8 * NW, AT_ROW = AT_FULL + 16 * NST, AT_DEAD = AT_ROW + 8 * B, AT_OWN = AT_DEAD + 8;

__device__ __forceinline__ float low(u32 v) { return __uint_as_float(v << 16); }
__device__ __forceinline__ float high(u32 v) { return __uint_as_float(v & 0xffff0000u); }
__device__ __forceinline__ u32 bf16(float f) {
  u32 v = __float_as_uint(f);
  return f == f ? (v + 0x7fffu + ((v >> 16) & 1)) >> 16 : 0x7fc0u;
}
__device__ __forceinline__ u32 pair(float a, float b) { return bf16(a) | bf16(b) << 16; }
__device__ __forceinline__ float value(u32 w) { return __uint_as_float(w & ~1u); }
__device__ __forceinline__ void publish(u32* p, float v, u32 use) { store_word(p, (__float_as_uint(v) & ~1u) | (use & 1)); }
__device__ __forceinline__ bool fresh(u32 w, u32 use) { return ((w ^ use) & 1) == 0; }
__device__ __forceinline__ bool fresh(uint2 w, u32 use) { return fresh(w.x, use) && fresh(w.y, use); }
__device__ __forceinline__ bool fresh(uint4 w, u32 use) { return ((((w.x ^ use) | (w.y ^ use)) | ((w.z ^ use) | (w.w ^ use))) & 1) == 0; }
__device__ __forceinline__ float lane_sum(float v) { for (int o = 16; o; o >>= 1) v += lane_xor(v, o); return v; }
__device__ __forceinline__ float lane_max(float v) { for (int o = 16; o; o >>= 1) v = fmaxf(v, lane_xor(v, o)); return v; }
__device__ __forceinline__ bool better(float v, int i, float than, int at) {  // NaN wins, then the larger, then the first
  return (v != v && than == than) || v > than || ((v == than || (v != v && than != than)) && i < at);
}
__device__ __forceinline__ float activation(float x) {
  if (EXACT) return 0.5f * x * erfcf(-0.70710678f * x);
  return x / (1 + __expf(-1.5957691216f * (x + 0.044715f * x * x * x)));
}

struct Block {
  char* shared;
  int warp, lane, id;
  u32 ready, freed;  // stages that have come, stages that this warp has given back

  // After so many tries in vain a word will not come: the block goes on without it, marks itself, and waits no more.
  __device__ bool late(u32 tries) {
    volatile int* dead = (int*)(shared + AT_DEAD);
    if (tries < 64 || (tries < SPINS && !*dead)) return false;
    *dead = 1;
    return true;
  }
  __device__ __forceinline__ void wait(u32 barrier, u32 parity) {  // a try takes a fraction of the time of `gather`'s
    for (u32 tries = 0; !barrier_passed(shared + AT_FULL + 8 * barrier, parity) && !late(tries / 16); tries++) {}
  }
  // Wait for the stream up to this byte.
  __device__ __forceinline__ void need(u32 end) {
    if (ready * CH >= end) return;
    for (; ready * CH < end; ready++) wait(ready % NST, ready / NST & 1);
    sync_warp();
  }
  // Give back the stages before this byte.
  __device__ __forceinline__ void release(u32 next) {
    sync_warp();
    for (; (freed + 1) * CH <= next; freed++) {
      need((freed + 1) * CH);
      if (lane == 0) barrier_arrive(shared + AT_FULL + 8 * (NST + freed % NST));
    }
  }
  // N quads of words at p, p + stride, ..., those below `count`, as soon as all of them are of this use.
  template <int N>
  __device__ __forceinline__ void gather(const u32* words, int first, int stride, int count, u32 use, uint4 (&v)[N]) {
    for (u32 tries = 0;; tries++) {
      bool ok = true;
#pragma unroll
      for (int i = 0; i < N; i++)
        if (first + i * stride < count) v[i] = load_words4(words + 4 * (first + i * stride));
#pragma unroll
      for (int i = 0; i < N; i++)
        if (first + i * stride < count) ok = ok && fresh(v[i], use);
      if (ok || late(tries)) return;
    }
  }
  // The block's R rows of a matrix (.., KD), which begin at byte `start` of the stream, times x (B, KD): each warp
  // takes every NW-th piece of 32 columns and leaves its sums in red[warp][row * B + b].
  template <int R, int KD>
  __device__ void product(u32 start, float* red) {
    constexpr int T = (R + 15) / 16;
    const int g = lane >> 2, c = lane & 3;
    const char* xs = shared + AT_XS;
    float acc[T][4];
#pragma unroll
    for (int t = 0; t < T; t++) acc[t][0] = acc[t][1] = acc[t][2] = acc[t][3] = 0;
    for (int kb = warp; kb < KD / 32; kb += NW) {
      const u32 at = start + kb * (R * 64), from = at % RING;
      need(at + R * 64);
      uint4 x = make_uint4(0, 0, 0, 0), zero = x;
      if (g < B) x = *(const uint4*)(xs + g * row_bytes(KD) + kb * 64 + c * 16);
#pragma unroll
      for (int t = 0; t < T; t++) {
        const int r = 16 * t + g;
        u32 o1 = from + r * 64 + c * 16, o2 = o1 + 512;
        if (o1 >= RING) o1 -= RING;
        if (o2 >= RING) o2 -= RING;
        const uint4 a1 = r < R ? *(const uint4*)(shared + o1) : zero, a2 = r + 8 < R ? *(const uint4*)(shared + o2) : zero;
        multiply(acc[t], a1.x, a2.x, a1.y, a2.y, x.x, x.y);
        multiply(acc[t], a1.z, a2.z, a1.w, a2.w, x.z, x.w);
      }
      release(kb + NW < KD / 32 ? at + NW * R * 64 : start + KD / 32 * R * 64);
    }
    release(start + KD / 32 * R * 64);
#pragma unroll
    for (int t = 0; t < T; t++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int r = 16 * t + g + (i > 1 ? 8 : 0), n = 2 * c + (i & 1);
        if (r < R && n < B) red[warp * R * B + r * B + n] = acc[t][i];
      }
    sync_threads(NT);
  }
  template <int R, int KD>
  __device__ __forceinline__ float total(const float* red, int t) {
    float y = 0;
#pragma unroll
    for (int w = 0; w < (NW < KD / 32 ? NW : KD / 32); w++) y += red[w * R * B + t];
    return y;
  }
  // LayerNorm of x, of which this lane has E quads of row warp / WPR, into xs as bfloat16.
  __device__ __forceinline__ void norm(const float4 (&x)[E], const float4 (&scale)[E], const float4 (&shift)[E], bool mine, int first) {
    float2* stats = (float2*)(shared + AT_STATS);
    float s = 0, q = 0;
#pragma unroll
    for (int i = 0; i < E; i++)
      if (mine && first + i * 32 * WPR < QUADS) {
        s += (x[i].x + x[i].y) + (x[i].z + x[i].w);
        q += (x[i].x * x[i].x + x[i].y * x[i].y) + (x[i].z * x[i].z + x[i].w * x[i].w);
      }
    s = lane_sum(s), q = lane_sum(q);
    if (lane == 0) stats[warp] = make_float2(s, q);
    sync_threads(NT);
    if (mine) {
      const int row = warp / WPR;
      s = q = 0;
#pragma unroll
      for (int w = 0; w < WPR; w++) s += stats[row * WPR + w].x, q += stats[row * WPR + w].y;
      const float mean = s / D, factor = rsqrtf(fmaxf(q / D - mean * mean, 0) + 1e-5f);
#pragma unroll
      for (int i = 0; i < E; i++)
        if (first + i * 32 * WPR < QUADS) {
          const float4 a = x[i], g = scale[i], b = shift[i];
          *(uint2*)(shared + AT_XS + row * row_bytes(D) + 8 * (first + i * 32 * WPR)) =
              make_uint2(pair((a.x - mean) * factor * g.x + b.x, (a.y - mean) * factor * g.y + b.y),
                         pair((a.z - mean) * factor * g.z + b.z, (a.w - mean) * factor * g.w + b.w));
        }
    }
    sync_threads(NT);
  }
  // LayerNorm of the x that all blocks publish at `words`.
  __device__ __forceinline__ void norm_of(const u32* words, u32 use, const float* vec) {
    const bool mine = warp < B * WPR;
    const int row = warp / WPR, first = warp % WPR * 32 + lane;
    float4 scale[E], shift[E], x[E];
#pragma unroll
    for (int i = 0; i < E; i++)
      if (mine && first + i * 32 * WPR < QUADS) {
        scale[i] = load_early4(vec + 4 * (first + i * 32 * WPR));
        shift[i] = load_early4(vec + D + 4 * (first + i * 32 * WPR));
      }
    if (mine) {
      uint4 v[E];
      gather(words + row * D, first, 32 * WPR, QUADS, use, v);
#pragma unroll
      for (int i = 0; i < E; i++) x[i] = make_float4(value(v[i].x), value(v[i].y), value(v[i].z), value(v[i].w));
    }
    norm(x, scale, shift, mine, first);
  }
};

// ---- Attention: an item is a row, a head and a split of its context ----

struct Item {
  int row, head, split, n, m, from;  // n keys in all; this split has m of them, from `from` on
};
__device__ __forceinline__ int splits(int n) { int s = (n + KPP - 1) / KPP; return s < NS ? s : NS; }
__device__ __forceinline__ Item item_of(int number, const int* length) {
  Item a;
  a.row = number / (H * NS), a.head = number / NS % H, a.split = number % NS;
  a.n = length[a.row] + 1;
  const int ns = splits(a.n), per = (a.n + ns - 1) / ns, left = a.n - a.split * per;
  a.from = a.split * per;
  a.m = a.split < ns && left > 0 ? (left < per ? left : per) : 0;
  return a;
}
// Keys and values of the U keys of this group of lanes from number j on, without the newest key, which no cache has.
__device__ __forceinline__ void load_keys(const Item& a, int j, int e, const u16* kl, const u16* vl, uint4 (&k)[U], uint4 (&v)[U]) {
#pragma unroll
  for (int u = 0; u < U; u++) {
    const int at = a.from + j + u * KPP;
    k[u] = v[u] = make_uint4(0, 0, 0, 0);
    if (j + u * KPP < a.m && at < a.n - 1) {
      const long o = ((long)a.row * S + at) * D + a.head * K + 8 * e;
      k[u] = load_words4((const u32*)(kl + o)), v[u] = load_words4((const u32*)(vl + o));
    }
  }
}
__device__ __forceinline__ float dot(uint4 k, const float* q) {
  return low(k.x) * q[0] + high(k.x) * q[1] + low(k.y) * q[2] + high(k.y) * q[3] +
         low(k.z) * q[4] + high(k.z) * q[5] + low(k.w) * q[6] + high(k.w) * q[7];
}
__device__ __forceinline__ uint4 eight(const uint4 (&v)[2]) {
  return make_uint4(pair(value(v[0].x), value(v[0].y)), pair(value(v[0].z), value(v[0].w)),
                    pair(value(v[1].x), value(v[1].y)), pair(value(v[1].z), value(v[1].w)));
}
// Write into acc[warp] the sum, its weight and the largest score of this warp's keys.
__device__ __forceinline__ void attend(Block& me, const Item& a, const u32* ex, u32 use, u16* kl, u16* vl, float* acc,
                                       uint4 (&k)[U], uint4 (&v)[U]) {
  const int e = me.lane % LPK, group = me.warp * GPW + me.lane / LPK;
  const u32* qkv = ex + AT_QKV + a.row * 3 * D + a.head * K;
  float o[8], q[8], top = -1e30f, sum = 0;
#pragma unroll
  for (int i = 0; i < 8; i++) o[i] = 0;
  if (a.m > me.warp * GPW) {
    uint4 w[2];
    me.gather(qkv, 2 * e, 1, 2 * e + 2, use, w);
    const float f = rsqrtf((float)K);
    q[0] = value(w[0].x) * f, q[1] = value(w[0].y) * f, q[2] = value(w[0].z) * f, q[3] = value(w[0].w) * f;
    q[4] = value(w[1].x) * f, q[5] = value(w[1].y) * f, q[6] = value(w[1].z) * f, q[7] = value(w[1].w) * f;
    for (int j0 = 0; j0 < a.m; j0 += U * KPP) {
      if (j0) load_keys(a, j0 + group, e, kl, vl, k, v);
#pragma unroll
      for (int u = 0; u < U; u++) {
        const int j = j0 + group + u * KPP;
        if (j < a.m && a.from + j == a.n - 1) {  // the newest key: from the blocks that computed it, into the cache
          const long to = ((long)a.row * S + a.n - 1) * D + a.head * K + 8 * e;
          me.gather(qkv + D, 2 * e, 1, 2 * e + 2, use, w), k[u] = eight(w), store_words4(kl + to, k[u]);
          me.gather(qkv + 2 * D, 2 * e, 1, 2 * e + 2, use, w), v[u] = eight(w), store_words4(vl + to, v[u]);
        }
        sync_warp();
        float s = dot(k[u], q);
        for (int i = LPK / 2; i; i >>= 1) s += lane_xor(s, i);
        if (j < a.m) {
          const float t = fmaxf(top, s), keep = __expf(top - t), p = __expf(s - t);
          top = t, sum = sum * keep + p;
          o[0] = o[0] * keep + p * low(v[u].x), o[1] = o[1] * keep + p * high(v[u].x);
          o[2] = o[2] * keep + p * low(v[u].y), o[3] = o[3] * keep + p * high(v[u].y);
          o[4] = o[4] * keep + p * low(v[u].z), o[5] = o[5] * keep + p * high(v[u].z);
          o[6] = o[6] * keep + p * low(v[u].w), o[7] = o[7] * keep + p * high(v[u].w);
        }
      }
    }
    for (int i = LPK; i < 32; i <<= 1) {
      const float t = fmaxf(top, lane_xor(top, i)), keep = __expf(top - t);
      top = t, sum *= keep, sum += lane_xor(sum, i);
#pragma unroll
      for (int d = 0; d < 8; d++) o[d] *= keep, o[d] += lane_xor(o[d], i);
    }
  }
  acc += me.warp * PW;
  if (me.lane < LPK) {
#pragma unroll
    for (int d = 0; d < 8; d++) acc[8 * e + d] = o[d];
    if (e == 0) acc[K] = top, acc[K + 1] = sum;
  }
}
// Merge the splits of all heads, which all blocks read, into xs.
__device__ __forceinline__ void merge(Block& me, const u32* ex, u32 use, const int* length) {
  constexpr int DPL = K > 32 ? K / 32 : 1;  // dims a lane
  for (int pairs = me.warp; pairs < B * H; pairs += NW) {
    const int row = pairs / H, ns = splits(length[row] + 1), lane = me.lane;
    const u32* p = ex + AT_PART + pairs * NS * PW;
    u32 o[NS][DPL];
    uint2 w = make_uint2(use, use);
    for (u32 tries = 0;; tries++) {
      bool ok = true;
      if (lane < ns) w = load_words2(p + lane * PW + K), ok = fresh(w, use);
#pragma unroll
      for (int s = 0; s < NS; s++)
        if (s < ns)
#pragma unroll
          for (int d = 0; d < DPL; d++) o[s][d] = load_word(p + s * PW + (32 * d + lane) % K);
#pragma unroll
      for (int s = 0; s < NS; s++)
        if (s < ns)
#pragma unroll
          for (int d = 0; d < DPL; d++) ok = ok && fresh(o[s][d], use);
      if (ok || me.late(tries)) break;
    }
    sync_warp();
    const float top = lane_max(lane < ns ? value(w.x) : -1e30f), f = lane < ns ? __expf(value(w.x) - top) : 0;
    const float share = f / lane_sum(lane < ns ? f * value(w.y) : 0);
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
#pragma unroll
    for (int d = 0; d < DPL; d++)
      if (lane < K) ((u16*)(me.shared + AT_XS + row * row_bytes(D)))[pairs % H * K + 32 * d + lane] = bf16(y[d]);
  }
  sync_threads(NT);
}

// ---- The kernel ----

extern "C" __global__ void __launch_bounds__(NT + 32, 1)
decode(const int* token_in, const int* length_in, const char* weights, const u16* wte, const u16* wpe, const float* vec,
       const u32* ex_in, const u16* k_in, const u16* v_in,                      // the last three are the outputs' memory
       u32* ex, u16* k_cache, u16* v_cache, int* tokens, float* logits, int* given_up) {
  SHARED_MEMORY(shared);
  const int t = threadIdx.x, id = blockIdx.x;
  Block me = {shared, t / 32, t % 32, id, 0, 0};
  int *token = (int*)(shared + AT_ROW), *length = token + B, *dead = (int*)(shared + AT_DEAD);
  float *red = (float*)(shared + AT_RED), *own = (float*)(shared + AT_OWN);
  if (t == 0) {
    for (int i = 0; i < NST; i++) barrier_init(shared + AT_FULL + 8 * i, 1), barrier_init(shared + AT_FULL + 8 * (NST + i), NW);
    barriers_are_ready();
    *dead = load_word(ex + 2);  // whether an earlier launch was given up
  }
  if (t < B) token[t] = token_in[t], length[t] = length_in[t] < S ? length_in[t] : S - 1;
  __syncthreads();
  if (me.warp == NW) {  // this warp copies weights, and does nothing else
    if (me.lane == 0)
      for (u32 i = 0; i < STEPS * SPT; i++) {
        while (i >= NST && !barrier_passed(shared + AT_FULL + 8 * (NST + i % NST), (i / NST - 1) & 1)) {}
        fetch(shared + i % NST * CH, weights + ((long)id * SPT + i % SPT) * CH, CH, shared + AT_FULL + 8 * (i % NST));
      }
    return;
  }
  const u32 uses = load_word(ex), chosen = load_word(ex + 1);  // of each place, by earlier launches
  const float* final_vec = vec + L * VL;
  for (u32 step = 0; step < STEPS; step++) {
    u32 at = step * SPT * CH, use = uses + step * L;
    // The residual stream: each block keeps its own rows, and all of x only as far as LayerNorm.
    for (int i = t; i < B * RD; i += NT) {
      const int row = i % B, d = id * RD + i / B;
      if (d < D) own[i] = low(wte[(long)token[row] * D + d]) + low(wpe[(long)length[row] * D + d]);
    }
    for (int l = 0; l < L; l++, at += LAYER) {
      use++;
      const float* p = vec + (long)l * VL;
      u16 *kl = k_cache + (long)l * B * S * D, *vl = v_cache + (long)l * B * S * D;
      Item a = item_of(id < B * H * NS ? id : 0, length);
      if (id >= B * H * NS) a.m = 0;
      uint4 k[U], v[U];
      load_keys(a, me.warp * GPW + me.lane / LPK, me.lane % LPK, kl, vl, k, v);
      // 1. LayerNorm, query, key and value
      if (l == 0) {
        const bool mine = me.warp < B * WPR;
        const int row = me.warp / WPR, first = me.warp % WPR * 32 + me.lane;
        float4 x[E], scale[E], shift[E];
#pragma unroll
        for (int i = 0; i < E; i++) {
          const int quad = first + i * 32 * WPR;
          if (!mine || quad >= QUADS) continue;
          const uint2 w = *(const uint2*)(wte + (long)token[row] * D + 4 * quad), q = *(const uint2*)(wpe + (long)length[row] * D + 4 * quad);
          x[i] = make_float4(low(w.x) + low(q.x), high(w.x) + high(q.x), low(w.y) + low(q.y), high(w.y) + high(q.y));
          scale[i] = load_early4(p + 4 * quad), shift[i] = load_early4(p + D + 4 * quad);
        }
        me.norm(x, scale, shift, mine, first);
      } else {
        me.norm_of(ex + AT_X2, use - 1, p);
      }
      float bias = t < B * RQ && id * RQ + t / B < 3 * D ? load_early(p + 2 * D + id * RQ + t / B) : 0;
      me.product<RQ, D>(at, red);
      for (int i = t; i < B * RQ; i += NT) {
        const int o = id * RQ + i / B;
        if (o < 3 * D) publish(ex + AT_QKV + i % B * 3 * D + o, me.total<RQ, D>(red, i) + (i == t ? bias : p[2 * D + o]), use);
      }
      // 2. Attention
      float* acc = red + RED;
      for (int number = id; number < B * H * NS; number += NB) {
        if (number != id) {
          sync_threads(NT);  // acc has been read
          a = item_of(number, length);
          load_keys(a, me.warp * GPW + me.lane / LPK, me.lane % LPK, kl, vl, k, v);
        }
        attend(me, a, ex, use, kl, vl, acc, k, v);
        sync_threads(NT);
        u32* part = ex + AT_PART + number * PW;
        for (int d = t; d < K; d += NT) {
          float top = -1e30f, o = 0, sum = 0;
#pragma unroll
          for (int w = 0; w < NW; w++) top = fmaxf(top, acc[w * PW + K]);
#pragma unroll
          for (int w = 0; w < NW; w++) {
            const float f = __expf(acc[w * PW + K] - top);
            o += f * acc[w * PW + d], sum += f * acc[w * PW + K + 1];
          }
          publish(part + d, o, use);
          if (d == 0) publish(part + K, top, use), publish(part + K + 1, sum, use);
        }
      }
      // 3. The splits together, projection, residual
      bias = t < B * RD && id * RD + t / B < D ? load_early(p + 5 * D + id * RD + t / B) : 0;
      merge(me, ex, use, length);
      me.product<RD, D>(at + BQ, red);
      for (int i = t; i < B * RD; i += NT) {
        const int d = id * RD + i / B;
        if (d < D) publish(ex + AT_X1 + i % B * D + d, own[i] += me.total<RD, D>(red, i) + (i == t ? bias : p[5 * D + d]), use);
      }
      // 4. LayerNorm, widen, GELU
      bias = t < B * RF && id * RF + t / B < F ? load_early(p + 8 * D + id * RF + t / B) : 0;
      me.norm_of(ex + AT_X1, use, p + 6 * D);
      me.product<RF, D>(at + BQ + BD, red);
      for (int i = t; i < B * RF; i += NT) {
        const int o = id * RF + i / B;
        if (o < F) publish(ex + AT_H + i % B * F + o, activation(me.total<RF, D>(red, i) + (i == t ? bias : p[8 * D + o])), use);
      }
      // 5. Narrow, residual
      bias = t < B * RD && id * RD + t / B < D ? load_early(p + 8 * D + F + id * RD + t / B) : 0;
      constexpr int WPH = NW / B, G = 4 < (D + 32 * WPH - 1) / (32 * WPH) ? 4 : (D + 32 * WPH - 1) / (32 * WPH);
      if (me.warp < B * WPH)
        for (int first = me.warp % WPH * 32 + me.lane; first < D; first += G * 32 * WPH) {
          uint4 w[G];
          me.gather(ex + AT_H + me.warp / WPH * F, first, 32 * WPH, D, use, w);
#pragma unroll
          for (int i = 0; i < G; i++)
            if (first + i * 32 * WPH < D)
              *(uint2*)(shared + AT_XS + me.warp / WPH * row_bytes(F) + 8 * (first + i * 32 * WPH)) =
                  make_uint2(pair(value(w[i].x), value(w[i].y)), pair(value(w[i].z), value(w[i].w)));
        }
      sync_threads(NT);
      me.product<RD, F>(at + BQ + BD + BF, red);
      for (int i = t; i < B * RD; i += NT) {
        const int d = id * RD + i / B;
        if (d < D) publish(ex + AT_X2 + i % B * D + d, own[i] += me.total<RD, F>(red, i) + (i == t ? bias : p[8 * D + F + d]), use);
      }
    }
    // The head: logits, or the likeliest token
    if (STEPS > 1) __threadfence();  // what this token left in the cache, before blocks can go on to the next
    me.norm_of(ex + AT_X2, use, final_vec);
    float best = -__int_as_float(0x7f800000);
    int index = VPAD;
    for (int g = 0; g < NG; g++, at += BG) {
      float* sums = red + (g & 1) * RED;
      me.product<RG, D>(at, sums);
      const int row = t % B, o = (id * NG + g) * RG + t / B;
      if (t < B * RG && o < VPAD) {
        const float y = o < VOCAB ? me.total<RG, D>(sums, t) : -__int_as_float(0x7f800000);
        if (LOGITS) logits[row * VPAD + o] = y;
        if (o < VOCAB && better(y, o, best, index)) best = y, index = o;
      }
    }
    me.release((step + 1) * SPT * CH);
    if (LOGITS) continue;
    sync_threads(NT);
    float* values = red;
    int* indices = (int*)(red + RED);
    if (t < B * RG) values[t] = best, indices[t] = index;
    sync_threads(NT);
    const u32 choice = chosen + step + 1;
    for (int row = me.warp; row < B; row += NW) {
      best = -__int_as_float(0x7f800000), index = VPAD;
      for (int i = me.lane; i < RG; i += 32)
        if (better(values[i * B + row], indices[i * B + row], best, index)) best = values[i * B + row], index = indices[i * B + row];
      for (int turn = 0; turn < 2; turn++) {  // of this block, then of all blocks
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
        for (int b = me.lane; b < NB; b += 32) {
          uint2 w;
          for (u32 tries = 0;; tries++) {
            w = load_words2(ex + AT_BEST + 2 * (row * NB + b));
            if (fresh(w, choice) || me.late(tries)) break;
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
  if (t == 0 && id == 0) store_word(ex, uses + STEPS * L), store_word(ex + 1, chosen + STEPS);
}
