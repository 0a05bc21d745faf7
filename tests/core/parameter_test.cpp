// SPDX-License-Identifier: MIT
#include <string>
#include <vector>

#include <weir/core/parameter.hpp>

#include "support/catch.hpp"

using namespace weir;

namespace {

struct Leaf {
  using Scalar = double;
  Parameter<double> weight{Matrix<double>::Ones(2, 3)};

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight);
  }
};

struct Tree {
  using Scalar = double;
  Leaf first;
  std::vector<Leaf> many = std::vector<Leaf>(2);
  std::vector<Parameter<double>> loose = {{Matrix<double>::Zero(1, 1)}};
  Buffer<double> state{Matrix<double>::Zero(1, 4)};

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("first", self.first);
    visit("many", self.many);
    visit("loose", self.loose);
    visit("state", self.state);
  }
};

}  // namespace

TEST_CASE("parameters names each parameter by its path, in order", "[core][parameter]") {
  Tree tree;
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(tree)) names.push_back(name);
  CHECK(names ==
        std::vector<std::string>{"first.weight", "many.0.weight", "many.1.weight", "loose.0"});
  CHECK(parameters(tree)[2].parameter == &tree.many[1].weight);
  CHECK(parameter_count(tree) == 3 * 6 + 1);
}

TEST_CASE("buffers are apart from parameters", "[core][parameter]") {
  Tree tree;
  const auto found = buffers(tree);
  REQUIRE(found.size() == 1);
  CHECK(found[0].name == "state");
  CHECK(found[0].buffer == &tree.state);
}

TEST_CASE("A gradient starts as zeros of the shape of its value and stays", "[core][parameter]") {
  Leaf leaf;
  CHECK(leaf.weight.grad.size() == 0);
  CHECK(leaf.weight.gradient() == Matrix<double>::Zero(2, 3));
  leaf.weight.gradient()(1, 2) = 5.0;
  CHECK(leaf.weight.gradient()(1, 2) == 5.0);
}

TEST_CASE("zero_gradients clears gradients and leaves unused ones empty", "[core][parameter]") {
  Tree tree;
  tree.first.weight.gradient().setOnes();
  zero_gradients(tree);
  CHECK(tree.first.weight.grad == Matrix<double>::Zero(2, 3));
  CHECK(tree.many[0].weight.grad.size() == 0);
}
