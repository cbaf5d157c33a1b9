/* The C interface, from C: a layer is computed and compared with plain loops. */
#include "capi_test.h"

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

static void TestCalls(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK); /* no tokens yet */
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));

  memset(batch.output, 0, sizeof(batch.output));
  void (*const function)(void*) = cpumoe_call_callback;
  function(call);
  CHECK(cpumoe_call_take_error(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));

  memset(batch.output, 0, sizeof(batch.output));
  cpumoe_pending* pending = NULL;
  CHECK(cpumoe_call_submit(call, 1, &pending) == CPUMOE_OK);
  memset(batch.ids, 0x55, sizeof(batch.ids)); /* they have been copied */
  CHECK(cpumoe_pending_wait(pending, INFINITY) == CPUMOE_OK);
  CHECK(cpumoe_pending_wait(pending, 0) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));
  cpumoe_pending_destroy(pending);
  cpumoe_call_destroy(call);
}

/* An evicted expert has no weights. Masked, it is not needed. */
static void TestEviction(cpumoe_runtime* runtime, cpumoe_layer* packed, const Layer* layer) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  const cpumoe_expert expert = Expert(layer, 1);
  uint8_t mask[EXPERTS] = {0};
  cpumoe_call_options options = kFp32;
  options.mask = mask;
  cpumoe_call* call = NULL;
  CHECK(cpumoe_call_create(runtime, packed, &options, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  CHECK(cpumoe_layer_evict(packed, 1) == CPUMOE_OK);
  CHECK_FAILS(cpumoe_call_run(call), CPUMOE_INVALID_ARGUMENT,
              "expert 1 has no weights, but a token is routed to it; pack it first");
  mask[1] = 1;
  Expect(&batch, layer, mask);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));
  CHECK(cpumoe_layer_evict(packed, 1) == CPUMOE_OK); /* again */
  CHECK(cpumoe_layer_pack(packed, runtime, 1, &expert, 1) == CPUMOE_OK);
  mask[1] = 0;
  Expect(&batch, layer, mask);
  CHECK(cpumoe_call_run(call) == CPUMOE_OK);
  CHECK(IsExpected(&batch, 1));
  cpumoe_call_destroy(call);
}

/* A runtime of one named CPU, whose callers compute or wait. A CPU that does not exist is no error:
 * the system then chooses. */
static void TestRuntimes(cpumoe_layer* packed, const Layer* layer, int32_t cpu) {
  static Batch batch;
  FillBatch(&batch, layer);
  const cpumoe_tensors tensors = Tensors(&batch);
  for (int waits = 0; waits < 2; ++waits) {
    const cpumoe_runtime_options one = {.cpus = &cpu, .num_cpus = 1, .callers_wait = waits};
    cpumoe_runtime* runtime = NULL;
    cpumoe_call* call = NULL;
    cpumoe_pending* pending = NULL;
    CHECK(cpumoe_runtime_create(&one, &runtime) == CPUMOE_OK);
    CHECK(cpumoe_call_create(runtime, packed, &kFp32, &call) == CPUMOE_OK);
    CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
    CHECK(cpumoe_call_run(call) == CPUMOE_OK);
    CHECK(IsExpected(&batch, 1));
    memset(batch.output, 0, sizeof(batch.output));
    CHECK(cpumoe_call_submit(call, 0, &pending) == CPUMOE_OK);
    cpumoe_runtime_destroy(runtime); /* finishes what was submitted */
    CHECK(cpumoe_pending_wait(pending, 0) == CPUMOE_OK);
    CHECK(IsExpected(&batch, 1));
    CHECK_FAILS(cpumoe_call_run(call), CPUMOE_FAILED, "this Runtime is closed; create a new one");
    cpumoe_call_callback(call);
    CHECK_FAILS(cpumoe_call_take_error(call), CPUMOE_FAILED,
                "this Runtime is closed; create a new one");
    cpumoe_pending_destroy(pending);
    cpumoe_call_destroy(call);
  }
}

