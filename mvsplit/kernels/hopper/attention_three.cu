// softmax(Q·Kᵀ/√128)·V of one head by three warpgroups, so that the tensor cores have two others' products while
// one takes exponentials. As attention.cu, but for this: each of 64 queries has a bulk copy and a barrier of its
// own, and the scores of one part of the keys are in registers at a time.
//
//   TOK     rows of a sample, NI·NT: the keys are taken in NI parts of NT
//   TILES   of 64 queries, the last may be cut off; SLOTS of them are in shared memory at once
//   MASKED  whether some rows are no keys
//   TYPE    bf16

#define WG 3
#define THREADS (128 * WG)
#define TILE 16384        // bytes of 64 queries
#define HALF (128 * TOK)  // of 64 channels of the keys, of the values

struct Operands {  // in shared memory; a barrier for each part of the keys, of the values, and for each slot
  u32 q, k, v, bar;
  __device__ __forceinline__ explicit Operands(char *memory)
      : q(shared(memory)), k(q + SLOTS * TILE), v(k + 2 * HALF), bar(v + 2 * HALF) {}
  __device__ __forceinline__ u32 of_keys(int part) const { return bar + 8 * part; }
  __device__ __forceinline__ u32 of_values(int part) const { return bar + 8 * (NI + part); }
  __device__ __forceinline__ u32 of_slot(int slot) const { return bar + 8 * (2 * NI + slot); }
};

struct Head { int query, key, sample; };

// Where a tile of queries is loaded to, and which load of that slot it is. What has no slot of its own takes
// that of the tile before it of the same warpgroup.
struct Slot {
  int place, turn;
  __device__ __forceinline__ explicit Slot(int tile) : place(tile), turn(0) {
    for (; place >= SLOTS; place -= WG) ++turn;
  }
};

__device__ __forceinline__ void load_queries(const Map *map, const Operands &ops, int tile, const Head &head) {
  const Slot slot(tile);
  barrier_expect(ops.of_slot(slot.place), TILE);
  for (int c = 0; c < 2; ++c)
    load4(ops.q + slot.place * TILE + c * (TILE / 2), map, ops.of_slot(slot.place), 64 * c, tile * 64, head.query, head.sample);
}

__device__ __forceinline__ void load_part(const Map *map, u32 to, u32 bar, int part, const Head &head) {
  barrier_expect(bar, 256 * NT);
  for (int c = 0; c < 2; ++c) load4(to + c * HALF + part * NT * 128, map, bar, 64 * c, part * NT, head.key, head.sample);
}

// One thread: everything that has a place, in the order in which it is read.
__device__ __forceinline__ void load_head(const Map *map_q, const Map *map_k, const Map *map_v, const Operands &ops, const Head &head) {
  for (int tile = 0; tile < TILES && tile < WG; ++tile) load_queries(map_q, ops, tile, head);
  for (int i = 0; i < NI; ++i) {
    load_part(map_k, ops.k, ops.of_keys(i), i, head);
    load_part(map_v, ops.v, ops.of_values(i), i, head);
  }
  for (int tile = WG; tile < TILES && tile < SLOTS; ++tile) load_queries(map_q, ops, tile, head);
}

// Asks for the scores of a part of the keys, which is waited for.
__device__ __forceinline__ void ask_scores(float (&s)[NT / 2], u32 q, int part, const Operands &ops, volatile u32 *fault) {
  barrier_wait(ops.of_keys(part), 0, fault);
  in_flight(s);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c)
    multiply(s, matrix(q + c / 4 * (TILE / 2)) + c % 4 * 2, matrix(ops.k + c / 4 * HALF + part * NT * 128) + c % 4 * 2, c > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// `o`, `sum` ← exp(scores)·values and Σ exp(scores) of the 64 queries at `q`. A part's product with the values
// and the scores of the next run while other warpgroups take exponentials.
__device__ __forceinline__ void attend(float (&o)[HEAD / 2], float (&sum)[2], u32 q, const Operands &ops, float scale, int lane,
                                       const Keys &keys, volatile u32 *fault) {
  float s[NT / 2];
  u32 p[NT / 4];
  ask_scores(s, q, 0, ops, fault);
  MARK(2);
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    products_sync<0>();
    in_flight(s);
    in_flight(o);
    exponentials(p, sum, s, scale, i * NT, lane, keys);
    barrier_wait(ops.of_values(i), 0, fault);
    in_flight(o);
    in_flight(p);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int b = 0; b < NT / 16; ++b) weigh(o, p + 4 * b, values(ops.v + (i * NT + 16 * b) * 128, HALF), i + b > 0);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (i + 1 < NI) ask_scores(s, q, i + 1, ops, fault);
  }
  products_sync<0>();
  in_flight(o);
  MARK(3);
}

// Σ exp(scores) of a thread's two rows over the four lanes that share them: its inverse, and its logarithm to
// `lse` if there is a place for it. No key at all gives zeros and ln 1.
__device__ __forceinline__ void invert(float (&sum)[2], float *lse, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
    sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    sum[h] = sum[h] > 0.f ? sum[h] : 1.f;
    const int row = first + lane / 4 + 8 * h;
    if (lse && lane % 4 == 0 && row < TOK) lse[row] = 0.69314718f * log2_of(sum[h]);
    sum[h] = __fdividef(1.f, sum[h]);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention(const __grid_constant__ Map map_q, const __grid_constant__ Map map_k, const __grid_constant__ Map map_v,
          char *out, int pitch_out, int heads, int share, int n_blocks, float scale,
          const int *p_valid, int image, int text, int image_rows, const char *p_x, float *p_sum, int width,
          const char *ahead, u64 ahead_bytes, float *p_lse, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  MARK(0);
  const Operands ops(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * NI + SLOTS; ++i) barrier_init(ops.bar + 8 * i, 1);
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
    for (int task = blockIdx.x - n_blocks; task < n_blocks / heads * width / SLAB; task += gridDim.x - n_blocks)
      column_sums<THREADS, 1, 5>(task, threadIdx.x, p_x, p_sum, (float *)memory, p_valid, image, text, image_rows, TOK, width);
    return;
  }
  const int query = blockIdx.x % heads;
  const Head head{query, query / share, (int)(blockIdx.x / heads)};
  if (threadIdx.x == 0) load_head(&map_q, &map_k, &map_v, ops, head);
  const int warp = threadIdx.x / 32 % 4, group = threadIdx.x / 128, lane = threadIdx.x % 32;
  const Keys keys{image, image_rows, p_valid ? p_valid[head.sample] : text};
  float *lse = p_lse ? p_lse + (long long)blockIdx.x * TOK : p_lse;
  for (int tile = group; tile < TILES; tile += WG) {
    const Slot slot(tile);
    const u32 q = uniform(ops.q + slot.place * TILE);
    barrier_wait(ops.of_slot(slot.place), slot.turn & 1, fault);
    float o[HEAD / 2], sum[2] = {};
    attend(o, sum, q, ops, scale, lane, keys, fault);
    const int first = tile * 64 + warp * 16;
    invert(sum, lse, first, lane);
    asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");  // all have read the queries
    if (first < TOK) {
      char *to = out + (long long)(head.sample * TOK + first) * pitch_out + head.query * (2 * HEAD);
      write_head(o, sum, warp * 16, q, memory + slot.place * TILE, TILE / 2, to, pitch_out, lane);
    }
    if (tile + WG < TILES && tile + WG >= SLOTS) {  // its queries take this slot
      asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory");
      if (threadIdx.x % 128 == 0) load_queries(&map_q, ops, tile + WG, head);
    }
  }
  MARK(5);
}
