// The CUDA source of the decoder or of attention as C++ on a CPU: each thread of the GPU is a fiber, and one fiber runs at
// a time. Each round has them in turn from another one on, and warps stop for many rounds at any time, so that who forgets
// to wait for others reads too soon. A copy into shared memory leaves NaN at once and its data some rounds later.
#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <algorithm>
#include <utility>
#include <vector>

typedef unsigned short u16;
typedef unsigned int u32;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static float2 make_float2(float x, float y) { return {x, y}; }
static float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)
static float __uint_as_float(u32 v) { float f; memcpy(&f, &v, 4); return f; }
static u32 __float_as_uint(float f) { u32 v; memcpy(&v, &f, 4); return v; }
static float __int_as_float(int v) { return __uint_as_float(v); }
static int __float_as_int(float f) { return __float_as_uint(f); }
#define __expf expf
static float __fdividef(float a, float b) { return a / b; }
static float rsqrtf(float x) { return 1 / sqrtf(x); }

struct Index { int x; };
struct Warp { float sent[32]; u32 a[32][4], b[32][2]; const char* rows[32]; int count = 0, round = 0; };
struct Named { int count = 0, round = 0; };
struct Bar { short count, left; u32 phase; };  // in the 8 bytes of an mbarrier
struct BlockState { std::vector<char> shared; std::vector<Warp> warps; Named named, all; };
struct Fiber { ucontext_t context; jmp_buf place; std::vector<char> stack; int block, thread; bool begun = false, over = false; };
struct Copy { void* to; const void* from; u32 bytes; Bar* bar; int delay; };
static std::vector<BlockState> blocks;
static std::vector<Fiber> fibers;
static std::vector<Copy> copies;
static jmp_buf scheduler;
static Fiber* now;
static int block_threads;
static Index threadIdx, blockIdx, gridDim;
// A fiber begins in a context, which takes system calls to enter; from then on it is left and entered by jumps.
static void pause_fiber() {
  if (!_setjmp(now->place)) _longjmp(scheduler, 1);
}
static void enter(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.begun) _longjmp(fiber.place, 1);
  fiber.begun = true;
  setcontext(&fiber.context);
}
static Warp& warp_of() { return blocks[now->block].warps[now->thread / 32]; }
template <class T> static void meet(T& place, int count) {
  const int round = place.round;
  if (++place.count == count) place.count = 0, place.round++;
  else while (place.round == round) pause_fiber();
}
#define SHARED_MEMORY(name) char* name = blocks[now->block].shared.data()
static u32 load_word(const u32* p) { if (rand() % 4 == 0) pause_fiber(); return *p; }
static uint2 load_words2(const u32* p) { uint2 v; v.x = load_word(p), v.y = load_word(p + 1); return v; }
static uint4 load_words4(const u32* p) {
  return {load_word(p), load_word(p + 1), load_word(p + 2), load_word(p + 3)};
}
static void store_word(u32* p, u32 v) { if (rand() % 4 == 0) pause_fiber(); *p = v; }
static void store_words4(void* p, uint4 v) { memcpy(p, &v, 16); }
static void prefetch(const void*) {}
static void barrier_init(void* b, u32 count) { *(Bar*)b = {(short)count, (short)count, 0}; }
static void barriers_are_ready() {}
static void barrier_arrive(void* p) { Bar* b = (Bar*)p; if (--b->left == 0) b->left = b->count, b->phase++; }
static bool barrier_passed(void* p, u32 parity) {
  if ((((Bar*)p)->phase & 1) == parity) pause_fiber();
  return (((Bar*)p)->phase & 1) != parity;
}
static void fetch(void* to, const void* from, u32 bytes, void* b) {
  if (((size_t)to | (size_t)from | bytes) % 16) abort();
  memset(to, 0xff, bytes);
  copies.push_back({to, from, bytes, (Bar*)b, rand() % 50});
}
static void sync_threads(u32 count) { meet(blocks[now->block].named, count); }
static void __syncthreads() { meet(blocks[now->block].all, block_threads); }
static void __threadfence() {}
static void sync_warp() { meet(warp_of(), 32); }
static float lane_of(float v, int lane) {
  Warp& w = warp_of();
  w.sent[now->thread % 32] = v;
  meet(w, 32);
  const float got = w.sent[lane];
  meet(w, 32);
  return got;
}
static float lane_xor(float v, int mask) { return lane_of(v, (now->thread % 32) ^ mask); }
static u32 rounded(float f) {
  const u32 v = __float_as_uint(f);
  return f == f ? (v + 0x7fff + (v >> 16 & 1)) >> 16 : 0x7fff;
}
static uint4 load_shared4(const char* p) { if (rand() % 16 == 0) pause_fiber(); return *(const uint4*)p; }
static u32 pair(float a, float b) { return rounded(a) | rounded(b) << 16; }
static float half_of(u32 v, int high) { return __uint_as_float(high ? v & 0xffff0000u : v << 16); }
static void multiply(float* acc, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  Warp& w = warp_of();
  const int lane = now->thread % 32, g = lane / 4, c = lane % 4;
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(w.a[lane], a, 16), memcpy(w.b[lane], b, 8);
  meet(w, 32);
  for (int i = 0; i < 4; i++)
    for (int k = 0; k < 16; k++) {
      const int from = k % 8 / 2, upper = k / 8;
      acc[i] += half_of(w.a[g * 4 + from][2 * upper + i / 2], k & 1) * half_of(w.b[(2 * c + i % 2) * 4 + from][upper], k & 1);
    }
  meet(w, 32);
}

