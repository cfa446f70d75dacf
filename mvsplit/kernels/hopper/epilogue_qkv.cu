// Rotation and QK-norm of a head, while it is still in registers.
#if EPI == QKV

#define SLOTS (W_ROWS / 16)  // of eight channels and their partners
#define STRAIGHT (SIDE % 8 == 0 && NT % SIDE == 0)  // eight tokens lie in one row of the image

// Turns a thread's channel of its tokens, from `at` on in the sample, and adds the squares of what comes
// out. `table` [place, channel]: the slower half of the channels by row, the other by column.
__device__ __forceinline__ void turn(float (&v)[NT / 2], float (&squares)[HALF_TOKENS], const float2 *table, bool by_column,
                                     int at, int image_rows, int lane_token) {
  const int width = W_ROWS / 2;
#if STRAIGHT  // all of the table that is needed, at once
  float2 across[SIDE / 4], down[NT / SIDE];
#pragma unroll
  for (int i = 0; i < SIDE / 4; ++i)
    across[i] = by_column ? __ldg(table + (i / 2 * 8 + lane_token + i % 2) * width) : float2{};
#pragma unroll
  for (int i = 0; i < NT / SIDE; ++i)
    down[i] = !by_column && at + i * SIDE < image_rows ? __ldg(table + (at / SIDE + i) * width) : float2{};
#endif
#pragma unroll
  for (int j = 0; j < NT / 8; ++j) {
    const bool turned = at + j * 8 < image_rows;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#if STRAIGHT
      float2 by = by_column ? across[j * 8 % SIDE / 8 * 2 + e] : down[j * 8 / SIDE];
#else
      const int token = at + j * 8 + lane_token + e;
      float2 by = turned ? __ldg(table + (by_column ? token % SIDE : token / SIDE) * width) : float2{};
#endif
      const float x1 = v[4 * j + e], x2 = v[4 * j + 2 + e];
      squares[2 * j + e] += x1 * x1 + x2 * x2;  // turning leaves them
      if (turned) {
        v[4 * j + e] = x1 * by.x + x2 * by.y;
        v[4 * j + 2 + e] = x2 * by.x - x1 * by.y;
      }
    }
  }
}

// Brings the table near, into what shared memory leaves of the L1 cache, while there is nothing else to
// do. No cosine is a NaN: that is asked so that the loads are not left out.
__device__ __forceinline__ void fetch_table(const Given &given) {
  const int places = given.image_rows / SIDE > SIDE ? given.image_rows / SIDE : SIDE;
  float total = 0.f;
  for (int at = threadIdx.x * 16; at < places * (W_ROWS / 2); at += THREADS * 16) total += __ldg(given.rotation + at).x;
  if (total != total) *given.fault = 1;
}

// A thread holds one or two channels, whose tokens' turns differ by row or by column; the norm of a token
// is that of all warps' channels.
__device__ __forceinline__ void rotate_and_normalise(Acc &acc, const Tile &tile, const Worker &me, float *scratch, const Given &given) {
  if (tile.i_w >= given.n_rotated) return;  // values
  const int tokens = BY_TOKENS ? NT : TOK, warps = BY_TOKENS ? 4 : WARPS;
  float *sums = scratch, *scale = sums + warps * tokens, squares[HALF_TOKENS] = {};
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    const int slot = BY_TOKENS ? i * 4 + me.warp % 4 : me.warp, at = tile.row % given.sample_rows + (BY_TOKENS ? me.group : i) * NT;
    turn(acc[i], squares, given.rotation + slot * 8 + me.row, slot >= SLOTS / 2, at, given.image_rows, me.token);
    if (!BY_TOKENS || i == NI - 1) sum_over_lanes(squares, sums + (BY_TOKENS ? me.warp % 4 * NT : me.warp * tokens + i * NT), me.lane);
    if (!BY_TOKENS)
#pragma unroll
      for (int t = 0; t < HALF_TOKENS; ++t) squares[t] = 0.f;
  }
  workers_sync(me);
  for (int t = me.index; t < tokens; t += WORKERS) {
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < warps; ++w) total += sums[w * tokens + t];
    scale[t] = rsqrtf(total / W_ROWS + given.eps);
  }
  workers_sync(me);
  scale_tokens(acc, scale, me.token);
}
#endif
