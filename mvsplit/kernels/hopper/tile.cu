// A tile of a product and what a thread holds of it: loads, sums over channels, gains, meetings. The
// macros are those of product.cu.

#define WARPS (4 * WG)
#define THREADS (32 * WARPS)
#define W_BYTES (128 * W_ROWS)
#define A_BYTES (128 * TOK)
#define STAGE (W_BYTES + A_BYTES)
#define COLUMNS (EPI == 2 ? W_ROWS / 2 : W_ROWS)  // of the output, a tile
#define HALF_TOKENS (NT / 4)                     // tokens of a thread in one product

// A warpgroup whose epilogue needs no other goes on alone, so that one multiplies while the other does
// what follows. It writes COLUMNS_OUT columns, WORKERS threads at once.
#define ALONE (EPI == 2 || BY_TOKENS)
#define WORKERS (ALONE ? 128 : THREADS)
#define COLUMNS_OUT (EPI == 2 ? 32 : COLUMNS)
#define PITCH (2 * COLUMNS_OUT + 16)             // bytes of a staged row, padded against conflicts

__device__ __forceinline__ void consumers_sync() {
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

__device__ __forceinline__ void workers_sync(int group) {
#if ALONE
  asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
#else
  consumers_sync();
#endif
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
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
      " [%0], [%1, {%3, %4, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(0), "r"(tile * W_ROWS / 16) : "memory");
#else
  load2(to, map, bar, k, tile * W_ROWS);
#endif
}

__device__ __forceinline__ void load_a(u32 to, const Map *map, u32 bar, int k, int row) {  // at most 256 rows a copy
  load2(to, map, bar, k, row);
  load2(to + A_BYTES / 2, map, bar, k, row + TOK / 2);
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

// Multiplies each token of a thread's output columns by its own factor.
__device__ __forceinline__ void scale_tokens(float (&acc)[NI][NT / 2], const float *scale, int lane_token) {
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float r = scale[(BY_TOKENS ? 0 : i * NT) + j * 8 + lane_token + e];
        acc[i][4 * j + e] *= r;
        acc[i][4 * j + 2 + e] *= r;
      }
}

struct Gain { const u16 *p; float number; int stride; };  // [D], one element, or a number

__device__ __forceinline__ float gain(Gain g, int at) {
  return g.p ? low_half((u32)g.p[at * g.stride]) : g.number;
}

// The blocks that share rows are all on the device at once, and tell each other a number for each row,
// together with which launch it is of: then one trip through memory is enough.
__device__ __forceinline__ void tell(u64 *place, float number, u32 launch) {
  const u64 both = (u64)launch << 32 | __float_as_uint(number);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(both) : "memory");
}

__device__ __forceinline__ u64 look(const u64 *place) {
  u64 both;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(place) : "memory");
  return both;
}

// Adds up what the `n` blocks told of a row, in order; NaN, and the host is told, if one does not come.
__device__ __forceinline__ float hear(const u64 *place, int n, int pitch, u32 launch, volatile u32 *fault) {
  float total = 0.f;
  for (int first = 0; first < n; first += 8) {
    u64 both[8];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < n) both[c] = look(place + (first + c) * pitch);
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < n) {
        Patience patience;
        while ((u32)(both[c] >> 32) != launch) {
          if (patience.ends(fault)) return __int_as_float(0x7FC00000);
          both[c] = look(place + (first + c) * pitch);
        }
        total += __uint_as_float((u32)both[c]);
      }
  }
  return total;
}

#if EPI == 1
#define SLOTS (W_ROWS / 16)  // of eight channels and their partners
#define STRAIGHT (SIDE % 8 == 0 && NT % SIDE == 0)  // eight tokens lie in one row of the image

// Turns a thread's channel of its tokens, from `at` on in the sample, and adds the squares of what comes
// out. `table` [place, channel]: the slower half of the channels by row, the other by column.
__device__ __forceinline__ void turn(float (&v)[NT / 2], float (&squares)[HALF_TOKENS], const float2 *table, bool by_column,
                                     int at, int image_rows, int lane_token) {
  const int width = W_ROWS / 2;
#if STRAIGHT
  float2 across[SIDE / 4], down{};
#pragma unroll
  for (int i = 0; i < SIDE / 4; ++i)
    across[i] = by_column ? __ldg(table + (i / 2 * 8 + lane_token + i % 2) * width) : float2{};
#endif
#pragma unroll
  for (int j = 0; j < NT / 8; ++j) {
    const bool turned = at + j * 8 < image_rows;
#if STRAIGHT
    if (j * 8 % SIDE == 0 && turned && !by_column) down = __ldg(table + (at + j * 8) / SIDE * width);
#endif
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#if STRAIGHT
      float2 by = by_column ? across[j * 8 % SIDE / 8 * 2 + e] : down;
#else
      const int token = at + j * 8 + lane_token + e;
      float2 by = turned ? __ldg(table + (by_column ? token % SIDE : token / SIDE) * width) : float2{};
#endif
      const float x1 = v[4 * j + e], x2 = v[4 * j + 2 + e];
      squares[2 * j + e] += x1 * x1 + x2 * x2;  // turning leaves them
      if (turned) {
        v[4 * j + e] = x1 * by.x + x2 * by.y;
        v[4 * j + 2 + e] = x2 * by.x - x1 * by.y;
      }
    }
  }
}
#endif
