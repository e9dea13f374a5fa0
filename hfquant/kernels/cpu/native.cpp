// torch.ops.hfquant_cpu: checks the arguments, then runs the kernel of an instruction set on plain pointers. Uses only
// libtorch's stable ABI, so one library works with every torch from 2.10 on and every Python.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <vector>

#include "job.h"

namespace hfquant {

// Which of these exist depends on the target architecture.
extern const Isa isa_scalar;
#ifdef HFQUANT_X86
extern const Isa isa_avx2, isa_avxvnni, isa_avx512_vnni, isa_avx512_bf16;
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

struct Choice {
  const Isa* isa;
  bool here;  // whether this CPU supports it
};

// Narrowest first; Python refers to an instruction set by its index in this table.
const std::vector<Choice>& choices() {
  static const std::vector<Choice> table = [] {
    std::vector<Choice> found = {{&isa_scalar, true}};
#ifdef HFQUANT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                      __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                        __builtin_cpu_supports("avx512vnni");
    found.push_back({&isa_avx2, avx2});
    found.push_back({&isa_avxvnni, avx2 && __builtin_cpu_supports("avxvnni")});
    found.push_back({&isa_avx512_vnni, avx2 && avx512});
    // Intel's bfloat16 products are slower than float32's.
    const bool bfloat16 = __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
    found.push_back({&isa_avx512_bf16, avx2 && avx512 && bfloat16});
#endif
    return found;
  }();
  return table;
}

// Bit i is set if this CPU can run instruction set i.
int64_t instruction_sets() {
  int64_t bits = 0;
  for (size_t i = 0; i < choices().size(); ++i) bits |= static_cast<int64_t>(choices()[i].here) << i;
  return bits;
}

void on_torch_threads(int64_t count, int64_t grain, Body body, void* context) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// Returns the data of a tensor after checking that it is contiguous, on the CPU and of this shape.
const void* data_of(const Tensor& tensor, const char* name, Shape shape) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.is_contiguous(), name, ": expected a contiguous tensor on the CPU");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": expected rank ", shape.size(), ", got ",
                  tensor.dim());
  int64_t i = 0;
  for (int64_t size : shape) {
    STD_TORCH_CHECK(tensor.sizes()[i] == size, name, ": expected size ", size, " in dimension ", i, ", got ",
                    tensor.sizes()[i]);
    ++i;
  }
  const void* data = tensor.const_data_ptr();
  STD_TORCH_CHECK(data || !tensor.numel(), name, ": its data was freed");
  return data;
}

template <class T>
const T* data_of(const MaybeTensor& tensor, const char* name, ScalarType type, Shape shape) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->scalar_type() == type, name, ": unexpected dtype");
  return static_cast<const T*>(data_of(*tensor, name, shape));
}

Floats floats_of(const MaybeTensor& tensor, const char* name, Shape shape) {
  if (!tensor) return {};
  const ScalarType type = tensor->scalar_type();
  STD_TORCH_CHECK(is_float(type), name, ": expected float32, bfloat16 or float16");
  const Type ours = type == ScalarType::Float ? FLOAT32 : type == ScalarType::BFloat16 ? BFLOAT16 : FLOAT16;
  return {data_of(*tensor, name, shape), ours};
}

// Allocates a CPU tensor without the dispatcher: looking up the op by name takes as long as a small layer.
Tensor empty(const std::vector<int64_t>& shape, const Tensor& like) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), type,
                                                         aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

// Asks for huge pages for a large output. glibc usually maps memory of more than 32 MB anew for each tensor, and the first
// write to each small page faults, which takes up to as long as the product itself.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t MAPPED = 32 << 20, PAGE = 2 << 20;
  const uintptr_t from = reinterpret_cast<uintptr_t>(data), end = (from + bytes) / PAGE * PAGE;
  const uintptr_t start = (from + PAGE - 1) / PAGE * PAGE;
  if (static_cast<uintptr_t>(bytes) > MAPPED) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

