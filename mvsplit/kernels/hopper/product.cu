// Y = A·Wᵀ for many rows on Hopper, with what follows it fused in. Compiled at run time,
// one kernel for each set of the macros below; `multiply`, around wgmma, is written by product.py.
//
// A block computes the transposed tile: 64·WG rows of W (output columns) by TOK rows of A (tokens).
// 288 tokens are no power of two, but 4608 rows are 16 such tiles, so that 132 processors are busy
// to 97 %, and one tile holds a whole sample: the means of the merge never leave the block. One warp
// loads tiles with the bulk copy engine, WG warpgroups multiply. Blocks of a cluster share the
// tokens: each loads a part and sends it to all.
//
//   TOK, NI, NT   tokens of a tile; products along them, of NT = TOK / NI tokens
//   WG            warpgroups that multiply, 64 weight rows each
//   CLUSTER       blocks that share tokens; LOADERS of them load a step, by turns
//   STAGES        steps along K that load at once; KS all steps, of 64
//   CHUNK         tokens that are turned over at once on their way out; SCRATCH  bytes for that and
//                 for sums, after the stages;  TURN  bytes of a staged row of the rotation's table
//   EPI           0 plain; 1 rotation and QK-norm of a head; 2 SwiGLU; 3 merge and RMSNorm
//   IMG           rows of the image in a sample (EPI 3), TOK being the sample's
//   TYPE          bf16 or f16

