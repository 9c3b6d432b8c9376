// Products of activations with weights in panels, for CPUs: what XLA calls through its foreign function interface.
//
// A panel is 16 outputs, for all inputs, in the order in which one instruction reads them, so that a product with few rows is one
// walk through the weight, at the speed of memory. Two forms (`panels.py` makes and defines them):
//
//   floats  [K][16]                        float32, bfloat16 or float16; 16 outputs of one input
//   codes   [K / 4][16][4]   one byte      code + 128; four inputs of one output lie next to each other
//           [K / 8][16][4]   half a byte   code + 8; four inputs in the low halves, the next four in the high ones
//
// Every sum of floats is one accumulator from the first input to the last, whatever the number of rows: a row's result does not
// depend on the rows beside it. Sums of codes are exact. Instructions are those of the machine that compiles this
// (`-march=native`): AVX-512 with VNNI, or AVX2.

#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "quikjax: products are written for AVX2 and AVX-512, which this CPU does not have"
#endif
#include <immintrin.h>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int kPanel = 16;

// How many float lanes an instruction has, and how many accumulators leave registers for the operands.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kAccumulators = 24, kRows = 8;
#else
constexpr int kLanes = 8, kAccumulators = 12, kRows = 6;
#endif
constexpr int kVectors = kPanel / kLanes;
constexpr int kPanels = 4;  // at most so many at once

// With how many panels a tile of so many rows is multiplied.
constexpr int Fitting(int accumulators) { return accumulators < 1 ? 1 : (accumulators > kPanels ? kPanels : accumulators); }
struct FloatTiles {
  static constexpr int kMost = kRows;
  static constexpr int Panels(int rows) { return Fitting(kAccumulators / (rows * kVectors)); }
};

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
// In memory, wherever it lies.
typedef float FloatsThere __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef uint16_t HalvesThere __attribute__((vector_size(kLanes * 2), aligned(2), may_alias));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline Floats Load(const float* from) { return *reinterpret_cast<const FloatsThere*>(from); }

inline Floats Load(const BFloat16* from) {
  Halves halves = *reinterpret_cast<const HalvesThere*>(from);
  Words words = __builtin_convertvector(halves, Words) << 16;
  Floats values;
  std::memcpy(&values, &words, sizeof(values));
  return values;
}

inline Floats Load(const Float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#endif
}

// Work in pieces, taken by XLA's threads as they come. The caller takes part and waits only for pieces that somebody has begun, so
// that no thread waits for one that never comes.
struct Pieces {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> done{0};
};

template <typename Run>
void InParallel(ffi::ThreadPool& pool, int64_t count, const Run& run) {
  auto take = [count](Pieces& pieces, const Run* run) {
    for (int64_t piece; (piece = pieces.next.fetch_add(1)) < count;) {
      (*run)(piece);
      pieces.done.fetch_add(1, std::memory_order_release);
    }
  };
  auto pieces = std::make_shared<Pieces>();
  int64_t helpers = pool.num_threads() - 1;
  if (helpers > count - 1) helpers = count - 1;
  // A helper that comes late finds no piece left, and does not touch `run`, which is gone by then.
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([pieces, take, at = &run] { take(*pieces, at); });
  take(*pieces, &run);
  while (pieces->done.load(std::memory_order_acquire) < count) {
    _mm_pause();
  }
}

// `kCount` rows of `x` with `kWide` panels of floats.
template <int kCount, int kWide, typename Weight>
inline void FloatTile(const float* x, const Weight* panel, int64_t k, float* y, int64_t n, int64_t outputs) {
  Floats sums[kCount][kWide * kVectors] = {};
  for (int64_t i = 0; i < k; ++i) {
    Floats weights[kWide * kVectors];
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) {
      const Weight* at = panel + (p * k + i) * kPanel;
      __builtin_prefetch(at + 2048 / sizeof(Weight));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weights[p * kVectors + v] = Load(at + v * kLanes);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      Floats value = x[m * k + i] - Floats{};
#pragma GCC unroll 16
      for (int w = 0; w < kWide * kVectors; ++w) sums[m][w] += value * weights[w];
    }
  }
  for (int m = 0; m < kCount; ++m) {
    std::memcpy(y + m * n, sums[m], sizeof(float) * (outputs < kWide * kPanel ? outputs : kWide * kPanel));
  }
}