static void run_fiber();
// Run a kernel whose parameters are all pointers; a round in which nothing can go on cannot be told from waiting,
// so there is a limit on rounds. Return the number of fibers that have not ended.
static void** parameters;
static int launch(int grid, int threads, int shared, long rounds, unsigned seed) {
  srand(seed);
  block_threads = threads, gridDim.x = grid;
  blocks.assign(grid, BlockState());
  fibers.assign(grid * threads, Fiber());
  copies.clear();
  for (auto& b : blocks) b.shared.assign(shared + 128, 0x7f), b.warps.resize(threads / 32);
  for (int i = 0; i < grid * threads; i++) {
    Fiber& f = fibers[i];
    f.block = i / threads, f.thread = i % threads, f.stack.resize(96 * 1024);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size();
    makecontext(&f.context, run_fiber, 0);
  }
  std::vector<int> order(fibers.size());
  for (size_t i = 0; i < order.size(); i++) order[i] = i;
  size_t left = order.size();
  std::vector<int> asleep(fibers.size() / 32 + 1);  // rounds, of each warp
  for (long round = 0; left && round < rounds; round++) {
    for (int& n : asleep) n = n ? n - 1 : rand() % 64 ? 0 : rand() % 200;
    std::rotate(order.begin(), order.begin() + rand() % order.size(), order.end());
    for (int i : order) {
      if (fibers[i].over || asleep[i / 32]) continue;
      now = &fibers[i], threadIdx.x = now->thread, blockIdx.x = now->block;
      enter(*now);
      left -= fibers[i].over;
    }
    for (size_t i = 0; i < copies.size();) {
      if (copies[i].delay-- > 0) { i++; continue; }
      memcpy(copies[i].to, copies[i].from, copies[i].bytes);
      barrier_arrive(copies[i].bar);
      copies.erase(copies.begin() + i);
    }
  }
  return left;
}
static void load_matrices(u32* x, const char* p, bool transposed = false) {
  Warp& w = warp_of();
  const int lane = now->thread % 32, g = lane / 4, c = lane % 4;
  if ((size_t)p % 16) abort();
  w.rows[lane] = p;
  meet(w, 32);
  for (int i = 0; i < 4; i++)
    if (transposed) x[i] = ((const u16*)w.rows[8 * i + 2 * c])[g] | (u32)((const u16*)w.rows[8 * i + 2 * c + 1])[g] << 16;
    else x[i] = ((const u32*)w.rows[8 * i + g])[c];
  meet(w, 32);
}
static void load_matrices_transposed(u32* x, const char* p) { load_matrices(x, p, true); }