extern "C" __global__ void __launch_bounds__(THREADS + 128, 1)
product(const __grid_constant__ Map map_w, const __grid_constant__ Map map_a, const __grid_constant__ Map map_x,
        char *out, int n_rows, int n_w, int n_tok, int pitch_out,
        const float4 *rotation, int sample_rows, int n_rotated, float eps,
        Gain g_beta, Gain g_alpha, Gain g_leak,
        const int *p_valid, int image, int text, int image_rows,
        int products, const char *p_a, float *p_sum, int width, float *p_squares, u32 *p_arrived) {
  extern __shared__ __align__(1024) char memory[];
  const u32 base = shared(memory);
  char *staging = memory + (EPI == 3 ? 0 : STAGES * STAGE);  // EPI 3 has no tile after this one
  const u32 staged = shared(staging);
  float *sums = (float *)(memory + STAGES * STAGE);  // [WARPS, TOK]
  float *scale = sums + WARPS * TOK;                 // [TOK]
  const u32 full = base + STAGES * STAGE + SCRATCH, empty = full + 8 * STAGES;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 rank = 0;
#if CLUSTER > 1
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  if (threadIdx.x == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + 8 * s, 1);
      barrier_init(empty + 8 * s, WARPS * CLUSTER);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  cluster_start();
  const int cluster = blockIdx.x / CLUSTER, clusters = products;
  const int n_tiles = cluster < products ? n_w / CLUSTER * n_tok : 0;

  if (warp >= WARPS) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (warp == WARPS && lane == 0) {
      int step = 0;
      for (int tile = cluster; tile < n_tiles; tile += clusters) {
        const int i_w = tile / n_tok * CLUSTER + rank, row = tile % n_tok * TOK;
        const int early = step == 0 ? (STAGES < KS ? STAGES : KS) : 0;  // weights need not wait
        for (int k = 0; k < early; ++k) {
          barrier_expect(full + 8 * k, STAGE);
          load_w(base + k * STAGE, &map_w, full + 8 * k, 64 * k, i_w);
        }
        if (step == 0) asm volatile("griddepcontrol.wait;" ::: "memory");
        for (int k = 0; k < KS; ++k, ++step) {
          const int s = step % STAGES;
          const u32 to = base + s * STAGE, bar = full + 8 * s;
          if (step >= STAGES) barrier_wait(empty + 8 * s, (step / STAGES - 1) & 1);
          if (k >= early) {
            barrier_expect(bar, STAGE);
            load_w(to, &map_w, bar, 64 * k, i_w);
          }
          load_a(to + W_BYTES, &map_a, bar, step, 64 * k, row, rank);
        }
#if EPI == 1  // the rotation's table, row by row; a tile begins where a sample's tile does
        if (i_w < n_rotated)
          for (int p = 0; p < SLOTS; ++p, ++step) {
            const int s = step % STAGES;
            if (step >= STAGES) barrier_wait(empty + 8 * s, (step / STAGES - 1) & 1);
            barrier_expect(full + 8 * s, 16 * 8 * TOK);
            for (int c = 0; c < 16; ++c)
              asm volatile(
                  "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
                      "r"(base + s * STAGE + c * TURN),
                  "l"(rotation + (p * 16 + c) * (sample_rows / 2) + row % sample_rows / 2), "r"(8 * TOK),
                  "r"(full + 8 * s) : "memory");
          }
#endif
#if EPI == 3  // the trunk comes last, into stages that are free again
        for (int g = 0; g < WG; ++g, ++step) {
          const int s = step % STAGES;
          const u32 to = base + s * STAGE + W_BYTES, bar = full + 8 * s;
          if (step >= STAGES) barrier_wait(empty + 8 * s, (step / STAGES - 1) & 1);
          barrier_expect(bar, A_BYTES);
          load2(to, &map_x, bar, (i_w * WG + g) * 64, row);
          load2(to + TOK / 2 * 128, &map_x, bar, (i_w * WG + g) * 64, row + TOK / 2);
        }
#endif
      }
#if CLUSTER > 1  // nobody's shared memory goes while another block still signals it
      const int released = EPI == 3 ? KS : step;
      for (int q = released > STAGES ? released - STAGES : 0; q < released; ++q)
        barrier_wait(empty + 8 * (q % STAGES), q / STAGES & 1);
#endif
    }
    __syncwarp();
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(WG == 2 ? 240 : 160));
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    const int group = warp / 4, lane_row = lane / 4, lane_token = lane % 4 * 2;
    int step = 0;
    for (int tile = cluster; tile < n_tiles; tile += clusters) {
      const int i_w = tile / n_tok * CLUSTER + rank, row = tile % n_tok * TOK;
      float acc[NI][NT / 2];
      for (int k = 0; k < KS; ++k, ++step) {
        const int s = step % STAGES;
        barrier_wait(full + 8 * s, step / STAGES & 1);
        const u64 w = matrix(base + s * STAGE + group * 8192);
#pragma unroll
        for (int i = 0; i < NI; ++i)
#pragma unroll
          for (int j = 0; j < NT / 2; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int kk = 0; kk < 4; ++kk)
#pragma unroll
          for (int i = 0; i < NI; ++i)
            multiply(acc[i], w + 2 * kk, matrix(base + s * STAGE + W_BYTES + i * NT * 128) + 2 * kk, k + kk > 0);
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
        if (k > 0 && lane < CLUSTER) barrier_arrive_at(empty + 8 * ((step - 1) % STAGES), lane);
      }
      asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
      for (int i = 0; i < NI; ++i)
#pragma unroll
        for (int j = 0; j < NT / 2; ++j) asm volatile("" : "+f"(acc[i][j])::"memory");
      if (lane < CLUSTER) barrier_arrive_at(empty + 8 * ((step - 1) % STAGES), lane);

      // acc[i][4j + 2h + e]: row lane_row + 8h of the warp's 16, token i·NT + 8j + lane_token + e.
#if EPI == 1
      if (i_w < n_rotated) {
        for (int p = 0; p < SLOTS; ++p, ++step) {
          const int s = step % STAGES;
          barrier_wait(full + 8 * s, step / STAGES & 1);
          if (p == warp / 2) {
            const float4 *table = (const float4 *)(memory + s * STAGE + (warp % 2 * 8 + lane_row) * TURN) + lane % 4;
#pragma unroll
            for (int i = 0; i < NI; ++i) {
              float squares[HALF_TOKENS];
#pragma unroll
              for (int j = 0; j < NT / 8; ++j) {
                const float4 turn = table[i * NT / 2 + j * 4];
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                  const float c = e ? turn.z : turn.x, s = e ? turn.w : turn.y;
                  const float x1 = acc[i][4 * j + e], x2 = acc[i][4 * j + 2 + e];
                  const float y1 = x1 * c + x2 * s, y2 = x2 * c - x1 * s;
                  acc[i][4 * j + e] = y1;
                  acc[i][4 * j + 2 + e] = y2;
                  squares[2 * j + e] = y1 * y1 + y2 * y2;
                }
              }
              sum_over_lanes(squares, sums + warp * TOK + i * NT, lane);
            }
          }
          __syncwarp();
          if (lane < CLUSTER) barrier_arrive_at(empty + 8 * s, lane);
        }
        consumers_sync();
        for (int t = threadIdx.x; t < TOK; t += THREADS) {
          float total = 0.f;
#pragma unroll
          for (int w = 0; w < WARPS; ++w) total += sums[w * TOK + t];
          scale[t] = rsqrtf(total / (64 * WG) + eps);
        }
        consumers_sync();
        scale_tokens(acc, scale, lane_token);
      }
      const int first = warp * 8, second = 32 * WG + warp * 8;
#elif EPI == 2
#pragma unroll
      for (int i = 0; i < NI; ++i)
