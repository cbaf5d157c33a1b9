#include <math.h>
#include <stddef.h>
#include <string.h>

#include "capi_test.h"

void TestErrorsOfCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors good = Tensors(&batch);
  cpumoe_call* call = NULL;
  cpumoe_call_options options = kFp32;
#define REFUSED(text) \
  CHECK_FAILS(cpumoe_call_create(runtime, packed, &options, &call), CPUMOE_INVALID_ARGUMENT, text)
  options.output_dtype = 3;
  REFUSED("output_dtype: unknown value 3");
  options = kFp32;
  options.top_k = -1;
  REFUSED("top_k: expected 0 or more, got -1");
  options = kFp32;
  options.output_dtype = CPUMOE_FP16;
  options.accumulate = 1;
  REFUSED("accumulate: results can be added onto an fp32 output only");
#undef REFUSED
  CHECK_FAILS(cpumoe_call_create(NULL, packed, &kFp32, &call), CPUMOE_INVALID_ARGUMENT,
              "runtime: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_create(runtime, NULL, &kFp32, &call), CPUMOE_INVALID_ARGUMENT,
              "layer: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_create(runtime, packed, NULL, &call), CPUMOE_INVALID_ARGUMENT,
              "options: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_create(runtime, packed, &kFp32, NULL), CPUMOE_INVALID_ARGUMENT,
              "out: expected an address, got a null pointer");
  CHECK(call == NULL);

  CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
  cpumoe_tensors bad = good;
  bad.hidden_stride = HIDDEN - 1;
  CHECK_FAILS(cpumoe_call_bind(call, &bad), CPUMOE_INVALID_ARGUMENT,
              "hidden_stride: expected at least the 64 elements of a row, or 0 for rows that "
              "follow each other, got 63");
  bad = good;
  bad.output = NULL;
  CHECK_FAILS(cpumoe_call_bind(call, &bad), CPUMOE_INVALID_ARGUMENT,
              "output: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_bind(call, NULL), CPUMOE_INVALID_ARGUMENT,
              "tensors: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_run(NULL), CPUMOE_INVALID_ARGUMENT,
              "call: expected an address, got a null pointer");
  cpumoe_call_callback(NULL);

  const char* const kId =
      "topk_ids[1, 1]: expert ids must be in [0, 3), or -1 or 3 for an expert to skip; got 9";
  batch.ids[1][1] = 9;
  CHECK(cpumoe_call_bind(call, &good) == CPUMOE_OK);
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
  CHECK_FAILS(cpumoe_pending_wait(NULL, 0), CPUMOE_INVALID_ARGUMENT,
              "pending: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_call_submit(call, 0, NULL), CPUMOE_INVALID_ARGUMENT,
              "out: expected an address, got a null pointer");
  cpumoe_call_destroy(call);
  cpumoe_call_destroy(NULL);
  cpumoe_pending_destroy(NULL);
}

void TestErrorsOfLayers(cpumoe_runtime* runtime, const Layer* layer) {
  cpumoe_layer* out = NULL;
  cpumoe_layer_options options = LayerOptions();
#define REFUSED(text) \
  CHECK_FAILS(cpumoe_layer_create(&options, &out), CPUMOE_INVALID_ARGUMENT, text)
  options.format = "fp3";
  REFUSED("unknown weight format \"fp3\"; known are mxfp4, int4");
  options.format = NULL;
  REFUSED("format: expected an address, got a null pointer");
  options = LayerOptions();
  options.hidden_size = 33;
  REFUSED("mxfp4: hidden_size must be a positive multiple of 32, got 33");
  options = LayerOptions();
  options.num_experts = 0;
  REFUSED("num_experts must be positive, got 0");
  options = LayerOptions();
  options.precision = 7;
  REFUSED("precision: unknown value 7");
  options = LayerOptions();
  const cpumoe_swiglu no_gain = {.alpha = 0}, no_limit = {.alpha = 1, .limit = -1};
  options.swiglu = &no_gain;
  REFUSED("swiglu.alpha: expected a positive and finite number, got 0");
  options.swiglu = &no_limit;
  REFUSED("swiglu.limit: expected a positive and finite number, or 0 for none, got -1");
#undef REFUSED
  options = LayerOptions();
  options.variant = "mmx";
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_INVALID_ARGUMENT);
  CHECK(strncmp(cpumoe_last_error(), "variant=mmx: unknown ISA; ", 26) == 0);
  options = LayerOptions();
  options.num_experts = 65536;
  options.hidden_size = options.intermediate_size = 1 << 21;
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_OUT_OF_MEMORY);
  CHECK(strstr(cpumoe_last_error(), " MiB for 65536 experts of ") != NULL);
  CHECK(out == NULL);

  options = LayerOptions();
  CHECK(cpumoe_layer_create(&options, &out) == CPUMOE_OK);
  cpumoe_expert expert = Expert(layer, 0);
