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
#include <thread>
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
  // The last pieces take microseconds, unless whoever has them was put aside for another process.
  for (int turns = 0; pieces->done.load(std::memory_order_acquire) < count; ++turns) {
    if (turns < 10000) _mm_pause();
    else std::this_thread::yield();
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

inline int32_t Word(const int8_t* from) {
  int32_t word;
  std::memcpy(&word, from, sizeof(word));
  return word;
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
inline Four Spread(const int8_t* from) { return {_mm512_set1_epi32(Word(from))}; }
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
inline Four Spread(const int8_t* from) { return {_mm256_set1_epi32(Word(from))}; }
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
    // Codes are stored with an offset, which every code of the row was multiplied by. Modulo 2^32, as the sums were taken.
    const uint32_t added = static_cast<uint32_t>(totals[m]) * (kHalves ? 8 : 128);
    for (int o = 0; o < kWide * kPanel; ++o)
      found[m * kWide * kPanel + o] = static_cast<int32_t>(static_cast<uint32_t>(words[o]) - added);
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

// The tiles of one product: panels in groups, rows in parts, each of which is a piece of the work.
template <typename Tiles>
struct Tiling {
  int64_t rows, panels;

  // Within a part panels come from the nearest cache but for the first tile.
  static constexpr int64_t kPart = 8 * Tiles::kMost;
  int64_t groups() const { return (panels + kPanels - 1) / kPanels; }
  int64_t pieces() const { return (rows + kPart - 1) / kPart * groups(); }

  // `tile(count, wide, m, panel)` for the tiles of a piece.
  template <typename Tile>
  void Run(int64_t piece, const Tile& tile) const {
    const int64_t first = piece % groups() * kPanels, last = first + kPanels < panels ? first + kPanels : panels;
    const int64_t begin = piece / groups() * kPart, end = begin + kPart < rows ? begin + kPart : rows;
    for (int64_t m = begin; m < end; m += Tiles::kMost) {
      WithCount<Tiles::kMost>(end - m < Tiles::kMost ? end - m : Tiles::kMost, [&](auto count) {
        constexpr int kWide = Tiles::Panels(decltype(count)::value);
        int64_t p = first;
        for (; p + kWide <= last; p += kWide) tile(count, std::integral_constant<int, kWide>{}, m, p);
        for (; p < last; ++p) tile(count, std::integral_constant<int, 1>{}, m, p);
      });
    }
  }
};

// Products that read the same activations, as one work: threads meet once for all of them. `run(product, piece of it)`.
template <typename Product, typename Run>
void ForAll(ffi::ThreadPool& pool, const std::vector<Product>& products, const Run& run) {
  std::vector<int64_t> starts{0};
  for (const Product& product : products) starts.push_back(starts.back() + product.tiling.pieces());
  InParallel(pool, starts.back(), [&](int64_t piece) {
    size_t i = 0;
    while (piece >= starts[i + 1]) ++i;
    run(products[i], piece - starts[i]);
  });
}

ffi::Error Wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, what); }

struct FloatProduct {
  Tiling<FloatTiles> tiling;
  ffi::DataType type;
  const void* panels;
  int64_t offset, n;
  float* y;

  template <typename Weight>
  void Run(int64_t piece, const float* x, int64_t k) const {
    const Weight* all = static_cast<const Weight*>(panels) + offset;
    tiling.Run(piece, [&](auto count, auto wide, int64_t m, int64_t p) {
      FloatTile<decltype(count)::value, decltype(wide)::value>(x + m * k, all + p * k * kPanel, k, y + m * n + p * kPanel, n,
                                                               n - p * kPanel);
    });
  }
};

// y[M, N] = x[M, K] of float32 with the panels [L, N / 16, K, 16] of one layer; panels and layer of each of several weights.
ffi::Error FloatProducts(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights, ffi::RemainingRets results) {
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1];
  std::vector<FloatProduct> products;
  for (size_t i = 0; i < results.size(); ++i) {
    auto panels = weights.get<ffi::AnyBuffer>(2 * i);
    auto layer = weights.get<ffi::Buffer<ffi::S32>>(2 * i + 1);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!panels || !layer || !y) return Wrong("quikjax: panels and a layer are wanted for every result");
    const auto shape = panels->dimensions();
    const int64_t n = (*y)->dimensions()[1], count = (n + kPanel - 1) / kPanel, at = layer->typed_data()[0];
    if (shape.size() != 4 || shape[1] != count || shape[2] != k || shape[3] != kPanel)
      return Wrong("quikjax: panels of floats do not have the shape of the product");
    if (at < 0 || at >= shape[0]) return Wrong("quikjax: there is no such layer among the panels");
    const auto type = panels->element_type();
    if (type != ffi::F32 && type != ffi::BF16 && type != ffi::F16)
      return Wrong("quikjax: panels are of float32, bfloat16 or float16");
    products.push_back({{rows, count}, type, panels->untyped_data(), at * count * k * kPanel, n, (*y)->typed_data()});
  }
  ForAll(pool, products, [&](const FloatProduct& product, int64_t piece) {
    if (product.type == ffi::F32) product.Run<float>(piece, x.typed_data(), k);
    if (product.type == ffi::BF16) product.Run<BFloat16>(piece, x.typed_data(), k);
    if (product.type == ffi::F16) product.Run<Float16>(piece, x.typed_data(), k);
  });
  return ffi::Error::Success();
}

