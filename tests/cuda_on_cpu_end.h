template <class T> static T parameter(int i) { return (T)parameters[i]; }
static void run_fiber() {
  decode((const int*)parameters[0], (const int*)parameters[1], (const char*)parameters[2], (const u16*)parameters[3],
         (const u16*)parameters[4], (u32*)parameters[5], (u16*)parameters[6], (u16*)parameters[7],
         (u32*)parameters[5], (u16*)parameters[6], (u16*)parameters[7], (int*)parameters[8],
         (float*)parameters[9], (int*)parameters[10]);
  now->over = true;
}
extern "C" int run(void** pointers, int grid, int threads, int shared, long rounds, unsigned seed) {
  parameters = pointers;
  return launch(grid, threads, shared, rounds, seed);
}
