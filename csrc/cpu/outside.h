// Everything that the kernels take from outside. It comes before a file turns on its instruction set:
// what the linker may share between files must run on every processor.
#pragma once

#include "kernels.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
