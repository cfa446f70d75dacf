// Products of a block in training with what follows them in the same kernel:
//
//   UP     (gate, value) = Y·W13ᵀ, rounded to half precision, and H = silu(gate)⊙value of what was rounded
//   DOWN   dH = dF·W2, from it and (gate, value) their gradients, and H once more; dH stays in fp32
//   HEADS  heads of X·W_QKVᵀ; queries and keys turned, then normalised, in fp32, and their 1/RMS
//
// A block computes tiles of 64·WG rows (tokens) and COLUMNS columns, one after the other; those of a cluster have the
// same columns and rows side by side, and load half of the weights each, for both. One thread loads steps of 64 along K
// with the bulk copy engine, WG warpgroups multiply, each 64 rows. A warp then goes on alone with its 16 rows, so that
// one warpgroup multiplies while another does what follows. What comes and goes by the bulk copy engine is cut off at
// the last row.
//
//   KIND       UP, DOWN or HEADS
//   BESIDE     whether a warpgroup does what follows the sums of a tile beside its products of the next one, from the
//              sums rounded, dH too; not of HEADS
//   WG, COLUMNS, STAGES, CLUSTER  as above; COLUMNS are, of UP, half gates and half their values; steps that load at once
//   KS         steps along K
//   SLOTS      of a warp, each 16 rows of 64 columns on their way: two by turns; of DOWN two pairs, and one for H
//   WORKER_REGISTERS, LOADER_REGISTERS  of their threads
//   TYPE       bf16 or f16

// The weights of a step: rows of gates, then of values, or of heads, K-major; or 64 rows of W2, columns running fastest,
// 64 of them after the other. Blocks of a cluster share that.
__device__ __forceinline__ void load_w(u32 to, const Map *map, u32 bar, int k, const Tile &tile, const Given &given) {
  const int rank = blockIdx.x % CLUSTER;
#if KIND != DOWN
  for (int half = rank; half < 2; half += CLUSTER)
    load_for_all(to + half * (W_BYTES / 2), map, bar, k, tile.column + half * (KIND == UP ? given.width : COLUMNS / 2));
#else
  for (int c = 0; c < COLUMNS / 64; ++c)
    load_for_all(to + c * 8192 + rank * (8192 / CLUSTER), map, bar, tile.column + 64 * c, k + rank * (64 / CLUSTER));
#endif
}

// One thread: the steps of all tiles of this block, each into the next stage that is empty.
__device__ __forceinline__ void load_tiles(const Map *map_a, const Map *map_w, const Stages &stages, const Given &given) {
  int step = 0;
  for (int n = blockIdx.x / CLUSTER; n < given.n_tiles; n += gridDim.x / CLUSTER) {
    const Tile tile(n, given);
    for (int k = 0; k < KS; ++k, ++step) {
      stages.wait_empty(step, given);
      barrier_expect(stages.full(step), STAGE);
      load2(stages.a(step), map_a, stages.full(step), 64 * k, tile.row);
      load_w(stages.w(step), map_w, stages.full(step), 64 * k, tile, given);
    }
  }
}

