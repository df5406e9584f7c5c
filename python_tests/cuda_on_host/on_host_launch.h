// Launches on the CPU, in place of those of csrc/cuda/launch.cuh.
#pragma once

namespace fogzo::cuda {

template <class P>
void launch(const char *, void (*kernel)(P), const Where &, int64_t blocks, int threads,
            const std::remove_const_t<P> &parameters) {
  for (current_block = 0; current_block < blocks; ++current_block)
    for (current_thread = 0; current_thread < threads; ++current_thread)
      kernel(parameters);
  current_thread = 0;
}

template <class P>
void launch_with_barriers(const char *, void (*kernel)(P), const Where &, int64_t blocks, int threads,
                          const std::remove_const_t<P> &parameters) {
  for (current_block = 0; current_block < blocks; ++current_block) {
    std::barrier<> all(threads);
    current_barrier = &all;
    std::vector<std::exception_ptr> errors(threads);
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([&, i] {
        current_thread = i;
        try {
          kernel(parameters);
        } catch (...) {
          errors[i] = std::current_exception();
        }
        all.arrive_and_drop(); // those that still wait must not wait for this one
      });
    for (std::thread &one : running)
      one.join();
    for (const std::exception_ptr &error : errors)
      if (error)
        std::rethrow_exception(error);
  }
}

} // namespace fogzo::cuda
