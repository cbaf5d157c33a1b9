#include <math.h>
#include <stddef.h>
#include <string.h>

#include "capi_test.h"

static const char* const kNoCall = "call: expected an address, got a null pointer";
static const char* const kNoLayer = "layer: expected an address, got a null pointer";
static const char* const kNoOptions = "options: expected an address, got a null pointer";
static const char* const kNoOut = "out: expected an address, got a null pointer";
static const char* const kNoRuntime = "runtime: expected an address, got a null pointer";

/* ---- Calls ---- */

static void TestOptionsThatCallsRefuse(cpumoe_runtime* runtime, cpumoe_layer* packed) {
  cpumoe_call* call = NULL;
  cpumoe_call_options options = kFp32;
#define REFUSED(text)                                                                        \
  CHECK_FAILS(cpumoe_call_create(runtime, packed, &options, &call), CPUMOE_INVALID_ARGUMENT, \
              text);                                                                         \
  options = kFp32
  options.output_dtype = 3;
  REFUSED("output_dtype: unknown value 3");
  options.input_dtype = -1;
  REFUSED("input_dtype: unknown value -1");
  options.top_k = -1;
  REFUSED("top_k: expected 0 or more, got -1");
  options.top_k = INT64_MAX;
  REFUSED("top_k: expected at most 65536, got 9223372036854775807");
  options.output_dtype = CPUMOE_FP16;
  options.accumulate = 1;
  REFUSED("accumulate: results can be added onto an fp32 output only");
#undef REFUSED
  CHECK_FAILS(cpumoe_call_create(NULL, packed, &kFp32, &call), CPUMOE_INVALID_ARGUMENT, kNoRuntime);
  CHECK_FAILS(cpumoe_call_create(runtime, NULL, &kFp32, &call), CPUMOE_INVALID_ARGUMENT, kNoLayer);
  CHECK_FAILS(cpumoe_call_create(runtime, packed, NULL, &call), CPUMOE_INVALID_ARGUMENT,
              kNoOptions);
  CHECK_FAILS(cpumoe_call_create(runtime, packed, &kFp32, NULL), CPUMOE_INVALID_ARGUMENT, kNoOut);
  CHECK(call == NULL);
}

static void TestTensorsThatCallsRefuse(cpumoe_call* call, const cpumoe_tensors* good) {
  cpumoe_tensors bad = *good;
#define REFUSED(text)                                                         \
  CHECK_FAILS(cpumoe_call_bind(call, &bad), CPUMOE_INVALID_ARGUMENT, (text)); \
  bad = *good
  bad.hidden_stride = HIDDEN - 1;
  REFUSED(
      "hidden_stride: expected at least the 64 elements of a row, or 0 for rows that follow each "
      "other, got 63");
  bad.hidden_stride = INT64_MAX;
  REFUSED("hidden_stride: expected 0 to 72057594037927936 for 4 rows, got 9223372036854775807");
  bad.hidden_stride = INT64_MAX / TOKENS;
  REFUSED("hidden_stride: expected 0 to 72057594037927936 for 4 rows, got 2305843009213693951");
  bad.tokens = -1;
  REFUSED("tokens: expected 0 or more, got -1");
  bad.tokens = INT64_MAX;
  REFUSED("tokens: expected at most 2147483648, got 9223372036854775807");
  bad.hidden_states = NULL;
  REFUSED("hidden_states: expected an address, got a null pointer");
  bad.ids = NULL;
  REFUSED("ids: expected an address, got a null pointer");
  bad.weights = NULL;
  REFUSED("weights: expected an address, got a null pointer");
  bad.output = NULL;
  REFUSED("output: expected an address, got a null pointer");
#undef REFUSED
  CHECK_FAILS(cpumoe_call_bind(call, NULL), CPUMOE_INVALID_ARGUMENT,
              "tensors: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_bind(NULL, good), CPUMOE_INVALID_ARGUMENT, kNoCall);
}

/* Every way to make a call reports an id that no host may pass. */
static void TestFailuresOfRuns(cpumoe_call* call, Batch* batch) {
  const char* const kId =
      "topk_ids[1, 1]: expert ids must be in [0, 3), or -1 or 3 for an expert to skip; got 9";
  const cpumoe_tensors tensors = Tensors(batch);
  batch->ids[1][1] = 9;
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_call_run(call), CPUMOE_OUT_OF_RANGE, kId);
  CHECK(cpumoe_call_take_error(call) == CPUMOE_OK); /* only the callback keeps errors */
  cpumoe_call_callback(call);
  CHECK_FAILS(cpumoe_call_take_error(call), CPUMOE_OUT_OF_RANGE, kId);
  CHECK(cpumoe_call_take_error(call) == CPUMOE_OK);
  cpumoe_pending* pending = NULL;
  CHECK(cpumoe_call_submit(call, 0, &pending) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_pending_wait(pending, 60), CPUMOE_OUT_OF_RANGE, kId);
  CHECK_FAILS(cpumoe_pending_wait(pending, INFINITY), CPUMOE_OUT_OF_RANGE, kId);
  CHECK_FAILS(cpumoe_pending_wait(pending, NAN), CPUMOE_INVALID_ARGUMENT,
              "seconds: expected a number, got nan");
  cpumoe_pending_destroy(pending);
}

void TestErrorsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors good = Tensors(&batch);
  cpumoe_call* call = NULL;
  TestOptionsThatCallsRefuse(runtime, packed);
  CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &good) == CPUMOE_OK);
  TestTensorsThatCallsRefuse(call, &good);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK); /* with the tensors that were bound before */
  CHECK(IsExpected(&batch, 1));
  TestFailuresOfRuns(call, &batch);
  CHECK_FAILS(cpumoe_call_run(NULL), CPUMOE_INVALID_ARGUMENT, kNoCall);
  CHECK_FAILS(cpumoe_call_submit(call, 0, NULL), CPUMOE_INVALID_ARGUMENT, kNoOut);
  CHECK_FAILS(cpumoe_pending_wait(NULL, 0), CPUMOE_INVALID_ARGUMENT,
              "pending: expected an address, got a null pointer");
  cpumoe_call_destroy(call);
  cpumoe_call_callback(NULL);
  cpumoe_call_destroy(NULL);
  cpumoe_pending_destroy(NULL);
}

/* ---- Layers ---- */

static void TestOptionsThatLayersRefuse(const Layer* layer) {
  cpumoe_layer* out = NULL;
  cpumoe_layer_options options = LayerOptions(layer);
#define REFUSED(text)                                                                \
  CHECK_FAILS(cpumoe_layer_create(&options, &out), CPUMOE_INVALID_ARGUMENT, (text)); \
  options = LayerOptions(layer)
  options.format = "fp3";
  const char known[] = "unknown weight format \"fp3\"; known are mxfp4, int4, ";
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), known, strlen(known)) == 0);
  options = LayerOptions(layer);
  options.format = NULL;
  REFUSED("format: expected an address, got a null pointer");
  options.hidden_size = 33;
  REFUSED("mxfp4: hidden_size must be a multiple of 2, because a byte has 2 codes, got 33");
  options.hidden_size = INT64_MIN;
  REFUSED("hidden_size must be positive, got -9223372036854775808");
  options.intermediate_size = INT64_MAX - 31;
  REFUSED("intermediate_size must be at most 2097152, got 9223372036854775776");
  options.num_experts = 0;
  REFUSED("num_experts must be positive, got 0");
  options.num_experts = INT64_MAX;
  REFUSED("num_experts must be at most 65536, got 9223372036854775807");
  options.precision = 7;
  REFUSED("precision: unknown value 7");
  options.scale_type = -1;
  REFUSED("scale_type: expected a cpumoe_scale_type, got -1");
  options.scale_type = CPUMOE_SCALE_FP16;
  REFUSED("mxfp4 has no fp16 scales");
  const cpumoe_glu no_gain = {.alpha = 0}, no_limit = {.alpha = 1, .limit = -1};
  const cpumoe_glu no_offset = {.alpha = 1, .up_offset = NAN};
  const cpumoe_glu unknown = {.function = 6, .alpha = 1};
  const cpumoe_glu no_cap = {.function = CPUMOE_GLU_SOFTCAPPED_SILU, .alpha = 1, .gate_cap = 4};
  const cpumoe_glu cap_of_silu = {.alpha = 1, .gate_cap = 4};
  const cpumoe_glu gain_of_gelu = {.function = CPUMOE_GLU_GELU, .alpha = 2};
  options.glu = &no_gain;
  REFUSED("glu.alpha: expected a positive and finite number, got 0");
  options.glu = &no_limit;
  REFUSED("glu.limit: expected a positive and finite number, or 0 for none, got -1");
  options.glu = &no_offset;
  REFUSED("glu.up_offset: expected a finite number, got nan");
  options.glu = &unknown;
  REFUSED("glu.function: unknown value 6");
  options.glu = &no_cap;
  REFUSED("glu.up_cap: expected a positive and finite number, got 0");
  options.glu = &cap_of_silu;
  REFUSED("glu.gate_cap: expected 0 for a function without caps, got 4");
  options.glu = &gain_of_gelu;
  REFUSED("glu.alpha: expected 1 for a function other than CPUMOE_GLU_SILU, got 2");
