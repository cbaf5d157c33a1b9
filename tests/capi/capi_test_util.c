#include <math.h>
#include <stdio.h>
#include <string.h>

#include "capi_test.h"

int failures = 0;

void Check(int condition, const char* what, int line) {
  if (condition) return;
  ++failures;
  fprintf(stderr, "line %d: %s (last error: %s)\n", line, what, cpumoe_last_error());
}

void CheckFails(cpumoe_status got, cpumoe_status expected, const char* text, int line) {
  if (got == expected && strcmp(cpumoe_last_error(), text) == 0) return;
  ++failures;
  fprintf(stderr, "line %d: status %d, \"%s\"; expected %d, \"%s\"\n", line, (int)got,
          cpumoe_last_error(), (int)expected, text);
}

static uint32_t Random(void) {
  static uint32_t state = 12345;
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

static void FillMatrix(Matrix* matrix) {
  for (size_t i = 0; i < sizeof(matrix->codes); ++i) matrix->codes[i] = (uint8_t)Random();
  for (size_t i = 0; i < sizeof(matrix->scales); ++i) {
    matrix->scales[i] = (uint8_t)(121 + Random() % 4);
  }
}

void FillLayer(Layer* layer) {
  for (int e = 0; e < EXPERTS; ++e) {
    FillMatrix(&layer->gate[e]);
    FillMatrix(&layer->up[e]);
    FillMatrix(&layer->down[e]);
  }
}

static double Weight(const Matrix* matrix, int columns, int row, int column) {
  static const double kValues[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  const int index = row * columns + column;
  const int code = matrix->codes[index / 2] >> (index % 2 * 4) & 15;
  const double value = code & 8 ? -kValues[code & 7] : kValues[code];
  return ldexp(value, matrix->scales[index / GROUP] - 127);
}

static void Multiply(const Matrix* matrix, int rows, int columns, const double* x, double* y) {
  for (int row = 0; row < rows; ++row) {
    y[row] = 0;
    for (int k = 0; k < columns; ++k) y[row] += Weight(matrix, columns, row, k) * x[k];
  }
}

/* Adds weight * expert(x) to y. */
static void AddExpert(const Layer* layer, int expert, double weight, const float* x, double* y) {
  double in[HIDDEN], gate[INNER], up[INNER], out[HIDDEN];
  for (int k = 0; k < HIDDEN; ++k) in[k] = x[k];
  Multiply(&layer->gate[expert], INNER, HIDDEN, in, gate);
  Multiply(&layer->up[expert], INNER, HIDDEN, in, up);
  for (int i = 0; i < INNER; ++i) gate[i] = up[i] * gate[i] / (1 + exp(-gate[i]));
  Multiply(&layer->down[expert], HIDDEN, INNER, gate, out);
  for (int i = 0; i < HIDDEN; ++i) y[i] += weight * out[i];
}

static cpumoe_matrix View(const Matrix* matrix, int64_t rows, int64_t columns) {
  const cpumoe_matrix view = {
      .rows = rows, .columns = columns, .codes = matrix->codes, .scales = matrix->scales};
  return view;
}

cpumoe_expert Expert(const Layer* layer, int expert) {
  const cpumoe_expert source = {.gate = View(&layer->gate[expert], INNER, HIDDEN),
                                .up = View(&layer->up[expert], INNER, HIDDEN),
                                .down = View(&layer->down[expert], HIDDEN, INNER)};
  return source;
}

cpumoe_layer_options LayerOptions(void) {
  const cpumoe_layer_options options = {
      .format = "mxfp4", .num_experts = EXPERTS, .hidden_size = HIDDEN, .intermediate_size = INNER};
  return options;
}

void FillBatch(Batch* batch, const Layer* layer) {
  memset(batch, 0, sizeof(*batch));
  for (int t = 0; t < TOKENS; ++t) {
    for (int k = 0; k < HIDDEN; ++k) batch->hidden[t][k] = (float)(Random() % 2001) / 1000 - 1;
    for (int s = 0; s < TOP_K; ++s) {
      batch->ids[t][s] = (t + s) % EXPERTS;
      batch->weights[t][s] = 0.25f * (float)(s + 1);
      AddExpert(layer, (t + s) % EXPERTS, batch->weights[t][s], batch->hidden[t],
                batch->expected[t]);
    }
  }
}

cpumoe_tensors Tensors(Batch* batch) {
  const cpumoe_tensors tensors = {.tokens = TOKENS,
                                  .hidden_states = batch->hidden,
                                  .ids = batch->ids,
                                  .weights = &batch->weights[0][0],
                                  .output = batch->output};
  return tensors;
}

const cpumoe_call_options kFp32 = {
    .input_dtype = CPUMOE_FP32, .output_dtype = CPUMOE_FP32, .top_k = TOP_K, .ids_are_64_bit = 1};

int IsExpected(const Batch* batch, double times) {
  double magnitude = 0;
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < HIDDEN; ++i) {
      magnitude = fmax(magnitude, fabs(times * batch->expected[t][i]));
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < HIDDEN; ++i) {
      const double error = fabs(batch->output[t][i] - times * batch->expected[t][i]);
      if (!(error < 1e-5 * magnitude)) return 0; /* NaN as well */
    }
  }
  return magnitude > 0.1;
}
