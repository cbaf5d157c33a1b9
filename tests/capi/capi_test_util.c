#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "capi_test.h"

int failures = 0;
static char described[200];

void Describe(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(described, sizeof(described), format, arguments);
  va_end(arguments);
}

int Check(int condition, const char* what, const char* file, int line) {
  if (condition) return 1;
  ++failures;
  fprintf(stderr, "%s:%d: %s: %s (last error: %s)\n", file, line, described, what,
          cpumoe_last_error());
  return 0;
}

void CheckFails(cpumoe_status got, cpumoe_status expected, const char* text, const char* file,
                int line) {
  if (got == expected && strcmp(cpumoe_last_error(), text) == 0) return;
  ++failures;
  fprintf(stderr, "%s:%d: %s: status %d, \"%s\"; expected %d, \"%s\"\n", file, line, described,
          (int)got, cpumoe_last_error(), (int)expected, text);
}

int Size(int dtype) { return dtype == CPUMOE_FP32 ? 4 : 2; }

/* The value must be representable. It is a normal number of fp16 or zero. */
void Encode(double value, int dtype, void* elements, int index) {
  const float wide = (float)value;
  uint32_t bits;
  memcpy(&bits, &wide, sizeof(bits));
  uint16_t narrow = (uint16_t)(bits >> 16);
  if (dtype == CPUMOE_FP16) {
    const uint32_t exponent = value == 0 ? 0 : (bits >> 23 & 0xff) - 127 + 15;
    narrow = (uint16_t)((bits >> 16 & 0x8000) | exponent << 10 | (bits >> 13 & 0x3ff));
  }
  unsigned char* const at = (unsigned char*)elements + index * Size(dtype);
  if (dtype == CPUMOE_FP32) {
    memcpy(at, &wide, sizeof(wide));
  } else {
    memcpy(at, &narrow, sizeof(narrow));
  }
}

double Decode(int dtype, const void* elements, int index) {
  const unsigned char* const at = (const unsigned char*)elements + index * Size(dtype);
  float wide;
  uint16_t narrow;
  if (dtype == CPUMOE_FP32) {
    memcpy(&wide, at, sizeof(wide));
    return wide;
  }
  memcpy(&narrow, at, sizeof(narrow));
  if (dtype == CPUMOE_BF16) {
    const uint32_t bits = (uint32_t)narrow << 16;
    memcpy(&wide, &bits, sizeof(wide));
    return wide;
  }
  const int exponent = narrow >> 10 & 31, fraction = narrow & 0x3ff;
  if (exponent == 31) return NAN;
  const double value = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, exponent - 25);
  return narrow & 0x8000 ? -value : value;
}

double Magnitude(const Batch* batch) {
  double magnitude = 0;
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < HIDDEN; ++i) magnitude = fmax(magnitude, fabs(batch->expected[t][i]));
  }
  return magnitude;
}

int IsExpected(const Batch* batch, double times) {
  const double magnitude = Magnitude(batch);
  for (int t = 0; t < TOKENS; ++t) {
    for (int i = 0; i < HIDDEN; ++i) {
      const double error = fabs(batch->output[t][i] - times * batch->expected[t][i]);
      if (!(error < 1e-5 * times * magnitude)) return 0; /* NaN as well */
    }
  }
  return magnitude > 0.1;
}
