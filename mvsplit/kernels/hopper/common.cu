// What the kernels for Hopper have in common: bulk copies, barriers, wgmma's operands, sums of columns.

struct alignas(64) Map { char bytes[128]; };

// When a block's first thread came to a place, for benchmarks/engine_trace.py; else nothing.
#ifdef TRACE
__device__ u64 marks[256 * 8];
#define MARK(place) if (threadIdx.x == 0 && blockIdx.x < 256) marks[blockIdx.x * 8 + (place)] = nanoseconds()
#else
#define MARK(place)
#endif

// Counts the tries of a wait. One that lasts for two seconds is a fault of these files, or of a GPU that
// others draw on: the host is told at `fault`, all other waits end too, and what is written is wrong; or, with
// TRAP, the program ends.
struct Patience {
  u64 began = 0;
  u32 tries = 0;
  __device__ __forceinline__ bool ends(volatile u32 *fault) {
    if (++tries % 1024) return false;
    if (*fault) return true;
    const u64 now = nanoseconds();
    if (!began) began = now;
    if (now - began < 2000000000ull) return false;
    *fault = 1;
#ifdef TRAP
    asm volatile("trap;");
#endif
    return true;
  }
};

// Waits for a phase.
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity, volatile u32 *fault) {
  Patience patience;
#pragma unroll 1
  do {
    u32 done;
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done) : "r"(bar), "r"(parity) : "memory");
    if (done) return;
  } while (!patience.ends(fault));
}

__device__ __forceinline__ void prefetch(const Map *map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void load2(u32 to, const Map *map, u32 bar, int k, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row) : "memory");
}

__device__ __forceinline__ u64 matrix(u32 address) {  // K-major, swizzled by 128 bytes
  return (u64)((address & 0x3FFFF) >> 4) | (1ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float silu(float x) {  // exp overflows to ∞, of which the inverse is 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + exp2(-1.44269504f * x)));
  return x * y;
}

__device__ __forceinline__ void store_transposed(u32 address, u32 a, u32 b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address), "r"(a), "r"(b) : "memory");
}

__device__ __forceinline__ void load_transposed(u32 address, u32 &a, u32 &b) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address) : "memory");
}

// Asks the L2 cache for this block's share of what is needed next; one thread does.
__device__ __forceinline__ void fetch_ahead(const char *from, u64 bytes) {
  const u64 share = (bytes / gridDim.x + 128) / 128 * 128, end = min(bytes, (blockIdx.x + 1) * share);
  for (u64 at = blockIdx.x * share; at < end; at += 16384)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from + at), "r"((u32)min(end - at, (u64)16384)) : "memory");
}

#define SLAB 16  // columns of one task of `column_sums`

// Sums of SLAB columns of X over the real rows of both segments of a sample, by N threads that meet at
// a barrier of their own, AT_ONCE loads each at once; `scratch` has SLAB numbers for each of their warps.
template <int N, int BAR, int AT_ONCE>
__device__ __forceinline__ void column_sums(int task, int thread, const char *x, float *out, float *scratch, const int *p_valid,
                                            int image, int text, int image_rows, int sample_rows, int width) {
  const int slabs = width / SLAB, sample = task / slabs, column = task % slabs * SLAB, lane = thread % 32;
  for (int seg = 0; seg < 2; ++seg) {
    const int count = seg ? (p_valid ? p_valid[sample] : text) : image;
    const char *from = x + ((long long)(sample * sample_rows + seg * image_rows) * width + column + thread % 2 * 8) * 2;
    float total[8] = {};
    for (int t = thread / 2; t < count; t += AT_ONCE * N / 2) {
      Quad q[AT_ONCE];
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const int at = t + u * N / 2;
        q[u] = at < count ? *(const Quad *)(from + (long long)at * width * 2) : Quad{0, 0, 0, 0};
      }
#pragma unroll
      for (int u = 0; u < AT_ONCE; ++u) {
        const u32 both[4] = {q[u].x, q[u].y, q[u].z, q[u].w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[2 * i] += low_half(both[i]);
          total[2 * i + 1] += high_half(both[i]);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
#pragma unroll
      for (int bit = 2; bit <= 16; bit <<= 1) total[i] += __shfl_xor_sync(~0u, total[i], bit);
      if (lane < 2) scratch[thread / 32 * SLAB + lane * 8 + i] = total[i];
    }
    asm volatile("bar.sync %0, %1;" ::"n"(BAR), "n"(N) : "memory");
    if (thread < SLAB) {
      float all = 0.f;
      for (int w = 0; w < N / 32; ++w) all += scratch[w * SLAB + thread];
      out[(sample * 2 + seg) * width + column + thread] = all;
    }
    asm volatile("bar.sync %0, %1;" ::"n"(BAR), "n"(N) : "memory");
  }
}
