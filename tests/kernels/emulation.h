// CUDA C++ on a CPU: every thread of every block is a fiber, they run by turns, and what several threads
// do together (a warp's matrices, barriers) happens when the last of them has come. Copies are done one after
// the other, long after they were asked for, and wgmma when it is waited for, of what its operands hold then: where
// such a wait is missing, or an operand is written too early, other numbers come out. Copies to memory are done when
// they are waited for, of what is there then. A wait that never ends is seen too.
// Included before a translated source (emulation.py); what is behind these names is compiled once (emulation.cpp).
#pragma once
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>

#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define exp2 exp2_of_the_source
typedef unsigned int Word;
typedef unsigned long long Long;
struct float2 { float x, y; };
struct Place { int x; };
extern Place threadIdx, blockIdx, gridDim;
extern long progress;
extern Long clock_ticks;  // in nanoseconds: a second for each look at it

// Runs `call` as every thread of `grid` blocks; 1 if they wait for each other for ever.
int run_all(int grid, int threads, int shared, int cluster, void (*call)());
void fail(const char *what);
void yield();
char *memory_of_block();

// Threads that wait for each other
void meet(int barrier, int n);
void __syncthreads();
void meet_cluster();
void __syncwarp();
float __shfl_xor_sync(Word, float value, int mask);
Word __shfl_xor_sync(Word all, Word value, int mask);
Word __shfl_sync(Word, Word value, int);  // of numbers that are the same in all lanes

// Barriers of shared memory
void barrier_begin(Word bar, Word count);
void barrier_expects(Word bar, Word bytes);
void barrier_arrives(Word bar);
void barrier_arrives_in(Word bar, Word rank);  // in another block of the cluster
Word barrier_tries(Word bar, Word parity);

// Copies, whose shared memory is swizzled by 128 bytes
void copy(Word to, const void *map, Word bar, std::initializer_list<int> from, int blocks_of_cluster = 0);
void copy_out(const void *map, Word from, std::initializer_list<int> to);
void copies_out_commit();
void copies_out_wait(int left);  // for all groups but the last ones

// Matrices: of 8×8 that a warp loads and stores, and products of a warpgroup
void store_matrices(int n, bool turned, Word address, const std::initializer_list<Word> values);
Word *load_matrices(int n, bool turned, Word address);
void multiply_together(int n, bool transposed, float *d, Long a, const Word *held, Long b, int add);
void products_commit();
void products_wait(int left);  // for all groups but the last ones

static Long __cvta_generic_to_shared(const void *p) { return (const char *)p - memory_of_block(); }
static Word rounded(float f) {  // to bf16
  Word w;
  memcpy(&w, &f, 4);
  return (w & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (w + 0x7FFF + (w >> 16 & 1)) >> 16;
}
static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static float __fdividef(float a, float b) { return a / b; }
template <class T> static T __ldg(const T *p) { return *p; }
static Word __float_as_uint(float f) { Word w; memcpy(&w, &f, 4); return w; }
static float __uint_as_float(Word w) { float f; memcpy(&f, &w, 4); return f; }
static float __int_as_float(int i) { return __uint_as_float((Word)i); }
static Word atomicAdd(Word *p, Word n) { const Word old = *p; *p += n; ++progress; return old; }
static Long min(Long a, Long b) { return a < b ? a : b; }
