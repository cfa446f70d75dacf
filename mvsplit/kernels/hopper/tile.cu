// A tile of a product: how a block is cut up, where its memory is, and what its threads do together.
// The macros without a definition here are explained in product.cu.

#define PLAIN 0  // what follows the product, EPI; as in product.py
#define QKV 1
#define SWIGLU 2
#define WRITE 3
#define PART 4

#define WARPS (4 * WG)  // that multiply; four more load
#define THREADS (32 * WARPS)
#define W_BYTES (128 * W_ROWS)
#define A_BYTES (128 * TOK)
#define STAGE (W_BYTES + A_BYTES)
#define COLUMNS (EPI == SWIGLU ? W_ROWS / 2 : W_ROWS)  // of the output, a tile
#define HALF_TOKENS (NT / 4)                           // tokens of a thread in one product

// A warpgroup whose epilogue needs no other goes on alone, so that one multiplies while the other does
// what follows. It writes COLUMNS_OUT columns, WORKERS threads at once.
#define ALONE (EPI == SWIGLU || BY_TOKENS)
#define WORKERS (ALONE ? 128 : THREADS)
#define COLUMNS_OUT (EPI == SWIGLU ? 32 : COLUMNS)
#define PITCH (2 * COLUMNS_OUT + 16)  // bytes of a staged row, padded against conflicts

// A thread's sums of a tile: acc[i][4j + 2h + e] is of weight row `row` + 8h of its warp's 16, and of
// token i·NT + 8j + `token` + e.
typedef float Acc[NI][NT / 2];

struct Gain { const u16 *p; float number; int stride; };  // [D], one element, or a number

struct Given {  // what a launch is given, beside the maps of its tensors
  char *out;
  int n_rows, n_w, n_tok, pitch_out;  // rows of A; tiles of weight rows and of tokens; bytes
  const float2 *rotation;
  int sample_rows, n_rotated;  // rows of a sample; heads that are turned and normalised
  float eps;
  Gain beta, alpha, leak;
  const int *p_valid;           // real text tokens of each sample; none: all
  int image, text, image_rows;  // tokens of a sample; rows of its image, padding included
  const char *a;
  float *sums;
  int width;  // columns of what is summed
  u64 *squares;
  u32 *launches;
  volatile u32 *fault;
};

struct Tile {  // weight rows from i_w·W_ROWS on, rows of A from `row` on, steps along K from split·KS on
  int i_w, row, split;
  __device__ __forceinline__ Tile(int n, const Given &given)
      : i_w(n / SPLIT / given.n_tok), row(n / SPLIT % given.n_tok * TOK), split(n % SPLIT) {}
};

struct Worker {  // a thread that multiplies
  int warp, lane, group, index;
  int row, token;
  __device__ __forceinline__ Worker()
      : warp(uniform(threadIdx.x / 32)), lane(threadIdx.x % 32), group(warp / 4), index(ALONE ? threadIdx.x % 128 : threadIdx.x),
        row(lane / 4), token(lane % 4 * 2) {}
};

// Shared memory: stages, each a step along K of weights and of tokens; scratch; and for each stage a
// barrier that tells it is full, and one that it is empty.
struct Stages {
  char *start;
  u32 base;
  __device__ __forceinline__ explicit Stages(char *memory) : start(memory), base(shared(memory)) {}
  __device__ __forceinline__ u32 w(int step) const { return base + step % STAGES * STAGE; }
  __device__ __forceinline__ u32 a(int step) const { return w(step) + W_BYTES; }
  __device__ __forceinline__ u32 full(int step) const { return base + STAGES * STAGE + SCRATCH + 8 * (step % STAGES); }
  __device__ __forceinline__ u32 empty(int step) const { return full(step) + 8 * STAGES; }
  __device__ __forceinline__ char *scratch(int group) const {
    return start + STAGES * STAGE + (ALONE ? SCRATCH / WG * group : 0);
  }
  __device__ __forceinline__ void wait_full(int step, const Given &given) const {
    barrier_wait(full(step), step / STAGES & 1, given.fault);
  }
  __device__ __forceinline__ void wait_empty(int step, const Given &given) const {
    if (step >= STAGES) barrier_wait(empty(step), (step / STAGES - 1) & 1, given.fault);
  }
};

__device__ __forceinline__ void workers_sync(const Worker &me) {
#if ALONE
  asm volatile("bar.sync %0, 128;" ::"r"(2 + me.group) : "memory");
#else
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
#endif
}

__device__ __forceinline__ void barrier_arrive(u32 bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// The weight rows of a tile. Rotation and SwiGLU combine two rows: these come eight of the one kind
// after eight of the other, so that one thread holds both.
__device__ __forceinline__ void load_w(u32 to, const Map *map, u32 bar, int k, int tile) {
#if EPI == QKV
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %4, %4, %5}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(0), "r"(tile) : "memory");
#elif EPI == SWIGLU
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
__device__ __forceinline__ void scale_tokens(Acc &acc, const float *scale, int token) {
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j) {
      const float2 r = *(const float2 *)(scale + (BY_TOKENS ? 0 : i * NT) + j * 8 + token);
      acc[i][4 * j] *= r.x;
      acc[i][4 * j + 1] *= r.y;
      acc[i][4 * j + 2] *= r.x;
      acc[i][4 * j + 3] *= r.y;
    }
}
