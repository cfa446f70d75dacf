// What the merges of both directions have in common. A cluster of blocks has a segment of a sample
// at a time, each block a run of its rows, which stay in shared memory from the first pass over them
// to the second. Roles of a block's warps, which know of each other by barriers alone:
//
//   load     fills slots of ROWS rows, in order, as soon as they are free
//   sum      column sums of a segment's rows; sends each block of the cluster those of its columns
//   mean     adds up, in the order of the blocks, the sums of this block's columns; sends all blocks
//            what follows from them
//   apply    the second pass, for whole rows; frees the slots
//
// Rows that do not fit (`passed`) are loaded a second time, soon after the first, from the L2 cache.

#define SLICE (D / CLUSTER)           // columns whose sums a block adds up
#define EACH (SLICE / 32)             // of a lane
#define ROW_BYTES (2 * D)
#define SUM_WARPS (D / 256)           // of 8 columns a thread
#define LANE_COLUMNS (D / 32)         // of a lane that has whole rows
#define SLOT_BYTES (2 * ROWS * ROW_BYTES)  // of two tensors
#define ARRIVALS 24                   // that free a slot:
#define FROM_SUM 8                    // of the first pass,
#define FROM_APPLY 16                 // of the second, if the rows have one
#if HINTS
#define STREAMED ".cs"
#else
#define STREAMED ""
#endif
#define NOTED_AFTER 200000000ull      // ns that a wait may take
#define ENDED_AFTER 10000000000ull

__device__ __forceinline__ void barrier_arrive(u32 bar, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Where a wait without end is noted; without it the program ends. Nobody in this block waits after it.
__shared__ u32 *fault;
__shared__ volatile u32 faulty;

// Whether a wait that began then has lasted too long: a fault of these files.
__device__ __noinline__ bool give_up(u64 began) {
  if (faulty) return true;
  if (nanoseconds() - began < (fault ? NOTED_AFTER : ENDED_AFTER)) return false;
  if (!fault) __trap();
  faulty = 1;
  *(volatile u32 *)fault = 1;
  return true;
}

__device__ __forceinline__ bool phase_over(u32 bar, u32 parity) {
  u32 over;
  asm volatile(
      "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(over) : "r"(bar), "r"(parity) : "memory");
  return over;
}

// Each try lets the thread sleep for a while.
__device__ __forceinline__ void barrier_wait(u32 bar, u32 parity) {
  if (phase_over(bar, parity)) return;
  const u64 began = nanoseconds();
#pragma unroll 1
  while (!phase_over(bar, parity))
    if (give_up(began)) return;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release;\n barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ u32 at_rank(u32 address, u32 rank) {
  u32 there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

__device__ __forceinline__ void send4(u32 to, u32 bar, float a, float b, float c, float d) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
      ::"r"(to), "f"(a), "f"(b), "f"(c), "f"(d), "r"(bar) : "memory");
}

__device__ __forceinline__ void send2(u32 to, u32 bar, float a, float b) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];"
      ::"r"(to), "f"(a), "f"(b), "r"(bar) : "memory");
}

// A lane's EACH neighbouring values.
__device__ __forceinline__ void send(u32 to, u32 bar, const float (&v)[EACH]) {
  if constexpr (EACH == 4) send4(to, bar, v[0], v[1], v[2], v[3]);
  else send2(to, bar, v[0], v[1]);
}

__device__ __forceinline__ void send8(u32 to, u32 bar, const float (&v)[8]) {
  send4(to, bar, v[0], v[1], v[2], v[3]);
  send4(to + 16, bar, v[4], v[5], v[6], v[7]);
}

// With HINTS the L2 cache is told to keep what is loaded a second time, and nothing else: no other load, and
// no result.
struct Hints { u64 keep, drop; };

__device__ __forceinline__ Hints make_hints() {
  Hints h = {};
#if HINTS
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(h.keep));
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(h.drop));
#endif
  return h;
}

__device__ __forceinline__ void copy_bulk(u32 to, const void *from, u32 bytes, u32 bar, u64 hint) {
#if HINTS
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
      ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(hint) : "memory");
#else
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
      ::"r"(to), "l"(from), "r"(bytes), "r"(bar) : "memory");
#endif
}

