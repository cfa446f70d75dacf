// Y = A·Wᵀ for many rows on Hopper, with what follows it fused in. Compiled at run time,
// one kernel for each set of the macros below; `multiply`, around wgmma, is written by product.py.
//
// A block computes the transposed tile: 64·WG rows of W (output columns) by TOK rows of A (tokens).
// 288 tokens are no power of two, but 4608 rows are 16 such tiles, so that 132 processors are busy
// to 97 %, and one tile holds a whole sample: the means of the merge never leave the block. One warp
// loads tiles with the bulk copy engine, WG warpgroups multiply.
//
//   TOK, W_ROWS   tokens and weight rows of a tile
//   WG, NI, NT    warpgroups that multiply, each NI products of 64 weight rows and NT tokens: of its own
//                 rows and all tokens, or, BY_TOKENS, of all rows and its own tokens
//   HELD          whether a warpgroup holds its weights in registers during its products, which then
//                 read them from shared memory once
//   STAGES        steps along K that load at once; KS all steps, of 64; SPLIT  blocks along K
//   CHUNK         tokens that are turned over at once on their way out; SCRATCH  bytes for that and
//                 for sums, after the stages;  SIDE  tokens of a row of the image (EPI 1)
//   WORKER_REGISTERS, LOADER_REGISTERS  of their threads
//   EPI           0 plain; 1 rotation and QK-norm of a head; 2 SwiGLU; 3 merge and RMSNorm; 4 a part
//                 along K in fp32 and its column sums by segment
//   IMG           rows of the image in a sample (EPI 3), TOK being the sample's
//   TYPE          bf16 or f16

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
product(const __grid_constant__ Map map_w, const __grid_constant__ Map map_a, const __grid_constant__ Map map_x,
        char *out, int n_rows, int n_w, int n_tok, int pitch_out,
        const float2 *rotation, int sample_rows, int n_rotated, float eps,
        Gain g_beta, Gain g_alpha, Gain g_leak,
        const int *p_valid, int image, int text, int image_rows,
        const char *p_a, float *p_sum, int width, u64 *p_squares, u32 *p_launches,
        const char *ahead, u64 ahead_bytes, volatile u32 *fault) {
  extern __shared__ __align__(1024) char memory[];
  MARK(0);
  const u32 base = shared(memory);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  char *scratch = memory + STAGES * STAGE + (ALONE ? SCRATCH / WG * group : 0);
  char *staging = EPI == 3 ? memory : scratch;  // EPI 3 has no tile after this one
  const u32 staged = shared(staging);
  [[maybe_unused]] const int worker = ALONE ? threadIdx.x % 128 : threadIdx.x;
  const u32 full = base + STAGES * STAGE + SCRATCH, empty = full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    prefetch(&map_w);
    prefetch(&map_a);
  }
  __syncthreads();
  const int n_tiles = n_w * n_tok * SPLIT;

  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(LOADER_REGISTERS));
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");  // in effect once the others do so too
    if (warp == WARPS && lane == 0) {
      int step = 0;
      for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
        const int i_w = tile / SPLIT / n_tok, row = tile / SPLIT % n_tok * TOK, from = tile % SPLIT * KS;
        const int early = step == 0 ? (STAGES < KS ? STAGES : KS) : 0;  // weights need not wait
        for (int k = 0; k < early; ++k) {
          barrier_expect(full + 8 * k, STAGE);
          load_w(base + k * STAGE, &map_w, full + 8 * k, 64 * (from + k), i_w);
        }
        if (step == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int k = 0; k < KS; ++k, ++step) {
          const int s = step % STAGES;
          const u32 to = base + s * STAGE, bar = full + 8 * s;
          if (step >= STAGES) barrier_wait(empty + 8 * s, (step / STAGES - 1) & 1, fault);
          if (k >= early) {
            barrier_expect(bar, STAGE);
            load_w(to, &map_w, bar, 64 * (from + k), i_w);
          }
          load_a(to + W_BYTES, &map_a, bar, 64 * (from + k), row);
        }
#if EPI == 3  // the trunk comes last, into stages that are free again
        for (int g = 0; g < WG; ++g, ++step) {
          const int s = step % STAGES;
          const u32 to = base + s * STAGE + W_BYTES, bar = full + 8 * s;
          if (step >= STAGES) barrier_wait(empty + 8 * s, (step / STAGES - 1) & 1, fault);
          barrier_expect(bar, A_BYTES);
          load2(to, &map_x, bar, (i_w * WG + g) * 64, row);
          load2(to + TOK / 2 * 128, &map_x, bar, (i_w * WG + g) * 64, row + TOK / 2);
        }
#endif
      }
    }
    if (warp == WARPS + 1 && lane == 0 && ahead) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      fetch_ahead(ahead, ahead_bytes);
    }
    __syncwarp();