#pragma unroll
        for (int j = 0; j < NT / 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float g = acc[i][4 * j + e];
            acc[i][4 * j + e] = __fdividef(g, 1.f + __expf(-g)) * acc[i][4 * j + 2 + e];
          }
#else
      const int first = warp * 16, second = warp * 16 + 8;
#endif
#if EPI == 3
      {
        const int c0 = i_w * 64 * WG + warp * 16 + lane_row;
        const int count = p_valid ? p_valid[row / TOK] : text;
        float beta[2], shift[2][2], sum_f[2][2] = {}, sum_x[2][2] = {};  // [row, segment]
        for (int g = 0; g < WG; ++g) {
          const int s = (step + g) % STAGES;
          barrier_wait(full + 8 * s, (step + g) / STAGES & 1);
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
          __stcg(p_squares + i_w * n_rows + row + t, total);
        }
        __threadfence();
        consumers_sync();
        if (threadIdx.x == 0) sums[0] = meet(p_arrived + row / TOK, n_w);
        consumers_sync();
        for (int t = threadIdx.x; t < TOK; t += THREADS) {
          float total = sums[0];
          for (int c = 0; c < n_w; ++c) total += __ldcg(p_squares + c * n_rows + row + t);
          scale[t] = rsqrtf(total / (n_w * 64 * WG) + eps);
        }
        consumers_sync();
        scale_tokens(acc, scale, lane_token);
      }
#endif

      // Out through shared memory, turned over: rows of tokens, 16 bytes a thread.
#pragma unroll
      for (int part = 0; part < TOK / CHUNK; ++part) {
        const int i = part * CHUNK / NT, from = part * CHUNK % NT / 8;  // known when this is unrolled
        consumers_sync();
#if EPI == 2
#pragma unroll
        for (int b = 0; b < CHUNK / 8; b += 2) {
          const u32 at = staged + ((b + (lane / 8 & 1)) * 8 + lane % 8) * PITCH + warp * 16;
          const float *v = acc[i] + 4 * (from + b);
          store_transposed(at, pack(v[0], v[1]), pack(v[4], v[5]));
        }
#else
#pragma unroll
        for (int b = 0; b < CHUNK / 8; ++b) {
          const u32 at = staged + (b * 8 + lane % 8) * PITCH + 2 * (lane & 8 ? second : first);
          const float *v = acc[i] + 4 * (from + b);
          store_transposed(at, pack(v[0], v[1]), pack(v[2], v[3]));
        }
#endif
        consumers_sync();
        for (int c = threadIdx.x; c < CHUNK * (COLUMNS / 8); c += THREADS) {
          const int t = c / (COLUMNS / 8), piece = c % (COLUMNS / 8), to = row + part * CHUNK + t;
          if (to < n_rows)
            *(Quad *)(out + (long long)to * pitch_out + (i_w * COLUMNS + piece * 8) * 2) =
                *(const Quad *)(staging + t * PITCH + piece * 16);
        }
      }
      consumers_sync();
    }
#if EPI == 2
    // Clusters beyond those that multiply add up the columns of A by segment, for the merge to come.
    const int helpers = gridDim.x - products * CLUSTER, slabs = width / 64;
    for (int task = blockIdx.x - products * CLUSTER; cluster >= products && task < slabs * 2 * (n_rows / sample_rows);
         task += helpers) {
      const int sample = task / slabs / 2, in_text = task / slabs % 2, chunk = threadIdx.x % 8;
      const int count = in_text ? (p_valid ? p_valid[sample] : text) : image;
      const char *from = p_a + (long long)(sample * sample_rows + in_text * image_rows) * width * 2 + (task % slabs * 64 + chunk * 8) * 2;
      float total[8] = {};
      for (int t = threadIdx.x / 8; t < count; t += THREADS / 8) {
        const Quad q = *(const Quad *)(from + (long long)t * width * 2);
        const u32 both[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          total[2 * i] += low_half(both[i]);
          total[2 * i + 1] += high_half(both[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        total[i] += __shfl_xor_sync(~0u, total[i], 8);
        total[i] += __shfl_xor_sync(~0u, total[i], 16);
        if (lane < 8) sums[warp * 64 + lane * 8 + i] = total[i];
      }
      consumers_sync();
      if (threadIdx.x < 64) {
        float all = 0.f;
        for (int w = 0; w < WARPS; ++w) all += sums[w * 64 + threadIdx.x];
        p_sum[(sample * 2 + in_text) * width + task % slabs * 64 + threadIdx.x] = all;
      }
      consumers_sync();
    }
#endif
  }
}
