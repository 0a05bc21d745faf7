// SPDX-License-Identifier: MIT
/// \file
/// One way through a tree of layers, for everything that is done to all of its parts.
#pragma once

#include <array>
#include <memory_resource>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

#include <weir/core/expert_map.hpp>
#include <weir/core/low_rank.hpp>
#include <weir/core/parameter.hpp>
#include <weir/core/storage.hpp>
#include <weir/core/types.hpp>

namespace weir {

class RoutingTrace;  // weir/moe/routing_trace.hpp

/// What a walk can ask of one node of the tree (a layer, a stage of a mixture, a balancer),
/// whatever its type. A type offers what it has:
///
///     void update_self()                   acts after an optimizer's step, for itself alone
///     void discard_self()                  forgets what it counted since the last one
///     void expect_storable(Storage storage) const
///                                          throws StateError if it cannot store its own weights so
///     void set_storage(Storage storage)    stores its weights, and those of all its members
///     Storage storage() const              how it stores its own weights
///     static constexpr bool kTrainsInFull  its own weights keep full precision in training
///     void change_experts(const ExpertMap&) changes the experts of the mixture that it is
///     void set_active_experts(Index k)     how many of them a token has
///     void impose(const RoutingTrace&), void release()
///                                          takes its choice of experts from elsewhere, or makes
///                                          it itself again
///
/// A type without `set_storage`, some of whose members keep full precision in every storage, hands
/// the others over in a static `visit_stored`, which looks like `visit`.
class Node {
 public:
  /// \param stores   Whether `set_storage`, `change_experts` and `set_active_experts` do anything:
  ///                 programs that do not ask for them do without the kernels of all storages.
  template <class Member, bool stores>
  Node(Member& member, std::bool_constant<stores> /*stores*/)
      : self_(&member), type_(type_of<Member>()) {
    if constexpr (requires { member.update_self(); }) {
      update_ = [](void* self) { static_cast<Member*>(self)->update_self(); };
    }
    if constexpr (requires { member.discard_self(); }) {
      discard_ = [](void* self) { static_cast<Member*>(self)->discard_self(); };
    }
    if constexpr (requires { member.expect_storable(Storage::kTrainable); }) {
      expect_storable_ = [](const void* self, Storage storage) {
        static_cast<const Member*>(self)->expect_storable(storage);
      };
    }
    if constexpr (requires { member.set_storage(Storage::kTrainable); }) {
      set_storage_exists_ = true;
      if constexpr (stores) {
        set_storage_ = [](void* self, Storage storage) {
          static_cast<Member*>(self)->set_storage(storage);
        };
      }
    }
    if constexpr (stores && requires(const ExpertMap& map) { member.change_experts(map); }) {
      change_experts_ = [](void* self, const ExpertMap& map) {
        static_cast<Member*>(self)->change_experts(map);
      };
    }
    if constexpr (stores && requires { member.set_active_experts(Index{}); }) {
      set_active_experts_ = [](void* self, Index k) {
        static_cast<Member*>(self)->set_active_experts(k);
      };
    }
    if constexpr (requires(const RoutingTrace& trace) {
                    member.impose(trace);
                    member.release();
                  }) {
      impose_ = [](void* self, const RoutingTrace* trace) {
        if (trace == nullptr) return static_cast<Member*>(self)->release();
        static_cast<Member*>(self)->impose(*trace);
      };
    }
    if constexpr (requires { member.storage(); }) {
      storage_ = member.storage();
      has_storage_ = true;
    }
    if constexpr (requires { Member::kTrainsInFull; }) trains_in_full_ = Member::kTrainsInFull;
  }

  /// Does nothing where the type offers nothing.
  void update() const {
    if (update_ != nullptr) update_(self_);
  }

  /// Does nothing where the type offers nothing.
  void discard() const {
    if (discard_ != nullptr) discard_(self_);
  }

  /// Does nothing where the type can store its own weights in every way.
  void expect_storable(Storage storage) const {
    if (expect_storable_ != nullptr) expect_storable_(self_, storage);
  }

  /// Only in a StorageWalk.
  /// \return         Whether the type stored its own weights and those of all its members.
  bool set_storage(Storage storage) const {
    if (set_storage_ != nullptr) set_storage_(self_, storage);
    return set_storage_ != nullptr;
  }

  /// Whether the type has a `set_storage`.
  bool set_storage_exists() const { return set_storage_exists_; }

  /// Only in a StorageWalk.
  /// \return         Whether the type has experts that it can change, and did so.
  bool change_experts(const ExpertMap& map) const {
    if (change_experts_ != nullptr) change_experts_(self_, map);
    return change_experts_ != nullptr;
  }

  /// Only in a StorageWalk.
  /// \return         Whether the type is a mixture whose tokens can have another number of experts,
  ///                 and now have `k`.
  bool set_active_experts(Index k) const {
    if (set_active_experts_ != nullptr) set_active_experts_(self_, k);
    return set_active_experts_ != nullptr;
  }

  /// Whether a choice of experts can be imposed on the type.
  bool can_be_imposed_on() const { return impose_ != nullptr; }

  /// Only where `can_be_imposed_on`.
  /// \param trace    Null to let the type choose itself again.
  void impose(const RoutingTrace* trace) const { impose_(self_, trace); }

  /// Whether the type stores its weights as a whole.
  bool stores_itself() const { return set_storage_exists_ && has_storage_; }

  /// How the type stores its own weights; kTrainable where it has none.
  Storage storage() const { return storage_; }

  /// Whether the type's own weights, if it has any, are parameters.
  bool is_trainable() const { return storage_ == Storage::kTrainable; }