#if EPI == 2
    // The other warps add up the columns of A by segment meanwhile, for the merge to come.
    if (warp > WARPS && p_sum) {
      asm volatile("griddepcontrol.wait;" ::: "memory");
      for (int task = blockIdx.x; task < n_rows / sample_rows * (width / SLAB); task += gridDim.x)
        column_sums<96, 6, 2>(task, threadIdx.x - THREADS - 32, p_a, p_sum, (float *)(memory + STAGES * STAGE + SCRATCH + 16 * STAGES),
                           p_valid, image, text, image_rows, sample_rows, width);
    }
#endif
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WORKER_REGISTERS));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    MARK(1);
    [[maybe_unused]] const int lane_row = lane / 4, lane_token = lane % 4 * 2;
#if ALONE && WG > 1  // one goes ahead, so that they do not come to what follows at the same time
    if (group > 0 && blockIdx.x < n_tiles) barrier_wait(full + 8 * (group * ((STAGES < KS ? STAGES : KS) - 1) / (WG - 1)), 0, fault);
#endif
    int step = 0;
    for (int tile = blockIdx.x; tile < n_tiles; tile += gridDim.x) {
      const int i_w = tile / SPLIT / n_tok, row = tile / SPLIT % n_tok * TOK;
#if EPI == 3
      const u32 launch = *(volatile u32 *)(p_launches + row / TOK) / n_w + 1;
#endif
      float acc[NI][NT / 2];
#if HELD
      u32 held[2][4][4];  // of this step, and of the one that is still multiplied
#pragma unroll 2
#endif
      for (int k = 0; k < KS; ++k, ++step) {
        const int s = step % STAGES;
        barrier_wait(full + 8 * s, step / STAGES & 1, fault);
        if (step == 0) MARK(2);
        const u32 w = base + s * STAGE + (BY_TOKENS ? 0 : group * 8192), a = base + s * STAGE + W_BYTES + (BY_TOKENS ? group * NT * 128 : 0);
#pragma unroll
        for (int i = 0; i < NI; ++i)
#pragma unroll
          for (int j = 0; j < NT / 2; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
#if HELD
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
          load_four(w + (warp % 4 * 16 + lane % 16) * 128 + ((kk * 2 + lane / 16) ^ (lane & 7)) * 16, held[k % 2][kk]);
#endif
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
#pragma unroll
          for (int i = 0; i < NI; ++i)
#if HELD
            multiply_held(acc[i], held[k % 2][kk], matrix(a + i * NT * 128) + 2 * kk, k + kk > 0);
#else
            multiply(acc[i], matrix(BY_TOKENS ? w + i * 8192 : w) + 2 * kk, matrix(BY_TOKENS ? a : a + i * NT * 128) + 2 * kk, k + kk > 0);
#endif
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && lane == 0) barrier_arrive(empty + 8 * ((step - 1) % STAGES));
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < NI; ++i)
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
      if (lane == 0) barrier_arrive(empty + 8 * ((step - 1) % STAGES));
      if (step == KS) MARK(3);

      // acc[i][4j + 2h + e]: row lane_row + 8h of the warp's 16, token i·NT + 8j + lane_token + e.
#if EPI == 1
      if (i_w < n_rotated) {  // one or two channels a thread, whose tokens' turns differ by row or by column
        float *sums = (float *)scratch, *scale = sums + (BY_TOKENS ? 4 * NT : WARPS * TOK), squares[HALF_TOKENS] = {};
#pragma unroll
        for (int i = 0; i < NI; ++i) {
          const int slot = BY_TOKENS ? i * 4 + warp % 4 : warp, at = row % sample_rows + (BY_TOKENS ? group : i) * NT;
          turn(acc[i], squares, rotation + slot * 8 + lane_row, slot >= SLOTS / 2, at, image_rows, lane_token);
          if (!BY_TOKENS || i == NI - 1) sum_over_lanes(squares, sums + (BY_TOKENS ? warp % 4 * NT : warp * TOK + i * NT), lane);
          if (!BY_TOKENS)
#pragma unroll
            for (int t = 0; t < HALF_TOKENS; ++t) squares[t] = 0.f;
        }
        workers_sync(group);
        for (int t = worker; t < (BY_TOKENS ? NT : TOK); t += WORKERS) {
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < (BY_TOKENS ? 4 : WARPS); ++w) total += sums[w * (BY_TOKENS ? NT : TOK) + t];
          scale[t] = rsqrtf(total / W_ROWS + eps);
        }
        workers_sync(group);
        scale_tokens(acc, scale, lane_token);
      }
