// Z = X + β⊙F + shift, shift = (α − β)⊙JF − λ⊙JX, then RMSNorm (paper Eq. 7–8, 49): each element of
// X and F is read from device memory once.

#define SUM_FIRST APPLY_WARPS         // warps, by role: apply, sum, load, mean
#define LOAD_WARP (SUM_FIRST + SUM_WARPS)
#define MEAN_WARP (LOAD_WARP + 1)
#define WARPS (MEAN_WARP + 1)
#define TURNS (APPLY_WARPS / ROWS)    // slots that are applied at once, each always by the same warps

struct Barriers { u64 full[SLOTS], empty[SLOTS], sums, shift, taken; };

struct Shared {
  alignas(128) unsigned char slots[SLOTS][SLOT_BYTES];  // ROWS rows of X, then those of F
  alignas(16) float sums[CLUSTER][2][SLICE];            // from each block: F, X
  alignas(16) float shift[D];
  Barriers bars;
};
static_assert(sizeof(Shared) <= SHARED, "what the launch asks for");

__device__ __forceinline__ void load_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                          const u16 *x, const u16 *f, long long sx_b, long long sx_t,
                                          long long sf_b, long long sf_t) {
  const Hints hints = make_hints();
  each_unit(layout, valid, rank, [&](const Unit &u) {
    for (int j = 0; j < u.slots + u.passed; ++j) {
      const u32 fill = u.fill + j, slot = slot_of(fill), bar = shared(&at.bars.full[slot]);
      const int k = j < u.slots ? j : j - u.slots, rows = within(u.real - k * ROWS, 0, ROWS);
      const u64 hint = j < u.passed ? hints.keep : hints.drop;
      if (fill >= SLOTS) barrier_wait(shared(&at.bars.empty[slot]), phase_of(fill) ^ 1);
      barrier_expect(bar, 2 * rows * ROW_BYTES);
      const long long token = u.token + k * ROWS;
      const u32 to = shared(at.slots[slot]);
      load_rows(to, x + u.b * sx_b + token * sx_t, sx_t, rows, bar, hint);
      load_rows(to + ROWS * ROW_BYTES, f + u.b * sf_b + token * sf_t, sf_t, rows, bar, hint);
    }
  });
}

__device__ __forceinline__ void add_row(u32 from, float (&sum)[8]) {
  float v[8];
  unpack(load_quad(from), v);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += v[i];
}

__device__ __forceinline__ void sum_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank) {
  const int thread = threadIdx.x - 32 * SUM_FIRST, column = 8 * thread;
  const u32 owner = column / SLICE, sums = shared(&at.sums[rank][0][column % SLICE]);
  const u32 to = at_rank(sums, owner), bar = at_rank(shared(&at.bars.sums), owner);
  each_unit(layout, valid, rank, [&](const Unit &u) {
    float f[8] = {}, x[8] = {};
    for (int j = 0; j < u.slots; ++j) {
      const u32 slot = slot_of(u.fill + j), from = shared(at.slots[slot]) + 16 * thread;
      const int rows = u.real - j * ROWS;
      barrier_wait(shared(&at.bars.full[slot]), phase_of(u.fill + j));
      if (rows >= ROWS) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          add_row(from + r * ROW_BYTES, x);
          add_row(from + (ROWS + r) * ROW_BYTES, f);
        }
      } else {
        for (int r = 0; r < rows; ++r) {
          add_row(from + r * ROW_BYTES, x);
          add_row(from + (ROWS + r) * ROW_BYTES, f);
        }
      }
      summed(at.bars.empty, u, j, slot);
    }
    if (u.n) barrier_wait(shared(&at.bars.taken), (u.n - 1) & 1);
    send8(to, bar, f);
    send8(to + 4 * SLICE, bar, x);
    pass_rest(at.bars.full, at.bars.empty, u);
  });
}

__device__ __forceinline__ void mean_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                          const Gain &g_beta, const Gain &g_alpha, const Gain &g_leak,
                                          float *mean_f, float *mean_x) {
  const int lane = threadIdx.x % 32, local = EACH * lane, column = rank * SLICE + local;
  const u32 shift = shared(&at.bars.shift);
  float weight[EACH], leak[EACH];
  mean_gains(g_beta, g_alpha, g_leak, column, weight, leak);
  each_unit(layout, valid, rank, [&](const Unit &u) {
    await_sums(at, u);
    float f[EACH] = {}, x[EACH] = {};
    add_blocks(at.sums, 0, local, f);
    add_blocks(at.sums, 1, local, x);
    const float share = 1.f / max(u.count, 1);
    const long long to = ((long long)u.b * SEGMENTS + u.s) * D + column;
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      mean_f[to + i] = f[i] *= share;
      mean_x[to + i] = x[i] *= share;
      f[i] = weight[i] * f[i] - leak[i] * x[i];
    }
    const u32 here = shared(&at.shift[column]);
    for (u32 c = 0; c < CLUSTER; ++c) send(at_rank(here, c), at_rank(shift, c), f);
  });
}

