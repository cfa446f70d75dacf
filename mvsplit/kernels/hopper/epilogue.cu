// How a tile leaves its block: SwiGLU of pairs of rows; a part along K in fp32 with its column sums; or
// rows of half precision, turned over in shared memory.

#if EPI == SWIGLU
__device__ __forceinline__ void activate(Acc &acc) {  // a gate and its value are in one thread
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) acc[i][4 * j + e] = silu(acc[i][4 * j + e]) * acc[i][4 * j + 2 + e];
}
#endif

#if EPI == PART
// `out` [split, row, column] ← the sums, and `given.sums` [split, sample, tile, segment, column] ← theirs over
// the real tokens of a segment in this tile.
__device__ __forceinline__ void write_part(const Acc &acc, const Tile &tile, const Worker &me, const Given &given) {
  const int column = tile.i_w * W_ROWS + me.warp * 16 + me.row, tiles_of_sample = given.sample_rows / TOK;
  const int sample = tile.row / given.sample_rows, from = tile.row % given.sample_rows, count = given.p_valid ? given.p_valid[sample] : given.text;
  float sum[2][2] = {}, *to = (float *)(given.out + (long long)(tile.split * given.n_rows + tile.row + me.token) * given.pitch_out) + column;
#pragma unroll
  for (int i = 0; i < NI; ++i)
#pragma unroll
    for (int j = 0; j < NT / 8; ++j)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = from + i * NT + j * 8, t = block + me.token + e;
        const bool in_text = block >= given.image_rows, real = in_text ? t - given.image_rows < count : t < given.image;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float f = acc[i][4 * j + 2 * h + e];
          *(float *)((char *)(to + 8 * h) + (long long)(i * NT + j * 8 + e) * given.pitch_out) = f;
          sum[h][0] += real && !in_text ? f : 0.f;
          sum[h][1] += real && in_text ? f : 0.f;
        }
      }
  const int i_part = (tile.split * (given.n_rows / given.sample_rows) + sample) * tiles_of_sample + from / TOK;
  float *sums = given.sums + (long long)i_part * 2 * given.width + column;
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int seg = 0; seg < 2; ++seg) {
      sum[h][seg] += __shfl_xor_sync(~0u, sum[h][seg], 1);
      sum[h][seg] += __shfl_xor_sync(~0u, sum[h][seg], 2);
      if (me.token == 0) sums[seg * given.width + 8 * h] = sum[h][seg];
    }
}

#else
// Tokens from 8·block on, the `b`-th eight (for SwiGLU sixteen) of a chunk, turned over to rows of tokens.
__device__ __forceinline__ void stage_tokens(const Acc &acc, int block, int b, u32 staged, const Worker &me) {
#if EPI == SWIGLU
  const float *v = acc[block / (NT / 8)] + 4 * (block % (NT / 8));
  const float *u = acc[(block + 1) / (NT / 8)] + 4 * ((block + 1) % (NT / 8));
  store_transposed(staged + (b * 8 + me.lane % 16) * PITCH + me.warp % 4 * 16, pack(v[0], v[1]), pack(u[0], u[1]));
#elif BY_TOKENS
#pragma unroll
  for (int i = 0; i < NI; ++i) {
    const float *v = acc[i] + 4 * block;
    const int column = (me.lane & 8 ? W_ROWS / 2 : 0) + i * 32 + me.warp % 4 * 8;
    store_transposed(staged + (b * 8 + me.lane % 8) * PITCH + 2 * column, pack(v[0], v[1]), pack(v[2], v[3]));
  }
#else
  const float *v = acc[block / (NT / 8)] + 4 * (block % (NT / 8));
  const int column = EPI == QKV ? me.warp * 8 + (me.lane & 8 ? W_ROWS / 2 : 0) : me.warp * 16 + (me.lane & 8);
  store_transposed(staged + (b * 8 + me.lane % 8) * PITCH + 2 * column, pack(v[0], v[1]), pack(v[2], v[3]));
#endif
}

// Out through shared memory, CHUNK tokens at once, 16 bytes a thread.
__device__ __forceinline__ void write_rows(const Acc &acc, const Tile &tile, const Worker &me, char *staging, const Given &given) {
  const u32 staged = shared(staging);
#pragma unroll
  for (int part = 0; part < (BY_TOKENS ? NT : TOK) / CHUNK; ++part) {
    workers_sync(me);
#pragma unroll
    for (int b = 0; b < CHUNK / 8; b += EPI == SWIGLU ? 2 : 1) stage_tokens(acc, part * CHUNK / 8 + b, b, staged, me);
    workers_sync(me);
    char *to = given.out + (tile.i_w * COLUMNS + (EPI == SWIGLU ? me.group * COLUMNS_OUT : 0)) * 2;
    const int first = tile.row + (BY_TOKENS ? me.group * NT : 0) + part * CHUNK;
    for (int c = me.index; c < CHUNK * (COLUMNS_OUT / 8); c += WORKERS) {
      const int t = c / (COLUMNS_OUT / 8), piece = c % (COLUMNS_OUT / 8);
      if (first + t < given.n_rows)
        *(Quad *)(to + (long long)(first + t) * given.pitch_out + piece * 16) = *(const Quad *)(staging + t * PITCH + piece * 16);
    }
  }
  workers_sync(me);
}
#endif
