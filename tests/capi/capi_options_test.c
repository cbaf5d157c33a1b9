#define _POSIX_C_SOURCE 200809L /* setenv */

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "capi_test.h"

/* CMake gives the variants that were built, each as a string followed by a comma. */
static const char* const kVariants[] = {CPUMOE_TEST_VARIANTS};
enum { VARIANTS = sizeof(kVariants) / sizeof(*kVariants) };

/* How a batch is passed to a call. */
typedef struct Passing {
  int input_dtype, output_dtype;
  int accumulate;
  int ids_are_64_bit;
  int gap; /* elements between rows of hidden states */
} Passing;

enum { MOST_GAP = 3 };
static const double kBefore = 0.5; /* in the output of a call that accumulates */

/* The greatest error relative to the greatest result. Weights are exact. Hidden states are exact in
 * every dtype, but the activations between up and down are not. */
static double Tolerance(const Passing* how, int precision) {
  const double computed = precision == CPUMOE_PRECISION_INT8 ? 0.05
                          : precision == CPUMOE_PRECISION_BF16 || how->input_dtype != CPUMOE_FP32
                              ? 0.01
                              : 1e-5;
  const double rounding[] = {1.0 / 256, 1.0 / 2048, 0}; /* of the output */
  return computed + rounding[how->output_dtype];
}

/* Calls the layer, and compares with the batch's `expected`. */
static void CheckCall(cpumoe_runtime* runtime, cpumoe_layer* packed, const Batch* batch,
                      const Passing* how, double tolerance) {
  static unsigned char hidden[TOKENS * (HIDDEN + MOST_GAP) * sizeof(float)];
  static unsigned char output[TOKENS * HIDDEN * sizeof(float)];
  static int32_t narrow_ids[TOKENS][TOP_K];
  memset(hidden, 0xff, sizeof(hidden)); /* NaN */
  memset(output, 0xff, sizeof(output));
  for (int t = 0; t < TOKENS; ++t) {
    for (int k = 0; k < HIDDEN; ++k) {
      Encode(batch->hidden[t][k], how->input_dtype, hidden, t * (HIDDEN + how->gap) + k);
      if (how->accumulate) Encode(kBefore, how->output_dtype, output, t * HIDDEN + k);
    }
    for (int s = 0; s < TOP_K; ++s) narrow_ids[t][s] = (int32_t)batch->ids[t][s];
  }
  const cpumoe_call_options options = {.input_dtype = how->input_dtype,
                                       .output_dtype = how->output_dtype,
                                       .accumulate = how->accumulate,
                                       .top_k = TOP_K,
                                       .ids_are_64_bit = how->ids_are_64_bit};
  const cpumoe_tensors tensors = {
      .tokens = TOKENS,
      .hidden_states = hidden,
      .hidden_stride = how->gap == 0 ? 0 : HIDDEN + how->gap,
      .ids = how->ids_are_64_bit ? (const void*)batch->ids : (const void*)narrow_ids,
      .weights = &batch->weights[0][0],
      .output = output};
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &options, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  cpumoe_call_destroy(call);
  const double limit = tolerance * Magnitude(batch);
  int wrong = 0;
  for (int i = 0; i < TOKENS * HIDDEN; ++i) {
    const double expected = batch->expected[i / HIDDEN][i % HIDDEN];
    const double got = Decode(how->output_dtype, output, i) - (how->accumulate ? kBefore : 0);
    if (!(fabs(got - expected) <= limit)) ++wrong; /* NaN as well */
  }
  CHECK(wrong == 0);
}

static void CheckEveryPassing(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer,
                              int precision) {
  static Batch batch;
  FillBatch(&batch, layer);
  CHECK(Magnitude(&batch) > 0.1);
  for (int dtypes = 0; dtypes < 9; ++dtypes) {
    for (int form = 0; form < 4; ++form) {
      Passing how = {.input_dtype = dtypes / 3,
                     .output_dtype = dtypes % 3,
                     .ids_are_64_bit = form & 1,
                     .gap = form & 2 ? MOST_GAP : 0};
      for (how.accumulate = 0; how.accumulate <= (how.output_dtype == CPUMOE_FP32);
           ++how.accumulate) {
        Describe("%s %s, bias %d, precision %d, dtypes %d to %d, form %d, accumulate %d",
                 cpumoe_layer_variant(packed), layer->format->name, layer->has_bias, precision,
                 how.input_dtype, how.output_dtype, form, how.accumulate);
        CheckCall(runtime, packed, &batch, &how, Tolerance(&how, precision));
      }
    }
  }
  Describe("");
}

