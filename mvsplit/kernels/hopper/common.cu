// What the products for Hopper have in common: bulk copies, barriers, wgmma's operands, a thread's
// share of a tile. The macros are those of product.cu.

struct alignas(64) Map { char bytes[128]; };

#define WARPS (4 * WG)
#define THREADS (32 * WARPS)
#define W_BYTES (8192 * WG)
#define A_BYTES (128 * TOK)
#define STAGE (W_BYTES + A_BYTES)
#define BOX (TOK / (LOADERS > 2 ? LOADERS : 2))  // tokens of one bulk copy
#define COLUMNS (EPI == 2 ? 32 * WG : 64 * WG)   // of the output, a tile
#define PITCH (2 * COLUMNS + 16)                 // bytes of a staged row, padded against conflicts
#define HALF_TOKENS (NT / 4)                     // tokens of a thread in one product
#define GROUPS (CLUSTER / LOADERS)
#define SLOTS (2 * WG)                           // of the rotation's table: 16 channels each

// Waits for a phase; a wait that never ends is a fault of this file, and ends the program.
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  for (u32 tries = 0; tries < (1u << 22); ++tries) {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    if (done) return;
  }
  __trap();
}

__device__ __forceinline__ void barrier_arrive_at(u32 bar, u32 rank) {
#if CLUSTER > 1
  asm volatile(
      "{ .reg .b32 at; mapa.shared::cluster.u32 at, %0, %1;"
      " mbarrier.arrive.shared::cluster.b64 _, [at]; }" ::"r"(bar), "r"(rank) : "memory");  // no wider: a fence
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#endif
}

// After barriers are initialised: before that nobody may signal another block's.
__device__ __forceinline__ void cluster_start() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.relaxed;\n barrier.cluster.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ void load2(u32 to, const Map *map, u32 bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row) : "memory");
}

__device__ __forceinline__ void load2_to_all(u32 to, const Map *map, u32 bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row),
      "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}

// The weight rows of a tile. Rotation and SwiGLU combine two rows: these come eight of the one kind
// after eight of the other, so that one thread holds both.
__device__ __forceinline__ void load_w(u32 to, const Map *map, u32 bar, int k, int tile) {
#if EPI == 1
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(0), "r"(tile) : "memory");
#elif EPI == 2
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(0), "r"(tile * 4 * WG) : "memory");
#else
  load2(to, map, bar, k, tile * 64 * WG);
#endif
}

// This block's share of the tokens of a step, sent to the whole cluster.
__device__ __forceinline__ void load_a(u32 to, const Map *map, u32 bar, int step, int k, int row, u32 rank) {
#if LOADERS > 1
  if (GROUPS == 1 || rank / LOADERS == step % GROUPS) {
    const int part = (rank % LOADERS) * BOX;
    load2_to_all(to + part * 128, map, bar, k, row + part);
  }
#else
  load2(to, map, bar, k, row);
  load2(to + BOX * 128, map, bar, k, row + BOX);
#endif
}

__device__ __forceinline__ u64 matrix(u32 address) {  // K-major, swizzled by 128 bytes
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 address, u32 &a, u32 &b) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}

// Adds up over the eight lanes that hold the same tokens, and writes this warp's sums by token.
__device__ __forceinline__ void sum_over_lanes(float (&v)[HALF_TOKENS], float *sums, int lane) {
  int count = HALF_TOKENS, first = 0;
#pragma unroll
  for (int bit = 16; bit >= 4; bit >>= 1) {
    const bool upper = lane & bit;
    if (count % 2 == 0) {
      count /= 2;
#pragma unroll
      for (int i = 0; i < HALF_TOKENS / 2; ++i)
        if (i < count) {
          const float send = upper ? v[i] : v[i + count];
          const float keep = upper ? v[i + count] : v[i];
          v[i] = keep + __shfl_xor_sync(~0u, send, bit);
        }
      first += upper ? count : 0;
    } else {
#pragma unroll
      for (int i = 0; i < HALF_TOKENS / 2; ++i)
        if (i < count) v[i] += __shfl_xor_sync(~0u, v[i], bit);
    }
  }
#pragma unroll
  for (int i = 0; i < HALF_TOKENS / 2; ++i)
    if (i < count) {
      const int at = first + i;  // in the order of a thread's tokens: 8-blocks, then the two of a pair
      sums[at / 2 * 8 + (lane & 3) * 2 + at % 2] = v[i];
    }
}

// Multiplies each token of a thread's two output columns by its own factor.
__device__ __forceinline__ void scale_tokens(float (&acc)[NI][NT / 2], const float *scale, int lane_token) {
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float r = scale[i * NT + j * 8 + lane_token + e];
        acc[i][4 * j + e] *= r;
        acc[i][4 * j + 2 + e] *= r;
      }
}

struct Gain { const u16 *p; float number; int stride; };  // [D], one element, or a number

__device__ __forceinline__ float gain(Gain g, int at) {
  return g.p ? low_half((u32)g.p[at * g.stride]) : g.number;
}

// The blocks that share rows are all on the device; here they wait until `n` of them have come. Every
// launch adds n, so nobody sets the count back. Returns 0, or NaN, which will be seen, if they do not.
__device__ __forceinline__ float meet(u32 *arrived, u32 n) {
  u32 now, tries = 0;
  asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], 1;" : "=r"(now) : "l"(arrived) : "memory");
  const u32 target = (now / n + 1) * n;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
  while ((int)(now - target) < 0 && ++tries < (1u << 24));
  return (int)(now - target) < 0 ? __int_as_float(0x7FC00000) : 0.f;
}