enum { MANY = 2000, MOST_RUNS = 256 };

/* Submits runs of many tokens. Returns whether the last one has not ended when it is asked for. */
static int SeesTimeout(cpumoe_runtime* runtime, cpumoe_layer* packed, int runs) {
  static uint16_t hidden[MANY][HIDDEN], output[MANY][HIDDEN]; /* bf16 */
  static int32_t ids[MANY];
  static float weights[MANY];
  const cpumoe_call_options options = {.top_k = 1};
  const cpumoe_tensors tensors = {
      .tokens = MANY, .hidden_states = hidden, .ids = ids, .weights = weights, .output = output};
  cpumoe_call* call = NULL;
  cpumoe_pending* pending[MOST_RUNS] = {NULL};
  CHECK(cpumoe_call_create(runtime, packed, &options, &call) == CPUMOE_OK);
  CHECK(cpumoe_call_bind(call, &tensors) == CPUMOE_OK);
  for (int i = 0; i < runs; ++i) CHECK(cpumoe_call_submit(call, 0, &pending[i]) == CPUMOE_OK);
  cpumoe_call_destroy(call); /* does not wait */
  const cpumoe_status status = cpumoe_pending_wait(pending[runs - 1], 0);
  if (status == CPUMOE_TIMEOUT) {
    CHECK(strcmp(cpumoe_last_error(), "the call has not ended within 0 s") == 0);
  } else {
    CHECK(status == CPUMOE_OK);
  }
  for (int i = runs - 1; i >= 0; --i) {
    CHECK(cpumoe_pending_wait(pending[i], 300) == CPUMOE_OK);
    cpumoe_pending_destroy(pending[i]);
  }
  return status == CPUMOE_TIMEOUT;
}

/* If this thread was interrupted, all runs may have ended. It then tries more of them. */
static void TestTimeout(cpumoe_runtime* runtime, cpumoe_layer* packed) {
  int seen = 0;
  for (int runs = 4; runs <= MOST_RUNS && !seen; runs *= 2) {
    seen = SeesTimeout(runtime, packed, runs);
  }
  CHECK(seen);
}

int main(void) {
  static Layer layer;
  FillLayer(&layer, &kMxfp4, kPlain, 0);
  CHECK(strcmp(cpumoe_last_error(), "") == 0);
  CHECK(strncmp(cpumoe_get_build_id(), cpumoe_get_version(), strlen(cpumoe_get_version())) == 0);
  CHECK(strlen(cpumoe_get_build_id()) > strlen(cpumoe_get_version()));

  cpumoe_runtime* runtime = NULL;
  const cpumoe_runtime_options two = {.threads = 2};
  CHECK(cpumoe_runtime_create(&two, &runtime) == CPUMOE_OK);
  cpumoe_layer_options options = LayerOptions(&layer);
  options.glu = NULL; /* plain */
  cpumoe_layer* const packed = PackLayer(runtime, &layer, &options);
  CHECK(strlen(cpumoe_layer_variant(packed)) > 0);
  CHECK(cpumoe_layer_nbytes(packed) >= EXPERTS * 3 * HIDDEN * INNER / 2);

  TestCalls(runtime, packed, &layer);
  TestEviction(runtime, packed, &layer);
  TestOptionsOfCalls(runtime, packed, &layer);
  TestOptionsOfLayers(runtime);
  TestChoiceOfVariant();
  TestChoiceOfNodes(&layer);
  TestErrorsOfCalls(runtime, packed, &layer);
  TestErrorsOfLayers(runtime, &layer);
  TestErrorsOfRuntimes();
  TestRuntimes(packed, &layer, 0);
  TestRuntimes(packed, &layer, INT32_MAX);
  TestTimeout(runtime, packed);

  cpumoe_layer_destroy(packed);
  cpumoe_runtime_destroy(runtime);
  if (failures > 0) fprintf(stderr, "%d checks failed\n", failures);
  return failures > 0;
}
