// SPDX-License-Identifier: MIT
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/tensor_layout.hpp>

#include "support/catch.hpp"

namespace weir::io::tensor_layout_test {
namespace {

using presets::Arrangement;
using presets::TensorName;
using presets::Turns;

/// Where number (row, col) of matrix `m` lies: the tensor's name and the place in it.
std::pair<std::string, Index> place_of(const std::vector<PublishedTensor>& layout, std::size_t m,
                                       Index row, Index col) {
  for (const PublishedTensor& tensor : layout) {
    for (const TensorPiece& piece : tensor.pieces) {
      if (piece.matrix != m || row < piece.first_row || row >= piece.first_row + piece.rows)
        continue;
      return {tensor.name,
              piece.begin + (row - piece.first_row) * piece.row_step + col * piece.col_step};
    }
  }
  return {};
}

/// Whether each number of each tensor belongs to exactly one number of a matrix.
bool is_one_to_one(const std::vector<PublishedTensor>& layout, const std::vector<NamedShape>& all) {
  std::map<std::string, std::vector<int>> hits;
  Index numbers = 0;
  for (const PublishedTensor& tensor : layout) {
    Index size = 1;
    for (const Index length : tensor.shape) size *= length;
    hits[tensor.name].assign(static_cast<std::size_t>(size), 0);
    numbers += size;
  }
  Index own = 0;
  for (std::size_t m = 0; m < all.size(); ++m) {
    for (Index i = 0; i < all[m].rows; ++i) {
      for (Index j = 0; j < all[m].cols; ++j, ++own) {
        const auto [name, at] = place_of(layout, m, i, j);
        ++hits[name].at(static_cast<std::size_t>(at));
      }
    }
  }
  return own == numbers && std::all_of(hits.begin(), hits.end(), [](const auto& tensor) {
           return std::all_of(tensor.second.begin(), tensor.second.end(),
                              [](int count) { return count == 1; });
         });
}

TEST_CASE("A matrix is a tensor, and a norm a vector", "[io][layout]") {
  const std::vector<TensorName> names = {{"layers.{l}.a", "model.{l}.a.weight"},
                                         {"norm.weight", "norm", {.vector = true}},
                                         {"state", ""}};
  const std::vector<NamedShape> matrices = {
      {"layers.12.a", 3, 2}, {"norm.weight", 1, 4}, {"state", 1, 1}, {"layers.0.a", 1, 2}};
  const auto layout = published_layout(names, matrices);
  REQUIRE(layout.size() == 3);
  CHECK(layout[0].name == "model.12.a.weight");
  CHECK(layout[0].shape == std::vector<Index>{3, 2});
  CHECK(layout[1].shape == std::vector<Index>{4});
  CHECK(layout[2].shape == std::vector<Index>{1, 2});
  CHECK(place_of(layout, 0, 2, 1) == std::pair<std::string, Index>("model.12.a.weight", 5));
  CHECK(place_of(layout, 1, 0, 3) == std::pair<std::string, Index>("norm", 3));
}

TEST_CASE("Parameters follow one another in a tensor", "[io][layout]") {
  const std::vector<TensorName> names = {{"q", "qkv"}, {"k", "qkv"}, {"v", "qkv"}};
  // In the order of the table, not of the model.
  const std::vector<NamedShape> matrices = {{"v", 2, 3}, {"q", 4, 3}, {"k", 2, 3}};
  const auto layout = published_layout(names, matrices);
  REQUIRE(layout.size() == 1);
  CHECK(layout[0].shape == std::vector<Index>{8, 3});
  CHECK(place_of(layout, 1, 0, 0).second == 0);
  CHECK(place_of(layout, 2, 1, 2).second == (4 + 1) * 3 + 2);
  CHECK(place_of(layout, 0, 0, 1).second == (4 + 2) * 3 + 1);
  CHECK(is_one_to_one(layout, matrices));
}

TEST_CASE("Parameters take turns head by head", "[io][layout]") {
  const std::vector<TensorName> names = {{"k", "kv", {.turns = Turns::kHeads}},
                                         {"v", "kv", {.turns = Turns::kHeads}}};
  const std::vector<NamedShape> matrices = {{"k", 4, 5}, {"v", 6, 5}};
  const auto layout = published_layout(names, matrices, {.heads = 2});
  REQUIRE(layout.size() == 1);
  CHECK(layout[0].shape == std::vector<Index>{10, 5});
  // Head 0: rows 0, 1 of k and 0, 1, 2 of v; head 1: rows 2, 3 of k and 3, 4, 5 of v.
  CHECK(place_of(layout, 0, 1, 0).second == 1 * 5);
  CHECK(place_of(layout, 1, 2, 4).second == 4 * 5 + 4);
  CHECK(place_of(layout, 0, 2, 0).second == 5 * 5);
  CHECK(place_of(layout, 1, 3, 0).second == 7 * 5);
  CHECK(is_one_to_one(layout, matrices));
}

TEST_CASE("Each head may be a matrix of its own", "[io][layout]") {
  const std::vector<NamedShape> matrices = {{"a", 6, 5}, {"b", 4, 5}};  // 3 and 2 rows a head.
  const std::vector<TensorName> names = {{"a", "A", {.transposed = true, .heads = true}},
                                         {"b", "B", {.heads = true}}};
  const auto layout = published_layout(names, matrices, {.heads = 2});
  CHECK(layout[0].shape == std::vector<Index>{2, 5, 3});
  CHECK(layout[1].shape == std::vector<Index>{2, 2, 5});
  CHECK(place_of(layout, 0, 4, 2).second == 1 * 15 + 2 * 3 + 1);
  CHECK(place_of(layout, 1, 3, 2).second == 1 * 10 + 1 * 5 + 2);
  CHECK(is_one_to_one(layout, matrices));
  CHECK_THROWS_WITH(published_layout(names, matrices, {.heads = 5}),
                    "published_layout: the parts of 'A' do not fit each other");
}

TEST_CASE("All experts are in one tensor", "[io][layout]") {
  const auto matrices_of = [](Index gate_rows) {
    std::vector<NamedShape> matrices;
    for (const std::string e : {"0", "1", "2"}) {
      matrices.push_back({"x." + e + ".gate", gate_rows, 2});
      matrices.push_back({"x." + e + ".up", 4, 2});
      matrices.push_back({"x." + e + ".bias", 1, 4});
    }
    return matrices;
  };
  const std::vector<NamedShape> matrices = matrices_of(4);
  SECTION("one part behind the other") {
    const std::vector<TensorName> names = {{"x.{e}.gate", "gate_up"},
                                           {"x.{e}.up", "gate_up"},
                                           {"x.{e}.bias", "bias", {.vector = true}}};
    const auto layout = published_layout(names, matrices);
    REQUIRE(layout.size() == 2);
    CHECK(layout[0].shape == std::vector<Index>{3, 8, 2});
    CHECK(layout[1].shape == std::vector<Index>{3, 4});
    CHECK(place_of(layout, 4, 1, 1).second == 1 * 16 + (4 + 1) * 2 + 1);  // Of expert 1, up.
    CHECK(place_of(layout, 8, 0, 3).second == 2 * 4 + 3);
    CHECK(is_one_to_one(layout, matrices));
    const std::vector<NamedShape> of_one(matrices.begin(), matrices.begin() + 3);
    const auto one = published_layout(names, of_one);
    CHECK(one[0].shape == std::vector<Index>{1, 8, 2});
    CHECK(is_one_to_one(one, of_one));
  }
  SECTION("row by row in turn, transposed") {
    const Arrangement rows{.turns = Turns::kRows, .transposed = true};
    const std::vector<TensorName> names = {{"x.{e}.gate", "gate_up", rows},
                                           {"x.{e}.up", "gate_up", rows},
                                           {"x.{e}.bias", "bias", {.vector = true}}};
    const auto layout = published_layout(names, matrices);
    CHECK(layout[0].shape == std::vector<Index>{3, 2, 8});
    CHECK(place_of(layout, 3, 1, 1).second == 1 * 16 + 1 * 8 + 2);  // Of expert 1, gate.
    CHECK(place_of(layout, 4, 1, 1).second == 1 * 16 + 1 * 8 + 3);
    CHECK(is_one_to_one(layout, matrices));
  }
  SECTION("flat") {
    const std::vector<TensorName> names = {{"x.{e}.gate", "w1", {.flat = true}},
                                           {"x.{e}.up", "w2", {.transposed = true, .flat = true}},
                                           {"x.{e}.bias", "bias", {.vector = true, .flat = true}}};
    const auto layout = published_layout(names, matrices);
    CHECK(layout[0].shape == std::vector<Index>{12, 2});
    CHECK(layout[1].shape == std::vector<Index>{6, 4});
    CHECK(layout[2].shape == std::vector<Index>{12});
    CHECK(place_of(layout, 4, 3, 1).second == (1 * 2 + 1) * 4 + 3);
    CHECK(is_one_to_one(layout, matrices));
    const std::vector<NamedShape> of_one(matrices.begin(), matrices.begin() + 3);
    const auto one = published_layout(names, of_one);
    CHECK(one[0].shape == std::vector<Index>{4, 2});
    CHECK(one[2].shape == std::vector<Index>{4});
    CHECK(is_one_to_one(one, of_one));
  }
  SECTION("parts that do not fit") {
    const std::vector<TensorName> names = {{"x.{e}.gate", "gate_up", {.turns = Turns::kRows}},
                                           {"x.{e}.up", "gate_up", {.turns = Turns::kRows}},
                                           {"x.{e}.bias", "bias"}};
    CHECK_THROWS_WITH(published_layout(names, matrices_of(5)),
                      "published_layout: the parts of 'gate_up' do not fit each other");
    std::vector<NamedShape> incomplete = matrices;
    incomplete.erase(incomplete.begin());  // The gate of expert 0.
    CHECK_THROWS_WITH(published_layout(names, incomplete),
                      "published_layout: the parts of 'gate_up' do not fit each other");
  }
}

TEST_CASE("Halves of a head become pairs", "[io][layout]") {
  const std::vector<TensorName> names = {{"q", "q", {.pairs = true}}};
  const std::vector<NamedShape> matrices = {{"q", 12, 2}};
  const auto layout = published_layout(names, matrices, {.heads = 2, .head_dim = 6});
  // Rows 0 1 2 | 3 4 5 of a head go to 0 2 4 | 1 3 5.
  const std::vector<Index> expected = {0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11};
  for (Index i = 0; i < 12; ++i) {
    CHECK(place_of(layout, 0, i, 1).second == expected[static_cast<std::size_t>(i)] * 2 + 1);
  }
  CHECK(is_one_to_one(layout, matrices));
  CHECK_THROWS_WITH(published_layout(names, matrices, {.heads = 2, .head_dim = 8}),
                    "published_layout: the parts of 'q' do not fit each other");
}

TEST_CASE("Each matrix has a name in the layout", "[io][layout]") {
  const std::vector<TensorName> names = {{"layers.{l}.x", "y.{l}"}};
  for (const std::string name : {"layers.x", "layers.-1.x", "layers.1.xx", "layers.1", "layers.1.y",
                                 "layers.99999999999999999999.x", ""}) {
    CHECK_THROWS_WITH(published_layout(names, {{name, 1, 1}}),
                      "published_layout: '" + name + "' has no name in the published layout");
  }
  const std::vector<TensorName> vectors = {{"x", "y", {.vector = true}}};
  CHECK_THROWS_WITH(published_layout(vectors, {{"x", 2, 3}}),
                    "published_layout: the parts of 'y' do not fit each other");
}

}  // namespace
}  // namespace weir::io::tensor_layout_test
