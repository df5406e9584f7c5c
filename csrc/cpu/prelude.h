// What the kernels take from elsewhere. A file includes this before it turns on its instruction set: what the
// linker may share between files must run on every processor. For the same reason the kernels' headers take no
// function of the standard library but std::fma and the like.
#pragma once

#include "kernels.h"

#include <torch/headeronly/util/Half.h>

#include <cstring>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif
