// SPDX-License-Identifier: MIT
/// \file
/// Golden files made in memory, for the tests of the families that read them.
#pragma once

#include <cstdint>
#include <map>
#include <sstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/io/safetensors.hpp>

#include "golden/case_file.hpp"
#include "golden/checker.hpp"
#include "golden/families.hpp"
#include "io/files.hpp"
#include "support/matrices.hpp"

namespace weir::golden {

/// A file of the given case and configuration. Tensors are added, and then it is checked as
/// check_golden would.
class MadeCase {
 public:
  using Config = std::map<std::string, std::string>;
  using Shape = std::vector<Index>;
  using Integers = std::vector<std::int64_t>;

  MadeCase(std::string name, Config config) : name_(std::move(name)), config_(std::move(config)) {}

  /// A copy of an existing file.
  explicit MadeCase(Safetensors file) {
    constexpr std::string_view kPrefix = "cfg.";
    CaseFile reader(std::move(file));
    for (const auto& [key, value] : reader.file().metadata()) {
      if (key == "case") name_ = value;
      if (key.starts_with(kPrefix)) config_[key.substr(kPrefix.size())] = value;
    }
    for (const auto& [name, tensor] : reader.file().tensors()) {
      shapes_[name] = tensor.shape;
      if (tensor.dtype == io::Dtype::kI64) {
        integers_[name] = reader.integers(name);
      } else {
        reals_[name] = reader.matrix(name);
      }
    }
  }

  std::string& name() { return name_; }
  Config& config() { return config_; }
  const std::string& text(const std::string& key) const { return config_.at(key); }
  Index size(const std::string& key) const { return std::stol(text(key)); }

  /// Adds a tensor of random numbers. All axes but the last are joined to rows.
  Matrix<double>& random(const std::string& name, const Shape& shape, std::uint64_t seed) {
    Index rows = 1;
    for (std::size_t axis = 0; axis + 1 < shape.size(); ++axis) rows *= shape[axis];
    return reals(name, shape, test::random_matrix(rows, shape.back(), seed));
  }

  Matrix<double>& reals(const std::string& name, const Shape& shape, Matrix<double> values) {
    shapes_[name] = shape;
    return reals_[name] = std::move(values);
  }

  void scalar(const std::string& name, double value) {
    reals(name, {}, Matrix<double>::Constant(1, 1, value));
  }

  void integers(const std::string& name, const Shape& shape, Integers values) {
    shapes_[name] = shape;
    integers_[name] = std::move(values);
  }

  const Matrix<double>& at(const std::string& name) const { return reals_.at(name); }
  Matrix<double>& at(const std::string& name) { return reals_.at(name); }
  Integers& integers_at(const std::string& name) { return integers_.at(name); }

  /// Removes all tensors whose names begin with `prefix`.
  void erase(const std::string& prefix) {
    const auto is_gone = [&](const auto& tensor) { return tensor.first.starts_with(prefix); };
    std::erase_if(shapes_, is_gone);
    std::erase_if(reals_, is_gone);
    std::erase_if(integers_, is_gone);
  }

  /// Adds `to` + name for each tensor `from` + name: the gradient of `loss(*this)` by central
  /// differences of fourth order.
  template <class Loss>
  void differentiate(const std::string& from, const std::string& to, Loss&& loss) {
    constexpr double kStep = 1e-4;
    std::map<std::string, Matrix<double>> gradients;
    for (auto& [name, values] : reals_) {
      if (!name.starts_with(from)) continue;
      Matrix<double> gradient(values.rows(), values.cols());
      for (Index i = 0; i < values.size(); ++i) {
        double& value = values.data()[i];
        const double before = value;
        const auto difference = [&](double step) {
          value = before + step;
          const double above = loss(*this);
          value = before - step;
          return above - loss(*this);
        };
        const double near = difference(kStep), far = difference(2.0 * kStep);
        gradient.data()[i] = (8.0 * near - far) / (12.0 * kStep);
        value = before;
      }
      gradients[name] = std::move(gradient);
    }
    for (auto& [name, gradient] : gradients) {
      reals(to + name.substr(from.size()), shapes_.at(name), std::move(gradient));
    }
  }

  struct Outcome {
    int checks = 0;
    int failures = 0;
    std::string text;  ///< What check_golden prints.
  };

  /// \param tolerance  That of central differences, by default.
  Outcome check(double tolerance = 1e-7) const {
    CaseFile file(Safetensors(name_ + ".safetensors", bytes()));
    std::ostringstream out;
    Checker checker(file, tolerance, out);
    for (const Family& family : kFamilies) {
      if (file.family() == family.number) family.check(file, checker);
    }
    checker.finish();
    return {checker.checks(), checker.failures(), out.str()};
  }

 private:
  std::string bytes() const {
    std::string header = R"({"__metadata__":{"case":")" + name_ + '"';
    for (const auto& [key, value] : config_) header += ",\"cfg." + key + "\":\"" + value + '"';
    header += '}';
    std::string data;
    for (const auto& [name, shape] : shapes_) {
      const auto integers = integers_.find(name);
      const bool is_real = integers == integers_.end();
      const std::size_t begin = data.size();
      const auto append = [&](const auto* values, std::size_t count) {
        data.append(reinterpret_cast<const char*>(values), count * sizeof(*values));
      };
      if (is_real) {
        append(reals_.at(name).data(), static_cast<std::size_t>(reals_.at(name).size()));
      } else {
        append(integers->second.data(), integers->second.size());
      }
      header += ",\"" + name + R"(":{"dtype":")" + (is_real ? "F64" : "I64") + R"(","shape":[)";
      for (std::size_t i = 0; i < shape.size(); ++i) {
        header += (i == 0 ? "" : ",") + std::to_string(shape[i]);
      }
      header +=
          "],\"data_offsets\":[" + std::to_string(begin) + "," + std::to_string(data.size()) + "]}";
    }
    return test::file_of(header + "}", data);
  }

  std::string name_;
  Config config_;
  std::map<std::string, Shape> shapes_;
  std::map<std::string, Matrix<double>> reals_;
  std::map<std::string, Integers> integers_;
};

}  // namespace weir::golden
