// The C ABI, the choice of instruction set and the threads. Built for any x86-64.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <thread>
#include <vector>

#include "abi.h"
#include "isa.h"

namespace linearize {
extern const Kernels avx2_kernels, avx512_kernels;

namespace {

const Kernels& kernels_of(int64_t isa) { return isa == AVX512 ? avx512_kernels : avx2_kernels; }

// Aligned to cache lines. Zeroed, where padding that nobody writes must be finite.
class Scratch {
 public:
  Scratch(size_t floats, bool zeroed) {
    size_t bytes = (floats * sizeof(float) + 127) / 64 * 64;
    block_ = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (block_ && zeroed) std::memset(block_, 0, bytes);
  }
  ~Scratch() { std::free(block_); }
  Scratch(const Scratch&) = delete;
  float* get() const { return block_; }

 private:
  float* block_;
};

// Memory that a thread keeps for its next call: asking the system for it anew costs more than one token.
class Kept {
 public:
  // Null if memory ran out; the next call asks again.
  float* of(size_t floats) {
    if (!scratch_ || floats > floats_) {
      scratch_.emplace(floats, false);
      floats_ = scratch_->get() ? floats : 0;
      if (!floats_) scratch_.reset();
    }
    return scratch_ ? scratch_->get() : nullptr;
  }

 private:
  std::optional<Scratch> scratch_;
  size_t floats_ = 0;
};

// work(i, scratch) for every i below `units`, on up to `threads` threads; false if memory ran out. A thread
// that cannot be started is done without.
template <class Work>
bool for_each(int64_t units, int64_t threads, size_t floats, bool zeroed, const Work& work) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
  auto all = [&](float* scratch) {
    if (!scratch) return;
    for (int64_t unit; (unit = next.fetch_add(1)) < units; done.fetch_add(1)) work(unit, scratch);
  };
  auto body = [&] {
    if (zeroed) return all(Scratch(floats, true).get());
    thread_local Kept kept;
    all(kept.of(floats));
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads && i < units; i++) others.emplace_back(body);
  } catch (...) {
  }
  body();
  for (auto& thread : others) thread.join();
  return done.load() == units;
}

// Where sequences are cut: into as many pieces as it takes to give every thread one, if they stay long enough
// for the pass that sums up what came before each. With one piece nothing is summed, and the number of
// threads changes no bit of the results.
struct Cut {
  static constexpr int64_t SHORTEST = 8;  // groups
  int64_t units, groups, pieces;

  Cut(const Core& core, int64_t threads) {
    units = core.batch * core.kv_heads;
    groups = (core.length + core.group - 1) / core.group;
    pieces = units < threads ? (threads + units - 1) / units : 1;
    if (pieces > groups / SHORTEST) pieces = groups < SHORTEST ? 1 : groups / SHORTEST;
  }
  int64_t count() const { return units * pieces; }
  int64_t longest() const { return (groups + pieces - 1) / pieces; }
  Piece at(int64_t i) const {
    const int64_t part = i % pieces;
    return {i / pieces, part * groups / pieces, (part + 1) * groups / pieces};
  }
};

// sums[pieces][size] of each unit -> the sums over all earlier (or later) pieces.
void accumulate(float* sums, const Cut& cut, size_t size, bool later) {
  for (int64_t unit = 0; unit < cut.units; unit++)
    for (size_t i = 0; i < size; i++) {
      float total = 0;
      for (int64_t p = 0; p < cut.pieces; p++) {
        float& place = sums[(unit * cut.pieces + (later ? cut.pieces - 1 - p : p)) * size + i];
        const float own = place;
        place = total;
        total += own;
      }
    }
}

}  // namespace
}  // namespace linearize

using namespace linearize;

