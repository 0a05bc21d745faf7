// SPDX-License-Identifier: MIT
#include <limits>
#include <string>
#include <vector>

#include <weir/core/verbs.hpp>

#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::verbs_test {

namespace {

struct Leaf {
  using Scalar = double;
  Parameter<double> weight{Matrix<double>::Ones(2, 3)};

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("weight", self.weight);
  }
};

// Acts, and stores its weights, as layers may.
struct Actor {
  using Scalar = double;
  int acts = 0;
  int discards = 0;
  Storage storage = Storage::kTrainable;
  Leaf inside;

  void update_self() { ++acts; }
  void discard_self() { ++discards; }
  void set_storage(Storage wanted) { storage = wanted; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("inside", self.inside);
  }
};

// Stores its weights in one way only.
struct Stubborn {
  using Scalar = double;

  void expect_storable(Storage wanted) const {
    if (wanted != Storage::kPacked) throw_error<StateError>("Stubborn: expected kPacked");
  }

  template <class Self, class Visit>
  static void visit(Self& /*self*/, Visit& /*visit*/) {}
};

// Shows an inner part under its own names.
template <class Inner>
struct Around {
  using Scalar = double;
  Inner inner;

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("", self.inner);
  }
};

// Stores all its members at once, as layers may; one of them is stubborn.
struct Both {
  using Scalar = double;
  Actor first;
  Around<Stubborn> second;
  Actor third;

  void set_storage(Storage wanted) { first.storage = third.storage = wanted; }

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("first", self.first);
    visit("second", self.second);
    visit("third", self.third);
  }
};

struct Tall {
  using Scalar = double;
  Actor before;
  std::vector<Both> both = std::vector<Both>(1);

  template <class Self, class Visit>
  static void visit(Self& self, Visit& visit) {
    visit("before", self.before);
    visit("both", self.both);
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

TEST_CASE("parameters names each parameter by its path, in order", "[core][verbs]") {
  Tree tree;
  std::vector<std::string> names;
  for (const auto& [name, parameter] : parameters(tree)) names.push_back(name);
  CHECK(names ==
        std::vector<std::string>{"first.weight", "many.0.weight", "many.1.weight", "loose.0"});
  CHECK(parameters(tree)[2].parameter == &tree.many[1].weight);
  CHECK(parameter_count(tree) == 3 * 6 + 1);
}

TEST_CASE("buffers are apart from parameters", "[core][verbs]") {
  Tree tree;
  const auto found = buffers(tree);
  REQUIRE(found.size() == 1);
  CHECK(found[0].name == "state");
  CHECK(found[0].buffer == &tree.state);
}

TEST_CASE("A gradient starts as zeros of the shape of its value and stays", "[core][verbs]") {
  Leaf leaf;
  CHECK(leaf.weight.grad.size() == 0);
  CHECK(leaf.weight.gradient() == Matrix<double>::Zero(2, 3));
  leaf.weight.gradient()(1, 2) = 5.0;
  CHECK(leaf.weight.gradient()(1, 2) == 5.0);
}

TEST_CASE("zero_gradients clears gradients and leaves unused ones empty", "[core][verbs]") {
  Tree tree;
  tree.first.weight.gradient().setOnes();
  zero_gradients(tree);
  CHECK(tree.first.weight.grad == Matrix<double>::Zero(2, 3));
  CHECK(tree.many[0].weight.grad.size() == 0);
}

TEST_CASE("update reaches each node that acts, once", "[core][verbs]") {
  Around<Around<Actor>> wrapped;
  update(wrapped);
  update(wrapped);
  CHECK(wrapped.inner.inner.acts == 2);
  Tree tree;
  update(tree);  // Nobody acts.
}

TEST_CASE("discard clears gradients and reaches each node that counts, once", "[core][verbs]") {
  Around<Around<Actor>> wrapped;
  Actor& actor = wrapped.inner.inner;
  actor.inside.weight.gradient().setConstant(std::numeric_limits<double>::quiet_NaN());
  discard(wrapped);
  CHECK(actor.discards == 1);
  CHECK(actor.acts == 0);
  CHECK(actor.inside.weight.grad.size() == 0);  // As before the step.
  actor.inside.weight.gradient().setOnes();
  update(wrapped);
  discard(wrapped);
  CHECK(actor.inside.weight.grad == Matrix<double>::Zero(2, 3));  // As after the last step.
  CHECK(actor.inside.weight.value == Matrix<double>::Ones(2, 3));
  Tree tree;
  discard(tree);  // Nobody counts.
  CHECK(tree.first.weight.grad.size() == 0);
}

TEST_CASE("set_storage reaches what wrappers wrap, and goes no further where it is taken",
          "[core][verbs]") {
  Around<std::vector<Actor>> several;
  several.inner.resize(2);
  set_storage(several, Storage::kPacked);
  CHECK(several.inner[0].storage == Storage::kPacked);
  CHECK(several.inner[1].storage == Storage::kPacked);
}

TEST_CASE("set_storage changes nothing where a part cannot be stored like that", "[core][verbs]") {
  Tall tall;
  CHECK_THROWS_WITH(set_storage(tall, Storage::kBfloat16), "Stubborn: expected kPacked");
  CHECK(tall.before.storage == Storage::kTrainable);
  CHECK(tall.both[0].first.storage == Storage::kTrainable);
  CHECK_THROWS_WITH(expect_storable(tall, Storage::kBfloat16), "Stubborn: expected kPacked");
  set_storage(tall, Storage::kPacked);
  CHECK(tall.before.storage == Storage::kPacked);
  CHECK(tall.both[0].third.storage == Storage::kPacked);
}

TEST_CASE("An empty name adds nothing to the path", "[core][verbs]") {
  Around<Around<Tree>> wrapped;
  CHECK(parameters(wrapped)[0].name == "first.weight");
  CHECK(buffers(wrapped)[0].name == "state");
}

TEST_CASE("freeze takes the parameters whose names match", "[core][verbs]") {
  Tree tree;
  CHECK(freeze(tree, "many.*") == 2);
  CHECK(tree.many[0].weight.frozen);
  CHECK(tree.many[1].weight.frozen);
  CHECK_FALSE(tree.first.weight.frozen);
  CHECK(unfreeze(tree, "many.1.*") == 1);
  CHECK_FALSE(tree.many[1].weight.frozen);
  CHECK(freeze(tree, "*") == 4);
  CHECK(test::message_of<ConfigError>([&] { freeze(tree, "experts.*"); }) ==
        "freeze: no parameter matches 'experts.*', expected at least one");
}

TEST_CASE("Paths of any length are whole", "[core][verbs]") {
  struct Deep : Walk<double> {
    void at_parameter(std::string_view name, Parameter<double>& /*parameter*/) override {
      last = std::string(name);
    }
    std::string last;
  };
  Deep walk;
  Leaf leaf;
  const std::string part(300, 'x');
  std::vector<std::vector<Leaf>> nested(1, std::vector<Leaf>(1));
  walk(part + "." + part, nested);
  CHECK(walk.last == part + "." + part + ".0.0.weight");
  walk("short", leaf);
  CHECK(walk.last == "short.weight");
}

}  // namespace weir::verbs_test