__device__ __forceinline__ void in_flight(Acc &acc) {  // not to be moved past here
#pragma unroll
  for (int i = 0; i < COLUMNS / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

__device__ __forceinline__ void release(const Stages &stages, const Worker &me, int step) {
  if (me.lane < CLUSTER) barrier_arrive_in(stages.empty(step), me.lane);
}

__device__ __forceinline__ u64 turned(u32 address) {  // columns run fastest, 64 of them 8192 bytes after the other
  return (u64)((address & 0x3FFFF) >> 4) | (512ull << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void multiply_step(Acc &acc, u32 a, u32 w, int k) {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
    multiply(acc, matrix(a) + 2 * kk, KIND != DOWN ? matrix(w) + 2 * kk : turned(w) + 128 * kk, k + kk > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// The sums of a tile, from `step` on. One step is multiplied while the one before it ends, whose stage is empty then.
__device__ __forceinline__ void multiply_tile(Acc &acc, const Stages &stages, const Worker &me, int &step, const Given &given) {
  for (int k = 0; k < KS; ++k, ++step) {
    stages.wait_full(step, given);
    in_flight(acc);
    multiply_step(acc, stages.a(step) + me.group * 8192, stages.w(step), k);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (k > 0) release(stages, me, step - 1);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  in_flight(acc);
  release(stages, me, step - 1);
}

#if BESIDE
// The same, and beside it what follows the sums of the tile before, part by part.
__device__ __forceinline__ void multiply_beside(Acc &acc, Held &held, const Tile &tile, const Stages &stages, Worker &me, int &step,
                                                const Map *map_packed, const Map *map_out, const Map *map_hidden, const Given &given) {
#pragma unroll
  for (int k = 0; k < KS; ++k, ++step) {
    stages.wait_full(step, given);
    in_flight(acc);
    multiply_step(acc, stages.a(step) + me.group * 8192, stages.w(step), k);
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (k > 0) release(stages, me, step - 1);
#pragma unroll
    for (int s = k * PARTS / KS; s < (k + 1) * PARTS / KS; ++s) finish_part(s, held, &tile, me, map_packed, map_out, map_hidden, given);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  in_flight(acc);
  release(stages, me, step - 1);
}

__device__ __forceinline__ void work(const Stages &stages, const Map *map_packed, const Map *map_out, const Map *map_hidden, const Given &given) {
  Worker me(stages, uniform(threadIdx.x / 32));
  const int first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
  if (first >= given.n_tiles) return;
  const Tile tile(first, given);
#if KIND == DOWN
  if (me.lane == 0) ask(tile, 0, 0, me, map_packed, given);
#endif
  int step = 0;
  Acc acc;
  multiply_tile(acc, stages, me, step, given);
  Held held(acc, tile);
  for (int n = first + stride; n < given.n_tiles; n += stride) {
    const Tile next(n, given);
    multiply_beside(acc, held, next, stages, me, step, map_packed, map_out, map_hidden, given);
    held = Held(acc, next);
  }
#pragma unroll
  for (int s = 0; s < PARTS; ++s) finish_part(s, held, nullptr, me, map_packed, map_out, map_hidden, given);
  if (me.lane == 0) stores_read<0>();  // shared memory has to last until then
}

#else
__device__ __forceinline__ void work(const Stages &stages, const Map *map_packed, const Map *map_out, const Map *map_hidden, const Given &given) {
  Worker me(stages, uniform(threadIdx.x / 32));
  const int first = blockIdx.x / CLUSTER, stride = gridDim.x / CLUSTER;
#if KIND == DOWN
  if (me.lane == 0 && first < given.n_tiles) ask_first(Tile(first, given), 0, me, map_packed, given);
#endif
  // One goes ahead, so that they do not come to what follows at the same time.
  if (WG > 1 && me.group > 0 && first < given.n_tiles)
    stages.wait_full(me.group * ((STAGES < KS ? STAGES : KS) - 1) / (WG > 1 ? WG - 1 : 1), given);
  int step = 0;
  for (int n = first; n < given.n_tiles; n += stride) {
    const Tile tile(n, given);
    Acc acc;
#if KIND == HEADS
    Turns turns;
    turns.fetch(tile, me, given);
#endif
    multiply_tile(acc, stages, me, step, given);
#if KIND == UP
    finish(acc, tile, me, map_out, map_hidden, given);
#elif KIND == HEADS
    finish(acc, turns, tile, me, map_out, given);
#else
    finish(acc, tile, Tile(n + stride, given), n + stride < given.n_tiles, me, map_packed, map_out, map_hidden, given);
#endif
  }
  if (me.lane == 0) stores_read<0>();  // shared memory has to last until then
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
block_product(const __grid_constant__ Map map_a, const __grid_constant__ Map map_w, const __grid_constant__ Map map_packed,
              const __grid_constant__ Map map_out, const __grid_constant__ Map map_hidden, int writes_hidden, int n_rows, int width,
              int n_columns, int n_tiles, const float *cos, const float *sin, float *inverse, int tokens, int n_turned, float eps,
              volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  const Given given{writes_hidden, n_rows, width, n_columns, n_tiles, cos, sin, inverse, tokens, n_turned, eps, fault};
  const Stages stages(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(stages.full(s), 1);
      barrier_init(stages.empty(s), WARPS * CLUSTER);
    }
    for (int p = 0; KIND == DOWN && p < 2 * WARPS; ++p) barrier_init(stages.pairs(0) + 8 * p, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    prefetch(&map_a);
    prefetch(&map_w);
    prefetch(&map_packed);
    prefetch(&map_out);
    prefetch(&map_hidden);
  }
  cluster_sync();
  if (warp < WARPS) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WORKER_REGISTERS));
    work(stages, &map_packed, &map_out, &map_hidden, given);
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    if (warp == WARPS && lane == 0) load_tiles(&map_a, &map_w, stages, given);
  }
  __syncwarp();
  if (CLUSTER > 1) cluster_sync();  // no block ends while another writes to its memory
}
