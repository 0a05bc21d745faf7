// SPDX-License-Identifier: MIT
/// \file
/// A golden file as a family of cases sees it: configuration, inputs and weights, and a record of
/// what has been used.
#pragma once

#include <charconv>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/safetensors.hpp>

namespace weir::golden {

using io::FileError;
using io::Safetensors;
using io::shape_text;
using io::Tensor;

/// The file is sound, but it is a case that this program does not know.
class UnknownCase : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

class CaseFile {
 public:
  explicit CaseFile(Safetensors file) : file_(std::move(file)) {}

  const std::string& path() const { return file_.path(); }
  const Safetensors& file() const { return file_; }

  /// "01b_olmoe": the metadata `case`, or the name of the file if it has none.
  std::string name() const {
    const auto found = file_.metadata().find("case");
    return found != file_.metadata().end() ? found->second : file_name();
  }

  /// The leading number of the metadata `case`, or else of the name of the file; none if both start
  /// with something else.
  std::optional<int> family() const {
    const std::optional<int> number = leading_number(name());
    return number ? number : leading_number(file_name());
  }

  // --- cfg.* ----------------------------------------------------------------------------------

  bool has_config(const std::string& key) const { return file_.metadata().count("cfg." + key) > 0; }

  /// \throws FileError    if there is no such entry; as all of these, if it is not what it should
  /// be.
  std::string text(const std::string& key) {
    const auto found = file_.metadata().find("cfg." + key);
    if (found == file_.metadata().end()) reject("the metadata have no cfg.", key);
    used_config_.insert(found->first);
    return found->second;
  }

  /// A number of things.
  Index size(const std::string& key) {
    constexpr Index kMost = 1'000'000'000;  // The product of two is still an Index.
    const std::string value = text(key);
    Index number = 0;
    if (!parse(value, number) || number < 1 || number > kMost) {
      reject("cfg.", key, " = ", value, ", expected an integer from 1 to ", kMost);
    }
    return number;
  }

  double number(const std::string& key) {
    const std::string value = text(key);
    double number = 0.0;
    if (!parse(value, number) || !std::isfinite(number)) {
      reject("cfg.", key, " = ", value, ", expected a finite number");
    }
    return number;
  }

  /// Nothing where the value is "None".
  std::optional<double> optional_number(const std::string& key) {
    if (text(key) == "None") return std::nullopt;
    return number(key);
  }

  bool flag(const std::string& key) {
    const std::string value = text(key);
    if (value != "True" && value != "False") {
      reject("cfg.", key, " = ", value, ", expected True or False");
    }
    return value == "True";
  }

  // The same for entries that a file may lack, or have as "None".

  std::string text_or(const std::string& key, const std::string& otherwise) {
    if (!has_config(key)) return otherwise;
    const std::string value = text(key);
    return value == "None" ? otherwise : value;
  }

  Index size_or(const std::string& key, Index otherwise) {
    return text_or(key, "") == "" ? otherwise : size(key);
  }

  double number_or(const std::string& key, double otherwise) {
    return text_or(key, "") == "" ? otherwise : number(key);
  }

  bool flag_or(const std::string& key, bool otherwise) {
    return text_or(key, "") == "" ? otherwise : flag(key);
  }

  /// Whether the reference was in training: cfg.mode or cfg.training, and yes without both.
  bool training() {
    const std::string mode = text_or("mode", flag_or("training", true) ? "train" : "eval");
    if (mode != "train" && mode != "eval") reject("cfg.mode = ", mode, ", expected train or eval");
    return mode == "train";
  }

  /// The first word of cfg.activation.
  std::string activation(const std::string& otherwise) {
    const std::string value = text_or("activation", otherwise);
    return value.substr(0, value.find_first_of(" ,(:;"));
  }

  // --- Tensors --------------------------------------------------------------------------------

  bool has(const std::string& name) const { return file_.has(name); }

  const Tensor& tensor(const std::string& name) {
    used_tensors_.insert(name);
    return file_.tensor(name);
  }

  /// Says that the tensors whose names begin with `prefix` are known, though nothing is compared
  /// with them.
  void leave(const std::string& prefix) {
    for (const auto& [name, tensor] : file_.tensors()) {
      if (name.starts_with(prefix)) used_tensors_.insert(name);
    }
  }

  /// The elements of a floating-point tensor, all axes but the last one joined to rows.
  Matrix<double> matrix(const std::string& name) {
    const Tensor& t = tensor(name);
    const std::vector<double> elements = file_.reals(name);
    const Index cols = t.shape.empty() ? 1 : t.shape.back();
    Index rows = 1;
    for (std::size_t axis = 0; axis + 1 < t.shape.size(); ++axis) rows *= t.shape[axis];
    return Eigen::Map<const Matrix<double>>(elements.data(), rows, cols);
  }

  /// The same for a tensor that has to have exactly this shape.
  Matrix<double> matrix(const std::string& name, const std::vector<Index>& shape) {
    expect_shape(name, shape);
    return matrix(name);
  }

  std::vector<std::int64_t> integers(const std::string& name) {
    tensor(name);
    return file_.integers(name);
  }

  std::vector<std::int64_t> integers(const std::string& name, const std::vector<Index>& shape) {
    expect_shape(name, shape);
    return integers(name);
  }

  // --- What nobody has looked at --------------------------------------------------------------

  std::vector<std::string> unused_tensors() const {
    std::vector<std::string> names;
    for (const auto& [name, tensor] : file_.tensors()) {
      if (used_tensors_.count(name) == 0) names.push_back(name);
    }
    return names;
  }

  std::vector<std::string> unused_config() const {
    std::vector<std::string> keys;
    for (const auto& [key, value] : file_.metadata()) {
      if (key.starts_with("cfg.") && used_config_.count(key) == 0) keys.push_back(key);
    }
    return keys;
  }

 private:
  std::string file_name() const { return std::filesystem::path(path()).filename().string(); }

  static std::optional<int> leading_number(const std::string& text) {
    int number = 0;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), number);
    if (end.ec != std::errc() || number < 0) return std::nullopt;
    return number;
  }

  template <class... Parts>
  [[noreturn]] void reject(const Parts&... parts) const {
    throw_error<FileError>(path(), ": ", parts...);
  }

  void expect_shape(const std::string& name, const std::vector<Index>& shape) const {
    const Tensor& t = file_.tensor(name);
    if (t.shape != shape) {
      reject("tensor '", name, "' is ", shape_text(t.shape), ", expected ", shape_text(shape));
    }
  }

  /// All of `text` as a number.
  template <class Number>
  static bool parse(const std::string& text, Number& number) {
    const char* end = text.data() + text.size();
    const auto result = std::from_chars(text.data(), end, number);
    return result.ec == std::errc() && result.ptr == end;
  }

  Safetensors file_;
  std::set<std::string> used_tensors_;
  std::set<std::string> used_config_;
};

}  // namespace weir::golden
