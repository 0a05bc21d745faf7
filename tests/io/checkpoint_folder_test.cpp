// SPDX-License-Identifier: MIT
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <weir/core/types.hpp>
#include <weir/io/checkpoint_folder.hpp>
#include <weir/io/published_tensors.hpp>
#include <weir/io/tensor_layout.hpp>

#include "io/files.hpp"
#include "io/folder.hpp"
#include "support/catch.hpp"

namespace weir::io::checkpoint_folder_test {
namespace {

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

/// A file with one tensor [2] of F32.
std::string small_file(const std::string& name, float a, float b) {
  return test::file_of(R"({")" + name + R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})",
                       test::bytes_of<float>({a, b}));
}

std::vector<double> numbers(const TensorSource& source, const std::string& name) {
  const StoredTensor* const tensor = source.find(name);
  REQUIRE(tensor != nullptr);
  Index count = 1;
  for (const Index length : tensor->shape()) count *= length;
  std::vector<double> all(static_cast<std::size_t>(count));
  tensor->read(0, count, all.data());
  return all;
}

/// What `CheckpointFolder` says of a folder, without the path of that folder.
std::string complaint(const std::filesystem::path& folder) {
  try {
    const CheckpointFolder source(folder);
  } catch (const FileError& error) {
    std::string text = error.what();
    for (auto at = text.find(folder.string()); at != std::string::npos;
         at = text.find(folder.string())) {
      text.replace(at, folder.string().size(), "DIR");
    }
    return text;
  }
  return "";
}

constexpr auto kIndex = "model.safetensors.index.json";

TEST_CASE("A checkpoint is one file or several", "[io][safetensors]") {
  const test::Folder folder;
  const auto& dir = folder.path();
  CHECK(complaint(dir) == "DIR: has neither model.safetensors nor model.safetensors.index.json");
  write(dir / "a.safetensors", small_file("x", 1, 2));
  write(dir / "b.safetensors", small_file("y", 3, 4));
  write(dir / kIndex, R"({"metadata":{"total_size":16},
                          "weight_map":{"x":"a.safetensors","y":"b.safetensors"}})");
  const CheckpointFolder several(dir);
  CHECK(several.names() == std::vector<std::string>{"x", "y"});
  CHECK(numbers(several, "y") == std::vector<double>{3, 4});
  CHECK(several.find("z") == nullptr);
  write(dir / "model.safetensors", small_file("z", 5, 6));
  const CheckpointFolder one(dir);
  CHECK(one.names() == std::vector<std::string>{"z"});
  CHECK(numbers(one, "z") == std::vector<double>{5, 6});
  float second = 0;
  one.find("z")->read(1, 1, &second);
  CHECK(second == 6);
  one.find("z")->release(0, 2);  // Shorter than a page.
  CHECK(numbers(one, "z") == std::vector<double>{5, 6});
}

TEST_CASE("An index that lies is refused", "[io][safetensors]") {
  const test::Folder folder;
  const auto& dir = folder.path();
  write(dir / "a.safetensors", small_file("x", 1, 2));
  const auto said = [&](const std::string& index) {
    write(dir / kIndex, index);
    return complaint(dir);
  };
  const std::string place = std::string("DIR/") + kIndex;
  CHECK(said("{}") == place + ": has no 'weight_map'");
  CHECK(said(R"({"weight_map":[]})") == place + ": 'weight_map' is [], expected an object");
  CHECK(said(R"({"weight_map":{"x":3}})") == place + ": weight_map: 'x' is 3, expected a string");
  CHECK(said(R"({"weight_map":{"x":"a.safetensors","x":"a.safetensors"}})") ==
        place + ": 'x' is there twice");
  CHECK(said(R"({"weight_map":{"x":"none.safetensors"}})") ==
        "DIR/none.safetensors: there is no such file");
  CHECK(said(R"({"weight_map":{"y":"a.safetensors"}})") ==
        place + ": says that 'y' is in a.safetensors, where it is not");
  CHECK(said(R"({"weight_map":{"x":"a.safetensors","y":"b.safetensors"}})") ==
        "DIR/b.safetensors: there is no such file");
  for (const std::string name : {"", ".", "..", "../a.safetensors", "/etc/passwd", "sub/a"}) {
    CHECK(said(R"({"weight_map":{"x":")" + name + R"("}})") ==
          place + ": names the file \"" + name + "\", expected a plain name");
  }
  CHECK(said(R"({"weight_map":{"x":"a\u0000b"}})") ==
        place + R"(: names the file "a\u0000b", expected a plain name)");
  write(dir / "b.safetensors", small_file("x", 3, 4));
  CHECK(said(R"({"weight_map":{"x":"a.safetensors","y":"b.safetensors"}})") ==
        place + ": says that 'y' is in b.safetensors, where it is not");
  std::string deep(100, '[');
  CHECK(said(R"({"weight_map":)" + deep) == place + ": is nested too deeply");
}

