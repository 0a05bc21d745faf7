// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include <weir/moe/concepts.hpp>
#include <weir/moe/selector/sinkhorn.hpp>

#include "support/allocations.hpp"
#include "support/catch.hpp"
#include "support/gradient.hpp"
#include "support/matrices.hpp"
#include "support/routing.hpp"
#include "support/threads.hpp"

using namespace weir;
using test::route;

static_assert(Selector<Sinkhorn<float>, float>);

namespace {

const Pass kTraining{.training = true};

// in.logits, out.sinkhorn and out.sinkhorn_route_k* of 08_megatron_dropping.safetensors, computed
// with Megatron-LM at d98e8a64 in double.
// clang-format off
const double kLogits[16 * 8] = {
    0.5315658665131286, -2.049094254759611, 1.4826678619907991, -2.195250269148341, -0.6419094585696757, 0.8177062176360894, -0.23007614639010865, -1.717161048577127,
    -0.062073796944376314, -0.8337405129017986, -0.01809869781193008, 2.0748357083644335, -0.8982896735442419, 2.024165239933002, -0.6534161262243126, 0.09755042085921231,
    1.5474216224603476, -1.3949252670288417, -2.0756253514450327, -0.42629804337338945, -0.1961521111571603, -2.2203907066068145, 1.7275558427317799, -0.2506451399340949,
    -0.4447349013957582, -0.5785826776826579, 3.493839617308026, -1.3554077026711238, 0.6990851529520355, 1.0269699890459367, -0.21445467898895795, 1.4238742901498245,
    -1.0090987300829366, 1.6893879072150502, 1.2812909198903542, 0.35410331768797776, -1.2651631423403227, 0.4478798676048611, 0.3323879265542007, 0.44974815416797564,
    1.4422435989068692, 1.354412112603771, -0.9022260151129389, -0.726772198265586, 0.6886608342846116, 0.6206135445713795, -0.45807596558180574, -0.19698765236399884,
    -0.5606805932622267, 2.0162505773750543, 1.4294428071106335, 0.16079508266760092, 0.9932108065446592, 0.022295387951243802, 0.21810862476983697, -0.7882213448849543,
    1.292407133808036, 1.8040957833662878, -0.5382791721235743, -0.8389798595021177, -0.32592912250290895, 1.51669350092405, 0.9518289860350094, -0.30984868275954275,
    0.10586451643882311, -0.33818742627594495, 0.02244740398025997, -0.8806864429713052, -0.8286604516816947, -0.8724011908399947, -1.5346286078224636, 1.4165571234733987,
    -0.5527273390714018, -1.0736688180483336, -1.2327677253116376, 1.6304463705700807, 0.6916503716203365, 0.9718166762275748, 1.0371938201004565, -2.232854211855683,
    -1.7924376077544504, -1.1532582080585974, -0.15439998146871106, -1.6443009177538843, 0.19657039773311488, 0.3806765688788137, -0.1264054076310715, -1.0944749428187033,
    1.4116439466475896, -2.6800393380833234, -0.429727727199164, -0.6694866957443824, 0.5297226368472675, -2.5922073056958412, 0.20994164178575386, 0.24501603054456644,
    0.16229327529460236, -0.3298618004602386, 0.8521525180816731, 1.1096010529478273, -2.435843255904866, -1.745805309252035, -0.11074037759993154, -0.2039266222490179,
    -0.7240610754316938, 0.73741247534118, 0.33906836138377056, -0.06829801231734632, -2.990629990657521, 0.006695800439301987, -0.20901794283074057, 0.5327787916729423,
    2.430007111069937, 2.991416539928666, 0.7204337164709821, 0.26619400978852026, 0.7863568835987809, 0.36824958239558736, -1.0548919521879376, -0.32445848166215935,
    2.0217680132063567, 0.025803284962176543, 1.7185448506519676, -0.7102586286078705, -0.36612059716514017, -0.5271671505287127, -0.7302421644968929, -1.115027461491484};
const double kPlan[16 * 8] = {
    0.008686904216870761, 0.0007094292218887757, 0.01933737845137302, 0.0010213399267948238, 0.0063259776577013396, 0.01728935296824428, 0.007298890638149698, 0.001828297408211135,
    0.0018373118761664815, 0.0009159310386895154, 0.0016510310495143454, 0.027975468391040946, 0.001874629385651786, 0.022124298845618187, 0.0018303532668405955, 0.00429831560422714,
    0.014668714848533788, 0.0008343678070209526, 0.0003368193034182023, 0.00366237646409282, 0.006040377678828985, 0.0005066365236232889, 0.031607642969824455, 0.004844992336122298,
    0.0008232416316595422, 0.0007766198110166205, 0.03634985814491289, 0.0005950776375602861, 0.006083850616035705, 0.0053619797543077215, 0.0018651145135363124, 0.010637644846760537,
    0.0011112326993581772, 0.017805466615647064, 0.009440235195633803, 0.00780517450848573, 0.002025322233976808, 0.0071319339091675815, 0.00764846021639677, 0.009531596859906075,
    0.013304890954858362, 0.013142472605481036, 0.0010972240509594534, 0.002732537970419937, 0.014744530978709156, 0.008746341954670488, 0.003579989605984375, 0.005151025901355731,
    0.0014043919160819259, 0.01992717796368527, 0.008836131034842919, 0.005192394768430694, 0.015639802355468368, 0.0037611106023281793, 0.005506567000827193, 0.0022307973981380153,
    0.008717370348585697, 0.01568265341444592, 0.0012017185130728072, 0.0018590127346879766, 0.0040686231895318194, 0.016309339030576325, 0.011159456243719222, 0.0035020806104569635,
    0.005046296155980746, 0.003490871938126221, 0.003992264975389855, 0.003381158849877527, 0.004666703158363061, 0.0028363633720495805, 0.0017606959700584783, 0.03732422532777896,
    0.001479177593965588, 0.0009475209055108262, 0.0006444018047008902, 0.02358886759398218, 0.01208768605756377, 0.010157010586568418, 0.013052179948681526, 0.0005497205737691285,
    0.001169911620191537, 0.00239086817793907, 0.00517628252578864, 0.002438004368909299, 0.02013097154651228, 0.015366292021640094, 0.011139620424661188, 0.004688845144334058,
    0.01764116249689821, 0.00031793783963882804, 0.0024060456272511376, 0.003955943899741548, 0.017195314411048337, 0.0004811951343732071, 0.009545600785967733, 0.010956166792658036,
    0.005602263077001203, 0.0036934630291868354, 0.009603726357122892, 0.025960946213043984, 0.000981530093269407, 0.001242599987797773, 0.007672824012982581, 0.007746539140544061,
    0.0025028190206928314, 0.011639915730708989, 0.006231820138960519, 0.008665032669096368, 0.0006108963822194469, 0.007770297695730499, 0.0075383896913620175, 0.017541210770097664,
    0.01531742797955261, 0.02896098674490671, 0.0023834265394604348, 0.003162279372197536, 0.0069703422387135325, 0.002913536488509965, 0.0008450495227430776, 0.0019441427077766498,
    0.025686876432813876, 0.003764309465722816, 0.016311630155462147, 0.003004371817658273, 0.0055534252270499065, 0.0030017004641833623, 0.0029491523559113356, 0.0022243843568985526};
const std::vector<Index> kBest = {2, 3, 6, 2, 1, 4, 1, 5, 7, 3, 4, 0, 3, 7, 1, 0};
const std::vector<std::vector<Index>> kTwoBest = {
    {2, 5}, {3, 5}, {0, 6}, {2, 7}, {1, 7}, {0, 4}, {1, 4}, {1, 5}, {0, 7}, {3, 6}, {4, 5}, {0, 4}, {2, 3}, {1, 7}, {0, 1}, {0, 2}};
const double kWeightsOfBest[16] = {
    0.8149752073598958, 0.8884331763239974, 0.8490995186821005, 0.9705119785631202, 0.844143646759373, 0.6656689564889143, 0.8824927539102073, 0.8200510656509727, 0.804798114532185, 0.8362307778940943, 0.5489849696378236, 0.8040251076981685, 0.7520547278961582, 0.6301309874814485, 0.9521848449328778, 0.8830637017413787};
const double kSumOfTwoBest[16] = {
    0.6596043364718834, 0.7797968988938155, 0.7906013039130582, 0.8397913278043306, 0.44723039923828045, 0.435092949691495, 0.5415711710017133, 0.5498659180029583, 0.6191133679970302, 0.5710167437790992, 0.49376326951786975, 0.6031262702938582, 0.5816526873300198, 0.44716656259813026, 0.7948386805424448, 0.78427489803357};
// clang-format on

Matrix<double> matrix_of(const double* values) {
  return Eigen::Map<const Matrix<double>>(values, 16, 8);
}

double spread(const Routing<double>& routing) {
  RowVector<double> load = RowVector<double>::Zero(routing.experts());
  routing.add_load(0, routing.tokens(), load);
  return load.maxCoeff() - load.minCoeff();
}

}  // namespace

