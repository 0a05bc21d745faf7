// SPDX-License-Identifier: MIT
/// \file
/// Work to be done while something else is waited for.
#pragma once

#include <utility>

#include <weir/core/function_ref.hpp>

namespace weir {

/// Offers `work` to whoever has to wait on this thread: shared experts are computed while the
/// tokens of the routed ones travel to other machines and back. It is done once, at the latest in
/// `finish`.
///
///     const auto shared = [&] { ... };
///     Meanwhile work(shared);
///     moe.forward(x, pass, cache);       // calls Meanwhile::do_offered() while it waits, or not
///     work.finish();
///
/// Offers end in the reverse of the order in which they were made. While one is done, the one
/// before it stands, which may be of a layer around.
class Meanwhile {
 public:
  /// \param work     Has to outlive this object, which has to be finished unless an exception
  /// comes.
  explicit Meanwhile(FunctionRef<void()> work)
      : work_(work), before_(std::exchange(offered(), this)) {}
  Meanwhile(const Meanwhile&) = delete;
  Meanwhile& operator=(const Meanwhile&) = delete;
  ~Meanwhile() { offered() = before_; }

  /// Does the work, unless somebody has.
  void finish() {
    if (std::exchange(done_, true)) return;
    Meanwhile* const current = std::exchange(offered(), before_);
    work_();
    offered() = current;
  }

  /// Whether there is work that is offered and still to be done.
  static bool is_offered() { return offered() != nullptr && !offered()->done_; }

  /// Does the work that was offered last, if that is still to be done.
  static void do_offered() {
    if (offered() != nullptr) offered()->finish();
  }

 private:
  static Meanwhile*& offered() {
    thread_local Meanwhile* work = nullptr;
    return work;
  }

  FunctionRef<void()> work_;
  Meanwhile* before_;
  bool done_ = false;
};

}  // namespace weir
