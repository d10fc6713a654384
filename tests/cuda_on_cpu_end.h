template <class T> static T parameter(int i) { return (T)parameters[i]; }
static void run_fiber() {
  decode((const int*)parameters[0], (const int*)parameters[1], (const char*)parameters[2], (const u16*)parameters[3],
         (const u16*)parameters[4], (const float*)parameters[5], (u32*)parameters[6], (u16*)parameters[7],
         (u16*)parameters[8], (u32*)parameters[6], (u16*)parameters[7], (u16*)parameters[8], (int*)parameters[9],
         (float*)parameters[10], (int*)parameters[11]);
  now->over = true;
}
extern "C" int run(void** pointers, int grid, int threads, int shared, long rounds, unsigned seed) {
  parameters = pointers;
  return launch(grid, threads, shared, rounds, seed);
}