// Multiplies `x` [.., K] by the weight. `spec` [7 + 2 segments] int64: bits of a weight code, or minus the number of
// another format; group size (0: none); bits or format of an input code, likewise (0: floats); whether input scales are
// per token; weight scales per row; rotation block size (0: none); number of segments; the segments' sizes; whether
// each segment has a second scale for its negative side (dual scale). `isa` is an index as in instruction_sets.
Tensor linear(Tensor x, Tensor weight, MaybeTensor scale, MaybeTensor scale_row, MaybeTensor zero_point,
              MaybeTensor input_scale, MaybeTensor input_scale_neg, MaybeTensor divisor, MaybeTensor down,
              MaybeTensor up, MaybeTensor bias, Tensor spec, int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa < static_cast<int64_t>(choices().size()) && choices()[isa].here,
                  "this CPU cannot run instruction set ", isa);
  STD_TORCH_CHECK(spec.is_cpu() && spec.is_contiguous() && spec.scalar_type() == ScalarType::Long && spec.dim() == 1 &&
                      spec.numel() >= 9,
                  "spec: expected int64 [7 + 2 segments]");
  const int64_t* numbers = static_cast<const int64_t*>(data_of(spec, "spec", {spec.numel()}));
  Job job = {};
  job.bits = numbers[0];
  job.format = numbers[0] < 0 ? static_cast<Format>(-numbers[0]) : INTEGERS;
  const bool integers = job.format == INTEGERS, two_bytes = numbers[0] <= -FP16;
  job.group_size = numbers[1];
  job.input_bits = numbers[2] < 0 ? 8 : numbers[2];
  job.input_format = numbers[2] < 0 ? static_cast<Format>(-numbers[2]) : INTEGERS;
  job.per_token = numbers[3];
  job.G = numbers[4];
  job.rotation = numbers[5];
  STD_TORCH_CHECK(job.rotation >= 0 && job.rotation <= INT32_MAX && !(job.rotation & (job.rotation - 1)),
                  "spec: blocks of ", job.rotation, " cannot be rotated");
  job.segments = numbers[6];
  STD_TORCH_CHECK(job.segments > 0 && spec.numel() == 7 + 2 * job.segments, "spec: expected ", job.segments,
                  " segments");
  job.segment = numbers + 7;
  job.dual = job.segment + job.segments;
  STD_TORCH_CHECK(numbers[0] >= -INT16 && numbers[0] <= 8 && (numbers[0] < 0 || numbers[0] >= 2),
                  "expected a weight of 2 to 8 bits or of a known format");
  if (!integers) job.bits = code_bits(job.format);
  const bool known = integers ? numbers[2] >= 2 && numbers[2] <= 8 : numbers[2] < 0 && numbers[2] >= -FP8_E5M2;
  STD_TORCH_CHECK(numbers[2] == 0 || known,
                  "expected an input of floats, of 2 to 8 bits for weights of as many, or of FP8 for others");
  STD_TORCH_CHECK(job.group_size >= 0 && job.group_size <= INT32_MAX, "group size out of range");
  int64_t groups = 0;
  for (int64_t s = 0; s < job.segments; ++s) {
    const int64_t size = job.segment[s];
    STD_TORCH_CHECK(size > 0 && size <= INT32_MAX, "segment ", s, " is of size ", size);
    job.K += size;
    groups += job.group_size ? (size + job.group_size - 1) / job.group_size : 1;
    STD_TORCH_CHECK(integers || !job.dual[s], "FP8 has no second scale");
    job.any_dual = job.any_dual || (job.input_bits && job.dual[s]);
  }
  STD_TORCH_CHECK(job.K <= INT32_MAX / 8 && groups == job.G, "spec: ", groups, " groups, not ", job.G);
  STD_TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1, "expected a weight of rank 2 and an input of features");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  STD_TORCH_CHECK(shape.back() == job.K, "x: expected ", job.K, " features, got ", shape.back());
  job.M = x.numel() / job.K;
  job.N = weight.sizes()[0];
  job.row_bytes = (job.K * job.bits + 7) / 8;
  job.x = floats_of(x, "x", shape);
  STD_TORCH_CHECK(weight.scalar_type() == (two_bytes ? ScalarType::Short : ScalarType::Char),
                  "weight: unexpected dtype");
  job.weight =
      static_cast<const uint8_t*>(data_of(weight, "weight", {job.N, two_bytes ? job.K : job.row_bytes}));
  STD_TORCH_CHECK(!integers || scale.has_value(), "scale: expected a tensor");
  STD_TORCH_CHECK(integers || !zero_point, "zero_point: only integers have one");
  if (scale_row) {
    job.scale_code = data_of<uint8_t>(scale, "scale", ScalarType::Byte, {job.N, job.G});
    job.scale_row = data_of<float>(scale_row, "scale_row", ScalarType::Float, {job.N, 1});
  } else {
    job.scale = data_of<float>(scale, "scale", ScalarType::Float, {job.N, job.G});
  }
  job.zero_bytes = (job.G * job.bits + 7) / 8;
  job.zero = reinterpret_cast<const uint8_t*>(
      data_of<int8_t>(zero_point, "zero_point", ScalarType::Char, {job.N, job.zero_bytes}));
  job.input_scale = data_of<float>(input_scale, "input_scale", ScalarType::Float, {job.segments});
  job.input_scale_neg = data_of<float>(input_scale_neg, "input_scale_neg", ScalarType::Float, {job.segments});
  STD_TORCH_CHECK(job.input_bits || !job.input_scale, "input_scale: the input is not quantized");
  job.divisor = data_of<float>(divisor, "divisor", ScalarType::Float, {job.K});
  STD_TORCH_CHECK(down.has_value() == up.has_value(), "down and up must be given together");
  if (down) {
    job.rank = down->dim() == 2 ? down->sizes()[0] : 0;
    job.down = floats_of(down, "down", {job.rank, job.K});
    job.up = floats_of(up, "up", {job.N, job.rank});
  }
  job.bias = floats_of(bias, "bias", {job.N});
  shape.back() = job.N;
  Tensor y = empty(shape, x);
  job.y = y.mutable_data_ptr();
  job.y_type = job.x.type;
  prefer_huge_pages(job.y, job.M * job.N * (job.y_type == FLOAT32 ? 4 : 2));
  if (job.M && job.N) choices()[isa].isa->run(job, on_torch_threads);
  return y;
}

}  // namespace
}  // namespace hfquant

STABLE_TORCH_LIBRARY(hfquant_cpu, m) {
  m.def("instruction_sets() -> int");
  m.def(
      "linear(Tensor x, Tensor weight, Tensor? scale, Tensor? scale_row, Tensor? zero_point, Tensor? input_scale, "
      "Tensor? input_scale_neg, Tensor? divisor, Tensor? down, Tensor? up, Tensor? bias, Tensor spec, int isa) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(hfquant_cpu, CompositeExplicitAutograd, m) {
  m.impl("instruction_sets", TORCH_BOX(&hfquant::instruction_sets));
}

STABLE_TORCH_LIBRARY_IMPL(hfquant_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&hfquant::linear)); }