#undef REFUSED
  options.num_experts = 65536;
  options.hidden_size = options.intermediate_size = 1 << 21;
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_OUT_OF_MEMORY);
  CHECK(strstr(cpumoe_last_error(), " MiB for 65536 experts of ") != NULL);
  CHECK_FAILS(cpumoe_layer_create(NULL, &out), CPUMOE_INVALID_ARGUMENT, kNoOptions);
  CHECK_FAILS(cpumoe_layer_create(&options, NULL), CPUMOE_INVALID_ARGUMENT, kNoOut);
  CHECK(out == NULL);
}

static void TestWeightsThatLayersRefuse(cpumoe_runtime* runtime, cpumoe_layer* out,
                                        const Layer* layer) {
  cpumoe_expert expert = Expert(layer, 0);
#define REFUSED(text)                                                                         \
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 1, &expert, 1), CPUMOE_INVALID_ARGUMENT, text); \
  expert = Expert(layer, 0)
  expert.up.rows = 64;
  REFUSED("expert 1: up: expected [32, 64] weights, got [64, 64]");
  expert.down.columns = -1;
  REFUSED("expert 1: down: expected [64, 32] weights, got [64, -1]");
  expert.gate.columns = INT64_MAX;
  REFUSED("expert 1: gate: expected [32, 64] weights, got [32, 9223372036854775807]");
  expert.gate.codes = NULL;
  REFUSED("expert 1: gate.codes: expected an address, got a null pointer");
  expert.gate.scales = NULL;
  REFUSED("expert 1: gate.scales: expected an address, got a null pointer");
  expert.down.codes_stride = 15;
  REFUSED(
      "expert 1: down.codes_stride: expected at least the 16 bytes of a row, or 0 for rows that "
      "follow each other, got 15");
  expert.gate.scales_stride = 1;
  REFUSED(
      "expert 1: gate.scales_stride: expected at least the 2 bytes of a row, or 0 for rows that "
      "follow each other, got 1");
  expert.up.codes_stride = INT64_MAX;
  REFUSED(
      "expert 1: up.codes_stride: expected 0 to 36028797018963968 for 32 rows, got "
      "9223372036854775807");
  expert.up.scales_stride = INT64_MAX / INNER;
  REFUSED(
      "expert 1: up.scales_stride: expected 0 to 36028797018963968 for 32 rows, got "
      "288230376151711743");
  expert.gate.scale_rows = 128;
  REFUSED("expert 1: gate: mxfp4 has no blocks of 128 rows that share their scales");
  expert.gate.scale_rows = -1;
  REFUSED("expert 1: gate.scale_rows: expected a positive number, or 0 for 1, got -1");
  expert.down.scale_type = CPUMOE_SCALE_FP32;
  REFUSED(
      "expert 1: down: expected E8M0 scales, for which the layer of mxfp4 was made, got fp32 "
      "scales");
  expert.down.scale_type = CPUMOE_SCALE_FP16 + 1;
  REFUSED("expert 1: down.scale_type: expected a cpumoe_scale_type, got 6");
  expert.up.factor = 2;
  REFUSED("expert 1: up: mxfp4 has no factor, got 2");
  const float bias[HIDDEN] = {0};
  expert.down_bias = bias;
  REFUSED("expert 1: no biases expected, as the layer's has_bias says");