TEST_CASE("Sinkhorn agrees with Megatron-Core", "[moe][selector][sinkhorn][golden]") {
  const Matrix<double> logits = matrix_of(kLogits);
  CHECK(test::relative_error(Sinkhorn<double>{}.plan(logits), matrix_of(kPlan)) <= 1e-12);

  const Routing<double> one = route(Sinkhorn<double>{}, logits, kTraining);
  CHECK(one.expert == kBest);
  const Routing<double> two = route(Sinkhorn<double>{.k = 2}, logits, kTraining);
  for (Index t = 0; t < 16; ++t) {
    const auto i = static_cast<std::size_t>(t);
    CHECK(one.weight[i] == Approx(kWeightsOfBest[t]).epsilon(1e-12));
    std::vector<Index> chosen = {two.expert[2 * i], two.expert[2 * i + 1]};
    std::sort(chosen.begin(), chosen.end());
    CHECK(chosen == kTwoBest[i]);
    CHECK(two.weight[2 * i] + two.weight[2 * i + 1] == Approx(kSumOfTwoBest[t]).epsilon(1e-12));
  }
}

TEST_CASE("The plan of Sinkhorn has rows of 1 / T and columns of 1 / experts",
          "[moe][selector][sinkhorn]") {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const Index tokens = 1 + static_cast<Index>(seed);
    const Index experts = 1 + static_cast<Index>(seed % 7);
    const std::vector<std::uint8_t> mask = [&] {
      std::vector<std::uint8_t> m(static_cast<std::size_t>(tokens), 1);
      if (tokens > 3) m[2] = 0;
      return m;
    }();
    const Index real = tokens > 3 ? tokens - 1 : tokens;
    const Matrix<double> logits = test::random_matrix(tokens, experts, seed);
    const Matrix<double> pi = Sinkhorn<double>{.tolerance = 1e-12}.plan(logits, {.mask = mask});
    INFO("seed " << seed);
    for (Index t = 0; t < tokens; ++t) {
      const double expected =
          mask[static_cast<std::size_t>(t)] != 0 ? 1.0 / static_cast<double>(real) : 0.0;
      CHECK(pi.row(t).sum() == Approx(expected).epsilon(1e-6));
    }
    for (Index e = 0; e < experts; ++e) {
      CHECK(pi.col(e).sum() == Approx(1.0 / static_cast<double>(experts)).epsilon(1e-6));
    }
  }
}

