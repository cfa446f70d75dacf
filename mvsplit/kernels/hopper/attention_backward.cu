// Gradients of the queries, keys and values of a head, whose rows all fit into shared memory, from what its
// softmax gave (FlashAttention-2, Dao 2023, Algorithm 2):
//
//   P = exp(Q·Kᵀ/√128 − lse)     dP = dO·Vᵀ     δ = Σ dO⊙O over channels     dS = P⊙(dP − δ)/√128
//   dV = Pᵀ·dO     dK = dSᵀ·Q     dQ = dS·K
//
// A head has two blocks. One makes dK and dV, 64 keys of a warpgroup at a time, and holds all of Q and dO; the
// other dQ, 64 queries at a time, and holds all of K and V. Both make P and dP, seven products in place of five;
// so no sums go from block to block, nothing is to be done before or after, and results are deterministic. The
// blocks of queries come first: those of keys need δ of all queries before they can begin, and by then find O and dO
// in the L2 cache. What is said of "all" is Q, dO or K, V; of "here", K, V or Q, dO.
//
// TURNED: queries and keys are rows ŷ = R·x/RMS(x) of x that R had turned, and what is written are the gradients of x,
//
//   dx = R⁻¹·(dŷ − ŷ·Σ dŷ⊙ŷ/128)/RMS(x)
//
//   TOK     rows of a sample; BOX of them are copied at once, TOK/BOX times
//   KEYS_AT, QUERIES_AT  multiples of BOX: of "all", how many are taken at a time for keys, for queries
//   TURNED  0 or 1
//   TYPE    bf16

#define WG 2
#define THREADS (128 * WG)
#define TILE 16384        // bytes of 64 rows
#define HALF (128 * TOK)  // of 64 channels of all
#define BOXES (TOK / BOX)
#define NUMBERS (TOK > 32 * WG ? TOK : 32 * WG)  // two of each query, or one of the 64 rows of each warpgroup
#define LOG2_E 1.44269504f
#define RSQRT_HEAD 0.08838834764f  // 1/√128
#define TILES ((TOK + 63) / 64)
#define TURNS ((TILES + WG - 1) / WG)

struct Rows { char *p; long long sample, head, token; };  // [B, H, T, 128] in memory; bytes from one to the next

struct Turn { const float *r, *cos, *sin; int cos_token, sin_token; };  // 1/RMS [B, T, 2H]; [T, 64], floats from one to the next

