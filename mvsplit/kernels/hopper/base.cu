// What every kernel for Hopper needs: the barriers that bulk copies report to, and pairs of half precision
// numbers, of the type that TYPE and BF16 name.

typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;
struct alignas(16) Quad { u32 x, y, z, w; };

__device__ __forceinline__ u32 shared(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void barrier_init(u32 bar, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ __forceinline__ void barrier_expect(u32 bar, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// A number that all lanes of a warp have, which the compiler is told by this: descriptors of wgmma that come of it are
// made in uniform registers, where else each is moved there from a lane before its product can begin.
__device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(~0u, x, 0); }

__device__ __forceinline__ u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

__device__ __forceinline__ u32 pack(float low, float high) {
  u32 both;
  asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

__device__ __forceinline__ float low_half(u32 both) {
#if BF16
  return __uint_as_float(both << 16);
#else
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(both));
  return x;
#endif
}

__device__ __forceinline__ float high_half(u32 both) {
#if BF16
  return __uint_as_float(both & 0xFFFF0000u);
#else
  float x;
  asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(both));
  return x;
#endif
}
