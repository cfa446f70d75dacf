// Y = A·Wᵀ for many rows on Hopper, with what follows it fused in. Compiled at run time,
// one kernel for each set of the macros below; `multiply`, around wgmma, is written by wgmma.py.
//
// A block computes the transposed tile: 64·WG rows of W (output columns) by TOK rows of A (tokens).
// 288 tokens are no power of two, but 4608 rows are 16 such tiles, so that 132 processors are busy
// to 97 %, and one tile holds a whole sample: the means of the merge never leave the block. One warp
// loads steps along K with the bulk copy engine, WG warpgroups multiply, then do what follows.
//
//   TOK, W_ROWS   tokens and weight rows of a tile
//   WG, NI, NT    warpgroups that multiply, each NI products of 64 weight rows and NT tokens: of its own
//                 rows and all tokens, or, BY_TOKENS, of all rows and its own tokens
//   STAGES        steps along K that load at once; KS all steps, of 64; SPLIT  blocks along K
//   CHUNK         tokens that are turned over at once on their way out; SCRATCH  bytes for that and
//                 for sums, after the stages;  SIDE  tokens of a row of the image (QKV)
//   WORKER_REGISTERS, LOADER_REGISTERS  of their threads
//   EPI           what follows: PLAIN nothing; QKV rotation and QK-norm of a head; SWIGLU; WRITE merge and
//                 RMSNorm; PART a part along K in fp32 and its column sums by segment
//   IMG           rows of the image in a sample (WRITE), TOK being the sample's
//   TYPE          bf16 or f16

// One thread: the steps of all tiles of this block, each into the next stage that is empty.
__device__ __forceinline__ void load_tiles(const Map *map_w, const Map *map_a, const Map *map_x, const Stages &stages, int n_tiles,
                                           const Given &given) {
  int step = 0;
  for (int n = blockIdx.x; n < n_tiles; n += gridDim.x) {
    const Tile tile(n, given);
    const int from = tile.split * KS, early = step == 0 ? (STAGES < KS ? STAGES : KS) : 0;
    for (int k = 0; k < early; ++k) {  // weights need not wait for the kernel before
      barrier_expect(stages.full(k), STAGE);
      load_w(stages.w(k), map_w, stages.full(k), 64 * (from + k), tile.i_w);
    }
    if (step == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int k = 0; k < KS; ++k, ++step) {
      stages.wait_empty(step, given);
      if (k >= early) {
        barrier_expect(stages.full(step), STAGE);
        load_w(stages.w(step), map_w, stages.full(step), 64 * (from + k), tile.i_w);
      }
      load_a(stages.a(step), map_a, stages.full(step), 64 * (from + k), tile.row);
    }
#if EPI == WRITE  // the trunk comes last, 64 columns of it into a stage
    for (int g = 0; g < WG; ++g, ++step) {
      stages.wait_empty(step, given);
      barrier_expect(stages.full(step), A_BYTES);
      load2(stages.a(step), map_x, stages.full(step), (tile.i_w * WG + g) * 64, tile.row);
      load2(stages.a(step) + TOK / 2 * 128, map_x, stages.full(step), (tile.i_w * WG + g) * 64, tile.row + TOK / 2);
    }
#endif
  }
}

__device__ __forceinline__ void in_flight(Acc &acc) {  // not to be moved past here
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 2; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
}

__device__ __forceinline__ void release(const Stages &stages, const Worker &me, int step) {
  if (me.lane == 0) barrier_arrive(stages.empty(step));
}

// Asks for the products of a step, the k-th of its tile, which is there.
__device__ __forceinline__ void multiply_step(Acc &acc, const Stages &stages, const Worker &me, int step, int k) {
  const u32 w = stages.w(step) + (BY_TOKENS ? 0 : me.group * 8192), a = stages.a(step) + (BY_TOKENS ? me.group * NT * 128 : 0);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int kk = 0; kk < 4; ++kk)
#pragma unroll
    for (int i = 0; i < NI; ++i)
      multiply(acc[i], matrix(BY_TOKENS ? w + i * 8192 : w) + 2 * kk, matrix(BY_TOKENS ? a : a + i * NT * 128) + 2 * kk, k + kk > 0);
}

// The sums of a tile, from `step` on. One step is multiplied while the one before it ends, whose stage
// is empty then.
__device__ __forceinline__ void multiply_tile(Acc &acc, const Stages &stages, const Worker &me, int &step, const Given &given) {
  for (int k = 0; k < KS; ++k, ++step) {
    stages.wait_full(step, given);
    if (step == 0) MARK(2);
    in_flight(acc);
    multiply_step(acc, stages, me, step, k);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (k > 0) release(stages, me, step - 1);
  }
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  in_flight(acc);
  release(stages, me, step - 1);
  if (step == KS) MARK(3);
}

