// What the kernels of attention have in common. A matrix of rows of 128 channels lies in shared memory as
// channels 0 … 63 of all rows and `half` bytes behind them the others, swizzled by 128 bytes.

#define HEAD 128

struct Keys { int image, image_rows, text; };  // real ones; rows of the image, padding included

__device__ __forceinline__ void load4(u32 to, const Map *map, u32 bar, int channel, int row, int head, int sample) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(to), "l"(map), "r"(bar), "r"(channel), "r"(row), "r"(head),
      "r"(sample) : "memory");
}

__device__ __forceinline__ u64 values(u32 address, u32 half) {  // as they lie: channels run fastest
  return (u64)((address & 0x3FFFF) >> 4) | ((u64)(half >> 4) << 16) | (64ull << 32) | (1ull << 62);
}

__device__ __forceinline__ void store_four(u32 address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

template <int N> __device__ __forceinline__ void products_sync() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

template <int N> __device__ __forceinline__ void in_flight(float (&v)[N]) {  // not to be moved past here
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

template <int N> __device__ __forceinline__ void in_flight(u32 (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(v[i])::"memory");
}

// exp of a part of the scores, whose keys are those from `first` on: rows lane / 4 and 8 below it, as wgmma takes
// its left operand; `sum` grows. Keys that are none, if it may hold any, count as nothing.
template <bool ANY, int N>
__device__ __forceinline__ void exponentials_of(u32 (&p)[N / 2], float (&sum)[2], const float (&s)[N], float scale, int first, int lane,
                                             const Keys &keys) {
#pragma unroll
  for (int j = 0; j < N / 4; ++j)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float y[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        y[e] = exp2(s[4 * j + 2 * h + e] * scale);
        const int t = first + j * 8 + lane % 4 * 2 + e;
        if (ANY && t >= keys.image && (t < keys.image_rows || t - keys.image_rows >= keys.text)) y[e] = 0.f;
        sum[h] += y[e];
      }
      p[2 * j + h] = pack(y[0], y[1]);
    }
}

__device__ __forceinline__ float log2_of(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

template <int N>
__device__ __forceinline__ void exponentials(u32 (&p)[N / 2], float (&sum)[2], const float (&s)[N], float scale, int first, int lane,
                                             const Keys &keys) {
  const int end = first + 2 * N, text = first - keys.image_rows;
  if (MASKED && end > keys.image && (text < 0 || text + 2 * N > keys.text))
    exponentials_of<true>(p, sum, s, scale, first, lane, keys);
  else
    exponentials_of<false>(p, sum, s, scale, first, lane, keys);
}

// A warp's 16 rows of a head, times a factor for each of a thread's two rows, to memory through those from `first`
// on of a matrix that nobody reads any more.
__device__ __forceinline__ void write_head(const float (&o)[HEAD / 2], const float (&factor)[2], int first, u32 matrix, const char *place, int half,
                                           char *to, int pitch_out, int lane) {
#pragma unroll
  for (int j = 0; j < HEAD / 8; j += 2) {
    const int row = first + lane % 16, chunk = j + lane / 16;
    const float *w = o + 4 * j;
    store_four(matrix + chunk / 8 * half + row * 128 + ((chunk ^ row) % 8 << 4), pack(w[0] * factor[0], w[1] * factor[0]),
               pack(w[2] * factor[1], w[3] * factor[1]), pack(w[4] * factor[0], w[5] * factor[0]), pack(w[6] * factor[1], w[7] * factor[1]));
  }
  __syncwarp();
#pragma unroll
  for (int piece = lane; piece < 16 * 16; piece += 32) {
    const int r = piece / 16, chunk = piece % 16, row = first + r;
    *(Quad *)(to + (long long)r * pitch_out + chunk * 16) =
        *(const Quad *)(place + chunk / 8 * half + row * 128 + ((chunk ^ row) % 8 << 4));
  }
}
