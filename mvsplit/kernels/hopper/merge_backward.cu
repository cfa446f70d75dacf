// Δ_i = r_i (G_i − Y_i ⟨G_i, Y_i⟩/D), ∂L/∂X = Δ − λ⊙Δ̄, ∂L/∂F = β⊙Δ + (α − β)⊙Δ̄ (paper Eq. 50–53) and
// each cluster's share of ∂L/∂β, ∂L/∂α, ∂L/∂λ (Eq. 54): each element of G, Y and F is read from device
// memory once. Only G and Y stay: F is done with after the first pass, and is absent where no gain
// learns. One more role,
//
//   dot      ⟨G_i, Y_i⟩ of the rows of a slot, a warp each

#define SUM_FIRST APPLY_WARPS         // warps, by role: apply, sum, dot, load, mean
#define DOT_FIRST (SUM_FIRST + SUM_WARPS)
#define LOAD_WARP (DOT_FIRST + ROWS)
#define MEAN_WARP (LOAD_WARP + 1)
#define WARPS (MEAN_WARP + 1)
#define GROUPS (APPLY_WARPS / SUM_WARPS)  // rows that are applied at once

struct Barriers { u64 full[SLOTS], dotted[SLOTS], empty[SLOTS], f_full[F_SLOTS], f_empty[F_SLOTS], sums, shift, taken; };

struct Shared {
  alignas(128) unsigned char slots[SLOTS][SLOT_BYTES];  // ROWS rows of G, then those of Y
  alignas(128) unsigned char f[F_SLOTS][ROWS * ROW_BYTES];
  alignas(16) float sums[CLUSTER][2][SLICE];            // from each block: Δ, Δ⊙F
  alignas(16) float shift[2][D];                        // λ⊙Δ̄, (α − β)⊙Δ̄
  alignas(16) float factors[SLOTS][ROWS][2];            // Δ = first · G − second · Y
  Barriers bars;
};
static_assert(sizeof(Shared) <= SHARED, "what the launch asks for");

__device__ __forceinline__ void load_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                          const u16 *g, const u16 *y, const u16 *f, long long sg_b,
                                          long long sg_t, long long sf_b, long long sf_t, int tokens) {
  const Hints hints = make_hints();
  u32 f_fill = 0;
  each_unit(layout, valid, rank, [&](const Unit &u) {
    for (int j = 0; j < u.slots + u.passed; ++j) {
      const u64 hint = j < u.passed ? hints.keep : hints.drop;
      const u32 fill = u.fill + j, slot = slot_of(fill), bar = shared(&at.bars.full[slot]);
      const int k = j < u.slots ? j : j - u.slots, rows = within(u.real - k * ROWS, 0, ROWS);
      const long long token = u.token + k * ROWS;
      if (fill >= SLOTS) barrier_wait(shared(&at.bars.empty[slot]), phase_of(fill) ^ 1);
      barrier_expect(bar, 2 * rows * ROW_BYTES);
      const u32 to = shared(at.slots[slot]);
      load_rows(to, g + u.b * sg_b + token * sg_t, sg_t, rows, bar, hint);
      load_rows(to + ROWS * ROW_BYTES, y + ((long long)u.b * tokens + token) * D, D, rows, bar, hint);
      if (!f || j >= u.slots) continue;
      const u32 i = f_fill % F_SLOTS, f_bar = shared(&at.bars.f_full[i]);
      if (f_fill >= F_SLOTS) barrier_wait(shared(&at.bars.f_empty[i]), (f_fill / F_SLOTS & 1) ^ 1);
      barrier_expect(f_bar, rows * ROW_BYTES);
      load_rows(shared(at.f[i]), f + u.b * sf_b + token * sf_t, sf_t, rows, f_bar, hints.drop);
      ++f_fill;
    }
  });
}