#elif EPI == 2
#pragma unroll
      for (int i = 0; i < NI; ++i)
#pragma unroll
        for (int j = 0; j < NT / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            acc[i][4 * j + e] = silu(acc[i][4 * j + e]) * acc[i][4 * j + 2 + e];
          }
#endif
#if EPI == 3
      {
        float *sums = (float *)(memory + STAGES * STAGE), *scale = sums + WARPS * TOK;
        const int c0 = i_w * 64 * WG + warp * 16 + lane_row;
        const int count = p_valid ? p_valid[row / TOK] : text;
        float beta[2], shift[2][2], sum_f[2][2] = {}, sum_x[2][2] = {};  // [row, segment]
        for (int g = 0; g < WG; ++g) {
          const int s = (step + g) % STAGES;
          barrier_wait(full + 8 * s, (step + g) / STAGES & 1, fault);
        }
        const u32 trunk = base + (step + group) % STAGES * STAGE + W_BYTES;
        const int chunk = warp % 4 * 2 + (lane / 8 & 1);  // 16 bytes; a row of 128 has eight
#pragma unroll
        for (int i = 0; i < NI; ++i)
#pragma unroll
          for (int j = 0; j < NT / 8; ++j) {
            const int block = i * NT + j * 8, seg = block >= IMG, t = block + lane % 8;
            u32 x[2];
            load_transposed(trunk + t * 128 + ((chunk ^ (t & 7)) << 4), x[0], x[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const bool real = !seg || block + lane_token + e - IMG < count;
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                sum_f[h][seg] += real ? acc[i][4 * j + 2 * h + e] : 0.f;
                sum_x[h][seg] += real ? (e ? high_half(x[h]) : low_half(x[h])) : 0.f;
              }
            }
          }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          beta[h] = gain(g_beta, c0 + 8 * h);
          const float alpha = gain(g_alpha, c0 + 8 * h), leak = gain(g_leak, c0 + 8 * h);
#pragma unroll
          for (int seg = 0; seg < 2; ++seg) {
            for (int bit = 1; bit <= 2; bit <<= 1) {
              sum_f[h][seg] += __shfl_xor_sync(~0u, sum_f[h][seg], bit);
              sum_x[h][seg] += __shfl_xor_sync(~0u, sum_x[h][seg], bit);
            }
            const float n = seg ? (float)(count > 1 ? count : 1) : (float)IMG;
            shift[h][seg] = ((alpha - beta[h]) * sum_f[h][seg] - leak * sum_x[h][seg]) / n;
          }
        }
#pragma unroll
        for (int i = 0; i < NI; ++i) {
          float squares[HALF_TOKENS];
#pragma unroll
          for (int j = 0; j < NT / 8; ++j) {
            const int block = i * NT + j * 8, seg = block >= IMG, t = block + lane % 8;
            u32 x[2];
            load_transposed(trunk + t * 128 + ((chunk ^ (t & 7)) << 4), x[0], x[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const bool real = !seg || block + lane_token + e - IMG < count;
              float square = 0.f;
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float old = e ? high_half(x[h]) : low_half(x[h]);
                const float z = real ? old + beta[h] * acc[i][4 * j + 2 * h + e] + shift[h][seg] : 0.f;
                acc[i][4 * j + 2 * h + e] = z;
                square += z * z;
              }
              squares[2 * j + e] = square;
            }
          }
          sum_over_lanes(squares, sums + warp * TOK + i * NT, lane);
        }
        consumers_sync();
        for (int t = threadIdx.x; t < TOK; t += THREADS) {
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) total += sums[w * TOK + t];
          tell(p_squares + i_w * n_rows + row + t, total, launch);
        }
        for (int t = threadIdx.x; t < TOK; t += THREADS)
          scale[t] = rsqrtf(hear(p_squares + row + t, n_w, n_rows, launch, fault) / (n_w * W_ROWS) + eps);
        consumers_sync();
        if (threadIdx.x == 0) atomicAdd(p_launches + row / TOK, 1);  // all of the sample have come, and know the number before
        scale_tokens(acc, scale, lane_token);
      }
