/* One position of each row through all layers of the visual expert, in one call: the kernel behind mars.model.decoding.
 *
 * What PyTorch would do in some twenty operators a layer is done by one team of threads that meets six times a layer.
 * Cheap work on one row's width (norms, residuals, rounding) is done by every thread for itself, which costs less than
 * meeting. The mathematics are those of SemVIELayer.forward.
 */
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>

#include "quantized.c"

typedef struct {
  Weight q, k, v, o, gate, up, down;
  const float *q_bias, *k_bias, *v_bias;        /* null where there are none */
  const float *attention_norm, *ffn_norm;
  const float *q_norm, *k_norm, *v_norm;        /* (head width), null where there are none */
  float *keys, *values;                         /* (rows, key/value heads, size, head width) */
} Layer;

typedef struct {
  long rows, width, heads, kv_heads, head_width;
  long size, longest;                           /* columns of the cache, and at least those that any row uses */
  const int64_t *used;                          /* (rows) columns in use with the new one, from the first */
  const float *rotary;                          /* (2, rows, head width): cosines, sines */
  double eps;
} Step;

/* What the threads share. Products are (rows, outputs). */
typedef struct {
  float *q, *k, *v, *mixed, *gate, *up, *out;
  Rows ffn;                                     /* of the second half: what `down` multiplies */
  int threads;
  atomic_int arrived, meeting;
  atomic_long *next;                            /* the next free piece of work, for each stretch between meetings */
} Team;

static void meet(Team *team) {
  int meeting = atomic_load(&team->meeting);
  if (atomic_fetch_add(&team->arrived, 1) == team->threads - 1) {
    atomic_store(&team->arrived, 0);
    atomic_fetch_add(&team->meeting, 1);
    return;
  }
  for (long spins = 0; atomic_load_explicit(&team->meeting, memory_order_acquire) == meeting; spins++) {
    if (spins < 20000) __builtin_ia32_pause();
    else sched_yield();                         /* somebody else needs this core */
  }
}

/* e^x to 2e-7 of its value: 2^n e^r, e^r by its series. */
static inline float exponential(float x) {
  const float round = 12582912;
  x = x < -87 ? -87 : x > 88 ? 88 : x;
  float shifted = x * 1.44269504f + round, n = shifted - round;
  float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float series = 1 + r * (1 + r * (0.5f + r * (0.16666667f + r * (0.041666668f + r * (0.0083333338f + r * 0.0013888889f)))));
  int32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  memcpy(&power, &bits, sizeof power);
  return series * power;
}

/* out = weight * x / rms(x); x may be out. */
static inline void norm(const float *x, const float *weight, long width, double eps, float *out) {
  float squares = 0;
#pragma omp simd reduction(+ : squares)
  for (long i = 0; i < width; i++) squares += x[i] * x[i];
  float scale = 1 / sqrtf(squares / width + (float)eps);
#pragma omp simd
  for (long i = 0; i < width; i++) out[i] = weight[i] * (x[i] * scale);
}

/* A head's query, key or value out of its projection: bias, norm, and (unless rotary is null) its turn. */
static inline void finish_head(const float *from, const float *bias, const float *weight, const Step *step, long row, long head,
                               int turn, float *out) {
  long width = step->head_width, half = width / 2;
  for (long i = 0; i < width; i++) out[i] = from[i] + (bias ? bias[head * width + i] : 0);
  if (weight) norm(out, weight, width, step->eps, out);
  if (!turn) return;
  const float *cosines = step->rotary + row * width, *sines = cosines + step->rows * width;
  for (long i = 0; i < half; i++) {
    float left = out[i], right = out[i + half];
    out[i] = left * cosines[i] - right * sines[i];
    out[i + half] = right * cosines[i + half] + left * sines[i + half];
  }
}

/* Attention of one row's head over the cache and the new column, which the first head of a group also stores. */
static void attend(Team *team, const Layer *layer, const Step *step, long row, long head, float *scratch) {
  long width = step->head_width, group = step->heads / step->kv_heads, kv = head / group, past = step->used[row] - 1;
  float *query = scratch, *key = query + width, *value = key + width, *shares = value + width;
  finish_head(team->q + row * layer->q.outputs + head * width, layer->q_bias, layer->q_norm, step, row, head, 1, query);
  finish_head(team->k + row * layer->k.outputs + kv * width, layer->k_bias, layer->k_norm, step, row, kv, 1, key);
  finish_head(team->v + row * layer->k.outputs + kv * width, layer->v_bias, layer->v_norm, step, row, kv, 0, value);
  float *keys = layer->keys + (row * step->kv_heads + kv) * step->size * width;
  float *values = layer->values + (row * step->kv_heads + kv) * step->size * width;
  float scale = 1 / sqrtf((float)width), largest = -INFINITY, sum = 0;
  for (long column = 0; column <= past; column++) {
    const float *one = column < past ? keys + column * width : key;
    float dot = 0;
#pragma omp simd reduction(+ : dot)
    for (long i = 0; i < width; i++) dot += query[i] * one[i];
    shares[column] = dot * scale;
    largest = shares[column] > largest ? shares[column] : largest;
  }
#pragma omp simd reduction(+ : sum)
  for (long column = 0; column <= past; column++) {
    shares[column] = exponential(shares[column] - largest);
    sum += shares[column];
  }
  float *mixed = team->mixed + (row * step->heads + head) * width;
  for (long i = 0; i < width; i++) mixed[i] = 0;
  for (long column = 0; column <= past; column++) {
    const float *one = column < past ? values + column * width : value;
    float share = shares[column] / sum;
#pragma omp simd
    for (long i = 0; i < width; i++) mixed[i] += share * one[i];
  }
  if (head % group == 0) {
    memcpy(keys + past * width, key, width * sizeof(float));
    memcpy(values + past * width, value, width * sizeof(float));
  }
}

