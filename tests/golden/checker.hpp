// SPDX-License-Identifier: MIT
/// \file
/// Compares what weir computes with a golden file, one line of output for each tensor.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iomanip>
#include <map>
#include <ostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>

#include "golden/case_file.hpp"

namespace weir::golden {

class Checker {
 public:
  Checker(CaseFile& file, double tolerance, std::ostream& out)
      : file_(file), tolerance_(tolerance), out_(out) {}

  /// Says what the lines that follow were computed with.
  void section(const std::string& title) { out_ << "  " << title << ":\n"; }

  /// Says that nothing is compared with the tensors whose names begin with `prefix`, because `why`.
  void leave(const std::string& prefix, const std::string& why) {
    file_.leave(prefix);
    left_.push_back(prefix);
    out_ << "  " << prefix << "* is not compared: " << why << '\n';
  }

  // What the file does not have is not compared.

  /// Passes if the tensor `name` differs by at most `tolerance` times its largest entry. All its
  /// axes but the last make up the rows of `ours`; a scalar is [1, 1].
  void reals(const std::string& name, const Matrix<double>& ours) {
    if (!compares(name)) return;
    const Matrix<double> reference = file_.matrix(name);
    if (ours.rows() != reference.rows() || ours.cols() != reference.cols()) {
      return line(name, false, "weir has " + shape_text({ours.rows(), ours.cols()}));
    }
    // What is left of a sum that cancels is compared absolutely: it is zero but for rounding.
    constexpr double kRoundedZero = 1e-12;
    double error = 0.0;
    double largest = 0.0;
    for (Index i = 0; i < ours.size(); ++i) {
      largest = worst(largest, std::abs(reference.data()[i]));
      error = worst(error, std::abs(ours.data()[i] - reference.data()[i]));
    }
    if (largest > kRoundedZero) error /= largest;
    std::ostringstream text;
    text << "error " << std::scientific << std::setprecision(1) << error;
    line(name, error <= tolerance_, text.str());
  }

  void scalar(const std::string& name, double ours) {
    reals(name, Matrix<double>::Constant(1, 1, ours));
  }

  /// Passes if all elements are equal.
  void integers(const std::string& name, const std::vector<std::int64_t>& ours) {
    if (!compares(name)) return;
    const std::vector<std::int64_t> reference = file_.integers(name);
    if (ours.size() != reference.size()) {
      return line(name, false, "weir has " + std::to_string(ours.size()) + " elements");
    }
    std::size_t different = 0;
    for (std::size_t i = 0; i < ours.size(); ++i) different += ours[i] != reference[i] ? 1U : 0U;
    line(name, different == 0,
         different == 0 ? "equal" : std::to_string(different) + " elements differ");
  }

  /// Records a failure about `name`.
  void failure(const std::string& name, const std::string& why) { line(name, false, why); }

  /// Fails for each tensor of the file that was neither compared nor used as an input, and if there
  /// was nothing to compare at all.
  void finish() {
    if (checks_ == 0) failure("out.*", "the file has no results");
    for (const std::string& name : file_.unused_tensors()) {
      const bool given = name.starts_with("in.") || name.starts_with("w.");
      line(name, false, given ? "not used" : "not checked");
    }
    for (const std::string& key : file_.unused_config()) {
      out_ << "  note: " << key << " = " << file_.file().metadata().at(key) << " is not used\n";
    }
  }

  int checks() const { return checks_; }
  int failures() const { return failures_; }

 private:
  /// The larger of two, NaN being the largest.
  static double worst(double a, double b) { return a > b || std::isnan(a) ? a : b; }

  bool compares(const std::string& name) const {
    const auto begins_name = [&](const std::string& prefix) { return name.starts_with(prefix); };
    return file_.has(name) && std::none_of(left_.begin(), left_.end(), begins_name);
  }

  void line(const std::string& name, bool pass, const std::string& finding) {
    const std::string shape = file_.has(name) ? shape_text(file_.file().tensor(name).shape) : "";
    out_ << "  " << std::left << std::setw(36) << name << ' ' << std::setw(12) << shape << ' '
         << std::setw(16) << finding << ' ' << (pass ? "pass" : "FAIL") << '\n';
    ++checks_;
    failures_ += pass ? 0 : 1;
  }

  CaseFile& file_;
  double tolerance_;
  std::ostream& out_;
  std::vector<std::string> left_;
  int checks_ = 0;
  int failures_ = 0;
};

/// The gradients of a layer's parameters after its backward pass, each to be compared with that of
/// the file, if it has one.
class Gradients {
 public:
  template <class Layer>
  explicit Gradients(Layer& layer) {
    for (auto& [name, parameter] : parameters(layer)) gradients_[name] = parameter->gradient();
  }

  /// Takes out the gradient of `parameter`; [0, 0] if the layer has no such parameter.
  Matrix<double> take(const std::string& parameter) {
    auto node = gradients_.extract(parameter);
    return node.empty() ? Matrix<double>() : std::move(node.mapped());
  }

  /// Compares the gradient of `parameter` with the tensor g.`name`.
  void check(Checker& checker, const std::string& parameter, const std::string& name) {
    checker.reals("g." + name, take(parameter));
  }

  /// Fails for each parameter that was compared with nothing.
  void finish(Checker& checker) const {
    for (const auto& [name, gradient] : gradients_) {
      checker.failure(name, "has a gradient that is compared with nothing");
    }
  }

 private:
  std::map<std::string, Matrix<double>> gradients_;
};

}  // namespace weir::golden
