// SPDX-License-Identifier: MIT
/// \file
/// Which numbers of a published checkpoint are which numbers of a model.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstddef>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/types.hpp>
#include <weir/presets/tensor_names.hpp>

namespace weir::io {

/// A matrix of a model: its name and its shape.
struct NamedShape {
  std::string name;
  Index rows = 0, cols = 0;
};

/// Some rows of a matrix of a model, as they lie in a published tensor: the number in row
/// `first_row` + i and column j is number begin + i * row_step + j * col_step of the tensor.
struct TensorPiece {
  std::size_t matrix = 0;  ///< Its position in the list of matrices.
  Index first_row = 0, rows = 0, cols = 0;
  Index begin = 0, row_step = 0, col_step = 0;
};

/// A tensor of a published checkpoint, made of pieces that cover it.
struct PublishedTensor {
  std::string name;
  std::vector<Index> shape;
  std::vector<TensorPiece> pieces;
};

/// How the rows of queries, keys and values divide into heads.
struct HeadSizes {
  Index heads = 1;     ///< For Turns::kHeads and Arrangement::heads.
  Index head_dim = 2;  ///< For Arrangement::pairs.
};

/// The tensors of a published checkpoint for a model with these matrices, in the order of their
/// first parts.
/// \throws ConfigError  if a matrix has no entry in `names`, or the parts of a tensor do not fit
///                      each other.
std::vector<PublishedTensor> published_layout(std::span<const presets::TensorName> names,
                                              const std::vector<NamedShape>& matrices,
                                              const HeadSizes& sizes = {});

/// Leaves pieces out of a layout that was made for the matrices `whole`, so that it is one for
/// `part`, some of them in any order. Tensors stay, also without a piece.
/// \throws ConfigError  if a matrix of `part` is not one of `whole`.
inline void leave_out(std::string_view who, const std::vector<NamedShape>& whole,
                      const std::vector<NamedShape>& part, std::vector<PublishedTensor>& layout) {
  std::map<std::string_view, std::size_t> places;
  for (std::size_t m = 0; m < whole.size(); ++m) places[whole[m].name] = m;
  std::vector<std::optional<std::size_t>> place(whole.size());
  for (std::size_t m = 0; m < part.size(); ++m) {
    const auto found = places.find(part[m].name);
    const bool same = found != places.end() && whole[found->second].rows == part[m].rows &&
                      whole[found->second].cols == part[m].cols;
    if (!same) {
      throw_error<ConfigError>(who, ": '", part[m].name, "' is [", part[m].rows, ", ", part[m].cols,
                               "], expected a matrix of the whole model");
    }
    place[found->second] = m;
  }
  for (PublishedTensor& tensor : layout) {
    std::vector<TensorPiece> pieces;
    for (TensorPiece piece : tensor.pieces) {
      if (!place[piece.matrix]) continue;
      piece.matrix = *place[piece.matrix];
      pieces.push_back(piece);
    }
    tensor.pieces = std::move(pieces);
  }
}

namespace detail {

/// The numbers that the marks of a name stand for; -1 where there is none.
struct NameNumbers {
  Index layer = -1, expert = -1;
};

inline constexpr std::string_view kLayerMark = "{l}";
inline constexpr std::string_view kExpertMark = "{e}";

/// What the marks of `pattern` stand for in `name`; nothing if it does not match.
inline std::optional<NameNumbers> match_name(std::string_view pattern, std::string_view name) {
  NameNumbers numbers;
  while (!pattern.empty()) {
    const bool is_layer = pattern.starts_with(kLayerMark);
    if (!is_layer && !pattern.starts_with(kExpertMark)) {
      if (name.empty() || name.front() != pattern.front()) return std::nullopt;
      pattern.remove_prefix(1);
      name.remove_prefix(1);
      continue;
    }
    Index& number = is_layer ? numbers.layer : numbers.expert;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
    if (error != std::errc() || number < 0) return std::nullopt;
    name.remove_prefix(static_cast<std::size_t>(end - name.data()));
    pattern.remove_prefix(kLayerMark.size());
  }
  return name.empty() ? std::optional(numbers) : std::nullopt;
}

/// `pattern` with the numbers in the places of its marks.
inline std::string fill_name(std::string_view pattern, const NameNumbers& numbers) {
  std::string name(pattern);
  const auto fill = [&](std::string_view mark, Index number) {
    const auto at = name.find(mark);
    if (at != std::string::npos) name.replace(at, mark.size(), std::to_string(number));
  };
  fill(kLayerMark, numbers.layer);
  fill(kExpertMark, numbers.expert);
  return name;
}

/// A matrix that is a part of a published tensor.
struct TensorPart {
  Index expert = -1;      ///< -1 where the tensor is of one expert, or of none.
  std::size_t entry = 0;  ///< Of the table of names.
  std::size_t matrix = 0;
};

/// Puts the parts of a tensor into their places. All entries arrange them in the same way.
class TensorPlacing {
 public:
  TensorPlacing(const presets::TensorName& name, const std::vector<NamedShape>& matrices,
                const HeadSizes& sizes)
      : name_(name), how_(name.how), matrices_(matrices), sizes_(sizes) {}