TEST_CASE("Links leave the folder only as in the cache of the hub", "[io][safetensors]") {
  const test::Folder folder;
  const auto snapshot = folder.path() / "models--a--b" / "snapshots" / "1234";
  const auto blobs = folder.path() / "models--a--b" / "blobs";
  std::filesystem::create_directories(snapshot);
  std::filesystem::create_directories(blobs);
  write(blobs / "abcd", small_file("x", 1, 2));
  std::filesystem::create_symlink("../../blobs/abcd", snapshot / "model.safetensors");
  CHECK(numbers(CheckpointFolder(snapshot), "x") == std::vector<double>{1, 2});

  const auto other = folder.path() / "other";
  std::filesystem::create_directories(other);
  std::filesystem::create_symlink(blobs / "abcd", other / "model.safetensors");
  const std::string target = std::filesystem::canonical(blobs / "abcd").string();
  CHECK(complaint(other) ==
        "DIR/model.safetensors: is a link to '" + target + "', expected a file of the folder");
  std::filesystem::remove(other / "model.safetensors");
  write(other / "kept.safetensors", small_file("x", 7, 8));
  std::filesystem::create_symlink("kept.safetensors", other / "model.safetensors");
  CHECK(numbers(CheckpointFolder(other), "x") == std::vector<double>{7, 8});
}

TEST_CASE("Eight bits are scaled block by block", "[io][safetensors]") {
  const test::Folder folder;
  // [130, 129]: 2 x 2 blocks. Each number is 1 (E4M3 0x38) but for the one that follows.
  std::string data(130 * 129, '\x38');
  data[129 * 129 + 128] = '\x40';  // 2, in the last block.
  data += test::bytes_of<float>({1.0F, 10.0F, 100.0F, 1000.0F});
  const auto with = [&](const std::string& shape) {
    write(folder.path() / "model.safetensors",
          test::file_of(R"({"w":{"dtype":"F8_E4M3","shape":[130,129],"data_offsets":[0,16770]},)"
                        R"("w_scale_inv":{"dtype":"F32","shape":)" +
                            shape + R"(,"data_offsets":[16770,16786]}})" + "  ",
                        data));
  };
  with("[2,2]");
  // The factors begin at 16770, which is no multiple of 4.
  CHECK(complaint(folder.path()).find("do not begin at a multiple of 4 bytes") !=
        std::string::npos);
  data.insert(130 * 129, 2, '\0');
  const auto aligned = [&](const std::string& shape) {
    write(folder.path() / "model.safetensors",
          test::file_of(R"({"w":{"dtype":"F8_E4M3","shape":[130,129],"data_offsets":[0,16770]},)"
                        R"("pad":{"dtype":"U8","shape":[2],"data_offsets":[16770,16772]},)"
                        R"("w_scale_inv":{"dtype":"F32","shape":)" +
                            shape + R"(,"data_offsets":[16772,16788]}})",
                        data));
  };
  aligned("[2,2]");
  const CheckpointFolder source(folder.path());
  CHECK(source.names() == std::vector<std::string>{"pad", "w"});
  const std::vector<double> w = numbers(source, "w");
  const auto at = [&](Index i, Index j) { return w[static_cast<std::size_t>(i * 129 + j)]; };
  CHECK(at(0, 0) == 1);
  CHECK(at(127, 127) == 1);
  CHECK(at(127, 128) == 10);
  CHECK(at(128, 127) == 100);
  CHECK(at(128, 128) == 1000);
  CHECK(at(129, 128) == 2000);
  std::vector<float> part(3);
  source.find("w")->read(127 * 129 + 127, 3, part.data());
  CHECK(part == std::vector<float>{1, 10, 100});
  aligned("[4,1]");
  CHECK(complaint(folder.path()) ==
        "DIR/model.safetensors: tensor 'w' is [130, 129], which its factors [4, 1] do not fit");
}

