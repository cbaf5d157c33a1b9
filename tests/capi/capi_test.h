/* What the tests of the C interface share: checks, a small layer of MXFP4 weights, and a batch of
 * tokens with the results that plain loops give. */
#ifndef CPUMOE_TESTS_CAPI_TEST_H_
#define CPUMOE_TESTS_CAPI_TEST_H_

#include <stdint.h>

#include "cpumoe.h"

enum { EXPERTS = 3, HIDDEN = 64, INNER = 32, TOKENS = 4, TOP_K = 2, GROUP = 32 };

extern int failures;

#define CHECK(condition) Check((condition) != 0, #condition, __LINE__)
void Check(int condition, const char* what, int line);

/* The call fails with this status and text. */
#define CHECK_FAILS(call, status, text) CheckFails((call), (status), (text), __LINE__)
void CheckFails(cpumoe_status got, cpumoe_status expected, const char* text, int line);

typedef struct Matrix {
  uint8_t codes[HIDDEN * INNER / 2];
  uint8_t scales[HIDDEN * INNER / GROUP];
} Matrix;

typedef struct Layer {
  Matrix gate[EXPERTS], up[EXPERTS], down[EXPERTS];
} Layer;

typedef struct Batch {
  float hidden[TOKENS][HIDDEN];
  int64_t ids[TOKENS][TOP_K];
  float weights[TOKENS][TOP_K];
  float output[TOKENS][HIDDEN];
  double expected[TOKENS][HIDDEN];
} Batch;

/* Random weights. */
void FillLayer(Layer* layer);
cpumoe_layer_options LayerOptions(void);
cpumoe_expert Expert(const Layer* layer, int expert);

/* Random hidden states, an output of zeros, and what the layer should give. */
void FillBatch(Batch* batch, const Layer* layer);
cpumoe_tensors Tensors(Batch* batch);
/* Whether the output is `times` the expected one. */
int IsExpected(const Batch* batch, double times);

extern const cpumoe_call_options kFp32; /* of calls with a Batch */

/* capi_errors_test.c: what each function refuses, and how it says so. */
void TestErrorsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer);
void TestErrorsOfLayers(cpumoe_runtime* runtime, const Layer* layer);
void TestErrorsOfRuntimes(void);

#endif /* CPUMOE_TESTS_CAPI_TEST_H_ */
