// Gradients of the queries, keys and values of a head, whose rows all fit into shared memory, from what its
// softmax gave (FlashAttention-2, Dao 2023, Algorithm 2):
//
//   P = exp(Q·Kᵀ/√128 − lse)     dP = dO·Vᵀ     δ = Σ dO⊙O over channels     dS = P⊙(dP − δ)/√128
//   dV = Pᵀ·dO     dK = dSᵀ·Q     dQ = dS·K
//
// A head has two blocks. One makes dK and dV, 64 keys of a warpgroup at a time, and holds all of Q and dO; the
// other dQ, 64 queries at a time, and holds all of K and V. Both make P and dP, seven products in place of five;
// so no sums go from block to block, nothing is to be done before or after, and results are deterministic. What
// is said of "all" is Q, dO or K, V; of "here", K, V or Q, dO.
//
//   TOK     rows of a sample; BOX of them are copied at once, TOK/BOX times
//   KEYS_AT, QUERIES_AT  multiples of BOX: of "all", how many are taken at a time for keys, for queries
//   TYPE    bf16

#define WG 2
#define THREADS (128 * WG)
#define TILE 16384        // bytes of 64 rows
#define HALF (128 * TOK)  // of 64 channels of all
#define BOXES (TOK / BOX)
#define TILES ((TOK + 63) / 64)
#define TURNS ((TILES + WG - 1) / WG)

struct Rows { char *p; long long sample, head, token; };  // [B, H, T, 128] in memory; bytes from one to the next

struct Operands {  // in shared memory: all, twice; here, twice, of each warpgroup; two numbers of each query; barriers
  u32 all, here, bar;
  float *lse, *delta;
  __device__ __forceinline__ explicit Operands(char *memory)
      : all(shared(memory)), here(all + 4 * HALF), bar(here + 2 * WG * TILE + 8 * TOK),
        lse((float *)(memory + 4 * HALF + 2 * WG * TILE)), delta(lse + TOK) {}
};

__device__ __forceinline__ char *row_of(const Rows &x, int sample, int head, int token) {
  return x.p + sample * x.sample + head * x.head + token * x.token;
}

__device__ __forceinline__ void load_here(const Map *first, const Map *second, u32 to, u32 bar, int tile, int head, int sample) {
  barrier_expect(bar, 2 * TILE);
  for (int c = 0; c < 2; ++c) {
    load4(to + c * (TILE / 2), first, bar, 64 * c, tile * 64, head, sample);
    load4(to + TILE + c * (TILE / 2), second, bar, 64 * c, tile * 64, head, sample);
  }
}

__device__ __forceinline__ void load_all(const Map *first, const Map *second, const Operands &ops, int head, int sample) {
  for (int i = 0; i < BOXES; ++i) {
    barrier_expect(ops.bar + 8 * i, 512 * BOX);
    for (int c = 0; c < 2; ++c) {
      load4(ops.all + c * HALF + i * BOX * 128, first, ops.bar + 8 * i, 64 * c, i * BOX, head, sample);
      load4(ops.all + (2 + c) * HALF + i * BOX * 128, second, ops.bar + 8 * i, 64 * c, i * BOX, head, sample);
    }
  }
}

// The two numbers of each query: its log-sum-exp to base 2, and δ, 16 threads a row.
__device__ __forceinline__ void measure(const Operands &ops, const Rows &out, const Rows &grad, const float *lse, int head, int sample) {
  for (int t = threadIdx.x; t < TOK; t += THREADS) ops.lse[t] = 1.44269504f * lse[t];
#pragma unroll 10
  for (int t = threadIdx.x / 16; t < TOK; t += THREADS / 16) {
    const Quad a = *(const Quad *)(row_of(out, sample, head, t) + threadIdx.x % 16 * 16);
    const Quad b = *(const Quad *)(row_of(grad, sample, head, t) + threadIdx.x % 16 * 16);
    const u32 o[4] = {a.x, a.y, a.z, a.w}, g[4] = {b.x, b.y, b.z, b.w};
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum += low_half(o[i]) * low_half(g[i]) + high_half(o[i]) * high_half(g[i]);
#pragma unroll
    for (int bit = 1; bit <= 8; bit <<= 1) sum += __shfl_xor_sync(~0u, sum, bit);
    if (threadIdx.x % 16 == 0) ops.delta[t] = sum;
  }
}