  PublishedTensor place(std::string name, std::vector<TensorPart> parts);

 private:
  /// A matrix as the tensor has it: a vector's numbers are `out`.
  struct Extent {
    Index out = 0, in = 0;
  };

  Extent extent(const TensorPart& part) const {
    const NamedShape& shape = matrices_[part.matrix];
    expect(!how_.vector || shape.rows == 1);
    return how_.vector ? Extent{shape.cols, 1} : Extent{shape.rows, shape.cols};
  }

  void expect(bool fits) const {
    if (!fits) {
      throw_error<ConfigError>("published_layout: the parts of '", name_.theirs,
                               "' do not fit each other");
    }
  }

  /// Rows [first, first + count) of `part` become every `step`-th of the tensor from `at` on.
  void add(const TensorPart& part, Index first, Index count, Index at, Index step);

  /// A part whose rows from `first` on go to `at` and behind it.
  void add_rows(const TensorPart& part, Index first, Index count, Index at);

  const presets::TensorName& name_;
  const presets::Arrangement how_;
  const std::vector<NamedShape>& matrices_;
  HeadSizes sizes_;
  PublishedTensor tensor_;
  Index base_ = 0;  // Where the expert begins.
  Index out_ = 0;   // Of one expert, all parts together.
  Index in_ = 0;
};

inline void TensorPlacing::add(const TensorPart& part, Index first, Index count, Index at,
                               Index step) {
  const Index out_step = how_.transposed ? 1 : in_;
  const Index in_step = how_.transposed ? out_ : 1;
  TensorPiece piece{.matrix = part.matrix,
                    .first_row = first,
                    .rows = count,
                    .cols = in_,
                    .begin = base_ + at * out_step,
                    .row_step = step * out_step,
                    .col_step = in_step};
  if (how_.vector) {
    expect(first == 0 && count == extent(part).out);
    piece.rows = 1;
    piece.cols = count;
    piece.col_step = std::exchange(piece.row_step, 0);
  }
  tensor_.pieces.push_back(piece);
}

inline void TensorPlacing::add_rows(const TensorPart& part, Index first, Index count, Index at) {
  if (!how_.pairs) return add(part, first, count, at, 1);
  const Index half = sizes_.head_dim / 2;
  expect(half > 0 && count % (2 * half) == 0);
  for (Index row = 0; row < count; row += 2 * half) {
    add(part, first + row, half, at + row, 2);
    add(part, first + row + half, half, at + row + 1, 2);
  }
}

inline PublishedTensor TensorPlacing::place(std::string name, std::vector<TensorPart> parts) {
  const auto order = [](const TensorPart& part) { return std::pair(part.expert, part.entry); };
  std::sort(parts.begin(), parts.end(),
            [&](const TensorPart& a, const TensorPart& b) { return order(a) < order(b); });
  const Index experts = parts.back().expert + 1;  // 0 where the tensor is not of all experts.
  const auto count = static_cast<Index>(parts.size()) / std::max<Index>(1, experts);
  expect(static_cast<Index>(parts.size()) == count * std::max<Index>(1, experts));
  const auto part_at = [&](Index i) -> const TensorPart& {
    return parts[static_cast<std::size_t>(i)];
  };
  in_ = extent(part_at(0)).in;
  for (Index p = 0; p < count; ++p) out_ += extent(part_at(p)).out;

  for (Index i = 0; i < static_cast<Index>(parts.size()); ++i) {
    const TensorPart& part = part_at(i);
    const Index first = i - i % count;  // The first part of this expert.
    expect(part.expert == (experts == 0 ? -1 : i / count) &&
           part.entry == part_at(i % count).entry);
    const Extent own = extent(part);
    expect(own.in == in_ && own.out == extent(part_at(i % count)).out);
    base_ = i / count * out_ * in_;
    Index before = 0;
    for (Index p = first; p < i; ++p) before += extent(part_at(p)).out;
    if (how_.heads) {
      expect(parts.size() == 1 && experts == 0 && own.out % sizes_.heads == 0);
      out_ = own.out / sizes_.heads;  // Of one head.
      for (Index h = 0; h < sizes_.heads; ++h) {
        base_ = h * out_ * in_;
        add(part, h * out_, out_, 0, 1);
      }
    } else if (how_.turns == presets::Turns::kOnce) {
      add_rows(part, 0, own.out, before);
    } else if (how_.turns == presets::Turns::kRows) {
      expect(own.out * count == out_);
      add(part, 0, own.out, i % count, count);
    } else {
      const Index heads = sizes_.heads;
      expect(own.out % heads == 0 && out_ % heads == 0);
      for (Index h = 0; h < heads; ++h) {
        add_rows(part, h * own.out / heads, own.out / heads, (h * out_ + before) / heads);
      }
    }
  }
  tensor_.name = std::move(name);
  if (experts > 0 && !how_.flat) tensor_.shape.push_back(experts);
  if (how_.heads) tensor_.shape.push_back(sizes_.heads);
  const Index flat = how_.flat ? std::max<Index>(1, experts) : 1;
  if (how_.vector) {
    tensor_.shape.push_back(flat * out_);
  } else {
    tensor_.shape.push_back(flat * (how_.transposed ? in_ : out_));
    tensor_.shape.push_back(how_.transposed ? out_ : in_);
  }
  return std::move(tensor_);
}

}  // namespace detail

inline std::vector<PublishedTensor> published_layout(std::span<const presets::TensorName> names,
                                                     const std::vector<NamedShape>& matrices,
                                                     const HeadSizes& sizes) {
  struct Found {
    const presets::TensorName* how = nullptr;
    std::vector<detail::TensorPart> parts;
  };
  std::map<std::string, Found> tensors;
  std::vector<std::string> order;
  for (std::size_t m = 0; m < matrices.size(); ++m) {
    std::optional<detail::NameNumbers> numbers;
    std::size_t entry = 0;
    while (entry < names.size() &&
           !(numbers = detail::match_name(names[entry].ours, matrices[m].name))) {
      ++entry;
    }
    if (!numbers) {
      throw_error<ConfigError>("published_layout: '", matrices[m].name,
                               "' has no name in the published layout");
    }
    const presets::TensorName& how = names[entry];
    if (how.theirs.empty()) continue;
    const bool of_all = how.theirs.find(detail::kExpertMark) == std::string_view::npos;
    std::string name = detail::fill_name(how.theirs, *numbers);
    Found& found = tensors[name];
    if (found.parts.empty()) {
      found.how = &how;
      order.push_back(std::move(name));
    }
    found.parts.push_back({of_all ? numbers->expert : -1, entry, m});
  }
  std::vector<PublishedTensor> layout;
  for (const std::string& name : order) {
    Found& found = tensors.at(name);
    layout.push_back(
        detail::TensorPlacing(*found.how, matrices, sizes).place(name, std::move(found.parts)));
  }
  return layout;
}

}  // namespace weir::io