extern "C" {

__attribute__((visibility("default"))) int64_t linearize_isa() { return best_isa(); }

// Each returns 0, or 1 when memory ran out.
__attribute__((visibility("default"))) int linearize_forward(const Forward* f, int64_t isa, int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  const Cut cut(f->core, threads);
  const bool sums = f->core.alpha && cut.pieces > 1;
  const size_t state = kernels.state_floats(f->core), scratch = kernels.forward_scratch(*f);
  Scratch before(sums ? cut.count() * state : 0, false);
  if (!before.get()) return 1;
  if (sums) {
    if (!for_each(cut.count(), threads, scratch, true, [&](int64_t i, float* own) {
          kernels.forward_sum(*f, cut.at(i), before.get() + i * state, own);
        }))
      return 1;
    accumulate(before.get(), cut, state, false);
  }
  return !for_each(cut.count(), threads, scratch, true, [&](int64_t i, float* own) {
    kernels.forward_piece(*f, cut.at(i), sums ? before.get() + i * state : nullptr, own);
  });
}

__attribute__((visibility("default"))) int linearize_forward_both(const Forward* f, int64_t isa,
                                                                  int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  const Cut cut(f->core, threads);
  const size_t state = f->core.alpha ? kernels.state_floats(f->core) : 0;
  Scratch sums(cut.count() * state, false);
  if (!sums.get()) return 1;
  if (state && !for_each(cut.count(), threads, kernels.forward_scratch(*f), true, [&](int64_t i, float* own) {
        kernels.forward_sum(*f, cut.at(i), sums.get() + i * state, own);
      }))
    return 1;
  for (int64_t i = 0; i < cut.count(); i++)  // all pieces of a unit into its first
    for (size_t j = 0; i % cut.pieces && j < state; j++)
      sums.get()[i / cut.pieces * cut.pieces * state + j] += sums.get()[i * state + j];
  return !for_each(cut.count(), threads, kernels.forward_both_scratch(*f), true, [&](int64_t i, float* own) {
    kernels.forward_both_piece(*f, cut.at(i), sums.get() + i / cut.pieces * cut.pieces * state, own);
  });
}

__attribute__((visibility("default"))) int linearize_backward(const Backward* f, int64_t isa,
                                                              int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  const Core& core = f->core;
  const Cut cut(core, threads);
  const bool sums = core.alpha && cut.pieces > 1;
  const size_t state = kernels.state_floats(core), scratch = kernels.backward_scratch(*f, cut.longest());
  const int64_t shared = core.heads / core.kv_heads, share = 2 + core.taps;
  Scratch before(sums ? cut.count() * state : 0, false), after(sums ? cut.count() * state : 0, false);
  Scratch shares(cut.count() * shared * share, false);
  if (!before.get() || !after.get() || !shares.get()) return 1;
  if (sums) {
    if (!for_each(cut.count(), threads, scratch, true, [&](int64_t i, float* own) {
          kernels.backward_sums(*f, cut.at(i), before.get() + i * state, after.get() + i * state, own);
        }))
      return 1;
    accumulate(before.get(), cut, state, false);
    accumulate(after.get(), cut, state, true);
  }
  if (!for_each(cut.count(), threads, scratch, true, [&](int64_t i, float* own) {
        kernels.backward_piece(*f, cut.at(i), sums ? before.get() + i * state : nullptr,
                               sums ? after.get() + i * state : nullptr, shares.get() + i * shared * share,
                               own);
      }))
    return 1;
  for (int64_t head = 0; head < core.heads; head++)
    for (int64_t l = 0; l < share; l++) {
      double total = 0;
      for (int64_t b = 0; b < core.batch; b++)
        for (int64_t p = 0; p < cut.pieces; p++)
          total += shares.get()[((b * core.kv_heads + head / shared) * cut.pieces + p) * shared * share +
                                head % shared * share + l];
      if (l == 0 && core.alpha) f->dalpha[head] = static_cast<float>(total);
      if (l == 1 && core.local) f->dlocal[head] = static_cast<float>(total);
      if (l >= 2) f->dconv[head * core.taps + l - 2] = static_cast<float>(total);
    }
  return 0;
}

__attribute__((visibility("default"))) int linearize_step(const Step* s, int64_t isa, int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  if (!for_each(s->core.batch * s->core.kv_heads, threads, kernels.step_scratch(*s), false,
                [&](int64_t unit, float* scratch) { kernels.step_unit(*s, unit, scratch); }))
    return 1;
  for (int64_t b = 0; b < s->core.batch; b++) {
    if (s->active && !s->active[b]) continue;
    if (s->state.length[b] - s->state.folded[b] == s->state.window) s->state.folded[b] += s->core.group;
    s->state.length[b]++;
  }
  return 0;
}

// Returns 2, and changes nothing, when a path names a token that there is not.
__attribute__((visibility("default"))) int linearize_append(const Append* a, int64_t isa, int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  const Core& core = a->core;
  std::vector<Appended> rows;
  for (int64_t b = 0; b < core.batch; b++) {
    int64_t count = a->path ? 0 : core.length;
    for (int64_t i = 0; a->path && i < a->steps; i++) {
      const int64_t token = a->path[b * a->steps + i];
      if (token >= core.length) return 2;
      count += token >= 0;
    }
    const int64_t length = a->state.length[b] + count, beyond = length - a->state.window;
    const int64_t folded = beyond > 0 ? (beyond + core.group - 1) / core.group * core.group : 0;
    rows.push_back({length, std::max(folded, a->state.folded[b])});
  }
  if (!for_each(core.batch * core.kv_heads, threads, kernels.append_scratch(*a), false,
                [&](int64_t unit, float* scratch) {
                  kernels.append_unit(*a, rows[unit / core.kv_heads], unit, scratch);
                }))
    return 1;
  for (int64_t b = 0; b < core.batch; b++) {
    a->state.length[b] = rows[b].length;
    a->state.folded[b] = rows[b].folded;
  }
  return 0;
}

__attribute__((visibility("default"))) int linearize_tree(const Tree* t, int64_t isa, int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  return !for_each(t->core.batch * t->core.kv_heads, threads, kernels.tree_scratch(*t), false,
                   [&](int64_t unit, float* scratch) { kernels.tree_unit(*t, unit, scratch); });
}

__attribute__((visibility("default"))) int linearize_salient(const Salient* s, int64_t isa, int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  if (!for_each(s->batch * s->kv_heads, threads, kernels.salient_scratch(*s), false,
                [&](int64_t unit, float* scratch) { kernels.salient_unit(*s, unit, scratch); }))
    return 1;
  for (int64_t b = 0; b < s->batch; b++) {
    const int64_t length = s->length_of(b) += s->count ? s->count[b] : s->length;
    if (length) s->block_of(b) = std::max(s->block_of(b), (length - 1) / SALIENT_BLOCK);
  }
  return 0;
}

__attribute__((visibility("default"))) int linearize_salient_backward(const SalientBackward* s, int64_t isa,
                                                                      int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  return !for_each(s->batch * s->kv_heads, threads, kernels.salient_backward_scratch(*s), false,
                   [&](int64_t unit, float* scratch) { kernels.salient_backward_unit(*s, unit, scratch); });
}

__attribute__((visibility("default"))) int linearize_bidirectional(const Bidirectional* s, int64_t isa,
                                                                   int64_t threads) {
  const Kernels& kernels = kernels_of(isa);
  const int64_t units = s->batch * s->kv_heads, each = 1 + s->kept();
  std::vector<int32_t> chosen(units * each);
  if (!for_each(units, threads, kernels.choosing_scratch(*s), false, [&](int64_t unit, float* scratch) {
        kernels.choosing_unit(*s, unit, chosen.data() + unit * each, scratch);
      }))
    return 1;
  return !for_each(units * s->panels(), threads, kernels.panel_scratch(*s), false,
                   [&](int64_t index, float* scratch) {
                     kernels.panel_unit(*s, index, chosen.data() + index / s->panels() * each, scratch);
                   });
}

}  // extern "C"
