// What the decoder and attention need of a GPU, in one place: tests/cuda_on_cpu.h has the same for a CPU.
// Source of the instructions: NVIDIA, PTX ISA.
typedef unsigned short u16;
typedef unsigned int u32;

#define SHARED_MEMORY(name) extern __shared__ __align__(128) char name[]
__device__ __forceinline__ u32 address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- Words that other blocks write: relaxed, so that neither L1 nor the compiler keeps them ----
__device__ __forceinline__ u32 load_word(const u32* p) {
  u32 v;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_words2(const u32* p) {
  uint2 v;
  asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint4 load_words4(const u32* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_word(u32* p, u32 v) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ void store_words4(void* p, uint4 v) {
  asm volatile("st.relaxed.gpu.global.v4.u32 [%0], {%1,%2,%3,%4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// Ask for the 128 bytes around p, from memory into the cache that all blocks share.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// ---- Copies into shared memory that run by themselves, and the barriers that count them ----
__device__ __forceinline__ void barrier_init(void* b, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_are_ready() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void barrier_arrive(void* b) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(b)) : "memory");
}
__device__ __forceinline__ bool barrier_passed(void* b, u32 parity) {
  u32 passed;
  asm volatile(
      "{\n.reg .pred p;\nmbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
      : "=r"(passed) : "r"(address(b)), "r"(parity) : "memory");
  return passed;
}
__device__ __forceinline__ void fetch(void* to, const void* from, u32 bytes, void* b) {
  unsigned long long once;  // the weights of a token are read once: they shall not displace the cache
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address(b)), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(address(to)), "l"(from), "r"(bytes), "r"(address(b)), "l"(once) : "memory");
}

// ---- Threads of a block, lanes of a warp ----
__device__ __forceinline__ void sync_threads(u32 count) {
  __syncwarp();
  asm volatile("bar.sync 1, %0;" ::"r"(count) : "memory");
}
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float lane_xor(float v, int mask) { return __shfl_xor_sync(~0u, v, mask); }
__device__ __forceinline__ float lane_of(float v, int lane) { return __shfl_sync(~0u, v, lane); }
// Two numbers rounded to bfloat16, the first in the lower half
__device__ __forceinline__ u32 pair(float a, float b) {
  u32 v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(b), "f"(a));
  return v;
}
// 16 bytes of shared memory, read where this is written: the compiler does not move it past a wait
__device__ __forceinline__ uint4 load_shared4(const char* p) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address(p)) : "memory");
  return v;
}
// acc (16 x 8) += a (16 x 16) b (16 x 8) in bfloat16 with float32 sums
__device__ __forceinline__ void multiply(float* acc, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// Four 8 x 8 matrices of 16-bit numbers: lane i gives the row i % 8 of matrix i / 8, 16 bytes of shared memory. Lane 4 g + c
// gets columns 2 c and 2 c + 1 of row g of each, as `multiply` takes them; transposed, rows 2 c and 2 c + 1 of column g.
__device__ __forceinline__ void load_matrices(u32* x, const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address(p)) : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(u32* x, const char* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address(p)) : "memory");
}