struct Operands {  // in shared memory: all, twice; here, twice, of each warpgroup; two numbers of each query; barriers
  u32 all, here, bar;
  float *lse, *delta;
  __device__ __forceinline__ explicit Operands(char *memory)
      : all(shared(memory)), here(all + 4 * HALF), bar(here + 2 * WG * TILE + 8 * NUMBERS),
        lse((float *)(memory + 4 * HALF + 2 * WG * TILE)), delta(lse + NUMBERS) {}
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

// Σ a⊙b of 8 channels a lane, over the 16 lanes that share a row.
__device__ __forceinline__ float along(const Quad &a, const Quad &b) {
  const u32 v[4] = {a.x, a.y, a.z, a.w}, w[4] = {b.x, b.y, b.z, b.w};
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += low_half(v[i]) * low_half(w[i]) + high_half(v[i]) * high_half(w[i]);
#pragma unroll
  for (int bit = 1; bit <= 8; bit <<= 1) sum += __shfl_xor_sync(~0u, sum, bit);
  return sum;
}

__device__ __forceinline__ Quad quad_of(const Rows &x, int sample, int head, int token) {
  return *(const Quad *)(row_of(x, sample, head, token) + threadIdx.x % 16 * 16);
}

// A row's 8 channels of this lane, of a matrix in shared memory of which 64 channels have `half` bytes.
__device__ __forceinline__ Quad quad_here(const char *matrix, int half, int row) {
  const int chunk = threadIdx.x % 16;
  return *(const Quad *)(matrix + chunk / 8 * half + row * 128 + ((chunk ^ row) % 8 << 4));
}

// The two numbers of each query, where all are here: its log-sum-exp to base 2, and δ. O comes from memory, all of it at
// once, dO is waited for part by part.
__device__ __forceinline__ void measure(const Operands &ops, const Rows &out, const char *grad, const float *lse, int head, int sample, volatile u32 *fault) {
  Quad rows[TOK / (THREADS / 16)];
#pragma unroll
  for (int i = 0; i < TOK / (THREADS / 16); ++i) rows[i] = quad_of(out, sample, head, threadIdx.x / 16 + i * (THREADS / 16));
  for (int t = threadIdx.x; t < TOK; t += THREADS) ops.lse[t] = LOG2_E * lse[t];
#pragma unroll
  for (int i = 0; i < TOK / (THREADS / 16); ++i) {
    const int t = threadIdx.x / 16 + i * (THREADS / 16);
    barrier_wait(ops.bar + 8 * (t / BOX), 0, fault);
    const float sum = along(rows[i], quad_here(grad, HALF, t));
    if (threadIdx.x % 16 == 0) ops.delta[t] = sum;
  }
}

// Those of a tile, whose dO is at `grad`: what comes from memory is asked for a tile before.
struct Measured {
  Quad out[8];   // of rows threadIdx.x % 128 / 16 + 8i
  float lse[2];  // of rows `row` and 8 below it
  __device__ __forceinline__ void fetch(const Rows &x, const float *p_lse, int head, int sample, int tile, int row) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int t = tile * 64 + threadIdx.x % 128 / 16 + 8 * i;
      out[i] = t < TOK ? quad_of(x, sample, head, t) : Quad{0, 0, 0, 0};
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) lse[h] = row + 8 * h < TOK ? LOG2_E * p_lse[row + 8 * h] : 0.f;
  }
  __device__ __forceinline__ void measure(const char *grad, float *delta) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = threadIdx.x % 128 / 16 + 8 * i;
      const float sum = along(out[i], quad_here(grad, TILE / 2, r));
      if (threadIdx.x % 16 == 0) delta[r] = sum;
    }
  }
};

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
// `first` dQ·√128; beside that run the scores of the next part, which is asked for as its turn begins: asked for at
// the end of the turn before, each product waits for the one before it (ptxas 13.0). `here` is said to be uniform at
// each turn, or ptxas moves it to a uniform register between products.
template <bool KEYS, int AT>
__device__ __forceinline__ void gradients(float (&first)[HEAD / 2], float (&second)[HEAD / 2], u32 here, int from, int to, const Operands &ops,
                                          float scale, const float *lse, const float *delta, volatile u32 *fault) {
#pragma unroll 1
  for (int at = from; at < to; at += AT) {
    float s[AT / 2], d[AT / 2];
    u32 p[AT / 4], g[AT / 4];
    const u32 now = uniform(at);
    ask(s, d, uniform(here), now, ops, fault);
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
      const u32 rows = ops.all + (now + 16 * b) * 128;
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

// Of two words of each lane, those of a column: lane l has the first of both, its neighbour the second of both.
__device__ __forceinline__ void swap(u32 &a, u32 &b, int neighbour, bool upper) {
  const u32 got = __shfl_xor_sync(~0u, upper ? a : b, neighbour);
  if (upper) a = got;
  else b = got;
}

// A warp's 16 rows times `factor`. Four lanes share a row, in pairs of channels: they turn those over, so that each
// writes 16 bytes.
__device__ __forceinline__ void write_rows(const float (&v)[HEAD / 2], float factor, char *to, long long pitch, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < HEAD / 8; j += 4) {
      u32 w[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) w[i] = pack(v[4 * (j + i) + 2 * h] * factor, v[4 * (j + i) + 2 * h + 1] * factor);
      swap(w[0], w[1], 1, lane & 1);
      swap(w[2], w[3], 1, lane & 1);
      swap(w[0], w[2], 2, lane & 2);
      swap(w[1], w[3], 2, lane & 2);
      *(Quad *)(to + (lane / 4 + 8 * h) * pitch + (j + lane % 4) * 16) = Quad{w[0], w[1], w[2], w[3]};
    }
}

// The pairs of channels of a warp's 16 rows that a thread has of a product with 128 columns, of a matrix here.
__device__ __forceinline__ void keep(u32 (&y)[HEAD / 4], const char *matrix, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) {
      const int row = first + lane / 4 + 8 * h;
      y[HEAD / 8 * h + j] = *(const u32 *)(matrix + j / 8 * (TILE / 2) + row * 128 + ((j ^ row) % 8 << 4) + lane % 4 * 4);
    }
}

