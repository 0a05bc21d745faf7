// SPDX-License-Identifier: MIT
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <vector>

#include <weir/io/dtype.hpp>
#include <weir/io/safetensors.hpp>
#include <weir/io/safetensors_writer.hpp>

#include "io/files.hpp"
#include "io/folder.hpp"
#include "support/catch.hpp"
#include "support/matrices.hpp"

namespace weir::safetensors_writer_test {

TEST_CASE("What is written is read", "[io][safetensors]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.safetensors").string();
  const Matrix<double> a = test::random_matrix(300, 301, 1);
  const Matrix<double> b = test::random_matrix(1, 7, 2);
  const Matrix<double> empty(0, 3);
  const std::vector<io::NamedMatrix<double>> all = {{"z", &a}, {"b.\"ö\"", &b}, {"empty", &empty}};
  io::write_safetensors(path, all, io::Dtype::kF64, {{"format", "weir"}});
  const io::Safetensors file = io::Safetensors::read(path);
  CHECK(file.metadata().at("format") == "weir");
  CHECK(file.tensors().size() == 3);
  CHECK(file.tensor("z").shape == std::vector<Index>{300, 301});
  CHECK(file.reals("z") == std::vector<double>(a.data(), a.data() + a.size()));
  CHECK(file.reals("b.\"ö\"") == std::vector<double>(b.data(), b.data() + b.size()));
  CHECK(file.tensor("empty").shape == std::vector<Index>{0, 3});

  for (const io::Dtype dtype : {io::Dtype::kF32, io::Dtype::kF16, io::Dtype::kBF16}) {
    io::write_safetensors(path, all, dtype);
    const io::Safetensors rounded = io::Safetensors::read(path);
    CHECK(rounded.tensor("z").dtype == dtype);
    const double step = dtype == io::Dtype::kF32   ? 0x1p-24
                        : dtype == io::Dtype::kF16 ? 0x1p-11
                                                   : 0x1p-8;
    const auto values = rounded.reals("b.\"ö\"");
    for (Index i = 0; i < b.size(); ++i) {
      CHECK(std::abs(values[static_cast<std::size_t>(i)] - b(0, i)) <= step * std::abs(b(0, i)));
    }
  }
}

TEST_CASE("write_safetensors says what it cannot write, and leaves the old file",
          "[io][safetensors]") {
  const test::Folder folder;
  const std::string path = (folder.path() / "a.safetensors").string();
  const Matrix<float> a = Matrix<float>::Ones(2, 2);
  io::write_safetensors<float>(path, {{"a", &a}});
  const auto complaint = [&](const std::vector<io::NamedMatrix<float>>& all, io::Dtype dtype) {
    return test::message_of<ConfigError>([&] { io::write_safetensors<float>(path, all, dtype); });
  };
  const std::string names = "', expected different names other than '__metadata__'";
  CHECK(complaint({{"a", &a}, {"a", &a}}, io::Dtype::kF32) ==
        "write_safetensors: a tensor is named 'a" + names);
  CHECK(complaint({{"", &a}}, io::Dtype::kF32) == "write_safetensors: a tensor is named '" + names);
  CHECK(complaint({{"__metadata__", &a}}, io::Dtype::kF32) ==
        "write_safetensors: a tensor is named '__metadata__" + names);
  CHECK(complaint({{"\xff", &a}}, io::Dtype::kF32)
            .starts_with("write_safetensors: a name or the metadata is not UTF-8: "));
  CHECK(complaint({{"a", &a}}, io::Dtype::kI8) ==
        "write_safetensors: dtype = I8, expected F64, F32, F16 or BF16");
  CHECK(io::Safetensors::read(path).reals("a") == std::vector<double>(4, 1.0));

  CHECK_THROWS_AS(io::write_safetensors<float>(folder.path() / "no" / "a", {{"a", &a}}),
                  io::FileError);
  Index files = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    ++files;
  }
  CHECK(files == 1);  // No temporary file stays.
}

TEST_CASE("A file appears when it is whole", "[io]") {
  const test::Folder folder;
  const std::filesystem::path path = folder.path() / "a";
  {
    io::AtomicFile file(path);
    file.write("abc");
    CHECK_FALSE(std::filesystem::exists(path));
  }
  CHECK(std::filesystem::is_empty(folder.path()));
  io::AtomicFile file(path);
  file.write("abc");
  file.commit();
  CHECK(std::filesystem::file_size(path) == 3);
}

TEST_CASE("Small floating-point kinds have the values of their tables", "[io][dtype][golden]") {
  // Table 1 of Micikevicius et al. 2022.
  CHECK(kernels::E4M3::value(0x7E) == 448.0F);
  CHECK(kernels::E4M3::value(0x08) == 0x1p-6F);
  CHECK(kernels::E4M3::value(0x07) == 0.875F * 0x1p-6F);
  CHECK(kernels::E4M3::value(0x01) == 0x1p-9F);
  CHECK(std::isnan(kernels::E4M3::value(0x7F)));
  CHECK(std::isnan(kernels::E4M3::value(0xFF)));
  CHECK(kernels::E5M2::value(0x7B) == 57344.0F);
  CHECK(kernels::E5M2::value(0x04) == 0x1p-14F);
  CHECK(kernels::E5M2::value(0x03) == 0.75F * 0x1p-14F);
  CHECK(kernels::E5M2::value(0x01) == 0x1p-16F);
  CHECK(kernels::E5M2::value(0x7C) == std::numeric_limits<float>::infinity());
  CHECK(kernels::E5M2::value(0xFC) == -std::numeric_limits<float>::infinity());
  CHECK(std::isnan(kernels::E5M2::value(0x7D)));
  CHECK(kernels::E4M3::value(0x80) == 0.0F);
  CHECK(kernels::E4M3::value(0xB8) == -1.0F);

  const io::Safetensors file(
      "f", test::file_of(R"({"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},)"
                         R"("b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]},)"
                         R"("e":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[8,10]},)"
                         R"("f":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[10,12]}})",
                         test::bytes_of<std::uint16_t>({0x3C00, 0xC248, 0x3F80, 0xC049}) +
                             test::bytes_of<std::uint8_t>({0x38, 0xC4, 0x3C, 0xC5})));
  CHECK(file.reals("h") == std::vector<double>{1.0, -3.140625});
  CHECK(file.reals("b") == std::vector<double>{1.0, -3.140625});
  CHECK(file.reals("e") == std::vector<double>{1.0, -3.0});
  CHECK(file.reals("f") == std::vector<double>{1.0, -5.0});
}

}  // namespace weir::safetensors_writer_test