__device__ __forceinline__ void dot_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                         const float *r_in, int tokens) {
  const int own = threadIdx.x / 32 - DOT_FIRST, lane = threadIdx.x % 32;
  each_unit(layout, valid, rank, [&](const Unit &u) {
    float r = 0;  // of this warp's row in slot k / 32 * 32 + lane
    for (int j = 0; j < u.slots + u.passed; ++j) {
      const u32 slot = slot_of(u.fill + j);
      const int k = j < u.slots ? j : j - u.slots, row = k * ROWS + own;
      if (k % 32 == 0) {
        const int other = (k + lane) * ROWS + own;
        r = other < u.real ? r_in[(long long)u.b * tokens + u.token + other] : 0.f;
      }
      const u32 from = shared(at.slots[slot]) + own * ROW_BYTES + 16 * lane;
      barrier_wait(shared(&at.bars.full[slot]), phase_of(u.fill + j));
      if (row < u.real) {
        float dot = 0;
#pragma unroll
        for (int i = 0; i < LANE_COLUMNS; i += 8) {
          float g[8], y[8];
          unpack(load_quad(from + 64 * i), g);
          unpack(load_quad(from + ROWS * ROW_BYTES + 64 * i), y);
#pragma unroll
          for (int e = 0; e < 8; ++e) dot += g[e] * y[e];
        }
        const float scale = __shfl_sync(~0u, r, k % 32), along = over_lanes(dot) * (1.f / D);
        if (lane == 0) {
          at.factors[slot][own][0] = scale;
          at.factors[slot][own][1] = scale * along;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(shared(&at.bars.dotted[slot]), 1);
    }
  });
}

__device__ __forceinline__ void delta_of(const Quad &g, const Quad &y, const float (&factor)[2], float (&delta)[8]) {
  float vg[8], vy[8];
  unpack(g, vg);
  unpack(y, vy);
#pragma unroll
  for (int e = 0; e < 8; ++e) delta[e] = factor[0] * vg[e] - factor[1] * vy[e];
}

__device__ __forceinline__ void sum_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank, bool learns) {
  const int thread = threadIdx.x - 32 * SUM_FIRST, column = 8 * thread, lane = thread % 32;
  const u32 owner = column / SLICE;
  const u32 to = at_rank(shared(&at.sums[rank][0][column % SLICE]), owner), bar = at_rank(shared(&at.bars.sums), owner);
  u32 f_fill = 0;
  each_unit(layout, valid, rank, [&](const Unit &u) {
    float sum[8] = {}, sum_f[8] = {};
    for (int j = 0; j < u.slots; ++j, ++f_fill) {
      const u32 slot = slot_of(u.fill + j), i = f_fill % F_SLOTS;
      const u32 from = shared(at.slots[slot]) + 16 * thread, from_f = shared(at.f[i]) + 16 * thread;
      const int rows = min(u.real - j * ROWS, ROWS);
      barrier_wait(shared(&at.bars.full[slot]), phase_of(u.fill + j));
      barrier_wait(shared(&at.bars.dotted[slot]), phase_of(u.fill + j));
      if (learns) barrier_wait(shared(&at.bars.f_full[i]), f_fill / F_SLOTS & 1);
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (r >= rows) break;
        float factor[2], delta[8], f[8];
        load_floats(shared(at.factors[slot][r]), factor);
        delta_of(load_quad(from + r * ROW_BYTES), load_quad(from + (ROWS + r) * ROW_BYTES), factor, delta);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum[e] += delta[e];
        if (!learns) continue;
        unpack(load_quad(from_f + r * ROW_BYTES), f);
#pragma unroll
        for (int e = 0; e < 8; ++e) sum_f[e] += delta[e] * f[e];
      }
      summed(at.bars.empty, u, j, slot);
      if (learns && lane == 0) barrier_arrive(shared(&at.bars.f_empty[i]), 1);
    }
    if (u.n) barrier_wait(shared(&at.bars.taken), (u.n - 1) & 1);
    send8(to, bar, sum);
    send8(to + 4 * SLICE, bar, sum_f);
    pass_rest(at.bars.full, at.bars.empty, u);
  });
}

