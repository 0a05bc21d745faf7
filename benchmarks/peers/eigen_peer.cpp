// SPDX-License-Identifier: MIT
// The layer by hand on Eigen, whose own threads are OpenMP's.
#include <Eigen/Core>

#include "peers/hand_peer.hpp"

namespace weir::bench {
namespace {

struct EigenProducts {
  static void nt(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out) {
    out.noalias() = a * b.transpose();
  }
  static void nn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out, bool add) {
    if (add) {
      out.noalias() += a * b;
    } else {
      out.noalias() = a * b;
    }
  }
  static void add_tn(MatrixIn<float> a, MatrixIn<float> b, MatrixOut<float> out) {
    out.noalias() += a.transpose() * b;
  }
};

}  // namespace

std::unique_ptr<Peer> make_eigen_peer(const MoeWeights& weights, int threads) {
  Eigen::setNbThreads(threads);
  return std::make_unique<HandPeer<EigenProducts>>(weights, threads);
}

}  // namespace weir::bench