  /// Whether `set_precision` leaves the type's own weights alone.
  bool trains_in_full() const { return trains_in_full_; }

  /// The node itself, if it is a `Member`; else null.
  template <class Member>
  Member* get() const {
    return type_ == type_of<Member>() ? static_cast<Member*>(self_) : nullptr;
  }

 private:
  // An address of its own for each type.
  template <class Member>
  static const void* type_of() {
    static const char place = 0;
    return &place;
  }

  void* self_;
  const void* type_;
  void (*update_)(void*) = nullptr;
  void (*discard_)(void*) = nullptr;
  void (*expect_storable_)(const void*, Storage) = nullptr;
  void (*set_storage_)(void*, Storage) = nullptr;
  void (*change_experts_)(void*, const ExpertMap&) = nullptr;
  void (*set_active_experts_)(void*, Index) = nullptr;
  void (*impose_)(void*, const RoutingTrace*) = nullptr;
  Storage storage_ = Storage::kTrainable;
  bool has_storage_ = false;
  bool set_storage_exists_ = false;
  bool trains_in_full_ = false;
};

/// Walks a tree of layers. A type hands its members over in a static `visit`, one line each:
///
///     template <class Self, class Visit>
///     static void visit(Self& self, Visit& visit) {
///       visit("weight", self.weight_);
///       visit("experts", self.experts_);
///       visit("", self.inner_);       // the members of `inner_` under their own names
///     }
///
/// Members are parameters, buffers, everything that has a `visit` of its own, and vectors of those.
/// A part that is not visited is not trained, saved, updated or stored: there is no other way to
/// reach it. Verbs such as `parameters` and `update` derive from this class.
/// \tparam stores  See Node; StorageWalk has it.
template <class T, bool stores = false>
class Walk {
 public:
  Walk() { path_.reserve(kPathInside); }
  Walk(const Walk&) = delete;
  Walk& operator=(const Walk&) = delete;
  virtual ~Walk() = default;

  void operator()(std::string_view name, Parameter<T>& parameter) {
    const std::size_t parent = path_.size();
    path_.append(name);
    at_parameter(path_, parameter);
    path_.resize(parent);
  }

  /// A weight, unless its layer stores it for inference, and its adapters: `name.lora_A.ADAPTER`,
  /// `name.lora_B.ADAPTER` and the buffer `name.lora_merged.ADAPTER`.
  void operator()(std::string_view name, LinearParameter<T>& weight) {
    const std::size_t parent = path_.size();
    path_.append(name);
    at_linear(path_, weight);
    if (weight.has_value()) at_parameter(path_, weight);
    const std::size_t own = path_.size();
    for (std::size_t i = 0; with_adapters() && i < weight.adapters.size(); ++i) {
      LowRank<T>& adapter = weight.adapters[i];
      path_.append(".lora_A.").append(adapter.name);
      at_parameter(path_, adapter.a);
      path_.resize(own);
      path_.append(".lora_B.").append(adapter.name);
      at_parameter(path_, adapter.b);
      path_.resize(own);
      path_.append(".lora_merged.").append(adapter.name);
      at_buffer(path_, adapter.merged);
      path_.resize(own);
    }
    path_.resize(parent);
  }

  void operator()(std::string_view name, Buffer<T>& buffer) {
    const std::size_t parent = path_.size();
    path_.append(name);
    at_buffer(path_, buffer);
    path_.resize(parent);
  }

  /// Members are named `name.0`, `name.1`, ...
  template <class Member>
  void operator()(std::string_view name, std::vector<Member>& members) {
    const std::size_t parent = path_.size();
    if (!name.empty()) path_.append(name).push_back('.');
    for (std::size_t i = 0; i < members.size(); ++i) (*this)(std::to_string(i), members[i]);
    path_.resize(parent);
  }

  template <class Member>
  void operator()(std::string_view name, Member& member) {
    const std::size_t parent = path_.size();
    if (!name.empty()) path_.append(name).push_back('.');
    if (at_node(Node(member, std::bool_constant<stores>()))) visit_members(member);
    path_.resize(parent);
  }

 protected:
  virtual void at_parameter(std::string_view /*name*/, Parameter<T>& /*parameter*/) {}
  /// Called for the weight of a linear map, whether or not it is stored for inference, before its
  /// parameters.
  virtual void at_linear(std::string_view /*name*/, LinearParameter<T>& /*weight*/) {}
  virtual void at_buffer(std::string_view /*name*/, Buffer<T>& /*buffer*/) {}
  /// \return         Whether to go on to the members of the node.
  virtual bool at_node(const Node& /*node*/) { return true; }

  /// Whether the adapters of weights are visited.
  virtual bool with_adapters() const { return true; }

  /// Whether only members are visited whose weights are stored, see Node.
  virtual bool only_stored() const { return stores; }

  /// The names that lead to the node, with a dot behind each: "layers.3.moe.experts.".
  std::string_view path() const { return path_; }

 private:
  template <class Member>
  void visit_members(Member& member) {
    if constexpr (requires { Member::visit_stored(member, *this); }) {
      if (only_stored()) return Member::visit_stored(member, *this);
    }
    Member::visit(member, *this);
  }

  static constexpr std::size_t kPathInside = 400;  // Longer paths are allocated.

  std::array<char, kPathInside + 1> memory_{};
  std::pmr::monotonic_buffer_resource resource_{memory_.data(), memory_.size()};
  std::pmr::string path_{&resource_};  // The path of the node, with a dot at the end.
};

/// A walk that changes how weights are stored, or which experts there are.
template <class T>
using StorageWalk = Walk<T, true>;

}  // namespace weir