struct Means { const float *f, *x; };

__device__ __forceinline__ void mean_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                          const Gain &g_beta, const Gain &g_alpha, const Gain &g_leak,
                                          const Means &means, float *share) {
  const int lane = threadIdx.x % 32, local = EACH * lane, column = rank * SLICE + local;
  const u32 shift = shared(&at.bars.shift);
  float weight[EACH], leak[EACH], d_beta[EACH] = {}, d_alpha[EACH] = {}, d_leak[EACH] = {};
  mean_gains(g_beta, g_alpha, g_leak, column, weight, leak);
  each_unit(layout, valid, rank, [&](const Unit &u) {
    const long long from = ((long long)u.b * SEGMENTS + u.s) * D + column;
    float mean_f[EACH], mean_x[EACH], delta[EACH] = {}, delta_f[EACH] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      mean_f[i] = means.f[from + i];
      mean_x[i] = means.x[from + i];
    }
    await_sums(at, u);
    add_blocks(at.sums, 0, local, delta);
    add_blocks(at.sums, 1, local, delta_f);
    const float portion = 1.f / max(u.count, 1);
    float shift_x[EACH], shift_f[EACH];
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const float part = delta[i] * mean_f[i];
      d_beta[i] += delta_f[i] - part;
      d_alpha[i] += part;
      d_leak[i] -= delta[i] * mean_x[i];
      const float mean = delta[i] * portion;  // Eq. 51
      shift_x[i] = leak[i] * mean;
      shift_f[i] = weight[i] * mean;
    }
    const u32 x = shared(&at.shift[0][column]), f = shared(&at.shift[1][column]);
    for (u32 c = 0; c < CLUSTER; ++c) {
      send(at_rank(x, c), at_rank(shift, c), shift_x);
      send(at_rank(f, c), at_rank(shift, c), shift_f);
    }
  });
  if (!share) return;
  share += (long long)(blockIdx.x / CLUSTER) * 3 * D + column;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    share[i] = d_beta[i];
    share[D + i] = d_alpha[i];
    share[2 * D + i] = d_leak[i];
  }
}