// dŷ·√128 of a warp's 16 rows, tokens from `first` on → dx; `r` is the one of token 0, `pitch` further that of token 1.
__device__ __forceinline__ void turn_back(float (&g)[HEAD / 2], const u32 (&y)[HEAD / 4], const Turn &turn, const float *r, int pitch, int first, int lane) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int t = first + lane / 4 + 8 * h, channel = lane % 4 * 2;
    const float inverse = r[t * pitch] * RSQRT_HEAD;
    float along = 0.f;
#pragma unroll
    for (int j = 0; j < HEAD / 8; ++j) {
      const u32 both = y[HEAD / 8 * h + j];
      along += g[4 * j + 2 * h] * low_half(both) + g[4 * j + 2 * h + 1] * high_half(both);
    }
    along += __shfl_xor_sync(~0u, along, 1);
    along += __shfl_xor_sync(~0u, along, 2);
    along *= 1.f / HEAD;
#pragma unroll
    for (int j = 0; j < HEAD / 16; ++j) {  // a channel is turned with the one 64 further
      const float2 cos = *(const float2 *)(turn.cos + t * turn.cos_token + 8 * j + channel);
      const float2 sin = *(const float2 *)(turn.sin + t * turn.sin_token + 8 * j + channel);
      const u32 near = y[HEAD / 8 * h + j], far = y[HEAD / 8 * h + j + HEAD / 16];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &one = g[4 * j + 2 * h + e], &two = g[4 * (j + HEAD / 16) + 2 * h + e];
        const float a = (one - (e ? high_half(near) : low_half(near)) * along) * inverse;
        const float b = (two - (e ? high_half(far) : low_half(far)) * along) * inverse;
        one = a * (e ? cos.y : cos.x) - b * (e ? sin.y : sin.x);
        two = b * (e ? cos.y : cos.x) + a * (e ? sin.y : sin.x);
      }
    }
  }
}

