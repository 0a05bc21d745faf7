// SPDX-License-Identifier: MIT
#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <iterator>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include <weir/core/random.hpp>
#include <weir/kernels/arranged_rows.hpp>
#include <weir/kernels/matmul.hpp>
#include <weir/kernels/packed_product.hpp>
#include <weir/kernels/packed_weight.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::packed_weight_test {
using kernels::PackedWeight;

namespace {

/// Each number rounded to bfloat16.
template <class T>
Matrix<T> rounded(const Matrix<T>& x) {
  return x.unaryExpr([](T v) {
    return static_cast<T>(static_cast<float>(kernels::BFloat16(static_cast<float>(v))));
  });
}

template <class T>
Matrix<T> product(const Matrix<T>& x, const PackedWeight<T>& weight) {
  Matrix<T> out = Matrix<T>::Constant(x.rows(), weight.rows(), T(7));
  const kernels::PackedTo<T> to = {&weight, 0, x.rows(), out.data(), out.cols()};
  kernels::multiply_packed<T>(x, {&to, 1});
  return out;
}

/// The rows of x as a product with the weight sees them: tokens are rounded where the processor
/// multiplies bfloat16 numbers, and where the storage says so.
template <class T>
Matrix<double> seen_rows(const Matrix<T>& x, const PackedWeight<T>& weight) {
  const kernels::RowKind kind = weight.row_format().kind;
  if (kind == kernels::RowKind::kExact) return x.template cast<double>();
  if (kind == kernels::RowKind::kBfloat16) return rounded<T>(x).template cast<double>();
  Matrix<double> seen(x.rows(), x.cols());
  for (Index i = 0; i < x.rows(); ++i) {
    for (Index begin = 0; begin < x.cols(); begin += 32) {
      const Index count = std::min<Index>(32, x.cols() - begin);
      const Matrix<float> part = x.row(i).segment(begin, count).template cast<float>();
      const kernels::Int8Inputs inputs = kernels::round_inputs(part.data(), count);
      for (Index p = 0; p < count; ++p) {
        seen(i, begin + p) = static_cast<double>(inputs.scale) * inputs.codes[p];
      }
    }
  }
  return seen;
}

constexpr Storage kStorages[] = {Storage::kPacked,  Storage::kBfloat16, Storage::kInt8,
                                 Storage::kInt4,    Storage::kFp8,      Storage::kMxFp4,
                                 Storage::kInt8Dot, Storage::kInt4Dot};

}  // namespace

TEMPLATE_TEST_CASE("A packed weight comes back as it was", "[kernels][packed]", float, double) {
  using T = TestType;
  const auto rows = GENERATE(as<Index>{}, 1, 31, 64, 130);
  const auto cols = GENERATE(as<Index>{}, 1, 16, 33);
  const test::Threads threads(2);
  const Matrix<T> first = test::random_matrix<T>(rows, cols, 1);
  const Matrix<T> second = test::random_matrix<T>(rows, cols, 2);
  Matrix<T> a, b;

  PackedWeight<T>(first, Storage::kPacked).unpack(a);
  CHECK(a == first);
  PackedWeight<T>(first, second, Storage::kPacked).unpack(a, &b);
  CHECK(a == first);
  CHECK(b == second);
  PackedWeight<T>(first, second, Storage::kBfloat16).unpack(a, &b);
  CHECK(a == rounded<T>(first));
  CHECK(b == rounded<T>(second));
}

TEMPLATE_TEST_CASE("A weight that is stored as codes comes back rounded", "[kernels][packed]",
                   float, double) {
  using T = TestType;
  const test::Threads threads(2);
  const auto check = [](Storage storage, double tolerance) {
    for (const Index rows : {1, 70, 300}) {
      for (const Index cols : {1, 33, 256}) {
        Matrix<T> first = test::random_matrix<T>(rows, cols, 1);
        first.row(0) *= T(1e4);
        first.row(rows - 1).setZero();
        const Matrix<T> second = test::random_matrix<T>(rows, cols, 2);
        Matrix<T> a, b, again, once;
        const PackedWeight<T> pair(first, second, storage);
        pair.unpack(a, &b);
        CHECK(a.row(rows - 1).isZero(0));
        CHECK(test::relative_error(a.topRows(rows - 1), first.topRows(rows - 1)) <= tolerance);
        CHECK(test::relative_error(b, second) <= tolerance);
        PackedWeight<T>(second, storage).unpack(once);
        CHECK(once == b);
        PackedWeight<T>(once, storage).unpack(again);  // What is rounded stays.
        CHECK(test::relative_error(again, once) <= 1e-6);
        const Matrix<T> small = T(1e-3) * second;  // Scales follow the numbers down as well.
        PackedWeight<T>(small, storage).unpack(once);
        CHECK(test::relative_error(once, small) <= tolerance);
      }
    }
  };
  check(Storage::kInt8, 0.01);
  check(Storage::kInt4, 0.1);
  check(Storage::kFp8, 0.04);
  check(Storage::kMxFp4, 0.14);
  check(Storage::kInt8Dot, 0.01);
  check(Storage::kInt4Dot, 0.1);
}

