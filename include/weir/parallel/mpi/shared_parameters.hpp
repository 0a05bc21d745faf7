// SPDX-License-Identifier: MIT
/// \file
/// Which parameters of a model other ranks have as well, and which rank of those looks after each.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/list.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/walk.hpp>
#include <weir/parallel/mpi/collectives.hpp>

namespace weir {

/// The parameters of a model that is spread over ranks, by their names: dense parameters are on all
/// ranks, an expert on those that hold it. Each has an owner, one of its ranks, such that the ranks
/// own about the same number of numbers: taken in the order of their sizes, the largest first, each
/// goes to the one of its ranks that owns least so far. All ranks know all of this.
template <class T>
class SharedParameters {
 public:
  struct Entry {
    std::string name;
    Index rows = 0, cols = 0;
    List<Index> ranks;  ///< Those that have it, in ascending order.
    Index owner = 0;
    bool frozen = false;
    Parameter<T>* parameter = nullptr;  ///< This rank's; null if it has none.

    Index size() const { return rows * cols; }
    bool is_shared() const { return ranks.count() > 1; }
    bool is_on(Index rank) const { return std::ranges::binary_search(ranks, rank); }
  };

  /// Tells all ranks what parameters this one has. Collective.
  /// \throws RankError    if a rank has a parameter in another shape, or frozen where another has
  ///                      it not.
  template <class Model>
  void agree(Channel& channel, Exchange& exchange, Model& model);

  /// Finds the parameters of `model`, which may have moved.
  /// \param who      The name of the function, for messages.
  /// \throws StateError   if they are not those of the last `agree`.
  template <class Model>
  void find(std::string_view who, Model& model) {
    Finder finder(*this);
    finder("", model);
    if (finder.same && finder.next == mine_.count()) return;
    throw_error<StateError>(who,
                            ": the model has other parameters than before, expected agree() "
                            "on all ranks after a change");
  }

  /// All parameters of all ranks, those that rank 0 has in its order, then those that it has not.
  List<Entry>& all() { return all_; }
  const List<Entry>& all() const { return all_; }

 private:
  struct Finder final : Walk<T> {
    explicit Finder(SharedParameters& s) : shared(s) {}
    void at_parameter(std::string_view name, Parameter<T>& parameter) override {
      if (!same || next == shared.mine_.count()) {
        same = false;
        return;
      }
      Entry& entry = shared.all_[shared.mine_[next++]];
      same = entry.name == name && entry.frozen == parameter.frozen &&
             entry.rows == parameter.value.rows() && entry.cols == parameter.value.cols();
      entry.parameter = &parameter;
    }
    SharedParameters& shared;
    Index next = 0;
    bool same = true;
  };

  struct Lister final : Walk<T> {
    void at_parameter(std::string_view name, Parameter<T>& parameter) override {
      text.append(name).append(1, '\n');
      text += std::to_string(parameter.value.rows()) + ' ' +
              std::to_string(parameter.value.cols()) + (parameter.frozen ? " 1\n" : " 0\n");
    }
    std::string text;
  };

  void read(std::string_view text, Index rank, Index me, std::map<std::string, Index>& places);
  void choose_owners(Index ranks);

  List<Entry> all_;
  List<Index> mine_;  // The places in `all_` of this rank's, in the order of its model.
};

template <class T>
template <class Model>
void SharedParameters<T>::agree(Channel& channel, Exchange& exchange, Model& model) {
  Lister lister;
  lister("", model);
  const std::vector<std::string> texts =
      all_gather_texts(channel, exchange, "names of parameters", lister.text);
  all_.clear();
  mine_.clear();
  std::map<std::string, Index> places;
  for (int r = 0; r < channel.size(); ++r) {
    read(texts[static_cast<std::size_t>(r)], r, channel.rank(), places);
  }
  choose_owners(channel.size());
  find("SharedParameters::agree", model);
}

template <class T>
void SharedParameters<T>::read(std::string_view text, Index rank, Index me,
                               std::map<std::string, Index>& places) {
  const auto line = [&] {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view taken = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    return taken;
  };
  while (!text.empty()) {
    Entry entry;
    entry.name = line();
    const std::string_view numbers = line();
    const char* at = numbers.data();
    const char* const end = at + numbers.size();
    at = std::from_chars(at, end, entry.rows).ptr;
    at = std::from_chars(at < end ? at + 1 : at, end, entry.cols).ptr;
    entry.frozen = numbers.ends_with(" 1");
    const auto [known, is_new] = places.try_emplace(entry.name, all_.count());
    if (is_new) {
      all_.push_back(std::move(entry));
    } else {
      const Entry& first = all_[known->second];
      if (first.rows != entry.rows || first.cols != entry.cols || first.frozen != entry.frozen) {
        throw_error<RankError>("names of parameters: ", entry.name, " of rank ", rank, " is [",
                               entry.rows, ", ", entry.cols, "]", entry.frozen ? ", frozen" : "",
                               ", expected [", first.rows, ", ", first.cols, "]",
                               first.frozen ? ", frozen" : "", " as on rank ", first.ranks.front());
      }
    }
    all_[known->second].ranks.push_back(rank);
    if (rank == me) mine_.push_back(known->second);
  }
}

template <class T>
void SharedParameters<T>::choose_owners(Index ranks) {
  List<Index> order(all_.count());
  for (Index i = 0; i < order.count(); ++i) order[i] = i;
  std::ranges::stable_sort(order,
                           [&](Index a, Index b) { return all_[a].size() > all_[b].size(); });
  List<Index> owned(ranks, 0);
  for (const Index i : order) {
    Entry& entry = all_[i];
    entry.owner = *std::ranges::min_element(entry.ranks,
                                            [&](Index a, Index b) { return owned[a] < owned[b]; });
    owned[entry.owner] += entry.size();
  }
}

}  // namespace weir
