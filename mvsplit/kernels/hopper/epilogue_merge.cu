// The merge after a writer, Z = X + β⊙PF + α⊙JF − λ⊙JX, and RMSNorm. A block holds a sample's rows, so it
// finds the means itself; the blocks of a sample, each with some of its columns, tell each other the
// squares of rows.
#if EPI == WRITE

// The gains of a thread's two columns, asked for before the products: they come from far.
struct Gains {
  float beta[2], alpha[2], leak[2];
  __device__ __forceinline__ static float at(Gain g, int column) { return g.p ? low_half((u32)g.p[column * g.stride]) : g.number; }
  __device__ __forceinline__ Gains(const Tile &tile, const Worker &me, const Given &given) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int column = tile.i_w * W_ROWS + me.warp * 16 + me.row + 8 * h;
      beta[h] = at(given.beta, column), alpha[h] = at(given.alpha, column), leak[h] = at(given.leak, column);
    }
  }
};

// The blocks that share rows are all on the device at once, and tell each other a number for each row,
// together with which launch it is of: then one trip through memory is enough.
__device__ __forceinline__ void tell(u64 *place, float number, u32 launch) {
  const u64 both = (u64)launch << 32 | __float_as_uint(number);
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(place), "l"(both) : "memory");
}

__device__ __forceinline__ u64 look(const u64 *place) {
  u64 both;
  asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(both) : "l"(place) : "memory");
  return both;
}

// Adds up what the `n` blocks told of a row, in order; NaN, and the host is told, if one does not come.
__device__ __forceinline__ float hear(const u64 *place, int n, int pitch, u32 launch, volatile u32 *fault) {
  float total = 0.f;
  for (int first = 0; first < n; first += 8) {
    u64 both[8];
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < n) both[c] = look(place + (first + c) * pitch);
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (first + c < n) {
        Patience patience;
        while ((u32)(both[c] >> 32) != launch) {
          if (patience.ends(fault)) return __int_as_float(0x7FC00000);
          both[c] = look(place + (first + c) * pitch);
        }
        total += __uint_as_float((u32)both[c]);
      }
  }
  return total;
}

// Two of a thread's rows of the trunk, turned over, for eight tokens from `block` on.
struct Trunk {
  u32 address;
  int chunk;  // 16 bytes of a row of 128
  __device__ __forceinline__ void load(int block, const Worker &me, u32 (&x)[2]) const {
    const int t = block + me.lane % 8;
    load_transposed(address + t * 128 + ((chunk ^ (t & 7)) << 4), x[0], x[1]);
  }
};

// (α − β)⊙JF − λ⊙JX of a thread's two columns, by segment.
__device__ __forceinline__ void shifts(float (&shift)[2][2], const Gains &gains, const Acc &acc, const Trunk &trunk, const Worker &me,
                                       int count) {
  float sum_f[2][2] = {}, sum_x[2][2] = {};  // [row, segment]
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j) {
      const int block = i * NT + j * 8, seg = block >= IMG;
      u32 x[2];
      trunk.load(block, me, x);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool real = !seg || block + me.token + e - IMG < count;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          sum_f[h][seg] += real ? acc[i][4 * j + 2 * h + e] : 0.f;
          sum_x[h][seg] += real ? (e ? high_half(x[h]) : low_half(x[h])) : 0.f;
        }
      }
    }
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int seg = 0; seg < 2; ++seg) {
      for (int bit = 1; bit <= 2; bit <<= 1) {
        sum_f[h][seg] += __shfl_xor_sync(~0u, sum_f[h][seg], bit);
        sum_x[h][seg] += __shfl_xor_sync(~0u, sum_x[h][seg], bit);
      }
      const float n = seg ? (float)(count > 1 ? count : 1) : (float)IMG;
      shift[h][seg] = ((gains.alpha[h] - gains.beta[h]) * sum_f[h][seg] - gains.leak[h] * sum_x[h][seg]) / n;
    }
}

// `acc`, F, becomes Z; `sums` [warp, token] its squares, over a warp's columns.
__device__ __forceinline__ void merge_rows(Acc &acc, const Trunk &trunk, const float (&shift)[2][2], const Gains &gains,
                                           float *sums, const Worker &me, int count) {
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    float squares[HALF_TOKENS];
#pragma unroll
    for (int j = 0; j < NT / 8; ++j) {
      const int block = i * NT + j * 8, seg = block >= IMG;
      u32 x[2];
      trunk.load(block, me, x);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool real = !seg || block + me.token + e - IMG < count;
        float square = 0.f;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float old = e ? high_half(x[h]) : low_half(x[h]);
          const float z = real ? old + gains.beta[h] * acc[i][4 * j + 2 * h + e] + shift[h][seg] : 0.f;
          acc[i][4 * j + 2 * h + e] = z;
          square += z * z;
        }
        squares[2 * j + e] = square;
      }
    }
    sum_over_lanes(squares, sums + me.warp * TOK + i * NT, me.lane);
  }
}

// `count` real text tokens; `launch` is which one it is, as the blocks of this sample count.
__device__ __forceinline__ void merge_and_normalise(Acc &acc, const Tile &tile, const Worker &me, const Gains &gains, int count, const Stages &stages,
                                                    int step, u32 launch, const Given &given) {
  float *sums = (float *)stages.scratch(0), *scale = sums + WARPS * TOK;
  for (int g = 0; g < WG; ++g) stages.wait_full(step + g, given);
  const Trunk trunk{stages.a(step + me.group), me.warp % 4 * 2 + (me.lane / 8 & 1)};
  float shift[2][2];
  shifts(shift, gains, acc, trunk, me, count);
  merge_rows(acc, trunk, shift, gains, sums, me, count);
  workers_sync(me);
  u64 *squares = given.squares + tile.row;
  for (int t = threadIdx.x; t < TOK; t += THREADS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += sums[w * TOK + t];
    tell(squares + tile.i_w * given.n_rows + t, total, launch);
  }
  for (int t = threadIdx.x; t < TOK; t += THREADS)
    scale[t] = rsqrtf(hear(squares + t, given.n_w, given.n_rows, launch, given.fault) / (given.n_w * W_ROWS) + given.eps);
  workers_sync(me);
  if (threadIdx.x == 0) atomicAdd(given.launches + tile.row / TOK, 1);  // all of the sample have come, and know the number before
  scale_tokens(acc, scale, me.token);
}
#endif
