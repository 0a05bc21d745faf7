// SPDX-License-Identifier: MIT
/// \file
/// The page of a training run, kept up to date while it goes on.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unistd.h>
#include <utility>
#include <vector>

#include <weir/core/pass.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/routing_observer.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/moe/routing.hpp>

#include "report_describe.hpp"
#include "report_page.hpp"

namespace report {

/// The largest logit of each layer, in absolute value, since it was cleared.
class LogitSizes final : public weir::RoutingObserver {
 public:
  void see(std::string_view layer, const weir::Routing<float>& routing,
           const weir::Pass& pass) override {
    add(layer, routing, pass);
  }
  void see(std::string_view layer, const weir::Routing<double>& routing,
           const weir::Pass& pass) override {
    add(layer, routing, pass);
  }
  void clear() { largest_.clear(); }
  const std::map<std::string, double, std::less<>>& largest() const { return largest_; }

 private:
  template <class T>
  void add(std::string_view layer, const weir::Routing<T>& routing, const weir::Pass& pass) {
    auto found = largest_.find(layer);
    if (found == largest_.end()) found = largest_.emplace(std::string(layer), 0.0).first;
    for (Index t = 0; t < routing.tokens(); ++t) {
      if (pass.is_padding(t)) continue;
      for (const T logit : routing.logits.row(t)) {
        const double size = std::abs(static_cast<double>(logit));
        if (std::isfinite(size)) found->second = std::max(found->second, size);
      }
    }
  }

  std::map<std::string, double, std::less<>> largest_;
};

/// Curves over steps, of at most some hundred points: when there are more, neighbours become their
/// mean.
class Curves {
 public:
  /// Adds a value of the current step; a value that is not finite is left out.
  void add(const std::string& name, double value) {
    if (!std::isfinite(value)) return;
    auto& [sum, count] = now_[name];
    sum += value;
    count += 1.0;
  }
  void end_step(Index step);
  /// Ends the last step, whose values may still wait for neighbours.
  void finish(Index step) {
    if (now_.empty()) return;
    taken_ = stride_ - 1;
    end_step(step);
  }

  const std::vector<double>& steps() const { return steps_; }
  /// One value for each of `steps`, or null.
  Json of(const std::string& name) const {
    Json json = Json::array();
    const auto found = values_.find(name);
    for (std::size_t i = 0; i < steps_.size(); ++i) {
      json.push_back(found == values_.end() ? Json() : number(found->second[i]));
    }
    return json;
  }
  /// The names that begin with `prefix`, without it.
  std::vector<std::string> names(const std::string& prefix) const {
    std::vector<std::string> found;
    for (const auto& [name, values] : values_) {
      if (name.starts_with(prefix)) found.push_back(name.substr(prefix.size()));
    }
    return found;
  }

 private:
  static constexpr std::size_t kMost = 400;

  static double mean(double a, double b) {
    return std::isnan(a) ? b : std::isnan(b) ? a : (a + b) / 2.0;
  }

