template <class... P, size_t... I> static void call(void (*kernel)(P...), std::index_sequence<I...>) {
  kernel((P)parameters[I]...);
}
template <class... P> static void call(void (*kernel)(P...)) { call(kernel, std::index_sequence_for<P...>()); }
static void run_fiber() {
  call(KERNEL);
  now->over = true;
  pause_fiber();
}
extern "C" int run(void** pointers, int grid, int threads, int shared, long rounds, unsigned seed) {
  parameters = pointers;
  return launch(grid, threads, shared, rounds, seed);
}
