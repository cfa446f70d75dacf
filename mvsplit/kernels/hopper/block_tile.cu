// A tile of a product of a block in training: how it is cut up, where memory is, and what threads do together. The macros
// without a definition here are explained in block_product.cu.

#define UP 0  // as in block_product.py
#define DOWN 1
#define HEADS 2

#define WARPS (4 * WG)  // that multiply; four more load
#define THREADS (32 * WARPS)
#define TOK (64 * WG)
#define WIDTH (KIND == UP ? COLUMNS / 2 : COLUMNS)  // columns of H, or of heads, in a tile
#define A_BYTES (128 * TOK)
#define W_BYTES (128 * COLUMNS)
#define STAGE (A_BYTES + W_BYTES)
#define SLOT 2048
#define CHUNKS (WIDTH / 64)
#define HEAD 128

// A thread's sums: acc[4j + 2h + e] is of row lane / 4 + 8h of its warp's 16 and of column 8j + lane % 4 · 2 + e.
typedef float Acc[COLUMNS / 2];

#define PARTS (4 * CHUNKS)  // of what follows the sums of a tile

struct Given {  // what a launch is given, beside the maps of its tensors
  int writes_hidden;  // of UP: whether H is wanted
  int n_rows, width, n_columns, n_tiles;  // rows; columns of H or of all heads; tiles side by side; tiles of a cluster
  const float *cos, *sin;  // [tokens, HEAD / 2]
  float *inverse;          // 1/RMS [rows, n_turned]
  int tokens, n_turned;    // rows of a sample; heads that are turned and normalised
  float eps;
  volatile u32 *fault;
};

struct Tile {
  int row, column;  // the first of a block, of H or of the heads
  __device__ __forceinline__ Tile(int n, const Given &given)
      : row((n / given.n_columns * CLUSTER + blockIdx.x % CLUSTER) * TOK), column(n % given.n_columns * WIDTH) {}
};

// The sums of a tile, rounded, until what follows them is done beside the products of the next tile.
struct Held {
  u32 sums[COLUMNS / 4];
  Tile tile;
  __device__ __forceinline__ Held(const Acc &acc, const Tile &tile) : tile(tile) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 4; ++i) sums[i] = pack(acc[2 * i], acc[2 * i + 1]);
  }
};

// Shared memory: stages, each a step along K of rows and of weights; slots; for each stage a barrier that tells it is
// full, and one that it is empty; and of DOWN for each warp two, of pairs of slots.
struct Stages {
  u32 base;
  __device__ __forceinline__ explicit Stages(char *memory) : base(shared(memory)) {}
  __device__ __forceinline__ u32 a(int step) const { return base + step % STAGES * STAGE; }
  __device__ __forceinline__ u32 w(int step) const { return a(step) + A_BYTES; }
  __device__ __forceinline__ u32 slots(int warp) const { return base + STAGES * STAGE + warp * SLOTS * SLOT; }
  __device__ __forceinline__ u32 full(int step) const { return slots(WARPS) + 8 * (step % STAGES); }
  __device__ __forceinline__ u32 empty(int step) const { return full(step) + 8 * STAGES; }
  __device__ __forceinline__ u32 pairs(int warp) const { return slots(WARPS) + 16 * STAGES + 16 * warp; }
  __device__ __forceinline__ void wait_full(int step, const Given &given) const {
    barrier_wait(full(step), step / STAGES & 1, given.fault);
  }
  __device__ __forceinline__ void wait_empty(int step, const Given &given) const {
    if (step >= STAGES) barrier_wait(empty(step), (step / STAGES - 1) & 1, given.fault);
  }
};

struct Worker {  // a thread that multiplies
  int lane, group;
  int row;       // the first of its warp, in a tile
  u32 slots, bars;
  int count;     // of slots that went out, or of chunks that came
  __device__ __forceinline__ Worker(const Stages &stages, int warp)  // a number that all its lanes have
      : lane(threadIdx.x % 32), group(warp / 4), row(warp * 16), slots(stages.slots(warp)), bars(stages.pairs(warp)), count(0) {}
  // Where this lane's row of 16 bytes of a 16×16 matrix begins, the i-th of a slot.
  __device__ __forceinline__ u32 place(u32 slot, int i) const {
    return slot + lane % 16 * 128 + (((2 * i + lane / 16) ^ lane) % 8 << 4);
  }
};

__device__ __forceinline__ void cluster_sync() {
#if CLUSTER > 1
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void barrier_arrive_in(u32 bar, u32 rank) {  // in a block of the cluster
#if CLUSTER > 1
  asm volatile(
      "{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(bar),
      "r"(rank) : "memory");
#else
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
#endif
}

// To all blocks of the cluster, and to their barriers.
__device__ __forceinline__ void load_for_all(u32 to, const Map *map, u32 bar, int k, int row) {
#if CLUSTER > 1
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(bar), "r"(k), "r"(row), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
#else
  load2(to, map, bar, k, row);
#endif
}

__device__ __forceinline__ void store2(const Map *map, u32 from, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from), "r"(column),
               "r"(row) : "memory");
}

__device__ __forceinline__ void stores_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

template <int N> __device__ __forceinline__ void stores_read() {  // but for the last N groups of this thread
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

__device__ __forceinline__ void written() {  // what this thread wrote may be copied by bulk
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

__device__ __forceinline__ void prefetch2(const Map *map, int column, int row) {
  asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global [%0, {%1, %2}];" ::"l"(map), "r"(column), "r"(row) : "memory");
}

__device__ __forceinline__ void store_four(u32 address, const u32 *w) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(w[0]), "r"(w[1]), "r"(w[2]),
               "r"(w[3]) : "memory");
}

__device__ __forceinline__ void load_four(u32 address, u32 (&w)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ float sigmoid(float x) {  // exp overflows to ∞, of which the inverse is 0
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(1.f + exp2(-1.44269504f * x)));
  return y;
}
