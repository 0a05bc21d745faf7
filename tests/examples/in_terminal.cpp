// SPDX-License-Identifier: MIT
// Runs a program in a pseudo-terminal of a given width and looks at what a user would see.
//
//     in_terminal COLUMNS ROWS program [argument...]
//     in_terminal interrupt AFTER program [argument...]
//
// The first form fails if a line is wider than the terminal, or unless ROWS of the lines that
// remain are rows of progress. The second one presses Ctrl-C once the program has printed AFTER,
// and fails unless it ends by itself, with results and a sample. Both have a limit of five minutes.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <pty.h>
#include <string>
#include <sys/wait.h>
#include <unistd.h>
#include <vector>

namespace {

[[noreturn]] void fail(const std::string& reason, const std::string& output) {
  std::fprintf(stderr, "%s in:\n%s\n", reason.c_str(), output.c_str());
  std::exit(1);
}

/// What the program wrote; Ctrl-C is pressed when that contains `interrupt_after`, unless empty.
std::string output_of(char** program, unsigned short columns, const std::string& interrupt_after) {
  winsize size = {};
  size.ws_col = columns;
  size.ws_row = 24;
  int terminal = -1;
  const pid_t child = forkpty(&terminal, nullptr, nullptr, &size);
  if (child == 0) {
    execv(program[0], program);
    std::_Exit(127);
  }
  if (child < 0) fail("no pseudo-terminal", "");
  alarm(300);
  std::string output;
  bool interrupts = !interrupt_after.empty();
  for (;;) {
    char buffer[4096];
    const ssize_t count = read(terminal, buffer, sizeof buffer);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) break;  // EIO, once the program has ended.
    output.append(buffer, static_cast<std::size_t>(count));
    if (interrupts && output.find(interrupt_after) != std::string::npos) {
      interrupts = false;
      const char control_c = '\x03';
      if (write(terminal, &control_c, 1) != 1) fail("cannot press Ctrl-C", output);
    }
  }
  int status = 0;
  waitpid(child, &status, 0);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0) fail("the program did not succeed", output);
  if (interrupts) fail("'" + interrupt_after + "' is not", output);
  return output;
}

/// How many columns a text takes, in UTF-8 and without the sequence that clears the rest of a line.
std::size_t width_of(std::string text) {
  const std::string clear = "\033[K";
  const std::size_t at = text.find(clear);
  if (at != std::string::npos) text.erase(at, clear.size());
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char byte) {
    return (static_cast<unsigned char>(byte) & 0xC0U) != 0x80U;
  }));
}

/// Lines of a text, the parts that were written over apart.
std::vector<std::string> pieces_of(const std::string& output) {
  std::vector<std::string> pieces(1);
  for (const char c : output) {
    if (c == '\r' || c == '\n') {
      pieces.emplace_back();
    } else {
      pieces.back() += c;
    }
  }
  return pieces;
}

bool is_progress(const std::string& piece) {
  return piece.find("\033[K") != std::string::npos;
}

void check_width(char** program, std::size_t columns, long rows) {
  const std::string output = output_of(program, static_cast<unsigned short>(columns), "");
  long steps = 0;
  for (const std::string& piece : pieces_of(output)) {
    if (!is_progress(piece)) continue;
    ++steps;
    if (width_of(piece) >= columns) fail("'" + piece + "' is too wide for the terminal", output);
    if (piece.find("loss ") == std::string::npos) fail("'" + piece + "' tells no loss", output);
  }
  if (steps != rows) fail(std::to_string(steps) + " rows of progress", output);
  if (columns >= 200 && output.find("[####") == std::string::npos) fail("no bar", output);
  if (columns >= 200 && output.find("load ") == std::string::npos) fail("no load", output);
}

void check_interrupt(char** program, const std::string& after) {
  const std::string output = output_of(program, 80, after);
  for (const char* const part : {"validation bits/byte: model ", "parameters: ", "sample ("}) {
    if (output.find(part) == std::string::npos) {
      fail("no '" + std::string(part) + "' after Ctrl-C", output);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  if (std::string(argv[1]) == "interrupt") {
    check_interrupt(argv + 3, argv[2]);
  } else {
    check_width(argv + 3, std::stoul(argv[1]), std::stol(argv[2]));
  }
}
