// SPDX-License-Identifier: MIT
// Runs a saved model over several texts and shows what its routers did: one page of HTML with all
// figures, the same numbers as JSON and CSV, or a view for the terminal. Two models stand side by
// side. `routing_report --help` lists the options.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

#include <weir/analysis/expert_redundancy.hpp>
#include <weir/analysis/trace_recorder.hpp>
#include <weir/analysis/traced_tokens.hpp>
#include <weir/core/parallel.hpp>
#include <weir/core/pass_record.hpp>
#include <weir/core/sequences.hpp>
#include <weir/io/atomic_file.hpp>
#include <weir/io/trace_file.hpp>

#include "command_line.hpp"
#include "load_model.hpp"
#include "pieces.hpp"
#include "progress.hpp"
#include "report_data.hpp"
#include "report_describe.hpp"
#include "report_page.hpp"
#include "report_terminal.hpp"
#include "text.hpp"

namespace {

namespace fs = std::filesystem;
using report::Json;
using weir::Index;

/// Of the experts, as in figure 4 of DeepSeekMoE's paper.
const std::vector<double> kMaskedShares = {0.0, 1.0 / 16, 2.0 / 16, 3.0 / 16, 4.0 / 16};

struct Options {
  std::string model;
  std::vector<std::string> texts;
  std::string against;
  std::string out = "routing";
  std::string trace;
  bool text = false;
  Index layer = 0;
  ModelOptions how;
  Index tokens = 10000;
  Index context = 256;
  Index batch = 8;
  Index replicates = 200;
  bool redundancy = false;
  int threads = weir::hardware_threads();
};

std::string read_file(const fs::path& path) {
  std::ifstream in(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  if (!in) throw std::runtime_error("cannot read " + path.string());
  return text;
}

/// The file, or all files of the folder one after the other, up to some megabytes.
std::string read_all(const fs::path& path) {
  constexpr std::size_t kEnough = std::size_t{8} << 20U;
  if (!fs::is_directory(path)) return read_file(path);
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(path)) {
    if (entry.is_regular_file()) files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  std::string text;
  for (const fs::path& file : files) {
    if (text.size() > kEnough) break;
    text += read_file(file);
  }
  return text;
}

/// NAME=PATH, or a path, whose last part is the name.
std::vector<Domain> read_domains(const std::vector<std::string>& texts) {
  std::vector<Domain> domains;
  for (const std::string& given : texts) {
    const std::size_t equals = fs::exists(given) ? std::string::npos : given.find('=');
    const fs::path path = equals == std::string::npos ? given : given.substr(equals + 1);
    if (!fs::exists(path)) {
      throw std::runtime_error("no such file or folder: " + path.string());
    }
    fs::path last = fs::canonical(path);
    const std::string name =
        equals == std::string::npos ? last.stem().string() : given.substr(0, equals);
    domains.push_back({name, read_all(path)});
    if (domains.back().text.empty()) throw std::runtime_error(path.string() + " is empty");
  }
  return domains;
}

/// Runs the model over the pieces, several at once.
void record(const LoadedModel& model, const std::vector<Domain>& domains, const Pieces& pieces,
            const Options& options, weir::TraceRecorder& recorder) {
  std::vector<Index> numbers;
  for (const Domain& domain : domains) numbers.push_back(recorder.domain(domain.name));
  weir::PassRecord record;
  record.show_routings_to(&recorder);
  weir::Decoder<float>::Cache cache;
  StatusLine status(false);
  const auto batch = static_cast<std::size_t>(options.batch);
  for (std::size_t begin = 0; begin < pieces.all.size(); begin += batch) {
    std::vector<Index> ids;
    std::vector<weir::TracedSequence> traced;
    weir::Sequences sequences;
    for (std::size_t i = begin; i < std::min(begin + batch, pieces.all.size()); ++i) {
      const Pieces::Piece& piece = pieces.all[i];
      ids.insert(ids.end(), piece.ids.begin(), piece.ids.end());
      sequences.append(static_cast<Index>(piece.ids.size()));
      traced.push_back(
          {.id = static_cast<Index>(i), .domain = numbers[static_cast<std::size_t>(piece.domain)]});
    }
    recorder.begin(traced);
    record.clear();
    model.model.forward_to_head(ids, {.sequences = &sequences, .record = &record}, cache);
    status.show("piece " + std::to_string(begin + traced.size()) + " of " +
                    std::to_string(pieces.all.size()),
                false);
  }
  status.close();
}

/// How many experts a token of the model has in any layer.
Index choices_of(const LoadedModel& model, const Pieces& pieces) {
  weir::TraceRecorder recorder({.layout = {.choices = 1}});
  weir::PassRecord record;
  record.show_routings_to(&recorder);
  recorder.begin({{.id = 0}});
  weir::Decoder<float>::Cache cache;
  model.model.forward_to_head(pieces.all[0].ids, {.record = &record}, cache);
  const weir::Trace trace = recorder.trace();
  Index most = 1;
  for (Index i = 0; i < trace.records(); ++i) {
    most = std::max<Index>(most, trace.record(i).head().assigned);
  }
  return most;
}

/// The loss without the best experts, in bits for each token.
std::vector<weir::Estimate> redundancy_of(const LoadedModel& model, const Pieces& pieces,
                                          const Options& options) {
  std::vector<std::vector<Index>> texts;
  for (const Pieces::Piece& piece : pieces.all) texts.push_back(piece.ids);
  weir::RedundancyConfig config = {.shares = kMaskedShares, .batch = options.batch};
  config.bootstrap.replicates = options.replicates;
  std::vector<weir::Estimate> losses = weir::loss_without_best(model.model, texts, config);
  for (weir::Estimate& e : losses) {
    for (double* value : {&e.value, &e.low, &e.high, &e.chance}) *value /= std::log(2.0);
  }
  return losses;
}

/// What a model does with the texts.
report::Model trace(const LoadedModel& model, const std::string& name,
                    const std::vector<Domain>& domains, const Pieces& pieces,
                    const Options& options, const std::string& file) {
  const weir::TraceRecorderConfig config = {
      .layout = {.choices = choices_of(model, pieces)},
      .most_records = pieces.tokens * static_cast<Index>(model.model.layers().size())};
  report::Model result;
  result.name = name;
  if (file.empty()) {
    weir::TraceRecorder in_memory(config);
    record(model, domains, pieces, options, in_memory);
    result.tokens = weir::TracedTokens(in_memory.trace());
  } else {
    weir::io::TraceWriter writer(file);
    weir::TraceRecorder to_file(writer, config);
    record(model, domains, pieces, options, to_file);
    writer.commit(to_file);
    result.tokens = weir::TracedTokens(weir::io::TraceFile(file).trace());
  }
  if (result.tokens.layers.empty()) {
    throw std::runtime_error(name + ": no layer of the model has experts");
  }
  if (options.redundancy) result.redundancy = redundancy_of(model, pieces, options);
  return result;
}

std::string name_of(const std::string& path) {
  const fs::path whole = fs::canonical(path);
  return whole.filename().string();
}

/// The different numbers of a list, such as "8" or "8 and 64".
std::string each_of(std::vector<Index> numbers) {
  std::sort(numbers.begin(), numbers.end());
  numbers.erase(std::unique(numbers.begin(), numbers.end()), numbers.end());
  std::string text;
  for (const Index n : numbers) text += (text.empty() ? "" : " and ") + std::to_string(n);
  return text;
}

/// Title, facts, texts and statistics.
Json describe(const std::vector<report::Model>& models, const MakeText& make_text,
              const report::Options& how, const Options& options, report::Table& table) {
  Json data = report::describe(models, make_text, how, table);
  const weir::TracedTokens& tokens = models[0].tokens;
  const std::size_t texts = tokens.domains.size();
  std::vector<Index> experts;
  for (const report::Model& model : models) {
    for (const weir::TracedLayer& layer : model.tokens.layers) experts.push_back(layer.experts);
  }
  data["title"] = "Where the tokens of " + models[0].name +
                  (models.size() > 1 ? " and " + models[1].name : "") + " go";
  data["intro"] =
      "Which experts the routers of this mixture of experts choose, token by token, on " +
      std::to_string(texts) + (texts == 1 ? " text." : " texts.");
  data["facts"] =
      Json::array({{"tokens", grouped(tokens.tokens())},
                   {"sequences", grouped(tokens.count())},
                   {"different tokens", grouped(static_cast<Index>(data["tokens"]["id"].size()))},
                   {"layers with experts", std::to_string(tokens.layers.size())},
                   {"experts of a layer", each_of(experts)},
                   {"weights kept as", options.how.storage}});
  return data;
}

/// Refuses to compare what cannot be compared: layers stand side by side in their order.
void expect_comparable(const report::Model& a, const report::Model& b) {
  const std::size_t layers = a.tokens.layers.size();
  if (layers == b.tokens.layers.size()) return;
  throw std::runtime_error("--against: " + b.name + " has " +
                           std::to_string(b.tokens.layers.size()) + " layers with experts, " +
                           a.name + " has " + std::to_string(layers) +
                           ": they cannot stand side by side");
}

std::optional<int> parse(int argc, char** argv, Options& options) {
  CommandLine line("Shows what the routers of a saved model did, in one page of HTML.");
  line.group("What");
  line.add("model", options.model,
           "A folder of checkpoints of train_lm or of a published model, or a .gguf file")
      ->required();
  line.add("texts", options.texts,
           "Files or folders, each a text of its own; NAME=PATH gives it a name\n"
           "(default: C++ headers, and the licences of the system)");
  line.add("--against", options.against, "A second model, to stand beside the first");
  line.add("--tokens", options.tokens, "Of all texts together")->check(limits::between(1, 1e7));
  line.add("--context", options.context, "Tokens in a sequence")->check(limits::between(1, 1e6));
  line.add("--batch", options.batch, "Sequences in a pass")->check(limits::between(1, 1e4));
  line.group("Output");
  line.add("--out", options.out, "Writes OUT.html, OUT.json and OUT.csv");
  line.add("--trace", options.trace,
           "Keeps every token's route: a binary file, and .csv beside it");
  line.add("--text", options.text, "A view for the terminal instead of files");
  line.add("--layer", options.layer, "Which layer with experts the terminal shows, from 0 on")
      ->check(limits::at_least(0));
  line.add("--replicates", options.replicates, "Of the bootstrap for intervals (0: none)")
      ->check(limits::between(0, 1e5));
  line.add("--redundancy", options.redundancy,
           "Also the loss without each token's best experts, in ten more runs");
  line.group("Model");
  add_model_options(line, options.how);
  line.add("--ids", options.how.numbers, "Texts are lists of token ids");
  line.add("--threads", options.threads, "How many cores to use")->check(limits::at_least(1));
  line.footer(
      "\nExamples:\n"
      "  routing_report run                            a model that train_lm --save run has saved\n"
      "  routing_report run C++=/usr/include/eigen3 English=/usr/share/common-licenses\n"
      "  routing_report run/step-000000200 --against run book.txt\n"
      "  routing_report OLMoE-1B-7B --storage bf16 --text book.txt\n");
  return line.parse(argc, argv);
}

void run(Options options) {
  weir::set_threads(options.threads);
  if (options.texts.empty()) {
    for (const char* const text :
         {"C++=" WEIR_DEFAULT_CORPUS, "English=/usr/share/common-licenses"}) {
      const std::string path = std::string(text).substr(std::string(text).find('=') + 1);
      if (fs::exists(path)) options.texts.emplace_back(text);
    }
  }
  const std::vector<Domain> domains = read_domains(options.texts);
  const LoadedModel model = load_any_model(options.model, options.how);
  const Pieces pieces = pieces_of(domains, *model.make_text(), options.tokens, options.context);
  if (pieces.all.empty()) throw std::runtime_error("the texts have no tokens");
  std::vector<report::Model> models;
  models.push_back(trace(model, name_of(options.model), domains, pieces, options, options.trace));
  if (!options.trace.empty()) {
    const weir::io::TraceFile file(options.trace);
    weir::io::save_csv(options.trace + ".csv", file.trace());
  }
  if (!options.against.empty()) {
    const LoadedModel other = load_any_model(options.against, options.how);
    const Pieces again = pieces_of(domains, *other.make_text(), options.tokens, options.context);
    for (std::size_t i = 0; i < pieces.all.size(); ++i) {
      if (again.all.size() != pieces.all.size() || again.all[i].ids != pieces.all[i].ids) {
        throw std::runtime_error("--against: " + options.against +
                                 " divides the texts into other tokens");
      }
    }
    models.push_back(trace(other, name_of(options.against), domains, pieces, options, ""));
    if (models[1].name == models[0].name) models[1].name += " (2)";
    expect_comparable(models[0], models[1]);
  }

  report::Options how;
  how.bootstrap.replicates = options.replicates;
  if (options.redundancy) how.masked_shares = kMaskedShares;
  report::Table table;
  const Json full = describe(models, model.make_text, how, options, table);
  if (options.text) {
    report::print(full, models, model.make_text, options.layer, isatty(STDOUT_FILENO) == 1);
    return;
  }
  const fs::path out = options.out;
  if (out.has_parent_path()) fs::create_directories(out.parent_path());
  const std::string page = report::page(report::for_page(full, models, how));
  weir::io::write_file(options.out + ".html", page);
  weir::io::write_file(options.out + ".json",
                       full.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
  weir::io::write_file(options.out + ".csv", table.text());
  for (const Json& saying : full["says"]) {
    std::cout << (saying[0] == "bad" ? "! " : "  ") << saying[1].get<std::string>() << '\n';
  }
  std::cout << "wrote " << options.out << ".html (" << (page.size() + 512) / 1024 << " KB), "
            << options.out << ".json and " << options.out << ".csv\n";
}

}  // namespace

int main(int argc, char** argv) {
  return run_program("routing_report", argc, argv, parse, run);
}
