// Attention of each row's newest token to its cache, after flash decoding (Dao et al. 2023), and the write of that token's
// key and value: the row's own length is read, and no place behind it.
//
// Queries, keys and values are bfloat16, those of the newest tokens (B, HEADS, HEAD) and the caches (B, PLACES, HEADS, HEAD);
// sums are float32. Macros: PLACES, HEADS, HEAD, TOGETHER (heads of a block), AHEAD (places a thread asks for at once) and
// THREADS. A thread has 8 numbers of a head, so that 16 bytes of each place are its own, and LANES threads have the heads of
// a block. They stand in a warp 32 / LANES times, and every such group goes through places of its own.

#define LANES (TOGETHER * HEAD / 8)
#define GROUPS (THREADS / LANES)
#define WARPS (THREADS / 32)
#define ROW (HEADS * HEAD / 8)  // of 16 bytes: all heads of a place
#define SCALE (rsqrtf(HEAD) * 1.4426950408889634f)  // of scores, as exponents of 2
#define LEAST -1e30f  // below every score: 2 to the power of it is 0, and of it less itself 1

// What some places say: the largest score, the sum of 2^(score - largest), and the values by those weights
struct Found {
  float largest, sum, values[8];
};

__device__ __forceinline__ void unpack(float* x, uint4 v) {
  const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[2 * i] = __uint_as_float(words[i] << 16);
    x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ void rescale(Found& found, float largest) {
  const float less = exp2f(found.largest - largest);
  found.largest = largest, found.sum *= less;
#pragma unroll
  for (int i = 0; i < 8; i++) found.values[i] *= less;
}

__device__ __forceinline__ void join(Found& found, Found other) {
  const float largest = fmaxf(found.largest, other.largest);
  rescale(found, largest), rescale(other, largest);
  found.sum += other.sum;
#pragma unroll
  for (int i = 0; i < 8; i++) found.values[i] += other.values[i];
}

// The score of a place, from what the threads of its head have of it
__device__ __forceinline__ float score_of(const float* query, uint4 key) {
  float x[8], sum = 0;
  unpack(x, key);
#pragma unroll
  for (int i = 0; i < 8; i++) sum += x[i] * query[i];
#pragma unroll
  for (int other = 1; other < HEAD / 8; other *= 2) sum += lane_xor(sum, other);
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    decode_attention(const uint4* queries, const uint4* newest_keys, const uint4* newest_values, const int* lengths,
                     const uint4* old_keys, const uint4* old_values, uint4* keys, uint4* values, uint4* result) {
  SHARED_MEMORY(shared);
  Found* of_warps = (Found*)shared;  // (WARPS, LANES)
  const int lane = threadIdx.x % LANES, group = threadIdx.x / LANES, blocks = HEADS / TOGETHER;
  const int b = blockIdx.x / blocks, column = blockIdx.x % blocks * LANES + lane, mine = b * ROW + column;
  const int length = lengths[b], last = length < PLACES ? length : PLACES - 1;  // a full cache loses its last place
  const size_t first = (size_t)b * PLACES * ROW + column;
  const uint4 newest_key = newest_keys[mine], newest_value = newest_values[mine];
  float query[8];
  unpack(query, queries[mine]);
#pragma unroll
  for (int i = 0; i < 8; i++) query[i] *= SCALE;
  Found found = {LEAST};
  const float newest = score_of(query, newest_key);
  if (group == 0) found.largest = newest, found.sum = 1, unpack(found.values, newest_value);
  for (int begin = 0; begin < last; begin += AHEAD * GROUPS) {
    uint4 key[AHEAD], value[AHEAD];
    float score[AHEAD], largest = found.largest;
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      const int place = begin + j * GROUPS + group;
      const size_t at = first + (size_t)(place < last ? place : 0) * ROW;
      key[j] = old_keys[at], value[j] = old_values[at];
    }
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      score[j] = score_of(query, key[j]);
      if (begin + j * GROUPS + group >= last) score[j] = __int_as_float(0xff800000);
      largest = fmaxf(largest, score[j]);
    }
    rescale(found, largest);
#pragma unroll
    for (int j = 0; j < AHEAD; j++) {
      float x[8];
      const float weight = exp2f(score[j] - largest);
      unpack(x, value[j]);
      found.sum += weight;
#pragma unroll
      for (int i = 0; i < 8; i++) found.values[i] += weight * x[i];
    }
  }
  if (group == 0) {
    keys[first + (size_t)last * ROW] = newest_key;
    values[first + (size_t)last * ROW] = newest_value;
  }
#pragma unroll
  for (int other = LANES; other < 32; other *= 2) {
    Found theirs = {lane_xor(found.largest, other), lane_xor(found.sum, other)};
#pragma unroll
    for (int i = 0; i < 8; i++) theirs.values[i] = lane_xor(found.values[i], other);
    join(found, theirs);
  }
  if (threadIdx.x % 32 < LANES) of_warps[threadIdx.x / 32 * LANES + lane] = found;
  __syncthreads();
  if (group > 0) return;
#pragma unroll 4
  for (int warp = 1; warp < WARPS; warp++) join(found, of_warps[warp * LANES + lane]);
  u32 words[4];
#pragma unroll
  for (int i = 0; i < 4; i++) words[i] = pair(found.values[2 * i] / found.sum, found.values[2 * i + 1] / found.sum);
  result[mine] = make_uint4(words[0], words[1], words[2], words[3]);
}
