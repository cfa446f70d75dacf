// What emulation.h declares, for kernels of any source.
#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <deque>
#include <map>
#include <vector>

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
  ucontext_t first;
  jmp_buf later;  // where it goes on; unlike a ucontext, one is left and entered without the system
  int thread, block;
  bool begun, ended;
  char *stack;
  std::deque<std::vector<Store>> stores;  // not yet done: groups, the last still open
};
static std::vector<Block> blocks;
static std::vector<Fiber> fibers;
static std::vector<Copy> copies;  // not yet done
static int turns, cluster_size;
Place threadIdx, blockIdx, gridDim;
static Fiber *now;
static jmp_buf scheduler;
long progress;
Long clock_ticks;

void fail(const char *what) { fprintf(stderr, "%s, thread %d of block %d\n", what, threadIdx.x, blockIdx.x); abort(); }
void yield() {
  if (!_setjmp(now->later)) _longjmp(scheduler, 1);
}
static void (*kernel)();
static void begin() {
  kernel();
  now->ended = true;
  _longjmp(scheduler, 1);
}
static void go_on() {  // as `now`, until it yields or ends
  if (_setjmp(scheduler)) return;
  if (now->begun) _longjmp(now->later, 1);
  now->begun = true;
  setcontext(&now->first);
}
static Block &block() { return blocks[now->block]; }
static char *at(Word address) { return block().memory + address; }
char *memory_of_block() { return block().memory; }

// `n` threads hand in; the last does the work.
template <class In, class Work> static Together &together(int key, int n, In in, Work work) {
  Together &t = block().met[key];
  in(t);
  const int turn = t.turn;
  if (++t.come == n) { work(t); t.come = 0; ++t.turn; ++progress; }
  while (t.turn == turn) yield();
  return t;
}
void meet(int barrier, int n) { together(barrier, n, [](Together &) {}, [](Together &) {}); }
void __syncthreads() { meet(0, block().threads); }
static int first_of_cluster() { return now->block / cluster_size * cluster_size; }
void meet_cluster() {
  Together &t = blocks[first_of_cluster()].met[-1];
  const int turn = t.turn;
  if (++t.come == block().threads * cluster_size) { t.come = 0; ++t.turn; ++progress; }
  while (t.turn == turn) yield();
}
static int lane() { return threadIdx.x % 32; }
static int warp_key() { return 100 + threadIdx.x / 32; }
void __syncwarp() { meet(warp_key(), 32); }
float __shfl_xor_sync(Word, float value, int mask) {
  const int l = lane();
  Together &t = together(warp_key(), 32, [&](Together &t) { t.number[l] = value; },
                         [](Together &t) { memcpy(t.numbers, t.number, sizeof t.number); });
  return t.numbers[l ^ mask];
}

Word __shfl_xor_sync(Word all, Word value, int mask) {
  float bits;
  memcpy(&bits, &value, 4);
  bits = __shfl_xor_sync(all, bits, mask);
  memcpy(&value, &bits, 4);
  return value;
}

Word __shfl_sync(Word, Word value, int) {  // of numbers that are the same in all lanes
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
void barrier_begin(Word bar, Word count) {
  block().barriers[bar] = Barrier{(int)count, (int)count, 0, 0};
  memcpy(at(bar), &MARK_OF_BARRIER, 8);
}
void barrier_expects(Word bar, Word bytes) { Barrier &b = barrier(bar); b.bytes += bytes; --b.pending; settle(b); }
void barrier_arrives(Word bar) { Barrier &b = barrier(bar); --b.pending; settle(b); }
void barrier_arrives_in(Word bar, Word rank) {  // in another block of the cluster
  Fiber *me = now;
  now = &fibers[(size_t)(first_of_cluster() + rank) * block().threads];
  if (now->ended) fail("an arrival in a block that has ended");
  barrier_arrives(bar);
  now = me;
}
Word barrier_tries(Word bar, Word parity) {
  if ((Word)(barrier(bar).phase & 1) != parity) return 1;
  yield();
  return 0;
}

// Memory that is swizzled by 128 bytes
static Word swizzled(Word address) { return address ^ ((address >> 7 & 7) << 4); }
void copy(Word to, const void *map, Word bar, std::initializer_list<int> from, int blocks_of_cluster) {
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
void copy_out(const void *map, Word from, std::initializer_list<int> to) {
  if (from % 1024) fail("a copy from where no swizzled tile begins");
  if (now->stores.empty()) now->stores.emplace_back();
  now->stores.back().push_back({from, *(const Tensor *const *)map, to});
}
void copies_out_commit() { now->stores.emplace_back(); }
void copies_out_wait(int left) {  // for all groups but the last ones
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
void store_matrices(int n, bool turned, Word address, const std::initializer_list<Word> values) {
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
Word *load_matrices(int n, bool turned, Word address) {
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
void multiply_together(int n, bool transposed, float *d, Long a, const Word *held, Long b, int add) {
  const int t = threadIdx.x % 128;
  together(200 + warpgroup(), 128,
           [&](Together &g) { g.d[t] = d; g.a = a; g.held[t] = held; g.b = b; g.add = add; }, [=](Together &g) {
             if (products().empty()) products().emplace_back();
             products().back().push_back({n, transposed, g});
           });
}
void products_commit() {
  together(200 + warpgroup(), 128, [](Together &) {}, [](Together &) { products().emplace_back(); });
}
void products_wait(int left) {  // for all groups but the last ones
  together(200 + warpgroup(), 128, [](Together &) {}, [=](Together &) {
    for (; (int)products().size() > left + 1; products().pop_front())
      for (const Product &p : products().front()) do_product(p);
  });
}

// Every other turn or so of a warp, so that warps come to a place in any order.
static bool rests(const Fiber &f) {
  Word mixed = (Word)turns * 2654435761u ^ (Word)(f.block * 64 + f.thread / 32) * 2246822519u;
  mixed = (mixed ^ mixed >> 15) * 2246822519u;
  return mixed >> 16 & 1;
}

const int BEHIND = 1024;  // bytes behind a block's memory, in which nothing is to be written
int run_all(int grid, int threads, int shared, int cluster, void (*call)()) {
  copies.clear(), turns = 0, cluster_size = cluster, kernel = call;
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
    getcontext(&f.first);
    f.first.uc_stack.ss_sp = f.stack, f.first.uc_stack.ss_size = 65536;
    makecontext(&f.first, begin, 0);
  }
  int idle = 0, left = 1;
  while (left && idle < 8000) {  // longer than a wait that ends by time
    const long before = progress;
    left = 0;
    for (auto &f : fibers)
      if (!f.ended && ++left && !rests(f)) {
        now = &f, threadIdx.x = f.thread, blockIdx.x = f.block;
        go_on();
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