// Asks for the scores and dP, or both turned over, of a part of all with the rows here.
template <int N>
__device__ __forceinline__ void ask(float (&s)[N], float (&d)[N], u32 here, int from, const Operands &ops, volatile u32 *fault) {
#pragma unroll
  for (int i = 0; i < 2 * N / BOX; ++i) barrier_wait(ops.bar + 8 * (from / BOX + i), 0, fault);
  in_flight(s);
  in_flight(d);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c)
    multiply(s, matrix(here + c / 4 * (TILE / 2)) + c % 4 * 2, matrix(ops.all + c / 4 * HALF + from * 128) + c % 4 * 2, c > 0);
#pragma unroll
  for (int c = 0; c < HEAD / 16; ++c)
    multiply(d, matrix(here + TILE + c / 4 * (TILE / 2)) + c % 4 * 2, matrix(ops.all + (2 + c / 4) * HALF + from * 128) + c % 4 * 2, c > 0);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// P and dS·√128 of a part, as wgmma takes its left operand. A query's numbers are those of a thread's row, or
// turned over, of its columns.
template <bool KEYS, int N>
__device__ __forceinline__ void differentiate(u32 (&p)[N / 2], u32 (&g)[N / 2], const float (&s)[N], const float (&d)[N], float scale,
                                              const float *lse, const float *delta) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = 4 * j + 2 * h;
      const float2 of_lse = KEYS ? *(const float2 *)(lse + 8 * j) : float2{lse[h], lse[h]};
      const float2 of_delta = KEYS ? *(const float2 *)(delta + 8 * j) : float2{delta[h], delta[h]};
      const float x = exp2(s[at] * scale - of_lse.x), y = exp2(s[at + 1] * scale - of_lse.y);
      if (KEYS) p[2 * j + h] = pack(x, y);
      g[2 * j + h] = pack(x * (d[at] - of_delta.x), y * (d[at + 1] - of_delta.y));
    }
  }
}

// Of the 64 rows at `here` and rows `from` … `to` of all: to `first` are added dK·√128 and to `second` dV, or to
// `first` dQ·√128; beside that run the scores of the next part. The loop is not unrolled: one product after the other
// would be waited for if a part were asked for at its end.
template <bool KEYS, int AT>
__device__ __forceinline__ void gradients(float (&first)[HEAD / 2], float (&second)[HEAD / 2], u32 here, int from, int to, const Operands &ops,
                                          float scale, const float *lse, const float *delta, volatile u32 *fault) {
#pragma unroll 1
  for (int at = from; at < to; at += AT) {
    float s[AT / 2], d[AT / 2];
    u32 p[AT / 4], g[AT / 4];
    ask(s, d, here, at, ops, fault);
    products_sync<0>();
    in_flight(s);
    in_flight(d);
    differentiate<KEYS>(p, g, s, d, scale, lse + (KEYS ? at : 0), delta + (KEYS ? at : 0));
    in_flight(first);
    in_flight(g);
    if (KEYS) {
      in_flight(second);
      in_flight(p);
    }
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int b = 0; b < AT / 16; ++b) {
      const u32 rows = ops.all + (at + 16 * b) * 128;
      weigh(first, g + 4 * b, values(rows, HALF), 1);
      if (KEYS) weigh(second, p + 4 * b, values(rows + 2 * HALF, HALF), 1);
    }
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  }
  products_sync<0>();
  in_flight(first);
  if (KEYS) in_flight(second);
}

__device__ __forceinline__ void group_sync(int group) { asm volatile("bar.sync %0, 128;" ::"r"(2 + group) : "memory"); }

// To the other warpgroup, through what is here, which nobody reads any more: `v` ← v + what that one gives of it.
__device__ __forceinline__ void give(const float (&v)[HEAD / 2], float *place) {
#pragma unroll
  for (int i = 0; i < HEAD / 2; ++i) place[128 * i] = v[i];
}

__device__ __forceinline__ void take(float (&v)[HEAD / 2], const float *place) {
#pragma unroll
  for (int i = 0; i < HEAD / 2; ++i) v[i] += place[128 * i];
}

