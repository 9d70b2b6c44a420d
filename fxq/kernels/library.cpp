// What fxq.kernels asks of the binary, through ctypes.
//
// The torch operators stand in ops_*.cpp, built on torch's stable ABI, so that one binary serves later torch releases;
// their schemas are defined in Python (fxq.kernels.define).
#include "kernels.h"

extern "C" __attribute__((visibility("default"))) int fxq_use_isa(const char* isa) { return fxq::use_isa(isa); }
extern "C" __attribute__((visibility("default"))) const char* fxq_isa() { return fxq::active().isa; }
extern "C" __attribute__((visibility("default"))) const char* fxq_isas() { return fxq::available_isas(); }