// Rows of one tensor into a slot: as one copy where they follow each other.
__device__ __forceinline__ void load_rows(u32 to, const u16 *from, long long stride, int rows, u32 bar, u64 hint) {
  if (stride == D) {
    if (rows) copy_bulk(to, from, rows * ROW_BYTES, bar, hint);
  } else {
    for (int r = 0; r < rows; ++r) copy_bulk(to + r * ROW_BYTES, from + r * stride, ROW_BYTES, bar, hint);
  }
}

__device__ __forceinline__ Quad load_quad(u32 at) {
  Quad q;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(q.x), "=r"(q.y), "=r"(q.z), "=r"(q.w) : "r"(at));
  return q;
}

__device__ __forceinline__ void load_floats(u32 at, float (&v)[4]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at));
}

__device__ __forceinline__ void load_floats(u32 at, float (&v)[2]) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v[0]), "=f"(v[1]) : "r"(at));
}

__device__ __forceinline__ void load_8(u32 at, float (&v)[8]) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[0]), "=f"(v[1]), "=f"(v[2]), "=f"(v[3]) : "r"(at));
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v[4]), "=f"(v[5]), "=f"(v[6]), "=f"(v[7]) : "r"(at + 16));
}

// A lane's columns, added up over the blocks of the cluster in their order.
__device__ __forceinline__ void add_blocks(const float (&sums)[CLUSTER][2][SLICE], int which, int local, float (&total)[EACH]) {
#pragma unroll
  for (int c = 0; c < CLUSTER; ++c) {
    float v[EACH];
    load_floats(shared(&sums[c][which][local]), v);
#pragma unroll
    for (int i = 0; i < EACH; ++i) total[i] += v[i];
  }
}

__device__ __forceinline__ void store_quad(u16 *to, const Quad &q) {
  asm volatile("st.global" STREAMED ".v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
}

__device__ __forceinline__ void unpack(const Quad &q, float (&v)[8]) {
  const u32 w[4] = {q.x, q.y, q.z, q.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    v[2 * i] = low_half(w[i]);
    v[2 * i + 1] = high_half(w[i]);
  }
}

__device__ __forceinline__ Quad packed(const float (&v)[8]) {
  return Quad{pack(v[0], v[1]), pack(v[2], v[3]), pack(v[4], v[5]), pack(v[6], v[7])};
}

__device__ __forceinline__ float over_lanes(float v) {
#pragma unroll
  for (int bit = 16; bit; bit >>= 1) v += __shfl_xor_sync(~0u, v, bit);
  return v;
}

// [D], one element, or a number.
struct Gain { const void *p; float number; int stride, half; };

__device__ __forceinline__ float gain(const Gain &g, int at) {
  if (!g.p) return g.number;
  if (!g.half) return ((const float *)g.p)[at * g.stride];
  return low_half(((const u16 *)g.p)[at * g.stride]);
}

// What both directions begin with; by one thread, before `begin_together`.
template <class Barriers>
__device__ __forceinline__ void prepare(Barriers &bars, u32 *fault_at) {
  fault = fault_at;
  faulty = 0;
  for (int i = 0; i < SLOTS; ++i) {
    barrier_init(shared(&bars.full[i]), 1);
    barrier_init(shared(&bars.empty[i]), ARRIVALS);
  }
  barrier_init(shared(&bars.sums), 1);
  barrier_init(shared(&bars.shift), 1);
  barrier_init(shared(&bars.taken), APPLY_WARPS);
}

// Once every barrier of the cluster is ready.
__device__ __forceinline__ void begin_together() {
  if (threadIdx.x == 0) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  __syncthreads();
  cluster_sync();
}

// A lane of the mean's warp: what it weighs its columns by, (α − β) and λ.
__device__ __forceinline__ void mean_gains(const Gain &beta, const Gain &alpha, const Gain &leak, int column,
                                           float (&weight)[EACH], float (&leaks)[EACH]) {
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    weight[i] = gain(alpha, column + i) - gain(beta, column + i);
    leaks[i] = gain(leak, column + i);
  }
}

// Which samples each cluster has, of each segment: first[s][c] … first[s][c + 1] − 1.
struct Layout { int length[SEGMENTS]; u16 first[SEGMENTS][CLUSTERS + 1]; };