TEST_CASE("A stored weight takes the bytes of its format", "[kernels][packed]") {
  const auto bits = [](Storage storage) {
    return 8.0 * static_cast<double>(PackedWeight<float>::bytes(1024, 2048, storage)) /
           (1024 * 2048);
  };
  CHECK(bits(Storage::kPacked) == 32.0);
  CHECK(bits(Storage::kBfloat16) == 16.0);
  CHECK(bits(Storage::kInt8) == 8.5);
  CHECK(bits(Storage::kInt4) == 5.0);
  CHECK(bits(Storage::kFp8) == Approx(8.25).epsilon(1e-3));  // The scales of tiles as well.
  CHECK(bits(Storage::kMxFp4) == 4.25);
  CHECK(bits(Storage::kInt8Dot) == 8.5);
  CHECK(bits(Storage::kInt4Dot) == 5.0);
}

TEMPLATE_TEST_CASE("Products with packed weights agree with Eigen's", "[kernels][packed]", float,
                   double) {
  using T = TestType;
  // Across the borders of register blocks, panels and slices, odd depths among them.
  const auto n = GENERATE(as<Index>{}, 1, 64, 193);
  const auto k = GENERATE(as<Index>{}, 1, 2, 31, 2051);
  const Matrix<T> w = test::random_matrix<T>(n, k, 2);
  const double tolerance = std::is_same_v<T, float> ? 2e-6 : 1e-14;
  for (const Storage storage : kStorages) {
    const PackedWeight<T> weight(w, storage);
    Matrix<T> stored;
    weight.unpack(stored);
    for (const Index m : {0, 1, 2, 3, 7, 9, 100}) {
      INFO(m << " x " << n << " x " << k << ", storage " << static_cast<int>(storage));
      const Matrix<T> x = test::random_matrix<T>(m, k, 1);
      const Matrix<double> exact =
          seen_rows(x, weight) * stored.template cast<double>().transpose();
      const bool packed = storage == Storage::kPacked;
      CHECK(test::relative_error(product(x, weight).template cast<double>(), exact) <=
            (packed ? tolerance : 3.0 * tolerance));
    }
  }
}

TEST_CASE("Products with codes stay within the bounds of their formats", "[kernels][packed]") {
  // Outliers, zeros, numbers below the normal range, and blocks of equal numbers.
  Matrix<float> w = test::random_matrix<float>(40, 256, 1);
  w.row(0).setZero();
  w.row(1).setConstant(0.37F);
  w.row(2) *= 1e-39F;
  w.row(3) *= 1e-6F;
  w(4, 7) = 1e4F;
  w(5, 200) = -1e4F;
  w.row(6).tail(100).setZero();
  for (const Storage storage : kStorages) {
    INFO("storage " << static_cast<int>(storage));
    const PackedWeight<float> weight(w, storage);
    for (const Index tokens : {1, 2, 3, 4, 9}) {
      Matrix<float> x = test::random_matrix<float>(tokens, 256, 2);
      x(0, 130) = 1e4F;
      const Matrix<double> seen = seen_rows(x, weight);
      const Matrix<double> exact = seen * w.cast<double>().transpose();
      const Matrix<double> off = (product(x, weight).cast<double>() - exact).cwiseAbs();
      CHECK(off.allFinite());
      int beyond = 0;
      for (Index t = 0; t < tokens; ++t) {
        for (Index o = 0; o < w.rows(); ++o) {
          double bound = 1e-9;
          for (Index begin = 0; begin < 256; begin += 32) {
            const auto block = w.row(o).segment(begin, 32);
            const double largest = block.cwiseAbs().maxCoeff();
            const double range = static_cast<double>(block.maxCoeff()) - block.minCoeff();
            const double step = storage == Storage::kPacked     ? 1e-6 * largest
                                : storage == Storage::kBfloat16 ? largest / 256.0
                                : storage == Storage::kInt8 || storage == Storage::kInt8Dot
                                    ? largest / 253.0 + 0x1p-25
                                : storage == Storage::kInt4 || storage == Storage::kInt4Dot
                                    ? range / 29.9 + 1e-3 * largest + 0x1p-24
                                : storage == Storage::kFp8 ? largest / 16.0 + 1e4 / 448.0 * 0x1p-10
                                                           : largest / 4.0;
            bound += step * seen.row(t).segment(begin, 32).cwiseAbs().sum();
          }
          beyond += off(t, o) <= bound ? 0 : 1;
        }
      }
      CHECK(beyond == 0);
    }
  }
}

