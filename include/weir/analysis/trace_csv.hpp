// SPDX-License-Identifier: MIT
/// \file
/// A trace as a table that other programs read.
#pragma once

#include <array>
#include <charconv>
#include <string>
#include <string_view>

#include <weir/analysis/trace.hpp>
#include <weir/core/function_ref.hpp>
#include <weir/core/types.hpp>

namespace weir {

/// `text` as a field of a CSV table (RFC 4180): in quotes if it has to be.
inline std::string csv_field(std::string_view text) {
  if (text.find_first_of(",\"\r\n") == std::string_view::npos) return std::string(text);
  std::string field = "\"";
  for (const char c : text) field += c == '"' ? std::string("\"\"") : std::string(1, c);
  return field + '"';
}

/// A number with as few digits as give the same `float` again.
inline std::string csv_number(float value) {
  std::array<char, 32> text{};
  return {text.data(), std::to_chars(text.data(), text.data() + text.size(), value).ptr};
}

/// Writes a line for each record: layer, sequence, position, token, domain, phase, pass, entropy,
/// how many experts the token had, then the expert, weight and `kept` of each choice, with empty
/// fields where there is none, and the logits if the trace has them.
/// \param write    Is called with some kilobytes of text at a time.
inline void write_csv(const Trace& trace, FunctionRef<void(std::string_view)> write) {
  constexpr std::size_t kPart = 1U << 16U;
  constexpr std::array kPhases = {"training", "prefill", "decoding"};
  const TraceLayout& layout = trace.layout();
  std::string text = "layer,sequence,position,token,domain,phase,pass,entropy,assigned";
  for (Index c = 0; c < layout.choices; ++c) {
    const std::string n = std::to_string(c);
    text.append(",expert_").append(n).append(",weight_").append(n).append(",kept_").append(n);
  }
  for (Index e = 0; e < layout.logits; ++e) text.append(",logit_").append(std::to_string(e));
  text += '\n';
  for (Index i = 0; i < trace.records(); ++i) {
    const TraceRecord record = trace.record(i);
    const TraceHead& head = record.head();
    const auto add = [&text](const std::string& field) { text.append(field).append(","); };
    add(csv_field(trace.layers()[head.layer].name));
    add(std::to_string(head.sequence));
    add(std::to_string(head.position));
    add(std::to_string(head.token));
    add(csv_field(trace.domains()[head.domain]));
    add(kPhases[static_cast<std::size_t>(head.phase)]);
    add(std::to_string(head.pass));
    add(csv_number(head.entropy));
    text += std::to_string(head.assigned);
    for (Index c = 0; c < layout.choices; ++c) {
      if (c >= record.choices()) {
        text += ",,,";
        continue;
      }
      const TraceChoice choice = record.choice(c);
      text.append(",").append(std::to_string(choice.expert));
      text.append(",").append(csv_number(choice.weight));
      text.append(choice.kept != 0 ? ",1" : ",0");
    }
    const Index experts = trace.layers()[head.layer].experts;
    for (Index e = 0; e < layout.logits; ++e) {
      text.append(",").append(e < experts ? csv_number(record.logit(e)) : "");
    }
    text += '\n';
    if (text.size() >= kPart) {
      write(text);
      text.clear();
    }
  }
  if (!text.empty()) write(text);
}

}  // namespace weir