// Activations as a QUIK layer reads them: codes [rows, k] with the sums of each row, per row the step and what code zero stands for,
// outliers [rows, o].
struct Split {
  const int8_t* codes;
  const int32_t* totals;
  const float *step, *offset, *outliers;
  int64_t k, o;
};

struct QuikProduct {
  Tiling<CodeTiles> tiling;
  const uint8_t* panels;
  ffi::DataType type;
  const void* weights;
  const float *scale, *reduced;
  int64_t n;
  float* y;

  // y = sums of codes * step * scale + offset * reduced + outliers, in float32 (`reference.epilogue`).
  template <bool kHalves, typename Weight>
  void Run(int64_t piece, const Split& split) const {
    const int64_t bytes = split.k / (kHalves ? 8 : 4) * 64;
    const Weight* other = static_cast<const Weight*>(weights);
    tiling.Run(piece, [&](auto count, auto wide, int64_t m, int64_t p) {
      constexpr int kCount = decltype(count)::value, kWide = decltype(wide)::value, kOutputs = kWide * kPanel;
      alignas(64) int32_t sums[kCount * kOutputs];
      alignas(64) float values[kCount * kOutputs];
      CodeTile<kCount, kWide, kHalves>(split.codes + m * split.k, split.totals + m, panels + p * bytes, split.k, sums);
      FloatTile<kCount, kWide>(split.outliers + m * split.o, other + p * split.o * kPanel, split.o, values, kOutputs, kOutputs);
      const int64_t first = p * kPanel, have = n - first < kOutputs ? n - first : kOutputs;
      for (int row = 0; row < kCount; ++row) {
        const float step = split.step[m + row], offset = split.offset[m + row];
        const int32_t* found = sums + row * kOutputs;
        const float* added = values + row * kOutputs;
        float* to = y + (m + row) * n + first;
        for (int64_t i = 0; i < have; ++i)
          to[i] = static_cast<float>(found[i]) * step * scale[first + i] + offset * reduced[first + i] + added[i];
      }
    });
  }
};

// y[M, N] of codes x[M, K] and outliers [M, O] with one layer of each of several weights: panels of codes [L, N / 16, steps, 64],
// of outliers [L, N / 16, O, 16], scale and reduced [L, N], and the layer; `halves`: two codes to a byte.
ffi::Error QuikProducts(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> step, ffi::Buffer<ffi::F32> offset,
                        ffi::Buffer<ffi::F32> outliers, ffi::RemainingArgs weights, ffi::RemainingRets results, bool halves) {
  const int64_t rows = x.dimensions()[0], k = x.dimensions()[1], o = outliers.dimensions()[1];
  const int64_t group = halves ? 8 : 4, steps = (k + group - 1) / group, whole = steps * group;
  std::vector<QuikProduct> products;
  for (size_t i = 0; i < results.size(); ++i) {
    auto panels = weights.get<ffi::Buffer<ffi::U8>>(5 * i);
    auto other = weights.get<ffi::AnyBuffer>(5 * i + 1);
    auto scale = weights.get<ffi::Buffer<ffi::F32>>(5 * i + 2), reduced = weights.get<ffi::Buffer<ffi::F32>>(5 * i + 3);
    auto layer = weights.get<ffi::Buffer<ffi::S32>>(5 * i + 4);
    auto y = results.get<ffi::Buffer<ffi::F32>>(i);
    if (!panels || !other || !scale || !reduced || !layer || !y)
      return Wrong("quikjax: codes, outliers, scale, reduced and a layer are wanted for every result");
    const auto shape = panels->dimensions(), beside = other->dimensions();
    const int64_t n = (*y)->dimensions()[1], count = (n + kPanel - 1) / kPanel, at = layer->typed_data()[0];
    if (shape.size() != 4 || shape[1] != count || shape[2] != steps || shape[3] != 64 || beside.size() != 4 ||
        beside[1] != count || beside[2] != o || beside[3] != kPanel || scale->dimensions()[1] != n ||
        reduced->dimensions()[1] != n)
      return Wrong("quikjax: panels of codes do not have the shape of the product");
    if (at < 0 || at >= shape[0]) return Wrong("quikjax: there is no such layer among the panels");
    const auto type = other->element_type();
    if (type != ffi::BF16 && type != ffi::F16) return Wrong("quikjax: outliers are of bfloat16 or float16");
    const char* outlier_panels = static_cast<const char*>(other->untyped_data()) + at * count * o * kPanel * 2;
    products.push_back({{rows, count}, panels->typed_data() + at * count * steps * 64, type, outlier_panels,
                        scale->typed_data() + at * n, reduced->typed_data() + at * n, n, (*y)->typed_data()});
  }
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
  const Split split{codes, totals.data(), step.typed_data(), offset.typed_data(), outliers.typed_data(), whole, o};
  ForAll(pool, products, [&](const QuikProduct& product, int64_t piece) {
    const bool narrow = product.type == ffi::BF16;
    if (halves && narrow) product.Run<true, BFloat16>(piece, split);
    if (halves && !narrow) product.Run<true, Float16>(piece, split);
    if (!halves && narrow) product.Run<false, BFloat16>(piece, split);
    if (!halves && !narrow) product.Run<false, Float16>(piece, split);
  });
  return ffi::Error::Success();
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    quikjax_float_products, FloatProducts,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>().RemainingArgs().RemainingRets());
XLA_FFI_DEFINE_HANDLER_SYMBOL(quikjax_quik_products, QuikProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .RemainingRets()
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
