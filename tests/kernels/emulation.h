// CUDA C++ on a CPU: every thread of every block is a fiber, they run by turns, and what several threads
// do together (a warp's matrices, barriers) happens when the last of them has come. Copies are done one after
// the other, long after they were asked for, and wgmma when it is waited for, of what its operands hold then: where
// such a wait is missing, or an operand is written too early, other numbers come out. Copies to memory are done when
// they are waited for, of what is there then. A wait that never ends is seen too.
// Included before a translated source (emulation.py).
#include <math.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <initializer_list>
#include <map>
#include <vector>

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
static Place threadIdx, blockIdx, gridDim;

struct Tensor { char *data; int rank; long sizes[5], strides[5]; int box[5]; };  // strides in bytes
struct Barrier { int count, pending; long bytes; int phase; };
struct Together {  // what threads hand in and get back
  int come, turn, add;
  Word address[128], in[128][4], out[128][4];
  float number[128], numbers[128], *d[128];
  const Word *held[128];
  Long a, b;
};
struct Product { int n; bool transposed; Together g; };  // of a warpgroup, not yet done
struct Block {
  char *memory;
  std::map<Word, Barrier> barriers;
  std::map<int, Together> met;
  std::map<int, std::deque<std::vector<Product>>> products;  // by warpgroup: groups, the last still open
  int threads, last_copy;
};
struct Copy { int block, due; Word to, bar; const Tensor *tensor; std::vector<int> from; };
struct Store { Word from; const Tensor *tensor; std::vector<int> to; };
struct Fiber {
  ucontext_t context;
  int thread, block;
  bool ended;
  char *stack;
  std::deque<std::vector<Store>> stores;  // not yet done: groups, the last still open
};
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static std::vector<Copy> copies;  // not yet done
static int turns, cluster_size;
static Fiber *now;
static ucontext_t scheduler;
static long progress;
static Long clock;  // in nanoseconds: a second for each look at it

static void fail(const char *what) { fprintf(stderr, "%s, thread %d of block %d\n", what, threadIdx.x, blockIdx.x); abort(); }
static void yield() { swapcontext(&now->context, &scheduler); }
static Block &block() { return blocks[now->block]; }
static char *at(Word address) { return block().memory + address; }
static Long __cvta_generic_to_shared(const void *p) { return (const char *)p - block().memory; }

// `n` threads hand in; the last does the work.
template <class In, class Work> static Together &together(int key, int n, In in, Work work) {
  Together &t = block().met[key];
  in(t);
  const int turn = t.turn;
  if (++t.come == n) { work(t); t.come = 0; ++t.turn; ++progress; }
  while (t.turn == turn) yield();
  return t;
}
static void meet(int barrier, int n) { together(barrier, n, [](Together &) {}, [](Together &) {}); }
static void __syncthreads() { meet(0, block().threads); }
static int first_of_cluster() { return now->block / cluster_size * cluster_size; }
static void meet_cluster() {
  Together &t = blocks[first_of_cluster()].met[-1];
  const int turn = t.turn;
  if (++t.come == block().threads * cluster_size) { t.come = 0; ++t.turn; ++progress; }
  while (t.turn == turn) yield();
}
static int lane() { return threadIdx.x % 32; }
static int warp_key() { return 100 + threadIdx.x / 32; }
static void __syncwarp() { meet(warp_key(), 32); }
static float __shfl_xor_sync(Word, float value, int mask) {
  const int l = lane();
  Together &t = together(warp_key(), 32, [&](Together &t) { t.number[l] = value; },
                         [](Together &t) { memcpy(t.numbers, t.number, sizeof t.number); });
  return t.numbers[l ^ mask];
}

