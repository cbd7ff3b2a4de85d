// The causal families of `schema.py` for onnxruntime's CPU provider, in float32, float16 and bfloat16.
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <atomic>
#include <cstdlib>
#include <memory>

#include "isa.h"
#include "rolling.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace linearize {
extern const RollingKernels avx2_rolling, avx512_rolling;

namespace {

enum Input { QUERY, KEY, VALUE, MASK, PAST_RECURRENT, PAST_WINDOW, PAST_LENGTH, ALPHA, LOCAL, CONV, INPUTS };
enum Output { OUT, PRESENT_RECURRENT, PRESENT_WINDOW, OUTPUTS };

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

std::atomic<int64_t> calls{0};

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

void require(bool fits, const char* what) {
  if (!fits) ORT_CXX_API_THROW(std::string("ai.linearize: the shapes do not fit: ") + what, ORT_INVALID_ARGUMENT);
}

// [batch, head, row, column] without gaps.
Tensor place(const void* data, const std::vector<int64_t>& shape) {
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
    std::vector<int64_t> shape[INPUTS];
    for (size_t i = 0; i < INPUTS; i++) {
      in[i] = context.GetInput(i);
      shape[i] = in[i].GetTensorTypeAndShapeInfo().GetShape();
    }
    const auto &q = shape[QUERY], &k = shape[KEY], &v = shape[VALUE], &window = shape[PAST_WINDOW];
    require(q.size() == 4 && k.size() == 4 && v.size() == 4 && window.size() == 4, "four dimensions");
    const int64_t batch = q[0], heads = q[1], kv_heads = k[1], length = q[2], dim = q[3], value_dim = v[3];
    require(kv_heads > 0 && heads % kv_heads == 0, "the heads of query and key");
    require(k == std::vector<int64_t>{batch, kv_heads, length, dim}, "query and key");
    require(v == std::vector<int64_t>{batch, kv_heads, length, value_dim}, "value");
    require(shape[MASK] == std::vector<int64_t>{batch, length}, "mask");
    require(shape[PAST_RECURRENT] == std::vector<int64_t>{batch, kv_heads, dim, value_dim}, "past_recurrent");
    require(shape[PAST_LENGTH] == std::vector<int64_t>{batch}, "past_length");
    require(shape[ALPHA] == std::vector<int64_t>{heads} && shape[LOCAL] == shape[ALPHA], "alpha, local_scale");
    require(shape[CONV].size() == 2 && shape[CONV][0] == heads && shape[CONV][1] > 0, "conv_weight");
    const int64_t taps = shape[CONV][1], rows = window[2];
    require(window == std::vector<int64_t>{batch, kv_heads, rows, dim + value_dim}, "past_window");
    require(rows >= group - 1 && rows >= taps - 1 && rows > 0, "the rows of past_window");

    const std::vector<int64_t> out{batch, heads, length, value_dim};
    Call call;
    Rolling& r = call.rolling;
    r.core = {dtype, batch,      heads,     kv_heads, length, dim, value_dim, group, taps, activation,
              normalize, in[ALPHA].GetTensorData<float>(), in[LOCAL].GetTensorData<float>(),
              in[CONV].GetTensorData<float>()};
    r.query = place(in[QUERY].GetTensorRawData(), q);
    r.key = place(in[KEY].GetTensorRawData(), k);
    r.value = place(in[VALUE].GetTensorRawData(), v);
    r.past_recurrent = place(in[PAST_RECURRENT].GetTensorRawData(), shape[PAST_RECURRENT]);
    r.past_window = place(in[PAST_WINDOW].GetTensorRawData(), window);
    r.out = place(context.GetOutput(OUT, out).GetTensorMutableRawData(), out);
    r.recurrent = place(context.GetOutput(PRESENT_RECURRENT, shape[PAST_RECURRENT]).GetTensorMutableRawData(),
                        shape[PAST_RECURRENT]);
    r.window = place(context.GetOutput(PRESENT_WINDOW, window).GetTensorMutableRawData(), window);
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

struct Op : Ort::CustomOpBase<Op, Kernel> {
  Family family;
  Dtype dtype;

  Op(Family family, Dtype dtype) : family(family), dtype(dtype) {}

  void* CreateKernel(const OrtApi&, const OrtKernelInfo* info) const {
    return new Kernel(info, dtype, family.activation);
  }
  const char* GetName() const { return family.name; }
  const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
  size_t GetInputTypeCount() const { return INPUTS; }
  size_t GetOutputTypeCount() const { return OUTPUTS; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    if (i == MASK) return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    if (i == PAST_LENGTH) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    return i <= VALUE || i == PAST_WINDOW ? ONNX_TYPES[dtype] : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    return i == PRESENT_RECURRENT ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TYPES[dtype];
  }
};

}  // namespace
}  // namespace linearize

using namespace linearize;

// How often an operator of this library ran in this process.
EXPORTED int64_t linearize_onnx_calls() { return calls.load(); }

// The sources it was built from (build.py, `sources`), and the minor number of the oldest onnxruntime for it.
EXPORTED const char* linearize_onnx_sources() { return SOURCES; }
EXPORTED int64_t linearize_onnx_api() { return ORT_API_VERSION; }

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
