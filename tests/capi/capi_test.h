/* What the tests of the C interface share: checks, small layers with random weights, and a batch of
 * tokens with the results that plain loops give. */
#ifndef CPUMOE_TESTS_CAPI_TEST_H_
#define CPUMOE_TESTS_CAPI_TEST_H_

#include <stdint.h>

#include "cpumoe.h"

enum { EXPERTS = 3, HIDDEN = 64, INNER = 32, TOKENS = 4, TOP_K = 2, GROUP = 32 };

extern int failures;

#define CHECK(condition) Check((condition) != 0, #condition, __FILE__, __LINE__)
int Check(int condition, const char* what, const char* file, int line);

/* The call fails with this status and text. */
#define CHECK_FAILS(call, status, text) CheckFails((call), (status), (text), __FILE__, __LINE__)
void CheckFails(cpumoe_status got, cpumoe_status expected, const char* text, const char* file,
                int line);

/* Names the case that later checks are about, for their messages. */
void Describe(const char* format, ...);

typedef struct Format {
  const char* name;
  int scale_bytes;
  double values[16];  /* of the codes */
  int32_t scale_type; /* of the layer's options */
} Format;
extern const Format kMxfp4, kInt4, kInt4Fp16;

/* [INNER, HIDDEN] or [HIDDEN, INNER] */
typedef struct Matrix {
  uint8_t codes[HIDDEN * INNER / 2];
  uint8_t scales[HIDDEN * INNER / GROUP * 2];
} Matrix;

typedef struct Layer {
  const Format* format;
  cpumoe_glu glu;
  int has_bias;
  Matrix gate[EXPERTS], up[EXPERTS], down[EXPERTS];
  float gate_bias[EXPERTS][INNER], up_bias[EXPERTS][INNER], down_bias[EXPERTS][HIDDEN];
} Layer;

/* Hidden states are multiples of 1/128, which every dtype represents. */
typedef struct Batch {
  float hidden[TOKENS][HIDDEN];
  int64_t ids[TOKENS][TOP_K];
  float weights[TOKENS][TOP_K];
  float output[TOKENS][HIDDEN];
  double expected[TOKENS][HIDDEN];
} Batch;

extern const cpumoe_glu kPlain, kClamped;

/* Random weights, and random biases if the layer has biases. */
void FillLayer(Layer* layer, const Format* format, cpumoe_glu glu, int has_bias);
cpumoe_layer_options LayerOptions(const Layer* layer);
cpumoe_expert Expert(const Layer* layer, int expert);
/* Makes the layer that `options` describes and packs all experts. NULL and a failed check if that
 * is impossible. */
cpumoe_layer* PackLayer(cpumoe_runtime* runtime, const Layer* layer,
                        const cpumoe_layer_options* options);

/* Random hidden states, an output of zeros, and what the layer should give. */
void FillBatch(Batch* batch, const Layer* layer);
/* Computes `expected` again, for ids that have changed or with a mask. */
void Expect(Batch* batch, const Layer* layer, const uint8_t* mask);
cpumoe_tensors Tensors(Batch* batch);
/* Whether the output is `times` the expected one. */
int IsExpected(const Batch* batch, double times);
double Magnitude(const Batch* batch); /* the greatest absolute value of `expected` */

/* Elements of any dtype. */
int Size(int dtype);
void Encode(double value, int dtype, void* elements, int index);
double Decode(int dtype, const void* elements, int index);

extern const cpumoe_call_options kFp32; /* of calls with a Batch */

/* capi_options_test.c: what layers and calls can be told, on every variant. */
void TestOptionsOfLayers(cpumoe_runtime* runtime);
void TestOptionsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer);
void TestChoiceOfVariant(void);
void TestChoiceOfNodes(const Layer* layer);

/* capi_errors_test.c: what each function refuses, and how it says so. */
void TestErrorsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer);
void TestErrorsOfLayers(cpumoe_runtime* runtime, const Layer* layer);
void TestErrorsOfRuntimes(void);

#endif /* CPUMOE_TESTS_CAPI_TEST_H_ */
