/* Layers with random weights, and what they compute, in plain loops over doubles. */
#include <math.h>
#include <string.h>

#include "capi_test.h"

const Format kMxfp4 = {
    "mxfp4", 1, {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6},
    CPUMOE_SCALE_OWN};
#define INTEGERS {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}
const Format kInt4 = {"int4", 2, INTEGERS, CPUMOE_SCALE_OWN};
const Format kInt4Fp16 = {"int4", 2, INTEGERS, CPUMOE_SCALE_FP16};

const cpumoe_glu kPlain = {.alpha = 1};
const cpumoe_glu kClamped = {.alpha = 1.702f, .limit = 0.75f, .up_offset = 1};

const cpumoe_call_options kFp32 = {
    .input_dtype = CPUMOE_FP32, .output_dtype = CPUMOE_FP32, .top_k = TOP_K, .ids_are_64_bit = 1};

static uint32_t Random(void) {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

/* A multiple of 1/128 in [-1, 1]. */
static float RandomNumber(void) { return (float)((int)(Random() % 257) - 128) / 128; }

/* Scales are powers of two: the byte b of E8M0 is 2^(b - 127), and so are b << 7 in bf16 and
 * (b - 112) << 10 in fp16. */
static uint16_t ScaleOf(const Format* format, int exponent) {
  if (format->scale_type == CPUMOE_SCALE_FP16) return (uint16_t)((exponent - 112) << 10);
  return (uint16_t)(format->scale_bytes == 1 ? exponent : exponent << 7);
}

static void FillMatrix(Matrix* matrix, const Format* format) {
  for (size_t i = 0; i < sizeof(matrix->codes); ++i) matrix->codes[i] = (uint8_t)Random();
  for (int i = 0; i < HIDDEN * INNER / GROUP; ++i) {
    const uint16_t scale = ScaleOf(format, 121 + (int)(Random() % 4));
    memcpy(&matrix->scales[i * format->scale_bytes], &scale, (size_t)format->scale_bytes);
  }
}

static double Weight(const Matrix* matrix, const Format* format, int columns, int row, int column) {
  const int index = row * columns + column;
  const int code = matrix->codes[index / 2] >> (index % 2 * 4) & 15;
  uint16_t scale = 0;
  memcpy(&scale, &matrix->scales[index / GROUP * format->scale_bytes], (size_t)format->scale_bytes);
  int exponent = 121;
  while (ScaleOf(format, exponent) != scale) ++exponent;
  return ldexp(format->values[code], exponent - 127);
}

void FillLayer(Layer* layer, const Format* format, cpumoe_glu glu, int has_bias) {
  layer->format = format;
  layer->glu = glu;
  layer->has_bias = has_bias;
  for (int e = 0; e < EXPERTS; ++e) {
    FillMatrix(&layer->gate[e], format);
    FillMatrix(&layer->up[e], format);
    FillMatrix(&layer->down[e], format);
    for (int i = 0; i < INNER; ++i) layer->gate_bias[e][i] = has_bias ? RandomNumber() : 0;
    for (int i = 0; i < INNER; ++i) layer->up_bias[e][i] = has_bias ? RandomNumber() : 0;
    for (int i = 0; i < HIDDEN; ++i) layer->down_bias[e][i] = has_bias ? RandomNumber() : 0;
  }
}

cpumoe_layer_options LayerOptions(const Layer* layer) {
  const cpumoe_layer_options options = {.format = layer->format->name,
                                        .num_experts = EXPERTS,
                                        .hidden_size = HIDDEN,
                                        .intermediate_size = INNER,
                                        .glu = &layer->glu,
                                        .has_bias = layer->has_bias,
                                        .scale_type = layer->format->scale_type};
  return options;
}

static cpumoe_matrix View(const Matrix* matrix, int64_t rows, int64_t columns) {
  const cpumoe_matrix view = {
      .rows = rows, .columns = columns, .codes = matrix->codes, .scales = matrix->scales};
  return view;
}

cpumoe_expert Expert(const Layer* layer, int expert) {
  const cpumoe_expert source = {.gate = View(&layer->gate[expert], INNER, HIDDEN),
                                .up = View(&layer->up[expert], INNER, HIDDEN),
                                .down = View(&layer->down[expert], HIDDEN, INNER),
                                .gate_bias = layer->has_bias ? layer->gate_bias[expert] : NULL,
                                .up_bias = layer->has_bias ? layer->up_bias[expert] : NULL,
                                .down_bias = layer->has_bias ? layer->down_bias[expert] : NULL};
  return source;
}

cpumoe_layer* PackLayer(cpumoe_runtime* runtime, const Layer* layer,
                        const cpumoe_layer_options* options) {
  cpumoe_layer* packed = NULL;
  if (!CHECK(cpumoe_layer_create(options, &packed) == CPUMOE_OK)) return NULL;
  cpumoe_expert experts[EXPERTS];
  for (int e = 0; e < EXPERTS; ++e) experts[e] = Expert(layer, e);
  CHECK(cpumoe_layer_pack(packed, runtime, 0, experts, EXPERTS) == CPUMOE_OK);
  return packed;
}

static void Multiply(const Layer* layer, const Matrix* matrix, const float* bias, int rows,
                     int columns, const double* x, double* y) {
  for (int row = 0; row < rows; ++row) {
    y[row] = bias[row];
    for (int k = 0; k < columns; ++k) {
      y[row] += Weight(matrix, layer->format, columns, row, k) * x[k];
    }
  }
}

static double Activate(const cpumoe_glu* glu, double gate, double up) {
  const double limit = glu->limit == 0 ? INFINITY : glu->limit;
  const double g = fmin(gate, limit), u = fmax(-limit, fmin(up, limit));
  return (u + glu->up_offset) * g / (1 + exp(-glu->alpha * g));
}

/* Adds weight * expert(x) to y. */
static void AddExpert(const Layer* layer, int64_t expert, double weight, const float* x,
                      double* y) {
  double in[HIDDEN], gate[INNER], up[INNER], out[HIDDEN];
  for (int k = 0; k < HIDDEN; ++k) in[k] = x[k];
  Multiply(layer, &layer->gate[expert], layer->gate_bias[expert], INNER, HIDDEN, in, gate);
  Multiply(layer, &layer->up[expert], layer->up_bias[expert], INNER, HIDDEN, in, up);
  for (int i = 0; i < INNER; ++i) gate[i] = Activate(&layer->glu, gate[i], up[i]);
  Multiply(layer, &layer->down[expert], layer->down_bias[expert], HIDDEN, INNER, gate, out);
  for (int i = 0; i < HIDDEN; ++i) y[i] += weight * out[i];
}

void Expect(Batch* batch, const Layer* layer, const uint8_t* mask) {
  memset(batch->expected, 0, sizeof(batch->expected));
  for (int t = 0; t < TOKENS; ++t) {
    for (int s = 0; s < TOP_K; ++s) {
      const int64_t id = batch->ids[t][s];
      if (id < 0 || id >= EXPERTS || (mask != NULL && mask[id] != 0)) continue;
      AddExpert(layer, id, batch->weights[t][s], batch->hidden[t], batch->expected[t]);
    }
  }
}

void FillBatch(Batch* batch, const Layer* layer) {
  memset(batch, 0, sizeof(*batch));
  for (int t = 0; t < TOKENS; ++t) {
    for (int k = 0; k < HIDDEN; ++k) batch->hidden[t][k] = RandomNumber();
    for (int s = 0; s < TOP_K; ++s) {
      batch->ids[t][s] = (t + s) % EXPERTS;
      batch->weights[t][s] = 0.25f * (float)(s + 1);
    }
  }
  Expect(batch, layer, NULL);
}

cpumoe_tensors Tensors(Batch* batch) {
  const cpumoe_tensors tensors = {.tokens = TOKENS,
                                  .hidden_states = batch->hidden,
                                  .ids = batch->ids,
                                  .weights = &batch->weights[0][0],
                                  .output = batch->output};
  return tensors;
}
