// SPDX-License-Identifier: MIT
// expects: a SampledChoice inside another one
#include <weir/moe/selector/around/sampled_choice.hpp>
#include <weir/moe/selector/softmax_top_k.hpp>

using Once = weir::SampledChoice<weir::SoftmaxTopK<float>>;
#ifdef WEIR_CORRECTED
using Selector = Once;
#else
using Selector = weir::SampledChoice<Once>;
#endif

weir::Index certain(const Selector& selector) {
  return selector.config().certain;
}
