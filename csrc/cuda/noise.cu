// u = C m, float32, into PLUS.
#include "launch.cuh"
#include "noise.cuh"

namespace fogzo::cuda {

struct Noise {
  Plan plan;
  Source source;
  uint32_t direction;
  float scale; // C over the noise's factor
};

template <Distribution D> FOGZO_KERNEL(kThreads, 8) noise_kernel(FOGZO_PARAMETER Noise p) {
  const Part part = part_of(p.plan);
  const Names names = names_of<false>(p.source, part);
  const Operand out = opaque(part.operand(PLUS, Dtype::float32));
  walk<1>(frame_of<false>(part, 0.0f), [&](const auto &at) {
    constexpr int size = std::decay_t<decltype(at)>::size;
    float m[size];
    scaled_noise<D>(at, 0, p.direction, names, m);
    unrolled<size>([&](int i) { m[i] *= p.scale; });
    at.store(out, 0, m);
  });
}

double noise_scale(const Draw &draw) {
  return with_value(draw.distribution, [&](auto D) { return draw.C / Scaled<decltype(D)::value>::factor; });
}

void noise(const Call &call, const Draw &draw) {
  const Noise p{call.plan, source_of(draw), draw.direction, float(noise_scale(draw))};
  with_value(draw.distribution, [&](auto D) {
    launch("noise_kernel", noise_kernel<decltype(D)::value>, call.where, call.plan.blocks, p);
  });
}

} // namespace fogzo::cuda