/* A batch-invariant layer gives one token the bits that the token has in a batch. */
static void CheckInvariance(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  float alone[HIDDEN];
  FillBatch(&batch, layer);
  cpumoe_tensors tensors = Tensors(&batch);
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  tensors.tokens = 1;
  tensors.output = alone;
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(memcmp(alone, batch.output[0], sizeof(alone)) == 0);
  cpumoe_call_destroy(call);
}

/* Gate and up in one matrix, whose rows are theirs in turn. */
static void TestInterleavedRows(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  enum { CODES = HIDDEN / 2 };
  static uint8_t codes[INNER][2][CODES], scales[INNER][2][HIDDEN / GROUP * 2];
  static Batch batch;
  const int scale_bytes = HIDDEN / GROUP * layer->format->scale_bytes;
  for (int e = 0; e < EXPERTS; ++e) {
    const Matrix* const matrices[] = {&layer->gate[e], &layer->up[e]};
    for (int i = 0; i < 2 * INNER; ++i) {
      const int row = i / 2, which = i % 2;
      memcpy(codes[row][which], &matrices[which]->codes[row * CODES], CODES);
      memcpy(scales[row][which], &matrices[which]->scales[row * scale_bytes], (size_t)scale_bytes);
    }
    cpumoe_expert expert = Expert(layer, e);
    cpumoe_matrix* const views[] = {&expert.gate, &expert.up};
    for (int which = 0; which < 2; ++which) {
      views[which]->codes = codes[0][which];
      views[which]->codes_stride = sizeof(codes[0]);
      views[which]->scales = scales[0][which];
      views[which]->scales_stride = sizeof(scales[0]);
    }
    CHECK(cpumoe_layer_evict(packed, e) == CPUMOE_OK);
    CHECK(cpumoe_layer_pack(packed, runtime, e, &expert, 1) == CPUMOE_OK);
  }
  FillBatch(&batch, layer);
  const Passing how = {.input_dtype = CPUMOE_FP32, .output_dtype = CPUMOE_FP32};
  CheckCall(runtime, packed, &batch, &how, 1e-5);
}

static void CheckLayer(cpumoe_runtime* runtime, const Layer* layer, const char* variant,
                       int precision) {
  cpumoe_layer_options options = LayerOptions(layer);
  options.variant = variant;
  options.precision = precision;
  for (options.batch_invariant = 0; options.batch_invariant < 2; ++options.batch_invariant) {
    cpumoe_layer* const packed = PackLayer(runtime, layer, &options);
    if (packed == NULL) return;
    CHECK(strcmp(cpumoe_layer_variant(packed), variant) == 0);
    CheckEveryPassing(runtime, packed, layer, precision);
    if (options.batch_invariant) CheckInvariance(runtime, packed, layer);
    if (precision == CPUMOE_PRECISION_AUTO) TestInterleavedRows(runtime, packed, layer);
    cpumoe_layer_destroy(packed);
  }
}

/* Whether this CPU can run the variant. */
static int IsSupported(const char* variant) {
  static Layer layer;
  FillLayer(&layer, &kMxfp4, kPlain, 0);
  cpumoe_layer_options options = LayerOptions(&layer);
  options.variant = variant;
  cpumoe_layer* out = NULL;
  if (cpumoe_layer_create(&options, &out) == CPUMOE_OK) {
    cpumoe_layer_destroy(out);
    return 1;
  }
  char text[100];
  snprintf(text, sizeof(text), "variant=%s: this CPU lacks ", variant);
  CHECK(strncmp(cpumoe_last_error(), text, strlen(text)) == 0);
  return 0;
}

/* FP8 gives the same bits with a float per block and with a bf16 number per row. */
static void TestBlocksOfFp8(cpumoe_runtime* runtime) {
  static uint8_t codes[HIDDEN * INNER];
  static uint16_t rows[HIDDEN];
  static float output[2][TOKENS][HIDDEN];
  static Layer layer;
  static Batch batch;
  const float block = 0.0078125f; /* 0x3c00 in bf16 */
  for (int i = 0; i < HIDDEN * INNER; ++i) codes[i] = (uint8_t)(i * 37 % 127 | i % 2 << 7);
  for (int i = 0; i < HIDDEN; ++i) rows[i] = 0x3c00;
  FillLayer(&layer, &kMxfp4, kPlain, 0);
  FillBatch(&batch, &layer);
  cpumoe_layer_options options = LayerOptions(&layer);
  options.format = "fp8";
  for (int by_row = 0; by_row < 2; ++by_row) {
    cpumoe_matrix matrix = {.codes = codes, .scales = &block, .scale_rows = 128};
    if (by_row) {
      matrix.scales = rows;
      matrix.scale_rows = 0;
      matrix.scale_type = CPUMOE_SCALE_BF16;
    }
    cpumoe_expert expert = {.gate = matrix, .up = matrix, .down = matrix};
    expert.gate.rows = expert.up.rows = expert.down.columns = INNER;
    expert.gate.columns = expert.up.columns = expert.down.rows = HIDDEN;
    const cpumoe_expert experts[EXPERTS] = {expert, expert, expert};
    cpumoe_layer* packed = NULL;
    cpumoe_call* call = NULL;
    cpumoe_tensors tensors = Tensors(&batch);
    tensors.output = output[by_row];
    CHECK(cpumoe_layer_create(&options, &packed) == CPUMOE_OK);
    CHECK(cpumoe_layer_pack(packed, runtime, 0, experts, EXPERTS) == CPUMOE_OK);
    CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
    CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
    CHECK(cpumoe_call_run(call) == CPUMOE_OK);
    cpumoe_call_destroy(call);
    cpumoe_layer_destroy(packed);
  }
  CHECK(output[0][0][0] != 0);
  CHECK(memcmp(output[0], output[1], sizeof(output[0])) == 0);
}

void TestOptionsOfLayers(cpumoe_runtime* runtime) {
  TestBlocksOfFp8(runtime);
  static Layer layer;
  int tested = 0;
  for (int v = 0; v < VARIANTS; ++v) {
    if (!IsSupported(kVariants[v])) continue;
    ++tested;
    for (int kind = 0; kind < 6; ++kind) {
      const Format* const formats[] = {&kMxfp4, &kInt4, &kInt4Fp16};
      const int is_gpt_oss = kind / 3;
      FillLayer(&layer, formats[kind % 3], is_gpt_oss ? kClamped : kPlain, is_gpt_oss);
      for (int p = CPUMOE_PRECISION_AUTO; p <= CPUMOE_PRECISION_INT8; ++p) {
        CheckLayer(runtime, &layer, kVariants[v], p);
      }
    }
  }
  CHECK(tested > 0);
}

void TestOptionsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  uint8_t mask[EXPERTS] = {1, 1, 1};
  cpumoe_call_options options = kFp32;
  options.accumulate = 1;
  options.mask = mask;
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &options, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK); /* adds nothing */
  memset(mask, 0, sizeof(mask));
  for (int i = 0; i < 3; ++i) CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 3));

  memset(batch.output, 0, sizeof(batch.output));
  mask[2] = 1;
  batch.ids[0][0] = -1;
  batch.ids[1][1] = EXPERTS;
  Expect(&batch, layer, mask);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));
  cpumoe_call_destroy(call);
}

/* The variant of a layer whose options name `variant`, in an environment with CPUMOE_ISA. */
static cpumoe_status Choose(const char* environment, const char* variant, const char* expected) {
  static Layer layer;
  FillLayer(&layer, &kMxfp4, kPlain, 0);
  cpumoe_layer_options options = LayerOptions(&layer);
  options.variant = variant;
  cpumoe_layer* out = NULL;
  if (environment == NULL) {
    unsetenv("CPUMOE_ISA");
  } else {
    setenv("CPUMOE_ISA", environment, 1);
  }
  const cpumoe_status status = cpumoe_layer_create(&options, &out);
  if (status == CPUMOE_OK) CHECK(strcmp(cpumoe_layer_variant(out), expected) == 0);
  cpumoe_layer_destroy(out);
  return status;
}

void TestChoiceOfVariant(void) {
  const char* const given = getenv("CPUMOE_ISA");
  char* const before = given == NULL ? NULL : strcpy(malloc(strlen(given) + 1), given);
  const char *first = NULL, *best = NULL;
  for (int v = 0; v < VARIANTS; ++v) {
    if (!IsSupported(kVariants[v])) continue;
    if (first == NULL) first = kVariants[v];
    best = kVariants[v];
  }
  CHECK(Choose(NULL, NULL, best) == CPUMOE_OK);
  CHECK(Choose("", NULL, best) == CPUMOE_OK);
  CHECK(Choose(first, NULL, first) == CPUMOE_OK);
  CHECK(Choose(first, best, best) == CPUMOE_OK);
  CHECK(Choose("mmx", first, first) == CPUMOE_OK);
  CHECK(Choose("mmx", NULL, NULL) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "CPUMOE_ISA=mmx: unknown ISA; known are ", 39) == 0);
  CHECK(Choose(NULL, "mmx", NULL) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "variant=mmx: unknown ISA; known are ", 36) == 0);
  CHECK(Choose(NULL, "", NULL) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "variant=: unknown ISA; known are ", 33) == 0);
  if (before == NULL) {
    unsetenv("CPUMOE_ISA");
  } else {
    setenv("CPUMOE_ISA", before, 1);
  }
  free(before);
}