// All rows of a head: of its keys and values, or of its queries. Where the number of tiles is odd, the warpgroups
// share the last: each has it here, takes half of the parts of all, and adds up with the other what it writes: the
// first dK, the second dV, or the first dQ.
template <bool KEYS, int AT>
__device__ __forceinline__ void run_head(const Map *map_here, const Map *other_here, const Operands &ops, char *memory, const Rows &to, const Rows &other,
                                         int head, int sample, float scale, volatile u32 *fault) {
  const float root = 0.08838834764f, by_root[2] = {root, root}, as_it_is[2] = {1.f, 1.f};
  const int warp = threadIdx.x / 32 % 4, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32;
  const u32 here = ops.here + group * 2 * TILE, bar = ops.bar + 8 * (BOXES + group);
  char *place = memory + 4 * HALF + group * 2 * TILE;
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn) {
    const bool shares = TILES % WG && turn + 1 == TURNS;
    const int tile = shares ? TILES - 1 : turn * WG + group, first = tile * 64 + warp * 16;
    float lse[2], delta[2], one[HEAD / 2] = {}, two[HEAD / 2] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first + lane / 4 + 8 * h;
      lse[h] = row < TOK ? ops.lse[row] : 0.f, delta[h] = row < TOK ? ops.delta[row] : 0.f;
    }
    const int middle = (TOK / AT + 1) / 2 * AT, from = shares && group ? middle : 0, end = shares && !group ? middle : TOK;
    barrier_wait(bar, turn & 1, fault);
    if (KEYS)
      gradients<true, AT>(one, two, here, from, end, ops, scale, ops.lse + lane % 4 * 2, ops.delta + lane % 4 * 2, fault);
    else
      gradients<false, AT>(one, two, here, from, end, ops, scale, lse, delta, fault);
    group_sync(group);  // all have read what is here
    if (shares) {
      float *mine = (float *)place + threadIdx.x % 128, *others = (float *)(memory + 4 * HALF + (1 - group) * 2 * TILE) + threadIdx.x % 128;
      if (group) give(one, mine);
      else if (KEYS) give(two, mine);
      __syncthreads();
      if (!group) take(one, others);
      else if (KEYS) take(two, others);
      __syncthreads();
    }
    if (first < TOK && !(shares && group))
      write_head(one, by_root, warp * 16, here, place, TILE / 2, row_of(to, sample, head, first), to.token, lane);
    if (KEYS && first < TOK && !(shares && !group))
      write_head(two, as_it_is, warp * 16, here + TILE, place + TILE, TILE / 2, row_of(other, sample, head, first), other.token, lane);
    if (turn + 1 == TURNS) break;
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    group_sync(group);
    const int next = TILES % WG && turn + 2 == TURNS ? TILES - 1 : tile + WG;
    if (threadIdx.x % 128 == 0) load_here(map_here, other_here, here, bar, next, head, sample);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_backward(const __grid_constant__ Map map_q, const __grid_constant__ Map map_k, const __grid_constant__ Map map_v,
                   const __grid_constant__ Map map_grad, const __grid_constant__ Map all_q, const __grid_constant__ Map all_k,
                   const __grid_constant__ Map all_v, const __grid_constant__ Map all_grad, Rows out, Rows grad, const float *p_lse, Rows to_q,
                   Rows to_k, Rows to_v, int heads, int n_heads, float scale, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  const Operands ops(memory);
  const bool of_keys = blockIdx.x < n_heads;  // which have four products of the seven, and so begin first
  const int index = of_keys ? blockIdx.x : blockIdx.x - n_heads, head = index % heads, sample = index / heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < BOXES + WG; ++i) barrier_init(ops.bar + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int group = 0; group < WG; ++group)
      load_here(of_keys ? &map_k : &map_q, of_keys ? &map_v : &map_grad, ops.here + group * 2 * TILE, ops.bar + 8 * (BOXES + group), min(group, TILES - 1), head, sample);
    load_all(of_keys ? &all_q : &all_k, of_keys ? &all_grad : &all_v, ops, head, sample);
  }
  measure(ops, out, grad, p_lse + (long long)index * TOK, head, sample);
  __syncthreads();
  if (of_keys)
    run_head<true, KEYS_AT>(&map_k, &map_v, ops, memory, to_k, to_v, head, sample, scale, fault);
  else
    run_head<false, QUERIES_AT>(&map_q, &map_grad, ops, memory, to_q, to_q, head, sample, scale, fault);
}