TEST_CASE("Sinkhorn levels in training what all tokens prefer, and takes the best in evaluation",
          "[moe][selector][sinkhorn]") {
  Matrix<double> logits = test::random_matrix(64, 4, 5);
  logits.col(0).array() += 5.0;
  CHECK(spread(route(Sinkhorn<double>{}, logits)) > 60.0);
  CHECK(spread(route(Sinkhorn<double>{}, logits, kTraining)) < 16.0);

  const Routing<double> two = route(Sinkhorn<double>{.k = 2}, logits);
  for (Index t = 0; t < 64; ++t) {
    const auto first = static_cast<std::size_t>(two.first(t));
    CHECK(two.weight[first] > two.weight[first + 1]);
    CHECK(two.weight[first] == two.probabilities.row(t).maxCoeff());
  }
}

TEST_CASE("Sinkhorn is not causal in training, and is in evaluation", "[moe][selector][sinkhorn]") {
  Matrix<double> logits(2, 2);
  logits << 0.1, 0.0, 0.0, 3.0;
  CHECK(route(Sinkhorn<double>{}, logits, kTraining).expert[0] == 0);
  CHECK(route(Sinkhorn<double>{}, logits).expert[0] == 0);
  logits.row(1) << 3.0, 0.0;
  CHECK(route(Sinkhorn<double>{}, logits, kTraining).expert[0] == 1);
  CHECK(route(Sinkhorn<double>{}, logits).expert[0] == 0);
}

