// What a node of a causal family is to onnxruntime, whichever library runs it: its inputs, their types and how
// their shapes must fit (`schema.py`).
#pragma once
#define ORT_API_MANUAL_INIT
#include <onnxruntime_cxx_api.h>
#undef ORT_API_MANUAL_INIT

#include <atomic>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace linearize {

static std::atomic<int64_t> calls{0};  // of this library alone

enum Input { QUERY, KEY, VALUE, MASK, PAST_RECURRENT, PAST_WINDOW, PAST_LENGTH, ALPHA, LOCAL, CONV, INPUTS };
enum Output { OUT, PRESENT_RECURRENT, PRESENT_WINDOW, OUTPUTS };

using Shape = std::vector<int64_t>;

inline void require(bool fits, const char* what) {
  if (!fits) ORT_CXX_API_THROW(std::string("ai.linearize: the shapes do not fit: ") + what, ORT_INVALID_ARGUMENT);
}

// rows: of the window.
struct NodeSizes {
  int64_t batch, heads, kv_heads, length, dim, value_dim, taps, rows;
};

// The sizes of a call, whose shapes fit each other and the group; an error says which do not.
inline NodeSizes sizes_of(const Shape (&shape)[INPUTS], int64_t group) {
  const Shape &q = shape[QUERY], &k = shape[KEY], &v = shape[VALUE], &window = shape[PAST_WINDOW];
  require(q.size() == 4 && k.size() == 4 && v.size() == 4 && window.size() == 4, "four dimensions");
  const int64_t batch = q[0], heads = q[1], kv_heads = k[1], length = q[2], dim = q[3], value_dim = v[3];
  require(kv_heads > 0 && heads % kv_heads == 0, "the heads of query and key");
  require(k == Shape{batch, kv_heads, length, dim}, "query and key");
  require(v == Shape{batch, kv_heads, length, value_dim}, "value");
  require(shape[MASK] == Shape{batch, length}, "mask");
  require(shape[PAST_RECURRENT] == Shape{batch, kv_heads, dim, value_dim}, "past_recurrent");
  require(shape[PAST_LENGTH] == Shape{batch}, "past_length");
  require(shape[ALPHA] == Shape{heads} && shape[LOCAL] == shape[ALPHA], "alpha, local_scale");
  require(shape[CONV].size() == 2 && shape[CONV][0] == heads && shape[CONV][1] > 0, "conv_weight");
  const int64_t taps = shape[CONV][1], rows = window[2];
  require(window == Shape{batch, kv_heads, rows, dim + value_dim}, "past_window");
  require(rows >= group - 1 && rows >= taps - 1 && rows > 0, "the rows of past_window");
  return {batch, heads, kv_heads, length, dim, value_dim, taps, rows};
}

// family: the operator's name. type: T of the node.
template <class Op, class Kernel>
struct CausalOp : Ort::CustomOpBase<Op, Kernel> {
  const char* family;
  ONNXTensorElementDataType type;

  CausalOp(const char* family, ONNXTensorElementDataType type) : family(family), type(type) {}

  const char* GetName() const { return family; }
  size_t GetInputTypeCount() const { return INPUTS; }
  size_t GetOutputTypeCount() const { return OUTPUTS; }
  ONNXTensorElementDataType GetInputType(size_t i) const {
    if (i == MASK) return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    if (i == PAST_LENGTH) return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    return i <= VALUE || i == PAST_WINDOW ? type : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  }
  ONNXTensorElementDataType GetOutputType(size_t i) const {
    return i == PRESENT_RECURRENT ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : type;
  }
};

}  // namespace linearize

// How often an operator of this library ran in this process.
EXPORTED int64_t linearize_onnx_calls() { return linearize::calls.load(); }

// The digest of the sources it was built from, and the minor number of the oldest onnxruntime for it.
EXPORTED const char* linearize_onnx_sources() { return SOURCES; }
EXPORTED int64_t linearize_onnx_api() { return ORT_API_VERSION; }
