// The kernels of one instruction set. Compiled once per instruction set, with HFQUANT_ISA set to its name.
#include "floats.h"

namespace hfquant {
namespace HFQUANT_ISA {

// Tokens from which packing panels pays over streaming rows as stored: more if codes need no unpacking.
int64_t many(const Job& job) {
  if (job.format != INTEGERS) return 8;
  if (job.bits == 8) return job.G == 1 && !long_codes(job) ? 17 : 12;
  return LANES < 16 && long_codes(job) ? 5 : 8;
}

#if defined(__AVX512BF16__)
// Tokens from which rounding weights to bfloat16 pays over converting inputs to 16-bit integers: groups cost nothing
// per token then.
constexpr int64_t ROUNDING = 64;
#endif

bool few_tokens(const Job& job, ParallelFor parallel_for) {
  const std::vector<Block> blocks = blocks_of(job);
  if (!EXACT_BYTES && job.bits == 8) return try_rows<Wide>(job, blocks, parallel_for);
  // Nibbles are unpacked fastest, but their quads are twice as wide.
  const bool apart = job.bits == 4 && !fits_quads<Nibbles>(blocks) && fits_quads<Straddling<4>>(blocks);
  switch (job.bits) {
    case 2: return try_rows<Straddling<2>>(job, blocks, parallel_for);
    case 3: return try_rows<Straddling<3>>(job, blocks, parallel_for);
    case 4:
      return apart ? try_rows<Straddling<4>>(job, blocks, parallel_for) : try_rows<Nibbles>(job, blocks, parallel_for);
    case 5: return try_rows<Straddling<5>>(job, blocks, parallel_for);
    case 6: return try_rows<Straddling<6>>(job, blocks, parallel_for);
    case 7: return try_rows<Straddling<7>>(job, blocks, parallel_for);
    default: return try_rows<Eights>(job, blocks, parallel_for);
  }
}

// Computes the job by tiles of bytes. Sums of two words in 16 bits would be slower than none.
void by_byte_tiles(const Job& job, ParallelFor parallel_for) {
#if defined(HFQUANT_PAIRS)
  const int most_weight = (job.zero ? 2 << job.bits : 1 << job.bits) - 1, most_input = (1 << (job.input_bits - 1)) - 1;
  const int words = INT16_MAX / (2 * most_weight * most_input);
  if (words >= 8) return by_tiles<PairsDot<8>>(job, parallel_for);
  if (words >= 4) return by_tiles<PairsDot<4>>(job, parallel_for);
#endif
  by_tiles<BytesDot>(job, parallel_for);
}

void multiply(const Job& given, ParallelFor parallel_for) {
  if (given.M < many(given)) {
    if (given.format != INTEGERS) return by_float_rows(given, parallel_for);
    if (few_tokens(given, parallel_for)) return;
  }
  static thread_local Scratch of_inverse;
  Job job = given;
  if (job.divisor) job.inverse = inverse_of(job, of_inverse.get<float>(job.K));
#if defined(__AVX512BF16__)
  if (Bfloat16sDot::exact(job)) return by_tiles<Bfloat16sDot>(job, parallel_for);
  if (ScaledDot::takes(job) && job.M >= ROUNDING) return by_tiles<ScaledDot>(job, parallel_for);
#endif
  // 16-bit dot products are as fast as two 8-bit ones (high and low bytes) and have less overhead.
  if (job.format != INTEGERS)
    by_float_tiles(job, parallel_for);
  else if (long_codes(job) || (!EXACT_BYTES && job.bits == 8))
    by_tiles<ShortsDot>(job, parallel_for);
  else
    by_byte_tiles(job, parallel_for);
}

// Returns the job of the low-rank branch's first product, x down^T with the raw x; it writes y [M, rank].
Job branch_of(const Job& job, float* y) {
  Job branch = {};
  branch.M = job.M, branch.N = job.rank, branch.K = job.K;
  branch.x = job.x, branch.y = y, branch.y_type = FLOAT32;
  branch.format = format_of(job.down.type), branch.bits = code_bits(branch.format);
  branch.weight = static_cast<const uint8_t*>(job.down.data), branch.row_bytes = job.K * branch.bits / 8;
  branch.G = branch.segments = 1, branch.segment = &job.K;
  return branch;
}

void run(const Job& job, ParallelFor parallel_for) {
  if (!job.rank) return multiply(job, parallel_for);
  static thread_local Scratch of_narrow;
  Job whole = job;
  float* narrow = of_narrow.get<float>(job.M * job.rank);
  whole.narrow = narrow;
  multiply(branch_of(job, narrow), parallel_for);
  multiply(whole, parallel_for);
}

}  // namespace HFQUANT_ISA

#define HFQUANT_NAME(isa) HFQUANT_STRING(isa)
#define HFQUANT_STRING(text) #text
#define HFQUANT_JOIN(a, b) HFQUANT_PASTE(a, b)
#define HFQUANT_PASTE(a, b) a##b
extern const Isa HFQUANT_JOIN(isa_, HFQUANT_ISA);
const Isa HFQUANT_JOIN(isa_, HFQUANT_ISA) = {HFQUANT_NAME(HFQUANT_ISA), HFQUANT_ISA::run};

}  // namespace hfquant