// What is added to every row of a unit, when it is there.
__device__ __forceinline__ void take_shift(Shared &at, const Unit &u, int lane, float (&shift)[LANE_COLUMNS]) {
  barrier_wait(shared(&at.bars.shift), u.n & 1);
#pragma unroll
  for (int i = 0; i < LANE_COLUMNS; i += 8) {
    float v[8];
    load_8(shared(&at.shift[32 * i + 8 * lane]), v);
#pragma unroll
    for (int e = 0; e < 8; ++e) shift[i + e] = v[e];
  }
  __syncwarp();
  if (lane == 0) barrier_arrive(shared(&at.bars.taken), 1);
}

// Z of a row.
__device__ __forceinline__ void load_row(u32 from, const float (&beta)[LANE_COLUMNS],
                                         const float (&shift)[LANE_COLUMNS], float (&z)[LANE_COLUMNS]) {
#pragma unroll
  for (int i = 0; i < LANE_COLUMNS; i += 8) {
    float x[8], f[8];
    unpack(load_quad(from + 64 * i), x);
    unpack(load_quad(from + ROWS * ROW_BYTES + 64 * i), f);
#pragma unroll
    for (int e = 0; e < 8; ++e) z[i + e] = x[e] + (beta[i + e] * f[e] + shift[i + e]);
  }
}

__device__ __forceinline__ void apply_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                           const Gain &g_beta, float eps, u16 *y, float *r_out, int tokens) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float beta[LANE_COLUMNS], shift[LANE_COLUMNS];
#pragma unroll
  for (int i = 0; i < LANE_COLUMNS; ++i) beta[i] = gain(g_beta, i / 8 * 256 + 8 * lane + i % 8);
  each_unit(layout, valid, rank, [&](const Unit &u) {
    take_shift(at, u, lane, shift);
    for (int j = u.passed; j < u.slots + u.passed; ++j) {
      const int k = j < u.slots ? j : j - u.slots, row = k * ROWS + warp % ROWS;
      const u32 slot = slot_of(u.fill + j), from = shared(at.slots[slot]) + warp % ROWS * ROW_BYTES + 16 * lane;
      if (slot % TURNS != warp / ROWS) continue;
      barrier_wait(shared(&at.bars.full[slot]), phase_of(u.fill + j));
      float z[LANE_COLUMNS] = {};
      if (row < u.real) load_row(from, beta, shift, z);
      applied(at.bars.empty, slot, ROWS);
      if (row >= u.rows) continue;
      const long long to = (long long)u.b * tokens + u.token + row;
      float square = 0;
#pragma unroll
      for (int i = 0; i < LANE_COLUMNS; ++i) square += z[i] * z[i];
      const float r = rsqrtf(over_lanes(square) * (1.f / D) + eps);
      if (lane == 0) r_out[to] = r;
#pragma unroll
      for (int i = 0; i < LANE_COLUMNS; i += 8) {
        float v[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) v[e] = z[i + e] * r;
        store_quad(y + to * D + 32 * i + 8 * lane, packed(v));
      }
    }
  });
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
split_merge_forward(const u16 *x, const u16 *f, u16 *y, float *r, const VALID *valid, float *mean_f, float *mean_x,
              Gain beta, Gain alpha, Gain leak, long long sx_b, long long sx_t, long long sf_b, long long sf_t,
              const __grid_constant__ Layout layout, int tokens, float eps, u32 *fault_at) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared &at = *reinterpret_cast<Shared *>(memory);
  const u32 rank = cluster_rank();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) prepare(at.bars, fault_at);
  begin_together();
  if (warp < APPLY_WARPS) {
    apply_role(at, layout, valid, rank, beta, eps, y, r, tokens);
  } else if (warp < LOAD_WARP) {
    sum_role(at, layout, valid, rank);
  } else if (warp == LOAD_WARP) {
    if (threadIdx.x % 32 == 0) load_role(at, layout, valid, rank, x, f, sx_b, sx_t, sf_b, sf_t);
  } else {
    mean_role(at, layout, valid, rank, beta, alpha, leak, mean_f, mean_x);
  }
  leave();
}