TEST_CASE("Sinkhorn does not overflow, and leaves padding alone", "[moe][selector][sinkhorn]") {
  Matrix<double> logits = 1000.0 * test::random_matrix(6, 3, 1);
  logits.row(4).setConstant(std::numeric_limits<double>::quiet_NaN());
  const std::vector<std::uint8_t> mask = {1, 1, 1, 1, 0, 1};
  const Routing<double> routing =
      route(Sinkhorn<double>{.k = 2}, logits, {.training = true, .mask = mask});
  CHECK(routing.offsets == std::vector<Index>{0, 2, 4, 6, 8, 8, 10});
  CHECK(routing.probabilities.allFinite());
  for (const double w : routing.weight) CHECK(std::isfinite(w));
  CHECK(route(Sinkhorn<double>{}, Matrix<double>(0, 3), kTraining).assignments() == 0);
  CHECK(route(Sinkhorn<double>{}, Matrix<double>::Zero(1, 1), kTraining).weight[0] == 0.5);
  CHECK(route(Sinkhorn<double>{.k = 3}, test::random_matrix(2, 3, 2), kTraining).assignments() ==
        6);
}

TEST_CASE("Sinkhorn has the same bits for any number of threads", "[moe][selector][sinkhorn]") {
  const Matrix<double> logits = test::random_matrix(500, 8, 3);
  const Routing<double> one = route(Sinkhorn<double>{.k = 2}, logits, kTraining);
  const test::Threads threads(3);
  const Routing<double> three = route(Sinkhorn<double>{.k = 2}, logits, kTraining);
  CHECK(one.expert == three.expert);
  CHECK(one.weight == three.weight);
}

TEST_CASE("Sinkhorn gradient agrees with finite differences",
          "[moe][selector][sinkhorn][gradient]") {
  const Sinkhorn<double> selector{.k = GENERATE(as<Index>{}, 1, 2, 4)};
  const std::vector<std::uint8_t> mask = {1, 1, 0, 1, 1};
  const Pass pass{.training = GENERATE(false, true), .mask = mask};
  Matrix<double> logits = test::random_matrix(5, 4, 11);
  const Routing<double> routing = route(selector, logits, pass);
  const Matrix<double> c = test::random_matrix(1, routing.assignments(), 12);
  const Matrix<double> q = test::random_matrix(5, 4, 13);
  RoutingGradient<double> gradient;
  gradient.reset(routing);
  gradient.weights = c;
  gradient.probabilities = q;
  selector.backward(routing, gradient);
  const auto numeric = test::numeric_gradient(logits, [&] {
    const Routing<double> r = route(selector, logits, pass);
    double value = r.probabilities.cwiseProduct(q).sum();
    for (Index a = 0; a < r.assignments(); ++a) {
      value += c(0, a) * r.weight[static_cast<std::size_t>(a)];
    }
    return value;
  });
  CHECK(test::relative_error(gradient.logits, numeric) <= 1e-8);
}

TEST_CASE("Sinkhorn says what is wrong with its settings", "[moe][selector][sinkhorn]") {
  const auto message = [](const Sinkhorn<double>& selector) {
    return test::message_of<ConfigError>([&] { selector.check(4); });
  };
  CHECK(message({.k = 5}) == "Sinkhorn: k = 5, expected 1 <= k <= experts = 4");
  CHECK(message({.tolerance = 0.0}) == "Sinkhorn: tolerance = 0, expected > 0");
  CHECK(message({.iterations = 0}) == "Sinkhorn: iterations = 0, expected >= 1");
}

TEST_CASE("Sinkhorn allocates nothing the second time", "[moe][selector][sinkhorn]") {
  if (!test::allocations_are_counted()) return;
  const Sinkhorn<double> selector{.k = 2};
  const Matrix<double> logits = test::random_matrix(37, 5, 31);
  const Pass pass{.training = true};
  Routing<double> routing;
  RoutingGradient<double> gradient;
  const auto step = [&] {
    selector.select(logits, pass, routing);
    gradient.reset(routing);
    selector.backward(routing, gradient);
  };
  step();
  CHECK(test::count_allocations(step) == 0);
}