#endif

#if EPI == 4
      {
        const int c = i_w * W_ROWS + warp * 16 + lane_row, split = tile % SPLIT, n_tiles_of_sample = sample_rows / TOK;
        const int sample = row / sample_rows, from = row % sample_rows, count = p_valid ? p_valid[sample] : text;
        float sum[2][2] = {}, *to = (float *)(out + (long long)(split * n_rows + row + lane_token) * pitch_out) + c;
#pragma unroll
        for (int i = 0; i < NI; ++i)
#pragma unroll
          for (int j = 0; j < NT / 8; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const int block = from + i * NT + j * 8, t = block + lane_token + e;
              const bool in_text = block >= image_rows, real = in_text ? t - image_rows < count : t < image;
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                const float f = acc[i][4 * j + 2 * h + e];
                *(float *)((char *)(to + 8 * h) + (long long)(i * NT + j * 8 + e) * pitch_out) = f;
                sum[h][0] += real && !in_text ? f : 0.f;
                sum[h][1] += real && in_text ? f : 0.f;
              }
            }
        float *sums = p_sum + (long long)((split * (n_rows / sample_rows) + sample) * n_tiles_of_sample + from / TOK) * 2 * width + c;
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
          for (int seg = 0; seg < 2; ++seg) {
            sum[h][seg] += __shfl_xor_sync(~0u, sum[h][seg], 1);
            sum[h][seg] += __shfl_xor_sync(~0u, sum[h][seg], 2);
            if (lane_token == 0) sums[seg * width + 8 * h] = sum[h][seg];
          }
      }
#else
      // Out through shared memory, turned over: rows of tokens, 16 bytes a thread.
#pragma unroll
      for (int part = 0; part < (BY_TOKENS ? NT : TOK) / CHUNK; ++part) {
        workers_sync(group);
#pragma unroll
        for (int b = 0; b < CHUNK / 8; b += EPI == 2 ? 2 : 1) {
          const int block = part * CHUNK / 8 + b;  // known when this is unrolled
#if EPI == 2
          const float *v = acc[block / (NT / 8)] + 4 * (block % (NT / 8));
          const float *u = acc[(block + 1) / (NT / 8)] + 4 * ((block + 1) % (NT / 8));
          store_transposed(staged + (b * 8 + lane % 16) * PITCH + warp % 4 * 16, pack(v[0], v[1]), pack(u[0], u[1]));
#elif BY_TOKENS
#pragma unroll
          for (int i = 0; i < NI; ++i) {
            const float *v = acc[i] + 4 * block;
            const int column = (lane & 8 ? W_ROWS / 2 : 0) + i * 32 + warp % 4 * 8;
            store_transposed(staged + (b * 8 + lane % 8) * PITCH + 2 * column, pack(v[0], v[1]), pack(v[2], v[3]));
          }
#else
          const float *v = acc[block / (NT / 8)] + 4 * (block % (NT / 8));
          const int column = EPI == 1 ? warp * 8 + (lane & 8 ? W_ROWS / 2 : 0) : warp * 16 + (lane & 8);
          store_transposed(staged + (b * 8 + lane % 8) * PITCH + 2 * column, pack(v[0], v[1]), pack(v[2], v[3]));
#endif
        }
        workers_sync(group);
        char *to = out + (i_w * COLUMNS + (EPI == 2 ? group * COLUMNS_OUT : 0)) * 2;
        const int first = row + (BY_TOKENS ? group * NT : 0) + part * CHUNK;
        for (int c = worker; c < CHUNK * (COLUMNS_OUT / 8); c += WORKERS) {
          const int t = c / (COLUMNS_OUT / 8), piece = c % (COLUMNS_OUT / 8);
          if (first + t < n_rows)
            *(Quad *)(to + (long long)(first + t) * pitch_out + piece * 16) = *(const Quad *)(staging + t * PITCH + piece * 16);
        }
      }
      workers_sync(group);
#endif
      if (step == KS) MARK(4);
    }
    MARK(5);
  }
}
