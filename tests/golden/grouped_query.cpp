// SPDX-License-Identifier: MIT
// Grouped-query attention with a sliding window as Hugging Face's transformers have it for Mistral,
// and as Mistral's own code has it: they differ in the names of the weights, in which numbers are
// rotated together, and in how sequences lie in memory.
#include <charconv>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <weir/attention/grouped_query.hpp>

#include "golden/families.hpp"
#include "golden/moe_case.hpp"

namespace weir::golden {
namespace {

using Gqa = GroupedQueryAttention<double>;

/// "[6, 4]".
std::vector<Index> lengths_of(const std::string& text) {
  std::vector<Index> lengths;
  for (const char* at = text.data(); at != text.data() + text.size();) {
    Index length = 0;
    const auto [end, error] = std::from_chars(at, text.data() + text.size(), length);
    if (error == std::errc()) lengths.push_back(length);
    at = error == std::errc() ? end : at + 1;
  }
  return lengths;
}

/// What differs between the two.
struct Layout {
  bool packed = false;  ///< Mistral's own: sequences of any lengths in one [tokens, d_model].
  Sequences sequences;
  std::string query, key, value, output;

  explicit Layout(CaseFile& file) : packed(file.has_config("seqlens")) {
    if (packed) {
      sequences = Sequences(lengths_of(file.text("seqlens")));
      query = "wq.weight", key = "wk.weight", value = "wv.weight", output = "wo.weight";
    } else {
      sequences = Sequences::uniform(file.size("batch"), file.size("seq"));
      query = "q_proj.weight", key = "k_proj.weight";
      value = "v_proj.weight", output = "o_proj.weight";
    }
  }
};

Gqa read_layer(CaseFile& file, const Layout& layout) {
  Rng rng(1);
  Gqa layer(rng, {.d_model = file.size("d_model"),
                  .heads = file.size("n_heads"),
                  .kv_heads = file.size("n_kv_heads"),
                  .head_dim = file.size_or("head_dim", 0),
                  .rope_theta = file.number_or("rope_theta", 1e4),
                  .rope_layout = layout.packed ? RopeLayout::kInterleaved : RopeLayout::kHalfSplit,
                  .window = static_cast<Index>(file.number_or("sliding_window", 0.0))});
  const auto read = [&](const std::string& name, Parameter<double>& parameter) {
    parameter.value = weight(file, name, parameter.value.rows(), parameter.value.cols());
  };
  read(layout.query, layer.query());
  read(layout.key, layer.key());
  read(layout.value, layer.value());
  read(layout.output, layer.output());
  return layer;
}

/// Which token sees which: a matrix over all tokens if packed, else one for each sequence.
std::vector<std::int64_t> visibility(CaseFile& file, const Layout& layout, const Gqa& layer,
                                     const Pass& pass) {
  std::vector<std::int64_t> sees;
  const std::vector<std::int64_t> theirs =
      file.has("in.mask") ? file.integers("in.mask") : std::vector<std::int64_t>();
  const Sequences& sequences = layout.sequences;
  for (Index s = 0; s < sequences.count(); ++s) {
    const Index first = sequences.begin(s);
    for (Index t = first; t < sequences.end(s); ++t) {
      const Index lowest = first + layer.config().shape().first_visible(t - first);
      const Index begin = layout.packed ? 0 : first;
      const Index end = layout.packed ? sequences.tokens() : sequences.end(s);
      for (Index j = begin; j < end; ++j) {
        // What padding sees is the reference's own affair.
        const std::size_t i = sees.size();
        const bool visible = j >= lowest && j <= t && !pass.is_padding(j);
        sees.push_back(pass.is_padding(t) && i < theirs.size() ? theirs[i] : visible ? 1 : 0);
      }
    }
  }
  return sees;
}

/// Positions whose numbers are the file's own affair, as long as they rise by 1 from one real token
/// of a sequence to the next: rotations depend on differences.
std::vector<std::int64_t> positions_of(CaseFile& file, const Layout& layout, const Pass& pass) {
  std::vector<std::int64_t> positions;
  for (Index s = 0; s < layout.sequences.count(); ++s) {
    for (Index t = 0; t < layout.sequences.length(s); ++t) positions.push_back(t);
  }
  if (!file.has("in.positions")) return positions;
  const std::vector<std::int64_t> theirs = file.integers("in.positions");
  if (theirs.size() != positions.size()) return positions;
  for (Index s = 0; s < layout.sequences.count(); ++s) {
    std::optional<std::int64_t> shift;
    for (Index t = layout.sequences.begin(s); t < layout.sequences.end(s); ++t) {
      const auto i = static_cast<std::size_t>(t);
      if (pass.is_padding(t)) {
        positions[i] = theirs[i];
      } else {
        if (!shift) shift = theirs[i] - positions[i];
        positions[i] += *shift;
      }
    }
  }
  return positions;
}

/// y of each sequence, its tokens decoded one by one.
Matrix<double> decode(const Gqa& layer, const Layout& layout, const Matrix<double>& x) {
  Matrix<double> y(x.rows(), x.cols());
  Gqa::Cache cache;
  for (Index s = 0; s < layout.sequences.count(); ++s) {
    Gqa::State kv;
    for (Index t = layout.sequences.begin(s); t < layout.sequences.end(s); ++t) {
      y.row(t) = weir::decode(layer, x.row(t), kv, cache);
    }
  }
  return y;
}

}  // namespace

void check_grouped_query(CaseFile& file, Checker& checker) {
  const Layout layout(file);
  Gqa layer = read_layer(file, layout);
  const Index tokens = layout.sequences.tokens();
  const Matrix<double> x = file.matrix("in.x");
  const Matrix<double> cotangent = file.has("in.cotangent")
                                       ? file.matrix("in.cotangent")
                                       : Matrix<double>::Zero(x.rows(), x.cols());
  std::vector<std::uint8_t> mask;
  bool padded = false;
  if (file.has("in.attention_mask")) {
    for (const std::int64_t real : file.integers("in.attention_mask")) {
      mask.push_back(real != 0 ? 1 : 0);
      padded = padded || real == 0;
    }
  }
  const Pass pass{.training = true, .sequences = &layout.sequences, .mask = mask};
  Gqa::Cache cache;
  Matrix<double> y = layer.forward(x, pass, cache);
  // What a token of padding gets is the reference's own affair.
  if (file.has("out.y")) {
    const Matrix<double> expected = file.matrix("out.y");
    for (Index t = 0; t < tokens && expected.rows() == tokens; ++t) {
      if (pass.is_padding(t)) y.row(t) = expected.row(t);
    }
  }
  checker.reals("out.y", y);
  checker.scalar("out.loss", y.cwiseProduct(cotangent).sum());
  checker.integers("in.mask", visibility(file, layout, layer, pass));
  const std::vector<std::int64_t> positions = positions_of(file, layout, pass);
  checker.integers("in.positions", positions);
  if (layout.packed) {
    const Index pairs = layer.config().head_dim / 2;
    const std::vector<Index> of_token(positions.begin(), positions.end());
    Scratch<double> table;
    const Rope rope(2 * pairs, {.theta = layer.config().rope_theta});
    rope.tabulate(std::span<const Index>(of_token), table);
    checker.reals("out.freqs_cos", table.view().leftCols(pairs));
    checker.reals("out.freqs_sin", table.view().rightCols(pairs));
  }

  checker.reals("g.x", layer.backward(cotangent, cache));
  Gradients gradients(layer);
  gradients.check(checker, "query", layout.query);
  gradients.check(checker, "key", layout.key);
  gradients.check(checker, "value", layout.value);
  gradients.check(checker, "output", layout.output);
  gradients.finish(checker);

  if (!padded) {
    checker.section("Decoded token by token");
    checker.reals("out.y", decode(layer, layout, x));
  }
}

}  // namespace weir::golden