#define REFUSED(text)                                                                         \
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 1, &expert, 1), CPUMOE_INVALID_ARGUMENT, text); \
  expert = Expert(layer, 0)
  expert.up.rows = 64;
  REFUSED("expert 1: up: expected [32, 64] weights, got [64, 64]");
  expert.down.columns = -1;
  REFUSED("expert 1: down.columns: expected 0 or more, got -1");
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
  const float bias[HIDDEN] = {0};
  expert.down_bias = bias;
  REFUSED("expert 1: no biases expected, as the layer's has_bias says");
#undef REFUSED
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 3, &expert, 1), CPUMOE_OUT_OF_RANGE,
              "expert 3 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_pack(out, runtime, 0, &expert, -1), CPUMOE_INVALID_ARGUMENT,
              "count: expected 0 or more, got -1");
  CHECK_FAILS(cpumoe_layer_pack(out, NULL, 0, &expert, 1), CPUMOE_INVALID_ARGUMENT,
              "runtime: expected an address, got a null pointer");
  CHECK_FAILS(cpumoe_layer_pack(NULL, runtime, 0, &expert, 1), CPUMOE_INVALID_ARGUMENT,
              "layer: expected an address, got a null pointer");

  /* An expert that is not packed. */
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, out, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_call_run(call), CPUMOE_INVALID_ARGUMENT,
              "expert 0 has no weights, but a token is routed to it; pack it first");
  cpumoe_call_destroy(call);
  CHECK_FAILS(cpumoe_layer_evict(out, 3), CPUMOE_OUT_OF_RANGE,
              "expert 3 is not one of the layer's 3");
  CHECK_FAILS(cpumoe_layer_evict(NULL, 0), CPUMOE_INVALID_ARGUMENT,
              "layer: expected an address, got a null pointer");
  cpumoe_layer_destroy(out);
  cpumoe_layer_destroy(NULL);
  CHECK(strcmp(cpumoe_layer_variant(NULL), "") == 0);
  CHECK(cpumoe_layer_nbytes(NULL) == 0);
}

void TestErrorsOfRuntimes(void) {
  cpumoe_runtime* runtime = NULL;
  cpumoe_runtime_options options = {.threads = -1};
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "thread pool: threads must be from 1 to 4096, got -1");
  options.threads = 1;
  options.num_cpus = 2;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "cpus: expected an address, got a null pointer");
  const int32_t cpus[] = {0, -5};
  options.cpus = cpus;
  CHECK_FAILS(cpumoe_runtime_create(&options, &runtime), CPUMOE_INVALID_ARGUMENT,
              "cpus[1]: expected 0 or more, got -5");
  CHECK_FAILS(cpumoe_runtime_create(&options, NULL), CPUMOE_INVALID_ARGUMENT,
              "out: expected an address, got a null pointer");
  CHECK(runtime == NULL);
  cpumoe_runtime_destroy(NULL);
}