// Sums of products of codes: 64 bytes of a weight's codes, four of each of 16 outputs, with four of one row's.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
struct Codes {
  __m512i bytes;
};
struct Sums {
  __m512i words;
};
struct Four {
  __m512i bytes;
};
inline Codes LoadCodes(const uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline Codes Low(Codes codes) { return {_mm512_and_si512(codes.bytes, _mm512_set1_epi8(15))}; }
inline Codes High(Codes codes) { return {_mm512_and_si512(_mm512_srli_epi16(codes.bytes, 4), _mm512_set1_epi8(15))}; }
inline Four Spread(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, 4);
  return {_mm512_set1_epi32(word)};
}
template <bool kHalves>
inline void Add(Sums& sums, Codes codes, Four four) {
  sums.words = _mm512_dpbusd_epi32(sums.words, codes.bytes, four.bytes);
}
constexpr int kCodeRows = 8, kCodeSums = 24;
#else
struct Codes {
  __m256i bytes[2];
};
struct Sums {
  __m256i words[2];
};
struct Four {
  __m256i bytes;
};
inline Codes LoadCodes(const uint8_t* from) {
  auto at = reinterpret_cast<const __m256i*>(from);
  return {{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
inline Codes Low(Codes codes) {
  const __m256i half = _mm256_set1_epi8(15);
  return {{_mm256_and_si256(codes.bytes[0], half), _mm256_and_si256(codes.bytes[1], half)}};
}
inline Codes High(Codes codes) {
  return Low({{_mm256_srli_epi16(codes.bytes[0], 4), _mm256_srli_epi16(codes.bytes[1], 4)}});
}
inline Four Spread(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, 4);
  return {_mm256_set1_epi32(word)};
}
template <bool kHalves>
inline void Add(Sums& sums, Codes codes, Four four) {
  for (int i = 0; i < 2; ++i) {
    __m256i added;
    if (kHalves) {
      // At most 15 * 128 twice: the sums of pairs fit 16 bits.
      added = _mm256_madd_epi16(_mm256_maddubs_epi16(codes.bytes[i], four.bytes), _mm256_set1_epi16(1));
    } else {
      // Bytes times bytes, twice, would not fit 16 bits: even and odd ones apart, widened.
      __m256i even = _mm256_and_si256(codes.bytes[i], _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(codes.bytes[i], 8);
      __m256i with_even = _mm256_srai_epi16(_mm256_slli_epi16(four.bytes, 8), 8), with_odd = _mm256_srai_epi16(four.bytes, 8);
      added = _mm256_add_epi32(_mm256_madd_epi16(even, with_even), _mm256_madd_epi16(odd, with_odd));
    }
    sums.words[i] = _mm256_add_epi32(sums.words[i], added);
  }
}
constexpr int kCodeRows = 4, kCodeSums = 4;
#endif

struct CodeTiles {
  static constexpr int kMost = kCodeRows;
  static constexpr int Panels(int rows) { return Fitting(kCodeSums / rows); }
};

// `kCount` rows of codes `x` `[*, k]` with `kWide` panels, into `found` `[kCount][kWide * 16]`; `totals` are the sums of each row's
// codes.
template <int kCount, int kWide, bool kHalves>
inline void CodeTile(const int8_t* x, const int32_t* totals, const uint8_t* panel, int64_t k, int32_t* found) {
  constexpr int kStep = kHalves ? 8 : 4;
  const int64_t bytes = k / kStep * 64;
  Sums sums[kCount][kWide] = {};
  for (int64_t i = 0, at = 0; i < k; i += kStep, at += 64) {
    Codes codes[kWide];
#pragma GCC unroll 4
    for (int p = 0; p < kWide; ++p) {
      codes[p] = LoadCodes(panel + p * bytes + at);
      __builtin_prefetch(panel + p * bytes + at + 2048);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kCount; ++m) {
      Four four = Spread(x + m * k + i);
#pragma GCC unroll 4
      for (int p = 0; p < kWide; ++p) Add<kHalves>(sums[m][p], kHalves ? Low(codes[p]) : codes[p], four);
      if (kHalves) {
        four = Spread(x + m * k + i + 4);
#pragma GCC unroll 4
        for (int p = 0; p < kWide; ++p) Add<kHalves>(sums[m][p], High(codes[p]), four);
      }
    }
  }
  for (int m = 0; m < kCount; ++m) {
    int32_t words[kWide * kPanel];
    std::memcpy(words, sums[m], sizeof(words));
    // Codes are stored with an offset, which every code of the row was multiplied by.
    const int32_t added = totals[m] * (kHalves ? 8 : 128);
    for (int o = 0; o < kWide * kPanel; ++o) found[m * kWide * kPanel + o] = words[o] - added;
  }
}

// Rows of a tile are known when this is compiled: `Tile<3>` and so on, down from the most.
template <int kCount, typename Call>
inline void WithCount(int64_t count, const Call& call) {
  if constexpr (kCount > 0) {
    if (count == kCount) return call(std::integral_constant<int, kCount>{});
    WithCount<kCount - 1>(count, call);
  }
}

// All tiles of a product: panels in groups, rows in parts, each of which is a piece of the work. `tile(count, wide, m, panel)`.
template <typename Tiles, typename Tile>
void ForTiles(ffi::ThreadPool& pool, int64_t rows, int64_t panels, const Tile& tile) {
  constexpr int kMost = Tiles::kMost;
  // Within a part panels come from the nearest cache but for the first tile.
  constexpr int64_t kPart = 8 * kMost;
  const int64_t parts = (rows + kPart - 1) / kPart, groups = (panels + kPanels - 1) / kPanels;
  InParallel(pool, parts * groups, [&](int64_t piece) {
    const int64_t first = piece % groups * kPanels, last = first + kPanels < panels ? first + kPanels : panels;
    const int64_t begin = piece / groups * kPart, end = begin + kPart < rows ? begin + kPart : rows;
    for (int64_t m = begin; m < end; m += kMost) {
      WithCount<kMost>(end - m < kMost ? end - m : kMost, [&](auto count) {
        constexpr int kWide = Tiles::Panels(decltype(count)::value);
        int64_t p = first;
        for (; p + kWide <= last; p += kWide) tile(count, std::integral_constant<int, kWide>{}, m, p);
        for (; p < last; ++p) tile(count, std::integral_constant<int, 1>{}, m, p);
      });
    }
  });
}

ffi::Error Wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

template <typename Weight>
void Floats32(ffi::ThreadPool& pool, const float* x, const Weight* panels, int64_t rows, int64_t k, int64_t n, float* y) {
  ForTiles<FloatTiles>(pool, rows, (n + kPanel - 1) / kPanel, [&](auto count, auto wide, int64_t m, int64_t p) {
    FloatTile<decltype(count)::value, decltype(wide)::value>(x + m * k, panels + p * k * kPanel, k, y + m * n + p * kPanel, n, n - p * kPanel);
  });
}

// y[M, N] = x[M, K] of float32 with the panels [L, N / 16, K, 16] of one layer.
ffi::Error FloatProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer panels, ffi::Buffer<ffi::S32> layer,
                        ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = panels.dimensions();
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1], at = layer.typed_data()[0];
  if (shape.size() != 4 || shape[1] != (n + kPanel - 1) / kPanel || shape[2] != k || shape[3] != kPanel)
    return Wrong("quikjax: panels of floats do not have the shape of the product");
  if (at < 0 || at >= shape[0]) return Wrong("quikjax: there is no such layer among the panels");
  const int64_t offset = at * shape[1] * k * kPanel;
  switch (panels.element_type()) {
    case ffi::F32:
      Floats32(pool, x.typed_data(), static_cast<const float*>(panels.untyped_data()) + offset, rows, k, n, y->typed_data());
      return ffi::Error::Success();
    case ffi::BF16:
      Floats32(pool, x.typed_data(), static_cast<const BFloat16*>(panels.untyped_data()) + offset, rows, k, n, y->typed_data());
      return ffi::Error::Success();
    case ffi::F16:
      Floats32(pool, x.typed_data(), static_cast<const Float16*>(panels.untyped_data()) + offset, rows, k, n, y->typed_data());
      return ffi::Error::Success();
    default:
      return Wrong("quikjax: panels are of float32, bfloat16 or float16");
  }
}

// One layer's call: codes `x` `[rows, k]` with their `totals`, per row the step and what zero codes stand for, outliers `[rows, o]`;
// the weight's panels, and of every output its scale and `reduced`.
struct QuikCall {
  const int8_t* x;
  const int32_t* totals;
  const float *step, *offset, *outliers;
  const uint8_t* panels;
  const float *scale, *reduced;
  int64_t rows, k, o, n;
  float* y;
};

// y = sums of codes * step * scale + offset * reduced + outliers, in float32 (`reference.epilogue`).
template <bool kHalves, typename Weight>
void Quik32(ffi::ThreadPool& pool, const QuikCall& call, const Weight* weights) {
  const int64_t bytes = call.k / (kHalves ? 8 : 4) * 64;
  ForTiles<CodeTiles>(pool, call.rows, (call.n + kPanel - 1) / kPanel, [&](auto count, auto wide, int64_t m, int64_t p) {
    constexpr int kCount = decltype(count)::value, kWide = decltype(wide)::value, kOutputs = kWide * kPanel;
    alignas(64) int32_t sums[kCount * kOutputs];
    alignas(64) float values[kCount * kOutputs];
    CodeTile<kCount, kWide, kHalves>(call.x + m * call.k, call.totals + m, call.panels + p * bytes, call.k, sums);
    FloatTile<kCount, kWide>(call.outliers + m * call.o, weights + p * call.o * kPanel, call.o, values, kOutputs, kOutputs);
    const int64_t first = p * kPanel, have = call.n - first < kOutputs ? call.n - first : kOutputs;
    for (int row = 0; row < kCount; ++row) {
      const float step = call.step[m + row], offset = call.offset[m + row];
      const int32_t* found = sums + row * kOutputs;
      const float *other = values + row * kOutputs, *scale = call.scale + first, *reduced = call.reduced + first;
      float* y = call.y + (m + row) * call.n + first;
      for (int64_t i = 0; i < have; ++i)
        y[i] = static_cast<float>(found[i]) * step * scale[i] + offset * reduced[i] + other[i];
    }
  });
}

// y[M, N] of codes x[M, K] and outliers [M, O] with one layer of a weight: panels of codes [L, N / 16, steps, 64], of outliers
// [L, N / 16, O, 16], scale and reduced [L, N]; `halves`: two codes to a byte.
ffi::Error QuikProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> step, ffi::Buffer<ffi::F32> offset,
                       ffi::Buffer<ffi::F32> outliers, ffi::Buffer<ffi::U8> panels, ffi::AnyBuffer weights,
                       ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> reduced, ffi::Buffer<ffi::S32> layer,
                       ffi::ResultBuffer<ffi::F32> y, bool halves) {
  const auto shape = panels.dimensions(), other = weights.dimensions();
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1], o = outliers.dimensions()[1], n = y->dimensions()[1];
  const int64_t group = halves ? 8 : 4, steps = (k + group - 1) / group, whole = steps * group, count = (n + kPanel - 1) / kPanel;
  const int64_t at = layer.typed_data()[0];
  if (shape.size() != 4 || shape[1] != count || shape[2] != steps || shape[3] != 64 || other.size() != 4 || other[1] != count ||
      other[2] != o || other[3] != kPanel || scale.dimensions()[1] != n || reduced.dimensions()[1] != n)
    return Wrong("quikjax: panels of codes do not have the shape of the product");
  if (at < 0 || at >= shape[0]) return Wrong("quikjax: there is no such layer among the panels");
  const int8_t* codes = x.typed_data();
  std::vector<int8_t> padded;
  if (whole != k) {
    padded.assign(rows * whole, 0);
    for (int64_t m = 0; m < rows; ++m) std::memcpy(padded.data() + m * whole, codes + m * k, k);
    codes = padded.data();
  }
  std::vector<int32_t> totals(rows);
  for (int64_t m = 0; m < rows; ++m) {
    int32_t total = 0;
    for (int64_t i = 0; i < whole; ++i) total += codes[m * whole + i];
    totals[m] = total;
  }
  const QuikCall call{codes, totals.data(), step.typed_data(), offset.typed_data(), outliers.typed_data(),
                      panels.typed_data() + at * count * steps * 64, scale.typed_data() + at * n,
                      reduced.typed_data() + at * n, rows, whole, o, n, y->typed_data()};
  auto run = [&](auto* all) {
    (halves ? Quik32<true, std::remove_pointer_t<decltype(all)>> : Quik32<false, std::remove_pointer_t<decltype(all)>>)(
        pool, call, all + at * count * o * kPanel);
    return ffi::Error::Success();
  };
  if (weights.element_type() == ffi::BF16) return run(static_cast<const BFloat16*>(weights.untyped_data()));
  if (weights.element_type() == ffi::F16) return run(static_cast<const Float16*>(weights.untyped_data()));
  return Wrong("quikjax: outliers are of bfloat16 or float16");
}