__device__ __forceinline__ void apply_role(Shared &at, const Layout &layout, const VALID *valid, u32 rank,
                                           const Gain &g_beta, u16 *dx, u16 *df, int tokens) {
  const int group = threadIdx.x / 32 / SUM_WARPS, lane = threadIdx.x % 32;
  const int thread = threadIdx.x - group * 32 * SUM_WARPS, column = 8 * thread;
  float beta[8], shift_x[8], shift_f[8];
#pragma unroll
  for (int e = 0; e < 8; ++e) beta[e] = gain(g_beta, column + e);
  each_unit(layout, valid, rank, [&](const Unit &u) {
    barrier_wait(shared(&at.bars.shift), u.n & 1);
    load_8(shared(&at.shift[0][column]), shift_x);
    load_8(shared(&at.shift[1][column]), shift_f);
    __syncwarp();
    if (lane == 0) barrier_arrive(shared(&at.bars.taken), 1);
    for (int j = u.passed; j < u.slots + u.passed; ++j) {
      const int k = j < u.slots ? j : j - u.slots;
      const u32 slot = slot_of(u.fill + j), from = shared(at.slots[slot]) + 16 * thread;
      barrier_wait(shared(&at.bars.full[slot]), phase_of(u.fill + j));
      barrier_wait(shared(&at.bars.dotted[slot]), phase_of(u.fill + j));
      Quad g[ROWS / GROUPS], y[ROWS / GROUPS];
      float factor[ROWS / GROUPS][2];
#pragma unroll
      for (int i = 0; i < ROWS / GROUPS; ++i) {
        const int r = i * GROUPS + group;
        g[i] = load_quad(from + r * ROW_BYTES);
        y[i] = load_quad(from + (ROWS + r) * ROW_BYTES);
        load_floats(shared(at.factors[slot][r]), factor[i]);
      }
      applied(at.bars.empty, slot, APPLY_WARPS);
#pragma unroll
      for (int i = 0; i < ROWS / GROUPS; ++i) {
        const int row = k * ROWS + i * GROUPS + group;
        if (row >= u.rows) break;
        float x[8] = {}, f[8] = {};
        if (row < u.real) {
          float delta[8];
          delta_of(g[i], y[i], factor[i], delta);
#pragma unroll
          for (int e = 0; e < 8; ++e) {
            x[e] = delta[e] - shift_x[e];              // Eq. 52
            f[e] = beta[e] * delta[e] + shift_f[e];  // Eq. 53
          }
        }
        const long long to = ((long long)u.b * tokens + u.token + row) * D + column;
        store_quad(dx + to, packed(x));
        store_quad(df + to, packed(f));
      }
    }
  });
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, 1)
split_merge_backward(const u16 *g, const u16 *y, const u16 *f, const float *r, const VALID *valid, const float *mean_f,
               const float *mean_x, u16 *dx, u16 *df, float *share, Gain beta, Gain alpha, Gain leak,
               long long sg_b, long long sg_t, long long sf_b, long long sf_t,
               const __grid_constant__ Layout layout, int tokens, u32 *fault_at) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared &at = *reinterpret_cast<Shared *>(memory);
  const u32 rank = cluster_rank();
  const int warp = threadIdx.x / 32;
  asm volatile("griddepcontrol.launch_dependents;");  // of split_merge_gains
  if (threadIdx.x == 0) {
    prepare(at.bars, fault_at);
    for (int i = 0; i < SLOTS; ++i) barrier_init(shared(&at.bars.dotted[i]), ROWS);
    for (int i = 0; i < F_SLOTS; ++i) {
      barrier_init(shared(&at.bars.f_full[i]), 1);
      barrier_init(shared(&at.bars.f_empty[i]), SUM_WARPS);
    }
  }
  begin_together();
  if (warp < SUM_FIRST) {
    apply_role(at, layout, valid, rank, beta, dx, df, tokens);
  } else if (warp < DOT_FIRST) {
    sum_role(at, layout, valid, rank, f);
  } else if (warp < LOAD_WARP) {
    dot_role(at, layout, valid, rank, r, tokens);
  } else if (warp == LOAD_WARP) {
    if (threadIdx.x % 32 == 0) load_role(at, layout, valid, rank, g, y, f, sg_b, sg_t, sf_b, sf_t, tokens);
  } else {
    mean_role(at, layout, valid, rank, beta, alpha, leak, Means{mean_f, mean_x}, share);
  }
  leave();
}

__device__ __forceinline__ void put(void *to, int half, int at, float v) {
  if (half) ((u16 *)to)[at] = (u16)pack(v, 0.f);
  else ((float *)to)[at] = v;
}

// The clusters' shares [clusters, 3, D], added up in their order; a thread a column.
extern "C" __global__ void split_merge_gains(const float *share, void *d_beta, void *d_alpha, void *d_leak, int halves,
                                       int clusters, int tied) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  asm volatile("griddepcontrol.wait;" ::: "memory");  // it starts while the kernel before ends
  float beta = 0, alpha = 0, leak = 0;
  for (int c = 0; c < clusters; ++c) {
    beta += share[(c * 3) * D + column];
    alpha += share[(c * 3 + 1) * D + column];
    leak += share[(c * 3 + 2) * D + column];
  }
  put(d_beta, halves & 1, column, beta);
  put(d_alpha, halves & 2, column, tied ? alpha + leak : alpha);
  put(d_leak, halves & 4, column, leak);
}