// What follows the products of a tile, down to memory.
__device__ __forceinline__ void finish(Acc &acc, const Tile &tile, const Worker &me, const Stages &stages, const Given &given) {
#if EPI == QKV
  rotate_and_normalise(acc, tile, me, (float *)stages.scratch(me.group), given);
#elif EPI == SWIGLU
  activate(acc);
#endif
#if EPI == PART
  write_part(acc, tile, me, given);
#else  // a writer has no tile after this one: its stages are free
  write_rows(acc, tile, me, EPI == WRITE ? stages.start : stages.scratch(me.group), given);
#endif
}

__device__ __forceinline__ void multiply_and_finish(const Stages &stages, const Worker &me, int n_tiles, const Given &given) {
#if ALONE && WG > 1  // one goes ahead, so that they do not come to what follows at the same time
  if (me.group > 0) stages.wait_full(me.group * ((STAGES < KS ? STAGES : KS) - 1) / (WG - 1), given);
#endif
  int step = 0;
  for (int n = blockIdx.x; n < n_tiles; n += gridDim.x) {
    const Tile tile(n, given);
    Acc acc;
    multiply_tile(acc, stages, me, step, given);
    finish(acc, tile, me, stages, given);
    if (step == KS) MARK(4);
  }
}

// A writer's block has one tile.
#if EPI == WRITE
__device__ __forceinline__ void multiply_and_merge(const Stages &stages, const Worker &me, const Gains &gains, const Given &given) {
  const Tile tile(blockIdx.x, given);
  const u32 launch = *(volatile u32 *)(given.launches + tile.row / TOK) / given.n_w + 1;
  const int count = given.p_valid ? given.p_valid[tile.row / TOK] : given.text;
  int step = 0;
  Acc acc;
  multiply_tile(acc, stages, me, step, given);
  merge_and_normalise(acc, tile, me, gains, count, stages, step, launch, given);
  finish(acc, tile, me, stages, given);
  MARK(4);
}
#endif

__device__ __forceinline__ void work(const Stages &stages, int n_tiles, const Given &given) {
  const Worker me;
#if EPI == QKV && STRAIGHT
  fetch_table(given);
#elif EPI == WRITE
  const Gains gains(Tile(blockIdx.x, given), me, given);
#endif
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  MARK(1);
#if EPI == WRITE
  multiply_and_merge(stages, me, gains, given);
#else
  multiply_and_finish(stages, me, n_tiles, given);
#endif
  MARK(5);
}

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
product(const __grid_constant__ Map map_w, const __grid_constant__ Map map_a, const __grid_constant__ Map map_x,
        char *out, int n_rows, int n_w, int n_tok, int pitch_out,
        const float2 *rotation, int sample_rows, int n_rotated, float eps,
        Gain beta, Gain alpha, Gain leak,
        const int *p_valid, int image, int text, int image_rows,
        const char *a, float *sums, int width, u64 *squares, u32 *launches,
        const char *ahead, u64 ahead_bytes, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  MARK(0);
  const Given given{out, n_rows, n_w, n_tok, pitch_out, rotation, sample_rows, n_rotated, eps, beta, alpha, leak,
                    p_valid, image, text, image_rows, a, sums, width, squares, launches, fault};
  const Stages stages(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, n_tiles = n_w * n_tok * SPLIT;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(stages.full(s), 1);
      barrier_init(stages.empty(s), WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    prefetch(&map_w);
    prefetch(&map_a);
  }
  __syncthreads();
  if (warp < WARPS) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WORKER_REGISTERS));
    work(stages, n_tiles, given);
    return;
  }
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
  // The first thread of a block that says so speaks for all: blocks of the next kernel may come once all of
  // these have, before the kernel before this has ended. Until their own wait they read weights, gains, the table.
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  if (warp == WARPS && lane == 0) load_tiles(&map_w, &map_a, &map_x, stages, n_tiles, given);
  if (warp == WARPS + 1 && lane == 0 && ahead) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    fetch_ahead(ahead, ahead_bytes);
  }
  __syncwarp();
#if EPI == SWIGLU  // the other warps add up the columns of A by segment meanwhile, for the merge to come
  if (warp > WARPS && sums) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    for (int task = blockIdx.x; task < n_rows / sample_rows * (width / SLAB); task += gridDim.x)
      column_sums<96, 6, 2>(task, threadIdx.x - THREADS - 32, a, sums, (float *)(memory + STAGES * STAGE + SCRATCH + 16 * STAGES),
                            p_valid, image, text, image_rows, sample_rows, width);
  }
#endif
}