  std::vector<double> steps_;
  std::map<std::string, std::vector<double>> values_;  // One for each step, NaN without any.
  std::map<std::string, std::pair<double, double>> now_;
  Index taken_ = 0, stride_ = 1;
};

inline void Curves::end_step(Index step) {
  if (++taken_ < stride_) return;
  taken_ = 0;
  for (const auto& [name, sum] : now_) values_[name].resize(steps_.size(), weir::kUnknown);
  steps_.push_back(static_cast<double>(step));
  for (auto& [name, values] : values_) {
    const auto found = now_.find(name);
    values.push_back(found == now_.end() ? weir::kUnknown
                                         : found->second.first / found->second.second);
  }
  now_.clear();
  if (steps_.size() < kMost) return;
  for (std::size_t i = 0; i + 1 < kMost; i += 2) {
    for (auto& [name, values] : values_) values[i / 2] = mean(values[i], values[i + 1]);
    steps_[i / 2] = steps_[i + 1];
  }
  steps_.resize(kMost / 2);
  for (auto& [name, values] : values_) values.resize(kMost / 2);
  stride_ *= 2;
}

/// Megabytes of memory that the program has; not a number where the system does not say.
inline double memory_in_use() {
  std::ifstream file("/proc/self/statm");
  double all = 0.0;
  double resident = weir::kUnknown;
  if (!(file >> all >> resident)) return weir::kUnknown;
  return resident * static_cast<double>(::sysconf(_SC_PAGESIZE)) / 1e6;
}

/// What one step of training did.
struct LiveStep {
  Index step = 0;
  double loss = 0.0;  ///< Nats per token.
  double gradient_norm = 0.0;
  double tokens_per_second = 0.0;
  std::optional<double> validation = {};     ///< Bits per token.
  const weir::PassRecord* record = nullptr;  ///< The reports and losses of the step.
  std::map<std::string, double> bias = {};   ///< Of each layer, largest less smallest.
};

/// report.html and report.json in a folder: the curves of a run, where its tokens go, and warnings
/// in words. Both files are replaced as a whole.
class LiveReport {
 public:
  /// \throws std::filesystem::filesystem_error  if there can be no such folder.
  LiveReport(const std::filesystem::path& folder, Index steps) : folder_(folder), steps_(steps) {
    std::filesystem::create_directories(folder);
  }

  /// What the passes of training have to show their routings to.
  LogitSizes& logits() { return logits_; }

  void add(const LiveStep& step);

  /// Where the tokens of the validation text go, from now on.
  void set_routes(Model model);

  /// Whether the files are old enough to be written anew.
  bool is_due() const { return Clock::now() - written_ > std::chrono::seconds(10); }

  /// \param facts    [name, value] pairs for the head of the page.
  /// \throws FileError  if the files cannot be written.
  void write(const Json& facts, bool running);

 private:
  using Clock = std::chrono::steady_clock;

  struct Window {
    std::vector<double> load;
    double tokens = 0.0, dropped = 0.0, assigned = 0.0;
  };

  std::vector<Saying> sayings() const;
  Json training(bool running) const;