/* Packs the layer on a runtime with these options, which it destroys, and compares a call's
 * result. */
static void CheckRuntime(const cpumoe_runtime_options* options, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  cpumoe_runtime* runtime = NULL;
  if (!CHECK(cpumoe_runtime_create(options, &runtime) == CPUMOE_OK)) return;
  const cpumoe_layer_options described = LayerOptions(layer);
  cpumoe_layer* const packed = PackLayer(runtime, layer, &described);
  const cpumoe_tensors tensors = Tensors(&batch);
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));
  cpumoe_call_destroy(call);
  cpumoe_layer_destroy(packed);
  cpumoe_runtime_destroy(runtime);
}

static cpumoe_status CreateOn(const cpumoe_runtime_options* options) {
  cpumoe_runtime* runtime = NULL;
  const cpumoe_status status = cpumoe_runtime_create(options, &runtime);
  CHECK((status == CPUMOE_OK) == (runtime != NULL));
  cpumoe_runtime_destroy(runtime);
  return status;
}

/* A NUMA node of this machine. */
static int32_t SomeNode(void) {
  for (int32_t node = 0; node < 1024; ++node) {
    const cpumoe_runtime_options options = {.threads = 1, .nodes = &node, .num_nodes = 1};
    if (CreateOn(&options) == CPUMOE_OK) return node;
  }
  return -1;
}

void TestChoiceOfNodes(const Layer* layer) {
  const char* const given = getenv("CPUMOE_NODES");
  char* const before = given == NULL ? NULL : strcpy(malloc(strlen(given) + 1), given);
  const int32_t node = SomeNode();
  CHECK(node >= 0);
  char name[16];
  snprintf(name, sizeof(name), "[%d]", node);
  const char* const texts[] = {"auto", " 1 ", "", name};
  const cpumoe_runtime_options usual = {.threads = 2};
  for (size_t i = 0; i < sizeof(texts) / sizeof(*texts); ++i) {
    Describe("CPUMOE_NODES=%s", texts[i]);
    setenv("CPUMOE_NODES", texts[i], 1);
    CheckRuntime(&usual, layer);
  }
  Describe("nodes");
  setenv("CPUMOE_NODES", "some", 1);
  CHECK_FAILS(CreateOn(&usual), CPUMOE_INVALID_ARGUMENT,
              "CPUMOE_NODES: expected auto, 1 for the whole machine as one node, or node numbers "
              "as in 0,2 or [1], got 'some'");
  /* Options take precedence over the variable. */
  const cpumoe_runtime_options ignoring = {.threads = 2, .ignore_nodes = 1};
  CheckRuntime(&ignoring, layer);
  const cpumoe_runtime_options named = {.nodes = &node, .num_nodes = 1};
  CheckRuntime(&named, layer);

  const int32_t wrong[] = {node, node, 1 << 20};
  cpumoe_runtime_options options = {.threads = 1, .nodes = wrong, .num_nodes = 2};
  CHECK(CreateOn(&options) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "nodes: expected each node once, got [", 37) == 0);
  options.nodes = &wrong[2];
  options.num_nodes = 1;
  CHECK(CreateOn(&options) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "nodes: expected nodes whose CPUs and memory", 43) == 0);
  options.ignore_nodes = 1;
  CHECK_FAILS(CreateOn(&options), CPUMOE_INVALID_ARGUMENT,
              "nodes: expected none beside cpus or ignore_nodes, got 1");
  options.nodes = NULL;
  CHECK_FAILS(CreateOn(&options), CPUMOE_INVALID_ARGUMENT,
              "nodes: expected an address, got a null pointer");
  options.num_nodes = -1;
  CHECK_FAILS(CreateOn(&options), CPUMOE_INVALID_ARGUMENT, "num_nodes: expected 0 or more, got -1");
  if (before == NULL) {
    unsetenv("CPUMOE_NODES");
  } else {
    setenv("CPUMOE_NODES", before, 1);
  }
  free(before);
}