static Word __shfl_xor_sync(Word all, Word value, int mask) {
  float bits;
  memcpy(&bits, &value, 4);
  bits = __shfl_xor_sync(all, bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}

static Word __shfl_sync(Word, Word value, int) {  // of numbers that are the same in all lanes
  const int l = lane();
  together(warp_key(), 32, [&](Together &t) { t.address[l] = value; }, [](Together &t) {
    for (int i = 1; i < 32; ++i) if (t.address[i] != t.address[0]) fail("lanes differ in what is uniform");
  });
  return value;
}

// Barriers of shared memory
static void settle(Barrier &b) {
  ++progress;
  if (b.pending < 0) fail("more arrivals than a barrier expects");
  if (b.pending == 0 && b.bytes == 0) { ++b.phase; b.pending = b.count; }
}
static const Long MARK_OF_BARRIER = 0x5AFE5AFE5AFE5AFEull;
static Barrier &barrier(Word bar) {
  if (memcmp(at(bar), &MARK_OF_BARRIER, 8)) fail("something was written where a barrier lies");
  return block().barriers.at(bar);
}
static void barrier_begin(Word bar, Word count) {
  block().barriers[bar] = Barrier{(int)count, (int)count, 0, 0};
  memcpy(at(bar), &MARK_OF_BARRIER, 8);
}
static void barrier_expects(Word bar, Word bytes) { Barrier &b = barrier(bar); b.bytes += bytes; --b.pending; settle(b); }
static void barrier_arrives(Word bar) { Barrier &b = barrier(bar); --b.pending; settle(b); }
static void barrier_arrives_in(Word bar, Word rank) {  // in another block of the cluster
  Fiber *me = now;
  now = &fibers[(size_t)(first_of_cluster() + rank) * block().threads];
  if (now->ended) fail("an arrival in a block that has ended");
  barrier_arrives(bar);
  now = me;
}
static Word barrier_tries(Word bar, Word parity) {
  if ((Word)(barrier(bar).phase & 1) != parity) return 1;
  yield();
  return 0;
}

// Memory that is swizzled by 128 bytes
static Word swizzled(Word address) { return address ^ ((address >> 7 & 7) << 4); }
static void copy(Word to, const void *map, Word bar, std::initializer_list<int> from, int blocks_of_cluster = 0) {
  if (to % 1024) fail("a copy to where no swizzled tile begins");
  int &last = block().last_copy;  // one after the other, slowly
  last = (last > turns ? last : turns) + 40;
  const Tensor *tensor = *(const Tensor *const *)map;
  if (!blocks_of_cluster) copies.push_back({now->block, last, to, bar, tensor, from});
  for (int i = 0; blocks_of_cluster >> i; ++i)
    if (blocks_of_cluster >> i & 1) copies.push_back({first_of_cluster() + i, last + 40 * i, to, bar, tensor, from});
  ++progress;
}
// The elements of a box: how far each lies in shared memory, and in the tensor, or null outside of it.
template <class Work> static long each_of_box(const Tensor &t, const std::vector<int> &from, Work work) {
  long count = 1;
  for (int i = 0; i < t.rank; ++i) count *= t.box[i];
  for (long n = 0; n < count; ++n) {
    bool inside = true;
    long rest = n, offset = 0;
    for (int i = 0; i < t.rank; rest /= t.box[i++]) {
      const long place = from[i] + rest % t.box[i];
      inside = inside && place >= 0 && place < t.sizes[i];
      offset += place * t.strides[i];
    }
    work(2 * n, inside ? (unsigned short *)(t.data + offset) : nullptr);
  }
  return count;
}
static void do_copy(const Copy &c) {
  const long count = each_of_box(*c.tensor, c.from, [&](long place, unsigned short *of) {
    *(unsigned short *)at(swizzled(c.to + place)) = of ? *of : 0;
  });
  Barrier &b = block().barriers.at(c.bar);
  b.bytes -= 2 * count;
  settle(b);
}
static void copy_out(const void *map, Word from, std::initializer_list<int> to) {
  if (from % 1024) fail("a copy from where no swizzled tile begins");
  if (now->stores.empty()) now->stores.emplace_back();
  now->stores.back().push_back({from, *(const Tensor *const *)map, to});
}
static void copies_out_commit() { now->stores.emplace_back(); }
static void copies_out_wait(int left) {  // for all groups but the last ones
  for (; (int)now->stores.size() > left + 1; now->stores.pop_front())
    for (const Store &s : now->stores.front())
      each_of_box(*s.tensor, s.to, [&](long place, unsigned short *to) {
        if (to) *to = *(unsigned short *)at(swizzled(s.from + place));
      });
}
static void do_copies() {  // those whose turn it is
  std::vector<Copy> all;
  all.swap(copies);
  for (const Copy &c : all)
    if (c.due > turns) copies.push_back(c);
    else now = &fibers[(size_t)c.block * blocks[c.block].threads], do_copy(c);
  progress += copies.size();
}

// Matrices of 8×8 that a warp loads and stores
static void store_matrices(int n, bool turned, Word address, const std::initializer_list<Word> values) {
  const int l = lane();
  if (address % 16) fail("a row of a matrix that does not begin at 16 bytes");
  together(warp_key(), 32, [&](Together &t) { t.address[l] = address; memcpy(t.in[l], values.begin(), 4 * n); },
           [=](Together &t) {
             for (int m = 0; m < n; ++m)
               for (int r = 0; r < 8; ++r)
                 for (int c = 0; c < 8; ++c) {
                   const int row = turned ? c : r, column = turned ? r : c;
                   *(unsigned short *)(at(t.address[8 * m + r]) + 2 * c) = t.in[row * 4 + column / 2][m] >> column % 2 * 16;
                 }
           });
}
static Word *load_matrices(int n, bool turned, Word address) {
  const int l = lane();
  if (address % 16) fail("a row of a matrix that does not begin at 16 bytes");
  Together &t = together(warp_key(), 32, [&](Together &t) { t.address[l] = address; }, [=](Together &t) {
    memset(t.out, 0, sizeof t.out);
    for (int m = 0; m < n; ++m)
      for (int r = 0; r < 8; ++r)
        for (int c = 0; c < 8; ++c) {
          const int row = turned ? c : r, column = turned ? r : c;
          t.out[row * 4 + column / 2][m] |= (Word) * (unsigned short *)(at(t.address[8 * m + r]) + 2 * c) << column % 2 * 16;
        }
  });
  return t.out[l];
}

static float number(unsigned short half) { const Word w = (Word)half << 16; float f; memcpy(&f, &w, 4); return f; }
static Word rounded(float f) {  // to bf16
  Word w;
  memcpy(&w, &f, 4);
  return (w & 0x7FFFFFFF) > 0x7F800000 ? 0x7FFF : (w + 0x7FFF + (w >> 16 & 1)) >> 16;
}

// Element (row, k) of a matrix whose rows are 128 bytes apart, or (k, row) where channels run fastest.
static float element(Long descriptor, int row, int k, bool transposed) {
  const Word start = (descriptor & 0x3FFF) << 4, leading = (descriptor >> 16 & 0x3FFF) << 4;
  if (transposed) return number(*(unsigned short *)at(swizzled(start + row / 64 * leading + k * 128 + row % 64 * 2)));
  return number(*(unsigned short *)at(swizzled(start / 128 * 128 + row * 128 + start % 128 + 2 * k)));
}
static void do_product(const Product &p) {
  const Together &g = p.g;
  float left[64][16], right[256][16];
  for (int m = 0; m < 64; ++m)
    for (int k = 0; k < 16; ++k) {
      const int thread = m / 16 * 32 + m % 8 * 4 + k % 8 / 2, place = m % 16 / 8 + k / 8 * 2;
      left[m][k] = g.held[0] ? number(g.held[thread][place] >> k % 2 * 16) : element(g.a, m, k, false);
    }
  for (int n = 0; n < p.n; ++n)
    for (int k = 0; k < 16; ++k) right[n][k] = element(g.b, n, k, p.transposed);
  for (int m = 0; m < 64; ++m)
    for (int n = 0; n < p.n; ++n) {
      float &y = g.d[m / 16 * 32 + m % 8 * 4 + n % 8 / 2][n / 8 * 4 + m % 16 / 8 * 2 + n % 2];
      float sum = g.add ? y : 0.f;
      for (int k = 0; k < 16; ++k) sum += left[m][k] * right[n][k];
      y = sum;
    }
}
static int warpgroup() { return threadIdx.x / 128; }
static std::deque<std::vector<Product>> &products() { return block().products[warpgroup()]; }
template <int N, bool TRANSPOSED> static void multiply_together(float *d, Long a, const Word *held, Long b, int add) {
  const int t = threadIdx.x % 128;
  together(200 + warpgroup(), 128,
           [&](Together &g) { g.d[t] = d; g.a = a; g.held[t] = held; g.b = b; g.add = add; }, [](Together &g) {
             if (products().empty()) products().emplace_back();
             products().back().push_back({N, TRANSPOSED, g});
           });
}
static void products_commit() {
  together(200 + warpgroup(), 128, [](Together &) {}, [](Together &) { products().emplace_back(); });
}
static void products_wait(int left) {  // for all groups but the last ones
  together(200 + warpgroup(), 128, [](Together &) {}, [=](Together &) {
    for (; (int)products().size() > left + 1; products().pop_front())
      for (const Product &p : products().front()) do_product(p);
  });
}

static float rsqrtf(float x) { return 1.f / sqrtf(x); }
static float __fdividef(float a, float b) { return a / b; }
template <class T> static T __ldg(const T *p) { return *p; }
static Word __float_as_uint(float f) { Word w; memcpy(&w, &f, 4); return w; }
static float __uint_as_float(Word w) { float f; memcpy(&f, &w, 4); return f; }
static float __int_as_float(int i) { return __uint_as_float((Word)i); }
static Word atomicAdd(Word *p, Word n) { const Word old = *p; *p += n; ++progress; return old; }
static Long min(Long a, Long b) { return a < b ? a : b; }

// Every other turn or so of a warp, so that warps come to a place in any order.
static bool rests(const Fiber &f) {
  Word mixed = (Word)turns * 2654435761u ^ (Word)(f.block * 64 + f.thread / 32) * 2246822519u;
  mixed = (mixed ^ mixed >> 15) * 2246822519u;
  return mixed >> 16 & 1;
}

// Runs `call` as every thread of `grid` blocks; 1 if they wait for each other for ever.
const int BEHIND = 1024;  // bytes behind a block's memory, in which nothing is to be written
static int run_all(int grid, int threads, int shared, void (*call)()) {
  copies.clear(), turns = 0;
  blocks.assign(grid, Block{});
  fibers.assign((size_t)grid * threads, Fiber{});
  gridDim.x = grid;
  for (auto &b : blocks) {
    b.threads = threads;
    b.memory = (char *)aligned_alloc(1024, (shared + BEHIND + 1023) / 1024 * 1024);
    memset(b.memory, 0xFF, shared + BEHIND);  // NaN
  }
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber &f = fibers[i];
    f.block = i / threads, f.thread = i % threads, f.stack = (char *)malloc(65536);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = 65536, f.context.uc_link = &scheduler;
    makecontext(&f.context, call, 0);
  }
  int idle = 0, left = 1;
  while (left && idle < 8000) {  // longer than a wait that ends by time
    const long before = progress;
    left = 0;
    for (auto &f : fibers)
      if (!f.ended && ++left && !rests(f)) {
        now = &f, threadIdx.x = f.thread, blockIdx.x = f.block;
        swapcontext(&scheduler, &f.context);
      }
    ++turns;
    do_copies();
    idle = progress == before ? idle + 1 : 0;
  }
  for (auto &b : blocks)
    for (auto &group : b.products)
      for (auto &open : group.second)
        if (left == 0 && !open.empty()) left = 1, fprintf(stderr, "a product that nobody waited for\n");
  for (auto &b : blocks)
    for (int i = 0; i < BEHIND; ++i)
      if ((unsigned char)b.memory[shared + i] != 0xFF) fail("something was written behind a block's memory");
  if (left == 0 && !copies.empty()) left = 1, fprintf(stderr, "a copy that nobody waited for\n");
  for (auto &f : fibers)
    for (auto &group : f.stores)
      if (left == 0 && !group.empty()) left = 1, fprintf(stderr, "a copy to memory that nobody waited for\n");
  for (auto &f : fibers) free(f.stack);
  for (auto &b : blocks) free(b.memory);
  return left > 0;
}