  std::filesystem::path folder_;
  Index steps_;
  LogitSizes logits_;
  Curves curves_;
  Index step_ = 0;
  double loss_ = 0.0;
  std::map<std::string, double> largest_logit_;
  std::map<std::string, Window> window_;  // Since the files were written.
  // Where the tokens of a model go, and what the page shows of that.
  Json routes_ = {{"domains", Json::array()}, {"models", Json::array()}, {"says", Json::array()}};
  Json routes_on_page_ = routes_;
  Clock::time_point written_ = {};
};

inline void LiveReport::add(const LiveStep& step) {
  const double bits = step.loss / std::log(2.0);
  step_ = step.step;
  loss_ = step.loss;
  curves_.add("loss", bits);
  curves_.add("gradient", step.gradient_norm);
  curves_.add("rate", step.tokens_per_second);
  curves_.add("memory", memory_in_use());
  if (step.validation) curves_.add("validation", *step.validation);
  std::map<std::string, double> losses;
  for (const weir::PassRecord::Loss& loss : step.record->losses()) {
    losses[loss.name.substr(loss.name.rfind('.') + 1)] += loss.value;
  }
  for (const auto& [name, value] : losses) curves_.add("loss." + name, value);
  for (const auto& [name, report] : step.record->reports()) {
    curves_.add("imbalance:" + name, report.imbalance());
    curves_.add("drop:" + name, report.drop_rate());
    curves_.add("dead:" + name,
                static_cast<double>(std::count(report.load.begin(), report.load.end(), Index(0))));
    curves_.add("entropy:" + name, report.entropy);
    Window& window = window_[name];
    window.load.resize(report.load.size());
    for (std::size_t e = 0; e < report.load.size(); ++e) {
      window.load[e] += static_cast<double>(report.load[e]);
    }
    window.tokens += static_cast<double>(report.tokens);
    window.dropped += static_cast<double>(report.dropped);
    window.assigned += static_cast<double>(report.assignments);
  }
  for (const auto& [name, size] : logits_.largest()) {
    curves_.add("logit:" + name, size);
    largest_logit_[name] = size;
  }
  logits_.clear();
  for (const auto& [name, spread] : step.bias) curves_.add("bias:" + name, spread);
  curves_.end_step(step.step);
}

inline std::vector<Saying> LiveReport::sayings() const {
  constexpr double kManyDrops = 0.2;
  constexpr double kLargeLogit = 50.0;
  std::vector<Saying> says;
  if (!std::isfinite(loss_)) {
    says.push_back({"bad", "The loss is not a finite number any more: training has diverged."});
  }
  double level = 0.0;
  for (const auto& [name, window] : window_) {
    for (Saying& s : collapse_warnings(name, window.load, window.tokens)) {
      says.push_back(std::move(s));
    }
    const double drops = window.assigned > 0.0 ? window.dropped / window.assigned : 0.0;
    if (drops > kManyDrops) {
      says.push_back(
          {"bad", name + " drops " + fixed(100.0 * drops, 0) +
                      " % of its assignments: its load is uneven or its capacity small."});
    }
    const double largest = *std::max_element(window.load.begin(), window.load.end());
    const double sum = window.assigned;
    if (sum > 0.0) {
      level = std::max(level, largest / sum * static_cast<double>(window.load.size()));
    }
  }
  for (const auto& [name, size] : largest_logit_) {
    if (size > kLargeLogit) {
      says.push_back({"bad", name + ": the router's logits reach " + fixed(size, 0) +
                                 ", so that its choice is all but fixed; a z-loss keeps them "
                                 "small."});
    }
  }
  if (says.empty() && !window_.empty()) {
    says.push_back({"good", "No layer collapses: the busiest expert of any layer has " +
                                fixed(level, 2) + " times the mean load."});
  }
  return says;
}

inline Json LiveReport::training(bool running) const {
  Json json = {{"running", running}, {"step", curves_.steps()}};
  for (const char* const name : {"loss", "validation", "rate", "memory", "gradient"}) {
    json[name] = curves_.of(name);
  }
  json["losses"] = curves_.names("loss.");
  for (const std::string& name : curves_.names("loss.")) {
    json["loss." + name] = curves_.of("loss." + name);
  }
  for (const std::string& layer : curves_.names("imbalance:")) {
    Json one = {{"name", layer}};
    for (const char* const key : {"imbalance", "drop", "dead", "entropy", "logit", "bias"}) {
      const std::string name = std::string(key) + ":" + layer;
      const auto known = curves_.names(std::string(key) + ":");
      if (std::find(known.begin(), known.end(), layer) != known.end()) one[key] = curves_.of(name);
    }
    json["layers"].push_back(std::move(one));
  }
  return json;
}

inline void LiveReport::set_routes(Model model) {
  Options how;
  how.bootstrap = {.replicates = 50, .random_routings = 5};
  std::vector<Model> models;
  models.push_back(std::move(model));
  Table ignored;
  const Json all = describe(
      models, [] { return std::make_unique<Bytes>(); }, how, ignored);
  routes_on_page_ = for_page(all, models, how);
  routes_ = all;
}

inline void LiveReport::write(const Json& facts, bool running) {
  constexpr int kReloadSeconds = 10;
  if (!running) curves_.finish(step_);
  Json says = Json::array();
  for (const Saying& saying : sayings()) says.push_back({saying.kind, saying.text});
  for (const Json& saying : routes_["says"]) {
    if (saying[0] == "") says.push_back(saying);
  }
  const Json run = {
      {"says", std::move(says)},
      {"title", running
                    ? "Training, step " + std::to_string(step_) + " of " + std::to_string(steps_)
                    : "Training, " + std::to_string(step_) + " steps"},
      {"intro",
       "How a mixture-of-experts model learns, and where the tokens of its validation text go."},
      {"facts", facts},
      {"training", training(running)}};
  const auto with = [&](Json data) {
    data.update(run);
    return data;
  };
  weir::io::write_file(folder_ / "report.html",
                       page(with(routes_on_page_), running ? kReloadSeconds : 0));
  weir::io::write_file(folder_ / "report.json",
                       with(routes_).dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  window_.clear();
  written_ = Clock::now();
}

}  // namespace report
