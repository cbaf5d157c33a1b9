/* cpumoe in C: the routed experts of a mixture-of-experts layer, computed on the CPU.
 *
 * A runtime owns threads. A layer owns the packed weights of its experts. A call says once how a
 * layer is called (types, top_k, mask), and is then run with new addresses. docs/c_api.md has a
 * complete program.
 *
 * Every function may be called from any thread, unless its comment says otherwise. No function
 * throws. Functions that can fail return a cpumoe_status, and write nothing through their last
 * argument if they fail. Text that functions return is UTF-8 and belongs to cpumoe. A structure
 * whose bytes are all zero has the defaults that its comments name. The binary interface may change
 * with each minor version, which the library's soname contains.
 */
#ifndef CPUMOE_H_
#define CPUMOE_H_

#include <stddef.h>
#include <stdint.h>

#define CPUMOE_API __attribute__((visibility("default")))

#ifdef __cplusplus
#define CPUMOE_NOEXCEPT noexcept
extern "C" {
#else
#define CPUMOE_NOEXCEPT
#endif

typedef enum cpumoe_status {
  CPUMOE_OK = 0,
  CPUMOE_INVALID_ARGUMENT =
      1, /* a null pointer, a size, an unknown name, an expert that is not packed */
  CPUMOE_OUT_OF_RANGE = 2, /* an expert's index or id */
  CPUMOE_OUT_OF_MEMORY = 3,
  CPUMOE_SYSTEM_ERROR = 4, /* the system cannot start enough threads */
  CPUMOE_FAILED = 5,       /* a destroyed runtime, a forked process, a variant's damaged library */
  CPUMOE_TIMEOUT = 6       /* a submitted call has not ended yet */
} cpumoe_status;

typedef enum cpumoe_dtype { CPUMOE_BF16 = 0, CPUMOE_FP16 = 1, CPUMOE_FP32 = 2 } cpumoe_dtype;

/* The lowest precision to which activations may be rounded. Weights are always exact. */
typedef enum cpumoe_precision {
  CPUMOE_PRECISION_AUTO = 0, /* fp32 hidden states keep fp32 accuracy; others as BF16 */
  CPUMOE_PRECISION_BF16 = 1,
  CPUMOE_PRECISION_INT8 = 2
} cpumoe_precision;

typedef struct cpumoe_runtime cpumoe_runtime;
typedef struct cpumoe_layer cpumoe_layer;
typedef struct cpumoe_call cpumoe_call;
typedef struct cpumoe_pending cpumoe_pending;

/* ---- This library ---- */

CPUMOE_API const char* cpumoe_get_version(void) CPUMOE_NOEXCEPT;
/* Differs between any two builds from different sources or settings. */
CPUMOE_API const char* cpumoe_get_build_id(void) CPUMOE_NOEXCEPT;

/* One line about the last failure of a function on the calling thread; empty if there was none. The
 * text is valid until the next failure on this thread. */
CPUMOE_API const char* cpumoe_last_error(void) CPUMOE_NOEXCEPT;

/* ---- Threads ---- */

typedef struct cpumoe_runtime_options {
  /* Threads that compute one call, the thread that makes the call included. 0: as many as there are
   * `cpus`, or without `cpus` one for each physical core of the nodes that this process may use. */
  int32_t threads;
  /* The CPUs to run on, for thread 0, 1, ... in turn. If the system refuses one, or if this is
   * NULL, the system chooses among the CPUs that the thread which makes the runtime may use. */
  const int32_t* cpus;
  int32_t num_cpus;
  /* 0: the thread that makes a call computes as thread 0, and keeps its own affinity. 1: the
   * runtime's driver thread takes its place, so that only `cpus` compute. On NUMA nodes the driver
   * always takes it. */
  int32_t callers_wait;
  /* Numbers of the NUMA nodes among which the threads are divided, and the weights that the runtime
   * packs. NULL: the environment's CPUMOE_NODES ("auto", "1", "0,2" or "[1]"), else all nodes whose
   * CPUs and memory this process may use. `cpus` have nodes already, so `nodes` is NULL then. */
  const int32_t* nodes;
  int32_t num_nodes;
  int32_t ignore_nodes; /* 1: the machine counts as one node; `nodes` is NULL */
} cpumoe_runtime_options;

/* `options` may be NULL. A runtime does not survive fork(): make another in the child. */
CPUMOE_API cpumoe_status cpumoe_runtime_create(const cpumoe_runtime_options* options,
                                               cpumoe_runtime** out) CPUMOE_NOEXCEPT;
/* Finishes the submitted calls and ends the threads. Calls of this runtime that still exist fail
 * from then on. NULL is allowed. */
CPUMOE_API void cpumoe_runtime_destroy(cpumoe_runtime* runtime) CPUMOE_NOEXCEPT;

/* ---- Weights ---- */

/* f of a gated linear unit. */
typedef enum cpumoe_glu_function {
  CPUMOE_GLU_SILU = 0,      /* g * sigmoid(alpha * g) */
  CPUMOE_GLU_GELU_TANH = 1, /* the tanh form of GELU */
  CPUMOE_GLU_RELU = 2,      /* max(g, 0) */
  CPUMOE_GLU_RELU2 = 3,     /* max(g, 0)^2 */
  /* cap(g, gate_cap) * sigmoid(g), with cap(u, up_cap) for u; cap(x, c) = c * tanh(x / c) */
  CPUMOE_GLU_SOFTCAPPED_SILU = 4,
  CPUMOE_GLU_GELU = 5 /* g * (1 + erf(g / sqrt(2))) / 2 */
} cpumoe_glu_function;

/* A gated linear unit: h = (u + up_offset) * f(g), g = min(gate, limit), u = clamp(up, -limit,
 * limit). Experts without a gate projection have h = f(min(up, limit)). */
typedef struct cpumoe_glu {
  int32_t function; /* cpumoe_glu_function */
  float alpha;      /* of CPUMOE_GLU_SILU: positive; plain SwiGLU has 1. Else 1 */
  float limit;      /* positive; 0: no limit */
  float up_offset;
  float gate_cap;  /* of CPUMOE_GLU_SOFTCAPPED_SILU: positive. Else 0 */
  float up_cap;    /* as gate_cap */
  int32_t no_gate; /* 1: experts have no gate projection; up_offset and caps are 0 */
} cpumoe_glu;

/* Types of stored scales. */
typedef enum cpumoe_scale_type {
  CPUMOE_SCALE_OWN = 0, /* of a layer: the format's own type; of a matrix: the layer's */
  CPUMOE_SCALE_E8M0 = 1,
  CPUMOE_SCALE_BF16 = 2,
  CPUMOE_SCALE_FP32 = 3,
  CPUMOE_SCALE_E4M3 = 4,
  CPUMOE_SCALE_FP16 = 5
} cpumoe_scale_type;

typedef struct cpumoe_layer_options {
  const char* format; /* "mxfp4", "int4", "bf16", "fp16", "fp8" or "nvfp4" */
  int64_t num_experts;
  int64_t hidden_size;
  int64_t intermediate_size;
  const cpumoe_glu* glu;   /* NULL: plain SwiGLU, silu(gate) * up */
  int32_t has_bias;        /* 1: each matrix of an expert has a bias */
  int32_t precision;       /* a cpumoe_precision */
  int32_t batch_invariant; /* 1: a token's result does not depend on the other tokens of its call */
  const char* variant;     /* "avx2", ...; NULL: the environment's CPUMOE_ISA, or the best here */
  /* The cpumoe_scale_type of stored scales; 0: the format's own. A layer of int4 takes bf16 scales
   * alone by default. For fp16 or fp32 it takes scales of all three types and a tenth more
   * memory. */
  int32_t scale_type;
} cpumoe_layer_options;

/* A layer whose experts have no weights yet. */
CPUMOE_API cpumoe_status cpumoe_layer_create(const cpumoe_layer_options* options,
                                             cpumoe_layer** out) CPUMOE_NOEXCEPT;
/* Calls of the layer keep its weights until they are destroyed, too. NULL is allowed. */
CPUMOE_API void cpumoe_layer_destroy(cpumoe_layer* layer) CPUMOE_NOEXCEPT;
/* The name of the variant that computes; empty if `layer` is NULL. */
CPUMOE_API const char* cpumoe_layer_variant(const cpumoe_layer* layer) CPUMOE_NOEXCEPT;
/* Bytes that the layer takes when all its experts are packed; 0 if `layer` is NULL. */
CPUMOE_API size_t cpumoe_layer_nbytes(const cpumoe_layer* layer) CPUMOE_NOEXCEPT;

/* A matrix [rows, columns] as checkpoints store it. Formats of 4 bits have two codes in a byte, the
 * low half first, so `columns` is even. In fp8 (E4M3) a code is one byte, in bf16 and fp16 the
 * weight. Each block of scale_rows rows has columns / scale_depth scales, rounded up. Formats' own
 * scales have one byte (mxfp4, E8M0; nvfp4, E4M3), two (int4, bf16) or four (fp8, float). bf16 and
 * fp16 have none. */
typedef struct cpumoe_matrix {
  int64_t rows;
  int64_t columns;
  const void* codes;
  int64_t codes_stride; /* bytes from one row to the next; 0: rows follow each other */
  const void* scales;
  int64_t scales_stride; /* bytes from one row of scales to the next; 0: they follow each other */
  int64_t scale_depth;   /* successive weights of a row that share a scale; 0: the format's number,
                            32, 16 (nvfp4) or 128 (fp8). int4 and fp8 allow any multiple of it, or a
                            whole row */
  int64_t scale_rows;    /* rows that share their scales; 0: 1. fp8 also allows 128 */
  int32_t scale_type; /* a cpumoe_scale_type that the layer takes. Only fp8 and int4 have several */
  float factor;       /* multiplies all weights; 0: 1. Only nvfp4 allows another than 1 */
} cpumoe_matrix;

typedef struct cpumoe_expert {
  cpumoe_matrix gate; /* [intermediate_size, hidden_size]; all zeros without a gate */
  cpumoe_matrix up;   /* [intermediate_size, hidden_size] */
  cpumoe_matrix down; /* [hidden_size, intermediate_size] */
  const float*
      gate_bias;        /* [intermediate_size]; of each matrix if the layer has biases, else NULL */
  const float* up_bias; /* [intermediate_size] */
  const float* down_bias; /* [hidden_size] */
} cpumoe_expert;

/* Packs experts[0 .. count) as the layer's experts first, first + 1, ... They are copied. If there
 * are at least as many experts as threads, each thread packs whole experts, which is fastest. After
 * a failure some of these experts have no weights. */
CPUMOE_API cpumoe_status cpumoe_layer_pack(cpumoe_layer* layer, cpumoe_runtime* runtime,
                                           int64_t first, const cpumoe_expert* experts,
                                           int64_t count) CPUMOE_NOEXCEPT;

/* Gives the memory of an expert's weights back to the system, once no call uses them. Calls that
 * need the expert fail until it is packed again. */
CPUMOE_API cpumoe_status cpumoe_layer_evict(cpumoe_layer* layer, int64_t expert) CPUMOE_NOEXCEPT;

/* ---- Calls ---- */

typedef struct cpumoe_call_options {
  int32_t input_dtype;    /* of hidden_states, a cpumoe_dtype */
  int32_t output_dtype;   /* of output, a cpumoe_dtype */
  int32_t accumulate;     /* 1: results are added onto the output, which must be fp32 */
  int64_t top_k;          /* 0 to 65536 */
  int32_t ids_are_64_bit; /* 0: int32_t, 1: int64_t */
  /* [num_experts], not 0: skipped. NULL: none is skipped. Read whenever the call runs, so the bytes
   * may change between two runs. */
  const uint8_t* mask;
} cpumoe_call_options;

typedef struct cpumoe_tensors {
  int64_t tokens;            /* 0 to 2^31 */
  const void* hidden_states; /* [tokens, hidden_size] */
  int64_t hidden_stride;     /* elements from one row to the next; 0: rows follow each other */
  const void* ids;           /* [tokens, top_k]; -1 and num_experts are skipped */
  const float* weights;      /* [tokens, top_k] */
  void* output;              /* [tokens, hidden_size]; undefined after a failure */
} cpumoe_tensors;

CPUMOE_API cpumoe_status cpumoe_call_create(cpumoe_runtime* runtime, cpumoe_layer* layer,
                                            const cpumoe_call_options* options,
                                            cpumoe_call** out) CPUMOE_NOEXCEPT;
/* Not while the call runs. Submitted runs may be under way. NULL is allowed. */
CPUMOE_API void cpumoe_call_destroy(cpumoe_call* call) CPUMOE_NOEXCEPT;

/* Names the tensors of later runs. Until then there are no tokens. No other thread may be in a
 * function of this call meanwhile; submitted runs may be under way. The structure is copied. The
 * addresses in it are read when the call runs. */
CPUMOE_API cpumoe_status cpumoe_call_bind(cpumoe_call* call,
                                          const cpumoe_tensors* tensors) CPUMOE_NOEXCEPT;

/* output[t] = the sum over slots s of weights[t, s] * expert ids[t, s] of hidden_states[t], or +=.
 * Returns when this is done. Several threads may run one call at once. */
CPUMOE_API cpumoe_status cpumoe_call_run(cpumoe_call* call) CPUMOE_NOEXCEPT;

/* cpumoe_call_run for hosts that take a function and an address, e.g. cudaLaunchHostFunc. A failure
 * is kept in the call. */
CPUMOE_API void cpumoe_call_callback(void* call) CPUMOE_NOEXCEPT;
/* The first failure of cpumoe_call_callback since the last time that this function was called, with
 * its text in cpumoe_last_error; CPUMOE_OK if there was none. */
CPUMOE_API cpumoe_status cpumoe_call_take_error(cpumoe_call* call) CPUMOE_NOEXCEPT;

/* Lets the runtime's driver thread run the call with the tensors that are bound now. They must stay
 * as they are until the run has ended. If `copy_inputs` is 1, this holds for the output alone:
 * hidden states, ids and weights have been copied when the function returns. */
CPUMOE_API cpumoe_status cpumoe_call_submit(cpumoe_call* call, int32_t copy_inputs,
                                            cpumoe_pending** out) CPUMOE_NOEXCEPT;
/* Returns what the run returned, or CPUMOE_TIMEOUT after `seconds` (INFINITY: no limit, 0: only
 * asks). May be called again. */
CPUMOE_API cpumoe_status cpumoe_pending_wait(cpumoe_pending* pending,
                                             double seconds) CPUMOE_NOEXCEPT;
/* Waits for the run to end, because it reads and writes the caller's memory. NULL is allowed. */
CPUMOE_API void cpumoe_pending_destroy(cpumoe_pending* pending) CPUMOE_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif /* CPUMOE_H_ */
