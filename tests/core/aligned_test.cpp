// SPDX-License-Identifier: MIT
#include <cstddef>
#include <cstdint>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <unistd.h>
#include <vector>

#include <weir/core/aligned.hpp>
#include <weir/core/types.hpp>
#include <weir/core/zeros.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"

namespace weir::aligned_test {

namespace {

template <class T>
bool begins_at(const T* memory, std::size_t border) {
  return reinterpret_cast<std::uintptr_t>(memory) % border == 0;
}

constexpr std::size_t kLine = CacheLineAllocator<char>::kLine;
constexpr std::size_t kHugePage = CacheLineAllocator<char>::kHugePage;

}  // namespace

TEST_CASE("Small memory begins at a cache line, large memory at a huge page", "[core][aligned]") {
  for (const std::size_t count : {std::size_t{1}, std::size_t{63}, kHugePage / 2}) {
    CHECK(begins_at(AlignedVector<float>(count / 4 + 1).data(), kLine));
  }
  for (const std::size_t bytes : {kHugePage, kHugePage + 1, 3 * kHugePage - 1}) {
    const AlignedVector<char> memory(bytes, 'a');
    CHECK(begins_at(memory.data(), kHugePage));
    CHECK(memory.front() == 'a');
    CHECK(memory.back() == 'a');
  }
}

TEST_CASE("Large memory takes at most an eighth more than its numbers", "[core][aligned]") {
  using Allocator = CacheLineAllocator<float>;
  CHECK(Allocator::bytes_of(1000) == 4000);
  CHECK(Allocator::bytes_of(520 * 1024) == 4 * 520 * 1024);
  CHECK(Allocator::bytes_of(1000 * 1024) == 2 * Allocator::kHugePage);
  for (std::size_t count = 500'000; count < 20'000'000; count += 123'457) {
    const std::size_t bytes = Allocator::bytes_of(count);
    CHECK(bytes >= 4 * count);
    CHECK(bytes <= 4 * count + 4 * count / 8);
  }
}

TEST_CASE("Memory that was given back and taken again can be written to the end",
          "[core][aligned]") {
  for (int round = 0; round < 3; ++round) {
    AlignedVector<int> memory((2 * kHugePage + 100) / sizeof(int), round);
    memory.back() = 7;
    CHECK(memory[0] == round);
    CHECK(memory[memory.size() - 2] == round);
    CHECK(memory.back() == 7);
  }
}

TEST_CASE("Large memory goes back to the system once it is let go", "[core][aligned]") {
  if (!test::allocations_are_counted()) return;  // A sanitizer keeps memory for a while.
  constexpr std::size_t kCount = 32;
  const auto resident = [] {
    std::ifstream statistics("/proc/self/statm");
    std::size_t pages = 0;
    statistics >> pages >> pages;
    return pages * static_cast<std::size_t>(getpagesize());
  };
  // The first piece teaches the C library to take such sizes from its heap, and what stays behind
  // the pieces keeps it from handing back the heap.
  AlignedVector<char>(2 * kHugePage, 'a');
  std::vector<AlignedVector<char>> pieces;
  for (std::size_t i = 0; i < kCount; ++i) pieces.emplace_back(2 * kHugePage, 'a');
  const AlignedVector<char> behind(1000, 'a');
  const std::size_t before = resident();
  pieces.clear();
  CHECK(before - resident() > kCount * 2 * kHugePage * 9 / 10);
}

TEST_CASE("Large matrices ask for huge pages and keep what they hold", "[core][aligned]") {
  Matrix<float> matrix;
  set_shape(matrix, 3, 1024 * 1024);
  matrix.setConstant(2.0F);
  prefer_huge_pages(matrix.data(), 4 * 3 * 1024 * 1024);
  CHECK((matrix.array() == 2.0F).all());
  set_zero_in_parallel(matrix);
  CHECK(matrix.isZero(0.0F));
  set_shape(matrix, 2, 7);
  matrix.setOnes();
  set_zero_in_parallel(matrix, 5, 1000);
  CHECK(matrix.rows() == 5);
  CHECK(matrix.isZero(0.0F));
  set_zero_in_parallel(matrix, 0, 3);
  CHECK(matrix.size() == 0);

  // The system says of each mapping whether it was asked for them ("hg").
  set_shape(matrix, 4, 1024 * 1024);
  const auto place = reinterpret_cast<std::uintptr_t>(matrix.data()) + 2 * kHugePage;
  std::ifstream mappings("/proc/self/smaps");
  std::string line;
  bool inside = false;
  std::string flags;
  while (std::getline(mappings, line)) {
    std::uintptr_t begin = 0;
    std::uintptr_t end = 0;
    char dash = 0;
    std::istringstream fields(line);
    if (fields >> std::hex >> begin >> dash >> end && dash == '-') {
      inside = begin <= place && place < end;
    }
    if (inside && line.starts_with("VmFlags:")) flags = line;
  }
  INFO(flags);
  CHECK((flags.empty() || flags.find(" hg") != std::string::npos ||
         !std::ifstream("/sys/kernel/mm/transparent_hugepage/enabled")));
}

TEST_CASE("Arrays of a shared memory lie one behind the other", "[core][aligned]") {
  const std::size_t bytes =
      SharedMemory::bytes_of<float>(17) + SharedMemory::bytes_of<std::int16_t>(0) +
      SharedMemory::bytes_of<std::int16_t>(3) + SharedMemory::bytes_of<double>(8);
  CHECK(bytes == 128 + 0 + 64 + 64);
  SharedMemory memory(bytes);
  const auto floats = memory.take<float>(17);
  CHECK(memory.take<std::int16_t>(0) != nullptr);
  const auto shorts = memory.take<std::int16_t>(3);
  const auto doubles = memory.take<double>(8);
  CHECK(begins_at(floats.get(), kLine));
  CHECK(reinterpret_cast<char*>(shorts.get()) == reinterpret_cast<char*>(floats.get()) + 128);
  CHECK(reinterpret_cast<char*>(doubles.get()) == reinterpret_cast<char*>(shorts.get()) + 64);
}

TEST_CASE("A shared memory lives as long as its arrays", "[core][aligned]") {
  std::shared_ptr<double[]> last;  // NOLINT(modernize-avoid-c-arrays)
  {
    SharedMemory memory(2 * SharedMemory::bytes_of<double>(100));
    memory.take<double>(100)[99] = 1.0;
    last = memory.take<double>(100);
    last[0] = 2.0;
    last[99] = 3.0;
  }
  CHECK(last[0] == 2.0);
  CHECK(last[99] == 3.0);
}

}  // namespace weir::aligned_test