TEST_CASE("Storages have the errors that are stated for normal numbers", "[kernels][packed]") {
  constexpr double kStated[] = {0.0, 0.0017, 0.0054, 0.078, 0.027, 0.112, 0.0076, 0.079};
  Rng rng(1);
  const auto normal = [&](Index rows) {
    Matrix<float> x(rows, 1024);
    for (Index i = 0; i < x.size(); ++i) x.data()[i] = static_cast<float>(rng.normal());
    return x;
  };
  const Matrix<float> w = normal(128);
  const Matrix<float> x = normal(32);
  const Matrix<double> exact = x.cast<double>() * w.cast<double>().transpose();
  for (std::size_t s = 1; s < std::size(kStorages); ++s) {
    INFO("storage " << static_cast<int>(kStorages[s]));
    const PackedWeight<float> weight(w, kStorages[s]);
    // Rounding the tokens to bfloat16 adds as much as rounding the weights to it.
    const bool rounds = weight.row_format().kind == kernels::RowKind::kBfloat16;
    const double expected = std::hypot(kStated[s], rounds ? kStated[1] : 0.0);
    CHECK(test::relative_error(product(x, weight).cast<double>(), exact) ==
          Approx(expected).epsilon(0.03));
  }
}

#if defined(__SSE2__)
TEST_CASE("Small codes of FP8 count where small floats are taken for zero", "[kernels][packed]") {
  // One large weight of a tile leaves codes below the normal range of E4M3 to the others.
  Matrix<float> w = 1e-4F * test::random_matrix<float>(128, 128, 1);
  w(0, 0) = 10.0F;
  const PackedWeight<float> weight(w, Storage::kFp8);
  for (const Index tokens : {1, 2, 4, 9}) {
    Matrix<float> x = test::random_matrix<float>(tokens, 128, 2);
    x.col(0).setZero();
    const Matrix<float> usual = product(x, weight);
    CHECK(usual.squaredNorm() > 0.0F);
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040U);  // Inputs and results.
    const Matrix<float> without = product(x, weight);
    _mm_setcsr(before);
    CHECK(without == usual);
  }
}
#endif

TEST_CASE("A weight with a NaN gives NaN in every storage", "[kernels][packed]") {
  const Matrix<float> x = test::random_matrix<float>(5, 64, 1);
  for (const Storage storage : kStorages) {
    INFO("storage " << static_cast<int>(storage));
    Matrix<float> w = test::random_matrix<float>(3, 64, 2);
    w(1, 40) = std::numeric_limits<float>::quiet_NaN();
    const Matrix<float> y = product(x, PackedWeight<float>(w, storage));
    CHECK(y.col(1).array().isNaN().all());
    if (storage != Storage::kFp8) CHECK(y.col(0).allFinite());  // They share a scale there.
  }
}

TEST_CASE("Packing a weight changes no bit of a product of many rows", "[kernels][packed]") {
  const Matrix<float> x = test::random_matrix<float>(70, 1100, 1);
  const Matrix<float> w = test::random_matrix<float>(150, 1100, 2);
  Matrix<float> plain(70, 150);
  multiply_nt<float>(x, w, plain);
  CHECK(product(x, PackedWeight<float>(w, Storage::kPacked)) == plain);
}

TEST_CASE("A row of a product with a packed weight does not depend on the others",
          "[kernels][packed]") {
  for (const Storage storage : kStorages) {
    INFO("storage " << static_cast<int>(storage));
    const Matrix<float> x = test::random_matrix<float>(130, 700, 1);
    const PackedWeight<float> w(test::random_matrix<float>(70, 700, 2), storage);
    const Matrix<float> all = product(x, w);
    for (const Index rows : {1, 2, 3, 4, 5, 8, 40}) {
      CHECK(product<float>(x.middleRows(77, rows), w) == all.middleRows(77, rows));
    }
  }
}

TEST_CASE("Products with packed weights have the same bits for any number of threads",
          "[kernels][packed][parallel]") {
  const auto m = GENERATE(as<Index>{}, 1, 2, 3, 4, 300);
  const Matrix<float> x = test::random_matrix<float>(m, 140, 1);
  for (const Storage storage : kStorages) {
    INFO("storage " << static_cast<int>(storage));
    const PackedWeight<float> w(test::random_matrix<float>(600, 140, 2), storage);
    const Matrix<float> one = product(x, w);
    for (const int count : {2, 3}) {
      const test::Threads team(count);
      CHECK(product(x, w) == one);
    }
  }
}

TEST_CASE("Groups of rows are multiplied with a weight each", "[kernels][packed]") {
  const Matrix<double> x = test::random_matrix(20, 11, 1);
  const Matrix<double> a = test::random_matrix(37, 11, 2);
  const Matrix<double> b = test::random_matrix(37, 11, 3);
  const PackedWeight<double> packed_a(a, Storage::kPacked);
  const PackedWeight<double> packed_b(b, Storage::kPacked);
  Matrix<double> out = Matrix<double>::Constant(20, 37, 1.0);
  const std::array<kernels::PackedTo<double>, 3> products = {{
      {&packed_a, 0, 6, &out(0, 0), 37},
      {&packed_b, 6, 10, &out(6, 0), 37},
      {&packed_a, 16, 0, &out(16, 0), 37},
  }};
  kernels::multiply_packed<double>(x, products);

  Matrix<double> expected = Matrix<double>::Constant(20, 37, 1.0);
  expected.topRows(6) = x.topRows(6) * a.transpose();
  expected.middleRows(6, 10) = x.middleRows(6, 10) * b.transpose();
  CHECK(test::relative_error(out, expected) <= 1e-15);
}

}  // namespace weir::packed_weight_test
