// SPDX-License-Identifier: MIT
// HierarchicalRouter, HierarchicalTopK and HierarchicalLoss against Mesh TensorFlow's top-2 of
// top-2 (mesh_tensorflow/transformer/moe.py), its tensors and buffers written as loops.
#include <cmath>
#include <vector>

#include <weir/moe/balance/hierarchical_loss.hpp>
#include <weir/moe/router/hierarchical_router.hpp>
#include <weir/moe/router/linear_router.hpp>
#include <weir/moe/selector/hierarchical_top_k.hpp>
#include <weir/ops/softmax.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"

namespace weir::mesh_hierarchical_test {

namespace {

/// What `_top_2_gating` makes of [rows, experts] probabilities.
struct Gating {
  Matrix<double> weight;  ///< [rows, experts], combine_tensor summed over the places.
  Matrix<Index> place;    ///< [rows, experts], of each weight in the expert's buffer; -1: none.
  double loss = 0.0;
};

Gating top_2_gating(const Matrix<double>& raw, Index capacity,
                    const std::vector<double>& importance) {
  const Index rows = raw.rows();
  const Index experts = raw.cols();
  Gating gating{Matrix<double>::Zero(rows, experts), Matrix<Index>::Constant(rows, experts, -1)};
  RowVector<double> density = RowVector<double>::Zero(experts);
  RowVector<double> proxy = RowVector<double>::Zero(experts);
  std::vector<Index> first(static_cast<std::size_t>(rows)), second(first);
  std::vector<double> gate_1(static_cast<std::size_t>(rows), 0.0), gate_2(gate_1);
  for (Index r = 0; r < rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    RowVector<double> rest = raw.row(r);
    rest.maxCoeff(&first[i]);
    if (importance[i] == 1.0) {
      gate_1[i] = rest[first[i]];
      density[first[i]] += 1.0 / static_cast<double>(rows);
      proxy += rest / static_cast<double>(rows);
      rest[first[i]] = 0.0;
    }
    gate_2[i] = rest.maxCoeff(&second[i]);
    const double sum = gate_1[i] + gate_2[i] + 1e-9;
    gate_1[i] /= sum;
    gate_2[i] /= sum;
  }
  gating.loss =
      density.dot(proxy) / static_cast<double>(experts) * static_cast<double>(experts * experts);
  std::vector<Index> taken(static_cast<std::size_t>(experts), 0);
  const auto put = [&](Index r, Index e, double gate) {
    Index& next = taken[static_cast<std::size_t>(e)];
    if (next >= capacity) return;
    gating.weight(r, e) = gate;
    gating.place(r, e) = next++;
  };
  for (Index r = 0; r < rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    if (importance[i] == 1.0) put(r, first[i], gate_1[i]);
  }
  for (Index r = 0; r < rows; ++r) {
    const auto i = static_cast<std::size_t>(r);
    if (importance[i] > 0.0) put(r, second[i], gate_2[i]);
  }
  return gating;
}

/// The two levels, with the room for `factor * tokens / groups` tokens in the buffer of a group.
struct Reference {
  Matrix<double> weight;  ///< [tokens, experts]
  double outer = 0.0, inner = 0.0;
};

Reference mesh(const Matrix<double>& x, const LinearRouter<double>& groups,
               const LinearRouter<double>& experts, double factor) {
  const Index tokens = x.rows();
  const Index count = groups.experts();
  const Index size = experts.experts() / count;
  const auto places =
      static_cast<Index>(factor * static_cast<double>(tokens) / static_cast<double>(count));
  const Gating level_1 = top_2_gating(softmax<double>(infer(groups, x)), places,
                                      std::vector<double>(static_cast<std::size_t>(tokens), 1.0));
  Reference result{Matrix<double>::Zero(tokens, count * size), level_1.loss};
  for (Index g = 0; g < count; ++g) {
    // Empty places hold zeros, for which every expert is as likely, and have no importance.
    Matrix<double> buffer = Matrix<double>::Zero(places, x.cols());
    std::vector<double> importance(static_cast<std::size_t>(places), 0.0);
    for (Index t = 0; t < tokens; ++t) {
      if (level_1.place(t, g) < 0) continue;
      buffer.row(level_1.place(t, g)) = x.row(t);
      importance[static_cast<std::size_t>(level_1.place(t, g))] =
          level_1.weight(t, g) > 0.5 ? 1.0 : 0.5;
    }
    const Matrix<double> logits = infer(experts, buffer).middleCols(g * size, size);
    const Gating level_2 = top_2_gating(softmax<double>(logits), places, importance);
    result.inner += level_2.loss / static_cast<double>(count);
    for (Index t = 0; t < tokens; ++t) {
      if (level_1.place(t, g) < 0) continue;
      result.weight.row(t).segment(g * size, size) =
          level_1.weight(t, g) * level_2.weight.row(level_1.place(t, g));
    }
  }
  return result;
}

}  // namespace

TEST_CASE("The hierarchical parts are Mesh TensorFlow's top-2 of top-2", "[moe][hierarchical]") {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    INFO("seed " << seed);
    const Index groups = 2 + static_cast<Index>(seed % 3);
    const LinearRouter<double> outer(test::random_matrix(groups, 5, 100 + seed));
    const LinearRouter<double> inner(test::random_matrix(groups * 4, 5, 200 + seed));
    const Matrix<double> x = test::random_matrix(24, 5, 300 + seed);
    const Routing<double> routing = test::route(HierarchicalTopK<double>({.groups = groups}),
                                                infer(HierarchicalRouter(outer, inner), x));
    Matrix<double> weight = Matrix<double>::Zero(24, groups * 4);
    for (Index t = 0; t < 24; ++t) {
      for (Index a = routing.first(t); a < routing.last(t); ++a) {
        weight(t, routing.expert[a]) = routing.weight[a];
      }
    }
    const double loss =
        test::loss_of(HierarchicalLoss<double>({.groups = groups, .coefficient = 1.0}), routing);
    // Large enough that no buffer overflows: only the length of the buffers differs.
    for (const double room : {1.0, 2.0}) {
      const double factor = room * static_cast<double>(groups);
      const Reference expected = mesh(x, outer, inner, factor);
      REQUIRE(test::relative_error(weight, expected.weight) <= 1e-7);  // 1e-9 in denominators.
      REQUIRE(loss == Approx(expected.outer + factor * factor * expected.inner));
    }
  }
}

}  // namespace weir::mesh_hierarchical_test
