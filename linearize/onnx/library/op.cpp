// The causal families of `schema.py` for onnxruntime's CPU provider, in float32, float16 and bfloat16.
#include "operator.h"

#include <atomic>
#include <cstdlib>
#include <memory>

#include "isa.h"
#include "rolling.h"

namespace linearize {
extern const RollingKernels avx2_rolling, avx512_rolling;

namespace {

constexpr ONNXTensorElementDataType ONNX_TYPES[] = {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16,
};

struct Family {
  const char* name;
  Activation activation;
};
constexpr Family FAMILIES[] = {{"AugmentedLinearAttention", RELU2}, {"PlainLinearAttention", LINEAR}};

constexpr double WORTH_THREADS = 1e6;  // multiplications; fewer are done before a second thread has woken up

const RollingKernels& kernels() { return best_isa() == AVX512 ? avx512_rolling : avx2_rolling; }

// Memory that a thread keeps for its next call, aligned to cache lines; null when there is none.
float* scratch_of(size_t floats) {
  struct Free {
    void operator()(float* block) const { std::free(block); }
  };
  thread_local std::unique_ptr<float, Free> block;
  thread_local size_t held = 0;
  if (floats > held) {
    block.reset(static_cast<float*>(std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64)));
    held = block ? floats : 0;
  }
  return block.get();
}

struct Call {
  Rolling rolling;
  const RollingKernels* kernels;
  std::atomic<bool> failed{false};

  // Nothing may be thrown here: a thread of onnxruntime has nobody to catch it.
  void unit(size_t i) {
    float* scratch = scratch_of(kernels->scratch(rolling));
    if (scratch) kernels->unit(rolling, static_cast<int64_t>(i), scratch);
    else failed = true;
  }
};

// [batch, head, row, column] without gaps.
Tensor place(const void* data, const Shape& shape) {
  return {const_cast<void*>(data), shape[1] * shape[2] * shape[3], shape[2] * shape[3], shape[3]};
}

struct Kernel {
  Dtype dtype;
  Activation activation;
  int64_t group, normalize;

  Kernel(const OrtKernelInfo* info, Dtype dtype, Activation activation) : dtype(dtype), activation(activation) {
    Ort::ConstKernelInfo attributes(info);
    group = attributes.GetAttribute<int64_t>("group_size");
    normalize = attributes.GetAttribute<int64_t>("normalize");
    if (group < 1) ORT_CXX_API_THROW("ai.linearize: group_size must be at least 1", ORT_INVALID_ARGUMENT);
  }

  void Compute(OrtKernelContext* handle) const {
    Ort::KernelContext context(handle);
    Ort::ConstValue in[INPUTS];
    Shape shape[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
      in[i] = context.GetInput(i);
      shape[i] = in[i].GetTensorTypeAndShapeInfo().GetShape();
    }
    const auto [batch, heads, kv_heads, length, dim, value_dim, taps, rows] = sizes_of(shape, group);

    const Shape out{batch, heads, length, value_dim};
    Call call;
    Rolling& r = call.rolling;
    r.core = {dtype, batch,      heads,     kv_heads, length, dim, value_dim, group, taps, activation,
              normalize, in[ALPHA].GetTensorData<float>(), in[LOCAL].GetTensorData<float>(),
              in[CONV].GetTensorData<float>()};
    r.query = place(in[QUERY].GetTensorRawData(), shape[QUERY]);
    r.key = place(in[KEY].GetTensorRawData(), shape[KEY]);
    r.value = place(in[VALUE].GetTensorRawData(), shape[VALUE]);
    r.past_recurrent = place(in[PAST_RECURRENT].GetTensorRawData(), shape[PAST_RECURRENT]);
    r.past_window = place(in[PAST_WINDOW].GetTensorRawData(), shape[PAST_WINDOW]);
    r.out = place(context.GetOutput(OUT, out).GetTensorMutableRawData(), out);
    r.recurrent = place(context.GetOutput(PRESENT_RECURRENT, shape[PAST_RECURRENT]).GetTensorMutableRawData(),
                        shape[PAST_RECURRENT]);
    r.window = place(context.GetOutput(PRESENT_WINDOW, shape[PAST_WINDOW]).GetTensorMutableRawData(),
                     shape[PAST_WINDOW]);
    r.rows = rows;
    r.past_length = in[PAST_LENGTH].GetTensorData<int64_t>();
    r.real = in[MASK].GetTensorData<bool>();
    call.kernels = &kernels();

    const size_t units = batch * kv_heads;
    const double work = double(batch) * heads * length * (rows + dim) * (dim + value_dim);
    if (work < WORTH_THREADS || units == 1)
      for (size_t i = 0; i < units; i++) call.unit(i);
    else
      context.ParallelFor([](void* data, size_t i) { static_cast<Call*>(data)->unit(i); }, units, 0, &call);
    if (call.failed) ORT_CXX_API_THROW("ai.linearize: no memory for scratch", ORT_FAIL);
    calls++;
  }
};

struct Op : CausalOp<Op, Kernel> {
  Activation activation;
  Dtype dtype;

  Op(const Family& family, Dtype dtype)
      : CausalOp(family.name, ONNX_TYPES[dtype]), activation(family.activation), dtype(dtype) {}

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const { return new Kernel(info, dtype, activation); }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
};

}  // namespace
}  // namespace linearize

using namespace linearize;

// 1 when this processor can run the kernels.
EXPORTED int64_t linearize_onnx_runs_here() { return best_isa() != NONE; }

EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (!api || best_isa() == NONE) return nullptr;  // too old, or no AVX2: the bodies run
  Ort::InitApi(api);
  static const Ort::CustomOpDomain domain = [] {
    Ort::CustomOpDomain made("ai.linearize");
    for (const Family& family : FAMILIES)
      for (Dtype dtype : {FLOAT32, FLOAT16, BFLOAT16}) made.Add(new Op(family, dtype));
    return made;
  }();
  return api->AddCustomOpDomain(options, domain);
}
