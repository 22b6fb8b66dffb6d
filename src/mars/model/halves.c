/* Weights of 16 bits on a processor with AVX2 or AVX-512: part of quantized.c, with the names of amx.c.
 *
 *   codes  [tile][input][16 rows] fp16, without scales
 *
 * Activations and sums are fp32. Up to 8 rows share one reading of a weight.
 */
enum { TILES = 3 };

int mars_may_run(void) { return 1; }

static size_t whole_bytes(long rows, long inputs) { return rows * inputs * sizeof(float); }

static Rows whole_rows_in(void *memory, long rows, long inputs) { return (Rows){.whole = memory, .rows = rows, .inputs = inputs}; }

/* Takes a row. */
static void take_row(const float *from, const Rows *to, long row) {
  long group = row / MOST * MOST, rows = least(MOST, to->rows - group);
  float *place = to->whole + group * to->inputs + row - group;
  for (long i = 0; i < to->inputs; i++) place[i * rows] = from[i];
}

#if defined(__AVX512F__)

/* Up to three tiles of 16 bits for `rows` activation rows: 24 sums, three weights and an activation fill the registers. */
static inline __attribute__((always_inline)) void run_half_tiles(const uint16_t *codes, const float *x, long inputs,
                                                                 float *out, long out_stride, int rows, int tiles) {
  __m512 sums[MOST][TILES];
  for (int row = 0; row < rows; row++)
    for (int tile = 0; tile < tiles; tile++) sums[row][tile] = _mm512_setzero_ps();
  for (long i = 0; i < inputs; i++) {
    __m512 weights[TILES];
    for (int tile = 0; tile < tiles; tile++) {
      const uint16_t *from = codes + (tile * inputs + i) * TILE;
      if (i % 2 == 0) __builtin_prefetch((const char *)from + AHEAD, 0, 2);
      weights[tile] = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
    }
    for (int row = 0; row < rows; row++) {
      __m512 one = _mm512_set1_ps(x[i * rows + row]);
      for (int tile = 0; tile < tiles; tile++) sums[row][tile] = _mm512_fmadd_ps(weights[tile], one, sums[row][tile]);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int tile = 0; tile < tiles; tile++) _mm512_storeu_ps(out + row * out_stride + tile * TILE, sums[row][tile]);
}

#else

/* One half (8 outputs) of a tile of 16 bits, or both, for `rows` activation rows: 16 registers hold 8 sums and no more. */
static inline __attribute__((always_inline)) void run_half_sides(const uint16_t *codes, const float *x, long inputs,
                                                                 float *out, long out_stride, int rows, int sides) {
  __m256 sums[MOST][2];
  for (int row = 0; row < rows; row++)
    for (int side = 0; side < sides; side++) sums[row][side] = _mm256_setzero_ps();
  for (long i = 0; i < inputs; i++, codes += TILE) {
    if (i % 2 == 0) __builtin_prefetch((const char *)codes + AHEAD, 0, 2);
    for (int side = 0; side < sides; side++) {
      __m256 weights = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(codes + 8 * side)));
      for (int row = 0; row < rows; row++)
        sums[row][side] = _mm256_fmadd_ps(weights, _mm256_set1_ps(x[i * rows + row]), sums[row][side]);
    }
  }
  for (int row = 0; row < rows; row++)
    for (int side = 0; side < sides; side++) _mm256_storeu_ps(out + row * out_stride + 8 * side, sums[row][side]);
}

static inline __attribute__((always_inline)) void run_half_tiles(const uint16_t *codes, const float *x, long inputs,
                                                                 float *out, long out_stride, int rows, int tiles) {
  for (int tile = 0; tile < tiles; tile++, codes += inputs * TILE, out += TILE) {
    if (rows <= MOST / 2) {
      run_half_sides(codes, x, inputs, out, out_stride, rows, 2);
    } else {
      run_half_sides(codes, x, inputs, out, out_stride, rows, 1);
      run_half_sides(codes + 8, x, inputs, out + 8, out_stride, rows, 1);
    }
  }
}

#endif

/* Tiles `tile` .. `end` of out (rows, outputs) = x times a weight of 16 bits. */
static void run_whole_tiles(const Rows *x, const Weight *weight, long tile, long end, float *out) {
  long inputs = weight->inputs, stride = weight->outputs;
  for (; tile < end; tile += TILES) {
    const uint16_t *codes = (const uint16_t *)weight->codes + tile * inputs * TILE;
    for (long first = 0; first < x->rows; first += MOST) {
      const float *from = x->whole + first * inputs;
      float *to = out + first * stride + tile * TILE;
      switch (least(MOST, x->rows - first) + least(TILES, end - tile) * (MOST + 1)) {
#define CASE(N) \
  case N + 9: run_half_tiles(codes, from, inputs, to, stride, N, 1); break; \
  case N + 18: run_half_tiles(codes, from, inputs, to, stride, N, 2); break; \
  case N + 27: run_half_tiles(codes, from, inputs, to, stride, N, 3); break;
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
#undef CASE
      }
    }
  }
}

long mars_packed_bytes(long outputs, long inputs) { return (outputs + TILE - 1) / TILE * TILE * inputs * sizeof(uint16_t); }

/* Rounds a weight (outputs, inputs) of fp32 to fp16; the last tile is filled up with zeros. */
void mars_pack(const float *weight, long outputs, long inputs, uint8_t *codes, float *scales) {
  (void)scales;
#pragma omp parallel for schedule(dynamic)
  for (long tile = 0; tile < (outputs + TILE - 1) / TILE; tile++) {
    uint16_t *to = (uint16_t *)codes + tile * inputs * TILE;
    for (long i = 0; i < inputs; i++)
      for (long row = tile * TILE; row < (tile + 1) * TILE; row++)
        *to++ = row < outputs ? _cvtss_sh(weight[row * inputs + i], 0) : 0;
  }
}