/* SiLU(gate) * up, rounded or in the place of gate: this thread's share of it. */
static void gate_up(Team *team, const Layer *layer, const Step *step, int thread) {
  long inputs = team->ffn.inputs, blocks = (inputs + BLOCK - 1) / BLOCK, all = step->rows * blocks;
  for (long i = all * thread / team->threads; i < all * (thread + 1) / team->threads; i++) {
    long row = i / blocks, block = i % blocks, count = least(BLOCK, inputs - block * BLOCK);
    float *gate = team->gate + row * layer->gate.outputs + block * BLOCK, *up = team->up + row * layer->gate.outputs + block * BLOCK;
    if (count == BLOCK) {
#pragma omp simd
      for (int j = 0; j < BLOCK; j++) gate[j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
    } else {
      for (long j = 0; j < count; j++) gate[j] = gate[j] / (1 + exponential(-gate[j])) * up[j];
    }
    if (layer->down.bits != 16) round_block(gate, &team->ffn, row, block);
  }
}

static void multiply(Team *team, const Rows *x, const Weight *weights, float *const *outs, long count, atomic_long *next) {
  while (run_any_chunk(x, weights, outs, count, atomic_fetch_add(next, 1))) continue;
  meet(team);
}

static void run_layer(Team *team, const Layer *layer, const Step *step, int thread, float *x, float *scratch, void *rounding,
                      atomic_long *next) {
  long rows = step->rows, width = step->width, bits = layer->q.bits;
  for (long row = 0; row < rows; row++) norm(x + row * width, layer->attention_norm, width, step->eps, scratch + row * width);
  Rows taken = take_rows(scratch, rows, width, bits, rounding);
  multiply(team, &taken, &layer->q, (float *const[]){team->q, team->k, team->v}, 3, next);
  for (long i; (i = atomic_fetch_add(next + 1, 1)) < rows * step->heads;)
    attend(team, layer, step, i / step->heads, i % step->heads, scratch);
  meet(team);
  taken = take_rows(team->mixed, rows, layer->o.inputs, bits, rounding);
  multiply(team, &taken, &layer->o, &team->out, 1, next + 2);
  for (long row = 0; row < rows; row++) {
    for (long i = 0; i < width; i++) x[row * width + i] += team->out[row * layer->o.outputs + i];
    norm(x + row * width, layer->ffn_norm, width, step->eps, scratch + row * width);
  }
  taken = take_rows(scratch, rows, width, bits, rounding);
  multiply(team, &taken, &layer->gate, (float *const[]){team->gate, team->up}, 2, next + 3);
  gate_up(team, layer, step, thread);
  meet(team);
  multiply(team, &team->ffn, &layer->down, &team->out, 1, next + 4);
  for (long row = 0; row < rows; row++)
    for (long i = 0; i < width; i++) x[row * width + i] += team->out[row * layer->down.outputs + i];
}

enum { STRETCHES = 5 }; /* of work that is shared out piece by piece, in a layer */

/* x (rows, width) through `count` layers, in place; the caches get a column. Returns 0, or 1 when memory ran out. */
int mars_decode(float *x, const Layer *layers, long count, const Step *step) {
  long rows = step->rows, width = step->width, heads = step->heads * step->head_width, ffn = layers->gate.outputs;
  long queries = layers->q.outputs, kv = layers->k.outputs;
  long shared = rows * (queries + 2 * kv + heads + 2 * ffn + layers->o.outputs) * sizeof(float);
  long attention = 3 * step->head_width + step->longest, scratch = rows * width > attention ? rows * width : attention;
  long own = (rows * width + scratch) * sizeof(float) + rounded_bytes(rows, width > heads ? width : heads);
  own = (own + LINE - 1) / LINE * LINE;
  char *memory = malloc(shared + rounded_bytes(rows, ffn) + own * omp_get_max_threads());
  atomic_long *next = calloc(count * STRETCHES, sizeof *next);
  if (memory && next) {
    Team team = {.q = (float *)memory};
    team.k = team.q + rows * queries, team.v = team.k + rows * kv, team.mixed = team.v + rows * kv;
    team.gate = team.mixed + rows * heads, team.up = team.gate + rows * ffn, team.out = team.up + rows * ffn;
    team.ffn = rounded_in(memory + shared, rows, layers->down.inputs);
    team.ffn.whole = team.gate, team.ffn.stride = ffn;
#pragma omp parallel
    {
#pragma omp single
      team.threads = omp_get_num_threads();
      int thread = omp_get_thread_num();
      float *mine = (float *)(memory + shared + rounded_bytes(rows, ffn) + own * thread), *rest = mine + rows * width;
      memcpy(mine, x, rows * width * sizeof(float));
      for (long i = 0; i < count; i++)
        run_layer(&team, layers + i, step, thread, mine, rest, rest + scratch, next + i * STRETCHES);
#pragma omp barrier
      if (thread == 0) memcpy(x, mine, rows * width * sizeof(float));
    }
  }
  int failed = !memory || !next;
  free(memory), free(next);
  return failed;
}
