// What follows a tile's sums in block_product.cu, down to memory; a warp by itself.

#if KIND != DOWN
// 16 rows of 64 columns go out through the next slot.
__device__ __forceinline__ void send(const u32 *w, const Map *map, int column, int row, Worker &me) {
  const u32 slot = me.slots + me.count++ % 2 * SLOT;
  if (me.lane == 0) stores_read<1>();
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 4; ++i) store_four(me.place(slot, i), w + 4 * i);
  written();
  __syncwarp();
  if (me.lane == 0) {
    store2(map, slot, column, row);
    stores_commit();
  }
}

#if KIND == UP
__device__ __forceinline__ u32 activated(u32 gate, u32 value) {
  const float x = low_half(gate), y = high_half(gate);
  return pack(x * sigmoid(x) * low_half(value), y * sigmoid(y) * high_half(value));
}

#if BESIDE
// The s-th part of what follows the sums of a tile: of 64 columns gates are sent, then values; then each half of H is made
// in the place of gates, and sent.
__device__ __forceinline__ void finish_part(int s, Held &held, const Tile *, Worker &me, const Map *, const Map *map_out, const Map *map_hidden,
                                            const Given &given) {
  const int c = s / 4, i = s % 4, column = held.tile.column + 64 * c, row = held.tile.row + me.row;
  u32 *gate = held.sums + 16 * c;
  const u32 *value = gate + COLUMNS / 8;
  if (i == 0) send(gate, map_out, column, row, me);
  if (i == 1) send(value, map_out, given.width + column, row, me);
  if (i < 2 || !given.writes_hidden) return;
#pragma unroll
  for (int j = 0; j < 8; ++j) gate[8 * (i - 2) + j] = activated(gate[8 * (i - 2) + j], value[8 * (i - 2) + j]);
  if (i == 3) send(gate, map_hidden, column, row, me);
}

#else
__device__ __forceinline__ void finish(const Acc &acc, const Tile &tile, Worker &me, const Map *map_out, const Map *map_hidden, const Given &given) {
  const int row = tile.row + me.row;
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    const int column = tile.column + 64 * c;
    u32 gate[16], value[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float *x = acc + 32 * c + 2 * i, *y = x + COLUMNS / 4;
      gate[i] = pack(x[0], x[1]);
      value[i] = pack(y[0], y[1]);
    }
    send(gate, map_out, column, row, me);
    send(value, map_out, given.width + column, row, me);
    if (given.writes_hidden) {
#pragma unroll
      for (int i = 0; i < 16; ++i) gate[i] = activated(gate[i], value[i]);
      send(gate, map_hidden, column, row, me);
    }
  }
}
#endif

#else
// What turns a thread's channels below HEAD / 2 of both its rows: of row h, channel 8j + lane % 4 · 2 + e. Fetched while
// there are no sums yet.
struct Turns {
  float2 cos[16], sin[16];
  __device__ __forceinline__ void fetch(const Tile &tile, const Worker &me, const Given &given) {
    if (tile.column >= given.n_turned * HEAD) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int at = (tile.row + me.row + me.lane / 4 + 8 * h) % given.tokens * (HEAD / 2) + me.lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        cos[8 * h + j] = __ldg((const float2 *)(given.cos + at + 8 * j));
        sin[8 * h + j] = __ldg((const float2 *)(given.sin + at + 8 * j));
      }
    }
  }
};

// A head in place, whose channels of a row four lanes have; turning leaves the norm.
__device__ __forceinline__ void turn_and_normalise(float *x, const Turns &turns, int head, int row, const Worker &me, const Given &given) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < 16; ++j) sum += x[4 * j + 2 * h] * x[4 * j + 2 * h] + x[4 * j + 2 * h + 1] * x[4 * j + 2 * h + 1];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const float r = rsqrtf(sum / HEAD + given.eps);
    const int at = row + me.lane / 4 + 8 * h;
    if (me.lane % 4 == 0 && at < given.n_rows) given.inverse[(long long)at * given.n_turned + head] = r;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float2 c = turns.cos[8 * h + j], s = turns.sin[8 * h + j];
      const float by[2][2] = {{c.x * r, s.x * r}, {c.y * r, s.y * r}};
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float &first = x[4 * j + 2 * h + e], &second = x[4 * (j + 8) + 2 * h + e];
        const float y = first * by[e][0] + second * by[e][1];
        second = second * by[e][0] - first * by[e][1];
        first = y;
      }
    }
  }
}

__device__ __forceinline__ void finish(Acc &acc, const Turns &turns, const Tile &tile, Worker &me, const Map *map_out, const Given &given) {
  const int row = tile.row + me.row;
#pragma unroll
  for (int i = 0; i < COLUMNS / HEAD; ++i) {
    const int head = tile.column / HEAD + i;
    if (head < given.n_turned) turn_and_normalise(acc + HEAD / 2 * i, turns, head, row, me, given);
  }
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c) {
    u32 words[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) words[i] = pack(acc[32 * c + 2 * i], acc[32 * c + 2 * i + 1]);
    send(words, map_out, tile.column + 64 * c, row, me);
  }
}
#endif

#else
// Gates and values of a chunk, 16 rows of 64 columns of each, into the next pair of slots; one lane asks.
__device__ __forceinline__ void ask(const Tile &tile, int c, int count, const Worker &me, const Map *map_packed, const Given &given) {
  const u32 to = me.slots + count % 2 * 2 * SLOT, bar = me.bars + count % 2 * 8;
  barrier_expect(bar, 2 * SLOT);
  load2(to, map_packed, bar, tile.column + 64 * c, tile.row + me.row);
  load2(to + SLOT, map_packed, bar, given.width + tile.column + 64 * c, tile.row + me.row);
}

