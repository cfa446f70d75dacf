// softmax(Q·Kᵀ/√128)·V of one head, for a sample whose keys and values fit into shared memory: all
// are loaded at once and read from there, the scores of 64 queries stay in registers. Queries and
// keys are normalised (‖q‖² ≤ 128), so that exp of a score is at most e^11.4 and no maximum is needed.
//
//   TOK     rows of a sample, NI·NT: the keys are taken in NI parts of NT
//   WG      warpgroups of a block, each with 64 queries at a time
//   QUERIES rows of a block, PARTS blocks for a head; QBOX of one bulk copy
//   MASKED  whether some rows are no keys
//   TYPE    bf16

#define THREADS (128 * WG)
#define Q_HALF (128 * ((QUERIES + QBOX - 1) / QBOX * QBOX))  // bytes of 64 channels of the queries
#define HALF (128 * TOK)                                     // of the keys, of the values

struct Operands {  // in shared memory: channels 0 … 63 of all rows, then the others; barriers
  u32 q, k, v, bar;
  __device__ __forceinline__ explicit Operands(char *memory)
      : q(shared(memory)), k(q + 2 * Q_HALF), v(k + 2 * HALF), bar(v + 2 * HALF) {}
};

struct Head { int part, query, key, sample; };   // of a block: which queries of which head, whose keys

// One thread: the queries of a block and the first part of the keys arrive together at the first barrier,
// each further part of the keys at its own, all values at the last.
__device__ __forceinline__ void load_head(const Map *map_q, const Map *map_k, const Map *map_v, const Operands &ops, const Head &head) {
  barrier_expect(ops.bar, 2 * Q_HALF + 256 * NT);
  for (int c = 0; c < 2; ++c) {
    for (int row = 0; row < QUERIES; row += QBOX)
      load4(ops.q + c * Q_HALF + row * 128, map_q, ops.bar, 64 * c, head.part * QUERIES + row, head.query, head.sample);
    load4(ops.k + c * HALF, map_k, ops.bar, 64 * c, 0, head.key, head.sample);
  }
  for (int i = 1; i < NI; ++i) {
    barrier_expect(ops.bar + 8 * i, 256 * NT);
    for (int c = 0; c < 2; ++c) load4(ops.k + c * HALF + i * NT * 128, map_k, ops.bar + 8 * i, 64 * c, i * NT, head.key, head.sample);
  }
  barrier_expect(ops.bar + 8 * NI, 256 * TOK);
  for (int i = 0; i < NI; ++i)
    for (int c = 0; c < 2; ++c)
      load4(ops.v + c * HALF + i * NT * 128, map_v, ops.bar + 8 * NI, 64 * c, i * NT, head.key, head.sample);
}

// `o`, `sum` ← exp(scores)·values and Σ exp(scores) of 64 queries from `tile`·64 on.
__device__ __forceinline__ void attend(float (&o)[HEAD / 2], float (&sum)[2], int tile, const Operands &ops, float scale, int lane,
                                       const Keys &keys, volatile u32 *fault) {
  float s[NI][NT / 2];
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    barrier_wait(ops.bar + 8 * i, 0, fault);
    MARK(2);
    in_flight(s[i]);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int c = 0; c < HEAD / 16; ++c)
      multiply(s[i], matrix(ops.q + c / 4 * Q_HALF + tile * 8192) + c % 4 * 2,
               matrix(ops.k + c / 4 * HALF + i * NT * 128) + c % 4 * 2, c > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  u32 p[NI][NT / 4];
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    products_sync<(NI > 1 ? 1 : 0)>();  // the other part's scores, or the product with its values, may go on
    in_flight(s[i]);
    exponentials(p[i], sum, s[i], scale, i * NT, lane, keys);
    if (i == 0) barrier_wait(ops.bar + 8 * NI, 0, fault);
    in_flight(o);
#pragma unroll
    for (int j = 0; j < NT / 4; ++j) asm volatile("" : "+r"(p[i][j])::"memory");
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int b = 0; b < NT / 16; ++b) weigh(o, p[i] + 4 * b, values(ops.v + (i * NT + 16 * b) * 128, HALF), i + b > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  products_sync<0>();
  in_flight(o);
  MARK(3);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention(const __grid_constant__ Map map_q, const __grid_constant__ Map map_k, const __grid_constant__ Map map_v,
          char *out, int pitch_out, int heads, int share, int n_blocks, float scale,
          const int *p_valid, int image, int text, int image_rows, const char *p_x, float *p_sum, int width,
          const char *ahead, u64 ahead_bytes, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  MARK(0);
  const Operands ops(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i <= NI; ++i) barrier_init(ops.bar + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    prefetch(&map_q);
    prefetch(&map_k);
    prefetch(&map_v);
  }
  __syncthreads();
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  MARK(1);
  if (threadIdx.x == THREADS - 1 && ahead) fetch_ahead(ahead, ahead_bytes);
  if (blockIdx.x >= n_blocks) {  // blocks beside these add up the columns of the trunk
    const int samples = n_blocks / (heads * PARTS);
    for (int task = blockIdx.x - n_blocks; task < samples * width / SLAB; task += gridDim.x - n_blocks)
      column_sums<THREADS, 1, 5>(task, threadIdx.x, p_x, p_sum, (float *)memory, p_valid, image, text, image_rows, TOK, width);
    return;
  }
  const int query = blockIdx.x / PARTS % heads;
  const Head head{(int)(blockIdx.x % PARTS), query, query / share, (int)(blockIdx.x / PARTS / heads)};
  if (threadIdx.x == 0) load_head(&map_q, &map_k, &map_v, ops, head);
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const Keys keys{image, image_rows, p_valid ? p_valid[head.sample] : text};
  for (int tile = group; tile * 64 < QUERIES; tile += WG) {
    if (head.part * QUERIES + tile * 64 >= TOK) break;
    float o[HEAD / 2], sum[2] = {};
    attend(o, sum, uniform(tile), ops, scale, lane, keys, fault);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      sum[h] = __fdividef(1.f, sum[h]);
    }
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");  // all have read the queries
    const int first = tile * 64 + warp * 16;
    if (head.part * QUERIES + first >= TOK) continue;
    char *to = out + (long long)(head.sample * TOK + head.part * QUERIES + first) * pitch_out + head.query * (2 * HEAD);
    write_head(o, sum, first, ops.q, memory, Q_HALF, to, pitch_out, lane);
  }
  MARK(5);
}
