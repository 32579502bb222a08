// y = x . W with W stored [in, out] and many rows of x.

int gemm(int dtype, const void* x, int64_t rows, int64_t x_stride, int64_t in, const void* weight,
         int64_t weight_stride, int64_t out, const void* bias, void* y, int threads) {
  int64_t size = dtype == DEADBAND_FLOAT32 ? 4 : 2;
  for (int64_t r = 0; r < rows; r += 4) {
    int error = stream(dtype, (const char*)x + r * x_stride * size, min_of(4, rows - r), x_stride, in, weight,
                       weight_stride, out, bias, nullptr, nullptr, (char*)y + r * out * size, threads, nullptr);
    if (error) return error;
  }
  return 0;
}
