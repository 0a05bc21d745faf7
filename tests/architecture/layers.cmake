# SPDX-License-Identifier: MIT
# The folders of include/weir, lowest first, and the folders each may include besides itself.
set(layers core ops kernels nn moe attention model analysis presets tuning optim io parallel)

set(core)
set(ops core)
set(kernels core ops)
set(nn core ops kernels)
set(moe core ops kernels nn)
set(attention core ops kernels nn)
set(model core ops kernels nn moe attention)
set(analysis core ops kernels nn moe attention)
set(presets core ops kernels nn moe attention model analysis)
set(tuning core ops kernels nn moe attention model analysis)
set(optim core ops kernels)
set(io core ops kernels nn moe attention model analysis presets)  # needs nlohmann_json; not in weir.hpp
set(parallel core ops kernels nn moe attention model analysis presets optim io)  # not in weir.hpp; io: parallel/mpi only
