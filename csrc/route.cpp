#include "kernels.h"
#include "matmul_tensor.h"

namespace symtele {

namespace {

// Up to so many multiply-adds a product takes the fused kernel. Reckoned for an H100, to be checked by measurement:
//
// The fused kernel does perhaps half of the device's 60 TFLOP/s in float32, 30 in float64. 2^27 multiply-adds, those of
// 512 x 512 x 512, take it 9 us in float32. Three TF32 products on the tensor cores are up to four times as fast where
// they fill the device, but that product has only 64 of their smaller tiles for 132 multiprocessors. The library is
// faster for a product alone, in float64 twice as fast, but adds a launch (2 to 3 us) and a pass over the product.
constexpr int64_t most_fused_f32 = int64_t{1} << 27;
constexpr int64_t most_fused_f64 = int64_t{1} << 26;

// Whether three TF32 products take less time than one in float32. By NVIDIA's figures the tensor cores multiply in TF32
// about eight times as fast as the ordinary cores in float32 on 8.0, 9.x and 10.x, and no faster on 8.6, 8.9 and 12.x.
bool is_faster_by_tf32(int compute_capability) {
  const int major = compute_capability / 10;
  return compute_capability == 80 || major == 9 || major == 10;
}

}  // namespace

// `compute_capability` is 10 major + minor. Where TF32 is allowed, the library multiplies once what the tensor route,
// which keeps float32's accuracy, multiplies three times.
Route choose_route(const Product& product, bool allow_tf32, int compute_capability) {
  const int64_t multiply_adds = product.rows * product.columns * product.inner;
  if (multiply_adds <= (product.dtype == Dtype::f32 ? most_fused_f32 : most_fused_f64)) return Route::fused;
  const bool on_tensor_cores = !allow_tf32 && is_faster_by_tf32(compute_capability) && tensor_route_accepts(product);
  return on_tensor_cores ? Route::tensor : Route::library;
}

}  // namespace symtele