// All rows of a head: of its keys and values, or of its queries. Where the number of tiles is odd, the warpgroups
// share the last: each has it here, takes half of the parts of all, and adds up with the other what it writes: the
// first dK, the second dV, or the first dQ.
template <bool KEYS, int AT>
__device__ __forceinline__ void run_head(const Map *map_here, const Map *other_here, const Operands &ops, char *memory, const Rows &to, const Rows &other,
                                         const Rows &out, const float *p_lse, const Turn &rotation, int heads, int head, int sample, float scale,
                                         volatile u32 *fault) {
  const int warp = threadIdx.x / 32 % 4, group = uniform(threadIdx.x / 128), lane = threadIdx.x % 32, own = warp * 16 + lane / 4;
  const u32 here = ops.here + group * 2 * TILE, bar = ops.bar + 8 * (BOXES + group);
  char *place = memory + 4 * HALF + group * 2 * TILE;
  Measured measured;
  int tile = min(group, TILES - 1);
  if (!KEYS) measured.fetch(out, p_lse, head, sample, tile, tile * 64 + own);
#pragma unroll 1
  for (int turn = 0; turn < TURNS; ++turn) {
    const bool shares = TILES % WG && turn + 1 == TURNS;
    float *own_delta = ops.lse + 64 * group, delta[2], one[HEAD / 2] = {}, two[HEAD / 2] = {};
    const int middle = (TOK / AT + 1) / 2 * AT, from = shares && group ? middle : 0, end = shares && !group ? middle : TOK;
    barrier_wait(bar, turn & 1, fault);
    if (KEYS) {
      gradients<true, AT>(one, two, here, from, end, ops, scale, ops.lse + lane % 4 * 2, ops.delta + lane % 4 * 2, fault);
    } else {
      measured.measure(place + TILE, own_delta);
      group_sync(group);
      delta[0] = own_delta[own], delta[1] = own_delta[own + 8];
      gradients<false, AT>(one, two, here, from, end, ops, scale, measured.lse, delta, fault);
    }
    const int first = tile * 64 + warp * 16;
#if TURNED
    u32 y[HEAD / 4];
    keep(y, place, warp * 16, lane);
#endif
    group_sync(group);  // all have read what is here
    if (turn + 1 < TURNS) {
      tile = TILES % WG && turn + 2 == TURNS ? TILES - 1 : tile + WG;
      if (threadIdx.x % 128 == 0) load_here(map_here, other_here, here, bar, tile, head, sample);
      if (!KEYS) measured.fetch(out, p_lse, head, sample, tile, tile * 64 + own);
    }
    if (shares) {
      if (group) give(one, (float *)place + threadIdx.x % 128);
      else if (KEYS) give(two, (float *)place + threadIdx.x % 128);
      __syncthreads();
      const float *others = (const float *)(memory + 4 * HALF + (1 - group) * 2 * TILE) + threadIdx.x % 128;
      if (!group) take(one, others);
      else if (KEYS) take(two, others);
    }
    const bool real = first < TOK;
    if (real && !(shares && group)) {
#if TURNED
      turn_back(one, y, rotation, rotation.r + (long long)sample * TOK * 2 * heads + (KEYS ? heads : 0) + head, 2 * heads, first, lane);
#endif
      write_rows(one, TURNED ? 1.f : RSQRT_HEAD, row_of(to, sample, head, first), to.token, lane);
    }
    if (KEYS && real && !(shares && !group)) write_rows(two, 1.f, row_of(other, sample, head, first), other.token, lane);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attention_backward(const __grid_constant__ Map map_q, const __grid_constant__ Map map_k, const __grid_constant__ Map map_v,
                   const __grid_constant__ Map map_grad, const __grid_constant__ Map all_q, const __grid_constant__ Map all_k,
                   const __grid_constant__ Map all_v, const __grid_constant__ Map all_grad, Rows out, const float *p_lse, Rows to_q,
                   Rows to_k, Rows to_v, Turn rotation, int heads, int n_heads, float scale, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  const Operands ops(memory);
  const bool of_keys = blockIdx.x >= n_heads;
  const int index = blockIdx.x % n_heads, head = index % heads, sample = index / heads;
  p_lse += (long long)index * TOK;
  if (threadIdx.x == 0) {
    for (int i = 0; i < BOXES + WG; ++i) barrier_init(ops.bar + 8 * i, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    for (int group = 0; group < WG; ++group)
      load_here(of_keys ? &map_k : &map_q, of_keys ? &map_v : &map_grad, ops.here + group * 2 * TILE, ops.bar + 8 * (BOXES + group), min(group, TILES - 1), head, sample);
    load_all(of_keys ? &all_q : &all_k, of_keys ? &all_grad : &all_v, ops, head, sample);
  }
  __syncthreads();  // the barriers are ready
  if (of_keys) {
    measure(ops, out, memory + 2 * HALF, p_lse, head, sample, fault);
    __syncthreads();
  }
  if (of_keys)
    run_head<true, KEYS_AT>(&map_k, &map_v, ops, memory, to_k, to_v, out, p_lse, rotation, heads, head, sample, scale, fault);
  else
    run_head<false, QUERIES_AT>(&map_q, &map_grad, ops, memory, to_q, to_q, out, p_lse, rotation, heads, head, sample, scale, fault);
}