TEST_CASE("Each tensor of a model is there, and none else", "[io][safetensors]") {
  const test::Folder folder;
  write(folder.path() / "model.safetensors", small_file("x", 1, 2));
  const CheckpointFolder source(folder.path());
  Matrix<float> x(1, 2);
  Matrix<float> y(1, 3);
  const std::vector<presets::TensorName> names = {{"x", "x", {.vector = true}}, {"y", "y"}};
  const auto said = [&](ModelTensors<float> tensors,
                        std::vector<std::string_view> ignored = {}) -> std::string {
    const auto layout = published_layout(names, shapes_of(tensors));
    try {
      PublishedReader<float>(source, std::move(tensors), layout, ignored).read("");
    } catch (const FileError& error) {
      return std::string(error.what()).substr(folder.path().string().size());
    }
    return "";
  };
  CHECK(said({{"x", &x}}).empty());
  CHECK(x == Matrix<float>{{1, 2}});
  CHECK(said({{"x", &x}, {"y", &y}}) == ": 'y' is missing");
  CHECK(said({}) == ": 'x' is not in the model");
  CHECK(said({}, {"x*"}).empty());
  Matrix<float> wide = Matrix<float>::Zero(1, 4);
  CHECK(said({{"x", &wide}}) == ": 'x' is [2], expected [4]");
  CHECK(wide == Matrix<float>::Zero(1, 4));
}

TEST_CASE("What is gathered from a model is read back", "[io][safetensors]") {
  using presets::Arrangement;
  using presets::Turns;
  const std::vector<presets::TensorName> names = {
      {"a.{e}", "t", {.turns = Turns::kRows, .transposed = true}},
      {"b.{e}", "t", {.turns = Turns::kRows, .transposed = true}},
      {"k", "kv", {.turns = Turns::kHeads}},
      {"v", "kv", {.turns = Turns::kHeads}},
      {"q", "q", {.pairs = true}},
      {"bias", "bias", {.vector = true}}};
  std::vector<Matrix<double>> from;
  for (const auto& [rows, cols] : std::vector<std::pair<Index, Index>>{
           {5, 20}, {5, 20}, {5, 20}, {5, 20}, {4, 3}, {6, 3}, {8, 2}, {1, 9}}) {
    from.push_back(Matrix<double>::Random(rows, cols));
  }
  const auto tensors_of = [](std::vector<Matrix<double>>& matrices) {
    ModelTensors<double> tensors;
    const std::vector<std::string> all = {"a.0", "b.0", "a.1", "b.1", "k", "v", "q", "bias"};
    for (std::size_t i = 0; i < all.size(); ++i) tensors.emplace_back(all[i], &matrices[i]);
    return tensors;
  };
  const auto tensors = tensors_of(from);
  const auto layout = published_layout(names, shapes_of(tensors), {.heads = 2, .head_dim = 4});
  const test::Folder folder;
  std::vector<TensorShape> shapes;
  for (const PublishedTensor& tensor : layout) shapes.push_back({tensor.name, tensor.shape});
  SafetensorsWriter writer(folder.path() / "model.safetensors", shapes, Dtype::kF64);
  std::vector<double> values;
  for (const PublishedTensor& tensor : layout) {
    gather_tensor(tensors, tensor, values);
    writer.append(values.data(), static_cast<Index>(values.size()));
  }
  writer.commit();

  std::vector<Matrix<double>> to;
  for (const Matrix<double>& matrix : from) {
    to.push_back(Matrix<double>::Constant(matrix.rows(), matrix.cols(), 7.0));
  }
  const CheckpointFolder source(folder.path());
  PublishedReader<double> reader(source, tensors_of(to), layout);
  reader.read("a.");
  CHECK(to[0] == from[0]);
  CHECK(to[1](0, 0) == 7.0);
  reader.read("");
  CHECK(to == from);
}

}  // namespace
}  // namespace weir::io::checkpoint_folder_test
