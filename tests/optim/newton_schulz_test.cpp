// SPDX-License-Identifier: MIT
#include <Eigen/SVD>

#include <weir/optim/newton_schulz.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/threads.hpp"

namespace weir::newton_schulz_test {

namespace {

template <class T>
Matrix<T> orthogonalised(const Matrix<T>& m, Index iterations = 5) {
  NewtonSchulzCache<T> cache;
  return newton_schulz<T>(m, iterations, cache);
}

}  // namespace

TEST_CASE("newton_schulz reproduces values computed elsewhere", "[optim][muon][golden]") {
  // The polynomial in plain double arithmetic, without matrix library.
  Matrix<double> m(2, 3);
  m << 1.0, 2.0, -1.0, 0.5, -1.5, 3.0;
  Matrix<double> one(2, 3);
  one << 0.6401515151765839, 0.765014364827482, 0.08125261655937621, 0.37160462414086054,
      -0.08423654137121028, 0.7868194813732434;
  Matrix<double> five(2, 3);
  five << 0.6307377283865314, 0.73683465193027, 0.10375939839337966, 0.3678329446775451,
      -0.05421722434704801, 0.7380034145054482;
  CHECK(test::relative_error(orthogonalised(m, 0), Matrix<double>(m / m.norm())) < 1e-15);
  CHECK(test::relative_error(orthogonalised(m, 1), one) < 1e-14);
  CHECK(test::relative_error(orthogonalised(m), five) < 1e-14);
  CHECK(test::relative_error(orthogonalised<double>(m.transpose()),
                             Matrix<double>(five.transpose())) < 1e-14);
}

TEST_CASE("newton_schulz has singular values about one and the singular vectors of its argument",
          "[optim][muon]") {
  const auto [rows, cols] = GENERATE(values<std::pair<Index, Index>>(
      {{1, 1}, {1, 7}, {7, 1}, {5, 5}, {6, 20}, {20, 6}, {33, 64}}));
  const Matrix<double> m = test::random_matrix(rows, cols, 1);
  const Eigen::JacobiSVD<Eigen::MatrixXd> svd(m, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const Matrix<double> d = svd.matrixU().transpose() * orthogonalised(m) * svd.matrixV();
  for (Index i = 0; i < d.rows(); ++i) {
    for (Index j = 0; j < d.cols(); ++j) {
      if (i != j) {
        CHECK(std::abs(d(i, j)) < 1e-9);
      } else if (svd.singularValues()[i] > 1e-2 * m.norm()) {
        CHECK(d(i, i) > 0.65);
        CHECK(d(i, i) < 1.25);
      }
    }
  }
}

TEMPLATE_TEST_CASE("newton_schulz does not depend on the scale of its argument", "[optim][muon]",
                   float, double) {
  using T = TestType;
  const Matrix<T> m = test::random_matrix<T>(4, 6, 2);
  const Matrix<T> expected = orthogonalised(m);
  for (const T scale : {std::numeric_limits<T>::min() * T(1e6), T(1e-20), T(1e20),
                        std::numeric_limits<T>::max() / T(10)}) {
    CHECK(test::relative_error(orthogonalised<T>(scale * m), expected) <
          100 * std::numeric_limits<T>::epsilon());
  }
}

TEST_CASE("newton_schulz of zero and of nothing is what it was", "[optim][muon]") {
  CHECK(orthogonalised<float>(Matrix<float>::Zero(3, 4)) == Matrix<float>::Zero(3, 4));
  CHECK(orthogonalised<float>(Matrix<float>(0, 4)).size() == 0);
}

TEST_CASE(
    "newton_schulz allocates nothing when it has seen the size, and has the same bits on any "
    "number of threads",
    "[optim][muon]") {
  const Matrix<float> m = test::random_matrix<float>(40, 70, 3);
  NewtonSchulzCache<float> cache;
  const Matrix<float> expected = newton_schulz<float>(m, 5, cache);
  CHECK(test::count_allocations([&] {
          newton_schulz<float>(m.leftCols(30), 5, cache);
          newton_schulz<float>(m, 5, cache);
        }) == 0);
  const test::Threads threads(2);
  CHECK(newton_schulz<float>(m, 5, cache) == expected);
}

TEST_CASE("newton_schulz refuses a negative number of iterations", "[optim][muon]") {
  CHECK(test::message_of<ConfigError>([] {
          orthogonalised<float>(Matrix<float>::Ones(2, 2), -1);
        }) == "newton_schulz: iterations = -1, expected >= 0");
}

}  // namespace weir::newton_schulz_test
