// SPDX-License-Identifier: MIT
/// \file
/// Experts on their way from rank to rank, between two steps.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <weir/core/error.hpp>
#include <weir/core/expert_map.hpp>
#include <weir/core/index_span.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/types.hpp>
#include <weir/core/verbs.hpp>
#include <weir/parallel/mpi/collectives.hpp>
#include <weir/parallel/mpi/expert_names.hpp>
#include <weir/parallel/placement.hpp>

namespace weir::detail {

/// The parameters and buffers of slot l of a bank.
template <class T>
struct ExpertTensors {
  std::vector<Parameter<T>*> parameters;
  std::vector<Buffer<T>*> buffers;
};

template <class Bank>
std::vector<ExpertTensors<typename Bank::Scalar>> tensors_of_experts(Bank& bank) {
  std::vector<ExpertTensors<typename Bank::Scalar>> all(static_cast<std::size_t>(bank.experts()));
  for (auto& [name, parameter] : parameters(bank)) {
    const Index slot = expert_number(name);
    if (slot >= 0) all[static_cast<std::size_t>(slot)].parameters.push_back(parameter);
  }
  for (auto& [name, buffer] : buffers(bank)) {
    const Index slot = expert_number(name);
    if (slot >= 0) all[static_cast<std::size_t>(slot)].buffers.push_back(buffer);
  }
  return all;
}

/// Sends the experts of `from` that other ranks hold in `to` and not in `from`, from the lowest
/// rank that holds them, and makes of `bank` that of the experts which this rank holds in `to`.
/// \param any      Some expert of the same kind, of which new ones are made if the bank has none.
template <class Bank>
void move_experts(Channel& channel, const Placement& from, const Placement& to,
                  std::optional<Bank>& bank, std::optional<Bank>& any) {
  using T = typename Bank::Scalar;
  constexpr auto kWhat = "moves of experts";
  const Index me = channel.rank();
  std::vector<std::string> leaving(static_cast<std::size_t>(channel.size()));
  if (bank) {
    const auto tensors = tensors_of_experts(*bank);
    for (Index e = 0; e < from.experts(); ++e) {
      if (from.owner(e) != me) continue;
      const auto& of_expert = tensors[static_cast<std::size_t>(from.slot(e, me))];
      for (const Index r : to.ranks_of(e)) {
        if (from.holds(r, e)) continue;
        std::string& text = leaving[static_cast<std::size_t>(r)];
        for (const Parameter<T>* parameter : of_expert.parameters) {
          RankText::put(text, parameter->value);
          RankText::put(text, static_cast<std::uint8_t>((parameter->frozen ? 1 : 0) +
                                                        (parameter->grad.size() > 0 ? 2 : 0)));
        }
        for (const Buffer<T>* buffer : of_expert.buffers) RankText::put(text, buffer->value);
      }
    }
  }
  Exchange exchange;
  const std::vector<std::string> texts = all_to_all_texts(channel, exchange, kWhat, leaving);

  const std::span<const Index> own = to.experts_on(me);
  if (own.empty()) {
    if (bank) any.emplace(std::move(*bank)).remap_experts(ExpertMap{.source = {0}});
    bank.reset();
    return;
  }
  std::vector<Index> source;
  for (const Index e : own) source.push_back(bank ? std::max<Index>(from.slot(e, me), 0) : 0);
  if (!bank) bank.swap(any);
  bank->remap_experts(ExpertMap{.source = source});
  const auto tensors = tensors_of_experts(*bank);
  std::vector<RankText> readers;
  for (std::size_t r = 0; r < texts.size(); ++r) {
    readers.emplace_back(kWhat, texts[r], static_cast<Index>(r));
  }
  for (std::size_t l = 0; l < own.size(); ++l) {
    if (from.holds(me, own[l])) continue;
    RankText& reader = readers[static_cast<std::size_t>(from.owner(own[l]))];
    for (Parameter<T>* const parameter : tensors[l].parameters) {
      reader.take(parameter->value);
      const auto marks = reader.template take<std::uint8_t>();
      parameter->frozen = (marks & 1U) != 0;
      parameter->grad.resize(0, 0);
      parameter->fresh = parameter->reached = false;
      if ((marks & 2U) != 0) {
        set_zero(parameter->grad, parameter->value.rows(), parameter->value.cols());
      }
    }
    for (Buffer<T>* const buffer : tensors[l].buffers) reader.take(buffer->value);
  }
  for (const RankText& reader : readers) {
    if (!reader.is_empty()) reader.fail();
  }
}

}  // namespace weir::detail