struct Unit {
  int b, s, n;   // sample; segment; how many units came before
  int token;     // of the sample, where this block's rows begin
  int rows, real;  // of this block; of them, those that are no padding
  int count;     // real tokens of the segment
  int slots, passed;  // that its rows take; the first of them, which are loaded twice
  u32 fill;      // slots filled before
};

// The mean's warp: announces the sums of a unit and what follows from them, then waits for the sums.
template <class Shared>
__device__ __forceinline__ void await_sums(Shared &at, const Unit &u) {
  const u32 sums = shared(&at.bars.sums), shift = shared(&at.bars.shift);
  if (u.n) barrier_wait(shift, (u.n - 1) & 1);  // before the next phase is announced
  if (threadIdx.x % 32 == 0) {
    barrier_expect(sums, sizeof(at.sums));
    barrier_expect(shift, sizeof(at.shift));
  }
  barrier_wait(sums, u.n & 1);
}

__device__ __forceinline__ int within(int x, int low, int high) { return min(max(x, low), high); }

// Calls f for every unit of this cluster, a segment of each in turn; with ALTERNATE every other cluster begins
// with the last, for where all have long ones at once, all read at once and then all write.
template <class F>
__device__ __forceinline__ void each_unit(const Layout &at, const VALID *valid, u32 rank, F f) {
  const int cluster = blockIdx.x / CLUSTER;
  int most = 0, n = 0;
  u32 fill = 0;
#pragma unroll
  for (int s = 0; s < SEGMENTS; ++s) most = max(most, at.first[s][cluster + 1] - at.first[s][cluster]);
  for (int i = 0; i < most; ++i)
    for (int turn = 0; turn < SEGMENTS; ++turn) {
      const int s = ALTERNATE && cluster % 2 ? SEGMENTS - 1 - turn : turn;
      int start = 0;
      for (int before = 0; before < s; ++before) start += at.length[before];
      const int b = at.first[s][cluster] + i, length = at.length[s];
      if (b >= at.first[s][cluster + 1] || length == 0) continue;
      const int count = valid ? within((int)valid[b * SEGMENTS + s], 0, length) : length;
      const int most_rows = (length + CLUSTER - 1) / CLUSTER, first = min((int)rank * most_rows, length);
      const int rows = min(most_rows, length - first), slots = (rows + ROWS - 1) / ROWS;
      const int passed = max(0, slots - SLOTS);
      f(Unit{b, s, n++, start + first, rows, within(count - first, 0, rows), count, slots, passed, fill});
      fill += slots + passed;
    }
}

// Before the end of a block, in which nobody waits that another has done: nobody leaves while another
// block may still send to it, or, after a fault, before its loads have come.
__device__ __forceinline__ void leave() {
  if (faulty)
#pragma unroll 1
    for (int i = 0; i < 1000; ++i) __nanosleep(1000);
  __syncwarp();
  cluster_sync();
}

// Who sums has done with a slot.
__device__ __forceinline__ void summed(u64 (&empty)[SLOTS], const Unit &u, int j, u32 slot) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(shared(&empty[slot]), (j < u.passed ? ARRIVALS : FROM_SUM) / SUM_WARPS);
}

// One of `parts` warps that apply a slot has its rows in registers.
__device__ __forceinline__ void applied(u64 (&empty)[SLOTS], u32 slot, int parts) {
  __syncwarp();
  if (threadIdx.x % 32 == 0) barrier_arrive(shared(&empty[slot]), FROM_APPLY / parts);
}

__device__ __forceinline__ u32 slot_of(u32 fill) { return fill % SLOTS; }
__device__ __forceinline__ u32 phase_of(u32 fill) { return fill / SLOTS & 1; }

// A barrier tells a phase from the next one, not from the one after that: nobody may miss a phase of
// a slot that it waits for again. So the sums see slots pass that are filled a second time.
__device__ __forceinline__ void pass_rest(u64 (&full)[SLOTS], u64 (&empty)[SLOTS], const Unit &u) {
  for (int j = u.slots; j < u.slots + u.passed; ++j) {
    const u32 slot = slot_of(u.fill + j);
    barrier_wait(shared(&full[slot]), phase_of(u.fill + j));
    summed(empty, u, j, slot);
  }
}