template <typename Value>
void PackFloats(const Value* from, Value* to, int64_t n, int64_t k) {
  for (int64_t p = 0; p * kPanel < n; ++p) {
    const int64_t have = n - p * kPanel < kPanel ? n - p * kPanel : kPanel;
    // By 16 inputs, so that what is read and what is written both stay in the nearest cache.
    for (int64_t first = 0; first < k; first += kPanel) {
      const int64_t last = first + kPanel < k ? first + kPanel : k;
      for (int64_t o = 0; o < kPanel; ++o)
        for (int64_t i = first; i < last; ++i)
          to[(p * k + i) * kPanel + o] = o < have ? from[(p * kPanel + o) * k + i] : Value{0};
    }
  }
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(quikjax_float_product, FloatProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quikjax_quik_product, QuikProduct,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<bool>("halves"));

// For Python, without XLA: a matrix [n, k] of 2 or 4 bytes a value into panels.
extern "C" void quikjax_pack_floats(const void* from, void* to, int64_t n, int64_t k, int64_t size) {
  if (size == 4) return PackFloats(static_cast<const uint32_t*>(from), static_cast<uint32_t*>(to), n, k);
  PackFloats(static_cast<const uint16_t*>(from), static_cast<uint16_t*>(to), n, k);
}

// Codes [n, base], one to a byte, into panels of k inputs in the order of the activations: input `columns[i]` has the i-th code,
// and inputs that `columns` (of length base) does not name have code zero.
extern "C" void quikjax_pack_codes(const int8_t* from, const int32_t* columns, uint8_t* to, int64_t n, int64_t base, int64_t k,
                                   int64_t halves) {
  const int64_t step = halves ? 8 : 4, bytes = (k + step - 1) / step * 64, panels = (n + kPanel - 1) / kPanel;
  std::memset(to, halves ? 0x88 : 0x80, panels * bytes);
  for (int64_t o = 0; o < n; ++o) {
    uint8_t* panel = to + o / kPanel * bytes + o % kPanel * 4;
    for (int64_t i = 0; i < base; ++i) {
      const int64_t input = columns[i], within = input % step;
      uint8_t* at = panel + input / step * 64 + within % 4;
      const int code = from[o * base + i];
      if (!halves) *at = static_cast<uint8_t>(code + 128);
      else if (within < 4) *at = static_cast<uint8_t>((*at & 0xf0) | (code + 8));
      else *at = static_cast<uint8_t>((*at & 0x0f) | ((code + 8) << 4));
    }
  }
}