#undef REFUSED
}

static void TestExpertsThatDoNotExist(cpumoe_runtime* runtime, cpumoe_layer* out,
                                      const Layer* layer) {
  const cpumoe_expert expert = Expert(layer, 0);
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 3, &expert, 1), CPUMOE_OUT_OF_RANGE,
              "expert 3 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, -1, &expert, 1), CPUMOE_OUT_OF_RANGE,
              "expert -1 is not one of the layer's 3");
  /* Nothing is read of more experts than the layer has. */
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 0, &expert, INT64_MAX), CPUMOE_OUT_OF_RANGE,
              "expert 3 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, INT64_MAX, &expert, INT64_MAX), CPUMOE_OUT_OF_RANGE,
              "expert 9223372036854775807 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 0, &expert, -1), CPUMOE_INVALID_ARGUMENT,
              "count: expected 0 or more, got -1");
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 0, NULL, 1), CPUMOE_INVALID_ARGUMENT,
              "experts: expected an address, got a null pointer");
  CHECK(cpumoe_layer_pack(out, runtime, 0, NULL, 0) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_layer_pack(out, NULL, 0, &expert, 1), CPUMOE_INVALID_ARGUMENT, kNoRuntime);
  CHECK_FAILS(cpumoe_layer_pack(NULL, runtime, 0, &expert, 1), CPUMOE_INVALID_ARGUMENT, kNoLayer);
  CHECK_FAILS(cpumoe_layer_evict(out, 3), CPUMOE_OUT_OF_RANGE,
              "expert 3 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_evict(NULL, 0), CPUMOE_INVALID_ARGUMENT, kNoLayer);
}

static void TestExpertsWithoutWeights(cpumoe_runtime* runtime, cpumoe_layer* out,
                                      const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, out, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_call_run(call), CPUMOE_INVALID_ARGUMENT,
              "expert 0 has no weights, but a token is routed to it; pack it first");
  cpumoe_call_destroy(call);
}

/* A layer with biases, whose experts lack one. */
static void TestMissingBias(cpumoe_runtime* runtime) {
  static Layer biased;
  FillLayer(&biased, &kMxfp4, kPlain, 1);
  const cpumoe_layer_options options = LayerOptions(&biased);
  cpumoe_layer* out = NULL;
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_OK);
  cpumoe_expert expert = Expert(&biased, 0);
  expert.up_bias = NULL;
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 0, &expert, 1), CPUMOE_INVALID_ARGUMENT,
              "expert 0: three biases expected, as the layer's has_bias says");
  cpumoe_layer_destroy(out);
}

void TestErrorsOfLayers(cpumoe_runtime* runtime, const Layer* layer) {
  const cpumoe_layer_options options = LayerOptions(layer);
  cpumoe_layer* out = NULL;
  TestOptionsThatLayersRefuse(layer);
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_OK);
  TestWeightsThatLayersRefuse(runtime, out, layer);
  TestExpertsThatDoNotExist(runtime, out, layer);
  TestExpertsWithoutWeights(runtime, out, layer);
  cpumoe_layer_destroy(out);
  TestMissingBias(runtime);
  cpumoe_layer_destroy(NULL);
  CHECK(strcmp(cpumoe_layer_variant(NULL), "") == 0);
  CHECK(cpumoe_layer_nbytes(NULL) == 0);
}

/* ---- Runtimes ---- */

void TestErrorsOfRuntimes(void) {
  cpumoe_runtime* runtime = NULL;
  cpumoe_runtime_options options = {.threads = -1};
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "thread pool: threads must be from 1 to 4096, got -1");
  options.threads = INT32_MAX;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "thread pool: threads must be from 1 to 4096, got 2147483647");
  options.threads = 1;
  options.num_cpus = 2;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "cpus: expected an address, got a null pointer");
  const int32_t cpus[] = {0, -5};
  options.cpus = cpus;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "cpus[1]: expected 0 or more, got -5");
  options.num_cpus = -1;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "num_cpus: expected 0 or more, got -1");
  CHECK_FAILS(cpumoe_runtime_create(&options, NULL), CPUMOE_INVALID_ARGUMENT, kNoOut);
  CHECK(runtime == NULL);
  cpumoe_runtime_destroy(NULL);
}
