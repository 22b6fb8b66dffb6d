/* Attention of a few queries over the columns of one key/value head, kept in fp16: part of decode.c.
 *
 * Up to QUERIES of them (heads that share their keys, or positions) are done together, so that a key or value is read and
 * widened once for all; sums are fp32. A query's result does not depend on those beside it.
 */
enum { QUERIES = 3, COLUMNS = 4 };

#if defined(__AVX512F__)
typedef __m512 Lanes;
enum { WIDE = 16 };
static inline Lanes none(void) { return _mm512_setzero_ps(); }
static inline Lanes all(float x) { return _mm512_set1_ps(x); }
static inline Lanes load(const float *from) { return _mm512_loadu_ps(from); }
static inline Lanes widen(const uint16_t *from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from)); }
static inline Lanes add_product(Lanes x, Lanes y, Lanes sum) { return _mm512_fmadd_ps(x, y, sum); }
static inline void store(float *to, Lanes x) { _mm512_storeu_ps(to, x); }
static inline __m256 fold(Lanes x) {
  return _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
}
#else
typedef __m256 Lanes;
enum { WIDE = 8 };
static inline Lanes none(void) { return _mm256_setzero_ps(); }
static inline Lanes all(float x) { return _mm256_set1_ps(x); }
static inline Lanes load(const float *from) { return _mm256_loadu_ps(from); }
static inline Lanes widen(const uint16_t *from) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from)); }
static inline Lanes add_product(Lanes x, Lanes y, Lanes sum) { return _mm256_fmadd_ps(x, y, sum); }
static inline void store(float *to, Lanes x) { _mm256_storeu_ps(to, x); }
static inline __m256 fold(Lanes x) { return x; }
#endif

typedef struct {
  const uint16_t *keys, *values;   /* (columns, width) */
  float *queries, *shares;         /* (count, width); room for the rest of `look_floats` */
  float *outs[QUERIES];
  long ends[QUERIES];              /* each sees the columns before its own; they do not fall */
  long width;
  int count;
} Look;

/* Room that a look needs in front of `longest` columns. */
static inline long look_floats(long width, long longest) { return QUERIES * (width + longest + COLUMNS); }

/* fp16, with what is beyond its range at its end. */
static inline void to_half(const float *from, long width, uint16_t *to) {
  const float most = 65504;
  for (long i = 0; i < width; i++) to[i] = _cvtss_sh(from[i] > most ? most : from[i] < -most ? -most : from[i], 0);
}

/* The sums of four registers. */
static inline __m128 four_sums(const Lanes *x) {
  __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(fold(x[0]), fold(x[1])), _mm256_hadd_ps(fold(x[2]), fold(x[3])));
  return _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1));
}

/* Products of queries and keys, COLUMNS at once; what stands behind the last one is of no meaning. */
static inline __attribute__((always_inline)) void compare(const Look *look, long end, long stride, long width, int count) {
  for (long column = 0; column < end; column += COLUMNS) {
    Lanes sums[QUERIES][COLUMNS];
    const uint16_t *keys[COLUMNS];
    for (int j = 0; j < COLUMNS; j++) keys[j] = look->keys + least(column + j, end - 1) * width;
    for (int q = 0; q < count; q++)
      for (int j = 0; j < COLUMNS; j++) sums[q][j] = none();
    long i = 0;
    for (; i + WIDE <= width; i += WIDE) {
      for (int j = 0; j < COLUMNS; j++) {
        Lanes key = widen(keys[j] + i);
        for (int q = 0; q < count; q++) sums[q][j] = add_product(key, load(look->queries + q * width + i), sums[q][j]);
      }
    }
    for (int q = 0; q < count; q++) {
      float *products = look->shares + q * stride + column;
      _mm_storeu_ps(products, four_sums(sums[q]));
      for (long rest = i; rest < width; rest++)
        for (int j = 0; j < COLUMNS; j++) products[j] += _cvtsh_ss(keys[j][rest]) * look->queries[q * width + rest];
    }
  }
}

/* Products to shares e^(x - largest), zero from a query's end on; returns their sum. */
static inline float share_out(float *shares, float scale, long own, long end) {
  float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
  for (long column = 0; column < own; column++) largest = shares[column] > largest ? shares[column] : largest;
#pragma omp simd reduction(+ : sum)
  for (long column = 0; column < own; column++) {
    shares[column] = exponential((shares[column] - largest) * scale);
    sum += shares[column];
  }
  for (long column = own; column < end; column++) shares[column] = 0;
  return sum;
}

/* `registers` registers' worth of the mixed values, from `first` on. */
static inline __attribute__((always_inline)) void mix(const Look *look, long end, long stride, const float *sums, long first,
                                                      long width, int registers, int count) {
  Lanes mixed[QUERIES][4];
  for (int q = 0; q < count; q++)
    for (int j = 0; j < registers; j++) mixed[q][j] = none();
  for (long column = 0; column < end; column++) {
    Lanes shares[QUERIES];
    for (int q = 0; q < count; q++) shares[q] = all(look->shares[q * stride + column]);
    for (int j = 0; j < registers; j++) {
      Lanes value = widen(look->values + column * width + first + WIDE * j);
      for (int q = 0; q < count; q++) mixed[q][j] = add_product(shares[q], value, mixed[q][j]);
    }
  }
  for (int q = 0; q < count; q++)
    for (int j = 0; j < registers; j++) store(look->outs[q] + first + WIDE * j, mixed[q][j] / all(sums[q]));
}

static inline __attribute__((always_inline)) void run_counted(const Look *look, long width, int count) {
  long end = look->ends[count - 1], stride = end + COLUMNS, i = 0;
  float sums[QUERIES];
  compare(look, end, stride, width, count);
  for (int q = 0; q < count; q++) sums[q] = share_out(look->shares + q * stride, 1 / sqrtf((float)width), look->ends[q], end);
  for (; i + 4 * WIDE <= width; i += 4 * WIDE) mix(look, end, stride, sums, i, width, 4, count);
  for (; i + WIDE <= width; i += WIDE) mix(look, end, stride, sums, i, width, 1, count);
  for (; i < width; i++) {
    for (int q = 0; q < count; q++) {
      float mixed = 0;
      for (long column = 0; column < end; column++) mixed += look->shares[q * stride + column] * _cvtsh_ss(look->values[column * width + i]);
      look->outs[q][i] = mixed / sums[q];
    }
  }
}

static void run_look(const Look *look) {
  switch (look->count) {
#define CASE(N) \
  case N: return look->width == 64 ? run_counted(look, 64, N) : run_counted(look, look->width, N);
    CASE(1) CASE(2) CASE(3)
#undef CASE
  }
}
