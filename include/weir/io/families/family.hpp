// SPDX-License-Identifier: MIT
/// \file
/// What weir knows of a published family of models.
#pragma once

#include <span>
#include <string_view>

namespace weir::io {

/// How the models of a preset's config are published by Hugging Face. Each family specialises it:
///
///     kModelTypes      `model_type` in config.json; writing: the first, unless `write` sets
///     another kArchitecture    the first of `architectures`, which `write` may set too kIgnored
///     patterns of tensors that have no part in the logits; may be left out read(json)       the
///     config that a ConfigFile says write(config, json)      the opposite names(config, source)
///     the table of names, see presets::TensorName
///
/// `read` uses each setting that it knows and leaves it to the caller to refuse the rest; `write`
/// throws ConfigError for what such a configuration cannot say. What is written is read again, so
/// that a shape which comes back as another one is refused too. `names` looks at `source`, if there
/// is one, to see in which of several layouts a checkpoint was written.
template <class Config>
struct Family;

}  // namespace weir::io