// The first two chunks of a tile but for those asked for already, into slots of which nothing is to be copied any more;
// the L2 cache is asked for the others.
__device__ __forceinline__ void ask_first(const Tile &tile, int from, const Worker &me, const Map *map_packed, const Given &given) {
  for (int c = from; c < 2; ++c) ask(tile, c, me.count + c, me, map_packed, given);
  for (int c = 2; c < CHUNKS; ++c) {
    prefetch2(map_packed, tile.column + 64 * c, tile.row + me.row);
    prefetch2(map_packed, given.width + tile.column + 64 * c, tile.row + me.row);
  }
}

// From dH of two columns and their gates and values: H, and in place of those their gradients.
__device__ __forceinline__ u32 differentiate(const float *dh, u32 &gate, u32 &value) {
  const float g[2] = {low_half(gate), high_half(gate)}, v[2] = {low_half(value), high_half(value)};
  float h[2], dg[2], dv[2];
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const float s = sigmoid(g[e]), silu = g[e] * s;
    h[e] = silu * v[e];
    dv[e] = dh[e] * silu;
    dg[e] = dh[e] * v[e] * (s + silu * (1.f - s));
  }
  gate = pack(dg[0], dg[1]);
  value = pack(dv[0], dv[1]);
  return pack(h[0], h[1]);
}

#if BESIDE
// The s-th part of what follows the sums of a tile: 16 columns. Its chunk is there; the one after it, if there is one, of
// this tile or of the next, is asked for.
__device__ __forceinline__ void finish_part(int s, Held &held, const Tile *next, Worker &me, const Map *map_packed, const Map *map_out,
                                            const Map *map_hidden, const Given &given) {
  const Tile &tile = held.tile;
  const int c = s / 4, i = s % 4;
  const u32 slot = me.slots + me.count % 2 * 2 * SLOT, of_hidden = me.slots + 4 * SLOT;
  if (i == 0) {
    barrier_wait(me.bars + me.count % 2 * 8, me.count / 2 & 1, given.fault);
    if (me.lane == 0) {
      stores_read<0>();  // the chunk before has gone out meanwhile
      if (c + 1 < CHUNKS) ask(tile, c + 1, me.count + 1, me, map_packed, given);
      else if (next) ask(*next, 0, me.count + 1, me, map_packed, given);
    }
    __syncwarp();
  }
  const u32 place = me.place(slot, i);
  u32 gate[4], value[4], h[4];
  load_four(place, gate);
  load_four(place + SLOT, value);
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    const u32 both = held.sums[4 * s + w];
    const float dh[2] = {low_half(both), high_half(both)};
    h[w] = differentiate(dh, gate[w], value[w]);
  }
  store_four(place, gate);
  store_four(place + SLOT, value);
  store_four(me.place(of_hidden, i), h);
  if (i < 3) return;
  written();
  __syncwarp();
  if (me.lane == 0) {
    store2(map_hidden, of_hidden, tile.column + 64 * c, tile.row + me.row);
    store2(map_out, slot, tile.column + 64 * c, tile.row + me.row);
    store2(map_out, slot + SLOT, given.width + tile.column + 64 * c, tile.row + me.row);
    stores_commit();
  }
  ++me.count;
}

#else
// Of a tile and, if there is one, the tile after it, of which the first two chunks are asked for.
__device__ __forceinline__ void finish(const Acc &acc, const Tile &tile, const Tile &next, bool goes_on, Worker &me, const Map *map_packed,
                                       const Map *map_out, const Map *map_hidden, const Given &given) {
#pragma unroll
  for (int c = 0; c < CHUNKS; ++c, ++me.count) {
    const u32 slot = me.slots + me.count % 2 * 2 * SLOT, of_hidden = me.slots + 4 * SLOT;
    u32 h[16];
    barrier_wait(me.bars + me.count % 2 * 8, me.count / 2 & 1, given.fault);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 place = me.place(slot, i);
      u32 gate[4], value[4];
      load_four(place, gate);
      load_four(place + SLOT, value);
#pragma unroll
      for (int w = 0; w < 4; ++w) h[4 * i + w] = differentiate(acc + 32 * c + 8 * i + 2 * w, gate[w], value[w]);
      store_four(place, gate);
      store_four(place + SLOT, value);
      if (i == 1 && c > 0) {  // the chunk before has gone out meanwhile
        if (me.lane == 0) {
          stores_read<0>();
          if (c + 1 < CHUNKS) ask(tile, c + 1, me.count + 1, me, map_packed, given);
          else if (goes_on) ask(next, 0, me.count + 1, me, map_packed, given);
        }
        __syncwarp();
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_four(me.place(of_hidden, i), h + 4 * i);
    written();
    __syncwarp();
    if (me.lane == 0) {
      store2(map_hidden, of_hidden, tile.column + 64 * c, tile.row + me.row);
      store2(map_out, slot, tile.column + 64 * c, tile.row + me.row);
      store2(map_out, slot + SLOT, given.width + tile.column + 64 * c, tile.row + me.row);
      stores_commit();
    }
  }
  if (goes_on && me.lane == 0) {
    stores_read<0>();
    ask_first(next, 1, me, map_packed, given);
  }
  __syncwarp();
}
#endif
#endif
